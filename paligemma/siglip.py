# Exported from notebooks/05_siglip.ipynb — edit there, then run `make sync`.
"""The SigLIP vision encoder: patches in, one context-aware vector a patch out."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from paligemma.patch_embedding import PatchEmbedding
from paligemma.siglip_attention import SiglipAttention


@dataclass
class SiglipVisionConfig:
    """Shape of the vision tower; the defaults are SigLIP So400m/14 at 224 pixels.

    Source: Zhai et al. 2023 (SigLIP); Alabdulmohsin et al. 2023 (the So400m shape);
    PaliGemma's published `config.json`.
    """

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    layer_norm_eps: float = 1e-6

    @property
    def num_image_tokens(self) -> int:
        """N, the number of patches: (image_size / patch_size)²."""
        return (self.image_size // self.patch_size) ** 2


class SiglipMLP(nn.Module):
    """Two linear layers with tanh-approximated GELU between; each patch on its own.

    Args:
        config: widths D (`hidden_size`) and of the middle (`intermediate_size`).

    Source: `SiglipMLP` in transformers; Hendrycks and Gimpel 2016 (GELU).
    """

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`float[B, N, D]` → `float[B, N, D]`."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiglipEncoderLayer(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        config: the shape of the tower.

    Source: `SiglipEncoderLayer` in transformers; Xiong et al. 2020 (pre-norm).
    """

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SiglipAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`float[B, N, D]` → `float[B, N, D]`."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SiglipVisionModel(nn.Module):
    """Patch embedding, `num_hidden_layers` blocks, one last layer norm; no pooling head.

    Args:
        config: the shape of the tower.

    Raises:
        ValueError: patches do not divide the picture, or heads do not divide the width.

    Source: `SiglipVisionTransformer` in transformers, `vit.py` in big_vision.
    """

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = PatchEmbedding(
            config.hidden_size, config.image_size, config.patch_size, config.num_channels
        )
        layers = nn.ModuleList(SiglipEncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})  # published keys read encoder.layers.0.…
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`float[B, 3, H, W]` in -1…1 → `float[B, N, D]`."""
        x = self.embeddings(pixel_values)
        for layer in self.encoder["layers"].children():
            x = layer(x)
        return self.post_layernorm(x)
