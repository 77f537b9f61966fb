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
# [← Generation](18_generation.ipynb) | [contents](00_overview.ipynb) | [Mask codec →](20_mask_codec.ipynb)

# %% [markdown]
# # 19 · Detection: how does a sentence become boxes, and how good are they?
#
# *60 minutes* · part IV, Answering
#
# **What you will be able to do**
#
# - write a box as four words, and read boxes from text that nobody promised to be right;
# - turn the probabilities of words into a score for an object;
# - compute overlap, matching and average precision with a pencil, then as the reference does;
# - find the detection bug that hides in square pictures.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("detection")

# %% [markdown]
# ## Setup
#
# From earlier lessons: the `<loc>` words ([06](06_tokenizer.ipynb)), prompts
# ([14](14_processor.ipynb)), weights ([16](16_checkpoint.ipynb)) and the token loop
# ([18](18_generation.ipynb)). The cells that begin with `#| export` become
# [detection.py](../paligemma/detection.py).

# %%
#| export
"""Boxes as words: write them, read them from untrusted text, and measure how good they are."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from paligemma.tokenizer import Tokenizer

# %% tags=["setup"]
import random
from importlib import resources

import matplotlib.pyplot as plt
from PIL import Image
from safetensors.torch import load_file

from paligemma.checkpoint import load_model
from paligemma.generation import GenerationConfig, generate_steps
from paligemma.support.course import check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS, CYCLE, draw_boxes
from paligemma.plotting import show_images
from paligemma.processor import Processor

ASSETS = resources.files("paligemma") / "assets"

# %% [markdown]
# ## The problem: a model that can only write
#
# Detectors usually end in a special head that outputs numbers. PaliGemma has no such head. It is
# asked `detect cat ; dog`, and it *writes*: four words for the corners, then the name; objects are
# joined by ` ; `. No new layer, no new loss.
#
# To see a right answer we need a picture whose boxes we know. The course's scene was composed from
# emoji, so their opaque pixels give exact boxes.

# %%
PLACED = {  # name, centre x, centre y, side, degrees: how the pictures were composed
    "scene": [("cat", 72, 300, 128, 6), ("dog", 236, 160, 124, -5), ("dog", 360, 310, 128, 4)],
    "scene2": [("bee", 130, 130, 140, -8), ("tulip", 310, 290, 168, 3)],
    "scene3": [
        ("rocket", 96, 300, 140, 0),
        ("balloon", 230, 130, 120, 4),
        ("balloon", 364, 250, 132, -6),
    ],
}


def true_box(name, x, y, side, degrees):
    """(x0, y0, x1, y1) of an emoji's pixels that are not transparent, in the 448-pixel scene."""
    sprite = Image.open(ASSETS / "emoji" / f"{name}.png").convert("RGBA")
    sprite = sprite.resize((side, side), Image.Resampling.LANCZOS)
    sprite = sprite.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    box = sprite.getchannel("A").point(lambda alpha: 255 * (alpha > 24)).getbbox()
    left, top = x - sprite.width // 2, y - sprite.height // 2
    return left + box[0], top + box[1], left + box[2], top + box[3]


boxes = {scene: [true_box(*object_) for object_ in PLACED[scene]] for scene in PLACED}
labels = {scene: [name for name, *_ in PLACED[scene]] for scene in PLACED}
for name, box in zip(labels["scene"], boxes["scene"]):
    print(name, box)

# %% [markdown]
# ## By hand: a box in four words
#
# Divide each edge by the picture's size: now it lies between 0 and 1, whatever the picture. Multiply
# by 1023 and round: a whole number from 0 to 1023, one of the 1024 words `<loc0000>` … `<loc1023>`.
# **The order is y0 x0 y1 x1**: down before right.
#
# The way back is exact to half a step, 0.22 pixels here. The figure shows the whole answer beside
# what it says.

# %%
x0, y0, x1, y1 = boxes["scene"][0]
for edge, value in (("y0", y0), ("x0", x0), ("y1", y1), ("x1", x1)):
    number = round(value / 448 * 1023)
    print(f"{edge} = {value:3} → {value / 448:.4f} → {number:4} → back: {number / 1023 * 448:.2f}")

scene = sample_picture("scene")


def locs_of(box, width, height):
    x0, y0, x1, y1 = box
    shares = (y0 / height, x0 / width, y1 / height, x1 / width)
    return [round(1023 * share) for share in shares]


fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.9), layout="constrained")
left.imshow(draw_boxes(scene, boxes["scene"], labels["scene"]).resize((300, 300)))
left.set_axis_off()
right.set_axis_off()
right.text(0, 0.92, "detect cat ; dog", family="monospace", color=COLOURS["muted"])
for row, (name, box) in enumerate(zip(labels["scene"], boxes["scene"])):
    words = "".join(f"<loc{n:04d}>" for n in locs_of(box, 448, 448))
    colour = CYCLE[0 if name == "cat" else 1]
    style = {"family": "monospace", "fontsize": 7.5, "color": colour}
    right.text(0, 0.7 - 0.24 * row, words + "\n" + name + (" ;" if row < 2 else ""), **style)
save_figure(fig, "19_words.png")

# %% [markdown]
# ## The module, part one: writing
#
# The loop over boxes *is* the module here; there is nothing to vectorise in three boxes. What it adds
# is care: an edge outside the picture is clipped, and a box inside out is refused, for it would
# teach a model nonsense.


# %%
#| export
def encode_boxes(boxes: Iterable[Sequence[float]], width: float, height: float) -> list[str]:
    """Write each box as four words, in the order y0 x0 y1 x1.

    Args:
        boxes: (x0, y0, x1, y1) each, in pixels; clipped to the picture.
        width, height: of the picture, pixels.

    Returns:
        "<loc…><loc…><loc…><loc…>" for each box.

    Raises:
        ValueError: no four finite numbers, an edge beyond its opposite, a picture without size.

    Source: big_vision, `pp/proj/paligemma`: round(v · 1023), clipped to 0 … 1023.
    """
    _check_size(width, height)
    words = []
    for box in boxes:
        box = [float(value) for value in box]
        if len(box) != 4 or not all(map(math.isfinite, box)):
            raise ValueError(f"a box is {box}; expected four finite numbers x0, y0, x1, y1")
        x0, y0, x1, y1 = box
        if x1 < x0 or y1 < y0:
            raise ValueError(
                f"box {box} is inside out; expected x0, y0, x1, y1 with x0 ≤ x1 and y0 ≤ y1 "
                "(not width and height)"
            )
        shares = (y0 / height, x0 / width, y1 / height, x1 / width)
        words.append("".join(f"<loc{round(1023 * min(max(v, 0), 1)):04d}>" for v in shares))
    return words


def _check_size(width: float, height: float) -> None:
    if not (0 < width < math.inf and 0 < height < math.inf):
        raise ValueError(f"the picture is {width} × {height}; expected its size in pixels")


# %%
answers = {}
for name in PLACED:
    words = encode_boxes(boxes[name], 448, 448)
    answers[name] = " ; ".join(f"{w} {label}" for w, label in zip(words, labels[name]))
    print(answers[name])
assert encode_boxes([(-9, 0, 448, 900)], 448, 448) == ["<loc0000><loc0000><loc1023><loc1023>"]

# %% [markdown]
# ## Reading, the plain way
#
# Split at the semicolons, take four numbers, the rest is the name. On a right answer this works:


# %%
def read_plain(text, width, height):
    found = []
    for part in text.split(" ; "):
        y0, x0, y1, x1 = (int(part[9 * i + 4 : 9 * i + 8]) / 1023 for i in range(4))
        found.append((part[36:].strip(), [x0 * width, y0 * height, x1 * width, y1 * height]))
    return found


for label, box in read_plain(answers["scene"], 448, 448):
    print(label, [round(value, 1) for value in box])

# %% [markdown]
# But a model's answer is **untrusted input**. It may stop in mid-box because the token limit was
# reached, forget a name, repeat the prompt, or just talk. Each of these has been seen:

# %%
GOOD = "<loc0100><loc0200><loc0500><loc0600> cat"
BROKEN = {
    "cut off": f"{GOOD} ; <loc0100><loc0200><loc0500>",
    "eight numbers": f"<loc0007><loc0007><loc0900><loc0900>{GOOD}",
    "inside out": f"{GOOD} ; <loc0500><loc0200><loc0100><loc0600> dog",
    "the prompt again": f"detect cat ; dog\n{GOOD}",
    "just talk": "two cats",
    "half a mask": f"<loc0100><loc0200><loc0500><loc0600>{'<seg007>' * 15} dog ; {GOOD}",
    "no such word": f"<loc9999><loc0200><loc0500><loc0600> dog ; {GOOD}",
}
for what, text in BROKEN.items():
    try:
        print(f"{what:17}", [label for label, _ in read_plain(text, 448, 448)])
    except ValueError as error:
        print(f"{what:17} ValueError: {str(error)[:50]}")

# %% [markdown]
# Two kinds of harm. Some answers crash a program that could have shown the good cat. Others are
# *silent*: a name made of numbers, a box inside out, a box far outside the picture.
# We want three things: never an exception, no false object, and no good object lost.

# %% [markdown]
# ## The module, part two: reading
#
# Do not split, *search*: an object is a run of `<loc>` words, perhaps `<seg>` words (a mask,
# [lesson 21](21_segmentation.ipynb)), and a name up to the next separator. Whatever lies between
# objects is ignored. Of too many `<loc>` words the last four count, and the surplus is reported:
# what stands in front of an object must not spoil it.


# %%
#| export
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


@dataclass(frozen=True)
class Found:
    """One object as it stands in a text.

    Args:
        start, name, end: its numbers are text[start:name], its name is text[name:end].
        locs: the `<loc>` numbers: y0 x0 y1 x1 of a box.
        segs: the `<seg>` numbers: none, or the sixteen of a mask.
        label: what follows them, "" where nothing does.
        problem: why it cannot be used; None: it is well formed.
    """

    start: int
    name: int
    end: int
    locs: tuple[int, ...]
    segs: tuple[int, ...]
    label: str
    problem: str | None


OBJECT = re.compile(r"((?:<loc\d{4}>\s*)+)((?:<seg\d{3}>\s*)*)([^;<>\n]*)", re.ASCII)


# %%
#| export
def find_objects(text: str) -> Iterator[Found]:
    """Yield every run of `<loc>` words with what follows it, well formed or not, in order.

    Of a run of more than four, what is before the last four is yielded by itself, as a problem.
    """
    for match in OBJECT.finditer(text):
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


def decode_box(
    locs: Sequence[int], width: float, height: float
) -> tuple[float, float, float, float]:
    """Four numbers 0 … 1023, y0 x0 y1 x1, as (x0, y0, x1, y1) in pixels."""
    y0, x0, y1, x1 = (number / 1023 for number in locs)
    return x0 * width, y0 * height, x1 * width, y1 * height


# %%
#| export
def parse_detections(
    text: str, width: float, height: float, dropped: list | None = None
) -> list[Detection]:
    """Read the objects of a model's answer; whatever the text, it raises nothing.

    Args:
        text: "<loc>×4 label" joined by " ; ", with anything around; a mask's `<seg>` are skipped,
            and an object without a label has the label "".
        width, height: of the picture, pixels.
        dropped: a list that gets (piece of text, what is wrong with it) for each broken object.

    Returns:
        The well-formed objects, in order, with score 1.

    Raises:
        ValueError: a picture without size.
    """
    _check_size(width, height)
    detections = []
    for found in find_objects(text):
        if found.problem is None:
            detections.append(Detection(found.label, decode_box(found.locs, width, height)))
        elif dropped is not None:
            dropped.append((text[found.start : found.end].strip(), found.problem))
    return detections


# %%
for what, text in BROKEN.items():
    dropped = []
    kept = [detection.label for detection in parse_detections(text, 448, 448, dropped)]
    print(f"{what:17} {kept!s:8} dropped: {', '.join(problem for _, problem in dropped) or '-'}")

# %% [markdown]
# Every good cat is kept, and nothing false is. A **name may be missing**: some published models are
# asked with a sentence ("the cat on the left") and answer without one. Such an object is kept, with the
# label "":

# %%
print(parse_detections(GOOD.removesuffix(" cat"), 448, 448))

# %% [markdown]
# Now at random: 2,000 answers made of the words that do harm, with one good object hidden in each.

# %%
random.seed(19)
PIECES = ["<loc0007>", "<loc0900>", "<loc1024>", "<seg001>", " ; ", ";", "\n", " cat", "<", "loc"]
for _ in range(2000):
    before, after = ("".join(random.choices(PIECES, k=random.randrange(12))) for _ in range(2))
    labels_of = parse_detections(
        f"{before}<loc0100><loc0200><loc0500><loc0600> owl ; {after}", 9, 9
    )
    assert "owl" in [detection.label for detection in labels_of]
print("2,000 answers, 2,000 owls")

# %% [markdown]
# And there and back: what we wrote is read to within half a step of $448/1023$ pixels.

# %%
for name in PLACED:
    read = parse_detections(answers[name], 448, 448)
    assert [detection.label for detection in read] == labels[name]
    gap = torch.tensor([d.box for d in read]) - torch.tensor(boxes[name], dtype=torch.float32)
    assert gap.abs().max() <= 448 / 1023 / 2 + 1e-4
    print(f"{name:7} largest error {gap.abs().max():.2f} pixels")

# %% [markdown]
# ## A score from the words' probabilities
#
# Which of two boxes should be trusted more? A detector's head gives a score. A language model gives
# a probability for every word it wrote. The product of all would punish long names, so we take the
# **geometric mean**, that is $\exp$ of the mean logarithm. One mean over everything has a fault too:


# %%
def geometric_mean(shares):
    return math.exp(sum(map(math.log, shares)) / len(shares))


place = [0.1, 0.1, 0.1, 0.1]  # four edges, each a choice among near-equal neighbours
for name in ([0.9], [0.9, 0.9, 0.9]):  # a name of one piece, a name of three
    over_all = geometric_mean(place + name)
    apart = math.sqrt(geometric_mean(place) * geometric_mean(name))
    print(f"{len(name)} pieces: one mean over all {over_all:.2f}, place and name apart {apart:.2f}")
assert geometric_mean(place + [0.9] * 3) > 1.5 * geometric_mean(place + [0.9])

# %% [markdown]
# The same box, equally sure of its name, nearly twice the score because the name is longer. So **place**
# and **name** get a mean each, and the score is the mean of the two.
#
# Which tokens belong to which object? Decode ever longer beginnings of the answer: where the text
# ends is where the token ends. A token belongs to the piece of text in whose characters it ends.


# %%
#| export
def score_objects(
    objects: Iterable[Found],
    ids: Sequence[int],
    log_probs: Sequence[float],
    tokenizer: Tokenizer,
) -> list[float]:
    """How sure the model was of each object of its answer.

    Args:
        objects: from `find_objects(tokenizer.decode(ids))`.
        ids: the tokens of the answer.
        log_probs: the natural logarithm of each token's probability.
        tokenizer: spells them.

    Returns:
        For each object, 0 to 1: geometric means over the tokens of its numbers and over those of
        its name, and of the two again; so the length of a name does not count.
    """
    ids = [int(token) for token in ids]
    ends = [len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
    starts = [0, *ends[:-1]]
    scores = []
    for found in objects:
        means = []
        for first, last in ((found.start, found.name), (found.name, found.end)):
            own = [
                float(log_prob)
                for start, end, log_prob in zip(starts, ends, log_probs)
                if start < end and first < end <= last
            ]
            means += [sum(own) / len(own)] if own else []
        scores.append(min(1.0, math.exp(sum(means) / len(means))) if means else 0.0)
    return scores


# %%
#| export
def score_detections(
    ids: Sequence[int],
    log_probs: Sequence[float],
    tokenizer: Tokenizer,
    width: float,
    height: float,
    dropped: list | None = None,
) -> list[Detection]:
    """`parse_detections` of an answer given as tokens, each object with its score.

    Args:
        ids: the tokens of one answer.
        log_probs: of each token, as `generate_steps` collects them.
        tokenizer: spells them.
        width, height, dropped: as in `parse_detections`.

    Returns:
        The well-formed objects, in order.
    """
    text = tokenizer.decode(ids)
    detections = parse_detections(text, width, height, dropped)
    objects = [found for found in find_objects(text) if found.problem is None]
    scores = score_objects(objects, ids, log_probs, tokenizer)
    return [Detection(d.label, d.box, score) for d, score in zip(detections, scores)]


# %% [markdown]
# First on an answer whose probabilities we choose: sure of the first object, unsure of the second.

# %%
TINY = ASSETS / "tiny"
processor = Processor.from_pretrained(TINY)
tokenizer = processor.tokenizer
ids = tokenizer.encode(f"{GOOD} ; <loc0300><loc0020><loc0800><loc0090> dog")
half = ids.index(tokenizer.encode("<loc0300>")[0])
chosen = [math.log(0.9)] * half + [math.log(0.3)] * (len(ids) - half)
for detection in score_detections(ids, chosen, tokenizer, 448, 448):
    print(detection.label, f"{detection.score:.2f}", [round(v) for v in detection.box])

# %% [markdown]
# ### The whole way, with a model
#
# `generate_steps` fills a list with the log-probabilities as it goes. The next cell is all that
# detection needs. Whatever the model writes, it is read; a model that has not learnt to write boxes
# gives an empty list, not an error.

# %%
model = load_model(TINY, dtype=torch.float32)


def detect(image, what):
    """(detections, answer, token ids, log-probabilities)."""
    inputs = processor(image, f"detect {what}")
    log_probs = []
    steps = generate_steps(
        model,
        inputs["input_ids"],
        inputs["pixel_values"],
        config=GenerationConfig(max_new_tokens=60),
        log_probs=log_probs,
    )
    ids = [int(token) for token in steps]
    log_probs = [float(log_prob) for log_prob in log_probs]
    detections = score_detections(ids, log_probs, tokenizer, image.width, image.height)
    return detections, tokenizer.decode(ids), ids, log_probs


outcome = {}
for name in PLACED:
    what = " ; ".join(dict.fromkeys(labels[name]))
    outcome[name] = detect(sample_picture(name), what)
    print(f"{name}: detect {what}\n   {outcome[name][1]!r}\n   {len(outcome[name][0])} objects")

# %%
_, _, ids, log_probs = outcome["scene"]
shown = [tokenizer.decode([token]) or "end" for token in ids][:18]
fig, ax = plt.subplots(figsize=(7, 2.3), layout="constrained")
colours = [COLOURS["vision"] if text.startswith("<loc") else COLOURS["language"] for text in shown]
ax.bar(range(len(shown)), [math.exp(value) for value in log_probs[:18]], color=colours)
ax.set_xticks(range(len(shown)), shown, rotation=45, ha="right", fontsize=8)
ax.set(ylim=(0, 1), ylabel="probability", title="how sure the tiny model was of each word it wrote")
save_figure(fig, "19_sure")

# %% [markdown]
# ## How good is a box? Intersection over union
#
# Two boxes: the area they share, divided by the area they cover together. 1 means equal, 0 apart. It
# does not depend on units. By hand, a 4×4 box and the same box moved by (2, 1):
#
# shared $2 \times 3 = 6$; together $16 + 16 - 6 = 26$; IoU $= 6/26 = 0.231$.


# %%
def iou_loop(a, b):
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0, width) * max(0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return shared / (sum(areas) - shared)


print(f"{iou_loop((0, 0, 4, 4), (2, 1, 6, 5)):.3f}, apart: {iou_loop((0, 0, 4, 4), (5, 5, 6, 6))}")

# %% [markdown]
# `max(0, …)` matters twice: two negative sides would multiply to a positive area. Vectorised, all
# pairs at once:


# %%
#| export
def box_iou(a: Sequence | torch.Tensor, b: Sequence | torch.Tensor) -> torch.Tensor:
    """Intersection over union of every box in `a` with every box in `b`.

    Args:
        a: N boxes (x0, y0, x1, y1), any unit.
        b: M boxes.

    Returns:
        `float64[N, M]`, 0 (apart) to 1 (equal); 0 for two boxes without area.
    """
    first = torch.as_tensor(a, dtype=torch.float64).reshape(-1, 4)
    second = torch.as_tensor(b, dtype=torch.float64).reshape(-1, 4)
    low = torch.maximum(first[:, None, :2], second[None, :, :2])  # (N, M, 2)
    high = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)  # (N, M)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1] - shared
    return torch.where(union > 0, shared / union, 0.0)


# %%
torch.manual_seed(19)
corners = torch.rand(40, 2, 2, dtype=torch.float64).sort(dim=1).values.reshape(-1, 4)
a, b = corners[:25].tolist(), corners[25:].tolist()
slow = torch.tensor([[iou_loop(p, q) for q in b] for p in a], dtype=torch.float64)
assert torch.allclose(box_iou(a, b), slow, atol=1e-12)
print(list(box_iou(a, b).shape), "all equal to the loop")

# %% [markdown]
# What does a number look like? The scene's cat, and a box that slides away from it.

# %%
x0, y0, x1, y1 = boxes["scene"][0]
views = []
for step in (4, 12, 26, 42):
    moved = (x0 + step, y0 - step, x1 + step, y1 - step)
    views.append((f"IoU {iou_loop((x0, y0, x1, y1), moved):.2f}", moved))
pictures = [
    draw_boxes(scene, [(x0, y0, x1, y1), box], ["true", "guess"]).crop((0, 150, 240, 390))
    for _, box in views
]
fig = show_images([p.resize((180, 180)) for p in pictures], [t for t, _ in views], height=1.65)
save_figure(fig, "19_iou.png")

# %% [markdown]
# What to notice: 0.9 is nearly perfect, and 0.5 is much worse than "half" sounds. Yet 0.5 is the usual
# bound for "found". A box's error enters twice, once on each axis.

# %% [markdown]
# ## Matching: who found whom?
#
# Three rules. The surest detection chooses first. It takes the *free* true box of its kind that it
# overlaps most, if the IoU is at least the threshold. Each true box is taken once, so a second box
# on the same cat is a **false positive**. True boxes left over were **missed**.


# %%
#| export
def match_boxes(scores: Sequence[float], ious: torch.Tensor, threshold: float = 0.5) -> list[int]:
    """Give each detection at most one true box: the surest chooses first.

    Args:
        scores: of N detections.
        ious: `float[N, M]` from `box_iou`.
        threshold: least IoU that counts as found.

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


# %%
truth = [(10, 10, 30, 30), (50, 10, 70, 30), (80, 40, 100, 60)]
found = [(12, 11, 31, 30), (10, 10, 30, 31), (51, 12, 70, 30), (0, 50, 20, 70), (81, 40, 100, 62)]
scores = [0.9, 0.8, 0.7, 0.6, 0.5]
chosen = match_boxes(scores, box_iou(found, truth))
for score, row, j in zip(scores, box_iou(found, truth), chosen):
    print(
        score, [round(v, 2) for v in row.tolist()], "→", f"box {j}" if j >= 0 else "false positive"
    )

# %% [markdown]
# The second detection fits box 0 *better* than the first, and still comes too late: the surer one has
# it. A score is not decoration. It decides.

# %% [markdown]
# ## Average precision: one number for all thresholds
#
# Walk down the list, from sure to unsure. After each step two shares:
#
# - **precision**: of those named so far, how many were right?
# - **recall**: of those that exist, how many were found?
#
# Stop early: precise, but much is missed. Go on: more is found, and more is wrong.

# %%
right, table = 0, []
for place, j in enumerate(chosen, start=1):
    right += j >= 0
    table.append((right / len(truth), right / place))
    print(f"first {place}: {right} right, recall {right}/3, precision {right}/{place}")

# %% [markdown]
# The precision at a recall is defined as the best precision at this recall *or beyond*: so the
# zigzag becomes a falling staircase. Average precision (AP) is the mean height of the staircase. COCO
# reads it at 101 recalls: 0, 0.01, … 1.

# %%
heights = [max((p for r, p in table if r >= k / 100 - 1e-9), default=0) for k in range(101)]
print(f"AP = {sum(heights) / 101:.4f}")
print(f"pencil: (34 × 1 + 33 × 2/3 + 34 × 3/5) / 101 = {(34 + 33 * 2 / 3 + 34 * 3 / 5) / 101:.4f}")
assert abs(sum(heights) / 101 - (34 + 33 * 2 / 3 + 34 * 3 / 5) / 101) < 1e-9
fig, ax = plt.subplots(figsize=(5, 2.7), layout="constrained")
recall, precision = zip(*table)
ax.plot(recall, precision, "o--", color=COLOURS["muted"], label="after each detection")
ax.plot([k / 100 for k in range(101)], heights, color=COLOURS["vision"], label="staircase")
ax.fill_between([k / 100 for k in range(101)], heights, color=COLOURS["vision"], alpha=0.15)
ax.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.08))
ax.legend(loc="lower left", fontsize=8)
save_figure(fig, "19_average_precision")

# %% [markdown]
# What to notice: three steps, one for each true box. The area is AP. A false positive *below* all
# right ones would cost nothing: only wrong things said with confidence hurt.
#
# Over many pictures: match in each picture, then put all detections in **one** list, sorted by score.


# %%
#| export
def average_precision(
    found: Sequence[Sequence[Detection]],
    truth: Sequence[Sequence[Detection]],
    label: str,
    threshold: float = 0.5,
) -> float:
    """Average precision for one kind of object over many pictures.

    Args:
        found: for each picture what was detected.
        truth: for each picture what is there (scores do not matter).
        label: the kind.
        threshold: least IoU that counts as found.

    Returns:
        0 to 1; NaN where the kind is in no picture.

    Raises:
        ValueError: not as many pictures in `found` as in `truth`.

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
    places = torch.searchsorted(right / total, torch.linspace(0, 1, 101, dtype=torch.float64))
    return float(torch.cat([precision, precision.new_zeros(1)])[places].mean())


# %%
def one_picture(boxes, scores=None):
    scores = scores or [1.0] * len(boxes)
    return [[Detection("cat", box, score) for box, score in zip(boxes, scores)]]


ap = average_precision(one_picture(found, scores), one_picture(truth), "cat")
assert abs(ap - sum(heights) / 101) < 1e-9
print(f"AP at IoU 0.50: {ap:.4f}")
for threshold in (0.75, 0.9, 0.95):
    value = average_precision(one_picture(found, scores), one_picture(truth), "cat", threshold)
    print(f"AP at IoU {threshold:.2f}: {value:.4f}")
    assert value <= ap
    ap = value

# %% [markdown]
# A stricter bound never makes the number higher. "The" AP of papers is the mean over the ten bounds
# 0.50, 0.55, … 0.95 and over all kinds. (Exercise 2.)
#
# ## Against the reference
#
# The reference of this field is pycocotools. A test ran it on 30 random pictures with boxes, misses,
# doubles and wrong kinds, and stored boxes and results: three kinds, ten bounds.

# %%
reference = load_file("reference/detection.safetensors")
KINDS = ("cat", "dog", "owl")
found_all, true_all = ([[] for _ in range(30)] for _ in range(2))
for name, lists in (("found", found_all), ("truth", true_all)):
    for picture, kind, *box, score in reference[name].tolist():
        lists[int(picture)].append(Detection(KINDS[int(kind)], tuple(box), score))
bounds = [0.5 + 0.05 * k for k in range(10)]
ours = torch.tensor(
    [[average_precision(found_all, true_all, kind, t) for kind in KINDS] for t in bounds]
)
gap = (ours - reference["precision"]).abs().max().item()
assert gap <= 1e-6
for kind, column in zip(KINDS, ours.T):
    print(
        kind, "AP50", f"{column[0]:.4f}", "AP75", f"{column[5]:.4f}", "AP", f"{column.mean():.4f}"
    )
print(f"largest difference: {gap:.1e}")

# %% [markdown]
# ## See it
#
# The tiny model's own answers, each box with its score. Above each picture stands, for every true
# object, the IoU of the box that fits it best. Scores are lower than that: training let each edge lie
# a little to the side ([lesson 27](27_training.ipynb)), so no single place is likely. A score ranks the
# boxes of one model; it is not the chance of being right. Labels never hide each other.

# %%
shown, titles, sure, fit = [], [], [], []
for name in PLACED:
    detections = outcome[name][0]
    ious = box_iou([d.box for d in detections], boxes[name])
    best = [f"{v:.2f}" for v in ious.amax(0)] if detections else ["-"] * len(boxes[name])
    sure += [d.score for d in detections]
    fit += ious.amax(1).tolist() if detections else []
    names, scores = [d.label for d in detections], [d.score for d in detections]
    drawn = draw_boxes(sample_picture(name), [d.box for d in detections], names, scores)
    shown.append(drawn)
    titles.append("best IoU: " + ", ".join(best))
print(f"mean score {sum(sure) / len(sure):.2f}, mean IoU {sum(fit) / len(fit):.2f}")
assert sum(sure) < sum(fit)
fig = show_images([picture.resize((224, 224)) for picture in shown], titles, height=2.1)
save_figure(fig, "19_scenes.png")

# %%
crowd = [(40 + 9 * k, 60 + 7 * k, 250 + 9 * k, 260 + 7 * k) for k in range(9)]
names = [f"guess {k} {0.9 - 0.1 * k:.1f}" for k in range(9)]
show_images(draw_boxes(scene, crowd, names), "nine guesses, nine readable tags", height=2.8)

# %% [markdown]
# ## At full size
#
# What do 1024 steps cost? Half a step of error at each edge: on a large object nothing, on a small one
# a lot. The same for 256 steps, which would save three quarters of the words. Mean IoU of a square
# with its own rounded self:

# %%
torch.manual_seed(0)
fig, ax = plt.subplots(figsize=(5, 2.6), layout="constrained")
sides = [0.003, 0.006, 0.0125, 0.025, 0.05, 0.1, 0.2]
for steps, colour in ((1023, "vision"), (255, "language")):
    means = []
    for side in sides:
        corner = torch.rand(400, 2, dtype=torch.float64) * (1 - side)
        square = torch.cat([corner, corner + side], dim=1)
        means.append(box_iou(square, (square * steps).round() / steps).diagonal().mean().item())
    ax.plot(sides, means, "o-", color=COLOURS[colour], label=f"{steps + 1} words")
    print(f"{steps + 1:4} words:", [f"{value:.2f}" for value in means])
ax.set(xscale="log", xlabel="side of the object, share of the picture", ylabel="IoU after rounding")
ax.legend()
save_figure(fig, "19_steps")

# %% [markdown]
# A detector with a head finds 100 objects in one pass. Here time grows with what is found. That is the
# price for a detector that takes any word as its class.
#
# ## A bug people really make: right before down
#
# Everyone writes (x, y). A colleague reads the four words as x0 y0 x1 y1. No error, boxes inside the
# picture, good sizes. On the first test picture it looks nearly right:


# %%
def parse_colleague(text, width, height):
    """The same, with x and y swapped."""
    return [
        Detection(d.label, (d.box[1], d.box[0], d.box[3], d.box[2]), d.score)
        for d in parse_detections(text, width, height)
    ]


views = [
    draw_boxes(sample_picture(n), [d.box for d in parse_colleague(answers[n], 448, 448)], labels[n])
    for n in ("scene2", "scene")
]
fig = show_images(
    [v.resize((224, 224)) for v in views], ["looks nearly right", "does not"], height=2.4
)
save_figure(fig, "19_swapped.png")

# %% [markdown]
# The bee lies on the diagonal, where x and y are nearly equal: the one place where swapping is
# invisible. The tulip is near it, and its box merely looks a little loose. A check on numbers sees it
# at once:

# %%
for name in PLACED:
    read = [d.box for d in parse_colleague(answers[name], 448, 448)]
    ours = [d.box for d in parse_detections(answers[name], 448, 448)]
    swapped, right = (box_iou(r, boxes[name]).diagonal().min() for r in (read, ours))
    print(f"{name:7} worst IoU: ours {right:.2f}, colleague {swapped:.2f}")

# %% [markdown]
# The rule: test with a picture that is **not square** and an object that is **not in the middle**.
#
# ### A second one: whose pixels?
#
# The model saw a squashed square; the user has a photograph. Words are shares of either, so
# multiply by the size of the *given* picture. Multiply by the model's size, and the boxes are small
# and in the upper left corner.

# %%
cat = sample_picture("cat")
face = (120, 40, 370, 250)
text = encode_boxes([face], *cat.size)[0] + " face"
for title, size in (("given picture", cat.size), ("model's picture", (224, 224))):
    (detection,) = parse_detections(text, *size)
    print(f"{title:16}", [round(v) for v in detection.box], "in a picture of", cat.size)

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): how many objects?
#
# Four answers. How many objects does `parse_detections` return for each?

# %% tags=["exercise"]
L = "<loc0100><loc0200><loc0500><loc0600>"
TEXTS = [
    f"{L} cat{L} dog",
    f"{L}{L} cat",
    f"{L} ; cat",
    f"{L} cat ; {L} cat",
]
counts = [None] * 4  # your answer


# %% tags=["check"]
def test_1(counts):
    assert len(counts) == 4, "four numbers"
    for count, text in zip(counts, TEXTS):
        real = len(parse_detections(text, 448, 448))
        assert count == real, f"{text.replace(L, 'LLLL')!r} gives {real}"


check(test_1, counts)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A name ends where the next `<` begins. Of too many locs, the last four count. A semicolon ends an
# object, and an object needs no name. The parser does not judge whether two objects are the same.
#
# </details>

# %% tags=["solution"]
counts = [2, 1, 1, 2]
check(test_1, counts)

# %% [markdown]
# ### Exercise 2 (fill in): the AP of papers
#
# Mean over the ten bounds 0.50, 0.55, … 0.95 and over all kinds *that are there*: a kind without a
# true box has no AP and is left out. Pictures as in `average_precision`.


# %% tags=["exercise"]
def mean_average_precision(found, truth):
    return None  # one number


# %% tags=["check"]
def test_2(mean_average_precision):
    value = mean_average_precision(found_all, true_all)
    assert value is not None, "return a number"
    expected = float(reference["precision"].mean())
    assert abs(value - expected) < 1e-6, f"expected {expected:.4f}, got {value:.4f}"
    extra = [[*row, Detection("unicorn", (0, 0, 9, 9), 1.0)] for row in found_all]
    assert abs(mean_average_precision(extra, true_all) - expected) < 1e-6, "no unicorn is there"


check(test_2, mean_average_precision)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Collect the labels of `truth` in a set. Then two loops and one mean.
#
# </details>


# %% tags=["solution"]
def mean_average_precision(found, truth):
    kinds = {detection.label for row in truth for detection in row}
    bounds = [0.5 + 0.05 * k for k in range(10)]
    values = [average_precision(found, truth, kind, t) for kind in sorted(kinds) for t in bounds]
    return sum(values) / len(values)


check(test_2, mean_average_precision)

# %% [markdown]
# ### Exercise 3 (extend): say it once
#
# Models repeat themselves: two boxes on one cat, the second a false positive. Write non-maximum
# suppression: go from sure to unsure and drop a detection that overlaps a kept one *of the same
# label* with an IoU above `limit`. Return the kept ones, surest first.


# %% tags=["exercise"]
def say_once(detections, limit=0.7):
    return None  # a list


# %% tags=["check"]
def test_3(say_once):
    a = Detection("cat", (0, 0, 10, 10), 0.6)
    b = Detection("cat", (0, 0, 10, 11), 0.9)
    c = Detection("dog", (0, 0, 10, 10), 0.5)
    d = Detection("cat", (20, 0, 30, 10), 0.95)
    assert say_once([a, b, c, d]) == [d, b, c], "a repeats b; c is a dog; d is elsewhere"
    assert say_once([]) == [], "nothing in, nothing out"
    chain = [Detection("cat", (4 * k, 0, 4 * k + 10, 10), 0.9 - 0.1 * k) for k in range(3)]
    assert say_once(chain, 0.4) == [chain[0], chain[2]], "compare with kept ones only"


check(test_3, say_once)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `sorted(detections, key=lambda d: -d.score)`, a list `kept`, and `any(…)` over it.
#
# </details>


# %% tags=["solution"]
def say_once(detections, limit=0.7):
    kept = []
    for d in sorted(detections, key=lambda d: -d.score):
        same = [k.box for k in kept if k.label == d.label]
        if not (box_iou([d.box], same) > limit).any():
            kept.append(d)
    return kept


check(test_3, say_once)

# %% [markdown]
# ## Summary
#
# - A box is four words, y0 x0 y1 x1, `round(v · 1023)` of the picture's height or width.
# - A model's answer is untrusted: search for objects, keep the good, name the broken.
# - The probabilities of an object's words make its score, place and name apart; the score decides
#   who matches first.
# - IoU measures one box; AP measures a list with its order.
# - Test with pictures that are not square.

# %% [markdown]
# ## Quiz
#
# **1.** Every score of a model is multiplied by 0.1. What happens to its AP?
#
# <details><summary>Answer</summary>
#
# Nothing. AP uses scores only to sort. A bound such as "show everything above 0.5" would of course show
# nothing any more.
#
# </details>

# %% [markdown]
# **2.** Why may a correct box have a low score here, when all its words are nearly right?
#
# <details><summary>Answer</summary>
#
# `<loc0484>` and `<loc0485>` are different words. A model that is unsure by a pixel or two shares its
# probability among neighbours, so each gets little. The box is good all the same.
#
# </details>

# %% [markdown]
# **3.** A colleague trains on boxes rounded with `int(v * 1024)` and reads with `/ 1023`. How large is
# the error at most?
#
# <details><summary>Answer</summary>
#
# `int` cuts off up to one step, where rounding errs by half of one; and at $v = 1$ it gives 1024, for
# which there is no word. In 448 pixels a step is 0.44: invisible on large objects, and enough to
# lower the IoU of small ones.
#
# </details>

# %% [markdown]
# ## References
#
# - Lucas Beyer et al., *PaliGemma: A versatile 3B VLM for transfer*, 2024, section 3.2 (the 1024
#   location words).
# - Ting Chen et al., *Pix2seq: A Language Modeling Framework for Object Detection*, 2022.
# - Tsung-Yi Lin et al., *Microsoft COCO: Common Objects in Context*, 2014; pycocotools, `cocoeval.py`.
# - big_vision: `pp/proj/paligemma`, the published preprocessing of boxes.

# %% [markdown] tags=["navigation"]
# [← Generation](18_generation.ipynb) | [contents](00_overview.ipynb) | [Mask codec →](20_mask_codec.ipynb)
