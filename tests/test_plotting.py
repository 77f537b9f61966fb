"""Drawing helpers: what they accept, what they refuse, and that nothing is cut off or overlaps."""

import io
import itertools
import math
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import cm
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from PIL import Image

from paligemma import plotting
from paligemma.plotting import (
    BOXES,
    COLOURS,
    CYCLE,
    FRAMES,
    STEMS,
    check,
    draw_boxes,
    draw_caption,
    draw_masks,
    model_map,
    sample_picture,
    save_figure,
    show_attention,
    show_heatmap,
    show_images,
    to_array,
    to_pixels,
)

NOISE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
SIZES = [(32, 32), (33, 200), (450, 300), (4000, 600)]  # width, height


def plain(width, height, value=40):
    return Image.new("RGB", (width, height), (value, value, value))


def byte_colour(name):
    return tuple(round(255 * part) for part in to_rgb(name))


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


@pytest.mark.parametrize("name", ["cat", "coffee", "astronaut", "scene"])
def test_sample_pictures(name):
    picture = sample_picture(name)
    assert picture.mode == "RGB"
    assert min(picture.size) >= 224


def test_unknown_sample_picture():
    with pytest.raises(ValueError, match=r"no sample picture 'dog': choose from .*cat"):
        sample_picture("dog")


# ---------------------------------------------------------------- figures


def test_figures_are_closed_so_that_jupyter_shows_them_once():
    plt.close("all")
    show_images(NOISE)
    show_heatmap(np.eye(3))
    show_attention(NOISE, np.ones(4))
    model_map("rope")
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


# ---------------------------------------------------------------- drawing on pictures


@pytest.mark.parametrize("size", SIZES)
def test_drawings_keep_size_and_input(size):
    picture = plain(*size)
    before = picture.tobytes()
    width, height = size
    box = (width * 0.3, height * 0.4, width * 0.8, height * 0.9)
    mask = np.zeros((height, width), bool)
    mask[height // 3 : height // 2, width // 3 : width // 2] = True
    boxed, masked = draw_boxes(picture, [box], ["a cat"]), draw_masks(picture, [mask], ["a cat"])
    assert boxed.size == masked.size == size
    assert picture.tobytes() == before
    assert boxed.tobytes() != before and masked.tobytes() != before


def test_lines_grow_with_the_picture():
    def line(side):
        box = (side * 0.25, side * 0.25, side * 0.75, side * 0.75)
        row = np.asarray(draw_boxes(plain(side, side), [box]))[side // 2]
        return int((row == byte_colour(CYCLE[0])).all(axis=1).sum()) // 2

    assert line(32) >= 2
    assert line(3000) == 10 * line(300)


def test_box_lies_where_it_should():
    drawn = np.asarray(draw_boxes(plain(100, 60), [(20, 10, 50, 40)]))
    rows, columns = np.nonzero((drawn != 40).any(axis=2))
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (20, 10, 50, 40)
    assert (drawn[25, 35] == 40).all(), "the inside stays as it was"


@pytest.mark.parametrize(
    "box", [(-50, -50, 500, 500), (90, 50, 10, 5), (30, 30, 30, 30), (200, 200, 300, 300)]
)
def test_boxes_outside_or_inside_out_are_drawn_within(box):
    assert draw_boxes(plain(100, 60), [box], ["label"]).size == (100, 60)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "label", ["cat", "a very long label that no small picture can hold", "å\nß"]
)
def test_labels_never_leave_the_picture(size, label):
    """A tag pushed against any edge is as large as one in the middle: nothing is cut off."""
    width, height = size

    def area(x, y):
        picture = plain(*size)
        plotting._write_label(picture, label, x, y, "#ff0000")
        changed = (np.asarray(picture) != 40).any(axis=2)
        rows, columns = changed.any(axis=1).nonzero()[0], changed.any(axis=0).nonzero()[0]
        return rows[-1] - rows[0], columns[-1] - columns[0], int(changed.sum())

    middle = area(width // 2, height // 2)
    for x, y in itertools.product((-99, width + 99), (-99, height + 99)):
        assert area(x, y) == middle
    assert middle[0] < height and middle[1] < width


def test_labels_never_hide_each_other():
    """Tags of different colours on one spot: each shows its whole rectangle, or is not there."""
    for size, count in (((200, 120), 6), ((60, 40), 40)):
        picture, taken = plain(*size), []
        colours = [f"#{40 + 5 * i:02x}ff{250 - 5 * i:02x}" for i in range(count)]
        areas = []
        for number, colour in enumerate(colours):
            before = len(taken)
            plotting._write_label(picture, str(number), 30, 20, colour, taken)
            areas += [colour] * (len(taken) - before)
        pixels = np.asarray(picture)
        for colour, (x0, y0, x1, y1) in zip(areas, taken):
            edge = np.concatenate([pixels[y0, x0:x1], pixels[y0:y1, x0], pixels[y1 - 1, x0:x1]])
            assert 0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]
            assert (edge == byte_colour(colour)).all(axis=1).mean() > 0.5
        for a, b in itertools.combinations(taken, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert taken[0][:1] == (30,) and (count == 40 or len(taken) == count)


def test_equal_labels_share_a_colour():
    boxes = [(10, 10, 30, 30), (40, 10, 60, 30), (70, 10, 90, 30)]
    drawn = np.asarray(draw_boxes(plain(100, 60), boxes, ["cat", "dog", "cat"]))
    first, second, third = (tuple(drawn[25, x]) for x in (11, 41, 71))
    assert first == third == byte_colour(CYCLE[0])
    assert second == byte_colour(CYCLE[1])


@pytest.mark.parametrize("draw", [draw_boxes, draw_masks])
def test_nothing_to_draw_and_wrong_counts(draw):
    assert np.array_equal(np.asarray(draw(NOISE, [], [])), NOISE)
    thing = (1, 2, 3, 4) if draw is draw_boxes else np.zeros((60, 80), bool)
    with pytest.raises(ValueError, match="got 2 labels for 1 objects"):
        draw(NOISE, [thing], ["a", "b"])


def test_mask_tints_the_inside_and_outlines_the_edge():
    mask = torch.zeros(60, 80, dtype=torch.bool)
    mask[20:40, 30:60] = True
    drawn = np.asarray(draw_masks(plain(80, 60), [mask]))
    colour = byte_colour(CYCLE[0])
    assert tuple(drawn[20, 45]) == tuple(drawn[39, 30]) == colour
    inside = drawn[30, 45].astype(int)
    assert (inside != 40).any() and tuple(inside) != colour
    assert (drawn[~mask.numpy()] == 40).all(), "nothing outside the mask changes"


def test_mask_of_another_size():
    with pytest.raises(ValueError, match=r"shape \[80, 60\], expected \[60, 80\]"):
        draw_masks(NOISE, [np.zeros((80, 60), bool)])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("text", ["", "a cat", "many words " * 30, "Donaudampfschifffahrt" * 9])
def test_caption_is_wholly_on_the_strip(size, text):
    drawn = draw_caption(plain(*size), text)
    assert drawn.width == size[0] and drawn.height > size[1]
    strip = np.asarray(drawn)[size[1] :]
    paper = byte_colour(COLOURS["paper"])
    edges = np.concatenate([strip[0], strip[-1], strip[:, 0], strip[:, -1]])
    assert (edges == paper).all(), "letters touch the edge of the strip"
    assert (strip != paper).any() == bool(text.strip())
    assert np.array_equal(np.asarray(drawn)[: size[1]], np.asarray(plain(*size)))


@settings(deadline=None, max_examples=40)
@given(
    st.text(st.characters(codec="latin-1", categories=["L", "N", "P", "Zs"])), st.integers(1, 300)
)
def test_wrapping_keeps_every_letter_and_the_width(text, width):
    font = plotting._font(12)
    lines = plotting._wrap(text, font, width)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(len(line) <= 1 or font.getlength(line) <= width + 0.5 for line in lines)


# ---------------------------------------------------------------- check and save_figure


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (AssertionError("the sum is 3\nmore"), "✗ not yet: the sum is 3\n"),
        (AssertionError(), "✗ not yet: AssertionError"),
        (KeyError("x"), "✗ not yet: KeyError: 'x'\n"),
        (SystemExit(2), "✗ not yet: SystemExit: 2\n"),
        (RecursionError("deep"), "✗ not yet: RecursionError: deep\n"),
    ],
)
def test_check_tells_the_reason_and_goes_on(capsys, error, said):
    def test(answer):
        raise error

    assert check(test, None) is None
    out, err = capsys.readouterr()
    assert out.startswith(said) and not err


def test_check_when_right_and_when_interrupted(capsys):
    check(lambda a, b: None, 1, 2)
    assert capsys.readouterr().out == "✓ correct\n"

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(interrupted)


def test_figures_are_saved_where_asked_and_the_same_each_time(tmp_path, monkeypatch):
    monkeypatch.setenv("PALIGEMMA_FIGURES", str(tmp_path / "figures"))
    for name in ("one", "two"):
        figure = model_map("rope")
        assert save_figure(figure, name) is figure
        picture = Image.fromarray(NOISE)
        assert save_figure(picture, name) is picture
        save_figure(show_images(NOISE), f"{name}-figure.png")
    folder = tmp_path / "figures"
    for kind in (".svg", ".png", "-figure.png"):
        assert (folder / f"one{kind}").read_bytes() == (folder / f"two{kind}").read_bytes()
    svg = (folder / "one.svg").read_text()
    assert "RoPE</text>" in svg and "dc:date" not in svg
    assert np.array_equal(np.asarray(Image.open(folder / "one.png")), NOISE)


def test_nothing_is_saved_unasked(tmp_path, monkeypatch):
    monkeypatch.delenv("PALIGEMMA_FIGURES", raising=False)
    monkeypatch.chdir(tmp_path)
    figure, _ = plt.subplots()
    assert save_figure(figure, "name") is figure
    assert list(tmp_path.iterdir()) == []
    assert plt.get_fignums() == []


# ---------------------------------------------------------------- the map


def test_map_knows_every_lesson_by_its_number():
    folder = Path(__file__).resolve().parents[1] / "notebooks"
    for path in folder.glob("[0-9][0-9]_*.ipynb"):
        number, stem = path.stem.split("_", 1)
        assert list(STEMS)[int(number)] == stem
    assert len(STEMS) == 30
    drawn = {entry[0] for entry in (*BOXES, *FRAMES)} | {"plotting", "overview"}
    assert drawn == set(STEMS)


def test_unknown_lesson():
    with pytest.raises(ValueError, match="no lesson 'ropes': choose from overview, plotting"):
        model_map("rope", "ropes")


def fills(figure):
    return [patch.get_facecolor() for patch in figure.axes[0].patches]


def test_each_stem_lights_something():
    solid = {stem: to_rgb(COLOURS[part]) for stem, part in STEMS.items()}
    dark = fills(model_map("plotting"))
    for stem in list(STEMS)[2:]:
        changed = [a[:3] for a, b in zip(fills(model_map(stem)), dark, strict=True) if a != b]
        assert changed, stem
        assert stem in ("processor",) or solid[stem] in changed, stem
    assert fills(model_map()) == fills(model_map("overview")) == fills(model_map(*STEMS))


@pytest.mark.parametrize("stems", [(), ("web_app",)])
def test_no_text_of_the_map_overlaps_or_is_cut(stems):
    figure = model_map(*stems)
    canvas = FigureCanvasAgg(figure).get_renderer()
    found = [
        (text.get_text(), text.get_window_extent(canvas))
        for ax in figure.axes
        for text in ax.texts
        if text.get_text() != "+"
    ]
    page = figure.bbox
    for name, box in found:
        assert box.x0 >= page.x0 and box.x1 <= page.x1, f"{name} is cut"
        assert box.y0 >= page.y0 and box.y1 <= page.y1, f"{name} is cut"
    for (one, a), (two, b) in itertools.combinations(found, 2):
        assert not a.overlaps(b), f"{one} overlaps {two}"
    to_pixel = figure.axes[0].transData.transform
    for _, left, bottom, width, height, text in BOXES:
        corner = to_pixel([(left, bottom), (left + width, bottom + height)])
        inside = [box for name, box in found if name == text]
        assert any(
            box.x0 > corner[0, 0] and box.x1 < corner[1, 0] and box.y1 < corner[1, 1]
            for box in inside
            if box.y0 > corner[0, 1]
        ), f"{text!r} leaves its box"


def test_importing_needs_no_torch():
    code = "import sys, paligemma.plotting; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
