"""The shipped tiny model, and the scenes and the script that made it."""

import argparse
import hashlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import scenes  # noqa: E402
import train_tiny  # noqa: E402

from paligemma.checkpoint import load_model  # noqa: E402
from paligemma.processor import Processor  # noqa: E402

TINY = ROOT / "paligemma" / "assets" / "tiny"
PICTURES = ROOT / "paligemma" / "assets" / "pictures"


@pytest.fixture(scope="module")
def tiny():
    """(model, processor) of the shipped directory."""
    return load_model(TINY), Processor.from_pretrained(TINY)


# ---------------------------------------------------------------- the model


def test_ships_small_and_complete():
    files = {file.name for file in TINY.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.model"} <= files
    assert {"preprocessor_config.json", "README.md", "curves.json", "figures.json"} <= files
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 12_000_000
    assert load_model(TINY, dtype=None).dtype == torch.bfloat16


def test_captions_held_out_scenes_and_looks_at_the_picture(tiny):
    made = train_tiny.collect(lambda s: len(set(s.kinds)) <= 2, 60)
    result = train_tiny.score(*tiny, made, [train_tiny.caption_task(s) for s in made])
    assert result["exact"] >= 50, f"only {result['exact']:.0f} % of 60 captions are right"
    assert result["shuffled"] <= 10, f"{result['shuffled']:.0f} % right without the picture"


@pytest.mark.parametrize("name", scenes.DEMOS)
def test_captions_the_demo_scenes(tiny, name):
    model, processor = tiny
    said = train_tiny.answers(model, processor, [PICTURES / f"{name}.png"], ["caption en"])
    kinds = [scenes.NAMES.index(kind) for kind in scenes.DEMOS[name][0]]
    assert said == [scenes.caption_of(kinds)]


def test_card_shows_the_measured_figures():
    card, figures = (
        (TINY / "README.md").read_text(),
        json.loads((TINY / "figures.json").read_text()),
    )
    for task, f in figures.items():
        assert f"| {task} | {f['scenes']:,} | {f['exact']:.1f} % | {f['shuffled']:.1f} % |" in card
        assert f["scenes"] >= 1000
    for kinds in ("one kind", "two kinds (2"):  # the promise: right more often than not
        exact = [f["exact"] for task, f in figures.items() if f"caption, {kinds}" in task]
        assert len(exact) == 1 and exact[0] > 50


def test_tokenizer_has_the_published_layout(tiny):
    _, processor = tiny
    sp, image_id = processor.tokenizer.sp, processor.tokenizer.image_id
    assert [sp.pad_id(), sp.eos_id(), sp.bos_id(), sp.unk_id()] == [0, 1, 2, 3]
    assert sp.encode("\n") == [sp.piece_to_id("\n")]
    assert sp.encode("a\nb")[1] == sp.piece_to_id("\n"), "the newline is a piece of its own"
    first = sp.piece_to_id("<loc0000>")
    pieces = [f"<loc{i:04d}>" for i in range(1024)] + [f"<seg{i:03d}>" for i in range(128)]
    assert [sp.id_to_piece(first + i) for i in range(len(pieces))] == pieces
    assert first + len(pieces) == sp.get_piece_size() == image_id
    rows = load_model(TINY).language_model.embed_tokens.weight.shape[0]
    assert rows % 64 == 0 and 0 < rows - image_id <= 64
    for text in ("a cat and two dogs", "An unseen wörd, 3 🐝!", "two  spaces", " one"):
        assert sp.decode(sp.encode(text)) == text
    for kind, count in itertools.product(range(len(scenes.NAMES)), (1, 2, 3, 4)):
        assert len(sp.encode(scenes.phrase(kind, count))) == 2, "a caption is short in tokens"


# ---------------------------------------------------------------- the scenes


def digest(scene):
    return hashlib.sha256(scene.image.tobytes()).hexdigest()


def test_scenes_are_deterministic_and_splits_share_nothing():
    made = {split: [scenes.make_scene(i, split) for i in range(300)] for split in scenes.SPLITS}
    seen = {split: {digest(scene) for scene in found} for split, found in made.items()}
    assert all(len(found) == 300 for found in seen.values()), "scenes repeat within a split"
    for a, b in itertools.combinations(seen.values(), 2):
        assert not a & b, "a picture stands in two splits"
    for split, index in (("train", 17), ("test", 250)):  # in any order, with anything in between
        again = scenes.make_scene(index, split)
        assert digest(again) == digest(made[split][index])
        assert again.kinds == made[split][index].kinds
        assert digest(scenes.make_scene(index, split, seed=1)) != digest(again)


def test_held_out_pairs_never_stand_together_in_training():
    pairs = len(scenes.NAMES) * (len(scenes.NAMES) - 1) // 2
    assert len(scenes.HELD_OUT) == round(0.1 * pairs)
    rng = np.random.default_rng(5)
    for count, _ in itertools.product((2, 3, 4), range(500)):
        kinds = scenes.draw_kinds(rng, count)
        together = set(itertools.combinations(sorted(set(kinds)), 2))
        assert not together & scenes.HELD_OUT
    for i in range(50):
        assert scenes.make_scene(i, "test", unseen=True).holds_unseen_pair
    with pytest.raises(ValueError, match="test split"):
        scenes.make_scene(0, "train", unseen=True)


def look_up(crop, table):
    """The kind whose picture is most like the crop (both on black, squeezed to 12 x 12)."""
    small = np.asarray(Image.fromarray(crop).resize((12, 12), Image.Resampling.BOX), dtype=float)
    return int(np.argmin(((table - small) ** 2).sum((1, 2, 3))))


def test_kinds_and_boxes_say_what_the_picture_shows(monkeypatch):
    monkeypatch.setattr(scenes, "background", lambda rng: np.zeros((112, 112, 3), np.uint8))
    upright = [[[angles[scenes.ANGLES.index(0)]] * 5 for angles in k] for k in scenes.sprites()]
    monkeypatch.setattr(scenes, "sprites", lambda: upright)
    table = []
    for name in scenes.NAMES:  # read afresh, not through the module under test
        with Image.open(ROOT / "paligemma" / "assets" / "emoji" / f"{name}.png") as opened:
            picture = opened.convert("RGBA").convert("RGBa")
        picture = picture.crop(picture.getchannel(3).point(lambda a: 255 * (a > 24)).getbbox())
        small = picture.resize((12, 12), Image.Resampling.BOX)
        table.append(np.asarray(small, dtype=float)[..., :3])
    right = total = 0
    for i in range(60):
        scene = scenes.make_scene(i, "validation")
        outside = scene.image.astype(int).sum(2)
        for x0, y0, x1, y1 in scene.boxes:
            assert 0 <= x0 < x1 <= 112 and 0 <= y0 < y1 <= 112
            outside[y0:y1, x0:x1] = 0
        assert outside.max() == 0, "something is painted outside every box"
        centres = (scene.boxes[:, 0] + scene.boxes[:, 2]).tolist()
        assert centres == sorted(centres), "kinds and boxes go from left to right"
        for kind, (x0, y0, x1, y1) in zip(scene.kinds, scene.boxes):
            total += 1
            right += look_up(scene.image[y0:y1, x0:x1], np.stack(table)) == kind
    assert right >= 0.9 * total, f"{right} of {total} boxes show the kind they name"


@pytest.mark.parametrize(
    ("names", "caption"),
    [
        (["cat"], "a cat"),
        (["owl"], "an owl"),
        (["dog", "dog"], "two dogs"),
        (["cat", "dog", "dog"], "a cat and two dogs"),
        (["dog", "cat", "dog"], "two dogs and a cat"),
        (["strawberry"] * 4, "four strawberries"),
        (["bee", "cat", "car", "car"], "a bee, a cat and two cars"),
    ],
)
def test_captions_read_from_left_to_right(names, caption):
    assert scenes.caption_of([scenes.NAMES.index(name) for name in names]) == caption


def test_questions_have_true_answers():
    rng, seen = np.random.default_rng(2), set()
    for i in range(200):
        scene = scenes.make_scene(i, "validation")
        prompt, answer = scenes.question(rng, scene)
        names = [scenes.NAMES[kind] for kind in scene.kinds]
        plurals = [scenes.PLURALS[kind] for kind in scene.kinds]
        words = prompt.rstrip("?").split()
        if "many" in words:
            assert answer == str(plurals.count(words[4]))
        else:
            assert answer == ("yes" if words[-1] in names else "no")
        seen.add(answer)
    assert {"1", "2", "3", "yes", "no"} <= seen


def test_patch_targets_agree_with_the_boxes():
    for i in range(50):
        scene = scenes.make_scene(i, "validation")
        cover, centre = scenes.patch_targets(scene).reshape(2, 8, 8)
        assert sorted(centre[centre < len(scenes.NAMES)]) == sorted(scene.kinds)
        for kind, (x0, y0, x1, y1) in zip(scene.kinds, scene.boxes):
            assert centre[(y0 + y1) // 28, (x0 + x1) // 28] == kind
        for y, x in itertools.product(range(8), range(8)):
            over = {
                kind
                for kind, (x0, y0, x1, y1) in zip(scene.kinds, scene.boxes)
                if x0 <= 14 * x + 7 < x1 and y0 <= 14 * y + 7 < y1
            }
            assert cover[y, x] in (over or {len(scenes.NAMES)})


# ---------------------------------------------------------------- the training


def test_batches_are_what_the_processor_makes(tiny):
    _, processor = tiny
    made = [scenes.make_scene(i, "validation") for i in range(6)]
    rng = np.random.default_rng(0)
    texts = [train_tiny.caption_task(s) if i % 2 else scenes.question(rng, s)
             for i, s in enumerate(made)]  # fmt: skip
    prompts, answers = map(list, zip(*texts))
    ours = train_tiny.Batches(processor).tensors(made, prompts, answers)
    theirs = processor([scene.image for scene in made], prompts, answers)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)
    labelled = (theirs["labels"] != -100).sum(1).max()
    assert ours["logits_to_keep"] == labelled + 1, "the loss sees every labelled token"


def options(work, **changes):
    """The script's options for a run of four steps of a very small model."""
    small = {
        "work": work, "seed": 0, "batch": 4, "lr": 1e-3, "look_steps": 2, "speak_steps": 4,
        "cool_steps": 2, "warm_steps": 2, "vision_width": 32, "vision_layers": 1,
        "text_width": 32, "text_layers": 1, "text_mlp": 32, "muon": True, "processes": 1,
        "meet_every": 1, "save_every": 0.0,
    }  # fmt: skip
    return argparse.Namespace(**{**small, **changes})


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, monkeypatch, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for work in (whole, broken):
        work.mkdir()
        (work / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    monkeypatch.setattr(train_tiny, "validate", lambda *_: {})
    train_tiny.train(0, options(whole))
    make, calls = train_tiny.Batches.train, []

    def stop(self, step, *rest):
        calls.append(step)
        if step == 3:
            raise KeyboardInterrupt
        return make(self, step, *rest)

    monkeypatch.setattr(train_tiny.Batches, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        train_tiny.train(0, options(broken))
    monkeypatch.setattr(train_tiny.Batches, "train", make)
    train_tiny.train(0, options(broken))
    assert calls == [0, 1, 2, 3]
    assert "going on at step 3" in capsys.readouterr().out
    a, b = (torch.load(w / "checkpoint.pt", weights_only=True) for w in (whole, broken))
    assert a["step"] == b["step"] == 6
    for name, tensor in a["model"].items():
        assert torch.equal(tensor, b["model"][name]), name
