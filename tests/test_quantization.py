"""Weights in few bits: exact bookkeeping, bounded error, nothing lost on the way to a file."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import random_batch
from torch import nn

from paligemma import quantization
from paligemma.checkpoint import CheckpointError, load_model, save_model
from paligemma.generation import generate
from paligemma.processor import Processor
from paligemma.quantization import (
    Int4Linear,
    Int8Linear,
    QuantizedLinear,
    kernel_block,
    load_quantized,
    pack_int4,
    quantize_int4,
    quantize_int8,
    quantize_model,
    read_quantization,
    save_quantized,
    unpack_int4,
)

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "paligemma" / "assets" / "tiny"
PICTURES = ROOT / "paligemma" / "assets" / "pictures"
KINDS = {"int8": Int8Linear, "int4": Int4Linear}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def filled(kind, n, k, dtype=torch.bfloat16, group_size=32, bias=False, seed=0):
    """A quantised layer of random weights, and the weights."""
    torch.manual_seed(seed)
    weight = torch.randn(n, k)
    layer = KINDS[kind](k, n, bias, dtype, group_size)
    layer.set_rows(0, weight)
    if bias:
        layer.bias.normal_()
    return layer, weight


# ---------------------------------------------------------------- the numbers


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 70), st.floats(-6, 6), st.integers(0, 99))
def test_int8_errs_by_half_a_step_at_most(n, k, size, seed):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 10**size
    for dtype in (torch.float32, torch.bfloat16):
        codes, scales = quantize_int8(weight, dtype)
        assert codes.dtype == torch.int8 and scales.dtype == dtype and codes.abs().max() <= 127
        error = (codes * scales.float()[:, None] - weight).abs()
        slack = 1e-5 if dtype == torch.float32 else 127 * 2**-8  # the scale is rounded: it may clip
        assert (error <= scales.float()[:, None] * (0.5 + slack)).all()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([32, 64, 128]),
    st.floats(-5, 5),
    st.integers(0, 99),
)
def test_int4_is_no_worse_than_plain_rounding(n, groups, size, magnitude, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, groups * size, generator=generator) * 10**magnitude
    codes, scales = quantize_int4(weight, size, torch.float32)
    assert codes.max() <= 15 and scales.shape == (n, groups, 2)
    scale, zero = scales.repeat_interleave(size, 1).unbind(-1)
    ours = ((codes.float() - 8) * scale + zero - weight).square().unflatten(1, (-1, size)).sum(-1)
    grouped = weight.unflatten(1, (-1, size))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    step = (high - low) / 15
    plain = ((grouped - low) / step).round() * step + low
    assert (ours <= (plain - grouped).square().sum(-1) * (1 + 1e-4)).all()


def test_clipping_an_outlier_helps():
    torch.manual_seed(0)
    weight = torch.randn(1, 128)
    weight[0, 0] = 4.5
    _, scales = quantize_int4(weight, 128, torch.float32)
    assert scales[0, 0, 0] < (weight.max() - weight.min()) / 15 * 0.96


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_and_constant_rows_stay_finite(dtype):
    weight = torch.zeros(4, 64)
    weight[1] = 3.0
    weight[2, :32] = -2.0
    codes, scales = quantize_int8(weight, dtype)
    assert torch.equal(codes[0], torch.zeros(64, dtype=torch.int8)) and scales.isfinite().all()
    for kind, layer_of in KINDS.items():
        layer = layer_of(64, 4, False, dtype, 32)
        layer.set_rows(0, weight)
        out = layer(torch.ones(2, 64, dtype=dtype))
        assert out.isfinite().all(), kind
        torch.testing.assert_close(out[0].float(), weight.sum(1), rtol=0.01, atol=0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4])
def test_a_broken_weight_is_refused(quantize, value):
    weight = torch.randn(4, 64)
    weight[2, 5] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(weight)


@pytest.mark.parametrize("block", [32, 64])
def test_packing_is_undone(block):
    codes = torch.randint(0, 16, (128, 96), dtype=torch.uint8)
    packed = pack_int4(codes, block)
    assert packed.shape == (128, 48)
    assert torch.equal(unpack_int4(packed, block), codes)
    assert not torch.equal(unpack_int4(packed, 96 - block), codes)


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_processors_are_recognised(capability):
    """The order of nibbles depends on the processor; where it is unknown the kernel is not used."""
    code = (
        "import torch; from paligemma import quantization as q\n"
        "torch.manual_seed(0); l = q.Int4Linear(96, 70, dtype=torch.bfloat16, group_size=32)\n"
        "l.set_rows(0, torch.randn(70, 96)); x = torch.randn(3, 96).bfloat16()\n"
        "y = l(x).float(); z = x.float() @ l.dequantize().T\n"
        "print(torch.backends.cpu.get_cpu_capability(), q.kernel_block(),"
        " bool((y - z).abs().max() < 0.02 * z.abs().max()))"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    name, block, close = run.stdout.split()
    assert close == "True"
    if name in ("AVX2", "DEFAULT"):
        assert block == {"AVX2": "32", "DEFAULT": "None"}[name]


# ---------------------------------------------------------------- the layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 128), (70, 40), (1, 37), (3, 33), (257, 96), (16, 8)])
def test_layer_is_its_dequantised_weight(kind, dtype, shape):
    """Odd sizes included: the int8 kernel alone reads past the row, or crashes, at 37 columns."""
    layer, weight = filled(kind, *shape, dtype, bias=True)
    tolerance = 0.02 if kind == "int8" else 0.2
    relative = (layer.dequantize() - weight).norm() / weight.norm()
    assert relative < tolerance, relative
    for m in (1, 2, 8, 9, 65):
        x = torch.randn(m, shape[1]).to(dtype)
        expected = F.linear(x.float(), layer.dequantize(), layer.bias.float())
        scale = expected.abs().max()
        eps = 1e-5 if dtype == torch.float32 else 0.02
        assert layer(x).dtype == dtype and layer(x).shape == expected.shape
        assert (layer(x).float() - expected).abs().max() <= eps * scale, m


@pytest.mark.parametrize("kind", KINDS)
def test_kernel_and_plain_way_agree_and_are_both_used(kind, monkeypatch):
    layer, _ = filled(kind, 96, 64)
    called = []
    kernel = type(layer).kernel
    monkeypatch.setattr(
        type(layer), "kernel", lambda self, rows: (called.append(len(rows)), kernel(self, rows))[1]
    )
    x = torch.randn(layer.few + 1, 64).bfloat16()
    few = torch.cat([layer(row[None]) for row in x])
    many = layer(x)
    assert len(called) == (len(x) if layer.has_kernel() else 0)
    assert (few.float() - many.float()).abs().max() <= 0.02 * many.float().abs().max()
    monkeypatch.setattr(type(layer), "has_kernel", lambda self: False)
    called.clear()
    torch.testing.assert_close(
        torch.cat([layer(row[None]) for row in x]), many, rtol=0.02, atol=0.05
    )
    assert not called


@pytest.mark.parametrize(
    ("k", "n", "rows", "pairs"),
    [
        (2048, 64, 1, True),
        (2050, 6, 1, True),
        (4090, 6, 1, False),  # filled up to a page
        (2048, 63, 1, False),
        (2048, 64, 2, False),
        (1024, 64, 1, False),
        (4096, 64, 1, False),
    ],
)
def test_short_rows_of_eight_bits_are_read_in_pairs(monkeypatch, k, n, rows, pairs):
    layer, _ = filled("int8", n, k)
    x, read = torch.randn(rows, k).bfloat16(), []
    kernel = torch.ops.aten._weight_int8pack_mm

    def spy(x, weight, scales):
        read.append(weight.shape)
        assert weight.data_ptr() == layer.qweight.data_ptr(), "a copy of the codes"
        return kernel(x, weight, scales)

    monkeypatch.setattr(torch.ops.aten, "_weight_int8pack_mm", spy)
    y = layer(x)
    filled_up = k + -k % 16
    assert read == [(n // 2, 2 * filled_up) if pairs else (n, filled_up)]
    exact = x.double() @ layer.dequantize().double().T
    gap = (y.double() - exact).abs() / exact.abs().clamp(min=1)
    assert y.shape == (rows, n) and gap.max() < 2**-7


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_any_shape_and_stride(kind):
    layer, _ = filled(kind, 70, 64)
    x = torch.randn(2, 3, 5, 64).bfloat16()
    assert layer(x).shape == (2, 3, 5, 70)
    last = x[:, 0, -1:]  # as the head sees a batch: rows that do not lie together
    torch.testing.assert_close(layer(last), layer(last.clone()), rtol=0, atol=0)
    assert layer(x[:0]).shape == (0, 3, 5, 70)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_flows_to_the_input(kind):
    layer, _ = filled(kind, 70, 64)
    x = torch.randn(2, 64).bfloat16().requires_grad_()
    layer(x).sum().backward()
    expected = layer.dequantize().sum(0).expand(2, 64)
    torch.testing.assert_close(x.grad.float(), expected, rtol=0.03, atol=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_do_not_change_the_result(kind, monkeypatch):
    layer, _ = filled(kind, 300, 64, torch.float32)
    x = torch.randn(3, 64)
    whole = layer(x)
    monkeypatch.setattr(quantization, "CHUNK", 64 * 64)
    torch.testing.assert_close(layer(x), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_can_be_copied_and_moved_to_another_type(kind):
    layer, _ = filled(kind, 70, 64)
    x = torch.randn(2, 64)
    wide = copy.deepcopy(layer).float()
    torch.testing.assert_close(wide(x), x @ layer.dequantize().T, rtol=1e-4, atol=1e-4)
    assert "64, 70" in repr(layer)


# ---------------------------------------------------------------- the model


def spread(path, dtype=torch.float32):
    return load_model(path, dtype=dtype)


@pytest.mark.parametrize("mode", KINDS)
@pytest.mark.parametrize("kind", ["MHA", "GQA", "MQA", "gemma2"])
def test_model_is_the_model_of_its_dequantised_weights(
    checkpoints, gemma2_checkpoint, mode, kind, tmp_path
):
    """Exactly: the same model with the dequantised weights in ordinary layers gives the logits."""
    path = gemma2_checkpoint if kind == "gemma2" else checkpoints[kind]
    model = quantize_model(spread(path), mode)
    plain = spread(path)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear) and not name.endswith("lm_head"):
            plain.get_submodule(name).weight.data = layer.dequantize()
    batch = random_batch()
    plain_head = model.language_model.lm_head.dequantize()

    def logits(hidden):
        scores = hidden @ plain_head.T
        return quantization.soft_cap(scores, 3.0) if kind == "gemma2" else scores

    plain.language_model.logits = logits
    with torch.no_grad():
        gap = (model(**batch).logits - plain(**batch).logits).abs().max()
        loss = (model(**batch).logits - spread(path)(**batch).logits).abs().max()
    assert gap < 2e-4
    assert 1e-3 < loss, "the weights really changed"


@pytest.mark.parametrize("mode", KINDS)
def test_what_changes_and_what_stays(checkpoints, mode):
    model = quantize_model(spread(checkpoints["MQA"]), mode)
    kinds = {n: type(m) for n, m in model.named_modules()}
    quantised = {n for n, kind in kinds.items() if issubclass(kind, QuantizedLinear)}
    text = {name for name in quantised if name.startswith("language_model.")}
    assert len(text) == 7 * model.config.text_config.num_hidden_layers + 1
    assert "language_model.lm_head" in text
    tower = {name for name in kinds if re.match(r"vision_tower\.(.*_proj|.*\.fc\d)$", name)}
    assert len(tower) == 6 * model.config.vision_config.num_hidden_layers
    assert quantised - text == (tower if mode == "int4" else set())
    assert all(kinds[name] is Int8Linear for name in quantised - text)
    assert not any(kind is nn.Linear for n, kind in kinds.items() if n.startswith("language"))
    assert type(model.language_model.embed_tokens) is nn.Embedding
    assert model.dtype == torch.float32
    by_four = {name.split(".")[-1] for name, kind in kinds.items() if kind is Int4Linear}
    feed_forward = {"gate_proj", "up_proj", "down_proj"}
    assert by_four == (feed_forward if mode == "int4" else set()), "narrow models spare the rest"


@pytest.mark.parametrize("eight", [(), ["head"], ["attention"], ["head", "attention"]])
def test_what_keeps_eight_bits_is_a_choice_that_is_saved(checkpoints, eight, tmp_path):
    model = load_quantized(checkpoints["MQA"], "int4", eight=eight)
    language = model.language_model
    assert isinstance(language.lm_head, Int8Linear) == ("head" in eight)
    assert isinstance(language.layers[1].self_attn.k_proj, Int8Linear) == ("attention" in eight)
    assert isinstance(language.layers[1].mlp.up_proj, Int4Linear)
    save_quantized(model, tmp_path)
    loaded, batch = load_quantized(tmp_path, eight=eight), random_batch()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)
    with pytest.raises(CheckpointError, match="was quantised with eight"):
        load_quantized(tmp_path, eight=() if eight else ["head"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", KINDS)
def test_generation_with_cache_and_batches(checkpoints, mode, dtype):
    model = quantize_model(load_model(checkpoints["GQA"], dtype=dtype), mode)
    batch = random_batch()
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    ids = generate(model, **batch, max_new_tokens=6, eos_token_id=-1)
    assert ids.shape == (3, 6)
    if dtype == torch.float32:  # in bfloat16 a tie may break another way
        for row in range(3):
            own = batch["attention_mask"][row].bool()
            alone = generate(
                model,
                batch["input_ids"][row, own][None],
                batch["pixel_values"][row : row + 1],
                max_new_tokens=6,
                eos_token_id=-1,
            )
            assert torch.equal(alone[0], ids[row])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "int3"}, "'int8' or 'int4'"),
        ({"mode": "int4", "group_size": 48}, "expected 32, 64, 128 or 256"),
        ({"mode": "int4", "eight": "head"}, "eight is 'head'"),
        ({"mode": "int4", "eight": ["tail"]}, "expected a list of 'attention', 'head'"),
    ],
)
def test_unknown_options_are_refused_before_anything_changes(checkpoints, options, words):
    model = spread(checkpoints["MQA"])
    with pytest.raises(ValueError, match=words):
        quantize_model(model, **options)
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())


def test_twice_is_refused(checkpoints):
    model = quantize_model(spread(checkpoints["MQA"]), "int8")
    with pytest.raises(ValueError, match="quantised already"):
        quantize_model(model, "int4")


def test_deep_copy_is_independent(checkpoints):
    model = quantize_model(spread(checkpoints["MQA"]), "int4")
    other = copy.deepcopy(model)
    other.language_model.lm_head.scales.zero_()
    batch = random_batch()
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits, other(**batch).logits)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("mode", KINDS)
@pytest.mark.parametrize("kind", ["MQA", "gemma2"])
def test_saved_and_loaded_is_the_same(checkpoints, gemma2_checkpoint, mode, kind, tmp_path):
    path = gemma2_checkpoint if kind == "gemma2" else checkpoints[kind]
    model = load_quantized(path, mode)
    again = quantize_model(spread(path), mode)
    save_quantized(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_quantized(tmp_path)
    batch = random_batch()
    with torch.no_grad():
        logits = [m(**batch).logits for m in (model, again, loaded, load_quantized(tmp_path, mode))]
    assert all(torch.equal(logits[0], other) for other in logits[1:])
    assert not loaded.training
    with pytest.raises(CheckpointError, match="has no place"):
        load_model(tmp_path)
    other = {"int8": "int4", "int4": "int8"}[mode]
    with pytest.raises(CheckpointError, match=f"mode '{mode}', not '{other}'"):
        load_quantized(tmp_path, other)


def test_a_file_of_another_machine_is_repacked(checkpoints, tmp_path):
    model = load_quantized(checkpoints["MQA"], "int4", eight=())
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
        expected = load_quantized(checkpoints["MQA"], "int4", eight=())(**batch).logits
        assert torch.equal(loaded(**batch).logits, expected)


def test_stored_type_and_asked_type(tmp_path, checkpoints):
    save_model(load_model(checkpoints["MQA"], dtype=torch.bfloat16), tmp_path)
    model = load_quantized(tmp_path, "int8")
    assert model.dtype == model.language_model.lm_head.scales.dtype == torch.bfloat16
    model = load_quantized(tmp_path, "int8", dtype=torch.float32)
    assert model.dtype == model.language_model.lm_head.scales.dtype == torch.float32
    model = load_quantized(checkpoints["MQA"], "int4", dtype=torch.bfloat16)
    assert {t.dtype for t in model.state_dict().values()} == {
        torch.bfloat16,
        torch.uint8,
        torch.int8,
    }


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
        lambda q: q.update(group_size=64),
        lambda q: q.update(mode="int8"),
        lambda q: q.update(eight=["head"]),
        lambda q: q.update(eight="head"),
        lambda q: q.pop("eight"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(saved, change):
    edit(saved, change)
    with pytest.raises(CheckpointError):
        load_quantized(saved)


def test_a_file_that_does_not_fit_is_refused(saved):
    from safetensors.torch import load_file, save_file

    file = saved / "model.safetensors"
    whole = load_file(file)
    name = next(n for n in whole if n.endswith("down_proj.qweight"))
    for broken, words in (
        ({n: t for n, t in whole.items() if n != name}, "lacks 1 tensors and holds 0"),
        (whole | {"extra": torch.zeros(1)}, "lacks 0 tensors and holds 1"),
        (whole | {name: whole[name][:32].clone()}, "expected torch.uint8"),
        (whole | {name: whole[name].float()}, "expected torch.uint8"),
    ):
        save_file(broken, file)
        with pytest.raises(CheckpointError, match=words):
            load_quantized(saved)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="truncated"):
        load_quantized(saved)


def test_only_quantised_models_are_saved_so(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="not quantised"):
        save_quantized(spread(checkpoints["MQA"]), tmp_path)
    assert not list(tmp_path.iterdir())


MEASURE = """
import sys, torch
from paligemma.quantization import load_quantized
torch.set_num_threads(1)
def peak():
    line = next(l for l in open("/proc/self/status") if l.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))
before = peak()
model = load_quantized(sys.argv[1], sys.argv[2] if sys.argv[2] != "-" else None)
size = sum(t.nbytes for n, t in model.state_dict().items() if "qweight" in n or "scales" in n)
print(peak() - before, size)
if len(sys.argv) > 3:
    from paligemma.quantization import save_quantized
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


# ---------------------------------------------------------------- the tiny model


PROMPTS = (
    "caption en",
    "answer en how many dogs are there?",
    "answer en is there a cat?",
    "detect dog",
)


@pytest.mark.parametrize(("mode", "share"), [("int8", 0.9), ("int4", 0.75)])
def test_tiny_model_still_answers(mode, share):
    """Few answers here; tools/quantization_quality.py compares a thousand."""
    processor = Processor.from_pretrained(TINY)
    names = ["scene", "scene2", "scene3"]
    pictures = [PICTURES / f"{name}.png" for name in names for _ in PROMPTS]
    batch = processor(pictures, [*PROMPTS] * len(names))
    batch = {n: batch[n] for n in ("input_ids", "pixel_values", "attention_mask")}
    same, total = 0, 0
    before = generate(load_model(TINY), **batch, max_new_tokens=24)
    after = generate(load_quantized(TINY, mode, dtype=torch.float32), **batch, max_new_tokens=24)
    for a, b in zip(before.tolist(), after.tolist()):
        a, b = ([t for t in row if t] for row in (a, b))
        total += max(len(a), len(b))
        same += sum(x == y for x, y in zip(a, b))
    assert same >= share * total, f"{same} of {total} tokens are the same"
