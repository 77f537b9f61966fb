"""The order of the course: a lesson builds on earlier ones only, and everything has its place."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
NUMBERS = {path.stem[3:]: int(path.stem[:2]) for path in NOTEBOOKS}
MODULES = [
    path for path in sorted((ROOT / "paligemma").glob("*.py")) if not path.name.startswith("__")
]
SUPPORT = ROOT / "paligemma" / "support"
# Exceptions: `command_line`, the door to the package, is called by the lesson that it stands on;
# `adapters` lets lesson 24's `load` apply what lesson 29 explains, imported when there is one.
OPEN = {"command_line", "adapters"}
# Tests of the project as a whole; every other test file belongs to one lesson.
PROJECT = {"toolchain", "notebooks", "staircase", "references", "parity", "readme", "tiny", "bench"}
PROJECT |= {"train_tiny", "other_renderer", "exercises", "glossary"}
PROJECT |= {"answer_pictures", "faults", "fuzz", "supply"}


def notebook_code(path):
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "code")


def imported(code):
    """Dotted names that Python code imports, wherever it does so."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(["paligemma"] * bool(node.level) + [node.module or ""]).strip(".")
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def lessons_of(names):
    """The modules of this package among imported names; "" is the package itself.

    For a module of `support/` the lessons that it stands on, itself or through another.
    """
    found = set()
    for parts in (name.split(".") for name in names):
        if parts[0] != "paligemma":
            continue
        if parts[1:2] == ["support"]:
            file = SUPPORT / f"{parts[2]}.py" if len(parts) > 2 else None
            if file and file.is_file() and file.stem not in OPEN:
                found |= lessons_of(imported(file.read_text()))
        else:
            found.add(parts[1] if len(parts) > 1 and parts[1] in NUMBERS else "")
    return found


def too_late(stem, names):
    """Imports that break the order: a lesson not before `stem`, or the package as a whole.

    `import paligemma` brings in `load` of lesson 24, so only later lessons may use it.
    """
    number = NUMBERS[stem]
    whole = NUMBERS.get("inference", 22)
    return sorted(
        name or "paligemma" for name in lessons_of(names) if NUMBERS.get(name, whole) >= number
    )


CLIMBING = [path for path in NOTEBOOKS if not path.stem.startswith("00_")]  # 00 shows the whole


@pytest.mark.parametrize("path", CLIMBING, ids=lambda path: path.stem)
def test_notebook_imports_earlier_lessons_only(path):
    # One draws the map before it builds what draws it; one starts processes that import it.
    own = {"plotting", "distributed"} & {path.stem[3:]}
    assert not set(too_late(path.stem[3:], imported(notebook_code(path)))) - own


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_module_imports_earlier_lessons_only(path):
    assert path.stem in NUMBERS, "a module is exported from the lesson of the same name"
    assert not too_late(path.stem, imported(path.read_text()))


def test_late_imports_are_seen():
    first, last = min(NUMBERS, key=NUMBERS.get), max(NUMBERS, key=NUMBERS.get)
    for code in (
        f"import paligemma.{last}",
        f"from paligemma.{last} import x",
        f"from paligemma import {last}",
        f"def f():\n    from .{last} import x",
        "import paligemma",
        "from paligemma import load",
    ):
        assert too_late(first, imported(code)), code
    assert not too_late(last, imported("import torch.nn, math"))


def test_one_lesson_one_module_one_test():
    assert len(NUMBERS) == len(NOTEBOOKS), "two lessons share a stem"
    assert len(set(NUMBERS.values())) == len(NOTEBOOKS), "two lessons share a number"
    exporting = {path.stem[3:] for path in NOTEBOOKS if "#| export" in notebook_code(path)}
    assert {path.stem for path in MODULES} == exporting
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert not exporting - tests, "modules without tests"
    assert not tests - exporting - PROJECT, "tests of no module"


def test_package_has_two_rooms():
    folders = {path.parent for path in (ROOT / "paligemma").rglob("*.py")}
    assert folders == {ROOT / "paligemma", SUPPORT}
    assert not {path.stem for path in MODULES} & {"utils", "util", "common", "helpers", "misc"}


@pytest.mark.parametrize("path", [*NOTEBOOKS, *MODULES], ids=lambda path: path.name)
def test_the_reference_implementation_is_never_imported(path):
    code = notebook_code(path) if path.suffix == ".ipynb" else path.read_text()
    roots = {name.split(".")[0] for name in imported(code)}
    assert not roots & {"transformers", "timm", "jax", "open_clip"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_module_names_its_notebook(path):
    first, rest = path.read_text().split("\n", 1)
    number = f"{NUMBERS.get(path.stem, 0):02d}"
    assert first == (
        f"# Exported from notebooks/{number}_{path.stem}.ipynb — edit there, then run `make sync`."
    )
    assert not re.search(r"^# ?(%%|\|)|^# In\[", rest, re.MULTILINE), "no cell markers"
    assert ast.get_docstring(ast.parse(rest)), "a module says what it is"
