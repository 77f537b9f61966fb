"""Find and read the files of a checkpoint; whatever is wrong is one clear line."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from paligemma.support.replacing import settled

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "google/paligemma-3b-mix-224"  # an example of what can be loaded


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the tensor or field."""


def shorten(value: object, width: int = 60) -> str:
    """A value as Python writes it, cut to `width` characters: for messages, always one line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of 5,000 digits, a very deep list
        text = f"a {type(value).__name__}"
    if not isinstance(value, str):  # an array takes several lines
        text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def spell_path(path: object) -> str:
    """A path for a message: one line, the middle of a very long one left out."""
    text = str(path)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 200 else f"{text[:80]}…{text[-100:]}"


def check_path(path: object) -> None:
    """A path is a string, or knows its own; else a `CheckpointError` that says so."""
    if not isinstance(path, (str, os.PathLike)):
        raise CheckpointError(f"path is {shorten(path)}; expected a string or a Path")


# ---------------------------------------------------------------- JSON


def read_json(path: str | os.PathLike, kind: type | tuple[type, ...] = (dict, list)) -> Any:
    """The object or list in a JSON file.

    Args:
        path: the file.
        kind: what is expected: `dict`, `list` or both.

    Raises:
        CheckpointError: no such file, unreadable, not JSON, or another kind of value.
    """
    file = Path(path)
    if not os.path.isfile(file):
        raise CheckpointError(
            f"no {file.name} in {file.parent}; give the directory of a checkpoint"
        )
    try:
        value = json.loads(file.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON ({error}); download it again") from None
    if not isinstance(value, kind):
        wanted = "list" if kind is list else "object"
        raise CheckpointError(
            f"{file} is {shorten(value)}; expected a JSON {wanted}: download it again"
        )
    return value


# ---------------------------------------------------------------- folders and the hub


def find_folder(path: str | os.PathLike, revision: str | None = None) -> Path:
    """The local directory of a checkpoint.

    Args:
        path: a directory (`~` is the home directory), a folder of the hub's cache
            (`models--google--paligemma-…`: its newest snapshot), or a name on the Hugging Face
            hub, which is downloaded, or found in the cache, when `huggingface_hub` is installed.
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: there is no such directory, and the hub does not give it either.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise CheckpointError(f"path is {shorten(path)}; expected a directory or a hub name")
    name = str(os.fspath(path))
    if re.match(r"\w+://", name):
        raise CheckpointError(
            f"{shorten(name)} is an address; download it first and give the directory, or give "
            f"the hub's name for it, such as '{BASE}'"
        )
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):
        if folder.name.startswith("models--") and os.path.isdir(folder / "snapshots"):
            return settled(_snapshot(folder, revision))
        if revision is not None:
            raise CheckpointError(
                f"revision is {shorten(revision)}, and {folder} is a directory, which has none; "
                "give the hub's name, or leave revision out"
            )
        return settled(folder)
    if os.path.exists(folder):
        raise CheckpointError(
            f"{folder} is a file; expected a directory: give {str(folder.parent)!r}"
        )
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise CheckpointError(
            f"no directory {shorten(name, 200)}; give a checkpoint directory or a hub name"
        )
    return _download(name, revision)


def _snapshot(folder: Path, revision: str | None) -> Path:
    """The files of one revision inside a cache folder of the hub."""
    ref = folder / "refs" / (revision or "main")
    commit = ref.read_text().strip() if os.path.isfile(ref) else revision
    if commit and os.path.isdir(folder / "snapshots" / commit):
        return folder / "snapshots" / commit
    found = [path for path in (folder / "snapshots").iterdir() if path.is_dir()]
    if not found or revision is not None:
        raise CheckpointError(
            f"{folder} holds no snapshot{f' of {revision}' if revision else ''}; download it again"
        )
    return max(found, key=lambda path: path.stat().st_mtime)


def _download(name: str, revision: str | None) -> Path:
    """The directory into which the hub's own client downloads a repository."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"no directory {name}; to fetch it from the hub: pip install huggingface_hub"
        ) from None
    patterns = ["*.json", "*.safetensors", "tokenizer.model", "vae-oid.npz"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's many errors share no base class
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines)[:300] or type(error).__name__
        code = getattr(getattr(error, "response", None), "status_code", None)
        if "Gated" in type(error).__name__ or code in (401, 403):
            raise CheckpointError(
                f"the hub does not give {name} to everyone: log in (`hf auth login`) and accept "
                f"the licence at https://huggingface.co/{name} ({reason})"
            ) from None
        raise CheckpointError(
            f"{name} is no directory, and the hub did not give it: {reason}"
        ) from None


def adapter_base(folder: str | os.PathLike) -> str | None:
    """The base model of a directory that holds nothing but an adapter; None: it is no such one.

    The base is "" where the adapter does not name it.
    """
    folder = Path(folder)
    if not os.path.isfile(folder / ADAPTER_CONFIG) or os.path.isfile(folder / "config.json"):
        return None
    base = read_json(folder / ADAPTER_CONFIG, dict).get("base_model_name_or_path")
    return base if isinstance(base, str) else ""


def check_folder(folder: str | os.PathLike) -> None:
    """A directory has a config.json; if not, say what it holds and what to load instead.

    Raises:
        CheckpointError: an adapter alone, another program's format, or nothing that we know.
    """
    folder = settled(folder)
    base = adapter_base(folder)
    if base is not None:
        raise CheckpointError(
            f"no config.json in {folder}: it holds an adapter alone; load its base model with "
            f"adapter={shorten(str(folder), 200)}, the base is {base or 'not named in it'}"
        )
    if os.path.isfile(folder / "config.json"):
        return
    other = other_format(folder)
    raise CheckpointError(
        f"no config.json in {folder}; "
        + (f"it holds {other}" if other else "give the directory of a checkpoint")
    )


FORMATS = {  # endings → what it is, what to do
    (".gguf",): "llama.cpp's GGUF format; load the safetensors of the model it was made from",
    (".npz",): "weights as NumPy arrays (big_vision's or MLX's format); load the same model's "
    "safetensors",
    (".h5", ".keras"): "Keras' format; load the same model's safetensors (without '-keras')",
    (".msgpack",): "Flax's format; load the same model's safetensors",
    (".onnx",): "an exported graph (ONNX); load the safetensors it was made from",
    (".bin", ".pt", ".pth", ".ckpt"): "a pickle, which can run any code when opened; "
    "convert it to safetensors",
}


def other_format(folder: Path) -> str | None:
    """ "model.gguf, llama.cpp's …": a file of another program, with advice; None: there is none."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    names = [name for name in names if name != "vae-oid.npz" and not name.startswith(".")]
    for endings, advice in FORMATS.items():
        for name in names:
            if name.endswith(endings) and name not in ("training_args.bin", "optimizer.pt"):
                return f"{name}, {advice}"
    return None


# ---------------------------------------------------------------- tensors


def open_tensors(files: Iterable[str | os.PathLike]) -> dict[str, torch.Tensor]:
    """All tensors of some safetensors files, memory-mapped: bytes are read when they are used.

    Raises:
        CheckpointError: truncated, not a safetensors file, a name in two files, or shards of
            two different saves.
    """
    found, saves = {}, set()
    files = [Path(file) for file in files]
    for file in files:
        if not os.path.isfile(file):  # a pipe would be waited for
            raise CheckpointError(f"no file {file}; download it again")
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                if metadata.get("format") == "mlx":
                    raise CheckpointError(
                        f"{file} is in MLX's layout; load the safetensors it was made from"
                    )
                saves.add(metadata.get("save"))
                for name in opened.keys():
                    if name in found:
                        raise CheckpointError(f"{file.parent} holds {name} twice, in two files")
                    found[name] = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            reason = shorten(str(error), 100)[1:-1]
            raise CheckpointError(
                f"{file} is truncated or not a safetensors file ({reason}); download it again"
            ) from None
    if len(saves) > 1:
        raise CheckpointError(
            f"{files[0].parent} holds shards of {len(saves)} saves; save, copy or download it again"
        )
    return found
