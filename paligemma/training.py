# Exported from notebooks/27_training.ipynb — edit there, then run `make sync`.
"""Training on pictures with a prompt and an answer: loss, steps, schedule, exact resume."""

import math
import os
from dataclasses import asdict, dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset
from tqdm import tqdm

from paligemma.checkpoint import save_model
from paligemma.model import PaliGemma
from paligemma.processor import Processor
from paligemma.support.examples import read_examples
from paligemma.support.processes import mean_over_processes, own_share, process_number
from paligemma.support.replacing import replacing, settled
from paligemma.support.runs import (
    check_dataset,
    check_training,
    load_batches,
    noted_interrupt,
    read_checkpoint,
    taking_up,
)


@dataclass
class TrainingConfig:
    """What a run depends on, besides model and data; every value is checked."""

    steps: int = 1000  # of the optimizer
    batch_size: int = 8  # examples a step
    accumulate: int = 1  # parts that a batch is worked through in, to save memory
    learning_rate: float = 1e-4  # the highest one
    warmup_steps: int = 20  # it rises; then it falls to 0 along half a cosine
    weight_decay: float = 0.01  # of matrices; vectors (biases, norms) have none
    max_grad_norm: float = 1.0  # a longer gradient is shortened to this length
    ema_decay: float = 0.0  # what a running mean of the weights keeps at each step; 0: no mean
    seed: int = 0  # of the order of the examples, and of dropout
    workers: int = 0  # processes that load examples; 0: this one does
    folder: str | os.PathLike | None = None  # for checkpoint.pt and the model; None: write nothing
    save_every: int = 200  # steps between two checkpoints
    save: bool = True  # the model, at the end (not with adapters: `save_adapter` writes those)

    def __post_init__(self):
        check_training(self)


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """The rate of step `step`: up in a straight line, then down to 0 along half a cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (1 + math.cos(math.pi * share)) / 2


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters that require gradients, without decay on vectors.

    Raises:
        ValueError: every parameter is frozen.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("nothing to train: requires_grad is False for every parameter")
    matrices = {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay}
    vectors = {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=config.learning_rate)


@lru_cache(maxsize=2)
def _order(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(length)


def examples_of(step: int, length: int, config: TrainingConfig) -> list[int]:
    """Which of `length` examples step `step` sees: every one once an epoch, shuffled."""
    first = step * config.batch_size
    places = (divmod(place, length) for place in range(first, first + config.batch_size))
    return [int(_order(length, config.seed, epoch)[at]) for epoch, at in places]


def make_batch(items: list[dict], processor: Processor, accumulate: int = 1) -> list[dict]:
    """Examples to the tensors of `accumulate` parts of a batch."""
    size = -(-len(items) // accumulate)
    parts = [items[i : i + size] for i in range(0, len(items), size)]
    columns = ([[x[key] for x in part] for key in ("image", "prefix", "suffix")] for part in parts)
    return [processor(images, prefixes, suffixes) for images, prefixes, suffixes in columns]


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, parts: list[dict], max_grad_norm: float
) -> float:
    """One step on a batch from `make_batch`: its loss, the mean over all labels of all parts.

    Raises:
        ValueError: the loss is not a finite number; the weights stay as they were.
    """
    device = next(model.parameters()).device
    counts = [int((part["labels"] != -100).sum()) for part in parts]
    labels, total = mean_over_processes(sum(counts)), 0.0
    for part, count in zip(parts, counts):
        inputs = {key: tensor.to(device) for key, tensor in part.items()}
        keep = 1 + int(part["token_type_ids"].sum(1).max())  # an answer's guesses: these get logits
        loss = model(**inputs, logits_to_keep=keep).loss * (count / labels)
        loss.backward()
        total += loss.item()
    total = mean_over_processes(total)
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    if not math.isfinite(total) or not math.isfinite(norm):
        optimizer.zero_grad()
        raise ValueError(f"loss {total}, gradient {norm}: lower learning_rate, or use check_finite")
    optimizer.step()
    optimizer.zero_grad()
    return total


FREE = ("steps", "workers", "folder", "save_every", "save")  # may differ when a run goes on


def save_checkpoint(model, optimizer, ema, losses: list[float], config: TrainingConfig) -> None:
    """Write everything that the next step depends on to `config.folder`."""
    state = {
        "model": {name: p.data for name, p in model.named_parameters() if p.requires_grad},
        "optimizer": optimizer.state_dict(),
        "ema": ema.state_dict() if ema else None,
        "losses": losses,
        "config": {k: v for k, v in asdict(config).items() if k not in FREE},
    }
    with replacing(config.folder or ".") as draft:
        torch.save(state, draft / "checkpoint.pt")


def load_checkpoint(model, optimizer, ema, config: TrainingConfig) -> list[float]:
    """Take up the run in `config.folder`, where there is one: the losses of its steps.

    Raises:
        ValueError: the file is broken, or of another model or config.
    """
    file = settled(config.folder or ".") / "checkpoint.pt"
    if not file.is_file():
        return []
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    settings = {k: v for k, v in asdict(config).items() if k not in FREE}
    state = read_checkpoint(file, settings, {name: p.shape for name, p in trained.items()})
    with taking_up(file, optimizer), torch.no_grad():
        losses = [float(loss) for loss in state["losses"]]
        optimizer.load_state_dict(state["optimizer"])
        if ema:
            ema.load_state_dict(state["ema"])
        for name, parameter in trained.items():
            parameter.copy_(state["model"][name])
    return losses


def train(
    model: PaliGemma,
    dataset: Dataset | list[dict],
    config: TrainingConfig,
    processor: Processor | None = None,
    write=save_checkpoint,
    read=load_checkpoint,
) -> list[float]:
    """Train a model on any data, or go on where `config.folder`'s checkpoint stopped.

    Ctrl-C ends the run after the present step, with a checkpoint; the same call goes on. On one
    process a run in two halves equals a whole one bit for bit. With `ema_decay` the model holds the
    mean of its weights at the end. Train in float32: bfloat16 weights swallow small steps.

    Args:
        model: trained in place, on the device where it is; what is frozen stays.
        dataset: has a length; item i, always the same one, is a dict of "image" (whatever the
            processor takes), "prefix" and "suffix" (str).
        config: see there.
        processor: None: the one that lies beside the model's weights.
        write, read: how checkpoints are kept.

    Returns:
        The loss of every step so far.

    Raises:
        ValueError: empty data, an item without those keys, a broken checkpoint, a loss of NaN.
    """
    processor = processor or Processor.from_pretrained(model.config.name_or_path)
    length = check_dataset(dataset)
    optimizer, ema, losses = make_optimizer(model, config), None, []
    if config.ema_decay:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    if config.folder:
        losses = read(model, optimizer, ema, config)
    steps = range(len(losses), config.steps)
    numbers = (own_share(examples_of(step, length, config)) for step in steps)
    make = partial(make_batch, processor=processor, accumulate=config.accumulate)
    model.train()
    hidden = process_number() > 0 or None  # None: where nobody looks
    bar = tqdm(total=config.steps, initial=len(losses), unit="step", disable=hidden)
    with noted_interrupt() as interrupted, bar:
        for step, parts in zip(steps, load_batches(dataset, numbers, make, config.workers)):
            torch.manual_seed(config.seed + step)  # dropout, too, follows from the step
            for group in optimizer.param_groups:
                group["lr"] = rate = learning_rate_at(step, config)
            losses.append(train_step(model, optimizer, parts, config.max_grad_norm))
            if ema:
                ema.update_parameters(model)
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", rate=f"{rate:.1e}")
            stop = mean_over_processes(bool(interrupted)) > 0
            last = stop or step + 1 == config.steps
            if config.folder and (last or (step + 1) % config.save_every == 0):
                write(model, optimizer, ema, losses, config)
            if stop:
                break
    model.eval()
    if ema:
        model.load_state_dict(ema.module.state_dict())
    if config.folder and config.save and len(losses) >= config.steps:
        with replacing(config.folder) as draft:
            save_model(model, draft)
            processor.save_pretrained(draft)
    return losses


class JsonlDataset(Dataset):
    """Examples from a file with one JSON object a line: {"image", "prefix", "suffix"}.

    Args:
        path: the file, or the folder that it lies in; pictures are named relative to the file.
        prefix: the prompt of lines that have none; None: every line has its own.

    Raises:
        ValueError: no such file, or a line that is not like this; the message has its number.
    """

    def __init__(self, path: str | os.PathLike, prefix: str | None = None):
        self.items = read_examples(path, prefix)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, str]:
        return self.items[index]
