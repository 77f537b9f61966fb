# Exported from notebooks/08_geglu.ipynb — edit there, then run `make sync`.
"""Gemma's feed-forward layer: a gated linear unit with tanh GELU."""

import torch
import torch.nn.functional as F
from torch import nn


class GeGLU(nn.Module):
    """down(gelu(gate(x)) · up(x)): one projection decides how much of another passes.

    Args:
        hidden_size: width D of the residual stream.
        intermediate_size: width M of the gate and of what it gates.

    Source: Shazeer 2020 (GLU variants); `GemmaMLP` in gemma_pytorch and transformers.
    """

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`float[B, L, D]` → `float[B, L, D]`."""
        gate = F.gelu(self.gate_proj(x), approximate="tanh")  # [B, L, M]
        return self.down_proj(gate * self.up_proj(x))
