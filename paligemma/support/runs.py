"""Care for training runs: settings, batches, resuming, interruptions."""

import math
import multiprocessing
import os
import signal
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

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
        theirs = saved.get(key)
        if isinstance(theirs, torch.Tensor) or theirs != value:
            raise ValueError(
                f"{file} was made with {key} {shorten(theirs)}, now it is {value!r}; "
                "give the same settings or another folder"
            )


def read_checkpoint(file: Path, settings: dict, shapes: dict[str, torch.Size]) -> dict:
    """What `torch.save` wrote as {"model", "config", …}, if it belongs to this run.

    Args:
        file: the checkpoint.
        settings: those that may not differ from its "config".
        shapes: of the parameters that are trained, by name.

    Raises:
        ValueError: cut, changed or of another run.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if changed := archive.testzip():  # torch.load does not look at the checksums
                raise ValueError(f"{changed} has changed")
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a reader of broken files raises nearly everything
        reason = shorten(" ".join(str(error).split()), 100)
        raise ValueError(f"{file} is broken ({reason}); remove it to start anew") from None
    try:
        saved, theirs = dict(state["config"]), {k: v.shape for k, v in state["model"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{file} is no training checkpoint; give another folder") from None
    check_same(file, saved, settings)
    with taking_up(file):
        if not all(math.isfinite(float(loss)) for loss in state.get("losses", ())):
            raise ValueError("a loss that is no number")
    if theirs != shapes:
        raise ValueError(f"{file} trains other parameters than this model's; give another folder")
    return state


WRONG_STATE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@contextmanager
def taking_up(file: Path, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
    """Whatever goes wrong while a checkpoint's state is taken over is one line about its file.

    Args:
        file: the checkpoint.
        optimizer: an AdamW; what it was given is checked at the end.
    """
    before = _choices(optimizer)
    try:
        yield
        if _choices(optimizer) != before:
            raise ValueError("an optimizer with other settings")
        for parameter, moments in optimizer.state.items() if optimizer else ():
            for name in ("step", "exp_avg", "exp_avg_sq"):
                moment, shape = moments[name], () if name == "step" else parameter.shape
                if moment.shape != shape or not moment.isfinite().all():
                    raise ValueError(f"{name} of the optimizer does not fit")
    except WRONG_STATE as error:
        reason = shorten(" ".join(str(error).split()), 100)
        raise ValueError(
            f"{file} holds the state of another run ({reason}); give another folder"
        ) from None


def _choices(optimizer: torch.optim.Optimizer | None) -> list[dict]:
    """What an optimizer was made with, but for the rate, which follows from the step."""
    groups = optimizer.param_groups if optimizer else []
    return [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in groups]


# ---------------------------------------------------------------- batches


def load_batches(
    dataset: Any, batches: Iterable[list[int]], make: Callable[[list], Any], workers: int = 0
) -> Iterator[Any]:
    """Yield `make([dataset[i] for i in batch])` for each batch, in order.

    Args:
        dataset: has items.
        batches: the numbers of each batch's items.
        make: items to what the training step takes.
        workers: processes that work ahead, and end with this one, however it ends; 0: none.

    Raises:
        ValueError: as `make` raised it, wherever it ran.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,  # pyright: ignore: nobody asks for its length
        collate_fn=partial(_made, make),
        num_workers=workers,
        worker_init_fn=_start_worker,
    )
    for made in loader:
        if isinstance(made, ValueError):
            raise made
        yield made


def _made(make: Callable[[list], Any], items: list) -> Any:
    """The batch, or what is wrong with it: DataLoader would raise that with a traceback inside."""
    try:
        return make(items)
    except ValueError as error:
        return ValueError(str(error))


def _start_worker(_: int) -> None:
    """Ctrl-C is left to the main process; its end, even by `kill -9`, ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


# ---------------------------------------------------------------- interruptions


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
