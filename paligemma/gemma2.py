# Exported from notebooks/13_gemma2.ipynb — edit there, then run `make sync`.
"""Gemma 2, the decoder of PaliGemma 2: soft-caps, four norms a block, sliding windows."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from paligemma.geglu import GeGLU
from paligemma.gemma import GemmaConfig, GemmaModel
from paligemma.grouped_query_attention import GroupedQueryAttention, group_size
from paligemma.rms_norm import RMSNorm


def soft_cap(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap · tanh(x / cap): `float[…]` → `float32[…]`, almost x where x is small, within ±cap.

    A cap of 0 or None is no cap: some recipes for fine-tuning set it so.

    Source: Gemma 2 report, section 2; Bello et al. 2016.
    """
    return cap * torch.tanh(x.float() / cap) if cap else x.float()


@dataclass
class Gemma2Config(GemmaConfig):
    """Shape of the language model; the defaults are Gemma 2 2B as PaliGemma 2 3B uses it.

    Source: Gemma Team 2024 (Gemma 2), table 1; PaliGemma 2's published `config.json`.
    """

    vocab_size: int = 257152
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_key_value_heads: int = 4
    query_pre_attn_scalar: int = 256
    sliding_window: int | None = 4096
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0


def capped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    cap: float | None,
) -> torch.Tensor:
    """softmax(soft_cap(q·kᵀ · scale) + mask)·v, in groups as in `grouped_attention`.

    Args:
        q, k, v, mask: as in `grouped_attention`.
        scale: factor of the scores, before the cap.
        cap: bound of the scores, before the mask; 0 or None: no cap.

    Returns:
        `float[B, H, L, Dh]`.

    Source: `Attention` in gemma_pytorch, `Gemma2Attention` in transformers.
    """
    batch, heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    group = group_size(heads, kv_heads)
    q = q.reshape(batch, kv_heads, group * length, head_dim)  # [B, K, G·L, Dh]
    scores = soft_cap((q @ k.transpose(-1, -2)).float() * scale, cap)  # [B, K, G·L, S]
    if mask is not None:
        scores = scores.masked_fill(~mask.repeat(1, 1, group, 1), float("-inf"))
    out = scores.softmax(-1).type_as(v) @ v  # [B, K, G·L, Dh]
    return out.reshape(batch, heads, length, head_dim)


def window_mask(mask: torch.Tensor, window: int) -> torch.Tensor:
    """Cut all but the last `window` keys that a query sees, except of those that look back.

    Args:
        mask: `bool[B, 1, L, S]`, True where a query may look; the L new tokens stand last,
            or (where L = 1) anywhere. Tokens that see each other come in one call.
        window: how many tokens a query may see, itself included.

    Returns:
        `bool[B, 1, L, S]`.

    Source: `create_sliding_window_causal_mask` with a bidirectional block, transformers.
    """
    length, total = mask.shape[-2:]
    seen = mask.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)  # from this key to the last one
    back = mask[..., total - length :].transpose(-1, -2)  # [B, 1, L, L]: does the key look back?
    mutual = F.pad(back, (total - length, 0))  # [B, 1, L, S]
    return mask & ((seen <= window) | mutual)


class Gemma2Attention(GroupedQueryAttention):
    """Rotary attention with a scale of its own, capped scores and, in even layers, a window."""

    def __init__(self, config: Gemma2Config, layer_idx: int):
        heads = config.num_attention_heads, config.num_key_value_heads
        super().__init__(config.hidden_size, *heads, config.head_dim, layer_idx)
        self.scale = config.query_pre_attn_scalar**-0.5
        self.cap = config.attn_logit_softcapping
        self.sliding_window = None if layer_idx % 2 else config.sliding_window

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """`capped_attention`, in even layers through a window. Gives `float[B, H, L, Dh]`."""
        length, total = q.shape[2], k.shape[2]
        if self.sliding_window is not None and total > self.sliding_window:
            if mask is None:
                mask = torch.ones(1, 1, length, total, dtype=torch.bool, device=q.device)
            mask = window_mask(mask, self.sliding_window)
        return capped_attention(q, k, v, mask, self.scale, self.cap)


class Gemma2DecoderLayer(nn.Module):
    """Sandwich block: x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(self, config: Gemma2Config, layer_idx: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Gemma2Attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GeGLU(config.hidden_size, config.intermediate_size)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask=None, cache=None) -> torch.Tensor:
        """`float[B, L, D]` → `float[B, L, D]`; arguments as in `GemmaDecoderLayer`."""
        h = self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        x = x + self.post_attention_layernorm(h)
        h = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(h)


class Gemma2Model(GemmaModel):
    """The decoder of PaliGemma 2: `GemmaModel` with other blocks and capped logits.

    Source: Gemma Team 2024 (Gemma 2); `Gemma2Model` in transformers.
    """

    layer_class = Gemma2DecoderLayer

    def __init__(self, config: Gemma2Config):
        super().__init__(config)
        self.cap = config.final_logit_softcapping

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`float[B, L, D]` → `float32[B, L, V]`, capped."""
        return soft_cap(super().logits(hidden), self.cap)
