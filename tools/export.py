"""Make a module of a notebook's `#| export` cells.

The later definition wins, as in Python: an exported cell that defines a name again replaces the
earlier cell's definition at that one's place, and a function marked `@add_to_class(Model)` is
written into the body of `Model`. So a lesson can grow a class, and the module reads as if written
by hand.
"""

import ast
import subprocess
import sys
import textwrap
from typing import Any

EXPORT = "#| export"


class ExportError(Exception):
    """A problem that the author has to solve; its text says how."""


def ruff(text: str, name: str, *arguments: str) -> str:
    """Run `text` through a ruff command; `name` is the file that it is meant for."""
    command = [sys.executable, "-m", "ruff", *arguments, "--stdin-filename", name, "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise ExportError(f"{name}: ruff cannot read it: {done.stderr.strip()}")
    return done.stdout


def statements(source: str) -> list[tuple[Any, str]]:
    """Each top-level statement of a cell with its text: the comments above it, decorators, body."""
    lines, found, end = source.split("\n"), [], 0
    for node in ast.parse(source).body:
        found.append((node, "\n".join(lines[end : node.end_lineno])))
        end = node.end_lineno
    if found and (rest := "\n".join(lines[end:]).strip("\n")):
        found[-1] = (found[-1][0], found[-1][1] + "\n" + rest)
    return found


def name_of(node: ast.stmt) -> str | None:
    """The name that a statement defines, if it is one."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    target = None
    if isinstance(node, ast.Assign | ast.AnnAssign):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    return target.id if isinstance(target, ast.Name) else None


def class_to_grow(node: Any) -> str | None:
    """`Model` for a function whose first decorator is `@add_to_class(Model)`."""
    for first in getattr(node, "decorator_list", [])[:1]:
        if isinstance(first, ast.Call) and getattr(first.func, "id", "") == "add_to_class":
            return ast.unparse(first.args[0])
    return None


def with_method(class_text: str, name: str, method: str) -> str:
    """A class's text with a method added at its end, or put in place of the one of that name."""
    lines = class_text.split("\n")
    body = next(n for n in ast.parse(class_text).body if isinstance(n, ast.ClassDef)).body
    start = end = body[-1].end_lineno
    for before, node in zip([None, *body], body):
        if getattr(node, "name", None) == name:
            start, end = before.end_lineno if before else node.lineno - 1, node.end_lineno
    return "\n".join([*lines[:start], "", textwrap.indent(method, "    "), *lines[end:]])


def module_text(cells: list[str], name: str) -> str | None:
    """The module that these code cells export, or None where they export nothing.

    Args:
        cells: sources of a notebook's code cells.
        name: of the notebook, NN_stem.
    """
    exported = [s.removeprefix(EXPORT).strip("\n") for s in cells if s.startswith(EXPORT)]
    if not exported:
        return None
    docstring, imports, texts = "", [], {}
    for number, source in enumerate(exported):
        try:
            found = statements(source)
        except SyntaxError as error:
            raise ExportError(f"{name}: an exported cell is not Python: {error}") from None
        if number == 0 and ast.get_docstring(ast.parse(source)) is not None:
            docstring = found.pop(0)[1].strip("\n")
        for place, (node, text) in enumerate(found):
            if isinstance(node, ast.Import | ast.ImportFrom):
                imports.append(text)
            elif grown := class_to_grow(node):
                if grown not in texts:
                    raise ExportError(f"{name}: no exported class {grown} to add {node.name} to")
                mark = ast.unparse(node.decorator_list[0])
                method = "\n".join(t for t in text.split("\n") if t != f"@{mark}")
                texts[grown] = with_method(texts[grown], node.name, method.strip("\n"))
            else:
                key = name_of(node) or (number, place)
                before = texts.get(key, text if place else "\n" + text)
                gap = before[: len(before) - len(before.lstrip("\n"))]  # blank lines above it
                texts[key] = gap + text.lstrip("\n")
    header = f"# Exported from notebooks/{name}.ipynb — edit there, then run `make sync`."
    parts = [f"{header}\n{docstring}", "\n".join(imports), "\n".join(texts.values())]
    path = f"paligemma/{name[3:]}.py"
    text = "\n\n".join(part for part in parts if part) + "\n"
    return ruff(ruff(text, path, "check", "--fix-only", "-q", "--select", "I"), path, "format")
