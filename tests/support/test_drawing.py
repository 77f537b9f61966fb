"""Labels, boxes, masks and captions: nothing is cut off, hidden, or drawn elsewhere."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from paligemma.support.drawing import COLOURS, CYCLE, draw_boxes, draw_caption, draw_masks

NOISE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
SIZES = [(32, 32), (33, 200), (450, 300), (4000, 600)]  # width, height


def plain(width, height, value=40):
    return Image.new("RGB", (width, height), (value, value, value))


def byte_colour(name):
    return tuple(round(255 * part) for part in to_rgb(name))


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


def tag_of(picture, box, label):
    """Pixels that a label changes on a picture with a box: (rows, columns, how many)."""
    with_label = np.asarray(draw_boxes(picture, [box], [label])).astype(int)
    changed = (with_label != np.asarray(draw_boxes(picture, [box]))).any(axis=2)
    rows, columns = changed.any(axis=1).nonzero()[0], changed.any(axis=0).nonzero()[0]
    return rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1


@pytest.mark.parametrize("size", [(60, 60), (33, 200), (450, 300)])
@pytest.mark.parametrize("label", ["cat", "a very long label that no small picture can hold"])
def test_labels_never_leave_the_picture(size, label):
    """A tag pushed against any edge is about as large as one in the middle: nothing is cut off."""
    width, height = size
    picture = plain(*size)
    x, y = width // 2, height // 2
    high, wide = tag_of(picture, (x, y, x + 1, y + 1), label)
    assert 5 < high < height and 5 < wide <= width
    for x, y in itertools.product((0, width - 2), (0, height - 2)):
        other_high, other_wide = tag_of(picture, (x, y, x + 1, y + 1), label)
        assert abs(other_high - high) <= 4 and abs(other_wide - wide) <= 4


def test_labels_never_hide_each_other():
    """Objects on one spot: each label's letters are there as often as on a picture of its own."""
    names = [f"kind {i}" for i in range(5)]
    boxes = [(30, 60, 90, 110)] * 5
    drawn = np.asarray(draw_boxes(plain(200, 200), boxes, names))
    for number, name in enumerate(names):
        tag = (drawn == byte_colour(CYCLE[number])).all(axis=2)
        assert tag.sum() > 300, f"the tag of {name} is hidden"


def test_a_heap_of_labels_is_left_out_rather_than_piled_up():
    drawn = draw_boxes(plain(60, 40), [(5, 5, 50, 35)] * 40, [str(i) for i in range(40)])
    assert drawn.size == (60, 40)


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


@pytest.mark.parametrize("kind", [Image.fromarray, np.asarray])
def test_pictures_and_arrays(kind):
    assert draw_boxes(kind(NOISE), [(1, 2, 30, 40)], ["x"]).size == (80, 60)
    assert draw_boxes(Image.new("L", (80, 60)), []).mode == "RGB"


def test_no_matplotlib_is_needed():
    """The command draws boxes with a read-only home and without a plotting library's start-up."""
    code = (
        "import sys; from paligemma.support.drawing import draw_boxes, draw_caption;"
        "from PIL import Image; p = Image.new('RGB', (90, 60));"
        "draw_caption(draw_boxes(p, [(5, 30, 50, 50)], ['a cat']), 'a cat');"
        "sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
