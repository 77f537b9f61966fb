# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["navigation"]
# [← Overview](00_overview.ipynb) | [contents](00_overview.ipynb) | [Image processor →](02_image_processor.ipynb)

# %% [markdown]
# # 1 · Pictures: what is a picture to a program?
#
# *30 minutes* · part I, Seeing
#
# **What you will be able to do**
#
# - say what every number of a picture means: its row, its column, its channel, its range;
# - turn a picture from the layout of files into the layout of networks and back, and prove it
#   right;
# - use the drawing helpers that all later lessons use, and read the map of the course.

# %% [markdown]
# The map below is drawn in every lesson. Follow the arrows: a picture and a prompt come in at the
# left, an answer leaves at the right. The coloured box is the part that the lesson builds; the
# small number in a box is its lesson. Today it is only the picture itself.

# %% tags=["map"]
from paligemma.plotting import model_map, sample_picture  # the module that this lesson builds

model_map("plotting")

# %% [markdown]
# ## Setup
#
# NumPy and Pillow hold pictures on the way in, PyTorch holds them inside the model, matplotlib
# draws. Nothing here is random.

# %%
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

# %% [markdown]
# ## The problem
#
# A neural network multiplies and adds. So before a model can see a cat, the cat has to be
# numbers, in an order on which the code that loads the picture and the code that reads it agree.
#
# Nothing fails when they disagree: a wrong order is still a picture, only of something else. This
# lesson makes the agreement explicit, and gives us the means to look.

# %%
cat = sample_picture("cat")
eye = (155, 101, 185, 121)  # left, top, right, bottom, in pixels
figure, (whole, close) = plt.subplots(1, 2, figsize=(8, 2.7), layout="constrained")
whole.imshow(cat)
whole.add_patch(plt.Rectangle(eye[:2], 30, 20, fill=False, edgecolor="white", linewidth=2))
close.imshow(cat.crop(eye), interpolation="nearest")
whole.set_title(f"{cat.width} × {cat.height} pixels")
close.set_title("the white frame: 30 × 20 pixels, one colour each")
for axis in (whole, close):
    axis.set_axis_off()

# %% [markdown]
# **What to notice.** From close up there is no cat and no eye, only small squares of one colour
# each: *pixels*. A colour is three numbers: how much red, green and blue light. These three are
# the *channels*.

# %% [markdown]
# ## By hand
#
# A picture small enough to type: 2 rows, 4 columns. Each pixel is (red, green, blue), from 0
# (dark) to 255 (full). The axes are height, width, channel: **HWC**. The row comes first, so the
# pixel at x = 2, y = 0 is `tiny[0, 2]`. Boxes are usually written x first: many a box in the
# wrong place starts here.

# %%
rows = [
    [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)],  # red, green, blue, white
    [(0, 0, 0), (128, 128, 128), (255, 255, 0), (217, 138, 61)],  # black, grey, yellow, cat
]
tiny = torch.tensor(rows, dtype=torch.uint8)  # (2, 4, 3): height, width, channel
print(list(tiny.shape), tiny.dtype)
print("row 0, column 2:", tiny[0, 2].tolist(), "blue")
print("row 1, column 3:", tiny[1, 3].tolist(), "the cat's orange")
print("all reds:", tiny[:, :, 0].tolist())

# %% [markdown]
# ### One byte a number
#
# `uint8` is a whole number in eight bits: 0 to 255. It is what files hold. It does not calculate
# well: past 255 it starts again at 0, with no warning. Make the grey pixel 200 brighter:

# %%
grey = tiny[1, 1]
print("uint8:  ", (grey + 200).tolist())
print("float32:", (grey.float() + 200).tolist())

# %% [markdown]
# ### Three ranges
#
# So we convert to float before any arithmetic. Three ranges are in use, and a model understands
# only the one it was trained with. SigLIP, the eye of PaliGemma, wants $[-1, 1]$:
#
# $$ x \in [0, 255] \;\to\; \frac{x}{255} \in [0, 1] \;\to\; 2\,\frac{x}{255} - 1 \in [-1, 1] $$

# %%
orange = tiny[1, 3]
unit = orange.float() / 255
signed = unit * 2 - 1
print("0 … 255:", orange.tolist())
print("0 … 1:  ", [round(value, 2) for value in unit.tolist()])
print("-1 … 1: ", [round(value, 2) for value in signed.tolist()])

# %% [markdown]
# ## As a loop
#
# PyTorch's convolutions want the channel first: **CHW**, three grey pictures one behind the
# other. The plainest way there visits each number once. Its place changes, its value does not.

# %%
H, W, C = tiny.shape
planes = torch.zeros(C, H, W, dtype=torch.uint8)
for row in range(H):
    for column in range(W):
        for channel in range(C):
            planes[channel, row, column] = tiny[row, column, channel]
print("red:  ", planes[0].tolist())
print("green:", planes[1].tolist())
print("blue: ", planes[2].tolist())

# %% [markdown]
# ## Vectorised
#
# `permute(2, 0, 1)` says: the new axes are the old axes 2, 0 and 1. Not one number moves in
# memory. PyTorch only changes the *strides*, the steps it takes to reach the next channel, row
# and column.

# %%
fast = tiny.permute(2, 0, 1)  # (C, H, W)
assert torch.equal(fast, planes)
print("strides HWC:", tiny.stride(), " strides CHW:", fast.stride())
print("same memory:", fast.data_ptr() == tiny.data_ptr())

# %% [markdown]
# ## The module
#
# Now `paligemma/plotting.py`: every cell that begins with `#| export` goes into it, as it stands
# here. It starts with a palette and a style. The colours mean the same in every figure: **blue**
# sees, **orange** reads, **green** joins the two, **purple** answers.

# %%
#| export
"""Pictures for the whole course: one calm style, and helpers that show what a tensor holds."""

import os
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from PIL import Image

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
CYCLE = [
    COLOURS[name] for name in ("vision", "language", "together", "accent", "learning", "inside")
]
HEAT = LinearSegmentedColormap.from_list(
    "heat", [COLOURS["paper"], "#a9cbe0", COLOURS["vision"], "#0d2f4f"]
)
DIVERGING = LinearSegmentedColormap.from_list(
    "diverging", ["#0f4c7d", "#6fa6cd", COLOURS["paper"], "#eba676", "#a3470b"]
)


# %%
#| export
def set_style():
    """Give every figure the course's look; the same figure makes the same SVG file each time."""
    ink, paper = COLOURS["ink"], COLOURS["paper"]
    mpl.rcParams.update(
        {
            "figure.facecolor": paper,
            "axes.facecolor": paper,
            "savefig.facecolor": paper,
            "figure.dpi": 110,
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.titlepad": 8,
            "text.color": ink,
            "axes.labelcolor": ink,
            "axes.edgecolor": COLOURS["muted"],
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": mpl.cycler(color=CYCLE),
            "grid.color": "#e6e1d8",
            "xtick.color": ink,
            "ytick.color": ink,
            "lines.linewidth": 1.8,
            "legend.frameon": False,
            "image.cmap": "gray",
            "svg.fonttype": "none",
            "svg.hashsalt": "paligemma",
        }
    )


set_style()

# %% [markdown]
# ### One door for pictures
#
# Pictures arrive as Pillow images, arrays and tensors. `to_array` takes any of them to NumPy, and
# `sample_picture` opens those that ship with the course. `to_pixels` goes on to `uint8` HWC and
# refuses what it would have to guess: a channel-first tensor, or floats outside $[0, 1]$.

# %%
#| export
from importlib import resources


def to_array(values):
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


def sample_picture(name="cat"):
    """Open one of the pictures that ship with the course.

    Args:
        name: "cat", "coffee", "astronaut" or "scene".

    Returns:
        PIL.Image in RGB.

    Raises:
        ValueError: there is no picture of that name.
    """
    folder = resources.files("paligemma") / "assets" / "pictures"
    files = [entry for entry in folder.iterdir() if entry.name.endswith((".jpg", ".png"))]
    found = {entry.name.rpartition(".")[0]: entry for entry in files}
    if name not in found:
        raise ValueError(f"no sample picture {name!r}: choose from {', '.join(sorted(found))}")
    with found[name].open("rb") as file:
        return Image.open(file).convert("RGB")


# %%
#| export
def to_pixels(image):
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
        pixels = np.stack([pixels] * 3, axis=-1)  # (H, W, 3)
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


# %%
# The same tiny picture, whichever way it comes; and a wrong layout is an error with advice.
assert np.array_equal(to_pixels(tiny), to_pixels(tiny.float() / 255))
assert np.array_equal(to_pixels(tiny), to_pixels(Image.fromarray(tiny.numpy())))
assert to_pixels(tiny).shape == (2, 4, 3) and to_pixels(tiny).dtype == np.uint8
try:
    to_pixels(fast)
except ValueError as error:
    print(error)

# %% [markdown]
# ### Pictures side by side
#
# `show_images` lays any number of pictures out in a grid. It closes the figure before it returns
# it, so that Jupyter draws it once, as the value of the cell, and not a second time at the cell's
# end.

# %%
#| export
import math


def show_images(images, titles=None, columns=None, height=2.2):
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


# %% [markdown]
# ### Numbers as colours
#
# Most tensors are not pictures. `show_heatmap` draws any matrix. Without a `centre`, pale is low
# and dark is high. With `centre=0`, blue is negative and orange is positive: two colours that
# nearly everyone can tell apart (Wong, 2011).


# %%
#| export
def show_heatmap(matrix, title=None, rows=None, columns=None, annotate=False, centre=None, ax=None):
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
    if ax is None:
        cell = 0.5 if annotate else min(0.4, 4.5 / max(values.shape))
        size = (min(9.5, max(2.2, values.shape[1] * cell + 0.6)), values.shape[0] * cell + 0.7)
        _, ax = plt.subplots(figsize=size, layout="constrained")
    low, high = _limits(values, centre)
    ax.imshow(
        values.astype(float),
        cmap=HEAT if centre is None else DIVERGING,
        vmin=low,
        vmax=high,
        aspect="equal" if min(values.shape) > 1 or annotate else "auto",
        interpolation="nearest",
    )
    ax.set_title(title or "")
    _label_cells(ax, values.shape, rows, columns)
    if annotate:
        _write_cells(ax, values, (values.astype(float) - low) / (high - low), annotate, centre)
    plt.close(ax.figure)
    return ax.figure


# %%
#| export
def _limits(values, centre):
    """Return the values of the palest and the darkest colour, infinities aside."""
    finite = values[np.isfinite(values)].astype(float) if values.dtype != bool else [0.0, 1.0]
    low, high = (np.min(finite), np.max(finite)) if len(finite) else (0.0, 1.0)
    if centre is not None:
        reach = max(abs(low - centre), abs(high - centre), 1e-12)
        return centre - reach, centre + reach
    return low, high if high > low else low + 1


def _label_cells(ax, shape, rows, columns):
    rows, columns = (
        [] if names is None else [str(name) for name in names] for names in (rows, columns)
    )
    turn = {"rotation": 45, "ha": "right"} if max(map(len, columns), default=0) > 5 else {}
    ax.set_xticks(range(len(columns)), columns, rotation_mode="anchor", **turn)
    ax.set_yticks(range(len(rows)), rows)
    if max(shape) <= 40:
        ax.set_xticks(np.arange(shape[1] + 1) - 0.5, minor=True)
        ax.set_yticks(np.arange(shape[0] + 1) - 0.5, minor=True)
        ax.grid(which="minor", color=COLOURS["paper"], linewidth=1.2)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)


def _write_cells(ax, values, levels, annotate, centre):
    whole = values.dtype.kind in "iub"
    form = annotate if isinstance(annotate, str) else "d" if whole else ".2f"
    for (row, column), value in np.ndenumerate(values):
        level = levels[row, column] if np.isfinite(value) else 0.0
        dark = level > 0.5 if centre is None else abs(level - 0.5) > 0.33
        colour = COLOURS["paper"] if dark else COLOURS["ink"]
        text = format(int(value) if whole and form == "d" else float(value), form)
        ax.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)


# %% [markdown]
# The tiny picture; its red channel as a file holds it; and the same numbers as SigLIP is given
# them. White and yellow are as red as red itself, and the cat's orange nearly so.

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9.3, 1.7), layout="constrained")
left.imshow(tiny)
left.set_title("all three channels")
left.set_axis_off()
signed = tiny.float() / 255 * 2 - 1
show_heatmap(tiny[:, :, 0], "red, uint8", annotate=True, ax=middle)
show_heatmap(signed[:, :, 0], "red, -1 … 1", annotate=True, centre=0, ax=right)

# %% [markdown]
# ### Writing on a picture
#
# Later the model will answer with boxes and masks. We draw those with Pillow, on a copy, so that
# the result is again a picture of the same size. Lines and letters grow with the picture, and a
# label is moved or shortened until it lies inside and hides no other. A mask's outline is what the
# mask loses when it shrinks a little.

# %%
#| export
from matplotlib import font_manager
from PIL import ImageDraw, ImageFont


def _font(size):
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), max(6, round(size)))


def _scale(picture):
    """Return how much thicker than on a picture of 300 pixels its lines are."""
    return max(1.0, min(picture.size) / 300)


def _names_and_colours(labels, count):
    names = [""] * count if labels is None else [str(label) for label in labels]
    if len(names) != count:
        raise ValueError(f"got {len(names)} labels for {count} objects: give one label for each")
    order = list(dict.fromkeys(names))
    return names, [CYCLE[order.index(name) % len(CYCLE)] for name in names]


# %%
#| export
def _write_label(picture, text, x, y, colour, taken=None):
    """Write text on a tag that stands on (x, y), moved or shortened to lie in the picture.

    `taken` lists the tags written so far, and gets this one: it moves as little as it can to hide
    none of them, then becomes smaller, and where there is no room at all is left out.
    """
    text, pad = " ".join(text.split()), round(2 * _scale(picture))
    size = min(12 * _scale(picture), picture.height / 3)
    while size > 7 and _font(size).getlength(text) + 2 * pad > picture.width:
        size *= 0.9
    place = None
    while text and place is None and size > 2:
        font, shown = _font(size), text
        while len(shown) > 1 and font.getlength(shown) + 2 * pad > picture.width:
            shown = shown[:-2] + "…"
        tag = (math.ceil(font.getlength(shown)) + 2 * pad, sum(font.getmetrics()))
        place = _free_place((round(x), round(y) - tag[1]), tag, picture.size, taken or [])
        size *= 0.8
    if place is None:
        return
    corners = (*place, place[0] + tag[0], place[1] + tag[1])
    if taken is not None:
        taken.append(corners)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((*corners[:2], corners[2] - 1, corners[3] - 1), fill=colour)
    draw.text((corners[0] + pad, corners[1]), shown, font=font, fill="white")


def _free_place(wanted, tag, picture, taken):
    """Return the corner nearest to `wanted` where a tag lies in the picture and hides none.

    In either direction the nearest free place is the wanted one, or it touches another tag.
    """
    most = np.maximum(np.subtract(picture, tag), 0)
    wanted = np.clip(wanted, 0, most)  # (left, top)
    old = np.asarray(taken, dtype=int).reshape(-1, 2, 2)  # (tags, corner, axis)
    near = np.concatenate([wanted[None], old[:, 0] - tag, old[:, 1]]).clip(0, most)
    meets = (near[:, None] < old[:, 1]) & (near[:, None] + tag > old[:, 0])  # (tried, tags, axis)
    meets = meets.astype(np.float32)
    free = np.argwhere(meets[..., 0] @ meets[..., 1].T == 0)  # the pairs (left, top) to choose from
    corners = np.stack([near[free[:, 0], 0], near[free[:, 1], 1]], axis=1)
    far = ((corners - wanted) ** 2).sum(axis=1)
    return tuple(corners[far.argmin()].tolist()) if len(corners) else None


# %%
#| export
def draw_boxes(image, boxes, labels=None, scores=None):
    """Draw labelled boxes on a copy of a picture.

    Args:
        image: the picture (what `to_pixels` takes).
        boxes: (x0, y0, x1, y1) for each object, in pixels of this picture.
        labels: a string for each box; equal labels share a colour.
        scores: a number for each box, written behind its label.

    Returns:
        PIL.Image in RGB, of the same size.

    Raises:
        ValueError: there are not as many labels as boxes.
    """
    picture = Image.fromarray(to_pixels(image))
    boxes = to_array(boxes).reshape(-1, 4).astype(float)
    names, colours = _names_and_colours(labels, len(boxes))
    if scores is not None:
        names = [f"{name} {score:.2f}".strip() for name, score in zip(names, scores)]
    edge = [picture.width - 1, picture.height - 1]
    corners = boxes.reshape(-1, 2, 2).clip(0, edge).round().astype(int)  # (objects, 2, 2)
    corners = [(*pair.min(axis=0).tolist(), *pair.max(axis=0).tolist()) for pair in corners]
    draw, line = ImageDraw.Draw(picture), round(3 * _scale(picture))
    for corner, colour in zip(corners, colours):
        draw.rectangle(corner, outline=colour, width=line)
    taken = []
    for corner, name, colour in zip(corners, names, colours):
        _write_label(picture, name, corner[0], corner[1], colour, taken)
    return picture


# %%
#| export
from PIL import ImageFilter


def draw_masks(image, masks, labels=None):
    """Tint the pixels of each mask and draw its outline, on a copy of a picture.

    Args:
        image: the picture (what `to_pixels` takes).
        masks: bool[H, W] for each object, as large as the picture.
        labels: a string for each mask; equal labels share a colour.

    Returns:
        PIL.Image in RGB, of the same size.

    Raises:
        ValueError: a mask has another size, or there are not as many labels as masks.
    """
    picture = Image.fromarray(to_pixels(image))
    masks = [to_array(mask).astype(bool) for mask in masks]
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
    taken = []
    for mask, name, colour in zip(masks, names, colours):
        if mask.any():
            top, left = (int(np.flatnonzero(mask.any(axis=axis))[0]) for axis in (1, 0))
            _write_label(picture, name, left, top, colour, taken)
    return picture


# %% [markdown]
# A caption goes beneath, wrapped to the picture's width. `_wrap` asks how many letters still fit;
# more letters are never narrower, so it can search by halving.

# %%
#| export
import bisect


def draw_caption(image, text):
    """Set a text on a strip of paper beneath a picture, wrapped to its width.

    Args:
        image: the picture (what `to_pixels` takes).
        text: of any length, with or without line breaks.

    Returns:
        PIL.Image in RGB, as wide as the picture and taller.
    """
    picture = Image.fromarray(to_pixels(image))
    font = _font(max(9.0, 13 * picture.width / 300))
    pad = max(1, round(font.size / 2))
    lines = _wrap(text, font, picture.width - 2 * pad)
    step = sum(font.getmetrics())
    height = picture.height + len(lines) * step + 2 * pad
    canvas = Image.new("RGB", (picture.width, height), COLOURS["paper"])
    canvas.paste(picture)
    for number, line in enumerate(lines):
        place = (pad, picture.height + pad + number * step)
        ImageDraw.Draw(canvas).text(place, line, font=font, fill=COLOURS["ink"])
    return canvas


def _wrap(text, font, width):
    """Break a text into lines of at most `width` pixels, at spaces where there are some."""
    lines = []
    for rest in text.splitlines() or [""]:
        while len(rest) > 1 and font.getlength(rest) > width:
            lengths = range(1, len(rest) + 1)
            fits = bisect.bisect(lengths, width, key=lambda n, rest=rest: font.getlength(rest[:n]))
            cut = rest.rfind(" ", 0, fits + 1)
            cut = cut if cut > 0 else max(1, fits)
            lines.append(rest[:cut].rstrip())
            rest = rest[cut:].lstrip()
        lines.append(rest)
    return lines


# %% [markdown]
# All three at work. The boxes were measured by eye. The mask is simply "every pixel that is much
# redder than it is blue": not a good cat finder, but a true mask.

# %%
pixels = to_array(cat).astype(int)  # signed, so that the difference may be negative
reddish = pixels[:, :, 0] - pixels[:, :, 2] > 75
boxes = draw_boxes(cat, [(132, 84, 208, 150), (292, 108, 344, 166)], ["eye", "eye"])
masks = draw_masks(cat, [reddish], ["reddish"])
show_images([boxes, masks, draw_caption(cat, "a cat looks past the camera")], height=2.1)

# %% [markdown]
# ### Where a model looks
#
# A vision transformer does not read pixels one by one. It cuts the picture into square *patches*
# and gives each a vector ([lesson 03](03_patch_embedding.ipynb)). Attention is then one weight for each patch.
# `show_attention` lights up the picture where the weights are high.


# %%
#| export
def show_attention(image, weights, titles=None, columns=None):
    """Show where on a picture attention falls: what it looks at glows.

    Args:
        image: the picture (what `to_pixels` takes).
        weights: float[N] or float[M, N], a weight ≥ 0 for each of N patches, row by row.
        titles: a string for each of the M maps.
        columns: maps in a row.

    Returns:
        Figure with M pictures, each scaled to its own largest weight.

    Raises:
        ValueError: N is not a square number, so that the patches form no square grid.
    """
    maps = np.atleast_2d(to_array(weights)).astype(float)
    side = math.isqrt(maps.shape[-1])
    if maps.ndim != 2 or side * side != maps.shape[-1] or maps.size == 0:
        raise ValueError(
            f"weights must be [N] or [M, N] with a square number N, got {list(maps.shape)}: "
            "choose one head and drop the text tokens"
        )
    pixels = to_pixels(image).astype(float)
    height, width = pixels.shape[:2]
    rows, columns_of = np.arange(height) * side // height, np.arange(width) * side // width
    dim = 40 + 0.3 * pixels.mean(axis=2, keepdims=True)
    bright = 0.5 * pixels + 0.5 * np.array([255, 205, 70])
    pictures = []
    for level in maps.clip(0) / maps.max(axis=1, keepdims=True).clip(1e-12):
        level = level.reshape(side, side)[rows][:, columns_of, None]  # (H, W, 1)
        pictures.append((dim + (bright - dim) * level).round().astype(np.uint8))
    return show_images(pictures, titles, columns, height=2.4)


# %% [markdown]
# ### Answers that check themselves
#
# Two small helpers are left. `check` runs an exercise's test and prints how it went; it never
# stops the notebook. `save_figure` writes a figure for the README and the site, but only when the
# course's build asks for it.


# %%
#| export
def check(test, *answers):
    """Run the test of an exercise and print how it went; never raises.

    Args:
        test: a function that asserts.
        answers: what it is called with.
    """
    try:
        test(*answers)
    except (Exception, SystemExit) as error:
        kind, reason = type(error).__name__, str(error).strip().split("\n")[0]
        print("✗ not yet:", reason if kind == "AssertionError" and reason else f"{kind}: {reason}")
    else:
        print("✓ correct")


def save_figure(figure, name):
    """Write a figure into the folder that PALIGEMMA_FIGURES names; without it write nothing.

    Args:
        figure: a matplotlib Figure or a PIL picture.
        name: file name; without a suffix a Figure becomes .svg, a picture .png.

    Returns:
        the same figure, so that a cell can end with this call.
    """
    drawn = hasattr(figure, "savefig")
    if folder := os.environ.get("PALIGEMMA_FIGURES"):
        path = Path(folder) / (name if Path(name).suffix else name + (".svg" if drawn else ".png"))
        path.parent.mkdir(parents=True, exist_ok=True)
        if drawn:
            undated = {"Date": None} if path.suffix == ".svg" else {"Software": None}
            figure.savefig(path, bbox_inches="tight", metadata=undated, dpi=130)
        else:
            figure.save(path)
    if drawn:
        plt.close(figure)
    return figure


# %% [markdown]
# ### The map (skip this on a first reading)
#
# The map of the course is drawn from three lists: boxes, the frames around them, and arrows. A
# place is (left, bottom, width, height) on a sheet of 100 × 62. Which lesson belongs to which
# part of the course, and so has which colour, stands in `PARTS`.

# %%
#| export
PARTS = {
    "ink": "overview",
    "vision": "plotting image_processor patch_embedding siglip_attention siglip",
    "language": "tokenizer rms_norm geglu rope grouped_query_attention kv_cache gemma gemma2",
    "together": "processor model checkpoint",
    "accent": "sampling generation detection segmentation quantization inference",
    "learning": "scenes contrastive training lora distributed",
    "inside": "interpretability web_app",
}
STEMS = {stem: colour for colour, stems in PARTS.items() for stem in stems.split()}
FRAMES = (  # stem, left, bottom, width, height, title
    ("processor", 13.5, 33.2, 16, 27.3, "Processor"),
    ("siglip", 51, 45.2, 26.5, 15.3, "SigLIP encoder block × 27"),
    ("gemma", 3.5, 13, 61.5, 16.2, "Gemma decoder block × 18"),
    ("grouped_query_attention", 14, 15, 23, 9.6, "grouped-query attention"),
)
ARROWS = (  # the corners of each line; the last one gets the head
    *(((a, 51.6), (b, 51.6)) for a, b in ((11.5, 15.3), (27.5, 33.8), (47, 52.8), (64, 65.8))),
    *(((a, 51.6), (b, 51.6)) for a, b in ((75.5, 81.3), (92, 95.6))),
    *(((a, 38.6), (b, 38.6)) for a, b in ((11.5, 15.3), (27.5, 33.8), (47, 95.6))),
    *(((a, 19.8), (b, 19.8)) for a, b in ((11.8, 13.8), (37, 38.1), (40.5, 42), (48.5, 50.3))),
    *(((a, 19.8), (b, 19.8)) for a, b in ((58.5, 59.8), (62.2, 67.8), (75.5, 78.3), (87, 89.8))),
    ((97.5, 34), (97.5, 31), (1, 31), (1, 19.8), (5.3, 19.8)),
    ((4.4, 19.8), (4.4, 25.4), (39.3, 25.4), (39.3, 21)),
    ((41.3, 19.8), (41.3, 25.4), (61, 25.4), (61, 21)),
    ((82.7, 15), (82.7, 10.9), (1, 10.9), (1, 19.6)),
)

# %%
#| export
BOXES = (  # stem, left, bottom, width, height, text; a low box has its number before the text
    ("image_processor", 15.5, 46.8, 12, 9.6, "image\nprocessor"),
    ("patch_embedding", 34, 46.8, 13, 9.6, "patches +\npositions"),
    ("siglip_attention", 53, 46.8, 11, 9.6, "attention\nall ↔ all"),
    ("siglip", 66, 46.8, 9.5, 9.6, "MLP"),
    ("model", 81.5, 46.8, 10.5, 9.6, "projector"),
    ("tokenizer", 15.5, 34.6, 12, 8, "tokenizer"),
    ("gemma", 34, 34.6, 13, 8, "embedding"),
    ("rms_norm", 5.5, 15, 6.3, 9.6, "RMS\nNorm"),
    ("rope", 15.2, 16, 6.4, 4.6, "RoPE"),
    ("kv_cache", 22.2, 16, 7.4, 4.6, "KV cache"),
    ("model", 30.2, 16, 5.6, 4.6, "mask"),
    ("rms_norm", 42.2, 15, 6.3, 9.6, "RMS\nNorm"),
    ("geglu", 50.5, 15, 8, 9.6, "GeGLU"),
    ("gemma", 68, 15, 7.5, 9.6, "tied\nhead"),
    ("sampling", 78.5, 15, 8.5, 9.6, "sampling"),
    ("gemma2", 46.5, 25.9, 17, 2.6, "changes in Gemma 2"),
    ("generation", 27, 9.4, 24, 3, "generation: token by token"),
    ("detection", 90, 18.2, 10, 2.8, "boxes"),
    ("segmentation", 90, 15, 10, 2.8, "masks"),
    ("checkpoint", 12, 4.4, 16.8, 3.2, "checkpoint"),
    ("quantization", 29.8, 4.4, 16.8, 3.2, "quantization"),
    ("inference", 47.6, 4.4, 16.8, 3.2, "pipeline"),
    ("interpretability", 65.4, 4.4, 16.8, 3.2, "looking inside"),
    ("web_app", 83.2, 4.4, 16.8, 3.2, "web app"),
    ("scenes", 12, 0.4, 16.8, 3.2, "scenes"),
    ("contrastive", 29.8, 0.4, 16.8, 3.2, "contrastive loss"),
    ("training", 47.6, 0.4, 16.8, 3.2, "training"),
    ("lora", 65.4, 0.4, 16.8, 3.2, "LoRA"),
    ("distributed", 83.2, 0.4, 16.8, 3.2, "many machines"),
)


# %%
#| export
def model_map(*stems):
    """Draw the map of the course: PaliGemma from picture and prompt to answer.

    Args:
        stems: the lessons to light, such as "rope"; none lights them all.

    Returns:
        Figure, 9 inches wide.

    Raises:
        ValueError: a stem is not a lesson of this course.
    """
    for stem in stems:
        if stem not in STEMS:
            raise ValueError(f"there is no lesson {stem!r}: choose from {', '.join(STEMS)}")
    lit = set(STEMS) if not stems or "overview" in stems else set(stems)
    figure = plt.figure(figsize=(9, 5.6))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(-0.6, 101), ylim=(-0.6, 62.6), aspect="equal")
    ax.set_axis_off()
    for frame in FRAMES:
        _draw_frame(ax, *frame, frame[0] in lit)
    for corners in ARROWS:
        _draw_arrow(ax, corners)
    for box in BOXES:
        _draw_box(ax, *box, box[0] in lit)
    _draw_ends(ax, "plotting" in lit)
    _draw_sequence(ax, "model" in lit)
    plt.close(figure)
    return figure


# %%
#| export
from matplotlib.patches import Circle, FancyBboxPatch, Polygon, Rectangle
from matplotlib.transforms import Affine2D


def _mix(colour, amount):
    """Return a colour thinned with paper; amount 1 is the colour itself."""
    full, paper = (np.array(mpl.colors.to_rgb(name)) for name in (colour, COLOURS["paper"]))
    return tuple(amount * full + (1 - amount) * paper)


def _shape(ax, left, bottom, width, height, fill, edge, line=0.9, order=4):
    style = {"facecolor": fill, "edgecolor": edge, "linewidth": line, "zorder": order}
    corner = "round,pad=0,rounding_size=0.8"
    ax.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle=corner, **style))


def _number(stem):
    return f"{list(STEMS).index(stem):02d}"


def _draw_box(ax, stem, left, bottom, width, height, text, lit):
    colour = COLOURS[STEMS[stem]]
    fill, ink = (colour, "white") if lit else (_mix(colour, 0.09), _mix(colour, 0.72))
    inside = 4 < height < 6  # the small boxes within attention, which may have the same colour
    edge = _mix(colour, 0.35) if not lit else "white" if inside else colour
    _shape(ax, left, bottom, width, height, fill, edge)
    weight = "bold" if lit else "normal"
    if height < 4:
        x, y, top, size = left + width / 2 + 0.9, bottom + height / 2 - 0.1, None, 7.1
    else:
        lower, size = (0.75, 7.1) if inside else (0.5, 8.5)
        x, y, top = left + width / 2, bottom + height / 2 - lower, bottom + height - 0.5
    where = {"ha": "center", "va": "center", "color": ink, "zorder": 5}
    ax.text(x, y, text, fontsize=size, weight=weight, linespacing=1.25, **where)
    where |= {"ha": "left", "va": "top" if top else "center"}
    ax.text(left + 0.7, top or y, _number(stem), fontsize=6, **where)


# %%
#| export
def _draw_frame(ax, stem, left, bottom, width, height, title, lit):
    colour, inner = COLOURS[STEMS[stem]], height < 12
    fill = _mix(colour, (1 if inner else 0.14) if lit else 0.05)
    edge, line = _mix(colour, 1 if lit else 0.35), 1.6 if lit else 0.8
    _shape(ax, left, bottom, width, height, fill, edge, line=line, order=2)
    ink = "white" if inner and lit else _mix(colour, 1 if lit else 0.72)
    y, size = (bottom + height - 1.6, 7.2) if inner else (bottom + height - 1.9, 8)
    weight = "bold" if lit else "normal"
    ax.text(left + 1.1, y, _number(stem), va="center", color=ink, fontsize=6)
    ax.text(left + 3.4, y, title, va="center", color=ink, fontsize=size, weight=weight)


def _draw_arrow(ax, corners):
    points, grey = np.array(corners), _mix(COLOURS["ink"], 0.55)
    ax.plot(*points.T, color=grey, linewidth=1, zorder=3)
    ahead = points[-1] - points[-2]
    ahead = ahead / np.hypot(*ahead)
    side, base = ahead[::-1] * (0.55, -0.55), points[-1] - 1.1 * ahead
    head = [points[-1], base + side, base - side]
    ax.add_patch(Polygon(head, facecolor=grey, edgecolor="none", zorder=3))


def _draw_sequence(ax, lit):
    """Draw what the decoder reads: one sequence, image tokens first, then text tokens."""
    ink = _mix(COLOURS["together"], 1 if lit else 0.72)
    for index in range(9):
        colour = _mix(COLOURS["vision" if index < 6 else "language"], 1 if lit else 0.3)
        _shape(ax, 96, 57.2 - index * 2.75, 3, 2.2, colour, "none")
    weight = "bold" if lit else "normal"
    ax.text(100.4, 60.6, "one sequence", ha="right", fontsize=8, color=ink, weight=weight)
    ax.text(94.6, 45, "N image vectors", ha="right", va="center", fontsize=7.2, color=ink)
    ax.text(94.6, 39.2, "T text vectors", ha="right", va="bottom", fontsize=7.2, color=ink)


# %%
#| export
def _draw_ends(ax, lit):
    """Draw what goes in and what comes out, the sums, and the names of the two lowest rows."""
    words = _mix(COLOURS["vision"], 1 if lit else 0.72)
    _draw_cat(ax, 1, 46.4, 1.0 if lit else 0.35, words)
    ax.text(1.2, 58, "01", fontsize=6, color=words)
    ax.text(3.4, 58, "picture", fontsize=8, color=words, weight="bold" if lit else "normal")
    for left, bottom, height, text, name in (
        (1, 34.6, 8, "caption\nen", "prompt"),
        (90, 21.6, 3.6, "a cat", "answer"),
    ):
        _shape(ax, left, bottom, 10.3, height, "white", COLOURS["muted"])
        place = (left + 5.15, bottom + height / 2)
        ax.text(*place, text, ha="center", va="center", fontsize=8, style="italic", zorder=5)
        ax.text(left + 0.2, bottom + height + 0.6, name, fontsize=8)
    ax.text(0.4, 6, "use it", fontsize=8, va="center")
    ax.text(0.4, 2, "train it", fontsize=8, va="center")
    for x in (39.3, 61):
        ax.add_patch(Circle((x, 19.8), 1.2, fc="white", ec=COLOURS["ink"], lw=0.9, zorder=4))
        ax.text(x, 19.75, "+", ha="center", va="center", fontsize=8, zorder=5)


def _draw_cat(ax, left, bottom, strength, frame):
    place = Affine2D().scale(1.04).translate(left, bottom) + ax.transData
    for shape, colour in (
        (Rectangle((0, 0), 10, 10), "#bcdcec"),
        (Rectangle((0, 0), 10, 2.4), "#9cc08f"),
        (Polygon([(2.2, 8.8), (2.1, 5), (4.4, 6.6)]), "#d98a3d"),
        (Polygon([(7.8, 8.8), (7.9, 5), (5.6, 6.6)]), "#d98a3d"),
        (Circle((5, 4.6), 2.95), "#d98a3d"),
        (Circle((3.8, 5.1), 0.42), COLOURS["ink"]),
        (Circle((6.2, 5.1), 0.42), COLOURS["ink"]),
        (Polygon([(4.6, 4.2), (5.4, 4.2), (5, 3.7)]), "#7d3b2a"),
    ):
        shape.set(facecolor=_mix(colour, strength), zorder=4, transform=place)
        ax.add_artist(shape)
    frame = Rectangle((0, 0), 10, 10, fill=False, ec=frame, lw=2 * strength, zorder=4)
    ax.add_artist(frame).set_transform(place)


# %% [markdown]
# ## Against the reference
#
# Pillow and matplotlib have their own opinion of what the numbers mean, and millions of users.
# Pillow's `split` gives the three channels of a picture. They must be our three planes. And what
# matplotlib paints, one to one on an empty canvas, must be the pixels we gave it.

# %%
chw = torch.tensor(to_array(cat)).permute(2, 0, 1)  # (3, H, W)
theirs = np.stack([np.asarray(plane) for plane in cat.split()])
from_pillow = int(np.abs(chw.numpy().astype(int) - theirs).max())
canvas = plt.figure(figsize=(cat.width / 100, cat.height / 100), dpi=100)
canvas.figimage(chw.permute(1, 2, 0).float().numpy() / 255)
canvas.canvas.draw()
painted = np.asarray(canvas.canvas.buffer_rgba())[:, :, :3]
plt.close(canvas)
from_matplotlib = int(np.abs(painted.astype(int) - to_pixels(cat)).max())
print(f"largest difference from Pillow {from_pillow}, from matplotlib {from_matplotlib}")
assert from_pillow == from_matplotlib == 0

# %% [markdown]
# ## See it
#
# What PaliGemma gets is a square: the cat squeezed to 224 × 224, cut into 16 × 16 patches of 14 ×
# 14 pixels. Here they are pulled apart a little.

# %%
square = np.asarray(cat.resize((224, 224), Image.Resampling.BICUBIC))
apart = np.full((16 * 18, 16 * 18, 3), 253, dtype=np.uint8)
for row in range(16):
    for column in range(16):
        patch = square[row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
        apart[row * 18 : row * 18 + 14, column * 18 : column * 18 + 14] = patch
titles = ["224 × 224 pixels", "256 patches of 14 × 14"]
save_figure(show_images([square, apart], titles, height=2.8), "01_patches.png")

# %% [markdown]
# **What to notice.** The cat is narrower than it was: the model sees it so, and has learned with
# it. One patch holds a pupil, or a piece of nose, but never the cat. To find the cat, patches
# have to be compared. Let us compare them in the simplest way there is: by their pixels.

# %%
patches = torch.tensor(square).float().view(16, 14, 16, 14, 3)  # row, y, column, x, channel
patches = patches.transpose(1, 2).reshape(256, -1) / 255  # (N, 14 · 14 · 3)
distance = torch.cdist(patches, patches).square() / patches.shape[1]  # (N, N) mean squares
weights = torch.softmax(-distance / 0.01, dim=1)
chosen = {"an eye": 6 * 16 + 6, "the nose": 12 * 16 + 9, "background": 2 * 16 + 15}
titles = [f"like {name}" for name in chosen]
show_attention(square, weights[list(chosen.values())], titles)

# %% [markdown]
# **What to notice.** It works a little: the eye finds the other eye. But "like the nose" finds
# orange fur too, and "like background" half the cat. Equal colours are not equal things. The next
# four lessons build vectors that compare what patches *show*.
#
# ## At full size
#
# A picture has no parameters, but it has bytes. The published models take three sizes. The number
# of patches grows with the square of the side, and so does everything after it.

# %%
print("side  patches   uint8 kB   float32 kB   batch of 32, MB")
for side in (224, 448, 896):
    numbers = side * side * 3
    count = (side // 14) ** 2
    print(
        f"{side:4d}  {count:7d}  {numbers / 1e3:9.1f}  {4 * numbers / 1e3:11.1f}"
        f"  {32 * 4 * numbers / 1e6:16.1f}"
    )

# %% [markdown]
# Float32 costs four times what the file's bytes cost. So data loaders keep `uint8` as long as
# they can, and convert last. What does the conversion cost here? One multiplication and one
# subtraction for each number, and a walk through memory:

# %% tags=["nbval-ignore-output"]
batch = torch.tensor(square).expand(32, -1, -1, -1).contiguous()  # (B, H, W, 3) uint8
start = time.perf_counter()
ready = (batch.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()  # (B, 3, H, W)
seconds = time.perf_counter() - start
print(f"{2 * ready.numel() / 1e6:.1f} million operations in {seconds * 1000:.0f} ms")

# %% [markdown]
# ## A bug people really make
#
# Three people wrote the step from HWC to CHW. Two of them are wrong. All three run, and
# everything one usually prints is the same. Before you read on: which one would you trust?

# %%
loaders = {
    "A": lambda hwc: hwc.permute(2, 0, 1),
    "B": lambda hwc: hwc.reshape(hwc.shape[2], hwc.shape[0], hwc.shape[1]),
    "C": lambda hwc: hwc.flip(2).permute(2, 0, 1),
}
hwc = torch.tensor(to_array(cat))
for name, load in loaders.items():
    out = load(hwc)
    mean = out.double().mean().item()
    print(name, list(out.shape), out.dtype, f"min {out.min()} max {out.max()} mean {mean:.3f}")

# %% [markdown]
# The symptom, in practice: training works, only the model is worse than it should be. Nobody
# looks at its input, since the shapes are right. So look:

# %%
show_images([load(hwc).permute(1, 2, 0) for load in loaders.values()], list(loaders), height=1.6)

# %% [markdown]
# **B** used `reshape`: the numbers keep their order and are only cut elsewhere, so its "red
# plane" is the top third of the picture, with the channels in turn. **C** swapped red and blue
# (BGR, as some libraries load pictures), and its cat still looks like a cat.
#
# Looking does not scale; a check does. Give the loader one picture whose answer is known: pure
# red must light up plane 0 and nothing else.

# %%
red = torch.zeros(2, 4, 3, dtype=torch.uint8)
red[:, :, 0] = 255
for name, load in loaders.items():
    plane_sums = load(red).sum(dim=(1, 2)).tolist()
    print(name, plane_sums, "right" if plane_sums == [8 * 255, 0, 0] else "wrong")

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): eight bits
#
# Let `a` and `b` be `uint8` tensors that hold 200 and 100. Without running it: what are `a + b`,
# `(a + b) // 2`, and `b - a`? Write three numbers.

# %% tags=["exercise"]
answer = None  # your answer: (a + b, (a + b) // 2, b - a)


# %% tags=["check"]
def test_1(answer):
    assert answer is not None and len(answer) == 3, "write three numbers: answer = (…, …, …)"
    a, b = torch.tensor([200, 100], dtype=torch.uint8)
    assert answer[0] == (a + b).item(), "a + b: the sum has only eight bits to be kept in"
    assert answer[1] == ((a + b) // 2).item(), "(a + b) // 2: the sum is cut before it is halved"
    assert answer[2] == (b - a).item(), "b - a: uint8 has no negative numbers"


check(test_1, answer)

# %% [markdown]
# <details><summary>Hint</summary>
#
# 256 values go round in a circle, like the hours of a clock: after 255 comes 0, and before 0
# comes 255.
#
# </details>

# %% tags=["solution"]
answer = (44, 22, 156)  # 300 - 256; half of that, though the true mean is 150; -100 + 256
check(test_1, answer)

# %% [markdown]
# ### Exercise 2 (fill in): one patch
#
# Patches are numbered like words on a page: from left to right, then the next row. Return patch
# number `index` of a picture. The picture need not be square.


# %% tags=["exercise"]
def cut_patch(picture, index, size):
    """picture: uint8[H, W, 3], H and W multiples of size → uint8[size, size, 3]"""
    return None  # your code


# %% tags=["check"]
def test_2(cut):
    for high, wide, size in ((2, 3, 2), (3, 2, 4), (1, 5, 1)):
        shape = (high * size, wide * size, 3)
        picture = torch.arange(high * wide * size * size * 3).remainder(251).view(shape)
        for index in range(high * wide):
            got = cut(picture, index, size)
            assert got is not None, "cut_patch returns None"
            assert got.shape == (size, size, 3), (
                f"shape {list(got.shape)}, expected {[size, size, 3]}"
            )
            strip = picture.split(size, dim=0)[index // wide]
            right = strip.split(size, dim=1)[index % wide]
            assert torch.equal(got, right), (
                f"patch {index} of a {high} × {wide} grid is another one"
            )


check(test_2, cut_patch)

# %% [markdown]
# <details><summary>Hint</summary>
#
# How many patches are in one row? `divmod(index, that)` gives the patch's row and its column.
# Multiply both by the size.
#
# </details>


# %% tags=["solution"]
def cut_patch(picture, index, size):
    row, column = divmod(index, picture.shape[1] // size)
    top, left = row * size, column * size
    return picture[top : top + size, left : left + size]


check(test_2, cut_patch)

# %% [markdown]
# ### Exercise 3 (break): a test that sees nothing
#
# A colleague tests loaders with a picture of their own, and loader C passes. Build such a
# picture: at least eight different colours, and still no test could tell A from C with it. But it
# must unmask B.


# %% tags=["exercise"]
def blind_picture():
    """→ uint8[H, W, 3]"""
    return None  # your code


# %% tags=["check"]
def test_3(build):
    picture = build()
    assert picture is not None, "blind_picture returns None"
    assert picture.dtype == torch.uint8 and picture.ndim == 3, "return a uint8 tensor [H, W, 3]"
    assert picture.shape[2] == 3, "the last axis must hold the three channels"
    colours = len(picture.reshape(-1, 3).unique(dim=0))
    assert colours >= 8, f"only {colours} different colours, at least 8 are asked for"
    a, b, c = (load(picture) for load in loaders.values())
    assert torch.equal(a, c), "loader C gives another result than A: the test would catch it"
    assert not torch.equal(a, b), "loader B passes too"


check(test_3, blind_picture)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Which colours stay as they are when red and blue change places? There are many more than greys.
#
# </details>


# %% tags=["solution"]
def blind_picture():
    picture = torch.arange(4 * 4 * 3, dtype=torch.uint8).view(4, 4, 3)
    picture[:, :, 2] = picture[:, :, 0]  # as much blue as red: greys, greens, purples
    return picture


check(test_3, blind_picture)

# %% [markdown]
# ## Summary
#
# - A picture is a tensor: row, column, channel. `[y, x]`, not `[x, y]`.
# - Files hold `uint8` HWC; PyTorch wants float CHW; SigLIP wants it in $[-1, 1]$.
# - `permute` moves axes. `reshape` cuts the same row of numbers elsewhere, and destroys a picture
#   without an error.
# - Shape, range and mean say nothing about order. One picture with a known answer does.

# %% [markdown]
# ## Quiz
#
# **1.** A tensor of shape `[3, 4, 3]` is a picture. Is it HWC or CHW?
#
# <details><summary>Answer</summary>
#
# The shape alone cannot say: it may be 3 rows of 4 pixels, or 3 channels of 4 rows with 3
# columns. That is why functions should state the layout they take instead of guessing it.
#
# </details>

# %% [markdown]
# **2.** Why is `image / 255 * 2 - 1` right in NumPy for a `uint8` image, while `image * 2 / 255 -
# 1` is wrong?
#
# <details><summary>Answer</summary>
#
# Dividing makes floats, and from then on all is well. In the second form `image * 2` is still
# `uint8`: every value above 127 has already wrapped around.
#
# </details>

# %% [markdown]
# **3.** A picture grows from 224 to 448 pixels a side. How many patches are there now, and how
# many pairs of patches does attention compare?
#
# <details><summary>Answer</summary>
#
# Four times as many patches: 1024 instead of 256. Attention compares each with each, so sixteen
# times as many pairs: about a million instead of 65,536.
#
# </details>

# %% [markdown]
# ## References
#
# - Pillow handbook, *Concepts*: modes, sizes and the coordinate system.
# - matplotlib, `Axes.imshow`: what it takes for a picture, and in which range.
# - B. Wong, "Points of view: Color blindness", *Nature Methods* 8, 441 (2011): colours that
#   nearly everyone can tell apart.
# - L. Beyer et al., "PaliGemma: A versatile 3B VLM for transfer" (2024), section 3: the three
#   picture sizes.

# %% [markdown] tags=["navigation"]
# [← Overview](00_overview.ipynb) | [contents](00_overview.ipynb) | [Image processor →](02_image_processor.ipynb)
