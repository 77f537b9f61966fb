"""Lesson 03: patches and positions."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from paligemma.patch_embedding import PatchEmbedding


def published(hidden_size: int, image_size: int, patch_size: int, seed: int = 0):
    """The embedding of transformers, with weights and positions drawn from a seed."""
    config = SiglipVisionConfig(
        hidden_size=hidden_size, image_size=image_size, patch_size=patch_size
    )
    theirs = SiglipVisionEmbeddings(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return theirs


def picture(*shape: int, seed: int = 1) -> torch.Tensor:
    """Pixel values in -1…1."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def reference() -> dict[str, torch.Tensor]:
    """A small picture, weights and the output of transformers, for the notebook."""
    theirs = published(hidden_size=16, image_size=28, patch_size=7)
    pixel_values = picture(2, 3, 28, 28)
    return theirs.state_dict() | {"pixel_values": pixel_values, "output": theirs(pixel_values)}


@pytest.mark.parametrize(
    ("hidden_size", "image_size", "patch_size"), [(16, 28, 7), (8, 14, 14), (12, 20, 2), (5, 9, 3)]
)
def test_agrees_with_transformers(hidden_size, image_size, patch_size):
    theirs = published(hidden_size, image_size, patch_size)
    ours = PatchEmbedding(hidden_size, image_size, patch_size)
    ours.load_state_dict(theirs.state_dict())
    pixel_values = picture(3, 3, image_size, image_size)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixel_values), theirs(pixel_values), atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 3),
    side=st.integers(1, 5),
    patch=st.integers(1, 6),
    width=st.integers(1, 9),
    channels=st.integers(1, 4),
)
def test_equals_cutting_and_multiplying(batch, side, patch, width, channels):
    embed = PatchEmbedding(width, side * patch, patch, channels)
    pixel_values = picture(batch, channels, side * patch, side * patch)
    out = embed(pixel_values)
    assert out.shape == (batch, side * side, width) == (batch, embed.num_patches, width)
    weight, bias = embed.patch_embedding.weight, embed.patch_embedding.bias
    for image, vectors in zip(pixel_values, out):
        for index, vector in enumerate(vectors):
            y, x = patch * (index // side), patch * (index % side)
            pixels = image[:, y : y + patch, x : x + patch].flatten()
            expected = weight.flatten(1) @ pixels + bias + embed.position_embedding.weight[index]
            torch.testing.assert_close(vector, expected, atol=1e-5, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_patch_touches_one_token_only(data):
    side, patch = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 5))
    row, column = data.draw(st.integers(0, side - 1)), data.draw(st.integers(0, side - 1))
    embed = PatchEmbedding(8, side * patch, patch)
    before = picture(1, 3, side * patch, side * patch)
    after = before.clone()
    after[..., row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] += 1
    moved = (embed(after) - embed(before)).abs().amax(dim=2)[0] > 1e-6
    assert moved.nonzero().flatten().tolist() == [row * side + column]


def test_pictures_of_a_batch_do_not_mix():
    embed = PatchEmbedding(8, 12, 4)
    pixel_values = picture(3, 3, 12, 12)
    alone = torch.cat([embed(pixel_values[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(embed(pixel_values), alone, atol=1e-6, rtol=1e-5)


def test_shuffled_patches_give_the_same_bag_without_positions():
    embed = PatchEmbedding(16, 12, 4)
    pixel_values = picture(1, 3, 12, 12)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    cut = F.unfold(pixel_values, 4, stride=4)
    shuffled = F.fold(cut[:, :, order], (12, 12), 4, stride=4)
    assert not torch.allclose(embed(shuffled), embed(pixel_values)[:, order], atol=1e-3)
    torch.nn.init.zeros_(embed.position_embedding.weight)
    torch.testing.assert_close(embed(shuffled), embed(pixel_values)[:, order])


def test_every_weight_learns():
    embed = PatchEmbedding(8, 12, 4)
    embed(picture(2, 3, 12, 12)).square().sum().backward()
    for weight in (embed.patch_embedding.weight, embed.position_embedding.weight):
        assert (weight.grad != 0).flatten(1).any(dim=1).all()
    assert (embed.patch_embedding.bias.grad != 0).all()


@pytest.mark.parametrize(("size", "tokens"), [(224, 256), (448, 1024), (896, 4096)])
def test_published_shapes(size, tokens):
    with torch.device("meta"):
        embed = PatchEmbedding(1152, size, 14)
    shapes = {name: tuple(tensor.shape) for name, tensor in embed.state_dict().items()}
    assert shapes == {
        "patch_embedding.weight": (1152, 3, 14, 14),
        "patch_embedding.bias": (1152,),
        "position_embedding.weight": (tokens, 1152),
    }
    assert embed(torch.empty(2, 3, size, size, device="meta")).shape == (2, tokens, 1152)


def test_bfloat16_stays_bfloat16():
    embed = PatchEmbedding(8, 12, 4).to(torch.bfloat16)
    pixel_values = picture(1, 3, 12, 12).to(torch.bfloat16)
    out = embed(pixel_values)
    assert out.dtype == torch.bfloat16
    exact = embed.float()(pixel_values.float())
    torch.testing.assert_close(out.float(), exact, atol=0.05, rtol=0.02)


@pytest.mark.parametrize(("size", "patch", "fits"), [(225, 14, 224), (448, 15, 450), (5, 14, 14)])
def test_a_patch_that_does_not_divide_is_refused(size, patch, fits):
    with pytest.raises(ValueError, match=f"image_size {size} .* patch_size {patch}; .* is {fits}$"):
        PatchEmbedding(8, size, patch)


@pytest.mark.parametrize(
    "shape",
    [(1, 3, 12, 8), (1, 3, 24, 24), (1, 1, 12, 12), (3, 12, 12), (1, 12, 12, 3), (12, 12)],
)
def test_a_wrong_shape_says_what_is_read(shape):
    with pytest.raises(ValueError, match=r"\[B, 3, 12, 12\]: prepare") as error:
        PatchEmbedding(8, 12, 4)(torch.zeros(shape))
    assert str(list(shape)) in str(error.value)
