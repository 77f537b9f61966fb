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
# [← GeGLU](08_geglu.ipynb) | [contents](00_overview.ipynb) | [Grouped-query attention →](10_grouped_query_attention.ipynb)

# %% [markdown]
# # 09 · RoPE: how does a token know where it stands?
#
# *40 minutes* · part II, Language
#
# **What you will be able to do**
#
# - say why attention cannot see order, and show it in five lines;
# - turn a query by hand, with a loop, with complex numbers and with the code that Gemma uses;
# - prove that a score then depends only on the distance between two tokens;
# - see which distances trained heads look for, and recognise a bug that only they notice.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("rope")

# %% [markdown]
# ## Setup
#
# From earlier lessons: drawing ([lesson 01](01_plotting.ipynb)), and the `RMSNorm` ([lesson 07](07_rms_norm.ipynb)) that stands before the shipped model's first attention. The cells that begin with `#| export` become the file [rope.py](../paligemma/rope.py).

# %%
#| export
"""Rotary position embedding: turn queries and keys by an angle that grows with position."""

import torch
from torch import nn

# %% tags=["setup"]
import math
from importlib import resources

import matplotlib.pyplot as plt
import torch.nn.functional as F
from matplotlib.patches import Arc
from safetensors.torch import load_file

from paligemma.plotting import show_attention, show_heatmap
from paligemma.rms_norm import RMSNorm
from paligemma.support.course import check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS

torch.manual_seed(9)
torch.set_printoptions(precision=3, sci_mode=False)

# %% [markdown]
# ## The problem: attention has no order
#
# Attention compares every query with every key, one pair at a time. The score is a dot product of two vectors. Nothing in it says which token came first. Give it the same words in another order, and every word finds the same partners with the same weights.

# %%
words = {word: torch.randn(4) * 1.5 for word in ("dog", "bites", "man")}
orders = ["dog bites man".split(), "man bites dog".split()]
maps = []
for order in orders:
    x = torch.stack([words[word] for word in order])
    maps.append((x @ x.T / 2).softmax(-1))
    out = F.scaled_dot_product_attention(x, x, x)
    print(f"{' '.join(order)}: dog becomes", out[order.index("dog")])
assert torch.allclose(maps[0], maps[1].flip(0, 1))

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")
for ax, order, weights in zip(axes, orders, maps):
    show_heatmap(weights, " ".join(order), rows=order, columns=order, annotate=True, ax=ax)
plt.close(fig)
fig

# %% [markdown]
# A row is a query, a column a key. Look for the number where "bites" meets "dog": it is the same in both pictures. The cells moved with the words, the values did not. To this layer the two sentences mean the same.

# %% [markdown]
# ## Add a vector, or turn one?
#
# SigLIP *added* a learned vector for each position ([lesson 03](03_patch_embedding.ipynb)), from a table that has to end somewhere. In text the useful fact is relative: *two words before me*. **RoPE** (rotary position embedding) **turns** queries and keys by an angle proportional to their position.

# %% [markdown]
# ## By hand: two numbers, a quarter turn
#
# A **rotation** of the vector $(x, y)$ anticlockwise by an angle $\theta$ gives
#
# $$(x\cos\theta - y\sin\theta,\;\; x\sin\theta + y\cos\theta).$$
#
# For 90° the cosine is 0 and the sine is 1, so $(x, y)$ becomes $(-y, x)$. Let a token at position $m$ be turned by $m$ quarter turns. Check the four lines with a pencil.


# %%
def turn(v, degrees):
    a = math.radians(degrees)
    x, y = v
    return round(x * math.cos(a) - y * math.sin(a), 6), round(x * math.sin(a) + y * math.cos(a), 6)


for position in range(4):
    print(f"(3, 1) at position {position}: {turn((3, 1), 90 * position)}")

# %% [markdown]
# The length never changes. Next, a query $q = (3, 1)$ at position $m$ and a key $k = (2, 0)$ at position $n$. Their score is the dot product of the two turned vectors.

# %%
q, k = (3, 1), (2, 0)


def score(m, n, degrees=90):
    a, b = turn(q, m * degrees), turn(k, n * degrees)
    return round(a[0] * b[0] + a[1] * b[1], 3)


for m, n in [(2, 1), (3, 2), (101, 100), (1, 2), (102, 100)]:
    print(f"query at {m:3}, key at {n:3}, distance {m - n:2}: score {score(m, n)}")

# %% [markdown]
# The first three pairs stand one apart, at very different positions, and score the same. Swap the two, or move them two apart, and the score is another one. So the score knows distance *and* direction, and nothing about the absolute position.

# %% [markdown]
# ### Why: two turns in a row
#
# Write $R_m$ for "turn by $m$ steps". Turns add up, and the transpose turns back: $R_m^\top = R_{-m}$. Therefore
#
# $$(R_m q)\cdot(R_n k) = q^\top R_m^\top R_n\,k = q^\top R_{n-m}\,k.$$
#
# Only $n-m$ is left. Below, a step is 20°. From left to right both tokens move six positions, so both arrows turn by 120°. The angle between them stays, and with it the score.

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained")
for ax, (m, n) in zip(axes, [(3, 1), (9, 7)]):
    angles = {}
    for name, v, at, colour in (("q", q, m, "language"), ("k", k, n, "vision")):
        x, y = turn(v, 20 * at)
        angles[name] = math.degrees(math.atan2(y, x))
        far = 1 + 0.55 / math.hypot(x, y)
        style = {"color": COLOURS[colour]}
        ax.quiver(0, 0, x, y, angles="xy", scale_units="xy", scale=1, width=0.012, **style)
        ax.text(far * x, far * y, f"{name} at {at}", ha="center", va="center", **style)
        ax.add_patch(plt.Circle((0, 0), math.hypot(*v), fill=False, lw=0.8, alpha=0.5, **style))
    between = (angles["q"] - angles["k"]) % 360
    ax.add_patch(
        Arc((0, 0), 2, 2, color=COLOURS["ink"], theta1=angles["k"], theta2=angles["q"], lw=2)
    )
    middle = math.radians(angles["k"] + between / 2)
    ax.text(1.5 * math.cos(middle), 1.5 * math.sin(middle), f"{between:.0f}°", ha="center")
    ax.set(xlim=(-4.4, 4.4), ylim=(-3.9, 3.9), aspect="equal", title=f"score {score(m, n, 20):.2f}")
    ax.set_axis_off()
assert score(3, 1, 20) == score(9, 7, 20)
save_figure(fig, "09_same_distance")

# %% [markdown]
# ### One clock is not enough
#
# With 90° a step, position 4 looks like position 0: the hand has come round. Turn slower, and neighbours look alike. A clock solves this with several hands. RoPE does too. A head of width $D_h$ has $D_h/2$ pairs of channels. At each position pair $i$ turns on by
#
# $$\theta_i = \text{base}^{-2i/D_h}.$$
#
# This is its **frequency**, an angle in radians: fast hands first, slow hands last.

# %%
head_dim, base = 8, 10000.0
for i in range(head_dim // 2):
    theta = base ** (-2 * i / head_dim)
    print(
        f"pair {i}: {theta:.3f} radians a position, one turn in {math.tau / theta:6.1f} positions"
    )

# %% [markdown]
# The first transformer had the same clock: it *added* the sines and cosines of these angles to each token's vector (Vaswani 2017). RoPE turns by them instead, so that only differences are left.

# %% [markdown]
# ## As a loop
#
# Which two channels form a pair? Gemma takes channel $i$ and channel $i + D_h/2$: the first half of the head supplies the $x$, the second half the $y$. One vector, one pair after the other:


# %%
def rope_loop(x, position, base=10000.0):
    half = len(x) // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = position * base ** (-2 * i / len(x))
        c, s = math.cos(angle), math.sin(angle)
        out[i] = x[i] * c - x[i + half] * s
        out[i + half] = x[i] * s + x[i + half] * c
    return out


# %%
x = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])  # four pairs, each (1, 0)
for position in (0, 1, 10):
    print(f"position {position:2}:", rope_loop(x, position))

# %% [markdown]
# Every pair began as $(1, 0)$. At position 1 the first hand (columns 0 and 4) has moved far, the last (columns 3 and 7) hardly at all. At position 10 the first has been round once and more. Together the hands give each position a face of its own.

# %% [markdown]
# ## Vectorised, first form: complex numbers
#
# A pair $(x, y)$ is the complex number $z = x + iy$, and turning by an angle $\theta$ is one multiplication: $z \cdot e^{i\theta}$. So the whole rotation is a product with a table of complex numbers, one for each position and pair.


# %%
def rope_complex(x, positions, base=10000.0):
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half) / half)  # [Dh/2]
    angle = positions[:, None] * frequency  # [L, Dh/2]
    z = torch.complex(x[..., :half], x[..., half:])  # [L, Dh/2]
    z = z * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), dim=-1)  # [L, Dh]


# %%
x = torch.randn(6, 8)
positions = torch.tensor([0, 1, 2, 10, 255, 300])
slow = torch.stack([rope_loop(row, int(p)) for row, p in zip(x, positions)])
assert torch.allclose(rope_complex(x, positions), slow, atol=1e-4)
print("loop and complex numbers agree")

# %% [markdown]
# ## Vectorised, second form: rotate half
#
# Complex tensors know no bfloat16. The formula for one pair needs only real numbers:
#
# $$\begin{pmatrix}x\\y\end{pmatrix}\cos\theta + \begin{pmatrix}-y\\x\end{pmatrix}\sin\theta$$
#
# The second vector is the first after a quarter turn. For the whole head this means: swap the halves, and negate what lands in front.


# %%
def rotate_half(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


print("rotate_half of 1…8:", rotate_half(torch.arange(1, 9)).tolist())

# %%
angle = positions[:, None] * base ** (-torch.arange(4) / 4)  # [L, Dh/2]
angle = torch.cat((angle, angle), dim=-1)  # [L, Dh]: both members of a pair turn alike
fast = x * angle.cos() + rotate_half(x) * angle.sin()
assert torch.allclose(fast, rope_complex(x, positions), atol=1e-5)
print("complex numbers and rotate-half agree")

# %% [markdown]
# ## The module
#
# Two parts, because they run at different times. The cosines and sines depend on the positions alone: they are made **once** for a forward pass and shared by all layers. The turn itself happens in every layer, to the queries and to the keys. Values are not turned: position should decide *who* is heard, not *what* is said. A width or base that makes no rotation is refused.


# %%
#| export
class RotaryEmbedding(nn.Module):
    """Cosines and sines of the rotation angles, one per position and pair of channels.

    Args:
        head_dim: width Dh of a head; even.
        base: wavelengths run from 2π to almost 2π·base positions (`rope_theta`).

    Raises:
        ValueError: `head_dim` is not a positive even number, or `base` is not positive.

    Source: Su et al. 2021 (RoFormer), section 3.2.2.
    """

    def __init__(self, head_dim: int, base: float = 10000.0):
        super().__init__()
        if head_dim < 2 or head_dim % 2:
            raise ValueError(
                f"head_dim {head_dim} does not split into pairs of channels; give an even number"
            )
        if not base > 0:
            raise ValueError(f"base {base} is not a positive number; Gemma's is 10000")
        self.head_dim, self.base = head_dim, base

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Angles for the given positions.

        Args:
            positions: `int64[B, L]`, where each token stands in its row.

        Returns:
            cos, sin: `float32[B, 1, L, Dh]`, ready to broadcast over heads.
        """
        # Computed here rather than stored: no buffer to lose on the meta device or to round.
        pair = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32)
        frequency = 1.0 / self.base ** (pair / self.head_dim)  # [Dh/2] radians per position
        angle = positions[:, None, :, None].float() * frequency  # [B, 1, L, Dh/2]
        angle = torch.cat((angle, angle), dim=-1)  # [B, 1, L, Dh]
        return angle.cos(), angle.sin()


# %%
#| export
def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate channel i together with channel i + Dh/2.

    Args:
        x: queries or keys, `float[B, H, L, Dh]`.
        cos: `float32[B, 1, L, Dh]` from `RotaryEmbedding`.
        sin: the same.

    Returns:
        `float[B, H, L, Dh]` in the dtype of `x`; lengths of vectors are kept.

    Source: the "rotate half" form of gemma_pytorch and transformers (not interleaved pairs).
    """
    first, second = x.chunk(2, dim=-1)  # [B, H, L, Dh/2] each
    turned = torch.cat((-second, first), dim=-1)  # x after a quarter turn
    return (x * cos + turned * sin).type_as(x)


# %%
cos, sin = RotaryEmbedding(head_dim=8)(positions[None])
assert torch.allclose(apply_rope(x[None, None], cos, sin)[0, 0], fast, atol=1e-5)
print("as before; cos is", tuple(cos.shape))

# %% [markdown]
# Positions go through `.float()` even in a bfloat16 model. bfloat16 keeps 8 significant bits, so above 256 it cannot count by ones. In PaliGemma the image takes positions 0 to 255, and the text begins at 256: rounding would hit exactly the text.

# %%
counted = torch.arange(255, 263)
print(counted.tolist())
print(counted.bfloat16().long().tolist(), "in bfloat16")
assert counted[2].bfloat16() == 256  # 257 is lost

# %% [markdown]
# ## Against the reference
#
# The stored file holds queries and keys of width 256 and what the rotary embedding of transformers' Gemma makes of them. `tests/test_rope.py` computes it afresh.

# %% tags=["nbval-ignore-output"]
ref = load_file("reference/rope.safetensors")
cos, sin = RotaryEmbedding(256)(ref["positions"])
for name in ("q", "k"):
    ours = apply_rope(ref[name], cos, sin)
    gap = (ours - ref[f"{name}_turned"]).abs().max().item()
    print(f"{name}: shape {tuple(ours.shape)}, largest difference {gap:.1e}")
    assert gap <= 1e-5

# %% [markdown]
# ## See it: heads that look for a distance
#
# What do trained heads make of it? The shipped model's first attention reads the normed rows of its table. It has four query heads of width 32 and one key head for all of them ([lesson 10](10_grouped_query_attention.ipynb) says why). We compute the queries and keys of all tokens:

# %%
file = resources.files("paligemma") / "assets" / "tiny" / "model.safetensors"
weights = {k.removeprefix("language_model.model."): w for k, w in load_file(str(file)).items()}
norm = RMSNorm(128)
norm.load_state_dict({"weight": weights["layers.0.input_layernorm.weight"].float()})
x = norm(weights["embed_tokens.weight"].float() * 128**0.5).detach()  # [V, D]
queries = (x @ weights["layers.0.self_attn.q_proj.weight"].float().T).view(-1, 4, 32)  # [V, H, Dh]
keys = x @ weights["layers.0.self_attn.k_proj.weight"].float().T  # [V, Dh]

# %% [markdown]
# A mask is written as sixteen `<seg>` tokens in a row, ids 2048 to 2175 here. How high does one score another that stands some positions before it? A score is linear in the query and in the key, so the mean over all pairs is the score of the means.


# %%
def by_distance(apply, base=10000.0, L=24):
    """Mean score of a <seg> with a <seg> 0, 1, … positions before it: float[H, L]."""
    q, k = queries[2048:2176].mean(0), keys[2048:2176].mean(0)  # [H, Dh], [Dh]
    cos, sin = RotaryEmbedding(32, base)(torch.arange(L)[None])
    turned = apply(q[None, :, None].expand(1, 4, L, 32), cos, sin)[0]  # [H, L, Dh]
    return turned @ k / 32**0.5  # the key stands at position 0


likes = by_distance(apply_rope)
print("each head's favourite distance:", likes.argmax(-1).tolist())
assert likes.argmax(-1).tolist() == [1, 0, 8, 3]

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(8.4, 3.4), layout="constrained")
for head, colour in enumerate(("vision", "language", "together", "accent")):
    best = likes[head].argmax().item()
    ax.plot(likes[head], color=COLOURS[colour], label=f"head {head}: {best} before")
    ax.plot(best, likes[head, best], "o", color=COLOURS[colour])
ax.axhline(0, color=COLOURS["muted"], lw=0.6)
ax.set(xlabel="positions between a <seg> and an earlier one", ylabel="mean score", xlim=(-0.3, 23))
ax.set_xticks(range(0, 24, 4))
ax.legend(ncols=2, loc="lower left")
save_figure(fig, "09_distances")

# %% [markdown]
# **What to notice.** Each head has its own distance: one looks at the token before, one at itself, one three and one eight positions back. Without turning every curve would be flat. But any vectors have *some* favourite distance. Do all pairs of tokens agree on it, and would they without training?


# %%
def agreement(queries, keys):
    """How many pairs have the favourite distance of the mean, for each head: float[H]"""
    cos, sin = RotaryEmbedding(32)(torch.arange(24)[None])
    turned = apply_rope(queries[:, :, None], cos, sin)  # [queries, H, L, Dh]
    favourite = (turned @ keys.T).argmax(2)  # [queries, H, keys]
    usual = (turned.mean(0) @ keys.mean(0)).argmax(-1)  # [H]
    return (favourite == usual[:, None]).float().mean((0, 2))


# %%
seg = x[2048:2176]
trained = agreement(queries[2048:2176], keys[2048:2176])
random_q, random_k = torch.randn(5, 128, 128), torch.randn(5, 128, 32)
untrained = [agreement((seg @ q).view(-1, 4, 32), seg @ k) for q, k in zip(random_q, random_k)]
print("trained:  ", trained, f" untrained: {torch.stack(untrained).mean():.2f} on average")
assert trained.min() > 0.9 and torch.stack(untrained).mean() < 0.5

# %% [markdown]
# Over nine tenths of the pairs agree; with random weights, on average, not even half. Training made these heads.
#
# Here are the sixteen positions of one mask, for the head that looks three back:

# %%
head = 3
q = queries[2048:2176, head].mean(0).expand(1, 1, 16, 32)  # [B, H, L, Dh], at 16 positions
k = keys[2048:2176].mean(0).expand(1, 1, 16, 32)
cos, sin = RotaryEmbedding(32)(torch.arange(16)[None])
scores = (apply_rope(q, cos, sin) @ apply_rope(k, cos, sin).mT)[0, 0] / 32**0.5  # [L, L]
diagonals = [scores.diagonal(offset) for offset in range(-15, 16)]
assert max(d.max() - d.min() for d in diagonals) < 1e-3 and scores[3, 0] > scores[0, 3] + 1
print(f"without RoPE all scores are {(q @ k.mT / 32**0.5).mean():.1f}")

# %% tags=["hide-input"]
fig = show_heatmap(scores, f"head {head}", centre=0)
fig.set_size_inches(4.6, 4.2)
fig.axes[0].set(xlabel="position of the key", ylabel="position of the query")
fig.axes[0].set_xticks(range(0, 16, 3), range(0, 16, 3))
fig.axes[0].set_yticks(range(0, 16, 3), range(0, 16, 3))
save_figure(fig, "09_scores")

# %% [markdown]
# Every diagonal has one colour: walk down and right by the same number of steps, and the score stays. That is the proof from above, as a measurement. The two sides of the main diagonal differ, so *before* and *after* are told apart.

# %% [markdown]
# ### The hands of Gemma's clock
#
# A head of Gemma is 256 wide: 128 hands. How many positions does each need to go round once? The lines mark the image tokens of the three PaliGemma sizes.

# %%
wavelength = math.tau * 10000 ** (torch.arange(128) / 128)  # positions for one turn
counts = [(size // 14) ** 2 for size in (224, 448, 896)]
for count in counts:
    print(f"{count:4} tokens: {(wavelength <= count).sum()} of 128 pairs go round within them")

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(8, 3.4), layout="constrained")
ax.semilogy(wavelength, color=COLOURS["language"], lw=2.5)
for size, count in zip((224, 448, 896), counts):
    ax.axhline(count, color=COLOURS["vision"], lw=1, ls="--")
    label = f"{count} image tokens ({size} pixels)"
    ax.text(0, count * 1.12, label, color=COLOURS["vision"])
ax.set(xlabel="pair of channels", ylabel="positions for one turn", xlim=(-1, 128), ylim=(4, 1e5))
save_figure(fig, "09_wavelengths")

# %% [markdown]
# Below a dashed line are the hands that go round at least once within the picture: they tell near positions apart but repeat. Above are the slow ones, which never repeat inside it and so tell far from near. Both kinds are needed, as minutes and hours are.

# %% [markdown]
# ### Where "near" is, on a picture
#
# Take a query and a key that agree fully (all channels equal). What is left in their score is pure position: the mean of all cosines, times a constant. We call it the *pull* at a distance. Image tokens are numbered row by row, so the patch straight below is 16 positions away.


# %%
def pull(distance, base=10000.0, head_dim=256):
    cos, _ = RotaryEmbedding(head_dim, base)(distance[None])
    return cos[0, 0].mean(-1)  # [L]


print("1, 2 and 16 patches along the line:", pull(torch.tensor([1, 2, 16])))
assert pull(torch.tensor([1, 2])).min() > pull(torch.tensor([16, 17])).max()

# %% tags=["hide-input"]
patches = torch.arange(256)
centres = [16 * 4 + 4, 16 * 8 + 11]
shown = torch.stack([(6 * pull(patches - c)).softmax(0) for c in centres])
titles = [f"from row {c // 16}, column {c % 16}" for c in centres]
show_attention(sample_picture("cat"), shown, titles)

# %% [markdown]
# To RoPE a picture is one long line. The neighbours left and right are near; the patch straight below is no nearer than the sixteenth along the line. The language model still sees two dimensions, but because SigLIP's learned positions put them into the *content* of each image token.

# %% [markdown]
# ## At full size
#
# What does position cost in the 3B model? It has no weights: the whole table follows from one number, the base. The work is a few multiplications, beside the projections whose results it turns.

# %%
H, K, Dh, layers, D = 8, 1, 256, 18, 2048
turning = layers * (H + K) * Dh * 3  # two products and a sum for each number
projecting = layers * 2 * D * (H + K) * Dh  # a product and a sum for each weight
print("parameters:", sum(p.numel() for p in RotaryEmbedding(Dh).parameters()))
print(f"FLOPs a token: turning {turning:,}, making q and k {projecting:,}")
print(f"{projecting // turning} times as many")

# %% [markdown]
# ### What the base decides
#
# A small base makes all hands fast: positions are told apart sharply, but far ones collide. A large one spends pairs on distances that never occur. Below, the pull for three bases.

# %%
for value in (100.0, 10_000.0, 1_000_000.0):
    near, middle, far = pull(torch.tensor([1, 256, 1024]), value).tolist()
    slowest = math.tau * value ** (127 / 128)
    print(f"base {value:9,.0f}: slowest hand {slowest:9,.0f}; pull", end=" ")
    print(f"at 1: {near:.2f}, at 256: {middle:.2f}, at 1024: {far:.2f}")
assert math.tau * 100 ** (127 / 128) < 1024
assert pull(torch.tensor([256])) > pull(torch.tensor([1024])) + 0.1

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(8.4, 3.4), layout="constrained")
for value, colour in ((100.0, "bad"), (10_000.0, "language"), (1_000_000.0, "vision")):
    curve = pull(torch.arange(1200), value)
    ax.plot(curve, color=COLOURS[colour], lw=1.4, label=f"base {value:,.0f}")
for count in (256, 1024):
    ax.axvline(count, ymax=0.82, color=COLOURS["muted"], lw=1, ls="--")
    ax.text(count + 8, 0.85, f"{count} tokens")
ax.set(xlabel="distance in tokens", ylabel="pull", xlim=(0, 1200), ylim=(-0.16, 1.12))
ax.legend(loc="upper center", ncols=3)
save_figure(fig, "09_base")

# %% [markdown]
# With base 100 even the slowest hand goes round within 1024 tokens, so no hand is left that tells far from farther. With 10,000 the pull still falls between 256 and 1024.
#
# The base is part of what the weights learned. Change it afterwards, and two of the four trained heads look elsewhere. That is why `rope_theta` is read from the model's config.

# %%
print("trained with 10,000, read with 100:", by_distance(apply_rope, 100.0).argmax(-1).tolist())
assert (by_distance(apply_rope, 100.0).argmax(-1) != likes.argmax(-1)).sum() == 2

# %% [markdown]
# ## A bug people really make: the other pairing
#
# A colleague ports Gemma. Their RoPE passes every test they thought of: lengths are kept, and scores depend on the distance only. The model loads without error, and its answers are nonsense. Here is the code. What is wrong with it?


# %%
def apply_rope_ported(x, cos, sin):
    cos, sin = cos[..., : x.shape[-1] // 2], sin[..., : x.shape[-1] // 2]
    x, y = x[..., 0::2], x[..., 1::2]
    return torch.stack((x * cos - y * sin, x * sin + y * cos), dim=-1).flatten(-2)


# %%
q, k = ref["q"], ref["k"]
tables = [RotaryEmbedding(256)(ref["positions"] + shift) for shift in (0, 50)]
for name, apply in (("ours", apply_rope), ("ported", apply_rope_ported)):
    kept = torch.allclose(apply(q, *tables[0]).norm(dim=-1), q.norm(dim=-1))
    here, moved = [apply(q, *table) @ apply(k, *table).mT / 16 for table in tables]
    relative = torch.allclose(here, moved, atol=1e-3)
    same = torch.allclose(here, ref["scores"], atol=1e-4)
    print(f"{name:6}: lengths kept {kept}, relative {relative}, equal to the reference {same}")
    assert kept and relative and same == (name == "ours")

# %% [markdown]
# Both tests pass; only the reference objects. And the trained heads do: let them read with the port.

# %%
print("ours:  ", likes.argmax(-1).tolist())
print("ported:", by_distance(apply_rope_ported).argmax(-1).tolist())
assert (by_distance(apply_rope_ported).argmax(-1) != likes.argmax(-1)).all()
assert torch.allclose(by_distance(apply_rope_ported)[:, 0], likes[:, 0], atol=1e-4)

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
for ax, name, apply in zip(axes, ("ours", "ported"), (apply_rope, apply_rope_ported)):
    for head, colour in enumerate(("vision", "language", "together", "accent")):
        ax.plot(by_distance(apply)[head], color=COLOURS[colour], label=f"head {head}")
    ax.set(title=name, xlabel="positions before", xlim=(0, 23))
axes[0].set_ylabel("mean score")
axes[1].legend(ncols=2, loc="lower right")
save_figure(fig, "09_ported")

# %% [markdown]
# No head finds its distance any more. Only at distance 0 do both agree: there the turns cancel, whatever the pairing.
#
# The port pairs channels 0 and 1, 2 and 3 (*interleaved*), as the RoFormer paper writes it. Gemma pairs $i$ with $i + D_h/2$. Each is a right RoPE on its own. But training taught the weights which channels turn together and how fast, so they work with one pairing only. **Properties do not replace a reference.**

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): what may change without a trace?
#
# Before you run anything: which of these leave **every** score between queries and keys as it was?
#
# - `"a"` add 100 to all positions
# - `"b"` double all positions
# - `"c"` make all positions negative
# - `"d"` subtract 3 from all positions, so that some become negative
# - `"e"` turn the keys only
#
# Answer with a string of letters, such as `"be"`.

# %% tags=["exercise"]
answer = None  # your answer


# %% tags=["check"]
def test_1(answer):
    letters = isinstance(answer, str) and set(answer) <= set("abcde")
    assert letters, "give a string of letters from a to e"
    rope = RotaryEmbedding(64)
    p, q, k = torch.arange(12)[None], torch.randn(1, 1, 12, 64), torch.randn(1, 1, 12, 64)
    scores = lambda p, r: apply_rope(q, *rope(r)) @ apply_rope(k, *rope(p)).mT
    changed = {
        "a": (p + 100, p + 100),
        "b": (2 * p, 2 * p),
        "c": (-p, -p),
        "d": (p - 3, p - 3),
        "e": (p, 0 * p),
    }
    wrong = [
        letter
        for letter, (keys, queries) in changed.items()
        if torch.allclose(scores(keys, queries), scores(p, p), atol=1e-2) != (letter in answer)
    ]
    assert not wrong, f"judged wrongly: {len(wrong)} of 5; what is n − m before and after?"


check(test_1, answer)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Write $n - m$ for one pair of tokens, before and after the change. If it is the same for every pair, the scores are.
#
# </details>

# %% tags=["solution"]
# (c) turns the difference n - m into m - n: who came first is swapped. (b) doubles it.
# (e) leaves the absolute position of the key in the score.
answer = "ad"
check(test_1, answer)

# %% [markdown]
# ### Exercise 2 (write): the rotation as a matrix
#
# The proof used a matrix $R_m$. Write it for a whole head, with Gemma's pairing: `rotation_matrix(m, Dh, base)` is `float[Dh, Dh]`, and times a vector it gives what `rope_loop` gives at position $m$.


# %% tags=["exercise"]
def rotation_matrix(position, head_dim, base=10000.0):
    return None  # your code: float[Dh, Dh]


# %% tags=["check"]
def test_2(rotation_matrix):
    for head_dim, position, base in (
        (2, 1, 10000.0),
        (8, 1, 10000.0),
        (8, 5, 10000.0),
        (6, 3, 50.0),
    ):
        R = rotation_matrix(position, head_dim, base)
        assert isinstance(R, torch.Tensor), "return a tensor"
        assert R.shape == (head_dim, head_dim), f"its shape must be {(head_dim, head_dim)}"
        R, x = R.float(), torch.randn(head_dim)
        kept = torch.allclose(R @ R.T, torch.eye(head_dim), atol=1e-4)
        assert kept, "R times its transpose is not the identity: lengths change"
        right = rope_loop(x, position, base)
        back = torch.allclose(R.T @ x, right, atol=1e-4) and not torch.allclose(R @ x, right)
        assert not back, "it turns in the other direction"
        still = torch.allclose(rotation_matrix(0, head_dim, base).float() @ x, x, atol=1e-5)
        assert still, "at position 0 nothing turns"
        table = [t[0, 0, 0] for t in RotaryEmbedding(head_dim, base)(torch.tensor([[position]]))]
        other = apply_rope_ported(x, *table)
        paired = head_dim == 2 or not torch.allclose(R @ x, other, atol=1e-4)
        assert paired, "these are the neighbours' pairs of the bug; Gemma's are half a head apart"
        about = f"Dh {head_dim}, position {position}, base {base:g}"
        assert torch.allclose(R @ x, right, atol=1e-4), f"{about}: other angles than rope_loop's"


check(test_2, rotation_matrix)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Row $i$ says how channel $i$ of the result is made. Read the two assignments of `rope_loop`: each is one row with two entries that are not 0.
#
# </details>


# %% tags=["solution"]
def rotation_matrix(position, head_dim, base=10000.0):
    half, R = head_dim // 2, torch.zeros(head_dim, head_dim)
    for i in range(half):
        angle = position * base ** (-2 * i / head_dim)
        j = i + half  # the pair's second channel; each pair is a 2 × 2 rotation, spread out
        R[i, i], R[i, j] = math.cos(angle), -math.sin(angle)
        R[j, i], R[j, j] = math.sin(angle), math.cos(angle)
    return R


check(test_2, rotation_matrix)

# %% [markdown]
# ### Exercise 3 (extend): translate the weights
#
# Someone gives you weights trained with the *interleaved* pairing. Find the order in which the channels of a head must be rearranged so that our `apply_rope` turns them rightly:
#
# `apply_rope(x[..., order])` equals `apply_rope_ported(x)[..., order]`
#
# Rearranging the rows of `q_proj` and `k_proj` in this order is how such weights are converted.


# %% tags=["exercise"]
def half_order(head_dim):
    return None  # your code: int64[head_dim]


# %% tags=["check"]
def test_3(half_order):
    for head_dim in (2, 4, 8, 256):
        order = half_order(head_dim)
        ok = isinstance(order, torch.Tensor) and order.dtype == torch.int64
        assert ok, "return a tensor of whole numbers, int64"
        once = sorted(order.tolist()) == list(range(head_dim))
        assert once, f"width {head_dim}: use every channel once"
        cos, sin = RotaryEmbedding(head_dim)(torch.arange(5)[None])
        x = torch.randn(1, 2, 5, head_dim)
        ours = apply_rope(x[..., order], cos, sin)
        theirs = apply_rope_ported(x, cos, sin)[..., order]
        same = torch.allclose(ours, theirs, atol=1e-5)
        back = torch.allclose(apply_rope(x[..., order], cos, -sin), theirs, atol=1e-5)
        assert same or not back, f"width {head_dim}: the pairs are right, but turn backwards"
        assert same, f"width {head_dim}: other channels turn together, or at another speed"


check(test_3, half_order)

# %% [markdown]
# <details><summary>Hint</summary>
#
# In their form, which channels are the $x$ of all pairs? In ours, the $x$ of all pairs are the first half. Where do the $y$ go?
#
# </details>


# %% tags=["solution"]
def half_order(head_dim):
    channels = torch.arange(head_dim)
    return torch.cat((channels[0::2], channels[1::2]))  # first all x, then all y


check(test_3, half_order)

# %% [markdown]
# ## Summary
#
# - Attention compares vectors, not positions; without help, order does not exist for it.
# - RoPE turns queries and keys by position times a frequency. Lengths stay; a score keeps only the difference of positions.
# - Many pairs turn at many speeds: fast ones tell neighbours apart, slow ones far from near.
# - Trained heads look for distances: one before, three before, eight before.
# - The pairing and the base are agreed with the *weights*. Break the agreement and nothing complains.

# %% [markdown]
# ## Quiz
#
# **1.** Why are values not turned?
#
# <details><summary>Answer</summary>
#
# The relative property lives in a dot product of two turned vectors. A value is not multiplied with another turned vector: it is averaged and passed on. Turned, it would carry its absolute position into the output, with nothing to turn it back.
#
# </details>

# %% [markdown]
# **2.** A model keeps the turned keys of a long text ([lesson 11](11_kv_cache.ipynb)). A new token arrives. Must the old keys be turned again?
#
# <details><summary>Answer</summary>
#
# No. A key is turned by its own position, which never changes. Only the new query and key are turned, by the new position, and the score gets the right difference.
#
# </details>

# %% [markdown]
# **3.** A test asserts that your RoPE keeps lengths and that scores depend on the distance only. Name two errors that it lets through.
#
# <details><summary>Answer</summary>
#
# The interleaved pairing, and a wrong base; also a turn in the other direction. All are rotations. Only numbers from the implementation that the weights were trained with can tell.
#
# </details>

# %% [markdown]
# ## References
#
# - Su et al. 2021, *RoFormer: Enhanced Transformer with Rotary Position Embedding* ([arXiv 2104.09864](https://arxiv.org/abs/2104.09864)), sections 3.2.2 and 3.4.2.
# - Vaswani et al. 2017, *Attention Is All You Need* ([arXiv 1706.03762](https://arxiv.org/abs/1706.03762)), section 3.5: the same angles, added.
# - Gemma Team 2024, *Gemma: Open Models Based on Gemini Research and Technology* ([arXiv 2403.08295](https://arxiv.org/abs/2403.08295)), section 2.
# - `GemmaRotaryEmbedding` and `apply_rotary_pos_emb` in transformers, `models/gemma/modeling_gemma.py`; `apply_rotary_emb` in gemma_pytorch, `gemma/model.py`.

# %% [markdown] tags=["navigation"]
# [← GeGLU](08_geglu.ipynb) | [contents](00_overview.ipynb) | [Grouped-query attention →](10_grouped_query_attention.ipynb)
