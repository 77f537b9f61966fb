"""Training: batches, the loss, the schedule, runs that go on bit for bit, evaluation."""

import importlib.util
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from paligemma import scenes, training
from paligemma.image_processor import ImageProcessor
from paligemma.processor import Processor
from paligemma.segmentation import parse_segments
from paligemma.tokenizer import Tokenizer
from paligemma.training import (
    Batches,
    Trainer,
    TrainingConfig,
    answer_loss,
    box_figures,
    evaluate,
    learning_rate,
    main,
    make_optimizers,
    objects_at,
    orthogonal,
    patch_boxes,
    soft_locations,
    train,
    training_loss,
)

TINY = scenes.ASSETS / "tiny"


def small(**changes) -> TrainingConfig:
    """A config whose steps take a few hundredths of a second."""
    sizes = {"vision_width": 16, "vision_layers": 1, "text_width": 16, "text_layers": 1}
    run = {"text_mlp": 16, "batch": 4, "questions": 1, "processes": 1, "meet_every": 2}
    stages = {"look_steps": 2, "total_steps": 6, "warm_steps": 2, "cool_steps": 2}
    return TrainingConfig(**(sizes | run | stages | {"curriculum": ((0, (1, 2)),)} | changes))


@pytest.fixture(scope="module")
def batches():
    tokenizer = Tokenizer.from_pretrained(TINY)
    return Batches(Processor(tokenizer, ImageProcessor(scenes.SIZE), 64), small())


def weights(run):
    return {k: v.clone() for k, v in run.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_batch_depends_on_its_number_only(batches):
    first = batches.train(3, (1, 2), False)
    batches.train(8, (1,), False)
    again = batches.train(3, (1, 2), False)
    other = batches.train(4, (1, 2), False)
    assert torch.equal(first["pixels"], again["pixels"])
    assert not torch.equal(first["pixels"], other["pixels"])
    for a, b in zip(first["groups"], again["groups"], strict=True):
        assert (a["keep"], a["name"]) == (b["keep"], b["name"])
        assert all(torch.equal(a[k], b[k]) for k in a if k not in ("keep", "name"))


def test_parts_cover_a_batch(batches):
    whole = batches.train(5, (1, 2), False)
    parts = [batches.train(5, (1, 2), False, (i, 2)) for i in range(2)]
    for key in ("pixels", "targets", "boxes"):
        assert torch.equal(torch.stack([p[key] for p in parts], 1).flatten(0, 1), whole[key])
    for group in range(2):
        rows = [p["groups"][group]["picture"] * 2 + i for i, p in enumerate(parts)]
        assert sorted(torch.cat(rows).tolist()) == whole["groups"][group]["picture"].tolist()


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """Batches in which half of the pictures are asked for masks."""
    config = TrainingConfig(batch=16, segments=0.5)
    return Batches(Processor.from_pretrained(TINY), config)


def test_a_share_of_the_pictures_is_asked_for_masks(masked):
    groups = {g["name"]: g for g in masked.train(2, (1, 2), False)["groups"]}
    pictures = [groups[name]["picture"].tolist() for name in ("detect", "segment")]
    assert sorted(pictures[0] + pictures[1]) == list(range(16)) and min(map(len, pictures)) >= 3
    labels, first = groups["segment"]["labels"], masked.first_location
    codes = ((labels >= first + 1024) & (labels < first + 1152)).sum(1)
    boxes = ((labels >= first) & (labels < first + 1024)).sum(1)
    assert (codes == 4 * boxes).all() and (boxes >= 4).all()


def test_mask_words_say_what_is_seen(masked):
    made = [scenes.make_scene(i, "test") for i in range(12)]
    overlaps = []
    for scene, words in zip(made, training.mask_words(made, masked.codec), strict=True):
        text = " ; ".join(f"{w} {scenes.NAMES[k]}" for w, k in zip(words, scene.kinds))
        found = parse_segments(text, scenes.SIZE, scenes.SIZE, masked.codec)
        assert [f.label for f in found] == [scenes.NAMES[k] for k in scene.kinds]
        overlaps += [(f.mask & m).sum() / (f.mask | m).sum() for f, m in zip(found, scene.masks)]
    assert np.mean(overlaps) > 0.85


def test_mask_figures_count_what_was_not_found(masked):
    made = [scenes.make_scene(i, "test", objects=(2, 3)) for i in range(6)]
    prompts, right, nothing, other = [], [], [], []
    for scene, words in zip(made, training.mask_words(made, masked.codec)):
        asked = list(dict.fromkeys(scene.kinds))
        prompts.append("segment " + " ; ".join(scenes.NAMES[k] for k in asked))
        right.append(" ; ".join(f"{w} {scenes.NAMES[k]}" for w, k in zip(words, scene.kinds)))
        nothing.append("")
        other.append(right[-1].replace(scenes.NAMES[asked[0]], "nobody"))
    figures = [
        training.mask_figures(said, prompts, made, masked.codec)["iou"]
        for said in (right, other, nothing)
    ]
    assert figures[0] > 85 and 0 < figures[1] < figures[0] and figures[2] == 0


def test_looking_needs_no_texts(batches):
    assert batches.train(0, (1,), look=True)["groups"] == []


def test_only_the_answer_is_learnt(batches):
    group = batches.train(0, (1, 2), False)["groups"][0]
    assert torch.equal(group["labels"] != -100, group["token_type_ids"] == 1)
    assert int((group["labels"] != -100).sum(1).max()) + 1 == group["keep"]


def test_patch_boxes_point_to_the_edges():
    for index in range(20):
        scene = scenes.make_scene(index, "train", objects=(1,))
        found, covered = patch_boxes(scene), scenes.patch_targets(scene)[0] < len(scenes.NAMES)
        assert (found[~covered] == 0).all()
        centre = np.stack(np.meshgrid(np.arange(8), np.arange(8)), -1).reshape(-1, 2) * 14 + 7
        edges = found * 14 + np.tile(centre, 2)
        assert np.allclose(edges[covered], scene.boxes[0], atol=1e-4)


def test_soft_locations():
    soft = soft_locations(6.0)
    assert soft.shape == (1024, 1024)
    assert torch.allclose(soft.sum(1), torch.ones(1024))
    assert torch.equal(soft.argmax(1), torch.arange(1024))
    assert soft[500, 506] / soft[500, 500] == pytest.approx(np.exp(-0.5), rel=1e-4)
    assert soft[500, 507] < soft[500, 506] == soft[500, 494]


def test_answer_loss_without_locations_is_cross_entropy():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 7, 1064), torch.randint(0, 40, (3, 7))
    labels[:, :3] = -100
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    got = answer_loss(logits, labels, first_location=40, soft=soft_locations(6.0))
    assert got.item() == pytest.approx(expected.item(), abs=1e-6)
    nothing = answer_loss(logits, torch.full_like(labels, -100), 40, soft_locations(6.0))
    assert nothing.item() == 0


def test_a_near_miss_costs_less_than_a_far_one():
    labels = torch.tensor([[-100, 10 + 500]])
    soft = soft_locations(6.0)

    def cost(place):
        logits = torch.zeros(1, 2, 10 + 1024)
        logits[0, 0, 10 + place] = 8.0
        return answer_loss(logits, labels, 10, soft).item()

    assert cost(500) < cost(503) < cost(510) < cost(600) == pytest.approx(cost(900), abs=1e-4)


def test_products_in_bfloat16_are_near():
    """Output and gradients of a layer with rounded factors: other numbers, but close ones."""
    torch.manual_seed(0)
    x = torch.randn(50, 64, requires_grad=True)
    layer, rounded = torch.nn.Linear(64, 32), torch.nn.Linear(64, 32)
    rounded.load_state_dict(layer.state_dict())
    training.use_bfloat16_products(rounded)
    results = []
    for it in (layer, rounded):
        y = it(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, it.weight, it.bias])))
    for exact, near in zip(*results):
        assert near.dtype == torch.float32 and not torch.equal(exact, near)
        assert (near - exact).norm() < 0.01 * exact.norm()


def test_read_locations_are_moved_and_labels_are_true(batches):
    """What the model reads is near the label; nothing but locations moves."""
    group = next(g for g in batches.train(4, (2, 3), False)["groups"] if g["name"] == "detect")
    learnt = group["labels"] != -100
    read, true = group["input_ids"][learnt], group["labels"][learnt]
    first = batches.first_location
    located = (true >= first) & (true < first + 1024)
    assert torch.equal(read[~located], true[~located])
    off = (read - true)[located].float()
    assert 2 < off.std() < 10 and off.abs().max() < 60 and (off != 0).float().mean() > 0.7


def test_schedule():
    config = TrainingConfig(
        lr=1.0,
        look_steps=100,
        warm_steps=10,
        cool_steps=50,
        total_steps=300,
        curriculum=((0, (1,)),),
    )
    rates = [learning_rate(step, config) for step in range(300)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[99] == 1.0
    assert rates[100] == pytest.approx(0.1) and rates[109] == 1.0  # speaking warms up again
    assert rates[250] == 1.0 and rates[275] == pytest.approx(0.5)
    assert 0 < rates[299] < 0.01
    assert rates[250:] == sorted(rates[250:], reverse=True)


def test_curriculum():
    config = TrainingConfig(look_steps=10, curriculum=((0, (1,)), (5, (1, 2)), (9, (3, 4))))
    seen = [objects_at(step, config) for step in (0, 9, 10, 14, 15, 18, 19, 500)]
    assert seen == [(3, 4), (3, 4), (1,), (1,), (1, 2), (1, 2), (3, 4), (3, 4)]


@pytest.mark.parametrize("shape", [(2, 8, 24), (2, 24, 8), (1, 16, 16)])
def test_orthogonal(shape):
    torch.manual_seed(1)
    g = torch.randn(shape)
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    values = torch.linalg.svdvals(orthogonal(g))
    assert values.max() < 1.3 and values.median() > 0.6
    cosine = F.cosine_similarity(orthogonal(g).flatten(1), (u @ vh).flatten(1))
    assert cosine.min() > 0.9
    assert torch.allclose(orthogonal(g.mT), orthogonal(g).mT, atol=1e-4)


def test_every_weight_has_one_optimizer_and_vectors_no_decay():
    config = small()
    model = training.make_model(config, image_id=2000)
    head = training.PatchHead(config.vision_width)
    groups = [g for o in make_optimizers(model, head, 0.1) for g in o.param_groups]
    found = [id(p) for g in groups for p in g["params"]]
    assert sorted(found) == sorted(id(p) for p in [*model.parameters(), *head.parameters()])
    assert all((p.ndim > 1) == (g["weight_decay"] > 0) for g in groups for p in g["params"])


def test_resume_is_bit_for_bit(tmp_path):
    config = small()
    whole = Trainer(config, tmp_path / "whole")
    at_once = [whole.take_step() for _ in range(6)]
    (tmp_path / "half").mkdir()
    first = Trainer(config, tmp_path / "half")
    losses = [first.take_step() for _ in range(3)]
    first.save()
    second = Trainer(config, tmp_path / "half")
    assert second.step == 3
    losses += [second.take_step() for _ in range(3)]
    assert losses == at_once
    assert same(weights(whole), weights(second))


def test_ctrl_c_leaves_a_checkpoint_that_goes_on(tmp_path, monkeypatch):
    config = small()
    whole = train(config, tmp_path / "whole", quiet=True)
    step = Trainer.take_step

    def interrupted(self):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Trainer, "take_step", interrupted)
    stopped = train(config, tmp_path / "run", quiet=True)
    monkeypatch.setattr(Trainer, "take_step", step)
    assert signal.getsignal(signal.SIGINT) is before
    assert stopped.step == 4, "it stops where processes meet"
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    gone_on = train(config, tmp_path / "run", quiet=True)
    assert gone_on.step == whole.step == 6
    assert same(weights(gone_on), weights(whole)) and same(gone_on.mean, whole.mean)
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_curves_have_losses_and_time(tmp_path):
    run = train(small(), tmp_path, quiet=True)
    points = json.loads((tmp_path / "curves.json").read_text())
    assert points == run.curves and points[-1]["step"] == 6
    assert {"patch loss", "patch right", "short loss", "detect loss", "seconds"} <= set(points[-1])


def test_accumulating_is_like_the_larger_batch(tmp_path):
    """Exactly so for the pictures' order and number; nearly so for the gradient (see lesson)."""
    gradients = {}
    for parts in (1, 2):
        run = Trainer(small(batch=16, accumulate=parts, look_steps=0), tmp_path)
        for i in range(parts):
            batch = run.batches.train(0, (1,), False, (i, parts))
            loss, _ = training_loss(run.model, run.head, batch, run.soft)
            (loss / parts).backward()
        gradients[parts] = torch.cat([p.grad.flatten() for p in run.parameters])
    assert F.cosine_similarity(gradients[1], gradients[2], dim=0) > 0.97
    assert gradients[2].norm() / gradients[1].norm() == pytest.approx(1, abs=0.1)


def test_accumulate_takes_every_part_once(tmp_path):
    run = Trainer(small(accumulate=2), tmp_path)
    asked, make = [], run.batches.train
    run.batches.train = lambda *given: asked.append(given) or make(*given)
    run.take_step()
    assert [(step, part) for step, _, _, part in asked] == [(0, (0, 2)), (0, (1, 2))]
    assert run.step == 1


def test_exported_run_loads(tmp_path):
    config = small()
    run = train(config, tmp_path / "run", quiet=True)
    from dataclasses import asdict

    (tmp_path / "run" / "config.json").write_text(json.dumps(asdict(config)))
    assert main(["--work", str(tmp_path / "run"), "--export", str(tmp_path / "out")]) == 0
    model = training.load_model(tmp_path / "out")
    name = "vision_tower.embeddings.patch_embedding.weight"
    expected = run.mean[name].to(torch.bfloat16).float()
    assert torch.equal(model.state_dict()[name].float(), expected)
    assert "tokenizer" not in json.loads((tmp_path / "out" / "curves.json").read_text())["recipe"]
    assert Processor.from_pretrained(tmp_path / "out").num_image_tokens == 64


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"totl_steps": 3}', "totl_steps"),
        ('{"batch": "big"}', "batch"),
        ('{"batch": 2.5}', "batch"),
        ("[1]", "list"),
        ("{", "Expecting"),
    ],
)
def test_bad_config_is_one_line_and_exit_2(tmp_path, capsys, text, named):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=named):
        TrainingConfig.read(file)
    assert main(["--work", str(tmp_path / "run"), "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error


def test_config_reads_what_a_run_writes(tmp_path):
    from dataclasses import asdict

    file = tmp_path / "config.json"
    file.write_text(json.dumps(asdict(small(lr=1))))
    config = TrainingConfig.read(file)
    assert asdict(config) == json.loads(file.read_text()) and objects_at(3, config) == (1, 2)


def test_box_figures():
    true = "<loc0100><loc0100><loc0500><loc0500> cat ; <loc0600><loc0600><loc0900><loc0900> cat"
    near = "<loc0110><loc0100><loc0510><loc0500> cat"
    assert box_figures([true], [true])["f1"] == pytest.approx(100)
    assert box_figures([true], [true])["iou"] == pytest.approx(100)
    assert box_figures([near], [true])["f1"] == pytest.approx(200 / 3)
    assert box_figures([near], [true])["iou"] == pytest.approx(100 * 390 / 410, abs=0.1)
    assert box_figures([near + " ; " + near], [near]) == pytest.approx({"f1": 200 / 3, "iou": 100})
    assert box_figures([near.replace("cat", "dog")], [true]) == {"f1": 0.0, "iou": 0.0}
    assert box_figures(["", "nonsense <loc0001>"], [true, true]) == {"f1": 0.0, "iou": 0.0}


def test_evaluate_runs_with_its_control():
    seen = []
    rows = ("caption en", "where", "detect")
    torch.manual_seed(0)
    result = evaluate(TINY, 6, rows, progress=lambda row, figures: seen.append(row))
    assert tuple(result) == tuple(seen) == rows
    assert set(result["caption en"]) == {"scenes", "exact", "shuffled"}
    assert set(result["detect"]) == {"scenes", "f1", "iou", "shuffled"}
    assert all(0 <= v <= 100 for f in result.values() for v in f.values())


def test_shuffled_control_asks_about_the_next_picture(monkeypatch):
    """A model that reads the truth off the picture is right, and wrong on others' pictures."""
    made, _, truths = training.row_questions("caption en", 8)
    by_picture = {scene.image.tobytes(): truth for scene, truth in zip(made, truths)}
    monkeypatch.setattr(
        training, "answers", lambda m, p, shown, prompts: [by_picture[i.tobytes()] for i in shown]
    )
    figures = evaluate(TINY, 8, ("caption en",))["caption en"]
    chance = np.mean([a == b for a, b in zip(truths, truths[1:] + truths[:1])])
    assert figures["exact"] == 100 and figures["shuffled"] == pytest.approx(100 * chance)


# ---------------------------------------------------------------- tools/compare_training.py


def test_arms_of_equal_processor_time(tmp_path, monkeypatch):
    file = Path(__file__).parent.parent / "tools" / "compare_training.py"
    spec = importlib.util.spec_from_file_location("compare", file)
    compare = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compare", compare)  # its dataclass looks itself up
    spec.loader.exec_module(compare)
    widths = {"vision_width": 16, "text_width": 16, "vision_layers": 1, "text_layers": 1}
    monkeypatch.setattr(compare, "BASE", replace(compare.BASE, batch=2, text_mlp=16, **widths))
    monkeypatch.setattr(compare, "PAIRS", 8)
    monkeypatch.setattr(compare, "validate", lambda *_: {"caption": 0.0})
    monkeypatch.setattr(compare, "RESULT", tmp_path / "comparison.json")
    names = ("looks first", "contrastive first", "speaks at once")
    monkeypatch.setattr(compare, "ARMS", {name: compare.ARMS[name] for name in names})
    runs, threads = {}, torch.get_num_threads()
    scenes.make_scene(0)  # the sprites, made once, are not what is measured
    try:
        for name in names:
            compare.train_arm(name, tmp_path, minutes=0.02, looks=5)
            runs[name] = Trainer(compare.BASE, tmp_path / name.replace(" ", "_"))
            compare.train_arm(name, tmp_path, minutes=0.02, looks=5)  # its time is used up
    finally:
        torch.set_num_threads(threads)
    compare.write(tmp_path)
    found = json.loads((tmp_path / "comparison.json").read_text())
    fresh = Trainer(compare.BASE, tmp_path / "fresh")
    for name, run in runs.items():
        assert found[name]["points"][-1]["step"] == run.step > 2
        assert 0.02 <= run.seconds / 60 < 0.04
        learnt = not torch.equal(run.head.linear.bias, fresh.head.linear.bias)
        assert learnt == (name == "looks first")  # nobody else has lessons for patches
    looked = TrainingConfig.read(tmp_path / "looks_first" / "config.json").look_steps
    assert 0 < looked < runs["looks first"].step
    # A start takes a fifth of the time; before it nothing is shown.
    assert min(p["minutes"] for p in found["contrastive first"]["points"]) > 0.006
