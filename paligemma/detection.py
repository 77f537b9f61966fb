# Exported from notebooks/19_detection.ipynb — edit there, then run `make sync`.
"""Boxes as location tokens: write them, read them from untrusted text, measure their quality."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from paligemma.support.arguments import as_text, check_boxes, check_size
from paligemma.tokenizer import Tokenizer


def encode_boxes(boxes: Iterable[Sequence[float]], width: float, height: float) -> list[str]:
    """Write each box (x0, y0, x1, y1), in pixels, as location tokens: y0 x0 y1 x1.

    What lies outside the picture is clipped.

    Raises:
        ValueError: no four finite numbers, an edge beyond its opposite, a picture without size.

    Source: big_vision, `pp/proj/paligemma`: round(v · 1023), clipped to 0 … 1023.
    """
    check_size(width, height)
    texts = []
    for x0, y0, x1, y1 in check_boxes(boxes):
        shares = (y0 / height, x0 / width, y1 / height, x1 / width)
        texts.append("".join(f"<loc{round(1023 * min(max(v, 0), 1)):04d}>" for v in shares))
    return texts


OBJECT = re.compile(r"((?:<loc\d{4}>\s*)+)((?:<seg\d{3}>\s*)*)([^;<>\n]*)", re.ASCII)


@dataclass(frozen=True)
class Found:
    """One object in a text: its numbers are text[start:name], its name is text[name:end]."""

    start: int
    name: int
    end: int
    locs: tuple[int, ...]  # y0 x0 y1 x1 of a box
    segs: tuple[int, ...]  # none, or the sixteen numbers of a mask
    label: str  # "" where none follows
    problem: str | None  # why it cannot be used; None: it is well formed


def find_objects(text: str) -> Iterator[Found]:
    """Yield every run of `<loc>` with what follows it, well formed or not, in order.

    Of a run of more than four, what is before the last four is yielded by itself, as a problem.
    """
    for match in OBJECT.finditer(as_text(text)):
        words = list(re.finditer(r"<loc(\d{4})>", match[1], re.ASCII))
        numbers = [int(word[1]) for word in words]
        start, surplus, locs = match.start(), numbers[:-4], tuple(numbers[-4:])
        if surplus:
            middle = start + words[-4].start()
            problem = f"{len(surplus)} <loc> before the last 4"
            yield Found(start, middle, middle, tuple(surplus), (), "", problem)
            start = middle
        segs = tuple(int(number) for number in re.findall(r"\d{3}", match[2], re.ASCII))
        problem = None
        if len(locs) < 4:
            problem = f"{len(locs)} <loc>, expected 4"
        elif max(locs) > 1023 or max(segs, default=0) > 127:
            problem = "a number beyond <loc1023> or <seg127>"
        elif len(segs) not in (0, 16):
            problem = f"{len(segs)} <seg>, expected 16 or none"
        elif locs[2] <= locs[0] or locs[3] <= locs[1]:
            problem = "a box without inside"
        yield Found(start, match.start(3), match.end(), locs, segs, match[3].strip(), problem)


@dataclass(frozen=True)
class Detection:
    """One object that was found.

    Args:
        label: its name, as the model wrote it; "" where it wrote none.
        box: (x0, y0, x1, y1) in pixels of the given picture.
        score: how sure the model was, 0 to 1; 1 where nothing is known.
    """

    label: str
    box: tuple[float, float, float, float]
    score: float = 1.0


def decode_box(
    locs: Sequence[int], width: float, height: float
) -> tuple[float, float, float, float]:
    """Four numbers 0 … 1023, y0 x0 y1 x1, as (x0, y0, x1, y1) in pixels."""
    y0, x0, y1, x1 = (number / 1023 for number in locs)
    return x0 * width, y0 * height, x1 * width, y1 * height


def parse_detections(
    text: str, width: float, height: float, dropped: list | None = None
) -> list[Detection]:
    """Read the objects of a model's answer; no text makes it raise, a picture without size does.

    Args:
        text: "<loc>×4 label" joined by " ; ", with anything around; a mask's `<seg>` are skipped,
            and an object without a label has the label "".
        width, height: of the given picture, pixels.
        dropped: a list that gets (part of the text, what is wrong with it) for each broken object.
    """
    check_size(width, height)
    detections = []
    for found in find_objects(text):
        if found.problem is None:
            detections.append(Detection(found.label, decode_box(found.locs, width, height)))
        elif dropped is not None:
            dropped.append((text[found.start : found.end].strip(), found.problem))
    return detections


def score_objects(
    objects: Iterable[Found],
    ids: Sequence[int],
    log_probs: Sequence[float],
    tokenizer: Tokenizer,
) -> list[float]:
    """How sure the model was of each object, 0 to 1, place and name apart.

    Args:
        objects: from `find_objects(tokenizer.decode(ids))`.
        ids, log_probs: the tokens of the answer, and the logarithm of each one's probability.
    """
    ids = [int(token) for token in ids]
    ends = [len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
    # a token that writes nothing, as the end-of-sequence, belongs to no object
    written = [(end, float(p)) for start, end, p in zip([0, *ends], ends, log_probs) if start < end]
    scores = []
    for found in objects:
        place = [p for end, p in written if found.start < end <= found.name]
        name = [p for end, p in written if found.name < end <= found.end]
        means = [sum(part) / len(part) for part in (place, name) if part]
        scores.append(min(1.0, math.exp(sum(means) / len(means))) if means else 0.0)
    return scores


def score_detections(
    ids: Sequence[int],
    log_probs: Sequence[float],
    tokenizer: Tokenizer,
    width: float,
    height: float,
    dropped: list | None = None,
) -> list[Detection]:
    """`parse_detections` of an answer given as tokens, each object with its score."""
    text = tokenizer.decode(ids)
    detections = parse_detections(text, width, height, dropped)
    objects = [found for found in find_objects(text) if found.problem is None]
    scores = score_objects(objects, ids, log_probs, tokenizer)
    return [Detection(d.label, d.box, score) for d, score in zip(detections, scores)]


def box_iou(a: Sequence | torch.Tensor, b: Sequence | torch.Tensor) -> torch.Tensor:
    """Intersection over union of every box in `a` with every box in `b`.

    Returns:
        `float64[len(a), len(b)]`, 0 (apart) to 1 (equal); 0 for two boxes without area.
    """
    first = torch.as_tensor(a, dtype=torch.float64).reshape(-1, 4)
    second = torch.as_tensor(b, dtype=torch.float64).reshape(-1, 4)
    low = torch.maximum(first[:, None, :2], second[None, :, :2])  # [len(a), len(b), 2]
    high = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)  # [len(a), len(b)]
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1] - shared
    return torch.where(union > 0, shared / union, 0.0)


def match_boxes(scores: Sequence[float], ious: torch.Tensor, threshold: float = 0.5) -> list[int]:
    """Give each detection at most one true box: the surest chooses first.

    Args:
        scores: of the detections.
        ious: `float[detections, true boxes]` from `box_iou`; from `threshold` on a pair fits.

    Returns:
        For each detection the number of its true box, or -1.

    Source: pycocotools, `cocoeval.py` (of equal overlaps the last true box is taken).
    """
    chosen, taken = [-1] * len(scores), set()
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        best = threshold
        for j, overlap in enumerate(ious[i].tolist()):
            if j not in taken and overlap >= best:
                chosen[i], best = j, overlap
        taken.add(chosen[i])
    return chosen


def average_precision(
    found: Sequence[Sequence[Detection]],
    truth: Sequence[Sequence[Detection]],
    label: str,
    threshold: float = 0.5,
) -> float:
    """Average precision for one kind of object over many pictures, 0 to 1.

    Args:
        found, truth: for each picture what was detected, and what is there.
        label: the kind; NaN where it is in no picture.
        threshold: least IoU that counts as found.

    Source: COCO's definition (101 recalls), pycocotools, `cocoeval.py`.
    """
    if len(found) != len(truth):
        raise ValueError(f"found has {len(found)} pictures, truth {len(truth)}; expected equal")
    hits, total = [], 0  # (score, was it right?)
    for detections, objects in zip(found, truth):
        own = [d for d in detections if d.label == label]
        there = [d.box for d in objects if d.label == label]
        scores = [d.score for d in own]
        chosen = match_boxes(scores, box_iou([d.box for d in own], there), threshold)
        hits += [(score, j >= 0) for score, j in zip(scores, chosen)]
        total += len(there)
    if total == 0:
        return math.nan
    hits.sort(key=lambda hit: -hit[0])
    right = torch.tensor([hit for _, hit in hits], dtype=torch.float64).cumsum(0)
    precision = right / torch.arange(1, len(hits) + 1)
    precision = precision.flip(0).cummax(0).values.flip(0)  # the best from here on
    reached = torch.searchsorted(right / total, torch.linspace(0, 1, 101, dtype=torch.float64))
    return float(torch.cat([precision, precision.new_zeros(1)])[reached].mean())
