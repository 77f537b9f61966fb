"""The form of every lesson, read from its notebook and its stored outputs.

nbval runs the notebooks and proves that the stored outputs are what a run gives; these tests say
what the cells and the outputs have to be.
"""

import re
import statistics
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))

TITLE = re.compile(r"# (\d+) · \S.*\n\n\*(\d+) minutes\* · \S.*\n\n\*\*\S")
TAGS = {
    "navigation",
    "map",
    "setup",
    "exercise",
    "check",
    "solution",
    "hide-input",
    "nbval-ignore-output",
}
LINK = re.compile(r"""\]\(([^)\s]+)(?:\s"[^"]*")?\)|(?:src|href)=["']([^"']+)["']""")
OUTSIDE = re.compile(r"^(?:https?:|mailto:|data:|#)")
# A path with two folders at least; the places of this machine besides.
MACHINE_PATH = re.compile(
    r"(?<![\w.:/<>\-])/(?:[\w.\-]+/){2,}[\w.\-]+|[A-Za-z]:\\\\?\w+|site-packages|/ipykernel_"
)


def tags(cell):
    return cell.metadata.get("tags", [])


def outputs_text(cell):
    """Everything a code cell printed or showed, as text."""
    parts = []
    for output in cell.outputs:
        parts.append(output.get("text", ""))
        parts += [str(v) for k, v in output.get("data", {}).items() if k.startswith("text/")]
        parts += output.get("traceback", [])
    return "\n".join(parts)


def count_words(source):
    """Words that a reader reads: no code, tables, formulas, tags or addresses."""
    source = re.sub(r"```.*?```", " ", source, flags=re.DOTALL)
    source = re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$", " x ", source, flags=re.DOTALL)
    source = re.sub(r"^\s*\|.*$", " ", source, flags=re.MULTILINE)
    source = re.sub(r"<[^>]+>", " ", source)
    source = re.sub(r"\]\([^)]*\)", "]", source)
    return len(re.findall(r"[^\W_][\w'’.,\-]*", source))


def cells_where(cells, problem):
    """A readable list of the cells that have a problem: index, what, first line."""
    found = [(i, problem(cell), cell.source.split("\n")[0][:60]) for i, cell in enumerate(cells)]
    return [f"cell {i}: {what} — {line}" for i, what, line in found if what]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def cells(path):
    return nbformat.read(path, as_version=4).cells


def code(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def test_header_and_footer(path, cells):
    assert "navigation" in tags(cells[0]), "the first cell is the navigation"
    assert "navigation" in tags(cells[-1]), "the last cell is the navigation"
    title = TITLE.match(cells[1].source)
    assert title, "cell 1: # N · Topic: question / *NN minutes* · part … / **What you will …**"
    assert int(title[1]) == int(path.stem[:2]), "the title's number is the file's"
    titles = [c for c in cells if c.cell_type == "markdown" and c.source.startswith("# ")]
    assert len(titles) == 1, "one title; sections begin with ##"


def test_map_cell(cells):
    maps = [cell for cell in cells[:6] if "map" in tags(cell)]
    assert len(maps) == 1, 'one cell with tags=["map"] near the top'
    assert any("image/png" in output.get("data", {}) for output in maps[0].outputs)


def test_exercises(path, cells):
    """At least three; the check fails on the stub and passes on the solution."""
    steps = [
        (tag, cell)
        for cell in code(cells)
        for tag in ("exercise", "check", "solution")
        if tag in tags(cell)
    ]
    order = [tag for tag, _ in steps]
    least = 0 if path.stem.startswith("00_") else 3
    assert order == ["exercise", "check", "solution"] * (len(order) // 3)
    assert len(order) // 3 >= least, "three exercises at least"
    for tag, cell in steps:
        text = outputs_text(cell)
        assert "nbval-ignore-output" not in tags(cell), "nbval has to see this output"
        if tag == "check":
            assert "✗" in text and "✓" not in text, f"the stub passes its check: {cell.source}"
        if tag == "solution":
            assert "✓" in text and "✗" not in text, f"the solution fails: {cell.source}"
    headings = re.findall(
        r"^### Exercise (\d+) \((predict|fill in|write|break|extend)\)",
        "\n".join(cell.source for cell in cells if cell.cell_type == "markdown"),
        re.MULTILINE,
    )
    assert [int(number) for number, _ in headings] == list(range(1, len(order) // 3 + 1))
    if least:
        assert len({kind for _, kind in headings}) >= least, "exercises of different kinds"


def test_hints_and_quiz(path, cells):
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert len(re.findall(r"<summary>Hint</summary>", prose)) >= 3
    assert len(re.findall(r"<summary>Answer</summary>", prose)) >= 3
    assert prose.count("<details>") == prose.count("</details>")


def test_outputs_are_clean(cells):
    def problem(cell):
        if cell.cell_type != "code":
            return None
        kinds = [(output.output_type, output.get("name")) for output in cell.outputs]
        if ("stream", "stderr") in kinds:
            return "writes to stderr"
        if any(kind == "error" for kind, _ in kinds):
            return "raises"
        if cell.source.strip() and cell.execution_count is None:
            return "was never run"
        text = outputs_text(cell)
        if found := MACHINE_PATH.search(text):
            return f"prints a path: {found[0]}"
        if any(str(place) in text for place in (ROOT, Path.home(), sys.prefix)):
            return "prints a path of this machine"
        if re.search(r"\bat 0x[0-9a-f]{6,}", text):
            return "shows a memory address: give the value a name"
        return None

    assert not cells_where(cells, problem)


def test_prose_comes_in_small_pieces(cells):
    def problem(cell):
        tables = cell.source.startswith(("## Symbols", "## Glossary"))
        words = count_words(cell.source) if cell.cell_type == "markdown" and not tables else 0
        return words > 90 and f"{words} words; 80 or fewer are wanted"

    assert not cells_where(cells, problem)


def test_a_lesson_is_one_sitting(cells):
    stated = int(TITLE.match(cells[1].source)[2])
    assert stated <= 50, f"{stated} minutes: cut it, or split it"


def test_letters_are_large_enough(cells):
    def problem(cell):
        small = re.search(r"(?:font|label)_?size=([0-8](?:\.\d+)?)\b", cell.source)
        return small and f"{small[0]}: 9 points or more"

    assert not cells_where(code(cells), problem)


def test_the_course_can_be_finished():
    """All lessons together: minutes, and what a reader sees of code in one glance."""
    lessons = [nbformat.read(path, as_version=4).cells for path in NOTEBOOKS]
    stated = sum(int(TITLE.match(lesson[1].source)[2]) for lesson in lessons)
    folded = {"hide-input", "check", "solution", "map"}
    shown = [cell for lesson in lessons for cell in code(lesson) if not folded & set(tags(cell))]
    lines = [sum(bool(line.strip()) for line in cell.source.split("\n")) for cell in shown]
    assert stated <= 1350, f"{stated} minutes in all"
    assert statistics.median(lines) <= 6, f"{statistics.median(lines)} lines in the median cell"
    assert sum(n > 25 for n in lines) <= len(lines) / 10, "more than one cell in ten is long"


def test_a_saved_figure_is_shown(cells):
    def problem(cell):
        shown = any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
        return cell.cell_type == "code" and "save_figure(" in cell.source and not shown

    assert not cells_where(cells, problem)


def test_lessons_are_named_by_links(cells):
    """A number in a link follows its stem; a bare one would go stale."""

    def problem(cell):
        bare = re.search(r"(?<!\[)\b[Ll]essons? \d+", cell.source)
        return cell.cell_type == "markdown" and bare and bare[0]

    assert not cells_where(cells, problem)


def test_what_is_not_read_is_folded(cells):
    """Drawing, checks and solutions: JupyterLab hides their source, their output stays."""

    def problem(cell):
        folded = bool(cell.metadata.get("jupyter", {}).get("source_hidden"))
        wanted = bool({"check", "solution", "hide-input"} & set(tags(cell)))
        return "folded" if folded and not wanted else "not folded" if wanted > folded else None

    assert not cells_where(cells, problem)


def test_tags_are_known(cells):
    assert not cells_where(cells, lambda cell: ", ".join(set(tags(cell)) - TAGS))


def test_links_resolve(path, cells):
    def problem(cell):
        if cell.cell_type != "markdown":
            return None
        targets = [a or b for a, b in LINK.findall(re.sub(r"`[^`]*`", "", cell.source))]
        inside = [target.split("#")[0] for target in targets if not OUTSIDE.match(target)]
        return ", ".join(target for target in inside if not (path.parent / target).exists())

    assert not cells_where(cells, problem)


@pytest.mark.parametrize(
    ("source", "words"),
    [("One two three.", 3), ("A $x^2 + y$ b", 3), ("```\na b c\n```\nd", 1), ("| a | b |\nc", 1)],
)
def test_words_are_counted_as_read(source, words):
    assert count_words(source) == words


@pytest.mark.parametrize("text", ["/usr/lib/a/b.py", "File C:\\Users\\x", "x /opt/a/b.so"])
def test_machine_paths_are_seen(text):
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", ["3/4/5", "float32[B, L]", "a/b/c", "https://x.org/a/b/c"])
def test_other_slashes_are_not_paths(text):
    assert not MACHINE_PATH.search(text)
