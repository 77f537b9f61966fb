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
# [← Sampling](17_sampling.ipynb) | [contents](00_overview.ipynb) | [Detection →](19_detection.ipynb)

# %% [markdown]
# # 18 · Generation: how does one forward pass become an answer?
#
# *45 minutes* · part IV, Answering
#
# **What you will be able to do**
#
# - write the loop that turns a model of one next token into a model of answers;
# - answer a batch in which each row ends in its own time;
# - show text while it is being written, without ever showing half a character;
# - say what a decode step waits for, and why a batch is nearly free.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("generation")

# %% [markdown]
# ## Setup
#
# The whole model comes from [lesson 15](15_model.ipynb), its weights through [16](16_checkpoint.ipynb),
# prompts through [14](14_processor.ipynb), the choice of a token from [17](17_sampling.ipynb). The
# `#| export` cells become [generation.py](../paligemma/generation.py).

# %%
#| export
"""Prefill once, then one token at a time: batches, streaming, stopping."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from paligemma.model import PaliGemma
from paligemma.sampling import check_sampling, sample
from paligemma.support.arguments import check_steps
from paligemma.tokenizer import Tokenizer

# %% tags=["setup"]
import re
import time
from importlib import resources
from itertools import pairwise

import matplotlib.pyplot as plt
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from paligemma.checkpoint import load_model
from paligemma.gemma import GemmaConfig
from paligemma.model import PaliGemmaConfig
from paligemma.plotting import show_images
from paligemma.processor import Processor
from paligemma.siglip import SiglipVisionConfig
from paligemma.support.course import check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS, draw_boxes

_ = torch.set_grad_enabled(False)  # we only answer here; nothing is trained

# %% [markdown]
# The model is the tiny PaliGemma that ships with this course: 64 image tokens, four decoder layers.

# %%
TINY = resources.files("paligemma") / "assets" / "tiny"
model, processor = load_model(TINY), Processor.from_pretrained(TINY)
tokenizer = processor.tokenizer

# %%
scene, EOS = sample_picture("scene"), tokenizer.eos_id
batch = processor(scene, "caption en")
ids, pixels = batch["input_ids"], batch["pixel_values"]
print("prompt:", tokenizer.decode(ids[0]).strip(), "| tokens:", ids.shape[1], "| eos:", EOS)

# %% [markdown]
# ## The problem
#
# The model of [lesson 15](15_model.ipynb) gives, for a picture and some text, the logits of **one** next
# token. An answer has many. And nobody tells us how many: the model itself says "the end", with the
# **end-of-sequence** token, `eos`.
#
# So we call it again and again, each time with one more token. What goes into each call?


# %% tags=["hide-input"]
def draw_calls(ax, image, prompt, answer, side=8):
    """One column for each call: what is read (box), and what comes out (above)."""
    box = {"ha": "center", "va": "center", "fontsize": 9}
    ax.imshow(image, extent=(0, side, 0, side), zorder=1)
    for i in range(side + 1):
        ax.plot([i, i], [0, side], color="white", lw=0.7, zorder=2)
        ax.plot([0, side], [i, i], color="white", lw=0.7, zorder=2)
    x, starts = side + 0.4, []
    for group, colour in ((prompt, "language"), (answer, "accent")):
        for word in group:
            rectangle = plt.Rectangle((x, 0), 0.9, side, fc=COLOURS[colour], ec="white")
            ax.add_patch(rectangle)
            ax.text(x + 0.45, side / 2, word, color="white", rotation=90, **box)
            starts.append(x)
            x += 1.1 if colour == "language" else 2.6
        x += 1.5
    outs = [starts[len(prompt) - 1], *starts[len(prompt) :]]
    for n, (left, word) in enumerate(zip(outs, [*answer, "eos"])):
        ax.annotate(
            "",
            (left + 0.45, side + 1.5),
            (left + 0.45, side + 0.1),
            arrowprops={"arrowstyle": "->", "color": COLOURS["muted"]},
        )
        ax.text(left + 0.45, side + 2, word, color=COLOURS["accent"], **box)
        centre = (starts[len(prompt) - 1] + 0.9) / 2 if n == 0 else left + 0.45
        ax.text(centre, -0.9, f"call {n + 1}", color=COLOURS["ink"], **box)
    ax.set(xlim=(-0.3, x - 3), ylim=(-1.6, side + 2.8), aspect="equal")
    ax.set_axis_off()


fig, ax = plt.subplots(figsize=(9.4, 3.3), layout="constrained")
draw_calls(ax, scene, ["bos", *"caption en".split(), "\\n"], "a cat and two dogs".split())
save_figure(fig, "18_calls.png")

# %% [markdown]
# The first call reads all that is known, the picture (64 patches here) and the prompt: the prefill. Each
# later call, a decode step, reads the one token that just came out.
#
# ## By hand
#
# A pencil-sized "model": a table. Row: the last token (a real model looks at all). Columns: the scores of
# the next one. Start after the prompt and follow the largest score.

# %%
WORDS = ["eos", "prompt", "a", "cat", "and", "two", "dogs"]
TABLE = torch.tensor(
    [  # eos prompt a cat and two dogs
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 7, 1, 0, 4, 2],  # after "prompt"
        [0, 0, 0, 9, 0, 0, 3],  # after "a"
        [5, 0, 0, 0, 6, 0, 0],  # after "cat"
        [0, 0, 5, 1, 0, 8, 1],  # after "and"
        [0, 0, 0, 2, 0, 0, 9],  # after "two"
        [8, 0, 0, 0, 4, 0, 0],  # after "dogs"
    ]
)

# %%
word, said = 1, []
while word != 0:
    word = int(TABLE[word].argmax())
    said.append(WORDS[word])
print(" → ".join(said))

# %% [markdown]
# Note `cat`: eos has 5, `and` has 6. Two points more and the answer would be "a cat". The end is not a
# rule of grammar; it is one of the tokens, chosen like any other. And a table with a loop in it would
# never stop. That is why every generator has a second brake: `max_new_tokens`.

# %% [markdown]
# ## As a loop
#
# The plainest code that is right: everything so far goes in, picture included; the logits after the
# last token decide; the token is appended; once more from the start.
#
# One thing must be said to the model each time: which tokens are prefix (0: picture and prompt, all see
# all) and which are answer (1: they look back only).


# %%
def answer_plain(model, ids, pixels, steps):
    start, types = ids.shape[1], torch.zeros_like(ids)
    for _ in range(steps):
        logits = model(ids, pixels, token_type_ids=types).logits[:, -1]  # [1, V]
        token = logits.argmax(-1, keepdim=True)  # [1, 1]
        ids = torch.cat((ids, token), 1)
        types = torch.cat((types, torch.ones_like(token)), 1)
        if token.item() == EOS:
            break
    return ids[:, start:]


# %%
slow = answer_plain(model, ids, pixels, 16)
print("tokens:", slow[0].tolist())
print("answer:", tokenizer.decode(slow[0]))

# %% [markdown]
# ## The same picture, the wrong sequence
#
# [Lesson 14](14_processor.ipynb) has a bug cell with sequences that read right and are wrong. Now we can
# see what they do. The loop answers all of them, without a word of complaint:


# %%
def sequences(prompt):
    image, words = [tokenizer.image_id] * 64, tokenizer.encode(prompt)
    bos, newline = [tokenizer.bos_id], [tokenizer.newline_id]
    return {
        "as trained": image + bos + words + newline,
        "a space after the picture": image + tokenizer.encode(" ") + bos + words + newline,
        "bos twice": image + bos + bos + words + newline,
        "a space before the prompt": image + bos + tokenizer.encode(" " + prompt) + newline,
        "no newline": image + bos + words,
    }


# %%
said = {}
for prompt, name in (("caption en", "scene3"), ("detect dog", "scene")):
    seen = processor(sample_picture(name), prompt)["pixel_values"]
    for what, row in sequences(prompt).items():
        answer = answer_plain(model, torch.tensor([row]), seen, 24)[0]
        said[prompt, what] = processor.decode(answer).strip()
        print(f"{prompt:10} | {what:25} | {said[prompt, what][:42]}")

# %%
captions = [text for (prompt, _), text in said.items() if prompt == "caption en"]
assert captions == 4 * ["a rocket and two balloons"] + ["a rocket and a balloon"]
assert "<loc" not in said["detect dog", "a space before the prompt"]

# %% [markdown]
# In the captions only the missing newline shows: it loses a balloon. Boxes are less forgiving: after a
# space before the prompt the model no longer knows what it is asked for. And how far to the left does
# one token too many move the dog?

# %%
numbers = {what: re.findall(r"<loc(\d+)>", text) for (_, what), text in said.items()}
left = {
    what: int(numbers[what][1]) for what in ("as trained", "a space after the picture", "bos twice")
}
print(left, "| one patch:", 1024 // 8)
for what in ("a space after the picture", "bos twice"):
    assert abs(left["as trained"] - left[what] - 128) < 20

# %% tags=["hide-input"]
views = []
for what in ("as trained", "bos twice"):
    edges = torch.tensor([int(n) for n in numbers[what]]).view(-1, 4) * 280 / 1023
    views.append(draw_boxes(scene.resize((280, 280)), edges[:, [1, 0, 3, 2]], ["dog"] * len(edges)))
fig = show_images(views, ["as trained", "bos twice: nobody complains"], height=3.0)
save_figure(fig, "18_sequences.png")

# %% [markdown]
# By one patch, an eighth of the picture. It fits: rotations ([lesson 09](09_rope.ipynb)) tell the model
# only *how far back* a patch stands, and with one token too many each stands where its left neighbour
# stood in training. So compare ids, all of them.

# %% [markdown]
# ## With a cache
#
# [Lesson 11](11_kv_cache.ipynb) showed that nothing has to be computed twice. Prefill and decode step are
# the same line with other arguments: first the prompt and the picture, then the newest token alone.
# (With a filled cache, what is new counts as answer; no types needed.)


# %%
def answer_cached(model, ids, pixels, steps):
    cache = model.make_cache(1, ids.shape[1] + steps - 1)  # the last token is never fed
    said = []
    for _ in range(steps):
        logits = model(ids, pixels, cache=cache, logits_to_keep=1).logits[:, -1]
        ids, pixels = logits.argmax(-1, keepdim=True), None  # next: this token, no picture
        said.append(ids)
        if ids.item() == EOS:
            break
    return torch.cat(said, 1)


# %%
assert torch.equal(answer_cached(model, ids, pixels, 16), slow)
print("the same", slow.shape[1], "tokens")

# %% [markdown]
# (`logits_to_keep=1`: of the prompt only the last position decides, so only that one is projected to the
# vocabulary.) Equal tokens are a weak test; [lesson 15](15_model.ipynb) compares the logits.

# %% [markdown]
# ## A batch: every row ends in its own time
#
# Three questions at once, a **batch**. Prompts differ in length, so short ones get pads on the left: the
# next token of every row then stands in the same column, the last one.

# %%
prompts = ["caption en", "answer en how many dogs are there?", "answer en how many bees are there?"]
images = [sample_picture(name) for name in ("scene3", "scene", "scene2")]
three = processor(images, prompts)
del three["token_type_ids"]  # all is prefix

# %%
for prompt, real in zip(prompts, three["attention_mask"]):
    print(f"{prompt:36} {int((real == 0).sum())} pads, {int(real.sum())} tokens")

# %% [markdown]
# Answers differ in length too. "2" has ended when a caption has just begun, but the batch goes on, and
# the model produces *something* for the ended row too. So who has ended is remembered: `done`. An ended
# row yields pad (0). With the table, two rows, one starting at `prompt` and one at `two`:

# %%
token, done = torch.tensor([1, 5]), torch.tensor([False, False])
while not done.all():
    token = TABLE[token].argmax(-1).masked_fill(done, 0)  # here 0 is eos and pad
    done = done | (token == 0)
    print([WORDS[t] for t in token], "done:", done.tolist())

# %% [markdown]
# The order matters: first hide what an ended row says, then see who has ended *now*. The eos itself
# is kept, what follows is pad. And the loop ends when **all** are done.
#
# The mask grows with the answer: pads stay hidden from every later token, so each step adds one
# column of ones.

# %% [markdown]
# ## The module, simple form
#
# A Python *generator*: a function that hands out a value with `yield` and sleeps until the next one is
# wanted. It is the loop with a cache, with `done`, and with a mask that grows.


# %%
def steps_plain(model, input_ids, pixel_values, attention_mask, limit=16):
    rows, length = input_ids.shape
    cache = model.make_cache(rows, length + limit - 1)
    done = torch.zeros(rows, dtype=torch.bool)
    for _ in range(limit):
        out = model(input_ids, pixel_values, attention_mask, cache=cache, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1).masked_fill(done, 0)  # [B]
        done = done | (token == EOS)
        yield token
        if done.all():
            return
        input_ids, pixel_values = token[:, None], None
        attention_mask = F.pad(attention_mask, (0, 1), value=1)


# %%
for token in steps_plain(model, **three):
    print(token.tolist(), [tokenizer.decode([t]) for t in token.tolist()])

# %% [markdown]
# ## What a real program adds
#
# The options stand in one place and are checked once (`check_steps`, in
# [support/arguments.py](../paligemma/support/arguments.py)).


# %%
#| export
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


# %% [markdown]
# The loop is the same, with `sample` ([lesson 17](17_sampling.ipynb)) instead of argmax. Pictures may come
# encoded; a batch without padding needs no mask; `log_probs` says how sure the model was
# ([lesson 19](19_detection.ipynb)).


# %%
#| export
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


# %% [markdown]
# `torch.inference_mode()` switches off all bookkeeping for gradients. It is left before each `yield`:
# otherwise the *reader's* code would run in it too, and a training loop that samples between two steps
# would silently stop learning.
#
# Whoever wants the whole answer collects:


# %%
#| export
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


# %% [markdown]
# Three checks: equal to the two loops above; a batch equal to its rows, each alone and without pads;
# and pads, nothing else, after each row's eos.

# %%
assert torch.equal(generate(model, ids, pixels), slow)
together = generate(model, **three)
for row, image, prompt in zip(together, images, prompts):
    own = processor(image, prompt)
    alone = generate(model, own["input_ids"], own["pixel_values"])[0]
    assert torch.equal(row[: len(alone)], alone) and not row[len(alone) :].any()
    print(f"{prompt:36} {processor.decode(row):24} {row.tolist()}")

# %% [markdown]
# ## Streaming: never half a character
#
# A reader likes to see words as they come: **streaming**. Easy: decode each token and print it? But a
# character that the vocabulary lacks is spelled in bytes, one token each ([lesson 06](06_tokenizer.ipynb)),
# and a byte is not a character. Left, each token by itself; right, all tokens so far:

# %%
bee = tokenizer.encode("a bee 🐝!")
for n in range(1, len(bee) + 1):
    print(f"{tokenizer.decode(bee[n - 1 : n])!r:8} {tokenizer.decode(bee[:n])!r}")

# %% [markdown]
# By itself each byte becomes `�`, the sign for "not a character", and no later token can mend what is
# already on the screen. In all tokens so far they vanish when the character is whole. The rule: **hold
# back while the text ends in `�`**; when it ends well, hand out what is new.


# %%
#| export
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


# %% [markdown]
# The last two lines matter as well: an answer may end in mid-character, because `max_new_tokens` was
# reached. Then the rest comes out as it is, so that the parts always join to what `decode` gives.

# %%
print(list(stream(bee, tokenizer)))
print(list(stream(bee[:5], tokenizer)), "← the model stopped in mid-character")
for cut in range(len(bee) + 1):
    assert "".join(stream(bee[:cut], tokenizer)) == tokenizer.decode(bee[:cut])

# %% [markdown]
# And the model itself, part by part:

# %%
parts = list(stream((int(token) for token in generate_steps(model, ids, pixels)), tokenizer))
print(parts)
assert "".join(parts) == processor.decode(slow[0])

# %% [markdown]
# ## Against the reference
#
# The file holds a very small random model of transformers, three left-padded
# prompts, and what its `generate` answered greedily, with an eos id at which the rows end at
# different times. A test recomputes it.

# %%
reference = load_file("reference/generation.safetensors")
vision = SiglipVisionConfig(16, 24, 1, 2, image_size=14, patch_size=7)
text = GemmaConfig(64, 16, 32, 2, 2, 1, 8)
small = PaliGemma(PaliGemmaConfig(vision, text, image_token_index=60)).eval()
small.load_state_dict({n[8:]: t for n, t in reference.items() if n.startswith("weights.")})
inputs = {name: reference[name] for name in ("input_ids", "pixel_values", "attention_mask")}

# %%
ours = generate(small, **inputs, max_new_tokens=12, eos_token_id=int(reference["eos"]))
print(ours)
assert torch.equal(ours, reference["tokens"])
free = generate(small, **inputs, max_new_tokens=24, eos_token_id=-1)
assert torch.equal(free, reference["tokens_without_eos"])
print(ours.numel(), "tokens with eos and", free.numel(), "without: all equal")

# %% [markdown]
# ## See it: the clock of an answer
#
# The tiny model on its picture: when does each token appear? The vision tower's share of the prefill is
# measured on its own; of several runs the fastest counts.


# %% tags=["nbval-ignore-output"]
def best_ms(function, repeats=5):
    """The fastest of some runs, in milliseconds; the first one warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times[1:])


# %% tags=["nbval-ignore-output"]
seeing, runs = best_ms(lambda: model.encode_image(pixels)), []
for _ in range(7):
    stamps = [time.perf_counter()]
    stamps += [time.perf_counter() for _ in generate_steps(model, ids, pixels)]
    runs.append([1e3 * (b - a) for a, b in pairwise(stamps)])

# %% tags=["nbval-ignore-output"]
calls = [min(times) for times in zip(*runs)]
print(f"first token after {calls[0]:.1f} ms, then one every {min(calls[1:]):.1f} ms")

# %% tags=["hide-input", "nbval-ignore-output"]
fig, ax = plt.subplots(figsize=(9, 2.1), layout="constrained")
ends, words = torch.tensor(calls).cumsum(0), [tokenizer.decode([t]) for t in slow[0]]
ax.barh(0, seeing, color=COLOURS["vision"], height=0.6)
ax.barh(0, ends[0] - seeing, left=seeing, color=COLOURS["language"], height=0.6)
ax.text(seeing / 2, 0, "vision", color="white", ha="center", va="center")
middle = (seeing + ends[0]) / 2
ax.text(middle, 0, "read the prompt", color="white", ha="center", va="center")
for n, (end, word) in enumerate(zip(ends.tolist(), words)):
    if n:
        left = ends[n - 1].item()
        ax.barh(0, end - left, left=left, color=COLOURS["accent"], height=0.6, ec=COLOURS["paper"])
    style = {"fontsize": 9, "color": COLOURS["accent"], "rotation": 60, "rotation_mode": "anchor"}
    ax.text(end, 0.42, word.strip() or "eos", **style)
ax.set(ylim=(-0.4, 1.0), yticks=[], xlabel="milliseconds since the question")
ax.spines["left"].set_visible(False)
save_figure(fig, "18_clock")

# %% [markdown]
# A silence, then words at a steady pace. People who serve models measure the two apart: *time to first
# token* and *time per token*.
#
# And the pace is too slow. A decode step reads one token, the prefill read 68. It should take a
# sixty-eighth of the prefill's time, and takes longer. Why?

# %% [markdown]
# ## What a step costs
#
# A weight must come from **memory** before it multiplies. Take a $4 \times 4$ matrix, two bytes a number:
#
# - one token: $2 \cdot 16 = 32$ operations, 32 bytes to read;
# - eight tokens: 256 operations, the *same* 32 bytes.
#
# A call takes at least
#
# $$\max\left(\frac{\text{operations}}{\text{operations a second}},\ \frac{\text{bytes}}{\text{bytes a
# second}}\right).$$
#
# If the left is larger, it is *compute bound*, busy; if the right is, *memory bound*, waiting. One matrix
# of the 3B model, in two types of number:

# %% tags=["nbval-ignore-output"]
weight = torch.randn(16384, 2048)  # gate_proj of one layer of PaliGemma 3B
tokens, times = [1, 2, 4, 8, 16, 32, 64, 128], {}
for name, w in {"float32": weight, "bfloat16": weight.bfloat16()}.items():
    rows = [torch.randn(n, 2048, dtype=w.dtype) for n in tokens]
    times[name] = [best_ms(lambda: F.linear(x, w)) for x in rows]
    print(f"{name:8} {[f'{ms / times[name][0]:.1f}' for ms in times[name]]} times one token's")

# %% tags=["hide-input", "nbval-ignore-output"]
fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
for (name, ms), colour in zip(times.items(), ("language", "vision")):
    ax.loglog(tokens, ms, "o-", color=COLOURS[colour], label=name)
    ax.loglog(tokens, [ms[0] * n for n in tokens], ":", color=COLOURS[colour])
ax.set(xlabel="tokens in one call", ylabel="milliseconds")
ax.set_title("dotted: if each token cost as much as the first")
ax.set_xticks(tokens, tokens)
ax.minorticks_off()
ax.legend(loc="upper left")
save_figure(fig, "18_tokens_per_call")

# %% [markdown]
# The matrix is read once a call, however many tokens wait for it. The first pays for the trip; a hundred
# and twenty-eight together take much less than as many calls. How flat the line begins depends on the
# type and on the processor. Decode stands at the far left, prefill at the right.

# %% [markdown]
# ## At full size
#
# The 3B model on the meta device: shapes, no numbers. PyTorch counts the operations of a call while it
# "runs". Bytes: the weights of the parts that take part, once, in bfloat16, and the cache.

# %%
with torch.device("meta"):
    large = PaliGemma(PaliGemmaConfig()).to(torch.bfloat16)


# %%
def count(function):
    """Operations of a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


# %%
def decoder_call(new, old=0, rows=1):
    """Operations and bytes of one call of the 3B decoder: `new` tokens a row after `old` ones."""
    cache = large.make_cache(rows, old + new)
    for layer in range(18 if old else 0):
        cache.update(layer, *torch.empty(2, rows, 1, old, 256, device="meta").bfloat16())
    x = torch.empty(rows, new, 2048, device="meta").bfloat16()
    positions = torch.arange(old, old + new, device="meta").expand(rows, -1)
    text = large.language_model
    run = lambda: text.logits(text(x, positions, None, cache)[:, -1:])
    return count(run), sum(p.nbytes for p in text.parameters()) + cache.nbytes


# %%
picture = torch.empty(1, 3, 224, 224, device="meta").bfloat16()
tower = [*large.vision_tower.parameters(), *large.multi_modal_projector.parameters()]
CALLS = {
    "vision tower": (count(lambda: large.encode_image(picture)), sum(p.nbytes for p in tower)),
    "prefill, 1 row": decoder_call(264),
    "prefill, 8 rows": decoder_call(264, 0, 8),
    "decode, 1 row": decoder_call(1, 264),
    "decode, 8 rows": decoder_call(1, 264, 8),
    "decode, 64 rows": decoder_call(1, 264, 64),
}

# %%
for name, (flop, size) in CALLS.items():
    print(f"{name:20} {flop / 1e9:5.0f} Gflop, {size / 1e9:.2f} GB read, {flop / size:5.1f} a byte")
prefill, _, one, eight = (CALLS[name] for name in list(CALLS)[1:5])
assert round(prefill[1] / 1e9) == round(one[1] / 1e9) == 5 and 200 < prefill[0] / one[0] < 260
assert eight[1] < 1.02 * one[1]

# %% [markdown]
# Prefill and decode read the same five gigabytes. Prefill does more than two hundred times as much with
# them. And eight rows read hardly more than one: only the cache is eight times as large.
#
# Now the two limits, for an H100 (its data sheet):

# %%
operations_a_second, bytes_a_second = 989e12, 3350e9
print(f"memory bound below {operations_a_second / bytes_a_second:.0f} operations a byte")

# %%
least = {}
for name, (flop, size) in CALLS.items():
    compute, memory = 1e3 * flop / operations_a_second, 1e3 * size / bytes_a_second
    least[name] = max(compute, memory)
    print(f"{name:20} busy {compute:5.3f} ms, reading {memory:4.2f} ms")
    assert (memory > compute) == (name != "prefill, 8 rows")
assert one[0] / operations_a_second < 0.01 * one[1] / bytes_a_second
assert least["decode, 8 rows"] < 1.02 * least["decode, 1 row"]

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7.6, 3.4), layout="constrained")
intensity = torch.logspace(-0.5, 3.3, 200)
roof = (intensity * bytes_a_second).clamp(max=operations_a_second) / 1e12
ax.loglog(intensity, roof, color=COLOURS["inside"])
for name, (flop, size) in CALLS.items():
    x = flop / size
    colour = COLOURS["vision" if "vision" in name else "accent" if "decode" in name else "language"]
    ax.plot(x, min(x * bytes_a_second, operations_a_second) / 1e12, "o", color=colour)
    ax.axvline(x, color=COLOURS["muted"], lw=0.6, ls=":", zorder=0)
    ax.text(x * 0.98, 0.03, name, rotation=90, ha="right", va="bottom", color=colour)
ax.set(xlabel="operations a byte", ylabel="Tflop/s, at most", ylim=(2e-2, 3e3), xlim=(0.5, 2000))
ax.set_title("H100")
save_figure(fig, "18_roofline")

# %% [markdown]
# A *roofline*: on the slope the roof is memory, on the flat part arithmetic. Only the prefill of eight rows
# is busy. For one answer, a decode step uses less than a hundredth of the H100's arithmetic; eight rows
# take the same time there as one.

# %% [markdown]
# ## The door to the compiled step
#
# So what makes a single answer faster? Fewer bytes ([lesson 22](22_quantization.ipynb)). And our tiny
# model, whose bytes are few? It waits for something else: hundreds of small operations, and Python
# gives the orders one by one, the same list for every token. Such a list can be recorded once and played
# back: [lesson 23](23_compilation.ipynb).

# %% [markdown]
# ## A bug people really make: the picture is looked at again for each word
#
# A colleague's loop. Every answer is right, to the last token. It only feels slow, and "vision
# models are slow", so nobody looks.


# %%
def answer_colleague(model, ids, pixels, steps):
    cache, said, new = model.make_cache(1, ids.shape[1] + steps), [], ids
    for _ in range(steps):
        features = model.encode_image(pixels)
        embeds = model.merge(new, features if not said else None)
        positions = torch.arange(len(cache), len(cache) + new.shape[1])[None]
        hidden = model.language_model(embeds, positions, None, cache)
        new = model.language_model.logits(hidden[:, -1:]).argmax(-1)
        said.append(new)
        if new.item() == EOS:
            break
    return torch.cat(said, 1)


# %%
assert torch.equal(answer_colleague(model, ids, pixels, 16), slow)
for answer in (answer_cached, answer_colleague):
    flop = count(lambda: answer(model, ids, pixels, 16))
    print(f"{answer.__name__:17} {flop / 1e6:6.0f} Mflop for {slow.shape[1]} tokens")

# %% [markdown]
# Before you read on: which line is it?
#
# The first line of the loop. Its result is used once and thrown away in every later call. A check of
# the *answers* cannot see this; a check of the **work** can: ask each part, with a hook, how many
# tokens came out of each of its calls.


# %%
def tokens_out_of(part, function):
    """For each call of a part while the function runs: how many tokens came out."""
    counts = []
    hook = part.register_forward_hook(lambda part, given, out: counts.append(out.shape[1]))
    function()
    hook.remove()
    return counts


# %%
mlp = model.language_model.layers[0].mlp  # every token of the decoder passes through it
for answer in (answer_cached, answer_colleague):
    run = lambda: answer(model, ids, pixels, 16)
    vision, decoder = tokens_out_of(model.vision_tower, run), tokens_out_of(mlp, run)
    print(f"{answer.__name__:17} vision tower {vision}, decoder {decoder}")
assert len(vision) == slow.shape[1] == len(decoder)
share = CALLS["vision tower"][0] / CALLS["decode, 1 row"][0]
print(f"in the 3B model the tower costs as much arithmetic as {share:.0f} decode calls")

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): how many of each?
#
# A picture at 896 × 896 gives 4,096 image tokens; the prompt adds eight. The answer has 20 tokens,
# eos included. How often is the model called, how often does the vision tower run, how many tokens
# pass through the decoder in total, and how many does the cache hold at the end?

# %% tags=["exercise"]
model_calls = None
vision_runs = None
decoder_tokens = None
cached_tokens = None


# %% tags=["check"]
def test_1(model_calls, vision_runs, decoder_tokens, cached_tokens):
    answer, given = 20, (model_calls, vision_runs, decoder_tokens, cached_tokens)
    assert all(isinstance(n, int) for n in given), "four whole numbers, please"
    assert model_calls != answer + 1, "eos is one of the 20, and the prefill gives the first"
    assert model_calls == answer, "each call gives one token"
    assert vision_runs == 1, "with the cache filled, the picture is in there already"
    assert decoder_tokens != 4104 + answer, "the last token is chosen and never fed"
    assert decoder_tokens != 4096 + answer - 1, "the prompt's own eight tokens pass as well"
    assert decoder_tokens != 4104 * answer, "with a cache, what was read is not read again"
    assert decoder_tokens == 4104 + answer - 1, "decoder_tokens: what is read first, and what then?"
    assert cached_tokens == decoder_tokens, "every token that passes leaves its key and value"


check(test_1, model_calls, vision_runs, decoder_tokens, cached_tokens)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Look at the first figure. Which words stand in a box, and which only above one?
#
# </details>

# %% tags=["solution"]
# One call a token; the picture in the first only; the last token is never fed.
model_calls, vision_runs = 20, 1
decoder_tokens = cached_tokens = 4096 + 8 + 19
check(test_1, model_calls, vision_runs, decoder_tokens, cached_tokens)

# %% [markdown]
# ### Exercise 2 (break): write the check that finds a slow loop
#
# Return True when `answer(model, ids, pixels, steps)` does all its work once: the vision tower
# runs once, and each token passes through the decoder once. Below it is tried on this lesson's loops
# and on two that you haven't seen.


# %% tags=["exercise"]
def works_once(answer):
    return None  # count something while you call answer(model, ids, pixels, 16)


# %% tags=["check"]
def test_2(works_once):
    assert isinstance(works_once(answer_cached), bool), "return True or False"
    assert works_once(answer_cached) is True, "rejects the loop with a cache"
    limited = lambda model, ids, pixels, steps: generate(model, ids, pixels, max_new_tokens=steps)
    assert works_once(limited) is True, "rejects generate"
    assert works_once(answer_colleague) is False, "lets a tower pass that runs for each word"
    assert works_once(answer_plain) is False, "lets a loop pass that does everything again"

    def twice(model, ids, pixels, steps):
        features = model.encode_image(pixels)
        model(ids, image_features=features)
        return generate(model, ids, image_features=features, max_new_tokens=steps)

    def no_cache(model, ids, pixels, steps):
        features, start, types = model.encode_image(pixels), ids.shape[1], torch.zeros_like(ids)
        while ids.shape[1] < start + steps and ids[0, -1] != EOS:
            scores = model(ids, token_type_ids=types, image_features=features).logits[:, -1]
            token = scores.argmax(-1, keepdim=True)
            ids, types = torch.cat((ids, token), 1), torch.cat((types, token**0), 1)
        return ids[:, start:]

    assert works_once(twice) is False, "lets one pass that reads the prompt twice"
    assert works_once(no_cache) is False, "lets one pass that looks once, but has no cache"


check(test_2, works_once)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `tokens_out_of` tells it for the tower and for the decoder's `mlp`. With the answer in `slow`, how
# many tokens must pass through the decoder in all? (The last one is never fed.)
#
# </details>


# %% tags=["solution"]
# The tower alone is not enough: a loop may look once and still read the whole prompt again.
def works_once(answer):
    run = lambda: answer(model, ids, pixels, 16)
    looks, tokens = len(tokens_out_of(model.vision_tower, run)), sum(tokens_out_of(mlp, run))
    return looks == 1 and tokens == ids.shape[1] + slow.shape[1] - 1


check(test_2, works_once)

# %% [markdown]
# ### Exercise 3 (write): a limit for every row
#
# A server answers several people at once, and each has set a limit. Write the loop for a batch, greedy:
# a row ends at its eos or after `limits[row]` tokens, what follows is 0, and the loop stops as soon as all
# have ended. Use a cache, and feed only what is new.


# %% tags=["exercise"]
def answer_limited(model, input_ids, pixel_values, attention_mask, limits):
    return None  # int64[B, ≤ max(limits)]


# %% tags=["check"]
def test_3(answer_limited):
    def compare(model, given, limits):
        answers, part = [], model.language_model.layers[0].mlp
        run = lambda: answers.append(answer_limited(model, **given, limits=limits))
        try:
            passed = tokens_out_of(part, run)
        except Exception as error:
            raise AssertionError(f"limits {limits}: your loop stops with {error}") from None
        said = answers[0]
        assert isinstance(said, torch.Tensor) and said.ndim == 2, "return a tensor [B, tokens]"
        assert len(said) == 3, f"three rows went in, {len(said)} come out"
        rights = [row[:n].tolist() for row, n in zip(generate(model, **given), limits)]
        ends = [row.index(EOS) + 1 if EOS in row else len(row) for row in rights]
        assert said.shape[1] >= max(ends), f"limits {limits}: the answers are too short"
        for row, mine, right, end in zip("012", said.tolist(), rights, ends):
            about = f"limits {limits}, row {row}"
            assert mine[:end] == right[:end], f"{about}: not the tokens that this row gets alone"
            assert not any(mine[end:]), f"{about}: it goes on after its end"
        assert said.shape[1] == max(ends), f"limits {limits}: all had ended, the loop went on"
        prompt = given["input_ids"].shape[1]
        assert passed[:1] == [prompt], "read the prompts once, all rows in one call"
        assert set(passed[1:]) <= {1}, "feed only the newest token; the cache has the rest"
        assert len(passed) == max(ends), f"limits {limits}: {len(passed)} calls are too many"

    for limits in ([3, 5, 2], [20, 20, 20], [1, 1, 1], [2, 9, 9]):
        compare(model, three, limits)
    compare(small, inputs, [4, 7, 9])  # a model in which a seen pad changes the answer


check(test_3, answer_limited)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Begin with `steps_plain`. A row is done when its token is eos, *or* when as many tokens as its limit
# have come.
#
# </details>


# %% tags=["solution"]
# The loop of steps_plain; only the line that says who is done knows of the limits.
def answer_limited(model, input_ids, pixel_values, attention_mask, limits):
    cache = model.make_cache(len(input_ids), input_ids.shape[1] + max(limits) - 1)
    done, said = torch.zeros(len(input_ids), dtype=torch.bool), []
    while not done.all():
        logits = model(
            input_ids, pixel_values, attention_mask, cache=cache, logits_to_keep=1
        ).logits
        token = logits[:, -1].argmax(-1).masked_fill(done, 0)
        said.append(token)
        done = done | (token == EOS) | (torch.tensor(limits) <= len(said))
        input_ids, pixel_values = token[:, None], None
        attention_mask = F.pad(attention_mask, (0, 1), value=1)
    return torch.stack(said, dim=1)


check(test_3, answer_limited)

# %% [markdown]
# ## Summary
#
# - An answer is a loop: prefill once, then one token a call, until eos or a limit.
# - Decode waits for memory: each token reads all weights. Prefill reads them once for the whole
#   prompt.
# - So rows of a batch ride along cheaply; each needs its own `done`.
# - A byte is not a character: text is handed out when it is whole.
# - Equal answers do not prove equal work. Count the calls.

# %% [markdown]
# ## Quiz
#
# **1.** A user complains that the first word takes two seconds, another that words come slowly.
# Which parts would you look at?
#
# <details><summary>Answer</summary>
#
# The first word waits for the vision tower and the prefill: picture size, prompt length, arithmetic.
# The pace is decode: bytes of the weights and of the cache.
#
# </details>

# %% [markdown]
# **2.** Why are prompts padded on the left, when text is written from left to right?
#
# <details><summary>Answer</summary>
#
# New tokens are appended on the right. With pads there, the column that decides would differ from row to
# row. On the left they are out of the way; positions count real tokens, so nothing shifts.
#
# </details>

# %% [markdown]
# **3.** In `answer_plain`, what goes wrong without `token_type_ids`?
#
# <details><summary>Answer</summary>
#
# Everything would be prefix, where all see all. The picture and the prompt would look at the answer so
# far and change with every word. The model was trained with an answer that only looks back.
#
# </details>

# %% [markdown]
# ## References
#
# - Lucas Beyer et al., *PaliGemma: A versatile 3B VLM for transfer*, 2024, section 3 (prefix and
#   suffix).
# - Reuben Pope et al., *Efficiently Scaling Transformer Inference*, 2022, section 2 (prefill and
#   decode).
# - Samuel Williams, Andrew Waterman, David Patterson, *Roofline: an insightful visual performance
#   model*, 2009.
# - transformers: `generation/utils.py`, method `_sample`; big_vision:
#   `models/proj/paligemma/paligemma.py`, `prefill_cache` and `extend_cache`.

# %% [markdown] tags=["navigation"]
# [← Sampling](17_sampling.ipynb) | [contents](00_overview.ipynb) | [Detection →](19_detection.ipynb)
