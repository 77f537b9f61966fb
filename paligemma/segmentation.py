# Exported from notebooks/21_segmentation.ipynb — edit there, then run `make sync`.
"""Objects with masks: cut along the box, written as tokens, read from an answer, put back."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from paligemma.detection import Found, decode_box, encode_boxes, find_objects, score_objects
from paligemma.mask_codec import SIDE, MaskCodec
from paligemma.mask_codec import mask_iou as mask_iou  # for all who compare segments
from paligemma.support.arguments import check_size
from paligemma.tokenizer import Tokenizer


def crop_masks(boxes: Sequence | np.ndarray, masks: Sequence | np.ndarray) -> torch.Tensor:
    """Cut each mask out along its box and resize it to the square that codes draw.

    Args:
        boxes: (x0, y0, x1, y1) each, rounded to whole pixels; the part inside the picture counts.
        masks: one for each box, bool[height, width], of one or of several pictures.

    Returns:
        `float32[len(boxes), 64, 64]` in [0, 1].

    Source: big_vision, `pp/proj/paligemma/segmentation.py`: bilinear, antialiased.
    """
    corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    wholes = np.asarray(masks, dtype=bool)
    if not len(corners) and not wholes.size:
        return torch.zeros(0, SIDE, SIDE)
    if wholes.ndim != 3 or len(wholes) != len(corners):
        found = f"{len(corners)} boxes and masks {list(wholes.shape)}"
        raise ValueError(f"{found}; expected a mask [height, width] for each box")
    sizes, squares = np.array(wholes.shape[:0:-1]), []  # (width, height)
    for box, mask in zip(corners, wholes):
        low, high = np.clip(box[:2], 0, sizes), np.clip(box[2:], 0, sizes)
        if not (low < high).all():
            raise ValueError(f"box {box.tolist()} has no inside in the picture; x0 < x1, y0 < y1?")
        x0, y0 = np.minimum(low.round().astype(int), sizes - 1)
        x1, y1 = np.maximum(high.round().astype(int), (x0 + 1, y0 + 1))  # a pixel at least
        inside = torch.from_numpy(mask[None, None, y0:y1, x0:x1]).float()
        squares.append(F.interpolate(inside, (SIDE, SIDE), mode="bilinear", antialias=True)[0, 0])
    return torch.stack(squares).clamp(0, 1)  # rounding overshoots by 1e-7


def paste_mask(drawn: torch.Tensor, box: Sequence[float], width: int, height: int) -> np.ndarray:
    """Resize what codes draw to its box, and put it into the picture.

    Args:
        drawn: `float32[64, 64]`, inside where above 0.
        box: (x0, y0, x1, y1), rounded to whole pixels; parts beyond the picture are cut off.

    Returns:
        bool[height, width].
    """
    mask = np.zeros((height, width), dtype=bool)
    x0, y0, x1, y1 = (round(value) for value in box)
    if x0 < x1 and y0 < y1:
        drawn = drawn.float().cpu()[None, None]
        inside = F.interpolate(drawn, (y1 - y0, x1 - x0), mode="bilinear", antialias=True)[0, 0] > 0
        left, top, right, low = max(x0, 0), max(y0, 0), max(min(x1, width), 0), min(y1, height)
        part = inside[top - y0 : max(low - y0, 0), left - x0 : max(right - x0, 0)]
        mask[top : top + part.shape[0], left : left + part.shape[1]] = part.numpy()
    return mask


def encode_segments(
    boxes: Sequence | np.ndarray,
    masks: Sequence | np.ndarray,
    codec: MaskCodec,
    width: int,
    height: int,
) -> list[str]:
    """Write each object's box and mask as "<loc>×4<seg>×16".

    Args:
        boxes: (x0, y0, x1, y1) each, pixels.
        masks: one for each box, bool[height, width], as large as the picture; those of several
            pictures of one size may be encoded together, which is faster.
        codec: with an encoder.
        width, height: of the picture, pixels.
    """
    texts, squares = encode_boxes(boxes, width, height), crop_masks(boxes, masks)
    size = list(np.shape(masks)[1:])
    if texts and size != [height, width]:
        turned = ": transpose them" if size == [width, height] else ""
        raise ValueError(f"masks are {size}; expected [height, width], {[height, width]}{turned}")
    codes = codec.encode(squares).tolist()
    return [t + "".join(f"<seg{code:03d}>" for code in own) for t, own in zip(texts, codes)]


@dataclass(frozen=True, eq=False)
class Segment:
    """One object that was found, with its shape.

    Args:
        label: its name, as the model wrote it; "" where it wrote none.
        box: (x0, y0, x1, y1) in pixels of the given picture.
        mask: bool[height, width], as large as the given picture.
        score: how sure the model was, 0 to 1; 1 where nothing is known.
    """

    label: str
    box: tuple[float, float, float, float]
    mask: np.ndarray
    score: float = 1.0


def find_masks(text: str, codec: MaskCodec, dropped: list | None = None) -> list[Found]:
    """The well-formed objects of a text that have a mask; `dropped` as in `parse_segments`."""
    kept = []
    for found in find_objects(text):
        problem = found.problem
        if problem is None and not found.segs:
            problem = "0 <seg>, expected 16"
        elif problem is None and max(found.segs) >= codec.codes:
            problem = f"a number beyond <seg{codec.codes - 1:03d}>"
        if problem is None:
            kept.append(found)
        elif dropped is not None:
            dropped.append((text[found.start : found.end].strip(), problem))
    return kept


def draw_segments(
    objects: Sequence[Found], scores: Iterable[float], width: int, height: int, codec: MaskCodec
) -> list[Segment]:
    """Draw all masks in one batch and put each into its box."""
    check_size(width, height, whole=True)
    if not objects:
        return []
    drawings = codec.decode(torch.tensor([found.segs for found in objects]))
    segments = []
    for found, drawn, score in zip(objects, drawings, scores):
        box = decode_box(found.locs, width, height)
        mask = paste_mask(drawn, box, int(width), int(height))
        segments.append(Segment(found.label, box, mask, score))
    return segments


def parse_segments(
    text: str, width: int, height: int, codec: MaskCodec, dropped: list | None = None
) -> list[Segment]:
    """Read the objects with masks of a model's answer; no text makes it raise.

    Args:
        text: "<loc>×4<seg>×16 label" joined by " ; ", with anything around; an object without a
            label has the label "".
        width, height: of the given picture, whole pixels.
        codec: draws the masks.
        dropped: a list that gets (part of the text, what is wrong with it) for each broken object.
    """
    objects = find_masks(text, codec, dropped)
    return draw_segments(objects, [1.0] * len(objects), width, height, codec)


def score_segments(
    ids: Sequence[int],
    log_probs: Sequence[float],
    tokenizer: Tokenizer,
    width: int,
    height: int,
    codec: MaskCodec,
    dropped: list | None = None,
) -> list[Segment]:
    """`parse_segments` of an answer given as tokens, each object with its score."""
    objects = find_masks(tokenizer.decode(ids), codec, dropped)
    scores = score_objects(objects, ids, log_probs, tokenizer)
    return draw_segments(objects, scores, width, height, codec)
