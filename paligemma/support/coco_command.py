"""The command `paligemma-coco`: COCO's annotations to JSON lines that `JsonlDataset` reads."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from paligemma.support.command import Parser, run_command
from paligemma.support.console import import_slowly, say

EXAMPLES = """examples:
  paligemma-coco data/train/annotations.json      boxes; the pictures lie beside the annotations
  paligemma-coco instances_train2017.json --pictures train2017/ --task segment \\
                 --model_path ~/paligemma-3b-pt-224
"""
EXIF_ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # values with which width and height change places


def make_parser() -> Parser:
    """The options of the command."""
    parser = Parser(
        prog="paligemma-coco",
        description="Write COCO's annotations as JSON lines to train on.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("annotations", metavar="ANNOTATIONS.json", type=Path)
    add("--pictures", metavar="DIR", type=Path, help="default: the folder of the annotations")
    add("--output", metavar="FILE", type=Path, help="default: ANNOTATIONS.jsonl")
    add("--task", choices=["detect", "segment"], default="detect", help="default: detect")
    add(
        "--names",
        choices=["all", "present"],
        default="all",
        help="what a prompt names: every kind of the annotations, so that the model learns to "
        "leave out what is absent, or those that are in the picture (default: all)",
    )
    add(
        "--model_path",
        metavar="DIR",
        help="for segment: the checkpoint whose mask codec is used (default: the shipped model)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, or exits with 2 on bad input."""
    return run_command(make_parser(), run, argv)


def run(args: argparse.Namespace) -> int:
    """Read, check and write; the file is written whole or not at all."""
    import_slowly("paligemma.inference")
    from tqdm import tqdm

    from paligemma.inference import TINY, find_codec
    from paligemma.support.coco import as_example, read_coco
    from paligemma.support.files import find_folder
    from paligemma.support.replacing import replacing

    output = args.output or args.annotations.with_suffix(".jsonl")
    if output.is_dir() or output.suffix != ".jsonl":
        raise ValueError(f"--output is {output}; expected a file *.jsonl")
    codec = None
    if args.task == "segment":
        checkpoint = find_folder(args.model_path or TINY)
        codec = find_codec(checkpoint)
        if codec is None or codec.encoder is None:
            what = "no mask codec" if codec is None else "a mask codec that only decodes"
            raise ValueError(f"{checkpoint} has {what}; put vae-oid.npz into its directory")
    names, pictures, left_out = read_coco(args.annotations)
    lines = []
    for picture in tqdm(pictures, desc="pictures", disable=None):
        path = (args.pictures or args.annotations.parent) / picture.file_name
        check_picture(path, picture.width, picture.height)
        here = {thing.name for thing in picture.things}
        asked = [name for name in names if args.names == "all" or name in here]
        if not asked:
            left_out["pictures without objects"] += 1
            continue
        try:
            prefix, suffix = as_example(picture, asked, codec)
        except ValueError as error:
            raise ValueError(f"{args.annotations}, {picture.file_name}: {error}") from None
        image = os.path.relpath(path, output.parent)
        lines.append(json.dumps({"image": image, "prefix": prefix, "suffix": suffix}))
    with replacing(output.parent) as draft:
        (draft / output.name).write_text("\n".join(lines) + "\n", "utf-8")
    print(f"{len(lines):,} examples in {output}")
    if left_out:
        say("left out: " + ", ".join(f"{count:,} {what}" for what, count in left_out.items()))
    return 0


def check_picture(path: Path, width: int, height: int) -> None:
    """There is such a picture, and it is as large as the annotations say.

    Raises:
        ValueError: it isn't.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                size, turn = image.size, image.getexif().get(EXIF_ORIENTATION)
    except Exception as error:  # readers of broken files raise nearly everything
        reason = "no such file" if isinstance(error, FileNotFoundError) else "not a picture"
        raise ValueError(f"picture {path}: {reason}") from None
    size = size[::-1] if turn in TURNED else size
    if size != (width, height):
        raise ValueError(
            f"picture {path} is {size[0]} × {size[1]} pixels, seen upright; the annotations say "
            f"{width} × {height}: do they belong together?"
        )


if __name__ == "__main__":
    sys.exit(main())
