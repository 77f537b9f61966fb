# Exported from notebooks/26_contrastive.ipynb — edit there, then run `make sync`.
"""The sigmoid image–text loss that trained SigLIP, and the two towers that it trains."""

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from paligemma.siglip import SiglipEncoderLayer, SiglipMLP, SiglipVisionConfig, SiglipVisionModel


def sigmoid_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    scale: torch.Tensor | float,
    bias: torch.Tensor | float,
    chunks: int = 1,
) -> torch.Tensor:
    """SigLIP's loss: for each picture and each text, do the two belong together?

    Args:
        image_features: float[B, D], of any length.
        text_features: float[B, D]; row i belongs to picture i.
        scale, bias: of the logits; `logit_scale.exp()` and `logit_bias` of the model.
        chunks: how many devices would share the batch; memory holds (B / chunks)² cells at a time.

    Returns:
        float[], summed over the B² cells and divided by B.

    Raises:
        ValueError: features that cannot be pairs, or chunks of different sizes.

    Source: Zhai et al. 2023, algorithm 1 and section 3.3; `SiglipModel` in transformers.
    """
    images, texts = _unit_pairs(image_features, text_features)
    if chunks < 1 or len(images) % chunks:
        raise ValueError(
            f"{len(images)} pairs cannot be shared by {chunks} devices evenly: choose a number of "
            "chunks that divides the batch"
        )
    if chunks == 1:
        return block_loss(images, texts, scale, bias) / len(images)
    total, size = images.new_zeros(()), len(images) // chunks
    for turn in range(chunks):  # the rounds of the figure
        for device in range(chunks):
            visiting = texts.split(size)[(device + turn) % chunks]
            pair = images.split(size)[device], visiting, scale, bias, turn == 0
            total = total + checkpoint(block_loss, *pair, use_reentrant=False)
    return total / len(images)


def _unit_pairs(image_features, text_features):
    """Both features with rows of length 1, if they can be pairs."""
    shapes = list(image_features.shape), list(text_features.shape)
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or 0 in shapes[0]:
        raise ValueError(
            f"features must be [B, D] of the same shape, got {shapes[0]} for pictures and "
            f"{shapes[1]} for texts: row i of one belongs to row i of the other"
        )
    return F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)


class PoolingHead(nn.Module):
    """One learned query attends to all patches, then an MLP: a picture becomes one vector.

    Args:
        config: width and heads of the vision tower.

    Source: `SiglipMultiheadAttentionPoolingHead` in transformers; Zhai et al. 2022 (MAP head).
    """

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, config.hidden_size))
        self.attention = nn.MultiheadAttention(
            config.hidden_size, config.num_attention_heads, batch_first=True
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`float[P, N, D]` → `float[P, D]`."""
        probe = self.probe.expand(len(x), -1, -1)  # [P, 1, D]
        x = self.attention(probe, x, x, need_weights=False)[0][:, 0]  # [P, D]
        return x + self.mlp(self.layernorm(x))


class PooledVisionModel(SiglipVisionModel):
    """SigLIP's vision tower with a pooling head."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(config)
        self.head = PoolingHead(config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`float[P, 3, H, W]` in -1…1 → `float[P, D]`."""
        return self.head(super().forward(pixel_values))


@dataclass
class SiglipTextConfig:
    """Shape of the text tower; the defaults are SigLIP So400m/14 at 224 pixels.

    Source: Zhai et al. 2023 (SigLIP) and its published `config.json`.
    """

    vocab_size: int = 32000
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    max_position_embeddings: int = 16
    layer_norm_eps: float = 1e-6


class SiglipTextModel(nn.Module):
    """Token and position embeddings, blocks without a mask, the last position projected.

    Args:
        config: the shape of the tower.

    Source: `SiglipTextTransformer` in transformers.
    """

    def __init__(self, config: SiglipTextConfig):
        super().__init__()
        self.config = config
        width, length = config.hidden_size, config.max_position_embeddings
        tokens, positions = nn.Embedding(config.vocab_size, width), nn.Embedding(length, width)
        # The tower's block, which reads only fields that both configs have.
        block = cast(SiglipVisionConfig, config)
        layers = (SiglipEncoderLayer(block) for _ in range(config.num_hidden_layers))
        # Named as published keys read: embeddings.token_embedding.weight, encoder.layers.0 …
        self.embeddings = nn.ModuleDict(
            {"token_embedding": tokens, "position_embedding": positions}
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.final_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Linear(width, width)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`int64[B, L]`, padded to the full length L → `float[B, D]`."""
        length = self.config.max_position_embeddings
        if input_ids.dim() != 2 or input_ids.shape[1] != length:
            raise ValueError(
                f"input_ids are {list(input_ids.shape)}; this tower reads [B, {length}]: pad every "
                "text to the full length, its vector is the last position's"
            )
        tokens = self.embeddings["token_embedding"](input_ids)  # [B, L, D]
        x = tokens + self.embeddings["position_embedding"].weight
        for layer in self.encoder["layers"].children():
            x = layer(x)
        return self.head(self.final_layer_norm(x)[:, -1])


class ContrastiveModel(nn.Module):
    """A vision tower and a text tower whose vectors can be compared.

    Args:
        vision_config, text_config: the shapes; both of the same width D.

    Raises:
        ValueError: the towers end in different widths.

    Source: `SiglipModel` in transformers; `two_towers.py` in big_vision.
    """

    def __init__(self, vision_config: SiglipVisionConfig, text_config: SiglipTextConfig):
        super().__init__()
        widths = vision_config.hidden_size, text_config.hidden_size
        if widths[0] != widths[1]:
            raise ValueError(
                f"pictures get vectors of width {widths[0]} and texts of width {widths[1]}, which "
                "cannot be compared: give both configs the same hidden_size"
            )
        self.vision_model = PooledVisionModel(vision_config)
        self.text_model = SiglipTextModel(text_config)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(10.0)]))
        self.logit_bias = nn.Parameter(torch.tensor([-10.0]))
        init_weights(self)

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """`float[P, 3, H, W]` and `int64[B, L]` → logits `float[P, B]`, texts by pictures."""
        images = F.normalize(self.vision_model(pixel_values), dim=-1)  # [P, D]
        texts = F.normalize(self.text_model(input_ids), dim=-1)  # [B, D]
        return self.logit_scale.exp() * images @ texts.T + self.logit_bias

    def loss(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """The sigmoid loss of B pictures, each with its own text: float[]."""
        images, texts = self.vision_model(pixel_values), self.text_model(input_ids)
        return sigmoid_loss(images, texts, self.logit_scale.exp(), self.logit_bias)


@torch.no_grad()
def init_weights(model: nn.Module) -> None:
    """Start as SigLIP does: Xavier for matrices, small embeddings, biases at zero.

    Args:
        model: changed in place; norms, `logit_scale` and `logit_bias` keep their values.

    Source: `vit.py` in big_vision.
    """
    for name, weight in model.named_parameters():
        if name.endswith(("token_embedding.weight", "position_embedding.weight")):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        elif name.endswith("patch_embedding.weight"):
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        elif weight.dim() == 2:
            nn.init.xavier_uniform_(weight)
        elif name.endswith("bias") and not name.endswith("logit_bias"):
            nn.init.zeros_(weight)


def softmax_loss(
    image_features: torch.Tensor, text_features: torch.Tensor, scale: torch.Tensor | float
) -> torch.Tensor:
    """CLIP's loss (InfoNCE): which of the texts is this picture's, which picture this text's?

    The arguments are those of `sigmoid_loss`; a bias would have no effect.

    Source: Radford et al. 2021, figure 3; Oord et al. 2018.
    """
    images, texts = _unit_pairs(image_features, text_features)
    logits = scale * images @ texts.T  # [B, B]
    truth = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


def block_loss(images, texts, scale, bias, own: bool = True) -> torch.Tensor:
    """Sum of the sigmoid losses of some pictures with some texts, both float[B, D] of length 1.

    With `own` row i of both is a pair; without, no row of one belongs to any of the other.
    """
    logits = scale * images @ texts.T + bias  # [B, B]
    signs = -torch.ones_like(logits)
    if own:
        signs.fill_diagonal_(1)
    return -F.logsigmoid(signs * logits).sum()
