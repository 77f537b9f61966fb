# Exported from notebooks/06_tokenizer.ipynb — edit there, then run `make sync`.
"""Text to token ids and back, with PaliGemma's `<image>`, `<loc>` and `<seg>` tokens."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from sentencepiece import SentencePieceProcessor

NUM_LOC, NUM_SEG = 1024, 128
ADDED = [f"<loc{i:04d}>" for i in range(NUM_LOC)] + [f"<seg{i:03d}>" for i in range(NUM_SEG)]
LOC_OR_SEG = re.compile(r"(<loc(?:0\d{3}|10[01]\d|102[0-3])>|<seg(?:0\d\d|1[01]\d|12[0-7])>)", re.A)
CONTROL = re.compile(r"<(?:image|bos|eos|pad)>")


def _open_model(model_file: str | os.PathLike) -> SentencePieceProcessor:
    """Open a SentencePiece file that has the control pieces PaliGemma needs."""
    if not os.path.isfile(model_file):
        hint = "a checkpoint directory needs its tokenizer.model"
        if (Path(model_file).parent / "tokenizer.json").is_file():
            hint = "there is a tokenizer.json, but this reads the tokenizer.model of the base model"
        raise ValueError(f"no tokenizer at {model_file}; {hint}")
    try:
        sp = SentencePieceProcessor(model_file=str(model_file))
    except (RuntimeError, OSError):
        raise ValueError(
            f"{model_file} is not a SentencePiece model; expected the published tokenizer.model"
        ) from None
    if -1 in (sp.pad_id(), sp.eos_id(), sp.bos_id()):
        raise ValueError(f"{model_file} lacks a <pad>, <eos> or <bos> piece; PaliGemma needs all")
    return sp


def _added_ids(sp: SentencePieceProcessor, model_file: str | os.PathLike) -> dict[str, int]:
    """The id of each `<loc>` and `<seg>`: where the file has them, otherwise right after it."""
    found, size = [sp.piece_to_id(piece) for piece in ADDED], sp.get_piece_size()
    first = size if set(found) == {sp.unk_id()} else found[0]
    expected = list(range(first, first + len(ADDED)))
    if first != size and found != expected:
        raise ValueError(
            f"{model_file} holds some <loc> and <seg> pieces, but not all {len(ADDED)} in order; "
            "expected the published tokenizer.model"
        )
    return dict(zip(ADDED, expected))


def _checked(text: str) -> str:
    """The same text, if a user may say it."""
    if not isinstance(text, str):
        raise ValueError(f"the text is {type(text).__name__}; expected a string")
    control = CONTROL.search(text)
    if control:
        raise ValueError(
            f"the text contains {control[0]!r}, which only the processor may place; "
            "remove it or write it differently"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text is half of a surrogate pair; "
            "expected valid Unicode: read or decode the text as UTF-8"
        ) from None
    return text


def _decode(sp: SentencePieceProcessor, spelled: dict[int, str], ids: Iterable[int]) -> str:
    """Join runs of ordinary pieces, and spell what was added; drop all other ids."""
    text, run, size = [], [], sp.get_piece_size()
    for i in map(int, ids):
        if i < 0:
            raise ValueError(f"id {i} is negative; drop the -100 of labels before decoding")
        if i in spelled:
            text += [sp.decode(run), spelled[i]]
            run = []
        elif i < size and not sp.is_control(i):
            run.append(i)
    return "".join([*text, sp.decode(run)])


class Tokenizer:
    """SentencePiece plus the tokens that PaliGemma adds.

    Ids, in order: the pieces of the file, `<loc0000>`…`<loc1023>`, `<seg000>`…`<seg127>`
    (whether the file already ends with these or not), then `<image>`.

    Args:
        model_file: path of a SentencePiece `tokenizer.model`; a `ValueError` if it is none.

    Source: PaliGemma paper, section 3.2; the published `tokenizer.model` and `added_tokens.json`.
    """

    def __init__(self, model_file: str | os.PathLike):
        self.sp = sp = _open_model(model_file)
        self.pad_id, self.eos_id, self.bos_id = sp.pad_id(), sp.eos_id(), sp.bos_id()
        self._added = _added_ids(sp, model_file)
        self._spelled = {i: piece for piece, i in self._added.items()}
        self.image_id = max(sp.get_piece_size(), max(self._spelled) + 1)
        self.newline_id = self.encode("\n")[-1]

    def __len__(self) -> int:
        """V, how many ids there are, `<image>` included."""
        return self.image_id + 1

    def encode(self, text: str) -> list[int]:
        """Text to ids, without bos or eos; a `ValueError` if it spells a control token."""
        ids = []
        for part in LOC_OR_SEG.split(_checked(text)):
            ids += [self._added[part]] if part in self._added else self.sp.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text, without pad, bos, eos and `<image>`. Undoes `encode`, but for `▁`: the
        character U+2581 comes back as a space, since SentencePiece writes spaces with it."""
        return _decode(self.sp, self._spelled, ids)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read `tokenizer.model` from a checkpoint directory."""
        return cls(Path(path) / "tokenizer.model")
