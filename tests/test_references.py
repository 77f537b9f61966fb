"""The stored reference numbers are what the reference implementation gives today."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]


def load_tool():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "tools" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


@pytest.mark.parametrize("stem", tool.stems())
def test_stored_reference_is_fresh(stem):
    assert not tool.differences(stem)


def test_every_stored_reference_has_a_source():
    stored = {path.stem for path in (ROOT / "notebooks" / "reference").glob("*.safetensors")}
    assert not stored - set(tool.stems()), "no test file computes these"


def test_tool_writes_and_notices(tmp_path, capsys):
    fresh = load_tool()
    fresh.ROOT = tmp_path
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_toy.py").write_text(
        "import torch\n\ndef reference():\n    return {'x': torch.ones(2), 'n': torch.arange(3)}\n"
    )
    (tmp_path / "tests" / "test_other.py").write_text("def test_it():\n    pass\n")
    assert fresh.stems() == ["toy"]
    assert fresh.main(["--check"]) == 1
    assert "reference/toy.safetensors is missing" in capsys.readouterr().err
    assert fresh.main([]) == 0 and fresh.main(["--check"]) == 0

    path = tmp_path / "notebooks" / "reference" / "toy.safetensors"
    good = load_file(path)
    for change, words in (
        ({"x": torch.ones(2) + 1e-4}, "x differs by 1.0e-04"),
        ({"x": torch.ones(3)}, "x is torch.float32[3], now torch.float32[2]"),
        ({"y": torch.ones(1)}, "y is only in the file"),
    ):
        save_file(good | change, path)
        assert fresh.main(["--check"]) == 1
        assert words in capsys.readouterr().err
    save_file({"x": torch.ones(2)}, path)
    assert fresh.main(["--check"]) == 1 and "n is not in the file" in capsys.readouterr().err
    save_file(good | {"x": torch.ones(2) + 1e-7}, path)
    assert fresh.main(["--check"]) == 0
