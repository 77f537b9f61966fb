# Exported from notebooks/18_generation.ipynb — edit there, then run `make sync`.
"""Prefill once, then one token at a time: batches, streaming, stopping."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from threading import Lock
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from paligemma.geglu import GeGLU
from paligemma.gemma import GemmaDecoderLayer, GemmaModel
from paligemma.grouped_query_attention import GroupedQueryAttention
from paligemma.kv_cache import KVCache
from paligemma.model import PaliGemma
from paligemma.rms_norm import RMSNorm
from paligemma.rope import RotaryEmbedding
from paligemma.sampling import check_sampling, sample
from paligemma.tokenizer import Tokenizer


def pairs(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of each head, `float[H * Dh, D]`, so that what RoPE turns together are neighbours."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _after_norm(weight: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
    """`float[E, D]` behind a norm, for x of length 1: `float[D + 1, E]`, the last row 0."""
    return F.pad((weight * (1 + norm.weight) * weight.shape[1] ** 0.5).T, (0, 0, 0, 1))


def fold(text: GemmaModel) -> tuple[torch.Tensor, list[tuple[torch.Tensor, ...]], torch.Tensor]:
    """Words `float[V, D + 1]`; each layer as (into attention, out, into MLP, out); the head."""
    layers, c = [], text.config
    for layer in text.layers:
        attention, mlp = layer.self_attn, layer.mlp
        queries = pairs(attention.q_proj.weight * c.head_dim**-0.5, c.head_dim)
        keys = pairs(attention.k_proj.weight, c.head_dim)
        into = torch.cat((queries, keys, attention.v_proj.weight))
        wide = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
        into = _after_norm(into, layer.input_layernorm)
        wide = _after_norm(wide, layer.post_attention_layernorm)
        out, down = (F.pad(m.weight.T, (0, 1)) for m in (attention.o_proj, mlp.down_proj))
        layers.append(tuple(w.detach().contiguous() for w in (into, out, wide, down)))
    words, size = text.embed_tokens.weight.detach(), c.hidden_size
    head = _after_norm(words, text.norm).detach().contiguous()
    return F.pad(words * size**0.5, (0, 1), value=(size * c.rms_norm_eps) ** 0.5), layers, head


FOLD_BELOW = 64 * 2**20  # bytes of weights: copies of more would cost memory
_PLAIN = {
    *(GemmaModel, GemmaDecoderLayer, GroupedQueryAttention, GeGLU, RMSNorm, RotaryEmbedding),
    *(nn.Linear, nn.Embedding, nn.ModuleList),
}
_folded = WeakKeyDictionary()


def can_fold(model: PaliGemma) -> bool:
    """Whether `FoldedDecoder` does what this model's decoder does: small, float32, unchanged."""
    size = 0
    for part in (model, *model.language_model.modules()):
        if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
            return False
        if part is not model and type(part) not in _PLAIN:
            return False
        for weight in part._parameters.values():
            if weight is not None:
                size += weight.nbytes
                if weight.dtype != torch.float32 or weight.is_inference():
                    return False
    return size <= FOLD_BELOW


def folded(text: GemmaModel) -> tuple:
    """`fold(text)`, kept until a weight changes."""
    version = [(w.data_ptr(), w._version) for w in text.parameters()]
    if _folded.get(text, (None,))[0] != version:
        _folded[text] = version, fold(text)
    return _folded[text][1]


class FoldedDecoder:
    """One token a row through a small Gemma, with as few operations as possible.

    Args:
        text: the decoder, as `can_fold` wants it.
        cache: holds S tokens a row; it is copied, with pairs as `fold` lays them.
        attention_mask: `int64[B, S]`, 0 on padding; None: no padding.
    """

    def __init__(self, text: GemmaModel, cache: KVCache, attention_mask: torch.Tensor | None):
        c, past, steps = text.config, len(cache), cache.max_length - len(cache)
        heads, kv_heads, Dh = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        batch = len(cache.keys[0])
        self.words, self.layers, self.head = folded(text)
        keys = torch.stack(cache.keys).unflatten(-1, (2, Dh // 2)).transpose(-1, -2).flatten(-2)
        memory = torch.stack((keys, torch.stack(cache.values)), 1)  # (layers, 2, B, K, room, Dh)
        self.places = memory.permute(4, 0, 2, 1, 3, 5)  # one token's: (layers, B, 2, K, Dh)
        keys, self.values = memory.flatten(2, 3).unbind(1)  # (layers, B K, room, Dh)
        self.keys, self.end = keys.mT, past
        self.parts, self.new = (heads * Dh, 2 * kv_heads * Dh), (batch, 2, kv_heads, Dh)
        self.groups, self.flat = (batch * kv_heads, heads // kv_heads, Dh), (batch, heads * Dh)
        self.halves = (c.intermediate_size, c.intermediate_size)
        seen, self.hidden = torch.full((batch,), past, device=self.words.device), None
        if attention_mask is not None:
            seen = attention_mask.sum(-1)
            hidden = self.words.new_zeros(batch, 1, cache.max_length)
            hidden[..., :past].masked_fill_(attention_mask[:, None] == 0, -torch.inf)
            self.hidden = hidden.repeat_interleave(kv_heads, 0)
        places = seen + torch.arange(steps, device=seen.device)[:, None]  # (steps, B)
        cos, sin = (t[:, 0, :, : Dh // 2] for t in text.rotary_emb(places))
        turns = torch.complex(cos, sin).repeat(1, 1, heads + kv_heads)
        self.turns = iter(F.pad(turns, (0, kv_heads * Dh // 2), value=1).unbind())  # v stays

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        """`int64[B]`, the newest token of each row, to `float32[B, V]`."""
        turn, at = next(self.turns), self.end
        self.end = end = at + 1
        memory = (self.keys.narrow(3, 0, end), self.values.narrow(2, 0, end), self.places[at])
        length = partial(torch.linalg.vector_norm, dim=-1, keepdim=True)
        x = F.embedding(token, self.words)  # (B, D + 1)
        for (into, out, wide, down), k, v, place in zip(self.layers, *(t.unbind() for t in memory)):
            qkv = ((x / length(x)) @ into).view(torch.complex64) * turn
            q, new = qkv.view(torch.float32).split_with_sizes(self.parts, -1)
            place.copy_(new.view(self.new))
            scores = torch.bmm(q.reshape(self.groups), k)  # (B K, G, S + 1)
            if self.hidden is not None:
                scores = scores + self.hidden[..., :end]
            seen = torch.bmm(scores.softmax(-1), v)  # (B K, G, Dh)
            x = torch.addmm(x, seen.view(self.flat), out)
            gate, up = ((x / length(x)) @ wide).split_with_sizes(self.halves, -1)
            x = torch.addmm(x, F.gelu(gate, approximate="tanh") * up, down)
        return (x / length(x)) @ self.head


_TURN, _pays = Lock(), WeakKeyDictionary()


@contextmanager
def _onednn(enabled: bool) -> Iterator[None]:
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = before and enabled
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def own_product_pays(model: PaliGemma) -> bool:
    """Whether PyTorch multiplies one row of bfloat16 clearly faster than oneDNN on this machine.

    Tried once for each model and number of threads, in about half a token's time.
    """
    tried, threads = _pays.setdefault(model, {}), torch.get_num_threads()
    if threads not in tried:
        layers = [[w for w in x.parameters() if w.dim() == 2] for x in model.language_model.layers]
        weights = [max(layer, key=torch.numel) for layer in layers if layer]
        seconds = {True: [], False: []}  # of oneDNN's product and of PyTorch's
        for i, weight in enumerate(2 * weights):  # each by both, the others in between
            enabled = (i % len(weights) + i // len(weights)) % 2 == 0
            with _onednn(enabled):
                start = time.perf_counter()
                F.linear(weight[:1], weight)
                seconds[enabled].append(time.perf_counter() - start)
        faster = weights and median(seconds[True]) > 1.2 * median(seconds[False])
        tried[threads] = bool(faster)
    return tried[threads]


@contextmanager
def thin_products(model: PaliGemma, rows: int) -> Iterator[None]:
    """While inside, one row of bfloat16 on a CPU is multiplied by whichever product is faster.

    The switch is the whole process's, so threads take turns, step by step.
    """
    if model.device.type != "cpu" or model.dtype != torch.bfloat16:
        yield
        return
    with _TURN:
        thin = rows == 1 and torch.backends.mkldnn.enabled
        with _onednn(not (thin and own_product_pays(model))):
            yield


def _steps(
    model: PaliGemma,
    choose: Callable[[torch.Tensor], torch.Tensor],
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    max_new_tokens: int,
    eos_token_id: int,
    log_probs: list[torch.Tensor] | None,
    image_features: torch.Tensor | None,
) -> Iterator[torch.Tensor]:
    """The loop of `generate_steps`; `choose` makes `int64[B]` of `float32[B, V]`."""
    batch, length = input_ids.shape
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None  # no padding: nothing to carry along
    cache = model.make_cache(batch, length + max_new_tokens - 1)  # the last token is never fed
    done, ended = torch.zeros(batch, dtype=torch.bool, device=input_ids.device), False
    fold, decoder, token = can_fold(model), None, None
    for _ in range(max_new_tokens):
        with torch.inference_mode():
            if fold and token is not None:
                if decoder is None:
                    decoder = FoldedDecoder(model.language_model, cache, attention_mask)
                logits = decoder(token)  # (B, V)
            else:
                how = {"cache": cache, "logits_to_keep": 1, "image_features": image_features}
                with thin_products(model, input_ids.numel()):
                    logits = model(input_ids, pixel_values, attention_mask, **how).logits[:, -1]
            token = choose(logits)  # (B,)
            if ended:
                token = token.masked_fill(done, 0)
            if log_probs is not None:
                log_prob = logits.float().log_softmax(-1).gather(-1, token[:, None])[:, 0]
                log_probs.append(log_prob.masked_fill(done, 0))
            if eos_token_id in token.tolist():
                done, ended = done | (token == eos_token_id), True
        yield token.clone()  # outside: an ordinary tensor, which its reader may change
        if ended and bool(done.all()):
            return
        if not fold:
            input_ids, pixel_values, image_features = token[:, None], None, None
            if attention_mask is not None:
                one = attention_mask.new_ones(batch, 1)
                attention_mask = torch.cat([attention_mask, one], dim=1)


def check_options(max_new_tokens: int, temperature: float, top_p: float, top_k: int | None) -> None:
    """Refuse options out of range, before any work is done.

    Raises:
        ValueError: max_new_tokens no whole number of at least 1, or as in `check_sampling`.
    """
    check_sampling(temperature, top_k, top_p)
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens!r}; expected a whole number of at least 1"
        )


def generate_steps(
    model: PaliGemma,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    eos_token_id: int = 1,
    log_probs: list[torch.Tensor] | None = None,
    image_features: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Yield `int64[B]`, the next token of every row, until every row has ended.

    The picture and the prompt are read once (prefill); after that each step reads one token a
    row and the cache. A row that has ended yields 0 (pad). Arguments as in `generate`; they are
    checked here and now, the model runs when the first token is asked for.

    Into the list `log_probs` each step puts `float32[B]`: how likely the model found the token,
    whatever temperature it was drawn with (natural logarithm; 0 for a row that has ended).
    """
    check_options(max_new_tokens, temperature, top_p, top_k)
    choose = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    return _steps(
        model,
        choose,
        input_ids,
        pixel_values,
        attention_mask,
        max_new_tokens,
        eos_token_id,
        log_probs,
        image_features,
    )


def generate(
    model: PaliGemma,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    eos_token_id: int = 1,
    image_features: torch.Tensor | None = None,
) -> torch.Tensor:
    """Answer a batch of prompts.

    Args:
        model: in evaluation mode.
        input_ids: `int64[B, L]`, padded on the left, from `Processor`.
        pixel_values: `float32[B, 3, H, W]`.
        attention_mask: `int64[B, L]`, 0 on padding; None: no padding.
        max_new_tokens: at most so many tokens a row.
        temperature: 0 is greedy.
        top_p, top_k: see `sample`.
        generator: source of randomness for a temperature above 0.
        eos_token_id: ends a row.
        image_features: `float[B, N, D]` from `model.encode_image`, with `pixel_values` None: a
            picture that is asked about often is looked at once.

    Returns:
        `int64[B, ≤ max_new_tokens]`, the new tokens, eos included, 0 after it.

    Raises:
        ValueError: a parameter out of range.
    """
    steps = generate_steps(
        model,
        input_ids,
        pixel_values,
        attention_mask,
        max_new_tokens,
        temperature,
        top_p,
        top_k,
        generator,
        eos_token_id,
        image_features=image_features,
    )
    return torch.stack(list(steps), dim=1)


def stream(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Turn the tokens of one row into text as they come.

    A character of several byte pieces is held back until it is whole, so the pieces are always
    valid text; joined they equal `tokenizer.decode` of all ids.

    Args:
        ids: token ids, up to and possibly including eos.
        tokenizer: spells them.

    Yields:
        Non-empty pieces of text.
    """
    seen, sent = [], 0
    text = ""
    for token in ids:
        if token == tokenizer.eos_id:
            break
        seen.append(int(token))
        text = tokenizer.decode(seen)
        if not text.endswith("\N{REPLACEMENT CHARACTER}") and len(text) > sent:
            yield text[sent:]
            sent = len(text)
    if len(text) > sent:
        yield text[sent:]
