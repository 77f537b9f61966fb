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
# [← Gemma](12_gemma.ipynb) | [contents](00_overview.ipynb) | [Processor →](14_processor.ipynb)

# %% [markdown]
# # 13 · Gemma 2: what did PaliGemma 2 change?
#
# *50 minutes* · part II, Language
#
# **What you will be able to do**
#
# - name the five changes from Gemma to Gemma 2, and what each is for;
# - cap scores in the right place: after the scale, before the mask;
# - say what a sliding window hides, and why it does not cut the picture in two;
# - find the query scale of a model.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("gemma2")

# %% [markdown]
# ## Setup
#
# The lesson is a *diff* against [lesson 12](12_gemma.ipynb). Norm, GeGLU, RoPE, cache and the model
# around the blocks stay as they are. The cells with `#| export` become
# [gemma2.py](../paligemma/gemma2.py), which holds the differences and nothing else.

# %%
#| export
"""Gemma 2, the decoder of PaliGemma 2: soft-caps, four norms a block, sliding windows."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from paligemma.geglu import GeGLU
from paligemma.gemma import GemmaConfig, GemmaModel
from paligemma.grouped_query_attention import GroupedQueryAttention, group_size
from paligemma.rms_norm import RMSNorm

# %% tags=["setup"]
import difflib
import inspect
import time

import matplotlib.pyplot as plt
from safetensors.torch import load_file

from paligemma.gemma import GemmaDecoderLayer
from paligemma.grouped_query_attention import grouped_attention
from paligemma.kv_cache import KVCache
from paligemma.plotting import show_heatmap
from paligemma.support.course import check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS
from paligemma.rope import RotaryEmbedding

torch.manual_seed(13)
_ = torch.set_grad_enabled(False)

# %% [markdown]
# ## The problem
#
# PaliGemma works. Why change its decoder? Bigger models showed three weaknesses: scores that run
# away during training, a stream whose size nobody controls, and attention to thousands of tokens
# in every layer. Gemma 2 puts a limit on each. Here are both blocks; what is new has a thick purple
# edge.


# %%
def box(ax, x, y, text, colour, new=False):
    style = {"boxstyle": "round,pad=0.25", "fc": COLOURS["paper"], "lw": 2.5 if new else 1.5}
    style["ec"] = COLOURS["accent" if new else colour]
    ax.text(x, y, text, ha="center", va="center", fontsize=8.5, bbox=style, zorder=3)


def draw_block(ax, title, parts):
    ax.plot([0.2, 11.8], [0, 0], color=COLOURS["language"], lw=3)
    for start, row in zip((0.9, 6.6), parts):
        end = start + 4.2
        ax.plot([start, start, end, end], [0, 1.3, 1.3, 0], color=COLOURS["ink"], lw=1.3, zorder=1)
        for i, (text, new) in enumerate(row):
            x = start + 4.2 * (i + 0.5) / len(row)
            box(ax, x, 1.3, text, "muted" if "norm" in text else "together", new)
        ax.text(end, 0, "+", ha="center", va="center", fontsize=12, color="white", zorder=4,
                bbox={"boxstyle": "circle,pad=0.1", "fc": COLOURS["language"], "ec": "none"})  # fmt: skip
    ax.set(xlim=(-0.1, 12.1), ylim=(-0.5, 2.1))
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_axis_off()


fig, axes = plt.subplots(2, 1, figsize=(8.6, 3.9), layout="constrained")
old, new = ("norm", False), ("norm", True)
draw_block(axes[0], "Gemma", ([old, ("attention", False)], [old, ("GeGLU", False)]))
capped = ("attention\nscale · cap\nwindow", True)
draw_block(axes[1], "Gemma 2", ([old, capped, new], [old, ("GeGLU", False), new]))
save_figure(fig, "13_blocks")

# %% [markdown]
# Four of the five changes are in the picture: the **scale** of the queries, the **cap** on scores,
# the **window** of every second layer, and **norms behind** each part. The fifth is a second cap, on
# the logits. We take them one at a time.

# %% [markdown]
# ## By hand: a soft limit
#
# Cutting a score off at 50 would work, but a cut has no slope: a score beyond it learns nothing
# more. A **soft cap** bends: $c \cdot \tanh(s / c)$.
#
# With a pencil, for $c = 50$: at $s = 10$, $\tanh 0.2 = 0.197$, so 9.87, almost unchanged. At
# $s = 50$, $\tanh 1 = 0.762$. At $s = 200$, $\tanh 4 = 0.9993$.

# %%
for s in (1.0, 10.0, 50.0, 200.0):
    print(f"{s:5.0f} → {50 * torch.tensor(s / 50).tanh().item():.2f}")

# %% [markdown]
# ### Two caps, two jobs
#
# Attention scores are capped at 50, logits at 30. Left: the curves. Right: four keys with enormous
# scores. Softmax looks only at *differences*, and 120 beats 110 by $e^{10}$. Capped, the four lie
# close together.

# %%
scores = torch.tensor([120.0, 110.0, 100.0, 90.0])
line = torch.linspace(-150, 150, 301)
fig, axes = plt.subplots(1, 2, figsize=(8.2, 2.9), layout="constrained")
axes[0].plot(line, line, ":", color=COLOURS["muted"], label="no cap")
for cap, colour in ((50, "language"), (30, "accent")):
    axes[0].plot(line, cap * (line / cap).tanh(), color=COLOURS[colour], lw=2, label=f"cap {cap}")
axes[0].set(ylim=(-80, 80), xlabel="score", ylabel="after the cap")
axes[0].legend(loc="upper left")
for shift, (name, values) in enumerate((("no cap", scores), ("cap 50", 50 * (scores / 50).tanh()))):
    places = torch.arange(4) + 0.38 * shift - 0.19
    colour = COLOURS["language" if shift else "muted"]
    axes[1].bar(places, values.softmax(0), width=0.36, label=name, color=colour)
axes[1].set(xlabel="score of the key", ylabel="attention weight", ylim=(0, 1.05))
axes[1].set_xticks(range(4), [f"{s:.0f}" for s in scores.tolist()])
axes[1].legend()
save_figure(fig, "13_soft_cap")

# %% [markdown]
# Notice: up to a score of 10 both curves are the straight line, within 4 %. In daily work a cap does
# nothing. It is a guard rail for scores that run away: ten points between 120 and 110 silence a
# rival, capped they hardly count. (A *single* loud key still takes everything: 50 against 0 is
# enough.)


# %%
#| export
def soft_cap(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap · tanh(x / cap): `float[…]` → `float32[…]`, almost x where x is small, within ±cap.

    A cap of 0 or None is no cap: some recipes for fine-tuning set it so.

    Source: Gemma 2 report, section 2; Bello et al. 2016.
    """
    return cap * torch.tanh(x.float() / cap) if cap else x.float()


# %%
for cap in (50, 30):
    assert soft_cap(torch.tensor(10.0), cap) > 10 * 0.96
loud = torch.tensor([[120.0, 110, 110, 110], [120, 0, 0, 0]])
for name, scores in (("no cap", loud), ("cap 50", soft_cap(loud, 50))):
    top = scores.softmax(-1)[:, 0]
    print(f"{name}: weight of the loudest key {top[0]:.2f} among loud ones, {top[1]:.2f} alone")
assert top[0] < 0.4 and top[1] > 0.999

# %% [markdown]
# Always in float32: near the limit the curve is flat, and bfloat16, with its 8 significant bits,
# makes neighbours equal.

# %%
x = torch.tensor([200.0, 190.0])
print("float32 ", [round(y, 3) for y in soft_cap(x, 50).tolist()])
half = 50 * torch.tanh(x.bfloat16() / 50)
print("bfloat16", half.tolist())
assert half[0] == half[1] and soft_cap(x.bfloat16(), 50).diff() < 0

# %% [markdown]
# ### The cap on the logits
#
# The same function, at 30, on the scores of the vocabulary. Suppose a very certain model:

# %%
words = ["cat", "kitten", "dog", "chair"]
raw = torch.tensor([46.0, 42.0, 30.0, 5.0])
fig, ax = plt.subplots(figsize=(5.6, 2.5), layout="constrained")
for shift, (name, values) in enumerate((("no cap", raw), ("cap 30", soft_cap(raw, 30)))):
    places = torch.arange(4) + 0.38 * shift - 0.19
    bars = ax.bar(places, values.softmax(0), width=0.36, label=name,
                  color=COLOURS["language" if shift else "muted"])  # fmt: skip
    ax.bar_label(bars, [f"{p:.2f}" for p in values.softmax(0).tolist()], fontsize=8)
ax.set(ylabel="probability", ylim=(0, 1.15))
ax.set_xticks(range(4), words)
_ = ax.legend()

# %% [markdown]
# The order stays, so the **greedy answer stays**. The certainty does not: sampling ([lesson 17](17_sampling.ipynb)) picks
# "kitten" far more often. Whoever leaves this cap out gets the right greedy text and the wrong
# probabilities.

# %% [markdown]
# ## The window
#
# A token of a local layer sees itself and the $W - 1$ tokens before it. Layers 0, 2, 4 … are local,
# with $W = 4096$; layers 1, 3, 5 … see everything. What a local layer cannot reach, the next one can.
#
# But our sequence begins with a picture, and its tokens look in *both* directions. What does "too far
# back" mean there?

# %%
N, W = 6, 4  # six prefix tokens, a window of four
i = torch.arange(10)
causal = i <= i[:, None]  # key, query
prefix = (i < N) & (i < N)[:, None]
near = i > i[:, None] - W
full = causal | prefix
fig, axes = plt.subplots(1, 3, figsize=(8.6, 3), layout="constrained")
names = ["no window", "window cuts everything", "window cuts one-way looks"]
for ax, name, m in zip(axes, names, (full, full & near, causal & near | prefix)):
    labels = [str(n) for n in range(10)]
    show_heatmap(m.float(), name, rows=labels, columns=labels, ax=ax)
    ax.set(xlabel="key", ylabel="query")
    ax.add_patch(plt.Rectangle((-0.5, -0.5), N, N, fill=False, ec=COLOURS["language"], lw=3))
save_figure(fig, "13_windows")

# %% [markdown]
# The orange square is the prefix: picture and question. The middle would be odd: token 5 could not look
# back at token 0, while token 0 could look *ahead* at token 5. The reference does what is on the
# right. **Two tokens that look at each other are never parted; the window cuts one-way looks only.**
# So the picture stays whole, and the answer (rows 6 to 9) loses the picture's beginning.

# %% [markdown]
# ### On the cat
#
# At 224 and 448 pixels nothing is ever cut: 1,024 tokens and an answer fit into 4,096. At 896 the
# picture alone has 4,096. What can the 1st, 100th and 500th token of an answer still see of it in a
# local layer, after a question of six tokens?


# %%
def hidden_patches(step, question=6, picture=4096, window=4096):
    """How many image tokens the step-th token of the answer cannot see in a local layer."""
    place = picture + question + step - 1
    return max(0, place - window + 1)


cat = sample_picture("cat").resize((256, 256))
fig, axes = plt.subplots(1, 3, figsize=(7, 2.6), layout="constrained")
for ax, step in zip(axes, (1, 100, 500)):
    lost = torch.arange(4096).view(64, 64) < hidden_patches(step)
    ax.imshow(cat, extent=(0, 64, 64, 0))
    veil = torch.zeros(64, 64, 4)
    veil[lost] = torch.tensor([0.1, 0.1, 0.1, 0.9])
    ax.imshow(veil, extent=(0, 64, 64, 0), interpolation="nearest")
    ax.set_title(f"token {step}: {hidden_patches(step)} patches hidden", fontsize=9)
    ax.set_axis_off()
save_figure(fig, "13_cat_window")

# %% [markdown]
# A sliver at the top, and only in every second layer. The cat's ears are not lost either: all other
# patches have looked at them before, in both directions.
#
# The weights were trained *without* this: the original (big_vision) has no window. It is
# transformers that cuts, and we follow it, so that both give the same answers.
# `sliding_window=None` gives the original.
#
# ## As a loop
#
# Attention of Gemma 2 with one head, one query and one key at a time. Read the order of the lines:
# **scale, cap, then the mask** (here: do not even ask the keys that are out of sight).


# %%
def sees(query, key, prefix, window):
    both = query < prefix and key < prefix
    return both or (key <= query and key > query - window)


def attention_loop(q, k, v, prefix, window, scale, cap):
    found = []
    for a in range(len(q)):
        keys = [b for b in range(len(k)) if sees(a, b, prefix, window)]
        scores = torch.stack([cap * torch.tanh(q[a] @ k[b] * scale / cap) for b in keys])
        found.append(sum(w * v[b] for w, b in zip(scores.softmax(0), keys)))
    return torch.stack(found)  # (L, Dh)


q, k, v = (8 * torch.randn(10, 16) for _ in range(3))  # loud: scores beyond the cap
slow = attention_loop(q, k, v, prefix=N, window=W, scale=1 / 3, cap=50)
print(tuple(slow.shape), f"largest score: {(q @ k.T / 3).abs().max():.0f}")

# %% [markdown]
# ## Vectorised
#
# All at once. PyTorch's fast attention takes a mask and a scale, but has no place for a $\tanh$. So
# Gemma 2 needs the long form: scores, cap, mask, softmax, sum.

# %%
m = causal & near | prefix
scores = 50 * torch.tanh(q @ k.T / 3 / 50)
fast = scores.masked_fill(~m, float("-inf")).softmax(-1) @ v
torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
print("equal to the loop")

# %% [markdown]
# ### Why not cap after the mask?
#
# A hidden key has the score $-\infty$. Capped afterwards it becomes $-50$: no longer hidden, just
# unpopular. Where every visible score is low, it comes back.

# %%
sour = q.clone()
sour[9] = -3 * k[6:].sum(0)  # query 9 now dislikes all four keys it may see
late = 50 * torch.tanh((sour @ k.T / 3).masked_fill(~m, float("-inf")) / 50)
leak = late.softmax(-1).masked_fill(m, 0).sum(-1)  # (L,): weight on hidden keys
print("weight on hidden keys, by query:", [f"{x:.3f}" for x in leak.tolist()])

# %% [markdown]
# Nine queries are right to the last digit, and the tenth gives most of its weight to what it must not
# see. Such a bug hides from tests. (Exercise 3 makes it appear at will.)
#
# ## The module
#
# The config gains four fields, and other defaults: the language model of PaliGemma 2 3B.


# %%
#| export
@dataclass
class Gemma2Config(GemmaConfig):
    """Shape of the language model; the defaults are Gemma 2 2B as PaliGemma 2 3B uses it.

    Source: Gemma Team 2024 (Gemma 2), table 1; PaliGemma 2's published `config.json`.
    """

    vocab_size: int = 257152
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_key_value_heads: int = 4
    query_pre_attn_scalar: int = 256
    sliding_window: int | None = 4096
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0


# %% [markdown]
# Then attention itself. Heads of a group are laid along the sequence, as in [lesson 10](10_grouped_query_attention.ipynb), so that no key
# is copied.


# %%
#| export
def capped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    cap: float | None,
) -> torch.Tensor:
    """softmax(soft_cap(q·kᵀ · scale) + mask)·v, in groups as in `grouped_attention`.

    Args:
        q, k, v, mask: as in `grouped_attention`.
        scale: factor of the scores, before the cap.
        cap: bound of the scores, before the mask; 0 or None: no cap.

    Returns:
        `float[B, H, L, Dh]`.

    Source: `Attention` in gemma_pytorch, `Gemma2Attention` in transformers.
    """
    batch, heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    group = group_size(heads, kv_heads)
    q = q.reshape(batch, kv_heads, group * length, head_dim)  # (B, K, G·L, Dh)
    scores = soft_cap((q @ k.transpose(-1, -2)).float() * scale, cap)  # (B, K, G·L, S)
    if mask is not None:
        scores = scores.masked_fill(~mask.repeat(1, 1, group, 1), float("-inf"))
    out = scores.softmax(-1).type_as(v) @ v  # (B, K, G·L, Dh)
    return out.reshape(batch, heads, length, head_dim)


# %%
one = lambda t: t[None, None]
out = capped_attention(one(q), one(k), one(v), one(m), 1 / 3, 50)[0, 0]
torch.testing.assert_close(out, slow, rtol=1e-4, atol=1e-4)
q8, k2, v2 = torch.randn(2, 8, 5, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 16)
same = capped_attention(q8, k2, v2, None, 1 / 4, cap=None)
torch.testing.assert_close(same, grouped_attention(q8, k2, v2), rtol=1e-4, atol=1e-4)
print("equal to the loop; without a cap equal to lesson 10:", tuple(same.shape))

# %% [markdown]
# The window narrows a mask it is given. How does it know the prefix? It needs no second argument: two
# tokens that look at each other show it in the mask itself. A query whose key looks *back* keeps it.
# Tokens in the cache can't look at new ones, so the window cuts them.
#
# Distances are counted in places of the row. Padding stands on the left, so it shifts query and key
# alike.


# %%
#| export
def window_mask(
    mask: torch.Tensor | None, length: int, total: int, window: int, device=None
) -> torch.Tensor | None:
    """Cut the keys `window` or more places back, except between tokens that look at each other.

    Args:
        mask: `bool[B, 1, L, S + L]`, True where a query may look; None: everywhere.
        length, total: L, the new tokens, and S + L, with those in the cache.
        window: how many tokens a query may see, itself included.
        device: where to make the mask.

    Returns:
        `bool[B, 1, L, S + L]`, or `mask` itself when the window cuts nothing.

    Source: `create_sliding_window_causal_mask` with a bidirectional block, transformers.
    """
    if total <= window:
        return mask
    key = torch.arange(total, device=device)
    near = key > key[total - length :, None] - window  # (L, S + L)
    if mask is None:
        mask = torch.ones(1, 1, length, total, dtype=torch.bool, device=device)
    back = mask[..., total - length :].transpose(-1, -2)  # (B, 1, L, L): does the key look back?
    mutual = F.pad(back, (total - length, 0))  # (B, 1, L, S + L)
    return mask & (near | mutual)


# %%
assert torch.equal(window_mask(one(full), 10, 10, W)[0, 0], m)
step = window_mask(None, 1, 10, W)  # one new token, nine in the cache
print("the tenth token sees:", step[0, 0, 0].nonzero()[:, 0].tolist())
print("nothing to cut, same mask:", window_mask(None, 1, 4, W) is None)

# %% [markdown]
# Attention as a class: matrices, rotation and cache come from
# [lesson 10](10_grouped_query_attention.ipynb) unchanged; only the middle, `attend`, is new. Even
# layers have a window.


# %%
#| export
class Gemma2Attention(GroupedQueryAttention):
    """Rotary attention with a scale of its own, capped scores and, in even layers, a window."""

    def __init__(self, config: Gemma2Config, layer_idx: int):
        heads = config.num_attention_heads, config.num_key_value_heads
        super().__init__(config.hidden_size, *heads, config.head_dim, layer_idx)
        self.scale = config.query_pre_attn_scalar**-0.5
        self.cap = config.attn_logit_softcapping
        self.sliding_window = None if layer_idx % 2 else config.sliding_window

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """`capped_attention`, in even layers through a window. Gives `float[B, H, L, Dh]`."""
        if self.sliding_window is not None:
            mask = window_mask(mask, q.shape[2], k.shape[2], self.sliding_window, q.device)
        return capped_attention(q, k, v, mask, self.scale, self.cap)


# %% [markdown]
# ### Four norms
#
# In Gemma a block adds whatever its parts produce. In Gemma 2 a norm stands *behind* each part too:
# what is added has a known size, set by one learned vector.


# %%
#| export
class Gemma2DecoderLayer(nn.Module):
    """Sandwich block: x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(self, config: Gemma2Config, layer_idx: int):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps)
        self.self_attn = Gemma2Attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.pre_feedforward_layernorm = RMSNorm(size, eps)
        self.mlp = GeGLU(size, config.intermediate_size)
        self.post_feedforward_layernorm = RMSNorm(size, eps)

    def forward(self, x, cos, sin, mask=None, cache=None) -> torch.Tensor:
        """`float[B, L, D]` → `float[B, L, D]`; arguments as in `GemmaDecoderLayer`."""
        h = self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        x = x + self.post_attention_layernorm(h)
        h = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(h)


# %% [markdown]
# The diff of the two `forward` methods is the whole change:

# %%
old, new = (
    inspect.getsource(kind.forward).splitlines() for kind in (GemmaDecoderLayer, Gemma2DecoderLayer)
)
for text in difflib.ndiff(old, new):
    if text[0] in "+-" and "self." in text:
        print(text[0], text[2:].strip())

# %% [markdown]
# One trap: `post_attention_layernorm` exists in both, but is not the same thing. In Gemma it stands
# before the GeGLU, in Gemma 2 behind attention. A loader that is not strict would put the one where
# the other belongs.
#
# What do the outer norms achieve? We build 26 random blocks of each kind and turn up the size of the
# weights. How large is the stream on its way up?


# %%
def stream_sizes(kind, config, gain):
    generator, x = torch.Generator().manual_seed(0), torch.randn(1, 12, 64)
    cos, sin = RotaryEmbedding(16)(torch.arange(12)[None])
    sizes = [x.square().mean().sqrt().item()]
    for i in range(26):
        block = kind(config, i)
        for p in block.parameters():
            if p.dim() == 2:
                p.normal_(0, gain / p.shape[1] ** 0.5, generator=generator)
        x = block(x, cos, sin)
        sizes.append(x.square().mean().sqrt().item())
    return sizes


fig, axes = plt.subplots(1, 2, figsize=(8.2, 2.8), sharey=True, layout="constrained")
sizes = (8, 64, 128, 26, 4, 2, 16)
for ax, kind, config in (
    (axes[0], GemmaDecoderLayer, GemmaConfig(*sizes)),
    (axes[1], Gemma2DecoderLayer, Gemma2Config(*sizes, query_pre_attn_scalar=16)),
):
    for gain, colour in ((0.5, "muted"), (1, "vision"), (2, "language"), (4, "accent")):
        ax.plot(stream_sizes(kind, config, gain), color=COLOURS[colour], lw=2, label=f"× {gain}")
    ax.set(yscale="log", xlabel="block", title=kind.__name__.removesuffix("DecoderLayer"))
axes[0].set_ylabel("size of the stream (rms)")
axes[1].legend(title="weights", ncols=2)
save_figure(fig, "13_norms")

# %% [markdown]
# Left, the size depends on the weights: four times larger weights, a stream some forty times larger.
# Right, the lines lie on each other. Each part adds something of size 1, whatever its weights, and 52
# additions of random direction make about $\sqrt{52} \approx 7$. This is why a deep Gemma 2 trains
# calmly.

# %% [markdown]
# ### The model
#
# Embedding, rotation and tied head are inherited. Two things differ: which blocks, and the cap behind
# the head. [Lesson 15](15_model.ipynb) can put either model into PaliGemma.


# %%
#| export
class Gemma2Model(GemmaModel):
    """The decoder of PaliGemma 2: `GemmaModel` with other blocks and capped logits.

    Source: Gemma Team 2024 (Gemma 2); `Gemma2Model` in transformers.
    """

    layer_class = Gemma2DecoderLayer

    def __init__(self, config: Gemma2Config):
        super().__init__(config)
        self.cap = config.final_logit_softcapping

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`float[B, L, D]` → `float32[B, L, V]`, capped."""
        return soft_cap(super().logits(hidden), self.cap)


# %%
config = Gemma2Config(24, 12, 20, 4, 4, 2, 6, query_pre_attn_scalar=5, sliding_window=4)
model = Gemma2Model(config)
ids = torch.arange(10)[None]
logits = model.logits(model(model.embed(ids), ids, one(causal)))
print(tuple(logits.shape), logits.dtype, f"never beyond ±30: {logits.abs().max():.1f}")
print("windows:", [layer.self_attn.sliding_window for layer in model.layers])

# %% [markdown]
# ## Against the reference
#
# A small `Gemma2ForCausalLM` of transformers: window 4, nine words, caps of 2 and 3 so that they
# bite. One full pass, then the same words as $6 + 1 + 1 + 1$ through a cache. (The whole PaliGemma 2,
# with picture, padding and prompts beyond the window, is compared in `tests/test_parity.py`.)

# %% tags=["nbval-ignore-output"]
reference = load_file("reference/gemma2.safetensors")
caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
config = Gemma2Config(24, 12, 20, 4, 4, 2, 6, query_pre_attn_scalar=5, sliding_window=4, **caps)
model = Gemma2Model(config)
prefixed = {n.removeprefix("weights."): t for n, t in reference.items() if n.startswith("w")}
model.load_state_dict(prefixed)
ids = reference["ids"]
places, sight = torch.arange(9).expand(2, -1), one(torch.ones(9, 9, dtype=torch.bool).tril())
whole = model.logits(model(model.embed(ids), places, sight))
cache, parts, start = KVCache(4, 2, 2, 9, 6), [], 0
for length in (6, 1, 1, 1):
    now = slice(start, start + length)
    seen = sight[:, :, now, : now.stop]
    parts.append(model.logits(model(model.embed(ids[:, now]), places[:, now], seen, cache)))
    start += length
gaps = [(t - reference["logits"]).abs().max().item() for t in (whole, torch.cat(parts, 1))]
assert max(gaps) <= 1e-5
print(f"largest difference {gaps[0]:.1e}, with a cache {gaps[1]:.1e}")

# %% [markdown]
# ## See it: what does each change do to an answer?
#
# The reference model again, with one change undone at a time. Each row shows how far the logits of
# each position move.


# %%
def undone(**changes):
    other = Gemma2Model(Gemma2Config(**vars(config) | changes))
    other.load_state_dict(prefixed)
    return other.logits(other(other.embed(ids), places, sight))


rows = {
    "no cap in attention": {"attn_logit_softcapping": None},
    "no window": {"sliding_window": None},
    "scale from head_dim": {"query_pre_attn_scalar": 6},
    "no cap on logits": {"final_logit_softcapping": None},
}
moved = torch.stack([(undone(**change) - whole)[0].abs().amax(-1) for change in rows.values()])
fig, ax = plt.subplots(figsize=(7.4, 2.3), layout="constrained")
show_heatmap(moved, rows=list(rows), columns=[str(i) for i in range(9)], annotate=".2f", ax=ax)
ax.set(aspect="auto", xlabel="position")
save_figure(fig, "13_undone")

# %% [markdown]
# Read the second row: positions 0 to 3 do not move, because a window of four cuts nothing there. The
# scale moves little. And the first token sees only itself, so that nothing in attention can change
# it. **A wrong window passes every test on short prompts.**
#
# ## At full size

# %%
with torch.device("meta"):
    models = {"Gemma": GemmaModel(GemmaConfig()), "Gemma 2": Gemma2Model(Gemma2Config())}
keys = {"embed_tokens": "embedding", "self_attn": "attention", "mlp": "GeGLU"}
print(f"{'':10}" + "".join(f"{name:>15}" for name in models))
for part in ("embedding", "attention", "GeGLU", "norms"):
    counts = [
        sum(p.numel() for n, p in model.named_parameters()
            if next((v for k, v in keys.items() if k in n), "norms") == part)
        for model in models.values()
    ]  # fmt: skip
    print(f"{part:10}" + "".join(f"{count:15,}" for count in counts))

# %% [markdown]
# More layers, and each thinner: the GeGLU shrank, attention more than doubled (four key/value heads).
#
# The whole PaliGemma 2 3B: add the vision tower and the projector.

# %%
vision, projector = 412_442_352, 1152 * 2304 + 2304
language = sum(p.numel() for p in models["Gemma 2"].parameters())
total = vision + projector + language
more = (1024 - 256) * 1152  # learned positions of 1,024 patches instead of 256
print(f"at 224 pixels {total:,}, at 448 {total + more:,}")
assert (total, total + more) == (3_032_094_960, 3_032_979_696)
print(f"with 64 spare rows: {total + 64 * 2304:,}")

# %% [markdown]
# Our default has the 257,152 rows that were trained. The files made for transformers have 64 more, one
# of them for `<image>`, and say so in their `config.json`.
#
# And the cache? It holds keys and values of every layer, two bytes each:

# %%
for name, layers, kv_heads in (("PaliGemma", 18, 1), ("PaliGemma 2", 26, 4)):
    token = layers * 2 * kv_heads * 256 * 2
    sizes = ", ".join(
        f"{px} px {token * ((px // 14) ** 2 + 106) / 1e6:4.0f} MB" for px in (224, 896)
    )
    print(f"{name:12} {token:7,} bytes a token; with 106 tokens of text: {sizes}")

# %% [markdown]
# Nearly six times more. And what does the long form of attention cost beside PyTorch's fused one? We
# measure a prompt at 224 pixels, one layer.

# %% tags=["nbval-ignore-output"]
q, k, v = torch.randn(1, 8, 264, 256), torch.randn(1, 4, 264, 256), torch.randn(1, 4, 264, 256)


def best_time(function):
    times = []
    for _ in range(8):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


fused = best_time(lambda: grouped_attention(q, k, v))
long = best_time(lambda: capped_attention(q, k, v, None, 1 / 16, 50))
print(f"fused {1e3 * fused:.1f} ms, capped {1e3 * long:.1f} ms: {long / fused:.1f} times")
print(f"scores of a layer at 896 pixels: {8 * 4102**2 * 4 / 1e6:.0f} MB in float32")

# %% [markdown]
# ## A bug people really make: the number under the root
#
# The scale is $1/\sqrt{\cdot}$ of something. Three colleagues wrote three formulas. Each tried the 3B
# model; two are content. Then the 28B arrives, the text reads well, but its scores on a benchmark are
# a little too low.

# %%
published = {  # width, query heads, head_dim, query_pre_attn_scalar
    "3B": (2304, 8, 256, 256),
    "10B": (3584, 16, 256, 256),
    "28B": (4608, 32, 128, 144),
}
print("size   head_dim   D // H   always 256   published")
for name, (width, heads, head_dim, scalar) in published.items():
    cells = [f"{n}{' ' if n == scalar else '✗'}" for n in (head_dim, width // heads, 256)]
    print(f"{name:4} {cells[0]:>9} {cells[1]:>9} {cells[2]:>11} {scalar:>11}")

# %% [markdown]
# **No formula is right for all three.** `head_dim` fails for the 28B, `D // H` for the two others.
# The number must be read: `query_pre_attn_scalar`. And `D // H` is not the width of a head anywhere.
#
# How loud is the error? The 28B's attention, with 128 in place of 144, on random queries and keys:

# %%
q, k = torch.randn(2, 400, 128, generator=torch.Generator().manual_seed(1))
for loud in (1, 3, 6):
    right, wrong = ((loud * q @ k.T / n**0.5).softmax(-1) for n in (144, 128))
    same = (right.argmax(-1) == wrong.argmax(-1)).float().mean()
    top = [w.amax(-1).mean().item() for w in (right, wrong)]
    print(f"scores × {loud}: strongest key the same {same:.0%}, "
          f"its weight {top[0]:.2f} instead of {top[1]:.2f}")  # fmt: skip

# %% [markdown]
# Always the same key, a little too sharp. No crash, no nonsense: only comparison with a reference
# shows it.
#
# ### And the cap that vanished
#
# A second one: `F.scaled_dot_product_attention` is faster, fits, and has no cap. How wrong is it?

# %%
q, k, v = torch.randn(3, 1, 1, 64, 128, generator=torch.Generator().manual_seed(2))
for loud in (1, 4, 16, 64):
    fused = F.scaled_dot_product_attention(loud * q, k, v)
    out = capped_attention(loud * q, k, v, None, 128**-0.5, 50)
    peak = (loud * q @ k.transpose(-1, -2) / 128**0.5).max().item()
    print(f"largest score {peak:5.1f}: error {((fused - out).norm() / out.norm()).item():.3f}")

# %% [markdown]
# With scores of ordinary size: next to nothing. With large ones: all wrong. A test with fresh random weights
# proves nothing about a cap; make the scores loud, or the cap small, as our reference does.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): how much of the picture is hidden?
#
# PaliGemma 2 at 896 pixels, a question of 20 tokens. How many of the 4,096 image tokens can the
# *300th* token of the answer not see in layer 0? And in layer 1?

# %% tags=["exercise"]
answer = None  # two numbers, such as (12, 34)


# %% tags=["check"]
def test_1(answer):
    assert isinstance(answer, tuple) and len(answer) == 2, "give two numbers"
    row = window_mask(None, 1, 4096 + 20 + 300, 4096)[0, 0, 0]
    assert answer[1] == 0, "layer 1 is not local"
    assert answer[0] == int((~row[:4096]).sum()), "count: a token sees itself and 4,095 before it"


check(test_1, answer)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Places count from 0. The 300th token of the answer stands at 4096 + 20 + 299 and sees 4,096 places,
# its own included.
#
# </details>

# %% tags=["solution"]
answer = (4096 + 20 + 300 - 4096, 0)
check(test_1, answer)

# %% [markdown]
# ### Exercise 2 (fill in): a cache that forgets
#
# A local layer never looks further back than its window, so its cache may drop what is older. How many
# bytes does a whole cache need then, for `length` tokens in bfloat16? Full layers keep all.


# %% tags=["exercise"]
def cache_bytes(config, length):
    return None  # bytes of keys and values, all layers


# %% tags=["check"]
def test_2(cache_bytes):
    for changes in ({}, {"num_hidden_layers": 5}, {"sliding_window": 100}):
        c = Gemma2Config(**changes)
        for length in (50, 4096, 8000):
            given = cache_bytes(c, length)
            assert given is not None, "return a number"
            kept = [length if i % 2 else min(length, c.sliding_window)
                    for i in range(c.num_hidden_layers)]  # fmt: skip
            want = sum(kept) * 2 * c.num_key_value_heads * c.head_dim * 2
            assert given == want, f"{given:,} for {c.num_hidden_layers} layers, {length} tokens"


check(test_2, cache_bytes)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Of `num_hidden_layers` layers, `(n + 1) // 2` are local. A token costs two vectors (key and value)
# for each key/value head, two bytes a number.
#
# </details>


# %% tags=["solution"]
def cache_bytes(config, length):
    layers = config.num_hidden_layers
    local = (layers + 1) // 2
    tokens = (layers - local) * length + local * min(length, config.sliding_window)
    return tokens * 2 * config.num_key_value_heads * config.head_dim * 2


check(test_2, cache_bytes)

# %% [markdown]
# ### Exercise 3 (break): make the late cap leak
#
# Four keys; the last one is hidden. Choose the four scores (before any cap, so any size is allowed) so
# that capping *after* the mask gives the hidden key more than a fifth of the weight.

# %% tags=["exercise"]
answer = None  # four scores, such as [1.0, 2.0, 3.0, 4.0]


# %% tags=["check"]
def test_3(answer):
    assert answer is not None and len(answer) == 4, "give four scores"
    scores = torch.tensor([*map(float, answer[:3]), float("-inf")])
    leak = soft_cap(scores, 50).softmax(0)[3].item()
    assert leak > 0.2, f"the hidden key got {leak:.3f}"


check(test_3, answer)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The hidden key ends at $-50$, whatever you give it. Which visible scores end there too?
#
# </details>

# %% tags=["solution"]
answer = [-500.0, -600.0, -700.0, 0.0]  # all three end at -50 as well
check(test_3, answer)

# %% [markdown]
# ## Summary
#
# - Gemma 2 limits what Gemma left free: scores, logits, the size of what a block adds, how far a layer
#   looks.
# - The order in attention is scale, cap, mask, softmax.
# - The window cuts one-way looks. Picture and question stay whole; an answer loses the far end.
# - The query scale is a number of its own, and head width is not $D / H$.
# - Ordinary inputs do not show these changes: test with loud scores and long prompts.

# %% [markdown]
# ## Quiz
#
# **1.** Which of the five changes add parameters?
#
# <details><summary>Answer</summary>
#
# Only the norms, two more vectors of width $D$ in each block. Caps, window and scale are rules. So a
# file cannot tell you about them: they come from `config.json`.
#
# </details>

# %% [markdown]
# **2.** Layer 0 sees 4,096 tokens back. How far back can information in layer 2 come from?
#
# <details><summary>Answer</summary>
#
# From anywhere. Layer 1 sees everything, and layer 2 reads vectors that layer 1 has written. Layers
# that are all local would reach $W - 1$ places further with each layer.
#
# </details>

# %% [markdown]
# **3.** Someone loads PaliGemma 2 weights into [lesson 12](12_gemma.ipynb)'s `GemmaModel` of the same widths, with
# `strict=False`. What happens?
#
# <details><summary>Answer</summary>
#
# All shapes that exist in both fit. The two feed-forward norms of each block are dropped silently, and
# `post_attention_layernorm` lands before the GeGLU. It runs, and speaks nonsense. [Lesson 16](16_checkpoint.ipynb) refuses to
# mix the two.
#
# </details>

# %% [markdown]
# ## References
#
# - Gemma Team, *Gemma 2: Improving Open Language Models at a Practical Size*, 2024, section 2 and
#   table 1.
# - Andreas Steiner et al., *PaliGemma 2: A Family of Versatile VLMs for Transfer*, 2024.
# - Irwan Bello et al., *Neural Combinatorial Optimization with Reinforcement Learning*, 2016 (capped
#   scores); Iz Beltagy et al., *Longformer*, 2020 (sliding windows).
# - gemma_pytorch: `gemma/model.py`, class `Gemma2DecoderLayer`; transformers:
#   `models/gemma2/modeling_gemma2.py` and `masking_utils.py`.

# %% [markdown] tags=["navigation"]
# [← Gemma](12_gemma.ipynb) | [contents](00_overview.ipynb) | [Processor →](14_processor.ipynb)
