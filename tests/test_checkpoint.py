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

from paligemma.checkpoint import (
    NoInit,
    build_config,
    empty_model,
    internal_name,
    load_model,
    published_name,
    save_model,
)
from paligemma.gemma import GemmaConfig
from paligemma.model import PaliGemma, PaliGemmaConfig
from paligemma.siglip import SiglipVisionConfig
from paligemma.support import tensors as support_tensors
from paligemma.support.config import config_dict, read_config
from paligemma.support.files import CheckpointError, open_tensors
from paligemma.support.tensors import INDEX, SINGLE, weight_files

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

    ours = empty_model(PaliGemmaConfig())
    assert all(p.is_meta for p in ours.parameters())
    with torch.device("meta"), NoInit():
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


@pytest.mark.parametrize("dtype", [torch.int8, "int8", torch.complex64, "bfloat", 16])
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
        open_tensors([path / SINGLE])


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
    "other windows": (
        section("text_config", model_type="gemma2", layer_types=["full_attention"] * 2),
        "layer_types is",
    ),
    "another text model": (section("text_config", model_type="llama"), "text_config.model_type"),
    "another tower": (section("vision_config", model_type="clip"), "vision_config.model_type"),
    "text null": (top(text_config=None), "text_config is None"),
    "text a list": (top(text_config=[]), r"text_config is \[\]"),
    "no vision": (without("vision_config"), "vision_config is None"),
    "field missing": (
        without("text_config", "num_hidden_layers"),
        r"2 layers of the language_model; config.json asks for 28 \(text_config.num_hidden_layers",
    ),
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
    "eos no numbers": (top(eos_token_id=["1"]), r"eos_token_id is \['1'\]"),
    "eos empty": (top(eos_token_id=[]), r"eos_token_id is \[\]"),
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
    assert config_dict(back.config) == config_dict(model.config)


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

    monkeypatch.setattr(support_tensors, "save_file", broken)
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


# ---------------------------------------------------------------- where from, where to


def test_the_model_knows_where_it_came_from(tmp_path, small):
    save_model(small, tmp_path)
    assert load_model(tmp_path).config.name_or_path == str(tmp_path)


def test_home_directory(tmp_path, small, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_model(small, "~/models/mine")
    assert (tmp_path / "models" / "mine" / SINGLE).is_file()
    assert_equal(load_model("~/models/mine"), small)


def test_folder_of_the_hub_cache(tmp_path, small):
    cache = tmp_path / "models--someone--paligemma"
    save_model(small, cache / "snapshots" / "abc")
    assert_equal(load_model(cache), small)
    assert_equal(load_model(cache, revision="abc"), small)
    with pytest.raises(CheckpointError, match="no snapshot of v2"):
        load_model(cache, revision="v2")


@pytest.mark.parametrize("name", ["bfloat16", "bf16", "torch.bfloat16"])
def test_dtype_by_name(tmp_path, small, name):
    save_model(small, tmp_path)
    assert load_model(tmp_path, dtype=name).dtype == torch.bfloat16
    assert load_model(tmp_path, dtype="auto").dtype == torch.float32


def test_device_by_name(tmp_path, small):
    save_model(small, tmp_path)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    best = "mps" if torch.backends.mps.is_available() else best
    assert load_model(tmp_path, "auto").device.type == best
    for device in ("cuda:99", 99, "gpu", None, "meta"):
        with pytest.raises(ValueError, match=r"device is .*expected 'auto' or one of .*'cpu'"):
            load_model(tmp_path, device)


# ---------------------------------------------------------------- what practitioners bring


@pytest.mark.parametrize("head", ["lm_head.weight", "language_model.lm_head.weight"])
def test_tied_pair_under_the_name_of_the_head(tmp_path, tensors, config, small, head):
    tensors[head] = tensors.pop(EMBEDDING)
    assert_equal(load_model(write(tmp_path, tensors, config)), small)


def test_tied_pair_as_safetensors_saves_a_model(tmp_path, config, checkpoints):
    """`safetensors.torch.save_model` keeps one name of the two and notes the other."""
    from random_models import KINDS, reference_model
    from safetensors import safe_open
    from safetensors.torch import save_model as their_save

    model = reference_model(KINDS["GQA"])
    model.tie_weights()
    their_save(model, str(tmp_path / SINGLE))
    shutil.copy(checkpoints["GQA"] / "config.json", tmp_path)
    with safe_open(tmp_path / SINGLE, framework="pt") as file:
        pair = {"lm_head.weight", "model.language_model.embed_tokens.weight"}
        assert len(pair & set(file.keys())) == 1 and pair & file.metadata().keys()
    assert_equal(load_model(tmp_path), load_model(checkpoints["GQA"]))


def test_tied_pair_of_the_wrong_shape(tmp_path, tensors, config):
    tensors["lm_head.weight"] = tensors.pop(EMBEDDING)[:60].clone()
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is \[60, 16\]; .* \[64, 16\]"):
        load_model(write(tmp_path, tensors, config))


@pytest.mark.parametrize("use_head", [True, None])
def test_unused_pooling_head(tmp_path, tensors, config, small, use_head):
    """transformers saves one where vision_use_head isn't false; its default is true."""
    del config["vision_config"]["vision_use_head"]
    if use_head:
        config["vision_config"]["vision_use_head"] = True
    tensors["vision_tower.vision_model.head.probe"] = torch.ones(1, 1, 16)
    tensors["vision_tower.vision_model.head.attention.in_proj_weight"] = torch.ones(48, 16)
    assert_equal(load_model(write(tmp_path, tensors, config)), small)


def logits_of_both(path):
    """Logits of a directory by transformers and by us, for the same batch, padding left out."""
    from random_models import random_batch
    from transformers import PaliGemmaForConditionalGeneration

    batch = random_batch()
    real = batch["attention_mask"].bool()
    theirs = PaliGemmaForConditionalGeneration.from_pretrained(path).eval()
    with torch.no_grad():
        expected = theirs(
            **batch,
            token_type_ids=torch.zeros_like(batch["input_ids"]),
            position_ids=batch["attention_mask"].cumsum(-1).clamp(min=1),
        ).logits[real]
        return load_model(path)(**batch).logits[real], expected


def assert_parity(path):
    ours, theirs = logits_of_both(path)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_sections_with_every_default_left_out(tmp_path):
    """PaliGemma 2 as transformers 4.47 to 4.49 wrote it: no num_attention_heads, and more."""
    from random_models import reference_config
    from transformers import Gemma2Config, PaliGemmaForConditionalGeneration, SiglipVisionConfig

    config = reference_config(4, gemma2=True)
    text, vision = config.text_config, config.vision_config
    text.num_attention_heads, text.head_dim, text.sliding_window = 8, 256, 4096
    text.query_pre_attn_scalar = 256
    text.attn_logit_softcapping, text.final_logit_softcapping = 50.0, 30.0
    vision.patch_size, vision.image_size = 14, 56
    torch.manual_seed(0)
    PaliGemmaForConditionalGeneration(config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    dropped = set()
    defaults = {"text_config": Gemma2Config(), "vision_config": SiglipVisionConfig()}
    for section, kind in defaults.items():
        for name, value in kind.to_dict().items():
            if name != "model_type" and written[section].get(name, ...) == value:
                del written[section][name]
                dropped.add(name)
    assert {"num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window"} <= dropped
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert load_model(tmp_path).config.text_config.num_attention_heads == 8
    assert_parity(tmp_path)


@pytest.mark.parametrize("cap", [None, 0, 0.0])
def test_absent_caps(tmp_path, gemma2_checkpoint, cap):
    """big_vision's fine-tuning recipes set no cap; transformers knows that as null."""
    shutil.copytree(gemma2_checkpoint, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    config["text_config"] |= dict.fromkeys(caps, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = logits_of_both(tmp_path)[1]
    config["text_config"] |= dict.fromkeys(caps, cap)
    (tmp_path / "config.json").write_text(json.dumps(config))
    from random_models import random_batch

    batch = random_batch()
    model = load_model(tmp_path)
    with torch.no_grad():
        logits = model(**batch).logits[batch["attention_mask"].bool()]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    save_model(model, tmp_path / "saved")  # and back again: 0 would be a division for transformers
    assert_parity(tmp_path / "saved")


def test_odd_fields_at_the_top_level(tmp_path, checkpoints):
    shutil.copytree(checkpoints["GQA"], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"eos_token_id": [1, 107], "pad_token_id": None, "_vocab_size": 257152}
    config |= {"hidden_size": 2048, "num_hidden_layers": 26, "projection_dim": 2048}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_model(tmp_path)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (1, 0)
    assert_equal(model, load_model(checkpoints["GQA"]))


def test_transformers_reads_our_config(tmp_path, small):
    from transformers import AutoConfig

    save_model(small, tmp_path)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "PaliGemmaConfig" and theirs.image_token_index == 60
    ours = read_config(tmp_path)
    for section in ("text_config", "vision_config"):
        for name, value in ours[section].items():
            if name != "rope_theta":  # one level down there
                assert getattr(getattr(theirs, section), name) == value, name
    assert build_config(ours) == SMALL


def test_adapter_alone_names_its_base(tmp_path):
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "google/paligemma2-3b-pt-224"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"adapter=.*google/paligemma2-3b-pt-224"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised by bitsandbytes"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by gptq"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantised by another program"),
        ({"quantization_config": {"quant_method": "paligemma"}}, "use paligemma.load"),
    ],
)
def test_quantised_by_someone(tmp_path, tensors, config, how, message):
    with pytest.raises(CheckpointError, match=message):
        load_model(write(tmp_path, tensors, config | how))


@pytest.mark.parametrize("end", ["absmax", "SCB", "qweight", "scales", "quant_state.bitsandbytes"])
def test_quantised_tensors_without_a_word_in_the_config(tmp_path, tensors, config, end):
    tensors[FC1.replace("weight", end)] = torch.ones(3, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="quantised by another program; load the model it"):
        load_model(write(tmp_path, tensors, config))


def test_mlx(tmp_path, tensors, config):
    write(tmp_path, tensors, config)
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "mlx"})
    with pytest.raises(CheckpointError, match="MLX's layout; load the safetensors it was made"):
        load_model(tmp_path)


def test_shards_of_two_saves(tmp_path, small):
    """A save that was killed between two renames is a mixture; it is refused, not loaded."""
    save_model(small, tmp_path, 20_000)
    first = (tmp_path / "model-00001-of-00003.safetensors").read_bytes()
    save_model(small, tmp_path, 20_000)
    load_model(tmp_path)
    (tmp_path / "model-00001-of-00003.safetensors").write_bytes(first)
    with pytest.raises(CheckpointError, match="shards of 2 saves; save, copy or download it again"):
        load_model(tmp_path)


def test_a_model_with_more_than_a_checkpoint_holds_is_not_saved(tmp_path, small):
    import copy

    model = copy.deepcopy(small)
    model.language_model.layers[0].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.extra\.bias, which no published"):
        save_model(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- nothing was lost


def edit(**sections):
    """Change config.json: a section's fields, or a field at the top level."""

    def change(path):
        config = json.loads((path / "config.json").read_text())
        for name, value in sections.items():
            section = isinstance(value, dict) and isinstance(config.get(name), dict)
            config[name] = config[name] | value if section else value
        (path / "config.json").write_text(json.dumps(config))

    return change


def put_tensor(name, value):
    def change(path):
        save_file(load_file(path / SINGLE) | {name: value}, path / SINGLE)

    return change


def text_of(name, text):
    return lambda path: (path / name).write_text(text)


def resave(max_bytes, then):
    def change(path):
        model = load_model(path)
        save_model(model, path, max_bytes)
        then(path)

    return change


ROPE = {"rope_scaling": {"rope_type": "yarn"}}
FIRST_VERSION = {  # what it refused: the words of its message → how to provoke it
    "is not JSON": text_of("config.json", "{"),
    "expected a JSON object: download it again": text_of("config.json", "[1]"),
    "text_config is None; expected an object of fields": edit(text_config=None),
    "a PaliGemma checkpoint has 'paligemma'": edit(model_type="llava"),
    "text_config.model_type is 'llama'; a PaliGemma": edit(text_config={"model_type": "llama"}),
    "vision_config.model_type is 'clip'; a": edit(vision_config={"model_type": "clip"}),
    "text_config.hidden_act is 'relu'; a PaliGemma": edit(text_config={"hidden_act": "relu"}),
    "text_config.hidden_size is '16'; expected a": edit(text_config={"hidden_size": "16"}),
    "vision_config.hidden_size is None; expected": edit(vision_config={"hidden_size": None}),
    "image_token_index is -1; expected 0 or more": edit(image_token_index=-1),
    "asks for RoPE 'yarn'; expected 'default'": edit(text_config=ROPE),
    "sliding_window is null; PaliGemma 2 has a number": edit(
        text_config={"model_type": "gemma2", "sliding_window": None}
    ),
    "layer_types is ['full_attention']; expected sliding_attention and": edit(
        text_config={"model_type": "gemma2", "layer_types": ["full_attention"]}
    ),
    "no config.json in": lambda path: (path / "config.json").unlink(),
    "config.json fits no model": edit(vision_config={"num_attention_heads": 3}),
    "(1 of 3 shards missing); download the checkpoint again": resave(
        20_000, lambda path: next(path.glob("model-*")).unlink()
    ),
    "remove the one that is out of date": resave(
        20_000, lambda path: shutil.copy(next(path.glob("model-*")), path / SINGLE)
    ),
    "a pickle, which can run any code when opened; convert": lambda path: (path / SINGLE).rename(
        path / "pytorch_model.bin"
    ),
    "no *.safetensors in": lambda path: (path / SINGLE).unlink(),
    "is not an index of shards: weight_map is None": text_of(INDEX, "{}"),
    "which is not a file beside it": text_of(INDEX, '{"weight_map": {"a": "../b"}}'),
    "is truncated or not a safetensors file": text_of(SINGLE, "<html>"),
    "holds extra, for which this model has no place": put_tensor("extra", torch.ones(1)),
    "twice, under different names": put_tensor(
        FC1.replace("vision_model.", ""), torch.ones(32, 16)
    ),
    "fc1.weight is [2]; expected [32, 16]": put_tensor(FC1, torch.ones(2)),
    "is torch.int8; expected float32, bfloat16 or float16": put_tensor(
        FC1, torch.ones(32, 16, dtype=torch.int8)
    ),
    "lacks 59 of 59 tensors, the first is": lambda path: save_file({}, path / SINGLE),
    "lm_head.weight differs from the embedding": put_tensor("lm_head.weight", torch.ones(64, 16)),
    "the weights of a PaliGemma 1 beside the config.json of a PaliGemma 2": edit(
        text_config={"model_type": "gemma2"}
    ),
}


@pytest.mark.parametrize("words", FIRST_VERSION)
def test_every_refusal_of_the_first_version(tmp_path, small, words):
    """Only caps of 0 and null, and an end token given as a list, are accepted since."""
    save_model(small, tmp_path)
    load_model(tmp_path)
    FIRST_VERSION[words](tmp_path)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        load_model(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
