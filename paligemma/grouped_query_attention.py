# Exported from notebooks/10_grouped_query_attention.ipynb — edit there, then run `make sync`.
"""Attention with fewer key/value heads than query heads: MHA, GQA and MQA in one class."""

import torch
import torch.nn.functional as F
from torch import nn

from paligemma.rope import apply_rope


class GroupedQueryAttention(nn.Module):
    """Rotary attention in which each key/value head serves a group of query heads.

    `num_key_value_heads == num_attention_heads` is multi-head attention, 1 is multi-query.

    Args:
        hidden_size: width D of the residual stream.
        num_attention_heads: H query heads.
        num_key_value_heads: K key/value heads; divides H.
        head_dim: Dh; H·Dh need not equal D.
        layer_idx: which layer of a cache this one owns.

    Raises:
        ValueError: K does not divide H.

    Source: Shazeer 2019 (MQA); Ainslie et al. 2023 (GQA); `GemmaAttention` in transformers.
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
        if num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {num_key_value_heads} does not divide "
                f"num_attention_heads {num_attention_heads}; groups must be of equal size"
            )
        self.head_dim = head_dim
        self.layer_idx = layer_idx
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
            mask: `bool[B, 1, L, S + L]`, True where a query may look; None: everywhere.
            cache: anything with `update(layer_idx, k, v) -> (k, v)`, such as `KVCache`.

        Returns:
            `float[B, L, D]`.
        """
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)  # (B, H, L, Dh), (B, K, L, Dh)
        if cache is not None:
            k, v = cache.update(self.layer_idx, k, v)  # (B, K, S + L, Dh)
        out = grouped_attention(q, k, v, mask)  # (B, H, L, Dh)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def grouped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(q·kᵀ / √Dh)·v, query heads sharing key/value heads in groups of H / K.

    The query heads of a group are laid along the sequence axis, so that each key and value
    is read once for the whole group instead of being copied for each head.

    Args:
        q: `float[B, H, L, Dh]`.
        k, v: `float[B, K, S, Dh]`; query head h uses key/value head h // (H / K).
        mask: `bool[B, 1, L, S]` or None.

    Returns:
        `float[B, H, L, Dh]`.
    """
    batch, heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    q = q.reshape(batch, kv_heads, group * length, head_dim)  # (B, K, G·L, Dh)
    if mask is not None:
        mask = mask.repeat(1, 1, group, 1)  # (B, 1, G·L, S): the same rows for each head of a group
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.reshape(batch, heads, length, head_dim)
