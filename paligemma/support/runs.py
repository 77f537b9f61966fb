"""Care for training runs: settings, resuming, interruptions and data that may be wrong."""

import json
import math
import os
import pickle
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path

import torch

from paligemma.support.files import shorten


def check_settings(config, least: Mapping[str, int], above_zero: tuple[str, ...] = ()) -> None:
    """Every number of a dataclass is one, finite, and as large as it must be.

    Args:
        config: fields annotated int or float are looked at; None passes where it is the default.
        least: the smallest value of those for which it isn't 0.
        above_zero: names for which 0 itself is too small.

    Raises:
        ValueError: naming the field, its value and what is expected.
    """
    for field in fields(config):
        value, whole = getattr(config, field.name), field.type is int
        if field.type not in (int, float):
            continue
        if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"{field.name} is {shorten(value)}; expected {kind}")
        low, strict = least.get(field.name, 0), field.name in above_zero
        if not math.isfinite(value) or value < low or (strict and value <= 0):
            bound = "above 0" if strict else f"of {low} or more"
            raise ValueError(f"{field.name} is {shorten(value)}; expected a finite number {bound}")


def check_training(config) -> None:
    """The settings of a training run (`TrainingConfig`) are numbers that can be.

    Raises:
        ValueError: naming the field, its value and what is expected.
    """
    least = {"steps": 1, "batch_size": 1, "accumulate": 1, "save_every": 1}
    check_settings(config, least, above_zero=("learning_rate", "max_grad_norm"))
    if config.ema_decay >= 1:
        raise ValueError(f"ema_decay is {config.ema_decay}; expected a number below 1")
    if config.accumulate > config.batch_size:
        raise ValueError(
            f"accumulate is {config.accumulate}, more parts than the {config.batch_size} examples "
            "of a batch; lower it or raise batch_size"
        )


def check_dataset(dataset) -> int:
    """The length of a dataset whose items are what training needs.

    Raises:
        ValueError: it is empty, or the first item lacks a key.
    """
    length = len(dataset)
    if not length or (missing := {"image", "prefix", "suffix"} - set(dataset[0])):
        what = f"lacks {', '.join(sorted(missing))}" if length else "is empty"
        raise ValueError(f"the dataset {what}; items need image, prefix and suffix")
    return length


def check_same(file: Path, saved: Mapping, settings: Mapping) -> None:
    """A checkpoint was made with the settings of this run.

    Raises:
        ValueError: naming the first that differs.
    """
    for key, value in settings.items():
        if saved.get(key) != value:
            raise ValueError(
                f"{file} was made with {key} {shorten(saved.get(key))}, now it is {value!r}; "
                "give the same settings or another folder"
            )


def read_checkpoint(file: Path, settings: dict, shapes: dict[str, torch.Size]) -> dict:
    """What `torch.save` wrote as {"model", "config", …}, if it belongs to this run.

    Args:
        file: the checkpoint.
        settings: those that may not differ from its "config".
        shapes: of the parameters that are trained, by name.

    Raises:
        ValueError: broken, or of another run.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        saved, theirs = dict(state["config"]), {k: v.shape for k, v in state["model"].items()}
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = shorten(" ".join(str(error).split()), 100)
        raise ValueError(f"{file} is broken ({reason}); remove it to start anew") from None
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is no training checkpoint; give another folder") from None
    check_same(file, saved, settings)
    if theirs != shapes:
        raise ValueError(f"{file} trains other parameters than this model's; give another folder")
    return state


@contextmanager
def noted_interrupt(*signals: signal.Signals) -> Iterator[list[bool]]:
    """While open, Ctrl-C (or these signals) are noted in the list that this gives."""
    notes: list[bool] = []
    if threading.current_thread() is not threading.main_thread():  # only that one may listen
        yield notes
        return
    note = lambda *_: notes.append(True)  # noqa: E731
    before = {each: signal.signal(each, note) for each in signals or (signal.SIGINT,)}
    try:
        yield notes
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def ignore_interrupt(_: int = 0) -> None:
    """Leave Ctrl-C to the main process: for worker processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def read_examples(path: str | os.PathLike) -> list[dict[str, str]]:
    """Examples from JSON lines: {"image": path, "prefix", "suffix"}.

    Args:
        path: the file, or a folder with exactly one `*.jsonl`; pictures are named relative to it.

    Raises:
        ValueError: no such file, no line, or a broken one, named by its number.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        found = sorted(file.glob("*.jsonl"))
        if len(found) != 1:
            raise ValueError(f"{file} holds {len(found)} files *.jsonl; give one of them")
        file = found[0]
    try:
        lines = file.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {shorten(str(error), 200)}") from None
    items = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                items.append(_read_example(line, file.parent))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}, line {number}: {error}") from None
    if not items:
        raise ValueError(f"{file} holds no line; expected an object with image, prefix and suffix")
    return items


def _read_example(line: str, folder: Path) -> dict[str, str]:
    """One line; the picture's name becomes a path that exists."""
    item = json.loads(line)
    if not isinstance(item, dict):
        raise ValueError(f"it is {shorten(item)}; expected an object")
    for key in ("image", "prefix", "suffix"):
        if not isinstance(item.get(key), str):
            raise ValueError(f"{key} is {shorten(item.get(key))}; expected a string")
    picture = folder / item["image"]
    if not os.path.isfile(picture):
        raise ValueError(f"there is no picture {shorten(str(picture), 200)}")
    return {"image": str(picture), "prefix": item["prefix"], "suffix": item["suffix"]}
