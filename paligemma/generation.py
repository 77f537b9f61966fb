# Exported from notebooks/18_generation.ipynb — edit there, then run `make sync`.
"""Prefill once, then one token at a time: batches, streaming, stopping."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from paligemma.model import PaliGemma
from paligemma.sampling import check_sampling, sample
from paligemma.support.arguments import check_steps
from paligemma.tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerationConfig:
    """How tokens are chosen and when an answer ends.

    Args:
        max_new_tokens: at most so many tokens a row, eos included.
        temperature: 0 is greedy.
        top_p, top_k: see `sample`.
        eos_token_id: ends a row; -1: nothing does.
    """

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    eos_token_id: int = 1

    def __post_init__(self):
        check_sampling(self.temperature, self.top_k, self.top_p)
        check_steps(self.max_new_tokens, self.eos_token_id)


def generate_steps(
    model: PaliGemma,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    config: GenerationConfig = GenerationConfig(),
    generator: torch.Generator | None = None,
    image_features: torch.Tensor | None = None,
    log_probs: list[torch.Tensor] | None = None,
) -> Iterator[torch.Tensor]:
    """Read pictures and prompts once (prefill), then one token a row and the cache (decode).

    Args:
        input_ids: `int64[B, L]`, padded on the left, from `Processor`.
        pixel_values: `float32[P, 3, H, W]`, the pictures in the order of the rows.
        attention_mask: `int64[B, L]`, 0 on padding; None: no padding.
        generator: source of randomness for a temperature above 0.
        image_features: `float[P, N, D]` from `model.encode_image`, instead of `pixel_values`.
        log_probs: a list; each step appends `float32[B]`, how likely the model found its token,
            whatever the temperature (a logarithm; 0 for a row that has ended).

    Yields:
        `int64[B]`, the next token of every row, until all have ended; 0 in a row that has.
    """
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None  # no padding: nothing to carry along
    batch, length = input_ids.shape
    cache = model.make_cache(batch, length + config.max_new_tokens - 1)  # the last is never fed
    done = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
    for _ in range(config.max_new_tokens):
        with torch.inference_mode():
            logits = model(
                input_ids,
                pixel_values,
                attention_mask,
                cache=cache,
                image_features=image_features,
                logits_to_keep=1,
            ).logits[:, -1]  # [B, V]
            token = sample(logits, config.temperature, config.top_k, config.top_p, generator)
            token = token.masked_fill(done, 0)  # [B]
            if log_probs is not None:
                log_prob = logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]
                log_probs.append(log_prob.masked_fill(done, 0))
            done = done | (token == config.eos_token_id)
        yield token.clone()  # outside: an ordinary tensor, which its reader may change
        if bool(done.all()):
            return
        input_ids, pixel_values, image_features = token[:, None], None, None  # it is in the cache
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (0, 1), value=1)


def generate(
    model: PaliGemma,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    eos_token_id: int = 1,
    image_features: torch.Tensor | None = None,
) -> torch.Tensor:
    """Answer a batch of prompts: all steps of `generate_steps`, side by side.

    Returns:
        `int64[B, ≤ max_new_tokens]`, the new tokens, eos included, 0 after it.
    """
    config = GenerationConfig(max_new_tokens, temperature, top_p, top_k, eos_token_id)
    steps = generate_steps(
        model, input_ids, pixel_values, attention_mask, config, generator, image_features
    )
    return torch.stack(list(steps), dim=1)


def stream(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Turn the tokens of one row, up to eos, into text as they come.

    A character of several byte tokens is held back until it is whole, so the parts are always
    valid text; joined they equal `tokenizer.decode` of all ids.
    """
    seen, sent, text = [], 0, ""
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
