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
# [← KV cache](11_kv_cache.ipynb) | [contents](00_overview.ipynb) | [Gemma 2 →](13_gemma2.ipynb)

# %% [markdown]
# # 12 · Gemma: how do the pieces become a language model?
#
# *55 minutes* · part II, Language
#
# **What you will be able to do**
#
# - assemble a decoder from five parts you have built, and say what flows between them;
# - explain why a word meets the same matrix first and last;
# - train a small Gemma by heart and watch it recite;
# - count parameters, operations and bytes of the real one;
# - find the first place where a broken model goes wrong.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("gemma")

# %% [markdown]
# ## Setup
#
# Everything comes together: norm ([07](07_rms_norm.ipynb)), GeGLU ([08](08_geglu.ipynb)), RoPE
# ([09](09_rope.ipynb)), attention ([10](10_grouped_query_attention.ipynb)) and cache
# ([11](11_kv_cache.ipynb)). The cells with `#| export` become
# [gemma.py](../paligemma/gemma.py); the first is its opening.

# %%
#| export
"""The Gemma decoder: embedding, blocks, norm and a head that shares the embedding."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from paligemma.geglu import GeGLU
from paligemma.grouped_query_attention import GroupedQueryAttention
from paligemma.kv_cache import KVCache
from paligemma.rms_norm import RMSNorm
from paligemma.rope import RotaryEmbedding

# %% tags=["setup"]
import copy
import math
import time
from itertools import pairwise

import matplotlib.pyplot as plt
from safetensors.torch import load_file

from paligemma.grouped_query_attention import grouped_attention
from paligemma.plotting import show_heatmap
from paligemma.support.course import check, save_figure
from paligemma.support.drawing import COLOURS
from paligemma.rope import apply_rope

torch.manual_seed(12)
_ = torch.set_grad_enabled(False)  # switched on for the one cell that trains

# %% [markdown]
# ## The problem
#
# We have parts that work alone. In which order do they stand, what is added to what, where does a
# word enter, and how does a vector become a word again?
#
# The answer is one long line, the **residual stream**: each token has a vector of width $D$ that
# runs from bottom to top. Parts read it and *add* to it. None replaces it.


# %%
def box(ax, x, y, text, colour):
    style = {"boxstyle": "round,pad=0.25", "fc": COLOURS["paper"], "ec": COLOURS[colour], "lw": 1.5}
    ax.text(x, y, text, ha="center", va="center", fontsize=9, bbox=style, zorder=3)


def arrow(ax, start, end, colour="ink", **style):
    style = {"arrowstyle": "-|>", "color": COLOURS[colour], "lw": 1.4} | style
    ax.annotate("", end, start, arrowprops=style, zorder=1)


fig, ax = plt.subplots(figsize=(9, 3.1), layout="constrained")
arrow(ax, (0.2, 0), (11.6, 0), "language", lw=3)  # the stream
for x, name in ((3, "attention"), (5.9, "GeGLU")):
    arrow(ax, (x - 0.9, 0), (x - 0.9, 1.35))
    ax.plot([x - 0.9, x + 0.9], [1.4, 1.4], color=COLOURS["ink"], lw=1.4, zorder=1)
    arrow(ax, (x + 0.9, 1.4), (x + 0.9, 0.16))
    box(ax, x - 0.9, 0.75, "norm", "muted")
    box(ax, x, 1.4, name, "together")
    ax.text(x + 0.9, 0, "+", ha="center", va="center", fontsize=13, color="white", zorder=4,
            bbox={"boxstyle": "circle,pad=0.1", "fc": COLOURS["language"], "ec": "none"})  # fmt: skip
ax.add_patch(plt.Rectangle((1.55, -0.5), 5.75, 2.4, fill=False, ls=":", color=COLOURS["muted"]))
ax.text(7.2, 1.65, "one block × 18", ha="right", color=COLOURS["inside"])
box(ax, 8.3, 0, "norm", "muted")
box(ax, 0.75, 0, "row of E\n· √D", "vision")
box(ax, 10, 0, "product with\nevery row of E", "vision")
box(ax, 5.4, -1.35, "E: one matrix, a row for each word", "vision")
arrow(ax, (3.85, -1.35), (0.75, -0.4), "vision", ls="--")
arrow(ax, (6.95, -1.35), (10, -0.4), "vision", ls="--")
ax.text(0.05, 0, "word", ha="right", va="center")
ax.text(11.7, 0, "scores", ha="left", va="center")
ax.set(xlim=(-0.6, 12.4), ylim=(-1.7, 2))
ax.set_axis_off()
save_figure(fig, "12_decoder")

# %% [markdown]
# Two things to notice. Each part reads a **normalised** copy (*pre-norm*), while the stream itself
# is never normalised until the end. And the blue matrix appears twice: it turns words into vectors,
# and vectors into scores of words.

# %% [markdown]
# ## By hand: a Gemma without blocks
#
# Three words, width $D = 4$. What does a model say that has an embedding, a norm and a head, and
# nothing in between?
#
# With a pencil: "one" is $(1, 1, 0, 0)$, times $\sqrt 4$ gives $(2, 2, 0, 0)$. The mean square is
# $8/4 = 2$, so the norm divides by $\sqrt 2$. The scores are products with the three rows.

# %%
words = ["one", "two", "three"]
E = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1], [1, -1, 0, 0]])  # (V, D)


def normalise(x):
    return x / x.square().mean().sqrt()


def show_scores(x):
    scores = E @ normalise(x)  # (V,)
    print(x.tolist(), "→", *(f"{word} {s:.2f}" for word, s in zip(words, scores.tolist())))


show_scores(2 * E[0])

# %% [markdown]
# It says "one" after "one". A vector is most like itself, so **a Gemma without blocks repeats the
# last word**. That tells us what blocks are for: they turn *which word I am* into *which word comes
# next*. Adding the right vector does it:

# %%
added = torch.tensor([-2.0, -2, 3, 3])  # what a block might add after "one"
show_scores(2 * E[0] + added)

# %% [markdown]
# ### Why times √D?
#
# As the head, a row of $E$ meets a normalised vector of length $\sqrt D$. For scores of moderate
# size its entries should be near $1/\sqrt D$. As the input, such a row would be a whisper beside
# what blocks add (entries near 1). One matrix, two jobs, two sizes; the factor $\sqrt D$ stands
# between them.

# %%
D = 2048
table = torch.randn(1000, D) / D**0.5
size = lambda t: t.square().mean().sqrt().item()
print(f"entries of a row: {size(table):.3f}, times √D: {size(table * D**0.5):.2f}")
print(f"scores of a random normalised vector: {size(table @ torch.randn(D)):.1f}")

# %% [markdown]
# The published weights were trained with the factor rounded to *their* type. In bfloat16, which
# keeps 8 significant bits, $\sqrt{2048}$ is another number, and the reference multiplies by that
# one. (Positions must not be rounded so: bfloat16 cannot count above 256, [lesson 09](09_rope.ipynb).)

# %%
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    print(f"{dtype}: {torch.tensor(D**0.5, dtype=dtype).item()}")

# %% [markdown]
# ## As a loop
#
# A whole Gemma, as plainly as possible: one token, one layer, one head at a time, and no class.
# The weights are a dictionary; its names are those of the published files. All sizes differ, so
# that none can be mistaken for another. Then norm and rotation (lessons [07](07_rms_norm.ipynb) and [09](09_rope.ipynb)), in a line or two.

# %%
V, D, WIDE, LAYERS, H, K, Dh = 11, 16, 40, 2, 4, 2, 6
shapes = {"embed_tokens": (V, D), "norm": (D,)}
for i in range(LAYERS):
    shapes |= {
        f"layers.{i}.{name}": (D,) for name in ("input_layernorm", "post_attention_layernorm")
    }
    shapes |= {
        f"layers.{i}.self_attn.{p}_proj": (n * Dh, D) for p, n in (("q", H), ("k", K), ("v", K))
    }
    shapes |= {f"layers.{i}.self_attn.o_proj": (D, H * Dh), f"layers.{i}.mlp.down_proj": (D, WIDE)}
    shapes |= {f"layers.{i}.mlp.{p}_proj": (WIDE, D) for p in ("gate", "up")}
weights = {
    f"{name}.weight": torch.randn(shape) / shape[-1] ** 0.5 for name, shape in shapes.items()
}
print(len(weights), "tensors,", sum(w.numel() for w in weights.values()), "numbers")


# %%
def norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight)


def turn(x, position):
    a, b = x.chunk(2)
    angle = position / 10000 ** (torch.arange(len(a)) / len(a))
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))


# %% [markdown]
# One block for one token. `kept` is the list of keys and values of this layer, one entry for each
# token so far: [lesson 11](11_kv_cache.ipynb)'s table. The loop is causal by construction: what comes later is not in
# the list yet.


# %%
def block_loop(w, x, position, kept):
    h = norm(x, w["input_layernorm.weight"])
    q, k, v = ((w[f"self_attn.{p}_proj.weight"] @ h).split(Dh) for p in "qkv")
    kept.append(([turn(key, position) for key in k], v))
    found = []
    for head in range(H):
        keys = torch.stack([ks[head // (H // K)] for ks, _ in kept])  # (S, Dh)
        values = torch.stack([vs[head // (H // K)] for _, vs in kept])
        looks = (keys @ turn(q[head], position) / Dh**0.5).softmax(0)  # (S,)
        found.append(looks @ values)
    x = x + w["self_attn.o_proj.weight"] @ torch.cat(found)  # added to the stream
    h = norm(x, w["post_attention_layernorm.weight"])
    gate = F.gelu(w["mlp.gate_proj.weight"] @ h, approximate="tanh")
    return x + w["mlp.down_proj.weight"] @ (gate * (w["mlp.up_proj.weight"] @ h))  # added again


# %% [markdown]
# Around it: look up, scale, run the blocks, normalise, compare with every row.


# %%
def of_layer(w, i):
    prefix = f"layers.{i}."
    return {name.removeprefix(prefix): t for name, t in w.items() if name.startswith(prefix)}


def gemma_loop(w, ids):
    kept, scores = [[] for _ in range(LAYERS)], []
    for position, word in enumerate(ids):
        x = w["embed_tokens.weight"][word] * D**0.5  # (D,)
        for i in range(LAYERS):
            x = block_loop(of_layer(w, i), x, position, kept[i])
        scores.append(w["embed_tokens.weight"] @ norm(x, w["norm.weight"]))  # (V,)
    return torch.stack(scores)  # (L, V)


ids = [3, 1, 4, 1, 5, 9, 2]
slow = gemma_loop(weights, ids)
print(tuple(slow.shape), "best next words:", slow.argmax(-1).tolist())

# %% [markdown]
# That is all of Gemma: some thirty lines.
#
# ## Vectorised
#
# All tokens at once. The order of the lines is the same; the list of keys becomes an axis, and "not
# in the list yet" becomes the causal mask.


# %%
def causal(new, old=0):
    return torch.ones(1, 1, new, old + new, dtype=torch.bool).tril(diagonal=old)


def gemma_batched(w, ids):
    x = w["embed_tokens.weight"][ids] * D**0.5  # (B, L, D)
    cos, sin = RotaryEmbedding(Dh)(torch.arange(ids.shape[1])[None])
    for i in range(LAYERS):
        m = {name.removesuffix(".weight"): t for name, t in of_layer(w, i).items()}
        h = norm(x, m["input_layernorm"])
        q, k, v = (F.linear(h, m[f"self_attn.{p}_proj"]) for p in "qkv")
        q, k, v = (t.unflatten(-1, (-1, Dh)).transpose(1, 2) for t in (q, k, v))  # (B, H, L, Dh)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        found = grouped_attention(q, k, v, causal(ids.shape[1]))
        x = x + F.linear(found.transpose(1, 2).flatten(2), m["self_attn.o_proj"])
        h = norm(x, m["post_attention_layernorm"])
        gate = F.gelu(F.linear(h, m["mlp.gate_proj"]), approximate="tanh")
        x = x + F.linear(gate * F.linear(h, m["mlp.up_proj"]), m["mlp.down_proj"])
    return norm(x, w["norm.weight"]) @ w["embed_tokens.weight"].T  # (B, L, V)


fast = gemma_batched(weights, torch.tensor([ids, ids[::-1]]))
torch.testing.assert_close(fast[0], slow, rtol=1e-4, atol=1e-4)
print("row 0 equals the loop;", tuple(fast.shape))

# %% [markdown]
# ## The module
#
# Three pieces. First the **config**: the numbers that tell one Gemma from another. The defaults are
# the language model inside PaliGemma 3B. It holds numbers and no logic: a size that fits no
# attention is refused by attention, a width that cannot be turned by RoPE.


# %%
#| export
@dataclass
class GemmaConfig:
    """Shape of the language model; the defaults are Gemma 2B as PaliGemma uses it.

    Source: Gemma Team 2024, table 1; PaliGemma's published `config.json`.
    """

    vocab_size: int = 257216
    hidden_size: int = 2048
    intermediate_size: int = 16384
    num_hidden_layers: int = 18
    num_attention_heads: int = 8
    num_key_value_heads: int = 1
    head_dim: int = 256
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0


# %% [markdown]
# Then the **block**, two lines of arithmetic. Read them as "stream plus what attention found, plus
# what the GeGLU made of it".


# %%
#| export
class GemmaDecoderLayer(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GemmaConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = GroupedQueryAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            layer_idx,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GeGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """`float[B, L, D]` → `float[B, L, D]`; arguments as in `GroupedQueryAttention`."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


# %% [markdown]
# A block can only add. If the last matrix of both parts is zero it adds nothing and lets the stream
# pass unchanged. This is why deep stacks can be trained: a block starts as a small correction.

# %%
sizes = {"hidden_size": D, "intermediate_size": WIDE, "head_dim": Dh}
heads = {"num_attention_heads": H, "num_key_value_heads": K}
config = GemmaConfig(vocab_size=V, num_hidden_layers=LAYERS, **sizes, **heads)
block = GemmaDecoderLayer(config, layer_idx=0)
x = torch.randn(2, 5, D)
cos, sin = RotaryEmbedding(Dh)(torch.arange(5)[None])
print("shape kept:", block(x, cos, sin).shape == x.shape)
for part in (block.self_attn.o_proj, block.mlp.down_proj):
    part.weight.zero_()
print("passes unchanged:", torch.equal(block(x, cos, sin), x))

# %% [markdown]
# Last the **model**. Embedding, blocks and head are three methods, not one, because PaliGemma will
# put vectors of a picture into the stream that come from no embedding, and because the head is
# costly and rarely needed for every position. Its scores, before any softmax, are called **logits**.
#
# Two things are left open for later: [lesson 13](13_gemma2.ipynb) builds the same model of other
# blocks, and [lesson 22](22_quantization.ipynb) puts a smaller head in place of the embedding.


# %%
#| export
class GemmaModel(nn.Module):
    """The decoder without its picture: embeddings in, hidden states out, logits on demand.

    Source: Gemma Team 2024; `GemmaModel` in gemma_pytorch and transformers.
    """

    layer_class: type[nn.Module] = GemmaDecoderLayer

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            self.layer_class(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.head_dim, config.rope_theta)
        self.head: nn.Module | None = None  # None: the embedding; a quantised copy may take over

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`int64[B, L]` → `float[B, L, D]`, scaled by √D.

        The factor is rounded to the weights' type first, as the reference does
        (√2048 = 45.2548… becomes 45.25 in bfloat16).
        """
        x = self.embed_tokens(input_ids)
        return x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype, device=x.device)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Run the blocks.

        Args:
            inputs_embeds: `float[B, L, D]`, from `embed` or from pictures.
            position_ids: `int64[B, L]`, each token's place in its row.
            mask: `bool[B, 1, L, S + L]`, True where a query may look; None: everywhere.
            cache: keys and values of the S tokens before; gains these L.

        Returns:
            `float[B, L, D]` after the last norm.
        """
        cos, sin = self.rotary_emb(position_ids)
        x = inputs_embeds
        for layer in self.layers:
            x = layer(x, cos, sin, mask, cache)
        return self.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`float[B, L, D]` → `float32[B, L, V]` with the embedding as head (tied weights)."""
        if self.head is not None:
            return self.head(hidden).float()
        return F.linear(hidden, self.embed_tokens.weight).float()


# %% [markdown]
# Our dictionary fits it name by name, and the scores are those of the vectorised form. There is no
# tensor for the head: it is the embedding.

# %%
gemma = GemmaModel(config)
gemma.load_state_dict(weights)
two = torch.tensor([ids, ids[::-1]])
places = torch.arange(7).expand(2, -1)
hidden = gemma(gemma.embed(two), places, causal(7))
torch.testing.assert_close(gemma.logits(hidden), fast, rtol=1e-4, atol=1e-4)
print("hidden", tuple(hidden.shape), "| logits", tuple(gemma.logits(hidden).shape))

# %%
# refused by the part that cannot be built
for change in ({"num_key_value_heads": 3}, {"head_dim": 255}):
    try:
        with torch.device("meta"):
            GemmaModel(GemmaConfig(**change))
    except ValueError as error:
        print(error)

# %% [markdown]
# ## Against the reference
#
# The file holds three small models of transformers (`GemmaForCausalLM`; four query heads with 4, 2
# and 1 key/value heads), words and logits. We compare one full pass, and the same words arriving as
# $4 + 1 + 1$ through a cache. (In half precision a test asks that our mean error is no larger than
# theirs.)

# %% tags=["nbval-ignore-output"]
reference = load_file("reference/gemma.safetensors")
words_in, steps = reference["ids"], [4, 1, 1]
for kind, kv_heads in (("mha", 4), ("gqa", 2), ("mqa", 1)):
    model = GemmaModel(GemmaConfig(24, 12, 20, 2, 4, kv_heads, 6))
    prefix = f"{kind}.weights."
    model.load_state_dict(
        {n[len(prefix) :]: t for n, t in reference.items() if n.startswith(prefix)}
    )
    places = torch.arange(6).expand(2, -1)
    full = model.logits(model(model.embed(words_in), places, causal(6)))
    cache, parts = KVCache(2, 2, kv_heads, 6, 6), []
    for part, place in zip(words_in.split(steps, dim=1), places.split(steps, dim=1)):
        mask = causal(part.shape[1], len(cache))
        parts.append(model.logits(model(model.embed(part), place, mask, cache)))
    gaps = [
        (t - reference[f"{kind}.logits"]).abs().max().item() for t in (full, torch.cat(parts, 1))
    ]
    assert max(gaps) <= 1e-5
    print(f"{kind}: largest difference {gaps[0]:.1e}, with a cache {gaps[1]:.1e}")

# %% [markdown]
# ## See it: a Gemma that recites
#
# Random weights speak nonsense. So let us train a micro-Gemma, on one nursery rhyme, letter by
# letter. It will not know English; it will know this by heart. (Jane Taylor, 1806.) The sign `*`
# stands at both ends and means "begin" and "end".

# %%
RHYME = """*Twinkle, twinkle, little star,
How I wonder what you are!
Up above the world so high,
Like a diamond in the sky.
Twinkle, twinkle, little star,
How I wonder what you are!
*"""
LETTERS = sorted(set(RHYME))
rhyme = torch.tensor([[LETTERS.index(c) for c in RHYME]])  # (1, L + 1)
print(f"{rhyme.shape[1]} signs, {len(LETTERS)} different ones; guessing: loss {math.log(31):.2f}")

# %% [markdown]
# A small trap is built in: "what you are!" comes twice. Once "Up above" follows, once the end. To
# know which, the model must look back further than a line.
#
# Three blocks of width 64, one key/value head. The embedding begins with entries near $1/\sqrt D$,
# as worked out above.


# %%
def scores_of(model, ids):
    """Logits of a plain language model: every token sees those before it and itself."""
    length = ids.shape[1]
    return model.logits(model(model.embed(ids), torch.arange(length)[None], causal(length)))


def recite(model, steps=200):
    """Greedy: always the best letter, until the end sign."""
    ids = rhyme[:, :1]
    while ids.shape[1] <= steps:
        ids = torch.cat((ids, scores_of(model, ids)[:, -1].argmax(-1, keepdim=True)), dim=1)
        if ids[0, -1] == ids[0, 0]:
            break
    return "".join(LETTERS[i] for i in ids[0])


micro = GemmaModel(GemmaConfig(len(LETTERS), 64, 128, 3, 4, 1, 16))
nn.init.normal_(micro.embed_tokens.weight, std=64**-0.5)
repeats = (scores_of(micro, rhyme).argmax(-1) == rhyme).float().mean()
print(f"untrained, it repeats its last letter in {repeats:.0%} of all places")

# %% [markdown]
# The pencil was right: untrained blocks add little, so it repeats. Now the training. In each step
# the model sees the whole rhyme and is asked, at *every* position, for the next letter; the causal
# mask makes this fair. ([Lesson 27](27_training.ipynb) treats training properly.)

# %% tags=["nbval-ignore-output"]
threads = torch.get_num_threads()
torch.set_num_threads(1)  # for a model this small, threads mostly wait for each other
optimizer = torch.optim.Adam(micro.parameters(), lr=3e-3)
start = time.perf_counter()
with torch.enable_grad():
    for step in range(101):
        loss = F.cross_entropy(scores_of(micro, rhyme[:, :-1])[0], rhyme[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 0:
            first = loss.item()
        if step % 20 == 0:
            print(f"step {step:3}: loss {loss.item():.3f}")
print(f"{time.perf_counter() - start:.1f} s")
assert first > 2 * math.log(31)

# %%
said = recite(micro)
print(said)
assert said == RHYME

# %% [markdown]
# It recites, and stops at the right "are!". One forward pass for each letter, nothing looked up.
#
# The first loss was more than twice that of blind guessing. The untrained model isn't undecided: it
# is *sure* that each letter comes again, and nearly always wrong.
#
# ### What happens between the blocks?
#
# The stream has the same width everywhere, so we may send it through the last norm and the head
# after *any* block, and ask what the model would say if it ended here (the *logit lens*).


# %%
def stages(model, ids):
    """The stream after the embedding and after each block, the last norm, the logits."""
    x = model.embed(ids)
    found, (cos, sin) = [x], model.rotary_emb(torch.arange(ids.shape[1])[None])
    for layer in model.layers:
        x = layer(x, cos, sin, causal(ids.shape[1]))
        found.append(x)
    return [*found, model.norm(x), model.logits(model.norm(x))]


def visible(text):
    return text.replace("\n", "↵").replace(" ", "␣")


def say(scores):
    return visible("".join(LETTERS[i] for i in scores.argmax(-1)))


streams = stages(micro, rhyme[:, :-1])[:4]
lens = [micro.logits(micro.norm(x))[0] for x in streams]  # (L, V) each
rows = ["embedding", "block 1", "block 2", "block 3"]
right = [scores.softmax(-1).gather(1, rhyme[0, 1:, None])[:, 0] for scores in lens]

fig, axes = plt.subplots(2, 1, figsize=(9, 3.6), layout="constrained")
for ax, start in zip(axes, (0, 144)):
    part = slice(start, min(start + 28, rhyme.shape[1] - 1))
    letters_in = visible(RHYME[part])
    show_heatmap(torch.stack(right)[:, part], rows=rows, columns=letters_in, ax=ax)
    ax.set(title="the letter that goes in", aspect="auto")
    ax.xaxis.tick_top()
    for row, scores in enumerate(lens):
        for column, letter in enumerate(say(scores[part])):
            dark = right[row][start + column] > 0.5
            colour = COLOURS["paper"] if dark else COLOURS["ink"]
            ax.text(column, row, letter, ha="center", va="center", fontsize=8, color=colour)
after_k = [i for i, letter in enumerate(RHYME[:-1]) if letter == "k"]
assert right[1][after_k].mean() > right[1].mean() + 0.1
print(f"after block 1: {right[1].mean():.2f}, after the letter k {right[1][after_k].mean():.2f}")
save_figure(fig, "12_logit_lens")

# %% [markdown]
# Read down a column. At the embedding each letter says *itself*. Block by block the answer moves on
# to the letter that *comes next*; dark means that the right one is likely. After "k" the next letter
# is settled earlier than elsewhere: few letters follow it. In the lower part the last column is the
# trap: after this "!↵" comes the end.

# %% [markdown]
# ### One matrix, used twice
#
# The same matrix $E$ of the trained model, at one step. Left: the letter that goes in takes its row.
# Right: after three blocks the vector is compared with every row, and the best one speaks.

# %%
at = RHYME.index("w")  # the letter that goes in
names = list(visible("".join(LETTERS)))
row_in, scores = rhyme[0, at].item(), lens[-1][at]
fig, axes = plt.subplots(1, 2, figsize=(8.2, 4.6), width_ratios=[2.3, 1], layout="constrained")
show_heatmap(
    micro.embed_tokens.weight, "E, a row for each letter", rows=names, centre=0, ax=axes[0]
)
axes[0].set(aspect="auto", xlabel="64 channels")
edge = {"fill": False, "lw": 2, "ec": COLOURS["bad"]}
axes[0].add_patch(plt.Rectangle((-0.5, row_in - 0.5), 64, 1, **edge))
best = scores.argmax().item()
colours = [COLOURS["language"] if i == best else COLOURS["muted"] for i in range(len(names))]
axes[1].barh(range(len(names)), scores, color=colours)
axes[1].set(ylim=(len(names) - 0.5, -0.5), xlabel="score = row · vector")
axes[1].set(title=f"in: {names[row_in]}, out: {names[best]}")
axes[1].set_yticks(range(len(names)), names)
for ax in axes:
    ax.tick_params(axis="y", labelsize=7)
save_figure(fig, "12_tied")

# %% [markdown]
# In the 3B model this matrix has 257,216 rows of 2,048. Used twice and stored once, it saves half a
# billion parameters, and each word is learned in both of its roles at the same time.
#
# ## At full size
#
# On the `meta` device the default config builds the real model without its 5 GB. Where are its
# parameters?

# %%
with torch.device("meta"):
    big = GemmaModel(GemmaConfig())
parts = dict.fromkeys(("embedding = head", "attention", "GeGLU", "norms"), 0)
keys = {"embed_tokens": "embedding = head", "self_attn": "attention", "mlp": "GeGLU"}
for name, p in big.named_parameters():
    part = next((part for key, part in keys.items() if key in name), "norms")
    parts[part] += p.numel()
total = sum(parts.values())
assert total == 2_508_662_784
eight = parts["attention"] + 18 * 2 * 7 * 256 * 2048  # as it would be with eight key/value heads
assert 0.15 < eight / parts["GeGLU"] < 0.2
for name, count in (*parts.items(), ("total", total)):
    print(f"{name:17} {count:13,} {count / total:7.2%}")

fig, ax = plt.subplots(figsize=(7, 1.9), layout="constrained")
ax.barh(list(parts), [n / 1e6 for n in parts.values()], color=COLOURS["language"])
ax.set(xlabel="million parameters", xlim=(0, 2100))
ax.invert_yaxis()
for i, count in enumerate(parts.values()):
    ax.text(count / 1e6 + 15, i, f"{count / 1e6:,.1f}", va="center")
save_figure(fig, "12_parameters")

# %% [markdown]
# Nearly three quarters are GeGLU, because it is $8 \cdot D$ wide. Attention is small beside it, and
# would be with eight key/value heads too: a sixth of the GeGLU. "2B" is a modest name for 2.5 billion.
#
# Each weight of a matrix is used once for a token: one product, one sum. The look-up is free. So a
# token costs about **two operations and two bytes for each parameter** (in bfloat16).

# %%
matrices = total - parts["norms"]
context = 18 * 4 * 8 * 256 * 264  # scores and values of 264 tokens, lesson 10
print(
    f"operations a token: {2 * matrices / 1e9:.2f} G, attention to 264 tokens {context / 1e9:.2f} G"
)
print(f"bytes read a token: {2 * total / 1e9:.2f} GB")
for bandwidth in (20, 50, 1000, 3000):
    print(
        f"   memory of {bandwidth:4} GB/s: at most {bandwidth * 1e9 / (2 * total):6.1f} tokens a second"
    )

# %% [markdown]
# For one answer the processor could calculate far more than it gets to read: decoding waits for
# memory. How fast is this machine? One block of the real width, one token, bfloat16, measured and
# extended to the whole model.

# %% tags=["nbval-ignore-output"]
with torch.device("meta"):
    one = GemmaDecoderLayer(GemmaConfig(), 0).bfloat16()
one = one.to_empty(device="cpu")
for p in one.parameters():
    p.fill_(0.01)
x, (cos, sin) = (
    torch.ones(1, 1, 2048, dtype=torch.bfloat16),
    RotaryEmbedding(256)(torch.zeros(1, 1)),
)
torch.set_num_threads(threads)
times = []
for _ in range(8):
    start = time.perf_counter()
    one(x, cos, sin)
    times.append(time.perf_counter() - start)
size = sum(p.nbytes for p in one.parameters())
print(
    f"one block: {1e3 * min(times):.1f} ms for {size / 1e6:.0f} MB, {size / min(times) / 1e9:.0f} GB/s"
)
print(f"the whole model at this pace: {size / min(times) / (2 * total):.1f} tokens a second")
del one

# %% [markdown]
# ### The head during prefill
#
# While the prompt is read, only the *last* position has to speak. What would it cost to let all 264
# speak?

# %%
rows, vocabulary, width = 264, 257_216, 2048
print(
    f"logits: {rows * vocabulary * 4 / 1e6:.0f} MB in float32 instead of {vocabulary * 4 / 1e6:.0f} MB"
)
body = 2 * (matrices - parts["embedding = head"]) * rows
print(
    f"work: {2 * rows * vocabulary * width / 1e9:.0f} G operations beside {body / 1e9:.0f} G of all blocks"
)

# %% [markdown]
# A quarter more work for numbers that nobody reads. So only the positions that count go through the
# head. The number of them is called `logits_to_keep`, here and in transformers; the whole model
# ([lesson 15](15_model.ipynb)) takes it as an argument, and all it does is this slice:

# %%
logits_to_keep = 1
hidden = gemma(gemma.embed(two), torch.arange(7).expand(2, -1), causal(7))
last = gemma.logits(hidden[:, -logits_to_keep:])  # (B, 1, V)
torch.testing.assert_close(last, gemma.logits(hidden)[:, -1:])
print(tuple(hidden.shape), "→", tuple(last.shape))

# %% [markdown]
# ## A bug people really make: three patients
#
# Three colleagues each wrote a Gemma and loaded our trained weights. All shapes fit, nothing is
# raised. Loss on the rhyme, and the first letters they recite:


# %% tags=["nbval-ignore-output"]
class Unscaled(GemmaModel):
    def embed(self, input_ids):
        return self.embed_tokens(input_ids)


class Untied(GemmaModel):
    def logits(self, hidden):
        head = torch.randn(self.embed_tokens.weight.shape, generator=torch.manual_seed(0)) / 8
        return F.linear(hidden, head)


def without_one(model):
    model = copy.deepcopy(model)
    for name, p in model.named_parameters():
        if "norm" in name:
            p -= 1  # (1 + w) becomes w
    return model


patients = {"A": Untied(micro.config), "B": without_one(micro), "C": Unscaled(micro.config)}
patients["A"].load_state_dict(micro.state_dict())
patients["C"].load_state_dict(micro.state_dict())
for name, model in {"healthy": micro, **patients}.items():
    loss = F.cross_entropy(scores_of(model, rhyme[:, :-1])[0], rhyme[0, 1:]).item()
    print(f"{name:8} loss {loss:.1f}  {recite(model, 24)!r}")

# %% [markdown]
# Guessing blindly gives a loss of 3.4. B guesses, A is worse than that, C stammers. That says
# "broken", and no more.
#
# The better question is **where does it first differ from a healthy one?** Feed both the same
# letters, compare the stream after each part, and look at the first place that is not zero.

# %%
healthy = stages(micro, rhyme[:, :-1])
columns = ["embed", "block 1", "block 2", "block 3", "norm", "logits"]
gaps = [
    [((a - b).norm() / b.norm()).item() for a, b in zip(stages(model, rhyme[:, :-1]), healthy)]
    for model in patients.values()
]
fig, ax = plt.subplots(figsize=(6, 2.2), layout="constrained")
title = "difference from the healthy model, relative to its size"
show_heatmap(gaps, title, rows=list(patients), columns=columns, annotate=".1f", ax=ax)
ax.set(aspect="auto")
save_figure(fig, "12_patients")

# %% [markdown]
# Before you read on: three bugs are *the embedding is not scaled*, *the head is a matrix of its own*
# and *the norms multiply by $w$ instead of $1 + w$*. Who has which?

# %% [markdown]
# - **A** is healthy up to the last norm: a separate head was made and never filled (loading was
#   not strict, [lesson 16](16_checkpoint.ipynb)).
# - **B** embeds rightly, then the first block is wrong: $w$ alone is close to 0, so every norm
#   silences its part, the last one the logits.
# - **C** is wrong from the first number on: $\sqrt D$ is missing. It never recovers.
#
# The lesson: loss says *that*, the first difference says *where*.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): what makes it big?
#
# Each of these numbers of the 3B model is doubled, one at a time. Order them by how many parameters
# that adds, the most first:
#
# - `"a"` `vocab_size`
# - `"b"` `num_hidden_layers`
# - `"c"` `intermediate_size`
# - `"d"` `num_attention_heads`
# - `"e"` `num_key_value_heads`
#
# Answer with a string of five letters.

# %% tags=["exercise"]
answer = None  # your answer, such as "abcde"


# %% tags=["check"]
def test_1(answer):
    five = isinstance(answer, str) and sorted(answer) == list("abcde")
    assert five, "give each of the letters a to e once"
    fields = {"a": "vocab_size", "b": "num_hidden_layers", "c": "intermediate_size"}
    fields |= {"d": "num_attention_heads", "e": "num_key_value_heads"}
    added = {}
    for letter, name in fields.items():
        with torch.device("meta"):
            model = GemmaModel(GemmaConfig(**{name: 2 * getattr(GemmaConfig(), name)}))
        added[letter] = sum(p.numel() for p in model.parameters()) - total
    for left, right in pairwise(answer):
        assert added[left] >= added[right], f"({right}) adds more than ({left})"


check(test_1, answer)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The bars above give three of them at once. A query head brings a slice of `q_proj` *and* of
# `o_proj`.
#
# </details>

# %% tags=["solution"]
# b: attention + GeGLU + norms; c: GeGLU; a: embedding; d: q_proj and o_proj; e: k_proj and v_proj
answer = "bcade"
check(test_1, answer)

# %% [markdown]
# ### Exercise 2 (fill in): recite with a cache
#
# `recite` sends the whole text through the model for each letter. Write it with a `KVCache`: the
# first call gets `ids`, every later one a single letter. Return `int64[1, L + steps]`, the given
# ids and `steps` new ones. The check counts what is fed.


# %% tags=["exercise"]
def recite_cached(model, ids, steps):
    return None  # your loop


# %% tags=["check"]
def test_2(recite_cached):
    for start, steps in ((1, 60), (40, 20), (120, 30)):
        fed = []
        hook = lambda module, args, out: fed.append(args[0].numel())
        handle = micro.embed_tokens.register_forward_hook(hook)
        try:
            given = recite_cached(micro, rhyme[:, :start], steps)
        finally:
            handle.remove()
        assert given is not None, "return the ids"
        assert given.shape == (1, start + steps), f"expected shape (1, {start + steps})"
        same = (given == rhyme[:, : start + steps])[0].tolist()
        assert all(same), f"from {start} letters on: letter {same.index(False)} is wrong"
        assert sum(fed) <= start + steps, (
            f"{sum(fed)} letters were fed; {start + steps - 1} suffice"
        )
    torch.manual_seed(0)
    wild = GemmaModel(micro.config)  # the rhyme forgives what random weights do not
    for p in wild.layers.parameters():
        p.mul_(4)
    ids = rhyme[:, :40]
    for _ in range(10):
        ids = torch.cat((ids, scores_of(wild, ids)[:, -1].argmax(-1, keepdim=True)), dim=1)
    given = recite_cached(wild, rhyme[:, :40], 10)
    assert torch.equal(given, ids), "with random weights it differs: who sees whom in the prefill?"


check(test_2, recite_cached)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `KVCache(3, 1, 1, ids.shape[1] + steps, 16)` fits `micro`. Positions run from `len(cache)`, read
# *before* the call. The first call needs `causal(ids.shape[1])`; later ones need no mask.
#
# </details>


# %% tags=["solution"]
def recite_cached(model, ids, steps):
    cache, new = KVCache(3, 1, 1, ids.shape[1] + steps, 16), ids
    for _ in range(steps):
        old, length = len(cache), new.shape[1]
        places = torch.arange(old, old + length)[None]
        hidden = model(model.embed(new), places, causal(length, old), cache)
        new = model.logits(hidden[:, -1:]).argmax(-1)  # (1, 1)
        ids = torch.cat((ids, new), dim=1)
    return ids


check(test_2, recite_cached)

# %% [markdown]
# ### Exercise 3 (extend): a model is a proof-reader
#
# How surprised is a model by each letter of a text? Surprise is $-\ln p$, with $p$ the probability
# it gave to the letter that really came. Return `float[L - 1]`: one number for each letter but the
# first. Where the surprise peaks, there is the misprint.


# %% tags=["exercise"]
def surprise(model, ids):
    return None  # ids: int64[1, L]


# %% tags=["check"]
def test_3(surprise):
    for at, letter in ((12, "T"), (50, "m"), (100, "g")):
        text = rhyme.clone()
        text[0, at] = LETTERS.index(letter)  # a misprint
        given = surprise(micro, text)
        assert given is not None and given.shape == (len(RHYME) - 1,), "a number a letter but one"
        p = scores_of(micro, text)[0].softmax(-1)
        want = torch.stack([-p[i, text[0, i + 1]].log() for i in range(len(RHYME) - 1)])
        assert not torch.allclose(given, -want, atol=1e-3), "surprise is not negative: -ln p"
        assert torch.allclose(given, want, atol=1e-3), "score i is about letter i + 1"


check(test_3, surprise)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `scores_of(model, ids)[0, i]` is about letter $i + 1$. `log_softmax` and `gather`, or
# `F.cross_entropy` with `reduction="none"`.
#
# </details>


# %% tags=["solution"]
def surprise(model, ids):
    return F.cross_entropy(scores_of(model, ids[:, :-1])[0], ids[0, 1:], reduction="none")


check(test_3, surprise)

# %%
typo = RHYME[:31].replace("little", "lattle")
how = surprise(micro, torch.tensor([[LETTERS.index(c) for c in typo]]))
fig, ax = plt.subplots(figsize=(7.4, 2), layout="constrained")
ax.bar(range(1, len(typo)), how, color=COLOURS["language"])
ax.set_xticks(range(len(typo)), typo)
_ = ax.set(ylabel="surprise, nats", title="where is the misprint?")

# %% [markdown]
# ## Summary
#
# - A decoder is a stream of vectors; attention and GeGLU read normalised copies and add to it.
# - Without blocks it repeats; blocks move a vector from *which word I am* to *which comes next*.
# - One matrix is embedding and head; $\sqrt D$ settles the two sizes.
# - A token costs two operations and, in bfloat16, two bytes for each parameter: memory sets the pace.
# - Look for the *first* difference from a healthy model.

# %% [markdown]
# ## Quiz
#
# **1.** Why is there a norm before the head, when each block has norms already?
#
# <details><summary>Answer</summary>
#
# The norms in a block act on copies. The stream itself grows with each addition, and its length
# would set the scale of the logits: the deeper the model, the more certain it would look. The last
# norm removes the length and keeps the direction.
#
# </details>

# %% [markdown]
# **2.** The embedding has 257,216 rows, although the highest token number is 257,152. Does it matter?
#
# <details><summary>Answer</summary>
#
# The number of rows is rounded up to a multiple of 64, which suits matrix kernels. The spare rows
# are never looked up, but the head gives them scores. A model that expects 257,152 rows does not fit
# the file and has no row for `<image>`.
#
# </details>

# %% [markdown]
# **3.** A token costs two operations for each parameter. Why not for the embedding *twice*, once in
# and once out?
#
# <details><summary>Answer</summary>
#
# On the way in, one row is copied: no products. On the way out, the vector meets every row. The
# matrix is used twice and multiplied once.
#
# </details>

# %% [markdown]
# ## References
#
# - Gemma Team, *Gemma: Open Models Based on Gemini Research and Technology*, 2024, section 2 and
#   table 1.
# - Ofir Press and Lior Wolf, *Using the Output Embedding to Improve Language Models*, 2017 (tied
#   weights).
# - Ruibin Xiong et al., *On Layer Normalization in the Transformer Architecture*, 2020 (pre-norm).
# - gemma_pytorch: `gemma/model.py`, classes `GemmaDecoderLayer` and `GemmaModel`; transformers:
#   `models/gemma/modeling_gemma.py`, class `GemmaForCausalLM`.

# %% [markdown] tags=["navigation"]
# [← KV cache](11_kv_cache.ipynb) | [contents](00_overview.ipynb) | [Gemma 2 →](13_gemma2.ipynb)
