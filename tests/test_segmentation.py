"""Lesson 21: masks as words. The published file's shapes, the codec that ships, untrusted text."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from paligemma.checkpoint import load_model
from paligemma.detection import parse_detections
from paligemma.scenes import make_scene
from paligemma.segmentation import (
    MaskCodec,
    Segment,
    crop_masks,
    encode_segments,
    parse_segments,
    paste_mask,
    restart_dead_codes,
    score_segments,
    search_codes,
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


def published(seed=0):
    """Random arrays with the names and shapes of the published file."""
    shapes = {"_vq_vae._embedding": (128, 512), "decoder.0": (128, 512, 1, 1)}
    for block in (2, 3):
        for layer, size in ((0, 3), (2, 3), (4, 1)):
            shapes[f"decoder.{block}.net.{layer}"] = (128, 128, size, size)
    for layer, (before, after) in zip(
        (4, 6, 8, 10), ((128, 128), (128, 64), (64, 32), (32, 16)), strict=True
    ):
        shapes[f"decoder.{layer}"] = (before, after, 4, 4)
    shapes["decoder.12"] = (1, 16, 1, 1)
    rng, arrays = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        if name.startswith("_"):
            arrays[name] = rng.standard_normal(shape, dtype=np.float32)
            continue
        upwards = name in ("decoder.4", "decoder.6", "decoder.8", "decoder.10")
        scale = math.prod(shape[1:]) ** -0.5
        arrays[f"{name}.weight"] = scale * rng.standard_normal(shape, dtype=np.float32)
        outputs = shape[1] if upwards else shape[0]
        arrays[f"{name}.bias"] = 0.1 * rng.standard_normal(outputs, dtype=np.float32)
    return arrays


def by_hand(arrays, codes):
    """The published decoder in plain calls, float32[B, 64, 64] before any clipping."""
    t = {name: torch.from_numpy(array) for name, array in arrays.items()}
    x = t["_vq_vae._embedding"][codes].reshape(-1, 4, 4, 512).permute(0, 3, 1, 2)

    def conv(name, x, pad=0):
        return F.conv2d(x, t[f"{name}.weight"], t[f"{name}.bias"], padding=pad)

    x = conv("decoder.0", x).relu()
    for block in (2, 3):
        y = conv(f"decoder.{block}.net.0", x, 1).relu()
        y = conv(f"decoder.{block}.net.2", y, 1).relu()
        x = x + conv(f"decoder.{block}.net.4", y)
    for layer in (4, 6, 8, 10):
        weight, bias = t[f"decoder.{layer}.weight"], t[f"decoder.{layer}.bias"]
        x = F.conv_transpose2d(x, weight, bias, stride=2, padding=1).relu()
    return conv("decoder.12", x)[:, 0]


def held_out():
    """Shapes that the shipped codec was never trained on, float32[48, 64, 64]."""
    sheet = np.asarray(Image.open(ROOT / "paligemma" / "assets" / "mask_codec" / "held_out.png"))
    tiles = torch.tensor(sheet / 255).unflatten(0, (-1, 64)).unflatten(2, (-1, 64))
    return tiles.transpose(1, 2).flatten(0, 1).float()


def iou(a, b):
    return (a & b).sum((-1, -2)) / (a | b).sum((-1, -2))


# ---------------------------------------------------------------- the published file


def test_the_published_file_loads_and_draws(tmp_path):
    arrays = published()
    assert sum(a.size for n, a in arrays.items() if n.startswith("decoder")) == 1_123_457
    assert arrays["_vq_vae._embedding"].size == 65_536
    np.savez(tmp_path / "vae-oid.npz", **arrays, something_else=np.zeros(3))
    state = torch.get_rng_state()
    codec = MaskCodec.from_npz(tmp_path / "vae-oid.npz")
    assert torch.equal(state, torch.get_rng_state())
    assert set(codec.state_dict()) == set(arrays) and not codec.training
    codes = torch.randint(128, (3, 16), generator=torch.Generator().manual_seed(0))
    expected = by_hand(arrays, codes)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(codec.decode(codes), expected.clamp(-1, 1), atol=1e-5, rtol=1e-5)


def test_without_an_encoder_it_searches(tmp_path, shipped):
    np.savez(tmp_path / "vae-oid.npz", **published())
    codec = MaskCodec.from_npz(tmp_path / "vae-oid.npz")
    codes = codec.encode(torch.zeros(1, 64, 64))
    assert codes.dtype == torch.int64 and codes.shape == (1, 16) and 0 <= codes.min() <= 127
    assert codec.encode(torch.zeros(0, 64, 64)).shape == (0, 16)
    # beside an encoder that was trained: the search draws shapes as well
    masks = held_out()[:6]
    found = [shipped.decode(c) > 0 for c in (search_codes(shipped, masks), shipped.encode(masks))]
    searched, encoded = (iou(drawn, masks > 0.5).mean() for drawn in found)
    assert searched >= encoded - 0.02


def test_search_goes_on_from_the_encoders_codes(shipped):
    masks = held_out()[:6]
    codes = shipped.encode(masks)
    better = search_codes(shipped, masks, start=codes)
    before, after = (iou(shipped.decode(c) > 0, masks > 0.5) for c in (codes, better))
    assert (after >= before).all() and after.mean() >= before.mean() + 0.01
    empty = torch.zeros(1, 64, 64)  # overlaps nothing: every drawing is as good as another
    assert torch.equal(search_codes(shipped, empty, start=codes[:1]), codes[:1])


@pytest.mark.parametrize(
    "wrong", ["missing", "shape", "text", "no file", "array", "no codebook", "damaged"]
)
def test_files_that_are_no_codec(tmp_path, wrong):
    file, arrays = tmp_path / "x.npz", published()
    if wrong == "missing":
        del arrays["decoder.8.bias"]
    if wrong == "no codebook":
        del arrays["_vq_vae._embedding"]
    if wrong == "shape":
        arrays["decoder.4.weight"] = arrays["decoder.4.weight"][:, :7]
    if wrong in ("missing", "shape", "no codebook"):
        np.savez(file, **arrays)
    elif wrong == "text":
        file.write_text("not found")
    elif wrong == "damaged":
        np.savez_compressed(file, **arrays)
        whole = file.read_bytes()
        file.write_bytes(whole[:5000] + bytes(1000) + whole[6000:])
    elif wrong == "array":
        with file.open("wb") as stream:
            np.save(stream, np.zeros(3))
    part = {"missing": "decoder.8.bias", "shape": "decoder.4.weight"}.get(wrong, "x.npz")
    with pytest.raises(ValueError, match=part) as caught:
        MaskCodec.from_npz(file)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- our file


def test_save_and_load(tmp_path):
    codec = MaskCodec(16, 8, 16).eval()
    codec.save_pretrained(tmp_path / "new", dtype=torch.float32)
    codec.save_pretrained(tmp_path / "one.safetensors")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["mask_codec.safetensors"]
    again = MaskCodec.from_pretrained(tmp_path / "new")
    masks = torch.rand(3, 64, 64)
    codes = codec.encode(masks)
    assert torch.equal(codes, again.encode(masks))
    assert torch.equal(codec.decode(codes), again.decode(codes))
    half = MaskCodec.from_pretrained(tmp_path / "one.safetensors")
    torch.testing.assert_close(codec.decode(codes), half.decode(codes), atol=5e-3, rtol=0)
    assert all(p.dtype == torch.float32 for p in half.parameters())


@pytest.mark.parametrize("wrong", ["missing", "left over", "truncated", "no file"])
def test_our_file_is_read_strictly(tmp_path, wrong):
    file = tmp_path / "mask_codec.safetensors"
    MaskCodec(16, 8, 16).save_pretrained(tmp_path)
    state = load_file(file)
    if wrong == "missing":
        del state["encoder.0.bias"]
    if wrong == "left over":
        state["decoder.14.bias"] = torch.zeros(1)
    save_file(state, file)
    if wrong == "truncated":
        file.write_bytes(file.read_bytes()[:-9])
    if wrong == "no file":
        file.unlink()
    with pytest.raises(ValueError, match="mask_codec"):
        MaskCodec.from_pretrained(tmp_path)


def test_the_shipped_codec(shipped, objects):
    assert (TINY / "mask_codec.safetensors").stat().st_size <= 500_000
    boxes, masks = objects
    words = encode_segments(boxes, masks, shipped, 112, 112)
    read = [parse_segments(text + " x", 112, 112, shipped)[0].mask for text in words]
    assert iou(np.stack(read), masks).mean() >= 0.93
    held = held_out()
    drawn = shipped.decode(shipped.encode(held))
    assert -1 <= drawn.min() < -0.9 and 0.9 < drawn.max() <= 1
    ious = iou(drawn > 0, held > 0.5)  # thin limbs are what sixteen codes lose
    assert ious.mean() >= 0.85 and ious.median() >= 0.90


def test_the_model_loads_with_the_codec_beside_it():
    from transformers import AutoModelForImageTextToText

    assert (TINY / "mask_codec.safetensors").is_file()
    assert load_model(TINY) is not None
    AutoModelForImageTextToText.from_pretrained(TINY)


# ---------------------------------------------------------------- codes


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(16, dtype=torch.int64), r"\[16\]"),
        (torch.zeros(1, 15, dtype=torch.int64), r"\[1, 15\]"),
        (torch.zeros(1, 16), "float32"),
        (torch.full((1, 16), 128), "128"),
        (torch.full((1, 16), -1), "-1"),
    ],
)
def test_codes_that_cannot_be_drawn(shipped, codes, message):
    with pytest.raises(ValueError, match=message):
        shipped.decode(codes)


def test_masks_that_cannot_be_written(shipped):
    for bad in (
        torch.zeros(64, 64),
        torch.zeros(1, 32, 32),
        torch.full((1, 64, 64), 255.0),
        torch.full((1, 64, 64), math.nan),
    ):
        with pytest.raises(ValueError, match="expected"):
            shipped.encode(bad)
    assert shipped.encode(torch.zeros(0, 64, 64)).shape == (0, 16)
    assert shipped.decode(torch.zeros(0, 16, dtype=torch.int64)).shape == (0, 64, 64)
    assert torch.equal(
        shipped.encode(torch.ones(1, 64, 64, dtype=torch.bool)),
        shipped.encode(torch.ones(1, 64, 64)),
    )


def test_the_gradient_goes_straight_through():
    torch.manual_seed(0)
    codec = MaskCodec(8, 4, 32)
    drawn, codes, apart = codec(torch.rand(2, 64, 64))
    assert drawn.shape == (2, 64, 64) and codes.shape == (2, 16) and apart.ndim == 0
    (grad,) = torch.autograd.grad(
        drawn.mean(), codec._vq_vae._embedding, allow_unused=True, retain_graph=True
    )
    assert grad is None  # the drawing does not move the codebook
    drawn.square().mean().backward()
    assert codec.encoder[0].weight.grad.abs().max() > 0  # but it moves the encoder
    torch.testing.assert_close(drawn.detach().clamp(-1, 1), codec.decode(codes))


def test_dead_codes_move_to_where_the_encoder_looks():
    torch.manual_seed(0)
    codec = MaskCodec(8, 4, 32)
    masks = torch.rand(4, 64, 64)
    before = codec._vq_vae._embedding.detach().clone()
    counts = torch.tensor([3, 0, 1, 0, 5, 1, 1, 1])
    assert restart_dead_codes(codec, masks, counts) == 2
    after, z = codec._vq_vae._embedding.detach(), codec.look(masks).flatten(0, 1)
    alive = counts > 0
    assert torch.equal(before[alive], after[alive])
    assert torch.cdist(after[~alive], z).min(1).values.max() < 1e-3


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


def test_crops_that_cannot_be():
    with pytest.raises(ValueError, match="2 boxes"):
        crop_masks([(0, 0, 1, 1)] * 2, np.ones((1, 4, 4), bool))
    with pytest.raises(ValueError, match="no inside"):
        crop_masks([(9, 0, 12, 2)], np.ones((1, 4, 4), bool))
    assert crop_masks([], []).shape == (0, 64, 64)
    assert crop_masks([(-5, -5, 2, 2)], np.ones((1, 4, 4), bool)).mean() == 1


def test_shapes_stay_upright(shipped):
    """A mask that is no square's mirror image, in a picture that is no square."""
    mask = np.zeros((90, 160), bool)
    mask[20:80, 100:110] = mask[70:80, 100:150] = True  # an L
    (words,) = encode_segments([(100, 20, 150, 80)], [mask], shipped, 160, 90)
    (segment,) = parse_segments(words + " L", 160, 90, shipped)
    assert iou(segment.mask, mask) > 0.8


# ---------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("text", "labels", "problem"),
    [
        (GOOD, ["owl"], None),
        (f"segment owl\n{GOOD} ; {GOOD}<eos>", ["owl", "owl"], None),
        (f"{LOCS} owl", [], "0 <seg>"),
        (f"{LOCS}{SEGS}", [], "no label"),
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
