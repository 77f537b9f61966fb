"""Ask the tiny model about scenes from another renderer, on backgrounds that training never drew.

    python tools/other_renderer.py --model paligemma/assets/tiny --scenes 200
    python tools/other_renderer.py --sheet sheet.png     # look at the scenes

Whoever tests with the code that made the training data tests the code's habits, too. This renderer
was written apart from it: another layout, other sizes, blending at 448 pixels. It shares the
emoji and their names. Of its backgrounds, "checks", "rings" and "cells" (of Voronoi) are in no
training scene; "plain" and "ramp" are there for comparison.
"""

import argparse
import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

import paligemma
from paligemma.detection import box_iou, encode_boxes
from paligemma.evaluation import box_metrics, exact_match, predict

SIDE = 448  # pixels
ASSETS = Path(str(resources.files("paligemma"))) / "assets"
KINDS = json.loads((ASSETS / "emoji" / "kinds.json").read_text(encoding="utf-8"))
NUMBERS = ("no", "one", "two", "three", "four", "five")
LARGEST = (0, 230, 190, 160, 130, 115)  # pixels, by the number of objects


def colours(rng: np.random.Generator, count: int) -> np.ndarray:
    """Random colours that differ faintly or strongly, uint8[count, 3]."""
    wild = rng.integers(30, 256, (count, 3))
    return (wild[0] + (wild - wild[0]) * rng.uniform(0.1, 1)).astype(np.uint8)


def plain(rng: np.random.Generator) -> np.ndarray:
    """One colour, uint8[448, 448, 3]."""
    return np.broadcast_to(colours(rng, 1), (SIDE, SIDE, 3))


def ramp(rng: np.random.Generator) -> np.ndarray:
    """One colour at one side, another at the side across, uint8[448, 448, 3]."""
    first, last = colours(rng, 2).astype(float)
    picture = first + (last - first) * np.linspace(0, 1, SIDE)[:, None, None]
    return np.rot90(np.broadcast_to(picture, (SIDE, SIDE, 3)), int(rng.integers(4))).astype(
        np.uint8
    )


def checks(rng: np.random.Generator) -> np.ndarray:
    """A chessboard, uint8[448, 448, 3]."""
    field = (np.arange(SIDE) + rng.integers(SIDE)) // rng.integers(20, 90)
    return colours(rng, 2)[(field[:, None] + field[None, :]) % 2]


def rings(rng: np.random.Generator) -> np.ndarray:
    """Rings around a point, uint8[448, 448, 3]."""
    y, x = rng.integers(0, SIDE, 2)
    rows, columns = np.ogrid[:SIDE, :SIDE]
    ring = np.hypot(rows - y, columns - x) // rng.integers(16, 70)
    return colours(rng, 2)[ring.astype(int) % 2]


def cells(rng: np.random.Generator) -> np.ndarray:
    """A mosaic: each pixel has the colour of the nearest of some points, uint8[448, 448, 3]."""
    points = rng.random((rng.integers(8, 60), 2)) * SIDE
    rows, columns = np.ogrid[:SIDE, :SIDE]
    distance = [np.hypot(rows - y, columns - x) for y, x in points]
    return colours(rng, len(points))[np.argmin(distance, axis=0)]


FAMILIES = {"plain": plain, "ramp": ramp, "checks": checks, "rings": rings, "cells": cells}
NEW = ("checks", "rings", "cells")


@dataclass
class Drawing:
    """A picture and what is true about it: kinds and boxes of its objects, from left to right."""

    picture: Image.Image
    kinds: list[int]
    boxes: list[tuple[int, int, int, int]]  # x0 y0 x1 y1, pixels

    def caption(self) -> str:
        """`an owl, two cats and a dog`."""
        phrases = []
        for kind in dict.fromkeys(self.kinds):
            name, count = KINDS[kind]["name"], self.kinds.count(kind)
            article = "an" if name[0] in "aeiou" else "a"
            several = f"{NUMBERS[count]} {KINDS[kind]['plural']}"
            phrases.append(f"{article} {name}" if count == 1 else several)
        start = ", ".join(phrases[:-1])
        return f"{start} and {phrases[-1]}" if start else phrases[-1]


@lru_cache(maxsize=512)  # most tries at placing ask for sizes that earlier ones had
def sprite(kind: int, side: int) -> Image.Image:
    """One emoji of this height or width, cut at its visible edge."""
    with Image.open(ASSETS / "emoji" / f"{KINDS[kind]['name']}.png") as opened:
        picture = opened.convert("RGBA")
    picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    visible = Image.fromarray(np.asarray(picture)[..., 3] >= 128)
    return picture.crop(visible.getbbox())


def draw(seed: int, family: str) -> Drawing:
    """Draw scene `seed` on a background of this family: one to five objects that do not touch.

    Args:
        seed: which scene; the same gives the same.
        family: one of FAMILIES.
    """
    rng = np.random.default_rng((448, list(FAMILIES).index(family), seed))
    count = int(rng.integers(1, 6))
    known = rng.choice(len(KINDS), min(count, int(rng.integers(1, 4))), replace=False)
    kinds = [int(k) for k in (*known, *rng.choice(known, count - len(known)))]
    while True:
        sprites = [sprite(kind, int(rng.integers(90, LARGEST[count]))) for kind in kinds]
        boxes = []
        for s in sprites:
            x, y = (int(rng.integers(0, SIDE - length)) for length in s.size)
            boxes.append((x, y, x + s.width, y + s.height))
        centres = sorted(box[0] + box[2] for box in boxes)
        clear = np.diff(centres).min(initial=SIDE) >= 100  # 50 pixels: who is left is no riddle
        if clear and float(box_iou(boxes, boxes).fill_diagonal_(0).max()) == 0:
            break
    picture = Image.fromarray(np.ascontiguousarray(FAMILIES[family](rng)))
    for s, box in zip(sprites, boxes):
        picture.paste(s, box[:2], s)
    order = sorted(range(count), key=lambda i: boxes[i][0] + boxes[i][2])
    return Drawing(picture, [kinds[i] for i in order], [boxes[i] for i in order])


def count_question(rng: np.random.Generator, drawing: Drawing) -> tuple[str, str]:
    """How many there are of a kind, one time in ten of one that is not there."""
    everything = list(range(len(KINDS)))
    kind = int(rng.choice(everything if rng.random() < 0.1 else drawing.kinds))
    prompt = f"answer en how many {KINDS[kind]['plural']} are there?"
    return prompt, str(drawing.kinds.count(kind))


def detect_question(drawing: Drawing) -> tuple[str, str]:
    """All its kinds, and their boxes as the model spells them."""
    names = [KINDS[kind]["name"] for kind in drawing.kinds]
    words = encode_boxes(drawing.boxes, SIDE, SIDE)
    answer = " ; ".join(f"{word} {name}" for word, name in zip(words, names))
    return "detect " + " ; ".join(dict.fromkeys(names)), answer


def measure(pg: paligemma.Pipeline, family: str, scenes: int) -> dict[str, float]:
    """Percent of captions and counts that are right in every word, and F1 of boxes at IoU 0.5."""
    drawings = [draw(seed, family) for seed in range(scenes)]
    pictures, rng = [drawing.picture for drawing in drawings], np.random.default_rng(5)
    counts, numbers = zip(*(count_question(rng, drawing) for drawing in drawings))
    detects, boxes = zip(*map(detect_question, drawings))
    captions = predict(pg, pictures, ["caption en"] * scenes)
    return {
        "caption": exact_match(captions, [drawing.caption() for drawing in drawings]),
        "count": exact_match(predict(pg, pictures, counts), numbers),
        "detect": box_metrics(predict(pg, pictures, detects), boxes)["f1"],
    }


def measure_all(
    pg: paligemma.Pipeline, scenes: int, families: tuple[str, ...] = tuple(FAMILIES)
) -> dict[str, dict[str, float]]:
    """`measure` for these families, and the mean of the three new ones as "another renderer"."""
    result = {family: measure(pg, family, scenes) for family in families}
    scores = ("caption", "count", "detect")
    mean = {score: float(np.mean([result[family][score] for family in NEW])) for score in scores}
    return result | {"another renderer": mean}


def sheet(path: Path) -> None:
    """A picture with six scenes of each family, one family a row."""
    rows = [[draw(seed, family).picture for seed in range(6)] for family in FAMILIES]
    page = Image.new("RGB", (6 * 230, len(rows) * 230), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            page.paste(picture.resize((224, 224)), (j * 230, i * 230))
    page.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ASSETS / "tiny", help="folder of a model")
    parser.add_argument("--scenes", type=int, default=200, help="scenes a family")
    parser.add_argument("--sheet", type=Path, help="draw scenes to this file and stop")
    options = parser.parse_args()
    if options.sheet:
        return sheet(options.sheet)
    print(f"{'':18}{'caption':>9}{'count':>9}{'detect F1':>11}")
    for family, found in measure_all(paligemma.load(options.model), options.scenes).items():
        print(f"{family:18}{found['caption']:9.1f}{found['count']:9.1f}{found['detect']:11.1f}")


if __name__ == "__main__":
    main()
