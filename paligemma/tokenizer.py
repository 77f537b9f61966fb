# Exported from notebooks/06_tokenizer.ipynb — edit there, then run `make sync`.
"""Text to token ids and back, with PaliGemma's `<image>`, `<loc>` and `<seg>` tokens."""

import json
import os
import re
from collections.abc import Iterable

from paligemma.support.replacing import replacing, settled
from paligemma.support.tokens import check_text, open_sentencepiece, place_tokens, token_files

NUM_LOC, NUM_SEG = 1024, 128
ADDED = [f"<loc{i:04d}>" for i in range(NUM_LOC)] + [f"<seg{i:03d}>" for i in range(NUM_SEG)]
CONTROL = ("<image>", "<bos>", "<eos>", "<pad>")


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
        self.sp = sp = open_sentencepiece(model_file)
        self.pad_id, self.eos_id, self.bos_id = sp.pad_id(), sp.eos_id(), sp.bos_id()
        self.added, self.image_id = place_tokens(sp, ADDED, "<image>", model_file)
        self._spelled = {i: token for token, i in self.added.items()}
        longest_first = sorted(self.added, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.newline_id = self.encode("\n")[-1]

    def encode(self, text: str) -> list[int]:
        """Text to ids, without bos or eos; a `ValueError` if it spells a control token."""
        check_text(text, CONTROL)
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

    def __len__(self) -> int:
        """V, how many ids there are, `<image>` and what a fine-tune added included."""
        return max(self.image_id, *self.added.values()) + 1

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read `tokenizer.model`, and what lists more tokens, from a checkpoint directory."""
        return cls(settled(path) / "tokenizer.model")

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write `tokenizer.model` and the two files that list what it lacks; transformers reads
        them too. The directory is made when absent."""
        files = token_files(self.sp, self.added | {"<image>": self.image_id}, "<image>")
        with replacing(path) as draft:
            (draft / "tokenizer.model").write_bytes(self.sp.serialized_model_proto())
            for name, content in files.items():
                text = json.dumps(content, indent=2, ensure_ascii=False)
                (draft / name).write_text(text + "\n", encoding="utf-8")
