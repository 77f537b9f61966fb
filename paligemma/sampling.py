# Exported from notebooks/17_sampling.ipynb — edit there, then run `make sync`.
"""From logits to the next token: greedy, temperature, top-k and top-p."""

import math
from numbers import Real
from typing import TypeGuard

import torch

from paligemma.support.files import shorten


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


FEW = 1024  # almost always the nucleus is among so many; only else is the whole row sorted


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
    total = logits.float().logsumexp(-1, keepdim=True)  # [B, 1], in float32: V small numbers
    for count in sorted({min(FEW, logits.shape[-1]), logits.shape[-1]}):
        largest, order = logits.topk(count)  # [B, count], in falling order
        probability = (largest.float() - total).exp()
        before = probability.cumsum(-1) - probability  # mass of everything more likely
        if bool((before[..., -1] >= top_p).all()):
            break
    keep = before.lt(top_p)
    keep[..., 0] = True  # even for a top_p that is 0 in float32
    drop = torch.ones_like(logits, dtype=torch.bool).scatter(-1, order, ~keep)
    return logits.masked_fill(drop, -torch.inf)


def multinomial(
    probability: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Throw one dart at each row's ruler, on which token i has a part of length p(i).

    Args:
        probability: `float32[B, V]`, at least 0; rows need not sum to 1.
        generator: source of randomness, on the device of `probability`; None: torch's default.

    Returns:
        `int64[B]`; a token of probability 0 is never drawn.
    """
    end = probability.cumsum(-1)  # [B, V], where each part ends
    # However sums are rounded: ends never fall, and an impossible token has no length at all.
    end = end.masked_fill(probability == 0, 0).cummax(-1).values
    dart = torch.rand(len(end), 1, generator=generator, device=end.device)  # in [0, 1)
    return torch.searchsorted(end, dart * end[:, -1:], right=True).squeeze(-1)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number, Python's or numpy's; True and False are none here."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_sampling(temperature: float, top_k: int | None, top_p: float) -> None:
    """Refuse parameters out of range.

    Raises:
        ValueError: temperature below 0 or not finite, top_k below 1, top_p outside (0, 1].
    """
    if not (is_number(temperature) and 0 <= temperature < math.inf):
        raise ValueError(
            f"temperature is {shorten(temperature)}; expected 0 (greedy) or a positive number"
        )
    whole = is_number(top_k) and 1 <= top_k < math.inf and top_k == int(top_k)
    if not (top_k is None or whole):
        raise ValueError(f"top_k is {shorten(top_k)}; expected a whole number from 1 up, or None")
    if not (is_number(top_p) and 0 < top_p <= 1):
        raise ValueError(f"top_p is {shorten(top_p)}; expected more than 0 and at most 1")


def _check_logits(logits: torch.Tensor, largest: torch.Tensor) -> None:
    """One row a text, and in each row something to choose from."""
    if logits.dim() != 2:
        raise ValueError(
            f"logits are {list(logits.shape)}; expected [B, V], one row a text: take the last "
            "position, logits[:, -1]"
        )
    if not all(map(math.isfinite, largest.flatten().tolist())):
        raise ValueError(
            "logits hold NaN or infinity, or -infinity only; a weight or an input is broken, or "
            "float16 overflowed: compute in bfloat16 or float32; check_finite names the module"
        )


def sample(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Choose the next token of each row: temperature, then top-k, then top-p, then a draw.

    Args:
        logits: `float[B, V]`; -inf forbids a token.
        temperature: 0 takes the most likely token and draws nothing.
        top_k: keep so many tokens; None keeps all.
        top_p: keep the most likely tokens up to this probability mass, in (0, 1].
        generator: source of randomness, on the device of `logits`; None: torch's default.

    Returns:
        `int64[B]`.

    Raises:
        ValueError: a parameter out of range, logits of another shape, NaN or +inf among them.
    """
    check_sampling(temperature, top_k, top_p)
    largest, token = logits.max(-1, keepdim=True)  # [B, 1]
    _check_logits(logits, largest)
    if temperature == 0:
        return token.squeeze(-1)
    # Less the largest first: near 0, numbers keep more digits. And float32 has no 1e-50.
    logits = (logits.float() - largest.float()) / min(max(temperature, 1e-30), 1e30)
    if top_k is not None:
        logits = keep_top_k(logits, int(top_k))
    return multinomial(keep_top_p(logits, top_p).softmax(-1), generator)
