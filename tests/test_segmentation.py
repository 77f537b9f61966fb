"""Lesson 21: masks in the picture. Cutting and pasting, words, untrusted text."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from paligemma.detection import parse_detections
from paligemma.mask_codec import MaskCodec
from paligemma.scenes import make_scene
from paligemma.segmentation import (
    Segment,
    crop_masks,
    encode_segments,
    mask_iou,
    parse_segments,
    paste_mask,
    score_segments,
)
from paligemma.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "paligemma" / "assets" / "tiny"
LOCS = "<loc0100><loc0200><loc0500><loc0600>"
SEGS = "".join(f"<seg{7 * k:03d}>" for k in range(16))
GOOD = f"{LOCS}{SEGS} owl"
PIECES = ["<loc0000>", "<loc0512>", "<loc1023>", "<loc1024>", "<seg000>", "<seg127>", "<seg999>"]
PIECES += [" ; ", ";", "\n", " ", "cat", "<eos>", "<loc", "<", ">", SEGS, LOCS, "<seg٠٠١>"]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=12).map("".join))


@pytest.fixture(scope="module")
def shipped():
    return MaskCodec.from_pretrained(TINY)


@pytest.fixture(scope="module")
def objects():
    """Boxes and visible masks of the objects of some test scenes."""
    scenes = [make_scene(i, "test") for i in range(30)]
    return [np.concatenate([getattr(s, name) for s in scenes]) for name in ("boxes", "masks")]


def test_scenes_come_back_as_they_were(shipped, objects):
    boxes, masks = objects
    words = encode_segments(boxes, masks, shipped, 112, 112)
    read = [parse_segments(text + " x", 112, 112, shipped)[0].mask for text in words]
    assert mask_iou(np.stack(read), masks).mean() >= 0.93


# ---------------------------------------------------------------- boxes and pictures


def test_a_crop_is_that_of_torch():
    masks = torch.rand(1, 40, 50, generator=torch.Generator().manual_seed(0)) > 0.5
    for x0, y0, x1, y1 in ((3, 5, 30, 39), (0, 0, 50, 40), (10, 10, 11, 12)):
        part = masks[:, None, y0:y1, x0:x1].float()
        expected = F.interpolate(part, (64, 64), mode="bilinear", antialias=True)[:, 0]
        torch.testing.assert_close(crop_masks([(x0, y0, x1, y1)], masks), expected)
    large = torch.rand(1, 200, 300, generator=torch.Generator().manual_seed(0)) > 0.5
    part = large[:, None, 10:190, 20:299].float()
    expected = F.interpolate(part, (64, 64), mode="bilinear", antialias=True)[:, 0]
    torch.testing.assert_close(crop_masks([(20, 10, 299, 190)], large), expected)


@pytest.mark.parametrize("size", [(30, 41), (64, 64), (150, 90)])
def test_a_paste_is_that_of_torch(size):
    drawn = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    height, width = size
    expected = F.interpolate(drawn[None, None], size, mode="bilinear", antialias=True)[0, 0] > 0
    mask = paste_mask(drawn, (7, 9, 7 + width, 9 + height), 200, 180)
    assert mask.shape == (180, 200) and mask.dtype == bool
    np.testing.assert_array_equal(mask[9 : 9 + height, 7 : 7 + width], expected.numpy())
    mask[9 : 9 + height, 7 : 7 + width] = False
    assert not mask.any()


def test_a_paste_is_cut_at_the_edges():
    mask = paste_mask(torch.ones(64, 64), (-10, -10, 5, 5), 20, 30)
    assert mask.sum() == 25 and mask[:5, :5].all()
    assert not paste_mask(torch.ones(64, 64), (40, 40, 60, 60), 20, 30).any()
    assert paste_mask(torch.ones(64, 64), (2.1, 3.1, 2.2, 3.2), 20, 30).sum() == 0


def test_corners_round_to_whole_pixels():
    mask = np.zeros((1, 50, 60), bool)
    mask[0, 10:30, 20:37] = True
    exact = crop_masks([(20, 10, 37, 30)], mask)
    assert exact.min() == 1
    noisy = [(20 - 4e-15, 10 + 7e-15, 37.000000000000007, 30.000000000000004)]
    assert torch.equal(crop_masks(noisy, mask), exact)
    assert torch.equal(crop_masks([(20.4, 9.6, 36.6, 30.4)], mask), exact)
    sliver = crop_masks([(36.6, 10, 36.9, 30)], mask)  # rounds to no pixel: it gets one
    assert sliver.shape == (1, 64, 64) and sliver.max() == 0
    assert crop_masks([(59.7, 0, 60, 50)], mask).shape == (1, 64, 64)
    drawn = torch.ones(64, 64)
    pasted = paste_mask(drawn, (20, 10, 37.000000000000007, 30), 60, 50)
    assert np.array_equal(pasted, mask[0])


def test_masks_that_lie_on_their_side_are_refused(shipped):
    mask = np.zeros((90, 160), bool)
    mask[20:80, 100:110] = True
    box = (100, 20, 110, 80)
    assert len(encode_segments([box], [mask], shipped, 160, 90)) == 1
    with pytest.raises(ValueError, match=r"masks are \[160, 90\].*\[90, 160\]: transpose"):
        encode_segments([(20, 30, 80, 90)], [mask.T], shipped, 160, 90)
    with pytest.raises(ValueError, match=r"masks are \[64, 64\].*\[90, 160\]"):
        encode_segments([(0, 0, 64, 64)], [np.ones((64, 64), bool)], shipped, 160, 90)
    assert encode_segments([], [], shipped, 160, 90) == []


def test_a_crop_never_leaves_0_to_1(shipped):
    full = np.ones((1, 140, 140), bool)
    squares = torch.cat([crop_masks([(0, 0, side, 140)], full) for side in range(65, 140)])
    assert 0 <= squares.min() and squares.max() <= 1
    shipped.encode(squares)


def test_crops_that_cannot_be():
    with pytest.raises(ValueError, match="2 boxes"):
        crop_masks([(0, 0, 1, 1)] * 2, np.ones((1, 4, 4), bool))
    with pytest.raises(ValueError, match="no inside"):
        crop_masks([(9, 0, 12, 2)], np.ones((1, 4, 4), bool))
    with pytest.raises(ValueError, match="no inside"):
        crop_masks([(2, 0, 1, 2)], np.ones((1, 4, 4), bool))
    with pytest.raises(ValueError, match="no inside"):
        crop_masks([(0, 0, math.nan, 2)], np.ones((1, 4, 4), bool))
    assert crop_masks([], []).shape == (0, 64, 64)
    assert crop_masks([(-5, -5, 2, 2)], np.ones((1, 4, 4), bool)).mean() == 1


def test_shapes_stay_upright(shipped):
    """A mask that is no square's mirror image, in a picture that is no square."""
    mask = np.zeros((90, 160), bool)
    mask[20:80, 100:110] = mask[70:80, 100:150] = True  # an L
    (words,) = encode_segments([(100, 20, 150, 80)], [mask], shipped, 160, 90)
    (segment,) = parse_segments(words + " L", 160, 90, shipped)
    assert mask_iou(segment.mask, mask) > 0.8


# ---------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("text", "labels", "problem"),
    [
        (GOOD, ["owl"], None),
        (f"segment owl\n{GOOD} ; {GOOD}<eos>", ["owl", "owl"], None),
        (f"{LOCS} owl", [], "0 <seg>"),
        (f"{LOCS}{SEGS}", [""], None),
        (f"{LOCS}{SEGS}<eos>", [""], None),
        (f"{LOCS}{SEGS} ; {GOOD}", ["", "owl"], None),
        (f"{LOCS}{GOOD}", ["owl"], "4 <loc> before"),
        (f"{LOCS}{SEGS[:-8]} owl", [], "15 <seg>"),
        (f"{LOCS}{SEGS[:-8]}<seg128> owl ; {GOOD}", ["owl"], "beyond"),
        (f"{LOCS[:-9]}{SEGS} owl", [], "3 <loc>"),
        (SEGS + " owl", [], None),
        ("an owl", [], None),
    ],
)
def test_broken_objects_are_dropped_and_named(shipped, text, labels, problem):
    dropped = []
    assert [s.label for s in parse_segments(text, 20, 10, shipped, dropped)] == labels
    assert [reason for _, reason in dropped] == [] if problem is None else problem in dropped[0][1]
    assert all(piece in text for piece, _ in dropped)


def test_a_smaller_codebook_drops_what_it_cannot_draw():
    codec, dropped = MaskCodec(16, 8, 8), []
    assert parse_segments(GOOD, 20, 10, codec, dropped) == [] and "<seg015>" in dropped[0][1]
    with pytest.raises(ValueError, match="whole numbers"):
        parse_segments(GOOD, 20.5, 10, codec)
    with pytest.raises(ValueError, match="whole numbers"):
        parse_segments("", 0, 10, codec)


@settings(deadline=None, max_examples=60)
@given(TEXTS, TEXTS)
def test_any_text_gives_a_list_and_a_good_object_survives(before, after):
    codec = CODEC
    (expected,) = parse_segments(GOOD, 64, 48, codec)
    read = parse_segments(f"{before} ; {GOOD}\n{after}", 64, 48, codec)
    assert any(s.box == expected.box and (s.mask == expected.mask).all() for s in read)
    for segment in read:
        assert isinstance(segment, Segment) and segment.mask.shape == (48, 64)
        x0, y0, x1, y1 = segment.box
        rows, columns = np.nonzero(segment.mask)
        if len(rows):
            assert y0 <= rows.min() + 0.5 and rows.max() + 0.5 <= y1
            assert x0 <= columns.min() + 0.5 and columns.max() + 0.5 <= x1


CODEC = MaskCodec.from_pretrained(TINY)


def test_boxes_and_scores_are_those_of_detection():
    tokenizer = Tokenizer.from_pretrained(TINY)
    text = f"{GOOD} ; {LOCS} cat ; {GOOD}"
    ids = tokenizer.encode(text)
    logs = [math.log(0.5)] * len(ids)
    for i in range(len(ids) // 2, len(ids)):
        logs[i] = math.log(0.25)
    dropped = []
    one, two = score_segments(ids, logs, tokenizer, 64, 48, CODEC, dropped)
    assert one.score == pytest.approx(0.5) and two.score == pytest.approx(0.25)
    assert one.box == parse_detections(GOOD, 64, 48)[0].box
    assert len(dropped) == 1


# ---------------------------------------------------------------- the lesson's own facts


def test_the_places_in_the_lesson_are_those_of_the_scene():
    spec = importlib.util.spec_from_file_location("scene_tool", ROOT / "tools" / "make_assets.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    pair = (ROOT / "notebooks" / "scripts" / "21_segmentation.py").read_text()
    (line,) = (line for line in pair.split("\n") if line.startswith("PLACED = "))
    kinds, places, *_ = tool.DEMOS["scene"]
    assert eval(line.removeprefix("PLACED = ")) == [(k, *p) for k, p in zip(kinds, places)]
