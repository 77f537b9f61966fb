"""The decoder of PaliGemma 2 against transformers: caps, windows, scale, padding and cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma.gemma2 import (
    Gemma2Config,
    Gemma2DecoderLayer,
    Gemma2Model,
    capped_attention,
    soft_cap,
    window_mask,
)
from paligemma.grouped_query_attention import grouped_attention
from paligemma.kv_cache import KVCache
from paligemma.model import PaliGemma, PaliGemmaConfig
from paligemma.siglip import SiglipVisionConfig

V, D, WIDE, LAYERS, H, K, DH, WINDOW = 24, 12, 20, 4, 4, 2, 6, 4
EXTRA = {
    "query_pre_attn_scalar": 5,  # neither DH nor D // H
    "sliding_window": WINDOW,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}


def causal(new, old=0):
    return torch.ones(1, 1, new, old + new, dtype=torch.bool).tril(diagonal=old)


def theirs(kv_heads=K, **changes):
    """A small `Gemma2ForCausalLM` of transformers with random weights."""
    from transformers import Gemma2Config as Config
    from transformers import Gemma2ForCausalLM

    config = Config(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=H,
        num_key_value_heads=kv_heads,
        head_dim=DH,
        **EXTRA | changes,
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            scale = 0.2 if weight.dim() == 1 else weight.shape[-1] ** -0.5
            weight.copy_(torch.randn_like(weight) * scale)
    return model


def ours(state=None, kv_heads=K, **changes):
    torch.manual_seed(0)
    config = Gemma2Config(V, D, WIDE, LAYERS, H, kv_heads, DH, **EXTRA | changes)
    model = Gemma2Model(config).eval()
    if state is not None:
        model.load_state_dict(state)
    return model


def some_ids(rows=2, length=9):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def reference():
    """`Gemma2ForCausalLM` with caps that bite and prompts beyond the window."""
    model, ids = theirs(), some_ids()
    weights = {f"weights.{name}": weight for name, weight in model.model.state_dict().items()}
    return weights | {"ids": ids, "logits": model(ids).logits}


@torch.no_grad()
def full_pass(model, ids):
    places = torch.arange(ids.shape[1]).expand(len(ids), -1)
    return model.logits(model(model.embed(ids), places, causal(ids.shape[1])))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [1, WINDOW, WINDOW + 1, 23])
def test_equals_transformers(kv_heads, length):
    model, ids = theirs(kv_heads), some_ids(2, length)
    with torch.no_grad():
        expected = model(ids).logits
    mine = full_pass(ours(model.model.state_dict(), kv_heads), ids)
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["attn_logit_softcapping", "final_logit_softcapping"])
@pytest.mark.parametrize("no_cap", [None, 0, 0.0])
def test_a_cap_of_none_or_0_is_none(name, no_cap):
    """As transformers with None; recipes for fine-tuning write 0."""
    model, ids = theirs(**{name: None}), some_ids()
    with torch.no_grad():
        expected = model(ids).logits
    mine = full_pass(ours(model.model.state_dict(), **{name: no_cap}), ids)
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5)
    assert (full_pass(ours(model.model.state_dict()), ids) - expected).abs().max() > 1e-2


def test_without_a_window_all_is_seen():
    model, ids = ours(sliding_window=None), some_ids()
    torch.testing.assert_close(full_pass(model, ids), full_pass(ours(sliding_window=9), ids))


def test_a_head_of_its_own_is_capped_too():
    model, hidden = ours(), torch.randn(1, 3, D)
    model.head = torch.nn.Linear(D, V)
    torch.testing.assert_close(model.logits(hidden), soft_cap(model.head(hidden), 3.0))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 12))
def test_any_split_through_the_cache_equals_one_pass(steps, window):
    model, length = ours(sliding_window=window), sum(steps)
    ids = some_ids(2, length)
    places = torch.arange(length).expand(2, -1)
    cache, parts = KVCache(LAYERS, 2, K, length, DH), []
    with torch.no_grad():
        for part, place in zip(ids.split(steps, 1), places.split(steps, 1), strict=True):
            mask = causal(part.shape[1], len(cache))
            parts.append(model.logits(model(model.embed(part), place, mask, cache)))
    torch.testing.assert_close(torch.cat(parts, 1), full_pass(model, ids), rtol=0, atol=1e-5)


def test_padded_row_equals_the_row_alone():
    model, ids = ours(), some_ids(2, 12)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, :3] = False
    places = (real.cumsum(-1) - 1).clamp(min=0)
    mask = causal(12) & real[:, None, None] | torch.eye(12, dtype=torch.bool)
    with torch.no_grad():
        together = model.logits(model(model.embed(ids), places, mask))
    torch.testing.assert_close(together[:1, 3:], full_pass(model, ids[:1, 3:]), rtol=0, atol=1e-5)
    torch.testing.assert_close(together[1:], full_pass(model, ids[1:]), rtol=0, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 12),
    st.integers(1, 12),
    st.integers(1, 14),
    st.integers(0, 3),
    st.integers(0, 5),
)
def test_window_mask_by_its_definition(prefix, length, window, pad, free):
    """Padding, prefix and suffix: a pair of the prefix stays, any other look is cut by distance.

    The mask alone says it: `window_mask` is told no positions. `free` slots, not filled yet, may
    stand behind a single new token.
    """
    place = torch.arange(length)
    inside = (place >= pad) & (place < pad + prefix)
    both = inside & inside[:, None]
    mask = both | (place <= place[:, None]) & (place >= pad) | torch.eye(length, dtype=torch.bool)
    near = place > place[:, None] - window
    found = window_mask(mask[None, None], window)[0, 0]
    assert torch.equal(found, mask & (near | both))
    assert found.any(-1).all()  # no softmax over nothing
    for new in range(1, length):  # the last tokens, the others in a cache
        if length - new >= pad + prefix:
            step = window_mask(mask[None, None, -new:], window)[0, 0]
            assert torch.equal(step, found[-new:])
    for row in range(pad + prefix, length):  # one token, in a room that is seen whole
        room = torch.nn.functional.pad(mask[row, : row + 1], (0, length - row - 1 + free))
        step = window_mask(room[None, None, None], window)[0, 0, 0]
        assert torch.equal(step[:length], found[row]) and not step[length:].any()


def test_rows_of_a_batch_have_their_own_window():
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    found = window_mask(real[:, None, None], 3)[:, 0, 0]
    assert found.tolist() == [[False] * 3 + [True] * 3] * 2
    assert window_mask(torch.ones(1, 1, 6, 6, dtype=torch.bool), 4).all()  # all look at all
    assert window_mask(causal(4), 4).equal(causal(4))  # it all fits


def test_window_mask_reads_no_value():
    """It is compiled: nothing in it may wait for a number (the meta device has none)."""
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool, device="meta")
    assert window_mask(mask, 4).shape == mask.shape


def test_a_mask_is_made_where_there_is_none():
    model, ids = ours(), some_ids(2, 9)
    places = torch.arange(9).expand(2, -1)
    cache, parts = KVCache(LAYERS, 2, K, 9, DH), []
    with torch.no_grad():
        for t in range(9):  # one token a step needs no mask
            step = model.embed(ids[:, t : t + 1]), places[:, t : t + 1], None, cache
            parts.append(model.logits(model(*step)))
    torch.testing.assert_close(torch.cat(parts, 1), full_pass(model, ids), rtol=0, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.floats(-1e4, 1e4), st.floats(0.5, 100))
def test_soft_cap(x, cap):
    y = soft_cap(torch.tensor([x, x + 1]), cap)
    assert y.dtype == torch.float32 and y.abs().max() <= cap and y[0] <= y[1]
    assert y[0] * x >= 0 and abs(y[0]) <= abs(x) * (1 + 1e-5) + 1e-6


def test_cap_after_the_scale_and_before_the_mask():
    q, k, v = 30 * torch.randn(3, 1, 1, 5, 8, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    scores = 2 * torch.tanh(q @ k.transpose(-1, -2) * 0.3 / 2)
    expected = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
    torch.testing.assert_close(capped_attention(q, k, v, mask, 0.3, 2), expected)
    first = capped_attention(q, k, v, mask, 0.3, 2)[0, 0, 0]
    torch.testing.assert_close(first, v[0, 0, 0])  # it sees itself alone: nothing leaks


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_high_cap_is_no_cap(kv_heads):
    q, (k, v) = torch.randn(2, 4, 3, 8), torch.randn(2, 2, kv_heads, 5, 8)
    mask = torch.rand(2, 1, 3, 5) > 0.4
    mask[..., 0] = True
    found = capped_attention(q, k, v, mask, 8**-0.5, 1e6)
    torch.testing.assert_close(found, grouped_attention(q, k, v, mask), rtol=1e-4, atol=1e-4)


def test_gradients_flow():
    model, ids = ours(), some_ids()
    hidden = model(model.embed(ids), torch.arange(9).expand(2, -1), causal(9))
    model.logits(hidden).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_what_a_block_adds_has_size_one():
    block = Gemma2DecoderLayer(ours().config, 1)
    for p in block.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=5.0)
    x = torch.zeros(1, 3, D)
    x[0, :, 0] = 1
    cos, sin = torch.ones(1, 1, 3, DH), torch.zeros(1, 1, 3, DH)
    with torch.no_grad():
        h = block.self_attn(block.input_layernorm(x), cos, sin)
        added = block.post_attention_layernorm(h)
        torch.testing.assert_close(added.square().mean(-1), torch.ones(1, 3))
        block.post_attention_layernorm.weight.fill_(-1)
        block.post_feedforward_layernorm.weight.fill_(-1)
        assert torch.equal(block(x, cos, sin), x)  # weight 1 + w = 0: it adds nothing


def test_bfloat16_keeps_its_type():
    model = ours().bfloat16()
    hidden = model(model.embed(some_ids()), torch.arange(9).expand(2, -1), causal(9))
    assert hidden.dtype == torch.bfloat16 and model.logits(hidden).dtype == torch.float32


@pytest.mark.parametrize(("size", "count"), [(224, 3_032_094_960), (448, 3_032_979_696)])
def test_published_sizes(size, count):
    vision = SiglipVisionConfig(image_size=size)
    with torch.device("meta"):
        model = PaliGemma(PaliGemmaConfig(vision, Gemma2Config()))
        padded = PaliGemma(PaliGemmaConfig(vision, Gemma2Config(vocab_size=257216)))
    assert sum(p.numel() for p in model.parameters()) == count
    assert sum(p.numel() for p in padded.parameters()) == count + 64 * 2304
    assert isinstance(model.language_model, Gemma2Model)


def test_the_28b_model_has_its_own_widths():
    """D // H is 144, the query scale; a head has 128 channels."""
    sizes = {"hidden_size": 4608, "num_attention_heads": 32, "num_key_value_heads": 16}
    with torch.device("meta"):
        block = Gemma2DecoderLayer(
            Gemma2Config(**sizes, head_dim=128, query_pre_attn_scalar=144), 0
        )
    assert block.self_attn.q_proj.weight.shape == (32 * 128, 4608)
    assert block.self_attn.scale == 1 / 12


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_key_value_heads": 3}, "does not divide"), ({"head_dim": 5}, "head_dim 5")],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Gemma2Model(Gemma2Config(**vars(ours().config) | change))
