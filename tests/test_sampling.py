"""Sampling against transformers' warpers, and what has to hold for all logits and parameters."""

import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from paligemma import sampling
from paligemma.sampling import check_sampling, keep_top_k, keep_top_p, multinomial, sample

VOCABULARY = 40
seeds = st.integers(0, 2**31)
masses = st.floats(0.01, 0.99)
CASES = [(1.0, None, 0.9), (0.7, 8, 1.0), (0.7, 8, 0.8), (1.5, 3, 0.5), (2.0, None, 0.3)]


def random_logits(seed=0, rows=4, size=VOCABULARY, spread=3.0):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * spread


def warped(logits, temperature, top_k, top_p):
    """What transformers' `generate` does to logits before it draws."""
    from transformers.generation.logits_process import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    if temperature != 1:
        logits = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        logits = TopKLogitsWarper(top_k)(None, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, logits)
    return logits


def reference() -> dict[str, torch.Tensor]:
    """Random logits and the probabilities that transformers draws from, for each of CASES."""
    logits = random_logits(17)
    found = {"logits": logits}
    for i, (temperature, top_k, top_p) in enumerate(CASES):
        found[f"case{i}.probability"] = warped(logits, temperature, top_k, top_p).softmax(-1)
        found[f"case{i}.parameters"] = torch.tensor([temperature, top_k or 0, top_p])
    return found


def ours(logits, temperature, top_k, top_p):
    """The probabilities from which `sample` draws."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "multinomial", lambda p, generator: seen.append(p) or p.argmax(-1))
        sample(logits, temperature, top_k, top_p)
    return seen[0]


def kept_by(filter_, logits, value):
    return filter_(logits, value) > -torch.inf


def far_from(cumulative, top_p):
    """No running sum is so near to `top_p` that rounding decides."""
    return bool(((cumulative - top_p).abs() > 1e-5).all())


def falling(logits):
    return logits.double().softmax(-1).sort(-1, descending=True).values


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("case", CASES)
def test_probabilities_equal_transformers(case):
    logits = random_logits(17)
    expected = warped(logits, *case).softmax(-1)
    probability = ours(logits, *case)
    assert torch.equal(probability > 0, expected > 0)
    torch.testing.assert_close(probability, expected, rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(seeds, masses, st.sampled_from([0.5, 3.0, 10.0]))
def test_top_p_keeps_what_transformers_keeps(seed, top_p, spread):
    logits = random_logits(seed, spread=spread)
    assume(far_from(falling(logits).cumsum(-1), top_p))
    assert torch.equal(
        kept_by(keep_top_p, logits, top_p), warped(logits, 1, None, top_p).isfinite()
    )


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(1, VOCABULARY + 5))
def test_top_k_keeps_what_transformers_keeps(seed, top_k):
    logits = random_logits(seed)
    kept = kept_by(keep_top_k, logits, top_k)
    assert torch.equal(kept, warped(logits, 1, top_k, 1.0).isfinite())
    assert (kept.sum(-1) == min(top_k, VOCABULARY)).all()


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])
def test_top_p_of_a_whole_vocabulary(spread):
    """Flat rows need the full sort, peaked ones do not: the same set either way."""
    logits = random_logits(5, rows=2, size=20_000, spread=spread)
    logits[1] *= 100  # rows of a batch may differ
    for top_p in (0.05, 0.5, 0.95):
        kept = kept_by(keep_top_p, logits, top_p)
        expected = warped(logits, 1, None, top_p).isfinite()
        assert ((kept.sum(-1) - expected.sum(-1)).abs() <= 1).all()  # rounding at the border
        if spread:
            assert (kept != expected).sum() <= 2


# ---------------------------------------------------------------- properties


@settings(deadline=None, max_examples=80)
@given(seeds, masses, st.integers(1, 60), st.sampled_from([0.01, 1.0, 4.0, 50.0]))
def test_top_p_is_the_smallest_set_that_reaches_p(seed, top_p, size, spread):
    logits = random_logits(seed, size=size, spread=spread)
    probability = logits.double().softmax(-1)
    kept = kept_by(keep_top_p, logits, top_p)
    for row, keep in zip(probability, kept):
        assert keep.any()
        assert row[keep].sum() >= top_p - 1e-5
        assert row[keep].sum() - row[keep].min() <= top_p + 1e-5  # one fewer would not do
        if not keep.all():
            assert row[keep].min() >= row[~keep].max()


@settings(deadline=None, max_examples=30)
@given(seeds, masses, st.integers(1, 12))
def test_few_first_changes_nothing(seed, top_p, few):
    logits = random_logits(seed)
    whole = keep_top_p(logits, top_p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "FEW", few)
        assert torch.equal(keep_top_p(logits, top_p), whole)


def test_first_token_alone_exceeds_p():
    logits = torch.tensor([[0.9, 0.05, 0.05]]).log()
    assert kept_by(keep_top_p, logits, 0.5).tolist() == [[True, False, False]]
    for tiny in (1e-12, 1e-320):  # the second is 0 in float32
        assert kept_by(keep_top_p, logits, tiny).tolist() == [[True, False, False]]
    for seed in range(20):
        assert sample(logits, top_p=0.5, generator=torch.Generator().manual_seed(seed)) == 0


def test_the_token_that_crosses_stays():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert kept_by(keep_top_p, logits, 0.5).tolist() == [[True, True, False, False]]
    assert kept_by(keep_top_p, logits, 0.75).tolist() == [[True, True, True, False]]


def test_order_temperature_then_top_k_then_top_p():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    # Heated, the first two hold 0.63 of the mass, so 0.66 needs a third token.
    assert (ours(logits, 2.0, None, 0.66) > 0).sum() == 3
    assert (ours(logits, 1.0, None, 0.66) > 0).sum() == 2
    # Of the top two, the first holds two thirds: 0.66 of what top-k left needs one token.
    assert (ours(logits, 1.0, 2, 0.66) > 0).sum() == 1


def test_equal_logits():
    same = torch.zeros(2, 8)
    assert kept_by(keep_top_k, same, 3).all()  # none of them is the third
    assert (kept_by(keep_top_p, same, 0.5).sum(-1) == 4).all()


@settings(deadline=None, max_examples=40)
@given(seeds)
def test_temperature_towards_zero_is_greedy(seed):
    logits = random_logits(seed)
    greedy = logits.argmax(-1)
    assert torch.equal(sample(logits, 0.0), greedy)
    for temperature in (1e-5, 1e-20, 1e-50, 5e-324):
        assert torch.equal(sample(logits, temperature), greedy)


def test_a_cold_temperature_keeps_its_digits():
    logits = 1000 + random_logits(rows=2, spread=0.01)
    probability = ours(logits, 0.01, None, 1.0)
    exact = (logits.double() / 0.01).softmax(-1).float()
    torch.testing.assert_close(probability, exact, rtol=1e-4, atol=0)


def test_greedy_draws_nothing():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    sample(random_logits(), 0.0, generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_greedy_takes_the_first_of_equals_as_argmax_does():
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randint(0, 5, (16, 3000)).to(dtype)
        assert torch.equal(sample(logits, 0.0), logits.argmax(-1))


def test_great_temperature_is_uniform():
    logits = random_logits(rows=1)
    logits[0, 3] = -torch.inf
    for temperature in (1e20, 1e300):
        probability = ours(logits, temperature, None, 1.0)[0]
        assert probability[3] == 0
        others = torch.cat([probability[:3], probability[4:]])
        torch.testing.assert_close(others, torch.full_like(others, 1 / (VOCABULARY - 1)))


@settings(deadline=None, max_examples=40)
@given(seeds, st.floats(0.1, 3), st.integers(1, 50), st.floats(0.05, 1))
def test_rows_are_independent(seed, temperature, top_k, top_p):
    logits = random_logits(seed)
    together = ours(logits, temperature, top_k, top_p)
    for row in range(len(logits)):
        alone = ours(logits[row : row + 1], temperature, top_k, top_p)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(seeds, st.floats(0.1, 3), st.integers(1, 50), st.floats(0.05, 1))
def test_seeds_repeat_and_only_kept_tokens_come(seed, temperature, top_k, top_p):
    logits = random_logits(seed)
    first, second = (
        sample(logits, temperature, top_k, top_p, torch.Generator().manual_seed(seed))
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert first.dtype == torch.int64 and first.shape == (4,)
    assert (ours(logits, temperature, top_k, top_p).gather(1, first[:, None]) > 0).all()


def test_global_seed_without_a_generator():
    logits = random_logits(rows=64)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(sample(logits))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_logits_are_left_as_they_were():
    logits = random_logits()
    before = logits.clone()
    sample(logits, 0.7, 5, 0.9)
    assert torch.equal(logits, before)


# ---------------------------------------------------------------- the draw


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1, None, 1.0), *CASES])
def test_frequencies_follow_the_distribution(temperature, top_k, top_p):
    logits = random_logits(3, rows=1, size=12, spread=1.0)
    n = 20_000
    tokens = sample(
        logits.expand(n, -1), temperature, top_k, top_p, torch.Generator().manual_seed(0)
    )
    count = tokens.bincount(minlength=12).double()
    expected = n * ours(logits, temperature, top_k, top_p)[0].double()
    assert (count[expected == 0] == 0).all()
    kept = expected > 0
    chi_square = ((count - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = int(kept.sum()) - 1
    assert chi_square <= freedom + 4 * (2 * max(freedom, 1)) ** 0.5  # four standard deviations


def test_multinomial_never_takes_what_is_impossible(monkeypatch):
    probability = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    for dart, token in ((0.0, 1), (0.5 - 2**-24, 1), (0.5, 3), (1 - 2**-24, 3)):
        monkeypatch.setattr(torch, "rand", lambda *size, dart=dart, **k: torch.full(size, dart))
        assert multinomial(probability).item() == token
        assert multinomial(0.3 * probability).item() == token  # rows need not sum to 1


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(1, 3000))
def test_the_last_dart_hits_a_possible_token(seed, size):
    """The sums are rounded; the largest dart below 1 must still not fly over the end."""
    logits = random_logits(seed, rows=3, size=size)
    probability = keep_top_k(logits, 1 + size // 2).softmax(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, **k: torch.full(shape, 1 - 2**-24))
        token = multinomial(probability)
    assert (token < size).all() and (probability.gather(1, token[:, None]) > 0).all()


def test_impossible_tokens_when_sums_are_rounded_unevenly(monkeypatch):
    """On some devices running sums are not monotonic; every token of odd number is impossible."""
    exact, n = torch.Tensor.cumsum, 200
    noise = torch.rand(n, generator=torch.Generator().manual_seed(0)) * 0.02
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, dim: exact(x, dim) + noise)
    probability = torch.tensor([1.0, 0.0]).repeat(n // 2)[None].expand(5000, n) / (n // 2)
    tokens = multinomial(probability, torch.Generator().manual_seed(0))
    assert (tokens < n).all() and (tokens % 2 == 0).all()


def test_forbidden_tokens():
    logits = random_logits(rows=200)
    logits[:, :30] = -torch.inf
    for parameters in ((0.0,), (1.0,), (1.0, 35), (1e30, 35, 0.9)):
        assert (sample(logits, *parameters) >= 30).all()


# ---------------------------------------------------------------- types and errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    logits = random_logits(9, rows=2, size=5000, spread=1.0).to(dtype)
    probability = ours(logits, 0.7, None, 0.9)
    assert probability.dtype == torch.float32
    torch.testing.assert_close(probability, ours(logits.float(), 0.7, None, 0.9))
    kept = kept_by(keep_top_p, logits, 0.9)
    assert (kept.sum(-1) - kept_by(keep_top_p, logits.float(), 0.9).sum(-1)).abs().max() <= 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "all -inf"])
def test_broken_logits_are_refused(bad, temperature):
    logits = random_logits()
    logits[2] = -torch.inf if bad == "all -inf" else logits[2]
    if bad != "all -inf":
        logits[2, 7] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        sample(logits, temperature)


@pytest.mark.parametrize("shape", [(5,), (1, 2, 5)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \[B, V\]"):
        sample(torch.zeros(shape))


NAN, INF = float("nan"), float("inf")
WRONG = {
    "temperature": [-0.1, NAN, INF, -INF, "0.7", None, True],
    "top_k": [0, -1, 2.5, NAN, INF, "5", True, np.bool_(True)],
    "top_p": [0.0, -0.5, 1.01, NAN, INF, "0.9", None, True],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in WRONG.items() for v in vs])
def test_parameters_out_of_range(name, value):
    good = {"temperature": 1.0, "top_k": None, "top_p": 1.0}
    with pytest.raises(ValueError, match=f"^{name} is {re.escape(repr(value))}; expected"):
        check_sampling(**good | {name: value})
    with pytest.raises(ValueError, match=f"^{name} is {re.escape(repr(value))}; expected"):
        sample(random_logits(), **good | {name: value})


@pytest.mark.parametrize(
    "good",
    [
        *[(0, None, 1.0), (1e-9, 1, 1e-9), (2, 10**9, 1), (1, 5.0, 0.5)],
        (np.float32(1), np.int64(5), np.float64(0.5)),
    ],
)
def test_parameters_at_the_border(good):
    check_sampling(*good)
    assert sample(random_logits(), *good).shape == (4,)
