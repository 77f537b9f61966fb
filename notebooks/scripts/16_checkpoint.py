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
# [← PaliGemma](15_model.ipynb) | [contents](00_overview.ipynb) | [Sampling →](17_sampling.ipynb)

# %% [markdown]
# # 16 · Checkpoint: how do three billion numbers find their places?
#
# *45 minutes* · part III, Together
#
# **What you will be able to do**
#
# - open a weight file with nothing but `struct` and `json`, and read a tensor out of it;
# - load a published model in thirty lines: names, shapes without memory, strictness, no copy;
# - name the damage that each guard of a real loader is for;
# - recognise a model that loaded "without errors" and is partly random.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("checkpoint")

# %% [markdown]
# ## Setup
#
# From earlier lessons: the configs ([05](05_siglip.ipynb), [12](12_gemma.ipynb), [13](13_gemma2.ipynb)), the processor ([14](14_processor.ipynb)) and the whole model ([15](15_model.ipynb)). From `paligemma.support`: care with files and configs that no lesson is about. The first cell becomes the opening lines of [checkpoint.py](../paligemma/checkpoint.py).

# %%
#| export
"""Read and write checkpoints in the published layout, strictly and memory-mapped."""

import json
import os
import re
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from paligemma.gemma import GemmaConfig
from paligemma.gemma2 import Gemma2Config
from paligemma.model import PaliGemma, PaliGemmaConfig
from paligemma.siglip import SiglipVisionConfig
from paligemma.support.config import config_dict, parse_device, parse_dtype, read_config
from paligemma.support.files import CheckpointError, find_folder, open_tensors
from paligemma.support.replacing import replacing
from paligemma.support.tensors import check_family, match_tensors, weight_files, write_weights

# %% tags=["setup"]
import mmap
import shutil
import struct
import sys
import tempfile
import time
import warnings
from importlib import resources

import matplotlib.pyplot as plt
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from paligemma.plotting import show_images
from paligemma.processor import Processor
from paligemma.support.course import check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS

TINY = Path(resources.files("paligemma") / "assets" / "tiny")  # the trained model of this course
trash = tempfile.TemporaryDirectory()  # all files of this lesson; gone with the notebook
folder = Path(trash.name)
_ = torch.manual_seed(16)

# %% [markdown]
# ## The problem
#
# Fifteen lessons built a model. Its code is little more than a thousand lines; what it *knows* is 2,923,466,480 numbers. They come as a **checkpoint**: a directory with the numbers, their names and a description of the model's shape.
#
# Python will not notice if one lands in the wrong place. How do they get in *fast*, and how do we *know* that all are right? The first obstacle is names: the same tensor has been published under several.

# %%
published = {
    "on the hub": "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
    "transformers 5": "vision_tower.encoder.layers.0.mlp.fc1.weight",
    "in memory": "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
}

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(8.6, 2.3), layout="constrained")
for y, (layout, name) in zip((2, 1, 0), published.items()):
    ax.text(0, y, f"{layout}:", va="center", weight="bold", fontsize=9)
    ax.text(1.3, y, name, va="center", family="monospace", fontsize=9, color=COLOURS["vision"])
    arrow = {"arrowstyle": "-|>", "color": COLOURS["muted"], "shrinkB": 2}
    ax.annotate("", (7.3, 1), (5.95, y), arrowprops=arrow)
place = {"boxstyle": "round,pad=0.6", "fc": COLOURS["together"], "ec": "none"}
ax.text(8.35, 1, "one tensor\n4304 × 1152", ha="center", va="center", color="white", bbox=place)
ax.set(xlim=(0, 9.3), ylim=(-0.5, 2.5))
ax.set_axis_off()
save_figure(fig, "16_names")

# %% [markdown]
# ## By hand: open a file with `struct` and `json`
#
# The numbers lie in a **safetensors** file. It is so plain that five lines read it:
#
# 1. eight bytes: the length $n$ of the header, as a whole number;
# 2. $n$ bytes: the header, JSON text that gives each tensor's type, shape and place;
# 3. all the rest: the numbers, one tensor after the other.
#
# We write one with two tensors, then forget that we know the library.

# %%
file = folder / "two.safetensors"
save_file({"pair": torch.tensor([[1.0, 2, 3], [4, 5, 6]]), "one": torch.tensor([7.0])}, file)
data = file.read_bytes()
(n,) = struct.unpack("<Q", data[:8])  # < little end first, Q eight bytes, unsigned
header = json.loads(data[8 : 8 + n])
print(len(data), "bytes, of which the header has", n)
for name, entry in header.items():
    print(name, entry)

# %% [markdown]
# `data_offsets` count from the end of the header. `one` needs 4 bytes, `pair` needs $6 \cdot 4 = 24$. Check the places with a pencil, then read `pair` by hand:

# %%
start, end = (8 + n + offset for offset in header["pair"]["data_offsets"])
print(struct.unpack("<6f", data[start:end]))

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(8.6, 1.5), layout="constrained")
parts = [("length", 8, "ink"), ("header (JSON)", n, "together")]
ordered = sorted(header, key=lambda name: header[name]["data_offsets"])
widths = [header[name]["data_offsets"][1] - header[name]["data_offsets"][0] for name in ordered]
parts += list(zip(ordered, widths, ("accent", "inside")))
left = 0
for name, width, colour in parts:
    ax.barh(0, width, left=left, color=COLOURS[colour], edgecolor="white", height=0.5)
    inside = width > 20
    ax.text(
        left + width / 2,
        0 if inside else 0.42,
        name if inside else f"{name}\n",
        ha="center",
        va="center",
        color="white" if inside else COLOURS[colour],
        fontsize=9,
    )
    left += width
ax.set(xlim=(0, left), ylim=(-0.3, 0.75), xlabel="byte of the file", yticks=[])
ax.spines.left.set_visible(False)
save_figure(fig, "16_bytes")

# %% [markdown]
# That is the whole format. The older one, a **pickle** (`pytorch_model.bin`), is a small *program* that Python runs to rebuild objects, and it may do anything, such as deleting your files. In a safetensors file there is nothing to run.
#
# ## As a loop: read, slice, copy
#
# Do the same for every entry, and a whole file is read. We try it on the trained model that ships with this course.


# %%
TYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


def read_tensors(data):
    """All tensors of a safetensors file, from its bytes: a dict by name."""
    (n,) = struct.unpack("<Q", data[:8])
    header, body, tensors = json.loads(bytes(data[8 : 8 + n])), data[8 + n :], {}
    header.pop("__metadata__", None)  # a note that some programs leave
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        flat = torch.frombuffer(body[start:end], dtype=TYPES[entry["dtype"]])
        tensors[name] = flat.view(entry["shape"])
    return tensors


# %%
stored = read_tensors(bytearray((TINY / "model.safetensors").read_bytes()))
library = load_file(TINY / "model.safetensors")
assert stored.keys() == library.keys()
assert all(torch.equal(stored[name], library[name]) for name in stored)
print(len(stored), "tensors, equal to the library's; for example", list(stored)[-1])

# %% [markdown]
# ### Names
#
# Four patterns bring every layout to the names of our own modules. The order matters: `model.` goes first, so that the others see the same beginning. Writing a file needs the way back.

# %%
#| export
RENAME = [
    (re.compile(r"^model\."), ""),
    (re.compile(r"^vision_tower\.vision_model\."), "vision_tower."),
    (re.compile(r"^language_model\.model\."), "language_model."),
    (re.compile(r"^(language_model\.)?lm_head\.weight$"), "lm_head.weight"),
]


def internal_name(name: str) -> str:
    """A tensor's name in any of the published layouts → its name in our `PaliGemma`."""
    for pattern, replacement in RENAME:
        name = pattern.sub(replacement, name)
    return name


def published_name(name: str) -> str:
    """A tensor's name in our `PaliGemma` → its name in the published layout."""
    name = re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)
    return re.sub(r"^language_model\.", "language_model.model.", name)


# %%
for layout, name in published.items():
    print(f"{layout:15} → {internal_name(name)}")
assert len({internal_name(name) for name in published.values()}) == 1

# %% [markdown]
# ### The shape
#
# `config.json` says how wide and how deep the model is. A published one is *sparse*: what equals transformers' default is left out. `read_config` of [support/config.py](../paligemma/support/config.py) fills that in; we put the numbers into our dataclasses.


# %%
#| export
def build_config(found: dict) -> PaliGemmaConfig:
    """What `read_config` returns → our dataclasses."""
    text = dict(found["text_config"])
    kind = Gemma2Config if text.pop("model_type") == "gemma2" else GemmaConfig
    return PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**found["vision_config"]),
        text_config=kind(**text),
        image_token_index=found["image_token_index"],
        pad_token_id=found["pad_token_id"],
        eos_token_id=found["eos_token_id"],
        bos_token_id=found["bos_token_id"],
    )


# %% [markdown]
# ### Load, by copying
#
# The plainest loader: build the model with random numbers, read the file, copy each tensor over the random ones.


# %%
def load_by_copying(path):
    model = PaliGemma(build_config(read_config(path)))
    places = model.state_dict()
    data = bytearray((path / "model.safetensors").read_bytes())
    for name, tensor in read_tensors(data).items():
        places[internal_name(name)].copy_(tensor)
    return model.eval()


# %%
copied = load_by_copying(TINY)
print(f"{sum(p.numel() for p in copied.parameters()):,} parameters, {copied.dtype}")

# %% [markdown]
# Seven lines, and the model is awake. We ask it about a picture and look at the token that it finds most likely.


# %%
processor = Processor.from_pretrained(TINY)


def first_word(model, question):
    """The likeliest first token of the answer about the picture below, and its probability."""
    batch = processor(sample_picture("scene"), question)
    with torch.no_grad():
        logits = model(batch["input_ids"], batch["pixel_values"]).logits[0, -1]
    chance, token = logits.softmax(-1).max(-1)
    return processor.decode([int(token)]), chance.item()


# %%
question = "answer en how many dogs are there?"
word, chance = first_word(copied, question)
print(f"{question}  {word} ({chance:.0%})")
assert word == "2" and chance > 0.9

# %% tags=["hide-input"]
show_images(sample_picture("scene"), height=1.6)

# %% [markdown]
# It is right. But the loader drew a random number for every weight only to overwrite it, and moved every byte again and again: into a buffer, into slices of it, into the model. And nobody asked whether *each* tensor was in the file: one that it lacks would have stayed random, without a word. Three tools remove all of this.

# %% [markdown]
# ## Load, in thirty lines
#
# ### Tool 1: a model without memory
#
# To know what *should* be in the file we need names and shapes, no numbers. On the **meta device** tensors have a shape, a type and no storage. Here is the whole 3B model, without one number:

# %% tags=["nbval-ignore-output"]
modules, start = len(sys.modules), time.perf_counter()
with torch.device("meta"):
    big = PaliGemma(PaliGemmaConfig())
print(f"{1000 * (time.perf_counter() - start):.0f} ms, {len(sys.modules) - modules} new modules")

# %%
weight = big.language_model.embed_tokens.weight
count = sum(p.numel() for p in big.parameters())
print(tuple(weight.shape), weight.device, f"{count:,} parameters")
assert count == 2_923_466_480

# %% [markdown]
# (Hundreds of new modules? We come back to that.)
#
# ### Tool 2: let the operating system read
#
# **Memory mapping** asks the operating system: *pretend that this file lies in memory at these addresses*. Nothing is read. When the program touches an address, the system fetches that page (4 KB) from the file, and may drop it again when memory is short.
#
# Our reader does not care where its bytes lie:

# %%
with file.open("rb") as opened:
    mapped = read_tensors(memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)))
print({name: tensor.tolist() for name, tensor in mapped.items()})
mapped["one"].fill_(-1)
print("in memory:", mapped["one"].tolist(), "in the file:", load_file(file)["one"].tolist())
assert mapped["one"] == -1 and load_file(file)["one"] == 7

# %% [markdown]
# With `ACCESS_COPY` a changed page becomes the program's own. So training on mapped weights never writes into the checkpoint.
#
# ### Tool 3: `strict` and `assign`
#
# `load_state_dict` has two switches. `strict=True` compares the names in the dictionary with those of the model and raises when one is missing or left over. `assign=True` puts the tensors *themselves* into the model instead of copying their numbers. (`safe_open` is the library's reader: mapped, like ours, and it checks the header.)


# %%
def load_plain(path):
    with torch.device("meta"):
        model = PaliGemma(build_config(read_config(path)))
    state = {}
    with safe_open(path / "model.safetensors", framework="pt") as tensors:
        for name in tensors.keys():
            state[internal_name(name)] = tensors.get_tensor(name)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


tiny = load_plain(TINY)
for name, weight in tiny.state_dict().items():
    assert torch.equal(weight.float(), copied.state_dict()[name])
print(tiny.dtype, first_word(tiny, question)[0])

# %% [markdown]
# With the names and the shape from above that makes about thirty lines, and they load any published PaliGemma that lies in one file. The weights are in bfloat16 now, because they *are* those of the file.
#
# ## See it: loading is (almost) nothing
#
# A larger file, loaded in both ways. Linux tells how many MB of files this process has in memory.


# %% tags=["hide-input"]
def pages():
    """MB of files that this process has in memory (Linux only, else 0)."""
    status = Path("/proc/self/status")
    found = re.search(r"RssFile:\s+(\d+)", status.read_text() if status.exists() else "")
    return int(found[1]) / 1000 if found else 0


middle = PaliGemmaConfig(
    SiglipVisionConfig(64, 128, 2, 2, image_size=28),
    GemmaConfig(32768, 512, 2048, 6, 4, 1, 128),
    image_token_index=32767,
)
(folder / "middle").mkdir()
(folder / "middle" / "config.json").write_text(json.dumps(config_dict(middle)))
random_weights = {published_name(n): t for n, t in PaliGemma(middle).state_dict().items()}
save_file(random_weights, folder / "middle" / "model.safetensors")
del random_weights
size = (folder / "middle" / "model.safetensors").stat().st_size / 1e6
print(f"the file: {size:.0f} MB")

# %% tags=["nbval-ignore-output"]
fetched = {}
for load in (load_by_copying, load_plain):
    before, start = pages(), time.perf_counter()
    model = load(folder / "middle")
    ms = 1000 * (time.perf_counter() - start)
    loaded = pages() - before
    total = sum(weight.sum() for weight in model.parameters())  # touch every number once
    fetched[load] = loaded, pages() - before
    print(f"{load.__name__:16} {ms:4.0f} ms, MB of the file: {loaded:.0f}, after use:", end=" ")
    print(f"{fetched[load][1]:.0f}")
if pages():  # on Linux
    assert fetched[load_plain][0] < 0.1 * size and fetched[load_plain][1] > 0.9 * size
    assert fetched[load_by_copying][1] < 0.1 * size

# %% [markdown]
# What to notice: the mapped model is there at once, because nothing was read. The bytes come when they are used, and then they belong to the *file*: two programs that map the same checkpoint share one copy, and a second start finds the pages still in memory. The copied numbers are the program's own, once for each program.

# %% [markdown]
# ## What a real loader adds
#
# A checkpoint comes from elsewhere, and our thirty lines believe all of it. Now the damage, one kind at a time, each beside its guard.
#
# ### Damage 1: a start that takes too long
#
# Even on the meta device PyTorch calls the functions that fill weights with random numbers. The first such call imports PyTorch's compiler: the modules above. A *function mode* sees every call of a PyTorch function; ours answers those of `torch.nn.init` itself.


# %%
#| export
class NoInit(TorchFunctionMode):
    """Leave new weights as they are: on the meta device there is nothing to fill."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def empty_model(config: PaliGemmaConfig) -> PaliGemma:
    """The model with shapes and no memory."""
    with torch.device("meta"), NoInit():
        return PaliGemma(config)


# %%
shapes = {
    name: weight.shape for name, weight in empty_model(PaliGemmaConfig()).state_dict().items()
}
assert shapes == {name: weight.shape for name, weight in big.state_dict().items()}
print(len(shapes), "tensors, the same names and shapes")

# %% [markdown]
# In a program that loads with `empty_model` the compiler is never imported. A test starts one and looks.
#
# ### Damage 2: what `strict=True` does not see
#
# These three have happened to people. The plain form loads two of them without a word, though they are wrong, and refuses the third, which is right.

# %%
good = load_file(TINY / "model.safetensors")
fc1 = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
table = "language_model.model.embed_tokens.weight"
cases = {
    "stored twice, and not the same": good | {internal_name(fc1): torch.zeros_like(good[fc1])},
    "in eight bits": good | {fc1: (100 * good[fc1]).to(torch.float8_e4m3fn)},
    "tied pair under its other name": {n.replace(table, "lm_head.weight"): good[n] for n in good},
}


# %% tags=["hide-input"]
def write(path, tensors, config=tiny.config):
    """A checkpoint directory with these tensors."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config_dict(config)))
    save_file(tensors, path / "model.safetensors")
    return path


def complaint(action):
    """What an action says, without the name of the folder."""
    try:
        action()
        return "all right"
    except ValueError as error:
        return str(error).replace(f"{folder}/", "")


# %%
for title, tensors in cases.items():
    try:
        load_plain(write(folder / "case", tensors))
        print(f"{title}: loaded")
    except RuntimeError as error:
        print(f"{title}: refused,", str(error).split("\n")[1].strip())

# %% [markdown]
# In the first case the dictionary kept whichever came last. In the second the weights are a hundred times too large: eight bits come with a factor, which lies elsewhere. The third is a good file: the head *is* the embedding (tied, [lesson 12](12_gemma.ipynb)), and some programs store it under the head's name.
#
# So a step comes before `load_state_dict`: each tensor must have one place, and each place one tensor, of the right shape and a type of plain numbers.

# %%
#| export
EMBEDDING, HEAD = "language_model.embed_tokens.weight", "lm_head.weight"


def read_state(path: Path, found: dict, expected: dict) -> dict[str, torch.Tensor]:
    """The tensors of a directory under our names, mapped, each accounted for.

    Args:
        path: the directory.
        found: its config, from `read_config`.
        expected: the state dict of the empty model.

    Raises:
        CheckpointError: a missing, left-over, doubled or wrongly shaped tensor.
    """
    state, spelling = {}, {}
    for stored, tensor in open_tensors(weight_files(path)).items():
        name = internal_name(stored)
        if name in state:
            raise CheckpointError(f"{path} holds {stored} twice, under different names")
        # transformers may save the vision tower with a pooling head, which PaliGemma never calls
        if not (found["vision_use_head"] and name.startswith("vision_tower.head.")):
            state[name], spelling[name] = tensor, stored
    head = state.pop(HEAD, None)
    if head is not None:  # the embedding under its other name, or once more
        match_tensors(path, {HEAD: head}, {HEAD: expected[EMBEDDING]})
        state.setdefault(EMBEDDING, head)
    check_family(path, state, expected, found["quantization_config"])
    match_tensors(path, state, expected, lambda name: spelling.get(name) or published_name(name))
    if head is not None and not torch.equal(head.to(state[EMBEDDING]), state[EMBEDDING]):
        raise CheckpointError(f"{path}: {HEAD} differs from the embedding; PaliGemma ties the two")
    return state


# %%
expected = empty_model(tiny.config).state_dict()
for title, tensors in cases.items():
    path = write(folder / "case", tensors)
    print(f"{title}: {complaint(lambda: read_state(path, read_config(path), expected))}")

# %% [markdown]
# ### Damage 3: files that aren't what their names say
#
# `weight_files` finds the files that belong to the checkpoint, and `open_tensors` maps them ([support/tensors.py](../paligemma/support/tensors.py), [support/files.py](../paligemma/support/files.py)). This is ordinary care: one clear line that says which file, and what to do.

# %%
path = write(folder / "case", good)
whole = (path / "model.safetensors").read_bytes()
contents = {"cut off": whole[:-1000], "empty": b"", "a web page": b"<html>" * 9}
for title, data in contents.items():
    (path / "model.safetensors").write_bytes(data)
    print(f"{title}: {complaint(lambda: open_tensors(weight_files(path)))}")

# %% [markdown]
# ### Load, as a real program does
#
# The plain form with its guards in place, and two additions: `device` and `dtype` (`.to` returns a tensor unchanged when both are right already, so that it stays mapped), and `find_folder`, which knows `~` and the hub's cache.


# %%
#| export
def load_model(
    path: str | os.PathLike,
    device: torch.device | str | int = "cpu",
    dtype: torch.dtype | str | None = torch.float32,
    progress: bool = False,
    revision: str | None = None,
) -> PaliGemma:
    """Load a checkpoint directory, every tensor accounted for.

    Args:
        path: directory with `config.json` and `*.safetensors` (with an index when sharded), or
            what else `find_folder` knows: a folder of the hub's cache, a hub name.
        device: where the weights go: "cpu", "cuda:1", 0, "auto".
        dtype: of the weights, `torch.bfloat16` or "bfloat16"; None: as stored. Stored type on
            the CPU: the tensors stay mapped, so that loading takes next to no time and no second
            copy in memory.
        progress: show a bar on standard error.
        revision: branch, tag or commit, for a hub name.

    Returns:
        A `PaliGemma` in evaluation mode. An adapter in the directory is not applied.

    Raises:
        CheckpointError: (a `ValueError`) a missing, left-over, doubled or wrongly shaped tensor,
            a file that cannot be read, or a config that does not fit.
    """
    device, dtype = parse_device(device), parse_dtype(dtype)
    path = find_folder(path, revision)
    found = read_config(path)
    try:
        model = empty_model(build_config(found))
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: config.json fits no model: {error}") from None
    state = read_state(path, found, model.state_dict())
    for name in tqdm(state, "loading weights", unit=" tensors", disable=not progress):
        state[name] = state[name].to(device=device, dtype=dtype or state[name].dtype)
    model.load_state_dict(state, strict=True, assign=True)
    model.config.name_or_path = str(path)
    return model.eval()


# %%
again = load_model(TINY, dtype="bfloat16")
assert all(torch.equal(again.state_dict()[n], weight) for n, weight in tiny.state_dict().items())
print("equal to the plain form:", len(tiny.state_dict()), "tensors")

# %% [markdown]
# ### The way back: save
#
# Our config and our names in the published form, so that other programs can read what we write. The plain form first:


# %%
def save_plain(model, path):
    path.mkdir(exist_ok=True)
    tensors = {published_name(name): t for name, t in model.state_dict().items()}
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config_dict(model.config)))


save_plain(tiny, folder / "plain")
back = load_plain(folder / "plain").state_dict()
assert all(torch.equal(back[name], weight) for name, weight in tiny.state_dict().items())
print("out and back, bit by bit")

# %% [markdown]
# ### Damage 4: half a checkpoint
#
# What if the disk fills up in the middle? Half of `model.safetensors` is written, and the old one is gone. So all files are written whole into a hidden folder, and one renaming, a single step, switches from the old ones to the new (`replacing`).
#
# And a big model is split into **shards** of a few GB, with an index that says which tensor lies in which file (`write_weights`).


# %%
#| export
def save_model(
    model: PaliGemma, path: str | os.PathLike, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write `config.json` and safetensors in the published layout, which transformers reads.

    Everything is written whole into a draft, then all of it takes its place at once, and that of
    the weights of an earlier save.

    Args:
        model: any device; written in the type of its weights.
        path: directory, made when absent.
        max_shard_bytes: more than that is split into shards with an index.

    Raises:
        ValueError: the model holds more than a PaliGemma does, such as an adapter.
    """
    path, state = Path(path).expanduser(), model.state_dict()
    if extra := sorted(state.keys() - empty_model(model.config).state_dict().keys()):
        raise ValueError(
            f"the model holds {extra[0]}, which no published checkpoint has; merge an adapter "
            "first, and save a quantised model with save_quantized"
        )
    config = config_dict(model.config) | {"dtype": str(model.dtype).removeprefix("torch.")}
    tensors = {published_name(name): tensor for name, tensor in state.items()}
    with replacing(path) as draft:
        write_weights(draft, tensors, max_shard_bytes)
        (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# %%
for limit in (5_000_000_000, 1_500_000):
    save_model(tiny, folder / "saved", max_shard_bytes=limit)
    back = load_model(folder / "saved", dtype=None).state_dict()
    assert all(torch.equal(back[name], weight) for name, weight in tiny.state_dict().items())
    print(*sorted(file.name for file in (folder / "saved").iterdir()), sep="\n", end="\n\n")

# %% [markdown]
# The second save removed `model.safetensors`. Left behind, it would be a trap: most programs look for that name first and would load the older weights.
#
# ## Against the reference
#
# The stored file holds a small model made by transformers: its weights, an input, and the logits that it computes. We write the weights in all three layouts, load each, and compare.

# %%
reference = load_file("reference/checkpoint.safetensors")
weights = {n.removeprefix("weights."): t for n, t in reference.items() if n.startswith("weights.")}
small = PaliGemmaConfig(
    SiglipVisionConfig(16, 32, 2, 2, image_size=14, patch_size=7),
    GemmaConfig(64, 16, 32, 2, 2, 1, 8),
    image_token_index=60,
)


def hub(name):
    return published_name(internal_name(name))


def transformers_5(name):
    return hub(name).replace("vision_tower.vision_model.", "vision_tower.")


# %%
inputs = reference["input_ids"], reference["pixel_values"]
for layout, rename in zip(published, (hub, transformers_5, str)):
    tensors = {rename(name): t for name, t in weights.items()}
    loaded = load_model(write(folder / "layout", tensors, small))
    with torch.no_grad():
        gap = (loaded(*inputs).logits[0, -1:] - reference["logits"]).abs().max().item()
    assert gap <= 1e-5
    print(f"{layout:15} largest difference {gap:.1e}")

# %% [markdown]
# ## At full size
#
# A disk gives perhaps 0.5 to 5 GB/s. Mapping makes that wait for the first use, but somebody has to read the numbers once. A copying loader needs room for the file *and* for a float32 model of twice its size.

# %%
count = sum(weight.numel() for weight in big.state_dict().values())
for dtype, width in (("float32", 4), ("bfloat16", 2)):
    print(f"{dtype:9} {count * width / 1e9:5.2f} GB, {count * width / 2e9:.1f} s at 2 GB/s")

# %% [markdown]
# ## A bug people really make: `strict=False`
#
# A colleague writes a port of the model and, by a slip, names the last layer of the vision tower's attention `o_proj`, as Gemma does. (There it is `out_proj`.) PyTorch complains about names; they find `strict=False`, and the complaint is gone. Their model answers:


# %%
def load_colleague():
    model = PaliGemma(tiny.config)
    state = {internal_name(n).replace("out_proj", "o_proj"): t.float() for n, t in good.items()}
    report = model.load_state_dict(state, strict=False)
    return model.eval(), report


# %%
questions = ["answer en how many cats are there?", question, "answer en where is the cat?"]
models = {"right": load_model(TINY), "colleague": load_colleague()[0]}
for asked in questions:
    words = {title: first_word(model, asked) for title, model in models.items()}
    print(f"{asked:36}", *(f"{t}: {w} ({c:.0%})" for t, (w, c) in words.items()), sep="   ")
assert first_word(models["colleague"], questions[0])[0] == "1"
assert first_word(models["colleague"], question)[0] != "2"

# %% [markdown]
# The cats are right, the dogs are wrong. It looks like a model that was not trained quite long enough: no error, no NaN. What is going on?
#
# A loaded model is a *function of the file*. So load the same file twice and compare, with the picture and with words alone.

# %%
second, report = load_colleague()
batch = processor(sample_picture("scene"), question)
ids, pixel_values = batch["input_ids"], batch["pixel_values"]
for title, inputs in {"words alone": (ids[:, 64:],), "with picture": (ids, pixel_values)}.items():
    with torch.no_grad():
        one, two = (model(*inputs).logits for model in (models["colleague"], second))
    print(f"{title:13} the same logits: {torch.equal(one, two)}")
    assert torch.equal(one, two) == (title == "words alone")

# %% [markdown]
# Two loads of one file differ as soon as a picture is involved: part of the vision tower did not come from the file. PyTorch *returned* a report of it; nobody read it:

# %%
print(len(report.missing_keys), "missing, the first:   ", report.missing_keys[0])
print(len(report.unexpected_keys), "unexpected, the first:", report.unexpected_keys[0])
assert len(report.missing_keys) == 8 == 2 * tiny.config.vision_config.num_hidden_layers
assert len(good) == 109

# %% tags=["hide-input"]
header_bytes = struct.unpack("<Q", whole[:8])[0]
entries = json.loads(whole[8 : 8 + header_bytes])
fig, ax = plt.subplots(figsize=(8.8, 1.5), layout="constrained")
for name, entry in entries.items():
    if name != "__metadata__":
        start, end = (offset / 1e6 for offset in entry["data_offsets"])
        part = "vision" if "vision" in name else "language" if "language" in name else "together"
        lost = internal_name(name) in report.missing_keys
        colour = COLOURS["bad" if lost else part]
        ax.barh(0, end - start, left=start, color=colour, edgecolor="white", lw=0.3, height=0.5)
kinds = {"language model": "language", "projector": "together", "vision tower": "vision"}
for title, colour in (kinds | {"lost": "bad"}).items():
    ax.barh(0, 0, color=COLOURS[colour], label=title)
ax.set(xlim=(0, 3.5), ylim=(-0.3, 0.3), yticks=[], xlabel="MB of the file")
ax.spines.left.set_visible(False)
ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.45), ncols=4)
save_figure(fig, "16_lost")

# %% [markdown]
# Eight of 109 tensors, two in each layer of the tower, still hold the random numbers they were born with. One word in a name did it. Strict loading needs no reader of reports:

# %%
renamed = {name.replace("out_proj", "o_proj"): t for name, t in good.items()}
print(complaint(lambda: load_model(write(folder / "case", renamed))))

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): how many bytes?
#
# A safetensors file holds two tensors: `a`, bfloat16 of shape (3, 5), and `b`, float32 of shape (2, 2), stored in this order. Without running anything: what are the `data_offsets` of `b`? And how many bytes does the 3B model's embedding (257216 × 2048) take in bfloat16?

# %% tags=["exercise"]
offsets = None  # a pair (start, end)
embedding_bytes = None  # a number


# %% tags=["check"]
def test_1(offsets, embedding_bytes):
    pair = isinstance(offsets, tuple | list) and len(offsets) == 2
    assert pair and all(type(v) is int for v in offsets), "give a pair of whole numbers"
    assert offsets[0] != 8 + 3 * 5 * 2, "offsets count from the end of the header"
    assert offsets[0] == 3 * 5 * 2, "b begins where a ends: count the bytes of a"
    assert offsets[1] != 2 * 2 * 4, "the second number is where b ends, not how long it is"
    assert offsets[1] - offsets[0] == 2 * 2 * 4, "b's length: how many bytes has a float32?"
    real = big.language_model.embed_tokens.weight.to(torch.bfloat16).nbytes
    assert isinstance(embedding_bytes, int | float), "embedding_bytes: give a number"
    assert embedding_bytes == real, "embedding_bytes: rows × columns × bytes of one number"


check(test_1, offsets, embedding_bytes)

# %% [markdown]
# <details><summary>Hint</summary>
#
# bfloat16: two bytes. Offsets count from the end of the header, so the first tensor begins at 0.
#
# </details>

# %% tags=["solution"]
# a has 15 numbers of 2 bytes; b follows it with 4 numbers of 4 bytes.
offsets = (30, 46)
embedding_bytes = 257216 * 2048 * 2  # 1.05 GB, the largest tensor of all
check(test_1, offsets, embedding_bytes)

# %% [markdown]
# ### Exercise 2 (write): load a model in shards
#
# `load_plain` reads one file. Write a loader for a directory with `model.safetensors.index.json`; under `"weight_map"` it says for each tensor in which file it lies. Read the shards that the index names and *no other file*, and load strictly. Use the tools of the lesson (`empty_model`, `build_config`, `read_config`, `internal_name`, `load_file`); `load_model` would take the fun out of it.


# %% tags=["exercise"]
def load_shards(path):
    return None  # your code: about eight lines


# %% tags=["check"]
def test_2(load_shards):
    assert "load_model" not in load_shards.__code__.co_names, "write it without load_model"
    path, index = folder / "shards", "model.safetensors.index.json"
    shutil.rmtree(path, ignore_errors=True)
    save_model(tiny, path, max_shard_bytes=1_500_000)
    older = path / "model-00001-of-00002.safetensors"
    save_file({n: torch.zeros_like(t) for n, t in good.items()}, older)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tensors without memory
            model = load_shards(path)
    except OSError as error:
        raise AssertionError(f"no such file: {str(error).rsplit('/', 1)[-1]}") from None
    except RuntimeError as error:
        told = " and ".join(w for w in ("Missing", "Unexpected", "size") if w in str(error))
        raise AssertionError(f"load_state_dict refuses: {told}; all shards? our names?") from None
    assert isinstance(model, PaliGemma), "return the model"
    state = model.state_dict()
    assert not any(t.is_meta for t in state.values()), "a weight still has no memory: assign?"
    same = [name for name, t in tiny.state_dict().items() if torch.equal(state[name], t)]
    assert len(same) > 1, "the weights are others: random ones, or those of an older save?"
    assert len(same) == len(state), f"only {len(same)} of {len(state)} tensors are those stored"
    place = json.loads((path / index).read_text())
    lost = next(n for n in reversed(place["weight_map"]) if "norm" in n)
    shard = path / place["weight_map"].pop(lost)
    save_file({n: t for n, t in load_file(shard).items() if n != lost}, shard)
    (path / index).write_text(json.dumps(place))
    try:
        load_shards(path)
    except (RuntimeError, ValueError):
        return
    raise AssertionError("one tensor was taken out of the files, and it still loads")


check(test_2, load_shards)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `json.loads((path / "model.safetensors.index.json").read_text())["weight_map"].values()` are the files, each many times: a `set` has each once. Collect all tensors in one dictionary before you load it.
#
# </details>


# %% tags=["solution"]
# One dictionary for all shards: strictness can only judge the whole.
def load_shards(path):
    model = empty_model(build_config(read_config(path)))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    state = {}
    for file in set(index["weight_map"].values()):
        for name, tensor in load_file(path / file).items():
            state[internal_name(name)] = tensor
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


check(test_2, load_shards)

# %% [markdown]
# ### Exercise 3 (break): damage that nobody notices
#
# Strict loading catches every damage of this lesson. Find one that it cannot catch: change **one byte** of a good file so that it still loads, and at least one weight is different. What does that tell you about the format?


# %% tags=["exercise"]
def damaged(data):
    return data  # bytes in, bytes out: change one of them


# %% tags=["check"]
def test_3(damaged):
    path = write(folder / "exercise", weights, small)
    good = (path / "model.safetensors").read_bytes()
    before = {name: t.clone() for name, t in load_model(path).state_dict().items()}
    bad = damaged(good)
    assert isinstance(bad, bytes), "return bytes"
    assert len(bad) == len(good), "bytes of the same length, please: change one, add none"
    assert sum(a != b for a, b in zip(good, bad)) == 1, "change exactly one byte"
    (path / "model.safetensors").write_bytes(bad)
    try:
        after = load_model(path).state_dict()
    except CheckpointError as error:
        told = str(error).split(str(path))[-1][:60]
        raise AssertionError(f"strict loading noticed it: …{told}…") from None
    assert any(not torch.equal(before[n], after[n]) for n in before), "every weight is the same"


check(test_3, damaged)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The header is checked; are the numbers? Two tensors are compared with each other, so stay away from the embedding and the head. The file's last bytes belong to some tensor.
#
# </details>


# %% tags=["solution"]
# The format has no checksum: a changed number is a number. Whoever needs certainty compares a
# hash of the whole file with a published one (the hub lists a SHA-256 for every weight file).
def damaged(data):
    return data[:-1] + bytes([data[-1] ^ 0x40])  # one bit in the exponent of the last number


check(test_3, damaged)

# %% [markdown]
# ## Summary
#
# - A safetensors file is a length, a JSON header and plain numbers. Nothing in it can run.
# - Mapping makes "load" mean "agree on addresses"; bytes travel when they are used.
# - The meta device knows what *should* be in a file. Strictness compares it with what *is*.
# - A model is a function of its file: load it twice and compare.
# - Write under another name, then rename: never half a checkpoint.

# %% [markdown]
# ## Quiz
#
# **1.** Loading took 10 ms, and the first answer is slow; the second is fast. Why?
#
# <details><summary>Answer</summary>
#
# Mapping read nothing. The first forward pass touches every weight, and each page is fetched from the disk at that moment. The second pass finds them in memory.
#
# </details>

# %% [markdown]
# **2.** `load_state_dict` with `strict=True` raised nothing. Which of our checks does it not make?
#
# <details><summary>Answer</summary>
#
# It compares names and shapes of *one* dictionary. It does not see a tensor stored twice under two names (the later one wins in the dictionary), or numbers of eight bits, which need a factor. And it refuses a good file whose tied pair is stored under the head's name.
#
# </details>

# %% [markdown]
# **3.** Someone sends you `pytorch_model.bin` for a model you trust. What is the risk, and what is the way out?
#
# <details><summary>Answer</summary>
#
# Opening a pickle can run any program in it, with your rights. Ask for safetensors, or convert it on a machine that has nothing to lose. `torch.load(weights_only=True)` allows only a short list of operations, which lowers the risk.
#
# </details>

# %% [markdown]
# ## References
#
# - The safetensors format: [huggingface.co/docs/safetensors](https://huggingface.co/docs/safetensors/index).
# - `mmap` in the Python library reference; [pytorch.org: meta device](https://pytorch.org/docs/stable/meta.html).
# - `from_pretrained` and `save_pretrained` in transformers, `modeling_utils.py`: the index of shards and the names in three layouts.
# - Beyer et al. 2024, *PaliGemma: A versatile 3B VLM for transfer* ([arXiv 2407.07726](https://arxiv.org/abs/2407.07726)).

# %% [markdown] tags=["navigation"]
# [← PaliGemma](15_model.ipynb) | [contents](00_overview.ipynb) | [Sampling →](17_sampling.ipynb)
