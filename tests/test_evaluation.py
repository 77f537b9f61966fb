"""Scores of answers, boxes and masks, their intervals and controls; another renderer's scenes."""

import itertools

import numpy as np
import other_renderer
import pytest

from paligemma import scenes
from paligemma.detection import box_iou, encode_boxes, parse_detections
from paligemma.evaluation import (
    ROWS,
    box_metrics,
    evaluate,
    exact_match,
    interval,
    mask_metrics,
    predict,
    row_questions,
)
from paligemma.inference import Pipeline, load
from paligemma.segmentation import encode_segments


@pytest.fixture(scope="module")
def tiny():
    return load()


class Oracle:
    """A pipeline that knows the truth of every picture of a row, and answers from it."""

    codec = None

    def __init__(self, row, count):
        asked, prompts, truths = row_questions(row, count)
        keys = zip(asked, prompts)
        self.known = {(s.image.tobytes(), p): t for (s, p), t in zip(keys, truths)}

    def batch(self, images, prompts, **options):
        keys = [(image.tobytes(), prompt) for image, prompt in zip(images, prompts)]
        return [self.known.get(key, "nothing") for key in keys]


# ---------------------------------------------------------------- scores


def test_exact_match():
    assert exact_match(["a", "b", "c", "d"], ["a", "b", "c ", "D"]) == 50
    with pytest.raises(ValueError):
        exact_match(["a"], ["a", "b"])


def test_intervals_hold_the_truth_and_stay_within_bounds():
    assert interval(50, 100) == pytest.approx((40.38, 59.62), abs=0.01)  # Wilson's own example
    for percent, count in itertools.product((0, 3, 50, 97, 100), (1, 10, 1000)):
        low, high = interval(percent, count)
        assert 0 <= low <= percent <= high <= 100 and high > low
    rng, held = np.random.default_rng(0), []
    for share in rng.uniform(0.3, 1.0, 2000):
        low, high = interval(rng.binomial(200, share) / 2, 200)
        held.append(low <= 100 * share <= high)
    assert 0.935 < np.mean(held) < 0.97


BOXES = "<loc0100><loc0100><loc0500><loc0500> cat ; <loc0600><loc0600><loc0900><loc0900> cat"


@pytest.mark.parametrize(
    ("prediction", "f1", "iou"),
    [
        (BOXES, 100, 100),
        (" ; ".join(reversed(BOXES.split(" ; "))), 100, 100),
        ("", 0, 0),
        (BOXES.replace("cat", "dog"), 0, 0),
        (BOXES.split(" ; ")[0], 200 / 3, 100),
        (BOXES + " ; " + BOXES.split(" ; ")[0], 80, 100),
        (BOXES.replace("<loc0500><loc0500>", "<loc0500><loc0300>"), 100, 75),
        (BOXES.replace("<loc0500><loc0500>", "<loc0500><loc0250>"), 50, 100),
        ("<loc0100><loc0100> cat", 0, 0),
    ],
)
def test_box_metrics(prediction, f1, iou):
    found = box_metrics([prediction], [BOXES])
    assert found["f1"] == pytest.approx(f1, abs=0.5) and found["iou"] == pytest.approx(iou, abs=0.5)


def test_who_overlaps_most_chooses_first():
    """The first box fits both true ones, the second fits only the one that the first takes."""
    true = [(0, 0, 100, 100), (0, 40, 100, 140)]
    said = [(0, 18, 100, 118), (0, 0, 100, 99)]
    truth, prediction = (" ; ".join(f"{w} cat" for w in encode_boxes(b, 200, 200))
                         for b in (true, said))  # fmt: skip
    assert box_metrics([prediction], [truth])["f1"] == 100


def best_matching(ious, threshold):
    """The most pairs that any assignment reaches, by trying all."""
    ious = ious if ious.shape[0] <= ious.shape[1] else ious.T
    columns = itertools.permutations(range(ious.shape[1]), ious.shape[0])
    return max(sum(ious[i, j] >= threshold for i, j in enumerate(order)) for order in columns)


def test_choosing_in_turn_finds_as_many_pairs_as_trying_all():
    rng = np.random.default_rng(1)
    for index in range(60):  # true boxes, against themselves moved by a little
        boxes = scenes.make_scene(index, "test").boxes
        moved = boxes + rng.integers(-4, 5, boxes.shape)
        truth, said = (
            " ; ".join(f"{w} cat" for w in encode_boxes(b, scenes.SIZE, scenes.SIZE))
            for b in (boxes, moved)
        )
        true, found = (
            [d.box for d in parse_detections(text, 1023, 1023)] for text in (truth, said)
        )
        most = best_matching(box_iou(found, true).numpy(), 0.5) if found else 0
        right = box_metrics([said], [truth])["f1"] * (len(found) + len(true)) / 200
        assert round(right) == most


def test_boxes_are_counted_over_all_scenes():
    one = BOXES.split(" ; ")[0]
    assert box_metrics([BOXES, ""], [BOXES, one])["f1"] == pytest.approx(200 * 2 / (2 + 3))
    assert box_metrics([""], [""]) == {"f1": 0, "iou": 0}


def test_mask_metrics_count_what_was_not_found(tiny):
    made = [scenes.make_scene(i, "test", objects=(2, 3)) for i in range(6)]
    prompts, right, other = [], [], []
    for scene in made:
        words = encode_segments(scene.boxes, scene.masks, tiny.codec, scenes.SIZE, scenes.SIZE)
        asked = list(dict.fromkeys(scenes.NAMES[k] for k in scene.kinds))
        prompts.append("segment " + " ; ".join(asked))
        right.append(" ; ".join(f"{w} {scenes.NAMES[k]}" for w, k in zip(words, scene.kinds)))
        other.append(right[-1].replace(asked[0], "nobody"))
    everything, some, nothing = (
        mask_metrics(said, prompts, made, tiny.codec)["iou"] for said in (right, other, [""] * 6)
    )
    assert everything > 85 and 0 < some < everything - 20 and nothing == 0
    twice = [f"{text} ; {text}" for text in right]
    assert mask_metrics(twice, prompts, made, tiny.codec)["iou"] == pytest.approx(everything)


# ---------------------------------------------------------------- the test


@pytest.mark.parametrize("row", ROWS)
def test_questions_of_a_row(row):
    asked, prompts, truths = row_questions(row, 12)
    again = row_questions(row, 8)
    assert len(asked) == len(prompts) == len(truths) == 12
    assert prompts[:8] == again[1] and truths[:8] == again[2]
    assert all(scenes.has_unseen_pair(s.kinds) for s in asked) == ("never" in row)
    word = {"how many": "how many", "where": "where is", "is there": "is there"}.get(row)
    assert all((word or row.split(",")[0].split()[0]) in prompt for prompt in prompts)


@pytest.mark.parametrize(("row", "score"), [("caption en", "exact"), ("detect", "f1")])
def test_who_knows_everything_has_100_and_falls_with_other_pictures(row, score):
    metrics = evaluate(Oracle(row, 24), 24, (row,))[row]
    assert metrics["scenes"] == 24 and metrics[score] == 100
    assert metrics["shuffled"] < 20


def test_a_constant_answer_scores_the_blind_baseline_with_any_picture():
    class Constant:
        codec = None

        def batch(self, images, prompts, **options):
            return ["no"] * len(images)

    metrics = evaluate(Constant(), 60, ("is there",))["is there"]
    assert metrics["exact"] == metrics["shuffled"] <= metrics["blind"] < 70


def test_the_shipped_model_looks(tiny):
    told = []
    found = evaluate(tiny, 16, ("where", "segment"), lambda row, metrics: told.append(row))
    assert told == ["where", "segment"] and set(found["segment"]) == {"scenes", "iou", "shuffled"}
    assert found["where"]["exact"] > found["where"]["shuffled"] + 30
    assert found["segment"]["iou"] > found["segment"]["shuffled"] + 20


def test_answers_are_the_pipelines_own(tiny):
    asked, prompts, _ = row_questions("caption en", 5)
    images = [scene.image for scene in asked]
    assert predict(tiny, images, prompts, size=2) == [tiny(i, p) for i, p in zip(images, prompts)]


def test_bad_input(tiny):
    with pytest.raises(ValueError, match="no row 'capton'; expected of caption en"):
        evaluate(tiny, 10, ("capton",))
    with pytest.raises(ValueError, match="count is 1; shuffling needs 2"):
        evaluate(tiny, 1)
    with pytest.raises(ValueError, match="segment needs a mask codec"):
        evaluate(Pipeline(tiny.model, tiny.processor), 4, ("segment",))


# ---------------------------------------------------------------- another renderer


@pytest.mark.parametrize("family", other_renderer.FAMILIES)
def test_another_renderer_tells_the_truth(family):
    backgrounds = set()
    for seed in range(12):
        drawing = other_renderer.draw(seed, family)
        again = other_renderer.draw(seed, family)
        assert again.picture.tobytes() == drawing.picture.tobytes() and again.kinds == drawing.kinds
        assert drawing.picture.size == (448, 448) and 1 <= len(drawing.kinds) <= 5
        assert drawing.caption() == scenes.caption_of(drawing.kinds)
        centres = [x0 + x1 for x0, _, x1, _ in drawing.boxes]
        assert all(b - a >= 100 for a, b in itertools.pairwise(centres)), "left to right"
        for x0, y0, x1, y1 in drawing.boxes:
            assert 0 <= x0 < x1 <= 448 and 0 <= y0 < y1 <= 448
        backgrounds.add(drawing.picture.getpixel((0, 0)))
    assert len(backgrounds) > 6


def test_what_another_renderer_draws_is_inside_its_boxes():
    for seed in range(6):
        drawing = other_renderer.draw(seed, "plain")
        pixels = np.asarray(drawing.picture).astype(int)
        shows = np.abs(pixels - np.median(pixels.reshape(-1, 3), axis=0)).sum(2) > 60
        for x0, y0, x1, y1 in drawing.boxes:
            assert shows[y0:y1, x0:x1].mean() > 0.3
            shows[max(0, y0 - 4) : y1 + 4, max(0, x0 - 4) : x1 + 4] = False
        assert shows.mean() < 0.002


def test_another_renderers_scores(tiny, monkeypatch):
    found = other_renderer.measure_all(tiny, 3, ("plain", *other_renderer.NEW))
    assert set(found) == {"plain", "checks", "rings", "cells", "another renderer"}
    mean = np.mean([found[family]["detect"] for family in other_renderer.NEW])
    assert found["another renderer"]["detect"] == pytest.approx(mean)
    assert found["plain"]["detect"] > 60
