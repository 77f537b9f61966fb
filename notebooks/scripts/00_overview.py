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
# *35 minutes* · part 0, The whole
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
from paligemma.support.course import sample_picture, save_figure, set_style
from paligemma.support.course_map import model_map

pg = paligemma.load()
for piece in pg.stream(sample_picture("scene"), "caption en"):
    print(piece, end="|")

# %%
set_style()
pictures = [sample_picture(name) for name in ("scene", "scene2", "scene3")]
answers = pg.batch(pictures, ["caption en"] * 3)
save_figure(show_images(pictures, answers, height=2.8), "00_answers.png")

# %% [markdown]
# The titles are the model's own words. Nothing was looked up: three small pictures made of numbers went in, and a row of tokens (pieces of words) came out, one after the other. By the end of the course you will have written every line that did it.
#
# This is the way they take. The small numbers are the lessons.

# %% tags=["map"]
save_figure(model_map(), "00_map")

# %% [markdown]
# ## Setup
#
# This lesson is the only one that may look ahead: it uses what all the others build.

# %% tags=["setup"]
import matplotlib.pyplot as plt
import torch
from PIL import Image

from paligemma.inference import TINY
from paligemma.model import PaliGemma, PaliGemmaConfig, prefix_lm_mask
from paligemma.plotting import show_heatmap
from paligemma.support.course import check
from paligemma.support.drawing import COLOURS, draw_boxes, draw_masks

model, processor, tokenizer = pg.model, pg.processor, pg.processor.tokenizer
scene = sample_picture("scene")

# %% [markdown]
# ## The problem
#
# A language model continues text. It reads tokens as vectors and guesses the next token, again and again. It has never seen anything.
#
# The trick of a **vision-language model** is to make a picture look like text: cut it into patches, turn each into a vector *of the same width as a token's*, and put these in front of the prompt. The language model reads on as if the picture were a long foreign word.

# %% [markdown]
# ## By hand: one picture through all parts
#
# ### Picture and prompt become tensors
#
# The **image processor** ([lesson 02](02_image_processor.ipynb)) squashes the picture to a square of numbers from −1 to 1. The **tokenizer** ([lesson 06](06_tokenizer.ipynb)) cuts the prompt into tokens. The **processor** ([lesson 14](14_processor.ipynb)) lays both out in one row.

# %%
batch = processor([scene], ["caption en"])
for name, tensor in batch.items():
    print(f"{name:15} {tuple(tensor.shape)}  {tensor.dtype}")

# %%
ids = batch["input_ids"][0].tolist()
count = ids.count(tokenizer.image_id)
print(f"{count} × <image>, then:")
print([tokenizer.sp.id_to_piece(i) for i in ids[count:]])

# %% [markdown]
# 64 positions are kept free for the picture. Then come `<bos>` (here it begins), the prompt, and a newline that says: your turn. `▁` is how the tokenizer writes a space.

# %% [markdown]
# ### The picture becomes 64 vectors
#
# The **vision tower** (lessons [03](03_patch_embedding.ipynb) to [05](05_siglip.ipynb)) cuts 8 × 8 patches of 14 × 14 pixels and lets them look at each other. The **projector** ([lesson 15](15_model.ipynb)) brings the result to the language model's width. In our small model both happen to be 128; in PaliGemma 3B they are 1152 and 2048.

# %%
with torch.no_grad():
    features = model.vision_tower(batch["pixel_values"])  # [B, N, D of the tower]
    image_tokens = model.multi_modal_projector(features)  # [B, N, D of the decoder]
for tensor in (batch["pixel_values"], features, image_tokens):
    print(tuple(tensor.shape))
config = PaliGemmaConfig()  # of PaliGemma 3B
assert (config.vision_config.hidden_size, config.text_config.hidden_size) == (1152, 2048)

# %% [markdown]
# ### One sequence
#
# The prompt's tokens are looked up in a table (the **embedding**, [lesson 12](12_gemma.ipynb)) and the picture's vectors take the positions that were kept free ([lesson 15](15_model.ipynb)).

# %%
with torch.no_grad():
    sequence = model.merge(batch["input_ids"], image_tokens)  # [B, L, D]
print(tuple(sequence.shape), "=", count, "image vectors +", len(ids) - count, "text vectors")

# %% [markdown]
# ### Who may look at whom
#
# In the language model every vector looks at others, but not at all of them. Picture and prompt see each other in both directions; an answer sees them and its own past. That is the **prefix-LM mask** ([lesson 15](15_model.ipynb)). Here with 4 image tokens, 3 of the prompt and 3 of the answer:

# %%
types = torch.tensor([[0] * 7 + [1] * 3])  # 0 prefix, 1 answer
mask = prefix_lm_mask(torch.ones_like(types), types, 10)[0, 0]
labels = ["img"] * 4 + ["ask"] * 3 + ["ans"] * 3
show_heatmap(mask.float(), "dark: this row may look at that column", rows=labels, columns=labels)

# %% [markdown]
# ### The next token
#
# The **decoder** (lessons [07](07_rms_norm.ipynb) to [12](12_gemma.ipynb)) turns the sequence into one score for each entry of the vocabulary, the **logits**. We only need those at the last position; softmax makes them probabilities.

# %%
with torch.no_grad():
    logits = model(batch["input_ids"], batch["pixel_values"]).logits  # [B, L, V]
best = logits[0, -1].softmax(-1).topk(5)
for p, i in zip(best.values, best.indices):
    print(f"{tokenizer.sp.id_to_piece(int(i)):8} {p:.3f}")
assert [tokenizer.decode([int(i)]) for i in best.indices[:2]] == ["a", "two"]
assert best.values[0] > 0.7 and best.values[:2].sum() > 0.99

# %% [markdown]
# The caption begins with "a" (cat), or with "two" (dogs): nothing else is likely. Put the best token at the end of the row, run again, and so on until the model says `<eos>` (the end).

# %% [markdown]
# ## As a loop
#
# This is the slowest, plainest way to answer: everything is computed anew for each token.


# %%
def answer_slowly(picture, prompt):
    """The answer, and the probability with which each token (the end too) was chosen."""
    batch = processor([picture], [prompt])
    ids, written, sure = batch["input_ids"], [], []
    while True:
        row = torch.cat([ids, torch.tensor([written], dtype=torch.int64)], dim=1)
        types = (torch.arange(row.shape[1]) >= ids.shape[1]).long()[None]  # 1 where it's ours
        with torch.no_grad():
            logits = model(row, batch["pixel_values"], token_type_ids=types).logits
        p, token = logits[0, -1].softmax(-1).max(-1)
        sure.append(float(p))
        if token == tokenizer.eos_id:
            return processor.decode(written), sure
        written.append(int(token))


# %%
text, sure = answer_slowly(scene, "caption en")
print(text)

# %% [markdown]
# ## The fast way
#
# `pg(...)` reads picture and prompt once, remembers the keys and values of attention (the **KV cache**, [lesson 11](11_kv_cache.ipynb)) and then reads one token a step ([lesson 18](18_generation.ipynb)). The words are the same; that is the point of a cache.

# %%
assert pg(scene, "caption en") == text
print("the same answer:", pg(scene, "caption en"))

# %% [markdown]
# ## Against the reference
#
# Is this PaliGemma, or only something like it? `tests/test_parity.py` gives random weights to both this package and transformers and compares every score; the README shows the table. Here we only check that the tensors in our file have the published names.

# %%
from safetensors import safe_open

from paligemma.checkpoint import published_name

with safe_open(TINY / "model.safetensors", "pt") as file:
    keys = list(file.keys())
print(f"{len(keys)} tensors, for example", *keys[::40], sep="\n  ")
assert set(keys) == {published_name(name) for name in model.state_dict()}

# %% [markdown]
# ## See it: does it really look?
#
# A model may guess well without looking: "a cat" is a frequent caption. The test of honesty is a **control**: keep the prompt, change the picture. A mirror swaps left and right, so the order of the words must swap too. A grey picture holds nothing.

# %%
mirror = scene.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
grey = Image.new("RGB", scene.size, (128, 128, 128))
controls = [scene, mirror, grey]
titles = pg.batch(controls, ["caption en"] * 3)
assert titles[:2] == ["a cat and two dogs", "two dogs and a cat"] and titles[2]
show_images(controls, titles, height=2.8)

# %% [markdown]
# Mirrored, the caption follows the picture. Of the grey square it makes something up: a language model always says *something*. There is no "I do not know" unless it was trained to say so.

# %% [markdown]
# ### One picture, many questions
#
# The prompt decides the task; the weights stay the same. The last answers are a box and a mask: four location tokens for the box's edges, sixteen mask tokens for the shape, then the name.

# %%
questions = ["how many dogs are there?", "where is the cat?", "is there a bee?"]
asked = ["caption de", *(f"answer en {q}" for q in questions), "detect cat", "segment cat"]
replies = [pg(scene, prompt) for prompt in asked]
for prompt, reply in zip(asked, replies):
    print(f"{prompt:36} → {reply}")
assert [(r.count("<loc"), r.count("<seg")) for r in replies[-2:]] == [(4, 0), (4, 16)]

# %%
found = pg.detect(scene, "cat ; dog")
shapes = pg.segment(scene, "cat") + pg.segment(scene, "dog")
print([f.label for f in found], [f.label for f in shapes])

# %% tags=["hide-input"]
boxes = draw_boxes(scene, [f.box for f in found], [f.label for f in found])
masks = draw_masks(scene, [f.mask for f in shapes], [f.label for f in shapes])
figure = show_images([boxes, masks], ["detect cat ; dog", "segment cat, segment dog"], height=2.8)
save_figure(figure, "00_found.png")

# %% [markdown]
# Sixteen tokens draw the outlines only roughly: an ear is cut off here and there ([lesson 20](20_mask_codec.ipynb) says what they can and cannot draw).

# %% [markdown]
# ### Where it fails, and how sure it is
#
# It was trained on one small world: emoji of 48 kinds in front of patterns and of a few photographs. What a photograph itself shows, it was never told. Outside of its world the words are well formed and wrong:

# %%
photographs = [sample_picture(name) for name in ("cat", "coffee", "astronaut")]
guesses = pg.batch(photographs, ["caption en"] * 3)
true = [("cat", "kitten"), ("cup", "coffee", "spoon"), ("woman", "astronaut", "rocket")]
assert not any(word in guess for guess, words in zip(guesses, true) for word in words)
show_images(photographs, guesses, height=2.6)

# %% [markdown]
# Each token was chosen with a probability. Compare a picture of its world with one from outside:

# %%
wrong, unsure = answer_slowly(sample_picture("cat"), "caption en")
print(f"{text}: {min(sure):.2f} at least. {wrong}: {min(unsure):.2f} at least.")
assert min(sure[1:]) > 0.95 and unsure[0] > 0.5 and min(unsure) == unsure[1] < 0.5

# %% tags=["hide-input"]
figure, axes = plt.subplots(1, 2, figsize=(9, 2.4), layout="constrained", sharey=True)
for axis, words, bars in ((axes[0], text, sure), (axes[1], wrong, unsure)):
    axis.bar(range(len(bars)), bars, color=COLOURS["language"])
    axis.set_xticks(range(len(bars)), [*words.split(), "<eos>"])
    axis.set(ylim=(0, 1), title=f"{words!r}")
axes[0].set_ylabel("probability")
save_figure(figure, "00_sure")

# %% [markdown]
# **What to notice.** In its world it is nearly certain of every word but the first, where it hesitated between "a" and "two". Of the photograph it expects that a caption begins with "a"; the *kind* it guesses. The words alone do not show that.
#
# PaliGemma itself is the same program with far more numbers in it, learned from about a billion examples. Its weights can be downloaded, and [lesson 24](24_inference.ipynb) loads them.

# %% [markdown]
# ## At full size
#
# The same class builds PaliGemma 3B. On the **meta device** it has shapes but no memory, so counting its parameters costs nothing.


# %%
def parameters(module):
    return sum(p.numel() for p in module.parameters())


with torch.device("meta"):
    full = PaliGemma(PaliGemmaConfig())
print(f"{'part':24}{'ours':>12}{'PaliGemma 3B':>16}")
for part in ("vision_tower", "multi_modal_projector", "language_model"):
    ours, theirs = parameters(getattr(model, part)), parameters(getattr(full, part))
    print(f"{part:24}{ours:12,}{theirs:16,}")
print(f"{'all':24}{parameters(model):12,}{parameters(full):16,}")

# %%
table = full.language_model.embed_tokens.weight
share = table.numel() / parameters(full)
print(f"{parameters(full) / parameters(model):,.0f} times as many;", end=" ")
print(f"a table of {table.shape[0]:,} rows is {share:.0%} of all")
assert parameters(full.language_model) > 0.8 * parameters(full) and 0.15 < share < 0.2
assert parameters(model.vision_tower) > parameters(model.language_model)

# %% [markdown]
# The language model is most of it, and a good part of that is one table with a row for each entry of its vocabulary. In ours the vision tower is the larger half: seeing is what it had to learn.

# %% [markdown]
# ## A bug people really make
#
# A colleague's answers are fluent, and wrong. The pictures are right, the weights are right. This is all that differs:

# %%
ours, theirs = "caption en", "Caption en"
for picture in pictures:
    print(f"{pg(picture, ours):28} {pg(picture, theirs)}")
assert all(pg(picture, ours) != pg(picture, theirs) for picture in pictures)

# %% [markdown]
# A capital letter. The model has never read the prompt in this form, and answers anyway. The check: look at the tokens, and use a prompt of exactly the form that the model was trained on. PaliGemma has a list of them: `caption en`, `answer en …`, `detect …`, `segment …`, `ocr`.

# %%
for prompt in (ours, theirs):
    print([tokenizer.sp.id_to_piece(i) for i in tokenizer.encode(prompt)])

# %% [markdown]
# ## Contents
#
# **0 The whole**: [00 Overview](00_overview.ipynb).
#
# **I Seeing**: [01 Pictures](01_plotting.ipynb), [02 Image processor](02_image_processor.ipynb), [03 Patch embedding](03_patch_embedding.ipynb), [04 SigLIP's attention](04_siglip_attention.ipynb), [05 SigLIP](05_siglip.ipynb).
#
# **II Language**: [06 Tokenizer](06_tokenizer.ipynb), [07 RMSNorm](07_rms_norm.ipynb), [08 GeGLU](08_geglu.ipynb), [09 RoPE](09_rope.ipynb), [10 Grouped-query attention](10_grouped_query_attention.ipynb), [11 KV cache](11_kv_cache.ipynb), [12 Gemma](12_gemma.ipynb), [13 Gemma 2](13_gemma2.ipynb).
#
# **III Together**: [14 Processor](14_processor.ipynb), [15 PaliGemma](15_model.ipynb), [16 Checkpoint](16_checkpoint.ipynb).
#
# **IV Answering**: [17 Sampling](17_sampling.ipynb), [18 Generation](18_generation.ipynb), [19 Detection](19_detection.ipynb), [20 Mask codec](20_mask_codec.ipynb), [21 Segmentation](21_segmentation.ipynb), [22 Quantization](22_quantization.ipynb), [23 Compilation](23_compilation.ipynb), [24 Inference](24_inference.ipynb).
#
# **V Learning**: [25 Scenes](25_scenes.ipynb), [26 Contrastive learning](26_contrastive.ipynb), [27 Training](27_training.ipynb), [28 Evaluation](28_evaluation.ipynb), [29 LoRA](29_lora.ipynb), [30 Distributed training](30_distributed.ipynb).

# %% [markdown]
# ## How to read the course
#
# - **In order**, to build all of it: parts I (a picture alone) and II (text alone) meet in part III, part IV makes them answer, and part V trains them. A lesson imports only from earlier ones.
# - **One idea**: open the lesson whose box you want on the map; its Setup names what it needs.
# - **To teach it**: part I is one double session, part II two, parts III and IV two. The figures lie in `figures/`.

# %% [markdown]
# ## Exercises
#
# Every lesson has three. First a **stub** that is not yet right, then a folded **check** that says so in one line. Edit the stub, run both again. A hint and a solution are folded below.
#
# ### Exercise 1 (predict): a larger picture
#
# The published model reads pictures of 224, 448 or 896 pixels in patches of 14. How many image
# tokens does each give? Replace the three numbers.

# %% tags=["exercise"]
image_tokens_at = {224: None, 448: None, 896: None}


# %% tags=["check"]
def test_1(found):
    assert isinstance(found, dict), "keep the three sizes; replace the three None"
    for size in (224, 448, 896):
        value = found.get(size)
        assert isinstance(value, int), f"at {size} pixels: write a whole number"
        config = PaliGemmaConfig().vision_config
        config.image_size = size
        right = config.num_image_tokens
        assert value**2 != right, f"at {size} pixels: that is one row of patches only"
        assert value <= right, f"at {size} pixels: {value} are too many to cut from it"
        assert value == right, f"at {size} pixels: with {value} a part of it stays unread"


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
# ### Exercise 3 (write): how likely was the whole answer?
#
# `answer_slowly` also returns the probability of each token, *given all tokens before it*. How likely was the whole answer, all of them together?


# %% tags=["exercise"]
def likelihood(sure):
    """A list of probabilities, one a token → the probability of all together."""
    return None  # your answer


# %% tags=["check"]
def test_3(likelihood):
    for given, whole in (([0.5], 0.5), ([0.5, 0.5, 0.1], 0.025), ([1.0, 0.9, 0.9], 0.81)):
        value = likelihood(list(given))
        assert isinstance(value, float), "return a float"
        assert value <= min(given) + 1e-9, "no answer is likelier than its least likely token"
        assert abs(value - whole) < 1e-9, f"of {given} it makes {value:.3f}: how do they join?"


check(test_3, likelihood)

# %% [markdown]
# <details><summary>Hint</summary>
#
# First this happens, and then that, *given* this. Do such probabilities add or multiply?
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
# - One run gives one token; a cache makes the next one cheap.
# - Our tiny model really looks (mirror it and see), but knows only its own small world.

# %% [markdown]
# ## Quiz
#
# **1.** Where does the model store what it has seen in the picture while it writes?
#
# <details><summary>Answer</summary>
#
# In the keys and values of the image tokens, in every layer of the decoder: the KV cache. The vision tower does not run again.
#
# </details>

# %% [markdown]
# **2.** Why may the prompt look at later words of the prompt, but the answer not at later words of the answer?
#
# <details><summary>Answer</summary>
#
# The prompt is known in full before anything is written. The answer's later tokens do not exist yet; a model trained to peek at them would have nothing to peek at when it writes.
#
# </details>

# %% [markdown]
# **3.** Could you put two pictures in front of one prompt?
#
# <details><summary>Answer</summary>
#
# The code allows it: two times N image tokens. But this model was trained with exactly one, so its answers would mean little. What a model can do is set by its training, not by its shapes.
#
# </details>

# %% [markdown]
# ## Symbols
#
# The same letter means the same thing in all lessons; shapes are written `[B, L, D]`. Only in a picture's own shape, `[3, H, W]` or `[H, W, 3]`, do H and W mean height and width. (In [lesson 29](29_lora.ipynb) A and B are LoRA's two matrices.) log is the natural logarithm, GB are 10⁹ bytes.
#
# | symbol | meaning |
# |---|---|
# | B | rows of a batch |
# | P | pictures of a batch |
# | N | patches of a picture, and its image tokens |
# | L | positions of a sequence; in attention: those that look (queries) |
# | S | positions that are looked at (keys), the room of a cache |
# | D | width of the residual stream |
# | M | hidden width of an MLP |
# | H, K | query heads; key and value heads |
# | Dh | width of a head (`head_dim`) |
# | V | rows of the vocabulary's table |
# | T | temperature |
# | θ, σ | angle of a rotation; the sigmoid |

# %% [markdown]
# ## Glossary
#
# Each term with the lesson that defines it. To look things up, not to learn them now.
#
# | term | lesson | meaning |
# |---|---|---|
# | adapter | [29](29_lora.ipynb) | a small trained addition to frozen weights, kept in its own file |
# | aliasing | [02](02_image_processor.ipynb) | a pattern finer than the new grid comes back as a coarse one |
# | all-reduce | [30](30_distributed.ipynb) | every process gives a tensor, every process gets the sum |
# | attention weight | [04](04_siglip_attention.ipynb) | how much of a value a query takes; each query's weights sum to 1 |
# | average precision | [19](19_detection.ipynb) | area under the precision–recall curve of a detector |
# | bicubic | [02](02_image_processor.ipynb) | resizing by a smooth kernel four pixels wide |
# | blind baseline | [28](28_evaluation.ipynb) | the best score that is possible without the picture |
# | byte fallback | [06](06_tokenizer.ipynb) | a character outside the vocabulary is written as its bytes |
# | byte-pair encoding | [06](06_tokenizer.ipynb) | a vocabulary grown by joining the commonest pair, again and again |
# | causal mask | [10](10_grouped_query_attention.ipynb) | a position looks at itself and at earlier ones only |
# | channel | [01](01_plotting.ipynb) | one of the three numbers of a pixel: red, green, blue |
# | checkpoint | [02](02_image_processor.ipynb) | a model's weights and settings, in files |
# | codebook | [20](20_mask_codec.ipynb) | the table of vectors that a codec's tokens name |
# | confidence interval | [28](28_evaluation.ipynb) | the range in which a measured share would fall again |
# | contrastive loss | [26](26_contrastive.ipynb) | pull matching pictures and texts together, push others apart |
# | convolution | [03](03_patch_embedding.ipynb) | one small matrix product, slid over the picture |
# | cross-entropy | [12](12_gemma.ipynb) | minus the log probability of the right token |
# | data parallelism | [30](30_distributed.ipynb) | copies of a model share the examples of a batch, and average their gradients |
# | DDP | [30](30_distributed.ipynb) | distributed data parallel: PyTorch's data parallelism |
# | decode step | [11](11_kv_cache.ipynb) | one token in, one token out, the past in the cache |
# | decoder | [12](12_gemma.ipynb) | the language model: a stack of blocks that predicts the next token |
# | embedding | [03](03_patch_embedding.ipynb) | a vector of learned numbers that stands for a patch or token |
# | epoch | [27](27_training.ipynb) | every example of the data once |
# | exposure bias | [28](28_evaluation.ipynb) | trained on true words only, a model does not know its own mistakes |
# | FSDP | [30](30_distributed.ipynb) | fully sharded data parallel: each process holds a part of every weight, gradient and average |
# | gate | [08](08_geglu.ipynb) | a factor that lets a neuron's value pass or not |
# | GeGLU | [08](08_geglu.ipynb) | an MLP whose values are multiplied by gates |
# | GELU | [05](05_siglip.ipynb) | a smooth step: large inputs pass, negative ones hardly |
# | gradient accumulation | [27](27_training.ipynb) | several small batches make one step |
# | greedy | [12](12_gemma.ipynb) | always take the likeliest token |
# | grouped-query attention | [10](10_grouped_query_attention.ipynb) | several query heads share one key and value head |
# | head | [04](04_siglip_attention.ipynb) | one of several attentions that run side by side on slices of the width |
# | IoU | [19](19_detection.ipynb) | intersection over union: how much two boxes or masks overlap |
# | KV cache | [11](11_kv_cache.ipynb) | keys and values of past positions, kept |
# | label | [14](14_processor.ipynb) | the id to be learned, at its own position; −100 where nothing is asked |
# | LayerNorm | [05](05_siglip.ipynb) | subtract the mean, divide by the spread, scale and shift |
# | learning-rate schedule | [27](27_training.ipynb) | how the rate changes from step to step |
# | left padding | [14](14_processor.ipynb) | shorter rows are filled up at their beginning |
# | location token | [06](06_tokenizer.ipynb) | one of 1,024 tokens that name a place along a side of the picture |
# | logits | [12](12_gemma.ipynb) | one score for each entry of the vocabulary |
# | LoRA | [29](29_lora.ipynb) | a weight's change as a product of two thin matrices |
# | mask token | [21](21_segmentation.ipynb) | one of 128 tokens that name a vector of the mask's codebook |
# | meta device | [16](16_checkpoint.ipynb) | tensors with a shape and no memory |
# | MLP | [05](05_siglip.ipynb) | two linear layers with a bend between them |
# | multi-query attention | [10](10_grouped_query_attention.ipynb) | all query heads share one key and value head |
# | nat | [12](12_gemma.ipynb) | unit of cross-entropy with the natural logarithm |
# | normalise | [02](02_image_processor.ipynb) | subtract a mean, divide by a spread: pixels to −1…1 |
# | nucleus | [17](17_sampling.ipynb) | the likeliest tokens that together reach probability p (top-p) |
# | patch | [03](03_patch_embedding.ipynb) | a square of pixels that becomes one vector |
# | position embedding | [03](03_patch_embedding.ipynb) | a learned vector for each position, added to the patch |
# | pre-norm | [05](05_siglip.ipynb) | normalise before each part, so that the stream itself stays free |
# | precision | [19](19_detection.ipynb) | share of what was found that is right |
# | prefill | [11](11_kv_cache.ipynb) | the prompt is read at once and fills the cache |
# | prefix | [11](11_kv_cache.ipynb) | what is given before the answer: picture and prompt |
# | prefix-LM mask | [15](15_model.ipynb) | prefix sees all of the prefix; the answer sees the prefix and its own past |
# | projector | [15](15_model.ipynb) | the linear layer from the tower's width to the decoder's |
# | query, key, value | [04](04_siglip_attention.ipynb) | what a position asks, what it offers, what it hands over |
# | rank | [29](29_lora.ipynb) | the inner width of LoRA's two matrices |
# | recall | [19](19_detection.ipynb) | share of what is there that was found |
# | resharding | [30](30_distributed.ipynb) | a checkpoint written by some processes is read by another number of them |
# | residual stream | [05](05_siglip.ipynb) | the vector of a position, to which every block adds |
# | RMSNorm | [07](07_rms_norm.ipynb) | divide by the root of the mean square, then scale |
# | RoPE | [09](09_rope.ipynb) | rotary position embedding: queries and keys turned by an angle that grows with the position |
# | safetensors | [16](16_checkpoint.ipynb) | a file of named tensors, read without running code |
# | shard | [16](16_checkpoint.ipynb) | one of the files of a checkpoint that is cut into several |
# | sigmoid loss | [26](26_contrastive.ipynb) | every pair of picture and text asked by itself: yes or no |
# | sliding window | [13](13_gemma2.ipynb) | a position looks back a fixed number of positions only |
# | soft token | [15](15_model.ipynb) | a vector from the picture that stands where a token's would |
# | soft-capping | [13](13_gemma2.ipynb) | scores bent so that they stay below a bound |
# | softmax | [04](04_siglip_attention.ipynb) | scores to positive numbers that sum to 1 |
# | special token | [06](06_tokenizer.ipynb) | an id that no text can spell: begin, end, picture |
# | straight-through | [20](20_mask_codec.ipynb) | the gradient passes a rounding as if it were not there |
# | suffix | [14](14_processor.ipynb) | the answer that is trained on |
# | teacher forcing | [27](27_training.ipynb) | in training each token is predicted from the true ones before it |
# | temperature | [17](17_sampling.ipynb) | logits are divided by it: below 1 bolder, above 1 more random |
# | tensor | [01](01_plotting.ipynb) | a block of numbers with a length along each of its axes |
# | tied embedding | [12](12_gemma.ipynb) | one table for reading tokens in and for scoring them out |
# | token | [03](03_patch_embedding.ipynb) | what a transformer reads, one a position: a patch, or a piece of text with an id |
# | token type | [14](14_processor.ipynb) | 0 in the prefix, 1 in the suffix |
# | top-k | [17](17_sampling.ipynb) | keep the k likeliest tokens |
# | uint8 | [01](01_plotting.ipynb) | a whole number from 0 to 255, in one byte |
# | vector quantisation | [20](20_mask_codec.ipynb) | replace a vector by the nearest of a codebook |
# | vocabulary | [06](06_tokenizer.ipynb) | all tokens that there are, in order of their ids |
# | warm-up | [27](27_training.ipynb) | the learning rate rises slowly at first |
# | zero-shot | [26](26_contrastive.ipynb) | to classify by comparing with texts, without training for it |

# %% [markdown]
# ## References
#
# - Beyer et al. 2024, *PaliGemma: A versatile 3B VLM for transfer*, figures 1 and 2.
# - Zhai et al. 2023, *Sigmoid Loss for Language Image Pre-Training* (SigLIP).
# - Gemma Team 2024, *Gemma: Open Models Based on Gemini Research and Technology*.
# - `PaliGemmaForConditionalGeneration` in transformers; `paligemma.py` in big_vision.

# %% [markdown] tags=["navigation"]
# [contents](00_overview.ipynb) | [Pictures →](01_plotting.ipynb)
