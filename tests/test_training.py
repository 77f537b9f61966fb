"""Training on any data: the loss is transformers', runs go on bit for bit, bad input is named."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from paligemma import scenes, training
from paligemma.checkpoint import load_model
from paligemma.inference import load
from paligemma.processor import Processor
from paligemma.training import (
    JsonlDataset,
    TrainingConfig,
    examples_of,
    learning_rate_at,
    make_batch,
    make_optimizer,
    train,
    train_step,
)

TINY = scenes.ASSETS / "tiny"
DATA = scenes.SceneDataset(40, tasks=("caption", "detect", "is there"), objects=(1, 2))


def small(**changes) -> TrainingConfig:
    """Six steps of four examples."""
    base = {"steps": 6, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 6, "save": False}
    return TrainingConfig(**(base | changes))


@pytest.fixture(scope="module")
def processor():
    return Processor.from_pretrained(TINY)


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------- loss and step


def test_the_loss_and_its_gradient_are_those_of_transformers(processor):
    from transformers import PaliGemmaForConditionalGeneration

    ours = load_model(TINY)
    theirs = PaliGemmaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)
    (batch,) = make_batch([DATA[i] for i in range(4)], processor)
    a, b = ours(**batch).loss, theirs(**batch).loss
    assert a.item() == pytest.approx(b.item(), abs=1e-5)
    a.backward(), b.backward()
    mine = ours.language_model.embed_tokens.weight.grad
    other = theirs.get_input_embeddings().weight.grad
    assert (mine - other).abs().max() <= 1e-4 * other.abs().max()


@pytest.mark.parametrize("accumulate", [2, 3, 4])
def test_a_batch_in_parts_is_the_whole_batch(processor, accumulate):
    items = [DATA[i] for i in range(8)]
    found = {}
    for parts in (1, accumulate):
        model = load_model(TINY).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        loss = train_step(model, optimizer, make_batch(items, processor, parts), 1e9)
        found[parts] = loss, weights(model)
    assert len(make_batch(items, processor, accumulate)) == accumulate
    assert found[1][0] == pytest.approx(found[accumulate][0], abs=1e-5)
    start = load_model(TINY).state_dict()
    steps = [torch.cat([(w[k] - start[k]).flatten() for k in start]) for _, w in found.values()]
    assert (steps[0] - steps[1]).norm() <= 1e-4 * steps[0].norm()


def test_a_long_gradient_is_shortened(processor):
    model = load_model(TINY).train()
    before = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    train_step(model, optimizer, make_batch([DATA[0]], processor), max_grad_norm=0.01)
    moved = torch.cat([(v - before[k]).flatten() for k, v in model.state_dict().items()])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-2)


def test_a_loss_that_is_no_number_stops_the_run_and_spares_the_weights(processor):
    model = load_model(TINY).train()
    with torch.no_grad():
        model.multi_modal_projector.linear.weight[0, 0] = math.nan
    before = weights(model)
    optimizer = make_optimizer(model, small())
    with pytest.raises(ValueError, match=r"loss nan.*lower learning_rate"):
        train_step(model, optimizer, make_batch([DATA[0]], processor), 1.0)
    assert all(torch.equal(v.nan_to_num(), before[k].nan_to_num())
               for k, v in model.state_dict().items())  # fmt: skip


def test_every_weight_is_trained_once_and_vectors_do_not_shrink():
    model = load_model(TINY)
    groups = make_optimizer(model, small(weight_decay=0.3)).param_groups
    found = [id(p) for g in groups for p in g["params"]]
    assert sorted(found) == sorted(map(id, model.parameters()))
    assert all((p.ndim > 1) == (g["weight_decay"] > 0) for g in groups for p in g["params"])


def test_what_is_frozen_stays(processor):
    model = load_model(TINY)
    model.vision_tower.requires_grad_(False)
    before = weights(model)
    train(model, DATA, small(steps=2), processor)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and not any(name.startswith("vision_tower") for name in changed)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train: requires_grad is False"):
        train(model, DATA, small(steps=2), processor)


# ---------------------------------------------------------------- schedule and order


def test_schedule():
    config = TrainingConfig(steps=110, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate_at(step, config) for step in range(110)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5) and 0 < rates[109] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)
    flat = TrainingConfig(steps=4, warmup_steps=0, learning_rate=1.0)
    assert learning_rate_at(0, flat) == 1.0


def test_every_example_once_an_epoch_in_new_orders():
    config = small(batch_size=3)
    seen = [i for step in range(20) for i in examples_of(step, 10, config)]
    epochs = [seen[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert examples_of(7, 10, config) == seen[21:24]
    assert examples_of(0, 10, small(batch_size=3, seed=1)) != seen[:3]
    assert sorted(set(examples_of(0, 2, config))) == [0, 1], "a batch may be longer than an epoch"


# ---------------------------------------------------------------- runs


def test_a_run_in_two_halves_equals_a_whole_one_bit_for_bit(tmp_path, monkeypatch, processor):
    """Ctrl-C in the third step: it is finished and saved; the same call goes on."""
    whole = load_model(TINY)
    losses = train(whole, DATA, small(ema_decay=0.5), processor)
    config, step, asked = small(ema_decay=0.5, folder=tmp_path / "run"), train_step, []

    def interrupted(*arguments):
        asked.append(True)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(training, "train_step", interrupted)
    first = train(load_model(TINY), DATA, config, processor)
    assert first == losses[:3] and signal.getsignal(signal.SIGINT) is before
    model = load_model(TINY)
    assert train(model, DATA, config, processor) == losses
    assert same(weights(model), weights(whole)) and not model.training
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["checkpoint.pt"]
    finished = load_model(TINY)
    assert train(finished, DATA, config, processor) == losses, "nothing is left to do"
    assert same(weights(finished), weights(whole))


def test_dropout_follows_from_the_step(tmp_path, processor):
    def noisy():
        model = load_model(TINY)
        model.multi_modal_projector.linear = torch.nn.Sequential(
            model.multi_modal_projector.linear, torch.nn.Dropout(0.5)
        )
        return model

    whole = train(noisy(), DATA, small(), processor)
    torch.manual_seed(99)
    train(noisy(), DATA, small(steps=3, folder=tmp_path), processor)
    torch.manual_seed(7)
    assert train(noisy(), DATA, small(folder=tmp_path), processor) == whole


def test_workers_change_nothing(processor):
    found = [train(load_model(TINY), DATA, small(steps=3, workers=n), processor) for n in (0, 2)]
    assert found[0] == found[1]


def test_the_model_ends_with_the_mean_of_its_weights(processor):
    paths = []
    for steps in (1, 2, 3):  # warm-up throughout: the same rates
        model = load_model(TINY)
        train(model, DATA, small(steps=steps), processor)
        paths.append(weights(model)["multi_modal_projector.linear.weight"])
    model = load_model(TINY)
    train(model, DATA, small(steps=3, ema_decay=0.9), processor)
    expected = paths[0].lerp(paths[1], 0.1).lerp(paths[2], 0.1)
    found = model.multi_modal_projector.linear.weight
    assert torch.allclose(found, expected, atol=1e-7) and not torch.equal(found, paths[2])


def test_a_trained_model_loads_and_answers_better(tmp_path):
    """Two examples by heart; the processor is the one beside the weights."""

    class Two(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            image = np.full((112, 112, 3), 255 * i, np.uint8)
            return {"image": image, "prefix": "what is this?", "suffix": ("a car", "a cat")[i]}

    config = TrainingConfig(steps=40, batch_size=2, learning_rate=2e-3, folder=tmp_path / "run")
    losses = train(load_model(TINY), Two(), config)
    assert losses[-1] < 0.1 < losses[0] and len(losses) == 40
    pg = load(tmp_path / "run")
    pictures = [Two()[i]["image"] for i in range(2)]
    assert pg.batch(pictures, ["what is this?"] * 2) == ["a car", "a cat"]


def test_several_pictures_an_example(processor):
    class Pairs(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            images = [scenes.make_scene(i + n).image for n in range(2)]
            return {"image": images, "prefix": "answer en the same?", "suffix": "no"}

    assert len(train(load_model(TINY), Pairs(), small(steps=2, accumulate=2), processor)) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(processor):
    here = train(load_model(TINY), DATA, small(steps=3), processor)
    there = train(load_model(TINY, device="cuda"), DATA, small(steps=3), processor)
    assert there == pytest.approx(here, abs=1e-3)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0; expected a finite number of 1 or more"),
        ({"steps": 2.5}, "steps is 2.5; expected a whole number"),
        ({"batch_size": True}, "batch_size is True"),
        ({"batch_size": "8"}, "batch_size is '8'"),
        ({"learning_rate": 0}, "learning_rate is 0; expected a finite number above 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
        ({"learning_rate": None}, "learning_rate is None; expected a number"),
        ({"warmup_steps": -1}, "warmup_steps is -1; expected a finite number of 0 or more"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0; expected a number below 1"),
        ({"ema_decay": math.inf}, "ema_decay is inf"),
        ({"accumulate": 9, "batch_size": 8}, "accumulate is 9, more parts than the 8"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**changes)
    TrainingConfig(steps=np.int64(3), learning_rate=np.float32(0.1))  # NumPy's numbers are numbers


def test_data_without_examples_or_keys(processor):
    with pytest.raises(ValueError, match="the dataset is empty"):
        train(load_model(TINY), [], small(), processor)
    item = {"image": np.zeros((4, 4, 3), np.uint8), "prompt": "caption", "suffix": "a cat"}
    with pytest.raises(ValueError, match="the dataset lacks prefix; items need image, prefix"):
        train(load_model(TINY), [item], small(), processor)


def test_a_checkpoint_that_does_not_fit(tmp_path, processor):
    config = small(steps=2, folder=tmp_path)
    train(load_model(TINY), DATA, config, processor)
    with pytest.raises(ValueError, match="was made with batch_size 4, now it is 5"):
        train(load_model(TINY), DATA, small(batch_size=5, folder=tmp_path), processor)
    frozen = load_model(TINY)
    frozen.vision_tower.requires_grad_(False)
    with pytest.raises(ValueError, match="trains other parameters than this model's"):
        train(frozen, DATA, config, processor)


@pytest.fixture(scope="module")
def state(tmp_path_factory, processor):
    """The bytes of the checkpoint of a run in a folder, and that folder's config."""
    config = small(steps=2, folder=tmp_path_factory.mktemp("state"))
    train(load_model(TINY), DATA, config, processor)
    return config, (config.folder / "checkpoint.pt").read_bytes()


def refused(config, processor) -> str:
    """What is said of the checkpoint in a config's folder; the model stays as it was."""
    model = load_model(TINY)
    with pytest.raises(ValueError, match=r"checkpoint\.pt") as caught:
        train(model, DATA, config, processor)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert same(weights(model), weights(load_model(TINY)))
    return str(caught.value)


@pytest.mark.parametrize("cut", [0, 1, 200, 0.5, 0.99])
def test_a_state_that_was_cut(state, processor, cut):
    config, good = state
    size = int(cut * len(good)) if cut < 1 else cut
    (config.folder / "checkpoint.pt").write_bytes(good[:size])
    assert "is broken" in refused(config, processor)


def test_a_state_with_a_flipped_bit(state, processor):
    """It is found, or it changes nothing, as in the room that is left between two tensors."""
    config, good = state
    places, found = np.random.default_rng(5).integers(len(good), size=12).tolist(), 0
    for place in [*places, good.index(b"losses")]:
        flipped = bytearray(good)
        flipped[place] ^= 4
        (config.folder / "checkpoint.pt").write_bytes(flipped)
        try:
            train(load_model(TINY), DATA, config, processor)
        except ValueError as error:
            assert "checkpoint.pt is broken" in str(error) and "\n" not in str(error)
            found += 1
    assert found >= 10, "most bytes count"


def other_losses(state):
    state["losses"] = ["low"]


def no_losses(state):
    del state["losses"]


def other_optimizer(state):
    state["optimizer"] = {"state": {}, "param_groups": [{"params": [0]}]}


def no_optimizer(state):
    state["optimizer"] = None


def other_parameters(state):
    state["model"] = {"weight": torch.zeros(3)}


def no_tensors(state):
    state["model"] = ["weight"]


def other_settings(state):
    state["config"] = {"steps": 5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_losses, "holds the state of another run"),
        (no_losses, "holds the state of another run"),
        (other_optimizer, "holds the state of another run"),
        (no_optimizer, "holds the state of another run"),
        (other_parameters, "trains other parameters"),
        (no_tensors, "is no training checkpoint"),
        (other_settings, "was made with batch_size None, now it is 4"),
    ],
)
def test_a_state_of_something_else(state, processor, change, message):
    config, good = state
    file = config.folder / "checkpoint.pt"
    file.write_bytes(good)
    foreign = torch.load(file, weights_only=True)
    change(foreign)
    torch.save(foreign, file)
    assert message in refused(config, processor)


def test_a_state_that_runs_code_is_never_run(state, processor, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    torch.save({"model": Trap()}, state[0].folder / "checkpoint.pt")
    assert "is broken" in refused(state[0], processor)
    assert not (tmp_path / "trapped").exists()


# ---------------------------------------------------------------- one's own data


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    return tmp_path


GOOD = '{"image": "a.png", "prefix": "caption en", "suffix": "rot, süß"}'


def test_jsonl(folder, processor):
    file = folder / "mine.jsonl"
    file.write_text("\ufeff" + GOOD + "\r\n\n" + GOOD.replace("}", ', "more": [1]}'), "utf-8")
    for path in (folder, file, str(file)):
        data = JsonlDataset(path)
        expected = {"image": str(folder / "a.png"), "prefix": "caption en", "suffix": "rot, süß"}
        assert len(data) == 2 and data[0] == data[1] == expected
    losses = train(load_model(TINY), data, small(steps=2), processor)
    assert len(losses) == 2 and all(map(math.isfinite, losses))


def test_lines_without_a_prompt_take_the_one_that_is_given(folder):
    line = {"image": "a.png", "suffix": "rot"}
    (folder / "mine.jsonl").write_text(json.dumps(line) + "\n" + GOOD)
    found = [item["prefix"] for item in JsonlDataset(folder, prefix="caption de")]
    assert found == ["caption de", "caption en"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_is_one_line_wherever_it_is_read(folder, processor, workers):
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:40])
    (folder / "mine.jsonl").write_text(GOOD + "\n" + GOOD.replace("a.png", "b.png"))
    with pytest.raises(ValueError, match=r"b\.png is not a picture") as caught:
        train(load_model(TINY), JsonlDataset(folder), small(workers=workers), processor)
    assert "\n" not in str(caught.value)


ORPHANS = """
import multiprocessing, time
from paligemma.support.runs import load_batches

def work(items):
    time.sleep(60 * (items[0] > 1))  # the first two are ready at once
    return items

batches = load_batches(list(range(9)), ([i] for i in range(9)), work, workers=2)
next(batches)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes as POSIX has them")
def test_workers_end_with_a_killed_parent_even_in_mid_work():
    with subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE) as parent:
        workers = [int(word) for word in parent.stdout.readline().split()]
        assert len(workers) == 2 and all(map(runs, workers))
        parent.kill()
    limit = time.monotonic() + 10
    while any(map(runs, workers)) and time.monotonic() < limit:
        time.sleep(0.05)
    left = list(filter(runs, workers))
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert not left, "they work on for nobody"


def runs(process: int) -> bool:
    """Is there such a process, and is it more than a name that its parent hasn't read yet?"""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
