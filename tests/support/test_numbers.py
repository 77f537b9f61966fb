"""NaN and infinity are named where they begin, whatever the model does; nothing stays behind."""

import json
import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from random_models import KINDS, random_batch

import paligemma
from paligemma.checkpoint import load_model
from paligemma.generation import generate
from paligemma.inference import TINY
from paligemma.lora import add_lora
from paligemma.quantization import quantize_model
from paligemma.support.numbers import check_finite
from paligemma.training import TrainingConfig, train

SCENE = TINY.parent / "pictures" / "scene.png"
PROMPT = "caption en"
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def pg():
    return paligemma.load()


def spoil(model, name, value=NAN, when=lambda output: True):
    """From now on the output of one module holds `value` at [0, 0, 3]."""

    def put(module, inputs, output):
        output = output.clone()
        if when(output):
            output[0, 0, 3] = value
        return output

    return model.get_submodule(name).register_forward_hook(put)


def hooks(model) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


MLP = "language_model.layers.1.mlp.down_proj"
MODULES = ("vision_tower.encoder.layers.1.mlp", MLP, "language_model.norm", "multi_modal_projector")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", MODULES)
def test_the_module_and_the_place_are_named(pg, name, value):
    spoil(pg.model, name, value)
    kind = type(pg.model.get_submodule(name)).__name__
    words = re.escape(f"{name} ({kind}) gives {value} at [0, 0, 3] of float32[")
    with pytest.raises(ValueError, match=words + r".*; 1 values"), check_finite(pg.model):
        pg(SCENE, PROMPT)


def test_weights_that_overflow_are_named_where_they_do(pg):
    """No hook put it there: two layers further on everything is NaN."""
    with torch.no_grad():
        pg.model.get_submodule("language_model.layers.0.mlp.up_proj").weight.mul_(1e30)
        pg.model.get_submodule("language_model.layers.0.mlp.down_proj").weight.mul_(1e30)
    words = r"^language_model\.layers\.0\.mlp\.down_proj \(Linear\) gives -?inf at \[0, 0, \d+\]"
    with pytest.raises(ValueError, match=words), check_finite(pg.model):
        pg(SCENE, PROMPT)


def test_a_later_step_of_an_answer_is_looked_at(pg):
    spoil(pg.model, MLP, when=lambda output: output.shape[1] == 1)
    stream = pg.stream(SCENE, PROMPT)
    with check_finite(pg.model):
        assert next(stream) == "a"
        with pytest.raises(ValueError, match=re.escape(f"{MLP} (Linear) gives nan at [0, 0, 3]")):
            next(stream)


@pytest.mark.parametrize("value", [NAN, INF])
def test_parameters_are_named_at_once(pg, value):
    with torch.no_grad():
        pg.model.get_parameter(f"{MLP}.weight")[2, 5] = value
    with pytest.raises(ValueError, match=re.escape(f"{MLP}.weight holds {value} at [2, 5] of")):
        check_finite(pg.model).__enter__()
    assert hooks(pg.model) == 0


def test_a_picture_with_nan_is_not_the_modules_fault(pg):
    batch = pg.processor(SCENE, PROMPT)
    batch["pixel_values"][0, 1, 2, 3] = NAN
    words = r"patch_embedding \(\w+\) is given nan, and gives nan"
    with pytest.raises(ValueError, match=words), check_finite(pg.model):
        pg.model(**batch)


def test_what_the_model_itself_gives_is_looked_at(pg):
    """Its output is a dataclass with tensors in it."""

    def put(module, inputs, output):
        output.logits[0, 1, 2] = NAN

    pg.model.register_forward_hook(put)
    words = re.escape("the model (PaliGemma) gives nan at [0, 1, 2]")
    with pytest.raises(ValueError, match=words), check_finite(pg.model):
        pg.model(**pg.processor(SCENE, PROMPT))


# ---------------------------------------------------------------- training


class Examples(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"image": SCENE, "prefix": PROMPT, "suffix": "a cat"}


def training(pg, **changes):
    config = TrainingConfig(**{"steps": 2, "batch_size": 2, "learning_rate": 1e-3} | changes)
    return train(pg.model, Examples(), config, pg.processor)


def test_under_training_the_module_is_named_and_no_step_is_made(pg):
    before = pg.model.get_parameter(f"{MLP}.weight").clone()
    spoil(pg.model, MLP)
    with pytest.raises(ValueError, match=re.escape(f"{MLP} (Linear) gives nan")):
        with check_finite(pg.model):
            training(pg)
    assert torch.equal(pg.model.get_parameter(f"{MLP}.weight"), before)


class Breaks(torch.autograd.Function):
    """Passes values on, and gives back a gradient that holds infinity."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient[0, 0, 3] = INF
        return gradient


def test_a_gradient_is_named_where_it_begins(pg):
    layer = pg.model.get_submodule("language_model.layers.2")
    layer.register_forward_pre_hook(lambda module, inputs: (Breaks.apply(inputs[0]), *inputs[1:]))
    batch = pg.processor([SCENE], [PROMPT], ["a cat"])
    words = (
        "output of language_model.layers.1 (GemmaDecoderLayer) is inf at [0, 0, 3] of float32[1,"
    )
    with check_finite(pg.model):
        loss = pg.model(**batch).loss
        assert loss.isfinite()
        with pytest.raises(ValueError, match=re.escape(words)):
            loss.backward()
    with check_finite(pg.model):
        loss = pg.model(**batch).loss
    loss.backward()  # closed: nothing looks any more


def test_training_is_the_same_with_it(pg):
    with check_finite(pg.model):
        losses = training(pg)
    assert losses == training(paligemma.load())


# ---------------------------------------------------------------- other layers


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantised_layers_are_looked_at(pg, mode):
    quantize_model(pg.model, mode)
    with check_finite(pg.model):
        alone = pg(SCENE, PROMPT)
    assert alone == pg(SCENE, PROMPT)
    layer = pg.model.get_submodule(MLP)
    with torch.no_grad():
        layer.scales.view(-1)[3] = NAN
    with pytest.raises(ValueError, match=re.escape(f"{MLP}.scales holds nan at [")):
        check_finite(pg.model).__enter__()
    layer.scales.view(-1)[3] = 1
    spoil(pg.model, MLP)
    with pytest.raises(ValueError, match=re.escape(f"{MLP} ({type(layer).__name__}) gives nan")):
        with check_finite(pg.model):
            pg(SCENE, PROMPT)


def test_adapters_are_looked_at(pg):
    add_lora(pg.model, rank=2)
    name = next(n for n, p in pg.model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        pg.model.get_parameter(name).view(-1)[0] = NAN
    with pytest.raises(ValueError, match=re.escape(f"{name} holds nan at [0, 0]")):
        check_finite(pg.model).__enter__()


@pytest.mark.parametrize("kind", [*KINDS, "gemma2"])
def test_sound_models_pass_padded_and_cached(checkpoints, gemma2_checkpoint, kind):
    model = load_model({**checkpoints, "gemma2": gemma2_checkpoint}[kind])
    ask = partial(generate, model, **random_batch(), max_new_tokens=8, eos_token_id=-1)
    with check_finite(model):
        tokens = ask()
    assert torch.equal(tokens, ask())


def test_nothing_stays_behind_whether_it_ends_well_or_not(pg):
    before = pg(SCENE, PROMPT)
    with check_finite(pg.model):
        assert hooks(pg.model) == len(list(pg.model.modules()))
        assert pg(SCENE, PROMPT) == before
    assert hooks(pg.model) == 0
    with pytest.raises(KeyError), check_finite(pg.model):
        raise KeyError
    assert hooks(pg.model) == 0
    spoil(pg.model, MLP)
    assert pg.model(**pg.processor(SCENE, PROMPT)).logits.isnan().any()  # and nobody minds


def test_a_model_without_memory_passes():
    with torch.device("meta"):
        layer = torch.nn.Linear(2, 2)
        with check_finite(layer):
            layer(torch.empty(3, 2))


# ---------------------------------------------------------------- the same tokens, however computed


ANSWERS = """
import json, sys, torch, paligemma
from paligemma.inference import TINY

torch.set_num_threads(int(sys.argv[1]))
pg = paligemma.load()
prompts = ["caption en", "answer en how many dogs are there?", "detect cat ; dog"]
names = ["scene.png", "scene2.png", "scene3.png", "cat.jpg"]
asked = [(TINY.parent / "pictures" / name, prompt) for name in names for prompt in prompts]
answers = {}
for size in (1, 5, len(asked)):
    batches = [zip(*asked[i : i + size]) for i in range(0, len(asked), size)]
    answers[size] = [text for images, texts in batches for text in pg.batch(images, texts)]
assert torch.get_num_threads() == int(sys.argv[1])
print(json.dumps([torch.backends.cpu.get_cpu_capability(), answers]))
"""


def test_tokens_are_equal_over_threads_batch_sizes_and_instruction_sets():
    found, sets = [], set()
    for threads, capability in ((1, None), (2, None), (4, None), (1, "default")):
        chosen = {"OMP_WAIT_POLICY": "passive"}  # threads that wait leave the cores to others
        if capability:
            chosen["ATEN_CPU_CAPABILITY"] = capability
        command = [sys.executable, "-c", ANSWERS, str(threads)]
        run = subprocess.run(command, capture_output=True, text=True, env=os.environ | chosen)
        assert run.returncode == 0, run.stderr
        instructions, answers = json.loads(run.stdout)
        found += answers.values()
        sets.add(instructions)
    assert "DEFAULT" in sets
    assert len(found) == 12 and all(answers == found[0] for answers in found)
    assert found[0][0] == "a cat and two dogs"
