"""The command `paligemma`: what stands between a terminal and `Pipeline`.

Answers go to standard output, all else to standard error; exit codes as in `command.py`.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from paligemma.support.command import FLAG, Failure, Parser, run_command
from paligemma.support.console import import_slowly, say

if TYPE_CHECKING:  # what is slow to import comes after the arguments were read, see `run`
    from PIL import Image

    from paligemma.detection import Detection
    from paligemma.inference import Pipeline
    from paligemma.segmentation import Segment

EXAMPLES = """examples:
  paligemma --image_file_path photo.jpg                        caption with the shipped tiny model
  paligemma --model_path ~/paligemma-3b-mix-224 --image_file_path photo.jpg \\
            --prompt "answer en what is on the table?"         a published checkpoint
  paligemma --image_file_path photo.jpg --do_sample --temperature 0.8 --top_p 0.9 --seed 1
  paligemma --image_file_path photo.jpg --output captioned.png write the picture with its answer
  paligemma --image_file_path photo.jpg --task detect --prompt "cat ; dog" --output boxes.png
  paligemma --image_file_path photo.jpg --task segment --prompt cat --output masks.png --json
  paligemma --image_file_path holidays/ extra.png --json       a line for each picture
  curl -s https://example.org/photo.jpg | paligemma --image_file_path -
"""


# ---------------------------------------------------------------- arguments


def make_parser() -> Parser:
    """The options of the command."""
    from paligemma import __version__

    parser = Parser(
        prog="paligemma",
        description="Answer a prompt about a picture, or about each of several.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a misspelt --temp is an error, not a guess
    )
    add = parser.add_argument
    add(
        "--image_file_path",
        metavar="FILE",
        required=True,
        nargs="+",
        help="the picture; or several, or folders of them; - is standard input",
    )
    add(
        "--prompt",
        help="what to do with it (default: caption en); for detect and segment: the names",
    )
    add("--model_path", metavar="DIR", help="checkpoint directory or hub name (default: shipped)")
    add("--max_tokens_to_generate", metavar="N", type=int, default=100, help="default: 100")
    add("--do_sample", **FLAG, help="draw tokens rather than take the likeliest")
    add("--temperature", type=float, default=0.8, help="with --do_sample (default: 0.8)")
    add("--top_p", type=float, default=0.9, help="with --do_sample (default: 0.9)")
    add("--seed", type=int, help="makes --do_sample repeatable")
    add("--only_cpu", **FLAG, help="leave a GPU alone")
    add("--quantize", choices=["int8", "int4"], help="fewer bits a weight")
    add("--adapter", metavar="DIR", help="a LoRA adapter, as peft saves it, for the model")
    add("--compile", **FLAG, help="compile the decode step: pays for many pictures")
    add("--task", choices=["answer", "detect", "segment"], default="answer", help="default: answer")
    add(
        "--output",
        metavar="FILE",
        help="write the picture with its answer, boxes or masks; of several pictures: the folder",
    )
    add("--json", action="store_true", help="print one JSON object for each picture")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, or exits with 2 on bad input."""
    return run_command(make_parser(), run, argv)


# ---------------------------------------------------------------- what it does


def run(args: argparse.Namespace) -> int:
    """Answer for each picture; what is cheap to check is checked before the weights are read.

    Returns:
        0, or 1 where one of several pictures could not be read.
    """
    import_slowly("paligemma.inference")
    import torch
    from tqdm import tqdm

    from paligemma.inference import check_options, load, task_prompt
    from paligemma.support.picture_files import (
        list_pictures,
        plan_output,
        read_picture,
        save_picture,
    )

    options = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    options["max_new_tokens"] = args.max_tokens_to_generate
    check_options(**options)  # a temperature that is not used may still be a mistake
    if not args.do_sample:
        options["temperature"] = 0.0
    prompt = "caption en" if args.prompt is None else args.prompt
    if args.task != "answer":
        prompt = task_prompt(args.task, args.prompt or "")
    files, several = list_pictures(args.image_file_path)
    targets = plan_output(args.output, files, several)

    for_people = sys.stderr.isatty()  # a bar is not for log files
    pipeline, unread = None, 0
    bar = tqdm(files, desc="pictures", unit="", disable=not (several and for_people))
    for file, target in zip(bar, targets, strict=True):
        try:
            picture = read_picture(file)
        except ValueError as error:
            if not several:
                raise
            with tqdm.external_write_mode():
                say(f"paligemma: {error}")
            unread += 1
            continue
        try:
            if pipeline is None:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    pipeline = load(
                        args.model_path,
                        device="cpu" if args.only_cpu else "auto",
                        quantize=args.quantize,
                        adapter=args.adapter,
                        compile=args.compile,
                        progress=for_people,
                    )
                for warning in caught:
                    if warning.category is UserWarning:  # ours; others' go nowhere
                        say(f"paligemma: {warning.message}")
            draw = answer(pipeline, file, picture, args.task, prompt, options, args.json, several)
        except torch.OutOfMemoryError:
            raise Failure("the GPU's memory is full; try --only_cpu") from None
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):
                raise
            raise Failure("the memory is full; try fewer tokens, or --quantize int4") from None
        if target is not None:
            save_picture(draw(), target)
    return 1 if unread else 0


def answer(
    pipeline: "Pipeline",
    file: str,
    picture: "Image.Image",
    task: str,
    prompt: str,
    options: dict[str, Any],
    as_json: bool,
    several: bool,
) -> "Callable[[], Image.Image]":
    """Print what the model says of one picture; returns what draws it.

    One picture's answer streams. Each of several gets a line with its name in front, an object
    one with label, score, x0 y0 x1 y1 and, with a mask, its pixels; or all that as JSON.
    """
    from tqdm import tqdm

    streams = task == "answer" and not as_json and not several
    found: list[Any] = []
    text = ""
    if task == "answer":
        for piece in pipeline.stream(picture, prompt, **options):
            text += piece
            if streams:
                print(piece, end="", flush=True)
        record, lines = {"answer": text}, ["" if streams else " ".join(text.split("\n"))]
    else:
        found = (pipeline.detect if task == "detect" else pipeline.segment)(
            picture, prompt, **options
        )
        name = {"detect": "detections", "segment": "segments"}[task]
        record = {name: [as_dict(one) for one in found]}
        lines = [as_line(one) for one in found]
        if not found and not as_json:
            with tqdm.external_write_mode():
                say(f"{file}: nothing found" if several else "nothing found")
    if as_json:
        lines = [json.dumps({"image": file, "prompt": prompt, **record})]
    elif several:
        lines = [f"{file}\t{line}" for line in lines]
    with tqdm.external_write_mode():  # not through the bar
        for line in lines:
            print(line)
        sys.stdout.flush()

    def draw() -> "Image.Image":
        from paligemma.support.drawing import draw_boxes, draw_caption, draw_masks

        if task == "answer":
            return draw_caption(picture, text)
        labels = [one.label for one in found]
        masks = [one.mask for one in found] if task == "segment" else []
        drawn = draw_masks(picture, masks, labels) if masks else picture
        return draw_boxes(drawn, [one.box for one in found], labels, [one.score for one in found])

    return draw


def as_line(one: "Detection | Segment") -> str:
    """An object for people and for `cut -f`."""
    mask = getattr(one, "mask", None)
    box = " ".join(f"{value:.0f}" for value in one.box)
    return f"{one.label}\t{one.score:.2f}\t{box}" + ("" if mask is None else f"\t{mask.sum()}")


def as_dict(one: "Detection | Segment") -> dict[str, Any]:
    """An object for JSON; its mask as run lengths down the columns, zeros first, as COCO has it."""
    import numpy as np

    box = [round(value, 2) for value in one.box]
    result = {"label": one.label, "score": round(one.score, 4), "box": box}
    mask = getattr(one, "mask", None)
    if mask is not None:
        flat = np.concatenate(([False], mask.ravel(order="F")))
        ends = np.flatnonzero(np.diff(flat)).tolist()
        counts = np.diff([0, *ends, mask.size]).tolist()
        result["mask"] = {"size": list(mask.shape), "counts": counts}
    return result
