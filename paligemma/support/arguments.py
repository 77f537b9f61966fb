"""What people pass, as lists of equal length."""

from typing import Any

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
