# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags
#     comment_magics: false
#     notebook_metadata_filter: kernelspec
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["navigation"]
# [← Mask codec](20_mask_codec.ipynb) | [contents](00_overview.ipynb) | [Quantization →](22_quantization.ipynb)

# %% [markdown]
# # 21 · Segmentation: how do twenty tokens become a mask in the picture?
#
# *35 minutes* · part IV, Answering
#
# **What you will be able to do**
#
# - cut a mask out along its box, resize it without losing what falls between pixels, and put it back;
# - write objects as twenty tokens and a name, and read them from untrusted text;
# - ask the trained model for masks, and say whether box or shape is at fault;
# - say why the threshold comes last.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("segmentation")

# %% [markdown]
# ## Setup
#
# From earlier lessons: the token loop ([18](18_generation.ipynb)), boxes, their parser and their scores
# ([19](19_detection.ipynb)), and the codec that writes a 64 × 64 square as sixteen codes
# ([20](20_mask_codec.ipynb)). The `#| export` cells become
# [segmentation.py](../paligemma/segmentation.py).

# %%
#| export
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

# %% tags=["setup"]
from importlib import resources

import matplotlib.pyplot as plt
from PIL import Image

from paligemma.checkpoint import load_model
from paligemma.generation import generate_steps
from paligemma.plotting import show_images
from paligemma.processor import Processor
from paligemma.support.course import check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS, draw_masks

ASSETS = resources.files("paligemma") / "assets"

# %% [markdown]
# ## The problem: a square in a picture
#
# The codec knows squares of 64 × 64 pixels. A picture has objects of any size, anywhere. What joins the
# two is the box: four location tokens say where and how large, and sixteen of the tokens `<seg000>` …
# `<seg127>` say what shape. Such a token is a **mask token**; its number is a code of the codec.
#
# The course's scene is composed of emoji, so their opaque pixels are exact masks:

# %%
PLACED = [("cat", 72, 300, 128, 6), ("dog", 236, 160, 124, -5), ("dog", 360, 310, 128, 4)]


def emoji_mask(name, side, degrees):
    """The opaque pixels of an emoji, bool[height, width]."""
    sprite = Image.open(ASSETS / "emoji" / f"{name}.png").convert("RGBA")
    sprite = sprite.resize((side, side), Image.Resampling.LANCZOS)
    sprite = sprite.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    return np.asarray(sprite.getchannel("A")) >= 128


# %%
names, masks = [name for name, *_ in PLACED], np.zeros((3, 448, 448), bool)
for mask, (name, x, y, side, degrees) in zip(masks, PLACED):
    shape = emoji_mask(name, side, degrees)
    top, left = y - shape.shape[0] // 2, x - shape.shape[1] // 2
    mask[top : top + shape.shape[0], left : left + shape.shape[1]] = shape

# %% [markdown]
# The box of a mask: its first and last row and column.


# %%
def box_around(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


boxes = [box_around(mask) for mask in masks]
print(*zip(names, boxes))

# %% tags=["hide-input"]
scene = sample_picture("scene")


def draw_small(masks, labels):
    """The scene at 280 pixels with masks on it; on smaller ones tags could not be read."""
    small = [np.asarray(Image.fromarray(mask).resize((280, 280))) for mask in masks]
    return draw_masks(scene.resize((280, 280)), small, labels)


show_images(
    [scene.resize((280, 280)), draw_small(masks, names)], ["the picture", "the truth"], height=3
)

# %% [markdown]
# ## By hand: resizing a line
#
# Each new pixel is a weighted mean of the old ones near it, and where pixels get fewer the weights reach
# further ([lesson 02](02_image_processor.ipynb)). For masks they form a *tent*: bilinear. Six pixels to
# four, the second new one:

# %%
line = [0, 0, 1, 1, 1, 0]
step = 6 / 4  # old pixels for each new one
middle = 1.5 * step  # of the second new pixel, counted in old ones
weights = [max(0, 1 - abs(middle - (i + 0.5)) / step) for i in range(6)]
by_hand = sum(w * value for w, value in zip(weights, line)) / sum(weights)
print([f"{w:.2f}" for w in weights], f"→ {by_hand:.2f}")

# %%
for size in (4, 12):
    pixels = torch.tensor(line).float()[None, None, None]  # [1, 1, 1, 6]
    new = F.interpolate(pixels, (1, size), mode="bilinear", antialias=True)[0, 0, 0].tolist()
    print(size, [f"{value:.3f}" for value in new])
    assert size != 4 or abs(new[1] - by_hand) < 1e-6

# %% [markdown]
# PyTorch's `antialias=True` does it once across and once down. So the module needs no resizing of its own.
#
# ## Cutting out, and putting back
#
# The plain forms, for a box of whole pixels inside the picture:


# %%
def cut(mask, box):
    x0, y0, x1, y1 = box
    inside = torch.from_numpy(mask[None, None, y0:y1, x0:x1]).float()
    return F.interpolate(inside, (64, 64), mode="bilinear", antialias=True)[0, 0]


# %%
def put_back(drawn, box, width, height):
    x0, y0, x1, y1 = box
    mask = np.zeros((height, width), dtype=bool)
    inside = F.interpolate(drawn[None, None], (y1 - y0, x1 - x0), mode="bilinear", antialias=True)
    mask[y0:y1, x0:x1] = inside[0, 0] > 0  # a drawing is -1 outside and 1 inside
    return mask


# %%
back = [put_back(2 * cut(mask, box) - 1, box, 448, 448) for mask, box in zip(masks, boxes)]
print("IoU after there and back:", [f"{mask_iou(b, m):.3f}" for b, m in zip(back, masks)])
assert mask_iou(np.stack(back), masks).min() > 0.99

# %% [markdown]
# There and back costs almost nothing: the square is fine enough.
#
# But boxes come from anywhere. A corner at 37.000000000000007 would count a pixel more, an object may
# hang over the edge of the picture, and a box may be thinner than a pixel. The published code rounds to
# whole pixels. So does ours, which also keeps to what lies inside the picture:


# %%
#| export
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


# %%
#| export
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


# %%
squares = crop_masks(boxes, masks)
for square, plain, mask, box in zip(squares, back, masks, boxes):
    assert torch.equal(square, cut(mask, box).clamp(0, 1))
    assert (paste_mask(2 * square - 1, box, 448, 448) == plain).all()

# %%
noisy = np.array(boxes) + 7e-15
assert torch.equal(crop_masks(noisy, masks), squares)
x0, y0, x1, y1 = boxes[0]
hanging = paste_mask(2 * squares[0] - 1, (x0 - 40, y0, x1 - 40, y1), 448, 448)
assert (hanging[:, :-40] == back[0][:, 40:]).all()  # the cat, partly out on the left

# %% [markdown]
# ## As tokens
#
# Twenty tokens an object, then its name: `<loc>` × 4, `<seg>` × 16. Objects are joined by ` ; `.


# %%
#| export
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


# %%
codec = MaskCodec.from_pretrained(ASSETS / "tiny")
texts = encode_segments(boxes, masks, codec, 448, 448)
answer = " ; ".join(f"{own} {name}" for own, name in zip(texts, names))
print(answer.split(" ; ")[0])

# %% [markdown]
# ## Reading
#
# `find_objects` of [lesson 19](19_detection.ipynb) already knows runs of `<seg>`. So reading a right
# answer is a loop of two lines:

# %%
for found, mask in zip(find_objects(answer), masks):
    drawn = codec.decode(torch.tensor([found.segs]))[0]
    own = paste_mask(drawn, decode_box(found.locs, 448, 448), 448, 448)
    print(found.label, f"IoU {mask_iou(own, mask):.2f}")
    assert mask_iou(own, mask) > 0.92

# %% [markdown]
# A model's answer is untrusted. `find_objects` names what is wrong with an object; here one without a mask
# is broken, too. What is left is drawn in one batch, and becomes a `Segment`.


# %%
#| export
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


# %%
#| export
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


# %%
#| export
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


# %% [markdown]
# Two functions for everybody else: of a text, and of tokens with their probabilities.


# %%
#| export
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


# %%
#| export
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


# %% [markdown]
# Every broken object is dropped and named; the good one survives:

# %%
LOCS, SEGS = texts[0][:36], texts[0][36:]
BROKEN = {
    "cut off": f"{LOCS}{SEGS[:72]}",
    "one token short": f"{LOCS}{SEGS[:-8]} cat",
    "no mask": f"{LOCS} cat",
    "no such token": f"{LOCS}{SEGS[:-8]}<seg128> cat",
}
for what, text in BROKEN.items():
    dropped = []
    kept = parse_segments(f"{text} ; {texts[1]} dog", 448, 448, codec, dropped)
    print(f"{what:15}", [s.label for s in kept], dropped[0][1])
    assert [s.label for s in kept] == ["dog"]

# %% [markdown]
# A missing name is no fault: published models that are asked with a sentence ("the cat on the left")
# answer with the twenty tokens alone (exercise 2).
#
# ## See it: the trained model's own masks
#
# The tiny model was trained to answer `segment cat ; dog`:

# %%
TINY = ASSETS / "tiny"
model, processor = load_model(TINY, dtype=torch.float32), Processor.from_pretrained(TINY)
tokenizer = processor.tokenizer
ask, log_probs = processor(scene, "segment cat ; dog"), []

# %%
steps = generate_steps(model, ask["input_ids"], ask["pixel_values"], log_probs=log_probs)
ids = [int(token) for token in steps]

# %%
answered = score_segments(ids, log_probs, tokenizer, *scene.size, codec)
for own in answered:
    print(own.label, f"score {own.score:.2f}, IoU {mask_iou(own.mask, masks).max():.2f}")
assert [own.label for own in answered] == names
assert min(mask_iou(own.mask, masks).max() for own in answered) > 0.7

# %% tags=["hide-input"]
shown = draw_small([own.mask for own in answered], [own.label for own in answered])
titles = ["the truth", "what the model wrote"]
fig = show_images([draw_small(masks, names), shown], titles, height=3)
save_figure(fig, "21_answer.png")

# %% [markdown]
# Both dogs lack part of an ear. Two things can be at fault: the codes may be others, and a box that is a
# few pixels off moves and stretches its whole mask. Put the model's codes into the true box, and the
# right codes into the model's box:

# %%
objects = find_masks(processor.decode(ids), codec)
written = codec.decode(torch.tensor([found.segs for found in objects]))
right = codec.decode(codec.encode(squares))

# %%
for own, its_codes in zip(answered, written):
    k = mask_iou(own.mask, masks).argmax()  # the true object that it fits best
    in_true_box = mask_iou(paste_mask(its_codes, boxes[k], 448, 448), masks[k])
    its_box = mask_iou(paste_mask(right[k], own.box, 448, 448), masks[k])
    print(f"{own.label}: its codes, true box {in_true_box:.2f}; right codes, its box {its_box:.2f}")
    assert in_true_box < its_box

# %% [markdown]
# For all three the codes cost more than the box.
#
# ## At full size
#
# Which step of the way there and back loses more of a shape, the square or the codes? A cat of every size:

# %%
sides, plain, coded = (24, 32, 48, 64, 96, 128, 192, 256, 384), [], []
for side in sides:
    shape = emoji_mask("cat", side, 6)
    box, (height, width) = box_around(shape), shape.shape
    own = crop_masks([box], shape[None])
    plain.append(mask_iou(paste_mask(2 * own[0] - 1, box, width, height), shape))
    drawn = codec.decode(codec.encode(own))[0]
    coded.append(mask_iou(paste_mask(drawn, box, width, height), shape))

# %%
print(f"least IoU, square only: {min(plain):.3f}; with sixteen codes: {min(coded):.2f}")
assert all(a > b for a, b in zip(plain, coded)) and min(plain) > 0.99

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(6, 2.7), layout="constrained")
ax.plot(sides, plain, "o-", color=COLOURS["muted"], label="square only")
ax.plot(sides, coded, "o-", color=COLOURS["accent"], label="square and sixteen codes")
ax.set(xscale="log", xlabel="side of the cat, pixels", ylabel="IoU", ylim=(0.8, 1.005))
ax.set_xticks(sides, sides)
ax.minorticks_off()
ax.legend(loc="lower right")
save_figure(fig, "21_sizes")

# %% [markdown]
# The codes, at every size. A square of 64 pixels loses under a hundredth.
#
# ## A bug people really make: the threshold first
#
# A mask is true or false, so a colleague makes it so at once: threshold the 64 × 64 drawing, then resize
# it to the box. Nothing complains, and the masks look right.


# %%
def paste_colleague(drawn, box, width, height):
    x0, y0, x1, y1 = box
    mask = np.zeros((height, width), dtype=bool)
    hard = (drawn > 0).float()[None, None]
    mask[y0:y1, x0:x1] = F.interpolate(hard, (y1 - y0, x1 - x0), mode="nearest")[0, 0] > 0.5
    return mask


# %%
for side in (32, 96, 384):
    truth = emoji_mask("cat", side, 6)
    box, (height, width) = box_around(truth), truth.shape
    drawn = 2 * crop_masks([box], truth[None])[0] - 1
    ours, theirs = (paste(drawn, box, width, height) for paste in (paste_mask, paste_colleague))
    lost = [1 - mask_iou(own, truth) for own in (ours, theirs)]
    print(f"cat of {side:3}: threshold last loses {lost[0]:.3f} of IoU, first {lost[1]:.3f}")
    assert lost[0] < 0.01 and lost[1] > 2 * lost[0] and lost[1] > 0.02

# %% tags=["hide-input"]
x0, y0 = box[:2]
views = [view[y0 : y0 + 110, x0 : x0 + 110] for view in (truth, ours, theirs)]
fig = show_images(views, ["truth", "threshold last", "threshold first"], height=2.4)
save_figure(fig, "21_stairs.png")

# %% [markdown]
# Here the cat of 384 pixels: stairs, each as high as a pixel of the square. The answers are a little
# worse, and nothing says so. The check: there and back must lose almost nothing, at any size.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): count before you run
#
# (a) How many tokens is the answer to `segment dog` with two dogs, when `dog` and ` ; ` are one token
# each? (b) A limit of 105 new tokens: how many objects of that kind can be whole, the end not counted?
# (c) How many objects does `parse_segments` find when the second of two lost one `<seg>`?

# %% tags=["exercise"]
answers = [None, None, None]  # your answer


# %% tags=["check"]
def test_1(answers):
    numbers = isinstance(answers, list | tuple) and [type(a) for a in answers] == [int] * 3
    assert numbers, "a list of three whole numbers, please"
    one = 4 + 16 + 1
    lost = f"{texts[0]} cat ; {texts[1][:-8]} dog"
    right = (2 * one + 1, (105 + 1) // (one + 1), len(parse_segments(lost, 448, 448, codec)))
    slips = {
        ("a", 2 * one): "(a) forgets what stands between them",
        ("a", 2 * one + 2): "(a) counts a separator behind the last one, too",
        ("a", 40): "(a) forgets the names",
        ("a", 2 * 17 + 1): "(a) forgets the corners",
        ("b", 105 // one): "(b) forgets the names, or what stands between objects",
        ("c", 2): "(c) takes an object with a broken mask for a good one",
        ("c", 0): "(c) loses a good object because of its neighbour",
    }
    for name, got, wanted in zip("abc", answers, right):
        assert got == wanted, slips.get((name, got), f"({name}) is not {got}")


check(test_1, answers)

# %% [markdown]
# <details><summary>Hint</summary>
#
# An object is corners, codes, name. What stands between two objects, and what behind the last?
#
# </details>

# %% tags=["solution"]
# 21 tokens each and one between; 4 × 21 + 3 = 87 fits, a fifth would need 22 more; one is broken.
answers = [43, 4, 1]
check(test_1, answers)

# %% [markdown]
# ### Exercise 2 (write): the answer to a sentence
#
# The published `refcoco` models are asked "the cat on the left" and answer with twenty tokens and no
# name. Their evaluator reads the first twenty ids. Write it: the mask, bool[height, width], or None where
# the ids are not four location tokens and sixteen mask tokens. Use `decode_box`, `codec.decode` and
# `paste_mask`; no text is needed.

# %% tags=["exercise"]
FIRST_LOC, FIRST_SEG = tokenizer.encode("<loc0000><seg000>")


def read_mask(ids, width, height):
    return None  # bool[height, width]


# %% tags=["check"]
def test_2(read_mask):
    def read(ids, what, width=448, height=448):
        try:
            got = read_mask(list(ids), width, height)
        except Exception as error:
            raise AssertionError(f"{what}: raises {type(error).__name__}: {error}") from None
        return got

    good = tokenizer.encode(texts[1])
    for width, height in ((448, 448), (300, 120)):
        (wanted,) = parse_segments(texts[1], width, height, codec)
        got = read(good, "a good answer", width, height)
        assert got is not None, "a good answer gives None"
        assert np.shape(got) == (height, width), f"{np.shape(got)} is not (height, width)"
        overlap = mask_iou(np.asarray(got) > 0, wanted.mask)
        why = "is the box the right way round?" if overlap < 0.3 else "box, threshold or codes?"
        assert overlap == 1, f"IoU {overlap:.2f} with the mask of this text: {why}"
        assert np.asarray(got).dtype == bool, "true and false, please, not numbers"
    more = [*good, tokenizer.eos_id, *good]
    assert read(more, "twenty and more") is not None, "what follows the twenty does not matter"
    name = tokenizer.encode(" dog")
    broken = {
        "nothing": [],
        "nineteen tokens": good[:-1],
        "fifteen mask tokens and a name": [*good[:-1], *name],
        "three location tokens": [*good[:3], *good[4:], good[-1]],
        "five location tokens": [good[0], *good[:-1]],
        "a name first": [*name, *good],
        "mask tokens first": [*good[4:], *good[:4]],
    }
    for what, ids in broken.items():
        assert read(ids, what) is None, f"{what}: this is no answer, and you give a mask"


check(test_2, read_mask)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Subtract the id of the first token of each kind: what must lie in 0 … 1023, and what in 0 … 127? How many
# are there of each?
#
# </details>


# %% tags=["solution"]
# Ids instead of text: a kind of token is a range of numbers.
def read_mask(ids, width, height):
    locs = [token - FIRST_LOC for token in ids[:4]]
    segs = [token - FIRST_SEG for token in ids[4:20]]
    legal = all(0 <= n < 1024 for n in locs) and all(0 <= n < 128 for n in segs)
    if len(segs) < 16 or not legal:
        return None
    drawn = codec.decode(torch.tensor([segs]))[0]
    return paste_mask(drawn, decode_box(locs, width, height), width, height)


check(test_2, read_mask)

# %% [markdown]
# ### Exercise 3 (extend): one picture of labels
#
# Masks of different objects may overlap. Many programs want one array instead: for each pixel the number
# of its segment in the list, -1 where there is none. Where several claim a pixel, the surest gets it; of
# equally sure ones the first.


# %% tags=["exercise"]
def label_map(segments, width, height):
    return None  # int array [height, width]


# %% tags=["check"]
def test_3(label_map):
    one, two = np.zeros((2, 3, 6), bool)
    one[:, :4] = two[1:, 2:] = True
    whole = (0, 0, 6, 3)
    for scores in ((0.5, 0.9), (0.9, 0.5), (0.7, 0.7)):
        parts = [Segment("a", whole, one, scores[0]), Segment("b", whole, two, scores[1])]
        got = label_map(parts, 6, 3)
        assert got is not None and np.shape(got) == (3, 6), "return an array [height, width]"
        alone = (int(got[0][0]), int(got[2][5]))
        assert alone == (0, 1), (
            f"pixels that only one claims have {alone}, not its number in the list"
        )
        assert got[0][5] == -1, f"a pixel that nobody claims has {got[0][5]}"
        first = 1 if scores[1] > scores[0] else 0
        assert got[2][2] == first, f"scores {scores}: another one gets the shared pixel"
    empty = label_map([], 6, 3)
    assert np.shape(empty) == (3, 6) and (np.asarray(empty) == -1).all(), (
        "no segments: nobody claims"
    )


check(test_3, label_map)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Paint from unsure to sure: who paints last, wins. What must the order be for equal scores?
#
# </details>


# %% tags=["solution"]
# Painting in this order makes the surest the last, and of equals the first.
def label_map(segments, width, height):
    labels = np.full((height, width), -1)
    for number in sorted(range(len(segments)), key=lambda n: (segments[n].score, -n)):
        labels[segments[number].mask] = number
    return labels


check(test_3, label_map)

# %% [markdown]
# ## Summary
#
# - A mask is cut out along its box, rounded to whole pixels, and resized to 64 × 64.
# - An object is four location tokens, sixteen mask tokens and a name, which may be missing.
# - Broken objects are dropped and named; the good ones are kept.
# - A box that is off moves and stretches its whole mask.
# - Threshold last, after resizing to the given picture.

# %% [markdown]
# ## Quiz
#
# **1.** A box in the answer is ten pixels too far to the left. What happens to the mask?
#
# <details><summary>Answer</summary>
#
# It moves along, and stays the same shape: codes say what is *inside the box*. A good shape cannot repair
# a bad box.
#
# </details>

# %% [markdown]
# **2.** Why does `encode_segments` ask for width and height, when the masks have them?
#
# <details><summary>Answer</summary>
#
# Because arrays are [height, width] and pictures say (width, height), and a mask that lies on its side
# still gives sixteen perfectly legal tokens. In a square picture nothing can be seen; in any other the
# sizes disagree, and that is an error here.
#
# </details>

# %% [markdown]
# **3.** Two objects overlap. Do their masks?
#
# <details><summary>Answer</summary>
#
# They may. Each object is written by itself, and nothing keeps two masks apart; a program that wants
# one label a pixel has to decide (exercise 3).
#
# </details>

# %% [markdown]
# ## References
#
# - Lucas Beyer et al., *PaliGemma: A versatile 3B VLM for transfer*, 2024 (the 128 mask tokens).
# - big_vision: `pp/proj/paligemma/segmentation.py` (masks to tokens) and
#   `evaluators/proj/paligemma/transfers/segmentation.py` (tokens to masks).
# - Licheng Yu et al., *Modeling Context in Referring Expressions*, 2016 (RefCOCO: asked with a sentence,
#   answered without a name).

# %% [markdown] tags=["navigation"]
# [← Mask codec](20_mask_codec.ipynb) | [contents](00_overview.ipynb) | [Quantization →](22_quantization.ipynb)
