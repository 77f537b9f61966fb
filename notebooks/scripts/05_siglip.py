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
# *45 minutes* · part I, Seeing
#
# **What you will be able to do**
#
# - normalise four numbers with a pencil, and say what each part is for;
# - say what the additions and what the norms do for a stack of 27 blocks, and show it;
# - build the tower and account for its 412,442,352 parameters;
# - watch a trained head find the second dog, and catch a part that loads but is never used.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("siglip")

# %% [markdown]
# ## Setup
#
# From earlier lessons: the drawing helpers ([lesson 01](01_plotting.ipynb)), the `ImageProcessor`
# ([lesson 02](02_image_processor.ipynb)), `PatchEmbedding` ([lesson 03](03_patch_embedding.ipynb))
# and `SiglipAttention` ([lesson 04](04_siglip_attention.ipynb)). The cells that begin with
# `#| export` become the file [siglip.py](../paligemma/siglip.py).

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
from importlib import resources

import matplotlib.pyplot as plt
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from paligemma.image_processor import ImageProcessor
from paligemma.plotting import show_attention, show_images
from paligemma.support.course import DIVERGING, check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS

_ = torch.manual_seed(5)

# %% [markdown]
# ## The problem
#
# One round of attention ([lesson 04](04_siglip_attention.ipynb)) is not enough: an ear is found from
# edges, a head from ears and eyes. So we stack rounds. But attention only *averages*. Let us do it 27
# times with the cat: each patch begins as its mean colour, and in each round becomes a weighted mean
# of all.

# %%
cat = ImageProcessor(224)(sample_picture("cat"))  # [1, 3, 224, 224]
x = F.unfold(cat, 14, stride=14)[0].T.reshape(256, 3, 196).mean(dim=2)  # [N, 3] colours
rounds = [x]
for _ in range(27):
    x = (16 * x @ x.T / 3**0.5).softmax(dim=-1) @ x  # attention with q = k = v
    rounds.append(x)
spread = [colours.std(dim=0).mean().item() for colours in rounds]
assert spread[3] < spread[0] / 6 and spread[9] < spread[0] / 1000

# %% tags=["hide-input"]
shown = (0, 1, 3, 9, 27)
pictures = [(rounds[number].reshape(16, 16, 3) + 1) / 2 for number in shown]
titles = [f"after {number} rounds" for number in shown]
save_figure(show_images(pictures, titles, columns=5), "05_collapse.png")

# %% [markdown]
# After three rounds the cat is brown paper: less than a sixth of the differences is left; after nine,
# next to nothing. Two things are missing: a way to *keep* what a patch has, and something that makes
# anything *new*.
#
# So a round, called a **block**, has two halves, and both **add** to what is there: attention fetches
# from other patches; an **MLP** (multi-layer perceptron) computes on each patch alone. A **norm**
# keeps the numbers in range. There are two ways to wire it:

# %% tags=["hide-input"]
ink = COLOURS["ink"]


def box(colour, shape):
    style = f"{shape},pad=0.3"
    return {"boxstyle": style, "facecolor": COLOURS["paper"], "edgecolor": COLOURS[colour]}


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
            axis.text(x, y, text, ha="center", va="center", fontsize=10, bbox=box(fill, "round"))
    axis.set(xlim=(-0.4, 10.4), ylim=(-0.6, 2), title=title)
    axis.set_axis_off()


fig, axes = plt.subplots(1, 2, figsize=(9.6, 2.1), layout="constrained")
draw_block(axes[0], "SigLIP: norms beside the stream (pre-norm)", True)
draw_block(axes[1], "the first transformer: norms on the stream (post-norm)", False)
save_figure(fig, "05_block")

# %% [markdown]
# Follow the thick line. It is the **residual stream**, or just the stream: one vector a patch, to
# which every half-round *adds* something. Nothing is ever replaced. A branch reads the stream,
# computes a correction, and adds it back.
#
# On the left the line is free from end to end: that is **pre-norm**. On the right each norm stands
# across it. We shall measure what that changes. First the three new parts: norm, GELU, MLP.

# %% [markdown]
# ## By hand
#
# ### LayerNorm, on four numbers
#
# **LayerNorm** takes the mean and the size out of a vector. Take $x = (9, 1, 3, 3)$. Mean:
# $16 / 4 = 4$. Subtract it: $(5, -3, -1, -1)$. Mean of the squares: $(25 + 9 + 1 + 1)/4 = 9$. Its
# root, 3, is the typical size. Divide: $(1.67, -1, -0.33, -0.33)$.

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
# **GELU**: it lets large numbers through and holds negative ones back, and turns softly from one to
# the other. SigLIP uses the form that is computed with tanh.
# [Lesson 08](08_geglu.ipynb) has the formula, and what happens to those who take the other form.

# %%
z = torch.tensor([-3.0, -1, 0, 1, 3])
print([round(v, 2) for v in F.gelu(z, approximate="tanh").tolist()])

# %% [markdown]
# ## As a loop
#
# One patch after the other, one neuron after the other. A **neuron** of the MLP is a row of the first
# matrix (how well does the patch match?) and a column of the second (what to add if so).


# %%
def layer_norm_loop(x, weight, bias, eps=1e-6):
    """float[D]: one number after the other."""
    mean = sum(x) / len(x)
    size = (sum((v - mean) ** 2 for v in x) / len(x) + eps) ** 0.5
    return torch.stack([(v - mean) / size * w + b for v, w, b in zip(x, weight, bias)])


# %%
def mlp_loop(x, fc1, fc2):
    """float[D] → float[D]: each neuron matches, bends, and adds its own column."""
    out = fc2.bias.clone()
    for neuron in range(len(fc1.weight)):
        match = sum(a * b for a, b in zip(fc1.weight[neuron], x)) + fc1.bias[neuron]
        out += F.gelu(match, approximate="tanh") * fc2.weight[:, neuron]
    return out


# %% [markdown]
# A whole block, on $N = 5$ patches of width $D = 6$ with 9 neurons. Everything gets random weights,
# the norms too: a norm of ones and zeros would hide mistakes.

# %%
norm1, norm2 = nn.LayerNorm(6, eps=1e-6), nn.LayerNorm(6, eps=1e-6)
attention, fc1, fc2 = SiglipAttention(6, 2), nn.Linear(6, 9), nn.Linear(9, 6)
for part in (norm1, norm2, attention, fc1, fc2):
    for weight in part.requires_grad_(False).parameters():
        weight.normal_(std=0.7)

# %%
stream = torch.randn(5, 6)  # [N, D]
calm = torch.stack([layer_norm_loop(x, norm1.weight, norm1.bias) for x in stream])
slow = stream + attention(calm[None])[0]
for n in range(5):
    slow[n] += mlp_loop(layer_norm_loop(slow[n], norm2.weight, norm2.bias), fc1, fc2)
print(tuple(slow.shape))

# %% [markdown]
# ## Vectorised
#
# PyTorch's norm takes all patches at once, and each patch times each neuron is one matrix product.
# The block becomes two lines, the same two as in the picture:

# %%
x = stream[None]  # [B, N, D]
x = x + attention(norm1(x))
fast = x + fc2(F.gelu(fc1(norm2(x)), approximate="tanh"))  # [B, N, D]
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
torch.testing.assert_close(block(stream[None])[0], slow, atol=1e-5, rtol=1e-5)
print("module, tensors and loop agree")

# %% [markdown]
# ### Why this wiring? An experiment before any training
#
# Stack 27 blocks with fresh random weights and wire them five ways. All five use the *same* weights,
# drawn by Xavier's rule, as SigLIP's training does.


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


# %%
config = SiglipVisionConfig(hidden_size=64, intermediate_size=256, num_attention_heads=4)
layers = nn.ModuleList(SiglipEncoderLayer(config) for _ in range(27)).double()
for name, weight in layers.named_parameters():
    if weight.dim() == 2:
        nn.init.xavier_uniform_(weight)
    elif "norm" not in name:
        nn.init.zeros_(weight)  # biases; norms keep weight 1 and bias 0

# %% [markdown]
# Forwards, two questions: how large are the numbers, and how different are the patches of one picture
# still (their distance from their mean, as a share of their size)? Backwards one: send a random
# gradient in at the end; how much of it arrives at each depth?

# %%
start, pull = torch.randn(2, 4, 16, 64, dtype=torch.double)  # two tensors [B, N, D]


def measure(way):
    """Three numbers at each depth: size, how different patches are, gradient that arrives."""
    states = [start.clone().requires_grad_()]
    for layer in layers:
        states.append(wired(layer, states[-1], way))
    gradients = torch.autograd.grad((states[-1] * pull).sum(), states)
    size = torch.stack([s.norm() for s in states])
    apart = torch.stack([(s - s.mean(dim=1, keepdim=True)).norm() for s in states])
    arrives = torch.stack([g.norm() for g in gradients])
    apart = (apart / size).clamp(min=1e-12)  # below this is rounding
    return torch.stack([size / start.norm(), apart, arrives / pull.norm()]).detach()


# %%
WAYS = ("neither", "norm only", "stream only", "post-norm", "pre-norm")
measured = {way: measure(way) for way in WAYS}
print("after 27 blocks    size   patches differ   gradient at the start")
for way, (size, apart, gradient) in measured.items():
    print(f"{way:12} {size[-1]:10.0e} {apart[-1]:12.0e} {gradient[0]:20.0e}")

# %% tags=["hide-input"]
colours = ["muted", "accent", "bad", "language", "vision"]
titles = ["size of the stream", "how different patches are", "gradient that arrives"]
fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.3), layout="constrained")
for index, (axis, title) in enumerate(zip(axes, titles)):
    for way, colour in zip(WAYS, colours):
        width = 2.6 if way == "pre-norm" else 1.5
        axis.plot(measured[way][index], color=COLOURS[colour], lw=width, label=way)
    axis.set(yscale="log", title=title, xlabel="after block", xticks=[0, 9, 18, 27])
axes[0].set_ylim(1e-6, 1e8)
axes[1].set_ylim(1e-6, 3)
axes[2].set_ylim(1e-8, 1e8)
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
save_figure(fig, "05_wiring")

# %%
end = {way: values[:, -1] for way, values in measured.items()}  # size, apart, gradient
first = {way: values[2, 0] for way, values in measured.items()}  # the gradient at the start
assert end["stream only"][0] > 1e4 and first["stream only"] > 1e7  # explodes both ways
assert end["neither"][0] < 1e-8 and first["neither"] < 1e-8  # dies out both ways
assert measured["norm only"][1, 5] < 1e-5 and end["post-norm"][1] < 1e-3
assert 0.25 < end["pre-norm"][1] < 0.4
for way in ("norm only", "post-norm", "pre-norm"):
    assert 0.1 < end[way][0] < 10 and 0.1 < first[way] < 10

# %% [markdown]
# **What to notice.** *Norms* keep size and gradient in range: with the stream alone both explode; with
# neither, all dies out. The *stream* keeps patches apart: without it they are equal after five blocks.
#
# Both wirings that have both keep the gradient. But post-norm shrinks the old content at every norm,
# and at the end patches differ by less than a thousandth; pre-norm keeps about a third. So the norms
# stand *beside* the stream.

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
model = SiglipVisionModel(SiglipVisionConfig(16, 24, 3, 4, image_size=21, patch_size=7))
weights = {k.removeprefix("model."): v for k, v in stored.items() if k.startswith("model.")}
_ = model.load_state_dict(weights)
_ = model.requires_grad_(False)

# %% tags=["nbval-ignore-output"]
states = [model.embeddings(stored["pictures"])]
for layer in model.encoder.layers:
    states.append(layer(states[-1]))
gaps = [(state - stored[f"state.{i}"]).abs().max().item() for i, state in enumerate(states)]
gaps.append((model(stored["pictures"]) - stored["output"]).abs().max().item())
print("patches, three blocks, last norm:", [f"{gap:.0e}" for gap in gaps])
assert max(gaps) <= 1e-5

# %% [markdown]
# ## See it: what a trained tower has learned
#
# Random weights have nothing to show. But a small PaliGemma ships with this course, trained on
# pictures of emoji: 4 blocks of width 128, pictures of 112 pixels, 8 × 8 patches. We take its vision
# weights straight from the file. ([Lesson 16](16_checkpoint.ipynb) does this for whole models.)

# %%
tiny = SiglipVisionModel(SiglipVisionConfig(128, 512, 4, 4, image_size=112)).requires_grad_(False)
prefix = "vision_tower.vision_model."
path = resources.files("paligemma") / "assets" / "tiny" / "model.safetensors"
stored = load_file(str(path)).items()
trained = {k.removeprefix(prefix): v.float() for k, v in stored if k.startswith(prefix)}
print(len(trained), "tensors:", tiny.load_state_dict(trained))

# %% [markdown]
# We run it block by block, keep every state of the stream, and compute each head's attention weights
# as in [lesson 04](04_siglip_attention.ipynb).


# %%
def look(name):
    """States of the stream, float[B, N, D] each; weights of each head, [block, H, N, N]."""
    states, weights = [tiny.embeddings(ImageProcessor(112)(sample_picture(name)))], []
    for layer in tiny.encoder.layers:
        x, attn = layer.layer_norm1(states[-1]), layer.self_attn
        q, k = attn.split_heads(attn.q_proj(x)), attn.split_heads(attn.k_proj(x))
        weights.append((q @ k.transpose(-1, -2) / attn.head_dim**0.5).softmax(dim=-1)[0])
        states.append(layer(states[-1]))
    return states, torch.stack(weights)


states, looks = look("scene")
print(len(states), "states of", tuple(states[0].shape), "and weights", tuple(looks.shape))

# %% [markdown]
# ### What does one dog's ear look at?
#
# The square marks a patch of the right dog's ear. Above, the four heads of the first block; below,
# those of the last.


# %% tags=["hide-input"]
def picture(name):
    return (ImageProcessor(112)(sample_picture(name))[0].permute(1, 2, 0) + 1) / 2


ASKS = (5, 5)  # row, column


def mark(axis):
    place = (14 * ASKS[1], 14 * ASKS[0])
    axis.add_patch(plt.Rectangle(place, 13, 13, fill=False, edgecolor="white", linewidth=1.5))


asked = looks[[0, 3], :, 8 * ASKS[0] + ASKS[1]].flatten(0, 1)  # [2 · H, N]
titles = [f"block {block}, head {head}" for block in (1, 4) for head in (1, 2, 3, 4)]
fig = show_attention(picture("scene"), asked, titles, columns=4)
for axis in fig.axes:
    mark(axis)
fig.set_size_inches(9.5, 5.2)
save_figure(fig, "05_heads.png")

# %% [markdown]
# In the first block the weight is spread over nearly everything. In the last, heads 2, 3 and 4 light
# up **the other dog** (3 and 4 the rest of this one, too). Is it chance? We sum the weights over the patches of each thing: from all of
# the right dog's patches to the left dog's four, and the same from the cat. A head that did not care
# would give four patches of 64 a share of 6 %.

# %%
RIGHT = [38, 39, 45, 46, 47, 54]  # patches of the right dog
LEFT = [19, 20, 27, 28]
CAT = [32, 33, 40, 41, 42, 48, 49]


def share(weights, asking, asked):
    """Mean share of the weight that `asking` patches give to `asked` ones, for each head."""
    return weights[:, asking][:, :, asked].sum(dim=-1).mean(dim=-1)


dog_to_dog, cat_to_dog = share(looks[3], RIGHT, LEFT), share(looks[3], CAT, LEFT)
print("block 4, head:        1     2     3     4")
print("right dog → left dog", "".join(f"{s:6.0%}" for s in dog_to_dog))
print("cat → left dog      ", "".join(f"{s:6.0%}" for s in cat_to_dog))
assert (dog_to_dog[1:] > 5 * 4 / 64).all() and (dog_to_dog[1:] > 2 * cat_to_dog[1:]).all()
assert looks[3, 1:, 45][:, LEFT].sum(dim=1).min() > 0.2  # the ear alone, too
assert looks[3, 2:, 45][:, RIGHT].sum(dim=1).min() > 0.2

# %% [markdown]
# It is not chance: heads 2, 3 and 4 give the other dog at least five times an equal share, and the
# cat's patches give it less than half as much.

# %%
every = list(range(64))
print("all patches → the three things, heads 1 to 4:")
for block in (0, 3):
    to_things = share(looks[block], every, RIGHT + LEFT + CAT)
    print(f"block {block + 1}", "".join(f"{s:6.0%}" for s in to_things))
assert to_things[2:].min() > 0.8

# %% [markdown]
# Heads 3 and 4 have become heads for *things*: 17 of 64 patches hold an animal, and get more than four
# fifths of the weight of **all** patches. Is it only this picture? In another one there are a rocket
# and two balloons; from one balloon's patches to the other's four:

# %%
_, others = look("scene3")  # two balloons and a rocket
balloons = share(others[3], [29, 30, 37, 38, 46], [11, 12, 19, 20])
print("balloon → other balloon", "".join(f"{s:6.0%}" for s in balloons))
assert (balloons[2:] > 4 * 4 / 64).all()

# %% [markdown]
# Heads 3 and 4 find the second balloon, too. No label said which patch is dog or balloon. But whoever
# has to count and caption must know: *that one there is the same*.

# %% [markdown]
# ### What a patch becomes
#
# What the heads fetch ends in the stream. At each depth, compare the patches' vectors: the cosine of
# the angle between two of them, 1 for the same direction. All patches share a large common part, so
# we subtract the mean of the picture first.


# %%
def alike(state):
    """Cosine of each patch with each, after their mean is removed: float[N, N]."""
    apart = F.normalize(state[0] - state[0].mean(dim=0), dim=-1)  # [N, D]
    return apart @ apart.T


# %%
cosines = torch.stack([alike(state) for state in states])  # [depth, N, N]
own = torch.stack([c[RIGHT][:, RIGHT].sum() - 6 for c in cosines]) / 30  # 30 pairs, not with itself
curves = {"its other patches": own}
for name, group in {"other dog": LEFT, "cat": CAT, "sky": list(range(16))}.items():
    curves[name] = cosines[:, RIGHT][:, :, group].mean(dim=(1, 2))

# %%
print("right dog and …     patches  block 1  block 2  block 3  block 4")
for name, values in curves.items():
    print(f"{name:18}", "".join(f"{value:9.1f}" for value in values))
other, cats = curves["other dog"], curves["cat"]
assert cats[0] > max(other[0], own[0]) and (other[1:] > cats[1:] + 0.1).all()
assert own[4] > 0.5 and other[4] > 0.5 and curves["sky"][4] < -0.5

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 4, figsize=(9.5, 2.6), layout="constrained")
axes[0].imshow(picture("scene"))
axes[0].set_title("the picture")
for axis, depth in zip(axes[1:], (0, 2, 4)):
    view = cosines[depth, 8 * ASKS[0] + ASKS[1]].view(8, 8)
    drawn = axis.imshow(view, cmap=DIVERGING, vmin=-1, vmax=1)
    axis.set_title("patches" if depth == 0 else f"after block {depth}")
for axis in axes:
    mark(axis)
    axis.set_axis_off()
fig.colorbar(drawn, ax=axes, shrink=0.8, ticks=[-1, 0, 1])
save_figure(fig, "05_alike.png")

# %% [markdown]
# **What to notice.** Before the first block a patch of the right dog is more like the cat than like
# its *own* dog's other patches: they show other pixels. From the first block on the other dog is
# ahead of the cat, and at the end both dogs' patches are close to each other and the sky is opposite.
# *What a patch belongs to* has become more than its pixels.

# %% [markdown]
# ### Who wrote what into the stream?
#
# Since everything is added to the stream, its end can be taken apart exactly: patch embedding plus four
# attention outputs plus four MLP outputs.

# %%
x = states[0]
parts = {"patches": x}
for number, layer in enumerate(tiny.encoder.layers, start=1):
    parts[f"attention {number}"] = layer.self_attn(layer.layer_norm1(x))
    x = x + parts[f"attention {number}"]
    parts[f"MLP {number}"] = layer.mlp(layer.layer_norm2(x))
    x = x + parts[f"MLP {number}"]
torch.testing.assert_close(sum(parts.values()), states[4], atol=1e-3, rtol=1e-4)

# %%
lengths = {name: part.norm(dim=-1).mean().item() for name, part in parts.items()}
assert max(lengths, key=lengths.get) == "MLP 4"
assert all(lengths[f"MLP {n}"] > 2 * lengths[f"attention {n}"] for n in (1, 2, 3, 4))

# %% tags=["hide-input"]
colour = {"p": "accent", "a": "vision", "M": "together"}
fig, axis = plt.subplots(figsize=(7, 2.6), layout="constrained")
bars = axis.barh(
    list(lengths), list(lengths.values()), color=[COLOURS[colour[n[0]]] for n in lengths]
)
axis.bar_label(bars, fmt="%.0f", padding=3)
axis.invert_yaxis()
axis.set(title="mean length of what is added to a patch")
save_figure(fig, "05_additions")

# %% [markdown]
# Nothing is lost on the way: nine parts, added, are the end. In every block the MLP writes more than
# twice as much as attention, and the last one writes most. Long is not the same as important. But this
# exact sum is what many methods of looking inside start from.

# %% [markdown]
# ## At full size
#
# On the device "meta" a tensor has a shape and no memory, so the whole tower is built at once. Where do
# its parameters sit?

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

# %%
for kind, number in count.items():
    print(f"{kind:10} {number:12,} {number / total:8.2%}")
print(f"{'all':10} {total:12,}   {2 * total / 1e6:.0f} MB in bfloat16")

# %% tags=["hide-input"]
fig, axis = plt.subplots(figsize=(9, 1.9), layout="constrained")
shown = {"MLP": "together", "attention": "vision", "patches": "accent", "positions": "language"}
left = 0
for kind, colour in (shown | {"norms": "muted"}).items():
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
# operations a weight and patch. Scores and means come on top
# ([lesson 04](04_siglip_attention.ipynb)). PyTorch's counter knows the whole bill.

# %%
with FlopCounterMode(display=False) as counter:
    full(torch.empty(1, 3, 224, 224, device="meta"))
flops = counter.get_total_flops()
linear, square = 2 * 256 * total / flops, 27 * 4 * 256**2 * 1152 / flops
print(f"{flops / 1e9:.0f} GFLOP: weights × patches {linear:.0%}, scores and means {square:.0%}")
assert 0.99 < linear + square < 1.01

# %% [markdown]
# This is paid once a picture. The vision tower does *not* run again for each word of the answer
# ([lesson 18](18_generation.ipynb)); implementations that forget this pay it dozens of times.

# %% [markdown]
# ## A bug people really make
#
# A colleague writes the tower anew. The trained weights load, strictly, with nothing missing and
# nothing left over. Her test compares the output with the published one patch by patch, by cosine, as
# one does with embeddings. And all figures above come out the same. Do you see the mistake?


# %%
class ColleaguesTower(SiglipVisionModel):
    def forward(self, pixel_values):
        x = self.embeddings(pixel_values)
        for layer in self.encoder["layers"].children():
            x = layer(x)
        return x


# %%
wrong = ColleaguesTower(tiny.config).requires_grad_(False)
wrong.load_state_dict(trained)
pixels = ImageProcessor(112)(sample_picture("scene"))
cosine = F.cosine_similarity(wrong(pixels), tiny(pixels), dim=-1)  # [B, N]
print(f"least cosine of 64 patches: {cosine.min():.2f}")
assert cosine.min() > 0.95

# %% [markdown]
# The last norm is built and loaded, and nobody calls it. The cosine does not notice, for it looks at
# directions only. Whoever reads these vectors next gets numbers some twenty times too large:

# %%
sizes = [model(pixels).norm(dim=-1).mean().item() for model in (tiny, wrong)]
print(f"mean length of a patch's vector: ours {sizes[0]:.0f}, hers {sizes[1]:.0f}")
assert 15 < sizes[1] / sizes[0] < 25

# %% [markdown]
# ### The check that finds it
#
# Strict loading asks whether each weight has a place. It cannot ask whether the place is *used*. A
# gradient can: a weight that the output does not depend on gets none. It needs no reference.


# %%
def never_used(model, pixel_values):
    """Names of the weights on which the output does not depend."""
    model.requires_grad_(True).zero_grad()
    model(pixel_values).sum().backward()
    names = [name for name, weight in model.named_parameters() if weight.grad is None]
    model.requires_grad_(False).zero_grad()
    return names


# %%
print("ours:", never_used(tiny, pixels))
print("hers:", never_used(wrong, pixels))

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
    truth, now = sum(p.numel() for p in large.parameters()), 412_442_352
    assert answer != 4 * now, "blocks have no weights that belong to one patch"
    assert answer > now, "something is stored for each patch of the picture"
    assert answer != now + 1024 * 1152, "some of these rows were counted before"
    assert answer != now + 256 * 1152, "twice the side is not twice the patches"
    assert (answer - now) % 1152 == 0, "what is added has 1152 numbers a row"
    assert answer == truth, "another number of rows: count the patches of both pictures"


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
# ### Exercise 2 (write): a block from its tensors
#
# `w` holds the tensors of the trained tower's last block: `w["layer_norm1.weight"]`,
# `w["mlp.fc1.bias"]` … Write the block for the patches of one picture, `float[N, D]`, in plain
# arithmetic: no `nn.LayerNorm`, no `F.layer_norm`, no `nn.Linear`. `F.gelu` is allowed, and attention
# is given: `attend(y)` takes and returns `float[N, D]`.

# %% tags=["exercise"]
start = "encoder.layers.3."
w = {name.removeprefix(start): t for name, t in trained.items() if name.startswith(start)}
attend = lambda y: tiny.encoder.layers[3].self_attn(y[None])[0]


def block_by_hand(x, w, attend):
    return None  # your code


# %% tags=["check"]
def test_2(block):
    x = states[3][0]  # [N, D]
    out = block(x.clone(), w, attend)
    assert isinstance(out, torch.Tensor), "return a tensor"
    assert out.shape == x.shape, f"[N, D] = {list(x.shape)} wanted, not {list(out.shape)}"

    def norm(x, n, weight=True, bias=True, std=None):
        x = x - x.mean(dim=-1, keepdim=True)
        x = x / (std(x) if std else (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt())
        return x * (w[f"layer_norm{n}.weight"] if weight else 1) + w[f"layer_norm{n}.bias"] * bias

    def mlp(x, gelu="tanh", b1=True, b2=True):
        h = F.gelu(x @ w["mlp.fc1.weight"].T + b1 * w["mlp.fc1.bias"], approximate=gelu)
        return h @ w["mlp.fc2.weight"].T + b2 * w["mlp.fc2.bias"]

    def wired(norm=norm, mlp=mlp):
        mid = x + attend(norm(x, 1))
        return mid + mlp(norm(mid, 2))

    mid, n1 = x + attend(norm(x, 1)), norm(x, 1)
    fetched = attend(n1)
    on_road = n1 + attend(n1)
    after = norm(x + attend(x), 1)
    mistakes = {
        "something that should be added replaces the stream, or is left out": [
            *(mlp(norm(mid, 2)), fetched + mlp(norm(fetched, 2)), mlp(norm(fetched, 2))),
            *(x + mlp(norm(mid, 2)), x + mlp(norm(x, 2)), mid, x + mlp(norm(fetched, 2))),
        ],
        "a norm stands on the stream itself: only the branch may read normalised numbers": [
            *(norm(on_road, 2) + mlp(norm(on_road, 2)), on_road + mlp(norm(on_road, 2))),
            *(norm(after + mlp(after), 2), norm(mid, 2) + mlp(norm(mid, 2))),
        ],
        "the MLP must read the stream after attention has added to it": [mid + mlp(norm(x, 2))],
        "a branch reads the stream without its norm": [
            *(x + attend(x) + mlp(norm(x + attend(x), 2)), mid + mlp(mid)),
            x + attend(x) + mlp(x + attend(x)),
        ],
        "a norm has the other norm's tensors": [
            *(wired(norm=lambda x, n: norm(x, 3 - n)), wired(norm=lambda x, n: norm(x, 1))),
            wired(norm=lambda x, n: norm(x, 2)),
        ],
        "the weights of a norm are not used": [wired(norm=lambda x, n: norm(x, n, weight=False))],
        "the biases of a norm are not used": [
            wired(norm=lambda x, n: norm(x, n, bias=False)),
            wired(norm=lambda x, n: norm(x, n, weight=False, bias=False)),
        ],
        "the size is a mean over the D numbers: `std` divides by D − 1": [
            wired(norm=lambda x, n: norm(x, n, std=lambda x: x.std(dim=-1, keepdim=True)))
        ],
        "the bend is another form of GELU": [wired(mlp=lambda x: mlp(x, gelu="none"))],
        "a bias of the MLP is not used": [
            *(wired(mlp=lambda x: mlp(x, b1=False)), wired(mlp=lambda x: mlp(x, b2=False))),
            wired(mlp=lambda x: mlp(x, b1=False, b2=False)),
        ],
    }
    right = tiny.encoder.layers[3](x[None])[0]
    far = (out - right).norm()
    for message, results in mistakes.items():
        assert all((out - result).norm() > 1e-5 * right.norm() for result in results), message
    assert far < 1e-5 * right.norm(), (
        "not what the block gives: compare your norm with F.layer_norm and your MLP with the module"
    )
    small = x / 1000
    gap = block(small.clone(), w, attend) - tiny.encoder.layers[3](small[None])[0]
    assert gap.abs().max() < 1e-3, (
        "small numbers come out wrong: look at ε and at where it is added"
    )


check(test_2, block_by_hand)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Write a small function for the norm: mean and mean square over the last axis, with `keepdim=True`.
# A linear layer is `x @ weight.T + bias`. Then two lines, each adding to `x`.
#
# </details>


# %% tags=["solution"]
def block_by_hand(x, w, attend):
    # Each branch reads a normalised copy; what it finds is added to the stream itself.
    def norm(x, name):
        centred = x - x.mean(dim=-1, keepdim=True)
        size = (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return centred / size * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = x + attend(norm(x, "layer_norm1"))
    h = norm(x, "layer_norm2") @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
    return x + F.gelu(h, approximate="tanh") @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]


check(test_2, block_by_hand)

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
        names = [sorted(layer.state_dict()) for layer in (honest, sneaky)]
        assert names[0] == names[1], "keep the names of the parameters"
        sneaky.load_state_dict(honest.state_dict())
        x = torch.randn(2, 7, 12)
        with torch.no_grad():
            found = sneaky(x)
            assert isinstance(found, torch.Tensor), "forward must return a tensor"
            assert found.shape == x.shape, "forward must return float[B, N, D]"
            assert torch.allclose(found, honest(x), atol=1e-5), "with fresh weights it must agree"
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
# - A block adds to a stream twice: attention fetches from other patches, the MLP works on each alone.
# - The stream keeps patches apart; norms keep numbers and gradients in range, best *beside* it,
#   with one more at the end.
# - In a trained tower, heads of the last block find the other thing of the same kind.
# - The tower is 27 blocks of 15.2 million parameters, two thirds of them MLP.
# - A weight that loads may still be unused: ask the gradient.

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
# reads it next ([lesson 15](15_model.ipynb)) gets numbers of a known size, as every branch did.
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
