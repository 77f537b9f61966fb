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
# # 21 · Segmentation: how do twenty words become a mask in the picture?
#
# *40 minutes* · part IV, Answering
#
# **What you will be able to do**
#
# - cut a mask out along its box, resize it without losing what falls between pixels, and put it back;
# - write objects as twenty words and a name, and read them from untrusted text;
# - ask the trained model for masks, and measure them;
# - say why the threshold comes last.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("segmentation")

# %% [markdown]
# ## Setup
#
# From earlier lessons: the token loop ([18](18_generation.ipynb)), boxes, their parser and their scores
# ([19](19_detection.ipynb)), and the codec that writes a 64 × 64 square as sixteen codes
# ([20](20_mask_codec.ipynb)). The cells that begin with `#| export` become
# [segmentation.py](../paligemma/segmentation.py).

# %%
#| export
"""Objects with masks: cut along the box, written as words, read from an answer, put back."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from paligemma.detection import Found, decode_box, encode_boxes, find_objects, score_objects
from paligemma.mask_codec import SIDE, MaskCodec
from paligemma.mask_codec import mask_iou as mask_iou  # for all who compare segments
from paligemma.tokenizer import Tokenizer

# %% tags=["setup"]
from importlib import resources

import matplotlib.pyplot as plt
from PIL import Image

from paligemma.checkpoint import load_model
from paligemma.generation import GenerationConfig, generate_steps
from paligemma.plotting import show_images
from paligemma.processor import Processor
from paligemma.support.course import check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS, draw_masks

ASSETS = resources.files("paligemma") / "assets"

# %% [markdown]
# ## The problem: a square in a picture
#
# The codec knows squares of 64 × 64 pixels. A picture has objects of any size and place. What joins the
# two is the box: four words say where and how large, sixteen say what shape.
#
# The course's scene is composed of emoji, so their opaque pixels are exact masks, and the boxes around
# them are exact too:

# %%
PLACED = [("cat", 72, 300, 128, 6), ("dog", 236, 160, 124, -5), ("dog", 360, 310, 128, 4)]


def emoji_mask(name, side, degrees):
    """The opaque pixels of an emoji, bool[h, w]."""
    sprite = Image.open(ASSETS / "emoji" / f"{name}.png").convert("RGBA")
    sprite = sprite.resize((side, side), Image.Resampling.LANCZOS)
    sprite = sprite.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    return np.asarray(sprite.getchannel("A")) >= 128


def box_around(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


names, masks = [name for name, *_ in PLACED], np.zeros((3, 448, 448), bool)
for mask, (name, x, y, side, degrees) in zip(masks, PLACED):
    shape = emoji_mask(name, side, degrees)
    h, w = shape.shape
    mask[y - h // 2 : y - h // 2 + h, x - w // 2 : x - w // 2 + w] = shape
boxes = [box_around(mask) for mask in masks]
scene = sample_picture("scene")
print(*zip(names, boxes))
show_images([scene, draw_masks(scene, masks, names)], ["the picture", "the truth"], height=2.6)

# %% [markdown]
# ## By hand: resizing a line
#
# Six pixels to four: each new pixel covers 1.5 old ones. Which old ones does it look at? A tent over
# its middle, as wide as 1.5 pixels to either side; the weights sum to 1. To twelve, each covers half
# an old one, and the tent stays one pixel wide to either side: it looks at the nearest two.


# %%
def resize_loop(line, size):
    """Bilinear, smoothed where pixels get fewer: a weighted mean for each new pixel."""
    step, new = len(line) / size, []
    reach = max(step, 1)
    for k in range(size):
        middle = (k + 0.5) * step
        weights = [max(0, 1 - abs(middle - (i + 0.5)) / reach) for i in range(len(line))]
        new.append(sum(w * value for w, value in zip(weights, line)) / sum(weights))
    return new


line = [0, 0, 1, 1, 1, 0]
for size in (4, 12):
    own = torch.tensor(resize_loop(line, size))
    theirs = F.interpolate(
        torch.tensor(line).float()[None, None, None], (1, size), mode="bilinear", antialias=True
    )
    assert torch.allclose(own, theirs.flatten(), atol=1e-6)
    print(size, [f"{value:.2f}" for value in own])

# %% [markdown]
# That is `F.interpolate` with `antialias=True`, once across and once down. So the module needs no
# resizing of its own.
#
# ## Cutting out, and putting back
#
# The published code rounds the box to whole pixels, cuts, and resizes. Rounding also heals a corner at
# 37.000000000000007, which would otherwise count a pixel more.


# %%
#| export
def crop_masks(boxes: Sequence | np.ndarray, masks: Sequence | np.ndarray) -> torch.Tensor:
    """Cut each mask out along its box and resize it to the square that codes draw.

    Args:
        boxes: n boxes (x0, y0, x1, y1) in pixels, rounded to whole ones; the part inside the
            picture counts.
        masks: bool[n, H, W], each as large as the picture (of one or of several pictures).

    Returns:
        `float32[n, 64, 64]` in [0, 1].

    Raises:
        ValueError: not one mask for each box, or a box without inside.

    Source: big_vision, `pp/proj/paligemma/segmentation.py`: bilinear, antialiased.
    """
    corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    wholes = np.asarray(masks, dtype=bool)
    if not len(corners) and not wholes.size:
        return torch.zeros(0, SIDE, SIDE)
    if wholes.ndim != 3 or len(wholes) != len(corners):
        raise ValueError(
            f"{len(corners)} boxes and masks {list(wholes.shape)}; "
            "expected a mask [height, width] for each box"
        )
    sizes, squares = np.array(wholes.shape[:0:-1]), []  # (width, height)
    for box, mask in zip(corners, wholes):
        low, high = np.clip(box[:2], 0, sizes), np.clip(box[2:], 0, sizes)
        if not (low < high).all():
            raise ValueError(
                f"box {box.tolist()} has no inside in the picture; expected x0 < x1 and y0 < y1"
            )
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
        box: (x0, y0, x1, y1), pixels, rounded to whole ones; parts beyond the picture are cut off.
        width, height: of the picture, pixels.

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
square = crop_masks(boxes, masks)
back = np.stack([paste_mask(2 * own - 1, box, 448, 448) for own, box in zip(square, boxes)])
print("IoU after there and back:", [f"{value:.3f}" for value in mask_iou(back, masks)])
assert mask_iou(back, masks).min() > 0.98

# %% [markdown]
# There and back, without any codes yet, costs almost nothing.
#
# ## As words
#
# Twenty words an object, then its name: `<loc>` × 4, `<seg>` × 16. Objects are joined by ` ; `.
# For reading, `find_objects` of [lesson 19](19_detection.ipynb) already knows runs of `<seg>`, and
# names what is wrong; here an object *without* a mask is broken, too. A missing name is no fault: models
# that are asked with a sentence answer with the twenty words alone.


# %%
#| export
def encode_segments(
    boxes: Sequence | np.ndarray,
    masks: Sequence | np.ndarray,
    codec: MaskCodec,
    width: int,
    height: int,
) -> list[str]:
    """Write each object's box and mask as twenty words.

    Args:
        boxes: n boxes (x0, y0, x1, y1), pixels.
        masks: bool[n, height, width], as large as the picture; those of several pictures of one
            size may be encoded together, which is faster.
        codec: with an encoder.
        width, height: of the picture, pixels.

    Returns:
        "<loc>×4<seg>×16" for each.

    Raises:
        ValueError: masks of another size, and as in `encode_boxes`, `crop_masks`, `encode`.
    """
    words, squares = encode_boxes(boxes, width, height), crop_masks(boxes, masks)
    size = list(np.shape(masks)[1:])
    if words and size != [height, width]:
        turned = ": transpose them" if size == [width, height] else ""
        raise ValueError(f"masks are {size}; expected [height, width], {[height, width]}{turned}")
    codes = codec.encode(squares).tolist()
    return [w + "".join(f"<seg{code:03d}>" for code in own) for w, own in zip(words, codes)]


@dataclass(frozen=True, eq=False)
class Segment:
    """One object that was found, with its shape.

    Args:
        label: its name, as the model wrote it; "" where it wrote none.
        box: (x0, y0, x1, y1) in pixels of the given picture.
        mask: bool[H, W], as large as the given picture.
        score: how sure the model was, 0 to 1; 1 where nothing is known.
    """

    label: str
    box: tuple[float, float, float, float]
    mask: np.ndarray
    score: float = 1.0


# %%
#| export
def parse_segments(
    text: str, width: int, height: int, codec: MaskCodec, dropped: list | None = None
) -> list[Segment]:
    """Read the objects with masks of a model's answer; whatever the text, it raises nothing.

    Args:
        text: "<loc>×4<seg>×16 label" joined by " ; ", with anything around; an object without a
            label has the label "".
        width, height: of the picture, pixels.
        codec: draws the masks.
        dropped: a list that gets (piece of text, what is wrong with it) for each broken object.

    Returns:
        The well-formed objects, in order, with score 1.

    Raises:
        ValueError: a picture without size.
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
    """`parse_segments` of an answer given as tokens, each object with its score.

    Args:
        ids: the tokens of one answer.
        log_probs: of each token, as `generate_steps` collects them.
        tokenizer: spells them.
        width, height, codec, dropped: as in `parse_segments`.

    Returns:
        The well-formed objects, in order.
    """
    objects = find_masks(tokenizer.decode(ids), codec, dropped)
    scores = score_objects(objects, ids, log_probs, tokenizer)
    return draw_segments(objects, scores, width, height, codec)


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


def draw_segments(
    objects: Sequence[Found], scores: Iterable[float], width: int, height: int, codec: MaskCodec
) -> list[Segment]:
    """Draw all masks in one batch and put each into its box."""
    if not all(size > 0 and int(size) == size for size in (width, height)):
        raise ValueError(f"the picture is {width} × {height}; expected whole numbers of pixels")
    if not objects:
        return []
    drawings = codec.decode(torch.tensor([found.segs for found in objects]))
    segments = []
    for found, drawn, score in zip(objects, drawings, scores):
        box = decode_box(found.locs, width, height)
        mask = paste_mask(drawn, box, int(width), int(height))
        segments.append(Segment(found.label, box, mask, score))
    return segments


# %%
codec = MaskCodec.from_pretrained(ASSETS / "tiny")
words = encode_segments(boxes, masks, codec, 448, 448)
answer = " ; ".join(f"{own} {name}" for own, name in zip(words, names))
print(answer.replace(" ; ", " ;\n"))
segments = parse_segments(answer, 448, 448, codec)
for own, mask in zip(segments, masks):
    print(own.label, own.mask.shape, own.mask.dtype, f"IoU {mask_iou(own.mask, mask):.2f}")
    assert mask_iou(own.mask, mask) > 0.9
shown = draw_masks(scene, [s.mask for s in segments], [s.label for s in segments])
titles = ["the given picture", "read from the text above"]
fig = show_images([scene.resize((300, 300)), shown.resize((300, 300))], titles, height=2.9)
save_figure(fig, "21_scene.png")

# %% [markdown]
# A model's answer is untrusted. Every broken object is dropped and named; the good one survives, and
# so does one without a name:

# %%
LOCS, SEGS = words[0][:36], words[0][36:]
BROKEN = {
    "cut off": f"{LOCS}{SEGS[:72]}",
    "one word short": f"{LOCS}{SEGS[:-8]} cat",
    "no mask": f"{LOCS} cat",
    "no such word": f"{LOCS}{SEGS[:-8]}<seg128> cat",
}
for what, text in BROKEN.items():
    dropped = []
    kept = parse_segments(f"{text} ; {words[1]} dog", 448, 448, codec, dropped)
    print(f"{what:15}", [s.label for s in kept], dropped[0][1])
(nameless,) = parse_segments(f"{LOCS}{SEGS}", 448, 448, codec)
assert nameless.label == "" and (nameless.mask == segments[0].mask).all()

# %% [markdown]
# ## See it: the trained model's own masks
#
# The tiny model was trained to answer `segment cat ; dog`. Each object is compared with the true mask
# that fits it best:

# %%
TINY = ASSETS / "tiny"
model, processor = load_model(TINY, dtype=torch.float32), Processor.from_pretrained(TINY)
inputs, log_probs = processor(scene, "segment cat ; dog"), []
steps = generate_steps(
    model,
    inputs["input_ids"],
    inputs["pixel_values"],
    config=GenerationConfig(max_new_tokens=100),
    log_probs=log_probs,
)
ids = [int(token) for token in steps]
log_probs = [float(log_prob) for log_prob in log_probs]
answered = score_segments(ids, log_probs, processor.tokenizer, *scene.size, codec)
objects = find_masks(processor.decode(ids), codec)
letters, right_letters = codec.decode(torch.tensor([o.segs for o in objects])), codec.encode(square)
right_letters = codec.decode(right_letters)
fits = []
for own, drawn in zip(answered, letters):
    overlaps = mask_iou(own.mask, masks)
    true, fit = masks[overlaps.argmax()], overlaps.max()
    fits.append(fit)
    in_true_box = mask_iou(paste_mask(drawn, boxes[overlaps.argmax()], 448, 448), true)
    its_box = mask_iou(paste_mask(right_letters[overlaps.argmax()], own.box, 448, 448), true)
    print(f"{own.label:5} score {own.score:.2f}, IoU {fit:.2f};", end=" ")
    print(
        f"its letters in the true box {in_true_box:.2f}, the right letters in its box {its_box:.2f}"
    )
assert answered and max(fits) > 0.5
shown = draw_masks(scene, [s.mask for s in answered], [s.label for s in answered])
titles = ["the truth", "what the model wrote"]
fig = show_images([draw_masks(scene, masks, names), shown], titles, height=2.9)
save_figure(fig, "21_answer.png")

# %% [markdown]
# What to notice: two things can go wrong. The letters may be others, and a box that is a few pixels off
# moves and stretches its whole mask. The smaller of the last two numbers says which of them costs more.

# %% [markdown]
# ## At full size
#
# Which step loses more of a shape, the square or the letters? A cat of every size, there and back. It is
# the letters, at every size from 48 pixels on:

# %%
sides, plain, coded = (24, 32, 48, 64, 96, 128, 192, 256, 384), [], []
for side in sides:
    shape = emoji_mask("cat", side, 6)
    box = box_around(shape)
    own = crop_masks([box], shape[None])
    h, w = shape.shape
    plain.append(mask_iou(paste_mask(2 * own[0] - 1, box, w, h), shape))
    coded.append(mask_iou(paste_mask(codec.decode(codec.encode(own))[0], box, w, h), shape))
assert all(a > b for side, a, b in zip(sides, plain, coded) if side >= 48)
fig, ax = plt.subplots(figsize=(5.4, 2.6), layout="constrained")
ax.plot(sides, plain, "o-", color=COLOURS["muted"], label="square only")
ax.plot(sides, coded, "o-", color=COLOURS["accent"], label="square and sixteen codes")
ax.set(
    xscale="log", xticks=sides, xticklabels=sides, xlabel="side of the cat, pixels", ylabel="IoU"
)
ax.minorticks_off()
ax.set_ylim(0.8, 1.005)
ax.legend(loc="lower right")
save_figure(fig, "21_sizes")

# %% [markdown]
# ## A bug people really make: the threshold first
#
# A mask is true or false, so a colleague makes it so at once: threshold the 64 × 64 drawing, then resize
# it to the box. Nothing complains, and small objects look the same. On a large one the edge gets stairs,
# 6 pixels each here:


# %%
def paste_colleague(drawn, box, width, height):
    """The same, but pixels of the square are cut to true and false before they are resized."""
    mask = np.zeros((height, width), dtype=bool)
    x0, y0, x1, y1 = (round(value) for value in box)
    hard = (drawn > 0).float()[None, None]
    mask[y0:y1, x0:x1] = F.interpolate(hard, (y1 - y0, x1 - x0), mode="nearest")[0, 0] > 0.5
    return mask


truth = emoji_mask("cat", 384, 6)
box, (h, w) = box_around(truth), truth.shape
drawn = 2 * crop_masks([box], truth[None])[0] - 1
views = [truth, paste_mask(drawn, box, w, h), paste_colleague(drawn, box, w, h)]
ious = [mask_iou(view, truth) for view in views]
assert 1 - ious[2] > 2 * (1 - ious[1])
titles = [f"{what}: {v:.3f}" for what, v in zip(("truth", "threshold last", "first"), ious)]
x0, y0 = box[:2]
fig = show_images([view[y0 : y0 + 110, x0 : x0 + 110] for view in views], titles, height=2.2)
save_figure(fig, "21_stairs.png")

# %% [markdown]
# The answers are a little worse, for ever. The check that exposes it is not to look at a small picture
# but to compute: there and back on a *large* mask, where the square should lose almost nothing. With the
# threshold first it loses more than twice as much.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): count before you run
#
# (a) How many words is the answer to `segment dog` with two dogs, when `dog` and ` ; ` are one word
# each? (b) A limit of 105 new tokens: how many objects of that kind can be whole, one word a name and
# one between two, the end not counted? (c) How many objects does `parse_segments` find when the second
# of two boxes lost one `<seg>`?

# %% tags=["exercise"]
answers = [None, None, None]  # your answer


# %% tags=["check"]
def test_1(answers):
    assert len(answers) == 3 and None not in answers, "three numbers"
    one = 4 + 16 + 1
    lost = f"{words[0]} cat ; {words[1][:-8]} dog"
    right = (2 * one + 1, (105 + 1) // (one + 1), len(parse_segments(lost, 448, 448, codec)))
    for name, got, wanted in zip("abc", answers, right):
        assert got == wanted, f"({name}) is not {got}"


check(test_1, answers)

# %% [markdown]
# <details><summary>Hint</summary>
#
# An object is corners, letters, name: 21 words. Between two objects stands one word more.
#
# </details>

# %% tags=["solution"]
answers = [43, 4, 1]
check(test_1, answers)

# %% [markdown]
# ### Exercise 2 (fill in): put it back
#
# Write `paste_mask` for a box of whole pixels that lies inside the picture: resize `drawn` to the box's
# size, *then* ask where it is above 0.


# %% tags=["exercise"]
def paste(drawn, box, width, height):
    return None  # bool[height, width]


# %% tags=["check"]
def test_2(paste):
    torch.manual_seed(0)
    for width, height, box in ((90, 40, (7, 3, 47, 33)), (300, 200, (10, 20, 290, 160))):
        drawn = F.interpolate(torch.randn(1, 1, 8, 8), (64, 64), mode="bicubic")[0, 0]
        got = paste(drawn, box, width, height)
        assert got is not None and np.shape(got) == (height, width), "an array of height × width"
        got = np.asarray(got, dtype=bool)
        x0, y0, x1, y1 = box
        outside = got.copy()
        outside[y0:y1, x0:x1] = False
        assert not outside.any(), "something is true outside the box"
        wrong = (got != paste_mask(drawn, box, width, height)).sum()
        assert wrong == 0, (
            f"{wrong} pixels of {width} × {height} differ: in which order do you work?"
        )


check(test_2, paste)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `F.interpolate` wants [batch, channel, height, width], a size (height, width), and here
# `mode="bilinear", antialias=True`.
#
# </details>


# %% tags=["solution"]
def paste(drawn, box, width, height):
    x0, y0, x1, y1 = box
    mask = np.zeros((height, width), dtype=bool)
    size = (y1 - y0, x1 - x0)
    inside = F.interpolate(drawn[None, None], size, mode="bilinear", antialias=True)[0, 0]
    mask[y0:y1, x0:x1] = inside > 0  # the threshold last
    return mask


check(test_2, paste)

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
    left, right = np.zeros((2, 3, 6), bool)
    left[:, :4] = right[1:, 2:] = True
    whole = (0, 0, 6, 3)
    for scores in ((0.5, 0.9), (0.9, 0.5), (0.7, 0.7)):
        parts = [Segment("a", whole, left, scores[0]), Segment("b", whole, right, scores[1])]
        got = label_map(parts, 6, 3)
        assert got is not None and np.shape(got) == (3, 6), "an array of height × width"
        first = 1 if scores[1] > scores[0] else 0
        assert got[2][2] == first, f"scores {scores}: the surest gets the shared pixel"
        assert (got[0][0], got[2][5], got[0][5]) == (0, 1, -1), "own pixels, and -1 for none"
    assert (np.asarray(label_map([], 6, 3)) == -1).all(), "no segments: all -1"


check(test_3, label_map)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Paint from unsure to sure: who paints last, wins. Sort the numbers 0, 1, … by (score, -number).
#
# </details>


# %% tags=["solution"]
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
# - An object is twenty words and a name, which may be missing.
# - Broken objects are dropped and named; the good ones are kept.
# - Masks cannot be better than their boxes.
# - Threshold last, after resizing to the given picture.

# %% [markdown]
# ## Quiz
#
# **1.** A box in the answer is ten pixels too far to the left. What happens to the mask?
#
# <details><summary>Answer</summary>
#
# It moves along, and stays the same shape: letters say what is *inside the box*. So IoU of masks is
# limited by the boxes, and a good mask cannot repair a bad one.
#
# </details>

# %% [markdown]
# **2.** Why does `encode_segments` ask for width and height, when the masks have them?
#
# <details><summary>Answer</summary>
#
# Because arrays are [height, width] and pictures say (width, height), and a mask that lies on its side
# still gives sixteen perfectly legal words. In a square picture nothing can be seen; in any other the
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
# - Lucas Beyer et al., *PaliGemma: A versatile 3B VLM for transfer*, 2024 (the 128 segmentation words).
# - big_vision: `pp/proj/paligemma/segmentation.py` (masks to words) and
#   `evaluators/proj/paligemma/transfers/segmentation.py` (words to masks).
# - Licheng Yu et al., *Modeling Context in Referring Expressions*, 2016 (RefCOCO: asked with a sentence,
#   answered without a name).

# %% [markdown] tags=["navigation"]
# [← Mask codec](20_mask_codec.ipynb) | [contents](00_overview.ipynb) | [Quantization →](22_quantization.ipynb)
