"""The tiny model's own recipe: its data, its loss, runs that go on bit for bit, its export."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tiny_batches
import torch
import torch.nn.functional as F
import train_tiny
from tiny_batches import NOTHING, TINY, Batches, Recipe, disturb, patch_targets
from train_tiny import Run, answer_loss, main, soft_locations, text_logits, train

from paligemma import scenes
from paligemma.checkpoint import load_model
from paligemma.processor import Processor
from paligemma.segmentation import parse_segments

ROOT = Path(__file__).resolve().parent.parent


def small(**changes) -> Recipe:
    """A recipe whose steps take a few hundredths of a second."""
    sizes = {"vision_width": 16, "vision_layers": 1, "text_width": 16, "text_layers": 1}
    run = {"text_mlp": 16, "batch": 4, "questions": 1, "processes": 1, "meet_every": 2}
    stages = {"look_steps": 2, "total_steps": 6, "warm_steps": 2, "cool_steps": 2}
    return Recipe(**(sizes | run | stages | {"curriculum": ((0, (1, 2)),)} | changes))


@pytest.fixture(scope="module")
def batches():
    return Batches(Processor.from_pretrained(TINY), small(batch=8, segments=0.4))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------- the data


def test_a_batch_depends_on_its_number_only(batches):
    first = batches.train(3, (1, 2), False)
    batches.train(8, (1,), False)
    again, other = batches.train(3, (1, 2), False), batches.train(4, (1, 2), False)
    assert torch.equal(first["pixels"], again["pixels"])
    assert not torch.equal(first["pixels"], other["pixels"])
    for a, b in zip(first["groups"], again["groups"], strict=True):
        assert (a["keep"], a["name"]) == (b["keep"], b["name"])
        assert all(torch.equal(a[k], b[k]) for k in a if k not in ("keep", "name"))
    assert batches.train(0, (1,), look=True)["groups"] == []


def test_parts_cover_a_batch(batches):
    whole = batches.train(5, (1, 2), False)
    parts = [batches.train(5, (1, 2), False, (i, 2)) for i in range(2)]
    for key in ("pixels", "kinds", "boxes"):
        assert torch.equal(torch.stack([p[key] for p in parts], 1).flatten(0, 1), whole[key])


def test_only_the_answer_is_learnt_and_some_are_masks(batches):
    groups = {g["name"]: g for g in batches.train(2, (1, 2), False)["groups"]}
    assert set(groups) == {"short", "detect", "segment"}
    for group in groups.values():
        assert torch.equal(group["labels"] != -100, group["token_type_ids"] == 1)
        assert int((group["labels"] != -100).sum(1).max()) + 1 == group["keep"]
    pictures = [groups[name]["picture"].tolist() for name in ("detect", "segment")]
    assert sorted(pictures[0] + pictures[1]) == list(range(8))


def test_masks_in_the_answers_are_those_of_the_scene(batches):
    overlaps, size = [], scenes.SIZE
    for i in range(12):
        scene = scenes.make_scene(i, "test")
        words = tiny_batches.encode_segments(scene.boxes, scene.masks, batches.codec, size, size)
        _, answer = scenes.task(np.random.default_rng(0), scene, "segment", words=words)
        for found in parse_segments(answer, size, size, batches.codec):
            same_kind = [m for m, k in zip(scene.masks, scene.kinds)
                         if scenes.NAMES[k] == found.label]  # fmt: skip
            overlaps.append(max((found.mask & m).sum() / (found.mask | m).sum() for m in same_kind))
    assert np.mean(overlaps) > 0.85


def test_what_is_read_is_moved_and_labels_are_true(batches):
    group = next(g for g in batches.train(4, (2, 3), False)["groups"] if g["name"] == "detect")
    learnt, first = group["labels"] != -100, batches.first_location
    read, true = group["input_ids"][learnt], group["labels"][learnt]
    located = (true >= first) & (true < first + 1024)
    assert torch.equal(read[~located], true[~located])
    off = (read - true)[located].float()
    assert 2 < off.std() < 10 and off.abs().max() < 60 and (off != 0).float().mean() > 0.7


def test_patch_targets_agree_with_the_boxes():
    centre = np.stack(np.meshgrid(np.arange(8), np.arange(8)), -1).reshape(-1, 2) * 14 + 7
    for index in range(20):
        scene = scenes.make_scene(index, "train", objects=(1,))
        (cover, middle), found = patch_targets(scene)
        x0, y0, x1, y1 = scene.boxes[0]
        inside = ((centre >= (x0, y0)) & (centre < (x1, y1))).all(1)
        assert (cover == np.where(inside, scene.kinds[0], NOTHING)).all()
        assert np.allclose((found * 14 + np.tile(centre, 2))[inside], scene.boxes[0], atol=1e-4)
        assert (found[~inside] == 0).all() and (middle < NOTHING).sum() == 1


def test_disturbed_pictures_still_show_the_scene():
    scene = scenes.make_scene(3)
    none = disturb(scene.image, np.random.default_rng(0), small(arrived=0.0, lit=0.0))
    assert np.array_equal(none, scene.image)
    for seed in range(20):
        found = disturb(scene.image, np.random.default_rng(seed), small(arrived=1.0, lit=0.0))
        assert found.shape == scene.image.shape and found.dtype == np.uint8
        assert 0 < np.abs(found.astype(int) - scene.image).mean() < 12


# ---------------------------------------------------------------- the loss


def test_soft_locations_and_a_near_miss():
    soft = soft_locations(6.0)
    assert torch.allclose(soft.sum(1), torch.ones(1024))
    assert torch.equal(soft.argmax(1), torch.arange(1024))
    assert soft[500, 506] / soft[500, 500] == pytest.approx(np.exp(-0.5), rel=1e-4)

    def cost(place):
        logits = torch.zeros(1, 2, 10 + 1024)
        logits[0, 0, 10 + place] = 8.0
        return answer_loss(logits, torch.tensor([[-100, 510]]), 10, soft).item()

    assert cost(500) < cost(503) < cost(510) < cost(600) == pytest.approx(cost(900), abs=1e-4)


def test_the_loss_is_cross_entropy_with_soft_targets():
    torch.manual_seed(0)
    V, first, soft = 1100, 50, soft_locations(6.0)
    logits, labels = torch.randn(3, 9, V), torch.randint(0, V, (3, 9))
    labels[torch.rand(3, 9) < 0.4] = -100
    kept = labels[:, 1:].flatten() != -100
    truth = labels[:, 1:].flatten()[kept]
    targets = F.one_hot(truth, V).float()
    located = (truth >= first) & (truth < first + 1024)
    targets[located] = F.pad(soft[truth[located] - first], (first, V - first - 1024))
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1)[kept], targets)
    assert answer_loss(logits, labels, first, soft).item() == pytest.approx(expected.item(), 1e-5)
    assert answer_loss(logits, torch.full_like(labels, -100), first, soft).item() == 0


def test_shared_features_and_few_logits_change_nothing(batches):
    """Texts about one picture share its features; the model's plain pass says the same."""
    model = load_model(TINY)
    batch = batches.train(1, (1, 2), False)
    features = model.encode_image(batch["pixels"])
    for group in batch["groups"]:
        keys = ("input_ids", "attention_mask", "token_type_ids")
        plain = model(pixel_values=batch["pixels"][group["picture"]],
                      **{k: group[k] for k in keys}).logits[:, -group["keep"] :]  # fmt: skip
        assert (text_logits(model, features, group) - plain).abs().max() < 1e-4


def test_products_in_bfloat16_are_near():
    torch.manual_seed(0)
    x = torch.randn(50, 64, requires_grad=True)
    layer, rounded = torch.nn.Linear(64, 32), torch.nn.Linear(64, 32)
    rounded.load_state_dict(layer.state_dict())
    train_tiny.use_bfloat16_products(rounded)
    results = []
    for it in (layer, rounded):
        y = it(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, it.weight, it.bias])))
    for exact, near in zip(*results):
        assert near.dtype == torch.float32 and not torch.equal(exact, near)
        assert (near - exact).norm() < 0.01 * exact.norm()


# ---------------------------------------------------------------- the run


def test_schedule_and_curriculum(tmp_path):
    recipe = small(lr=1.0, look_steps=100, warm_steps=10, cool_steps=50, total_steps=300,
                   curriculum=((0, (1,)), (5, (1, 2)), (9, (3, 4))))  # fmt: skip
    run = Run(recipe, tmp_path)
    rates, objects = [], []
    for run.step in range(300):
        rates.append(run.learning_rate())
        objects.append(run.objects())
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[99] == 1.0
    assert rates[100] == pytest.approx(0.1) and rates[109] == 1.0  # speaking warms up again
    assert rates[250] == 1.0 and rates[275] == pytest.approx(0.5) and 0 < rates[299] < 0.01
    wanted = {0: (3, 4), 99: (3, 4), 100: (1,), 104: (1,), 105: (1, 2), 108: (1, 2), 109: (3, 4)}
    assert {step: objects[step] for step in wanted} == wanted


def test_every_weight_has_one_optimizer_and_vectors_no_decay(tmp_path):
    run = Run(small(), tmp_path)
    groups = [g for o in run.optimizers for g in o.param_groups]
    found = [id(p) for g in groups for p in g["params"]]
    assert sorted(found) == sorted(map(id, run.parameters))
    assert all((p.ndim > 1) == (g["weight_decay"] > 0) for g in groups for p in g["params"])


def test_a_run_in_two_halves_equals_a_whole_one(tmp_path, monkeypatch):
    """Stopped by Ctrl-C where processes would meet; then gone on with."""
    whole = Run(small(segments=0.4), tmp_path / "whole")
    train(whole)
    step = Run.take_step

    def interrupted(self):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Run, "take_step", interrupted)
    stopped = Run(small(segments=0.4), tmp_path / "run")
    train(stopped)
    monkeypatch.setattr(Run, "take_step", step)
    assert stopped.step == 4 and signal.getsignal(signal.SIGINT) is before
    gone_on = Run(small(segments=0.4), tmp_path / "run")
    assert gone_on.step == 4
    train(gone_on)
    for part in ("model", "head", "ema"):
        assert same(getattr(gone_on, part).state_dict(), getattr(whole, part).state_dict())
    curves = [json.loads((tmp_path / run / "curves.json").read_text()) for run in ("whole", "run")]
    points = [[point | {"seconds": 0} for point in curve] for curve in curves]
    assert points[0] == points[1], "means over the steps before and after the interruption"
    points = curves[1]
    assert points[-1]["step"] == 6 and {"patch loss", "short loss", "seconds"} <= set(points[-1])
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"checkpoint.pt", "curves.json"}


def test_train_export_and_start_from_it_by_command(tmp_path):
    recipe, work, out = tmp_path / "recipe.json", tmp_path / "run", tmp_path / "out"
    recipe.write_text(json.dumps(asdict(small())))
    threads = torch.get_num_threads()
    try:
        assert main(["--config", str(recipe), "--work", str(work)]) == 0
        assert main(["--work", str(work), "--export", str(out)]) == 0
        run = Run(small(), work)
        model = load_model(out)
        expected = run.ema.module.to(torch.bfloat16).state_dict()
        assert all(torch.equal(v, expected[k].float()) for k, v in model.state_dict().items())
        assert Processor.from_pretrained(out).num_image_tokens == 64
        assert Recipe.read(out / "recipe.json") == small()
        record = json.loads((out / "curves.json").read_text())
        assert record["points"][-1]["step"] == 6 and record["recipe"]["batch"] == 4
        fresh = Run(small(seed=5), tmp_path / "other")
        fresh.start_from(out, steps=2)
        assert same(fresh.model.state_dict(), model.state_dict())
    finally:
        torch.set_num_threads(threads)


def test_two_processes_end_with_one_model(tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(asdict(small(processes=2))))
    tool = [str(ROOT / "tools" / "train_tiny.py"), "--config", str(recipe), "--work"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", "2", *tool, str(tmp_path / "two")]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert Run(small(processes=2), tmp_path / "two").step == 6


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ('{"totl_steps": 3}', "totl_steps"),
        ('{"batch": "big"}', "batch is 'big'; expected a whole number"),
        ('{"batch": 2.5}', "batch is 2.5"),
        ('{"softness": 0}', "softness is 0; expected a finite number above 0"),
        ('{"softness": NaN}', "softness is nan"),
        ('{"lr": Infinity}', "lr is inf"),
        ('{"ema": 1.5}', "ema is 1.5"),
        ('{"vision_layers": -1}', "vision_layers is -1"),
        ('{"warm_steps": -3}', "warm_steps is -3"),
        ('{"curriculum": [[5, [1]]]}', "curriculum must be"),
        ('{"short": ["sing"]}', "short names of caption"),
        ("[1]", "object"),
        ("{", "not JSON"),
    ],
)
def test_a_bad_recipe_is_one_line_and_exit_2(tmp_path, capsys, values, named):
    file = tmp_path / "recipe.json"
    file.write_text(values)
    assert main(["--work", str(tmp_path / "run"), "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("words", [[], ["--work"], ["--work", "x", "--speed", "9"]])
def test_a_bad_option_is_one_line_and_exit_2(capsys, words):
    with pytest.raises(SystemExit) as stop:
        main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and ": error: " in error


def test_the_shipped_recipe_can_be_read():
    recipe = Recipe.read(TINY / "recipe.json")
    assert recipe.curriculum[0][0] == 0 and recipe.total_steps > recipe.look_steps
