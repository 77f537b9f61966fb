"""What the shipped model is trained on: its recipe, and batches of scenes as tensors."""

from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from paligemma import scenes
from paligemma.mask_codec import MaskCodec
from paligemma.processor import Processor, collate
from paligemma.segmentation import encode_segments
from paligemma.support.files import read_json, shorten
from paligemma.support.runs import check_settings

TINY = scenes.ASSETS / "tiny"
PATCH = 14  # pixels
SIDE = scenes.SIZE // PATCH  # patches
NOTHING = len(scenes.NAMES)  # the class of a patch without an object
KINDS_OF_TEXT = ("short", "detect", "segment")


@dataclass
class Recipe:
    """Everything the run depends on; `recipe.json` holds these fields."""

    seed: int = 0  # of the weights and of the world
    batch: int = 64  # pictures a step, over all processes
    accumulate: int = 1  # parts that a process works through its share in, to save memory
    processes: int = 2  # with which it was made: torchrun's --nproc-per-node
    questions: int = 2  # short ones a picture, besides one for boxes or masks
    short: tuple = ("caption", "caption", "count", "where", "is there")  # drawn from these
    lr: float = 3e-3  # peak rate of Muon; AdamW takes half of it
    look_steps: int = 2000  # in which the tower alone learns what each patch shows
    curriculum: tuple = ((0, (1,)), (300, (1, 2)), (900, (1, 2, 3, 4, 5)))  # since then: objects
    total_steps: int = 8000
    warm_steps: int = 50
    cool_steps: int = 2500
    ema: float = 0.98  # what the running mean of the weights keeps at each meeting
    meet_every: int = 10  # steps between two averages over the processes
    vision_width: int = 128
    vision_layers: int = 4
    text_width: int = 128
    text_layers: int = 4
    text_mlp: int = 256
    softness: float = 6.0  # standard deviation of location targets, bins of 1/1023
    jitter: float = 6.0  # of the noise on location words as inputs, same bins
    segments: float = 0.0  # share of the pictures that are asked for masks instead of boxes
    garble: float = 0.25  # share of the mask words that are read wrong
    bfloat16: bool = False  # products of matrices
    arrived: float = 0.35  # share of pictures that seem to have arrived larger
    lit: float = 0.2  # share of pictures that are brighter, darker or have other contrast

    def __post_init__(self):
        ones = "batch accumulate processes total_steps warm_steps meet_every".split()
        sizes = "vision_width vision_layers text_width text_layers text_mlp".split()
        check_settings(self, dict.fromkeys(ones + sizes, 1), above_zero=("lr", "softness"))
        for name in ("ema", "segments", "garble", "arrived", "lit"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a share, 0 to 1")
        try:
            self.short = tuple(self.short)
            self.curriculum = tuple(
                (int(start), tuple(map(int, n))) for start, n in self.curriculum
            )
            known = self.curriculum[0][0] == 0 and all(set(n) <= {1, 2, 3, 4, 5} and n
                                                       for _, n in self.curriculum)  # fmt: skip
        except (TypeError, ValueError, IndexError):
            known = False
        if not known or not self.short or not set(self.short) <= set(scenes.TASKS):
            raise ValueError(
                "curriculum must be [[0, [1]], [step, [numbers of objects 1 to 5]], …] and short "
                f"names of {', '.join(scenes.TASKS)}; got {shorten((self.curriculum, self.short))}"
            )

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """The recipe in a JSON file; a `ValueError` names what is wrong with it."""
        values = read_json(path, dict)
        if unknown := sorted(set(values) - {field.name for field in fields(cls)}):
            raise ValueError(f"{path}: unknown keys {', '.join(unknown)}; see Recipe")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def patch_targets(scene: scenes.Scene) -> tuple[np.ndarray, np.ndarray]:
    """What each patch shows.

    Returns:
        int64[2, 64]: the kind whose box covers the patch's centre, the kind whose centre lies in
        the patch, NOTHING where there is none; and float32[64, 4]: the box of the former, x0 y0
        x1 y1 from the patch's centre, in patch sides.
    """
    kinds = np.full((2, SIDE, SIDE), NOTHING, np.int64)
    boxes = np.zeros((SIDE, SIDE, 4), np.float32)
    centres = np.arange(SIDE) * PATCH + PATCH // 2
    for kind, box in zip(scene.kinds, scene.boxes):
        x0, y0, x1, y1 = box.tolist()
        rows = slice((y0 + PATCH // 2 - 1) // PATCH, (y1 + PATCH // 2 - 1) // PATCH)
        columns = slice((x0 + PATCH // 2 - 1) // PATCH, (x1 + PATCH // 2 - 1) // PATCH)
        kinds[0, rows, columns] = kind
        boxes[rows, columns, 0::2] = box[0::2] - centres[columns][None, :, None]
        boxes[rows, columns, 1::2] = box[1::2] - centres[rows][:, None, None]
    for kind, (x0, y0, x1, y1) in zip(scene.kinds, scene.boxes.tolist()):
        kinds[1, (y0 + y1) // 2 // PATCH, (x0 + x1) // 2 // PATCH] = kind
    return kinds.reshape(2, -1), boxes.reshape(-1, 4) / PATCH


def disturb(image: np.ndarray, rng: np.random.Generator, recipe: Recipe) -> np.ndarray:
    """A picture as if it had arrived larger and out of step with our pixels, or in other light."""
    if rng.random() < recipe.arrived:
        side = int(rng.integers(130, 300))
        filter_ = Image.Resampling(int(rng.choice([1, 2, 3])))
        picture = Image.fromarray(image).resize((side, side), filter_)
        dx, dy = np.maximum(0, (rng.random(2) - 0.5) * 0.9 * side / scenes.SIZE)
        right, low = (side - 0.001 if d == 0 else side for d in (dx, dy))
        size = (scenes.SIZE, scenes.SIZE)
        image = np.asarray(
            picture.resize(size, Image.Resampling.BICUBIC, box=(float(dx), float(dy), right, low))
        )
    if rng.random() < recipe.lit:
        gain, shift = 0.75 + 0.5 * rng.random(), rng.normal(0, 12)
        image = (image.astype(np.float32) - 128) * gain + 128 + shift
    return np.clip(image, 0, 255).astype(np.uint8)


class Batches:
    """Batches of scenes as tensors; batch `step` depends on its number and on nothing else."""

    def __init__(self, processor: Processor, recipe: Recipe):
        self.recipe, self.pad_id = recipe, processor.tokenizer.pad_id
        self.first_location = processor.tokenizer.encode("<loc0000>")[0]
        self.prefix, self.suffix = cache(processor.encode_prefix), cache(processor.encode_suffix)
        self.codec = MaskCodec.from_pretrained(TINY) if recipe.segments else None

    def pixels(self, made: list[scenes.Scene]) -> torch.Tensor:
        """Pictures of the model's own size to float32[B, 3, 112, 112] in [-1, 1]."""
        pixels = torch.from_numpy(np.stack([scene.image for scene in made])).permute(0, 3, 1, 2)
        return (pixels.float() / 255 - 0.5) / 0.5

    def misread(self, ids: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Move locations by a little and take other codes for some, as the model's own words do."""
        place = ids - self.first_location
        noise = torch.from_numpy(rng.normal(0, self.recipe.jitter, ids.shape)).round().long()
        moved = (place + noise).clamp(0, 1023) + self.first_location
        ids = torch.where((place >= 0) & (place < 1024), moved, ids)
        is_code = (place >= 1024) & (place < 1024 + 128)
        wrong = is_code & (torch.from_numpy(rng.random(ids.shape)) < self.recipe.garble)
        others = ids[is_code][torch.from_numpy(rng.permutation(int(is_code.sum())))]
        return ids.masked_scatter(wrong, others)

    def texts(self, pairs: list, pictures: list[int], rng=None) -> dict:
        """(prompt, answer) pairs, and which picture each is about, as the model takes them.

        With `rng` some of what it reads is `misread`; what it has to say (labels) stays true.
        """
        suffixes = [self.suffix(answer) for _, answer in pairs]
        batch = collate([self.prefix(prompt) for prompt, _ in pairs], suffixes, self.pad_id)
        if rng is not None:
            batch["input_ids"] = self.misread(batch["input_ids"], rng)
        return batch | {"picture": torch.tensor(pictures), "keep": max(map(len, suffixes)) + 1}

    def ask(self, index: int, scene: scenes.Scene, words: list | None) -> tuple:
        """Questions about scene `index`, a list of (prompt, answer) for each of KINDS_OF_TEXT."""
        rng = np.random.default_rng((self.recipe.seed, 0, index, 9))
        short = []
        for _ in range(self.recipe.questions):
            name = self.recipe.short[rng.integers(len(self.recipe.short))]
            language = scenes.LANGUAGES[max(0, int(rng.integers(-2, 3)))]  # English 3 of 5
            short.append(scenes.task(rng, scene, name, language))
        if words is None:
            return short, [scenes.task(rng, scene, "detect")], []
        return short, [], [scenes.task(rng, scene, "segment", words=words)]

    def ask_all(self, indices: list[int], made: list[scenes.Scene]) -> list[tuple]:
        """`ask` for each scene; a share of them, `segments`, is asked for masks."""
        seed, share = self.recipe.seed, self.recipe.segments
        chosen = [n for n, i in enumerate(indices)
                  if np.random.default_rng((seed, 1, i)).random() < share]  # fmt: skip
        words = {}
        if chosen and self.codec is not None:  # all masks in one call
            boxes = np.concatenate([made[n].boxes for n in chosen])
            masks = np.concatenate([made[n].masks for n in chosen])
            spelt = iter(encode_segments(boxes, masks, self.codec, scenes.SIZE, scenes.SIZE))
            words = {n: [next(spelt) for _ in made[n].kinds] for n in chosen}
        return [self.ask(i, s, words.get(n)) for n, (i, s) in enumerate(zip(indices, made))]

    def train(self, step: int, objects: tuple, look: bool, part=(0, 1)) -> dict:
        """Batch number `step`, or its part (i, n): every n-th scene, from the i-th.

        Short answers, boxes and masks are groups padded apart; with `look` there are none.
        """
        first = step * self.recipe.batch
        indices = list(range(first + part[0], first + self.recipe.batch, part[1]))
        made = [scenes.make_scene(i, "train", self.recipe.seed, objects) for i in indices]
        for index, scene in zip(indices, made):
            rng = np.random.default_rng((self.recipe.seed, 77, index))
            scene.image = disturb(scene.image, rng, self.recipe)
        asked, groups = [] if look else self.ask_all(indices, made), []
        for kind, name in enumerate(KINDS_OF_TEXT):
            pairs = [(p, i) for i, lists in enumerate(asked) for p in lists[kind]]
            if pairs:
                rng = np.random.default_rng((self.recipe.seed, 2, step, part[0], kind))
                groups.append(self.texts(*map(list, zip(*pairs)), rng=rng) | {"name": name})
        kinds, boxes = (torch.from_numpy(np.stack(t)) for t in zip(*map(patch_targets, made)))
        return {"pixels": self.pixels(made), "kinds": kinds, "boxes": boxes, "groups": groups}
