"""The compiled step: the same tokens for every kind of model, one graph, memory used again."""

import gc

import pytest
import torch
from random_models import IMAGE_TOKENS, WINDOW, random_batch

import paligemma
from paligemma.checkpoint import load_model
from paligemma.compilation import CompiledDecoder, StaticCache, compile_decode, decode_step
from paligemma.generation import generate, generate_steps
from paligemma.lora import add_lora, merge_lora
from paligemma.quantization import quantize_model
from paligemma.support.course import sample_picture

KINDS = ["MHA", "GQA", "MQA", "gemma2"]


@pytest.fixture
def make(checkpoints, gemma2_checkpoint):
    def load(kind, **options):
        return load_model(gemma2_checkpoint if kind == "gemma2" else checkpoints[kind], **options)

    return load


def logits_of(model, decoder, batch, steps=8):
    """Logits of a prompt and of `steps` tokens after it: `float32[steps, B, V]`."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    cache = decoder.make_cache(len(ids), ids.shape[1] + steps)
    out = []
    with torch.inference_mode():
        for step in range(steps):
            pixels = batch["pixel_values"] if step == 0 else None
            logits = decoder(ids, pixels, mask, cache=cache, logits_to_keep=1).logits[:, -1]
            out.append(logits.clone())
            ids = torch.full_like(ids[:, :1], 7 + step)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return torch.stack(out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fixed_shape_changes_nothing(make, kind):
    """Padding, a window shorter than the prompt (Gemma 2), any number of key/value heads."""
    model, batch = make(kind), random_batch()
    assert kind != "gemma2" or batch["input_ids"].shape[1] > WINDOW
    plain = logits_of(model, model, batch)
    fixed = logits_of(model, CompiledDecoder(model, decode_step), batch)
    torch.testing.assert_close(fixed, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", ["float32", "bfloat16", "int8", "int4", "lora"])
def test_one_graph_and_the_same_tokens(make, kind, layers):
    """Recorded whole (a value asked for would raise), once for all tokens of an answer."""
    model = make(kind, dtype=torch.float32 if layers in ("float32", "lora") else torch.bfloat16)
    if layers in ("int8", "int4"):
        quantize_model(model, layers)
    if layers == "lora":
        add_lora(model, rank=2)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight.data, std=0.1)
        merge_lora(model)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    step = torch.compile(decode_step, backend=count, fullgraph=True, dynamic=False)
    batch = random_batch()
    inputs = batch["input_ids"], batch["pixel_values"], batch["attention_mask"]
    options = {"max_new_tokens": 6, "eos_token_id": -1}
    found = generate(CompiledDecoder(model, step), *inputs, **options)
    assert len(graphs) == 1
    assert torch.equal(found, generate(CompiledDecoder(model, decode_step), *inputs, **options))
    if layers in ("float32", "lora"):
        assert torch.equal(found, generate(model, *inputs, **options))


def test_inductor_gives_the_same_tokens():
    pg = paligemma.load()
    pictures = [sample_picture(name) for name in ("scene", "scene2")]
    prompts = ["caption en", "answer en where is the tulip?"]
    batch = pg.processor(pictures, prompts)
    inputs = batch["input_ids"], batch["pixel_values"], batch["attention_mask"]
    torch.compiler.reset()
    decoder = CompiledDecoder(pg.model)
    assert torch.equal(generate(decoder, *inputs), generate(pg.model, *inputs))


def test_without_a_compiler_there_is_one_clear_line(make):
    model = make("MQA")
    missing = {"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}
    torch.compiler.reset()
    with torch._inductor.config.patch(missing):
        with pytest.warns(UserWarning, match="nothing can be compiled here, going on without: .+"):
            assert compile_decode(model) is model
    torch.compiler.reset()
    assert isinstance(compile_decode(model), CompiledDecoder)


def test_a_room_is_rounded_up_and_holds_every_token(make):
    decoder = CompiledDecoder(make("MQA"), decode_step)
    rooms = [decoder.make_cache(1, n).max_length for n in (1, 127, 128, 129, 300)]
    assert rooms == [128, 128, 128, 256, 384]
    batch = random_batch(rows=1, padding=(0,))
    new = 128 - batch["input_ids"].shape[1] + 1  # the last token is never fed
    options = {"max_new_tokens": new, "eos_token_id": -1}
    found = generate(decoder, batch["input_ids"], batch["pixel_values"], **options)
    assert torch.equal(
        found, generate(decoder.model, batch["input_ids"], batch["pixel_values"], **options)
    )


def test_answers_at_the_same_time_have_memory_of_their_own(make):
    model = make("GQA")
    decoder, batches = CompiledDecoder(model, decode_step), [random_batch(seed=s) for s in (1, 2)]
    args = [(b["input_ids"], b["pixel_values"], b["attention_mask"]) for b in batches]
    streams = [generate_steps(decoder, *a) for a in args]
    mixed = [[next(stream) for stream in streams] for _ in range(6)]
    for row, inputs in zip(zip(*mixed), args):
        alone = generate(model, *inputs, max_new_tokens=6, eos_token_id=-1)
        assert torch.equal(torch.stack(row, dim=1), alone)


def test_memory_is_used_again_when_an_answer_is_over(make):
    decoder, batch = CompiledDecoder(make("MQA"), decode_step), random_batch()
    inputs = batch["input_ids"], batch["pixel_values"], batch["attention_mask"]
    places = set()
    for _ in range(3):
        first = decoder.make_cache(3, 40)
        places.add(first.keys[0].data_ptr())
        del first
        gc.collect()
        once = generate(decoder, *inputs, max_new_tokens=5)
    assert len(places) == 1
    assert torch.equal(once, generate(decoder.model, *inputs, max_new_tokens=5))
    assert sum(len(stores) for stores in decoder.spare.values()) == 1
    decoder.make_cache(1, 400)
    assert len(decoder.spare) == 1  # one shape at a time


def test_what_memory_held_before_does_not_matter(make):
    model = make("MQA")
    c = model.config.text_config
    shape = c.num_hidden_layers, 3, c.num_key_value_heads, 64, c.head_dim
    batch, answers = random_batch(), []
    for old in (0.0, float("nan"), float("inf")):
        cache = StaticCache(*shape)
        for tensor in (*cache.keys, *cache.values):
            tensor.fill_(old)
        with torch.inference_mode():
            model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"], cache=cache)
            cache.begin(batch["attention_mask"])
            answers.append(decode_step(model, torch.full((3, 1), 7), cache))
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    assert cache.visible.sum(-1).flatten().tolist() == [IMAGE_TOKENS + 13 - n for n in (0, 3, 5)]


def test_load_compiles_and_the_answers_are_the_same():
    plain, fast = paligemma.load(), paligemma.load(compile=True)
    scene = sample_picture("scene")
    assert isinstance(fast.decoder, CompiledDecoder) and plain.decoder is None
    for prompt in ("caption en", "answer en how many dogs are there?"):
        assert fast(scene, prompt) == plain(scene, prompt)
    assert fast.detect(scene, "cat")[0].score == pytest.approx(plain.detect(scene, "cat")[0].score)
    fast.to(torch.bfloat16)  # other memory is taken, not that of before
    assert fast(scene, "caption en") == plain.to(torch.bfloat16)(scene, "caption en")


def test_the_room_ends_with_the_context():
    decoder = CompiledDecoder(paligemma.load().model, step=decode_step)
    assert decoder.make_cache(1, 8192).max_length == 8192
    with pytest.raises(ValueError, match="8193 tokens; this model reads 8192"):
        decoder.make_cache(1, 8193)
