"""Compose emoji scenes with true captions: the data of the shipped tiny model.

A scene is 112 x 112 pixels: a background (colour gradient, noise, soft blobs or a crop of a
photograph) and one to four emoji, ordered from left to right, of one, two or rarely three kinds.
Scene `index` of a split depends on (seed, split, index) and on nothing else. One pair of kinds in
ten never appears together in training or validation; see `HELD_OUT`.

    python tools/scenes.py --demo                    # writes paligemma/assets/pictures/scene*.png
"""

import argparse
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from paligemma.scenes import (  # what this world shares with lesson 23's, by its names here
    ANGLES,
    ASSETS,
    HELD_OUT,  # noqa: F401
    NAMES,
    PATCH,  # noqa: F401
    PLURALS,
    SCALES,
    SIZE,  # noqa: F401
    SPLITS,
    background,
    caption_of,
    draw_kinds,
    has_unseen_pair,
    patch_targets,  # noqa: F401
    phrase,
    place,
)


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
        return has_unseen_pair(self.kinds)


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
        boxes = place(
            rng, [c.shape[1] for c, _ in chosen], [c.shape[0] for c, _ in chosen], overlap=0.1
        )
        if boxes is not None:
            break
    image = background(rng)
    for (colour, alpha), (x0, y0, x1, y1) in zip(chosen, boxes):
        under = image[y0:y1, x0:x1]
        under[:] = colour + ((under * (256 - alpha)) >> 8)
    order = np.argsort(boxes[:, 0] + boxes[:, 2], kind="stable")
    return Scene(image, [kinds[i] for i in order], boxes[order])


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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", action="store_true", help="write the demo scenes")
    options = parser.parse_args()
    if options.demo:
        for name, (kinds, *rest) in DEMOS.items():
            compose_demo(kinds, *rest).save(ASSETS / "pictures" / f"{name}.png", optimize=True)
            print(name, "-", caption_of([NAMES.index(kind) for kind in kinds]))


if __name__ == "__main__":
    main()
