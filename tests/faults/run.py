"""Kill, starve and lock out processes that save or train: is what they leave whole? `make faults`

After each try the folder holds the last complete state, or the one that was being saved; never a
mixture, never nothing. The next save leaves no file of the one that was harmed. A run that was
killed goes on to the losses and weights of one that was left alone, bit for bit.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # children are forked: this process stays single

import runs
import saves
import torch


def main() -> int:
    """The command line; 1 if anything did not survive."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds, harms = [*saves.KINDS, *runs.RUNS], [*saves.HARMS]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, metavar="KIND")
    parser.add_argument("--harms", nargs="+", choices=harms, default=harms, metavar="HARM")
    parser.add_argument("--tries", type=int, default=50, help="for what happens at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a JSON file for the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| what | harm | tried | survived |\n|---|---|---|---|")
    tried = survived = 0
    table: dict[str, dict] = {}
    start = time.perf_counter()
    for name in options.kinds:
        module = saves if name in saves.KINDS else runs
        for harm in options.harms:
            if harm not in module.HARMS:
                continue
            found = list(module.tries(name, harm, options.tries, options.seed))
            wrong = [outcome for outcome in found if outcome is not None]
            tried, survived = tried + len(found), survived + len(found) - len(wrong)
            row = {"tried": len(found), "survived": len(found) - len(wrong)}
            table.setdefault(name, {})[harm] = row
            print(f"| {name} | {harm} | {row['tried']} | {row['survived']} |", flush=True)
            for outcome in wrong[:3]:
                print(f"{name}, {harm}: {outcome}", file=sys.stderr, flush=True)
    print(f"| all | | {tried} | {survived} |")
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    if options.output:
        text = json.dumps({"seed": options.seed, "kinds": table}, indent=1)
        options.output.write_text(text + "\n", encoding="utf-8")
    return int(survived < tried)


if __name__ == "__main__":
    sys.exit(main())
