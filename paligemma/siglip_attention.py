# Exported from notebooks/04_siglip_attention.ipynb — edit there, then run `make sync`.
"""Bidirectional multi-head attention, as in SigLIP's vision encoder."""

import torch
import torch.nn.functional as F
from torch import nn


class SiglipAttention(nn.Module):
    """Every patch looks at every patch, in `num_attention_heads` independent ways.

    Args:
        hidden_size: width D; a multiple of `num_attention_heads`.
        num_attention_heads: H; each head is Dh = D / H wide.

    Raises:
        ValueError: the heads do not divide the width.

    Source: Vaswani et al. 2017, section 3.2; `SiglipAttention` in transformers.
    """

    def __init__(self, hidden_size: int, num_attention_heads: int):
        super().__init__()
        if num_attention_heads < 1 or hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size {hidden_size} is not a multiple of num_attention_heads "
                f"{num_attention_heads}; every head needs the same whole width"
            )
        self.num_heads = num_attention_heads
        self.head_dim = hidden_size // num_attention_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def split_heads(self, t: torch.Tensor) -> torch.Tensor:
        """`float[B, N, D]` → `float[B, H, N, Dh]`: cut the channels, then swap."""
        return t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`float[B, N, D]` → `float[B, N, D]`; no mask, nothing is hidden in a picture."""
        q = self.split_heads(self.q_proj(x))  # [B, H, N, Dh]
        k = self.split_heads(self.k_proj(x))  # [B, H, N, Dh]
        v = self.split_heads(self.v_proj(x))  # [B, H, N, Dh]
        out = F.scaled_dot_product_attention(q, k, v)  # [B, H, N, Dh], scaled by 1/√Dh
        return self.out_proj(out.transpose(1, 2).flatten(2))  # [B, N, D]
