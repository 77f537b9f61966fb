"""What the README says is true: its code runs, its options exist, its links lead somewhere."""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest

from paligemma.checkpoint import load_model
from paligemma.support import coco_command, command_line, train_command
from paligemma.training import JsonlDataset

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


PARSERS = {
    "python inference.py": command_line.make_parser,
    "paligemma": command_line.make_parser,
    "paligemma-coco": coco_command.make_parser,
    "paligemma-train": train_command.make_parser,
}


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith(tuple(PARSERS))])
def test_options_exist(command):
    words = shlex.split(command)
    name = words.pop(0)
    if name == "python":
        name = f"python {words.pop(0)}"
        assert (ROOT / name.split()[1]).is_file()
    PARSERS[name]().parse_args(words)  # exits on an unknown option


def test_commands_are_installed():
    text = (ROOT / "pyproject.toml").read_text()
    for name in PARSERS:
        if not name.startswith("python"):
            module = PARSERS[name].__module__
            assert f'\n{name} = "{module}:main"\n' in text
            assert any(command.startswith(f"{name} ") for command in commands())


def test_lines_to_learn_from_are_as_shown(tmp_path):
    (line,) = blocks("json")
    (tmp_path / json.loads(line)["image"]).touch()
    (tmp_path / "mine.jsonl").write_text(line)
    assert len(JsonlDataset(tmp_path)) == 1


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
