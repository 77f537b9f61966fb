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
# [← Scenes](25_scenes.ipynb) | [contents](00_overview.ipynb) | [Training →](27_training.ipynb)

# %% [markdown]
# # 26 · Contrastive learning: how does a picture learn from its caption?
#
# *45 minutes* · part V, Learning
#
# **What you will be able to do**
#
# - compute SigLIP's loss for three pictures and three captions with a pencil;
# - explain the two odd numbers it starts from, $\log 10$ and $-10$;
# - train two small towers that name new pictures in three languages;
# - say what sets the loss apart from CLIP's, and spread it over devices.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("contrastive")

# %% [markdown]
# ## Setup
#
# From earlier lessons: the SigLIP tower and its block ([05](05_siglip.ipynb)), the tokenizer
# ([06](06_tokenizer.ipynb)), the scenes ([25](25_scenes.ipynb)). Cells that begin with `#| export`
# become [contrastive.py](../paligemma/contrastive.py).

# %%
#| export
"""The sigmoid image–text loss that trained SigLIP, and the two towers that it trains."""

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from paligemma.siglip import SiglipEncoderLayer, SiglipMLP, SiglipVisionConfig, SiglipVisionModel

# %% tags=["setup"]
import copy

import matplotlib.pyplot as plt
import numpy as np
from safetensors.torch import load_file

from paligemma.plotting import show_heatmap, show_images
from paligemma.scenes import ASSETS, background, caption_of, compose, place
from paligemma.support.course import check, save_figure
from paligemma.support.drawing import COLOURS
from paligemma.support.sprites import ANGLES, NAMES, SCALES, sprites
from paligemma.tokenizer import Tokenizer

torch.set_num_threads(1)  # small matrices: more threads would only wait for each other
_ = torch.manual_seed(24)

# %% [markdown]
# ## The problem
#
# Nobody labels a billion pictures. But the web is full of pictures *with a line of text beside them*.
# What can one learn from such pairs alone?
#
# Here are three pictures. Their captions, in another order: *a cow; a frog; a panda*. Who can match them
# knows what each shows.


# %% tags=["hide-input"]
def close_up(kind, rng):
    """One object on a background, cut to 56 × 56 pixels around it: uint8[56, 56, 3]."""
    scale, angle, view = (int(rng.integers(n)) for n in (len(SCALES), len(ANGLES), 2))
    sprite = sprites()[kind][scale][angle][view]
    height, width = sprite[2].shape
    scene = compose(background(rng), [sprite], place(rng, [width], [height]))
    x0, y0, x1, y1 = scene.boxes[0].tolist()
    left, top = ((a + b) // 2 - 28 + int(rng.integers(-8, 9)) for a, b in ((x0, x1), (y0, y1)))
    left, top = max(0, min(56, left)), max(0, min(56, top))
    return scene.image[top : top + 56, left : left + 56]


rng = np.random.default_rng(5)
three = [close_up(NAMES.index(name), rng) for name in ("panda", "cow", "frog")]
fig = show_images(three, ["picture A", "picture B", "picture C"], height=1.6)
save_figure(fig, "26_problem.png")

# %% [markdown]
# That game is the whole idea. A **vision tower** turns each picture into one vector, a **text tower**
# each caption. Vectors of a true pair shall point the same way, all others not: a **contrastive loss**
# asks for this. The other pairs of the batch are the contrast.

# %% [markdown]
# ## By hand
#
# Three pictures, three captions, vectors of width $D = 2$ and length 1. Picture $i$ belongs to
# caption $i$. Their dot product is the cosine of the angle: 1
# for the same direction, 0 for a right angle.

# %%
image_features = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])  # [B, D]
text_features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])  # [B, D]
cosines = image_features @ text_features.T  # [B, B]: row = picture, column = caption
print(cosines)

# %% [markdown]
# Now ask nine separate questions, one a cell: *do these two belong together?* A scale and a bias turn
# a cosine into a logit, the sigmoid turns that into a probability:
#
# $$\ell_{ij} = s \cos_{ij} + b \qquad p_{ij} = \sigma(\ell_{ij}) = \frac{1}{1 + e^{-\ell_{ij}}}$$
#
# Let $s = 10$ and $b = -7$. Row 1: $10 \cdot 1 - 7 = 3$, then $10 \cdot 0.8 - 7 = 1$, then $-7$.

# %% [markdown]
# The true answer is $z_{ij} = +1$ on the diagonal and $-1$ elsewhere. A cell costs $-\log$ of the
# probability given to the true answer, and since $1 - \sigma(\ell) = \sigma(-\ell)$, one formula
# serves both. This is the **sigmoid loss**:
#
# $$\text{loss}_{ij} = -\log \sigma(z_{ij}\,\ell_{ij}) = \log\left(1 + e^{-z_{ij}\,\ell_{ij}}\right)$$
#
# The first cell: $\log(1 + e^{-3}) = 0.05$. Its neighbour says "together" by mistake:
# $\log(1 + e^{1}) = 1.31$.

# %%
scale, bias = 10.0, -7.0
logits, signs = scale * cosines + bias, 2 * torch.eye(3) - 1
costs = torch.log(1 + torch.exp(-signs * logits))
print(f"sum {costs.sum():.2f}, a picture {costs.sum() / 3:.2f}")
assert costs[0, 1] + costs[1, 2] > 0.75 * costs.sum()

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 3, figsize=(8.8, 2.8), layout="constrained")
rows, columns = [f"picture {i}" for i in (1, 2, 3)], ["1", "2", "3"]
titles = ("logit 10 cos − 7", "probability “together”", "loss of the cell")
for axis, values, title in zip(axes, (logits, torch.sigmoid(logits), costs), titles):
    first, centre = axis is axes[0], 0 if axis is axes[0] else None
    show_heatmap(values, title, rows if first else [""] * 3, columns, True, centre, ax=axis)
    axis.set_xlabel("caption")
    for text in axis.texts:
        text.set_fontsize(9)
save_figure(fig, "26_by_hand")

# %% [markdown]
# Two cells make three quarters of the cost: (1, 2) and (2, 3), where a wrong pair has the cosine 0.8.
# To get cheaper, caption 2 must turn away from picture 1. SigLIP sums all cells and divides by the
# number of *pictures*, not of cells.
#
# ## As a loop


# %%
def sigmoid_loss_loop(image_features, text_features, scale, bias):
    total = 0.0
    for i, image in enumerate(image_features):
        for j, text in enumerate(text_features):
            cosine = image @ text / (image.norm() * text.norm())
            logit = scale * cosine + bias
            truth = 1 if i == j else -1
            total = total + torch.log(1 + torch.exp(-truth * logit))
    return total / len(image_features)


# %%
print(f"{sigmoid_loss_loop(image_features, text_features, scale, bias):.4f}")

# %% [markdown]
# ## Vectorised
#
# One matrix product gives all cells. `F.logsigmoid(x)` is $\log \sigma(x)$ without the detour over
# $\sigma$. The detour is dangerous: in float32 $\sigma(-120)$ is 0, its logarithm $-\infty$, and no
# gradient ever comes back from there.

# %%
wrong = torch.tensor([-20.0, -120.0])  # the true answer got these logits
print("through the sigmoid:", torch.log(torch.sigmoid(wrong)).tolist())
print("log-sigmoid:        ", F.logsigmoid(wrong).tolist())

# %% [markdown]
# The whole loss has five lines. Vectors first get the length 1, so that only directions count.


# %%
#| export
def sigmoid_loss(image_features, text_features, scale, bias):
    """SigLIP's loss: for each picture and each text, do the two belong together?"""
    images, texts = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    logits = scale * images @ texts.T + bias  # [B, B]
    signs = 2 * torch.eye(len(logits)) - 1  # +1 on the diagonal, -1 elsewhere
    return -F.logsigmoid(signs * logits).sum() / len(logits)


# %%
a, b = torch.randn(7, 5), torch.randn(7, 5)
torch.testing.assert_close(sigmoid_loss(a, b, 3.0, -1.0), sigmoid_loss_loop(a, b, 3.0, -1.0))
torch.testing.assert_close(sigmoid_loss(9 * a, b / 7, 3.0, -1.0), sigmoid_loss(a, b, 3.0, -1.0))
print("tensors and loop agree; the length of a vector does not matter")

# %%
print(f"{sigmoid_loss(a, b[:1], 3.0, -1.0):.1f}")  # seven pictures, a single caption

# %% [markdown]
# A single caption for seven pictures: the plain form copied it to all, without a word. This is for
# what comes later, and refuses what cannot be pairs:


# %%
#| export
def _unit_pairs(image_features, text_features):
    """Both features with rows of length 1, if they can be pairs."""
    shapes = list(image_features.shape), list(text_features.shape)
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or 0 in shapes[0]:
        raise ValueError(
            f"features must be [B, D] of the same shape, got {shapes[0]} for pictures and "
            f"{shapes[1]} for texts: row i of one belongs to row i of the other"
        )
    return F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)


# %% [markdown]
# ## Why it starts at log 10 and −10
#
# Scale and bias are learned, from where? In a batch of $B$ there is one true pair a picture
# and $B - 1$ wrong ones, and cosines of fresh towers are small. Without a bias each cell has
# probability ½ and costs $\log 2$.


# %%
def first_loss(pairs, bias):
    """Loss a picture when all cosines are 0: one true pair, the others wrong."""
    yes, no = -F.logsigmoid(torch.tensor([bias, -bias])).double()
    return (yes + (pairs - 1) * no).item()


# %%
for bias in (0.0, -5.0, -10.0):
    print(f"b = {bias:5}: first loss at 32,768 pairs {first_loss(32_768, bias):10,.1f}")
assert 10 < first_loss(32_768, -10.0) < 12 and first_loss(32_768, 0.0) > 20_000

# %% [markdown]
# With $b = -10$ the model starts by saying *no* to everything, which is right almost everywhere: only
# the true pair costs much, about 10. The gradients tell the same; a cell's is the probability that it
# gave to the wrong answer:

# %% tags=["hide-input"]
biases = torch.linspace(-16, 4, 201)
pull, push = torch.sigmoid(-biases), 32_767 * torch.sigmoid(biases)
assert abs(biases[(pull - push).abs().argmin()] + math.log(32_767)) < 0.2
assert push[160] > 30_000 * pull[160]  # at b = 0
fig, ax = plt.subplots(figsize=(6.5, 2.6), layout="constrained")
ax.semilogy(biases, pull, color=COLOURS["good"], label="pull of the true pair")
ax.semilogy(biases, push, color=COLOURS["bad"], label="push of 32,767 wrong ones")
ax.axvline(-math.log(32_767), color=COLOURS["muted"], ls=":")
ax.set(xlabel="bias b", ylabel="first gradient, a picture")
ax.text(-math.log(32_767) + 0.15, 0.004, "−log B")
ax.legend(loc="center right", bbox_to_anchor=(1, 0.58))
save_figure(fig, "26_first_loss")

# %% [markdown]
# At $b = 0$ the first steps would only teach "everything is different from everything". At
# $-\log B \approx -10.4$ (dotted) the two are in balance. The scale starts at 10, so that a cosine of 1
# can just undo the bias; learned as $e^{t}$ from $t = \log 10$, it stays positive.

# %% [markdown]
# ## Two towers
#
# [Lesson 05](05_siglip.ipynb)'s tower ends with a vector for each patch. The loss wants one for the
# picture: a single learned query, the **probe**, asks all patches and gets one mix of them.


# %%
#| export
class PoolingHead(nn.Module):
    """One learned query attends to all patches, then an MLP: a picture becomes one vector.

    Args:
        config: width and heads of the vision tower.

    Source: `SiglipMultiheadAttentionPoolingHead` in transformers; Zhai et al. 2022 (MAP head).
    """

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, config.hidden_size))
        self.attention = nn.MultiheadAttention(
            config.hidden_size, config.num_attention_heads, batch_first=True
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`float[P, N, D]` → `float[P, D]`."""
        probe = self.probe.expand(len(x), -1, -1)  # [P, 1, D]
        x = self.attention(probe, x, x, need_weights=False)[0][:, 0]  # [P, D]
        return x + self.mlp(self.layernorm(x))


# %%
#| export
class PooledVisionModel(SiglipVisionModel):
    """SigLIP's vision tower with a pooling head."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(config)
        self.head = PoolingHead(config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`float[P, 3, H, W]` in -1…1 → `float[P, D]`."""
        return self.head(super().forward(pixel_values))


# %% [markdown]
# The text tower is made of the same blocks, without a mask. Captions are padded to one length, and the
# **last** position, which can look at all others, is the caption's vector.


# %%
#| export
@dataclass
class SiglipTextConfig:
    """Shape of the text tower; the defaults are SigLIP So400m/14 at 224 pixels.

    Source: Zhai et al. 2023 (SigLIP) and its published `config.json`.
    """

    vocab_size: int = 32000
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    max_position_embeddings: int = 16
    layer_norm_eps: float = 1e-6


# %%
#| export
class SiglipTextModel(nn.Module):
    """Token and position embeddings, blocks without a mask, the last position projected.

    Args:
        config: the shape of the tower.

    Source: `SiglipTextTransformer` in transformers.
    """

    def __init__(self, config: SiglipTextConfig):
        super().__init__()
        self.config = config
        width, length = config.hidden_size, config.max_position_embeddings
        tokens, positions = nn.Embedding(config.vocab_size, width), nn.Embedding(length, width)
        # The tower's block, which reads only fields that both configs have.
        block = cast(SiglipVisionConfig, config)
        layers = (SiglipEncoderLayer(block) for _ in range(config.num_hidden_layers))
        # Named as published keys read: embeddings.token_embedding.weight, encoder.layers.0 …
        self.embeddings = nn.ModuleDict(
            {"token_embedding": tokens, "position_embedding": positions}
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.final_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Linear(width, width)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`int64[B, L]`, padded to the full length L → `float[B, D]`."""
        length = self.config.max_position_embeddings
        if input_ids.dim() != 2 or input_ids.shape[1] != length:
            raise ValueError(
                f"input_ids are {list(input_ids.shape)}; this tower reads [B, {length}]: pad every "
                "text to the full length, its vector is the last position's"
            )
        tokens = self.embeddings["token_embedding"](input_ids)  # [B, L, D]
        x = tokens + self.embeddings["position_embedding"].weight
        for layer in self.encoder["layers"].children():
            x = layer(x)
        return self.head(self.final_layer_norm(x)[:, -1])


# %% [markdown]
# `ContrastiveModel` holds both towers and the two learned numbers.


# %%
#| export
class ContrastiveModel(nn.Module):
    """A vision tower and a text tower whose vectors can be compared.

    Args:
        vision_config, text_config: the shapes; both of the same width D.

    Raises:
        ValueError: the towers end in different widths.

    Source: `SiglipModel` in transformers; `two_towers.py` in big_vision.
    """

    def __init__(self, vision_config: SiglipVisionConfig, text_config: SiglipTextConfig):
        super().__init__()
        widths = vision_config.hidden_size, text_config.hidden_size
        if widths[0] != widths[1]:
            raise ValueError(
                f"pictures get vectors of width {widths[0]} and texts of width {widths[1]}, which "
                "cannot be compared: give both configs the same hidden_size"
            )
        self.vision_model = PooledVisionModel(vision_config)
        self.text_model = SiglipTextModel(text_config)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(10.0)]))
        self.logit_bias = nn.Parameter(torch.tensor([-10.0]))
        init_weights(self)

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """`float[P, 3, H, W]` and `int64[B, L]` → logits `float[P, B]`, texts by pictures."""
        images = F.normalize(self.vision_model(pixel_values), dim=-1)  # [P, D]
        texts = F.normalize(self.text_model(input_ids), dim=-1)  # [B, D]
        return self.logit_scale.exp() * images @ texts.T + self.logit_bias

    def loss(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """The sigmoid loss of B pictures, each with its own text: float[]."""
        images, texts = self.vision_model(pixel_values), self.text_model(input_ids)
        return sigmoid_loss(images, texts, self.logit_scale.exp(), self.logit_bias)


# %%
#| export
@torch.no_grad()
def init_weights(model: nn.Module) -> None:
    """Start as SigLIP does: Xavier for matrices, small embeddings, biases at zero.

    Args:
        model: changed in place; norms, `logit_scale` and `logit_bias` keep their values.

    Source: `vit.py` in big_vision.
    """
    for name, weight in model.named_parameters():
        if name.endswith(("token_embedding.weight", "position_embedding.weight")):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        elif name.endswith("patch_embedding.weight"):
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        elif weight.dim() == 2:
            nn.init.xavier_uniform_(weight)
        elif name.endswith("bias") and not name.endswith("logit_bias"):
            nn.init.zeros_(weight)


# %% [markdown]
# ## Against the reference
#
# A small file holds a random `SiglipModel` of transformers, its logits and its loss. The names of all
# weights are the same, so they load strictly.

# %%
stored = load_file("reference/contrastive.safetensors")
sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
published = ContrastiveModel(
    SiglipVisionConfig(**sizes, num_hidden_layers=1, image_size=14, patch_size=7),
    SiglipTextConfig(**sizes, num_hidden_layers=2, vocab_size=40, max_position_embeddings=6),
)
weights = {k.removeprefix("model."): v for k, v in stored.items() if k.startswith("model.")}
print(len(weights), "tensors:", published.load_state_dict(weights))

# %% tags=["nbval-ignore-output"]
with torch.no_grad():
    logits = published(stored["pictures"], stored["ids"])
    loss = published.loss(stored["pictures"], stored["ids"])
gaps = (logits - stored["logits"]).abs().max().item(), (loss - stored["loss"]).abs().item()
print(f"largest difference: logits {gaps[0]:.0e}, loss {gaps[1]:.0e}")
assert max(gaps) <= 1e-5

# %% [markdown]
# ## See it: two small towers learn to match
#
# Twelve kinds, each named in three languages: 36 captions. 80 close-ups of each kind for training, 20
# others for the test. The tokenizer is the shipped model's.


# %%
def draw(kinds, count, seed):
    """float[kinds, count, 3, 56, 56] in -1…1; each seed is another set of pictures."""
    rng = np.random.default_rng((24, seed))
    pictures = [[close_up(kind, rng) for _ in range(count)] for kind in kinds]
    return torch.from_numpy(np.array(pictures)).permute(0, 1, 4, 2, 3).float() / 127.5 - 1


# %%
KINDS = torch.arange(12)
train, held_out = draw(KINDS.tolist(), 80, seed=0), draw(KINDS.tolist(), 20, seed=1)
test_pixels, truth = held_out.flatten(0, 1), KINDS.repeat_interleave(20)  # 240 pictures

# %%
tokenizer = Tokenizer.from_pretrained(ASSETS / "tiny")
words = [[caption_of([kind], language) for kind in range(12)] for language in ("en", "de", "fr")]
pieces = [[tokenizer.encode(word) for word in row] for row in words]
LENGTH = max(len(ids) for row in pieces for ids in row)
ids = torch.tensor([[(ids + [0] * LENGTH)[:LENGTH] for ids in row] for row in pieces])
for row, tokens in zip(words, ids):
    print(row[2], tokens[2].tolist())

# %% [markdown]
# Two blocks of width 64 read a picture's 16 patches, one reads captions.

# %%
sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
vision = SiglipVisionConfig(**sizes, num_hidden_layers=2, image_size=56)
text = SiglipTextConfig(
    **sizes, num_hidden_layers=1, vocab_size=len(tokenizer), max_position_embeddings=LENGTH
)
model = ContrastiveModel(vision, text)
untrained, mixed_up = copy.deepcopy(model), copy.deepcopy(model)

# %% [markdown]
# ### One of each kind
#
# A batch must not hold the same caption twice: the loss would push a cat away from "a cat" because that
# came with *another* cat. On the web this is rare; with twelve kinds it would happen all the time. So a
# batch has one picture of each kind, captioned in a language drawn at random.


# %%
def batch(generator):
    which = torch.randint(80, (12,), generator=generator)
    language = torch.randint(3, (12,), generator=generator)
    return train[KINDS, which], ids[language, KINDS]


# %%
def fit(parameters, loss, steps, rate=1e-3):
    """The plainest training there is: the losses of the steps."""
    optimizer, losses = torch.optim.AdamW(parameters, lr=rate), []
    for _ in range(steps):
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


# %%
generator = torch.Generator().manual_seed(0)
losses = fit(model.parameters(), lambda: model.loss(*batch(generator)), steps=800)

# %% [markdown]
# To classify a picture, write down the names of the classes and take the nearest. No classifier was trained: this is **zero-shot** classification.


# %%
@torch.no_grad()
def zero_shot(model, pixels, input_ids):
    """The number of the nearest text for each picture: int64[P]."""
    return model(pixels, input_ids).argmax(dim=1)


# %%
def accuracy(model, language=0):
    return (zero_shot(model, test_pixels, ids[language]) == truth).float().mean().item()


# %% tags=["nbval-ignore-output"]
before, after = ([accuracy(tower, n) for n in range(3)] for tower in (untrained, model))
print("en, de, fr:", [f"{x:.0%}" for x in before], "→", [f"{x:.0%}" for x in after])
assert min(after) > 0.5 > 0.25 > max(before) and max(after) - min(after) < 0.15

# %% tags=["hide-input"]
know_nothing = math.log(12) + 11 * math.log(12 / 11)  # says 1 in 12 to every cell
assert 8 < losses[0] < 12 and sum(losses[-20:]) / 20 < know_nothing / 2
assert abs(know_nothing - 3.44) < 0.01
assert abs(np.mean(losses[20:80]) - know_nothing) < 0.2
assert not set(ids[0, 2].tolist()) & set(ids[1, 2].tolist()) - {0}  # "a lion", "Löwe"
fig, ax = plt.subplots(figsize=(6.5, 2.4), layout="constrained")
ax.plot(losses, color=COLOURS["vision"], lw=1)
ax.axhline(know_nothing, color=COLOURS["ink"], ls="--", lw=0.9)
ax.text(800, know_nothing + 0.2, "“one in twelve” for every cell", ha="right")
ax.set(xlabel="step", ylabel="sigmoid loss, a picture", ylim=(0, None))
save_figure(fig, "26_training")

# %% [markdown]
# The loss falls at once to the dashed line at 3.44: whoever knows only that *one pair in twelve* is true
# pays this, without looking. Then the towers must look.
#
# German and French work as well as English. "Löwe" and "a lion" share no token and never met, but both
# met the same pictures.

# %% [markdown]
# ### The matrix, before and after
#
# Mean cosine of the held-out pictures of each kind with each English caption.


# %%
@torch.no_grad()
def mean_cosines(model):
    images = F.normalize(model.vision_model(test_pixels), dim=-1).view(12, 20, -1)
    texts = F.normalize(model.text_model(ids[0]), dim=-1)
    return images.mean(dim=1) @ texts.T  # [kinds, kinds]


# %% tags=["hide-input"]
after = mean_cosines(model)
assert after.diagonal().mean() > after[~torch.eye(12, dtype=torch.bool)].mean() + 0.3
fig, axes = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
names = [NAMES[kind] for kind in range(12)]
for axis, matrix, title in zip(axes, (mean_cosines(untrained), after), ("before", "after")):
    rows = names if axis is axes[0] else []
    show_heatmap(matrix, f"{title} training", rows, words[0], centre=0, ax=axis)
    axis.images[0].set_clim(-1, 1)
axes[0].set_ylabel("pictures of")
fig.colorbar(axes[1].images[0], ax=axes, shrink=0.6, label="cosine", ticks=[-1, 0, 1])
save_figure(fig, "26_matrix")

# %% tags=["hide-input"]
shown = [held_out[kind, number] for number in (0, 1) for kind in range(0, 12, 2)]
guesses = zero_shot(model, torch.stack(shown), ids[1]).tolist()
titles = [words[1][guess] for guess in guesses]
fig = show_images([(x.permute(1, 2, 0) + 1) / 2 for x in shown], titles, columns=6, height=1.2)
save_figure(fig, "26_named.png")

# %% [markdown]
# A diagonal stands out; beside it, kinds that the towers still confuse. Over each picture stands the
# German caption that the model finds nearest, mostly the right one.

# %% [markdown]
# ## What such a start buys
#
# PaliGemma's vision tower *is* SigLIP's. What is that worth? Take **twelve other kinds** that no tower
# has seen, 16 labelled pictures of each, and name a new picture after the nearest labelled one. To see
# what the *pairs* did, another model trains on the same 800 batches with the captions mixed up.

# %%
order = torch.Generator().manual_seed(1)


def mixed_loss():
    pixels, captions = batch(generator)
    return mixed_up.loss(pixels, captions[torch.randperm(12, generator=order)])


generator.manual_seed(0)  # the same pictures in the same order
_ = fit(mixed_up.parameters(), mixed_loss, steps=800)

# %%
labelled = draw(range(12, 24), 16, seed=2).flatten(0, 1)
unknown = draw(range(12, 24), 20, seed=3).flatten(0, 1)


# %%
@torch.no_grad()
def named_right(tower):
    known, new = F.normalize(tower(labelled), dim=-1), F.normalize(tower(unknown), dim=-1)
    nearest = (new @ known.T).argmax(dim=1)  # of the 192 labelled pictures
    return (nearest // 16 == truth).float().mean().item()


# %% tags=["nbval-ignore-output"]
towers = {"true pairs": model, "captions mixed up": mixed_up, "untrained": untrained}
right = {name: named_right(tower.vision_model) for name, tower in towers.items()}
print({name: f"{share:.0%}" for name, share in right.items()}, "chance 8%")
assert right["true pairs"] > 1.5 * max(right["captions mixed up"], right["untrained"])

# %% [markdown]
# Same tower, same pictures, same steps: only true pairs make vectors in which kinds that nobody named
# lie together. Who must tell a cow from a frog learns edges, colours and shapes, of which new kinds are
# made as well. Hence SigLIP in PaliGemma; [lesson 27](27_training.ipynb) trains the rest.

# %% [markdown]
# ## CLIP asks another question
#
# CLIP (2021) asks each picture: *which one of these B captions is yours?* A softmax over the row, a
# cross-entropy; the same for each column; the mean of both.


# %%
#| export
def softmax_loss(
    image_features: torch.Tensor, text_features: torch.Tensor, scale: torch.Tensor | float
) -> torch.Tensor:
    """CLIP's loss (InfoNCE): which of the texts is this picture's, which picture this text's?

    The arguments are those of `sigmoid_loss`; a bias would have no effect.

    Source: Radford et al. 2021, figure 3; Oord et al. 2018.
    """
    images, texts = _unit_pairs(image_features, text_features)
    logits = scale * images @ texts.T  # [B, B]
    truth = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


# %%
print(f"CLIP's loss of our three pairs: {softmax_loss(image_features, text_features, 10.0):.2f}")


# %% [markdown]
# Give both a picture that fits *none* of our three captions: it points away from all of them.

# %%
stranger = torch.tensor([-0.8, -0.6])
answer = 10 * text_features @ stranger
print("softmax:", [round(p, 2) for p in answer.softmax(dim=0).tolist()])
print("sigmoid:", [round(p, 2) for p in torch.sigmoid(answer - 7).tolist()])
assert (
    answer.max() < 0
    and answer.softmax(dim=0).max() > 0.8
    and torch.sigmoid(answer - 7).max() < 1e-5
)

# %% [markdown]
# Softmax must choose: it is more than 80 % sure of a caption that is wrong. Each sigmoid stands for
# itself and may say no three times. So a softmax needs its whole row before it can give one probability,
# and a sigmoid one cell. That makes the loss easy to spread.

# %% [markdown]
# ## Spread over devices
#
# SigLIP trained with 32,768 pairs a step. Let four devices have a quarter each. Each keeps its pictures
# and passes captions on, and after four rounds every cell was seen.

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 4, figsize=(8.6, 2.6), layout="constrained")
for step, axis in enumerate(axes):
    axis.set(xlim=(0, 4), ylim=(4, 0), aspect="equal", title=f"round {step + 1}")
    for device in range(4):
        for turn in range(step + 1):
            texts, now = (device + turn) % 4, turn == step
            colour = COLOURS["good"] if turn == 0 else COLOURS["language"]
            style = {"facecolor": colour, "edgecolor": COLOURS["paper"], "lw": 2}
            corner = (texts, device)
            axis.add_patch(plt.Rectangle(corner, 1, 1, alpha=1 if now else 0.22, **style))
            if now:
                axis.text(texts + 0.5, device + 0.5, f"{device + 1}", ha="center", va="center",
                          color="white", weight="bold")  # fmt: skip
    axis.set_xticks(np.arange(4) + 0.5, ["1", "2", "3", "4"])
    axis.set_yticks(np.arange(4) + 0.5, ["1", "2", "3", "4"] if step == 0 else [""] * 4)
    axis.tick_params(length=0)
    axis.set_xlabel("captions of device")
axes[0].set_ylabel("pictures of device")
save_figure(fig, "26_rounds")

# %% [markdown]
# The number in a block is the device that computes it; green blocks hold the true pairs. So the sum over
# a *block* must stand alone.


# %%
#| export
def block_loss(images, texts, scale, bias, own: bool = True) -> torch.Tensor:
    """Sum of the sigmoid losses of some pictures with some texts, both float[B, D] of length 1.

    With `own` row i of both is a pair; without, no row of one belongs to any of the other.
    """
    logits = scale * images @ texts.T + bias  # [B, B]
    signs = -torch.ones_like(logits)
    if own:
        signs.fill_diagonal_(1)
    return -F.logsigmoid(signs * logits).sum()


# %% [markdown]
# The final loss adds blocks. We have one process, so the devices become a loop; `checkpoint` throws a
# block's cells away after use and computes them again in the backward pass, so that memory holds one
# block here too.


# %%
#| export
def sigmoid_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    scale: torch.Tensor | float,
    bias: torch.Tensor | float,
    chunks: int = 1,
) -> torch.Tensor:
    """SigLIP's loss: for each picture and each text, do the two belong together?

    Args:
        image_features: float[B, D], of any length.
        text_features: float[B, D]; row i belongs to picture i.
        scale, bias: of the logits; `logit_scale.exp()` and `logit_bias` of the model.
        chunks: how many devices would share the batch; memory holds (B / chunks)² cells at a time.

    Returns:
        float[], summed over the B² cells and divided by B.

    Raises:
        ValueError: features that cannot be pairs, or chunks of different sizes.

    Source: Zhai et al. 2023, algorithm 1 and section 3.3; `SiglipModel` in transformers.
    """
    images, texts = _unit_pairs(image_features, text_features)
    if chunks < 1 or len(images) % chunks:
        raise ValueError(
            f"{len(images)} pairs cannot be shared by {chunks} devices evenly: choose a number of "
            "chunks that divides the batch"
        )
    if chunks == 1:
        return block_loss(images, texts, scale, bias) / len(images)
    total, size = images.new_zeros(()), len(images) // chunks
    for turn in range(chunks):  # the rounds of the figure
        for device in range(chunks):
            visiting = texts.split(size)[(device + turn) % chunks]
            pair = images.split(size)[device], visiting, scale, bias, turn == 0
            total = total + checkpoint(block_loss, *pair, use_reentrant=False)
    return total / len(images)


# %% [markdown]
# Equal in value and every gradient:


# %%
def gradients(chunks):
    torch.manual_seed(0)
    leaves = torch.randn(24, 16), torch.randn(24, 16), torch.tensor(10.0), torch.tensor(-10.0)
    value = sigmoid_loss(*(leaf.requires_grad_() for leaf in leaves), chunks)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


# %%
for chunks in (1, 4, 8):
    torch.testing.assert_close(gradients(chunks), gradients(1))
    cells = (32_768 // chunks) ** 2
    print(f"{chunks} devices: equal; at 32,768 pairs a block has {4 * cells / 1e6:5,.0f} MB")

# %% [markdown]
# ## At full size
#
# SigLIP So400m/14 on the meta device: parameters and no memory. PaliGemma keeps only the vision tower
# without its head: 412,442,352 of these 877 million.

# %%
with torch.device("meta"):
    full = ContrastiveModel(SiglipVisionConfig(), SiglipTextConfig())
count = {name: sum(p.numel() for p in part.parameters()) for name, part in full.named_modules()}
for name in ("vision_model", "vision_model.head", "text_model", ""):
    print(f"{name or 'all':18} {count[name]:12,}")
assert count["vision_model"] - count["vision_model.head"] == 412_442_352

# %% [markdown]
# ## A bug people really make: labels of 0 and 1
#
# The formula wants $z = \pm 1$. Whoever has written cross-entropies all their life writes 0 and 1.
# Nothing fails. Let us train sixteen vectors for pictures and sixteen for captions directly.


# %%
def careless_loss(images, texts, scale, bias):
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    labels = torch.eye(len(images))
    return -(labels * F.logsigmoid(scale * images @ texts.T + bias)).sum() / len(images)


# %%
def fit_vectors(loss):
    torch.manual_seed(3)
    leaves = [torch.randn(1, 16) + 0.3 * torch.randn(16, 16) for _ in range(2)]  # much alike
    leaves = [leaf.requires_grad_() for leaf in (*leaves, torch.tensor(10.0), torch.tensor(-10.0))]
    losses = fit(leaves, lambda: loss(*leaves), steps=300, rate=0.1)
    images, texts, scale, bias = (leaf.detach() for leaf in leaves)
    cosines = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    return losses, torch.sigmoid(scale * cosines + bias)


# %%
runs = {"a colleague's run": fit_vectors(sigmoid_loss), "our run": fit_vectors(careless_loss)}
theirs, ours = (losses for losses, _ in runs.values())
assert all(ours[step] < theirs[step] for step in (10, 50, 100, 299))

# %% tags=["hide-input"]
fig, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
for (name, (values, _)), colour in zip(runs.items(), ("muted", "accent")):
    axis.semilogy(values, color=COLOURS[colour], label=name)
axis.set(title="which run is better?", xlabel="step", ylabel="loss (log axis)")
axis.legend()
save_figure(fig, "26_bug")

# %% [markdown]
# Ours falls faster and ends lower. But does its model say *no* to a wrong pair?

# %%
wrong_pairs = ~torch.eye(16, dtype=torch.bool)
said_yes = {name: (found[wrong_pairs] > 0.5).float().mean() for name, (_, found) in runs.items()}
for name, share in said_yes.items():
    print(f"{name:18} wrong pairs called together: {share:4.0%}")
assert said_yes["a colleague's run"] == 0 and said_yes["our run"] > 0.5
yes = (torch.ones(16, 8), torch.ones(16, 8), 10.0, 10.0)
print(f"yes to all: costs {sigmoid_loss(*yes):.0f}, careless {careless_loss(*yes):.0f}")

# %% [markdown]
# A 0 gives a wrong pair no weight: 240 of 256 cells vanish from the loss, and *yes to everything*
# becomes the best answer. The check is one line, and a test of this lesson has it: a model that says
# yes to all must be *expensive*.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): the first loss
#
# Cosines all 0, scale 10, bias −10, a batch of 1,000 pairs. What is the loss, to two decimals?
# ($\log(1 + e^{-10}) \approx 0.000045$ and $\log(1 + e^{10}) \approx 10.000045$.)

# %% tags=["exercise"]
answer = None  # your answer, a number


# %% tags=["check"]
def test_1(answer):
    assert isinstance(answer, (int, float)), "give a number"
    truth = first_loss(1000, -10.0)
    assert abs(answer - first_loss(1000, 0.0)) > 1, "that is the loss without a bias"
    assert abs(answer - truth / 1000) > 0.001, "divide by the pictures, not by the cells"
    assert answer < 100, "that is the sum over all pictures: divide by their number"
    assert abs(answer - 10) > 0.02, "999 small numbers are not nothing"
    assert abs(answer - 999 * 0.000045) > 0.02, "the true pair costs, too"
    assert abs(answer - truth) < 0.011, "add up one row: one true pair, and all the wrong ones"


check(test_1, answer)

# %% [markdown]
# <details><summary>Hint</summary>
#
# All rows are alike: one true pair and 999 wrong ones, each with the logit −10. Which costs what?
#
# </details>

# %% tags=["solution"]
answer = 10.000045 + 999 * 0.000045  # the true pair, and 999 wrong ones
check(test_1, answer)

# %% [markdown]
# ### Exercise 2 (extend): several prompts for one class
#
# CLIP's authors found that a class is named better by the *mean* of several texts ("a photo of a cat",
# "a drawing of a cat", …). Return one unit vector a class. Each prompt shall count the same, however
# long its vector is.


# %% tags=["exercise"]
def ensemble(text_features):
    """float[prompts, classes, D] → float[classes, D] of length 1."""
    return None  # your answer


# %% tags=["check"]
def test_2(ensemble):
    torch.manual_seed(2)
    x = torch.randn(3, 5, 8)
    found = ensemble(x)
    assert isinstance(found, torch.Tensor), "return a tensor"
    assert found.shape == (5, 8), f"the shape is {tuple(found.shape)}: one row a class, please"
    assert torch.allclose(found.norm(dim=-1), torch.ones(5), atol=1e-5), "rows must have length 1"
    longer = x.clone()
    longer[0] *= 50
    assert torch.allclose(ensemble(longer), found, atol=1e-5), "a long vector counts more"
    swapped = ensemble(x[[2, 0, 1]])
    assert torch.allclose(swapped, found, atol=1e-5), "the order of the prompts matters"
    assert torch.allclose(ensemble(x[:1]), F.normalize(x[0], dim=-1), atol=1e-5), (
        "with a single prompt its own direction should come out"
    )


check(test_2, ensemble)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A mean of unit vectors is shorter than 1.
#
# </details>


# %% tags=["solution"]
def ensemble(text_features):
    """float[prompts, classes, D] → float[classes, D] of length 1."""
    units = F.normalize(text_features, dim=-1)  # each prompt counts the same
    return F.normalize(units.mean(dim=0), dim=-1)  # a mean is shorter than what it was made of


check(test_2, ensemble)

# %% [markdown]
# ### Exercise 3 (write): the loss, when a caption comes twice
#
# The sigmoid can live with doubles in a batch: picture $i$ and caption $j$ belong
# together whenever their numbers in `same` are equal. Write the whole loss.


# %% tags=["exercise"]
def loss_with_doubles(image_features, text_features, same, scale, bias):
    """float[B, D], float[B, D] of any length, same int64[B] → float[], a picture."""
    return None  # your answer


# %% tags=["check"]
def test_3(loss):
    torch.manual_seed(4)
    a, b, different = torch.randn(6, 8), torch.randn(6, 8), torch.arange(6)
    value = loss(a, b, different, 10.0, -10.0)
    assert isinstance(value, torch.Tensor) and value.dim() == 0, "return one number as a tensor"
    usual = sigmoid_loss(a, b, 10.0, -10.0)
    assert not torch.allclose(value, usual / 6), "divide by the pictures, not by the cells"
    assert not torch.allclose(value, usual * 6), "divide by the number of pictures"
    longer = loss(3 * a, b / 2, different, 10.0, -10.0)
    assert torch.allclose(longer, value, atol=1e-4), "the length of a vector must not matter"
    assert not torch.allclose(value, careless_loss(a, b, 10.0, -10.0)), (
        "wrong pairs cost nothing: which sign has a cell that is not true?"
    )
    assert torch.allclose(value, usual), "without doubles it must be the usual loss"
    far = loss(a, -1000 * a, different, 100.0, -10.0)
    assert torch.isfinite(far), "at a logit of −110 the loss is no longer a number"
    same = torch.tensor([0, 1, 0, 2, 1, 0])
    cosines = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
    true = sum(
        F.softplus((-1 if same[i] == same[j] else 1) * (10 * cosines[i, j] - 10))
        for i in range(6)
        for j in range(6)
    )
    found = loss(a, b, same, 10.0, -10.0)
    assert not torch.allclose(found, usual), "the doubles still count as wrong pairs"
    assert torch.allclose(found, true / 6, atol=1e-4), "some cell has the wrong sign or weight"


check(test_3, loss_with_doubles)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `same[:, None] == same[None, :]` is bool[B, B]: which cells are true.
#
# </details>


# %% tags=["solution"]
def loss_with_doubles(image_features, text_features, same, scale, bias):
    """float[B, D], float[B, D] of any length, same int64[B] → float[], a picture."""
    images, texts = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    true = same[:, None] == same[None, :]  # in place of the diagonal
    signs = 2 * true.float() - 1
    return -F.logsigmoid(signs * (scale * images @ texts.T + bias)).sum() / len(images)


check(test_3, loss_with_doubles)

# %% [markdown]
# ## Summary
#
# - Pairs are enough: who can match pictures with captions has learned what is in them.
# - SigLIP asks a yes-or-no question for each cell; CLIP lets the cells of a row compete.
# - One true pair against thousands of wrong ones: hence a bias of −10.
# - Cells that do not need each other can be computed anywhere.

# %% [markdown]
# ## Quiz
#
# **1.** The loss is divided by the number of pictures, not of cells. What would happen otherwise
# at a larger batch?
#
# <details><summary>Answer</summary>
#
# A true pair would weigh $1/B^2$ instead of $1/B$: its pull would fade as batches grow.
#
# </details>

# %% [markdown]
# **2.** Why can `softmax_loss` not be computed from blocks that are simply added?
#
# <details><summary>Answer</summary>
#
# Each probability is divided by a sum over the *whole* row. Blocks of a row must first exchange
# their maxima and sums. A sigmoid needs nothing from its neighbours.
#
# </details>

# %% [markdown]
# **3.** A trained model gives a picture and "a cat" the cosine 0.3. Is there a cat?
#
# <details><summary>Answer</summary>
#
# The cosine alone does not say. With scale 100 and bias −20 the logit is 10, a clear yes; with scale 10
# and bias −10 it is −7, a clear no.
#
# </details>

# %% [markdown]
# ## References
#
# - Zhai et al. 2023, *Sigmoid Loss for Language Image Pre-Training* (SigLIP): sections 3.2 and 3.3.
# - Radford et al. 2021, *Learning Transferable Visual Models From Natural Language Supervision*
#   (CLIP), figure 3 and section 3.1.4.
# - `SiglipModel` in transformers; `two_towers.py` in big_vision.

# %% [markdown] tags=["navigation"]
# [← Scenes](25_scenes.ipynb) | [contents](00_overview.ipynb) | [Training →](27_training.ipynb)
