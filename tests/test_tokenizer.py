"""Text to ids and back: against sentencepiece and transformers, and every kind of wrong input."""

import io
import struct

import pytest
import sentencepiece as spm
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paligemma.tokenizer import ADDED, NUM_LOC, NUM_SEG, Tokenizer

TEXTS = [
    "",
    "cat",
    " cat",
    "caption en",
    "detect cat ; dog",
    "how many cats are there?",
    "two  cats,   three dogs",
    "12 cats and 2024 dogs",
    "Zebra ZEBRA zebra",
    "café für drei",
    "🐱 and 犬",
    "tab\there",
    "line\nbreak\n",
    "catdogcatdog",
]
CONTROL = ("<image>", "<bos>", "<eos>", "<pad>")


def train(sentences=None, **options) -> bytes:
    """The bytes of a small tokenizer.model with the settings of the published one."""
    words = "cat dog bee caption detect segment answer en how many are there is a the two".split()
    sentences = sentences or [" ".join(words[i:] + words[:i]) for i in range(len(words))] * 20
    out = io.BytesIO()
    given = {
        "model_type": "bpe",
        "vocab_size": 360,
        "byte_fallback": True,
        "split_digits": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "user_defined_symbols": ["\n"],
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "pad_piece": "<pad>",
        "eos_piece": "<eos>",
        "bos_piece": "<bos>",
        "hard_vocab_limit": False,
        "num_threads": 1,
        "minloglevel": 2,
    }
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=out, **(given | options)
    )
    return out.getvalue()


def with_pieces(model: bytes, pieces) -> bytes:
    """Append user-defined pieces, as the published file has them: a protobuf message each."""
    for piece in pieces:
        text = piece.encode()
        body = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", 0) + b"\x18\x04"
        model += b"\x0a" + bytes([len(body)]) + body
    return model


def as_bytes(text) -> torch.Tensor:
    data = text.encode() if isinstance(text, str) else text
    return torch.tensor(list(data), dtype=torch.uint8)


def transformers_tokenizer(folder):
    from transformers import GemmaTokenizer

    return GemmaTokenizer.from_pretrained(str(folder))


def reference() -> dict[str, torch.Tensor]:
    """A small model file, texts, and the ids that transformers' GemmaTokenizer gives."""
    import tempfile
    from pathlib import Path

    tensors = {"model": as_bytes(train())}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(train())
        theirs = transformers_tokenizer(folder)
        for index, text in enumerate(TEXTS[1:]):
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            tensors[f"text_{index}"] = as_bytes(text)
            tensors[f"ids_{index}"] = torch.tensor(ids)
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(train())
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A tokenizer whose file ends with the loc and seg pieces."""
    file = tmp_path_factory.mktemp("complete") / "tokenizer.model"
    file.write_bytes(with_pieces(train(), ADDED))
    return Tokenizer(file)


# Any text, with what matters mixed in more often than by chance.
loose = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
special = st.sampled_from(
    [
        "\n",
        " ",
        "cat",
        "▁",
        "<loc0000>",
        "<loc1023>",
        "<seg127>",
        "<loc1024>",
        "<seg",
        "<unk>",
        "🐱",
    ]
    + ["<0x41>", "<s>", "</s>", "<loc0٠٠١>"]
)
texts = st.lists(loose | special, max_size=8).map("".join)
texts = texts.filter(lambda text: not any(control in text for control in CONTROL))


# ---------------------------------------------------------------- against others


@settings(deadline=None, max_examples=200)
@given(text=texts)
@example(text="cat\n\ndog")
def test_agrees_with_sentencepiece(tokenizer, complete, text):
    """With the loc and seg pieces in the file, sentencepiece alone gives the same ids."""
    ids = tokenizer.encode(text)
    assert ids == complete.encode(text) == complete.sp.encode(text)
    assert tokenizer.decode(ids) == complete.decode(ids) == complete.sp.decode(ids)


words = st.lists(
    st.sampled_from("cat cats dog bee zebra 12 3 é 🐱 犬 a the capt".split()), max_size=6
)


@settings(deadline=None, max_examples=100)
@given(text=st.builds(lambda w, gap: gap.join(w), words, st.sampled_from([" ", "", "  ", "\n"])))
def test_agrees_with_transformers(folder, tokenizer, text):
    theirs = transformers_tokenizer_once(folder)
    assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


_made = {}


def transformers_tokenizer_once(folder):
    if folder not in _made:
        _made[folder] = transformers_tokenizer(folder)
    return _made[folder]


@pytest.mark.parametrize("text", TEXTS)
def test_chosen_texts_agree_with_transformers(folder, tokenizer, text):
    theirs = transformers_tokenizer_once(folder)
    assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


def test_ids_of_added_tokens_agree_with_transformers(folder, tokenizer):
    """As PaliGemmaProcessor does: loc and seg, and <image>, go to the end of the list."""
    theirs = transformers_tokenizer(folder)
    theirs.add_tokens(ADDED)
    size = tokenizer.sp.get_piece_size()
    # GemmaTokenizer adds <mask>-like pieces that this file lacks; the order is what counts.
    shift = theirs.convert_tokens_to_ids(ADDED[0]) - size
    for piece in (ADDED[0], ADDED[5], ADDED[NUM_LOC], ADDED[-1]):
        assert theirs.convert_tokens_to_ids(piece) - shift == tokenizer.encode(piece)[0]


# ---------------------------------------------------------------- there and back


@settings(deadline=None, max_examples=300)
@given(text=texts)
@example(text="\0")
@example(text="﻿ \u00a0\u3000 e\u0301 ﬁ \r\n")
@example(text="<loc0001> cat <seg001>dog<loc0002>")
def test_text_comes_back(tokenizer, text):
    """For every text; only U+2581, which is how SentencePiece writes a space, becomes a space."""
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.image_id for i in ids)
    assert not {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, 3} & set(ids)
    assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_low_line_becomes_a_space(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a▁b")) == "a b"


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 3000), max_size=20))
def test_any_ids_decode(tokenizer, ids):
    assert isinstance(tokenizer.decode(ids), str)
    assert tokenizer.decode(torch.tensor(ids, dtype=torch.int64)) == tokenizer.decode(ids)


def test_unfinished_bytes_become_a_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("🐱")[:2]) in ("\ufffd", "\ufffd\ufffd")


def test_control_and_unknown_ids_are_left_out(tokenizer):
    cat = tokenizer.encode("cat")
    t = tokenizer
    ids = [t.pad_id, t.bos_id, *cat, t.image_id, t.eos_id, len(t), 257_215]
    assert t.decode(ids) == "cat"
    assert t.decode([]) == ""
    first, *rest = t.encode("🐱")  # nor do they part the bytes of a character
    assert t.decode([first, t.pad_id, *rest]) == "🐱"


def test_digits_stand_alone(tokenizer):
    assert len(tokenizer.encode("2024")) == 4


def test_line_break_is_its_own_piece(tokenizer):
    """Also next to a word: the prompt ends with it, tokenised apart or not."""
    t = tokenizer
    assert t.encode("\n") == [t.newline_id] == [t.sp.piece_to_id("\n")]
    for text in ("cat", "caption en", "<loc0001>"):
        assert t.encode(text + "\n") == [*t.encode(text), t.newline_id]


# ---------------------------------------------------------------- loc, seg, image


def test_names_of_added_tokens():
    assert len(ADDED) == NUM_LOC + NUM_SEG == len(set(ADDED)) == 1152
    assert (ADDED[0], ADDED[1023]) == ("<loc0000>", "<loc1023>")
    assert (ADDED[1024], ADDED[-1]) == ("<seg000>", "<seg127>")


@pytest.mark.parametrize("which", ["tokenizer", "complete"])
def test_layout(request, tokenizer, which):
    """The same ids, whether the file has the loc and seg pieces or not."""
    t, size = request.getfixturevalue(which), tokenizer.sp.get_piece_size()
    assert [t.encode(piece) for piece in ADDED] == [[size + i] for i in range(1152)]
    assert t.image_id == size + 1152 and len(t) == size + 1153
    assert [t.decode([size + i]) for i in range(1152)] == ADDED
    assert (t.pad_id, t.eos_id, t.bos_id) == (0, 1, 2)


@pytest.mark.parametrize(
    "text",
    ["<loc1024>", "<loc9999>", "<loc001>", "<loc00001>", "<LOC0001>", "<loc 0001>", "loc0001"]
    + ["<seg128>", "<seg0000>", "<seg12>", "<loc0001", "<loc0٠٠١>", "<seg0٠١>"],
)
def test_near_misses_are_plain_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert len(ids) > 1 and max(ids) < tokenizer.sp.get_piece_size()
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["<loc1024>;", "<loc9999>;", "<seg128>;", "<loc0٠٠١>;"])
def test_near_misses_do_not_split_the_text(tmp_path, text):
    """Pieces such as ">;" may cross the end of what only looks like a place."""
    file = tmp_path / "tokenizer.model"
    file.write_bytes(train(sentences=["x>; y>; z>;"] * 20))
    t = Tokenizer(file)
    assert t.sp.piece_to_id(">;") != t.sp.unk_id()
    assert t.encode(text) == t.sp.encode(text)
    assert t.sp.id_to_piece(t.encode(text)[-1]) == ">;"


def test_spaces_around_places_are_kept(tokenizer):
    for text in ("<loc0001> cat", "<loc0001>cat", " <loc0001> ; <seg001> ", "cat <loc0001>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    cat = tokenizer.encode(" cat")
    assert tokenizer.encode("<loc0001> cat")[1:] == cat != tokenizer.encode("cat")


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("control", CONTROL)
def test_control_tokens_in_text_are_refused(tokenizer, control):
    for text in (control, f"a {control} cat", f"<loc0001>{control}"):
        with pytest.raises(ValueError, match=f"contains '{control}', which only the processor"):
            tokenizer.encode(text)
    tokenizer.encode(control.upper())
    tokenizer.encode(control[:-1])


@pytest.mark.parametrize("text", [None, b"cat", 7, ["cat"]])
def test_text_must_be_a_string(tokenizer, text):
    with pytest.raises(ValueError, match=f"the text is {type(text).__name__}; expected a string"):
        tokenizer.encode(text)


@pytest.mark.parametrize("text", ["ab\ud800", "\udc80", "\ud83d cat"])
def test_half_characters_are_refused(tokenizer, text):
    place = next(i for i, letter in enumerate(text) if "\ud800" <= letter <= "\udfff")
    with pytest.raises(ValueError, match=f"character {place} .*half of a surrogate pair"):
        tokenizer.encode(text)


def test_negative_ids_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"id -100 is negative; drop the -100 of labels"):
        tokenizer.decode([5, -100])


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer at .*needs its tokenizer.model"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer at"):
        Tokenizer(tmp_path)  # a directory
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"there is a tokenizer.json, but .*of the base model"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no model", b"{}", b"\0" * 100])
def test_files_that_are_no_models(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a SentencePiece model|lacks a <pad>"):
        Tokenizer.from_pretrained(tmp_path)


def test_truncated_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train()[:-700])
    with pytest.raises(ValueError, match=r"is not a SentencePiece model|lacks a <pad>"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("missing", ["pad_id", "eos_id", "bos_id"])
def test_control_pieces_are_needed(tmp_path, missing):
    (tmp_path / "tokenizer.model").write_bytes(train(**{missing: -1}))
    with pytest.raises(ValueError, match="lacks a <pad>, <eos> or <bos> piece"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "pieces",
    [ADDED[:-1], ADDED[1:], ADDED[::-1], [*ADDED[NUM_LOC:], *ADDED[:NUM_LOC]], ["<seg005>"]],
    ids=["one short", "first missing", "backwards", "seg first", "one alone"],
)
def test_a_file_with_some_of_the_pieces_is_refused(tmp_path, pieces):
    (tmp_path / "tokenizer.model").write_bytes(with_pieces(train(), pieces))
    with pytest.raises(ValueError, match="some <loc> and <seg> pieces, but not all 1152 in order"):
        Tokenizer.from_pretrained(tmp_path)


def test_pieces_elsewhere_than_at_the_end(tmp_path):
    """Ids come from the file where the file has them."""
    (tmp_path / "tokenizer.model").write_bytes(with_pieces(train(), [*ADDED, "<extra>"]))
    t = Tokenizer.from_pretrained(tmp_path)
    size = t.sp.get_piece_size()
    assert t.encode("<loc0000>") == [size - 1153]
    assert t.encode("<extra>") == [size - 1]
    assert t.image_id == size
