"""Keep the three forms of a lesson in step: notebook, pair and module.

    notebooks/NN_stem.ipynb        what people open, with its outputs
    notebooks/scripts/NN_stem.py   the same cells as plain Python: what people review
    paligemma/stem.py              the cells that begin with `#| export`

Edit the notebook or the pair, then run this. Which of the two was edited is read from their
content: the notebook remembers a digest of the cells at the last sync. Examples:

    python tools/sync.py                         all lessons, and the lesson table in README.md
    python tools/sync.py 09_rope --execute       one lesson, run, outputs stored
    python tools/sync.py --check                 write nothing, say what disagrees
    python tools/sync.py 09_rope --figures DIR   its stored pictures as PNG files
    python tools/sync.py --student DIR           notebooks without solutions and outputs
"""

import argparse
import ast
import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60  # a lesson that runs longer is split or made smaller
PHOTOGRAPH = 60_000  # bytes; line drawings compress to less

PERCENT = {
    "extension": ".py",
    "format_name": "percent",
    "comment_magics": False,  # else a comment that begins with "cat" would be taken for a command
    "cell_metadata_filter": "tags",
    "notebook_metadata_filter": "-all",
}
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
PAIR_HEADER = """\
# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

"""
EXPORT = "#| export"


class SyncError(Exception):
    """A problem that the author has to solve; its text says how."""


# ---------------------------------------------------------------- files


def write(path, text):
    """Write `text` in one step, and only where it differs from what is there."""
    data = text if isinstance(text, bytes) else text.encode()
    if path.exists() and path.read_bytes() == data:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(data)
    draft.replace(path)
    return True


def ruff(text, name, *arguments):
    """Run `text` through a ruff command; `name` is the file it is meant for."""
    command = [sys.executable, "-m", "ruff", *arguments, "--stdin-filename", name, "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SyncError(f"{name}: ruff cannot read it: {done.stderr.strip()}")
    return done.stdout


class Lesson:
    """Where the three forms of one lesson live."""

    def __init__(self, name):
        self.name = name
        self.number, self.stem = name.split("_", 1)
        self.notebook = ROOT / "notebooks" / f"{name}.ipynb"
        self.pair = ROOT / "notebooks" / "scripts" / f"{name}.py"
        self.module = ROOT / "paligemma" / f"{self.stem}.py"

    def read_notebook(self):
        return nbformat.read(self.notebook, as_version=4) if self.notebook.exists() else None

    def read_pair(self):
        return read_pair_text(self.pair.read_text()) if self.pair.exists() else None

    def title(self):
        """Topic, whole title, minutes and part, from the lesson's title cell."""
        nb = self.read_pair() or self.read_notebook()
        for cell in nb.cells:
            found = re.match(r"# (\d+) · (.+)\n+\*(\d+) minutes\* · (.+)", cell.source)
            if found and cell.cell_type == "markdown":
                _, title, minutes, part = found.groups()
                topic = title.split(":")[0].strip()
                part = part.strip().removeprefix("part ").replace(",", "")
                return {"topic": topic, "title": title, "minutes": int(minutes), "part": part}
        return {"topic": self.stem, "title": self.stem, "minutes": 0, "part": ""}


def lessons():
    """All lessons there are, by number."""
    names = {path.stem for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    names |= {path.stem for path in (ROOT / "notebooks" / "scripts").glob("[0-9][0-9]_*.py")}
    return [Lesson(name) for name in sorted(names)]


# ---------------------------------------------------------------- cells


def tags(cell):
    return list(cell.metadata.get("tags", []))


def essence(nb):
    """What counts as the lesson's content: type, source and tags of each cell.

    Navigation cells are generated, so their source does not count.
    """
    return [
        (cell.cell_type, "" if "navigation" in tags(cell) else cell.source, sorted(tags(cell)))
        for cell in nb.cells
    ]


def digest(nb):
    return hashlib.sha256(json.dumps(essence(nb)).encode()).hexdigest()


def read_pair_text(text):
    return jupytext.reads(text, fmt=PERCENT)


def pair_text(nb, name):
    """The pair of a notebook, formatted."""
    bare = nbformat.v4.new_notebook(cells=[nbformat.from_dict(dict(cell)) for cell in nb.cells])
    body = jupytext.writes(bare, fmt=PERCENT)
    body = re.sub(r"\A# ---\n.*?\n# ---\n+", "", body, flags=re.DOTALL)
    return ruff(PAIR_HEADER + body, f"notebooks/scripts/{name}.py", "format")


def difference(nb, other):
    """Index of the first cell in which two notebooks differ."""
    ours, theirs = essence(nb), essence(other)
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def edited_side(lesson, nb, pair, choice=None):
    """Which side holds the newer cells: "pair", "notebook" or, when they agree, None."""
    if nb is None or pair is None:
        return "pair" if nb is None else "notebook"
    if essence(nb) == essence(pair):
        return None
    if choice:
        return choice
    last = nb.metadata.get("paligemma", {}).get("digest")
    if digest(nb) == last:
        return "pair"
    if digest(pair) == last:
        return "notebook"
    raise SyncError(
        f"{lesson.name}: notebook and pair were both edited and disagree at cell "
        f"{difference(nb, pair)}; choose one with --from pair or --from notebook"
    )


def set_ids(nb):
    """Give each cell an id that follows from its content, so that diffs stay small."""
    seen = {}
    for cell in nb.cells:
        generated = "navigation" in tags(cell)
        text = "navigation" if generated else f"{cell.cell_type}\n{cell.source}"
        name = hashlib.sha256(text.encode()).hexdigest()[:8]
        seen[name] = seen.get(name, 0) + 1
        cell["id"] = name if seen[name] == 1 else f"{name}-{seen[name]}"


def build_notebook(cells, old):
    """A notebook of these cells; unchanged ones keep their metadata and outputs from `old`."""
    kept = {}
    for cell in old.cells if old else []:
        kept.setdefault((cell.cell_type, cell.source), []).append(cell)
    nb = nbformat.v4.new_notebook(cells=[])
    for cell in cells:
        before = kept.get((cell.cell_type, cell.source))
        before = before.pop(0) if before else None
        new = getattr(nbformat.v4, f"new_{cell.cell_type}_cell")(cell.source)
        new.metadata = nbformat.from_dict(dict(before.metadata if before else {}))
        for key in ("execution", "collapsed", "scrolled", "ExecuteTime", "trusted", "tags"):
            new.metadata.pop(key, None)
        if tags(cell):
            new.metadata["tags"] = tags(cell)
        if "solution" in tags(cell):
            new.metadata["jupyter"] = {"source_hidden": True}
        if cell.cell_type == "code" and before:
            new.outputs, new.execution_count = before.outputs, before.execution_count
        nb.cells.append(new)
    set_ids(nb)
    nb.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": {"name": "python"}, "paligemma": {}}
    )
    nb.metadata.paligemma["digest"] = digest(nb)
    nb.nbformat_minor = 5
    return nb


def notebook_text(nb):
    return nbformat.writes(nb).rstrip("\n") + "\n"


# ---------------------------------------------------------------- generated text


def repository():
    """The project's address, where pyproject.toml gives one."""
    found = re.search(r'^Repository = "(.+?)/?"$', (ROOT / "pyproject.toml").read_text(), re.M)
    return found.group(1) if found else None


def navigation(lesson, everyone, titles):
    """The line of links at the top and the foot of a lesson."""
    names = [other.name for other in everyone]
    at = names.index(lesson.name)
    links = []
    if at > 0:
        links.append(f"[← {titles[names[at - 1]]['topic']}]({names[at - 1]}.ipynb)")
    contents = "00_overview.ipynb" if "00_overview" in names else "../README.md"
    links.append(f"[contents]({contents})")
    if at + 1 < len(names):
        links.append(f"[{titles[names[at + 1]]['topic']} →]({names[at + 1]}.ipynb)")
    line = " | ".join(links)
    if address := repository():
        place = address.removeprefix("https://github.com/")
        file = f"notebooks/{lesson.name}.ipynb"
        line += (
            f"\n\n[![Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
            f"(https://colab.research.google.com/github/{place}/blob/main/{file}) "
            f"[![Binder](https://mybinder.org/badge_logo.svg)]"
            f"(https://mybinder.org/v2/gh/{place}/main?labpath={file})"
        )
    return line


def module_text(nb, lesson):
    """The module a notebook exports, or None where it exports nothing."""
    cells = [
        cell.source.split("\n", 1)[-1].strip("\n")
        for cell in nb.cells
        if cell.cell_type == "code" and cell.source.startswith(EXPORT)
    ]
    if not cells:
        return None
    docstring, imports, code = "", [], []
    for index, source in enumerate(cells):
        try:
            tree = ast.parse(source)
        except SyntaxError as error:
            raise SyncError(f"{lesson.name}: an exported cell is not Python: {error}") from None
        lines = source.split("\n")
        for node in tree.body:
            first, last = node.lineno - 1, node.end_lineno
            if isinstance(node, ast.Import | ast.ImportFrom):
                imports += lines[first:last]
            elif index == 0 and node is tree.body[0] and ast.get_docstring(tree) is not None:
                docstring = "\n".join(lines[first:last])
            else:
                continue
            lines[first:last] = [None] * (last - first)
        code.append("\n".join(line for line in lines if line is not None).strip("\n"))
    header = f"# Exported from notebooks/{lesson.name}.ipynb — edit there, then run `make sync`."
    parts = [header + "\n" + docstring, "\n".join(imports), *code]
    text = "\n\n".join(part for part in parts if part) + "\n"
    name = f"paligemma/{lesson.stem}.py"
    text = ruff(text, name, "check", "--fix-only", "--quiet", "--select", "I")
    return ruff(text, name, "format")


def readme_text(everyone, titles):
    """README.md with a fresh table of lessons, or None where it has no place for one."""
    path = ROOT / "README.md"
    text = path.read_text() if path.exists() else ""
    place = re.compile(r"(<!-- lessons -->\n).*?(<!-- /lessons -->)", re.DOTALL)
    if not place.search(text):
        return None
    rows = ["| part | | lesson | module | minutes |", "|---|---|---|---|---:|"]
    part = None
    for lesson in everyone:
        about = titles[lesson.name]
        shown, part = ("" if about["part"] == part else about["part"]), about["part"]
        link = f"[{about['title']}](notebooks/{lesson.name}.ipynb)"
        module = f"[`{lesson.stem}`](paligemma/{lesson.stem}.py)" if lesson.module.exists() else ""
        row = f"| {shown} | {lesson.number} | {link} | {module} | {about['minutes']} |"
        rows.append(row)
    table = "\n".join(rows)
    return place.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text)


# ---------------------------------------------------------------- running


def slim_png(raw):
    """A PNG without text chunks (they name versions); a photograph gets a palette of 256."""
    image = Image.open(io.BytesIO(raw)).convert("RGB")
    if len(raw) > PHOTOGRAPH:
        image = image.quantize(palette=image.quantize(256))  # the second time dithered
    out = io.BytesIO()
    image.save(out, "png", optimize=True)
    return out.getvalue()


def tidy_outputs(nb):
    """Take out of the outputs what differs from run to run."""
    count = 0
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        if cell.source.strip():
            count += 1
            cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = cell.execution_count
            if "image/png" in output.get("data", {}):
                raw = base64.b64decode(output.data["image/png"])
                output.data["image/png"] = base64.b64encode(slim_png(raw)).decode() + "\n"


def execute(lesson, nb):
    """Run a notebook in place and return the seconds it took."""
    client = NotebookClient(
        nb,
        timeout=10 * SECONDS,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(ROOT / "notebooks")}},
    )
    about = nbformat.from_dict(nb.metadata)
    start = time.perf_counter()
    try:
        client.execute(
            env=os.environ | {"PALIGEMMA_FIGURES": str(ROOT / "figures")},
            stderr=subprocess.DEVNULL,  # the kernel's own log; what cells write is in the outputs
        )
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise SyncError(f"{lesson.name}: a cell failed, outputs not stored\n{error}") from None
    seconds = time.perf_counter() - start
    nb.metadata = about  # without the versions that the kernel adds
    tidy_outputs(nb)
    for picture in (ROOT / "figures").glob(f"{lesson.name[:2]}_*.png"):
        if picture.stat().st_size > PHOTOGRAPH and Image.open(picture).mode != "P":
            picture.write_bytes(slim_png(picture.read_bytes()))
    return seconds


# ---------------------------------------------------------------- commands


def sync(lesson, everyone, titles, choice=None, run=False):
    """Bring one lesson's forms into step; returns a line that says what was done."""
    nb, pair = lesson.read_notebook(), lesson.read_pair()
    side = edited_side(lesson, nb, pair, choice)
    source = nb if side == "notebook" else pair
    for cell in source.cells:
        if "navigation" in tags(cell):
            cell.source = navigation(lesson, everyone, titles)
    text = pair_text(source, lesson.name)
    cells = read_pair_text(text).cells
    if [(c.cell_type, tags(c)) for c in cells] != [(c.cell_type, tags(c)) for c in source.cells]:
        raise SyncError(f"{lesson.name}: a cell holds a line that begins with %%; rewrite it")
    new = build_notebook(cells, nb)
    module = module_text(new, lesson)

    written = []
    if write(lesson.pair, text):
        written.append("pair")
    if write(lesson.notebook, notebook_text(new)):
        written.append("notebook")
    if module is not None and write(lesson.module, module):
        written.append("module")
    line = f"{lesson.name}: " + (f"wrote {', '.join(written)}" if written else "in step")
    if run:
        seconds = execute(lesson, new)
        write(lesson.notebook, notebook_text(new))
        line += f"; ran in {seconds:.1f} s"
        if seconds > SECONDS:
            raise SyncError(f"{line}: over the limit of {SECONDS} s")
    return line


def check(lesson, everyone, titles):
    """Lines that say where one lesson's forms disagree."""
    nb, pair = lesson.read_notebook(), lesson.read_pair()
    if nb is None or pair is None:
        missing = lesson.notebook if nb is None else lesson.pair
        return [f"{lesson.name}: {missing.relative_to(ROOT)} is missing"]
    try:
        side = edited_side(lesson, nb, pair)
    except SyncError as error:
        return [str(error)]
    problems = []
    if side:
        at = difference(nb, pair)
        problems.append(f"{lesson.name}: the {side} was edited alone (cell {at})")
    links = navigation(lesson, everyone, titles)
    for form, cells in (("notebook", nb.cells), ("pair", pair.cells)):
        if any(cell.source != links for cell in cells if "navigation" in tags(cell)):
            problems.append(f"{lesson.name}: navigation in the {form} is stale")
    module = module_text(nb, lesson)
    if module is not None:
        name = lesson.module.relative_to(ROOT)
        if not lesson.module.exists():
            problems.append(f"{lesson.name}: {name} is missing")
        elif lesson.module.read_text() != module:
            problems.append(f"{lesson.name}: {name} is not what the notebook exports")
    for index, cell in enumerate(nb.cells):
        if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None:
            problems.append(f"{lesson.name}: cell {index} was never run (sync with --execute)")
            break
    return problems


def stale_modules(everyone):
    """Modules that no notebook exports."""
    exported = set()
    for lesson in everyone:
        nb = lesson.read_notebook() or lesson.read_pair()
        if any(c.cell_type == "code" and c.source.startswith(EXPORT) for c in nb.cells):
            exported.add(lesson.module)
    modules = sorted((ROOT / "paligemma").glob("*.py"))
    return [
        f"{path.relative_to(ROOT)}: no notebook exports it"
        for path in modules
        if path not in exported and not path.name.startswith("__")
    ]


def write_figures(chosen, folder):
    for lesson in chosen:
        for index, cell in enumerate(lesson.read_notebook().cells):
            pictures = [
                output.data["image/png"]
                for output in cell.get("outputs", [])
                if "image/png" in output.get("data", {})
            ]
            for k, picture in enumerate(pictures):
                name = f"{lesson.name}-{index}" + (f"-{k}" if k else "") + ".png"
                write(folder / name, base64.b64decode(picture))
                print(folder / name)


def write_student(chosen, folder):
    for lesson in chosen:
        nb = lesson.read_notebook()
        nb.cells = [cell for cell in nb.cells if "solution" not in tags(cell)]
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nb.metadata.pop("paligemma", None)
        write(folder / lesson.notebook.name, notebook_text(nb))
    stored = ROOT / "notebooks" / "reference"
    if stored.exists():
        shutil.copytree(stored, folder / "reference", dirs_exist_ok=True)
    print(f"{len(chosen)} notebooks in {folder}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NN_stem", help="lessons (default: all)")
    parser.add_argument("--execute", action="store_true", help="run, and store the outputs")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    parser.add_argument(
        "--from",
        dest="choice",
        choices=["pair", "notebook"],
        help="which side wins where both were edited",
    )
    parser.add_argument("--figures", action="store_true", help="PNGs; the last argument is DIR")
    parser.add_argument("--student", action="store_true", help="copies; the last argument is DIR")
    options = parser.parse_intermixed_args(argv)

    names, folder = [Path(name).stem for name in options.names], None
    if options.figures or options.student:
        if not options.names:
            parser.error("--figures and --student need a folder")
        names, folder = names[:-1], Path(options.names[-1])
    everyone = lessons()
    known = {lesson.name: lesson for lesson in everyone}
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no such lesson: {', '.join(unknown)} (there are: {', '.join(known)})")
    chosen = [known[name] for name in names] if names else everyone

    if options.figures:
        return write_figures(chosen, folder)
    if options.student:
        return write_student(chosen, folder)

    titles = {lesson.name: lesson.title() for lesson in everyone}
    problems = []
    for lesson in chosen:
        try:
            if options.check:
                problems += check(lesson, everyone, titles)
            else:
                print(sync(lesson, everyone, titles, options.choice, options.execute), flush=True)
        except SyncError as error:
            problems.append(str(error))
    if not names:
        titles = {lesson.name: lesson.title() for lesson in everyone}
        table = readme_text(everyone, titles)
        if options.check:
            problems += stale_modules(everyone)
            if table is not None and table != (ROOT / "README.md").read_text():
                problems.append("README.md: the table of lessons is stale")
        elif table is not None and write(ROOT / "README.md", table):
            print("README.md: wrote the table of lessons")
    if problems:
        print("\n".join(problems), file=sys.stderr)
        if options.check:
            print("\nRun `make sync`, look at the result, and commit it.", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
