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
# [← Contrastive learning](26_contrastive.ipynb) | [contents](00_overview.ipynb) | [Evaluation →](28_evaluation.ipynb)

# %% [markdown]
# # 27 · Training: what does a model learn from a picture, a question and an answer?
#
# *45 minutes* · part V, Learning
#
# **What you will be able to do**
#
# - compute the loss of an answer, and say why nothing else is learned;
# - write a training loop in a dozen lines, and see whether its model looks;
# - explain what a real loop adds by the damage that it prevents;
# - fine-tune on your own pictures, stop, and go on.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("training")

# %% [markdown]
# ## Setup
#
# From earlier lessons: the model ([15](15_model.ipynb)), the processor ([14](14_processor.ipynb)),
# `Pipeline` ([24](24_inference.ipynb)) and the scenes ([25](25_scenes.ipynb)). The cells that begin
# with `#| export` become [training.py](../paligemma/training.py).

# %%
#| export
"""Training on pictures with a prompt and an answer: loss, steps, schedule, exact resume."""

import math
import os
from dataclasses import asdict, dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset
from tqdm import tqdm

from paligemma.checkpoint import save_model
from paligemma.model import PaliGemma
from paligemma.processor import Processor
from paligemma.support.examples import read_examples
from paligemma.support.processes import mean_over_processes, own_share, process_number
from paligemma.support.replacing import replacing, settled
from paligemma.support.runs import (
    check_dataset,
    check_training,
    load_batches,
    noted_interrupt,
    read_checkpoint,
    taking_up,
)

# %% tags=["setup"]
import json
import tempfile
from types import SimpleNamespace

import matplotlib.pyplot as plt

from paligemma import scenes
from paligemma.checkpoint import load_model
from paligemma.inference import Pipeline
from paligemma.model import PaliGemmaConfig
from paligemma.plotting import show_images
from paligemma.support.course import check, save_figure
from paligemma.support.drawing import COLOURS

torch.set_num_threads(1)
_ = torch.manual_seed(27)

# %% [markdown]
# ## The problem
#
# A row of a training batch holds a picture, a question and the answer. What should be learned? Not the
# picture: it is given. Not the question: the user writes it. Only the **answer**, and that it **ends**.

# %% tags=["hide-input"]
TINY = scenes.ASSETS / "tiny"
processor = Processor.from_pretrained(TINY)
tokenizer = processor.tokenizer
grey = np.full((112, 112, 3), 128, np.uint8)
row = processor(grey, "answer en where is the cat?", "top left")
named = {tokenizer.image_id: "▦", tokenizer.bos_id: "▸", tokenizer.eos_id: "■"}
named[tokenizer.newline_id] = "↵"
shown = slice(61, None)  # the last three of the 64 image tokens, and the text
ids = row["input_ids"][0, shown].tolist()
pieces = [named.get(i) or tokenizer.decode([i]).replace(" ", "·") for i in ids]
learned = (row["labels"][0, shown] != -100).tolist()
fig, ax = plt.subplots(figsize=(9, 2.1), layout="constrained")
for i, (piece, is_label) in enumerate(zip(pieces, learned)):
    colour = COLOURS["vision" if piece == "▦" else "accent" if is_label else "language"]
    ax.add_patch(plt.Rectangle((i - 0.46, 1.3), 0.92, 0.8, color=colour, alpha=0.3))
    ax.text(i, 1.7, piece, ha="center", va="center", fontsize=9)
    label = piece if is_label else "−100"
    ax.text(i, 0.4, label, ha="center", va="center", fontsize=9,
            color=COLOURS["ink" if is_label else "muted"])  # fmt: skip
    if is_label:  # the logits one position earlier are compared with this label
        style = {"arrowstyle": "->", "color": COLOURS["accent"]}
        ax.annotate("", (i - 0.05, 0.72), (i - 1, 1.26), arrowprops=style)
ax.text(-0.8, 1.7, "input", ha="right", va="center")
ax.text(-0.8, 0.4, "labels", ha="right", va="center")
ax.set(xlim=(-2.6, len(pieces)), ylim=(0, 2.2))
ax.set_axis_off()
save_figure(fig, "27_labels")

# %% [markdown]
# Blue: image tokens (61 more to the left). Orange: the prompt, from bos (▸) to newline (↵). Purple:
# the answer and eos (■), the only labels. An arrow goes from the position that **guesses** to its
# label. Whatever it guesses, the next position reads the *true* token, so that all guesses are made
# in one pass: **teacher forcing**.

# %% [markdown]
# ## By hand
#
# The loss of a position is $-\log p$ of the right token; that of a batch is the mean over all
# labels. Two labels, with ½ and ¼: $(\log 2 + \log 4)/2 = 1.5 \log 2$.

# %%
probabilities = torch.tensor(
    [  # a vocabulary of 4; the row of a position guesses the NEXT token
        [0.70, 0.10, 0.10, 0.10],  # position 0, prefix: its guess is not asked for
        [0.25, 0.50, 0.15, 0.10],  # position 1, newline: right is token 1
        [0.25, 0.25, 0.25, 0.25],  # position 2: right is token 3
        [0.10, 0.20, 0.30, 0.40],  # position 3, the last: nothing comes after it
    ]
)
labels = torch.tensor([[-100, -100, 1, 3]])

# %% [markdown]
# ## As a loop


# %%
def loss_loop(logits, labels):
    """Position after position: float[B, L, V], int64[B, L] → the mean of -log p."""
    losses = []
    for row, truth in zip(logits, labels.tolist()):
        for position in range(1, len(truth)):
            if truth[position] != -100:
                p = row[position - 1].softmax(-1)  # the guess made one position earlier
                losses.append(-math.log(p[truth[position]]))
    return sum(losses) / len(losses)


# %%
logits = probabilities.log()[None]  # a softmax over log p gives p back
print(f"{loss_loop(logits, labels):.4f} = {1.5 * math.log(2):.4f}")
assert abs(loss_loop(logits, labels) - 1.5 * math.log(2)) < 1e-6

# %% [markdown]
# The model computes just this, vectorised, when it gets labels ([lesson 15](15_model.ipynb)):
# training needs **no forward pass of its own**.


# %%
def tensors(items):
    """Examples to the tensors of one batch."""
    images = [item["image"] for item in items]
    prefixes = [item["prefix"] for item in items]
    suffixes = [item["suffix"] for item in items]
    return processor(images, prefixes, suffixes)


# %%
model = load_model(TINY)
batch = tensors([scenes.SceneDataset(4, "validation")[i] for i in range(4)])
out = model(**batch)
slow = loss_loop(out.logits.detach(), batch["labels"])
print(f"the model's loss {out.loss.item():.4f}, the loop's {slow:.4f}")
assert abs(out.loss.item() - slow) < 1e-5

# %% [markdown]
# ## Something to learn
#
# The shipped model has never been asked what stands on the left. A data set is anything whose item
# `i` is a dict of `image`, `prefix` and `suffix`.


# %%
class Leftmost(Dataset):
    def __init__(self, length, split="train"):
        self.length, self.split = length, split

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        scene = scenes.make_scene(i, self.split, objects=(2, 3))
        leftmost = scenes.phrase(scene.kinds[0], 1)  # "an owl"
        return {"image": scene.image, "prefix": "answer en what is left?", "suffix": leftmost}


# %%
held_out = [Leftmost(60, "validation")[i] for i in range(60)]


def say(model, items=held_out):
    """The answers of the model, by its own greedy decoding."""
    pipeline = Pipeline(model.eval(), processor)
    return pipeline.batch([x["image"] for x in items], [x["prefix"] for x in items])


def share_right(answers):
    return np.mean([answer == x["suffix"] for answer, x in zip(answers, held_out)])


# %%
before = say(model)
print(f"right: {share_right(before):.0%}; it says, for example,", before[:4])
assert share_right(before) < 0.1

# %% [markdown]
# ## A dozen lines
#
# Make tensors, ask for the loss, step against its gradient.


# %%
def simple_train(model, dataset, steps, batch_size=8, learning_rate=1e-3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    losses = []
    for step in range(steps):
        first = step * batch_size
        items = [dataset[i] for i in range(first, first + batch_size)]
        loss = model(**tensors(items)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# %% tags=["nbval-ignore-output"]
losses = simple_train(model.train(), Leftmost(10_000), steps=24)
right = share_right(say(model))
print(f"loss: {np.mean(losses[:3]):.1f} → {np.mean(losses[-3:]):.1f}; right: {right:.0%}")
assert np.mean(losses[-3:]) < np.mean(losses[:3]) / 2 and right > 0.3

# %% [markdown]
# That is training; all below makes it better, safer or repeatable. PaliGemma itself was made so:
# SigLIP and Gemma came trained, and all further data was pictures, prefixes and suffixes.
#
# ## Does it look?
#
# A loss can fall because the model learns how answers *sound*. So ask twice, with the same labels:
# about each scene's own picture, and about **another scene's**.


# %%
def loss_on(model, items):
    with torch.no_grad():
        return model.eval()(**tensors(items)).loss.item()


# %% tags=["nbval-ignore-output"]
swapped = [x | {"image": y["image"]} for x, y in zip(held_out, held_out[1:] + held_out[:1])]
found = {1e-3: (loss_on(model, held_out), loss_on(model, swapped))}
blind = math.log(48) / 3
print(f"own pictures {found[1e-3][0]:.1f}, others' {found[1e-3][1]:.1f}, blind at best {blind:.1f}")
assert found[1e-3][0] < 0.7 * blind < blind < found[1e-3][1]

# %% [markdown]
# "Blind at best": article and name together are one of 48, which costs $\log 48$ without looking; the
# third token, eos, costs nothing. Whoever is below has looked.
#
# ## What a real loop adds
#
# ### How far? The damage
#
# The same 24 steps, from the same start, at a rate a hundred times smaller and ten times larger.

# %% tags=["nbval-ignore-output"]
for rate in (1e-5, 1e-2):
    model = load_model(TINY).train()
    simple_train(model, Leftmost(10_000), steps=24, learning_rate=rate)
    found[rate] = loss_on(model, held_out), loss_on(model, swapped)

# %% tags=["nbval-ignore-output"]
for rate, (own, other) in sorted(found.items()):
    print(f"rate {rate:.0e}: own pictures {own:.2f}, others' {other:.2f}")
assert found[1e-3][0] < 0.6 * min(found[1e-5][0], found[1e-2][0])
assert found[1e-2][0] > blind and abs(found[1e-2][0] - found[1e-2][1]) < 0.1

# %% [markdown]
# Too small a rate does not arrive. Too large a one is worse than guessing, and own and others'
# pictures cost the same: 24 steps have
# **destroyed the sight** that five hours had built.
#
# Our optimizer, **AdamW**, makes the first steps dangerous. It divides each gradient by an average of
# its size, which at the very first step *is* that size: each weight moves by the full rate.

# %%
weights = nn.Parameter(torch.zeros(3))
weights.grad = torch.tensor([0.001, 1.0, -1000.0])
optimizer = torch.optim.AdamW([weights], lr=0.1)
optimizer.step()
print([round(w, 3) for w in weights.tolist()])
assert torch.allclose(weights, torch.tensor([-0.1, -0.1, 0.1]), atol=1e-5)

# %% [markdown]
# ### Settings
#
# Before the cures, one place for all that a run depends on. A value that cannot be (a rate of
# infinity, a batch of −1) stops the run at once, and not after a night.


# %%
#| export
@dataclass
class TrainingConfig:
    """What a run depends on, besides model and data; every value is checked."""

    steps: int = 1000  # of the optimizer
    batch_size: int = 8  # examples a step
    accumulate: int = 1  # parts that a batch is worked through in, to save memory
    learning_rate: float = 1e-4  # the highest one
    warmup_steps: int = 20  # it rises; then it falls to 0 along half a cosine
    weight_decay: float = 0.01  # of matrices; vectors (biases, norms) have none
    max_grad_norm: float = 1.0  # a longer gradient is shortened to this length
    ema_decay: float = 0.0  # what a running mean of the weights keeps at each step; 0: no mean
    seed: int = 0  # of the order of the examples, and of dropout
    workers: int = 0  # processes that load examples; 0: this one does
    folder: str | os.PathLike | None = None  # for checkpoint.pt and the model; None: write nothing
    save_every: int = 200  # steps between two checkpoints
    save: bool = True  # the model, at the end (not with adapters: `save_adapter` writes those)

    def __post_init__(self):
        check_training(self)


# %% [markdown]
# ### The learning-rate schedule
#
# The rate changes while we train, by a **learning-rate schedule**: a **warm-up** while AdamW's
# averages know little, then a slow fall to zero.


# %%
#| export
def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """The rate of step `step`: up in a straight line, then down to 0 along half a cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (1 + math.cos(math.pi * share)) / 2


# %% tags=["hide-input"]
example = TrainingConfig(steps=1000, warmup_steps=100, learning_rate=1e-3)
fig, ax = plt.subplots(figsize=(6.5, 2.2), layout="constrained")
ax.plot([learning_rate_at(step, example) for step in range(1000)], color=COLOURS["accent"])
ax.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
save_figure(fig, "27_schedule")

# %% [markdown]
# Why fall to zero? A batch's gradient is right on average and noisy in detail. Let 200 walkers go down
# a valley, at a constant rate and at a falling one, with the same noise.


# %%
def walk(rates):
    """200 walkers down a valley whose floor is (0, 0): float[steps, 200, 2]."""
    noise, w, path = torch.Generator().manual_seed(0), torch.tensor([4.0, 2.5]).expand(200, 2), []
    for rate in rates:
        gradient = w * torch.tensor([1.0, 0.5]) + 3 * torch.randn(w.shape, generator=noise)
        w = w - rate * gradient
        path.append(w)
    return torch.stack(path)


# %% [markdown]
# There is a second cure: keep the constant rate, and beside the weights a **running mean** of them,
# $m \leftarrow 0.98\,m + 0.02\,w$.

# %%
cooling = TrainingConfig(steps=400, warmup_steps=0, learning_rate=0.12)
constant = walk([0.12] * 400)
cooled = walk([learning_rate_at(step, cooling) for step in range(400)])
mean = [constant[0]]
for w in constant[1:]:
    mean.append(mean[-1].lerp(w, 0.02))

# %%
paths = {"constant": constant, "falling": cooled, "running mean": torch.stack(mean)}
far = {name: path.norm(dim=-1).mean(1) for name, path in paths.items()}  # float[steps] each
print("from the floor at last:", {name: round(away[-1].item(), 1) for name, away in far.items()})
assert max(far["falling"][-1], far["running mean"][-1]) < 0.6 * far["constant"][-1]

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(6.5, 2.6), layout="constrained")
for (name, away), colour in zip(far.items(), ("vision", "language", "accent")):
    ax.plot(away, color=COLOURS[colour])
    up = {"running mean": 0.25, "falling": -0.15}.get(name, 0)
    ax.text(405, away[-1] + up, name, color=COLOURS[colour], va="center")
ax.set(xlabel="step", ylabel="distance from the floor", xlim=(0, 490), ylim=(0, 5))
save_figure(fig, "27_mean")

# %% [markdown]
# A constant rate dances around the floor for ever; either cure ends nearer.
#
# ### What shrinks: decay groups
#
# Weight decay pulls matrices towards 0, so that no weight lives off old luck. Biases and norms are
# vectors: LayerNorm's weight pulled to 0 would switch its channel off. So there are two groups, and
# frozen parameters are in none.


# %%
#| export
def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters that require gradients, without decay on vectors.

    Raises:
        ValueError: every parameter is frozen.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("nothing to train: requires_grad is False for every parameter")
    matrices = {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay}
    vectors = {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=config.learning_rate)


# %% [markdown]
# ### Which examples: a batch from its number
#
# Our simple loop reads in the file's order. A sorted file, all cats first, would teach "cat". So:
# every example once an **epoch**, each epoch in a new order, computed from the seed. Then **batch
# 1,234 follows from the number 1,234**, and no iterator has to be saved.


# %%
#| export
@lru_cache(maxsize=2)
def _order(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(length)


def examples_of(step: int, length: int, config: TrainingConfig) -> list[int]:
    """Which of `length` examples step `step` sees: every one once an epoch, shuffled."""
    first = step * config.batch_size
    places = (divmod(place, length) for place in range(first, first + config.batch_size))
    return [int(_order(length, config.seed, epoch)[at]) for epoch, at in places]


# %%
small = TrainingConfig(batch_size=4)
print("10 examples, 4 a step:", [examples_of(step, 10, small) for step in range(5)])
two_epochs = [i for step in range(5) for i in examples_of(step, 10, small)]
assert sorted(two_epochs[:10]) == sorted(two_epochs[10:]) == list(range(10))

# %% [markdown]
# ### A batch in parts, and a bug people really make
#
# A batch of 64 does not fit? Work through it in parts: gradients **add up** until somebody clears
# them (**gradient accumulation**). The obvious code takes the mean of the parts' mean losses. It runs, and
# learns. A widely used trainer did so for years, until 2024.
#
# The symptom: the same 8 examples, in 1 part and in 4, give different gradients.


# %%
def gradient(model, parts, weights):
    """The gradient of the weighted sum of the parts' mean losses, as one vector."""
    model.zero_grad()
    for part, weight in zip(parts, weights):
        (model(**part).loss * weight).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# %%
data = scenes.SceneDataset(8, tasks=("is there", "detect"))
items = sorted((data[i] for i in range(8)), key=lambda item: len(item["suffix"]))
parts = [tensors(items[i : i + 2]) for i in (0, 2, 4, 6)]
labels_in = [int((part["labels"] != -100).sum()) for part in parts]
print("labels in the parts:", labels_in)

# %%
model = load_model(TINY)
whole = gradient(model, [tensors(items)], [1])
means = gradient(model, parts, [1 / 4] * 4)
weighted = gradient(model, parts, [count / sum(labels_in) for count in labels_in])
gaps = [float((vector - whole).norm() / whole.norm()) for vector in (means, weighted)]
print(f"off the whole batch's: mean of means {gaps[0]:.0%}; weighted by labels {gaps[1]:.3%}")
assert gaps[0] > 0.2 and gaps[1] < 1e-4

# %% [markdown]
# One "yes" weighed as much as a list of boxes. The cure: weight each part by **its share of the
# labels**. The check: same data, two ways, compare gradients.


# %%
#| export
def make_batch(items: list[dict], processor: Processor, accumulate: int = 1) -> list[dict]:
    """Examples to the tensors of `accumulate` parts of a batch."""
    size = -(-len(items) // accumulate)
    parts = [items[i : i + size] for i in range(0, len(items), size)]
    columns = ([[x[key] for x in part] for key in ("image", "prefix", "suffix")] for part in parts)
    return [processor(images, prefixes, suffixes) for images, prefixes, suffixes in columns]


# %% [markdown]
# Our step does so. It also shortens a gradient that is longer than `max_grad_norm`, so that one odd
# batch cannot throw the weights far, and refuses a loss that is no number. The mean over processes is
# the value itself as long as there is one ([lesson 30](30_distributed.ipynb) starts more).


# %%
#| export
def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, parts: list[dict], max_grad_norm: float
) -> float:
    """One step on a batch from `make_batch`: its loss, the mean over all labels of all parts.

    Raises:
        ValueError: the loss is not a finite number; the weights stay as they were.
    """
    device = next(model.parameters()).device
    counts = [int((part["labels"] != -100).sum()) for part in parts]
    labels, total = mean_over_processes(sum(counts)), 0.0
    for part, count in zip(parts, counts):
        inputs = {key: tensor.to(device) for key, tensor in part.items()}
        keep = 1 + int(part["token_type_ids"].sum(1).max())  # an answer's guesses: these get logits
        loss = model(**inputs, logits_to_keep=keep).loss * (count / labels)
        loss.backward()
        total += loss.item()
    total = mean_over_processes(total)
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    if not math.isfinite(total) or not math.isfinite(norm):
        optimizer.zero_grad()
        raise ValueError(f"loss {total}, gradient {norm}: lower learning_rate, or use check_finite")
    optimizer.step()
    optimizer.zero_grad()
    return total


# %% [markdown]
# ### Stop, and go on
#
# What does the next step depend on? The trained weights, the optimizer's averages, the running mean,
# and the step's number, from which batch and dropout follow. The file is written under another name
# and then renamed: a crash leaves the old one whole.


# %%
#| export
FREE = ("steps", "workers", "folder", "save_every", "save")  # may differ when a run goes on


def save_checkpoint(model, optimizer, ema, losses: list[float], config: TrainingConfig) -> None:
    """Write everything that the next step depends on to `config.folder`."""
    state = {
        "model": {name: p.data for name, p in model.named_parameters() if p.requires_grad},
        "optimizer": optimizer.state_dict(),
        "ema": ema.state_dict() if ema else None,
        "losses": losses,
        "config": {k: v for k, v in asdict(config).items() if k not in FREE},
    }
    with replacing(config.folder or ".") as draft:
        torch.save(state, draft / "checkpoint.pt")


def load_checkpoint(model, optimizer, ema, config: TrainingConfig) -> list[float]:
    """Take up the run in `config.folder`, where there is one: the losses of its steps.

    Raises:
        ValueError: the file is broken, or of another model or config.
    """
    file = settled(config.folder or ".") / "checkpoint.pt"
    if not file.is_file():
        return []
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    settings = {k: v for k, v in asdict(config).items() if k not in FREE}
    state = read_checkpoint(file, settings, {name: p.shape for name, p in trained.items()})
    with taking_up(file, optimizer), torch.no_grad():
        losses = [float(loss) for loss in state["losses"]]
        optimizer.load_state_dict(state["optimizer"])
        if ema:
            ema.load_state_dict(state["ema"])
        for name, parameter in trained.items():
            parameter.copy_(state["model"][name])
    return losses


# %% [markdown]
# Ctrl-C must not land in the middle of a step. So it only leaves a note
# ([runs.py](../paligemma/support/runs.py)); the loop reads it after the step, saves, and stops.
#
# ## The module: the whole loop
#
# In its middle stand the dozen lines.


# %%
#| export
def train(
    model: PaliGemma,
    dataset: Dataset | list[dict],
    config: TrainingConfig,
    processor: Processor | None = None,
    write=save_checkpoint,
    read=load_checkpoint,
) -> list[float]:
    """Train a model on any data, or go on where `config.folder`'s checkpoint stopped.

    Ctrl-C ends the run after the present step, with a checkpoint; the same call goes on. On one
    process a run in two halves equals a whole one bit for bit. With `ema_decay` the model holds the
    mean of its weights at the end. Train in float32: bfloat16 weights swallow small steps.

    Args:
        model: trained in place, on the device where it is; what is frozen stays.
        dataset: has a length; item i, always the same one, is a dict of "image" (whatever the
            processor takes), "prefix" and "suffix" (str).
        config: see there.
        processor: None: the one that lies beside the model's weights.
        write, read: how checkpoints are kept.

    Returns:
        The loss of every step so far.

    Raises:
        ValueError: empty data, an item without those keys, a broken checkpoint, a loss of NaN.
    """
    processor = processor or Processor.from_pretrained(model.config.name_or_path)
    length = check_dataset(dataset)
    optimizer, ema, losses = make_optimizer(model, config), None, []
    if config.ema_decay:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    if config.folder:
        losses = read(model, optimizer, ema, config)
    steps = range(len(losses), config.steps)
    numbers = (own_share(examples_of(step, length, config)) for step in steps)
    make = partial(make_batch, processor=processor, accumulate=config.accumulate)
    model.train()
    hidden = process_number() > 0 or None  # None: where nobody looks
    bar = tqdm(total=config.steps, initial=len(losses), unit="step", disable=hidden)
    with noted_interrupt() as interrupted, bar:
        for step, parts in zip(steps, load_batches(dataset, numbers, make, config.workers)):
            torch.manual_seed(config.seed + step)  # dropout, too, follows from the step
            for group in optimizer.param_groups:
                group["lr"] = rate = learning_rate_at(step, config)
            losses.append(train_step(model, optimizer, parts, config.max_grad_norm))
            if ema:
                ema.update_parameters(model)
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", rate=f"{rate:.1e}")
            stop = mean_over_processes(bool(interrupted)) > 0
            last = stop or step + 1 == config.steps
            if config.folder and (last or (step + 1) % config.save_every == 0):
                write(model, optimizer, ema, losses, config)
            if stop:
                break
    model.eval()
    if ema:
        model.load_state_dict(ema.module.state_dict())
    if config.folder and config.save and len(losses) >= config.steps:
        with replacing(config.folder) as draft:
            save_model(model, draft)
            processor.save_pretrained(draft)
    return losses


# %% [markdown]
# Six steps at once; and three, then three more with a model that knows nothing of the first: the
# same bits.

# %%
few = {"batch_size": 4, "learning_rate": 5e-4, "warmup_steps": 6, "ema_decay": 0.9, "save": False}
at_once, in_two = load_model(TINY), load_model(TINY)
losses_at_once = train(at_once, Leftmost(50), TrainingConfig(steps=6, **few))
with tempfile.TemporaryDirectory() as folder:
    train(load_model(TINY), Leftmost(50), TrainingConfig(steps=3, folder=folder, **few))
    losses_in_two = train(in_two, Leftmost(50), TrainingConfig(steps=6, folder=folder, **few))

# %%
assert losses_in_two == losses_at_once  # every loss, all digits
assert all(torch.equal(a, b) for a, b in zip(at_once.parameters(), in_two.parameters()))
print("6 steps = 3 + 3 steps: losses and weights are equal bit for bit")

# %% [markdown]
# ### Your own pictures
#
# Mostly they come as a file of JSON lines beside pictures. The command `paligemma-train` takes such a
# folder.


# %%
#| export
class JsonlDataset(Dataset):
    """Examples from a file with one JSON object a line: {"image", "prefix", "suffix"}.

    Args:
        path: the file, or the folder that it lies in; pictures are named relative to the file.
        prefix: the prompt of lines that have none; None: every line has its own.

    Raises:
        ValueError: no such file, or a line that is not like this; the message has its number.
    """

    def __init__(self, path: str | os.PathLike, prefix: str | None = None):
        self.items = read_examples(path, prefix)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, str]:
        return self.items[index]


# %% [markdown]
# ## See it: a trained start, and none
#
# Two arms, the same 40 batches in the same order. One starts from the shipped model, the other from
# random weights of the same shape.

# %%
config = TrainingConfig(steps=40, batch_size=12, learning_rate=1e-3, warmup_steps=8, ema_decay=0.8)
trained = load_model(TINY)
fresh = PaliGemma(trained.config)
with torch.no_grad():  # PyTorch draws embeddings with deviation 1: they would drown the picture
    fresh.language_model.embed_tokens.weight.mul_(128**-0.5)

# %% tags=["nbval-ignore-output"]
arms = {"trained start": trained, "random start": fresh}
curves, looks = {}, {}
for name, arm in arms.items():
    curves[name] = train(arm, Leftmost(10_000), config, processor)
    looks[name] = loss_on(arm, held_out), loss_on(arm, swapped)
    print(f"{name}: own pictures {looks[name][0]:.2f}, others' {looks[name][1]:.2f}")

# %% tags=["nbval-ignore-output"]
after = say(trained)
print(f"trained start: right {share_right(after):.0%}")
print("random start says:", [answer[:12] for answer in say(fresh, held_out[:3])])

# %%
assert share_right(after) > 0.7
assert looks["trained start"][0] < blind / 3 and looks["trained start"][1] > blind
assert looks["random start"][0] > blind and abs(np.subtract(*looks["random start"])) < 0.05
assert curves["random start"][-1] < curves["random start"][0] / 3

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7.5, 2.8), layout="constrained")
for (name, values), colour in zip(curves.items(), ("good", "muted")):
    ax.plot(range(1, 41), values, color=COLOURS[colour], label=name)
ax.axhline(blind, color=COLOURS["ink"], linestyle="--", linewidth=0.9)
ax.text(40, blind, "blind at best", ha="right", va="bottom", fontsize=9)
ax.set(xlabel="step", ylabel="loss (log axis)", yscale="log", yticks=[0.1, 1, 10])
ax.set_yticklabels(["0.1", "1", "10"])
ax.legend()
save_figure(fig, "27_learning")

# %% tags=["hide-input"]
titles = [f"{b} → {a}" for b, a in zip(before[:6], after[:6])]
save_figure(
    show_images([x["image"] for x in held_out[:6]], titles, columns=6, height=1.6),
    "27_before_after.png",
)

# %% [markdown]
# The random start's loss has fallen to less than a third, and **it has not looked once**: own and
# others' pictures cost the same. It has learned how answers sound. This is why PaliGemma starts from
# SigLIP, which has seen billions of picture–text pairs ([lesson 26](26_contrastive.ipynb)).
#
# Above each picture: what the shipped model said → what it says after its 40 steps.

# %% [markdown]
# ## The diary of a long run
#
# The shipped model did start from nothing. How? Its recipe
# ([tools/train_tiny.py](../tools/train_tiny.py)) makes the tower look first: asked what each patch
# shows, with no word to say. Here is the record of its five hours.

# %% tags=["hide-input"]
diary = json.loads((TINY / "curves.json").read_text())
points = {point["step"]: point for point in diary["points"]}
assert 5 < diary["seconds"] / 3600 < 5.5 and points[2400]["patch right"] > 0.9
assert points[3250]["short loss"] < 0.8 * points[3000]["short loss"]
assert points[3250]["caption"] - points[3000]["caption"] < 1
assert [round(points[step]["caption"]) for step in (3000, 4500, 6250, 8500)] == [17, 66, 76, 88]
assert points[8500]["detect"] > 97 and points[11600]["caption"] < 65
assert points[max(p for p in points if "caption" in points[p])]["caption"] > 90
events = {0: "looks", 2440: "speaks", 3420: "rate\nlowered", 6300: "rate\nfalls",
          8500: "reads jitter", 11400: "wider world"}  # fmt: skip
fig, axes = plt.subplots(2, 1, figsize=(9.5, 5), layout="constrained", sharex=True)
names = {"patch loss": "what each patch shows", "short loss": "captions, short answers",
         "caption": "captions", "count": "how many", "detect": "names behind boxes"}  # fmt: skip
colours = dict(zip(names, ("vision", "language", "language", "together", "accent")))
for key, name in names.items():
    found_points = [(step, point[key]) for step, point in points.items() if key in point]
    axes[int("loss" not in key)].plot(*zip(*found_points), label=name, color=COLOURS[colours[key]])
for ax in axes:
    for step in events:
        ax.axvline(step, color=COLOURS["muted"], lw=0.8, ls=":")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
for step, name in events.items():
    side = {"ha": "right", "x": step - 60} if name == "speaks" else {"ha": "left", "x": step + 60}
    axes[0].text(y=2.95, s=name, va="top", color=COLOURS["inside"], **side)
axes[0].set(ylabel="loss", ylim=(0, 3))
axes[1].set(ylabel="right on validation, %", ylim=(0, 103), xlabel="step")
save_figure(fig, "27_shipped")

# %% [markdown]
# From step 3,000 to 3,250 the loss fell by a fifth, and captions stood at 17 %: the rate was too
# high. A branch was thrown away to find that out. At a lower rate captions were at 66 % by step 4,500; while it fell
# to zero, up to step 8,500, they rose from 76 to 88 %. Then the world grew
# wider: captions fell below 65 % and came back above 90.

# %% [markdown]
# A diary is no experiment: nothing here was run twice with one thing changed. And its curves are made
# with **true** tokens fed in. At step 8,500 more than 97 % of the names behind boxes were right; left
# alone, the model reached 27 %. [Lesson 28](28_evaluation.ipynb) tells why.

# %% [markdown]
# ## At full size
#
# Each weight in float32 needs itself, its gradient and AdamW's two averages: 16 bytes. A step costs
# about 6 operations per weight and token: 2 forward, 4 backward.

# %%
with torch.device("meta"):
    full = sum(p.numel() for p in PaliGemma(PaliGemmaConfig()).parameters())
tokens = 256 + 32
step = 6 * full * tokens
print(f"{full:,} weights: {16 * full / 1e9:.0f} GB for weights, gradients and averages")
print(f"one example of {tokens} tokens: {step / 1e12:.1f} TFLOP; a billion: {1e9 * step:.1e} FLOP")

# %% [markdown]
# PaliGemma saw about a billion examples. What is left for one machine: fewer weights that learn
# ([lesson 29](29_lora.ipynb)).

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): the loss on the prefix
#
# Someone puts the loss on the question, too. Questions are `is there a KIND?`, with 48 kinds drawn
# evenly, whatever the picture shows. Of a question's 8 tokens one (the kind) cannot be known and 7 are
# always the same. To which value can the mean loss of the *question* fall at best?

# %% tags=["exercise"]
answer_1 = None  # a number, two decimals


# %% tags=["check"]
def test_1(value):
    assert isinstance(value, (int, float)), "give a number"
    assert value > 0, "a loss is -log p, and p is below 1: can it be 0 or less?"
    assert abs(value - math.log(48)) > 0.05, "that is the kind's own loss, not the mean"
    assert abs(value - math.log2(48) / 8) > 0.02, "the loss uses the natural logarithm"
    assert abs(value - math.log(48) / 8) < 0.01, "what does each of the 8 tokens cost at best?"


check(test_1, answer_1)

# %% [markdown]
# <details><summary>Hint</summary>
#
# What does a token cost that is always the same? And one of 48 that are equally likely?
#
# </details>

# %% tags=["solution"]
answer_1 = math.log(48) / 8  # one token costs log 48, seven cost nothing
check(test_1, answer_1)

# %% [markdown]
# ### Exercise 2 (write): the loop
#
# Write the training loop. For each batch: one step of the given optimizer at the rate
# `rate_at(step)`, counted from 0. Return the losses, plain numbers, each from *before* its step.


# %% tags=["exercise"]
def my_train(model, optimizer, batches, rate_at):
    """A loss for each batch; model(**batch).loss is a tensor, batches is a list of dicts."""
    return None  # your code


# %% tags=["check"]
class Parabola(nn.Module):
    """Its loss is (w - x)² / 2, so that its gradient is w - x."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return SimpleNamespace(loss=(self.w - x) ** 2 / 2)


def test_2(my_train):
    targets, rates = (3.0, -2.0, 2.5), (0.4, 0.2, 0.1)
    toy = Parabola()
    optimizer = torch.optim.SGD(toy.parameters(), lr=1.0)
    batches = [{"x": torch.tensor(x)} for x in targets]
    losses = my_train(toy, optimizer, batches, lambda step: rates[min(step, 2)])
    assert isinstance(losses, list) and len(losses) == 3, "return a list with a loss for each batch"
    assert toy.w.item() != 1, "the weight has not moved"
    assert all(isinstance(loss, float) for loss in losses), (
        "losses are tensors, which keep their whole graph in memory: take the number"
    )

    def run(adds_up=0.0, rates=rates, after=False):
        w, gradient, found = 1.0, 0.0, []
        for x, rate in zip(targets, rates):
            gradient = adds_up * gradient + w - x
            found.append((w - x) ** 2 / 2)
            w -= rate * gradient
            if after:
                found[-1] = (w - x) ** 2 / 2
        return w, found

    w = toy.w.item()
    assert abs(w - run(adds_up=1.0)[0]) > 1e-4, "each step uses the gradients of those before, too"
    assert abs(w - run(rates=(1, 1, 1))[0]) > 1e-4, "rate_at is never used"
    assert abs(w - run(rates=(1, *rates[:2]))[0]) > 1e-4, "the rate is set after its step"
    assert abs(w - run(rates=rates[:1] * 3)[0]) > 1e-4, "every step has the rate of the first"
    assert abs(w - run(rates=(0.2, 0.1, 0.1))[0]) > 1e-4, "does step count from 0?"
    assert abs(w - run()[0]) < 1e-4, "the weight does not end where these three steps lead"
    late = all(abs(a - b) < 1e-4 for a, b in zip(losses, run(after=True)[1]))
    assert not late, "these are the losses after the steps"
    assert all(abs(a - b) < 1e-4 for a, b in zip(losses, run()[1])), (
        "the losses are not the batches'"
    )


check(test_2, my_train)

# %% [markdown]
# <details><summary>Hint</summary>
#
# An optimizer reads its rate, when it steps, from the dicts in `optimizer.param_groups`.
#
# </details>


# %% tags=["solution"]
def my_train(model, optimizer, batches, rate_at):
    """A loss for each batch; model(**batch).loss is a tensor, batches is a list of dicts."""
    losses = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step)  # before the step, which reads it
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # else the next backward would add to these
        losses.append(loss.item())
    return losses


check(test_2, my_train)

# %% [markdown]
# ### Exercise 3 (extend): every example counts the same
#
# Our loss is a mean over all labels, so a long answer weighs more than a short one. Google's code takes
# the mean over **examples** of each example's mean. Write it.


# %% tags=["exercise"]
def example_loss(logits, labels):
    """float[B, L, V], int64[B, L] with -100 where nothing is asked → float[]."""
    return None  # your code


# %% tags=["check"]
def test_3(example_loss):
    torch.manual_seed(3)
    logits = torch.randn(2, 7, 5, requires_grad=True)
    labels = torch.full((2, 7), -100)
    labels[0, 2:4], labels[1, 2:7] = torch.tensor([4, 1]), torch.tensor([3, 2, 2, 4, 1])
    found = example_loss(logits, labels)
    assert isinstance(found, torch.Tensor) and found.dim() == 0, "return one number, as a tensor"
    assert found.requires_grad, "no gradient comes back from it: stay with tensors"

    def rows(logits, shift=1):  # the loss of each row by the loop above
        moved = torch.cat([logits[:, shift - 1 :], logits[:, : shift - 1]], 1)
        return [loss_loop(moved[i : i + 1].detach(), labels[i : i + 1]) for i in (0, 1)]

    value, (a, b) = found.item(), rows(logits)
    off = lambda other: abs(value - other) > 1e-3  # noqa: E731
    assert off((2 * a + 5 * b) / 7), "the long answer still weighs more than the short one"
    assert off(sum(rows(logits, 2)) / 2), "the guess for a label stands one position earlier"
    assert off(sum(rows(logits, 0)) / 2), "that guess stands two positions before its label"
    assert off(a + b), "that is the sum over the examples, not their mean"
    assert off((2 * a + 5 * b) / 12) and off((2 * a + 5 * b) / 14), (
        "divide by the labels of the example: positions without one are not asked"
    )
    assert not off((a + b) / 2), "compare each example with loss_loop on it alone"


check(test_3, example_loss)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `nn.functional.cross_entropy(…, reduction="none")` wants logits[B, V, L] and gives 0 where the label
# is −100. And who guesses whom?
#
# </details>


# %% tags=["solution"]
def example_loss(logits, labels):
    """float[B, L, V], int64[B, L] with -100 where nothing is asked → float[]."""
    guesses, truth = logits[:, :-1].transpose(1, 2), labels[:, 1:]  # position i guesses i + 1
    losses = nn.functional.cross_entropy(guesses, truth, reduction="none")  # [B, L - 1]
    return (losses.sum(1) / (truth != -100).sum(1)).mean()  # each example's mean, then theirs


check(test_3, example_loss)

# %% [markdown]
# ## Summary
#
# - Only the answer and its end are learned, with true tokens fed in.
# - A dozen lines train; a schedule and a running mean end nearer to the floor.
# - A falling loss does not say that the model looks: swap the pictures.
# - Parts of a batch weigh by their labels.
# - Where batch and dropout follow from the step, a run continues bit for bit.

# %% [markdown]
# ## Quiz
#
# **1.** A run's caption loss stands still from step 50 to step 5,000. Which experiment of two
# minutes tells you most?
#
# <details><summary>Answer</summary>
#
# Swap the pictures and measure again. If the loss stays the same, the model does not look: its tower
# needs a teacher of its own (patches, contrast). If it gets worse, the limit is elsewhere.
#
# </details>

# %% [markdown]
# **2.** Why may `steps` differ when a run goes on, but not `batch_size`?
#
# <details><summary>Answer</summary>
#
# With another batch size step 1,000 means other examples: some would be seen twice in an epoch and
# others never. More steps change only the rate of what is to come.
#
# </details>

# %% [markdown]
# **3.** You resume a run and its losses differ from the third digit on. Name three things that were
# not saved.
#
# <details><summary>Answer</summary>
#
# The optimizer's averages, the step's number (wrong rate, wrong batch), the place in the data or the
# random state.
#
# </details>

# %% [markdown]
# ## References
#
# - Beyer et al. 2024, *PaliGemma: A versatile 3B VLM for transfer*
#   ([arXiv 2407.07726](https://arxiv.org/abs/2407.07726)), section 3.2 (stages) and figure 2.
# - Loshchilov and Hutter 2019, *Decoupled Weight Decay Regularization*
#   ([arXiv 1711.05101](https://arxiv.org/abs/1711.05101)).
# - big_vision, `trainers/proj/paligemma/train.py`; PyTorch, `torch.optim.swa_utils`.

# %% [markdown] tags=["navigation"]
# [← Contrastive learning](26_contrastive.ipynb) | [contents](00_overview.ipynb) | [Evaluation →](28_evaluation.ipynb)
