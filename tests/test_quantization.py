"""Weights in few bits: exact bookkeeping, bounded error, nothing lost on the way to a file."""

import copy
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
from paligemma.checkpoint import load_model
from paligemma.gemma2 import soft_cap
from paligemma.generation import generate
from paligemma.processor import Processor
from paligemma.quantization import (
    FEW,
    Int4Linear,
    Int8Linear,
    QuantizedLinear,
    multiplies_bytes,
    pack_int4,
    quantize_int4,
    quantize_int8,
    quantize_model,
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
    extra = torch.randn(n).to(dtype) if bias else None
    return KINDS[kind].from_weight(weight.to(dtype), extra, group_size), weight


def acting(layer):
    """The weight as it acts: `float32[N, K]`, computed from the codes without the layer's code."""
    n, k = layer.out_features, layer.in_features
    if isinstance(layer, Int8Linear):
        weight = layer.qweight.float() * layer.scales.float()[:, None]
    else:
        scales = layer.scales.float().transpose(0, 1).repeat_interleave(layer.group_size, 1)
        codes = unpack_int4(layer.qweight, layer.block).float() - 8
        weight = codes * scales[..., 0] + scales[..., 1]
    return weight[:n, :k]


def acting_input(layer, x):
    """What a layer multiplies with: eight bits round their input, too, where bytes are multiplied.

    Written out, without the layer's code: each row to whole multiples of a 127th of its largest.
    """
    if not (isinstance(layer, Int8Linear) and multiplies_bytes()):
        return x.float()
    step = x.float().abs().amax(-1, keepdim=True) / 127
    return torch.where(step > 0, (x.float() / step.clamp(min=1e-30)).round() * step, 0)


# ---------------------------------------------------------------- the numbers


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 70), st.floats(-6, 6), st.integers(0, 99))
def test_int8_errs_by_half_a_step_at_most(n, k, size, seed):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 10**size
    codes, scales = quantize_int8(weight)
    assert codes.dtype == torch.int8 and codes.abs().max() <= 127 and scales.shape == (n,)
    error = (codes * scales[:, None] - weight).abs()
    assert (error <= scales[:, None] * (0.5 + 1e-4)).all()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([32, 64, 128]),
    st.floats(-5, 5),
    st.integers(0, 99),
)
def test_int4_errs_by_half_a_step_at_most(n, groups, size, magnitude, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, groups * size, generator=generator) * 10**magnitude
    codes, scales = quantize_int4(weight, size)
    assert codes.max() <= 15 and scales.shape == (n, groups, 2)
    scale, zero = scales.repeat_interleave(size, 1).unbind(-1)
    error = ((codes.float() - 8) * scale + zero - weight).abs()
    assert (error <= scale * (0.5 + 1e-3)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_and_constant_rows_stay_finite(dtype):
    weight = torch.zeros(4, 64)
    weight[1] = 3.0
    weight[2, :32] = -2.0
    for kind, layer_of in KINDS.items():
        layer = layer_of.from_weight(weight.to(dtype), group_size=32)
        out = layer(torch.ones(2, 64, dtype=dtype))
        assert out.isfinite().all() and (out[:, 0] == 0).all(), kind
        torch.testing.assert_close(out[0].float(), weight.sum(1), rtol=0.01, atol=0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_weight_is_refused(kind, value):
    weight = torch.randn(4, 64)
    weight[2, 5] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        KINDS[kind].from_weight(weight)


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
        "torch.manual_seed(0); w = torch.randn(70, 96).bfloat16()\n"
        "l = q.Int4Linear.from_weight(w, group_size=32)\n"
        "x = torch.randn(3, 96).bfloat16(); y = l(x).float(); z = l.float()(x.float())\n"
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
    """Odd sizes included: kernels like to read past the end of a row."""
    layer, weight = filled(kind, *shape, dtype, bias=True)
    tolerance = 0.02 if kind == "int8" else 0.2
    relative = (acting(layer) - weight).norm() / weight.norm()
    assert relative < tolerance, relative
    for m in (1, 2, 8, 9, 65):
        x = torch.randn(m, shape[1]).to(dtype)
        expected = F.linear(acting_input(layer, x), acting(layer), layer.bias.float())
        scale = expected.abs().max()
        eps = 1e-5 if dtype == torch.float32 else 0.02
        assert layer(x).dtype == dtype and layer(x).shape == expected.shape
        assert (layer(x).float() - expected).abs().max() <= eps * scale, m


def test_int4_kernel_and_plain_way_agree_and_are_both_used(monkeypatch):
    layer, _ = filled("int4", 96, 64)
    called = []
    kernel = Int4Linear.kernel
    monkeypatch.setattr(
        Int4Linear, "kernel", lambda self, rows: (called.append(len(rows)), kernel(self, rows))[1]
    )
    assert layer.has_kernel, "this machine has it"
    x = torch.randn(FEW + 1, 64).bfloat16()
    few = torch.cat([layer(row[None]) for row in x])
    assert len(called) == len(x)
    many = layer(x)
    assert len(called) == len(x)
    assert (few.float() - many.float()).abs().max() <= 0.02 * many.float().abs().max()
    layer.has_kernel = False
    plain = torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(plain, many, rtol=0.02, atol=0.05)
    assert len(called) == len(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_rows_do_not_disturb_each_other(dtype):
    """A row's scale is its own: alone, in a batch, beside a loud one or NaN, it gives the same."""
    layer, _ = filled("int8", 70, 40, dtype)
    x = torch.randn(5, 40).to(dtype)
    x[1] *= 1e4
    x[2, 3] = float("nan")
    together = layer(x)
    for i in (0, 1, 3, 4):
        assert torch.equal(layer(x[i : i + 1])[0], together[i]), i
    assert together[2].isnan().all()
    if multiplies_bytes():
        expected = F.linear(acting_input(layer, x[:1]), acting(layer))
        assert not torch.allclose(F.linear(x[:1].float(), acting(layer)), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("isa", "exact"), [("AVX2", False), ("AVX512_CORE", False), ("AVX512_CORE_VNNI", True)]
)
def test_where_products_of_bytes_overflow_they_are_not_used(isa, exact):
    """Processors of before VNNI sum pairs in 16 bits: oneDNN can be told to do as they do."""
    code = (
        "import torch; from paligemma import quantization as q\n"
        "torch.manual_seed(0); w = torch.randn(70, 96); l = q.Int8Linear.from_weight(w)\n"
        "x = torch.randn(3, 96); z = x @ (l.qweight * l.scales[:, None]).T\n"
        "print(q.multiplies_bytes(), float((l(x) - z).abs().max() / z.abs().max()))"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    answer, gap = run.stdout.split()
    if not exact:
        assert answer == "False"
    assert float(gap) < (0.02 if answer == "True" else 1e-5)


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
    expected = acting(layer).sum(0).expand(2, 64)
    torch.testing.assert_close(x.grad.float(), expected, rtol=0.03, atol=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_do_not_change_the_result(kind, monkeypatch):
    layer, _ = filled(kind, 300, 64, torch.float32)
    x = torch.randn(3, 64)
    whole = layer(x)
    monkeypatch.setattr(quantization, "CHUNK", 64 * 64)
    monkeypatch.setattr(quantization, "PIECE", 3 * 64)
    torch.testing.assert_close(layer(x), whole)
    layer.has_kernel = False
    rows = acting_input(layer, x) if kind == "int8" else x
    torch.testing.assert_close(layer(rows), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_can_be_copied_and_moved_to_another_type(kind):
    layer, _ = filled(kind, 70, 64)
    x = torch.randn(2, 64)
    wide = copy.deepcopy(layer).float()
    expected = acting_input(layer, x) @ acting(layer).T
    torch.testing.assert_close(wide(x), expected, rtol=1e-4, atol=1e-4)
    assert "64, 70" in repr(layer)


# ---------------------------------------------------------------- the model


def spread(path, dtype=torch.float32):
    return load_model(path, dtype=dtype)


@pytest.mark.parametrize("mode", KINDS)
@pytest.mark.parametrize("kind", ["MHA", "GQA", "MQA", "gemma2"])
def test_model_is_the_model_of_its_dequantised_weights(
    checkpoints, gemma2_checkpoint, mode, kind, monkeypatch
):
    """Exactly: the same model with the dequantised weights in ordinary layers gives the logits."""
    monkeypatch.setattr(quantization, "multiplies_bytes", lambda: False)  # inputs stay as they are
    path = gemma2_checkpoint if kind == "gemma2" else checkpoints[kind]
    model = quantize_model(spread(path), mode)
    plain = spread(path)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear) and name != "language_model.head":
            plain.get_submodule(name).weight.data = acting(layer)
    batch = random_batch()
    plain_head = acting(model.language_model.head)

    def logits(hidden):
        scores = hidden @ plain_head.T
        return soft_cap(scores, 3.0) if kind == "gemma2" else scores

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
    assert "language_model.head" in text
    tower = {name for name in kinds if re.match(r"vision_tower\.(.*_proj|.*\.fc\d)$", name)}
    assert len(tower) == 6 * model.config.vision_config.num_hidden_layers
    assert quantised - text == (tower if mode == "int4" else set())
    assert all(kinds[name] is Int8Linear for name in quantised - text)
    assert not any(kind is nn.Linear for n, kind in kinds.items() if n.startswith("language"))
    assert type(model.language_model.embed_tokens) is nn.Embedding
    assert model.dtype == torch.float32
    by_four = {n for n, kind in kinds.items() if kind is Int4Linear}
    assert by_four == (text if mode == "int4" else set())


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
        ({"mode": ["int8"]}, "'int8' or 'int4'"),
        ({"mode": "int4", "group_size": "64"}, "group_size is '64'"),
    ],
)
def test_unknown_options_are_refused_before_anything_changes(checkpoints, options, words):
    model = spread(checkpoints["MQA"])
    with pytest.raises(ValueError, match=words):
        quantize_model(model, **options)
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())


def test_weights_of_several_types_are_refused_or_get_one(checkpoints):
    model = spread(checkpoints["MQA"])
    model.vision_tower.bfloat16()
    with pytest.raises(ValueError, match="the weights are bfloat16 and float32; give one dtype"):
        quantize_model(model, "int8")
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    quantize_model(model, "int8", dtype=torch.float32)
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32, torch.int8}
    assert model(**random_batch()).logits.isfinite().all()


def test_adapters_are_merged_first(checkpoints):
    from paligemma.lora import add_lora, merge_lora

    model = spread(checkpoints["MQA"])
    add_lora(model, 2)
    with pytest.raises(ValueError, match="call merge_lora first"):
        quantize_model(model, "int8")
    merge_lora(model)
    quantize_model(model, "int8")


def test_on_the_meta_device_there_are_only_shapes(checkpoints):
    model = quantize_model(spread(checkpoints["MQA"]), "int4")
    with torch.device("meta"):
        empty = quantize_model(type(model)(model.config), "int4")
    shapes = {n: (t.shape, t.dtype) for n, t in model.state_dict().items()}
    assert {n: (t.shape, t.dtype) for n, t in empty.state_dict().items()} == shapes
    assert all(t.is_meta for t in empty.state_dict().values())


@pytest.mark.parametrize("mode", KINDS)
def test_under_autocast(checkpoints, mode):
    model = quantize_model(spread(checkpoints["GQA"]), mode)
    batch = random_batch()
    with torch.no_grad():
        exact = model(**batch).logits
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(**batch).logits
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() / exact.norm() < 0.05


def test_twice_is_refused(checkpoints):
    model = quantize_model(spread(checkpoints["MQA"]), "int8")
    with pytest.raises(ValueError, match="quantised already"):
        quantize_model(model, "int4")


def test_deep_copy_is_independent(checkpoints):
    model = quantize_model(spread(checkpoints["MQA"]), "int4")
    other = copy.deepcopy(model)
    other.language_model.head.scales.zero_()
    batch = random_batch()
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits, other(**batch).logits)


# ---------------------------------------------------------------- the tiny model


PROMPTS = (
    "caption en",
    "answer en how many dogs are there?",
    "answer en is there a cat?",
    "detect dog",
)


@pytest.mark.parametrize(("mode", "share"), [("int8", 0.95), ("int4", 0.9)])
def test_tiny_model_still_answers(mode, share):
    """Few answers here; tools/quantization_quality.py compares a thousand."""
    processor = Processor.from_pretrained(TINY)
    names = ["scene", "scene2", "scene3"]
    pictures = [PICTURES / f"{name}.png" for name in names for _ in PROMPTS]
    batch = processor(pictures, [*PROMPTS] * len(names))
    batch = {n: batch[n] for n in ("input_ids", "pixel_values", "attention_mask")}
    before = generate(load_model(TINY), **batch, max_new_tokens=24)
    after = generate(quantize_model(load_model(TINY), mode), **batch, max_new_tokens=24)
    loc = processor.tokenizer.encode("<loc0000>")[0]
    same, total = 0, 0
    for a, b in zip(before.tolist(), after.tolist()):
        a, b = ([t for t in row if t] for row in (a, b))
        total += max(len(a), len(b))
        near = (x == y or (min(x, y) >= loc and abs(x - y) <= 20) for x, y in zip(a, b))
        same += sum(near)  # a corner may move by 2 % of the picture
    assert same >= share * total, f"{same} of {total} tokens are the same"
