"""Lesson 19: boxes as words. What untrusted text may do, and average precision beside COCO's."""

import contextlib
import dataclasses
import importlib.util
import io
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from paligemma.detection import (
    Detection,
    average_precision,
    box_iou,
    encode_boxes,
    find_objects,
    match_boxes,
    parse_detections,
    score_detections,
    score_objects,
)
from paligemma.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "paligemma" / "assets" / "tiny"
GOOD = "<loc0100><loc0200><loc0500><loc0600> owl"
PIECES = ["<loc0000>", "<loc0512>", "<loc1023>", "<loc1024>", "<seg000>", "<seg127>", "<seg999>"]
PIECES += [" ; ", ";", "\n", " ", "cat", "<eos>", "<loc", "<", ">", "détéct", "٠", "<loc٠٠٠١>"]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=40).map("".join))


def world(seed=0, pictures=30, kinds=3):
    """Random truth, and detections that are sometimes near, doubled, wrong or missing.

    Returns:
        two float64[n, 7]: picture, kind, x0, y0, x1, y1, score.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    truth, found = [], []
    for picture in range(pictures):
        for _ in range(int(draw(1) * 5)):
            kind, corner, size = int(draw(1) * kinds), draw(2) * 70, 8 + draw(2) * 40
            box = torch.cat([corner, corner + size])
            truth.append([picture, kind, *box.tolist(), 1.0])
            for _ in range(int(draw(1) * 3)):
                near = box + (draw(4) - 0.5) * 10 * float(draw(1))
                other = kind if draw(1) < 0.9 else (kind + 1) % kinds
                score = round(float(draw(1)), 2)  # ties happen
                found.append([picture, other, *near.tolist(), score])
    return [torch.tensor(rows, dtype=torch.float64) for rows in (found, truth)]


def coco(found, truth, pictures, kinds):
    """Average precision by pycocotools, float64[10 bounds, kinds]; -1 where a kind is absent."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def entries(rows):
        for i, (picture, kind, x0, y0, x1, y1, score) in enumerate(rows.tolist(), start=1):
            box = [x0, y0, x1 - x0, y1 - y0]
            yield {
                "id": i,
                "image_id": int(picture),
                "category_id": int(kind),
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
                "score": score,
            }

    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO()
        dataset.dataset = {
            "info": {},
            "images": [{"id": i} for i in range(pictures)],
            "categories": [{"id": k} for k in range(kinds)],
            "annotations": list(entries(truth)),
        }
        dataset.createIndex()
        evaluation = COCOeval(dataset, dataset.loadRes(list(entries(found))), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    # (bounds, recalls, kinds, areas, most detections): all areas, up to 100
    return torch.tensor(evaluation.eval["precision"])[:, :, :, 0, -1].mean(1)


def reference() -> dict[str, torch.Tensor]:
    found, truth = world()
    return {"found": found, "truth": truth, "precision": coco(found, truth, 30, 3)}


def lists(rows, pictures=30):
    out = [[] for _ in range(pictures)]
    for picture, kind, *box, score in rows.tolist():
        out[int(picture)].append(Detection(str(int(kind)), tuple(box), score))
    return out


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(("width", "height"), [(640, 480), (17, 900), (1, 1), (4000.0, 3000.0)])
def test_there_and_back_within_half_a_step(width, height):
    box = (width * 0.11, height * 0.23, width * 0.71, height * 0.97)
    (words,) = encode_boxes([box], width, height)
    (read,) = parse_detections(f"{words} a cat", width, height)
    assert read.label == "a cat" and read.score == 1.0
    for value, was, size in zip(read.box, box, (width, height) * 2):
        assert abs(value - was) <= size / 1023 / 2 + 1e-9


def test_order_rounding_and_clipping():
    assert encode_boxes([(64, 0, 320, 240)], 640, 480) == ["<loc0000><loc0102><loc0512><loc0512>"]
    assert encode_boxes([(-5, -5, 700, 500)], 640, 480) == ["<loc0000>" * 2 + "<loc1023>" * 2]
    assert encode_boxes([], 9, 9) == []
    assert encode_boxes(torch.tensor([[0, 0, 9, 9]]), 9, 9) == ["<loc0000>" * 2 + "<loc1023>" * 2]
    (read,) = parse_detections("<loc0000><loc0000><loc1023><loc1023>all", 640, 480)
    assert read.box == (0, 0, 640, 480)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((1, 2, 3), "four finite"),
        ((1, 2, 3, math.nan), "four finite"),
        ((5, 0, 1, 9), "inside out"),
    ],
)
def test_boxes_that_cannot_be_written(box, message):
    with pytest.raises(ValueError, match=message):
        encode_boxes([box], 10, 10)
    with pytest.raises(ValueError, match="expected its size"):
        parse_detections("", 0, 10)


@pytest.mark.parametrize(
    ("text", "labels", "problem"),
    [
        ("<loc0100><loc0200><loc0500> cat", [], "3 <loc>"),
        ("<loc0100><loc0200><loc0500><loc0600>", [""], None),
        ("<loc0100><loc0200><loc0500><loc0600><eos>", [""], None),
        ("<loc0100><loc0200><loc0500><loc0600> ; cat", [""], None),
        ("<loc0100><loc0200><loc0500><loc0600> ; " + GOOD, ["", "owl"], None),
        ("<loc0500><loc0200><loc0500><loc0600> cat", [], "without inside"),
        ("<loc0100><loc0700><loc0500><loc0600> cat", [], "without inside"),
        ("<loc0100><loc0200><loc0500><loc1024> cat", [], "beyond"),
        (GOOD.replace(" owl", "<seg001>" * 15 + " owl"), [], "15 <seg>"),
        (GOOD.replace(" owl", "<seg001>" * 15 + "<seg128> owl"), [], "beyond"),
        (GOOD.replace(" owl", "<seg001>" * 16 + " owl"), ["owl"], None),
        ("detect owl\n" + GOOD, ["owl"], None),
        (GOOD + "<eos>", ["owl"], None),
        ("<loc0001>" + GOOD, ["owl"], "1 <loc> before the last 4"),
        ("<loc0001>" * 4 + GOOD, ["owl"], "4 <loc> before the last 4"),
        (GOOD + GOOD, ["owl", "owl"], None),
        (GOOD + " ; <loc0001>", ["owl"], "1 <loc>"),
        ("", [], None),
        ("an owl", [], None),
    ],
)
def test_broken_objects_are_dropped_and_named(text, labels, problem):
    dropped = []
    assert [d.label for d in parse_detections(text, 10, 10, dropped)] == labels
    assert [reason for _, reason in dropped] == [] if problem is None else problem in dropped[0][1]
    assert all(piece in text for piece, _ in dropped)


@given(TEXTS)
def test_any_text_gives_a_list(text):
    for detection in parse_detections(text, 640, 480):
        x0, y0, x1, y1 = detection.box
        assert 0 <= x0 < x1 <= 640 and 0 <= y0 < y1 <= 480
        assert detection.label.strip() == detection.label


@given(TEXTS, TEXTS)
def test_a_good_object_survives_any_garbage(before, after):
    expected = parse_detections(GOOD, 640, 480)[0]
    assert expected in parse_detections(f"{before}{GOOD} ; {after}", 640, 480)
    assert expected in parse_detections(f"{before} ; {GOOD}\n{after}", 640, 480)


# ---------------------------------------------------------------- scores


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(TINY)


def test_a_score_is_the_mean_of_its_own_tokens(tokenizer):
    text = "cat <loc0100><loc0200><loc0500><loc0600> cat ; <loc0001><loc0002><loc0003><loc0004> dog"
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    second = ids.index(tokenizer.encode("<loc0001>")[0])
    logs = [math.log(0.5)] * len(ids)
    for i in range(second, second + 5):
        logs[i] = math.log(0.25 if i % 2 else 0.5)
    logs[-1] = -100.0  # eos belongs to no object
    one, two = score_detections(ids, logs, tokenizer, 10, 10)
    assert (one.label, two.label) == ("cat", "dog")
    assert one.score == pytest.approx(0.5)
    place, name = sum(logs[second : second + 4]) / 4, logs[second + 4]
    assert two.score == pytest.approx(math.exp((place + name) / 2))
    nothing = dataclasses.replace(next(find_objects(text)), start=0, name=0, end=0)
    assert score_objects([nothing], ids, logs, tokenizer) == [0.0]


def test_the_length_of_a_name_does_not_count(tokenizer):
    """Unsure of the place, sure of the name: one piece or ten, the score is the same."""
    scores = []
    for name in ("cat", "cat cat cat cat", ""):
        ids = tokenizer.encode(f"<loc0100><loc0200><loc0500><loc0600> {name}".strip())
        logs = [math.log(0.1)] * 4 + [math.log(0.9)] * (len(ids) - 4)
        (found,) = score_detections(ids, logs, tokenizer, 10, 10)
        assert found.label == name
        scores.append(found.score)
    assert scores == pytest.approx([0.3, 0.3, 0.1])


def test_surplus_numbers_do_not_lower_a_score(tokenizer):
    ids = tokenizer.encode("<loc0001><loc0002>" + GOOD)
    logs, dropped = [-9.0] * 2 + [math.log(0.5)] * (len(ids) - 2), []
    (found,) = score_detections(ids, logs, tokenizer, 10, 10, dropped)
    assert found.score == pytest.approx(0.5)
    assert dropped == [("<loc0001><loc0002>", "2 <loc> before the last 4")]


@given(st.lists(st.integers(0, 10**6), max_size=30))
def test_any_tokens_give_scores(numbers):
    tokenizer = Tokenizer.from_pretrained(TINY)
    ids = [number % len(tokenizer) for number in numbers]
    found = score_detections(ids, [-0.5] * len(ids), tokenizer, 10, 10)
    spans = [f for f in find_objects(tokenizer.decode(ids)) if f.problem is None]
    assert len(found) == len(spans)
    assert all(0 <= d.score <= 1 for d in found)


# ---------------------------------------------------------------- measures


def test_iou():
    assert box_iou([(0, 0, 4, 4)], [(2, 1, 6, 5)]).item() == pytest.approx(6 / 26)
    assert box_iou([(0, 0, 1, 1)], [(5, 5, 6, 6), (1, 0, 2, 1), (0, 0, 1, 1)]).tolist() == [
        [0, 0, 1]
    ]
    assert box_iou([(3, 3, 3, 3)], [(3, 3, 3, 3)]).item() == 0
    assert box_iou([], [(0, 0, 1, 1)]).shape == (0, 1)


def test_matching():
    ious = torch.tensor([[0.9, 0.6], [0.95, 0.6], [0.2, 0.49]])
    assert match_boxes([0.9, 0.8, 0.7], ious) == [0, 1, -1]
    assert match_boxes([0.8, 0.9, 0.7], ious) == [1, 0, -1]
    assert match_boxes([], torch.zeros(0, 2)) == []
    assert match_boxes([0.5], torch.zeros(1, 0)) == [-1]


@pytest.mark.parametrize("seed", range(1, 6))
def test_average_precision_is_that_of_pycocotools(seed):
    found, truth = world(seed)
    if seed % 2:  # whole pixels: ties of overlap
        found[:, 2:6], truth[:, 2:6] = found[:, 2:6].round(), truth[:, 2:6].round()
    theirs = coco(found, truth, 30, 3)
    for k in range(10):
        bound = 0.5 + 0.05 * k
        for kind in range(3):
            ours = average_precision(lists(found), lists(truth), str(kind), bound)
            assert ours == pytest.approx(float(theirs[k, kind]), abs=1e-6)


def test_average_precision_at_the_edges():
    cat = Detection("cat", (0, 0, 9, 9))
    assert average_precision([[cat]], [[cat]], "cat") == 1
    assert average_precision([[]], [[cat]], "cat") == 0
    assert math.isnan(average_precision([[cat]], [[]], "cat"))
    with pytest.raises(ValueError, match="1 pictures, truth 2"):
        average_precision([[]], [[], []], "cat")


# ---------------------------------------------------------------- the lesson's own facts


def test_the_boxes_in_the_lesson_are_those_of_the_scenes():
    """Typed there; computed here from each emoji's opaque pixels and from where it was pasted."""
    spec = importlib.util.spec_from_file_location("scene_tool", ROOT / "tools" / "make_assets.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    pair = (ROOT / "notebooks" / "scripts" / "19_detection.py").read_text()
    typed = {}
    exec("labels = {" + pair.split("\nlabels = {")[1].split("\n\n")[0], typed)
    for name, (kinds, places, *_) in tool.DEMOS.items():
        assert typed["labels"][name] == list(kinds)
        assert typed["boxes"][name] == [true_box(k, *p) for k, p in zip(kinds, places)]


def true_box(kind, x, y, side, degrees):
    with Image.open(ROOT / "paligemma" / "assets" / "emoji" / f"{kind}.png") as opened:
        sprite = opened.convert("RGBA").resize((side, side), Image.Resampling.LANCZOS)
    sprite = sprite.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    x0, y0, x1, y1 = sprite.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox()
    left, top = x - sprite.width // 2, y - sprite.height // 2
    return left + x0, top + y0, left + x1, top + y1
