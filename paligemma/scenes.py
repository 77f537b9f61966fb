# Exported from notebooks/25_scenes.ipynb — edit there, then run `make sync`.
"""Composed emoji scenes whose captions, counts, places, boxes and masks are true by design."""

import itertools
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from paligemma.detection import encode_boxes
from paligemma.support.backgrounds import SIZE, background
from paligemma.support.sprites import ANGLES, KINDS, NAMES, PLURALS, Sprite, sprites

ASSETS = Path(str(resources.files("paligemma"))) / "assets"
SPLITS = {"train": 0, "validation": 1, "test": 2}
LANGUAGES = ("en", "de", "fr")
NUMBERS = ["no", "one", "two", "three", "four", "five"]
TASKS = ("caption", "count", "where", "is there", "detect")


@dataclass
class Scene:
    """One composed picture and what is true about it."""

    image: np.ndarray  # uint8[112, 112, 3]
    kinds: list[int]  # the kind (index into NAMES) of each object, from left to right
    boxes: np.ndarray  # int[objects, 4], x0 y0 x1 y1 around each object's visible pixels
    owner: np.ndarray  # uint8[112, 112], 1 + the number of the object seen there; 0: background

    @property
    def masks(self) -> np.ndarray:
        """The visible pixels of each object, bool[objects, 112, 112]."""
        return self.owner == np.arange(1, len(self.kinds) + 1)[:, None, None]


def _shared(a, b) -> float:
    """Area that two boxes have in common, as a share of the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(0, width) * max(0, height) / smaller


def compose(image: np.ndarray, chosen: list[Sprite], boxes: np.ndarray) -> Scene:
    """Blend sprites into a background, each over the ones before, and see what stays visible.

    Args:
        image: uint8[112, 112, 3], written into.
        chosen: (colour, alpha, mask) of each object, as `sprites` gives them.
        boxes: int[objects, 4], where each goes.
    """
    owner = np.zeros((SIZE, SIZE), np.uint8)
    for number, ((colour, alpha, mask), box) in enumerate(zip(chosen, boxes.tolist()), 1):
        x0, y0, x1, y1 = box
        under = image[y0:y1, x0:x1]
        under[:] = colour + ((under * (256 - alpha)) >> 8)
        owner[y0:y1, x0:x1][mask] = number
    boxes = boxes.copy()
    pairs = itertools.combinations(range(len(boxes)), 2)
    for i in {i for i, j in pairs if _shared(boxes[i], boxes[j])}:  # drawn before: may be covered
        rows, columns = np.nonzero(owner == i + 1)
        boxes[i] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return Scene(image, [], boxes, owner)


PAIRS = list(itertools.combinations(range(len(NAMES)), 2))
_order = np.random.default_rng(7).permutation(len(PAIRS))
HELD_OUT = frozenset(PAIRS[i] for i in _order[: round(0.1 * len(PAIRS))])  # for the test alone


def has_unseen_pair(kinds: list[int]) -> bool:
    """Whether two of these kinds never stand together in a training scene."""
    return any(pair in HELD_OUT for pair in itertools.combinations(sorted(set(kinds)), 2))


def draw_kinds(rng: np.random.Generator, count: int, unseen: bool = False) -> list[int]:
    """Draw the kinds of `count` objects, left to right: one kind, two, or rarely three.

    With `unseen` they have a pair of HELD_OUT (and count is 2 or more), otherwise none.
    """
    share = rng.random()
    if unseen:
        chosen = list(sorted(HELD_OUT)[rng.integers(len(HELD_OUT))])
    else:
        different = 1 if share < 0.35 else min(count, 3 if share > 0.9 else 2)
        while True:
            chosen = rng.choice(len(NAMES), different, replace=False).tolist()
            if not has_unseen_pair(chosen):
                break
    extra = [chosen[i] for i in rng.integers(0, len(chosen), count - len(chosen))]
    kinds = chosen + extra
    return [kinds[i] for i in rng.permutation(count)]


def place(rng: np.random.Generator, widths, heights, apart=10, overlap=0.12) -> np.ndarray | None:
    """Place boxes of these sides so that "left to right" means something and all stay visible.

    Args:
        rng: where the randomness comes from.
        widths, heights: pixels.
        apart: least distance of two centres along x, pixels.
        overlap: the largest share of the smaller box that two boxes may have in common.

    Returns:
        int[objects, 4] boxes (x0, y0, x1, y1), or None when 60 tries found no place.
    """
    sides = np.stack([widths, heights], 1)
    for _ in range(60):
        x0 = (rng.random(len(sides)) * (SIZE - sides[:, 0] + 1)).astype(int)
        y0 = (rng.random(len(sides)) * (SIZE - sides[:, 1] + 1)).astype(int)
        corners = np.stack([x0, y0], 1)
        boxes = np.concatenate([corners, corners + sides], 1)
        if all(
            abs(a[0] + a[2] - b[0] - b[2]) >= 2 * apart and _shared(a, b) <= overlap
            for a, b in itertools.combinations(boxes.tolist(), 2)
        ):
            return boxes
    return None


def _arrange(rng: np.random.Generator, kinds: list[int]) -> tuple[list[Sprite], np.ndarray]:
    """Draw size, angle and side of each object until all find a place: (sprites, boxes)."""
    table, n = sprites(), len(kinds)
    largest = [13, 13, 10, 7, 5, 4][n]  # the more objects, the smaller
    while True:
        sizes = rng.integers(0, largest, n).tolist()
        angles = [2 if rng.random() < 0.2 else int(rng.integers(0, len(ANGLES))) for _ in kinds]
        mirrored = rng.integers(0, 2, n).tolist()
        chosen = [table[k][s][a][m] for k, s, a, m in zip(kinds, sizes, angles, mirrored)]
        boxes = place(rng, [c[2].shape[1] for c in chosen], [c[2].shape[0] for c in chosen])
        if boxes is not None:
            return chosen, boxes


def make_scene(
    index: int,
    split: str = "train",
    seed: int = 0,
    objects: tuple[int, ...] = (1, 2, 3, 4, 5),
    unseen: bool = False,
) -> Scene:
    """Compose scene `index`: the same arguments give the same scene, always, anywhere.

    Args:
        index: which scene, 0 and up.
        split: "train", "validation" or "test".
        seed: seed of the world.
        objects: the numbers of objects to draw from.
        unseen: True for a scene with a pair of kinds that training never shows (test only).

    Raises:
        ValueError: for an unknown split, or unseen pairs outside the test split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if unseen and split != "test":
        raise ValueError(f"unseen pairs are for the test split, got {split!r}; leave unseen=False")
    rng = np.random.default_rng((seed, SPLITS[split], index, int(unseen)))
    count = objects[rng.integers(len(objects))]
    kinds = draw_kinds(rng, max(2, count) if unseen else count, unseen)
    chosen, boxes = _arrange(rng, kinds)
    order = np.argsort(boxes[:, 0] + boxes[:, 2], kind="stable").tolist()
    scene = compose(background(rng), [chosen[i] for i in order], boxes[order])
    scene.kinds = [kinds[i] for i in order]
    return scene


def phrase(kind: int, count: int, language: str = "en") -> str:
    """`a cat`, `an owl`, `two dogs`; in other languages CLDR's name: `Eule`, `chouette ×2`."""
    if language != "en":
        return KINDS[kind][language] + (f" ×{count}" if count > 1 else "")
    article = "an" if NAMES[kind][0] in "aeiou" else "a"
    return f"{article} {NAMES[kind]}" if count == 1 else f"{NUMBERS[count]} {PLURALS[kind]}"


def caption_of(kinds: list[int], language: str = "en") -> str:
    """The caption of objects of these kinds, given from left to right: `a cat and two dogs`."""
    phrases = [phrase(kind, kinds.count(kind), language) for kind in dict.fromkeys(kinds)]
    if language != "en":
        return ", ".join(phrases)
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if phrases[:-1] else phrases)


def place_name(box) -> str:
    """Which ninth of the picture the centre of a box lies in: `top left`, `middle`, `right` …"""
    x, y = (box[0] + box[2]) * 1.5 / SIZE, (box[1] + box[3]) * 1.5 / SIZE
    vertical, horizontal = ["top", "", "bottom"][int(y)], ["left", "", "right"][int(x)]
    return f"{vertical} {horizontal}".strip() or "middle"


def clear_place(box, margin: int = 3) -> bool:
    """Whether a box's centre is at least `margin` pixels from the lines between the ninths."""
    centres = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    return all(abs(c - line) >= margin for c in centres for line in (SIZE / 3, 2 * SIZE / 3))


def _where(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    """Ask for the place of an object that is the only one of its kind and has a clear one."""
    single = [k for k in dict.fromkeys(scene.kinds) if scene.kinds.count(k) == 1]
    clear = [k for k in single if clear_place(scene.boxes[scene.kinds.index(k)])]
    if clear:
        kind = clear[rng.integers(len(clear))]
        answer = place_name(scene.boxes[scene.kinds.index(kind)])
        return f"answer en where is the {NAMES[kind]}?", answer


def _detect(name: str, scene: Scene, asked: list[int], words: list[str] | None) -> tuple[str, str]:
    """Ask for the objects of kinds: kind by kind as asked, each from left to right."""
    words = encode_boxes(scene.boxes, SIZE, SIZE) if words is None else words
    found = [(k, word) for k, word in zip(scene.kinds, words) if k in asked]
    found.sort(key=lambda pair: asked.index(pair[0]))
    answer = " ; ".join(f"{word} {NAMES[k]}" for k, word in found)
    return f"{name} {' ; '.join(NAMES[k] for k in asked)}", answer


def task(
    rng: np.random.Generator,
    scene: Scene,
    name: str = "caption",
    language: str = "en",
    words: list[str] | None = None,
) -> tuple[str, str]:
    """Ask one thing about a scene: (prompt, true answer).

    Args:
        rng: draws what is asked about.
        scene: what is seen.
        name: one of TASKS, or "segment". A scene in which no object has a clear place is asked
            "count" instead of "where".
        language: of a caption: one of LANGUAGES.
        words: each object's box and mask, as `encode_segments` writes them; None: its box.

    Raises:
        ValueError: for a task or a language that is not there.
    """
    if name not in (*TASKS, "segment"):
        raise ValueError(f"task must be one of {', '.join(TASKS)}, segment; got {name!r}")
    if language not in LANGUAGES:
        raise ValueError(f"language must be one of {', '.join(LANGUAGES)}, got {language!r}")
    present = list(dict.fromkeys(scene.kinds))
    kind = present[rng.integers(len(present))]
    if name == "caption":
        return f"caption {language}", caption_of(scene.kinds, language)
    if name == "where" and (asked := _where(rng, scene)):
        return asked
    if name == "is there":
        if rng.random() < 0.5:
            kind = int(rng.choice([k for k in range(len(NAMES)) if k not in present]))
        return f"answer en is there {phrase(kind, 1)}?", "yes" if kind in present else "no"
    if name in ("detect", "segment"):  # 20 tokens an object: masks of one kind, as a rule
        several = rng.random() < (0.5 if name == "detect" else 0.2)
        return _detect(name, scene, present if several else [kind], words)
    if rng.random() < 0.1:
        kind = int(rng.integers(len(NAMES)))
    return f"answer en how many {PLURALS[kind]} are there?", str(scene.kinds.count(kind))


class SceneDataset(torch.utils.data.Dataset):
    """Scenes with one question each, made on the fly; item `i` is always the same.

    Args:
        length: number of scenes.
        split, seed, objects, unseen: as in `make_scene`.
        tasks: what to ask, drawn evenly; names repeat to be asked more often.
        languages: of the captions, drawn evenly.

    `dataset[i]` is a dict: "image" uint8[112, 112, 3], "prefix" (the question), "suffix" (its
    answer), "task" and "scene" (`Scene`).
    """

    def __init__(
        self,
        length: int,
        split: str = "train",
        seed: int = 0,
        tasks: tuple[str, ...] = TASKS,
        languages: tuple[str, ...] = LANGUAGES,
        objects: tuple[int, ...] = (1, 2, 3, 4, 5),
        unseen: bool = False,
    ):
        self.length, self.split, self.seed = length, split, seed
        self.tasks, self.languages = tasks, languages
        self.objects, self.unseen = objects, unseen

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        rng = np.random.default_rng((self.seed, SPLITS[self.split], index, 9))
        name = self.tasks[rng.integers(len(self.tasks))]
        scene = make_scene(index, self.split, self.seed, self.objects, self.unseen)
        language = self.languages[rng.integers(len(self.languages))]
        prefix, suffix = task(rng, scene, name, language)
        name = "count" if "how many" in prefix else name  # "where" may have become it
        item = {"image": scene.image, "prefix": prefix, "suffix": suffix}
        return item | {"task": name, "scene": scene}
