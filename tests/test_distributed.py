"""Many processes make the curve of one, divided or not, stopped, resumed or killed."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from paligemma import scenes, training
from paligemma.checkpoint import load_model
from paligemma.contrastive import sigmoid_loss
from paligemma.distributed import local_bytes, processes, ring_sigmoid_loss, train
from paligemma.lora import add_lora
from paligemma.processor import Processor
from paligemma.support import processes as team
from paligemma.support import shards
from paligemma.support.launch import torchrun
from paligemma.support.replacing import SaveError
from paligemma.training import TrainingConfig

TINY = scenes.ASSETS / "tiny"
DATA = scenes.SceneDataset(40, tasks=("caption", "is there", "detect"), objects=(1, 2))


def small(**changes) -> TrainingConfig:
    base = {"steps": 4, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 4, "save": False}
    return TrainingConfig(**(base | changes))


@pytest.fixture(scope="module")
def processor():
    return Processor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def alone(processor):
    return training.train(load_model(TINY), DATA, small(), processor)


# ---------------------------------------------------------------- many processes


def run(adapters=False, **changes):
    """In each process: model, data, config and processor."""
    import torch

    from paligemma import scenes, training
    from paligemma.checkpoint import load_model
    from paligemma.lora import add_lora
    from paligemma.processor import Processor

    tiny = scenes.ASSETS / "tiny"
    data = scenes.SceneDataset(40, tasks=("caption", "is there", "detect"), objects=(1, 2))
    base = {"steps": 4, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 4, "save": False}
    model = load_model(tiny)
    if adapters:
        torch.manual_seed(0)
        add_lora(model, rank=4, targets=["q_proj"])
    return model, data, training.TrainingConfig(**(base | changes)), Processor.from_pretrained(tiny)


def many_ways(folder):
    """All that two processes do in these tests, since a start costs more than a step."""
    import os
    import signal

    from paligemma import training
    from paligemma.distributed import process_number, processes, train

    found, rate_at = {}, training.learning_rate_at

    def interrupted(step, config):
        if process_number() == 1 and step == 1:
            os.kill(os.getpid(), signal.SIGINT)  # one process hears Ctrl-C, all stop
        return rate_at(step, config)

    with processes():
        found["copies"] = train(*run(accumulate=2), sharded=False)
        found["mean"] = train(*run(steps=2, ema_decay=0.5, folder=f"{folder}/mean"), sharded=False)
        training.learning_rate_at = interrupted
        found["stopped"] = train(*run(folder=f"{folder}/parts"))
        training.learning_rate_at = rate_at
        found["parts"] = train(*run(folder=f"{folder}/parts", save=True))
        found["adapters"] = train(*run(adapters=True, steps=2, folder=f"{folder}/adapters"))
        try:
            train(*run(batch_size=3))
        except ValueError as error:
            found["uneven"] = str(error)
        try:
            train(*run(ema_decay=0.5))
        except ValueError as error:
            found["ema"] = str(error)
        return found


def go_on(folder):
    """What two have begun; and the ring, in which forth and back differ only from three on."""
    import torch

    from paligemma.distributed import process_number, processes, ring_sigmoid_loss, train

    with processes():
        mean = train(*run(ema_decay=0.5, folder=f"{folder}/mean"), sharded=False)
        adapters = train(*run(adapters=True, folder=f"{folder}/adapters"))
        torch.manual_seed(0)
        mine = slice(2 * process_number(), 2 * process_number() + 2)
        images, texts = (x[mine].clone().requires_grad_() for x in torch.randn(2, 8, 5))
        loss = ring_sigmoid_loss(images, texts, 3.0, -1.0)
        loss.backward()
        ring = loss.item(), images.grad.tolist(), texts.grad.tolist()
        return {"mean": mean, "adapters": adapters, "ring": ring}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def two(place):
    return torchrun(many_ways, 2, str(place), uses=[run])


def test_the_curve_is_that_of_one_process(two, alone):
    """Copies with two parts a step, and halves that were stopped by Ctrl-C and went on."""
    for name in ("copies", "parts"):
        assert two[0][name] == two[1][name], "both report the mean"
        assert two[0][name] == pytest.approx(alone, abs=1e-5)
    assert [len(found["stopped"]) for found in two] == [2, 2]


def loss_of(model, processor):
    (batch,) = training.make_batch([DATA[i] for i in range(30, 36)], processor)
    with torch.no_grad():
        return model(**batch).loss.item()


def test_process_0_saves_the_whole_model(two, place, processor):
    whole = load_model(TINY)
    training.train(whole, DATA, small(), processor)
    found = load_model(place / "parts")  # strictly: every weight is there
    assert loss_of(found, processor) == pytest.approx(loss_of(whole, processor), abs=1e-4)
    assert abs(loss_of(found, processor) - loss_of(load_model(TINY), processor)) > 0.01
    assert Processor.from_pretrained(place / "parts").num_image_tokens == 64


@pytest.fixture(scope="module")
def four(two, place):
    return torchrun(go_on, 4, str(place), uses=[run])


def test_four_go_on_where_two_stopped(four, place, processor):
    """Copies with a running mean, and adapters in parts."""
    config = small(ema_decay=0.5)
    model = load_model(TINY)
    alone = training.train(model, DATA, config, processor)
    assert four[3]["mean"] == pytest.approx(alone, abs=1e-5)
    adapted = load_model(TINY)
    torch.manual_seed(0)
    add_lora(adapted, rank=4, targets=["q_proj"])
    alone = training.train(adapted, DATA, small(), processor)
    assert four[0]["adapters"] == pytest.approx(alone, abs=1e-5)
    again, config.folder = load_model(TINY), str(place / "mean")  # finished: nothing left to do
    assert train(again, DATA, config, processor) == four[0]["mean"]
    assert loss_of(again, processor) == pytest.approx(loss_of(model, processor), abs=1e-4)


def test_what_cannot_be_is_said(two):
    assert "batch_size is 3, which 2 processes cannot share evenly" in two[0]["uneven"]
    assert two[1]["ema"] == "ema_decay is 0.5; with a sharded model it must be 0"


def test_the_ring_is_the_whole_loss(four):
    torch.manual_seed(0)
    images, texts = (x.requires_grad_() for x in torch.randn(2, 8, 5))
    loss = sigmoid_loss(images, texts, 3.0, -1.0)
    loss.backward()
    found = [process["ring"] for process in four]
    assert sum(ring[0] for ring in found) / 4 == pytest.approx(loss.item(), abs=1e-5)
    for i, whole in ((1, images.grad), (2, texts.grad)):
        parts = torch.tensor([row for ring in found for row in ring[i]]) / 4
        assert torch.allclose(parts, whole, atol=1e-6)


# ---------------------------------------------------------------- alone


def test_alone_it_is_the_same_training(tmp_path, processor, alone, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with processes() as device:
        assert device.type in ("cpu", "cuda") and team.process_count() == 1
    config = small(steps=2, folder=tmp_path)
    assert train(load_model(TINY), DATA, config, processor) == alone[:2]
    model = load_model(TINY)
    assert train(model, DATA, small(folder=tmp_path), processor) == alone
    assert not model.training
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.json", "step-4"]


def test_alone_the_ring_is_the_loss():
    images, texts = torch.randn(2, 4, 5)
    expected = sigmoid_loss(images, texts, 3.0, -1.0)
    assert torch.allclose(ring_sigmoid_loss(images, texts, 3.0, -1.0), expected)


def test_bytes_are_counted():
    assert local_bytes([torch.zeros(3), None, torch.zeros(2, 2, dtype=torch.bfloat16)]) == 20


def test_shares(monkeypatch):
    for name, value in (("process_count", 3), ("process_number", 1)):
        monkeypatch.setattr(team, name, lambda value=value: value)
    assert team.own_share(list(range(6))) == [2, 3]
    with pytest.raises(ValueError, match="batch_size is 4, which 3 processes cannot share evenly"):
        team.own_share([1, 2, 3, 4])


# ---------------------------------------------------------------- shards on the disk


@pytest.fixture
def stopped(tmp_path, processor):
    """A folder in which a run has made two steps."""
    train(load_model(TINY), DATA, small(steps=2, folder=tmp_path), processor)
    return tmp_path


def test_a_save_that_fails_leaves_the_old_one(stopped, processor, alone, monkeypatch):
    """Between the shards and the switch: a full disk, and a process that dies."""
    for failure in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        with monkeypatch.context() as patch:
            patch.setattr(shards, "replacing", lambda _, failure=failure: _raise(failure))
            with pytest.raises((SaveError, KeyboardInterrupt)) as caught:
                train(load_model(TINY), DATA, small(steps=3, folder=stopped), processor)
        if isinstance(failure, OSError):
            assert "step-3 (No space left on device)" in str(caught.value)
            assert not (stopped / "step-3").exists()
    assert (stopped / "step-3").exists()  # nobody cleaned up, as after kill -9
    assert train(load_model(TINY), DATA, small(folder=stopped), processor) == alone
    assert sorted(file.name for file in stopped.iterdir()) == ["run.json", "step-4"]


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run | {"shards": "../step-2"}, r"is broken \(its shards are '../step-2'\)"),
        (lambda run: run | {"shards": "/tmp"}, "is broken"),
        (lambda run: run | {"shards": 3}, "is broken"),
        (lambda run: run | {"losses": ["x"]}, r"run.json is broken .*; remove it to start anew"),
        (lambda run: {"losses": []}, "is broken"),
        (lambda run: [run], "is broken"),
        (lambda run: run | {"shards": "step-9"}, "step-9 is broken or of another model"),
        (lambda run: run | {"config": {}}, "was made with batch_size None, now it is 4"),
    ],
)
def test_a_run_file_that_does_not_fit(stopped, processor, change, message):
    file = stopped / "run.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=message) as caught:
        train(load_model(TINY), DATA, small(folder=stopped), processor)
    assert "\n" not in str(caught.value)


def test_shards_that_do_not_fit(stopped, processor):
    frozen = load_model(TINY)
    add_lora(frozen, rank=2, targets=["q_proj"])
    with pytest.raises(ValueError, match="step-2 is broken or of another model"):
        train(frozen, DATA, small(folder=stopped), processor)
    (file,) = (stopped / "step-2").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"step-2 is broken .*remove run.json") as caught:
        train(load_model(TINY), DATA, small(folder=stopped), processor)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_folder_of_one_process_is_not_taken_for_a_new_run(tmp_path, processor):
    training.train(load_model(TINY), DATA, small(steps=1, folder=tmp_path), processor)
    with pytest.raises(ValueError, match=r"holds checkpoint\.pt, of a run without shards"):
        train(load_model(TINY), DATA, small(folder=tmp_path), processor)


def fails():
    raise ValueError("what happened")


def test_a_worker_that_fails_is_said():
    with pytest.raises(RuntimeError, match=r"fails failed under torchrun[\s\S]*what happened\n"):
        torchrun(fails, 1)


# ---------------------------------------------------------------- the command


def test_the_command_under_torchrun(tmp_path):
    """Two processes make two steps; one goes on; alone from the start the losses are the same."""
    mine = tmp_path / "mine"
    mine.mkdir()
    lines = []
    for i in range(12):
        Image.fromarray(DATA[i]["image"]).save(mine / f"{i}.png")
        texts = {key: DATA[i][key] for key in ("prefix", "suffix")}
        lines.append(json.dumps({"image": f"{i}.png", **texts}))
    (mine / "mine.jsonl").write_text("\n".join(lines))
    options = ["--data", str(mine), "--lora", "4", "--batch_size", "4", "--warmup_steps", "4"]
    options += ["--learning_rate", "1e-3", "--answers", "2", "--device", "cpu", "--workers", "0"]

    def command(output, steps, *before):
        words = [sys.executable, *before, "-m", "paligemma.support.train_command", *options]
        words += ["--output", str(tmp_path / output), "--steps", str(steps)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    team = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    said = command("team", 2, *team)
    assert said.count("held out: loss") == 2 and said.count("holds the adapter") == 1
    command("team", 4), command("alone", 4)
    losses = [json.loads((tmp_path / name / "training.json").read_text())["losses"]
              for name in ("team", "alone")]  # fmt: skip
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], abs=1e-5)
