# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags
#     comment_magics: false
#     notebook_metadata_filter: kernelspec
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["navigation"]
# [← Inference](24_inference.ipynb) | [contents](00_overview.ipynb) | [Contrastive learning →](26_contrastive.ipynb)

# %% [markdown]
# # 25 · Scenes: where do a million captioned pictures come from?
#
# *45 minutes* · part V, Learning
#
# **What you will be able to do**
#
# - blend one picture into another by hand, pixel by pixel;
# - get captions, counts, places, boxes and masks that are true by construction;
# - split data by **seed** *and* by combination, and say what each split measures;
# - make random data that is the same with any number of workers.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("scenes")

# %% [markdown]
# ## Setup
#
# From [lesson 19](19_detection.ipynb) come the location tokens, from [lesson 01](01_plotting.ipynb) the drawing. `kinds.json`
# lists 48 Noto emoji with their names; each has a picture of 64 × 64 pixels with transparency. The cells
# that begin with `#| export` become [scenes.py](../paligemma/scenes.py).

# %%
#| export
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

# %% tags=["setup"]
import hashlib
import json
import textwrap
import time
import warnings
from collections import Counter

import matplotlib.pyplot as plt
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from paligemma.plotting import show_heatmap, show_images
from paligemma.support import backgrounds
from paligemma.support.course import check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS, draw_boxes, draw_caption, draw_masks

warnings.filterwarnings("ignore", message="This DataLoader will create")  # on few cores

# %% [markdown]
# ## The problem
#
# PaliGemma learned from about a billion examples: pictures with texts, many of them found on the web. Such texts are noisy,
# nobody counted the objects, and nobody drew the masks. Hand labels are true but dear: a careful outline takes a minute or
# more.
#
# But if **we compose the picture**, we know everything in it before it exists.

# %% tags=["hide-input"]
told = "caption: a cat and two dogs\nhow many dogs? 2\nis there a bee? no"
draw_caption(sample_picture("scene").resize((300, 300)), told)

# %% [markdown]
# Nobody looked at this picture to write these lines. First came the list `cat, dog, dog`; the picture *and* the text
# were made from it, a **scene**. This is truth by construction. Its price: a model trained in this small world knows nothing
# else.

# %% [markdown]
# ## By hand: one pixel
#
# A sprite pixel has a colour and an opacity **alpha** α, from 0 (glass) to 1 (paint). Over a
# background pixel it gives
#
# $$\text{out} = \alpha \cdot \text{colour} + (1 - \alpha) \cdot \text{background}.$$
#
# Orange (240, 160, 0), three quarters opaque, over blue (40, 80, 200). Take a pencil first.

# %%
orange, blue, alpha = np.array([240, 160, 0]), np.array([40, 80, 200]), 0.75
print("out =", alpha * orange + (1 - alpha) * blue)

# %% [markdown]
# ### Premultiplied
#
# Store the product α · colour once: the colour is then **premultiplied**. And count alpha in whole steps 0 … 256, so that
# dividing by 256 is a shift of 8 bits. Integers are all that is left.

# %%
a = 192  # 0.75 · 256
premultiplied = orange * a >> 8
print("stored:", premultiplied, " out =", premultiplied + (blue * (256 - a) >> 8))
assert np.array_equal(premultiplied + (blue * (256 - a) >> 8), alpha * orange + (1 - alpha) * blue)

# %% [markdown]
# There is a second reason. A transparent pixel still has a colour, though nobody sees it: say red. Resize, and the
# hidden colour bleeds into the edge, unless it was multiplied by its alpha (zero) first. Two pixels become one:

# %%
yellow, red = np.array([255, 215, 60]), np.array([255, 0, 0])  # alpha 1 and alpha 0
as_it_is = (yellow + red) / 2 * 0.5  # the mean colour, times the mean alpha
multiplied_first = (yellow * 1.0 + red * 0.0) / 2
print("as it is:", as_it_is, " premultiplied:", multiplied_first)
assert np.array_equal(multiplied_first, 0.5 * yellow) and as_it_is[1] == 0.25 * yellow[1]

# %% [markdown]
# Half a pixel of yellow should be half of yellow. As it is, it has lost half of its green: a red rim.

# %% [markdown]
# ## As a loop: one sprite
#
# The sprites come ready ([sprites.py](../paligemma/support/sprites.py)): every kind at thirteen sizes and five angles, plain and mirrored.
# Each is a triple: premultiplied colour, alpha, and a **mask** of the pixels that count as the object (alpha at least half),
# cropped to that mask.

# %%
owl = sprites()[NAMES.index("owl")]
colour, alpha, mask = owl[3][2][0]  # fourth size, upright, not mirrored
assert len(owl) == 13 and len(owl[3]) == 5 and np.array_equal(mask, alpha[..., 0] >= 128)
dog = sprites()[NAMES.index("dog")][6][1][0]
print("owl:", colour.shape, alpha.shape, mask.shape, f"{mask.mean():.0%} of its box is owl")

# %% [markdown]
# Now walk over its pixels. Besides the picture we keep an **owner map**: for each pixel the number of the object seen
# there, 0 for background. Whoever paints last owns the pixel.


# %%
def paste_by_loop(image, owner, sprite, x0, y0, number):
    colour, alpha, mask = sprite
    for y, x in np.ndindex(mask.shape):
        below, a = image[y0 + y, x0 + x].astype(int), int(alpha[y, x, 0])
        image[y0 + y, x0 + x] = colour[y, x] + (below * (256 - a) >> 8)
        if mask[y, x]:
            owner[y0 + y, x0 + x] = number


slow, slow_owner = np.full((SIZE, SIZE, 3), 200, np.uint8), np.zeros((SIZE, SIZE), np.uint8)
paste_by_loop(slow, slow_owner, (colour, alpha, mask), 30, 40, 1)
paste_by_loop(slow, slow_owner, dog, 44, 38, 2)
print(slow_owner[42:66:4, 30:80:3])

# %% [markdown]
# ## Vectorised
#
# A scene is a small record:


# %%
#| export
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


# %% [markdown]
# NumPy does a whole sprite in one line, on a window of the picture. The window is a *view*: writing into it writes into the
# picture. An object drawn earlier may be covered in part; then its box must shrink to what is **visible**: the first and
# last row and column that it still owns.


# %%
#| export
def _shared(a, b) -> float:
    """Area that two boxes have in common, as a share of the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(0, width) * max(0, height) / smaller


# %%
#| export
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


# %% [markdown]
# The loop and `compose` draw the same. The owl was painted first, so its box shrinks.

# %%
boxes = np.array([[30, 40, 30 + mask.shape[1], 40 + mask.shape[0]],
                  [44, 38, 44 + dog[2].shape[1], 38 + dog[2].shape[0]]])  # fmt: skip
ground = np.full((SIZE, SIZE, 3), 200, np.uint8)
fast = compose(ground, [(colour, alpha, mask), dog], boxes)
assert np.array_equal(fast.image, slow) and np.array_equal(fast.owner, slow_owner)
print("owl's box", boxes[0].tolist(), "→ visible", fast.boxes[0].tolist())

# %% [markdown]
# Masks are `owner == number`; each pixel has *one* owner, so two masks never share one.
#
# ## The module: a world in five steps
#
# ### 1 · Backgrounds
#
# If all were white, "not white" would mean "object". So they vary. How much? An earlier version of this world knew plain
# colours, ramps, noise and two photographs. Of scenes on a chessboard, which it had never seen, its model captioned 31 %
# right. **What never varies in the data is taken for granted.**

# %%
record = json.loads((ASSETS / "tiny" / "curves.json").read_text())
story = " ".join(record["story"].split())
assert "another renderer's scenes on checks were captioned right in 31 %" in story
print(len(backgrounds.PATTERNS), "patterns,", len(backgrounds.PHOTOGRAPHS), "photographs")
assert "cat" not in backgrounds.PHOTOGRAPHS and "astronaut" in backgrounds.PHOTOGRAPHS
assert {"cat", "rocket"} <= set(NAMES)

# %% [markdown]
# Now there are patterns ([backgrounds.py](../paligemma/support/backgrounds.py)). The cat photograph is left out: a scene that shows a cat
# nobody counted would be a lie.


# %% tags=["hide-input"]
rng = np.random.default_rng(11)
families = (*backgrounds.SMOOTH, backgrounds.photograph, *backgrounds.PATTERNS)
names = [family.__name__ for family in families]
show_images([family(rng) for family in families], names, columns=6, height=1.4)

# %% [markdown]
# Look closely: behind the astronaut stands a space shuttle, and *rocket* is one of our 48 kinds. On this background the
# answer "no rocket" is not quite true. We found it by looking; no assert did.
#
# ### 2 · Who stands together?
#
# 48 kinds make 1,128 pairs. A tenth of them we hold out: training never shows these two together, only the test split
# may. So the test can ask: has the model learned *cat* and *key*, or the pictures by heart?


# %%
#| export
PAIRS = list(itertools.combinations(range(len(NAMES)), 2))
_order = np.random.default_rng(7).permutation(len(PAIRS))
HELD_OUT = frozenset(PAIRS[i] for i in _order[: round(0.1 * len(PAIRS))])  # for the test alone


def has_unseen_pair(kinds: list[int]) -> bool:
    """Whether two of these kinds never stand together in a training scene."""
    return any(pair in HELD_OUT for pair in itertools.combinations(sorted(set(kinds)), 2))


# %% [markdown]
# Several objects are of one kind, of two, or rarely of three:


# %%
#| export
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


# %%
print(len(HELD_OUT), "of", len(PAIRS), "pairs")

# %% tags=["hide-input"]
matrix = np.zeros((len(NAMES), len(NAMES)))
for i, j in HELD_OUT:
    matrix[i, j] = matrix[j, i] = 1
missing = matrix.sum(0)
assert missing.max() < 10
figure, axis = plt.subplots(figsize=(5.4, 4.8), layout="constrained")
show_heatmap(matrix[:20, :20], "dark: pairs that training never shows (20 kinds)", ax=axis)
axis.set_xticks(range(20), NAMES[:20], rotation=90)
axis.set_yticks(range(20), NAMES[:20])
save_figure(figure, "25_held_out")

# %% [markdown]
# Every kind keeps at least 38 of 47 partners in training; only combinations are new.
#
# ### 3 · Where?
#
# Random places are tried until all centres are 10 pixels apart from left to right, which gives "from left to right" a
# meaning, and until no box covers more than 12 % of a smaller one, which keeps every object visible.


# %%
#| export
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


# %% [markdown]
# When 60 tries fail, sizes are drawn again:


# %%
#| export
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


# %% [markdown]
# ### 4 · The scene
#
# All randomness comes from one generator. Its **seed** is made of the world's seed, the split, the index and `unseen`. No clock,
# no global state: scene 7 is scene 7 in any order, in any process, after any restart.


# %%
#| export
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


# %%
scene = make_scene(465, "validation")
print([NAMES[kind] for kind in scene.kinds], scene.boxes.tolist())
assert np.array_equal(make_scene(465, "validation").image, scene.image)

# %% tags=["hide-input"]
labels = [NAMES[kind] for kind in scene.kinds]
large = lambda array: np.asarray(array).repeat(4, 0).repeat(4, 1)  # 112 → 448 pixels
views = [scene.image.repeat(4, 0).repeat(4, 1)]
views.append(draw_boxes(views[0], scene.boxes * 4, labels))
views.append(draw_masks(views[0], [large(mask) for mask in scene.masks], labels))
views.append(np.array(plt.get_cmap("viridis")(large(scene.owner) / len(labels)))[..., :3])
titles = ["the picture", "boxes", "masks", "the owner map"]
save_figure(show_images(views, titles, columns=2, height=3.0), "25_truth.png")

# %% [markdown]
# One array holds both: boxes and masks are read from the owner map.
#
# ### 5 · Words
#
# The caption lists kinds from left to right. German and French names come from the Unicode project's tables (CLDR), which
# name each emoji in many languages, without plurals; so we write `×2`: better plain than wrong.


# %%
#| export
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


# %% [markdown]
# Places are the ninths of the picture. An object whose centre is within three pixels of a line between ninths is not
# asked about: an honest person would answer "well, between".


# %%
#| export
def place_name(box) -> str:
    """Which ninth of the picture the centre of a box lies in: `top left`, `middle`, `right` …"""
    x, y = (box[0] + box[2]) * 1.5 / SIZE, (box[1] + box[3]) * 1.5 / SIZE
    vertical, horizontal = ["top", "", "bottom"][int(y)], ["left", "", "right"][int(x)]
    return f"{vertical} {horizontal}".strip() or "middle"


def clear_place(box, margin: int = 3) -> bool:
    """Whether a box's centre is at least `margin` pixels from the lines between the ninths."""
    centres = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    return all(abs(c - line) >= margin for c in centres for line in (SIZE / 3, 2 * SIZE / 3))


# %% [markdown]
# Two questions need more care: *where*, and *detect*, whose boxes become location tokens.


# %%
#| export
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


# %% [markdown]
# And one function asks everything. Yes and no are balanced by design, and one time in ten we count a kind drawn from all,
# which is mostly not there.


# %%
#| export
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


# %%
rng = np.random.default_rng(5)
for name in TASKS:
    for language in LANGUAGES if name == "caption" else ("en",):
        print(*task(rng, scene, name, language), sep="  →  ")

# %% [markdown]
# Last, a `Dataset`: item `i` is a scene with one question, from a generator of its own: asking something else never
# changes the picture.


# %%
#| export
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


# %% [markdown]
# ## Against the reference
#
# Let Pillow paste the owl through the same alpha: our integers may differ from its rounding by two of 255 steps at most.
# And its `getbbox` must find our boxes in the masks, also where an object is covered in part.

# %%
straight = colour.astype(float) * 255 / np.maximum(alpha - (alpha >> 8), 1)  # not premultiplied
picture = Image.new("RGB", (SIZE, SIZE), (200, 200, 200))
cover = Image.fromarray(np.minimum(alpha[..., 0], 255).astype(np.uint8))
picture.paste(Image.fromarray(straight.clip(0, 255).round().astype(np.uint8)), (30, 40), cover)
alone = compose(np.full((SIZE, SIZE, 3), 200, np.uint8), [(colour, alpha, mask)], boxes[:1])
difference = np.abs(np.asarray(picture).astype(int) - alone.image).max()
print("largest difference:", difference, "of 255")
assert difference <= 2

# %%
overlap = 0
for made in map(make_scene, range(100)):
    assert [list(Image.fromarray(m).getbbox()) for m in made.masks] == made.boxes.tolist()
    overlap += any(_shared(a, b) for a, b in itertools.combinations(made.boxes.tolist(), 2))
print("boxes equal in 100 scenes; some overlap in", overlap, "of them")

# %% [markdown]
# ## See it: a contact sheet
#
# Never train on data you have not looked at. Twelve items:

# %%
data = SceneDataset(400, "validation", objects=(1, 2, 3))
items = [data[i] for i in range(51, 63)]

# %% tags=["hide-input"]
titles = []
for item in items:
    answer = item["suffix"].replace("><", "> <")
    titles.append(textwrap.fill(item["prefix"], 24) + "\n" + textwrap.fill("→ " + answer, 24))
pictures = [Image.fromarray(item["image"]).resize((168, 168)) for item in items]
save_figure(show_images(pictures, titles, columns=4, height=1.9), "25_contact_sheet.png")

# %% [markdown]
# What to notice: read each answer against its picture. Where two touch, as crown and snail do, the right one lies on top: a
# habit of this world that a model may pick up.
#
# ### What can be answered with closed eyes?
#
# A model takes the cheapest road to a low loss. If most answers to "how many" are 1, it learns to say 1. Such a *shortcut*
# looks like skill. So look at how often each answer is true:

# %%
counts = {}
for name in ("count", "where", "is there"):
    asked = SceneDataset(500, "validation", tasks=(name,))
    items = [asked[i] for i in range(len(asked))]
    counts[name] = Counter(item["suffix"] for item in items if item["task"] == name)
    answer, times = counts[name].most_common(1)[0]
    print(f"{name:8}  always {answer!r}: {times / counts[name].total():.0%} right")
assert 0.45 < counts["is there"]["yes"] / counts["is there"].total() < 0.55

# %% tags=["hide-input"]
figure, axes = plt.subplots(1, 3, figsize=(8.4, 3.1), layout="constrained", width_ratios=[6, 9, 3])
for axis, (name, counter) in zip(axes, counts.items()):
    keys, top = sorted(counter), counter.most_common(1)[0][0]
    colours = [COLOURS["language" if key == top else "muted"] for key in keys]
    axis.bar(keys, [counter[key] / counter.total() for key in keys], color=colours)
    axis.set_title({"count": "how many …?", "where": "where …?", "is there": "is there …?"}[name])
    axis.tick_params(axis="x", rotation=60 if name == "where" else 0)
axes[0].set_ylabel("share of answers")
save_figure(figure, "25_priors")

# %% [markdown]
# A score near an orange bar can be had with closed eyes. [Lesson 28](28_evaluation.ipynb) puts these numbers beside every score.
#
# ### The same with any number of workers; different in any split
#
# A `DataLoader` can make items in several processes. We compare a fingerprint of each item, then ask whether a picture
# stands in two splits (by *content*, not by seed), and a held-out pair in training.


# %%
def fingerprint(image, *texts):
    return hashlib.sha256(np.ascontiguousarray(image).tobytes() + repr(texts).encode()).hexdigest()


def fingerprints(dataset, workers):
    """One for each item, in order; "fork" because the class was defined in this notebook."""
    how = {"multiprocessing_context": "fork"} if workers else {}
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, **how)
    return [fingerprint(item["image"], item.get("prefix"), item.get("suffix")) for item in loader]


# %%
small = SceneDataset(64)
alike = [fingerprints(small, workers) for workers in (0, 1, 2)]
assert alike[0] == alike[1] == alike[2]
seen = {s: {fingerprint(make_scene(i, s).image) for i in range(200)} for s in SPLITS}
shared = [len(seen[a] & seen[b]) for a, b in itertools.combinations(SPLITS, 2)]
print("0, 1 and 2 workers agree; pictures in two splits:", shared)
assert shared == [0, 0, 0] and not any(has_unseen_pair(make_scene(i).kinds) for i in range(200))

# %% [markdown]
# ## At full size
#
# How much disk would a million scenes need as plain pixels, and how much what they are made of? And does making keep up with
# training?

# %%
files = [ASSETS / "emoji" / f"{name}.png" for name in NAMES]
files += [ASSETS / "pictures" / f"{name}.jpg" for name in backgrounds.PHOTOGRAPHS]
made_of = sum(file.stat().st_size for file in files) / 1e6
print(f"a million scenes: {1e6 * SIZE * SIZE * 3 / 1e9:.1f} GB, made of {made_of:.2f} MB")
points, batch = record["points"], record["recipe"]["batch"]
seen = points[-1]["step"] * batch
print(f"the shipped model saw {seen:,} scenes, {seen / record['seconds']:.0f} a second")
assert seen > 1e6 and round(seen / record["seconds"]) == 54

# %% tags=["nbval-ignore-output"]
start = time.perf_counter()
for i in range(300):
    make_scene(i)
print(f"made on one core: {300 / (time.perf_counter() - start):,.0f} scenes a second")

# %% [markdown]
# A million scenes, none seen twice, and no disk: making is far ahead of training. That is because each emoji is turned and
# resized **once**, at the start; a scene only blends.
#
# ## A bug people really make
#
# A colleague finds seeding for each item clumsy: one generator, made once, does it too. With one process no scene repeats.
# With four workers everything runs, without a word. Is it the same data?


# %%
class ColleaguesDataset(Dataset):
    def __init__(self, length):
        self.length, self.rng = length, np.random.default_rng(0)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        kinds = draw_kinds(self.rng, 2)
        chosen, boxes = _arrange(self.rng, kinds)
        return {"image": compose(background(self.rng), chosen, boxes).image}


# %%
different = [len(set(fingerprints(ColleaguesDataset(40), workers))) for workers in (0, 4)]
print("40 scenes; different without workers and with four:", different)
assert different == [40, 10]

# %% [markdown]
# Each worker process starts with a **copy** of the dataset, and so with a copy of the generator. All four draw the same
# scenes: a quarter of the data. No error, no warning; the pictures look fine one by one, and a quarter is easier to learn
# by heart, so the loss looks no worse. And workers start anew in each pass, from the same copy:

# %%
for name, dataset in (("the colleague's", ColleaguesDataset(40)), ("ours", SceneDataset(40))):
    first, second = set(fingerprints(dataset, 2)), set(fingerprints(dataset, 2))
    print(f"{name}: {len(first)} different; the next pass adds {len(second - first)}")
    assert len(first) == (40 if name == "ours" else 20) and first == second

# %% [markdown]
# The check is one line: **count the distinct fingerprints**. Ours has 40. The next pass adds none here either, but by
# intention: item `i` *is* scene `i`. Fresh data means new indices: a longer dataset, or a sampler that goes on counting.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): how many are different?
#
# Each dataset has 60 items. Predict the number of distinct pictures: **(a)** ours, 2 workers; **(b)** the colleague's, no
# workers; **(c)** the colleague's, 2 workers; **(d)** the colleague's, two passes together, no workers.

# %% tags=["exercise"]
answer = None  # your answer, such as (60, 60, 60, 60)


# %% tags=["check"]
def test_1(answer):
    assert isinstance(answer, tuple) and len(answer) == 4, "give four numbers: (a, b, c, d)"
    theirs = ColleaguesDataset(60)
    truth = (
        len(set(fingerprints(SceneDataset(60), 2))),
        len(set(fingerprints(ColleaguesDataset(60), 0))),
        len(set(fingerprints(ColleaguesDataset(60), 2))),
        len(set(fingerprints(theirs, 0) + fingerprints(theirs, 0))),
    )
    for name, guess, count in zip("abcd", answer, truth):
        assert guess == count, f"({name}): which generator does each process draw from?"


check(test_1, answer)

# %% [markdown]
# <details><summary>Hint</summary>
#
# With no workers there is no copy: the one generator goes on, also from pass to pass.
#
# </details>

# %% tags=["solution"]
# Two copies draw the same 30 scenes each; without workers the generator never goes back.
answer = (60, 60, 30, 120)
check(test_1, answer)

# %% [markdown]
# ### Exercise 2 (write): a new question
#
# Write `left_of(scene)`: all true pairs of prompt and answer such as
# `("answer en what is left of the cat?", "dog")`. The answer is the **next** object on the left, by the centres of their
# boxes. Ask only where a person could answer: about the only one of its kind, with something on its left.


# %% tags=["exercise"]
def left_of(scene):
    return None  # [(prompt, answer), …]


# %% tags=["check"]
def test_2(left_of):
    wide = np.array(
        [[20, 0, 40, 20], [10, 40, 90, 100]]
    )  # begins further left, stands on the right
    tried = [make_scene(index, "test") for index in range(60)]
    tried.append(Scene(tried[0].image, [0, 1], wide, tried[0].owner))
    for index, scene in enumerate(tried):
        centres = (scene.boxes[:, 0] + scene.boxes[:, 2]).tolist()
        pairs = left_of(scene)
        assert isinstance(pairs, list) and all(
            isinstance(pair, tuple) and len(pair) == 2 for pair in pairs
        ), "return a list of pairs; an empty one where nothing can be asked"
        about = [prompt for prompt, _ in pairs]
        assert len(about) == len(set(about)), "each question once"
        for prompt, answer in pairs:
            name = prompt.removeprefix("answer en what is left of the ").removesuffix("?")
            assert name in NAMES and len(prompt) == len(name) + 31, (
                f"{prompt!r} is not the question in the form of the example"
            )
            places = [x for x, kind in zip(centres, scene.kinds) if NAMES[kind] == name]
            assert places, f"scene {index} has no {name}"
            assert len(places) == 1, (
                f"scene {index} has {len(places)} of {name}: which one is meant?"
            )
            others = [(x, NAMES[kind]) for x, kind in zip(centres, scene.kinds) if x < places[0]]
            assert others, f"scene {index}: nothing is left of the {name}"
            assert answer in NAMES, f"{answer!r} is no name of a kind"
            assert answer in [other for _, other in others], (
                f"scene {index}: that is not on the left"
            )
            assert answer == max(others)[1], f"scene {index}: something stands between"
        single = [kind for kind in scene.kinds[1:] if scene.kinds.count(kind) == 1]
        assert len(pairs) == len(single), f"scene {index}: a question is missing"


check(test_2, left_of)

# %% [markdown]
# <details><summary>Hint</summary>
#
# In which order are `scene.kinds`? And what is `kinds[i - 1]` for the first object?
#
# </details>


# %% tags=["solution"]
def left_of(scene):
    pairs = []
    for left, kind in itertools.pairwise(scene.kinds):  # kinds stand from left to right
        if scene.kinds.count(kind) == 1:  # of two cats nobody knows which is meant
            pairs.append((f"answer en what is left of the {NAMES[kind]}?", NAMES[left]))
    return pairs


check(test_2, left_of)

# %% [markdown]
# ### Exercise 3 (break): fool the leak check
#
# Our check finds pictures that are equal. Show how little it takes to slip past: write `disguise(image)`, which returns a
# copy with another fingerprint, although no value differs by more than 1 of 255. It must work for *any* picture, and leave
# the given one as it was.


# %% tags=["exercise"]
def disguise(image):
    return None  # your answer


# %% tags=["check"]
def test_3(disguise):
    white, black = (np.full((SIZE, SIZE, 3), level, np.uint8) for level in (255, 0))
    for image in (make_scene(3).image, white, black):
        before = image.copy()
        changed = disguise(image)
        assert isinstance(changed, np.ndarray), "return a picture, as an array"
        assert np.array_equal(image, before), "the given picture was changed, too: copy it first"
        assert changed.dtype == np.uint8 and changed.shape == image.shape, "same form, please"
        gap = np.abs(changed.astype(int) - image).max()
        assert gap <= 1, f"a value differs by {gap}: mind what 255 + 1 is in uint8"
        assert fingerprint(changed) != fingerprint(image), "the check still sees it"


check(test_3, disguise)

# %% [markdown]
# <details><summary>Hint</summary>
#
# One pixel is enough. Which operation changes 0 to 1 and 255 to 254?
#
# </details>


# %% tags=["solution"]
def disguise(image):
    changed = image.copy()
    changed[0, 0, 0] ^= 1  # flips the last bit
    return changed


# Against near copies compare small, blurred pictures, with a tolerance.
check(test_3, disguise)

# %% [markdown]
# ## Summary
#
# - A composed picture comes with its truth; the owner map holds masks, boxes and overlap.
# - Premultiplied alpha makes blending one line of integers, and edges clean.
# - Splits differ by seed; held-out *pairs* measure whether parts were learned, or wholes.
# - What never varies is taken for granted; what is common is guessed.
# - Seed by index. Then order, workers and restarts cannot matter.

# %% [markdown]
# ## Quiz
#
# **1.** Why is it not enough to give the splits different seeds and be done?
#
# <details><summary>Answer</summary>
#
# Different seeds make different pictures, but of the same combinations. A model that knows all pairs by heart would
# score well on them. Only held-out combinations tell.
#
# </details>

# %% [markdown]
# **2.** Why is the cat photograph not among the backgrounds, though a photograph of a clock is?
#
# <details><summary>Answer</summary>
#
# Cats are counted in this world, clocks are not. A model that sees the cat would be punished for saying so.
#
# </details>

# %% [markdown]
# **3.** Why are boxes cropped to visible pixels, and masks cut where another object covers them?
#
# <details><summary>Answer</summary>
#
# The model can only learn what can be seen. A box around hidden parts asks it to guess.
#
# </details>

# %% [markdown]
# ## References
#
# - Porter and Duff 1984, *Compositing Digital Images*: alpha and premultiplied colour.
# - Johnson et al. 2017, *CLEVR*: composed scenes, questions with true answers, and splits by
#   combination.
# - Goyal et al. 2017, *Making the V in VQA Matter*: answer priors, and how to balance them.
# - PyTorch: `torch.utils.data`, section on multi-process loading.

# %% [markdown] tags=["navigation"]
# [← Inference](24_inference.ipynb) | [contents](00_overview.ipynb) | [Contrastive learning →](26_contrastive.ipynb)
