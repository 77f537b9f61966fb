"""What the course's notebooks need and no lesson is about: style, pictures, exercises, figures."""

import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.colors import LinearSegmentedColormap
from PIL import Image

from paligemma.support.drawing import COLOURS, CYCLE

HEAT = LinearSegmentedColormap.from_list(
    "heat", [COLOURS["paper"], "#a9cbe0", COLOURS["vision"], "#0d2f4f"]
)
DIVERGING = LinearSegmentedColormap.from_list(
    "diverging", ["#0f4c7d", "#6fa6cd", COLOURS["paper"], "#eba676", "#a3470b"]
)
STYLE: dict[Any, Any] = {
    "figure.facecolor": COLOURS["paper"],
    "axes.facecolor": COLOURS["paper"],
    "savefig.facecolor": COLOURS["paper"],
    "figure.dpi": 110,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlepad": 8,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.edgecolor": COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=CYCLE),
    "grid.color": "#e6e1d8",
    "xtick.color": COLOURS["ink"],
    "ytick.color": COLOURS["ink"],
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "image.cmap": "gray",
    "svg.fonttype": "none",
    "svg.hashsalt": "paligemma",  # the same figure makes the same SVG file each time
}


def set_style() -> None:
    """Give every figure of this notebook the course's look."""
    mpl.rcParams.update(STYLE)


def add_to_class(cls: type) -> Callable:
    """Add a function to a class, as a method, in a later cell: `@add_to_class(PaliGemma)`.

    The exporter (tools/export.py) writes such a method into the body of the class.
    """

    def add(method):
        plain = getattr(method, "fget", None) or getattr(method, "__func__", None) or method
        setattr(cls, plain.__name__, method)
        return method

    return add


def sample_picture(name: str = "cat") -> Image.Image:
    """Open one of the pictures that ship with the course, in RGB: "cat", "coffee", "scene" …

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


def check(test: Callable, *answers) -> None:
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


def save_figure(figure, name: str):
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
