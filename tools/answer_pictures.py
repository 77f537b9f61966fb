"""Answer a prompt about a million pictures, on this machine or on a Ray cluster, each once.

    pip install -e ".[distributed]"
    python tools/answer_pictures.py holidays/ --prompt "caption en" --output answers/

Answers are lines of JSON in files part-00000.jsonl …: image, prompt, and answer (or detections, or
segments, as `paligemma --json` prints them). A picture that cannot be answered has a line with
"error". Files appear whole. The same command again goes on where the last one was stopped and
leaves out what has a line. A node that dies costs time, and no answer.

On a cluster, with pictures and model in folders that every node sees under the same name:

    ray start --head                     on one node; it also writes the answers
    ray start --address=HEAD:6379        on each of the others; the package is installed on all
    python tools/answer_pictures.py /shared/pictures --model_path /shared/paligemma-3b-mix-224 \\
        --output answers/ --address auto
"""

import argparse
import itertools
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from paligemma.inference import load, task_prompt
from paligemma.support.command import Failure, Parser, run_command, say
from paligemma.support.command_line import as_dict
from paligemma.support.files import shorten
from paligemma.support.picture_files import PICTURES
from paligemma.support.pictures import open_picture
from paligemma.support.replacing import replacing, settled

FOUND = {"detect": "detections", "segment": "segments"}


class Answerer:
    """One copy of the model in a process of its own: paths in, lines of JSON out."""

    def __init__(self, prompt: str, task: str, options: dict, **loading):
        self.prompt, self.task, self.options = prompt, task, options
        self.pipeline = load(**loading)

    def __call__(self, batch: dict) -> dict:
        return {"line": [json.dumps(record) for record in self.answer(list(batch["image"]))]}

    def answer(self, paths: list[str]) -> list[dict]:
        """Answer all at once; where that fails, by halves, until what is at fault stands alone."""
        try:
            found = self.ask([open_picture(path) for path in paths])
        except (ValueError, torch.OutOfMemoryError) as error:
            if half := len(paths) // 2:
                return self.answer(paths[:half]) + self.answer(paths[half:])
            found = [{"error": str(error)}]
        return [{"image": path, "prompt": self.prompt} | one for path, one in zip(paths, found)]

    def ask(self, pictures: list) -> list[dict]:
        if self.task == "answer":
            texts = self.pipeline.batch(pictures, self.prompt, **self.options)
            return [{"answer": text} for text in texts]
        find = getattr(self.pipeline, self.task)
        found = (find(picture, self.prompt, **self.options) for picture in pictures)
        return [{FOUND[self.task]: [as_dict(one) for one in each]} for each in found]


def ask_cluster(paths: list[str], prompt: str, args: argparse.Namespace) -> Iterator[str]:
    """A line for each picture, as they come, from one process on every GPU, or every core."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # tells nobody anything
    try:
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError('there is no Ray here; pip install -e ".[distributed]"') from None
    dashboard = False if args.address == "local" else None  # a cluster's own is not ours
    quiet: Any = {"log_to_driver": False, "logging_level": logging.ERROR}
    ray.init(args.address, include_dashboard=dashboard, **quiet)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    gpus, cores = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
    one: Any = {"num_gpus": 1} if gpus else {"num_cpus": 1}
    loading = {"path": args.model_path, "device": "cuda" if gpus else "cpu"}
    blocks = min(1000, -(-len(paths) // args.batch_size))  # one is asked again if its node dies
    try:
        data = ray.data.from_items([{"image": path} for path in paths], override_num_blocks=blocks)
        answers = data.map_batches(
            Answerer,
            fn_constructor_args=(prompt, args.task, {"max_new_tokens": args.max_tokens}),
            fn_constructor_kwargs=loading,
            batch_size=args.batch_size,
            compute=ray.data.ActorPoolStrategy(size=min(blocks, gpus or max(1, cores))),
            **one,
        )
        yield from (row["line"] for row in answers.iter_rows())
    except ray.exceptions.RayError as error:  # pyright: ignore[reportAttributeAccessIssue]
        raise Failure(f"the cluster gave up: {str(error).splitlines()[-1]}") from None
    finally:
        ray.shutdown()


def read_images(file: Path) -> Iterator[tuple[str, dict]]:
    """The lines of a file of JSON lines, each with its "image"; one that has none is named."""
    for number, line in enumerate(file.read_text("utf-8-sig").split("\n"), 1):
        try:
            if line:
                yield str((record := json.loads(line))["image"]), record
        except (ValueError, TypeError, KeyError, RecursionError):
            wanted = 'an object with "image"'
            raise ValueError(f"{file}, line {number} is {shorten(line)}, not {wanted}") from None


def list_images(source: Path) -> list[str]:
    """Absolute paths of the pictures of a folder (and those in it), a list, or JSON lines."""
    if source.is_dir():
        files = (Path(at, name) for at, _, names in os.walk(source) for name in names)
        return sorted(str(f.absolute()) for f in files if f.suffix.lower() in PICTURES)
    if not source.is_file():
        raise ValueError(f"there is no {source}; expected a folder, a list or JSON lines")
    names = source.read_text("utf-8-sig").split("\n")
    if source.suffix == ".jsonl":
        names = dict(read_images(source))
    return sorted({str(source.parent.absolute() / name) for name in names if name})


def read_answers(folder: Path, prompt: str) -> dict[str, dict]:
    """What was written before, by picture; a ValueError where it isn't this prompt's, once each."""
    answers: dict[str, dict] = {}
    for file in sorted(settled(folder).glob("part-*.jsonl")):
        for image, record in read_images(file):
            if image in answers or record.get("prompt") != prompt:
                what = f"another line for {image}, or another prompt; give another folder"
                raise ValueError(f"{file} holds {what}")
            answers[image] = record
    return answers


def run(args: argparse.Namespace) -> int:
    """Answer what has no line yet; returns 1 where the line of a picture is an error."""
    if min(args.batch_size, args.part) < 1:
        raise ValueError("batch_size and part are numbers of pictures, 1 or more")
    prompt = args.prompt if args.task == "answer" else task_prompt(args.task, args.prompt)
    pipeline = load(args.model_path)  # what can't be right is refused here, not a million times
    pipeline.stream(Image.new("RGB", (1, 1)), prompt, max_new_tokens=args.max_tokens)
    if args.task == "segment" and pipeline.codec is None:
        raise ValueError("this model has no mask codec; put one into its directory")
    images, answers = list_images(args.pictures), read_answers(args.output, prompt)
    waiting = [image for image in images if image not in answers]
    say(f"{len(images)} pictures, {len(waiting)} of them without an answer")
    if waiting:
        lines = ask_cluster(waiting, prompt, args)
        bar = iter(tqdm(lines, total=len(waiting), unit="picture", disable=None))
        names = (f"part-{number:05}.jsonl" for number in itertools.count())
        while part := list(itertools.islice(bar, args.part)):
            name = next(name for name in names if not (args.output / name).exists())
            with replacing(args.output) as draft:
                (draft / name).write_text("\n".join([*part, ""]))
    answers = read_answers(args.output, prompt)
    if missing := sum(image not in answers for image in images):
        raise Failure(f"{missing} pictures have no answer; give the same command again")
    errors = sum("error" in answers[image] for image in images)
    say(f"{len(images) - errors} answers and {errors} errors are in {args.output}")
    return 1 if errors else 0


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("pictures", type=Path, help='a folder; a list, one path a line; or .jsonl with "image"')
    add("--output", type=Path, required=True, help="the folder for the answers")
    add("--prompt", default="caption en", help="default: caption en; for detect, segment: names")
    add("--task", choices=["answer", *FOUND], default="answer", help="default: answer")
    add("--model_path", help="checkpoint directory or hub name; default: the tiny model")
    add("--max_tokens", type=int, default=100, help="of an answer; default: 100")
    add("--batch_size", type=int, default=16, help="pictures at once; default: 16")
    add("--part", type=int, default=1000, help="lines in a file; default: 1000")
    add("--address", default="local", help="of a cluster, such as auto; default: no cluster")
    raise SystemExit(run_command(parser, run, None))
