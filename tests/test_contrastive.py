"""Lesson 26: the sigmoid loss, its chunked form, and the two towers."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import SiglipConfig, SiglipModel

from paligemma.contrastive import (
    ContrastiveModel,
    SiglipTextConfig,
    block_loss,
    init_weights,
    sigmoid_loss,
    softmax_loss,
)
from paligemma.siglip import SiglipVisionConfig

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
VISION = SIZES | {"num_hidden_layers": 1, "image_size": 14, "patch_size": 7}
TEXT = SIZES | {"num_hidden_layers": 2, "vocab_size": 40, "max_position_embeddings": 6}


def published(seed: int = 0, implementation: str = "eager"):
    """transformers' pair of towers with every weight drawn, the norms' too."""
    theirs = SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT)).eval()
    theirs.set_attn_implementation(implementation)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            draw = torch.randn(weight.shape, generator=generator)
            fan_in = weight[0].numel() if weight.dim() > 1 else 4
            weight.copy_(draw * fan_in**-0.5 + (weight.dim() == 1 and "norm" in name))
        theirs.logit_scale.fill_(1.3)
        theirs.logit_bias.fill_(-2.1)
    return theirs


def make(**changes) -> ContrastiveModel:
    return ContrastiveModel(SiglipVisionConfig(**VISION), SiglipTextConfig(**TEXT | changes))


def weights(theirs) -> dict[str, torch.Tensor]:
    return {k: v for k, v in theirs.state_dict().items() if "position_ids" not in k}


def inputs(pairs: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pictures = torch.rand(pairs, 3, 14, 14, generator=generator) * 2 - 1
    return pictures, torch.randint(0, 40, (pairs, 6), generator=generator)


def features(pairs: int = 8, width: int = 6, seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, pairs, width, generator=generator, dtype=dtype)
    return drawn[0], drawn[1]


def reference() -> dict[str, torch.Tensor]:
    """Weights, inputs, logits and loss of transformers, for the notebook."""
    theirs, (pictures, ids) = published(), inputs()
    out = theirs(pixel_values=pictures, input_ids=ids, return_loss=True)
    model = {f"model.{name}": tensor for name, tensor in weights(theirs).items()}
    found = {"logits": out.logits_per_image, "loss": out.loss}
    return model | found | {"pictures": pictures, "ids": ids}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_transformers(seed, implementation):
    theirs, ours, (pictures, ids) = published(seed, implementation), make(), inputs()
    ours.load_state_dict(weights(theirs))
    with torch.no_grad():
        out = theirs(pixel_values=pictures, input_ids=ids, return_loss=True)
        logits, loss = ours(pictures, ids), ours.loss(pictures, ids)
    torch.testing.assert_close(logits, out.logits_per_image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, out.loss, atol=1e-5, rtol=1e-5)


def test_loss_agrees_with_transformers_on_its_features():
    theirs, (pictures, ids) = published(), inputs()
    with torch.no_grad():
        out = theirs(pixel_values=pictures, input_ids=ids, return_loss=True)
        scale, bias = theirs.logit_scale.exp(), theirs.logit_bias
        for chunks in (1, 5):
            found = sigmoid_loss(out.image_embeds, out.text_embeds, scale, bias, chunks)
            torch.testing.assert_close(found, out.loss)
        torch.testing.assert_close(
            sigmoid_loss(3 * out.image_embeds, out.text_embeds, scale, bias), out.loss
        )


def test_gradients_agree_with_transformers():
    theirs, ours, (pictures, ids) = published(), make(), inputs()
    ours.load_state_dict(weights(theirs))
    theirs(pixel_values=pictures, input_ids=ids, return_loss=True).loss.backward()
    ours.loss(pictures, ids).backward()
    expected = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name].grad, atol=1e-5, rtol=1e-4)


def test_by_hand():
    images = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [3.0, 0.0]])  # cosines 1 1 / 0 0
    cells = [math.log1p(math.exp(-x)) for x in (3.0, -3.0, 7.0, -7.0)]
    assert sigmoid_loss(images, texts, 10.0, -7.0).item() == pytest.approx(sum(cells) / 2)


@settings(max_examples=25, deadline=None)
@given(
    chunks=st.integers(1, 6),
    each=st.integers(1, 4),
    width=st.integers(1, 5),
    scale=st.floats(0.1, 120),
    bias=st.floats(-30, 10),
    seed=st.integers(0, 99),
)
def test_chunked_is_the_full_loss(chunks, each, width, scale, bias, seed):
    found = []
    for more in ((), (chunks,)):
        leaves = [*features(chunks * each, width, seed), *torch.tensor([scale, bias]).double()]
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        value = sigmoid_loss(*leaves, *more)
        value.backward()
        found.append([value.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(found[1], found[0], atol=1e-9, rtol=1e-9)


def test_chunked_holds_one_block_at_a_time():
    def largest(*more):
        sizes = []
        a, b = features(64, 4)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            sigmoid_loss(a.requires_grad_(), b, 10.0, -10.0, *more)
        return max(sizes)

    assert largest() == 64 * 64
    assert largest(8) <= 64 * 4


def test_gradients_by_finite_differences():
    a, b = features(4, 3)
    leaves = [a, b, torch.tensor(3.0).double(), torch.tensor(-1.0).double()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(sigmoid_loss, leaves)
    assert torch.autograd.gradcheck(lambda *x: sigmoid_loss(*x, chunks=2), leaves)
    assert torch.autograd.gradcheck(softmax_loss, leaves[:3])


def test_blocks_off_the_diagonal_hold_no_pairs():
    a, b = (F.normalize(x, dim=-1) for x in features(3))
    wrong = F.softplus(2 * a @ b.T - 1)
    torch.testing.assert_close(block_loss(a, b, 2, -1, own=False), wrong.sum())
    right = F.softplus(-(2 * a @ b.T - 1)).diagonal() - wrong.diagonal()
    torch.testing.assert_close(block_loss(a, b, 2, -1), wrong.sum() + right.sum())


def test_pairs_may_come_in_any_order_but_must_stay_pairs():
    a, b = features()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    for loss in (lambda x, y: sigmoid_loss(x, y, 10, -10), lambda x, y: softmax_loss(x, y, 10)):
        torch.testing.assert_close(loss(a[order], b[order]), loss(a, b))
        torch.testing.assert_close(loss(b, a), loss(a, b))
        assert loss(a, a[order]) > loss(a, a) + 1


def test_length_of_features_does_not_matter():
    a, b = features()
    sizes = torch.linspace(0.01, 90, 8).double()[:, None]
    torch.testing.assert_close(sigmoid_loss(sizes * a, b, 7, -3), sigmoid_loss(a, b, 7, -3))
    torch.testing.assert_close(softmax_loss(a, sizes * b, 7), softmax_loss(a, b, 7))


def test_extreme_logits_stay_finite_with_a_gradient():
    a = torch.eye(4).requires_grad_()
    loss = sigmoid_loss(a, -torch.eye(4), 1000.0, -500.0)
    assert loss.item() == pytest.approx(1500)
    loss.backward()
    assert a.grad.isfinite().all()


def test_saying_yes_to_everything_is_expensive():
    ones = torch.ones(16, 3)
    assert sigmoid_loss(ones, ones, 10.0, 0.0).item() == pytest.approx(150, abs=0.01)


def test_softmax_loss_by_hand():
    a, b = features(5)
    logits = 4 * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
    rows = -logits.log_softmax(dim=1).diagonal().mean()
    columns = -logits.log_softmax(dim=0).diagonal().mean()
    torch.testing.assert_close(softmax_loss(a, b, 4), (rows + columns) / 2)
    assert softmax_loss(a[:1], b[:1], 4).item() == pytest.approx(0)


def test_starts_as_siglip_does():
    torch.manual_seed(0)
    model = make()
    assert model.logit_scale.exp().item() == pytest.approx(10)
    assert model.logit_bias.item() == -10
    pictures, ids = inputs(8)
    assert 3 < model.loss(pictures, ids).item() < 16
    for name, weight in model.named_parameters():
        if name.endswith("bias") and "logit" not in name:
            assert not weight.any(), name
        elif "norm" in name and name.endswith("weight"):
            assert (weight == 1).all(), name
    before = model.vision_model.head.attention.in_proj_weight.clone()
    init_weights(model)
    assert not torch.equal(before, model.vision_model.head.attention.in_proj_weight)


def test_every_text_with_every_picture():
    model, (pictures, ids) = make(), inputs(5)
    logits = model(pictures, ids[:2])
    assert logits.shape == (5, 2)
    torch.testing.assert_close(model(pictures[3:4], ids[1:2])[0, 0], logits[3, 1])


def test_the_text_tower_has_no_mask():
    model, (_, ids) = make(), inputs(1)
    for place in range(6):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 1) % 40
        assert (model.text_model(changed) - model.text_model(ids)).abs().max() > 1e-4, place


def test_a_few_steps_learn_the_pairs():
    torch.manual_seed(0)
    model, (pictures, ids) = make(), inputs(6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model.loss(pictures, ids).backward()
        optimizer.step()
    assert (model(pictures, ids).argmax(dim=1) == torch.arange(6)).all()


def test_published_size():
    """google/siglip-so400m-patch14-224, counted with transformers' own classes."""
    with torch.device("meta"):
        ours = ContrastiveModel(SiglipVisionConfig(), SiglipTextConfig())
        shape = {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
        }
        vision = shape | {"image_size": 224, "patch_size": 14}
        text = shape | {"max_position_embeddings": 16}
        theirs = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
    expected = {name: tensor.shape for name, tensor in weights(theirs).items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == expected


@pytest.mark.parametrize(
    "shapes", [((3, 4), (2, 4)), ((3, 4), (3, 5)), ((4,), (4,)), ((0, 4),) * 2]
)
@pytest.mark.parametrize(
    "loss",
    [
        lambda a, b: sigmoid_loss(a, b, 10, -10),
        lambda a, b: sigmoid_loss(a, b, 10, -10, chunks=2),
        lambda a, b: softmax_loss(a, b, 10),
    ],
)
def test_features_that_are_no_pairs_are_refused(loss, shapes):
    with pytest.raises(ValueError, match="row i of one belongs to row i of the other"):
        loss(*(torch.ones(shape) for shape in shapes))


@pytest.mark.parametrize("chunks", [0, -1, 3, 16])
def test_chunks_that_do_not_divide_the_batch_are_refused(chunks):
    with pytest.raises(ValueError, match="8 pairs cannot be shared"):
        sigmoid_loss(*features(8), 10, -10, chunks)


def test_texts_of_another_length_are_refused():
    for ids in (torch.zeros(2, 5, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)):
        with pytest.raises(ValueError, match="pad every text"):
            make().text_model(ids)


def test_towers_of_different_width_are_refused():
    with pytest.raises(ValueError, match="same hidden_size"):
        make(hidden_size=32)
