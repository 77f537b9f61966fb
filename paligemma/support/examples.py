"""Examples of one's own: JSON lines beside pictures, in the layouts that annotation tools write."""

import codecs
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from paligemma.support.files import shorten

if TYPE_CHECKING:
    from paligemma.processor import Processor

EXPECTED = "expected an object with image, prefix and suffix on each line"


def find_examples(path: str | os.PathLike) -> Path:
    """The `*.jsonl` to learn from.

    Args:
        path: the file; or the folder of a data set: the file lies in it, or in its folder `train`
            or `dataset`. Of several the one counts whose name says "train".

    Raises:
        ValueError: no such file, or several that may be meant.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        return path
    for folder in (path, path / "train", path / "dataset"):
        found = sorted(folder.glob("*.jsonl"))
        chosen = [file for file in found if "train" in file.name] if len(found) > 1 else found
        if len(chosen) == 1:
            return chosen[0]
        if found:
            names = shorten([file.name for file in found], 200)
            raise ValueError(
                f"{folder} holds {len(found)} files *.jsonl, {names}; give one of them"
            )
    raise ValueError(f"{path} holds no *.jsonl, nor does a folder train or dataset in it")


def find_held_out(file: Path) -> Path | None:
    """The examples for the test beside those of `find_examples`: the one file with "val" in its
    name, or the one in the folder `valid` or `val` beside a folder `train`; None: there is none."""
    found = [other for other in file.parent.glob("*.jsonl") if "val" in other.name]
    if file.parent.name == "train":
        for name in ("valid", "val"):
            found += file.parent.with_name(name).glob("*.jsonl")
    found = [other for other in found if other != file]
    return found[0] if len(found) == 1 else None


def read_examples(path: str | os.PathLike, prefix: str | None = None) -> list[dict[str, str]]:
    """Examples from JSON lines: {"image": path, "prefix": prompt, "suffix": answer}.

    Args:
        path: what `find_examples` takes; pictures are named relative to the file.
        prefix: the prompt of lines that have none; None: every line has its own.

    Raises:
        ValueError: no such file, no line, or a broken one, named by its number.
    """
    file = find_examples(path)
    if not file.is_file():
        raise ValueError(f"there is no file {file}; give a *.jsonl, or the folder that holds it")
    try:
        lines = file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from None
    items = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                items.append(_read_example(line, file.parent, prefix))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}, line {number}: {error}") from None
    if not items:
        raise ValueError(f"{file} holds no line; {EXPECTED}")
    return items


def _read_example(line: bytes, folder: Path, prefix: str | None) -> dict[str, str]:
    """One line; the picture's name becomes a path that exists."""
    item = json.loads(line.decode())
    if not isinstance(item, dict):
        raise ValueError(f"it is {shorten(item)}; {EXPECTED}")
    if prefix is not None:
        item.setdefault("prefix", prefix)
    for key in ("image", "prefix", "suffix"):
        if key not in item:
            hint = ", or give one prefix for all lines without" if key == "prefix" else ""
            raise ValueError(f"it has no {key}; {EXPECTED}{hint}")
        if not isinstance(item[key], str):
            raise ValueError(f"{key} is {shorten(item[key])}; expected a string")
    picture = folder / item["image"]
    if not os.path.isfile(picture):
        raise ValueError(f"there is no picture {shorten(str(picture), 200)}")
    return {"image": str(picture), "prefix": item["prefix"], "suffix": item["suffix"]}


def check_texts(items: Iterable[dict], processor: "Processor") -> None:
    """All prompts and answers can be written in a model's tokens, and fit into its context.

    Raises:
        ValueError: naming the picture of the first that doesn't.
    """
    for item in items:
        try:
            processor.encode_prefix(item["prefix"])
            processor.encode_suffix(item["suffix"])
        except ValueError as error:
            raise ValueError(f"the example of {item['image']}: {error}") from None


def hold_out(items: list[dict], share: float, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Examples to learn from and examples for the test, which have no picture in common.

    Args:
        items: from `read_examples`.
        share: of the pictures that are kept for the test, above 0 and below 1; at least one is.
        seed: which these are follows from it.

    Raises:
        ValueError: a share that leaves one side empty.
    """
    pictures = list(dict.fromkeys(item["image"] for item in items))
    count = max(1, round(share * len(pictures))) if 0 < share < 1 else 0
    if not 0 < count < len(pictures):
        raise ValueError(
            f"a share of {share} of {len(pictures)} pictures cannot be held out; "
            "expected one between 0 and 1 that leaves pictures to learn from"
        )
    order = np.random.default_rng(seed).permutation(len(pictures))
    kept = {pictures[i] for i in order[:count]}
    learnt = [item for item in items if item["image"] not in kept]
    return learnt, [item for item in items if item["image"] in kept]
