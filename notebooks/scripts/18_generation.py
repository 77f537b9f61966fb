# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["navigation"]
# [← Sampling](17_sampling.ipynb) | [contents](../README.md) | [Inference →](22_inference.ipynb)

# %% [markdown]
# # 18 · Generation: how does one forward pass become an answer?
#
# *35 minutes* · part IV, Answering

# %%
#| export
"""Prefill once, then one token at a time: batches, streaming, stopping."""

from collections.abc import Iterable, Iterator

import torch

from paligemma.model import PaliGemma
from paligemma.sampling import check_sampling, sample
from paligemma.tokenizer import Tokenizer


# %%
#| export
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
) -> Iterator[torch.Tensor]:
    """Yield `int64[B]`, the next token of every row, until every row has ended.

    The picture and the prompt are read once (prefill); after that each step reads one token a
    row and the cache. A row that has ended yields 0 (pad). Arguments as in `generate`.
    """
    check_sampling(temperature, top_k, top_p)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    batch, length = input_ids.shape
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None  # no padding: nothing to carry along
    cache = model.make_cache(batch, length + max_new_tokens)
    done = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
    for _ in range(max_new_tokens):
        with torch.inference_mode():
            out = model(input_ids, pixel_values, attention_mask, cache=cache, logits_to_keep=1)
            token = sample(out.logits[:, -1], temperature, top_k, top_p, generator)
            token = token.masked_fill(done, 0)
            done = done | (token == eos_token_id)
        yield token
        if bool(done.all()):
            return
        input_ids, pixel_values = token[:, None], None
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(batch, 1)], dim=1)


# %%
#| export
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


# %%
#| export
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
