"""Directories of quantised weights: written whole, mapped again, each tensor accounted for."""

import json
import os

import torch

from paligemma.checkpoint import (
    build_config,
    empty_model,
    internal_name,
    load_model,
    published_name,
)
from paligemma.model import PaliGemma
from paligemma.quantization import (
    MODES,
    Int4Linear,
    QuantizedLinear,
    pack_int4,
    quantize_model,
    unpack_int4,
)
from paligemma.support.arguments import GROUP_SIZES, check_one_type
from paligemma.support.config import config_dict, parse_device, parse_dtype, read_config
from paligemma.support.files import CheckpointError, find_folder, open_tensors, shorten
from paligemma.support.replacing import replacing
from paligemma.support.tensors import match_tensors, weight_files, write_weights


def save_quantized(model: PaliGemma, path: str | os.PathLike) -> None:
    """Write a quantised model: its tensors, and a `config.json` that says how it was made.

    `load_model` refuses the directory; `load_quantized` maps it.

    Raises:
        ValueError: the model is not quantised.
    """
    head = model.language_model.head
    if not isinstance(head, QuantizedLinear):
        raise ValueError("the model is not quantised; use save_model, or quantize_model first")
    how = {"quant_method": "paligemma", "mode": "int4" if isinstance(head, Int4Linear) else "int8"}
    how |= {"group_size": head.group_size, "block": head.block}
    dtype = str(model.dtype).removeprefix("torch.")
    config = config_dict(model.config) | {"dtype": dtype, "quantization_config": how}
    with replacing(path) as draft:
        write_weights(draft, {published_name(n): t for n, t in model.state_dict().items()})
        (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_quantization(path: str | os.PathLike) -> dict | None:
    """How a directory was quantised: mode, group_size, block; None: not at all.

    Raises:
        CheckpointError: it was quantised by something else.
    """
    how = read_config(path)["quantization_config"]
    if how is None:
        return None
    known = {"mode": tuple(MODES), "group_size": GROUP_SIZES, "block": (32, 64)}
    ours = isinstance(how, dict) and how.get("quant_method") == "paligemma"
    if not ours or any(how.get(name) not in values for name, values in known.items()):
        raise CheckpointError(
            f"{path}: quantization_config is {shorten(how, 130)}; expected one of save_quantized"
        )
    return {name: how[name] for name in known}


def load_quantized(
    path: str | os.PathLike,
    mode: str | None = None,
    device: torch.device | str | int = "cpu",
    dtype: torch.dtype | str | None = None,
) -> PaliGemma:
    """Load a checkpoint with few bits a weight.

    Args:
        path: a directory that `save_quantized` wrote: its tensors stay mapped, loading takes next
            to no time. Or one with original weights, which are mapped and quantised.
        mode: "int8" or "int4"; None: as the directory was saved, else "int8".
        device: where the weights go.
        dtype: to compute in; None: as stored.

    Returns:
        A `PaliGemma` in evaluation mode.

    Raises:
        CheckpointError: a directory that cannot be used, or was quantised in another mode.
        ValueError: as in `quantize_model`.
    """
    path, device, dtype = find_folder(path), parse_device(device), parse_dtype(dtype)
    how = read_quantization(path)
    if how is None:
        model = quantize_model(load_model(path, dtype=None), mode or "int8", dtype=dtype)
        return model.to(device=device)
    if mode not in (None, how["mode"]):
        raise CheckpointError(
            f"{path} was quantised with mode {how['mode']!r}, not {shorten(mode)}; "
            "quantise the original weights"
        )
    try:
        model = empty_model(build_config(read_config(path)))
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: config.json fits no model: {error}") from None
    quantize_model(model, how["mode"], how["group_size"])
    stored = open_tensors(weight_files(path))
    state = {internal_name(name): tensor for name, tensor in stored.items()}
    match_tensors(path, state, model.state_dict(), published_name)
    model.load_state_dict(state, assign=True)
    for layer in model.modules():
        if isinstance(layer, Int4Linear) and layer.block != how["block"]:
            # another processor packed them: in this one's order
            layer.qweight = pack_int4(unpack_int4(layer.qweight, how["block"]), layer.block)
    if dtype is None:
        check_one_type(model)
    model.config.name_or_path = str(path)
    return model.to(device=device, dtype=dtype).eval()
