"""Several processes that train one model: which am I, what is my share, what do all agree on.

Alone, outside `torchrun`, there is one process, everything is its share, and a mean is the value.
"""

from typing import TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")


def together() -> bool:
    """Has this process joined others? (`init_process_group`, after `torchrun` started them.)"""
    return dist.is_available() and dist.is_initialized()


def process_number() -> int:
    """The number of this process, from 0; PyTorch calls it the rank."""
    return dist.get_rank() if together() else 0


def process_count() -> int:
    """How many processes there are; PyTorch calls it the world size."""
    return dist.get_world_size() if together() else 1


def own_share(batch: list[Item]) -> list[Item]:
    """This process's part of a batch, as large as every other's.

    Raises:
        ValueError: the batch cannot be shared evenly.
    """
    count = process_count()
    if len(batch) % count:
        raise ValueError(
            f"batch_size is {len(batch)}, which {count} processes cannot share evenly; "
            f"choose a multiple of {count}"
        )
    size = len(batch) // count
    return batch[process_number() * size :][:size]


def mean_over_processes(value: float) -> float:
    """The mean of what all processes give here, the same for all of them; each must call it."""
    if not together():
        return value
    shared = torch.tensor(value, dtype=torch.float64)
    if dist.get_backend() == "nccl":  # which knows the memory of GPUs only
        shared = shared.cuda()
    dist.all_reduce(shared)
    return shared.item() / process_count()


def wait_for_all() -> None:
    """Go on when every process is here."""
    if together():
        dist.barrier()
