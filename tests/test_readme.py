"""What the README says is true: its code runs, its options exist, its links lead somewhere."""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest

from paligemma.checkpoint import load_model
from paligemma.support.command_line import make_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    """Every command line of the README, continuation lines joined."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines]


def test_python_example_prints_what_the_readme_shows(monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,), (shown,) = blocks("python"), blocks("text")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    assert out.getvalue().strip() == shown.strip()


@pytest.mark.parametrize("command", [c for c in commands() if "inference.py" in c])
def test_options_exist(command):
    words = shlex.split(command)
    assert words[:2] == ["python", "inference.py"] and (ROOT / words[1]).is_file()
    make_parser().parse_args(words[2:])  # exits on an unknown option


def test_figures_of_the_shipped_model_are_those_of_its_card():
    card = (ROOT / "paligemma/assets/tiny/README.md").read_text()
    (shown,) = re.findall(r"<!-- tiny -->\n(.*?)\n<!-- /tiny -->", README, re.DOTALL)
    assert len(shown.splitlines()) > 5 and shown in card
    curves = json.loads((ROOT / "paligemma/assets/tiny/curves.json").read_text())
    text = " ".join(README.split())
    assert f"trained in {curves['seconds'] / 60:.0f} minutes" in text
    parameters = sum(p.numel() for p in load_model(ROOT / "paligemma/assets/tiny").parameters())
    assert f"{parameters / 1e6:.1f} million parameters" in text


def test_make_targets_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    named = re.findall(r"\bmake ([a-z]+)", "\n".join(commands()) + README)
    assert {"demo", "test", "lab"} <= set(named) <= set(targets)


def test_links_resolve():
    links = [t for t in re.findall(r"\]\(([^)]+)\)", README) if not t.startswith("https://")]
    assert len(links) > 20  # the lessons are among them
    missing = [link for link in links if not (ROOT / link.split("#")[0]).exists()]
    assert not missing


def test_files_that_the_readme_names_exist():
    named = re.findall(r"`((?:tools|tests|paligemma)/[\w./-]+)`", README)
    assert named
    missing = [name for name in named if "stem" not in name and not (ROOT / name).exists()]
    assert not missing
