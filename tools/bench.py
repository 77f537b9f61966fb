"""Time this package beside transformers: load, prefill, decode and peak memory, in one run.

Every measurement happens in a process of its own, all contenders in turn, on the same weights,
picture, prompt and threads; the medians are printed as a Markdown table. "ours" and "transformers"
compute in the same type; "int8" and "int4" are ours with quantised weights, quantised once before;
"compiled" is ours with a compiled decode step (lesson 23).
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "paligemma" / "assets" / "tiny"
CONTENDERS = ("ours", "compiled", "int8", "int4", "transformers")
TEXT_TOKENS = 8  # <bos>, six pieces, "\n"
LEAST_SECONDS = 0.5  # a short measurement is repeated until it has taken this long
ROWS = {  # key: (label, unit, digits, more is better)
    "import": ("import", "s", 2, False),
    "load": ("load", "s", 2, False),
    "first": ("load + first token", "s", 2, False),
    "prefill": ("prefill", "s", 3, False),
    "decode": ("decode", "tokens/s", 1, True),
    "memory": ("peak memory", "GB", 2, False),
}
HELP = """
import        PyTorch and the library, up to its model class
load          to a model that can be called; the weights are memory-mapped by both, so
load + first  the whole way to the first token of the first answer, which reads them all
prefill       picture and prompt to the first token, warm
decode        (seconds for 1 + TOKENS) - (seconds for 1), TOKENS divided by that; greedy, no eos
peak memory   of the process as the operating system counts it, libraries and mapped weights too

examples:
  python tools/bench.py                       # the tiny model that ships with the package
  python tools/random_checkpoint.py checkpoints/random-3b
  python tools/bench.py --model_path checkpoints/random-3b --rounds 3 --figure figures/bench.svg
"""


def peak_memory() -> int:
    """Most bytes of memory that this process ever had resident.

    Linux's `ru_maxrss` starts at the parent's size, so its own high-water mark is read there.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def model_without_memory(model_path: Path):
    """The model that the folder's config.json describes, on the meta device."""
    from paligemma.checkpoint import build_config, empty_model
    from paligemma.support.config import read_config

    return empty_model(build_config(read_config(model_path)))


def make_inputs(model_path: Path) -> dict:
    """The same random picture and prompt for everyone: N `<image>` tokens and 8 of text."""
    import torch

    config = model_without_memory(model_path).config
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(10, config.image_token_index, (TEXT_TOKENS - 1,), generator=generator)
    image = torch.full((config.vision_config.num_image_tokens,), config.image_token_index)
    ids = torch.cat((image, torch.tensor([config.bos_token_id]), words))[None]
    side = config.vision_config.image_size
    pixels = torch.rand(1, 3, side, side, generator=generator) * 2 - 1
    return {"input_ids": ids, "pixel_values": pixels}


def make_ours(model_path: Path, dtype: str | None, compiled: bool):
    """Import, then return the function that loads: () → (inputs, tokens) → new ids."""
    import torch

    from paligemma.checkpoint import load_model
    from paligemma.compilation import CompiledDecoder
    from paligemma.generation import generate
    from paligemma.support.quantized import load_quantized, read_quantization

    def load():
        if read_quantization(model_path):
            model = load_quantized(model_path)
        else:
            model = load_model(model_path, dtype=dtype and getattr(torch, dtype))

        decoder: Any = CompiledDecoder(model) if compiled else model

        def answer(inputs: dict, tokens: int) -> list[int]:
            return generate(decoder, **inputs, max_new_tokens=tokens, eos_token_id=-1)[0].tolist()

        return answer, str(model.dtype)

    return load


def make_transformers(model_path: Path, dtype: str | None, cache: str):
    """The same through `PaliGemmaForConditionalGeneration.generate`, its public way."""
    import torch
    from transformers import PaliGemmaForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()

    def load():
        model: Any = PaliGemmaForConditionalGeneration.from_pretrained(
            model_path, dtype=dtype or "auto", attn_implementation="sdpa"
        ).eval()
        model.generation_config.eos_token_id = None  # never stop early
        options = {"do_sample": False, "pad_token_id": 0, "cache_implementation": cache}

        @torch.inference_mode()
        def answer(inputs: dict, tokens: int) -> list[int]:
            ids = inputs["input_ids"]
            out = model.generate(
                **inputs,
                attention_mask=torch.ones_like(ids),
                token_type_ids=torch.zeros_like(ids),
                max_new_tokens=tokens,
                **options,
            )
            return out[0, ids.shape[1] :].tolist()

        return answer, str(model.dtype)

    return load


def timed(work) -> tuple[float, object]:
    """Median seconds of one call, repeated until `LEAST_SECONDS` have passed, and its result."""
    seconds = []
    while not seconds or sum(seconds) < LEAST_SECONDS:
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def measure(
    contender: str, model_path: Path, dtype: str | None, cache: str, threads: int, tokens: int
) -> dict:
    """What one process measures; it prints this as JSON."""
    start = time.perf_counter()
    import torch

    if threads:
        torch.set_num_threads(threads)
    if contender == "transformers":
        load = make_transformers(model_path, dtype, cache)
    else:
        load = make_ours(model_path, dtype, contender == "compiled")
    imported = time.perf_counter() - start
    inputs = make_inputs(model_path)
    libraries = peak_memory()
    start = time.perf_counter()
    answer, found = load()
    loaded = time.perf_counter() - start
    answer(inputs, 1)
    first = time.perf_counter() - start
    start = time.perf_counter()
    answer(inputs, 3)  # the decode step's own first run is not timed
    warm = time.perf_counter() - start
    prefill, _ = timed(lambda: answer(inputs, 1))
    whole, ids = timed(lambda: answer(inputs, 1 + tokens))
    return {
        "import": imported,
        "load": loaded,
        "first": first,
        "prefill": prefill,
        "decode": tokens / (whole - prefill),
        "warm": warm,
        "memory": peak_memory() / 1e9,
        "libraries": libraries / 1e9,
        "ids": ids,
        "prompt": inputs["input_ids"].shape[1],
        "dtype": found.removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def product_shapes(model_path: Path) -> Counter:
    """The matrix products of a prefill, attention's apart: {(rows, D, E): how many}."""
    import torch

    model = model_without_memory(model_path)
    patches = model.config.vision_config.num_image_tokens
    shapes = Counter()
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            rows = patches + TEXT_TOKENS * name.startswith("language_model")
            shapes[rows, layer.in_features, layer.out_features] += 1
    return shapes


def products(model_path: Path, dtype: str | None, threads: int) -> dict:
    """Seconds of the prefill's matrix products alone: nobody who makes them all can be faster."""
    import torch

    from paligemma.checkpoint import load_model

    if threads:
        torch.set_num_threads(threads)
    shapes, total, flops = product_shapes(model_path), 0.0, 0
    found = load_model(model_path, dtype=dtype and getattr(torch, dtype)).dtype
    with torch.inference_mode():
        for (rows, width, out), times in shapes.items():
            x = torch.randn(rows, width, dtype=found)
            weight = torch.randn(out, width, dtype=found)
            multiply = partial(torch.nn.functional.linear, x, weight)
            multiply()
            total += times * timed(multiply)[0]
            flops += times * 2 * rows * width * out
    return {"seconds": total, "flops": flops}


def quantize(model_path: Path, mode: str, folder: Path) -> float:
    """Write the quantised weights to a folder; seconds that it took."""
    from paligemma.support.quantized import load_quantized, save_quantized

    start = time.perf_counter()
    save_quantized(load_quantized(model_path, mode), folder)
    return time.perf_counter() - start


def start(contender: str, cache: str, args: argparse.Namespace) -> dict:
    """Run `measure` in a new process and read its answer."""
    command = [sys.executable, __file__, "--worker", contender, "--cache", cache]
    path = args.quantized.get(contender, args.model_path)
    command += ["--model_path", str(path), "--tokens", str(args.tokens)]
    command += ["--threads", str(args.threads)] + (["--dtype", args.dtype] if args.dtype else [])
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise SystemExit(f"measuring {contender} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def bench(args: argparse.Namespace) -> dict:
    """Warm up once, choose transformers' faster cache, then measure in turn."""

    def note(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    seconds = {}
    for mode, folder in args.quantized.items():
        seconds[mode] = quantize(args.model_path, mode, folder)
        note(f"{mode}: quantised and saved in {seconds[mode]:.0f} s")
    note("warming up (not counted): ours, transformers with each of its caches")
    start("ours", "dynamic", args)
    caches = {name: start("transformers", name, args)["decode"] for name in ("dynamic", "static")}
    cache = max(caches, key=lambda name: caches[name])
    contenders = ["ours", *["compiled"] * args.compile, *args.quantized, "transformers"]
    rounds, bound = {name: [] for name in contenders}, []
    for i in range(args.rounds):
        order = contenders if i % 2 == 0 else contenders[::-1]  # A B, B A, A B, …
        for name in order:
            rounds[name].append(start(name, cache, args))
            note(f"round {i + 1} of {args.rounds}: {name} {describe(rounds[name][-1])}")
        bound.append(start("products", cache, args))
        note(f"round {i + 1} of {args.rounds}: products {bound[-1]['seconds']:.3f} s")
    sample = rounds["ours"][0]
    model = model_without_memory(args.model_path)
    return {
        "model": args.label or args.model_path.name,
        "weights": sum(weight.numel() for weight in model.parameters()),
        "prompt": sample["prompt"],
        "tokens": args.tokens,
        "dtype": sample["dtype"],
        "threads": sample["threads"],
        "cores": os.cpu_count(),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        },
        "cache": cache,
        "cache_tokens_per_second": caches,
        "quantize_seconds": seconds,
        "products": bound,
        "rounds": rounds,
        "median": {
            name: {key: statistics.median(run[key] for run in runs) for key in ROWS}
            for name, runs in rounds.items()
        },
        "agreement": agreement(rounds["ours"][0]["ids"], rounds["transformers"][0]["ids"]),
    }


def describe(run: dict) -> str:
    return ", ".join(f"{label} {run[key]:.{n}f} {u}" for key, (label, u, n, _) in ROWS.items())


def machine() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def agreement(ours: list[int], theirs: list[int]) -> dict:
    """How many greedy tokens, from the first on, are the same."""
    same = 0
    while same < min(len(ours), len(theirs)) and ours[same] == theirs[same]:
        same += 1
    return {"leading": same, "of": len(theirs), "distinct": len(set(theirs))}


def ratio(result: dict, key: str, name: str = "ours") -> float:
    """How many times better a contender is than transformers: above 1 it is faster or smaller."""
    ours, theirs = (result["median"][n][key] for n in (name, "transformers"))
    return ours / theirs if ROWS[key][3] else theirs / ours


def spread(result: dict, key: str) -> str:
    """Lowest and highest round of each contender."""
    _, unit, digits, _ = ROWS[key]
    runs = {name: [run[key] for run in rounds] for name, rounds in result["rounds"].items()}
    ends = (f"{name} {min(x):.{digits}f}–{max(x):.{digits}f}" for name, x in runs.items())
    return f"{', '.join(ends)} {unit}"


def markdown(result: dict) -> str:
    """The table, and below it everything needed to read and repeat it."""
    others = [name for name in result["median"] if name != "transformers"]
    titles = [name if name == "ours" else f"ours, {name}" for name in others]
    lines = [
        f"| | transformers | {' | '.join(titles)} |",
        "|---|---:" + "|---:" * len(others) + "|",
    ]
    for key, (label, unit, digits, _) in ROWS.items():
        cells = [f"{result['median']['transformers'][key]:.{digits}f} {unit}"]
        for name in others:
            value = f"{result['median'][name][key]:.{digits}f} {unit}"
            cells.append(f"{value} ({ratio(result, key, name):.2f} ×)")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    compiling = [run["warm"] for run in result["rounds"].get("compiled", [])]
    once = ", ".join(f"{t:.0f} s ({mode})" for mode, t in result["quantize_seconds"].items())
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    seconds = statistics.median(run["seconds"] for run in result["products"])
    ours, theirs = (
        f"{100 * seconds / result['median'][name]['prefill']:.0f} %"
        for name in ("ours", "transformers")
    )
    rate = result["products"][0]["flops"] / seconds / 1e9
    same = result["agreement"]
    equal = f"all {same['of']} greedy tokens are equal"
    if same["leading"] < same["of"]:
        equal = f"the first {same['leading']} of {same['of']} greedy tokens are equal"
        if result["dtype"] != "float32":
            equal += f" ({result['dtype']} rounds differently in the two)"
    return "\n".join(
        [
            *lines,
            "",
            "In brackets: how many times better than transformers. "
            + (f"Quantising and saving once took {once}. " if once else "")
            + (f"Compiling took {max(compiling):.0f} s at most. " if compiling else "")
            + f"{result['model']}: {result['weights']:,} weights in {result['dtype']}; "
            f"{result['prompt']} tokens in ({result['prompt'] - TEXT_TOKENS} of them the "
            f"picture), {result['tokens']} decoded one by one; "
            f"{equal}, {same['distinct']} of them distinct.",
            f"The matrix products of the prefill alone take {seconds:.3f} s, measured in each "
            f"round ({rate:.0f} GFLOP/s): {ours} of our prefill, {theirs} of transformers'.",
            f"Median of {len(result['rounds']['ours'])} rounds, each in a new process, in turn "
            f"(decode from the slowest to the fastest: {spread(result, 'decode')}); "
            f"{result['threads']} threads on {result['machine']} ({result['cores']} cores); "
            f"{versions}; transformers with sdpa and its {result['cache']} cache, the faster one "
            "here. Files in the page cache; memory is the process's peak as the system counts it, "
            "mapped weights included.",
        ]
    )


def draw(result: dict, file: Path) -> None:
    """Bars of the medians with a dot for each round, one panel a row of the table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from paligemma.support.course import set_style
    from paligemma.support.drawing import COLOURS

    set_style()
    names = list(result["median"])
    size = (11.4, 1.1 + 0.4 * len(names))
    figure, panels = plt.subplots(1, len(ROWS), figsize=size, layout="constrained")
    colours = [COLOURS["muted" if name == "transformers" else "together"] for name in names]
    for ax, (key, (label, unit, digits, more)) in zip(panels, ROWS.items()):
        medians = [result["median"][name][key] for name in names]
        ax.barh(names, medians, color=colours, height=0.62)
        for y, name in enumerate(names):
            values = [run[key] for run in result["rounds"][name]]
            ax.plot(values, [y] * len(values), ".", color=COLOURS["ink"], markersize=3.5)
            ax.annotate(
                f"{medians[y]:.{digits}f}",
                (max(values), y),
                (5, 0),
                textcoords="offset points",
                va="center",
            )
        largest = max(run[key] for runs in result["rounds"].values() for run in runs)
        ax.set(xlim=(0, 1.45 * largest), title=f"{label}, {unit}", xticks=[])
        ax.set_xlabel("more is better" if more else "less is better", color=COLOURS["muted"])
        ax.invert_yaxis()
        ax.tick_params(left=False, labelleft=ax is panels[0])
        ax.spines["bottom"].set_visible(False)
    figure.suptitle(
        f"{result['model']}: {result['weights'] / 1e6:,.1f} million weights, {result['dtype']}, "
        f"{result['threads']} threads; bars are medians of {len(result['rounds']['ours'])} rounds",
        fontsize=9,
        color=COLOURS["ink"],
        x=0.01,
        ha="left",
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if file.suffix == ".svg" else None
    figure.savefig(file, metadata=metadata, dpi=160)
    plt.close(figure)


def whole_number(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model_path",
        type=Path,
        help="checkpoint directory; default: the shipped tiny model, or random tiny weights",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: bench_gpu.py"
    )
    parser.add_argument("--label", help="the model's name in table and figure")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="or as stored")
    parser.add_argument("--rounds", type=whole_number, default=5, help="default: %(default)s")
    parser.add_argument("--tokens", type=whole_number, default=32, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=0, help="default: PyTorch's own choice")
    modes = {"nargs": "*", "choices": ("int8", "int4"), "default": ["int8", "int4"]}
    parser.add_argument("--quantize", **modes, help="besides; default: both")
    parser.add_argument("--compile", action="store_true", help="ours with a compiled step, besides")
    parser.add_argument(
        "--peers", action="store_true", help="the language model beside llama.cpp …: bench_peers.py"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement here")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw here, .svg or .png")
    parser.add_argument("--worker", choices=(*CONTENDERS, "products"), help=argparse.SUPPRESS)
    parser.add_argument("--cache", default="dynamic", help=argparse.SUPPRESS)
    args, others = parser.parse_known_args(arguments)
    if args.device == "cuda":
        from bench_gpu import main as on_a_gpu

        return on_a_gpu(others + (["--json", str(args.json)] if args.json else []))
    if others:
        parser.error(f"unknown arguments: {' '.join(others)}")
    if args.worker == "products":
        print(json.dumps(products(args.model_path, args.dtype, args.threads)))
        return
    if args.worker:
        found = measure(
            args.worker, args.model_path, args.dtype, args.cache, args.threads, args.tokens
        )
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.model_path is None:
            args.model_path, args.label = SHIPPED, args.label or "tiny (shipped)"
            if not (SHIPPED / "config.json").is_file():
                from random_checkpoint import SIZES, write_checkpoint

                args.model_path, args.label = Path(folder), "tiny (random)"
                write_checkpoint(args.model_path, SIZES["tiny"])
        elif not (args.model_path / "config.json").is_file():
            parser.error(f"no config.json in {args.model_path}; give a checkpoint's directory")
        if args.peers:
            from bench_peers import main as beside_peers

            return beside_peers(args, machine())
        args.quantized = {mode: Path(folder) / mode for mode in args.quantize}
        result = bench(args)
    print(markdown(result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.figure:
        draw(result, args.figure)


if __name__ == "__main__":
    main()
