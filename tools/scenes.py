"""Compose emoji scenes with true captions: the data of the shipped tiny model.

A scene is 112 x 112 pixels: a background (colour gradient, noise, soft blobs or a crop of a
photograph) and one to four emoji, ordered from left to right, of one, two or rarely three kinds.
Scene `index` of a split depends on (seed, split, index) and on nothing else. One pair of kinds in
ten never appears together in training or validation; see `HELD_OUT`.

    python tools/scenes.py --sheet scenes.png        # a contact sheet, to look at
    python tools/scenes.py --speed                   # scenes per second on one core
    python tools/scenes.py --demo                    # writes paligemma/assets/pictures/scene*.png
"""

import argparse
import itertools
import json
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

ASSETS = Path(__file__).resolve().parent.parent / "paligemma" / "assets"
SIZE = 112  # pixels
PATCH = 14  # pixels
SPLITS = {"train": 0, "validation": 1, "test": 2}
NUMBERS = ["no", "one", "two", "three", "four", "five"]
SCALES = list(range(22, 53, 3))  # sprite side in pixels
ANGLES = [-16, -8, 0, 8, 16]  # degrees
BACKGROUNDS = ("coffee", "astronaut")  # not "cat": a cat in the background would be a lie

_KINDS = json.loads((ASSETS / "emoji" / "kinds.json").read_text())
NAMES = [kind["name"] for kind in _KINDS]
PLURALS = [kind["plural"] for kind in _KINDS]


def _held_out_pairs(seed=7, share=0.1):
    """Draw the pairs of kinds that only the test split may show together."""
    pairs = list(itertools.combinations(range(len(NAMES)), 2))
    order = np.random.default_rng(seed).permutation(len(pairs))
    return frozenset(pairs[i] for i in order[: round(share * len(pairs))])


HELD_OUT = _held_out_pairs()


@dataclass
class Scene:
    """One composed picture and what is true about it.

    Args:
        image: uint8[112, 112, 3].
        kinds: the kind (index into NAMES) of each object, from left to right.
        boxes: int[objects, 4], x0 y0 x1 y1 of each object's visible pixels, in pixels.
    """

    image: np.ndarray
    kinds: list
    boxes: np.ndarray

    @property
    def caption(self):
        """The caption, kinds grouped in the order in which they first appear."""
        return caption_of(self.kinds)

    @property
    def holds_unseen_pair(self):
        """Whether it shows two kinds that training never shows together."""
        return any(p in HELD_OUT for p in itertools.combinations(sorted(set(self.kinds)), 2))


def phrase(kind, count):
    """`a cat`, `an owl`, `two dogs`."""
    if count == 1:
        return f"{'an' if NAMES[kind][0] in 'aeiou' else 'a'} {NAMES[kind]}"
    return f"{NUMBERS[count]} {PLURALS[kind]}"


def caption_of(kinds):
    """The caption of objects of these kinds, given from left to right."""
    phrases = [phrase(kind, kinds.count(kind)) for kind in dict.fromkeys(kinds)]
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if phrases[:-1] else phrases)


@lru_cache(maxsize=1)
def sprites():
    """Every sprite at every scale and angle, cropped: `[kind][scale][angle] -> (colour, alpha)`.

    Colour is premultiplied, uint16[h, w, 3]; alpha is uint16[h, w, 1], 0 to 256.
    """
    table = []
    for name in NAMES:
        with Image.open(ASSETS / "emoji" / f"{name}.png") as opened:
            picture = opened.convert("RGBA").convert("RGBa")  # premultiplied
        table.append([[_render(picture, s, a) for a in ANGLES] for s in SCALES])
    return table


def _render(picture, side, angle):
    turned = picture.rotate(angle, Image.Resampling.BICUBIC, expand=True) if angle else picture
    factor = side / picture.width
    size = [max(1, round(length * factor)) for length in turned.size]
    pixels = np.asarray(turned.resize(size, Image.Resampling.LANCZOS), dtype=np.uint16)
    rows, columns = np.nonzero(pixels[..., 3] > 24)
    pixels = pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    alpha = pixels[..., 3:]
    return np.minimum(pixels[..., :3], alpha), alpha + (alpha >> 7)


@lru_cache(maxsize=1)
def photographs():
    """The photographs that backgrounds are cropped from, at two sizes, as uint8 arrays."""
    arrays = []
    for name in BACKGROUNDS:
        with Image.open(ASSETS / "pictures" / f"{name}.jpg") as opened:
            picture = opened.convert("RGB")
        for height in (150, 260):
            width = round(picture.width * height / picture.height)
            arrays.append(np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS)))
    return arrays


@lru_cache(maxsize=1)
def _ramps():
    """Smooth weights in 0..1 for gradients and blobs, float32[n, 112, 112, 1]."""
    axis = np.linspace(0, 1, SIZE, dtype=np.float32)
    x, y = axis[None, :], axis[:, None]
    ramps = [np.broadcast_to(r, (SIZE, SIZE)) for r in (x, y, (x + y) / 2, (x + 1 - y) / 2)]
    for cx, cy in itertools.product((0.1, 0.5, 0.9), repeat=2):
        ramps.append(np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 0.18))
    return np.stack(ramps)[..., None].astype(np.float32)


@lru_cache(maxsize=1)
def _noise():
    """A field of noise that backgrounds take windows of, float32[224, 224, 1]."""
    fine = np.random.default_rng(3).standard_normal((224, 224, 1))
    coarse = np.random.default_rng(4).standard_normal((56, 56, 1))
    return (6 * fine + 6 * coarse.repeat(4, 0).repeat(4, 1)).astype(np.float32)


def _colour(rng):
    """A random colour, more often soft than strong, float32[3]."""
    low = 120 if rng.random() < 0.7 else 10
    return rng.integers(low, 256, 3).astype(np.float32)


def background(rng):
    """Draw a background, uint8[112, 112, 3]."""
    style = rng.random()
    if style < 0.2:
        photo = photographs()[rng.integers(len(photographs()))]
        y = rng.integers(photo.shape[0] - SIZE + 1)
        x = rng.integers(photo.shape[1] - SIZE + 1)
        crop = photo[y : y + SIZE, x : x + SIZE]
        return (crop[:, ::-1] if rng.random() < 0.5 else crop).copy()
    if style < 0.35:
        return np.full((SIZE, SIZE, 3), _colour(rng).astype(np.uint8))
    ramps, first, second = _ramps(), _colour(rng), _colour(rng)
    field = first + (second - first) * ramps[rng.integers(len(ramps))]
    if style > 0.65:
        y, x = rng.integers(0, SIZE, 2)
        field = field + _noise()[y : y + SIZE, x : x + SIZE] * np.float32(rng.random() * 1.5)
        np.clip(field, 0, 255, out=field)
    return field.astype(np.uint8)


def draw_kinds(rng, count, unseen=None):
    """Draw the kinds of `count` objects, left to right.

    Args:
        rng: numpy Generator.
        count: number of objects, 1 to 4.
        unseen: None or False: no pair of HELD_OUT; True: one pair of HELD_OUT (needs count >= 2).
    """
    share = rng.random()
    different = 1 if count == 1 else 2 if count == 2 else 3 if share > 0.9 else 2
    if not unseen and share < 0.35:
        different = 1
    if unseen:
        pairs = sorted(HELD_OUT)
        chosen = list(pairs[rng.integers(len(pairs))])
    else:
        while True:
            chosen = rng.choice(len(NAMES), different, replace=False).tolist()
            if not any(p in HELD_OUT for p in itertools.combinations(sorted(chosen), 2)):
                break
    extra = [chosen[i] for i in rng.integers(0, len(chosen), count - len(chosen))]
    kinds = chosen + extra
    return [kinds[i] for i in rng.permutation(count)]


def place(rng, widths, heights, apart=10, tries=60):
    """Place boxes so that their centres go from left to right and they hardly overlap.

    Returns:
        int[objects, 4] boxes inside the picture, or None when no place was found.
    """
    widths, heights = np.asarray(widths), np.asarray(heights)
    for _ in range(tries):
        x0 = (rng.random(len(widths)) * (SIZE - widths + 1)).astype(int)
        y0 = (rng.random(len(widths)) * (SIZE - heights + 1)).astype(int)
        boxes = [(x, y, x + w, y + h) for x, y, w, h in zip(x0, y0, widths, heights)]
        if all(
            abs(a[0] + a[2] - b[0] - b[2]) >= 2 * apart and _overlap(a, b) <= 0.1
            for a, b in itertools.combinations(boxes, 2)
        ):
            return np.asarray(boxes)
    return None


def _overlap(a, b):
    """Area that two boxes share, as a share of the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return width * height / smaller


def make_scene(index, split="train", seed=0, objects=(1, 2, 3, 4), unseen=False):
    """Compose scene `index`: the same arguments give the same scene, always.

    Args:
        index: which scene, 0 and up.
        split: "train", "validation" or "test".
        seed: seed of the world.
        objects: the numbers of objects to draw from.
        unseen: True for a scene with a pair of kinds that training never shows (test only).

    Returns:
        Scene.
    """
    if unseen and split != "test":
        raise ValueError(f"unseen pairs are for the test split, got {split!r}; leave unseen=False")
    rng = np.random.default_rng((seed, SPLITS[split], index, int(unseen)))
    count = objects[rng.integers(len(objects))]
    kinds = draw_kinds(rng, max(2, count) if unseen else count, unseen)
    table, largest = sprites(), [11, 11, 9, 6, 5][len(kinds)]
    while True:
        chosen = [
            table[k][s][a]
            for k, s, a in zip(
                kinds,
                rng.integers(0, largest, len(kinds)),
                rng.integers(0, len(ANGLES), len(kinds)),
            )
        ]
        boxes = place(rng, [c.shape[1] for c, _ in chosen], [c.shape[0] for c, _ in chosen])
        if boxes is not None:
            break
    image = background(rng)
    for (colour, alpha), (x0, y0, x1, y1) in zip(chosen, boxes):
        under = image[y0:y1, x0:x1]
        under[:] = colour + ((under * (256 - alpha)) >> 8)
    order = np.argsort(boxes[:, 0] + boxes[:, 2], kind="stable")
    return Scene(image, [kinds[i] for i in order], boxes[order])


def patch_targets(scene):
    """What each of the 64 patches shows: a vision tower can be warmed up on this.

    Returns:
        int64[2, 64]: row 0 the kind that covers the patch's centre (its box does), row 1 the kind
        whose centre lies in the patch; len(NAMES) where there is none.
    """
    side = SIZE // PATCH
    targets = np.full((2, side, side), len(NAMES), dtype=np.int64)
    for kind, (x0, y0, x1, y1) in zip(scene.kinds, scene.boxes):
        half = PATCH // 2
        rows = slice((y0 + half - 1) // PATCH, (y1 + half - 1) // PATCH)
        columns = slice((x0 + half - 1) // PATCH, (x1 + half - 1) // PATCH)
        targets[0, rows, columns] = kind
    for kind, (x0, y0, x1, y1) in zip(scene.kinds, scene.boxes):
        targets[1, (y0 + y1) // 2 // PATCH, (x0 + x1) // 2 // PATCH] = kind
    return targets.reshape(2, -1)


def question(rng, scene):
    """Draw a question about the scene: (prompt, answer). `answer en how many cats are there?`"""
    present = list(dict.fromkeys(scene.kinds))
    kind = present[rng.integers(len(present))]
    if rng.random() < 0.5:
        if rng.random() < 0.15:
            kind = int(rng.integers(len(NAMES)))
        return f"answer en how many {PLURALS[kind]} are there?", str(scene.kinds.count(kind))
    if rng.random() < 0.5:
        kind = int(rng.integers(len(NAMES)))
    return f"answer en is there {phrase(kind, 1)}?", "yes" if kind in present else "no"


def compose_demo(kinds, places, first, second, size=448):
    """A large scene for people to look at, made by hand.

    Args:
        kinds: names, left to right.
        places: (x, y, side, degrees) of each, the centre and the side in pixels.
        first, second: colours (r, g, b) of the sky and of the ground.
        size: side of the picture, pixels.
    """
    ramp = np.linspace(0, 1, size)[:, None, None] ** 1.5
    field = np.asarray(first) * (1 - ramp) + np.asarray(second) * ramp
    picture = Image.fromarray(np.broadcast_to(field, (size, size, 3)).round().astype(np.uint8))
    for name, (x, y, side, degrees) in zip(kinds, places):
        with Image.open(ASSETS / "emoji" / f"{name}.png") as opened:
            sprite = opened.convert("RGBA").resize((side, side), Image.Resampling.LANCZOS)
        sprite = sprite.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
        picture.paste(sprite, (x - sprite.width // 2, y - sprite.height // 2), sprite)
    return picture


DEMOS = {
    "scene": (
        ("cat", "dog", "dog"),
        ((86, 290, 132, 6), (236, 160, 124, -5), (360, 310, 128, 4)),
        (196, 224, 246),
        (176, 214, 150),
    ),
    "scene2": (
        ("bee", "tulip"),
        ((130, 130, 140, -8), (310, 290, 168, 3)),
        (252, 236, 200),
        (150, 200, 140),
    ),
    "scene3": (
        ("rocket", "balloon", "balloon"),
        ((96, 300, 140, 0), (230, 130, 120, 4), (364, 250, 132, -6)),
        (60, 80, 150),
        (240, 190, 170),
    ),
}


def write_sheet(path, columns=10, rows=8):
    """Write a contact sheet of training scenes with their captions."""
    from PIL import ImageDraw

    sheet = Image.new("RGB", (columns * 150, rows * 140), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(columns * rows):
        scene = make_scene(i)
        x, y = i % columns * 150, i // columns * 140
        sheet.paste(Image.fromarray(scene.image), (x + 4, y + 4))
        for box in scene.boxes:
            draw.rectangle([x + 4 + box[0], y + 4 + box[1], x + 3 + box[2], y + 3 + box[3]])
        draw.text((x + 4, y + 118), scene.caption.replace(" and ", "\nand "), fill="black")
    sheet.save(path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sheet", type=Path, help="write a contact sheet here")
    parser.add_argument("--speed", action="store_true", help="measure scenes per second")
    parser.add_argument("--demo", action="store_true", help="write the demo scenes")
    options = parser.parse_args()
    if options.sheet:
        write_sheet(options.sheet)
    if options.speed:
        sprites(), make_scene(0)
        start = time.perf_counter()
        for i in range(2000):
            make_scene(i)
        print(f"{2000 / (time.perf_counter() - start):.0f} scenes per second")
    if options.demo:
        for name, (kinds, *rest) in DEMOS.items():
            compose_demo(kinds, *rest).save(ASSETS / "pictures" / f"{name}.png", optimize=True)
            print(name, "-", caption_of([NAMES.index(kind) for kind in kinds]))


if __name__ == "__main__":
    main()
