"""Train the tiny model's tokenizer on the words of the scenes, in the published layout.

    python tools/make_tokenizer.py DIR               # writes DIR/tokenizer.model

The ids: pad 0, eos 1, bos 2, unk 3, "\\n" 4, the ordinary pieces, then `<loc0000>` to `<loc1023>`
and `<seg000>` to `<seg127>`; `<image>` is the next id, added outside the file.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2 as model_pb2  # needs protobuf

from paligemma import scenes
from paligemma.tokenizer import ADDED

ORDINARY = 1024  # pieces before <loc0000>: control ids, "\n", 256 bytes, words and their parts

PLAIN_TEXT = """A picture is a grid of numbers, and a sentence is a row of small pieces.
The model looks at the picture first and reads the question after it.
It then writes one word at a time until it has nothing more to say.
What do you see in this picture? I see a small dog and a red ball on the grass.
There is a house near the river, and the sun is high in the sky.
Where is the cat? It is on the left, under the old tree, next to the car.
The left side is dark, the right side is light, and the middle is green or blue.
How many people are there? There are five, and all of them are walking home.
Describe the image in a few words. Read the text in the image aloud.
Numbers such as 0, 1, 2, 3, 4, 5, 6, 7, 8 and 9 are pieces of their own.
She said that the train was late; he did not mind, because it was warm.
We learn by doing, by making mistakes, and by asking why they were mistakes."""


def corpus(seed=0):
    """Captions and questions as the scenes ask them, every word often, and some plain English."""
    rng = np.random.default_rng(seed)
    lines, nothing = [], np.zeros((0, 0), np.uint8)  # only words are needed, no pictures
    for _ in range(20_000):
        count = int(rng.integers(1, 6))
        scene = scenes.Scene(
            nothing, scenes.draw_kinds(rng, count), np.zeros((count, 4), int), nothing
        )
        for language in scenes.LANGUAGES:
            lines += [f"caption {language}", scenes.caption_of(scene.kinds, language)]
        for name in ("count", "is there"):
            lines += scenes.task(rng, scene, name)
        lines += [f"{v} {h}".strip() for v in ("top", "", "bottom") for h in ("left", "right", "")]
        lines += ["middle"]
    for kind, name in enumerate(scenes.NAMES):  # every form of every word, equally often
        for language in scenes.LANGUAGES:
            lines += [scenes.phrase(kind, n, language) for n in (1, 2, 3, 4, 5)] * 40
        other = scenes.NAMES[(kind + 1) % len(scenes.NAMES)]
        lines += [f"answer en where is the {name}?", f"detect {name} ; {other}", name.upper()] * 40
        lines += [f" {name} ; ", f" {name}", f"segment {name}", "ocr"] * 80
    return lines + PLAIN_TEXT.splitlines() * 20


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where tokenizer.model goes")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=stream,
        model_type="bpe",
        vocab_size=ORDINARY,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=["\n"],
        num_threads=1,
        minloglevel=2,
    )
    proto = model_pb2.ModelProto.FromString(stream.getvalue())  # type: ignore
    for name in ADDED:
        piece = proto.pieces.add()
        piece.piece, piece.score = name, 0.0
        piece.type = model_pb2.ModelProto.SentencePiece.USER_DEFINED  # type: ignore
    (options.folder / "tokenizer.model").write_bytes(proto.SerializeToString())


if __name__ == "__main__":
    main()
