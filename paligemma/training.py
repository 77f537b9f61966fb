# Exported from notebooks/27_training.ipynb — edit there, then run `make sync`.
"""Training a PaliGemma: batches, the prefix-LM loss, the schedule, checkpoints, evaluation."""

import argparse
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from paligemma import scenes
from paligemma.checkpoint import load_model, replacing, save_model
from paligemma.detection import box_iou, parse_detections
from paligemma.gemma import GemmaConfig
from paligemma.generation import generate
from paligemma.image_processor import ImageProcessor
from paligemma.model import PaliGemma, PaliGemmaConfig, prefix_lm_mask
from paligemma.processor import Processor, collate
from paligemma.segmentation import MaskCodec, crop_masks, encode_segments, parse_segments
from paligemma.siglip import SiglipVisionConfig
from paligemma.tokenizer import Tokenizer


def soft_locations(softness: float, bins: int = 1024) -> torch.Tensor:
    """For each location token, how much of the target its neighbours get: a bell, rows sum to 1.

    Returns:
        float32[1024, 1024].
    """
    bin_ = torch.arange(bins)
    return torch.softmax(-((bin_[:, None] - bin_[None, :]) ** 2) / (2 * softness**2), dim=-1)


def answer_loss(logits, labels, first_location: int, soft: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the answer's tokens; a location may be off by a little at a low price.

    Args:
        logits: float32[B, L, V].
        labels: int64[B, L], -100 where nothing is to be learnt; shifted here.
        first_location: id of `<loc0000>`.
        soft: from `soft_locations`.

    Returns:
        A scalar: the mean over all labelled tokens.
    """
    guesses, truth = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    guesses, truth = guesses[truth != -100], truth[truth != -100]
    log_p = guesses.log_softmax(-1)
    place = truth - first_location
    is_location = (place >= 0) & (place < len(soft))
    loss = F.nll_loss(log_p[~is_location], truth[~is_location], reduction="sum")
    located = log_p[is_location, first_location : first_location + len(soft)]
    return (loss - (located * soft[place[is_location]]).sum()) / max(1, len(truth))


@dataclass
class TrainingConfig:
    """Everything a run depends on; a run's folder keeps it as `config.json`.

    Args:
        tokenizer: folder that holds `tokenizer.model`.
        seed: of the weights and of the world.
        batch: pictures a step.
        accumulate: parts that a batch is worked through in, to save memory.
        questions: short questions a picture, besides one `detect`; its features serve all.
        short: tasks that they are drawn from; a name that stands twice is asked twice as often.
        lr: peak learning rate of Muon; AdamW takes half of it.
        look_steps: steps in which the vision tower alone learns what each patch shows.
        curriculum: (steps since the tower learnt, numbers of objects to draw from, from then on).
        total_steps, warm_steps, cool_steps: length of the run, of its rise and of its fall.
        ema: share of the running mean of the weights that survives a meeting.
        meet_every: steps between two averages over the processes.
        vision_width … text_mlp: sizes of the model.
        softness: standard deviation of the soft location targets, in bins of 1/1023.
        jitter: standard deviation of the noise on location tokens as inputs, in the same bins.
        segments: share of the pictures that are asked for masks instead of boxes.
        garble: share of the mask codes that are read wrong, as inputs.
        bfloat16: multiply matrices in bfloat16; weights, sums and all else stay float32.
    """

    tokenizer: str = str(scenes.ASSETS / "tiny")
    seed: int = 0
    batch: int = 64
    accumulate: int = 1
    questions: int = 2
    short: tuple = ("caption", "caption", "count", "where", "is there")
    lr: float = 3e-3
    look_steps: int = 2000
    curriculum: tuple = ((0, (1,)), (300, (1, 2)), (900, (1, 2, 3, 4, 5)))
    total_steps: int = 8000
    warm_steps: int = 50
    cool_steps: int = 2500
    ema: float = 0.98
    meet_every: int = 10
    processes: int = 2
    vision_width: int = 128
    vision_layers: int = 4
    text_width: int = 128
    text_layers: int = 4
    text_mlp: int = 256
    softness: float = 6.0
    jitter: float = 6.0
    segments: float = 0.0
    garble: float = 0.25
    bfloat16: bool = False

    @classmethod
    def read(cls, path: str | os.PathLike) -> "TrainingConfig":
        """Read a JSON file; a `ValueError` names a key that is unknown or of another type."""
        types = {field.name: type(field.default) for field in fields(cls)}
        return cls(**_read_values(path, types))


def _read_values(path: str | os.PathLike, types: dict) -> dict:
    """A JSON object's values, each of the type that its key must have."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected an object")
    if unknown := sorted(set(values) - set(types)):
        raise ValueError(f"{path}: unknown keys {', '.join(unknown)}; see TrainingConfig")
    for key, value in values.items():
        fits = {float: (int, float), tuple: (list, tuple)}.get(types[key], types[key])
        if not isinstance(value, fits) or isinstance(value, bool) != (types[key] is bool):
            raise ValueError(f"{path}: {key} is {value!r}; expected {types[key].__name__}")
    return values


def make_model(config: TrainingConfig, image_id: int) -> PaliGemma:
    """A PaliGemma of the size asked for, with weights drawn at a scale that small models like."""
    sizes = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=config.vision_width,
            intermediate_size=4 * config.vision_width,
            num_hidden_layers=config.vision_layers,
            num_attention_heads=4,
            image_size=scenes.SIZE,
            patch_size=scenes.PATCH,
        ),
        text_config=GemmaConfig(
            vocab_size=-(-(image_id + 1) // 64) * 64,
            hidden_size=config.text_width,
            intermediate_size=config.text_mlp,
            num_hidden_layers=config.text_layers,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=32,
        ),
        image_token_index=image_id,
    )
    model = PaliGemma(sizes)
    nn.init.normal_(model.language_model.embed_tokens.weight, std=config.text_width**-0.5)
    nn.init.normal_(model.vision_tower.embeddings.position_embedding.weight, std=0.02)
    return model


def patch_boxes(scene: scenes.Scene) -> np.ndarray:
    """For each patch, the box of the object whose box covers its centre, relative to it.

    Returns:
        float32[64, 4]: x0 y0 x1 y1 minus the patch's centre, in patch sides; 0 where no object is.
    """
    side, half = scenes.SIZE // scenes.PATCH, scenes.PATCH // 2
    found = np.zeros((side, side, 4), np.float32)
    centres = np.arange(side) * scenes.PATCH + half
    for box in scene.boxes:
        x0, y0, x1, y1 = box.tolist()
        rows = slice((y0 + half - 1) // scenes.PATCH, (y1 + half - 1) // scenes.PATCH)
        columns = slice((x0 + half - 1) // scenes.PATCH, (x1 + half - 1) // scenes.PATCH)
        found[rows, columns, 0::2] = box[0::2] - centres[columns][None, :, None]
        found[rows, columns, 1::2] = box[1::2] - centres[rows][:, None, None]
    return found.reshape(-1, 4) / scenes.PATCH


class PatchHead(nn.Module):
    """Says for each patch which kind covers it, whose centre lies in it, and its object's box.

    Thrown away after training: its loss gives the vision tower 64 lessons a picture where a
    caption gives one.
    """

    def __init__(self, width: int):
        super().__init__()
        self.classes = len(scenes.NAMES) + 1
        self.linear = nn.Linear(width, 2 * self.classes)
        self.box = nn.Linear(width, 4)
        self.register_buffer("weight", torch.ones(self.classes), persistent=False)
        self.weight[-1] = 0.2  # "nothing here" is most of the picture

    def forward(self, features, targets, boxes):
        """float32[B, N, D], int64[B, 2, N] and float32[B, N, 4] to (loss, accuracy on objects)."""
        logits = self.linear(features).unflatten(-1, (2, self.classes)).transpose(1, 2)
        logits, flat = logits.flatten(0, 2), targets.flatten()
        loss = F.cross_entropy(logits, flat, self.weight)
        covered = targets[:, 0] < self.classes - 1  # (B, N)
        error = (self.box(features) - boxes)[covered].abs().mean()
        there = flat < self.classes - 1
        return loss + 2 * error, (logits.argmax(-1) == flat)[there].float().mean()


GROUPS = ("short", "detect", "segment")


def questions(rng, scene: scenes.Scene, config, words: list | None = None) -> tuple:
    """Draw short questions about a scene, and one for its objects.

    Args:
        rng: where the randomness comes from.
        scene: what is asked about.
        config: how many short ones, and which.
        words: each object's box and mask as text; None: boxes are asked for.

    Returns:
        A list of (prompt, answer) for each of GROUPS.
    """
    short = []
    for _ in range(config.questions):
        name = config.short[rng.integers(len(config.short))]
        language = scenes.LANGUAGES[max(0, int(rng.integers(-2, 3)))]  # English 3 of 5
        short.append(scenes.task(rng, scene, name, language))
    if words is None:
        return short, [scenes.task(rng, scene, "detect")], []
    return short, [], [scenes.task(rng, scene, "segment", words=words)]


def mask_words(made: list[scenes.Scene], codec: MaskCodec) -> list[list[str]]:
    """Box and mask of every object of these scenes as `<loc>`×4`<seg>`×16, all in one batch."""
    boxes = np.concatenate([scene.boxes for scene in made])
    masks = np.concatenate([scene.masks for scene in made])
    words = iter(encode_segments(boxes, masks, codec, scenes.SIZE, scenes.SIZE))
    return [[next(words) for _ in scene.kinds] for scene in made]


class Layout:
    """Pictures and texts of a batch as tensors.

    Args:
        processor: lays out the text.
        config: seed, sizes, number of questions.
    """

    def __init__(self, processor: Processor, config: TrainingConfig):
        self.config, self.pad_id = config, processor.tokenizer.pad_id
        self.first_location = processor.tokenizer.encode("<loc0000>")[0]
        self.prefix = lru_cache(maxsize=None)(processor.encode_prefix)
        self.suffix = lru_cache(maxsize=100_000)(processor.encode_suffix)
        self.codec = MaskCodec.from_pretrained(scenes.ASSETS / "tiny") if config.segments else None

    def pixels(self, made: list[scenes.Scene]) -> torch.Tensor:
        """Pictures of the model's own size to float32[B, 3, 112, 112] in [-1, 1]."""
        pixels = torch.from_numpy(np.stack([scene.image for scene in made])).permute(0, 3, 1, 2)
        return (pixels.float() / 255 - 0.5) / 0.5

    def misread(self, ids: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Move locations by a little and take other codes for some, as the model's own words do."""
        place = ids - self.first_location
        noise = torch.from_numpy(rng.normal(0, self.config.jitter, ids.shape)).round().long()
        moved = (place + noise).clamp(0, 1023) + self.first_location
        ids = torch.where((place >= 0) & (place < 1024), moved, ids)
        is_code = (place >= 1024) & (place < 1024 + 128)
        wrong = is_code & (torch.from_numpy(rng.random(ids.shape)) < self.config.garble)
        others = ids[is_code][torch.from_numpy(rng.permutation(int(is_code.sum())))]
        return ids.masked_scatter(wrong, others)

    def texts(self, pairs: list, pictures: list[int], rng=None) -> dict:
        """(prompt, answer) pairs, and which picture each is about, to what the model takes.

        With `rng` some of what it reads is `misread`; what it has to say (labels) stays true.
        """
        suffixes = [self.suffix(answer) for _, answer in pairs]
        batch = collate([self.prefix(prompt) for prompt, _ in pairs], suffixes, self.pad_id)
        if rng is not None:
            batch["input_ids"] = self.misread(batch["input_ids"], rng)
        keep = max(map(len, suffixes)) + 1
        return batch | {"picture": torch.tensor(pictures), "keep": keep}


class Batches(Layout):
    """Batches of scenes as tensors; batch `step` depends on its number and on nothing else.

    `scene` and `ask` say what is seen and asked; override them for another world.
    """

    def scene(self, index: int, objects: tuple) -> scenes.Scene:
        """Scene number `index` of the training split."""
        return scenes.make_scene(index, "train", self.config.seed, objects)

    def ask(self, index: int, scene: scenes.Scene, words: list | None = None) -> tuple:
        """What is asked about scene `index`, as `questions` gives it."""
        rng = np.random.default_rng((self.config.seed, 0, index, 9))
        return questions(rng, scene, self.config, words)

    def ask_all(self, indices: list[int], made: list[scenes.Scene]) -> list[tuple]:
        """`ask` for each scene; a share of them, `segments`, is asked for masks."""
        share = [np.random.default_rng((self.config.seed, 1, i)).random() for i in indices]
        chosen = [n for n, value in enumerate(share) if value < self.config.segments]
        words = mask_words([made[n] for n in chosen], self.codec) if chosen else []
        words = dict(zip(chosen, words))
        return [self.ask(i, s, words.get(n)) for n, (i, s) in enumerate(zip(indices, made))]

    def train(self, step: int, objects: tuple, look: bool, part=(0, 1)) -> dict:
        """Batch number `step`; short answers, boxes and masks are groups padded apart.

        Args:
            step: which.
            objects: numbers of objects to draw from.
            look: only pixels and patch targets.
            part: (i, n): every n-th scene of it, from the i-th.
        """
        first, last = step * self.config.batch, (step + 1) * self.config.batch
        indices = range(first + part[0], last, part[1])
        made = [self.scene(index, objects) for index in indices]
        asked = [] if look else self.ask_all(list(indices), made)
        groups = []
        for kind, name in enumerate(GROUPS):
            pairs = [(p, i) for i, lists in enumerate(asked) for p in lists[kind]]
            if pairs:
                rng = np.random.default_rng((self.config.seed, 2, step, part[0], kind))
                groups.append(self.texts(*map(list, zip(*pairs)), rng) | {"name": name})
        targets = torch.from_numpy(np.stack([scenes.patch_targets(s) for s in made]))
        boxes = torch.from_numpy(np.stack([patch_boxes(s) for s in made]))
        batch = {"pixels": self.pixels(made), "targets": targets, "boxes": boxes}
        return batch | {"groups": groups, "first_location": self.first_location}


def answer_logits(model: PaliGemma, features: torch.Tensor, group: dict) -> torch.Tensor:
    """Logits of the last `keep` positions of a group of texts about these pictures' features.

    Args:
        model: the model.
        features: float32[B, N, D] from `encode_image`.
        group: from `Batches.texts`.

    Returns:
        float32[texts, keep, V].
    """
    attention_mask = group["attention_mask"]
    x = model.merge(group["input_ids"], features[group["picture"]])
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    mask = prefix_lm_mask(attention_mask, group["token_type_ids"], x.shape[1])
    hidden = model.language_model(x, positions, mask, keep=group["keep"])
    return model.language_model.logits(hidden)


def training_loss(model, head, batch, soft):
    """Loss of one batch and its parts, for the curves: (tensor, {name: float})."""
    seen = model.vision_tower(batch["pixels"])
    patch, accuracy = head(seen, batch["targets"], batch["boxes"])
    figures = {"patch loss": patch.item(), "patch right": accuracy.item()}
    if not batch["groups"]:
        return patch, figures
    features = model.multi_modal_projector(seen)
    loss = 0.5 * patch
    for group in batch["groups"]:
        logits = answer_logits(model, features, group)
        labels = group["labels"][:, -group["keep"] :]
        part = answer_loss(logits, labels, batch["first_location"], soft)
        figures[f"{group['name']} loss"] = part.item()
        loss = loss + (0.5 if group["name"] == "segment" else 1.0) * part
    return loss, figures


class Bfloat16Product(torch.autograd.Function):
    """`F.linear` whose three products (forward, two gradients) are made of bfloat16 factors."""

    @staticmethod
    def forward(context, x, weight, bias):
        """float32[..., D], float32[E, D], float32[E] or None to float32[..., E]."""
        x, weight = x.bfloat16(), weight.bfloat16()
        context.save_for_backward(x, weight)
        context.has_bias = bias is not None
        y = F.linear(x, weight).float()
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(context, gradient):
        """float32[..., E] to the gradients of x, weight, bias."""
        x, weight = context.saved_tensors
        rows = gradient.flatten(0, -2)
        rounded = rows.bfloat16()
        to_x = (rounded @ weight).float().view(x.shape)
        to_weight = (rounded.T @ x.flatten(0, -2)).float()
        return to_x, to_weight, rows.sum(0) if context.has_bias else None


def use_bfloat16_products(module: nn.Module) -> None:
    """Let every linear layer inside multiply in bfloat16; its weights stay float32."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.forward = lambda x, m=layer: Bfloat16Product.apply(x, m.weight, m.bias)


def orthogonal(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton–Schulz: push all singular values of float32[n, a, b] towards 1."""
    tall = g.shape[1] > g.shape[2]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest orthogonal matrix: for the weight matrices inside the blocks.

    Matrices of one shape are handled as one stack. The step is scaled to the size that AdamW's
    would have, so both share a learning rate. Source: Jordan et al. 2024; Liu et al. 2025.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        """One update."""
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                grads = torch.stack([p.grad for p in params])
                moments = [self.state[p].setdefault("m", torch.zeros_like(p)) for p in params]
                torch._foreach_lerp_(moments, list(grads), 1 - group["momentum"])
                update = orthogonal(grads.lerp(torch.stack(moments), group["momentum"]))
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(update), alpha=-rate)


def make_optimizers(model: nn.Module, head: nn.Module, lr: float) -> list:
    """Muon for matrices inside blocks; AdamW for the rest, without decay on vectors."""
    matrices, others, plain = [], [], []
    for name, p in [*model.named_parameters(), *head.named_parameters()]:
        if p.ndim == 2 and "layers" in name:
            matrices.append(p)
        else:
            (others if p.ndim > 1 else plain).append(p)
    groups = [{"params": others, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    for group in adamw.param_groups:
        group["factor"] = 0.5
    return [adamw, Muon(matrices, lr)]


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Warm up at the start of each stage, hold, fall to 0 along half a cosine at the end."""
    since = step - config.look_steps if step >= config.look_steps else step
    left = min(1.0, (config.total_steps - step) / max(1, config.cool_steps))
    return config.lr * min(1.0, (since + 1) / config.warm_steps) * math.sin(left * math.pi / 2) ** 2


def objects_at(step: int, config: TrainingConfig) -> tuple:
    """The curriculum: which numbers of objects the scenes of this step have."""
    since = step - config.look_steps
    if since < 0:
        return config.curriculum[-1][1]
    return [tuple(objects) for start, objects in config.curriculum if since >= start][-1]


class Run:
    """A run's state: model, optimizers, running mean, curves; taken up again where it stopped.

    Args:
        config: what the run depends on.
        folder: where it keeps `checkpoint.pt`, `curves.json` and `config.json`.
        rank: number of this process.
    """

    def __init__(self, config: TrainingConfig, folder: Path, rank: int = 0):
        torch.manual_seed(config.seed)
        self.config, self.folder, self.rank = config, Path(folder), rank
        tokenizer = Tokenizer.from_pretrained(config.tokenizer)
        image_processor = ImageProcessor(scenes.SIZE)
        patches = (scenes.SIZE // scenes.PATCH) ** 2
        self.processor = Processor(tokenizer, image_processor, patches)
        self.batches = Batches(self.processor, config)
        self.soft = soft_locations(config.softness)
        self.model = make_model(config, tokenizer.image_id)
        self.head = PatchHead(config.vision_width)
        if config.bfloat16:
            use_bfloat16_products(self.model)
        self.parameters = [*self.model.parameters(), *self.head.parameters()]
        self.optimizers = make_optimizers(self.model, self.head, config.lr)
        self.mean = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.step, self.seconds, self.curves = 0, 0.0, []
        if (self.folder / "checkpoint.pt").exists():
            self.load(torch.load(self.folder / "checkpoint.pt", weights_only=True))

    def state(self) -> dict:
        """Everything that the next step depends on."""
        return {
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "mean": self.mean,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "curves": self.curves,
        }

    def load(self, state: dict) -> None:
        """Take up a saved run."""
        self.model.load_state_dict(state["model"])
        self.head.load_state_dict(state["head"])
        self.mean = state["mean"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.curves = state["step"], state["seconds"], state["curves"]

    def save(self) -> None:
        """Write the checkpoint and the curves."""
        with replacing(self.folder) as draft:
            torch.save(self.state(), draft("checkpoint.pt"))
            draft("curves.json").write_text(json.dumps(self.curves))


def mean_of(figures: list[dict]) -> dict:
    """The mean of each figure of the last dict, over the dicts that have it."""
    return {k: float(np.mean([f[k] for f in figures if k in f])) for k in figures[-1]}


@torch.no_grad()
def meet(parameters: list, stop: bool) -> bool:
    """Give every process the mean of all processes' weights; whether any of them wants to stop."""
    if not dist.is_initialized():
        return stop
    flat = torch.cat([p.flatten() for p in parameters] + [torch.tensor([float(stop)])])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, part in zip(parameters, flat[:-1].split([p.numel() for p in parameters])):
        p.copy_(part.view_as(p))
    return bool(flat[-1])


class Trainer(Run):
    """A run that moves on, step by step."""

    def take_step(self) -> dict:
        """One step on this process's part of batch number `step`: the losses."""
        c = self.config
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.step, c) * group.get("factor", 1.0)
        size, figures = c.processes if dist.is_initialized() else 1, []
        objects, look = objects_at(self.step, c), self.step < c.look_steps
        for i in range(c.accumulate):
            part = (self.rank * c.accumulate + i, size * c.accumulate)
            batch = self.batches.train(self.step, objects, look, part)
            loss, found = training_loss(self.model, self.head, batch, self.soft)
            (loss / c.accumulate).backward()
            figures.append(found)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return mean_of(figures)

    @torch.no_grad()
    def update_mean(self) -> None:
        """Move the running mean towards the weights."""
        for key, value in self.model.state_dict().items():
            self.mean[key].lerp_(value, 1 - self.config.ema)

    def smoothed(self) -> PaliGemma:
        """A model with the running mean of the weights."""
        model = PaliGemma(self.model.config)
        model.load_state_dict(self.mean)
        return model.eval()


def mask_overlap(model: PaliGemma, batches: Batches, made: list, features) -> float:
    """Percent that masks of first-choice codes and true ones have in common (IoU), on average."""
    pairs, cut = [], []
    for i, (scene, words) in enumerate(zip(made, mask_words(made, batches.codec))):
        ask = partial(scenes.task, scene=scene, name="segment")
        numbers = [str(n) for n in range(len(words))]  # instead of words: in which order they come
        _, order = ask(np.random.default_rng(i), words=numbers)
        own = [int(part.split()[0]) for part in order.split(" ; ")]
        cut.append(crop_masks(scene.boxes[own], scene.masks[own]) > 0.5)
        pairs.append(ask(np.random.default_rng(i), words=words))
    group = batches.texts(pairs, list(range(len(made))))
    labels = group["labels"][:, -group["keep"] :][:, 1:]
    first = batches.first_location + 1024  # <seg000>
    codes = answer_logits(model, features, group)[:, :-1, first : first + 128].argmax(-1)
    codes = codes[(labels >= first) & (labels < first + 128)].view(-1, 16)
    drawn, true = batches.codec.decode(codes) > 0, torch.cat(cut)
    overlap = (drawn & true).sum((1, 2)) / (drawn | true).sum((1, 2)).clamp(min=1)
    return 100 * float(overlap.mean())


@torch.inference_mode()
def validate(model: PaliGemma, batches: Batches, count: int = 192) -> dict:
    """Percent of answers all of whose tokens are the first choice, by task, on validation scenes.

    With the true answer fed in, all tokens right is the same as greedy decoding being right. For
    boxes only names are compared: how a model does with its own locations `evaluate` tells.
    `box error` is the mean distance of a corner's coordinate, in pixels; `mask overlap` see there.
    """
    made = [scenes.make_scene(i, "validation") for i in range(count)]
    features = model.encode_image(batches.pixels(made))
    result = {}
    for name in scenes.TASKS:
        pairs = [scenes.task(np.random.default_rng(i), s, name) for i, s in enumerate(made)]
        if name == "where":  # the others became "count"
            kept = [i for i, pair in enumerate(pairs) if "where" in pair[0]]
        else:
            kept = list(range(count))
        group = batches.texts([pairs[i] for i in kept], kept)
        labels = group["labels"][:, -group["keep"] :][:, 1:]
        choice = answer_logits(model, features, group)[:, :-1].argmax(-1)
        if name == "detect":
            first = batches.first_location
            located = (labels >= first) & (labels < first + 1024)
            off = (choice - labels)[located].abs().clamp(max=1023).float()
            result["box error"] = float(off.mean()) * scenes.SIZE / 1023
            right = (choice == labels) | (labels == -100) | located
        else:
            right = (choice == labels) | (labels == -100)
        result[name] = 100 * float(right.all(1).float().mean())
    if batches.codec is not None:
        result["mask overlap"] = mask_overlap(model, batches, made[: count // 2], features)
    return result


def curve_point(run: Trainer, recent: list[dict], validate_every: int) -> dict:
    """A point of the curves: the mean of recent losses, and now and then the figures by task."""
    point = mean_of(recent) | {"step": run.step, "seconds": run.seconds}
    if run.step > run.config.look_steps and run.step % validate_every == 0:
        point |= validate(run.smoothed(), run.batches)
    return point


def train(
    config: TrainingConfig,
    folder: str | os.PathLike,
    rank: int = 0,
    save_every: float = 60.0,
    validate_every: int = 250,
    quiet: bool = False,
) -> Trainer:
    """Train, or go on where the checkpoint in `folder` stopped; Ctrl-C saves and stops.

    Each process takes its part of every batch and steps on its own; every `meet_every` steps the
    processes average their weights ("local SGD"), so on a busy machine nobody waits at each step.
    One process continues bit for bit; with more, the optimizers of the others start from rank 0's.

    Args:
        config: what to train.
        folder: made if needed.
        rank: number of this process; 0 writes.
        save_every: seconds between checkpoints.
        validate_every: steps between two looks at the validation scenes.
        quiet: no progress bar.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    run = Trainer(config, Path(folder), rank)
    stop, recent = [], []
    before = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    start, saved_at, spent = time.perf_counter(), time.perf_counter(), run.seconds
    bar = tqdm(total=config.total_steps, initial=run.step, disable=quiet or rank > 0, unit="step")
    try:
        while run.step < config.total_steps:
            recent.append(run.take_step())
            bar.update()
            if run.step % config.meet_every and run.step < config.total_steps:
                continue
            stopping = meet(run.parameters, bool(stop))
            run.update_mean()
            run.seconds = spent + time.perf_counter() - start
            if rank == 0 and (run.step % 50 == 0 or run.step == config.total_steps):
                run.curves.append(curve_point(run, recent, validate_every))
                bar.set_postfix({k: f"{v:.3f}" for k, v in run.curves[-1].items() if v < 20})
                recent.clear()
            if stopping:
                break
            if rank == 0 and time.perf_counter() - saved_at > save_every:
                run.save()
                saved_at = time.perf_counter()
        if rank == 0:
            run.save()
    finally:
        signal.signal(signal.SIGINT, before)
        bar.close()
    return run


def matched(overlap: np.ndarray, least: float = 1e-9) -> list[float]:
    """Overlaps of pairs, each row and each column in one at most; the largest first."""
    overlap, found = overlap.copy(), []
    while overlap.size and overlap.max() >= least:
        i, j = np.unravel_index(overlap.argmax(), overlap.shape)
        found.append(float(overlap[i, j]))
        overlap[i, :] = overlap[:, j] = 0.0
    return found


def box_figures(said: list[str], truths: list[str], threshold: float = 0.5) -> dict:
    """Detections as the model spells them against the true ones, spelled the same way.

    Boxes of one label are matched greedily, the largest overlap first.

    Returns:
        percent: `f1` at this overlap, `iou` the mean overlap of the matched boxes.
    """
    found, wanted, overlaps = 0, 0, []
    for answer, truth in zip(said, truths):
        guesses, boxes = (parse_detections(t, scenes.SIZE, scenes.SIZE) for t in (answer, truth))
        found, wanted = found + len(guesses), wanted + len(boxes)
        if not guesses or not boxes:
            continue
        overlap = box_iou([d.box for d in guesses], [d.box for d in boxes]).numpy()
        same = np.array([[g.label == b.label for b in boxes] for g in guesses])
        overlaps += matched(np.where(same, overlap, 0.0), threshold)
    f1 = 200 * len(overlaps) / max(1, found + wanted)
    return {"f1": f1, "iou": 100 * float(np.mean(overlaps)) if overlaps else 0.0}


def mask_figures(said: list[str], asked: list[str], made: list[scenes.Scene], codec) -> dict:
    """Masks as the model spells them against the visible pixels of the objects asked for.

    Returns:
        percent: `iou`, the mean over all these objects; one that was not found counts 0.
    """
    overlaps = []
    for answer, prompt, scene in zip(said, asked, made):
        guesses = parse_segments(answer, scenes.SIZE, scenes.SIZE, codec)
        for kind in {scenes.NAMES.index(name) for name in prompt[8:].split(" ; ")}:
            truths = [m for m, k in zip(scene.masks, scene.kinds) if k == kind]
            drawn = [g.mask for g in guesses if g.label == scenes.NAMES[kind]]
            pairs = [[(a & b).sum() / (a | b).sum() for a in drawn] for b in truths]
            best = matched(np.array(pairs).reshape(len(truths), len(drawn)))
            overlaps += best + [0.0] * (len(truths) - len(best))
    return {"iou": 100 * float(np.mean(overlaps))}


def answers(model, processor, images: list, prompts: list[str], size: int = 64) -> list[str]:
    """What the model says, greedily, through the package's own path."""
    said = []
    for first in range(0, len(images), size):
        part = slice(first, first + size)
        batch = processor(images[part], prompts[part])
        inputs = {k: batch[k] for k in ("input_ids", "pixel_values", "attention_mask")}
        said += map(processor.decode, generate(model, **inputs, max_new_tokens=128))
    return said


ROWS = {  # row of the table: (task, language, how the scenes are made)
    "caption en": ("caption", "en", {}),
    "caption en, kinds never seen together": ("caption", "en", {"unseen": True}),
    "caption de": ("caption", "de", {}),
    "caption fr": ("caption", "fr", {}),
    "how many": ("count", "en", {}),
    "where": ("where", "en", {}),
    "is there": ("is there", "en", {}),
    "detect": ("detect", "en", {}),
    "segment": ("segment", "en", {}),
}


def row_questions(row: str, count: int) -> tuple[list, list[str], list[str]]:
    """The first `count` test scenes that this row's question fits: (scenes, prompts, answers)."""
    name, language, how = ROWS[row]
    found, index = [], 0
    while len(found) < count:
        scene = scenes.make_scene(index, "test", **how)
        rng = np.random.default_rng((11, index))
        prompt, answer = scenes.task(rng, scene, name, language)
        if name != "where" or "where" in prompt:  # no clear place: it was asked "how many"
            found.append((scene, prompt, answer))
        index += 1
    return tuple(map(list, zip(*found)))


def evaluate(path: str | os.PathLike, count: int = 1000, rows=tuple(ROWS), progress=None) -> dict:
    """Figures of a model on `count` test scenes a row, with its own pictures and with others'.

    Args:
        path: a model's folder.
        count: scenes a row.
        rows: which of ROWS.
        progress: called with (row, figures) after each.

    Returns:
        `{row: {"scenes", "exact", "shuffled"}}` in percent; "detect" has "f1", "iou" and
        "shuffled" (f1) instead, "segment" "iou" and "shuffled" (iou). "shuffled" is the control:
        each question is asked about the next scene's picture, so what remains above chance did
        not come from looking.
    """
    model, processor = load_model(path), Processor.from_pretrained(path)
    result = {}
    for row in rows:
        made, prompts, truths = row_questions(row, count)
        images, figures = [scene.image for scene in made], {"scenes": count}
        for shuffled, shown in ((False, images), (True, images[1:] + images[:1])):
            said = answers(model, processor, shown, prompts)
            if row == "detect":
                found = box_figures(said, truths)
            elif row == "segment":
                found = mask_figures(said, prompts, made, MaskCodec.from_pretrained(path))
            else:
                right = [a == b for a, b in zip(said, truths)]
                found = {"exact": 100 * float(np.mean(right))}
            figures |= {"shuffled": next(iter(found.values()))} if shuffled else found
        result[row] = figures
        if progress:
            progress(row, figures)
    return result


def _process(rank: int, config: TrainingConfig, folder: Path) -> None:
    """One of several training processes, of one thread each."""
    torch.set_num_threads(1)
    if config.processes > 1:
        method = f"file://{folder.resolve()}/.rendezvous"
        size = config.processes
        dist.init_process_group("gloo", init_method=method, rank=rank, world_size=size)
    train(config, folder, rank)
    if config.processes > 1:
        dist.destroy_process_group()


def launch(config: TrainingConfig, folder: Path) -> None:
    """Train with as many processes as the config says."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
    (folder / ".rendezvous").unlink(missing_ok=True)
    if config.processes == 1:
        return _process(0, config, folder)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the processes
    try:
        torch.multiprocessing.spawn(_process, (config, folder), config.processes)
    finally:
        signal.signal(signal.SIGINT, before)


def export(folder: Path, target: Path) -> None:
    """Write a run's smoothed model to `target`: bfloat16, the published layout, its curves."""
    config = TrainingConfig.read(folder / "config.json")
    run = Trainer(config, folder)
    target.mkdir(parents=True, exist_ok=True)
    tokenizer = (Path(config.tokenizer) / "tokenizer.model").read_bytes()
    save_model(run.smoothed().to(torch.bfloat16), target)
    (target / "tokenizer.model").write_bytes(tokenizer)
    ImageProcessor(scenes.SIZE).save_pretrained(target)
    recipe = {k: v for k, v in asdict(config).items() if k != "tokenizer"}
    stages = {"looks": 0, "speaks": config.look_steps}
    stages["cools"] = config.total_steps - config.cool_steps
    curves = {"recipe": recipe, "seconds": round(run.seconds), "stages": stages}
    curves["points"] = run.curves
    (target / "curves.json").write_text(json.dumps(curves) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """The command line: train, export or evaluate; 2 and one line on bad input."""
    parser = argparse.ArgumentParser("python -m paligemma.training", description=main.__doc__)
    add = parser.add_argument
    add("--config", type=Path, help="JSON with the fields of TrainingConfig; train it")
    add("--work", type=Path, help="folder of the run: checkpoint, curves, config")
    add("--export", type=Path, help="write the run in --work to this folder")
    add("--evaluate", action="store_true", help="figures on held-out scenes, as JSON")
    add("--model", type=Path, default=scenes.ASSETS / "tiny", help="what --evaluate evaluates")
    add("--scenes", type=int, default=1000, help="scenes a figure (default %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.evaluate:
            report = lambda row, figures: print(row, figures, file=sys.stderr)  # noqa: E731
            print(json.dumps(evaluate(options.model, options.scenes, progress=report), indent=1))
        elif options.export and options.work:
            export(options.work, options.export)
        elif options.work and (options.config or (options.work / "config.json").exists()):
            launch(
                TrainingConfig.read(options.config or options.work / "config.json"), options.work
            )
        else:
            parser.error("give --work and --config to train, --work and --export, or --evaluate")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__" and "__file__" in globals():
    sys.exit(main())
