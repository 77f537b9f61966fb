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
# *55 minutes* · part II, Language
#
# **What you will be able to do**
#
# - learn sub-words from a text with a pencil, then with twenty lines of code (BPE);
# - train a SentencePiece model and predict what it does with spaces, digits and emoji;
# - read PaliGemma's vocabulary: pieces, `<loc>`, `<seg>`, `<image>`;
# - spot the prompts that look right and are wrong.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("tokenizer")

# %% [markdown]
# ## Setup
#
# Only the drawing helpers of [lesson 01](01_plotting.ipynb) are needed. `sentencepiece` is the library behind the published tokenizer. Training it on a few sentences takes a fraction of a second.

# %%
#| export
"""Text to token ids and back, with PaliGemma's `<image>`, `<loc>` and `<seg>` tokens."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path


from paligemma.support.files import replacing
from paligemma.support.tokens import check_text, open_sentencepiece, place_tokens, token_files

# %% tags=["setup"]
import io
import random
import tempfile
import time
from collections import Counter
from importlib import resources
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import sentencepiece as spm
import torch
from safetensors.torch import load_file

from paligemma.support.course import add_to_class, check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS, draw_boxes

# %% [markdown]
# ## The problem
#
# A language model is a table lookup followed by arithmetic: it needs **whole numbers**, from a fixed list. Which units should get a number?
#
# Letters: few units, but long sequences, and *c* alone means nothing. Words: short sequences, but an endless list, and `cats`, `Cats` and `cat's` would be strangers to each other, while `catlike` would have no number at all.

# %%
text = "two cats and a catlike dog saw 2024 other cats"
words = {"two", "cats", "and", "a", "dog", "saw", "other"}
print("as letters:", len(text), "units")
print(
    "as words:  ", len(text.split()), "units, unknown:", [w for w in text.split() if w not in words]
)

# %% [markdown]
# The answer of nearly all models is in between: **sub-words**. Frequent strings get a number of their own, rare ones are put together from parts, and in the worst case from single bytes. Nothing is ever unknown.
#
# Who chooses the parts? Nobody. They are *counted*.

# %% [markdown]
# ## By hand
#
# **Byte-pair encoding** (BPE) starts with letters and repeats one step: find the most frequent pair of neighbours, make it a new unit. Our corpus has six words. We write `▁` for the space before a word, so that spaces are ordinary letters.

# %%
corpus = "hat cat hat that cat hats"
split = [["▁", *word] for word in corpus.split()]


def pair_counts(split):
    """How often each two neighbours occur."""
    return Counter(pair for word in split for pair in pairwise(word))


print(" ".join("".join(word) for word in split))
print(pair_counts(split).most_common(4))

# %% [markdown]
# Count with a pencil: `a` is followed by `t` in each of the six words. So `at` becomes the first new unit. Now count again, with `at` as one unit: `h at` stands in *hat*, *hat*, *that*, *hats*.


# %%
def join(word, pair):
    """Merge each occurrence of the pair in one word, from left to right."""
    new, i = [], 0
    while i < len(word):
        found = tuple(word[i : i + 2]) == pair
        new.append("".join(pair) if found else word[i])
        i += 2 if found else 1
    return new


for _ in range(5):
    counts = pair_counts(split)
    pair = max(counts, key=counts.get)  # on a tie the pair that was met first
    split = [join(word, pair) for word in split]
    print(
        f"{counts[pair]} × {pair[0]} + {pair[1]}".ljust(14), "  ".join("|".join(w) for w in split)
    )
assert split[0] == ["▁hat"] and split[1] == ["▁cat"] and split[2] == ["▁hat"]
assert split[-1] == ["▁hat", "s"] and split[3] == ["▁", "t", "hat"]

# %% [markdown]
# After five steps *hat* and *cat* are single units, and *hats* is `▁hat|s`: the word and its plural share a part, although nobody told the algorithm about plurals. *that* is `▁|t|hat`, which is nonsense as grammar. Counting is all there is.

# %% [markdown]
# ## As a loop
#
# The same as a function. Units get numbers: first the letters in order, then one for each merge. On a tie the pair that was met first wins, as above; any rule will do, if it is always the same.


# %%
def merge(word, pair, new):
    """Put `new` for each occurrence of the pair in a list of numbers, in place."""
    i = 0
    while i < len(word) - 1:
        if (word[i], word[i + 1]) == pair:
            word[i : i + 2] = [new]
        i += 1


def train_bpe(text, merges):
    """Learn BPE: (pieces, rules). Rule (a, b) number k makes piece number len(letters) + k."""
    words = ["▁" + word for word in text.split()]
    pieces = sorted(set("".join(words)))
    split = [[pieces.index(letter) for letter in word] for word in words]
    rules = []
    for _ in range(merges):
        counts = pair_counts(split)
        if not counts:
            break
        best = max(counts, key=counts.get)
        for word in split:
            merge(word, best, len(pieces))
        pieces.append(pieces[best[0]] + pieces[best[1]])
        rules.append(best)
    return pieces, rules


pieces, rules = train_bpe(corpus, 5)
print(pieces)
assert pieces[-5:] == ["at", "hat", "▁hat", "▁c", "▁cat"]

# %% [markdown]
# To **encode** a new word, apply the rules in the order in which they were learned. A word that the corpus never had comes out in parts:


# %%
def encode_bpe(word, pieces, rules):
    """One word to the strings of its pieces."""
    parts = list("▁" + word)
    for left, right in rules:
        parts = join(parts, (pieces[left], pieces[right]))
    return parts


for word in ("hat", "cats", "hath", "chat"):
    print(f"{word:5}", encode_bpe(word, pieces, rules))

# %% [markdown]
# ### A larger corpus
#
# The captions of a small world: numbers, animals, places. Here is what 0, 20 and 60 merges make of the same sentence. Each colour is one token.

# %%
animals = "cat dog bird horse rabbit elephant monkey".split()
places = ["on the left of", "on the right of", "under", "in front of", "next to"]
rng = random.Random(0)
captions = []
for _ in range(400):
    first, second = rng.sample(animals, 2)
    count = rng.choice(["a", "a", "two", "three", "12"])
    captions.append(
        f"{count} {first}{'' if count == 'a' else 's'} {rng.choice(places)} the {second}"
    )
captions[:3]


# %%
def draw_tokens(ax, y, parts, label, size=0.105):
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


sentence = "two elephants next to the catbird"
figure, ax = plt.subplots(figsize=(9, 2.3), layout="constrained")
for row, merges in enumerate((0, 20, 60, 200)):
    learned = train_bpe(" ".join(captions), merges)
    parts = [part for word in sentence.split() for part in encode_bpe(word, *learned)]
    width = draw_tokens(ax, -row, parts, f"{merges} merges: {len(parts)} tokens")
ax.set(xlim=(-11, width), ylim=(-3.6, 0.6))
ax.set_axis_off()
save_figure(figure, "06_merges")

# %% [markdown]
# **What to notice.** Frequent words grow together first (`▁the`), long ones later. `catbird` was never in the corpus, so it is put together from parts. The piece `▁bird` does not help: it begins with a space. More merges: shorter sequences, longer list. That is the trade.

# %% [markdown]
# ## Each word once
#
# A corpus repeats its words. So list each **distinct** word once, with the number of its occurrences, and let it vote that often. Everything else stays.


# %%
def train_bpe_fast(text, merges):
    """The same as train_bpe, looking at each distinct word once."""
    times = Counter("▁" + word for word in text.split())
    pieces = sorted(set("".join(times)))
    split = {word: [pieces.index(letter) for letter in word] for word in times}
    rules = []
    for _ in range(merges):
        counts = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                counts[pair] += times[word]
        if not counts:
            break
        best = max(counts, key=counts.get)
        for parts in split.values():
            merge(parts, best, len(pieces))
        pieces.append(pieces[best[0]] + pieces[best[1]])
        rules.append(best)
    return pieces, rules


# %%
for text in (corpus, " ".join(captions), "aaa aaaa aaaaa baaab"):
    assert train_bpe_fast(text, 60) == train_bpe(text, 60)
print("equal to the loop: the same pieces, the same rules, in the same order")

# %% tags=["nbval-ignore-output"]
text = " ".join(captions * 5)
print(f"{len(text.split()):,} words, {len(set(text.split()))} of them distinct")
for train in (train_bpe, train_bpe_fast):
    start = time.perf_counter()
    train(text, 60)
    print(f"{train.__name__:15} {1000 * (time.perf_counter() - start):6.0f} ms")

# %% [markdown]
# ### SentencePiece
#
# The library does the same in C++, and takes care of the rest: bytes, digits, reserved numbers. We give it the settings of the published tokenizer and our captions, and keep the list small. First come four control pieces, then the line break, 256 bytes, and what was learned.


# %%
def train_sentencepiece(sentences, vocab_size, **options):
    """A SentencePiece model, as the bytes of its file."""
    settings = {
        "model_type": "bpe",
        "byte_fallback": True,  # what has no piece is spelled in bytes
        "split_digits": True,  # each digit is its own piece
        "add_dummy_prefix": False,  # no space before the text
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",  # take the text as it is
        "user_defined_symbols": ["\n"],  # the line break is always its own piece
        "character_coverage": 1.0,
        "hard_vocab_limit": False,
        "num_threads": 1,
        "minloglevel": 2,  # silent
    }
    control = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    names = {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"}
    file = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=file,
        vocab_size=vocab_size,
        **(settings | control | names | options),
    )
    return file.getvalue()


# %%
model_bytes = train_sentencepiece(captions, 380)
sp = spm.SentencePieceProcessor(model_proto=model_bytes)
listed = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
print(listed[:7], "…", listed[259:263], "…")
print(listed[263:283], "…", listed[-4:])

# %% [markdown]
# Four things to try: a number, a space in front, letters with accents, and a cat that is not in the corpus.

# %%
for text in ("12 cats", " cat", "café", "🐱", "a\nb"):
    parts, ids = sp.encode(text, out_type=str), sp.encode(text)
    assert sp.decode(ids) == text
    print(f"{text!r:10} {ids!s:28} {parts}")

# %% [markdown]
# `12` stands in many captions, and yet it is two pieces: with digits apart, numbers of any length look alike. `é` and `🐱` are spelled as their UTF-8 bytes, two and four of them: **byte fallback**. The leading space is kept. So `decode(encode(text))` gives the text back.

# %% [markdown]
# Is its algorithm ours? Take *its* pieces and *our* idea: start with letters, always merge the neighbours whose piece was learned earliest. (Encoding can do without the rules: the list of pieces, in the order of learning, is enough.)


# %%
def encode_by_hand(text, sp):
    """Text to the ids of a SentencePiece model, by the rules of this lesson."""
    number = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    parts = list(text.replace(" ", "▁"))
    while True:
        pairs = [a + b for a, b in pairwise(parts)]
        known = [(number[pair], i) for i, pair in enumerate(pairs) if pair in number]
        if not known:
            break
        i = min(known)[1]  # learned earliest; on a tie the leftmost
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    ids = []
    for part in parts:
        spelled = [part] if part in number else [f"<0x{byte:02X}>" for byte in part.encode()]
        ids += [number[piece] for piece in spelled]
    return ids


letters = "catdogehursnl é🐱"
texts = captions[:50] + ["".join(rng.choices(letters, k=20)) for _ in range(200)]
assert all(encode_by_hand(text, sp) == sp.encode(text) for text in texts)
print(f"{len(texts)} texts, captions and nonsense: the same ids as SentencePiece")

# %% [markdown]
# ## The module
#
# PaliGemma took Gemma's 256,000 pieces and added 1,153 words of its own, at the end: **1024 places** `<loc0000>` … `<loc1023>`, **128 mask codes** `<seg000>` … `<seg127>`, and `<image>`, which stands where the picture's vectors go.

# %%
#| export
NUM_LOC, NUM_SEG = 1024, 128
ADDED = [f"<loc{i:04d}>" for i in range(NUM_LOC)] + [f"<seg{i:03d}>" for i in range(NUM_SEG)]
CONTROL = ("<image>", "<bos>", "<eos>", "<pad>")

# %%
blocks = [
    ("pad, eos, bos, unk", 0, 3, "muted"),
    ("pieces, bytes, line break", 4, 255_999, "language"),
    ("<loc0000> … <loc1023>", 256_000, 256_000 + NUM_LOC - 1, "accent"),
    ("<seg000> … <seg127>", 256_000 + NUM_LOC, 256_000 + len(ADDED) - 1, "together"),
    ("<image>", 256_000 + len(ADDED), 256_000 + len(ADDED), "vision"),
]
figure, ax = plt.subplots(figsize=(9, 1.3), layout="constrained")
for index, (name, first, last, colour) in enumerate(blocks):
    ax.add_patch(plt.Rectangle((index, 0), 0.96, 1, facecolor=COLOURS[colour]))
    ax.text(index + 0.48, 0.5, name.replace(", b", ",\nb"), color="white", ha="center", va="center")
    span = f"{first:,}" if first == last else f"{first:,} … {last:,}"
    ax.text(index + 0.48, -0.3, span, ha="center", va="center", fontsize=8)
ax.set(xlim=(0, len(blocks)), ylim=(-0.5, 1))
ax.set_axis_off()
save_figure(figure, "06_layout")

# %% [markdown]
# ### The plain form
#
# Our SentencePiece model ends before `<loc0000>`. So the new words get the ids that come next. `encode` cuts them out of the text first; SentencePiece sees only what lies between them.


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
        first = self.sp.get_piece_size()
        self.added = {token: first + i for i, token in enumerate(ADDED)}
        self.image_id = first + len(ADDED)
        self._spelled = {i: token for token, i in self.added.items()}
        self._split = re.compile("(" + "|".join(map(re.escape, self.added)) + ")")

    def encode(self, text: str) -> list[int]:
        """Text to ids, without bos or eos; a `ValueError` if it spells a control token."""
        ids = []
        for part in self._split.split(text):  # "<loc0001> cat" → "", "<loc0001>", " cat"
            ids += [self.added[part]] if part in self.added else self.sp.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text: undoes `encode`, for all texts without one certain character (exercise 3).

        Pad, bos, eos and `<image>` are left out; an id that no token has shows as `<unk:…>`.
        """
        text, run = [], []
        for i in map(int, ids):
            if i in self._spelled:
                text += [self.sp.decode(run), self._spelled[i]]
                run = []
            elif i < self.sp.get_piece_size() and not self.sp.is_control(i):
                run.append(i)
        return "".join([*text, self.sp.decode(run)])


# %%
def tokenizer_of(model_bytes):
    """A Tokenizer of the bytes of a model file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.model"
        file.write_bytes(model_bytes)
        return Tokenizer(file)


tokenizer = tokenizer_of(model_bytes)
for text in ("a cat", "<loc0100> a cat\n", "<seg007><loc1023>", "<loc1024>"):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    print(f"{text!r:20} {tokenizer.encode(text)}")

assert all(tokenizer.encode(text) == sp.encode(text) for text in texts)

# %% [markdown]
# `<loc1024>` does not exist, so it is ordinary text. What has no `<loc>` or `<seg>` goes through as in SentencePiece.
#
# ### Text is never a command
#
# A web page contains the letters `<eos>`. A tokenizer that obeys them makes *the* eos of them, and whoever asked for the page's text gets half of it:

# %%
page = "two cats<eos> and the dog"
first, rest = page.split("<eos>")
obeyed = [*tokenizer.encode(first), tokenizer.eos_id, *tokenizer.encode(rest)]
print(tokenizer.decode(obeyed[: obeyed.index(tokenizer.eos_id)]))

# %% [markdown]
# So `<image>`, `<bos>`, `<eos>` and `<pad>` in a text are refused. `<loc0100>` is fine: people ask about places. In the other direction, labels hold −100 for "not counted": no id, so an error. And an id that no token has must be *seen*.


# %%
#| export
@add_to_class(Tokenizer)
def encode(self, text: str) -> list[int]:
    """Text to ids, without bos or eos; a `ValueError` if it spells a control token."""
    check_text(text, CONTROL)
    ids = []
    for part in self._split.split(text):  # "<loc0001> cat" → "", "<loc0001>", " cat"
        ids += [self.added[part]] if part in self.added else self.sp.encode(part)
    return ids


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


# %%
for text in ("<image> a cat", "a cat<eos>", "\ud83d"):
    try:
        tokenizer.encode(text)
    except ValueError as error:
        print("✗", error)
print(tokenizer.decode([*tokenizer.encode("a cat"), tokenizer.eos_id, 257_200]))

# %% [markdown]
# ### Files of every release
#
# Some releases of `tokenizer.model` end with the `<loc>` and `<seg>` pieces, others lack them. And a fine-tune may add tokens of its own, in the rows that are left after `<image>`: other files list them. `place_tokens`, in [support/tokens.py](../paligemma/support/tokens.py), reads them all and refuses those that contradict one another.


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
def __len__(self) -> int:
    """V, how many ids there are, `<image>` and what a fine-tune added included."""
    return max(self.image_id, *self.added.values()) + 1


# %%
#| export
@add_to_class(Tokenizer)
@classmethod
def from_pretrained(cls, path: str | os.PathLike) -> "Tokenizer":
    """Read `tokenizer.model`, and what lists more tokens, from a checkpoint directory."""
    return cls(Path(path) / "tokenizer.model")


@add_to_class(Tokenizer)
def save_pretrained(self, path: str | os.PathLike) -> None:
    """Write `tokenizer.model` and the two files that list what it lacks; transformers reads
    them too. The directory is made when absent."""
    files = token_files(self.sp, self.added | {"<image>": self.image_id}, "<image>")
    with replacing(path) as draft:
        draft("tokenizer.model").write_bytes(self.sp.serialized_model_proto())
        for name, content in files.items():
            text = json.dumps(content, indent=2, ensure_ascii=False)
            draft(name).write_text(text + "\n", encoding="utf-8")


# %% [markdown]
# A fine-tune that answers with angles, read back after saving:

# %%
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "tokenizer.model"
    file.write_bytes(model_bytes)
    free = tokenizer.image_id + 1
    Path(folder, "added_tokens.json").write_text(json.dumps({"<angle90>": free}))
    tuned = Tokenizer.from_pretrained(folder)
    tuned.save_pretrained(Path(folder) / "saved")
    tuned = Tokenizer.from_pretrained(Path(folder) / "saved")
print(tuned.encode("a cat<angle90>"), tokenizer.encode("a cat<angle90>"))
assert tuned.encode("<angle90>") == [free] and tuned.decode([free]) == "<angle90>"
tokenizer = tokenizer_of(model_bytes)
print(len(tokenizer), "ids =", sp.get_piece_size(), "pieces +", len(ADDED), "+ <image>")

# %% [markdown]
# ## Against the reference
#
# The stored file holds a small SentencePiece model, some texts, and the ids that transformers' `GemmaTokenizer` gives for them. It reads the same `tokenizer.model`, but its code is another: BPE by the `tokenizers` library, with rules it derives from the pieces.

# %%
stored = load_file("reference/tokenizer.safetensors")
theirs = tokenizer_of(bytes(stored["model"].tolist()))
count = sum(name.startswith("text_") for name in stored)
for index in range(count):
    text = bytes(stored[f"text_{index}"].tolist()).decode()
    assert theirs.encode(text) == stored[f"ids_{index}"].tolist(), text
print(f"{count} texts, {sum(stored[f'ids_{i}'].numel() for i in range(count))} ids: 0 differ")

# %% [markdown]
# And the tokenizer of the model that ships with the course: are its ids those of this lesson's rules?

# %%
tiny = Tokenizer.from_pretrained(resources.files("paligemma") / "assets" / "tiny")
asked = ["caption en", "how many cats are there?", "detect cat ; dog", *captions[:20]]
assert all(encode_by_hand(text, tiny.sp) == tiny.encode(text) for text in asked)
print(asked[1], "→", tiny.encode(asked[1]))

# %% [markdown]
# ## See it
#
# A box as text. A box has four numbers: how far down and how far right its first corner lies, then the second. Each is a share of the height or the width; we give it one of 1024 steps, and each step is a *word*. ([Lesson 19](19_detection.ipynb) does it with care.)

# %%
cat = sample_picture("cat")
x0, y0, x1, y1 = box = (134, 84, 214, 152)
shares = (y0 / cat.height, x0 / cat.width, y1 / cat.height, x1 / cat.width)
answer = "".join(f"<loc{round(share * 1023):04d}>" for share in shares) + " cat eye"
print("answer:", answer)
print("ids:   ", tokenizer.encode(answer))

# %%
figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 2.6), width_ratios=[1, 2.1], layout="constrained"
)
left.imshow(draw_boxes(cat, [box], ["cat eye"]))
prompt = tokenizer.sp.encode("detect cat eye", out_type=str)
names = re.findall(r"<loc\d{4}>", answer)
end = tokenizer.sp.encode(" cat eye", out_type=str)
for y, label, row in (
    (0, "picture", ["<image>", "<image>", "<image>", "… ×256"]),
    (-1, "prompt", ["<bos>", *prompt, "\n"]),
    (-2, "answer", names),
    (-3, "", [*end, "<eos>"]),
):
    draw_tokens(right, y, row, label)
right.set(xlim=(-7, 40), ylim=(-3.6, 0.6))
for ax in (left, right):
    ax.set_axis_off()
save_figure(figure, "06_box")

# %% [markdown]
# **What to notice.** The model has no head for boxes, no regression, no anchors. To it `<loc0286>` is a word like `cat`. Detection becomes *writing*, and one loss trains all tasks. The price: nothing tells the model that 286 lies next to 287. It has to learn that from examples.

# %% [markdown]
# ### Who pays for the counting
#
# The pieces are learned from a corpus; so whose language is in it matters. "The bird sees the dog" in nine languages, with two tokenizers that may have 520 pieces each. One has seen English only (and runs out of pairs to merge before that), the other all nine.

# %%
three = {  # the cat sees the dog, the dog sees the bird, the bird sees the cat
    "English": "the cat sees the dog|the dog sees the bird|the bird sees the cat",
    "French": "le chat voit le chien|le chien voit l'oiseau|l'oiseau voit le chat",
    "Spanish": "el gato ve al perro|el perro ve al pájaro|el pájaro ve al gato",
    "German": "die Katze sieht den Hund|der Hund sieht den Vogel|der Vogel sieht die Katze",
    "Chinese": "猫看见狗|狗看见鸟|鸟看见猫",
    "Arabic": "القطة ترى الكلب|الكلب يرى الطائر|الطائر يرى القطة",
    "Greek": "η γάτα βλέπει τον σκύλο|ο σκύλος βλέπει το πουλί|το πουλί βλέπει τη γάτα",
    "Russian": "кошка видит собаку|собака видит птицу|птица видит кошку",
    "Hindi": "बिल्ली कुत्ते को देखती है|कुत्ता चिड़िया को देखता है|चिड़िया बिल्ली को देखती है",
}
unseen = {
    "English": "the bird sees the dog",
    "French": "l'oiseau voit le chien",
    "Spanish": "el pájaro ve al perro",
    "German": "der Vogel sieht den Hund",
    "Chinese": "鸟看见狗",
    "Arabic": "الطائر يرى الكلب",
    "Greek": "το πουλί βλέπει τον σκύλο",
    "Russian": "птица видит собаку",
    "Hindi": "चिड़िया कुत्ते को देखती है",
}

# %%
english = three["English"].split("|") * 200
everyone = "|".join(three.values()).split("|") * 20
counts = {}
for name, sentences in (("English only", english), ("all nine", everyone)):
    other = spm.SentencePieceProcessor(
        model_proto=train_sentencepiece(captions + sentences, 520, character_coverage=1.0)
    )
    counts[name] = [len(other.encode(text)) for text in unseen.values()]
    print(f"{name:13} {other.get_piece_size()} pieces", dict(zip(unseen, counts[name])))
english, hindi = counts["English only"][0], counts["English only"][-1]
assert hindi > 10 * english

# %%
figure, ax = plt.subplots(figsize=(9, 2.6), layout="constrained")
place = np.arange(len(unseen))
for shift, name, colour in ((-0.2, "English only", "bad"), (0.2, "all nine", "good")):
    bars = ax.bar(place + shift, counts[name], 0.38, label=name, color=COLOURS[colour])
    ax.bar_label(bars, fontsize=8)
ax.set_xticks(place, unseen)
ax.set_ylabel("tokens")
ax.legend(title="tokenizer trained on")
save_figure(figure, "06_languages")

# %% [markdown]
# **What to notice.** In this toy, which has seen English alone, the Hindi sentence costs more than ten times as much as the English one: in time, in money, in context. Real lists have seen many languages, and the gap is smaller, but it is there. Byte fallback makes every language *possible*, not equally cheap. Gemma's 256,000 pieces are a list for many languages; that is one reason why it is so long.

# %% [markdown]
# ## At full size
#
# 257,153 ids need a table with one row each, rounded up to a multiple of 64, which hardware likes. In PaliGemma 3B a row has 2048 numbers. On the meta device (shapes without memory):

# %%
with torch.device("meta"):
    table = torch.nn.Embedding(257_216, 2048)
count, whole = table.weight.numel(), 2_923_466_480
print(
    f"{count:,} parameters, {2 * count / 1e9:.2f} GB in bfloat16, {count / whole:.0%} of the model"
)
print(f"of them <loc> and <seg>: {len(ADDED) * 2048:,} ({len(ADDED) / 257_216:.2%} of the table)")
print(f"rows that no id uses: {257_216 - 257_153}")
print(
    f"looking up one token: 0 FLOPs; scoring all words for one token: {2 * count / 1e9:.2f} GFLOPs"
)

# %% [markdown]
# Nearly a fifth of all parameters is this one table. It is used twice, to read and (transposed) to write. Reading copies a row. Writing multiplies with *all* rows, for each new token. All places and mask codes together are half a per cent of it: a cheap way to teach a language model geometry.
#
# And the tokenizer itself, here:

# %% tags=["nbval-ignore-output"]
many = captions * 50
start = time.perf_counter()
total = sum(len(tokenizer.encode(text)) for text in many)
seconds = time.perf_counter() - start
print(
    f"{total:,} tokens in {1000 * seconds:.0f} ms: {total / seconds / 1e6:.1f} million tokens a second"
)

# %% [markdown]
# The 3B model writes a few tokens a second on such a machine. The tokenizer is never the bottleneck; it can only be *wrong*.

# %% [markdown]
# ## A bug people really make
#
# Three colleagues build the prompt themselves. Ours is: bos, the prompt's pieces, line break. (Like Gemma's list, this one has a piece for two line breaks in a row.) They check by decoding, and strip the line break at the end. All four look perfect:

# %%
prompts = [f"{task} {language}" for task in ("caption", "describe") for language in ("en", "de")]
file = train_sentencepiece(captions + prompts * 50, 400, user_defined_symbols=["\n", "\n\n"])
t = tokenizer_of(file)
ours = lambda text: [t.bos_id, *t.encode(text), t.newline_id]
builders = {
    "ours": ours,
    "A": lambda text: [t.bos_id, *t.sp.encode(text, add_bos=True), t.newline_id],
    "B": lambda text: [t.bos_id, *t.encode(" " + text), t.newline_id],  # "<image> caption en"
    "C": lambda text: [t.bos_id, *t.encode(text + "\n" + "\n")],  # text came from a file
}
for name, build in builders.items():
    print(f"{name:5} {t.decode(build('caption en')).strip()}")
assert {t.decode(build("caption en")).strip() for build in builders.values()} == {"caption en"}

# %% [markdown]
# Then the complaints come: "answers got worse after the refactoring", "sometimes it answers with another question". Let us build the smallest language model there is: a table of **which token followed which** in training. How much of each prompt has it ever seen?

# %%
seen = Counter()
for prompt, caption in zip(prompts * 100, captions):
    ids = [*ours(prompt), *t.encode(caption), t.eos_id]
    seen.update(pairwise(ids))
spell = lambda i: t.sp.id_to_piece(i).replace("\n", "↵")
for name, build in builders.items():
    ids = build("caption en")
    new = [f"{spell(a)} → {spell(b)}" for a, b in pairwise(ids) if (a, b) not in seen]
    print(f"{name:5} never seen: {len(new)}  {', '.join(new)}")

# %% [markdown]
# **A**, double bos: the library adds one, the code another. **B**: one space between image and prompt puts a token there that training never had in this place. **C**: two line breaks became *one other* token, and the sign "now answer" never came.
#
# A large model does not crash on what it never saw. It guesses. `decode` hides the first, since it drops bos; `strip` hid the other two. Look at ids:


# %%
def problems(ids, t):
    """What is wrong with the ids of a prompt (without the image tokens)."""
    found = []
    if ids.count(t.bos_id) != 1 or ids[0] != t.bos_id:
        found.append(f"{ids.count(t.bos_id)} × bos")
    if t.sp.id_to_piece(ids[1]).startswith("▁"):
        found.append("space before the prompt")
    if ids[-1] != t.newline_id:
        found.append(f"ends with {spell(ids[-1])}, not with {spell(t.newline_id)}")
    return found


for name, build in builders.items():
    print(f"{name:5} {problems(build('caption en'), t) or 'no problem'}")

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): how many tokens?
#
# Without running it: how many ids does `tokenizer` give for **(a)** `"<loc0512><loc0512>"`, **(b)** `"2024"`, **(c)** `"ü"`, **(d)** `"🐱🐱"`? Neither `ü` nor the cat is in its corpus, and no `0` or `4`.

# %% tags=["exercise"]
answer = None  # your answer: four numbers


# %% tags=["check"]
def test_1(answer):
    assert answer is not None and len(answer) == 4, "give four numbers: (a, b, c, d)"
    texts = ("<loc0512><loc0512>", "2024", "ü", "🐱🐱")
    for letter, text, number in zip("abcd", texts, answer):
        assert number == len(tokenizer.encode(text)), f"({letter}) is another number"


check(test_1, answer)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A `<loc>` is a word. Digits stand alone; those without a piece are one byte each in UTF-8. How many bytes has `ü`, how many an emoji?
#
# </details>

# %% tags=["solution"]
answer = (2, 4, 2, 8)
check(test_1, answer)

# %% [markdown]
# ### Exercise 2 (fill in): byte fallback
#
# Write the safety net. `known` is a set of letters that have a piece. Return the list of pieces for a text: the letter itself where it is known, else one piece `<0xHH>` for each of its UTF-8 bytes (two capital hex digits). A space is written `▁`.


# %% tags=["exercise"]
def spell_out(text, known):
    return None  # your answer: a list of strings


# %% tags=["check"]
def test_2(spell_out):
    for text, known, right in (
        ("cat", set("cat"), ["c", "a", "t"]),
        ("a b", set("a▁"), ["a", "▁", "<0x62>"]),
        ("é", set("e"), ["<0xC3>", "<0xA9>"]),
        ("a🐱\n", set("a"), ["a", "<0xF0>", "<0x9F>", "<0x90>", "<0xB1>", "<0x0A>"]),
        ("", set(), []),
    ):
        found = spell_out(text, known)
        assert found is not None, "spell_out returns None"
        assert list(found) == right, f"{text!r}: got {list(found)}"


check(test_2, spell_out)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `"é".encode()` gives bytes, and bytes give numbers when you loop over them. `f"{10:02X}"` is `0A`.
#
# </details>


# %% tags=["solution"]
def spell_out(text, known):
    pieces = []
    for letter in text.replace(" ", "▁"):
        if letter in known:
            pieces.append(letter)
        else:
            pieces += [f"<0x{byte:02X}>" for byte in letter.encode()]
    return pieces


check(test_2, spell_out)

# %% [markdown]
# ### Exercise 3 (break): the text that does not come back
#
# We said that `decode(encode(text))` is the text. Find a text without control tokens for which it is *not*. There is essentially one way, and it has to do with how spaces are written.

# %% tags=["exercise"]
broken = None  # your answer: a string


# %% tags=["check"]
def test_3(broken):
    assert isinstance(broken, str), "give a string"
    back = tokenizer.decode(tokenizer.encode(broken))
    assert back != broken, f"it came back unchanged: {back!r}"


check(test_3, broken)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The sign for a space is a character too (U+2581). What if the user types it?
#
# </details>

# %% tags=["solution"]
broken = "low ▁▁ bars"  # such bars are drawn with this character
check(test_3, broken)

# %% [markdown]
# ## Summary
#
# - Tokens are strings that were frequent in a corpus. Nobody designed them, and they are not words.
# - Rare things are spelled from parts, in the end from bytes: nothing is unknown, but some languages pay more.
# - PaliGemma writes boxes and masks with 1152 extra *words*; detection is text.
# - Line break, bos and spaces are tokens too. Check ids, never the decoded text.

# %% [markdown]
# ## Quiz
#
# **1.** Why is `"cat"` another id than `" cat"`, and which one follows `"a"` in a sentence?
#
# <details><summary>Answer</summary>
#
# The space belongs to the piece: `▁cat`. Inside a sentence it is nearly always this one; `cat` without it stands at the start of a text or inside a word. They are two rows of the table and learn separately.
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
# **3.** Why may a prompt contain `<loc0100>` but not `<eos>`?
#
# <details><summary>Answer</summary>
#
# A place is content: "what is at …?" is a question. `<eos>`, `<bos>`, `<image>` and `<pad>` are structure that only the program sets. If text could make them, text could change what the program does: the same mistake as SQL injection.
#
# </details>

# %% [markdown]
# ## References
#
# - Sennrich, Haddow, Birch 2016, *Neural Machine Translation of Rare Words with Subword Units*: BPE for text.
# - Kudo and Richardson 2018, *SentencePiece*; its options are in `trainer_spec` of `sentencepiece_model.proto`.
# - Chen et al. 2022, *Pix2Seq*: boxes as words.
# - Petrov et al. 2023, *Language Model Tokenizers Introduce Unfairness Between Languages*.
# - Beyer et al. 2024, *PaliGemma*, section 3.2; `GemmaTokenizer` in transformers.

# %% [markdown] tags=["navigation"]
# [← SigLIP](05_siglip.ipynb) | [contents](00_overview.ipynb) | [RMSNorm →](07_rms_norm.ipynb)
