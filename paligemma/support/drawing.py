"""Boxes, masks and captions drawn on pictures with Pillow: what the command writes to a file."""

import math
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

COLOURS = {
    "ink": "#23272f",
    "paper": "#fdfbf7",
    "vision": "#1b6ca8",
    "language": "#d1641b",
    "together": "#11856b",
    "accent": "#a8497f",
    "muted": "#98a0a9",
    "good": "#2c8a4b",
    "bad": "#c23b34",
    "learning": "#8f6a00",
    "inside": "#55606c",
}
CYCLE = [COLOURS[n] for n in ("vision", "language", "together", "accent", "learning", "inside")]


def draw_boxes(image, boxes, labels=None, scores=None) -> Image.Image:
    """Draw labelled boxes on a copy of a picture.

    Args:
        image: `PIL.Image` or uint8[H, W, 3].
        boxes: (x0, y0, x1, y1) for each object, in pixels of this picture.
        labels: a string for each box; equal labels share a colour.
        scores: a number for each box, written behind its label.

    Returns:
        PIL.Image in RGB, of the same size.

    Raises:
        ValueError: there are not as many labels as boxes.
    """
    picture = _copy(image)
    corners = np.asarray(boxes, dtype=float).reshape(-1, 2, 2)
    names, colours = _names_and_colours(labels, len(corners))
    if scores is not None:
        names = [f"{name} {score:.2f}".strip() for name, score in zip(names, scores)]
    edge = [picture.width - 1, picture.height - 1]
    corners = corners.clip(0, edge).round().astype(int)
    boxes = [(*pair.min(0).tolist(), *pair.max(0).tolist()) for pair in corners]
    draw, line = ImageDraw.Draw(picture), round(3 * _scale(picture))
    for box, colour in zip(boxes, colours):
        draw.rectangle(box, outline=colour, width=line)
    _write_labels(picture, names, [box[:2] for box in boxes], colours)
    return picture


def draw_masks(image, masks, labels=None) -> Image.Image:
    """Tint the pixels of each mask and draw its outline, on a copy of a picture.

    Args:
        image: `PIL.Image` or uint8[H, W, 3].
        masks: bool[H, W] for each object, as large as the picture.
        labels: a string for each mask; equal labels share a colour.

    Returns:
        PIL.Image in RGB, of the same size.

    Raises:
        ValueError: a mask has another size, or there are not as many labels as masks.
    """
    picture = _copy(image)
    masks = [np.asarray(mask).astype(bool) for mask in masks]
    names, colours = _names_and_colours(labels, len(masks))
    shrink = ImageFilter.BoxBlur(round(1.5 * _scale(picture)))  # only deep inside stays 255
    for mask, colour in zip(masks, colours):
        if mask.shape != (picture.height, picture.width):
            right = [picture.height, picture.width]
            raise ValueError(f"a mask has shape {list(mask.shape)}, expected {right}: resize it")
        shape = Image.fromarray(mask.astype(np.uint8) * 255)
        inside = np.asarray(shape.filter(shrink)) == 255
        strength = np.where(mask & ~inside, 255, np.where(mask, 110, 0)).astype(np.uint8)
        picture.paste(colour, mask=Image.fromarray(strength))
    seen = [i for i, mask in enumerate(masks) if mask.any()]
    corners = [(masks[i].any(0).argmax(), masks[i].any(1).argmax()) for i in seen]
    _write_labels(picture, [names[i] for i in seen], corners, [colours[i] for i in seen])
    return picture


def draw_caption(image, text: str) -> Image.Image:
    """Set a text on a strip of paper beneath a picture, wrapped to its width.

    Args:
        image: `PIL.Image` or uint8[H, W, 3].
        text: of any length, with or without line breaks.

    Returns:
        PIL.Image in RGB, as wide as the picture and taller.
    """
    picture = _copy(image)
    font = _font(max(9.0, 13 * picture.width / 300))
    step, pad = sum(font.getmetrics()), max(1, round(font.size / 2))
    lines = _wrap(text, font, picture.width - 2 * pad)
    height = picture.height + len(lines) * step + 2 * pad
    canvas = Image.new("RGB", (picture.width, height), COLOURS["paper"])
    canvas.paste(picture)
    for number, line in enumerate(lines):
        place = (pad, picture.height + pad + number * step)
        ImageDraw.Draw(canvas).text(place, line, font=font, fill=COLOURS["ink"])
    return canvas


def _copy(image) -> Image.Image:
    """A copy to draw on, in RGB."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    return picture.copy() if picture.mode == "RGB" else picture.convert("RGB")


@lru_cache
def _font(size: float) -> ImageFont.FreeTypeFont:
    """DejaVu Sans where matplotlib brought it (it has most letters), else Pillow's own font."""
    found = find_spec("matplotlib")
    folder = Path(found.origin).parent if found and found.origin else Path()
    file = folder / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    size = max(6, round(size))
    if file.is_file():
        return ImageFont.truetype(file, size)
    return ImageFont.load_default(size)  # type: ignore[return-value]


def _scale(picture: Image.Image) -> float:
    """How much thicker than on a picture of 300 pixels its lines are."""
    return max(1.0, min(picture.size) / 300)


def _names_and_colours(labels, count: int) -> tuple[list[str], list[str]]:
    names = [""] * count if labels is None else [" ".join(str(label).split()) for label in labels]
    if len(names) != count:
        raise ValueError(f"got {len(names)} labels for {count} objects: give one label for each")
    order = list(dict.fromkeys(names))
    return names, [CYCLE[order.index(name) % len(CYCLE)] for name in names]


def _write_labels(picture: Image.Image, names, corners, colours) -> None:
    """Write each name on a tag above its corner; a tag that would hide another moves up or down.

    A tag that finds no room is left out: the box itself says more than a heap of tags.
    """
    draw, pad, taken = ImageDraw.Draw(picture), round(2 * _scale(picture)), []
    font = _font(min(12 * _scale(picture), picture.height / 3))
    height = sum(font.getmetrics())
    for name, (x, y), colour in zip(names, corners, colours):
        while len(name) > 1 and font.getlength(name) + 2 * pad > picture.width:
            name = name[:-2] + "…"
        width = math.ceil(font.getlength(name)) + 2 * pad
        left = min(max(0, int(x)), picture.width - width)
        tops = {min(max(0, int(y) - height), picture.height - height)}
        tops |= {t for _, top, _, low in taken for t in (top - height, low)}
        for top in sorted(tops, key=lambda top, y=y: abs(top + height - y)):
            tag = (left, top, left + width, top + height)
            inside = left >= 0 and 0 <= top <= picture.height - height
            if name and inside and not any(_meet(tag, other) for other in taken):
                taken.append(tag)
                draw.rectangle((left, top, tag[2] - 1, tag[3] - 1), fill=colour)
                draw.text((left + pad, top), name, font=font, fill="white")
                break


def _meet(a, b) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _wrap(text: str, font, width: float) -> list[str]:
    """Break a text into lines of at most `width` pixels, at spaces where there are some."""
    lines = []
    for paragraph in text.splitlines() or [""]:
        line = ""
        for word in paragraph.split(" "):
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}" if line else word
            while len(line) > 1 and font.getlength(line) > width:  # a word longer than the strip
                fits = next(
                    n
                    for n in range(len(line), 0, -1)
                    if n == 1 or font.getlength(line[:n]) <= width
                )
                lines.append(line[:fits])
                line = line[fits:]
        lines.append(line)
    return lines
