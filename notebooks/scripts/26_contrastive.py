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
# *65 minutes* · part V, Learning
#
# **What you will be able to do**
#
# - compute SigLIP's loss for three pictures and three captions with a pencil;
# - say what it spares compared with CLIP's softmax, and spread it over devices;
# - explain the two odd numbers it starts from, $\log 10$ and $-10$;
# - train two small towers that name pictures they have never seen, in three languages.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("contrastive")

# %% [markdown]
# ## Setup
#
# From earlier lessons: drawing ([01](01_plotting.ipynb)), the SigLIP tower and its block
# ([05](05_siglip.ipynb)), and the emoji scenes ([25](25_scenes.ipynb)).
# The cells that begin with `#| export` become the file
# [contrastive.py](../paligemma/contrastive.py).

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
from paligemma.support.course import check, save_figure
from paligemma.support.drawing import COLOURS
from paligemma.scenes import background, caption_of, compose, place
from paligemma.support.sprites import ANGLES, NAMES, SCALES, sprites

torch.set_num_threads(1)  # small matrices: more threads would only wait for each other
_ = torch.manual_seed(24)

# %% [markdown]
# ## The problem
#
# Nobody labels a billion pictures. But the web is full of pictures *with a line of text beside them*.
# The text is no class label: it is any sentence in any language. What can one learn from such pairs
# alone?
#
# Here are three pictures. Their captions, in another order: *a cow; a frog; a panda*. You can match
# them. So you know what each picture shows.


# %%
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
# each caption. Vectors of a true pair shall point the same way, all others not. To win at matching,
# the vision tower must find out what is in the picture.
#
# No tower ever sees a label. The other pairs of the batch are the contrast; hence **contrastive**
# learning.

# %% [markdown]
# ## By hand
#
# Three pictures, three captions, width $D = 2$, every vector of length 1. Picture $i$ belongs to
# caption $i$. The dot product of two vectors of length 1 is the cosine of their angle: 1 for the
# same direction, 0 for a right angle.

# %%
image_features = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])  # (B, D)
text_features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])  # (B, D)
cosines = image_features @ text_features.T  # (B, B): row = picture, column = caption
for row in cosines:
    print("  ".join(f"{value:4.2f}" for value in row.tolist()))

# %% [markdown]
# Now ask nine separate questions, one for each cell: *do these two belong together?* A cosine is
# turned into a **logit** by a scale and a bias, and the logit into a probability by the sigmoid:
#
# $$\ell_{ij} = s \cos_{ij} + b \qquad p_{ij} = \frac{1}{1 + e^{-\ell_{ij}}}$$
#
# Let $s = 10$ and $b = -7$. Row 1: $10 \cdot 1 - 7 = 3$, then $10 \cdot 0.8 - 7 = 1$, then $-7$.

# %% [markdown]
# The true answer is $z_{ij} = +1$ on the diagonal and $-1$ elsewhere. The loss of a cell is
# $-\log$ of the probability given to the true answer, and since $1 - \sigma(\ell) = \sigma(-\ell)$,
# one formula serves both:
#
# $$\text{loss}_{ij} = -\log \sigma(z_{ij}\,\ell_{ij}) = \log\left(1 + e^{-z_{ij}\,\ell_{ij}}\right)$$
#
# For the first cell: $\log(1 + e^{-3}) = 0.05$. Its neighbour says "together" by mistake:
# $\log(1 + e^{1}) = 1.31$.

# %%
scale, bias = 10.0, -7.0
logits, labels = scale * cosines + bias, 2 * torch.eye(3) - 1
costs = torch.log(1 + torch.exp(-labels * logits))
fig, axes = plt.subplots(1, 3, figsize=(8.2, 2.7), layout="constrained")
rows, columns = [f"picture {i}" for i in (1, 2, 3)], ["1", "2", "3"]
for axis, values, title in zip(
    axes,
    (logits, torch.sigmoid(logits), costs),
    ("logit 10 cos − 7", "probability “together”", "loss of the cell"),
):
    show_heatmap(values, title, rows if axis is axes[0] else ["", "", ""], columns, True, ax=axis)
    axis.set_xlabel("caption")
print(f"sum {costs.sum():.2f}, a picture {costs.sum() / 3:.2f}")
save_figure(fig, "26_by_hand")

# %% [markdown]
# Two cells cost almost everything: (1, 2) and (2, 3), where a wrong pair has the cosine 0.8. To get
# cheaper, caption 2 must turn away from picture 1. SigLIP sums all cells and divides by the number
# of *pictures*, not of cells.
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


slow = sigmoid_loss_loop(image_features, text_features, scale, bias)
print(f"{slow:.4f}")

# %% [markdown]
# ## Vectorised
#
# One matrix product gives all cells. `F.logsigmoid(x)` is $\log \sigma(x)$ computed without the
# detour over $\sigma$: in float32 $\sigma(-120)$ is 0 and its logarithm $-\infty$, and no gradient ever
# comes back from there. The log-sigmoid has the right value, $-120$.

# %%
signs = 2 * torch.eye(3) - 1
fast = -F.logsigmoid(signs * (scale * image_features @ text_features.T + bias)).sum() / 3
torch.testing.assert_close(fast, slow)
wrong = torch.tensor([-20.0, -120.0])  # the true answer got these logits
print("through the sigmoid:", torch.log(torch.sigmoid(wrong)).tolist())
print("log-sigmoid:        ", F.logsigmoid(wrong).tolist())

# %% [markdown]
# ## The module
#
# The sum over a *block* of cells stands alone: we shall need it for blocks that hold no diagonal.
# `own` says whether picture $i$ of the block belongs to caption $i$.
#
# The loss itself first gives all vectors the length 1, so that only directions count, and divides by
# the number of pairs.


# %%
#| export
def block_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    scale: torch.Tensor | float,
    bias: torch.Tensor | float,
    own: bool = True,
) -> torch.Tensor:
    """Sum of the sigmoid losses of some pictures with some texts.

    Args:
        image_features: float[M, D], rows of length 1.
        text_features: float[M, D], rows of length 1.
        scale: what cosines are multiplied with.
        bias: what is added to them then.
        own: True where row i of both is a pair; False where no row of one belongs to the other.

    Returns:
        float[], the sum over all M² cells.
    """
    logits = scale * image_features @ text_features.T + bias  # (M, M)
    signs = -torch.ones_like(logits)
    if own:
        signs.fill_diagonal_(1)
    return -F.logsigmoid(signs * logits).sum()


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


def sigmoid_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    scale: torch.Tensor | float,
    bias: torch.Tensor | float,
) -> torch.Tensor:
    """SigLIP's loss: for each picture and each text, do the two belong together?

    Args:
        image_features: float[B, D], of any length.
        text_features: float[B, D]; row i belongs to picture i.
        scale: what cosines are multiplied with, exp of `logit_scale`.
        bias: what is added to them then.

    Returns:
        float[], summed over the B² cells and divided by B.

    Raises:
        ValueError: features that cannot be pairs.

    Source: Zhai et al. 2023, algorithm 1; `SiglipModel` in transformers.
    """
    images, texts = _unit_pairs(image_features, text_features)
    return block_loss(images, texts, scale, bias) / len(images)


# %%
torch.testing.assert_close(sigmoid_loss(image_features, text_features, scale, bias), slow)
a, b = torch.randn(7, 5), torch.randn(7, 5)
torch.testing.assert_close(sigmoid_loss(a, b, 3.0, -1.0), sigmoid_loss_loop(a, b, 3.0, -1.0))
torch.testing.assert_close(sigmoid_loss(9 * a, b / 7, 3.0, -1.0), sigmoid_loss(a, b, 3.0, -1.0))
print("module, tensors and loop agree; the length of a vector does not matter")

# %% [markdown]
# ## CLIP asks another question
#
# CLIP (2021) asks each picture: *which one of these B captions is yours?* A softmax over the row, a
# cross-entropy; the same for each column; the mean of both. This is called **InfoNCE**.


# %%
#| export
def softmax_loss(
    image_features: torch.Tensor, text_features: torch.Tensor, scale: torch.Tensor | float
) -> torch.Tensor:
    """CLIP's loss (InfoNCE): which of the texts is this picture's, which picture this text's?

    Args:
        image_features, text_features, scale: as in `sigmoid_loss`; a bias would have no effect.

    Returns:
        float[], the mean of both directions.

    Raises:
        ValueError: features that cannot be pairs.

    Source: Radford et al. 2021, figure 3; Oord et al. 2018.
    """
    images, texts = _unit_pairs(image_features, text_features)
    logits = scale * images @ texts.T  # (B, B)
    truth = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


# %% [markdown]
# What is the difference in practice? Give both a picture that fits *none* of the captions: the
# direction opposite to all three.

# %%
stranger = torch.tensor([-0.8, -0.6])
answer = scale * text_features @ stranger
print("softmax:", [round(p, 3) for p in answer.softmax(dim=0).tolist()])
print("sigmoid: all three below 0.00001:", (torch.sigmoid(answer + bias) < 1e-5).all().item())
shifted = (answer + 100).softmax(dim=0)
print("a bias changes the softmax:", not torch.allclose(shifted, answer.softmax(dim=0)))

# %% [markdown]
# Softmax must choose: it is nearly sure of a caption that is wrong. It only knows *more than the
# others*. Each sigmoid stands for itself and may say no three times.
#
# For the same reason a softmax needs its whole row before it can give one probability. A sigmoid
# needs one cell. That is what makes the loss easy to spread.

# %% [markdown]
# ## Spread over devices
#
# SigLIP trained with 32,768 pairs a step. Let four devices have a quarter each. Each keeps its
# pictures, and its captions go round: compute a block, pass the captions to the next, and after four
# rounds every cell was seen. No device ever holds more than one block.

# %%
devices, rounds = np.meshgrid(np.arange(4), np.arange(4), indexing="ij")
fig, axes = plt.subplots(1, 4, figsize=(8.4, 2.5), layout="constrained")
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
# The number in a block is the device that computes it; green blocks hold the true pairs. In every
# round all four work, each with other captions.
#
# We have one process, so the devices become a loop. `checkpoint` throws a block's cells away after
# use and computes them again in the backward pass, so memory holds one block here too.


# %%
#| export
def chunked_sigmoid_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    scale: torch.Tensor | float,
    bias: torch.Tensor | float,
    chunks: int,
) -> torch.Tensor:
    """`sigmoid_loss` block by block, in the order in which `chunks` devices would pass texts round.

    Args:
        image_features, text_features, scale, bias: as in `sigmoid_loss`.
        chunks: number of devices; divides B.

    Returns:
        float[], the same loss with the same gradients; holds (B / chunks)² cells at a time.

    Raises:
        ValueError: features that cannot be pairs, or chunks of different sizes.

    Source: Zhai et al. 2023, section 3.3.
    """
    images, texts = _unit_pairs(image_features, text_features)
    if chunks < 1 or len(images) % chunks:
        raise ValueError(
            f"{len(images)} pairs cannot be shared by {chunks} devices evenly: choose a number of "
            "chunks that divides the batch"
        )
    images, texts = images.chunk(chunks), texts.chunk(chunks)
    total = images[0].new_zeros(())
    for turn in range(chunks):
        for device in range(chunks):
            visiting = texts[(device + turn) % chunks]
            pair = images[device], visiting, scale, bias, turn == 0
            total = total + checkpoint(block_loss, *pair, use_reentrant=False)
    return total / (chunks * len(images[0]))


# %% [markdown]
# Equal in value, and in every gradient: pictures, captions, scale and bias. Then the memory: PyTorch
# can tell what it keeps for the backward pass.


# %%
def gradients(loss, *more):
    torch.manual_seed(0)
    leaves = [torch.randn(24, 16), torch.randn(24, 16), torch.tensor(10.0), torch.tensor(-10.0)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    value = loss(*leaves, *more)
    value.backward()
    return [value.detach()] + [leaf.grad for leaf in leaves]


full = gradients(sigmoid_loss)
for chunks in (1, 2, 4, 24):
    torch.testing.assert_close(gradients(chunked_sigmoid_loss, chunks), full)
    print(f"{chunks:2} devices: loss and gradients equal")


def kept_for_backward(loss, pairs, *more):
    """Bytes that autograd keeps until the backward pass."""
    seen = {}

    def note(tensor):  # fmt: skip
        seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    a = torch.randn(pairs, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = loss(a, a.detach(), 10.0, -10.0, *more)
    del value
    return sum(seen.values())


whole = kept_for_backward(sigmoid_loss, 1024)
parts = kept_for_backward(chunked_sigmoid_loss, 1024, 8)
print(f"1,024 pairs: whole more than 8 MB: {whole > 8e6}; in 8 chunks under 1 MB: {parts < 1e6}")
assert parts < 0.1 * whole
pairs = 32_768
for chunks in (1, 16, 64, 256):
    cells = (pairs // chunks) ** 2
    print(
        f"{chunks:3} devices: a block of {cells:13,} cells, {4 * cells / 1e6:7,.1f} MB in float32"
    )

# %% [markdown]
# ## Why it starts at log 10 and −10
#
# In a batch of $B$ there is one true pair a picture and $B - 1$ wrong ones. Fresh towers know
# nothing: cosines are near 0. Without a bias every cell has probability ½ and costs $\log 2$. Sum
# a row: $0.69\,B$, nearly all of it from wrong pairs.
#
# With $b = -10$ the model starts by saying *no* to everything, which is right almost everywhere. Only
# the true pair costs, about 10.

# %%
sizes = [2**n for n in range(3, 16)]
logit = torch.tensor(0.0)


def first_loss(pairs, bias):
    """Loss a picture when all cosines are 0: one true pair, the others wrong."""
    yes, no = -F.logsigmoid(logit + bias), -F.logsigmoid(-(logit + bias))
    return (yes + (pairs - 1) * no).item()


fig, axes = plt.subplots(1, 2, figsize=(8.6, 3), layout="constrained")
for value, colour in ((0, "bad"), (-5, "language"), (-10, "vision")):
    losses = [first_loss(n, value) for n in sizes]
    axes[0].loglog(sizes, losses, label=f"b = {value}", color=COLOURS[colour], base=10)
    print(f"b = {value:3}: first loss at 32,768 pairs {first_loss(32768, value):10,.1f}")
axes[0].set(title="the first loss", xlabel="pairs in the batch")
axes[0].legend()
biases = torch.linspace(-16, 4, 200)
pull = torch.sigmoid(-biases)
push = 32767 * torch.sigmoid(biases)
axes[1].semilogy(biases, pull, color=COLOURS["good"], label="pull of the true pair")
axes[1].semilogy(biases, push, color=COLOURS["bad"], label="push of 32,767 wrong ones")
axes[1].axvline(-math.log(32767), color=COLOURS["muted"], ls=":")
axes[1].set(title="the first gradients, a picture", xlabel="bias b")
axes[1].legend(loc="lower right")
save_figure(fig, "26_first_loss")

# %% [markdown]
# **Right:** the derivative of a cell is $\sigma$ of what it got wrong. At $b = 0$ the wrong pairs push
# 32,767 times as hard as the true one pulls: the first steps only teach "everything is different from
# everything", and waste it. Around $b = -\log B \approx -10.4$ (dotted) the two are in balance.
#
# The scale starts at 10, so a cosine of 1 can just undo the bias: $10 \cdot 1 - 10 = 0$. Both are
# learned, the scale as $e^{t'}$ with $t' = \log 10$, so that it stays positive.

# %% [markdown]
# ## Two towers
#
# [Lesson 05](05_siglip.ipynb)'s tower ends with a vector for each patch. The loss wants one for the picture. SigLIP does
# it with attention: a single learned query, the **probe**, asks all patches and gets one mix of them.
# PaliGemma later throws this head away and keeps the patches.


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
        """`float[B, N, D]` → `float[B, D]`."""
        probe = self.probe.expand(len(x), -1, -1)  # (B, 1, D)
        x = self.attention(probe, x, x, need_weights=False)[0][:, 0]  # (B, D)
        return x + self.mlp(self.layernorm(x))


class PooledVisionModel(SiglipVisionModel):
    """The vision tower of lesson 05 with a pooling head."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(config)
        self.head = PoolingHead(config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`float[B, 3, H, W]` in -1…1 → `float[B, D]`."""
        return self.head(super().forward(pixel_values))


# %% [markdown]
# The text tower is made of the same blocks. They have no mask: each piece of the caption sees all
# others, since nothing has to be predicted. Captions are padded to one length, and the **last**
# position is the caption's vector: it can look at all others.
#
# `ContrastiveModel` holds both towers and the two learned numbers.


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
        """`int64[B, T]`, padded to the full length T → `float[B, D]`."""
        length = self.config.max_position_embeddings
        if input_ids.dim() != 2 or input_ids.shape[1] != length:
            raise ValueError(
                f"input_ids are {list(input_ids.shape)}; this tower reads [B, {length}]: pad every "
                "text to the full length, its vector is the last position's"
            )
        tokens = self.embeddings["token_embedding"](input_ids)  # (B, T, D)
        x = tokens + self.embeddings["position_embedding"].weight
        for layer in self.encoder["layers"].children():
            x = layer(x)
        return self.head(self.final_layer_norm(x)[:, -1])


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
        """`float[B, 3, H, W]` and `int64[C, T]` → logits `float[B, C]`, texts by pictures."""
        images = F.normalize(self.vision_model(pixel_values), dim=-1)  # (B, D)
        texts = F.normalize(self.text_model(input_ids), dim=-1)  # (C, D)
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
# A small file holds a random `SiglipModel` of transformers: every weight drawn, norms too; pictures
# and texts; its logits and its loss. The names of all weights are the same, so they load strictly.

# %%
stored = load_file("reference/contrastive.safetensors")
sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
published = ContrastiveModel(
    SiglipVisionConfig(**sizes, num_hidden_layers=1, image_size=14, patch_size=7),
    SiglipTextConfig(**sizes, num_hidden_layers=2, vocab_size=40, max_position_embeddings=6),
)
weights = {k.removeprefix("model."): v for k, v in stored.items() if k.startswith("model.")}
print(len(weights), "tensors:", published.load_state_dict(weights))
with torch.no_grad():
    gaps = {
        "logits": published(stored["pictures"], stored["ids"]) - stored["logits"],
        "loss": published.loss(stored["pictures"], stored["ids"]) - stored["loss"],
    }
for name, gap in gaps.items():
    print(f"{name}: at most 1e-5 apart: {gap.abs().max().item() <= 1e-5}")
    assert gap.abs().max() <= 1e-5

# %% [markdown]
# ## See it: two small towers learn to match
#
# Twelve kinds, each with its name in three languages: 36 captions. 80 close-ups of each kind for
# training; for the test 20 others, with new places, sizes, turns and backgrounds.
#
# [Lesson 06](06_tokenizer.ipynb)'s tokenizer has 257,152 pieces; its table would be a hundred times larger than our towers.
# Letters will do: each a number, 0 for the padding.

# %%
KINDS, LANGUAGES = list(range(12)), ("en", "de", "fr")


def draw(kinds, count, seed):
    """float[kinds, count, 3, 56, 56] in -1…1; each seed is another set of pictures."""
    rng = np.random.default_rng((24, seed))
    pictures = [[close_up(kind, rng) for _ in range(count)] for kind in kinds]
    return torch.from_numpy(np.array(pictures)).permute(0, 1, 4, 2, 3).float() / 127.5 - 1


def encode(text):
    return [letters.index(letter) + 1 for letter in text] + [0] * (LENGTH - len(text))


train, held_out = draw(KINDS, 80, seed=0), draw(KINDS, 20, seed=1)
words = [[caption_of([kind], language) for kind in KINDS] for language in LANGUAGES]
every = [word for row in words for word in row]
letters, LENGTH = sorted(set("".join(every))), max(map(len, every)) + 1
ids = torch.tensor([[encode(word) for word in row] for row in words])  # (languages, kinds, T)
print(tuple(train.shape), tuple(held_out.shape))
print(words[0][:3], words[1][:3], words[2][:3])
print(len(letters), "letters,", LENGTH, "places:", encode("a cat"))

# %% [markdown]
# Pictures of 56 pixels in patches of 14 make 16 tokens; two blocks of width 64. First the budget:
# each weight meets each token of each picture, with two operations forward and four backward.

# %%
vision = SiglipVisionConfig(
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=56,
)
text = SiglipTextConfig(
    vocab_size=len(letters) + 1,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=LENGTH,
)
model = ContrastiveModel(vision, text)
untrained = copy.deepcopy(model)
count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
work = 6 * (count["vision_model"] * 16 * 36 + count["text_model"] * LENGTH * 12)
print(count, f"→ about {work / 1e9:.1f} GFLOP a step, {450 * work / 1e12:.2f} TFLOP for 450")

# %% [markdown]
# ### One of each kind
#
# A batch must not hold the same caption twice: the loss would push a cat away from "a cat" because
# that caption came with *another* cat. On the web this is rare; with twelve kinds it would happen all
# the time.
#
# So a block has one picture of each kind, in one language. A step sees three such blocks; the captions
# of a step are computed once.


# %%
def step_loss(model, generator):
    chosen = torch.randint(train.shape[1], (3, len(KINDS)), generator=generator)
    pixels = train[torch.arange(len(KINDS)), chosen]  # (3, kinds, 3, 56, 56)
    flip = torch.rand(3, len(KINDS), 1, 1, 1, generator=generator) < 0.5
    pixels = torch.where(flip, pixels.flip(-1), pixels).flatten(0, 1)
    language = torch.randint(len(LANGUAGES), (len(KINDS),), generator=generator)
    texts = model.text_model(ids[language, torch.arange(len(KINDS))])
    images = model.vision_model(pixels).view(3, len(KINDS), -1)
    scale, bias = model.logit_scale.exp(), model.logit_bias
    return sum(sigmoid_loss(block, texts, scale, bias) for block in images) / 3


# %% [markdown]
# **Zero-shot** classification: nobody trained a classifier. To classify a picture, write down the
# names of the classes, and take the nearest.


# %%
@torch.no_grad()
def zero_shot(model, pixels, input_ids):
    """The number of the nearest text for each picture: int64[B]."""
    return model(pixels, input_ids).argmax(dim=1)


truth = torch.arange(len(KINDS)).repeat_interleave(held_out.shape[1])
test_pixels = held_out.flatten(0, 1)


def accuracy(model, language=0):
    return (zero_shot(model, test_pixels, ids[language]) == truth).float().mean().item()


def fit(parameters, loss, steps, rate, watch=None, every=50):
    """AdamW with a warm-up and a fall to zero; returns losses and what `watch` measured."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.15)
    losses, seen = [], []
    for step in range(steps):
        if watch and step % every == 0:
            seen.append(watch())
        value = loss()
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(value.item())
    return losses, seen + ([watch()] if watch else [])


# %%
generator = torch.Generator().manual_seed(0)
losses, seen = fit(
    list(model.parameters()),
    lambda: step_loss(model, generator),
    450,
    3e-3,
    lambda: accuracy(model),
)
fig, axes = plt.subplots(1, 2, figsize=(8.2, 2.8), layout="constrained")
axes[0].plot(losses, color=COLOURS["vision"], lw=1)
know_nothing = math.log(12) + 11 * math.log(12 / 11)  # says 1 in 12 to every cell
axes[0].axhline(know_nothing, color=COLOURS["muted"], ls=":")
axes[0].set(title="sigmoid loss, a picture", xlabel="step", ylim=(0, None))
axes[1].plot(np.arange(len(seen)) * 50, [100 * a for a in seen], color=COLOURS["good"], marker="o")
axes[1].axhline(100 / 12, color=COLOURS["muted"], ls=":")
axes[1].text(450, 100 / 12 + 2, "chance", ha="right", color=COLOURS["inside"])
axes[1].set(title="held-out pictures named rightly, %", xlabel="step", ylim=(0, 100))
print("first loss between 8 and 12:", 8 < losses[0] < 12)
print(f"loss of saying 1 in 12 to every cell: {know_nothing:.2f}")
print("last loss under a third of the first:", sum(losses[-20:]) / 20 < losses[0] / 3)
for number, language in enumerate(LANGUAGES):
    found = accuracy(model, number)
    print(f"{language}: more than half of 240 held-out pictures right:", found > 0.5)
    assert found > 0.5
assert accuracy(untrained) < 0.25
save_figure(fig, "26_training")

# %% tags=["nbval-ignore-output"]
print("untrained:", [f"{accuracy(untrained, n):.0%}" for n in range(3)], " chance 8%")
print("trained:  ", [f"{accuracy(model, n):.0%}" for n in range(3)])
print(f"scale {model.logit_scale.exp().item():.1f}, bias {model.logit_bias.item():.1f}")

# %% [markdown]
# The loss falls at once from 10 to the dotted line at 3.44: whoever knows only that *one pair in
# twelve* is true pays this. No picture need be looked at for it. Then the towers must look, and the
# accuracy rises.
#
# No classifier was trained, and German and French work as well as English. "Löwe" and "tête de lion"
# never met, but both met the same pictures.

# %% [markdown]
# ### The matrix, before and after
#
# Mean cosine of the held-out pictures of each kind with each English caption.
#
# **Before,** all cosines are near 0. **After,** a diagonal stands out. Beside it some cells stay warm:
# pairs of kinds that the towers still confuse.
#
# Below the matrix, each title is the German caption that the model finds nearest. Look at the wrong
# ones: how large is the object?


# %%
@torch.no_grad()
def mean_cosines(model):
    images = F.normalize(model.vision_model(test_pixels), dim=-1).view(len(KINDS), -1, 64)
    texts = F.normalize(model.text_model(ids[0]), dim=-1)
    return images.mean(dim=1) @ texts.T  # (kinds, kinds)


fig, axes = plt.subplots(1, 2, figsize=(8.6, 4.2), layout="constrained")
names = [NAMES[kind] for kind in KINDS]
for axis, tower, title in zip(axes, (untrained, model), ("before training", "after training")):
    show_heatmap(
        mean_cosines(tower), title, names if axis is axes[0] else [], words[0], centre=0, ax=axis
    )
    axis.images[0].set_clim(-1, 1)
axes[0].set_ylabel("pictures of")
fig.colorbar(axes[1].images[0], ax=axes, shrink=0.6, label="cosine", ticks=[-1, 0, 1])
save_figure(fig, "26_matrix")

# %%
shown = [held_out[kind, place] for place in (0, 1) for kind in range(0, 12, 2)]
guesses = zero_shot(model, torch.stack(shown), ids[1]).tolist()
titles = [words[1][guess] for guess in guesses]
fig = show_images([(x.permute(1, 2, 0) + 1) / 2 for x in shown], titles, columns=6, height=1.1)
save_figure(fig, "26_named.png")

# %% [markdown]
# ## What such a start buys
#
# PaliGemma's vision tower does not start from random weights: it *is* SigLIP's. What is that worth?
# Take **twelve other kinds** which our towers have never seen, with few labelled pictures: 16 of each
# kind. Train the tower and a linear layer to classify, once from random weights, once from the
# contrastive tower.

# %%
OTHERS = list(range(12, 24))
few, others_test = draw(OTHERS, 16, seed=2), draw(OTHERS, 20, seed=3).flatten(0, 1)


def probe(start, steps=120):
    """Fine-tune a copy of a vision tower on the other kinds: accuracy on held-out ones."""
    torch.manual_seed(1)
    tower, layer = copy.deepcopy(start.vision_model), nn.Linear(64, len(OTHERS))
    generator = torch.Generator().manual_seed(3)

    def loss():
        rows = torch.randint(len(OTHERS), (32,), generator=generator)
        columns = torch.randint(few.shape[1], (32,), generator=generator)
        return F.cross_entropy(layer(tower(few[rows, columns])), rows)

    def measure():
        with torch.no_grad():
            return (layer(tower(others_test)).argmax(dim=1) == truth).float().mean().item()

    return fit([*tower.parameters(), *layer.parameters()], loss, steps, 2e-3, measure, every=20)


starts = {"contrastive start": probe(model), "random start": probe(untrained)}
fig, axes = plt.subplots(1, 2, figsize=(8.2, 2.8), layout="constrained")
for (name, (values, scores)), colour in zip(starts.items(), ("good", "bad")):
    smooth = np.convolve(values, np.ones(10) / 10, mode="valid")
    axes[0].plot(smooth, color=COLOURS[colour], label=name)
    axes[1].plot(np.arange(len(scores)) * 20, [100 * s for s in scores], color=COLOURS[colour])
axes[0].set(title="loss on the labelled pictures", xlabel="step", ylim=(0, None))
axes[0].legend()
axes[1].axhline(100 / 12, color=COLOURS["muted"], ls=":")
axes[1].set(title="held-out pictures of new kinds, % right", xlabel="step", ylim=(0, 100))
last = {name: scores[-1] for name, (_, scores) in starts.items()}
ahead = last["contrastive start"] > last["random start"] + 0.05
print("the contrastive start ends at least 5 points higher:", ahead)
save_figure(fig, "26_start")

# %% [markdown]
# Same labels, same steps, same seed. The tower that has learned to match pictures with captions has
# learned about edges, colours and shapes, which new kinds are made of as well. The random tower must
# find all that in 192 pictures, and learns them by heart instead.
#
# This is the reason for SigLIP in PaliGemma; [lesson 27](27_training.ipynb) trains what follows.

# %% [markdown]
# ## At full size
#
# SigLIP So400m/14 on the meta device: parameters and no memory. PaliGemma keeps only the vision tower
# without its head: 412,442,352 of these 877 million.
#
# The loss costs next to nothing in arithmetic. What chunking saves is memory, and the waiting for
# everybody's features to arrive.

# %%
with torch.device("meta"):
    full = ContrastiveModel(SiglipVisionConfig(), SiglipTextConfig())
parts = {
    "vision tower": full.vision_model,
    "  of it the pooling head": full.vision_model.head,
    "text tower": full.text_model,
    "both": full,
}
for name, part in parts.items():
    print(f"{name:25} {sum(p.numel() for p in part.parameters()):12,}")

vision_count = sum(p.numel() for p in full.vision_model.parameters())
text_count = sum(p.numel() for p in full.text_model.parameters())
towers = 6 * 32_768 * (256 * vision_count + 16 * text_count)
cells = 6 * 32_768**2 * 1152
print(f"one step at 32,768 pairs: towers {towers / 1e12:,.0f} TFLOP, loss {cells / 1e12:.0f} TFLOP")
print(f"the loss is {cells / towers:.2%} of the work")
print(f"one device of 256: sends {128 * 1152 * 4 / 1e6:.2f} MB of captions a round")

# %% [markdown]
# ## A bug people really make: labels of 0 and 1
#
# The formula wants $z = \pm 1$. Whoever has written cross-entropies all their life writes the labels
# as 0 and 1. Nothing fails. Let us train sixteen vectors for pictures and sixteen for captions
# directly. As those of fresh towers, they begin much alike.


# %%
def careless_loss(images, texts, scale, bias):
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    labels = torch.eye(len(images))
    return -(labels * F.logsigmoid(scale * images @ texts.T + bias)).sum() / len(images)


def fit_vectors(loss):
    torch.manual_seed(3)
    leaves = [torch.randn(1, 16) + 0.3 * torch.randn(16, 16) for _ in range(2)]
    leaves += [torch.tensor(10.0), torch.tensor(-10.0)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    losses, _ = fit(leaves, lambda: loss(*leaves), 300, 0.1)
    images, texts, scale, bias = (leaf.detach() for leaf in leaves)
    cosines = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    return losses, torch.sigmoid(scale * cosines + bias)


runs = {"a colleague's run": fit_vectors(sigmoid_loss), "our run": fit_vectors(careless_loss)}
fig, axis = plt.subplots(figsize=(5.4, 2.6), layout="constrained")
for (name, (values, _)), colour in zip(runs.items(), ("muted", "accent")):
    axis.plot(values, color=COLOURS[colour], label=name)
axis.set(title="which run is better?", xlabel="step", ylabel="loss", ylim=(0, None))
axis.legend()
save_figure(fig, "26_bug")

# %% [markdown]
# Ours falls faster and ends lower. A review of the curves would praise it. The check is to ask what
# this loss cannot tell: does the model say *no* to a wrong pair?

# %%
fig, axes = plt.subplots(1, 2, figsize=(6, 2.9), layout="constrained")
for axis, (name, (_, found)) in zip(axes, runs.items()):
    show_heatmap(found, f"“together”: {name}", ax=axis)
    axis.images[0].set_clim(0, 1)
    mixed = found[~torch.eye(16, dtype=torch.bool)]
    print(f"{name:18} wrong pairs called together: {(mixed > 0.5).float().mean():4.0%}")
yes_to_all = (torch.ones(16, 8), torch.ones(16, 8), 10.0, 10.0)
print(
    f"yes to all costs {sigmoid_loss(*yes_to_all):.0f}; careless {careless_loss(*yes_to_all):.0f}"
)
fig

# %% [markdown]
# A 0 gives a wrong pair no weight: 240 of 256 cells vanish from the loss, and *yes to everything*
# becomes the best answer. Nothing makes wrong pairs part, so most of them are called together.
#
# The check is one line: a model that says yes to all must be *expensive*. (A test of this lesson does
# it.)

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): the first loss
#
# Fresh towers whose cosines are all 0, scale 10, bias −10, a batch of 1,000 pairs. What is the loss?
# Two decimals. ($\log(1 + e^{-10}) \approx 0.000045$ and $\log(1 + e^{10}) \approx 10.000045$.)

# %% tags=["exercise"]
answer = None  # your answer, a number


# %% tags=["check"]
def test_1(answer):
    assert isinstance(answer, (int, float)), "give a number"
    truth = first_loss(1000, -10.0)
    assert abs(answer - 693.1) > 1, "that is the loss without a bias"
    assert answer < 100, "divide by the number of pictures"
    assert abs(answer - truth / 1000) > 0.001, "divide by the pictures, not by the cells"
    assert abs(answer - 10) > 0.02, "999 small numbers are not nothing"
    assert abs(answer - truth) < 0.011, f"off by {answer - truth:.3f}"


check(test_1, answer)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A row has one true pair with logit −10, which costs 10.000045, and 999 wrong ones with logit −10,
# which cost 0.000045 each. All rows are alike, so the mean over rows is one row.
#
# </details>

# %% tags=["solution"]
answer = 10.000045 + 999 * 0.000045  # 10.05
check(test_1, answer)

# %% [markdown]
# ### Exercise 2 (fill in): several prompts for one class
#
# CLIP's authors found that a class is named better by the *mean* of several texts ("a photo of a
# cat", "a drawing of a cat", …). Given text features of P prompts for C classes, return one unit
# vector a class. Each prompt shall count the same, however long its vector is.


# %% tags=["exercise"]
def ensemble(text_features):
    """float[P, C, D] → float[C, D] of length 1."""
    return None  # your answer


# %% tags=["check"]
def test_2(ensemble):
    torch.manual_seed(2)
    x = torch.randn(3, 5, 8)
    found = ensemble(x)
    assert isinstance(found, torch.Tensor), "return a tensor"
    assert found.shape == (5, 8), f"the shape is {tuple(found.shape)}, not (5, 8)"
    assert torch.allclose(found.norm(dim=-1), torch.ones(5), atol=1e-5), "rows must have length 1"
    longer = x.clone()
    longer[0] *= 50
    assert torch.allclose(ensemble(longer), found, atol=1e-5), "a long vector counts more"
    assert torch.allclose(ensemble(x[:1]), F.normalize(x[0], dim=-1), atol=1e-5), "one prompt"
    swapped = ensemble(x[[2, 0, 1]])
    assert torch.allclose(swapped, found, atol=1e-5), "the order of the prompts matters"


check(test_2, ensemble)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Normalise, take the mean over the prompts, normalise again: a mean of unit vectors is shorter than 1.
#
# </details>


# %% tags=["solution"]
def ensemble(text_features):
    """float[P, C, D] → float[C, D] of length 1."""
    return F.normalize(F.normalize(text_features, dim=-1).mean(dim=0), dim=-1)


check(test_2, ensemble)

# %% [markdown]
# ### Exercise 3 (extend): when a caption comes twice
#
# We kept doubles out of a batch. The sigmoid can also live with them: a cell is true whenever its
# caption *says the same*. Write the loss with one integer a caption: pictures $i$ and captions $j$
# with equal numbers belong together. (A softmax could not do this: two right answers in a row.)


# %% tags=["exercise"]
def loss_with_doubles(image_features, text_features, same, scale, bias):
    return None  # your answer; same is int64[B]


# %% tags=["check"]
def test_3(loss):
    torch.manual_seed(4)
    a, b, different = torch.randn(6, 8), torch.randn(6, 8), torch.arange(6)
    value = loss(a, b, different, 10.0, -10.0)
    assert isinstance(value, torch.Tensor) and value.dim() == 0, "return one number as a tensor"
    usual = sigmoid_loss(a, b, 10.0, -10.0)
    assert torch.allclose(value, usual), "without doubles it must be the usual loss"
    same = torch.tensor([0, 1, 0, 2, 1, 0])
    cosines = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
    true = sum(
        F.softplus((-1 if same[i] == same[j] else 1) * (10 * cosines[i, j] - 10))
        for i in range(6)
        for j in range(6)
    )
    found = loss(a, b, same, 10.0, -10.0)
    assert not torch.allclose(found, usual), "the doubles still count as wrong pairs"
    assert torch.allclose(found, true / 6, atol=1e-4), "some cell has the wrong sign"


check(test_3, loss_with_doubles)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `same[:, None] == same[None, :]` is bool[B, B]. Turn it into +1 and −1, and use it for `signs`.
#
# </details>


# %% tags=["solution"]
def loss_with_doubles(image_features, text_features, same, scale, bias):
    images, texts = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    signs = 2 * (same[:, None] == same[None, :]).float() - 1
    return -F.logsigmoid(signs * (scale * images @ texts.T + bias)).sum() / len(images)


check(test_3, loss_with_doubles)

# %% [markdown]
# ## Summary
#
# - Pairs are enough: who can match pictures with captions has learned what is in them.
# - SigLIP asks a yes-or-no question for each cell; CLIP lets the cells of a row compete.
# - Cells that do not need each other can be computed anywhere: captions go round, blocks are added.
# - One true pair against thousands of wrong ones: a bias of −10 keeps the first steps sane.
# - A tower that starts from such training learns new kinds from few labels.

# %% [markdown]
# ## Quiz
#
# **1.** The loss is divided by the number of pictures, not of cells. What would happen otherwise
# at a larger batch?
#
# <details><summary>Answer</summary>
#
# The true pair of a picture would get the weight $1/B^2$ instead of $1/B$ in the sum: its pull would
# fade as batches grow, and each batch size would need its own learning rate.
#
# </details>

# %% [markdown]
# **2.** Why can `softmax_loss` not be computed from blocks that are simply added?
#
# <details><summary>Answer</summary>
#
# Each probability has the sum over the *whole* row below the line. Blocks of a row must first exchange
# their maxima and sums (as flash attention does), for rows and for columns. A sigmoid needs nothing
# from its neighbours.
#
# </details>

# %% [markdown]
# **3.** A trained model gives a picture and "a cat" the cosine 0.3. Is there a cat?
#
# <details><summary>Answer</summary>
#
# The cosine alone does not say. Scale and bias belong to it: with scale 100 and bias −20 the logit is
# 10 and the answer a clear yes; with scale 10 and bias −10 it is −7, a clear no.
#
# </details>

# %% [markdown]
# ## References
#
# - Zhai et al. 2023, *Sigmoid Loss for Language Image Pre-Training* (SigLIP): sections 3.2 and 3.3,
#   algorithm 1.
# - Radford et al. 2021, *Learning Transferable Visual Models From Natural Language Supervision*
#   (CLIP), figure 3 and section 3.1.4; Oord et al. 2018 (InfoNCE).
# - Beyer et al. 2024, *PaliGemma: A versatile 3B VLM for transfer*, section 3.
# - `SiglipModel` in transformers; `two_towers.py` and `siglip.py` in big_vision.

# %% [markdown] tags=["navigation"]
# [← Scenes](25_scenes.ipynb) | [contents](00_overview.ipynb) | [Training →](27_training.ipynb)
