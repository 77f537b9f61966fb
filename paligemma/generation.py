# Exported from notebooks/18_generation.ipynb — edit there, then run `make sync`.
"""Prefill once, then one token at a time: batches, streaming, stopping."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from paligemma.model import PaliGemma
from paligemma.sampling import check_sampling, sample
from paligemma.tokenizer import Tokenizer


def _steps(
    model: PaliGemma,
    choose: Callable[[torch.Tensor], torch.Tensor],
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    max_new_tokens: int,
    eos_token_id: int,
    log_probs: list[torch.Tensor] | None,
) -> Iterator[torch.Tensor]:
    """The loop of `generate_steps`; `choose` makes `int64[B]` of `float32[B, V]`."""
    batch, length = input_ids.shape
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None  # no padding: nothing to carry along
    cache = model.make_cache(batch, length + max_new_tokens - 1)  # the last token is never fed
    done = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
    for _ in range(max_new_tokens):
        with torch.inference_mode():
            out = model(input_ids, pixel_values, attention_mask, cache=cache, logits_to_keep=1)
            logits = out.logits[:, -1]  # (B, V)
            token = choose(logits).masked_fill(done, 0)  # (B,)
            if log_probs is not None:
                log_prob = logits.float().log_softmax(-1).gather(-1, token[:, None])[:, 0]
                log_probs.append(log_prob.masked_fill(done, 0))
            done = done | (token == eos_token_id)
        yield token.clone()  # outside: an ordinary tensor, which its reader may change
        if bool(done.all()):
            return
        input_ids, pixel_values = token[:, None], None
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(batch, 1)], dim=1)


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
    pixel_values: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    eos_token_id: int = 1,
    log_probs: list[torch.Tensor] | None = None,
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
    )


def generate(
    model: PaliGemma,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    eos_token_id: int = 1,
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
