"""What few bits cost: answers of a model at each precision, on the same test scenes.

For each task: how many answers are right, and how many are word for word those of bfloat16. (What
few bits gain in time and memory: tools/bench.py.)

    python tools/quantization_quality.py                    # the shipped model
    python tools/quantization_quality.py runs/out --scenes 1000
"""

import argparse
from pathlib import Path

import torch

from paligemma.evaluation import (
    ROWS,
    box_metrics,
    exact_match,
    mask_metrics,
    predict,
    row_questions,
)
from paligemma.inference import Pipeline, load
from paligemma.quantization import quantize_model
from paligemma.scenes import ASSETS
from paligemma.support.arguments import GROUP_SIZES

PRECISIONS = ("bfloat16", "float32", "int8", "int4", "int8 in float32", "int4 in float32")


def open_at(path: Path, precision: str, group_size: int) -> Pipeline:
    """A model at one of PRECISIONS."""
    mode, _, dtype = precision.partition(" in ")
    bits = mode.startswith("int")
    pipeline = load(path, dtype=dtype or ("bfloat16" if bits else mode))
    if bits:
        quantize_model(pipeline.model, mode, group_size)
    return pipeline


def score(row: str, said: list, prompts: list, truths: list, asked: list, codec) -> float:
    """The figure that a row is judged by, percent."""
    if row == "detect":
        return box_metrics(said, truths)["f1"]
    if row == "segment":
        return mask_metrics(said, prompts, asked, codec)["iou"]
    return exact_match(said, truths)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, nargs="?", default=ASSETS / "tiny", help="checkpoint")
    parser.add_argument("--scenes", type=int, default=200, help="test scenes a task")
    parser.add_argument("--group_size", type=int, default=64, choices=GROUP_SIZES, help="of int4")
    args = parser.parse_args()
    pipelines = {name: open_at(args.path, name, args.group_size) for name in PRECISIONS}
    print("| task | " + " | ".join(PRECISIONS) + " |\n|---" + "|---:" * len(PRECISIONS) + "|")
    with torch.inference_mode():
        for row in ROWS:
            asked, prompts, truths = row_questions(row, args.scenes)
            images, cells, base = [scene.image for scene in asked], [], None
            for pipeline in pipelines.values():
                said = predict(pipeline, images, prompts)
                base = base or said
                figure = score(row, said, prompts, truths, asked, pipeline.codec)
                cells.append(f"{figure:.1f} % ({exact_match(said, base):.1f} %)")
            print(f"| {row} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{args.scenes} scenes a row; in brackets: word for word the answer of bfloat16.")


if __name__ == "__main__":
    main()
