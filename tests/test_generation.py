"""Generation: rows that end in their own time, seeds, streams of whole characters, no waste."""

import gc
import threading
import time
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import paligemma.generation as generation
from paligemma.checkpoint import internal_name, load_model
from paligemma.gemma import GemmaConfig
from paligemma.generation import (
    FoldedDecoder,
    can_fold,
    generate,
    generate_steps,
    own_product_pays,
    stream,
    thin_products,
)
from paligemma.model import PaliGemma, PaliGemmaConfig
from paligemma.siglip import SiglipVisionConfig
from paligemma.tokenizer import Tokenizer

IMAGE_ID = 500  # of the random models
VISION = [16, 24, 1, 2, 14, 7]  # width, MLP, layers, heads, picture, patch
TEXT = [16, 32, 2, 2, 1, 8, 64]  # width, MLP, layers, heads, kv heads, head width, words


def reference() -> dict[str, torch.Tensor]:
    """A tiny random model of transformers and what its `generate` says, with and without eos."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
    vision = dict(zip([*names, "image_size", "patch_size"], VISION))
    text = dict(zip([*names, "num_key_value_heads", "head_dim", "vocab_size"], TEXT))
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False} | vision,
        text_config={"model_type": "gemma"} | text,
        image_token_index=60,
        projection_dim=16,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    torch.manual_seed(15)
    model = PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.08 if "embed_tokens" in name else 0.5  # small: else the last word repeats
            weight.copy_(torch.randn_like(weight) * scale)
    words = torch.randint(3, 60, (3, 6))
    padding = torch.tensor([[2], [0], [3]])
    ids = torch.cat([torch.full((3, 4), 60), words], dim=1)
    for row, pad in enumerate(padding.flatten().tolist()):
        ids[row] = torch.cat([torch.zeros(pad, dtype=torch.int64), ids[row, : 10 - pad]])
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.rand(3, 3, 14, 14) * 2 - 1,
        "attention_mask": (torch.arange(10) >= padding).long(),
    }

    def answer(steps, eos):
        types = torch.zeros_like(ids)
        how = {"max_new_tokens": steps, "do_sample": False, "eos_token_id": eos, "pad_token_id": 0}
        return model.generate(**inputs, token_type_ids=types, **how)[:, 10:]

    free = answer(24, None)

    def ends(token):
        return [(row == token).nonzero()[:1].flatten().tolist() for row in free[:, :11]]

    eos = max(range(3, 60), key=lambda token: len({tuple(end) for end in ends(token)}))
    weights = {internal_name(n): w for n, w in model.state_dict().items() if "lm_head" not in n}
    return {
        **{f"weights.{name}": weight for name, weight in weights.items()},
        **inputs,
        "vision_config": torch.tensor(VISION),
        "text_config": torch.tensor(TEXT),
        "eos": torch.tensor(eos),
        "tokens": answer(12, eos),
        "tokens_without_eos": free,
    }


def random_batch(**options):
    from random_models import random_batch  # here: tools/reference.py reads this file as well

    return random_batch(**options)


@pytest.fixture(scope="module")
def model(checkpoints):
    return load_model(checkpoints["GQA"])


@pytest.fixture(scope="module")
def free(model):
    """Greedy tokens when nothing ends a row."""
    return generate(model, **random_batch(), max_new_tokens=24, eos_token_id=-1)


@pytest.fixture(scope="module")
def tokenizer(sentencepiece_file):
    return Tokenizer(sentencepiece_file)


def until_eos(tokens, eos):
    """A row up to its first eos, which belongs to it."""
    row = tokens.tolist()
    return row[: row.index(eos) + 1] if eos in row else row


# ---------------------------------------------------------------- tokens


def small(tensors):
    """Our model with the weights of `reference`."""
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
    vision = SiglipVisionConfig(**dict(zip([*names, "image_size", "patch_size"], VISION)))
    names += ["num_key_value_heads", "head_dim", "vocab_size"]
    text = GemmaConfig(**dict(zip(names, TEXT)))
    model = PaliGemma(PaliGemmaConfig(vision, text, image_token_index=60)).eval()
    model.load_state_dict({n[8:]: t for n, t in tensors.items() if n.startswith("weights.")})
    return model


def test_agrees_with_transformers():
    expected = reference()
    model = small(expected)
    inputs = {n: expected[n] for n in ("input_ids", "pixel_values", "attention_mask")}
    eos = int(expected["eos"])
    assert torch.equal(generate(model, **inputs, eos_token_id=eos), expected["tokens"])
    free = generate(model, **inputs, max_new_tokens=24, eos_token_id=-1)
    assert torch.equal(free, expected["tokens_without_eos"])
    # The stored example would prove little if all rows ended together.
    ends = {len(until_eos(row, expected["eos"])) for row in expected["tokens"]}
    assert len(ends) == 3 and max(ends) == expected["tokens"].shape[1] < 12


@pytest.mark.parametrize("column", [0, 3, 9, 23])
@pytest.mark.parametrize("owner", [0, 1, 2])
def test_each_row_ends_with_its_own_eos(model, free, owner, column):
    eos = int(free[owner, column])
    rows = [until_eos(row, eos) for row in free]
    out = generate(model, **random_batch(), max_new_tokens=24, eos_token_id=eos)
    assert out.shape == (3, max(map(len, rows)))
    assert out.dtype == torch.int64
    for row, expected in zip(out.tolist(), rows):
        assert row == expected + [0] * (out.shape[1] - len(expected))


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_no_more_than_max_new_tokens(model, free, steps):
    out = generate(model, **random_batch(), max_new_tokens=steps, eos_token_id=-1)
    assert torch.equal(out, free[:, :steps])


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, None, "3"])
def test_other_limits_are_refused_at_once(model, steps):
    if steps is True:  # an int by descent; it means one token, as everywhere in Python
        assert generate(model, **random_batch(), max_new_tokens=steps).shape == (3, 1)
        return
    with pytest.raises(ValueError, match=r"max_new_tokens is .*; expected a whole number"):
        generate_steps(model, **random_batch(), max_new_tokens=steps)  # not even asked for a token


@pytest.mark.parametrize(
    "option", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_k": 0}]
)
def test_sampling_options_are_checked_before_the_model_runs(model, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} is"):
        generate_steps(model, **random_batch(), **option)


def test_without_padding_no_mask_is_needed(model):
    batch = random_batch(padding=(0,))
    with_mask = generate(model, **batch, max_new_tokens=8, eos_token_id=-1)
    assert torch.equal(
        generate(model, batch["input_ids"], batch["pixel_values"], None, 8, eos_token_id=-1),
        with_mask,
    )


def test_padding_on_the_left_changes_nothing(model):
    batch = random_batch(rows=1, padding=(0,))
    alone = generate(model, **batch, max_new_tokens=12, eos_token_id=-1)
    for pad in (1, 9):
        zeros = torch.zeros(1, pad, dtype=torch.int64)
        padded = dict(batch)
        for name in ("input_ids", "attention_mask"):
            padded[name] = torch.cat([zeros, batch[name]], dim=1)
        out = generate(model, **padded, max_new_tokens=12, eos_token_id=-1)
        assert torch.equal(out, alone)


def test_an_image_token_in_the_answer_is_a_token_like_any_other(model, monkeypatch):
    """A model may say anything, `<image>` too; no picture belongs to it then."""
    said = iter([IMAGE_ID, 7, 1])

    def draw(logits, **_):
        return torch.full((logits.shape[0],), next(said))

    monkeypatch.setattr("paligemma.generation.sample", draw)
    assert generate(model, **random_batch()).tolist() == [[IMAGE_ID, 7, 1]] * 3


# ---------------------------------------------------------------- chance


def drawn(model, seed, **options):
    options = {"temperature": 1.5, "max_new_tokens": 12, "eos_token_id": -1} | options
    generator = torch.Generator().manual_seed(seed)
    return generate(model, **random_batch(), generator=generator, **options)


def test_a_seed_repeats_and_another_differs(model):
    assert torch.equal(drawn(model, 3), drawn(model, 3))
    assert not torch.equal(drawn(model, 3), drawn(model, 4))


def test_a_generator_of_its_own_leaves_the_global_one_alone(model):
    before = torch.get_rng_state()
    drawn(model, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_greedy_draws_nothing(model, free):
    own = torch.Generator().manual_seed(1)
    state, everyone = own.get_state(), torch.get_rng_state()
    out = generate(model, **random_batch(), max_new_tokens=24, generator=own, eos_token_id=-1)
    assert torch.equal(own.get_state(), state)
    assert torch.equal(torch.get_rng_state(), everyone)
    assert torch.equal(out, free)


@pytest.mark.parametrize("option", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_a_draw_from_one_token_is_greedy(model, free, option):
    assert torch.equal(drawn(model, 5, **option), free[:, :12])


# ---------------------------------------------------------------- no waste


def test_each_piece_of_work_is_done_once(model, monkeypatch):
    calls, caches = [], []
    hooks = [
        model.vision_tower.register_forward_hook(lambda *_: calls.append("vision")),
        model.language_model.register_forward_hook(lambda *a: calls.append(a[1][0].shape[1])),
    ]
    make = model.make_cache
    monkeypatch.setattr(model, "make_cache", lambda *a: caches.append(make(*a)) or caches[-1])
    generate(model, **random_batch(), max_new_tokens=5, eos_token_id=-1)
    for hook in hooks:
        hook.remove()
    assert calls == ["vision", 28, 1, 1, 1, 1]
    assert len(caches) == 1 and len(caches[0]) == caches[0].max_length == 28 + 4


def test_the_cache_stays_in_its_memory(model, monkeypatch):
    caches, make = [], model.make_cache
    monkeypatch.setattr(model, "make_cache", lambda *a: caches.append(make(*a)) or caches[-1])
    steps = generate_steps(model, **random_batch(), max_new_tokens=6, eos_token_id=-1)
    assert not caches, "nothing is allocated before the first token is asked for"
    places = set()
    for _ in steps:
        places.add(tuple(t.data_ptr() for t in (*caches[0].keys, *caches[0].values)))
    assert len(places) == 1


def test_a_step_costs_the_same_early_and_late(model):
    def flop(steps):
        with FlopCounterMode(display=False) as counter:
            generate(model, **random_batch(), max_new_tokens=steps, eos_token_id=-1)
        return counter.get_total_flops()

    one, two, nine = flop(1), flop(2), flop(9)
    assert (nine - two) / 7 < 1.2 * (two - one) < 0.2 * one


# ---------------------------------------------------------------- the folded decoder


@pytest.fixture(params=["MHA", "GQA", "MQA"])
def any_model(request, checkpoints):
    return load_model(checkpoints[request.param])


def step_by_step(model, batch, tokens, folded):
    """Scores of each decode step, the tokens given: `float32[steps, B, V]`."""
    mask = batch["attention_mask"]
    with torch.inference_mode():
        cache = model.make_cache(len(tokens), mask.shape[1] + tokens.shape[1])
        model(**batch, cache=cache)
        if folded:
            decoder = FoldedDecoder(model.language_model, cache, mask)
            return torch.stack([decoder(token) for token in tokens.T])
        rows = []
        for token in tokens.T:
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
            rows.append(model(token[:, None], attention_mask=mask, cache=cache).logits[:, 0])
        return torch.stack(rows)


def test_folded_scores_equal_the_models(any_model):
    batch = random_batch()
    assert (batch["attention_mask"] == 0).any(), "no padding: nothing would be proven about it"
    rows = len(batch["input_ids"])
    tokens = torch.randint(3, 400, (rows, 9), generator=torch.Generator().manual_seed(0))
    assert can_fold(any_model)
    fast, slow = (step_by_step(any_model, batch, tokens, folded) for folded in (True, False))
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


def test_a_changed_weight_is_folded_anew(checkpoints):
    model, batch = load_model(checkpoints["GQA"]), random_batch()
    generate(model, **batch, max_new_tokens=3, eos_token_id=-1)
    with torch.no_grad():
        model.language_model.layers[0].mlp.down_proj.weight.mul_(-3)
        model.language_model.layers[1].input_layernorm.weight.add_(1)
    tokens = torch.full((len(batch["input_ids"]), 2), 7)
    fast, slow = (step_by_step(model, batch, tokens, folded) for folded in (True, False))
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


def test_what_is_not_the_plain_model_is_not_folded(checkpoints):
    def fresh():
        return load_model(checkpoints["GQA"])

    assert can_fold(fresh())
    hooked = fresh()
    hooked.language_model.layers[1].mlp.register_forward_hook(lambda *_: None)
    replaced = fresh()
    layer = replaced.language_model.layers[0].self_attn
    layer.q_proj = torch.nn.Sequential(layer.q_proj)
    other_way = fresh()
    other_way.language_model.norm.forward = lambda x: x
    for model in (hooked, replaced, other_way, fresh().to(torch.bfloat16)):
        assert not can_fold(model)


class Work(TorchDispatchMode):
    """Operations that PyTorch is asked for, and bytes of new memory they return."""

    def __init__(self):
        super().__init__()
        self.operations, self.bytes = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        self.operations += 1
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.bytes += t.nbytes
        return out


def test_a_token_costs_few_operations_and_little_memory():
    """Counted, not timed: operations and new bytes per decoded token of a model of 4 layers."""
    text = GemmaConfig(512, 64, 128, 4, 4, 1, 16)
    config = PaliGemmaConfig(
        SiglipVisionConfig(32, 64, 1, 2, image_size=28, patch_size=7), text, IMAGE_ID
    )
    model = PaliGemma(config).eval()
    ids = torch.full((1, 18), IMAGE_ID)
    ids[:, 16:] = 5

    def work(tokens):
        with Work() as counted:
            generate(model, ids, torch.rand(1, 3, 28, 28), None, tokens, eos_token_id=-1)
        return counted

    work(2)  # folds
    few, many = work(3), work(13)
    assert (many.operations - few.operations) / 10 <= 21 * 4 + 22
    weights = sum(w.nbytes for w in model.language_model.parameters())
    assert (many.bytes - few.bytes) / 10 < weights / 10, "a step copies weights or the cache"


# ---------------------------------------------------------------- one row of bfloat16


@pytest.fixture
def thin(checkpoints, monkeypatch):
    """A model in bfloat16 on a CPU that oneDNN is slow on; what its switch said in each pass."""
    monkeypatch.setattr(generation, "own_product_pays", lambda model: True)
    model, said = load_model(checkpoints["GQA"], dtype=torch.bfloat16), []
    model.register_forward_pre_hook(lambda *_: said.append(torch.backends.mkldnn.enabled))
    return model, said


def one_row(**options):
    batch = random_batch(rows=1, **options)
    return {name: batch[name] for name in ("input_ids", "pixel_values")}


def test_one_row_of_bfloat16_is_multiplied_without_onednn(thin):
    model, said = thin
    generate(model, **one_row(), max_new_tokens=4, eos_token_id=-1)
    assert said == [True, False, False, False] and torch.backends.mkldnn.enabled


@pytest.mark.parametrize("pays", [True, False])
def test_the_faster_product_is_found_by_trying(thin, monkeypatch, pays):
    monkeypatch.undo()
    tried, linear = [], torch.nn.functional.linear

    def product(x, weight, bias=None):
        if x.dim() == 2:  # the trial; a model's own have three dimensions
            tried.append((weight.data_ptr(), torch.backends.mkldnn.enabled))
            time.sleep(0.03 if torch.backends.mkldnn.enabled is pays else 0.01)
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", product)
    monkeypatch.setattr(generation, "_pays", weakref.WeakKeyDictionary())
    model, said = thin
    for _ in range(2):
        generate(model, **one_row(), max_new_tokens=3, eos_token_id=-1)
    assert said == [True, not pays, not pays] * 2
    assert torch.backends.mkldnn.enabled
    layers = model.language_model.layers
    for count in (len(layers), 2):  # an odd number and an even one
        assert len(set(tried)) == len(tried) == 2 * count, "each layer by both products, once"
        tried.clear()
        generation._pays.clear()
        model.language_model.layers = layers[:2]
        assert own_product_pays(model) is pays


def test_without_dense_weights_nothing_is_tried(thin, monkeypatch):
    monkeypatch.undo()
    model, _ = thin
    model.language_model.layers = torch.nn.ModuleList()
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *_: pytest.fail("a product"))
    assert own_product_pays(model) is False


def test_nothing_is_tried_while_onednn_is_off(thin, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(generation, "_pays", weakref.WeakKeyDictionary())
    model, _ = thin
    torch.backends.mkldnn.enabled = False
    try:
        generate(model, **one_row(), max_new_tokens=3, eos_token_id=-1)
    finally:
        torch.backends.mkldnn.enabled = True
    assert not generation._pays, "tried while oneDNN was off: both were the same product"


def test_many_rows_and_other_types_keep_onednn(thin):
    model, said = thin
    generate(model, **random_batch(), max_new_tokens=3, eos_token_id=-1)
    assert said == [True] * 3
    generate(model.double(), **one_row(), max_new_tokens=3, eos_token_id=-1)
    assert said == [True] * 6


def test_who_switched_onednn_off_keeps_it_off(thin):
    model, said = thin
    torch.backends.mkldnn.enabled = False
    try:
        generate(model, **one_row(), max_new_tokens=3, eos_token_id=-1)
        assert said == [False] * 3 and not torch.backends.mkldnn.enabled
    finally:
        torch.backends.mkldnn.enabled = True


def test_the_switch_is_on_again_between_steps_and_after_an_error(thin):
    model, said = thin
    steps = generate_steps(model, **one_row(), max_new_tokens=9, eos_token_id=-1)
    for _ in range(3):
        next(steps)
        assert torch.backends.mkldnn.enabled

    def fail(*_):
        raise RuntimeError("in the middle of a step")

    model.language_model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        next(steps)
    assert said[-1] is False, "the error came from a step that had switched nothing"
    assert torch.backends.mkldnn.enabled


def test_threads_that_decode_at_once_leave_the_switch_as_it_was(thin):
    model, said = thin
    model.language_model.layers[0].register_forward_pre_hook(lambda *_: time.sleep(0.003))
    inputs, answers = one_row(), {}

    def work(name):
        answers[name] = generate(model, **inputs, max_new_tokens=12, eos_token_id=-1)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
        time.sleep(0.01)  # so that one reads its prompt while others decode
    for thread in threads:
        thread.join()
    assert said.count(True) == 4 and len(said) == 48, "a prefill ran without oneDNN, or a step with"
    assert all(torch.equal(answer, answers[0]) for answer in answers.values())
    assert torch.backends.mkldnn.enabled


def test_both_products_round_the_same_sum(thin):
    """PyTorch's own product and oneDNN's add up in float32 and round once."""
    generator = torch.Generator().manual_seed(0)
    for width, out in ((64, 48), (2048, 256), (4096, 2048)):
        weight = torch.randn(out, width, generator=generator).bfloat16()
        x = torch.randn(1, width, generator=generator).bfloat16()
        exact = x.double() @ weight.double().T
        for rows in (1, 2):
            with thin_products(thin[0], rows):
                assert torch.backends.mkldnn.enabled == (rows > 1)
                y = torch.nn.functional.linear(x, weight)
            gap = (y.double() - exact).abs() / exact.abs().clamp(min=0.1)
            assert gap.max() < 2**-8


def test_stops_when_the_last_row_has_ended(model, free):
    eos = int(free[0, 0])
    calls = []
    hook = model.language_model.register_forward_hook(lambda *_: calls.append(1))
    rows = [until_eos(row, eos) for row in free]
    generate(model, **random_batch(), max_new_tokens=24, eos_token_id=eos)
    hook.remove()
    assert len(calls) == max(map(len, rows))


# ---------------------------------------------------------------- steps


def test_steps_are_the_columns(model, free):
    steps = list(generate_steps(model, **random_batch(), max_new_tokens=24, eos_token_id=-1))
    assert torch.equal(torch.stack(steps, dim=1), free)
    assert all(step.shape == (3,) and step.dtype == torch.int64 for step in steps)


def test_log_probabilities_are_those_of_one_full_pass(model):
    batch, logs = random_batch(), []
    ids = torch.stack(list(generate_steps(model, **batch, max_new_tokens=6, log_probs=logs)), 1)
    for row, tokens in enumerate(ids):
        tokens = tokens[: (tokens == 1).nonzero()[0, 0] + 1] if (tokens == 1).any() else tokens
        real = batch["attention_mask"][row].bool() if "attention_mask" in batch else slice(None)
        whole = torch.cat([batch["input_ids"][row][real], tokens])[None]
        with torch.no_grad():
            prefix = len(whole[0]) - len(tokens)
            for n, token in enumerate(tokens.tolist()):
                cut = whole[:, : prefix + n]
                types = (torch.arange(prefix + n) >= prefix).long()[None]
                pixels = batch["pixel_values"][row : row + 1]
                out = model(cut, pixels, token_type_ids=types)
                expected = out.logits[0, -1].log_softmax(-1)[token]
                assert torch.allclose(logs[n][row], expected, atol=1e-4)


def test_log_probabilities_of_an_ended_row_are_zero(model, free):
    eos, logs = int(free[0, 0]), []
    options = {"max_new_tokens": 4, "eos_token_id": eos, "log_probs": logs}
    tokens = torch.stack(list(generate_steps(model, **random_batch(), **options)), 1)
    assert logs[0][0] < 0
    assert all(log[0] == 0 for log in logs[1:]) and bool((tokens[0, 1:] == 0).all())


def test_an_early_close_frees_the_cache(model, monkeypatch):
    seen, make = [], model.make_cache

    def remember(*arguments):
        cache = make(*arguments)
        seen.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(model, "make_cache", remember)
    steps = generate_steps(model, **random_batch(), max_new_tokens=24, eos_token_id=-1)
    next(steps)
    next(steps)
    assert seen[0]() is not None
    steps.close()
    gc.collect()
    assert seen[0]() is None
    with pytest.raises(StopIteration):
        next(steps)


def test_inference_mode_does_not_leak(model):
    """Between two steps the caller trains; what it was handed is an ordinary tensor."""
    assert torch.is_grad_enabled()
    weight = torch.ones(512, 4, requires_grad=True)
    for token in generate_steps(model, **random_batch(), max_new_tokens=3, eos_token_id=-1):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        torch.nn.functional.embedding(token, weight).sum().backward()
        token += 1  # an inference tensor would refuse
    assert weight.grad.sum() == 3 * 3 * 4
    out = generate(model, **random_batch(), max_new_tokens=3)
    assert not out.is_inference()


def test_what_the_reader_does_to_a_token_is_its_own_affair(model, free):
    kept = []
    for token in generate_steps(model, **random_batch(), max_new_tokens=24, eos_token_id=-1):
        kept.append(token.clone())
        token.zero_()
    assert torch.equal(torch.stack(kept, dim=1), free)


def test_two_answers_at_once_do_not_mix(model):
    one, two = random_batch(seed=1), random_batch(seed=2)
    options = {"max_new_tokens": 8, "eos_token_id": -1}
    expected = [generate(model, **batch, **options) for batch in (one, two)]
    both = zip(*(generate_steps(model, **batch, **options) for batch in (one, two)))
    first, second = (torch.stack(list(column), dim=1) for column in zip(*both))
    assert torch.equal(first, expected[0]) and torch.equal(second, expected[1])


# ---------------------------------------------------------------- text


ANY_ID = st.one_of(st.integers(0, 3), st.integers(4, 1600))
BYTES = st.binary(min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_pieces_join_to_decode(tokenizer, data):
    first_byte = tokenizer.sp.piece_to_id("<0x00>")
    bits = st.one_of(
        ANY_ID.map(lambda i: [i]),
        BYTES.map(lambda raw: [first_byte + b for b in raw]),
        st.text(max_size=6).map(tokenizer.encode),
    )
    ids = [i for part in data.draw(st.lists(bits, max_size=8)) for i in part]
    ids = [i for i in ids if i != tokenizer.eos_id]
    pieces = list(stream(ids, tokenizer))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all(pieces)
    cut = [*ids, tokenizer.eos_id, *tokenizer.encode("cat")]
    assert list(stream(cut, tokenizer)) == pieces


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=20).filter(lambda text: "<" not in text and "\ufffd" not in text))
def test_no_piece_holds_half_a_character(tokenizer, text):
    ids = tokenizer.encode(text)
    pieces = list(stream(ids, tokenizer))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_bee_comes_in_four_tokens_and_one_piece(tokenizer):
    ids = tokenizer.encode("cat🐝dog")
    assert sum(tokenizer.sp.is_byte(i) for i in ids) == 4
    assert "🐝" in [piece.strip("catdog") for piece in stream(ids, tokenizer)]


def test_pieces_come_as_soon_as_they_can(tokenizer):
    asked = []

    def ids():
        for i in tokenizer.encode("cat 🐝 dog"):
            asked.append(i)
            yield i

    pieces = stream(ids(), tokenizer)
    shown = ""
    for piece in pieces:
        shown += piece
        assert tokenizer.decode(asked) == shown, "a piece was held back longer than needed"


def test_a_location_ends_an_unfinished_character(tokenizer):
    loc = tokenizer.encode("<loc0007>")
    half = tokenizer.encode("🐝")[:-2]
    pieces = list(stream([*half, *loc, *tokenizer.encode("cat")], tokenizer))
    assert "".join(pieces).endswith("<loc0007>cat") and "\ufffd" in pieces[0]


@pytest.mark.parametrize("ids", [[], [1], [0, 2, 0], [1, 200, 201]], ids=str)
def test_nothing_to_say_is_no_piece(tokenizer, ids):
    assert list(stream(ids, tokenizer)) == []


def test_tensor_elements_are_ids_too(tokenizer):
    ids = tokenizer.encode("cat dog")
    assert list(stream(torch.tensor([*ids, 1, 5]), tokenizer)) == list(stream(ids, tokenizer))
