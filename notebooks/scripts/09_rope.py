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
# [← GeGLU](08_geglu.ipynb) | [contents](../README.md) | [Grouped-query attention →](10_grouped_query_attention.ipynb)

# %% [markdown]
# # 9 · RoPE: how does a token know where it stands?
#
# *35 minutes* · part II, Language
#
# **What you will be able to do**
#
# - say why attention cannot see order, and show it in five lines;
# - turn a query by hand, with a loop, with complex numbers and with the code that Gemma uses;
# - prove that a score then depends only on the distance between two tokens;
# - recognise two position bugs that raise no error and look healthy.

# %% tags=["map"]
from paligemma.plotting import model_map

model_map("rope")

# %% [markdown]
# ## Setup
#
# Nothing from earlier lessons but the drawing helpers. The seed makes your numbers equal to
# the ones printed here.

# %% tags=["setup"]
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from paligemma.plotting import (
    COLOURS,
    check,
    sample_picture,
    save_figure,
    show_attention,
    show_heatmap,
)

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
    print(
        f"{' '.join(order)}: dog becomes",
        F.scaled_dot_product_attention(x, x, x)[order.index("dog")],
    )

# %% [markdown]
# To this layer the two sentences mean the same. (The causal mask of a text model leaks a
# little order, because later tokens see more. The image tokens and the prompt of PaliGemma
# have no such mask.)
#
# So something must carry the position into the score.

# %% [markdown]
# ## Add a vector, or turn one?
#
# The vision encoder *added* a learned vector for each place (lesson 03). This works for a
# fixed grid, but the table ends with its last row, and it ties the model to absolute places.
#
# In text the useful fact is relative: *two words before me*. RoPE (rotary position embedding)
# **turns** queries and keys by an angle proportional to their position, and the score will
# contain the difference only.

# %% [markdown]
# ## By hand: two numbers, a quarter turn
#
# Take a vector of two numbers, $(x, y)$. Turning it anticlockwise by an angle $a$ gives
#
# $$(x\cos a - y\sin a,\;\; x\sin a + y\cos a).$$
#
# For 90° the cosine is 0 and the sine is 1, so $(x, y)$ becomes $(-y, x)$. Check it with a pencil.


# %%
def turn(v, degrees):
    a = math.radians(degrees)
    x, y = v
    return round(x * math.cos(a) - y * math.sin(a), 6), round(x * math.sin(a) + y * math.cos(a), 6)


turn((3, 1), 90)

# %% [markdown]
# Now let a token at position $m$ be turned by $m$ quarter turns. Position 0 stays, position 1
# gets 90°, position 2 gets 180°.

# %%
for position in range(4):
    print(f"position {position}: {turn((3, 1), 90 * position)}")


# %% [markdown]
# The length of the vector never changes: a turn moves a vector, it does not stretch it. What a
# token *says* (its length, and the angles between its parts) stays; only the direction tells
# *where* it says it.
#
# Next, a query at position $m$ and a key at position $n$. Their score is the dot product.


# %%
def score(q, m, k, n, degrees=90):
    a, b = turn(q, m * degrees), turn(k, n * degrees)
    return round(a[0] * b[0] + a[1] * b[1], 3)


for m, n in [(2, 1), (3, 2), (101, 100), (1, 2), (102, 100)]:
    print(f"query at {m:3}, key at {n:3}, distance {m - n:2}: score {score((3, 1), m, (1, 2), n)}")

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
# Only $n-m$ is left. In a picture: both arrows turn by the same extra amount, so the angle
# between them stays, and a dot product depends on two lengths and that angle.

# %%
fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.4), layout="constrained")
for ax, (m, n) in zip(axes, [(3, 1), (9, 7)]):
    for name, vector, position, colour in (
        ("q", (3, 1), m, "language"),
        ("k", (1, 2), n, "vision"),
    ):
        x, y = turn(vector, 20 * position)
        ax.annotate(
            "",
            (x, y),
            (0, 0),
            arrowprops={"arrowstyle": "-|>", "lw": 2.2, "color": COLOURS[colour]},
        )
        ax.text(
            1.18 * x,
            1.18 * y,
            f"{name} at {position}",
            color=COLOURS[colour],
            ha="center",
            va="center",
        )
    ax.add_patch(plt.Circle((0, 0), math.hypot(3, 1), fill=False, color=COLOURS["muted"], lw=0.8))
    ax.add_patch(plt.Circle((0, 0), math.hypot(1, 2), fill=False, color=COLOURS["muted"], lw=0.8))
    ax.set(xlim=(-4.6, 4.6), ylim=(-4.2, 4.2), aspect="equal")
    ax.set_title(f"score {score((3, 1), m, (1, 2), n, 20):.2f}")
    ax.set_axis_off()
save_figure(fig, "09_same_distance")

# %% [markdown]
# Here a step is 20°. From left to right both tokens moved six places, and both arrows turned by
# 120°. The angle between them is the same, and so is the score.

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
        f"pair {i}: {theta:.3f} radians a position, once round in {2 * math.pi / theta:8.1f} positions"
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


# %%
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


# %%
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


rotate_half(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8]))

# %%
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


# %% [markdown]
# Against the vectorised version, and the shapes for two rows of six tokens and three heads:

# %%
rope = RotaryEmbedding(head_dim=8)
cos, sin = rope(positions[None])
assert torch.allclose(apply_rope(x[None, None], cos, sin)[0, 0], fast, atol=1e-5)

cos, sin = rope(positions.expand(2, 6))
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

# %%
ref = load_file("reference/rope.safetensors")
cos, sin = RotaryEmbedding(256)(ref["positions"])
q_turned, k_turned = apply_rope(ref["q"], cos, sin), apply_rope(ref["k"], cos, sin)
for name, ours in (("q_turned", q_turned), ("k_turned", k_turned)):
    gap = (ours - ref[name]).abs().max().item()
    assert gap <= 1e-5
    print(f"{name}: shape {tuple(ours.shape)}, largest difference at most 1e-5: {gap <= 1e-5}")

# %% [markdown]
# ## See it: only the distance counts
#
# One query vector and one key vector, copied to 40 positions. Without RoPE all 1600 scores
# would be the same number. What does turning make of them?

# %%
q, k = torch.randn(2, 64)
cos, sin = RotaryEmbedding(64)(torch.arange(40)[None])
scores = (
    apply_rope(q.expand(1, 1, 40, 64), cos, sin) @ apply_rope(k.expand(1, 1, 40, 64), cos, sin).mT
)
scores = scores[0, 0]
fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.7), layout="constrained")
show_heatmap((q @ k).expand(40, 40), "without RoPE", centre=0, ax=axes[0])
show_heatmap(scores, "with RoPE", centre=0, ax=axes[1])
for ax in axes:
    ax.set(xlabel="position of the key", ylabel="position of the query")
    ax.set(
        xticks=range(0, 40, 10),
        yticks=range(0, 40, 10),
        xticklabels=range(0, 40, 10),
        yticklabels=range(0, 40, 10),
    )
save_figure(fig, "09_scores")

# %% [markdown]
# Every diagonal has one colour: walk down and right by the same number of steps, and the score
# stays. The two sides of the main diagonal differ, so *before* and *after* are told apart. This
# is the proof above as a measurement:

# %%
spread = max((d.max() - d.min()).item() for o in range(-39, 40) for d in [scores.diagonal(o)])
assert spread < 1e-3
print(f"the score varies between diagonals by {scores.max() - scores.min():.1f}")
print(f"along a diagonal by less than 0.001: {spread < 1e-3}")

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
    ax.axhline(count, color=COLOURS["vision"], lw=1, ls="--")
    ax.text(
        0,
        count * 1.12,
        f"{count} image tokens ({size} pixels)",
        color=COLOURS["vision"],
        fontsize=8,
    )
ax.set(xlabel="pair of channels", ylabel="positions for one turn", xlim=(-1, 128), ylim=(4, 1e5))
save_figure(fig, "09_wavelengths")

# %% [markdown]
# Below a dashed line are the hands that go round at least once within the picture: they tell
# near places apart but repeat. Above are the slow ones, which never repeat inside it and so tell
# far from near. Both kinds are needed, as minutes and hours are.

# %%
for count in tokens.values():
    fast_hands = (wavelength <= count).sum().item()
    still = (wavelength > 8 * count).sum().item()
    print(
        f"{count:4} tokens: {fast_hands} of 128 pairs go round; {still} move less than 1/8 of a turn"
    )


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
weights = torch.stack([(16 * pull(patches - c)).softmax(0) for c in centres])
show_attention(
    sample_picture("cat"), weights, titles=[f"from row {c // 16}, column {c % 16}" for c in centres]
)

# %% [markdown]
# To RoPE a picture is one long line. The neighbours left and right are near, the patch below is
# as far as any token 16 steps away. The decoder still sees two dimensions, but because SigLIP's
# learned positions put them into the *content* of each image token, not because of RoPE.

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
print("parameters:", len(RotaryEmbedding(Dh).state_dict()))
print(
    f"FLOPs a token: turning {turning:,}, projecting q and k {projecting:,} ({projecting // turning} times)"
)
print(
    f"cos and sin for {L} tokens: {2 * L * Dh * 4 / 1024:.0f} KB, made once, used by {layers} layers"
)

# %% [markdown]
# Counting FLOPs flatters it. Turning does little arithmetic for each number it reads, so it
# waits for memory. Measured here, one layer of the 3B shapes in float32:

# %% tags=["nbval-ignore-output"]
from time import perf_counter


def milliseconds(run, repeat=10):
    run()
    start = perf_counter()
    for _ in range(repeat):
        run()
    return (perf_counter() - start) / repeat * 1000


cos, sin = RotaryEmbedding(Dh)(torch.arange(L)[None])
q, k = torch.randn(1, H, L, Dh), torch.randn(1, K, L, Dh)
hidden, weight = torch.randn(L, D), torch.randn((H + K) * Dh, D)
print(
    f"make cos and sin:  {milliseconds(lambda: RotaryEmbedding(Dh)(torch.arange(L)[None])):5.1f} ms"
)
print(
    f"turn q and k:      {milliseconds(lambda: (apply_rope(q, cos, sin), apply_rope(k, cos, sin))):5.1f} ms"
)
print(f"project to q and k:{milliseconds(lambda: hidden @ weight.T):5.1f} ms")

# %% [markdown]
# So making the table once and not in each of 18 layers is worth it, and a fused kernel
# that turns while it reads can save time that the FLOP count does not show.

# %% [markdown]
# ### What the base decides
#
# Wavelengths run from $2\pi$ to nearly $2\pi\cdot$base. A small base makes all hands fast:
# places are told apart sharply, but far ones collide. A large one spends pairs on distances that
# never occur. Below, the pull for three bases, over more tokens than a 448-pixel picture has.

# %%
distance = torch.arange(1200)
fig, ax = plt.subplots(figsize=(7.4, 3.3), layout="constrained")
for value, colour in ((100, "bad"), (10_000, "language"), (1_000_000, "vision")):
    ax.plot(pull(distance, float(value)), color=COLOURS[colour], lw=1.4, label=f"base {value:,}")
for count in (256, 1024):
    ax.axvline(count, color=COLOURS["muted"], lw=1, ls="--")
    ax.text(count + 8, 0.98, f"{count} tokens", color=COLOURS["ink"], fontsize=8, va="top")
ax.set(xlabel="distance in tokens", ylabel="pull", xlim=(0, 1200), ylim=(-0.15, 1.02))
ax.legend(loc="upper center", ncols=3)
fig

# %%
for value in (100.0, 10_000.0, 1_000_000.0):
    near, middle, far = pull(torch.tensor([1, 256, 1024]), value).tolist()
    longest = 2 * math.pi * value ** (127 / 128)
    print(
        f"base {value:9,.0f}: pull {near:.2f} at 1, {middle:.2f} at 256, {far:.2f} at 1024; longest {longest:,.0f}"
    )

# %% [markdown]
# With base 100 nothing tells 256 from 1024: no hand is slow enough. With 10,000 the pull still
# falls between them. The base is part of what the weights learned: change it afterwards and
# every distance means something else. That is why `rope_theta` is read from the checkpoint's
# config.

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


# %%
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
for name, apply in (("ours", apply_rope), ("ported", apply_rope_ported)):
    gap = (scores_at(apply, 0) - ref["scores"]).abs().max()
    print(f"{name:6}: scores equal to the reference: {bool(gap < 1e-4)} (off by {gap:.1f})")

# %%
fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.2), layout="constrained")
names = ref["positions"][0].tolist()
for ax, (name, apply) in zip(
    axes, (("half: as the reference", apply_rope), ("interleaved", apply_rope_ported))
):
    show_heatmap(
        scores_at(apply, 0)[0, 0], name, rows=names, columns=names, annotate=".1f", centre=0, ax=ax
    )
    ax.set(xlabel="position of the key", ylabel="position of the query")
fig

# %% [markdown]
# It pairs channels 0 and 1, 2 and 3 (*interleaved*), as the RoFormer paper writes it. Gemma
# pairs $i$ with $i + 128$. Each is a right RoPE on its own. But training taught the weights of
# `q_proj` and `k_proj` which channels turn together and how fast, so a checkpoint works with one
# pairing only.
#
# The lesson: **properties do not replace a reference**.

# %% [markdown]
# ### A second one: counting the padding
#
# Prompts of different lengths share a batch, so the short one is padded on the left. A row of
# two tokens with three pads in front stands at 0, 1, not at 3, 4. Which mistakes hurt? First
# the one that looks worst: number everything from 0, pads included.

# %%
rope = RotaryEmbedding(64)
keys, query = torch.randn(1, 1, 2, 64), torch.randn(1, 1, 1, 64)  # two prompt tokens, one new token


def new_token_scores(key_positions, query_position):
    k = apply_rope(keys, *rope(torch.tensor([key_positions])))
    q = apply_rope(query, *rope(torch.tensor([[query_position]])))
    return (q @ k.mT / 8)[0, 0, 0]


print("alone, no padding:   ", new_token_scores([0, 1], 2))
print("pads counted:        ", new_token_scores([3, 4], 5))

# %% [markdown]
# No harm: every real token moved by three, and distances stay. Now the version that is easy to
# write: the prompt is numbered with `arange`, pads included, and the new token later
# with the number of *real* tokens.

# %%
print("prompt with pads, new token without:", new_token_scores([3, 4], 2))

# %% [markdown]
# Now the new token stands *before* its own prompt. A prompt without padding gets right answers,
# so a test with a single prompt passes. Add a longer neighbour to the batch, and this row's
# answer changes. That is the symptom: **the answer depends on who else is in the batch**.
#
# The cure is one rule for both phases: count real tokens only (exercise 2).

# %% [markdown]
# ## Exercises

# %% [markdown]
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
    assert isinstance(answer, str) and set(answer) <= set("abcde"), (
        "give a string of letters from a to e"
    )
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
# **2.** The prompt's keys are in a cache (lesson 11), already turned. A new token arrives. Must
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
# [← GeGLU](08_geglu.ipynb) | [contents](../README.md) | [Grouped-query attention →](10_grouped_query_attention.ipynb)
