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
# [← LoRA](29_lora.ipynb) | [contents](00_overview.ipynb)

# %% [markdown]
# # 30 · Distributed training: what must stay the same when many machines train one model?
#
# *45 minutes* · part V, Learning
#
# **What you will be able to do**
#
# - run one training in several processes, and prove that its curve is that of one;
# - divide weights, gradients and AdamW's averages among them, and say what each then holds;
# - stop on two machines and go on with one or four; survive a machine that dies;
# - plan a run of PaliGemma's size on paper: days, memory, traffic.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("distributed")

# %% [markdown]
# ## Setup
#
# From earlier lessons: the model ([15](15_model.ipynb)), a block of the sigmoid loss
# ([26](26_contrastive.ipynb)) and `train` ([27](27_training.ipynb)), which runs here unchanged. Cells that
# begin with `#| export` become [distributed.py](../paligemma/distributed.py).

# %%
#| export
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

# %% tags=["setup"]
import shutil
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from paligemma.contrastive import sigmoid_loss
from paligemma.gemma2 import Gemma2Config
from paligemma.model import PaliGemmaConfig
from paligemma.siglip import SiglipVisionConfig
from paligemma.support.course import check, save_figure
from paligemma.support.drawing import COLOURS
from paligemma.support.launch import torchrun

torch.set_num_threads(1)
_ = torch.manual_seed(30)

# %% [markdown]
# ## The problem
#
# Each weight in float32 needs 16 bytes while it learns: itself, its gradient and AdamW's two averages
# ([lesson 27](27_training.ipynb)). The published models, beside a GPU of 80 GB:


# %% tags=["hide-input"]
def weights_of(**text):
    """How many weights a PaliGemma 2 with this decoder has."""
    vision, text = SiglipVisionConfig(), Gemma2Config(**text)
    with torch.device("meta"):
        model = PaliGemma(PaliGemmaConfig(vision, text))
    return sum(p.numel() for p in model.parameters())


with torch.device("meta"):
    paper = PaliGemma(PaliGemmaConfig())
sizes = {
    "PaliGemma 3B": sum(p.numel() for p in paper.parameters()),
    "PaliGemma 2 3B": weights_of(),
    "PaliGemma 2 10B": weights_of(
        hidden_size=3584, intermediate_size=14336, num_hidden_layers=42,
        num_attention_heads=16, num_key_value_heads=8,
    ),
    "PaliGemma 2 28B": weights_of(
        hidden_size=4608, intermediate_size=36864, num_hidden_layers=46, num_attention_heads=32,
        num_key_value_heads=16, head_dim=128,
    ),
}  # fmt: skip
need = {name: 16 * size / 1e9 for name, size in sizes.items()}
assert max(need["PaliGemma 3B"], need["PaliGemma 2 3B"]) < 80 < need["PaliGemma 2 10B"]
fig, ax = plt.subplots(figsize=(8, 2.2), layout="constrained")
for row, gigabytes in enumerate(need.values()):
    ax.barh(row, gigabytes, color=COLOURS["good" if gigabytes < 80 else "bad"], height=0.6)
    ax.text(max(gigabytes + 5, 84), row, f"{gigabytes:.0f} GB", va="center")
ax.axvline(80, color=COLOURS["ink"], linestyle="--", linewidth=0.9)
ax.text(84, -0.62, "one GPU", va="center")
ax.set_yticks(range(len(need)), list(need))
ax.set(xlabel="GB for weights, gradients and averages", xlim=(0, 500), ylim=(3.6, -0.95))
save_figure(fig, "30_problem")

# %% [markdown]
# The small ones fit, without a single activation, and are too **slow**: a billion examples take one
# GPU half a year. The large ones do not even **fit**. Two problems, two cures: *copies* of the model
# that share the examples, and *parts* of the model that share the weights.
#
# Either way one thing must not change: **the loss curve**. It is the test of this whole lesson.

# %% [markdown]
# ## By hand
#
# One weight $w = 3$, the loss $(wx - y)^2$ of an example, its gradient $2x(wx - y)$. Four examples are
# one batch. Two processes, each with a copy of $w$, take two examples each.

# %%
w, x, y = 3.0, [1.0, 2.0, -1.0, 0.5], [1.0, 4.0, 2.0, 1.5]
gradients = [2 * a * (w * a - b) for a, b in zip(x, y)]
whole = sum(gradients) / 4
left, right = sum(gradients[:2]) / 2, sum(gradients[2:]) / 2
print(f"each example {gradients}; the batch {whole}; the processes {left} and {right}")
assert (left + right) / 2 == whole

# %% [markdown]
# **The gradient of a batch is the mean of the gradients of its parts.** Whoever steps against that mean
# makes the step that one process would have made with all four; all copies step alike, and so stay
# equal. This is **data parallelism**.
#
# One condition: the parts count the same. Let the left answer have six labels and the right one two.

# %%
labels = [6, 2]
right_mean = (labels[0] * left + labels[1] * right) / sum(labels)
mean_of_means = (left + right) / 2
weights = [count * 2 / sum(labels) for count in labels]
print(f"over all labels {right_mean}, mean of means {mean_of_means}; weights {weights}")
assert (weights[0] * left + weights[1] * right) / 2 == right_mean != mean_of_means

# %% [markdown]
# [Lesson 27](27_training.ipynb) weighs the parts of a batch by their labels for this very reason. Its
# `train_step` divides by `mean_over_processes(…)` of the labels; alone that is their number.

# %% [markdown]
# ## Processes that talk
#
# A process has its own memory. `torchrun` starts several of the same program, and tells each its number
# (PyTorch says rank; it is not LoRA's) and how many there are:
#
# ```
# torchrun --standalone --nproc-per-node 2 script.py
# ```
#
# They talk over a *backend*: NCCL between GPUs, gloo between CPUs. What they say most often is an
# **all-reduce**: everybody gives a tensor, everybody gets the sum.


# %%
def talk():
    """What a process does: its own half of the batch, then the mean over all."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    me = dist.get_rank()
    x, y = torch.tensor([[1.0, 2.0], [-1.0, 0.5]]), torch.tensor([[1.0, 4.0], [2.0, 1.5]])
    w = torch.tensor(3.0, requires_grad=True)
    ((w * x[me] - y[me]) ** 2).mean().backward()
    own = w.grad.item()
    dist.all_reduce(w.grad)  # in place
    mean = w.grad.item() / dist.get_world_size()
    dist.destroy_process_group()
    return own, mean


# %% [markdown]
# Our helper [`torchrun`](../paligemma/support/launch.py) writes the function into a script, starts this
# command, and collects what each process returns.

# %%
for number, (own, mean) in enumerate(torchrun(talk, processes=2)):
    print(f"process {number}: its own gradient {own}, after the all-reduce {mean}")
    assert own == (left, right)[number] and mean == whole

# %% [markdown]
# Two real processes, the numbers from above. This is how ours join:


# %%
#| export
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


# %% [markdown]
# ## Copies: the same training, unchanged
#
# `DistributedDataParallel` (**DDP**) wraps a model. The forward pass is the same; during `backward` each
# gradient is averaged over the processes as soon as it is there. The loop need not know. What every
# process begins with:


# %%
def ingredients(**settings):
    """The same model, data and settings in every process."""
    from paligemma import scenes, training
    from paligemma.checkpoint import load_model
    from paligemma.processor import Processor

    folder = scenes.ASSETS / "tiny"
    data = scenes.SceneDataset(40, tasks=("caption", "is there", "detect"), objects=(1, 2))
    run = {"steps": 5, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 6, "save": False}
    config = training.TrainingConfig(**(run | settings))
    return load_model(folder), data, config, Processor.from_pretrained(folder)


# %%
def copies():
    """Five steps with DDP: `train` is lesson 27's."""
    from torch.nn.parallel import DistributedDataParallel

    from paligemma.training import train

    model, *rest = ingredients()
    return train(DistributedDataParallel(model), *rest)


# %% [markdown]
# Inside, `train` takes each process's own share of the batch. Somebody forgets this: every process
# reads the same data in the same order, and takes the first half.


# %%
def forgetful():
    from paligemma import training

    training.own_share = lambda batch: batch[: len(batch) // 2]
    return copies()


# %% [markdown]
# ## Parts: each process holds one half
#
# DDP makes a run faster, and no model smaller: each process holds everything. **FSDP** (fully sharded
# data parallel) gives each process a **shard**, a part, of every weight. Before a block runs, its shards
# are gathered; after it, what others hold is dropped. Gradients are summed and handed out in shards, and
# AdamW keeps averages for its own shards only.
#
# The plain form is one call a block, and one for the rest:


# %%
def parts():
    """Five steps with FSDP."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from paligemma.training import train

    model, *rest = ingredients()
    mesh = init_device_mesh("cpu", (2,))
    for block in [*model.vision_tower.encoder["layers"], *model.language_model.layers]:
        fully_shard(block, mesh=mesh)
    return train(fully_shard(model, mesh=mesh), *rest)


# %% [markdown]
# One launch runs all three. To compare with, the same five steps in one process:


# %%
def three_ways():
    from paligemma.distributed import processes

    with processes():
        return {"copies": copies(), "parts": parts(), "forgetful": forgetful()}


# %%
alone = training.train(*ingredients())
found = torchrun(three_ways, processes=2, uses=[ingredients, copies, forgetful, parts])
gaps = {name: max(abs(a - b) for a, b in zip(curve, alone)) for name, curve in found[0].items()}
assert found[0] == found[1]  # both processes report the mean over both

# %% tags=["nbval-ignore-output"]
print("largest difference to one process:", {name: f"{gap:.0e}" for name, gap in gaps.items()})
assert gaps["copies"] < 1e-5 and gaps["parts"] < 1e-5 and gaps["forgetful"] > 0.1

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7.5, 2.6), layout="constrained")
steps = range(1, 6)
ax.plot(steps, alone, color=COLOURS["muted"], lw=7, label="one process")
ax.plot(steps, found[0]["copies"], color=COLOURS["vision"], lw=2.4, label="two copies (DDP)")
ax.plot(steps, found[0]["parts"], "--", color=COLOURS["language"], lw=2, label="two halves (FSDP)")
ax.plot(steps, found[0]["forgetful"], ":", color=COLOURS["bad"], lw=2.4, label="forgotten share")
ax.set(xlabel="step", ylabel="loss", xticks=list(steps))
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
epoch = [training.examples_of(step, 40, TrainingConfig(batch_size=4))[:2] for step in range(10)]
assert len({number for first_half in epoch for number in first_half}) == 20  # of 40
save_figure(fig, "30_curves")

# %% [markdown]
# Copies and halves follow one process within $10^{-5}$: only the order of sums has changed.
#
# **A bug people really make** is the dotted curve. It runs, it raises no error, and by itself it looks like
# any other. But half the examples are never seen, and both machines do the same work. The check is this
# picture: a few steps against one process.

# %% [markdown]
# ### Ours
#
# `shard` leaves the given model as it is, so that it can take the trained weights back at the end. The
# parts are a second model over the same numbers.


# %%
#| export
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


# %% [markdown]
# ## What each process holds
#
# Sharded tensors are of the class `DTensor`; `to_local()` is the part that is here. So memory can be
# counted, and not only claimed.


# %%
#| export
def local_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes that this process holds of tensors, some of which are sharded."""
    here = (t.to_local() if isinstance(t, DTensor) else t for t in tensors if t is not None)
    return sum(t.numel() * t.element_size() for t in here)


# %%
def held(model, data, config, processor):
    """Bytes of weights, gradients and averages in this process, after one step."""
    from paligemma.distributed import local_bytes
    from paligemma.training import make_batch, make_optimizer

    (batch,) = make_batch([data[0]], processor)
    optimizer = make_optimizer(model, config)
    model(**batch).loss.backward()
    optimizer.step()
    weights = list(model.parameters())
    averages = [
        state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")
    ]
    return [local_bytes(weights), local_bytes(p.grad for p in weights), local_bytes(averages)]


# %% [markdown]
# We shall count alone, in two processes and in four. The same launches show something else: to stop,
# and to go on.
#
# ## Stop on two, go on with one or four
#
# One file, written by one process, would first have to hold the whole model. In a distributed checkpoint
# each process writes its own shards, and each file says which part of which tensor it holds. Whoever reads
# takes the parts that it wants from wherever they lie: **resharding**. Both are one line, `dcp.save(…)` and
# `dcp.load(…)`.


# %%
#| export
FLAT = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True)


def state_of(model: nn.Module, optimizer, ema=None) -> dict[str, torch.Tensor]:
    """What the next step depends on, by names that are the same however the model is divided."""
    state = {f"model.{k}": v for k, v in get_model_state_dict(model, options=FLAT).items()}
    state |= get_optimizer_state_dict(model, optimizer, options=FLAT)
    if ema:
        state |= {f"ema.{k}": v for k, v in get_model_state_dict(ema.module).items()}
        state["ema.steps"] = ema.n_averaged
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


# %% [markdown]
# `train` of [lesson 27](27_training.ipynb) takes two functions that keep its checkpoints. Ours write
# shards, as safetensors. Which folder of shards counts, when a process dies while others write, is care:
# [shards.py](../paligemma/support/shards.py).


# %%
#| export
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


# %% [markdown]
# ## The module: `train` in many processes
#
# Everything together. Alone it is [lesson 27](27_training.ipynb)'s `train` with other files.


# %%
#| export
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


# %% [markdown]
# ## A machine dies
#
# Llama 3 was trained on 16,000 GPUs for 54 days, and interrupted 419 times against its will: every three
# hours. `torchrun --max-restarts 1` watches its processes: when one dies, it stops the others and starts all
# anew. The program goes on from the last checkpoint, as always. (Set `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`, or a new try may find
# [addresses of the dead](https://github.com/pytorch/pytorch/issues/135712).)
#
# Here two processes shall make three steps; one of them is killed in the third.


# %%
def part_of_a_run(steps, folder, deadly_step=None):
    """Train up to `steps`; how often we were started anew, the curve, what this process holds."""
    import os
    import signal

    from paligemma import training
    from paligemma.distributed import processes, shard, train

    tries, rate_at = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), training.learning_rate_at

    def rate_or_death(step, config):
        if tries == 0 and os.environ["RANK"] == "1" and step + 1 == deadly_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return rate_at(step, config)

    training.learning_rate_at = rate_or_death  # `train` asks for the rate before each step
    with processes():
        model, *rest = ingredients(steps=steps, folder=folder, save_every=1)
        curve = train(model, *rest)
        return tries, curve, held(shard(model), *rest)


# %%
place, uses = Path(tempfile.mkdtemp()), [ingredients, held]
two = torchrun(part_of_a_run, 2, 3, str(place / "two"), 3, uses=uses, restarts=1)
tries, curve, memory = two[0]
print("started anew:", tries, "| steps:", len(curve))
print(sorted(file.name for file in (place / "two").rglob("*") if file.is_file()))
assert tries == 1 and max(abs(a - b) for a, b in zip(curve, alone)) < 1e-5

# %% [markdown]
# Two steps were saved, the third was lost and made again: the same curve. Now one process goes on (this
# notebook), and so do four.

# %%
for name in ("one", "four"):
    shutil.copytree(place / "two", place / name)
resumed = {"one": train(*ingredients(folder=str(place / "one"), save_every=1))}
four = torchrun(part_of_a_run, 4, 5, str(place / "four"), uses=uses)
resumed["four"] = four[0][1]
shutil.rmtree(place)

# %% tags=["nbval-ignore-output"]
gaps = {name: max(abs(a - b) for a, b in zip(curve, alone)) for name, curve in resumed.items()}
print(
    "largest difference to the run that never stopped:",
    {n: f"{gap:.0e}" for n, gap in gaps.items()},
)
assert max(gaps.values()) < 1e-5 and all(len(curve) == 5 for curve in resumed.values())

# %% [markdown]
# Three steps were made by two processes, the last two by one or by four: one curve. And the memory?

# %%
memory = {1: held(*ingredients()), 2: memory, 4: four[0][2]}  # bytes, of process 0
for count, numbers in memory.items():
    print(f"{count} processes:", " + ".join(f"{n / 1e6:.2f}" for n in numbers), "MB")
assert all(abs(count * sum(memory[count]) / sum(memory[1]) - 1) < 0.02 for count in (2, 4))

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7.5, 2.4), layout="constrained")
for row, numbers in enumerate(memory.values()):
    begin = 0
    for part, name, colour in zip(
        numbers, ("weights", "gradients", "averages"), ("vision", "language", "together")
    ):
        ax.barh(row, part / 1e6, left=begin, color=COLOURS[colour], height=0.6,
                label=name if row == 0 else None)  # fmt: skip
        begin += part / 1e6
    ax.text(begin + 0.3, row, f"{begin:.1f} MB", va="center")
ax.set_yticks(range(3), [f"{count} process{'es' * (count > 1)}" for count in memory])
ax.set(xlabel="MB that each process holds", xlim=(0, 1.12 * sum(memory[1]) / 1e6))
ax.invert_yaxis()
ax.legend(loc="lower right")
save_figure(fig, "30_memory")

# %% [markdown]
# Half, and a quarter. What the figure does not count are activations, and the one block that is whole
# while it runs.

# %% [markdown]
# ## Pass it on: the loss that trained SigLIP
#
# A mean can be shared out. SigLIP's loss cannot: it compares every picture with **every** text, those of
# other processes too. [Lesson 26](26_contrastive.ipynb) cut it into blocks. Now each process keeps its
# pictures and passes its texts on, in a ring; after $n - 1$ rounds it has met them all. What a text learns
# abroad, its gradient, is passed back.


# %%
#| export
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


# %%
#| export
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


# %%
def ring(images, texts):
    """Two pairs of four for each process: its loss, and its features' gradients."""
    import torch

    from paligemma.distributed import process_number, processes, ring_sigmoid_loss

    with processes():
        mine = slice(2 * process_number(), 2 * process_number() + 2)
        images, texts = (torch.tensor(x[mine], requires_grad=True) for x in (images, texts))
        loss = ring_sigmoid_loss(images, texts, 3.0, -1.0)
        loss.backward()
        return loss.item(), images.grad.tolist(), texts.grad.tolist()


# %%
images, texts = torch.randn(2, 4, 5)
found = torchrun(ring, 2, images.tolist(), texts.tolist())
images, texts = images.requires_grad_(), texts.requires_grad_()
loss = sigmoid_loss(images, texts, 3.0, -1.0)
loss.backward()
rung = [torch.tensor([row for process in found for row in process[i]]) / 2 for i in (1, 2)]

# %%
print(f"one process {loss:.4f}; the mean of two {(found[0][0] + found[1][0]) / 2:.4f}")
assert abs(loss.item() - (found[0][0] + found[1][0]) / 2) < 1e-5
assert (images.grad - rung[0]).abs().max() < 1e-6 and (texts.grad - rung[1]).abs().max() < 1e-6

# %% [markdown]
# The loss and all gradients are those of one process (divided by two: DDP takes the mean over processes).

# %% [markdown]
# ## At full size: a plan on paper
#
# The paper's first stage: a billion examples, each of 256 image tokens and up to 128 of text. A weight
# costs 6 operations a token ([lesson 27](27_training.ipynb)), and the tower's weights see image tokens only.

# %%
weights = {name: sum(p.numel() for p in part.parameters()) for name, part in paper.named_children()}
examples, image, text = 1e9, 256, 128
seen = weights["vision_tower"] * image + weights["language_model"] * (image + text)
work = 6 * examples * seen
print(
    f"{examples * (image + text):.2e} tokens, {6 * seen / 1e12:.1f} TFLOP an example, {work:.1e} FLOP"
)


# %%
def days(chips, peak, utilisation):
    """How long the work takes; nobody reaches a chip's peak."""
    return work / (chips * peak * utilisation) / 86_400


# %%
planned, reported = days(256, 197e12, 0.55), 350e9 / (5189 * 256) / 86_400
print(f"256 TPUv5e at 55 %: {planned:.1f} days planned, {reported:.1f} reported")
print(f"H100 at 40 %: one {days(1, 989e12, 0.4):.0f} days, 64 of them {days(64, 989e12, 0.4):.1f}")
assert abs(planned - reported) < 0.5 and 150 < days(1, 989e12, 0.4) < 210

# %% [markdown]
# "Reported": the paper says 55 % utilisation, slightly less than 350 billion tokens, and 5,189 of them a
# second and chip. Six operations a weight and token, and the plan is right within half a day.
#
# And the network? In a ring the gradient is cut into $n$ pieces. $n - 1$ rounds add up each piece on its way
# round, $n - 1$ more spread the sums. So each GPU sends $2(n-1)/n$ times the gradient, however many they are.

# %%
total, gpus, batch = sum(weights.values()), 64, 4096
seconds = days(gpus, 989e12, 0.4) * 86_400 / (examples / batch)
sent = 2 * (gpus - 1) / gpus * 4 * total
print(
    f"a step: {seconds:.2f} s to compute; {sent / 1e9:.0f} GB sent, {sent / 50e9:.2f} s at 50 GB/s"
)
print(f"memory a GPU: copies {16 * total / 1e9:.0f} GB, parts {16 * total / gpus / 1e9:.2f} GB")
assert 0.25 < sent / 50e9 / seconds < 0.5  # a quarter of the batch: above 1

# %% [markdown]
# Sending takes less than half as long as computing, and hides behind it: gradients of late blocks leave while
# those of early ones are computed. With a batch of 1,024 it would take longer than the step. This is why
# many GPUs want large batches. FSDP sends half as much again: weights are gathered twice, gradients handed
# out once.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): how many GPUs?
#
# `sizes["PaliGemma 2 28B"]` weights are to be trained in float32 with AdamW under FSDP, on GPUs of 80 GB.
# 20 GB of each are kept for activations and the block that is gathered. What is the least number of GPUs?

# %% tags=["exercise"]
answer_1 = None  # a whole number


# %% tags=["check"]
def test_1(value):
    assert isinstance(value, int) and value > 0, "give a whole number of GPUs"
    size = sizes["PaliGemma 2 28B"]
    assert value != -(-16 * size // 80_000_000_000), "20 GB of each GPU are not free"
    assert value != -(-4 * size // 60_000_000_000), "weights alone do not learn: what else is held?"
    assert value != -(-8 * size // 60_000_000_000), "AdamW keeps averages, too"
    assert value != 16 * size // 60_000_000_000, "the last GPU may not be cut off: round up"
    held_by_each = 16 * size / value / 1e9
    assert held_by_each <= 60, f"each would have to hold {held_by_each:.0f} GB"
    assert 16 * size / (value - 1) / 1e9 > 60, "it would also work with one GPU less"


check(test_1, answer_1)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Bytes of everything that a weight needs while it learns, over the bytes that are free on a GPU.
#
# </details>

# %% tags=["solution"]
answer_1 = -int(-16 * sizes["PaliGemma 2 28B"] // 60e9)  # 442 GB over 60, rounded up
check(test_1, answer_1)

# %% [markdown]
# ### Exercise 2 (write): the ring
#
# Write the all-reduce itself. `numbers[p]` is the list of process $p$, $n$ numbers for $n$ processes;
# afterwards every list holds the sums. Processes meet only in `exchange(outgoing)`: process $p$ sends the
# *one* number `outgoing[p]` to process $p + 1$ (the last to the first), and what you get back is what
# arrived at each. Call it $2(n - 1)$ times.


# %% tags=["exercise"]
def ring_all_reduce(numbers, exchange):
    """n lists of n numbers → n equal lists, the sums."""
    return None  # your code


# %% tags=["check"]
def test_2(ring_all_reduce):
    for n in (2, 3, 5):
        start, calls = [[10**p * (i + 1) for i in range(n)] for p in range(n)], []

        def exchange(outgoing):
            calls.append(len(outgoing))
            assert len(outgoing) == n, "outgoing has one number for each process"
            one = all(isinstance(value, (int, float)) for value in outgoing)
            assert one, "each process sends one number at a time, not a list"
            return [outgoing[p - 1] for p in range(n)]

        found = ring_all_reduce([list(row) for row in start], exchange)
        assert isinstance(found, list) and len(found) == n, "return the lists of all processes"
        assert calls, "nothing was sent: how can a process know the numbers of another?"
        sums = [sum(column) for column in zip(*start)]
        right = [[abs(a - b) < 1e-9 for a, b in zip(row, sums)] for row in found]
        assert len(calls) <= 2 * (n - 1), (
            f"{len(calls)} rounds for {n} processes: send sums that have grown, not single numbers"
        )
        if len(calls) < 2 * (n - 1):
            raise AssertionError("the sums are made, but who has them? Not all processes, yet")
        big = any(value > total for row in found for value, total in zip(row, sums))
        assert not big, "something was added twice: in the second half finished sums go round"
        assert all(map(all, right)), (
            "not every list holds the sums: which piece arrives in a round?"
        )


check(test_2, ring_all_reduce)

# %% [markdown]
# <details><summary>Hint</summary>
#
# In round $t$ process $p$ sends its piece number $(p - t) \bmod n$. Which number has the piece that
# arrives? In the first $n - 1$ rounds it is added to the own one, in the others it takes its place.
#
# </details>


# %% tags=["solution"]
def ring_all_reduce(numbers, exchange):
    """n lists of n numbers → n equal lists, the sums."""
    n = len(numbers)
    for turn in range(2 * (n - 1)):
        arrived = exchange([numbers[p][(p - turn) % n] for p in range(n)])
        for p, value in enumerate(arrived):
            at = (p - 1 - turn) % n  # the piece that the process before has sent
            own = numbers[p][at] if turn < n - 1 else 0  # later the sum is finished
            numbers[p][at] = own + value
    return numbers


check(test_2, ring_all_reduce)

# %% [markdown]
# ### Exercise 3 (extend): parts of parts
#
# Each process works through its share in several parts. `counts[p][i]` is how many labels part $i$ of
# process $p$ has; the model gives the mean loss of a part. By which factor must process `me` multiply the
# loss of its part `i`, so that the gradients, added over parts and *averaged* over processes, are those
# of the mean over all labels?


# %% tags=["exercise"]
def factor(counts, me, i):
    """list of lists of int, int, int → float."""
    return None  # your code


# %% tags=["check"]
def test_3(factor):
    counts = [[5, 1, 2], [3, 7, 4]]
    found = [[factor(counts, me, i) for i in range(3)] for me in range(2)]
    numbers = all(isinstance(value, (int, float)) for row in found for value in row)
    assert numbers, "give a number for each part"
    total, value = sum(map(sum, counts)), found[1][1]
    off = lambda other: abs(value - other) > 1e-6  # noqa: E731
    assert off(1 / 3) and off(1), "every part counts the same here, whatever its labels are"
    assert off(7 / 14), "these are shares of the process's own labels: what of the other's?"
    assert off(7 / total), "the processes' gradients are averaged, not added"
    assert off(7), "a loss is already a mean over its labels; how large is the sum of all factors?"
    means = [[0.5, 2.0, 1.0], [4.0, 0.25, 3.0]]
    wanted = sum(c * m for row, line in zip(counts, means) for c, m in zip(row, line)) / total
    mean = sum(f * m for row, line in zip(found, means) for f, m in zip(row, line)) / 2
    assert abs(mean - wanted) < 1e-6, "for these parts the mean over all labels is another number"


check(test_3, factor)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Write down what is wanted, a sum over all parts. DDP divides it by the number of processes: what undoes
# that?
#
# </details>


# %% tags=["solution"]
def factor(counts, me, i):
    """list of lists of int, int, int → float."""
    return counts[me][i] * len(counts) / sum(map(sum, counts))  # × processes: DDP takes the mean


check(test_3, factor)

# %% [markdown]
# ## Summary
#
# - The mean of the parts' gradients is the batch's, when the parts weigh by their labels.
# - DDP shares examples; FSDP shares weights, gradients and averages, too.
# - A distributed checkpoint goes on in any number of processes, also after one has died.
# - A curve that equals that of one process is the test of it all.

# %% [markdown]
# ## Quiz
#
# **1.** Two processes train twice as fast as one, and the curve falls as before, a little worse. What do
# you check first?
#
# <details><summary>Answer</summary>
#
# Whether both see the same examples. Run a few steps in one process with the same batch size: the losses
# must agree to five digits.
#
# </details>

# %% [markdown]
# **2.** Why does FSDP not make a forward pass wrong, though no process has a whole weight?
#
# <details><summary>Answer</summary>
#
# Each block's weights are gathered just before it runs, and the others' parts dropped after it. At each
# moment one block is whole.
#
# </details>

# %% [markdown]
# **3.** You double the GPUs and keep the batch. Computing takes half as long, and sending?
#
# <details><summary>Answer</summary>
#
# As long as before: $2(n-1)/n$ times the gradient is nearly the same for every $n$. At some number of GPUs
# sending is all that is left.
#
# </details>

# %% [markdown]
# ## References
#
# - Beyer et al. 2024, *PaliGemma: A versatile 3B VLM for transfer*
#   ([arXiv 2407.07726](https://arxiv.org/abs/2407.07726)), section 3.2 and the appendix on training.
# - Zhai et al. 2023, *Sigmoid Loss for Language Image Pre-Training*
#   ([arXiv 2303.15343](https://arxiv.org/abs/2303.15343)), section 3.3.
# - Rajbhandari et al. 2020, *ZeRO* ([arXiv 1910.02054](https://arxiv.org/abs/1910.02054)); Zhao et al.
#   2023, *PyTorch FSDP* ([arXiv 2304.11277](https://arxiv.org/abs/2304.11277)).
# - Llama Team 2024, *The Llama 3 Herd of Models*
#   ([arXiv 2407.21783](https://arxiv.org/abs/2407.21783)), section 3.3.4 (interruptions).
# - PyTorch: `torch.distributed.fsdp.fully_shard`, `torch.distributed.checkpoint`, `torchrun`.

# %% [markdown] tags=["navigation"]
# [← LoRA](29_lora.ipynb) | [contents](00_overview.ipynb)
