"""The emoji of the course's scenes: names, and pictures ready to be blended in."""

import json
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

EMOJI = Path(str(resources.files("paligemma"))) / "assets" / "emoji"
KINDS = json.loads((EMOJI / "kinds.json").read_text(encoding="utf-8"))
NAMES: list[str] = [kind["name"] for kind in KINDS]
PLURALS: list[str] = [kind["plural"] for kind in KINDS]
SCALES = list(range(22, 59, 3))  # sprite side in pixels: a fifth to half of a scene's
ANGLES = [-16, -8, 0, 8, 16]  # degrees

Sprite = tuple[np.ndarray, np.ndarray, np.ndarray]


@cache
def sprites() -> list[list[list[list[Sprite]]]]:
    """Every emoji at every scale and angle, plain and mirrored.

    Returns:
        nested lists `[kind][scale][angle][mirrored]` of (colour, alpha, mask): premultiplied
        colour uint16[h, w, 3]; alpha uint16[h, w, 1], 0 to 256; mask bool[h, w], alpha at least
        half. They are cropped to the mask.
    """
    table = []
    for name in NAMES:
        with Image.open(EMOJI / f"{name}.png") as opened:
            picture = opened.convert("RGBA").convert("RGBa")  # premultiplied
        table.append([[_render(picture, side, angle) for angle in ANGLES] for side in SCALES])
    return table


def _render(picture: Image.Image, side: int, angle: float) -> list[Sprite]:
    """Turn, scale and crop one emoji: [as it is, mirrored]."""
    turned = picture.rotate(angle, Image.Resampling.BICUBIC, expand=True) if angle else picture
    factor = side / picture.width  # turning made the picture larger, but not the object
    width, height = (max(1, round(length * factor)) for length in turned.size)
    resized = turned.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(resized, dtype=np.uint16)
    rows, columns = np.nonzero(pixels[..., 3] >= 128)
    pixels = pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    views = []
    for view in (pixels, pixels[:, ::-1]):
        alpha = np.ascontiguousarray(view[..., 3:])
        colour = np.minimum(view[..., :3], alpha)  # resizing may overshoot: never above its alpha
        views.append((colour, alpha + (alpha >> 7), alpha[..., 0] >= 128))  # 255 becomes 256
    return views
