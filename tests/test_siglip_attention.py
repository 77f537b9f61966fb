"""Lesson 04: bidirectional multi-head attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipAttention as Published

from paligemma.siglip_attention import SiglipAttention


def published(hidden_size: int, heads: int, implementation: str = "eager", seed: int = 0):
    """The layer of transformers; weights large enough that softmax is far from uniform."""
    config = SiglipVisionConfig(hidden_size=hidden_size, num_attention_heads=heads)
    config._attn_implementation = implementation
    theirs = Published(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, std=1.5 * hidden_size**-0.5, generator=generator)
    return theirs


def vectors(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(hidden_size: int = 24, heads: int = 4, seed: int = 0) -> SiglipAttention:
    ours = SiglipAttention(hidden_size, heads)
    ours.load_state_dict(published(hidden_size, heads, seed=seed).state_dict())
    return ours


def reference() -> dict[str, torch.Tensor]:
    """Weights, an input and the output of transformers, for the notebook."""
    theirs, x = published(24, 4), vectors(2, 9, 24)
    return theirs.state_dict() | {"x": x, "output": theirs(x)[0]}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("hidden_size", "heads"), [(24, 4), (16, 1), (10, 5), (6, 6)])
def test_agrees_with_transformers(hidden_size, heads, implementation):
    theirs, ours = published(hidden_size, heads, implementation), make(hidden_size, heads)
    x = vectors(3, 7, hidden_size)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x)[0], atol=1e-5, rtol=1e-5)


def test_agrees_with_torch():
    ours, x = make(), vectors(2, 5, 24)
    torchs = torch.nn.MultiheadAttention(24, 4, batch_first=True)
    packed = {
        f"in_proj_{kind}": torch.cat(
            [getattr(p, kind) for p in (ours.q_proj, ours.k_proj, ours.v_proj)]
        )
        for kind in ("weight", "bias")
    }
    out = {f"out_proj.{name}": tensor for name, tensor in ours.out_proj.state_dict().items()}
    torchs.load_state_dict(packed | out)
    torch.testing.assert_close(ours(x), torchs(x, x, x)[0], atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    patches=st.integers(1, 6),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 5),
)
def test_equals_one_query_at_a_time(batch, patches, heads, head_dim):
    layer = make(heads * head_dim, heads)
    x = vectors(batch, patches, heads * head_dim)
    q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    mixed = torch.zeros_like(x)
    for b in range(batch):
        for h in range(heads):
            own = slice(h * head_dim, (h + 1) * head_dim)
            for i in range(patches):
                scores = k[b, :, own] @ q[b, i, own] / head_dim**0.5
                mixed[b, i, own] = scores.softmax(dim=0) @ v[b, :, own]
    out = layer(x)
    assert out.shape == x.shape
    torch.testing.assert_close(out, layer.out_proj(mixed), atol=1e-5, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(7)))
def test_shuffled_in_shuffled_out(order):
    layer, x = make(), vectors(2, 7, 24)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("source", [0, 3, 8])
def test_every_patch_reaches_every_patch_of_its_own_picture(source):
    layer, x = make(), vectors(2, 9, 24)
    changed = x.clone()
    changed[0, source] += 1
    moved = (layer(changed) - layer(x)).abs().amax(dim=2)
    assert (moved[0] > 1e-5).all(), "forwards and backwards"
    assert (moved[1] == 0).all(), "pictures of a batch do not mix"


def test_a_bias_of_the_keys_changes_nothing():
    layer, x = make(), vectors(1, 5, 24)
    before = layer(x)
    torch.nn.init.normal_(layer.k_proj.bias)
    torch.testing.assert_close(layer(x), before, atol=1e-5, rtol=1e-5)


def test_one_patch_sees_itself():
    layer, x = make(), vectors(2, 1, 24)
    torch.testing.assert_close(layer(x), layer.out_proj(layer.v_proj(x)), atol=1e-6, rtol=1e-5)


def test_huge_scores_stay_finite():
    layer, x = make(), 1e4 * vectors(1, 5, 24)
    assert layer(x).isfinite().all()


def test_no_dropout_in_training():
    layer, x = make().train(), vectors(1, 5, 24)
    assert torch.equal(layer(x), layer(x))


def test_every_weight_learns():
    layer = make()
    layer(vectors(2, 6, 24)).square().sum().backward()
    for name, weight in layer.named_parameters():
        if name != "k_proj.bias":  # without effect, see above
            assert (weight.grad != 0).all(), name


def test_bfloat16_stays_close():
    layer, x = make(), vectors(2, 9, 24)
    with torch.no_grad():
        exact = layer(x)
        out = layer.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_published_shapes():
    with torch.device("meta"):
        layer = SiglipAttention(1152, 16)
        assert layer(torch.empty(2, 256, 1152)).shape == (2, 256, 1152)
    assert layer.head_dim == 72
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    projections = ("q_proj", "k_proj", "v_proj", "out_proj")
    assert shapes == {f"{p}.weight": (1152, 1152) for p in projections} | {
        f"{p}.bias": (1152,) for p in projections
    }


@pytest.mark.parametrize(("hidden_size", "heads"), [(10, 3), (8, 16), (8, 0), (8, -2)])
def test_heads_that_do_not_divide_are_refused(hidden_size, heads):
    with pytest.raises(
        ValueError, match=f"hidden_size {hidden_size} .* num_attention_heads {heads};"
    ):
        SiglipAttention(hidden_size, heads)


def test_a_head_holds_all_patches_and_some_channels():
    layer, x = make(), vectors(2, 5, 24)
    heads = layer.split_heads(x)
    assert heads.shape == (2, 4, 5, 6)
    for h in range(4):
        assert torch.equal(heads[:, h], x[:, :, 6 * h : 6 * h + 6])
