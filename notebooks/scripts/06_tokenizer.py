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
# [← SigLIP](05_siglip.ipynb) | [contents](00_overview.ipynb) | [RMSNorm →](07_rms_norm.ipynb)

# %% [markdown]
# # 06 · Tokenizer: how does text become numbers, and boxes become text?
#
# *40 minutes* · part II, Language
#
# **What you will be able to do**
#
# - learn parts of words from a text, with a pencil and with twenty lines of code (BPE);
# - encode a text by hand exactly as the tokenizer of a trained model does;
# - read PaliGemma's vocabulary: pieces, bytes, `<loc>`, `<seg>`, `<image>`;
# - keep a text from giving commands to your program.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("tokenizer")

# %% [markdown]
# ## Setup
#
# No earlier lesson is needed. `sentencepiece` is the library behind the published tokenizer.

# %%
#| export
"""Text to token ids and back, with PaliGemma's `<image>`, `<loc>` and `<seg>` tokens."""

import json
import os
import re
from collections.abc import Iterable

from paligemma.support.replacing import replacing, settled
from paligemma.support.tokens import check_text, open_sentencepiece, place_tokens, token_files

# %% tags=["setup"]
import random
import tempfile
from collections import Counter
from importlib import resources
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import sentencepiece as spm
import torch
from safetensors.torch import load_file

from paligemma.support.course import add_to_class, check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS, draw_boxes

# %% [markdown]
# ## The problem
#
# A language model reads **whole numbers** from a fixed list: the **ids** of its **tokens**. All tokens together are its **vocabulary**. Which units should get an id?
#
# Letters: few units, but long sequences, and *c* alone means nothing. Words: short sequences, but an endless list, in which `cat` and `cats` are strangers to each other and `catlike` has no number at all.

# %%
text = "two cats and a catlike dog saw 2024 other cats"
words = {"two", "cats", "and", "a", "dog", "saw", "other"}
print("as letters:", len(text), "units")
print("as words:  ", len(text.split()), "units")
print("unknown:   ", [word for word in text.split() if word not in words])

# %% [markdown]
# Nearly all models choose what lies between: **pieces** of words. Frequent strings get an id of their own, rare ones are put together from parts, and in the worst case from single bytes. Nothing is ever unknown.
#
# Who chooses the pieces? Nobody. They are *counted*.

# %% [markdown]
# ## By hand
#
# **Byte-pair encoding** (BPE) starts with letters and repeats one step: find the most frequent pair of neighbours, make it a new piece. Our corpus has six words. We write `▁` for the space before a word, so that a space is a letter like any other.

# %%
corpus = "hat cat hat that cat hats"
split = [["▁", *word] for word in corpus.split()]
print(split)


# %%
def pair_counts(split):
    """How often each two neighbours occur."""
    return Counter(pair for word in split for pair in pairwise(word))


print(pair_counts(split).most_common(4))

# %% [markdown]
# Count with a pencil: `a` is followed by `t` in each of the six words. So `at` becomes the first new piece. Now count again, with `at` as one unit: `h at` stands in *hat*, *hat*, *that*, *hats*. If two pairs are equally frequent, we take the one that was met first.


# %%
def join(word, pair):
    """Merge each occurrence of the pair in one word, from left to right."""
    new, i = [], 0
    while i < len(word):
        found = tuple(word[i : i + 2]) == pair
        new.append("".join(pair) if found else word[i])
        i += 2 if found else 1
    return new


# %%
for _ in range(5):
    counts = pair_counts(split)
    pair = max(counts, key=counts.get)  # on a tie: the pair that was met first
    split = [join(word, pair) for word in split]
    print(counts[pair], "×", " + ".join(pair).ljust(8), "  ".join("|".join(w) for w in split))
assert split == [["▁hat"], ["▁cat"], ["▁hat"], ["▁", "t", "hat"], ["▁cat"], ["▁hat", "s"]]

# %% [markdown]
# After five steps *hat* and *cat* are single pieces, and *hats* is `▁hat|s`: the word and its plural share a part, although nobody told the algorithm about plurals. *that* is `▁|t|hat`, which is nonsense as grammar. Counting is all there is.

# %% [markdown]
# ## As a loop
#
# The same as a function. It returns the pieces in the order of learning: first the letters, then one for each merge. A piece's place in this list is its id.


# %%
def train_bpe(text, merges):
    """Learn BPE from a text: its pieces, letters first."""
    split = [["▁", *word] for word in text.split()]
    pieces = sorted(set("▁" + "".join(text.split())))
    for _ in range(merges):
        counts = pair_counts(split)
        pair = max(counts, key=counts.get)
        split = [join(word, pair) for word in split]
        pieces.append("".join(pair))
    return pieces


# %%
pieces = train_bpe(corpus, 5)
print(pieces)
assert pieces[-5:] == ["at", "hat", "▁hat", "▁c", "▁cat"]

# %% [markdown]
# To **encode** a text, start with its letters. Among all neighbours that would make a known piece, merge those whose piece was learned *first*. Repeat until nothing fits. A word that the corpus never had comes out in parts:


# %%
def encode_bpe(text, pieces):
    """Split a text into pieces, by merging letters in the order of learning."""
    rank = {piece: i for i, piece in enumerate(pieces)}
    parts = list(text.replace(" ", "▁"))
    while True:
        pairs = [a + b for a, b in pairwise(parts)]
        known = [(rank[pair], i) for i, pair in enumerate(pairs) if pair in rank]
        if not known:
            return parts
        i = min(known)[1]  # learned first; on a tie the leftmost
        parts[i : i + 2] = [pairs[i]]


# %%
for word in (" hat", " cats", " hath", " chat"):
    print(f"{word:5}", encode_bpe(word, pieces))
assert encode_bpe(" cats", pieces) == ["▁cat", "s"]

# %% [markdown]
# ## Each word once
#
# A corpus repeats its words. So look at each **distinct** word once and let it vote as often as it occurs. Here are the captions of a small world, 400 of them.

# %%
animals = "cat dog bird horse rabbit elephant monkey".split()
places = ["on the left of", "on the right of", "under", "in front of", "next to"]
rng = random.Random(0)
captions = []
for _ in range(400):
    first, second = rng.sample(animals, 2)
    what = rng.choice([f"one {first}", f"two {first}s", f"three {first}s"])
    captions.append(f"{what} {rng.choice(places)} the {second}")
text = " ".join(captions)
print(captions[0], "|", captions[1])
print(len(text.split()), "words, but only", len(set(text.split())), "distinct ones")


# %%
def train_bpe_once(text, merges):
    """The same as train_bpe, but it looks at each distinct word once."""
    times = Counter("▁" + word for word in text.split())
    split = {word: list(word) for word in times}
    pieces = sorted(set("".join(times)))
    for _ in range(merges):
        counts = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                counts[pair] += times[word]
        if not counts:
            break  # every word is one piece
        pair = max(counts, key=counts.get)
        split = {word: join(parts, pair) for word, parts in split.items()}
        pieces.append("".join(pair))
    return pieces


# %%
assert train_bpe_once(text, 60) == train_bpe(text, 60)
assert train_bpe_once(corpus, 5) == pieces
assert len(text.split()) > 100 * len(set(text.split()))
print("the same pieces in the same order, from a hundredth of the words")

# %% [markdown]
# More merges make shorter sequences and a longer list. Each colour is one token:


# %% tags=["hide-input"]
def draw_tokens(ax, y, parts, label):
    """Draw one row of tokens as coloured boxes; x runs in letters."""
    colours = ["#cfe0ee", "#f6d9c4", "#cde6df", "#ead2df"]
    x = 0
    for index, part in enumerate(parts):
        width = max(len(part), 1)
        box = plt.Rectangle((x, y - 0.38), width - 0.08, 0.76, facecolor=colours[index % 4])
        ax.add_patch(box)
        shown = part.replace("\n", "↵")
        ax.text(x + width / 2 - 0.04, y, shown, ha="center", va="center", family="monospace")
        x += width
    ax.text(-0.6, y, label, ha="right", va="center")
    return x


figure, ax = plt.subplots(figsize=(9, 2.3), layout="constrained")
rows = {}
for row, merges in enumerate((0, 20, 60, 80)):
    learned = train_bpe_once(text, merges)
    rows[merges] = encode_bpe(" two elephants next to the catbird", learned)
    width = draw_tokens(ax, -row, rows[merges], f"{merges} merges: {len(rows[merges])} tokens")
ax.set(xlim=(-11, width), ylim=(-3.6, 0.6))
ax.set_axis_off()
assert "▁the" in rows[20] and "▁elephants" in rows[80] and "▁elephants" not in rows[60]
assert "▁bird" in learned and rows[80][-3:] == ["bi", "r", "d"]
save_figure(figure, "06_merges")

# %% [markdown]
# **What to notice.** Short frequent words are whole first (`▁the`), long ones later. `catbird` was never in the corpus, so it is put together from parts. The piece `▁bird` is in the list and does not help: it begins with a space.

# %% [markdown]
# ## A real tokenizer
#
# The model that ships with this course has the file [tokenizer.model](../paligemma/assets/tiny), laid out like PaliGemma's. It was made by SentencePiece, a library that does in C++ what we did by hand. The first four ids are **special tokens**: they structure a sequence and stand for no text. Then come the line break, 256 bytes, the learned pieces, single letters, and at the end tokens for boxes and masks, which we explain below.

# %%
tiny = resources.files("paligemma") / "assets" / "tiny" / "tokenizer.model"
sp = spm.SentencePieceProcessor(model_file=str(tiny))
listed = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
assert listed[4] == "\n" and listed[5] == "<0x00>" and listed[260] == "<0xFF>"
print(listed[:7], "…", listed[260:264], "…")
print(listed[271:281], "…", listed[1018:1026], "…", listed[-1])

# %% [markdown]
# Five things to try: a number, a space in front, letters with accents, an emoji, and a line break.

# %%
for text in ("12 cats", " cat", "café", "søt", "🐱", "a\nb"):
    parts, ids = sp.encode(text, out_type=str), sp.encode(text)
    assert sp.decode(ids) == text
    print(f"{text!r:10} {ids!s:27} {parts}")

# %% [markdown]
# `12` is two pieces: digits are kept apart, so that every number is spelled in the same way. The `é` of French captions has a piece; `ø` and the cat have none and are spelled as their UTF-8 bytes, two and four of them: **byte fallback**. The space in front is kept. So `decode(encode(text))` gives the text back.

# %% [markdown]
# ### Its ids by our rules
#
# Is this our algorithm? We take *its* list of pieces and *our* `encode_bpe`. Only byte fallback must be added.


# %%
def ids_by_hand(text):
    """Text to the ids of the shipped tokenizer, by the rules of this lesson."""
    ids = []
    for part in encode_bpe(text, listed):
        spelled = [part] if part in listed else [f"<0x{byte:02X}>" for byte in part.encode()]
        ids += [listed.index(piece) for piece in spelled]
    return ids


# %%
text = "how many cats are there?"
print(encode_bpe(text, listed), ids_by_hand(text), sp.encode(text))

# %%
letters = "catdoghundechienserl 12é🐱"
nonsense = ["".join(rng.choices(letters, k=20)) for _ in range(100)]
questions = ["caption en", "detect cat ; dog", "zwei Hunde", "un chat et deux chiens", "søt"]
texts = captions[:50] + nonsense + questions
assert all(ids_by_hand(text) == sp.encode(text) for text in texts)
print(f"{len(texts)} texts, sense and nonsense: all ids are those of the shipped tokenizer")

# %% [markdown]
# ## The module
#
# PaliGemma took Gemma's 256,000 pieces and added 1,153 tokens at the end: 1024 **location tokens** `<loc0000>` … `<loc1023>`, 128 tokens for masks `<seg000>` … `<seg127>`, and `<image>`, which stands where the picture's vectors go.

# %%
#| export
NUM_LOC, NUM_SEG = 1024, 128
ADDED = [f"<loc{i:04d}>" for i in range(NUM_LOC)] + [f"<seg{i:03d}>" for i in range(NUM_SEG)]
CONTROL = ("<image>", "<bos>", "<eos>", "<pad>")

# %% tags=["hide-input"]
blocks = [
    ("pad, eos, bos, unk", 0, 3, "muted"),
    ("pieces, bytes,\nline break", 4, 255_999, "language"),
    ("<loc0000>\n… <loc1023>", 256_000, 256_000 + NUM_LOC - 1, "accent"),
    ("<seg000>\n… <seg127>", 256_000 + NUM_LOC, 256_000 + len(ADDED) - 1, "together"),
    ("<image>", 256_000 + len(ADDED), 256_000 + len(ADDED), "vision"),
]
figure, ax = plt.subplots(figsize=(9, 1.3), layout="constrained")
for index, (name, first, last, colour) in enumerate(blocks):
    ax.add_patch(plt.Rectangle((index, 0), 0.96, 1, facecolor=COLOURS[colour]))
    ax.text(index + 0.48, 0.5, name, color="white", ha="center", va="center")
    span = f"{first:,}" if first == last else f"{first:,} … {last:,}"
    ax.text(index + 0.48, -0.3, span, ha="center", va="center")
ax.set(xlim=(0, len(blocks)), ylim=(-0.5, 1))
ax.set_axis_off()
assert len(ADDED) + 1 == 1153
save_figure(figure, "06_layout")

# %% [markdown]
# In the plainest form SentencePiece does all the work: the file already ends with `<loc>` and `<seg>`, so `<image>` gets the next id.


# %%
#| export
class Tokenizer:
    """SentencePiece plus the tokens that PaliGemma adds.

    Ids, in order: the pieces of the file, `<loc0000>`…`<loc1023>`, `<seg000>`…`<seg127>`
    (whether the file already ends with these or not), then `<image>`. Tokens that a fine-tune
    added, and the files beside it list, have the ids that these files say.

    Args:
        model_file: path of a SentencePiece `tokenizer.model`.

    Raises:
        ValueError: no such file, another kind of file, or others beside it that contradict it.

    Source: PaliGemma paper, section 3.2; the published `tokenizer.model` and `added_tokens.json`.
    """

    def __init__(self, model_file: str | os.PathLike):
        self.sp = spm.SentencePieceProcessor(model_file=str(model_file))
        self.pad_id, self.eos_id, self.bos_id = 0, 1, 2
        self.image_id = self.sp.get_piece_size()

    def encode(self, text: str) -> list[int]:
        return self.sp.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self.sp.decode([i for i in ids if i != self.image_id])


# %%
tokenizer = Tokenizer(tiny)
for text in ("a cat", "<loc0100> a cat\n", "<seg007><loc1023>", "<loc1024>"):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    print(f"{text!r:20} {ids}")
assert len(ids) > 1

# %% [markdown]
# `<loc1024>` does not exist, so it is ordinary text and is spelled.
#
# ## A bug people really make: text that gives commands
#
# A service reads web pages to people. One page always stops in the middle. Nothing crashes; the rest is just not there. The service's tokenizer turns the *name* of a token into the token, wherever it stands. Many do, unless you forbid it:


# %%
def obedient(text):
    """Ids of a text; where it spells <eos>, the token that ends a sequence."""
    before, *rest = [tokenizer.encode(part) for part in text.split("<eos>")]
    return before + [i for part in rest for i in [tokenizer.eos_id, *part]]


# %%
page = "two cats <eos> is how a model ends its answer. and the dog?"
ids = obedient(page)
heard = ids[: ids.index(tokenizer.eos_id)]
print("heard:", tokenizer.decode(heard))
assert tokenizer.decode(heard) == "two cats "

# %% [markdown]
# Whoever writes the page controls the program: `<eos>` ends an answer, `<image>` claims a picture that is not there. The check that finds it: **no text may produce a special token**.
#
# The cure is to refuse. `check_text`, in [support/tokens.py](../paligemma/support/tokens.py), raises a `ValueError` for the four names. `<loc0100>` stays legal: people ask about places.


# %%
@add_to_class(Tokenizer)
def encode(self, text):
    check_text(text, CONTROL)
    return self.sp.encode(text)


# %%
assert tokenizer.eos_id in obedient("a<eos>b")  # the check on the service: found
for text in ("<image> a cat", "a cat<eos>"):
    try:
        tokenizer.encode(text)
    except ValueError as error:
        print("refused:", error)

# %% [markdown]
# ## The module, complete
#
# Some releases of the file end *before* `<loc0000>`. Then a location is spelled letter by letter, and the model, which knows it as one token, reads nonsense. A small file of that kind:

# %%
stored = load_file("reference/tokenizer.safetensors")
file = Path(tempfile.mkdtemp()) / "tokenizer.model"
file.write_bytes(bytes(stored["model"].tolist()))
older = Tokenizer(file)
print(older.sp.encode("<loc0001> cat", out_type=str))
assert len(older.encode("<loc0001>")) == 9

# %% [markdown]
# So the added tokens get the ids that come next, and we cut them out of the text before SentencePiece sees it. The regular expression is `(<loc0000>|<loc0001>|…)`: any of the names, the longest first. Its brackets make `split` keep what it cut out. `place_tokens` finds the ids, also those that a fine-tune added and listed in files beside this one.


# %%
#| export
@add_to_class(Tokenizer)
def __init__(self, model_file: str | os.PathLike):
    self.sp = sp = open_sentencepiece(model_file)
    self.pad_id, self.eos_id, self.bos_id = sp.pad_id(), sp.eos_id(), sp.bos_id()
    self.added, self.image_id = place_tokens(sp, ADDED, "<image>", model_file)
    self._spelled = {i: token for token, i in self.added.items()}
    longest_first = sorted(self.added, key=len, reverse=True)
    self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
    self.newline_id = self.encode("\n")[-1]


@add_to_class(Tokenizer)
def encode(self, text: str) -> list[int]:
    """Text to ids, without bos or eos; a `ValueError` if it spells a control token."""
    check_text(text, CONTROL)
    ids = []
    for part in self._split.split(text):  # "<loc0001> cat" → "", "<loc0001>", " cat"
        ids += [self.added[part]] if part in self.added else self.sp.encode(part)
    return ids


# %% [markdown]
# `decode` goes the same way back. Special tokens are no text and are left out. An id that no token has must be *seen*. And a negative one is an error: in training, −100 marks what is not counted.


# %%
#| export
@add_to_class(Tokenizer)
def decode(self, ids: Iterable[int]) -> str:
    """Ids to text: undoes `encode`, for all texts without one certain character (exercise 3).

    Pad, bos, eos and `<image>` are left out; an id that no token has shows as `<unk:…>`.
    """
    text, run = [], []
    for i in map(int, ids):
        if i < 0:
            raise ValueError(f"id {i} is negative; drop the -100 of labels before decoding")
        if i == self.image_id or (i < self.sp.get_piece_size() and self.sp.is_control(i)):
            continue
        if i < self.sp.get_piece_size() and i not in self._spelled:
            run.append(i)  # decoded together: a letter may be several pieces
        else:
            text += [self.sp.decode(run), self._spelled.get(i, f"<unk:{i}>")]
            run = []
    return "".join([*text, self.sp.decode(run)])


# %% [markdown]
# What is left is the number of ids, and files:


# %%
#| export
@add_to_class(Tokenizer)
def __len__(self) -> int:
    """V, how many ids there are, `<image>` and what a fine-tune added included."""
    return max(self.image_id, *self.added.values()) + 1


@add_to_class(Tokenizer)
@classmethod
def from_pretrained(cls, path: str | os.PathLike) -> "Tokenizer":
    """Read `tokenizer.model`, and what lists more tokens, from a checkpoint directory."""
    return cls(settled(path) / "tokenizer.model")


@add_to_class(Tokenizer)
def save_pretrained(self, path: str | os.PathLike) -> None:
    """Write `tokenizer.model` and the two files that list what it lacks; transformers reads
    them too. The directory is made when absent."""
    files = token_files(self.sp, self.added | {"<image>": self.image_id}, "<image>")
    with replacing(path) as draft:
        (draft / "tokenizer.model").write_bytes(self.sp.serialized_model_proto())
        for name, content in files.items():
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (draft / name).write_text(text + "\n", encoding="utf-8")


# %%
tokenizer, older = Tokenizer(tiny), Tokenizer(file)
print(len(older), "ids =", older.sp.get_piece_size(), "pieces +", len(ADDED), "+ <image>")
print(older.encode("<loc0001> cat"), tokenizer.encode("<loc0001> cat"))
print(tokenizer.decode([*tokenizer.encode("a cat"), tokenizer.eos_id, 9000]))
assert older.encode("<loc0001>") == [361] and len(older) == 360 + 1152 + 1
assert all(tokenizer.encode(text) == sp.encode(text) for text in texts)

# %% [markdown]
# ## Against the reference
#
# The stored file also holds texts and the ids that transformers' `GemmaTokenizer` gives for them. It reads the same `tokenizer.model`, but its code is another: BPE by the `tokenizers` library, with rules that it derives from the pieces.

# %%
count = sum(name.startswith("text_") for name in stored)
differ = 0
for index in range(count):
    text = bytes(stored[f"text_{index}"].tolist()).decode()
    differ += older.encode(text) != stored[f"ids_{index}"].tolist()
print(
    f"{count} texts, {sum(stored[f'ids_{i}'].numel() for i in range(count))} ids: {differ} differ"
)
assert differ == 0

# %% [markdown]
# ## See it: a box is text
#
# A box has four numbers: how far down and how far right its upper left corner lies, then the same for its lower right corner. Each is a share of the height or the width. We give it one of 1024 steps, and each step is a *token*. ([Lesson 19](19_detection.ipynb) does it with care.)

# %%
scene = sample_picture("scene")
x0, y0, x1, y1 = box = (11, 240, 131, 352)  # around the cat, in pixels
shares = (y0 / scene.height, x0 / scene.width, y1 / scene.height, x1 / scene.width)
answer = "".join(f"<loc{round(share * 1023):04d}>" for share in shares) + " cat"
print("answer:", answer)
print("ids:   ", tokenizer.encode(answer))
assert len(tokenizer.encode(answer)) == 5

# %% tags=["hide-input"]
figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 2.8), width_ratios=[1, 2.3], layout="constrained"
)
left.imshow(draw_boxes(scene, [box], ["cat"]))
for y, label, row in (
    (0, "picture (64)", ["<image>", "<image>", "…", "<image>"]),
    (-1, "question", ["<bos>", *tokenizer.sp.encode("detect cat", out_type=str), "\n"]),
    (-2, "answer", re.findall(r"<loc\d{4}>", answer)),
    (-3, "", [*tokenizer.sp.encode(" cat", out_type=str), "<eos>"]),
):
    draw_tokens(right, y, row, label)
right.set(xlim=(-9, 37), ylim=(-3.6, 0.6))
for ax in (left, right):
    ax.set_axis_off()
save_figure(figure, "06_box")

# %% [markdown]
# **What to notice.** The model has no special part for boxes. To it `<loc0548>` is a token like `▁cat`. Detection becomes *writing*, and one loss trains all tasks. The price: nothing tells the model that 548 lies next to 549. It has to learn that from examples.

# %% [markdown]
# ### Who pays for the counting
#
# Pieces are learned from a corpus, so whose language is in it matters. The shipped tokenizer was made from captions in English, French and German. The same sentence in five languages:

# %%
sentence = {
    "English": "a cat and two dogs",
    "French": "un chat et deux chiens",
    "Chinese": "一只猫和两只狗",
    "Greek": "μια γάτα και δύο σκύλοι",
    "Hindi": "एक बिल्ली और दो कुत्ते",
}

# %%
cost = {name: len(tokenizer.encode(text)) for name, text in sentence.items()}
for name, text in sentence.items():
    print(f"{name:8} {len(text):3} characters {len(text.encode()):3} bytes {cost[name]:3} tokens")
assert all(cost[name] == len(sentence[name].encode()) for name in ("Chinese", "Greek", "Hindi"))
assert cost["Hindi"] > 10 * cost["English"]

# %% [markdown]
# **What to notice.** A script that the corpus lacked costs one token a *byte*. The Hindi sentence costs more than ten times as much as the English one: in time, in money, in room for context. This tokenizer is an extreme case: it saw three languages. Byte fallback makes every language *possible*, not equally cheap. Gemma's list serves many languages; that is one reason for its 256,000 pieces.

# %% [markdown]
# ## At full size
#
# 257,153 ids need a table with one row each, rounded up to a multiple of 64, which hardware likes. In PaliGemma 3B a row has 2048 numbers.

# %%
with torch.device("meta"):  # shapes without memory
    table = torch.nn.Embedding(257_216, 2048)
count, whole = table.weight.numel(), 2_923_466_480
print(f"{count:,} parameters, {2 * count / 1e9:.2f} GB in bfloat16, {count / whole:.0%} of all")
print(f"<loc> and <seg>: {len(ADDED) / 257_216:.2%} of the rows; unused rows: {257_216 - 257_153}")
assert 257_216 % 64 == 0 and 0.17 < count / whole < 0.2 and len(ADDED) / 257_216 < 0.005

# %% [markdown]
# Nearly a fifth of all parameters is this one table. To read a token is to copy its row. All `<loc>` and `<seg>` together take less than half a per cent of it: a cheap way to teach a language model geometry.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): how many tokens?
#
# Without running it: how many ids does `tokenizer` give for **(a)** `"<loc0512><loc0512>"`, **(b)** `"2024"`, **(c)** `"øø"`, **(d)** `"🐱🐱"`?

# %% tags=["exercise"]
answer = None  # your answer: four numbers


# %% tags=["check"]
def test_1(answer):
    assert isinstance(answer, (tuple, list)) and len(answer) == 4, "give four numbers: (a, b, c, d)"
    texts = ("<loc0512><loc0512>", "2024", "øø", "🐱🐱")
    for letter, text, number in zip("abcd", texts, answer):
        assert number == len(tokenizer.encode(text)), f"({letter}) is not {number}"


check(test_1, answer)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A `<loc>` is a token. Digits stand alone. A letter without a piece costs one token for each byte of its UTF-8 form; above, how many had `ø`, and how many the cat?
#
# </details>

# %% tags=["solution"]
# Two tokens; four digits; two letters of two bytes; two emoji of four bytes.
answer = (2, 4, 4, 8)
check(test_1, answer)

# %% [markdown]
# ### Exercise 2 (write): start from bytes
#
# GPT-2 begins with the 256 **bytes** instead of letters: then nothing needs a fallback. Write this BPE, without splitting the text into words: it becomes a list of byte values. Merge number $k$ (from 0) puts the new number $256 + k$ for each occurrence of its pair, from left to right. On a tie take the pair met first. Return the merged pairs in order; fewer than `merges` if none is left.


# %% tags=["exercise"]
def train_bytes(text, merges):
    return None  # your code: a list of pairs of numbers


# %% tags=["check"]
def test_2(train_bytes):
    for text, merges, right, about in (
        ("aaabdaaabac", 1, [(97, 97)], "the most frequent pair, as two byte values"),
        ("aaabdaaabac", 0, [], "no merges, no pairs"),
        ("éé", 1, [(195, 169)], "begin with bytes, not with letters"),
        ("ab", 5, [(97, 98)], "stop when no pair is left"),
        ("a b a b", 1, [(97, 32)], "a space is a byte like the others: do not split into words"),
        ("mnxyab abxymn", 1, [(109, 110)], "on a tie the pair that was met first"),
        ("abab", 2, [(97, 98), (256, 256)], "merge number 0 puts 256 into the text"),
        ("aaa b", 2, [(97, 97), (256, 97)], "merge from left to right"),
        ("aaabdaaabac", 3, [(97, 97), (256, 97), (257, 98)], "the second merge makes number 257"),
    ):
        found = train_bytes(text, merges)
        assert isinstance(found, list), "return a list of pairs"
        same = [tuple(pair) for pair in found if isinstance(pair, (tuple, list))] == right
        assert same and len(found) == len(right), f"{text!r}, {merges} merges: {about}"


check(test_2, train_bytes)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `list("é".encode())` is the list of bytes. `train_bpe` has all the steps: count with `pairwise`, choose with `max`, replace as `join` does, but with a number instead of a joined string.
#
# </details>


# %% tags=["solution"]
def train_bytes(text, merges):
    ids, pairs = list(text.encode()), []
    while len(pairs) < merges and len(ids) > 1:  # one unit has no neighbour
        counts = Counter(pairwise(ids))
        best = max(counts, key=counts.get)
        i = 0
        while i < len(ids) - 1:
            if (ids[i], ids[i + 1]) == best:
                ids[i : i + 2] = [256 + len(pairs)]
            i += 1
        pairs.append(best)
    return pairs


check(test_2, train_bytes)

# %% [markdown]
# ### Exercise 3 (break): the text that does not come back
#
# We said that `decode(encode(text))` is the text. Find a text that `encode` accepts and for which it is *not*. There is essentially one way, and it has to do with how spaces are written.

# %% tags=["exercise"]
broken = None  # your answer: a string


# %% tags=["check"]
def test_3(broken):
    assert isinstance(broken, str), "give a string"
    try:
        ids = tokenizer.encode(broken)
    except ValueError:
        raise AssertionError("encode refuses this text; find one that it accepts") from None
    assert tokenizer.decode(ids) != broken, f"it came back unchanged: {broken!r}"


check(test_3, broken)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Before it is cut, each space of the text becomes another character. What if the user types that one?
#
# </details>

# %% tags=["solution"]
broken = "low ▁▁ bars"  # such bars are drawn with U+2581, which decode turns into spaces
check(test_3, broken)

# %% [markdown]
# ## Summary
#
# - Tokens are strings that were frequent in a corpus. Nobody designed them, and they are not words.
# - Encoding merges neighbours in the order of learning: twenty lines reproduce a real tokenizer.
# - Rare things are spelled in bytes: nothing is unknown, but some languages pay more.
# - PaliGemma writes boxes and masks with 1152 extra tokens; detection is text.
# - A text is never a command: no text may produce a special token.

# %% [markdown]
# ## Quiz
#
# **1.** Why is `"cat"` encoded differently from `" cat"`, and which one follows `"a"` in a sentence?
#
# <details><summary>Answer</summary>
#
# The space belongs to the piece: `▁cat`. Inside a sentence it is nearly always this one; `cat` without it stands at the start of a text or inside a word. The model learns the two separately.
#
# </details>

# %% [markdown]
# **2.** Your fine-tuned model shall also output angles. Add 360 tokens, or write the digits?
#
# <details><summary>Answer</summary>
#
# New tokens: one token an angle, but 360 untrained rows, and no idea that 89 is near 90. Digits: up to three tokens, but already learned. With little data digits are a good start; with much data or many angles tokens pay.
#
# </details>

# %% [markdown]
# **3.** Why may a question contain `<loc0100>` but not `<eos>`?
#
# <details><summary>Answer</summary>
#
# A location is content: "what is at …?" is a question. `<eos>`, `<bos>`, `<image>` and `<pad>` are structure that only the program sets. If text could make them, text could change what the program does: the same mistake as SQL injection.
#
# </details>

# %% [markdown]
# ## References
#
# - Sennrich, Haddow, Birch 2016, *Neural Machine Translation of Rare Words with Subword Units*: BPE for text.
# - Kudo and Richardson 2018, *SentencePiece*; its options are in `trainer_spec` of `sentencepiece_model.proto`.
# - Chen et al. 2022, *Pix2Seq*: boxes as tokens.
# - Petrov et al. 2023, *Language Model Tokenizers Introduce Unfairness Between Languages*.
# - Beyer et al. 2024, *PaliGemma*, section 3.2; `GemmaTokenizer` in transformers.

# %% [markdown] tags=["navigation"]
# [← SigLIP](05_siglip.ipynb) | [contents](00_overview.ipynb) | [RMSNorm →](07_rms_norm.ipynb)
