"""What few bits cost and gain: answers of the tiny model, and speed and memory at full size.

    python tools/bench_quantization.py quality                     the shipped tiny model
    python tools/bench_quantization.py speed checkpoints/random-3b --save DIR

`quality` asks the same test scenes at each precision: how many answers are right, and how many
are word for word those of bfloat16. `speed` measures each precision in a process of its own; with
`--save` the quantised weights are kept in DIR and their second start is measured too.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from bench import make_inputs, peak_memory

from paligemma.checkpoint import load_model
from paligemma.generation import generate_steps
from paligemma.processor import Processor
from paligemma.quantization import load_quantized, read_quantization, save_quantized

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "paligemma" / "assets" / "tiny"
PRECISIONS = ("bfloat16", "int8", "int4")


def load(path: Path, precision: str, dtype: torch.dtype | None = None, group=None):
    """A model at one precision; its other tensors as stored, or in `dtype`."""
    if precision in ("bfloat16", "float32"):
        return load_model(path, dtype=getattr(torch, precision))
    return load_quantized(path, precision, group, dtype=dtype)


def quality(args: argparse.Namespace) -> None:
    """A table: rows are tasks, columns precisions; right answers, and those equal to bfloat16's."""
    from paligemma.training import ROWS, answers, box_figures, row_questions

    processor = Processor.from_pretrained(args.path)
    names = ["bfloat16", "float32", "int8", "int4", "int8 in float32", "int4 in float32"]
    print("| task | scenes | " + " | ".join(names) + " |")
    print("|---|---:|" + "---:|" * len(names))
    totals = dict.fromkeys(names, 0)
    rows = [row for row in ROWS if row != "segment"]
    for row in rows:
        made, prompts, truths = row_questions(row, args.scenes)
        images, cells, base = [scene.image for scene in made], [], None
        for name in names:
            dtype = torch.float32 if "float32" in name else torch.bfloat16
            model = load(args.path, name.split()[0], dtype, args.group_size)
            said = answers(model, processor, images, prompts)
            base = base or said
            equal = sum(a == b for a, b in zip(said, base))
            totals[name] += equal
            if row == "detect":
                right = next(iter(box_figures(said, truths).values()))
            else:
                right = 100 * sum(a == b for a, b in zip(said, truths)) / len(said)
            cells.append(f"{right:.1f} % ({100 * equal / len(said):.1f} %)")
        print(f"| {row} | {len(made)} | " + " | ".join(cells) + " |", flush=True)
    shares = [f"{100 * totals[name] / args.scenes / len(rows):.1f} %" for name in names]
    print("| equal to bfloat16's | | " + " | ".join(shares) + " |")


def worker(args: argparse.Namespace) -> None:
    """One process of `speed`; prints JSON."""
    libraries, start = peak_memory(), time.perf_counter()
    model = load(args.path, args.precision, None, args.group_size)
    loaded, after_load = time.perf_counter() - start, peak_memory()
    inputs = make_inputs(args.path)

    ticks = [(time.perf_counter(), time.process_time())]
    for _ in generate_steps(model, **inputs, max_new_tokens=args.tokens + 2, eos_token_id=-1):
        ticks.append((time.perf_counter(), time.process_time()))
    spent = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(ticks)]
    decode, processor = map(statistics.median, zip(*spent[2:]))  # the first step warms up
    peak = peak_memory()
    if args.save and read_quantization(args.path) is None:
        save_quantized(model, args.save)
    found = {"load": loaded, "prefill": spent[0][0], "decode": 1 / decode, "processor": processor}
    found |= {"load peak": after_load / 1e9}
    print(json.dumps(found | {"peak": peak / 1e9, "libraries": libraries / 1e9}))


def speed(args: argparse.Namespace) -> None:
    """A table: load, prefill, decode and peak memory at each precision."""
    columns = "load s | prefill s | decode tokens/s | processor s a token | peak GB after load"
    print(f"| | {columns} | peak GB | of libraries |\n|---|" + "---:|" * 7, flush=True)
    for precision in PRECISIONS:
        starts = [(precision, args.path, args.save and args.save / precision)]
        if args.save and precision != "bfloat16":
            starts.append((f"{precision}, second start", args.save / precision, None))
        for label, path, save in starts:
            if label == precision and save and (save / "config.json").is_file():
                continue
            command = [sys.executable, __file__, "worker", str(path), "--precision", precision]
            command += ["--tokens", str(args.tokens)]
            command += ["--save", str(save)] if save and precision != "bfloat16" else []
            group = args.group_size if path == args.path else None
            command += ["--group_size", str(group)] if group else []
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                raise SystemExit(f"{label} failed:\n{run.stderr}")
            f = json.loads(run.stdout.splitlines()[-1])
            cells = [
                f"{f['load']:.2f}",
                f"{f['prefill']:.2f}",
                f"{f['decode']:.1f}",
                f"{f['processor']:.3f}",
            ]
            cells += [f"{f[name]:.2f}" for name in ("load peak", "peak", "libraries")]
            print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["quality", "speed", "worker"])
    parser.add_argument("path", type=Path, nargs="?", default=TINY, help="checkpoint directory")
    parser.add_argument("--scenes", type=int, default=200, help="test scenes a task")
    parser.add_argument("--tokens", type=int, default=32, help="decoded, for speed")
    parser.add_argument("--group_size", type=int, help="of int4")
    parser.add_argument("--save", type=Path, help="keep the quantised weights here")
    parser.add_argument("--precision", default="int8", help=argparse.SUPPRESS)
    args = parser.parse_args()
    {"quality": quality, "speed": speed, "worker": worker}[args.what](args)


if __name__ == "__main__":
    main()
