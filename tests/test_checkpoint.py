"""Checkpoints: every layout, every way to be broken, and saving what transformers can read."""

import json
import re
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from paligemma import checkpoint
from paligemma.checkpoint import (
    INDEX,
    SINGLE,
    CheckpointError,
    config_dict,
    internal_name,
    load_model,
    published_name,
    read_config,
    read_tensors,
    save_model,
    weight_files,
)
from paligemma.gemma import GemmaConfig
from paligemma.model import PaliGemma, PaliGemmaConfig
from paligemma.siglip import SiglipVisionConfig

EMBEDDING = "language_model.model.embed_tokens.weight"
SMALL = PaliGemmaConfig(
    SiglipVisionConfig(16, 32, 2, 2, image_size=14, patch_size=7),
    GemmaConfig(64, 16, 32, 2, 2, 1, 8),
    image_token_index=60,
)


def reference() -> dict[str, torch.Tensor]:
    """A model of 13,000 parameters made by transformers: its state dict, an input, its logits."""
    from transformers import PaliGemmaConfig as TheirConfig
    from transformers import PaliGemmaForConditionalGeneration

    torch.manual_seed(16)
    theirs = PaliGemmaForConditionalGeneration(TheirConfig(**config_dict(SMALL))).eval()
    with torch.no_grad():
        for weight in theirs.parameters():  # loud enough for logits that differ; half precision
            scale = 0.1 if weight.dim() == 1 else weight.shape[-1] ** -0.5
            weight.copy_((torch.randn_like(weight) * scale).bfloat16())
    input_ids = torch.tensor([[60, 60, 60, 60, 2, 17, 5, 33, 9]])
    pixel_values = torch.rand(1, 3, 14, 14) * 2 - 1
    types = torch.zeros_like(input_ids)
    with torch.no_grad():
        out = theirs(input_ids=input_ids, pixel_values=pixel_values, token_type_ids=types)
    weights = {f"weights.{name}": t.bfloat16() for name, t in theirs.state_dict().items()}
    return weights | {
        "input_ids": input_ids,
        "pixel_values": pixel_values,
        "logits": out.logits[0, -1:],
    }


# ---------------------------------------------------------------- names and layouts


def transformers_5(name: str) -> str:
    return name.replace("vision_tower.vision_model.", "vision_tower.", 1)


def in_memory(name: str) -> str:
    return "model." + name.replace("language_model.model.", "language_model.", 1)


def in_memory_old(name: str) -> str:
    """transformers 4.52 to 4.57: with both prefixes of the vision tower."""
    return in_memory(transformers_5(name)).replace("vision_tower.", "vision_tower.vision_model.")


LAYOUTS = {"hub": str, "5": transformers_5, "memory": in_memory, "4.52": in_memory_old}


def write(path, tensors, config=None, shards=1):
    """A checkpoint directory with these tensors, in so many shards."""
    path.mkdir(exist_ok=True)
    if config is not None:
        (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if shards == 1:
        save_file(tensors, path / SINGLE)
        return path
    place = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, path / file)
        place |= dict.fromkeys(part, file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return path


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model = PaliGemma(SMALL).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    return model


@pytest.fixture
def tensors(small):
    """The hub layout of a small model, free to be changed."""
    return {published_name(name): t.clone() for name, t in small.state_dict().items()}


@pytest.fixture
def config():
    return json.loads(json.dumps(config_dict(SMALL)))


def state(model):
    return dict(model.state_dict())


def assert_equal(a, b):
    a, b = state(a), state(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_logits(checkpoints, tmp_path, layout, shards):
    from random_models import IMAGE_TOKENS, random_batch  # tools/reference.py imports this file too

    original = load_file(checkpoints["GQA"] / SINGLE)
    hub = {published_name(internal_name(name)): t for name, t in original.items()}
    renamed = {LAYOUTS[layout](name): t for name, t in hub.items()}
    if layout == "memory":
        renamed["lm_head.weight"] = renamed["model.language_model.embed_tokens.weight"].clone()
    if layout == "hub":
        renamed["language_model.lm_head.weight"] = renamed[EMBEDDING].clone()
    write(tmp_path, renamed, (checkpoints["GQA"] / "config.json").read_text(), shards)
    batch = random_batch()
    assert int((batch["input_ids"] == 500).sum()) == 3 * IMAGE_TOKENS
    with torch.no_grad():
        expected = load_model(checkpoints["GQA"])(**batch).logits
        assert torch.equal(load_model(tmp_path)(**batch).logits, expected)


def test_names_come_back():
    for name in PaliGemma(SMALL).state_dict():
        for rename in LAYOUTS.values():
            assert internal_name(rename(published_name(name))) == name


def test_full_size_names_and_shapes_equal_transformers():
    from transformers import PaliGemmaConfig as TheirConfig
    from transformers import PaliGemmaForConditionalGeneration

    ours = checkpoint.empty_model("", PaliGemmaConfig())
    assert sum(p.numel() for p in ours.parameters()) == 2_923_466_480
    assert all(p.is_meta for p in ours.parameters())
    with torch.device("meta"), checkpoint._NoInit():
        theirs = PaliGemmaForConditionalGeneration(TheirConfig(**config_dict(PaliGemmaConfig())))
    expected = {}
    for name, tensor in theirs.state_dict().items():
        if name == "lm_head.weight":  # tied; not in the files
            continue
        name = name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)
        name = re.sub(r"^vision_tower\.(vision_model\.)?", "vision_tower.vision_model.", name)
        expected[name] = tensor.shape
    assert {published_name(n): t.shape for n, t in ours.state_dict().items()} == expected
    assert len(expected) == 603


# ---------------------------------------------------------------- loading


def test_torch_compiler_is_not_loaded(tmp_path, small):
    save_model(small, tmp_path)
    code = (
        "import sys; from paligemma.checkpoint import load_model; load_model(sys.argv[1]); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 0


def test_nothing_is_left_on_the_meta_device(tmp_path, small):
    save_model(small, tmp_path)
    model = load_model(tmp_path)
    assert not [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    assert not model.training and all(p.requires_grad for p in model.parameters())
    assert_equal(model, small)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, None])
def test_dtype(tmp_path, small, tensors, config, dtype):
    write(tmp_path, {name: t.bfloat16() for name, t in tensors.items()}, config)
    model = load_model(tmp_path, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype or torch.bfloat16}
    weight = small.multi_modal_projector.linear.weight.bfloat16()
    assert torch.equal(model.multi_modal_projector.linear.weight, weight.to(model.dtype))


@pytest.mark.parametrize("dtype", [torch.int8, "float32", torch.complex64])
def test_dtype_of_no_use_is_refused(tmp_path, small, dtype):
    save_model(small, tmp_path)
    with pytest.raises(ValueError, match=r"dtype is .*expected torch\.float32"):
        load_model(tmp_path, dtype=dtype)


def mapped_to(tensor) -> str:
    """The file whose pages hold a tensor, as the kernel lists them; "" when there is none."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            if first <= tensor.data_ptr() < last:
                return "".join(line.split(maxsplit=5)[5:]).strip()
    return ""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux")
def test_mapped_not_copied(tmp_path, small):
    save_model(small, tmp_path)
    for name, tensor in state(load_model(tmp_path, dtype=None)).items():
        assert mapped_to(tensor) == str(tmp_path / SINGLE), name
    for tensor in state(load_model(tmp_path, dtype=torch.bfloat16)).values():
        assert str(tmp_path) not in mapped_to(tensor)


def test_changing_a_mapped_weight_leaves_the_file(tmp_path, small):
    save_model(small, tmp_path)
    before = (tmp_path / SINGLE).read_bytes()
    with torch.no_grad():
        for weight in load_model(tmp_path).parameters():
            weight.zero_()
    assert (tmp_path / SINGLE).read_bytes() == before
    assert_equal(load_model(tmp_path), small)


def test_progress_only_when_asked(tmp_path, small, capsys):
    save_model(small, tmp_path)
    load_model(tmp_path)
    assert capsys.readouterr() == ("", "")
    load_model(tmp_path, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "loading weights" in err and "100%" in err


# ---------------------------------------------------------------- broken tensors


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.update({name: value})


FC1 = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
DAMAGE = {
    "missing": (drop(FC1), rf"lacks 1 of 59 tensors, the first is {re.escape(FC1)}"),
    "left over": (put("extra.weight", torch.ones(2)), r"holds extra\.weight, for which"),
    "pooling head": (put("vision_tower.vision_model.head.probe", torch.ones(2)), r"head\.probe"),
    "doubled": (put(FC1.replace("vision_model.", ""), torch.ones(32, 16)), r"fc1\.weight twice"),
    "shape": (put(FC1, torch.ones(16, 32)), r"fc1\.weight is \[16, 32\]; .* \[32, 16\]"),
    "rows": (put(EMBEDDING, torch.ones(60, 16)), r"embed_tokens\.weight is \[60, 16\]; .* \[64,"),
    "integer": (put(FC1, torch.ones(32, 16).char()), r"fc1\.weight is torch\.int8"),
    "float8": (put(FC1, torch.ones(32, 16).to(torch.float8_e4m3fn)), r"fc1\.weight is torch\.flo"),
    "head": (put("lm_head.weight", torch.ones(64, 16)), r"lm_head\.weight differs"),
    "head shape": (put("lm_head.weight", torch.ones(60, 16)), r"lm_head\.weight is \[60, 16\]"),
    "empty": (dict.clear, r"lacks 59 of 59 tensors"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_tensor_is_accounted_for(tmp_path, tensors, config, kind):
    damage, message = DAMAGE[kind]
    damage(tensors)
    write(tmp_path, tensors, config)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_head_that_differs_in_its_last_row_only(tmp_path, tensors, config):
    tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
    write(tmp_path, tensors, config)
    load_model(tmp_path)
    tensors["lm_head.weight"][-1, -1] += 1
    write(tmp_path, tensors, config)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        load_model(tmp_path)


def test_head_of_another_type_than_the_embedding(tmp_path, tensors, config):
    tensors[EMBEDDING] = tensors[EMBEDDING].bfloat16()
    tensors["lm_head.weight"] = tensors[EMBEDDING].float()
    write(tmp_path, tensors, config)
    for dtype in (None, torch.float32, torch.bfloat16):
        load_model(tmp_path, dtype=dtype)


def test_the_same_tensor_in_two_shards(tmp_path, tensors, config):
    write(tmp_path, tensors, config, shards=2)
    second = tmp_path / "model-00002-of-00002.safetensors"
    save_file(load_file(second) | {next(iter(tensors)): torch.ones(64, 16)}, second)
    with pytest.raises(CheckpointError, match="twice"):
        load_model(tmp_path)


# ---------------------------------------------------------------- broken files


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 5000, -1])
def test_truncated_file(tmp_path, tensors, config, keep):
    write(tmp_path, tensors, config)
    data = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=rf"{SINGLE} is truncated or not a safetensors"):
        load_model(tmp_path)


def test_pickle_in_disguise(tmp_path, tensors, config):
    write(tmp_path, tensors, config)
    torch.save(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickle_is_refused(tmp_path, tensors, config, name):
    write(tmp_path, tensors, config)
    (tmp_path / SINGLE).unlink()
    torch.save(tensors, tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}, a pickle"):
        load_model(tmp_path)


def test_no_weights(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        load_model(tmp_path)


def test_index_naming_a_missing_shard(tmp_path, tensors, config):
    write(tmp_path, tensors, config, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00003\.s.* \(1 of 3 shards"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("\xff\xfe", "is not JSON|weight_map"),
        ("[]", r"is \[\]; expected a JSON object"),
        ("{}", "weight_map is None"),
        ('{"weight_map": []}', r"weight_map is \[\]"),
        ('{"weight_map": {}}', r"weight_map is \{\}"),
        ('{"weight_map": {"a": 3}}', "weight_map is"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "not a file beside it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "not a file beside it"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_broken_index(tmp_path, tensors, config, text, message):
    write(tmp_path, tensors, config)
    (tmp_path / INDEX).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(tmp_path)
    assert INDEX in str(caught.value)


def test_files_beside_the_index_are_not_read(tmp_path, tensors, config, small):
    write(tmp_path, tensors, config, shards=2)
    save_file({"stale": torch.ones(1)}, tmp_path / "model-00003-of-00003.safetensors")
    save_file({"stale": torch.ones(1)}, tmp_path / "mask_codec.safetensors")
    assert_equal(load_model(tmp_path), small)


def test_files_beside_a_single_one_are_not_read(tmp_path, tensors, config, small):
    write(tmp_path, tensors, config)
    save_file({"stale": torch.ones(1)}, tmp_path / "mask_codec.safetensors")
    assert_equal(load_model(tmp_path), small)


def test_index_whose_shards_are_gone(tmp_path, tensors, config, small):
    write(tmp_path, tensors, config, shards=2)
    for file in tmp_path.glob("model-*"):
        file.unlink()
    save_file(tensors, tmp_path / SINGLE)
    assert weight_files(tmp_path) == [tmp_path / SINGLE]
    assert_equal(load_model(tmp_path), small)


def test_two_whole_sets_of_weights(tmp_path, tensors, config):
    write(tmp_path, tensors, config, shards=2)
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="remove the one that is out of date"):
        load_model(tmp_path)


def test_shards_without_an_index(tmp_path, tensors, config, small):
    write(tmp_path, tensors, config, shards=3)
    (tmp_path / INDEX).unlink()
    assert_equal(load_model(tmp_path), small)


@pytest.fixture(scope="module")
def good_file(tmp_path_factory, small):
    path = tmp_path_factory.mktemp("fuzz")
    save_model(small, path)
    return path, (path / SINGLE).read_bytes()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_in_the_header(good_file, flips):
    path, good = good_file
    size = 8 + struct.unpack("<Q", good[:8])[0]
    data = bytearray(good)
    for place, change in flips:
        data[min(size - 1, int(place * size))] ^= change
    (path / SINGLE).write_bytes(data)
    try:
        model = load_model(path)
    except CheckpointError:
        return
    assert not [name for name, tensor in state(model).items() if tensor.is_meta]


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_for_a_file(good_file, data):
    path, _ = good_file
    (path / SINGLE).write_bytes(data)
    with pytest.raises(CheckpointError):
        list(read_tensors([path / SINGLE]))


# ---------------------------------------------------------------- config


def section(name, **values):
    return lambda config: config[name].update(values)


def top(**values):
    return lambda config: config.update(values)


def without(*names):
    def change(config):
        for name in names[:-1]:
            config = config[name]
        del config[names[-1]]

    return change


BAD_CONFIGS = {
    "another model": (top(model_type="llava"), "model_type is 'llava'; .* 'paligemma'"),
    "no model_type": (without("model_type"), "model_type is None"),
    "Gemma 2": (section("text_config", model_type="gemma2"), "a PaliGemma 1 beside"),
    "no cap": (
        section("text_config", model_type="gemma2", attn_logit_softcapping=None),
        "attn_logit_softcapping is null",
    ),
    "other windows": (
        section("text_config", model_type="gemma2", layer_types=["full_attention"] * 2),
        "layer_types is",
    ),
    "another text model": (section("text_config", model_type="llama"), "text_config.model_type"),
    "another tower": (section("vision_config", model_type="clip"), "vision_config.model_type"),
    "text null": (top(text_config=None), "text_config is None"),
    "text a list": (top(text_config=[]), r"text_config is \[\]"),
    "no vision": (without("vision_config"), "vision_config is None"),
    "field missing": (without("text_config", "num_hidden_layers"), "text_config.num_hidden_layers"),
    "field null": (section("vision_config", hidden_size=None), "vision_config.hidden_size is None"),
    "text": (section("text_config", hidden_size="16"), "text_config.hidden_size is '16'"),
    "fraction": (section("text_config", hidden_size=16.0), "hidden_size is 16.0; .*whole"),
    "bool": (section("text_config", num_key_value_heads=True), "num_key_value_heads is True"),
    "zero": (section("vision_config", patch_size=0), "vision_config.patch_size is 0"),
    "negative": (section("text_config", rms_norm_eps=-1e-6), "rms_norm_eps is -1e-06"),
    "nan": (section("text_config", rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "infinite": (section("text_config", rope_theta=float("inf")), "rope_theta is inf"),
    "exact GELU": (section("vision_config", hidden_act="gelu"), "vision_config.hidden_act"),
    "ReLU": (section("text_config", hidden_activation="relu"), "text_config.hidden_activation"),
    "unhashable act": (section("text_config", hidden_act=["x"]), "text_config.hidden_act"),
    "scaled RoPE": (
        section("text_config", rope_scaling={"type": "linear", "factor": 2}),
        "RoPE 'linear'",
    ),
    "RoPE a word": (section("text_config", rope_parameters="dynamic"), "RoPE 'dynamic'"),
    "image token": (top(image_token_index="<image>"), "image_token_index is '<image>'"),
    "eos a list": (top(eos_token_id=[1, 107]), r"eos_token_id is \[1, 107\]"),
    "picture": (section("vision_config", image_size=15), "image_size 15"),
    "heads": (section("vision_config", num_attention_heads=3), "config.json fits no model"),
    "groups": (section("text_config", num_key_value_heads=3), "num_key_value_heads 3"),
    "odd head": (section("text_config", head_dim=7), "head_dim 7"),
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_config_errors_name_the_field(tmp_path, tensors, config, kind):
    change, message = BAD_CONFIGS[kind]
    change(config)
    write(tmp_path, tensors, config)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(tmp_path)
    assert str(tmp_path) in str(caught.value) and "config.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "null", "[1]", '"x"', "\xff", "[" * 100_000])
def test_config_that_is_no_object(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json is"):
        read_config(tmp_path)


def test_no_config(tmp_path):
    for path in (tmp_path, tmp_path / "absent", str(tmp_path)):
        with pytest.raises(CheckpointError, match=r"no config\.json"):
            read_config(path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_config(tmp_path)


def test_errors_are_short(tmp_path, config):
    config["text_config"]["hidden_size"] = "x" * 10_000
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        read_config(tmp_path)
    assert len(str(caught.value)) < 200 + len(str(tmp_path))


def test_sparse_config_as_published(tmp_path):
    """The fields that the published files of 3B at 224 hold, and no others."""
    text = {
        "model_type": "gemma",
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "vocab_size": 257216,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "projector_hidden_act": "gelu_fast",
    }
    config = {"model_type": "paligemma", "text_config": text, "vision_config": vision}
    full = PaliGemmaConfig()
    variants = [
        {},
        {"vocab_size": 257152, "image_token_index": 257152},
        {"image_token_id": 257152, "pad_token_id": 0, "eos_token_id": None},
    ]
    for extra in variants:
        (tmp_path / "config.json").write_text(json.dumps(config | extra))
        assert read_config(tmp_path) == full
    for act in ({"hidden_act": "gelu"}, {"hidden_activation": None}, {"rope_theta": None}):
        (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": text | act}))
        assert read_config(tmp_path) == full
    rope = {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": text | rope}))
    assert read_config(tmp_path).text_config.rope_theta == 500


@pytest.mark.parametrize(
    ("top_level", "rows"), [(257152, 257216), (257216, 257216), (256000, 257216), (300000, 300000)]
)
def test_rows_from_the_top_level(tmp_path, top_level, rows):
    """Without its own count, the text model has room for <image>, padded to a multiple of 64."""
    config = config_dict(PaliGemmaConfig()) | {"vocab_size": top_level}
    del config["text_config"]["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path).text_config.vocab_size == rows


def test_config_comes_back(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_dict(SMALL)))
    assert read_config(tmp_path) == SMALL


def test_config_as_transformers_writes_it(checkpoints):
    config = read_config(checkpoints["GQA"])
    assert (config.text_config.num_key_value_heads, config.text_config.vocab_size) == (2, 512)
    assert config.image_token_index == 500 and config.vision_config.num_image_tokens == 16


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("max_bytes", [5_000_000_000, 20_000, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_and_load_is_bit_equal(tmp_path, tensors, config, dtype, max_bytes):
    write(tmp_path / "in", {name: t.to(dtype) for name, t in tensors.items()}, config)
    model = load_model(tmp_path / "in", dtype=None)
    save_model(model, tmp_path / "new" / "out", max_bytes)
    files = weight_files(tmp_path / "new" / "out")
    assert (len(files) == 1) == (max_bytes > 10**6)
    if max_bytes == 1:
        assert len(files) == len(tensors)
    back = load_model(tmp_path / "new" / "out", dtype=None)
    assert_equal(back, model)
    assert back.config == model.config


def test_index_of_a_sharded_save(tmp_path, small):
    save_model(small, tmp_path, 20_000)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state(small).values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    assert sum(len(load_file(f)) for f in tmp_path.glob("*.safetensors")) == 59


def names_in(path):
    return sorted(file.name for file in path.iterdir())


def test_saving_removes_what_an_earlier_save_left(tmp_path, small):
    (tmp_path / "mask_codec.safetensors").touch()  # not ours
    save_model(small, tmp_path, 20_000)
    many = names_in(tmp_path)
    save_model(small, tmp_path, 30_000)
    assert len(names_in(tmp_path)) < len(many)
    assert_equal(load_model(tmp_path), small)
    save_model(small, tmp_path)
    assert names_in(tmp_path) == ["config.json", "mask_codec.safetensors", SINGLE]
    save_model(small, tmp_path, 20_000)
    assert names_in(tmp_path) == many
    assert_equal(load_model(tmp_path), small)


def test_saving_over_the_files_that_are_mapped(tmp_path, small):
    save_model(small, tmp_path)
    model = load_model(tmp_path, dtype=None)
    with torch.no_grad():
        model.language_model.norm.weight += 1
    before = {name: t.clone() for name, t in state(model).items()}
    for max_bytes in (5_000_000_000, 20_000):
        save_model(model, tmp_path, max_bytes)
        for name, tensor in state(model).items():
            assert torch.equal(tensor, before[name])
        assert_equal(load_model(tmp_path), model)


@pytest.mark.parametrize("max_bytes", [5_000_000_000, 20_000])
def test_interrupted_save_leaves_what_was_there(tmp_path, small, tensors, monkeypatch, max_bytes):
    save_model(small, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    other = load_model(tmp_path)
    with torch.no_grad():
        other.language_model.norm.weight += 1
    calls = []

    def broken(shard, file, metadata=None):
        calls.append(file)
        if len(calls) == (1 if max_bytes > 10**6 else 2):
            file.write_bytes(b"half a file")
            raise OSError("no space left on device")
        save_file(shard, file, metadata)

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(OSError, match="no space"):
        save_model(other, tmp_path, max_bytes)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.skipif(sys.platform == "win32", reason="permissions")
def test_files_have_the_usual_permissions(tmp_path, small):
    (tmp_path / "usual").touch()
    save_model(small, tmp_path)
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert modes == {(tmp_path / "usual").stat().st_mode}


def test_what_transformers_saves_over_ours(tmp_path, small, checkpoints):
    """Its single file beside our index: the shards are gone, so there is no doubt."""
    save_model(small, tmp_path, 20_000)
    for file in tmp_path.glob("model-*.safetensors"):
        file.unlink()
    for name in (SINGLE, "config.json"):
        shutil.copy(checkpoints["MQA"] / name, tmp_path)
    assert_equal(load_model(tmp_path), load_model(checkpoints["MQA"]))
