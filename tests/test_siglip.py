"""Lesson 05: the block and the whole vision tower."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig as PublishedConfig
from transformers.models.siglip.modeling_siglip import SiglipVisionModel as Published

from paligemma.siglip import SiglipEncoderLayer, SiglipMLP, SiglipVisionConfig, SiglipVisionModel

TINY = Path(__file__).resolve().parents[1] / "paligemma" / "assets" / "tiny"
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 21,
    "patch_size": 7,
}


def published(seed: int = 0, implementation: str = "eager", **changes):
    """The tower of transformers with every weight drawn, the norms' too."""
    config = PublishedConfig(**SMALL | changes, vision_use_head=False)
    config._attn_implementation = implementation
    theirs = Published(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            draw = torch.randn(weight.shape, generator=generator)
            fan_in = weight[0].numel() if weight.dim() > 1 else 4
            weight.copy_(draw * fan_in**-0.5 + (weight.dim() == 1 and "norm" in name))
    return theirs


def weights(theirs) -> dict[str, torch.Tensor]:
    """Their state dict under the names of this package."""
    return {name.removeprefix("vision_model."): t for name, t in theirs.state_dict().items()}


def make(seed: int = 0, **changes) -> SiglipVisionModel:
    ours = SiglipVisionModel(SiglipVisionConfig(**SMALL | changes))
    ours.load_state_dict(weights(published(seed, **changes)))
    return ours.eval()


def pictures(count: int = 2, size: int = 21, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def reference() -> dict[str, torch.Tensor]:
    """Weights, pictures and each hidden state of transformers, for the notebook."""
    theirs, x = published(), pictures()
    out = theirs(x, output_hidden_states=True)
    states = {f"state.{index}": state for index, state in enumerate(out.hidden_states)}
    model = {f"model.{name}": tensor for name, tensor in weights(theirs).items()}
    return model | states | {"pictures": x, "output": out.last_hidden_state}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_hidden_layers": 1, "num_attention_heads": 1},
        {"num_attention_heads": 16, "intermediate_size": 7},
        {"layer_norm_eps": 0.1},
        {"num_channels": 1},
        {"num_hidden_layers": 0},
    ],
)
def test_agrees_with_transformers(changes, implementation):
    theirs, ours = published(implementation=implementation, **changes), make(**changes)
    x = pictures()[:, : changes.get("num_channels", 3)]
    with torch.no_grad():
        expected = theirs(x).last_hidden_state
        torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)


def test_every_block_agrees_with_transformers():
    theirs, ours, x = published(), make(), pictures()
    with torch.no_grad():
        expected = theirs(x, output_hidden_states=True).hidden_states
        state = ours.embeddings(x)
        torch.testing.assert_close(state, expected[0], atol=1e-5, rtol=1e-5)
        for layer, after in zip(ours.encoder.layers, expected[1:], strict=True):
            state = layer(state)
            torch.testing.assert_close(state, after, atol=1e-5, rtol=1e-5)


def test_the_gelu_is_the_tanh_one():
    mlp = SiglipMLP(SiglipVisionConfig(hidden_size=1, intermediate_size=1))
    with torch.no_grad():
        for layer in (mlp.fc1, mlp.fc2):
            layer.weight.fill_(1)
            layer.bias.zero_()
        x = torch.linspace(-6, 6, 241)[:, None]
        cubic = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
        torch.testing.assert_close(mlp(x), x / 2 * (1 + cubic.tanh()), atol=1e-6, rtol=1e-5)
        assert (mlp(x) - F.gelu(x)).abs().max() > 1e-4


def test_a_block_with_silent_branches_changes_nothing():
    layer = make().encoder.layers[0]
    with torch.no_grad():
        for last in (layer.self_attn.out_proj, layer.mlp.fc2):
            last.weight.zero_()
            last.bias.zero_()
    x = torch.randn(2, 9, 16)
    assert torch.equal(layer(x), x)


def test_the_stream_is_the_sum_of_what_was_added():
    model, added = make(), []
    for layer in model.encoder.layers:
        for branch in (layer.self_attn, layer.mlp):
            branch.register_forward_hook(lambda module, args, out: added.append(out))
    x = pictures()
    with torch.no_grad():
        out = model(x)
        total = model.embeddings(x) + sum(added)
        torch.testing.assert_close(model.post_layernorm(total), out, atol=1e-5, rtol=1e-5)
    assert len(added) == 2 * 3


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(9)))
def test_a_block_does_not_know_the_order(order):
    layer, x = make().encoder.layers[0], torch.randn(2, 9, 16)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], atol=1e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(factor=st.floats(0.5, 200), shift=st.floats(-50, 50))
def test_branches_do_not_see_size_or_shift(factor, shift):
    layer = make().encoder.layers[0]
    x = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    layer = layer.double()
    moved = layer.self_attn(layer.layer_norm1(factor * x + shift))
    torch.testing.assert_close(moved, layer.self_attn(layer.layer_norm1(x)), atol=1e-4, rtol=1e-4)


def test_pictures_of_a_batch_do_not_mix():
    model, x = make(), pictures(3)
    alone = torch.cat([model(picture[None]) for picture in x])
    torch.testing.assert_close(model(x), alone, atol=1e-5, rtol=1e-5)


def test_every_pixel_reaches_every_patch():
    model, x = make(), pictures(1)
    changed = x.clone()
    changed[0, :, 20, 20] *= -1
    assert ((model(changed) - model(x)).abs().amax(dim=2) > 1e-5).all()


def test_every_weight_learns():
    model = make()
    (model(pictures()) ** 3).sum().backward()
    for name, weight in model.named_parameters():
        if not name.endswith("k_proj.bias"):  # without effect: lesson 04, exercise 1
            assert weight.grad.abs().max() > 1e-4, name


def test_training_mode_changes_nothing():
    model, x = make(), pictures()
    assert torch.equal(model.train()(x), model.eval()(x))


def test_bfloat16_stays_close():
    model, x = make(), pictures()
    with torch.no_grad():
        exact = model(x)
        out = model.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() < 0.05 * exact.norm()


def test_published_size_and_names():
    with torch.device("meta"):
        ours = SiglipVisionModel(SiglipVisionConfig())
        theirs = Published(
            PublishedConfig(
                hidden_size=1152,
                intermediate_size=4304,
                num_hidden_layers=27,
                num_attention_heads=16,
                image_size=224,
                patch_size=14,
                vision_use_head=False,
            )
        )
        assert ours(torch.empty(2, 3, 224, 224)).shape == (2, 256, 1152)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    expected = {name: t.shape for name, t in weights(theirs).items() if "position_ids" not in name}
    assert shapes == expected
    assert sum(p.numel() for p in ours.parameters()) == 412_442_352
    norms = [m for m in ours.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 2 * 27 + 1 and {norm.eps for norm in norms} == {1e-6}


@pytest.mark.parametrize(("size", "tokens"), [(224, 256), (448, 1024), (896, 4096)])
def test_image_tokens(size, tokens):
    config = SiglipVisionConfig(image_size=size)
    assert config.num_image_tokens == tokens
    with torch.device("meta"):
        config.num_hidden_layers = 1
        model = SiglipVisionModel(config)
        assert model(torch.empty(1, 3, size, size)).shape == (1, tokens, 1152)


def test_the_trained_tower_agrees_with_transformers():
    prefix = "vision_tower.vision_model."
    with safe_open(TINY / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]
        trained = {name.removeprefix(prefix): file.get_tensor(name).float() for name in names}
    shape = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 112,
        "patch_size": 14,
    }
    ours, theirs = SiglipVisionModel(SiglipVisionConfig(**shape)), published(**shape)
    ours.load_state_dict(trained)
    inner = getattr(theirs, "vision_model", theirs)
    inner.load_state_dict(trained, strict=True)
    x = pictures(2, 112)
    with torch.no_grad():
        gap = ours(x) - theirs(x).last_hidden_state
    assert gap.abs().max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 20}, "image_size 20 is not a multiple of patch_size 7"),
        ({"num_attention_heads": 3}, "hidden_size 16 .* num_attention_heads 3"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SiglipVisionModel(SiglipVisionConfig(**SMALL | changes))


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(ValueError, match="prepare them with ImageProcessor"):
        make()(pictures(1, 28))


def test_a_block_keeps_the_shape():
    config = SiglipVisionConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2)
    layer = SiglipEncoderLayer(config)
    for shape in ((1, 1, 8), (3, 5, 8), (2, 256, 8)):
        assert layer(torch.randn(shape)).shape == shape
