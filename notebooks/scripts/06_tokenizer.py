# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["navigation"]
# [← SigLIP](05_siglip.ipynb) | [contents](../README.md) | [RMSNorm →](07_rms_norm.ipynb)

# %% [markdown]
# # 6 · Tokenizer: how does text become numbers, and boxes become text?
#
# *35 minutes* · part II, Language

# %%
#| export
"""Text to token ids and back, with PaliGemma's `<image>`, `<loc>` and `<seg>` tokens."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from sentencepiece import SentencePieceProcessor

NUM_LOC, NUM_SEG = 1024, 128
ADDED = [f"<loc{i:04d}>" for i in range(NUM_LOC)] + [f"<seg{i:03d}>" for i in range(NUM_SEG)]
LOC_OR_SEG = re.compile(r"(<loc(?:0\d{3}|10[01]\d|102[0-3])>|<seg(?:0\d\d|1[01]\d|12[0-7])>)")
CONTROL = re.compile(r"<(?:image|bos|eos|pad)>")


# %%
#| export
class Tokenizer:
    """SentencePiece plus the tokens that PaliGemma adds.

    Ids, in order: the pieces of the file, `<loc0000>`…`<loc1023>`, `<seg000>`…`<seg127>`
    (whether the file already ends with these or not), then `<image>`.

    Args:
        model_file: path of a SentencePiece `tokenizer.model`.

    Raises:
        ValueError: no such file, or not a SentencePiece model.

    Source: PaliGemma paper, section 3.2; the published `tokenizer.model` and `added_tokens.json`.
    """

    def __init__(self, model_file: str | os.PathLike):
        if not Path(model_file).is_file():
            raise ValueError(
                f"no tokenizer at {model_file}; a checkpoint directory needs its tokenizer.model"
            )
        try:
            self.sp = SentencePieceProcessor(model_file=str(model_file))
        except (RuntimeError, OSError):
            raise ValueError(
                f"{model_file} is not a SentencePiece model; expected the published tokenizer.model"
            ) from None
        self.pad_id, self.eos_id, self.bos_id = self.sp.pad_id(), self.sp.eos_id(), self.sp.bos_id()
        if -1 in (self.pad_id, self.eos_id, self.bos_id):
            raise ValueError(
                f"{model_file} lacks a <pad>, <eos> or <bos> piece; PaliGemma needs all"
            )
        size = self.sp.get_piece_size()
        known = self.sp.piece_to_id(ADDED[0])
        first = size if known == self.sp.unk_id() else known  # some releases lack loc and seg
        self._added = {piece: first + i for i, piece in enumerate(ADDED)}
        self._added_text = {i: piece for piece, i in self._added.items()}
        self.image_id = max(size, first + len(ADDED))
        self.newline_id = self.encode("\n")[-1]

    def __len__(self) -> int:
        """V, how many ids there are, `<image>` included."""
        return self.image_id + 1

    def encode(self, text: str) -> list[int]:
        """Text to ids, without bos or eos.

        Raises:
            ValueError: the text spells a control token (`<image>`, `<bos>`, `<eos>`, `<pad>`).
        """
        control = CONTROL.search(text)
        if control:
            raise ValueError(
                f"the text contains {control[0]!r}, which only the processor may place; "
                "remove it or write it differently"
            )
        ids = []
        for part in LOC_OR_SEG.split(text):
            ids += [self._added[part]] if part in self._added else self.sp.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; pad, bos, eos and `<image>` are left out, loc and seg are spelled."""
        text, run = [], []
        for i in map(int, ids):
            if i in self._added_text:
                text += [self.sp.decode(run), self._added_text[i]]
                run = []
            elif i < self.sp.get_piece_size() and not self.sp.is_control(i):
                run.append(i)
        return "".join([*text, self.sp.decode(run)])

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read `tokenizer.model` from a checkpoint directory."""
        return cls(Path(path) / "tokenizer.model")
