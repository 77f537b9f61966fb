"""Fine-tuning from outside the model: what learns, in which type, memory saved, held-out scores."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from paligemma.inference import Pipeline
from paligemma.model import PaliGemma
from paligemma.processor import Processor
from paligemma.training import make_batch

RECIPES = {  # names of the parameters that learn
    "full": "*",  # every transfer of the PaliGemma paper
    "freeze_tower": "language_model.*",  # big_vision's freeze_vit; projector and tower stay
    "attention_only": "language_model.*.self_attn.*",  # big_vision's notebook for a small GPU
}


def choose_parameters(model: PaliGemma, recipe: str) -> None:
    """Let the parameters of one of RECIPES learn, and no others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(fnmatchcase(name, RECIPES[recipe]))


def keep_frozen_in(model: PaliGemma, dtype: torch.dtype) -> None:
    """Hold what doesn't learn in this type; what learns keeps its own, for small steps."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


@contextmanager
def computing_in(model: PaliGemma, dtype: torch.dtype) -> Iterator[None]:
    """While open, products of forward passes are made in this type, whatever the weights are in."""
    if dtype == torch.float32:
        yield
        return
    model.forward = torch.autocast(model.device.type, dtype)(model.forward)
    try:
        yield
    finally:
        del model.forward  # the class's own is seen again


@contextmanager
def recomputing(model: PaliGemma, on: bool = True) -> Iterator[None]:
    """While open, blocks keep only their inputs for the backward pass, and run again in it.

    Losses and gradients stay the same; a step takes about a third longer, and memory for one
    block's activations at a time.

    Source: Chen et al. 2016 (arXiv 1604.06174); `torch.utils.checkpoint`.
    """
    blocks = [*model.vision_tower.encoder["layers"].children(), *model.language_model.layers]
    for block in blocks if on else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks if on else ():
            del block.forward


@torch.no_grad()
def held_out_loss(
    model: PaliGemma, processor: Processor, items: Sequence[dict], batch_size: int
) -> float:
    """The mean loss over all labels of some examples, with true tokens fed in."""
    total, labels = 0.0, 0
    starts = range(0, len(items), batch_size)
    for first in tqdm(starts, desc="held out", disable=None, leave=False):
        (batch,) = make_batch(list(items[first : first + batch_size]), processor)
        count = int((batch["labels"] != -100).sum())
        loss = model(**{key: tensor.to(model.device) for key, tensor in batch.items()}).loss
        total, labels = total + loss.item() * count, labels + count
    return total / labels


def greedy_answers(pipeline: Pipeline, items: Sequence[dict], batch_size: int) -> list[str]:
    """What the model says by its own likeliest tokens; it may say a little more than is true."""
    longest = max(len(pipeline.processor.encode_suffix(item["suffix"])) for item in items)
    answers = []
    starts = range(0, len(items), batch_size)
    for first in tqdm(starts, desc="answers", disable=None, leave=False):
        some = items[first : first + batch_size]
        images, prompts = [x["image"] for x in some], [x["prefix"] for x in some]
        answers += pipeline.batch(images, prompts, max_new_tokens=longest + 4)
    return answers
