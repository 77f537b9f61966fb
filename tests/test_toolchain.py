"""The sync tool on a toy course: what it notices, what it repairs, what it writes."""

import base64
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]

TOY = '''\
# %% [markdown] tags=["navigation"]

# %% [markdown]
# # 1 · Toy: what is it?
#
# *30 minutes* · part I, Seeing

# %%
#| export
"""Toys, twice as large."""
from math import tau
import math

# cat ; dog
SIZE = 3

# %%
#| export
from math import sqrt
def double( x ):
    """Twice x."""
    return 2*x + 0*math.pi

# %%
import sys
print(double(SIZE))

# %% tags=["solution"]
import matplotlib.pyplot as plt
axes = plt.figure(figsize=(1, 1)).add_subplot()

# %% [markdown] tags=["navigation"]
'''

MODULE = '''\
# Exported from notebooks/01_toy.ipynb — edit there, then run `make sync`.
"""Toys, twice as large."""

import math
from math import sqrt, tau

# cat ; dog
SIZE = 3


def double(x):
    """Twice x."""
    return 2 * x + 0 * math.pi
'''

README = "# Toys\n\n<!-- lessons -->\nold\n<!-- /lessons -->\n\nEnd.\n"


def load_sync(root):
    sys.path.insert(0, str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location("toy_sync", ROOT / "tools" / "sync.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    sys.path.pop(0)
    tool.ROOT = root
    return tool


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A synced and executed course of two toy lessons."""
    root = tmp_path_factory.mktemp("toy")
    (root / "notebooks" / "scripts").mkdir(parents=True)
    (root / "notebooks" / "scripts" / "01_toy.py").write_text(TOY)
    second = TOY.split("# %%\n")[0].replace("# 1 · Toy:", "# 2 · Game:")
    (root / "notebooks" / "scripts" / "02_game.py").write_text(second)
    (root / "README.md").write_text(README)
    shutil.copy(ROOT / "pyproject.toml", root)
    assert load_sync(root).main(["--execute"]) == 0
    return root


@pytest.fixture
def course(toy, tmp_path, capsys):
    """A copy of it to break, and a function that runs the tool there: (exit code, output)."""
    shutil.copytree(toy, tmp_path, dirs_exist_ok=True)
    tool = load_sync(tmp_path)

    def run(*arguments):
        capsys.readouterr()
        code = tool.main(list(arguments))
        return code, "".join(capsys.readouterr())

    run.pair = tmp_path / "notebooks" / "scripts" / "01_toy.py"
    run.notebook = tmp_path / "notebooks" / "01_toy.ipynb"
    run.module = tmp_path / "paligemma" / "toy.py"
    run.readme = tmp_path / "README.md"
    run.root = tmp_path
    return run


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def snapshot(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_synced_course_is_in_step_and_stays_as_it_is(course):
    before = snapshot(course.root)
    assert course("--check") == (0, "")
    code, output = course()
    assert code == 0 and output == "01_toy: in step\n02_game: in step\n"
    assert snapshot(course.root) == before


def test_module_reads_as_if_written_by_hand(course):
    assert course.module.read_text() == MODULE
    assert not (course.root / "paligemma" / "game.py").exists()


def test_notebook_holds_outputs_ids_and_nothing_that_varies(course):
    nb = nbformat.read(course.notebook, as_version=4)
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [1, 2, 3, 4]
    assert code[2].outputs[0].text == "6.0\n"
    assert "image/png" in code[3].outputs[0].data
    assert code[3].metadata.jupyter.source_hidden
    assert all("execution" not in cell.metadata for cell in nb.cells)
    assert nb.metadata.language_info == {"name": "python"}
    assert len({cell.id for cell in nb.cells}) == len(nb.cells)
    assert b"Software" not in base64.b64decode(code[3].outputs[0].data["image/png"])


def test_a_second_run_changes_nothing(course):
    before = snapshot(course.root)
    assert course("01_toy", "--execute")[0] == 0
    assert snapshot(course.root) == before


def test_navigation_links_the_neighbours(course):
    nb = nbformat.read(course.notebook, as_version=4)
    links = "[contents](../README.md) | [Game →](02_game.ipynb)"
    assert nb.cells[0].source == nb.cells[-1].source == links
    course.pair.with_name("02_game.py").unlink()
    (course.root / "notebooks" / "02_game.ipynb").unlink()
    code, output = course("--check")
    assert code == 1
    assert "01_toy: numbers, minutes or navigation are stale" in output


def test_pair_edited_alone(course):
    replace(course.pair, "part I, Seeing", "part I, Seeing\n#\n# New words.")
    code, output = course("--check")
    assert code == 1 and "01_toy: notebook and pair disagree at cell 1" in output
    assert course() == (0, "01_toy: wrote notebook\n02_game: in step\n")
    assert course("--check") == (0, "")
    nb = nbformat.read(course.notebook, as_version=4)
    assert nb.cells[1].source.endswith("New words.")
    assert nb.cells[4].outputs[0].text == "6.0\n"  # the outputs stayed


def test_pair_edited_in_a_code_cell_loses_that_output(course):
    replace(course.pair, "print(double(SIZE))", "print(double(SIZE) + 1)")
    assert course("01_toy")[0] == 0
    nb = nbformat.read(course.notebook, as_version=4)
    assert nb.cells[4].outputs == [] and nb.cells[5].outputs != []
    code, output = course("--check")
    assert code == 1 and "01_toy: cell 4 was never run" in output
    assert course("01_toy", "--execute")[0] == 0
    assert course("--check") == (0, "")


def test_notebook_edited_alone(course):
    nb = nbformat.read(course.notebook, as_version=4)
    nb.cells[3].source = nb.cells[3].source.replace("2 * x", "3*x")
    nbformat.write(nb, course.notebook)
    code, output = course("--check")
    assert code == 1
    assert "01_toy: notebook and pair disagree at cell 3" in output
    assert course("01_toy") == (0, "01_toy: wrote pair, notebook, module\n")
    assert "return 3 * x + 0 * math.pi" in course.pair.read_text()
    assert "return 3 * x + 0 * math.pi" in course.module.read_text()


def test_module_edited_alone_is_overwritten(course):
    replace(course.module, "2 * x", "3 * x")
    code, output = course("--check")
    assert code == 1 and "01_toy: paligemma/toy.py is not what the notebook exports" in output
    assert course("01_toy") == (0, "01_toy: wrote module\n")
    assert course.module.read_text() == MODULE
    course.module.unlink()
    assert "01_toy: paligemma/toy.py is not what the notebook exports" in course("--check")[1]


@pytest.mark.parametrize(("choice", "winner"), [("pair", "4 * x"), ("notebook", "3 * x")])
def test_both_edited_is_a_conflict(course, choice, winner):
    replace(course.notebook, "2 * x", "3 * x")
    replace(course.pair, "2 * x", "4 * x")
    before = snapshot(course.root)
    assert "01_toy: notebook and pair disagree at cell 3" in course("--check")[1]
    code, output = course("01_toy")
    assert code == 1
    assert "01_toy: notebook and pair were both edited and disagree at cell 3" in output
    assert "--from" in output
    assert snapshot(course.root) == before
    assert course("01_toy", "--from", choice)[0] == 0
    assert winner in course.pair.read_text() and winner in course.notebook.read_text()
    assert winner in course.module.read_text()


def test_the_same_edit_on_both_sides_is_no_conflict(course):
    replace(course.notebook, "2 * x", "3 * x")
    replace(course.pair, "2 * x", "3 * x")
    assert course("01_toy")[0] == 0
    assert "3 * x" in course.module.read_text()


def test_freshness_is_about_content_not_time(course):
    for when, path in enumerate((course.module, course.notebook, course.pair)):
        os.utime(path, (when * 1e8, when * 1e8))
    assert course("--check") == (0, "")
    assert "wrote" not in course()[1]


def test_missing_side_is_named_and_rebuilt(course):
    course.pair.unlink()
    assert "01_toy: the pair is missing" in course("--check")[1]
    assert course("01_toy") == (0, "01_toy: wrote pair\n")
    course.notebook.unlink()
    assert "01_toy: the notebook is missing" in course("--check")[1]
    assert course("01_toy", "--execute")[0] == 0
    assert course("--check") == (0, "")


def test_module_without_notebook_is_stale(course):
    (course.root / "paligemma" / "ball.py").write_text("BALL = 1\n")
    (course.root / "paligemma" / "__init__.py").write_text("")
    code, output = course("--check")
    assert code == 1 and "paligemma/ball.py: no notebook exports it" in output
    assert "__init__" not in output


def test_readme_table(course):
    rows = course.readme.read_text().splitlines()
    toy = "| I Seeing | 01 | [Toy: what is it?](notebooks/01_toy.ipynb) "
    assert toy + "| [`toy`](paligemma/toy.py) | 5 |" in rows
    assert "|  | 02 | [Game: what is it?](notebooks/02_game.ipynb) |  | 5 |" in rows
    assert rows[0] == "# Toys" and rows[-1] == "End."
    replace(course.readme, "| 5 |", "| 20 |")
    code, output = course("--check")
    assert code == 1 and "README.md: the table of lessons is stale" in output
    assert "README.md: wrote" in course()[1]
    assert course("--check") == (0, "")


def test_broken_cells_are_refused_in_one_line(course):
    good = course.pair.read_text()
    replace(course.pair, "print(double(SIZE))", "print(double(SIZE")
    code, output = course("01_toy")
    assert code == 1 and "01_toy.py: ruff cannot read it" in output
    course.pair.write_text(good)
    replace(course.pair, "print(double(SIZE))", "raise KeyError('no such toy')")
    code, output = course("01_toy", "--execute")
    assert code == 1 and "01_toy: a cell failed" in output and "no such toy" in output
    course.pair.write_text(good)
    nb = nbformat.read(course.notebook, as_version=4)
    nb.cells[1].source += "\n%% [markdown]\nhidden"
    nbformat.write(nb, course.notebook)
    code, output = course("01_toy", "--from", "notebook")
    assert code == 1 and "begins with %%" in output
    with pytest.raises(SystemExit):
        course("03_nothing")


def test_too_slow_a_lesson_fails_but_keeps_its_outputs(toy, tmp_path, capsys):
    shutil.copytree(toy, tmp_path, dirs_exist_ok=True)
    tool = load_sync(tmp_path)
    tool.SECONDS = 0.01
    tool.execute = lambda name, nb: 75.0
    assert tool.main(["02_game", "--execute"]) == 1
    assert "ran in 75.0 s: over the limit" in capsys.readouterr().err


GROWING = '''\
# %%
#| export
"""Toys."""
LOUD = 1

class Toy:
    """A toy."""

    def __init__(self):
        self.loud = LOUD

    # plain
    def play(self):
        return 1

def double(x):
    return x + x

# %%
#| export
def double(x):
    """Twice x."""
    return 2 * x

# %%
#| export
@add_to_class(Toy)
def play(self):
    """Play."""
    return double(self.loud)

@add_to_class(Toy)
@property
def name(self):
    return "toy"
'''

GROWN = '''\
# Exported from notebooks/01_toy.ipynb — edit there, then run `make sync`.
"""Toys."""

LOUD = 1


class Toy:
    """A toy."""

    def __init__(self):
        self.loud = LOUD

    def play(self):
        """Play."""
        return double(self.loud)

    @property
    def name(self):
        return "toy"


def double(x):
    """Twice x."""
    return 2 * x
'''


def cells_of(text):
    return [cell.strip("\n") for cell in text.split("# %%\n") if cell]


def test_the_later_definition_wins_and_classes_grow():
    from export import ExportError, module_text

    assert module_text(cells_of(GROWING), "01_toy") == GROWN
    assert module_text(["x = 1"], "01_toy") is None
    with pytest.raises(ExportError, match="no exported class Ball to add play to"):
        module_text(cells_of(GROWING.replace("class(Toy)", "class(Ball)")), "01_toy")


def test_numbers_and_minutes_are_filled_in(course):
    """A lesson that moves takes its links with it; a longer one says so."""
    words = "word " * 2000
    replace(
        course.pair, "part I, Seeing", f"part I, Seeing\n#\n# [lesson 7](07_game.ipynb) {words}"
    )
    assert course("01_toy")[0] == 0
    text = course.pair.read_text()
    assert "[lesson 02](02_game.ipynb)" in text and "*10 minutes*" in text
    for path in (course.pair.with_name("02_game.py"), course.root / "notebooks/02_game.ipynb"):
        path.rename(path.with_name(path.name.replace("02", "05")))
    assert "01_toy: numbers, minutes or navigation are stale" in course("--check")[1]
    assert course()[0] == 0 and course("--check") == (0, "")
    assert "[lesson 05](05_game.ipynb)" in course.pair.read_text()
    assert "# 05 · Game" in (course.root / "notebooks/scripts/05_game.py").read_text()


SANITIZED = {
    "took 12 ms, 1.3 s or 0.5 µs": "took TIME, TIME or TIME",
    "in 12.25 seconds": "in TIME",
    "max difference 1.2e-07": "max difference TINY",
    "step    8.1 ms": "step TIME",
    "<Box at 0x7f31763eac90>": "<Box at ADDRESS>",
    "3 steps, 1.2e-03, 17 samples, v1.5s": "3 steps, 1.2e-03, 17 samples, v1.5s",
}


@pytest.mark.parametrize("text", SANITIZED)
def test_nbval_ignores_times_and_noise_only(text):
    from nbval.plugin import get_sanitize_patterns

    sanitized = text
    for regex, replacement in get_sanitize_patterns((ROOT / "tools" / "nbval.cfg").read_text()):
        sanitized = re.sub(regex, replacement, sanitized)
    assert sanitized == SANITIZED[text]


def test_student_edition_has_no_solutions(tmp_path):
    """The Makefile's own command, on one lesson; what is cut are the solutions and nothing else."""
    recipe = (ROOT / "Makefile").read_text().split("\nstudent:")[1].split("\n\n")[0]
    command = re.search(r"nbconvert (.+?) notebooks/\*\.ipynb", recipe, re.DOTALL)[1]
    options = command.replace("\\\n", " ").replace("--output-dir student", "").split()
    lesson = ROOT / "notebooks/02_image_processor.ipynb"
    jupyter = [sys.executable, "-m", "nbconvert", *options, "--output-dir", str(tmp_path)]
    subprocess.run([*jupyter, str(lesson)], check=True, capture_output=True)
    whole, student = (nbformat.read(p, 4).cells for p in (lesson, tmp_path / lesson.name))
    kept = [c.source for c in whole if "solution" not in c.metadata.get("tags", [])]
    assert [c.source for c in student] == kept and len(kept) == len(whole) - 3
