# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags
#     comment_magics: false
#     notebook_metadata_filter: kernelspec
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["navigation"]
# [← Checkpoint](16_checkpoint.ipynb) | [contents](00_overview.ipynb) | [Generation →](18_generation.ipynb)

# %% [markdown]
# # 17 · Sampling: how does a distribution become a word?
#
# *45 minutes* · part IV, Answering
#
# **What you will be able to do**
#
# - turn three logits into a probability, a ruler and a drawn word, with a pencil;
# - say what temperature, top-k and top-p each do to the same distribution, and in which order;
# - choose one of 257,216 tokens without sorting them;
# - recognise a top-p that crashes on *easy* questions.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("sampling")

# %% [markdown]
# ## Setup
#
# The trained model of this course gives us real distributions: [lesson 16](16_checkpoint.ipynb) loads it, [lesson 14](14_processor.ipynb) prepares its pictures. The result is [sampling.py](../paligemma/sampling.py).

# %%
#| export
"""From logits to the next token: greedy, temperature, top-k and top-p."""

import math
from numbers import Real
from typing import TypeGuard

import torch

from paligemma.support.files import shorten

# %% tags=["setup"]
import time
from importlib import resources

import matplotlib.pyplot as plt
from safetensors.torch import load_file

from paligemma.checkpoint import load_model
from paligemma.processor import Processor
from paligemma.support.course import check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS, CYCLE

tiny = resources.files("paligemma") / "assets" / "tiny"
model, processor = load_model(tiny), Processor.from_pretrained(tiny)
torch.manual_seed(17)
torch.set_printoptions(precision=3, sci_mode=False)

# %% [markdown]
# ## The problem
#
# The model does not say a word. For each position it gives one number for *every* token it knows: the logits. We show it two pictures and ask for a caption that begins with "a". Which token comes next? One picture is from its world of small emoji; the other, a photograph, is like nothing it has seen.


# %%
def next_logits(picture, said, model=model):
    """float32[V]: the logits after the prompt `caption en` and the words said so far."""
    batch = processor([sample_picture(picture)], ["caption en"], suffixes=[said])
    del batch["labels"]
    with torch.no_grad():
        return model(**batch).logits[0, -2]  # the last position reads <eos>; we stop before it


def spell(token):
    return processor.tokenizer.decode([int(token)]).strip() or "(end)"


# %%
known, photo = next_logits("scene2", "a"), next_logits("cat", "a")
for name, logits in (("scene2", known), ("cat", photo)):
    chances, ids = logits.softmax(-1).topk(6)
    print(f"{name:6}", *(f"{spell(i)} {c:.3f}" for i, c in zip(ids, chances.tolist())), sep="  ")
assert known.softmax(-1).max() > 0.9 and photo.softmax(-1).max() < 0.5

# %% tags=["hide-input"]
widths = (2, 3, 2, 3, 4)
fig, axes = plt.subplots(1, 5, figsize=(9.8, 2.5), layout="constrained", width_ratios=widths)
for ax, name, logits in ((axes[:2], "scene2", known), (axes[2:4], "cat", photo)):
    chances, ids = logits.softmax(-1).topk(7)
    ax[0].imshow(sample_picture(name).resize((160, 160)))
    ax[0].set_title('"a …"')
    ax[0].set_axis_off()
    ax[1].barh([spell(i) for i in ids], chances, color=COLOURS["language"])
    ax[1].set(xlim=(0, 1), xlabel="probability")
    ax[1].invert_yaxis()
place = torch.arange(1, len(photo) + 1)
for name, logits, colour in (("scene2", known, "vision"), ("cat", photo, "accent")):
    falling = logits.softmax(-1).sort(descending=True).values
    axes[4].loglog(place, falling, color=COLOURS[colour], label=name)
axes[4].legend(loc="lower left", fontsize=9)
axes[4].set(xlabel="place in the order", title="all tokens", ylim=(1e-13, 3))
axes[4].set_yticks([1, 1e-6, 1e-12])
axes[4].minorticks_off()
save_figure(fig, "17_two_pictures")

# %%
tail = int((photo.softmax(-1) < 0.001).sum())
print(f"of {len(photo)} tokens {tail} are less likely than 0.001 after the photograph")
assert tail > 2000

# %% [markdown]
# Left the model is sure. In the middle it is not: some tokens share the probability. And behind them stands a **long tail** of tokens that are nearly impossible (right; each step of an axis is a factor). Out of such a row of numbers **one** token has to be chosen. That choice is not part of the network: it has no weights, and you may change it for each question.

# %% [markdown]
# ## By hand: three words
#
# Say the logits of *cat*, *dog* and *bee* are 2, 1 and 0. Softmax turns them into probabilities: $p_i = e^{x_i} / \sum_j e^{x_j}$. With $e \approx 2.718$, the three numerators are $e^2 = 7.389$, $2.718$ and $1$.

# %%
x = torch.tensor([2.0, 1, 0])
p = x.exp() / x.exp().sum()
ends = p.cumsum(0)
print("probabilities:", p.numpy().round(3), "running sums:", ends.numpy().round(3))

# %% [markdown]
# Greedy takes the largest: *cat*, always. To **draw**, lay the three end to end on a ruler of length 1 and throw a dart that lands anywhere with equal chance. The longer a part, the likelier it is hit. The parts end at the running sums.

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7, 1.4), layout="constrained")
for word, length, end, colour in zip(("cat", "dog", "bee"), p.tolist(), ends.tolist(), CYCLE):
    ax.barh(0, length, left=end - length, color=colour, edgecolor="white", height=0.5)
    ax.text(end - length / 2, 0, word, ha="center", va="center", color="white")
dart = 0.71
ax.annotate("dart 0.71", (dart, 0.22), (dart, 0.62), ha="center", arrowprops={"arrowstyle": "-|>"})
ax.set(xlim=(0, 1), ylim=(-0.3, 0.8), xticks=[0, *(round(e, 3) for e in ends.tolist())], yticks=[])
ax.spines.left.set_visible(False)
save_figure(fig, "17_ruler")

# %% [markdown]
# ### Temperature: before the softmax
#
# Divide all logits by the **temperature** $T$. A small $T$ stretches the gaps between them, and the winner takes more. A large $T$ shrinks the gaps. At $T = 1$ you get what the model learned.

# %%
for T in (0.5, 1, 2):
    print(f"T = {T}:", (x / T).softmax(0).numpy().round(3))

# %% [markdown]
# Now the photograph's tokens. Each curve is one token's probability. Read the figure from the left: near 0 there is only the winner (greedy is the limit $T \to 0$), and far to the right all $V$ tokens of the vocabulary approach the same $1/V$.

# %%
temperatures = torch.logspace(-2, 1.3, 150)
curves = (photo / temperatures[:, None]).softmax(-1)  # [150, V]
best = photo.topk(5).indices
rest = 1 - curves[:, best].sum(-1)
at = {T: round(rest[(temperatures - T).abs().argmin()].item(), 2) for T in (1, 3, 10)}
print("all tokens but the best five share:", at)
assert at[1] < 0.5 < at[3] < at[10] and at[10] > 0.9

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7, 2.9), layout="constrained")
for i, word, colour in zip(best.tolist(), map(spell, best), CYCLE):
    ax.plot(temperatures, curves[:, i], color=colour, label=word)
ax.plot(temperatures, rest, color=COLOURS["muted"], ls="--", label="all other tokens")
ax.axvline(1, color=COLOURS["ink"], lw=0.8, ls=":")
ax.set(xscale="log", xlabel="temperature", ylabel="probability", xlim=(0.01, 20), ylim=(0, 1.02))
ax.set_xticks([0.01, 0.03, 0.1, 0.3, 1, 3, 10], ["0.01", "0.03", "0.1", "0.3", "1", "3", "10"])
ax.minorticks_off()
ax.legend(loc="center right", fontsize=9)
save_figure(fig, "17_temperature")

# %% [markdown]
# Look at the dashed line. Each token of the tail is nearly impossible, but there are two thousand (in the real model 257,000). Heat lifts them all: at $T = 10$ they share nearly everything, and a hot model says mostly nonsense. So the tail has to be cut off. Where?

# %% [markdown]
# ### Top-k and top-p
#
# **Top-k** keeps the $k$ most likely tokens, whatever their probabilities. **Top-p** keeps as many as are needed to reach the mass $p$, the **nucleus**: go down from the most likely token, add up, and stop **with** the one that crosses $p$. In both cases the rest gets $-\infty$, and a softmax shares the mass among those that stay.

# %%
p5 = torch.tensor([0.40, 0.30, 0.15, 0.10, 0.05])
running = p5.cumsum(0)
print("mass so far:", running.numpy().round(2))

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7, 2.4), layout="constrained")
for i, (chance, total) in enumerate(zip(p5.tolist(), running.tolist())):
    crosses = total - chance < 0.75 <= total
    kind = "accent" if crosses else "language" if total < 0.75 else "muted"
    ax.bar(i, chance, bottom=total - chance, color=COLOURS[kind], width=0.7)
ax.axhline(0.75, color=COLOURS["ink"], lw=1, ls="--")
ax.text(-0.45, 0.78, "p = 0.75", fontsize=9)
ax.text(2.42, 0.72, "crosses p: stays", color=COLOURS["accent"], fontsize=9, va="top")
ax.set(ylim=(0, 1.05), ylabel="mass so far")
names = ("cat", "dog", "bear", "bee", "bike")
ax.set_xticks(range(5), [f"{name}\n{total:.2f}" for name, total in zip(names, running.tolist())])
save_figure(fig, "17_top_p")

# %% [markdown]
# Three words stay, with 0.85 of the mass. Two would have 0.70, too little: the kept set is the **smallest that reaches** $p$. The word that crosses belongs to it.
#
# ### The order: temperature, top-k, top-p
#
# Top-p counts mass, and temperature moves mass. So it matters who goes first. All common implementations heat first, cut to $k$, then count up to $p$ among what is left.

# %%
x5 = p5.log()
for T in (0.5, 1, 3):
    mass = (x5 / T).softmax(0).cumsum(0)
    print(f"T = {T:3}: {mass.numpy().round(2)}, kept for 0.75: {(mass < 0.75).sum() + 1}")

# %% [markdown]
# ## As a loop
#
# One row, plain Python, in the order above. The dart is an argument, so that we can compare.


# %%
def sample_loop(logits, temperature, top_k, top_p, dart):
    weights = [math.exp(v / temperature) for v in logits]
    order = sorted(range(len(weights)), key=weights.__getitem__, reverse=True)[:top_k]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:  # most likely first
        if mass >= top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    left = dart * sum(weights[i] for i in kept)
    for i in sorted(kept):  # the ruler lists the tokens in the order of the vocabulary
        left -= weights[i]
        if left < 0:
            return i, sorted(kept)


for dart in (0.1, 0.71, 0.99):
    print(f"dart {dart}: word {sample_loop(x.tolist(), 1.0, 3, 1.0, dart)[0]}")
print("kept of five:", sample_loop(x5.tolist(), 1.0, 5, 0.75, 0.0)[1])

# %% [markdown]
# ## Vectorised
#
# For a batch of rows: sort, softmax, running sum. A token stays when the mass **before** it has not yet reached $p$. This way the crossing token stays by itself, and the first one always does, since before it there is nothing. `scatter` brings the decisions back from sorted order to the order of the vocabulary.


# %%
def keep_top_p_sorted(logits, top_p):
    falling, order = logits.sort(dim=-1, descending=True)  # [B, V]
    probability = falling.softmax(-1)
    before = probability.cumsum(-1) - probability
    drop = torch.empty_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return logits.masked_fill(drop, -torch.inf)


# %%
rows = 2 * torch.randn(50, 30)
kept = keep_top_p_sorted(rows / 0.7, 0.8).isfinite()
for row, keep in zip(rows, kept):
    assert sample_loop(row.tolist(), 0.7, 30, 0.8, 0.0)[1] == keep.nonzero().flatten().tolist()
print("50 rows: the same tokens as the loop,", kept.sum(-1).tolist()[:12], "…")

# %% [markdown]
# ## The module, simple form
#
# Top-k needs no sort: `topk` finds the $k$ largest. Everything below the smallest of them goes.


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


# %% [markdown]
# Then the whole is four lines:


# %%
def sample_plain(logits, temperature, top_k, top_p):
    logits = keep_top_k(logits / temperature, top_k)
    logits = keep_top_p_sorted(logits, top_p)
    return torch.multinomial(logits.softmax(-1), 1).squeeze(-1)


# %%
different = []
for T in (0.2, 1, 5):
    drawn = sample_plain(photo.expand(8, -1), T, top_k=len(photo), top_p=0.9)
    print(f"T = {T:3}: a", *map(spell, drawn), sep=" … ")
    different.append(len(drawn.unique()))
assert different[0] < different[2]

# %% [markdown]
# Eight draws for the photograph: cold ones repeat themselves, hot ones come from all over the vocabulary.
#
# ## What a real program adds
#
# ### Speed: no sort, one dart
#
# PaliGemma chooses among 257,216 tokens, once for each token of the answer. What do the steps cost?


# %%
def milliseconds(run, repeat=8):
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


# %%
V = 257216
row = torch.randn(1, V)
row[0, :200] = torch.linspace(18, 8, 200)  # a few likely tokens and a long tail
chances = row.softmax(-1)

# %% tags=["nbval-ignore-output"]
print(f"argmax      {milliseconds(lambda: row.argmax(-1)):6.2f} ms")
print(f"topk 1024   {milliseconds(lambda: row.topk(1024)):6.2f} ms")
print(f"sort        {milliseconds(lambda: row.sort(dim=-1)):6.2f} ms")
print(f"multinomial {milliseconds(lambda: torch.multinomial(chances, 1)):6.2f} ms")

# %% [markdown]
# Sorting is by far the dearest, and top-p seems to need it. But the kept tokens are almost always few! So take the 1,024 largest. If their mass reaches $p$, the decision is made; only a very flat row is sorted whole. The probabilities must be the true ones, so the denominator (`logsumexp`) runs over all tokens.

# %%
#| export
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


# %%
assert torch.equal(keep_top_p(row, 0.9), keep_top_p_sorted(row, 0.9))
for spread in (0.1, 2.0, 10.0):
    wide = spread * torch.randn(3, 5000)
    kept = keep_top_p(wide, 0.9).isfinite()
    assert torch.equal(kept, keep_top_p_sorted(wide, 0.9).isfinite())
    print(f"spread {spread:4}: of 5000 tokens stay", kept.sum(-1).tolist())

# %% [markdown]
# `torch.multinomial` draws a random number for every token of the vocabulary; one dart is enough. `searchsorted` finds the first part that ends beyond it. Sums of floats are rounded, and a token that was cut off must *never* appear, not even once in a million: the second line gives its part no length at all.


# %%
#| export
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


# %% tags=["nbval-ignore-output"]
print(f"top-p with sort {milliseconds(lambda: keep_top_p_sorted(row, 0.9)):6.2f} ms")
print(f"top-p, ours     {milliseconds(lambda: keep_top_p(row, 0.9)):6.2f} ms")
print(f"one dart        {milliseconds(lambda: multinomial(chances)):6.2f} ms")

# %% [markdown]
# ### Care: numbers that are none
#
# Some float16 computation has overflowed, and one logit is NaN. What do the tools make of it?

# %%
broken = torch.tensor([[3.0, torch.nan, 1.0]])
print("argmax:", broken.argmax(-1).item())
assert broken.argmax(-1) == 1

# %% [markdown]
# `argmax` returns the index of the NaN, and the model would answer nonsense instead of an error. So broken logits are refused. Parameters out of range are, too, and not repaired: a `top_p` of 90 is a percentage that someone mistyped.


# %%
#| export
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


# %%
#| export
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


# %% [markdown]
# ### Precision: cold, and in few bits
#
# Dividing by a small temperature makes large numbers, and those have fewer digits after the point. In float16 they become infinite, and a softmax of infinities is no number:

# %%
close = torch.tensor([[20.00, 20.05, 19.90]]).half()
print("plain:", (close / 0.0002).softmax(-1).tolist())
assert (close / 0.0002).softmax(-1).isnan().all()

# %% [markdown]
# Now the whole in order: `sample` computes in float32, and subtracts the largest logit *before* the division. Softmax does not see a common shift, so nothing changes but the rounding.


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


# %%
print("cold float16:", sample(close, temperature=0.0002).tolist())
assert sample(close, temperature=0.0002) == 1
logits = torch.randn(4, 30)
for start in (0, 0, 1):
    generator = torch.Generator().manual_seed(start)
    print(f"generator {start}:", sample(logits, 0.8, 10, 0.9, generator).tolist())
assert torch.equal(sample(logits, temperature=0), logits.argmax(-1))

# %% [markdown]
# The model's logits are float32 ([lesson 15](15_model.ipynb)). Is all well, then, with weights in bfloat16?

# %%
half = load_model(tiny, dtype=torch.bfloat16)
logits = next_logits("cat", "a", half)
print(logits.dtype, "| another rounding changes:", int((logits != logits.bfloat16()).sum()))
assert logits.dtype == torch.float32 and torch.equal(logits, logits.bfloat16().float())

# %% [markdown]
# These float32 numbers hold nothing that bfloat16 could not hold: they were rounded where they were made, in the product with the head's weights, and `.float()` brings nothing back. What it protects is everything *after* it, such as the running sum of many small numbers:

# %%
flat = torch.full((V,), 1 / V)
for dtype in (torch.float32, torch.bfloat16):
    print(f"{dtype!s:15} {V} equal probabilities sum to {flat.to(dtype).cumsum(0)[-1]:.3f}")
assert flat.bfloat16().cumsum(0)[-1] < 0.999 < flat.cumsum(0)[-1]

# %% [markdown]
# ### Does it follow the distribution?
#
# A draw is random, so one result proves nothing. Four thousand do. If $n$ darts are thrown at a part of length $p$, the count strays from $np$ by about $\sqrt{np(1-p)}$. Measured in that unit, most tokens should lie within 2, nearly all within 3.

# %%
chances = keep_top_p(photo[None], 0.9).softmax(-1)[0]  # [V]
n = 4_000
counts = sample(photo.expand(n, -1), top_p=0.9, generator=torch.Generator().manual_seed(0))
counts = counts.bincount(minlength=len(photo))
for i in chances.topk(int((chances > 0).sum())).indices.tolist():
    expected = n * chances[i]
    off = (counts[i] - expected) / (expected * (1 - chances[i])) ** 0.5
    print(f"{spell(i):10} expected {expected:6.1f}, drawn {counts[i]:4}, off by {off:5.2f} units")
    assert abs(off) < 3
assert counts.sum() == n and not counts[chances == 0].any()

# %% [markdown]
# ## Against the reference
#
# The stored file holds random logits and, for five settings, the probabilities from which transformers draws. We catch ours just before the dart. The same tokens must stay, with the same probabilities.

# %%
reference = load_file("reference/sampling.safetensors")
for case in range(5):
    T, k, top_p = (round(v, 2) for v in reference[f"case{case}.parameters"].tolist())
    logits = reference["logits"] / T
    logits = keep_top_k(logits, int(k)) if k else logits  # 0: no top-k
    ours = keep_top_p(logits, top_p).softmax(-1)
    theirs = reference[f"case{case}.probability"]
    assert torch.equal(ours > 0, theirs > 0)
    gap = (ours - theirs).abs().max().item()
    assert gap <= 1e-6
    print(f"T {T}, k {k:.0f}, p {top_p}: kept {(ours > 0).sum(-1).tolist()}, largest gap {gap:.1e}")

# %% [markdown]
# ## See it: sure, less sure, at a loss
#
# How many tokens does top-p keep? We ask the trained model three times for the token after "a": for its own scene, for the photograph, and for the photograph with the temperature at 2.

# %%
cases = {"scene, T = 1": known, "photograph, T = 1": photo, "photograph, T = 2": photo / 2}
kept = {}
for title, logits in cases.items():
    kept[title] = [int(keep_top_p(logits[None], p).isfinite().sum()) for p in (0.5, 0.9, 0.99)]
    print(f"{title:18} tokens kept by 0.5, 0.9 and 0.99: {kept[title]}")
assert kept["scene, T = 1"] == [1, 1, 1] and kept["photograph, T = 2"][2] > 100

# %% tags=["hide-input"]
grid = torch.linspace(0.01, 0.999, 300)
fig, axes = plt.subplots(1, 2, figsize=(7.4, 2.9), layout="constrained")
for (title, logits), colour in zip(cases.items(), CYCLE):
    falling = logits.softmax(-1).sort(descending=True).values
    number = torch.stack([keep_top_p(logits[None], p).isfinite().sum() for p in grid.tolist()])
    assert (falling.cumsum(0)[number - 1] > grid - 1e-6).all()
    axes[0].plot(grid, number, color=colour, label=title)
    axes[1].plot(grid, falling.cumsum(0)[number - 1], color=colour, drawstyle="steps-post")
axes[0].set(yscale="log", xlabel="top_p", ylabel="tokens kept")
axes[0].legend(fontsize=9)
axes[1].plot([0, 1], [0, 1], color=COLOURS["muted"], lw=1, ls=":")
axes[1].set(xlabel="top_p", ylabel="mass kept", ylim=(0, 1.03))
save_figure(fig, "17_kept")

# %% [markdown]
# What to notice: left, one setting of `top_p` keeps one token where the model is sure and many where it is not. Top-k could not: $k = 5$ is four too many for the scene. **Top-k fixes a number; top-p asks the model.**
#
# Right, every curve lies *on or above* the diagonal: the kept mass reaches $p$, and overshoots by the token that crosses.

# %% [markdown]
# ## At full size
#
# Sampling has no weights; what it reads is logits. How much memory do they take, if all positions of a batch of 64 prompts of 300 tokens were computed?

# %%
print(f"one row: {4 * V / 1e6:.2f} MB; 64 × 300 positions: {4 * V * 64 * 300 / 1e9:.1f} GB")
assert round(4 * V * 64 * 300 / 1e9) == 20

# %% [markdown]
# So the model computes the last position only, unless it is asked for more ([lesson 12](12_gemma.ipynb)).
#
# ## A bug people really make: top-p that crashes on easy questions
#
# A colleague's top-p has been in use for weeks, on photographs, without trouble. Today someone asks about a simple scene, and it dies. Here is the symptom, token by token:


# %%
def keep_top_p_colleague(logits, top_p):
    falling, order = logits.sort(dim=-1, descending=True)
    mass = falling.softmax(-1).cumsum(-1)
    drop = torch.empty_like(mass, dtype=torch.bool).scatter(-1, order, mass > top_p)
    return logits.masked_fill(drop, -torch.inf)


# %%
beginnings = [("cat", ""), ("cat", "a"), ("scene2", "a"), ("scene2", "a bee and")]
for picture, said in beginnings:
    probability = keep_top_p_colleague(next_logits(picture, said)[None], 0.9).softmax(-1)
    try:
        token = spell(torch.multinomial(probability, 1))
    except RuntimeError as error:
        token = f"RuntimeError: {str(error).split(' contains')[0]} …"
    print(f"{picture:6} {said!r:12} → {token}")

# %% [markdown]
# The surer the model, the surer the crash. Compare how many tokens each version keeps:

# %%
for picture, said in beginnings:
    logits = next_logits(picture, said)[None]
    right, wrong = (
        int(f(logits, 0.9).isfinite().sum()) for f in (keep_top_p, keep_top_p_colleague)
    )
    print(f"{picture:6} largest {logits.softmax(-1).max():.3f}, kept {right}, colleague {wrong}")
    assert wrong == right - 1

# %% [markdown]
# `mass > top_p` drops the token that *crosses* $p$. Where the first one alone exceeds $p$, nothing stays; the softmax of nothing but $-\infty$ is 0/0. And in all other rows one token too few was kept, for weeks, and nobody saw it.
#
# The rule: decide by the mass **before** a token, not by the mass including it.

# %% [markdown]
# ### A second one: top-p before temperature
#
# Both orders run, and at $T = 1$ they agree. Cut first and heat later, and the set is chosen from a distribution that nobody will draw from:

# %%
for T in (0.5, 1.0, 2.0):
    right = int(keep_top_p(photo[None] / T, 0.9).isfinite().sum())
    wrong = int(keep_top_p(photo[None], 0.9).isfinite().sum())
    print(f"T = {T}: kept {right:3}, cut first {wrong:3}")
    assert wrong == right if T == 1 else (wrong > right if T < 1 else wrong < right)

# %% [markdown]
# With the wrong order too many stay at a low temperature, and at a high one the answers are less varied than asked for.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): how many stay?
#
# Five words have the probabilities 0.5, 0.2, 0.15, 0.1, 0.05. Without running anything, how many are kept
#
# - `a`: by `top_p` = 0.6;
# - `b`: by `top_k` = 2 and then `top_p` = 0.7;
# - `c`: by $T = 0.5$ and then `top_p` = 0.7? ($T = 0.5$ squares the probabilities.)

# %% tags=["exercise"]
a, b, c = None, None, None  # three whole numbers


# %% tags=["check"]
def test_1(a, b, c):
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()
    count = lambda logits, p: int(keep_top_p(logits, p).isfinite().sum())
    assert all(type(v) is int for v in (a, b, c)), "give three whole numbers"
    assert a == count(logits, 0.6), "a: add up from the largest until 0.6 is reached"
    assert b == count(keep_top_k(logits, 2), 0.7), (
        "b: the two that k leaves share all the mass anew"
    )
    assert c == count(logits / 0.5, 0.7), "c: squares first, then divide by their sum"


check(test_1, a, b, c)

# %% [markdown]
# <details><summary>Hint</summary>
#
# After a cut, the mass is shared anew: for `b` divide by 0.7. For `c` the squares are 0.25, 0.04, 0.0225, 0.01, 0.0025, and their sum is 0.325.
#
# </details>

# %% tags=["solution"]
# a: 0.5 is too little, 0.7 is enough. b: 0.5 / 0.7 = 0.714. c: 0.25 / 0.325 = 0.769.
a, b, c = 2, 1, 1
check(test_1, a, b, c)

# %% [markdown]
# ### Exercise 2 (write): min-p
#
# A younger rule: keep every token whose probability is at least `min_p` times that of the most likely one. Write it for `float[B, V]` logits: the kept logits as they were, the others $-\infty$. No softmax is needed. Why?


# %% tags=["exercise"]
def keep_min_p(logits, min_p):
    return None  # your code: two lines


# %% tags=["check"]
def test_2(keep_min_p):
    cases = (
        torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log(),
        3 * torch.randn(6, 40),
        torch.zeros(2, 5),
    )
    for logits in cases:
        for min_p in (0.01, 0.2, 0.55, 1.0):
            before = logits.clone()
            result = keep_min_p(logits, min_p)
            assert isinstance(result, torch.Tensor), "return a tensor"
            assert result.shape == logits.shape, f"shape {list(result.shape)}"
            assert torch.equal(logits, before), "the logits that came in were changed"
            probability = logits.softmax(-1)
            keep = probability >= min_p * probability.amax(-1, keepdim=True) * (1 - 1e-6)
            found = result > -torch.inf
            assert found[probability == probability.amax(-1, keepdim=True)].all(), (
                f"min_p {min_p}: the most likely token has to stay"
            )
            assert not (found & ~keep).any(), f"min_p {min_p}: an unlikely token stays"
            assert torch.equal(found, keep), f"min_p {min_p}: a token is lost that is likely enough"
            assert torch.equal(result[keep], logits[keep]), "kept logits have to stay as they were"


check(test_2, keep_min_p)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A ratio of probabilities is a difference of logits: $p_i / p_{max} = e^{x_i - x_{max}}$. The sum in the softmax cancels. Take the logarithm of `min_p`; a little slack (1e-6) helps against rounding at equality.
#
# </details>


# %% tags=["solution"]
# A ratio of two probabilities is a difference of two logits: the softmax's sum cancels.
def keep_min_p(logits, min_p):
    gap = logits - logits.amax(-1, keepdim=True)
    return logits.masked_fill(gap < torch.tensor(min_p).log() - 1e-6, -torch.inf)


check(test_2, keep_min_p)

# %% [markdown]
# ### Exercise 3 (break): write the test that was missing
#
# Return True if a `keep(logits, top_p)` is right, and False if not. The check tries yours on two right versions and on four wrong ones: the colleague's, one that always drops the crossing token but never the first, one that keeps a token too many, and one that sorts but forgets to go back to the order of the vocabulary.


# %% tags=["exercise"]
def is_right(keep):
    return None  # call keep on logits of your choice


# %% tags=["check"]
def test_3(is_right):
    def never_empty(logits, top_p):
        top = logits == logits.amax(-1, keepdim=True)
        return torch.where(top, logits, keep_top_p_colleague(logits, top_p))

    def one_more(logits, top_p):
        return keep_top_k(logits, int(keep_top_p(logits, top_p).isfinite().sum(-1).max()) + 1)

    def unsorted(logits, top_p):
        return keep_top_p(logits.sort(dim=-1, descending=True).values, top_p)

    for name, keep in {"the sorted version": keep_top_p_sorted, "the module": keep_top_p}.items():
        assert isinstance(is_right(keep), bool), "return True or False"
        assert is_right(keep) is True, f"rejects what is right: {name}"
    for name, keep in {
        "the colleague's": keep_top_p_colleague,
        "never empty, but the crossing token is dropped": never_empty,
        "one token too many": one_more,
        "not back in the order of the vocabulary": unsorted,
    }.items():
        assert is_right(keep) is False, f"lets this one through: {name}"


check(test_3, is_right)

# %% [markdown]
# <details><summary>Hint</summary>
#
# One row is enough if its tokens are not in falling order. Choose probabilities whose running sums are far from `top_p`, write down by hand which stay, and compare with `.isfinite().tolist()`.
#
# </details>


# %% tags=["solution"]
# Not in falling order, more than one to keep, and more left over: each wrong version shows itself.
def is_right(keep):
    logits = torch.tensor([[0.15, 0.40, 0.05, 0.30, 0.10]]).log()
    return keep(logits, 0.6).isfinite().tolist() == [[False, True, False, True, False]]


check(test_3, is_right)

# %% [markdown]
# ## Summary
#
# - A model gives a distribution; the choice of a token is yours, and has no weights.
# - A draw is a dart on a ruler whose parts are the probabilities.
# - Temperature moves mass, top-k fixes a number, top-p asks the model. In this order.
# - The token that crosses $p$ stays. Decide by the mass *before* it.
# - Never sort 257,216 numbers to keep ten of them.

# %% [markdown]
# ## Quiz
#
# **1.** PaliGemma is nearly always run with temperature 0. Why is that good for "detect cat" and less so for a story?
#
# <details><summary>Answer</summary>
#
# A box or a number has one right answer, and the most likely token is the best guess. A text has many good continuations; always taking the most likely one gives flat and often repeated sentences.
#
# </details>

# %% [markdown]
# **2.** Is the most likely *sentence* found by taking the most likely token each time?
#
# <details><summary>Answer</summary>
#
# No. A likely first token may have only unlikely continuations. With probabilities 0.6 and then 0.5, the greedy sentence has 0.3; another beginning with 0.4 and then 1.0 has 0.4. Beam search looks at several beginnings at once, at several times the cost.
#
# </details>

# %% [markdown]
# **3.** With `top_p` = 0.9 on two different rows, one keeps 1 token and one keeps 2,000. How can both be right, and which takes longer in our version?
#
# <details><summary>Answer</summary>
#
# In the first row the model is sure, in the second it is not: the nucleus follows the distribution. The second exceeds 1,024 tokens, so the whole row is ordered, which costs as much as the sort that we wanted to avoid. It is rare.
#
# </details>

# %% [markdown]
# ## References
#
# - Holtzman et al. 2020, *The Curious Case of Neural Text Degeneration* ([arXiv 1904.09751](https://arxiv.org/abs/1904.09751)), section 3: nucleus sampling.
# - Fan et al. 2018, *Hierarchical Neural Story Generation* ([arXiv 1805.04833](https://arxiv.org/abs/1805.04833)), section 5: top-k.
# - Nguyen et al. 2024, *Min-p sampling* ([arXiv 2407.01082](https://arxiv.org/abs/2407.01082)).
# - `TemperatureLogitsWarper`, `TopKLogitsWarper` and `TopPLogitsWarper` in transformers, `generation/logits_process.py`.

# %% [markdown] tags=["navigation"]
# [← Checkpoint](16_checkpoint.ipynb) | [contents](00_overview.ipynb) | [Generation →](18_generation.ipynb)
