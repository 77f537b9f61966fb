"""LoRA: zero at the start, merged as unmerged, saved as peft saves, strict when it loads."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import random_batch, reference_model
from safetensors.torch import load_file, save_file
from torch import nn

from paligemma.checkpoint import load_model
from paligemma.gemma import GemmaConfig, GemmaModel
from paligemma.gemma2 import Gemma2Config, Gemma2Model
from paligemma.lora import (
    LoRALinear,
    adapters,
    add_lora,
    load_adapter,
    merge_lora,
    remove_lora,
    save_adapter,
    trainable_parameters,
)
from paligemma.model import PaliGemma, PaliGemmaConfig
from paligemma.quantization import quantize_model
from paligemma.siglip import SiglipVisionConfig, SiglipVisionModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EVERYWHERE = ("vision_tower.*", "linear", "language_model.*")
SMALL_VISION = SiglipVisionConfig(16, 32, 2, 2, image_size=28)
SMALL_TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def small() -> PaliGemma:
    torch.manual_seed(0)
    config = PaliGemmaConfig(SMALL_VISION, GemmaConfig(**SMALL_TEXT), image_token_index=60)
    return PaliGemma(config).eval()


def small_inputs():
    torch.manual_seed(1)
    ids = torch.cat([torch.full((2, 4), 60), torch.randint(3, 50, (2, 5))], dim=1)
    return ids, torch.randn(2, 3, 28, 28)


def stir(model, scale=0.3, seed=5):
    """Give every B a value, as training would."""
    torch.manual_seed(seed)
    for layer in adapters(model).values():
        nn.init.normal_(layer.lora_B.weight, std=scale)
    return model


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(our model's maker, transformers' model's maker): the same weights."""
    path = tmp_path_factory.mktemp("lora") / "base"
    reference_model().save_pretrained(path)
    return lambda: load_model(path), reference_model


def reference() -> dict[str, torch.Tensor]:
    """peft's LoRA on one linear layer: its output, and the weight it merges to."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(26)
    base = nn.Sequential(nn.Linear(24, 16))
    start = {name: tensor.clone() for name, tensor in base[0].state_dict().items()}
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=["0"])).eval()
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(b)
    x = torch.randn(5, 24)
    found = start | {"x": x, "A": a.clone(), "B": b.clone(), "out": model(x)}
    return found | {"merged": model.merge_and_unload()[0].weight}


@torch.inference_mode()
def both_logits(ours, theirs):
    batch = random_batch()
    reference = theirs(**batch, token_type_ids=torch.zeros_like(batch["input_ids"])).logits
    real = batch["attention_mask"].bool()
    return ours(**batch).logits[real], reference[real]


# ---------------------------------------------------------------- one layer


@settings(max_examples=25, deadline=None)
@given(
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    rank=st.integers(1, 12),
    alpha=st.floats(0.1, 64),
    bias=st.booleans(),
    root=st.booleans(),
)
def test_the_layer_is_its_formula(inputs, outputs, rank, alpha, bias, root):
    layer = LoRALinear(nn.Linear(inputs, outputs, bias=bias), rank, alpha, use_rslora=root)
    x = torch.randn(3, 5, inputs)
    assert torch.equal(layer(x), layer.base_layer(x)), "B = 0: nothing changed yet"
    nn.init.normal_(layer.lora_B.weight)
    scale = alpha / (rank**0.5 if root else rank)
    weight = layer.base_layer.weight + scale * layer.lora_B.weight @ layer.lora_A.weight
    expected = nn.functional.linear(x, weight, layer.base_layer.bias)
    assert torch.allclose(layer(x), expected, atol=1e-4 * alpha, rtol=1e-4)


def test_a_starts_as_in_peft_and_b_at_zero():
    from peft.tuners.lora import Linear
    from peft.tuners.lora.config import LoraConfig

    config = LoraConfig(r=3, lora_alpha=16)
    theirs = Linear(nn.Linear(7, 5), "default", config, r=3, lora_alpha=16)
    ours = LoRALinear(nn.Linear(7, 5), 3)
    for a in (ours.lora_A.weight, theirs.lora_A["default"].weight):
        assert 0.5 / 7**0.5 < a.abs().max() <= 1 / 7**0.5
    assert not ours.lora_B.weight.any() and not theirs.lora_B["default"].weight.any()


def test_at_first_only_b_has_a_gradient():
    layer = LoRALinear(nn.Linear(6, 4), 2)
    layer(torch.randn(8, 6)).square().sum().backward()
    assert not layer.lora_A.weight.grad.any() and layer.lora_B.weight.grad.all()
    assert layer.base_layer.weight.grad is None and layer.base_layer.bias.grad is None


def test_dropout_acts_on_the_correction_in_training_only():
    base = nn.Linear(50, 4).eval()
    layer = LoRALinear(base, 2, dropout=0.5)
    assert not layer.training, "an adapter on a model in evaluation is in evaluation"
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(3, 50)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types(dtype):
    layer = LoRALinear(nn.Linear(8, 8, dtype=dtype), 2)
    nn.init.normal_(layer.lora_B.weight)
    wanted = torch.float32 if dtype == torch.bfloat16 else torch.float64
    assert layer.lora_A.weight.dtype == layer.delta().dtype == wanted
    assert layer(torch.randn(2, 8, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    "bad",
    [
        {"rank": 0},
        {"rank": 2.0},
        {"rank": True},
        {"alpha": 0},
        {"alpha": float("nan")},
        {"dropout": 1.0},
    ],
)
def test_numbers_that_cannot_be(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        LoRALinear(nn.Linear(4, 4), **bad)


# ---------------------------------------------------------------- a model


def test_adapters_change_nothing_and_alone_learn():
    model = small()
    ids, pixels = small_inputs()
    before = model(ids, pixels).logits
    names = add_lora(model, rank=2)
    assert torch.equal(model(ids, pixels).logits, before)
    assert names == list(adapters(model)) and len(names) == 8  # q and v in 2 + 2 blocks
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learning == {f"{n}.lora_{which}.weight" for n in names for which in "AB"}
    count = sum(2 * sum(layer.base_layer.weight.shape) for layer in adapters(model).values())
    total = sum(p.numel() for p in model.parameters())
    assert trainable_parameters(model) == (count, total)


@pytest.mark.parametrize(
    ("model", "target", "count"),
    [
        (GemmaModel(GemmaConfig(**SMALL_TEXT)), "mlp.*", 6),
        (Gemma2Model(Gemma2Config(**SMALL_TEXT, query_pre_attn_scalar=8)), "o_proj", 2),
        (SiglipVisionModel(SMALL_VISION), "layers.1.*", 6),
    ],
)
def test_parts_of_the_model(model, target, count):
    assert len(add_lora(model, 2, targets=target)) == count
    assert trainable_parameters(model)[0] > 0
    assert len(merge_lora(model)) == count and not adapters(model)


def test_patterns():
    ends = {
        "q_proj": 4,
        "proj": 0,
        "*_proj": 2 * 4 + 2 * 7,
        "language_model.*.q_proj": 2,
        "vision_tower.*": 12,
        "multi_modal_projector.linear": 1,
        "layers.0.self_attn.q_proj": 2,
    }
    for target, count in ends.items():
        if count:
            assert len(add_lora(small(), 2, targets=[target])) == count, target
        else:
            with pytest.raises(ValueError, match="no linear layer is called"):
                add_lora(small(), 2, targets=[target])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ["q_proj", "query"]}, "'query'.* has .*q_proj"),
        ({"targets": ["embed_tokens"]}, "embed_tokens"),  # the tied head is no linear layer
        ({"targets": []}, "no linear layer"),
        ({"rank": 9, "targets": ["v_proj"]}, r"rank 9 is not low for language_model.*at most 8"),
        ({"rank": -1}, "rank is -1"),
        ({"rank": "8"}, "rank is '8'"),
    ],
)
def test_a_refusal_leaves_the_model_alone(arguments, message):
    model = small()
    with pytest.raises(ValueError, match=message) as error:
        add_lora(model, **({"rank": 2} | arguments))
    assert "\n" not in str(error.value)
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())


def test_adapters_twice():
    model = small()
    add_lora(model, 2)
    for again in (lambda: add_lora(model, 2), lambda: load_adapter(model, ".")):
        with pytest.raises(ValueError, match="7 more layers have adapters already"):
            again()


def test_training_moves_the_adapters_only():
    model = small()
    ids, pixels = small_inputs()
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    add_lora(model, 2, targets=EVERYWHERE)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    labels, losses = ids.clone(), []
    labels[:, :6] = -100
    kinds = (labels != -100).long()  # 1 where the answer stands
    for _ in range(20):
        loss = model(ids, pixels, token_type_ids=kinds, labels=labels).loss
        losses.append(loss.item())
        loss.backward(), optimizer.step(), optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    remove_lora(model)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters())


def test_merged_is_unmerged_and_removed_is_before():
    ids, pixels = small_inputs()
    model = small()
    before = model(ids, pixels).logits
    add_lora(model, 2, targets=EVERYWHERE)
    stir(model, 0.1)
    adapted = model(ids, pixels).logits
    assert (adapted - before).abs().max() > 0.1
    removed = copy.deepcopy(model)
    names = merge_lora(model)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in names)
    assert (model(ids, pixels).logits - adapted).abs().max() < 1e-5
    assert set(model.state_dict()) == set(small().state_dict())
    assert remove_lora(removed) == names
    assert torch.equal(removed(ids, pixels).logits, before)


def test_bfloat16_is_merged_in_float32():
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False).bfloat16()
    holder = nn.Sequential(layer)
    add_lora(holder, 4, targets="0")
    stir(holder, 0.1)
    exact = holder[0].base_layer.weight.float() + holder[0].delta()
    merge_lora(holder)
    assert holder[0].weight.dtype == torch.bfloat16
    assert torch.equal(holder[0].weight, exact.bfloat16()), "rounded once"


def test_meta_device():
    with torch.device("meta"):
        model = GemmaModel(GemmaConfig(**SMALL_TEXT))
    add_lora(model, 2, targets="*_proj")
    assert all(p.is_meta for p in model.parameters())


# ---------------------------------------------------------------- files

PEFT_ON_TRANSFORMERS_5 = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing:FutureWarning"
)


@PEFT_ON_TRANSFORMERS_5
@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_reads_what_we_write(published, tmp_path, use_rslora):
    from peft import PeftModel

    make_ours, make_theirs = published
    ours = make_ours()
    names = add_lora(ours, 4, alpha=6, targets=EVERYWHERE, use_rslora=use_rslora)
    save_adapter(stir(ours), tmp_path)
    theirs = PeftModel.from_pretrained(make_theirs(), tmp_path).eval()
    adapted = [
        n for n, m in theirs.named_modules() if hasattr(m, "lora_A") and "default" in m.lora_A
    ]
    assert len(adapted) == len(names)
    a, b = both_logits(ours, theirs)
    plain, _ = both_logits(make_ours(), theirs)
    assert (a - b).abs().max() <= 1e-5 < 0.05 < (a - plain).abs().max()


@PEFT_ON_TRANSFORMERS_5
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*language_model.*(down|o)_proj"])
def test_we_read_what_peft_writes(published, tmp_path, targets):
    from peft import LoraConfig, get_peft_model

    make_ours, make_theirs = published
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, lora_dropout=0.1)
    theirs = get_peft_model(make_theirs(), config).eval()
    torch.manual_seed(3)
    for name, weight in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = make_ours()
    names = load_adapter(ours, tmp_path)
    assert names and all(not p.requires_grad for p in ours.parameters())
    assert {(m.rank, m.alpha, m.dropout.p) for m in adapters(ours).values()} == {(4, 6, 0.1)}
    a, b = both_logits(ours, theirs)
    plain, _ = both_logits(make_ours(), theirs)
    assert (a - b).abs().max() <= 1e-5 < 0.05 < (a - plain).abs().max()


@PEFT_ON_TRANSFORMERS_5
def test_one_training_step_is_that_of_transformers_and_peft(published, tmp_path):
    """The loss, and the gradient of every A and B, from the same adapters and labels."""
    from peft import PeftModel

    make_ours, make_theirs = published
    ours = make_ours()
    add_lora(ours, 4, alpha=6, targets=EVERYWHERE)
    save_adapter(stir(ours, 0.1), tmp_path)
    theirs = PeftModel.from_pretrained(make_theirs(), tmp_path, is_trainable=True).train()
    batch = random_batch()
    learnt = torch.zeros_like(batch["input_ids"])
    learnt[:, -5:] = 1  # the answers
    batch |= {"token_type_ids": learnt, "labels": batch["input_ids"].masked_fill(learnt == 0, -100)}
    a, b = ours.train()(**batch).loss, theirs(**batch).loss
    a.backward(), b.backward()
    assert abs(a.item() - b.item()) <= 1e-5
    other = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters()
             if p.requires_grad}  # fmt: skip
    own = {f"base_model.model.model.{n}": p.grad for n, p in ours.named_parameters()
           if p.requires_grad}  # fmt: skip
    assert own.keys() == other.keys() and len(own) == 2 * len(adapters(ours))
    gaps = [(own[name] - other[name]).abs().max().item() for name in own]
    assert max(gaps) <= 1e-5 < 1e-3 < max(gradient.abs().max() for gradient in own.values())


RELEASES = ("0.7.1", "0.11.1", "0.21.2")
LAYOUTS = {  # transformers' names for the same layers in its releases
    "5": lambda name: name,
    "4.52": lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
    "4.45": lambda name: re.sub(
        "^language_model", "language_model.model", LAYOUTS["4.52"](name.removeprefix("model."))
    ),
}


def peft_files(folder, release, spell=lambda key: key):
    """An adapter that a release of peft wrote (adapters/write.py), its keys spelled anew."""
    source = Path(__file__).parent / "adapters" / release
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text((source / CONFIG).read_text())
    tensors = load_file(source / WEIGHTS)
    save_file({spell(key): tensor for key, tensor in tensors.items()}, folder / WEIGHTS)
    return folder


@PEFT_ON_TRANSFORMERS_5
@pytest.mark.parametrize("release", RELEASES)
def test_files_that_releases_of_peft_wrote(published, tmp_path, release):
    from peft import PeftModel

    make_ours, make_theirs = published
    folder = peft_files(tmp_path, release)
    config = json.loads((folder / CONFIG).read_text())
    assert config.get("peft_version", release).startswith(release)
    ours, theirs = make_ours(), PeftModel.from_pretrained(make_theirs(), folder).eval()
    names = load_adapter(ours, folder)
    scale = 6 / (4**0.5 if config.get("use_rslora") else 4)
    assert {m.scale for m in adapters(ours).values()} == {scale}
    a, b = both_logits(ours, theirs)
    plain, _ = both_logits(make_ours(), theirs)
    assert (a - b).abs().max() <= 1e-5 < 0.05 < (a - plain).abs().max()
    assert merge_lora(ours) == names
    merged, _ = both_logits(ours, theirs)
    assert (merged - b).abs().max() <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("middle", ["", ".default", ".my_adapter"])
@pytest.mark.parametrize("start", ["base_model.model.", ""])
def test_spellings_of_the_keys(published, tmp_path, layout, middle, start):
    """Layouts of transformers' releases, with and without the adapter's own name and the prefix."""
    make_ours, _ = published

    def spell(key):
        name, matrix = key.removeprefix("base_model.model.").rsplit(".lora_", 1)
        return f"{start}{LAYOUTS[layout](name)}.lora_{matrix[0]}{middle}.weight"

    expected, ours = make_ours(), make_ours()
    names = load_adapter(expected, peft_files(tmp_path / "as_written", "0.21.2"))
    folder = peft_files(tmp_path / "spelled", "0.21.2", spell)
    assert layout == "5" or set(load_file(folder / WEIGHTS)) != set(
        load_file(tmp_path / "as_written" / WEIGHTS)
    )
    assert load_adapter(ours, folder) == names
    batch = random_batch()
    assert torch.equal(ours(**batch).logits, expected(**batch).logits)


@pytest.mark.parametrize("mark", [".default", ".second"])
def test_several_adapters_or_a_layer_twice(published, tmp_path, mark):
    make_ours, _ = published
    folder = peft_files(tmp_path, "0.21.2")
    tensors = load_file(folder / WEIGHTS)
    first = next(key for key in tensors if "lora_A" in key)
    save_file(
        tensors | {first.replace(".weight", f"{mark}.weight"): tensors[first].clone()},
        folder / WEIGHTS,
    )
    with pytest.raises(ValueError, match=f"several adapters, {mark[1:]} and unnamed"):
        load_adapter(make_ours(), folder)
    save_file(
        tensors | {first.removeprefix("base_model.model."): tensors[first].clone()},
        folder / WEIGHTS,
    )
    with pytest.raises(ValueError, match="twice, under different names"):
        load_adapter(make_ours(), folder)


def test_rank_stabilised_is_saved_and_loaded(tmp_path):
    model, ids_and_pixels = small(), small_inputs()
    add_lora(model, 4, alpha=3, use_rslora=True)
    save_adapter(stir(model), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["use_rslora"] is True
    fresh = small()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(*ids_and_pixels).logits, model(*ids_and_pixels).logits)
    assert {m.scale for m in adapters(fresh).values()} == {1.5}


def test_the_base_is_named(published, tmp_path):
    make_ours, _ = published
    model = make_ours()
    add_lora(model, 2)
    save_adapter(model, tmp_path)
    base = json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"]
    assert base == model.config.name_or_path and Path(base).is_dir()


def test_a_quantised_model_takes_no_adapter(published):
    make_ours, _ = published
    model = quantize_model(make_ours(), "int8")
    for put_on in (add_lora, lambda m: load_adapter(m, ".")):
        with pytest.raises(ValueError, match="quantised; put adapters on the original weights"):
            put_on(model)


def test_save_and_load(tmp_path):
    ids, pixels = small_inputs()
    model = small()
    add_lora(model, 2, alpha=3, targets=EVERYWHERE, dropout=0.2)
    save_adapter(stir(model), tmp_path / "new" / "folder")
    fresh = small()
    names = load_adapter(fresh, tmp_path / "new" / "folder", trainable=True)
    assert names == list(adapters(model)) and not fresh.training
    assert torch.equal(fresh(ids, pixels).logits, model(ids, pixels).logits)
    assert trainable_parameters(fresh) == trainable_parameters(model)


@pytest.mark.parametrize("name", ["vision_tower", "language_model"])
def test_a_part_has_the_names_of_its_own_model(tmp_path, name):
    part = getattr(small(), name)
    add_lora(part, 2)
    save_adapter(stir(part), tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    start = "encoder.layers" if name == "vision_tower" else "layers"
    assert all(key.startswith(f"base_model.model.{start}.") for key in keys)
    fresh = getattr(small(), name)
    assert load_adapter(fresh, tmp_path) == list(adapters(part))


def test_nothing_half_written(tmp_path, monkeypatch):
    model = small()
    add_lora(model, 2)
    save_adapter(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write = Path.write_text

    def full_disk(file, *args, **options):
        if "config" in file.name:
            raise OSError("no space left")
        return write(file, *args, **options)

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_adapter(stir(model), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_cannot_be_saved(tmp_path):
    model = small()
    with pytest.raises(ValueError, match="adapters of 0 kinds"):
        save_adapter(model, tmp_path)
    add_lora(model, 2)
    next(iter(adapters(model).values())).alpha = 1
    with pytest.raises(ValueError, match="adapters of 2 kinds"):
        save_adapter(model, tmp_path)


@pytest.fixture
def saved(tmp_path):
    model = small()
    add_lora(model, 2)
    save_adapter(stir(model), tmp_path)
    return tmp_path


def refused(path, message):
    model = small()
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(model, path)
    assert "\n" not in str(error.value)
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 3}, r"adapter of .* is \{.*expected \{'A': \[3, 16\]"),
        ({"r": "2"}, "expected numbers"),
        ({"r": True}, "expected numbers"),
        ({"lora_alpha": None}, "expected numbers"),
        ({"lora_alpha": -1}, "alpha -1"),
        ({"r": 10**400}, "r, lora_alpha, lora_dropout are"),
        ({"lora_dropout": 2}, "dropout 2"),
        ({"peft_type": "IA3"}, r"peft_type is 'IA3'; expected 'LORA': .*merge_and_unload"),
        ({"peft_type": None}, "peft_type is None.*merge_and_unload"),
        ({"use_dora": True}, "use_dora is True.*merge_and_unload"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'; expected true or false"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern.*merge_and_unload"),
        ({"modules_to_save": ["linear"]}, "modules_to_save.*merge_and_unload"),
        ({"target_parameters": ["x"]}, "target_parameters.*merge_and_unload"),
        ({"bias": "all"}, "bias is 'all'.*merge_and_unload"),
        ({"bias": "lora_only"}, "bias is 'lora_only'.*merge_and_unload"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'.*merge_and_unload"),
        ({"init_lora_weights": ["pissa"]}, "init_lora_weights is"),
    ],
)
def test_configs_that_are_refused(saved, change, message):
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refused(saved, message)


FIRST = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_"


def half(tensors):
    del tensors[f"{FIRST}B.weight"]


def other_shape(tensors):
    tensors[f"{FIRST}A.weight"] = torch.zeros(2, 17)


def unknown_layer(tensors):
    tensors[FIRST.replace("layers.0", "layers.7") + "A.weight"] = torch.zeros(2, 16)


def no_linear(tensors):
    tensors["base_model.model.model.language_model.norm.lora_A.weight"] = torch.zeros(2, 16)


def of_the_head(tensors):
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(2, 16)


def magnitude(tensors):
    tensors[f"{FIRST}magnitude_vector"] = torch.zeros(16)


def of_the_embedding(tensors):
    name = FIRST.replace("layers.0.self_attn.q_proj", "embed_tokens")
    tensors[name.replace("lora_", "lora_embedding_A")] = torch.zeros(2, 16)


def whole_numbers(tensors):
    tensors[f"{FIRST}A.weight"] = torch.zeros(2, 16, dtype=torch.int8)


def not_a_number(tensors):
    tensors[f"{FIRST}B.weight"][3, 1] = float("nan")


def infinite(tensors):
    tensors[f"{FIRST}A.weight"] = torch.full((2, 16), 65504.0).half() * 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (half, r"expected \{'A': \[2, 16\], 'B': \[16, 2\]\}"),
        (other_shape, r"'A': \[2, 17\].*expected.*of another base model\?"),
        (unknown_layer, "layers.7.* belongs to no linear layer"),
        (no_linear, "norm.* belongs to no linear layer"),
        (of_the_head, "lm_head.* belongs to no linear layer"),
        (magnitude, "magnitude_vector belongs to no linear layer.*merge_and_unload"),
        (of_the_embedding, "lora_embedding_A belongs to no linear layer.*merge_and_unload"),
        (whole_numbers, "is torch.int8; expected a float type"),
        (not_a_number, "lora_B.weight holds NaN or infinity"),
        (infinite, "lora_A.weight holds NaN or infinity"),
        (dict.clear, "holds no tensors"),
    ],
)
def test_tensors_that_are_refused(saved, damage, message):
    file = saved / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    damage(tensors)
    save_file(tensors, file)
    refused(saved, message)


def test_files_that_are_refused(saved):
    weights, config = saved / "adapter_model.safetensors", saved / "adapter_config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    refused(saved, "truncated")
    weights.unlink()
    refused(saved, "no adapter_model.safetensors")
    (saved / "adapter_model.bin").write_bytes(b"")  # as peft wrote it before 0.6
    refused(saved, "no adapter_model.safetensors.*holds adapter_model.bin, a pickle.*newer peft")
    config.write_text("{")
    refused(saved, "is not JSON")
    config.unlink()
    refused(saved, "no adapter_config.json")
    refused(saved / "nothing", "nothing")
    (saved / "file").write_text("")
    refused(saved / "file", "is a file; expected a directory")
