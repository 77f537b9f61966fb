"""Lesson plotting: what the drawing functions accept, what they refuse, and what they show."""

import io
import math
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib import cm
from matplotlib.colors import to_rgb
from PIL import Image

from paligemma.plotting import show_attention, show_heatmap, show_images, to_array, to_pixels
from paligemma.support.drawing import COLOURS

NOISE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def plain(width, height, value=40):
    return Image.new("RGB", (width, height), (value, value, value))


# ---------------------------------------------------------------- pictures as numbers


@pytest.mark.parametrize(
    "image",
    [
        NOISE,
        NOISE.tolist(),
        Image.fromarray(NOISE),
        torch.tensor(NOISE),
        torch.tensor(NOISE).long(),
        torch.tensor(NOISE) / 255,
        (torch.tensor(NOISE) / 255).requires_grad_(),
        (NOISE / 255).astype(np.float64),
        np.asfortranarray(NOISE),
    ],
)
def test_every_usual_picture_gives_the_same_pixels(image):
    pixels = to_pixels(image)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, NOISE)


def test_grey_and_bool_pictures():
    grey = NOISE[:, :, 0]
    assert np.array_equal(to_pixels(grey), np.stack([grey] * 3, axis=-1))
    assert set(np.unique(to_pixels(grey > 100))) == {0, 255}


def test_bfloat16_reaches_numpy():
    values = torch.tensor([0.5, -2.0], dtype=torch.bfloat16)
    assert to_array(values).dtype == np.float32
    assert to_array(values).tolist() == [0.5, -2.0]
    assert to_array(torch.tensor([True, False])).dtype == bool


def test_float_pixels_as_matplotlib_has_them():
    values = np.random.default_rng(1).random((20, 30, 3))
    theirs = cm.ScalarMappable().to_rgba(values, bytes=True)[:, :, :3]
    assert np.abs(to_pixels(values).astype(int) - theirs).max() <= 1
    assert to_pixels(np.array([[[-5e-4, 0.5, 1 + 5e-4]]])).tolist() == [[[0, 128, 255]]]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 8, 8), "permute"),
        (np.zeros((2, 8, 8, 3)), "batch"),
        (np.zeros((8, 8, 4), np.uint8), r"\[8, 8, 4\]"),
        (np.zeros((0, 8, 3), np.uint8), "shape"),
        (np.zeros(5), "shape"),
        (np.full((4, 4, 3), -0.5), r"\(x \+ 1\) / 2"),
        (np.full((4, 4, 3), 128.0), "x / 255"),
        (np.full((4, 4, 3), np.nan), "nan"),
        (np.full((4, 4, 3), 300), "300"),
        (np.full((4, 4, 3), -1), "-1"),
    ],
)
def test_pictures_that_would_be_a_guess_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        to_pixels(image)


# ---------------------------------------------------------------- figures


def test_figures_are_closed_so_that_jupyter_shows_them_once():
    plt.close("all")
    show_images(NOISE)
    show_heatmap(np.eye(3))
    show_attention(NOISE, np.ones(4))
    _, ax = plt.subplots()
    show_heatmap(np.eye(3), ax=ax)
    assert plt.get_fignums() == []


@pytest.mark.parametrize("count", [1, 4, 9, 13])
@pytest.mark.parametrize("shape", [(40, 40), (20, 200), (200, 20)])
def test_any_number_of_pictures_fits_a_page(count, shape):
    figure = show_images([np.zeros(shape, np.uint8)] * count)
    assert figure.get_figwidth() <= 9.51
    assert sum(bool(ax.images) for ax in figure.axes) == count
    if shape == (40, 40):
        columns = figure.axes[0].get_gridspec().ncols
        assert figure.get_figwidth() / columns > 1.5, "smaller than need be"


def test_titles_and_columns():
    figure = show_images([NOISE] * 3, ["a", "b\nc", "d"], columns=2)
    assert [ax.get_title() for ax in figure.axes] == ["a", "b\nc", "d", ""]
    assert figure.axes[0].get_gridspec().ncols == 2
    assert show_images(NOISE, "one").axes[0].get_title() == "one"
    assert sum(bool(ax.images) for ax in show_images(torch.zeros(2, 5, 5, 3)).axes) == 2
    with pytest.raises(ValueError, match="at least one"):
        show_images([])


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_heat_map_writes_its_numbers():
    assert texts(show_heatmap([[1, -2]], annotate=True)) == ["1", "-2"]
    assert texts(show_heatmap([[1.0, 0.256]], annotate=True)) == ["1.00", "0.26"]
    assert texts(show_heatmap([[1.0, 0.256]], annotate=".1f")) == ["1.0", "0.3"]
    assert texts(show_heatmap([[1, 2]], annotate=".1f")) == ["1.0", "2.0"]
    assert texts(show_heatmap([[True, False]], annotate=True)) == ["1", "0"]
    assert texts(show_heatmap([[0.0, -math.inf, math.nan]], annotate=True))[1:] == ["-inf", "nan"]


def test_heat_map_centre_is_pale_and_both_sides_reach_as_far():
    image = show_heatmap([[-1.0, 3.0]], centre=0).axes[0].images[0]
    assert image.get_clim() == (-3, 3)
    middle = image.cmap(image.norm(0.0))[:3]
    assert np.allclose(middle, to_rgb(COLOURS["paper"]), atol=0.02)


@pytest.mark.parametrize(
    "matrix",
    [np.zeros((2, 2)), [[math.inf, 1.0]], [[math.nan]], np.ones(7, bool), np.zeros((300, 400))],
)
def test_heat_maps_that_have_no_range(matrix):
    figure = show_heatmap(matrix)
    low, high = figure.axes[0].images[0].get_clim()
    assert low < high
    figure.savefig(io.BytesIO())


def test_heat_map_names_and_axes():
    _, (left, right) = plt.subplots(1, 2)
    figure = show_heatmap(np.eye(2), "t", rows=np.array(["a", "b"]), columns=[1, 2], ax=right)
    assert figure is right.figure
    assert not left.images
    assert [label.get_text() for label in right.get_yticklabels()] == ["a", "b"]
    assert [label.get_text() for label in right.get_xticklabels()] == ["1", "2"]
    for bad in (np.zeros((2, 2, 2)), np.zeros((0, 2))):
        with pytest.raises(ValueError, match="matrix"):
            show_heatmap(bad)


def shown(figure, index=0):
    return np.asarray(figure.axes[index].images[0].get_array()).astype(int)


def test_attention_lights_the_right_patch():
    weights = torch.zeros(2, 16)
    weights[0, 6] = 0.3  # row 1, column 2 of 4 × 4
    weights[1] = 1 / 16
    figure = show_attention(plain(80, 40), weights, ["one", "all"])
    one = shown(figure).sum(axis=2)
    lit = one == one.max()
    assert lit[10:20, 40:60].all() and lit.sum() == 10 * 20
    assert (shown(figure, 1).sum(axis=2) == one.max()).all()
    assert (shown(show_attention(plain(50, 50), np.zeros(9))) >= 0).all()


@pytest.mark.parametrize("shape", [(8,), (2, 3, 4), (3, 17), (1, 0)])
def test_attention_needs_a_square_of_patches(shape):
    with pytest.raises(ValueError, match="square number"):
        show_attention(NOISE, np.ones(shape))


def test_importing_needs_no_torch():
    code = "import sys, paligemma.plotting; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
