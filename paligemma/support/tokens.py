"""The tokenizer's files: SentencePiece's own, and the lists of tokens that others added."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from paligemma.support.files import check_path, read_json, shorten, spell_path


def open_sentencepiece(file: str | os.PathLike) -> SentencePieceProcessor:
    """Open a `tokenizer.model` that has the control pieces PaliGemma needs.

    Raises:
        ValueError: no such file, another kind of file, or no <pad>, <eos> or <bos> in it.
    """
    check_path(file)
    if not os.path.isfile(file):
        hint = "a checkpoint directory needs its tokenizer.model"
        if (Path(file).parent / "tokenizer.json").is_file():
            hint = (
                "there is a tokenizer.json, but this reads the tokenizer.model of the base model: "
                "copy it there"
            )
        raise ValueError(f"no tokenizer at {spell_path(file)}; {hint}")
    try:
        sp = SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError):
        raise ValueError(
            f"{file} is not a SentencePiece model; expected the published tokenizer.model"
        ) from None
    if -1 in (sp.pad_id(), sp.eos_id(), sp.bos_id()):
        raise ValueError(f"{file} lacks a <pad>, <eos> or <bos> piece; PaliGemma needs all")
    return sp


def check_text(text: Any, forbidden: Sequence[str]) -> None:
    """A text that a user may say.

    Raises:
        ValueError: no string, not valid Unicode, or it spells one of the `forbidden` tokens.
    """
    if not isinstance(text, str):
        raise ValueError(f"the text is {type(text).__name__}; expected a string")
    for token in forbidden:
        if token in text:
            raise ValueError(
                f"the text contains {token!r}, which only the processor may place; "
                "remove it or write it differently"
            )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text is half of a surrogate pair; "
            "expected valid Unicode: read or decode the text as UTF-8"
        ) from None


def encode_within(tokenizer: Any, text: str, room: int) -> list[int]:
    """What a `Tokenizer` makes of a text, at most `room` ids; of a megabyte it makes none.

    Raises:
        ValueError: no text, one that spells a control token, or one that is too long.
    """
    if isinstance(text, str) and len(text) > room:
        pieces = tokenizer.sp.id_to_piece(list(range(tokenizer.sp.get_piece_size())))
        longest = max(map(len, [*pieces, *tokenizer.added]))
        if len(text) > room * longest:
            raise ValueError(
                f"the text has {len(text)} characters; the model reads {max(room, 0)} tokens "
                "beside its pictures: shorten it"
            )
    ids = tokenizer.encode(text)
    if len(ids) > room:
        raise ValueError(
            f"the text has {len(ids)} tokens; the model reads {max(room, 0)} beside its pictures: "
            "shorten it"
        )
    return ids


# ---------------------------------------------------------------- added tokens

KEEP = "keep the files that belong to the weights"
CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>")
STRIP = ("lstrip", "rstrip", "single_word")  # flags that would change the text beside a token


def read_added_tokens(folder: str | os.PathLike) -> tuple[dict[str, int], set[str]]:
    """The tokens that the files beside a `tokenizer.model` list.

    A fine-tune may add tokens of its own, in the rows of the embedding that the base left free.
    Releases of transformers write them to `added_tokens.json`, to `tokenizer_config.json` or to
    `tokenizer.json`; all that are there are read, and have to agree.

    Returns:
        {token: id}, and those tokens that are to swallow the spaces beside them.

    Raises:
        ValueError: a broken file, or files that contradict one another.
    """
    found: dict[str, int] = {}
    names: dict[int, str] = {}
    origin: dict[str, str] = {}
    stripping = set()
    for name, read in READERS.items():
        file = Path(folder) / name
        for token, number, strips in read(file) if file.is_file() else ():
            whole = isinstance(number, int) and not isinstance(number, bool) and number >= 0
            if not isinstance(token, str) or not token or not whole:
                raise ValueError(
                    f"{file}: token {shorten(token)} has id {shorten(number)}; expected a string "
                    "and a whole number"
                )
            other = names.setdefault(number, token)
            if other != token:
                raise ValueError(
                    f"{file}: token {number} is {shorten(token)}, in {origin[other]} it is "
                    f"{shorten(other)}; {KEEP}"
                )
            if found.setdefault(token, number) != number:
                raise ValueError(
                    f"{file}: {shorten(token)} is token {number}, in {origin[token]} it is "
                    f"{found[token]}; {KEEP}"
                )
            origin.setdefault(token, name)
            stripping |= {token} if strips else set()
    return found, stripping


Entry = tuple[Any, Any, bool]  # what a file says: the token, its id, does it swallow spaces


def _from_added_tokens(file: Path) -> list[Entry]:
    """{"<image>": 257152, …}"""
    return [(token, number, False) for token, number in dict(read_json(file, dict)).items()]


def _from_tokenizer_config(file: Path) -> list[Entry]:
    """{"added_tokens_decoder": {"257152": {"content": "<image>", …}, …}, …}"""
    listed = dict(read_json(file, dict)).get("added_tokens_decoder") or {}
    if not isinstance(listed, dict):
        raise ValueError(f"{file}: added_tokens_decoder is {shorten(listed)}; expected an object")
    return [
        _entry(file, entry, int(number) if number.isdecimal() and len(number) < 12 else number)
        for number, entry in listed.items()
    ]


def _from_tokenizer_json(file: Path) -> list[Entry]:
    """{"version": …, "added_tokens": [{"id": 257152, "content": "<image>", …}, …], "model": …}

    Gemma's file has 17 MB and the list stands near its beginning: only that is parsed.
    """
    text = file.read_bytes().decode(errors="replace")
    place = re.search(r'"added_tokens"\s*:\s*(?=\[)', text)
    try:
        listed = json.JSONDecoder().raw_decode(text, place.end())[0] if place else None
    except (ValueError, RecursionError):
        listed = None
    if listed is None:
        listed = dict(read_json(file, dict)).get("added_tokens") or []
    if not isinstance(listed, list):
        raise ValueError(f"{file}: added_tokens is {shorten(listed)}; expected a list")
    return [_entry(file, e, e.get("id") if isinstance(e, dict) else None) for e in listed]


READERS = {
    "added_tokens.json": _from_added_tokens,
    "tokenizer_config.json": _from_tokenizer_config,
    "tokenizer.json": _from_tokenizer_json,
}


def _entry(file: Path, entry: Any, number: Any) -> Entry:
    if not isinstance(entry, dict):
        raise ValueError(f"{file}: an added token is {shorten(entry)}; expected an object")
    return entry.get("content"), number, any(entry.get(flag) for flag in STRIP)


def place_tokens(
    sp: SentencePieceProcessor, names: Sequence[str], image: str, file: str | os.PathLike
) -> tuple[dict[str, int], int]:
    """Ids of the tokens that PaliGemma, or a fine-tune of it, added to a SentencePiece file.

    Each id is that of the file if it has the piece; else the one that the files beside it list;
    else the next that is free, in order: `names` right after the pieces, `image` after these.

    Args:
        sp: the SentencePiece model.
        names: `<loc0000>` … `<seg127>`; there are all of them, or none.
        image: `<image>`.
        file: where `sp` comes from.

    Returns:
        {token: id} of `names` and of what a fine-tune added; the id of `image`.

    Raises:
        ValueError: some of `names` only, files that contradict one another, or a token that is to
            swallow the spaces beside it.
    """
    size, unknown = sp.get_piece_size(), sp.unk_id()
    listed, stripping = read_added_tokens(Path(file).parent)
    extra = {}
    for token, number in listed.items():
        if number < size and sp.id_to_piece(number) == token.replace(" ", "▁"):
            continue  # listed, but in the SentencePiece file as well
        own = sp.piece_to_id(token)
        if number < size or own != unknown or token in CONTROL:
            why = f"token {own} in it" if own != unknown else "no piece of it"
            why = shorten(sp.id_to_piece(number)) + " in it" if number < size else why
            raise ValueError(
                f"{Path(file).parent}: the files beside {Path(file).name} say that "
                f"{shorten(token)} is token {number}, but that is {why}; {KEEP}"
            )
        if token in stripping:
            raise ValueError(
                f"{Path(file).parent}: the added token {shorten(token)} asks for lstrip, rstrip "
                "or single_word, which this tokenizer lacks; add it again without"
            )
        extra[token] = number

    ids = [sp.piece_to_id(name) for name in names]
    if set(ids) == {unknown}:  # this release of the file ends before them
        ids = [extra.get(name, size + i) for i, name in enumerate(names)]
        if 0 < len(set(names) & set(extra)) < len(names):
            raise ValueError(f"the files beside {file} list some <loc> and <seg>, but not all")
    elif ids != list(range(ids[0], ids[0] + len(names))):
        raise ValueError(
            f"{file} holds some <loc> and <seg> pieces, but not all {len(names)} in order; "
            "expected the published tokenizer.model"
        )
    in_file = sp.piece_to_id(image)
    image_id = extra.get(image, max(size, max(ids) + 1)) if in_file == unknown else in_file
    added = extra | dict(zip(names, ids)) | {image: image_id}
    spelled = {number: token for token, number in added.items()}
    for token, number in added.items():
        if spelled[number] != token:
            raise ValueError(
                f"{Path(file).parent}: {shorten(token)} and {shorten(spelled[number])} are both "
                f"token {number}; {KEEP}"
            )
    return {token: number for token, number in added.items() if token != image}, image_id


def token_files(sp: SentencePieceProcessor, added: dict[str, int], image: str) -> dict[str, dict]:
    """The two files beside `tokenizer.model` that list what it lacks, as transformers reads them.

    Args:
        sp: the SentencePiece model.
        added: {token: id}, `image` included.
        image: the token that is no text.
    """
    outside = sorted((i, token) for token, i in added.items() if i >= sp.get_piece_size())
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    config = {
        "added_tokens_decoder": {
            str(i): {
                "content": token,
                **flags,
                "normalized": token != image,
                "special": token == image,
            }
            for i, token in outside
        },
        "bos_token": sp.id_to_piece(sp.bos_id()),
        "eos_token": sp.id_to_piece(sp.eos_id()),
        "pad_token": sp.id_to_piece(sp.pad_id()),
        "unk_token": sp.id_to_piece(sp.unk_id()),
        "mask_token": None,
        "padding_side": "left",
        "processor_class": "PaliGemmaProcessor",
        "tokenizer_class": "GemmaTokenizer",
    }
    return {
        "added_tokens.json": {token: i for i, token in outside},
        "tokenizer_config.json": config,
    }
