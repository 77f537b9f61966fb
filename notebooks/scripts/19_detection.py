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
# *45 minutes* · part IV, Answering
#
# **What you will be able to do**
#
# - write a box as four tokens, and read boxes from text that nobody promised to be right;
# - turn the probabilities of tokens into a score for an object;
# - compute overlap, matching and average precision with a pencil, then as the reference does;
# - find the detection bug that hides on a picture's diagonal.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("detection")

# %% [markdown]
# ## Setup
#
# From earlier lessons: location tokens ([06](06_tokenizer.ipynb)), prompts ([14](14_processor.ipynb)),
# weights ([16](16_checkpoint.ipynb)), the token loop ([18](18_generation.ipynb)). The `#| export` cells
# become [detection.py](../paligemma/detection.py).

# %%
#| export
"""Boxes as location tokens: write them, read them from untrusted text, measure their quality."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from paligemma.support.arguments import as_text, check_boxes, check_size
from paligemma.tokenizer import Tokenizer

# %% tags=["setup"]
from importlib import resources

import matplotlib.pyplot as plt
from safetensors.torch import load_file

from paligemma.checkpoint import load_model
from paligemma.generation import generate_steps
from paligemma.plotting import show_images
from paligemma.processor import Processor
from paligemma.support.course import check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS, CYCLE, draw_boxes

# %% [markdown]
# ## The problem: a model that can only write
#
# Detectors usually end in a special head that outputs numbers. PaliGemma has none. It is asked
# `detect cat ; dog`, and it *writes*: four location tokens for the corners, then the name; objects
# are joined by ` ; `. No new layer, no new loss.
#
# The course's scenes were composed of emoji, so the emoji's opaque pixels give exact boxes:

# %%
labels = {
    "scene": ["cat", "dog", "dog"],
    "scene2": ["bee", "tulip"],
    "scene3": ["rocket", "balloon", "balloon"],
}
boxes = {  # x0, y0, x1, y1 in pixels of 448 × 448
    "scene": [(10, 237, 134, 354), (178, 115, 297, 208), (298, 263, 420, 359)],
    "scene2": [(66, 66, 196, 194), (255, 209, 366, 371)],
    "scene3": [(29, 233, 163, 368), (190, 73, 276, 184), (324, 187, 407, 317)],
}

# %% [markdown]
# ## By hand: a box in four tokens
#
# Divide each edge by the picture's size: now it lies between 0 and 1. Multiply by 1023 and round: one
# of the 1024 tokens `<loc0000>` … `<loc1023>`. **The order is y0 x0 y1 x1**: down before right.

# %%
x0, y0, x1, y1 = boxes["scene"][0]
for edge, value in {"y0": y0, "x0": x0, "y1": y1, "x1": x1}.items():
    number = round(value / 448 * 1023)
    back = number / 1023 * 448
    print(f"{edge} = {value:3} → {value / 448:.4f} → {number:4} → back: {back:.2f}")
    assert abs(back - value) <= 448 / 1023 / 2 < 0.22

# %% [markdown]
# The way back is exact to half a step, 0.22 pixels here. As a function:


# %%
def write_box(box, width, height):
    x0, y0, x1, y1 = box
    shares = (y0 / height, x0 / width, y1 / height, x1 / width)
    return "".join(f"<loc{round(1023 * share):04d}>" for share in shares)


# %% [markdown]
# What a perfect model would answer to `detect cat ; dog`, and to the same for the other scenes:

# %%
answers = {}
for name in labels:
    objects = [f"{write_box(b, 448, 448)} {label}" for b, label in zip(boxes[name], labels[name])]
    answers[name] = " ; ".join(objects)


# %% tags=["hide-input"]
def draw_small(name, boxes, labels=None, scores=None):
    """A scene of 280 pixels with boxes on it; on smaller ones tags could not be read."""
    corners = [[value * 280 / 448 for value in box] for box in boxes]
    return draw_boxes(sample_picture(name).resize((280, 280)), corners, labels, scores)


fig, (left, right) = plt.subplots(1, 2, figsize=(7.5, 3.2), layout="constrained")
left.imshow(draw_small("scene", boxes["scene"], labels["scene"]))
left.set_axis_off()
right.set_axis_off()
right.text(0, 0.86, "detect cat ; dog", family="monospace", color=COLOURS["muted"])
for row, text in enumerate(answers["scene"].split(" ; ")):
    style = {"family": "monospace", "color": CYCLE[0 if row == 0 else 1]}
    right.text(0, 0.62 - 0.24 * row, text.replace(" ", "\n") + (" ;" if row < 2 else ""), **style)
save_figure(fig, "19_words.png")

# %% [markdown]
# What can go wrong in writing? An object that is partly outside, and someone who gives width and
# height instead of a second corner:

# %%
outside = write_box((-9, 100, 100, 460), 448, 448)
print("partly outside:      ", outside)
print("x, y, width, height: ", write_box((300, 200, 90, 80), 448, 448))
assert "<loc-021>" in outside and "<loc1050>" in outside

# %% [markdown]
# Neither complains. But `<loc-021>` and `<loc1050>` are no tokens, and the second box is inside out: a
# model would learn nonsense from both. So the module clips, and refuses what is inside out:


# %%
#| export
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


# %%
assert encode_boxes([(-9, 100, 100, 460)], 448, 448) == ["<loc0228><loc0000><loc1023><loc0228>"]
assert encode_boxes(boxes["scene"][:1], 448, 448)[0] == answers["scene"][:36]

# %% [markdown]
# ## Reading, the plain way
#
# Split at the semicolons, take four numbers, the rest is the name:


# %%
def read_plain(text, width, height):
    found = []
    for part in text.split(" ; "):
        y0, x0, y1, x1 = (int(part[9 * i + 4 : 9 * i + 8]) / 1023 for i in range(4))
        found.append((part[36:].strip(), [x0 * width, y0 * height, x1 * width, y1 * height]))
    return found


# %%
for label, box in read_plain(answers["scene"], 448, 448):
    print(label, [round(value, 1) for value in box])

# %% [markdown]
# But a model's answer is **untrusted input**. It may stop in mid-box, repeat the prompt, or just talk:

# %%
GOOD = "<loc0100><loc0200><loc0500><loc0600> cat"
BROKEN = {
    "cut off": f"{GOOD} ; <loc0100><loc0200><loc0500>",
    "the prompt again": f"detect cat ; dog\n{GOOD}",
    "just talk": "two cats",
    "eight numbers": f"<loc0007><loc0007><loc0900><loc0900>{GOOD}",
    "inside out": f"{GOOD} ; <loc0500><loc0200><loc0100><loc0600> dog",
    "no such token": f"<loc9999><loc0200><loc0500><loc0600> dog ; {GOOD}",
}

# %%
for what, text in BROKEN.items():
    try:
        print(f"{what:17}", [label for label, _ in read_plain(text, 448, 448)])
    except ValueError:
        print(f"{what:17} ValueError")

# %% [markdown]
# Three answers crash the program, though two of them hold a good cat. The others are *silent*: a
# name made of numbers, a box inside out, a box far outside the picture. We want never an exception,
# no false object, and no good object lost.
#
# ## Reading by search
#
# An object is a run of `<loc>`, perhaps a run of `<seg>` (a mask, [lesson 21](21_segmentation.ipynb)),
# and a name up to the next separator. Whatever lies between objects is ignored.

# %%
#| export
OBJECT = re.compile(r"((?:<loc\d{4}>\s*)+)((?:<seg\d{3}>\s*)*)([^;<>\n]*)", re.ASCII)

# %%
for what in ("the prompt again", "cut off"):
    print(f"{what}:", [match.groups() for match in OBJECT.finditer(BROKEN[what])])

# %% [markdown]
# Each match gives the numbers, the mask, the name. A broken object gets a `problem` in words, so that a
# reader of the log learns what the model did:


# %%
#| export
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


# %% [markdown]
# The search fills it. Of too many `<loc>` the last four count: what stands in front must not spoil an
# object.


# %%
#| export
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


# %% [markdown]
# What is well formed becomes a `Detection`: shares of the *given* picture, not of the squashed square
# that the model saw.


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


# %% [markdown]
# And `write_box` turned round:


# %%
#| export
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


# %%
for what, text in BROKEN.items():
    dropped = []
    kept = [detection.label for detection in parse_detections(text, 448, 448, dropped)]
    print(f"{what:17} {kept!s:8} dropped: {', '.join(problem for _, problem in dropped) or '-'}")
    assert kept == ([] if what == "just talk" else ["cat"])

# %% [markdown]
# Every good cat is kept, and nothing false is.
#
# ## A score from the tokens' probabilities
#
# Which of two boxes should be trusted more? A language model gives a probability for every token.
# The trained model is asked for the first token of its answer, the cat's upper edge:

# %%
TINY = resources.files("paligemma") / "assets" / "tiny"
model, processor = load_model(TINY, dtype=torch.float32), Processor.from_pretrained(TINY)
tokenizer = processor.tokenizer
prompt = processor(sample_picture("scene"), "detect cat ; dog")
with torch.no_grad():
    logits = model(prompt["input_ids"], prompt["pixel_values"]).logits[0, -1]  # [V]

# %%
first = tokenizer.encode("<loc0000>")[0]
edge = logits.softmax(-1)[first : first + 1024]  # of <loc0000> … <loc1023>
best = int(edge.argmax())
near = edge[best - 20 : best + 21].sum().item()
print(f"most likely: <loc{best:04d}>, {edge[best]:.0%}; with 20 neighbours a side: {near:.0%}")
assert edge[best] < 0.1 and near > 0.9

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7, 2.4), layout="constrained")
ax.bar(range(480, 600), edge[480:600], width=1, color=COLOURS["language"])
true_edge = 1023 * boxes["scene"][0][1] / 448
ax.axvline(true_edge, color=COLOURS["good"])
ax.text(true_edge - 1, 0.043, "the cat's upper edge", color=COLOURS["good"], ha="right")
ax.set(xlabel="location token", ylabel="probability", xlim=(480, 600))
save_figure(fig, "19_sure")

# %% [markdown]
# A bell: the model is sure of the edge to within twenty steps, nine pixels, so no single token is
# likely. (Its training gave an edge's neighbours a share of the target, in `tools/train_tiny.py`.) A
# name has no such neighbours.
#
# The product of all probabilities would punish long names, so we take the **geometric mean**:
# $\exp$ of the mean logarithm. One mean over everything has a fault too:


# %%
def geometric_mean(shares):
    return math.exp(sum(map(math.log, shares)) / len(shares))


# %%
place = [0.1, 0.1, 0.1, 0.1]  # four edges, each a choice among near-equal neighbours
for name in ([0.9], [0.9, 0.9, 0.9]):  # a name of one token, a name of three
    over_all = geometric_mean(place + name)
    apart = math.sqrt(geometric_mean(place) * geometric_mean(name))
    print(f"{len(name)} tokens: one mean over all {over_all:.2f}, place and name apart {apart:.2f}")
assert geometric_mean(place + [0.9] * 3) > 1.6 * geometric_mean(place + [0.9])

# %% [markdown]
# The same box, and a score over one and a half times as high because the name is longer. So **place**
# and **name** get a mean each, and the score is the mean of the two.
#
# Which tokens belong to which object? Decode ever longer beginnings of the answer: where the text
# ends, the last token ends. So each token has an end in the text, and belongs to the place or the name
# in which it ends.


# %%
#| export
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
    """`parse_detections` of an answer given as tokens, each object with its score."""
    text = tokenizer.decode(ids)
    detections = parse_detections(text, width, height, dropped)
    objects = [found for found in find_objects(text) if found.problem is None]
    scores = score_objects(objects, ids, log_probs, tokenizer)
    return [Detection(d.label, d.box, score) for d, score in zip(detections, scores)]


# %% [markdown]
# ### The whole way, with the trained model
#
# `generate_steps` ([lesson 18](18_generation.ipynb)) fills a list with the logarithms as it goes. This
# is all that detection needs:


# %%
def detect(image, what):
    ask, log_probs = processor(image, f"detect {what}"), []
    steps = generate_steps(model, ask["input_ids"], ask["pixel_values"], log_probs=log_probs)
    ids = [int(token) for token in steps]
    return score_detections(ids, log_probs, tokenizer, image.width, image.height)


# %%
outcome = {}
for name in labels:
    kinds = " ; ".join(dict.fromkeys(labels[name]))
    outcome[name] = detect(sample_picture(name), kinds)
    print(f"detect {kinds}:", [f"{d.label} {d.score:.2f}" for d in outcome[name]])
    assert [d.label for d in outcome[name]] == labels[name]

# %% [markdown]
# ## How good is a box? Intersection over union
#
# Two boxes: the area they share, divided by the area they cover together, is their **IoU**,
# intersection over union. 1 means equal, 0 apart. By hand, a 4 × 4 box and the same
# box moved by (2, 1):
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


# %%
print(f"{iou_loop((0, 0, 4, 4), (2, 1, 6, 5)):.3f}, apart: {iou_loop((0, 0, 4, 4), (5, 5, 6, 6))}")

# %% [markdown]
# Without `max(0, …)`, two negative sides would multiply to a positive area. Vectorised, all pairs at
# once:


# %%
#| export
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


# %%
some = torch.rand(40, 2, 2, dtype=torch.float64).sort(dim=1).values.reshape(-1, 4).tolist()
slow = torch.tensor([[iou_loop(p, q) for q in some] for p in some], dtype=torch.float64)
assert torch.allclose(box_iou(some, some), slow, atol=1e-12)

# %% [markdown]
# What does a number look like? The scene's cat, and a box that slides away from it.

# %%
cat = boxes["scene"][0]
slid = [(cat[0] + step, cat[1] - step, cat[2] + step, cat[3] - step) for step in (4, 12, 26, 42)]
slid_iou = box_iou([cat], slid)[0].tolist()
covered = [2 * value / (1 + value) for value in slid_iou]  # share of the cat's box, for equal boxes
print([f"IoU {value:.2f}, covered {share:.2f}" for value, share in zip(slid_iou, covered)])
assert slid_iou[2] < 0.5 and covered[2] > 0.6

# %% tags=["hide-input"]
views = []
for box in slid:
    view = draw_boxes(sample_picture("scene"), [cat, box], ["true", "guess"])
    views.append(view.crop((0, 150, 240, 390)))
fig = show_images(views, [f"IoU {value:.2f}" for value in slid_iou], height=2.2)
save_figure(fig, "19_iou.png")

# %% [markdown]
# What to notice: the third still covers more than six tenths of the cat's box, and its IoU is below
# 0.5. What was missed and what is too much both count. 0.5 is the usual bound for "found".
#
# ## Matching: who found whom?
#
# The surest detection chooses first. It takes the *free* true box of its kind that it overlaps most, if
# the IoU reaches the threshold. A second box on the same cat is a *false positive*. True boxes left
# over were *missed*.


# %%
#| export
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


# %%
truth = [(10, 10, 30, 30), (50, 10, 70, 30), (80, 40, 100, 60)]
found = [(12, 11, 31, 30), (10, 10, 30, 31), (51, 12, 70, 30), (0, 50, 20, 70), (81, 40, 100, 62)]
scores = [0.9, 0.8, 0.7, 0.6, 0.5]

# %%
ious = box_iou(found, truth)
chosen = match_boxes(scores, ious)
for score, row, j in zip(scores, ious.tolist(), chosen):
    print(score, [f"{v:.2f}" for v in row], "→", f"box {j}" if j >= 0 else "false positive")
assert ious[1, 0] > ious[0, 0] and chosen == [0, -1, 1, -1, 2]

# %% [markdown]
# The second detection fits box 0 *better* than the first, and still comes too late: a score decides.
#
# ## Average precision: one number for all thresholds
#
# Walk down the list, from sure to unsure. After each step two shares:
#
# - **precision**: of those named so far, how many were right?
# - **recall**: of those that exist, how many were found?

# %%
right, table = 0, []
for count, j in enumerate(chosen, start=1):
    right += j >= 0
    table.append((right / len(truth), right / count))
    print(f"first {count}: {right} right, recall {right}/3, precision {right}/{count}")

# %% [markdown]
# The precision at a recall is defined as the best precision at this recall *or beyond*: so the
# zigzag becomes a falling staircase. **Average precision** (AP) is its mean height. COCO, the data
# set that everyone compares on, reads it at 101 recalls: 0, 0.01, … 1.

# %%
heights = [max((p for r, p in table if r >= k / 100 - 1e-9), default=0) for k in range(101)]
by_pencil = (34 * 1 + 33 * 2 / 3 + 34 * 3 / 5) / 101  # recalls up to 1/3, up to 2/3, up to 1
print(f"AP = {sum(heights) / 101:.4f}")
assert abs(sum(heights) / 101 - by_pencil) < 1e-9

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(5.4, 2.7), layout="constrained")
recall, precision = zip(*table)
recalls = [k / 100 for k in range(101)]
ax.plot(recall, precision, "o--", color=COLOURS["muted"], label="after each detection")
ax.plot(recalls, heights, color=COLOURS["vision"], label="staircase", drawstyle="steps-pre")
ax.fill_between(recalls, heights, color=COLOURS["vision"], alpha=0.15, step="pre")
ax.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.08))
ax.legend(loc="lower left")
save_figure(fig, "19_average_precision")

# %% [markdown]
# The area is AP. Over many pictures: match in each picture, then put all detections in **one** list, sorted by score.


# %%
#| export
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


# %%
seen = [[Detection("cat", box, score) for box, score in zip(found, scores)]]  # one picture
real = [[Detection("cat", box) for box in truth]]
by_bound = {t: average_precision(seen, real, "cat", t) for t in (0.5, 0.75, 0.9, 0.95)}
print({t: f"{value:.4f}" for t, value in by_bound.items()})
assert abs(by_bound[0.5] - by_pencil) < 1e-9
assert list(by_bound.values()) == sorted(by_bound.values(), reverse=True)

# %%
last = Detection("cat", (0, 80, 9, 90), 0.1)  # wrong, and less sure than all others
assert average_precision([[*seen[0], last]], real, "cat") == by_bound[0.5]

# %% [markdown]
# A stricter bound never makes the number higher. And a false positive *below* all right ones costs
# nothing: only wrong things said with confidence hurt.
#
# "The" AP of papers is the mean over the ten bounds
# 0.50, 0.55, … 0.95 and over all kinds (exercise 2).
#
# ## Against the reference
#
# The reference is pycocotools. A test ran it on 30 random pictures with misses, doubles and wrong kinds,
# and stored boxes and results: three kinds, ten bounds.

# %%
reference = load_file("reference/detection.safetensors")
KINDS = ("cat", "dog", "owl")
found_all, true_all = ([[] for _ in range(30)] for _ in range(2))
for name, pictures in (("found", found_all), ("truth", true_all)):
    for picture, kind, *box, score in reference[name].tolist():
        pictures[int(picture)].append(Detection(KINDS[int(kind)], tuple(box), score))

# %%
bounds = [0.5 + 0.05 * k for k in range(10)]
ours = torch.tensor(
    [[average_precision(found_all, true_all, kind, t) for kind in KINDS] for t in bounds]
)
gap = (ours - reference["precision"]).abs().max().item()
assert gap <= 1e-6
print(f"largest difference from pycocotools: {gap:.0e}")

# %% [markdown]
# ## See it
#
# The trained model's own boxes again, each with its score, and above them the IoU with the true box:

# %%
fits = {}
for name in labels:
    ious = box_iou([d.box for d in outcome[name]], boxes[name])
    fits[name] = ious.amax(1).tolist()
    print(name, "IoU", [f"{v:.2f}" for v in fits[name]])
surest = max(d.score for found in outcome.values() for d in found)
assert surest < 0.5 < 0.7 < min(min(values) for values in fits.values())

# %% tags=["hide-input"]
shown, titles = [], []
for name, found in outcome.items():
    names, sure = [d.label for d in found], [d.score for d in found]
    shown.append(draw_small(name, [d.box for d in found], names, sure))
    titles.append("IoU " + ", ".join(f"{value:.2f}" for value in fits[name]))
fig = show_images(shown, titles, height=3.0)
save_figure(fig, "19_scenes.png")

# %% [markdown]
# What to notice: good boxes, low scores. That is the bell again. A score sorts the boxes of one model;
# it is not the chance of being right.
#
# ## At full size
#
# What do 1024 steps cost? Half a step of error at each edge: on a large object nothing, on a small
# one a lot. The mean IoU of a square with its own rounded self, and the same for 256 steps:

# %%
torch.manual_seed(0)
sides, rounded = (0.003, 0.006, 0.0125, 0.025, 0.05, 0.1, 0.2), {1024: [], 256: []}
for tokens in rounded:
    for side in sides:
        corner = torch.rand(400, 2, dtype=torch.float64) * (1 - side)
        square = torch.cat([corner, corner + side], dim=1)
        near = (square * (tokens - 1)).round() / (tokens - 1)
        rounded[tokens].append(box_iou(square, near).diagonal().mean().item())
    print(f"{tokens:4} tokens:", [f"{value:.2f}" for value in rounded[tokens]])
assert rounded[1024][-1] > 0.99 and rounded[1024][0] < 0.8 and rounded[256][0] < 0.3

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(5.4, 2.6), layout="constrained")
for tokens, colour in ((1024, "vision"), (256, "muted")):
    ax.plot(sides, rounded[tokens], "o-", color=COLOURS[colour], label=f"{tokens} location tokens")
ax.set(xscale="log", xlabel="side of the object, share of the picture", ylabel="IoU after rounding")
ax.set_xticks(sides, [f"{side:g}" for side in sides])
ax.minorticks_off()
ax.legend()
save_figure(fig, "19_steps")

# %% [markdown]
# A detector with a head finds 100 objects in one pass. Here time grows with what is found: the price
# for a detector that takes any word as its class.
#
# ## A bug people really make: right before down
#
# Everyone writes (x, y). A colleague reads the four numbers as x0 y0 x1 y1. No error, boxes inside
# the picture. On the first test picture the model merely looks careless:


# %%
def parse_colleague(text, width, height):
    read = parse_detections(text, width, height)
    return [Detection(d.label, (d.box[1], d.box[0], d.box[3], d.box[2])) for d in read]


# %% tags=["hide-input"]
views = []
for name in ("scene2", "scene"):
    read = parse_colleague(answers[name], 448, 448)
    views.append(draw_small(name, [d.box for d in read], labels[name]))
fig = show_images(views, ["first test picture", "second"], height=3.0)
save_figure(fig, "19_swapped.png")

# %% [markdown]
# The bee lies on the diagonal, where x and y are nearly equal: there swapping is invisible. The tulip
# is near it: its box only lies down. A check on numbers sees it at once:

# %%
for name in boxes:
    read = [d.box for d in parse_colleague(answers[name], 448, 448)]
    ours = [d.box for d in parse_detections(answers[name], 448, 448)]
    swapped, right = (box_iou(r, boxes[name]).diagonal() for r in (read, ours))
    print(f"{name:7} ours {right.min():.2f}, colleague {[f'{v:.2f}' for v in swapped.tolist()]}")
    assert right.min() > 0.98 and swapped.min() < 0.6

# %% [markdown]
# The rule: test with an object that is **not on the diagonal**. (And with a picture that is not square:
# that one exposes swapped width and height.)

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (write): points instead of boxes
#
# Some models answer `point nose` with two location tokens, y before x: `<loc0100><loc0200> nose`.
# Write the reader: a list of `(label, (x, y))` in pixels. A run of location tokens that isn't exactly
# two long, or has a number beyond 1023, is no point. No text may raise an exception.


# %% tags=["exercise"]
def read_points(text, width, height):
    return None  # [(label, (x, y)), …]


# %% tags=["check"]
def test_1(read_points):
    def read(text):
        try:
            points = read_points(text, 2046, 1023)
        except Exception as error:
            raise AssertionError(f"{text!r} raises {type(error).__name__}: no text may") from None
        assert isinstance(points, list), "return a list, whatever the text"
        pairs = all(len(p) == 2 and isinstance(p[1], tuple) for p in points)
        assert pairs, f"{text!r}: each point is (label, (x, y))"
        return points

    nose, ear = "<loc0100><loc0200> nose", "<loc0300><loc0500> left ear"
    points = read(nose)
    assert len(points) == 1, f"{nose!r} holds one point"
    assert points[0][0] == "nose", "the label has no space before or after it"
    (x, y), up = points[0][1], "the picture is 2046 wide and 1023 high"
    assert abs(x - y) > 1 and x > y, f"which number is down, which is right? {up}"
    assert abs(x - 400) < 1e-6 and abs(y - 100) < 1e-6, f"shares are of 1023; {up}"
    for text in (f"{nose} ; {ear}", f"point nose\n{nose} ; {ear}", f"{nose}{ear}"):
        names = [label for label, _ in read(text)]
        assert names == ["nose", "left ear"], f"{text!r}: wrong labels {names}"
    for what in ("<loc0001>", "<loc0001>" * 3, "<loc0001>" * 4, "<loc0001><loc1024>"):
        for text in (f"{what} eye ; {nose}", f"{nose} ; {what}", f"{nose} ; {what} eye"):
            names = [label for label, _ in read(text)]
            assert names == ["nose"], f"{text!r}: only the nose is a point, you found {names}"
    assert read("no point here") == [], "an answer without numbers has no points"
    assert [label for label, _ in read("<loc0100><loc0200>")] == [""], "a label may be missing"


check(test_1, read_points)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Search for a run, `(?:<loc\d{4}>)+`, and behind it a label as in `OBJECT`. `re.findall` gives both.
# How many numbers does the run have?
#
# </details>


# %% tags=["solution"]
# Search instead of splitting: what is no point is simply not taken.
def read_points(text, width, height):
    points = []
    for run, label in re.findall(r"((?:<loc\d{4}>)+)([^;<>\n]*)", text):
        numbers = [int(number) for number in re.findall(r"\d{4}", run)]
        if len(numbers) == 2 and max(numbers) <= 1023:
            y, x = numbers
            points.append((label.strip(), (x / 1023 * width, y / 1023 * height)))
    return points


check(test_1, read_points)

# %% [markdown]
# ### Exercise 2 (fill in): the AP of papers
#
# Mean over the ten bounds 0.50, 0.55, … 0.95 and over all kinds *that are there*: a kind without a
# true box is left out. Pictures as in `average_precision`.


# %% tags=["exercise"]
def mean_average_precision(found, truth):
    return None  # one number


# %% tags=["check"]
def test_2(mean_average_precision):
    def value_of(found, truth):
        value = mean_average_precision(found, truth)
        assert isinstance(value, float | torch.Tensor), "return one number"
        return float(value)

    extra = [[*row, Detection("unicorn", (0, 0, 9, 9), 1.0)] for row in found_all]
    with_extra, value = value_of(extra, true_all), value_of(found_all, true_all)
    assert value == value, "your value is NaN"
    assert with_extra == with_extra, "NaN, where a unicorn is seen and none is there"
    assert abs(with_extra - value) < 1e-6, "a unicorn that isn't there changes your value"
    bee = [[Detection("bee", (0, 0, 10, 10))]]
    assert abs(value_of(bee, bee) - 1) < 1e-6, "other pictures have other kinds: here one bee"
    near = [[Detection("bee", (0, 0, 10, 9.52))]]  # IoU 0.952
    assert abs(value_of(near, bee) - 1) < 1e-6, "an IoU of 0.952 is enough for all ten bounds"
    near = [[Detection("bee", (0, 0, 10, 9.2))]]  # IoU 0.92
    assert abs(value_of(near, bee) - 0.9) < 1e-6, "an IoU of 0.92 is enough for all bounds but one"
    theirs = float(reference["precision"].mean())
    assert abs(value - theirs) < 1e-6, "pycocotools has another value for the 30 pictures"


check(test_2, mean_average_precision)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Collect the labels of `truth` in a set. Then two loops and one mean.
#
# </details>


# %% tags=["solution"]
# The kinds come from the truth: only there does a recall make sense.
def mean_average_precision(found, truth):
    kinds = {detection.label for row in truth for detection in row}
    bounds = [0.5 + 0.05 * k for k in range(10)]
    values = [average_precision(found, truth, kind, t) for kind in sorted(kinds) for t in bounds]
    return sum(values) / len(values)


check(test_2, mean_average_precision)

# %% [markdown]
# ### Exercise 3 (extend): say it once
#
# Models repeat themselves: two boxes on one cat. Write non-maximum suppression: go from sure to unsure
# and drop a detection that overlaps a kept one *of the same label* with an IoU above `limit`. Return
# the kept ones, surest first.


# %% tags=["exercise"]
def say_once(detections, limit=0.7):
    return None  # a list


# %% tags=["check"]
def test_3(say_once):
    a = Detection("cat", (0, 0, 10, 10), 0.6)
    b = Detection("cat", (0, 0, 10, 11), 0.9)
    c = Detection("dog", (0, 0, 10, 10), 0.5)
    d = Detection("cat", (20, 0, 30, 10), 0.95)
    kept = say_once([a, b, c, d])
    assert isinstance(kept, list), "return a list of detections"
    assert all(isinstance(d, Detection) for d in kept), "return detections, not their parts"
    assert a not in kept, "two boxes on one cat: the less sure one is still there"
    assert b in kept, "two boxes on one cat: the surer one is gone"
    assert c in kept, "a dog is gone because a cat lies in the same place"
    assert d in kept, "a cat is gone that overlaps nothing"
    assert kept == sorted(kept, key=lambda d: -d.score), "the surest comes first"
    assert say_once([]) == [], "nothing in, nothing out"
    chain = [Detection("cat", (4 * k, 0, 4 * k + 10, 10), 0.9 - 0.1 * k) for k in range(3)]
    kept = say_once(chain, 0.4)
    assert chain[1] not in kept, "`limit` is not obeyed: 0.43 is above 0.4"
    assert chain[2] in kept, "one is gone that overlaps only a box which was dropped itself"
    assert say_once(chain) == chain, "`limit` is not obeyed: 0.43 is below 0.7"


check(test_3, say_once)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `sorted(detections, key=lambda d: -d.score)`, a list `kept`, and `any(…)` over it.
#
# </details>


# %% tags=["solution"]
# Each is compared with those that stay, not with all: what is dropped drops nobody.
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
# - A box is four location tokens, y0 x0 y1 x1, `round(v · 1023)` of the picture's height or width.
# - A model's answer is untrusted: search for objects, keep the good, name the broken.
# - The probabilities of an object's tokens make its score, place and name apart.
# - IoU measures one box; AP measures a list with its order.
# - Test with objects off the diagonal, in pictures that are not square.

# %% [markdown]
# ## Quiz
#
# **1.** Every score of a model is multiplied by 0.1. What happens to its AP?
#
# <details><summary>Answer</summary>
#
# Nothing. AP uses scores only to sort.
#
# </details>

# %% [markdown]
# **2.** A colleague multiplies the shares by 224, the side of the square that the model saw. The
# photograph has 1800 × 1200 pixels. What does she see?
#
# <details><summary>Answer</summary>
#
# All boxes are small, and they huddle in the upper left corner. The right factors are the given
# picture's own width and height.
#
# </details>

# %% [markdown]
# **3.** A colleague trains on boxes rounded with `int(v * 1024)` and reads with `/ 1023`. How large is
# the error at most?
#
# <details><summary>Answer</summary>
#
# Up to one step, where rounding errs by half of one: 0.44 pixels in a picture of 448. It lowers the IoU
# of small objects. And at $v = 1$ it gives 1024, for which there is no token.
#
# </details>

# %% [markdown]
# ## References
#
# - Lucas Beyer et al., *PaliGemma: A versatile 3B VLM for transfer*, 2024, section 3.2 (the 1024
#   location tokens).
# - Ting Chen et al., *Pix2seq: A Language Modeling Framework for Object Detection*, 2022.
# - Tsung-Yi Lin et al., *Microsoft COCO: Common Objects in Context*, 2014; pycocotools, `cocoeval.py`.
# - big_vision: `pp/proj/paligemma`, the published preprocessing of boxes.

# %% [markdown] tags=["navigation"]
# [← Generation](18_generation.ipynb) | [contents](00_overview.ipynb) | [Mask codec →](20_mask_codec.ipynb)
