"""The whole model against transformers: every kind of attention × key layout × dtype."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from random_models import IMAGE_TOKENS, KINDS, random_batch
from safetensors.torch import load_file, save_file
from transformers import PaliGemmaForConditionalGeneration

from paligemma.checkpoint import load_model, save_model
from paligemma.generation import generate

README = Path(__file__).parent.parent / "README.md"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def hub(name: str) -> str:
    """Name as in the files on the hub."""
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def in_memory(name: str) -> str:
    """Name as in the state dict of transformers 4.52 and later."""
    return "model." + name.replace("language_model.model.", "language_model.")


LAYOUTS = {"hub": hub, "transformers 5": str, "in memory": in_memory}


def write_layout(source: Path, target: Path, rename) -> None:
    """Copy a checkpoint with every tensor renamed."""
    target.mkdir()
    shutil.copy(source / "config.json", target)
    tensors = load_file(source / "model.safetensors")
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    if rename is in_memory:  # a state dict also holds the tied head
        renamed["lm_head.weight"] = renamed["model.language_model.embed_tokens.weight"].clone()
    save_file(renamed, target / "model.safetensors", metadata={"format": "pt"})


def reference_logits(model, batch: dict, **extra) -> torch.Tensor:
    """transformers' logits; positions count real tokens from 1, as its `generate` does."""
    positions = batch["attention_mask"].cumsum(-1).clamp(min=1)
    inputs = batch | {"pixel_values": batch["pixel_values"].to(model.dtype)} | extra
    extra.setdefault("token_type_ids", torch.zeros_like(batch["input_ids"]))
    with torch.no_grad():
        return model(**(inputs | extra), position_ids=positions)


def compare(kind, checkpoint: Path, original: Path, dtype: torch.dtype, batch=None) -> dict:
    """Logits and 32 greedy tokens of one checkpoint, ours and transformers'."""
    batch = batch or random_batch()
    real = batch["attention_mask"].bool()
    reference = PaliGemmaForConditionalGeneration.from_pretrained(original, dtype=dtype).eval()
    ours = load_model(checkpoint, dtype=dtype)
    theirs = reference_logits(reference, batch).logits
    exact = reference_logits(reference.float(), batch).logits
    with torch.no_grad():
        logits = ours(**batch).logits
    reference.to(dtype)
    length = batch["input_ids"].shape[1]
    expected = reference.generate(
        **batch | {"pixel_values": batch["pixel_values"].to(dtype)},
        token_type_ids=torch.zeros_like(batch["input_ids"]),
        max_new_tokens=32,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[:, length:]
    tokens = generate(ours, **batch, max_new_tokens=32, eos_token_id=-1)
    return {
        "difference": (logits - theirs.float())[real].abs().max().item(),
        "our error": (logits - exact)[real].abs().mean().item(),
        "their error": (theirs.float() - exact)[real].abs().mean().item(),
        "tokens": torch.equal(tokens, expected),
    }


@pytest.fixture(scope="module")
def table(checkpoints, tmp_path_factory):
    """Every row of the parity table: (kind, layout, dtype) → figures."""
    root, rows = tmp_path_factory.mktemp("layouts"), {}
    for kind in KINDS:
        for layout, rename in LAYOUTS.items():
            path = root / f"{kind} {layout}"
            write_layout(checkpoints[kind], path, rename)
            for name, dtype in DTYPES.items():
                rows[kind, layout, name] = compare(kind, path, checkpoints[kind], dtype)
    return rows


def markdown(table: dict) -> str:
    """The table as the README shows it: a row for each kind and layout, a column a dtype."""
    lines = [
        f"| attention | key layout | {' | '.join(DTYPES)} |",
        "|---|---|" + "---|" * len(DTYPES),
    ]
    for kind in KINDS:
        for layout in LAYOUTS:
            cells = [table[kind, layout, dtype] for dtype in DTYPES]
            cells = [f"{c['difference']:.0e}, {'=' if c['tokens'] else '≠'}" for c in cells]
            lines.append(f"| {kind} | {layout} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_logits_and_tokens_equal_transformers(table):
    print("\n" + markdown(table))  # pytest -s shows it
    for row, figures in table.items():
        if row[2] == "float32":
            assert figures["difference"] <= 1e-5, row
            assert figures["tokens"], row
        else:
            # Half precision: on average as close to the float32 logits as transformers itself is.
            assert figures["our error"] <= 1.2 * figures["their error"], row


def test_readme_shows_this_table(table):
    shown = README.read_text().split("<!-- parity -->")[1].split("<!-- /parity -->")[0]
    number = re.compile(r"(\de[+-]\d\d)")
    fresh = markdown(table)
    assert number.sub("#", shown.strip()) == number.sub("#", fresh), f"paste this:\n{fresh}"
    for claimed, measured in zip(number.findall(shown), number.findall(fresh), strict=True):
        assert float(measured) <= 3 * float(claimed), f"paste this:\n{fresh}"


@pytest.mark.parametrize("text", [12, 40])  # 28 and 56 tokens; the window holds 12
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gemma2_equals_transformers(gemma2_checkpoint, tmp_path, layout, text):
    write_layout(gemma2_checkpoint, tmp_path / "x", LAYOUTS[layout])
    figures = compare("", tmp_path / "x", gemma2_checkpoint, torch.float32, random_batch(text=text))
    assert figures["difference"] <= 1e-5 and figures["tokens"]


def several_pictures() -> dict:
    """Two prompts: one about three pictures, one about a single picture, padded to its length."""
    batch = random_batch(rows=2, text=2 * IMAGE_TOKENS + 8, padding=(0, 2 * IMAGE_TOKENS))
    batch["input_ids"][0, : 3 * IMAGE_TOKENS] = batch["input_ids"][0, 0]  # <image>
    batch["pixel_values"] = random_batch(rows=4)["pixel_values"]
    return batch


@pytest.mark.parametrize("kind", ["MQA", "GQA", "gemma2"])
def test_several_pictures_equal_transformers(checkpoints, gemma2_checkpoint, kind):
    path, batch = {**checkpoints, "gemma2": gemma2_checkpoint}[kind], several_pictures()
    figures = compare(kind, path, path, torch.float32, batch)
    assert figures["difference"] <= 1e-5 and figures["tokens"]
    model, real = load_model(path), batch["attention_mask"][0].bool()
    swapped = batch | {"pixel_values": batch["pixel_values"][[1, 0, 2, 3]]}
    moved = (model(**batch).logits - model(**swapped).logits).abs().amax(-1)
    assert moved[0, real].min() > 1e-4 and moved[1].max() <= 1e-5  # their order counts, by row


def test_gemma2_half_precision(gemma2_checkpoint):
    for dtype in (torch.bfloat16, torch.float16):
        figures = compare("", gemma2_checkpoint, gemma2_checkpoint, dtype)
        assert figures["our error"] <= 1.2 * figures["their error"]


def test_loss_equals_transformers(checkpoints, gemma2_checkpoint):
    batch = random_batch()
    types = torch.zeros_like(batch["input_ids"])
    types[:, -5:] = 1
    labels = batch["input_ids"].masked_fill(types == 0, -100)
    for path in (*checkpoints.values(), gemma2_checkpoint):
        reference = PaliGemmaForConditionalGeneration.from_pretrained(path).eval()
        expected = reference_logits(reference, batch, token_type_ids=types, labels=labels)
        out = load_model(path)(**batch, token_type_ids=types, labels=labels)
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(out.logits[real], expected.logits[real], rtol=0, atol=1e-5)
        torch.testing.assert_close(out.loss, expected.loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["GQA", "gemma2"])
def test_padded_batch_equals_its_rows(checkpoints, gemma2_checkpoint, kind):
    batch = random_batch()
    model = load_model({**checkpoints, "gemma2": gemma2_checkpoint}[kind])
    together = generate(model, **batch, max_new_tokens=16, eos_token_id=-1)
    logits = model(**batch).logits
    for row in range(3):
        pad = int((batch["attention_mask"][row] == 0).sum())
        ids, pixels = batch["input_ids"][row : row + 1, pad:], batch["pixel_values"][row : row + 1]
        alone = model(ids, pixels).logits
        torch.testing.assert_close(logits[row : row + 1, pad:], alone, rtol=0, atol=1e-5)
        tokens = generate(model, ids, pixels, max_new_tokens=16, eos_token_id=-1)
        assert torch.equal(tokens, together[row : row + 1])


@pytest.mark.parametrize("kind", ["MQA", "gemma2"])
def test_cached_decoding_equals_one_full_pass(checkpoints, gemma2_checkpoint, kind):
    batch = random_batch()
    model = load_model({**checkpoints, "gemma2": gemma2_checkpoint}[kind])
    tokens = generate(model, **batch, max_new_tokens=8, eos_token_id=-1)
    ids = torch.cat([batch["input_ids"], tokens], dim=1)
    types = torch.cat([torch.zeros_like(batch["input_ids"]), torch.ones_like(tokens)], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(tokens)], dim=1)
    full = model(ids, batch["pixel_values"], mask, types).logits
    cache = model.make_cache(3, ids.shape[1])
    step = model(**batch, cache=cache).logits[:, -1]
    start = batch["input_ids"].shape[1]
    for i in range(tokens.shape[1]):
        torch.testing.assert_close(step, full[:, start + i - 1], rtol=0, atol=1e-5)
        step = model(
            tokens[:, i : i + 1], attention_mask=mask[:, : start + i + 1], cache=cache
        ).logits[:, -1]


def test_what_we_save_transformers_reads(checkpoints, gemma2_checkpoint, tmp_path):
    batch = random_batch()
    for kind, path in {**checkpoints, "gemma2": gemma2_checkpoint}.items():
        ours = load_model(path)
        save_model(ours, tmp_path / kind)
        reference = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / kind).eval()
        theirs = reference_logits(reference, batch).logits
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(ours(**batch).logits[real], theirs[real], rtol=0, atol=1e-5)


def test_the_picture_matters(checkpoints):
    """A control: parity would be empty praise if the logits ignored the picture."""
    batch = random_batch()
    model = load_model(checkpoints["MHA"])
    other = batch | {"pixel_values": batch["pixel_values"].flip(0)}
    assert (model(**batch).logits - model(**other).logits)[0].abs().max() > 0.1
    assert (batch["input_ids"] == 500).sum() == 3 * IMAGE_TOKENS
