"""Saves and trainings that are killed, starved and locked out: `make faults`, with fewer tries."""

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "faults" / "run.py"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="fork, POSIX signals and limits")


def table(*arguments: str) -> dict[tuple[str, str], tuple[int, int]]:
    """{(kind, harm): (tried, survived)} of one run, which must have found nothing wrong."""
    done = subprocess.run([sys.executable, RUN, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:-1]]
    return {(kind, harm): (int(tried), int(survived)) for kind, harm, tried, survived in rows}


def test_saves_are_harmed():
    """Sharded models, int8 over int4 and adapters: at every step; the rest at random."""
    kinds = ("model, shards", "int8 over int4", "adapter")
    rows = table("--tries", "3", "--kinds", *kinds)
    for kind in kinds:
        for harm in ("killed at each step", "no room at each step"):
            tried, survived = rows[kind, harm]
            assert tried == survived > 12, "the switch has as many steps"
        for harm in ("killed at random", "file limit"):
            assert rows[kind, harm] == (3, 3)
        assert rows[kind, "read-only"] == (1, 1)


def test_pipelines_and_trainings_are_harmed():
    kinds = ("model, one file", "whole pipeline", "training", "LoRA training", "the recipe")
    rows = table("--tries", "3", "--harms", "killed at random", "--kinds", *kinds)
    assert rows == {(kind, "killed at random"): (3, 3) for kind in kinds}
