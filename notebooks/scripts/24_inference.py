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
# [← Compilation](23_compilation.ipynb) | [contents](00_overview.ipynb) | [Scenes →](25_scenes.ipynb)

# %% [markdown]
# # 24 · Inference: how does a folder of weights become a command that answers?
#
# *45 minutes* · part IV, Answering
#
# **What you will be able to do**
#
# - take a checkpoint folder to an answer by hand;
# - say where the time of a short answer goes, and what to keep;
# - let every kind of answer go one way, and say what is wrong before the slow work begins;
# - write a command that people and programs can rely on.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("inference")

# %% [markdown]
# ## Setup
#
# Here everything comes together: pictures ([02](02_image_processor.ipynb)), prompts ([14](14_processor.ipynb)), weights
# ([16](16_checkpoint.ipynb)) and answers ([18](18_generation.ipynb)). The cells that begin with `#| export` become
# [inference.py](../paligemma/inference.py), which is also what `import paligemma` gives its users.

# %%
#| export
"""The whole model behind one object: pictures and prompts in, answers out."""

import os
import runpy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from numbers import Integral
from pathlib import Path

import numpy as np
import torch

from paligemma.checkpoint import load_model, save_model
from paligemma.compilation import compile_decode
from paligemma.detection import Detection, score_detections
from paligemma.generation import GenerationConfig, generate_steps
from paligemma.generation import stream as text_pieces
from paligemma.mask_codec import MaskCodec
from paligemma.model import PaliGemma
from paligemma.processor import Processor, collate
from paligemma.quantization import quantize_model
from paligemma.segmentation import Segment, score_segments
from paligemma.support.adapters import add_adapter, find_adapter, refuse_adapter
from paligemma.support.arguments import check_context
from paligemma.support.config import parse_device, parse_dtype
from paligemma.support.files import find_folder, shorten
from paligemma.support.pictures import open_picture
from paligemma.support.quantized import load_quantized, read_quantization, save_quantized
from paligemma.support.replacing import replacing
from paligemma.support.tensors import weight_files
from paligemma.tokenizer import Tokenizer

TINY = Path(str(resources.files("paligemma") / "assets" / "tiny"))  # the checkpoint that ships
SMALL = 1_000_000_000  # bytes of weights up to which load() computes in float32

# %% tags=["setup"]
import contextlib
import io
import subprocess
import sys
import tempfile
from collections import Counter

import matplotlib.pyplot as plt
from safetensors.torch import load_file

from paligemma.generation import generate
from paligemma.model import PaliGemmaConfig
from paligemma.plotting import show_images
from paligemma.support.course import add_to_class, check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS, draw_boxes, draw_masks

# %% [markdown]
# ## The problem
#
# The model is done, and useless. It wants `pixel_values` and `input_ids`; people have `photo.jpg` and a question. In
# between stand five steps, and behind each of them something can be wrong. Together they are a **pipeline**.


# %% tags=["hide-input"]
STEPS = [  # what, lesson, colour, what users get wrong
    ("open the\npicture", "02", "vision", "no such file\nnot a picture"),
    ("prompt\nto ids", "14", "language", "no newline\na control token"),
    ("read the\nweights", "16", "together", "wrong folder\nhalf a download"),
    ("prefill,\ndecode", "18", "accent", "chance where\nnone was meant"),
    ("text, piece\nby piece", "18", "accent", "half a character\na closed pipe"),
]
fig, ax = plt.subplots(figsize=(8, 2), layout="constrained")
for x, (what, lesson, colour, wrong) in enumerate(STEPS):
    box = {"boxstyle": "round,pad=0.6", "fc": COLOURS[colour], "ec": "none"}
    ax.text(x, 1, what, color="white", ha="center", va="center", bbox=box, fontsize=10)
    ax.text(x, 1.6, f"lesson {lesson}", color=COLOURS[colour], ha="center")
    ax.text(x, 0.2, wrong, color=COLOURS["bad"], ha="center", va="center")
    if x:
        line = {"arrowstyle": "->", "color": COLOURS["muted"]}
        ax.annotate("", (x - 0.36, 1), (x - 0.64, 1), arrowprops=line)
ax.set(xlim=(-0.55, 4.55), ylim=(-0.1, 1.85))
ax.set_axis_off()
save_figure(fig, "24_steps")

# %% [markdown]
# This lesson builds an object that hides the tensors (`Pipeline`), and a command. The model will not change by a single
# number; what changes is who can use it. And one idea runs through all of it: **what can be known to be wrong is
# said before the slow work begins.**
#
# ## By hand
#
# A checkpoint is a folder. These four files are all that is needed: shapes, numbers, how a picture is scaled, how text
# is cut.

# %%
for name in ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.model"):
    print(f"{name:26} {(TINY / name).stat().st_size / 1000:8.1f} KB")

# %% [markdown]
# Five lines, one for each step of the figure:

# %%
picture = open_picture(sample_picture("scene"))  # 02
processor = Processor.from_pretrained(TINY)
inputs = processor(picture, "caption en")  # 14
model = load_model(TINY)  # 16
ids = generate(model, inputs["input_ids"], inputs["pixel_values"])  # 18
by_hand = processor.decode(ids[0])
print(ids.tolist(), "→", by_hand)

# %% [markdown]
# ## As a loop
#
# The plainest program: a function of folder, picture and prompt, called once for each question. Right, and easy to test.


# %%
def answer_plain(folder, image, prompt):
    processor, model = Processor.from_pretrained(folder), load_model(folder)
    inputs = processor(image, prompt)
    ids = generate(model, inputs["input_ids"], inputs["pixel_values"])
    return processor.decode(ids[0])


assert answer_plain(TINY, picture, "caption en") == by_hand

# %% [markdown]
# Where does its time go? We watch a fresh Python from its first line to the last word, as a command would run.

# %% tags=["nbval-ignore-output"]
PROGRAM = """
from time import perf_counter as now
a = now(); import torch
b = now(); import paligemma; pg = paligemma.load()
c = now(); pg("scene.png", "caption en")
print(b - a, c - b, now() - c)
"""
FOLDER = tempfile.TemporaryDirectory()
picture.save(Path(FOLDER.name, "scene.png"))
program = [sys.executable, "-c", PROGRAM]
done = subprocess.run(program, capture_output=True, text=True, check=True, cwd=FOLDER.name)
parts = dict(zip(("import torch", "load", "answer"), map(float, done.stdout.split())))
print({name: f"{1e3 * seconds:.0f} ms" for name, seconds in parts.items()})

# %% tags=["nbval-ignore-output", "hide-input"]
fig, ax = plt.subplots(figsize=(8, 1.5), layout="constrained")
left = 0
for (name, seconds), colour in zip(parts.items(), ("muted", "together", "accent")):
    ax.barh(0, seconds, left=left, color=COLOURS[colour], height=0.5, label=name)
    left += seconds
ax.set(yticks=[], xlabel="seconds from the first line to the last word", xlim=(0, left))
ax.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 0.95))
ax.spines["left"].set_visible(False)
save_figure(fig, "24_time")

# %% [markdown]
# What to notice: the answer itself is the smallest part, at the end. Most is preparation: starting torch and reading
# weights. So: **prepare once, ask often.** A function that loads on every call throws the preparation away; an
# *object* keeps it.

# %% [markdown]
# ## The module
#
# First the plainest form: the five lines of above, with what is slow to make kept in an object.


# %%
class Pipeline:
    def __init__(self, model, processor):
        self.model, self.processor = model, processor

    def __call__(self, image, prompt):
        inputs = self.processor(image, prompt)
        ids = generate(self.model, inputs["input_ids"], inputs["pixel_values"])
        return self.processor.decode(ids[0])


# %%
pg = Pipeline(model, processor)
assert pg(picture, "caption en") == by_hand
print(pg(picture, "caption en"), "|", pg(picture, "answer en how many dogs are there?"))

# %% [markdown]
# That is all one needs, most of the time. What follows adds what people ask for next: the same picture asked about
# often, words as they come, many pictures at once, boxes and masks. Each is a method of a few lines. The object itself
# gets only two parts more, and a word on how it is used:


# %%
#| export
class Pipeline:
    """A model with its processor: pictures and prompts in, text out. What `paligemma.load` returns.

    A picture is a path, a `PIL.Image` or `uint8[H, W, 3]` in RGB order; a list of these for one
    prompt about several pictures; or what `encode` made of either. A prompt is such as
    "caption en" or "answer en how many cats are there?". Options of an answer: the fields of
    `GenerationConfig` (max_new_tokens, temperature, top_p, top_k), and `seed`, which makes a draw
    repeatable.

    Args:
        model: in evaluation mode, on any device.
        processor: from the same checkpoint.
        codec: a `MaskCodec` that draws the masks of `segment`; None: this model has none.
        decoder: what `generate` asks, such as a `CompiledDecoder` of the model; None: the model.
    """

    def __init__(self, model: PaliGemma, processor: Processor, codec=None, decoder=None):
        self.model, self.processor = model, processor
        self.codec, self.decoder = codec, decoder


# %% [markdown]
# ### Look once, ask often
#
# Three questions about one picture send it through the vision tower three times. So looking becomes a step of its own,
# and its result an object that may stand wherever a picture may.


# %%
#| export
@dataclass(frozen=True, eq=False)
class EncodedImage:
    """What the vision tower made of a picture (or of several, for one prompt): `Pipeline.encode`.

    Args:
        features: `float[P, N, D]`, of one model, with the weights that it had then.
        size: width and height of the (first) picture, pixels.
    """

    features: torch.Tensor
    size: tuple[int, int]


# %% [markdown]
# One picture:


# %%
@add_to_class(Pipeline)
@torch.inference_mode()
def encode(self, image):
    pixels = self.processor.image_processor([open_picture(image)])  # [1, 3, H, W]
    return EncodedImage(self.model.encode_image(pixels), image.size)


# %%
pg = Pipeline(model, processor)
print(list(pg.encode(picture).features.shape), pg.encode(picture).size)

# %% [markdown]
# In general the pictures of several prompts pass the tower together, some prompts have several, and what was encoded
# before is not looked at again:


# %%
#| export
@add_to_class(Pipeline)
def encode(self, image) -> "EncodedImage":
    """Look at a picture once, to ask many things about it; use the result in its place."""
    return self._look([image])[0]


# %%
#| export
@add_to_class(Pipeline)
@torch.inference_mode()
def _look(self, images: Sequence) -> "list[EncodedImage]":
    """`encode` each of several, in one pass of the vision tower."""
    looked, groups = list(images), {}  # groups: the pictures of each prompt that are new
    for i, image in enumerate(images):
        if not isinstance(image, EncodedImage):
            several = image if isinstance(image, list | tuple) else [image]
            groups[i] = [open_picture(one) for one in several]
    if groups:
        counts = [len(group) for group in groups.values()]
        pixels = self.processor.image_processor([one for group in groups.values() for one in group])
        features = self.model.encode_image(pixels.to(self.model.device)).split(counts)
        for (i, group), seen in zip(groups.items(), features):
            looked[i] = EncodedImage(seen, group[0].size)
    return looked


# %% [markdown]
# ### One way to every answer
#
# The options come first: a misspelt one should be named before any work is done, and so should a `top_p` of 90.


# %%
#| export
def check_options(seed: int | None = None, **options) -> GenerationConfig:
    """The options of an answer, checked.

    Raises:
        ValueError: one that does not exist, or is out of range.
    """
    known = [field.name for field in fields(GenerationConfig)]
    for name in options:
        if name not in known:
            raise ValueError(f"{name} is no option; expected one of {', '.join(known)}, seed")
    if seed is not None and not (isinstance(seed, Integral) and 0 <= seed < 2**63):
        raise ValueError(f"seed is {shorten(seed)}; expected a whole number from 0 to 2**63 - 1")
    return GenerationConfig(**options)


# %% [markdown]
# Before anything is looked at, the prompts are laid out with as many `<image>` as there will be vectors, and padded to
# one length ([lesson 14](14_processor.ipynb)). With `new` tokens of answer they must fit what the model reads:


# %%
#| export
@add_to_class(Pipeline)
def _lay_out(self, prompts: Sequence[str], images: Sequence, new: int) -> tuple[torch.Tensor, ...]:
    """The ids of B prompts about B pictures, and their attention mask, `int64[B, L]` both."""
    text = self.model.config.text_config
    shape, prefixes = (self.processor.num_image_tokens, text.hidden_size), []
    for prompt, image in zip(prompts, images, strict=True):
        if isinstance(image, EncodedImage):
            if image.features.shape[1:] != shape:
                raise ValueError("a picture was encoded by another model; encode it with this one")
            image = list(image.features)
        count = len(image) if isinstance(image, list | tuple) else 1
        prefixes.append(self.processor.encode_prefix(prompt, count))
    check_context(max(map(len, prefixes)) + new - 1, text.max_position_embeddings)
    batch = collate(prefixes, [], self.processor.tokenizer.pad_id)
    return tuple(batch[key].to(self.model.device) for key in ("input_ids", "attention_mask"))


# %% [markdown]
# Then [lesson 18](18_generation.ipynb) takes over. One picture or a batch, encoded before or not, streamed or
# collected: this method does not know.


# %%
#| export
@add_to_class(Pipeline)
def _steps(
    self, images: Sequence, prompts: Sequence[str], options: dict, log_probs: list | None = None
) -> Iterator[torch.Tensor]:
    """Answer B prompts about B pictures (each what `encode` takes): `int64[B]`, token by token.

    All that can be wrong is found here; only the language model waits for the first step.
    """
    device = self.model.device
    config = check_options(**{"eos_token_id": self.processor.tokenizer.eos_id} | options)
    generator, seed = torch.Generator(device), options.get("seed")
    generator.seed() if seed is None else generator.manual_seed(int(seed))
    input_ids, mask = self._lay_out(prompts, images, config.max_new_tokens)
    looked = self._look(images)
    features = torch.cat([one.features.to(device) for one in looked])
    decoder = self.decoder or self.model
    return generate_steps(decoder, input_ids, None, mask, config, generator, features, log_probs)


# %% [markdown]
# With it `stream` is one line, and calling the object joins its pieces: the two can never disagree.


# %%
#| export
@add_to_class(Pipeline)
def __call__(self, image, prompt: str, **options) -> str:
    """Answer one prompt about one picture: the pieces of `stream`, joined."""
    return "".join(self.stream(image, prompt, **options))


@add_to_class(Pipeline)
def stream(self, image, prompt: str, **options) -> Iterator[str]:
    """Answer piece by piece, as the tokens come; a piece never ends in mid-character.

    Raises:
        ValueError: an unusable picture, prompt or option; at once, not at the first piece.
    """
    steps = self._steps([image], [prompt], options)
    return text_pieces((int(token) for token in steps), self.processor.tokenizer)


# %%
print(list(pg.stream(picture, "caption en")))
once = pg.encode(picture)
assert pg(once, "caption en") == pg(picture, "caption en") == by_hand

# %% [markdown]
# What is wrong is told in the line that asks, not at the first piece:

# %%
for wrong in ({"temprature": 0.5}, {"top_p": 90}, {"seed": -1}):
    try:
        pg.stream(picture, "caption en", **wrong)
    except ValueError as error:
        print(wrong, "→", error)

# %% [markdown]
# ### Several at once
#
# One trap of Python lies in a batch: a string is a sequence too, and the model answers each letter.

# %%
pictures = [sample_picture(name) for name in ("scene", "scene2", "scene3")]

# %% tags=["nbval-ignore-output"]
for image, prompt in zip(pictures, "caption en"):
    print(f"asked {prompt!r}: {pg(image, prompt, max_new_tokens=3)!r}")

# %% [markdown]
# People who give one prompt mean it for all:


# %%
#| export
@add_to_class(Pipeline)
def batch(self, images: Sequence, prompts: str | Sequence[str], **options) -> list[str]:
    """Answer B prompts, or one for all, about B pictures; in float32 the same as one by one.

    Raises:
        ValueError: as in `stream`, or pictures and prompts that are not as many.
    """
    texts = [prompts] if isinstance(prompts, str) else prompts
    for what, values in (("pictures", images), ("prompts", texts)):
        if isinstance(values, str | np.ndarray) or not isinstance(values, Iterable):
            raise ValueError(f"got one {type(values).__name__}; expected a list of {what}")
    images = list(images)
    prompts = list(texts) * len(images) if isinstance(prompts, str) else list(texts)
    if len(images) != len(prompts) or not images:
        raise ValueError(
            f"got {len(images)} pictures, {len(prompts)} prompts; expected one prompt for all "
            "pictures or one each, and at least one picture"
        )
    ids = torch.stack(list(self._steps(images, prompts, options)), dim=1)
    return [self.processor.decode(row.tolist()) for row in ids]


# %%
together = pg.batch(pictures, "caption en")
assert together == [pg(picture, "caption en") for picture in pictures]
print(together)

# %% [markdown]
# ### Boxes and masks
#
# A task that returns objects needs their names in the layout of the training: `detect cat ; dog`.


# %%
#| export
def task_prompt(task: str, what: str | Sequence[str]) -> str:
    """`"detect", "cat;dog"` or `["cat", "dog"]` → `"detect cat ; dog"`.

    Raises:
        ValueError: nothing is named.
    """
    listed = isinstance(what, list | tuple) and all(isinstance(name, str) for name in what)
    text = ";".join(what) if listed else what if isinstance(what, str) else ""
    names = [name.strip() for name in text.strip().removeprefix(f"{task} ").split(";")]
    names = [name for name in names if name]
    if not names or names == [task]:
        raise ValueError(f"{shorten(what)} names nothing to {task}; expected such as 'cat ; dog'")
    return f"{task} {' ; '.join(names)}"


# %% [markdown]
# `detect` is [lesson 19](19_detection.ipynb) in one line: the answer with its log-probabilities and the picture's own
# size, and the objects read from them. Whatever the model writes, this is a list; what is no object is not in it.


# %%
#| export
@add_to_class(Pipeline)
def detect(self, image, what: str | Sequence[str], **options) -> list[Detection]:
    """Find the things named, "cat", "cat ; dog" or ["cat", "dog"]; boxes in pixels of `image`.

    Raises:
        ValueError: as in `stream`, or nothing named.
    """
    return score_detections(*self._scored(image, task_prompt("detect", what), options))


@add_to_class(Pipeline)
def _scored(self, image, prompt, options) -> tuple[list[int], list[float], Tokenizer, int, int]:
    """An answer's tokens, the logarithms of their probabilities, who spells them, the size."""
    once, log_probs = self.encode(image), []
    if len(once.features) != 1:
        raise ValueError(f"got {len(once.features)} pictures; boxes and masks are those of one")
    ids = [int(token) for token in self._steps([once], [prompt], options, log_probs)]
    return ids, [float(value) for value in log_probs], self.processor.tokenizer, *once.size


# %%
boxes = pg.detect(once, ["cat", "dog"])
for found in boxes:
    print(found.label, f"{found.score:.2f}", [round(value) for value in found.box])
print("the answer behind it:", pg(once, "detect cat ; dog"))

# %% [markdown]
# `segment` is [lesson 21](21_segmentation.ipynb) in the same way. Some published models were trained on the bare
# sentence, "the dog on the left": `prefix=False` asks them so.


# %%
#| export
@add_to_class(Pipeline)
def segment(self, image, what: str | Sequence[str], prefix=True, **options) -> list[Segment]:
    """Find the things named, with their shapes; masks as large as `image`.

    With prefix=False the model is asked the bare sentence, such as "the dog on the left".

    Raises:
        ValueError: as in `detect`, or the model came without a mask codec.
    """
    if self.codec is None:
        files = "vae-oid.npz or mask_codec.safetensors into its directory"
        raise ValueError(f"this model has no mask codec; put {files}, or set pipeline.codec")
    prompt = task_prompt("segment", what) if prefix else what
    return score_segments(*self._scored(image, prompt, options), self.codec)


# %%
pg.codec = MaskCodec.from_pretrained(TINY)
masks = pg.segment(once, "cat ; dog")
for found in masks:
    print(found.label, found.mask.shape, int(found.mask.sum()), "pixels")

# %% [markdown]
# ### Loading, and in which type to compute
#
# Weights are stored in bfloat16, two bytes a number. Compute in it, or in float32? Float32 compares well with any
# reference. But the 3B model in float32 is 12 GB, and decoding reads most of it for each token
# ([lesson 18](18_generation.ipynb)).

# %%
with torch.device("meta"):
    count = sum(p.numel() for p in PaliGemma(PaliGemmaConfig()).parameters())
print(f"{count:,} parameters: float32 {count * 4 / 1e9:.1f} GB, bfloat16 {count * 2 / 1e9:.1f} GB")
print(f"the tiny model's file: {(TINY / 'model.safetensors').stat().st_size / 1e9:.4f} GB")

# %% [markdown]
# So: **float32 while it is small, as stored when it is large.** The line is drawn at 1 GB of files. And masks need their
# codec, if there is one beside the weights:


# %%
#| export
def find_codec(folder: Path) -> MaskCodec | None:
    """The mask codec beside a model's weights: ours, or the published `vae-oid.npz`."""
    if (folder / "mask_codec.safetensors").is_file():
        return MaskCodec.from_pretrained(folder)
    published = folder / "vae-oid.npz"
    return MaskCodec.from_npz(published) if published.is_file() else None


# %%
def load_plain(folder):
    return Pipeline(load_model(folder), Processor.from_pretrained(folder), find_codec(folder))


assert load_plain(TINY)(picture, "caption en") == by_hand

# %% [markdown]
# Around these parts `load` puts what people ask for: the device, the type, quantised weights
# ([lesson 22](22_quantization.ipynb)), an adapter, and with `compile` the compiled step of
# [lesson 23](23_compilation.ipynb).


# %%
#| export
def load(
    path: str | os.PathLike | None = None,
    device: torch.device | str | int = "cpu",
    dtype: torch.dtype | str | None = None,
    quantize: str | None = None,
    adapter: str | os.PathLike | None = None,
    compile: bool = False,
    revision: str | None = None,
    progress: bool = False,
) -> Pipeline:
    """Load a checkpoint with its processor.

    Args:
        path: a checkpoint directory, or a name on the Hugging Face hub (needs `huggingface_hub`)
            such as "google/paligemma-3b-mix-224"; None: the tiny model that ships.
        device: "cpu", "cuda", "cuda:1", 1, "mps"; "auto": an accelerator where there is one.
        dtype: to compute in, `torch.bfloat16` or "bfloat16"; None: float32 for less than 1 GB of
            weights, else the type they are stored in (quantised: always that).
        quantize: "int8" or "int4": fewer bits a weight in the language model; None: as the
            checkpoint is. What `save` wrote of a quantised model is recognised.
        adapter: a directory with a LoRA adapter, as peft saves it; one in `path` is found. `path`
            may also be an adapter alone, if the base that it names is a directory.
        compile: compile the decode step: a slow first answer, fast ones after it.
        revision: branch, tag or commit, for a hub name.
        progress: show a bar on standard error while loading.

    Raises:
        ValueError: nothing usable at `path`, or an option that this version does not know.
    """
    if quantize not in (None, "int8", "int4"):
        raise ValueError(f"quantize is {shorten(quantize)}; expected None, 'int8' or 'int4'")
    device, dtype = parse_device(device), parse_dtype(dtype)
    folder, adapter = find_adapter(TINY if path is None else find_folder(path, revision), adapter)
    processor, codec = Processor.from_pretrained(folder), find_codec(folder)
    quantized = read_quantization(folder) is not None
    if quantized and adapter is not None:
        raise ValueError(f"{folder} is quantised; load the original weights to add an adapter")
    if quantized or (quantize and adapter is None):
        model = load_quantized(folder, quantize, device=device, dtype=dtype)
    else:
        if dtype is None and sum(file.stat().st_size for file in weight_files(folder)) <= SMALL:
            dtype = torch.float32
        model = load_model(folder, device, dtype, progress)
        if adapter is not None:
            add_adapter(model, adapter)
        if quantize:
            quantize_model(model, quantize)
    return Pipeline(model, processor, codec, compile_decode(model) if compile else None)


# %% [markdown]
# What is care and not idea (folders with `~`, the hub and its cache, names of devices and types, an adapter and its
# base) is in [support/](../paligemma/support). And back: a pipeline can be moved, saved, and says what it is (folded: there is nothing
# new in it).


# %% tags=["hide-input"]
#| export
@add_to_class(Pipeline)
def to(self, where: torch.device | torch.dtype | str | int) -> "Pipeline":
    """Move the model to "cuda", or let it compute in `torch.bfloat16`; else a ValueError."""
    named = getattr(torch, where, None) if isinstance(where, str) else where
    if isinstance(named, torch.dtype):
        self.model.to(parse_dtype(named))
    elif not isinstance(where, torch.dtype):
        self.model.to(parse_device(where))
    return self


@add_to_class(Pipeline)
def save(self, path: str | os.PathLike) -> None:
    """Write model, processor and mask codec into a directory, which `load` opens again."""
    quantized = self.model.language_model.head is not None
    refuse_adapter(path)
    with replacing(path) as draft:  # all files at once
        (save_quantized if quantized else save_model)(self.model, draft)
        self.processor.save_pretrained(draft)
        if self.codec is not None:
            self.codec.save_pretrained(draft, torch.float32)


@add_to_class(Pipeline)
def __repr__(self) -> str:
    config, dtype = self.model.config, str(self.model.dtype).removeprefix("torch.")
    kind = type(config.text_config).__name__.removesuffix("Config")
    masks = "without masks" if self.codec is None else "with masks"
    side = config.vision_config.image_size
    return f"Pipeline({kind}, {side} pixels, {masks}, {dtype} on {self.model.device})"


# %%
for how in ({}, {"dtype": torch.bfloat16}, {"quantize": "int8"}):
    pg = load(**how)
    print(how, pg(picture, "caption en"), pg, sep=" → ")

# %%
pg = load()
for wrong in ({"path": "weights.bin"}, {"quantize": "int2"}, {"device": "gpu"}):
    try:
        load(**wrong)
    except ValueError as error:
        print(wrong, "→", error)

# %% [markdown]
# The last lines make the file a program, `python -m paligemma.inference`. (A notebook is called `__main__` as well, but
# has no file.)

# %%
#| export
if __name__ == "__main__" and "__file__" in globals():
    runpy.run_module("paligemma", run_name="__main__")

# %% [markdown]
# ### The command
#
# It serves people in a hurry and other programs, and it has conventions:
#
# - the answer goes to **standard output**, all else to **standard error**, so that `> answer.txt` holds only the answer;
# - the **exit code** is 0 when it worked and 2 when the input was wrong;
# - a mistake is answered in one line that says what to do, not in forty lines of traceback.
#
# Python's `argparse` reads the options, in [support/command_line.py](../paligemma/support/command_line.py). Here it runs as a process of its own.


# %%
def command(*arguments):
    """Run the command and show what comes out of which channel; returns the exit code."""
    program = [sys.executable, "-m", "paligemma", *arguments]
    done = subprocess.run(program, capture_output=True, text=True, cwd=FOLDER.name)
    print(f"output: {done.stdout!r}\nerror: {done.stderr!r}\nexit code: {done.returncode}\n")
    return done.returncode


# %%
assert command("--image_file_path", "scene.png") == 0
assert (
    command("--image_file_path", "scene.png", "--task", "detect", "--prompt", "cat", "--json") == 0
)
assert command("--image_file_path", "scene.pgn") == 2

# %% [markdown]
# And other trouble? Ctrl-C is a wish, not an error: exit code 130. A closed pipe (`paligemma … | head -1`) means that the reader
# has enough: be quiet. Anything else is *our* mistake and keeps its traceback. (`paligemma --help` shows all options.)

# %% [markdown]
# ## Against the reference
#
# The whole path at once: the shipped checkpoint read by transformers, its own picture processor, the ids laid out by
# hand, its own greedy `generate`. The file holds the ids that came out, for three pictures and two prompts. A test
# recomputes it.

# %%
reference = load_file("reference/inference.safetensors")
PROMPTS = {"caption": "caption en", "count": "answer en how many dogs are there?"}

# %%
for name, image in zip(("scene", "scene2", "scene3"), pictures):
    for task, prompt in PROMPTS.items():
        theirs = pg.processor.decode(reference[f"{name}_{task}"])
        assert pg(image, prompt) == theirs
        print(f"{name:7} {prompt:36} {theirs}")

# %% [markdown]
# Equal, word for word. That says that we compute what the reference computes, not that the model is right: two
# different questions.
#
# ## See it
#
# One scene, three tasks; and a photograph of a real cat.

# %%
cat = sample_picture("cat")
print(pg(cat, "caption en"), "|", pg(cat, "answer en how many cats are there?"))
assert "cat" not in pg(cat, "caption en") and pg(cat, "answer en how many cats are there?") != "1"
assert len(boxes) == len(masks) == 3 and max(box.score for box in boxes) < 0.5

# %% tags=["hide-input"]
scene, big_cat = (image.resize((448, 448)) for image in (picture, cat))
labels, where = [one.label for one in boxes], 448 / picture.width
boxed = draw_boxes(scene, [[where * value for value in one.box] for one in boxes], labels)
outlined = draw_masks(scene, [one.mask for one in pg.segment(scene, "cat ; dog")], labels)
titles = [f"caption en: {pg(image, 'caption en')}" for image in (picture, cat)]
titles += ["detect cat ; dog", "segment cat ; dog"]
shown = [scene, big_cat, boxed, outlined]
save_figure(show_images(shown, titles, columns=2, height=3.2), "24_tasks.png")

# %% [markdown]
# What to notice: words, boxes and shapes say the same of the scene, and of the cat of fur the model talks nonsense. It
# knows 48 emoji; it was never taught to say "I do not know". A confident tone is no evidence. Nor is a modest one:
# boxes score below a half because no single location token is likely ([lesson 19](19_detection.ipynb)).

# %% [markdown]
# ## A bug people really make: chance where none was meant
#
# A script fills a catalogue with captions and samples with temperature 1.5, because a demo did. Each entry reads well.
# The check: ask about the same picture again. Sixty times:

# %%
said = [pg(once, "caption en", temperature=1.5, seed=seed) for seed in range(60)]
right = {"a cat and two dogs", "two dogs and a cat"}
wrong = sum(text not in right for text in said)
print(
    f"{wrong} of 60 are wrong; {len(set(said))} different captions; greedy:", pg(once, "caption en")
)
assert wrong > 6 and pg(once, "caption en") in right

# %% tags=["hide-input"]
draws, greedy = Counter(said).most_common(6), pg(once, "caption en")
fig, ax = plt.subplots(figsize=(6, 2.4), layout="constrained")
colours = [COLOURS["good" if text in right else "bad"] for text, _ in draws]
ax.barh([text[:44] for text, _ in draws], [count for _, count in draws], color=colours)
ax.invert_yaxis()
ax.set(xlabel="of 60 draws", title="the six most frequent; greedy says the first, always")
assert draws[0][0] == greedy
save_figure(fig, "24_draws")

# %% [markdown]
# More than one entry in ten is wrong, and each reads as well as the others. A draw is right for text that may vary.
# Where one answer is wanted, take the likeliest token: greedy, which is why `temperature` is 0 unless asked for, and why
# the command draws only with `--do_sample`, whatever `--temperature` says.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): how often is a picture looked at?
#
# Six calls, of which each may send pictures through the vision tower. How many **passes** of the tower does each cost?

# %% tags=["exercise"]
CALLS = [
    lambda: pg(picture, "caption en"),
    lambda: pg(once, "caption en"),
    lambda: pg.batch(pictures, "caption en"),
    lambda: pg.batch([once, once], ["caption en", "caption de"]),
    lambda: pg.batch([once, picture], "caption en"),
    lambda: [pg.detect(picture, name) for name in ("cat", "dog")],
]
passes = [None] * 6  # your answer


# %% tags=["check"]
def test_1(passes):
    assert isinstance(passes, list | tuple) and len(passes) == len(CALLS), "a list of six numbers"
    counted = []
    hook = pg.model.vision_tower.register_forward_hook(lambda *_: counted.append(1))
    try:
        for number, (call, guess) in enumerate(zip(CALLS, passes), 1):
            counted.clear()
            call()
            assert guess == len(counted), f"call {number}: what does the tower see, and when?"
    finally:
        hook.remove()


check(test_1, passes)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Pictures that come together pass together. What is encoded has been through. Two calls know
# nothing of each other.
#
# </details>

# %% tags=["solution"]
# A batch is one pass, however many pictures; encoded ones need none; two calls look twice.
passes = [1, 0, 1, 0, 1, 2]
check(test_1, passes)

# %% [markdown]
# ### Exercise 2 (write): a command
#
# Write `run(arguments, pg)`, a small command. `arguments` should be a picture's path and a prompt. It keeps the conventions
# from above: what goes to which channel, and the exit code, which it *returns*. Use `print(…, file=sys.stderr)`.


# %% tags=["exercise"]
def run(arguments, pg):
    return None  # the exit code


# %% tags=["check"]
class Stub:
    """A pipeline of which one knows what it does."""

    def __call__(self, image, prompt, **options):
        if image == "missing.png":
            raise ValueError("picture missing.png does not exist; give the path of an image file")
        if image == "bug.png":
            raise RuntimeError("shapes do not fit")
        return f"{prompt} of {image}"


def heard(run, *arguments):
    """What a command returns and says: (code, output, error)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run(list(arguments), Stub())
        except SystemExit:
            code = "left"
    return code, out.getvalue(), err.getvalue()


def test_2(run):
    code, out, err = heard(run, "a.png", "caption en")
    assert code != "left", "return the exit code; don't leave Python"
    assert out == "caption en of a.png\n", (
        "standard output: the answer, the end of its line, no more"
    )
    assert err == "" and code == 0 and code is not False, "all went well: no error, and which code?"
    for wrong in (["missing.png", "caption en"], ["a.png"], []):
        try:
            code, out, err = heard(run, *wrong)
        except (ValueError, TypeError, IndexError) as error:
            raise AssertionError(f"{wrong}: the user sees the traceback of {error!r}") from None
        assert code != "left", f"{wrong}: return the exit code; don't leave Python"
        assert out == "", f"{wrong}: standard output is for answers"
        assert err.count("\n") == 1 and len(err) > 10, (
            f"{wrong}: one line on standard error, please"
        )
        assert code == 2, f"{wrong}: not the exit code of wrong input"
    assert "does not exist" in heard(run, "missing.png", "x")[2], "the line says what was wrong"
    try:
        heard(run, "bug.png", "caption en")
    except RuntimeError:
        return
    raise AssertionError("a bug of ours is hidden: nobody will find it without its traceback")


check(test_2, run)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Which kind of exception is the user's mistake? Catch that one alone. What is wrong with the number of arguments is seen
# before anything is asked.
#
# </details>


# %% tags=["solution"]
def run(arguments, pg):
    if len(arguments) != 2:  # seen before the slow work
        print("error: give a picture and a prompt", file=sys.stderr)
        return 2
    try:
        answer = pg(*arguments)
    except ValueError as error:  # the user's mistake; all others are ours, and keep their traceback
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(answer)
    return 0


check(test_2, run)

# %% [markdown]
# ### Exercise 3 (extend): stop at a word
#
# A program wants the text up to a stop word, and not a token more: each costs time. Write `until(pieces, stop)`, a
# generator over the pieces of `stream`. It yields all that comes before the first `stop` and then asks for no further
# piece. The pieces may cut the stop word anywhere; text that can no longer belong to it must not wait.


# %% tags=["exercise"]
def until(pieces, stop):
    yield from pieces


# %% tags=["check"]
def test_3(until):
    def run(pieces, stop):
        asked = []
        source = (asked.append(piece) or piece for piece in pieces)
        return "".join(until(source, stop)), len(asked)

    words = ["a cat", " and", " two dogs"]
    assert run(words, "bee")[0] == "a cat and two dogs", "no stop word: everything comes out"
    assert run(words, " and")[0] == "a cat", "what stands before the stop word, and no more"
    assert run(["a c", "at a", "nd two", " dogs"], " and")[0] == "a cat", "a piece may cut it"
    assert run(["so EN", "D."], "END")[0] == "so ", "a piece may cut it at any letter"
    assert run(["x", "E", "N", "x"], "END")[0] == "xENx", "a beginning of it is not yet the word"
    assert run(words, " and")[1] == 2, "after the stop word no further piece is asked for"
    source = iter(["all this ", "may leave", "."])
    next(until(source, "END"))
    assert len(list(source)) == 2, "text that cannot be the stop word leaves at once"
    assert run(["and so", " and"], "and")[0] == "", "it may come first"


check(test_3, until)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Keep a text of what has not left yet. It may end in the first characters of `stop`, at most
# `len(stop) - 1` of them: hold so many back.
#
# </details>


# %% tags=["solution"]
def until(pieces, stop):
    held = ""  # may still be the beginning of the stop word
    for piece in pieces:
        held += piece
        if stop in held:
            yield held[: held.index(stop)]
            return
        safe = len(held) - len(stop) + 1
        if safe > 0:
            yield held[:safe]
            held = held[safe:]
    yield held


check(test_3, until)
print(list(until(pg.stream(picture, "caption en"), " two")))

# %% [markdown]
# ## Summary
#
# - From folder to answer are five steps; an object keeps what is slow to prepare.
# - Pictures are looked at first, then every answer goes one way: streamed, batched, boxes, masks.
# - What can be known to be wrong is said before the slow work, in one line.
# - Answers to standard output, the rest to standard error; 0 or 2.
# - Small models compute in float32, large ones as they are stored. Greedy, unless chance is wanted.

# %% [markdown]
# ## Quiz
#
# **1.** A wrong `top_p` raises in the line `pieces = pg.stream(...)`, not at the first
# piece. How, if `stream` of [lesson 18](18_generation.ipynb) is a generator?
#
# <details><summary>Answer</summary>
#
# `Pipeline.stream` is an ordinary function. It checks the options, looks at the picture, lays out the
# prompt, and then returns a generator. Only the language model waits for the first piece.
#
# </details>

# %% [markdown]
# **2.** Why does the command open the picture before it loads the weights?
#
# <details><summary>Answer</summary>
#
# A wrong path is the most frequent mistake and the cheapest to find. After the weights, the user of a
# large model would wait for the news that a file does not exist.
#
# </details>

# %% [markdown]
# **3.** A colleague wraps `main` in `except Exception` and prints "error: something went wrong". What is
# lost?
#
# <details><summary>Answer</summary>
#
# The difference between the user's mistakes and ours. A user's mistake has a known cause and a remedy,
# and one line says both. A bug has neither; only its traceback leads to it.
#
# </details>

# %% [markdown]
# ## References
#
# - Lucas Beyer et al., *PaliGemma: A versatile 3B VLM for transfer*, 2024, section 3 (the layout of a
#   prompt).
# - Python: module `argparse`; POSIX: *Utility Conventions* (options, exit status).
# - transformers: `models/paligemma/processing_paligemma.py`, function `build_string_from_input`.

# %% [markdown] tags=["navigation"]
# [← Compilation](23_compilation.ipynb) | [contents](00_overview.ipynb) | [Scenes →](25_scenes.ipynb)
