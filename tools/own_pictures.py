"""The proof that one's own pictures can be learnt: 200 of them, a new kind of thing, a new task.

    python tools/own_pictures.py --work runs/own

Draws 200 scenes with a star among the emoji, which the shipped model has never seen, asks each
picture for its caption and what is on the left (which that model has never been asked), writes them
as JSON lines, trains with `paligemma-train`, and counts right answers on 60 other pictures.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from paligemma import load, scenes
from paligemma.support.examples import read_examples
from paligemma.support.train_command import main as train_command

LEFT = "answer en what is left?"


def draw_star(side: int) -> Image.Image:
    """A five-pointed star of so many pixels, with transparency around it."""
    large = 4 * side
    angle = np.arange(10) * np.pi / 5 - np.pi / 2
    radius = np.where(np.arange(10) % 2, 0.2, 0.48) * large
    corners = large / 2 + np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
    picture = Image.new("RGBA", (large, large))
    points = [tuple(corner) for corner in corners.tolist()]
    ImageDraw.Draw(picture).polygon(points, fill="#ff1e9a", outline="#3c003c", width=large // 24)
    return picture.resize((side, side), Image.Resampling.LANCZOS)


def draw(number: int, split: str) -> tuple[Image.Image, list[str]] | None:
    """A scene with a star, and the names from left to right; None: there is no room for one."""
    scene = scenes.make_scene(number, split, objects=(1, 2))
    rng = np.random.default_rng((7, scenes.SPLITS[split], number))
    boxes = scene.boxes.tolist()
    for _ in range(40):
        side = int(rng.integers(28, 44))
        x, y = rng.integers(0, scenes.SIZE - side, 2).tolist()
        centres = [(box[0] + box[2]) / 2 for box in boxes]
        beside = all(abs(x + side / 2 - centre) >= 12 for centre in centres)
        apart = all(x + side <= b[0] or b[2] <= x or y + side <= b[1] or b[3] <= y for b in boxes)
        if beside and apart:
            picture, star = Image.fromarray(scene.image), draw_star(side)
            picture.paste(star, (x, y), star)
            things = [(x + side / 2, "star")]
            things += zip(centres, (scenes.NAMES[kind] for kind in scene.kinds))
            return picture, [name for _, name in sorted(things)]
    return None


def write(folder: Path, count: int, split: str) -> None:
    """So many pictures and two lines for each of them."""
    folder.mkdir(parents=True)
    lines, number = [], 0
    while len(lines) < 2 * count:
        number += 1
        if found := draw(number, split):
            picture, names = found
            picture.save(folder / f"{number}.png")
            phrases = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
            caption = " and ".join([", ".join(phrases[:-1]), phrases[-1]])
            for prefix, suffix in (("caption en", caption), (LEFT, phrases[0])):
                line = {"image": f"{number}.png", "prefix": prefix, "suffix": suffix}
                lines.append(json.dumps(line))
    (folder / "annotations.jsonl").write_text("\n".join(lines))


def score(pipeline, items: list[dict]) -> dict[str, float]:
    """Percent of right answers: captions, whether the star is named, and what is on the left."""
    answers = []
    for first in range(0, len(items), 40):
        some = items[first : first + 40]
        images, prompts = [x["image"] for x in some], [x["prefix"] for x in some]
        answers += pipeline.batch(images, prompts, max_new_tokens=24)
    right: dict[str, list[bool]] = {"captions": [], "star named": [], "left": []}
    for item, answer in zip(items, answers, strict=True):
        if item["prefix"] == LEFT:
            right["left"].append(answer == item["suffix"])
        else:
            right["captions"].append(answer == item["suffix"])
            right["star named"].append("a star" in answer)
    return {name: round(100 * sum(values) / len(values)) for name, values in right.items()}


def prove(work: Path, steps: int, count: int = 200, tested: int = 60) -> dict[str, Any]:
    """Draw, train, test: scores of the shipped model, of the trained one, and seconds."""
    write(work / "mine" / "train", count, "train")
    write(work / "mine" / "valid", tested, "validation")
    options = ["--data", work / "mine", "--output", work / "trained", "--full", "--batch_size", 16]
    options += ["--learning_rate", "1e-3", "--steps", steps, "--workers", 0, "--held_out", 0]
    start = time.perf_counter()
    train_command([str(option) for option in [*options, "--device", "cpu"]])
    seconds = time.perf_counter() - start
    items = read_examples(work / "mine" / "valid")
    before, after = score(load(), items), score(load(work / "trained"), items)
    return {"shipped, %": before, "trained, %": after, "seconds": round(seconds)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="a new folder")
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    for name, found in prove(arguments.work, arguments.steps).items():
        print(f"{name}: {found}")
