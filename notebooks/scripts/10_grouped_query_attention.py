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
# [← RoPE](09_rope.ipynb) | [contents](00_overview.ipynb) | [KV cache →](11_kv_cache.ipynb)

# %% [markdown]
# # 10 · Grouped-query attention: must every head keep its own keys?
#
# *45 minutes* · part II, Language
#
# **What you will be able to do**
#
# - say which key/value head each query head reads, for multi-head, grouped and multi-query
#   attention;
# - write attention in which every key and value is read once for its whole group;
# - compute what a choice of heads costs in bytes, before anything is trained;
# - find a wrong grouping that raises no error and changes no shape.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("grouped_query_attention")

# %% [markdown]
# ## Setup
#
# From [lesson 09](09_rope.ipynb) we take the rotation of queries and keys. The cells that begin
# with `#| export` become the file
# [grouped_query_attention.py](../paligemma/grouped_query_attention.py); this first one gives it
# its opening lines.

# %%
#| export
"""Attention with fewer key/value heads than query heads: MHA, GQA and MQA in one class."""

import torch
import torch.nn.functional as F
from torch import nn

from paligemma.rope import apply_rope

# %% tags=["setup"]
import time

import matplotlib.pyplot as plt
from safetensors.torch import load_file

from paligemma.plotting import show_heatmap
from paligemma.support.course import check, save_figure
from paligemma.support.drawing import COLOURS, CYCLE
from paligemma.rope import RotaryEmbedding
from paligemma.support.course import add_to_class

_ = torch.manual_seed(10)

# %% [markdown]
# ## The problem
#
# A language model answers one token at a time. For each new token, every layer compares one new
# query with the keys of **all** tokens before it, then averages their values. Those keys and
# values were computed earlier and are kept in memory.
#
# So most of the work is not arithmetic. It is *reading*: every stored key and value travels from
# memory to the processor once for each token of the answer.

# %% [markdown]
# Attention has several **heads**, each asking its own question. In **multi-head attention** (MHA)
# each head also keeps its own keys and values: eight heads, eight sets to store and read.
#
# Must it? **Multi-query attention** (MQA) lets all heads share one set. **Grouped-query
# attention** (GQA) stands between: each key/value head serves a group of query heads. A line below
# means "reads".


# %%
def draw_groups(ax, heads, kv_heads, title):
    """Query heads above, key/value heads below, a line from each reader to what it reads."""
    group = heads // kv_heads
    colours = [*CYCLE[:6], COLOURS["good"], COLOURS["bad"]]
    place = {"ha": "center", "va": "center", "color": "white", "fontsize": 8}
    for j in range(kv_heads):
        middle = j * group + (group - 1) / 2
        for h in range(j * group, (j + 1) * group):
            ax.plot([h, middle], [1, 0], color=colours[j], linewidth=1.6, zorder=1)
            ax.scatter(h, 1, s=230, color=colours[j])
            ax.text(h, 1, h, **place)
        ax.scatter(middle, 0, s=230, marker="s", color=colours[j])
        ax.text(middle, 0, j, **place)
    ax.set(xlim=(-0.6, heads - 0.4), ylim=(-0.3, 1.3), title=title)
    ax.set_axis_off()


fig, axes = plt.subplots(1, 3, figsize=(9, 2), layout="constrained")
draw_groups(axes[0], 8, 8, "MHA: K = 8")
draw_groups(axes[1], 8, 4, "GQA: K = 4 (PaliGemma 2, 3B)")
draw_groups(axes[2], 8, 1, "MQA: K = 1 (PaliGemma, 3B)")
save_figure(fig, "10_query_groups")

# %% [markdown]
# Circles are the $H = 8$ query heads; squares are the $K$ key/value heads, which are what has to
# be stored. A **group** is the $G = H / K$ query heads that share a square.
#
# All three are one design with one number changed. MHA is $G = 1$, MQA is $G = H$. So we need one
# function and one class, not three.

# %% [markdown]
# ## By hand
#
# Three tokens of width 4, two query heads, **one** key/value head. To keep the arithmetic in whole
# numbers we choose the projections ourselves: head 0 asks with the token as it is, head 1 with its
# channels in reverse; the key is twice the token, the value is the token. (No rotation here;
# [lesson 09](09_rope.ipynb) did that.)

# %%
x = torch.tensor([[1.0, 0, 0, 1], [0, 2, 0, 0], [1, 0, 1, 0]])  # (L, D) = (3, 4)
queries = torch.stack([x, x.flip(-1)])  # (H, L, Dh) = (2, 3, 4)
keys, values = 2 * x, x  # (S, Dh): one head, shared by both
queries

# %% [markdown]
# A **score** is query · key $/ \sqrt{D_h}$, and $\sqrt 4 = 2$ cancels the 2 in the keys. Check one
# with a pencil: token 0 asks head 0 about token 2, $(1,0,0,1)\cdot(2,0,2,0)/2 = 1$.

# %%
scores = queries @ keys.T / 4**0.5  # (H, L, S) = (2, 3, 3)
for h in range(2):
    print(f"head {h}:", scores[h].int().tolist())

# %% [markdown]
# Both heads read the *same* three keys, yet their scores differ: token 1 finds itself in head 0
# (score 4) and token 2 in head 1 (score 2). What makes heads different is the question. That is
# why sharing the keys costs so little.
#
# Softmax turns each row into weights that sum to 1, and the weights average the values.

# %%
weights = scores.softmax(dim=-1)  # (H, L, S)
out = weights @ values  # (H, L, Dh)
print("token 1 looks, head 0:", [round(w, 3) for w in weights[0, 1].tolist()])
print("token 1 looks, head 1:", [round(w, 3) for w in weights[1, 1].tolist()])
print("token 1 gets,  head 1:", [round(w, 3) for w in out[1, 1].tolist()])

# %% [markdown]
# ## As a loop
#
# With several key/value heads there is one thing to settle: who reads which? Neighbours go
# together. Query head $h$ reads key/value head $h \,//\, G$, dropping the remainder.

# %%
for kv_heads in (8, 4, 2, 1):
    group = 8 // kv_heads
    print(f"K = {kv_heads}:", [h // group for h in range(8)])

# %% [markdown]
# This order is a fact about the published weights: they were trained in it, and any other order
# would pair a query with keys it has never met.
#
# Now the plainest code that is right, one head of one example at a time. The test numbers stay for
# the rest of the lesson: 3 new tokens look at 5, and all sizes differ, so that a swapped axis
# cannot hide.


# %%
def attention_loop(q, k, v):
    """q: (B, H, L, Dh), k and v: (B, K, S, Dh); one head of one example at a time."""
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            scores = q[b, h] @ k[b, h // group].T / q.shape[-1] ** 0.5  # (L, S)
            out[b, h] = scores.softmax(dim=-1) @ v[b, h // group]  # (L, Dh)
    return out


B, H, K, L, S, Dh = 2, 8, 4, 3, 5, 16
q = torch.randn(B, H, L, Dh)
k, v = torch.randn(2, B, K, S, Dh)
slow = attention_loop(q, k, v)
print(tuple(slow.shape))

# %% [markdown]
# ## Vectorised, first try: copy the keys
#
# Batched attention wants as many key heads as query heads. The usual answer is to copy each
# key/value head $G$ times, side by side: `repeat_interleave`.


# %%
def attention_copied(q, k, v):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # (B, H, S, Dh)
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)  # (B, H, L, S)
    return weights @ v  # (B, H, L, Dh)


torch.testing.assert_close(attention_copied(q, k, v), slow)
print("kv head copied for each query head:", torch.arange(K).repeat_interleave(H // K).tolist())
print(f"bytes stored: {k.nbytes + v.nbytes}, written as copies: {(k.nbytes + v.nbytes) * H // K}")

# %% [markdown]
# Right, and it throws away what we came for. The *stored* keys are few, but at every step a copy
# of full multi-head size is written and then read again.

# %% [markdown]
# ## Vectorised, our form: lay the group along the sequence
#
# In $QK^\top$ no row of $Q$ cares which rows stand above it. So stack the rows of a whole group:
# $G$ heads of $L$ rows become one tall matrix of $G \cdot L$ queries. To the keys it is just a
# longer list of questions, and nothing is copied.
#
# Here the queries already lie in memory in this order, so the change is a new way to count the same
# numbers. In the module they come from a `transpose`, and `reshape` has to copy them: $L$ rows, the
# new tokens only. The keys and values, of *all* tokens, are never copied.

# %%
tall = q.reshape(B, K, H // K * L, Dh)  # (B, K, G·L, Dh)
print("same memory:", tall.data_ptr() == q.data_ptr())
turned = torch.randn(B, L, H, Dh).transpose(1, 2)  # as in the module
assert turned.reshape(B, K, H // K * L, Dh).data_ptr() != turned.data_ptr()
rows = [f"head {h}, t{t}" for h in range(H) for t in range(L)]
for j in range(K):
    print(f"kv head {j}:", *rows[j * 6 : j * 6 + 6], sep=" | ")

weights = (tall @ k.transpose(-1, -2) / Dh**0.5).softmax(dim=-1)  # (B, K, G·L, S)
fast = (weights @ v).reshape(B, H, L, Dh)  # (B, H, L, Dh)
torch.testing.assert_close(fast, slow)

# %% [markdown]
# ### The mask goes along
#
# A **mask** says who may look at whom: `bool`, one row for each query, one column for each key,
# **True = may look**. When the queries of a group are stacked, the mask's rows are stacked too,
# once for each head of the group. Here $L = 3$ new tokens after 2 old ones, with $G = 2$.

# %%
mask = torch.ones(L, S, dtype=torch.bool).tril(diagonal=S - L)  # (L, S)
stacked = mask.repeat(2, 1)  # (G·L, S)
fig = show_heatmap(stacked, "dark: True, may look", rows=rows[:6], columns=range(S))
fig.axes[0].set_xlabel("key")
fig

# %% [markdown]
# ## The functions
#
# First the one condition: $K$ has to divide $H$, or the groups would be unequal. The message says
# what was wrong, what was expected and what to do.


# %%
#| export
def group_size(num_attention_heads: int, num_key_value_heads: int) -> int:
    """Query heads for each key/value head, G = H / K.

    Raises:
        ValueError: K does not divide H.
    """
    if num_key_value_heads < 1 or num_attention_heads % num_key_value_heads:
        raise ValueError(
            f"num_key_value_heads {num_key_value_heads} does not divide num_attention_heads "
            f"{num_attention_heads}: groups must be of equal size, choose a divisor"
        )
    return num_attention_heads // num_key_value_heads


# %% [markdown]
# Then attention itself. The three lines of arithmetic become one call of PyTorch's
# `scaled_dot_product_attention` (SDPA), which never stores the whole matrix of scores. It divides
# by $\sqrt{D_h}$ on its own and takes our mask as it is.


# %%
#| export
def grouped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(q·kᵀ / √Dh)·v, query heads sharing key/value heads in groups of H / K.

    The query heads of a group are laid along the sequence axis, so that each key and value
    is read once for the whole group instead of being copied for each head.

    Args:
        q: `float[B, H, L, Dh]`.
        k, v: `float[B, K, S, Dh]`; query head h uses key/value head h // (H / K).
        mask: `bool[B, 1, L, S]`, True where a query may look; None: everywhere.

    Returns:
        `float[B, H, L, Dh]`; zeros for a query that may look nowhere.

    Raises:
        ValueError: K does not divide H.

    Source: Shazeer 2019 (MQA); Ainslie et al. 2023 (GQA).
    """
    batch, heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    group = group_size(heads, kv_heads)
    q = q.reshape(batch, kv_heads, group * length, head_dim)  # (B, K, G·L, Dh)
    if mask is not None:
        mask = mask.repeat(1, 1, group, 1)  # (B, 1, G·L, S): the same rows for each head of a group
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, K, G·L, Dh)
    return out.reshape(batch, heads, length, head_dim)


# %% [markdown]
# Three checks. Against the loop, for every way to group eight heads. Against PyTorch's own groups
# (`enable_gqa=True`) under a random mask. And what a mask promises: a key that nobody may look at
# can hold anything.

# %%
mask = torch.rand(B, 1, L, S) < 0.7
mask[..., 0], mask[..., -1] = True, False  # all see the first key, nobody the last
for kv_heads in (8, 4, 2, 1):
    k_few, v_few = torch.randn(2, B, kv_heads, S, Dh)
    slow = attention_loop(q, k_few, v_few)
    torch.testing.assert_close(grouped_attention(q, k_few, v_few), slow)
    native = F.scaled_dot_product_attention(q, k_few, v_few, attn_mask=mask, enable_gqa=True)
    masked = grouped_attention(q, k_few, v_few, mask)
    torch.testing.assert_close(masked, native)
    v_few[:, :, -1] = 1e6
    assert torch.equal(grouped_attention(q, k_few, v_few, mask), masked)
print("K = 8, 4, 2, 1: equal to the loop and to PyTorch; the hidden key has no influence")

# %% [markdown]
# ## The module
#
# Around the function stand four projections. Only `k_proj` and `v_proj` shrink with $K$; `q_proj`
# and `o_proj` stay. Note that $H \cdot D_h$ need not equal the width $D$.
#
# The order inside: project and cut into heads, rotate queries and keys, attend, join the heads.


# %%
#| export
class GroupedQueryAttention(nn.Module):
    """Rotary self-attention in which H query heads share K key/value heads, H / K each.

    Args:
        hidden_size, num_attention_heads, num_key_value_heads, head_dim: int D, H, K and Dh.
        layer_idx: which layer of a cache this one owns.

    Raises:
        ValueError: K does not divide H.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        layer_idx: int = 0,
    ):
        super().__init__()
        group_size(num_attention_heads, num_key_value_heads)  # raises where the groups are unequal
        self.head_dim, self.layer_idx = head_dim, layer_idx
        self.q_proj = nn.Linear(hidden_size, num_attention_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_attention_heads * head_dim, hidden_size, bias=False)

    def forward(self, x, cos, sin, mask=None):
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, L, Dh)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, K, L, Dh)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, K, L, Dh)
        out = grouped_attention(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, L, D)


# %% [markdown]
# Shapes first: width 24, four query heads of 8, two key/value heads. $4 \cdot 8 = 32 \ne 24$, on
# purpose.

# %%
layer = GroupedQueryAttention(24, 4, 2, 8)
for name, weight in layer.named_parameters():
    print(f"{name:15}", tuple(weight.shape))
hidden = torch.randn(2, 6, 24)
cos, sin = RotaryEmbedding(8)(torch.arange(6).expand(2, -1))
causal = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
at_once = layer(hidden, cos, sin, causal)
print("out            ", tuple(at_once.shape))

# %% [markdown]
# ### Room for what was seen before
#
# When tokens come one by one, the new one has to see the keys and values of those before it.
# Somebody must keep them: a **cache**, which [lesson 11](11_kv_cache.ipynb) builds. Here we only
# leave room for it: anything with `update(layer_idx, k, v)`, which takes the new keys and values
# and returns all of them so far. The middle gets a name of its own, `attend`, because
# [lesson 13](13_gemma2.ipynb) will exchange just that.


# %%
#| export
@add_to_class(GroupedQueryAttention)
def attend(
    self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """`grouped_attention`; a subclass may put another kind here. Gives `float[B, H, L, Dh]`."""
    return grouped_attention(q, k, v, mask)


@add_to_class(GroupedQueryAttention)
def forward(
    self,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    mask: torch.Tensor | None = None,
    cache=None,
) -> torch.Tensor:
    """Attend over `x` and whatever the cache already holds.

    Args:
        x: `float[B, L, D]`.
        cos, sin: rotation of the L positions, `float32[B, 1, L, Dh]`.
        mask: `bool[B, 1, L, S + L]`, True where a query may look; None: everywhere.
        cache: anything with `update(layer_idx, k, v) -> (k, v)`, such as `KVCache`.

    Returns:
        `float[B, L, D]`.
    """
    q = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, L, Dh)
    k = self.k_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, K, L, Dh)
    v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, K, L, Dh)
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    if cache is not None:
        k, v = cache.update(self.layer_idx, k, v)  # (B, K, S + L, Dh)
    out = self.attend(q, k, v, mask)  # (B, H, L, Dh)
    return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, L, D)


# %% [markdown]
# The plainest cache is a list that grows. One token at a time has to give the same as all tokens at
# once under a **causal** mask (nobody looks ahead). No mask is needed then: what comes later is not
# in the list yet.


# %%
class Growing:
    def __init__(self):
        self.keys, self.values = [], []

    def update(self, layer_idx, k, v):
        self.keys.append(k)
        self.values.append(v)
        return torch.cat(self.keys, dim=2), torch.cat(self.values, dim=2)


cache, one_by_one = Growing(), []
for t in range(6):
    here = slice(t, t + 1)
    one_by_one.append(layer(hidden[:, here], cos[:, :, here], sin[:, :, here], cache=cache))
torch.testing.assert_close(torch.cat(one_by_one, dim=1), at_once)
print("six calls of one token: equal to one call of six")

# %% [markdown]
# ## Against the reference
#
# The file holds weights, inputs and outputs of `GemmaAttention` from transformers, for the three
# kinds (four query heads; 4, 2 and 1 key/value heads), with a mask and with positions that do not
# start at 0. A test recomputes it.

# %%
reference = load_file("reference/grouped_query_attention.safetensors")
cos, sin = RotaryEmbedding(8)(reference["positions"])
for kind, kv_heads in (("mha", 4), ("gqa", 2), ("mqa", 1)):
    layer = GroupedQueryAttention(24, 4, kv_heads, 8)
    prefix = f"{kind}.weights."
    own = {name[len(prefix) :]: t for name, t in reference.items() if name.startswith(prefix)}
    layer.load_state_dict(own)
    out = layer(reference["x"], cos, sin, reference["mask"])
    gap = (out - reference[f"{kind}.out"]).abs().max().item()
    assert gap <= 1e-5
    print(f"{kind}: largest difference {gap:.1e}")

# %% [markdown]
# ## See it
#
# Eight heads over six words, two key/value heads. A word's vector is random but the same at each
# occurrence; the layer is untrained and its queries are scaled up so that the patterns can be
# seen.

# %%
words = "the cat saw the other cat".split()
vectors = dict(zip(words, torch.randn(len(words), 32)))
hidden = torch.stack([vectors[word] for word in words])[None]  # (1, 6, 32)
layer = GroupedQueryAttention(32, 8, 2, 16)
cos, sin = RotaryEmbedding(16)(torch.arange(6)[None])
q_words, k_words = (
    apply_rope(p(hidden).unflatten(-1, (-1, 16)).transpose(1, 2), cos, sin)
    for p in (layer.q_proj, layer.k_proj)
)
tall = 8 * q_words.reshape(1, 2, 4 * 6, 16)
scores = (tall @ k_words.transpose(-1, -2) / 4).reshape(1, 8, 6, 6)
looks = scores.masked_fill(~causal, float("-inf")).softmax(dim=-1)[0].detach()

fig, axes = plt.subplots(2, 4, figsize=(8.6, 4.9), layout="constrained")
for h, ax in enumerate(axes.flat):
    rows = words if h % 4 == 0 else None
    show_heatmap(looks[h], f"query head {h} → kv head {h // 4}", rows=rows, ax=ax)
    ax.title.set(fontsize=9, color=CYCLE[h // 4])
    if h >= 4:
        ax.set_xticks(range(6), words, rotation=90)
save_figure(fig, "10_heads")

# %% [markdown]
# What to notice: the four maps of one row were made from the *same* keys, and still no two agree.
# Each row of a map sums to 1, and the upper right is empty because no word looks ahead.
#
# The two rows of maps differ in their keys as well. That extra freedom is what GQA buys over MQA.

# %% [markdown]
# ## At full size
#
# The language model of PaliGemma 3B has 18 layers of width 2048 and eight heads of width 256, and
# was trained with $K = 1$. What would the others cost? Layers on the `meta` device have shapes and
# no numbers, so counting is free.
#
# For one new token, each head multiplies its query with $S$ keys and its weights with $S$ values:
# $4 H D_h S$ operations a layer, whatever $K$ is. $S = 4104$ is a picture at 896 × 896 and a
# prompt.

# %%
LAYERS, D, H, Dh, S, BYTES = 18, 2048, 8, 256, 4104, 2  # bfloat16: 2 bytes a number
KINDS = {"MHA": 8, "GQA": 4, "MQA": 1}
operations = LAYERS * 4 * H * Dh * S
print("      parameters   cache a token   read a token   operations   operations a byte")
for kind, kv_heads in KINDS.items():
    with torch.device("meta"):
        layer = GroupedQueryAttention(D, H, kv_heads, Dh)
    parameters = LAYERS * sum(p.numel() for p in layer.parameters())
    token = LAYERS * 2 * kv_heads * Dh * BYTES  # a key and a value in every layer
    print(
        f"{kind} {parameters / 1e6:9.1f} M {token / 1024:11.0f} KiB {token * S / 1e6:11.0f} MB"
        f" {operations / 1e9:10.2f} G {operations / (token * S):14.0f}"
    )

# %% [markdown]
# Sharing saves no arithmetic; it saves reading. In bfloat16, operations per byte come to exactly
# $G$: each number that arrives is used by the $G$ heads of its group. A processor can do tens of
# operations in the time it reads one byte, so with $G = 1$ it mostly waits.
#
# With several users at once the weights are read once for all, but each has a cache of their own.

# %%
WEIGHT_GB = 2_508_662_784 * BYTES / 1e9  # the language model (lesson 12 counts it), read each step
users = range(65)
fig, ax = plt.subplots(figsize=(6.4, 3.1), layout="constrained")
for (kind, kv_heads), colour in zip(KINDS.items(), CYCLE):
    cache_gb = LAYERS * 2 * kv_heads * Dh * BYTES * S / 1e9
    total = [WEIGHT_GB + n * cache_gb for n in users]
    ax.plot(users, total, color=colour)
    ax.text(65, total[-1], f"{kind}, K = {kv_heads}", color=colour, va="center")
ax.axhline(WEIGHT_GB, color=COLOURS["muted"], linestyle=":", linewidth=1)
ax.text(1, WEIGHT_GB - 2.6, "weights alone", color=COLOURS["muted"], fontsize=8)
ax.set(xlim=(0, 64), ylim=(0, None), xlabel="answers being written at once (4,104 tokens each)")
ax.set(ylabel="GB read for one step")
save_figure(fig, "10_bytes_read")

# %% [markdown]
# One user hardly notices; the weights dominate. A busy server does: there the cache decides how
# many answers fit and how fast they come.
#
# And on this machine? One layer, one new token, 4,104 stored ones, float32: the copying form,
# PyTorch's `enable_gqa`, and ours.


# %% tags=["nbval-ignore-output"]
def best_ms(function, *args, repeats=7, **kwargs):
    """The fastest of some runs, in milliseconds; the first one warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function(*args, **kwargs)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times[1:])


print("        copied   enable_gqa     grouped")
for kind, kv_heads in KINDS.items():
    q_one = torch.randn(1, H, 1, Dh)
    k_all, v_all = torch.randn(2, 1, kv_heads, S, Dh)
    copied = best_ms(attention_copied, q_one, k_all, v_all)
    native = best_ms(F.scaled_dot_product_attention, q_one, k_all, v_all, enable_gqa=True)
    ours = best_ms(grouped_attention, q_one, k_all, v_all)
    print(f"{kind}  {copied:6.2f} ms   {native:6.2f} ms  {ours:6.2f} ms")

# %% [markdown]
# The copying form takes about the same time for all three: it always moves a full multi-head set,
# out and back. Ours gets faster as $K$ falls, because it moves only what is stored.

# %% [markdown]
# ## A bug people really make
#
# A colleague writes the copying form and tests it on two models. PaliGemma: perfect. An old
# multi-head model: perfect. Then PaliGemma 2 arrives. It loads, the shapes fit, nothing is raised,
# and it answers fluent nonsense. Here is their function against the loop:


# %%
def attention_colleague(q, k, v):
    group = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1))


for kv_heads in (8, 4, 1):
    k_few, v_few = torch.randn(2, B, kv_heads, 5, 16)
    gap = (attention_colleague(q, k_few, v_few) - attention_loop(q, k_few, v_few)).abs().max()
    print(f"K = {kv_heads}: largest difference {gap:.1f}")

# %% [markdown]
# Wrong only between the extremes. Before you read on: what could be right for $K = 8$ and $K = 1$
# and wrong for $K = 4$?
#
# A probe finds it. Fill the values of key/value head $j$ with the number $j$. Any average of them
# is $j$, so the output *is* the head that was read.


# %%
def heads_read(attend, heads=8, kv_heads=4):
    q, k = torch.randn(1, heads, 1, 16), torch.randn(1, kv_heads, 5, 16)
    v = torch.arange(float(kv_heads)).view(1, -1, 1, 1).expand_as(k)
    return attend(q, k, v)[0, :, 0, 0].round().int().tolist()


print("loop:     ", heads_read(attention_loop))
print("colleague:", heads_read(attention_colleague))

# %% [markdown]
# `repeat` lays whole copies end to end: 0 1 2 3 0 1 2 3. `repeat_interleave` copies each head in
# place: 0 0 1 1 2 2 3 3. With $K = H$ there is one copy and with $K = 1$ one head, so both orders
# are the same.
#
# The lesson: test the middle case, with sizes that all differ, and with values that carry their
# own name.

# %% [markdown]
# ### A second one, which sleeps
#
# Our scale is $1/\sqrt{D_h}$, with $D_h$ from the tensor's last axis. Some code takes `hidden_size //
# num_attention_heads` instead. Is that the same? The last column is what each model was trained with.

# %%
trained = {  # D, H, Dh, the number under the root
    "PaliGemma 3B": (2048, 8, 256, 256),
    "PaliGemma 2 3B": (2304, 8, 256, 256),
    "PaliGemma 2 10B": (3584, 16, 256, 256),
    "PaliGemma 2 28B": (4608, 32, 128, 144),
}
print("                 D // H   Dh   trained with")
for name, (width, heads, head_dim, scalar) in trained.items():
    print(f"{name:15} {width // heads:7} {head_dim:5} {scalar:8}")
right = [[d // h == scalar, dh == scalar] for d, h, dh, scalar in trained.values()]
assert right == [[True, True], [False, True], [False, True], [True, False]]

# %% [markdown]
# In PaliGemma 3B the two agree by chance and the bug sleeps. Then `D // H` is a few per cent off in
# two models, and the head's width in the third: attention a little too soft or too sharp, in every
# layer, and no shape complains. So the number is a choice of its own, read from the config:
# [lesson 13](13_gemma2.ipynb). For the model of this part, $D_h$ is right.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): who reads whom?
#
# A model has six query heads and two key/value heads. Without running anything: which key/value
# head does each query head read, and how many times smaller is its cache than with multi-head
# attention?

# %% tags=["exercise"]
reads = None  # a list of six numbers
times_smaller = None  # one number


# %% tags=["check"]
def test_1(reads, times_smaller):
    assert reads is not None and len(reads) == 6, "one key/value head for each of six query heads"
    assert list(reads) != [0, 1, 0, 1, 0, 1], "this is the order of `repeat`: neighbours share"
    assert list(reads) == heads_read(attention_loop, 6, 2), "query head h reads h // (H / K)"
    assert times_smaller == 6 // 2, "the cache holds K heads instead of H"


check(test_1, reads, times_smaller)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A group has $6 / 2$ members, and the members are neighbours.
#
# </details>

# %% tags=["solution"]
reads = [0, 0, 0, 1, 1, 1]
times_smaller = 3
check(test_1, reads, times_smaller)

# %% [markdown]
# ### Exercise 2 (break): write the check that exposes them
#
# Below, `check` runs your `is_right` on the loop and on three wrong versions: grouped with
# `repeat`, without the scale, and with keys and values swapped. Return True for a right `attend(q,
# k, v)`, False for a wrong one. Choose the shapes and the numbers yourself.


# %% tags=["exercise"]
def is_right(attend):
    return None  # call attend on tensors of your choice


# %% tags=["check"]
def test_2(is_right):
    right = {"the loop": attention_loop, "grouped_attention": grouped_attention}
    wrong = {
        "grouped with `repeat`": attention_colleague,
        "no scale": lambda q, k, v: attention_loop(q * q.shape[-1] ** 0.5, k, v),
        "keys and values swapped": lambda q, k, v: attention_loop(q, v, k),
    }
    for name, attend in right.items():
        assert is_right(attend) is True, f"rejects what is right: {name}"
    for name, attend in wrong.items():
        assert is_right(attend) is False, f"lets this one through: {name}"


check(test_2, is_right)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Random q, k and v with 1 < K < H, compared with `attention_copied` by `torch.allclose`, which
# returns True or False.
#
# </details>


# %% tags=["solution"]
def is_right(attend):
    q, k, v = torch.randn(2, 6, 3, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    return torch.allclose(attend(q, k, v), attention_copied(q, k, v), atol=1e-5)


check(test_2, is_right)

# %% [markdown]
# ### Exercise 3 (extend): turn a trained multi-head layer into a grouped one
#
# Ainslie et al. start GQA from an MHA checkpoint: the key heads of a group are replaced by their
# *mean*, then training goes on a little. Write it for one weight of shape $(H \cdot D_h, D)$; the
# result is $(K \cdot D_h, D)$.


# %% tags=["exercise"]
def pool_heads(weight, kv_heads, head_dim):
    return None  # the mean over each group of neighbouring heads


# %% tags=["check"]
def test_3(pool_heads):
    weight = torch.arange(4.0).repeat_interleave(2)[:, None] * torch.ones(8, 3)  # head h holds h
    pooled = pool_heads(weight, 2, 2)
    assert pooled is not None and pooled.shape == (4, 3), "expected shape (K·Dh, D)"
    assert pooled[:, 0].tolist() != [1, 1, 2, 2], "it averages heads 0 and 2: neighbours share"
    assert pooled[:, 0].tolist() == [0.5, 0.5, 2.5, 2.5], "expected the mean of heads 0, 1 and 2, 3"
    rows = torch.tensor([[1.0], [2], [3], [6]])  # two heads of two channels
    assert pool_heads(rows, 1, 2)[:, 0].tolist() == [2, 4], "channel i is averaged with channel i"
    assert torch.equal(pool_heads(rows, 2, 2), rows), "with K = H nothing changes"


check(test_3, pool_heads)

# %% [markdown]
# <details><summary>Hint</summary>
#
# View the rows as (K, G, Dh, D), average over the axis of the group, and flatten the first two
# axes that are left. `unflatten` takes −1 for the size it can work out.
#
# </details>


# %% tags=["solution"]
def pool_heads(weight, kv_heads, head_dim):
    grouped = weight.unflatten(0, (kv_heads, -1, head_dim))  # (K, G, Dh, D)
    return grouped.mean(dim=1).flatten(0, 1)  # (K·Dh, D)


check(test_3, pool_heads)

# %% [markdown]
# ## Summary
#
# - MHA, GQA and MQA are one design; $K$ says how many key/value heads are stored.
# - Query head $h$ reads key/value head $h \,//\, (H/K)$: neighbours share.
# - Sharing saves no arithmetic. It saves bytes, and bytes set the pace when tokens come one by
#   one.
# - A group's queries can stand in one tall matrix, so nothing is copied; the mask's rows stand
#   with them.
# - The middle case finds the bugs that both extremes hide.

# %% [markdown]
# ## Quiz
#
# **1.** PaliGemma 2 (3B) went from one key/value head to four. What became slower, and what did
# not?
#
# <details><summary>Answer</summary>
#
# The cache of a layer is four times larger, and so is what each new token reads of it. The number
# of operations on scores and values is the same for a given H, Dh and S. The two projections grew
# a little.
#
# </details>

# %% [markdown]
# **2.** SDPA has an `is_causal=True` switch. Why can `grouped_attention` not use it?
#
# <details><summary>Answer</summary>
#
# The switch takes row number for position. In the tall matrix, row $L$ is the *first* token of the
# group's second head, but it would be allowed to see $L + 1$ keys. The mask has to be repeated
# head by head.
#
# </details>

# %% [markdown]
# **3.** Why are keys and values shared, and not queries?
#
# <details><summary>Answer</summary>
#
# A query is used once, when its token arrives, and never again: there is nothing to store. Keys
# and values are read again for each later token. And the queries are what makes heads differ.
#
# </details>

# %% [markdown]
# ## References
#
# - Noam Shazeer, *Fast Transformer Decoding: One Write-Head is All You Need*, 2019, section 3
#   (MQA).
# - Joshua Ainslie et al., *GQA: Training Generalized Multi-Query Transformer Models from
#   Multi-Head Checkpoints*, 2023, section 2.
# - Reuben Pope et al., *Efficiently Scaling Transformer Inference*, 2022, section 3.3.
# - transformers: `models/gemma/modeling_gemma.py`, class `GemmaAttention`; gemma_pytorch:
#   `gemma/model.py`, class `GemmaAttention`.

# %% [markdown] tags=["navigation"]
# [← RoPE](09_rope.ipynb) | [contents](00_overview.ipynb) | [KV cache →](11_kv_cache.ipynb)
