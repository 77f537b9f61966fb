"""Generation: rows that end in their own time, seeds, streams of whole characters, no waste."""

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from paligemma.checkpoint import internal_name, load_model
from paligemma.gemma import GemmaConfig
from paligemma.generation import GenerationConfig, generate, generate_steps, stream
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


WRONG = {
    "max_new_tokens": [0, -1, 2.5, True, None, "3", np.float64(3), np.bool_(True)],
    "temperature": [-1, float("nan"), "hot", None, True],
    "top_p": [0, 90, "0.9", None, True],
    "top_k": [0, 2.5, "5", True],
    "eos_token_id": [None, 1.0, "eos", [1, 2], True],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in WRONG.items() for v in vs])
def test_other_values_are_refused_by_name_before_the_model_runs(name, value):
    with pytest.raises(ValueError, match=f"^{name} is .*; expected"):
        GenerationConfig(**{name: value})
    with pytest.raises(ValueError, match=f"^{name} is .*; expected"):
        generate(None, **random_batch(), **{name: value})


def test_numpy_numbers_are_numbers(model, free):
    out = generate(model, **random_batch(), max_new_tokens=np.int64(5), eos_token_id=np.int32(-1))
    assert torch.equal(out, free[:, :5])
    options = {"top_k": np.int64(1), "temperature": np.float32(0.7), "top_p": np.float64(0.5)}
    assert torch.equal(drawn(model, 5, **options), free[:, :12])


def test_options_cannot_be_changed_behind_the_check():
    with pytest.raises(AttributeError):
        GenerationConfig().top_p = 7


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

    def draw(logits, *_):
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


# ---------------------------------------------------------------- one forward pass


def whole_passes(model, batch, steps):
    """Greedy tokens and their log-probabilities, `[B, steps]` each, without a cache.

    Every row alone and without pads, everything read again for each token.
    """
    tokens, log_probs = [], []
    for ids, pixels, mask in zip(
        batch["input_ids"], batch["pixel_values"], batch["attention_mask"]
    ):
        ids = prompt = ids[mask.bool()][None]
        for _ in range(steps):
            types = (torch.arange(ids.shape[1]) >= prompt.shape[1]).long()[None]
            with torch.no_grad():
                logits = model(ids, pixels[None], token_type_ids=types).logits[0, -1]
            best = logits.log_softmax(-1).max(-1)
            log_probs.append(best.values)
            ids = torch.cat([ids, best.indices.view(1, 1)], dim=1)
        tokens.append(ids[0, prompt.shape[1] :])
    return torch.stack(tokens), torch.stack(log_probs).view(len(tokens), steps)


def answer(model, batch, steps):
    """The same by `generate_steps`."""
    config, log_probs = GenerationConfig(steps, eos_token_id=-1), []
    tokens = list(generate_steps(model, **batch, config=config, log_probs=log_probs))
    return torch.stack(tokens, 1), torch.stack(log_probs, 1)


def assert_equals_whole_passes(model, batch, steps=12):
    for found, expected in zip(answer(model, batch, steps), whole_passes(model, batch, steps)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["MHA", "GQA", "MQA", "gemma2"])
def test_a_cached_padded_batch_equals_whole_passes_and_transformers(
    checkpoints, gemma2_checkpoint, kind
):
    from transformers import PaliGemmaForConditionalGeneration

    path = gemma2_checkpoint if kind == "gemma2" else checkpoints[kind]
    model, batch = load_model(path), random_batch()
    assert (batch["attention_mask"] == 0).any(), "no padding: nothing would be proven about it"
    assert_equals_whole_passes(model, batch, 16)
    out = generate(model, **batch, max_new_tokens=16, eos_token_id=-1)
    theirs = PaliGemmaForConditionalGeneration.from_pretrained(path).eval()
    theirs.generation_config.eos_token_id = None
    types = torch.zeros_like(batch["input_ids"])
    how = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(**batch, token_type_ids=types, **how)
    assert torch.equal(out, expected[:, types.shape[1] :])


def random_suffixes():
    """A batch with labels: the last four tokens are the answer."""
    batch = random_batch(seed=9)
    types = torch.zeros_like(batch["input_ids"])
    types[:, -4:] = 1
    labels = batch["input_ids"].masked_fill(types == 0, -100)
    return batch | {"token_type_ids": types, "labels": labels}


def train(model, batch, optimizer):
    """Twelve steps towards some other answer."""
    for _ in range(12):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def shrink(model, _):
    for p in model.parameters():
        p.data -= 0.5 * p.data * (torch.arange(p.shape[-1]) % 3)


def average(model, _):
    generator = torch.Generator().manual_seed(7)
    for p in model.parameters():
        p.data.copy_(0.7 * p.data + 0.1 * torch.randn(p.shape, generator=generator))


CHANGES = {
    "AdamW(fused)": lambda m, b: train(m, b, torch.optim.AdamW(m.parameters(), 3e-3, fused=True)),
    "SGD(fused)": lambda m, b: train(m, b, torch.optim.SGD(m.parameters(), 0.1, fused=True)),
    "p.data -=": shrink,
    "p.data.copy_": average,
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_changed_in_place_are_used_at_once(checkpoints, change):
    model, batch = load_model(checkpoints["GQA"]), random_batch()
    _, before = answer(model, batch, 12)
    CHANGES[change](model, random_suffixes())
    _, after = answer(model, batch, 12)
    assert (before - after).abs().max() > 0.1, "the change is too small to prove anything"
    assert_equals_whole_passes(model, batch)


@pytest.mark.parametrize("change", CHANGES)
def test_a_pipeline_answers_with_the_weights_it_has_now(change):
    import paligemma
    from paligemma.support.course import sample_picture

    pg, scene = paligemma.load(), sample_picture("scene")
    before = pg(scene, "caption en")
    other = pg.processor([scene], ["caption en"], suffixes=["three bees on a bike"])
    CHANGES[change](pg.model, other)
    tokens, _ = whole_passes(pg.model, pg.processor([scene], ["caption en"]), 12)
    expected = pg.processor.decode(until_eos(tokens[0], 1))
    assert pg(scene, "caption en", max_new_tokens=12) == expected != before


def test_it_answers_under_autocast(model):
    batch = random_batch()
    with torch.autocast("cpu", torch.bfloat16):
        out = generate(model, **batch, max_new_tokens=8, eos_token_id=-1)
        assert torch.equal(out[:, :1], whole_passes(model, batch, 1)[0])
    assert out.shape == (3, 8)


def test_hooks_and_replaced_parts_take_part_in_every_step(checkpoints, free):
    model, seen = load_model(checkpoints["GQA"]), []
    layer = model.language_model.layers[1]
    layer.mlp.register_forward_hook(lambda *_: seen.append(1))
    out, _ = answer(model, random_batch(), 5)
    assert len(seen) == 5 and torch.equal(out, free[:, :5])
    layer.mlp.register_forward_hook(lambda *given: -4 * given[-1])
    changed, _ = answer(model, random_batch(), 5)
    assert not torch.equal(changed, out)
    assert_equals_whole_passes(model, random_batch(), 5)
    layer.self_attn.q_proj = torch.nn.Sequential(layer.self_attn.q_proj, torch.nn.Tanh())
    assert_equals_whole_passes(model, random_batch(), 5)


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
    steps = generate_steps(model, **random_batch(), config=GenerationConfig(6, eos_token_id=-1))
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


class NewMemory(TorchDispatchMode):
    """Bytes of new memory that the operations return."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.bytes += t.nbytes
        return out


def test_a_token_costs_little_new_memory():
    """Counted, not timed: new bytes per decoded token."""
    text = GemmaConfig(512, 64, 128, 4, 4, 1, 16)
    config = PaliGemmaConfig(
        SiglipVisionConfig(32, 64, 1, 2, image_size=28, patch_size=7), text, IMAGE_ID
    )
    model = PaliGemma(config).eval()
    ids = torch.full((1, 18), IMAGE_ID)
    ids[:, 16:] = 5

    def new_bytes(tokens):
        with NewMemory() as counted:
            generate(model, ids, torch.rand(1, 3, 28, 28), None, tokens, eos_token_id=-1)
        return counted.bytes

    weights = sum(w.nbytes for w in model.language_model.parameters())
    per_token = (new_bytes(13) - new_bytes(3)) / 10
    assert per_token < weights / 10, "a step copies weights or the cache"


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
    steps = list(
        generate_steps(model, **random_batch(), config=GenerationConfig(24, eos_token_id=-1))
    )
    assert torch.equal(torch.stack(steps, dim=1), free)
    assert all(step.shape == (3,) and step.dtype == torch.int64 for step in steps)


def test_log_probabilities_are_those_of_one_full_pass(model):
    batch, logs = random_batch(), []
    ids = torch.stack(
        list(generate_steps(model, **batch, config=GenerationConfig(6), log_probs=logs)), 1
    )
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
    config = GenerationConfig(4, eos_token_id=eos)
    tokens = torch.stack(
        list(generate_steps(model, **random_batch(), config=config, log_probs=logs)), 1
    )
    assert logs[0][0] < 0
    assert all(log[0] == 0 for log in logs[1:]) and bool((tokens[0, 1:] == 0).all())


def test_an_early_close_frees_the_cache(model, monkeypatch):
    seen, make = [], model.make_cache

    def remember(*arguments):
        cache = make(*arguments)
        seen.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(model, "make_cache", remember)
    steps = generate_steps(model, **random_batch(), config=GenerationConfig(24, eos_token_id=-1))
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
    for token in generate_steps(
        model, **random_batch(), config=GenerationConfig(3, eos_token_id=-1)
    ):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        torch.nn.functional.embedding(token, weight).sum().backward()
        token += 1  # an inference tensor would refuse
    assert weight.grad.sum() == 3 * 3 * 4
    out = generate(model, **random_batch(), max_new_tokens=3)
    assert not out.is_inference()


def test_what_the_reader_does_to_a_token_is_its_own_affair(model, free):
    kept = []
    for token in generate_steps(
        model, **random_batch(), config=GenerationConfig(24, eos_token_id=-1)
    ):
        kept.append(token.clone())
        token.zero_()
    assert torch.equal(torch.stack(kept, dim=1), free)


def test_two_answers_at_once_do_not_mix(model):
    one, two = random_batch(seed=1), random_batch(seed=2)
    options = {"max_new_tokens": 8, "eos_token_id": -1}
    expected = [generate(model, **batch, **options) for batch in (one, two)]
    config = GenerationConfig(**options)
    both = zip(*(generate_steps(model, **batch, config=config) for batch in (one, two)))
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


def test_no_more_than_the_context(model, monkeypatch):
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", 40)
    batch = random_batch()
    room = 40 - batch["input_ids"].shape[1] + 1  # the last token is never read
    assert generate(model, **batch, max_new_tokens=room, eos_token_id=-1).shape[1] == room
    with pytest.raises(ValueError, match="41 tokens; this model reads 40 at most, 1 fewer"):
        generate(model, **batch, max_new_tokens=room + 1)
