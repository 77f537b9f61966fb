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
# [← Quantization](22_quantization.ipynb) | [contents](00_overview.ipynb) | [Scenes →](25_scenes.ipynb)

# %% [markdown]
# # 24 · Inference: how does a folder of weights become a command that answers?
#
# *30 minutes* · part IV, Answering
#
# **What you will be able to do**
#
# - take a checkpoint folder to an answer by hand;
# - say where the time of a short answer goes, and what to keep;
# - choose the number type to compute in, for a small model and a large one;
# - write a command that fails early, in one line, with the right exit code.

# %% tags=["map"]
from paligemma.plotting import model_map

model_map("inference")

# %% [markdown]
# ## Setup
#
# Here everything comes together: pictures ([02](02_image_processor.ipynb)), prompts
# ([14](14_processor.ipynb)), weights ([16](16_checkpoint.ipynb)) and answers
# ([18](18_generation.ipynb)). The cells that begin with `#| export` become
# [inference.py](../paligemma/inference.py), which is also what `import paligemma` gives its users.

# %%
#| export
"""The whole model behind one object and one command."""

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from paligemma.checkpoint import load_model, weight_files
from paligemma.detection import Detection, score_detections
from paligemma.generation import check_options, generate, generate_steps, stream
from paligemma.image_processor import open_image
from paligemma.model import PaliGemma
from paligemma.processor import Processor, as_lists, collate
from paligemma.quantization import load_quantized, read_quantization
from paligemma.segmentation import MaskCodec, Segment, score_segments

TINY = Path(resources.files("paligemma") / "assets" / "tiny")  # the checkpoint that ships with it
SMALL = 1_000_000_000  # bytes of weights up to which load() computes in float32

# %% tags=["setup"]
import shlex
import subprocess
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from itertools import pairwise

import matplotlib.pyplot as plt
from safetensors.torch import load_file

from paligemma.model import PaliGemmaConfig
from paligemma.plotting import COLOURS, check, sample_picture, save_figure, show_images

# %% [markdown]
# ## The problem
#
# The model is done, and useless. It wants `pixel_values` and `input_ids`; people have `photo.jpg`
# and a question. In between stand five steps, and behind each of them something can be wrong.


# %%
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
    ax.text(x, 1, what, color="white", ha="center", va="center", bbox=box, fontsize=9.5)
    ax.text(x, 1.6, f"lesson {lesson}", color=COLOURS[colour], ha="center", fontsize=8)
    ax.text(x, 0.2, wrong, color=COLOURS["bad"], ha="center", va="center", fontsize=8.5)
    if x:
        line = {"arrowstyle": "->", "color": COLOURS["muted"]}
        ax.annotate("", (x - 0.36, 1), (x - 0.64, 1), arrowprops=line)
ax.set(xlim=(-0.55, 4.55), ylim=(-0.1, 1.85))
ax.set_axis_off()
save_figure(fig, "24_steps")

# %% [markdown]
# This lesson builds two things from these parts: an object that hides the tensors (`Pipeline`), and
# a command. The model will not change by a single number. What changes is who can use it.
#
# And one idea runs through all of it: **what can be known to be wrong is said before the slow work
# begins.**
#
# ## By hand
#
# A checkpoint is a folder. These four files are all that is needed:

# %%
for name in ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.model"):
    print(f"{name:26} {(TINY / name).stat().st_size / 1000:8.1f} KB")

# %% [markdown]
# The config gives the shapes, the safetensors the numbers, the preprocessor config says how a
# picture is scaled, the tokenizer how text is cut. Five lines, one for each step of the figure:

# %%
picture = open_image(sample_picture("scene"))  # 02
processor = Processor.from_pretrained(TINY)
inputs = processor(picture, "caption en")  # 14
model = load_model(TINY)  # 16
ids = generate(model, inputs["input_ids"], inputs["pixel_values"])  # 18
by_hand = processor.decode(ids[0])
print({name: tuple(tensor.shape) for name, tensor in inputs.items()})
print(ids.tolist(), "→", by_hand)

# %% [markdown]
# ## As a loop
#
# The plainest program: a function of folder, picture and prompt, called once for each question.
# Right, and easy to test. Where does its time go? We watch a fresh Python from its first line to the
# last word, as the command would run.


# %%
def answer_plain(folder, image, prompt):
    processor, model = Processor.from_pretrained(folder), load_model(folder)
    inputs = processor(image, prompt)
    ids = generate(model, inputs["input_ids"], inputs["pixel_values"])
    return processor.decode(ids[0])


assert answer_plain(TINY, picture, "caption en") == by_hand

# %% tags=["nbval-ignore-output"]
PROGRAM = """
import time; stamps = [time.perf_counter()]
def lap(): stamps.append(time.perf_counter())
import torch; lap()
import paligemma; pg = paligemma.load(); lap()
from paligemma.plotting import sample_picture
picture = sample_picture("scene"); lap()
for piece in pg.stream(picture, "caption en"): lap()
print(*stamps)
"""
done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
stamps = [float(stamp) for stamp in done.stdout.split()]
laps = [after - before for before, after in pairwise(stamps)]
torch_s, load_s, _, first, *others = laps
parts = {"import torch": torch_s, "load": load_s, "first word": first, "the rest": sum(others)}
for name, seconds in parts.items():
    print(f"{name:13} {1e3 * seconds:8.1f} ms  {100 * seconds / sum(parts.values()):5.1f} %")

# %% tags=["nbval-ignore-output"]
fig, ax = plt.subplots(figsize=(8, 1.5), layout="constrained")
left = 0
for (name, seconds), colour in zip(parts.items(), ("muted", "together", "vision", "accent")):
    ax.barh(0, seconds, left=left, color=COLOURS[colour], height=0.5, label=name)
    left += seconds
ax.set(yticks=[], xlabel="seconds from the first line to the last word", xlim=(0, left))
ax.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 0.95), fontsize=8)
ax.spines["left"].set_visible(False)
save_figure(fig, "24_time")

# %% [markdown]
# What to notice: the answer itself is a thin line at the end. Nearly everything is preparation:
# starting torch and reading weights. The proportions differ for a large model, but not the
# conclusion: **prepare once, ask often.** A function that loads on every call throws the
# preparation away; an *object* keeps it.

# %% [markdown]
# ## Several at once
#
# The other way to use what is loaded: several pictures in one call, padded to one length. Greedy
# answers are the same as one by one ([lesson 18](18_generation.ipynb)). Both forms, with the loading outside:

# %%
names = ["scene", "scene2", "scene3"]
pictures = [sample_picture(name) for name in names]
inputs = processor(pictures, ["caption en"] * 3)
ids = generate(model, inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])
together = [processor.decode(row) for row in ids]
assert together == [answer_plain(TINY, image, "caption en") for image in pictures]
print(together)

# %% [markdown]
# ## The module
#
# First the options. They are the same for one question, for a stream and for a batch, so they are
# written down once, with their meaning and their defaults, and they check themselves when they are
# made: long before a model runs.


# %%
#| export
@dataclass
class Options:
    """How to answer: the keywords that `Pipeline` takes.

    Args:
        max_new_tokens: at most so many tokens.
        temperature: 0 is greedy; above it tokens are drawn.
        top_p, top_k: limit the draw, see `paligemma.sampling.sample`.
        seed: makes a draw repeatable; None: different each time.

    Raises:
        ValueError: an option out of range.
    """

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self):
        check_options(self.max_new_tokens, self.temperature, self.top_p, self.top_k)
        seed = 0 if self.seed is None else self.seed
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed!r}; expected a whole number from 0 to 2**63 - 1")

    def arguments(self, device: torch.device) -> dict:
        """The same as keywords of `generate`, the seed made into a generator on `device`."""
        generator = torch.Generator(device)
        generator.seed() if self.seed is None else generator.manual_seed(self.seed)
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "generator": generator,
        }


# %% [markdown]
# A task that returns objects needs their names in the layout of the training: `detect cat ; dog`.


# %%
#| export
@dataclass(frozen=True, eq=False)
class EncodedImage:
    """A picture that the vision tower has read, from `Pipeline.encode`.

    Args:
        features: `float[1, N, D]`, of one model.
        size: width and height of the picture, pixels.
    """

    features: torch.Tensor
    size: tuple[int, int]


def task_prompt(task: str, what: str) -> str:
    """`"detect", "cat;dog"` → `"detect cat ; dog"`; the task may stand there already.

    Raises:
        ValueError: nothing is named.
    """
    names = what.strip().removeprefix(f"{task} ").split(";") if isinstance(what, str) else []
    names = [name.strip() for name in names if name.strip()]
    if not names or names == [task]:
        raise ValueError(f"{what!r} names nothing to {task}; expected such as 'cat' or 'cat ; dog'")
    return f"{task} {' ; '.join(names)}"


# %% [markdown]
# Then the object. A picture that is asked about often need be looked at only once: `EncodedImage`
# keeps what the vision tower saw. `stream` is the basic form; calling the object joins its pieces, so the two can
# never disagree. Note what a user does *not* meet: tensors, pads, masks, devices, eos.


# %%
#| export
class Answering:
    """A model with its processor: pictures and prompts in, text out.

    Pictures are a path, a `PIL.Image` or `uint8[H, W, 3]` in RGB order, or what `encode` made of
    one; a prompt is such as "caption en", "answer en how many cats are there?". Options: the
    fields of `Options`.

    Args:
        model: in evaluation mode, on any device.
        processor: from the same checkpoint.
        codec: draws the masks of `segment`; None: this model has none.
    """

    def __init__(self, model: PaliGemma, processor: Processor, codec: MaskCodec | None = None):
        self.model = model
        self.processor = processor
        self.codec = codec

    def __call__(self, image, prompt: str, **options) -> str:
        """Answer one prompt about one picture: the pieces of `stream`, joined."""
        return "".join(self.stream(image, prompt, **options))

    def stream(self, image, prompt: str, **options) -> Iterator[str]:
        """Answer piece by piece, as the tokens come; a piece never ends in mid-character.

        Raises:
            ValueError: a picture, prompt or option that cannot be used; at once, not at the
                first piece.
        """
        steps = generate_steps(self.model, **self._arguments([image], [prompt], options))
        return stream((int(token) for token in steps), self.processor.tokenizer)

    def encode(self, image) -> EncodedImage:
        """Look at a picture once, to ask many things about it; use the result as a picture.

        The answers are the same; each saves the vision tower's work.
        """
        if isinstance(image, EncodedImage):
            return image
        picture = open_image(image)
        pixels = self.processor.image_processor([picture]).to(self.model.device)
        with torch.inference_mode():
            return EncodedImage(self.model.encode_image(pixels), picture.size)

    def _arguments(self, images: list, prompts: list[str], options: dict) -> dict:
        """Keywords for `generate`."""
        device = self.model.device
        arguments = Options(**options).arguments(device)
        if any(isinstance(image, EncodedImage) for image in images):
            images, prompts, _ = as_lists(images, prompts, None)
            prefixes = [self.processor.encode_prefix(prompt) for prompt in prompts]
            batch = collate(prefixes, [], self.processor.tokenizer.pad_id)
            batch["pixel_values"] = None
            features = [self.encode(image).features for image in images]
            arguments["image_features"] = torch.cat(features)
        else:
            batch = self.processor(images, prompts)
        for name in ("input_ids", "pixel_values", "attention_mask"):
            arguments[name] = None if batch[name] is None else batch[name].to(device)
        return arguments | {"eos_token_id": self.processor.tokenizer.eos_id}


# %%
#| export
class Pipeline(Answering):
    """What `paligemma.load` returns: it answers, finds objects and outlines them."""

    def batch(self, images: Sequence, prompts: Sequence[str], **options) -> list[str]:
        """Answer B prompts about B pictures together; greedy, the same as one by one.

        Raises `ValueError` as `stream` does, or when prompts and pictures are not as many.
        """
        ids = generate(self.model, **self._arguments(list(images), list(prompts), options))
        return [self.processor.decode(row) for row in ids]

    def detect(self, image, what: str, **options) -> list[Detection]:
        """Find the things named in `what`, "cat" or "cat ; dog"; boxes in pixels of `image`.

        Raises:
            ValueError: as in `stream`, or nothing named.
        """
        return score_detections(*self._scored("detect", image, what, options))

    def segment(self, image, what: str, **options) -> list[Segment]:
        """Find the things named in `what` with their shapes; masks as large as `image`.

        Raises:
            ValueError: as in `detect`, or the model came without a mask codec.
        """
        if self.codec is None:
            raise ValueError(
                "this model has no mask codec; put vae-oid.npz or mask_codec.safetensors into its "
                "directory, or set pipeline.codec"
            )
        return score_segments(*self._scored("segment", image, what, options), self.codec)

    def _scored(self, task: str, image, what: str, options: dict) -> tuple:
        """An answer's tokens, the logarithms of their probabilities, who spells them, the size."""
        prompt = task_prompt(task, what)
        if not isinstance(image, EncodedImage):
            image = open_image(image)
        arguments, log_probs = self._arguments([image], [prompt], options), []
        steps = generate_steps(self.model, **arguments, log_probs=log_probs)
        ids = [int(token) for token in steps]
        return ids, [float(value) for value in log_probs], self.processor.tokenizer, *image.size


# %%
pg = Pipeline(model, processor, MaskCodec.from_pretrained(TINY))
assert pg(picture, "caption en") == by_hand
assert "".join(pg.stream(picture, "caption en")) == by_hand
assert pg.batch(pictures, ["caption en"] * 3) == together
print(list(pg.stream(picture, "caption en")))

# %% [markdown]
# `detect` is [lesson 19](19_detection.ipynb) in three lines: the picture's own size, the answer with its log-probabilities,
# the objects read from it. Whatever the model writes, this is a list; what is no object is not in it.
# `segment` is [lesson 21](21_segmentation.ipynb) in the same way. And `encode` looks at the picture once for all.

# %%
once = pg.encode(picture)
print(task_prompt("detect", "cat;dog"))
for found in pg.detect(once, "cat ; dog"):
    print(found.label, f"{found.score:.2f}", [round(value) for value in found.box])
print("the answer behind it:", pg(once, "detect cat ; dog"))
for found in pg.segment(once, "dog"):
    print(found.label, f"{found.score:.2f}", found.mask.shape, int(found.mask.sum()), "pixels")

# %% [markdown]
# ### Loading, and in which type to compute
#
# Weights are stored in bfloat16, two bytes a number. Compute in it, or in float32? On a CPU small
# products in bfloat16 bring nothing, and float32 compares well with any reference. But a 3B model in float32 is 12 GB, and decode reads all of it for each token ([lesson 18](18_generation.ipynb)).
#
# So: **float32 while it is small, as stored when it is large.** The line is drawn at 1 GB of files.


# %%
#| export
def load(
    path: str | os.PathLike | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    progress: bool = False,
) -> Pipeline:
    """Load a checkpoint with its processor.

    Args:
        path: a checkpoint directory, or a name on the Hugging Face hub such as
            "google/paligemma-3b-mix-224" (needs the package `huggingface_hub` and the network);
            None: the tiny model that ships with this package.
        device: "cpu", "cuda", "mps".
        dtype: to compute in; None: float32 for a small checkpoint, else the type it is stored in
            (quantised weights: always that).
        quantize: "int8" or "int4": fewer bits a weight in the language model (lesson 22); None: as
            the checkpoint is. What `save_quantized` wrote is recognised.
        progress: show a bar on standard error while loading.

    Raises:
        ValueError: nothing usable at `path`, or an option that this version does not know.
    """
    if quantize not in (None, "int8", "int4"):
        raise ValueError(f"quantize is {quantize!r}; expected None, 'int8' or 'int4'")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; expected such as torch.float32 or torch.bfloat16")
    path = TINY if path is None else find_checkpoint(path)
    processor, codec = Processor.from_pretrained(path), find_codec(path)
    if quantize or read_quantization(path):
        return Pipeline(
            load_quantized(path, quantize, device=device, dtype=dtype), processor, codec
        )
    if dtype is None and sum(file.stat().st_size for file in weight_files(path)) <= SMALL:
        dtype = torch.float32
    return Pipeline(load_model(path, device, dtype, progress), processor, codec)


def find_codec(path: Path) -> MaskCodec | None:
    """The mask codec that lies beside a model's weights: ours, or the published `vae-oid.npz`."""
    if (path / "mask_codec.safetensors").is_file():
        return MaskCodec.from_pretrained(path)
    if (path / "vae-oid.npz").is_file():
        return MaskCodec.from_npz(path / "vae-oid.npz")
    return None


# %% [markdown]
# A path may also be a name on the Hugging Face hub, `owner/name`. A folder that exists always wins.
# The hub's package is optional: who loads from a folder needs neither it nor a network.


# %%
#| export
def find_checkpoint(path: str | os.PathLike) -> Path:
    """A directory as it is; a hub name downloaded, or found in the hub's cache."""
    if Path(path).is_dir():
        return Path(path)
    if not re.fullmatch(r"[\w-]+/[\w.-]+", str(path)):
        raise ValueError(f"no directory {path}; give a checkpoint directory or a hub name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"no directory {path}; to fetch it from the hub: pip install huggingface_hub"
        ) from None
    try:
        patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.npz"]
        return Path(snapshot_download(str(path), allow_patterns=patterns))
    except Exception as error:  # the hub's many errors share no base class
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is no directory, and the hub did not give it: {reason}") from None


# %%
for how in ({}, {"dtype": torch.bfloat16}, {"quantize": "int8"}):
    pg = load(**how)
    print(f"load({how}) computes in {pg.model.dtype}:", pg(picture, "caption en"))
pg = load()
for wrong in ({"path": "weights.bin"}, {"quantize": "int2"}, {"dtype": "float16"}):
    try:
        load(**wrong)
    except ValueError as error:
        print(wrong, "→", error)

# %% [markdown]
# ### The command
#
# A command line is an interface for people in a hurry and for other programs, and it has customs:
#
# - the answer goes to **standard output**, all else to **standard error**, so that `> answer.txt`
#   holds only the answer;
# - the **exit code** is 0 when it worked and 2 when the input was wrong;
# - a mistake is answered in one line that says what to do, not in forty lines of traceback.

# %%
#| export
EXAMPLES = """examples:
  paligemma --image_file_path photo.jpg                        caption with the shipped tiny model
  paligemma --model_path ~/paligemma-3b-mix-224 --image_file_path photo.jpg \\
            --prompt "answer en what is on the table?"         a published checkpoint
  paligemma --image_file_path photo.jpg --do_sample --temperature 0.8 --top_p 0.9 --seed 1
  paligemma --image_file_path photo.jpg --output captioned.png write the picture with its answer
  paligemma --image_file_path photo.jpg --task detect --prompt "cat ; dog" --output boxes.png
  paligemma --image_file_path photo.jpg --task segment --prompt cat --output masks.png --json
  curl -s https://example.org/photo.jpg | paligemma --image_file_path -
"""


class _Parser(argparse.ArgumentParser):
    """Accepts dashes for underscores; an error is one line."""

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_args([_underscore(a) for a in args], namespace)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def _underscore(argument: str) -> str:
    """`--top-p=0.9` → `--top_p=0.9`; values stay as they are."""
    if not argument.startswith("--"):
        return argument
    name, *value = argument[2:].split("=", 1)
    return "=".join(["--" + name.replace("-", "_"), *value])


def _boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return values[text.lower()]


# %% [markdown]
# `--do_sample`, `--do_sample True` and `--do-sample=yes` mean the same; people arrive with habits
# from other programs. Abbreviations are refused (`allow_abbrev=False`): a misspelt `--temp` should
# be an error, not a guess.


# %%
#| export
def make_parser() -> argparse.ArgumentParser:
    """The command line of `paligemma`."""
    parser = _Parser(
        prog="paligemma",
        description="Answer a prompt about a picture.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--image_file_path", metavar="FILE", required=True, help="the picture; - is standard input")
    add(
        "--prompt",
        help="what to do with it (default: caption en); for detect and segment: the names",
    )
    add("--model_path", metavar="DIR", help="checkpoint directory or hub name (default: shipped)")
    add("--max_tokens_to_generate", metavar="N", type=int, default=100, help="default: 100")
    flag = {"type": _boolean, "nargs": "?", "const": True, "default": False, "metavar": "BOOL"}
    add("--do_sample", **flag, help="draw tokens rather than take the likeliest")
    add("--temperature", type=float, default=0.8, help="with --do_sample (default: 0.8)")
    add("--top_p", type=float, default=0.9, help="with --do_sample (default: 0.9)")
    add("--seed", type=int, help="makes --do_sample repeatable")
    add("--only_cpu", **flag, help="leave a GPU alone")
    add("--quantize", choices=["int8", "int4"], help="fewer bits a weight")
    add("--task", choices=["answer", "detect", "segment"], default="answer", help="default: answer")
    add("--output", metavar="FILE", help="write the picture with its answer, boxes or masks")
    add("--json", action="store_true", help="print one JSON object instead of streaming")
    version = import_module("paligemma").__version__
    add("--version", action="version", version=f"%(prog)s {version}")
    return parser


# %% [markdown]
# What `main` does with trouble: a `ValueError` is the user's mistake and becomes one line and exit
# code 2. Ctrl-C is a wish, not an error: 130, the custom for "interrupted". A closed pipe (`paligemma
# … | head -1`) means the reader has enough: be quiet. Anything else is *our* mistake and keeps its
# traceback.


# %%
#| export
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or exits with 2 and one line on bad input."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        run(args)
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    except torch.OutOfMemoryError:
        parser.exit(1, f"{parser.prog}: error: the GPU's memory is full; try --only_cpu\n")
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def run(args: argparse.Namespace) -> None:
    """What the command does, once its arguments are read; cheap checks come before the weights."""
    draw = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    options = Options(args.max_tokens_to_generate, **draw)
    if not args.do_sample:
        options.temperature = 0.0
    prompt = "caption en" if args.prompt is None else args.prompt
    if args.task != "answer":
        prompt = task_prompt(args.task, args.prompt or "")
    if args.output:
        check_output(args.output)
    image = read_picture(args.image_file_path)
    device = None if args.only_cpu else torch.accelerator.current_accelerator()
    progress = sys.stderr.isatty()  # a bar is for people, not for log files
    pipeline = load(args.model_path, device or "cpu", quantize=args.quantize, progress=progress)
    if args.task == "answer":
        make_picture = run_answer(pipeline, image, prompt, vars(options), args.json)
    else:
        make_picture = run_find(pipeline, args.task, image, prompt, vars(options), args.json)
    if args.output:
        save_picture(make_picture(), args.output)


# %% [markdown]
# Each task prints its result and returns *how* to draw it: only `--output` pays for the drawing.


# %%
#| export
def run_answer(
    pipeline: Pipeline, image: Image.Image, prompt: str, options: dict, as_json: bool
) -> Callable[[], Image.Image]:
    """Print the answer as it comes, or as JSON; returns what draws it."""
    answer = ""
    for piece in pipeline.stream(image, prompt, **options):
        answer += piece
        if not as_json:
            print(piece, end="", flush=True)
    print(json.dumps({"prompt": prompt, "answer": answer}) if as_json else "", flush=True)

    def draw() -> Image.Image:
        from paligemma.plotting import draw_caption  # matplotlib only where it is needed

        return draw_caption(image, answer)

    return draw


def run_find(
    pipeline: Pipeline, task: str, image: Image.Image, prompt: str, options: dict, as_json: bool
) -> Callable[[], Image.Image]:
    """Print a line for each object (label, score, x0 y0 x1 y1, with a mask its pixels), or JSON.

    Returns what draws them.
    """
    found = (pipeline.detect if task == "detect" else pipeline.segment)(image, prompt, **options)
    if as_json:
        name = {"detect": "detections", "segment": "segments"}[task]
        print(json.dumps({"prompt": prompt, name: [as_dict(one) for one in found]}), flush=True)
    for one in [] if as_json else found:
        pixels = f"\t{one.mask.sum()}" if task == "segment" else ""
        box = " ".join(f"{v:.0f}" for v in one.box)
        print(f"{one.label}\t{one.score:.2f}\t{box}{pixels}", flush=True)
    if not found:
        print("nothing found", file=sys.stderr)

    def draw() -> Image.Image:
        from paligemma.plotting import draw_boxes, draw_masks

        labels, scores = [one.label for one in found], [one.score for one in found]
        masks = [one.mask for one in found] if task == "segment" else []
        picture = draw_masks(image, masks, labels) if masks else image
        return draw_boxes(picture, [one.box for one in found], labels, scores)

    return draw


def as_dict(one: Detection | Segment) -> dict:
    """An object for JSON; its mask as run lengths down the columns, zeros first, as COCO has it."""
    box = [round(value, 2) for value in one.box]
    result = {"label": one.label, "score": round(one.score, 4), "box": box}
    if isinstance(one, Segment):
        flat = np.concatenate(([False], one.mask.ravel(order="F")))
        ends = np.flatnonzero(np.diff(flat)).tolist()
        counts = np.diff([0, *ends, one.mask.size]).tolist()
        result["mask"] = {"size": list(one.mask.shape), "counts": counts}
    return result


# %% [markdown]
# Three helpers around files. A picture may come through a pipe (`-`). Whether the output can be
# written is asked before the model has worked for it. And it is written under another name and then
# renamed: whoever looks sees the old file or the new one, never half of one.


# %%
#| export
def read_picture(name: str) -> Image.Image:
    """The picture of that name; `-` reads it from standard input."""
    if name != "-":
        return open_image(name)
    try:
        return open_image(Image.open(io.BytesIO(sys.stdin.buffer.read())))
    except OSError:
        raise ValueError("what came on standard input is not a picture") from None


def check_output(file: str | os.PathLike) -> None:
    """Refuse a file that `save_picture` could not write."""
    file = Path(file)
    if not file.parent.is_dir():
        raise ValueError(f"cannot write {file}: its directory does not exist")
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise ValueError(f"cannot write {file}: it is a directory, or in one that is read-only")
    if Image.registered_extensions().get(file.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"cannot write {file}: no picture format; use a name such as answer.png")


def save_picture(image: Image.Image, file: str | os.PathLike) -> None:
    """Write a picture whole or not at all; the format follows the file's ending."""
    file = Path(file)
    temporary = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        image.save(temporary)
        os.replace(temporary, file)
    except (ValueError, OSError) as error:
        raise ValueError(f"cannot write {file} ({error}); use a name such as answer.png") from None
    finally:
        temporary.unlink(missing_ok=True)


# %% [markdown]
# The last two lines make the file a program, `python -m paligemma.inference`. A notebook is called
# `__main__` as well, but has no file; here nothing happens.

# %%
#| export
if __name__ == "__main__" and "__file__" in globals():
    sys.exit(main())

# %% [markdown]
# ### Each option, tried
#
# `main([...])` is the command, without a new process. The helper runs it in a folder of its own and
# shows what came out of which channel.

# %%
FOLDER = tempfile.TemporaryDirectory()
picture.save(Path(FOLDER.name, "scene.png"))
Path(FOLDER.name, "notes.txt").write_text("no picture")


def run_command(arguments):
    """Exit code, standard output and standard error of `paligemma …`."""
    home, out, err = Path.cwd(), io.StringIO(), io.StringIO()
    os.chdir(FOLDER.name)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    finally:
        os.chdir(home)
    return code, out.getvalue(), err.getvalue()


def command(line):
    code, out, err = run_command(shlex.split(line))
    print(f"$ paligemma {line}\n{(out + err).rstrip()}\n[exit {code}]\n")


# %%
command("--image_file_path scene.png")
command('--image-file-path scene.png --prompt "answer en how many dogs are there?" --json')
command("--image_file_path scene.png --max_tokens_to_generate 2")
command("--image_file_path scene.png --do_sample True --temperature 1.2 --seed 3")
command('--image_file_path scene.png --task detect --prompt "cat ; dog" --output boxes.png --json')

# %% [markdown]
# And what goes wrong, each in one line. Look at the first words: whose mistake, and what to do.

# %%
command("--image_file_path scene.pgn")
command("--image_file_path notes.txt")
command("--image_file_path scene.png --model_path weights")
command("--image_file_path scene.png --do_sample --top_p 90")
command('--image_file_path scene.png --prompt "<image> caption en"')
command("--image_file_path scene.png --output captioned.xyz")
command("--image_file_path scene.png --quantize int2")
command("--image_file_path scene.png --temp 0.5")
command("--image_file_path scene.png --task detect")

# %% [markdown]
# And as a program of its own, in a pipe: `cat scene.png | paligemma --image_file_path -`. The picture
# comes through standard input, the answer leaves through standard output, and nothing else does.

# %%
program = [sys.executable, "-m", "paligemma.inference", "--image_file_path", "-"]
scene = Path(FOLDER.name, "scene.png").read_bytes()
done = subprocess.run(program, input=scene, capture_output=True)
print("exit", done.returncode)
print("standard output:", done.stdout)
print("standard error: ", done.stderr)

# %% [markdown]
# ## Against the reference
#
# The whole path at once, not one part: the shipped checkpoint read by transformers, its own picture
# processor, the ids laid out by hand, its own greedy `generate`. The file holds the ids that came
# out, for three pictures and two prompts. A test recomputes it.

# %%
reference = load_file("reference/inference.safetensors")
for name in names:
    for task in ("caption", "count"):
        prompt = {"caption": "caption en", "count": "answer en how many dogs are there?"}[task]
        theirs = pg.processor.decode(reference[f"{name}_{task}"])
        ours = pg(sample_picture(name), prompt)
        assert ours == theirs
        print(f"{name:7} {prompt:36} {ours}")

# %% [markdown]
# The second number is wrong (there are no dogs in scene2), and it is wrong in both. Parity says that
# we compute what the reference computes, not that the model is right. Two different questions.
#
# ## See it
#
# `--output` writes the picture with its answer below, with boxes or with masks. One scene, three
# tasks; and a photograph of a real cat.

# %%
shown = []
for name, task in (
    ("scene", "answer"),
    ("cat", "answer"),
    ("scene", "detect"),
    ("scene", "segment"),
):
    sample_picture(name).resize((448, 448)).save(Path(FOLDER.name, "in.png"))
    prompt = "caption en" if task == "answer" else "cat ; dog"
    line = f'--image_file_path in.png --task {task} --prompt "{prompt}" --output out.png'
    code, _, _ = run_command(shlex.split(line))
    assert code == 0
    shown.append(open_image(Path(FOLDER.name, "out.png")))
fig = show_images(shown, columns=2, height=2.7)
save_figure(fig, "24_tasks.png")

# %% [markdown]
# What to notice: words, boxes and shapes say the same of the scene, and of the cat of fur the model
# talks nonsense. It knows 48 emoji; it was never taught to say "I do not know". A confident tone is no
# evidence. Nor is a modest one: boxes score low because training spread each edge over its
# neighbours ([lesson 27](27_training.ipynb)), so no single location word is likely.

# %% [markdown]
# ## At full size
#
# The same two numbers decide what a checkpoint of 3B needs: how many parameters, and how many bytes
# each. Shapes on the `meta` device are free.

# %%
with torch.device("meta"):
    large = PaliGemma(PaliGemmaConfig())
count = sum(p.numel() for p in large.parameters())
language = sum(p.numel() for p in large.language_model.parameters())
print(f"{count:,} parameters, {language:,} of them read for every token")
for dtype in (torch.float32, torch.bfloat16):
    size, per_token = count * dtype.itemsize / 1e9, language * dtype.itemsize / 1e9
    print(f"{dtype!s:15} {size:5.1f} GB, at most {47 / per_token:4.1f} tokens a second at 47 GB/s")

# %% [markdown]
# (47 GB/s is the memory of the two CPU cores on which this course was made.) In the stored type
# nothing has to be converted, so the file is *mapped*: a page is read from disk when it is first
# used, and loading takes next to no time. Converting means reading all of it and writing it again.
# Measured on the tiny checkpoint, a hundred small tensors:


# %% tags=["nbval-ignore-output"]
def best_ms(function, repeats=5):
    """The fastest of some runs, in milliseconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


mapped = best_ms(lambda: load_model(TINY, dtype=None))
converted = best_ms(lambda: load_model(TINY, dtype=torch.float32))
asked = best_ms(lambda: pg(picture, "caption en"))
print(f"load as stored {mapped:.1f} ms, converted {converted:.1f} ms; a question {asked:.1f} ms")

# %% [markdown]
# ## A bug people really make: the prompt is almost right
#
# A colleague skips the processor; the prompt is only a few ids, after all. Picture tokens, bos, the
# pieces of the text. Every shape fits, and the model answers:

# %%
tokenizer, layout = pg.processor.tokenizer, pg.processor.num_image_tokens
for name, image in zip(names, pictures):
    colleague = [tokenizer.image_id] * layout + [tokenizer.bos_id, *tokenizer.encode("caption en")]
    pixels = pg.processor.image_processor(image)
    theirs = generate(pg.model, torch.tensor([colleague]), pixels)
    print(f"{name:7} {pg.processor.decode(theirs[0])!r:34} ours: {pg(image, 'caption en')!r}")

# %% [markdown]
# Not garbage. *Almost* right, and in one row even the same things in another order: it would pass for
# a weak model. Before you read on: what is different?

# %%
right = pg.processor(pictures[0], "caption en")["input_ids"][0, layout:].tolist()
print("right:    ", [tokenizer.sp.id_to_piece(i) for i in right])
print("colleague:", [tokenizer.sp.id_to_piece(i) for i in colleague[layout:]])

# %% [markdown]
# The newline at the end is missing. In training it always stood between prompt and answer; without
# it the model goes on writing the *prompt*. No error is possible: any ids are valid ids. The layout of
# a prompt is part of the weights; compare ids, not answers.
#
# ### A second one: chance where none was meant
#
# A script fills a catalogue with captions and samples with temperature 1, because a demo did. The
# same picture, sixty times:

# %%
said = [pg(picture, "caption en", temperature=1.0, seed=seed) for seed in range(60)]
draws = Counter(said).most_common(5)
fig, ax = plt.subplots(figsize=(6, 2.2), layout="constrained")
greedy = pg(picture, "caption en")
colours = [COLOURS["good" if text == greedy else "muted"] for text, _ in draws]
ax.barh([text for text, _ in draws], [count for _, count in draws], color=colours)
ax.invert_yaxis()
ax.set(xlabel="of 60 draws", title="greedy says the green one, always")
save_figure(fig, "24_draws")

# %% [markdown]
# A draw is right for text that may vary. Where one answer is wanted, take the likeliest token: greedy,
# which is why `temperature` is 0 unless asked for, and why the command draws only with
# `--do_sample`, whatever `--temperature` says.
#
# The figure shows one more thing: where the model hesitates. It knows the kinds, and is less sure which
# of them is the pair.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): which exit code?
#
# Six command lines; `scene.png` is there. Write down the exit code of each, 0 or 2.

# %% tags=["exercise"]
LINES = [
    "--image_file_path scene.png --temperature 0.2",
    "--image_file_path scene.png --temperature -1",
    "--image-file-path=scene.png --do-sample=no",
    "--image_file_path scene.png --max_tokens_to_generate 2.5",
    "--image_file_path scene.png --output .",
    "--image_file_path scene.png --prompt=--do-sample",
]
codes = [None] * 6  # your answer


# %% tags=["check"]
def test_1(codes):
    assert len(codes) == len(LINES) and set(codes) <= {0, 2}, "six numbers, each 0 or 2"
    for code, line in zip(codes, LINES):
        real, _, _ = run_command(shlex.split(line))
        assert code == real, f"{line}: exit {real}, not {code}"


check(test_1, codes)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Options are checked even where they are not used. What stands behind a `=` is a value, whatever it
# looks like. A dot is a directory.
#
# </details>

# %% tags=["solution"]
codes = [0, 2, 0, 2, 2, 0]
check(test_1, codes)

# %% [markdown]
# ### Exercise 2 (fill in): ask until it is sure
#
# "Self-consistency": draw $n$ answers with different seeds and return the most frequent one, and its
# share. Write `vote(ask, n)`, where `ask(seed)` gives one answer. On a tie the answer that came first
# wins; the same call gives the same result each time.


# %% tags=["exercise"]
def vote(ask, n):
    return None  # (answer, share)


# %% tags=["check"]
def test_2(vote):
    said = ["2", "1", "2", "3", "2"]
    asked = []

    def ask(seed):
        asked.append(seed)
        return said[len(asked) - 1]

    assert vote(ask, 5) == ("2", 0.6), "three of five say '2': expected ('2', 0.6)"
    assert len(set(asked)) == 5, "five different seeds, or all draws are the same"
    seeds, asked[:] = list(asked), []
    said = ["b", "a", "a", "b", "c"]
    assert vote(ask, 5)[0] == "b", "on a tie the answer that came first wins"
    assert asked == seeds, "the same seeds each time, or the result cannot be repeated"
    real = vote(lambda seed: pg(picture, "caption en", temperature=0.7, seed=seed), 5)
    assert real[0] == by_hand, "on the scene, most draws agree with greedy"


check(test_2, vote)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `Counter(list).most_common(1)` gives the most frequent element with its number; of equals it gives
# the one it met first.
#
# </details>


# %% tags=["solution"]
def vote(ask, n):
    answer, times = Counter(ask(seed) for seed in range(n)).most_common(1)[0]
    return answer, times / n


check(test_2, vote)

# %% [markdown]
# ### Exercise 3 (break): one line, always
#
# `parser.error` gets `" ".join(str(error).split())` instead of `str(error)`. Why? Find input for
# the command that would otherwise print its error in **two** lines. Give it as a list of arguments.

# %% tags=["exercise"]
arguments = []  # such as ["--image_file_path", "…"]


# %% tags=["check"]
def test_3(arguments):
    try:
        args = make_parser().parse_args(arguments)
    except SystemExit:
        raise AssertionError("argparse itself refuses this; it has to reach `run`") from None
    try:
        run(args)
    except ValueError as error:
        assert "\n" in str(error), f"the message has one line: {error}"
    else:
        raise AssertionError("this input is fine; it has to be wrong")


with redirect_stderr(io.StringIO()):
    check(test_3, arguments)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The message repeats what the user gave. May the name of a file hold a line break?
#
# </details>

# %% tags=["solution"]
arguments = ["--image_file_path", "holiday\npicture.png"]
check(test_3, arguments)

# %% [markdown]
# ## Summary
#
# - From folder to answer are five steps; an object keeps what is slow to prepare.
# - What can be known to be wrong is said before the slow work, in one line.
# - Answers to standard output, the rest to standard error, 0 or 2 as exit code.
# - Small models compute in float32, large ones in the type they are stored in.
# - The layout of a prompt belongs to the weights: one newline less, and a good model looks weak.

# %% [markdown]
# ## Quiz
#
# **1.** `pg.stream(...)` returns at once, but a wrong `top_p` raises in that very line, not at the first
# piece. How, if `stream` of [lesson 18](18_generation.ipynb) is a generator?
#
# <details><summary>Answer</summary>
#
# `Pipeline.stream` is an ordinary function. It makes the `Options`, opens the picture and lays out the
# prompt, and then returns a generator. Only the model's calls wait for the first piece.
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
# - Xuezhi Wang et al., *Self-Consistency Improves Chain of Thought Reasoning in Language Models*,
#   2023.
# - Python: module `argparse`; POSIX: *Utility Conventions* (options, exit status).
# - transformers: `models/paligemma/processing_paligemma.py`, function `build_string_from_input`.

# %% [markdown] tags=["navigation"]
# [← Quantization](22_quantization.ipynb) | [contents](00_overview.ipynb) | [Scenes →](25_scenes.ipynb)
