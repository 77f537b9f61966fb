"""A debug mode that names the module from which the first NaN or infinity comes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import partial
from typing import Any

import torch
from torch import nn


@contextmanager
def check_finite(model: nn.Module) -> Iterator[None]:
    """While open, a module that gives NaN or infinity raises, and is named with the place.

    with check_finite(pg.model):
        pg("photo.jpg", "caption en")  # or train(model, …), or a loss and its backward()

    Parameters and buffers are looked at when it opens; then the output of every module as soon as
    it is computed, and the gradient at every output: the first that is named is where it begins.
    It waits for each of them, which is slow on a GPU. What `compile_decode` compiled before is
    not looked into.

    Args:
        model: any module, in training or evaluation mode. It computes what it computes without.

    Raises:
        ValueError: "language_model.layers.1.mlp (GeGLU) gives nan at [0, 3, 5] of …".
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not _is_finite(tensor):
            raise ValueError(f"{name} holds {_first(tensor)}")
    opened, handles = True, []

    def look(name: str, module: nn.Module, inputs: tuple, output: Any) -> None:
        who = f"{name or 'the model'} ({type(module).__name__})"
        for tensor in _tensors(output):
            if not _is_finite(tensor):
                given = any(bool(each.isnan().any()) for each in _tensors(inputs))
                gives = "is given nan, and gives" if given else "gives"
                raise ValueError(f"{who} {gives} {_first(tensor)}")
            if tensor.requires_grad:
                tensor.register_hook(partial(look_back, who))

    def look_back(who: str, gradient: torch.Tensor) -> None:
        if opened and not _is_finite(gradient):  # a backward pass may come when it is closed
            raise ValueError(f"the gradient at the output of {who} is {_first(gradient)}")

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(partial(look, name)))
    try:
        yield
    finally:
        opened = False
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples, lists, dicts and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    value = vars(value) if is_dataclass(value) else value
    if isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _is_finite(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or bool(tensor.isfinite().all())


def _first(tensor: torch.Tensor) -> str:
    """The first value that is NaN or infinite, its place, how many there are."""
    places = (~tensor.isfinite()).nonzero().tolist()
    kind = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    value = tensor[tuple(places[0])].item()
    return f"{value} at {places[0]} of {kind}; {len(places)} values there are not finite"
