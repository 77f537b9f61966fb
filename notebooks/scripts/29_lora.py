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
# [← Evaluation](28_evaluation.ipynb) | [contents](00_overview.ipynb) | [Distributed training →](30_distributed.ipynb)

# %% [markdown]
# # 29 · LoRA: how little must change to learn something new?
#
# *45 minutes* · part V, Learning
#
# **What you will be able to do**
#
# - put a small correction beside a frozen weight, and say why it starts at 0;
# - teach the shipped model to read handwriting, and take the lesson out again;
# - merge, save and load adapters in the layout that peft reads;
# - count what training costs in memory at 3B, and find two bugs that raise no error.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("lora")

# %% [markdown]
# ## Setup
#
# From earlier lessons: the model and its checkpoint ([15](15_model.ipynb), [16](16_checkpoint.ipynb)),
# `Pipeline` ([24](24_inference.ipynb)), scenes ([25](25_scenes.ipynb)) and `train`
# ([27](27_training.ipynb)). The handwriting comes with scikit-learn. Cells that begin with `#| export`
# become [lora.py](../paligemma/lora.py).

# %%
#| export
"""LoRA: leave the weights alone and learn a small correction of low rank beside them."""

import json
import os
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from safetensors.torch import save_file
from torch import nn

from paligemma.checkpoint import internal_name
from paligemma.model import PaliGemma
from paligemma.support.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CheckpointError,
    find_folder,
    shorten,
)
from paligemma.support.lora_files import read_lora_config, read_lora_tensors
from paligemma.support.replacing import replacing


# %% tags=["setup"]
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from paligemma.checkpoint import load_model
from paligemma.inference import Pipeline
from paligemma.model import PaliGemmaConfig
from paligemma.plotting import show_heatmap, show_images
from paligemma.processor import Processor
from paligemma.scenes import ASSETS, SceneDataset
from paligemma.support.course import check, save_figure
from paligemma.support.drawing import COLOURS
from paligemma.training import TrainingConfig, train

TINY = ASSETS / "tiny"
torch.set_num_threads(1)
_ = torch.manual_seed(26)

# %% [markdown]
# ## The problem: one task, one more copy
#
# The shipped model knows emoji. Here are numbers that people wrote by hand, as small dark drawings on
# white paper. What does the model say?

# %%
model, processor = load_model(TINY), Processor.from_pretrained(TINY)


def ask(model, pictures, prompt):
    """The answers to one prompt about many pictures, greedily."""
    return Pipeline(model.eval(), processor).batch(pictures, prompt)


# %% tags=["hide-input"]
data = load_digits()
order = np.random.default_rng(0).permutation(len(data.target))
labels = [str(data.target[i]) for i in order]
SIZE, SIDE, EDGE = 112, 28, 42  # of the paper, of the digit (as large as an emoji), of its margin


def paper(values):
    """8 × 8 ink, 0 to 16, to uint8[112, 112, 3]: dark on white."""
    ink = Image.fromarray((values * 255 / 16).astype(np.uint8))
    sheet = Image.new("L", (SIZE, SIZE))
    sheet.paste(ink.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (EDGE, EDGE))
    return np.asarray(Image.eval(sheet, lambda v: 255 - v).convert("RGB"))


pictures = [paper(data.images[i]) for i in order]
TRAIN, TEST = slice(0, 1597), slice(1597, None)  # 200 digits are kept for the test
PROMPT = "answer en what digit?"
shown = pictures[TEST][:6]
titles = [f"{text[:14]!r}" for text in ask(model, shown, PROMPT)]
show_images(shown, titles, columns=6, height=1.5)

# %% [markdown]
# It has never seen a digit, and answers with what it knows. The usual remedy is to train all its weights a
# little more. That leaves a second model as large as the first, for every task one more; at 3B each copy
# has 6 GB. **LoRA** (low-rank adaptation) asks: does *every* number have to change?

# %% [markdown]
# ## By hand: a correction with a row and a column
#
# A frozen $2 \times 2$ weight $W$, and beside it a column $B$ and a row $A$. Their product $BA$ is a
# whole matrix made from 4 numbers. It is added: $W' = W + BA$. Every row of $BA$ is a multiple of the
# same row $A$: its **rank** is 1. (The paper's letters: here $B$ is a matrix, and not the batch.)

# %%
W = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
B, A = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, -1.0]])  # a column, a row
x = torch.tensor([1.0, 2.0])
print("BA =", (B @ A).tolist(), "| W + BA =", (W + B @ A).tolist())
print("A reads x as one number:", (A @ x).item(), "| B writes it:", (B @ (A @ x)).tolist())
print("together:", (W @ x + B @ (A @ x)).tolist(), "=", ((W + B @ A) @ x).tolist())

# %% [markdown]
# In a $2 \times 2$ matrix nothing is saved. At width $D$, rank $r$ costs $2Dr$ numbers and not $D^2$. With
# $D = 2048$ and $r = 8$ that is a share of $2r/D = 1/128$.
#
# ## As a loop, and vectorised
#
# For each output: what the frozen row says; then $A$ squeezes the input into $r$ numbers, and $B$ spreads
# them out.


# %%
def lora_loop(x, W, A, B):
    squeezed = [sum(A[k, i].item() * x[i].item() for i in range(len(x))) for k in range(len(A))]
    out = []
    for o in range(len(W)):
        frozen = sum(W[o, i].item() * x[i].item() for i in range(len(x)))
        out.append(frozen + sum(B[o, k].item() * squeezed[k] for k in range(len(A))))
    return torch.tensor(out)


# %%
W, A, B, x = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2), torch.randn(4, 5)
fast = x @ W.T + (x @ A.T) @ B.T  # never builds BA
assert torch.allclose(fast, torch.stack([lora_loop(row, W, A, B) for row in x]), atol=1e-5)
print("loop and matrices agree; rank of BA:", torch.linalg.matrix_rank(B @ A).item())

# %% [markdown]
# ## The plain layer
#
# An **adapter** is a layer of ten lines: the frozen one inside, two small ones beside it.


# %%
class PlainLoRA(nn.Module):
    def __init__(self, base_layer, rank):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


# %% [markdown]
# Put it in place of the text's query projections. Nothing changes yet, for $B = 0$.

# %%
sample = processor(pictures[:4], [PROMPT] * 4)
before = model(**sample).logits
model.requires_grad_(False)
for block in model.language_model.layers:
    block.self_attn.q_proj = PlainLoRA(block.self_attn.q_proj, rank=8)
assert torch.equal(model(**sample).logits, before)

# %% [markdown]
# ## Why $B$ starts at zero
#
# At the start the model must be what it was: $BA = 0$. That takes $B = 0$, or $A = 0$, or both. The
# gradients for $y = Wx + BAx$, with $g = \partial L/\partial y$:
#
# $$\frac{\partial L}{\partial B} = g\,(Ax)^\top \qquad \frac{\partial L}{\partial A} = B^\top g\,x^\top$$
#
# Each gradient contains the *other* matrix. Both zero: no gradient, ever.

# %%
x = torch.randn(64, 5)
y = x @ torch.randn(5, 2) @ torch.randn(2, 6)  # what BA should say
found = {}
for name, (a, b) in {"B = 0": (1, 0), "both 0": (0, 0), "both random": (1, 1)}.items():
    A, B = a * torch.randn(2, 5), b * torch.randn(6, 2)
    loss = (x @ A.requires_grad_().T @ B.requires_grad_().T - y).square().mean()
    found[name] = [loss.item(), *(g.norm().item() for g in torch.autograd.grad(loss, (A, B)))]
    print(f"{name:12} loss and gradients of A and B:", [round(value, 2) for value in found[name]])
assert found["B = 0"][1] == 0 < found["B = 0"][2] and found["both 0"][1:] == [0, 0]
assert found["both random"][0] > found["B = 0"][0]

# %% [markdown]
# With $B = 0$ the gradient of $A$ is zero, and that of $B$ is not: $B$ moves first, and from the second
# step on both learn. "Both random" begins with damage.
#
# ## What a real layer adds: $\alpha / r$
#
# Adam moves every entry of $B$ by about the learning rate, and at first all columns push the same way.
# More columns, a larger step. How far does one step move an output?

# %%
x, moved = torch.randn(500, 128), {}
for r in (1, 4, 16, 64):
    A = torch.empty(r, 128).uniform_(-1, 1) / 128**0.5
    moved[r] = 1e-3 * (x @ A.T).abs().sum(1).mean().item()  # ±1e-3 in each column of B
    print(f"rank {r:2}: {moved[r]:.4f}; times 16/r: {16 / r * moved[r]:.4f}")
assert 12 < moved[64] / moved[4] < 20  # 16 times the rank

# %% [markdown]
# Doubling the rank doubles the step. So the correction is multiplied by $\alpha / r$, and a learning rate
# found with one rank serves for another (rsLoRA divides by $\sqrt r$). And both matrices are float32 even
# where $W$ is bfloat16: small steps need digits.


# %%
#| export
class LoRALinear(nn.Module):
    """A linear layer that stays as it is, and a correction beside it: W·x + b + (α/r)·B·A·x.

    A and B are at least float32, whatever the type of the frozen weight.

    Args:
        base_layer: the layer; frozen here.
        rank, alpha: r and α; with `use_rslora` the scale is α/√r.
        dropout: share of the correction's inputs set to 0 in training.

    Raises:
        ValueError: a rank, alpha or dropout that cannot be.

    Source: Hu et al. 2021 (LoRA), section 4.1; Kalajdzievski 2023 (rsLoRA); `lora.Linear` in peft.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        use_rslora: bool = False,
    ):
        super().__init__()
        if type(rank) is not int or rank < 1:
            raise ValueError(f"rank is {shorten(rank)}; expected a whole number, 1 or more")
        if not 0 < alpha < float("inf") or not 0 <= dropout < 1:
            raise ValueError(f"alpha {alpha}, dropout {dropout}; expected alpha > 0 and 0 ≤ p < 1")
        weight = base_layer.weight
        where = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        self.rank, self.alpha, self.use_rslora = rank, alpha, use_rslora
        self.scale = alpha / (rank**0.5 if use_rslora else rank)
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False, **where)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False, **where)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=5**0.5)
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(dropout)
        self.train(base_layer.training)  # a new module is in training mode, whatever its model is

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`float[…, in]` → `float[…, out]`, in the type of the frozen layer's output."""
        out = self.base_layer(x)
        small = self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))  # […, r]
        return (out + self.scale * self.lora_B(small)).to(out.dtype)

    def delta(self) -> torch.Tensor:
        """The correction as one matrix, (α/r)·B·A: `float32[out, in]`."""
        return self.scale * (self.lora_B.weight @ self.lora_A.weight)


# %%
plain, x = PlainLoRA(nn.Linear(5, 6), rank=2), torch.randn(4, 5)
nn.init.normal_(plain.lora_B.weight)
layer = LoRALinear(plain.base_layer, rank=2, alpha=2)  # α/r = 1
layer.load_state_dict(plain.state_dict())
assert torch.allclose(layer(x), plain(x), atol=1e-6)

# %% [markdown]
# ## Which layers?
#
# `add_lora` freezes everything and replaces the layers whose names match. A target is the end of a
# name, with `*` for anything: `q_proj` means all query projections, `language_model.*.q_proj` only those
# of the text.


# %%
#| export
def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of a model, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters learn, and how many there are."""
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return learning, sum(p.numel() for p in model.parameters())


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer where another one of that name is."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """All linear layers by name. Raises ValueError: adapters there already, or quantised."""
    if "language_model.head" in dict(model.named_modules()):
        raise ValueError("the model is quantised; put adapters on the original weights")
    if found := adapters(model):
        raise ValueError(
            f"{next(iter(found))} and {len(found) - 1} more layers have adapters already; "
            "call merge_lora or remove_lora first"
        )
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


# %%
#| export
def add_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16,
    targets: Iterable[str] = ("q_proj", "v_proj"),
    dropout: float = 0.0,
    use_rslora: bool = False,
) -> list[str]:
    """Freeze a model and put an adapter beside some of its linear layers.

    Args:
        model: a PaliGemma, or one of its parts.
        rank, alpha, dropout, use_rslora: of every adapter, as in `LoRALinear`.
        targets: ends of layer names, `*` for anything: "q_proj", "language_model.*.q_proj".

    Returns:
        Names of the adapted layers; their output is what it was, for B is 0.

    Raises:
        ValueError: a target that no linear layer has, a rank that is not low, adapters already.
    """
    linears = linear_layers(model)
    targets = [targets] if isinstance(targets, str) else list(targets)
    found = {t: [name for name in linears if fnmatchcase(f".{name}", f"*.{t}")] for t in targets}
    missing = [t for t in targets if not found[t]] if targets else [""]
    if missing:
        ends = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
        raise ValueError(f"no linear layer is called {shorten(missing[0])}; this model has {ends}")
    names = [name for name in linears if any(name in group for group in found.values())]
    for name in names:
        shape = list(linears[name].weight.shape)
        if isinstance(rank, int) and rank > min(shape):
            raise ValueError(f"rank {rank} is not low for {name} {shape}; at most {min(shape)}")
    layers = {n: LoRALinear(linears[n], rank, alpha, dropout, use_rslora) for n in names}
    model.requires_grad_(False)
    for name, layer in layers.items():
        put(model, name, layer)
    return names


# %%
EVERYWHERE = ("vision_tower.*", "multi_modal_projector.linear", "language_model.*")
for targets in (["q_proj", "v_proj"], ["language_model.*.q_proj"], EVERYWHERE):
    model = load_model(TINY)
    names = add_lora(model, rank=8, targets=targets)
    learn, total = trainable_parameters(model)
    print(f"{len(names):2} layers, {learn:7,} parameters ({learn / total:.1%}):", *targets)

# %% [markdown]
# ## See it: the model learns to read
#
# Which words should it answer with? The head is the embedding, and stays frozen: adapters can only choose
# among words **as they are**. How alike are the vectors of ten words? (1: the same direction.)


# %%
def alike(texts):
    """Cosine between the embeddings of the last token of each text."""
    rows = [processor.tokenizer.encode(text)[-1] for text in texts]
    vectors = nn.functional.normalize(model.language_model.embed_tokens.weight[rows], dim=1)
    return (vectors @ vectors.T).detach()


# %%
SHAPES = "ball carrot duck butterfly boat snake snail umbrella octopus balloon".split()
SAY = [f" {name}" for name in SHAPES]  # with its space, as inside a caption, a name is one token
assert alike("6789").min() > 0.99 and alike(SAY).triu(1).max() < 0.6

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(8.5, 4), layout="constrained")
show_heatmap(alike("0123456789"), "digits", [*"0123456789"], [*"0123456789"], centre=0, ax=axes[0])
show_heatmap(alike(SAY), "kinds of emoji", SHAPES, SHAPES, centre=0, ax=axes[1])
for axis in axes:
    axis.images[0].set_clim(-1, 1)
fig.colorbar(axes[1].images[0], ax=axes, shrink=0.6, label="cosine", ticks=[-1, 0, 1])
save_figure(fig, "29_words")

# %% [markdown]
# The dark block: with five objects at most to count, the model never had to say 6, 7, 8 or 9. Training
# pushed all such vectors the same way, away from every answer, and now they are one. A frozen head cannot
# tell them apart.
#
# So we borrow words it knows, as memory artists do, who see a shape in each digit: 2 is a swimming duck,
# 4 a boat with a sail, 6 a snail, 9 a balloon on its string.

# %%
words = [SAY[int(label)] for label in labels]
pairs = zip(pictures[TRAIN], words[TRAIN])
lessons = [{"image": picture, "prefix": PROMPT, "suffix": word} for picture, word in pairs]

# %% tags=["hide-input"]
first = [labels[TEST].index(str(digit)) for digit in range(10)]
titles = [f"{digit}: {SHAPES[digit]}" for digit in range(10)]
crops = [pictures[TEST][i][38:-38, 38:-38] for i in first]
show_images(crops, titles, columns=5, height=1.3)

# %% [markdown]
# `train` leaves alone what is frozen. Two arms, the same pictures in the same order, the same number of
# steps: adapters everywhere, and all weights. Adapters like a larger learning rate.


# %%
def learn(model, learning_rate):
    config = TrainingConfig(
        steps=70, batch_size=16, learning_rate=learning_rate, warmup_steps=10, weight_decay=0.0
    )
    return train(model, lessons, config, processor)


# %%
def digits_right(model):
    """Share of the held-out digits that get the right name, and nothing else."""
    said = ask(model, pictures[TEST], PROMPT)
    return float(np.mean([a.strip() == b.strip() for a, b in zip(said, words[TEST])]))


# %% tags=["nbval-ignore-output"]
reader, whole = load_model(TINY), load_model(TINY)
add_lora(reader, rank=8, alpha=16, targets=EVERYWHERE)
losses = {"adapters": learn(reader, 5e-3), "all weights": learn(whole, 1e-3)}
right = {"adapters": digits_right(reader), "all weights": digits_right(whole)}
share = trainable_parameters(reader)[0] / trainable_parameters(whole)[1]
print({name: f"{value:.0%}" for name, value in right.items()}, f"with {share:.0%} of the weights")

# %%
assert right["adapters"] > 0.5 and right["all weights"] - right["adapters"] < 0.3
assert share < 1 / 12

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(6.5, 2.6), layout="constrained")
for (name, values), colour in zip(losses.items(), ("accent", "muted")):
    smooth = np.convolve(values, np.ones(10) / 10, mode="valid")
    ax.plot(np.arange(len(smooth)) + 10, smooth, color=COLOURS[colour], label=name)
ax.set(xlabel="step", ylabel="loss, mean of 10 steps", ylim=(0, None))
ax.legend()
save_figure(fig, "29_arms")

# %% tags=["hide-input"]
said = ask(reader, pictures[TEST][:20], PROMPT)
crops = [picture[38:-38, 38:-38] for picture in pictures[TEST][:20]]
digits = show_images(crops, said, columns=10, height=0.85)
for ax, text, true in zip(digits.axes, said, words[TEST]):
    text, true = text.strip(), true.strip()
    ax.set_title(text[:9], fontsize=9, color=COLOURS["ink" if text == true else "bad"])
save_figure(digits, "29_digits.png")

# %% [markdown]
# With less than a twelfth of the numbers the model reads most digits. Over the held-out ones above stands what it
# says (red: wrong).
#
# ### What it forgot
#
# And the captions? We ask for those of scenes with one or two objects: before, with all weights trained,
# and with the adapters.

# %%
world = SceneDataset(64, "test", tasks=("caption",), languages=("en",), objects=(1, 2))
world = [world[i] for i in range(len(world))]


# %%
def captions_right(model):
    said = ask(model, [item["image"] for item in world], "caption en")
    return float(np.mean([a == item["suffix"] for a, item in zip(said, world)]))


# %% tags=["nbval-ignore-output"]
kept = {"before": captions_right(load_model(TINY)), "all weights": captions_right(whole)}
kept["adapters on"] = captions_right(reader)
print({name: f"{value:.0%}" for name, value in kept.items()})
assert max(kept["adapters on"], kept["all weights"]) < kept["before"] - 0.2

# %% [markdown]
# Freezing is not remembering: with the adapters *on* the old task suffers, too, for each layer adds its
# correction to every input. The difference is that it can be undone.
#
# ## Take out, or merge
#
# **Remove**: the model is what it was. **Merge**: $W + \frac{\alpha}{r}BA$ becomes the new $W$, in float32
# and rounded once, and inference costs nothing extra.


# %%
#| export
def remove_lora(model: nn.Module) -> list[str]:
    """Take the adapters off; the weights stay frozen. Returns the names of their layers."""
    found = adapters(model)
    for name, layer in found.items():
        put(model, name, layer.base_layer)
    return list(found)


@torch.no_grad()
def merge_lora(model: nn.Module) -> list[str]:
    """Add each correction to its weight, in float32; take the adapters off. Returns the names."""
    for layer in adapters(model).values():
        base = layer.base_layer
        total = base.weight.to(layer.lora_A.weight.dtype) + layer.delta()
        base.weight = nn.Parameter(total.to(base.weight.dtype), requires_grad=False)
    return remove_lora(model)


# %% [markdown]
# ## Save
#
# Before we take them out, we save them. The file holds $A$ and $B$ of each layer and nothing else, in the
# layout of peft, the usual library, with names as transformers' model has them.


# %%
#| export
def stored_name(model: nn.Module, name: str) -> str:
    """A layer's name inside transformers' model of the same kind."""
    return f"model.{name}" if isinstance(model, PaliGemma) else name


def save_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the adapters alone, in the layout that peft reads, both files or none.

    Args:
        model: with adapters.
        path: directory, made when absent: `adapter_config.json`, `adapter_model.safetensors`.

    Raises:
        ValueError: no adapters, or adapters of different ranks, alphas, dropouts or scales.
    """
    found = adapters(model)
    kinds = {(m.rank, m.alpha, m.dropout.p, m.use_rslora) for m in found.values()}
    if len(kinds) != 1:
        raise ValueError(f"adapters of {len(kinds)} kinds; add_lora makes one kind, save after it")
    rank, alpha, dropout, use_rslora = kinds.pop()
    base = getattr(model, "config", None)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": use_rslora,
        "target_modules": sorted(stored_name(model, name) for name in found),
        "bias": "none",
        "inference_mode": True,
        "base_model_name_or_path": getattr(base, "name_or_path", None) or None,
        "task_type": None,
    }
    tensors = {}
    for name, layer in found.items():
        start = f"base_model.model.{stored_name(model, name)}"
        tensors[f"{start}.lora_A.weight"] = layer.lora_A.weight.detach().cpu().contiguous()
        tensors[f"{start}.lora_B.weight"] = layer.lora_B.weight.detach().cpu().contiguous()
    with replacing(path) as draft:
        save_file(tensors, draft / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        (draft / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


# %%
folder = Path(tempfile.mkdtemp())
save_adapter(reader, folder)
remove_lora(reader)
assert captions_right(reader) == kept["before"]

# %% [markdown]
# All captions are back. One base model, and a drawer of small files, one for each task.
#
# ## Load: strictly
#
# Reading is where silence does harm (see the bug below). So each tensor has to find its layer, each layer
# both its matrices, each matrix its shape. What peft's releases spell differently is in
# [support/lora_files.py](../paligemma/support/lora_files.py).


# %%
#| export
def load_adapter(model: nn.Module, path: str | os.PathLike, trainable: bool = False) -> list[str]:
    """Put saved adapters on a model, strictly: each tensor finds its place, each layer both.

    Args:
        model: without adapters; frozen here.
        path: directory that `save_adapter` or peft wrote, or its name on the hub.
        trainable: the adapters will go on learning.

    Returns:
        Names of the adapted layers.

    Raises:
        ValueError: files or tensors that do not fit; the model is then left as it was.
    """
    linears, path = linear_layers(model), find_folder(path)
    arguments, pairs = read_lora_config(path), {}
    for stored, pair in read_lora_tensors(path).items():
        name = internal_name(stored)
        if name not in linears:
            raise CheckpointError(f"{path}: {stored} belongs to no linear layer of this model")
        if name in pairs:
            raise CheckpointError(f"{path} holds {stored} twice, under different names")
        outputs, inputs = linears[name].weight.shape
        shapes = {which: list(tensor.shape) for which, tensor in sorted(pair.items())}
        expected = {"A": [arguments["rank"], inputs], "B": [outputs, arguments["rank"]]}
        if shapes != expected:
            other = f"{path}: adapter of {name} is {shapes}; expected {expected}"
            raise CheckpointError(f"{other}: is it of another base model?")
        pairs[name] = pair
    names = [name for name in linears if name in pairs]  # the file's order is alphabetical
    layers = {name: LoRALinear(linears[name], **arguments) for name in names}
    model.requires_grad_(False)
    for name, layer in layers.items():
        layer.lora_A.weight.data.copy_(pairs[name]["A"])
        layer.lora_B.weight.data.copy_(pairs[name]["B"])
        layer.lora_A.requires_grad_(trainable)
        layer.lora_B.requires_grad_(trainable)
        put(model, name, layer)
    return names


# %%
load_adapter(reader, folder)
size = (folder / ADAPTER_WEIGHTS).stat().st_size / (TINY / "model.safetensors").stat().st_size
print(f"the adapter's file has {size:.0%} of the model's: 4 bytes a number, there 2")
assert digits_right(reader) == right["adapters"] > 0.5

# %%
merged = load_model(TINY)
load_adapter(merged, folder)
merge_lora(merged)
with torch.inference_mode():
    gap = (merged(**sample).logits - reader(**sample).logits).abs().max()
assert gap < 1e-3 and not adapters(merged)

# %% [markdown]
# ## Against the reference
#
# The stored file holds a small layer with an adapter, and what peft makes of it. In
# [test_lora.py](../tests/test_lora.py) peft opens what we save of a whole PaliGemma, and the reverse.

# %% tags=["nbval-ignore-output"]
ref, holder = load_file("reference/lora.safetensors"), nn.Sequential(nn.Linear(24, 16))
add_lora(holder, rank=4, alpha=6, targets="0")
names = ("base_layer.weight", "base_layer.bias", "lora_A.weight", "lora_B.weight")
holder[0].load_state_dict({name: ref[key] for name, key in zip(names, ("weight", "bias", *"AB"))})
gaps = [(holder(ref["x"]) - ref["out"]).abs().max().item()]
merge_lora(holder)
gaps.append((holder[0].weight - ref["merged"]).abs().max().item())
print("largest differences, output and merged weight:", *(f"{gap:.0e}" for gap in gaps))
assert max(gaps) <= 1e-5

# %% [markdown]
# ## Is the change really of low rank?
#
# We have the model whose *every* weight was free. How much of its change $\Delta W$ would the best
# rank-$r$ matrix hold? The squares of the singular values tell. Compare with a *random* matrix: of that,
# too, the best few directions hold more than their share.


# %%
def held(matrices):
    """Mean share of each matrix's squares that its best approximations of rank 1 to 64 hold."""
    values = torch.stack([torch.linalg.svdvals(matrix)[:128].square() for matrix in matrices])
    return (values.cumsum(1) / values.sum(1, keepdim=True)).mean(0)[:64]


# %%
old, new = load_model(TINY).state_dict(), whole.state_dict()
keys = [key for key in old if key.endswith(("q_proj.weight", "fc1.weight"))]
changes = {"vision": [], "language": []}
for key in keys:
    changes["vision" if "vision" in key else "language"].append((new[key] - old[key]).detach())
changes["random"] = [torch.randn_like(change) for change in changes["vision"]]

# %% tags=["nbval-ignore-output"]
curves = {name: held(matrices) for name, matrices in changes.items()}
print("the best 8 of 128 directions hold", {n: f"{curve[7]:.0%}" for n, curve in curves.items()})
assert min(curves["vision"][7], curves["language"][7]) > 2 * curves["random"][7]

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(6.2, 2.8), layout="constrained")
for (name, curve), colour in zip(curves.items(), ("vision", "language", "muted")):
    ax.plot(range(1, 65), 100 * curve, color=COLOURS[colour], lw=2, label=name)
ax.axvline(8, color=COLOURS["muted"], lw=1, ls=":")
ax.set(xlabel="rank r", ylabel="share of the change, %", ylim=(0, 102), xlim=(1, 64))
ax.legend(loc="lower right")
save_figure(fig, "29_spectrum")

# %% [markdown]
# Eight directions carry more than twice what they would by chance. Nobody told the training to be of low
# rank; a small task needs only a small change.
#
# ## At full size
#
# What training costs in memory, without activations. A weight that learns takes 16 bytes in float32:
# itself, its gradient, two averages of the optimizer. A frozen one takes 2 (bfloat16).

# %%
with torch.device("meta"):
    full = PaliGemma(PaliGemmaConfig())
language = full.language_model
parts = {"vision": full.vision_tower, "projector": full.multi_modal_projector}
parts |= {"embedding": language.embed_tokens, "text blocks": language.layers}
counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
add_lora(full, rank=8, targets=EVERYWHERE)
extra = trainable_parameters(full)[0]
print(f"adapters: {extra:,} parameters, {extra * 4 / 1e6:.0f} MB in a file")

# %%
plans, memory = {"all weights": list(parts), "vision frozen": list(parts)[1:], "LoRA": []}, {}
for plan, learning in plans.items():
    weights = sum(count * (16 if name in learning else 2) for name, count in counts.items())
    memory[plan] = (weights + 16 * extra * plan.startswith("LoRA")) / 1e9
    print(f"{plan:13} {memory[plan]:5.1f} GB")
assert memory["vision frozen"] > 0.8 * memory["all weights"] > 6 * memory["LoRA"]

# %% tags=["hide-input"]
fig, (left, bars) = plt.subplots(
    1, 2, figsize=(9.5, 2.5), width_ratios=(3, 2), sharey=True, layout="constrained"
)
for row, (plan, learning) in enumerate(plans.items()):
    for column, name in enumerate(parts):
        learns = name in learning
        shape = {
            "facecolor": COLOURS["accent" if learns else "muted"],
            "alpha": 1 if learns else 0.25,
        }
        left.add_patch(plt.Rectangle((column + 0.04, row - 0.36), 0.92, 0.72, **shape))
        if plan.startswith("LoRA") and name != "embedding":
            strip = (column + 0.86, row - 0.36), 0.1, 0.72
            left.add_patch(plt.Rectangle(*strip, facecolor=COLOURS["accent"]))
        text, ink = ("learns", "white") if learns else ("frozen", COLOURS["ink"])
        left.text(column + 0.46, row, text, ha="center", va="center", fontsize=9, color=ink)
    bars.barh(row, memory[plan], color=COLOURS["accent"], height=0.7)
    bars.text(memory[plan] + 1, row, f"{memory[plan]:.1f}", va="center", fontsize=9)
heads = [f"{name}\n{count / 1e6:,.0f} M" for name, count in counts.items()]
left.set(xlim=(0, 4), ylim=(2.6, -0.6), yticks=range(3), yticklabels=list(plans))
left.set_xticks([0.5, 1.5, 2.5, 3.5], heads, fontsize=9)
left.xaxis.tick_top()
left.tick_params(length=0)
left.spines[:].set_visible(False)
bars.set(xlabel="GB to train", xlim=(0, 60))
save_figure(fig, "29_freeze")

# %% [markdown]
# A coloured strip is an adapter. Freezing the tower hardly helps: the text model is the large part. With
# LoRA the 3B model trains on one consumer card (activations come on top; they shrink with the batch).
#
# ## A bug people really make: loaded, and nothing happened
#
# A colleague opens the saved adapter with `load_state_dict`. It complained about names, so:
# `strict=False`. No error. The model answers.

# %% tags=["nbval-ignore-output"]
colleague, stored = load_model(TINY), load_file(folder / ADAPTER_WEIGHTS)
add_lora(colleague, rank=8, alpha=16, targets=EVERYWHERE)
result = colleague.load_state_dict(stored, strict=False)
share = digits_right(colleague)
print(f"colleague: {share:.0%} of digits right; load_adapter: {right['adapters']:.0%}")
assert share < 0.05

# %% [markdown]
# As if nothing had been learned, and exactly so: every name in the file begins with `base_model.model.`,
# none fitted, each $B$ is still 0. What makes LoRA safe to start hides that it was never loaded. The check:

# %%
print(f"{len(result.unexpected_keys)} of {len(stored)} names found no place")
assert not any(layer.lora_B.weight.any() for layer in adapters(colleague).values())
assert len(result.unexpected_keys) == len(stored)

# %% [markdown]
# A second one, as silent: someone merges, saves, and later loads the adapter *on top of the merged* model.
# Every correction counts twice.

# %% tags=["nbval-ignore-output"]
load_adapter(merged, folder)
twice = digits_right(merged)
print(f"once: {right['adapters']:.0%} of digits right; twice: {twice:.0%}")
assert twice < right["adapters"] - 0.1

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): how many parameters?
#
# Rank 8 on `q_proj` and `v_proj` of the 3B model's *text* part: 18 layers of width 2048, 8 query
# heads and one key/value head of width 256. How many parameters learn?

# %% tags=["exercise"]
answer_1 = None  # a whole number


# %% tags=["check"]
def test_1(value):
    assert isinstance(value, int), "give a whole number"
    with torch.device("meta"):
        text = PaliGemma(PaliGemmaConfig()).language_model
    add_lora(text, rank=8, targets=("q_proj", "v_proj"))
    right = trainable_parameters(text)[0]
    assert value != 18 * 8 * 4 * 2048, "v_proj has one head of width 256 on its output"
    assert value != right // 18, "that is one layer"
    assert value not in (18 * 8 * (2048 + 2048), 18 * 8 * (2048 + 256)), "half of them are missing"
    assert value not in (18 * 2048 * (2048 + 256),), "the frozen weights do not learn"
    assert value == right, "count the numbers of A and B, for both projections, in all layers"


check(test_1, answer_1)

# %% [markdown]
# <details><summary>Hint</summary>
#
# $A$ is $r \times \text{inputs}$, $B$ is $\text{outputs} \times r$. How many outputs has each projection?
#
# </details>

# %% tags=["solution"]
answer_1 = 18 * (8 * (2048 + 2048) + 8 * (2048 + 256))  # q_proj has 8 · 256 outputs, v_proj 256
check(test_1, answer_1)

# %% [markdown]
# ### Exercise 2 (write): an adapter for a table
#
# Write LoRA beside an `nn.Embedding` of V rows: row $i$ gets the correction $\frac{\alpha}{r}BA_i$, with
# $A_i$ the column $i$ of $A$. As always: the table frozen, and at the start nothing changes.


# %% tags=["exercise"]
class LoRAEmbedding(nn.Module):
    """Parameters lora_A: float[rank, V] and lora_B: float[D, rank]."""

    def __init__(self, embedding, rank, alpha):
        super().__init__()
        # your code

    def forward(self, ids):
        """int64[B, L] → float[B, L, D]."""
        return None  # your code


# %% tags=["check"]
def test_2(cls):
    torch.manual_seed(2)
    table, ids = nn.Embedding(7, 4), torch.tensor([[1, 5, 5], [0, 6, 2]])
    layer = cls(table, rank=2, alpha=6)
    shapes = [list(getattr(layer, name, torch.zeros(0)).shape) for name in ("lora_A", "lora_B")]
    assert shapes == [[2, 7], [4, 2]], (
        f"lora_A and lora_B have the shapes {shapes[0]} and {shapes[1]}"
    )
    names = [n for n, p in layer.named_parameters() if p.requires_grad]
    assert {"lora_A", "lora_B"} <= set(names), "an optimizer would not find A and B: nn.Parameter"
    assert len(names) == 2, f"more than A and B learns: {names}"
    out = layer(ids)
    assert isinstance(out, torch.Tensor) and out.shape == (2, 3, 4), "the output is float[B, L, D]"
    assert torch.allclose(out, table(ids)), "at the start the output must be the table's"
    assert out.requires_grad, "the output does not depend on A and B"
    out.sum().backward()
    moves = [p.grad is not None and bool(p.grad.any()) for p in (layer.lora_A, layer.lora_B)]
    assert any(moves), "neither A nor B has a gradient: it will never learn"
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
        change = layer(ids) - table(ids)
        full = (layer.lora_B @ layer.lora_A).T[ids]
    assert change.any(), "A and B have no effect"
    assert not torch.allclose(change, full, atol=1e-5), "the correction is not scaled"
    assert not torch.allclose(change, 6 * full, atol=1e-4), "α is not divided by the rank"
    assert torch.allclose(change, 3 * full, atol=1e-4), "the correction is another than (α/r)·B·A"


check(test_2, LoRAEmbedding)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `self.lora_A.T[ids]` is float[B, L, rank], what $A$ says of each token.
#
# </details>


# %% tags=["solution"]
class LoRAEmbedding(nn.Module):
    """Parameters lora_A: float[rank, V] and lora_B: float[D, rank]."""

    def __init__(self, embedding, rank, alpha):
        super().__init__()
        rows, width = embedding.weight.shape
        self.embedding, self.scale = embedding.requires_grad_(False), alpha / rank
        self.lora_A = nn.Parameter(torch.randn(rank, rows))  # random, so that B has a gradient
        self.lora_B = nn.Parameter(torch.zeros(width, rank))  # zero, so that nothing changes yet

    def forward(self, ids):
        """int64[B, L] → float[B, L, D]."""
        return self.embedding(ids) + self.scale * self.lora_A.T[ids] @ self.lora_B.T


check(test_2, LoRAEmbedding)

# %% [markdown]
# ### Exercise 3 (extend): squeeze a trained change
#
# All weights were trained, and now you want a small file. Turn a change $\Delta W$ into $A$ and $B$ of
# rank $r$ with $\alpha = r$, so that $BA$ is as near to $\Delta W$ as any rank-$r$ matrix can be.


# %% tags=["exercise"]
def squeeze(delta, rank):
    return None, None  # A: float32[rank, in], B: float32[out, rank]


# %% tags=["check"]
def test_3(squeeze):
    torch.manual_seed(3)
    for shape, rank in (((6, 4), 2), ((5, 9), 3)):
        delta = torch.randn(shape)
        found = squeeze(delta, rank)
        assert isinstance(found, tuple) and len(found) == 2, "return A and B"
        A, B = found
        assert isinstance(A, torch.Tensor) and isinstance(B, torch.Tensor), "return A and B"
        sizes = [rank, shape[1]], [shape[0], rank]
        assert (list(A.shape), list(B.shape)) == sizes, (
            f"A is {list(A.shape)} and B {list(B.shape)}; they should be {sizes[0]} and {sizes[1]}"
        )
        rest, least = (delta - B @ A).norm(), torch.linalg.svdvals(delta)[rank:].norm()
        assert rest < least + 1e-4, f"{rest:.2f} is left over; {least:.2f} would be possible"


check(test_3, squeeze)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.linalg.svd(delta, full_matrices=False)` gives `U, S, Vh`, with the largest values of `S` first.
#
# </details>


# %% tags=["solution"]
def squeeze(delta, rank):
    # The best matrix of rank r keeps the r largest singular values (Eckart and Young).
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return Vh[:rank], U[:, :rank] * S[:rank]


check(test_3, squeeze)

# %% [markdown]
# ## Summary
#
# - A frozen $W$ and a correction $\frac{\alpha}{r}BA$ beside it: a few per cent of the numbers learn.
# - $B = 0$: the model starts as it was, $B$ learns first, $A$ from the second step on.
# - A frozen head says only words that it can already tell apart.
# - Merge once, in float32; load strictly: an adapter that was not loaded does nothing, silently.

# %% [markdown]
# ## Quiz
#
# **1.** Someone starts with $A = 0$ and $B$ random. Does it learn?
#
# <details><summary>Answer</summary>
#
# Yes. $BA = 0$, too, and now $A$ gets the first gradient, $B^\top g\,x^\top$: the mirror image.
#
# </details>

# %% [markdown]
# **2.** Is a step with LoRA much faster than one with all weights?
#
# <details><summary>Answer</summary>
#
# Not much. The forward pass is the same, and gradients still flow back through all frozen layers to reach
# the early adapters. Only the gradients of frozen weights are saved, and the optimizer's work. The gain is
# memory.
#
# </details>

# %% [markdown]
# **3.** Why does `add_lora` put no adapter on the embedding, which is also the head?
#
# <details><summary>Answer</summary>
#
# One table does two jobs. An adapter on the head alone would untie them: after merging, input and output
# need different tables, and a checkpoint with a tied head has room for one.
#
# </details>

# %% [markdown]
# ## References
#
# - Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models*
#   ([arXiv 2106.09685](https://arxiv.org/abs/2106.09685)), section 4.
# - Beyer et al. 2024, *PaliGemma* ([arXiv 2407.07726](https://arxiv.org/abs/2407.07726)), section 3.
# - Dettmers et al. 2023, *QLoRA* ([arXiv 2305.14314](https://arxiv.org/abs/2305.14314)): adapters on all
#   linear layers, over a 4-bit model.
# - peft, `tuners/lora/layer.py`; scikit-learn's digits: Alpaydin and Kaynak 1998, UCI repository.

# %% [markdown] tags=["navigation"]
# [← Evaluation](28_evaluation.ipynb) | [contents](00_overview.ipynb) | [Distributed training →](30_distributed.ipynb)
