"""COCO's boxes and masks as prompts and answers to learn from.

An object becomes `<loc>×4 name`, or `<loc>×4<seg>×16 name`; objects follow each other as the prompt
names their kinds, those of one kind from left to right (as in the scenes of lesson 25).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from paligemma.detection import encode_boxes, parse_detections
from paligemma.mask_codec import MaskCodec
from paligemma.segmentation import encode_segments
from paligemma.support.files import read_json, shorten

FAR = 1e6  # pixels; a polygon's corner beyond is moved here


@dataclass
class Thing:
    """One annotated object: its name, its box (x0, y0, x1, y1) in pixels, COCO's segmentation."""

    name: str
    box: tuple[float, float, float, float]
    segmentation: Any


@dataclass
class Annotated:
    """A picture of the annotations, and what is in it."""

    file_name: str
    width: int
    height: int
    things: list[Thing] = field(default_factory=list)


# ---------------------------------------------------------------- reading


def read_coco(file: Path) -> tuple[list[str], list[Annotated], Counter]:
    """Names of the kinds that occur, pictures with their objects, and how many are left out.

    Left out are crowds (`iscrowd`: one mask for many objects) and boxes that have no inside when
    they are written in location words.

    Raises:
        ValueError: no such file, no JSON, a row that is not as COCO has it, named by its number,
            or no object at all.
    """
    data, left_out = read_json(file, dict), Counter()
    names = {row["id"]: _name(where, row["name"]) for where, row in _rows(file, data, CATEGORIES)}
    pictures = {
        row["id"]: Annotated(row["file_name"], row["width"], row["height"])
        for _, row in _rows(file, data, IMAGES)
    }
    for where, row in _rows(file, data, ANNOTATIONS):
        for key, known in (("image_id", pictures), ("category_id", names)):
            if row[key] not in known:
                raise ValueError(f"{where} has {key} {shorten(row[key])}, an id that nothing has")
        picture, name = pictures[row["image_id"]], names[row["category_id"]]
        x, y, width, height = _numbers(f"{where}: bbox", row.get("bbox"), 4)
        if min(width, height) < 0:
            raise ValueError(f"{where}: bbox is {row['bbox']}; expected x, y, width, height")
        thing = Thing(name, (x, y, x + width, y + height), row.get("segmentation"))
        size = picture.width, picture.height
        if row.get("iscrowd"):
            left_out["crowds"] += 1
        elif not parse_detections(encode_boxes([thing.box], *size)[0], *size):
            left_out["boxes without inside"] += 1
        else:
            picture.things.append(thing)
    seen = {thing.name for picture in pictures.values() for thing in picture.things}
    if not seen:
        raise ValueError(f"{file} holds no object that can be learned")
    return [n for n in dict.fromkeys(names.values()) if n in seen], [*pictures.values()], left_out


ID = (int, str)
CATEGORIES = ("categories", {"id": ID, "name": str})
IMAGES = ("images", {"id": ID, "file_name": str, "width": int, "height": int})
ANNOTATIONS = ("annotations", {"image_id": ID, "category_id": ID})


def _rows(file: Path, data: dict, table: tuple[str, dict]) -> Iterator[tuple[str, dict]]:
    """Each row of one of COCO's tables that has its fields, and where it stands."""
    key, fields = table
    rows = data.get(key)
    if not isinstance(rows, list):
        raise ValueError(f"{file} has no list {key}; expected annotations as COCO has them")
    for number, row in enumerate(rows):
        where = f"{file}, {key}[{number}]"
        if not isinstance(row, dict):
            raise ValueError(f"{where} is {shorten(row)}; expected an object")
        for name, kind in fields.items():
            value: Any = row.get(name)
            side = name in ("width", "height")
            if not isinstance(value, kind) or isinstance(value, bool) or (side and value < 1):
                wanted = "a number of pixels" if side else "a text" if kind is str else "an id"
                raise ValueError(f"{where}: {name} is {shorten(value)}; expected {wanted}")
        yield where, row


def _name(where: str, name: str) -> str:
    """A category's name, if it can stand in a prompt."""
    name = " ".join(name.split())
    if not name or set(name) & set(";<>"):
        raise ValueError(
            f"{where}: the name is {shorten(name)}; rename it: in a prompt names stand between ;, "
            "so none is empty or has ; < >"
        )
    return name


def _numbers(where: str, values: Any, count: int | None = None) -> list[float]:
    """Finite numbers, so many."""
    good = isinstance(values, list) and len(values) == (count or len(values))
    for value in values if good else ():
        good = good and isinstance(value, int | float) and abs(value) < 1e300  # NaN isn't
    if not good:
        wanted = f"{count} finite numbers" if count else "finite numbers"
        raise ValueError(f"{where} is {shorten(values)}; expected {wanted}")
    return [float(value) for value in values]


# ---------------------------------------------------------------- masks


def draw_mask(segmentation: Any, width: int, height: int) -> np.ndarray:
    """COCO's segmentation, polygons or run lengths (plain or compressed), as bool[height, width].

    Raises:
        ValueError: neither of these, or run lengths of another size.
    """
    if isinstance(segmentation, dict):
        counts, size = segmentation.get("counts"), segmentation.get("size")
        if isinstance(counts, str):
            counts = decompress(counts)
        if (
            size != [height, width]
            or not isinstance(counts, list)
            or not all(type(count) is int and count >= 0 for count in counts)
            or sum(counts) != height * width
        ):
            raise ValueError(f"run lengths {shorten(segmentation)} do not fill {[height, width]}")
        inside = np.arange(len(counts)) % 2 == 1  # they begin outside
        return np.repeat(inside, counts).reshape(width, height).T  # down the columns
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError(f"segmentation is {shorten(segmentation)}; expected polygons or a mask")
    canvas = Image.new("1", (width, height))
    for polygon in segmentation:
        corners = np.clip(_numbers("a polygon", polygon), -FAR, FAR)
        if len(corners) < 6 or len(corners) % 2:
            raise ValueError(f"polygon {shorten(polygon)}; expected x, y of three corners or more")
        ImageDraw.Draw(canvas).polygon(corners.tolist(), fill=1)
    return np.asarray(canvas)


def decompress(text: str) -> list[int]:
    """COCO's compressed run lengths: base 32, lowest digits first, from the fourth on differences.

    Raises:
        ValueError: a character that has no place in them, or an end in mid-number.

    Source: `rleFrString` in pycocotools.
    """
    counts, value, shift = [], 0, 0
    for character in text:
        digit = ord(character) - 48
        if not 0 <= digit < 64 or shift > 60:  # longer than any length
            raise ValueError(f"compressed run lengths hold {character!r}")
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:  # the last of its digits; its highest bit is the sign
            if digit & 16:
                value -= 1 << shift
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value, shift = 0, 0
    if shift:
        raise ValueError("compressed run lengths end in mid-number")
    return counts


# ---------------------------------------------------------------- examples


def as_example(
    picture: Annotated, names: Sequence[str], codec: MaskCodec | None = None
) -> tuple[str, str]:
    """Prompt and answer for the objects of these names: `detect`, or with a codec `segment`.

    Raises:
        ValueError: with a codec, a segmentation that is none.
    """
    things = [thing for thing in picture.things if thing.name in names]
    things.sort(key=lambda thing: (names.index(thing.name), thing.box[0] + thing.box[2]))
    boxes, size = [thing.box for thing in things], (picture.width, picture.height)
    if codec is None:
        words = encode_boxes(boxes, *size)
    else:
        masks = [draw_mask(thing.segmentation, *size) for thing in things]
        words = encode_segments(boxes, masks, codec, *size) if things else []
    answer = " ; ".join(f"{word} {thing.name}" for word, thing in zip(words, things))
    return f"{'segment' if codec else 'detect'} {' ; '.join(names)}", answer
