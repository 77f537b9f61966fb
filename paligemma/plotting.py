# Exported from notebooks/01_plotting.ipynb — edit there, then run `make sync`.
"""Pictures for the whole course: one calm style, and helpers that show what a tensor holds."""

import bisect
import math
import os
from importlib import resources
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Circle, FancyBboxPatch, Polygon, Rectangle
from matplotlib.transforms import Affine2D
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
CYCLE = [
    COLOURS[name] for name in ("vision", "language", "together", "accent", "learning", "inside")
]
HEAT = LinearSegmentedColormap.from_list(
    "heat", [COLOURS["paper"], "#a9cbe0", COLOURS["vision"], "#0d2f4f"]
)
DIVERGING = LinearSegmentedColormap.from_list(
    "diverging", ["#0f4c7d", "#6fa6cd", COLOURS["paper"], "#eba676", "#a3470b"]
)


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
