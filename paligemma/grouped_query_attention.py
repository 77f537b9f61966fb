# Exported from notebooks/10_grouped_query_attention.ipynb — edit there, then run `make sync`.
"""Attention with fewer key/value heads than query heads: MHA, GQA and MQA in one class."""

import torch
import torch.nn.functional as F
from torch import nn

from paligemma.rope import apply_rope


def group_size(num_attention_heads: int, num_key_value_heads: int) -> int:
    """Query heads for each key/value head, G = H / K.

    Raises:
        ValueError: K does not divide H.
    """
    if num_key_value_heads < 1 or num_attention_heads % num_key_value_heads:
        raise ValueError(
            f"num_key_value_heads {num_key_value_heads} does not divide num_attention_heads "
            f"{num_attention_heads}: groups must be of equal size, choose a divisor"
        )
    return num_attention_heads // num_key_value_heads


def grouped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(q·kᵀ / √Dh)·v, query heads sharing key/value heads in groups of H / K.

    The query heads of a group are laid along the sequence axis, so that each key and value
    is read once for the whole group instead of being copied for each head.

    Args:
        q: `float[B, H, L, Dh]`.
        k, v: `float[B, K, S, Dh]`; query head h uses key/value head h // (H / K).
        mask: `bool[B, 1, L, S]`, True where a query may look; None: everywhere.

    Returns:
        `float[B, H, L, Dh]`; zeros for a query that may look nowhere.

    Raises:
        ValueError: K does not divide H.

    Source: Shazeer 2019 (MQA); Ainslie et al. 2023 (GQA).
    """
    batch, heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    group = group_size(heads, kv_heads)
    q = q.reshape(batch, kv_heads, group * length, head_dim)  # [B, K, G·L, Dh]
    if mask is not None:
        mask = mask.repeat(1, 1, group, 1)  # [B, 1, G·L, S]: the same rows for each head of a group
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, K, G·L, Dh]
    return out.reshape(batch, heads, length, head_dim)


class GroupedQueryAttention(nn.Module):
    """Rotary self-attention in which H query heads share K key/value heads, H / K each.

    Args:
        hidden_size, num_attention_heads, num_key_value_heads, head_dim: int D, H, K and Dh.
        layer_idx: which layer of a cache this one owns.

    Raises:
        ValueError: K does not divide H.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        layer_idx: int = 0,
    ):
        super().__init__()
        group_size(num_attention_heads, num_key_value_heads)  # raises where the groups are unequal
        self.head_dim, self.layer_idx = head_dim, layer_idx
        self.q_proj = nn.Linear(hidden_size, num_attention_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_attention_heads * head_dim, hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache=None,
    ) -> torch.Tensor:
        """Attend over `x` and whatever the cache already holds.

        Args:
            x: `float[B, L, D]`.
            cos, sin: rotation of the L positions, `float32[B, 1, L, Dh]`.
            mask: `bool[B, 1, L, S]`, True where a query may look; None: everywhere. S counts
                what the cache holds and these L.
            cache: anything with `update(layer_idx, k, v) -> (k, v)`, such as `KVCache`.

        Returns:
            `float[B, L, D]`.
        """
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, L, Dh]
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, K, L, Dh]
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, K, L, Dh]
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer_idx, k, v)  # [B, K, S, Dh]: the earlier ones too
        out = self.attend(q, k, v, mask)  # [B, H, L, Dh]
        return self.o_proj(out.transpose(1, 2).flatten(2))  # [B, L, D]

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """`grouped_attention`; a subclass may put another kind here. Gives `float[B, H, L, Dh]`."""
        return grouped_attention(q, k, v, mask)
