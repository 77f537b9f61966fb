"""Runs cases one after the other in a process with limits; one JSON line for each on its output.

Standard input: lines "family number". For each case two lines come back: its name, its verdict.
"""

import json
import os
import random
import resource
import shutil
import sys
import time
import traceback
import warnings
from pathlib import Path

SECONDS = 10  # of work; a case that needs more hangs, and one that waits is stopped by run.py
MEMORY = 2 << 30  # bytes beyond what the process held before
ADDRESSES = 12 << 30  # and of addresses, so that a mistake cannot take the machine
BESIDE = ("x", "model.safetensors")  # files outside the folder of a case, which have to stay
LONGEST = 400  # characters of a clear message


def families() -> dict:
    import calls
    import data
    import images
    import models
    import words

    found = [models.checkpoints, models.configs, models.settings, words.tokenizers]
    found += [models.quantised, models.adapters, images.pictures, data.codecs, data.datasets]
    found += [data.resumes, calls.texts, calls.options, calls.commands]
    return {one.__name__: one for one in found}


def memory(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the most since `forget_peak`); 0 where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(field)), 0)


def forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def judge(run) -> tuple[str, str]:
    """What became of a case: right, clear, poor or failure; and the message."""
    forget_peak()
    held, began = memory("VmRSS"), time.process_time()
    verdict, message = "right", ""
    try:
        run()
    except ValueError as error:
        message = str(error)
        clear = message and "\n" not in message and len(message) <= LONGEST
        verdict = "clear" if clear and "Traceback" not in message else "poor"
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "paligemma" in f.filename]
        verdict, message = "failure", f"{type(error).__name__}: {error} at {' '.join(where[-2:])}"
    seconds, more = time.process_time() - began, memory("VmHWM") - held
    if seconds > SECONDS:
        return "failure", f"it took {seconds:.0f} s ({verdict}: {message})"
    if more > MEMORY:
        return "failure", f"it took {more >> 20} MB ({verdict}: {message})"
    return verdict, message


def main(seed: str, place: str) -> None:
    warnings.simplefilter("ignore")
    root, say = Path(place), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is nobody's answer
    os.dup2(1, 2)
    sys.path.insert(0, str(Path(__file__).parent))
    known = families()
    (root / "empty").mkdir()
    for name in BESIDE:
        (root / name).touch()
    os.chdir(root / "empty")
    os.environ["HOME"] = str(root / "empty")
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + ADDRESSES,) * 2)
    before = sorted(os.listdir(root))
    for line in sys.stdin:
        family, number = line.split()
        rng = random.Random(f"{seed} {family} {number}")
        folder = root / "case"
        verdict = "failure"
        try:
            name, run = known[family](rng, folder)
        except Exception:  # the fuzzer's own mistake
            name, message = "not made", traceback.format_exc()
            print(json.dumps(name), file=say, flush=True)
        else:
            print(json.dumps(name), file=say, flush=True)
            verdict, message = judge(run)
        shutil.rmtree(folder, ignore_errors=True)
        left = sorted(os.listdir(root)) + os.listdir(root / "empty")
        if left != before:
            changed = sorted(set(left) ^ set(before))
            verdict, message = "failure", f"it wrote or removed {changed} ({message})"
            for name in BESIDE:
                (root / name).touch()
            for other in set(left) - set(before):
                for file in (root / other, root / "empty" / other):
                    file.unlink() if file.is_file() else shutil.rmtree(file, ignore_errors=True)
        print(json.dumps([verdict, message]), file=say, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
