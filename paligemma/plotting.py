# Exported from notebooks/01_plotting.ipynb — edit there, then run `make sync`.
"""Look at what a tensor holds: pictures, matrices, attention."""

import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from paligemma.support.course import DIVERGING, HEAT
from paligemma.support.drawing import COLOURS


def to_array(values) -> np.ndarray:
    """Turn a list, an array, a tensor or a picture into a NumPy array of the same shape.

    Args:
        values: what NumPy reads, a PIL picture (read as RGB), or a tensor of any device and dtype.

    Returns:
        array; float32 where a tensor held floats.
    """
    if isinstance(values, Image.Image):
        return np.asarray(values.convert("RGB"))
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def to_pixels(image) -> np.ndarray:
    """Turn a picture of any usual kind into pixels that can be drawn.

    Args:
        image: PIL picture, uint8[H, W, 3], float[H, W, 3] in [0, 1]; or grey or bool [H, W].

    Returns:
        uint8[H, W, 3].

    Raises:
        ValueError: the layout is not height × width (× 3), or a number is out of range.
    """
    pixels = to_array(image)
    if pixels.ndim == 2:
        pixels = np.stack([pixels] * 3, axis=-1)  # [H, W, 3]
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise ValueError(
            f"a picture must be [height, width, 3], got shape {list(pixels.shape)}: for a "
            "channel-first tensor write .permute(1, 2, 0), from a batch take one picture"
        )
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    top, slack = (1, 1e-3) if pixels.dtype.kind == "f" else (255, 0)
    low, high = pixels.min(), pixels.max()
    if not (low >= -slack and high <= top + slack):
        raise ValueError(
            f"pixels of type {pixels.dtype} must lie in 0…{top}, got {low:.4g} to {high:.4g}: "
            "bring [-1, 1] back with (x + 1) / 2, floats of 0…255 with x / 255"
        )
    if top == 1:
        pixels = (pixels.clip(0, 1) * 255).round()
    return pixels.astype(np.uint8)


def show_images(images, titles=None, columns: int | None = None, height: float = 2.2) -> Figure:
    """Lay pictures out in a grid, each in its own proportions.

    Args:
        images: a picture or a list of them (what `to_pixels` takes).
        titles: a string, or one for each picture.
        columns: pictures in a row; by default as many as fit on a page.
        height: of a row, inches.

    Returns:
        Figure, at most 9.5 inches wide.
    """
    if isinstance(images, Image.Image) or getattr(images, "ndim", 4) in (2, 3):
        images = [images]
    titles = [titles] if isinstance(titles, str) else list(titles or [])
    pictures = [to_pixels(image) for image in images]
    if not pictures:
        raise ValueError("there is nothing to show: give at least one picture")
    aspect = max(picture.shape[1] / picture.shape[0] for picture in pictures)
    if columns is None:  # what fits into a row, a little smaller if that saves a row
        rows = max(1, round(len(pictures) * (height * aspect + 0.15) / 9.5))
        columns = math.ceil(len(pictures) / rows)
    rows = math.ceil(len(pictures) / columns)
    width = min(height * aspect, 9.5 / columns - 0.15)
    lines = max((str(title).count("\n") + 1 for title in titles), default=0)
    size = (columns * (width + 0.15), rows * (width / aspect + 0.1 + 0.2 * lines))
    figure, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained", figsize=size)
    for index, axis in enumerate(axes.flat):
        axis.set_axis_off()
        if index < len(pictures):
            small = max(pictures[index].shape[:2]) <= 64
            axis.imshow(pictures[index], interpolation="nearest" if small else "antialiased")
            axis.set_title(titles[index] if index < len(titles) else "", fontsize=9)
    plt.close(figure)
    return figure


def show_heatmap(
    matrix, title=None, rows=None, columns=None, annotate=False, centre=None, ax: Any = None
) -> Figure:
    """Draw a matrix as coloured cells.

    Args:
        matrix: [rows, columns] of numbers or bools; a vector is drawn as one row.
        title: above the cells.
        rows, columns: names of the rows and of the columns.
        annotate: write the number into each cell; True, or a format such as ".1f".
        centre: the value that stays pale, with a colour for either side; 0 for signed numbers.
        ax: axes to draw into; by default those of a new figure.

    Returns:
        Figure.
    """
    values = np.atleast_2d(to_array(matrix))
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"a heat map needs a matrix, got shape {list(values.shape)}: take a slice")
    numbers = values.astype(float)
    if ax is None:
        cell = 0.5 if annotate else min(0.4, 4.5 / max(values.shape))
        size = (min(9.5, max(2.2, values.shape[1] * cell + 0.6)), values.shape[0] * cell + 0.7)
        figure, ax = plt.subplots(figsize=size, layout="constrained")
    else:
        figure = ax.figure
    finite = numbers[np.isfinite(numbers)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    if values.dtype == bool or high == low:
        low, high = low * (values.dtype != bool), low + 1
    if centre is not None:
        reach = max(abs(low - centre), abs(high - centre))
        low, high = centre - reach, centre + reach
    image = ax.imshow(
        numbers,
        cmap=HEAT if centre is None else DIVERGING,
        vmin=low,
        vmax=high,
        aspect="equal" if min(values.shape) > 1 or annotate else "auto",
        interpolation="nearest",
    )
    ax.set_title(title or "")
    names = [[] if given is None else [str(name) for name in given] for given in (columns, rows)]
    turn = {"rotation": 45, "ha": "right"} if max(map(len, names[0]), default=0) > 5 else {}
    ax.set_xticks(range(len(names[0])), names[0], rotation_mode="anchor", **turn)
    ax.set_yticks(range(len(names[1])), names[1])
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)
    if max(values.shape) <= 40:  # thin lines between the cells
        ax.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
        ax.set_yticks(np.arange(values.shape[0] + 1) - 0.5, minor=True)
        ax.grid(which="minor", color=COLOURS["paper"], linewidth=1.2)
    whole = values.dtype.kind in "iub"
    form = annotate if isinstance(annotate, str) else "d" if whole else ".2f"
    for (row, column), value in np.ndenumerate(values) if annotate else ():
        dark = np.isfinite(value) and sum(image.cmap((float(value) - low) / (high - low))[:3]) < 1.6
        text = format(int(value) if form == "d" else float(value), form)
        where = {"ha": "center", "va": "center", "fontsize": 9}
        ax.text(column, row, text, color=COLOURS["paper" if dark else "ink"], **where)
    plt.close(figure)
    return figure


def show_attention(image, weights, titles=None, columns: int | None = None) -> Figure:
    """Show where on a picture attention falls: what it looks at glows.

    Args:
        image: the picture (what `to_pixels` takes).
        weights: float[N] or float[maps, N], a weight ≥ 0 for each of N patches, row by row.
        titles: a string for each of the maps.
        columns: maps in a row.

    Returns:
        Figure with a picture for each map, scaled to its own largest weight.

    Raises:
        ValueError: N is not a square number, so that the patches form no square grid.
    """
    maps = np.atleast_2d(to_array(weights)).astype(float)
    side = math.isqrt(maps.shape[-1])
    if maps.ndim != 2 or side * side != maps.shape[-1] or maps.size == 0:
        raise ValueError(
            f"weights must be [N] or [maps, N] with a square number N, got {list(maps.shape)}: "
            "choose one head and drop the text tokens"
        )
    pixels = to_pixels(image).astype(float)
    height, width = pixels.shape[:2]
    rows, columns_of = np.arange(height) * side // height, np.arange(width) * side // width
    dim = 40 + 0.3 * pixels.mean(axis=2, keepdims=True)
    bright = 0.5 * pixels + 0.5 * np.array([255, 205, 70])
    pictures = []
    for level in maps.clip(0) / maps.max(axis=1, keepdims=True).clip(1e-12):
        level = level.reshape(side, side)[rows][:, columns_of, None]  # [H, W, 1]
        pictures.append((dim + (bright - dim) * level).round().astype(np.uint8))
    return show_images(pictures, titles, columns, height=2.4)
