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
# - compute how many bytes a picture, a prompt and an answer occupy;
# - find position bugs that show only in the second token, or in company.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("kv_cache")

# %% [markdown]
# ## Setup
#
# From lessons [09](09_rope.ipynb) and [10](10_grouped_query_attention.ipynb) we take rotation and
# attention. The cells that begin with `#| export` become the file
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

from paligemma.grouped_query_attention import GroupedQueryAttention
from paligemma.support.course import check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS
from paligemma.rope import RotaryEmbedding
from paligemma.support.course import add_to_class

torch.manual_seed(11)
_ = torch.set_grad_enabled(False)  # we only answer here; nothing is trained

# %% [markdown]
# ## The problem
#
# A language model writes one token, appends it to the text, and reads the text again for the next
# one. Read again *from the start*? In step $t$ that means $t$ tokens through every layer, although
# only one is new. Each square below is one token that passes through all layers.


# %%
def draw_steps(ax, steps, cached, title):
    """Rows are steps, columns are tokens; dark is work, a dot is a number read from memory."""
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
# result; on the right it has shrunk to a dot: a number that is read instead of made.
#
# The triangle holds $T(T+1)/2$ squares, its edge only $T$. This lesson takes the triangle away.
# First: is "with the same result" true, and what exactly has to be kept?

# %% [markdown]
# ## By hand
#
# Three tokens of width 2. The key is $xW_k$, the value $xW_v$, both chosen so that a pencil is
# enough: $W_k$ doubles the first channel, $W_v$ swaps the two.

# %%
x = torch.tensor([[1.0, 0], [0, 1], [1, 1]])  # (T, D)
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
    weights = (new @ table_k.T / 2**0.5).softmax(dim=-1)
    again = (new @ (x[: t + 1] @ W_k).T / 2**0.5).softmax(dim=-1) @ (x[: t + 1] @ W_v)
    assert torch.equal(weights @ table_v, again)
    print(f"step {t + 1}: {len(table_k)} rows, output", [round(o, 3) for o in again[0].tolist()])

# %% [markdown]
# ### Why no queries? And what about deeper layers?
#
# Token 2 asks once, in its own step; nobody needs its query again. *Its key and value* are read by
# every later token. Kept is what others will read.
#
# In a second layer a key is made from a *mixture* of tokens. It stays the same only if its token
# never looked at one that comes in a later step. A **causal** mask, under which nobody looks ahead,
# promises that for any steps (exercise 1). It isn't the only one: tokens that arrive in *one* call
# may look at each other both ways, as PaliGemma's picture and prompt do.

# %% [markdown]
# ## As a loop
#
# We need something that generates. A word model of two attention layers will do: random weights,
# so it talks nonsense, but always the same nonsense. `work` counts tokens that pass through it.


# %%
class Toy(nn.Module):
    """Words in, scores of the next word out: two layers of attention and nothing else."""

    def __init__(self, words=64, width=48, heads=4, kv_heads=2, head_dim=16, layers=2):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        sizes = (width, heads, kv_heads, head_dim)
        self.layers = nn.ModuleList(GroupedQueryAttention(*sizes, i) for i in range(layers))
        for layer in self.layers:
            layer.q_proj.weight.mul_(12)  # large scores: each word looks at few others
        self.rope, self.head = RotaryEmbedding(head_dim), nn.Linear(width, words)
        self.work = 0

    def forward(self, ids, positions, mask=None, cache=None):
        self.work += ids.numel()
        x = self.embedding(ids)  # (B, L, D)
        for layer in self.layers:
            x = x + 3 * layer(x, *self.rope(positions), mask, cache)
        return self.head(x)  # (B, L, V)


# %% [markdown]
# The mask for `new` tokens that follow `old` ones: new token $i$ sees all old tokens, the new ones
# before it, and itself. (True = may look, as in [lesson 10](10_grouped_query_attention.ipynb).)


# %%
def causal(new, old=0):
    return torch.ones(1, 1, new, old + new, dtype=torch.bool).tril(diagonal=old)


print(causal(2, old=3).int()[0, 0])

# %% [markdown]
# The plainest loop: all words so far go in, the scores after the last word decide, the best word is
# appended. (Always taking the best is called **greedy**; [lesson 17](17_sampling.ipynb) has other ways.)


# %%
def answer_plain(model, ids, steps):
    for _ in range(steps):
        length = ids.shape[1]
        scores = model(ids, torch.arange(length)[None], causal(length))[:, -1]
        ids = torch.cat((ids, scores.argmax(-1, keepdim=True)), dim=1)
    return ids


toy = Toy()
prompt = torch.tensor([[5, 17, 42, 8]])
slow = answer_plain(toy, prompt, steps=12)
print("prompt and answer:", slow[0].tolist())
print("tokens through the model:", toy.work)

# %% [markdown]
# Twelve words, and $4 + 5 + \dots + 15 = 114$ tokens were processed.
#
# ## With a cache that grows
#
# The loop has two phases now. **Prefill**: the whole prompt goes in once. **Decode**: one new word
# goes in per step. What changes is small: the position of a new word is the number of words before
# it, and a single newest word may look at everything, so it needs no mask.


# %%
def answer_cached(model, ids, steps, cache):
    new, seen = ids, 0  # words to feed now, words already fed
    for _ in range(steps):
        length = new.shape[1]
        positions = torch.arange(seen, seen + length)[None]
        scores = model(new, positions, causal(length, seen), cache)[:, -1]
        seen += length
        new = scores.argmax(-1, keepdim=True)
        ids = torch.cat((ids, new), dim=1)
    return ids


# %% [markdown]
# The first cache is the table from above, one for each layer. [Lesson 10](10_grouped_query_attention.ipynb) fixed the contract:
# `update(layer_idx, k, v)` takes the new keys and values and returns all of them.


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


toy.work = 0
assert torch.equal(answer_cached(toy, prompt, 12, GrowingCache()), slow)
print("same words; tokens through the model:", toy.work)

# %% [markdown]
# Four words of the prompt, eleven of the answer. (The twelfth is chosen and never fed.) Keys are
# kept *after* rotation: a word keeps its position, so it is turned once, for good.
#
# ### What does `cat` cost?
#
# A tensor cannot grow in place. `torch.cat` allocates a new one, copies everything old, then adds
# the new row. In step $t$ that writes $t$ rows: the triangle is back, as bytes.


# %%
def bytes_written(steps, row, growing):
    return sum((t if growing else 1) * row for t in range(1, steps + 1))


row = 2 * 8 * 256 * 2  # one layer, one token: key and value, 8 heads of 256, 2 bytes a number
print("tokens       growing   in place     ratio")
for steps in (64, 256, 1024, 4096):
    grow, place = (bytes_written(steps, row, g) for g in (True, False))
    print(f"{steps:6} {grow / 1e6:10,.1f} MB {place / 1e6:7.1f} MB {grow / place:9,.1f}")

# %% [markdown]
# The ratio is $(T+1)/2$: twice as long an answer, four times the copying. And while it copies, old
# and new exist at the same time, so a full cache needs twice its memory.
#
# ## Allocated once
#
# The remedy: reserve room for the longest text, remember how much is filled, and write each new row
# into the next free place. One layer first:

# %%
room, filled = torch.zeros(1, 1, 6, 2), 0  # (B, K, most tokens, Dh)
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
room[0, 0, 0, 0] = 7
print("a change in the room shows in the view:", view[0, 0, 0, 0].item())

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
        """S, the number of tokens that every layer holds."""
        return min(self._lengths)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values together."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def update(self, layer_idx, k, v):
        keys, values, start = self.keys[layer_idx], self.values[layer_idx], self._lengths[layer_idx]
        end = start + k.shape[2]
        keys[:, :, start:end], values[:, :, start:end] = k, v
        self._lengths[layer_idx] = end
        return keys[:, :, :end], values[:, :, :end]


# %% [markdown]
# The three loops give the same words. (`torch.empty` does not clear its memory; what lies beyond
# `end` is never read, so it need not be cleared.)

# %%
cache = KVCache(num_layers=2, batch_size=1, num_key_value_heads=2, max_length=15, head_dim=16)
assert torch.equal(answer_cached(toy, prompt, 12, cache), slow)
print(f"same words; {len(cache)} of {cache.max_length} tokens, {cache.nbytes:,} bytes")

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
cache._lengths = [0]
keys, _ = cache.update(0, k[:1, :, :1], v[:1, :, :1])  # one row
print("both rows hold it:", torch.equal(keys[0], keys[1]))
assert len(cache) == 1 and torch.equal(keys[0], keys[1])

# %% [markdown]
# The fifth token is lost: a slice that runs over the end is cut short. And assignment *broadcasts*,
# so one row fills a batch. Both become errors that say what to do, before anything is written.


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
        keys, values: views `float[B, K, S + L, Dh]`, nothing copied.

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


# %% [markdown]
# And the scores, not only the best word: five ways to cut the same fifteen words into calls. In
# each, every word must get the scores that one pass over everything gives it.

# %%
full = toy(slow[:, :15], torch.arange(15)[None], causal(15))
for chunks in ([15], [4] + [1] * 11, [1] * 15, [7, 8], [5, 5, 5]):
    cache, parts = KVCache(2, 1, 2, 15, 16), []
    for words in slow[:, :15].split(chunks, dim=1):
        old, new = len(cache), words.shape[1]
        parts.append(toy(words, torch.arange(old, old + new)[None], causal(new, old), cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-4, atol=1e-5)
    print(f"{len(chunks):2} calls: equal to one pass")

# %% [markdown]
# ### A prefix that looks both ways
#
# PaliGemma's **prefix** (picture and prompt) isn't causal: its tokens all see each other. Only the
# answer is. Does the cache hold then? Six words as prefix, in one call and with no mask; then nine
# words, one a call. Compared with one pass over all fifteen under the same rule.

# %%
rule = causal(15)
rule[..., :6, :6] = True  # the prefix sees all of the prefix
one_pass = toy(slow[:, :15], torch.arange(15)[None], rule)
cache, parts = KVCache(2, 1, 2, 15, 16), []
for words in slow[:, :15].split([6] + [1] * 9, dim=1):
    old, new = len(cache), words.shape[1]
    parts.append(toy(words, torch.arange(old, old + new)[None], None, cache))
torch.testing.assert_close(torch.cat(parts, dim=1), one_pass, rtol=1e-4, atol=1e-5)
print("equal to one pass")

# %% [markdown]
# It holds, because the prefix is complete before the first word of the answer: nobody in it could
# have looked at what comes later. Cut the *prefix* into two calls, and its first half would have
# missed the second.
#
# The shapes, the views, and the two errors:

# %%
cache = KVCache(1, batch_size=2, num_key_value_heads=1, max_length=4, head_dim=8)
keys, values = cache.update(0, *torch.randn(2, 2, 1, 3, 8))
shared = keys.data_ptr() == cache.keys[0].data_ptr()
print("keys", tuple(keys.shape), "| in the cache's memory:", shared)
for batch, length in ((2, 2), (1, 1)):
    try:
        cache.update(0, *torch.randn(2, batch, 1, length, 8))
    except ValueError as error:
        print(error)

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
cache, outputs, rope = KVCache(1, 2, 2, 7, 8), [], RotaryEmbedding(8)
for part in reference["x"].split([4, 1, 2], dim=1):
    old, new = len(cache), part.shape[1]
    cos, sin = rope(torch.arange(old, old + new).expand(2, -1))
    outputs.append(layer(part, cos, sin, causal(new, old), cache))
ours = {"out": torch.cat(outputs, dim=1), "keys": cache.keys[0], "values": cache.values[0]}
for name, tensor in ours.items():
    gap = (tensor - reference[name]).abs().max().item()
    assert gap <= 1e-5
    print(f"{name:6} {tuple(tensor.shape)}: largest difference {gap:.1e}")

# %% [markdown]
# ## See it: the second token is cheaper
#
# Now a larger toy (width 512, eight heads, two layers), measured. How long does **token number
# $t$** take? Without a cache all $t$ go through; with one, a single token does.


# %% tags=["nbval-ignore-output"]
def milliseconds(function, *args):
    start = time.perf_counter()
    function(*args)
    return 1e3 * (time.perf_counter() - start)


large = Toy(width=512, heads=8, kv_heads=1, head_dim=64)
lengths = (32, 128, 256, 384, 512, 640, 768)
plain, cached = ({t: [] for t in lengths} for _ in range(2))
for _ in range(6):  # rounds; the fastest counts
    for t in lengths:
        ids, place, cache = (
            torch.randint(64, (1, t)),
            torch.arange(t)[None],
            KVCache(2, 1, 1, t, 64),
        )
        plain[t].append(milliseconds(large, ids, place, causal(t)))
        large(ids[:, :-1], place[:, :-1], causal(t - 1), cache)
        cached[t].append(milliseconds(large, ids[:, -1:], place[:, -1:], None, cache))

fig, ax = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
for name, times, colour in (("no cache", plain, "bad"), ("with a cache", cached, "good")):
    best = [min(times[t]) for t in lengths]
    ax.plot(lengths, best, "o-", color=COLOURS[colour], clip_on=False)
    ax.text(t + 15, best[-1], name, color=COLOURS[colour], va="center")
    print(f"token {t}, {name}: {best[-1]:.2f} ms")
ax.set(xlabel="tokens in the text", ylabel="ms for the last one", xlim=(0, t), ylim=(0, None))
save_figure(fig, "11_time_per_token")

# %% [markdown]
# Without a cache, each token costs more than the one before. With it, the line looks flat. It is
# not quite: the new query still meets $t$ keys, but that is a small part beside the projections of
# one token. The *first* token of an answer always pays for the whole prompt. Hence the title.

# %% [markdown]
# ### Growing or in place?
#
# Copying was counted above; now it is measured, with the caches alone: one token after the other
# into one layer with eight key/value heads of 64. Fresh memory is slow when it is touched first, so
# the room is written once before the clock starts. Growing takes longer, and the longer the text,
# the more so.


# %% tags=["nbval-ignore-output"]
def fill_ms(cache, tokens):
    k, v = torch.randn(2, 1, 8, 1, 64)
    start = time.perf_counter()
    for _ in range(tokens):
        cache.update(0, k, v)
    return 1e3 * (time.perf_counter() - start)


def touched(tokens):
    cache = KVCache(1, 1, 8, tokens, 64)
    for room in (*cache.keys, *cache.values):
        room.zero_()
    return cache


for tokens in (256, 1024):
    grow = min(fill_ms(GrowingCache(), tokens) for _ in range(3))
    place = min(fill_ms(touched(tokens), tokens) for _ in range(3))
    print(f"{tokens:5} tokens: growing {grow:6.1f} ms, in place {place:5.1f} ms")

# %% [markdown]
# ## At full size
#
# The language model of PaliGemma 3B has 18 layers, one key/value head and heads of 256. One token
# leaves a key and a value in each layer. On the `meta` device tensors have a size and no memory, so
# we can ask for any cache and pay nothing.

# %%
LAYERS, Dh, BF16 = 18, 256, torch.bfloat16
token = KVCache(LAYERS, 1, 1, 1, Dh, "meta", BF16).nbytes
print(f"one token: {LAYERS} · 2 · 1 · {Dh} numbers of 2 bytes = {token:,} bytes")
print("answers at once, 264 tokens each       MQA (K = 1)   MHA (K = 8)")
for batch in (1, 8, 64):
    mqa, mha = (KVCache(LAYERS, batch, K, 264, Dh, "meta", BF16).nbytes / 2**20 for K in (1, 8))
    print(f"{batch:36} {mqa:9.1f} MiB {mha:9.1f} MiB")

# %% [markdown]
# 264 tokens are a picture of $16 \times 16$ patches and a prompt of eight. This is what one layer's
# room looks like when 20 tokens of an answer have been written: nearly everything in it is cat.

# %%
cat = sample_picture("cat").resize((224, 224))
fig, ax = plt.subplots(figsize=(4.2, 5), layout="constrained")
ax.imshow(cat, extent=(-0.5, 15.5, 15.5, -0.5))
for slot in range(304):
    row, column = divmod(slot, 16)
    name = "muted" if slot < 264 else "language"  # the prompt, then the answer
    fill = COLOURS[name] if 256 <= slot < 284 else "none"
    edge = COLOURS["paper"] if slot < 284 else COLOURS["language"]
    style = {"facecolor": fill, "edgecolor": edge, "linewidth": 1}
    ax.add_patch(plt.Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, **style))
ax.set(xlim=(-0.6, 15.6), ylim=(18.6, -0.6), title="slots 0 to 303 of one layer, 16 in a row")
ax.set_axis_off()
save_figure(fig, "11_slots.png")

# %% [markdown]
# Read it like text: 256 slots of picture, eight of prompt (grey), 20 words of an answer, 20 free
# places. The vision tower ran once. Its tokens are read again for every word, never computed again.
#
# ### What is saved
#
# An answer of 100 tokens, in tokens that pass through the 3B model. Each costs about two operations
# for each of its 2.5 billion weights ([lesson 12](12_gemma.ipynb) counts them).

# %%
prompt_length, steps = 264, 100
without = sum(prompt_length + i for i in range(steps))
with_cache = prompt_length + steps - 1
print(f"without {without:,} tokens, with {with_cache}: {without / with_cache:.0f} times less work")
print(
    f"{2 * 2_508_662_784 * without / 1e12:.0f} or {2 * 2_508_662_784 * with_cache / 1e12:.1f} Tflop"
)

# %% [markdown]
# And to be fair to `cat`: what is copied in a step, beside the 5 GB of weights that each step reads
# anyway?

# %%
weights = 2 * 2_508_662_784
print("users   heads   tokens   copied a step   of the weights")
share = {}
for users, kv_heads, length in (
    (1, 1, 264),
    (64, 1, 264),
    (1, 8, 264),
    (1, 1, 4104),
    (64, 8, 4104),
):
    copied = KVCache(LAYERS, users, kv_heads, length, Dh, "meta", BF16).nbytes
    share[users, kv_heads, length] = copied / weights
    print(f"{users:5} {kv_heads:7} {length:8,} {copied / 1e6:12,.0f} MB {copied / weights:13.1%}")
assert max(list(share.values())[:4]) < 0.07 and share[64, 8, 4104] > 7

# %% [markdown]
# One user, one key/value head, a short text: nothing. Many users *or* many heads *or* a large
# picture: a few per cent. Many users *and* heads *and* a large picture: seven times the weights. A
# good default costs nothing here: take the room at once.

# %% [markdown]
# ## A bug people really make: every token is the first
#
# A colleague writes the cached loop. The first word of each answer is right, always. Then it goes
# astray. Below, every step is given the *right* words so far; what comes next, and how far are the
# scores from those of one full pass?


# %%
def scores_cached(positions_of):
    """Scores of each word of `slow`: four words at once, then one by one."""
    cache, parts = KVCache(2, 1, 2, 15, 16), []
    for words in slow[:, :15].split([4] + [1] * 11, dim=1):
        old, new = len(cache), words.shape[1]
        parts.append(toy(words, positions_of(old, new)[None], causal(new, old), cache))
    return torch.cat(parts, dim=1)


def colleague(old, new):
    return torch.arange(new)


theirs = scores_cached(colleague)
gap = (theirs - full).abs().amax(-1)[0, 3:]
print("right: ", *(f"{word:4}" for word in slow[0, 4:].tolist()))
print("theirs:", *(f"{word:4}" for word in theirs.argmax(-1)[0, 3:].tolist()))
print("off by:", *(f"{g:4.1f}" for g in gap.tolist()))

# %% [markdown]
# The first word comes from the prefill: exact. All others are off. Before you read on: what differs
# between the first call and the second?
#
# The code says `torch.arange(L)`, with $L$ the number of words *given*. In decode $L = 1$, so every
# new word stands at position 0: before the whole text, all in one place. RoPE turns its query and
# its key by nothing. The five ways above started at `len(cache)` and were right.

# %% [markdown]
# The lesson: **compare cached with uncached, beyond the first token**. A test of the prefill alone
# cannot see it, and a demo that answers in one word looks perfect.
#
# ### A second one: the answer depends on the neighbours
#
# A batch needs prompts of one length, so short ones get pads on the left, which nobody may look at.
# The loop below takes the rule for positions as an argument. `real` is 1 for words and 0 for pads.


# %%
def answer_batch(model, ids, real, steps, rule):
    cache, new = KVCache(2, len(ids), 2, ids.shape[1] + steps, 16), ids
    for _ in range(steps):
        old, length = len(cache), new.shape[1]
        mask = causal(length, old) & real[:, None, None, :].bool()
        scores = model(new, rule(real, length), mask, cache)[:, -1]
        new = scores.argmax(-1, keepdim=True)
        ids = torch.cat((ids, new), dim=1)
        real = torch.cat((real, torch.ones_like(new)), dim=1)
    return ids[:, -steps:]


def count_real(real, length):
    return (real.cumsum(-1) - 1).clamp(min=0)[:, -length:]


def their_rule(real, length):
    return torch.arange(length).expand(len(real), -1) if length > 1 else count_real(real, 1)


# %% [markdown]
# The colleague fixed the first bug: a new word stands where the number of *real* words says. The
# prompt is still numbered from the left edge. The same short prompt, alone and beside a longer one:

# %%
short, long = [5, 17, 42], [9, 33, 7, 21, 60, 2, 50, 28]
alone, no_pads = torch.tensor([short]), torch.ones(1, 3, dtype=torch.long)
both = torch.tensor([[0] * 5 + short, long])
pads = (torch.arange(8) >= torch.tensor([[5], [0]])).long()
for name, rule in (("their rule", their_rule), ("real words everywhere", count_real)):
    print(f"{name}:")
    print("   alone     ", answer_batch(toy, alone, no_pads, 8, rule)[0].tolist())
    print("   in company", answer_batch(toy, both, pads, 8, rule)[0].tolist())

# %% [markdown]
# Alone, both rules agree: there are no pads. In company the prompt stands at 5, 6, 7 and its first
# new word at 3, *before* its own prompt. Nothing is raised; the answer changes with who else is in
# the batch.
#
# The cure is one rule for both phases. Slots and positions are two things: pads take slots in the
# cache, but no position.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): what may be kept?
#
# Ten words go through two layers. Then the **last** word is replaced. Which keys of the *nine words
# before it* change?
#
# - `"a"` layer 0, causal mask
# - `"b"` layer 1, causal mask
# - `"c"` layer 0, everyone sees everyone
# - `"d"` layer 1, everyone sees everyone
#
# Answer with a string of letters.

# %% tags=["exercise"]
answer = None  # your answer, such as "ab"


# %% tags=["check"]
def test_1(answer):
    letters = isinstance(answer, str) and set(answer) <= set("abcd")
    assert letters, "give a string of letters from a to d"
    before, place = torch.arange(10)[None], torch.arange(10)[None]
    after = torch.where(before == 9, 40, before)
    for mask, names in ((causal(10), "ab"), (None, "cd")):
        caches = [KVCache(2, 1, 2, 10, 16) for _ in range(2)]
        for ids, cache in zip((before, after), caches):
            toy(ids, place, mask, cache)
        for layer_idx, letter in enumerate(names):
            k, other = (cache.keys[layer_idx][:, :, :9] for cache in caches)
            changed = not torch.allclose(k, other, atol=1e-5)
            assert changed == (letter in answer), f"({letter}) {'changes' if changed else 'stays'}"


check(test_1, answer)

# %% [markdown]
# <details><summary>Hint</summary>
#
# From what is a key of layer 0 made? And one of layer 1: which words have been mixed into it?
#
# </details>

# %% tags=["solution"]
# A key of layer 0 comes from its own word. In layer 1 the last word has been mixed in, if seen.
answer = "d"
check(test_1, answer)

# %% [markdown]
# So one cannot keep the keys of a picture and ask a second question about it: in PaliGemma picture
# and prompt see each other ([lesson 15](15_model.ipynb)), and from layer 1 on the picture's keys know the question.

# %% [markdown]
# ### Exercise 2 (fill in): how many answers fit?
#
# A machine has `free` bytes left. Return how many answers of `length` tokens can be written at once
# in a model with the given `layers`, `kv_heads` and `head_dim`, at `size` bytes a number.


# %% tags=["exercise"]
def answers_that_fit(free, length, layers, kv_heads, head_dim, size=2):
    return None  # your code


# %% tags=["check"]
def test_2(answers_that_fit):
    cases = [(2**30, 264, 18, 1, 256, 2), (2**30, 264, 18, 8, 256, 2), (10**9, 1100, 26, 4, 256, 4)]
    for free, length, layers, kv_heads, head_dim, size in cases:
        dtype = {2: BF16, 4: torch.float32}[size]
        one = KVCache(layers, 1, kv_heads, length, head_dim, "meta", dtype).nbytes
        given = answers_that_fit(free, length, layers, kv_heads, head_dim, size)
        assert given is not None, "return a number"
        assert given != 2 * free // one, "keys and values: two tensors in each layer"
        assert given == free // one, f"{kv_heads} heads, {layers} layers: {free // one} fit"


check(test_2, answers_that_fit)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Bytes of one token: layers × 2 × kv_heads × head_dim × size. Half an answer does not count.
#
# </details>


# %% tags=["solution"]
def answers_that_fit(free, length, layers, kv_heads, head_dim, size=2):
    return free // (layers * 2 * kv_heads * head_dim * size * length)


check(test_2, answers_that_fit)

# %% [markdown]
# ### Exercise 3 (extend): go back
#
# After a wrong word, or for a second answer to the same prompt, one wants to forget the last tokens.
# With memory that is allocated once this needs no copy at all. Write
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
    cache.rewind(3)
    assert len(cache) == 3, f"len(cache) is {len(cache)} after rewind(3)"
    for layer_idx in range(2):
        keys, values = cache.update(layer_idx, k[:, :, 5:], v[:, :, 5:])
        want = torch.cat((k[:, :, :3], k[:, :, 5:]), dim=2)
        assert torch.equal(keys, want), f"layer {layer_idx}: the new token belongs after the third"
        assert values.shape == want.shape, f"layer {layer_idx}: values have another length"
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
        self._lengths = [length] * len(self._lengths)


check(test_3, RewindableCache)

# %% [markdown]
# ## Summary
#
# - Keys and values of earlier tokens never change as long as nobody looks at a later call: keep
#   them.
# - Prefill reads the prompt once; decode then sends one token a step through the model.
# - Growing by `cat` copies the whole past in every step; memory taken once copies nothing.
# - A token's position is the number of real tokens before it, in both phases.
# - The test that counts: any split into calls gives what one pass gives.

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
# **3.** The cache makes decoding cheap. Why does it do nothing for the time until the first word?
#
# <details><summary>Answer</summary>
#
# Before the first word every token of picture and prompt has to pass through all layers once. There
# is nothing to reuse yet; the cache is being filled.
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
