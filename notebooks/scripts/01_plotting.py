# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags
#     comment_magics: false
#     notebook_metadata_filter: kernelspec
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
# # 01 · Pictures: what is a picture to a program?
#
# *30 minutes* · part I, Seeing
#
# **What you will be able to do**
#
# - say what every number of a picture means: its row, its column, its channel, its range;
# - turn a picture from the layout of files into the layout of networks and back, and prove it
#   right;
# - look at any tensor: as a picture, as a matrix of colours, as light on a picture.

# %% [markdown]
# The map below is drawn in every lesson. Follow the arrows: a picture and a prompt come in at the
# left, an answer leaves at the right. The coloured box is the part that the lesson builds; the
# small number in a box is its lesson. Today it is only the picture itself.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("plotting")

# %% [markdown]
# ## Setup
#
# NumPy and Pillow hold pictures on the way in, PyTorch holds them inside the model, matplotlib draws.
# Nothing here is random. Cells that begin with `#| export` become
# [plotting.py](../paligemma/plotting.py), as they stand.

# %%
#| export
"""Look at what a tensor holds: pictures, matrices, attention."""

import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from paligemma.support.course import DIVERGING, HEAT
from paligemma.support.drawing import COLOURS

# %% tags=["setup"]
import torch

from paligemma.support.course import check, sample_picture, save_figure

# %% [markdown]
# ## The problem
#
# A neural network multiplies and adds. So before a model can see a cat, the cat has to be numbers, in
# an order on which the code that loads the picture and the code that reads it agree.
#
# Nothing fails when they disagree: a wrong order is still a picture, only of something else. This
# lesson makes the agreement explicit, and gives us the means to look.

# %%
cat = sample_picture("cat")
eye = (155, 101, 185, 121)  # left, top, right, bottom, in pixels
close = cat.crop(eye)
print("the whole:", cat.width, "×", cat.height, " the eye:", close.width, "×", close.height)

# %% tags=["hide-input"]
figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
axes[0].imshow(cat)
axes[0].add_patch(plt.Rectangle(eye[:2], 30, 20, fill=False, edgecolor="white", linewidth=2))
axes[1].imshow(close, interpolation="nearest")
axes[0].set_title(f"{cat.width} × {cat.height} pixels")
axes[1].set_title("the white frame: 30 × 20 pixels, one colour each")
for axis in axes:
    axis.set_axis_off()

# %% [markdown]
# **What to notice.** From close up there is no cat and no eye, only small squares of one colour each:
# *pixels*. A colour is three numbers: how much red, green and blue light. These three are the
# **channels**.

# %% [markdown]
# ## By hand
#
# A **tensor** is a block of numbers with a length along each of its axes: a row of numbers has one
# axis, a table two, a picture three. Here is a picture small enough to type: 2 rows, 4 columns. Each
# pixel is (red, green, blue), from 0 (dark) to 255 (full).

# %%
rows = [
    [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)],  # red, green, blue, white
    [(0, 0, 0), (128, 128, 128), (255, 255, 0), (217, 138, 61)],  # black, grey, yellow, cat
]
tiny = torch.tensor(rows, dtype=torch.uint8)  # [2, 4, 3]: height, width, channel
print(list(tiny.shape), tiny.dtype)

# %% [markdown]
# The axes are height, width, channel: **HWC**. The row comes first, so the pixel at x = 2, y = 0 is
# `tiny[0, 2]`. Boxes are usually written x first: many a box in the wrong place starts here.

# %%
print("row 0, column 2:", tiny[0, 2].tolist(), "blue")
print("row 1, column 3:", tiny[1, 3].tolist(), "the cat's orange")
print("all reds:", tiny[:, :, 0].tolist())

# %% [markdown]
# ### One byte a number
#
# **uint8** is a whole number in eight bits: 0 to 255. It is what files hold. It does not calculate
# well: past 255 it starts again at 0, with no warning. Make the grey pixel 200 brighter:

# %%
grey = tiny[1, 1]
print("uint8:  ", (grey + 200).tolist())
print("float32:", (grey.float() + 200).tolist())

# %% [markdown]
# ### Three ranges
#
# So we convert to float before any arithmetic. Three ranges are in use, and a model understands only
# the one it was trained with. SigLIP, the eye of PaliGemma, wants $[-1, 1]$:
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
# PyTorch wants the channel first: **CHW**, three grey pictures one behind the other. The plainest way
# there visits each number once. Its place changes, its value does not.

# %%
height, width, channels = tiny.shape
planes = torch.zeros(channels, height, width, dtype=torch.uint8)
for row in range(height):
    for column in range(width):
        for channel in range(channels):
            planes[channel, row, column] = tiny[row, column, channel]
print("red:  ", planes[0].tolist())
print("green:", planes[1].tolist())
print("blue: ", planes[2].tolist())

# %% [markdown]
# ## Vectorised
#
# `permute(2, 0, 1)` says: the new axes are the old axes 2, 0 and 1. Not one number moves in memory.
# PyTorch only changes the *strides*, the steps it takes to reach the next channel, row and column.

# %%
fast = tiny.permute(2, 0, 1)  # [channel, height, width]
assert torch.equal(fast, planes)
print("strides HWC:", tiny.stride(), " strides CHW:", fast.stride())
print("same memory:", fast.data_ptr() == tiny.data_ptr())

# %% [markdown]
# ## The module
#
# A learner of vision models looks at tensors all day. Four small functions will do it for the whole
# course: a picture as pixels, pictures side by side, a matrix as colours, light on a picture.
#
# ### Any picture as pixels
#
# To be drawn, a picture must be `uint8` HWC. Floats in $[0, 1]$ are the other usual kind:


# %%
def to_pixels(image):
    values = np.asarray(image)
    return values if values.dtype == np.uint8 else (values * 255).astype(np.uint8)


# %% tags=["nbval-ignore-output"]
signed = tiny.float() / 255 * 2 - 1  # the tiny picture as SigLIP gets it
print("right:", to_pixels(tiny.float() / 255)[1, 3].tolist())
print("wrong:", to_pixels(signed)[1, 3].tolist(), "and no error")
assert np.array_equal(to_pixels(tiny.float() / 255), tiny) and signed[1, 3, 2] < 0

# %% [markdown]
# This was the cat's orange. Its blue was negative, and eight bits have no sign: what comes out is
# anything. An error here saves a day of searching later. So what would have to be guessed is
# refused: floats outside $[0, 1]$, and a channel-first tensor. First, one door for everything that
# holds numbers:


# %%
#| export
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


# %%
#| export
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


# %%
for wrong in (signed, fast):
    try:
        to_pixels(wrong)
    except ValueError as error:
        print("refused:", error)

# %% [markdown]
# ### Pictures side by side
#
# In its plainest form:


# %%
def show_images(images, titles):
    _, axes = plt.subplots(1, len(images))
    for axis, image, title in zip(axes, images, titles):
        axis.imshow(to_pixels(image))
        axis.set_title(title)
        axis.set_axis_off()


show_images([cat, close, tiny], ["the cat", "its eye", "tiny"])

# %% [markdown]
# That is all the idea. The form that the course uses (folded: unfold it if you are curious) also
# chooses rows that fill the page, and returns the figure, so that a cell can save it.


# %% tags=["hide-input"]
#| export
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


# %%
show_images([cat, close, tiny], ["the cat", "its eye", "tiny"])

# %% [markdown]
# ### Numbers as colours
#
# Most tensors are not pictures. `show_heatmap` draws any matrix: matplotlib's `imshow` with the
# numbers written in, and names for rows and columns (folded too). Pale is low and dark is high.


# %% tags=["hide-input"]
#| export
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


# %% tags=["hide-input"]
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9.5, 1.9), layout="constrained")
left.imshow(tiny)
left.set_title("all three channels")
left.set_axis_off()
show_heatmap(tiny[:, :, 0], "red, uint8", annotate=True, ax=middle)
show_heatmap(signed[:, :, 0], "red, -1 … 1", annotate=True, ax=right)

# %% [markdown]
# The tiny picture; its red channel as a file holds it; and the same numbers as SigLIP is given them.
# White and yellow are as red as red itself, and the cat's orange nearly so.
#
# Where signs matter, `centre=0` gives each its colour: blue is negative, orange positive, two colours
# that nearly everyone can tell apart (Wong, 2011). How much redder than blue is each pixel?

# %%
show_heatmap(signed[:, :, 0] - signed[:, :, 2], "red − blue", annotate=True, centre=0)

# %% [markdown]
# ### Light on a picture
#
# PaliGemma gets a square picture, 224 × 224, and reads it in 16 × 16 small squares of 14 × 14 pixels
# ([lesson 03](03_patch_embedding.ipynb) takes the second line apart).

# %%
square = np.array(cat.resize((224, 224), Image.Resampling.BICUBIC))  # [224, 224, 3]
small = square.reshape(16, 14, 16, 14, 3).swapaxes(1, 2)  # [16, 16, 14, 14, 3]
print(small[6, 6].shape, "the square in row 6, column 6")

# %% tags=["hide-input"]
apart = np.full((16 * 18, 16 * 18, 3), 253, dtype=np.uint8)
for row, column in np.ndindex(16, 16):
    apart[row * 18 : row * 18 + 14, column * 18 : column * 18 + 14] = small[row, column]
titles = ["224 × 224 pixels", "256 squares of 14 × 14"]
save_figure(show_images([square, apart], titles, height=2.8), "01_patches.png")

# %% [markdown]
# **What to notice.** The cat is narrower than it was: the model sees it so, and has learned with it.
# One square holds a pupil, or a piece of nose, but never the cat. To find the cat, squares have to be
# compared. Let us compare them in the simplest way there is, by their pixels: 1 where they are equal,
# towards 0 the more they differ.

# %%
pixels = torch.tensor(small.reshape(256, -1)) / 255  # a row for each square
difference = torch.cdist(pixels, pixels).square() / pixels.shape[1]  # [256, 256], mean square
likeness = (-difference / 0.01).exp().view(16, 16, 16, 16)  # row, column; row, column of the other
like_eye, like_nose, like_cloth = likeness[6, 6], likeness[12, 9], likeness[2, 15]

# %% [markdown]
# How does one *see* a table of 16 × 16 numbers that belong to places? Let the picture be lit by them:

# %%
light = like_cloth.repeat_interleave(14, dim=0).repeat_interleave(14, dim=1)  # [224, 224]
lit = torch.tensor(square) / 255 * light[:, :, None]
show_images([square, lit], ["the picture", "lit where it is like the cloth"])

# %% [markdown]
# `show_attention` does this for the whole course, with a soft yellow light and a grey picture behind.


# %% tags=["hide-input"]
#| export
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


# %%
maps = torch.stack([like_eye, like_nose, like_cloth]).view(3, 256)
show_attention(square, maps, ["like an eye", "like the nose", "like the cloth"])

# %%
assert like_eye.flatten().argsort()[-2] == 7 * 16 + 11  # next to itself: the other eye
assert (like_cloth[:, :12] > 0.3).sum() > 30  # many squares left of column 12: of the cat

# %% [markdown]
# **What to notice.** It works a little: the eye finds the other eye. But "like the cloth" in the
# background finds the cat's fur, too. Equal colours are not equal things. Lessons
# [03](03_patch_embedding.ipynb) to [05](05_siglip.ipynb) build vectors that compare what squares
# *show*.
#
# On the map a colour is a part of the course: **blue** sees, **orange** reads, **green** joins the two,
# **purple** answers, **brown** trains.

# %% [markdown]
# ## Against the reference
#
# Pillow and matplotlib have their own opinion of what the numbers mean, and millions of users. Pillow's
# `split` gives the three channels of a picture. They must be our three planes.

# %%
chw = torch.tensor(to_array(cat)).permute(2, 0, 1)  # [channel, height, width]
theirs = np.stack([np.asarray(plane) for plane in cat.split()])
difference = np.abs(chw.numpy().astype(int) - theirs).max()
print("largest difference from Pillow:", difference)
assert difference == 0

# %% [markdown]
# And what matplotlib paints, one to one on an empty canvas, must be the pixels we gave it.

# %%
canvas = plt.figure(figsize=(cat.width / 100, cat.height / 100), dpi=100)
canvas.figimage(chw.permute(1, 2, 0).float().numpy() / 255)
canvas.canvas.draw()
painted = np.asarray(canvas.canvas.buffer_rgba())[:, :, :3]
plt.close(canvas)
difference = np.abs(painted.astype(int) - to_pixels(cat)).max()
print("largest difference from matplotlib:", difference)
assert difference == 0

# %% [markdown]
# ## At full size
#
# A picture has no parameters, but it has bytes. The published models take three sizes. Twice the side
# means four times as many small squares, and four times the bytes.

# %%
print("side  squares   uint8 kB   float32 kB   batch of 32, MB")
for side in (224, 448, 896):
    kilobytes, squares = side * side * 3 / 1e3, (side // 14) ** 2
    print(f"{side}{squares:9}{kilobytes:11.1f}{4 * kilobytes:13.1f}{0.128 * kilobytes:18.1f}")

# %% [markdown]
# Float32 costs four times what `uint8` costs. So data loaders keep `uint8` as long as they can,
# and convert last.

# %% [markdown]
# ## A bug people really make
#
# Three people wrote the step from HWC to CHW. Two of them are wrong. All three run, and everything one
# usually prints is the same. Before you read on: which one would you trust?

# %%
loaders = {
    "A": lambda hwc: hwc.permute(2, 0, 1),
    "B": lambda hwc: hwc.reshape(hwc.shape[2], hwc.shape[0], hwc.shape[1]),
    "C": lambda hwc: hwc.flip(2).permute(2, 0, 1),
}
hwc = torch.tensor(to_array(cat))
printed = set()
for name, load in loaders.items():
    out = load(hwc)
    numbers = f"{out.min()} to {out.max()}, mean {out.double().mean():.3f}"
    print(name, list(out.shape), out.dtype, numbers)
    printed.add((out.shape, out.dtype, numbers))
assert len(printed) == 1

# %% [markdown]
# The symptom, in practice: training works, only the model is worse than it should be. Nobody looks at
# its input, since the shapes are right. So look:

# %%
show_images([load(hwc).permute(1, 2, 0) for load in loaders.values()], list(loaders))

# %% [markdown]
# **B** used `reshape`: the numbers keep their order and are only cut elsewhere, so its "red plane" is
# the top third of the picture, with the channels in turn. **C** swapped red and blue (BGR, as some
# libraries load pictures), and its cat still looks like a cat.
#
# Looking does not scale; a check does. Give the loader one picture whose answer is known: pure red
# must light up plane 0 and nothing else.

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
    assert isinstance(answer, tuple | list) and len(answer) == 3, "write three numbers: (…, …, …)"
    a, b = torch.tensor([200, 100], dtype=torch.uint8)
    assert answer[0] == (a + b).item(), "a + b: the sum has only eight bits to be kept in"
    assert answer[1] == ((a + b) // 2).item(), "(a + b) // 2: the sum is cut before it is halved"
    assert answer[2] == (b - a).item(), "b - a: uint8 has no negative numbers"


check(test_1, answer)

# %% [markdown]
# <details><summary>Hint</summary>
#
# 256 values go round in a circle, like the hours of a clock: after 255 comes 0, and before 0 comes
# 255.
#
# </details>

# %% tags=["solution"]
answer = (44, 22, 156)  # 300 - 256; half of that, though the true mean is 150; -100 + 256
check(test_1, answer)

# %% [markdown]
# ### Exercise 2 (write): see what the model sees
#
# You have what goes into SigLIP, `float[3, height, width]` in −1 … 1, and want to look at it. Write the
# way back to `uint8[height, width, 3]`, exactly. Resizing can leave numbers a little beyond ±1; they
# must not wrap around.


# %% tags=["exercise"]
def to_picture(signed):
    return None  # your code


# %% tags=["check"]
def test_2(to_picture):
    hwc = torch.arange(256 * 3).remainder(256).to(torch.uint8).view(16, 16, 3)[:, :12]
    got = to_picture(hwc.permute(2, 0, 1).float() / 255 * 2 - 1)
    assert isinstance(got, torch.Tensor), "return a tensor"
    assert got.dtype == torch.uint8, f"uint8 wanted, not {got.dtype}"
    assert got.shape == (16, 12, 3), (
        f"[height, width, 3] = [16, 12, 3] wanted, not {list(got.shape)}"
    )
    same = torch.equal(got.flatten().sort().values, hwc.flatten().sort().values)
    off = (got.int() - hwc.int()).abs().max().item()
    assert not same or off == 0, "these are the right numbers at the wrong places"
    assert off != 1, "some numbers are off by one: what becomes of 99.7 when it is made a uint8?"
    assert off == 0, "the range is wrong: where do -1, 0 and 1 end up?"
    beyond = to_picture(torch.tensor([-1.02, 1.02]).expand(3, 1, 2))
    assert beyond[0, :, 0].tolist() == [0, 255], "a little beyond -1 or 1 wraps around"


check(test_2, to_picture)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Undo each step in the reverse order: layout, range, type. `round` and `clamp` come before the type.
#
# </details>


# %% tags=["solution"]
def to_picture(signed):
    # Round, for making a uint8 cuts off; clamp, for a uint8 would start again at the other end.
    pixels = ((signed + 1) / 2 * 255).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(1, 2, 0)


check(test_2, to_picture)

# %% [markdown]
# ### Exercise 3 (break): a test that sees nothing
#
# A colleague tests loaders with a picture of their own, and loader C passes. Build such a picture: at
# least eight different colours, and still no test could tell A from C with it. But it must unmask B.


# %% tags=["exercise"]
def blind_picture():
    """→ uint8[height, width, 3]"""
    return None  # your code


# %% tags=["check"]
def test_3(build):
    picture = build()
    assert isinstance(picture, torch.Tensor), "return a tensor"
    assert picture.dtype == torch.uint8, f"uint8 wanted, not {picture.dtype}"
    assert picture.ndim == 3 and picture.shape[2] == 3, "the last of three axes holds the channels"
    colours = len(picture.reshape(-1, 3).unique(dim=0))
    assert colours >= 8, f"only {colours} different colours, at least 8 are asked for"
    a, b, c = (load(picture) for load in loaders.values())
    assert torch.equal(a, c), "loader C gives another result than A: a test would catch it"
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
# The shape alone cannot say: it may be 3 rows of 4 pixels, or 3 channels of 4 rows with 3 columns. That
# is why functions should state the layout they take instead of guessing it.
#
# </details>

# %% [markdown]
# **2.** Why is `image / 255 * 2 - 1` right in NumPy for a `uint8` image, while `image * 2 / 255 - 1` is
# wrong?
#
# <details><summary>Answer</summary>
#
# Dividing makes floats, and from then on all is well. In the second form `image * 2` is still `uint8`:
# every value above 127 has already wrapped around.
#
# </details>

# %% [markdown]
# **3.** A picture grows from 224 to 448 pixels a side. How many small squares are there now, and how
# many pairs of squares are there to compare?
#
# <details><summary>Answer</summary>
#
# Four times as many squares: 1024 instead of 256. Each is compared with each, so sixteen times as many
# pairs: about a million instead of 65,536.
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
