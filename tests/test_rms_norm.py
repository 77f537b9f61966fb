"""RMSNorm against transformers and PyTorch, and what has to hold for every vector and type."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma.rms_norm import RMSNorm

widths = st.sampled_from([1, 2, 3, 64, 2048])
seeds = st.integers(0, 2**31)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def reference() -> dict[str, torch.Tensor]:
    """Vectors of very different size through transformers' GemmaRMSNorm."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    generator = torch.Generator().manual_seed(7)
    norm = GemmaRMSNorm(64, eps=1e-6)
    norm.weight.data = torch.randn(64, generator=generator) * 0.5
    x = torch.randn(2, 5, 64, generator=generator)
    x = x * torch.tensor([0.0, 1e-4, 1.0, 300.0, 1e5])[:, None]  # (B, L, D), a size for each token
    short = x.bfloat16()
    return {
        "weight": norm.weight,
        "x": x,
        "y": norm(x),
        "x_bfloat16": short,
        "y_bfloat16": norm(short),
    }


def norm_with(weight, eps=1e-6):
    norm = RMSNorm(len(weight), eps)
    norm.load_state_dict({"weight": weight})
    return norm.requires_grad_(False)


def vectors(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def size(x):
    return x.double().square().mean(-1).sqrt()


def test_agrees_with_transformers():
    expected = reference()
    norm = norm_with(expected["weight"].detach())
    torch.testing.assert_close(norm(expected["x"]), expected["y"], atol=1e-5, rtol=1e-6)
    assert torch.equal(norm(expected["x_bfloat16"]), expected["y_bfloat16"])


@dtypes
@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.1])
def test_agrees_with_transformers_for_stored_types(dtype, eps):
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    theirs = GemmaRMSNorm(48, eps).to(dtype)
    theirs.weight.data = vectors(1, 48).to(dtype)
    x = vectors(2, 3, 7, 48).to(dtype)
    ours = norm_with(theirs.weight.data, eps).to(dtype)
    assert ours.weight.dtype == dtype
    assert torch.equal(ours(x), theirs(x))


@settings(deadline=None, max_examples=50)
@given(widths, seeds, st.sampled_from([1e-7, 1e-5, 0.1]), st.floats(1e-4, 1e4))
def test_agrees_with_pytorch(width, seed, eps, scale):
    x, weight = vectors(seed, 2, 3, width) * scale, vectors(seed + 1, width)
    expected = F.rms_norm(x, (width,), weight=1 + weight, eps=eps)
    torch.testing.assert_close(norm_with(weight, eps)(x), expected, atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=50)
@given(widths, seeds, st.floats(-3, 6))
def test_fresh_norm_gives_size_one_whatever_the_size_before(width, seed, exponent):
    x = vectors(seed, 4, width)
    x = x / size(x)[:, None].float().clamp(min=1e-9) * 10**exponent
    expected = size(x) / (size(x) ** 2 + 1e-6).sqrt()
    torch.testing.assert_close(size(RMSNorm(width)(x)), expected, atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=30)
@given(seeds, st.floats(0.01, 1000), st.sampled_from([-1.0, 1.0]))
def test_direction_is_kept_and_length_forgotten(seed, scale, sign):
    x, norm = vectors(seed, 3, 64), norm_with(vectors(seed + 1, 64), eps=0.0)
    torch.testing.assert_close(norm(sign * scale * x), sign * norm(x), atol=1e-4, rtol=1e-4)
    ratio = RMSNorm(64)(x) / x
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))


def test_by_hand():
    y = RMSNorm(4)(torch.tensor([1.0, -1, 5, 3]))
    torch.testing.assert_close(y, torch.tensor([1 / 3, -1 / 3, 5 / 3, 1]))


def test_the_mean_is_not_removed():
    assert RMSNorm(4)(torch.ones(4)).tolist() == pytest.approx([1] * 4)


def test_a_stored_weight_of_zero_changes_nothing_and_of_one_doubles():
    x = vectors(0, 5, 8)
    assert torch.equal(RMSNorm(8).weight, torch.zeros(8))
    torch.testing.assert_close(norm_with(torch.ones(8))(x), 2 * norm_with(torch.zeros(8))(x))
    assert not norm_with(-torch.ones(8))(x).any()


def test_each_channel_has_its_own_weight():
    y = norm_with(torch.tensor([0.0, 1.0, -1.0, 2.0]))(torch.ones(4))
    assert y.tolist() == pytest.approx([1, 2, 0, 3])


@dtypes
def test_zero_vector_stays_zero(dtype):
    x = torch.zeros(2, 8, dtype=dtype, requires_grad=True)
    y = RMSNorm(8)(x)
    y.sum().backward()
    assert not y.any() and x.grad.isfinite().all()


@dtypes
def test_result_is_the_float32_result_rounded_once(dtype):
    x, norm = vectors(3, 9, 256).to(dtype), norm_with(vectors(4, 256) * 0.1)
    y = norm(x)
    assert y.dtype == dtype and y.shape == x.shape
    assert torch.equal(y, norm(x.float()).to(dtype))


def test_small_weights_survive_in_bfloat16():
    """1 + 0.003 rounded to bfloat16 would be 1."""
    norm = norm_with(torch.full((128,), 0.003)).bfloat16()
    x = vectors(9, 4, 128)
    factor = norm(x) / RMSNorm(128)(x)
    torch.testing.assert_close(factor, torch.full_like(x, 1.003), atol=2e-5, rtol=0)


def test_float16_does_not_overflow_inside():
    x = torch.full((2048,), 300.0).half()
    assert x.square().isinf().all()  # what the inside has to survive
    assert RMSNorm(2048)(x).tolist() == pytest.approx([1] * 2048)


def test_tokens_do_not_mix():
    x, norm = vectors(5, 2, 4, 32), norm_with(vectors(6, 32))
    alone = torch.stack([torch.stack([norm(token) for token in row]) for row in x])
    torch.testing.assert_close(norm(x), alone)
    changed = x.clone()
    changed[0, 0] = math.inf
    assert torch.equal(norm(changed)[0, 1:], norm(x)[0, 1:])


def test_gradients_of_input_and_weight():
    norm = RMSNorm(6, eps=1e-3)
    x = vectors(7, 3, 6).requires_grad_()
    norm.weight.data = vectors(8, 6)

    def plain(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (1 + weight)

    ours = torch.autograd.grad(norm(x).pow(3).sum(), (x, norm.weight))
    theirs = torch.autograd.grad(plain(x, norm.weight).pow(3).sum(), (x, norm.weight))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_meta_device_and_names():
    with torch.device("meta"):
        norm = RMSNorm(2048)
    assert list(norm.state_dict()) == ["weight"] and norm.weight.numel() == 2048
