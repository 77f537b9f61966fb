"""The map of the course, drawn in every lesson with its part lit."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Polygon, Rectangle
from matplotlib.transforms import Affine2D

from paligemma.support.course import set_style
from paligemma.support.drawing import COLOURS

PARTS = {  # colour: the lessons of a part, with their numbers
    "ink": "00_overview",
    "vision": "01_plotting 02_image_processor 03_patch_embedding 04_siglip_attention 05_siglip",
    "language": "06_tokenizer 07_rms_norm 08_geglu 09_rope 10_grouped_query_attention "
    "11_kv_cache 12_gemma 13_gemma2",
    "together": "14_processor 15_model 16_checkpoint",
    "accent": "17_sampling 18_generation 19_detection 20_mask_codec 21_segmentation "
    "22_quantization 23_compilation 24_inference",
    "learning": "25_scenes 26_contrastive 27_training 28_evaluation 29_lora 30_distributed",
}
STEMS = {name[3:]: colour for colour, names in PARTS.items() for name in names.split()}
NUMBERS = {name[3:]: name[:2] for names in PARTS.values() for name in names.split()}
FRAMES = (  # stem, left, bottom, width, height, title
    ("processor", 13.5, 33.2, 16, 27.3, "Processor"),
    ("siglip", 48.4, 45.2, 33.4, 15.3, "SigLIP encoder block × 27"),
    ("gemma", 3.5, 13, 61.5, 16.2, "Gemma decoder block × 18"),
    ("grouped_query_attention", 14, 15, 23, 9.6, "grouped-query attention"),
)
ARROWS = (  # the corners of each line; the last one gets the head
    *(((a, 51.6), (b, 51.6)) for a, b in ((11.5, 15.3), (27.5, 33.8), (46, 50.6), (55.5, 56.6))),
    *(((a, 51.6), (b, 51.6)) for a, b in ((64.8, 65.3), (67.7, 68.6), (73.5, 74.4))),
    *(((a, 51.6), (b, 51.6)) for a, b in ((78.6, 78.7), (81, 83.8), (92.7, 95.6))),
    *(((a, 38.6), (b, 38.6)) for a, b in ((11.5, 15.3), (27.5, 33.8), (46, 95.6))),
    *(((a, 19.8), (b, 19.8)) for a, b in ((11.8, 13.8), (37, 38.1), (40.5, 42), (48.5, 50.3))),
    *(((a, 19.8), (b, 19.8)) for a, b in ((58.5, 59.8), (62.2, 67.8), (75.5, 78.3), (87, 89.8))),
    ((49.7, 51.6), (49.7, 56.8), (66.5, 56.8), (66.5, 52.8)),
    ((68.1, 51.6), (68.1, 56.8), (79.8, 56.8), (79.8, 52.8)),
    ((97.5, 34), (97.5, 31), (1, 31), (1, 19.8), (5.3, 19.8)),
    ((4.4, 19.8), (4.4, 25.4), (39.3, 25.4), (39.3, 21)),
    ((41.3, 19.8), (41.3, 25.4), (61, 25.4), (61, 21)),
    ((82.7, 15), (82.7, 10.9), (1, 10.9), (1, 19.6)),
)

BOXES = (  # stem, left, bottom, width, height, text; a low box has its number before the text
    ("image_processor", 15.5, 46.8, 12, 9.6, "image\nprocessor"),
    ("patch_embedding", 34, 46.8, 12, 9.6, "patches +\npositions"),
    ("siglip", 50.8, 47.5, 4.7, 8.2, "norm"),
    ("siglip_attention", 56.8, 47.5, 8, 8.2, "attention\nall ↔ all"),
    ("siglip", 68.8, 47.5, 4.7, 8.2, "norm"),
    ("siglip", 74.6, 47.5, 4, 8.2, "MLP"),
    ("model", 84, 46.8, 8.7, 9.6, "projector"),
    ("tokenizer", 15.5, 34.6, 12, 8, "tokenizer"),
    ("gemma", 34, 34.6, 12, 8, "embedding"),
    ("rms_norm", 5.5, 15, 6.3, 9.6, "RMS\nNorm"),
    ("rope", 15.2, 16, 6.4, 4.6, "RoPE"),
    ("kv_cache", 22.2, 16, 7.4, 4.6, "KV cache"),
    ("model", 30.2, 16, 5.6, 4.6, "mask"),
    ("rms_norm", 42.2, 15, 6.3, 9.6, "RMS\nNorm"),
    ("geglu", 50.5, 15, 8, 9.6, "GeGLU"),
    ("gemma", 68, 15, 7.5, 9.6, "tied\nhead"),
    ("sampling", 78.5, 15, 8.5, 9.6, "sampling"),
    ("gemma2", 44.6, 25.9, 19, 2.6, "changes in Gemma 2"),
    ("generation", 27, 9.4, 24, 3, "generation: token by token"),
    ("detection", 90, 18.2, 10, 2.8, "boxes"),
    ("mask_codec", 90, 15, 10, 2.8, "codec"),
    ("segmentation", 90, 11.8, 10, 2.8, "masks"),
    ("checkpoint", 12, 4.4, 16.8, 3.2, "checkpoint"),
    ("quantization", 29.8, 4.4, 16.8, 3.2, "quantization"),
    ("compilation", 47.6, 4.4, 16.8, 3.2, "compilation"),
    ("inference", 65.4, 4.4, 16.8, 3.2, "pipeline"),
    ("scenes", 12, 0.4, 11.5, 3.2, "scenes"),
    ("contrastive", 24.2, 0.4, 17.8, 3.2, "contrastive loss"),
    ("training", 42.7, 0.4, 12.5, 3.2, "training"),
    ("evaluation", 55.9, 0.4, 14, 3.2, "evaluation"),
    ("lora", 70.6, 0.4, 10.2, 3.2, "LoRA"),
    ("distributed", 81.5, 0.4, 18.5, 3.2, "many machines"),
)


def model_map(*stems: str) -> Figure:
    """Draw the map of the course: PaliGemma from picture and prompt to answer.

    Args:
        stems: the lessons to light, such as "rope"; none lights them all.

    Returns:
        Figure, 10 inches wide.

    Raises:
        ValueError: a stem is not a lesson of this course.
    """
    for stem in stems:
        if stem not in STEMS:
            raise ValueError(f"there is no lesson {stem!r}: choose from {', '.join(STEMS)}")
    set_style()
    lit = set(STEMS) if not stems or "overview" in stems else set(stems)
    figure = plt.figure(figsize=(10, 6.22))
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
    full, paper = (np.array(to_rgb(name)) for name in (colour, COLOURS["paper"]))
    return tuple(amount * full + (1 - amount) * paper)


def _shape(ax, left, bottom, width, height, fill, edge, line=0.9, order=4):
    style = {"facecolor": fill, "edgecolor": edge, "linewidth": line, "zorder": order}
    corner = "round,pad=0,rounding_size=0.8"
    ax.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle=corner, **style))


def _draw_box(ax, stem, left, bottom, width, height, text, lit):
    colour = COLOURS[STEMS[stem]]
    fill, ink = (colour, "white") if lit else (_mix(colour, 0.09), _mix(colour, 0.72))
    inside = 4 < height < 6  # the small boxes within attention, which may have the same colour
    edge = _mix(colour, 0.35) if not lit else "white" if inside else colour
    _shape(ax, left, bottom, width, height, fill, edge)
    weight = "bold" if lit else "normal"
    if height < 4:
        x, y, top, size = left + width / 2 + 0.9, bottom + height / 2 - 0.1, None, 9
    else:
        lower, size = (0.75, 9) if inside else (0.5, 9.5)
        x, y, top = left + width / 2, bottom + height / 2 - lower, bottom + height - 0.5
    where = {"ha": "center", "va": "center", "color": ink, "zorder": 5}
    ax.text(x, y, text, fontsize=size, weight=weight, linespacing=1.25, **where)
    where |= {"ha": "left", "va": "top" if top else "center"}
    ax.text(left + 0.7, top or y, NUMBERS[stem], fontsize=9, **where)


def _draw_frame(ax, stem, left, bottom, width, height, title, lit):
    colour, inner = COLOURS[STEMS[stem]], height < 12
    fill = _mix(colour, (1 if inner else 0.14) if lit else 0.05)
    edge, line = _mix(colour, 1 if lit else 0.35), 1.6 if lit else 0.8
    _shape(ax, left, bottom, width, height, fill, edge, line=line, order=2)
    ink = "white" if inner and lit else _mix(colour, 1 if lit else 0.72)
    y, size = (bottom + height - 1.6, 9) if inner else (bottom + height - 1.9, 9)
    weight = "bold" if lit else "normal"
    ax.text(left + 1.1, y, NUMBERS[stem], va="center", color=ink, fontsize=9)
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
    ax.text(100.4, 60.6, "one sequence", ha="right", fontsize=9, color=ink, weight=weight)
    ax.text(94.6, 45, "N image vectors", ha="right", va="center", fontsize=9, color=ink)
    ax.text(94.6, 39.2, "text vectors", ha="right", va="bottom", fontsize=9, color=ink)


def _draw_ends(ax, lit):
    """Draw what goes in and what comes out, the sums, and the names of the two lowest rows."""
    words = _mix(COLOURS["vision"], 1 if lit else 0.72)
    _draw_cat(ax, 1, 46.4, 1.0 if lit else 0.35, words)
    ax.text(1.2, 58, "01", fontsize=9, color=words)
    ax.text(3.4, 58, "picture", fontsize=9, color=words, weight="bold" if lit else "normal")
    for left, bottom, height, text, name in (
        (1, 34.6, 8, "caption\nen", "prompt"),
        (90, 21.6, 3.6, "a cat", "answer"),
    ):
        _shape(ax, left, bottom, 10.3, height, "white", COLOURS["muted"])
        place = (left + 5.15, bottom + height / 2)
        ax.text(*place, text, ha="center", va="center", fontsize=9, style="italic", zorder=5)
        ax.text(left + 0.2, bottom + height + 0.6, name, fontsize=9)
    ax.text(0.4, 6, "use it", fontsize=9, va="center")
    ax.text(0.4, 2, "train it", fontsize=9, va="center")
    for x, y in ((39.3, 19.8), (61, 19.8), (66.5, 51.6), (79.8, 51.6)):
        ax.add_patch(Circle((x, y), 1.2, fc="white", ec=COLOURS["ink"], lw=0.9, zorder=4))
        ax.text(x, y - 0.05, "+", ha="center", va="center", fontsize=9, zorder=5)


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
