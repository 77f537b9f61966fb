"""Read and write `config.json` as every release of transformers writes it; devices by name."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from paligemma.support.files import CheckpointError, check_folder, read_json, shorten
from paligemma.support.tensors import FLOATS

# The defaults of transformers' classes: a field that is equal to its default may be missing.
VISION_DEFAULTS = {  # SiglipVisionConfig
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
TEXT_DEFAULTS = {
    "gemma": {  # GemmaConfig
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 8192,
    },
    "gemma2": {  # Gemma2Config
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
}
CAPS = {"attn_logit_softcapping", "final_logit_softcapping"}  # 0 and null: no cap
MAY_BE_NULL = {"head_dim", "image_size", "num_channels", "layer_norm_eps", "rms_norm_eps"}
MAY_BE_NULL |= {"rope_theta", "query_pre_attn_scalar", "num_attention_heads", "num_key_value_heads"}
# The largest published model has 46 layers, and a context of 8,192 tokens.
LARGEST = {"num_hidden_layers": 512, "max_position_embeddings": 2**20}
LARGEST_WHOLE, LARGEST_REAL = 10**7, 1e12  # vocab_size; rope_theta
TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """The `config.json` of a checkpoint directory, complete and checked.

    Args:
        path: the directory.

    Returns:
        A dict: `vision_config` (the fields of our `SiglipVisionConfig`), `text_config` (those of
        `GemmaConfig` or `Gemma2Config`, and `model_type`), `image_token_index`, `pad_token_id`,
        `eos_token_id`, `bos_token_id`; `vision_use_head`: whether the weights may hold a pooling
        head, which PaliGemma has no use for; `quantization_config`: as the file has it, or None.
        An absent field has transformers' default for its `model_type`; a soft-cap of 0 or null
        is None.

    Raises:
        CheckpointError: no such file, not JSON, a field of the wrong type or out of all bounds,
            or another architecture than PaliGemma.

    Source: `PaliGemmaConfig`, `GemmaConfig`, `Gemma2Config`, `SiglipVisionConfig` in
    transformers 4.41 to 5.23.
    """
    check_folder(path)
    file = Path(path) / "config.json"
    config = read_json(file, dict)
    if "model_type" not in config and str(config.get("module", "")).startswith("keras"):
        raise CheckpointError(f"{file} is of Keras; load the same model without '-keras'")
    _expect(file, config, "model_type", "paligemma")
    vision, text = (_section(file, config, name) for name in ("vision_config", "text_config"))
    _expect(file, vision, "model_type", None, "siglip_vision_model", section="vision_config.")
    _expect(file, text, "model_type", None, "gemma2", "gemma", section="text_config.")
    kind = text.get("model_type") or "gemma"
    for name in ("hidden_act", "hidden_activation"):  # "gelu" in old configs means the tanh form
        _expect(file, text, name, None, "gelu", "gelu_pytorch_tanh", section="text_config.")
    _expect(file, vision, "hidden_act", None, "gelu_pytorch_tanh", section="vision_config.")
    if kind == "gemma2":
        _check_layer_types(file, text)
    image_token = _token(file, config, 257152, "image_token_index", "image_token_id")
    text = text | {"rope_theta": _rope_theta(file, text)}
    if text.get("vocab_size") is None:
        text = text | {"vocab_size": _rows(config, image_token)}
    tokens = {name: _token(file, config, default, name) for name, default in TOKENS.items()}
    found = {
        "vision_config": _fill(file, "vision_config", vision, VISION_DEFAULTS),
        "text_config": {"model_type": kind}
        | _fill(file, "text_config", text, {"vocab_size": 0} | TEXT_DEFAULTS[kind]),
        "image_token_index": image_token,
        **tokens,
        "vision_use_head": vision.get("vision_use_head") is not False,
        "quantization_config": config.get("quantization_config") or config.get("quantization"),
    }
    size, patch = (found["vision_config"][name] for name in ("image_size", "patch_size"))
    if size % patch:
        raise CheckpointError(
            f"{file}: vision_config.image_size {size} is not a multiple of patch_size {patch}"
        )
    return found


def config_dict(config) -> dict[str, Any]:
    """A `PaliGemmaConfig` in the form of the published `config.json`, for saving."""
    text, vision = asdict(config.text_config), asdict(config.vision_config)
    text |= {name: text[name] or None for name in CAPS & text.keys()}  # 0 is no cap, as null is
    tokens = {"num_image_tokens": config.vision_config.num_image_tokens}
    width = config.text_config.hidden_size
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "image_token_index": config.image_token_index,
        "hidden_size": width,
        "projection_dim": width,
        "vocab_size": config.text_config.vocab_size,
        "text_config": {
            "model_type": "gemma2" if CAPS & text.keys() else "gemma",
            **text,
            **tokens,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            **vision,
            **tokens,
            "projection_dim": width,
            "vision_use_head": False,
        },
    }


def _section(file: Path, config: dict, name: str) -> dict:
    """One of the two inner objects of a config."""
    section = config.get(name)
    if not isinstance(section, dict):
        raise CheckpointError(f"{file}: {name} is {shorten(section)}; expected an object of fields")
    return section


def _expect(file: Path, values: dict, name: str, *allowed, section: str = "") -> None:
    """A field that decides which code is right has one of the values we know."""
    if values.get(name) not in allowed:
        raise CheckpointError(
            f"{file}: {section}{name} is {shorten(values.get(name))}; "
            f"a PaliGemma checkpoint has {allowed[-1]!r}"
        )


def _fill(
    file: Path, section: str, values: dict[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Each field of `defaults` from `values`, or its default; all are positive numbers."""
    found = {}
    for name, default in defaults.items():
        value = values.get(name, default)
        if name in CAPS and (value is None or (value == 0 and not isinstance(value, bool))):
            found[name] = None
            continue
        if value is None and name in MAY_BE_NULL:
            value = default
        whole = isinstance(default, int)
        largest = LARGEST.get(name, LARGEST_WHOLE if whole else LARGEST_REAL)
        if (
            not isinstance(value, int if whole else (int, float))
            or isinstance(value, bool)
            or not 0 < value < float("inf")
        ):
            raise CheckpointError(
                f"{file}: {section}.{name} is {shorten(value)}; expected a positive "
                f"{'whole ' if whole else ''}number"
            )
        if value > largest:
            raise CheckpointError(
                f"{file}: {section}.{name} is {shorten(value)}; expected at most {largest}"
            )
        found[name] = value
    return found


def _token(file: Path, config: dict, default: int, *names: str) -> int:
    """A token's number under one of its names; the first, where there are several."""
    value = next((config[name] for name in names if config.get(name) is not None), default)
    first = value[0] if isinstance(value, list) and value else value
    if type(first) is not int or not 0 <= first <= LARGEST_WHOLE:
        raise CheckpointError(f"{file}: {names[0]} is {shorten(value)}; expected 0 or more")
    return first


def _rows(config: dict, image_token: int) -> int:
    """Rows of the embedding where text_config does not say: room for `<image>`, in 64s.

    At the top level `<image>` is often not counted: 257152 there, 257216 rows.
    """
    rows = next((config[n] for n in ("vocab_size", "_vocab_size") if config.get(n) is not None), 0)
    if type(rows) is not int or rows > image_token:
        return rows  # checked with the other fields
    if not rows and image_token < 256000:
        return 256000  # the default of both text models
    return -(-(image_token + 1) // 64) * 64


def _rope_theta(file: Path, text: dict) -> object:
    """The base of the rotation, which newer configs keep one level down; None: the default."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind != "default":
        raise CheckpointError(
            f"{file}: text_config asks for RoPE {shorten(kind)}; expected 'default'"
        )
    return rope.get("rope_theta") if text.get("rope_theta") is None else text["rope_theta"]


def _check_layer_types(file: Path, text: dict) -> None:
    """Gemma 2's windows are where PaliGemma 2 has them: in layers 0, 2, 4 …"""
    if "sliding_window" in text and text["sliding_window"] is None:
        raise CheckpointError(
            f"{file}: text_config.sliding_window is null; PaliGemma 2 has a number"
        )
    layers, kinds = text.get("layer_types"), ("sliding_attention", "full_attention")
    if layers is not None and (
        not isinstance(layers, list) or any(layer != kinds[i % 2] for i, layer in enumerate(layers))
    ):
        raise CheckpointError(
            f"{file}: text_config.layer_types is {shorten(layers)}; expected sliding_attention and "
            "full_attention in turn"
        )


# ---------------------------------------------------------------- devices and types


def parse_device(device: torch.device | str | int) -> torch.device:
    """ "auto", "cpu", "cuda", "cuda:1", "mps" or the number of a GPU → a device of this machine.

    "auto" is the first of cuda, mps and cpu that there is.

    Raises:
        ValueError: no such device, naming those that there are.
    """
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    if isinstance(device, str) and device == "auto":
        device = "cuda" if cuda else "mps" if mps else "cpu"
    there = ["'cpu'"] + [f"'cuda:{i}'" for i in range(cuda)] + ["'mps'"] * mps
    problem = (
        f"device is {shorten(device)}; expected 'auto' or one of this machine's: {', '.join(there)}"
    )
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
        raise ValueError(problem)
    try:
        found = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ImportError):  # no such name; none here
        raise ValueError(problem) from None
    if found.type == "meta":
        raise ValueError(problem)
    return found


ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """`torch.bfloat16`, "bfloat16" or "bf16" → the type; None and "auto": as stored.

    Raises:
        ValueError: no type that weights can have.
    """
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return None
    if isinstance(dtype, str):
        name = dtype.lower().removeprefix("torch.")
        dtype = getattr(torch, ALIASES.get(name, name), dtype)
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATS:
        raise ValueError(
            f"dtype is {shorten(dtype)}; expected torch.float32, torch.bfloat16, torch.float16, "
            "their names, or None (as stored)"
        )
    return dtype
