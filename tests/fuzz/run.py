"""Throws hostile files, texts and arguments at the package, and counts what became of them.

Each case follows from the seed, its family and its number. It ends in a right result or in a
ValueError of one clear line (the command: exit 2 and one line), in 10 seconds of work and with 2 GB
more memory than the shipped model has, without running code or writing outside its folder.
Everything else is a failure, and printed. A case again:
    python tests/fuzz/run.py --only checkpoints --first 17 --cases 1
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, Queue
from threading import Timer

WORKER = Path(__file__).with_name("worker.py")
PATIENCE = 40  # seconds without a word, after which a worker is stopped (its imports included)
FAMILIES = "checkpoints configs settings tokenizers quantised adapters".split()
FAMILIES += "pictures codecs datasets resumes texts options commands".split()
VERDICTS = ("clear", "right", "poor", "failure")


class Worker:
    """A process that judges cases; a new one after each that died or hung."""

    def __init__(self, seed: int, place: Path):
        self.seed, self.place, self.process = seed, place, None

    def start(self) -> subprocess.Popen:
        self.place.mkdir(parents=True)
        command = [sys.executable, str(WORKER), str(self.seed), str(self.place)]
        threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": ""}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, text=True, bufsize=1, env=os.environ | threads, **pipes)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process, self.place = None, self.place.with_suffix(f".{os.urandom(4).hex()}")

    def line(self) -> object:
        alarm = Timer(PATIENCE, self.process.kill)
        alarm.start()
        text = self.process.stdout.readline()
        alarm.cancel()
        if not text:
            raise EOFError(f"the process hung, or died (exit {self.process.wait()})")
        return json.loads(text)

    def judge(self, family: str, number: int) -> tuple[str, str, str]:
        """Name, verdict and message of one case."""
        name = "?"
        try:
            self.process = self.process or self.start()
            self.process.stdin.write(f"{family} {number}\n")
            name = self.line()
            return name, *self.line()
        except (EOFError, OSError) as error:
            self.stop()
            return name, "failure", str(error)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--cases", type=int, default=10_400, help="in all")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=os.cpu_count() or 1)
    add("--only", nargs="+", choices=FAMILIES, default=FAMILIES, metavar="FAMILY")
    add("--first", type=int, default=0, help="number of the first case of each family")
    add("--output", type=Path, help="a JSON file for the table")
    add("--messages", type=Path, help="a file for what was said in every case")
    args = parser.parse_args()
    each = -(-args.cases // len(args.only))
    jobs: Queue = Queue()
    for number in range(args.first, args.first + each):
        for family in args.only:
            jobs.put((family, number))
    counts = {family: Counter() for family in args.only}
    said: list[tuple] = []

    def work(place: Path) -> None:
        worker = Worker(args.seed, place)
        try:
            while True:
                family, number = jobs.get_nowait()
                name, verdict, message = worker.judge(family, number)
                counts[family][verdict] += 1
                said.append((family, number, name, verdict, message))
                if verdict in ("poor", "failure"):
                    print(f"{verdict}: {family} {number} ({name}): {message}"[:600], flush=True)
        except Empty:
            worker.stop()

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(work, [Path(folder, f"w{i}", "x") for i in range(args.workers)]))
    table = {f: {"tried": c.total()} | {v: c[v] for v in VERDICTS} for f, c in counts.items()}
    table["all"] = {key: sum(row[key] for row in table.values()) for key in ("tried", *VERDICTS)}
    heads = ("tried", "clear error", "right result", "poor message", "failure")
    print(f"| {'family':12} |" + "".join(f" {head} |" for head in heads))
    print("|--------------|" + "".join("-" * (len(head) + 1) + ":|" for head in heads))
    for family, row in table.items():
        cells = zip(row.values(), heads, strict=True)
        print(f"| {family:12} |" + "".join(f" {n:{len(head)},} |" for n, head in cells))
    if args.output:
        args.output.write_text(json.dumps({"seed": args.seed, "families": table}, indent=2) + "\n")
    if args.messages:
        args.messages.write_text("".join(json.dumps(one) + "\n" for one in sorted(said)))
    return 1 if table["all"]["failure"] or table["all"]["poor"] else 0


if __name__ == "__main__":
    sys.exit(main())
