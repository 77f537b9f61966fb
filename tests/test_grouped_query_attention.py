"""Grouped-query attention: parity with transformers, masks, caches, dtypes, any shape."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma.grouped_query_attention import (
    GroupedQueryAttention,
    group_size,
    grouped_attention,
)
from paligemma.kv_cache import KVCache
from paligemma.rope import RotaryEmbedding

D, H, DH = 24, 4, 8  # H·DH != D: a width confused with another shows
KINDS = {"mha": 4, "gqa": 2, "mqa": 1}


def reference():
    """`GemmaAttention` of transformers for the three kinds, with a mask and late positions."""
    from transformers import GemmaConfig
    from transformers.models.gemma.modeling_gemma import GemmaAttention, GemmaRotaryEmbedding

    torch.manual_seed(0)
    x = torch.randn(2, 6, D)
    positions = torch.stack((torch.arange(3, 9), torch.tensor([0, 0, 0, 1, 2, 3])))
    mask = (torch.rand(2, 1, 6, 6) < 0.6) | torch.eye(6, dtype=torch.bool)
    tensors = {"x": x, "positions": positions, "mask": mask}
    for kind, kv_heads in KINDS.items():
        config = GemmaConfig(
            hidden_size=D, num_attention_heads=H, num_key_value_heads=kv_heads, head_dim=DH
        )
        config._attn_implementation = "eager"
        layer = GemmaAttention(config, layer_idx=0).eval()
        rotation = GemmaRotaryEmbedding(config)(x, positions)
        added = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
        tensors |= {f"{kind}.weights.{name}": w for name, w in layer.state_dict().items()}
        tensors[f"{kind}.out"] = layer(x, rotation, added)[0]
    return tensors


def naive(q, k, v, mask=None):
    """One query of one head at a time, in Python."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        scores = k[b, h // group] @ q[b, h, i] / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[b, 0, i], float("-inf"))
        out[b, h, i] = scores.softmax(dim=0) @ v[b, h // group]
    return out


def make(kv_heads, seed=0, **kwargs):
    torch.manual_seed(seed)
    return GroupedQueryAttention(D, H, kv_heads, DH, **kwargs)


def rotation(length, start=0, batch=1):
    return RotaryEmbedding(DH)(torch.arange(start, start + length).expand(batch, -1))


def causal(length):
    return torch.ones(1, 1, length, length, dtype=torch.bool).tril()


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_transformers(kind):
    expected = {name: tensor.detach() for name, tensor in reference().items()}
    layer = make(KINDS[kind])
    prefix = f"{kind}.weights."
    own = {k.removeprefix(prefix): t for k, t in expected.items() if k.startswith(prefix)}
    layer.load_state_dict(own)
    cos, sin = RotaryEmbedding(DH)(expected["positions"])
    out = layer(expected["x"], cos, sin, expected["mask"])
    torch.testing.assert_close(out, expected[f"{kind}.out"], rtol=0, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    length=st.integers(1, 4),
    keys=st.integers(1, 6),
    head_dim=st.integers(1, 5),
    masked=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_naive_loop(batch, kv_heads, group, length, keys, head_dim, masked, seed):
    torch.manual_seed(seed)
    q = torch.randn(batch, kv_heads * group, length, head_dim)
    k, v = torch.randn(2, batch, kv_heads, keys, head_dim)
    mask = None
    if masked:
        mask = torch.rand(batch, 1, length, keys) < 0.5
        mask[..., 0] = True
    torch.testing.assert_close(
        grouped_attention(q, k, v, mask), naive(q, k, v, mask), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kv_heads", [6, 3, 2, 1])
def test_equals_sdpa_with_enable_gqa(kv_heads):
    torch.manual_seed(1)
    q = torch.randn(2, 6, 4, 8)
    k, v = torch.randn(2, 2, kv_heads, 5, 8)
    mask = torch.rand(2, 1, 4, 5) < 0.5
    mask[..., 2] = True
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(grouped_attention(q, k, v, mask), expected, rtol=1e-4, atol=1e-5)


def test_neighbouring_query_heads_share():
    q, k = torch.randn(1, 6, 2, 4), torch.randn(1, 2, 3, 4)
    v = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand_as(k)
    assert grouped_attention(q, k, v)[0, :, 0, 0].round().tolist() == [0, 0, 0, 1, 1, 1]


def test_true_may_look():
    q, k, v = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    mask = torch.zeros(1, 1, 2, 3, dtype=torch.bool)
    mask[0, 0, 0, 2] = mask[0, 0, 1, 0] = True  # each query sees one key: it gets that value
    out = grouped_attention(q, k, v, mask)
    for h in range(4):
        torch.testing.assert_close(out[0, h, 0], v[0, h // 2, 2])
        torch.testing.assert_close(out[0, h, 1], v[0, h // 2, 0])


def test_a_query_that_sees_nothing_gets_zeros():
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 3, 8)
    mask = torch.tensor([[[[True, True, True], [False, False, False]]]])
    out = grouped_attention(q, k, torch.ones_like(k), mask)
    assert torch.equal(out[:, :, 1], torch.zeros(1, 4, 8))
    torch.testing.assert_close(out[:, :, 0], torch.ones(1, 4, 8))


def test_masks_differ_between_examples():
    layer, x = make(2), torch.randn(1, 3, D).repeat(2, 1, 1)
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    mask[1, :, :, 0] = False  # as if its first token were padding
    mask[1, :, 0, 0] = True
    out = layer(x, *rotation(3, batch=2), mask)
    alone = layer(x[1:, 1:], *rotation(2, start=1))
    torch.testing.assert_close(out[1:, 1:], alone)
    assert not torch.allclose(out[0, 1:], out[1, 1:], atol=1e-3)


def test_only_relative_positions_count():
    layer, x = make(1), torch.randn(1, 5, D)
    near, far = (layer(x, *rotation(5, start=start), causal(5)) for start in (0, 40))
    torch.testing.assert_close(near, far, rtol=1e-3, atol=1e-5)
    standing = layer(x, *rotation(1), causal(5))  # all five at position 0
    assert not torch.allclose(near, standing, atol=1e-4)


class Recorder:
    """A cache that is nothing but `update`."""

    def __init__(self):
        self.seen, self.k, self.v = [], [], []

    def update(self, layer_idx, k, v):
        self.seen.append((layer_idx, tuple(k.shape), tuple(v.shape)))
        self.k.append(k)
        self.v.append(v)
        return torch.cat(self.k, dim=2), torch.cat(self.v, dim=2)


@pytest.mark.parametrize("kv_heads", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("kind", ["recorder", "KVCache"])
def test_steps_with_a_cache_equal_one_pass(kind, kv_heads):
    layer, x = make(kv_heads, layer_idx=1), torch.randn(2, 5, D)
    cache = Recorder() if kind == "recorder" else KVCache(2, 2, kv_heads, 5, DH)
    at_once = layer(x, *rotation(5), causal(5))
    first = layer(x[:, :3], *rotation(3), causal(3), cache)
    rest = [layer(x[:, t : t + 1], *rotation(1, start=t), cache=cache) for t in (3, 4)]
    torch.testing.assert_close(torch.cat((first, *rest), dim=1), at_once)
    if kind == "recorder":
        assert cache.seen[0] == (1, (2, kv_heads, 3, DH), (2, kv_heads, 3, DH))


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 3), (4, 8), (8, 0), (8, -2)])
def test_unequal_groups_are_refused(heads, kv_heads):
    with pytest.raises(ValueError, match=f"num_key_value_heads {kv_heads} does not divide"):
        GroupedQueryAttention(D, heads, kv_heads, DH)
    with pytest.raises(ValueError, match=f"num_attention_heads {heads}"):
        group_size(heads, kv_heads)


def test_function_refuses_unequal_groups():
    q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 3, 5, 8)  # 4·6 rows would divide by 3
    with pytest.raises(ValueError, match="does not divide"):
        grouped_attention(q, k, k)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)
@pytest.mark.parametrize("kv_heads", KINDS.values(), ids=KINDS)
def test_half_precision_stays_close(kv_heads, dtype, tolerance):
    layer, x = make(kv_heads), torch.randn(2, 6, D)
    with torch.no_grad():
        expected = layer(x, *rotation(6), causal(6))
        out = layer.to(dtype)(x.to(dtype), *rotation(6), causal(6))
    assert out.dtype == dtype
    assert (out.float() - expected).abs().max() <= tolerance


@pytest.mark.parametrize("kv_heads", KINDS.values(), ids=KINDS)
def test_gradients_reach_every_weight(kv_heads):
    layer = make(kv_heads)
    x = torch.randn(2, 4, D, requires_grad=True)
    layer(x, *rotation(4), causal(4))[:, 2].square().sum().backward()
    for name, weight in layer.named_parameters():
        assert weight.grad.isfinite().all() and weight.grad.abs().sum() > 0, name
    assert x.grad[:, :3].abs().amin(dim=(0, 2)).gt(0).all()
    assert torch.equal(x.grad[:, 3], torch.zeros(2, D))  # the future has no influence


def test_gradient_is_right():
    q = torch.randn(1, 4, 2, 3, dtype=torch.double, requires_grad=True)
    k, v = (torch.randn(1, 2, 3, 3, dtype=torch.double, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[[[True, False, True], [True, True, False]]]])
    assert torch.autograd.gradcheck(lambda *t: grouped_attention(*t, mask), (q, k, v))


def test_names_and_shapes_are_the_published_ones():
    shapes = {name: tuple(w.shape) for name, w in make(2).state_dict().items()}
    assert shapes == {
        "q_proj.weight": (H * DH, D),
        "k_proj.weight": (2 * DH, D),
        "v_proj.weight": (2 * DH, D),
        "o_proj.weight": (D, H * DH),
    }


def test_inputs_are_left_alone():
    q, k, v = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    mask = torch.ones(1, 1, 2, 3, dtype=torch.bool)
    before = [t.clone() for t in (q, k, v, mask)]
    grouped_attention(q, k, v, mask)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v, mask), before, strict=True))
    strided = torch.randn(1, 2, 4, 8).transpose(1, 2)  # as it comes from the projections
    torch.testing.assert_close(grouped_attention(strided, k, v), naive(strided, k, v))
