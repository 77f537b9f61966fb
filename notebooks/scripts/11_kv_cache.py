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
# [← Grouped-query attention](10_grouped_query_attention.ipynb) | [contents](00_overview.ipynb) | [Gemma →](12_gemma.ipynb)

# %% [markdown]
# # 11 · KV cache: why is the second token cheaper than the first?
#
# *45 minutes* · part II, Language
#
# **What you will be able to do**
#
# - say what a language model computes again for each new token, and why it need not;
# - write a cache that grows and one allocated once, and count what each copies;
# - say which masks allow a cache, and which order of calls;
# - compute how many bytes a picture, a question and an answer occupy.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("kv_cache")

# %% [markdown]
# ## Setup
#
# From lessons [07](07_rms_norm.ipynb) to [10](10_grouped_query_attention.ipynb) we take the parts of
# a language model. The cells that begin with `#| export` become the file
# [kv_cache.py](../paligemma/kv_cache.py); this is its opening.

# %%
#| export
"""Keys and values of the tokens already seen, kept in memory that is allocated once."""

import torch

# %% tags=["setup"]
import time

import matplotlib.pyplot as plt
from safetensors.torch import load_file
from torch import nn

from paligemma.geglu import GeGLU
from paligemma.grouped_query_attention import GroupedQueryAttention
from paligemma.image_processor import ImageProcessor
from paligemma.rms_norm import RMSNorm
from paligemma.rope import RotaryEmbedding
from paligemma.siglip import SiglipVisionConfig, SiglipVisionModel
from paligemma.support.course import add_to_class, check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS
from paligemma.tokenizer import Tokenizer

torch.manual_seed(11)
_ = torch.set_grad_enabled(False)  # we only answer here; nothing is trained

# %% [markdown]
# ## The problem
#
# A language model writes one token, appends it to the text, and reads the text again for the next
# one. Read again *from the start*? In step $t$ that means $t$ tokens through every layer, although
# only one is new. Each square below is one token that passes through all layers.


# %% tags=["hide-input"]
def draw_steps(ax, steps, cached, title):
    """Rows are steps, columns are tokens; a square is work, a dot is read from memory."""
    for step in range(steps):
        old = {"color": COLOURS["muted"], "marker": "." if cached else "s"}
        ax.scatter(range(step), [step] * step, s=40 if cached else 190, **old)
        ax.scatter(step, step, s=190, color=COLOURS["language"], marker="s")
    ax.set(xlim=(-0.7, steps - 0.3), ylim=(steps - 0.4, -0.6), title=title, aspect="equal")
    ax.set(xlabel="token", ylabel="step")


steps = 10
fig, axes = plt.subplots(1, 2, figsize=(7.4, 3.7), layout="constrained")
draw_steps(axes[0], steps, False, f"no cache: {steps * (steps + 1) // 2} tokens through the model")
draw_steps(axes[1], steps, True, f"with a cache: {steps}")
save_figure(fig, "11_triangle")

# %% [markdown]
# Orange is new in its step. Every grey square on the left was computed before, with the same
# result; on the right it has shrunk to a dot: numbers that are read instead of made.
#
# The triangle holds $n(n+1)/2$ squares for $n$ steps, its edge only $n$. This lesson takes the
# triangle away. First: is "with the same result" true, and what exactly has to be kept?

# %% [markdown]
# ## By hand
#
# Three tokens of width 2. The key is $xW_k$, the value $xW_v$, both chosen so that a pencil is
# enough: $W_k$ doubles the first channel, $W_v$ swaps the two.

# %%
x = torch.tensor([[1.0, 0], [0, 1], [1, 1]])  # [L, D]
W_k = torch.tensor([[2.0, 0], [0, 1]])
W_v = torch.tensor([[0.0, 1], [1, 0]])
for t in range(1, 4):
    print(f"step {t}: keys {(x[:t] @ W_k).tolist()}")

# %% [markdown]
# The first key was computed three times, the second twice. They come out the same because a row of
# $xW_k$ depends on its own token only.
#
# So keep a table, and in each step add one row. Then let the newest token ask (its query is the
# token itself), once with recomputed keys and once with the table:

# %%
table_k, table_v = torch.empty(0, 2), torch.empty(0, 2)
for t in range(3):
    new = x[t : t + 1]  # the only token of this step
    table_k, table_v = torch.cat((table_k, new @ W_k)), torch.cat((table_v, new @ W_v))
    kept = (new @ table_k.T / 2**0.5).softmax(dim=-1) @ table_v
    again = (new @ (x[: t + 1] @ W_k).T / 2**0.5).softmax(dim=-1) @ (x[: t + 1] @ W_v)
    assert torch.equal(kept, again)
    print(f"step {t + 1}: {len(table_k)} rows, output", [round(o, 3) for o in kept[0].tolist()])

# %% [markdown]
# ### Why no queries? And what about deeper layers?
#
# A token asks once, in its own step; nobody needs its query again. *Its key and value* are read by
# every later token. Kept is what others will read: a **KV cache**.
#
# In a second layer a key is made from a *mixture* of tokens. It stays the same only if its token
# never looked at one of a later step. A causal mask ([lesson 10](10_grouped_query_attention.ipynb))
# promises that; we shall see another that does.

# %% [markdown]
# ## As a loop
#
# We need something that writes. The small model that ships with the course does: four layers,
# trained. Three cells build it from parts that you have; in which order they stand, and why, is
# [lesson 12](12_gemma.ipynb)'s subject. Here only what goes in and what comes out counts.

# %%
tiny = {n: t.float() for n, t in load_file("../paligemma/assets/tiny/model.safetensors").items()}


def trained(name, module):
    """Fill a module with the tensors that the file holds under this name."""
    own = {n.removeprefix(f"{name}."): t for n, t in tiny.items() if n.startswith(f"{name}.")}
    module.load_state_dict(own)
    return module


# %%
LM = "language_model.model"
blocks = []
for i in range(4):
    attention = trained(f"{LM}.layers.{i}.self_attn", GroupedQueryAttention(128, 4, 1, 32, i))
    mlp = trained(f"{LM}.layers.{i}.mlp", GeGLU(128, 256))
    norms = ("input_layernorm", "post_attention_layernorm")
    blocks.append((attention, mlp, *(trained(f"{LM}.layers.{i}.{n}", RMSNorm(128)) for n in norms)))

# %% [markdown]
# Vectors of tokens go in, a score for every possible next token comes out. `work` counts the tokens
# that pass through all four layers.

# %%
E = tiny[f"{LM}.embed_tokens.weight"]  # [V, D], a row for each token
last_norm, rope, work = trained(f"{LM}.norm", RMSNorm(128)), RotaryEmbedding(32), []


def scores(x, positions, mask=None, cache=None):
    """float[1, L, D] → float[1, L, V]"""
    work.append(x.shape[1])
    cos, sin = rope(positions)
    for attention, mlp, norm, second_norm in blocks:
        x = x + attention(norm(x), cos, sin, mask, cache)
        x = x + mlp(second_norm(x))
    return last_norm(x) @ E.T


# %% [markdown]
# The model reads a picture (64 vectors from the tower of [lesson 05](05_siglip.ipynb)) and a question
# (four tokens). Together they are the **prefix**: all that is there before the answer begins.

# %%
sizes = SiglipVisionConfig(128, 512, 4, 4, image_size=112)
tower = trained("vision_tower.vision_model", SiglipVisionModel(sizes))
project = trained("multi_modal_projector.linear", nn.Linear(128, 128))
tokenizer = Tokenizer("../paligemma/assets/tiny/tokenizer.model")


# %%
def embed(ids):
    return E[ids][None] * 128**0.5  # [1, L, D]


def read(picture, question):
    seen = project(tower(ImageProcessor(112)(sample_picture(picture))))  # [1, 64, D]
    ids = [tokenizer.bos_id, *tokenizer.encode(question), tokenizer.newline_id]
    return torch.cat((seen, embed(ids)), dim=1)


prefix = read("scene", "caption en")
print(tuple(prefix.shape))

# %% [markdown]
# Who may look at whom? All see the whole prefix, the prefix itself included; the answer is causal.


# %%
def may_look(length, prefix_length):
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    mask[..., :prefix_length] = True
    return mask


# %% [markdown]
# Now the plainest loop: everything so far goes in, the scores behind the last token decide, the best
# token is appended.


# %%
def write_plain(x, steps):
    ids, prefix_length = [], x.shape[1]
    for _ in range(steps):
        length = x.shape[1]
        row = scores(x, torch.arange(length)[None], may_look(length, prefix_length))[0, -1]
        ids.append(row.argmax().item())
        x = torch.cat((x, embed(ids[-1:])), dim=1)
    return ids


# %%
work.clear()
answer = write_plain(prefix, steps=6)
print(answer, repr(tokenizer.decode(answer)))
print("tokens through the model:", " + ".join(map(str, work)), "=", sum(work))

# %% [markdown]
# (Token 1 is the sign for "end".)
#
# ## With a cache that grows
#
# The loop has two phases now. **Prefill**: the whole prefix goes in once. Then one **decode step**
# for each new token, and only that token goes in. Two things change: its position is the number of
# tokens before it, and no mask is needed. In the prefill all see all; afterwards a single newest
# token may look at everything there is.


# %%
def write_cached(x, steps, cache, seen=0):
    ids = []  # chosen so far; `seen` counts the tokens already fed
    for _ in range(steps):
        length = x.shape[1]  # the prefix, later 1
        positions = torch.arange(seen, seen + length)[None]
        row = scores(x, positions, None, cache)[0, -1]
        seen += length
        ids.append(row.argmax().item())
        x = embed(ids[-1:])
    return ids


# %% [markdown]
# The first cache is the table from above, one for each layer. The layers ask for
# `update(layer_idx, k, v)`, which takes the new keys and values and returns all of them.


# %%
class GrowingCache:
    def __init__(self):
        self.kept = {}

    def update(self, layer_idx, k, v):
        if layer_idx in self.kept:
            old_k, old_v = self.kept[layer_idx]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)  # along S
        self.kept[layer_idx] = k, v
        return k, v


# %%
work.clear()
assert write_cached(prefix, 6, GrowingCache()) == answer
print("same answer; tokens through the model:", " + ".join(map(str, work)), "=", sum(work))

# %% [markdown]
# The prefix once, and one token a step. (The last one is chosen and never fed.) Keys are kept
# *after* rotation: a token keeps its position, so it is turned once, for good.
#
# ### What does `cat` cost?
#
# A tensor cannot grow in place. `torch.cat` allocates a new one, copies everything old, then adds
# the new row. In step $t$ that writes $t$ rows: the triangle is back, as bytes.


# %%
def bytes_written(steps, row, growing):
    return sum((t if growing else 1) * row for t in range(1, steps + 1))


# %%
row = 2 * 8 * 256 * 2  # one layer, one token: key and value, 8 heads of 256, 2 bytes a number
print("tokens       growing   in place     ratio")
for steps in (64, 256, 1024, 4096):
    grow, place = bytes_written(steps, row, True), bytes_written(steps, row, False)
    print(f"{steps:6} {grow / 1e6:10,.1f} MB {place / 1e6:7.1f} MB {grow / place:9,.1f}")
    assert grow / place == (steps + 1) / 2

# %% [markdown]
# The ratio for $n$ tokens is $(n+1)/2$: twice as long an answer, four times the copying. And while a
# layer is copied, its old and its new tensors exist side by side.
#
# ## Allocated once
#
# The remedy: reserve room for the longest text, remember how much is filled, and write each new row
# into the next free slot. One layer first:

# %%
room, filled = torch.zeros(1, 1, 6, 2), 0  # [B, K, most tokens, Dh]
for k_new in (x[:2] @ W_k, x[2:] @ W_k):  # two tokens, then one
    room[:, :, filled : filled + len(k_new)] = k_new
    filled += len(k_new)
    print(f"{filled} of 6 filled:", room[0, 0].int().tolist())

# %% [markdown]
# What does attention get? Only the filled part, `room[:, :, :filled]`. A slice of a tensor is a
# **view**: the same memory with another length written on the label. Nothing is copied.

# %%
view = room[:, :, :filled]
print("filled:", view[0, 0].int().tolist())
print("same memory:", view.data_ptr() == room.data_ptr())

# %% [markdown]
# ## The module
#
# Two tensors for each layer, and a count for each layer. Why not one count? Within a step, layer 0
# has already written when layer 1 has not. `len(cache)` is what *all* layers hold.


# %%
#| export
class KVCache:
    """Preallocated keys and values for every layer; the oldest token first.

    Args:
        num_layers: how many attention layers write to it.
        batch_size, num_key_value_heads, head_dim: int B, K and Dh.
        max_length: the most tokens it will ever hold (prompt and answer).
        device, dtype: of the keys and values.

    Source: the static cache of gemma_pytorch; Pope et al. 2022, section 3.3, for its cost.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_key_value_heads: int,
        max_length: int,
        head_dim: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        shape = (batch_size, num_key_value_heads, max_length, head_dim)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(num_layers)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(num_layers)]
        self.max_length = max_length
        self._lengths = [0] * num_layers

    def __len__(self) -> int:
        """The number of tokens that every layer holds."""
        return min(self._lengths)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values together."""
        return sum(t.nbytes for t in (*self.keys, *self.values))


# %% [markdown]
# The one method that matters: write behind what is there, return views of all.


# %%
#| export
@add_to_class(KVCache)
def update(self, layer_idx, k, v):
    keys, values, start = self.keys[layer_idx], self.values[layer_idx], self._lengths[layer_idx]
    end = start + k.shape[2]
    keys[:, :, start:end], values[:, :, start:end] = k, v
    self._lengths[layer_idx] = end
    return keys[:, :, :end], values[:, :, :end]


# %% [markdown]
# (`torch.empty` does not clear its memory. What lies beyond `end` is never read, so it need not be
# cleared.) The three loops write the same answer:

# %%
cache = KVCache(num_layers=4, batch_size=1, num_key_value_heads=1, max_length=80, head_dim=32)
assert write_cached(prefix, 6, cache) == answer
print(f"{len(cache)} of {cache.max_length} slots filled, {cache.nbytes:,} bytes")

# %% [markdown]
# ### Two ways in which it goes wrong in silence
#
# What happens to a token too many, and to one row of keys in a cache for two rows?

# %%
cache = KVCache(1, batch_size=2, num_key_value_heads=1, max_length=4, head_dim=8)
k, v = torch.randn(2, 2, 1, 5, 8)
for t in range(5):
    keys, _ = cache.update(0, k[:, :, t : t + 1], v[:, :, t : t + 1])
print(f"{len(cache)} tokens written, {keys.shape[2]} kept")

# %%
cache = KVCache(1, batch_size=2, num_key_value_heads=1, max_length=4, head_dim=8)
keys, _ = cache.update(0, k[:1, :, :1], v[:1, :, :1])  # one row
print("both rows hold it:", torch.equal(keys[0], keys[1]))

# %% [markdown]
# The fifth token is lost: a slice that runs over the end is cut short. And assignment *broadcasts*,
# so one row fills two. Both become errors that say what to do, before anything is written.


# %%
#| export
@add_to_class(KVCache)
def update(
    self, layer_idx: int, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Store the new tokens of one layer and return all of them.

    Args:
        layer_idx: the layer that writes.
        k, v: `float[B, K, L, Dh]`, the new tokens.

    Returns:
        keys, values: views `float[B, K, S, Dh]` of all S tokens so far, nothing copied.

    Raises:
        ValueError: more tokens than `max_length`, or another shape; nothing is written then.
    """
    keys, values, start = self.keys[layer_idx], self.values[layer_idx], self._lengths[layer_idx]
    batch, kv_heads, _, head_dim = keys.shape
    for name, new in (("k", k), ("v", v)):
        if new.shape != (batch, kv_heads, k.shape[-2], head_dim):
            raise ValueError(
                f"{name} is {list(new.shape)}; expected [{batch}, {kv_heads}, L, {head_dim}], "
                "the same L for k and v: make the cache for this batch and model"
            )
    end = start + k.shape[2]
    if end > self.max_length:
        raise ValueError(
            f"the cache holds {self.max_length} tokens and {end} are needed; "
            "make it with a larger max_length"
        )
    keys[:, :, start:end], values[:, :, start:end] = k, v
    self._lengths[layer_idx] = end
    return keys[:, :, :end], values[:, :, :end]


# %%
cache = KVCache(1, batch_size=2, num_key_value_heads=1, max_length=4, head_dim=8)
for batch, length in ((2, 5), (1, 1)):
    try:
        cache.update(0, *torch.randn(2, batch, 1, length, 8))
    except ValueError as error:
        print(error)

# %% [markdown]
# ## Which masks allow a cache?
#
# The words agree. Do the *scores*, for each token of the whole text? One pass over all 73 tokens
# against a prefill of 68 and five decode steps:

# %%
whole = torch.cat((prefix, embed(answer[:-1])), dim=1)  # [1, 73, D]
one_pass = scores(whole, torch.arange(73)[None], may_look(73, 68))


# %%
def in_calls(sizes, mask_of=lambda old, new: None):
    """Scores of the same tokens, given in calls of these sizes."""
    cache, parts = KVCache(4, 1, 1, 73, 32), []
    for x in whole.split(sizes, dim=1):
        old, new = len(cache), x.shape[1]
        parts.append(scores(x, torch.arange(old, old + new)[None], mask_of(old, new), cache))
    return torch.cat(parts, dim=1)


# %%
gap = (in_calls([68, 1, 1, 1, 1, 1]) - one_pass).abs().max().item()
print(f"largest difference {gap:.1e}, of scores up to {one_pass.abs().max():.0f}")
assert gap < 1e-4

# %% [markdown]
# Equal, though the prefix isn't causal. It holds because the prefix is *complete* before the first
# token of the answer: nobody in it could have looked at what comes later.
#
# Cut the prefix into two calls, and that is no longer so. Say, to keep the picture and ask about it
# again and again: first the picture, then the question.

# %%
cache = KVCache(4, 1, 1, 80, 32)
scores(prefix[:, :64], torch.arange(64)[None], None, cache)  # the picture alone
broken = write_cached(prefix[:, 64:], 6, cache, seen=64)  # then the question
print(repr(tokenizer.decode(broken[: broken.index(1)] if 1 in broken else broken)))
assert broken != answer

# %%
gap = (in_calls([64, 4, 1, 1, 1, 1, 1]) - one_pass)[0, 67:].abs().amax(-1)
print("scores of the answer are off by", [round(g, 1) for g in gap.tolist()])
assert gap.min() > 1

# %% [markdown]
# In two calls the picture's tokens cannot see the question; in training they always could. Nothing is
# raised.
#
# Under a *causal* mask for everything, as in models of text alone, any cut will do:


# %%
def causal(old, new):
    """Mask of `new` tokens behind `old` ones: bool[1, 1, L, S], S = old + new."""
    return torch.ones(1, 1, new, old + new, dtype=torch.bool).tril(diagonal=old)


print(causal(old=3, new=2).int()[0, 0])

# %%
one_causal = scores(whole, torch.arange(73)[None], causal(0, 73))
for sizes in ([64, 9], [40, 33], [1] * 73):
    torch.testing.assert_close(in_calls(sizes, causal), one_causal, rtol=1e-4, atol=1e-4)
    print(f"{len(sizes):2} calls: equal to one pass")

# %% [markdown]
# ## Against the reference
#
# The file holds an attention layer of transformers' Gemma and what its `DynamicCache` (a growing
# one) gives when seven tokens arrive as $4 + 1 + 2$. Ours must return the same outputs and hold the
# same keys and values. A test recomputes the file.

# %%
reference = load_file("reference/kv_cache.safetensors")
layer = GroupedQueryAttention(24, 4, 2, 8)
layer.load_state_dict({n[8:]: t for n, t in reference.items() if n.startswith("weights.")})
cache, outputs = KVCache(1, 2, 2, 7, 8), []
for part in reference["x"].split([4, 1, 2], dim=1):
    old, new = len(cache), part.shape[1]
    cos, sin = RotaryEmbedding(8)(torch.arange(old, old + new).expand(2, -1))
    outputs.append(layer(part, cos, sin, causal(old, new), cache))

# %%
ours = {"out": torch.cat(outputs, dim=1), "keys": cache.keys[0], "values": cache.values[0]}
for name, tensor in ours.items():
    gap = (tensor - reference[name]).abs().max().item()
    assert gap <= 1e-5
    print(f"{name:6} {tuple(tensor.shape)}: largest difference {gap:.1e}")

# %% [markdown]
# ## See it: the second token is cheaper
#
# Now the clock, on the same four layers. How long does **token number $t$** take? Without a cache
# all $t$ go through; with one, a single token does.


# %%
def milliseconds(function, *args):
    function(*args)  # the first call warms up
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function(*args)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


# %%
def decode_step(x, cache):
    length = x.shape[1]
    cache._lengths = [length - 1] * 4  # as if the others had been read
    return scores(x[:, -1:], torch.tensor([[length - 1]]), None, cache)


# %% tags=["nbval-ignore-output"]
lengths, plain, cached = (32, 128, 256, 384, 512, 640, 768), [], []
for t in lengths:
    x = torch.randn(1, t, 128)
    plain.append(milliseconds(scores, x, torch.arange(t)[None], causal(0, t)))
    cached.append(milliseconds(decode_step, x, KVCache(4, 1, 1, t, 32)))
print(f"token {t}: {plain[-1]:.1f} ms without a cache, {cached[-1]:.1f} ms with one")

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
for name, times, colour in (("no cache", plain, "bad"), ("with a cache", cached, "good")):
    ax.plot(lengths, times, "o-", color=COLOURS[colour], clip_on=False)
    ax.text(lengths[-1] + 15, times[-1], name, color=COLOURS[colour], va="center")
ax.set(xlabel="tokens in the text", ylabel="ms for the last one")
ax.set(xlim=(0, lengths[-1]), ylim=(0, None))
save_figure(fig, "11_time_per_token")

# %% [markdown]
# Without a cache, each token costs more than the one before. With it, the line looks flat. It is
# not quite: the new query still meets $t$ keys, but that is a small part beside the projections of
# one token. The *first* token of an answer always pays for the whole prefix. Hence the title.

# %% [markdown]
# ## At full size
#
# The language model of PaliGemma 3B has 18 layers, one key/value head and heads of 256. One token
# leaves a key and a value in each layer. On the `meta` device tensors have a size and no memory, so
# we can ask for any cache and pay nothing.


# %%
def cache_bytes(answers, kv_heads, length, layers=18, head_dim=256):
    return KVCache(layers, answers, kv_heads, length, head_dim, "meta", torch.bfloat16).nbytes


print(f"one token: 18 · 2 · 1 · 256 numbers of 2 bytes = {cache_bytes(1, 1, 1):,} bytes")
for answers in (1, 8, 64):
    few, many = (cache_bytes(answers, kv_heads, 264) / 1e6 for kv_heads in (1, 8))
    print(f"{answers:2} answers of 264 tokens: {few:5.1f} MB with K = 1, {many:7.1f} MB with K = 8")

# %% [markdown]
# 264 tokens are a picture of $16 \times 16$ patches and a question of eight. This is what one layer's
# room looks like when 20 tokens of an answer have been written: nearly everything in it is cat.

# %% tags=["hide-input"]
cat = sample_picture("cat").resize((224, 224))
fig, ax = plt.subplots(figsize=(4.2, 5), layout="constrained")
ax.imshow(cat, extent=(-0.5, 15.5, 15.5, -0.5))
for slot in range(304):
    row, column = divmod(slot, 16)
    name = "muted" if slot < 264 else "language"  # the question, then the answer
    fill = COLOURS[name] if 256 <= slot < 284 else "none"
    edge = COLOURS["paper"] if slot < 284 else COLOURS["language"]
    style = {"facecolor": fill, "edgecolor": edge, "linewidth": 1}
    ax.add_patch(plt.Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, **style))
ax.set(xlim=(-0.6, 15.6), ylim=(18.6, -0.6), title="slots 0 to 303 of one layer, 16 in a row")
ax.set_axis_off()
save_figure(fig, "11_slots.png")

# %% [markdown]
# Read it like text: 256 slots of picture, eight of question (grey), 20 tokens of an answer, 20 free
# slots. The vision tower ran once. Its tokens are read again in every step, never computed again.
#
# ### What is saved
#
# An answer of 100 tokens, in tokens that pass through the 3B model. Each costs about two operations
# for each of its 2.5 billion weights ([lesson 12](12_gemma.ipynb) counts them).

# %%
prefix_length, steps, parameters = 264, 100, 2_508_662_784
without = sum(prefix_length + i for i in range(steps))
with_cache = prefix_length + steps - 1
print(f"without {without:,} tokens, with {with_cache}: {without / with_cache:.0f} times less work")
for tokens in (without, with_cache):
    print(f"{2 * parameters * tokens / 1e12:6.1f} million million operations")

# %% [markdown]
# And to be fair to `cat`: what is copied in a step, beside the 5 GB of weights that each step reads
# anyway?

# %%
print("answers   heads   tokens   copied a step   of the weights")
share = {}
for case in ((1, 1, 264), (64, 1, 264), (1, 8, 264), (1, 1, 4104), (64, 8, 4104)):
    copied = cache_bytes(*case)
    share[case] = copied / (2 * parameters)
    print(f"{case[0]:7} {case[1]:7} {case[2]:8,} {copied / 1e6:12,.0f} MB {share[case]:13.1%}")
assert share[1, 1, 264] < 0.001 and max(list(share.values())[:4]) < 0.07
assert 7 < share[64, 8, 4104] < 8

# %% [markdown]
# One answer, one key/value head, a short text: nothing. Many answers *or* many heads *or* a large
# picture: a few per cent at most. Many answers *and* heads *and* a large picture: seven times the
# weights. Room taken at once copies nothing in any case.

# %% [markdown]
# ## A bug people really make: every token is the first
#
# A colleague writes the cached loop and tries it on a short question. It is right. Then on longer
# answers:


# %%
def write_colleague(x, steps, cache):
    ids = []
    for _ in range(steps):
        row = scores(x, torch.arange(x.shape[1])[None], None, cache)[0, -1]
        ids.append(row.argmax().item())
        x = embed(ids[-1:])
    return ids


# %%
for question in ("answer en where is the cat?", "caption en", "detect dog"):
    x, found = read("scene", question), []
    for write in (write_cached, write_colleague):
        ids = write(x, 12, KVCache(4, 1, 1, 85, 32))
        found.append(ids[: ids.index(1)] if 1 in ids else ids)
        print(f"{question} | {write.__name__[6:]:9} | {tokenizer.decode(found[-1])}")
    assert found[0][0] == found[1][0]  # the first token is always right
    assert (found[0] == found[1]) == (len(found[0]) == 1)  # a longer answer never is

# %% [markdown]
# The first token of each answer comes from the prefill: exact. Then it goes astray, except where
# one token was all. Before you read on: what differs between the first call and the second?
#
# The code says `torch.arange(L)`, with $L$ the number of tokens *given*. In a decode step $L = 1$,
# so every new token gets position 0, that of the picture's first patch.

# %% [markdown]
# The lesson: **compare cached with uncached, beyond the first token**. A test of the prefill alone
# cannot see it, and a demo that answers in one word looks perfect.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): what may be kept?
#
# Ten tokens go through two layers. Then the **last** one is replaced. Which keys of the *nine tokens
# before it* change?
#
# - `"a"` layer 0, causal mask
# - `"b"` layer 1, causal mask
# - `"c"` layer 0, everyone sees everyone
# - `"d"` layer 1, everyone sees everyone
#
# Answer with a string of letters.

# %% tags=["exercise"]
letters = None  # your answer, such as "ab"


# %% tags=["check"]
def test_1(letters):
    good = isinstance(letters, str) and letters and set(letters) <= set("abcd")
    assert good, "give a string of one to four of the letters a to d"
    before = torch.randn(1, 10, 128)
    after = torch.cat((before[:, :9], torch.randn(1, 1, 128)), dim=1)
    asks = {
        "a": "layer 0: of which tokens is a key of layer 0 made?",
        "b": "layer 1 under the causal mask: have the nine ever looked at the last one?",
        "c": "layer 0: of which tokens is a key of layer 0 made?",
        "d": "layer 1 without a mask: of which tokens are the vectors that layer 1 reads made?",
    }
    for mask, names in ((causal(0, 10), "ab"), (None, "cd")):
        caches = [KVCache(4, 1, 1, 10, 32) for _ in range(2)]
        for x, cache in zip((before, after), caches):
            scores(x, torch.arange(10)[None], mask, cache)
        for layer_idx, letter in enumerate(names):
            k, other = (cache.keys[layer_idx][:, :, :9] for cache in caches)
            changed = not torch.allclose(k, other, atol=1e-4)
            assert changed == (letter in letters), asks[letter]


check(test_1, letters)

# %% [markdown]
# <details><summary>Hint</summary>
#
# From what is a key of layer 0 made? And one of layer 1: which tokens have been mixed into it?
#
# </details>

# %% tags=["solution"]
# A key of layer 0 comes from its own token. In layer 1 the last token has been mixed in, if seen.
letters = "d"
check(test_1, letters)

# %% [markdown]
# ### Exercise 2 (write): a cache that need not know the end
#
# `KVCache` has to be told `max_length`. Write one that needn't: room for 4 tokens at first; where
# it is full, take a room at least *twice* as large and copy what there is. Over a whole text this
# copies each token about once or twice, not once a step. `update` returns views of all tokens so
# far, for each layer.


# %% tags=["exercise"]
class DoublingCache:
    def __init__(self):
        self.kept = {}  # for each layer what you need

    def update(self, layer_idx, k, v):
        return None  # all keys, all values


# %% tags=["check"]
def test_2(Cache):
    cache, alive, rooms = Cache(), [], {}
    k, v = torch.randn(2, 2, 3, 40, 8)  # [B, K, tokens, Dh] each
    for end, length in [(3, 3), *((t, 1) for t in range(4, 31)), (40, 10)]:
        now = slice(end - length, end)
        for layer_idx in range(2):
            new = k[:, :, now] + layer_idx, v[:, :, now] + layer_idx
            try:
                given = cache.update(layer_idx, *new)
            except (RuntimeError, KeyError, IndexError, AttributeError) as error:
                stop = f"{length} new for layer {layer_idx}, {end - length} held: it stopped"
                raise AssertionError(f"{stop} ({str(error).splitlines()[0]})") from None
            assert given is not None and len(given) == 2, "update returns keys and values"
            for name, got, all_new in zip(("keys", "values"), given, (k, v)):
                where = f"{name} of layer {layer_idx}, {end} tokens given"
                want = all_new[:, :, :end] + layer_idx
                assert got.shape == want.shape, f"{where}: their shape is {list(got.shape)}"
                assert torch.equal(got, want), f"{where}: not what was given, or in another order"
                room = got.untyped_storage()
                alive.append(room)  # kept alive, so that no two rooms share an address
                rooms.setdefault((layer_idx, name), {})[room.data_ptr()] = None
                size = room.nbytes() // (2 * 3 * 8 * 4)
                assert size <= max(4, 2 * end), f"{where}: room for {size} tokens is too much"
    most = max(map(len, rooms.values()))
    assert most <= 6, f"{most} rooms for 40 tokens: a new one only where the old one is full"


check(test_2, DoublingCache)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Keep `keys, values, filled` for each layer. New room: `k.new_empty(B, K, size, Dh)`, with `size`
# doubled until it is large enough. Ten tokens may arrive at once.
#
# </details>


# %% tags=["solution"]
class DoublingCache:
    def __init__(self):
        self.kept = {}  # layer: keys, values, filled

    def update(self, layer_idx, k, v):
        batch, kv_heads, length, head_dim = k.shape
        empty = k.new_empty(batch, kv_heads, 4, head_dim)
        keys, values, start = self.kept.get(layer_idx, (empty, empty.clone(), 0))
        end, size = start + length, keys.shape[2]
        while size < end:  # doubling keeps the number of copies small
            size *= 2
        if size > keys.shape[2]:
            larger = [k.new_empty(batch, kv_heads, size, head_dim) for _ in range(2)]
            larger[0][:, :, :start], larger[1][:, :, :start] = (
                keys[:, :, :start],
                values[:, :, :start],
            )
            keys, values = larger
        keys[:, :, start:end], values[:, :, start:end] = k, v
        self.kept[layer_idx] = keys, values, end
        return keys[:, :, :end], values[:, :, :end]


check(test_2, DoublingCache)

# %% [markdown]
# ### Exercise 3 (extend): go back
#
# After a wrong token, or for a second answer to the same question, one wants to forget the last
# tokens. With memory that is allocated once this needs no copy at all. Write
# `RewindableCache.rewind(length)`: afterwards the cache holds the first `length` tokens. More tokens
# than it holds, or less than none: `ValueError`.


# %% tags=["exercise"]
class RewindableCache(KVCache):
    def rewind(self, length):
        return None  # your code


# %% tags=["check"]
def test_3(Cache):
    k, v = torch.randn(2, 1, 1, 6, 4)
    cache = Cache(2, 1, 1, 6, 4)
    for layer_idx in range(2):
        cache.update(layer_idx, k[:, :, :5], v[:, :, :5])
    rooms = [room.data_ptr() for room in (*cache.keys, *cache.values)]
    cache.rewind(3)
    assert len(cache) == 3, f"len(cache) is {len(cache)} after rewind(3)"
    same = rooms == [room.data_ptr() for room in (*cache.keys, *cache.values)]
    assert same and cache.keys[0].shape[2] == 6, "the rooms should stay: nothing need be copied"
    for layer_idx in range(2):
        try:
            keys, _ = cache.update(layer_idx, k[:, :, 5:], v[:, :, 5:])
        except ValueError as error:
            raise AssertionError(f"no room after rewinding layer {layer_idx}: {error}") from None
        want = torch.cat((k[:, :, :3], k[:, :, 5:]), dim=2)
        assert keys.shape == want.shape, f"layer {layer_idx} was not rewound, or too far"
        assert torch.equal(keys, want), f"layer {layer_idx}: the first three tokens are gone"
    for length in (4, 0):
        try:
            cache.rewind(length)
        except ValueError:
            raise AssertionError(f"rewind({length}) with 4 tokens is allowed") from None
    assert len(cache) == 0, "rewind(0) empties it"
    for layer_idx in range(2):
        cache.update(layer_idx, k[:, :, :4], v[:, :, :4])
    for wrong in (5, -1):
        try:
            cache.rewind(wrong)
        except ValueError:
            continue
        raise AssertionError(f"rewind({wrong}) with 4 tokens: expected a ValueError")


check(test_3, RewindableCache)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The tensors stay as they are. What counts is `self._lengths`, one number for each layer.
#
# </details>


# %% tags=["solution"]
class RewindableCache(KVCache):
    def rewind(self, length):
        if not 0 <= length <= len(self):
            raise ValueError(f"cannot rewind to {length}: the cache holds {len(self)} tokens")
        self._lengths = [length] * len(self._lengths)  # what lies beyond is never read


check(test_3, RewindableCache)

# %% [markdown]
# ## Summary
#
# - Keys and values of earlier tokens never change as long as nobody looks at a later call: keep
#   them.
# - Prefill reads the prefix once; a decode step sends one token through the model.
# - Growing by `cat` copies the whole past in every step; memory taken once copies nothing.
# - A token's position is the number of tokens before it, in both phases.
# - The test that counts: prefill and decode steps give what one pass gives.

# %% [markdown]
# ## Quiz
#
# **1.** A layer contains `if cache:` instead of `if cache is not None:`. What happens with our
# `KVCache`?
#
# <details><summary>Answer</summary>
#
# Python asks an object with `__len__` for its length, and an empty cache is *false*. The prefill
# then skips the cache, so it stays empty, and stays false for ever: each new token sees only itself.
#
# </details>

# %% [markdown]
# **2.** Why does `update` return views of the filled part rather than the whole room and a mask?
#
# <details><summary>Answer</summary>
#
# The whole room would be read in every step, filled or not, and needs a mask for the rest. The view
# is as short as the text. (On a GPU with compiled code the opposite can win: shapes that never
# change let one recorded program run each step.)
#
# </details>

# %% [markdown]
# **3.** The cache makes decode steps cheap. Why does it do nothing for the time until the first token
# of the answer?
#
# <details><summary>Answer</summary>
#
# Before it every token of picture and question has to pass through all layers once. There is nothing
# to reuse yet; the cache is being filled.
#
# </details>

# %% [markdown]
# ## References
#
# - Reuben Pope et al., *Efficiently Scaling Transformer Inference*, 2022, section 3.3.
# - Noam Shazeer, *Fast Transformer Decoding: One Write-Head is All You Need*, 2019, section 2.4
#   (what decoding reads).
# - Woosuk Kwon et al., *Efficient Memory Management for Large Language Model Serving with
#   PagedAttention*, 2023 (room for many users, in pages).
# - gemma_pytorch: `gemma/model.py`, the caches of `generate`; transformers: `cache_utils.py`,
#   classes `DynamicCache` and `StaticCache`.

# %% [markdown] tags=["navigation"]
# [← Grouped-query attention](10_grouped_query_attention.ipynb) | [contents](00_overview.ipynb) | [Gemma →](12_gemma.ipynb)
