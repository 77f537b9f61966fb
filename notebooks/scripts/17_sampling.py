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
# The tiny trained model that ships with this course gives us real distributions: lesson [16](16_checkpoint.ipynb) loads it, lesson [14](14_processor.ipynb) prepares its pictures. The first cell becomes the opening lines of [sampling.py](../paligemma/sampling.py).

# %%
#| export
"""From logits to the next token: greedy, temperature, top-k and top-p."""

import math
from numbers import Real
from typing import TypeGuard

import torch

# %% tags=["setup"]
import time
from importlib import resources

import matplotlib.pyplot as plt
from safetensors.torch import load_file

from paligemma.checkpoint import load_model
from paligemma.support.course import check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS, CYCLE
from paligemma.processor import Processor

tiny = resources.files("paligemma") / "assets" / "tiny"
model, processor = load_model(tiny), Processor.from_pretrained(tiny)
torch.manual_seed(17)
torch.set_printoptions(precision=3, sci_mode=False)

# %% [markdown]
# ## The problem
#
# The model does not say a word. For each position it gives one number for *every* token it knows: the **logits**. We show it two pictures and ask for a caption that begins with "a". Which word comes next? One picture is from its world of small emoji; the other, a photograph, is like nothing it has seen.


# %%
def next_logits(picture, said, model=model):
    """float32[V]: the logits after the prompt `caption en` and the words said so far."""
    batch = processor([sample_picture(picture)], ["caption en"], suffixes=[said])
    del batch["labels"]
    with torch.no_grad():
        return model(**batch).logits[0, -2]  # the last position reads <eos>; we stop before it


known, photo = next_logits("scene2", "a"), next_logits("cat", "a")
words = {}
for name, logits in (("scene2", known), ("cat", photo)):
    chances, ids = logits.softmax(-1).topk(7)
    words[name] = [processor.tokenizer.decode([i]).strip() or "(end)" for i in ids.tolist()]
    print(f"{name:6}", *(f"{w} {c:.3f}" for w, c in zip(words[name], chances.tolist())), sep="  ")

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 5, figsize=(9, 2.3), layout="constrained", width_ratios=(2, 3, 2, 3, 4))
for ax, name, logits in ((axes[:2], "scene2", known), (axes[2:4], "cat", photo)):
    ax[0].imshow(sample_picture(name).resize((160, 160)))
    ax[0].set_title('"a …"')
    ax[0].set_axis_off()
    ax[1].barh(words[name], logits.softmax(-1).topk(7).values, color=COLOURS["language"])
    ax[1].set(xlim=(0, 1), xlabel="probability")
    ax[1].invert_yaxis()
rank = torch.arange(1, len(photo) + 1)
for name, logits, colour in (("scene2", known, "vision"), ("cat", photo, "accent")):
    falling = logits.softmax(-1).sort(descending=True).values
    axes[4].loglog(rank, falling, color=COLOURS[colour], label=name)
axes[4].legend(loc="lower left", fontsize=9)
axes[4].set(xlabel="rank of the word", title="all words", ylim=(1e-13, 3), yticks=[1, 1e-6, 1e-12])
axes[4].minorticks_off()
save_figure(fig, "17_two_pictures")

# %%
tail = photo.softmax(-1) < 0.001
print("words in all:", len(photo), "| words below 0.001:", int(tail.sum()))
assert known.softmax(-1).max() > 0.9 > photo.softmax(-1).max() and tail.sum() > 2000

# %% [markdown]
# Left the model is sure. In the middle it is not: some words share the probability. And behind them stands a **long tail** of words that are nearly impossible, two thousand here (right; each step of an axis is a factor). Out of such a row of numbers **one** token has to be chosen. That choice is not part of the network: it has no weights, and you may change it for each question.

# %% [markdown]
# ## By hand: three words
#
# Say the logits of *cat*, *dog* and *bee* are 2, 1 and 0. **Softmax** turns them into probabilities: $p_i = e^{x_i} / \sum_j e^{x_j}$. With $e \approx 2.718$, the three numerators are $e^2 = 7.389$, $2.718$ and $1$.

# %%
x = torch.tensor([2.0, 1, 0])
print("numerators:   ", x.exp().tolist())
p = x.exp() / x.exp().sum()
print("probabilities:", [round(v, 3) for v in p.tolist()])

# %% [markdown]
# **Greedy** takes the largest: *cat*, always. To **draw**, lay the three as pieces on a ruler of length 1 and throw a dart that lands anywhere with equal chance. The longer the piece, the likelier it is hit. The ends of the pieces are the running sums.

# %%
ends = p.cumsum(0)
print("ends of the pieces:", [round(end, 3) for end in ends.tolist()])

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
# Divide all logits by $T$. A small $T$ stretches the gaps between them, and the winner takes more. A large $T$ shrinks the gaps. At $T = 1$ you get what the model learned.

# %%
for T in (0.5, 1, 2):
    print(f"T = {T}:", [round(v, 3) for v in (x / T).softmax(0).tolist()])

# %% [markdown]
# Now the photograph's words. Each curve is one word's probability; read the figure from the left: near 0 there is only the winner (greedy is the limit $T \to 0$), and far to the right all words of the vocabulary come to the same $1/V$.

# %%
temperatures = torch.logspace(-2, 1.3, 150)
curves = (photo / temperatures[:, None]).softmax(-1)  # (150, V)
best = photo.topk(5).indices
rest = 1 - curves[:, best].sum(-1)
at = {T: round(rest[(temperatures - T).abs().argmin()].item(), 2) for T in (1, 3, 10)}
print("all words but the best five:", at)
assert at[1] < 0.5 < at[3] < at[10] and at[10] > 0.9

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7, 2.9), layout="constrained")
for i, word, colour in zip(best.tolist(), words["cat"], CYCLE):
    ax.plot(temperatures, curves[:, i], color=colour, label=word)
ax.plot(temperatures, rest, color=COLOURS["muted"], ls="--", label="all other words")
ax.axvline(1, color=COLOURS["ink"], lw=0.8, ls=":")
ax.set(xscale="log", xlabel="temperature", ylabel="probability", xlim=(0.01, 20), ylim=(0, 1.02))
ax.set_xticks([0.01, 0.03, 0.1, 0.3, 1, 3, 10], ["0.01", "0.03", "0.1", "0.3", "1", "3", "10"])
ax.minorticks_off()
ax.legend(loc="center right", fontsize=9)
save_figure(fig, "17_temperature")

# %% [markdown]
# Look at the dashed line. Each word of the tail is nearly impossible, but there are two thousand (in the real model 257,000). Heat lifts them all: what they share is little at $T = 1$ and nearly everything at $T = 10$, and a hot model says mostly nonsense. So the tail has to be cut off. Where?

# %% [markdown]
# ### Top-k and top-p
#
# **Top-k** keeps the $k$ most likely words, whatever their probabilities. **Top-p** (nucleus sampling) keeps as many as are needed to reach the mass $p$: go down from the most likely word, add up, and stop **with** the word that crosses $p$. In both cases the rest gets $-\infty$, and a softmax shares the mass among those that stay.

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
for title, logits in (("T = 1", x5), ("T = 0.5", x5 / 0.5), ("T = 3", x5 / 3)):
    mass = logits.softmax(0).cumsum(0)
    print(
        f"{title:8} running sums {mass.numpy().round(2)}, kept for 0.75: {(mass < 0.75).sum() + 1}"
    )

# %% [markdown]
# ## As a loop
#
# One row, plain Python, in the order above. The dart is an argument, so that we can compare.


# %%
def sample_loop(logits, temperature, top_k, top_p, dart):
    weights = {i: torch.tensor(v / temperature).exp().item() for i, v in enumerate(logits)}
    order = sorted(weights, key=weights.get, reverse=True)[:top_k]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:  # most likely first
        if mass >= top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    kept.sort()  # the ruler lists the words in the order of the vocabulary
    left = dart * sum(weights[i] for i in kept)
    for i in kept:
        left -= weights[i]
        if left < 0:
            return i, kept
    return kept[-1], kept


for dart in (0.1, 0.71, 0.99):
    print(f"dart {dart}: word {sample_loop(x.tolist(), 1.0, 3, 1.0, dart)[0]}")
print("kept of five:", sample_loop(x5.tolist(), 1.0, 5, 0.75, 0.0)[1])

# %% [markdown]
# ## Vectorised
#
# For a batch of rows: sort, softmax, running sum. A word stays when the mass **before** it has not yet reached $p$. This way the crossing word stays by itself, and the first word always does, since before it there is nothing. `scatter` brings the decisions back from sorted order to the order of the vocabulary.


# %%
def keep_top_p_sorted(logits, top_p):
    falling, order = logits.sort(dim=-1, descending=True)  # (B, V)
    probability = falling.softmax(-1)
    before = probability.cumsum(-1) - probability
    drop = torch.empty_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return logits.masked_fill(drop, -torch.inf)


rows = 2 * torch.randn(50, 30)
kept = keep_top_p_sorted(rows / 0.7, 0.8).isfinite()
for row, keep in zip(rows, kept):
    assert sample_loop(row.tolist(), 0.7, 30, 0.8, 0.0)[1] == keep.nonzero().flatten().tolist()
print("50 rows: the same words as the loop,", kept.sum(-1).tolist()[:12], "…")

# %% [markdown]
# ## The module
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
# Top-p, as above, seems to need all $V$ words in order. But the kept ones are almost always few! So take the 1,024 largest. If their mass reaches $p$, the decision is made; only a very flat row is sorted whole. The probabilities must be the true ones, so the denominator (`logsumexp`) runs over all words.

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
    total = logits.float().logsumexp(-1, keepdim=True)  # (B, 1), in float32: V small numbers
    for count in sorted({min(FEW, logits.shape[-1]), logits.shape[-1]}):
        largest, order = logits.topk(count)  # (B, count), in falling order
        probability = (largest.float() - total).exp()
        before = probability.cumsum(-1) - probability  # mass of everything more likely
        if bool((before[..., -1] >= top_p).all()):
            break
    keep = before.lt(top_p)
    keep[..., 0] = True  # even for a top_p that is 0 in float32
    drop = torch.ones_like(logits, dtype=torch.bool).scatter(-1, order, ~keep)
    return logits.masked_fill(drop, -torch.inf)


# %%
for spread in (0.1, 2.0, 10.0):
    wide = spread * torch.randn(3, 5000)
    kept = keep_top_p(wide, 0.9).isfinite()
    assert torch.equal(kept, keep_top_p_sorted(wide, 0.9).isfinite())
    print(f"spread {spread:4}: of 5000 words stay", kept.sum(-1).tolist())

# %% [markdown]
# The draw is the ruler and the dart. `searchsorted` finds the first piece that ends beyond the dart. Sums of floats are rounded, and a word that was cut off must *never* appear, not even once in a million: the middle line makes its piece exactly as long as nothing.


# %%
#| export
def multinomial(
    probability: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Throw one dart at each row's ruler, on which token i has a piece of length p(i).

    Args:
        probability: `float32[B, V]`, at least 0; rows need not sum to 1.
        generator: source of randomness, on the device of `probability`; None: torch's default.

    Returns:
        `int64[B]`; a token of probability 0 is never drawn.
    """
    end = probability.cumsum(-1)  # (B, V), where each piece ends
    # However sums are rounded: ends never fall, and an impossible token has no length at all.
    end = end.masked_fill(probability == 0, 0).cummax(-1).values
    dart = torch.rand(len(end), 1, generator=generator, device=end.device)  # in [0, 1)
    return torch.searchsorted(end, dart * end[:, -1:], right=True).squeeze(-1)


# %% [markdown]
# Parameters out of range are refused, not repaired: a `top_p` of 90 is a percentage that someone mistyped. So are logits with NaN in them. `argmax` would return the place of the NaN, and the model would answer fluent nonsense instead of an error.


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
            f"temperature is {temperature!r}; expected 0 (greedy) or a positive number"
        )
    whole = is_number(top_k) and 1 <= top_k < math.inf and top_k == int(top_k)
    if not (top_k is None or whole):
        raise ValueError(f"top_k is {top_k!r}; expected a whole number of at least 1, or None")
    if not (is_number(top_p) and 0 < top_p <= 1):
        raise ValueError(f"top_p is {top_p!r}; expected more than 0 and at most 1")


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
            "float16 overflowed: compute in bfloat16 or float32"
        )


# %% [markdown]
# Now the whole in order. One line deserves care: the largest logit is subtracted *before* the division. Softmax does not see a common shift, so nothing changes but the rounding. $20.3 / 0.001$ is 20,300, where float32 counts in steps of 0.002; near 0 it has all its digits.


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
    largest, token = logits.max(-1, keepdim=True)  # (B, 1)
    _check_logits(logits, largest)
    if temperature == 0:
        return token.squeeze(-1)
    # Less the largest first: near 0, numbers keep more digits. And float32 has no 1e-50.
    logits = (logits.float() - largest.float()) / min(max(temperature, 1e-30), 1e30)
    if top_k is not None:
        logits = keep_top_k(logits, int(top_k))
    return multinomial(keep_top_p(logits, top_p).softmax(-1), generator)


# %%
logits = torch.randn(4, 30)
for seed in (0, 0, 1):
    generator = torch.Generator().manual_seed(seed)
    print(f"seed {seed}:", sample(logits, 0.8, top_k=10, top_p=0.9, generator=generator).tolist())
print("greedy:", sample(logits, temperature=0).tolist(), "argmax:", logits.argmax(-1).tolist())
assert torch.equal(sample(logits, temperature=1e-50), logits.argmax(-1))

# %% [markdown]
# ### Does it follow the distribution?
#
# A draw is random, so one result proves nothing. Four thousand do. If $n$ darts are thrown at a piece of length $p$, the count strays from $np$ by about $\sqrt{np(1-p)}$. We measure each word's count in that unit: most should lie within 2, nearly all within 3.

# %%
chances = keep_top_p(photo[None] / 1.0, 0.9).softmax(-1)[0]  # (V,)
n = 4_000
counts = sample(photo.expand(n, -1), top_p=0.9, generator=torch.Generator().manual_seed(0))
counts = counts.bincount(minlength=len(photo))
for i in chances.topk(int((chances > 0).sum())).indices.tolist():
    expected = n * chances[i]
    off = (counts[i] - expected) / (expected * (1 - chances[i])) ** 0.5
    word = processor.tokenizer.decode([i]).strip()
    print(f"{word:8} expected {expected:7.1f}, drawn {counts[i]:5}, off by {off:5.2f} units")
assert counts.sum() == n and not counts[chances == 0].any()

# %% [markdown]
# ## Against the reference
#
# The stored file holds random logits and, for five settings, the probabilities from which transformers draws. We catch ours just before the dart. The same words must stay, with the same probabilities.

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
# How many words does top-p keep? We ask the tiny model for three words: the one after "a" for its own scene, for the photograph, and for the photograph with the temperature at 2.

# %%
cases = {"scene, T = 1": known, "photograph, T = 1": photo, "photograph, T = 2": photo / 2}
kept = {}
for title, logits in cases.items():
    kept[title] = [int(keep_top_p(logits[None], p).isfinite().sum()) for p in (0.5, 0.9, 0.99)]
    print(f"{title:18} words kept by 0.5, 0.9 and 0.99: {kept[title]}")
assert kept["scene, T = 1"] == [1, 1, 1] and kept["photograph, T = 2"][2] > 5

# %% tags=["hide-input"]
grid = torch.linspace(0.01, 0.999, 300)
fig, axes = plt.subplots(1, 2, figsize=(7.4, 2.9), layout="constrained")
for (title, logits), colour in zip(cases.items(), CYCLE):
    falling = logits.softmax(-1).sort(descending=True).values
    number = torch.stack([keep_top_p(logits[None], p).isfinite().sum() for p in grid.tolist()])
    axes[0].plot(grid, number, color=colour, label=title)
    axes[1].plot(grid, falling.cumsum(0)[number - 1], color=colour, drawstyle="steps-post")
axes[0].set(yscale="log", xlabel="top_p", ylabel="words kept")
axes[0].legend(fontsize=9)
axes[1].plot([0, 1], [0, 1], color=COLOURS["muted"], lw=1, ls=":")
axes[1].set(xlabel="top_p", ylabel="mass kept", ylim=(0, 1.03))
save_figure(fig, "17_kept")

# %% [markdown]
# What to notice: left, one setting of `top_p` keeps one word where the model is sure and many where it is not. Top-k could not: $k = 5$ is four too many for the scene. **Top-k fixes a number; top-p asks the model.**
#
# Right, every curve lies *on or above* the diagonal: the kept mass reaches $p$, and overshoots by the word that crosses.

# %% [markdown]
# ## At full size
#
# PaliGemma chooses among 257,216 tokens, once for each token of the answer. No weights and hardly any arithmetic, so it is free? Measured on a row with a few likely tokens and a long tail:


# %% tags=["nbval-ignore-output"]
def milliseconds(run, repeat=8):
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


row = torch.randn(1, 257216)
row[0, :200] = torch.linspace(18, 8, 200)
chances = row.softmax(-1)
steps = {
    "argmax": lambda: row.argmax(-1),
    "topk, 1024 tokens": lambda: row.topk(1024),
    "sort everything": lambda: row.sort(dim=-1, descending=True),
    "top-p with sort": lambda: keep_top_p_sorted(row, 0.9),
    "top-p, ours": lambda: keep_top_p(row, 0.9),
    "torch.multinomial": lambda: torch.multinomial(chances, 1),
    "multinomial, ours": lambda: multinomial(chances),
    "sample, ours, all of it": lambda: sample(row, 0.8, top_p=0.9),
}
times = {title: milliseconds(step) for title, step in steps.items()}
for title, ms in times.items():
    print(f"{title:24} {ms:7.2f} ms = {ms / times['argmax']:5.0f} × argmax")
assert times["sort everything"] > 10 * times["argmax"]
assert times["top-p with sort"] > 3 * times["top-p, ours"]

# %% [markdown]
# Sorting costs *tens* of argmaxes and more, and each step of the answer would pay it again. Our top-p takes the few largest instead. `torch.multinomial` draws a random number for every token of the vocabulary; one dart is enough.
#
# How much memory? One row of logits in float32 is 1 MB. A batch of 64 prompts of 300 tokens would be 20 GB if all positions were computed: keep the last one only.

# %%
V = 257216
print(f"one row: {4 * V / 1e6:.2f} MB; 64 prompts × 300 positions: {4 * V * 64 * 300 / 1e9:.1f} GB")
assert torch.equal(keep_top_p(row, 0.9), keep_top_p_sorted(row, 0.9))
assert round(4 * V / 1e6) == 1 and round(4 * V * 64 * 300 / 1e9) == 20
print("of", V, "tokens stay:", int(keep_top_p(row, 0.9).isfinite().sum()))

# %% [markdown]
# ## A bug people really make: top-p that crashes on easy questions
#
# A colleague's top-p has been in use for weeks, on photographs, without trouble. Today someone asks about a simple scene, and it dies. Here is the symptom, word by word:


# %%
def keep_top_p_colleague(logits, top_p):
    falling, order = logits.sort(dim=-1, descending=True)
    mass = falling.softmax(-1).cumsum(-1)
    drop = torch.empty_like(mass, dtype=torch.bool).scatter(-1, order, mass > top_p)
    return logits.masked_fill(drop, -torch.inf)


answers = (("cat", ["", "a"]), ("scene2", ["a", "a bee", "a bee and"]))
for picture, beginnings in answers:
    for said in beginnings:
        logits = next_logits(picture, said)[None]
        probability = keep_top_p_colleague(logits, 0.9).softmax(-1)
        try:
            word = processor.tokenizer.decode(torch.multinomial(probability, 1)[0].tolist())
        except RuntimeError as error:
            word = f"RuntimeError: {str(error).split(';')[0]}"
        print(f"{picture:6} {said!r:12} → {word!r}")

# %% [markdown]
# The surer the model, the surer the crash. Compare how many words each version keeps:

# %%
for picture, beginnings in answers:
    for said in beginnings:
        logits = next_logits(picture, said)[None]
        right, wrong = (f(logits, 0.9).isfinite().sum() for f in (keep_top_p, keep_top_p_colleague))
        print(
            f"{picture:6} {said!r:12} largest {logits.softmax(-1).max():.3f}, kept {right}, colleague {wrong}"
        )

# %% [markdown]
# `mass > top_p` drops the word that *crosses* $p$. Where the first word alone exceeds $p$, nothing stays; the softmax of nothing but $-\infty$ is 0/0. And in all other rows one word too few was kept, for weeks, and nobody saw it.
#
# The rule: decide by the mass **before** a word, not by the mass including it.

# %% [markdown]
# ### A second one: top-p before temperature
#
# Both orders run, and at $T = 1$ they agree. Cut first and heat later, and the set is chosen from a distribution that nobody will draw from:

# %%
for T in (0.5, 1.0, 2.0):
    right = keep_top_p(photo[None] / T, 0.9)
    wrong = keep_top_p(photo[None], 0.9) / T
    right, wrong = int(right.isfinite().sum()), int(wrong.isfinite().sum())
    print(f"T = {T}: kept {right:3}, cut first {wrong:3}")
    assert wrong == right if T == 1 else (wrong >= right if T < 1 else wrong < right)

# %% [markdown]
# With the wrong order `top_p` no longer means anything at low temperature (too many stay), and at high temperature the answers are less varied than asked for.
#
# ### A third: half precision
#
# bfloat16 keeps 8 significant bits, so numbers between 16 and 32 come in steps of 0.125. Different words become equal, and another one wins:

# %%
close = torch.tensor([20.00, 20.05, 19.90])
for dtype in (torch.float32, torch.bfloat16):
    rounded = close.to(dtype).float()
    print(
        f"{dtype!s:15}", [round(v, 3) for v in rounded.tolist()], "largest:", int(rounded.argmax())
    )
assert close.argmax() == 1 and close.bfloat16().argmax() == 0

# %% [markdown]
# Our model returns float32 ([lesson 15](15_model.ipynb)). Does that save it? We load its weights in bfloat16 and look:

# %%
half = load_model(tiny, dtype=torch.bfloat16)
logits = next_logits("cat", "a", half)
print(
    logits.dtype, "| unchanged by another rounding:", torch.equal(logits, logits.bfloat16().float())
)
assert logits.dtype == torch.float32 and torch.equal(logits, logits.bfloat16().float())

# %% [markdown]
# It does not. These float32 numbers hold nothing that bfloat16 could not hold: they were rounded where they were made, in the product with the head's weights, and `.float()` brings nothing back. What it protects is everything *after* it. The division, the softmax and the running sum of 257,216 small numbers are done in float32, so nothing is rounded a second time:

# %%
flat = torch.full((V,), 1 / V)
for dtype in (torch.float32, torch.bfloat16):
    print(f"{dtype!s:15} the sum of {V} equal probabilities: {flat.to(dtype).cumsum(0)[-1]:.4f}")
cold = (close.half() / 0.0002).softmax(-1)
print("float16, T = 0.0002:", cold.tolist())
print("sample:             ", sample(close.half()[None], temperature=0.0002).tolist())
assert cold.isnan().all() and sample(close.half()[None], temperature=0.0002) == 1

# %% [markdown]
# In bfloat16 the ruler is too short. In float16 a cold temperature makes infinities, and their softmax is no number. `sample` converts first and subtracts the largest, and finds the winner (20.00 and 20.05 still differ in float16).

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
    assert a == count(logits, 0.6), "a: add up from the largest until 0.6 is reached"
    assert b == count(keep_top_k(logits, 2), 0.7), "b: what two words share is 0.7, of which 0.5 …"
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
# ### Exercise 2 (extend): min-p
#
# A younger rule: keep every word whose probability is at least `min_p` times that of the most likely one. Write it for `float[B, V]` logits: the kept logits as they were, the others $-\infty$. No softmax is needed. Why?


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
            result = keep_min_p(logits, min_p)
            assert isinstance(result, torch.Tensor), "return a tensor"
            assert result.shape == logits.shape, f"shape {list(result.shape)}"
            probability = logits.softmax(-1)
            keep = probability >= min_p * probability.amax(-1, keepdim=True) * (1 - 1e-6)
            assert torch.equal(result > -torch.inf, keep), f"min_p {min_p}: other words stay"
            assert torch.equal(result[keep], logits[keep]), "kept logits change"


check(test_2, keep_min_p)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A ratio of probabilities is a difference of logits: $p_i / p_{max} = e^{x_i - x_{max}}$. The sum in the softmax cancels. Take the logarithm of `min_p`; a little slack (1e-6) helps against rounding at equality.
#
# </details>


# %% tags=["solution"]
def keep_min_p(logits, min_p):
    gap = logits - logits.amax(-1, keepdim=True)
    return logits.masked_fill(gap < torch.tensor(min_p).log() - 1e-6, -torch.inf)


check(test_2, keep_min_p)

# %% [markdown]
# ### Exercise 3 (break): write the test that was missing
#
# Return True if a `keep(logits, top_p)` is right, and False if not. `check` tries yours on two right versions and on four wrong ones: the colleague's, one that always drops the crossing word but never the first, one that keeps a word too many, and one that sorts but forgets to go back to the order of the vocabulary.


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
        assert is_right(keep) is True, f"rejects what is right: {name}"
    for name, keep in {
        "the colleague's": keep_top_p_colleague,
        "never empty, but the crossing word is dropped": never_empty,
        "one word too many": one_more,
        "not back in the order of the vocabulary": unsorted,
    }.items():
        assert is_right(keep) is False, f"lets this one through: {name}"


check(test_3, is_right)

# %% [markdown]
# <details><summary>Hint</summary>
#
# One row is enough if its words are not in falling order. Choose probabilities whose running sums are far from `top_p`, write down by hand which stay, and compare with `.isfinite().tolist()`.
#
# </details>


# %% tags=["solution"]
def is_right(keep):
    logits = torch.tensor([[0.15, 0.40, 0.05, 0.30, 0.10]]).log()
    return keep(logits, 0.6).isfinite().tolist() == [[False, True, False, True, False]]


check(test_3, is_right)

# %% [markdown]
# ## Summary
#
# - A model gives a distribution; the choice of a word is yours, and has no weights.
# - A draw is a dart on a ruler whose pieces are the probabilities.
# - Temperature moves mass, top-k fixes a number, top-p asks the model. In this order.
# - The word that crosses $p$ stays. Decide by the mass *before* it.
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
# **2.** Is the most likely *sentence* found by taking the most likely word each time?
#
# <details><summary>Answer</summary>
#
# No. A likely first word may have only unlikely continuations. With probabilities 0.6 and then 0.5, the greedy sentence has 0.3; another beginning with 0.4 and then 1.0 has 0.4. Beam search looks at several beginnings at once, at several times the cost.
#
# </details>

# %% [markdown]
# **3.** With `top_p` = 0.9 on two different rows, one keeps 1 token and one keeps 2,000. How can both be right, and which takes longer in our version?
#
# <details><summary>Answer</summary>
#
# The first model state is sure, the second is not: the nucleus follows the distribution. The second exceeds 1,024 tokens, so the whole row is ordered, which costs as much as the sort we wanted to avoid. It is rare.
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
