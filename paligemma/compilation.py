# Exported from notebooks/23_compilation.ipynb — edit there, then run `make sync`.
"""A decode step of fixed shape, compiled: the same tokens, with less between the products."""

import copy
import warnings
import weakref

import torch

from paligemma.kv_cache import KVCache
from paligemma.model import PaliGemma, PaliGemmaOutput
from paligemma.support.arguments import check_context


class StaticCache(KVCache):
    """A `KVCache` that, once the prompt is read, is always seen whole: nothing changes its shape.

    Args: as for `KVCache`; `max_length` is the room.

    Source: `StaticCache` in transformers; the cache of gpt-fast.
    """

    def __init__(self, *shape, **options):
        super().__init__(*shape, **options)
        batch, device = self.keys[0].shape[0], self.keys[0].device
        self.visible = torch.zeros(batch, 1, 1, self.max_length, dtype=torch.bool, device=device)
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.static = False  # not yet: the prompt is being read

    def begin(self, attention_mask: torch.Tensor) -> None:
        """The prompt is in: `int64[B, S]`, 0 on its padding. From now on one token at a time."""
        past = len(self)
        for tensor in (*self.keys, *self.values):
            tensor[:, :, past:] = 0  # a weight of 0 times whatever the memory holds must be 0
        self.visible.zero_()
        self.visible[..., :past] = attention_mask.bool()[:, None, None]
        self.slot.fill_(past)
        self.static = True

    def update(
        self, layer_idx: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in `KVCache`; after `begin` the room, `float[B, K, S, Dh]`, the token at `slot`."""
        if not self.static:
            return KVCache.update(self, layer_idx, k, v)
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys.index_copy_(2, self.slot, k)
        values.index_copy_(2, self.slot, v)
        return keys, values


def decode_step(model: PaliGemma, token: torch.Tensor, cache: StaticCache) -> torch.Tensor:
    """The next token's logits; nothing in here depends on how many tokens there were.

    Args:
        model: in evaluation mode.
        token: `int64[B, 1]`, the token chosen last.
        cache: after `begin`; gains the token.

    Returns:
        `float32[B, 1, V]`.
    """
    cache.visible.index_fill_(-1, cache.slot, True)
    position_ids = cache.visible.sum(-1)[:, 0] - 1  # [B, 1]
    language = model.language_model
    hidden = language(language.embed(token), position_ids, cache.visible, cache)  # [B, 1, D]
    cache.slot.add_(1)
    return language.logits(hidden)


class CompiledDecoder:
    """Takes a model's place in `generate`: prompts as ever, then one compiled step a token.

    It compiles for each batch size and room (a multiple of 128 tokens) that it meets, which takes
    a while, once. Prefill is not compiled: its shape is a different one each time.

    Args:
        model: in evaluation mode; later changes of its weights are seen, of its layers too.
        step: in place of the compiled `decode_step`.
    """

    def __init__(self, model: PaliGemma, step=None):
        self.model = model
        # Not fullgraph: after many shapes PyTorch goes on uncompiled, instead of with an error.
        options = {"mode": "reduce-overhead", "dynamic": False}
        self.step = step or torch.compile(decode_step, **options)
        self.spare: dict[tuple, list[StaticCache]] = {}  # memory to be used again

    def make_cache(self, batch_size: int, max_length: int) -> StaticCache:
        """A static cache for `batch_size` rows of up to `max_length` tokens.

        Its memory is used again once the answer is over and the cache gone: a CUDA graph holds
        addresses, so other memory would mean another recording.
        """
        check_context(max_length, self.model.config.text_config.max_position_embeddings)
        room = -(-max_length // 128) * 128
        kind = batch_size, room, self.model.device, self.model.dtype
        if kind not in self.spare:
            self.spare = {kind: []}  # of one kind at a time
        spare = self.spare[kind]
        try:
            store = spare.pop()
        except IndexError:  # asking first would leave a gap for another thread
            store = self.new_store(batch_size, room)
        cache = copy.copy(store)  # shares the tensors
        cache._lengths = [0] * len(store.keys)
        weakref.finalize(cache, spare.append, store)
        return cache

    def __call__(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        cache: StaticCache,
        **options,
    ) -> PaliGemmaOutput:
        """As `PaliGemma.forward`: a prompt first, then `int64[B, 1]`, always with the cache."""
        if cache.static:
            torch.compiler.cudagraph_mark_step_begin()  # what the last step returned may go
            return PaliGemmaOutput(self.step(self.model, input_ids, cache))
        output = self.model(input_ids, pixel_values, attention_mask, cache=cache, **options)
        cache.begin(torch.ones_like(input_ids) if attention_mask is None else attention_mask)
        return output

    def new_store(self, batch_size: int, room: int) -> StaticCache:
        """Memory for a cache, at addresses that stay."""
        c = self.model.config.text_config
        shape = c.num_hidden_layers, batch_size, c.num_key_value_heads, room, c.head_dim
        store = StaticCache(*shape, device=self.model.device, dtype=self.model.dtype)
        for tensor in (*store.keys, *store.values, store.visible, store.slot):
            torch._dynamo.mark_static_address(tensor)
        return store


def compile_decode(model: PaliGemma) -> CompiledDecoder | PaliGemma:
    """What to give to `generate`: a `CompiledDecoder`, or, with a warning, the model as it is.

    On a CPU a C++ compiler is needed (g++, clang, on Windows MSVC), on a GPU Triton.
    """
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=model.device))
    except Exception as error:  # which kind it is differs between versions and backends
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"nothing can be compiled here, going on without: {reason}", stacklevel=2)
        return model
    return CompiledDecoder(model)
