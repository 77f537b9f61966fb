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
# [← Patch embedding](03_patch_embedding.ipynb) | [contents](00_overview.ipynb) | [SigLIP →](05_siglip.ipynb)

# %% [markdown]
# # 04 · SigLIP's attention: how do patches talk to each other?
#
# *45 minutes* · part I, Seeing
#
# **What you will be able to do**
#
# - compute attention for three patches with a pencil, and say what query, key and value are for;
# - show why scores are divided by √Dh;
# - write it four ways (loop, matrices, heads, SDPA) and prove that they agree;
# - draw what a patch of a real photograph looks at, and find a mix-up of heads that no shape shows.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("siglip_attention")

# %% [markdown]
# ## Setup
#
# From earlier lessons: the drawing helpers ([lesson 01](01_plotting.ipynb)) and the `ImageProcessor` ([lesson 02](02_image_processor.ipynb)).
# Patches are cut with `F.unfold`, as in [lesson 03](03_patch_embedding.ipynb). The cells that begin with `#| export` become the
# file [siglip_attention.py](../paligemma/siglip_attention.py).

# %%
#| export
"""Bidirectional multi-head attention, as in SigLIP's vision encoder."""

import torch
import torch.nn.functional as F
from torch import nn

# %% tags=["setup"]
import time

import matplotlib.pyplot as plt
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from paligemma.image_processor import ImageProcessor
from paligemma.plotting import show_attention, show_heatmap, show_images
from paligemma.support.course import check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS

_ = torch.manual_seed(4)

# %% [markdown]
# ## The problem
#
# After [lesson 03](03_patch_embedding.ipynb) each patch is a vector, made from its own 14 × 14 pixels and nothing else. Look at
# the three patches on the left, alone. What do they show? Then look at where they come from.

# %%
cat = ImageProcessor(224)(sample_picture("cat"))  # (1, 3, 224, 224)
photo = (cat[0].permute(1, 2, 0) + 1) / 2  # (224, 224, 3) in [0, 1]
NAMES, PLACES = ("eye", "forehead", "cloth"), [(5, 5), (2, 9), (12, 15)]  # (row, column)


def mark(axis, row, column):
    """A white square around one patch of the photograph."""
    place = (14 * column, 14 * row)
    axis.add_patch(plt.Rectangle(place, 13, 13, fill=False, edgecolor="white", linewidth=1.5))


rows = [["a", "whole"], ["b", "whole"], ["c", "whole"]]
fig, axes = plt.subplot_mosaic(rows, figsize=(4.6, 3.4), width_ratios=[1, 3.3])
for letter, name, (y, x) in zip("abc", NAMES, PLACES):
    axes[letter].imshow(photo[14 * y : 14 * y + 14, 14 * x : 14 * x + 14])
    mark(axes["whole"], y, x)
    style = {"color": "white", "fontsize": 8, "ha": "right"}
    axes["whole"].text(14 * x + 14, 14 * y - 4, f"{letter}: {name}", **style)
axes["whole"].imshow(photo)
for letter, axis in axes.items():
    axis.set_title(letter if letter in "abc" else "", fontsize=9, pad=3)
    axis.set_axis_off()
fig.subplots_adjust(0.02, 0.02, 0.98, 0.93, wspace=0.06, hspace=0.3)
plt.close(fig)
fig

# %% [markdown]
# Green, stripes, pink: nobody can say more. "Eye" is not *in* the patch. It is in what stands
# around it. So every patch must be able to
# fetch something from every other one, and it must be able to **choose** from which, since in the
# next picture the eye will be elsewhere.
#
# Attention is the part that fetches. Each patch leaves with a weighted mean of all patches, and it
# sets the weights by itself.

# %% [markdown]
# ## By hand
#
# Three patches, four channels: brown, grey, striped, bright. Fur, an ear, and a wall. How well do
# two patches go together? Multiply channel by channel and add: the **dot product**.

# %%
names = ["fur", "ear", "wall"]
x = torch.tensor([[2.0, 0, 2, 0], [2, 0, 0, 0], [0, 2, 0, 2]])  # (N, D) = (3, 4)
print((x @ x.T).int())

# %% [markdown]
# Row 0: fur with fur $2 \cdot 2 + 2 \cdot 2 = 8$, fur with ear $2 \cdot 2 = 4$, fur with wall $0$.
# Divide by $\sqrt{4} = 2$ (why comes soon): the **scores** are 4, 2, 0.
#
# Scores become shares by **softmax**: $e$ to each score, divided by their sum. On paper for fur:
# $e^4 = 54.6$, $e^2 = 7.4$, $e^0 = 1$, sum 63.

# %%
scores = x @ x.T / 2
weights = scores.softmax(dim=-1)  # (N, N), each row sums to 1
out = weights @ x  # (N, D): the mean of all three vectors with these shares
print("fur before:", x[0].tolist())
print("fur after: ", [round(value, 2) for value in out[0].tolist()])
print("by pencil, channel 'brown':", round((54.6 * 2 + 7.4 * 2 + 1 * 0) / 63, 2))
show_heatmap(weights, "who looks at whom", rows=names, columns=names, annotate=True)

# %% [markdown]
# Read the picture row by row: fur takes 87 % from fur, 12 % from the ear, 2 % from the wall. What
# it gets is the mean of the three vectors with these shares.

# %% [markdown]
# ### Query, key, value
#
# So far, like finds like. But a patch may want something *else*: a nose may look for eyes. So a
# patch gets three roles, each by its own learned matrix:
#
# - **query**: what am I looking for?
# - **key**: what do I offer to be found by?
# - **value**: what do I hand over when found?
#
# Let us choose a query matrix that asks for the wall's channels, and a value that hands over
# "bright" only.

# %%
W_q = torch.tensor([[0.0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]])  # rows: new channels
q, k, v = x @ W_q.T, x, x[:, 3:]
weights = (q @ k.T / 2).softmax(dim=-1)
print("fur asks for:", q[0].int().tolist(), " weights:", [round(w, 3) for w in weights[0].tolist()])
print("fur receives bright =", round((weights @ v)[0].item(), 2))

# %% [markdown]
# Fur now looks at the wall, because it was told to. In one line, for $N$ patches:
#
# $$\mathrm{attention}(Q, K, V) = \mathrm{softmax}\!\left(\frac{QK^\top}{\sqrt{D_h}}\right) V$$
#
# $D_h$ is the length of a query. The $N \times N$ weights are *computed from the picture*; only the
# matrices that make $Q$, $K$ and $V$ are learned.

# %% [markdown]
# ### Why divide by √Dh?
#
# A dot product of $D_h$ channels is a sum of $D_h$ terms. With random entries of variance 1 each
# term has variance 1, so the sum has variance $D_h$: its typical size is $\sqrt{D_h}$. Long vectors
# make large scores, only because they are long. What does softmax make of that?


# %%
def measure(Dh, scale):
    """Spread of the scores; mean largest weight; how far weights can still move (1 − Σw²)."""
    q, k = torch.randn(64, Dh), torch.randn(256, Dh)
    scores = q @ k.T * scale
    w = scores.softmax(dim=-1)
    return scores.std().item(), w.amax(-1).mean().item(), (1 - w.square().sum(-1)).mean().item()


widths = [1, 4, 16, 72, 256, 1024]
raw = torch.tensor([measure(Dh, 1) for Dh in widths])
scaled = torch.tensor([measure(Dh, Dh**-0.5) for Dh in widths])
fig, axes = plt.subplots(1, 3, figsize=(9, 2.6), layout="constrained")
axes[0].plot(widths, torch.tensor(widths).sqrt(), ":", color=COLOURS["ink"], label="√Dh")
titles = ["spread of the scores", "largest of 256 weights", "room to move: 1 − Σ w²"]
for index, (axis, title) in enumerate(zip(axes, titles)):
    axis.plot(widths, raw[:, index], "o-", color=COLOURS["bad"], label="q·k")
    axis.plot(widths, scaled[:, index], "o-", color=COLOURS["good"], label="q·k / √Dh")
    axis.set(xscale="log", title=title, xlabel="Dh", ylim=(0, None if index == 0 else 1.05))
    axis.set_xticks(widths, widths)
    axis.minorticks_off()
axes[0].legend()
save_figure(fig, "04_scale")

# %% [markdown]
# **What to notice.** The spread lies on $\sqrt{D_h}$. Without the division, wide heads choose *one* patch with nearly all the weight
# before anything is learned. In the right panel the room to move falls towards 0: softmax is flat
# there, hardly any gradient passes, and the choice can hardly be unlearned. Divided by $\sqrt{D_h}$
# all three stay put. SigLIP's heads are 72 wide.

# %% [markdown]
# ## As a loop
#
# One query at a time, one key at a time. Random data from here on; $N$ and $D_h$ differ, so that a
# swapped axis cannot hide.


# %%
def attention_by_loop(q, k, v):
    """q, k, v: float[N, Dh]; one query after the other."""
    out = torch.zeros_like(v)
    for i in range(len(q)):
        scores = [sum(a * b for a, b in zip(q[i], key)) / q.shape[1] ** 0.5 for key in k]
        shares = [score.exp() for score in scores]
        total = sum(shares)
        for share, value in zip(shares, v):
            out[i] += share / total * value
    return out


q, k, v = torch.randn(3, 6, 4)  # three matrices (N, Dh) = (6, 4)
slow = attention_by_loop(q, k, v)
print(tuple(slow.shape))

# %% [markdown]
# ## Vectorised
#
# All dot products at once are one matrix product, all weighted means another.


# %%
def attention(q, k, v):
    """q, k, v: float[..., N, Dh]; any axes before."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (..., N, N)
    return scores.softmax(dim=-1) @ v  # (..., N, Dh)


torch.testing.assert_close(attention(q, k, v), slow)
print("equal to the loop")

# %% [markdown]
# ### Heads: several questions at once
#
# One softmax yields *one* mean. A patch of the eye may want two things: the other eye, and its
# direct neighbours. One mean of both is mud.
#
# So the channels are cut into $H$ slices of $D_h = D / H$. Each slice, a **head**, attends by
# itself; the results are laid side by side again. First plainly, with a loop over heads:


# %%
def heads_by_loop(q, k, v, H):
    """q, k, v: float[N, D]; head h owns channels h·Dh … (h+1)·Dh."""
    Dh = q.shape[1] // H
    slices = [slice(h * Dh, (h + 1) * Dh) for h in range(H)]
    return torch.cat([attention(q[:, s], k[:, s], v[:, s]) for s in slices], dim=1)


q, k, v = torch.randn(3, 6, 8)
slow = heads_by_loop(q, k, v, H=2)
one_head = attention(q, k, v)
print("two heads ≠ one head:", not torch.allclose(slow, one_head, atol=0.01))

# %% [markdown]
# ### The same without the loop: cut, then swap
#
# Batched attention wants shape $(H, N, D_h)$. Two steps: **cut** the channel axis in two, $(N, D)
# \to (N, H, D_h)$, which moves nothing; then **swap** the first two axes. To see it, number the
# entries: 12 means patch 1, channel 2.


# %%
def numbered(values, title, axis, rows=None):
    """Cells with their numbers, in one scale of colours for all drawings."""
    show_heatmap(values, title, rows=rows, annotate="02.0f", ax=axis)
    axis.images[0].set_clim(0, 70)
    for text in axis.texts:
        text.set_color(COLOURS["ink"])


x = torch.arange(4)[:, None] * 10 + torch.arange(6)  # (N, D) = (4, 6), H = 2
heads = x.unflatten(-1, (2, 3)).transpose(0, 1)  # (N, H, Dh) → (H, N, Dh)
fig, axes = plt.subplots(1, 3, figsize=(7.5, 2.5), width_ratios=[2, 1, 1], layout="constrained")
numbered(x, "x: one patch a row", axes[0], rows=[f"patch {n}" for n in range(4)])
for h, axis in enumerate(axes[1:]):
    numbered(heads[h], f"head {h}", axis)
fig

# %% [markdown]
# Each head holds **all** patches and **some** channels. Keep this picture for the bug below.
#
# On the way back the same two steps in reverse: swap, then join.
#
# ### SDPA: the same, in one call
#
# PyTorch's `F.scaled_dot_product_attention` does scores, softmax and mean in one go. It works on
# small tiles and never writes the whole $N \times N$ matrix to memory. The division by
# $\sqrt{D_h}$ is inside.

# %%
split = [t.unflatten(-1, (2, -1)).transpose(0, 1) for t in (q, k, v)]  # (H, N, Dh) each
fast = attention(*split).transpose(0, 1).flatten(1)  # (H, N, Dh) → (N, H, Dh) → (N, D)
torch.testing.assert_close(fast, slow)
sdpa = F.scaled_dot_product_attention(*(t[None] for t in split))  # wants (B, H, N, Dh)
torch.testing.assert_close(sdpa[0].transpose(0, 1).flatten(1), slow)
print("batched heads and SDPA: equal to the loop over heads")

# %% [markdown]
# ## The module
#
# Four linear layers: three make queries, keys and values, the fourth mixes what the heads brought
# back. All have a bias. No mask: in a picture every patch may look everywhere, forwards and
# backwards. That is what **bidirectional** means.


# %%
#| export
class SiglipAttention(nn.Module):
    """Every patch looks at every patch, in `num_attention_heads` independent ways.

    Args:
        hidden_size: width D; a multiple of `num_attention_heads`.
        num_attention_heads: H; each head is Dh = D / H wide.

    Raises:
        ValueError: the heads do not divide the width.

    Source: Vaswani et al. 2017, section 3.2; `SiglipAttention` in transformers.
    """

    def __init__(self, hidden_size: int, num_attention_heads: int):
        super().__init__()
        if num_attention_heads < 1 or hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size {hidden_size} is not a multiple of num_attention_heads "
                f"{num_attention_heads}; every head needs the same whole width"
            )
        self.num_heads = num_attention_heads
        self.head_dim = hidden_size // num_attention_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`float[B, N, D]` → `float[B, N, D]`; no mask, nothing is hidden in a picture."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # (B, N, D) each
        # D = H·Dh: give each head its own axis and put it before the sequence.
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, Dh), scaled by 1/√Dh
        return self.out_proj(out.transpose(1, 2).flatten(2))  # (B, N, D)


# %% [markdown]
# Three checks: equal to the loop; shuffled patches come out shuffled alike, since attention knows
# no order; and mixing happens: change one patch, see which outputs move. After [lesson 03](03_patch_embedding.ipynb) it was
# one.

# %%
layer = SiglipAttention(hidden_size=8, num_attention_heads=2)
x = torch.randn(3, 6, 8)  # (B, N, D)
with torch.no_grad():
    out = layer(x)
    for picture, ours in zip(x, out):
        q, k, v = layer.q_proj(picture), layer.k_proj(picture), layer.v_proj(picture)
        torch.testing.assert_close(layer.out_proj(heads_by_loop(q, k, v, H=2)), ours)
changed = x.clone()
changed[:, 2] += 1
order = torch.randperm(6)
with torch.no_grad():
    torch.testing.assert_close(layer(x[:, order]), out[:, order])
    moved = (layer(changed) - out).abs().amax(dim=2)[0] > 1e-6
print(tuple(x.shape), "→", tuple(out.shape), "equal to the loop, for each picture")
print("patch 2 changed; outputs that moved:", moved.nonzero().flatten().tolist())
print("shuffled in, shuffled out")

# %% [markdown]
# ## Against the reference
#
# PyTorch has `nn.MultiheadAttention`. It keeps the three matrices in one, stacked: first the
# queries' rows, then keys', then values'.
#
# The published weights are usually run with `SiglipAttention` of transformers. The file holds its
# weights, input and output (width 24, four heads, scores large enough to matter). A test computes
# it afresh.

# %% tags=["nbval-ignore-output"]
torchs = nn.MultiheadAttention(embed_dim=8, num_heads=2, batch_first=True)
three = (layer.q_proj, layer.k_proj, layer.v_proj)
with torch.no_grad():
    torchs.in_proj_weight.copy_(torch.cat([part.weight for part in three]))
    torchs.in_proj_bias.copy_(torch.cat([part.bias for part in three]))
    torchs.out_proj.load_state_dict(layer.out_proj.state_dict())
    difference = (torchs(x, x, x)[0] - out).abs().max().item()
print(f"nn.MultiheadAttention: largest difference {difference:.1e}")
assert difference <= 1e-5

stored = load_file("reference/siglip_attention.safetensors")
ours = SiglipAttention(hidden_size=24, num_attention_heads=4)
ours.load_state_dict({name: stored[name] for name in ours.state_dict()})
with torch.no_grad():
    difference = (ours(stored["x"]) - stored["output"]).abs().max().item()
assert difference <= 1e-5
print(f"transformers: largest difference {difference:.1e}")

# %% [markdown]
# ## See it: what a patch of the cat looks at
#
# What a trained head looks for, nobody wrote down. So here we choose weights whose meaning we know;
# the trained tower follows in [lesson 05](05_siglip.ipynb). Each patch is described by two numbers for each of three heads: its **colour** (red minus green, green minus
# blue), its **texture** (grain across and down), its **place** (row, column).


# %%
def describe(pixels):
    """float[1, 3, 224, 224] → (3, 256, 2): colour, texture and place of each patch."""
    patches = F.unfold(pixels, 14, stride=14)[0].T.reshape(256, 3, 14, 14)
    grey = patches.mean(dim=1)  # (256, 14, 14)
    colour = -patches.mean(dim=(2, 3)).diff(dim=1)
    texture = torch.stack([grey.diff(dim=axis).std((1, 2)) for axis in (2, 1)], dim=1).log()
    place = torch.cartesian_prod(torch.arange(16.0), torch.arange(16.0))
    facts = torch.stack([colour, texture, place])
    return (facts - facts.mean(1, keepdim=True)) / facts.std(1, keepdim=True)


facts = describe(cat)
print(tuple(facts.shape))

# %% [markdown]
# A head should prefer patches *near* to its query $f$ in these numbers. Does a dot product measure
# nearness? Almost: $-\tfrac12|f - g|^2 = f \cdot g - \tfrac12|g|^2 - \tfrac12|f|^2$. The last term
# is the same for all keys $g$, and softmax ignores what is added to a whole row. The middle one
# becomes a third channel, which the query meets with a 1: its bias.
#
# Three heads of three channels: $D = 9$.

# %%
x = torch.cat([facts, -facts.square().sum(-1, keepdim=True) / 2], dim=-1)  # (H, N, Dh)
x = x.transpose(0, 1).flatten(1)[None]  # (B, N, D) = (1, 256, 9)
layer = SiglipAttention(hidden_size=9, num_attention_heads=3)
third = torch.tensor([0.0, 0, 1]).repeat(3)
SHARP = 8.0  # how strongly near is preferred to far
with torch.no_grad():
    layer.q_proj.weight.copy_(SHARP * torch.diag(1 - third))
    layer.q_proj.bias.copy_(SHARP * third)
    for part in (layer.k_proj, layer.v_proj, layer.out_proj):
        part.weight.copy_(torch.eye(9))
        part.bias.zero_()

# %% [markdown]
# The weights themselves never leave SDPA. To draw them we take queries and keys from the module and
# do the softmax by hand; the output must then be the module's.

# %%
with torch.no_grad():
    q, k, v = (
        part(x).unflatten(-1, (3, 3)).transpose(1, 2)
        for part in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    looks = (q @ k.transpose(-1, -2) / 3**0.5).softmax(dim=-1)  # (1, H, N, N)
    torch.testing.assert_close(layer.out_proj((looks @ v).transpose(1, 2).flatten(2)), layer(x))

rows = [16 * y + x for y, x in PLACES]
maps = looks[0][:, rows].flatten(0, 1)  # (3 heads · 3 patches, 256)
HEADS = ("colour", "texture", "place")
fig = show_attention(photo, maps, [f"{h} head, {name}" for h in HEADS for name in NAMES], columns=3)
for axis, (y, column) in zip(fig.axes, PLACES * 3):
    mark(axis, y, column)
fig.set_size_inches(6.6, 6.9)
save_figure(fig, "04_cat.png")

# %% [markdown]
# **What to notice.** The white square asks; what glows is what it looks at. Same patch, three heads,
# three answers. By colour the green of one eye finds the *other eye*, far away. By place it finds its
# neighbours, whatever they show. By texture the smooth cloth finds whatever is out of focus.
#
# Nobody drew a line between the eyes. The weights follow from this picture; in another picture the
# same matrices would find other places.

# %% [markdown]
# ### What comes back: a mean of look-alikes
#
# Weights are half of it. To *see* the weighted mean, let the values be pixels. We spoil the cat
# with noise, cut it into 3136 small patches of 4 × 4, and use the noisy pixels as query, key and
# value. No learning, no knowledge of cats.

# %%
noise = 0.25
noisy = cat + noise * torch.randn_like(cat)
pixels = F.unfold(noisy, 4, stride=4)[0].T  # (3136, 48)
q = torch.cat([pixels, torch.ones(len(pixels), 1)], dim=1)  # one channel more, as above
k = torch.cat([pixels, -pixels.square().sum(1, keepdim=True) / 2], dim=1)
cleaned = []
for sharp in (0.5, 4, 12):
    scale = sharp / (48 * noise**2)
    mixed = F.scaled_dot_product_attention(q[None], k[None], pixels[None], scale=scale)[0]
    cleaned.append(F.fold(mixed.T[None], (224, 224), 4, stride=4))

errors = [(image - cat).square().mean().item() for image in (noisy, *cleaned)]
titles = ["noisy", "too soft", "right", "too sharp"]
views = [((image[0].permute(1, 2, 0) + 1) / 2).clamp(0, 1) for image in (noisy, *cleaned)]
titles = [f"{title}: error {error:.3f}" for title, error in zip(titles, errors)]
fig = show_images(views, titles, columns=4, height=1.8)
assert errors[2] < errors[0] / 5
save_figure(fig, "04_denoise.png")

# %% [markdown]
# One round of attention has repaired most of the damage. Patches that show the same thing carry
# different noise; in their mean the thing stays and the noise goes. Too soft, and everything is
# averaged with everything; too sharp, and each patch sees itself only.
#
# This was known in image processing as *non-local means* (2005), twelve years before transformers.
# What training adds is the choice of what counts as "alike" and what is handed over.

# %% [markdown]
# ## At full size
#
# SigLIP So400m: $D = 1152$, $H = 16$, so $D_h = 72$. The four projections cost $8 N D^2$ FLOPs,
# scores and means together $4 N^2 D$. PyTorch's counter, on the meta device, must agree.

# %%
D, H = 1152, 16
print("size     N   projections   N² part   share   scores of one layer, bfloat16")
for size in (224, 448, 896):
    N = (size // 14) ** 2
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        full = SiglipAttention(D, H)
        full(torch.empty(1, N, D))
    linear, square = 8 * N * D**2, 4 * N**2 * D
    assert counter.get_total_flops() == linear + square
    print(
        f"{size} {N:5} {linear / 1e9:8.1f} GFLOP {square / 1e9:5.1f} GFLOP"
        f" {square / (linear + square):6.0%} {H * N * N * 2 / 1e6:12.0f} MB"
    )
print(f"parameters at every size: {sum(p.numel() for p in full.parameters()):,}")

tokens = torch.arange(64, 4097, 16)
fig, axis = plt.subplots(figsize=(6.2, 3), layout="constrained")
axis.plot(tokens, 8 * tokens * D**2 / 1e9, color=COLOURS["vision"])
axis.plot(tokens, 4 * tokens.double() ** 2 * D / 1e9, color=COLOURS["language"])
axis.text(4150, 8 * 4096 * D**2 / 1e9, "projections", va="center", color=COLOURS["vision"])
axis.text(4150, 4 * 4096**2 * D / 1e9, "N² part", va="center", color=COLOURS["language"])
axis.axvline(2 * D, color=COLOURS["muted"], linestyle=":", linewidth=1)
axis.text(2 * D + 40, 2, f"N = 2D = {2 * D}", color=COLOURS["muted"])
axis.set(xlabel="patches N", ylabel="GFLOP a layer", xlim=(0, 4096), ylim=(0, None))
axis.set_xticks([256, 1024, 2304, 4096])
save_figure(fig, "04_flops")

# %% [markdown]
# "Attention is quadratic" is true and, at 256 patches, beside the point: the projections are nine
# tenths of the work. Only from $N = 2D$ on does the square part lead.
#
# The scores are another matter: half a gigabyte for *one* layer and one picture at 896. That is
# what SDPA avoids. Let us watch the largest tensor that each form writes,
# and then the time.


# %%
class Largest(TorchDispatchMode):
    """Remember the size of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = result if isinstance(result, tuple) else (result,)
        sizes = [t.nbytes for t in tensors if isinstance(t, torch.Tensor)]
        self.size = max(self.size, *sizes, 0)
        return result


q = torch.randn(1, H, 1024, 72)
for name, form in {"matrices": attention, "SDPA": F.scaled_dot_product_attention}.items():
    with Largest() as largest, torch.no_grad():
        form(q, q, q)
    print(f"{name:9} largest tensor at N = 1024: {largest.size / 1e6:5.1f} MB (float32)")


# %% tags=["nbval-ignore-output"]
def best_ms(function, *args):
    """Shortest of three runs, in milliseconds."""
    times = []
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            function(*args)
            times.append(time.perf_counter() - start)
    return 1000 * min(times)


full = SiglipAttention(D, H)
for N in (256, 1024):
    q, x = torch.randn(1, H, N, 72), torch.randn(1, N, D)
    plain, fused = (best_ms(f, q, q, q) for f in (attention, F.scaled_dot_product_attention))
    print(f"N = {N:4}: matrices {plain:.1f} ms, SDPA {fused:.1f} ms ({plain / fused:.1f} times)")
    print(f"          whole layer {best_ms(full, x):.1f} ms")

# %% [markdown]
# ## A bug people really make
#
# A colleague writes the module anew. It runs and all shapes are right. We give both a small task:
# 16 patches, one of them *marked* (channel 0 is 1); every patch shall report the other channels of
# the marked one. Four heads.


# %%
class ColleaguesAttention(SiglipAttention):
    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.view(B, self.num_heads, N, self.head_dim) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.view(B, N, D))


def marked_batch(B=64, N=16, D=16):
    x = torch.randn(B, N, D)
    x[:, :, 0] = 0
    marked = torch.randint(N, (B,))
    x[torch.arange(B), marked, 0] = 1
    return x, x[torch.arange(B), marked][:, None].expand(B, N, D)  # what each patch shall report


# %%
curves = {}
for kind in (SiglipAttention, ColleaguesAttention):
    torch.manual_seed(0)
    layer = kind(16, 4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = curves[kind] = []
    for _ in range(240):
        x, target = marked_batch()
        loss = (layer(x) - target)[..., 1:].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

fig, axis = plt.subplots(figsize=(6.2, 2.6), layout="constrained")
for (kind, losses), colour in zip(curves.items(), ("good", "bad")):
    axis.plot(losses, color=COLOURS[colour], label=kind.__name__)
axis.set(xlabel="step", ylabel="squared error", ylim=(0, None))
axis.legend()
ends = [sum(losses[-50:]) / 50 for losses in curves.values()]
assert ends[0] < 0.1 and 0.7 < ends[1] < 0.9
plt.close(fig)
fig

# %% [markdown]
# Both learn. Ours goes to zero; the colleague's falls a little and then stays at about 0.8. More
# steps do not help. What would you ask next?
#
# ### The check that finds it
#
# **Cause and effect** again. At full size, on the cat: 256 patches, 16 heads. Change the patch in
# row 6, column 5, and draw how much each output moves.

# %%
torch.manual_seed(1)
right, wrong = SiglipAttention(64, 16), ColleaguesAttention(64, 16)
wrong.load_state_dict(right.state_dict())
x = F.linear(F.unfold(cat, 14, stride=14).transpose(1, 2), torch.randn(64, 588) / 6)  # (1, 256, 64)
changed = x.clone()
changed[:, 6 * 16 + 5] += 3
with torch.no_grad():
    moved = torch.stack([(kind(changed) - kind(x))[0].norm(dim=1) for kind in (right, wrong)])
moved[:, 6 * 16 + 5] = 0  # the patch itself moves most: leave it out
reached = (moved > 1e-6).sum(dim=1).tolist()
titles = [f"{name}: {n} outputs move" for name, n in zip(("ours", "the colleague's"), reached)]
fig = show_attention(photo, (moved > 1e-6).float(), titles)
save_figure(fig, "04_bug.png")

# %% [markdown]
# In the colleague's module a patch reaches its own **row** of the picture and nothing else. 16
# heads, 16 rows: that is no accident. Look at what `view` does to our numbered entries:

# %%
x = torch.arange(4)[:, None] * 10 + torch.arange(6)  # 12 is patch 1, channel 2
fig, axes = plt.subplots(1, 4, figsize=(7.5, 2.4), layout="constrained")
for side, (name, heads) in enumerate(
    {"cut, swap": x.view(4, 2, 3).transpose(0, 1), "view only": x.view(2, 4, 3)}.items()
):
    for h in range(2):
        numbered(heads[h], f"{name}: head {h}", axes[2 * side + h])
fig

# %% [markdown]
# Left: head 0 holds all four patches, channels 0 … 2. Right: it holds patches 0 and 1 with *all*
# channels, each torn in two. A head has become a strip of the sequence, and strips never meet: three
# strips of four never see the mark, so at least three quarters of the error stay.
#
# `view(N, H, Dh)` then `transpose` is right; `view(H, N, Dh)` has the same shape and another
# meaning.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): what changes the output?
#
# Think of `attention(q, k, v)` for one head. Does the output change if **(a)** the same vector is
# added to all *keys*; **(b)** the same vector is added to all *values*; **(c)** every key and value
# is there twice; **(d)** all queries are doubled? Answer with four of `True` / `False`.

# %% tags=["exercise"]
answer = None  # your answer, such as (True, True, True, True)


# %% tags=["check"]
def test_1(answer):
    assert isinstance(answer, tuple) and len(answer) == 4, "give four values: (a, b, c, d)"
    q, k, v = torch.randn(3, 5, 4)
    shift, before = torch.randn(4), attention(q, k, v)
    after = (
        attention(q, k + shift, v),
        attention(q, k, v + shift),
        attention(q, k.repeat(2, 1), v.repeat(2, 1)),
        attention(2 * q, k, v),
    )
    truth = [not torch.allclose(out, before, atol=1e-4) for out in after]
    wrong = sum(given is not true for given, true in zip(answer, truth))
    assert not wrong, f"{wrong} of the four are not what the computation says"


check(test_1, answer)

# %% [markdown]
# <details><summary>Hint</summary>
#
# (a) adds q · shift to each score of a row. What does softmax do with a number that is added to the
# whole row?
#
# </details>

# %% tags=["solution"]
# (a) no: a whole row of scores shifts, its softmax does not. That is also why a bias on the keys
# does nothing here: k_proj.bias is 1152 numbers without effect in every layer.
# (b) yes: weights sum to 1, so the output shifts by the same vector.
# (c) no: each share is halved and counted twice.
# (d) yes: scores are doubled, the choice gets sharper.
answer = (False, True, False, True)
check(test_1, answer)

# %% [markdown]
# ### Exercise 2 (fill in): how many patches does it look at?
#
# A useful number for any attention map: $e^{H}$ with the entropy $H = -\sum_j w_j \ln w_j$. It is 1
# if one patch has all the weight, and $N$ if all have the same. Write it for weights `float[..., N]`
# → `float[...]`.


# %% tags=["exercise"]
def patches_in_view(weights):
    return None  # your answer


# %% tags=["check"]
def test_2(patches_in_view):
    rows = torch.stack([torch.full((8,), 1 / 8), F.one_hot(torch.tensor(3), 8).float()])
    half = torch.tensor([0.5, 0, 0, 0, 0.5, 0, 0, 0])
    found = patches_in_view(torch.stack([rows, rows.flip(0), half.expand(2, 8)]))
    assert found is not None, "return a tensor"
    assert found.shape == (3, 2), f"one number a row: shape (3, 2), not {tuple(found.shape)}"
    assert not found.isnan().any(), "0 · ln 0 is 0 here, not nan"
    expected = torch.tensor([[8.0, 1], [1, 8], [2, 2]])
    assert torch.allclose(found, expected, atol=1e-3), f"expected {expected.tolist()}"


check(test_2, patches_in_view)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.special.entr(w)` is −w ln w with 0 at w = 0. Sum over the last axis only.
#
# </details>


# %% tags=["solution"]
def patches_in_view(weights):
    return torch.special.entr(weights).sum(dim=-1).exp()


for head, seen in zip(HEADS, patches_in_view(looks[0]).mean(dim=1)):
    print(f"{head:8} head: {seen:3.0f} of 256 patches on average")
check(test_2, patches_in_view)

# %% [markdown]
# ### Exercise 3 (extend): attention without all scores at once
#
# How can SDPA leave out the matrix, when softmax needs the sum of a whole row? By keeping three
# running things for a query: the largest score so far, the sum of shares, the weighted sum of
# values. Write `attend_stream(q, chunks)`: `q` is float[Dh], `chunks` yields pairs `(k, v)` of
# float[C, Dh]. Chunks reuse their memory, so use each at once; scores may be as large as 1000.


# %% tags=["exercise"]
def attend_stream(q, chunks):
    return None  # your answer: one loop, `for k, v in chunks: …`


# %% tags=["check"]
def in_chunks(k, v, size):
    """Yield (k, v) piece by piece, always in the same memory."""
    memory = torch.empty(2, size, k.shape[1])
    for start in range(0, len(k), size):
        length = len(k[start : start + size])
        memory[0, :length], memory[1, :length] = k[start : start + size], v[start : start + size]
        yield memory[0, :length], memory[1, :length]
    memory.fill_(1e9)


def test_3(attend_stream):
    for size, strength in ((3, 1), (10, 1), (4, 1), (4, 1000), (1, 300)):
        q, k, v = strength * torch.randn(6), torch.randn(10, 6), torch.randn(10, 6)
        found = attend_stream(q, in_chunks(k, v, size))
        assert found is not None and found.shape == (6,), "return float[Dh]"
        assert found.isfinite().all(), "e^1000 is infinite: subtract the largest score first"
        right = attention(q[None], k, v)[0]
        assert torch.allclose(found, right, atol=1e-4), (
            f"wrong for chunks of {size}, scores × {strength}"
        )


check(test_3, attend_stream)

# %% [markdown]
# <details><summary>Hint</summary>
#
# When a larger score turns up, everything collected so far was measured against the old maximum.
# Multiply both sums by $e^{\text{old} - \text{new}}$, then add the chunk's part. Begin with a
# maximum of −∞ and sums of 0.
#
# </details>


# %% tags=["solution"]
def attend_stream(q, chunks):
    largest, total, mixed = torch.tensor(-torch.inf), 0.0, torch.zeros_like(q)
    for k, v in chunks:
        scores = k @ q / len(q) ** 0.5  # (C,)
        new = torch.maximum(largest, scores.max())
        shares, shrink = (scores - new).exp(), (largest - new).exp()
        total = total * shrink + shares.sum()
        mixed = mixed * shrink + shares @ v
        largest = new
    return mixed / total


check(test_3, attend_stream)

# %% [markdown]
# ## Summary
#
# - A patch alone does not know what it shows; attention lets it fetch from all others.
# - Query asks, key is found, value is handed over. Weights are computed from the picture anew.
# - Divide by $\sqrt{D_h}$, or softmax is stuck before learning starts.
# - A head is *all patches, some channels*: cut the channel axis, then swap.
# - At 256 patches the projections are the cost; at 4096 the square part is, and SDPA never writes
#   it.

# %% [markdown]
# ## Quiz
#
# **1.** With 16 heads instead of one, how much more does the layer cost?
#
# <details><summary>Answer</summary>
#
# No more parameters, no more FLOPs in the matrix products: 16 heads of 72 channels are 1152 again.
# What grows is the number of score matrices: 16 of N × N instead of one.
#
# </details>

# %% [markdown]
# **2.** [Lesson 03](03_patch_embedding.ipynb) added positions to the patches. What would this layer do without them?
#
# <details><summary>Answer</summary>
#
# Shuffled in, shuffled out: it could not tell the cat from its confetti. It can use the place of a
# patch only where the place is written into the patch's vector. (Our place head read it from there.)
#
# </details>

# %% [markdown]
# **3.** The values decide what comes out. Can the output of one head ever leave the range of the
# values?
#
# <details><summary>Answer</summary>
#
# No. Weights are ≥ 0 and sum to 1, so each channel lies between the smallest and the largest value.
# Attention alone can only average. Making something new out of the mean is the work of the MLP, in
# the next lesson.
#
# </details>

# %% [markdown]
# ## References
#
# - Vaswani et al. 2017, *Attention Is All You Need*, section 3.2 (the scale is in its footnote 4).
# - Dosovitskiy et al. 2021, *An Image is Worth 16x16 Words* (ViT), section 3.1 and figure 7 (how far
#   heads look).
# - Buades, Coll and Morel 2005, *A non-local algorithm for image denoising*.
# - Milakov and Gimelshein 2018, *Online normalizer calculation for softmax*; Dao et al. 2022,
#   *FlashAttention*.
# - `SiglipAttention` in transformers, `modeling_siglip.py`; `vit.py` in big_vision.

# %% [markdown] tags=["navigation"]
# [← Patch embedding](03_patch_embedding.ipynb) | [contents](00_overview.ipynb) | [SigLIP →](05_siglip.ipynb)
