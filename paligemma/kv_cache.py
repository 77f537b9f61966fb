# Exported from notebooks/11_kv_cache.ipynb — edit there, then run `make sync`.
"""Keys and values of the tokens already seen, kept in memory that is allocated once."""

import torch


class KVCache:
    """Preallocated keys and values for every layer; the oldest token first.

    Args:
        num_layers: how many attention layers write to it.
        batch_size, num_key_value_heads, head_dim: int B, K and Dh.
        max_length: the most tokens it will ever hold (prompt and answer).
        device, dtype: of the keys and values.

    Source: the static cache of gemma_pytorch; Pope et al. 2022, section 3.3, for its cost.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_key_value_heads: int,
        max_length: int,
        head_dim: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        shape = (batch_size, num_key_value_heads, max_length, head_dim)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(num_layers)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(num_layers)]
        self.max_length = max_length
        self._lengths = [0] * num_layers

    def __len__(self) -> int:
        """The number of tokens that every layer holds."""
        return min(self._lengths)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values together."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def update(
        self, layer_idx: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new tokens of one layer and return all of them.

        Args:
            layer_idx: the layer that writes.
            k, v: `float[B, K, L, Dh]`, the new tokens.

        Returns:
            keys, values: views `float[B, K, S, Dh]` of all S tokens so far, nothing copied.

        Raises:
            ValueError: more tokens than `max_length`, or another shape; nothing is written then.
        """
        keys, values, start = self.keys[layer_idx], self.values[layer_idx], self._lengths[layer_idx]
        batch, kv_heads, _, head_dim = keys.shape
        for name, new in (("k", k), ("v", v)):
            if new.shape != (batch, kv_heads, k.shape[-2], head_dim):
                raise ValueError(
                    f"{name} is {list(new.shape)}; expected [{batch}, {kv_heads}, L, {head_dim}], "
                    "the same L for k and v: make the cache for this batch and model"
                )
        end = start + k.shape[2]
        if end > self.max_length:
            raise ValueError(
                f"the cache holds {self.max_length} tokens and {end} are needed; "
                "make it with a larger max_length"
            )
        keys[:, :, start:end], values[:, :, start:end] = k, v
        self._lengths[layer_idx] = end
        return keys[:, :, :end], values[:, :, :end]
