"""What people type and pass: texts of every kind, options of every wrong type, command lines."""

import io
import random
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from mutate import PICTURES, TINY, Run, Wrong, hold, link_tiny, no_file, value

import paligemma
from paligemma.detection import encode_boxes, parse_detections
from paligemma.generation import generate
from paligemma.image_processor import ImageProcessor
from paligemma.processor import Processor
from paligemma.segmentation import parse_segments
from paligemma.support.command_line import main
from paligemma.tokenizer import Tokenizer

SCENE = PICTURES / "scene.png"
CONTROL = ("<image>", "<bos>", "<eos>", "<pad>")
WORDS = [
    "caption en",
    "detect cat ; dog",
    "<loc0001>",
    "<loc1024>",
    "<loc000>",
    "<seg127>",
    "<unk>",
]
WORDS += [
    "<seg128>",
    "<image",
    "image>",
    "<IMAGE>",
    "\n",
    "\r\n",
    "\t",
    " ",
    "▁",
    "\x00",
    "\x7f",
    "\x1b[2J",
]
WORDS += [
    "\u202e",
    "\u200b",
    "\ufeff",
    "\ufffd",
    "e\u0301" * 9,
    "\U0010ffff",
    "🏳️‍🌈",
    "العربية",
    "猫",
]
WORDS += [
    "a" * 500,
    "ﬃ",
    "İ",
    "ß",
    "\ud800",
    "\udfff",
    "<s>",
    "</s>",
    "[INST]",
    "<start_of_turn>",
    "; ;",
]
LONG = [9_000, 50_000, 130_000, 140_000, 1_000_000]


@cache
def pipeline() -> paligemma.Pipeline:
    return paligemma.load()


def text(rng: random.Random) -> tuple[str, str]:
    how = rng.randrange(8)
    if how == 0:
        size = rng.choice(LONG)
        unit = rng.choice(["a", "cat ", "猫", "<loc0001>", "\n", " ", "🙂", "\x00"])
        return f"{size} of {unit!r}", (unit * (size // len(unit) + 1))[:size]
    if how == 1:
        points = [rng.choice([rng.randrange(0x110000), rng.randrange(0x250)]) for _ in range(30)]
        found = "".join(map(chr, points))
        return f"characters {points[:3]}", found
    if how == 2:
        return "bytes", rng.randbytes(40).decode("utf-8", errors="surrogateescape")
    if how == 3:
        return (control := rng.choice(CONTROL)), "answer en " + control + rng.choice(["", " x"])
    found = "".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 9)))
    return repr(found)[:60].encode("ascii", "replace").decode(), found


def texts(rng: random.Random, folder: Path) -> tuple[str, Run]:
    """Prompts, and answers to be parsed, of every kind of text."""
    name, given = text(rng)
    if rng.random() < 0.3:  # an answer: no text may make a parser raise
        given = given[:100_000] + "".join(
            f"<loc{rng.randrange(1030):04d}>" for _ in range(rng.randrange(9))
        )
        given += "".join(
            f"<seg{rng.randrange(130):03d}>" for _ in range(rng.choice([0, 15, 16, 17]))
        )

        def parse() -> None:
            try:
                parse_detections(given, 640, 480)
                parse_segments(given, 64, 48, pipeline().codec)
            except ValueError as error:
                raise Wrong(f"a parser raised {error}") from None

        return f"answer: {name}", parse

    def ask() -> None:
        pg, image = pipeline(), rng.choice([SCENE, SCENE, [SCENE, SCENE]])
        hold(isinstance(pg(image, given, max_new_tokens=2), str), "no text")
        hold(not any(control in given for control in CONTROL), "a control token was taken")
        ids = pg.processor.tokenizer.encode(given)
        same = pg.processor.tokenizer.decode(ids) == given
        hold(same or "▁" in given, "decode does not undo encode")

    return f"prompt: {name}", ask


# ---------------------------------------------------------------- arguments

SCENE_PIXELS = np.zeros((9, 9, 3), np.uint8)
ODD = [
    b"bytes",
    object(),
    print,
    Path("x"),
    np.float64("nan"),
    np.int64(3),
    np.zeros(3),
    torch.zeros(2),
]
ODD += [
    1j,
    range(3),
    {1, 2},
    np.zeros((2, 2, 3)),
    [SCENE, None],
    ["cat", 3],
    Exception,
]


def odd(rng: random.Random) -> object:
    return rng.choice(ODD) if rng.random() < 0.5 else value(rng)


OPTIONS = "max_new_tokens temperature top_p top_k seed eos_token_id stop".split()
LOAD = "path device dtype quantize adapter revision".split()


def options(rng: random.Random, folder: Path) -> tuple[str, Run]:
    """Every argument of the public functions, of every wrong type."""
    given, kind = odd(rng), rng.randrange(12)
    shown = f"{type(given).__name__} {str(type(given)) if callable(given) else given!r:.30}"
    pg, ids = pipeline(), torch.tensor([[2176] * 64 + [2, 5, 6]])
    pixels = torch.zeros(1, 3, 112, 112)
    option, own = (name := rng.choice(OPTIONS)), name if name not in ("seed", "stop") else "top_k"
    limit = {} if option == "max_new_tokens" else {"max_new_tokens": 2}
    argument = rng.choice(LOAD)
    both = rng.choice([(given, "caption en"), (SCENE, given), (given, given)])
    calls = {
        f"pg({option})": lambda: pg(SCENE, "caption en", **limit, **{option: given}),
        "pg(image, prompt)": lambda: pg(*both, max_new_tokens=2),
        "pg.batch": lambda: pg.batch(*both, max_new_tokens=2),
        "pg.batch lists": lambda: pg.batch([both[0]], [both[1]], max_new_tokens=2),
        "pg.detect": lambda: pg.detect(*both, max_new_tokens=2),
        "pg.segment": lambda: pg.segment(*both, max_new_tokens=2),
        f"load({argument})": lambda: paligemma.load(**{argument: given}),
        f"generate({own})": lambda: generate(pg.model, ids, pixels, **limit, **{own: given}),
        "Processor": lambda: pg.processor(*both, suffixes=rng.choice([None, "a", given])),
        "Tokenizer": lambda: rng.choice([pg.processor.tokenizer.encode, Tokenizer])(given),
        "parse": lambda: rng.choice([parse_detections, parse_segments_with(pg)])(
            "<loc0001>" * 4, given, rng.choice([9, given])
        ),
        "codec": lambda: rng.choice([pg.codec.decode, pg.codec.encode, type(pg.codec).from_npz])(
            given
        ),
    }
    more = {
        "ImageProcessor": lambda: ImageProcessor(
            rng.choice([given, 8]), rng.choice([given, (0, 0, 0)])
        ),
        "encode_boxes": lambda: encode_boxes(rng.choice([given, [given], [[given] * 4]]), 9, 9),
        "pg.to": lambda: paligemma.load().to(given),
        "from_pretrained": lambda: rng.choice(
            [Processor, ImageProcessor, Tokenizer]
        ).from_pretrained(given),
    }
    calls = more if rng.random() < 0.25 else calls
    name = sorted(calls)[kind % len(calls)]

    return f"{name}: {shown}", calls[name]


def parse_segments_with(pg):
    return lambda answer, width, height: parse_segments(answer, width, height, pg.codec)


# ---------------------------------------------------------------- the command

FLAGS = (
    "--prompt --model_path --max_tokens_to_generate --do_sample --temperature --top_p --seed "
    "--only_cpu --quantize --adapter --task --output --json --unknown --image_file_path -"
).split()


def argument(rng: random.Random, folder: Path) -> str:
    how = rng.randrange(6)
    if how == 0:
        return text(rng)[1][:100_000].replace("\x00", "0")
    if how == 1:
        names = [
            "",
            ".",
            "/",
            "~",
            "a\nb",
            "n" * 260,
            "n/" * 3000,
            "/dev/zero",
            "/proc/self/mem",
            "-",
            "--",
        ]
        return rng.choice(names)
    if how == 2:
        return str(value(rng)).replace("\x00", "0") if rng.random() < 0.9 else "9" * 400
    return rng.choice(
        [str(folder), str(folder / "scene.png"), str(folder / "model"), str(TINY), "cat"]
    )


def commands(rng: random.Random, folder: Path) -> tuple[str, Run]:
    """Arguments in any order; exit 0 or 1, or 2 after one line."""
    link_tiny(folder / "model")
    (folder / "scene.png").symlink_to(SCENE)
    if rng.random() < 0.3:
        place = rng.choice(
            [
                folder / "scene.png",
                folder / "model" / "config.json",
                folder / "model" / "tokenizer.model",
            ]
        )
        no_file(rng, place)
    line = [
        "--image_file_path",
        rng.choice([str(folder / "scene.png"), str(folder), argument(rng, folder)]),
    ]
    line += ["--max_tokens_to_generate", "3"] if rng.random() < 0.9 else []
    for flag in rng.sample(FLAGS, rng.randrange(1, 4)):
        line += [flag] if rng.random() < 0.1 else [flag, argument(rng, folder)]
    sent = rng.choice([b"", SCENE.read_bytes(), SCENE.read_bytes()[:900], rng.randbytes(99)])

    def run() -> None:
        out, err = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO())
        before = sys.stdin, sys.stdout, sys.stderr
        sys.stdin, sys.stdout, sys.stderr = io.TextIOWrapper(io.BytesIO(sent)), out, err
        try:
            code = main(line)
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.stdin, sys.stdout, sys.stderr = before
            err.flush()
            said = err.buffer.getvalue().decode(errors="replace")
        if code == 2:
            raise ValueError(said.removesuffix("\n"))
        hold(code in (0, 1), f"exit {code!r}")
        hold("Traceback" not in said, "a traceback")
        hold(code or "error" not in said, said[:80])

    shown = " ".join(
        part if part.isascii() and len(part) < 40 else f"{part!a:.20}…" for part in line
    )
    return shown.replace(str(folder), "")[:160], run
