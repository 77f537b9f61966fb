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
# [← Processor](14_processor.ipynb) | [contents](00_overview.ipynb) | [Checkpoint →](16_checkpoint.ipynb)

# %% [markdown]
# # 15 · PaliGemma: how do a picture and a sentence become one sequence?
#
# *60 minutes* · part III, Together
#
# **What you will be able to do**
#
# - join a vision tower and a language model with one linear layer and one replacement;
# - write the prefix-LM mask from one rule, for padding and for a cache as well;
# - say what the whole model costs: parameters, operations and bytes, at 224, 448 and 896 pixels;
# - expose a loss that is too good, and a mask that no loss shows to be wrong.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("model")

# %% [markdown]
# ## Setup
#
# This is where everything meets: the vision tower ([lesson 05](05_siglip.ipynb)), the decoder ([lesson 12](12_gemma.ipynb)), the cache
# ([lesson 11](11_kv_cache.ipynb)), and in the notebook also `ImageProcessor`
# ([lesson 02](02_image_processor.ipynb)) and `collate` ([lesson 14](14_processor.ipynb)). The cells
# that begin with `#| export` become [model.py](../paligemma/model.py).

# %%
#| export
"""PaliGemma: vision tower, projector and language model over one prefix-LM sequence."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from paligemma.gemma import GemmaConfig, GemmaModel
from paligemma.gemma2 import Gemma2Config, Gemma2Model
from paligemma.kv_cache import KVCache
from paligemma.siglip import SiglipVisionConfig, SiglipVisionModel

# %% tags=["setup"]
import math
import time

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from paligemma.image_processor import ImageProcessor
from paligemma.plotting import show_heatmap
from paligemma.processor import collate
from paligemma.support.course import add_to_class, check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS

_ = torch.manual_seed(15)

# %% [markdown]
# ## The problem
#
# A vision tower turns a picture into vectors. A language model turns vectors into the next word.
# Both are trained and finished. How do you make the second *read* what the first has seen?
#
# PaliGemma's answer is almost shamefully simple: put the picture's vectors at the front of the
# sentence, as if they were words.

# %%
words = "what animal ? ↵ a cat ■".split()
names = [*[f"{i}" for i in range(9)], "▸", *words]
kinds = ["image"] * 9 + ["prompt"] * 5 + ["suffix"] * 3
KIND_COLOURS = {
    "image": COLOURS["vision"],
    "prompt": COLOURS["language"],
    "suffix": COLOURS["accent"],
    "padding": COLOURS["muted"],
}
looks = {  # who looks → how many tokens it may see, from the left
    "patch 4 sees": (4, 14),
    "“animal” sees": (11, 14),
    "“a” sees": (14, 15),
    "“cat” sees": (15, 16),
}
fig, ax = plt.subplots(figsize=(7, 2.3), layout="constrained")
cat = sample_picture("cat").resize((300, 300))
for i, (name, kind) in enumerate(zip(names, kinds)):
    if kind == "image":
        x, y = i % 3 * 100, i // 3 * 100
        ax.imshow(cat.crop((x, y, x + 100, y + 100)), extent=(i - 0.45, i + 0.45, 0, 0.9))
    else:
        ax.add_patch(plt.Rectangle((i - 0.46, 0), 0.92, 0.9, color=KIND_COLOURS[kind], alpha=0.25))
        ax.text(i, 0.45, name, ha="center", va="center", fontsize=6.8)
for row, (label, (i, seen)) in enumerate(looks.items()):
    y = -0.75 - 0.75 * row
    ax.text(-0.8, y, label, ha="right", va="center", fontsize=8)
    ax.scatter(range(seen), [y] * seen, s=24, color=[KIND_COLOURS[k] for k in kinds[:seen]])
    ax.scatter(range(seen, 17), [y] * (17 - seen), s=6, color=COLOURS["muted"])
    ax.scatter(i, y, s=95, facecolor="none", edgecolor=COLOURS["ink"], linewidth=1.3)
ax.set(xlim=(-3.8, 16.6), ylim=(-3.4, 1.1), aspect="equal")
ax.set_axis_off()
save_figure(fig, "15_sequence.png")

# %% [markdown]
# Nine patches (the real model has 256) and the **prompt** from bos (▸) to newline (↵): the
# **prefix**, given at once, open to itself. Then the answer, the **suffix**, up to eos (■), which
# must not see its own future. A ring marks who looks.
#
# Three questions are left. **Width**: a picture's vector has 1152 numbers, a word's 2048. **Place**:
# how do the vectors get there, and at what scale? **View**: how does one matrix say who sees whom?

# %% [markdown]
# ## By hand: width and place
#
# Two picture vectors of width 3, a language model of width $D = 4$. Width is the work of one matrix,
# the **projector**. For the place, the ids hold a placeholder for each picture vector: here id 9.
#
# Our word table is easy to recognise: row $i$ is filled with $i$. Gemma multiplies **words** by
# $\sqrt D$, here 2 ([lesson 12](12_gemma.ipynb)). The picture's vectors enter **as they are**.

# %%
seen = torch.tensor([[1.0, 0, 2], [0, 1, 1]])  # (N, 3), from the vision tower
projector = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])  # (D, 3)
features = seen @ projector.T  # (N, D)

IMAGE, D = 9, 4
ids = torch.tensor([[IMAGE, IMAGE, 4, 5, 6, 1]])  # image image | animal ? | cat eos
table = torch.arange(8.0)[:, None].repeat(1, D)  # (V, D): row i holds i
by_hand = torch.tensor([[1.0, 0, 2, 3], [0, 1, 1, 2], [8] * 4, [10] * 4, [12] * 4, [2] * 4])
assert torch.equal(by_hand[:2], features)
print(by_hand)

# %% [markdown]
# ### By hand: view
#
# Six tokens, so 6 × 6 pairs. Row = who looks, column = who is looked at, 1 = may look. Fill it with
# a pencil first: four rows are the same, and two have one more 1 than the row above.

# %%
tokens = ["image 0", "image 1", "animal", "?", "cat", "■"]
token_kinds = ["image", "image", "prompt", "prompt", "suffix", "suffix"]
grid = [
    [1, 1, 1, 1, 0, 0],
    [1, 1, 1, 1, 0, 0],
    [1, 1, 1, 1, 0, 0],
    [1, 1, 1, 1, 0, 0],
    [1, 1, 1, 1, 1, 0],
    [1, 1, 1, 1, 1, 1],
]


def draw_mask(ax, mask, kinds, names=None, title=None):
    """Each allowed pair in the colour of the token looked at; the diagonal outlined."""
    mask = torch.as_tensor(mask).bool()
    pale, size = torch.tensor(to_rgb("#ece7dd")), len(kinds)
    colours = torch.tensor([to_rgb(KIND_COLOURS[kind]) for kind in kinds])  # (S, 3)
    cells = torch.where(mask[..., None], colours, pale)
    ax.imshow(cells)
    for edge in range(1, size):
        ax.axhline(edge - 0.5, color=COLOURS["paper"], linewidth=0.8)
        ax.axvline(edge - 0.5, color=COLOURS["paper"], linewidth=0.8)
    for i in range(size):
        ax.plot(i, i, ".", color=COLOURS["ink"], markersize=2.5)
    ax.set_title(title or "", fontsize=9)
    ax.set_yticks(range(size) if names else [], names or [], fontsize=8)
    ax.set_xticks(range(size) if names else [], names or [], fontsize=8, rotation=90)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


fig, ax = plt.subplots(figsize=(3.6, 3.5), layout="constrained")
draw_mask(ax, grid, token_kinds, tokens)
ax.set(xlabel="is looked at", ylabel="looks")
save_figure(fig, "15_by_hand")

# %% [markdown]
# Blue and orange columns are full: the prefix is open to everybody. The purple corner is a
# staircase: a suffix token is open to itself and to those after it. So the columns decide: what
# matters is whether the token **looked at** belongs to the prefix.

# %% [markdown]
# ## As a loop
#
# Placing: walk along the ids; at a placeholder take the next picture vector, else the scaled word.


# %%
def merge_loop(ids, table, features):
    """One token at a time: int64[B, L], float[V, D], float[B, N, D] → float[B, L, D]."""
    pictures = iter(features.flatten(0, 1))
    rows = []
    for row in ids:
        rows.append(
            [next(pictures) if i == IMAGE else table[i] * table.shape[1] ** 0.5 for i in row]
        )
    return torch.stack([torch.stack(row) for row in rows])


assert torch.equal(merge_loop(ids, table, features[None])[0], by_hand)
print("equal to the pencil")

# %% [markdown]
# Looking: one rule for one pair. `real` is 0 for padding, `types` is 0 for the prefix and 1 for the
# suffix. A token may look at a **real** token that is in the **prefix** or is **not later** than
# itself.


# %%
def may_look(i, j, real, types):
    """May token i look at token j?"""
    return bool(real[j]) and (types[j] == 0 or j <= i)


def mask_loop(real, types):
    """int64[B, L] twice → bool[B, L, L], one pair at a time."""
    length = real.shape[1]
    return torch.tensor(
        [
            [[may_look(i, j, r, t) for j in range(length)] for i in range(length)]
            for r, t in zip(real.tolist(), types.tolist())
        ]
    )


types = torch.tensor([[0, 0, 0, 0, 1, 1]])
assert torch.equal(mask_loop(torch.ones_like(ids), types)[0], torch.tensor(grid).bool())
print("equal to the pencil")

# %% [markdown]
# Where does it say that the prefix must not see the suffix? Nowhere. For a suffix key only `j <= i`
# can help, and every prefix token has a smaller place than any suffix token.
#
# ## Vectorised
#
# Placing: embed everything at once, with some harmless id at the placeholders, then overwrite
# those rows. `masked_scatter` fills the True places in order.

# %%
is_image = ids == IMAGE  # (B, L)
embeds = F.embedding(ids.masked_fill(is_image, 0), table) * D**0.5  # (B, L, D)
merged = embeds.masked_scatter(is_image[..., None], features)
assert torch.equal(merged[0], by_hand)
print(merged[0, :3])

# %% [markdown]
# Looking: the same rule, where `i` is a column of numbers, `j` a row, and broadcasting makes all
# pairs.

# %%
real = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])  # the second row is padded
types = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1]])
j = torch.arange(6)
i = j[:, None]
mask = real.bool()[:, None, :] & ((types == 0)[:, None, :] | (j <= i))  # (B, L, L)
assert torch.equal(mask, mask_loop(real, types))
print(mask[1].int())

# %% [markdown]
# ### Two practical matters
#
# **Padding.** Nobody looks at padding, but a padded token still looks, and its result is thrown
# away. Only an empty *row* is dangerous: a softmax over nothing is 0 divided by 0 in some attention
# code. So the module lets each token see *itself* in any case.
#
# **Cache.** While an answer is written, only the new token asks. So we need only the last rows of
# the matrix: $L$ queries, $S + L$ keys, $S$ of them already stored.

# %% [markdown]
# ## The module
#
# First the numbers: two configurations, and which ids are special. Their defaults *are* PaliGemma
# 3B. With a `Gemma2Config` ([lesson 13](13_gemma2.ipynb)) it becomes PaliGemma 2; nothing else
# changes.


# %%
#| export
@dataclass
class PaliGemmaConfig:
    """Shape of the whole model; the defaults are PaliGemma 3B at 224 pixels.

    Source: Beyer et al. 2024 (PaliGemma); the published `config.json`.
    """

    vision_config: SiglipVisionConfig = field(default_factory=SiglipVisionConfig)
    text_config: GemmaConfig = field(default_factory=GemmaConfig)  # or a Gemma2Config
    image_token_index: int = 257152
    pad_token_id: int = 0
    eos_token_id: int = 1
    bos_token_id: int = 2
    name_or_path: str = ""  # where the weights came from


@dataclass
class PaliGemmaOutput:
    """What a forward pass returns: `logits` float32[B, L, V] and, with labels, the mean loss."""

    logits: torch.Tensor
    loss: torch.Tensor | None = None


# %% [markdown]
# ### The mask
#
# Our line, with the last $L$ rows only, and with every token seeing itself. When everything
# is allowed, which is the usual case while generating, it returns None: attention without a mask
# is faster.


# %%
#| export
def prefix_lm_mask(
    attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None, length: int
) -> torch.Tensor | None:
    """Who may look at whom: prefix at prefix in both directions, suffix only backwards.

                         is looked at
                    image  prompt  suffix
        image       1 1 1   1 1    0 0 0
                    1 1 1   1 1    0 0 0
                    1 1 1   1 1    0 0 0
        prompt      1 1 1   1 1    0 0 0
                    1 1 1   1 1    0 0 0
        suffix      1 1 1   1 1    1 0 0
                    1 1 1   1 1    1 1 0
                    1 1 1   1 1    1 1 1

    Args:
        attention_mask: `int64[B, S + L]`, 0 on padding; S tokens are in the cache already.
        token_type_ids: `int64[B, L]`, 0 prefix, 1 suffix; None: all L are prefix when S is 0
            and all are suffix after that.
        length: L, the number of new tokens (the queries).

    Returns:
        `bool[B, 1, L, S + L]`, True where query i may look at key j; None when all may.

    Source: PaliGemma paper, figure 2; Raffel et al. 2020 (prefix LM).
    """
    total = attention_mask.shape[1]
    past = total - length
    if token_type_ids is None:
        token_type_ids = torch.full_like(attention_mask[:, past:], 1 if past else 0)
    key = torch.arange(total, device=attention_mask.device)
    query = key[past:, None]  # (L, 1)
    prefix = F.pad(token_type_ids == 0, (past, 0), value=True)[:, None, None, :]
    real = attention_mask.bool()[:, None, None, :]  # (B, 1, 1, S + L)
    # A padded query sees itself: a softmax over nothing would be 0/0.
    mask = real & (prefix | (key <= query)) | (key == query)  # (B, 1, L, S + L)
    return None if bool(mask.all()) else mask


# %% [markdown]
# Cached tokens all lie *before* the new ones, so the module can call them prefix: for a key that
# came earlier, prefix or suffix makes no difference.

# %%
ours = prefix_lm_mask(real, types, 6)  # (B, 1, L, L)
padded = (real == 0)[:, None, :] & torch.eye(6, dtype=torch.bool)
assert torch.equal(ours[:, 0], mask_loop(real, types) | padded)
assert torch.equal(prefix_lm_mask(real, types[:, 3:], 3), ours[:, :, 3:])
print("equal to the loop; with 3 cached tokens: its last 3 rows")

# %% [markdown]
# ### The projector and the loss
#
# The projector is one linear layer, 0.1 % of the parameters, and the only part that came from
# neither parent.
#
# The loss compares the logits at place $t$ with the token at place $t + 1$. Labels stand at the
# *same* place as their token ([lesson 14](14_processor.ipynb)), so somebody has to shift them by one. Here it is done
# **once, and nowhere else**. Places labelled −100 do not count.


# %%
#| export
class PaliGemmaProjector(nn.Module):
    """One linear layer from the vision tower's width to the language model's."""

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`float[B, N, D of vision]` → `float[B, N, D of text]`."""
        return self.linear(x)


def suffix_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each labelled token given everything before it.

    Args:
        logits: `float32[B, L, V]`.
        labels: `int64[B, L]`, -100 where nothing is to be learnt; shifted here, once.

    Returns:
        A scalar, `float32`; 0 when nothing is labelled.
    """
    shift_logits, shift_labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = F.cross_entropy(shift_logits, shift_labels, ignore_index=-100, reduction="sum")
    return total / (shift_labels != -100).sum().clamp(min=1)


# %% [markdown]
# ### The whole
#
# Three parts, under the names that the published checkpoint uses. `forward` reads like a summary of
# the course: see and merge, count places, mask, decode, score. Positions count *real* tokens only,
# so padding on the left shifts nothing.


# %%
#| export
class PaliGemma(nn.Module):
    """A picture and a prompt in, the next token's logits out (PaliGemma paper, section 3)."""

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.config, text = config, config.text_config
        self.vision_tower = SiglipVisionModel(config.vision_config)
        self.multi_modal_projector = PaliGemmaProjector(config)
        self.language_model = (
            Gemma2Model(text) if isinstance(text, Gemma2Config) else GemmaModel(text)
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.language_model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights and of the cache."""
        return self.language_model.embed_tokens.weight.dtype

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`float[P, 3, H, W]` → `float[P, N, D]`, the vectors that stand for P pictures."""
        return self.multi_modal_projector(self.vision_tower(pixel_values.to(self.dtype)))

    def merge(self, input_ids, image_features):
        is_image = input_ids == self.config.image_token_index  # (B, L)
        inputs_embeds = self.language_model.embed(input_ids.masked_fill(is_image, 0))  # (B, L, D)
        return inputs_embeds.masked_scatter(is_image[..., None], image_features)

    def forward(self, input_ids, pixel_values, attention_mask, token_type_ids, labels=None):
        x = self.merge(input_ids, self.encode_image(pixel_values))  # (B, L, D)
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)  # (B, L)
        mask = prefix_lm_mask(attention_mask, token_type_ids, input_ids.shape[1])
        hidden = self.language_model(x, position_ids, mask)  # (B, L, D)
        logits = self.language_model.logits(hidden)  # (B, L, V)
        loss = None if labels is None else suffix_loss(logits, labels)
        return PaliGemmaOutput(logits, loss)


# %% [markdown]
# A model small enough to play with: pictures of 42 × 42 pixels (nine patches), width 64, a
# vocabulary of 32. Three questions about three photographs, of unequal length.

# %%
WORDS = "<pad> ■ ▸ <unk> ↵ what animal ? a cat caption coffee who an astronaut".split()
WORDS += "grey sleeps on the old sofa".split()
ID = {word: i for i, word in enumerate(WORDS)}
IMAGE, N = 31, 9
vision = SiglipVisionConfig(48, 96, 2, 4, image_size=42)
text = GemmaConfig(32, 64, 128, 2, 4, 1, 16)
config = PaliGemmaConfig(vision, text, image_token_index=IMAGE)


def ids_of(text):
    return [ID[word] for word in text.split()]


def prefix_of(prompt):
    return [IMAGE] * N + ids_of(f"▸ {prompt} ↵")


prefixes = [prefix_of("what animal ?"), prefix_of("caption"), prefix_of("who ?")]
suffixes = [ids_of("a cat ■"), ids_of("coffee ■"), ids_of("an astronaut ■")]
batch = collate(prefixes, suffixes)
photos = [sample_picture(name) for name in ("cat", "coffee", "astronaut")]
batch["pixel_values"] = ImageProcessor(42)(photos)
for name, tensor in batch.items():
    print(f"{name:15}", tuple(tensor.shape))

model = PaliGemma(config).eval()
with torch.no_grad():
    out = model(**batch)
    features = model.encode_image(batch["pixel_values"])
    merged = model.merge(batch["input_ids"], features)
    loop = merge_loop(batch["input_ids"], model.language_model.embed_tokens.weight, features)
assert torch.allclose(merged, loop)
assert out.logits.shape == (3, 17, 32) and out.loss.shape == ()
print("merged", tuple(merged.shape), "→ logits", tuple(out.logits.shape))

# %% [markdown]
# That is the model. What follows is what a program adds that answers, and trains, for others.
#
# ### Ids and pictures that don't fit
#
# `masked_scatter` takes as many vectors as there are places, and asks nothing about the rest. A
# prompt with places for one picture, and two pictures:

# %%
ids = torch.tensor([prefix_of("what animal ?")])
with torch.no_grad():
    one, two = (model.merge(ids, features[:count]) for count in (1, 2))
assert torch.equal(one, two)
print("with a second picture, the same sequence:", torch.equal(one, two))

# %% [markdown]
# The second picture is never seen, and nobody is told. So `merge` counts. It counts over the whole
# batch: the pictures fill the places **in order over the rows**, and a row may hold several.


# %%
#| export
@add_to_class(PaliGemma)
def merge(self, input_ids: torch.Tensor, image_features: torch.Tensor | None) -> torch.Tensor:
    """One sequence of words, times √D, and of pictures, as they are.

    Args:
        input_ids: `int64[B, L]`.
        image_features: `float[P, N, D]`; they fill the `<image>` places in order over the rows.

    Returns:
        `float[B, L, D]`.

    Raises:
        ValueError: not exactly one place for each vector.
    """
    is_image = input_ids == self.config.image_token_index  # (B, L)
    found = int(is_image.sum())
    given = 0 if image_features is None else image_features.shape[:2].numel()
    if found != given:
        raise ValueError(
            f"input_ids hold {found} <image> tokens and the pictures give {given}; "
            "make both with the same Processor"
        )
    inputs_embeds = self.language_model.embed(input_ids.masked_fill(is_image, 0))  # (B, L, D)
    if image_features is None:
        return inputs_embeds
    return inputs_embeds.masked_scatter(is_image[..., None], image_features.to(inputs_embeds.dtype))


# %% [markdown]
# ### Tensors that don't fit each other
#
# Three mistakes are common enough to deserve a sentence instead of a stack trace: a mask that does
# not count the cached tokens, labels of another length, and labels without token types. The last one
# is the bug of this lesson (below).


# %%
#| export
def check_inputs(
    input_ids: torch.Tensor,
    past: int,
    attention_mask: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    labels: torch.Tensor | None,
) -> torch.Tensor:
    """The attention mask, ones when none is given: `int64[B, S + L]` with S = `past`.

    Raises:
        ValueError: a tensor does not fit the L new tokens (the mask: the S cached ones as well),
            or labels come without token_type_ids.
    """
    batch, length = input_ids.shape
    if labels is not None and token_type_ids is None:
        raise ValueError(
            "labels need token_type_ids, 1 where the answer stands: without them each token sees "
            "the answer it is asked for; take both from the same Processor"
        )
    if attention_mask is None:
        attention_mask = input_ids.new_ones(batch, past + length)
    cached = f"{past} cached tokens and {length} new ones"
    for name, tensor, size, why in (
        ("attention_mask", attention_mask, past + length, cached),
        ("token_type_ids", token_type_ids, length, "one for each new token"),
        ("labels", labels, length, "one for each new token, not shifted"),
    ):
        if tensor is not None and tensor.shape != (batch, size):
            raise ValueError(f"{name} is {list(tensor.shape)}; expected [{batch}, {size}]: {why}")
    return attention_mask


# %% [markdown]
# ### An answer, word by word
#
# Three arguments more. With a `cache` only the new tokens come in, and everything old is read from
# it ([lesson 11](11_kv_cache.ipynb)). `image_features` are pictures encoded before: look once, ask
# often. `logits_to_keep` spares the head ([lesson 12](12_gemma.ipynb)). The output may be asked for
# by place too, as transformers' trainer does.


# %%
#| export
@add_to_class(PaliGemmaOutput)
def __getitem__(self, index):
    """By place, the loss first where there is one: as in transformers."""
    return tuple(t for t in (self.loss, self.logits) if t is not None)[index]


@add_to_class(PaliGemma)
def make_cache(self, batch_size: int, max_length: int) -> KVCache:
    """An empty cache for `batch_size` rows of up to `max_length` tokens."""
    c = self.config.text_config
    shape = (batch_size, c.num_key_value_heads, max_length, c.head_dim)
    return KVCache(c.num_hidden_layers, *shape, self.device, self.dtype)


@add_to_class(PaliGemma)
def forward(
    self,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    token_type_ids: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    cache: KVCache | None = None,
    image_features: torch.Tensor | None = None,
    logits_to_keep: int | None = None,
) -> PaliGemmaOutput:
    """Logits for the new tokens, and the loss when there are labels.

    Args:
        input_ids: `int64[B, L]`, the new tokens.
        pixel_values: `float[P, 3, H, W]`, the pictures of the `<image>` tokens, in order over
            the rows; a row may hold several.
        attention_mask: `int64[B, S + L]`, 0 on padding, S tokens cached; None: no padding.
        token_type_ids: `int64[B, L]`, 0 prefix, 1 suffix; None: prefix (suffix after a cache).
        labels: `int64[B, L]`, -100 where nothing is to be learnt; not shifted.
        cache: from `make_cache`; gains the L tokens.
        image_features: `float[P, N, D]` from `encode_image`, instead of `pixel_values`.
        logits_to_keep: only the last so many positions get logits (and a loss); None: all.

    Returns:
        `PaliGemmaOutput`: logits `float32[B, L or logits_to_keep, V]`, loss a scalar or None.

    Raises:
        ValueError: tensors that do not fit each other, labels without token_type_ids, or a
            picture given in two ways.
    """
    past, length = 0 if cache is None else len(cache), input_ids.shape[1]
    all_see_all = attention_mask is None and token_type_ids is None and (length == 1 or not past)
    attention_mask = check_inputs(input_ids, past, attention_mask, token_type_ids, labels)
    if pixel_values is not None:
        if image_features is not None:
            raise ValueError("got pixel_values and image_features; give one of them")
        image_features = self.encode_image(pixel_values)  # (P, N, D)
    if past and image_features is None:  # the picture is cached; a new <image> is a word
        x = self.language_model.embed(input_ids)
    else:
        x = self.merge(input_ids, image_features)  # (B, L, D)
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past:]  # (B, L)
    mask = None if all_see_all else prefix_lm_mask(attention_mask, token_type_ids, length)
    hidden = self.language_model(x, position_ids, mask, cache)  # (B, L, D)
    keep = min(logits_to_keep or length, length)
    logits = self.language_model.logits(hidden[:, -keep:])  # (B, keep, V)
    loss = None if labels is None else suffix_loss(logits, labels[:, -keep:])
    return PaliGemmaOutput(logits, loss)


# %% [markdown]
# Word by word through the cache: the same logits as in one pass (the first row of the batch, 14
# tokens of prefix and 3 of suffix). And two pictures in one prompt: their order counts.

# %%
row = {name: tensor[:1] for name, tensor in batch.items()}  # it has no padding
two = torch.tensor([[IMAGE] * 2 * N + ids_of("▸ what animal ? ↵")])
with torch.no_grad():
    cache = model.make_cache(1, 17)
    parts = [model(row["input_ids"][:, :14], row["pixel_values"], cache=cache).logits]
    parts += [model(row["input_ids"][:, [t]], cache=cache).logits for t in (14, 15, 16)]
    a, b = (model(two, image_features=features[[i, j]]).logits[0, -1] for i, j in ((0, 1), (1, 0)))
torch.testing.assert_close(torch.cat(parts, dim=1), out.logits[:1], rtol=0, atol=1e-4)
assert len(cache) == 17 and (a - b).abs().max() > 1e-3
print("with a cache: the same logits; pictures exchanged: other ones")

# %% [markdown]
# ## Against the reference
#
# The file holds a small `PaliGemmaForConditionalGeneration` of transformers with random weights, a
# padded batch, and what it computes: logits and loss. A test recomputes it. On padded places no
# value means anything, so we compare the real ones.

# %% tags=["nbval-ignore-output"]
stored = load_file("reference/model.safetensors")
small = PaliGemma(
    PaliGemmaConfig(
        SiglipVisionConfig(8, 12, 1, 2, image_size=28),
        GemmaConfig(64, 16, 24, 2, 2, 1, 8),
        image_token_index=60,
    )
)
small.load_state_dict({name: stored.pop(name) for name in small.state_dict()})
inputs = {name: stored[name] for name in (*batch, "labels")}
with torch.no_grad():
    theirs = small(**inputs)
gap = (theirs.logits - stored["logits"])[inputs["attention_mask"].bool()].abs().max().item()
loss_gap = (theirs.loss - stored["loss"]).abs().item()
assert gap <= 1e-5 and loss_gap <= 1e-5
print(f"largest difference: logits {gap:.1e}, loss {loss_gap:.1e}")

# %% [markdown]
# ## See it: the mask of a real batch
#
# The batch above, row by row, as `prefix_lm_mask` makes it. Grey is padding.

# %%
mask = prefix_lm_mask(batch["attention_mask"], batch["token_type_ids"], 17)[:, 0]


def kinds_of(row):
    """The kind of each token of one row of the batch."""
    ids, types = batch["input_ids"][row].tolist(), batch["token_type_ids"][row].tolist()
    return [
        "padding" if i == 0 else "image" if i == IMAGE else "suffix" if t else "prompt"
        for i, t in zip(ids, types)
    ]


fig, axes = plt.subplots(1, 3, figsize=(9, 3.4), layout="constrained")
for row, (ax, title) in enumerate(zip(axes, ("what animal ?", "caption", "who ?"))):
    ids = batch["input_ids"][row].tolist()
    names = ["·" if i == IMAGE else "<pad>" if i == 0 else WORDS[i] for i in ids]
    draw_mask(ax, mask[row], kinds_of(row), names, title)
    ax.tick_params(labelsize=6.5)
save_figure(fig, "15_mask")

# %% [markdown]
# What to notice: the full block grows and shrinks with the prompt, the staircase with the answer.
# A padded *column* is pale but for one grey cell: nobody else looks there. What a padded *row*
# sees does not matter. All three end at the same place, so their next tokens share one new column.

# %% [markdown]
# ### Does the model obey?
#
# A mask is a plan. We *measure* who influences whom through all layers: the gradient of each output
# with respect to each input vector. No mask is read here, only numbers that come out.


# %%
def influence(model, batch, row):
    """float[L, L]: how strongly output i depends on input vector j, in one row of a batch."""
    one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
    real = one["attention_mask"]
    x = model.merge(one["input_ids"], model.encode_image(one["pixel_values"])).detach()
    x.requires_grad_()
    mask = prefix_lm_mask(real, one["token_type_ids"], x.shape[1])
    hidden = model.language_model(x, (real.cumsum(-1) - 1).clamp(min=0), mask)[0]
    probe = torch.linspace(-1, 1, hidden.shape[1])
    rows = [torch.autograd.grad(h @ probe, x, retain_graph=True)[0][0].norm(dim=1) for h in hidden]
    return torch.stack(rows)


measured = influence(model, batch, 1)
assert torch.equal(measured > 0, mask[1])
print("zero exactly where the mask is False:", torch.equal(measured == 0, ~mask[1]))
fig, axes = plt.subplots(1, 2, figsize=(7, 3.4), layout="constrained")
names = ["<pad>"] * 3 + ["·"] * 9 + "▸ caption ↵ coffee ■".split()
draw_mask(axes[0], mask[1], kinds_of(1), names, "the plan: the mask")
axes[0].set(xlabel="is looked at", ylabel="looks")
title = "measured: influence (log)"
show_heatmap(measured.log10().clamp(min=-4), title, rows=names, columns=names, ax=axes[1])
axes[1].set_xticks(range(len(names)), names, rotation=90)
for ax in axes:
    ax.tick_params(labelsize=6.5)
fig

# %% [markdown]
# Two layers deep, and still the same pattern. That is not luck: if $i$ may look at $j$ and $j$ at
# $k$, then $i$ may look at $k$. A rule with this property keeps its promise through any number of
# layers. Most hand-made sparse masks do not have it.

# %% [markdown]
# ## At full size
#
# The default configuration is the real model. On the meta device it has shapes and no numbers, so
# 3 billion parameters cost nothing. Which parts hold them?

# %%
with torch.device("meta"):
    full = PaliGemma(PaliGemmaConfig())
groups = {
    "vision tower": ("vision_tower",),
    "projector": ("multi_modal_projector",),
    "embedding = head": ("embed_tokens",),
    "decoder: attention": ("self_attn",),
    "decoder: MLP": ("mlp",),
    "decoder: norms": ("norm",),
}
sizes = dict.fromkeys(groups, 0)
for name, weight in full.named_parameters():
    keys = [g for g, parts in groups.items() if any(part in name for part in parts)]
    sizes[keys[0]] += weight.numel()
total = sum(sizes.values())
assert total == sum(p.numel() for p in full.parameters())
print(f"{total:,} parameters")
fig, ax = plt.subplots(figsize=(7, 2.3), layout="constrained")
colours = [COLOURS["vision"], COLOURS["together"], *[COLOURS["language"]] * 4]
ax.barh(list(sizes), [size / 1e9 for size in sizes.values()], color=colours)
for y, size in enumerate(sizes.values()):
    ax.text(size / 1e9 + 0.02, y, f"{size:,}  ({size / total:.1%})", va="center", fontsize=8)
ax.invert_yaxis()
ax.set(xlim=(0, 2.6), xlabel="billions of parameters")
save_figure(fig, "15_parameters")

# %% [markdown]
# The eye is a seventh of the model, the joint a thousandth. Three fifths are the decoder's MLPs.
#
# Now the flow of one picture of 224 pixels and a prompt of eight tokens, with the shapes taken from
# the meta model itself.

# %%
with torch.device("meta"):
    pixels, prompt = torch.empty(1, 3, 224, 224), torch.empty(1, 8, dtype=torch.int64)
    stages = {
        "patches": full.vision_tower.embeddings(pixels),
        "seen": full.vision_tower(pixels),
        "projected": full.encode_image(pixels),
        "embedding": full.language_model.embed(prompt),
    }
    together = torch.cat([stages["projected"], stages["embedding"]], dim=1)
    stages["merged"] = together
    stages["decoded"] = full.language_model(together, torch.arange(264)[None])
    stages["logits"] = full.language_model.logits(stages["decoded"][:, -1:])
for name, tensor in stages.items():
    print(f"{name:10}", tuple(tensor.shape))

# %%
fig, ax = plt.subplots(figsize=(7, 3.1), layout="constrained")
ax.imshow(sample_picture("cat").resize((448, 448)), extent=(-345, -45, 0, 300))
ax.text(-195, -60, "1 × 3 × 224 × 224\npixels", ha="center", va="top", fontsize=7.5)
x = 110
for name in ("patches", "seen", "projected", "merged", "decoded"):
    _, length, width = stages[name].shape
    colour = COLOURS["vision"] if name in ("patches", "seen") else COLOURS["together"]
    ax.add_patch(plt.Rectangle((x, 0), 256, width / 4, color=colour, alpha=0.75))
    if length > 256:
        ax.add_patch(plt.Rectangle((x + 256, 0), 8, width / 4, color=COLOURS["language"]))
    ax.text(x + 128, width / 4 + 14, name, ha="center", fontsize=8)
    ax.text(x + 128, -60, f"{length} × {width}", ha="center", va="top", fontsize=7.5)
    ax.annotate("", (x - 8, 140), (x - 82, 140), arrowprops={"arrowstyle": "->", "color": "#555"})
    x += 350
ax.annotate("", (x - 8, 140), (x - 76, 140), arrowprops={"arrowstyle": "->", "color": "#555"})
ax.add_patch(plt.Rectangle((x + 30, 0), 8, 590, color=COLOURS["accent"]))
for y in (585, 600, 615):
    ax.plot(x + 34, y + 20, ".", color=COLOURS["accent"], markersize=3)
ax.text(x + 34, 655, "logits", ha="center", fontsize=8)
ax.text(x + 34, -60, "1 × 257216", ha="center", va="top", fontsize=7.5)
ax.annotate(
    "8 tokens × √D", (1160 + 262, 520), (1160 + 20, 640), fontsize=8, color=COLOURS["language"],
    arrowprops={"arrowstyle": "->", "color": COLOURS["language"]},
)  # fmt: skip
ax.set(xlim=(-360, x + 150), ylim=(-170, 720), aspect="equal")
ax.set_axis_off()
save_figure(fig, "15_shapes.png")

# %% [markdown]
# Width across is tokens, height is numbers in each token; blocks are to scale (the logits would go
# on, 126 times as high as a token). The words are the thin orange edge: to the decoder a picture *is* 256 words, so
# most of what it reads is picture.

# %% [markdown]
# ### What it costs
#
# PyTorch's counter, on the meta model: operations to read picture and prompt (**prefill**, with
# logits for the last place only) and to write one more token. A multiplication and its addition are
# two operations.


# %%
def flops(function, *inputs):
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        function(*inputs)
    return counter.get_total_flops()


print("size  tokens   parameters     see  prefill  one token   weights   cache")
print("                             GFLOP    GFLOP      GFLOP        GB      MB")
for size in (224, 448, 896):
    with torch.device("meta"):
        big = PaliGemma(PaliGemmaConfig(SiglipVisionConfig(image_size=size)))
        x = torch.empty(1, big.config.vision_config.num_image_tokens + 8, 2048)
        pixels, places = torch.empty(1, 3, size, size), torch.arange(x.shape[1])[None]
        count = sum(p.numel() for p in big.parameters())
    see = flops(big.encode_image, pixels) / 1e9
    decoder = big.language_model
    read = flops(lambda: decoder.logits(decoder(x, places)[:, -1:])) / 1e9
    cache = big.make_cache(1, x.shape[1] + 1)
    decoder(x, places, None, cache)  # filled; now one more token
    step = flops(lambda: decoder.logits(decoder(x[:, :1], places[:, :1], None, cache))) / 1e9
    cache_mb = cache.nbytes / 2 / 1e6  # the meta model counts float32, we want bfloat16
    print(
        f"{size:4} {x.shape[1]:7} {count:13,} {see:6,.0f} {read:8,.0f} {step:10.2f}"
        f" {2 * count / 1e9:9.2f} {cache_mb:7.1f}"
    )
    if size == 224:
        linear = total - sizes["vision tower"] - sizes["projector"] - sizes["decoder: norms"]
        assert abs(step - 2 * linear / 1e9 - 4 * 18 * 8 * 256 * (x.shape[1] + 1) / 1e9) < 1e-6

# %% [markdown]
# One token costs two operations for each weight of the decoder, plus a little attention. The
# picture is paid once: four times the tokens, four times the work. And the weights are the same:
# the sizes differ only in the table of positions.
#
# What does that take here? One block of each tower with 224-pixel shapes, measured, then
# multiplied by their number.


# %% tags=["nbval-ignore-output"]
def best_seconds(function, *inputs, repeats=1):
    times = []
    with torch.no_grad():
        for _ in range(repeats):
            start = time.perf_counter()
            function(*inputs)
            times.append(time.perf_counter() - start)
    return min(times)


def real_block(block):
    """A block of the meta model with memory under it; the values do not matter."""
    block = block.to_empty(device="cpu")
    for weight in block.parameters():
        weight.data.fill_(0.01)
    return block.float()


vision_block = real_block(full.vision_tower.encoder.layers[0])
text_block = real_block(full.language_model.layers[0])
cos, sin = full.language_model.rotary_emb(torch.arange(264)[None])
see = 27 * best_seconds(vision_block, torch.rand(1, 256, 1152))
read = 18 * best_seconds(text_block, torch.rand(1, 264, 2048), cos, sin)
one = (torch.rand(1, 1, 2048), cos[:, :, :1], sin[:, :, :1])
write = 18 * best_seconds(text_block, *one, repeats=3)
print(f"float32: see {see:.1f} s, read {read:.1f} s, write {1e3 * write:.0f} ms a token (no head)")

# %% [markdown]
# Writing one token takes 264 times fewer operations than reading the prefix, but not 264 times less
# time: for each token *all* weights have to come from memory once. That is the subject of
# [lesson 11](11_kv_cache.ipynb), [lesson 18](18_generation.ipynb) and
# [lesson 22](22_quantization.ipynb).

# %% [markdown]
# ## A bug people really make: a loss that is too good
#
# A colleague trains the small model, and the loss falls faster than anybody hoped. To be sure they
# take the hardest data there is: three **random** words as the answer, drawn anew in each step.
# There is nothing to learn in them.

# %%
torch.set_num_threads(1)  # for a model this small, threads mostly wait for each other
prompts = [prefix_of("caption")] * 16


def losses_on_random_answers(loss_of, steps=120):
    """A fresh small model, trained on answers that nobody can know: its loss, step by step."""
    torch.manual_seed(1)
    model, losses = PaliGemma(config), []
    nn.init.normal_(model.language_model.embed_tokens.weight, std=64**-0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        answers = torch.randint(5, len(WORDS), (16, 3)).tolist()
        loss = loss_of(model, collate(prompts, answers), features[:1].expand(16, -1, -1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def colleague_loss(model, batch, image_features):
    ids, real = batch["input_ids"], batch["attention_mask"]
    logits = model(ids, attention_mask=real, image_features=image_features).logits
    return suffix_loss(logits, batch["labels"])


chance = math.log(len(WORDS) - 5)
theirs = losses_on_random_answers(colleague_loss)
print(f"guessing blindly: {chance:.2f}; the colleague's model: {theirs[-1]:.2f}")
assert theirs[-1] < 0.2

# %% [markdown]
# It predicts what cannot be predicted. Before you read on: where does it know from?
#
# From the answer. The colleague passed no `token_type_ids`, so all is prefix, and in a prefix
# everybody sees everybody. The place that has to say "sofa" looks one step ahead, and there it
# stands. When it has to *write*, there is nothing to copy from, and it has learned nothing else.

# %%
ours = losses_on_random_answers(lambda model, batch, x: model(**batch, image_features=x).loss)
assert min(ours) > 0.9 * chance
fig, ax = plt.subplots(figsize=(6.4, 2.6), layout="constrained")
ax.axhline(chance, color=COLOURS["muted"], linestyle=":")
ax.text(120, chance - 0.45, "guessing blindly", color=COLOURS["muted"], ha="right")
for name, losses, colour in (("without types", theirs, "bad"), ("with types", ours, "good")):
    ax.plot(losses, color=COLOURS[colour], label=name)
ax.set(xlabel="step", ylabel="loss on random answers", ylim=(0, 6))
ax.legend(loc="upper right")
save_figure(fig, "15_leak")

# %% [markdown]
# With types the loss stays where it belongs. So the check is: **train on random answers; a loss
# below guessing is a leak.** And because labels without types are never what anybody wants, `forward`
# refuses them.

# %%
try:
    model(**{name: tensor for name, tensor in batch.items() if name != "token_type_ids"})
except ValueError as error:
    print(error)

# %% [markdown]
# ### A second one, which no loss and no answer shows
#
# Another colleague builds on a language model whose mask is causal, and leaves it so. Nothing leaks.
# Training works. Answers are fluent and complete. Only questions that need a close look at the picture go
# wrong a little more often than they should. Here is a measurement: how much do the *picture's*
# vectors change, inside, when the question changes?


# %%
def picture_after(mask_of, prompt):
    """What the nine image tokens have become after all layers, for one question."""
    ids = torch.tensor([prefix_of(prompt)])
    with torch.no_grad():
        x = model.merge(ids, model.encode_image(batch["pixel_values"][:1]))
        places = torch.arange(x.shape[1])[None]
        return model.language_model(x, places, mask_of(x.shape[1]))[:, :N]


masks = {
    "ours": lambda length: None,
    "the colleague's": lambda length: torch.ones(1, 1, length, length).tril().bool(),
}
for name, mask_of in masks.items():
    a, b = (picture_after(mask_of, prompt) for prompt in ("what animal ?", "who ?"))
    print(f"{name:16} largest change {(a - b).abs().max():.2f}")

# %% [markdown]
# Zero. Under a causal mask the picture stands *before* the question and cannot know it: the model
# has to keep everything that any question might need. With the prefix mask the picture is read
# again in each layer, in the light of the question.
#
# The check is worth keeping: change one input, ask which outputs may change.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): count the pairs
#
# A row has 2 padded places, 4 image tokens, 3 prompt tokens and 3 suffix tokens. How many True has
# its 12 × 12 mask from `prefix_lm_mask`, and how many would a causal mask have over the ten real
# tokens?

# %% tags=["exercise"]
prefix_lm_pairs = None  # your answer
causal_pairs = None  # your answer


# %% tags=["check"]
def test_1(prefix_lm_pairs, causal_pairs):
    assert prefix_lm_pairs is not None and causal_pairs is not None, "two numbers, please"
    real = torch.tensor([[0] * 2 + [1] * 10])
    types = torch.tensor([[0] * 9 + [1] * 3])
    found = int(prefix_lm_mask(real, types, 12).sum())
    assert prefix_lm_pairs != found - 16, "padded tokens have rows too, even if nobody reads them"
    assert prefix_lm_pairs != found - 14, "a padded token sees itself, and the prefix as well"
    assert prefix_lm_pairs == found, "the prefix block, the three rows of the suffix, the two pads"
    assert causal_pairs == 55, "row after row: 1 + 2 + 3 + …"


check(test_1, prefix_lm_pairs, causal_pairs)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Seven prefix tokens see seven. The first suffix token sees those seven and itself. The padded rows
# of the figure above have blue, orange and one grey cell.
#
# </details>

# %% tags=["solution"]
prefix_lm_pairs = 7 * 7 + (8 + 9 + 10) + 2 * (7 + 1)
causal_pairs = 10 * 11 // 2
check(test_1, prefix_lm_pairs, causal_pairs)

# %% [markdown]
# ### Exercise 2 (break): a check that catches wrong masks
#
# Return True for a right `make_mask(attention_mask, token_type_ids, length)` and False for a wrong
# one. `check` tries yours on the right function and on four wrong ones. Choose the inputs yourself;
# `mask_loop` may help.


# %% tags=["exercise"]
def is_right(make_mask):
    return None  # call make_mask on inputs of your choice


# %% tags=["check"]
def test_2(is_right):
    def wrong(change):
        def make_mask(real, types, length):
            return change(prefix_lm_mask(real, types, length), real, types)

        return make_mask

    wrong_ones = {
        "causal over the prefix": wrong(lambda m, r, t: m.tril()),
        "inverted: True means hidden": wrong(lambda m, r, t: ~m),
        "padding is seen": wrong(lambda m, r, t: m | (r == 0)[:, None, None, :]),
        "the suffix sees its future": wrong(lambda m, r, t: m | (t * r == 1)[:, None, :, None]),
    }
    assert is_right(prefix_lm_mask) is True, "rejects prefix_lm_mask"
    for name, make_mask in wrong_ones.items():
        assert is_right(make_mask) is False, f"lets this one through: {name}"


check(test_2, is_right)

# %% [markdown]
# <details><summary>Hint</summary>
#
# One padded row with at least two prefix and two suffix tokens is enough. Compare only the rows of
# real tokens.
#
# </details>


# %% tags=["solution"]
def is_right(make_mask):
    real, types = torch.tensor([[0, 1, 1, 1, 1]]), torch.tensor([[0, 0, 0, 1, 1]])
    mask = make_mask(real, types, 5)[:, 0]
    return torch.equal(mask[:, 1:], mask_loop(real, types)[:, 1:])


check(test_2, is_right)

# %% [markdown]
# ### Exercise 3 (extend): two examples in one row
#
# Padding wastes work. **Packing** puts several examples into one row: `segments` (int64[B, L]) says
# which example a token belongs to, 0 for padding. Write the mask: bool[B, L, L], each example a
# prefix-LM of its own, blind to the others; a padded token sees nothing.


# %% tags=["exercise"]
def packed_mask(segments, types):
    return None  # your answer


# %% tags=["check"]
def test_3(packed_mask):
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0]])
    types = torch.tensor([[0, 0, 1, 0, 0, 1, 1, 0]])
    found = packed_mask(segments, types)
    assert found is not None and found.shape == (1, 8, 8), "return bool[B, L, L]"
    assert not found[0, :3, 3:7].any(), "the first example looks at the second"
    assert not found[0, 3:7, :3].any(), "the second example looks at the first"
    assert not found[0, 7].any() and not found[0, :, 7].any(), "padding sees or is seen"
    for part in (slice(0, 3), slice(3, 7)):
        alone = mask_loop(torch.ones_like(types[:, part]), types[:, part])
        assert torch.equal(found[:, part, part], alone), "inside, each is a prefix-LM"


check(test_3, packed_mask)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The rule of the lesson with one condition in place of `real`: both tokens carry the same segment,
# and it is not 0.
#
# </details>


# %% tags=["solution"]
def packed_mask(segments, types):
    place = torch.arange(segments.shape[1])
    same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
    return same & ((types == 0)[:, None, :] | (place <= place[:, None]))


check(test_3, packed_mask)

# %% [markdown]
# ## Summary
#
# - A picture enters a language model as vectors at the front of the sentence: one linear layer to
#   the right width, one replacement.
# - One rule makes the mask: a token may look at what is real, and in the prefix or not later.
# - Labels are shifted once, in the loss.
# - 86 % of the parameters are language; at 224 pixels nearly all tokens are picture.
# - Loss and shapes miss the worst bugs: ask which input may change which output.

# %% [markdown]
# ## Quiz
#
# **1.** Why is the prompt not causal, as in other language models?
#
# <details><summary>Answer</summary>
#
# It is given, not predicted. A causal mask exists so that a token cannot see what it has to guess;
# nothing in the prefix is guessed, so hiding its later part only takes information away, most of
# all from the picture, which stands first.
#
# </details>

# %% [markdown]
# **2.** Why does each step of generation see a mask of `None`, although the suffix is causal?
#
# <details><summary>Answer</summary>
#
# The one new token is the last. Everything else lies before it, and a causal rule allows all of
# that. A mask is needed only when a row of the batch is padded.
#
# </details>

# %% [markdown]
# **3.** What would happen if the picture's vectors were multiplied by $\sqrt D$ as well?
#
# <details><summary>Answer</summary>
#
# No shape changes and nothing is raised. The first norm of each block undoes the size, but the
# *residual* stream keeps it: what the layers add to an image token becomes 45 times too small
# beside it, so the picture is hardly processed. Parity with the reference finds it at once.
#
# </details>

# %% [markdown]
# ## References
#
# - Lucas Beyer et al., *PaliGemma: A versatile 3B VLM for transfer*, 2024, section 3 and figure 2;
#   the ablations compare masks, and where the loss is taken.
# - Colin Raffel et al., *Exploring the Limits of Transfer Learning with a Unified Text-to-Text
#   Transformer*, 2020, section 3.2 (prefix LM).
# - transformers: `models/paligemma/modeling_paligemma.py`, class
#   `PaliGemmaForConditionalGeneration`; big_vision: `models/proj/paligemma/paligemma.py`.

# %% [markdown] tags=["navigation"]
# [← Processor](14_processor.ipynb) | [contents](00_overview.ipynb) | [Checkpoint →](16_checkpoint.ipynb)
