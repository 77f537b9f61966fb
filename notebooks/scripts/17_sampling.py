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
# [← Checkpoint](16_checkpoint.ipynb) | [contents](../README.md) | [Generation →](18_generation.ipynb)

# %% [markdown]
# # 17 · Sampling: how does a distribution become a word?
#
# *30 minutes* · part IV, Answering

# %%
#| export
"""From logits to the next token: greedy, temperature, top-k and top-p."""

import torch


# %%
#| export
def keep_top_k(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Set all but the `top_k` largest logits of each row to -inf.

    Args:
        logits: `float[B, V]`.
        top_k: how many stay; at least 1, and more than V keeps all.

    Returns:
        `float[B, V]`; where the last place is shared, all that share it stay.

    Source: Fan et al. 2018, section 5.
    """
    smallest = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


# %%
#| export
def keep_top_p(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the smallest set of most likely tokens whose probabilities reach `top_p`.

    The token that crosses `top_p` belongs to the set, so at least one token stays.

    Args:
        logits: `float[B, V]`, already divided by the temperature.
        top_p: in (0, 1]; 1 keeps all.

    Returns:
        `float[B, V]` with -inf elsewhere.

    Source: Holtzman et al. 2020 (nucleus sampling), section 3.1.
    """
    if top_p >= 1:
        return logits
    sorted_logits, order = logits.sort(dim=-1, descending=True, stable=True)
    probability = sorted_logits.softmax(-1)
    before = probability.cumsum(-1) - probability  # mass of everything more likely
    drop = before >= top_p
    drop[..., 0] = False
    return logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)


# %%
#| export
def check_sampling(temperature: float, top_k: int | None, top_p: float) -> None:
    """Refuse parameters out of range.

    Raises:
        ValueError: temperature below 0 or not finite, top_k below 1, top_p outside (0, 1].
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected 0 (greedy) or a positive number")
    if top_k is not None and (top_k < 1 or top_k != int(top_k)):
        raise ValueError(f"top_k is {top_k}; expected a whole number of at least 1, or None")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected more than 0 and at most 1")


# %%
#| export
def sample(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Choose the next token of each row: temperature, then top-k, then top-p, then a draw.

    Args:
        logits: `float[B, V]`.
        temperature: 0 takes the most likely token and draws nothing.
        top_k: keep so many tokens; None keeps all.
        top_p: keep the most likely tokens up to this probability mass, in (0, 1].
        generator: source of randomness, on the device of `logits`; None: torch's default.

    Returns:
        `int64[B]`.

    Raises:
        ValueError: a parameter out of range.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    # Subtracting the largest first keeps a tiny temperature from overflowing.
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None:
        logits = keep_top_k(logits, int(top_k))
    probability = keep_top_p(logits, top_p).softmax(-1)
    return torch.multinomial(probability, 1, generator=generator).squeeze(-1)
