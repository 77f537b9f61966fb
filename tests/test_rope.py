"""RoPE against transformers, and what has to hold for every vector, position and base."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma.rope import RotaryEmbedding, apply_rope

POSITIONS = [0, 1, 2, 10, 255, 300]
sizes = st.sampled_from([2, 4, 8, 64, 256])
bases = st.sampled_from([100.0, 10000.0, 1e6])
seeds = st.integers(0, 2**31)


def reference() -> dict[str, torch.Tensor]:
    """One row of queries and keys through the rotary embedding of transformers' Gemma."""
    from transformers import GemmaConfig
    from transformers.models.gemma.modeling_gemma import GemmaRotaryEmbedding, apply_rotary_pos_emb

    generator = torch.Generator().manual_seed(9)
    positions = torch.tensor([POSITIONS])
    q = torch.randn(1, 2, len(POSITIONS), 256, generator=generator)
    k = torch.randn(1, 1, len(POSITIONS), 256, generator=generator)
    cos, sin = GemmaRotaryEmbedding(GemmaConfig(head_dim=256))(q, positions)
    q_turned, k_turned = apply_rotary_pos_emb(q, k, cos, sin)
    scores = q_turned @ k_turned.transpose(-1, -2) / 16
    return {
        "positions": positions,
        "q": q,
        "k": k,
        "cos": cos,
        "sin": sin,
        "q_turned": q_turned,
        "k_turned": k_turned,
        "scores": scores,
    }


def turned(x, positions, base=10000.0):
    return apply_rope(x, *RotaryEmbedding(x.shape[-1], base)(positions))


def vectors(head_dim, seed, *shape):
    return torch.randn(*shape, head_dim, generator=torch.Generator().manual_seed(seed))


def test_agrees_with_transformers():
    expected = reference()
    cos, sin = RotaryEmbedding(256)(expected["positions"])
    assert torch.allclose(cos[:, 0], expected["cos"], atol=1e-6)
    assert torch.allclose(sin[:, 0], expected["sin"], atol=1e-6)
    for name in ("q", "k"):
        ours = apply_rope(expected[name], cos, sin)
        assert torch.allclose(ours, expected[f"{name}_turned"], atol=1e-5)


@pytest.mark.parametrize(("head_dim", "base"), [(2, 10000.0), (8, 100.0), (64, 1e6)])
def test_agrees_with_transformers_at_other_sizes(head_dim, base):
    from transformers import GemmaConfig
    from transformers.models.gemma.modeling_gemma import GemmaRotaryEmbedding, apply_rotary_pos_emb

    rope = {"rope_type": "default", "rope_theta": base}
    theirs = GemmaRotaryEmbedding(GemmaConfig(head_dim=head_dim, rope_parameters=rope))
    positions = torch.tensor([[0, 0, 0, 1, 2], [4, 5, 6, 7, 4095]])  # rows of their own
    x = vectors(head_dim, 0, 2, 3, 5)
    expected, _ = apply_rotary_pos_emb(x, x, *theirs(x, positions))
    assert torch.allclose(turned(x, positions, base), expected, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(sizes, bases, seeds, st.integers(0, 500), st.integers(0, 500), st.integers(0, 4000))
def test_scores_depend_on_the_difference_only(head_dim, base, seed, m, n, shift):
    q, k = vectors(head_dim, seed, 2, 1, 1, 1)
    here, there = torch.tensor([[m, n]]), torch.tensor([[m + shift, n + shift]])
    scores = []
    for positions in (here, there):
        a = turned(q, positions[:, :1], base)
        b = turned(k, positions[:, 1:], base)
        scores.append((a * b).sum())
    # Angles near 4500 are float32: each is off by up to 2.4e-4 radians.
    room = 1e-3 * q.norm() * k.norm() + 1e-5
    assert (scores[0] - scores[1]).abs() <= room


@settings(deadline=None, max_examples=60)
@given(sizes, bases, seeds, st.lists(st.integers(0, 8192), min_size=1, max_size=6))
def test_lengths_are_kept(head_dim, base, seed, positions):
    x = vectors(head_dim, seed, 1, 2, len(positions))
    out = turned(x, torch.tensor([positions]), base)
    assert torch.allclose(out.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)


@settings(deadline=None, max_examples=30)
@given(sizes, seeds, st.integers(0, 300), st.integers(0, 300))
def test_two_turns_are_one_turn_of_the_sum(head_dim, seed, m, n):
    x = vectors(head_dim, seed, 1, 1, 1)
    m, n = torch.tensor([[m]]), torch.tensor([[n]])
    assert torch.allclose(turned(turned(x, m), n), turned(x, m + n), atol=1e-3)


def test_position_zero_changes_nothing():
    x = vectors(16, 0, 1, 2, 1)
    assert torch.equal(turned(x, torch.zeros(1, 1, dtype=torch.long)), x)


def test_first_pair_turns_one_radian_a_position():
    x = torch.zeros(1, 1, 1, 8)
    x[..., 0] = 1
    out = turned(x, torch.tensor([[1]]))[0, 0, 0]
    angle = torch.tensor(1.0)
    expected = torch.tensor([angle.cos(), 0, 0, 0, angle.sin(), 0, 0, 0])  # partner: 0 + 8/2
    assert torch.allclose(out, expected, atol=1e-6)


def test_shapes_and_types():
    cos, sin = RotaryEmbedding(8)(torch.zeros(2, 5, dtype=torch.long))
    assert cos.shape == sin.shape == (2, 1, 5, 8)
    assert cos.dtype == sin.dtype == torch.float32
    assert apply_rope(torch.ones(2, 3, 5, 8), cos, sin).shape == (2, 3, 5, 8)


def test_bfloat16_is_turned_in_float32():
    x = vectors(64, 3, 1, 2, 4).bfloat16()
    rope = RotaryEmbedding(64).to(torch.bfloat16)  # as model.to(bfloat16) does
    cos, sin = rope(torch.tensor([[0, 1, 257, 4095]]))
    out = apply_rope(x, cos, sin)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, apply_rope(x.float(), cos, sin).bfloat16())
    # 257 is no bfloat16 number: with rounded positions, tokens 256 and 257 would be one place.
    near = rope(torch.tensor([[256, 257]]))[0]
    assert not torch.equal(near[:, :, 0], near[:, :, 1])


def test_nothing_to_store():
    assert not RotaryEmbedding(8).state_dict()
    assert not list(RotaryEmbedding(8).buffers())


def test_made_on_the_meta_device_it_still_works():
    with torch.device("meta"):
        rope = RotaryEmbedding(8)
    cos, _ = rope(torch.arange(3)[None])
    assert cos.device.type == "cpu"
    assert torch.equal(cos, RotaryEmbedding(8)(torch.arange(3)[None])[0])


@pytest.mark.parametrize("head_dim", [1, 7, 255])
def test_odd_head_dim_is_refused(head_dim):
    with pytest.raises(ValueError, match=f"head_dim {head_dim} .* even"):
        RotaryEmbedding(head_dim)


@pytest.mark.parametrize("head_dim", [0, -2])
def test_head_dim_without_channels_is_refused(head_dim):
    with pytest.raises(ValueError, match=f"head_dim {head_dim} "):
        RotaryEmbedding(head_dim)


@pytest.mark.parametrize("base", [0.0, -10000.0, float("nan")])
def test_base_must_be_positive(base):
    with pytest.raises(ValueError, match="base"):
        RotaryEmbedding(8, base)
