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
# *50 minutes* · part III, Together
#
# **What you will be able to do**
#
# - write down, id by id, the sequence for a picture, a prompt and an answer;
# - say what each of the four integer tensors of a batch is for;
# - explain why batches are padded on the left;
# - spot four wrong sequences that read the same, and a training loss that is too good.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("processor")

# %% [markdown]
# ## Setup
#
# The processor joins two earlier parts: `ImageProcessor` of [lesson 02](02_image_processor.ipynb)
# and `Tokenizer` of [lesson 06](06_tokenizer.ipynb). The cells that begin with `#| export` become
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
from paligemma.tokenizer import Tokenizer

# %% tags=["setup"]
import random
import tempfile
import time
from collections import Counter, defaultdict
from importlib import resources

import matplotlib.pyplot as plt
from safetensors.torch import load_file

from paligemma.plotting import show_heatmap
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

# %%
KIND_COLOURS = {
    "image": COLOURS["vision"],
    "control": COLOURS["together"],
    "prompt": COLOURS["language"],
    "suffix": COLOURS["accent"],
    "padding": COLOURS["muted"],
}
CONTROL = {tokenizer.bos_id: "bos", tokenizer.newline_id: "↵", tokenizer.eos_id: "eos"}


def spell(i):
    """What one id stands for, short enough for a box."""
    special = {**CONTROL, tokenizer.pad_id: "pad", tokenizer.image_id: "img"}
    piece = special.get(i) or tokenizer.sp.id_to_piece(i)
    return piece.replace("<loc", "loc\n").rstrip(">")


def kind_of(i, is_suffix):
    if i in (tokenizer.pad_id, tokenizer.image_id):
        return "padding" if i == tokenizer.pad_id else "image"
    return "control" if i in CONTROL else "suffix" if is_suffix else "prompt"


def draw_strip(ax, ids, types, y=0.0, marked=()):
    """One row of ids as coloured boxes; places in `marked` get a red frame."""
    for x, (i, is_suffix) in enumerate(zip(ids, types)):
        edge = COLOURS["bad"] if x in marked else COLOURS["paper"]
        colour = KIND_COLOURS[kind_of(i, is_suffix)]
        place = {"xy": (x - 0.47, y - 0.4), "width": 0.94, "height": 0.8}
        ax.add_patch(plt.Rectangle(**place, color=colour, alpha=0.28, linewidth=0))
        if x in marked:
            ax.add_patch(plt.Rectangle(**place, fill=False, edgecolor=edge, linewidth=1.6))
        ax.text(x, y, spell(i), ha="center", va="center_baseline", fontsize=6.5)


# %% [markdown]
# Three pictures, three prompts, three answers, as the model gets them in one training batch. Of the
# image tokens (64 in the course's tiny model, 256 to 4096 in the real one) only three are drawn.

# %%
names = ("cat", "scene", "coffee")
prompts = ["detect cat", "answer en how many cats are there?", "caption en"]
suffixes = ["<loc0008><loc0061><loc0960><loc0854> cat", "2", "a cup"]
rows = [
    [tokenizer.image_id] * 3
    + [tokenizer.bos_id, *tokenizer.encode(prompt), tokenizer.newline_id]
    + [*tokenizer.encode(suffix), tokenizer.eos_id]
    for prompt, suffix in zip(prompts, suffixes)
]
longest = max(map(len, rows))
fig, ax = plt.subplots(figsize=(9, 1.9), layout="constrained")
for y, (name, row, suffix) in enumerate(zip(names, rows, suffixes)):
    answer_length = len(tokenizer.encode(suffix)) + 1
    padded = [tokenizer.pad_id] * (longest - len(row)) + row
    types = [0] * (longest - answer_length) + [1] * answer_length
    draw_strip(ax, padded, types, -y)
    thumb = sample_picture(name).resize((120, 120))
    ax.imshow(thumb, extent=(-1.7, -0.8, -y - 0.45, -y + 0.45), aspect="auto")
ax.set(xlim=(-1.8, longest - 0.4), ylim=(-2.6, 0.6))
ax.set_axis_off()
save_figure(fig, "14_strips.png")

# %% [markdown]
# Blue: places that the picture's vectors will fill ([lesson 15](15_model.ipynb)). Green: **control**
# tokens. Orange: the **prompt**. Purple: the answer to learn, the **suffix**. Grey: **padding**,
# because a tensor has to be rectangular. Picture and prompt with their control tokens are the
# **prefix**.
#
# That is all there is. A task is nothing but a wording of the orange part.

# %% [markdown]
# No user can type bos or eos: the tokenizer refuses their spelling. The line break is another
# matter. It is an ordinary piece, so a prompt may hold some; what ends the prefix is the *last* one.

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
ids = prefix + suffix
print(len(ids), "ids:", ids)

# %% [markdown]
# Two questions have to be answered for each place, and a list for each will travel with the ids.
# **Type**: prefix (0) or suffix (1)? It decides who may look at whom. **Label**: what is to be
# learned here? The id itself on the suffix, and −100 elsewhere, which means "do not count this".

# %%
types = [0] * len(prefix) + [1] * len(suffix)
labels = [-100] * len(prefix) + suffix
for name, row in (("ids", ids), ("types", types), ("labels", labels)):
    print(f"{name:7}", "".join(f"{value:6}" for value in row))

# %% [markdown]
# Note that a label stands *at* its token, not before it. The model predicts the **next** token, so
# something has to shift by one; that is done once, in the loss ([lesson 15](15_model.ipynb)).
#
# Eos is labelled: a model that never learns to stop never stops. The newline is not: it is given,
# and it tells the model "now you".

# %% [markdown]
# ## As a loop
#
# Rows of unequal length make no tensor. Fill them up to the longest, **on the left**, and keep a
# fourth list that says which places are real. One place at a time:


# %%
def collate_loop(prefixes, suffixes, pad_id=0):
    """Lists of ids to a rectangle, one place at a time."""
    length = max(len(p) + len(s) for p, s in zip(prefixes, suffixes))
    batch = {"input_ids": [], "attention_mask": [], "token_type_ids": [], "labels": []}
    for prefix, suffix in zip(prefixes, suffixes):
        rows = {name: [] for name in batch}
        for _ in range(length - len(prefix) - len(suffix)):
            for name, value in zip(rows, (pad_id, 0, 0, -100)):
                rows[name].append(value)
        for i in prefix:
            for name, value in zip(rows, (i, 1, 0, -100)):
                rows[name].append(value)
        for i in suffix:
            for name, value in zip(rows, (i, 1, 1, i)):
                rows[name].append(value)
        for name in batch:
            batch[name].append(rows[name])
    return {name: torch.tensor(rows) for name, rows in batch.items()}


prefixes, answers = [prefix, [99, 99, 99, 2, 10, 4]], [suffix, [12, 11, 12, 1]]
slow = collate_loop(prefixes, answers)
for name, tensor in slow.items():
    print(name, tensor.tolist(), sep="\n  ")

# %% [markdown]
# ### Why on the left?
#
# An answer is written by appending: every row of the batch gets one new token in each step. Look at
# where it goes.

# %%
told = [tokenizer.encode("a cat and two dogs")[:4], tokenizer.encode("two dogs and a bee")[:4]]
starts = [
    [tokenizer.image_id] * 3 + [tokenizer.bos_id, *tokenizer.encode(p), tokenizer.newline_id]
    for p in ("caption en", "answer en how many cats?")
]
longest = max(map(len, starts))
fig, axes = plt.subplots(2, 1, figsize=(8, 2.6), layout="constrained")
for ax, side in zip(axes, ("left", "right")):
    for y, (row, new) in enumerate(zip(starts, told)):
        pads = [tokenizer.pad_id] * (longest - len(row))
        row = pads + row + new if side == "left" else row + pads + new
        draw_strip(ax, row, [0] * longest + [1] * 4, -y)
    ax.axvline(longest - 0.5, color=COLOURS["ink"], linewidth=1, linestyle=":")
    ax.set(xlim=(-0.6, longest + 3.6), ylim=(-1.6, 0.6))
    ax.set_title(f"padded on the {side}; right of the dots: four steps of writing", fontsize=8.5)
    ax.set_axis_off()
save_figure(fig, "14_padding.png")

# %% [markdown]
# On the left, every prompt ends at the dotted line: "the last column" holds the token to continue
# from, and all new tokens form whole columns. On the right, each row ends somewhere else, and
# padding remains *inside* the sequence for good.
#
# In training it would not matter. One layout for both is one thing less to get wrong.

# %% [markdown]
# ## Vectorised
#
# Padding on the left has a second charm. Count the places **from the right end**: …, 3, 2, 1. A
# place is real when its number is at most the row's length, and suffix when it is at most the
# answer's length. Two comparisons make all four tensors.

# %%
lengths = torch.tensor([len(p) + len(s) for p, s in zip(prefixes, answers)])[:, None]  # (B, 1)
answer_lengths = torch.tensor([len(s) for s in answers])[:, None]  # (B, 1)
from_right = torch.arange(int(lengths.max()), 0, -1)  # (L,)
real = from_right <= lengths  # (B, L)
is_suffix = from_right <= answer_lengths  # (B, L)
print(from_right.tolist(), *is_suffix.int().tolist(), sep="\n")

# %% [markdown]
# The True places of `real`, row by row, are exactly as many as there are ids. So all ids go in with
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
    from_right = torch.arange(int(lengths.max()), 0, -1)  # (L,): L, …, 2, 1
    real = from_right <= lengths[:, None]  # (B, L)
    is_suffix = from_right <= answer_lengths[:, None]  # (B, L)
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
print(", ".join(fast), "equal to the loop;", "labels" in collate(prefixes, []))

# %% [markdown]
# ### The class
#
# `encode_prefix` and `encode_suffix` *are* the layout, one line each. Prompt, newline and suffix are
# tokenised separately: pieces can never merge across a border.


# %%
#| export
class Processor:
    """Lay out `<image>`×N, bos, prompt, newline (and for training answer, eos) for a batch.

    Args:
        tokenizer: turns the text into ids.
        image_processor: turns the pictures into pixel values.
        num_image_tokens: N, image tokens a picture; (image_size / patch_size)².

    Source: PaliGemma paper, section 3.2 and figure 2; `PaliGemmaProcessor` in transformers.
    """

    def __init__(
        self, tokenizer: Tokenizer, image_processor: ImageProcessor, num_image_tokens: int
    ):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.num_image_tokens = num_image_tokens

    def __call__(self, images: list, prompts: list[str], suffixes: list[str] | None = None):
        prefixes = [self.encode_prefix(prompt) for prompt in prompts]
        answers = [self.encode_suffix(text) for text in suffixes or []]
        batch = {"pixel_values": self.image_processor(images)}
        return batch | collate(prefixes, answers, self.tokenizer.pad_id)

    def encode_prefix(self, prompt: str) -> list[int]:
        t = self.tokenizer
        return [t.image_id] * self.num_image_tokens + [t.bos_id, *t.encode(prompt), t.newline_id]

    def encode_suffix(self, text: str) -> list[int]:
        """The answer's pieces, eos."""
        return [*self.tokenizer.encode(text), self.tokenizer.eos_id]

    def decode(self, ids: Iterable[int]) -> str:
        """Generated ids, `int64[T]` or a list, to text; what follows the first eos is ignored."""
        ids = [*map(int, ids), self.tokenizer.eos_id]
        return self.tokenizer.decode(ids[: ids.index(self.tokenizer.eos_id)])


# %%
processor = Processor(tokenizer, ImageProcessor(112), num_image_tokens=64)
photos = [sample_picture(name) for name in names]
batch = processor(photos, prompts, suffixes)
for name, tensor in batch.items():
    print(f"{name:15} {tensor.dtype!s:14} {tuple(tensor.shape)}")
parts = [[processor.encode_prefix(p) for p in prompts], map(processor.encode_suffix, suffixes)]
by_loop = collate_loop(*map(list, parts))
assert all(torch.equal(batch[name], by_loop[name]) for name in by_loop)
print(processor.decode(processor.encode_suffix(suffixes[0])))

# %% [markdown]
# ### Several pictures in one prompt
#
# "Which of these two has more cats?" asks about two pictures. Their tokens follow each other,
# `<image>` × 2N, then bos and the prompt. The tower sees each picture by itself, so `pixel_values`
# has one row for each *picture*, P of them, in order.
#
# And people pass one picture without a list, or three pictures and two prompts. `as_lists`, in
# [support/arguments.py](../paligemma/support/arguments.py), turns whatever comes into lists of
# equal length, or says what is wrong.


# %%
#| export
@add_to_class(Processor)
def encode_prefix(self, prompt: str, num_images: int = 1) -> list[int]:
    """`<image>`×(N · num_images), bos, the prompt's pieces, newline."""
    t = self.tokenizer
    image = [t.image_id] * (self.num_image_tokens * num_images)
    return [*image, t.bos_id, *t.encode(prompt), t.newline_id]


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
        ValueError: unequal numbers, none at all, no strings, or a text that spells `<image>`.
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
try:
    processor([photos[0], photos[1]], "caption en")
except ValueError as error:
    print("✗", error)

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
    return cls(tokenizer, image_processor, (size // patch) ** 2)


@add_to_class(Processor)
def save_pretrained(self, path: str | os.PathLike) -> None:
    """Write what `from_pretrained` reads, but for `config.json`, which the model writes."""
    self.tokenizer.save_pretrained(path)
    self.image_processor.save_pretrained(path, self.num_image_tokens)


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
for prompt in ("cap en", "caption en", "ocr", "answer en how many?", "detect cat ; dog"):
    ids = processor.encode_prefix(prompt)[processor.num_image_tokens :]
    print(f"{prompt:20}", " | ".join(spell(i) for i in ids))

# %% [markdown]
# The mark `▁` is a space ([lesson 06](06_tokenizer.ipynb)). The tiny tokenizer knows few words and spells the rest.
# Nothing in the code knows what a task is: `detect` is a word like any other, to which the model
# learned to reply with `<loc>` tokens.
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
# length, with this same tokenizer file. A test computes it afresh. Integers allow no tolerance: each
# one has to be equal.

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
    assert torch.equal(ours[name], tensor), name
    print(f"{name:15} {tuple(tensor.shape)} equal in every place")

# %% [markdown]
# ## See it: four tensors, one batch
#
# The three rows from the beginning. Each panel is one tensor of the batch, one line a row. At the
# white line the picture goes on for 45 more columns, which are left out.

# %%
panels = {
    "input_ids: pad, image, other": (batch["input_ids"] == tokenizer.image_id).long()
    + 2 * ((batch["input_ids"] != tokenizer.image_id) & (batch["attention_mask"] == 1)).long(),
    "attention_mask: real": batch["attention_mask"],
    "token_type_ids: suffix": batch["token_type_ids"],
    "labels: counted in the loss": (batch["labels"] != -100).long(),
}
cut, rest = 14, 14 + 45
assert (batch["input_ids"][:, cut:rest] == tokenizer.image_id).all()
panels = {k: torch.cat([v[:, :cut], v[:, rest:]], dim=1) for k, v in panels.items()}
fig, axes = plt.subplots(4, 1, figsize=(8.6, 3.4), layout="constrained")
for ax, (title, values) in zip(axes, panels.items()):
    show_heatmap(values, title, rows=names, ax=ax)
    ax.set_aspect("auto")
    ax.axvline(cut - 0.5, color=COLOURS["paper"], linewidth=4)
    ax.title.set_fontsize(8.5)
    ax.tick_params(labelsize=7.5)
save_figure(fig, "14_tensors")

# %% [markdown]
# What to notice: almost everything is picture. All rows end together. Types and labels mark the
# same places, but for different readers: the types go to the *mask*, so they are needed whenever a
# suffix is given; the labels go to the *loss*, so they exist only in training.

# %% [markdown]
# ## At full size
#
# The layout has no parameters and almost no arithmetic. What it costs is *length*: every later layer
# works on each place. Eight text tokens, at the three sizes of PaliGemma, and the bytes of a batch
# of one:

# %%
print("size  image tokens      L  of it picture   ids, types, masks   pixels")
for size in (224, 448, 896):
    N = (size // 14) ** 2
    L = N + 8
    print(
        f"{size:4} {N:13} {L:6} {N / L:14.1%} {3 * 8 * L / 1e3:16.1f} kB"
        f" {3 * size**2 * 4 / 1e6:5.1f} MB"
    )

# %% [markdown]
# And padding? A padded place costs as much as a real one. Take 512 prompts of random lengths, of 2
# to 40 pieces, in batches of eight: as they come, and sorted by length first.

# %%
generator = random.Random(0)
pieces = [generator.randint(2, 40) for _ in range(512)]


def wasted(lengths, image_tokens):
    """Share of padded places over all batches of eight."""
    groups = [lengths[i : i + 8] for i in range(0, len(lengths), 8)]
    total = sum(8 * (max(group) + image_tokens + 2) for group in groups)
    return 1 - sum(n + image_tokens + 2 for n in lengths) / total


for image_tokens in (0, 256, 1024):
    a, b = wasted(pieces, image_tokens), wasted(sorted(pieces), image_tokens)
    print(f"{image_tokens:5} image tokens: {a:6.1%} padding, sorted {b:6.1%}")

# %% [markdown]
# For text alone, two fifths of the work would be padding and sorting is a must. With a picture in
# each row it hardly matters: the picture has the same length everywhere.
#
# Time on this machine, for one picture of 112 pixels from a file of 451 × 300, and one prompt:


# %% tags=["nbval-ignore-output"]
def best_ms(function, *inputs, repeats=20):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(*inputs)
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


print(f"picture {best_ms(processor.image_processor, photos[0]):.2f} ms")
print(f"prompt  {best_ms(processor.encode_prefix, prompts[1]):.3f} ms")
print(f"collate {best_ms(collate, *[[ids] * 8 for ids in rows[:2]]):.3f} ms for eight rows")

# %% [markdown]
# ## A bug people really make
#
# Five colleagues prepare "caption en". All five sequences run, and all five read the same, decoded
# and trimmed. Only one of them is what the model was trained on. Which?

# %%
t = tokenizer
image, bos, newline = [t.image_id] * 3, t.bos_id, t.newline_id
sequences = {
    "A": [*image, *t.encode(" "), bos, *t.encode("caption en"), newline],
    "B": [*image, bos, bos, *t.encode("caption en"), newline],
    "C": [*image, bos, *t.encode("caption en"), newline],
    "D": [*image, bos, *t.encode(" caption en"), newline],
    "E": [*image, bos, *t.encode("caption en")],
}
for name, ids in sequences.items():
    print(name, repr(t.decode(ids).strip()))

# %% [markdown]
# Nothing to see. This is why one looks at **ids** and not at text. Before you scroll on: each of the
# wrong ones comes from one careless string. Can you guess which?

# %%
fig, ax = plt.subplots(figsize=(6.4, 2.6), layout="constrained")
right = sequences["C"]
for y, (name, ids) in enumerate(sequences.items()):
    wrong = [x for x, (a, b) in enumerate(zip(ids, right)) if a != b][:1]
    draw_strip(ax, ids, [0] * len(ids), -y, wrong)
    if len(ids) < len(right):
        missing = plt.Rectangle((len(ids) - 0.47, -y - 0.4), 0.94, 0.8, fill=False)
        missing.set(edgecolor=COLOURS["bad"], linewidth=1.6, linestyle=":")
        ax.add_patch(missing)
    ax.text(-0.8, -y, name, ha="right", va="center", fontsize=9)
ax.set(xlim=(-1.4, 8.6), ylim=(-4.6, 0.6))
ax.set_axis_off()
save_figure(fig, "14_bug")

# %% [markdown]
# **A**: `"<image> " + …`, a space after the picture. **B**: the tokenizer added its own bos to one
# that was there. **D**: `" caption en"`, a space before the prompt. **E**: no newline; the model may
# go on with the *question*. **C** is right.
#
# The model has never met the others. It answers all the same, and nothing says that the answer may
# be another. The cure is the assertion of this lesson: compare the ids with the reference, all of
# them.

# %% [markdown]
# ### A second one: a loss that is too good
#
# Another colleague trains with `labels = input_ids`. The first loss is tiny, and it falls. To see
# it without a model, take the simplest predictor there is: for each token, count which token
# followed it in this very batch. It has never seen a picture.


# %%
def bigram_loss(ids, labels):
    """Mean −log p(next | current), p counted on the batch, over the labelled places."""
    follows = defaultdict(Counter)
    pairs = [(a, b, c) for r, s in zip(ids, labels) for a, b, c in zip(r, r[1:], s[1:])]
    for a, b, _ in pairs:
        follows[a][b] += 1
    shares = [follows[a][b] / sum(follows[a].values()) for a, b, c in pairs if c != -100]
    return -torch.tensor(shares).log().mean().item()


questions = ["caption en", "answer en how many cats are there?", "caption en", "cap en"] * 2
replies = ["a cat", "2", "two dogs and a cat", "a bee", "a dog", "3", "a cat and a bee", "two cats"]
train = processor([photos[0]] * 8, questions, replies)
ids, masked = train["input_ids"].tolist(), train["labels"].tolist()
print(f"labels = input_ids:  loss {bigram_loss(ids, ids):.2f}")

# %% [markdown]
# What a predictor, for a handful of counts! Does it know the captions?

# %%
print(f"suffix and eos only: loss {bigram_loss(ids, masked):.2f}")
counted = sum(label != -100 for row in masked for label in row)
everything = sum(map(len, ids))
print(f"{counted} of {everything} places are answers: {counted / everything:.1%}")

# %% [markdown]
# It does not. In the first number, more than nine of ten places say "after `<image>` comes `<image>`" or
# repeat a prompt of fixed wording. These are nearly free, and they drown the answers.
#
# With 256 image tokens it is worse. A loss is only worth what it averages over: print how many
# places are counted, and decode them once.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): count the places
#
# Pictures of 224 pixels in patches of 14. Prompts of 5 and 9 pieces, answers of 7 and 2 pieces. What
# is the length L of the batch, how many places are padding, and how many carry a label?

# %% tags=["exercise"]
answer = None  # three numbers: (L, padded, labelled)


# %% tags=["check"]
def test_1(answer):
    assert isinstance(answer, tuple) and len(answer) == 3, (
        "give three numbers: (L, padded, labelled)"
    )
    prefixes = [[5] * (256 + 1 + n + 1) for n in (5, 9)]
    made = collate(prefixes, [[6] * (n + 1) for n in (7, 2)])
    L, padded = made["input_ids"].shape[1], int((made["attention_mask"] == 0).sum())
    labelled = int((made["labels"] != -100).sum())
    assert answer[0] == L, "L: image tokens, bos, prompt, newline, answer, eos of the longer row"
    assert answer[1] == padded, "padded: how much shorter is the other row?"
    assert answer[2] == labelled, "labelled: the answers, and one more in each row"


check(test_1, answer)

# %% [markdown]
# <details><summary>Hint</summary>
#
# $N = (224 / 14)^2$. Each row has three control tokens besides its image tokens.
#
# </details>

# %% tags=["solution"]
first, second = 256 + 1 + 5 + 1 + 7 + 1, 256 + 1 + 9 + 1 + 2 + 1
answer = (max(first, second), abs(first - second), 7 + 1 + 2 + 1)
check(test_1, answer)

# %% [markdown]
# ### Exercise 2 (fill in): where does each token stand?
#
# RoPE ([lesson 09](09_rope.ipynb)) turns each token by its position. Padding must not shift anybody: the first *real*
# token is at 0, the next at 1. Make the positions from the attention mask alone, without a loop.
# What a padded place gets does not matter, but it must not be negative.


# %% tags=["exercise"]
def positions(attention_mask):
    return None  # int64[B, L] → int64[B, L]


# %% tags=["check"]
def test_2(positions):
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    found = positions(mask)
    assert found is not None and found.shape == mask.shape, "one position for each place"
    assert (found >= 0).all(), "a negative position on padding"
    assert found[1].tolist() == [0, 1, 2, 3, 4], "without padding: 0, 1, 2, …"
    assert found[0, 2:].tolist() == [0, 1, 2], "padding has shifted the first row"
    assert found[2, 4] == 0, "a single real token stands at 0"


check(test_2, positions)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A running sum (`cumsum`) of the mask counts the real tokens up to each place.
#
# </details>


# %% tags=["solution"]
def positions(attention_mask):
    return (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)


check(test_2, positions)

# %% [markdown]
# ### Exercise 3 (break): is this batch sound?
#
# Write `sound(batch)`: True for a batch of our processor with suffixes, False for a broken one.
# `check` breaks it in five ways: padded on the right, labels on the prefix, eos not labelled, two
# bos, an image token too few. The tokenizer is at hand as `tokenizer`, N as
# `processor.num_image_tokens`.


# %% tags=["exercise"]
def sound(batch):
    return None  # True or False


# %% tags=["check"]
def test_3(sound):
    good = {
        name: train[name] for name in ("input_ids", "attention_mask", "token_type_ids", "labels")
    }
    ids, labels, N = good["input_ids"], good["labels"], processor.num_image_tokens
    shorter = [row[row != 0].tolist() for row in ids]
    double = [[*r[:N], 2, *r[N:]] for r in shorter]
    broken = {
        "padded on the right": {name: t.flip(1) for name, t in good.items()},
        "labels on the prefix": good | {"labels": ids.masked_fill(ids == 0, -100)},
        "eos not labelled": good | {"labels": labels.masked_fill(ids == 1, -100)},
        "two bos": good | {"input_ids": collate(double, [])["input_ids"]},
        "an image token too few": good
        | {"input_ids": ids.masked_fill(ids.cumsum(1) == tokenizer.image_id, 5)},
    }
    assert sound(good) is True, "rejects a batch that is right"
    assert sound({k: t[:3] for k, t in good.items()}) is True, "rejects three rows of it"
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
#   answer and eos.
# - A task is a wording of the prompt, nothing else.
# - Four tensors travel together: ids, which are real, which are suffix, which count in the loss.
# - Padding stands on the left, so that every row is continued in the same column.
# - Compare ids, never text. And know what your loss averages over.

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
# The pictures give 1024 vectors and the ids hold 256 places. Our model refuses ([lesson 15](15_model.ipynb)). A
# careless one would fill the 256 places with the first quarter of the picture: its top.
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
