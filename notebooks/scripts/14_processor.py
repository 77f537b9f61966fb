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
# [← Gemma 2](13_gemma2.ipynb) | [contents](00_overview.ipynb) | [PaliGemma →](15_model.ipynb)

# %% [markdown]
# # 14 · Processor: what exactly does the model read?
#
# *40 minutes* · part III, Together
#
# **What you will be able to do**
#
# - write down, id by id, the sequence for a picture, a prompt and an answer;
# - say what each of the four integer tensors of a batch is for;
# - explain why batches are padded on the left;
# - spot four wrong sequences that read the same, and positions that are off by the padding.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("processor")

# %% [markdown]
# ## Setup
#
# The processor joins two earlier parts: `ImageProcessor` of [lesson 02](02_image_processor.ipynb)
# and `Tokenizer` of [lesson 06](06_tokenizer.ipynb). The result is
# [processor.py](../paligemma/processor.py).

# %%
#| export
"""Pictures and prompts to the tensors of one batch."""

import os
from collections.abc import Iterable

import torch

from paligemma.image_processor import ImageProcessor
from paligemma.support.arguments import as_lists
from paligemma.support.config import read_config
from paligemma.support.files import find_folder
from paligemma.support.pictures import Picture
from paligemma.support.replacing import replacing
from paligemma.support.tokens import encode_within
from paligemma.tokenizer import Tokenizer

# %% tags=["setup"]
import random
import tempfile
from importlib import resources

import matplotlib.pyplot as plt
from safetensors.torch import load_file

from paligemma.support.course import add_to_class, check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS

TINY = resources.files("paligemma") / "assets" / "tiny"  # the checkpoint that ships with the course
tokenizer = Tokenizer.from_pretrained(TINY)

# %% [markdown]
# ## The problem
#
# A person has a picture and a question. The model has an embedding table: it reads rows of whole
# numbers and nothing else. Between the two stands a **layout** that was fixed when the model was
# trained:
#
# $$\underbrace{\texttt{<image>}\cdots\texttt{<image>}}_{N}\ \texttt{<bos>}\ \text{prompt}\
# \texttt{↵}\ \underbrace{\text{answer}\ \texttt{<eos>}}_{\text{training only}}$$
#
# Get one number of it wrong and nothing breaks. The model only gets worse.

# %% [markdown]
# Three pictures, three prompts, three answers, as the model gets them in training. Of the
# image tokens (64 in the course's tiny model, 256 to 4,096 in the real one) only three are drawn.

# %%
names = ("cat", "scene", "coffee")
prompts = ["detect cat", "answer en how many cats?", "caption en"]
suffixes = ["<loc0008><loc0061><loc0960><loc0854> cat", "1", "a cup"]

# %% tags=["hide-input"]
KIND_COLOURS = {
    "image": COLOURS["vision"],
    "special": COLOURS["together"],
    "prompt": COLOURS["language"],
    "suffix": COLOURS["accent"],
    "padding": COLOURS["muted"],
}
SPECIAL = {tokenizer.bos_id: "bos", tokenizer.newline_id: "↵", tokenizer.eos_id: "eos"}


def spell(i):
    """What one id stands for, short enough for a box."""
    piece = {**SPECIAL, tokenizer.pad_id: "pad", tokenizer.image_id: "img"}.get(i)
    return (piece or tokenizer.sp.id_to_piece(i)).replace("<loc", "loc\n").rstrip(">")


def kind_of(i, is_suffix):
    if i in (tokenizer.pad_id, tokenizer.image_id):
        return "padding" if i == tokenizer.pad_id else "image"
    return "special" if i in SPECIAL else "suffix" if is_suffix else "prompt"


def draw_strip(ax, ids, types, y=0.0, marked=(), words=None):
    """One row of ids as coloured boxes; those at `marked` get a red frame."""
    for x, (i, is_suffix) in enumerate(zip(ids, types)):
        place = {"xy": (x - 0.47, y - 0.42), "width": 0.94, "height": 0.84}
        colour = KIND_COLOURS[kind_of(i, is_suffix)]
        ax.add_patch(plt.Rectangle(**place, color=colour, alpha=0.28, linewidth=0))
        if x in marked:
            ax.add_patch(plt.Rectangle(**place, fill=False, edgecolor=COLOURS["bad"], lw=1.8))
        word = words[x] if words else spell(i)
        ax.text(x, y, word, ha="center", va="center_baseline", fontsize=9, linespacing=0.95)


rows = [
    [tokenizer.image_id] * 3
    + [tokenizer.bos_id, *tokenizer.encode(prompt), tokenizer.newline_id]
    + [*tokenizer.encode(suffix), tokenizer.eos_id]
    for prompt, suffix in zip(prompts, suffixes)
]
longest = max(map(len, rows))
fig, ax = plt.subplots(figsize=(9.8, 2.4), layout="constrained")
for y, (name, row, suffix) in enumerate(zip(names, rows, suffixes)):
    answer_length = len(tokenizer.encode(suffix)) + 1
    padded = [tokenizer.pad_id] * (longest - len(row)) + row
    draw_strip(ax, padded, [0] * (longest - answer_length) + [1] * answer_length, -y)
    thumb = sample_picture(name).resize((120, 120))
    ax.imshow(thumb, extent=(-1.7, -0.7, -y - 0.45, -y + 0.45), aspect="auto")
ax.set(xlim=(-1.8, longest - 0.4), ylim=(-2.6, 0.6))
ax.set_axis_off()
save_figure(fig, "14_strips.png")

# %% [markdown]
# Blue: positions that the picture's vectors will fill ([lesson 15](15_model.ipynb)). Orange: the **prompt**.
# Purple: the answer to learn, the **suffix**. Green: bos, newline and eos. Grey: padding, because a
# tensor has to be rectangular. Picture and prompt, up to the newline, are the **prefix**.
#
# That is all there is. A task is nothing but a wording of the orange part.

# %% [markdown]
# The line break is an ordinary token, so a prompt may hold some of its own. What ends the prefix
# is the *last* one.

# %%
lines = tokenizer.encode("two\nlines")
print([tokenizer.sp.id_to_piece(i) for i in lines])
assert lines.count(tokenizer.newline_id) == 1

# %% [markdown]
# ## By hand
#
# Take a picture of $N = 3$ image tokens and this dictionary. Write down the ids for the prompt "cat
# ?" and the answer "yes", before you run the cell.

# %%
WORDS = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "↵": 4, "cat": 10, "?": 11, "yes": 12, "<image>": 99}
prefix = [99, 99, 99, 2, 10, 11, 4]  # <image> × 3, bos, cat, ?, newline
suffix = [12, 1]  # yes, eos
print(prefix + suffix)

# %% [markdown]
# Two questions have to be answered for each position, and a list for each will travel with the ids.
#
# - **Token type**: prefix (0) or suffix (1)? It decides who may look at whom.
# - **Label**: what is to be learned here? The id itself on the suffix, and −100 elsewhere, which means
#   "do not count this".

# %%
types = [0] * len(prefix) + [1] * len(suffix)
labels = [-100] * len(prefix) + suffix
for name, row in (("ids", prefix + suffix), ("types", types), ("labels", labels)):
    print(f"{name:7}", "".join(f"{value:6}" for value in row))

# %% [markdown]
# A label stands *at* its token, not before it. The model predicts the **next** token, so
# something has to shift by one; that is done once, in the loss ([lesson 15](15_model.ipynb)).
#
# Eos is labelled: a model that never learns to stop never stops. The newline is not: it is given,
# and it tells the model "now you".

# %% [markdown]
# ## As a loop
#
# Rows of unequal length make no tensor. Fill them up to the longest, **on the left**, and keep a
# fourth list that says which positions are real:


# %%
def collate_loop(prefixes, suffixes, pad_id=0):
    """Lists of ids to rectangles, one row at a time."""
    length = max(len(p) + len(s) for p, s in zip(prefixes, suffixes))
    batch = {"input_ids": [], "attention_mask": [], "token_type_ids": [], "labels": []}
    for prefix, suffix in zip(prefixes, suffixes):
        n, m = len(prefix), len(suffix)
        pads = length - n - m
        batch["input_ids"].append([pad_id] * pads + prefix + suffix)
        batch["attention_mask"].append([0] * pads + [1] * (n + m))
        batch["token_type_ids"].append([0] * (pads + n) + [1] * m)
        batch["labels"].append([-100] * (pads + n) + suffix)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


# %%
prefixes, answers = [prefix, [99, 99, 99, 2, 10, 4]], [suffix, [12, 11, 12, 1]]
slow = collate_loop(prefixes, answers)
for name, tensor in slow.items():
    print(name, *tensor.tolist(), sep="\n  ")

# %% [markdown]
# ### Why on the left?
#
# An answer is written by appending: every row of the batch gets one new token in each step. Look at
# where it goes.

# %% tags=["hide-input"]
told = [tokenizer.encode("a cat and two dogs")[:4], tokenizer.encode("two dogs and a bee")[:4]]
starts = [
    [tokenizer.image_id] * 3 + [tokenizer.bos_id, *tokenizer.encode(p), tokenizer.newline_id]
    for p in ("caption en", "answer en how many?")
]
longest = max(map(len, starts))
fig, axes = plt.subplots(2, 1, figsize=(9.4, 3.4), layout="constrained")
for ax, side in zip(axes, ("left", "right")):
    for y, (row, new) in enumerate(zip(starts, told)):
        pads = [tokenizer.pad_id] * (longest - len(row))
        row = pads + row + new if side == "left" else row + pads + new
        draw_strip(ax, row, [0] * longest + [1] * 4, -y)
    ax.axvline(longest - 0.5, color=COLOURS["ink"], linewidth=1.4, linestyle=":")
    ax.set(xlim=(-0.6, longest + 3.6), ylim=(-1.6, 0.6))
    ax.set_title(f"padded on the {side}; right of the dots: four steps of writing")
    ax.set_axis_off()
save_figure(fig, "14_padding.png")

# %% [markdown]
# With **left padding** every prompt ends at the dotted line: "the last column" holds the token to continue
# from, and all new tokens form whole columns. On the right, each row ends somewhere else, and
# padding remains *inside* the sequence for good.
#
# In training it would not matter. One layout for both is one thing less to get wrong.

# %% [markdown]
# ## Vectorised
#
# Left padding has a second charm. Count the positions **from the right end**: …, 3, 2, 1. A
# position is real when its number is at most the row's length, and suffix when it is at most the
# answer's length. Two comparisons make all four tensors.

# %%
lengths = torch.tensor([len(p) + len(s) for p, s in zip(prefixes, answers)])[:, None]  # [B, 1]
answer_lengths = torch.tensor([len(s) for s in answers])[:, None]  # [B, 1]
from_right = torch.arange(int(lengths.max()), 0, -1)  # [L]
real = from_right <= lengths  # [B, L]
is_suffix = from_right <= answer_lengths  # [B, L]
print(from_right.tolist(), *is_suffix.int().tolist(), sep="\n")

# %% [markdown]
# The True values of `real`, row by row, are exactly as many as there are ids. So all ids go in with
# one assignment.

# %%
input_ids = torch.zeros_like(real, dtype=torch.int64)
input_ids[real] = torch.tensor([i for p, s in zip(prefixes, answers) for i in p + s])
assert torch.equal(input_ids, slow["input_ids"])
assert torch.equal(real.long(), slow["attention_mask"])
assert torch.equal(is_suffix.long(), slow["token_type_ids"])
assert torch.equal(input_ids.masked_fill(~is_suffix, -100), slow["labels"])
print("four tensors, equal to the loop")

# %% [markdown]
# ## The module
#
# These lines become `collate`. Without suffixes there is nothing to learn, so there are no labels.


# %%
#| export
def collate(
    prefixes: list[list[int]], suffixes: list[list[int]], pad_id: int = 0
) -> dict[str, torch.Tensor]:
    """Rows of unequal length to rectangular tensors, padded on the left.

    Args:
        prefixes: B lists of ids.
        suffixes: B lists of ids, or an empty list when there is nothing to learn.
        pad_id: fills the left.

    Returns:
        `input_ids`, `attention_mask`, `token_type_ids` and, with suffixes, `labels`;
        all `int64[B, L]`.

    Raises:
        ValueError: no rows, or another number of suffixes.
    """
    if not prefixes or len(suffixes) not in (0, len(prefixes)):
        raise ValueError(
            f"got {len(prefixes)} prefixes and {len(suffixes)} suffixes; expected at least one "
            "prefix, and as many suffixes or none"
        )
    answers = suffixes or [[]] * len(prefixes)
    rows = [prefix + answer for prefix, answer in zip(prefixes, answers)]
    lengths, answer_lengths = torch.tensor([[len(r), len(a)] for r, a in zip(rows, answers)]).T
    from_right = torch.arange(int(lengths.max()), 0, -1)  # [L]: L, …, 2, 1
    real = from_right <= lengths[:, None]  # [B, L]
    is_suffix = from_right <= answer_lengths[:, None]  # [B, L]
    input_ids = torch.full(real.shape, pad_id)
    input_ids[real] = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
    batch = {
        "input_ids": input_ids,
        "attention_mask": real.long(),
        "token_type_ids": is_suffix.long(),
    }
    return batch | ({"labels": input_ids.masked_fill(~is_suffix, -100)} if suffixes else {})


# %%
fast = collate(prefixes, answers)
assert all(torch.equal(fast[name], slow[name]) for name in slow)
print(*fast, "| without suffixes:", *collate(prefixes, []))

# %% [markdown]
# ### The class
#
# `encode_prefix` and `encode_suffix` *are* the layout, one line each. Prompt, newline and suffix are
# tokenised separately, so that nothing can merge across a border.


# %%
#| export
class Processor:
    """Lay out `<image>`×N, bos, prompt, newline (and for training answer, eos) for a batch.

    Args:
        tokenizer: turns the text into ids.
        image_processor: turns the pictures into pixel values.
        num_image_tokens: N, image tokens a picture; (image_size / patch_size)².
        context: the most tokens that a row may have (`max_position_embeddings`).

    Source: PaliGemma paper, section 3.2 and figure 2; `PaliGemmaProcessor` in transformers.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_processor: ImageProcessor,
        num_image_tokens: int,
        context: int = 8192,
    ):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.num_image_tokens, self.context = num_image_tokens, context

    def __call__(self, images: list, prompts: list[str], suffixes: list[str] | None = None):
        prefixes = [self.encode_prefix(prompt) for prompt in prompts]
        answers = [self.encode_suffix(text) for text in suffixes or []]
        batch = {"pixel_values": self.image_processor(images)}
        return batch | collate(prefixes, answers, self.tokenizer.pad_id)

    def encode_prefix(self, prompt: str) -> list[int]:
        t = self.tokenizer
        return [t.image_id] * self.num_image_tokens + [t.bos_id, *t.encode(prompt), t.newline_id]

    def encode_suffix(self, text: str) -> list[int]:
        """The answer's tokens, eos."""
        return [*self.tokenizer.encode(text), self.tokenizer.eos_id]


# %%
processor = Processor(tokenizer, ImageProcessor(112), num_image_tokens=64)
photos = [sample_picture(name) for name in names]
batch = processor(photos, prompts, suffixes)
for name, tensor in batch.items():
    print(f"{name:15} {tensor.dtype!s:14} {tuple(tensor.shape)}")

# %% [markdown]
# The way back from ids to text ends at the first eos:


# %%
#| export
@add_to_class(Processor)
def decode(self, ids: Iterable[int]) -> str:
    """Generated ids, `int64[L]` or a list, to text; what follows the first eos is ignored."""
    ids = [*map(int, ids), self.tokenizer.eos_id]
    return self.tokenizer.decode(ids[: ids.index(self.tokenizer.eos_id)])


# %%
answer_ids = processor.encode_suffix(suffixes[0])
print(answer_ids, "→", processor.decode(answer_ids))
assert processor.decode([*answer_ids, 0, 0]) == suffixes[0]

# %% [markdown]
# ### Several pictures in one prompt
#
# "Which of these two has more cats?" asks about two pictures. Their tokens follow each other,
# `<image>` × 2N, then bos and the prompt. The tower sees each picture by itself, so `pixel_values`
# has one row for each *picture*, P of them, in order.
#
# And people pass one picture without a list, or three pictures and two prompts. `as_lists`
# ([support/arguments.py](../paligemma/support/arguments.py)) makes lists of equal length, or says
# what is wrong. `encode_within` refuses a text that is longer than the model can read.


# %%
#| export
@add_to_class(Processor)
def encode_prefix(self, prompt: str, num_images: int = 1) -> list[int]:
    """`<image>`×(N · num_images), bos, the prompt's tokens, newline; at most `context`."""
    t = self.tokenizer
    image = [t.image_id] * (self.num_image_tokens * num_images)
    words = encode_within(t, prompt, self.context - len(image) - 2)
    return [*image, t.bos_id, *words, t.newline_id]


@add_to_class(Processor)
def encode_suffix(self, text: str) -> list[int]:
    """The answer's tokens, eos; at most `context`."""
    return [*encode_within(self.tokenizer, text, self.context - 1), self.tokenizer.eos_id]


@add_to_class(Processor)
def __call__(
    self,
    images: Picture | list | tuple,
    prompts: str | list[str],
    suffixes: str | list[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Prepare one picture and prompt, or equally long lists of them.

    Args:
        images: a path, `PIL.Image` or `uint8[H, W, 3]`, or a list of B: each one of these, or a
            list of several for one prompt.
        prompts: a string, or B strings.
        suffixes: the answers to learn, one or B strings; makes `labels`.

    Returns:
        A dict: `pixel_values` float32[P, 3, H, W], the P pictures in order; int64[B, L],
        padded on the left: `input_ids`, `attention_mask` (0 = padding), `token_type_ids`
        (0 prefix, 1 suffix) and, with suffixes, `labels` (-100 except on the suffix and eos).

    Raises:
        ValueError: unequal numbers, none at all, no strings, a text that spells `<image>`, or
            one that is longer than the context.
    """
    groups, texts, answers = as_lists(images, prompts, suffixes)
    prefixes = [self.encode_prefix(text, len(group)) for text, group in zip(texts, groups)]
    pictures = [picture for group in groups for picture in group]
    batch = {"pixel_values": self.image_processor(pictures)}
    endings = [self.encode_suffix(answer) for answer in answers]
    return batch | collate(prefixes, endings, self.tokenizer.pad_id)


# %%
two = processor([[photos[0], photos[1]], photos[2]], ["answer en more cats?", "caption en"])
counts = (two["input_ids"] == tokenizer.image_id).sum(1)
print("pixel_values", tuple(two["pixel_values"].shape), "image tokens a row:", counts.tolist())
assert counts.tolist() == [128, 64]

# %% [markdown]
# ### The files of a checkpoint
#
# How many image tokens there are is *derived*, never counted by hand: $N = (\text{size} /
# \text{patch})^2$, from the checkpoint's `config.json`. Three files know about the picture's size or
# about `<image>`. Copied from different places they may disagree, and then the model would run and
# answer badly. So they are compared.


# %%
#| export
@add_to_class(Processor)
@classmethod
def from_pretrained(cls, path: str | os.PathLike) -> "Processor":
    """Read a checkpoint: `config.json`, `tokenizer.model` with its lists of added tokens and,
    where present, `preprocessor_config.json`.

    Raises:
        ValueError: a file is missing, broken, or belongs to another checkpoint.
    """
    path = find_folder(path)
    config = read_config(path)
    tokenizer = Tokenizer.from_pretrained(path)
    if config["image_token_index"] != tokenizer.image_id:
        raise ValueError(
            f"{path}: config.json says that <image> is token {config['image_token_index']}, "
            f"tokenizer.model makes it {tokenizer.image_id}; these files belong to different "
            "checkpoints"
        )
    rows = config["text_config"]["vocab_size"]
    if len(tokenizer) > rows:
        raise ValueError(
            f"{path}: the tokenizer has ids up to {len(tokenizer) - 1}, the embedding of "
            f"config.json {rows} rows; these files belong to different checkpoints"
        )
    size, patch = config["vision_config"]["image_size"], config["vision_config"]["patch_size"]
    image_processor = ImageProcessor.from_pretrained(path, size)
    if image_processor.size != size:
        raise ValueError(
            f"{path}: preprocessor_config.json resizes to {image_processor.size} pixels, "
            f"config.json expects {size}; these files belong to different checkpoints"
        )
    context = config["text_config"]["max_position_embeddings"]
    return cls(tokenizer, image_processor, (size // patch) ** 2, context)


# %%
#| export
@add_to_class(Processor)
def save_pretrained(self, path: str | os.PathLike) -> None:
    """Write what `from_pretrained` reads, but for `config.json`, which the model writes."""
    with replacing(path) as draft:
        self.tokenizer.save_pretrained(draft)
        self.image_processor.save_pretrained(draft, self.num_image_tokens)


# %%
processor = Processor.from_pretrained(TINY)
with tempfile.TemporaryDirectory() as folder:
    processor.save_pretrained(folder)
    print(sorted(os.listdir(folder)))
again = processor(photos, prompts, suffixes)
assert all(torch.equal(batch[name], again[name]) for name in batch)

# %% [markdown]
# ### The forms of a prompt
#
# PaliGemma was trained on prompts of fixed wording. `{lang}` is a language code such as `en`.
#
# | prompt | answer |
# |---|---|
# | `cap {lang}`, `caption {lang}`, `describe {lang}` | short, usual, long caption |
# | `ocr` | the text in the picture |
# | `answer {lang} {question}` | the answer |
# | `question {lang} {answer}` | a question with that answer |
# | `detect {thing} ; {thing}` | boxes: four `<loc>` each, then the name |
# | `segment {thing} ; {thing}` | boxes, then sixteen `<seg>` for the mask |

# %%
for prompt in ("caption en", "ocr", "answer en how many?", "detect cat ; dog"):
    print(f"{prompt:20}", " | ".join(tokenizer.sp.id_to_piece(i) for i in tokenizer.encode(prompt)))

# %% [markdown]
# Nothing in the code knows what a task is: `detect` is a word like any other, to which the model
# learned to reply with location tokens.
#
# What a user may *not* write are bos, eos, pad and `<image>`. Otherwise a caption found on the web
# could end the prompt or insert a second picture.

# %%
for text in ("what is <image>?", "stop <eos> now"):
    try:
        processor.encode_prefix(text)
    except ValueError as error:
        print(error)

# %% [markdown]
# ## Against the reference
#
# The file holds what `PaliGemmaProcessor` of transformers makes of prompts and answers of unequal
# length, with this same tokenizer file. Integers allow no tolerance: each one has to be equal.

# %%
stored = load_file("reference/processor.safetensors")
REFERENCE_TEXTS = [
    ("caption en", "a cat and two dogs"),
    ("answer en how many cats are there?", "2"),
    ("detect cat ; dog", "<loc0008><loc0061><loc0960><loc0854> cat"),
    ("", "yes"),
]
ours = processor([photos[0]] * 4, *map(list, zip(*REFERENCE_TEXTS)))
for name, tensor in stored.items():
    different = int((ours[name] != tensor).sum())
    print(f"{name:15} {tuple(tensor.shape)}, different: {different}")
    assert different == 0

# %% [markdown]
# ## See it: four tensors, one row
#
# The last row of the batch from the beginning, position by position, as the model gets it (of its 64 image
# tokens three are drawn).

# %% tags=["hide-input"]
ids = batch["input_ids"][2]
shown = (ids != tokenizer.image_id).logical_or((ids == tokenizer.image_id).cumsum(0) < 4)
row = {name: batch[name][2][shown].tolist() for name in slow}
fig, ax = plt.subplots(figsize=(9.8, 2.5), layout="constrained")
for y, (name, values) in enumerate(row.items()):
    words = [str(v).replace("-", "−") for v in values]
    draw_strip(ax, row["input_ids"], row["token_type_ids"], -y - 1, words=words)
    ax.text(-0.7, -y - 1, name, ha="right", va="center_baseline")
draw_strip(ax, row["input_ids"], row["token_type_ids"])
ax.set(xlim=(-3.1, len(words) - 0.4), ylim=(-4.6, 0.6))
ax.set_axis_off()
save_figure(fig, "14_tensors")

# %%
counted = (batch["labels"] != -100).sum().item()
length = batch["labels"].numel()
pictures = (batch["input_ids"] == tokenizer.image_id).sum().item()
print(f"of {length} positions {pictures} are picture, {counted} carry a label")
assert counted / length < 0.1 and pictures / length > 0.85
assert torch.equal(batch["labels"] != -100, batch["token_type_ids"] == 1)

# %% [markdown]
# What to notice: types and labels mark the same positions, but for different readers. The types go to the
# *mask*, so they are needed whenever a suffix is given; the labels go to the *loss*, so they exist only
# in training.
#
# Fewer than one position in ten is counted. With `labels = input_ids`, which also runs, the loss would be
# nearly all about what comes after `<image>`: another `<image>`. It would soon be small, and say nothing.

# %% [markdown]
# ## At full size
#
# The layout has no parameters and almost no arithmetic. What it costs is *length*: every later layer
# works on each position. Eight text tokens, at the three sizes of PaliGemma:

# %%
for size in (224, 448, 896):
    N = (size // 14) ** 2
    print(f"{size} pixels: {N:4} image tokens of {N + 8:4}, {N / (N + 8):.1%}")
    assert N / (N + 8) > 0.96

# %% [markdown]
# And padding? A padded position costs as much as a real one. Take 512 prompts of random lengths, of 2
# to 40 tokens, in batches of eight: as they come, and sorted by length first.


# %%
def wasted(lengths, image_tokens):
    """Share of padded positions over all batches of eight."""
    groups = [lengths[i : i + 8] for i in range(0, len(lengths), 8)]
    total = sum(8 * (max(group) + image_tokens + 2) for group in groups)
    return 1 - sum(n + image_tokens + 2 for n in lengths) / total


generator = random.Random(0)
prompt_lengths = [generator.randint(2, 40) for _ in range(512)]
for image_tokens in (0, 256):
    a = wasted(prompt_lengths, image_tokens)
    b = wasted(sorted(prompt_lengths), image_tokens)
    print(f"{image_tokens:3} image tokens: {a:.1%} padding, sorted {b:.1%}")
assert wasted(prompt_lengths, 0) > 0.38 and wasted(prompt_lengths, 256) < 0.06

# %% [markdown]
# For text alone, two fifths of the work would be padding, and sorting is a must. With a picture in
# each row it hardly matters: the picture has the same length everywhere.

# %% [markdown]
# ## A bug people really make: the wrong sequence
#
# Five colleagues prepare "detect dog". All five sequences run, and all five read the same, decoded
# and trimmed. Only one of them is what the model was trained on. Which?

# %%
t = tokenizer
image, words, bos, newline = [t.image_id] * 3, t.encode("detect dog"), [t.bos_id], [t.newline_id]
sequences = {
    "A": image + t.encode(" ") + bos + words + newline,
    "B": image + bos + bos + words + newline,
    "C": image + bos + words + newline,
    "D": image + bos + t.encode(" detect dog") + newline,
    "E": image + bos + words,
}
for name, ids in sequences.items():
    print(name, repr(t.decode(ids).strip()))
    assert t.decode(ids).strip() == "detect dog"

# %% [markdown]
# Nothing to see. This is why one looks at **ids** and not at text. Before you scroll on: each of the
# wrong ones comes from one careless string. Can you guess which?

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(8.2, 3.2), layout="constrained")
right = sequences["C"]
for y, (name, ids) in enumerate(sequences.items()):
    wrong = [x for x, (a, b) in enumerate(zip(ids, right)) if a != b][:1]
    draw_strip(ax, ids, [0] * len(ids), -y, wrong)
    if len(ids) < len(right):
        missing = plt.Rectangle((len(ids) - 0.47, -y - 0.42), 0.94, 0.84, fill=False)
        missing.set(edgecolor=COLOURS["bad"], linewidth=1.8, linestyle=":")
        ax.add_patch(missing)
    ax.text(-0.8, -y, name, ha="right", va="center")
ax.set(xlim=(-1.4, max(map(len, sequences.values())) - 0.4), ylim=(-4.6, 0.6))
ax.set_axis_off()
save_figure(fig, "14_bug")

# %% [markdown]
# **A**: `"<image> " + …`, a space after the picture. **B**: the tokenizer added its own bos to one
# that was there. **D**: `" detect dog"`, a space before the prompt. **E**: no newline: the model may
# go on *asking*. **C** is right.
#
# The model has never met the others. It answers all the same; [lesson 18](18_generation.ipynb) shows what.
# (A and B put the box a whole patch beside the dog.) The cure is the assertion of this lesson: compare
# the ids with the reference.

# %% [markdown]
# ### A second one: positions that count the padding
#
# RoPE ([lesson 09](09_rope.ipynb)) turns each token by its position. For a padded row two ways of
# counting are seen in the wild: the columns, or only what is real.

# %%
mask = collate(prefixes, [])["attention_mask"][1:]  # one padded position, then six real ones
columns = torch.arange(mask.shape[1])[None]
counted = (mask.cumsum(-1) - 1).clamp(min=0)
print("columns:", columns[0].tolist())
print("counted:", counted[0].tolist())

# %% [markdown]
# Either alone does no harm: RoPE knows distances only, and all are shifted alike. But some code counts what
# is real when it reads the prompt, and columns when it writes the answer. How far is the first token of
# the answer from the picture's first token?

# %%
first = counted[0, mask[0].argmax()].item()  # the first real token, an image token
by_count, by_column = mask.sum().item(), mask.shape[1]  # of the first token of the answer
print("counted:", by_count - first, "| mixed:", by_column - first)
assert by_column - by_count == (mask == 0).sum()

# %% [markdown]
# Each padded position puts one step more between the answer and *everything* before it. So an
# answer depends on who shares its batch. The check: a prompt alone and the same prompt in a padded batch
# must give the same logits.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): count the positions
#
# Pictures of 224 pixels in patches of 14. The tokenizer makes 5 and 9 tokens of two
# prompts, 7 and 2 of their answers. What is the length L of the batch, how many positions are padding,
# and how many carry a label?

# %% tags=["exercise"]
answer = None  # three numbers: (L, padded, labelled)


# %% tags=["check"]
def test_1(answer):
    three = isinstance(answer, tuple | list) and len(answer) == 3
    assert three and all(type(v) is int for v in answer), "give three whole numbers"
    prefixes = [[5] * (256 + 1 + n + 1) for n in (5, 9)]
    made = collate(prefixes, [[6] * (n + 1) for n in (7, 2)])
    L, padded = made["input_ids"].shape[1], int((made["attention_mask"] == 0).sum())
    labelled = int((made["labels"] != -100).sum())
    assert answer[0] > 256, "L: how many image tokens has a picture of 224 pixels?"
    assert answer[0] == L, "L: image tokens, bos, prompt, newline, answer, eos of the longer row"
    assert answer[1] == padded, "padded: how much shorter is the other row?"
    assert answer[2] == labelled, "labelled: both answers, each with what ends it"


check(test_1, answer)

# %% [markdown]
# <details><summary>Hint</summary>
#
# $N = (224 / 14)^2$. Each row has three special tokens besides its image tokens.
#
# </details>

# %% tags=["solution"]
# Each row: image tokens, bos, prompt, newline, answer, eos. Labels: the answers and their eos.
first, second = 256 + 1 + 5 + 1 + 7 + 1, 256 + 1 + 9 + 1 + 2 + 1
answer = (max(first, second), abs(first - second), 7 + 1 + 2 + 1)
check(test_1, answer)

# %% [markdown]
# ### Exercise 2 (write): read a row back
#
# Who debugs a data set reads its rows. Write the layout backwards: from one row of `input_ids` and
# `token_type_ids` (1-D tensors) to the number of pictures, the prompt and the answer, as text without bos,
# newline, eos or padding. A prompt may contain line breaks of its own, even at its end; without a
# suffix the answer is "".


# %% tags=["exercise"]
def read_row(input_ids, token_type_ids):
    return None  # (pictures, prompt, answer)


# %% tags=["check"]
def test_2(read_row):
    cases = [
        (1, "caption en", "a cat and two dogs"),
        (2, "answer en more cats?", "2"),
        (1, "two\nlines\n", "yes"),
        (1, "detect cat ; dog", "<loc0008><loc0061><loc0960><loc0854> cat"),
        (1, "", "a bee\nand a dog"),
    ]
    groups = [[photos[0]] * pictures for pictures, *_ in cases]
    texts, replies = [case[1] for case in cases], [case[2] for case in cases]
    trained, asked = processor(groups, texts, replies), processor(groups, texts)
    for made in (trained, asked):
        for case, ids, types in zip(cases, made["input_ids"], made["token_type_ids"]):
            found = read_row(ids, types)
            three = isinstance(found, tuple) and len(found) == 3
            assert three, "return three things: (pictures, prompt, answer)"
            assert found[0] == case[0], f"counts {found[0]} pictures in a row of {case[0]}"
            wanted = case[2] if made is trained else ""
            for what, text, right in (("prompt", found[1], case[1]), ("answer", found[2], wanted)):
                assert isinstance(text, str), f"the {what} should be text"
                assert text == right, f"the {what} {right!r} comes back as {text!r}"


check(test_2, read_row)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Lists are easier: `input_ids.tolist()`. Everything of type 1 is answer and eos. Of the rest, the prompt
# lies between bos and the last newline. `tokenizer.decode` takes a list of ids.
#
# </details>


# %% tags=["solution"]
# The types say where the answer begins; bos and the last id of the prefix frame the prompt.
def read_row(input_ids, token_type_ids):
    prefix, answer = input_ids[token_type_ids == 0].tolist(), input_ids[token_type_ids == 1]
    pictures = prefix.count(tokenizer.image_id) // processor.num_image_tokens
    prompt = prefix[prefix.index(tokenizer.bos_id) + 1 : -1]
    return pictures, tokenizer.decode(prompt), processor.decode(answer)


check(test_2, read_row)

# %% [markdown]
# ### Exercise 3 (break): is this batch sound?
#
# Write `sound(batch)`: True for a batch of our processor with suffixes, False for a broken one.
# The check breaks it in five ways: padded on the right, labels on the prefix, eos not labelled, two
# bos, an image token too few. The tokenizer is at hand as `tokenizer`, N as
# `processor.num_image_tokens`.


# %% tags=["exercise"]
def sound(batch):
    return None  # True or False


# %% tags=["check"]
def test_3(sound):
    texts = ["caption en", "answer en how many cats are there?", "cap en", "ocr"]
    good = processor([photos[0]] * 4, texts, ["a cat", "2", "two dogs and a cat", "a bee"])
    del good["pixel_values"]
    ids, labels, N = good["input_ids"], good["labels"], processor.num_image_tokens
    shorter = [row[row != 0].tolist() for row in ids]
    double = [[*r[:N], 2, *r[N:]] for r in shorter]
    ends = [int(types.sum()) for types in good["token_type_ids"]]
    double = collate([r[:-m] for r, m in zip(double, ends)], [r[-m:] for r, m in zip(double, ends)])
    broken = {
        "padded on the right": {name: t.flip(1) for name, t in good.items()},
        "labels on the prefix": good | {"labels": ids.masked_fill(ids == 0, -100)},
        "eos not labelled": good | {"labels": labels.masked_fill(ids == 1, -100)},
        "two bos": double,
        "an image token too few": good
        | {"input_ids": ids.masked_fill(ids.cumsum(1) == tokenizer.image_id, 5)},
    }
    assert isinstance(sound(good), bool), "return True or False"
    assert sound(good) is True, "rejects a batch that is right"
    assert sound({k: t[:2] for k, t in good.items()}) is True, "rejects two rows of it"
    for name, batch in broken.items():
        assert sound(batch) is False, f"lets this one through: {name}"


check(test_3, sound)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Count with `(ids == …).sum(1)`: image tokens are N in each row, bos is 1. A suffix ends with eos, so
# the last column says much. Labels and types must agree.
#
# </details>


# %% tags=["solution"]
# Two counts, one column, and one identity between labels, ids and types.
def sound(batch):
    ids, labels, types = batch["input_ids"], batch["labels"], batch["token_type_ids"]
    return bool(
        ((ids == tokenizer.image_id).sum(1) == processor.num_image_tokens).all()
        and ((ids == tokenizer.bos_id).sum(1) == 1).all()
        and (labels[:, -1] == tokenizer.eos_id).all()
        and torch.equal(labels, ids.masked_fill(types == 0, -100))
    )


check(test_3, sound)

# %% [markdown]
# ## Summary
#
# - The model reads one row of integers: `<image>` × N, bos, prompt, newline; in training also the
#   answer and eos. A task is a wording of the prompt, nothing else.
# - Four tensors travel together: ids, which are real, which are suffix, which count in the loss.
# - Padding stands on the left, so that every row is continued in the same column.
# - Positions count what is real, in reading *and* in writing.
# - Compare ids, never text.

# %% [markdown]
# ## Quiz
#
# **1.** Why is the newline tokenised on its own, and not as the end of the prompt string?
#
# <details><summary>Answer</summary>
#
# A tokenizer merges what often stands together. Gemma's vocabulary has pieces of two and more
# newlines: a prompt that itself ends in a newline would become *one* piece with ours, and the id
# that says "now you" would be missing.
#
# </details>

# %% [markdown]
# **2.** Answers to learn end with eos. Why do prompts not?
#
# <details><summary>Answer</summary>
#
# Eos means "the answer is complete". The model is to learn when to *write* it. At the end of a
# prompt it would be read, not written, and would tell the model that there is nothing left to say.
#
# </details>

# %% [markdown]
# **3.** You fine-tune at 448 pixels with a processor made for 224. What happens?
#
# <details><summary>Answer</summary>
#
# The pictures give 1,024 vectors and the ids hold 256 placeholders. Our model refuses ([lesson 15](15_model.ipynb)). A
# careless one would fill the 256 with the first quarter of the picture: its top.
#
# </details>

# %% [markdown]
# ## References
#
# - Lucas Beyer et al., *PaliGemma: A versatile 3B VLM for transfer*, 2024, section 3.2 and figure 2
#   (the sequence), and the appendix on its training tasks (the forms of the prompt).
# - transformers: `models/paligemma/processing_paligemma.py`, class `PaliGemmaProcessor`.
# - big_vision: the README of `configs/proj/paligemma`, and the text steps of `pp/proj/paligemma`.

# %% [markdown] tags=["navigation"]
# [← Gemma 2](13_gemma2.ipynb) | [contents](00_overview.ipynb) | [PaliGemma →](15_model.ipynb)
