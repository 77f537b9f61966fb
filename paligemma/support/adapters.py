"""Adapters at load: find the base that one belongs to, and add it to the base's weights."""

import os
from pathlib import Path

from paligemma.model import PaliGemma
from paligemma.support.files import (
    ADAPTER_CONFIG,
    CheckpointError,
    adapter_base,
    find_folder,
    shorten,
)


def find_adapter(path: Path, adapter: str | os.PathLike | None = None) -> tuple[Path, Path | None]:
    """The directory of the weights and that of the adapter to add to them, None without one.

    Args:
        path: a checkpoint, with or without an adapter beside its weights; or an adapter alone,
            whose base is the directory that it names.
        adapter: of peft or `save_adapter`: a directory or a hub name.

    Raises:
        CheckpointError: two adapters, or one whose base is not on this machine.
    """
    base = adapter_base(path)
    own = path if (path / ADAPTER_CONFIG).is_file() else None
    if adapter is not None and own is not None:
        raise CheckpointError(
            f"{path} holds an adapter itself, and adapter is {shorten(str(adapter))}; give the "
            "directory of the base model, or leave adapter out"
        )
    if base is not None:
        if not base or not os.path.isdir(os.path.expanduser(base)):
            raise CheckpointError(
                f"no config.json in {path}: it holds an adapter alone, and its base model "
                + (f"{shorten(base)} is no directory here" if base else "is not named in it")
                + f"; load the base with adapter={shorten(str(path), 200)}"
            )
        return find_folder(base), own
    return path, own if adapter is None else find_folder(adapter)


def add_adapter(model: PaliGemma, path: Path) -> None:
    """Add an adapter to a model's weights: it answers as fast as before, and saves as a whole.

    Raises:
        ValueError: an adapter that does not fit, or of another kind than plain LoRA.
    """
    from paligemma.lora import load_adapter, merge_lora  # a late lesson, called by an earlier one

    load_adapter(model, path)
    merge_lora(model)


def refuse_adapter(path: str | os.PathLike) -> None:
    """A whole model is not saved beside an adapter: loaded again, it would get it once more.

    Raises:
        ValueError: the directory holds one.
    """
    if (Path(path).expanduser() / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{path} holds an adapter, which would be added once more to the model that is saved "
            "there; give another directory"
        )
