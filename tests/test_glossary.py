"""The glossary of lesson 00: each term is defined where it says, and used nowhere before."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))}
ROW = re.compile(r"^\| ([^|]+) \| \[(\d\d)\]\((\w+)\.ipynb\) \| [^|]+ \|$", re.MULTILINE)
# Words of plain English, which a lesson may use in their plain sense before the technical one.
PLAIN = {"adapter", "gate", "greedy", "head", "label", "nucleus", "precision", "query, key, value"}
PLAIN |= {"rank", "recall", "suffix"}


def prose(path):
    """A lesson's text as it is read: no code, formulas, links to other lessons or addresses."""
    cells = nbformat.read(path, as_version=4).cells
    shown = [c for c in cells if c.cell_type == "markdown"]
    shown = [c.source for c in shown if "navigation" not in c.metadata.get("tags", [])]
    text = "\n".join(cell for cell in shown if not cell.startswith("## References"))
    text = re.sub(r"```.*?```|`[^`]*`|\$[^$]*\$", " ", text, flags=re.DOTALL)
    return re.sub(r"\[[^\]]*\]\([^)]*\)", " ", text)


def glossary():
    cells = nbformat.read(NOTEBOOKS["00_overview"], as_version=4).cells
    source = next(c.source for c in cells if c.source.startswith("## Glossary"))
    return [(term, stem) for term, _, stem in ROW.findall(source)]


def pattern(term):
    """Finds a term and its plural; small letters also find a capital one at a sentence's start."""
    words = [re.escape(part) for part in term.split(", ")]
    words = [f"[{w[0]}{w[0].upper()}]{w[1:]}" if w[0].islower() else w for w in words]
    return re.compile(rf"(?<![\w-])(?:{'|'.join(words)})s?(?![\w-])")


def test_the_glossary_is_whole():
    terms = [term for term, _ in glossary()]
    assert len(terms) > 60 and terms == sorted(terms, key=str.lower)


@pytest.mark.parametrize(("term", "stem"), glossary(), ids=lambda value: value)
def test_a_term_is_defined_before_it_is_used(term, stem):
    assert stem in NOTEBOOKS, f"there is no lesson {stem}"
    found = pattern(term)
    assert found.search(prose(NOTEBOOKS[stem])), f"{stem} never says {term!r}"
    earlier = [name for name in NOTEBOOKS if "00_overview" < name < stem and term not in PLAIN]
    used = [name for name in earlier if found.search(prose(NOTEBOOKS[name]))]
    assert not used, f"{term!r} is defined in {stem} and used before in {', '.join(used)}"


def test_a_use_before_the_definition_is_found():
    assert pattern("logits").search("The logits are")
    assert pattern("causal mask").search("Causal masks hide")
    assert pattern("query, key, value").search("a key")
    assert not pattern("token").search("tokenizer") and not pattern("RoPE").search("rope")
