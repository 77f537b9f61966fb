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
# *40 minutes* · part I, Seeing
#
# **What you will be able to do**
#
# - compute attention for three patches with a pencil, and say what query, key and value are for;
# - show why scores are divided by √Dh;
# - write it four ways (loop, matrices, heads, SDPA) and prove that they agree;
# - draw what a patch looks at, and find a mix-up of heads that no shape shows.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("siglip_attention")

# %% [markdown]
# ## Setup
#
# From earlier lessons: the drawing helpers ([lesson 01](01_plotting.ipynb)), the `ImageProcessor`
# ([lesson 02](02_image_processor.ipynb)) and `PatchEmbedding`
# ([lesson 03](03_patch_embedding.ipynb)). The cells that begin with `#| export` become the file
# [siglip_attention.py](../paligemma/siglip_attention.py).

# %%
#| export
"""Bidirectional multi-head attention, as in SigLIP's vision encoder."""

import torch
import torch.nn.functional as F
from torch import nn

# %% tags=["setup"]
from importlib import resources

import matplotlib.pyplot as plt
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from paligemma.image_processor import ImageProcessor
from paligemma.patch_embedding import PatchEmbedding
from paligemma.plotting import show_attention, show_heatmap, show_images
from paligemma.support.course import check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS

_ = torch.manual_seed(4)

# %% [markdown]
# ## The problem
#
# After [lesson 03](03_patch_embedding.ipynb) each patch is a vector, made from its own 14 × 14
# pixels and nothing else. Look at the three patches on the left, alone. What do they show? Then
# look at where they come from.

# %%
cat = ImageProcessor(224)(sample_picture("cat"))  # [1, 3, 224, 224]
photo = (cat[0].permute(1, 2, 0) + 1) / 2  # [224, 224, 3], in 0…1
PLACES = {"eye": (5, 5), "forehead": (2, 9), "cloth": (12, 15)}  # (row, column) of a patch


# %% tags=["hide-input"]
def mark(axis, row, column):
    """A white square around one patch of the picture."""
    place = (14 * column, 14 * row)
    axis.add_patch(plt.Rectangle(place, 13, 13, fill=False, edgecolor="white", linewidth=1.5))


rows = [["a", "whole"], ["b", "whole"], ["c", "whole"]]
fig, axes = plt.subplot_mosaic(rows, figsize=(5.6, 4.1), width_ratios=[1, 3.3])
for letter, (name, (y, x)) in zip("abc", PLACES.items()):
    axes[letter].imshow(photo[14 * y : 14 * y + 14, 14 * x : 14 * x + 14])
    mark(axes["whole"], y, x)
    style = {"color": "white", "fontsize": 10, "ha": "right"}
    axes["whole"].text(14 * x + 14, 14 * y - 4, f"{letter}: {name}", **style)
axes["whole"].imshow(photo)
for letter, axis in axes.items():
    axis.set_title(letter if letter in "abc" else "", fontsize=10, pad=3)
    axis.set_axis_off()
fig.subplots_adjust(0.02, 0.02, 0.98, 0.93, wspace=0.06, hspace=0.3)
plt.close(fig)
fig

# %% [markdown]
# Green, stripes, pink: nobody can say more. "Eye" is not *in* the patch. It is in what stands
# around it. So every patch must be able to fetch something from every other one, and it must be
# able to **choose** from which, since in the next picture the eye will be elsewhere.
#
# **Attention** is the part that fetches. Each patch leaves with a weighted mean of all patches, and
# it sets the weights by itself.

# %% [markdown]
# ## By hand
#
# Three patches, each described by four numbers. (A vector's numbers are called its *channels*, too.)
# One row is one patch:

# %%
names, channels = ["fur", "ear", "wall"], ["brown", "grey", "striped", "bright"]
x = torch.tensor([[2.0, 0, 2, 0], [2, 0, 0, 0], [0, 2, 0, 2]])  # [N, D] = [3, 4]
show_heatmap(x, rows=names, columns=channels, annotate=".0f")

# %% [markdown]
# How well do two patches go together? Multiply channel by channel and add: the **dot product**.
# For fur and ear that is $2 \cdot 2 + 0 + 2 \cdot 0 + 0 = 4$. All pairs at once:

# %%
print((x @ x.T).int())  # [N, N]

# %% [markdown]
# Divide by $\sqrt{4} = 2$ (why comes soon): for fur the **scores** are 4, 2, 0.
#
# Scores become shares by **softmax**: $e$ to each score, divided by their sum. On paper for fur:
# $e^4 = 54.6$, $e^2 = 7.4$, $e^0 = 1$; the sum is 63. These shares are the **attention weights**.

# %%
scores = x @ x.T / 4**0.5  # [N, N]
weights = scores.softmax(dim=-1)  # [N, N]; each row sums to 1
assert (weights[0] - torch.tensor([54.6, 7.4, 1]) / 63).abs().max() < 0.001
show_heatmap(weights, "who looks at whom", rows=names, columns=names, annotate=True)

# %% [markdown]
# Read it row by row: fur takes 87 % from fur, 12 % from the ear, 2 % from the wall. What it
# receives is the mean of the three vectors with these shares:

# %%
out = weights @ x  # [N, D]
print("fur before:", x[0].tolist())
print("fur after: ", [round(value, 2) for value in out[0].tolist()])

# %% [markdown]
# ### Query, key, value
#
# So far, like finds like. But a patch may want something *else*: a nose may look for eyes. So a
# patch plays three roles, each by its own learned matrix:
#
# - **query**: what am I looking for?
# - **key**: what do I offer to be found by?
# - **value**: what do I hand over when found?
#
# We choose a query matrix that asks for the wall's channels, and a value that hands over "bright"
# only.

# %%
W_q = torch.tensor([[0.0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]])  # [out, in]
q = x @ W_q.T  # [N, Dh] = [3, 4]
k = x  # [N, Dh]
v = x[:, 3:]  # [N, 1]
weights = (q @ k.T / 2).softmax(dim=-1)  # [N, N]
assert weights[0, 2] > 0.99
received = (weights @ v)[0].item()
print("fur asks for", q[0].int().tolist(), f"and receives bright = {received:.0f}")
show_heatmap(weights, rows=names, columns=names, annotate=True)

# %% [markdown]
# Fur now looks at the wall, because it was told to. The wall asks for nothing, so it takes from all
# alike. In one line, for $N$ patches:
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
# make large scores, only because they are long.

# %% [markdown]
# What does softmax make of that? We ask how large the largest weight is, and how far weights can
# still **move**: a small push on score $i$ moves $w_i$ by $w_i (1 - w_i)$ times the push. Summed
# over all $i$: $1 - \sum w_i^2$.


# %%
def measure(Dh, scale):
    """Spread of the scores; largest of 256 weights; how far weights can move."""
    q, k = torch.randn(2, 256, Dh)
    scores = q @ k.T * scale  # [256, 256]
    w = scores.softmax(dim=-1)
    return scores.std(), w.amax(dim=-1).mean(), (1 - w.square().sum(dim=-1)).mean()


# %%
widths = [1, 4, 16, 72, 256, 1024]
raw = torch.tensor([measure(Dh, 1) for Dh in widths])  # a row for each width
scaled = torch.tensor([measure(Dh, Dh**-0.5) for Dh in widths])
assert (raw[:, 0] / torch.tensor(widths).sqrt() - 1).abs().max() < 0.2  # the spread is √Dh
assert raw[-1, 1] > 0.9 and raw[-1, 2] < 0.15  # one patch has nearly all; hardly moves
assert scaled[:, 1].max() < 0.1 and scaled[:, 2].min() > 0.95

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 3, figsize=(9.5, 2.8), layout="constrained")
axes[0].plot(widths, torch.tensor(widths).sqrt(), ":", color=COLOURS["ink"], label="√Dh", zorder=3)
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
# **What to notice.** The spread lies on $\sqrt{D_h}$. Without the division, wide heads give *one*
# patch nearly all the weight before anything is learned. And the room to move falls towards 0:
# hardly any gradient passes, so the choice can hardly be unlearned. Divided by $\sqrt{D_h}$ all
# three stay where they are. SigLIP's heads are 72 wide.

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
        for share, value in zip(shares, v):
            out[i] += share / sum(shares) * value
    return out


q, k, v = torch.randn(3, 6, 4)  # three matrices [N, Dh] = [6, 4]
slow = attention_by_loop(q, k, v)
print(tuple(slow.shape))

# %% [markdown]
# ## Vectorised
#
# All dot products at once are one matrix product, all weighted means another.


# %%
def attention(q, k, v):
    """q, k, v: float[..., N, Dh]; any axes before."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # [..., N, N]
    return scores.softmax(dim=-1) @ v  # [..., N, Dh]


torch.testing.assert_close(attention(q, k, v), slow)
print("equal to the loop")

# %% [markdown]
# ### Heads: several questions at once
#
# One softmax yields *one* mean. A patch of the eye may want two things: the other eye, and its
# direct neighbours. One mean of both is mud.
#
# So the channels are cut into $H$ slices of $D_h = D / H$. Each slice, a **head**, attends by
# itself; the results are laid side by side again. That is **multi-head attention**. First plainly,
# with a loop over heads:


# %%
def heads_by_loop(q, k, v, H):
    """q, k, v: float[N, D]; head h owns channels h·Dh … (h+1)·Dh."""
    Dh = q.shape[1] // H
    slices = [slice(h * Dh, (h + 1) * Dh) for h in range(H)]
    return torch.cat([attention(q[:, s], k[:, s], v[:, s]) for s in slices], dim=1)


q, k, v = torch.randn(3, 6, 8)  # [N, D] = [6, 8] each
slow = heads_by_loop(q, k, v, H=2)
assert not torch.allclose(slow, attention(q, k, v), atol=0.01)
print("two heads give something else than one head")

# %% [markdown]
# ### The same without the loop: cut, then swap
#
# All heads at once want the shape $[H, N, D_h]$. Two steps: **cut** the channel axis in two,
# $[N, D] \to [N, H, D_h]$, which moves nothing; then **swap** the first two axes. To see it, number
# the entries: 12 means patch 1, channel 2.

# %%
x = torch.arange(4)[:, None] * 10 + torch.arange(6)  # [N, D] = [4, 6]
heads = x.unflatten(-1, (2, 3)).transpose(0, 1)  # [N, H, Dh] → [H, N, Dh]


# %% tags=["hide-input"]
def numbered(values, title, axis, rows=None):
    """Cells with their numbers, in one scale of colours for all drawings."""
    show_heatmap(values, title, rows=rows, annotate="02.0f", ax=axis)
    axis.images[0].set_clim(0, 70)
    for text in axis.texts:
        text.set_color(COLOURS["ink"])


fig, axes = plt.subplots(1, 3, figsize=(7.5, 2.5), width_ratios=[2, 1, 1], layout="constrained")
numbered(x, "x: one patch a row", axes[0], rows=[f"patch {n}" for n in range(4)])
for h, axis in enumerate(axes[1:]):
    numbered(heads[h], f"head {h}", axis)
fig

# %% [markdown]
# Each head holds **all** patches and **some** channels. Keep this picture for the bug below. On the
# way back the same two steps in reverse: swap, then join.


# %%
def split(t, H=2):
    return t.unflatten(-1, (H, -1)).transpose(0, 1)  # [N, D] → [N, H, Dh] → [H, N, Dh]


def join(t):
    return t.transpose(0, 1).flatten(1)  # [H, N, Dh] → [N, H, Dh] → [N, D]


torch.testing.assert_close(join(attention(split(q), split(k), split(v))), slow)
print("all heads at once: equal to the loop over heads")

# %% [markdown]
# ### SDPA: the same, in one call
#
# PyTorch's `F.scaled_dot_product_attention` does scores, softmax and mean in one go, with the
# division by $\sqrt{D_h}$ inside.

# %%
sdpa = F.scaled_dot_product_attention(split(q), split(k), split(v))  # [H, N, Dh]
torch.testing.assert_close(join(sdpa), slow)
print("SDPA: equal to the loop over heads")

# %% [markdown]
# ## The module
#
# Four linear layers: three make queries, keys and values, the fourth mixes what the heads brought
# back. All have a bias. Every patch may look everywhere, forwards and backwards: that is what
# **bidirectional** means. Heads that do not divide the width are refused at once.


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

    def split_heads(self, t: torch.Tensor) -> torch.Tensor:
        """`float[B, N, D]` → `float[B, H, N, Dh]`: cut the channels, then swap."""
        return t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`float[B, N, D]` → `float[B, N, D]`; no mask, nothing is hidden in a picture."""
        q = self.split_heads(self.q_proj(x))  # [B, H, N, Dh]
        k = self.split_heads(self.k_proj(x))  # [B, H, N, Dh]
        v = self.split_heads(self.v_proj(x))  # [B, H, N, Dh]
        out = F.scaled_dot_product_attention(q, k, v)  # [B, H, N, Dh], scaled by 1/√Dh
        return self.out_proj(out.transpose(1, 2).flatten(2))  # [B, N, D]


# %% [markdown]
# First check: for each picture of a batch it must give what the loop over heads gives.

# %%
layer = SiglipAttention(hidden_size=8, num_attention_heads=2).requires_grad_(False)
x = torch.randn(3, 6, 8)  # [B, N, D]
out = layer(x)
for picture, ours in zip(x, out):
    q, k, v = layer.q_proj(picture), layer.k_proj(picture), layer.v_proj(picture)
    torch.testing.assert_close(layer.out_proj(heads_by_loop(q, k, v, H=2)), ours)
print(tuple(x.shape), "→", tuple(out.shape), "equal to the loop")

# %% [markdown]
# Second: patches really mix. Change one patch and see which outputs move. After
# [lesson 03](03_patch_embedding.ipynb) it was one. And attention knows no order: patches shuffled in
# come out shuffled alike.

# %%
changed = x.clone()
changed[:, 2] += 1
moved = (layer(changed) - out).abs().amax(dim=2)[0] > 1e-6
print("patch 2 changed; outputs that moved:", moved.nonzero().flatten().tolist())
assert moved.all()
order = torch.randperm(6)
torch.testing.assert_close(layer(x[:, order]), out[:, order])

# %% [markdown]
# ## Against the reference
#
# The published weights are usually run with `SiglipAttention` of transformers. The file holds its
# weights, input and output (width 24, four heads, scores large enough to matter). A test computes
# it afresh.

# %% tags=["nbval-ignore-output"]
stored = load_file("reference/siglip_attention.safetensors")
ours = SiglipAttention(hidden_size=24, num_attention_heads=4).requires_grad_(False)
ours.load_state_dict({name: stored[name] for name in ours.state_dict()})
difference = (ours(stored["x"]) - stored["output"]).abs().max().item()
print(f"transformers: largest difference {difference:.1e}")
assert difference <= 1e-5

# %% [markdown]
# PyTorch's own `nn.MultiheadAttention` keeps the three matrices in one, stacked: first the rows for
# queries, then keys, then values.

# %% tags=["nbval-ignore-output"]
torchs = nn.MultiheadAttention(embed_dim=8, num_heads=2, batch_first=True).requires_grad_(False)
three = (layer.q_proj, layer.k_proj, layer.v_proj)
torchs.in_proj_weight.copy_(torch.cat([part.weight for part in three]))
torchs.in_proj_bias.copy_(torch.cat([part.bias for part in three]))
torchs.out_proj.load_state_dict(layer.out_proj.state_dict())
difference = (torchs(x, x, x)[0] - out).abs().max().item()
print(f"nn.MultiheadAttention: largest difference {difference:.1e}")
assert difference <= 1e-5

# %% [markdown]
# ## See it: three heads that we choose
#
# First weights whose meaning we know, on a real photograph. Each patch is described by two numbers
# for each of three heads: its **colour** (red minus green, green minus blue), its **texture** (grain
# downwards and across), its **place** (row, column).

# %%
patches = F.unfold(cat, 14, stride=14)[0].T.reshape(256, 3, 14, 14)  # [N, 3, height, width]
grey = patches.mean(dim=1)  # [N, height, width]
colour = -patches.mean(dim=(2, 3)).diff(dim=1)
texture = torch.stack([grey.diff(dim=axis).std((1, 2)) for axis in (1, 2)], dim=1).log()
place = torch.cartesian_prod(torch.arange(16.0), torch.arange(16.0))
facts = torch.stack([colour, texture, place])  # [H, N, 2] = [3, 256, 2]
facts = (facts - facts.mean(dim=1, keepdim=True)) / facts.std(dim=1, keepdim=True)

# %% [markdown]
# A head should prefer patches *near* to its query $f$ in these numbers. Does a dot product measure
# nearness? Almost: $-\tfrac12|f - g|^2 = f \cdot g - \tfrac12|g|^2 - \tfrac12|f|^2$. The last term
# is the same for all keys $g$, and softmax ignores what is added to a whole row. The middle one
# becomes a third channel, which the query meets with a 1. Queries are multiplied by 8: how strongly
# near is preferred to far.

# %%
ones = torch.ones(3, 256, 1)
q = 8 * torch.cat([facts, ones], dim=-1)  # [H, N, Dh] = [3, 256, 3]
k = torch.cat([facts, -facts.square().sum(dim=-1, keepdim=True) / 2], dim=-1)  # [H, N, Dh]
looks = (q @ k.transpose(-1, -2) / 3**0.5).softmax(dim=-1)  # [H, N, N]

# %%
eye, cloth = 16 * 5 + 5, 16 * 12 + 15  # the patches' numbers
other_eye = [16 * 7 + 10, 16 * 8 + 11]
assert looks[0, eye, other_eye].sum() > 0.1  # colour: a tenth and more goes to two far patches
assert looks[1, cloth].view(16, 16)[:, 12:].sum() > 0.9  # texture: the blurred right edge
assert looks[2, eye].view(16, 16)[1:10, 1:10].sum() > 0.8  # place: at most four patches away

# %% tags=["hide-input"]
HEADS = ("colour", "texture", "place")
rows = [16 * y + x for y, x in PLACES.values()]
titles = [f"{head} head, {name}" for head in HEADS for name in PLACES]
fig = show_attention(photo, looks[:, rows].flatten(0, 1), titles, columns=3)
for axis, (y, column) in zip(fig.axes, list(PLACES.values()) * 3):
    mark(axis, y, column)
fig.set_size_inches(7.2, 7.5)
save_figure(fig, "04_cat.png")

# %% [markdown]
# **What to notice.** The white square asks; what glows is what it looks at. Same patch, three heads,
# three answers. By colour the green of one eye finds the *other eye*, far away. By place it finds
# its neighbours, whatever they show. By texture the smooth cloth finds what is out of focus at the
# right edge.
#
# Nobody drew a line between the eyes. The weights follow from this picture.

# %% [markdown]
# ### Four heads that were learned
#
# What does a *trained* head look for? A small PaliGemma ships with this course, trained on pictures
# of emoji of 112 × 112 pixels: 8 × 8 patches, width 128, four heads. We read the weights of its
# embedding and of its first attention layer from the file.

# %%
path = resources.files("paligemma") / "assets" / "tiny" / "model.safetensors"
tower = {name: weight.float() for name, weight in load_file(str(path)).items()}


def part(module, prefix):
    """Fill a module with the trained weights whose names begin with `prefix`."""
    found = {n.removeprefix(prefix): w for n, w in tower.items() if n.startswith(prefix)}
    module.load_state_dict(found)
    return module.requires_grad_(False)


tiny = "vision_tower.vision_model."
embed = part(PatchEmbedding(128, 112, 14), tiny + "embeddings.")
layer = part(SiglipAttention(128, 4), tiny + "encoder.layers.0.self_attn.")
norm = part(nn.LayerNorm(128, eps=1e-6), tiny + "encoder.layers.0.layer_norm1.")

# %% [markdown]
# `norm` brings all patches to one size; [lesson 05](05_siglip.ipynb) explains it. The weights never
# leave SDPA, so to draw them we take queries and keys from the layer and do the softmax by hand. The
# output must then be the layer's.

# %%
scene = ImageProcessor(112)(sample_picture("scene"))  # [1, 3, 112, 112]
x = norm(embed(scene))  # [1, 64, 128]
q, k = layer.split_heads(layer.q_proj(x)), layer.split_heads(layer.k_proj(x))
learned = (q @ k.transpose(-1, -2) / layer.head_dim**0.5).softmax(dim=-1)  # [1, H, N, N]
mixed = learned @ layer.split_heads(layer.v_proj(x))  # [1, H, N, Dh]
torch.testing.assert_close(layer.out_proj(mixed.transpose(1, 2).flatten(2)), layer(x))

# %%
face = 8 * 5 + 1  # a patch of the cat's face
asked = learned[0, :, face]  # [H, N]
dogs = [8 * 2 + 4, 8 * 5 + 6]  # a patch of each dog's face
print("on itself:", [round(w, 2) for w in asked[:, face].tolist()])
print("on the two dogs:", [round(w, 2) for w in asked[:, dogs].sum(dim=1).tolist()])
assert asked[:, dogs].sum(dim=1).argmax() == 2 and asked[2, dogs].sum() > 2 * 2 / 64
assert asked.max() < 0.25

# %% tags=["hide-input"]
emoji = (scene[0].permute(1, 2, 0) + 1) / 2
fig = show_attention(emoji, asked, [f"head {h + 1}" for h in range(4)], columns=4)
for axis in fig.axes:
    mark(axis, 5, 1)
fig.set_size_inches(9.5, 2.7)
save_figure(fig, "04_trained.png")

# %% [markdown]
# **What to notice.** Asked from the cat's face, the heads differ here too: head 3 finds the two dogs'
# faces as well, with more than twice an equal share. But no patch gets even a quarter of a head's
# weight. This is the *first* layer, which knows only pixels and places, and it gathers from nearly
# everywhere. [Lesson 05](05_siglip.ipynb) shows what the last one does with the same picture.

# %% [markdown]
# ### What comes back: a mean of look-alikes
#
# Weights are half of it. To *see* the weighted mean, let the values be pixels. We spoil the cat with
# noise, cut it into 3136 small patches of 4 × 4, and use the noisy pixels as query, key and value. No
# learning, no knowledge of cats.

# %%
noise = 0.25
noisy = cat + noise * torch.randn_like(cat)
v = F.unfold(noisy, 4, stride=4)[0].T  # [3136, 48]: the pixels of each small patch
q = torch.cat([v, torch.ones(len(v), 1)], dim=1)  # one channel more, as above
k = torch.cat([v, -v.square().sum(dim=1, keepdim=True) / 2], dim=1)
cleaned = [noisy]
for sharp in (0.5, 4, 12):
    mixed = F.scaled_dot_product_attention(q, k, v, scale=sharp / (48 * noise**2))
    cleaned.append(F.fold(mixed.T[None], (224, 224), 4, stride=4))

errors = [(image - cat).square().mean().item() for image in cleaned]
assert errors[2] < errors[0] / 5 and errors[2] < min(errors[1], errors[3])

# %% tags=["hide-input"]
titles = [
    f"{t}: error {e:.3f}" for t, e in zip(("noisy", "too soft", "right", "too sharp"), errors)
]
views = [((image[0].permute(1, 2, 0) + 1) / 2).clamp(0, 1) for image in cleaned]
save_figure(show_images(views, titles, columns=4), "04_denoise.png")

# %% [markdown]
# One round of attention has repaired four fifths of the damage. Patches that show the same thing
# carry different noise; in their mean the thing stays and the noise goes. Too soft, and everything is
# averaged with everything; too sharp, and each patch sees itself only.
#
# This was known as *non-local means* (2005), twelve years before transformers. What training adds is
# the choice of what counts as "alike" and what is handed over.

# %% [markdown]
# ## At full size
#
# SigLIP So400m: $D = 1152$, $H = 16$, so $D_h = 72$. The four linear layers cost $8 N D^2$ FLOPs,
# scores and means together $4 N^2 D$. PyTorch's counter, on a device without memory, must agree.

# %%
D, H = 1152, 16
print("size     N   linear layers   N² part   share   scores of one layer, bfloat16")
for size in (224, 448, 896):
    N = (size // 14) ** 2
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        SiglipAttention(D, H)(torch.empty(1, N, D))
    linear, square = 8 * N * D**2, 4 * N**2 * D
    assert counter.get_total_flops() == linear + square
    share, memory = square / (linear + square), H * N * N * 2 / 1e6
    work = f"{linear / 1e9:9.1f} GFLOP {square / 1e9:5.1f} GFLOP"
    print(f"{size} {N:5} {work} {share:6.0%} {memory:9.0f} MB")
    assert (share > 0.5) == (N > 2 * D)

# %% tags=["hide-input"]
tokens = torch.arange(64, 4097, 16)
fig, axis = plt.subplots(figsize=(6.6, 3), layout="constrained")
axis.plot(tokens, 8 * tokens * D**2 / 1e9, color=COLOURS["vision"])
axis.plot(tokens, 4 * tokens.double() ** 2 * D / 1e9, color=COLOURS["accent"])
axis.text(4150, 8 * 4096 * D**2 / 1e9, "linear layers", va="center", color=COLOURS["vision"])
axis.text(4150, 4 * 4096**2 * D / 1e9, "N² part", va="center", color=COLOURS["accent"])
axis.axvline(2 * D, color=COLOURS["muted"], linestyle=":", linewidth=1)
axis.text(2 * D + 40, 2, f"N = 2D = {2 * D}", color=COLOURS["inside"])
axis.set(xlabel="patches N", ylabel="GFLOP a layer", xlim=(0, 4096), ylim=(0, None))
axis.set_xticks([256, 1024, 2304, 4096])
save_figure(fig, "04_flops")

# %% [markdown]
# "Attention is quadratic" is true and, at 256 patches, beside the point: nine tenths of the work is
# in the linear layers. Only from $N = 2D$ on does the square part lead.
#
# The scores are another matter: half a gigabyte for *one* layer and one picture at 896. SDPA works
# through them in small tiles. Look at the largest tensor that each form must keep for the backward
# pass:

# %%
q = torch.randn(1, H, 1024, 72, requires_grad=True)
limits = {attention: H * 1024 * 1024 * 4, F.scaled_dot_product_attention: q.nbytes}
for form, limit in limits.items():
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        form(q, q, q)
    assert max(kept) == limit
    print(f"{form.__name__:29} keeps at N = 1024 up to {max(kept) / 1e6:4.1f} MB (float32)")

# %% [markdown]
# The first number is the matrix of weights, the second no more than queries, keys or values. How can
# softmax do without its whole row? Exercise 3 lets you find out.

# %% [markdown]
# ## A bug people really make
#
# A colleague writes the module anew. It runs and all shapes are right. Do you see a difference that
# matters?


# %%
class ColleaguesAttention(SiglipAttention):
    def forward(self, x):
        B, N, D = x.shape
        q = self.q_proj(x).view(B, self.num_heads, N, self.head_dim)
        k = self.k_proj(x).view(B, self.num_heads, N, self.head_dim)
        v = self.v_proj(x).view(B, self.num_heads, N, self.head_dim)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.view(B, N, D))


# %% [markdown]
# We give both a small task: 16 patches, one of them *marked* (channel 0 is 1). Every patch shall
# report the other channels of the marked one.


# %%
def marked_batch(B=64, N=16, D=16):
    x = torch.randn(B, N, D)
    x[:, :, 0] = 0
    marked = torch.randint(N, (B,))
    x[torch.arange(B), marked, 0] = 1
    return x, x[torch.arange(B), marked][:, None].expand(B, N, D)  # what each patch shall report


# %%
def learn(kind):
    """Train one layer; the squared error at each step."""
    torch.manual_seed(0)
    layer, losses = kind(16, 4), []
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(240):
        x, target = marked_batch()
        loss = (layer(x) - target)[..., 1:].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# %%
curves = {"ours": learn(SiglipAttention), "the colleague's": learn(ColleaguesAttention)}
ends = [sum(losses[-50:]) / 50 for losses in curves.values()]
assert ends[0] < 0.05 and 0.75 < ends[1] < 0.85

# %% tags=["hide-input"]
fig, axis = plt.subplots(figsize=(6.2, 2.6), layout="constrained")
for (name, losses), colour in zip(curves.items(), ("good", "bad")):
    axis.plot(losses, color=COLOURS[colour], label=name)
axis.set(xlabel="step", ylabel="squared error", ylim=(0, None))
axis.legend()
plt.close(fig)
fig

# %% [markdown]
# Both learn. Ours goes to zero; the colleague's falls a little and then stays at about 0.8. What would
# you ask next?
#
# ### The check that finds it
#
# **Cause and effect** again, on the cat: 256 patches, 16 heads. Change the patch in row 6, column 5,
# and see how many outputs move.

# %%
right, wrong = SiglipAttention(64, 16), ColleaguesAttention(64, 16)
wrong.load_state_dict(right.state_dict())
x = F.linear(F.unfold(cat, 14, stride=14).transpose(1, 2), torch.randn(64, 588) / 6)  # [1, 256, 64]
changed = x.clone()
changed[:, 6 * 16 + 5] += 3
with torch.no_grad():
    moved = torch.stack(
        [(kind(changed) - kind(x))[0].norm(dim=1) > 1e-6 for kind in (right, wrong)]
    )
print("outputs that move:", moved.sum(dim=1).tolist())
assert moved[1].view(16, 16)[6].all() and moved[1].sum() == 16  # row 6, nothing else

# %% tags=["hide-input"]
titles = ["ours: all 256 outputs move", "the colleague's: 16 outputs move"]
fig = show_attention(photo, moved.float(), titles)
for axis in fig.axes:
    mark(axis, 6, 5)
save_figure(fig, "04_bug.png")

# %% [markdown]
# In the colleague's module a patch reaches its own **row** of the picture and nothing else. 16 heads,
# 16 rows: that is no accident. Look at what `view` does to our numbered entries:

# %%
x = torch.arange(4)[:, None] * 10 + torch.arange(6)  # 12 is patch 1, channel 2
right, wrong = x.view(4, 2, 3).transpose(0, 1), x.view(2, 4, 3)  # [H, N, Dh] both

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 4, figsize=(8.4, 2.6), layout="constrained")
for side, (name, heads) in enumerate({"cut, swap": right, "view only": wrong}.items()):
    for h in range(2):
        numbered(heads[h], f"{name}: head {h}", axes[2 * side + h])
fig

# %% [markdown]
# Left: head 0 holds all four patches, channels 0 … 2. Right: it holds patches 0 and 1 with *all*
# channels, each torn in two. A head has become a strip of the sequence, and strips never meet: in our
# task three strips of four never see the mark, so at least three quarters of the error stay.
#
# `view(N, H, Dh)` then `transpose` is right; `view(H, N, Dh)` has the same shape and another meaning.

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
    assert isinstance(answer, tuple | list) and len(answer) == 4, "give four values: (a, b, c, d)"
    assert all(isinstance(value, bool) for value in answer), "each value is True or False"
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
    assert not wrong, (
        f"{wrong} of the four are not what the computation says: follow one row of scores"
    )


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
# ### Exercise 2 (write): multi-head attention
#
# Now without looking up, and without SDPA: queries, keys and values `float[B, N, D]` of a whole
# batch, and a number of heads. Return `float[B, N, D]`.


# %% tags=["exercise"]
def multi_head(q, k, v, num_heads):
    return None  # your code


# %% tags=["check"]
def test_2(multi_head):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 6, 12)  # [B, N, D] = [2, 6, 12] each
    out = multi_head(q, k, v, 3)
    assert isinstance(out, torch.Tensor), "return a tensor"
    assert out.shape == (2, 6, 12), f"[B, N, D] = [2, 6, 12] wanted, not {list(out.shape)}"
    ones = torch.ones_like(v)
    assert torch.allclose(multi_head(q, k, ones, 3), ones, atol=1e-4), (
        "where all values are 1 each mean is 1: the weights of a query do not sum to 1 over the keys"
    )
    assert torch.allclose(multi_head(q[:1], k[:1], v[:1], 3), out[:1], atol=1e-4), (
        "a picture's result depends on the other pictures of the batch"
    )
    one_value = v + F.one_hot(torch.tensor(4), 6)[:, None]  # another value for patch 4
    assert ((multi_head(q, k, one_value, 3) - out).abs() > 1e-5).all(), (
        "another value for one patch does not reach every patch in every channel"
    )
    one_head = q + torch.tensor([0, 1, 0]).repeat_interleave(4)  # other queries for head 1
    moved = ((multi_head(one_head, k, v, 3) - out).abs() > 1e-5).flatten(0, 1).any(dim=0)
    assert not moved[:4].any() and not moved[8:].any(), (
        "the queries of one head change the channels of another head"
    )
    right = torch.stack([heads_by_loop(*t, H=3) for t in zip(q, k, v)])
    wrong_scales = (0.5, 2, 3**0.5, 6)  # not scaled; by Dh; by √D; by D
    scaled = [torch.allclose(multi_head(s * q, k, v, 3), right, atol=1e-4) for s in wrong_scales]
    assert not any(scaled), "the scores are too large or too small by a factor that never changes"
    assert torch.allclose(out, right, atol=1e-4), "not what the loop over heads gives"


check(test_2, multi_head)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Three times `unflatten` and `transpose`, then `attention`, then back. With a batch in front, the
# axes to swap are 1 and 2.
#
# </details>


# %% tags=["solution"]
def multi_head(q, k, v, num_heads):
    # Cut the channel axis and bring the heads before the patches, so that the last two axes are
    # [N, Dh], as one head wants them.
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # [B, H, N, N]
    out = scores.softmax(dim=-1) @ v  # [B, H, N, Dh]
    return out.transpose(1, 2).flatten(2)


check(test_2, multi_head)

# %% [markdown]
# ### Exercise 3 (extend): attention without all scores at once
#
# SDPA leaves out the matrix, though softmax needs the sum of a whole row. It keeps three running
# things for a query: the largest score so far, the sum of shares, the weighted sum of values. Write
# it: `q` is float[Dh], `chunks` yields pairs `(k, v)`, a few keys and values at a time, float[n, Dh]
# each. Chunks reuse their memory, so use each at once; scores may be as large as 1000.


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
    torch.manual_seed(0)
    for size, strength in ((10, 1), (4, 1), (4, 1000), (1, 300)):
        q, k, v = strength * torch.randn(6), torch.randn(10, 6), torch.randn(10, 6)
        found = attend_stream(q, in_chunks(k, v, size))
        assert isinstance(found, torch.Tensor) and found.shape == (6,), "return float[Dh]"
        assert found.isfinite().all(), (
            "e to a large score is infinite: what may be subtracted from all?"
        )
        right = attention(q[None], k, v)[0]
        assert found.abs().max() < 1e6, "you read a chunk after its memory was used again"
        assert size < 10 or torch.allclose(found, right, atol=1e-4), (
            "wrong even where all keys come in one chunk: is it softmax, scaled, of this query?"
        )
        assert torch.allclose(found, right, atol=1e-4), (
            f"wrong when the keys come {size} at a time: what was collected before a larger score came?"
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
    # All shares are measured against the largest score so far; when it grows, both sums shrink.
    largest, total, mixed = torch.tensor(-torch.inf), 0.0, torch.zeros_like(q)
    for k, v in chunks:
        scores = k @ q / len(q) ** 0.5  # one a key
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
# - At 256 patches the linear layers are the cost; at 4096 the square part is, and SDPA works through
#   it in tiles.

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
# Attention alone can only average. Making something new out of the mean is the work of the other
# half of a block, in [lesson 05](05_siglip.ipynb).
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
