"""KVCache: equal to one pass however the tokens arrive; views, errors, dtypes, devices."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma.grouped_query_attention import GroupedQueryAttention
from paligemma.kv_cache import KVCache
from paligemma.rope import RotaryEmbedding

D, H, K, DH = 24, 4, 2, 8


def causal(new, old=0):
    return torch.ones(1, 1, new, old + new, dtype=torch.bool).tril(diagonal=old)


def reference():
    """`GemmaAttention` and `DynamicCache` of transformers; seven tokens come as 4 + 1 + 2."""
    from transformers import DynamicCache, GemmaConfig
    from transformers.models.gemma.modeling_gemma import GemmaAttention, GemmaRotaryEmbedding

    torch.manual_seed(0)
    config = GemmaConfig(
        hidden_size=D,
        num_attention_heads=H,
        num_key_value_heads=K,
        head_dim=DH,
        num_hidden_layers=1,
    )
    config._attn_implementation = "eager"
    layer, rope = GemmaAttention(config, layer_idx=0).eval(), GemmaRotaryEmbedding(config)
    x, cache, outputs = torch.randn(2, 7, D), DynamicCache(), []
    for part in x.split([4, 1, 2], dim=1):
        old, new = cache.get_seq_length(), part.shape[1]
        rotation = rope(part, torch.arange(old, old + new).expand(2, -1))
        added = torch.zeros(1, 1, new, old + new).masked_fill(~causal(new, old), float("-inf"))
        outputs.append(layer(part, rotation, added, past_key_values=cache)[0])
    tensors = {f"weights.{name}": weight for name, weight in layer.state_dict().items()}
    kept = {"keys": cache.layers[0].keys, "values": cache.layers[0].values}
    return tensors | {"x": x, "out": torch.cat(outputs, dim=1)} | kept


def make(kv_heads=K, seed=0, layers=2):
    """A stack of attention layers, as a function of (x, positions, mask, cache)."""
    torch.manual_seed(seed)
    stack = [GroupedQueryAttention(D, H, kv_heads, DH, i) for i in range(layers)]
    rope = RotaryEmbedding(DH)

    def run(x, positions, mask=None, cache=None):
        cos, sin = rope(positions)
        for layer in stack:
            x = x + layer(x, cos, sin, mask, cache)
        return x

    return run


def in_chunks(run, x, chunks, cache):
    outputs = []
    for part in x.split(chunks, dim=1):
        old, new = len(cache), part.shape[1]
        positions = torch.arange(old, old + new).expand(len(x), -1)
        outputs.append(run(part, positions, causal(new, old), cache))
    return torch.cat(outputs, dim=1)


def splits(length):
    """Every way to cut `length` tokens into calls."""
    cuts = st.sets(st.integers(1, length - 1)) if length > 1 else st.just(set())
    edges = cuts.map(lambda c: [0, *sorted(c), length])
    return edges.map(lambda e: [b - a for a, b in pairwise(e)])


CHUNKS = st.integers(1, 9).flatmap(splits)


def test_agrees_with_transformers():
    expected = reference()
    layer = GroupedQueryAttention(D, H, K, DH)
    prefix = "weights."
    own = {n.removeprefix(prefix): t for n, t in expected.items() if n.startswith(prefix)}
    layer.load_state_dict(own)
    rope, cache = RotaryEmbedding(DH), KVCache(1, 2, K, 7, DH)

    def run(x, positions, mask, cache):
        return layer(x, *rope(positions), mask, cache)

    with torch.no_grad():
        out = in_chunks(run, expected["x"], [4, 1, 2], cache)
    for ours, name in ((out, "out"), (cache.keys[0], "keys"), (cache.values[0], "values")):
        torch.testing.assert_close(ours, expected[name], rtol=0, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(chunks=CHUNKS, batch=st.integers(1, 3), spare=st.integers(0, 3))
def test_any_split_holds_the_same(chunks, batch, spare):
    length = sum(chunks)
    k, v = torch.randn(2, batch, K, length, DH)
    cache, start = KVCache(3, batch, K, length + spare, DH), 0
    for n in chunks:
        end = start + n
        for i in range(3):
            keys, values = cache.update(i, k[:, :, start:end] + i, v[:, :, start:end] - i)
            assert torch.equal(keys, k[:, :, :end] + i)
            assert torch.equal(values, v[:, :, :end] - i)
        start = end
        assert len(cache) == end


@settings(max_examples=25, deadline=None)
@given(chunks=CHUNKS, kv_heads=st.sampled_from([1, 2, 4]))
def test_any_split_attends_as_one_pass(chunks, kv_heads):
    run, length = make(kv_heads), sum(chunks)
    x = torch.randn(2, length, D)
    with torch.no_grad():
        full = run(x, torch.arange(length).expand(2, -1), causal(length))
        cached = in_chunks(run, x, chunks, KVCache(2, 2, kv_heads, length, DH))
    torch.testing.assert_close(cached, full, rtol=1e-4, atol=1e-5)


def test_views_share_memory():
    cache = KVCache(2, 2, K, 6, DH)
    k, v = torch.randn(2, 2, K, 3, DH)
    keys, values = cache.update(1, k, v)
    for view, room in ((keys, cache.keys[1]), (values, cache.values[1])):
        assert view.data_ptr() == room.data_ptr() and view.stride() == room.stride()
    later, _ = cache.update(1, k, v)
    assert later.data_ptr() == keys.data_ptr()
    assert torch.equal(keys, k)  # an older view is not disturbed


def test_new_tokens_are_copied_in():
    cache = KVCache(1, 1, K, 4, DH)
    k, v = torch.ones(2, 1, K, 2, DH)
    keys, values = cache.update(0, k, v)
    k.zero_()
    v.zero_()
    assert keys.eq(1).all() and values.eq(1).all()


def test_memory_is_taken_once():
    cache = KVCache(2, 1, K, 64, DH)
    places = [t.data_ptr() for t in (*cache.keys, *cache.values)]
    assert len(set(places)) == 4
    size = cache.nbytes
    for _ in range(64):
        for i in range(2):
            cache.update(i, *torch.randn(2, 1, K, 1, DH))
    assert [t.data_ptr() for t in (*cache.keys, *cache.values)] == places
    assert cache.nbytes == size == 2 * 2 * K * 64 * DH * 4


def test_rows_are_independent():
    run, x = make(), torch.randn(3, 5, D)
    other = x.clone()
    other[1] = torch.randn(5, D)
    with torch.no_grad():
        before, after = (
            in_chunks(run, rows, [3, 2], KVCache(2, 3, K, 5, DH)) for rows in (x, other)
        )
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.allclose(before[1], after[1])


def test_layers_are_independent():
    cache = KVCache(2, 1, K, 4, DH)
    k, v = torch.randn(2, 1, K, 3, DH)
    cache.update(0, k, v)
    assert len(cache) == 0  # the other layer has nothing yet
    keys, _ = cache.update(1, -k, v)
    assert len(cache) == 3
    assert torch.equal(keys, -k) and torch.equal(cache.keys[0][:, :, :3], k)


def test_overflow_is_an_error_and_writes_nothing():
    cache = KVCache(1, 1, K, 4, DH)
    k, v = torch.randn(2, 1, K, 3, DH)
    cache.update(0, k, v)
    with pytest.raises(ValueError, match=r"holds 4 tokens and 5 are needed; .*larger max_length"):
        cache.update(0, *torch.randn(2, 1, K, 2, DH))
    assert len(cache) == 3
    keys, _ = cache.update(0, k[:, :, :1], v[:, :, :1])  # the last place is still free
    assert torch.equal(keys, torch.cat((k, k[:, :, :1]), dim=2))


@pytest.mark.parametrize(
    ("k_shape", "v_shape", "name"),
    [
        ((1, K, 1, DH), (1, K, 1, DH), "k"),  # would broadcast over the batch
        ((2, 1, 1, DH), (2, 1, 1, DH), "k"),  # and over the heads
        ((2, K, 1, 1), (2, K, 1, 1), "k"),
        ((2, K, 1, DH), (2, 1, 1, DH), "v"),
        ((2, K, 3, DH), (2, K, 1, DH), "v"),  # and over the tokens
        ((2, K, DH), (2, K, DH), "k"),
    ],
)
def test_other_shapes_are_refused(k_shape, v_shape, name):
    cache = KVCache(1, 2, K, 4, DH)
    with pytest.raises(ValueError, match=rf"^{name} is \[.*expected \[2, {K}, L, {DH}\]"):
        cache.update(0, torch.randn(k_shape), torch.randn(v_shape))
    assert len(cache) == 0


def test_no_tokens_change_nothing():
    cache = KVCache(1, 1, K, 2, DH)
    cache.update(0, *torch.randn(2, 1, K, 2, DH))
    keys, values = cache.update(0, *torch.randn(2, 1, K, 0, DH))
    assert keys.shape == values.shape == (1, K, 2, DH)
    assert len(cache) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_keeps_its_dtype(dtype):
    cache = KVCache(1, 1, K, 4, DH, dtype=dtype)
    k, v = torch.randn(2, 1, K, 2, DH).to(dtype)
    keys, values = cache.update(0, k, v)
    assert keys.dtype == values.dtype == dtype
    assert torch.equal(keys, k) and torch.equal(values, v)
    assert cache.nbytes == 2 * K * 4 * DH * dtype.itemsize


def test_meta_device_costs_nothing():
    cache = KVCache(18, 64, 8, 4104, 256, device="meta", dtype=torch.bfloat16)
    k, v = torch.empty(2, 64, 8, 264, 256, device="meta", dtype=torch.bfloat16)
    keys, values = cache.update(17, k, v)
    assert keys.is_meta and values.is_meta and keys.shape == k.shape
    assert cache.nbytes == 18 * 2 * 64 * 8 * 4104 * 256 * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_lives_on_the_gpu():
    cache = KVCache(1, 1, K, 4, DH, device="cuda")
    keys, values = cache.update(0, *torch.randn(2, 1, K, 2, DH, device="cuda"))
    assert keys.is_cuda and values.is_cuda


def test_empty_cache_is_false_but_not_none():
    """`if cache:` would skip an empty cache; attention has to ask `is not None`."""
    cache = KVCache(2, 1, K, 4, DH)
    assert not cache and len(cache) == 0
    run, x = make(), torch.randn(1, 2, D)
    with torch.no_grad():
        run(x, torch.arange(2)[None], causal(2), cache)
    assert len(cache) == 2
