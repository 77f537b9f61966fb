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
# [← SigLIP's attention](04_siglip_attention.ipynb) | [contents](00_overview.ipynb) | [Tokenizer →](06_tokenizer.ipynb)

# %% [markdown]
# # 05 · SigLIP: how is a vision encoder put together?
#
# *55 minutes* · part I, Seeing
#
# **What you will be able to do**
#
# - normalise four numbers with a pencil, and say what each part is for;
# - explain why 27 layers can be trained at all: a road of additions, and norms beside it;
# - build the tower and account for its 412,442,352 parameters;
# - watch a trained tower tell two dogs from a cat, and catch an error that bfloat16 hides.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("siglip")

# %% [markdown]
# ## Setup
#
# From earlier lessons: the drawing helpers (01), the `ImageProcessor` (02), `PatchEmbedding` (03)
# and `SiglipAttention` (04). The cells that begin with `#| export` become the file
# [siglip.py](../paligemma/siglip.py).

# %%
#| export
"""The SigLIP vision encoder: patches in, one context-aware vector a patch out."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from paligemma.patch_embedding import PatchEmbedding
from paligemma.siglip_attention import SiglipAttention

# %% tags=["setup"]
import copy
import math
import time
from importlib import resources

import matplotlib.pyplot as plt
from safetensors import safe_open
from safetensors.torch import load_file

from paligemma.image_processor import ImageProcessor
from paligemma.plotting import show_images
from paligemma.support.course import check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS

_ = torch.manual_seed(5)

# %% [markdown]
# ## The problem
#
# One round of attention ([lesson 04](04_siglip_attention.ipynb)) is not enough: an ear is found from edges, a head from ears and
# eyes. So we stack rounds. But attention only *averages*. Let us do it 27 times with the cat: each
# patch begins as its mean colour, and in each round becomes a weighted mean of all.

# %%
cat = ImageProcessor(224)(sample_picture("cat"))  # (1, 3, 224, 224)
x = F.unfold(cat, 14, stride=14)[0].T.reshape(256, 3, 196).mean(dim=2)  # (N, 3) colours
pictures, titles = [], []
for number in range(28):
    if number in (0, 1, 3, 9, 27):
        pictures.append((x.reshape(16, 16, 3) + 1) / 2)
        titles.append(f"after {number} rounds")
    x = (16 * x @ x.T / 3**0.5).softmax(dim=-1) @ x  # attention with q = k = v
fig = show_images(pictures, titles, columns=5, height=1.35)
save_figure(fig, "05_collapse.png")

# %% [markdown]
# After three rounds the cat is brown paper. Two things are missing: a way to *keep* what a patch has,
# and something that makes anything *new*. So a round, called a **block**, has two halves, and both
# **add** to what is there: attention fetches from other patches; an **MLP** (multi-layer perceptron)
# computes on each patch alone. A **norm** keeps the numbers in range. There are two ways to wire it:


# %%
def draw_block(axis, title, pre):
    """One block: the stream runs left to right, each branch leaves it and is added back."""
    axis.annotate("", (10.3, 0), (-0.3, 0), arrowprops={"arrowstyle": "->", "lw": 3, "color": ink})
    for left, name, colour in ((0.5, "attention", "vision"), (5.5, "MLP", "together")):
        plus = left + 3.0
        axis.plot([left, left, plus, plus], [0, 1.5, 1.5, 0.25], color=ink, lw=1.2)
        boxes = [(left + 1.75, 1.5, name, colour)]
        boxes += (
            [(left + 0.25, 0.75, "norm", "accent")] if pre else [(plus + 1.0, 0, "norm", "bad")]
        )
        axis.text(plus, 0, "+", ha="center", va="center", fontsize=12, bbox=box("ink", "circle"))
        for x, y, text, fill in boxes:
            axis.text(x, y, text, ha="center", va="center", fontsize=9, bbox=box(fill, "round"))
    axis.set(xlim=(-0.4, 10.4), ylim=(-0.6, 2), title=title)
    axis.set_axis_off()


def box(colour, shape):
    return {
        "boxstyle": f"{shape},pad=0.3",
        "facecolor": COLOURS["paper"],
        "edgecolor": COLOURS[colour],
    }


ink = COLOURS["ink"]
fig, axes = plt.subplots(1, 2, figsize=(9.4, 2.1), layout="constrained")
draw_block(axes[0], "SigLIP: the norm stands beside the road (pre-norm)", True)
draw_block(axes[1], "The first transformer: norms on the road (post-norm)", False)
save_figure(fig, "05_block")

# %% [markdown]
# Follow the thick line. It is the **residual stream**: one vector a patch, to which every half-round
# *adds* something. Nothing is ever replaced. A branch reads the stream, computes a correction, and
# adds it back.
#
# On the left, the line is free from end to end. On the right, each norm stands across it. We shall
# measure what that changes. First the three new pieces: norm, GELU, MLP.

# %% [markdown]
# ## By hand
#
# ### LayerNorm, on four numbers
#
# Take $x = (9, 1, 3, 3)$. Mean: $16 / 4 = 4$. Subtract it: $(5, -3, -1, -1)$. Mean of the squares:
# $(25 + 9 + 1 + 1)/4 = 9$. Its root, 3, is the typical size. Divide: $(1.67, -1, -0.33, -0.33)$.

# %%
x = torch.tensor([9.0, 1, 3, 3])
centred = x - x.mean()
size = centred.square().mean().sqrt()
print("centred:", centred.tolist(), " size:", size.item())
print("LayerNorm:   ", [round(v, 2) for v in (centred / size).tolist()])
print("of 10 x + 7: ", [round(v, 2) for v in F.layer_norm(10 * x + 7, (4,)).tolist()])

# %% [markdown]
# Ten times as large and shifted by 7: the same result. A branch behind a norm cannot see how large
# the stream has grown; it always gets numbers of size 1. At the end each channel has a learned
# weight and bias:
#
# $$\text{LayerNorm}(x)_i = \frac{x_i - \bar x}{\sqrt{\frac1D \sum_j (x_j - \bar x)^2 + \varepsilon}}\,
# w_i + b_i$$
#
# $\varepsilon = 10^{-6}$ keeps a vector of equal numbers from dividing by zero.

# %% [markdown]
# ### GELU: a soft switch
#
# An MLP is two matrices with a bend between; without the bend they would be one matrix. The bend is
# **GELU**: $x$ times the share of a bell curve that lies below $x$. Exactly, with the error function;
# or by a formula with tanh that was cheaper to compute:
#
# $$\tfrac{x}{2}\bigl(1 + \operatorname{erf}\tfrac{x}{\sqrt2}\bigr) \qquad
# \tfrac{x}{2}\Bigl(1 + \tanh\bigl(\sqrt{2/\pi}\,(x + 0.044715\,x^3)\bigr)\Bigr)$$


# %%
def gelu_exact(x):
    return x / 2 * (1 + math.erf(x / math.sqrt(2)))


def gelu_tanh(x):
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


for x in (-2, 0, 1, 2):
    print(f"x = {x:2}   exact {gelu_exact(x):7.4f}   tanh {gelu_tanh(x):7.4f}")

# %%
z = torch.linspace(-5, 5, 501)
exact, tanh = F.gelu(z), F.gelu(z, approximate="tanh")
fig, axes = plt.subplots(1, 2, figsize=(8, 2.7), layout="constrained")
axes[0].plot(z, exact, color=COLOURS["vision"], lw=4, alpha=0.5, label="exact")
axes[0].plot(z, tanh, "--", color=COLOURS["language"], label="tanh")
axes[0].set(xlim=(-4, 3), ylim=(-0.4, 3), title="two curves, one on the other", xlabel="x")
axes[0].legend()
axes[1].plot(z, 1e4 * (tanh - exact), color=COLOURS["bad"])
axes[1].axhline(0, color=COLOURS["muted"], lw=0.7)
axes[1].set(title="tanh − exact, in units of 0.0001", xlabel="x")
print(f"largest difference: {(tanh - exact).abs().max():.5f}")
save_figure(fig, "05_gelu")

# %% [markdown]
# On the left you see one curve. On the right their difference, 10,000 times enlarged: at most five
# of these units, around $\pm 2.7$. SigLIP was trained with tanh. Remember this; it comes back as a
# bug.

# %% [markdown]
# ## As a loop
#
# One patch after the other, one neuron after the other. A **neuron** of the MLP is a row $u$ of the
# first matrix (how well does the patch match?) and a column of the second (what to add if so).


# %%
def layer_norm_loop(x, weight, bias, eps=1e-6):
    """float[D]: one number after the other."""
    mean = sum(x) / len(x)
    size = (sum((v - mean) ** 2 for v in x) / len(x) + eps) ** 0.5
    return torch.stack([(v - mean) / size * w + b for v, w, b in zip(x, weight, bias)])


def mlp_loop(x, fc1, fc2):
    """float[D] → float[D]: each neuron matches, bends, and adds its own column."""
    out = fc2.bias.clone()
    for neuron in range(len(fc1.weight)):
        match = sum(a * b for a, b in zip(fc1.weight[neuron], x)) + fc1.bias[neuron]
        out = out + gelu_tanh(match.item()) * fc2.weight[:, neuron]
    return out


# %% [markdown]
# A whole block, on $N = 5$ patches of width $D = 6$ with 9 neurons. Attention is [lesson 04](04_siglip_attention.ipynb)'s.
# Everything gets random weights, the norms too: a norm of ones and zeros would hide mistakes.

# %%
norm1, norm2 = nn.LayerNorm(6, eps=1e-6), nn.LayerNorm(6, eps=1e-6)
attention, fc1, fc2 = SiglipAttention(6, 2), nn.Linear(6, 9), nn.Linear(9, 6)
for part in (norm1, norm2, attention, fc1, fc2):
    for weight in part.requires_grad_(False).parameters():
        weight.normal_(std=0.7)

stream = torch.randn(5, 6)  # (N, D)
calm = torch.stack([layer_norm_loop(x, norm1.weight, norm1.bias) for x in stream])
slow = stream + attention(calm[None])[0]
for n in range(5):
    slow[n] += mlp_loop(layer_norm_loop(slow[n], norm2.weight, norm2.bias), fc1, fc2)
print(tuple(slow.shape))

# %% [markdown]
# ## Vectorised
#
# `F.layer_norm` takes all patches at once, and each patch times each neuron is one matrix product.
# The block becomes two lines, the same two as in the picture:

# %%
x = stream[None]  # (B, N, D)
x = x + attention(F.layer_norm(x, (6,), norm1.weight, norm1.bias, 1e-6))
h = F.layer_norm(x, (6,), norm2.weight, norm2.bias, 1e-6)
fast = x + fc2(F.gelu(fc1(h), approximate="tanh"))  # (B, N, D)
torch.testing.assert_close(fast[0], slow, atol=1e-5, rtol=1e-5)
print("equal to the loop")

# %% [markdown]
# ## The module
#
# All sizes stand in one place. The names are those of the published `config.json`.


# %%
#| export
@dataclass
class SiglipVisionConfig:
    """Shape of the vision tower; the defaults are SigLIP So400m/14 at 224 pixels.

    Source: Zhai et al. 2023 (SigLIP); Alabdulmohsin et al. 2023 (the So400m shape);
    PaliGemma's published `config.json`.
    """

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    layer_norm_eps: float = 1e-6

    @property
    def num_image_tokens(self) -> int:
        """N, the number of patches: (image_size / patch_size)²."""
        return (self.image_size // self.patch_size) ** 2


# %% [markdown]
# The MLP widens each patch from 1152 to 4304 numbers, bends them, and narrows again.


# %%
#| export
class SiglipMLP(nn.Module):
    """Two linear layers with tanh-approximated GELU between; each patch on its own.

    Args:
        config: widths D (`hidden_size`) and of the middle (`intermediate_size`).

    Source: `SiglipMLP` in transformers; Hendrycks and Gimpel 2016 (GELU).
    """

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`float[B, N, D]` → `float[B, N, D]`."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


# %% [markdown]
# The block. Each line reads a *normalised copy* of the stream and adds to the stream itself.


# %%
#| export
class SiglipEncoderLayer(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        config: the shape of the tower.

    Source: `SiglipEncoderLayer` in transformers; Xiong et al. 2020 (pre-norm).
    """

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SiglipAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`float[B, N, D]` → `float[B, N, D]`."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


# %%
small = SiglipVisionConfig(hidden_size=6, intermediate_size=9, num_attention_heads=2)
block = SiglipEncoderLayer(small)
block.layer_norm1, block.layer_norm2, block.self_attn = norm1, norm2, attention
block.mlp.fc1, block.mlp.fc2 = fc1, fc2
assert block(stream[None]).shape == (1, 5, 6)
torch.testing.assert_close(block(stream[None])[0], slow, atol=1e-5, rtol=1e-5)
print("module, tensors and loop agree")

# %% [markdown]
# ### Why this wiring? An experiment before any training
#
# Stack 27 blocks with fresh random weights (Xavier's rule, as SigLIP's training does) and wire them
# five ways. All five use the *same* weights.


# %%
def wired(layer, x, way):
    attn, mlp, norm1, norm2 = layer.self_attn, layer.mlp, layer.layer_norm1, layer.layer_norm2
    if way == "neither":
        return mlp(attn(x))
    if way == "norm only":
        return mlp(norm2(attn(norm1(x))))
    if way == "stream only":
        x = x + attn(x)
        return x + mlp(x)
    if way == "post-norm":
        x = norm1(x + attn(x))
        return norm2(x + mlp(x))
    return layer(x)  # pre-norm


def fresh(config):
    """Blocks as they are before training: Xavier weights, biases 0, norms 1."""
    layers = nn.ModuleList(SiglipEncoderLayer(config) for _ in range(config.num_hidden_layers))
    for name, weight in layers.named_parameters():
        if weight.dim() == 2:
            nn.init.xavier_uniform_(weight)
        elif "norm" not in name:
            nn.init.zeros_(weight)
    return layers


# %% [markdown]
# Forwards, two questions: how large are the numbers, and how different are the patches of one picture
# still (their distance from their mean, as a share of their size)? Backwards one: send a random
# gradient in at the end; how much of it arrives at each depth? Float64, so that nothing is rounding.

# %%
ways = ["neither", "norm only", "stream only", "post-norm", "pre-norm"]
layers = fresh(SiglipVisionConfig(hidden_size=64, intermediate_size=256, num_attention_heads=4))
layers.double()
start, pull = torch.randn(2, 4, 16, 64, dtype=torch.double)  # two tensors (B, N, D)
measured = {}
for way in ways:
    states = [start.clone().requires_grad_()]
    for layer in layers:
        states.append(wired(layer, states[-1], way))
        states[-1].retain_grad()
    (states[-1] * pull).sum().backward()
    apart = [s - s.mean(dim=1, keepdim=True) for s in states]
    measured[way] = torch.stack(
        [
            torch.stack([s.detach().norm() / start.norm() for s in states]),
            torch.stack([(a.norm() / s.norm()).detach() for a, s in zip(apart, states)]),
            torch.stack([s.grad.norm() / pull.norm() for s in states]),
        ]
    )

# %%
colours = ["muted", "accent", "bad", "language", "vision"]
titles = ["size of the stream", "how different patches are", "gradient that arrives"]
fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.1), layout="constrained")
for index, (axis, title) in enumerate(zip(axes, titles)):
    for way, colour in zip(ways, colours):
        width = 2.6 if way == "pre-norm" else 1.5
        axis.plot(measured[way][index], color=COLOURS[colour], lw=width, label=way)
    axis.set(yscale="log", title=title, xlabel="after block", xticks=[0, 9, 18, 27])
axes[0].set_ylim(1e-6, 1e8)
axes[1].set_ylim(1e-6, 3)
axes[2].set_ylim(1e-8, 1e8)
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
print("after 27 blocks      size   patches differ   gradient at the start")
for way in ways:
    size, apart, gradient = measured[way][0, -1], measured[way][1, -1], measured[way][2, 0]
    print(f"{way:12} {size:15.1e} {apart:12.0e} {gradient:20.0e}")
assert 2 < measured["pre-norm"][0, -1] < 20 and measured["pre-norm"][1, -1] > 0.1
save_figure(fig, "05_wiring")

# %% [markdown]
# **Left:** the stream without norms explodes; with neither, all dies out. **Middle:** without a stream
# all patches are the same after five blocks. Post-norm shrinks the old content at every norm: at the
# end patches differ by a thousandth; pre-norm keeps two fifths. **Right:** neither of the two loses
# the gradient here.
#
# So the stream keeps what a patch has, the norms keep it in range, and *beside the road* they cost
# the least.

# %% [markdown]
# ### The tower
#
# Patch embedding, 27 blocks, and one last norm: since the stream was never normalised on its way,
# it is once, at the end. SigLIP's own *pooling head*, which makes one vector of a whole picture, is
# left out: PaliGemma wants every patch.


# %%
#| export
class SiglipVisionModel(nn.Module):
    """Patch embedding, `num_hidden_layers` blocks, one last layer norm; no pooling head.

    Args:
        config: the shape of the tower.

    Raises:
        ValueError: patches do not divide the picture, or heads do not divide the width.

    Source: `SiglipVisionTransformer` in transformers, `vit.py` in big_vision.
    """

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = PatchEmbedding(
            config.hidden_size, config.image_size, config.patch_size, config.num_channels
        )
        layers = nn.ModuleList(SiglipEncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})  # published keys read encoder.layers.0.…
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`float[B, 3, H, W]` in -1…1 → `float[B, N, D]`."""
        x = self.embeddings(pixel_values)
        for layer in self.encoder["layers"].children():
            x = layer(x)
        return self.post_layernorm(x)


# %% [markdown]
# ## Against the reference
#
# A small file holds weights, two pictures, and every intermediate state from transformers'
# `SiglipVisionModel`: three blocks of width 16, norms with random weights too. We compare at every
# depth: when a port is wrong, the first depth that differs says where.

# %%
stored = load_file("reference/siglip.safetensors")
model = SiglipVisionModel(
    SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=21,
        patch_size=7,
    )
)
weights = {k.removeprefix("model."): v for k, v in stored.items() if k.startswith("model.")}
model.load_state_dict(weights)
with torch.no_grad():
    states = [model.embeddings(stored["pictures"])]
    for layer in model.encoder.layers:
        states.append(layer(states[-1]))
    out = model(stored["pictures"])
gaps = [(state - stored[f"state.{i}"]).abs().max() for i, state in enumerate(states)]
gaps.append((out - stored["output"]).abs().max())
print("at most 1e-5 at every depth:", all(gap <= 1e-5 for gap in gaps), f"({len(gaps)} depths)")
assert all(gap <= 1e-5 for gap in gaps)

# %% [markdown]
# ## See it: what a trained tower has learned
#
# Random weights have nothing to show. But a small PaliGemma ships with this course, trained on
# pictures of emoji: 4 blocks of width 128, pictures of 112 pixels, $8 \times 8$ patches. We take its
# vision weights straight from the file. ([Lesson 16](16_checkpoint.ipynb) does this for whole models.)

# %%
tiny_config = SiglipVisionConfig(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=112,
)
tiny, prefix = SiglipVisionModel(tiny_config), "vision_tower.vision_model."
path = resources.files("paligemma") / "assets" / "tiny" / "model.safetensors"
with safe_open(path, "pt") as file:
    names = [name for name in file.keys() if name.startswith(prefix)]
    trained = {name.removeprefix(prefix): file.get_tensor(name).float() for name in names}
print(len(names), "tensors:", tiny.load_state_dict(trained))
_ = tiny.requires_grad_(False)

pixels = ImageProcessor(112)(sample_picture("scene"))  # (1, 3, 112, 112)
photo = (pixels[0].permute(1, 2, 0) + 1) / 2
states = [tiny.embeddings(pixels)]
for layer in tiny.encoder.layers:
    states.append(layer(states[-1]))
print(len(states), "states of", tuple(states[0].shape))

# %% [markdown]
# ### One patch asks: who is like me?
#
# Take a patch of the *right* dog (white square). At each depth, compare its vector with the other
# 63: the cosine of the angle between them, 1 for the same direction. All patches share a large
# common part, so we subtract the mean of the picture first.


# %%
def alike(state, place):
    """Cosine of one patch with all, after their mean is removed: float[8, 8]."""
    apart = F.normalize(state[0] - state[0].mean(dim=0), dim=-1)  # (N, D)
    return (apart @ apart[8 * place[0] + place[1]]).view(8, 8)


ASKS = (5, 5)
fig, axes = plt.subplots(1, 6, figsize=(7, 1.65), layout="constrained")
axes[0].imshow(photo)
axes[0].add_patch(plt.Rectangle((70, 70), 13, 13, fill=False, edgecolor="white", linewidth=2))
axes[0].set_title("the picture", fontsize=8)
for depth, axis in enumerate(axes[1:]):
    picture = axis.imshow(alike(states[depth], ASKS), cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set_title("patches" if depth == 0 else f"after block {depth}", fontsize=8)
for axis in axes:
    axis.set_axis_off()
fig.colorbar(picture, ax=axes, shrink=0.75, ticks=[-1, 0, 1])
save_figure(fig, "05_alike.png")

# %% [markdown]
# The two dogs lie apart, and no patch of one shows exactly the same pixels as a patch of the other:
# the cuts fall differently. Let us put numbers to it.

# %%
groups = {
    "same dog": [(4, 6), (4, 7), (5, 6), (5, 7), (6, 6)],
    "other dog": [(2, 3), (2, 4), (3, 4)],
    "cat": [(4, 0), (4, 1), (5, 0), (5, 1), (5, 2), (6, 1)],
    "sky": [(row, column) for row in (0, 1) for column in range(8)],
}
curves = {
    name: [sum(alike(s, ASKS)[place].item() for place in places) / len(places) for s in states]
    for name, places in groups.items()
}
print("mean cosine   patches   block 1   block 2   block 3   block 4")
for name, values in curves.items():
    print(f"{name:12}", "".join(f"{value:9.1f} " for value in values))
start, end = ({name: values[block] for name, values in curves.items()} for block in (0, 4))
assert abs(start["other dog"] - start["cat"]) < 0.15 and start["same dog"] < start["cat"]
assert all(c - d < -0.1 for c, d in list(zip(curves["cat"], curves["other dog"]))[1:])
assert min(end["same dog"], end["other dog"]) > end["cat"] + 0.1 and end["sky"] < start["sky"]

# %% [markdown]
# **What to notice.** Before the first block the asking patch is as much like the cat as like the other
# dog, and even less like its own dog's patches, which show other pixels. Block by block all three
# animals grow more alike; but from the first block on the other dog stays well ahead of the cat, and
# its own dog, last at the start, ends close to it. The sky goes the other way.
#
# No label said which patch is dog. This tower learned to caption, find and count; for that, *what a
# patch belongs to* is more useful than its pixels.

# %% [markdown]
# ### All patches at once
#
# 128 numbers a patch cannot be drawn; three can, as red, green and blue. **Principal components** are
# the three directions along which the patches differ most. They are found from this picture alone;
# the colours mean nothing by themselves. Equal colour: alike.


# %%
def as_colours(state):
    """Three principal components of the patches as RGB: float[8, 8, 3], and their share."""
    apart = state[0] - state[0].mean(dim=0)
    _, sizes, directions = torch.linalg.svd(apart, full_matrices=False)
    three = apart @ directions[:3].T  # (N, 3)
    share = sizes[:3].square().sum() / sizes.square().sum()
    return (three / three.abs().amax(dim=0) / 2 + 0.5).view(8, 8, 3), share.item()


fig, axes = plt.subplots(2, 4, figsize=(7, 3.7), layout="constrained")
for row, name in zip(axes, ("scene", "scene2")):
    inputs = ImageProcessor(112)(sample_picture(name))
    x = tiny.embeddings(inputs)
    views = [((inputs[0].permute(1, 2, 0) + 1) / 2, "the picture")]
    views.append((as_colours(x)[0], "patches"))
    for depth, layer in enumerate(tiny.encoder.layers, start=1):
        x = layer(x)
        if depth in (2, 4):
            views.append((as_colours(x)[0], f"after block {depth}"))
    for axis, (view, title) in zip(row, views):
        axis.imshow(view)
        axis.set_title(title, fontsize=8)
        axis.set_axis_off()
print(f"shown of all differences after block 4 in 'scene': {as_colours(states[4])[1]:.0%}")
save_figure(fig, "05_colours.png")

# %% [markdown]
# First the colours follow the pixels and the height in the picture (sky above, grass below). At the
# end they follow the **things**: both dogs in one colour, the cat in another, the background nearly
# one. The bee and the flower part in the same way.
#
# Only three of 128 directions are shown, and this tower knows emoji and nothing else. SigLIP, trained on
# photographs of the web, has far more to tell apart.

# %% [markdown]
# ### Who wrote what into the stream?
#
# Since everything is added, the end of the road can be taken apart exactly: patch embedding plus
# four attention outputs plus four MLP outputs. Below, the length of each addition, patch by patch.

# %%
x = tiny.embeddings(pixels)
parts = {"patches": x}
for number, layer in enumerate(tiny.encoder.layers, start=1):
    parts[f"attention {number}"] = layer.self_attn(layer.layer_norm1(x))
    x = x + parts[f"attention {number}"]
    parts[f"MLP {number}"] = layer.mlp(layer.layer_norm2(x))
    x = x + parts[f"MLP {number}"]
torch.testing.assert_close(sum(parts.values()), states[4], atol=1e-3, rtol=1e-4)

lengths = {name: part[0].norm(dim=-1).view(8, 8) for name, part in parts.items()}
fig, axes = plt.subplots(2, 5, figsize=(7, 3), layout="constrained")
order = ["patches"] + [f"{k} {n}" for k in ("attention", "MLP") for n in (1, 2, 3, 4)]
places = [axes[0, 0], *axes[0, 1:], *axes[1, 1:]]
for name, axis in zip(order, places):
    picture = axis.imshow(lengths[name], vmin=0, vmax=max(v.max() for v in lengths.values()))
    axis.set_title(f"{name}\nmean {lengths[name].mean():.0f}", fontsize=8)
axes[1, 0].imshow(photo)
for axis in axes.flat:
    axis.set_axis_off()
fig.colorbar(picture, ax=axes, shrink=0.7)
save_figure(fig, "05_additions.png")

# %% [markdown]
# Nothing is lost on the road: nine parts, added, are the end. The first attentions write little; the
# last MLP writes most. The things show in the MLPs, as brighter or darker than their surroundings.
#
# Long is not the same as important. But this exact sum is what many methods of looking inside start
# from.

# %% [markdown]
# ## At full size
#
# On PyTorch's **meta** device a tensor has a shape and no memory, so the whole tower is built at
# once. Where do its parameters sit?

# %%
with torch.device("meta"):
    full = SiglipVisionModel(SiglipVisionConfig())
kinds = {"patch_embedding": "patches", "position": "positions", "self_attn": "attention"}
kinds |= {"mlp": "MLP", "norm": "norms"}
count = dict.fromkeys(kinds.values(), 0)
for name, weight in full.named_parameters():
    count[next(kind for key, kind in kinds.items() if key in name)] += weight.numel()
total = sum(count.values())
assert total == 412_442_352
for kind, number in count.items():
    print(f"{kind:10} {number:12,} {number / total:8.2%}")
print(f"{'all':10} {total:12,}   {2 * total / 1e6:.0f} MB in bfloat16")

fig, axis = plt.subplots(figsize=(8.4, 1.9), layout="constrained")
shown = {
    "MLP": "together",
    "attention": "vision",
    "patches": "accent",
    "positions": "language",
    "norms": "muted",
}
left = 0
for kind, colour in shown.items():
    axis.barh(0, count[kind] / 1e6, left=left, color=COLOURS[colour], edgecolor=COLOURS["paper"])
    if count[kind] > 1e7:
        text = f"{kind}: 27 × {count[kind] / 27 / 1e6:.1f} M"
        axis.text(left + count[kind] / 2e6, 0, text, ha="center", va="center", color="white")
    left += count[kind] / 1e6
rest = ", ".join(f"{k} {count[k] / 1e6:.2f} M" for k in ("patches", "positions", "norms"))
axis.annotate(rest, (left - 1, 0.42), (left, 0.75), ha="right", arrowprops={"arrowstyle": "-"})
axis.set(xlim=(0, left + 1), ylim=(-0.45, 1), yticks=[], xlabel="million parameters")
axis.spines["left"].set_visible(False)
save_figure(fig, "05_parameters")

# %% [markdown]
# Two thirds are MLP, one third attention, and all the rest together is under one percent: patches,
# positions and 55 norms. The tower *is* its blocks.
#
# What does a look cost? Each weight of a linear layer meets each of the 256 patches once: two
# operations a weight and patch. We time one block of full size and multiply.

# %% tags=["nbval-ignore-output"]
block = SiglipEncoderLayer(SiglipVisionConfig()).requires_grad_(False)
x = torch.randn(1, 256, 1152)
times = []
for _ in range(4):
    start = time.perf_counter()
    block(x)
    times.append(time.perf_counter() - start)
one = min(times)
work = 2 * 256 * sum(p.numel() for p in block.parameters()) + 4 * 256**2 * 1152
print(f"one block: {1000 * one:.0f} ms, {work / 1e9:.1f} GFLOP, {work / one / 1e9:.0f} GFLOP/s")
print(f"27 blocks: about {27 * one:.1f} s a picture here, {27 * work / 1e9:.0f} GFLOP")

# %% [markdown]
# This is paid once a picture. The vision tower does *not* run again for each word of the answer
# ([lesson 18](18_generation.ipynb)); implementations that forget this pay it dozens of times.

# %% [markdown]
# ## A bug people really make: almost the same GELU
#
# A colleague ports the tower. Trained weights load, shapes fit, the colours above look the same. In
# the product it runs in bfloat16, so the test compares in bfloat16, allows for rounding, and passes.
# Here is what the test sees:


# %%
class ColleaguesMLP(SiglipMLP):
    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def port(model, kind):
    """The same weights with another MLP."""
    copy = SiglipVisionModel(model.config)
    for layer in copy.encoder.layers:
        layer.mlp = kind(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.requires_grad_(False)


def off(a, b):
    """Relative difference of two tensors."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


wrong, right = port(tiny, ColleaguesMLP), tiny(pixels)
half = port(tiny, SiglipMLP).bfloat16()(pixels.bfloat16())
wrong_half = port(tiny, ColleaguesMLP).bfloat16()(pixels.bfloat16())
print("right, bfloat16: off by less than 2 %:", off(half, right) < 0.02)
print("port,  bfloat16: off by less than 2 %:", off(wrong_half, right) < 0.02)

# %% [markdown]
# Both pass. No difference to be seen. Is the port right?
#
# ### The check that finds it
#
# Ask not "is it close?" but "is it as close as **float32** allows?" We go through 27 fresh blocks and
# measure after each, against float64: float32 rounding, the port, and bfloat16 rounding.

# %%
layers = fresh(SiglipVisionConfig(hidden_size=64, intermediate_size=256, num_attention_heads=4))
layers.requires_grad_(False)


def through(layers, x, exact=False):
    """The stream after each block; with `exact`, the colleague's GELU."""
    out = []
    for layer in layers:
        x = x + layer.self_attn(layer.layer_norm1(x))
        h = layer.mlp.fc1(layer.layer_norm2(x))
        x = x + layer.mlp.fc2(F.gelu(h, approximate="none" if exact else "tanh"))
        out.append(x)
    return out


x = torch.randn(4, 16, 64)
runs = {"float32": through(layers, x), "exact GELU, float32": through(layers, x, exact=True)}
runs["bfloat16"] = through(copy.deepcopy(layers).bfloat16(), x.bfloat16())
truth = through(copy.deepcopy(layers).double(), x.double())
curves = {name: [off(a, b) for a, b in zip(run, truth)] for name, run in runs.items()}

fig, axis = plt.subplots(figsize=(6.6, 3), layout="constrained")
for (name, values), colour in zip(curves.items(), ("good", "bad", "muted")):
    axis.plot(range(1, 28), values, color=COLOURS[colour])
    axis.text(27.4, values[-1], name, color=COLOURS[colour], va="center")
axis.set(yscale="log", xlabel="after block", ylabel="relative difference", xlim=(0, 27))
axis.set(xticks=[1, 9, 18, 27], ylim=(1e-8, 1e-1))
for name in ("exact GELU, float32", "bfloat16"):
    values = curves[name]
    print(f"{name:20} after block 1: {values[0]:.4f}   after block 27: {values[-1]:.4f}")
least = min(a / b for a, b in zip(curves["exact GELU, float32"], curves["float32"]))
print("the port is more than 100 times rounding, everywhere:", least > 100)
print(f"the trained tower, float32: port off by {off(wrong(pixels), right):.4f}")
save_figure(fig, "05_bug")

# %% [markdown]
# The port is off by hundreds of times what float32 rounding allows: **not** rounding. And bfloat16 is
# fifty times coarser still: no test in bfloat16 can see it. The error starts in the first block,
# doubles soon, then grows only as fast as the stream.
#
# The cause is one missing argument: `F.gelu(x)` is the exact one. Answers hardly change. But whoever
# accepts 0.0002 as "rounding" will not see the next bug of that size either.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): the same tower for larger pictures
#
# PaliGemma also comes for 448 pixels; patches stay 14 × 14. How many parameters has that tower?
# Start from 412,442,352 and think of what depends on the size of the picture.

# %% tags=["exercise"]
answer = None  # your answer, a whole number


# %% tags=["check"]
def test_1(answer):
    assert isinstance(answer, int), "give a whole number"
    with torch.device("meta"):
        large = SiglipVisionModel(SiglipVisionConfig(image_size=448))
    truth = sum(p.numel() for p in large.parameters())
    assert answer != 4 * 412_442_352, "blocks have no weights that belong to one patch"
    assert answer > 412_442_352, "something is stored for each place of the picture"
    assert answer != 412_442_352 + 1024 * 1152, "256 of the positions were counted before"
    assert answer == truth, f"off by {answer - truth:,}"


check(test_1, answer)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Convolution, attention, MLP and norms are used again for every patch. Only one table has a row for
# each patch. How many rows more?
#
# </details>

# %% tags=["solution"]
answer = 412_442_352 + (1024 - 256) * 1152  # 768 more positions: 884,736 parameters, 0.2 %
check(test_1, answer)

# %% [markdown]
# ### Exercise 2 (fill in): look inside without touching
#
# Above we rewrote the loop of the tower to see its states. A **forward hook** does it from outside:
# PyTorch calls it as `hook(module, inputs, output)` after a module has run. Return the list of all
# states, embeddings first, one more for each block. Leave no hook behind.


# %% tags=["exercise"]
def hidden_states(model, pixel_values):
    return None  # your answer


# %% tags=["check"]
def test_2(hidden_states):
    found = hidden_states(tiny, pixels)
    assert isinstance(found, list), "return a list"
    assert len(found) == 5, f"embeddings and four blocks are 5 states, not {len(found)}"
    for depth, (state, true) in enumerate(zip(found, states)):
        assert torch.allclose(state, true, atol=1e-4), f"state {depth} is another one"
    again = hidden_states(tiny, torch.cat([pixels, -pixels]))
    assert len(again) == 5 and again[0].shape[0] == 2, "the second call must give five states too"
    left = [name for name, module in tiny.named_modules() if module._forward_hooks]
    assert not left, f"{len(left)} modules still carry a hook: call handle.remove()"


check(test_2, hidden_states)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `handle = module.register_forward_hook(hook)` for `model.embeddings` and each of
# `model.encoder.layers`. Let the hook append `output` to a list and return nothing. Run the model,
# then `handle.remove()`, best in a `finally`.
#
# </details>


# %% tags=["solution"]
def hidden_states(model, pixel_values):
    found = []
    modules = [model.embeddings, *model.encoder.layers]
    handles = [m.register_forward_hook(lambda m, i, out: found.append(out)) for m in modules]
    try:
        model(pixel_values)
    finally:
        for handle in handles:
            handle.remove()
    return found


check(test_2, hidden_states)

# %% [markdown]
# ### Exercise 3 (break): a wrong block that passes
#
# A test builds your block and the published one with fresh weights, copies the weights over, and
# compares outputs. Write `SneakyLayer`, with the same parameter names, that passes this test but is
# wrong once the model is trained. Change only `forward`. (Then you know what a good test must do.)


# %% tags=["exercise"]
class SneakyLayer(SiglipEncoderLayer):
    pass  # your answer: another forward


# %% tags=["check"]
def test_3(kind):
    config = SiglipVisionConfig(hidden_size=12, intermediate_size=20, num_attention_heads=3)
    for seed in range(3):
        torch.manual_seed(seed)
        honest, sneaky = SiglipEncoderLayer(config), kind(config)
        sneaky.load_state_dict(honest.state_dict())
        x = torch.randn(2, 7, 12)
        with torch.no_grad():
            same = torch.allclose(sneaky(x), honest(x), atol=1e-5)
            assert same, "with fresh weights it must agree"
            for layer in (honest, sneaky):
                torch.manual_seed(seed)
                for weight in layer.parameters():
                    weight += 0.3 * torch.randn_like(weight)  # a stand-in for training
            same = torch.allclose(sneaky(x), honest(x), atol=1e-3)
            assert not same, "after training it still agrees: it is not wrong"


check(test_3, SneakyLayer)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Which parameters are the *same* in every fresh model? What if the wrong one of them is used, or none
# at all?
#
# </details>


# %% tags=["solution"]
class SneakyLayer(SiglipEncoderLayer):
    def forward(self, x):
        x = x + self.self_attn(self.layer_norm2(x))  # fresh norms are all alike: weight 1, bias 0
        return x + self.mlp(self.layer_norm1(x))


# A good test draws all weights at random, those of the norms and the biases too.
check(test_3, SneakyLayer)

# %% [markdown]
# ## Summary
#
# - A block is two additions to a stream: attention fetches from other patches, the MLP thinks about
#   each one alone.
# - The stream keeps patches apart and lets gradients through; norms keep the numbers in range.
#   Pre-norm puts them beside the road.
# - LayerNorm removes mean and size; one last norm stands at the end.
# - The tower is 27 blocks of 15.2 million parameters, two thirds of them MLP.
# - Compare in float32, at every depth, with random norms.

# %% [markdown]
# ## Quiz
#
# **1.** Blocks 5 to 8 of a trained tower are swapped by mistake with fresh blocks whose last
# matrices (`out_proj`, `fc2`) are zero. What comes out?
#
# <details><summary>Answer</summary>
#
# With zero biases too, the blocks add nothing and the stream passes unchanged, as if the tower had
# four blocks fewer. No error, no strange size. Some training recipes start every block in this way.
#
# </details>

# %% [markdown]
# **2.** Why is there a norm after the last block, when every block begins with one?
#
# <details><summary>Answer</summary>
#
# Those norms were for the branches; the stream itself was never normalised and has grown. Whoever
# reads it next (here the projector of [lesson 15](15_model.ipynb)) gets numbers of a known size, as every branch did.
#
# </details>

# %% [markdown]
# **3.** A pixel changes in the top left corner. After how many blocks can the bottom right patch
# know?
#
# <details><summary>Answer</summary>
#
# After one: attention connects every patch with every other. A convolutional network with 3 × 3
# filters needs many layers for this way. (A test of this lesson changes one pixel and checks all
# patches.)
#
# </details>

# %% [markdown]
# ## References
#
# - Dosovitskiy et al. 2021, *An Image is Worth 16x16 Words* (ViT), section 3.1.
# - Zhai et al. 2023, *Sigmoid Loss for Language Image Pre-Training* (SigLIP); Alabdulmohsin et al.
#   2023, *Getting ViT in Shape* (So400m).
# - Xiong et al. 2020, *On Layer Normalization in the Transformer Architecture*;
#   Dong et al. 2021, *Attention is not all you need* (patches becoming equal).
# - Ba, Kiros and Hinton 2016, *Layer Normalization*; Hendrycks and Gimpel 2016, *Gaussian Error
#   Linear Units*.
# - `SiglipVisionTransformer` in transformers; `vit.py` in big_vision.

# %% [markdown] tags=["navigation"]
# [← SigLIP's attention](04_siglip_attention.ipynb) | [contents](00_overview.ipynb) | [Tokenizer →](06_tokenizer.ipynb)
