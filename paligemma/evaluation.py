# Exported from notebooks/28_evaluation.ipynb — edit there, then run `make sync`.
"""How good a model is: scores of answers, boxes and masks, with intervals and controls."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from paligemma import scenes
from paligemma.detection import box_iou, match_boxes, parse_detections
from paligemma.inference import Pipeline
from paligemma.mask_codec import MaskCodec, mask_iou
from paligemma.segmentation import parse_segments


def exact_match(predictions: Sequence[str], truths: Sequence[str]) -> float:
    """Percent of answers that are right in every character."""
    return 100 * float(np.mean([a == b for a, b in zip(predictions, truths, strict=True)]))


def interval(percent: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The true shares, percent, that would make `percent` of `count` answers likely.

    Args:
        percent: what was found.
        count: answers.
        z: deviations to each side; 1.96 for 95 %.

    Source: Wilson 1927.
    """
    p = percent / 100
    middle = p + z * z / (2 * count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    low, high = ((middle + side * half) / (1 + z * z / count) for side in (-1, 1))
    return 100 * max(0.0, low), 100 * min(1.0, high)


def _match(ious: np.ndarray, threshold: float) -> list[float]:
    """Overlaps of pairs, each row and column in one at most; who overlaps most chooses first."""
    if not ious.size:
        return []
    tensor = box_iou([], []).new_tensor(ious)
    chosen = match_boxes(tensor.max(1).values.tolist(), tensor, threshold)
    return [float(ious[i, j]) for i, j in enumerate(chosen) if j >= 0]


def box_metrics(
    predictions: Sequence[str], truths: Sequence[str], threshold: float = 0.5
) -> dict[str, float]:
    """Detections as the model spells them against the true ones, spelled the same way.

    Returns:
        percent: "f1" at this overlap, "iou" the mean overlap of the matched boxes.
    """
    found, wanted, overlaps = 0, 0, []
    for prediction, truth in zip(predictions, truths, strict=True):
        boxes, true = (parse_detections(text, 1023, 1023) for text in (prediction, truth))
        found, wanted = found + len(boxes), wanted + len(true)
        same = [[b.label == t.label for t in true] for b in boxes]
        ious = box_iou([b.box for b in boxes], [t.box for t in true]).numpy()
        overlaps += _match(np.where(np.array(same, bool).reshape(ious.shape), ious, 0.0), threshold)
    f1 = 200 * len(overlaps) / max(1, found + wanted)
    return {"f1": f1, "iou": 100 * float(np.mean(overlaps)) if overlaps else 0.0}


def mask_metrics(
    predictions: Sequence[str],
    prompts: Sequence[str],
    asked: Sequence[scenes.Scene],
    codec: MaskCodec,
) -> dict[str, float]:
    """Masks as the model spells them against the visible pixels of the objects asked for.

    Returns:
        percent: "iou", the mean over all these objects.
    """
    overlaps = []
    for prediction, prompt, scene in zip(predictions, prompts, asked, strict=True):
        segments = parse_segments(prediction, scenes.SIZE, scenes.SIZE, codec)
        for name in dict.fromkeys(prompt.removeprefix("segment ").split(" ; ")):
            true = scene.masks[[scenes.NAMES[kind] == name for kind in scene.kinds]]
            drawn = [segment.mask for segment in segments if segment.label == name]
            ious = mask_iou(np.array(drawn)[:, None], true[None]) if drawn else np.zeros((0, 0))
            best = _match(ious, 1e-9)
            overlaps += best + [0.0] * (len(true) - len(best))
    return {"iou": 100 * float(np.mean(overlaps))}


ROWS = {  # row of the table: (task, language, how the scenes are made)
    "caption en": ("caption", "en", {}),
    "caption en, kinds never seen together": ("caption", "en", {"unseen": True}),
    "caption de": ("caption", "de", {}),
    "caption fr": ("caption", "fr", {}),
    "how many": ("count", "en", {}),
    "where": ("where", "en", {}),
    "is there": ("is there", "en", {}),
    "detect": ("detect", "en", {}),
    "segment": ("segment", "en", {}),
}


def row_questions(row: str, count: int) -> tuple[list[scenes.Scene], list[str], list[str]]:
    """The first `count` test scenes that this row's question fits: (scenes, prompts, answers)."""
    name, language, how = ROWS[row]
    asked, prompts, truths = [], [], []
    index = 0
    while len(asked) < count:
        scene = scenes.make_scene(index, "test", **how)
        prompt, truth = scenes.task(np.random.default_rng((11, index)), scene, name, language)
        if name != "where" or "where" in prompt:  # no clear place: it was asked "how many"
            asked.append(scene)
            prompts.append(prompt)
            truths.append(truth)
        index += 1
    return asked, prompts, truths


def predict(
    pipeline: Pipeline, images: Sequence, prompts: Sequence[str], size: int = 64
) -> list[str]:
    """Greedy answers, `size` at a time."""
    answers = []
    for first in range(0, len(images), size):
        part = slice(first, first + size)
        answers += pipeline.batch(images[part], list(prompts[part]), max_new_tokens=128)
    return answers


def row_score(row: str, predictions, prompts, truths, asked, codec) -> dict[str, float]:
    """Percent: "f1" and "iou" for detect, "iou" for segment, "exact" for all other rows."""
    if row == "detect":
        return box_metrics(predictions, truths)
    if row == "segment":
        return mask_metrics(predictions, prompts, asked, codec)
    return {"exact": exact_match(predictions, truths)}


def evaluate(
    pipeline: Pipeline,
    count: int = 1000,
    rows: Sequence[str] = tuple(ROWS),
    progress: Callable[[str, dict], object] | None = None,
) -> dict[str, dict[str, float]]:
    """Scores of a model on `count` test scenes a row, with its own pictures and with others'.

    Args:
        pipeline: from `paligemma.load`.
        count: scenes a row.
        rows: which of ROWS.
        progress: called with (row, metrics) after each.

    Returns:
        `{row: {"scenes", "exact", "shuffled", "blind"}}` in percent: "shuffled" is the score
        when each question is asked about the next scene's picture, "blind" that of the commonest
        answer. "detect" has "f1" and "iou" instead of "exact", "segment" has "iou"; no "blind".

    Raises:
        ValueError: an unknown row, fewer than two scenes, or masks without a codec.
    """
    if unknown := [row for row in rows if row not in ROWS]:
        raise ValueError(f"no row {unknown[0]!r}; expected of {', '.join(ROWS)}")
    if count < 2:
        raise ValueError(f"count is {count}; shuffling needs 2")
    if "segment" in rows and pipeline.codec is None:
        raise ValueError("segment needs a mask codec, and this model has none; leave the row out")
    result = {}
    for row in rows:
        asked, prompts, truths = row_questions(row, count)
        images, scores = [scene.image for scene in asked], []
        for shown in (images, images[1:] + images[:1]):
            predictions = predict(pipeline, shown, prompts)
            scores.append(row_score(row, predictions, prompts, truths, asked, pipeline.codec))
        metrics = {"scenes": count} | scores[0] | {"shuffled": next(iter(scores[1].values()))}
        if "exact" in metrics:
            metrics["blind"] = 100 * Counter(truths).most_common(1)[0][1] / count
        result[row] = metrics
        if progress:
            progress(row, metrics)
    return result
