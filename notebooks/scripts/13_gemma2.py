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
# *45 minutes* · part II, Language
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

import matplotlib.pyplot as plt
from safetensors.torch import load_file

from paligemma.gemma import GemmaDecoderLayer
from paligemma.grouped_query_attention import grouped_attention
from paligemma.image_processor import ImageProcessor
from paligemma.kv_cache import KVCache
from paligemma.plotting import show_heatmap
from paligemma.rope import RotaryEmbedding
from paligemma.siglip import SiglipVisionConfig, SiglipVisionModel
from paligemma.support.course import check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS
from paligemma.tokenizer import Tokenizer

torch.manual_seed(13)
_ = torch.set_grad_enabled(False)

# %% [markdown]
# ## The problem
#
# PaliGemma works. Why change its decoder? Bigger models showed three weaknesses: scores that run
# away during training, a stream whose size nobody controls, and attention to thousands of tokens
# in every layer. Gemma 2 puts a limit on each. Here are both blocks; what is new has a thick purple
# edge.


# %% tags=["hide-input"]
def box(ax, x, y, text, colour, new=False):
    style = {"boxstyle": "round,pad=0.25", "fc": COLOURS["paper"], "lw": 2.5 if new else 1.5}
    style["ec"] = COLOURS["accent" if new else colour]
    ax.text(x, y, text, ha="center", va="center", fontsize=9.5, bbox=style, zorder=3)


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


fig, axes = plt.subplots(2, 1, figsize=(9.5, 3.9), layout="constrained")
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
# more. **Soft-capping** bends it instead: $c \cdot \tanh(s / c)$.
#
# With a pencil, for $c = 50$: at $s = 10$, $\tanh 0.2 = 0.197$, so 9.87, almost unchanged. At
# $s = 50$, $\tanh 1 = 0.762$. At $s = 200$, $\tanh 4 = 0.9993$.

# %%
for s in (1.0, 10.0, 50.0, 200.0):
    print(f"{s:5.0f} → {50 * torch.tensor(s / 50).tanh().item():.2f}")

# %% [markdown]
# As a function. Some recipes for fine-tuning write 0 or nothing where no cap is wanted. And it works
# in float32 always: near the limit the curve is flat, and bfloat16, with its 8 significant bits,
# makes neighbours equal.


# %%
#| export
def soft_cap(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap · tanh(x / cap): `float[…]` → `float32[…]`, almost x where x is small, within ±cap.

    A cap of 0 or None is no cap: some recipes for fine-tuning set it so.

    Source: Gemma 2 report, section 2; Bello et al. 2016.
    """
    return cap * torch.tanh(x.float() / cap) if cap else x.float()


# %%
loud = torch.tensor([200.0, 190.0])
print("float32 ", [round(y, 3) for y in soft_cap(loud, 50).tolist()])
half = 50 * torch.tanh(loud.bfloat16() / 50)
print("bfloat16", half.tolist())
assert half[0] == half[1] and soft_cap(loud.bfloat16(), 50).diff() < 0

# %% [markdown]
# ### Two caps, two jobs
#
# Attention scores are capped at 50, logits at 30. Left: the curves. Right: four keys with enormous
# scores. Softmax looks only at *differences*, and 120 beats 110 by $e^{10}$. Capped, the four lie
# close together.

# %%
scores = torch.tensor([120.0, 110.0, 100.0, 90.0])
weights = {"no cap": scores.softmax(0), "cap 50": soft_cap(scores, 50).softmax(0)}
alone = soft_cap(torch.tensor([120.0, 0, 0, 0]), 50).softmax(0)
print(f"the loudest key gets {weights['no cap'][0]:.2f}, capped {weights['cap 50'][0]:.2f}")
assert soft_cap(torch.tensor(10.0), 30) > 9.6
assert weights["no cap"][0] > 0.999 and weights["cap 50"][0] < 0.5 and alone[0] > 0.999

# %% tags=["hide-input"]
line = torch.linspace(-150, 150, 301)
fig, axes = plt.subplots(1, 2, figsize=(8.6, 3), layout="constrained")
axes[0].plot(line, line, ":", color=COLOURS["muted"], label="no cap")
for cap, colour in ((50, "language"), (30, "accent")):
    axes[0].plot(line, soft_cap(line, cap), color=COLOURS[colour], lw=2, label=f"cap {cap}")
axes[0].set(ylim=(-80, 80), xlabel="score", ylabel="after the cap")
axes[0].legend(loc="upper left")
for shift, (name, values) in enumerate(weights.items()):
    places = torch.arange(4) + 0.38 * shift - 0.19
    colour = COLOURS["language" if shift else "muted"]
    axes[1].bar(places, values, width=0.36, label=name, color=colour)
axes[1].set(xlabel="score of the key", ylabel="attention weight", ylim=(0, 1.05))
axes[1].set_xticks(range(4), [f"{s:.0f}" for s in scores.tolist()])
axes[1].legend()
save_figure(fig, "13_soft_cap")

# %% [markdown]
# Notice: up to a score of 10 both curves are the straight line, within 4 %. A cap is a guard rail for
# scores that run away: ten points between 120 and 110 silence a rival, capped they hardly count. (A
# *single* loud key still takes everything: 50 against 0 is enough.)

# %% [markdown]
# ### What would a cap do to a trained model?
#
# The small model that ships is a Gemma of the first kind, without caps. It captions a picture, and we
# watch its attention scores: [lesson 10](10_grouped_query_attention.ipynb) left a door for that,
# `attend`.

# %%
tiny = {n: t.float() for n, t in load_file("../paligemma/assets/tiny/model.safetensors").items()}


def fill(module, prefix):
    own = {n.removeprefix(prefix): t for n, t in tiny.items() if n.startswith(prefix)}
    module.load_state_dict(own)
    return module


# %%
gemma = fill(GemmaModel(GemmaConfig(2240, 128, 256, 4, 4, 1, 32)), "language_model.model.")
sizes = SiglipVisionConfig(128, 512, 4, 4, image_size=112)
tower = fill(SiglipVisionModel(sizes), "vision_tower.vision_model.")
project = fill(torch.nn.Linear(128, 128), "multi_modal_projector.linear.")
tokenizer = Tokenizer("../paligemma/assets/tiny/tokenizer.model")

# %%
question = [tokenizer.bos_id, *tokenizer.encode("caption en"), tokenizer.newline_id]
caption = [*tokenizer.encode("a cat and two dogs"), tokenizer.eos_id]
words = gemma.embed(torch.tensor([question + caption[:-1]]))
picture = project(tower(ImageProcessor(112)(sample_picture("scene"))))  # [1, 64, D]
mask = torch.ones(1, 1, 73, 73, dtype=torch.bool).tril()
mask[..., :68] = True  # picture and question see all of each other

# %%
watched = []


def watch(q, k, v, mask):
    watched.append((q @ k.transpose(-1, -2) / 32**0.5)[mask.expand(-1, 4, -1, -1)])
    return grouped_attention(q, k, v, mask)


# %%
for layer in gemma.layers:
    layer.self_attn.attend = watch
hidden = gemma(torch.cat((picture, words), dim=1), torch.arange(73)[None], mask)
scores = torch.cat(watched).abs()
print(
    f"{(scores < 10).float().mean():.1%} of the scores are below 10, the largest {scores.max():.0f}"
)
assert (scores < 10).float().mean() > 0.99 and scores.max() < 25

# %% [markdown]
# So the cap of 50 would do next to nothing here. Now the cap of 30 on its logits, for
# each token of the caption:

# %%
logits = gemma.logits(hidden[:, 67:])[0]  # [6, V]
capped = soft_cap(logits, 30)
for i, token in enumerate(caption):
    before, after = logits[i].softmax(-1)[token], capped[i].softmax(-1)[token]
    print(f"{tokenizer.sp.id_to_piece(token):6} logit {logits[i].max():4.1f}, ", end="")
    print(f"probability {before:.3f}, capped {after:.3f}")

# %%
assert logits.argmax(-1).tolist() == capped.argmax(-1).tolist() == caption
right = torch.stack((logits, capped)).softmax(-1)[:, range(6), caption]
assert (right[1] < right[0]).all() and (1 - right[1, 3]) > 4 * (1 - right[0, 3])

# %% [markdown]
# The order stays, so the **greedy answer stays**. The certainty does not: at "two", the chance of
# another token is more than four times as large. Whoever leaves this cap out gets the right greedy
# text and the wrong probabilities, and [lesson 17](17_sampling.ipynb) draws from those.

# %% [markdown]
# ## The window
#
# Full attention reads everything in every layer. With a **sliding window** a token sees itself and
# the 4,095 tokens before it, no more. Layers 0, 2, 4 … have one; layers 1, 3, 5 … see everything.
# What a local layer cannot reach, the next one can.
#
# But our sequence begins with a picture and a question, and their tokens look in *both* directions.
# What does "too far back" mean there?

# %%
i = torch.arange(10)
both = (i < 6) & (i < 6)[:, None]  # six tokens of picture and question: they see each other
full = both | (i <= i[:, None])  # [query, key]
near = i > i[:, None] - 4  # a window of four
cut_all, cut_one_way = full & near, full & (near | both)

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.2), layout="constrained")
names = ["no window", "window cuts everything", "window cuts one-way looks"]
for ax, name, m in zip(axes, names, (full, cut_all, cut_one_way)):
    show_heatmap(m, name, rows=range(10), columns=range(10), ax=ax)
    ax.set(xlabel="key", ylabel="query")
    ax.add_patch(
        plt.Rectangle((-0.5, -0.5), 6, 6, fill=False, ec=COLOURS["language"], lw=3, zorder=5)
    )
save_figure(fig, "13_windows")

# %% [markdown]
# The orange square is the prefix. The middle would be odd: token 5 could not look back at token 0,
# while token 0 could look *ahead* at token 5. The reference does what is on the right. **Two tokens
# that look at each other are never parted; the window cuts one-way looks only.** So the picture stays
# whole, and the answer (rows 6 to 9) loses the picture's beginning.

# %% [markdown]
# ### On the cat
#
# At 224 and 448 pixels nothing is ever cut: 1,024 tokens and an answer fit into 4,096. At 896 the
# picture alone has 4,096. What can the 1st, 100th and 500th token of an answer still see of it in a
# local layer, after a question of six tokens?


# %%
def hidden_patches(step, question=6, picture=4096, window=4096):
    """How many image tokens the step-th token of the answer cannot see in a local layer."""
    position = picture + question + step - 1
    return max(0, position - window + 1)


assert hidden_patches(500) < 4096 / 8

# %% tags=["hide-input"]
cat = sample_picture("cat").resize((256, 256))
fig, axes = plt.subplots(1, 3, figsize=(8.4, 3.1), layout="constrained")
for ax, step in zip(axes, (1, 100, 500)):
    lost = torch.arange(4096).view(64, 64) < hidden_patches(step)
    ax.imshow(cat, extent=(0, 64, 64, 0))
    veil = torch.zeros(64, 64, 4)
    veil[lost] = torch.tensor([0.1, 0.1, 0.1, 0.9])
    ax.imshow(veil, extent=(0, 64, 64, 0), interpolation="nearest")
    ax.set_title(f"token {step}: {hidden_patches(step)} patches hidden")
    ax.set_axis_off()
save_figure(fig, "13_cat_window")

# %% [markdown]
# A strip at the top, at token 500 less than an eighth, and only in every second layer. The cat's ears
# are not lost either: all other patches have looked at them before, in both directions.
#
# The weights were trained *without* this: the original (big_vision) has no window. It is
# transformers that cuts, and we follow it, so that both give the same answers.
# `sliding_window=None` gives the original.

# %% [markdown]
# ## As a loop
#
# Attention of Gemma 2 with one head, one query and one key at a time. Read the order of the lines:
# **scale, cap, then the mask** (here: do not even ask the keys that are out of sight).


# %%
def sees(query, key, prefix, window):
    both = query < prefix and key < prefix
    return both or (key <= query and key > query - window)


# %%
def attention_loop(q, k, v, prefix, window, scale, cap):
    found = []
    for a in range(len(q)):
        keys = [b for b in range(len(k)) if sees(a, b, prefix, window)]
        scores = torch.stack([cap * torch.tanh(q[a] @ k[b] * scale / cap) for b in keys])
        found.append(sum(w * v[b] for w, b in zip(scores.softmax(0), keys)))
    return torch.stack(found)  # [L, Dh]


# %%
q, k, v = (8 * torch.randn(10, 16) for _ in range(3))  # loud: scores beyond the cap
slow = attention_loop(q, k, v, prefix=6, window=4, scale=1 / 3, cap=50)
print(tuple(slow.shape), f"largest score: {(q @ k.T / 3).abs().max():.0f}")

# %% [markdown]
# ## Vectorised
#
# All at once. PyTorch's fast attention takes a mask and a scale, but has no place for a $\tanh$. So
# Gemma 2 needs the long form: scores, cap, mask, softmax, sum.

# %%
scores = soft_cap(q @ k.T / 3, 50)
fast = scores.masked_fill(~cut_one_way, float("-inf")).softmax(-1) @ v
torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)

# %% [markdown]
# ### Why not cap after the mask?
#
# A hidden key has the score $-\infty$. Capped afterwards it becomes $-50$: no longer hidden, just
# unpopular. Where every visible score is low, it comes back.

# %%
sour = q.clone()
sour[9] = -3 * k[6:].sum(0)  # query 9 now dislikes all four keys it may see
late = soft_cap((sour @ k.T / 3).masked_fill(~cut_one_way, float("-inf")), 50)
leak = late.softmax(-1).masked_fill(cut_one_way, 0).sum(-1)  # [L]: weight on hidden keys
print("weight on hidden keys, by query:", [f"{x:.3f}" for x in leak.tolist()])
assert leak[:9].max() < 5e-4 and leak[9] > 0.5

# %% [markdown]
# Nine queries are right to three digits, and the tenth gives most of its weight to what it must not
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
# Then attention itself. Heads of a group are laid along the sequence, as in
# [lesson 10](10_grouped_query_attention.ipynb), so that no key is copied.


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
    q = q.reshape(batch, kv_heads, group * length, head_dim)  # [B, K, G·L, Dh]
    scores = soft_cap((q @ k.transpose(-1, -2)).float() * scale, cap)  # [B, K, G·L, S]
    if mask is not None:
        scores = scores.masked_fill(~mask.repeat(1, 1, group, 1), float("-inf"))
    out = scores.softmax(-1).type_as(v) @ v  # [B, K, G·L, Dh]
    return out.reshape(batch, heads, length, head_dim)


# %%
one = lambda t: t[None, None]
out = capped_attention(one(q), one(k), one(v), one(cut_one_way), 1 / 3, 50)[0, 0]
torch.testing.assert_close(out, slow, rtol=1e-4, atol=1e-4)

# %%
q8, k2, v2 = torch.randn(2, 8, 5, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 16)
same = capped_attention(q8, k2, v2, None, 1 / 4, cap=None)
torch.testing.assert_close(same, grouped_attention(q8, k2, v2), rtol=1e-4, atol=1e-4)
print("equal to the loop; without a cap equal to the attention of Gemma")

# %% [markdown]
# ### The window, from the mask alone
#
# The window narrows a mask, and needs nothing else. How far back is a key? Count the keys that the
# query sees, from the last one backwards: the first four are near. Padding is seen by nobody, so it
# is never counted.

# %%
from_the_right = full.flip(-1).cumsum(-1).flip(-1)  # visible keys from here to the row's end
print(from_the_right[9].tolist())
print((full & (from_the_right <= 4))[9].int().tolist())

# %% [markdown]
# And who looks at each other? The mask says it too: a query whose key looks *back* keeps it. (Tokens
# of earlier calls, in the cache, can't look at new ones; so the window cuts them.)


# %%
#| export
def window_mask(mask: torch.Tensor, window: int) -> torch.Tensor:
    """Cut all but the last `window` keys that a query sees, except of those that look back.

    Args:
        mask: `bool[B, 1, L, S]`, True where a query may look; the L new tokens stand last,
            or (where L = 1) anywhere. Tokens that see each other come in one call.
        window: how many tokens a query may see, itself included.

    Returns:
        `bool[B, 1, L, S]`.

    Source: `create_sliding_window_causal_mask` with a bidirectional block, transformers.
    """
    length, total = mask.shape[-2:]
    seen = mask.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)  # from this key to the last one
    back = mask[..., total - length :].transpose(-1, -2)  # [B, 1, L, L]: does the key look back?
    mutual = F.pad(back, (total - length, 0))  # [B, 1, L, S]
    return mask & ((seen <= window) | mutual)


# %%
assert torch.equal(window_mask(one(full), 4)[0, 0], cut_one_way)
step = window_mask(torch.ones(1, 1, 1, 10, dtype=torch.bool), 4)  # one new token, nine cached
print("the tenth token sees:", step[0, 0, 0].nonzero()[:, 0].tolist())

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
        length, total = q.shape[2], k.shape[2]
        if self.sliding_window is not None and total > self.sliding_window:
            if mask is None:
                mask = torch.ones(1, 1, length, total, dtype=torch.bool, device=q.device)
            mask = window_mask(mask, self.sliding_window)
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
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Gemma2Attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GeGLU(config.hidden_size, config.intermediate_size)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

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
    x, sizes = torch.randn(1, 12, 64, generator=torch.manual_seed(0)), []
    cos, sin = RotaryEmbedding(16)(torch.arange(12)[None])
    for i in range(26):
        block = kind(config, i)
        for p in block.parameters():
            if p.dim() == 2:
                p.normal_(0, gain / p.shape[1] ** 0.5)
        x = block(x, cos, sin)
        sizes.append(x.square().mean().sqrt().item())
    return sizes


# %%
sizes, gains = (8, 64, 128, 26, 4, 2, 16), (0.5, 1, 2, 4)
second = Gemma2Config(*sizes, query_pre_attn_scalar=16)
grown = {
    "Gemma": [stream_sizes(GemmaDecoderLayer, GemmaConfig(*sizes), g) for g in gains],
    "Gemma 2": [stream_sizes(Gemma2DecoderLayer, second, g) for g in gains],
}

# %%
last = {name: [line[-1] for line in lines] for name, lines in grown.items()}
print({name: [round(size, 1) for size in values] for name, values in last.items()})
assert last["Gemma"][3] > 20 * last["Gemma"][1]
assert 6 < min(last["Gemma 2"]) and max(last["Gemma 2"]) < 9

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(8.6, 3), sharey=True, layout="constrained")
for ax, (name, lines) in zip(axes, grown.items()):
    for line, gain, colour in zip(lines, gains, ("muted", "vision", "language", "accent")):
        ax.plot(range(1, 27), line, color=COLOURS[colour], lw=2, label=f"× {gain}")
    ax.set(yscale="log", xlabel="block", title=name)
axes[0].set_ylabel("size of the stream")
axes[1].legend(title="weights", ncols=2)
save_figure(fig, "13_norms")

# %% [markdown]
# Left, the size depends on the weights: four times larger weights, a stream more than twenty times
# larger. Right, the lines lie on each other. Each part adds something of size 1, whatever its
# weights, and 52 additions of random direction make about $\sqrt{52} \approx 7$.

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


# %% [markdown]
# ## Against the reference
#
# A small `Gemma2ForCausalLM` of transformers: window 4, nine tokens, caps of 2 and 3 so that they
# bite. One full pass, then the same tokens as $6 + 1 + 1 + 1$ through a cache. (The whole PaliGemma 2,
# with picture, padding and prefixes beyond the window, is compared in `tests/test_parity.py`.)

# %%
reference = load_file("reference/gemma2.safetensors")
theirs = {n.removeprefix("weights."): t for n, t in reference.items() if n.startswith("w")}
caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
config = Gemma2Config(24, 12, 20, 4, 4, 2, 6, query_pre_attn_scalar=5, sliding_window=4, **caps)


# %%
def logits_of(config, sizes=(9,)):
    model = Gemma2Model(config)
    model.load_state_dict(theirs)
    cache, parts = KVCache(4, 2, 2, 9, 6), []
    causal = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    for ids in reference["ids"].split(sizes, dim=1):
        now = torch.arange(len(cache), len(cache) + ids.shape[1])
        seen = causal[:, :, now, : now[-1] + 1]
        parts.append(model(model.embed(ids), now.expand(2, -1), seen, cache))
    return model.logits(torch.cat(parts, dim=1))


# %%
for sizes in ((9,), (6, 1, 1, 1)):
    gap = (logits_of(config, sizes) - reference["logits"]).abs().max().item()
    print(f"{len(sizes)} calls: largest difference {gap:.1e}")
    assert gap <= 1e-5

# %% [markdown]
# ## See it: what does each change do to an answer?
#
# The reference model again, with one change undone at a time. Each row shows how far the logits of
# each position move.

# %%
changes = {
    "no cap in attention": {"attn_logit_softcapping": None},
    "no window": {"sliding_window": None},
    "scale from head_dim": {"query_pre_attn_scalar": 6},
    "no cap on logits": {"final_logit_softcapping": None},
}
moved = []
for change in changes.values():
    logits = logits_of(Gemma2Config(**vars(config) | change))
    moved.append((logits - reference["logits"])[0].abs().amax(-1))
moved = torch.stack(moved)

# %%
assert moved[1, :4].max() < 1e-5 and moved[1, 4:].min() > 0.1
assert moved[:3, 0].max() < 1e-5 and moved[2].max() < 0.2

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(8.4, 2.5), layout="constrained")
show_heatmap(moved, rows=list(changes), columns=range(9), annotate=".2f", ax=ax)
ax.set(aspect="auto", xlabel="position")
save_figure(fig, "13_undone")

# %% [markdown]
# Read the second row: positions 0 to 3 do not move, because a window of four cuts nothing there. The
# scale moves little. And the first token sees only itself, so that nothing in attention can change
# it. **A wrong window passes every test on short texts.**
#
# ## At full size

# %%
with torch.device("meta"):
    models = {"Gemma": GemmaModel(GemmaConfig()), "Gemma 2": Gemma2Model(Gemma2Config())}
keys = {"embed_tokens": "embedding", "self_attn": "attention", "mlp": "GeGLU"}
counts = {name: dict.fromkeys((*keys.values(), "norms"), 0) for name in models}
for name, model in models.items():
    for full_name, p in model.named_parameters():
        counts[name][next((v for k, v in keys.items() if k in full_name), "norms")] += p.numel()

# %%
first, second = counts["Gemma"], counts["Gemma 2"]
for part in first:
    print(f"{part:10}{first[part]:15,}{second[part]:15,}")
assert second["GeGLU"] < first["GeGLU"] and second["attention"] > 2 * first["attention"]

# %% [markdown]
# More layers, and each thinner: the GeGLU shrank, attention more than doubled (four key/value heads).
#
# The whole PaliGemma 2 3B: add the vision tower and the matrix that brings its vectors to width 2304.

# %%
vision, between = 412_442_352, 1152 * 2304 + 2304
total = vision + between + sum(second.values())
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
kept = {"PaliGemma": 18 * 2 * 1 * 256 * 2, "PaliGemma 2": 26 * 2 * 4 * 256 * 2}
for name, token in kept.items():
    print(f"{name:12} {token:7,} bytes a token; ", end="")
    print(f"896 pixels and 106 tokens of text: {token * (64 * 64 + 106) / 1e6:4.0f} MB")
assert 5.5 < kept["PaliGemma 2"] / kept["PaliGemma"] < 6
print(f"scores of a layer there, which SDPA never stores: {8 * 4102**2 * 4 / 1e6:.0f} MB")

# %% [markdown]
# Nearly six times more. And the long form of attention stores all scores of a layer, which PyTorch's
# fast one never does: half a gigabyte at 896 pixels.

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

# %%
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
q, k = torch.randn(2, 400, 128, generator=torch.manual_seed(1))
for loud in (1, 3, 6):
    right, wrong = ((loud * q @ k.T / n**0.5).softmax(-1) for n in (144, 128))
    assert torch.equal(right.argmax(-1), wrong.argmax(-1))
    top = [w.amax(-1).mean().item() for w in (right, wrong)]
    print(f"scores × {loud}: the strongest key has weight {top[0]:.2f} or, wrongly, {top[1]:.2f}")
    assert 1 < top[1] / top[0] < 1.2

# %% [markdown]
# Always the same key, a little too sharp. No crash, no nonsense: only comparison with a reference
# shows it.
#
# ### And the cap that vanished
#
# A second one: `F.scaled_dot_product_attention` is faster, fits, and has no cap. How wrong is it?

# %%
q, k, v = torch.randn(3, 1, 1, 64, 128, generator=torch.manual_seed(2))
errors = []
for loud in (1, 4, 16, 64):
    fused = F.scaled_dot_product_attention(loud * q, k, v)
    out = capped_attention(loud * q, k, v, None, 128**-0.5, 50)
    peak = (loud * q @ k.transpose(-1, -2) / 128**0.5).max().item()
    errors.append(((fused - out).norm() / out.norm()).item())
    print(f"largest score {peak:5.1f}: error {errors[-1]:.3f}")
assert errors[0] < 0.01 and errors[-1] > 0.4

# %% [markdown]
# With scores of ordinary size: next to nothing. With large ones: very wrong. A test with fresh random
# weights proves nothing about a cap; make the scores loud, or the cap small, as our reference does.

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
    two = isinstance(answer, (tuple, list)) and len(answer) == 2
    assert two and all(isinstance(n, int) for n in answer), "give two whole numbers"
    row = window_mask(torch.ones(1, 1, 1, 4096 + 20 + 300, dtype=torch.bool), 4096)[0, 0, 0]
    right = int((~row[:4096]).sum())
    assert answer[1] == 0, "layer 1: which layers have a window?"
    assert answer[0] != 4096 - right, "layer 0: these it can see"
    assert answer[0] != right - 20, "layer 0: the question stands between, and is seen too"
    assert abs(answer[0] - right) != 1, "layer 0: close; the window holds the token itself too"
    assert answer[0] == right, "layer 0: at which position is it, and how far back does it see?"


check(test_1, answer)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Positions count from 0. The 300th token of the answer stands at 4096 + 20 + 299 and sees 4,096
# positions, its own included.
#
# </details>

# %% tags=["solution"]
# its own position is 4096 + 20 + 299; it sees 4,096 positions, so those below 320 are hidden
answer = (4096 + 20 + 300 - 4096, 0)
check(test_1, answer)

# %% [markdown]
# ### Exercise 2 (write): a cache that forgets
#
# A local layer never looks further back than its window, so what it keeps may be short. Write
# `update`: even layers keep the last `window` tokens, odd layers all. What it *returns* is for the
# call at hand: all that was kept, and all the new tokens. (Join with `torch.cat`, for once.)


# %% tags=["exercise"]
class ForgettingCache:
    def __init__(self, window):
        self.window, self.kept = window, {}

    def update(self, layer_idx, k, v):
        return None  # keys, values


# %% tags=["check"]
def test_2(Cache):
    k, v = torch.randn(2, 1, 2, 12, 6)  # [B, K, tokens, Dh] each
    for window, sizes in ((4, (3, 1, 1, 1, 1, 1)), (3, (7, 1, 2, 1, 1))):
        cache, end = Cache(window), 0
        for length in sizes:
            start, end = end, end + length
            for layer_idx in range(2):
                try:
                    given = cache.update(layer_idx, k[:, :, start:end], v[:, :, start:end])
                except (RuntimeError, KeyError, IndexError, AttributeError, TypeError) as error:
                    raise AssertionError(f"it stopped: {str(error).splitlines()[0]}") from None
                assert given is not None and len(given) == 2, "return keys and values"
                first = max(0, start - window) if layer_idx == 0 else 0
                at = f"layer {layer_idx}, window {window}, {start} tokens before and {length} new"
                for got, everything, name in zip(given, (k, v), ("keys", "values")):
                    n, want = got.shape[2], everything[:, :, first:end]
                    assert n >= length, f"{at}: a new token is missing from the {name}"
                    more = "more" if n > want.shape[2] else "fewer"
                    assert n == want.shape[2], f"{at}: {n} {name} returned, {more} than needed"
                    assert torch.equal(got, want), f"{at}: other {name}, or in another order"


check(test_2, ForgettingCache)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Join first, return the joined tensors, and store only their end: `k[:, :, -window:]`. The first call
# may bring more tokens than the window holds.
#
# </details>


# %% tags=["solution"]
class ForgettingCache:
    def __init__(self, window):
        self.window, self.kept = window, {}

    def update(self, layer_idx, k, v):
        if layer_idx in self.kept:
            old_k, old_v = self.kept[layer_idx]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        # the next token sees itself and window - 1 others: the last `window` are enough
        keep = slice(-self.window, None) if layer_idx % 2 == 0 else slice(None)
        self.kept[layer_idx] = k[:, :, keep], v[:, :, keep]
        return k, v


check(test_2, ForgettingCache)

# %% [markdown]
# ### Exercise 3 (break): make the late cap leak
#
# Four keys; the last one is hidden. Choose the four scores (before any cap, so any size is allowed) so
# that capping *after* the mask gives the hidden key more than a fifth of the weight.

# %% tags=["exercise"]
scores = None  # four numbers, such as [1.0, 2.0, 3.0, 4.0]


# %% tags=["check"]
def test_3(scores):
    four = isinstance(scores, (list, tuple)) and len(scores) == 4
    assert four, "give a list of four numbers"
    finite = all(isinstance(s, (int, float)) and abs(s) < 1e30 for s in scores)
    assert finite, "each score is a finite number"
    given = torch.tensor([*map(float, scores[:3]), float("-inf")])
    weights = soft_cap(given, 50).softmax(0)
    leak = weights[3].item()
    loudest = int(weights[:3].argmax())
    assert leak > 0.2, f"the hidden key got {leak:.3f}; key {loudest} got {weights[loudest]:.3f}"


check(test_3, scores)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The hidden key ends at $-50$, whatever you give it. Which visible scores end there too?
#
# </details>

# %% tags=["solution"]
scores = [-500.0, -600.0, -700.0, 0.0]  # all three end at -50 as well, so the four share alike
check(test_3, scores)

# %% [markdown]
# ## Summary
#
# - Gemma 2 limits what Gemma left free: scores, logits, the size of what a block adds, how far a layer
#   looks.
# - The order in attention is scale, cap, mask, softmax.
# - The window cuts one-way looks. Picture and question stay whole; an answer loses the far end.
# - The query scale is a number of its own, and head width is not $D / H$.
# - Ordinary inputs do not show these changes: test with loud scores and long texts.

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
# **2.** Layer 0 sees 4,095 tokens back. How far back can information in layer 2 come from?
#
# <details><summary>Answer</summary>
#
# From anywhere. Layer 1 sees everything, and layer 2 reads vectors that layer 1 has written. Layers
# that are all local would reach 4,095 positions further with each layer.
#
# </details>

# %% [markdown]
# **3.** Someone loads PaliGemma 2 weights into [lesson 12](12_gemma.ipynb)'s `GemmaModel` of the same
# widths, with `strict=False`. What happens?
#
# <details><summary>Answer</summary>
#
# All shapes that exist in both fit. The two feed-forward norms of each block are dropped silently, and
# `post_attention_layernorm` lands before the GeGLU. It runs, and speaks nonsense.
# [Lesson 16](16_checkpoint.ipynb) refuses to mix the two.
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
