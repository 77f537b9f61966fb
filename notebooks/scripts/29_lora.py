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
# [← Evaluation](28_evaluation.ipynb) | [contents](00_overview.ipynb)

# %% [markdown]
# # 29 · LoRA: how little must change to learn something new?
#
# *60 minutes* · part V, Learning
#
# **What you will be able to do**
#
# - put a small correction beside a frozen weight, and say why it starts at exactly 0;
# - teach the shipped model to read handwriting, and take the lesson out again;
# - merge, save and load adapters in the layout that peft reads;
# - count what training costs in memory at 3B, and find three adapter bugs that raise no error.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("lora")

# %% [markdown]
# ## Setup
#
# From earlier lessons: the model and its checkpoint ([15](15_model.ipynb), [16](16_checkpoint.ipynb)),
# generation ([18](18_generation.ipynb)) and scenes ([25](25_scenes.ipynb)). The handwriting comes with scikit-learn.
# Cells that begin with `#| export` become [lora.py](../paligemma/lora.py).

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
    replacing,
    shorten,
)
from paligemma.support.lora_files import read_lora_config, read_lora_tensors


# %% tags=["setup"]
import math
import tempfile
import time
from importlib import resources
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from paligemma.checkpoint import load_model
from paligemma.generation import generate
from paligemma.model import PaliGemmaConfig
from paligemma.plotting import show_heatmap, show_images
from paligemma.support.course import check, save_figure
from paligemma.support.drawing import COLOURS
from paligemma.processor import Processor
from paligemma.scenes import SceneDataset

TINY = resources.files("paligemma") / "assets" / "tiny"
torch.manual_seed(26)
torch.set_printoptions(precision=3, sci_mode=False)

# %% [markdown]
# ## The problem: one task, one more copy
#
# The shipped model knows emoji. Here are numbers that people wrote by hand. Each is 8 × 8 grey values;
# we enlarge it to the size of an emoji and put it on white paper. What does the model say?

# %%
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

# %%
model, processor = load_model(TINY), Processor.from_pretrained(TINY)


def ask(model, pictures, prompt, size=50):
    """The answers to one prompt about many pictures, greedily."""
    answers = []
    for i in range(0, len(pictures), size):
        some = pictures[i : i + size]
        batch = processor(some, [prompt] * len(some))
        ids = generate(model, batch["input_ids"], batch["pixel_values"], max_new_tokens=16)
        answers += [processor.decode(row) for row in ids]
    return answers


shown = pictures[TEST][:6]
before = ask(model, shown, PROMPT)
titles = [f"{text[:14]!r}" for text in before]
show_images(shown, titles, columns=6, height=1.5)

# %% [markdown]
# It has never seen a digit, and answers with what it knows. The usual remedy is to train all
# its weights a little more. That works, and leaves a second model as large as the first, for every
# task one more. At 3B each copy has 6 GB, and training it takes far more memory than running it.
#
# LoRA (low-rank adaptation) asks: does *every* number have to change?

# %% [markdown]
# ## By hand: a correction with a row and a column
#
# A frozen $2 \times 2$ weight $W$, and beside it a column $B$ and a row $A$. Their product $BA$ is a
# whole matrix made from 4 numbers. It is added to $W$:
#
# $$W' = W + BA$$
#
# Every row of $BA$ is a multiple of the same row $A$: its **rank** is 1.

# %%
W = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
B = torch.tensor([[1.0], [2.0]])  # a column
A = torch.tensor([[3.0, -1.0]])  # a row
x = torch.tensor([1.0, 2.0])
print("BA =", (B @ A).tolist(), "| W + BA =", (W + B @ A).tolist())
print("A reads x as one number:", (A @ x).item(), "| B writes it:", (B @ (A @ x)).tolist())
print("together:", (W @ x + B @ (A @ x)).tolist(), "=", ((W + B @ A) @ x).tolist())

# %% [markdown]
# In a $2 \times 2$ matrix nothing is saved. With width $D$, rank $r$ costs $2Dr$ numbers instead of
# $D^2$:

# %%
for width in (2, 128, 2048):
    counts = [f"rank {r}: {2 * width * r / width**2:8.2%}" for r in (1, 8, 64) if r <= width]
    print(f"width {width:4}: {width**2:9,} numbers |", ", ".join(counts))

# %% [markdown]
# ## As a loop
#
# One output after the other. For each, what the frozen row says; then $A$ squeezes the input into $r$
# numbers, and $B$ spreads them out.


# %%
def lora_loop(x, W, A, B, scale):
    squeezed = [sum(A[k, i].item() * x[i].item() for i in range(len(x))) for k in range(len(A))]
    out = []
    for o in range(len(W)):
        frozen = sum(W[o, i].item() * x[i].item() for i in range(len(x)))
        out.append(frozen + scale * sum(B[o, k].item() * squeezed[k] for k in range(len(A))))
    return torch.tensor(out)


print(lora_loop(x, W, A, B, scale=1.0).tolist())

# %% [markdown]
# ## Vectorised: never build $BA$
#
# $B(Ax)$ and $(BA)x$ are equal, and the brackets decide what it costs. The left one multiplies
# with $2Dr$ numbers, the right one first builds $D^2$.

# %%
W, A, B = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2)
x = torch.randn(4, 5)
fast = x @ W.T + 0.5 * (x @ A.T) @ B.T
slow = torch.stack([lora_loop(row, W, A, B, 0.5) for row in x])
assert torch.allclose(fast, slow, atol=1e-5)
print("loop and matrices agree; rank of BA:", torch.linalg.matrix_rank(B @ A).item())

# %% [markdown]
# ## Why $B$ starts at zero
#
# At the start the model must be what it was. So $BA = 0$. There are three ways: $B = 0$, $A = 0$, or
# both. Look at the gradients for $y = Wx + BAx$, with $g = \partial L/\partial y$:
#
# $$\frac{\partial L}{\partial B} = g\,(Ax)^\top \qquad \frac{\partial L}{\partial A} = B^\top g\,x^\top$$
#
# Each gradient contains the *other* matrix. Both zero: no gradient, for ever.

# %%
STARTS = {"B = 0": (1, 0), "both 0": (0, 0), "both random": (1, 1)}
target = torch.randn(6, 2) @ torch.randn(2, 5)  # what W should have been told, of rank 2
data_x = torch.randn(64, 5)
curves = {}
for name, (a, b) in STARTS.items():
    torch.manual_seed(0)
    A, B = a * torch.randn(2, 5), b * torch.randn(6, 2)
    A.requires_grad_(), B.requires_grad_()
    curves[name] = []
    for step in range(80):
        loss = (data_x @ A.T @ B.T - data_x @ target.T).square().mean()
        gradients = torch.autograd.grad(loss, (A, B))
        if step == 0:
            sizes = [f"{gradient.norm():.2f}" for gradient in gradients]
            print(f"{name:12} first loss {loss:5.1f}, gradients of A and B:", *sizes)
        A, B = ((m - 0.1 * g).detach().requires_grad_() for m, g in zip((A, B), gradients))
        curves[name].append(loss.item())

# %%
fig, ax = plt.subplots(figsize=(5.4, 2.6), layout="constrained")
for (name, curve), colour in zip(curves.items(), ("good", "bad", "muted")):
    ax.plot(curve, color=COLOURS[colour], lw=2)
    side = {"B = 0": "bottom", "both random": "top"}.get(name, "center")
    ax.text(81, curve[-1], name, color=COLOURS[colour], va=side)
ax.set(xlabel="step", ylabel="loss", xlim=(0, 104), ylim=(-1, 13), title="three starts, one task")
save_figure(fig, "29_starts")

# %% [markdown]
# With $B = 0$ the first gradient of $A$ is **zero**, and that of $B$ is not: $B$ moves first, and from
# the second step on both learn. "Both random" learns too, but begins with damage: its first loss is
# higher than that of the untouched model.

# %% [markdown]
# ## Why $\alpha / r$
#
# Adam moves every entry of $B$ by about the learning rate $\eta$, whatever the rank, and at first all
# columns push the same way: each output moves by $\eta \sum_k |(Ax)_k|$. More columns, a larger step.
# So the correction is multiplied by $\alpha / r$, and a learning rate found with one rank serves for
# another. How far does one step move an output?

# %%
x = torch.randn(500, 128)
print("rank   without scale   with 16/r")
for r in (1, 4, 16, 64):
    A = torch.empty(r, 128).uniform_(-1, 1) / 128**0.5
    moved = 1e-3 * (x @ A.T).abs().sum(1).mean().item()
    print(f"{r:4}   {moved:13.4f}   {16 / r * moved:9.4f}")

# %% [markdown]
# Doubling the rank doubles the step, and $\alpha / r$ takes it back. $\alpha$ is often set to twice the
# usual rank and then left alone. (A variant, rsLoRA, divides by $\sqrt r$ instead: once training is under way the
# columns no longer push the same way, and their sum grows like $\sqrt r$.)
#
# ## The module
#
# One layer first. It *keeps* the frozen layer inside, so it can be taken out again. $A$ starts as
# every linear layer of PyTorch does, $B$ at zero, and both are float32 even where $W$ is bfloat16:
# small steps need digits.


# %%
#| export
class LoRALinear(nn.Module):
    """A linear layer that stays as it is, and a correction beside it: W·x + b + (α/r)·B·A·x.

    A and B are at least float32, whatever the type of the frozen weight.

    Args:
        base_layer: the layer; frozen here.
        rank: r, rows of A and columns of B.
        alpha: α; the correction is scaled by α/r.
        dropout: share of the correction's inputs set to 0 in training.
        use_rslora: the scale is α/√r instead.

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
        small = self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))  # (…, r)
        return (out + self.scale * self.lora_B(small)).to(out.dtype)

    def delta(self) -> torch.Tensor:
        """The correction as one matrix, (α/r)·B·A: `float32[out, in]`."""
        return self.scale * (self.lora_B.weight @ self.lora_A.weight)


# %%
base = nn.Linear(5, 6)
layer = LoRALinear(base, rank=2, alpha=1)
x = torch.randn(4, 5)
assert torch.equal(layer(x), base(x))  # B = 0
nn.init.normal_(layer.lora_B.weight)
W, A, B = base.weight, layer.lora_A.weight, layer.lora_B.weight
slow = torch.stack([lora_loop(row, W, A, B, 1 / 2) for row in x]) + base.bias
assert torch.allclose(layer(x), slow, atol=1e-5)
print("equal to the loop; shapes of A and B:", list(A.shape), list(B.shape))

# %% [markdown]
# ## Which layers?
#
# `add_lora` freezes everything and replaces the layers whose names match. A target is the end of a
# name, with `*` for anything: `q_proj` means all query projections, those of the vision tower too;
# `language_model.*.q_proj` only those of the text.
#
# The embedding is no linear layer and gets none, for a reason that comes at the end.


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
    """All linear layers by name.

    Raises:
        ValueError: the model has adapters already, or is quantised.
    """
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
        rank: r of every adapter.
        alpha: α; corrections are scaled by α/r, with `use_rslora` by α/√r.
        targets: ends of layer names, `*` for anything: "q_proj", "language_model.*.q_proj",
            "vision_tower.*".
        dropout: share of an adapter's inputs set to 0 in training.

    Returns:
        Names of the adapted layers; their output is what it was, for B is 0.

    Raises:
        ValueError: a target that no linear layer has, a rank that is not low, adapters there
            already. The model is then left as it was.
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
    print(
        f"{len(names):2} layers, {learn:7,} of {total:,} parameters ({learn / total:.1%}):",
        *targets,
    )
try:
    add_lora(load_model(TINY), targets=["q_proj", "query"])
except ValueError as error:
    print("ValueError:", str(error).split(";")[0])

# %% [markdown]
# ## Merge, or take out
#
# After training there are two ways. **Remove**: the model is what it was, to the last bit. **Merge**:
# $W + \frac{\alpha}{r}BA$ becomes the new $W$, and inference costs nothing extra. The sum is made in
# float32 and rounded once.


# %%
#| export
def remove_lora(model: nn.Module) -> list[str]:
    """Take the adapters off: the model answers as before them, to the last bit.

    Returns:
        Names of the layers. Their weights stay frozen (`model.requires_grad_()` frees them).
    """
    found = adapters(model)
    for name, layer in found.items():
        put(model, name, layer.base_layer)
    return list(found)


@torch.no_grad()
def merge_lora(model: nn.Module) -> list[str]:
    """Add each correction to its weight, in float32, and take the adapters off.

    Returns:
        Names of the layers, plain `nn.Linear` again and as fast as before. They stay frozen.
    """
    for layer in adapters(model).values():
        base = layer.base_layer
        total = base.weight.to(layer.lora_A.weight.dtype) + layer.delta()
        base.weight = nn.Parameter(total.to(base.weight.dtype), requires_grad=False)
    return remove_lora(model)


# %%
sample = processor(pictures[:4], [PROMPT] * 4)
inputs = {k: sample[k] for k in ("input_ids", "pixel_values", "attention_mask")}
model = load_model(TINY)
with torch.inference_mode():
    plain = model(**inputs).logits
    add_lora(model, rank=8, targets=EVERYWHERE)
    for layer in adapters(model).values():
        nn.init.normal_(layer.lora_B.weight, std=0.02)  # as if it had learnt something
    adapted = model(**inputs).logits
    merge_lora(model)
    gap = (model(**inputs).logits - adapted).abs().max().item()
print(f"the adapters move the logits by up to {(adapted - plain).abs().max():.1f}")
print("merged and unmerged agree to 1e-4:", gap < 1e-4, "| adapters left:", len(adapters(model)))

# %% [markdown]
# ## Save: the layout of peft
#
# The file holds $A$ and $B$ of each layer and nothing else. peft, the usual library, keeps two files:
# `adapter_config.json` and `adapter_model.safetensors`, with names as transformers' model has them.
# We write the same.


# %%
#| export
def stored_name(model: nn.Module, name: str) -> str:
    """A layer's name inside transformers' model of the same kind."""
    return f"model.{name}" if isinstance(model, PaliGemma) else name


def save_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the adapters alone, in the layout that peft reads, each file whole or not at all.

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
        save_file(tensors, draft(ADAPTER_WEIGHTS), metadata={"format": "pt"})
        draft(ADAPTER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


# %% [markdown]
# ## Load: strictly
#
# Reading is where silence does harm (see the bug below), so each tensor has to find its layer, each
# layer both its matrices, each matrix its shape. What peft's releases spell differently, and the methods that
# only look like LoRA (DoRA, PiSSA; refused by name), are in [support/lora_files.py](../paligemma/support/lora_files.py).


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
        ValueError: files that are missing, broken or of another method, a tensor without its
            layer or of another shape, adapters there already. The model is then left as it was.
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
            raise CheckpointError(
                f"{path}: adapter of {name} is {shapes}; expected {expected}: is it of another "
                "base model?"
            )
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


# %% [markdown]
# ## Against the reference
#
# The stored file holds a small layer with an adapter, and what peft makes of it: its output, and
# its weight after `merge_and_unload`. [test_lora.py](../tests/test_lora.py) computes it. There a whole
# random PaliGemma of transformers is tested too, in both directions: peft opens what we save, and we
# open what peft saves, with logits equal to 1e-5.

# %% tags=["nbval-ignore-output"]
ref = load_file("reference/lora.safetensors")
holder = nn.Sequential(nn.Linear(24, 16))
holder[0].load_state_dict({"weight": ref["weight"], "bias": ref["bias"]})
add_lora(holder, rank=4, alpha=6, targets="0")
holder[0].lora_A.weight.data.copy_(ref["A"])
holder[0].lora_B.weight.data.copy_(ref["B"])
gaps = [(holder(ref["x"]) - ref["out"]).abs().max().item()]
merge_lora(holder)
gaps.append((holder[0].weight - ref["merged"]).abs().max().item())
print("largest differences, output and merged weight:", *(f"{gap:.1e}" for gap in gaps))
assert max(gaps) <= 1e-5

# %% [markdown]
# ## See it: the model learns to read
#
# Now for real. Which words should it answer with? The head is the embedding, and both stay frozen: an
# adapter can only choose among words **as they are**. So look at them first. How alike are the
# vectors of ten words? (1: the same direction.)


# %%
def alike(texts):
    """Cosine between the embeddings of the last token of each text."""
    rows = [processor.tokenizer.encode(text)[-1] for text in texts]
    vectors = nn.functional.normalize(
        model.language_model.embed_tokens.weight[rows].detach(), dim=1
    )
    return vectors @ vectors.T


SHAPES = "ball carrot duck butterfly boat snake snail umbrella octopus balloon".split()
SAY = [f" {name}" for name in SHAPES]  # with its space, as inside a caption, a name is one token
fig, axes = plt.subplots(1, 2, figsize=(7, 3.3), layout="constrained")
show_heatmap(alike("0123456789"), "digits", list("0123456789"), list("0123456789"), ax=axes[0])
show_heatmap(alike(SAY), "kinds of emoji", SHAPES, SHAPES, ax=axes[1])
axes[1].tick_params(axis="x", rotation=90)
save_figure(fig, "29_words")

# %% [markdown]
# The dark block: digits that the shipped model never had to say. Training pushed all such vectors the
# same way, away from every answer, and now they are nearly one vector. A frozen head cannot tell
# them apart.
#
# So we borrow words it knows, as memory artists do, who see a shape in each digit: 2 is a
# swimming duck, 4 a boat with a sail, 6 a snail, 9 a balloon on its string.

# %%
words = [SAY[int(label)] for label in labels]
first = [labels[TEST].index(str(digit)) for digit in range(10)]
titles = [f"{digit}: {SHAPES[digit]}" for digit in range(10)]
crops = [pictures[TEST][i][38:-38, 38:-38] for i in first]
show_images(crops, titles, columns=5, height=1.3)

# %% [markdown]
# The training loop is the usual one: loss, gradients, step. The optimizer gets only what is not frozen. Adapters
# like a larger learning rate than whole weights.


# %%
def learn(model, steps, lr, size=16):
    """Teach the digits of the training part; returns the losses."""
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    losses = []
    for step in range(steps):
        rate = min(1.0, (step + 1) / 10) * math.cos(step / steps * math.pi / 2) ** 2
        optimizer.param_groups[0]["lr"] = lr * rate
        chosen = rng.integers(0, TRAIN.stop, size)
        batch = processor(
            [pictures[i] for i in chosen], [PROMPT] * size, [words[i] for i in chosen]
        )
        loss = model(**batch, logits_to_keep=3).loss
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def digits_right(model, count=200):
    """Percent of the first held-out digits that get the right name, and nothing else."""
    said = ask(model, pictures[TEST][:count], PROMPT)
    return 100 * float(np.mean([a.strip() == b.strip() for a, b in zip(said, words[TEST])]))


# %% [markdown]
# Four ways to learn the same task, with the same pictures in the same order for the same number of steps: adapters
# in the text only, in the vision tower and projector only, everywhere, and for comparison all weights.

# %% tags=["nbval-ignore-output"]
ARMS = {
    "adapters, text": (("language_model.*",), 6e-3),
    "adapters, vision": (("vision_tower.*", "multi_modal_projector.linear"), 6e-3),
    "adapters, everywhere": (EVERYWHERE, 6e-3),
    "all weights": ((), 1e-3),
}
STEPS = 45
runs, right = {}, {}
for name, (targets, lr) in ARMS.items():
    arm = load_model(TINY)
    torch.manual_seed(0)
    if targets:
        add_lora(arm, rank=8, alpha=16, targets=targets)
    start = time.perf_counter()
    runs[name] = arm, learn(arm, STEPS, lr)
    seconds, right[name] = time.perf_counter() - start, digits_right(arm)
    count = trainable_parameters(arm)[0]
    print(f"{name:21} {count:9,} learn, {seconds:3.0f} s: {right[name]:.1f} % right")
reader = runs["adapters, everywhere"][0]
most = max(right["adapters, text"], right["adapters, vision"])
assert right["adapters, everywhere"] > most
assert abs(right["all weights"] - right["adapters, everywhere"]) < 20
share = trainable_parameters(reader)[0] / trainable_parameters(runs["all weights"][0])[1]
assert 1 / 14 < share < 1 / 10

# %% tags=["hide-input"]
COLOUR = dict(zip(ARMS, ("language", "vision", "good", "muted")))
fig, (left, bars) = plt.subplots(1, 2, figsize=(7.4, 2.9), layout="constrained")
for row, (name, (arm, losses)) in enumerate(runs.items()):
    smooth = np.convolve(losses, np.ones(15) / 15, mode="valid")
    left.plot(np.arange(len(smooth)) + 14, smooth, color=COLOURS[COLOUR[name]], lw=1.8)
    bars.barh(row, right[name], color=COLOURS[COLOUR[name]], height=0.7)
    count = trainable_parameters(arm)[0]
    bars.text(2, row, f"{right[name]:.0f} %", va="center", color="white", weight="bold")
    bars.text(102, row, f"{count:,}", va="center", fontsize=9)
left.set(xlabel="step", ylabel="loss, mean of 15 steps", ylim=(0, None))
bars.set(yticks=range(4), yticklabels=list(runs), xlim=(0, 140), xticks=[0, 50, 100])
bars.invert_yaxis()
bars.set(xlabel="%", title=f"right after {STEPS} steps; weights that learn")
save_figure(fig, "29_arms")

# %% [markdown]
# In these few steps either half alone stays behind: the eyes are new to handwriting, and the words to what they see.
# With adapters in both, a twelfth of the weights comes within twenty points of all of them in the same steps.
#
# The held-out digits, and what is said of them (red: wrong):

# %% tags=["hide-input"]
said = ask(reader, pictures[TEST][:20], PROMPT)
crops = [picture[38:-38, 38:-38] for picture in pictures[TEST][:20]]
fig = show_images(crops, said, columns=10, height=0.85)
for ax, text, true in zip(fig.axes, said, words[TEST]):
    text, true = text.strip(), true.strip()
    ax.set_title(text[:12], fontsize=7, color=COLOURS["ink" if text == true else "bad"])
save_figure(fig, "29_digits.png")

# %% [markdown]
# ### What it forgot
#
# And the captions of [lesson 25](25_scenes.ipynb)? We ask for captions of scenes with one or two objects: before, with
# all weights trained, with the adapters, and after the adapters were taken off. Both trained models had the same
# steps.

# %% tags=["nbval-ignore-output"]
world = SceneDataset(64, "test", tasks=("caption",), languages=("en",), objects=(1, 2))
world = [world[i] for i in range(len(world))]


def captions_right(model):
    said = ask(model, [item["image"] for item in world], "caption en")
    return 100 * float(np.mean([a == item["suffix"] for a, item in zip(said, world)]))


folder = Path(tempfile.mkdtemp())
save_adapter(reader, folder)
kept = {"before": captions_right(load_model(TINY))}
kept["all weights trained"] = captions_right(runs["all weights"][0])
kept["adapters on"] = captions_right(reader)
remove_lora(reader)
kept["adapters taken off"] = captions_right(reader)
for name, percent in kept.items():
    print(f"{name:20} {percent:5.1f} % of captions right")
assert kept["adapters taken off"] == kept["before"]
assert max(kept["adapters on"], kept["all weights trained"]) < kept["before"] - 5

# %% [markdown]
# Freezing is not remembering: with the adapters *on*, the old task suffers as it does with all weights trained, for
# every layer now adds its correction to every input. The difference is that it can be undone. One base model and a
# drawer of small files, one for each task:

# %%
load_adapter(reader, folder)
sizes = {"adapter": (folder / ADAPTER_WEIGHTS).stat().st_size}
sizes["model"] = (TINY / "model.safetensors").stat().st_size
print(", ".join(f"{name}: {size / 1e6:.1f} MB" for name, size in sizes.items()))
config = json.loads((folder / ADAPTER_CONFIG).read_text())
print({name: config[name] for name in ("peft_type", "r", "lora_alpha", "bias")})
print(next(iter(load_file(folder / ADAPTER_WEIGHTS))))

# %% [markdown]
# ### Is the change really of low rank?
#
# We have the model whose *every* weight was free. How many directions did its change use? The
# singular values of $\Delta W$ tell: the share of the change that the best rank-$r$ matrix would hold. A *random*
# matrix of the same shape is the control, for of that too the best few directions hold more than their share.


# %%
def held(matrices):
    """Mean share of each matrix's squares that its best approximations of rank 1 to 64 hold."""
    shares = []
    for matrix in matrices:
        values = torch.linalg.svdvals(matrix).square()
        shares.append((values.cumsum(0) / values.sum())[:64])
    return torch.stack(shares).mean(0)


old, new = load_model(TINY).state_dict(), runs["all weights"][0].state_dict()
keys = [key for key in old if key.endswith(("q_proj.weight", "fc1.weight"))]
changes = {
    part: [new[key] - old[key] for key in keys if key.startswith(part)]
    for part in ("vision_tower", "language_model")
}
changes["random"] = [torch.randn_like(change) for change in changes["vision_tower"]]
curves = {name: held(matrices) for name, matrices in changes.items()}
for name, curve in curves.items():
    print(f"{name:15} the best 8 of 128 directions hold {curve[7]:.0%}")
assert min(curves["vision_tower"][7], curves["language_model"][7]) > 2 * curves["random"][7]

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(5.6, 2.7), layout="constrained")
for (name, curve), colour in zip(curves.items(), ("vision", "language", "muted")):
    ax.plot(range(1, 65), 100 * curve, color=COLOURS[colour], lw=2, label=name)
ax.axvline(8, color=COLOURS["muted"], lw=1, ls=":")
ax.set(xlabel="rank r", ylabel="share of the change, %", ylim=(0, 102), xlim=(1, 64))
ax.legend(loc="lower right")
save_figure(fig, "29_spectrum")

# %% [markdown]
# A few directions carry more than twice what they would by chance. Nobody told the training to be of low rank; a
# small task needs only a small change. A large one, say a new language, needs more.
#
# ## At full size
#
# What training costs in memory, without activations. A weight that learns takes 16 bytes in float32:
# itself, its gradient, two averages of AdamW. A frozen one takes 2 (bfloat16). All three of PaliGemma's
# own stages train everything; others freeze parts.

# %%
with torch.device("meta"):
    full = PaliGemma(PaliGemmaConfig())
parts = {
    "vision": full.vision_tower,
    "projector": full.multi_modal_projector,
    "embedding": full.language_model.embed_tokens,
    "text blocks": full.language_model.layers,
}
counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
add_lora(full, rank=8, targets=EVERYWHERE)
extra = trainable_parameters(full)[0]
PLANS = {
    "PaliGemma, stages 1 to 3": list(parts),
    "vision frozen": ["projector", "embedding", "text blocks"],
    "projector only": ["projector"],
    "LoRA, rank 8": [],
}
memory = {}
for plan, learning in PLANS.items():
    bytes_ = sum(count * (16 if name in learning else 2) for name, count in counts.items())
    memory[plan] = (bytes_ + 16 * extra * (plan.startswith("LoRA"))) / 2**30
    print(f"{plan:25} {memory[plan]:5.1f} GiB")
print(f"adapters: {extra:,} parameters, {extra * 4 / 1e6:.0f} MB in a file")

# %%
fig, (left, right) = plt.subplots(
    1, 2, figsize=(7.6, 2.5), width_ratios=(3, 2), sharey=True, layout="constrained"
)
for row, (plan, learning) in enumerate(PLANS.items()):
    for column, name in enumerate(parts):
        beside = plan.startswith("LoRA") and name != "embedding"
        colour = COLOURS["accent" if name in learning else "muted"]
        shape = {"facecolor": colour, "alpha": 1 if name in learning else 0.25}
        left.add_patch(plt.Rectangle((column + 0.04, row - 0.36), 0.92, 0.72, **shape))
        if beside:
            strip = (column + 0.86, row - 0.36), 0.1, 0.72
            left.add_patch(plt.Rectangle(*strip, facecolor=COLOURS["accent"]))
        text = "learns" if name in learning else "frozen"
        ink = "white" if name in learning else COLOURS["ink"]
        left.text(column + 0.46, row, text, ha="center", va="center", fontsize=8, color=ink)
    right.barh(row, memory[plan], color=COLOURS["accent"], height=0.7)
    right.text(memory[plan] + 1, row, f"{memory[plan]:.1f}", va="center", fontsize=8)
heads = [f"{name}\n{count / 1e6:,.0f} M" for name, count in counts.items()]
left.set(xlim=(0, 4), ylim=(3.6, -0.6), yticks=range(4), yticklabels=list(PLANS))
left.set_xticks([0.5, 1.5, 2.5, 3.5], heads, fontsize=8)
left.xaxis.tick_top()
left.tick_params(length=0)
left.spines[:].set_visible(False)
right.set(xlabel="GiB to train", xlim=(0, 56))
save_figure(fig, "29_freeze")

# %% [markdown]
# A coloured strip is an adapter. Freezing the tower hardly helps: the text model is the large part.
# With LoRA the 3B model trains on one consumer card (activations come on top; they shrink with
# the batch).
#
# ## A bug people really make: loaded, and nothing happened
#
# A colleague opens the saved adapter with the tool everyone knows. There were complaints about names,
# so: `strict=False`. No error. The model answers. How well?

# %% tags=["nbval-ignore-output"]
colleague = load_model(TINY)
add_lora(colleague, rank=8, alpha=16, targets=EVERYWHERE)
result = colleague.load_state_dict(load_file(folder / ADAPTER_WEIGHTS), strict=False)
print(f"colleague: {digits_right(colleague):.1f} % of digits right")
print(f"load_adapter: {digits_right(reader):.1f} %")

# %% [markdown]
# As if nothing had been learnt, and exactly so: every name in the file begins with
# `base_model.model.`, none fitted, each $B$ is still 0. An untrained adapter is **invisible**: the one
# property that makes LoRA safe to start hides that it was never loaded.

# %%
print(
    "names that found no place:",
    len(result.unexpected_keys),
    "of",
    len(load_file(folder / ADAPTER_WEIGHTS)),
)
print("every B is 0:", not any(m.lora_B.weight.any() for m in adapters(colleague).values()))

# %% [markdown]
# ### Two more, in one cell
#
# **Merged and left on.** Someone merges, saves, and later loads the adapter *on top of the merged*
# model: every correction counts twice. **Merged too coarsely.** In bfloat16 a weight has 8 significant
# bits; a correction smaller than half a step is rounded away, and more training would not help.

# %% tags=["nbval-ignore-output"]
merged = load_model(TINY)
load_adapter(merged, folder)
merge_lora(merged)
print(f"merged once: {digits_right(merged):.1f} %")
load_adapter(merged, folder)
print(f"and loaded again: {digits_right(merged):.1f} %")

name, layer = next(iter(adapters(reader).items()))
coarse = layer.base_layer.weight.detach().bfloat16()
for share in (1.0, 0.1, 0.01):
    same = ((coarse.float() + share * layer.delta()).bfloat16() == coarse).float().mean()
    print(
        f"a correction {share:4} times as large leaves {same:.0%} of the bfloat16 weights as they were"
    )

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
    assert value is not None, "give a number"
    with torch.device("meta"):
        text = PaliGemma(PaliGemmaConfig()).language_model
    add_lora(text, rank=8, targets=("q_proj", "v_proj"))
    right = trainable_parameters(text)[0]
    assert value != 18 * 8 * 4 * 2048, "v_proj has one head of width 256 on its output"
    assert value != right // 18, "that is one layer"
    assert value == right, "per matrix: r · (inputs + outputs)"


check(test_1, answer_1)

# %% [markdown]
# <details><summary>Hint</summary>
#
# $A$ is $r \times \text{inputs}$, $B$ is $\text{outputs} \times r$. `q_proj` has $8 \cdot 256$ outputs,
# `v_proj` only 256.
#
# </details>

# %% tags=["solution"]
answer_1 = 18 * (8 * (2048 + 2048) + 8 * (2048 + 256))
check(test_1, answer_1)

# %% [markdown]
# ### Exercise 2 (fill in): unmerge
#
# A merged weight and its adapter are given. Return the weight before merging.


# %% tags=["exercise"]
def unmerge(weight, lora_A, lora_B, alpha):
    return None  # float32[out, in]


# %% tags=["check"]
def test_2(unmerge):
    for rank, alpha, shape in ((2, 4, (5, 3)), (3, 1, (4, 7))):
        torch.manual_seed(rank)
        holder = nn.Sequential(nn.Linear(shape[1], shape[0]))
        before = holder[0].weight.detach().clone()
        add_lora(holder, rank, alpha, targets="0")
        a, b = holder[0].lora_A.weight.detach(), holder[0].lora_B.weight.detach().normal_()
        merge_lora(holder)
        found = unmerge(holder[0].weight.detach(), a, b, alpha)
        assert found is not None, "return a matrix"
        assert found.shape == before.shape, f"shape {list(found.shape)}, not {list(before.shape)}"
        assert torch.allclose(found, before, atol=1e-5), "subtract (α/r)·B·A; r is in the shapes"


check(test_2, unmerge)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `len(lora_A)` is the rank. Order matters: $B$ stands left.
#
# </details>


# %% tags=["solution"]
def unmerge(weight, lora_A, lora_B, alpha):
    return weight - alpha / len(lora_A) * lora_B @ lora_A


check(test_2, unmerge)

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
        A, B = squeeze(delta, rank)
        assert A is not None and B is not None, "return A and B"
        sizes = [rank, shape[1]], [shape[0], rank]
        assert (list(A.shape), list(B.shape)) == sizes, f"A and B should be {sizes}"
        rest = (delta - B @ A).norm()
        least = torch.linalg.svdvals(delta)[rank:].norm()
        assert rest < least + 1e-4, f"{rest:.2f} is left over; {least:.2f} would be possible"


check(test_3, squeeze)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `U, S, Vh = torch.linalg.svd(delta, full_matrices=False)`: keep the first columns of `U`, values of
# `S`, rows of `Vh`.
#
# </details>


# %% tags=["solution"]
def squeeze(delta, rank):
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return Vh[:rank], U[:, :rank] * S[:rank]


check(test_3, squeeze)

# %% [markdown]
# ## Summary
#
# - A frozen $W$ and a correction $\frac{\alpha}{r}BA$ beside it: a few per cent of the weights learn.
# - $B = 0$: the model starts as it was, $B$ learns first, $A$ from the second step on.
# - Where adapters belong depends on what is new; a frozen head says only words it can already tell
#   apart.
# - Merge once, in float32; load strictly; an adapter that was not loaded looks like one that does nothing.

# %% [markdown]
# ## Quiz
#
# **1.** Someone starts with $A = 0$ and $B$ random. Does it learn?
#
# <details><summary>Answer</summary>
#
# Yes. $BA = 0$, too, and now $A$ gets the first gradient, $B^\top g\,x^\top$. It is the mirror image.
# The habit is $B = 0$, and peft's files and learning rates assume it.
#
# </details>

# %% [markdown]
# **2.** Is a step with LoRA much faster than one with all weights?
#
# <details><summary>Answer</summary>
#
# Not much. The forward pass is the same, and gradients still flow back through all frozen layers to
# reach the early adapters. Only the gradients of the frozen weights are saved, and the optimizer's work.
# The gain is memory.
#
# </details>

# %% [markdown]
# **3.** Why not put an adapter on the embedding, which is also the head?
#
# <details><summary>Answer</summary>
#
# One table does two jobs. An adapter on the head alone would untie them: after merging, input and
# output need different tables, and a checkpoint with a tied head has room for one. To learn new words,
# train their rows of the table.
#
# </details>

# %% [markdown]
# ## References
#
# - Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models*
#   ([arXiv 2106.09685](https://arxiv.org/abs/2106.09685)), section 4.
# - Beyer et al. 2024, *PaliGemma* ([arXiv 2407.07726](https://arxiv.org/abs/2407.07726)), section 3
#   (stages; nothing is frozen).
# - Dettmers et al. 2023, *QLoRA* ([arXiv 2305.14314](https://arxiv.org/abs/2305.14314)): adapters on all
#   linear layers, over a 4-bit model.
# - peft, `tuners/lora/layer.py`; scikit-learn's digits: Alpaydin and Kaynak 1998, UCI repository.

# %% [markdown] tags=["navigation"]
# [← Evaluation](28_evaluation.ipynb) | [contents](00_overview.ipynb)
