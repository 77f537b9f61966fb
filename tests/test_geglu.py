"""GeGLU against transformers, and what its gate has to do for every input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma.geglu import GeGLU

widths = st.integers(1, 12)
seeds = st.integers(0, 2**31)


def reference() -> dict[str, torch.Tensor]:
    """Weights, an input with small and large numbers, and the output of transformers' GemmaMLP."""
    generator = torch.Generator().manual_seed(8)
    mlp = gemma_mlp(32, 64)
    for weight in mlp.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5
    x = torch.randn(2, 5, 32, generator=generator) * torch.tensor([0.01, 0.3, 1, 2, 3])[:, None]
    return {**mlp.state_dict(), "x": x, "y": mlp(x)}


def gemma_mlp(width, neurons):
    """transformers' MLP as PaliGemma's published configs ask for it."""
    from transformers import GemmaConfig
    from transformers.models.gemma.modeling_gemma import GemmaMLP

    config = GemmaConfig(hidden_size=width, intermediate_size=neurons)
    assert config.hidden_act == "gelu_pytorch_tanh"
    return GemmaMLP(config)


def layer_with(gate, up, down):
    """The layer with given weights: float[M, D], float[M, D], float[D, M]."""
    gate, up, down = (torch.as_tensor(w, dtype=torch.float32) for w in (gate, up, down))
    layer = GeGLU(gate.shape[1], gate.shape[0])
    weights = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}
    layer.load_state_dict(weights)
    return layer.requires_grad_(False)


def gelu(x):
    """The tanh form, in Python's floats."""
    return x * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_agrees_with_transformers():
    expected = reference()
    layer = GeGLU(32, 64)
    layer.load_state_dict({k: v for k, v in expected.items() if k not in "xy"})
    torch.testing.assert_close(layer(expected["x"]), expected["y"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("width", "neurons"), [(1, 1), (8, 3), (48, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_transformers_at_other_sizes(width, neurons, dtype):
    theirs = gemma_mlp(width, neurons).to(dtype)
    ours = GeGLU(width, neurons).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    x = (randn(1, 3, 4, width) * 3).to(dtype)
    assert ours(x).dtype == dtype
    torch.testing.assert_close(ours(x), theirs(x))


@settings(deadline=None, max_examples=40)
@given(widths, widths, seeds, st.sampled_from([0.1, 1.0, 5.0]))
def test_agrees_with_a_loop(width, neurons, seed, scale):
    x = randn(seed, 3, width) * scale
    gate, up = randn(seed + 1, 2, neurons, width)
    down = randn(seed + 2, width, neurons)
    expected = torch.zeros(3, width, dtype=torch.double)
    for token in range(3):
        for j in range(neurons):
            g, u = (w[j].double() @ x[token].double() for w in (gate, up))
            expected[token] += down[:, j].double() * gelu(g.item()) * u
    out = layer_with(gate, up, down)(x).double()
    torch.testing.assert_close(out, expected, atol=1e-5 * scale**2 * width, rtol=1e-4)


@pytest.mark.parametrize("x", [-2.7, -1.0, 0.0, 0.5, 2.7, 4.0])
def test_the_activation_is_the_tanh_form(x):
    """With up = the identity and x on the gate only: tanh and exact GELU differ most at ±2.7."""
    layer = layer_with([[1.0, 0]], [[0.0, 1]], [[1.0], [0]])
    assert layer(torch.tensor([x, 1.0]))[0].item() == pytest.approx(gelu(x), abs=2e-6)


def test_a_shut_gate_lets_nothing_through_and_the_up_side_is_straight():
    layer = layer_with([[1.0, 0]], [[0.0, 1]], [[1.0], [0]])  # gate reads x0, up reads x1
    for up in (-100.0, -1.0, 3.0):
        shut, opened = layer(torch.tensor([[-10.0, up], [10.0, up]]))[:, 0].tolist()
        assert shut == pytest.approx(0, abs=1e-4)
        assert opened == pytest.approx(10 * up)


@settings(deadline=None, max_examples=30)
@given(seeds, st.floats(-20, 20), st.floats(-20, 20))
def test_two_neurons_multiply_exactly(seed, a, b):
    layer = layer_with([[1.0, 0], [-1, 0]], [[0.0, 1], [0, 1]], [[1.0, -1], [0, 0]])
    out = layer(torch.tensor([a, b]))[0].item()
    assert out == pytest.approx(a * b, abs=1e-4, rel=1e-4)


def test_tokens_do_not_mix():
    layer, x = GeGLU(6, 10), randn(3, 2, 4, 6)
    alone = torch.stack([torch.stack([layer(token) for token in row]) for row in x])
    torch.testing.assert_close(layer(x), alone)
    changed = x.clone()
    changed[0, 0] = 1e3
    torch.testing.assert_close(layer(changed)[0, 1:], layer(x)[0, 1:])


def test_no_bias_so_zero_stays_zero():
    layer = GeGLU(6, 10)
    assert not layer(torch.zeros(1, 3, 6)).any()
    assert all(name.endswith("weight") for name in layer.state_dict())


def test_names_and_sizes_of_gemma_2b():
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in GeGLU(2048, 16384).named_parameters()}
    assert shapes == {
        "gate_proj.weight": (16384, 2048),
        "up_proj.weight": (16384, 2048),
        "down_proj.weight": (2048, 16384),
    }


def test_gradients_reach_all_three_matrices():
    layer, x = GeGLU(5, 7), randn(4, 2, 3, 5).requires_grad_()
    layer(x).square().sum().backward()
    for tensor in (x, *layer.parameters()):
        assert tensor.grad.isfinite().all() and tensor.grad.abs().min() > 0
