# Exported from notebooks/30_distributed.ipynb — edit there, then run `make sync`.
"""One training in many processes: copies, shards, sharded checkpoints, the ring of a loss."""

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from paligemma import training
from paligemma.checkpoint import save_model
from paligemma.contrastive import block_loss
from paligemma.model import PaliGemma
from paligemma.processor import Processor
from paligemma.support.processes import process_count, process_number, together
from paligemma.support.replacing import replacing
from paligemma.support.shards import find_shards, new_shards, reading_shards
from paligemma.training import TrainingConfig


def own_device() -> torch.device:
    """The GPU of this process, where there are GPUs; else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


@contextmanager
def processes() -> Iterator[torch.device]:
    """Join the processes that `torchrun` started, and leave them; without it, stay alone.

    Gives the device of this process.
    """
    device = own_device()
    if "RANK" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
        dist.barrier()  # nobody leaves while another still talks to it
    finally:
        dist.destroy_process_group()


def shard(model: PaliGemma) -> PaliGemma:
    """The model in parts (FSDP2), of which this process holds its own, on its own device.

    Args:
        model: the same in every process. It stays whole and where it is: keep it on the CPU.
    """
    same = {id(p): nn.Parameter(p.data, p.requires_grad) for p in model.parameters()}
    parts = copy.deepcopy(model, same)  # another module over the same numbers: nothing is copied
    mesh = init_device_mesh(own_device().type, (process_count(),))
    for block in [*parts.vision_tower.encoder["layers"].children(), *parts.language_model.layers]:
        fully_shard(block, mesh=mesh)
    return cast(PaliGemma, fully_shard(parts, mesh=mesh))


def collect(parts: PaliGemma, model: PaliGemma) -> None:
    """Give process 0's `model` the weights of all parts; every process must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    if state := get_model_state_dict(parts, options=options):
        model.load_state_dict(state, assign=True)


def local_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes that this process holds of tensors, some of which are sharded."""
    here = (t.to_local() if isinstance(t, DTensor) else t for t in tensors if t is not None)
    return sum(t.numel() * t.element_size() for t in here)


FLAT = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True)


def state_of(model: nn.Module, optimizer, ema=None) -> dict[str, torch.Tensor]:
    """What the next step depends on, by names that are the same however the model is divided."""
    state = {f"model.{k}": v for k, v in get_model_state_dict(model, options=FLAT).items()}
    state |= get_optimizer_state_dict(model, optimizer, options=FLAT)
    if ema:
        state |= {f"ema.{k}": v for k, v in get_model_state_dict(ema.module).items()}
        state["ema.steps"] = ema.n_averaged
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def write_shards(model, optimizer, ema, losses: list[float], config: TrainingConfig) -> None:
    """Every process writes its own part into `config.folder`."""
    settings = {k: v for k, v in asdict(config).items() if k not in training.FREE}
    with new_shards(config.folder or ".", losses, settings) as place:
        writer = HuggingFaceStorageWriter(str(place), save_distributed=True)
        state = state_of(model, optimizer, ema)
        dcp.save(state, storage_writer=writer, no_dist=not together())  # type: ignore


def read_shards(model, optimizer, ema, config: TrainingConfig) -> list[float]:
    """Take up the run in `config.folder`, however many wrote it: the losses of its steps.

    Raises:
        ValueError: the shards are broken, or of another model or config.
    """
    settings = {k: v for k, v in asdict(config).items() if k not in training.FREE}
    if not (found := find_shards(config.folder or ".", settings)):
        return []
    place, losses = found
    with reading_shards(place):  # load fills the tensors in place, on each process its part
        reader = HuggingFaceStorageReader(str(place))
        state = state_of(model, optimizer, ema)
        dcp.load(state, storage_reader=reader, no_dist=not together())  # type: ignore
    return losses


def train(
    model: PaliGemma,
    dataset: Dataset | list[dict],
    config: TrainingConfig,
    processor: Processor | None = None,
    sharded: bool = True,
) -> list[float]:
    """`paligemma.training.train` in all processes that `processes` joined: the same curve.

    A checkpoint in `config.folder` goes on in any number of processes. A batch is shared by all.

    Args:
        model: the same in every process, on the CPU. At the end process 0's has the trained
            weights; with `sharded=False`, or alone, every process's has, on its own device.
        dataset, config, processor: as there.
        sharded: divide the model, too (FSDP), and not only the examples (DDP).

    Returns:
        The loss of every step so far, in every process.

    Raises:
        ValueError: as there; a batch that cannot be shared evenly; a mean of sharded weights.
    """
    processor = processor or Processor.from_pretrained(model.config.name_or_path)
    divided = sharded and process_count() > 1
    if divided and config.ema_decay:
        raise ValueError(f"ema_decay is {config.ema_decay}; with a sharded model it must be 0")
    if divided:
        team = shard(model)
    elif together():
        team = cast(PaliGemma, DistributedDataParallel(model.to(own_device())))
    else:
        team = model
    unsaved = replace(config, save=False)
    losses = training.train(team, dataset, unsaved, processor, write_shards, read_shards)
    if divided:
        collect(team, model.eval())
    finished = config.folder and config.save and len(losses) >= config.steps
    if finished and process_number() == 0:
        with replacing(config.folder or ".") as draft:
            save_model(model, draft)
            processor.save_pretrained(draft)
    return losses


class PassOn(torch.autograd.Function):
    """Give a tensor to the next process and get the previous one's; gradients go back."""

    @staticmethod
    def forward(context, x):
        """`float[…]`, of the same shape in every process."""
        return swap(x, 1)

    @staticmethod
    def backward(context, *gradients):
        """The gradient of what was given away comes from the process that has it."""
        return swap(gradients[0], -1)


def swap(x: torch.Tensor, step: int) -> torch.Tensor:
    """Send `x` to the process `step` places on, and receive from the one `step` places back."""
    me, count, found = process_number(), process_count(), torch.empty_like(x)
    send = dist.P2POp(dist.isend, x.contiguous(), (me + step) % count)
    receive = dist.P2POp(dist.irecv, found, (me - step) % count)
    for work in dist.batch_isend_irecv([send, receive]):
        work.wait()
    return found


def ring_sigmoid_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    scale: torch.Tensor | float,
    bias: torch.Tensor | float,
) -> torch.Tensor:
    """This process's part of SigLIP's loss: its pictures with the texts of all processes.

    The mean over the processes, which DDP and FSDP take of gradients, is `sigmoid_loss` of the
    whole batch.

    Args:
        image_features, text_features: float[B, D], of this process; B is the same in all.
        scale, bias: of the logits, as there.

    Source: Zhai et al. 2023, section 3.3.
    """
    images, texts = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    total = block_loss(images, texts, scale, bias)
    for _ in range(process_count() - 1):
        texts = cast(torch.Tensor, PassOn.apply(texts))
        block = checkpoint(block_loss, images, texts, scale, bias, False, use_reentrant=False)
        total = total + cast(torch.Tensor, block)
    return total / len(images)
