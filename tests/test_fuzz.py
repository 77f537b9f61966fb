"""Hostile files, texts and arguments: a sample of what `make fuzz` tries by the thousand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("fuzz") / "run.py"
EACH = 30  # cases of each family


def fuzz(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, RUN, "--workers", "1", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_hostile_input_ends_in_a_clear_error_or_a_right_result(tmp_path):
    done = fuzz("--cases", 13 * EACH, "--output", tmp_path / "table.json")
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads((tmp_path / "table.json").read_text())["families"]
    total = table.pop("all")
    assert total["tried"] == total["clear"] + total["right"] == 13 * EACH
    for family, row in table.items():
        assert row["tried"] == EACH and row["clear"], f"{family} broke nothing"


JUDGED = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import worker
def deep(): return deep()
def grow(): (b"x" * (1 << 27)).count(b"y")
def work():
    end = time.process_time() + 0.2
    while time.process_time() < end: pass
def lines(): raise ValueError("a\\nb")
def long(): raise ValueError("a" * 500)
def good(): raise ValueError("this file is empty; give another")
worker.MEMORY = 1 << 26
for run in (deep, grow, lines, long, good, int):
    print(*worker.judge(run))
worker.SECONDS = 0.1
print(*worker.judge(work))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_judge_sees_what_it_is_there_for():
    command = [sys.executable, "-c", JUDGED, str(RUN.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    deep, grow, *lines, right, slow = done.stdout.splitlines()
    assert deep.startswith("failure RecursionError") and slow.startswith("failure it took 0 s")
    assert grow.startswith("failure it took 12") and right == "right "
    assert lines == ["poor a", "b", "poor " + "a" * 500, "clear this file is empty; give another"]
