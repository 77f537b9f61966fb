"""Text to ids and back: against sentencepiece and transformers, and every kind of wrong input."""

import io
import json
import os
import shutil
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


def test_control_ids_are_left_out_and_unknown_ones_seen(tokenizer):
    cat = tokenizer.encode("cat")
    t = tokenizer
    ids = [t.pad_id, t.bos_id, *cat, t.image_id, t.eos_id, len(t), 257_215]
    assert t.decode(ids) == f"cat<unk:{len(t)}><unk:257215>", "what no token has is seen"
    assert t.decode(ids[:-2]) == "cat"
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
    with pytest.raises(ValueError, match=r"is a tokenizer.json, but .*of the base model: copy it"):
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


# ---------------------------------------------------------------- tokens that a fine-tune added


EXTRA = ["<angle000>", "<angle001>", "my token", "▁x"]
ADDED_TEXTS = [
    "<angle000>",
    "turn <angle001> left <angle000><angle000>",
    "cat my token dog",
    "cat my  token dog",
    "<loc0001><angle000> <seg007>my token<loc0002>",
    "<angle00> <angle0000>",
]


def their_tokenizer(folder, extra, **special):
    """transformers' tokenizer over the file in `folder`, with loc, seg, <image> and `extra`."""
    from transformers import GemmaTokenizer

    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos")}
    theirs = GemmaTokenizer.from_pretrained(str(folder), mask_token=None, **names, **special)
    theirs.add_tokens(ADDED)
    theirs.add_tokens(["<image>"], special_tokens=True)
    theirs.add_tokens(extra)
    return theirs


def write_lists(folder, tokens, which):
    """The files in which releases of transformers list added tokens."""
    entries = {str(i): {"content": token, "special": False} for token, i in tokens.items()}
    if which in ("added_tokens.json", "all"):
        (folder / "added_tokens.json").write_text(json.dumps(tokens))
    if which in ("tokenizer_config.json", "all"):
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entries}))
    if which in ("tokenizer.json", "all"):
        listed = [{"id": int(i), **entry} for i, entry in entries.items()]
        document = {"version": "1.0", "added_tokens": listed, "model": {"vocab": {"a": 1}}}
        (folder / "tokenizer.json").write_text(json.dumps(document))


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copy(folder / "tokenizer.model", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "which", ["added_tokens.json", "tokenizer_config.json", "tokenizer.json", "all"]
)
def test_added_tokens_are_read_spelled_and_kept(copy, tokenizer, which):
    first = len(tokenizer)
    write_lists(
        copy, {"<image>": tokenizer.image_id, **{t: first + i for i, t in enumerate(EXTRA)}}, which
    )
    t = Tokenizer.from_pretrained(copy)
    assert t.image_id == tokenizer.image_id and len(t) == first + len(EXTRA)
    for i, token in enumerate(EXTRA):
        assert t.encode(token) == [first + i] and t.decode([first + i]) == token
        assert t.encode(f"cat{token}dog") == [*t.encode("cat"), first + i, *t.encode("dog")]
    t.save_pretrained(copy / "again")
    again = Tokenizer.from_pretrained(copy / "again")
    assert (again.added, again.image_id, len(again)) == (t.added, t.image_id, len(t))
    assert (copy / "again" / "tokenizer.model").read_bytes() == train()


def test_without_added_tokens_their_spelling_is_text(tokenizer):
    assert len(tokenizer.encode("<angle000>")) > 1


@pytest.mark.parametrize("text", [*ADDED_TEXTS, *TEXTS])
def test_added_tokens_agree_with_transformers(copy, text):
    """What transformers writes, we read; the ids are equal."""
    theirs = their_tokenizer_once(copy)
    assert ours_of_theirs(copy).encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


_saved = {}


def their_tokenizer_once(folder):
    if "theirs" not in _saved:
        _saved["theirs"] = their_tokenizer(folder, EXTRA[:3])
    return _saved["theirs"]


def ours_of_theirs(folder):
    their_tokenizer_once(folder).save_pretrained(str(folder))  # tokenizer.json alone
    assert not (folder / "added_tokens.json").exists()
    return Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("which", ["tokenizer", "complete"])
def test_transformers_reads_what_we_write(copy, request, which):
    from transformers import AutoTokenizer

    plain = request.getfixturevalue(which)
    first = len(plain)
    (copy / "tokenizer.model").write_bytes(plain.sp.serialized_model_proto())
    write_lists(copy, {token: first + i for i, token in enumerate(EXTRA[:3])}, "added_tokens.json")
    ours = Tokenizer.from_pretrained(copy)
    ours.save_pretrained(copy / "again")
    theirs = AutoTokenizer.from_pretrained(str(copy / "again"))
    assert theirs.convert_tokens_to_ids("<image>") == ours.image_id
    assert len(theirs) == len(ours)
    assert theirs.decode([ours.image_id, first], skip_special_tokens=True) == EXTRA[0]
    for text in (*ADDED_TEXTS, *TEXTS):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text), text


def test_image_and_places_where_the_files_put_them(copy, tokenizer):
    """transformers, given a file without loc and seg, adds <image> first."""
    size = tokenizer.sp.get_piece_size()
    tokens = {"<image>": size, **{token: size + 1 + i for i, token in enumerate(ADDED)}}
    write_lists(copy, tokens, "added_tokens.json")
    t = Tokenizer.from_pretrained(copy)
    assert t.image_id == size and t.encode("<loc0000>") == [size + 1] and len(t) == size + 1153


def test_listed_pieces_of_the_file_are_no_news(copy, tokenizer):
    """The published tokenizer_config.json lists hundreds that the file has as well."""
    listed = {tokenizer.sp.id_to_piece(i): i for i in (0, 1, 2, 3, 4, 300)}
    write_lists(copy, listed, "all")
    assert Tokenizer.from_pretrained(copy).added == tokenizer.added


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ({"<a>": 300}, r"say that '<a>' is token 300, but that is '.*' in it; keep"),
        ({"▁cat": 5000}, r"say that '▁cat' is token 5000, but that is token \d+ in it"),
        ({"<bos>": 7}, r"say that '<bos>' is token 7, but that is '<0x02>' in it"),
        ({"<a>": "IMAGE"}, r"'<a>' and '<image>' are both token"),
        ({"<a>": 0}, r"say that '<a>' is token 0, but that is '<pad>'"),
        ({"<loc0000>": 5000}, "list some <loc> and <seg>, but not all"),
        ({"<a>": -1}, r"token '<a>' has id -1; expected a string and a whole number"),
        ({"<a>": 1.5}, r"has id 1.5"),
        ({"<a>": True}, r"has id True"),
        ({"": 5000}, r"token '' has id 5000"),
        ({"<a>": 5000, "<b>": 5000}, r"token 5000 is '<b>', in added_tokens.json it is '<a>'"),
    ],
)
def test_files_that_contradict_one_another(copy, tokenizer, tokens, words):
    tokens = {t: tokenizer.image_id if i == "IMAGE" else i for t, i in tokens.items()}
    write_lists(copy, tokens, "added_tokens.json")
    with pytest.raises(ValueError, match=words) as caught:
        Tokenizer.from_pretrained(copy)
    assert "\n" not in str(caught.value)


def test_control_pieces_of_another_name(sentencepiece_file, tmp_path):
    """The file calls bos <s>; a list that adds a second bos belongs to another file."""
    shutil.copy(sentencepiece_file, tmp_path / "tokenizer.model")
    Tokenizer.from_pretrained(tmp_path)
    write_lists(tmp_path, {"<bos>": 5000}, "added_tokens.json")
    with pytest.raises(ValueError, match="'<bos>' is token 5000, but that is no piece of it"):
        Tokenizer.from_pretrained(tmp_path)


def test_two_lists_that_disagree(copy):
    write_lists(copy, {"<a>": 5000}, "added_tokens.json")
    write_lists(copy, {"<a>": 5001}, "tokenizer.json")
    with pytest.raises(
        ValueError, match=r"tokenizer.json: '<a>' is token 5001, in added_tok.* 5000"
    ):
        Tokenizer.from_pretrained(copy)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_tokens_that_swallow_spaces_are_refused(copy, tokenizer, flag):
    own = {"content": tokenizer.sp.id_to_piece(300), flag: True}  # SentencePiece has it: no matter
    config: dict = {"added_tokens_decoder": {"300": own}}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_pretrained(copy).added == tokenizer.added
    config["added_tokens_decoder"]["5000"] = {"content": "<a>", flag: True}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the added token '<a>' asks for lstrip, rstrip or single"):
        Tokenizer.from_pretrained(copy)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("added_tokens.json", "{", "is not JSON"),
        ("added_tokens.json", "[]", "expected a JSON object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', None),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "expected an object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "<a>"}}}', "id 'x'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5000": "<a>"}}', "expected an obj"),
        ("tokenizer_config.json", "{}", None),
        ("tokenizer.json", "nope", "is not JSON"),
        ("tokenizer.json", '{"added_tokens": {"a": 1}}', "expected a list"),
        ("tokenizer.json", '{"added_tokens": [1]}', "an added token is 1; expected an object"),
        ("tokenizer.json", '{"added_tokens": [{"content": "<a>"}]}', "has id None"),
        ("tokenizer.json", '{"added_tokens": [', "is not JSON"),
        ("tokenizer.json", '{"model": {"added_tokens": 7}, "added_tokens": null}', None),
    ],
)
def test_broken_lists(copy, name, text, words):
    (copy / name).write_text(text)
    if words is None:
        Tokenizer.from_pretrained(copy)
        return
    with pytest.raises(ValueError, match=words) as caught:
        Tokenizer.from_pretrained(copy)
    assert name in str(caught.value), "the message names the file"


def test_saving_writes_all_files_or_none(copy, tokenizer, monkeypatch):
    tokenizer.save_pretrained(copy / "new")
    names = {"tokenizer.model", "added_tokens.json", "tokenizer_config.json"}
    assert {file.name for file in (copy / "new").iterdir()} == names
    monkeypatch.setattr(json, "dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tokenizer.save_pretrained(copy / "other")
    assert not os.listdir(copy / "other")
