"""Store the reference numbers that the lessons compare themselves with.

A test file `tests/test_stem.py` may hold

    def reference() -> dict[str, torch.Tensor]: ...

which computes small tensors (weights, inputs, outputs) with the public implementation, seeded.
This writes them to notebooks/reference/stem.safetensors, so that a lesson needs neither that
implementation nor its time. Examples:

    python tools/reference.py rope          write one
    python tools/reference.py               write all
    python tools/reference.py --check       compare only; exit 1 on a difference
"""

import argparse
import ast
import importlib.util
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-5  # the bar of every comparison here: processors round differently
sys.path.append(str(ROOT / "tests"))  # tests import random_models from there


def stored_path(stem):
    return ROOT / "notebooks" / "reference" / f"{stem}.safetensors"


def stems():
    """The lessons whose test file defines `reference`, found without importing it."""
    found = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        names = [n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
        if "reference" in names:
            found.append(path.stem.removeprefix("test_"))
    return found


def compute(stem):
    """Run `reference()` of tests/test_stem.py."""
    path = ROOT / "tests" / f"test_{stem}.py"
    spec = importlib.util.spec_from_file_location(f"reference_{stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.no_grad():
        tensors = module.reference()
    return {name: tensor.detach().contiguous() for name, tensor in sorted(tensors.items())}


def differences(stem):
    """Lines that say where the stored file differs from a fresh run."""
    path, name = stored_path(stem), f"reference/{stem}.safetensors"
    if not path.exists():
        return [f"{name} is missing"]
    stored, fresh = load_file(path), compute(stem)
    lines = [f"{name}: {key} is only in the file" for key in sorted(stored.keys() - fresh.keys())]
    lines += [f"{name}: {key} is not in the file" for key in sorted(fresh.keys() - stored.keys())]
    for key in sorted(fresh.keys() & stored.keys()):
        a, b = stored[key], fresh[key]
        if a.shape != b.shape or a.dtype != b.dtype:
            kinds = f"{a.dtype}{list(a.shape)}, now {b.dtype}{list(b.shape)}"
            lines.append(f"{name}: {key} is {kinds}")
        elif not torch.allclose(a.double(), b.double(), rtol=TOLERANCE, atol=TOLERANCE):
            gap = (a.double() - b.double()).abs().max()
            lines.append(f"{name}: {key} differs by {gap:.1e}")
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stems", nargs="*", metavar="stem", help="lessons (default: all)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    options = parser.parse_args(argv)
    if unknown := sorted(set(options.stems) - set(stems())):
        parser.error(f"no reference() in the tests of: {', '.join(unknown)}")

    problems = []
    for stem in options.stems or stems():
        lines = differences(stem)
        problems += lines
        if lines and not options.check:
            data = save(compute(stem))
            stored_path(stem).parent.mkdir(parents=True, exist_ok=True)
            stored_path(stem).write_bytes(data)
            print(f"reference/{stem}.safetensors: wrote {len(data) / 1024:.0f} KB")
    if options.check and problems:
        print("\n".join(problems), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
