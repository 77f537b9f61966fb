"""Memory saved from outside changes no loss and no gradient; types are where they should be."""

import pytest
import torch

from paligemma import scenes
from paligemma.checkpoint import load_model
from paligemma.inference import TINY, load
from paligemma.lora import add_lora
from paligemma.processor import Processor
from paligemma.support.fine_tuning import (
    RECIPES,
    choose_parameters,
    computing_in,
    greedy_answers,
    held_out_loss,
    keep_frozen_in,
    recomputing,
)
from paligemma.training import make_batch

DATA = scenes.SceneDataset(8, tasks=("caption", "is there"), objects=(1, 2))
ITEMS = [DATA[i] for i in range(8)]


@pytest.fixture(scope="module")
def processor():
    return Processor.from_pretrained(TINY)


def loss_and_gradients(model, processor):
    (batch,) = make_batch(ITEMS[:4], processor)
    torch.manual_seed(3)
    model.zero_grad()
    loss = model.train()(**batch).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dropout", [None, 0.0, 0.3])
def test_recomputing_changes_nothing(processor, dropout, monkeypatch):
    """None: everything learns; else adapters do, with this dropout."""
    model, seen = load_model(TINY), []
    if dropout is not None:
        add_lora(model, 4, dropout=dropout)
    block = type(model.language_model.layers[0])
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda *a: seen.append(1) or forward(*a))
    plain = loss_and_gradients(model, processor)
    once = len(seen)
    with recomputing(model):
        again = loss_and_gradients(model, processor)
    assert len(seen) == 3 * once, "each block has run once, and once more backward"
    assert again[0] == plain[0] and again[1].keys() == plain[1].keys()
    assert all(torch.equal(again[1][name], gradient) for name, gradient in plain[1].items())
    with recomputing(model, on=False):
        assert loss_and_gradients(model, processor)[0] == plain[0] and len(seen) == 4 * once
    assert not any("forward" in vars(module) for module in model.modules()), "all is as before"


def test_recomputing_saves_memory(processor):
    """Tensors that wait for the backward pass: far fewer."""
    (batch,) = make_batch(ITEMS[:4], processor)
    kept = {}
    for on in (False, True):
        model, sizes = load_model(TINY).train(), {}

        def note(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with recomputing(model, on), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            model(**batch)
        parameters = {p.data_ptr() for p in model.parameters()}
        kept[on] = sum(size for place, size in sizes.items() if place not in parameters)
    assert kept[True] < 0.5 * kept[False]


def test_products_in_bfloat16(processor):
    model = load_model(TINY)
    plain, gradients = loss_and_gradients(model, processor)
    with computing_in(model, torch.bfloat16):
        half, rounded = loss_and_gradients(model, processor)
    assert half != plain and half == pytest.approx(plain, rel=0.1)
    assert {g.dtype for g in rounded.values()} == {torch.float32}
    with computing_in(model, torch.float32):
        assert loss_and_gradients(model, processor)[0] == plain
    assert "forward" not in vars(model)
    a, b = (torch.cat([g.flatten() for g in found.values()]) for found in (gradients, rounded))
    assert torch.cosine_similarity(a, b, dim=0) > 0.95


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_learns(recipe):
    model = load_model(TINY)
    model.requires_grad_(False)
    choose_parameters(model, recipe)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    every = {name for name, _ in model.named_parameters()}
    text = {name for name in every if name.startswith("language_model.")}
    assert (
        learning
        == {
            "full": every,
            "freeze_tower": text,
            "attention_only": {name for name in text if "_attn." in name},
        }[recipe]
    )
    keep_frozen_in(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in learning else torch.bfloat16)


def test_the_loss_over_batches_is_that_of_all_labels(processor):
    """Captions and one-word answers in batches of three and two: labels count the same."""
    model = load_model(TINY)
    (batch,) = make_batch(ITEMS, processor)
    whole = model(**batch).loss.item()
    assert held_out_loss(model, processor, ITEMS, 3) == pytest.approx(whole, abs=1e-5)


def test_answers_are_those_of_the_model():
    pg = load()
    found = greedy_answers(pg, ITEMS, 3)
    assert found == [pg(x["image"], x["prefix"]) for x in ITEMS]
    assert found[0] == ITEMS[0]["suffix"], "the shipped model knows this one"
