# Exported from notebooks/24_inference.ipynb — edit there, then run `make sync`.
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


if __name__ == "__main__" and "__file__" in globals():
    sys.exit(main())
