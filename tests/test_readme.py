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


HOSTILE = {  # rows of the README: families of the fuzzer
    "checkpoints, configs, tokenizers, adapters": (
        "checkpoints configs settings tokenizers quantised adapters"
    ),
    "pictures": "pictures",
    "mask codecs, data sets, states of training": "codecs datasets resumes",
    "prompts and answers": "texts",
    "arguments and command lines": "options commands",
}


def trust_table() -> str:
    """What `make fuzz` and `make faults` counted last, as the README shows it."""
    fuzz = json.loads((ROOT / "tests/fuzz/table.json").read_text())["families"]
    lines = [
        "| hostile | tried | one clear error | right result | failed |",
        "|---|---:|---:|---:|---:|",
    ]
    for row, families in (HOSTILE | {"all (`make fuzz`)": "all"}).items():
        counts = [fuzz[family] for family in families.split()]
        tried, clear, right = (sum(c[key] for c in counts) for key in ("tried", "clear", "right"))
        lines.append(f"| {row} | {tried:,} | {clear:,} | {right:,} | {tried - clear - right} |")
    faults = json.loads((ROOT / "tests/faults/table.json").read_text())["kinds"]
    harms = dict.fromkeys(harm for kind in faults.values() for harm in kind)
    lines += ["", "| saving or training | tried | nothing lost or mixed |", "|---|---:|---:|"]
    total = [0, 0]
    for harm in harms:
        rows = [kind[harm] for kind in faults.values() if harm in kind]
        tried, survived = (sum(row[key] for row in rows) for key in ("tried", "survived"))
        total = [total[0] + tried, total[1] + survived]
        lines.append(f"| {harm} | {tried:,} | {survived:,} |")
    return "\n".join([*lines, f"| all (`make faults`) | {total[0]:,} | {total[1]:,} |"])


def test_hostile_files_and_faults_are_those_that_were_counted():
    (shown,) = re.findall(r"<!-- trust -->\n(.*?)\n<!-- /trust -->", README, re.DOTALL)
    assert shown == trust_table(), f"copy this into the README:\n{trust_table()}"
    fuzz = json.loads((ROOT / "tests/fuzz/table.json").read_text())["families"]
    named = " ".join(HOSTILE.values()).split()
    assert sorted(named) == sorted(fuzz.keys() - {"all"}), "a family is in no row"
