"""Exercises: every plausible wrong answer fails its check, with a message that helps.

The wrong answers of a lesson stand in tests/wrong_answers/NN_stem.py, each under a line
`# %% <exercise> · <the mistake in words>`. They are typed in where a reader would type them: after
the check, and before the solution. `pytest -s` prints what the reader would see.
"""

import os
import re
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
HEAD = re.compile(r"^# %% (\d+) · (.+)\n", re.MULTILINE)
CRASH = re.compile(r"✗ not yet: \w+(?:Error|Exception|Exit)\b")  # a traceback's last line, no help


def wrong_answers(stem):
    """The wrong answers of a lesson: [(exercise, mistake, code), …]."""
    path = ROOT / "tests" / "wrong_answers" / f"{stem}.py"
    parts = HEAD.split(path.read_text())[1:] if path.exists() else []
    return [(int(n), what, code) for n, what, code in zip(parts[::3], parts[1::3], parts[2::3])]


def with_wrong_answers(nb, answers):
    """The code cells of a lesson, and behind each check its wrong answers, each checked."""
    cells, exercise = [], 0
    for cell in (c for c in nb.cells if c.cell_type == "code"):
        cells.append(nbformat.v4.new_code_cell(cell.source))
        if "check" in cell.metadata.get("tags", []):
            exercise += 1
            again = re.findall(r"^check\(.*", cell.source, re.MULTILINE | re.DOTALL)[-1]
            for number, what, code in answers:
                if number == exercise:
                    about = {"mistake": f"{exercise} · {what}"}
                    source = f"{code.strip()}\n{again}"
                    cells.append(nbformat.v4.new_code_cell(source, metadata=about))
    return nbformat.v4.new_notebook(cells=cells, metadata=nb.metadata)


def run(nb):
    where = {"metadata": {"path": str(ROOT / "notebooks")}}
    client = NotebookClient(nb, timeout=600, resources=where)
    client.execute(env=os.environ | {"MPLBACKEND": "agg"}, stderr=subprocess.DEVNULL)
    return nb


def problems(nb):
    """What is wrong with the answers to wrong answers; all of them are printed."""
    found = []
    for cell in nb.cells:
        if what := cell.metadata.get("mistake"):
            said = "".join(output.get("text", "") for output in cell.outputs).strip()
            print(f"{what}\n    {said}")
            if "✗" not in said or "✓" in said:
                found.append(f"{what}: passes")
            elif CRASH.search(said):
                found.append(f"{what}: the message is a crash: {said}")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_wrong_answers_fail(path):
    nb, answers = nbformat.read(path, as_version=4), wrong_answers(path.stem)
    checks = sum("check" in cell.metadata.get("tags", []) for cell in nb.cells)
    tried = {n: sum(number == n for number, *_ in answers) for n in range(1, checks + 1)}
    assert len(answers) == sum(tried.values()), "a wrong answer to an exercise that there isn't"
    titles = [(n, what) for n, what, _ in answers]
    assert len(set(titles)) == len(titles), "two wrong answers have the same title"
    few = [f"exercise {n}: {count}" for n, count in tried.items() if count < 5]
    assert not few, f"five wrong answers for each exercise, please: {few}"
    assert not problems(run(with_wrong_answers(nb, answers)))


def test_an_accepted_mistake_and_a_crash_are_found():
    new = nbformat.v4.new_code_cell
    test = "def test(a):\n    assert a() == 4, 'twice two'"
    cells = [
        new("from paligemma.support.course import check"),
        new(f"{test}\n\n\ncheck(test, answer)", metadata={"tags": ["check"]}),
    ]
    cells.insert(1, new("answer = lambda: None"))
    nb = nbformat.v4.new_notebook(cells=cells)
    answers = [
        (1, "adds", "answer = lambda: 2 + 2"),
        (1, "crashes", "answer = lambda: 1 / 0"),
        (1, "is wrong", "answer = lambda: 5"),
    ]
    found = problems(run(with_wrong_answers(nb, answers)))
    assert len(found) == 2 and found[0] == "1 · adds: passes" and "ZeroDivisionError" in found[1]
