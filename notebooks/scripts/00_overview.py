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
# [contents](00_overview.ipynb) | [Pictures →](01_plotting.ipynb)

# %% [markdown]
# # 00 · Overview: what happens between a picture and an answer?
#
# *30 minutes* · part 0, The whole
#
# **What you will be able to do**
#
# - name the parts between a picture and an answer, and the lesson that builds each;
# - follow one picture through them, shape by shape;
# - say what the shipped model can do, and show where it fails.
#
# The first cell runs a whole **PaliGemma** of our own, small enough to come with the course.

# %%
import paligemma
from paligemma.plotting import show_images
from paligemma.support.course import sample_picture, save_figure
from paligemma.support.course_map import model_map

pg = paligemma.load()
for piece in pg.stream(sample_picture("scene"), "caption en"):
    print(piece, end="|")

# %%
names = ["scene", "scene2", "scene3"]
pictures = [sample_picture(name) for name in names]
answers = pg.batch(pictures, ["caption en"] * 3)
save_figure(show_images(pictures, answers, height=2.8), "00_answers.png")

# %% [markdown]
# The titles are the model's own words. Nothing was looked up: three small pictures made of numbers
# went in, and a row of word pieces came out, one after the other. By the end of the course you will
# have written every line that did it.
#
# This is the way they take. The small numbers are the lessons.

# %% tags=["map"]
save_figure(model_map(), "00_map")

# %% [markdown]
# ## Setup
#
# From later lessons, all at once: this lesson is the only one that may look ahead.

# %% tags=["setup"]
import matplotlib.pyplot as plt
import torch
from PIL import Image

from paligemma.generation import generate
from paligemma.inference import TINY
from paligemma.model import PaliGemma, PaliGemmaConfig, prefix_lm_mask
from paligemma.plotting import show_heatmap
from paligemma.support.course import check
from paligemma.support.drawing import COLOURS, draw_boxes, draw_masks

model, processor = pg.model, pg.processor
scene = sample_picture("scene")
_ = torch.manual_seed(0)

# %% [markdown]
# ## The problem
#
# A language model continues text. It reads word pieces as vectors and guesses the next piece, again
# and again. It has never seen anything.
#
# The trick of a **vision-language model** is to make a picture look like text: cut it into patches,
# turn each into a vector *of the same width as a word's*, and put these in front of the prompt. The
# language model reads on as if the picture were a long foreign word.

# %% [markdown]
# ## By hand: one picture through all parts
#
# ### Picture and prompt become tensors
#
# The **image processor** ([lesson 02](02_image_processor.ipynb)) squashes the picture to a square and scales its numbers to
# −1 … 1. The **tokenizer** ([lesson 06](06_tokenizer.ipynb)) cuts the prompt into pieces. The **processor** ([lesson 14](14_processor.ipynb))
# lays both out in one row.

# %%
batch = processor([scene], ["caption en"])
for name, tensor in batch.items():
    print(f"{name:15} {tuple(tensor.shape)}  {tensor.dtype}")

# %%
ids = batch["input_ids"][0].tolist()
count = ids.count(processor.tokenizer.image_id)
print(f"{count} × <image>, then:")
print([processor.tokenizer.sp.id_to_piece(i) for i in ids[count:]])

# %% [markdown]
# 64 places are kept free for the picture. Then come `<bos>` (here it begins), the prompt, and a
# newline that says: your turn. `▁` is how the tokenizer writes a space.

# %% [markdown]
# ### The picture becomes 64 vectors
#
# The **vision tower** (lessons [03](03_patch_embedding.ipynb) to [05](05_siglip.ipynb)) cuts 8 × 8 patches of 14 × 14 pixels and lets them look at
# each other. The **projector** ([lesson 15](15_model.ipynb)) brings the result to the language model's width.

# %%
with torch.no_grad():
    features = model.vision_tower(batch["pixel_values"])  # (B, N, D of vision)
    image_tokens = model.multi_modal_projector(features)  # (B, N, D)
print(
    tuple(batch["pixel_values"].shape), "→", tuple(features.shape), "→", tuple(image_tokens.shape)
)

# %% [markdown]
# ### One sequence
#
# The prompt's pieces are looked up in a table (the **embedding**, [lesson 12](12_gemma.ipynb)) and the picture's
# vectors take the places that were kept free ([lesson 15](15_model.ipynb)).

# %%
with torch.no_grad():
    sequence = model.merge(batch["input_ids"], image_tokens)  # (B, L, D)
print(tuple(sequence.shape), "=", count, "image vectors +", len(ids) - count, "text vectors")

# %% [markdown]
# ### Who may look at whom
#
# In the language model every vector looks at others, but not at all of them. Picture and prompt see
# each other in both directions; an answer sees them and its own past. That is the **prefix-LM
# mask** ([lesson 15](15_model.ipynb)). Here with 4 image tokens, 3 of the prompt and 3 of the answer:

# %%
types = torch.tensor([[0] * 7 + [1] * 3])  # 0 prefix, 1 answer
mask = prefix_lm_mask(torch.ones_like(types), types, 10)[0, 0]
labels = ["img"] * 4 + ["ask"] * 3 + ["ans"] * 3
show_heatmap(mask.float(), "dark: this row may look at that column", rows=labels, columns=labels)

# %% [markdown]
# ### The next piece
#
# The **decoder** (lessons [07](07_rms_norm.ipynb) to [12](12_gemma.ipynb)) turns the sequence into one score a vocabulary entry. We only need
# the scores at the last place; softmax makes them probabilities.

# %%
with torch.no_grad():
    logits = model(batch["input_ids"], batch["pixel_values"]).logits  # (B, L, V)
probability = logits[0, -1].softmax(-1)
best = probability.topk(5)
for p, i in zip(best.values, best.indices, strict=True):
    print(f"{processor.tokenizer.sp.id_to_piece(int(i)):8} {p:.3f}")

# %% [markdown]
# It is almost sure that the caption begins with "a". Put the best piece at the end of the row, run
# again, and so on until the model says `<eos>` (the end).

# %% [markdown]
# ## As a loop
#
# This is the slowest, plainest way to answer: everything is computed anew for each piece.


# %%
def answer_slowly(picture, prompt):
    """Greedy answer, the whole model run once a piece; returns text and each step's probability."""
    batch = processor([picture], [prompt])
    prefix = batch["input_ids"]
    written, sure = [], []
    while len(written) < 20:
        row = torch.tensor([written], dtype=torch.int64)
        input_ids = torch.cat([prefix, row], dim=1)
        types = torch.cat([torch.zeros_like(prefix), torch.ones_like(row)], dim=1)
        with torch.no_grad():
            logits = model(input_ids, batch["pixel_values"], token_type_ids=types).logits[0, -1]
        p, token = logits.softmax(-1).max(-1)
        if token == processor.tokenizer.eos_id:
            break
        written.append(int(token))
        sure.append(float(p))
    return processor.decode(written), sure


text, sure = answer_slowly(scene, "caption en")
print(text)

# %% [markdown]
# ## The fast way
#
# `pg(...)` reads picture and prompt once, remembers the keys and values of attention (the **KV
# cache**, [lesson 11](11_kv_cache.ipynb)) and then reads one piece a step ([lesson 18](18_generation.ipynb)). The words are the same; that is
# the point of a cache.

# %%
assert pg(scene, "caption en") == text
print("the same answer:", pg(scene, "caption en"))

# %% [markdown]
# ## Against the reference
#
# Is this PaliGemma, or only something like it? `tests/test_parity.py` gives random weights to both
# this package and transformers and compares every score; the README shows the table. The lessons do
# the same for each part. Here we only check that the checkpoint has the published form.

# %%
from safetensors import safe_open

print(
    sorted(
        path.name for path in TINY.iterdir() if path.suffix in (".json", ".safetensors", ".model")
    )
)
with safe_open(TINY / "model.safetensors", "pt") as file:
    keys = list(file.keys())
print(len(keys), "tensors, for example", *keys[::40], sep="\n  ")

# %% [markdown]
# ## See it: does it really look?
#
# A model may guess well without looking: "a cat" is a frequent caption. The test of honesty is a
# **control**: keep the prompt, change the picture. A mirror swaps left and right, so the order of
# the words must swap too. A grey picture holds nothing.

# %%
mirror = scene.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
grey = Image.new("RGB", scene.size, (128, 128, 128))
controls = [scene, mirror, grey]
titles = pg.batch(controls, ["caption en"] * 3)
show_images(controls, titles, height=2.8)

# %% [markdown]
# Mirrored, the caption follows the picture. Of the grey square it makes something up: a language
# model always says *something*. There is no "I do not know" unless it was trained to say so.

# %% [markdown]
# ### One picture, many questions
#
# The prompt decides the task; the weights stay the same. The last answers are a box and a mask: four
# location words for the box's edges, sixteen for the shape, then the name.

# %%
for prompt in [
    "caption de",
    "answer en how many dogs are there?",
    "answer en where is the cat?",
    "answer en is there a bee?",
    "detect cat",
    "segment cat",
]:
    print(f"{prompt:36} → {pg(scene, prompt)}")

# %%
found = pg.detect(scene, "cat ; dog")
labels, scores = [f.label for f in found], [f.score for f in found]
boxes = draw_boxes(scene, [f.box for f in found], labels, scores)
shapes = [f for name in ("cat", "dog") for f in pg.segment(scene, name)]
masks = draw_masks(scene, [f.mask for f in shapes], [f.label for f in shapes])
figure = show_images([boxes, masks], ["detect cat ; dog", "segment cat, segment dog"], height=2.8)
save_figure(figure, "00_found.png")

# %% [markdown]
# ### How sure was it?
#
# Every piece was chosen with a probability. Where the bar is short, the model hesitated.

# %%
pieces = list(pg.stream(scene, "caption en"))
figure, axis = plt.subplots(figsize=(6, 2.4), layout="constrained")
axis.bar(range(len(sure)), sure, color=COLOURS["language"])
axis.set_xticks(range(len(sure)), [piece.strip() for piece in pieces])
axis.set_ylim(0, 1)
axis.set_ylabel("probability")
save_figure(figure, "00_sure")

# %% [markdown]
# ### Where it fails
#
# It was trained on one small world: emoji on simple backgrounds, 48 kinds of them. Outside of it
# the words are well formed and wrong. Here are three photographs.

# %%
photographs = [sample_picture(name) for name in ("cat", "coffee", "astronaut")]
guesses = pg.batch(photographs, ["caption en"] * 3)
show_images(photographs, guesses, height=2.6)

# %% [markdown]
# Nothing in its training looked like a photograph *of* something; photographs were only background.
# PaliGemma itself is the same program with far more numbers in it, learned from a billion pictures.
# Its weights can be downloaded, and [lesson 24](24_inference.ipynb) loads them.

# %% [markdown]
# ## At full size
#
# The same class builds PaliGemma 3B. On the **meta device** it has shapes but no memory, so counting
# its parameters costs nothing.

# %%
with torch.device("meta"):
    full = PaliGemma(PaliGemmaConfig())
parts = ["vision_tower", "multi_modal_projector", "language_model"]
print(f"{'part':24}{'ours':>12}{'PaliGemma 3B':>16}")
for part in parts:
    sizes = [sum(p.numel() for p in getattr(m, part).parameters()) for m in (model, full)]
    print(f"{part:24}{sizes[0]:12,}{sizes[1]:16,}")
totals = [sum(p.numel() for p in m.parameters()) for m in (model, full)]
print(f"{'all':24}{totals[0]:12,}{totals[1]:16,}")
table = full.language_model.embed_tokens.weight.numel()
print(f"{totals[1] / totals[0]:,.0f} times as many, {2 * totals[1] / 1e9:.2f} GB in bfloat16")
print(f"the table of word pieces: {table / totals[1]:.0%} of all")

# %% [markdown]
# The language model is most of it, and a good part of that is one table with a row for each of its
# 257,216 word pieces. In ours the vision tower is the larger half: seeing is what it had to learn.

# %% [markdown]
# ## A bug people really make
#
# A colleague builds the prompt by hand. No error, all shapes right, and every word belongs to the
# model's world. Compare the two columns before you read on: what could be missing?


# %%
def colleague(picture):
    """What the colleague sends: `<image>`×64, bos, prompt. Something is missing."""
    batch = processor([picture], ["caption en"])
    steps = generate(model, batch["input_ids"][:, :-1], batch["pixel_values"])
    return processor.decode(steps[0])


for picture, answer in zip(pictures, answers, strict=True):
    print(f"ours: {answer:28} colleague's: {colleague(picture)!r}")

# %% [markdown]
# The newline after the prompt is missing. In training, the answer always began after it, so without
# it the model is in a situation it has never seen. No shape tells you; only the answers are worse.
# The check is to compare the ids with those of a trusted processor.


# %%
def same_prompt(mine, prompt):
    """True when hand-made ids equal the processor's."""
    return mine == processor.encode_prefix(prompt)


tokenizer = processor.tokenizer
by_hand = [tokenizer.image_id] * 64 + [tokenizer.bos_id] + tokenizer.encode("caption en")
print(
    same_prompt(by_hand, "caption en"), same_prompt([*by_hand, tokenizer.newline_id], "caption en")
)

# %% [markdown]
# ## How to read the course
#
# - **In order**, to build all of it: parts I (a picture alone) and II (text alone) meet in part III,
#   and part IV makes them answer. A lesson imports only from earlier ones.
# - **One idea**: open the lesson whose box you want on the map; its Setup names what it needs.
# - **To teach it**: part I is one double session, part II two, parts III and IV two. The figures lie
#   in `figures/`.

# %% [markdown]
# ## Exercises
#
# Every lesson has three. First a **stub** that is not yet right, then a **check** that says so in
# one line. Edit the stub, run both again. A hint and a solution are folded below.
#
# ### Exercise 1 (predict): a larger picture
#
# The published model reads pictures of 224, 448 or 896 pixels in patches of 14. How many image
# tokens does each give? Replace the three numbers.

# %% tags=["exercise"]
image_tokens_at = {224: None, 448: None, 896: None}


# %% tags=["check"]
def test_1(found):
    for size, value in found.items():
        config = PaliGemmaConfig().vision_config
        config.image_size = size
        assert value == config.num_image_tokens, f"at {size} pixels: {value} is not it"


check(test_1, image_tokens_at)

# %% [markdown]
# <details><summary>Hint</summary>
#
# How many patches stand side by side? They also stand one below the other.
#
# </details>

# %% tags=["solution"]
image_tokens_at = {size: (size // 14) ** 2 for size in (224, 448, 896)}
check(test_1, image_tokens_at)

# %% [markdown]
# ### Exercise 2 (extend): your own picture
#
# The emoji that the model knows lie in `paligemma/assets/emoji`. Return a picture of 112 × 112
# pixels with **two bees**, side by side, on a light background, so that the model captions it
# "two bees". `sprite(name)` opens one emoji, 64 × 64 pixels with transparency.


# %% tags=["exercise"]
def sprite(name):
    return Image.open(TINY.parent / "emoji" / f"{name}.png").convert("RGBA")


def two_bees():
    picture = Image.new("RGB", (112, 112), (235, 240, 225))
    return picture  # paste them: picture.paste(what, (x, y), what)


# %% tags=["check"]
def test_2(make):
    picture = make()
    assert picture is not None and picture.size == (112, 112), "return a picture of 112 × 112"
    said = pg(picture, "caption en")
    assert said == "two bees", f"the model says {said!r}"


check(test_2, two_bees)

# %% [markdown]
# <details><summary>Hint</summary>
#
# At 64 pixels two of them do not fit side by side. Shrink each with `resize((40, 40))`, and pass the
# sprite also as the third argument of `paste`: its transparency decides which pixels are copied.
#
# </details>


# %% tags=["solution"]
def two_bees():
    picture = Image.new("RGB", (112, 112), (235, 240, 225))
    bee = sprite("bee").resize((40, 40))
    for x in (8, 62):
        picture.paste(bee, (x, 36), bee)
    return picture


check(test_2, two_bees)

# %% [markdown]
# ### Exercise 3 (fill in): the answer's probability
#
# `answer_slowly` also returns each piece's probability. How likely was the whole answer, all pieces
# together? Fill in `likelihood`.


# %% tags=["exercise"]
def likelihood(sure):
    return None  # your answer


# %% tags=["check"]
def test_3(likelihood):
    assert likelihood([0.5]) == 0.5, "one piece: its own probability"
    value = likelihood([0.5, 0.5, 0.1])
    assert value is not None and abs(value - 0.025) < 1e-9, "0.5, 0.5, 0.1 should give 0.025"
    assert likelihood(sure) <= min(sure), "no answer is likelier than its least likely piece"


check(test_3, likelihood)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Each probability is *given* the pieces before it. First this, and then that: do they add or
# multiply?
#
# </details>


# %% tags=["solution"]
def likelihood(sure):
    product = 1.0
    for p in sure:
        product *= p  # p(a, b, c) = p(a) · p(b given a) · p(c given a and b)
    return product


check(test_3, likelihood)

# %% [markdown]
# ## Summary
#
# - A picture becomes a row of vectors as wide as a word's; the language model just reads on.
# - Picture and prompt see each other fully, the answer only looks back.
# - One run gives one piece; a cache makes the next one cheap.
# - Our tiny model really looks (mirror it and see), but knows only its own small world.

# %% [markdown]
# ## Quiz
#
# **1.** Where does the model store what it has seen in the picture while it writes?
#
# <details><summary>Answer</summary>
#
# In the keys and values of the image tokens, in every layer of the decoder: the KV cache. The vision
# tower does not run again.
#
# </details>

# %% [markdown]
# **2.** Why may the prompt look at later words of the prompt, but the answer not at later words of
# the answer?
#
# <details><summary>Answer</summary>
#
# The prompt is known in full before anything is written. The answer's later pieces do not exist yet;
# a model trained to peek at them would have nothing to peek at when it writes.
#
# </details>

# %% [markdown]
# **3.** Could you put two pictures in front of one prompt?
#
# <details><summary>Answer</summary>
#
# The code would allow it: two times N image tokens. But this model was trained with exactly one, so
# its answers would mean little. What a model can do is set by its training, not by its shapes.
#
# </details>

# %% [markdown]
# ## References
#
# - Beyer et al. 2024, *PaliGemma: A versatile 3B VLM for transfer*, figures 1 and 2.
# - Zhai et al. 2023, *Sigmoid Loss for Language Image Pre-Training* (SigLIP).
# - Gemma Team 2024, *Gemma: Open Models Based on Gemini Research and Technology*.
# - `PaliGemmaForConditionalGeneration` in transformers; `paligemma.py` in big_vision.

# %% [markdown] tags=["navigation"]
# [contents](00_overview.ipynb) | [Pictures →](01_plotting.ipynb)
