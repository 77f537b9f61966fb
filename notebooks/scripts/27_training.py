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
# - compute the loss of an answer, and say why nothing else is learnt;
# - write a training loop in a dozen lines, and explain every line that a real one adds;
# - stop a run at any step and continue it bit for bit;
# - fine-tune on your own pictures with `train(model, dataset, config)`.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("training")

# %% [markdown]
# ## Setup
#
# The model ([lesson 15](15_model.ipynb)) computes the loss, the processor
# ([lesson 14](14_processor.ipynb)) makes the tensors, the scenes ([lesson 25](25_scenes.ipynb)) are
# the data; `Pipeline` ([lesson 24](24_inference.ipynb)) answers. The cells that begin with
# `#| export` become [training.py](../paligemma/training.py). One thread: small models gain nothing
# from two.

# %%
#| export
"""Training on pictures with a prompt and an answer: loss, steps, schedule, exact resume."""

import math
import os
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from paligemma.checkpoint import save_model
from paligemma.model import PaliGemma
from paligemma.processor import Processor
from paligemma.support.files import replacing
from paligemma.support.runs import (
    check_settings,
    ignore_interrupt,
    noted_interrupt,
    read_checkpoint,
    read_examples,
)

# %% tags=["setup"]
import json
import tempfile

import matplotlib.pyplot as plt
from PIL import Image

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
# A row of a training batch holds a picture, a question and the answer. What should the model learn
# from it? Not the picture: it is given. Not the question: the user writes it. Only the **answer**,
# and that it **ends**.

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
learnt = (row["labels"][0, shown] != -100).tolist()
fig, ax = plt.subplots(figsize=(9, 2.1), layout="constrained")
for i, (piece, is_label) in enumerate(zip(pieces, learnt)):
    colour = COLOURS["vision" if piece == "▦" else "accent" if is_label else "language"]
    ax.add_patch(plt.Rectangle((i - 0.46, 1.3), 0.92, 0.8, color=colour, alpha=0.3))
    ax.text(i, 1.7, piece, ha="center", va="center", fontsize=9)
    label = piece if is_label else "−100"
    ax.text(i, 0.4, label, ha="center", va="center", fontsize=9,
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
# The model computes just this, vectorised, when it gets labels ([lesson 15](15_model.ipynb)). So
# training needs **no forward pass of its own**: it calls the model's.

# %%
model = load_model(TINY)


def tensors(items):
    """Examples to the tensors of one batch."""
    images = [item["image"] for item in items]
    prefixes = [item["prefix"] for item in items]
    suffixes = [item["suffix"] for item in items]
    return processor(images, prefixes, suffixes)


batch = tensors([scenes.SceneDataset(4, "validation")[i] for i in range(4)])
out = model(**batch)
slow = loss_loop(out.logits.detach(), batch["labels"])
print(f"the model's loss {out.loss.item():.6f}, the loop's {slow:.6f}")
assert abs(out.loss.item() - slow) < 1e-5

# %% [markdown]
# ## Something to learn
#
# The shipped model has never been asked what stands on the left. A data set is anything whose item
# `i` is a dict of `image`, `prefix` and `suffix`.


# %%
class Leftmost(Dataset):
    """Scenes of two or three objects; the answer is the leftmost one."""

    def __init__(self, length, split="train"):
        self.length, self.split = length, split

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        scene = scenes.make_scene(i, self.split, objects=(2, 3))
        leftmost = scenes.phrase(scene.kinds[0], 1)  # "an owl"
        return {"image": scene.image, "prefix": "answer en what is left?", "suffix": leftmost}


held_out = [Leftmost(60, "validation")[i] for i in range(60)]


def say(model, items=held_out):
    """The answers of the model, by its own greedy decoding."""
    pipeline = Pipeline(model.eval(), processor)
    return pipeline.batch([x["image"] for x in items], [x["prefix"] for x in items])


def share_right(answers):
    return np.mean([answer == x["suffix"] for answer, x in zip(answers, held_out)])


before = say(model)
print(f"right: {share_right(before):.0%}; it says, for example,", before[:4])
assert share_right(before) < 0.1

# %% [markdown]
# ## A dozen lines
#
# Take some items, make tensors, ask for the loss, walk against its gradient.


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


losses = simple_train(model.train(), Leftmost(10_000), steps=30)
print(f"loss: {np.mean(losses[:3]):.2f} at first, {np.mean(losses[-3:]):.2f} after 30 steps")
print(f"right: {share_right(say(model)):.0%}")
assert np.mean(losses[-3:]) < np.mean(losses[:3]) / 2

# %% [markdown]
# That is training; everything below makes it better, safer or repeatable. PaliGemma itself was made
# so: SigLIP and Gemma came trained, and all further data was pictures, prefixes and suffixes.
#
# ## What a real loop adds
#
# ### Settings that are checked
#
# A learning rate of `nan`, a batch of −1: such a run ends with broken weights and no message. All
# that a run depends on stands in one dataclass, which looks at every value when it is made.


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
        least = {"steps": 1, "batch_size": 1, "accumulate": 1, "save_every": 1}
        check_settings(self, least, above_zero=("learning_rate", "max_grad_norm"))
        if self.ema_decay >= 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; expected a number below 1")
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate is {self.accumulate}, more parts than the {self.batch_size} examples "
                "of a batch; lower it or raise batch_size"
            )


# %%
for bad in ({"learning_rate": math.nan}, {"batch_size": -1}, {"steps": "many"}):
    try:
        TrainingConfig(**bad)
    except ValueError as error:
        print(error)

# %% [markdown]
# ### How far: the schedule
#
# At first the optimizer's averages know nothing: **warm up**, with small steps. At the end large
# steps only dance around the valley's floor: **cool down**, to zero.


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
fig, ax = plt.subplots(figsize=(6.5, 2.4), layout="constrained")
ax.plot([learning_rate_at(step, example) for step in range(1000)], color=COLOURS["accent"])
ax.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
save_figure(fig, "27_schedule")

# %% [markdown]
# ### What shrinks: decay groups
#
# Weight decay pulls matrices towards 0, so that no weight lives off old luck. Biases and norms are
# vectors, one number a channel: pulling *those* to 0 switches channels off. So two groups. Frozen
# parameters are in none: the same function trains adapters ([lesson 29](29_lora.ipynb)).


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
# Every example once an epoch, each epoch in a new order. The order follows from the seed and the
# epoch, so **batch 1,234 can be computed from the number 1,234**: no iterator has to be saved.


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
# them. The obvious code takes each part's mean loss, divided by the number of parts. It runs, and
# learns. For years a widely used trainer did so; it was corrected in 2024.
#
# The symptom: the same 8 examples, in 1 part and in 4, give different gradients.


# %%
def gradient(model, parts, weights):
    """The gradient of the weighted sum of the parts' mean losses, as one vector."""
    model.zero_grad()
    for part, weight in zip(parts, weights):
        (model(**part).loss * weight).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


data = scenes.SceneDataset(8, tasks=("is there", "detect"))
items = sorted((data[i] for i in range(8)), key=lambda item: len(item["suffix"]))
parts = [tensors(items[i : i + 2]) for i in (0, 2, 4, 6)]
whole = gradient(model, [tensors(items)], [1])
labels_in = [int((part["labels"] != -100).sum()) for part in parts]

means = gradient(model, parts, [1 / 4] * 4)
weighted = gradient(model, parts, [count / sum(labels_in) for count in labels_in])
print("labels in the parts:", labels_in)
gaps = [float((vector - whole).norm() / whole.norm()) for vector in (means, weighted)]
print(f"off the whole batch's: mean of means {gaps[0]:.0%}, weighted by labels {gaps[1]:.0e}")
assert gaps[0] > 0.2 and gaps[1] < 1e-4

# %% [markdown]
# One "yes" weighed as much as a list of boxes. The cure: weight each part by **its share of the
# labels**; then parts and whole agree to rounding. The check is the cell above: same data, two
# ways, compare gradients.
#
# With clipping (a gradient longer than `max_grad_norm` is scaled down; its direction stays) this is
# our step:


# %%
#| export
def make_batch(items: list[dict], processor: Processor, accumulate: int = 1) -> list[dict]:
    """Examples to the tensors of `accumulate` parts of a batch."""
    size = -(-len(items) // accumulate)
    parts = [items[i : i + size] for i in range(0, len(items), size)]
    columns = ([[x[key] for x in part] for key in ("image", "prefix", "suffix")] for part in parts)
    return [processor(images, prefixes, suffixes) for images, prefixes, suffixes in columns]


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, parts: list[dict], max_grad_norm: float
) -> float:
    """One step on a batch from `make_batch`: its loss, the mean over all labels of all parts.

    Raises:
        ValueError: the loss is not a finite number; the weights stay as they were.
    """
    device = next(model.parameters()).device
    counts = [int((part["labels"] != -100).sum()) for part in parts]
    total = 0.0
    for part, count in zip(parts, counts):
        loss = model(**{key: tensor.to(device) for key, tensor in part.items()}).loss
        loss = loss * (count / sum(counts))
        loss.backward()
        total += loss.item()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    if not math.isfinite(total) or not math.isfinite(norm):
        optimizer.zero_grad()
        raise ValueError(f"the loss is {total} (gradient {norm}); lower learning_rate")
    optimizer.step()
    optimizer.zero_grad()
    return total


# %% [markdown]
# ### Which weights to keep: a running mean
#
# Each step is right on average and noisy in detail. The weights dance around the valley's floor;
# their **mean** lies close to it: $m \leftarrow 0.98\,m + 0.02\,w$. PyTorch has it as
# `AveragedModel`.

# %% tags=["hide-input"]
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
assert ratio > 2
fig, ax = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
grid_x, grid_y = np.meshgrid(np.linspace(-3, 4.5, 80), np.linspace(-3.5, 3.5, 80))
ax.contour(grid_x, grid_y, grid_x**2 + 0.5 * grid_y**2, 10, colors=COLOURS["muted"], linewidths=0.5)
ax.plot(*path.T, color=COLOURS["vision"], linewidth=0.5, alpha=0.8, label="weights")
ax.plot(*smooth.T, color=COLOURS["accent"], linewidth=2.2, label="running mean")
ax.plot(0, 0, "*", color=COLOURS["ink"], markersize=11, label="the valley's floor")
ax.set(xticks=[], yticks=[])
ax.legend(fontsize=9, loc="upper left")
save_figure(fig, "27_mean")

# %% [markdown]
# ### Stop, and go on
#
# What does the next step depend on? The trained weights, the optimizer's averages, the running mean,
# and the step's number: here, the number of losses so far. Batch and dropout follow from the number.
# The file is written under another name and then renamed: a crash leaves the old one whole.


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
        torch.save(state, draft("checkpoint.pt"))


def load_checkpoint(model, optimizer, ema, config: TrainingConfig) -> list[float]:
    """Take up the run in `config.folder`, where there is one: the losses of its steps.

    Raises:
        ValueError: the file is broken, or of another model or config.
    """
    file = Path(config.folder or ".") / "checkpoint.pt"
    if not file.is_file():
        return []
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    settings = {k: v for k, v in asdict(config).items() if k not in FREE}
    state = read_checkpoint(file, settings, {name: p.shape for name, p in trained.items()})
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state["model"][name])
    optimizer.load_state_dict(state["optimizer"])
    if ema:
        ema.load_state_dict(state["ema"])
    return state["losses"]


# %% [markdown]
# Ctrl-C must not land in the middle of a step. So the signal only leaves a note
# ([runs.py](../paligemma/support/runs.py), which also finds broken files); the loop reads it after
# the step, saves, and stops. The same call then goes on.
#
# ## The module: the whole loop
#
# Compare it with the dozen lines: the same four things in the middle.


# %%
#| export
def train(
    model: PaliGemma, dataset: Dataset, config: TrainingConfig, processor: Processor | None = None
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

    Returns:
        The loss of every step so far.

    Raises:
        ValueError: empty data, an item without those keys, a broken checkpoint, a loss of NaN.
    """
    processor = processor or Processor.from_pretrained(model.config.name_or_path)
    length = len(dataset)  # type: ignore[arg-type]
    if not length or (missing := {"image", "prefix", "suffix"} - set(dataset[0])):
        what = f"lacks {', '.join(sorted(missing))}" if length else "is empty"
        raise ValueError(f"the dataset {what}; items need image, prefix and suffix")
    optimizer, ema, losses = make_optimizer(model, config), None, []
    if config.ema_decay:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    if config.folder:
        losses = load_checkpoint(model, optimizer, ema, config)
    steps = range(len(losses), config.steps)
    loader = DataLoader(
        dataset,
        batch_sampler=(examples_of(step, length, config) for step in steps),
        collate_fn=partial(make_batch, processor=processor, accumulate=config.accumulate),
        num_workers=config.workers,
        worker_init_fn=ignore_interrupt,
    )
    model.train()
    bar = tqdm(total=config.steps, initial=len(losses), unit="step", disable=None)
    with noted_interrupt() as interrupted, bar:
        for step, parts in zip(steps, loader):
            torch.manual_seed(config.seed + step)  # dropout, too, follows from the step
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, config)
            losses.append(train_step(model, optimizer, parts, config.max_grad_norm))
            if ema:
                ema.update_parameters(model)
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            last = interrupted or step + 1 == config.steps
            if config.folder and (last or (step + 1) % config.save_every == 0):
                save_checkpoint(model, optimizer, ema, losses, config)
            if interrupted:
                break
    model.eval()
    if ema:
        model.load_state_dict(ema.module.state_dict())
    if config.folder and config.save and len(losses) >= config.steps:
        save_model(model, config.folder)
        processor.save_pretrained(config.folder)
    return losses


# %% [markdown]
# Six steps at once; and three, then three more with a model that knows nothing of the first: the
# same bits. (`steps` may be raised when a run goes on; here the rate is the same, all warm-up.)

# %%
few = {"batch_size": 4, "learning_rate": 5e-4, "warmup_steps": 6, "ema_decay": 0.9, "save": False}
at_once = load_model(TINY)
losses_at_once = train(at_once, Leftmost(50), TrainingConfig(steps=6, **few))

with tempfile.TemporaryDirectory() as folder:
    first = train(load_model(TINY), Leftmost(50), TrainingConfig(steps=3, folder=folder, **few))
    second_half = load_model(TINY)
    in_two = train(second_half, Leftmost(50), TrainingConfig(steps=6, folder=folder, **few))
assert in_two == losses_at_once and in_two[:3] == first  # every loss, all digits
pairs = zip(at_once.state_dict().values(), second_half.state_dict().values())
assert all(torch.equal(a, b) for a, b in pairs)
print("6 steps = 3 + 3 steps: losses and weights are equal bit for bit")

# %% [markdown]
# ### Your own pictures
#
# Data of one's own mostly comes as a file of JSON lines beside a folder of pictures; the published
# recipes use this form. One broken line in ten thousand should say **which one** it is.


# %%
#| export
class JsonlDataset(Dataset):
    """Examples from a file with one JSON object a line: {"image", "prefix", "suffix"}.

    Args:
        path: the file, or a folder with exactly one `*.jsonl`; pictures are named relative to it.

    Raises:
        ValueError: no such file, or a line that is not like this; the message has its number.
    """

    def __init__(self, path: str | os.PathLike):
        self.items = read_examples(path)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, str]:
        return self.items[index]


# %%
folder = Path(tempfile.mkdtemp())
Image.fromarray(held_out[0]["image"]).save(folder / "one.png")
line = {"image": "one.png", "prefix": "answer en what is left?", "suffix": "cat"}
(folder / "mine.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line | {"suffix": 3}))
try:
    JsonlDataset(folder)
except ValueError as error:
    print(str(error).replace(str(folder), "…"))

# %% [markdown]
# ## See it: a new question, learnt in a minute
#
# The shipped model again from its start, with all of the above. Beside the loss stands a
# **control**: the same questions about the *next* scene's picture. What is right there did not come
# from looking.

# %%
model = load_model(TINY)
config = TrainingConfig(steps=50, batch_size=16, learning_rate=1e-3, warmup_steps=10, ema_decay=0.8)
losses = train(model, Leftmost(10_000), config)

after = say(model)
moved = [x | {"image": y["image"]} for x, y in zip(held_out, held_out[1:] + held_out[:1])]
control = share_right(say(model, moved))
print(
    f"right: before {share_right(before):.0%}, after {share_right(after):.0%}, control {control:.0%}"
)
assert share_right(after) > 0.7 > 0.3 > control

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(6.5, 2.6), layout="constrained")
ax.plot(range(1, len(losses) + 1), losses, color=COLOURS["accent"])
blind = math.log(48) / 3
assert np.mean(losses[-5:]) < blind / 2
ax.axhline(blind, color=COLOURS["muted"], linestyle="--", linewidth=0.9)
ax.text(len(losses), blind, "a good guess without looking", ha="right", va="bottom", fontsize=9)
ax.set(xlabel="step", ylabel="loss", ylim=(0, 4))
save_figure(fig, "27_learning")
titles = [f"{b} → {a}" for b, a in zip(before[:6], after[:6])]
save_figure(
    show_images([x["image"] for x in held_out[:6]], titles, columns=6, height=1.6),
    "27_before_after.png",
)

# %% [markdown]
# Above each picture: what it said before → what it says after. Grey line: three tokens, of which
# article and name together are one of 48 ($\ln 48$ without looking) and eos costs nothing. Whoever
# is below it has looked.

# %% [markdown]
# ## From nothing, it is harder
#
# This model could see before. Trained from nothing, a small PaliGemma first learns how captions
# *sound*, and ignores the picture, which is noise at first. The shipped model's own recipe,
# [tools/train_tiny.py](../tools/train_tiny.py), therefore asks each patch what it shows before the
# first word, begins with one object, and uses targets that know that `<loc0500>` is next to
# `<loc0501>`. PaliGemma starts from SigLIP, which had seen billions of pictures
# ([lesson 26](26_contrastive.ipynb)).

# %% tags=["hide-input"]
story = json.loads((TINY / "curves.json").read_text())
points, stages = story["points"], story["stages"]


def curve(ax, key, **style):
    """One key of the points, where they have it."""
    found = [(p["step"], p[key]) for p in points if key in p]
    if found:
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
        ax.text(step, 0.3, f" {name}", fontsize=9, ha="right", color=COLOURS["muted"], **place)
axes[0].set(title="loss", xlabel="step", ylim=(0, 5))
axes[1].set(title="validation answers right, %", xlabel="step", ylim=(0, 103))
axes[0].legend(fontsize=9)
axes[1].legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
save_figure(fig, "27_shipped")

# %% [markdown]
# The record of the shipped model: first it looks, then it speaks, and exact words come last, while
# the rate falls. One branch of this run was thrown away: up to step 3,420 the rate was twice what
# it should have been, and figures rose only while it fell.

# %% [markdown]
# ### What these curves do not show
#
# In training, and in these figures, the model reads **true** words; alone it reads **its own**. How
# much worse that can be is told in [lesson 28](28_evaluation.ipynb): the check is to let it write.

# %% [markdown]
# ## At full size
#
# To train all of PaliGemma 3B with AdamW in float32, each weight needs its gradient and two averages:
# 16 bytes. A step costs about 6 operations per weight and token: 2 forwards, 4 backwards.

# %%
with torch.device("meta"):
    full = sum(p.numel() for p in PaliGemma(PaliGemmaConfig()).parameters())
tokens = 256 + 32
step = 6 * full * tokens
print(f"{full:,} weights: {16 * full / 2**30:.0f} GiB for weights, gradients and averages")
print(f"one example of {tokens} tokens: {step / 1e12:.1f} TFLOP; a billion: {1e9 * step:.1e} FLOP")

# %% [markdown]
# PaliGemma's paper trains on about a billion examples, on hundreds of accelerators. What is left for
# one machine: fewer weights that learn ([lesson 29](29_lora.ipynb)), or more machines.

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
    assert abs(value - math.log(48)) > 0.05, "that is the kind's own loss, not the mean"
    assert abs(value - math.log(48) / 8) < 0.01, "what does each of the 8 tokens cost at best?"


check(test_1, answer_1)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The best guess about 48 equally likely words gives each 1/48. What is $-\ln$ of it? What do tokens
# cost that are always the same?
#
# </details>

# %% tags=["solution"]
answer_1 = math.log(48) / 8  # one token costs ln 48, seven cost nothing
check(test_1, answer_1)

# %% [markdown]
# ### Exercise 2 (fill in): how long the start stays
#
# With $m \leftarrow 0.98\,m + 0.02\,w$ the first weights stay in the mean for long. Write the share
# of the **first** value in the mean after `steps` updates, and the number of updates after which it
# is below 1 % for the first time.


# %% tags=["exercise"]
def share_of_first(ema_decay, steps):
    return None  # your code


def steps_until_forgotten(ema_decay):
    return None  # your code: a whole number


# %% tags=["check"]
def test_2(share, until):
    assert share(0.5, 3) is not None, "share_of_first returns nothing yet"
    for decay, steps in ((0.5, 3), (0.98, 1), (0.98, 100), (0.9, 0)):
        mean = 1.0
        for _ in range(steps):
            mean = decay * mean + (1 - decay) * 0.0
        assert abs(share(decay, steps) - mean) < 1e-9, (
            f"decay {decay}, {steps} updates: try by hand"
        )
    for decay in (0.5, 0.9, 0.98):
        n = until(decay)
        assert isinstance(n, int), "a whole number of updates"
        assert decay**n < 0.01, f"decay {decay}: after {n} updates it is still 1 % or more"
        assert decay ** (n - 1) >= 0.01, f"decay {decay}: it is below 1 % earlier"


check(test_2, share_of_first, steps_until_forgotten)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Each update multiplies the old content by the same number. For the second: take logarithms, and
# round up.
#
# </details>


# %% tags=["solution"]
def share_of_first(ema_decay, steps):
    return ema_decay**steps  # multiplied once an update


def steps_until_forgotten(ema_decay):
    return math.ceil(math.log(0.01) / math.log(ema_decay))


check(test_2, share_of_first, steps_until_forgotten)

# %% [markdown]
# ### Exercise 3 (extend): a step in parts
#
# Write the heart of `train_step`: given a model and parts of a batch (as `make_batch` gives them),
# leave in every `p.grad` the gradient of the mean loss over **all labels of all parts**.


# %% tags=["exercise"]
def accumulate_gradients(model, parts):
    return None  # your code: backward for each part


# %% tags=["check"]
def test_3(accumulate_gradients):
    trained = load_model(TINY).train()
    chosen = [items[i] for i in (0, 1, 5, 6, 7)]  # yes and no, and boxes: unequal numbers of labels

    def found(function, accumulate):
        trained.zero_grad()
        function(trained, make_batch(chosen, processor, accumulate))
        assert trained.language_model.embed_tokens.weight.grad is not None, "no gradient yet"
        return torch.cat([p.grad.flatten() for p in trained.parameters()])

    truth = found(lambda m, parts: m(**parts[0]).loss.backward(), 1)
    for accumulate in (1, 2, 5):
        theirs = found(accumulate_gradients, accumulate)
        ratio = float(theirs.norm() / truth.norm())
        assert abs(ratio - accumulate) > 0.3 or accumulate == 1, (
            "the parts' losses add up: too long"
        )
        gap = float((theirs - truth).norm() / truth.norm())
        assert gap < 1e-3, (
            f"in {accumulate} parts it differs by {gap:.0%}: what does each part weigh?"
        )


check(test_3, accumulate_gradients)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `model(**part).loss` is a mean over the part's labels. How many labels has the part, how many have
# all of them?
#
# </details>


# %% tags=["solution"]
def accumulate_gradients(model, parts):
    # A mean times its count is a sum; the sums, divided by the number of all labels, are the mean.
    counts = [int((part["labels"] != -100).sum()) for part in parts]
    for part, count in zip(parts, counts):
        (model(**part).loss * count / sum(counts)).backward()


check(test_3, accumulate_gradients)

# %% [markdown]
# ## Summary
#
# - Only the answer and its end are learnt; the shift happens once, in the model's own forward.
# - A loop of a dozen lines trains; schedule, decay groups, clipping, a running mean make it better.
# - Parts of a batch weigh by their labels; a mean of means is another loss.
# - Where batch and dropout follow from the step, a run continues bit for bit.
# - A falling loss with true words fed in does not say how the model does with its own.

# %% [markdown]
# ## Quiz
#
# **1.** A run's caption loss stands still from step 50 to step 5,000. Which experiment of two
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
# **2.** Why may `steps` differ when a run goes on, but not `batch_size`?
#
# <details><summary>Answer</summary>
#
# With another batch size step 1,000 means other examples: some would be seen twice in an epoch and
# others never. More steps change the rate of what is to come, and nothing that has been.
#
# </details>

# %% [markdown]
# **3.** You resume a run and its losses differ from the third digit on. Name three things that were
# not saved.
#
# <details><summary>Answer</summary>
#
# The optimizer's averages (their loss shows as a jump), the step's number (wrong rate, wrong batch),
# the place in the data or the random state, where they matter. Here the last two are computed from
# the step.
#
# </details>

# %% [markdown]
# ## References
#
# - Beyer et al. 2024, *PaliGemma: A versatile 3B VLM for transfer*
#   ([arXiv 2407.07726](https://arxiv.org/abs/2407.07726)), section 3.2 (stages) and figure 2.
# - Loshchilov and Hutter 2019, *Decoupled Weight Decay Regularization*
#   ([arXiv 1711.05101](https://arxiv.org/abs/1711.05101)).
# - PyTorch: `torch.optim.swa_utils`, weight averaging.
# - The training loop of big_vision, `trainers/proj/paligemma/train.py`.

# %% [markdown] tags=["navigation"]
# [← Contrastive learning](26_contrastive.ipynb) | [contents](00_overview.ipynb) | [Evaluation →](28_evaluation.ipynb)
