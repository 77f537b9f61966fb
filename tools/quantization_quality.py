"""What few bits cost: answers of the tiny model at each precision, on the same test scenes.

For each task: how many answers are right, and how many are word for word those of bfloat16. (What
few bits gain in time and memory: tools/bench.py.)

    python tools/quantization_quality.py                    # the shipped model
    python tools/quantization_quality.py runs/out --scenes 1000
"""

import argparse
from pathlib import Path

import torch

from paligemma.checkpoint import load_model
from paligemma.processor import Processor
from paligemma.quantization import load_quantized
from paligemma.scenes import ASSETS
from paligemma.segmentation import MaskCodec
from paligemma.training import ROWS, answers, box_figures, mask_figures, row_questions

PRECISIONS = ("bfloat16", "float32", "int8", "int4", "int8 in float32", "int4 in float32")


def load(path: Path, precision: str, group_size: int | None):
    """A model at one of PRECISIONS."""
    mode, _, dtype = precision.partition(" in ")
    if not mode.startswith("int"):
        return load_model(path, dtype=getattr(torch, mode))
    return load_quantized(path, mode, group_size, dtype=getattr(torch, dtype or "bfloat16"))


def right(row: str, said: list, prompts: list, truths: list, made: list, path: Path) -> float:
    """The figure that a row is judged by, percent."""
    if row == "detect":
        return box_figures(said, truths)["f1"]
    if row == "segment":
        return mask_figures(said, prompts, made, MaskCodec.from_pretrained(path))["iou"]
    return 100 * sum(a == b for a, b in zip(said, truths)) / len(said)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, nargs="?", default=ASSETS / "tiny", help="checkpoint")
    parser.add_argument("--scenes", type=int, default=200, help="test scenes a task")
    parser.add_argument("--group_size", type=int, help="of int4")
    args = parser.parse_args()
    processor = Processor.from_pretrained(args.path)
    models = {name: load(args.path, name, args.group_size) for name in PRECISIONS}
    print("| task | " + " | ".join(PRECISIONS) + " |\n|---" + "|---:" * len(PRECISIONS) + "|")
    for row in ROWS:
        made, prompts, truths = row_questions(row, args.scenes)
        images, cells, base = [scene.image for scene in made], [], None
        for model in models.values():
            said = answers(model, processor, images, prompts)
            base = base or said
            equal = 100 * sum(a == b for a, b in zip(said, base)) / len(said)
            figure = right(row, said, prompts, truths, made, args.path)
            cells.append(f"{figure:.1f} % ({equal:.1f} %)")
        print(f"| {row} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{args.scenes} scenes a row; in brackets: word for word the answer of bfloat16.")


if __name__ == "__main__":
    main()
