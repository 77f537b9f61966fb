"""The decoder against transformers, with and without a cache; its names, sizes and errors."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma.gemma import GemmaConfig, GemmaDecoderLayer, GemmaModel
from paligemma.kv_cache import KVCache
from paligemma.rope import RotaryEmbedding

KINDS = {"mha": 4, "gqa": 2, "mqa": 1}
V, D, WIDE, LAYERS, H, DH = 24, 12, 20, 2, 4, 6  # H·DH != D; all sizes differ


def causal(new, old=0):
    return torch.ones(1, 1, new, old + new, dtype=torch.bool).tril(diagonal=old)


def theirs(kv_heads, seed=0, **changes):
    """A small `GemmaForCausalLM` of transformers with random weights."""
    from transformers import GemmaConfig as Config
    from transformers import GemmaForCausalLM

    sizes = {
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": H,
        "num_key_value_heads": kv_heads,
        "head_dim": DH,
    }
    torch.manual_seed(seed)
    model = GemmaForCausalLM(Config(**sizes | changes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * weight.shape[-1] ** -0.5)
    return model


def ours(kv_heads, state=None, seed=0, **changes):
    torch.manual_seed(seed)
    config = GemmaConfig(V, D, WIDE, LAYERS, H, kv_heads, DH)
    model = GemmaModel(GemmaConfig(**vars(config) | changes)).eval()
    if state is not None:
        model.load_state_dict(state)
    return model


def some_ids(rows=2, length=6, seed=1):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))


def reference():
    """`GemmaForCausalLM` for the three kinds: weights and logits of the same ids."""
    tensors = {"ids": some_ids()}
    for kind, kv_heads in KINDS.items():
        model = theirs(kv_heads)
        state = model.model.state_dict()
        tensors |= {f"{kind}.weights.{name}": weight for name, weight in state.items()}
        tensors[f"{kind}.logits"] = model(tensors["ids"]).logits
    return tensors


@torch.no_grad()
def full_pass(model, ids):
    length = ids.shape[1]
    places = torch.arange(length).expand(len(ids), -1)
    return model.logits(model(model.embed(ids), places, causal(length)))


@torch.no_grad()
def in_chunks(model, ids, chunks):
    kv_heads, dtype = model.config.num_key_value_heads, model.norm.weight.dtype
    cache = KVCache(LAYERS, len(ids), kv_heads, ids.shape[1], DH, dtype=dtype)
    parts = []
    for part in ids.split(chunks, dim=1):
        old, new = len(cache), part.shape[1]
        places = torch.arange(old, old + new).expand(len(ids), -1)
        parts.append(model.logits(model(model.embed(part), places, causal(new, old), cache)))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_transformers(kind):
    other, ids = theirs(KINDS[kind]), some_ids(3, 9)
    model = ours(KINDS[kind], other.model.state_dict())
    with torch.no_grad():
        expected = other(ids, output_hidden_states=True)
        hidden = model(model.embed(ids), torch.arange(9).expand(3, -1), causal(9))
    torch.testing.assert_close(hidden, expected.hidden_states[-1], rtol=0, atol=1e-5)
    torch.testing.assert_close(model.logits(hidden), expected.logits, rtol=0, atol=1e-5)
    steps = in_chunks(model, ids, [4, 1, 1, 3])
    torch.testing.assert_close(steps, expected.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_as_close_as_transformers(kind, dtype):
    """Mean distance from the float32 logits, over several models: ours ≤ 1.2 × theirs."""
    errors = torch.zeros(2)
    for seed in range(6):
        other, ids = theirs(KINDS[kind], seed), some_ids(4, 10, seed)
        model = ours(KINDS[kind], other.model.state_dict()).to(dtype)
        with torch.no_grad():
            exact = other(ids).logits
            rounded = other.to(dtype)(ids).logits.float()
        logits = full_pass(model, ids)
        assert logits.dtype == torch.float32
        errors += torch.stack([(t - exact).abs().mean() for t in (logits, rounded)])
    assert errors[0] <= 1.2 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [12, 2048])
def test_embedding_is_scaled_as_in_transformers(dtype, width):
    from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding

    layer = GemmaTextScaledWordEmbedding(V, width, 0, embed_scale=width**0.5).to(dtype)
    config = GemmaConfig(V, width, WIDE, 1, H, 1, DH)
    model = GemmaModel(config).to(dtype)
    model.embed_tokens.weight.data.copy_(layer.weight)
    assert torch.equal(model.embed(some_ids()), layer(some_ids()))


def test_factor_is_rounded_to_the_weights_type():
    model = GemmaModel(GemmaConfig(3, 2048, 8, 1, 1, 1, 4)).bfloat16()
    model.embed_tokens.weight.data.fill_(1)
    assert model.embed(torch.tensor([[1]])).unique().tolist() == [45.25]
    assert model.float().embed(torch.tensor([[1]])).unique().item() == pytest.approx(2048**0.5)


def splits(length):
    cuts = st.sets(st.integers(1, length - 1)) if length > 1 else st.just(set())
    edges = cuts.map(lambda c: [0, *sorted(c), length])
    return edges.map(lambda e: [b - a for a, b in pairwise(e)])


@settings(max_examples=25, deadline=None)
@given(
    chunks=st.integers(1, 8).flatmap(splits),
    kv_heads=st.sampled_from([4, 2, 1]),
    rows=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_cached_equals_uncached(chunks, kv_heads, rows, seed):
    model, ids = ours(kv_heads, seed=seed), some_ids(rows, sum(chunks), seed)
    torch.testing.assert_close(
        in_chunks(model, ids, chunks), full_pass(model, ids), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cached_equals_uncached_in_half_precision(dtype):
    model, ids = ours(2).to(dtype), some_ids(2, 8)
    gap = (in_chunks(model, ids, [5, 1, 1, 1]) - full_pass(model, ids)).abs().max()
    assert gap <= 0.1  # the last bit of numbers near 8


def test_other_theta_and_eps_reach_their_parts():
    theta, eps, ids = 50.0, 0.1, some_ids(2, 8)
    rope = {"rope_type": "default", "rope_theta": theta}
    other = theirs(2, rope_parameters=rope, rms_norm_eps=eps)
    state = other.model.state_dict()
    with torch.no_grad():
        expected = other(ids).logits
    model = ours(2, state, rope_theta=theta, rms_norm_eps=eps)
    torch.testing.assert_close(full_pass(model, ids), expected, rtol=0, atol=1e-5)
    for changes in ({"rope_theta": theta}, {"rms_norm_eps": eps}):
        assert (full_pass(ours(2, state, **changes), ids) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_the_published_ones(kind):
    def shapes(model):
        return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}

    assert shapes(ours(KINDS[kind])) == shapes(theirs(KINDS[kind]).model)


def test_defaults_are_the_model_inside_paligemma():
    with torch.device("meta"):
        model = GemmaModel(GemmaConfig())
    assert sum(p.numel() for p in model.parameters()) == 2_508_662_784
    assert all(p.is_meta for p in model.parameters()) and not list(model.buffers())


def test_runs_on_the_meta_device():
    with torch.device("meta"):
        model = GemmaModel(GemmaConfig())
        ids, places = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long)
    cache = KVCache(18, 2, 1, 8, 256, device="meta")
    hidden = model(model.embed(ids), places, None, cache)
    assert hidden.shape == (2, 5, 2048) and len(cache) == 5
    assert model.logits(hidden[:, -1:]).shape == (2, 1, 257216)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
        ({"head_dim": 5}, "head_dim 5 does not split into pairs"),
        ({"rope_theta": 0.0}, "base 0.0 is not a positive number"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ours(4, **change)


def test_a_block_only_adds():
    block = GemmaDecoderLayer(ours(2).config, 0)
    x = torch.randn(2, 5, D)
    rotation = RotaryEmbedding(DH)(torch.arange(5)[None])
    before = x.clone()
    with torch.no_grad():
        block(x, *rotation)
        assert torch.equal(x, before)  # not in place
        block.self_attn.o_proj.weight.zero_()
        after_mlp = block(x, *rotation)
        torch.testing.assert_close(after_mlp, x + block.mlp(block.post_attention_layernorm(x)))
        block.mlp.down_proj.weight.zero_()
        assert torch.equal(block(x, *rotation), x)


def test_without_blocks_it_repeats():
    model = GemmaModel(GemmaConfig(30, 64, 8, 0, 1, 1, 4))
    ids = torch.arange(30)[None]
    hidden = model(model.embed(ids), ids)
    assert torch.equal(model.logits(hidden).argmax(-1), ids)


def test_head_is_the_embedding():
    model, ids = ours(1), some_ids()
    hidden = torch.randn(2, 3, D)
    torch.testing.assert_close(model.logits(hidden), hidden @ model.embed_tokens.weight.T)
    assert not [name for name, _ in model.named_parameters() if "head" in name]
    model.logits(hidden).sum().backward()  # the way out alone
    out = model.embed_tokens.weight.grad.clone()
    assert out.abs().sum(1).gt(0).all()
    model.zero_grad()
    model.embed(ids).sum().backward()  # the way in alone
    used = model.embed_tokens.weight.grad.abs().sum(1).gt(0).nonzero()[:, 0]
    assert used.tolist() == ids.unique().tolist()


def test_a_head_of_its_own_replaces_the_embedding():
    model, hidden = ours(1), torch.randn(2, 3, D)
    model.head = torch.nn.Linear(D, V, bias=False).bfloat16()
    logits = model.logits(hidden.bfloat16())
    assert logits.dtype == torch.float32
    assert torch.equal(logits, model.head(hidden.bfloat16()).float())
    assert "head.weight" in model.state_dict()
    model.head = None
    torch.testing.assert_close(model.logits(hidden), hidden @ model.embed_tokens.weight.T)


def test_no_token_sees_a_later_one():
    model, ids = ours(2), some_ids(1, 7)
    other = ids.clone()
    other[0, 4] = (other[0, 4] + 1) % V
    a, b = full_pass(model, ids), full_pass(model, other)
    assert torch.equal(a[:, :4], b[:, :4])
    assert (a - b)[0, 4:].abs().amax(-1).gt(1e-4).all()


def test_padded_row_equals_the_row_alone():
    model, ids = ours(2), some_ids(2, 7)
    real = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    places = (real.cumsum(-1) - 1).clamp(min=0)
    mask = causal(7) & real[:, None, None].bool() | torch.eye(7, dtype=torch.bool)
    with torch.no_grad():
        together = model.logits(model(model.embed(ids), places, mask))
    alone = full_pass(model, ids[:1, 3:])
    torch.testing.assert_close(together[:1, 3:], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1:], full_pass(model, ids[1:]), rtol=1e-4, atol=1e-5)


def test_it_can_learn():
    torch.manual_seed(0)
    model, ids = ours(1), some_ids(1, 12)
    torch.nn.init.normal_(model.embed_tokens.weight, std=D**-0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        hidden = model(model.embed(ids[:, :-1]), torch.arange(11)[None], causal(11))
        loss = torch.nn.functional.cross_entropy(model.logits(hidden)[0], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
