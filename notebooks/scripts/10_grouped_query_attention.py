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
import matplotlib.pyplot as plt
from safetensors.torch import load_file

from paligemma.geglu import GeGLU
from paligemma.image_processor import ImageProcessor
from paligemma.plotting import show_attention, show_heatmap
from paligemma.rms_norm import RMSNorm
from paligemma.rope import RotaryEmbedding
from paligemma.siglip import SiglipVisionConfig, SiglipVisionModel
from paligemma.support.course import add_to_class, check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS, CYCLE
from paligemma.tokenizer import Tokenizer

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
# In **multi-head attention** (MHA) each head keeps its own keys and values: eight heads, eight sets
# to store and read. Must it? In **multi-query attention** (MQA) all heads share one set.
# **Grouped-query attention** (GQA) stands between: each key/value head serves a group of query
# heads. A line below means "reads".


# %% tags=["hide-input"]
def draw_groups(ax, heads, kv_heads, title):
    """Query heads above, key/value heads below, a line from each reader to what it reads."""
    group = heads // kv_heads
    place = {"ha": "center", "va": "center", "color": "white", "fontsize": 10}
    for j in range(kv_heads):
        middle = j * group + (group - 1) / 2
        colour = COLOURS["inside" if j % 2 else "language"]  # neighbouring groups differ
        for h in range(j * group, (j + 1) * group):
            ax.plot([h, middle], [1, 0], color=colour, linewidth=1.6, zorder=1)
            ax.scatter(h, 1, s=270, color=colour)
            ax.text(h, 1, h, **place)
        ax.scatter(middle, 0, s=270, marker="s", color=colour)
        ax.text(middle, 0, j, **place)
    ax.set(xlim=(-0.6, heads - 0.4), ylim=(-0.3, 1.3), title=title)
    ax.set_axis_off()


fig, axes = plt.subplots(1, 3, figsize=(9.5, 2), layout="constrained")
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
# channels in reverse; the key is twice the token, the value is the token. (No rotation here.)

# %%
x = torch.tensor([[1.0, 0, 0, 1], [0, 2, 0, 0], [1, 0, 1, 0]])  # [L, D] = [3, 4]
queries = torch.stack([x, x.flip(-1)])  # [H, L, Dh] = [2, 3, 4]
keys, values = 2 * x, x  # [S, Dh]: one head, shared by both
queries

# %% [markdown]
# A **score** is query · key $/ \sqrt{D_h}$, and $\sqrt 4 = 2$ cancels the 2 in the keys. Check one
# with a pencil: token 0 asks head 0 about token 2, $(1,0,0,1)\cdot(2,0,2,0)/2 = 1$.

# %%
scores = queries @ keys.T / 4**0.5  # [H, L, S] = [2, 3, 3]
for h in range(2):
    print(f"head {h}:", scores[h].int().tolist())
assert scores[0, 0, 2] == 1 and scores[:, 1].argmax(-1).tolist() == [1, 2]

# %% [markdown]
# Both heads read the *same* three keys, yet token 1 finds itself in head 0 (score 4) and token 2
# in head 1 (score 2). What makes heads different is the question, so they can differ even where
# they share their keys.
#
# Softmax turns each row into weights that sum to 1, and the weights average the values.

# %%
weights = scores.softmax(dim=-1)  # [H, L, S]
out = weights @ values  # [H, L, Dh]
for h in range(2):
    print(f"head {h}: token 1 looks", [round(w, 2) for w in weights[h, 1].tolist()], end=", ")
    print("gets", [round(w, 2) for w in out[h, 1].tolist()])

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
# Now the plainest code that is right, one head of one example at a time. 3 new tokens look at 5,
# and all sizes differ, so that a swapped axis cannot hide.


# %%
def attention_loop(q, k, v):
    """q: [B, H, L, Dh], k and v: [B, K, S, Dh]; one head of one example at a time."""
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            scores = q[b, h] @ k[b, h // group].T / q.shape[-1] ** 0.5  # [L, S]
            out[b, h] = scores.softmax(dim=-1) @ v[b, h // group]  # [L, Dh]
    return out


B, H, K, L, S, Dh = 2, 8, 4, 3, 5, 16
q = torch.randn(B, H, L, Dh)
k, v = torch.randn(2, B, K, S, Dh)
slow = attention_loop(q, k, v)
print(tuple(slow.shape))

# %% [markdown]
# ## Vectorised, first try: copy the keys
#
# One product for all heads wants as many key heads as query heads. The usual answer is to copy each
# key/value head $G$ times, side by side: `repeat_interleave`.


# %%
def attention_copied(q, k, v):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # [B, H, S, Dh]
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)  # [B, H, L, S]
    return weights @ v  # [B, H, L, Dh]


torch.testing.assert_close(attention_copied(q, k, v), slow)
print("key/value head behind each query head:", torch.arange(K).repeat_interleave(2).tolist())
print(f"stored: {k.nbytes + v.nbytes:,} bytes, copies: {(k.nbytes + v.nbytes) * H // K:,} bytes")

# %% [markdown]
# Right, and it throws away what we came for. The *stored* keys are few, but at every step a copy
# of full multi-head size is written and then read again.

# %% [markdown]
# ## Vectorised, our form: lay the group along the sequence
#
# In $QK^\top$ no row of $Q$ cares which rows stand above it. So stack the rows of a whole group:
# $G$ heads of $L$ rows become one tall matrix of $G \cdot L$ queries. To the keys it is just a
# longer list of questions.

# %%
tall = q.reshape(B, K, H // K * L, Dh)  # [B, K, G·L, Dh]
rows = [f"head {h}, t{t}" for h in range(H) for t in range(L)]
for j in range(K):
    print(f"kv head {j}:", *rows[j * 6 : j * 6 + 6], sep=" | ")

# %% [markdown]
# The keys and values stay as they are, and the three lines of attention are the ones we know:

# %%
weights = (tall @ k.transpose(-1, -2) / Dh**0.5).softmax(dim=-1)  # [B, K, G·L, S]
fast = (weights @ v).reshape(B, H, L, Dh)
torch.testing.assert_close(fast, slow)

# %% [markdown]
# Is nothing copied at all? Here the queries already lie in memory in this order, and `reshape` only
# counts the same numbers in a new way. In a model they come out of a `transpose`, and `reshape`
# copies them: $L$ rows, the new tokens only. Keys and values, of *all* tokens, are never copied.

# %%
turned = torch.randn(B, L, H, Dh).transpose(1, 2)  # as in a model
for name, t in (("q", q), ("turned", turned)):
    same = t.reshape(B, K, H // K * L, Dh).data_ptr() == t.data_ptr()
    print(f"{name}: {'same memory' if same else 'copied'}")

# %% [markdown]
# ### The mask goes along
#
# A **mask** says who may look at whom: `bool`, one row for each query, one column for each key,
# **True = may look**. The usual one for text is the **causal mask**: a position sees itself and
# earlier ones. When the queries of a group are stacked, the mask's rows are stacked too, once for
# each head. Here $L = 3$ new tokens after 2 old ones, with $G = 2$.

# %%
mask = torch.ones(L, S, dtype=torch.bool).tril(diagonal=S - L)  # [L, S]
stacked = mask.repeat(2, 1)  # [G·L, S]

# %% tags=["hide-input"]
fig = show_heatmap(stacked, "dark: True, may look", rows=rows[:6], columns=range(S))
fig.axes[0].set_xlabel("key")
fig

# %% [markdown]
# ## The functions
#
# $K$ has to divide $H$, or the groups would be unequal. That check gets a name, for the message's
# sake:


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
# Then attention itself. The lines of arithmetic become one call of PyTorch's
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
    q = q.reshape(batch, kv_heads, group * length, head_dim)  # [B, K, G·L, Dh]
    if mask is not None:
        mask = mask.repeat(1, 1, group, 1)  # [B, 1, G·L, S]: the same rows for each head of a group
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, K, G·L, Dh]
    return out.reshape(batch, heads, length, head_dim)


# %% [markdown]
# Two checks, for every way to group eight heads: against the loop, and against PyTorch's own
# groups (`enable_gqa=True`) under a random mask.

# %%
random_mask = torch.rand(B, 1, L, S) < 0.7
random_mask[..., 0] = True  # everyone sees the first key
for kv_heads in (8, 4, 2, 1):
    k, v = torch.randn(2, B, kv_heads, S, Dh)
    torch.testing.assert_close(grouped_attention(q, k, v), attention_loop(q, k, v))
    torch.testing.assert_close(
        grouped_attention(q, k, v, random_mask),
        F.scaled_dot_product_attention(q, k, v, attn_mask=random_mask, enable_gqa=True),
    )
print("K = 8, 4, 2, 1: equal to the loop and to PyTorch")

# %% [markdown]
# ## The module
#
# Around the function stand four projections. Only `k_proj` and `v_proj` shrink with $K$; `q_proj`
# and `o_proj` stay. A head has a width of its own: $H \cdot D_h$ need not equal the width $D$ of
# the stream. (`layer_idx` is for later.)


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


# %% [markdown]
# The order inside: project and cut into heads, rotate queries and keys, attend, join the heads.


# %%
#| export
@add_to_class(GroupedQueryAttention)
def forward(self, x, cos, sin, mask=None):
    q = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, L, Dh]
    k = self.k_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, K, L, Dh]
    v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, K, L, Dh]
    out = grouped_attention(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, mask)
    return self.o_proj(out.transpose(1, 2).flatten(2))  # [B, L, D]


# %% [markdown]
# Width 24, four query heads of 8, two key/value heads: $4 \cdot 8 = 32 \ne 24$, on purpose.

# %%
layer = GroupedQueryAttention(24, 4, 2, 8)
for name, weight in layer.named_parameters():
    print(f"{name:15}", tuple(weight.shape))

# %%
hidden = torch.randn(2, 6, 24)
cos, sin = RotaryEmbedding(8)(torch.arange(6).expand(2, -1))
causal = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
at_once = layer(hidden, cos, sin, causal)
print("out            ", tuple(at_once.shape))

# %% [markdown]
# ### Room for what was seen before
#
# When tokens come one by one, the new one has to see the keys and values of those before it. So
# somebody keeps them in two lists. No mask is needed then: what comes later is not in the list
# yet. Compare with six tokens at once under the causal mask:

# %%
q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
keys, values, found = [], [], []
for t in range(6):
    keys.append(k[:, :, t : t + 1])
    values.append(v[:, :, t : t + 1])
    now = q[:, :, t : t + 1]  # [B, H, 1, Dh]
    found.append(grouped_attention(now, torch.cat(keys, dim=2), torch.cat(values, dim=2)))
    print(f"token {t}: {now.shape[2]} query, {len(keys)} keys", end="; ")
torch.testing.assert_close(torch.cat(found, dim=2), grouped_attention(q, k, v, causal))

# %% [markdown]
# In the layer, the two lists belong to a **cache**, anything with a method `update(layer_idx, k, v)`
# that takes the new keys and values and returns all of them so far. ([Lesson 11](11_kv_cache.ipynb)
# builds one.) The middle gets a name of its own, `attend`, because [lesson 13](13_gemma2.ipynb)
# will exchange just that.


# %%
#| export
@add_to_class(GroupedQueryAttention)
def attend(
    self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """`grouped_attention`; a subclass may put another kind here. Gives `float[B, H, L, Dh]`."""
    return grouped_attention(q, k, v, mask)


# %%
#| export
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
        mask: `bool[B, 1, L, S]`, True where a query may look; None: everywhere. S counts
            what the cache holds and these L.
        cache: anything with `update(layer_idx, k, v) -> (k, v)`, such as `KVCache`.

    Returns:
        `float[B, L, D]`.
    """
    q = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, L, Dh]
    k = self.k_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, K, L, Dh]
    v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, K, L, Dh]
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    if cache is not None:
        k, v = cache.update(self.layer_idx, k, v)  # [B, K, S, Dh]: the earlier ones too
    out = self.attend(q, k, v, mask)  # [B, H, L, Dh]
    return self.o_proj(out.transpose(1, 2).flatten(2))  # [B, L, D]


# %% [markdown]
# The two lists again, now behind `update`: six calls of one token each give what one call gave.


# %%
class Lists:
    def __init__(self):
        self.keys, self.values = [], []

    def update(self, layer_idx, k, v):
        self.keys.append(k)
        self.values.append(v)
        return torch.cat(self.keys, dim=2), torch.cat(self.values, dim=2)


cache = Lists()
calls = zip(hidden.split(1, dim=1), cos.split(1, dim=2), sin.split(1, dim=2))
one_by_one = [layer(x, c, s, cache=cache) for x, c, s in calls]
torch.testing.assert_close(torch.cat(one_by_one, dim=1), at_once)

# %% [markdown]
# ## Against the reference
#
# The file holds weights, inputs and outputs of `GemmaAttention` from transformers, for the three
# kinds (four query heads; 4, 2 and 1 key/value heads), with a mask and with positions that do not
# start at 0. A test recomputes it.


# %%
def part(tensors, prefix):
    """The tensors whose names begin with `prefix`, under the rest of their names."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


reference = load_file("reference/grouped_query_attention.safetensors")
cos, sin = RotaryEmbedding(8)(reference["positions"])
for kind, kv_heads in (("mha", 4), ("gqa", 2), ("mqa", 1)):
    layer = GroupedQueryAttention(24, 4, kv_heads, 8)
    layer.load_state_dict(part(reference, f"{kind}.weights."))
    out = layer(reference["x"], cos, sin, reference["mask"])
    gap = (out - reference[f"{kind}.out"]).abs().max().item()
    assert gap <= 1e-5
    print(f"{kind}: largest difference {gap:.1e}")

# %% [markdown]
# ## See it: four questions to one set of keys
#
# The small PaliGemma that ships with this course has four query heads and *one* key head in each
# layer. Do the four see the same? Its weights are in a file. First the picture, through the vision
# tower of [lesson 05](05_siglip.ipynb) and one more matrix:

# %%
tiny = {n: t.float() for n, t in load_file("../paligemma/assets/tiny/model.safetensors").items()}
tower = SiglipVisionModel(SiglipVisionConfig(128, 512, 4, 4, image_size=112))
tower.load_state_dict(part(tiny, "vision_tower.vision_model."))
scene = sample_picture("scene")
seen = tower(ImageProcessor(112)(scene))  # [1, 64, 128]
seen = F.linear(seen, **part(tiny, "multi_modal_projector.linear."))

# %% [markdown]
# Behind it the question, and what the model has answered so far. It is about to say "dogs":

# %%
tokenizer = Tokenizer("../paligemma/assets/tiny/tokenizer.model")
ids = [tokenizer.bos_id, *tokenizer.encode("caption en"), tokenizer.newline_id]
ids += tokenizer.encode("a cat and two")
words = tiny["language_model.model.embed_tokens.weight"][ids] * 128**0.5  # [8, 128]
x = torch.cat((seen[0], words))[None].detach()  # [1, 72, 128]

# %% [markdown]
# Two layers, built of parts that you know: attention, then a GeGLU
# ([lesson 08](08_geglu.ipynb)), each on a normalised copy ([lesson 07](07_rms_norm.ipynb)) and each
# added to the stream. Picture and question (68 positions) see all of each other, the answer is
# causal.


# %%
def trained(name, module):
    module.load_state_dict(part(tiny, f"language_model.model.layers.{name}."))
    return module.requires_grad_(False)


cos, sin = RotaryEmbedding(32)(torch.arange(72)[None])
mask = torch.ones(1, 1, 72, 72, dtype=torch.bool).tril()
mask[..., :68] = True
for i in (0, 1):
    attention = trained(f"{i}.self_attn", GroupedQueryAttention(128, 4, 1, 32))
    x = x + attention(trained(f"{i}.input_layernorm", RMSNorm(128))(x), cos, sin, mask)
    h = trained(f"{i}.post_attention_layernorm", RMSNorm(128))(x)
    x = x + trained(f"{i}.mlp", GeGLU(128, 256))(h)

# %% [markdown]
# Now layer 2, by its four query heads: where do they look, from "a" (which must name the first
# animal) and from "two"?

# %%
attention = trained("2.self_attn", GroupedQueryAttention(128, 4, 1, 32))
h = trained("2.input_layernorm", RMSNorm(128))(x)
q = apply_rope(attention.q_proj(h).unflatten(-1, (4, 32)).transpose(1, 2), cos, sin)
k = apply_rope(attention.k_proj(h).unflatten(-1, (1, 32)).transpose(1, 2), cos, sin)
scores = (q @ k.transpose(-1, -2) / 32**0.5).masked_fill(~mask, float("-inf"))
looks = scores.softmax(dim=-1)[0]  # [H, L, S] = [4, 72, 72]

# %% tags=["hide-input"]
titles = [f"from “{word}”, head {h}" for word in ("a", "two") for h in range(4)]
maps = torch.cat([looks[:, 68, :64], looks[:, 71, :64]])
save_figure(show_attention(scene, maps, titles, columns=4), "10_heads.png")

# %% [markdown]
# How much weight falls on each animal? The 64 patches form a grid of 8 × 8; an animal's part of it
# is given by its first and last row and column.

# %%
grid = looks[:, [68, 71], :64].unflatten(-1, (8, 8))  # [H, "a" or "two", row, column]
cat = grid[:, :, 4:7, 0:3].sum((-1, -2))  # [H, 2]
upper, lower = grid[:, :, 2:4, 3:6].sum((-1, -2)), grid[:, :, 4:7, 5:8].sum((-1, -2))
for h in range(4):
    print(f"from “two”, head {h}: upper dog {upper[h, 1]:.2f}, lower dog {lower[h, 1]:.2f}")
assert cat[:, 0].min() > 0.9 and cat[:, 1].max() < 0.05
assert lower[0, 1] > 0.85 and upper[3, 1] > 0.85 and min(upper[2, 1], lower[2, 1]) > 0.3

# %% [markdown]
# What to notice: from "a", all four look at the cat and the patches around it. From "two", the cat
# is done with; no head gives it a twentieth. Head 0 looks at the lower dog, head 3 at the upper
# one, head 2 at both. There is only *one* key for each patch: four questions made four maps of it.

# %% [markdown]
# ## At full size
#
# The language model of PaliGemma 3B has 18 layers of width 2048 and eight heads of width 256, and
# was trained with $K = 1$. What would the others cost? Layers on the `meta` device have shapes and
# no numbers, so counting is free. For one new token, each head multiplies its query with $S$ keys
# and its weights with $S$ values: $4 H D_h S$ operations a layer, whatever $K$ is.

# %%
LAYERS, D, H, Dh, BYTES = 18, 2048, 8, 256, 2  # bfloat16: 2 bytes a number
S = 64 * 64 + 8  # a picture of 896 × 896 and a question
KINDS = {"MHA": 8, "GQA": 4, "MQA": 1}
parameters, kept = {}, {}
for kind, kv_heads in KINDS.items():
    with torch.device("meta"):
        layer = GroupedQueryAttention(D, H, kv_heads, Dh)
    parameters[kind] = LAYERS * sum(p.numel() for p in layer.parameters())
    kept[kind] = LAYERS * 2 * kv_heads * Dh * BYTES  # of a token: key and value in every layer

# %%
operations = LAYERS * 4 * H * Dh * S
print("      parameters   kept of a token   read for a token   operations   a byte")
for kind, kv_heads in KINDS.items():
    read = kept[kind] * S
    print(f"{kind} {parameters[kind] / 1e6:9.1f} M {kept[kind]:11,} bytes", end="")
    print(f"{read / 1e6:16.0f} MB{operations / 1e9:11.2f} G {operations / read:8.0f}")
    assert operations / read == H / kv_heads

# %% [markdown]
# Sharing saves no arithmetic; it saves reading. In bfloat16, operations per byte come to exactly
# $G$: each number that arrives is used by the $G$ heads of its group.
#
# With several users at once the weights are read once for all, but each has keys and values of
# their own.

# %%
WEIGHTS = 2_508_662_784 * BYTES / 1e9  # GB of the language model, read in each step
users = torch.arange(65)
read = {kind: WEIGHTS + users * kept[kind] * S / 1e9 for kind in KINDS}
for kind in KINDS:
    print(f"{kind}: {read[kind][1]:.1f} GB for one user, {read[kind][64]:.1f} GB for 64")
assert read["MHA"][1] < 1.13 * WEIGHTS and read["MHA"][64] > 4 * read["MQA"][64]

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(6.4, 3.1), layout="constrained")
for (kind, gigabytes), colour in zip(read.items(), CYCLE[2:]):
    ax.plot(users, gigabytes, color=colour)
    ax.text(65, gigabytes[-1], f"{kind}, K = {KINDS[kind]}", color=colour, va="center")
ax.axhline(WEIGHTS, color=COLOURS["muted"], linestyle=":", linewidth=1)
ax.text(1, WEIGHTS - 3, "weights alone", color=COLOURS["inside"])
ax.set(xlim=(0, 64), ylim=(0, None), xlabel="answers being written at once (4,104 tokens each)")
ax.set(ylabel="GB read for one step")
save_figure(fig, "10_bytes_read")

# %% [markdown]
# One user hardly notices: even with MHA an eighth more. A busy server does: with 64 answers at
# once, MHA reads more than four times as much as MQA. There, what is kept decides how many answers
# fit and how fast they come ([lesson 18](18_generation.ipynb) measures it).

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


q = torch.randn(2, 8, 3, 16)
for kv_heads in (8, 4, 1):
    k, v = torch.randn(2, 2, kv_heads, 5, 16)
    gap = (attention_colleague(q, k, v) - attention_loop(q, k, v)).abs().max().item()
    print(f"K = {kv_heads}: largest difference {gap:.1f}")
    assert gap > 0.5 if kv_heads == 4 else gap < 1e-5

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
# `repeat` lays whole copies end to end; `repeat_interleave` copies each head in place. With $K = H$
# there is one copy and with $K = 1$ one head, so both orders are the same.
#
# The lesson: test the middle case, with sizes that all differ, and with values that carry their
# own name.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): what does sharing change?
#
# A model has six query heads and two key/value heads. Without running anything: which key/value
# head does each query head read? And compared with multi-head attention of six heads, how many
# times smaller are its stored keys and values, and how many times fewer operations do its scores
# take?

# %% tags=["exercise"]
reads = None  # a list of six numbers
times_smaller = None  # stored keys and values
times_fewer = None  # operations for the scores


# %% tags=["check"]
def test_1(reads, times_smaller, times_fewer):
    six = isinstance(reads, (list, tuple)) and len(reads) == 6
    assert six, "reads: give a list with one key/value head for each of six query heads"
    assert set(reads) <= {0, 1}, "there are two key/value heads, counted from 0"
    assert list(reads) != [0, 1] * 3, "this is the order of `repeat`: neighbours share"
    right = heads_read(attention_loop, 6, 2)
    assert list(reads) == right, "the groups must be of equal size, and neighbours share"
    assert times_smaller is not None, "times_smaller: compare how many heads are stored"
    assert times_smaller == 6 / 2, "times_smaller: which heads are stored, the circles or squares?"
    assert times_fewer is not None, "times_fewer: count the pairs of a query and a key"
    assert times_fewer == 6 / 6, "times_fewer: does any query head skip a key because it is shared?"


check(test_1, reads, times_smaller, times_fewer)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A group has $6 / 2$ members, and the members are neighbours. Each member still asks every key.
#
# </details>

# %% tags=["solution"]
reads = [0, 0, 0, 1, 1, 1]  # two groups of three neighbours
times_smaller = 3  # two heads are stored instead of six
times_fewer = 1  # every query head still meets every key: sharing saves no arithmetic
check(test_1, reads, times_smaller, times_fewer)

# %% [markdown]
# ### Exercise 2 (write): a group as an axis of its own
#
# Another way to copy nothing: view the queries as $[B, K, G, L, D_h]$ and multiply with
# `torch.einsum`. It names the axes of both factors and of the result: `einsum("ij,jk->ik", a, b)`
# is `a @ b`. Write it, with the mask `bool[B, 1, L, S]`, without SDPA and without copies of keys or
# values. (`@` makes some in secret, where one factor lacks an axis. The check looks.)


# %% tags=["exercise"]
def attention_by_axis(q, k, v, mask):
    return None  # [B, H, L, Dh]


# %% tags=["check"]
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    numbers = 0  # in the largest memory that any step fills

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.numbers = max(self.numbers, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_2(attend):
    q, k, v = torch.randn(2, 6, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    everywhere, causal = torch.ones(2, 1, 3, 5) > 0, (torch.ones(2, 1, 3, 5) > 0).tril(2)
    try:
        free, given = attend(q, k, v, everywhere), attend(q, k, v, causal)
        sums = attend(q, k, torch.ones_like(v), causal)
    except (RuntimeError, ValueError, IndexError) as error:
        raise AssertionError(f"the shapes don't fit: {str(error).splitlines()[0]}") from None
    assert free is not None and free.shape == q.shape, "return a tensor of the shape of q"
    same = lambda a, b: torch.allclose(a, b, atol=1e-5)
    turned = F.scaled_dot_product_attention(q, k, v, attn_mask=~causal, enable_gqa=True)
    polar = given.isfinite().all() and not same(given[:, :, 0], turned[:, :, 0])
    assert polar, "the mask is turned round: True means that a query may look"
    assert same(sums, torch.ones_like(q)), "a query's weights must sum to 1 over what it may see"
    spread = lambda t: t.repeat(1, 3, 1, 1)
    wrong = F.scaled_dot_product_attention(q, spread(k), spread(v))
    assert not same(free, wrong), "which query heads share? neighbours do"
    loud = F.scaled_dot_product_attention(q, k, v, scale=1, enable_gqa=True)
    assert not same(free, loud), "the scores are too large: something divides them first"
    assert same(free, attention_loop(q, k, v)), "without a mask it differs from the loop"
    assert not same(given, free), "the mask has no effect"
    right = F.scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=True)
    assert same(given, right), "a hidden key still gets weight"
    with Largest() as largest:
        attend(q, k, v, causal)
    assert largest.numbers < 3 * k.numel(), "right, but keys or values are copied for each head"


check(test_2, attention_by_axis)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `q.unflatten(1, (K, -1))` makes two axes of one. The queries then have five letters and the keys
# four; a letter that the result lacks is summed over. The mask needs one more axis too:
# `mask[:, :, None]`. `masked_fill(~mask, float("-inf"))` comes before the softmax.
#
# </details>


# %% tags=["solution"]
def attention_by_axis(q, k, v, mask):
    # the keys have no letter g: they are read for each member of the group, and stored once
    q = q.unflatten(1, (k.shape[1], -1))  # [B, K, G, L, Dh]
    scores = torch.einsum("bkgld,bksd->bkgls", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    out = torch.einsum("bkgls,bksd->bkgld", scores.softmax(dim=-1), v)
    return out.flatten(1, 2)  # [B, H, L, Dh]


check(test_2, attention_by_axis)

# %% [markdown]
# ### Exercise 3 (extend): turn a trained multi-head layer into a grouped one
#
# Ainslie et al. start GQA from a trained MHA model: the key heads of a group are replaced by their
# *mean*, then training goes on a little. Write it for one weight of shape $[H \cdot D_h, D]$; the
# result is $[K \cdot D_h, D]$.


# %% tags=["exercise"]
def pool_heads(weight, kv_heads, head_dim):
    return None  # the mean over each group of neighbouring heads


# %% tags=["check"]
def test_3(pool_heads):
    weight = torch.arange(4.0).repeat_interleave(2)[:, None] * torch.ones(8, 3)  # head h holds h
    try:
        pooled = pool_heads(weight, 2, 2)
    except (RuntimeError, ValueError, IndexError) as error:
        raise AssertionError(f"the shapes don't fit: {str(error).splitlines()[0]}") from None
    assert pooled is not None, "return the pooled weight"
    assert pooled.shape == (4, 3), f"expected K·Dh rows and D columns, not {list(pooled.shape)}"
    got = pooled[:, 0].tolist()
    assert got != [1, 1, 2, 2], "head 0 was averaged with head 2: neighbours share"
    assert got[0] != 1 or got[2] != 5, "the heads of a group were added: take their mean"
    assert got not in ([0, 0, 1, 1], [0, 0, 2, 2]), "a head was dropped: each has to count"
    rows = torch.tensor([[1.0], [2], [3], [6]])  # two heads of two channels
    pairs = pool_heads(rows, 1, 2)[:, 0].tolist()
    assert pairs == (rows[:2] + rows[2:])[:, 0].div(2).tolist(), (
        "average channel 0 of one head with channel 0 of the next, not with its own channel 1"
    )
    assert got == [0.5, 0.5, 2.5, 2.5], "not the means of heads 0 and 1, and of heads 2 and 3"
    assert torch.equal(pool_heads(rows, 2, 2), rows), "with K = H nothing may change"


check(test_3, pool_heads)

# %% [markdown]
# <details><summary>Hint</summary>
#
# View the rows as [K, G, Dh, D], average over the axis of the group, and flatten the first two
# axes that are left. `unflatten` takes −1 for the size it can work out.
#
# </details>


# %% tags=["solution"]
def pool_heads(weight, kv_heads, head_dim):
    # neighbouring heads lie together, so that one view brings each group to an axis of its own
    grouped = weight.unflatten(0, (kv_heads, -1, head_dim))  # [K, G, Dh, D]
    return grouped.mean(dim=1).flatten(0, 1)  # [K·Dh, D]


check(test_3, pool_heads)

# %% [markdown]
# ## Summary
#
# - MHA, GQA and MQA are one design; $K$ says how many key/value heads are stored.
# - Query head $h$ reads key/value head $h \,//\, (H/K)$: neighbours share.
# - Sharing saves no arithmetic, it saves bytes; and the queries alone make heads differ.
# - A group's queries can stand in one tall matrix, so no key is copied; the mask's rows stand with
#   them.
# - The middle case finds the bugs that both extremes hide.

# %% [markdown]
# ## Quiz
#
# **1.** PaliGemma 2 (3B) went from one key/value head to four. What became slower, and what did
# not?
#
# <details><summary>Answer</summary>
#
# What a layer keeps is four times larger, and so is what each new token reads of it. The number
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
