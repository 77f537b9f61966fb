"""The whole model: mask, merge, loss, cache, dtypes, sizes; parity in small with transformers."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import IMAGE_ID, random_batch

from paligemma.checkpoint import load_model
from paligemma.gemma import GemmaConfig
from paligemma.gemma2 import Gemma2Config
from paligemma.model import PaliGemma, PaliGemmaConfig, prefix_lm_mask, suffix_loss
from paligemma.siglip import SiglipVisionConfig

IMAGE, N = 60, 4


def reference():
    """A very small PaliGemma of transformers, one padded batch, its logits and loss."""
    from transformers import PaliGemmaConfig as TheirConfig
    from transformers import PaliGemmaForConditionalGeneration

    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_use_head": False,
    }
    text = {
        "model_type": "gemma",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 64,
    }
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(
        TheirConfig(
            vision_config=vision, text_config=text, image_token_index=IMAGE, projection_dim=16
        )
    ).eval()
    for weight in model.parameters():
        scale = 0.1 if weight.dim() == 1 else weight.shape[-1] ** -0.5
        weight.data = torch.randn_like(weight) * scale
    batch = toy_batch()
    out = model(**batch, position_ids=batch["attention_mask"].cumsum(-1).clamp(min=1))
    weights = {k.removeprefix("model."): w for k, w in model.state_dict().items() if k[0] == "m"}
    return weights | batch | {"logits": out.logits, "loss": out.loss}


def toy_batch(pads=(0, 2), prompt=4, suffix=3, seed=3):
    """Rows of N image tokens, `prompt` less their padding, `suffix`; with labels."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = len(pads), N + prompt + suffix
    ids = torch.randint(3, 50, (rows, length), generator=generator)
    real = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        ids[row, :pad], real[row, :pad] = 0, 0
        ids[row, pad : pad + N] = IMAGE
    types = torch.zeros_like(ids)
    types[:, N + prompt :] = 1
    return {
        "pixel_values": torch.rand(rows, 3, 28, 28, generator=generator) * 2 - 1,
        "input_ids": ids,
        "attention_mask": real,
        "token_type_ids": types,
        "labels": ids.masked_fill(types == 0, -100),
    }


def make(seed=0, image_size=28, patch_size=14, vocab=64, image=IMAGE, kv_heads=1):
    torch.manual_seed(seed)
    vision = SiglipVisionConfig(8, 12, 1, 2, image_size=image_size, patch_size=patch_size)
    text = GemmaConfig(vocab, 16, 24, 2, 2, kv_heads, 8)
    return PaliGemma(PaliGemmaConfig(vision, text, image_token_index=image)).eval()


def without(batch, *names):
    return {name: tensor for name, tensor in batch.items() if name not in names}


def test_agrees_with_transformers():
    expected = reference()
    model = make()
    model.load_state_dict({name: expected[name] for name in model.state_dict()})
    batch = {name: expected[name] for name in toy_batch()}
    out = model(**batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(out.logits[real], expected["logits"][real], rtol=0, atol=1e-5)
    torch.testing.assert_close(out.loss, expected["loss"], rtol=0, atol=1e-5)


# ------------------------------------------------------------------ the mask


def allowed(i, j, real, types):
    """The definition, for one pair: who is real, what is prefix, what comes later."""
    if i == j:
        return True
    if not real[j]:
        return False
    if types[j] == 0:
        return True
    return j < i


@st.composite
def rows(draw):
    """A batch of padding, prefix and suffix lengths that fill the same length."""
    length = draw(st.integers(1, 9))
    batch = []
    for _ in range(draw(st.integers(1, 3))):
        pad = draw(st.integers(0, length - 1))
        suffix = draw(st.integers(0, length - pad))
        batch.append((pad, length - pad - suffix, suffix))
    return batch


def tensors(batch):
    real = torch.tensor([[0] * pad + [1] * (prefix + suffix) for pad, prefix, suffix in batch])
    types = torch.tensor([[0] * (pad + prefix) + [1] * suffix for pad, prefix, suffix in batch])
    return real, types


@settings(max_examples=150, deadline=None)
@given(batch=rows(), data=st.data())
def test_mask_is_its_definition_for_any_number_of_cached_tokens(batch, data):
    real, types = tensors(batch)
    total = real.shape[1]
    past = data.draw(st.integers(0, total - 1))
    for pad, prefix, _ in batch:
        past = min(past, pad + prefix) if prefix else 0  # the prefix is read in one piece
    if any(past < pad + prefix for pad, prefix, _ in batch):
        past = 0
    mask = prefix_lm_mask(real, types[:, past:], total - past)
    expected = torch.tensor(
        [
            [[allowed(i, j, r, t) for j in range(total)] for i in range(past, total)]
            for r, t in zip(real.tolist(), types.tolist(), strict=True)
        ]
    )[:, None]
    assert torch.equal(mask, expected)


@settings(max_examples=100, deadline=None)
@given(batch=rows())
def test_mask_is_transitive_and_nobody_is_blind(batch):
    """What holds in one layer then holds in any number of layers."""
    real, types = tensors(batch)
    total = real.shape[1]
    mask = prefix_lm_mask(real, types, total)[:, 0].float()
    assert torch.equal(((mask @ mask) > 0).float(), mask)
    assert mask.diagonal(dim1=1, dim2=2).all()
    for row, (pad, prefix, _) in enumerate(batch):
        assert not mask[row, pad:, :pad].any(), "padding is seen"
        assert mask[row, pad : pad + prefix, pad : pad + prefix].all(), "the prefix is hidden"
        assert not mask[row, pad : pad + prefix, pad + prefix :].any(), "the prefix sees the suffix"
        assert mask[row, pad + prefix :, pad : pad + prefix].all(), "the suffix misses the prefix"


def test_without_types_all_is_prefix_then_suffix():
    real = torch.ones(2, 5, dtype=torch.int64)
    assert prefix_lm_mask(real, None, 5).all()
    real[1, 0] = 0
    mask = prefix_lm_mask(real, None, 5)
    assert torch.equal(mask[1, 0, 2], torch.tensor([False, True, True, True, True]))
    after = prefix_lm_mask(real, None, 2)  # three cached: the two new ones are causal
    assert torch.equal(after[0, 0], torch.tensor([[True] * 4 + [False], [True] * 5]))


def test_padding_on_the_right_is_not_seen_either():
    real = torch.tensor([[1, 1, 1, 0, 0]])
    mask = prefix_lm_mask(real, torch.zeros_like(real), 5)[0, 0]
    assert not mask[:3, 3:].any() and mask[:3, :3].all()


def test_one_new_token_sees_everything():
    assert prefix_lm_mask(torch.ones(2, 9, dtype=torch.int64), None, 1).all()


# ------------------------------------------------------------------ placing pictures


def test_words_are_scaled_and_pictures_are_not():
    model, batch = make(), toy_batch()
    features = model.encode_image(batch["pixel_values"])
    merged = model.merge(batch["input_ids"], features)
    is_image = batch["input_ids"] == IMAGE
    assert torch.equal(merged[is_image], features.flatten(0, 1))
    words = model.language_model.embed_tokens(batch["input_ids"][~is_image])
    torch.testing.assert_close(merged[~is_image], words * 4.0)  # √16


def test_image_id_beyond_the_vocabulary():
    """The published text_config of some releases ends before `<image>`."""
    model, batch = make(vocab=60), toy_batch()
    assert model(**batch).logits.shape == (2, 11, 60)


def test_features_of_another_type_are_taken_as_they_are():
    model, batch = make().to(torch.bfloat16), toy_batch()
    features = torch.randn(2, N, 16)  # float32, as from a vision tower run apart
    merged = model.merge(batch["input_ids"], features)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged[batch["input_ids"] == IMAGE], features.bfloat16().flatten(0, 1))


def test_pictures_keep_their_order():
    model, batch = make(), toy_batch(pads=(0, 0))
    ids = batch["input_ids"][:1].repeat(2, 1)
    both = model(ids, batch["pixel_values"]).logits
    swapped = model(ids, batch["pixel_values"].flip(0)).logits
    torch.testing.assert_close(both, swapped.flip(0))
    assert (both[0] - both[1]).abs().max() > 1e-3


def test_two_pictures_in_one_row():
    model, batch = make(), toy_batch(pads=(0, 0))
    ids = torch.cat([torch.full((1, 2 * N), IMAGE), torch.tensor([[2, 7, 8]])], dim=1)
    features = model.encode_image(batch["pixel_values"])  # (2, N, D)
    merged = model.merge(ids, features)
    assert torch.equal(merged[0, : 2 * N], features.flatten(0, 1))


@pytest.mark.parametrize(
    ("ids", "pictures", "words"),
    [
        ([[IMAGE] * 3 + [5]], 1, "hold 3 <image> tokens and the pictures give 4"),
        ([[IMAGE] * 5 + [5]], 1, "hold 5 <image> tokens and the pictures give 4"),
        ([[IMAGE] * 4 + [5]], 0, "hold 4 <image> tokens and the pictures give 0"),
        ([[5, 6]], 1, "hold 0 <image> tokens and the pictures give 4"),
        ([[IMAGE] * 4 + [5]], 2, "hold 4 <image> tokens and the pictures give 8"),
    ],
)
def test_wrong_number_of_image_tokens(ids, pictures, words):
    pixels = torch.zeros(pictures, 3, 28, 28) if pictures else None
    with pytest.raises(ValueError, match=f"{words}.*Processor"):
        make()(torch.tensor(ids), pixels)


def test_picture_of_another_size():
    with pytest.raises(ValueError, match="pixel_values are"):
        make()(torch.tensor([[IMAGE] * 4]), torch.zeros(1, 3, 56, 56))


# ------------------------------------------------------------------ shapes that do not fit


@pytest.mark.parametrize("shape", [(2, 10), (2, 12), (1, 11), (11,)])
def test_attention_mask_of_the_wrong_shape(shape):
    batch = toy_batch() | {"attention_mask": torch.ones(shape, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"attention_mask is .* expected \[2, 11\]: 0 cached"):
        make()(**batch)


def test_attention_mask_has_to_count_the_cache():
    model, batch = make(), without(toy_batch(), "labels", "token_type_ids")
    cache = model.make_cache(2, 20)
    model(**batch, cache=cache)
    token = torch.tensor([[5], [6]])
    with pytest.raises(ValueError, match=r"expected \[2, 12\]: 11 cached tokens and 1 new ones"):
        model(token, attention_mask=torch.ones(2, 1, dtype=torch.int64), cache=cache)


@pytest.mark.parametrize("name", ["token_type_ids", "labels"])
@pytest.mark.parametrize("shape", [(2, 10), (1, 11), (2, 12), (2, 1)])
def test_types_and_labels_of_the_wrong_shape(name, shape):
    batch = toy_batch() | {name: torch.ones(shape, dtype=torch.int64)}
    with pytest.raises(ValueError, match=rf"{name} .* expected \[2, 11\]"):
        make()(**batch)


def test_labels_need_token_types():
    """Without them the answer would be read before it is asked for."""
    with pytest.raises(ValueError, match="labels need token_type_ids"):
        make()(**without(toy_batch(), "token_type_ids"))


# ------------------------------------------------------------------ loss


def test_loss_is_shifted_once():
    logits = torch.full((1, 4, 6), -20.0)
    labels = torch.tensor([[-100, -100, 3, 5]])
    logits[0, 1, 3] = logits[0, 2, 5] = 20.0  # place t says what stands at t + 1
    assert suffix_loss(logits, labels) < 1e-6
    assert suffix_loss(logits.roll(1, dims=1), labels) > 10


def test_loss_is_the_mean_over_labelled_tokens_of_the_batch():
    model, batch = make(), toy_batch()
    out = model(**batch)
    log = out.logits.log_softmax(-1)
    each = [-log[b, t - 1, batch["input_ids"][b, t]] for b in range(2) for t in range(8, 11)]
    torch.testing.assert_close(out.loss, torch.stack(each).mean())


def test_no_labels_no_loss():
    model, batch = make(), toy_batch()
    assert model(**without(batch, "labels")).loss is None
    nothing = torch.full_like(batch["labels"], -100)
    loss = model(**batch | {"labels": nothing}).loss
    assert loss == 0  # and not 0/0: one batch without an answer must not end a training run
    loss.backward()
    assert all(w.grad is None or w.grad.isfinite().all() for w in model.parameters())


def test_outputs_by_place_as_in_transformers():
    model, batch = make(), toy_batch()
    out = model(**batch)
    assert out[0] is out.loss and out[1] is out.logits and out[1:] == (out.logits,)
    assert len(tuple(out)) == 2
    out = model(**without(batch, "labels"))
    assert out[0] is out.logits and tuple(out) == (out.logits,)


def test_gradient_reaches_every_weight():
    model = make()
    model(**toy_batch()).loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name
        assert weight.grad.isfinite().all(), name


def test_only_the_suffix_teaches():
    """Changing what stands at unlabelled places changes no target."""
    logits = torch.randn(2, 11, 64, requires_grad=True)
    suffix_loss(logits, toy_batch()["labels"]).backward()
    assert logits.grad[:, 7:10].abs().sum(-1).gt(0).all()
    assert logits.grad[:, :7].abs().sum() == 0 and logits.grad[:, 10].abs().sum() == 0


# ------------------------------------------------------------------ forward


def test_padding_changes_nothing():
    model, batch = make(), toy_batch(pads=(0, 3))
    together = model(**batch)
    alone = {name: t[1:, 3:] for name, t in batch.items() if name != "pixel_values"}
    out = model(**alone, pixel_values=batch["pixel_values"][1:])
    torch.testing.assert_close(together.logits[1:, 3:], out.logits, rtol=0, atol=1e-5)
    other = batch["input_ids"].clone()
    other[1, :3] = 9  # whatever stands on padding
    changed = model(**batch | {"input_ids": other}).logits
    torch.testing.assert_close(changed[1, 3:], together.logits[1, 3:], rtol=0, atol=1e-6)


def test_padding_inside_a_row_shifts_nothing():
    """Prompts padded on the right, answers after the gap: positions count real tokens only."""
    model, batch = make(), without(toy_batch(pads=(0, 0)), "labels")
    expected = model(**batch).logits
    gap = {name: t for name, t in batch.items() if name != "pixel_values"}
    start, nothing = N + 4, torch.zeros(2, 3, dtype=torch.int64)
    gap = {k: torch.cat([t[:, :start], nothing, t[:, start:]], dim=1) for k, t in gap.items()}
    logits = model(**gap, pixel_values=batch["pixel_values"]).logits
    logits = torch.cat([logits[:, :start], logits[:, start + 3 :]], dim=1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_padding_is_finite():
    out = make()(**toy_batch(pads=(0, 4)))
    assert out.logits.isfinite().all()


def test_question_changes_how_the_picture_is_read():
    """The prefix is not causal: the last prompt token reaches the first image token."""
    model, batch = make(), without(toy_batch(pads=(0, 0)), "labels")
    changed = batch["input_ids"].clone()
    changed[:, N + 3] = 51
    gap = (model(**batch).logits - model(**batch | {"input_ids": changed}).logits).abs()
    assert gap.amax(dim=-1).gt(0).all()
    late = batch["input_ids"].clone()
    late[:, -1] = 51  # the last suffix token reaches itself only
    gap = (model(**batch).logits - model(**batch | {"input_ids": late}).logits).abs().amax(dim=-1)
    assert gap[:, :-1].max() == 0 and gap[:, -1].gt(0).all()


def test_logits_to_keep_gives_the_last_ones():
    model, batch = make(), toy_batch()
    everything = model(**batch)
    for keep in (1, 4, 11):
        out = model(**batch, logits_to_keep=keep)
        assert torch.equal(out.logits, everything.logits[:, -keep:]) or torch.allclose(
            out.logits, everything.logits[:, -keep:], atol=1e-6
        )
        assert out.logits.shape[1] == keep
    torch.testing.assert_close(model(**batch, logits_to_keep=4).loss, everything.loss)
    assert model(**batch, logits_to_keep=0).logits.shape[1] == 11  # as in transformers: all


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_cache_equals_one_pass(kv_heads):
    model, batch = make(kv_heads=kv_heads), without(toy_batch(pads=(0, 3)), "labels")
    expected = model(**batch).logits
    start = N + 4
    cache = model.make_cache(2, 11)
    prefix = {name: batch[name][:, :start] for name in ("input_ids", "attention_mask")}
    got = [model(**prefix, pixel_values=batch["pixel_values"], cache=cache).logits[:, -1:]]
    for t in range(start, 11):
        ids, real = batch["input_ids"][:, t : t + 1], batch["attention_mask"][:, : t + 1]
        got.append(model(ids, attention_mask=real, cache=cache).logits)
    torch.testing.assert_close(torch.cat(got, 1), expected[:, start - 1 :], rtol=0, atol=1e-5)
    assert len(cache) == 11


def test_several_suffix_tokens_at_once_after_a_cache():
    model, batch = make(), without(toy_batch(pads=(0, 3)), "labels")
    cache, start = model.make_cache(2, 11), N + 4
    prefix = {name: batch[name][:, :start] for name in ("input_ids", "attention_mask")}
    model(**prefix, pixel_values=batch["pixel_values"], cache=cache)
    ids = batch["input_ids"][:, start:]
    out = model(ids, attention_mask=batch["attention_mask"], cache=cache).logits
    torch.testing.assert_close(out, model(**batch).logits[:, start:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.2), (torch.float16, 0.03)], ids=str
)
def test_half_precision(dtype, tolerance):
    model, batch = make(), toy_batch()
    expected = model(**batch)
    model = model.to(dtype)
    out = model(**batch)  # pixel_values stay float32: the model casts them
    assert model.dtype == dtype and out.logits.dtype == out.loss.dtype == torch.float32
    real = batch["attention_mask"].bool()
    assert out.logits.isfinite().all()
    assert (out.logits - expected.logits)[real].abs().max() <= tolerance
    cache = model.make_cache(2, 11)
    assert cache.keys[0].dtype == dtype
    model(**without(batch, "labels", "token_type_ids"), cache=cache)


def gemma2(seed=0):
    torch.manual_seed(seed)
    text = Gemma2Config(64, 16, 24, 2, 2, 1, 8, query_pre_attn_scalar=5, sliding_window=4)
    config = PaliGemmaConfig(make().config.vision_config, text, image_token_index=IMAGE)
    return PaliGemma(config).eval()


@pytest.mark.parametrize("kind", [make, gemma2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_it_answers(kind, dtype):
    model, batch = kind(), toy_batch()
    expected, real = model(**batch).logits, batch["attention_mask"].bool()
    rounded = (copy.deepcopy(model).bfloat16()(**batch).logits - expected)[real].abs().max()
    model = model.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out, cache = model(**batch), model.make_cache(2, 12)
        prompt = without(batch, "labels", "token_type_ids", "pixel_values")
        model(**prompt, cache=cache, image_features=model.encode_image(batch["pixel_values"]))
        step = model(torch.tensor([[5], [6]]), cache=cache, logits_to_keep=1)
    out.loss.backward()
    assert out.logits.dtype == out.loss.dtype == step.logits.dtype == torch.float32
    assert step.logits.isfinite().all() and len(cache) == 12
    error = (out.logits - expected)[real].abs().max()
    assert error <= 2 * rounded, f"{error:.3f}, and {rounded:.3f} of a model in bfloat16"


@pytest.mark.parametrize(("size", "patch", "count"), [(14, 14, 1), (42, 14, 9), (32, 8, 16)])
def test_other_picture_sizes(size, patch, count):
    model = make(image_size=size, patch_size=patch)
    assert model.config.vision_config.num_image_tokens == count
    ids = torch.tensor([[IMAGE] * count + [2, 9, 4]])
    out = model(ids, torch.rand(1, 3, size, size))
    assert out.logits.shape == (1, count + 3, 64)


def test_text_alone():
    out = make()(torch.tensor([[2, 9, 4]]))
    assert out.logits.shape == (1, 3, 64) and out.loss is None


def test_inputs_are_left_alone():
    model, batch = make(), toy_batch()
    before = {name: tensor.clone() for name, tensor in batch.items()}
    model(**batch)
    assert all(torch.equal(before[name], batch[name]) for name in batch)


# ------------------------------------------------------------------ full size


@pytest.mark.parametrize(
    ("size", "total"), [(224, 2_923_466_480), (448, 2_924_351_216), (896, 2_927_890_160)]
)
def test_published_sizes(size, total):
    with torch.device("meta"):
        model = PaliGemma(PaliGemmaConfig(SiglipVisionConfig(image_size=size)))
        assert sum(p.numel() for p in model.parameters()) == total
        if size != 224:
            return
        features = model.encode_image(torch.empty(2, 3, 224, 224))
        assert features.shape == (2, 256, 2048)
        hidden = model.language_model(features, torch.arange(256).expand(2, -1))
        assert model.language_model.logits(hidden[:, -1:]).shape == (2, 1, 257216)
    parts = {
        name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()
    }
    assert parts == {
        "vision_tower": 412_442_352,
        "multi_modal_projector": 2_361_344,
        "language_model": 2_508_662_784,
    }


def test_an_image_token_in_the_answer_is_a_word(checkpoints):
    model = load_model(checkpoints["MQA"])
    batch = random_batch(rows=1, padding=(0,))
    cache = model.make_cache(1, 40)
    model(**batch, cache=cache)
    step = model(torch.tensor([[IMAGE_ID]]), cache=cache)  # as when the model itself wrote it
    assert step.logits.isfinite().all()


def test_a_picture_may_come_as_features_and_not_twice(checkpoints):
    model, batch = load_model(checkpoints["GQA"]), random_batch()
    pixels = batch.pop("pixel_values")
    features = model.encode_image(pixels)
    with torch.no_grad():
        expected = model(**batch, pixel_values=pixels).logits
        assert torch.equal(model(**batch, image_features=features).logits, expected)
    with pytest.raises(ValueError, match="give one of them"):
        model(**batch, pixel_values=pixels, image_features=features)


def test_the_newest_token_needs_no_mask(checkpoints):
    """Without a mask given, one token after a cache: the same as with a mask of ones."""
    model = load_model(checkpoints["GQA"])
    ids = torch.randint(3, 400, (2, 7), generator=torch.Generator().manual_seed(0))
    results = []
    for mask in (None, torch.ones(2, 7, dtype=torch.int64)):
        cache = model.make_cache(2, 7)
        with torch.no_grad():
            model(ids[:, :6], attention_mask=None if mask is None else mask[:, :6], cache=cache)
            results.append(model(ids[:, 6:], attention_mask=mask, cache=cache).logits)
    torch.testing.assert_close(*results)


def test_more_than_the_context_is_refused(checkpoints):
    model = load_model(checkpoints["GQA"])
    model.config.text_config.max_position_embeddings = 7
    ids = torch.randint(3, 400, (1, 8), generator=torch.Generator().manual_seed(0))
    cache = model.make_cache(1, 7)
    with torch.no_grad():
        assert model(ids[:, :7], cache=cache).logits.isfinite().all()
        for tokens, options in ((ids, {}), (ids[:, 7:], {"cache": cache})):
            with pytest.raises(ValueError, match="8 tokens; this model reads 7 at most"):
                model(tokens, **options)
    with pytest.raises(ValueError, match="this model reads 7 at most"):
        model.make_cache(1, 8)
