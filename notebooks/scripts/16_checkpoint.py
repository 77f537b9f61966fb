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
# *55 minutes* · part III, Together
#
# **What you will be able to do**
#
# - open a weight file with nothing but `struct` and `json`, and read one tensor out of it;
# - say what memory mapping is, and measure what it saves;
# - bring weights from three naming schemes to one model and prove that none was lost;
# - recognise a model that loaded "without errors" and is half random.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("checkpoint")

# %% [markdown]
# ## Setup
#
# From earlier lessons: the configs ([05](05_siglip.ipynb), [12](12_gemma.ipynb), [13](13_gemma2.ipynb)), the processor ([14](14_processor.ipynb)) and the whole model ([15](15_model.ipynb)). From `paligemma.support`: care with files and configs that no lesson is about. The first cell becomes the opening lines of [checkpoint.py](../paligemma/checkpoint.py). All files of this lesson go to a temporary folder that vanishes with the notebook.

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
from paligemma.support.files import CheckpointError, find_folder, open_tensors, replacing
from paligemma.support.tensors import check_family, draft_weights, match_tensors
from paligemma.support.tensors import remove_older_weights, weight_files


# %% tags=["setup"]
import mmap
import shutil
import struct
import tempfile
import time
from importlib import resources

import matplotlib.pyplot as plt
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from paligemma.support.course import check, save_figure
from paligemma.support.drawing import COLOURS, CYCLE
from paligemma.processor import Processor

TINY = Path(resources.files("paligemma") / "assets" / "tiny")  # the checkpoint that ships with it
trash = tempfile.TemporaryDirectory()
folder = Path(trash.name)
torch.manual_seed(16)
torch.set_printoptions(precision=3, sci_mode=False)

# %% [markdown]
# ## The problem
#
# Fifteen lessons built a model. Its code is a few hundred lines; what it *knows* is 2,923,466,480 numbers. They come from elsewhere as a **checkpoint**: a directory with numbers, their names and a small description of the shape.
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
    ax.text(0, y, f"{layout}:", va="center", weight="bold", fontsize=8.5)
    ax.text(1.25, y, name, va="center", family="monospace", fontsize=8, color=COLOURS["vision"])
    arrow = {"arrowstyle": "-|>", "color": COLOURS["muted"], "shrinkB": 2}
    ax.annotate("", (7.3, 1), (5.75, y), arrowprops=arrow)
place = {"boxstyle": "round,pad=0.6", "fc": COLOURS["together"], "ec": "none"}
ax.text(8.35, 1, "one place\n32 × 16 numbers", ha="center", va="center", color="white", bbox=place)
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
print(len(data), "bytes; the first eight:", data[:8].hex(" "))
(n,) = struct.unpack("<Q", data[:8])  # < little end first, Q eight bytes, unsigned
header = json.loads(data[8 : 8 + n])
print("header of", n, "bytes")
for name, entry in header.items():
    print(name, entry)

# %% [markdown]
# `data_offsets` count from the end of the header. `one` needs 4 bytes, `pair` needs $6 \cdot 4 = 24$. (The library put them in an order of its own; only the offsets count.) Check the places with a pencil, then read `pair` by hand:

# %%
start, end = (8 + n + offset for offset in header["pair"]["data_offsets"])
print("bytes of 1.0:", data[start : start + 4].hex(" "))
print(struct.unpack("<6f", data[start:end]))

# %% [markdown]
# That is the whole format. Compare it with a **pickle** (`pytorch_model.bin`): a pickle is a small *program* that Python runs to rebuild objects, and that program may do anything, such as deleting your files. In a safetensors file there is nothing to run.

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(8.6, 1.5), layout="constrained")
parts = [("length", 8, "ink"), ("header (JSON)", n, "together")]
ordered = sorted(header, key=lambda name: header[name]["data_offsets"])
widths = [header[name]["data_offsets"][1] - header[name]["data_offsets"][0] for name in ordered]
parts += list(zip(ordered, widths, ("vision", "language")))
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
        fontsize=8.5,
    )
    left += width
ax.set(xlim=(0, left), ylim=(-0.3, 0.75), xlabel="byte of the file", yticks=[])
ax.spines.left.set_visible(False)
save_figure(fig, "16_bytes")

# %% [markdown]
# ## As a loop: read, slice, copy
#
# The plainest loader: build the model with random numbers, read the file into memory, cut out each tensor and copy it over the random ones. The names of the types in the header need translating; three will do here.


# %%
TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def tensors_of(data):
    """Name, tensor for each entry of a safetensors file that lies in `data`."""
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(bytes(data[8 : 8 + n]))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        dtype = TYPES[entry["dtype"]]
        flat = torch.frombuffer(
            data, dtype=dtype, offset=8 + n + start, count=(end - start) // dtype.itemsize
        )
        yield name, flat.view(entry["shape"])


def load_by_copying(model, file):
    places = model.state_dict()
    for name, tensor in tensors_of(bytearray(file.read_bytes())):
        places[internal_name(name)].copy_(tensor)  # internal_name comes below
    return model


for name, tensor in tensors_of(bytearray(data)):
    print(name, tensor.tolist())

# %% [markdown]
# It is right, and it moves every number twice: from the file into a buffer, from the buffer into the model. Before that, it drew random numbers for every weight, only to overwrite them.

# %% [markdown]
# ## Mapped: let the operating system do it
#
# **Memory mapping** asks the operating system: *pretend that this file lies in memory at these addresses*. Nothing is read. When the program touches an address, the system fetches that page (4 KB) from the file and goes on. Pages nobody touches are never read; when memory is short, the system may drop a page, since it can read it again.
#
# Our reader does not care where its bytes lie:

# %%
with file.open("rb") as opened:
    mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
for name, tensor in tensors_of(mapped):
    print(name, "equal to the library's:", torch.equal(tensor, load_file(file)[name]))
    assert torch.equal(tensor, load_file(file)[name])

dict(tensors_of(mapped))["one"].fill_(-1)
print("in memory:", dict(tensors_of(mapped))["one"].tolist())
print("in the file:", load_file(file)["one"].tolist())

# %% [markdown]
# `ACCESS_COPY` lets the program change a page, and then gives it a copy of its own: the last two lines differ. Training on mapped weights never writes into the checkpoint.

# %% [markdown]
# ## The module, piece by piece
#
# ### Names
#
# Four patterns bring every layout to the names of our own modules. The order matters: `model.` goes first, so that the others see the same beginning.

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
# ### The config
#
# `config.json` says which shape to build. A published one is *sparse*: a field that equals the default of transformers' class is left out, and every release of transformers has written it a little differently. `read_config` of [support/config.py](../paligemma/support/config.py) knows these defaults and returns a complete dictionary, or an error that names the field. What is left for us: put the numbers into our dataclasses.


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


# %%
inside = {"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384}
inside |= {"num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1}
sparse = {
    "model_type": "paligemma",
    "vocab_size": 257152,
    "text_config": inside,
    "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "patch_size": 14}
    | {"num_hidden_layers": 27, "num_attention_heads": 16},
}
(folder / "config.json").write_text(json.dumps(sparse))
config = build_config(read_config(folder))
assert config == PaliGemmaConfig()
print("the 3B model, from a dozen fields and the defaults")
print(f"rows: {config.text_config.vocab_size:,} = 64 × {257216 // 64:,}")

# %% [markdown]
# One trap waits in `vocab_size`. The tokenizer has 257,152 pieces, numbered from 0, so `<image>`, added later, has number 257152 and needs one row *more*; the rows were then padded to a multiple of 64. Some configs say 257152 at the top level and 257216 inside `text_config`. The inner one is the truth. Where it is absent, a number too small for `<image>` is padded.

# %% [markdown]
# ### A model without memory
#
# What *should* be in the file? For this we need names and shapes, no numbers. On the **meta device** tensors have a shape, a type and no storage.
#
# One surprise: PyTorch still calls the functions that fill weights with random numbers. There they have nothing to fill, yet the first call imports PyTorch's compiler, which takes seconds. A *function mode* sees every call of a PyTorch function; ours answers those of `torch.nn.init` itself.


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


# %% tags=["nbval-ignore-output"]
start = time.perf_counter()
big = empty_model(PaliGemmaConfig())
print(f"3B model built in {1000 * (time.perf_counter() - start):.0f} ms")

# %%
weight = big.language_model.embed_tokens.weight
count = sum(p.numel() for p in big.parameters())
print(tuple(weight.shape), weight.device, f"{count:,} parameters")
assert count == 2_923_466_480

# %% [markdown]
# ### Load, the plain form
#
# Everything is there: the shape from the config, an empty model, names that fit, tensors that stay where they are. `safe_open` does what our `tensors_of` did, mapped, and checks the header. `assign=True` puts the stored tensors *themselves* into the model instead of copying numbers.


# %%
def load_plain(path):
    model = empty_model(build_config(read_config(path)))
    state = {}
    with safe_open(path / "model.safetensors", framework="pt") as tensors:
        for name in tensors.keys():
            state[internal_name(name)] = tensors.get_tensor(name)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


tiny = load_plain(TINY)
print(f"{sum(p.numel() for p in tiny.parameters()):,} parameters, {tiny.dtype}")

# %% [markdown]
# Nine lines, and the model that ships with this course is awake. What does it say first about this picture?

# %%
processor = Processor.from_pretrained(TINY)
picture = Image.new("RGB", (112, 112), "lightblue")
cat = Image.open(TINY.parent / "emoji" / "cat.png").convert("RGBA")
picture.paste(cat, (24, 24), cat)
batch = processor(picture, "caption en")
with torch.no_grad():
    logits = tiny(batch["input_ids"], batch["pixel_values"]).logits[0, -1]
best = logits.topk(4).indices.tolist()
print("likeliest first words:", [processor.decode([i]) for i in best])

# %% [markdown]
# ### What `strict=True` does not see
#
# A checkpoint comes from elsewhere. These three have happened to people: the plain form loads two of them without a word, though they are wrong, and refuses the third, which is right.

# %%
good = load_file(TINY / "model.safetensors")
fc1 = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
table = "language_model.model.embed_tokens.weight"
cases = {
    "stored twice, and not the same": good | {internal_name(fc1): torch.zeros_like(good[fc1])},
    "in eight bits": good | {fc1: (100 * good[fc1]).to(torch.float8_e4m3fn)},
    "tied pair under its other name": {n.replace(table, "lm_head.weight"): good[n] for n in good},
}


def write(path, tensors, config):
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config_dict(config)))
    save_file(tensors, path / "model.safetensors")
    return path


for title, tensors in cases.items():
    print(f"{title}:", end="\n    ")
    try:
        found = load_plain(write(folder / "case", tensors, tiny.config))
        weight = found.vision_tower.encoder.layers[0].mlp.fc1.weight.detach()
        print("loaded; the first three weights:", weight[0, :3].float())
    except RuntimeError as error:
        print("refused:", str(error).split("\n")[1].strip())

# %% [markdown]
# In the first case the dictionary kept whichever came last. In the second, the weights are a hundred times too large: eight bits come with a scale, which lies elsewhere. The third is a good file: PaliGemma's head *is* its embedding (tied, [lesson 12](12_gemma.ipynb)), and some programs store the pair under the head's name.

# %% [markdown]
# So between reading and `load_state_dict` there is one more step. Each stored tensor must have exactly one place, and each place exactly one tensor, of the right shape and of a type that holds plain numbers.

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
    path = write(folder / "case", tensors, tiny.config)
    try:
        print(f"{title}: {len(read_state(path, read_config(path), expected))} tensors, all right")
    except CheckpointError as error:
        print(f"{title}: {error}".replace(f"{folder}/", ""))

# %% [markdown]
# `open_tensors`, `check_family` and `match_tensors` are ordinary care ([support/files.py](../paligemma/support/files.py), [support/tensors.py](../paligemma/support/tensors.py)): shards with an index, a download cut off, another model's weights, with one clear line for each.
#
# ### Load, as a real program does
#
# What is added: a place and a type (`.to` returns a tensor unchanged when both are right already: still mapped), and `find_folder`, which knows `~` and the hub's cache.


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
for name, tensor in tiny.state_dict().items():
    assert torch.equal(again.state_dict()[name], tensor)
print("the plain form and this one agree:", len(tiny.state_dict()), "tensors")

# %% [markdown]
# ### Save
#
# The way back: our config and names in the published form, so that other programs can read what we write. Again the plain form first.


# %%
def save_plain(model, path):
    path.mkdir(exist_ok=True)
    tensors = {published_name(name): t for name, t in model.state_dict().items()}
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config_dict(model.config)))


save_plain(tiny, folder / "plain")
for name, tensor in load_plain(folder / "plain").state_dict().items():
    assert torch.equal(tiny.state_dict()[name], tensor)
print("out and back, bit by bit")

# %% [markdown]
# Two things are missing. A big model is split into **shards** of a few GB, with an index that says which tensor lies in which file. And what if the disk fills up in the middle? Writing straight into `model.safetensors` leaves half a file, and the old one is gone.

# %% [markdown]
# So every file is written under another name and **renamed** when all are whole: `replacing` gives out the names, `draft_weights` splits. Renaming is a single step: others see the old file or the new one. It also solves a riddle: how to save over the very file that is mapped? The old one lives on, without a name, while someone has it mapped.


# %%
#| export
def save_model(
    model: PaliGemma, path: str | os.PathLike, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write `config.json` and safetensors in the published layout, which transformers reads.

    Everything is written under other names first and renamed when it is whole; then weights of an
    earlier save that are no longer part of it are removed.

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
        files = draft_weights(draft, tensors, max_shard_bytes)
        draft("config.json").write_text(json.dumps(config, indent=2) + "\n")
    remove_older_weights(path, files)


# %% [markdown]
# A small model goes out and comes back, whole and in shards, equal to the last bit:

# %%
small = PaliGemmaConfig(
    SiglipVisionConfig(16, 32, 2, 2, image_size=14, patch_size=7),
    GemmaConfig(64, 16, 32, 2, 2, 1, 8),
    image_token_index=60,
)
model = PaliGemma(small).eval()
for limit in (5_000_000_000, 20_000):
    save_model(model, folder / "saved", max_shard_bytes=limit)
    back = load_model(folder / "saved")
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
    print(*sorted(file.name for file in (folder / "saved").iterdir()), sep="\n", end="\n\n")

# %% [markdown]
# The second save removed `model.safetensors`. Left behind, it would be a trap: most programs look for that name first and would load the older weights.
#
# And the loop from above, given the same files, agrees:

# %%
by_loop = PaliGemma(small)
for file in weight_files(folder / "saved"):
    load_by_copying(by_loop, file)
for name, tensor in by_loop.state_dict().items():
    assert torch.equal(back.state_dict()[name], tensor)
print("copied and mapped: equal,", len(by_loop.state_dict()), "tensors")

# %% [markdown]
# ## Against the reference
#
# The stored file holds a small model made by transformers: its weights under the names it uses in memory, an input, and the logits it computes. We write these weights in all three layouts, whole and in shards, load each, and compare.

# %%
reference = load_file("reference/checkpoint.safetensors")
weights = {n.removeprefix("weights."): t for n, t in reference.items() if n.startswith("weights.")}


def hub(name):
    return published_name(internal_name(name))


def transformers_5(name):
    return hub(name).replace("vision_tower.vision_model.", "vision_tower.")


# %%
inputs = reference["input_ids"], reference["pixel_values"]
for layout, rename in {
    "on the hub": hub,
    "transformers 5": transformers_5,
    "in memory": str,
}.items():
    tensors = {rename(name): t for name, t in weights.items()}
    if layout != "in memory":  # there the tied head is listed too
        del tensors["lm_head.weight"]
    loaded = load_model(write(folder / "layout", tensors, small))
    with torch.no_grad():
        gap = (loaded(*inputs).logits[0, -1:] - reference["logits"]).abs().max().item()
    assert gap <= 1e-5
    print(f"{layout:15} {len(tensors)} tensors, largest difference {gap:.1e}")

# %% [markdown]
# ## See it: loading is (almost) nothing
#
# A model of 40 million weights, a file of 159 MB. We load it both ways and ask Linux how much memory is the program's own (*anonymous*) and how much is pages of files, which the system may drop.


# %% tags=["nbval-ignore-output"]
def memory():
    """MB of this process: its own, and mapped from files (Linux only, else zeros)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = {line.split(":")[0]: int(line.split()[1]) / 1000 for line in lines if "Rss" in line}
    return found.get("RssAnon", 0), found.get("RssFile", 0)


middle = PaliGemmaConfig(
    SiglipVisionConfig(64, 128, 2, 2, image_size=28),
    GemmaConfig(32768, 512, 2048, 6, 4, 1, 128),
    image_token_index=32767,
)
save_model(PaliGemma(middle), folder / "middle")


def copied():
    return load_by_copying(PaliGemma(middle), folder / "middle" / "model.safetensors")


def mapped_model():
    return load_model(folder / "middle", dtype=None)


def mapped_and_used():
    model = mapped_model()
    sum(tensor.sum() for tensor in model.state_dict().values())  # touch every number once
    return model


measured = {}
for load in (copied, mapped_model, mapped_and_used):
    before, start = memory(), time.perf_counter()
    loaded = load()
    seconds = time.perf_counter() - start
    measured[load] = seconds, [now - then for now, then in zip(memory(), before)]
    del loaded
    own, pages = measured[load][1]
    print(f"{load.__name__:15} {1000 * seconds:6.1f} ms, own {own:4.0f} MB, file {pages:4.0f} MB")

# %% tags=["nbval-ignore-output", "hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(8.6, 2.5), layout="constrained", sharey=True)
labels = ["random, read, copy", "mapped", "mapped, then each\nweight used once"]
seconds = [1000 * value[0] for value in measured.values()]
axes[0].barh(labels, seconds, color=CYCLE[0], height=0.55)
for y, value in enumerate(seconds):
    axes[0].text(value, y, f" {value:.0f}", va="center", fontsize=8.5)
axes[0].set(xlabel="milliseconds until the model is there", xlim=(0, 1.15 * max(seconds)))
own, pages = ([value[1][i] for value in measured.values()] for i in (0, 1))
axes[1].barh(labels, own, color=COLOURS["bad"], height=0.55, label="own memory")
axes[1].barh(labels, pages, left=own, color=COLOURS["good"], height=0.55, label="pages of the file")
axes[1].set(xlabel="MB more than before", xlim=(0, 260))
axes[1].legend(loc="center right", fontsize=8)
axes[0].invert_yaxis()
save_figure(fig, "16_mapped")

# %% [markdown]
# What to notice: the mapped model is there at once, because nothing was read. The bytes come when they are used (third bar), and then they belong to the *file*: two programs that map the same checkpoint share one copy, and a second start finds the pages still in memory.
#
# With another `dtype` than the stored one, every number has to be converted. That is a copy, by nature.

# %% [markdown]
# ## At full size
#
# What lies in the file of the 3B model? The meta model knows, without a byte of it here.

# %%
groups = {
    "vision tower": 0,
    "projector": 0,
    "embedding = head": 0,
    "attention": 0,
    "MLP": 0,
    "norms": 0,
}
for name, tensor in big.state_dict().items():
    part = "norms"
    if name.startswith("vision_tower"):
        part = "vision tower"
    elif "projector" in name:
        part = "projector"
    elif "embed_tokens" in name:
        part = "embedding = head"
    elif "self_attn" in name or ".mlp." in name:
        part = "attention" if "self_attn" in name else "MLP"
    groups[part] += tensor.numel()
total = sum(groups.values())
for part, count in groups.items():
    print(f"{part:17} {count:13,}  {count / total:6.1%}")
print(f"{'together':17} {total:13,}  in {len(big.state_dict())} tensors")

# %% tags=["hide-input"]
colours = ("vision", "accent", "language", "together", "learning", "inside")
fig, ax = plt.subplots(figsize=(8.6, 1.6), layout="constrained")
left = 0
for (part, count), colour in zip(groups.items(), colours):
    gigabytes = 2 * count / 1e9
    ax.barh(0, gigabytes, left=left, color=COLOURS[colour], edgecolor="white", height=0.5)
    if gigabytes > 0.3:
        text = f"{part}\n{gigabytes:.2f} GB"
        size = 8 if gigabytes > 0.5 else 7
        ax.text(
            left + gigabytes / 2, 0, text, ha="center", va="center", color="white", fontsize=size
        )
    left += gigabytes
ax.set(xlim=(0, left), ylim=(-0.3, 0.3), yticks=[], xlabel="GB in bfloat16")
ax.spines.left.set_visible(False)
save_figure(fig, "16_in_the_file")

# %% [markdown]
# The language model's MLPs are more than half. Projector and norms are too thin to see; without them nothing works.
#
# Bytes decide what a load costs. A disk gives perhaps 0.5 to 5 GB/s, and a copying loader in float32 needs room for the file *and* for a model of twice its size.

# %%
for dtype, width in (("float32", 4), ("bfloat16", 2)):
    size = total * width
    print(f"{dtype:9} {size / 1e9:5.2f} GB, {size / 2e9:.1f} s at 2 GB/s")

# %% [markdown]
# ## A bug people really make: `strict=False`
#
# A colleague loads a checkpoint into their port of the model. At first PyTorch complains about names; they find `strict=False`, and the complaint is gone. The text answers look right. The picture answers look right *sometimes*. Here is what they see: two loads of the same file, without and with a picture.


# %%
def load_colleague(seed):
    torch.manual_seed(seed)
    model = PaliGemma(small)
    state = {}
    for name, tensor in weights.items():
        name = name.removeprefix("model.").replace("vision_tower.encoder.", "vision_tower.blocks.")
        state[name] = tensor.float()
    report = model.load_state_dict(state, strict=False)
    return model.eval(), report


first, report = load_colleague(seed=1)
second, _ = load_colleague(seed=2)
words = inputs[0][:, 4:]  # the prompt without its image tokens
with torch.no_grad():
    for title, arguments in (("text alone:  ", (words,)), ("with picture:", inputs)):
        a, b = (m(*arguments).logits[0, -1, :4] for m in (first, second))
        print(title, "the same" if torch.equal(a, b) else "different")
        print("    first load: ", a)
        print("    second load:", b)

# %% [markdown]
# The same file, the same question, two answers, as soon as a picture is involved. No error, no NaN, reasonable numbers. What is going on?
#
# A loaded model is a *function of the file*. If it changes with the seed, part of it did not come from the file.

# %%
print(len(report.missing_keys), "missing,", len(report.unexpected_keys), "unexpected")
print("missing:   ", report.missing_keys[0])
print("unexpected:", report.unexpected_keys[0])

# %% [markdown]
# 32 tensors, both layers of this vision tower, still hold the random numbers they were born with. One wrong word in a name did it. (The 33rd left-over tensor is the head, which is tied.)
#
# `load_state_dict` *returned* the report; nobody read it. Strict loading makes the reader unnecessary:


# %%
def complaint(action):
    try:
        action()
        print("no complaint")
    except ValueError as error:
        print(str(error).replace(f"{folder}/", ""))


renamed = {
    n.replace("vision_tower.encoder.", "vision_tower.blocks."): t for n, t in weights.items()
}
complaint(lambda: load_model(write(folder / "bad", renamed, small)))

# %% [markdown]
# ### A gallery of damage
#
# Each of these has happened to someone. A good complaint says *which file*, *which tensor*, what is there and what was expected.

# %%
fc1 = "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
damage = {
    "a tensor is missing": lambda t: t.pop(fc1),
    "one too many": lambda t: t.update(extra=torch.ones(2)),
    "stored twice": lambda t: t.update({hub(fc1): t[fc1].clone()}),
    "transposed": lambda t: t.update({fc1: t[fc1].T.contiguous()}),
    "four rows too few": lambda t: t.update(
        {hub(EMBEDDING): t.pop(f"model.{EMBEDDING}")[:60].clone()}
    ),
    "quantised": lambda t: t.update({fc1: t[fc1].to(torch.int8)}),
    "a head of its own": lambda t: t.update({HEAD: t[HEAD] + 1}),
}
for title, change in damage.items():
    tensors = dict(weights)
    change(tensors)
    print(f"{title}:", end="\n    ")
    complaint(lambda: load_model(write(folder / "bad", tensors, small)))

path = write(folder / "bad", weights, small)
whole = (path / "model.safetensors").read_bytes()
for title, data in {
    "download cut off": whole[:-1000],
    "empty file": b"",
    "a web page": b"<html>" * 9,
}.items():
    (path / "model.safetensors").write_bytes(data)
    print(f"{title}:", end="\n    ")
    complaint(lambda: load_model(path))

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
    assert offsets is not None and len(offsets) == 2, "give a pair (start, end)"
    assert offsets[0] == 3 * 5 * 2, "b begins where a ends: count the bytes of a"
    assert offsets[1] - offsets[0] == 2 * 2 * 4, "float32 takes four bytes a number"
    real = big.language_model.embed_tokens.weight.to(torch.bfloat16).nbytes
    assert embedding_bytes == real, "rows × columns × bytes of one number"


check(test_1, offsets, embedding_bytes)

# %% [markdown]
# <details><summary>Hint</summary>
#
# bfloat16: two bytes. Offsets count from the end of the header, so the first tensor begins at 0.
#
# </details>

# %% tags=["solution"]
offsets = (30, 46)
embedding_bytes = 257216 * 2048 * 2  # 1.05 GB, the largest tensor of all
check(test_1, offsets, embedding_bytes)

# %% [markdown]
# ### Exercise 2 (fill in): write the format
#
# Return the bytes of a safetensors file for a dictionary of float32 tensors. Use `struct`, `json` and `tensor.numpy().tobytes()`. The library has to be able to read it.


# %% tags=["exercise"]
def to_bytes(tensors):
    return None  # your code


# %% tags=["check"]
def test_2(to_bytes):
    path = folder / "exercise.safetensors"
    cases = [
        {"a": torch.arange(6.0).view(2, 3)},
        {"z": torch.ones(1), "a": torch.randn(4, 1, 2), "m": torch.zeros(3)},
        {"only": torch.tensor(2.5)},
    ]
    for tensors in cases:
        data = to_bytes(tensors)
        assert isinstance(data, bytes), "return bytes"
        path.write_bytes(data)
        try:
            back = load_file(path)
        except SafetensorError as error:
            raise AssertionError(f"the library refuses it: {error}") from None
        assert back.keys() == tensors.keys(), "a name was lost"
        for name, tensor in tensors.items():
            assert back[name].shape == tensor.shape, f"{name}: shape {list(back[name].shape)}"
            assert torch.equal(back[name], tensor), f"{name}: other numbers"


check(test_2, to_bytes)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Go through the tensors with a running `start`. Each header entry needs `"dtype": "F32"`, `"shape"` (a list) and `"data_offsets": [start, end]`. Encode the JSON text before you take its length.
#
# </details>


# %% tags=["solution"]
def to_bytes(tensors):
    header, body = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        place = [len(body), len(body) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": place}
        body += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


check(test_2, to_bytes)

# %% [markdown]
# ### Exercise 3 (break): damage that nobody notices
#
# Strict loading catches every damage in the gallery. Find one that it cannot catch: change **one byte** of a good file so that it still loads, and at least one weight is different. What does that tell you about the format?


# %% tags=["exercise"]
def damaged(data):
    return data  # bytes in, bytes out: change one of them


# %% tags=["check"]
def test_3(damaged):
    path = write(folder / "exercise", weights, small)
    good = (path / "model.safetensors").read_bytes()
    before = {name: t.clone() for name, t in load_model(path).state_dict().items()}
    bad = damaged(good)
    assert isinstance(bad, bytes) and len(bad) == len(good), "bytes of the same length"
    assert sum(a != b for a, b in zip(good, bad)) == 1, "change exactly one byte"
    (path / "model.safetensors").write_bytes(bad)
    try:
        after = load_model(path).state_dict()
    except CheckpointError:
        raise AssertionError("strict loading noticed it: the header, or the tied head?") from None
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
# - A model is a function of its file. Load twice with two seeds and compare.
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
# **2.** `load_state_dict` with `strict=True` raised nothing. Which of our checks does it still not make?
#
# <details><summary>Answer</summary>
#
# It compares names and shapes of *one* dictionary. It does not see a tensor stored twice under two names (the later one wins in the dictionary), or numbers of eight bits, which need a scale. And it refuses a good file whose tied pair is stored under the head's name.
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
