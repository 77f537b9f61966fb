"""config.json of every release, complete and checked; devices and types by name."""

import json

import pytest
import torch
import transformers
from random_models import random_batch, reference_config

from paligemma.checkpoint import build_config
from paligemma.gemma import GemmaConfig
from paligemma.gemma2 import Gemma2Config
from paligemma.model import PaliGemmaConfig
from paligemma.siglip import SiglipVisionConfig
from paligemma.support.config import (
    TEXT_DEFAULTS,
    VISION_DEFAULTS,
    config_dict,
    parse_device,
    parse_dtype,
    read_config,
)
from paligemma.support.files import CheckpointError, shorten

SMALL = PaliGemmaConfig(
    SiglipVisionConfig(16, 32, 2, 2, image_size=14, patch_size=7),
    GemmaConfig(64, 16, 32, 2, 2, 1, 8),
    image_token_index=60,
)


def read(folder, config) -> PaliGemmaConfig:
    (folder / "config.json").write_text(json.dumps(config))
    return build_config(read_config(folder))


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("kind", TEXT_DEFAULTS)
def test_defaults_are_those_of_transformers(kind):
    from transformers import AutoConfig

    for model_type, ours in ((kind, TEXT_DEFAULTS[kind]), ("siglip_vision_model", VISION_DEFAULTS)):
        theirs = AutoConfig.for_model(model_type).to_dict()
        theirs |= theirs.get("rope_parameters") or {"rope_theta": 10000.0}
        assert {name: theirs[name] for name in ours} == ours


def test_defaults_name_every_field_of_our_classes():
    from dataclasses import fields

    for defaults, kind in (
        (VISION_DEFAULTS, SiglipVisionConfig),
        ({"vocab_size": 0} | TEXT_DEFAULTS["gemma"], GemmaConfig),
        ({"vocab_size": 0} | TEXT_DEFAULTS["gemma2"], Gemma2Config),
    ):
        assert defaults.keys() == {field.name for field in fields(kind)}


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


def test_errors_are_short(tmp_path):
    config = config_dict(SMALL)
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
        assert build_config(read_config(tmp_path)) == full
    for act in ({"hidden_act": "gelu"}, {"hidden_activation": None}, {"rope_theta": None}):
        (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": text | act}))
        assert build_config(read_config(tmp_path)) == full
    rope = {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": text | rope}))
    assert build_config(read_config(tmp_path)).text_config.rope_theta == 500


@pytest.mark.parametrize(
    ("top_level", "rows"), [(257152, 257216), (257216, 257216), (256000, 257216), (300000, 300000)]
)
def test_rows_from_the_top_level(tmp_path, top_level, rows):
    """Without its own count, the text model has room for <image>, padded to a multiple of 64."""
    config = config_dict(PaliGemmaConfig()) | {"vocab_size": top_level}
    del config["text_config"]["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert build_config(read_config(tmp_path)).text_config.vocab_size == rows


def test_config_comes_back(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_dict(SMALL)))
    assert build_config(read_config(tmp_path)) == SMALL


def test_config_as_transformers_writes_it(checkpoints):
    config = build_config(read_config(checkpoints["GQA"]))
    assert (config.text_config.num_key_value_heads, config.text_config.vocab_size) == (2, 512)
    assert config.image_token_index == 500 and config.vision_config.num_image_tokens == 16


def test_models_of_the_hub_from_memory(tmp_path):
    """PaliGemma 2 as 4.47 to 4.49 wrote it, with the oddities of its top level."""
    text = {"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216}
    text |= {"num_hidden_layers": 26, "num_image_tokens": 256, "num_key_value_heads": 4}
    text |= {"query_pre_attn_scalar": 256, "sliding_window": 4096, "vocab_size": 257216}
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip_vision_model"}
    vision |= {"num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14}
    config = {"_vocab_size": 257152, "bos_token_id": 2, "eos_token_id": 1, "hidden_size": 2048}
    config |= {"image_token_index": 257152, "model_type": "paligemma", "num_hidden_layers": 26}
    config |= {"pad_token_id": 0, "projection_dim": 2304, "text_config": text}
    config |= {"vision_config": vision | {"vision_use_head": False}}
    found = read(tmp_path, config)
    assert found.text_config == Gemma2Config(vocab_size=257216)
    assert found.vision_config == SiglipVisionConfig()
    model = {"hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16}
    model |= {"num_key_value_heads": 8, "intermediate_size": 14336}
    found = read(tmp_path, config | {"text_config": text | model}).text_config  # 10B
    assert (found.num_attention_heads, found.num_key_value_heads, found.head_dim) == (16, 8, 256)


def test_text_model_without_a_type_is_gemma(tmp_path):
    config = config_dict(SMALL)
    del config["text_config"]["model_type"], config["vision_config"]["model_type"]
    assert read(tmp_path, config) == SMALL


@pytest.mark.parametrize("cap", [0, 0.0, None])
def test_no_cap(tmp_path, cap):
    config = config_dict(SMALL)
    config["text_config"] |= {"model_type": "gemma2", "attn_logit_softcapping": cap}
    found = read(tmp_path, config).text_config
    assert found.attn_logit_softcapping is None and found.final_logit_softcapping == 30
    found.attn_logit_softcapping = cap  # what we write is null: transformers would divide by 0
    written = config_dict(PaliGemmaConfig(SMALL.vision_config, found, 60))
    assert written["text_config"]["attn_logit_softcapping"] is None


def test_cap_that_is_none(tmp_path):
    config = config_dict(SMALL)
    for cap in (False, -1.0, "50", float("nan"), [50]):
        config["text_config"] |= {"model_type": "gemma2", "final_logit_softcapping": cap}
        with pytest.raises(CheckpointError, match="final_logit_softcapping is"):
            read(tmp_path, config)


@pytest.mark.parametrize(
    ("values", "tokens"),
    [
        ({"eos_token_id": [1, 107], "pad_token_id": None, "bos_token_id": None}, (1, 0, 2)),
        ({"eos_token_id": 5, "pad_token_id": 6, "bos_token_id": 7}, (5, 6, 7)),
    ],
)
def test_special_tokens(tmp_path, values, tokens):
    found = read(tmp_path, config_dict(SMALL) | values)
    assert (found.eos_token_id, found.pad_token_id, found.bos_token_id) == tokens


def test_rows_when_no_one_says(tmp_path):
    config = config_dict(PaliGemmaConfig())
    del config["vocab_size"], config["text_config"]["vocab_size"]
    assert read(tmp_path, config).text_config.vocab_size == 257216
    assert read(tmp_path, config | {"_vocab_size": 300000}).text_config.vocab_size == 300000
    config["image_token_index"] = 500  # transformers' own default, where <image> is in it
    assert read(tmp_path, config).text_config.vocab_size == 256000


def test_a_mark_at_the_beginning(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_dict(SMALL)), encoding="utf-8-sig")
    assert build_config(read_config(tmp_path)) == SMALL


# ---------------------------------------------------------------- out of bounds


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("text_config", "num_hidden_layers", 100_000),
        ("vision_config", "num_hidden_layers", 10**6),
        ("text_config", "num_attention_heads", 10**9),
        ("text_config", "hidden_size", 10**400),
        ("text_config", "rope_theta", 10**400),
        ("vision_config", "image_size", 7 * 10**399),
        ("text_config", "rms_norm_eps", 1e300),
        ("vision_config", "image_size", [224, 224]),
    ],
    ids=shorten,
)
def test_more_than_any_model_has(tmp_path, section, name, value):
    config = config_dict(SMALL)
    config[section][name] = value
    with pytest.raises(CheckpointError, match=rf"{section}\.{name} is .*expected") as caught:
        read(tmp_path, config)
    assert len(str(caught.value)) < 200 + len(str(tmp_path))


@pytest.mark.parametrize("name", ["image_token_index", "pad_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", [-1, 1.5, True, "1", 10**400, {}, [[1]]], ids=shorten)
def test_tokens_that_are_none(tmp_path, name, value):
    with pytest.raises(CheckpointError, match=rf"{name} is .*expected 0 or more"):
        read(tmp_path, config_dict(SMALL) | {name: value})


@pytest.mark.parametrize("rope", ["dynamic", ["x"], 3, {"rope_type": ["x"]}, {"type": "linear"}])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_other_rotations(tmp_path, name, rope):
    config = config_dict(SMALL)
    config["text_config"][name] = rope
    with pytest.raises(CheckpointError, match="asks for RoPE"):
        read(tmp_path, config)


@pytest.mark.parametrize(
    "text", ['{"a":' * 50_000, "9" * 10_000, '{"model_type": ' + "9" * 400 + "}"]
)
def test_hostile_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        read_config(tmp_path)
    assert len(str(caught.value)) < 250 + len(str(tmp_path))


def test_patches_have_to_fit(tmp_path):
    config = config_dict(SMALL)
    config["vision_config"]["image_size"] = 15
    with pytest.raises(CheckpointError, match="image_size 15 is not a multiple of patch_size 7"):
        read(tmp_path, config)


def test_keras(tmp_path):
    config = {"module": "keras_hub.src.models.pali_gemma", "class_name": "PaliGemmaBackbone"}
    with pytest.raises(CheckpointError, match="is of Keras; load the same model without"):
        read(tmp_path, config)


# ---------------------------------------------------------------- devices and types


def test_devices():
    assert parse_device("cpu") == parse_device(torch.device("cpu")) == torch.device("cpu")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    assert parse_device("auto").type == ("mps" if torch.backends.mps.is_available() else best)
    bad = ["gpu", "", "cuda:99", 99, -1, True, None, 1.0, "meta", torch.device("cuda:99"), ["cpu"]]
    for device in bad:
        with pytest.raises(ValueError, match=r"device is .*expected 'auto' or one of .*'cpu'"):
            parse_device(device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_devices_by_number():
    assert parse_device(0) == parse_device("cuda:0") == torch.device("cuda:0")
    assert parse_device("cuda").type == parse_device("auto").type == "cuda"


def test_dtypes():
    for name in ("bfloat16", "torch.bfloat16", "bf16", "BFloat16", torch.bfloat16):
        assert parse_dtype(name) == torch.bfloat16
    assert parse_dtype("float32") == parse_dtype("fp32") == torch.float32
    assert parse_dtype(None) is parse_dtype("auto") is None
    for dtype in ("int8", torch.int8, "no", "", 16, True, "nn", "x" * 1000, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=r"dtype is .*expected torch\.float32") as caught:
            parse_dtype(dtype)
        assert len(str(caught.value)) < 200


def test_the_context_is_read_and_written(checkpoints, tmp_path):
    config = json.loads((checkpoints["GQA"] / "config.json").read_text())
    for given, expected in ((None, 8192), (300, 300)):
        config["text_config"].pop("max_position_embeddings", None)
        if given:
            config["text_config"]["max_position_embeddings"] = given
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = read_config(tmp_path)
        assert found["text_config"]["max_position_embeddings"] == expected
        assert (
            config_dict(build_config(found))["text_config"]["max_position_embeddings"] == expected
        )


def test_no_window_is_refused_as_transformers_cannot_run_it(gemma2_checkpoint, tmp_path):
    config = reference_config(2, gemma2=True)
    vars(config.text_config)["sliding_window"] = None
    model = transformers.PaliGemmaForConditionalGeneration(config)
    with pytest.raises((TypeError, ValueError)):
        model(**random_batch())
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="sliding_window is null"):
        read_config(tmp_path)
