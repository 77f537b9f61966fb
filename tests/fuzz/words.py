"""Tokenizers: tokenizer.model, and the lists of added tokens beside it."""

import random
from pathlib import Path

from mutate import TINY, Run, broken_json, hold, link_tiny, mangle, no_file

from paligemma.processor import Processor


def tokenizers(rng: random.Random, folder: Path) -> tuple[str, Run]:
    """tokenizer.model and the lists of added tokens beside it."""
    link_tiny(folder, "tokenizer.model")
    file, data = folder / "tokenizer.model", (TINY / "tokenizer.model").read_bytes()
    how = rng.random()
    if how < 0.35:
        name, spoilt = mangle(rng, data)
        file.write_bytes(spoilt)
    elif how < 0.55:
        name, spoilt = other_tokenizer(rng, data)
        file.write_bytes(spoilt)
    elif how < 0.65:
        name = no_file(rng, file)
    else:
        file.write_bytes(data)
        entry = {"content": "<new>", "lstrip": False, "normalized": True, "special": False}
        listed: dict[str, object] = {
            "added_tokens.json": {"<image>": 2176, "<new>": 2177},
            "tokenizer_config.json": {"added_tokens_decoder": {"2177": entry}},
            "tokenizer.json": {"added_tokens": [{"id": 2177, **entry}], "model": {}},
        }
        beside = rng.choice(sorted(listed))
        what, text = broken_json(rng, listed[beside])
        (folder / beside).write_bytes(text)
        name = f"{beside}: {what}"

    def run() -> None:
        reader = Processor.from_pretrained(folder)
        for text in ("caption en", "détect 猫 ; <loc0001><seg001>\n\t 🙂"):
            ids = reader.encode_prefix(text)
            hold(all(0 <= i < 2240 for i in ids), "an id beyond the embedding")
            hold(isinstance(reader.decode(ids), str), "no text")

    return name, run


def other_tokenizer(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    """A whole SentencePiece model, but not one of PaliGemma's kind."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto.FromString(data)
    how, piece = rng.randrange(8), rng.choice(model.pieces)
    if how == 0:
        model.normalizer_spec.name = rng.choice(["nfkc", "nmt_nfkc", "x"])
        model.normalizer_spec.precompiled_charsmap = rng.randbytes(rng.choice([1, 3, 8, 64, 4096]))
        return "a normaliser", model.SerializeToString()
    if how == 1:
        model.normalizer_spec.add_dummy_prefix = True
        model.normalizer_spec.remove_extra_whitespaces = rng.random() < 0.5
        return "spaces changed", model.SerializeToString()
    if how == 2:
        piece.piece = rng.choice(["", "<image>", "<bos>", "<loc0000>", "a\nb", "▁" * 9000, "cat"])
        return f"a piece is {piece.piece[:20]!r}", model.SerializeToString()
    if how == 3:
        piece.type = rng.randrange(1, 7)
        return f"a piece of type {piece.type}", model.SerializeToString()
    if how == 4:
        piece.score = rng.choice([float("nan"), float("inf"), -1e38])
        return "a score of NaN", model.SerializeToString()
    if how == 5:
        del model.pieces[rng.randrange(len(model.pieces)) :]
        return f"{len(model.pieces)} pieces", model.SerializeToString()
    if how == 6:
        model.trainer_spec.model_type = rng.randrange(1, 5)
        return f"model type {model.trainer_spec.model_type}", model.SerializeToString()
    word = rng.choice([p.piece for p in model.pieces if len(p.piece.encode()) > 3]).encode()
    bad = rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80"])[: len(word)]
    return "broken UTF-8", data.replace(word, bad + word[len(bad) :])
