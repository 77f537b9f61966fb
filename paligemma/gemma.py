# Exported from notebooks/12_gemma.ipynb — edit there, then run `make sync`.
"""The Gemma decoder: embedding, blocks, norm and a head that shares the embedding."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from paligemma.geglu import GeGLU
from paligemma.grouped_query_attention import GroupedQueryAttention
from paligemma.kv_cache import KVCache
from paligemma.rms_norm import RMSNorm
from paligemma.rope import RotaryEmbedding


@dataclass
class GemmaConfig:
    """Shape of the language model; the defaults are Gemma 2B as PaliGemma uses it.

    Source: Gemma Team 2024, table 1; PaliGemma's published `config.json`.
    """

    vocab_size: int = 257216
    hidden_size: int = 2048
    intermediate_size: int = 16384
    num_hidden_layers: int = 18
    num_attention_heads: int = 8
    num_key_value_heads: int = 1
    head_dim: int = 256
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 8192  # tokens that a row may have, picture and answer included


class GemmaDecoderLayer(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GemmaConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = GroupedQueryAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            layer_idx,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GeGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """`float[B, L, D]` → `float[B, L, D]`; arguments as in `GroupedQueryAttention`."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class GemmaModel(nn.Module):
    """The decoder without its picture: embeddings in, hidden states out, logits on demand.

    Source: Gemma Team 2024; `GemmaModel` in gemma_pytorch and transformers.
    """

    layer_class: type[nn.Module] = GemmaDecoderLayer

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            self.layer_class(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.head_dim, config.rope_theta)
        self.head: nn.Module | None = None  # None: the embedding; a quantised copy may take over

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`int64[B, L]` → `float[B, L, D]`, scaled by √D.

        The factor is rounded to the weights' type first, as the reference does
        (√2048 = 45.2548… becomes 45.25 in bfloat16).
        """
        x = self.embed_tokens(input_ids)
        return x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype, device=x.device)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Run the blocks.

        Args:
            inputs_embeds: `float[B, L, D]`, from `embed` or from pictures.
            position_ids: `int64[B, L]`, each token's position in its row.
            mask: `bool[B, 1, L, S]`, True where a query may look; None: everywhere.
            cache: keys and values of the tokens before; gains these L. S counts both.

        Returns:
            `float[B, L, D]` after the last norm.
        """
        cos, sin = self.rotary_emb(position_ids)
        x = inputs_embeds
        for layer in self.layers:
            x = layer(x, cos, sin, mask, cache)
        return self.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`float[B, L, D]` → `float32[B, L, V]` with the embedding as head (tied weights)."""
        if self.head is not None:
            return self.head(hidden).float()
        return F.linear(hidden, self.embed_tokens.weight).float()
