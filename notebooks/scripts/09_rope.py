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
# - recognise two position bugs that raise no error and look healthy.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("rope")

# %% [markdown]
# ## Setup
#
# Nothing from earlier lessons but the drawing helpers. The seed makes your numbers equal to
# the ones printed here.

# %% tags=["setup"]
import math
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from paligemma.support.course import check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS
from paligemma.plotting import show_attention, show_heatmap

torch.manual_seed(9)
torch.set_printoptions(precision=3, sci_mode=False)

# %% [markdown]
# ## The problem: attention has no order
#
# Attention compares every query with every key, one pair at a time. The score is a dot
# product of two vectors. Nothing in it says which token came first. Give it the same words in
# another order, and every word finds the same partners with the same weights.

# %%
words = {word: torch.randn(4) * 1.5 for word in ("dog", "bites", "man")}
orders = ["dog bites man".split(), "man bites dog".split()]
fig, axes = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")
for ax, order in zip(axes, orders):
    x = torch.stack([words[word] for word in order])
    weights = (x @ x.T / 2).softmax(-1)
    show_heatmap(weights, " ".join(order), rows=order, columns=order, annotate=True, ax=ax)
fig

# %% [markdown]
# A row is a query, a column a key. Look for the number where "bites" meets "dog": it is the
# same in both pictures. The cells moved with the words, the values did not. After attention,
# "dog" is one and the same vector in both sentences.

# %%
for order in orders:
    x = torch.stack([words[word] for word in order])
    out = F.scaled_dot_product_attention(x, x, x)
    print(f"{' '.join(order)}: dog becomes", out[order.index("dog")])

# %% [markdown]
# To this layer the two sentences mean the same. (A causal mask would leak a little order. The
# image and the prompt of PaliGemma have none.)
#
# ## Add a vector, or turn one?
#
# SigLIP *added* a learned vector for each place ([lesson 03](03_patch_embedding.ipynb)): a table with a last row. In text
# the useful fact is relative: *two words before me*. RoPE (rotary position embedding) **turns**
# queries and keys by an angle proportional to their position.

# %% [markdown]
# ## By hand: two numbers, a quarter turn
#
# Take a vector of two numbers, $(x, y)$. Turning it anticlockwise by an angle $a$ gives
#
# $$(x\cos a - y\sin a,\;\; x\sin a + y\cos a).$$
#
# For 90° the cosine is 0 and the sine is 1, so $(x, y)$ becomes $(-y, x)$. Let a token at
# position $m$ be turned by $m$ quarter turns. Check the four lines with a pencil.


# %%
def turn(v, degrees):
    a = math.radians(degrees)
    x, y = v
    return round(x * math.cos(a) - y * math.sin(a), 6), round(x * math.sin(a) + y * math.cos(a), 6)


for position in range(4):
    print(f"(3, 1) at position {position}: {turn((3, 1), 90 * position)}")


# %% [markdown]
# The length never changes: a turn moves a vector, it does not stretch it.
#
# Next, a query $q = (3, 1)$ at position $m$ and a key $k = (2, 0)$ at position $n$. Their score is
# the dot product of the two turned vectors.


# %%
q, k = (3, 1), (2, 0)


def score(m, n, degrees=90):
    a, b = turn(q, m * degrees), turn(k, n * degrees)
    return round(a[0] * b[0] + a[1] * b[1], 3)


for m, n in [(2, 1), (3, 2), (101, 100), (1, 2), (102, 100)]:
    print(f"query at {m:3}, key at {n:3}, distance {m - n:2}: score {score(m, n)}")

# %% [markdown]
# The first three pairs stand one apart, at very different places, and score the same. Swap the
# two, or move them two apart, and the score is another one. So the score knows distance *and*
# direction, and nothing about the absolute place.

# %% [markdown]
# ### Why: two turns in a row
#
# Write $R_m$ for "turn by $m$ steps". Turns add up, and the transpose turns back:
# $R_m^\top = R_{-m}$. Therefore
#
# $$(R_m q)\cdot(R_n k) = q^\top R_m^\top R_n\,k = q^\top R_{n-m}\,k.$$
#
# Only $n-m$ is left. Below, a step is 20°. From left to right both tokens move six places, so both
# arrows turn by 120°. The angle between them stays, and with it the score.

# %%
fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.4), layout="constrained")
for ax, (m, n) in zip(axes, [(3, 1), (9, 7)]):
    for name, v, at, colour in (("q", q, m, "language"), ("k", k, n, "vision")):
        x, y = turn(v, 20 * at)
        far = 1 + 0.55 / math.hypot(x, y)
        style = {"color": COLOURS[colour]}
        ax.quiver(0, 0, x, y, angles="xy", scale_units="xy", scale=1, width=0.012, **style)
        ax.text(far * x, far * y, f"{name} at {at}", ha="center", va="center", **style)
        ax.add_patch(plt.Circle((0, 0), math.hypot(*v), fill=False, lw=0.8, alpha=0.5, **style))
    ax.set(xlim=(-4.4, 4.4), ylim=(-3.9, 3.9), aspect="equal", title=f"score {score(m, n, 20):.2f}")
    ax.set_axis_off()
save_figure(fig, "09_same_distance")

# %% [markdown]
# ### One clock is not enough
#
# With 90° a step, position 4 looks like position 0: the hand has come round. Turn slower, and
# neighbours look alike. A clock solves this with several hands.
#
# RoPE does too. A head of width $D_h$ has $D_h/2$ pairs of channels, and pair $i$ turns by
#
# $$\theta_i = \text{base}^{-2i/D_h}$$
#
# radians (57.3°) a position: fast hands first, slow hands last.

# %%
head_dim, base = 8, 10000.0
for i in range(head_dim // 2):
    theta = base ** (-2 * i / head_dim)
    print(
        f"pair {i}: {theta:.3f} radians a position, one turn in {math.tau / theta:6.1f} positions"
    )


# %% [markdown]
# ## As a loop
#
# Which two channels form a pair? Gemma takes channel $i$ and channel $i + D_h/2$: the first
# half of the head supplies the $x$, the second half the $y$. One vector, one pair after the other:


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


x = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])  # four pairs, each (1, 0)
for position in (0, 1, 10):
    print(f"position {position:2}:", rope_loop(x, position))

# %% [markdown]
# Every pair began as $(1, 0)$. At position 1 the first hand (columns 0 and 4) has moved far,
# the last (columns 3 and 7) hardly at all. At position 10 the first has been round once and
# more. Together the hands give each position a face of its own.

# %% [markdown]
# ## Vectorised, first form: complex numbers
#
# A pair $(x, y)$ is the complex number $z = x + iy$, and turning by an angle $a$ is one
# multiplication: $z \cdot e^{ia}$. So the whole rotation is a product with a table of
# complex numbers, one for each position and pair.


# %%
def rope_complex(x, positions, base=10000.0):
    half = x.shape[-1] // 2
    theta = base ** (-torch.arange(half) / half)  # (Dh/2,)
    angle = positions[:, None] * theta  # (L, Dh/2)
    z = torch.complex(x[..., :half], x[..., half:])  # (L, Dh/2)
    z = z * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), dim=-1)  # (L, Dh)


x = torch.randn(6, 8)
positions = torch.tensor([0, 1, 2, 10, 255, 300])
slow = torch.stack([rope_loop(row, int(p)) for row, p in zip(x, positions)])
assert torch.allclose(rope_complex(x, positions), slow, atol=1e-4)
print("loop and complex numbers agree")

# %% [markdown]
# ## Vectorised, second form: rotate half
#
# Complex tensors are awkward: they know no bfloat16, and compilers like them less. The formula
# for one pair needs only real numbers:
#
# $$\begin{pmatrix}x\\y\end{pmatrix}\cos a + \begin{pmatrix}-y\\x\end{pmatrix}\sin a$$
#
# The second vector is the first after a quarter turn. For the whole head this means: swap the
# halves, and negate what lands in front.


# %%
def rotate_half(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


print("rotate_half of 1…8:", rotate_half(torch.arange(1, 9)).tolist())
angle = positions[:, None] * base ** (-torch.arange(4) / 4)  # (L, Dh/2)
angle = torch.cat((angle, angle), dim=-1)  # (L, Dh): both members of a pair turn alike
fast = x * angle.cos() + rotate_half(x) * angle.sin()
assert torch.allclose(fast, rope_complex(x, positions), atol=1e-5)
print("complex numbers and rotate-half agree")

# %% [markdown]
# ## The module
#
# Two parts, because they run at different times. The cosines and sines depend on the positions
# alone: they are made **once** for a forward pass and shared by all layers. The turn itself
# happens in every layer, to the queries and to the keys. Values are not turned: position should
# decide *who* is heard, not *what* is said.

# %%
#| export
"""Rotary position embedding: turn queries and keys by an angle that grows with position."""

import torch
from torch import nn


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
            positions: `int64[B, L]`, each token's place in its row.

        Returns:
            cos, sin: `float32[B, 1, L, Dh]`, ready to broadcast over heads.
        """
        # Computed here rather than stored: no buffer to lose on the meta device or to round.
        pair = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32)
        frequency = 1.0 / self.base ** (pair / self.head_dim)  # (Dh/2,) radians per position
        angle = positions[:, None, :, None].float() * frequency  # (B, 1, L, Dh/2)
        angle = torch.cat((angle, angle), dim=-1)  # (B, 1, L, Dh)
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
    first, second = x.chunk(2, dim=-1)  # (B, H, L, Dh/2) each
    turned = torch.cat((-second, first), dim=-1)  # x after a quarter turn
    return (x * cos + turned * sin).type_as(x)


# %%
rope = RotaryEmbedding(head_dim=8)
cos, sin = rope(positions[None])
assert torch.allclose(apply_rope(x[None, None], cos, sin)[0, 0], fast, atol=1e-5)  # as before

cos, sin = rope(positions.expand(2, 6))  # two rows of six tokens, three heads
q = torch.randn(2, 3, 6, 8)
assert cos.shape == sin.shape == (2, 1, 6, 8) and apply_rope(q, cos, sin).shape == q.shape
print("cos", tuple(cos.shape), "| turned queries", tuple(apply_rope(q, cos, sin).shape))

# %% [markdown]
# ### Why float32
#
# Positions go through `.float()` even in a bfloat16 model. bfloat16 keeps 8 significant bits,
# so above 256 it cannot count by ones. In PaliGemma the image takes positions 0 to 255, and the
# prompt begins at 256: rounding would hit exactly the text.

# %%
counted = torch.arange(255, 263)
print(counted.tolist())
print(counted.bfloat16().long().tolist(), "in bfloat16")

# %% [markdown]
# ## Against the reference
#
# The stored file holds queries and keys of width 256 and what the rotary embedding of
# transformers' Gemma makes of them. `tests/test_rope.py` computes it, and a test checks that
# the file is still what transformers gives today.

# %% tags=["nbval-ignore-output"]
ref = load_file("reference/rope.safetensors")
cos, sin = RotaryEmbedding(256)(ref["positions"])
for name in ("q", "k"):
    ours = apply_rope(ref[name], cos, sin)
    gap = (ours - ref[f"{name}_turned"]).abs().max().item()
    print(f"{name}: shape {tuple(ours.shape)}, largest difference {gap:.1e}")
    assert gap <= 1e-5

# %% [markdown]
# ## See it: only the distance counts
#
# One query vector and one key vector, copied to 64 positions. Without RoPE all 4096 scores
# would be one number. What does turning make of them?

# %%
n = 64
q, k = torch.randn(2, 1, 1, 1, 64).expand(2, 1, 1, n, 64)  # (B, H, L, Dh) each
cos, sin = RotaryEmbedding(64)(torch.arange(n)[None])
scores = (apply_rope(q, cos, sin) @ apply_rope(k, cos, sin).mT)[0, 0]  # (L, L)
along = max((d.max() - d.min()).item() for o in range(1 - n, n) for d in [scores.diagonal(o)])
print(f"range of all scores: {scores.max() - scores.min():.1f}")
print(f"along one diagonal less than 0.001: {along < 1e-3}")

fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.7), layout="constrained")
show_heatmap((q @ k.mT)[0, 0], "without RoPE", centre=0, ax=axes[0])
show_heatmap(scores, "with RoPE", centre=0, ax=axes[1])
for ax in axes:
    ax.set(xlabel="position of the key, 0 to 63", ylabel="position of the query, 0 to 63")
save_figure(fig, "09_scores")

# %% [markdown]
# Every diagonal has one colour: walk down and right by the same number of steps, and the score
# stays. The two sides of the main diagonal differ, so *before* and *after* are told apart. This
# is the proof from above, as a measurement.

# %% [markdown]
# ### The hands of Gemma's clock
#
# A head of Gemma is 256 wide: 128 hands. How many positions does each need to go round once?
# The lines mark the image tokens of the three PaliGemma sizes: 224, 448 and 896 pixels, cut
# into patches of 14.

# %%
tokens = {size: (size // 14) ** 2 for size in (224, 448, 896)}
wavelength = 2 * math.pi * 10000 ** (torch.arange(128) / 128)
fig, ax = plt.subplots(figsize=(7.4, 3.4), layout="constrained")
ax.semilogy(wavelength, color=COLOURS["language"], lw=2.5)
for size, count in tokens.items():
    round_, still = (wavelength <= count).sum(), (wavelength > 8 * count).sum()
    print(f"{count:4} tokens: {round_} of 128 pairs go round, {still} move less than 1/8 of a turn")
    ax.axhline(count, color=COLOURS["vision"], lw=1, ls="--")
    label = f"{count} image tokens ({size} pixels)"
    ax.text(0, count * 1.12, label, color=COLOURS["vision"], fontsize=8)
ax.set(xlabel="pair of channels", ylabel="positions for one turn", xlim=(-1, 128), ylim=(4, 1e5))
save_figure(fig, "09_wavelengths")

# %% [markdown]
# Below a dashed line are the hands that go round at least once within the picture: they tell
# near places apart but repeat. Above are the slow ones, which never repeat inside it and so tell
# far from near. Both kinds are needed, as minutes and hours are.

# %% [markdown]
# ### Where "near" is, on a picture
#
# Take a query and a key that agree fully (all channels equal). What is left in their score is
# pure position: the mean of all cosines, times a constant. We call it the *pull* at a distance.
# Image tokens are numbered row by row, so the patch straight below is 16 positions away.


# %%
def pull(distance, base=10000.0, head_dim=256):
    cos, _ = RotaryEmbedding(head_dim, base)(distance[None])
    return cos[0, 0].mean(-1)  # (L,)


patches = torch.arange(256)
centres = [16 * 4 + 4, 16 * 8 + 11]
weights = torch.stack([(6 * pull(patches - c)).softmax(0) for c in centres])
titles = [f"from row {c // 16}, column {c % 16}" for c in centres]
show_attention(sample_picture("cat"), weights, titles)

# %% [markdown]
# To RoPE a picture is one long line. The neighbours left and right are near, the patch below is
# 16 steps away: no nearer than one far off in the next row. The decoder still sees two dimensions,
# but because SigLIP's learned positions put them into the *content* of each image token, not
# because of RoPE.

# %% [markdown]
# ## At full size
#
# What does position cost in the 3B model? It has no weights to store: the whole table follows
# from one number, the base. The work is a few multiplications, beside the projections
# whose results it turns.

# %%
H, K, Dh, layers, D, L = 8, 1, 256, 18, 2048, 264  # 256 image tokens + 8 of text
turning = layers * (H + K) * Dh * 3  # two products and a sum for each number
with torch.device("meta"):
    projections = [nn.Linear(D, heads * Dh, bias=False) for heads in (H, K)]
projecting = layers * 2 * sum(p.weight.numel() for p in projections)
table = 2 * L * Dh * 4 / 1024
print("parameters:", sum(p.numel() for p in RotaryEmbedding(Dh).parameters()))
print(f"FLOPs a token, turning:           {turning:11,}")
print(f"FLOPs a token, making q and k:    {projecting:11,} ({projecting // turning} times as many)")
print(f"cos and sin for {L} tokens: {table:.0f} KB, made once, used by {layers} layers")

# %% [markdown]
# Counting FLOPs flatters it. Turning does little arithmetic for each number it reads, so it
# waits for memory: compare the times below with the ratio above. Hence the table is made once,
# not in each of 18 layers, and kernels that turn while they read are worth having. Measured
# here for one layer, in float32:


# %% tags=["nbval-ignore-output"]
def milliseconds(run, repeat=10):
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times) * 1000


places = torch.arange(L)[None]
cos, sin = RotaryEmbedding(Dh)(places)
qk = torch.randn(1, H + K, L, Dh)  # query heads and the key head together
hidden, weight = torch.randn(L, D), torch.randn((H + K) * Dh, D)
print(f"make cos and sin: {milliseconds(lambda: RotaryEmbedding(Dh)(places)):5.1f} ms")
print(f"turn q and k:     {milliseconds(lambda: apply_rope(qk, cos, sin)):5.1f} ms")
print(f"make q and k:     {milliseconds(lambda: hidden @ weight.T):5.1f} ms")

# %% [markdown]
# ### What the base decides
#
# Wavelengths run from $2\pi$ to nearly $2\pi\cdot$base. A small base makes all hands fast:
# places are told apart sharply, but far ones collide. A large one spends pairs on distances that
# never occur. Below, the pull for three bases, over more tokens than a 448-pixel picture has.

# %%
fig, ax = plt.subplots(figsize=(7.4, 3.3), layout="constrained")
for value, colour in ((100.0, "bad"), (10_000.0, "language"), (1_000_000.0, "vision")):
    near, middle, far = pull(torch.tensor([1, 256, 1024]), value).tolist()
    slowest = math.tau * value ** (127 / 128)
    print(f"base {value:9,.0f}: slowest hand {slowest:9,.0f}, pull at 1, 256 and 1024:", end=" ")
    print(f"{near:.2f}, {middle:.2f}, {far:.2f}")
    curve = pull(torch.arange(1200), value)
    ax.plot(curve, color=COLOURS[colour], lw=1.4, label=f"base {value:,.0f}")
for count in (256, 1024):
    ax.axvline(count, ymax=0.82, color=COLOURS["muted"], lw=1, ls="--")
    ax.text(count + 8, 0.85, f"{count} tokens", fontsize=8)
ax.set(xlabel="distance in tokens", ylabel="pull", xlim=(0, 1200), ylim=(-0.16, 1.12))
ax.legend(loc="upper center", ncols=3)
save_figure(fig, "09_base")

# %% [markdown]
# With base 100 even the slowest hand goes round within 1024 tokens, so no hand is left that tells
# far from farther. With 10,000 the pull still falls between 256 and 1024.
#
# The base is part of what the weights learned: change it afterwards, and every distance means
# something else. That is why `rope_theta` is read from the checkpoint's config.

# %% [markdown]
# ## A bug people really make: the other pairing
#
# A colleague ports Gemma. Their RoPE passes every test they thought of: lengths are kept,
# and scores depend on the distance only. The model loads without error, and its answers are
# nonsense. Here is the code. What is wrong with it?


# %%
def apply_rope_ported(x, cos, sin):
    cos, sin = cos[..., : x.shape[-1] // 2], sin[..., : x.shape[-1] // 2]
    x, y = x[..., 0::2], x[..., 1::2]
    return torch.stack((x * cos - y * sin, x * sin + y * cos), dim=-1).flatten(-2)


q, k = ref["q"], ref["k"]
tables = {shift: RotaryEmbedding(256)(ref["positions"] + shift) for shift in (0, 50)}


def scores_at(apply, shift):
    cos, sin = tables[shift]
    return apply(q, cos, sin) @ apply(k, cos, sin).mT / 16  # (1, 2, L, L)


for name, apply in (("ours", apply_rope), ("ported", apply_rope_ported)):
    kept = torch.allclose(apply(q, *tables[0]).norm(dim=-1), q.norm(dim=-1))
    relative = torch.allclose(scores_at(apply, 0), scores_at(apply, 50), atol=1e-3)
    print(f"{name:6}: lengths kept {kept}, relative {relative}")

# %% [markdown]
# Both tests pass. Only a comparison with the reference exposes it:

# %%
fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.2), layout="constrained")
names = ref["positions"][0].tolist()
for ax, name, apply in zip(axes, ("ours", "ported"), (apply_rope, apply_rope_ported)):
    ours = scores_at(apply, 0)
    gap = (ours - ref["scores"]).abs().max()
    print(f"{name:6}: equal to the reference {bool(gap < 1e-4)}, off by {gap:.1f}")
    show_heatmap(ours[0, 0], name, rows=names, columns=names, annotate=".1f", centre=0, ax=ax)
    ax.set(xlabel="position of the key", ylabel="position of the query")
fig

# %% [markdown]
# Only the diagonal agrees: at distance 0 both turns cancel, whatever the pairing.
#
# The port pairs channels 0 and 1, 2 and 3 (*interleaved*), as the RoFormer paper writes it. Gemma
# pairs $i$ with $i + 128$. Each is a right RoPE on its own. But training taught the weights of
# `q_proj` and `k_proj` which channels turn together and how fast, so a checkpoint works with one
# pairing only.
#
# The lesson: **properties do not replace a reference**.

# %% [markdown]
# ### A second one: counting the padding
#
# Prompts of different lengths share a batch, so the short one is padded on the left. A row of
# two tokens with three pads in front stands at 0, 1, not at 3, 4; its next token at 2. Three ways
# to number them, and the scores of that next token with the two before it:

# %%
rope = RotaryEmbedding(64)
keys, query = torch.randn(1, 1, 2, 64), torch.randn(1, 1, 1, 64)  # two prompt tokens, one new token


def new_token_scores(key_positions, query_position):
    k = apply_rope(keys, *rope(torch.tensor([key_positions])))
    q = apply_rope(query, *rope(torch.tensor([[query_position]])))
    return (q @ k.mT / 8)[0, 0, 0]


print("alone, no padding:            ", new_token_scores([0, 1], 2))
print("pads counted everywhere:      ", new_token_scores([3, 4], 5))
print("pads counted in the prompt:   ", new_token_scores([3, 4], 2))

# %% [markdown]
# Counting pads everywhere does no harm: distances stay. But when the prompt is numbered with
# `arange` and the new token with the count of *real* tokens, it stands *before* its own prompt.
# One prompt alone passes every test; with a longer neighbour in the batch its answer changes. The
# symptom: **the answer depends on who else is in the batch**. The cure is one rule for both phases:
# count real tokens only (exercise 2).

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): what may change without a trace?
#
# Before you run anything: which of these leave **every** score between queries and keys as it
# was?
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
    p, q, k = torch.arange(12)[None], torch.randn(1, 1, 12, 64), torch.randn(1, 1, 12, 64)
    scores = lambda p, r: apply_rope(q, *rope(r)) @ apply_rope(k, *rope(p)).mT
    changed = {
        "a": (p + 100, p + 100),
        "b": (2 * p, 2 * p),
        "c": (-p, -p),
        "d": (p - 3, p - 3),
        "e": (p, 0 * p),
    }
    for letter, (keys, queries) in changed.items():
        same = torch.allclose(scores(keys, queries), scores(p, p), atol=1e-2)
        assert same == (letter in answer), f"({letter}) {'keeps' if same else 'changes'} the scores"


check(test_1, answer)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Write $n - m$ for one pair of tokens, before and after the change. If it is the same for every
# pair, the scores are.
#
# </details>

# %% tags=["solution"]
# (c) turns the difference n - m into m - n: who came first is swapped. (b) doubles it.
# (e) leaves the absolute position of the key in the score.
answer = "ad"
check(test_1, answer)

# %% [markdown]
# ### Exercise 2 (fill in): positions that survive padding
#
# `attention_mask` is `int64[B, L]`: 1 for a real token, 0 for padding. Return
# `int64[B, L]` in which the first real token of every row is 0, the next 1, and so on. Pads are
# seen by nobody; give those in front the position 0.


# %% tags=["exercise"]
def positions_of(attention_mask):
    return None  # your code: one line is enough


# %% tags=["check"]
def test_2(positions_of):
    cases = {
        "no padding": ([[1, 1, 1]], [[0, 1, 2]]),
        "padding on the left": (
            [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]],
            [[0, 0, 0, 1, 2], [0, 0, 1, 2, 3]],
        ),
        "rows of their own": ([[1, 1, 1, 1], [0, 0, 0, 1]], [[0, 1, 2, 3], [0, 0, 0, 0]]),
    }
    for name, (mask, expected) in cases.items():
        result = positions_of(torch.tensor(mask))
        assert isinstance(result, torch.Tensor), "return a tensor"
        assert result.dtype == torch.int64, f"{name}: positions are int64, not {result.dtype}"
        assert result.tolist() == expected, f"{name}: expected {expected}, got {result.tolist()}"


check(test_2, positions_of)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A running sum of the mask counts the real tokens up to and including each place. From there it
# is one subtraction, and a floor of zero for the pads.
#
# </details>


# %% tags=["solution"]
def positions_of(attention_mask):
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


check(test_2, positions_of)

# %% [markdown]
# ### Exercise 3 (extend): translate a checkpoint
#
# Someone gives you weights trained with the *interleaved* pairing. Find the order in which the
# channels of a head must be rearranged so that our `apply_rope` turns them rightly:
#
# `apply_rope(x[..., order])` equals `apply_rope_ported(x)[..., order]`
#
# Rearranging the rows of `q_proj` and `k_proj` in this order is how such checkpoints are
# converted.


# %% tags=["exercise"]
def half_order(head_dim):
    return None  # your code: int64[head_dim]


# %% tags=["check"]
def test_3(half_order):
    for head_dim in (2, 4, 8, 256):
        order = half_order(head_dim)
        assert isinstance(order, torch.Tensor), "return a tensor"
        assert sorted(order.tolist()) == list(range(head_dim)), (
            f"width {head_dim}: use every channel once"
        )
        cos, sin = RotaryEmbedding(head_dim)(torch.arange(5)[None])
        x = torch.randn(1, 2, 5, head_dim)
        ours, theirs = (
            apply_rope(x[..., order], cos, sin),
            apply_rope_ported(x, cos, sin)[..., order],
        )
        assert torch.allclose(ours, theirs, atol=1e-5), (
            f"width {head_dim}: other channels turn together"
        )


check(test_3, half_order)

# %% [markdown]
# <details><summary>Hint</summary>
#
# In their form, the $x$ of all pairs are the even channels. In ours, the $x$ of all pairs are
# the first half. Where do the $y$ go?
#
# </details>


# %% tags=["solution"]
def half_order(head_dim):
    channels = torch.arange(head_dim)
    return torch.cat((channels[0::2], channels[1::2]))


check(test_3, half_order)

# %% [markdown]
# ## Summary
#
# - Attention compares vectors, not places; without help, order does not exist for it.
# - RoPE turns queries and keys by position times a speed. Lengths stay; a score keeps only the
#   difference of positions.
# - Many pairs turn at many speeds: fast ones tell neighbours apart, slow ones far from near.
# - The pairing, the base and the counting of positions are agreed with the *weights*. Break the
#   agreement and nothing complains.

# %% [markdown]
# ## Quiz
#
# **1.** Why are values not turned?
#
# <details><summary>Answer</summary>
#
# The relative property lives in a dot product of two turned vectors. A value is not multiplied
# with another turned vector: it is averaged and passed on. Turned, it would carry its absolute
# position into the output, with nothing to turn it back.
#
# </details>

# %% [markdown]
# **2.** The prompt's keys are in a cache ([lesson 11](11_kv_cache.ipynb)), already turned. A new token arrives. Must
# the cached keys be turned again?
#
# <details><summary>Answer</summary>
#
# No. A key is turned by its own position, which never changes. Only the new query and key are
# turned, by the new position, and the score gets the right difference. This makes RoPE and a
# cache fit together.
#
# </details>

# %% [markdown]
# **3.** A test asserts that your RoPE keeps lengths and that scores depend on the distance only.
# Name two errors that it lets through.
#
# <details><summary>Answer</summary>
#
# The interleaved pairing, and a wrong base; also a turn in the other direction, or queries and
# keys both counted from a wrong start (which is harmless). All are rotations. Only numbers from
# the implementation that the weights were trained with can tell.
#
# </details>

# %% [markdown]
# ## References
#
# - Su et al. 2021, *RoFormer: Enhanced Transformer with Rotary Position Embedding*
#   ([arXiv 2104.09864](https://arxiv.org/abs/2104.09864)), sections 3.2.2 and 3.4.2.
# - Gemma Team 2024, *Gemma: Open Models Based on Gemini Research and Technology*
#   ([arXiv 2403.08295](https://arxiv.org/abs/2403.08295)), section 2.
# - `GemmaRotaryEmbedding` and `apply_rotary_pos_emb` in transformers,
#   `models/gemma/modeling_gemma.py`; `apply_rotary_emb` in gemma_pytorch, `gemma/model.py`.

# %% [markdown] tags=["navigation"]
# [← GeGLU](08_geglu.ipynb) | [contents](00_overview.ipynb) | [Grouped-query attention →](10_grouped_query_attention.ipynb)
