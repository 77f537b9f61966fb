# ---
# jupyter:
#   jupytext:
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
# *40 minutes* · part III, Together
#
# **What you will be able to do**
#
# - open a weight file with nothing but `struct` and `json`, and read one tensor out of it;
# - say what memory mapping is, and measure what it saves;
# - bring weights from three naming schemes to one model and prove that none was lost;
# - recognise a model that loaded "without errors" and is half random.

# %% tags=["map"]
from paligemma.plotting import model_map

model_map("checkpoint")

# %% [markdown]
# ## Setup
#
# From earlier lessons: the configs ([05](05_siglip.ipynb), [12](12_gemma.ipynb), [13](13_gemma2.ipynb)) and the whole model ([15](15_model.ipynb)). The first cell becomes the opening lines of [checkpoint.py](../paligemma/checkpoint.py). All files of this lesson go to a temporary folder that vanishes with the notebook.

# %%
#| export
"""Read and write checkpoints in the published layout, strictly and memory-mapped."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from paligemma.gemma import GemmaConfig
from paligemma.gemma2 import Gemma2Config
from paligemma.model import PaliGemma, PaliGemmaConfig
from paligemma.siglip import SiglipVisionConfig


# %% tags=["setup"]
import mmap
import shutil
import struct
import tempfile
import time

import matplotlib.pyplot as plt
from safetensors.torch import load_file

from paligemma.plotting import COLOURS, CYCLE, check, save_figure

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

# %%
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
# ### The config: refuse what we do not know
#
# `config.json` says which shape to build. A published one is *sparse*: fields with a default are left out. Some fields choose between two pieces of code, such as the activation: there an unknown value must be an error, because ignoring it gives a model that runs and is wrong.
#
# Every complaint names the file and the field. We begin with the small tools.

# %%
#| export
VISION_OPTIONAL = {"image_size", "layer_norm_eps", "num_channels"}
TEXT_OPTIONAL = {"head_dim", "rms_norm_eps", "rope_theta"}
CAPS = {"attn_logit_softcapping", "final_logit_softcapping"}
TEXT_OPTIONAL |= CAPS | {"sliding_window", "query_pre_attn_scalar"}  # of Gemma 2
TEXT_CONFIGS = {"gemma": GemmaConfig, "gemma2": Gemma2Config}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the tensor or field."""


def _read_object(file: Path) -> dict:
    """The one JSON object in a file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is {value!r:.60}; expected a JSON object: download it again")
    return value


def _section(file: Path, config: dict, name: str) -> dict:
    """One of the two inner objects of a config."""
    section = config.get(name)
    if not isinstance(section, dict):
        raise CheckpointError(f"{file}: {name} is {section!r:.60}; expected an object of fields")
    return section


def _expect(file: Path, values: dict, name: str, *allowed, section: str = "") -> None:
    """A field that decides which code is right has one of the values we know."""
    if values.get(name) not in allowed:
        raise CheckpointError(
            f"{file}: {section}{name} is {values.get(name)!r:.60}; "
            f"a PaliGemma checkpoint has {allowed[-1]!r}"
        )


# %% [markdown]
# Then the numbers. JSON knows `true`, `null`, `1.5` and `"16"`, and Python would happily take `True` for 1. The dataclass already says what is needed: its fields and their types are the list of demands.


# %%
#| export
def _build(file: Path, section: str, kind: type, values: dict, optional: set[str]):
    """Fill a config dataclass; a missing or mistyped field is named."""
    found = {}
    for field in fields(kind):
        value = values.get(field.name)
        if value is None and field.name in optional:
            continue
        number = int if field.type is int else (int, float)
        good = isinstance(value, number) and not isinstance(value, bool)
        if not good or not 0 < value < float("inf"):
            raise CheckpointError(
                f"{file}: {section}.{field.name} is {value!r:.60}; expected a positive "
                f"{'whole ' if field.type is int else ''}number"
            )
        found[field.name] = value
    return kind(**found)


def _token(file: Path, config: dict, default: int, *names: str) -> int:
    """A token's number under one of its names."""
    value = next((config[name] for name in names if config.get(name) is not None), default)
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{file}: {names[0]} is {value!r:.60}; expected 0 or more")
    return value


def _rope_theta(file: Path, text: dict):
    """The base of the rotation, which newer configs keep one level down; None: the default."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind != "default":
        raise CheckpointError(f"{file}: text_config asks for RoPE {kind!r:.60}; expected 'default'")
    return rope.get("rope_theta") if text.get("rope_theta") is None else text["rope_theta"]


def _check_gemma2(file: Path, text: dict) -> None:
    """The parts of Gemma 2 that some configs may switch off or move are as PaliGemma 2 has them."""
    for name in sorted(CAPS | {"sliding_window"}):
        if name in text and text[name] is None:
            raise CheckpointError(f"{file}: text_config.{name} is null; PaliGemma 2 has a number")
    layers = text.get("layer_types")
    kinds = ("sliding_attention", "full_attention")
    if layers is not None and (
        not isinstance(layers, list) or any(layer != kinds[i % 2] for i, layer in enumerate(layers))
    ):
        raise CheckpointError(
            f"{file}: text_config.layer_types is {layers!r:.60}; expected sliding_attention and "
            "full_attention in turn"
        )


# %% [markdown]
# PaliGemma 2 ([13](13_gemma2.ipynb)) has another text model.
#
# One trap waits in `vocab_size`. The tokenizer has 257,152 pieces, numbered from 0, so `<image>`, added later, has number 257152 and needs one row *more*; the rows were then padded to a multiple of 64. Some configs say 257152 at the top level and 257216 inside `text_config`. The inner one is the truth. Where it is absent, a number too small for `<image>` is padded.


# %%
#| export
def read_config(path: str | os.PathLike) -> PaliGemmaConfig:
    """Read `config.json` of a checkpoint directory; absent fields get the published defaults.

    Raises:
        CheckpointError: no such file, not JSON, a required field missing or of the wrong type,
            or another architecture than PaliGemma.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"no config.json in {path}; give the directory of a checkpoint")
    config = _read_object(file)
    _expect(file, config, "model_type", "paligemma")
    text, vision = (_section(file, config, name) for name in ("text_config", "vision_config"))
    _expect(file, text, "model_type", "gemma2", "gemma", section="text_config.")
    kind = TEXT_CONFIGS[text["model_type"]]
    if kind is Gemma2Config:
        _check_gemma2(file, text)
    _expect(file, vision, "model_type", None, "siglip_vision_model", section="vision_config.")
    for name in ("hidden_act", "hidden_activation"):  # "gelu" in old configs means the tanh form
        _expect(file, text, name, None, "gelu", "gelu_pytorch_tanh", section="text_config.")
    _expect(file, vision, "hidden_act", None, "gelu_pytorch_tanh", section="vision_config.")
    image_token = _token(file, config, 257152, "image_token_index", "image_token_id")
    rows = config.get("vocab_size")
    if type(rows) is int and rows <= image_token:  # counted without <image>
        rows = -(-(image_token + 1) // 64) * 64
    text = text | {"rope_theta": _rope_theta(file, text)}
    text = text | {"vocab_size": rows if text.get("vocab_size") is None else text["vocab_size"]}
    return PaliGemmaConfig(
        _build(file, "vision_config", SiglipVisionConfig, vision, VISION_OPTIONAL),
        _build(file, "text_config", kind, text, TEXT_OPTIONAL),
        image_token,
        _token(file, config, 0, "pad_token_id"),
        _token(file, config, 1, "eos_token_id"),
        _token(file, config, 2, "bos_token_id"),
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
assert read_config(folder) == PaliGemmaConfig()
print("the 3B model, from twelve fields and the defaults")
print(f"rows: {read_config(folder).text_config.vocab_size:,} = 64 × {257216 // 64:,}")

# %% [markdown]
# ### Which files?
#
# A big model is split into **shards**, with an index that says which tensor lies in which file. Other files may lie beside them: an older save, a mask decoder. Two rules: read what the index names and nothing else; when two complete sets are there, ask a human.

# %%
#| export
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(path: str | os.PathLike) -> list[Path]:
    """The safetensors files of a checkpoint directory, and no others that may lie beside them.

    They are the shards of `model.safetensors.index.json`, else `model.safetensors`, else every
    `*.safetensors`.

    Raises:
        CheckpointError: none there, only pickled weights, a shard of the index missing, or two
            whole sets of weights.
    """
    path = Path(path)
    single, shards = path / SINGLE, []
    if (path / INDEX).is_file():
        shards = _shards(path / INDEX)
        missing = [file.name for file in shards if not file.is_file()]
        if missing and not (single.is_file() and len(missing) == len(shards)):
            raise CheckpointError(
                f"{path} lacks {missing[0]} ({len(missing)} of {len(shards)} shards missing); "
                "download the checkpoint again"
            )
        if not missing and single.is_file() and single not in shards:
            raise CheckpointError(
                f"{path} holds {SINGLE} and the {len(shards)} shards of {INDEX}; "
                "remove the one that is out of date"
            )
        if not missing:
            return shards
    files = [single] if single.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        pickled = sorted(
            p.name for end in ("bin", "pt", "pth", "ckpt") for p in path.glob(f"*.{end}")
        )
        raise CheckpointError(
            f"{path} holds {pickled[0]}, a pickle, which can run any code when opened; "
            "convert it to safetensors"
            if pickled
            else f"no *.safetensors in {path}; give the directory of a checkpoint"
        )
    return files


def _shards(index: Path) -> list[Path]:
    """The files that an index names, each once."""
    found = _read_object(index).get("weight_map")
    names = list(found.values()) if isinstance(found, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{index} is not an index of shards: weight_map is {found!r:.60}")
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r:.60}, which is not a file beside it")
    return [index.parent / name for name in sorted(set(names))]


# %% [markdown]
# ### Read, one tensor at a time
#
# The library's `safe_open` does what our `tensors_of` did, mapped, with every check a hostile file needs: offsets inside the file, no overlap, sizes that fit the shapes. We only turn its complaints into ours.


# %%
#| export
def read_tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of all files, memory-mapped: bytes are read when they are used.

    Raises:
        CheckpointError: truncated, or not a safetensors file.
    """
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    yield name, tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is truncated or not a safetensors file ({error}); download it again"
            ) from None


# %% [markdown]
# ### A model without memory
#
# What *should* be in the file? For this we need names and shapes, no numbers. On the **meta device** tensors have a shape, a type and no storage.
#
# One surprise: PyTorch still calls the functions that fill weights with random numbers. There they have nothing to fill, yet the first call imports PyTorch's compiler, which takes seconds. A *function mode* sees every call of a PyTorch function; ours answers those of `torch.nn.init` itself.


# %%
#| export
class _NoInit(TorchFunctionMode):
    """Leave new weights as they are: on the meta device there is nothing to fill.

    It saves more than it seems: the first random number there makes torch load its compiler.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def empty_model(path, config: PaliGemmaConfig) -> PaliGemma:
    """The model with shapes and no memory."""
    try:
        with torch.device("meta"), _NoInit():
            return PaliGemma(config)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: config.json fits no model: {error}") from None


# %% tags=["nbval-ignore-output"]
start = time.perf_counter()
big = empty_model("", PaliGemmaConfig())
print(f"3B model built in {1000 * (time.perf_counter() - start):.0f} ms")
weight = big.language_model.embed_tokens.weight
print(
    tuple(weight.shape), weight.device, f"{sum(p.numel() for p in big.parameters()):,} parameters"
)

# %% [markdown]
# ### Strictness
#
# Each stored tensor must have exactly one place, and each place exactly one tensor, of the right shape and of a type that holds plain numbers. (An int8 or float8 tensor needs a scale that we do not know.)
#
# First of all: is it PaliGemma 1 or 2? Only 2 has four norms.
#
# One exception: PaliGemma's head *is* its embedding ([lesson 12](12_gemma.ipynb): tied). Some files store it a second time. That is fine, if it is the same.

# %%
#| export
EMBEDDING, HEAD = "language_model.embed_tokens.weight", "lm_head.weight"


def _place(path, name: str, tensor: torch.Tensor, shapes: dict, state: dict) -> str:
    """Where a stored tensor belongs; raises when it belongs nowhere."""
    key = internal_name(name)
    shape = shapes.get(EMBEDDING if key == HEAD else key)
    if shape is None:
        raise CheckpointError(f"{path} holds {name}, for which this model has no place")
    if key in state:
        raise CheckpointError(f"{path} holds {name} twice, under different names or in two files")
    if tensor.shape != shape:
        raise CheckpointError(
            f"{path}: {name} is {list(tensor.shape)}; config.json makes it {list(shape)}"
        )
    if tensor.dtype not in FLOATS:
        raise CheckpointError(
            f"{path}: {name} is {tensor.dtype}; expected float32, bfloat16 or float16"
        )
    return key


def _check_complete(path, state: dict, shapes: dict) -> None:
    """Every expected tensor is there, and a stored head is the embedding (tied weights)."""
    missing = [published_name(key) for key in shapes if key not in state]
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of {len(shapes)} tensors, the first is {missing[0]}; "
            "download the checkpoint again"
        )
    head = state.pop(HEAD, None)
    if head is not None and not torch.equal(head.to(state[EMBEDDING]), state[EMBEDDING]):
        raise CheckpointError(f"{path}: {HEAD} differs from the embedding; PaliGemma ties the two")


def _check_generation(path, names: list[str], shapes: dict) -> None:
    """The weights are of the PaliGemma that config.json describes, 1 or 2."""
    stored, expected = (
        2 if any("_feedforward_layernorm." in name for name in group) else 1
        for group in (names, shapes)
    )
    if stored != expected and any("self_attn.q_proj" in name for name in names):
        raise CheckpointError(
            f"{path} holds the weights of a PaliGemma {stored} beside the config.json of a "
            f"PaliGemma {expected}; take both from the same download"
        )


# %% [markdown]
# ### Load
#
# Now it reads like a summary. `assign=True` puts the stored tensors *themselves* into the empty model, instead of copying numbers into it. With `dtype=None` (or the stored type) on the CPU, `.to` returns the tensor unchanged: still mapped.

# %%
#| export
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load_model(
    path: str | os.PathLike,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    progress: bool = False,
) -> PaliGemma:
    """Load a checkpoint directory, every tensor accounted for.

    Args:
        path: directory with `config.json` and `*.safetensors` (with an index when sharded).
        device: where the weights go.
        dtype: of the weights; None: as stored. Stored type on the CPU: the tensors stay mapped,
            so that loading takes next to no time and no second copy in memory.
        progress: show a bar on standard error.

    Returns:
        A `PaliGemma` in evaluation mode.

    Raises:
        CheckpointError: (a `ValueError`) a missing, left-over, doubled or wrongly shaped tensor,
            a file that cannot be read, or a config that does not fit.
    """
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype!r}; expected torch.float32, torch.bfloat16, … or None")
    model = empty_model(path, read_config(path))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    files = weight_files(path)
    _check_generation(path, [name for name, _ in read_tensors(files)], shapes)
    stored = read_tensors(files)
    if progress:
        stored = tqdm(stored, total=len(shapes), desc="loading weights", unit=" tensors")
    state = {}
    for name, tensor in stored:
        key = _place(path, name, tensor, shapes, state)
        move = key != HEAD  # a stored head is only compared
        state[key] = tensor.to(device=device, dtype=dtype or tensor.dtype) if move else tensor
    _check_complete(path, state, shapes)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


# %% [markdown]
# ### Save
#
# The way back: our config and names in the published form, so that other programs can read what we write.


# %%
#| export
def config_dict(config: PaliGemmaConfig) -> dict:
    """A `PaliGemmaConfig` in the form of the published `config.json`."""
    text, vision = asdict(config.text_config), asdict(config.vision_config)
    tokens = {"num_image_tokens": config.vision_config.num_image_tokens}
    width = config.text_config.hidden_size
    model_type = "gemma2" if isinstance(config.text_config, Gemma2Config) else "gemma"
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "image_token_index": config.image_token_index,
        "hidden_size": width,
        "projection_dim": width,
        "vocab_size": config.text_config.vocab_size,
        "text_config": {"model_type": model_type, **text, **tokens},
        "vision_config": {
            "model_type": "siglip_vision_model",
            **vision,
            **tokens,
            "projection_dim": width,
            "vision_use_head": False,
        },
    }


# %% [markdown]
# What if the disk fills up in the middle? Writing straight into `model.safetensors` leaves half a file, and the old one is gone. So every file is written under another name and **renamed** when all are whole. Renaming is a single step: others see the old file or the new one.
#
# It also solves a riddle: how to save over the very file that is mapped? The old one lives on, without a name, while someone has it mapped.


# %%
#| export
@contextmanager
def replacing(path: Path) -> Iterator[Callable[[str], Path]]:
    """Give out temporary names in a directory; all get their real names at the end, or none."""
    drafts = {}

    def draft(name: str) -> Path:
        file = path / f".{name}.{os.getpid()}.tmp"
        file.touch()
        drafts[file] = path / name, file.stat().st_mode
        return file

    try:
        yield draft
        for file, (target, mode) in drafts.items():
            file.chmod(mode)  # safetensors makes its files private to their owner
            os.replace(file, target)
    finally:
        for file in drafts:
            file.unlink(missing_ok=True)


def _split(tensors: dict[str, torch.Tensor], max_bytes: int) -> list[list[str]]:
    """Names of the tensors in each shard, in order; a shard holds at least one."""
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


# %%
#| export
def save_model(
    model: PaliGemma, path: str | os.PathLike, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write `config.json` and safetensors in the published layout.

    Everything is written under other names first and renamed when it is whole; then weights of an
    earlier save that are no longer part of it are removed.

    Args:
        model: any device; written in the type of its weights.
        path: directory, made when absent.
        max_shard_bytes: more than that is split into shards with an index.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {published_name(name): t.detach() for name, t in model.state_dict().items()}
    shards = _split(tensors, max_shard_bytes)
    many = len(shards) > 1
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if many else [SINGLE]
    dtype = {"dtype": str(model.dtype).removeprefix("torch.")}
    with replacing(path) as draft:
        for file, shard in zip(names, shards, strict=True):
            whole = {name: tensors[name].cpu().contiguous() for name in shard}
            save_file(whole, draft(file), metadata={"format": "pt"})
        if many:
            place = {
                name: file for file, shard in zip(names, shards, strict=True) for name in shard
            }
            total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
            index = json.dumps({"metadata": total, "weight_map": place}, indent=2)
            draft(INDEX).write_text(index + "\n")
        config = json.dumps(config_dict(model.config) | dtype, indent=2)
        draft("config.json").write_text(config + "\n")
    if not many:
        (path / INDEX).unlink(missing_ok=True)
    for file in path.glob("model*.safetensors"):
        shard = re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", file.name)
        if shard and file.name not in names:
            file.unlink()


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


def write(path, tensors, config=small):
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config_dict(config)))
    save_file(tensors, path / "model.safetensors")
    return path


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
    loaded = load_model(write(folder / "layout", tensors))
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

# %% tags=["nbval-ignore-output"]
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
    shards = len(
        _split({n: t.to(getattr(torch, dtype)) for n, t in big.state_dict().items()}, 5_000_000_000)
    )
    print(
        f"{dtype:9} {size / 1e9:5.2f} GB, {shards} shards of at most 5 GB, {size / 2e9:.1f} s at 2 GB/s"
    )

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
complaint(lambda: load_model(write(folder / "bad", renamed)))

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
    complaint(lambda: load_model(write(folder / "bad", tensors)))

path = write(folder / "bad", weights)
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
    path = write(folder / "exercise", weights)
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
# It compares names and shapes of *one* dictionary. It does not see a tensor stored twice under two names (the later one wins in the dictionary), a head that should be tied and is not, integers that are copied in as if they were weights, or a missing shard of which nobody made an entry.
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
