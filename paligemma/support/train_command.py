"""The command `paligemma-train`: a model learns from one's own pictures, prompts and answers.

It is tested before and after, on pictures that it doesn't learn from. Ctrl-C saves and stops (exit
code 130), and the same command goes on; other exit codes as in `command.py`.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paligemma.support.command import FLAG, Failure, Parser, run_command
from paligemma.support.console import import_slowly, say

if TYPE_CHECKING:
    from paligemma.inference import Pipeline

EXAMPLES = """examples:
  paligemma-train --data mine/ --lora 16 --learning_rate 2e-3 --output runs/mine
  paligemma-train --model_path ~/paligemma-3b-pt-224 --data mine/ --lora 16 --output runs/mine \\
                  --batch_size 16 --accumulate 4 --checkpointing        to save memory on a GPU
  torchrun --nproc-per-node 4 -m paligemma.support.train_command --data mine/ --full \\
                  --output runs/four                        one process for each of 4 GPUs
  paligemma --image_file_path photo.jpg --adapter runs/mine             ask what came out
"""
RECORD = "training.json"  # in the output: of what it was made, losses, what the tests found


# ---------------------------------------------------------------- arguments


def between(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """For argparse: a number of this kind and range."""

    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r:.60} is not {name} from {low:g} to {high:g}")
        return value

    return read


def make_parser() -> Parser:
    """The options of the command."""
    parser = Parser(
        prog="paligemma-train",
        description="Train a model on your own pictures.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, one_of = parser.add_argument, parser.add_mutually_exclusive_group
    count, share = between(int, 1, 1e9), between(float, 0, 1)
    add("--data", metavar="PATH", required=True, help="*.jsonl, or the folder in which it lies")
    add("--output", metavar="DIR", type=Path, required=True, help="new, or that of the same run")
    add("--model_path", metavar="DIR", help="checkpoint directory or hub name (default: shipped)")
    recipe = one_of(required=True).add_argument
    recipe("--lora", metavar="RANK", type=count, help="adapters beside the model learn")
    recipe("--full", action="store_true", help="all weights learn, as in the paper")
    recipe("--freeze_tower", action="store_true", help="only the language model learns")
    recipe("--attention_only", action="store_true", help="only the language model's attention")
    add("--lora_alpha", metavar="A", type=between(float, 1e-3, 1e6), help="default: 2 × rank")
    add("--lora_dropout", metavar="P", type=between(float, 0, 0.99), default=0, help="default: 0")
    targets = ["language_model.*_proj"]
    add("--lora_targets", metavar="NAME", nargs="+", default=targets, help=f"default: {targets[0]}")
    length = one_of().add_argument
    length("--epochs", metavar="N", type=between(float, 0, 1e6), default=10, help="default: 10")
    length("--steps", metavar="N", type=count, help="of the optimizer, in place of epochs")
    add("--batch_size", metavar="N", type=count, default=8, help="examples a step (default: 8)")
    add("--accumulate", metavar="N", type=count, default=1, help="parts of it, to save memory")
    add("--checkpointing", **FLAG, help="compute activations twice, to save memory")
    rate = between(float, 0, 10)
    add("--learning_rate", metavar="R", type=rate, help="default: 2e-4 with --lora, else 1e-5")
    add("--warmup_steps", metavar="N", type=between(int, 0, 1e9), help="default: 5 %% of all")
    add("--weight_decay", metavar="W", type=rate, default=0, help="default: 0")
    add("--seed", metavar="N", type=between(int, 0, 2**32), default=0, help="default: 0")
    add("--device", metavar="NAME", default="auto", help="cpu, cuda, cuda:1 (default: auto)")
    add(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of products and of what doesn't learn; what learns is float32 "
        "(default: bfloat16 on a GPU, float32 elsewhere)",
    )
    add("--prefix", metavar="TEXT", help="the prompt of lines that have none")
    add(
        "--held_out",
        metavar="SHARE",
        type=share,
        help="of the pictures, for the test (default: the file with 'val' in its name, else 0.1)",
    )
    add("--answers", metavar="N", type=count, default=50, help="a test compares (default: 50)")
    add("--save_every", metavar="N", type=count, default=200, help="steps (default: 200)")
    add("--workers", metavar="N", type=between(int, 0, 64), default=2, help="default: 2 processes")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, or exits with 2 on bad input."""
    return run_command(make_parser(), run, argv)


# ---------------------------------------------------------------- what it does


def run(args: argparse.Namespace) -> int:
    """Train, alone or in the processes that `torchrun` started."""
    import_slowly("paligemma.support.fine_tuning")
    from paligemma.distributed import processes

    with processes():
        return train_between_tests(args)


def train_between_tests(args: argparse.Namespace) -> int:
    """What is cheap to check is checked before the weights are read; process 0 tests and saves."""
    import torch

    from paligemma import distributed, training
    from paligemma.inference import load
    from paligemma.lora import save_adapter, trainable_parameters
    from paligemma.support.config import parse_device
    from paligemma.support.examples import check_texts
    from paligemma.support.fine_tuning import computing_in, keep_frozen_in, recomputing
    from paligemma.support.processes import process_count, process_number, wait_for_all
    from paligemma.support.replacing import replacing

    first, train = process_number() == 0, training.train
    if process_count() > 1 or (args.output / "run.json").is_file():  # a run of several processes
        train = partial(distributed.train, sharded=False)
    device = parse_device(args.device)
    if args.dtype is None:
        args.dtype = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, args.dtype)
    learnt, tested = examples(args)
    made_of = summary(args, learnt)
    config = training.TrainingConfig(**settings(args, len(learnt)))
    check_output(args.output, made_of)
    wait_for_all()  # before process 0 writes there

    with_adapters = args.lora is not None
    pipeline = load(args.model_path, device, dtype if with_adapters else torch.float32)
    model = pipeline.model
    if model.language_model.head is not None:
        raise ValueError(f"{args.model_path} is quantised; give the original weights")
    check_texts(learnt + tested, pipeline.processor)
    try:
        before = test(pipeline, tested, args) if first else {}
        choose(model, args)
        keep_frozen_in(model, dtype)
        learning, total = trainable_parameters(model)
        if first:
            what = f"{len(learnt):,} examples, {learning:,} of {total:,} parameters learn"
            print(what, flush=True)
            with replacing(args.output) as draft:
                record(draft, made_of, before=before)
        with computing_in(model, dtype), recomputing(model, args.checkpointing):
            losses = train(model, learnt, config, pipeline.processor)
        if not first:
            return 0
        if len(losses) < config.steps:
            say(f"stopped after step {len(losses)} of {config.steps}; the same command goes on")
            return 130
        if not with_adapters:
            model.to(dtype)
        after = test(pipeline, tested, args)
    except torch.OutOfMemoryError:
        advice = "try --lora, --checkpointing, a larger --accumulate"
        raise Failure(f"the GPU's memory is full; {advice}") from None
    with replacing(args.output) as draft:
        save_adapter(model, draft) if with_adapters else pipeline.save(draft)
        record(draft, made_of, before=before, after=after, losses=losses)
    print(f"{args.output} holds the {'adapter' if with_adapters else 'model'}")
    return 0


def examples(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Those to learn from and those for the test (none with a share of 0)."""
    from paligemma.support.examples import find_examples, find_held_out, hold_out, read_examples

    file = find_examples(args.data)
    learnt, other = read_examples(file, args.prefix), find_held_out(file)
    if args.held_out == 0:
        tested = []
    elif args.held_out is None and other is not None:
        tested = read_examples(other, args.prefix)
    else:
        learnt, tested = hold_out(learnt, args.held_out or 0.1, args.seed)
    if args.batch_size > len(learnt):
        raise ValueError(f"--batch_size is {args.batch_size}; there are {len(learnt)} examples")
    return learnt, tested


def settings(args: argparse.Namespace, examples: int) -> dict:
    """What `TrainingConfig` takes."""
    steps = args.steps or max(1, math.ceil(args.epochs * examples / args.batch_size))
    rate = (
        (1e-5 if args.lora is None else 2e-4) if args.learning_rate is None else args.learning_rate
    )
    warmup = math.ceil(steps / 20) if args.warmup_steps is None else args.warmup_steps
    same = "batch_size accumulate weight_decay seed save_every workers".split()
    found = {name: getattr(args, name) for name in same}
    found |= {"steps": steps, "learning_rate": rate, "warmup_steps": warmup}
    return found | {"folder": args.output, "save": False}


def summary(args: argparse.Namespace, learnt: list[dict]) -> dict:
    """What a run depends on besides `TrainingConfig`: it may not differ when the run goes on."""
    texts = json.dumps([[Path(x["image"]).name, x["prefix"], x["suffix"]] for x in learnt])
    same = "model_path full freeze_tower attention_only lora lora_alpha lora_dropout lora_targets"
    found = {name: getattr(args, name) for name in [*same.split(), "dtype"]}
    return found | {"data": hashlib.sha256(texts.encode()).hexdigest()[:16]}


def check_output(folder: Path, made_of: dict) -> None:
    """The output is new, empty or of the same run.

    Raises:
        ValueError: it isn't.
    """
    from paligemma.support.files import read_json
    from paligemma.support.replacing import settled
    from paligemma.support.runs import check_same

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file; expected a directory")
    file = settled(folder) / RECORD
    if file.is_file():
        made_before = read_json(file, dict).get("made_of")
        check_same(file, made_before if isinstance(made_before, dict) else {}, made_of)
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"--output {folder} holds other files; give a new directory")


def choose(model: Any, args: argparse.Namespace) -> None:
    """What learns: adapters, or some of the weights."""
    import torch

    from paligemma.lora import add_lora
    from paligemma.support.fine_tuning import RECIPES, choose_parameters

    torch.manual_seed(args.seed)  # adapters begin at random
    if args.lora is None:
        choose_parameters(model, next(name for name in RECIPES if getattr(args, name)))
    else:
        alpha = args.lora_alpha or 2 * args.lora
        add_lora(model, args.lora, alpha, args.lora_targets, args.lora_dropout)


def test(pipeline: "Pipeline", items: list[dict], args: argparse.Namespace) -> dict:
    """Loss and right answers on examples for the test, printed; nothing without any."""
    from paligemma.evaluation import exact_match
    from paligemma.support.fine_tuning import greedy_answers, held_out_loss

    if not items:
        return {}
    size = math.ceil(args.batch_size / args.accumulate)
    loss = held_out_loss(pipeline.model, pipeline.processor, items, size)
    asked = items[: args.answers]
    answers = greedy_answers(pipeline, asked, size)
    right = exact_match(answers, [item["suffix"] for item in asked])
    print(f"held out: loss {loss:.3f}, {right:.0f} % of {len(asked)} answers right", flush=True)
    return {"examples": len(items), "loss": loss, "answers": len(asked), "right, %": right}


def record(folder: Path, made_of: dict, **found: Any) -> None:
    """Write `training.json`."""
    text = json.dumps({"made_of": made_of, **found}, indent=1)
    (folder / RECORD).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
