# Exported from notebooks/09_rope.ipynb — edit there, then run `make sync`.
"""Rotary position embedding: turn queries and keys by an angle that grows with position."""

import torch
from torch import nn


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the rotation angles, one per position and pair of channels.

    Args:
        head_dim: width Dh of a head; even.
        base: wavelengths run from 2π to almost 2π·base positions (`rope_theta`).

    Raises:
        ValueError: `head_dim` is not a positive even number, or `base` is not positive.

    Source: Su et al. 2021 (RoFormer), section 3.2.2.
    """

    def __init__(self, head_dim: int, base: float = 10000.0):
        super().__init__()
        if head_dim < 2 or head_dim % 2:
            raise ValueError(
                f"head_dim {head_dim} does not split into pairs of channels; give an even number"
            )
        if not base > 0:
            raise ValueError(f"base {base} is not a positive number; Gemma's is 10000")
        self.head_dim, self.base = head_dim, base

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Angles for the given positions.

        Args:
            positions: `int64[B, L]`, where each token stands in its row.

        Returns:
            cos, sin: `float32[B, 1, L, Dh]`, ready to broadcast over heads.
        """
        # Computed here rather than stored: no buffer to lose on the meta device or to round.
        pair = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32)
        frequency = 1.0 / self.base ** (pair / self.head_dim)  # [Dh/2] radians per position
        angle = positions[:, None, :, None].float() * frequency  # [B, 1, L, Dh/2]
        angle = torch.cat((angle, angle), dim=-1)  # [B, 1, L, Dh]
        return angle.cos(), angle.sin()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate channel i together with channel i + Dh/2.

    Args:
        x: queries or keys, `float[B, H, L, Dh]`.
        cos: `float32[B, 1, L, Dh]` from `RotaryEmbedding`.
        sin: the same.

    Returns:
        `float[B, H, L, Dh]` in the dtype of `x`; lengths of vectors are kept.

    Source: the "rotate half" form of gemma_pytorch and transformers (not interleaved pairs).
    """
    first, second = x.chunk(2, dim=-1)  # [B, H, L, Dh/2] each
    turned = torch.cat((-second, first), dim=-1)  # x after a quarter turn
    return (x * cos + turned * sin).type_as(x)
