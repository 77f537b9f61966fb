"""The shipped tiny model: complete, true to its card, and looking at the picture."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import make_assets  # noqa: E402
import model_card  # noqa: E402

from paligemma import scenes  # noqa: E402
from paligemma.checkpoint import load_model  # noqa: E402
from paligemma.evaluation import evaluate, predict  # noqa: E402
from paligemma.inference import Pipeline, load  # noqa: E402
from paligemma.processor import Processor  # noqa: E402

TINY = ROOT / "paligemma" / "assets" / "tiny"
PICTURES = ROOT / "paligemma" / "assets" / "pictures"


@pytest.fixture(scope="module")
def tiny():
    """(model, processor) of the shipped directory."""
    return load_model(TINY), Processor.from_pretrained(TINY)


def test_ships_small_and_complete():
    files = {file.name for file in TINY.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.model", "recipe.json"} <= files
    assert {"preprocessor_config.json", "README.md", "curves.json", "figures.json"} <= files
    assert "mask_codec.safetensors" in files
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 12_000_000
    assert sum(p.numel() for p in load_model(TINY).parameters()) <= 6_000_000
    assert load_model(TINY, dtype=None).dtype == torch.bfloat16


def test_is_as_good_as_its_card_says_and_looks_at_the_picture():
    """A sample of the card's rows; 100 scenes differ from 1,000 by 15 points at the very most."""
    card = json.loads((TINY / "figures.json").read_text())
    for row, f in evaluate(load(TINY), 100, ("caption en", "detect", "segment")).items():
        figure = {"detect": "f1", "segment": "iou"}.get(row, "exact")
        assert abs(f[figure] - card[row][figure]) <= 15
        assert f["shuffled"] <= 15 < f[figure] - 30


@pytest.mark.parametrize("name", make_assets.DEMOS)
def test_captions_the_demo_scenes(tiny, name):
    model, processor = tiny
    said = predict(Pipeline(model, processor), [PICTURES / f"{name}.png"], ["caption en"])
    kinds = [scenes.NAMES.index(kind) for kind in make_assets.DEMOS[name][0]]
    assert said == [scenes.caption_of(kinds)]


def test_card_shows_the_measured_figures():
    card, figures = (
        (TINY / "README.md").read_text(),
        json.loads((TINY / "figures.json").read_text()),
    )
    assert model_card.table(figures) in card
    assert all(f["scenes"] >= 1000 for f in figures.values())


def test_transformers_gives_the_same_tokens_for_100_scenes(tiny):
    from transformers import PaliGemmaForConditionalGeneration

    model, processor = tiny
    theirs = PaliGemmaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    made = [scenes.make_scene(i, "test") for i in range(100)]
    prompts = ["caption en", "detect cat", "answer en is there a bee?", "segment dog"] * 25
    said = predict(Pipeline(model, processor), [scene.image for scene in made], prompts)
    for first in range(0, 100, 50):
        part = slice(first, first + 50)
        batch = processor([scene.image for scene in made[part]], prompts[part])
        inputs = {k: batch[k] for k in ("input_ids", "pixel_values", "attention_mask")}
        inputs["token_type_ids"] = batch["token_type_ids"]
        ids = theirs.generate(**inputs, max_new_tokens=128, do_sample=False)
        answered = ids[:, batch["input_ids"].shape[1] :]
        assert [processor.decode(row) for row in answered] == said[part]


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
    for kind, count in itertools.product(range(len(scenes.NAMES)), (1, 2, 3, 4, 5)):
        assert len(sp.encode(scenes.phrase(kind, count))) == 2, "a caption is short in tokens"
