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
# *45 minutes* · part II, Language
#
# **What you will be able to do**
#
# - assemble a decoder from five parts you have built, and say what flows between them;
# - explain why a token meets the same matrix first and last;
# - see what a trained one would say after each block, and what surprises it;
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
from itertools import pairwise

import matplotlib.pyplot as plt
from safetensors.torch import load_file

from paligemma.image_processor import ImageProcessor
from paligemma.plotting import show_heatmap
from paligemma.siglip import SiglipVisionConfig, SiglipVisionModel
from paligemma.support.course import add_to_class, check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS
from paligemma.tokenizer import Tokenizer

torch.manual_seed(12)
_ = torch.set_grad_enabled(False)  # nothing is trained here

# %% [markdown]
# ## The problem
#
# In [lesson 11](11_kv_cache.ipynb) the parts wrote a caption. In which order do they stand?
# Where does a token enter, and how does a vector become a token again? A model that does this, one
# next token at a time, is called a **decoder**.
#
# The answer is one long line, the residual stream: each token has a vector of width $D$ that runs
# through all blocks. Parts read it and *add* to it. None replaces it.


# %% tags=["hide-input"]
def box(ax, x, y, text, colour):
    style = {"boxstyle": "round,pad=0.25", "fc": COLOURS["paper"], "ec": COLOURS[colour], "lw": 1.5}
    ax.text(x, y, text, ha="center", va="center", fontsize=9, bbox=style, zorder=3)


def arrow(ax, start, end, colour="ink", **style):
    style = {"arrowstyle": "-|>", "color": COLOURS[colour], "lw": 1.4} | style
    ax.annotate("", end, start, arrowprops=style, zorder=1)


fig, ax = plt.subplots(figsize=(9.5, 3.2), layout="constrained")
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
box(ax, 5.4, -1.35, "E: one matrix, a row for each token", "vision")
arrow(ax, (3.85, -1.35), (0.75, -0.4), "vision", ls="--")
arrow(ax, (6.95, -1.35), (10, -0.4), "vision", ls="--")
ax.text(0.05, 0, "token", ha="right", va="center")
ax.text(11.7, 0, "scores", ha="left", va="center")
ax.set(xlim=(-0.6, 12.4), ylim=(-1.7, 2))
ax.set_axis_off()
save_figure(fig, "12_decoder")

# %% [markdown]
# Two things to notice. Each part reads a **normalised** copy (pre-norm,
# [lesson 05](05_siglip.ipynb)), while the stream itself is never normalised until the end. And the
# blue matrix appears twice: it turns tokens into vectors, and vectors into scores of tokens. That is
# a **tied embedding**.

# %% [markdown]
# ## By hand: a Gemma without blocks
#
# Three tokens, width $D = 4$. What does a model say that has an embedding, a norm and a head, and
# nothing in between? Its scores, before any softmax, are called **logits**.
#
# With a pencil: "one" is $(1, 1, 0, 0)$, times $\sqrt 4$ gives $(2, 2, 0, 0)$. The mean square is
# $8/4 = 2$, so the norm divides by $\sqrt 2$. The logits are products with the three rows.

# %%
words = ["one", "two", "three"]
E = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1], [1, -1, 0, 0]])  # [V, D]


def show_logits(x):
    logits = E @ (x / x.square().mean().sqrt())  # [V]
    print(x.tolist(), "→", *(f"{word} {s:.2f}" for word, s in zip(words, logits.tolist())))


show_logits(2 * E[0])

# %% [markdown]
# It says "one" after "one". A vector is most like itself, so **a Gemma without blocks repeats the
# last token**. That tells us what blocks are for: they turn *which token I am* into *which token comes
# next*. Adding the right vector does it:

# %%
added = torch.tensor([-2.0, -2, 3, 3])  # what a block might add after "one"
show_logits(2 * E[0] + added)

# %% [markdown]
# ### Why times √D?
#
# As the head, a row of $E$ meets a normalised vector of length $\sqrt D$. For logits of moderate
# size its entries should be near $1/\sqrt D$. As the input, such a row would be a whisper beside
# what blocks add (entries near 1). One matrix, two jobs, two sizes; the factor $\sqrt D$ stands
# between them.


# %%
def size(t):
    return t.square().mean().sqrt().item()  # root mean square


D = 2048
table = torch.randn(1000, D) / D**0.5
print(f"entries of a row: {size(table):.3f}, times √D: {size(table * D**0.5):.2f}")
print(f"logits of a random normalised vector: {size(table @ torch.randn(D)):.1f}")

# %% [markdown]
# ## As a loop
#
# A whole Gemma, as plainly as possible: one token, one layer, one head at a time, and no class. Its
# weights are a dictionary: those of the small model that ships. Their names are the published ones.

# %%
tiny = {n: t.float() for n, t in load_file("../paligemma/assets/tiny/model.safetensors").items()}


def part(tensors, prefix):
    """The tensors whose names begin with `prefix`, under the rest of their names."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


# %%
weights = part(tiny, "language_model.model.")
V, D = weights["embed_tokens.weight"].shape
LAYERS, H, K, Dh = 4, 4, 1, 32  # layers, query heads, key/value heads, width of a head
for name, tensor in part(weights, "layers.0.").items():
    print(f"{name:33} {tuple(tensor.shape)}")

# %% [markdown]
# Norm ([lesson 07](07_rms_norm.ipynb)) and rotation ([lesson 09](09_rope.ipynb)), in a line or two:


# %%
def norm(x, weight):
    return x / (x.square().mean() + 1e-6).sqrt() * (1 + weight)


def turn(x, position):
    a, b = x.chunk(2)
    angle = position / 10000 ** (torch.arange(len(a)) / len(a))
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))


# %% [markdown]
# One block for one token. `kept` is the list of keys and values of this layer, one entry for each
# token so far: [lesson 11](11_kv_cache.ipynb)'s table. The loop is causal by construction: what comes
# later is not in the list yet.


# %%
def block_loop(w, x, position, kept):
    h = norm(x, w["input_layernorm.weight"])
    q = (w["self_attn.q_proj.weight"] @ h).split(Dh)  # H vectors of Dh numbers
    k = (w["self_attn.k_proj.weight"] @ h).split(Dh)  # K of them
    v = (w["self_attn.v_proj.weight"] @ h).split(Dh)  # K of them
    kept.append(([turn(key, position) for key in k], v))
    found = []
    for head in range(H):
        keys = torch.stack([ks[head // (H // K)] for ks, _ in kept])  # [S, Dh]
        values = torch.stack([vs[head // (H // K)] for _, vs in kept])  # [S, Dh]
        looks = (keys @ turn(q[head], position) / Dh**0.5).softmax(0)  # [S]
        found.append(looks @ values)
    x = x + w["self_attn.o_proj.weight"] @ torch.cat(found)  # added to the stream
    h = norm(x, w["post_attention_layernorm.weight"])
    gate = F.gelu(w["mlp.gate_proj.weight"] @ h, approximate="tanh")
    return x + w["mlp.down_proj.weight"] @ (gate * (w["mlp.up_proj.weight"] @ h))  # added again


# %% [markdown]
# Around it: look up, scale, run the blocks, normalise, compare with every row.


# %%
def gemma_loop(w, ids):
    kept, logits = [[] for _ in range(LAYERS)], []
    for position, token in enumerate(ids):
        x = w["embed_tokens.weight"][token] * D**0.5  # [D]
        for i in range(LAYERS):
            x = block_loop(part(w, f"layers.{i}."), x, position, kept[i])
        logits.append(w["embed_tokens.weight"] @ norm(x, w["norm.weight"]))  # [V]
    return torch.stack(logits)  # [L, V]


# %% [markdown]
# That is all of Gemma: some thirty lines. It reads a caption, for now without its picture.

# %%
tokenizer = Tokenizer("../paligemma/assets/tiny/tokenizer.model")
question = [tokenizer.bos_id, *tokenizer.encode("caption en"), tokenizer.newline_id]
ids = question + tokenizer.encode("a cat and two")
slow = gemma_loop(weights, ids)
print(tuple(slow.shape), "a cat and two …", tokenizer.decode([slow[-1].argmax()]))

# %% [markdown]
# ## The module
#
# Norm, attention and GeGLU were vectorised in their own lessons, so the whole can be put together at
# once, in three pieces. First the **config**: the numbers that tell one Gemma from another. The
# defaults are the language model inside PaliGemma 3B.


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
    max_position_embeddings: int = 8192  # tokens that a row may have, picture and answer included


# %% [markdown]
# Then the **block**. Its parts:


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


# %% [markdown]
# And two lines of arithmetic. Read them as "stream plus what attention found, plus what the GeGLU
# made of it".


# %%
#| export
@add_to_class(GemmaDecoderLayer)
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
# pass unchanged:

# %%
config = GemmaConfig(2240, 128, 256, LAYERS, H, K, Dh)  # the small model's sizes
block = GemmaDecoderLayer(config, layer_idx=0)
block.self_attn.o_proj.weight.zero_()
block.mlp.down_proj.weight.zero_()
x = torch.randn(2, 5, D)
cos, sin = RotaryEmbedding(Dh)(torch.arange(5)[None])
print("passes unchanged:", torch.equal(block(x, cos, sin), x))

# %% [markdown]
# Last the **model**. Embedding, blocks and head are three methods, not one, because PaliGemma puts
# vectors of a picture into the stream that come from no embedding, and because the head is costly
# and rarely needed for every position.
#
# Two things are left open: [lesson 13](13_gemma2.ipynb) builds the same model of other blocks, and
# [lesson 22](22_quantization.ipynb) puts a smaller head in place of the embedding.


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


# %% [markdown]
# The three methods in their simplest form:


# %%
#| export
@add_to_class(GemmaModel)
def embed(self, input_ids):
    return self.embed_tokens(input_ids) * self.config.hidden_size**0.5


# %%
#| export
@add_to_class(GemmaModel)
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
        position_ids: `int64[B, L]`, each token's position in its row.
        mask: `bool[B, 1, L, S]`, True where a query may look; None: everywhere.
        cache: keys and values of the tokens before; gains these L. S counts both.

    Returns:
        `float[B, L, D]` after the last norm.
    """
    cos, sin = self.rotary_emb(position_ids)
    x = inputs_embeds
    for layer in self.layers:
        x = layer(x, cos, sin, mask, cache)
    return self.norm(x)


# %%
#| export
@add_to_class(GemmaModel)
def logits(self, hidden):
    return F.linear(hidden, self.embed_tokens.weight)


# %% [markdown]
# The dictionary fits it name by name, and it computes what the loop computed. There is no tensor for
# the head: it is the embedding.


# %%
def causal(new, old=0):
    return torch.ones(1, 1, new, old + new, dtype=torch.bool).tril(diagonal=old)


# %%
gemma = GemmaModel(config)
gemma.load_state_dict(weights)
x = gemma.embed(torch.tensor([ids]))
hidden = gemma(x, torch.arange(len(ids))[None], causal(len(ids)))
torch.testing.assert_close(gemma.logits(hidden)[0], slow, rtol=1e-4, atol=1e-4)
print("hidden", tuple(hidden.shape), "| logits", tuple(gemma.logits(hidden).shape))

# %% [markdown]
# ### What a real program adds
#
# The published weights were trained with the factor rounded to *their* type. In bfloat16, which
# keeps 8 significant bits, $\sqrt{2048}$ is another number:

# %%
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    print(f"{dtype}: {torch.tensor(2048**0.5, dtype=dtype).item()}")

# %% [markdown]
# So the factor is made in the weights' type. The logits are always float32, and a head of its own
# goes first where there is one.


# %%
#| export
@add_to_class(GemmaModel)
def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
    """`int64[B, L]` → `float[B, L, D]`, scaled by √D.

    The factor is rounded to the weights' type first, as the reference does
    (√2048 = 45.2548… becomes 45.25 in bfloat16).
    """
    x = self.embed_tokens(input_ids)
    return x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype, device=x.device)


# %%
#| export
@add_to_class(GemmaModel)
def logits(self, hidden: torch.Tensor) -> torch.Tensor:
    """`float[B, L, D]` → `float32[B, L, V]` with the embedding as head (tied weights)."""
    if self.head is not None:
        return self.head(hidden).float()
    return F.linear(hidden, self.embed_tokens.weight).float()


# %% [markdown]
# ## Against the reference
#
# The file holds three small models of transformers (`GemmaForCausalLM`; four query heads with 4, 2
# and 1 key/value heads), tokens and logits. We compare one full pass, and the same tokens arriving as
# $4 + 1 + 1$ through a cache. (In half precision a test asks that our mean error is no larger than
# theirs.)


# %%
def in_calls(model, ids, sizes, cache):
    parts = []
    for new in ids.split(sizes, dim=1):
        old, length = len(cache), new.shape[1]
        positions = torch.arange(old, old + length).expand(len(ids), -1)
        parts.append(model(model.embed(new), positions, causal(length, old), cache))
    return model.logits(torch.cat(parts, dim=1))


# %%
reference = load_file("reference/gemma.safetensors")
for kind, kv_heads in (("mha", 4), ("gqa", 2), ("mqa", 1)):
    model = GemmaModel(GemmaConfig(24, 12, 20, 2, 4, kv_heads, 6))
    model.load_state_dict(part(reference, f"{kind}.weights."))
    for sizes in ([6], [4, 1, 1]):
        ours = in_calls(model, reference["ids"], sizes, KVCache(2, 2, kv_heads, 6, 6))
        gap = (ours - reference[f"{kind}.logits"]).abs().max().item()
        print(f"{kind} in {len(sizes)} calls: largest difference {gap:.1e}")
        assert gap <= 1e-5

# %% [markdown]
# ## See it: with a picture
#
# The stream takes any vectors of width $D$. So put the 64 vectors of a picture in front
# ([lesson 11](11_kv_cache.ipynb)), with the mask for a prefix: picture and question see all of each
# other.

# %%
sizes = SiglipVisionConfig(128, 512, 4, 4, image_size=112)
tower = SiglipVisionModel(sizes)
tower.load_state_dict(part(tiny, "vision_tower.vision_model."))
seen = tower(ImageProcessor(112)(sample_picture("scene")))  # a cat and two dogs
picture = F.linear(seen, **part(tiny, "multi_modal_projector.linear."))  # [1, 64, D]


# %%
def prefix_mask(length):
    mask = causal(length)
    mask[..., :68] = True  # 64 image tokens and the question
    return mask


# %%
def logits_after(model, answer):
    """What comes after the question and after each token of an answer: float[1 + L, V]."""
    x = torch.cat((picture, model.embed(torch.tensor([question + answer]))), dim=1)
    length = x.shape[1]
    hidden = model(x, torch.arange(length)[None], prefix_mask(length))
    return model.logits(hidden[:, 67:])[0]


# %% [markdown]
# Always taking the best token is called **greedy**. ([Lesson 17](17_sampling.ipynb) has other ways.)


# %%
def greedy(model, steps=8):
    ids = []
    while len(ids) < steps and tokenizer.eos_id not in ids:
        ids.append(logits_after(model, ids)[-1].argmax().item())
    return ids


# %%
caption = greedy(gemma)
print(repr(tokenizer.decode(caption)))
assert tokenizer.decode(caption) == "a cat and two dogs"

# %% [markdown]
# ### What happens between the blocks?
#
# The stream has the same width everywhere. So we may send it through the last norm and the head
# after *any* block, and ask what the model would say if it ended here. (This is called the *logit
# lens*.)


# %%
def stages(model, answer):
    """The stream after the embedding and after each block: [1 + layers, L, D]."""
    x = torch.cat((picture, model.embed(torch.tensor([question + answer]))), dim=1)
    length = x.shape[1]
    found, (cos, sin) = [x], model.rotary_emb(torch.arange(length)[None])
    for layer in model.layers:
        x = layer(x, cos, sin, prefix_mask(length))
        found.append(x)
    return torch.cat(found)


# %%
lens = gemma.logits(gemma.norm(stages(gemma, caption[:-1])))[:, 67:]  # [5, 6, V]
right = lens.softmax(-1)[:, range(6), caption]  # [5, 6]: probability of what really comes
given = [question[-1], *caption[:-1]]  # the tokens that go in
assert lens[0].argmax(-1).tolist() == given  # at first each says itself
assert lens[4].argmax(-1).tolist() == caption and right[0].max() < 0.01
three = tokenizer.encode("a cat and three")[-1]
assert right[2, 1] > 0.5 and lens[1:4, 3].argmax(-1).tolist() == [three] * 3


# %% tags=["hide-input"]
def shown(token):
    piece = tokenizer.sp.id_to_piece(int(token))
    return {"\n": "↵", "<eos>": "(end)"}.get(piece, piece.replace("▁", ""))


fig, ax = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
rows = ["embedding", *(f"block {i}" for i in range(1, 5))]
show_heatmap(right, rows=rows, columns=map(shown, given), ax=ax)
ax.set(title="the token that goes in", aspect="auto")
ax.xaxis.tick_top()
for (row, column), token in zip(
    ((r, c) for r in range(5) for c in range(6)), lens.argmax(-1).flatten()
):
    colour = COLOURS["paper" if right[row, column] > 0.5 else "ink"]
    ax.text(column, row, shown(token), ha="center", va="center", fontsize=10, color=colour)
save_figure(fig, "12_logit_lens")

# %% [markdown]
# Read down a column; dark means that the right next token is likely. At the embedding each token says
# *itself*, as the pencil said. Block by block the answer moves on to what *comes next*. After "a",
# "cat" is there in block 2. After "and", blocks 1 to 3 say "three"; only the last one says "two".

# %% [markdown]
# ### One matrix, used twice
#
# A row of $E$ is read when its token goes in and compared when it might come out. So it has to fit
# both roles. Which rows did training bring close to each other? (1 is the same direction.)

# %%
directions = F.normalize(weights["embed_tokens.weight"], dim=-1)
nearest = {}
for word in ("a cat", "a dog", "two dogs"):
    token = tokenizer.encode(word)[-1]
    values, found = (directions @ directions[token]).topk(4)
    nearest[word] = [tokenizer.sp.id_to_piece(i).strip("▁") for i in found.tolist()]
    print(*(f"{name} {v:.2f}" for name, v in zip(nearest[word], values.tolist())), sep=" | ")
assert nearest["a cat"][1:3] == ["chat", "Katzengesicht"]
assert nearest["a dog"][1:3] == ["chien", "Hundegesicht"]
assert nearest["two dogs"][1] == "Hundegesicht" and nearest["two dogs"][2][-1] == "s"

# %% [markdown]
# Nobody gave it a dictionary. "cat", the French "chat" and the German "Katzengesicht" were answers to
# the same pictures, and so their rows became alike. Beside "dogs" stands the German word again (it
# says "Hundegesicht ×2"), then other plurals.
#
# In the 3B model this matrix has 257,216 rows of 2,048. Used twice and stored once, it saves half a
# billion parameters.

# %% [markdown]
# ## How wrong is it?
#
# A model gave the probability $p$ to the token that really came. Its surprise is $-\log p$: 0 where
# it was sure, large where it thought it impossible. With the natural logarithm the unit is the
# **nat**. The mean over all tokens is the **cross-entropy**, the number that training makes small.
# Trained, untrained, and guessing blindly among 2,240 tokens:

# %%
untrained = GemmaModel(config)
nn.init.normal_(untrained.embed_tokens.weight, std=D**-0.5)
loss = {}
for name, model in (("trained", gemma), ("untrained", untrained)):
    logits = logits_after(model, caption[:-1])
    loss[name] = F.cross_entropy(logits, torch.tensor(caption)).item()
    print(f"{name:9} {loss[name]:5.2f} nats,", [shown(token) for token in logits.argmax(-1)])
blind = math.log(V)
print(f"blind     {blind:5.2f} nats")
assert loss["trained"] < 0.1 and loss["untrained"] > 1.15 * blind
assert logits.argmax(-1).tolist() == given

# %% [markdown]
# The untrained model is *worse* than blind guessing. It isn't undecided: its blocks add little, so it
# is sure that each token comes again, and always wrong.

# %% [markdown]
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
    where = next((part for key, part in keys.items() if key in name), "norms")
    parts[where] += p.numel()

# %%
total = sum(parts.values())
for name, count in (*parts.items(), ("total", total)):
    print(f"{name:17} {count:13,} {count / total:7.2%}")
assert total == 2_508_662_784 and 0.7 < parts["GeGLU"] / total < 0.75
eight = parts["attention"] + 18 * 2 * 7 * 256 * 2048  # as it would be with eight key/value heads
assert 1 / 7 < eight / parts["GeGLU"] < 1 / 5

# %% tags=["hide-input"]
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
looking = 18 * 4 * 8 * 256 * 264  # scores and values of 264 tokens, lesson 10
print(f"a token: {2 * matrices / 1e9:.2f} G operations, {2 * total / 1e9:.2f} GB read")
print(f"   and {looking / 1e9:.2f} G to look at 264 others")
assert looking < 0.01 * 2 * matrices

# %% [markdown]
# ### The head reads one position
#
# While the prefix is read, only the *last* position has to speak. What would it cost to let all 264
# speak?

# %%
head = 2 * 264 * parts["embedding = head"]
blocks = 2 * 264 * (matrices - parts["embedding = head"])
print(f"logits: {264 * 257_216 * 4 / 1e6:.0f} MB instead of {257_216 * 4 / 1e6:.0f} MB")
print(f"work: {head / 1e9:.0f} G operations beside {blocks / 1e9:.0f} G of all blocks")
assert 0.25 < head / blocks < 0.3

# %% [markdown]
# A quarter more work for numbers that nobody reads. That is why `logits_after` hands only
# `hidden[:, 67:]` to the head. The number of positions that speak is called `logits_to_keep`, here
# and in transformers; the whole model ([lesson 15](15_model.ipynb)) takes it as an argument, and all
# it does is this slice:

# %%
logits_to_keep = 1
last = gemma.logits(hidden[:, -logits_to_keep:])  # [B, 1, V]
torch.testing.assert_close(last, gemma.logits(hidden)[:, -1:])
print(tuple(hidden.shape), "→", tuple(last.shape))

# %% [markdown]
# ## A bug people really make: three patients
#
# Three colleagues each wrote a Gemma and loaded the trained weights. All shapes fit, nothing is
# raised. One forgot to scale the embedding, one made a head of its own, one multiplies by $w$
# instead of $1 + w$ in the norms:


# %%
class Unscaled(GemmaModel):
    def embed(self, input_ids):
        return self.embed_tokens(input_ids)


class Untied(GemmaModel):
    def logits(self, hidden):
        own = torch.randn(V, D, generator=torch.manual_seed(0)) / D**0.5  # never filled
        return F.linear(hidden, own)


def without_one(model):
    model = copy.deepcopy(model)
    for name, p in model.named_parameters():
        if "norm" in name:
            p -= 1  # (1 + w) becomes w
    return model


# %%
unscaled, untied = Unscaled(config), Untied(config)
unscaled.load_state_dict(weights)
untied.load_state_dict(weights)
patients = {"own head": untied, "plain w": without_one(gemma), "no √D": unscaled}
for name, model in {"healthy": gemma, **patients}.items():
    loss = F.cross_entropy(logits_after(model, caption[:-1]), torch.tensor(caption)).item()
    print(f"{name:8} {loss:5.1f} nats  {tokenizer.decode(greedy(model))!r}")
    assert (loss > 5) == (name in patients)

# %% [markdown]
# All three are sick, and the loss says no more than that. The better question is **where does it
# first differ from a healthy one?** Feed both the same tokens, compare the stream after each part,
# and look at the first place that is not zero. Where will it be for each of the three?


# %%
def all_places(model):
    streams = stages(model, caption[:-1])
    last = model.norm(streams[-1:])
    return [*streams, last, model.logits(last)]


columns = ["embedding", "block 1", "block 2", "block 3", "block 4", "norm", "logits"]
gaps = []
for model in patients.values():
    pairs = zip(all_places(model), all_places(gemma))
    gaps.append([((a - b).norm() / b.norm()).item() for a, b in pairs])
gaps = torch.tensor(gaps)
assert (gaps > 0).int().argmax(-1).tolist() == [6, 1, 0]

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(8, 2.3), layout="constrained")
title = "difference from the healthy model, relative to its size"
show_heatmap(gaps, title, rows=list(patients), columns=columns, annotate=".2f", ax=ax)
ax.set(aspect="auto")
ax.tick_params(axis="x", rotation=0)
for label in ax.get_xticklabels():
    label.set(rotation=0, ha="center")
save_figure(fig, "12_patients")

# %% [markdown]
# - *Own head* is healthy up to the last norm: its matrix was never filled.
# - *Plain w* embeds rightly, then the first block is wrong: its first norm is.
# - *No √D* is wrong from the first number on. (A little, as most of the sequence is picture; it never
#   recovers.)
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
order = None  # your answer, such as "abcde"


# %% tags=["check"]
def test_1(order):
    five = isinstance(order, str) and sorted(order) == list("abcde")
    assert five, "give each of the letters a to e once"
    fields = {"a": "vocab_size", "b": "num_hidden_layers", "c": "intermediate_size"}
    fields |= {"d": "num_attention_heads", "e": "num_key_value_heads"}
    added = {}
    for letter, name in fields.items():
        with torch.device("meta"):
            model = GemmaModel(GemmaConfig(**{name: 2 * getattr(GemmaConfig(), name)}))
        added[letter] = sum(p.numel() for p in model.parameters()) - total
    for left, right in pairwise(order):
        pair = " and ".join(sorted((left, right)))
        assert added[left] >= added[right], f"count {pair} again: which matrices of the bars grow?"


check(test_1, order)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The bars above give three of them at once. A query head brings a slice of `q_proj` *and* of
# `o_proj`.
#
# </details>

# %% tags=["solution"]
# b: attention + GeGLU + norms; c: GeGLU; a: embedding; d: q_proj and o_proj; e: k_proj and v_proj
order = "bcade"
check(test_1, order)

# %% [markdown]
# ### Exercise 2 (write): a model with a block less
#
# Blocks only add, so the rest still fits together when one is left out. Write the whole way of a
# Gemma from the stream to the logits, without block number `skip` (counted from 0). `model` has
# `layers`, `norm`, `rotary_emb` and `logits`; don't change it.


# %% tags=["exercise"]
def logits_without(model, skip, x, position_ids, mask):
    return None  # float[B, L, V]


# %% tags=["check"]
def test_2(logits_without):
    torch.manual_seed(0)
    x, mask = torch.randn(2, 6, D), causal(6)
    positions = torch.tensor([[0, 1, 4, 5, 9, 20]] * 2)
    for skip in (1, 3, 0):
        mine, model = copy.deepcopy(gemma), copy.deepcopy(gemma)
        try:
            given = logits_without(mine, skip, x, positions, mask)
        except (RuntimeError, TypeError, ValueError) as error:
            raise AssertionError(f"it stopped: {str(error).splitlines()[0]}") from None
        assert given is not None, "return the logits"
        assert given.shape == (2, 6, V), f"expected shape [2, 6, {V}], not {list(given.shape)}"
        kept = len(mine.layers) == LAYERS
        kept = kept and all(map(torch.equal, mine.parameters(), gemma.parameters()))
        assert kept, "the model itself was changed: who uses it next misses the block"
        same = lambda other: torch.allclose(given, other, atol=1e-3)
        assert not same(gemma.logits(gemma(x, positions, mask))), "no block is left out"
        del model.layers[skip]
        right = model.logits(model(x, positions, mask))
        assert not same(model.logits(model(x, positions))), "who may look at whom? mask"
        own = model.logits(model(x, torch.arange(6)[None], mask))
        assert not same(own), "use the positions that are given"
        model.norm = nn.Identity()
        assert not same(model.logits(model(x, positions, mask))), (
            "something stands behind all blocks"
        )
        assert same(right), f"skip = {skip}: not what the three other blocks give"


check(test_2, logits_without)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Look at `GemmaModel.forward`. `enumerate(model.layers)` gives numbers and blocks.
#
# </details>


# %% tags=["solution"]
def logits_without(model, skip, x, position_ids, mask):
    cos, sin = model.rotary_emb(position_ids)
    for i, layer in enumerate(model.layers):
        if i != skip:  # the stream passes by a block that is left out
            x = layer(x, cos, sin, mask)
    return model.logits(model.norm(x))


check(test_2, logits_without)

# %% [markdown]
# Which block does the caption need most?

# %%
x, lost = stages(gemma, caption[:-1])[:1], []
for skip in range(LAYERS):
    logits = logits_without(gemma, skip, x, torch.arange(73)[None], prefix_mask(73))[0, 67:]
    lost.append(F.cross_entropy(logits, torch.tensor(caption)).item())
    print(f"without block {skip + 1}: {lost[-1]:.2f} nats, {tokenizer.decode(logits.argmax(-1))!r}")
assert lost[0] > 5 and lost[1] < 0.2

# %% [markdown]
# The first: without it nothing is right. The second is hardly missed, here at least.

# %% [markdown]
# ### Exercise 3 (extend): a model is a proof-reader
#
# How surprised is a model by each token of an answer? `ids` is a list of tokens, the sign for the end
# included. Return `float[len(ids)]`, in nats. Where the surprise peaks, there is the mistake.


# %% tags=["exercise"]
def surprise(model, ids):
    return None  # one number a token


# %% tags=["check"]
def test_3(surprise):
    for text in ("a cat and two dogs", "a cat and two frogs", "two dogs and a cat"):
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        try:
            given = surprise(gemma, list(ids))
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise AssertionError(f"it stopped: {str(error).splitlines()[0]}") from None
        assert given is not None, "return a tensor"
        shape = tuple(getattr(given, "shape", ()))
        assert shape == (len(ids),), f"expected one number for each of {len(ids)} tokens: {shape}"
        logs = logits_after(gemma, ids[:-1]).log_softmax(-1)
        want = -logs[range(len(ids)), ids]
        same = lambda other: torch.allclose(given, other, atol=1e-3)
        assert not same(-want), "surprise is not negative"
        assert not same(want.neg().exp()), "these are the probabilities"
        assert not same(want / math.log(2)), "these are bits: nats use the natural logarithm"
        late = -logits_after(gemma, ids).log_softmax(-1)[1:][range(len(ids)), ids]
        assert not same(late), "each row must speak about the token that comes after it"
        assert same(want), "which row speaks about which token? And is it the log of a softmax?"


check(test_3, surprise)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `logits_after(model, answer)` has one row more than the answer has tokens: the first speaks about its
# first token. `F.cross_entropy` takes `reduction="none"`.
#
# </details>


# %% tags=["solution"]
def surprise(model, ids):
    # the row behind a token speaks about the next one, so the last token is never read
    return F.cross_entropy(logits_after(model, ids[:-1]), torch.tensor(ids), reduction="none")


check(test_3, surprise)

# %%
text = "a dog and two dogs"  # under a picture of a cat and two dogs
ids = [*tokenizer.encode(text), tokenizer.eos_id]
how = surprise(gemma, ids)
assert shown(ids[how.argmax()]) == "dog" and how.max() > 5

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(5.5, 2), layout="constrained")
ax.bar(range(len(ids)), how, color=COLOURS["language"])
ax.set_xticks(range(len(ids)), [shown(token) for token in ids])
ax.set(ylabel="surprise, nats", title="what is wrong with this caption?")
save_figure(fig, "12_surprise")

# %% [markdown]
# ## Summary
#
# - A decoder is a stream of vectors; attention and GeGLU read normalised copies and add to it.
# - Without blocks it repeats; blocks move a vector from *which token I am* to *which comes next*.
# - One matrix is embedding and head; $\sqrt D$ settles the two sizes.
# - A token costs two operations and, in bfloat16, two bytes for each parameter.
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
# are never looked up, but the head gives them logits. A model that expects 257,152 rows does not fit
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
