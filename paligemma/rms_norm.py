# Exported from notebooks/07_rms_norm.ipynb — edit there, then run `make sync`.
"""Root-mean-square normalisation, with Gemma's (1 + w)."""

import torch
from torch import nn


class RMSNorm(nn.Module):
    """x / rms(x) · (1 + weight), over the last axis.

    Args:
        hidden_size: width D of the vectors.
        eps: added to the mean square, so that a zero vector stays finite.

    Source: Zhang & Sennrich 2019; `RMSNorm` in gemma_pytorch (the weight starts at 0, not 1).
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`float[…, D]` → `float[…, D]` of the same dtype, computed in float32."""
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return (h * (1.0 + self.weight.float())).type_as(x)
