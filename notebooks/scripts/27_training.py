# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["navigation"]
# [← Contrastive learning](26_contrastive.ipynb) | [contents](00_overview.ipynb) | [LoRA →](29_lora.ipynb)

# %% [markdown]
# # 27 · Training: how does a model learn to look before it speaks?
#
# *45 minutes* · part V, Learning
#
# **What you will be able to do**
#
# - compute the loss of an answer, and make one that knows that bin 500 is next to 501;
# - explain every part of a training step;
# - show that a model ignores its picture, and cure it;
# - stop a run at any step and continue it bit for bit.

# %% tags=["map"]
from paligemma.plotting import model_map

model_map("training")

# %% [markdown]
# ## Setup
#
# Training is where all lessons meet: the model (15), the processor (14), the scenes (23), generation
# (18) and detection (19). The cells that begin with `#| export` become
# [training.py](../paligemma/training.py). One thread: small models gain nothing from two, and your
# curves become those printed here.

# %%
#| export
"""Training a PaliGemma: batches, the prefix-LM loss, the schedule, checkpoints, evaluation."""

import argparse
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from paligemma import scenes
from paligemma.checkpoint import load_model, replacing, save_model
from paligemma.detection import box_iou, parse_detections
from paligemma.gemma import GemmaConfig
from paligemma.generation import generate
from paligemma.image_processor import ImageProcessor
from paligemma.model import PaliGemma, PaliGemmaConfig, prefix_lm_mask
from paligemma.processor import Processor, collate
from paligemma.segmentation import MaskCodec, crop_masks, encode_segments, parse_segments
from paligemma.siglip import SiglipVisionConfig
from paligemma.tokenizer import Tokenizer

# %% tags=["setup"]
import tempfile

import matplotlib.pyplot as plt

from paligemma.plotting import COLOURS, check, save_figure, show_images

torch.set_num_threads(1)
_ = torch.manual_seed(25)

# %% [markdown]
# ## The problem
#
# A row of a training batch holds a picture, a question and the answer. What should the model learn
# from it? Not the picture: it is given. Not the question: the user writes it. Only the **answer**,
# and that it **ends**.

# %%
tokenizer = Tokenizer.from_pretrained(scenes.ASSETS / "tiny")
processor = Processor(tokenizer, ImageProcessor(scenes.SIZE), 64)
row = collate(
    [processor.encode_prefix("answer en where is the cat?")], [processor.encode_suffix("top left")]
)
named = {tokenizer.image_id: "▦", tokenizer.bos_id: "▸", tokenizer.eos_id: "■"}
named[tokenizer.newline_id] = "↵"
shown = slice(61, None)  # the last three of the 64 image tokens, and the text
ids = row["input_ids"][0, shown].tolist()
pieces = [named.get(i) or tokenizer.decode([i]).replace(" ", "·") for i in ids]
learnt = (row["labels"][0, shown] != -100).tolist()
fig, ax = plt.subplots(figsize=(9, 2.1), layout="constrained")
for i, (piece, is_label) in enumerate(zip(pieces, learnt)):
    colour = COLOURS["vision" if piece == "▦" else "accent" if is_label else "language"]
    ax.add_patch(plt.Rectangle((i - 0.46, 1.3), 0.92, 0.8, color=colour, alpha=0.3))
    ax.text(i, 1.7, piece, ha="center", va="center", fontsize=8)
    label = piece if is_label else "−100"
    ax.text(i, 0.4, label, ha="center", va="center", fontsize=8 if is_label else 6.5,
            color=COLOURS["ink" if is_label else "muted"])  # fmt: skip
    if is_label:  # the logits one place earlier are compared with this label
        style = {"arrowstyle": "->", "color": COLOURS["accent"]}
        ax.annotate("", (i - 0.05, 0.72), (i - 1, 1.26), arrowprops=style)
ax.text(-0.8, 1.7, "input", ha="right", va="center")
ax.text(-0.8, 0.4, "labels", ha="right", va="center")
ax.set(xlim=(-2.6, len(pieces)), ylim=(0, 2.2))
ax.set_axis_off()
save_figure(fig, "27_labels")

# %% [markdown]
# Blue: image tokens (61 more to the left). Orange: the prompt, from bos (▸) to newline (↵). Purple:
# the answer and eos (■), the only labels. An arrow goes from the place that **guesses** to its label.
#
# ## By hand, and as a loop
#
# The loss of a place is $-\ln p$ of the right token; that of a batch is the mean over all labels.
# Two labels, and the model gave them ½ and ¼: $(\ln 2 + \ln 4)/2 = 1.5 \ln 2$.

# %%
probabilities = torch.tensor(
    [  # a vocabulary of 4; the row of a place guesses the NEXT token
        [0.70, 0.10, 0.10, 0.10],  # place 0, prefix: its guess is not asked for
        [0.25, 0.50, 0.15, 0.10],  # place 1, newline: right is token 1
        [0.25, 0.25, 0.25, 0.25],  # place 2: right is token 3
        [0.10, 0.20, 0.30, 0.40],  # place 3, the last: nothing comes after it
    ]
)
labels = torch.tensor([[-100, -100, 1, 3]])
print(f"{-(math.log(0.5) + math.log(0.25)) / 2:.4f} = {1.5 * math.log(2):.4f}")


def loss_loop(logits, labels):
    """Place after place: float[B, L, V], int64[B, L] → the mean of -ln p."""
    losses = []
    for row, truth in zip(logits, labels.tolist()):
        for place in range(1, len(truth)):
            if truth[place] != -100:
                p = row[place - 1].softmax(-1)  # the guess made one place earlier
                losses.append(-math.log(p[truth[place]]))
    return sum(losses) / len(losses)


logits = probabilities.log()[None]  # a softmax over log p gives p back
print(f"{loss_loop(logits, labels):.4f}")

# %% [markdown]
# ## A loss that knows its neighbours
#
# A coordinate is one of 1024 tokens. Truth: `<loc0500>`. To cross-entropy, a bet on 501 (a tenth of a
# pixel off) and one on 900 (44 pixels off) cost **the same**.
#
# The cure is in the **target**: not all weight on 500, but a bell around it, 6 bins wide (two thirds
# of a pixel). A near miss is partly right.
#
# ## The module: vectorised, with soft targets


# %%
#| export
def soft_locations(softness: float, bins: int = 1024) -> torch.Tensor:
    """For each location token, how much of the target its neighbours get: a bell, rows sum to 1.

    Returns:
        float32[1024, 1024].
    """
    bin_ = torch.arange(bins)
    return torch.softmax(-((bin_[:, None] - bin_[None, :]) ** 2) / (2 * softness**2), dim=-1)


def answer_loss(logits, labels, first_location: int, soft: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the answer's tokens; a location may be off by a little at a low price.

    Args:
        logits: float32[B, L, V].
        labels: int64[B, L], -100 where nothing is to be learnt; shifted here.
        first_location: id of `<loc0000>`.
        soft: from `soft_locations`.

    Returns:
        A scalar: the mean over all labelled tokens.
    """
    guesses, truth = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    guesses, truth = guesses[truth != -100], truth[truth != -100]
    log_p = guesses.log_softmax(-1)
    place = truth - first_location
    is_location = (place >= 0) & (place < len(soft))
    loss = F.nll_loss(log_p[~is_location], truth[~is_location], reduction="sum")
    located = log_p[is_location, first_location : first_location + len(soft)]
    return (loss - (located * soft[place[is_location]]).sum()) / max(1, len(truth))


# %%
soft, hard = soft_locations(6.0), torch.eye(1024)[500]
misses = torch.arange(0, 101)
bells = (0.98 * soft[500 + misses] + 0.02 / 1024).log()  # never quite sure
sharp = (0.98 * (torch.arange(1024) == 500 + misses[:, None]) + 0.02 / 1024).log()

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9), layout="constrained")
near = torch.arange(475, 526)
left.bar(near, hard[near], width=0.8, color=COLOURS["muted"], label="hard: one bin, 1.0")
left.bar(near, soft[500, near], width=0.8, color=COLOURS["accent"], label="soft: a bell")
left.set(xlabel="location token", title="two targets for <loc0500>", ylim=(0, 0.12))
left.legend(fontsize=8)
right.plot(misses, -(sharp @ hard), color=COLOURS["muted"], label="hard target, sharp guess")
right.plot(misses, -(bells @ soft[500]), color=COLOURS["accent"], label="soft target, bell guess")
right.set(xlabel="the guess is off by … bins (9 bins = 1 pixel)", ylabel="loss", ylim=(0, None))
right.legend(fontsize=8)
save_figure(fig, "27_soft")

# %% [markdown]
# Grey jumps and stays flat: no hint *which way* to go. Purple is a valley. It cannot reach 0: the best
# a model can do is to copy the bell.
#
# ## Against the reference
#
# PyTorch's `cross_entropy` takes targets that are probabilities, too: a one for words, the bell for
# locations.

# %%
by_hand = F.pad(probabilities, (0, 1024)).log()[None]  # locations: ids 4 to 1027, never said
assert abs(answer_loss(by_hand, labels, 4, soft) - 1.5 * math.log(2)) < 1e-6
V, first = 1100, 50
logits = torch.randn(3, 9, V)
labels = torch.randint(0, V, (3, 9)).masked_fill(torch.rand(3, 9) < 0.4, -100)
truth = labels[:, 1:].flatten()
kept = truth != -100
targets = F.one_hot(truth[kept], V).float()
place = truth[kept] - first
located = (place >= 0) & (place < 1024)
targets[located] = F.pad(soft[place[located]], (first, V - first - 1024))
reference = F.cross_entropy(logits[:, :-1].flatten(0, 1)[kept], targets)
difference = float((answer_loss(logits, labels, first, soft) - reference).abs())
assert difference <= 1e-5
print(int(kept.sum()), "labels,", int(located.sum()), "of them locations; difference below 1e-5")

# %% [markdown]
# ## The run's settings
#
# Everything a run depends on stands in one dataclass, which its folder keeps as JSON. An unknown key
# is an error: a misspelt `totl_steps` must not train for the default number of steps.
#
# `make_model` scales what is drawn: PyTorch's `Embedding` has deviation 1, but Gemma multiplies words by
# $\sqrt D$ and would drown the picture.


# %%
#| export
@dataclass
class TrainingConfig:
    """Everything a run depends on; a run's folder keeps it as `config.json`.

    Args:
        tokenizer: folder that holds `tokenizer.model`.
        seed: of the weights and of the world.
        batch: pictures a step.
        accumulate: parts that a batch is worked through in, to save memory.
        questions: short questions a picture, besides one `detect`; its features serve all.
        short: tasks that they are drawn from; a name that stands twice is asked twice as often.
        lr: peak learning rate of Muon; AdamW takes half of it.
        look_steps: steps in which the vision tower alone learns what each patch shows.
        curriculum: (steps since the tower learnt, numbers of objects to draw from, from then on).
        total_steps, warm_steps, cool_steps: length of the run, of its rise and of its fall.
        ema: share of the running mean of the weights that survives a meeting.
        meet_every: steps between two averages over the processes.
        vision_width … text_mlp: sizes of the model.
        softness: standard deviation of the soft location targets, in bins of 1/1023.
        jitter: standard deviation of the noise on location tokens as inputs, in the same bins.
        segments: share of the pictures that are asked for masks instead of boxes.
        garble: share of the mask codes that are read wrong, as inputs.
        bfloat16: multiply matrices in bfloat16; weights, sums and all else stay float32.
    """

    tokenizer: str = str(scenes.ASSETS / "tiny")
    seed: int = 0
    batch: int = 64
    accumulate: int = 1
    questions: int = 2
    short: tuple = ("caption", "caption", "count", "where", "is there")
    lr: float = 3e-3
    look_steps: int = 2000
    curriculum: tuple = ((0, (1,)), (300, (1, 2)), (900, (1, 2, 3, 4, 5)))
    total_steps: int = 8000
    warm_steps: int = 50
    cool_steps: int = 2500
    ema: float = 0.98
    meet_every: int = 10
    processes: int = 2
    vision_width: int = 128
    vision_layers: int = 4
    text_width: int = 128
    text_layers: int = 4
    text_mlp: int = 256
    softness: float = 6.0
    jitter: float = 6.0
    segments: float = 0.0
    garble: float = 0.25
    bfloat16: bool = False

    @classmethod
    def read(cls, path: str | os.PathLike) -> "TrainingConfig":
        """Read a JSON file; a `ValueError` names a key that is unknown or of another type."""
        types = {field.name: type(field.default) for field in fields(cls)}
        return cls(**_read_values(path, types))


# %%
#| export
def _read_values(path: str | os.PathLike, types: dict) -> dict:
    """A JSON object's values, each of the type that its key must have."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected an object")
    if unknown := sorted(set(values) - set(types)):
        raise ValueError(f"{path}: unknown keys {', '.join(unknown)}; see TrainingConfig")
    for key, value in values.items():
        fits = {float: (int, float), tuple: (list, tuple)}.get(types[key], types[key])
        if not isinstance(value, fits) or isinstance(value, bool) != (types[key] is bool):
            raise ValueError(f"{path}: {key} is {value!r}; expected {types[key].__name__}")
    return values


def make_model(config: TrainingConfig, image_id: int) -> PaliGemma:
    """A PaliGemma of the size asked for, with weights drawn at a scale that small models like."""
    sizes = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=config.vision_width,
            intermediate_size=4 * config.vision_width,
            num_hidden_layers=config.vision_layers,
            num_attention_heads=4,
            image_size=scenes.SIZE,
            patch_size=scenes.PATCH,
        ),
        text_config=GemmaConfig(
            vocab_size=-(-(image_id + 1) // 64) * 64,
            hidden_size=config.text_width,
            intermediate_size=config.text_mlp,
            num_hidden_layers=config.text_layers,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=32,
        ),
        image_token_index=image_id,
    )
    model = PaliGemma(sizes)
    nn.init.normal_(model.language_model.embed_tokens.weight, std=config.text_width**-0.5)
    nn.init.normal_(model.vision_tower.embeddings.position_embedding.weight, std=0.02)
    return model


# %% [markdown]
# ## Look before you speak
#
# Trained from nothing, a small PaliGemma learns how captions *sound*, because that is the quick win.
# The picture's vectors are noise at first, and noise is something a model learns to ignore. PaliGemma
# starts from SigLIP, which had seen billions of pictures.
#
# Our replacement: a throw-away head asks every patch which kind covers it, whose centre it holds, and
# where its object's edges are. 64 lessons a picture, and no ignorant language model in between.


# %%
#| export
def patch_boxes(scene: scenes.Scene) -> np.ndarray:
    """For each patch, the box of the object whose box covers its centre, relative to it.

    Returns:
        float32[64, 4]: x0 y0 x1 y1 minus the patch's centre, in patch sides; 0 where no object is.
    """
    side, half = scenes.SIZE // scenes.PATCH, scenes.PATCH // 2
    found = np.zeros((side, side, 4), np.float32)
    centres = np.arange(side) * scenes.PATCH + half
    for box in scene.boxes:
        x0, y0, x1, y1 = box.tolist()
        rows = slice((y0 + half - 1) // scenes.PATCH, (y1 + half - 1) // scenes.PATCH)
        columns = slice((x0 + half - 1) // scenes.PATCH, (x1 + half - 1) // scenes.PATCH)
        found[rows, columns, 0::2] = box[0::2] - centres[columns][None, :, None]
        found[rows, columns, 1::2] = box[1::2] - centres[rows][:, None, None]
    return found.reshape(-1, 4) / scenes.PATCH


class PatchHead(nn.Module):
    """Says for each patch which kind covers it, whose centre lies in it, and its object's box.

    Thrown away after training: its loss gives the vision tower 64 lessons a picture where a
    caption gives one.
    """

    def __init__(self, width: int):
        super().__init__()
        self.classes = len(scenes.NAMES) + 1
        self.linear = nn.Linear(width, 2 * self.classes)
        self.box = nn.Linear(width, 4)
        self.register_buffer("weight", torch.ones(self.classes), persistent=False)
        self.weight[-1] = 0.2  # "nothing here" is most of the picture

    def forward(self, features, targets, boxes):
        """float32[B, N, D], int64[B, 2, N] and float32[B, N, 4] to (loss, accuracy on objects)."""
        logits = self.linear(features).unflatten(-1, (2, self.classes)).transpose(1, 2)
        logits, flat = logits.flatten(0, 2), targets.flatten()
        loss = F.cross_entropy(logits, flat, self.weight)
        covered = targets[:, 0] < self.classes - 1  # (B, N)
        error = (self.box(features) - boxes)[covered].abs().mean()
        there = flat < self.classes - 1
        return loss + 2 * error, (logits.argmax(-1) == flat)[there].float().mean()


# %%
scene = scenes.make_scene(9, "train", objects=(3,))
kinds = torch.from_numpy(scenes.patch_targets(scene)).view(2, 8, 8)
edges = torch.from_numpy(patch_boxes(scene)).view(8, 8, 4)
fig, axes = plt.subplots(1, 2, figsize=(7, 3.6), layout="constrained")
for ax, title in zip(
    axes, ("which kind covers me? (5 letters)", "where is my object's left-top corner?")
):
    ax.imshow(scene.image)
    ax.set(title=title, xticks=range(0, 113, 14), yticks=range(0, 113, 14))
    ax.set(xticklabels=[], yticklabels=[], xlim=(0, 112), ylim=(112, 0))
    ax.grid(color="white", alpha=0.5, linewidth=0.6)
for y in range(8):
    for x in range(8):
        centre, kind = (14 * x + 7, 14 * y + 7), int(kinds[0, y, x])
        if kind == len(scenes.NAMES):
            continue
        box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}
        axes[0].text(
            *centre, scenes.NAMES[kind][:5], fontsize=5.5, ha="center", va="center", bbox=box
        )
        target = (centre[0] + 14 * float(edges[y, x, 0]), centre[1] + 14 * float(edges[y, x, 1]))
        style = {"arrowstyle": "-", "color": COLOURS["accent"], "lw": 0.9}
        axes[1].annotate("", target, centre, arrowprops=style)
        axes[1].plot(*centre, ".", color=COLOURS["accent"], markersize=4)
save_figure(fig, "27_patches.png")

# %% [markdown]
# All patches of an object point to one corner: attention's work.
#
# ## Batches
#
# Batch number 1234 depends on the seed and on 1234 alone. The vision tower runs **once** for all
# questions about a scene.
#
# In training the model reads true words, later its own, which are a little wrong: of the location words
# it has read only those of 113 pixel edges. The cure: it reads locations that are moved (`jitter`), and
# every fourth mask code is another's (`garble`).

# %%
#| export
GROUPS = ("short", "detect", "segment")


def questions(rng, scene: scenes.Scene, config, words: list | None = None) -> tuple:
    """Draw short questions about a scene, and one for its objects.

    Args:
        rng: where the randomness comes from.
        scene: what is asked about.
        config: how many short ones, and which.
        words: each object's box and mask as text; None: boxes are asked for.

    Returns:
        A list of (prompt, answer) for each of GROUPS.
    """
    short = []
    for _ in range(config.questions):
        name = config.short[rng.integers(len(config.short))]
        language = scenes.LANGUAGES[max(0, int(rng.integers(-2, 3)))]  # English 3 of 5
        short.append(scenes.task(rng, scene, name, language))
    if words is None:
        return short, [scenes.task(rng, scene, "detect")], []
    return short, [], [scenes.task(rng, scene, "segment", words=words)]


def mask_words(made: list[scenes.Scene], codec: MaskCodec) -> list[list[str]]:
    """Box and mask of every object of these scenes as `<loc>`×4`<seg>`×16, all in one batch."""
    boxes = np.concatenate([scene.boxes for scene in made])
    masks = np.concatenate([scene.masks for scene in made])
    words = iter(encode_segments(boxes, masks, codec, scenes.SIZE, scenes.SIZE))
    return [[next(words) for _ in scene.kinds] for scene in made]


# %%
#| export
class Layout:
    """Pictures and texts of a batch as tensors.

    Args:
        processor: lays out the text.
        config: seed, sizes, number of questions.
    """

    def __init__(self, processor: Processor, config: TrainingConfig):
        self.config, self.pad_id = config, processor.tokenizer.pad_id
        self.first_location = processor.tokenizer.encode("<loc0000>")[0]
        self.prefix = lru_cache(maxsize=None)(processor.encode_prefix)
        self.suffix = lru_cache(maxsize=100_000)(processor.encode_suffix)
        self.codec = MaskCodec.from_pretrained(scenes.ASSETS / "tiny") if config.segments else None

    def pixels(self, made: list[scenes.Scene]) -> torch.Tensor:
        """Pictures of the model's own size to float32[B, 3, 112, 112] in [-1, 1]."""
        pixels = torch.from_numpy(np.stack([scene.image for scene in made])).permute(0, 3, 1, 2)
        return (pixels.float() / 255 - 0.5) / 0.5

    def misread(self, ids: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Move locations by a little and take other codes for some, as the model's own words do."""
        place = ids - self.first_location
        noise = torch.from_numpy(rng.normal(0, self.config.jitter, ids.shape)).round().long()
        moved = (place + noise).clamp(0, 1023) + self.first_location
        ids = torch.where((place >= 0) & (place < 1024), moved, ids)
        is_code = (place >= 1024) & (place < 1024 + 128)
        wrong = is_code & (torch.from_numpy(rng.random(ids.shape)) < self.config.garble)
        others = ids[is_code][torch.from_numpy(rng.permutation(int(is_code.sum())))]
        return ids.masked_scatter(wrong, others)

    def texts(self, pairs: list, pictures: list[int], rng=None) -> dict:
        """(prompt, answer) pairs, and which picture each is about, to what the model takes.

        With `rng` some of what it reads is `misread`; what it has to say (labels) stays true.
        """
        suffixes = [self.suffix(answer) for _, answer in pairs]
        batch = collate([self.prefix(prompt) for prompt, _ in pairs], suffixes, self.pad_id)
        if rng is not None:
            batch["input_ids"] = self.misread(batch["input_ids"], rng)
        keep = max(map(len, suffixes)) + 1
        return batch | {"picture": torch.tensor(pictures), "keep": keep}


# %%
#| export
class Batches(Layout):
    """Batches of scenes as tensors; batch `step` depends on its number and on nothing else.

    `scene` and `ask` say what is seen and asked; override them for another world.
    """

    def scene(self, index: int, objects: tuple) -> scenes.Scene:
        """Scene number `index` of the training split."""
        return scenes.make_scene(index, "train", self.config.seed, objects)

    def ask(self, index: int, scene: scenes.Scene, words: list | None = None) -> tuple:
        """What is asked about scene `index`, as `questions` gives it."""
        rng = np.random.default_rng((self.config.seed, 0, index, 9))
        return questions(rng, scene, self.config, words)

    def ask_all(self, indices: list[int], made: list[scenes.Scene]) -> list[tuple]:
        """`ask` for each scene; a share of them, `segments`, is asked for masks."""
        share = [np.random.default_rng((self.config.seed, 1, i)).random() for i in indices]
        chosen = [n for n, value in enumerate(share) if value < self.config.segments]
        words = mask_words([made[n] for n in chosen], self.codec) if chosen else []
        words = dict(zip(chosen, words))
        return [self.ask(i, s, words.get(n)) for n, (i, s) in enumerate(zip(indices, made))]

    def train(self, step: int, objects: tuple, look: bool, part=(0, 1)) -> dict:
        """Batch number `step`; short answers, boxes and masks are groups padded apart.

        Args:
            step: which.
            objects: numbers of objects to draw from.
            look: only pixels and patch targets.
            part: (i, n): every n-th scene of it, from the i-th.
        """
        first, last = step * self.config.batch, (step + 1) * self.config.batch
        indices = range(first + part[0], last, part[1])
        made = [self.scene(index, objects) for index in indices]
        asked = [] if look else self.ask_all(list(indices), made)
        groups = []
        for kind, name in enumerate(GROUPS):
            pairs = [(p, i) for i, lists in enumerate(asked) for p in lists[kind]]
            if pairs:
                rng = np.random.default_rng((self.config.seed, 2, step, part[0], kind))
                groups.append(self.texts(*map(list, zip(*pairs)), rng) | {"name": name})
        targets = torch.from_numpy(np.stack([scenes.patch_targets(s) for s in made]))
        boxes = torch.from_numpy(np.stack([patch_boxes(s) for s in made]))
        batch = {"pixels": self.pixels(made), "targets": targets, "boxes": boxes}
        return batch | {"groups": groups, "first_location": self.first_location}


# %% [markdown]
# ### The whole loss
#
# `answer_logits` is the model's forward pass ([lesson 15](15_model.ipynb)) with two savings: features come in ready, and
# only the last `keep` places go through the vocabulary. A batch without texts is the first stage: the
# tower alone. Later the patch loss stays, at half its weight.


# %%
#| export
def answer_logits(model: PaliGemma, features: torch.Tensor, group: dict) -> torch.Tensor:
    """Logits of the last `keep` positions of a group of texts about these pictures' features.

    Args:
        model: the model.
        features: float32[B, N, D] from `encode_image`.
        group: from `Batches.texts`.

    Returns:
        float32[texts, keep, V].
    """
    attention_mask = group["attention_mask"]
    x = model.merge(group["input_ids"], features[group["picture"]])
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    mask = prefix_lm_mask(attention_mask, group["token_type_ids"], x.shape[1])
    hidden = model.language_model(x, positions, mask, keep=group["keep"])
    return model.language_model.logits(hidden)


def training_loss(model, head, batch, soft):
    """Loss of one batch and its parts, for the curves: (tensor, {name: float})."""
    seen = model.vision_tower(batch["pixels"])
    patch, accuracy = head(seen, batch["targets"], batch["boxes"])
    figures = {"patch loss": patch.item(), "patch right": accuracy.item()}
    if not batch["groups"]:
        return patch, figures
    features = model.multi_modal_projector(seen)
    loss = 0.5 * patch
    for group in batch["groups"]:
        logits = answer_logits(model, features, group)
        labels = group["labels"][:, -group["keep"] :]
        part = answer_loss(logits, labels, batch["first_location"], soft)
        figures[f"{group['name']} loss"] = part.item()
        loss = loss + (0.5 if group["name"] == "segment" else 1.0) * part
    return loss, figures


# %% [markdown]
# ### Cheaper products
#
# Most of a step is matrix products. Many processors multiply bfloat16 numbers two to four times
# faster than float32. So: round the two factors, multiply, and keep everything else — weights,
# norms, softmax, sums of the optimiser — in float32. The backward pass has two products, and
# they are rounded in the same way. `torch.autocast` does this too, but on a CPU it also puts the
# GELU and attention into bfloat16, where they are slower.


# %%
#| export
class Bfloat16Product(torch.autograd.Function):
    """`F.linear` whose three products (forward, two gradients) are made of bfloat16 factors."""

    @staticmethod
    def forward(context, x, weight, bias):
        """float32[..., D], float32[E, D], float32[E] or None to float32[..., E]."""
        x, weight = x.bfloat16(), weight.bfloat16()
        context.save_for_backward(x, weight)
        context.has_bias = bias is not None
        y = F.linear(x, weight).float()
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(context, gradient):
        """float32[..., E] to the gradients of x, weight, bias."""
        x, weight = context.saved_tensors
        rows = gradient.flatten(0, -2)
        rounded = rows.bfloat16()
        to_x = (rounded @ weight).float().view(x.shape)
        to_weight = (rounded.T @ x.flatten(0, -2)).float()
        return to_x, to_weight, rows.sum(0) if context.has_bias else None


def use_bfloat16_products(module: nn.Module) -> None:
    """Let every linear layer inside multiply in bfloat16; its weights stay float32."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.forward = lambda x, m=layer: Bfloat16Product.apply(x, m.weight, m.bias)


# %% [markdown]
# ## The step
#
# Five decisions turn a gradient into a good step: **which rule**, **how far** (rates), **how much at
# most** (clipping), **what shrinks** (decay), **which weights to keep** (running mean).
#
# ### Which rule
#
# A gradient is often a few loud directions and many faint ones. Muon makes all equally loud: it
# replaces the averaged gradient by nearly the nearest orthogonal matrix.


# %%
#| export
def orthogonal(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton–Schulz: push all singular values of float32[n, a, b] towards 1."""
    tall = g.shape[1] > g.shape[2]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest orthogonal matrix: for the weight matrices inside the blocks.

    Matrices of one shape are handled as one stack. The step is scaled to the size that AdamW's
    would have, so both share a learning rate. Source: Jordan et al. 2024; Liu et al. 2025.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        """One update."""
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                grads = torch.stack([p.grad for p in params])
                moments = [self.state[p].setdefault("m", torch.zeros_like(p)) for p in params]
                torch._foreach_lerp_(moments, list(grads), 1 - group["momentum"])
                update = orthogonal(grads.lerp(torch.stack(moments), group["momentum"]))
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(update), alpha=-rate)


# %%
gradient = torch.randn(64, 4) @ torch.randn(4, 128) + 0.05 * torch.randn(64, 128)  # 4 loud ones
before = torch.linalg.svdvals(gradient)
after = torch.linalg.svdvals(orthogonal(gradient[None])[0])
fig, ax = plt.subplots(figsize=(6, 2.6), layout="constrained")
ax.semilogy(range(1, 65), before, ".", color=COLOURS["muted"], label="gradient")
ax.semilogy(range(1, 65), after, ".", color=COLOURS["accent"], label="after 5 rounds")
ax.set(xlabel="direction, loudest first", ylabel="singular value", title="what Muon does")
ax.legend()
plt.close(fig)
fig

# %% [markdown]
# A polynomial in $XX^\top$, five times, lifts small singular values and keeps large ones near 1.
#
# ### Decay groups
#
# Weight decay pulls matrices towards 0, so that no weight lives off old luck. Biases and norms' weights
# are vectors, one number a channel: pulling *those* to 0 switches channels off. Three groups: matrices
# inside blocks (Muon), other matrices (AdamW), vectors (AdamW, no decay).


# %%
#| export
def make_optimizers(model: nn.Module, head: nn.Module, lr: float) -> list:
    """Muon for matrices inside blocks; AdamW for the rest, without decay on vectors."""
    matrices, others, plain = [], [], []
    for name, p in [*model.named_parameters(), *head.named_parameters()]:
        if p.ndim == 2 and "layers" in name:
            matrices.append(p)
        else:
            (others if p.ndim > 1 else plain).append(p)
    groups = [{"params": others, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    for group in adamw.param_groups:
        group["factor"] = 0.5
    return [adamw, Muon(matrices, lr)]


# %% [markdown]
# ### How far: the schedule and the curriculum
#
# Warm-up: at first the averages in the optimiser know nothing, so steps stay small. Then hold; then
# fall along half a cosine: small steps at the end settle into the valley.
#
# The curriculum decides what a scene holds: many objects for looking; then, when speaking begins, one
# object, two, and all.


# %%
#| export
def learning_rate(step: int, config: TrainingConfig) -> float:
    """Warm up at the start of each stage, hold, fall to 0 along half a cosine at the end."""
    since = step - config.look_steps if step >= config.look_steps else step
    left = min(1.0, (config.total_steps - step) / max(1, config.cool_steps))
    return config.lr * min(1.0, (since + 1) / config.warm_steps) * math.sin(left * math.pi / 2) ** 2


def objects_at(step: int, config: TrainingConfig) -> tuple:
    """The curriculum: which numbers of objects the scenes of this step have."""
    since = step - config.look_steps
    if since < 0:
        return config.curriculum[-1][1]
    return [tuple(objects) for start, objects in config.curriculum if since >= start][-1]


# %%
config = TrainingConfig()
steps = range(config.total_steps)
fig, ax = plt.subplots(figsize=(8.5, 2.9), layout="constrained")
ax.plot(steps, [learning_rate(s, config) for s in steps], color=COLOURS["ink"])
stages = [0, *(config.look_steps + start for start, _ in config.curriculum), config.total_steps]
stage_colours = ("vision", "language", "together", "accent")
for first, last, colour in zip(stages, stages[1:], stage_colours):
    ax.axvspan(first, last, color=COLOURS[colour], alpha=0.13, linewidth=0)
    what = "look" if first < config.look_steps else "speak"
    most = max(objects_at(first, config))
    label = f"{what}\n1–{most}" if most > 1 else f"{what}\n1"
    ax.text((first + last) / 2, config.lr * 1.06, label, ha="center", va="bottom", fontsize=7.5)
ax.set(xlabel="step", ylabel="learning rate of Muon", ylim=(0, config.lr * 1.3))
save_figure(fig, "27_schedule")

# %% [markdown]
# ### How much at most, and which weights to keep
#
# Clipping: if the whole gradient is longer than 1, all of it is scaled to length 1. The direction
# stays.
#
# Running mean: each step is right on average and noisy in detail. The weights dance around the valley's
# floor; their **mean** lies close to it, so that is what we ship: $m \leftarrow 0.98\,m + 0.02\,w$.

# %%
generator = torch.Generator().manual_seed(0)
w, mean, path, smooth = torch.tensor([4.0, 2.5]), torch.tensor([4.0, 2.5]), [], []
for _ in range(400):
    noisy = w * torch.tensor([1.0, 0.5]) + 3 * torch.randn(2, generator=generator)
    w = w - 0.12 * noisy
    mean = mean.lerp(w, 0.02)
    path.append(w), smooth.append(mean)
path, smooth = torch.stack(path), torch.stack(smooth)

late = slice(200, None)
ratio = float(path[late].norm(dim=1).mean() / smooth[late].norm(dim=1).mean())
print(f"the mean is {ratio:.1f} times nearer to the floor than the weights")
fig, ax = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
grid_x, grid_y = np.meshgrid(np.linspace(-3, 4.5, 80), np.linspace(-3.5, 3.5, 80))
heights = grid_x**2 + 0.5 * grid_y**2
ax.contour(grid_x, grid_y, heights, 10, colors=COLOURS["muted"], linewidths=0.5)
ax.plot(*path.T, color=COLOURS["vision"], linewidth=0.5, alpha=0.8, label="weights")
ax.plot(*smooth.T, color=COLOURS["accent"], linewidth=2.2, label="running mean")
ax.plot(0, 0, "*", color=COLOURS["ink"], markersize=11, label="the valley's floor")
ax.set(xticks=[], yticks=[])
ax.legend(fontsize=8, loc="upper left")
save_figure(fig, "27_mean")

# %% [markdown]
# ## The run
#
# A run is all that the next step depends on: weights, head, running mean, the optimisers' averages, the
# step's number. **Not** a data iterator, **not** random state. It is written to a second file which
# then takes the first one's name: a crash leaves the old checkpoint whole.


# %%
#| export
class Run:
    """A run's state: model, optimizers, running mean, curves; taken up again where it stopped.

    Args:
        config: what the run depends on.
        folder: where it keeps `checkpoint.pt`, `curves.json` and `config.json`.
        rank: number of this process.
    """

    def __init__(self, config: TrainingConfig, folder: Path, rank: int = 0):
        torch.manual_seed(config.seed)
        self.config, self.folder, self.rank = config, Path(folder), rank
        tokenizer = Tokenizer.from_pretrained(config.tokenizer)
        image_processor = ImageProcessor(scenes.SIZE)
        patches = (scenes.SIZE // scenes.PATCH) ** 2
        self.processor = Processor(tokenizer, image_processor, patches)
        self.batches = Batches(self.processor, config)
        self.soft = soft_locations(config.softness)
        self.model = make_model(config, tokenizer.image_id)
        self.head = PatchHead(config.vision_width)
        if config.bfloat16:
            use_bfloat16_products(self.model)
        self.parameters = [*self.model.parameters(), *self.head.parameters()]
        self.optimizers = make_optimizers(self.model, self.head, config.lr)
        self.mean = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.step, self.seconds, self.curves = 0, 0.0, []
        if (self.folder / "checkpoint.pt").exists():
            self.load(torch.load(self.folder / "checkpoint.pt", weights_only=True))

    def state(self) -> dict:
        """Everything that the next step depends on."""
        return {
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "mean": self.mean,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "curves": self.curves,
        }

    def load(self, state: dict) -> None:
        """Take up a saved run."""
        self.model.load_state_dict(state["model"])
        self.head.load_state_dict(state["head"])
        self.mean = state["mean"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.curves = state["step"], state["seconds"], state["curves"]

    def save(self) -> None:
        """Write the checkpoint and the curves."""
        with replacing(self.folder) as draft:
            torch.save(self.state(), draft("checkpoint.pt"))
            draft("curves.json").write_text(json.dumps(self.curves))


# %% [markdown]
# **Accumulation.** Gradients add up until somebody clears them. So a batch may be worked through in
# `accumulate` parts with one step at the end. Parts weigh the same, although one may hold a few labels
# more: it equals the large batch exactly only for equal counts.
#
# Several processes average their weights now and then (`meet`).


# %%
#| export
def mean_of(figures: list[dict]) -> dict:
    """The mean of each figure of the last dict, over the dicts that have it."""
    return {k: float(np.mean([f[k] for f in figures if k in f])) for k in figures[-1]}


@torch.no_grad()
def meet(parameters: list, stop: bool) -> bool:
    """Give every process the mean of all processes' weights; whether any of them wants to stop."""
    if not dist.is_initialized():
        return stop
    flat = torch.cat([p.flatten() for p in parameters] + [torch.tensor([float(stop)])])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, part in zip(parameters, flat[:-1].split([p.numel() for p in parameters])):
        p.copy_(part.view_as(p))
    return bool(flat[-1])


class Trainer(Run):
    """A run that moves on, step by step."""

    def take_step(self) -> dict:
        """One step on this process's part of batch number `step`: the losses."""
        c = self.config
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.step, c) * group.get("factor", 1.0)
        size, figures = c.processes if dist.is_initialized() else 1, []
        objects, look = objects_at(self.step, c), self.step < c.look_steps
        for i in range(c.accumulate):
            part = (self.rank * c.accumulate + i, size * c.accumulate)
            batch = self.batches.train(self.step, objects, look, part)
            loss, found = training_loss(self.model, self.head, batch, self.soft)
            (loss / c.accumulate).backward()
            figures.append(found)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return mean_of(figures)

    @torch.no_grad()
    def update_mean(self) -> None:
        """Move the running mean towards the weights."""
        for key, value in self.model.state_dict().items():
            self.mean[key].lerp_(value, 1 - self.config.ema)

    def smoothed(self) -> PaliGemma:
        """A model with the running mean of the weights."""
        model = PaliGemma(self.model.config)
        model.load_state_dict(self.mean)
        return model.eval()


# %% [markdown]
# ### How good is it? The cheap test
#
# Between steps we want a figure, not only a loss. Generating is slow, but there is a short cut. Feed
# the true answer and look at each place's first choice. If **all** are right, greedy generation would
# have written exactly this answer; if one is wrong, it would not.


# %%
#| export
def mask_overlap(model: PaliGemma, batches: Batches, made: list, features) -> float:
    """Percent that masks of first-choice codes and true ones have in common (IoU), on average."""
    pairs, cut = [], []
    for i, (scene, words) in enumerate(zip(made, mask_words(made, batches.codec))):
        ask = partial(scenes.task, scene=scene, name="segment")
        numbers = [str(n) for n in range(len(words))]  # instead of words: in which order they come
        _, order = ask(np.random.default_rng(i), words=numbers)
        own = [int(part.split()[0]) for part in order.split(" ; ")]
        cut.append(crop_masks(scene.boxes[own], scene.masks[own]) > 0.5)
        pairs.append(ask(np.random.default_rng(i), words=words))
    group = batches.texts(pairs, list(range(len(made))))
    labels = group["labels"][:, -group["keep"] :][:, 1:]
    first = batches.first_location + 1024  # <seg000>
    codes = answer_logits(model, features, group)[:, :-1, first : first + 128].argmax(-1)
    codes = codes[(labels >= first) & (labels < first + 128)].view(-1, 16)
    drawn, true = batches.codec.decode(codes) > 0, torch.cat(cut)
    overlap = (drawn & true).sum((1, 2)) / (drawn | true).sum((1, 2)).clamp(min=1)
    return 100 * float(overlap.mean())


@torch.inference_mode()
def validate(model: PaliGemma, batches: Batches, count: int = 192) -> dict:
    """Percent of answers all of whose tokens are the first choice, by task, on validation scenes.

    With the true answer fed in, all tokens right is the same as greedy decoding being right. For
    boxes only names are compared: how a model does with its own locations `evaluate` tells.
    `box error` is the mean distance of a corner's coordinate, in pixels; `mask overlap` see there.
    """
    made = [scenes.make_scene(i, "validation") for i in range(count)]
    features = model.encode_image(batches.pixels(made))
    result = {}
    for name in scenes.TASKS:
        pairs = [scenes.task(np.random.default_rng(i), s, name) for i, s in enumerate(made)]
        if name == "where":  # the others became "count"
            kept = [i for i, pair in enumerate(pairs) if "where" in pair[0]]
        else:
            kept = list(range(count))
        group = batches.texts([pairs[i] for i in kept], kept)
        labels = group["labels"][:, -group["keep"] :][:, 1:]
        choice = answer_logits(model, features, group)[:, :-1].argmax(-1)
        if name == "detect":
            first = batches.first_location
            located = (labels >= first) & (labels < first + 1024)
            off = (choice - labels)[located].abs().clamp(max=1023).float()
            result["box error"] = float(off.mean()) * scenes.SIZE / 1023
            right = (choice == labels) | (labels == -100) | located
        else:
            right = (choice == labels) | (labels == -100)
        result[name] = 100 * float(right.all(1).float().mean())
    if batches.codec is not None:
        result["mask overlap"] = mask_overlap(model, batches, made[: count // 2], features)
    return result


# %% [markdown]
# ### The loop
#
# Ctrl-C must not land in the middle of a step. So the signal only leaves a note, and the loop reads it
# where all processes meet, saves, and stops.


# %%
#| export
def curve_point(run: Trainer, recent: list[dict], validate_every: int) -> dict:
    """A point of the curves: the mean of recent losses, and now and then the figures by task."""
    point = mean_of(recent) | {"step": run.step, "seconds": run.seconds}
    if run.step > run.config.look_steps and run.step % validate_every == 0:
        point |= validate(run.smoothed(), run.batches)
    return point


def train(
    config: TrainingConfig,
    folder: str | os.PathLike,
    rank: int = 0,
    save_every: float = 60.0,
    validate_every: int = 250,
    quiet: bool = False,
) -> Trainer:
    """Train, or go on where the checkpoint in `folder` stopped; Ctrl-C saves and stops.

    Each process takes its part of every batch and steps on its own; every `meet_every` steps the
    processes average their weights ("local SGD"), so on a busy machine nobody waits at each step.
    One process continues bit for bit; with more, the optimizers of the others start from rank 0's.

    Args:
        config: what to train.
        folder: made if needed.
        rank: number of this process; 0 writes.
        save_every: seconds between checkpoints.
        validate_every: steps between two looks at the validation scenes.
        quiet: no progress bar.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    run = Trainer(config, Path(folder), rank)
    stop, recent = [], []
    before = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    start, saved_at, spent = time.perf_counter(), time.perf_counter(), run.seconds
    bar = tqdm(total=config.total_steps, initial=run.step, disable=quiet or rank > 0, unit="step")
    try:
        while run.step < config.total_steps:
            recent.append(run.take_step())
            bar.update()
            if run.step % config.meet_every and run.step < config.total_steps:
                continue
            stopping = meet(run.parameters, bool(stop))
            run.update_mean()
            run.seconds = spent + time.perf_counter() - start
            if rank == 0 and (run.step % 50 == 0 or run.step == config.total_steps):
                run.curves.append(curve_point(run, recent, validate_every))
                bar.set_postfix({k: f"{v:.3f}" for k, v in run.curves[-1].items() if v < 20})
                recent.clear()
            if stopping:
                break
            if rank == 0 and time.perf_counter() - saved_at > save_every:
                run.save()
                saved_at = time.perf_counter()
        if rank == 0:
            run.save()
    finally:
        signal.signal(signal.SIGINT, before)
        bar.close()
    return run


# %% [markdown]
# ## Watch it learn
#
# One large object of four kinds, one question: `caption en`. A few lines replace what a scene is and
# what is asked. Everything else is the code above.

# %%
FEW = [scenes.NAMES.index(name) for name in ("frog", "pig", "whale", "bee")]


def fewer(**changes):
    """A small config for this lesson."""
    sizes = {"vision_width": 64, "vision_layers": 2, "text_width": 64, "text_layers": 2}
    rest = {"text_mlp": 128, "batch": 16, "lr": 1e-2, "warm_steps": 5}
    return TrainingConfig(**(sizes | rest | changes))


class FewKinds(Batches):
    """Scenes with one large object of four kinds; the question is always `caption en`."""

    def scene(self, index, objects=(1,), split="train"):
        rng = np.random.default_rng((25, scenes.SPLITS[split], index))
        kind = FEW[rng.integers(4)]
        sprite = scenes.sprites()[kind][rng.integers(7, 11)][2][rng.integers(2)]
        box = scenes.place(rng, [sprite[2].shape[1]], [sprite[2].shape[0]])
        scene = scenes.compose(scenes.background(rng), [sprite], box)
        scene.kinds = [kind]
        return scene

    def ask(self, index, scene, words=None):
        return [("caption en", scenes.caption_of(scene.kinds))], [], []


held_out = [FewKinds(processor, fewer()).scene(i, split="validation") for i in range(100)]
titles = [scenes.caption_of(s.kinds) for s in held_out]
show_images([s.image for s in held_out[:6]], titles[:6], columns=6, height=1.5)

# %% [markdown]
# Two runs from the same weights, with the same number of captions. The first looks before that. The
# second speaks at once, and its tower hears only what the language model passes on: the
# head's loss is taken out.


# %%
@torch.inference_mode()
def right_of(run, images=None):
    """Share of held-out captions that are right; with `images`, about other pictures."""
    pixels = run.batches.pixels(held_out if images is None else images)
    group = run.batches.texts([("caption en", title) for title in titles], list(range(100)))
    choice = answer_logits(run.model, run.model.encode_image(pixels), group)[:, :-1].argmax(-1)
    labels = group["labels"][:, -group["keep"] :][:, 1:]
    return float(((choice == labels) | (labels == -100)).all(1).float().mean())


def learn(config, head=None, look_at=10):
    """Train one small run: the run and its points (step, loss, share right)."""
    run = Trainer(config, Path(tempfile.mkdtemp()))
    run.batches, points = FewKinds(run.processor, config), []
    if head is not None:
        run.head.forward = head
    while run.step < config.total_steps:
        figures = run.take_step()
        share = math.nan
        if run.step > config.look_steps and run.step % look_at == 0:
            share = right_of(run)
        points.append(
            (run.step, figures.get("short loss", math.nan), share, figures["patch right"])
        )
    return run, np.array(points)


LOOK, TOTAL = 80, 150
run, looking = learn(fewer(look_steps=LOOK, total_steps=TOTAL, cool_steps=25))
head = PatchHead(64)
no_lesson = lambda *given: (0 * head(*given)[0], head(*given)[1])  # noqa: E731
_, blind = learn(fewer(look_steps=0, total_steps=TOTAL - LOOK, cool_steps=25), no_lesson)

# %% tags=["nbval-ignore-output"]
shuffled = held_out[1:] + held_out[:1]
chance = np.mean([a == b for a, b in zip(titles, titles[1:] + titles[:1])])
print(f"own picture {right_of(run):.0%}, the next scene's {right_of(run, shuffled):.0%}")
print(f"two neighbours have the same caption in {chance:.0%} of cases")
assert right_of(run) > 0.6, "the run that looks first captions most scenes"
assert right_of(run, shuffled) < 0.45, "and fails on the wrong picture"

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
chosen = (("looks first", looking, "accent"), ("speaks at once", blind, "muted"))
for name, points, colour in chosen:
    left.plot(points[:, 0], points[:, 1], color=COLOURS[colour], label=name)
    known = points[~np.isnan(points[:, 2])]
    right.plot(known[:, 0], 100 * known[:, 2], "o-", ms=3, color=COLOURS[colour], label=name)
left.plot(looking[:, 0], looking[:, 3], ":", color=COLOURS["vision"], label="patches right (share)")
right.axhline(100 / 4, color=COLOURS["ink"], linewidth=0.8, linestyle="--")
right.text(2, 27, "a guess", fontsize=7.5)
left.set(xlabel="step", ylabel="loss of the caption", ylim=(0, 2.5))
right.set(xlabel="step", ylabel="captions right, %", ylim=(0, 103), xlim=(0, TOTAL))
left.legend(fontsize=7.5), right.legend(fontsize=7.5, loc="upper left")
save_figure(fig, "27_look_first")

# %% [markdown]
# Grey has learnt the sentence and begun to see; purple is nearly done. Four colourful kinds are the easy
# case. The **control** asks each question about *another* picture: what remains did not come from
# looking.
#
# ### In the whole world
#
# Now 48 kinds, up to five objects, and fifteen minutes of one core for each run, made beforehand
# (`tools/compare_training.py`): four ways to start, and three sizes.

# %%
arms = json.loads((scenes.ASSETS / "tiny" / "comparison.json").read_text())
panels = {
    "how it starts": ("looks first", "contrastive first", "curriculum only", "speaks at once"),
    "how large it is": ("small", "looks first", "large"),
}
fig, axes = plt.subplots(1, 2, figsize=(9, 3.1), layout="constrained", sharey=True)
for ax, (title, names) in zip(axes, panels.items()):
    for name, colour in zip(names, ("good", "vision", "language", "muted")):
        colour = "accent" if name == "looks first" else colour
        minutes, right = zip(*((p["minutes"], p["caption"]) for p in arms[name]["points"]))
        label = name if "starts" in title else f"{arms[name]['weights'] / 1e6:.1f} M weights"
        ax.plot(minutes, right, color=COLOURS[colour], label=label)
    ax.set(title=title, xlabel="minutes of one core")
    ax.legend(fontsize=8, loc="upper left")
axes[0].set(ylabel="captions right, %", ylim=(0, None))
save_figure(fig, "27_comparison")

# %% [markdown]
# Who looks first captions whole scenes; without that, hardly more than some single objects, and without
# a curriculum nothing. Contrast ([lesson 26](26_contrastive.ipynb)) is no bad teacher, but three minutes are too few: SigLIP
# saw billions of pairs. In a short time the *small* model leads: it has seen more pictures. Ours, the
# middle one, had four hours.
#
# ## Stop, and go on: bit for bit
#
# Six steps at once; and three, a checkpoint, a *new* trainer, three more: the same bits.

# %%
tiny = fewer(batch=4, look_steps=2, total_steps=6, vision_width=32, text_width=32, text_layers=1)
whole = Trainer(tiny, Path(tempfile.mkdtemp()))
at_once = [whole.take_step() for _ in range(6)]

folder = Path(tempfile.mkdtemp())
first_half = Trainer(tiny, folder)
in_two = [first_half.take_step() for _ in range(3)]
first_half.save()
second_half = Trainer(tiny, folder)  # finds the checkpoint
in_two += [second_half.take_step() for _ in range(3)]

assert in_two == at_once  # every loss, all digits
assert all(map(torch.equal, whole.model.state_dict().values(),
               second_half.model.state_dict().values()))  # fmt: skip
a, b = (whole.batches.train(step=7, objects=(2, 3), look=False) for _ in range(2))
assert torch.equal(a["pixels"], b["pixels"])
print("6 steps = 3 + 3 steps: losses and weights are equal, and so is a batch made twice")
for group in a["groups"]:
    print(group["name"], "texts about pictures", group["picture"].tolist())

# %% [markdown]
# ## The long run
#
# This is how the shipped model learnt, on two processor cores. First it looked. Then it spoke about
# one object, about one or two, and soon about up to five. Masks came late; they asked for nothing
# new in the vision tower.
#
# `curves.json` lies beside its weights. All figures are for validation scenes of one to five objects.

# %%
story = json.loads((scenes.ASSETS / "tiny" / "curves.json").read_text())
points, stages = story["points"], story["stages"]


def curve(ax, key, **style):
    """One key of the points, where they have it."""
    found = [(p["step"], p[key]) for p in points if key in p]
    ax.plot(*zip(*found), label=style.pop("label", key), **style)


fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained", width_ratios=[2, 3])
for key in ("patch", "short", "detect", "segment"):
    curve(axes[0], f"{key} loss", label=key)
for key in ("caption", "count", "where", "is there", "detect", "mask overlap"):
    curve(axes[1], key, marker=".")
for ax in axes:
    for name, step in stages.items():
        ax.axvline(step, color=COLOURS["muted"], lw=0.7, ls=":")
        place = {"transform": ax.get_xaxis_transform(), "rotation": 90, "va": "bottom"}
        ax.text(step, 0.3, f" {name}", fontsize=7.5, ha="right", color=COLOURS["muted"], **place)
axes[0].set(title="loss", xlabel="step", ylim=(0, 5))
axes[1].set(title="validation answers right, %", xlabel="step", ylim=(0, 103))
axes[0].legend(fontsize=8)
axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
save_figure(fig, "27_shipped")

# %% [markdown]
# Yes and no come first, exact places last, much of it while the rate falls. The bumps near the end: now
# it reads locations that are a little off, then wrong codes too.
#
# ## The honest test
#
# Held-out scenes, written answers, the package's own generation, each row with its control. A box counts
# (F1) if its label is right and it overlaps a true one by half, each true box once. Masks: overlap with
# the visible pixels.


# %%
#| export
def matched(overlap: np.ndarray, least: float = 1e-9) -> list[float]:
    """Overlaps of pairs, each row and each column in one at most; the largest first."""
    overlap, found = overlap.copy(), []
    while overlap.size and overlap.max() >= least:
        i, j = np.unravel_index(overlap.argmax(), overlap.shape)
        found.append(float(overlap[i, j]))
        overlap[i, :] = overlap[:, j] = 0.0
    return found


def box_figures(said: list[str], truths: list[str], threshold: float = 0.5) -> dict:
    """Detections as the model spells them against the true ones, spelled the same way.

    Boxes of one label are matched greedily, the largest overlap first.

    Returns:
        percent: `f1` at this overlap, `iou` the mean overlap of the matched boxes.
    """
    found, wanted, overlaps = 0, 0, []
    for answer, truth in zip(said, truths):
        guesses, boxes = (parse_detections(t, scenes.SIZE, scenes.SIZE) for t in (answer, truth))
        found, wanted = found + len(guesses), wanted + len(boxes)
        if not guesses or not boxes:
            continue
        overlap = box_iou([d.box for d in guesses], [d.box for d in boxes]).numpy()
        same = np.array([[g.label == b.label for b in boxes] for g in guesses])
        overlaps += matched(np.where(same, overlap, 0.0), threshold)
    f1 = 200 * len(overlaps) / max(1, found + wanted)
    return {"f1": f1, "iou": 100 * float(np.mean(overlaps)) if overlaps else 0.0}


def mask_figures(said: list[str], asked: list[str], made: list[scenes.Scene], codec) -> dict:
    """Masks as the model spells them against the visible pixels of the objects asked for.

    Returns:
        percent: `iou`, the mean over all these objects; one that was not found counts 0.
    """
    overlaps = []
    for answer, prompt, scene in zip(said, asked, made):
        guesses = parse_segments(answer, scenes.SIZE, scenes.SIZE, codec)
        for kind in {scenes.NAMES.index(name) for name in prompt[8:].split(" ; ")}:
            truths = [m for m, k in zip(scene.masks, scene.kinds) if k == kind]
            drawn = [g.mask for g in guesses if g.label == scenes.NAMES[kind]]
            pairs = [[(a & b).sum() / (a | b).sum() for a in drawn] for b in truths]
            best = matched(np.array(pairs).reshape(len(truths), len(drawn)))
            overlaps += best + [0.0] * (len(truths) - len(best))
    return {"iou": 100 * float(np.mean(overlaps))}


# %%
#| export
def answers(model, processor, images: list, prompts: list[str], size: int = 64) -> list[str]:
    """What the model says, greedily, through the package's own path."""
    said = []
    for first in range(0, len(images), size):
        part = slice(first, first + size)
        batch = processor(images[part], prompts[part])
        inputs = {k: batch[k] for k in ("input_ids", "pixel_values", "attention_mask")}
        said += map(processor.decode, generate(model, **inputs, max_new_tokens=128))
    return said


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


# %%
#| export
def row_questions(row: str, count: int) -> tuple[list, list[str], list[str]]:
    """The first `count` test scenes that this row's question fits: (scenes, prompts, answers)."""
    name, language, how = ROWS[row]
    found, index = [], 0
    while len(found) < count:
        scene = scenes.make_scene(index, "test", **how)
        rng = np.random.default_rng((11, index))
        prompt, answer = scenes.task(rng, scene, name, language)
        if name != "where" or "where" in prompt:  # no clear place: it was asked "how many"
            found.append((scene, prompt, answer))
        index += 1
    return tuple(map(list, zip(*found)))


def evaluate(path: str | os.PathLike, count: int = 1000, rows=tuple(ROWS), progress=None) -> dict:
    """Figures of a model on `count` test scenes a row, with its own pictures and with others'.

    Args:
        path: a model's folder.
        count: scenes a row.
        rows: which of ROWS.
        progress: called with (row, figures) after each.

    Returns:
        `{row: {"scenes", "exact", "shuffled"}}` in percent; "detect" has "f1", "iou" and
        "shuffled" (f1) instead, "segment" "iou" and "shuffled" (iou). "shuffled" is the control:
        each question is asked about the next scene's picture, so what remains above chance did
        not come from looking.
    """
    model, processor = load_model(path), Processor.from_pretrained(path)
    result = {}
    for row in rows:
        made, prompts, truths = row_questions(row, count)
        images, figures = [scene.image for scene in made], {"scenes": count}
        for shuffled, shown in ((False, images), (True, images[1:] + images[:1])):
            said = answers(model, processor, shown, prompts)
            if row == "detect":
                found = box_figures(said, truths)
            elif row == "segment":
                found = mask_figures(said, prompts, made, MaskCodec.from_pretrained(path))
            else:
                right = [a == b for a, b in zip(said, truths)]
                found = {"exact": 100 * float(np.mean(right))}
            figures |= {"shuffled": next(iter(found.values()))} if shuffled else found
        result[row] = figures
        if progress:
            progress(row, figures)
    return result


# %%
#| export
def _process(rank: int, config: TrainingConfig, folder: Path) -> None:
    """One of several training processes, of one thread each."""
    torch.set_num_threads(1)
    if config.processes > 1:
        method = f"file://{folder.resolve()}/.rendezvous"
        size = config.processes
        dist.init_process_group("gloo", init_method=method, rank=rank, world_size=size)
    train(config, folder, rank)
    if config.processes > 1:
        dist.destroy_process_group()


def launch(config: TrainingConfig, folder: Path) -> None:
    """Train with as many processes as the config says."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
    (folder / ".rendezvous").unlink(missing_ok=True)
    if config.processes == 1:
        return _process(0, config, folder)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the processes
    try:
        torch.multiprocessing.spawn(_process, (config, folder), config.processes)
    finally:
        signal.signal(signal.SIGINT, before)


def export(folder: Path, target: Path) -> None:
    """Write a run's smoothed model to `target`: bfloat16, the published layout, its curves."""
    config = TrainingConfig.read(folder / "config.json")
    run = Trainer(config, folder)
    target.mkdir(parents=True, exist_ok=True)
    tokenizer = (Path(config.tokenizer) / "tokenizer.model").read_bytes()
    save_model(run.smoothed().to(torch.bfloat16), target)
    (target / "tokenizer.model").write_bytes(tokenizer)
    ImageProcessor(scenes.SIZE).save_pretrained(target)
    recipe = {k: v for k, v in asdict(config).items() if k != "tokenizer"}
    stages = {"looks": 0, "speaks": config.look_steps}
    stages["cools"] = config.total_steps - config.cool_steps
    curves = {"recipe": recipe, "seconds": round(run.seconds), "stages": stages}
    curves["points"] = run.curves
    (target / "curves.json").write_text(json.dumps(curves) + "\n")


# %%
#| export
def main(arguments: list[str] | None = None) -> int:
    """The command line: train, export or evaluate; 2 and one line on bad input."""
    parser = argparse.ArgumentParser("python -m paligemma.training", description=main.__doc__)
    add = parser.add_argument
    add("--config", type=Path, help="JSON with the fields of TrainingConfig; train it")
    add("--work", type=Path, help="folder of the run: checkpoint, curves, config")
    add("--export", type=Path, help="write the run in --work to this folder")
    add("--evaluate", action="store_true", help="figures on held-out scenes, as JSON")
    add("--model", type=Path, default=scenes.ASSETS / "tiny", help="what --evaluate evaluates")
    add("--scenes", type=int, default=1000, help="scenes a figure (default %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.evaluate:
            report = lambda row, figures: print(row, figures, file=sys.stderr)  # noqa: E731
            print(json.dumps(evaluate(options.model, options.scenes, progress=report), indent=1))
        elif options.export and options.work:
            export(options.work, options.export)
        elif options.work and (options.config or (options.work / "config.json").exists()):
            launch(
                TrainingConfig.read(options.config or options.work / "config.json"), options.work
            )
        else:
            parser.error("give --work and --config to train, --work and --export, or --evaluate")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__" and "__file__" in globals():
    sys.exit(main())

# %% [markdown]
# ## At full size
#
# `python -m paligemma.training --config long.json --work runs/long` trains, or goes on; `--export`
# writes a folder that `paligemma.load` opens, `--evaluate` prints the figures.
#
# To train all of PaliGemma 3B with AdamW in float32, each weight needs its gradient and two averages:
# 16 bytes. And a step costs about $6$ operations per weight and token: 2 forwards, 4 backwards.

# %% tags=["nbval-ignore-output"]
with torch.device("meta"):
    full = sum(p.numel() for p in PaliGemma(PaliGemmaConfig()).parameters())
memory = 16 * full / 2**30
tokens = 256 + 32
step = 6 * full * tokens
print(f"{full:,} weights: {memory:.0f} GiB for weights, gradients and averages")
print(f"one example of {tokens} tokens: {step / 1e12:.1f} TFLOP")
print(f"a billion examples: {1e9 * step:.1e} FLOP")

own = sum(p.numel() for p in run.model.parameters())
start = time.perf_counter()
for _ in range(3):
    run.take_step()
seconds = (time.perf_counter() - start) / 3
flops = 6 * 16 * 72 * own
print(
    f"our {own:,} weights, 16 pictures: {seconds:.2f} s a step, {flops / seconds / 1e9:.0f} GFLOP/s"
)
print(f"a 3B example alone, at that rate: {step / (flops / seconds) / 60:.1f} minutes")

# %% [markdown]
# PaliGemma's paper trains on about a billion examples, on hundreds of accelerators. What is left for
# one machine: fewer weights that learn ([lesson 29](29_lora.ipynb)), or more machines.
#
# ## A bug people really make: labels shifted twice
#
# The data code hands out labels "already shifted", and the loss shifts again. Nothing complains. We
# let the model that captions well learn a little longer with this bug.


# %% tags=["nbval-ignore-output"]
def shifted_twice(config, steps=40):
    """Train on from the good weights, with labels moved one place too far."""
    broken = Trainer(config, Path(tempfile.mkdtemp()))
    broken.model.load_state_dict(run.model.state_dict())
    broken.batches, losses = FewKinds(broken.processor, config), []
    for _ in range(steps):
        batch = broken.batches.train(broken.step, (1,), look=False)
        labels = batch["groups"][0]["labels"]
        moved = labels.roll(-1, dims=1)
        moved[:, -1] = -100  # the bug: the loss will shift once more
        batch["groups"][0]["labels"] = moved
        loss, figures = training_loss(broken.model, broken.head, batch, broken.soft)
        loss.backward()
        nn.utils.clip_grad_norm_(broken.parameters, 1.0)
        for optimizer in broken.optimizers:
            optimizer.step(), optimizer.zero_grad()
        broken.step += 1
        losses.append(figures["short loss"])
    return broken, losses


@torch.inference_mode()
def first_said(run, length=8):
    """Greedy answers about the first six held-out scenes."""
    pictures = [scene.image for scene in held_out[:6]]
    return [
        text[:24] for text in answers(run.model.eval(), processor, pictures, ["caption en"] * 6)
    ]


broken, losses = shifted_twice(fewer(look_steps=0, total_steps=200, lr=4e-3))
print(f"loss of the bug: {losses[0]:.2f} at first, {losses[-1]:.2f} after {len(losses)} steps")
print("true  ", titles[:6])
print("good  ", first_said(run))
print("broken", first_said(broken))

# %% [markdown]
# The symptom: **a loss that falls like any other, and answers with holes.** At the newline the model
# learns to say the token after next, so the article is gone (" pig" for "a pig"). Loss curves cannot show it. Reading ten written answers does.
#
# No shift at all is more visible: the model copies its input, and the loss is soon 0.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): the loss on the prefix
#
# Someone puts the loss on the question, too. Questions are `is there a KIND?`, with 48 kinds drawn
# evenly, whatever the picture shows. Each question has 8 tokens, of which one (the kind) cannot be
# known and 7 are always the same. To which value can the mean loss of the *question* fall at best?

# %% tags=["exercise"]
answer_1 = None  # a number, two decimals


# %% tags=["check"]
def test_1(value):
    assert isinstance(value, (int, float)), "give a number"
    assert abs(value - math.log(48)) > 0.05, (
        "that is the kind's own loss; the mean is over 8 tokens"
    )
    assert abs(value - math.log(48) / 8) < 0.01, "one token costs ln 48, seven cost nothing"


check(test_1, answer_1)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The best guess about 48 equally likely words gives each 1/48. What is $-\ln$ of it? The other seven
# tokens cost nothing.
#
# </details>

# %% tags=["solution"]
answer_1 = math.log(48) / 8
check(test_1, answer_1)

# %% [markdown]
# ### Exercise 2 (fill in): the running mean with a start
#
# With $m \leftarrow 0.98\,m + 0.02\,w$ the random first weights stay in the mean for long. Write the
# share of the **first** value in the mean after `steps` meetings, and the number of meetings after
# which it is below 1 % for the first time.


# %% tags=["exercise"]
def share_of_first(ema, steps):
    return None  # your code


def meetings_until_forgotten(ema):
    return None  # your code: a whole number


# %% tags=["check"]
def test_2(share, meetings):
    assert share(0.5, 3) is not None, "share_of_first returns nothing yet"
    for ema, steps in ((0.5, 3), (0.98, 1), (0.98, 100), (0.9, 0)):
        mean = 1.0
        for _ in range(steps):
            mean = ema * mean + (1 - ema) * 0.0
        assert abs(share(ema, steps) - mean) < 1e-9, f"ema {ema}, {steps} meetings: {mean:.4f}"
    for ema in (0.5, 0.9, 0.98):
        n = meetings(ema)
        assert isinstance(n, int), "a whole number of meetings"
        assert ema**n < 0.01 <= ema ** (n - 1), f"ema {ema}: {n} is not the first one below 1 %"


check(test_2, share_of_first, meetings_until_forgotten)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Each meeting multiplies the old content by `ema`. For the second: take logarithms, and round up.
#
# </details>


# %% tags=["solution"]
def share_of_first(ema, steps):
    return ema**steps


def meetings_until_forgotten(ema):
    return math.ceil(math.log(0.01) / math.log(ema))


check(test_2, share_of_first, meetings_until_forgotten)

# %% [markdown]
# ### Exercise 3 (break): a mean of means
#
# Two parts of a batch, with the summed loss and the number of labels of each. Someone accumulates by
# averaging the parts' **means**. Return two parts, as `[(sum, labels), (sum, labels)]`, for which this
# is at least twice the true mean over all labels.

# %% tags=["exercise"]
parts = None  # [(sum, labels), (sum, labels)]


# %% tags=["check"]
def test_3(parts):
    assert parts is not None and len(parts) == 2, "give two pairs (sum, labels)"
    assert all(total > 0 and labels >= 1 for total, labels in parts), "positive losses, some labels"
    of_means = sum(total / labels for total, labels in parts) / 2
    true = sum(total for total, _ in parts) / sum(labels for _, labels in parts)
    assert of_means != true, "equal numbers of labels: both means agree"
    assert of_means >= 2 * true, (
        f"{of_means:.2f} is not twice {true:.2f}: make the parts less equal"
    )


check(test_3, parts)

# %% [markdown]
# <details><summary>Hint</summary>
#
# One part with a single, very surprising label ("yes"), one with many easy ones (a long caption).
#
# </details>

# %% tags=["solution"]
parts = [(3.0, 1), (3.0, 30)]  # 1.55 instead of 0.19
check(test_3, parts)

# %% [markdown]
# ## Summary
#
# - Only the answer and its end are learnt; the shift happens once, and in one place.
# - Cross-entropy does not know that 501 is next to 500. A bell as the target tells it.
# - A falling loss does not prove looking. A control with other pictures does.
# - The tower learns to look first, patch by patch; speaking is then quickly learnt.
# - If batch `step` depends only on `step`, a checkpoint is complete and a run continues bit for bit.

# %% [markdown]
# ## Quiz
#
# **1.** A run's caption loss stands at 1.4 from step 50 to step 5,000. Which experiment of two
# minutes tells you most?
#
# <details><summary>Answer</summary>
#
# Permute the pictures and measure again. If the loss stays the same, the model does not look, and
# more steps of the same kind help little: its tower needs a teacher of its own (patches, contrast).
# If it gets worse, the model looks, and the limit is elsewhere.
#
# </details>

# %% [markdown]
# **2.** Why does the soft target not make boxes blurred?
#
# <details><summary>Answer</summary>
#
# The best guess against a bell is the same bell, and its peak is the true bin. Greedy decoding takes
# the peak. What becomes broader is the probability, not the answer.
#
# </details>

# %% [markdown]
# **3.** You resume a run and its losses differ from the third digit on. Name three things that were
# not saved.
#
# <details><summary>Answer</summary>
#
# The optimiser's averages (their loss shows as a jump), the step's number (wrong rate, wrong batch),
# the place in the data or the random state, where they matter. Here the last two are computed from
# the step.
#
# </details>

# %% [markdown]
# ## References
#
# - Beyer et al. 2024, *PaliGemma: A versatile 3B VLM for transfer*
#   ([arXiv 2407.07726](https://arxiv.org/abs/2407.07726)), section 3.2 (stages) and figure 2.
# - Chen et al. 2022, *Pix2seq* ([arXiv 2109.10852](https://arxiv.org/abs/2109.10852)): boxes as tokens.
# - Loshchilov and Hutter 2019, *Decoupled Weight Decay Regularization*
#   ([arXiv 1711.05101](https://arxiv.org/abs/1711.05101)).
# - Jordan et al. 2024, *Muon*; Liu et al. 2025, *Muon is Scalable for LLM Training*
#   ([arXiv 2502.16982](https://arxiv.org/abs/2502.16982)).
# - Stich 2019, *Local SGD Converges Fast and Communicates Little*
#   ([arXiv 1805.09767](https://arxiv.org/abs/1805.09767)).
# - The training loop of big_vision, `trainers/proj/paligemma/train.py`.

# %% [markdown] tags=["navigation"]
# [← Contrastive learning](26_contrastive.ipynb) | [contents](00_overview.ipynb) | [LoRA →](29_lora.ipynb)
