"""Directories of quantised weights: nothing lost on the way to a file, nothing taken on trust."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_models import random_batch
from safetensors.torch import load_file, save_file

from paligemma.checkpoint import CheckpointError, load_model, save_model
from paligemma.quantization import (
    Int4Linear,
    kernel_block,
    pack_int4,
    quantize_model,
    unpack_int4,
)
from paligemma.support.quantized import load_quantized, read_quantization, save_quantized

ROOT = Path(__file__).resolve().parents[2]
MODES = ("int8", "int4")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["MQA", "gemma2"])
def test_saved_and_loaded_is_the_same(checkpoints, gemma2_checkpoint, mode, kind, tmp_path):
    path = gemma2_checkpoint if kind == "gemma2" else checkpoints[kind]
    model = load_quantized(path, mode)
    again = quantize_model(load_model(path), mode)
    save_quantized(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_quantized(tmp_path)
    batch = random_batch()
    with torch.no_grad():
        logits = [m(**batch).logits for m in (model, again, loaded, load_quantized(tmp_path, mode))]
    assert all(torch.equal(logits[0], other) for other in logits[1:])
    assert not loaded.training
    with pytest.raises(CheckpointError, match="was quantised by this package"):
        load_model(tmp_path)
    other = {"int8": "int4", "int4": "int8"}[mode]
    with pytest.raises(CheckpointError, match=f"mode '{mode}', not '{other}'"):
        load_quantized(tmp_path, other)


def test_a_file_of_another_machine_is_repacked(checkpoints, tmp_path):
    model = load_quantized(checkpoints["MQA"], "int4")
    here = kernel_block() or 64
    there = 96 - here
    for layer in model.modules():
        if isinstance(layer, Int4Linear):
            layer.qweight, layer.block = (
                pack_int4(unpack_int4(layer.qweight, here), there),
                there,
            )
    save_quantized(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["block"]
    assert read_quantization(tmp_path)["block"] == there
    loaded = load_quantized(tmp_path)
    assert {layer.block for layer in loaded.modules() if isinstance(layer, Int4Linear)} == {here}
    batch = random_batch()
    with torch.no_grad():
        expected = load_quantized(checkpoints["MQA"], "int4")(**batch).logits
        assert torch.equal(loaded(**batch).logits, expected)


def test_stored_type_and_asked_type(tmp_path, checkpoints):
    save_model(load_model(checkpoints["MQA"], dtype=torch.bfloat16), tmp_path)
    model = load_quantized(tmp_path, "int8")
    assert model.dtype == model.language_model.head.scales.dtype == torch.bfloat16
    model = load_quantized(tmp_path, "int8", dtype=torch.float32)
    assert model.dtype == model.language_model.head.scales.dtype == torch.float32
    model = load_quantized(checkpoints["MQA"], "int4", dtype=torch.bfloat16)
    kinds = {t.dtype for t in model.state_dict().values()}
    assert kinds == {torch.bfloat16, torch.uint8, torch.int8}  # int8: the vision tower


def test_weights_stored_in_two_types(checkpoints, tmp_path):
    model = load_model(checkpoints["MQA"])
    model.language_model.bfloat16()
    save_model(model, tmp_path)
    with pytest.raises(ValueError, match="the weights are bfloat16 and float32; give one dtype"):
        load_quantized(tmp_path, "int8")
    assert load_quantized(tmp_path, "int8", dtype="bfloat16").dtype == torch.bfloat16


@pytest.fixture
def saved(checkpoints, tmp_path):
    save_quantized(load_quantized(checkpoints["MQA"], "int4"), tmp_path)
    return tmp_path


def edit(path, change):
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q.update(quant_method="gptq"),
        lambda q: q.update(mode="int3"),
        lambda q: q.update(block=7),
        lambda q: q.update(group_size=31),
        lambda q: q.update(group_size=32),
        lambda q: q.update(mode="int8"),
        lambda q: q.update(group_size="64"),
        lambda q: q.pop("group_size"),
        lambda q: q.pop("mode"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(saved, change):
    edit(saved, change)
    with pytest.raises(CheckpointError):
        load_quantized(saved)


def test_a_file_that_does_not_fit_is_refused(saved):
    file = saved / "model.safetensors"
    whole = load_file(file)
    name = next(n for n in whole if n.endswith("down_proj.qweight"))
    norm = next(n for n in whole if n.endswith("input_layernorm.weight"))
    for broken, words in (
        ({n: t for n, t in whole.items() if n != name}, "lacks 1 of .*down_proj.qweight"),
        (whole | {"extra": torch.zeros(1)}, "holds extra, for which this model has no place"),
        (whole | {name: whole[name][:32].clone()}, r"down_proj.qweight is \[32, .*expected \[64"),
        (whole | {name: whole[name].float()}, "is torch.float32; expected torch.uint8"),
        (whole | {name: whole[name].to(torch.int16)}, "is torch.int16; expected torch.uint8"),
        (whole | {norm: whole[norm].to(torch.int8)}, "is torch.int8; expected float32, bfloat16"),
    ):
        save_file(broken, file)
        with pytest.raises(CheckpointError, match=words):
            load_quantized(saved)
    save_file(whole | {norm: whole[norm].bfloat16()}, file)
    with pytest.raises(ValueError, match="the weights are bfloat16 and float32"):
        load_quantized(saved)
    assert load_quantized(saved, dtype="float32").dtype == torch.float32
    save_file(whole, file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="truncated"):
        load_quantized(saved)


def test_only_quantised_models_are_saved_so(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="not quantised"):
        save_quantized(load_model(checkpoints["MQA"]), tmp_path)
    assert not list(tmp_path.iterdir())


MEASURE = """
import sys, threading, torch
from paligemma.support.quantized import load_quantized, save_quantized
torch.set_num_threads(1)
def anonymous():  # memory that cannot be read again from a file
    line = next(l for l in open("/proc/self/status") if l.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))
before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch)
thread.start()
model = load_quantized(sys.argv[1], sys.argv[2] if sys.argv[2] != "-" else None)
done.set()
thread.join()
size = sum(t.nbytes for n, t in model.state_dict().items() if "qweight" in n or "scales" in n)
print(max(peak - before, 0), size)
if len(sys.argv) > 3:
    save_quantized(model, sys.argv[3])
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's memory counters")
def test_the_original_is_never_in_memory(tmp_path):
    """Peak memory of quantising 220 MB of weights, and of the second start, which only maps."""
    sys.path.insert(0, str(ROOT / "tools"))
    from random_checkpoint import write_checkpoint

    from paligemma.gemma import GemmaConfig
    from paligemma.model import PaliGemmaConfig
    from paligemma.siglip import SiglipVisionConfig

    config = PaliGemmaConfig(
        SiglipVisionConfig(64, 64, 1, 2, image_size=56),
        GemmaConfig(16384, 1024, 4096, 6, 4, 1, 256),
        image_token_index=16300,
    )
    total = write_checkpoint(tmp_path / "original", config)

    def measure(*arguments):
        command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return map(int, run.stdout.split())

    peak, size = measure(tmp_path / "original", "int4", tmp_path / "small")
    assert size < 0.32 * total
    assert peak < size + 120e6 < total, f"{peak / 1e6:.0f} MB for {size / 1e6:.0f} MB of weights"
    peak, _ = measure(tmp_path / "small", "-")
    assert peak < 20e6, f"mapping took {peak / 1e6:.0f} MB"
