"""The weights of a checkpoint: which files, whose model, each tensor accounted for; shards."""

import json
import os
import re
import secrets
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from paligemma.support.files import (
    ADAPTER_WEIGHTS,
    CheckpointError,
    check_path,
    other_format,
    read_json,
    shorten,
    spell_path,
)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def weight_files(path: str | os.PathLike) -> list[Path]:
    """The safetensors files of a checkpoint directory, and no others that may lie beside them.

    They are the shards of `model.safetensors.index.json`, else `model.safetensors`, else every
    `*.safetensors` except an adapter and a mask codec.

    Raises:
        CheckpointError: none there, only another format, a shard of the index missing, or two
            whole sets of weights.
    """
    path = Path(path)
    single = path / SINGLE
    if os.path.isfile(path / INDEX):
        shards = _shards(path / INDEX)
        missing = [file.name for file in shards if not os.path.isfile(file)]
        if missing and not (single.is_file() and len(missing) == len(shards)):
            raise CheckpointError(
                f"{path} lacks {shorten(missing[0])[1:-1]} ({len(missing)} of {len(shards)} shards "
                "missing); download the checkpoint again"
            )
        if not missing and single.is_file() and single not in shards:
            raise CheckpointError(
                f"{path} holds {SINGLE} and the {len(shards)} shards of {INDEX}; "
                "remove the one that is out of date"
            )
        if not missing:
            return shards
    if single.is_file():
        return [single]
    beside = {ADAPTER_WEIGHTS, "mask_codec.safetensors"}
    files = [p for p in sorted(path.glob("*.safetensors")) if p.is_file() and p.name not in beside]
    if not files:
        other = other_format(path)
        raise CheckpointError(
            f"{path} holds {other}"
            if other
            else f"no *.safetensors in {path}; give the directory of a checkpoint"
        )
    return files


def _shards(index: Path) -> list[Path]:
    """The files that an index names, each once."""
    found = read_json(index, dict).get("weight_map")
    names = list(found.values()) if isinstance(found, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{index} is not an index of shards: weight_map is {shorten(found)}")
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {shorten(name)}, which is not a file beside it")
    return [index.parent / name for name in sorted(set(names))]


def match_tensors(
    path: str | os.PathLike,
    tensors: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    spell: Callable[[str], str] = str,
    finite: bool = False,
) -> None:
    """Each expected tensor is there with its shape, as plain numbers, and nothing is left over.

    Args:
        path: for the messages.
        tensors: what was read.
        expected: by the same names, tensors (on any device) of the right shape.
        spell: a name as the file has it.
        finite: NaN and infinity are refused too (reads every number).

    Raises:
        CheckpointError: naming the tensor.
    """
    for name, tensor in tensors.items():
        if name not in expected:
            raise CheckpointError(f"{path} holds {spell(name)}, for which this model has no place")
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{path}: {spell(name)} is {list(tensor.shape)}; "
                f"expected {list(expected[name].shape)}"
            )
        whole = not expected[name].is_floating_point()  # codes of a quantised model
        if tensor.dtype not in ((expected[name].dtype,) if whole else FLOATS):
            kinds = expected[name].dtype if whole else "float32, bfloat16 or float16"
            raise CheckpointError(f"{path}: {spell(name)} is {tensor.dtype}; expected {kinds}")
        if finite and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path}: {spell(name)} holds NaN or infinity; save it again")
    missing = [spell(name) for name in expected if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of {len(expected)} tensors, the first is {missing[0]}; "
            "download the checkpoint again"
        )


ARRAYS = 1 << 28  # bytes that the arrays of a file may take; a mask codec has some megabytes


def open_arrays(path: str | os.PathLike, parts: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The arrays of a file `*.npz` whose names begin with one of `parts`; never a pickled object.

    Raises:
        CheckpointError: no such file, not an npz, more than arrays, or far too much of them.
    """
    check_path(path)
    if not os.path.isfile(path):  # a pipe would be waited for
        raise CheckpointError(f"no file {spell_path(path)}; give an npz file of arrays")
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            if size > ARRAYS:
                raise ValueError(f"{size >> 20} MiB unpacked")
        with np.load(path, allow_pickle=False) as file:
            return {n: torch.from_numpy(file[n]) for n in file.files if n.startswith(parts)}
    except Exception as error:  # NumPy has many for a damaged file
        reason = shorten(" ".join(str(error).split()), 100)[1:-1]
        raise CheckpointError(
            f"{spell_path(path)} is not an npz file of arrays ({reason}); download it again"
        ) from None


QUANTIZED = re.compile(r"\.(absmax|quant_map|quant_state\..*|SCB|qweight|qzeros|scales)$")


def check_family(
    path: str | os.PathLike, stored: Iterable[str], expected: Iterable[str], method: object = None
) -> None:
    """The weights belong to the kind of model that config.json describes.

    Args:
        path: for the messages.
        stored, expected: names of tensors.
        method: `quantization_config` of config.json, if there is one.

    Raises:
        CheckpointError: quantised, PaliGemma 1 beside the config of a PaliGemma 2 or the other
            way round, or another number of layers.
    """
    stored, expected = list(stored), list(expected)
    method = method.get("quant_method", "another program") if isinstance(method, dict) else method
    if method == "paligemma":
        raise CheckpointError(f"{path} was quantised by this package; use paligemma.load for it")
    if method or any(QUANTIZED.search(name) for name in stored):
        by = f"by {shorten(method)[1:-1]}" if isinstance(method, str) else "by another program"
        raise CheckpointError(
            f"{path} was quantised {by}; load the model it was made from, and quantise that "
            "(paligemma.load has quantize='int8' and 'int4')"
        )
    if not any("self_attn.q_proj" in name for name in stored):
        return  # too little is there to tell
    kind, wanted = (
        2 if any("_feedforward_layernorm." in name for name in names) else 1
        for names in (stored, expected)
    )
    if kind != wanted:
        raise CheckpointError(
            f"{path} holds the weights of a PaliGemma {kind} beside the config.json of a "
            f"PaliGemma {wanted}; take both from the same download"
        )
    for part, section in (("language_model", "text_config"), ("vision_tower", "vision_config")):
        count, wanted = (
            1 + max((int(found[1]) for found in map(number.search, names) if found), default=-1)
            for names, number in (
                (names, re.compile(rf"{part}\.(?:.+\.)?layers\.(\d{{1,9}})\."))
                for names in (stored, expected)
            )
        )
        if count > wanted or (count < wanted and count):
            raise CheckpointError(
                f"{path} holds {count} layers of the {part}; config.json asks for {wanted} "
                f"({section}.num_hidden_layers): take both from the same download"
            )


def write_weights(
    folder: Path, tensors: Mapping[str, torch.Tensor], max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write tensors as one safetensors file, or as shards with an index.

    Args:
        folder: a draft of `replacing`.
        tensors: by their names in the file; on any device.
        max_shard_bytes: more than that is split; a shard holds at least one tensor.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    many, metadata = len(shards) > 1, {"format": "pt"}
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = files if many else [SINGLE]
    if many:  # by it open_tensors sees shards that somebody has brought together from two saves
        metadata["save"] = secrets.token_hex(8)
    for file, names in zip(files, shards, strict=True):
        whole = {name: tensors[name].detach().cpu().contiguous() for name in names}
        save_file(whole, folder / file, metadata=metadata)
    if many:
        place = {name: file for file, names in zip(files, shards) for name in names}
        total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
        index = json.dumps({"metadata": total, "weight_map": place}, indent=2)
        (folder / INDEX).write_text(index + "\n")
