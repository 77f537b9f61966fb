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
# [← SigLIP's attention](04_siglip_attention.ipynb) | [contents](00_overview.ipynb) | [Tokenizer →](06_tokenizer.ipynb)

# %% [markdown]
# # 5 · SigLIP: how is a vision encoder put together?
#
# *40 minutes* · part I, Seeing
#
# **What you will be able to do**
#
# - say what residual, norm and MLP are each for, and show what happens without them;
# - compute LayerNorm and GELU by hand, and build block and tower from them;
# - account for all 412,442,352 parameters, and for the FLOPs at each picture size;
# - find an error that is too small to be seen in bfloat16.

# %% tags=["map"]
from paligemma.plotting import model_map

model_map("siglip")

# %% [markdown]
# ## Setup
#
# The tower is made of `PatchEmbedding` ([lesson 03](03_patch_embedding.ipynb)) and
# `SiglipAttention` ([lesson 04](04_siglip_attention.ipynb)). The cells that begin with `#| export`
# become the file [siglip.py](../paligemma/siglip.py).

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

import matplotlib.pyplot as plt
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from paligemma.image_processor import ImageProcessor
from paligemma.plotting import COLOURS, CYCLE, check, sample_picture, save_figure, show_images

_ = torch.manual_seed(5)

# %% [markdown]
# ## The problem
#
# One round of attention is not enough: an ear is found from edges, a head from ears and eyes. So we
# stack rounds. But attention only *averages*. Let us do it 27 times with the cat: 16 × 16 patches,
# each one its mean colour, and each round every patch becomes a weighted mean of all.

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
# After three rounds the cat is brown paper. Stacked attention alone forgets. A **block** of the
# encoder adds three things to it, one against each fault:
#
# - attention *replaces* a patch by a mean → **residual**: keep the patch, *add* what was found;
# - sums grow from block to block → **norm**: bring vectors to one size before they are read;
# - a mean contains nothing new → **MLP**: let each patch compute on what it has gathered.

# %% [markdown]
# ## By hand
#
# ### LayerNorm, on four numbers
#
# Subtract the mean; divide by the standard deviation. For 2, 4, 6, 8: the mean is 5, the differences
# are −3, −1, 1, 3, their squares have the mean 5, and $\sqrt5 = 2.236$.

# %%
x = torch.tensor([2.0, 4, 6, 8])
variance = (x - x.mean()).square().mean()
normed = (x - x.mean()) / variance.sqrt()
print("mean", x.mean().item(), " variance", variance.item())
for name, row in {"x": x, "100 · x": 100 * x, "x + 7": x + 7}.items():
    print(f"LayerNorm of {name:8}", [round(n, 3) for n in F.layer_norm(row, (4,)).tolist()])
torch.testing.assert_close(F.layer_norm(x, (4,)), normed)

# %% [markdown]
# Size and offset are gone, the *shape* is left: who is above the mean, and by how much against the
# others. Then each channel gets a learned weight and bias, so that the model may undo what it does
# not want.
#
# A tiny $\varepsilon = 10^{-6}$ is added to the variance: a vector of equal numbers must not be
# divided by zero. The norm works on each patch alone; the other patches and pictures do not matter.

# %% [markdown]
# ### An MLP makes something new
#
# Two channels: *bright* and *striped*, each 0 or 1. "Bright **and** striped" is no weighted mean of
# them. One hidden unit can say it: $4 \cdot \text{bright} + 4 \cdot \text{striped} - 6$, and then
# everything below zero is cut off by the **activation function**. SigLIP's is GELU.

# %%
patches = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]])
hidden = patches @ torch.tensor([4.0, 4]) - 6
print("before:", hidden.int().tolist())
print("after: ", [round(n, 2) for n in F.gelu(hidden, approximate="tanh").tolist()])

# %% [markdown]
# Only the last patch passes. Without the cut, two linear layers in a row would be one linear layer.
#
# **GELU** multiplies $x$ by $\Phi(x)$, the share of a normal distribution that lies below $x$: a
# soft gate. $\Phi$ was slow to compute once, so a formula with tanh took its place:
#
# $$x \cdot \tfrac12\Big(1 + \tanh\big(\sqrt{2/\pi}\,(x + 0.044715\,x^3)\big)\Big)$$

# %%
x = torch.linspace(-5, 5, 401, dtype=torch.float64)
by_formula = x / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
exact, tanh = F.gelu(x), F.gelu(x, approximate="tanh")
torch.testing.assert_close(tanh, by_formula)

fig, (left, right) = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
left.plot(x, x.clamp(min=0), ":", color=COLOURS["muted"], label="ReLU")
left.plot(x, exact, color=COLOURS["vision"], label="GELU, exact")
left.plot(x, tanh, "--", color=COLOURS["language"], label="GELU, tanh")
left.set(xlim=(-4, 3), ylim=(-0.4, 3), title="indistinguishable …")
left.legend()
right.plot(x, 1e4 * (tanh - exact), color=COLOURS["accent"])
right.axhline(0, color=COLOURS["muted"], linewidth=0.8)
right.set(title="… but not equal: tanh − exact", ylabel="× 10⁻⁴")
save_figure(fig, "05_gelu")

# %% [markdown]
# Left: the two lie on each other. Right: they differ by up to 0.0005. SigLIP was trained with the
# tanh formula, so its weights belong to it. Remember the right panel; it comes back as a bug.

# %% [markdown]
# ## As a loop
#
# A block, number by number, except attention, which lesson 04 took apart already. Here is one patch
# at a time:


# %%
def norm_by_loop(row, norm):
    """LayerNorm of one vector."""
    mean = sum(row) / len(row)
    variance = sum((number - mean) ** 2 for number in row) / len(row)
    unit = [(number - mean) / (variance + norm.eps) ** 0.5 for number in row]
    return torch.stack(unit) * norm.weight + norm.bias


def mlp_by_loop(row, fc1, fc2):
    """Each hidden unit: a weighted sum, then the gate. Each output: a weighted sum again."""
    hidden = [sum(row * weights) + bias for weights, bias in zip(fc1.weight, fc1.bias)]
    hidden = F.gelu(torch.stack(hidden), approximate="tanh")
    return torch.stack([sum(hidden * w) + bias for w, bias in zip(fc2.weight, fc2.bias)])


def block_by_loop(x, norm1, attention, norm2, fc1, fc2):
    """float[N, D] → float[N, D]."""
    normed = torch.stack([norm_by_loop(row, norm1) for row in x])
    x = x + attention(normed[None])[0]
    return torch.stack([row + mlp_by_loop(norm_by_loop(row, norm2), fc1, fc2) for row in x])


# %% [markdown]
# Random weights, also for the norms, so that a forgotten one would show.

# %%
N, D, M = 6, 8, 20
norm1, norm2 = nn.LayerNorm(D, eps=1e-6), nn.LayerNorm(D, eps=1e-6)
attention, fc1, fc2 = SiglipAttention(D, 2), nn.Linear(D, M), nn.Linear(M, D)
for weight in (*norm1.parameters(), *norm2.parameters()):
    nn.init.normal_(weight)
x = torch.randn(N, D)
with torch.no_grad():
    slow = block_by_loop(x, norm1, attention, norm2, fc1, fc2)
print(tuple(slow.shape))

# %% [markdown]
# ## Vectorised
#
# With tensors a block is two lines. Read them as sentences: *add what attention finds; add what the
# MLP makes of it.* What is added to, `x`, is called the **residual stream**: nothing ever replaces
# it.

# %%
with torch.no_grad():
    y = x + attention(norm1(x)[None])[0]
    y = y + fc2(F.gelu(fc1(norm2(y)), approximate="tanh"))
torch.testing.assert_close(y, slow)
print("equal to the loop")

# %% [markdown]
# ## The module
#
# First the numbers that fix a tower. A **dataclass** names them once; the defaults are PaliGemma's.
# The number of tokens is *derived*: a config that stores it could contradict itself.


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
# The MLP and the block. Names are those of the published checkpoint.


# %%
#| export
class SiglipMLP(nn.Module):
    """Two linear layers with tanh-approximated GELU between; each patch on its own."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`float[B, N, D]` → `float[B, N, D]`."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


# %%
#| export
class SiglipEncoderLayer(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

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
small = SiglipVisionConfig(
    hidden_size=D, intermediate_size=M, num_attention_heads=2, num_hidden_layers=3, image_size=28
)
layer = SiglipEncoderLayer(small)
layer.layer_norm1, layer.layer_norm2, layer.self_attn = norm1, norm2, attention
layer.mlp.fc1, layer.mlp.fc2 = fc1, fc2
with torch.no_grad():
    torch.testing.assert_close(layer(x[None])[0], slow)
print("equal to the loop;", small.num_image_tokens, "patches for a picture of 28 × 28")

# %% [markdown]
# And the tower: embed, 27 blocks, one last norm, because the stream itself was never normed. Image
# classifiers put a pooling head on top, which makes *one* vector of all. PaliGemma wants all $N$:
# each patch becomes a token for the language model.


# %%
#| export
class SiglipVisionModel(nn.Module):
    """Patch embedding, `num_hidden_layers` blocks, one last layer norm; no pooling head.

    Source: `SiglipVisionTransformer` in transformers, `vit.py` in big_vision.
    """

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = PatchEmbedding(
            config.hidden_size, config.image_size, config.patch_size, config.num_channels
        )
        self.encoder = nn.Module()  # only a name: published keys read encoder.layers.0.…
        self.encoder.layers = nn.ModuleList(
            SiglipEncoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`float[B, 3, H, W]` in -1…1 → `float[B, N, D]`."""
        x = self.embeddings(pixel_values)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


# %%
tower = SiglipVisionModel(small)
pixels = torch.randn(2, 3, 28, 28)
with torch.no_grad():
    out, x = tower(pixels), tower.embeddings(pixels)
    for part in tower.encoder.layers:
        tensors = (part.layer_norm1, part.self_attn, part.layer_norm2, part.mlp.fc1, part.mlp.fc2)
        x = torch.stack([block_by_loop(picture, *tensors) for picture in x])
torch.testing.assert_close(tower.post_layernorm(x), out)
print(tuple(pixels.shape), "→", tuple(out.shape), "equal to three blocks by loop")

# %% [markdown]
# ## Against the reference
#
# `SiglipVisionModel` of transformers in small: width 16, two blocks, weights large enough that all
# parts matter. The file holds its weights, a picture and the output; a test computes it afresh. The
# names are the same, so `load_state_dict` takes them strictly.

# %% tags=["nbval-ignore-output"]
stored = load_file("reference/siglip.safetensors")
reference_config = SiglipVisionConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    image_size=28, patch_size=7,
)  # fmt: skip
ours = SiglipVisionModel(reference_config)
ours.load_state_dict({name: stored[name] for name in ours.state_dict()})
with torch.no_grad():
    difference = (ours(stored["pixel_values"]) - stored["output"]).abs().max().item()
assert difference <= 1e-5
print(f"largest difference: {difference:.1e}")

# %% [markdown]
# ## See it: the cat in the residual stream
#
# The published weights do not fit into a lesson. But a *random* tower shows well what the wiring
# does by itself. Ours has 27 blocks of width 192, weights drawn as SigLIP's are before training
# (Xavier), and a position table that is smooth, as a learned one is (lesson 03).


# %%
def fresh(image_size):
    """A tower as before training, with waves over the picture for positions."""
    torch.manual_seed(0)
    tower = SiglipVisionModel(SiglipVisionConfig(192, 717, 27, 4, image_size=image_size))
    for name, weight in tower.named_parameters():
        if weight.dim() > 1:
            nn.init.xavier_uniform_(weight)
        elif "norm" not in name:
            nn.init.zeros_(weight)
    side = image_size // 14
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)) / side  # (N, 2)
    waves = 2 * math.pi * (places @ torch.randn(2, 192) + torch.rand(192))
    tower.embeddings.position_embedding.weight.data = waves.cos() * (2 / 192) ** 0.5
    return tower


# %% [markdown]
# 192 channels cannot be seen; three can. **PCA** finds the three directions in which patches differ
# most, and we paint them red, green and blue. Like colours mean like vectors. The second tower has
# the same weights, but its blocks *replace*: no residual.


# %%
def block_without_residual(layer, x):
    return layer.mlp(layer.layer_norm2(layer.self_attn(layer.layer_norm1(x))))


def paint(x):
    """float[N, D] → float[rows, columns, 3]: the three main directions as colours."""
    x = x - x.mean(dim=0)
    U, S, _ = torch.linalg.svd(x, full_matrices=False)
    first = U[:, :3] * S[:3]
    side = round(len(x) ** 0.5)
    return (first / first.std(dim=0) / 4 + 0.5).clamp(0, 1).reshape(side, side, 3)


def left_over(x):
    """What is left of the differences between patches, as a share of their size."""
    return ((x - x.mean(dim=-2, keepdim=True)).norm() / x.norm()).item()


# %%
wide = fresh(448)
big_cat = ImageProcessor(448)(sample_picture("cat"))
pictures, titles = [], []
with torch.no_grad():
    for block in (SiglipEncoderLayer.forward, block_without_residual):
        x = wide.embeddings(big_cat)  # (1, 1024, 192)
        for number in range(28):
            if number in (0, 1, 3, 9, 27):
                pictures.append(paint(x[0]))
                titles.append(f"{number} blocks: {left_over(x):.0e}")
            x = block(wide.encoder.layers[number], x) if number < 27 else x
fig = show_images(pictures, titles, columns=5, height=1.3)
save_figure(fig, "05_stream.png")

# %% [markdown]
# **What to notice.** Above, our block: after 27 random blocks the cat's face is still there, with
# both eyes. Nothing was *learned*; the residual carried it. Below, without residual: noise.
#
# The number is what is left of the differences between patches. Above it is still several per cent.
# Below, after three blocks, all patches are equal up to rounding; the colours magnify that rounding.

# %% [markdown]
# ### Where to put the norm
#
# The first transformer (2017) added first and normed then: **post-norm**, $\mathrm{norm}(x + f(x))$.
# SigLIP norms only what a part *reads*: **pre-norm**, $x + f(\mathrm{norm}(x))$. It looks like a
# matter of taste. We run both through 27 fresh blocks, also a tower without any norm, and send a
# gradient back.


# %%
def block_post_norm(layer, x):
    x = layer.layer_norm1(x + layer.self_attn(x))
    return layer.layer_norm2(x + layer.mlp(x))


def block_without_norm(layer, x):
    x = x + layer.self_attn(x)
    return x + layer.mlp(x)


def through(block):
    """Per block: size of a vector, what is left of differences, gradient at the queries."""
    tower = fresh(224)
    stream = [tower.embeddings(cat)]
    for layer in tower.encoder.layers:
        stream.append(block(layer, stream[-1]))
    out = tower.post_layernorm(stream[-1])
    (out * torch.randn(out.shape)).sum().backward()
    gradients = [layer.self_attn.q_proj.weight.grad.norm() for layer in tower.encoder.layers]
    return [x.norm(dim=-1).mean().item() for x in stream], [*map(left_over, stream)], gradients


# %%
kinds = {
    "pre-norm": SiglipEncoderLayer.forward,
    "post-norm": block_post_norm,
    "no residual": block_without_residual,
    "no norm": block_without_norm,
}
fig, axes = plt.subplots(1, 3, figsize=(9.2, 2.9), layout="constrained")
titles = ["size of a vector", "differences left", "gradient at the queries"]
results = {name: through(block) for name, block in kinds.items()}
for (name, curves), colour in zip(results.items(), CYCLE):
    for axis, title, curve in zip(axes, titles, curves):
        values = torch.tensor(curve).clamp(min=1e-8)
        values[~values.isfinite()] = torch.nan  # overflowed: leave a gap
        axis.plot(range(28 - len(values), 28), values, color=colour, label=name)
        axis.set(title=title, yscale="log", xlabel="block")
axes[0].legend(fontsize=8)
save_figure(fig, "05_pre_norm")

# %% [markdown]
# **Left:** without norm sizes explode. With pre-norm the stream grows slowly, since each block adds
# one more piece. **Middle:** post-norm shrinks the stream in every block, and with it the patches'
# differences; only pre-norm keeps them. **Right:** where patches are equal, it does not matter whom
# one looks at, so queries get no gradient. In pre-norm all 27 blocks can learn from the first step.

# %%
last = {name: curves[2][-1] for name, curves in results.items()}
assert last["pre-norm"] > 100 * last["post-norm"] and last["pre-norm"] > 100 * last["no residual"]
assert results["pre-norm"][1][-1] > 0.02 > 0.002 > results["post-norm"][1][-1]
assert results["no norm"][0][-1] > 1000 * results["pre-norm"][0][-1]

# %% [markdown]
# ## At full size
#
# All parameters of the published shape, counted part by part on the meta device.

# %%
with torch.device("meta"):
    full = SiglipVisionModel(SiglipVisionConfig())
groups = {"patch_embedding": "patches", "position": "positions", "self_attn": "attention × 27"}
groups |= {"mlp": "MLP × 27", "norm": "norms"}
counts = dict.fromkeys(groups.values(), 0)
for name, weight in full.named_parameters():
    counts[next(group for key, group in groups.items() if key in name)] += weight.numel()
assert sum(counts.values()) == 412_442_352

fig, axis = plt.subplots(figsize=(6.6, 2.4), layout="constrained")
for row, count in enumerate(counts.values()):
    axis.barh(row, count / 1e6, color=COLOURS["vision"])
    axis.text(count / 1e6 + 3, row, f"{count:,}  ({count / 412_442_352:.1%})", va="center")
axis.set_yticks(range(len(counts)), counts)
axis.invert_yaxis()
axis.set(xlim=(0, 400), xlabel="million parameters", title="412,442,352 in all")
save_figure(fig, "05_parameters")

# %% [markdown]
# Two thirds sit in the MLPs. People speak of attention; the weights are elsewhere.
#
# And the work for one picture, by PyTorch's own counter. The last column compares it with the rule
# of thumb "two FLOPs for each parameter and token".

# %%
print("size  tokens  GFLOP  share of scores and means  against 2 · parameters · tokens")
for size in (224, 448, 896):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        full = SiglipVisionModel(SiglipVisionConfig(image_size=size))
        full(torch.empty(1, 3, size, size))
    N, flops = full.config.num_image_tokens, counter.get_total_flops()
    square = 27 * 4 * N**2 * 1152
    rule = 2 * 412_442_352 * N
    print(f"{size:4} {N:7} {flops / 1e9:6,.0f} {square / flops:26.0%} {flops / rule:28.2f}")

# %% [markdown]
# At 224 the rule holds within some per cent; at 896 attention's square part makes it wrong. From 224
# to 896 the picture has 16 times the tokens and costs more than 20 times the work.
#
# The time of the real thing on this machine: one block of full size, times 27.

# %% tags=["nbval-ignore-output"]
layer = SiglipEncoderLayer(SiglipVisionConfig())
x = torch.randn(1, 256, 1152)
flops = 8 * 256 * 1152**2 + 4 * 256**2 * 1152 + 4 * 256 * 1152 * 4304
for dtype in (torch.float32, torch.bfloat16):
    layer, x, times = layer.to(dtype), x.to(dtype), []
    with torch.no_grad():
        for _ in range(4):
            start = time.perf_counter()
            layer(x)
            times.append(time.perf_counter() - start)
    best = min(times)
    print(
        f"{dtype}: one block {1000 * best:.0f} ms, 27 blocks {27 * best:.2f} s, "
        f"{flops / best / 1e9:.0f} GFLOP/s, weights {412.4 * x.element_size():.0f} MB"
    )

# %% [markdown]
# The tower runs *once* for each picture, however long the answer. (Running it again for each new
# word is a bug that only the clock sees.)

# %% [markdown]
# ## A bug people really make
#
# A colleague writes the same tower. All weights load strictly, all shapes are right. The test
# compares in bfloat16, as the model will run, with a tolerance of 2 %. It passes:


# %%
class ColleaguesMLP(SiglipMLP):
    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def distance(a, b):
    """Relative distance of two tensors."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


ours = fresh(224)
theirs = copy.deepcopy(ours)
for layer in theirs.encoder.layers:
    layer.mlp.__class__ = ColleaguesMLP
with torch.no_grad():
    a, b = (copy.deepcopy(model).bfloat16()(cat.bfloat16()) for model in (theirs, ours))
print("bfloat16, within 2 %:", distance(a, b) < 0.02)

# %% [markdown]
# Later somebody compares in float32 and finds a difference in the fourth digit. "Rounding", says the
# colleague. Is it? There is a way to know: *measure* rounding. Run the same model in float64 and see
# how far float32 and bfloat16 are from it, block by block.


# %%
def record(model, dtype):
    """The stream after the embedding and after each block."""
    model = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        stream = [ours.embeddings(cat).to(dtype)]
        for layer in model.encoder.layers:
            stream.append(layer(stream[-1]))
    return stream[1:]


truth = record(ours, torch.float64)
runs = {
    "rounding of bfloat16": record(ours, torch.bfloat16),
    "the colleague's, float64": record(theirs, torch.float64),
    "rounding of float32": record(ours, torch.float32),
}
fig, axis = plt.subplots(figsize=(6.8, 2.9), layout="constrained")
errors = {name: [distance(a, b) for a, b in zip(run, truth)] for name, run in runs.items()}
for (name, error), colour in zip(errors.items(), ("muted", "bad", "inside")):
    axis.plot(range(1, 28), error, color=COLOURS[colour])
    axis.text(27.4, error[-1], name, va="center", color=COLOURS[colour])
axis.set(yscale="log", xlim=(1, 27), ylim=(1e-7, 1e-1), xlabel="block", ylabel="relative error")
save_figure(fig, "05_gelu_bug")

# %%
rounding, bug, coarse = (errors[name][-1] for name in ("rounding of float32", *list(runs)[1::-1]))
assert bug > 100 * rounding and coarse > 10 * bug

# %% [markdown]
# The difference is hundreds of times larger than float32's rounding: **not** rounding. And it lies
# far *below* that of bfloat16: no test in bfloat16 can ever see it. It starts in the first block and
# grows slowly; it does not explode, and neither do the answers change much.
#
# Where does it come from? Walk through the first block and stop at the first part that differs.

# %%
with torch.no_grad():
    x = ours.embeddings(cat)
    p, q = ours.encoder.layers[0], theirs.encoder.layers[0]
    after_attention = [x + layer.self_attn(layer.layer_norm1(x)) for layer in (p, q)]
    after_mlp = [layer.mlp(layer.layer_norm2(after_attention[0])) for layer in (p, q)]
print("equal after attention:", torch.equal(*after_attention))
print("equal after the MLP:  ", torch.equal(*after_mlp))

one = copy.deepcopy(q.mlp)  # an MLP that copies: what does it do to single numbers?
one.fc1, one.fc2 = nn.Identity(), nn.Identity()
for number in (-2.7, -1.0, 0.0, 1.0, 2.7):
    want = F.gelu(torch.tensor(number), approximate="tanh").item()
    print(f"{number:5}: is {one(torch.tensor(number)).item():.4f}, wanted {want:.4f}")

# %% [markdown]
# It is GELU, without `approximate="tanh"`: PyTorch's default is the exact one. In checkpoints the
# right one is called `gelu_pytorch_tanh`.
#
# Does it matter? For one answer, hardly. But whoever accepts $10^{-4}$ as "rounding" has no way left
# to notice the next bug of that size. **Compare in float32, and measure the noise you claim.**

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): from 224 to 448 pixels
#
# The same tower for pictures of 448 × 448. Without running anything: how many tokens come out, and
# how many *more* parameters does it have?

# %% tags=["exercise"]
tokens = None  # a number
more_parameters = None  # a number, such as 1152 * 3


# %% tags=["check"]
def test_1(tokens, more_parameters):
    assert tokens is not None and more_parameters is not None, "give two numbers"
    with torch.device("meta"):
        towers = [SiglipVisionModel(SiglipVisionConfig(image_size=size)) for size in (224, 448)]
    before, after = (sum(w.numel() for w in tower.parameters()) for tower in towers)
    assert tokens == towers[1].config.num_image_tokens, "(size / patch)², both ways"
    assert more_parameters != 0, "nearly: one tensor does depend on the number of patches"
    assert more_parameters == after - before, "only the position table grows: rows × width"


check(test_1, tokens, more_parameters)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Which parts know how many patches there are? Not the convolution, not attention, not the MLP.
#
# </details>

# %% tags=["solution"]
tokens = (448 // 14) ** 2
more_parameters = (1024 - 256) * 1152  # 884,736: PaliGemma at 448 is larger by just these
check(test_1, tokens, more_parameters)

# %% [markdown]
# ### Exercise 2 (fill in): features from any depth
#
# Some models read the tower before its end (LLaVA takes the last block but one). Write
# `features(tower, pixel_values, depth)`: the stream after `depth` blocks, **without** the last norm.
# 0 is the embedding; −1 means after the last block, −2 after the last but one, as in Python's lists.


# %% tags=["exercise"]
def features(tower, pixel_values, depth):
    return None  # your answer


# %% tags=["check"]
def test_2(features):
    tower, pixels = SiglipVisionModel(small), torch.randn(2, 3, 28, 28)
    nn.init.normal_(tower.post_layernorm.weight)
    before = tower(pixels)
    stream = [tower.embeddings(pixels)]
    for layer in tower.encoder.layers:
        stream.append(layer(stream[-1]))
    for depth in (0, 1, 3, -1, -2, -4):
        found = features(tower, pixels, depth)
        assert found is not None, "return the stream"
        normed = tower.post_layernorm(stream[depth])
        assert not torch.allclose(found, normed, atol=1e-4), "the last norm does not belong here"
        assert torch.allclose(found, stream[depth], atol=1e-5), f"wrong at depth {depth}"
    assert torch.equal(tower(pixels), before), "the tower itself must stay as it is"


check(test_2, features)

# %% [markdown]
# <details><summary>Hint</summary>
#
# With three blocks there are four streams: after 0, 1, 2 and 3 blocks. A negative depth counts among
# those four.
#
# </details>


# %% tags=["solution"]
def features(tower, pixel_values, depth):
    layers = tower.encoder.layers
    depth = range(len(layers) + 1)[depth]  # −1 → 3 when there are three blocks
    x = tower.embeddings(pixel_values)
    for layer in layers[:depth]:
        x = layer(x)
    return x


check(test_2, features)

# %% [markdown]
# ### Exercise 3 (extend): fold the norm into the layer behind it
#
# LayerNorm's learned weight $g$ and bias $b$ are followed by a linear layer. Both are linear, so for
# inference they can be *one*. Write `fold(norm, linear)`: a **new** linear layer that gives on the
# bare normed vector, `F.layer_norm(x, (D,))`, what `linear(norm(x))` gave.


# %% tags=["exercise"]
def fold(norm, linear):
    return None  # a new nn.Linear


# %% tags=["check"]
def test_3(fold):
    for D, M, eps in ((8, 5, 1e-6), (3, 12, 1e-2)):
        norm, linear, x = nn.LayerNorm(D, eps=eps), nn.Linear(D, M), torch.randn(2, 7, D)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        expected = linear(norm(x))
        folded = fold(norm, linear)
        assert isinstance(folded, nn.Linear), "return an nn.Linear"
        assert torch.allclose(linear(norm(x)), expected), "the old layers were changed: copy first"
        found = folded(F.layer_norm(x, (D,), eps=eps))
        slope = found - folded.bias - (expected - expected.mean((0, 1)))
        assert found.shape == expected.shape and slope.isfinite().all(), "wrong shape"
        assert torch.allclose(found, expected, atol=1e-4), "another result than linear(norm(x))"


check(test_3, fold)

# %% [markdown]
# <details><summary>Hint</summary>
#
# $W(g \odot u + b) + c = (W\,\mathrm{diag}(g))\,u + (W b + c)$. In PyTorch `weight` has a row for
# each output: $g$ multiplies its columns.
#
# </details>


# %% tags=["solution"]
def fold(norm, linear):
    folded = nn.Linear(linear.in_features, linear.out_features)
    with torch.no_grad():
        folded.weight.copy_(linear.weight * norm.weight)
        folded.bias.copy_(linear.weight @ norm.bias + linear.bias)
    return folded


check(test_3, fold)

# %% [markdown]
# ## Summary
#
# - Attention gathers, the MLP computes; both only *add* to the residual stream.
# - The residual keeps patches distinct through 27 blocks, even before anything is learned.
# - Norm what a part reads (pre-norm), and norm the stream once at the end.
# - 412,442,352 parameters, two thirds of them in MLPs; the tower runs once a picture.
# - Rounding is a number you can measure. What is larger is a bug.

# %% [markdown]
# ## Quiz
#
# **1.** Set `out_proj` and `fc2` of all blocks to zero. What does the tower compute?
#
# <details><summary>Answer</summary>
#
# The last norm of the patch embedding: each block adds zero. A pre-norm block can be "nothing", and
# learning starts from there. A post-norm block cannot: it norms in any case.
#
# </details>

# %% [markdown]
# **2.** In which parts of the tower can one patch influence another?
#
# <details><summary>Answer</summary>
#
# In attention, and nowhere else. Norms, MLPs and residuals treat each patch by itself. So after one
# block every patch can know of every other; the further blocks deepen it.
#
# </details>

# %% [markdown]
# **3.** Why is there a last norm with pre-norm, and none with post-norm?
#
# <details><summary>Answer</summary>
#
# In pre-norm nothing ever norms the stream; it grows from block to block (left panel). Whoever reads
# the tower wants one fixed size. In post-norm each block ends with a norm already.
#
# </details>

# %% [markdown]
# ## References
#
# - Zhai et al. 2023, *Sigmoid Loss for Language Image Pre-Training* (SigLIP); Alabdulmohsin et al.
#   2023, *Getting ViT in Shape* (So400m).
# - Ba et al. 2016, *Layer Normalization*; Hendrycks and Gimpel 2016, *Gaussian Error Linear Units*,
#   section 2.
# - Xiong et al. 2020, *On Layer Normalization in the Transformer Architecture* (pre and post).
# - Dong et al. 2021, *Attention is not all you need: pure attention loses rank doubly exponentially
#   with depth*.
# - `SiglipVisionTransformer` in transformers, `modeling_siglip.py`; `vit.py` in big_vision.

# %% [markdown] tags=["navigation"]
# [← SigLIP's attention](04_siglip_attention.ipynb) | [contents](00_overview.ipynb) | [Tokenizer →](06_tokenizer.ipynb)
