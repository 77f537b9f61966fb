"""What people pass: lists made equally long, tensors that fit each other, ways to quantise."""

import math
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any

import torch

from paligemma.support.files import shorten


def as_lists(
    images: Any, prompts: Any, suffixes: Any = None
) -> tuple[list[list], list[str], list[str]]:
    """One of each, or lists of them → B lists of pictures, B prompts, and B answers or none.

    Args:
        images: a picture; a list of B, each a picture or a list of several.
        prompts: a string or a list of B.
        suffixes: a string, a list of B, or None.

    Raises:
        ValueError: unequal numbers, none at all, a prompt without a picture, or no strings.
    """
    images = list(images) if isinstance(images, list | tuple) else [images]
    groups = [list(image) if isinstance(image, list | tuple) else [image] for image in images]
    texts = {"prompts": prompts, "suffixes": [] if suffixes is None else suffixes}
    for name, values in texts.items():
        values = [values] if isinstance(values, str) else values
        if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
            raise ValueError(
                f"{name}: got {shorten(values, 80)}; expected a string or a list of strings"
            )
        texts[name] = list(values)
    prompts, answers = texts.values()
    counts = {len(groups), len(prompts), len(prompts if suffixes is None else answers)}
    if len(counts) != 1 or not prompts:
        raise ValueError(
            f"got {len(groups)} pictures, {len(prompts)} prompts"
            + ("" if suffixes is None else f" and {len(answers)} suffixes")
            + "; expected the same number of each, at least one"
            + ("" if len(prompts) != 1 or len(groups) < 2 else SEVERAL.format(len(groups)))
        )
    for number, group in enumerate(groups):
        if not group:
            raise ValueError(f"prompt {number} has no picture; give at least one for each prompt")
    return groups, prompts, answers


SEVERAL = " (one prompt about several pictures: [[a, b]]; the same for each: [prompt] * {})"


def check_inputs(
    input_ids: torch.Tensor,
    past: int,
    attention_mask: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    labels: torch.Tensor | None,
) -> torch.Tensor:
    """The attention mask, ones when none is given: `int64[B, S]` with S = `past` + L.

    Raises:
        ValueError: a tensor does not fit the L new tokens (the mask: the cached ones as well),
            or labels come without token_type_ids.
    """
    batch, length = input_ids.shape
    if labels is not None and token_type_ids is None:
        raise ValueError(
            "labels need token_type_ids, 1 where the answer stands: without them each token sees "
            "the answer it is asked for; take both from the same Processor"
        )
    if attention_mask is None:
        attention_mask = input_ids.new_ones(batch, past + length)
    cached = f"{past} cached tokens and {length} new ones"
    for name, tensor, size, why in (
        ("attention_mask", attention_mask, past + length, cached),
        ("token_type_ids", token_type_ids, length, "one for each new token"),
        ("labels", labels, length, "one for each new token, not shifted"),
    ):
        if tensor is not None and tensor.shape != (batch, size):
            raise ValueError(f"{name} is {list(tensor.shape)}; expected [{batch}, {size}]: {why}")
    return attention_mask


def check_context(tokens: int, context: int) -> None:
    """Refuse a row of more tokens than a model reads, before memory is taken for it."""
    if tokens > context:
        raise ValueError(
            f"picture, prompt and answer would have {tokens} tokens; this model reads {context} at "
            f"most, {tokens - context} fewer: lower max_new_tokens, or shorten the prompt"
        )


def check_pictures(is_image: torch.Tensor, image_features: torch.Tensor | None) -> None:
    """As many `<image>` tokens, `bool[B, L]`, as vectors in `float[P, N, D]`, or a ValueError."""
    found = int(is_image.sum())
    given = 0 if image_features is None else image_features.shape[:2].numel()
    if found != given:
        raise ValueError(
            f"input_ids hold {found} <image> tokens and the pictures give {given}; "
            "make both with the same Processor"
        )


def check_steps(max_new_tokens: Any, eos_token_id: Any) -> None:
    """Refuse a limit that is no number of tokens, and an end that is no token id, nor -1."""
    if not is_whole(max_new_tokens) or max_new_tokens < 1:
        raise ValueError(
            f"max_new_tokens is {shorten(max_new_tokens)}; expected a whole number of at least 1"
        )
    if not is_whole(eos_token_id):
        raise ValueError(
            f"eos_token_id is {shorten(eos_token_id)}; expected one token id, or -1 for none"
        )


def is_whole(value: Any) -> bool:
    """A whole number; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def as_text(text: Any) -> str:
    """The text of an answer, of whatever characters; a ValueError if it is none."""
    if not isinstance(text, str):
        raise ValueError(f"the text is {shorten(text)}; expected a string")
    return text


def as_number(value: Any) -> float:
    """A real number as Python has it; NaN for everything else."""
    try:
        return float(value) if isinstance(value, Real) else math.nan
    except OverflowError:
        return math.inf


def check_size(width: Any, height: Any, whole: bool = False) -> None:
    """Refuse a size of a picture that is not two numbers above 0, or not whole ones."""
    sizes = [as_number(width), as_number(height)]
    fit = all(0 < size < math.inf for size in sizes)
    if not fit or (whole and any(size != int(size) for size in sizes)):
        wanted = "whole numbers of pixels" if whole else "its size in pixels"
        raise ValueError(f"the picture is {shorten(width)} × {shorten(height)}; expected {wanted}")


def check_boxes(boxes: Any) -> Iterator[list[float]]:
    """Each box as four finite numbers x0, y0, x1, y1 with x0 ≤ x1 and y0 ≤ y1, or a ValueError."""
    try:
        boxes = list(boxes)
    except TypeError:
        raise ValueError(f"boxes are {shorten(boxes)}; expected a list of boxes") from None
    for box in boxes:
        try:
            numbers = [float(value) for value in box]
        except (TypeError, ValueError, OverflowError, RuntimeError):
            numbers = []
        if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
            raise ValueError(f"a box is {shorten(box)}; expected four finite numbers, x0 y0 x1 y1")
        if numbers[2] < numbers[0] or numbers[3] < numbers[1]:
            raise ValueError(f"box {numbers} is inside out; expected two corners: x0 ≤ x1, y0 ≤ y1")
        yield numbers


def as_tensor(values: Any, what: str) -> torch.Tensor:
    """A tensor, or what can be one: an array, numbers in lists; else a ValueError."""
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{what} are {shorten(values)}; expected a tensor of numbers") from None


GROUP_SIZES = (32, 64, 128, 256)  # weights that share a scale; what PyTorch's int4 kernel knows


def check_quantization(model: Any, mode: str, group_size: int, one_type: bool) -> None:
    """Refuse a model or a way that `quantize_model` can't use.

    Args:
        model: a `PaliGemma`.
        mode, group_size: as `quantize_model` takes them.
        one_type: the weights have to be of one type.

    Raises:
        ValueError: an unknown mode or group size, a model that is quantised already, adapters that
            are not merged, or weights of several types.
    """
    if not isinstance(mode, str) or mode not in ("int8", "int4"):
        raise ValueError(f"the mode is {shorten(mode)}; expected 'int8' or 'int4'")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {shorten(group_size)}; expected 32, 64, 128 or 256")
    if model.language_model.head is not None:
        raise ValueError("the model is quantised already; load the original weights again")
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("the model has adapters; call merge_lora first")
    if one_type:
        check_one_type(model)


def check_one_type(model: torch.nn.Module) -> None:
    """Weights and scales of several float types cannot be multiplied with each other."""
    floats = {str(t.dtype)[6:] for t in model.state_dict().values() if t.is_floating_point()}
    if len(floats) > 1:
        raise ValueError(f"the weights are {' and '.join(sorted(floats))}; give one dtype for all")
