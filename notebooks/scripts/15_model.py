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
# *50 minutes* · part III, Together
#
# **What you will be able to do**
#
# - join a vision tower and a language model with one linear layer and one replacement;
# - write the prefix-LM mask from one rule;
# - make the trained model write, and see which patches each word comes from;
# - expose a loss that is too good, and a mask that no loss shows to be wrong.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("model")

# %% [markdown]
# ## Setup
#
# Here meet the vision tower ([lesson 05](05_siglip.ipynb)), the decoder
# ([lesson 12](12_gemma.ipynb)), the cache ([lesson 11](11_kv_cache.ipynb)) and the processor
# ([lesson 14](14_processor.ipynb)). The result is [model.py](../paligemma/model.py).

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
from paligemma.support.arguments import check_context, check_inputs, check_pictures

# %% tags=["setup"]
import math
from importlib import resources

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb
from safetensors.torch import load_file

from paligemma.plotting import show_heatmap, show_images
from paligemma.processor import Processor, collate
from paligemma.support.course import add_to_class, check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS

TINY = resources.files("paligemma") / "assets" / "tiny"  # the trained model of this course
_ = torch.manual_seed(15)

# %% [markdown]
# ## The problem
#
# A vision tower turns a picture into vectors, a language model vectors into the next token. Both are
# trained and finished. How do you make the second *read* what the first has seen? PaliGemma's answer is
# almost shamefully simple: put the picture's vectors at the front of the sentence, as if they were words.

# %% tags=["hide-input"]
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
fig, ax = plt.subplots(figsize=(9.6, 3.1), layout="constrained")
cat = sample_picture("cat").resize((300, 300))
for i, (name, kind) in enumerate(zip(names, kinds)):
    if kind == "image":
        x, y = i % 3 * 100, i // 3 * 100
        ax.imshow(cat.crop((x, y, x + 100, y + 100)), extent=(i - 0.45, i + 0.45, 0, 0.9))
    else:
        ax.add_patch(plt.Rectangle((i - 0.46, 0), 0.92, 0.9, color=KIND_COLOURS[kind], alpha=0.25))
        ax.text(i, 0.45, name, ha="center", va="center", fontsize=9)
for row, (label, (i, seen)) in enumerate(looks.items()):
    y = -0.75 - 0.75 * row
    ax.text(-0.8, y, label, ha="right", va="center", fontsize=9)
    ax.scatter(range(seen), [y] * seen, s=34, color=[KIND_COLOURS[k] for k in kinds[:seen]])
    ax.scatter(range(seen, 17), [y] * (17 - seen), s=8, color=COLOURS["muted"])
    ax.scatter(i, y, s=125, facecolor="none", edgecolor=COLOURS["ink"], linewidth=1.3)
ax.set(xlim=(-3.3, 16.6), ylim=(-3.4, 1.1), aspect="equal")
ax.set_axis_off()
save_figure(fig, "15_sequence.png")

# %% [markdown]
# A ring marks who looks. Nine patches (the real model has 256) and the prompt from bos (▸) to newline
# (↵) are the prefix, open to itself. The suffix, up to eos (■), must not see its own future.
#
# Three questions are left. **Width**: a picture's vector has 1152 numbers, a word's 2048. **Placing**:
# how do the vectors get there, and at what scale? **Looking**: how does one matrix say who sees whom?

# %% [markdown]
# ## By hand: width
#
# Two picture vectors of width 3, a language model of width $D = 4$. Width is the work of one matrix,
# the **projector**. What comes out, a vector that stands among words and is no word, is a **soft token**.

# %%
seen = torch.tensor([[1.0, 0, 2], [0, 1, 1]])  # [N, 3], from the vision tower
projector = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])  # [D, 3]
features = seen @ projector.T  # [N, D]
print(features)

# %% [markdown]
# ### By hand: placing
#
# The ids hold a placeholder for each picture vector: here id 9. Our word table is easy to recognise:
# row $i$ is filled with $i$. Gemma multiplies **words** by $\sqrt D$, here 2
# ([lesson 12](12_gemma.ipynb)). The picture's vectors enter **as they are**.

# %%
IMAGE, D = 9, 4
ids = torch.tensor([[IMAGE, IMAGE, 4, 5, 6, 1]])  # image image | animal ? | cat eos
table = torch.arange(8.0)[:, None].repeat(1, D)  # [V, D]: row i holds i
by_hand = torch.tensor([[1.0, 0, 2, 3], [0, 1, 1, 2], [8] * 4, [10] * 4, [12] * 4, [2] * 4])
assert torch.equal(by_hand[:2], features)

# %% [markdown]
# ### By hand: looking
#
# 6 × 6 pairs. Row = who looks, column = who is looked at, 1 = may look. Fill it with a pencil first: four
# rows are the same, and two have one more 1 than the row above.

# %%
grid = [
    [1, 1, 1, 1, 0, 0],
    [1, 1, 1, 1, 0, 0],
    [1, 1, 1, 1, 0, 0],
    [1, 1, 1, 1, 0, 0],
    [1, 1, 1, 1, 1, 0],
    [1, 1, 1, 1, 1, 1],
]

# %% tags=["hide-input"]
tokens = ["image 0", "image 1", "animal", "?", "cat", "■"]
token_kinds = ["image", "image", "prompt", "prompt", "suffix", "suffix"]


def draw_mask(ax, mask, kinds, names=None, title=None):
    """Each allowed pair in the colour of the token looked at; a dot on the diagonal."""
    mask = torch.as_tensor(mask).bool()
    pale, size = torch.tensor(to_rgb("#ece7dd")), len(kinds)
    colours = torch.tensor([to_rgb(KIND_COLOURS[kind]) for kind in kinds])  # [S, 3]
    ax.imshow(torch.where(mask[..., None], colours, pale))
    for edge in range(1, size):
        ax.axhline(edge - 0.5, color=COLOURS["paper"], linewidth=0.8)
        ax.axvline(edge - 0.5, color=COLOURS["paper"], linewidth=0.8)
    for i in range(size):
        ax.plot(i, i, ".", color=COLOURS["ink"], markersize=2.5)
    ax.set_title(title or "")
    ax.set_yticks(range(size), names, fontsize=9)
    ax.set_xticks(range(size), names, fontsize=9, rotation=90)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


fig, ax = plt.subplots(figsize=(3.6, 3.5), layout="constrained")
draw_mask(ax, grid, token_kinds, tokens)
ax.set(xlabel="is looked at", ylabel="looks")
save_figure(fig, "15_by_hand")

# %% [markdown]
# This is the **prefix-LM mask**. Blue and orange columns are full: the prefix is open to everybody. The
# purple corner is a staircase: a suffix token is open to itself and to those after it. So what matters is
# whether the token *looked at* belongs to the prefix.

# %% [markdown]
# ## As a loop
#
# Placing: walk along the ids; at a placeholder take the next picture vector, else the scaled word.


# %%
def merge_loop(ids, table, features):
    """One row, one token at a time: int64[L], float[V, D], float[N, D] → float[L, D]."""
    pictures, rows = iter(features), []
    for i in ids.tolist():
        rows.append(next(pictures) if i == IMAGE else table[i] * D**0.5)
    return torch.stack(rows)


assert torch.equal(merge_loop(ids[0], table, features), by_hand)

# %% [markdown]
# Looking: one rule for one pair. `real` is 0 for padding, `types` is 0 for the prefix and 1 for the
# suffix. A token may look at a **real** token that is in the **prefix** or is **not later** than
# itself.


# %%
def may_look(i, j, real, types):
    """May token i look at token j?"""
    return bool(real[j]) and (types[j] == 0 or j <= i)


# %%
def mask_loop(real, types):
    """One row, one pair at a time: int64[L] twice → bool[L, L]."""
    every = range(len(real))
    return torch.tensor([[may_look(i, j, real, types) for j in every] for i in every])


types = torch.tensor([0, 0, 0, 0, 1, 1])
assert torch.equal(mask_loop(torch.ones(6), types), torch.tensor(grid).bool())
print("equal to the pencil")

# %% [markdown]
# Where does it say that the prefix must not see the suffix? Nowhere. A suffix token is open
# only to those that are not earlier, and every prefix token is earlier.
#
# ## Vectorised
#
# Placing: embed everything at once, with some harmless id at the placeholders, then overwrite
# those rows. `masked_scatter` fills the True rows in order.

# %%
is_image = ids == IMAGE  # [B, L]
embeds = F.embedding(ids.masked_fill(is_image, 0), table) * D**0.5  # [B, L, D]
merged = embeds.masked_scatter(is_image[..., None], features)
assert torch.equal(merged[0], by_hand)

# %% [markdown]
# Looking: the same rule, where `i` is a column of numbers, `j` a row, and broadcasting makes all
# pairs.


# %%
#| export
def prefix_lm_mask(attention_mask, token_type_ids):
    """int64[B, L] twice → bool[B, 1, L, L]; the 1 is for the heads."""
    j = torch.arange(attention_mask.shape[1])
    i = j[:, None]
    prefix = (token_type_ids == 0)[:, None, None, :]
    return attention_mask.bool()[:, None, None, :] & (prefix | (j <= i))


# %%
real = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])  # the second row is padded
types = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1]])
mask = prefix_lm_mask(real, types)[:, 0]
for row in range(2):
    assert torch.equal(mask[row], mask_loop(real[row], types[row]))
print(mask[1].int())

# %% [markdown]
# ## The module
#
# First the numbers. The defaults *are* PaliGemma 3B; with a `Gemma2Config` ([lesson 13](13_gemma2.ipynb))
# it becomes PaliGemma 2, and nothing else changes.


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
# The projector is one linear layer, and the only part that came from neither parent.


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


# %% [markdown]
# The loss compares the logits at position $t$ with the token at position $t + 1$. Labels stand *at*
# their token ([lesson 14](14_processor.ipynb)), so somebody has to shift by one. Here it is done **once,
# and nowhere else**.


# %%
#| export
def suffix_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each labelled token given what is before it, a scalar; 0 if none is.

    Args:
        logits: `float32[B, L, V]`.
        labels: `int64[B, L]`, -100 where nothing is to be learned; shifted here, once.
    """
    shift_logits, shift_labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = F.cross_entropy(shift_logits, shift_labels, ignore_index=-100, reduction="sum")
    return total / (shift_labels != -100).sum().clamp(min=1)


# %% [markdown]
# ### The whole
#
# Three parts, under the names that the published checkpoint uses. `forward` reads like a summary of
# the course: see, merge, count *real* positions, mask, decode, score.


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

    def encode_image(self, pixel_values):
        return self.multi_modal_projector(self.vision_tower(pixel_values))  # [P, N, D]

    def merge(self, input_ids, image_features):
        is_image = input_ids == self.config.image_token_index  # [B, L]
        inputs_embeds = self.language_model.embed(input_ids.masked_fill(is_image, 0))  # [B, L, D]
        return inputs_embeds.masked_scatter(is_image[..., None], image_features)

    def forward(self, input_ids, pixel_values, attention_mask, token_type_ids, labels=None):
        x = self.merge(input_ids, self.encode_image(pixel_values))  # [B, L, D]
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)  # [B, L]
        mask = prefix_lm_mask(attention_mask, token_type_ids)  # [B, 1, L, L]
        hidden = self.language_model(x, position_ids, mask)  # [B, L, D]
        logits = self.language_model.logits(hidden)  # [B, L, V]
        loss = None if labels is None else suffix_loss(logits, labels)
        return PaliGemmaOutput(logits, loss)


# %% [markdown]
# Does it work? The trained model of this course has the same parts, only smaller. (Its file names them a
# little differently: [lesson 16](16_checkpoint.ipynb).)

# %%
vision = SiglipVisionConfig(128, 512, 4, 4, image_size=112)
text = GemmaConfig(2240, 128, 256, 4, 4, 1, 32)
tiny = PaliGemma(PaliGemmaConfig(vision, text, image_token_index=2176)).eval()
weights = {}
for name, weight in load_file(TINY / "model.safetensors").items():
    name = name.replace("vision_model.", "").replace("language_model.model.", "language_model.")
    weights[name] = weight
print(tiny.load_state_dict(weights))

# %% [markdown]
# To answer, take the likeliest next token, append it, and do it all again until eos comes.


# %%
def write(batch):
    """The answer, greedily; the whole sequence anew for each token."""
    ids, types, start = batch["input_ids"], batch["token_type_ids"], len(batch["input_ids"][0])
    while ids[0, -1] != tiny.config.eos_token_id and ids.shape[1] < start + 20:
        with torch.no_grad():
            logits = tiny(ids, batch["pixel_values"], torch.ones_like(ids), types).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        types = F.pad(types, (0, 1), value=1)  # what it writes is suffix
    return processor.decode(ids[0, start:])


# %%
processor = Processor.from_pretrained(TINY)
batch = processor(sample_picture("scene"), "caption en")
caption = write(batch)
print(caption)
assert caption == "a cat and two dogs"

# %% tags=["hide-input"]
show_images(sample_picture("scene"), height=1.6)

# %% [markdown]
# After fourteen lessons, the first sentence.
#
# ## A bug people really make: a loss that is too good
#
# A colleague trains a small model, and the loss falls faster than anybody hoped. To be sure they
# take three **random** words as the answer, drawn anew in each step. Nothing is to be learned from them;
# the best possible loss is that of guessing.


# %%
vision = SiglipVisionConfig(48, 96, 2, 4, image_size=42)
text = GemmaConfig(32, 64, 128, 2, 4, 1, 16)
config = PaliGemmaConfig(vision, text, image_token_index=31)
pixel_values = torch.zeros(16, 3, 42, 42)
prompts = [[31] * 9 + [2, 5, 4]] * 16  # nine image tokens, bos, a word, newline


# %%
def losses_on_random_answers(change, steps=120):
    """A fresh small model, trained on answers that nobody can know: its loss, step by step."""
    torch.manual_seed(1)
    model, losses = PaliGemma(config), []
    nn.init.normal_(model.language_model.embed_tokens.weight, std=64**-0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        batch = collate(prompts, torch.randint(5, 21, (16, 3)).tolist())
        loss = model(pixel_values=pixel_values, **change(batch)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# %% [markdown]
# Their collator makes no `token_type_ids`; what is missing is filled with 0.


# %% tags=["nbval-ignore-output"]
def without_types(batch):
    return batch | {"token_type_ids": torch.zeros_like(batch["input_ids"])}


chance = math.log(16)  # sixteen words, all equally likely
theirs = losses_on_random_answers(without_types)
print(f"guessing blindly: {chance:.2f}; the colleague's model: {theirs[-1]:.2f}")
assert theirs[-1] < 0.1 * chance

# %% [markdown]
# It predicts what cannot be predicted, because it reads it from the answer: type 0 is prefix, and in a
# prefix everybody sees everybody. The position that has to say the word looks one step ahead, and there
# the word stands. When it has to *write*, there is nothing to copy from, and it has learned nothing else.

# %%
ours = losses_on_random_answers(lambda batch: batch)
print(f"with types: {ours[-1]:.2f}, the lowest {min(ours):.2f}")
assert min(ours) > 0.9 * chance

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7, 2.8), layout="constrained")
ax.axhline(chance, color=COLOURS["muted"], linestyle=":")
ax.text(120, chance - 0.45, "guessing blindly", color=COLOURS["inside"], ha="right")
for name, losses, colour in (("without types", theirs, "bad"), ("with types", ours, "good")):
    ax.plot(losses, color=COLOURS[colour], label=name)
ax.set(xlabel="step", ylabel="loss on random answers", ylim=(0, 6))
ax.legend(loc="upper right")
save_figure(fig, "15_leak")

# %% [markdown]
# With types the loss stays where it belongs. So the check is: **train on random answers; a loss
# below guessing means that the answer shows through.** Labels without types are never what anybody
# wants: `check_inputs` ([support/arguments.py](../paligemma/support/arguments.py)) refuses them, as it
# does every tensor that doesn't fit.

# %% [markdown]
# ## What else a program adds
#
# ### Ids and pictures that don't fit
#
# `masked_scatter` takes as many vectors as there are placeholders and asks nothing about the rest. A prompt
# for one picture, and two pictures:

# %%
pictures = processor.image_processor([sample_picture("scene"), sample_picture("scene2")])
with torch.no_grad():
    features = tiny.encode_image(pictures)  # [P, N, D]
    one, two = (tiny.merge(batch["input_ids"], features[:count]) for count in (1, 2))
print("with a second picture, the same sequence:", torch.equal(one, two))
assert torch.equal(one, two)

# %% [markdown]
# The second picture is never seen, and nobody is told. So `check_pictures` counts, over the whole batch:
# the pictures fill the placeholders **in order over the rows**, and a row may hold several.


# %%
#| export
@add_to_class(PaliGemma)
def merge(self, input_ids: torch.Tensor, image_features: torch.Tensor | None) -> torch.Tensor:
    """One sequence of words, times √D, and of pictures, as they are: `float[B, L, D]`.

    Args:
        input_ids: `int64[B, L]`.
        image_features: `float[P, N, D]`; they fill the `<image>` tokens in order over the rows.

    Raises:
        ValueError: not exactly one `<image>` token for each vector.
    """
    is_image = input_ids == self.config.image_token_index  # [B, L]
    check_pictures(is_image, image_features)
    inputs_embeds = self.language_model.embed(input_ids.masked_fill(is_image, 0))  # [B, L, D]
    if image_features is None:
        return inputs_embeds
    return inputs_embeds.masked_scatter(is_image[..., None], image_features.to(inputs_embeds.dtype))


# %% [markdown]
# ### The mask, for a padded row and for a cache
#
# A padded token looks too, and its result is thrown away. But what if it may look at nothing? Here all is
# suffix, and the first token of the second row is padding:

# %%
row = prefix_lm_mask(real, torch.ones_like(real))[1, 0, 0]
weights = torch.zeros(6).masked_fill(~row, -math.inf).softmax(-1)
print(weights)
assert weights.isnan().all()

# %% [markdown]
# A softmax over nothing is 0 divided by 0. So each token may see *itself* in any case.
#
# With a cache only the $L$ new tokens ask, and $S$ can be looked at: the cached ones and the new. Cached
# tokens all lie *before* the new ones, so they may be called prefix.


# %%
#| export
def prefix_lm_mask(
    attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None, length: int
) -> torch.Tensor:
    """Who may look at whom: prefix at prefix in both directions, suffix only backwards.

                         is looked at
                    image  prompt  suffix
        image       1 1 1   1 1    0 0 0
        prompt      1 1 1   1 1    0 0 0
        suffix      1 1 1   1 1    1 0 0
                    1 1 1   1 1    1 1 0
                    1 1 1   1 1    1 1 1

    Args:
        attention_mask: `int64[B, S]`, 0 on padding: the tokens of the cache, and the L new ones.
        token_type_ids: `int64[B, L]`, 0 prefix, 1 suffix; None: all prefix, or behind a cache
            all suffix.
        length: L, the number of new tokens (the queries).

    Returns:
        `bool[B, 1, L, S]`, True where query i may look at key j.

    Source: PaliGemma paper, figure 2; Raffel et al. 2020 (prefix LM).
    """
    total = attention_mask.shape[1]
    past = total - length
    if token_type_ids is None:
        token_type_ids = torch.full_like(attention_mask[:, past:], 1 if past else 0)
    key = torch.arange(total, device=attention_mask.device)
    query = key[past:, None]  # [L, 1]
    prefix = F.pad(token_type_ids == 0, (past, 0), value=True)[:, None, None, :]
    real = attention_mask.bool()[:, None, None, :]  # [B, 1, 1, S]
    # A padded query sees itself: a softmax over nothing would be 0/0.
    return real & (prefix | (key <= query)) | (key == query)  # [B, 1, L, S]


# %%
ours = prefix_lm_mask(real, types, 6)  # [B, 1, L, L]
padded = (real == 0)[:, None, :] & torch.eye(6, dtype=torch.bool)
assert torch.equal(ours[:, 0], mask | padded)
assert torch.equal(prefix_lm_mask(real, types[:, 3:], 3), ours[:, :, 3:])
print("equal to the plain one; with 3 cached tokens: its last 3 rows")

# %% [markdown]
# ### An answer, token by token
#
# Three arguments more. With a `cache` only the new tokens come in ([lesson 11](11_kv_cache.ipynb)).
# `image_features` are pictures encoded before. `logits_to_keep` spares the head
# ([lesson 12](12_gemma.ipynb)). Where nothing is hidden, no mask is made.


# %%
#| export
@add_to_class(PaliGemmaOutput)
def __getitem__(self, index):
    """By number, the loss first where there is one: as in transformers."""
    return tuple(t for t in (self.loss, self.logits) if t is not None)[index]


@add_to_class(PaliGemma)
@property
def device(self) -> torch.device:
    """Where the weights are."""
    return self.language_model.embed_tokens.weight.device


@add_to_class(PaliGemma)
@property
def dtype(self) -> torch.dtype:
    """Type of the weights and of the cache."""
    return self.language_model.embed_tokens.weight.dtype


@add_to_class(PaliGemma)
def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
    """`float[P, 3, H, W]` → `float[P, N, D]`, the vectors that stand for P pictures."""
    return self.multi_modal_projector(self.vision_tower(pixel_values.to(self.dtype)))


@add_to_class(PaliGemma)
def make_cache(self, batch_size: int, max_length: int) -> KVCache:
    """An empty cache for `batch_size` rows of up to `max_length` tokens, within the context."""
    c = self.config.text_config
    check_context(max_length, c.max_position_embeddings)
    shape = (batch_size, c.num_key_value_heads, max_length, c.head_dim)
    return KVCache(c.num_hidden_layers, *shape, self.device, self.dtype)


# %%
#| export
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
        attention_mask: `int64[B, S]`, 0 on padding, cached tokens and new ones; None: none.
        token_type_ids: `int64[B, L]`, 0 prefix, 1 suffix; None: prefix (suffix after a cache).
        labels: `int64[B, L]`, -100 where nothing is to be learned; not shifted.
        cache: from `make_cache`; gains the L tokens.
        image_features: `float[P, N, D]` from `encode_image`, instead of `pixel_values`.
        logits_to_keep: only the last so many positions get logits (and a loss); None: all.

    Returns:
        `PaliGemmaOutput`: logits `float32[B, L or logits_to_keep, V]`, loss a scalar or None.

    Raises:
        ValueError: tensors that do not fit, labels without types, a picture given twice, more
            tokens than `max_position_embeddings`.
    """
    past, length = 0 if cache is None else len(cache), input_ids.shape[1]
    all_see_all = attention_mask is None and token_type_ids is None and (length == 1 or not past)
    attention_mask = check_inputs(input_ids, past, attention_mask, token_type_ids, labels)
    check_context(past + length, self.config.text_config.max_position_embeddings)
    if pixel_values is not None:
        if image_features is not None:
            raise ValueError("got pixel_values and image_features; give one of them")
        image_features = self.encode_image(pixel_values)  # [P, N, D]
    if past and image_features is None:  # the picture is cached; a new <image> is a word
        x = self.language_model.embed(input_ids)
    else:
        x = self.merge(input_ids, image_features)  # [B, L, D]
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past:]  # [B, L]
    mask = None if all_see_all else prefix_lm_mask(attention_mask, token_type_ids, length)
    hidden = self.language_model(x, position_ids, mask, cache)  # [B, L, D]
    keep = min(logits_to_keep or length, length)
    logits = self.language_model.logits(hidden[:, -keep:])  # [B, keep, V]
    loss = None if labels is None else suffix_loss(logits, labels[:, -keep:])
    return PaliGemmaOutput(logits, loss)


# %% [markdown]
# First the prefix, then token by token, and all in one pass: the same logits.

# %%
whole = processor(sample_picture("scene"), "caption en", caption)
ids, start = whole["input_ids"], batch["input_ids"].shape[1]
with torch.no_grad():
    at_once = tiny(ids, pictures[:1], token_type_ids=whole["token_type_ids"]).logits
    cache = tiny.make_cache(1, ids.shape[1])
    tiny(ids[:, :start], pictures[:1], cache=cache)  # the prefix
    steps = [tiny(ids[:, [t]], cache=cache).logits for t in range(start, ids.shape[1])]
gap = (torch.cat(steps, dim=1) - at_once[:, start:]).abs().max().item()
print(f"{len(steps)} steps, largest difference {gap:.0e}")
assert gap < 1e-3

# %% [markdown]
# ## Against the reference
#
# The file holds a small `PaliGemmaForConditionalGeneration` of transformers with random weights, a
# padded batch, and its logits and loss. At padded positions no value means anything, so we compare the real
# ones.

# %%
stored = load_file("reference/model.safetensors")
vision = SiglipVisionConfig(8, 12, 1, 2, image_size=28)
text = GemmaConfig(64, 16, 24, 2, 2, 1, 8)
small = PaliGemma(PaliGemmaConfig(vision, text, image_token_index=60))
print(small.load_state_dict({name: stored.pop(name) for name in small.state_dict()}))

# %%
inputs = {name: stored[name] for name in whole}
with torch.no_grad():
    out = small(**inputs)
gap = (out.logits - stored["logits"])[inputs["attention_mask"].bool()].abs().max().item()
loss_gap = (out.loss - stored["loss"]).abs().item()
assert gap <= 1e-5 and loss_gap <= 1e-5
print(f"largest difference: logits {gap:.1e}, loss {loss_gap:.1e}")

# %% [markdown]
# ## See it: the mask of a padded batch
#
# Two rows of unequal length, with nine image tokens (·) each. Grey is padding.

# %% tags=["hide-input"]
rows = ["▸ what animal ? ↵".split(), "▸ who ↵".split()]
answers = ["a cat ■".split(), "an astronaut ■".split()]
fake = collate([[9] * (9 + len(row)) for row in rows], [[9] * 3] * 2)
masks = prefix_lm_mask(fake["attention_mask"], fake["token_type_ids"], 17)[:, 0]
fig, axes = plt.subplots(1, 2, figsize=(9.4, 4.9), layout="constrained")
for ax, mask, row, answer in zip(axes, masks, rows, answers):
    pads = 5 - len(row)
    names = ["<pad>"] * pads + ["·"] * 9 + row + answer
    kinds = ["padding"] * pads + ["image"] * 9 + ["prompt"] * len(row) + ["suffix"] * 3
    draw_mask(ax, mask, kinds, names)
    ax.set(xlabel="is looked at", ylabel="looks")
save_figure(fig, "15_mask")

# %% [markdown]
# What to notice: a padded *column* is pale but for one grey cell: nobody else looks there. What a padded
# *row* sees does not matter.

# %% [markdown]
# ### Does the model obey, and where does it look?
#
# We *measure*, in the trained model with its caption, how strongly each input vector
# influences the likeliest next token: the gradient of that token's logit, through all layers.

# %%
x = tiny.merge(ids, tiny.encode_image(pictures[:1])).detach().requires_grad_()  # [1, L, D]
mask = prefix_lm_mask(torch.ones_like(ids), whole["token_type_ids"], ids.shape[1])
hidden = tiny.language_model(x, torch.arange(ids.shape[1])[None], mask)
best = tiny.language_model.logits(hidden)[0].max(-1).values  # [L]
gradients = [torch.autograd.grad(logit, x, retain_graph=True)[0] for logit in best]
influence = torch.cat(gradients).norm(dim=-1)  # [L, L]: of input j on the token after position i
assert torch.equal(influence > 0, mask[0, 0])
print("zero exactly where the mask is False")

# %% [markdown]
# Four layers deep, and still the same pattern: if $i$ may look at $j$ and $j$ at $k$, then $i$ may look
# at $k$.
#
# And the 64 columns of the picture, each back where its patch was:

# %%
said = [processor.tokenizer.sp.id_to_piece(i) for i in ids[0, start:].tolist()]
maps = influence[start - 1 : -1, :64].view(-1, 8, 8)  # one for each token of the answer
for word, m in zip(said, maps / maps.sum((1, 2), keepdim=True)):
    cat, upper, lower = m[4:7, :3].sum(), m[2:4, 3:6].sum(), m[4:7, 5:].sum()
    print(
        f"{word:6} from the cat {cat:4.0%}, the upper dog {upper:4.0%}, the lower dog {lower:4.0%}"
    )
    assert word != "▁cat" or cat > 1.5 * (upper + lower)
    assert word != "▁dogs" or min(upper, lower) > cat

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 6, figsize=(9.8, 1.95), layout="constrained")
axes[0].imshow(sample_picture("scene"))
axes[0].set_axis_off()
for ax, word, m in zip(axes[1:], said, maps):
    show_heatmap(m, f"“{word.lstrip('▁')}”", ax=ax)
save_figure(fig, "15_words.png")

# %% [markdown]
# “cat” comes from the cat's patches, “dogs” from both dogs'. Nobody told the model where to look.
#
# ## At full size
#
# The default configuration is the real model. On PyTorch's device "meta" it has shapes and no numbers, so
# 3 billion parameters cost nothing. Which parts hold them?

# %%
with torch.device("meta"):
    full = PaliGemma(PaliGemmaConfig())
parts = ("vision_tower", "projector", "embed_tokens", "self_attn", "mlp", "norm")
sizes = dict.fromkeys(parts, 0)
for name, weight in full.named_parameters():
    sizes[next(part for part in parts if part in name)] += weight.numel()

# %%
total = sum(sizes.values())
for part, size in sizes.items():
    print(f"{part:12} {size:13,}  {size / total:6.1%}")
print(f"{'together':12} {total:13,}")
assert total == 2_923_466_480 and round(total / sizes["vision_tower"]) == 7
assert 0.6 < sizes["mlp"] / total < 0.65 and sizes["projector"] < total / 1000
assert round(1 - (sizes["vision_tower"] + sizes["projector"]) / total, 2) == 0.86

# %% [markdown]
# The eye is a seventh of the model, the joint less than a thousandth. Three fifths are the decoder's
# MLPs. (The vision tower's own attention and MLPs are in its row; the embedding is the head, too.)
#
# One picture of 224 pixels and a prompt of eight tokens flow through it like this:

# %% tags=["hide-input"]
with torch.device("meta"):
    pixels, prompt = torch.empty(1, 3, 224, 224), torch.empty(1, 8, dtype=torch.int64)
    stages = {"patches": full.vision_tower.embeddings(pixels)}
    stages["seen"] = full.vision_tower(pixels)
    stages["projected"] = full.encode_image(pixels)
    words = full.language_model.embed(prompt)
    stages["merged"] = torch.cat([stages["projected"], words], dim=1)
    stages["decoded"] = full.language_model(stages["merged"], torch.arange(264)[None])

fig, ax = plt.subplots(figsize=(9.8, 3.7), layout="constrained")
ax.imshow(sample_picture("cat").resize((448, 448)), extent=(-345, -45, 0, 300))
ax.text(-195, -60, "1 × 3 × 224 × 224\npixels", ha="center", va="top", fontsize=9)
x = 110
for name in ("patches", "seen", "projected", "merged", "decoded"):
    _, length, width = stages[name].shape
    colour = COLOURS["vision"] if name in ("patches", "seen") else COLOURS["together"]
    ax.add_patch(plt.Rectangle((x, 0), 256, width / 4, color=colour, alpha=0.75))
    if length > 256:
        ax.add_patch(plt.Rectangle((x + 256, 0), 8, width / 4, color=COLOURS["language"]))
    ax.text(x + 128, width / 4 + 14, name, ha="center", fontsize=9)
    ax.text(x + 128, -60, f"{length} × {width}", ha="center", va="top", fontsize=9)
    ax.annotate("", (x - 8, 140), (x - 82, 140), arrowprops={"arrowstyle": "->", "color": "#555"})
    x += 350
ax.annotate("", (x - 8, 140), (x - 76, 140), arrowprops={"arrowstyle": "->", "color": "#555"})
ax.add_patch(plt.Rectangle((x + 30, 0), 8, 590, color=COLOURS["accent"]))
for y in (585, 600, 615):
    ax.plot(x + 34, y + 20, ".", color=COLOURS["accent"], markersize=3)
ax.text(x + 34, 655, "logits", ha="center", fontsize=9)
ax.text(x + 34, -60, "1 × 257216", ha="center", va="top", fontsize=9)
ax.annotate(
    "8 tokens × √D", (1160 + 262, 520), (1160 + 20, 640), fontsize=9, color=COLOURS["language"],
    arrowprops={"arrowstyle": "->", "color": COLOURS["language"]},
)  # fmt: skip
ax.set(xlim=(-360, x + 150), ylim=(-170, 720), aspect="equal")
ax.set_axis_off()
save_figure(fig, "15_shapes.png")

# %% [markdown]
# Width is tokens, height is numbers in each token, to scale (but for the logits). The words are the thin
# orange edge: to the decoder a picture *is* 256 words. What that costs is counted in
# [lesson 18](18_generation.ipynb).


# %% [markdown]
# ## A second bug, which no loss shows
#
# Another colleague builds on a language model whose mask is causal ([lesson 10](10_grouped_query_attention.ipynb)),
# and leaves it so. In our terms: every token has type 1. What the trained model writes is fluent:

# %%
causal = batch | {"token_type_ids": torch.ones_like(batch["input_ids"])}
for title, one in {"prefix-LM mask": batch, "causal mask": causal}.items():
    print(f"{title:15} {write(one)}")
assert write(causal) != caption

# %% [markdown]
# It is not what the picture shows: the dogs are gone. Under a causal mask the picture stands *before* the question and cannot know it, nor
# the first patches the last ones. With the prefix-LM mask the picture is read again in each layer, in the
# light of the question. The check is the one from above.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): count the pairs
#
# A row has 2 padded positions, 4 image tokens, 3 prompt tokens and 3 suffix tokens. How many True has
# its 12 × 12 mask from `prefix_lm_mask`, and how many would a causal mask have over the ten real
# tokens?

# %% tags=["exercise"]
prefix_lm_pairs = None  # your answer
causal_pairs = None  # your answer


# %% tags=["check"]
def test_1(prefix_lm_pairs, causal_pairs):
    numbers = isinstance(prefix_lm_pairs, int) and isinstance(causal_pairs, int)
    assert numbers, "two whole numbers, please"
    real = torch.tensor([[0] * 2 + [1] * 10])
    types = torch.tensor([[0] * 9 + [1] * 3])
    found = int(prefix_lm_mask(real, types, 12).sum())
    assert prefix_lm_pairs != found - 16, "padded tokens have rows too, even if nobody reads them"
    assert prefix_lm_pairs != found - 14, "a padded token sees itself, and the prefix as well"
    assert prefix_lm_pairs == found, "add up: the prefix block, the suffix's rows, the padded rows"
    right = int(torch.ones(10, 10).tril().sum())
    assert causal_pairs != 45, "under a causal mask a token sees itself, too"
    assert causal_pairs == right, "causal: row after row one more, 1 + 2 + 3 + …"


check(test_1, prefix_lm_pairs, causal_pairs)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Seven prefix tokens see seven. The first suffix token sees those and itself. The padded row of the figure
# above has blue, orange and one grey cell.
#
# </details>

# %% tags=["solution"]
# A full block, rows that grow by one, and for each pad the prefix and itself.
prefix_lm_pairs = 7 * 7 + (8 + 9 + 10) + 2 * (7 + 1)
causal_pairs = 10 * 11 // 2
check(test_1, prefix_lm_pairs, causal_pairs)

# %% [markdown]
# ### Exercise 2 (break): a check that catches wrong masks
#
# Return True for a right `make_mask(attention_mask, token_type_ids, length)` and False for a wrong
# one: the check tries yours on four. Choose the inputs yourself; `mask_loop` (for one row) may help.


# %% tags=["exercise"]
def is_right(make_mask):
    return None  # call make_mask on inputs of your choice


# %% tags=["check"]
def test_2(is_right):
    def wrong(change):
        def make_mask(real, types, length):
            mask = prefix_lm_mask(real, types, length)
            return change(mask, real, types)

        return make_mask

    def seen_by_suffix(suffix):
        return suffix[:, None, :, None] & suffix[:, None, None, :]

    wrong_ones = {
        "causal over the prefix": wrong(lambda m, r, t: m.tril()),
        "inverted: True means hidden": wrong(lambda m, r, t: ~m),
        "padding is seen": wrong(lambda m, r, t: m | (r == 0)[:, None, None, :]),
        "the suffix sees its future": wrong(lambda m, r, t: m | seen_by_suffix(t * r == 1)),
    }
    assert isinstance(is_right(prefix_lm_mask), bool), "return True or False"
    assert is_right(prefix_lm_mask) is True, "rejects prefix_lm_mask"
    for name, make_mask in wrong_ones.items():
        assert is_right(make_mask) is False, f"lets this one through: {name}"


check(test_2, is_right)

# %% [markdown]
# <details><summary>Hint</summary>
#
# One padded row with two prefix and two suffix tokens is enough. Compare only the rows of real tokens.
#
# </details>


# %% tags=["solution"]
# One row with everything in it: a pad, two of the prefix, two of the suffix.
def is_right(make_mask):
    real, types = torch.tensor([[0, 1, 1, 1, 1]]), torch.tensor([[0, 0, 0, 1, 1]])
    mask = make_mask(real, types, 5)[0, 0]
    return torch.equal(mask[1:], mask_loop(real[0], types[0])[1:])


check(test_2, is_right)

# %% [markdown]
# ### Exercise 3 (write): two examples in one row
#
# **Packing** puts several examples into one row: `segments` (int64[B, L]) says
# which example a token belongs to, 0 for padding. Write the mask, bool[B, L, L]: each example has a
# prefix-LM mask of its own and is blind to the others; a padded token sees nothing.


# %% tags=["exercise"]
def packed_mask(segments, types):
    return None  # your answer


# %% tags=["check"]
def test_3(packed_mask):
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 2, 2, 2]])
    types = torch.tensor([[0, 0, 1, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 0, 1, 1]])
    found = packed_mask(segments, types)
    assert isinstance(found, torch.Tensor) and found.shape == (2, 8, 8), "return bool[B, L, L]"
    assert found.dtype == torch.bool, "return bools, not numbers"
    assert not found[0, :3, 3:7].any(), "the first example looks at the second"
    assert not found[0, 3:7, :3].any(), "the second example looks at the first"
    assert not found[0, 7].any() and not found[0, :, 7].any(), "padding sees or is seen"
    for row, first, last in ((0, 0, 3), (0, 3, 7), (1, 0, 5), (1, 5, 8)):
        part = types[row, first:last]
        alone = mask_loop(torch.ones_like(part), part)
        inside = found[row, first:last, first:last]
        assert inside[part == 0][:, part == 0].all(), "a prefix token is not seen by its prefix"
        assert not (inside & ~alone).any(), "inside an example, one sees a later suffix token"
        assert torch.equal(inside, alone), "inside an example, one sees too little"


check(test_3, packed_mask)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The rule of the lesson, with another condition in place of `real`: both tokens carry the same segment, not 0.
#
# </details>


# %% tags=["solution"]
# "Same segment" takes the place of "real": whatever lies outside is as good as padding.
def packed_mask(segments, types):
    j = torch.arange(segments.shape[1])
    same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
    return same & ((types == 0)[:, None, :] | (j <= j[:, None]))


check(test_3, packed_mask)

# %% [markdown]
# ## Summary
#
# - A picture enters a language model as vectors at the front of the sentence: one linear layer to
#   the right width, one replacement.
# - One rule makes the mask: a token may look at what is real, and in the prefix or not later.
# - Labels need token types: a loss below guessing on random answers means that the answers show through.
# - 86 % of the parameters are language; at 224 pixels nearly all tokens are picture.
# - Ask which input may change which output; a loss does not tell.

# %% [markdown]
# ## Quiz
#
# **1.** Why is the prompt not causal, as in other language models?
#
# <details><summary>Answer</summary>
#
# It is given, not predicted. A causal mask exists so that a token cannot see what it has to guess.
# Nothing in the prefix is guessed: hiding its later part only takes information away.
#
# </details>

# %% [markdown]
# **2.** Why does a step of answering need no mask, although the suffix is causal?
#
# <details><summary>Answer</summary>
#
# The one new token is the last. Everything else lies before it, and a causal rule allows all of
# that. Only padding has to be hidden.
#
# </details>

# %% [markdown]
# **3.** What would happen if the picture's vectors were multiplied by $\sqrt D$ as well?
#
# <details><summary>Answer</summary>
#
# Nothing is raised. The first norm of each block undoes the size, but the *residual* stream keeps it:
# what the layers add to an image token becomes 45 times too small beside it, so the picture is hardly
# processed.
#
# </details>

# %% [markdown]
# ## References
#
# - Lucas Beyer et al., *PaliGemma: A versatile 3B VLM for transfer*, 2024, section 3 and figure 2.
# - Colin Raffel et al., *Exploring the Limits of Transfer Learning with a Unified Text-to-Text
#   Transformer*, 2020, section 3.2 (prefix LM).
# - transformers: `models/paligemma/modeling_paligemma.py`, class
#   `PaliGemmaForConditionalGeneration`; big_vision: `models/proj/paligemma/paligemma.py`.

# %% [markdown] tags=["navigation"]
# [← Processor](14_processor.ipynb) | [contents](00_overview.ipynb) | [Checkpoint →](16_checkpoint.ipynb)
