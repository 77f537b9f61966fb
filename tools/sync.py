"""Keep the three forms of a lesson in step: notebook, pair and module.

    notebooks/NN_stem.ipynb        what people open, with its outputs
    notebooks/scripts/NN_stem.py   the same cells as plain Python: what people review
    paligemma/stem.py              the cells that begin with `#| export` (tools/export.py)

Edit the notebook or the pair, then run this. Which of the two was edited is read from their
content: the notebook remembers a digest of the cells at the last sync. It also fills in what
follows from the files: numbers of lessons in titles and links, minutes, navigation, the README's
table. Examples:

    python tools/sync.py                         all lessons
    python tools/sync.py 09_rope --execute       one lesson, run, outputs stored
    python tools/sync.py --check                 write nothing, say what disagrees
"""

import argparse
import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from export import ExportError, module_text, ruff
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60  # a lesson that runs longer is split or made smaller
PHOTOGRAPH = 60_000  # bytes; line drawings compress to less
FOLDED = {"check", "solution", "hide-input"}  # tags of cells whose source JupyterLab folds
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
PERCENT = {
    "extension": ".py",
    "format_name": "percent",
    "comment_magics": False,  # else a comment that begins with "cat" would be taken for a command
    "cell_metadata_filter": "tags",
    "notebook_metadata_filter": "kernelspec",
}


def tags(cell):
    return set(cell.metadata.get("tags", []))


def write(path, text):
    """Write `text` where it differs from what is there; whether it did."""
    if path.exists() and path.read_text() == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text)
    draft.replace(path)
    return True


def minutes(nb):
    """How long a lesson takes: 200 words or 15 visible lines a minute, 4 minutes an exercise."""
    shown = [c for c in nb.cells if not tags(c) & (FOLDED | {"navigation", "map"})]
    prose = " ".join(c.source for c in shown if c.cell_type == "markdown")
    prose = re.sub(r"\]\([^)]*\)|</?[a-z]+>", " ", prose)  # addresses and HTML tags aren't read
    code = [line for c in shown if c.cell_type == "code" for line in c.source.split("\n")]
    lines = sum(bool(line.strip()) for line in code)
    exercises = sum("exercise" in tags(c) for c in shown)
    return max(5, 5 * round((len(prose.split()) / 200 + lines / 15 + 4 * exercises) / 5))


class Course:
    """All lessons that there are, by number; what their texts say of each other."""

    def __init__(self):
        found = {p.stem for f in ("*.ipynb", "scripts/*.py") for p in (ROOT / "notebooks").glob(f)}
        self.names = sorted(name for name in found if re.match(r"\d\d_", name))
        self.numbers = {name[3:]: name[:2] for name in self.names}
        self.about = {name: self.read_title(name) for name in self.names}

    def read(self, name):
        """Notebook and pair of a lesson, each None where it's missing."""
        notebook, pair = ROOT / f"notebooks/{name}.ipynb", ROOT / f"notebooks/scripts/{name}.py"
        nb = nbformat.read(notebook, as_version=4) if notebook.exists() else None
        return nb, jupytext.reads(pair.read_text(), fmt=PERCENT) if pair.exists() else None

    def read_title(self, name):
        """Title, topic and part, from the lesson's title cell."""
        nb, pair = self.read(name)
        for cell in (pair or nb or nbformat.v4.new_notebook()).cells:
            if found := re.match(r"# \d+ · (.+)\n+\*\d+ minutes\* · (.+)", cell.source):
                part = found[2].strip().removeprefix("part ").replace(",", "")
                return {"title": found[1], "topic": found[1].split(":")[0].strip(), "part": part}
        return {"title": name[3:], "topic": name[3:], "part": ""}

    def navigation(self, name):
        """The line of links at the top and the foot of a lesson."""
        at = self.names.index(name)
        before, after = self.names[:at][-1:], self.names[at + 1 :][:1]
        contents = "00_overview.ipynb" if "overview" in self.numbers else "../README.md"
        links = [f"[← {self.about[n]['topic']}]({n}.ipynb)" for n in before]
        links += [f"[contents]({contents})"]
        return " | ".join(links + [f"[{self.about[n]['topic']} →]({n}.ipynb)" for n in after])

    def contents(self):
        """All lessons by part, with links: a cell of lesson 00."""
        parts = {}
        for name in self.names:
            link = f"[{name[:2]} {self.about[name]['topic']}]({name}.ipynb)"
            parts.setdefault(self.about[name]["part"], []).append(link)
        lines = [f"**{part}**: {', '.join(links)}." for part, links in parts.items()]
        return "\n\n".join(["## Contents", *lines])

    def link(self, found):
        """`[lesson 9](09_rope.ipynb)` with the number that the stem has today."""
        number = self.numbers.get(found["stem"])
        return f"[{found['word']}{number}]({number}_{found['stem']}.ipynb)" if number else found[0]

    def fill_in(self, name, nb):
        """Write numbers, minutes and navigation into a lesson's cells."""
        for cell in nb.cells:
            if "navigation" in tags(cell):
                cell.source = self.navigation(name)
            elif cell.source.startswith("## Contents\n"):
                cell.source = self.contents()
            elif cell.cell_type == "markdown":
                text = re.sub(r"\A# \d+ · ", f"# {name[:2]} · ", cell.source)
                text = re.sub(r"^\*\d+ minutes\* ·", f"*{minutes(nb)} minutes* ·", text, flags=re.M)
                word = r"\[(?P<word>[Ll]essons? )?(?:\d+)\]\(\d\d_(?P<stem>\w+)\.ipynb\)"
                cell.source = re.sub(word, lambda m: self.link(m).replace("None", ""), text)
        return nb

    def readme(self):
        """README.md with a fresh table of lessons."""
        rows, part = ["| part | | lesson | module | minutes |", "|---|---|---|---|---:|"], None
        for name in self.names:
            about = self.about[name]
            shown, part = ("" if about["part"] == part else about["part"]), about["part"]
            exists = (ROOT / f"paligemma/{name[3:]}.py").exists()
            module = f"[`{name[3:]}`](paligemma/{name[3:]}.py)" if exists else ""
            nb, pair = self.read(name)
            link = f"[{about['title']}](notebooks/{name}.ipynb)"
            rows.append(f"| {shown} | {name[:2]} | {link} | {module} | {minutes(pair or nb)} |")
        place = r"(<!-- lessons -->\n).*?(<!-- /lessons -->)"
        table, text = "\n".join(rows), (ROOT / "README.md").read_text()
        return re.sub(place, lambda m: f"{m[1]}\n{table}\n\n{m[2]}", text, flags=re.S)


def essence(nb):
    """What counts as a lesson's content: type, source and tags of each cell."""
    return [(cell.cell_type, cell.source, sorted(tags(cell))) for cell in nb.cells]


def digest(nb):
    return hashlib.sha256(json.dumps(essence(nb)).encode()).hexdigest()


def newer(name, nb, pair, choice=None):
    """The side that was edited, the notebook or the pair."""
    if nb is None or pair is None or essence(nb) == essence(pair):
        return pair or nb
    last = nb.metadata.get("paligemma", {}).get("digest")
    edited = {digest(nb): "pair", digest(pair): "notebook"}.get(last)
    if side := choice or edited:
        return pair if side == "pair" else nb
    raise ExportError(
        f"{name}: notebook and pair were both edited and disagree at cell {difference(nb, pair)}; "
        "choose one with --from pair or --from notebook"
    )


def difference(nb, pair):
    """Index of the first cell in which the two differ."""
    pairs = enumerate(zip(essence(nb), essence(pair), strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(nb.cells), len(pair.cells)))


def pair_text(name, nb):
    bare = nbformat.v4.new_notebook(cells=[nbformat.from_dict(dict(c)) for c in nb.cells])
    bare.metadata["kernelspec"] = KERNEL
    text = re.sub(r"^# +\w+_version: .*\n", "", jupytext.writes(bare, fmt=PERCENT), flags=re.M)
    return ruff(text, f"notebooks/scripts/{name}.py", "format")


def build_notebook(cells, old):
    """A notebook of these cells; outputs of cells that did not change come from `old`."""
    kept = {}
    for cell in old.cells if old else []:
        kept.setdefault((cell.cell_type, cell.source), []).append(cell)
    nb = nbformat.v4.new_notebook()
    for index, cell in enumerate(cells):
        before = kept.get((cell.cell_type, cell.source))
        before = before.pop(0) if before else None
        new = getattr(nbformat.v4, f"new_{cell.cell_type}_cell")(cell.source, id=f"cell-{index}")
        if tags(cell):
            new.metadata["tags"] = list(cell.metadata["tags"])
        if tags(cell) & FOLDED:
            new.metadata["jupyter"] = {"source_hidden": True}
        if cell.cell_type == "code" and before:
            new.outputs, new.execution_count = before.outputs, before.execution_count
        nb.cells.append(new)
    about = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    nb.metadata = nbformat.from_dict(about | {"paligemma": {"digest": digest(nb)}})
    nb.nbformat_minor = 5
    return nb


def slim_png(raw):
    """A PNG without text chunks (they name versions); a photograph gets a palette of 256."""
    image = Image.open(io.BytesIO(raw)).convert("RGB")
    if len(raw) > PHOTOGRAPH:
        image = image.quantize(256)  # not dithered: flat colours stay flat
    out = io.BytesIO()
    image.save(out, "png", optimize=True)
    return out.getvalue()


def execute(name, nb):
    """Run a notebook in place, with small pictures; the seconds it took."""
    about, start = nbformat.from_dict(nb.metadata), time.perf_counter()
    where = {"metadata": {"path": str(ROOT / "notebooks")}}
    client = NotebookClient(nb, timeout=10 * SECONDS, record_timing=False, resources=where)
    client.coalesce_streams = True
    try:  # the kernel's own log goes nowhere; what cells write is in the outputs
        environment = os.environ | {"PALIGEMMA_FIGURES": str(ROOT / "figures")}
        client.execute(env=environment, stderr=subprocess.DEVNULL)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise ExportError(f"{name}: a cell failed, outputs not stored\n{error}") from None
    seconds = time.perf_counter() - start
    nb.metadata = about  # without the versions that the kernel adds
    for output in (o for cell in nb.cells for o in cell.get("outputs", [])):
        if "image/png" in output.get("data", {}):
            raw = base64.b64decode(output.data["image/png"])
            output.data["image/png"] = base64.b64encode(slim_png(raw)).decode() + "\n"
    for picture in (ROOT / "figures").glob(f"{name[:2]}_*.png"):
        if picture.stat().st_size > PHOTOGRAPH and Image.open(picture).mode != "P":
            picture.write_bytes(slim_png(picture.read_bytes()))
    return seconds


def sync(course, name, choice=None, run=False):
    """Bring one lesson's forms into step; a line that says what was done."""
    nb, pair = course.read(name)
    filled = course.fill_in(name, newer(name, nb, pair, choice))
    text = pair_text(name, filled)
    source = jupytext.reads(text, fmt=PERCENT)
    if [c.cell_type for c in source.cells] != [c.cell_type for c in filled.cells]:
        raise ExportError(f"{name}: a cell holds a line that begins with %%; rewrite it")
    new = build_notebook(source.cells, nb)
    module = module_text([c.source for c in new.cells if c.cell_type == "code"], name)
    files = {"pair": (f"notebooks/scripts/{name}.py", text)}
    files["notebook"] = (f"notebooks/{name}.ipynb", nbformat.writes(new).rstrip("\n") + "\n")
    if module is not None:
        files["module"] = (f"paligemma/{name[3:]}.py", module)
    written = [form for form, (path, text) in files.items() if write(ROOT / path, text)]
    line = f"{name}: " + (f"wrote {', '.join(written)}" if written else "in step")
    if run:
        seconds = execute(name, new)
        write(ROOT / files["notebook"][0], nbformat.writes(new).rstrip("\n") + "\n")
        line += f"; ran in {seconds:.1f} s"
        if seconds > SECONDS:
            raise ExportError(f"{line}: over the limit of {SECONDS} s")
    return line


def check(course, name):
    """Lines that say where one lesson's forms disagree."""
    nb, pair = course.read(name)
    if nb is None or pair is None:
        return [f"{name}: the {'notebook' if nb is None else 'pair'} is missing"]
    if essence(nb) != essence(pair):
        return [f"{name}: notebook and pair disagree at cell {difference(nb, pair)}"]
    problems = []
    if essence(course.fill_in(name, nbformat.from_dict(nb))) != essence(pair):
        problems.append(f"{name}: numbers, minutes or navigation are stale")
    module, path = module_text([c.source for c in nb.cells if c.cell_type == "code"], name), None
    if module is not None:
        path = ROOT / f"paligemma/{name[3:]}.py"
        if not path.exists() or path.read_text() != module:
            problems.append(f"{name}: paligemma/{name[3:]}.py is not what the notebook exports")
    code = [(i, c) for i, c in enumerate(nb.cells) if c.cell_type == "code" and c.source.strip()]
    unrun = [i for i, cell in code if cell.execution_count is None]
    return problems + [f"{name}: cell {i} was never run (sync with --execute)" for i in unrun[:1]]


def main(argv=None):
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    add = parser.add_argument
    add("names", nargs="*", metavar="NN_stem", help="lessons (default: all)")
    add("--execute", action="store_true", help="run, and store the outputs")
    add("--check", action="store_true", help="write nothing; exit 1 if stale")
    add("--from", dest="choice", choices=["pair", "notebook"], help="where both were edited")
    options = parser.parse_args(argv)
    course = Course()
    names = [Path(name).stem for name in options.names] or course.names
    if unknown := [name for name in names if name not in course.names]:
        parser.error(f"no such lesson: {', '.join(unknown)} (there are: {', '.join(course.names)})")
    problems = []
    for name in names:
        try:
            if options.check:
                problems += check(course, name)
            else:
                print(sync(course, name, options.choice, options.execute), flush=True)
        except ExportError as error:
            problems.append(str(error))
    if not options.names:
        for path in sorted((ROOT / "paligemma").glob("[!_]*.py")):
            if path.stem not in course.numbers:
                problems.append(f"{path.relative_to(ROOT)}: no notebook exports it")
        if options.check and course.readme() != (ROOT / "README.md").read_text():
            problems.append("README.md: the table of lessons is stale")
        elif not options.check and write(ROOT / "README.md", course.readme()):
            print("README.md: wrote the table of lessons")
    if problems:
        end = "\n\nRun `make sync`, look at the result, and commit it." if options.check else ""
        print("\n".join(problems) + end, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
