# Exported from notebooks/25_scenes.ipynb — edit there, then run `make sync`.
"""Composed emoji scenes whose captions, counts, places, boxes and masks are true by design."""

import itertools
import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from paligemma.detection import encode_boxes

ASSETS = Path(resources.files("paligemma") / "assets")
SIZE = 112  # pixels
PATCH = 14  # pixels
SPLITS = {"train": 0, "validation": 1, "test": 2}
LANGUAGES = ("en", "de", "fr")
NUMBERS = ["no", "one", "two", "three", "four", "five"]
SCALES = list(range(22, 53, 3))  # sprite side in pixels
ANGLES = [-16, -8, 0, 8, 16]  # degrees
BACKGROUNDS = ("coffee", "astronaut")  # not "cat": a cat in the background would be a lie

KINDS = json.loads((ASSETS / "emoji" / "kinds.json").read_text(encoding="utf-8"))
NAMES = [kind["name"] for kind in KINDS]
PLURALS = [kind["plural"] for kind in KINDS]


@lru_cache(maxsize=1)
def sprites():
    """Every sprite at every scale and angle, plain and mirrored, as `_render` gives it.

    Returns:
        nested lists `[kind][scale][angle][mirrored]`.
    """
    table = []
    for name in NAMES:
        with Image.open(ASSETS / "emoji" / f"{name}.png") as opened:
            picture = opened.convert("RGBA").convert("RGBa")  # premultiplied
        table.append([[_render(picture, s, a) for a in ANGLES] for s in SCALES])
    return table


def _render(picture, side, angle):
    """Turn, scale and crop one sprite: ((colour, alpha, mask), the same mirrored).

    colour is premultiplied, uint16[h, w, 3]; alpha uint16[h, w, 1], 0 to 256; mask bool[h, w].
    """
    turned = picture.rotate(angle, Image.Resampling.BICUBIC, expand=True) if angle else picture
    factor = side / picture.width
    size = [max(1, round(length * factor)) for length in turned.size]
    pixels = np.asarray(turned.resize(size, Image.Resampling.LANCZOS), dtype=np.uint16)
    rows, columns = np.nonzero(pixels[..., 3] >= 128)
    pixels = pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    alpha = pixels[..., 3:]
    views = []
    for view in (slice(None), slice(None, None, -1)):
        a = np.ascontiguousarray(alpha[:, view])
        colour = np.minimum(pixels[:, view, :3], a)
        views.append((colour, a + (a >> 7), a[..., 0] >= 128))
    return views


@dataclass
class Scene:
    """One composed picture and what is true about it.

    Args:
        image: uint8[112, 112, 3].
        kinds: the kind (index into NAMES) of each object, from left to right.
        boxes: int[objects, 4], x0 y0 x1 y1 around each object's visible pixels, in pixels. A
            strip with a word (`write`) hides pixels, too, but leaves the boxes as they are.
        owner: uint8[112, 112], 1 + the number of the object seen at each pixel; 0 is background.
        word: a word written at the bottom of the picture, or "".
    """

    image: np.ndarray
    kinds: list[int]
    boxes: np.ndarray
    owner: np.ndarray
    word: str = ""

    @property
    def masks(self) -> np.ndarray:
        """The visible pixels of each object, bool[objects, 112, 112]."""
        return self.owner == np.arange(1, len(self.kinds) + 1)[:, None, None]


def place(rng: np.random.Generator, widths, heights, apart: int = 10, overlap: float = 0.12):
    """Place boxes so that their centres are apart from left to right and overlap little.

    Args:
        rng: where the randomness comes from.
        widths, heights: sides of the objects, pixels.
        apart: least distance of two centres along x, pixels: "left to right" must mean something.
        overlap: the largest share of the smaller box that two boxes may have in common.

    Returns:
        int[objects, 4] boxes (x0, y0, x1, y1), or None when 60 tries found no place.
    """
    widths, heights = np.asarray(widths), np.asarray(heights)
    for _ in range(60):
        x0 = (rng.random(len(widths)) * (SIZE - widths + 1)).astype(int)
        y0 = (rng.random(len(widths)) * (SIZE - heights + 1)).astype(int)
        boxes = list(zip(x0.tolist(), y0.tolist(), (x0 + widths).tolist(), (y0 + heights).tolist()))
        if all(
            abs(a[0] + a[2] - b[0] - b[2]) >= 2 * apart and _shared(a, b) <= overlap
            for a, b in itertools.combinations(boxes, 2)
        ):
            return np.asarray(boxes)
    return None


def _shared(a, b):
    """Area that two boxes have in common, as a share of the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return width * height / smaller


def compose(image: np.ndarray, chosen: list, boxes: np.ndarray) -> Scene:
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


@lru_cache(maxsize=1)
def photographs():
    """The photographs that backgrounds are cropped from, at two sizes, uint8[h, w, 3] each."""
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


def background(rng: np.random.Generator) -> np.ndarray:
    """Draw a background: plain, gradient, blob, noise or a crop of a photograph.

    Returns:
        uint8[112, 112, 3].
    """
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


def _held_out_pairs(seed=7, share=0.1):
    """Draw the pairs of kinds that only the test split may show together."""
    pairs = list(itertools.combinations(range(len(NAMES)), 2))
    order = np.random.default_rng(seed).permutation(len(pairs))
    return frozenset(pairs[i] for i in order[: round(share * len(pairs))])


HELD_OUT = _held_out_pairs()


def has_unseen_pair(kinds: list[int]) -> bool:
    """Whether two of these kinds never stand together in a training scene."""
    return any(pair in HELD_OUT for pair in itertools.combinations(sorted(set(kinds)), 2))


def draw_kinds(rng: np.random.Generator, count: int, unseen: bool = False) -> list[int]:
    """Draw the kinds of `count` objects, left to right: one kind, two, or rarely three.

    Args:
        rng: where the randomness comes from.
        count: number of objects, 1 to 5.
        unseen: with a pair of HELD_OUT (needs two objects or more); otherwise with none.
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
            if not has_unseen_pair(chosen):
                break
    extra = [chosen[i] for i in rng.integers(0, len(chosen), count - len(chosen))]
    kinds = chosen + extra
    return [kinds[i] for i in rng.permutation(count)]


def _arrange(rng, kinds):
    """Draw size, angle and side of each object until all find a place: (sprites, boxes)."""
    table, n = sprites(), len(kinds)
    largest = [11, 11, 9, 6, 5, 4][n]  # the more objects, the smaller
    while True:
        sizes = rng.integers(0, largest, n).tolist()
        angles = rng.integers(0, len(ANGLES), n).tolist()
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
    written: float = 0.0,
) -> Scene:
    """Compose scene `index`: the same arguments give the same scene, always, anywhere.

    Args:
        index: which scene, 0 and up.
        split: "train", "validation" or "test".
        seed: seed of the world.
        objects: the numbers of objects to draw from.
        unseen: True for a scene with a pair of kinds that training never shows (test only).
        written: share of scenes with a word written at the bottom, 0 to 1.

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
    if written and rng.random() < written:
        write(scene, rng)
    return scene


def patch_targets(scene: Scene) -> np.ndarray:
    """What each of the 64 patches shows: a vision tower can be warmed up on this.

    Returns:
        int64[2, 64]: row 0 the kind whose box covers the patch's centre, row 1 the kind whose
        own centre lies in the patch; len(NAMES) where there is none.
    """
    side, half = SIZE // PATCH, PATCH // 2
    targets = np.full((2, side, side), len(NAMES), dtype=np.int64)
    for kind, (x0, y0, x1, y1) in zip(scene.kinds, scene.boxes.tolist()):
        rows = slice((y0 + half - 1) // PATCH, (y1 + half - 1) // PATCH)
        columns = slice((x0 + half - 1) // PATCH, (x1 + half - 1) // PATCH)
        targets[0, rows, columns] = kind
    for kind, (x0, y0, x1, y1) in zip(scene.kinds, scene.boxes.tolist()):
        targets[1, (y0 + y1) // 2 // PATCH, (x0 + x1) // 2 // PATCH] = kind
    return targets.reshape(2, -1)


WORDS = [name.upper() for name in NAMES if len(name) <= 5]


def write(scene: Scene, rng: np.random.Generator) -> None:
    """Write a word on a light strip at the bottom of the picture, for the task `ocr`."""
    scene.word = WORDS[rng.integers(len(WORDS))]
    picture = Image.fromarray(scene.image)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, SIZE - PATCH, SIZE, SIZE), fill=(248, 246, 240))
    font = ImageFont.load_default(size=13)  # Pillow's own font: no file to find
    x = int(rng.integers(2, 50))
    draw.text((x, SIZE - PATCH - 1), scene.word, fill=(20, 20, 30), font=font)
    scene.image = np.asarray(picture).copy()
    scene.owner[SIZE - PATCH :] = 0


def phrase(kind: int, count: int, language: str = "en") -> str:
    """`a cat`, `an owl`, `two dogs`; in other languages CLDR's name: `Eule`, `chouette ×2`."""
    if language != "en":
        name = KINDS[kind][language]
        return name if count == 1 else f"{name} ×{count}"
    if count == 1:
        return f"{'an' if NAMES[kind][0] in 'aeiou' else 'a'} {NAMES[kind]}"
    return f"{NUMBERS[count]} {PLURALS[kind]}"


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


def locations(box) -> str:
    """A box as the four location tokens of lesson 19: `<loc…>` for y0, x0, y1, x1."""
    return encode_boxes([box], SIZE, SIZE)[0]


TASKS = ("caption", "count", "where", "is there", "detect")


def _where(rng, scene, present):
    """Ask for the place of an object that is the only one of its kind and has a clear one."""
    single = [k for k in present if scene.kinds.count(k) == 1]
    clear = [k for k in single if clear_place(scene.boxes[scene.kinds.index(k)])]
    if clear:
        kind = clear[rng.integers(len(clear))]
        box = scene.boxes[scene.kinds.index(kind)]
        return f"answer en where is the {NAMES[kind]}?", place_name(box)


def _detect(name, scene, asked, words):
    """Ask for the objects of kinds: kind by kind as asked, each from left to right."""
    words = [locations(box) for box in scene.boxes] if words is None else words
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
    """Ask one thing about a scene, with its true answer.

    Args:
        rng: draws what is asked about.
        scene: the scene.
        name: one of TASKS, or "segment" or "ocr". A scene in which no object has a clear place
            is asked "count" instead of "where".
        language: of a caption: one of LANGUAGES.
        words: how to write each object for "detect" and "segment", such as `encode_segments`
            gives; None: its box, without a mask.

    Returns:
        (prompt, answer).

    Raises:
        ValueError: for a task or a language that is not there.
    """
    if name not in (*TASKS, "segment", "ocr"):
        raise ValueError(f"task must be one of {', '.join(TASKS)}, segment, ocr; got {name!r}")
    if language not in LANGUAGES:
        raise ValueError(f"language must be one of {', '.join(LANGUAGES)}, got {language!r}")
    present = list(dict.fromkeys(scene.kinds))
    kind = present[rng.integers(len(present))]
    if name == "caption":
        return f"caption {language}", caption_of(scene.kinds, language)
    if name == "ocr":
        return "ocr", scene.word
    if name == "where" and (asked := _where(rng, scene, present)):
        return asked
    if name == "is there":
        if rng.random() < 0.5:
            kind = int(rng.choice([k for k in range(len(NAMES)) if k not in present]))
        truth = "yes" if kind in present else "no"
        return f"answer en is there {phrase(kind, 1)}?", truth
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
        split: "train", "validation" or "test".
        seed: seed of the world.
        tasks: what to ask, drawn evenly; names repeat to be asked more often.
        languages: of the captions, drawn evenly.
        objects, unseen, written: as in `make_scene`.

    `dataset[i]` is a dict: "image" uint8[112, 112, 3], "prompt", "answer", "task" (str) and
    "scene" (`Scene`).
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
        written: float = 0.0,
    ):
        self.length, self.split, self.seed = length, split, seed
        self.tasks, self.languages = tasks, languages
        self.how = {"objects": objects, "unseen": unseen, "written": written}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        rng = np.random.default_rng((self.seed, SPLITS[self.split], index, 9))
        name = self.tasks[rng.integers(len(self.tasks))]
        how = self.how | ({"written": 1.0} if name == "ocr" else {})
        scene = make_scene(index, self.split, self.seed, **how)
        language = self.languages[rng.integers(len(self.languages))]
        prompt, answer = task(rng, scene, name, language)
        return {
            "image": scene.image,
            "prompt": prompt,
            "answer": answer,
            "task": "count" if "how many" in prompt else name,  # "where" may have become it
            "scene": scene,
        }
