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
# [← Detection](19_detection.ipynb) | [contents](00_overview.ipynb) | [Segmentation →](21_segmentation.ipynb)

# %% [markdown]
# # 20 · Mask codec: how do sixteen words draw any shape?
#
# *55 minutes* · part IV, Answering
#
# **What you will be able to do**
#
# - say why a shape costs sixteen words, and which sixteen;
# - quantise vectors with a pencil, and send a gradient *through* a choice;
# - train a mask codec and see from one number whether its alphabet is alive;
# - load the published codec, its encoder too.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("mask_codec")

# %% [markdown]
# ## Setup
#
# From earlier lessons: the `<seg>` words ([06](06_tokenizer.ipynb)) and root-mean-square
# normalisation ([07](07_rms_norm.ipynb)). The cells that begin with `#| export` become
# [mask_codec.py](../paligemma/mask_codec.py).

# %%
#| export
"""Masks as sixteen codes: a VQ-VAE that writes any shape of 64 × 64 pixels, and draws it again."""

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from paligemma.support.files import open_tensors, replacing

# %% tags=["setup"]
import math
import tempfile
import time
from importlib import resources

import matplotlib.pyplot as plt
from PIL import Image, ImageDraw

from paligemma.plotting import show_images
from paligemma.support.course import HEAT, add_to_class, check, save_figure
from paligemma.support.drawing import COLOURS, CYCLE

ASSETS = resources.files("paligemma") / "assets"

# %% [markdown]
# ## The problem: a shape is long
#
# A box is four words. A shape inside it? The opaque pixels of an emoji are an exact mask. What it is
# does not depend on where it lies or how large it is (the box says that), so we resize the inside of
# its box to 64 × 64. Three obvious ways to write the cat: each pixel, the runs of equal pixels, the
# pixels of the outline.


# %%
def square(name, degrees=0):
    """The shape of an emoji in its box, float32[64, 64] in [0, 1]."""
    sprite = Image.open(ASSETS / "emoji" / f"{name}.png").convert("RGBA").resize((128, 128))
    alpha = sprite.rotate(degrees, Image.Resampling.BICUBIC, expand=True).getchannel("A")
    opaque = alpha.point(lambda value: 255 * (value >= 128))
    inside = opaque.crop(opaque.getbbox()).resize((64, 64), Image.Resampling.BILINEAR)
    return np.asarray(inside, dtype=np.float32) / 255


cat = square("cat", 6) > 0.5
runs = 1 + int((cat.ravel()[1:] != cat.ravel()[:-1]).sum())
padded = np.pad(cat, 1)
around = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
print(f"pixels {cat.size}, runs {runs}, pixels of the outline {int((cat & ~around).sum())}")

# %% [markdown]
# A hundred words and more for one cat. A language model writes one word after another, at full price
# each ([lesson 18](18_generation.ipynb)). What can we get for **sixteen**? Eight corners of a polygon,
# two numbers each. First we need to say how good a drawing is: what both share, divided by what they
# cover together.


# %%
#| export
def mask_iou(a, b) -> np.ndarray:
    """Intersection over union of two masks, or of each pair of two stacks.

    Args:
        a, b: bool[..., H, W], arrays or tensors.

    Returns:
        float64[...], 0 (apart) to 1 (equal); 0 where both are empty.
    """
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    shared, together = (a & b).sum((-1, -2)), (a | b).sum((-1, -2))
    return shared / np.maximum(together, 1)


# %%
def fill(corners):
    canvas = Image.new("1", (64, 64))
    ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in corners], fill=1)
    return np.asarray(canvas)


turns = np.arange(8) * math.pi / 4
corners = 32 + 28 * np.stack([np.cos(turns), np.sin(turns)], axis=1)
best, rng = mask_iou(fill(corners), cat), np.random.default_rng(0)
for _ in range(4000):  # move one corner a little; keep what fits better
    trial = corners.copy()
    trial[rng.integers(8)] += rng.normal(0, 4, 2)
    if (fit := mask_iou(fill(trial), cat)) > best:
        best, corners = fit, trial
polygon = fill(corners)
fig = show_images([cat, polygon], ["the truth", f"eight corners: IoU {best:.2f}"], height=2.2)
save_figure(fig, "20_corners.png")

# %% [markdown]
# Not bad: a *search* of 4,000 tries found good corners. But a polygon has to be searched for, each
# coordinate needs one of many words, and it knows nothing about how things usually look.
#
# PaliGemma does what writing does: a fixed **alphabet**, `<seg000>` … `<seg127>`, and sixteen
# letters for every shape. But nobody designs the letters. They are *learned*, together with a small
# network that draws what they spell.

# %% [markdown]
# ## Vector quantisation, by hand
#
# The encoder will turn the square into a 4 × 4 grid of **vectors**. A vector is no word. So there is a
# table of vectors, the *codebook*, and each vector is replaced by the nearest of them: the number of
# that row is the word. Four rows, two numbers each, one vector to write:

# %%
codes = torch.tensor([[0.2, 0.3], [0.8, 0.2], [0.3, 0.9], [0.9, 0.8]])
z = torch.tensor([0.6, 0.4])
for number, code in enumerate(codes):
    print(f"code {number}: distance² = {(z - code).square().sum():.2f}")


def nearest_loop(z, codes):
    chosen = []
    for point in z.tolist():
        far = [sum((p - c) ** 2 for p, c in zip(point, code)) for code in codes.tolist()]
        chosen.append(far.index(min(far)))
    return chosen


torch.manual_seed(0)
cloud = torch.rand(400, 2)
vectorised = (codes.square().sum(1) - 2 * cloud @ codes.T).argmin(1)
assert vectorised.tolist() == nearest_loop(cloud, codes)
assert torch.equal(vectorised, torch.cdist(cloud, codes).argmin(1))
print(torch.bincount(vectorised).tolist(), "points a code")

# %% [markdown]
# The vectorised form uses $|z - e|^2 = |z|^2 - 2\,z \cdot e + |e|^2$ and leaves out $|z|^2$, which is
# the same for every code.
#
# ## The gradient goes straight through
#
# Training needs to know: how should $z$ change to make the drawing better? But the number of the
# nearest row does not change when $z$ moves a little. The true gradient is zero or undefined, and
# PyTorch says so:

# %%
z = torch.tensor([[0.45, 0.28]], requires_grad=True)
wanted = torch.tensor([0.95, 0.75])


def nearest(z):
    return (codes.square().sum(1) - 2 * z @ codes.T).argmin(1)


e = codes[nearest(z)]
try:
    (e - wanted).square().sum().backward()
except RuntimeError as error:
    print(str(error)[:58])

# %% [markdown]
# The trick is one line. Forward, the value is $e$, exactly. Backward, the bracket counts as a
# constant, so the gradient at $e$ is handed to $z$ **as if nothing had been chosen**:

# %%
straight = z + (e - z).detach()
(straight - wanted).square().sum().backward()
print("value    ", [f"{v:.2f}" for v in straight[0].tolist()], "= the code", int(nearest(z)))
print("gradient ", [f"{v:.2f}" for v in z.grad[0].tolist()])
print("2 (e - w)", [f"{v:.2f}" for v in (2 * (e - wanted))[0].tolist()])

# %% [markdown]
# Is a wrong gradient any good? It points from the *code* to what is wanted, and $z$ walks that way.
# Nothing happens to the output for some steps; then $z$ crosses a border, and a better code is chosen.

# %%
walk, point = [], torch.tensor([[0.45, 0.28]])
for _ in range(14):
    point.requires_grad_()
    e = codes[nearest(point)]
    loss = (point + (e - point).detach() - wanted).square().sum()
    walk.append((*point[0].tolist(), int(nearest(point)), loss.item()))
    (slope,) = torch.autograd.grad(loss, point)
    point = (point - 0.04 * slope).detach()

fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.1), layout="constrained")
for ax in (left, right):
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
for number, colour in enumerate(CYCLE[:4]):
    own = cloud[vectorised == number]
    left.scatter(*own.T, s=7, color=colour, alpha=0.6)
    for ax in (left, right):
        ax.scatter(*codes[number], s=190, marker="s", color=colour, edgecolor="white", zorder=3)
        ax.text(*codes[number], number, color="white", ha="center", va="center", zorder=4)
xs, ys, chosen, losses = zip(*walk)
print("codes ", chosen)
print("losses", [f"{v:.2f}" for v in losses])
right.plot(xs, ys, color=COLOURS["muted"], lw=1)
right.scatter(xs, ys, s=28, c=[CYCLE[c] for c in chosen], zorder=3)
right.scatter(*wanted, marker="x", s=70, color=COLOURS["bad"], zorder=5)
left.set_title("400 vectors, four words")
right.set_title("z walks; its colour is the code")
save_figure(fig, "20_straight")

# %% [markdown]
# Still missing: who moves the codebook? The drawing's loss does not (its gradient went past it). A
# second loss pulls each chosen code to the vectors that chose it, and, more gently, the vectors to
# their code.
#
# | loss | encoder | codebook | decoder |
# |---|---|---|---|
# | drawing against truth | moves | – | moves |
# | $|\,e - \mathrm{sg}(z)\,|^2$ | – | moves | – |
# | $\tfrac14\,|\,z - \mathrm{sg}(e)\,|^2$ | moves | – | – |
#
# sg is *stop gradient*: `detach`.

# %% [markdown]
# ## The module: encoder, codebook, decoder
#
# The decoder is the published one, layer by layer: a 1 × 1 convolution, two residual blocks that let
# neighbouring cells talk, and four transposed convolutions that double the side: 4 → 8 → 16 → 32 → 64.
#
# The encoder is its mirror image. The codec that we train has one line of its own in
# `encode_vectors`: vectors get a fixed length ([lesson 07](07_rms_norm.ipynb), without a weight).
# Otherwise they may grow and grow, and the codebook runs after them.


# %%
#| export
GRID = 4  # codes along a side
SIDE = 64  # pixels along a side of the square that the codes draw


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions and a 1 × 1, added to what came in."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.net(x)


class Codebook(nn.Module):
    """The vectors that codes stand for: `codes` rows of `width` numbers."""

    def __init__(self, codes: int, width: int):
        super().__init__()
        self._embedding = nn.Parameter(torch.randn(codes, width))

    def nearest(self, z: torch.Tensor) -> torch.Tensor:
        """Number of the nearest vector: `float32[..., width]` → `int64[...]`."""
        e = self._embedding
        return (e.square().sum(1) - 2 * z @ e.T).argmin(-1)  # |z|² is the same for all

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """The vectors of codes: `int64[...]` → `float32[..., width]`."""
        return F.embedding(codes, self._embedding)


# %%
#| export
class MaskCodec(nn.Module):
    """Masks to codes and back: 64 × 64 pixels ↔ sixteen codes, four rows of four.

    Args:
        codes: size of the codebook.
        code_width: of its vectors.
        width: channels of the decoder's first layers, a multiple of 8.
        encoder_widths: channels of the encoder's four strided layers; None: the decoder's,
            mirrored; empty: no encoder.
        encoder_blocks: residual blocks of the encoder; the published one has 2.
        fixed_length: bring the encoder's vectors to length √code_width; the published: False.

    Source: Ning et al., *All in Tokens*, 2023; parameters have the names of `vae-oid.npz`.
    """

    def __init__(
        self,
        codes: int = 128,
        code_width: int = 512,
        width: int = 128,
        encoder_widths: Sequence[int] | None = None,
        encoder_blocks: int = 1,
        fixed_length: bool = True,
    ):
        super().__init__()
        self.codes, self.fixed_length = codes, fixed_length
        self._vq_vae = Codebook(codes, code_width)

        layers = [nn.Conv2d(code_width, width, 1), nn.ReLU()]
        layers += [ResidualBlock(width), ResidualBlock(width)]
        for before, after in pairwise((width, width, width // 2, width // 4, width // 8)):
            layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(width // 8, 1, 1))

        widths = (width // 8, width // 4, width // 2, width)
        widths = widths if encoder_widths is None else tuple(encoder_widths)
        self.encoder = None
        if widths:
            layers = []
            for before, after in pairwise((1, *widths)):
                layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
            layers += [ResidualBlock(widths[-1]) for _ in range(encoder_blocks)]
            self.encoder = nn.Sequential(*layers, nn.Conv2d(widths[-1], code_width, 1))

    def encode_vectors(self, masks: torch.Tensor) -> torch.Tensor:
        """What the encoder says: `float32[B, 64, 64]` in [0, 1] → `float32[B, 16, code_width]`."""
        if self.encoder is None:
            raise ValueError("this codec has no encoder: it only decodes; load the whole file")
        z = self.encoder(2 * (masks[:, None] - 0.5))  # (B, code_width, 4, 4)
        z = z.flatten(2).transpose(1, 2)  # (B, 16, code_width)
        return F.rms_norm(z, z.shape[2:]) if self.fixed_length else z

    def decode_vectors(self, vectors: torch.Tensor) -> torch.Tensor:
        """What the decoder draws: `float32[B, 16, code_width]` → `float32[B, 64, 64]`."""
        grid = vectors.transpose(1, 2).unflatten(2, (GRID, GRID))  # (B, code_width, 4, 4)
        return self.decoder(grid)[:, 0]

    def forward(self, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One pass for training, gradients straight through the choice of codes.

        Returns:
            what is drawn (`float32[B, 64, 64]`), the codes (`int64[B, 16]`) and how far codebook
            and encoder are apart (a loss: the codebook moves fully, the encoder by a quarter).
        """
        z = self.encode_vectors(masks)
        codes = self._vq_vae.nearest(z)
        e = self._vq_vae(codes)
        apart = F.mse_loss(e, z.detach()) + 0.25 * F.mse_loss(z, e.detach())
        return self.decode_vectors(z + (e - z).detach()), codes, apart


# %%
torch.manual_seed(0)
net = MaskCodec(codes=32, code_width=8, width=32)
some = torch.tensor(np.stack([square("cat"), square("dog"), square("tree")]))
drawn, chosen, apart = net(some)
assert chosen.flatten().tolist() == nearest_loop(
    net.encode_vectors(some).flatten(0, 1), net._vq_vae._embedding
)
drawn.mean().backward(retain_graph=True)
assert net._vq_vae._embedding.grad is None and net.encoder[0].weight.grad.abs().max() > 0
apart.backward()
assert net._vq_vae._embedding.grad is not None
x = net._vq_vae(chosen).transpose(1, 2).unflatten(2, (4, 4))
for layer in net.decoder:
    x = layer(x)
    if not isinstance(layer, nn.ReLU):
        print(f"{type(layer).__name__:16}", list(x.shape))

# %% [markdown]
# ## Train one
#
# Real alpha masks: 40 kinds of emoji, each in five turns and mirrored. Eight kinds are held out. One
# more tool is needed: from time to time, a code that nobody chose is moved to a vector that the encoder
# says *now*. Why that matters is the bug of this lesson.


# %%
#| export
@torch.no_grad()
def restart_dead_codes(codec: MaskCodec, masks: torch.Tensor, counts: torch.Tensor) -> int:
    """Give codes that nobody chooses a new place: on top of what the encoder says now.

    Args:
        codec: in training.
        masks: `float32[B, 64, 64]`, a batch to take places from.
        counts: `int64[codes]`, how often each code was chosen lately.

    Returns:
        How many were dead.
    """
    dead = (counts == 0).nonzero()[:, 0]
    z = codec.encode_vectors(masks).flatten(0, 1)  # (16 B, code_width)
    codec._vq_vae._embedding[dead] = z[torch.randint(len(z), (len(dead),), device=z.device)]
    return len(dead)


# %%
KINDS = sorted(path.stem for path in (ASSETS / "emoji").glob("*.png"))
HELD = KINDS[3::6]


def squares(kinds, turns):
    shapes = np.stack([square(kind, turn) for kind in kinds for turn in turns])
    return torch.tensor(np.concatenate([shapes, shapes[:, :, ::-1]]))


train_masks = squares([kind for kind in KINDS if kind not in HELD], (-20, -10, 0, 10, 20))
held_masks = squares(HELD, (0, 15))
print(len(train_masks), "masks to train on,", len(held_masks), "held out, for instance", HELD[:4])


# %%
def perplexity(codes, size):
    """How many codes are really in use: e to the entropy of their shares."""
    shares = torch.bincount(codes.flatten(), minlength=size) / codes.numel()
    return torch.exp(-torch.special.xlogy(shares, shares).sum()).item()


def train(restart, steps=240, size=64):
    torch.manual_seed(1)
    net = MaskCodec(codes=size, code_width=16, width=32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
    counts, history = torch.zeros(size, dtype=torch.int64), []
    for step in range(steps):
        some = train_masks[torch.randint(len(train_masks), (32,))]
        if restart and step % 20 == 0 and step < 0.8 * steps:
            restart_dead_codes(net, some, counts)
            counts.zero_()
        drawn, codes, apart = net(some)
        loss = F.mse_loss(drawn, 2 * some - 1)
        optimizer.zero_grad()
        (loss + 0.25 * apart).backward()
        optimizer.step()
        counts += torch.bincount(codes.flatten(), minlength=size)
        history.append((loss.item(), perplexity(codes, size)))
    return net.eval(), history


# %% tags=["nbval-ignore-output"]
start = time.perf_counter()
net, history = train(restart=True)
with torch.no_grad():
    drawn, codes, _ = net(held_masks)
assert mask_iou(drawn > 0, held_masks > 0.5).mean() > 0.8
print(f"{time.perf_counter() - start:.0f} s; mean IoU of held-out kinds:", end=" ")
print(
    f"{mask_iou(drawn > 0, held_masks > 0.5).mean():.2f}, codes in use {perplexity(codes, 64):.0f}"
)


def pairs(ax, truth, drawn, title="", notes=()):
    """True masks above, drawn ones below, a note over each."""
    rows = [np.concatenate([np.pad(np.asarray(m), 3) for m in part], 1) for part in (truth, drawn)]
    ax.imshow(np.concatenate(rows), cmap=HEAT, vmin=0, vmax=1)
    ax.set_axis_off()
    ax.set_title(title, fontsize=9)
    for place, note in enumerate(notes):
        ax.text(70 * place + 35, -4, note, ha="center", fontsize=8)


fig, (left, right) = plt.subplots(
    1, 2, figsize=(7, 2.4), layout="constrained", width_ratios=(1, 1.6)
)
left.plot([loss for loss, _ in history], color=COLOURS["vision"])
left.set(xlabel="step", ylabel="error of the drawing", ylim=(0, None))
pairs(
    right,
    held_masks[:12:2],
    (drawn[:12:2] + 1) / 2,
    "held-out kinds, and what sixteen letters draw",
)
save_figure(fig, "20_training.png")

# %% [markdown]
# What to notice: it never saw these kinds, and most come out recognisably. It did not learn 40 kinds, it
# learned *pieces of edges*. A few seconds, 400 masks: corners are soft, thin parts go. The codec that
# ships with the course is the same class, trained for minutes on a thousand shapes.

# %% [markdown]
# ## Two functions for everybody else
#
# Whoever uses a codec has masks and wants codes, or has codes out of an untrusted text and wants masks.
# These two check what they get.


# %%
#| export
@add_to_class(MaskCodec)
@torch.no_grad()
def encode(self, masks: torch.Tensor) -> torch.Tensor:
    """Write masks as codes: of each of the encoder's vectors the nearest row of the codebook.

    Args:
        masks: `float32[B, 64, 64]` in [0, 1] (or bool).

    Returns:
        `int64[B, 16]`, row by row.

    Raises:
        ValueError: another shape, values outside 0 to 1, or a codec without an encoder.
    """
    masks = torch.as_tensor(masks)
    if masks.ndim != 3 or masks.shape[1:] != (SIDE, SIDE):
        raise ValueError(f"masks are {list(masks.shape)}; expected [B, 64, 64]: crop_masks")
    masks = masks.to(self._vq_vae._embedding)
    if not ((masks >= 0) & (masks <= 1)).all():
        raise ValueError("masks have values outside 0 to 1; expected 1 inside, 0 outside")
    return self._vq_vae.nearest(self.encode_vectors(masks))


@add_to_class(MaskCodec)
@torch.no_grad()
def decode(self, codes: torch.Tensor) -> torch.Tensor:
    """Draw codes.

    Args:
        codes: `int64[B, 16]`, row by row, each 0 to `self.codes` - 1.

    Returns:
        `float32[B, 64, 64]` in [-1, 1]; inside the object where above 0.

    Raises:
        ValueError: another shape or type, or a code that is not in the codebook.
    """
    codes = torch.as_tensor(codes)
    if codes.ndim != 2 or codes.shape[1] != GRID**2 or codes.is_floating_point():
        kind = f"{codes.dtype} {list(codes.shape)}"
        raise ValueError(f"codes are {kind}; expected whole numbers [B, 16]")
    if codes.numel() and not 0 <= codes.min() <= codes.max() < self.codes:
        low, high = int(codes.min()), int(codes.max())
        raise ValueError(f"codes go from {low} to {high}; expected 0 to {self.codes - 1}")
    codes = codes.to(self._vq_vae._embedding.device, torch.int64)
    return self.decode_vectors(self._vq_vae(codes)).clamp(-1, 1)


# %% [markdown]
# ## Files
#
# The published `vae-oid.npz` holds everything: the codebook, the decoder that reads answers, and the
# **encoder** that wrote the masks for PaliGemma's training. All widths are seen from the tensors;
# every expected tensor must be there, with its shape, full of numbers. Our own file holds the same
# names.


# %%
#| export
@add_to_class(MaskCodec)
@classmethod
def from_state(
    cls, state: Mapping[str, torch.Tensor], source: str | os.PathLike, fixed_length: bool
) -> "MaskCodec":
    """Build the codec whose widths a file's tensors show, and load them, strictly.

    Raises:
        ValueError: a tensor missing, left over, of the wrong shape or type, or with a NaN.
    """
    downs = (0, 2, 4, 6) if any(name.startswith("encoder.") for name in state) else ()
    try:
        codes, code_width = state["_vq_vae._embedding"].shape
        width = len(state["decoder.0.bias"])
        widths = [len(state[f"encoder.{layer}.bias"]) for layer in downs]
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{source} is no mask codec: it lacks, or has bent, {error}") from None
    if not codes or not code_width or width < 8 or width % 8:
        raise ValueError(f"{source}: {codes} codes, width {width}; expected a multiple of 8")
    blocks = sum(f"encoder.{layer}.net.0.bias" in state for layer in range(8, len(state)))
    with torch.device("meta"):  # shapes only, and no random numbers are drawn
        codec = cls(codes, code_width, width, widths, blocks, fixed_length)
    expected = codec.state_dict()
    for name in [*expected, *state]:
        if name not in state or name not in expected:
            what = "lacks" if name in expected else "holds, for no part of a mask codec,"
            raise ValueError(f"{source} {what} {name}; download it again")
        tensor, shape = state[name], list(expected[name].shape)
        if list(tensor.shape) != shape:
            raise ValueError(f"{source}: {name} is {list(tensor.shape)}, expected {shape}")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            kind = "holds NaN or infinity" if tensor.is_floating_point() else str(tensor.dtype)
            raise ValueError(f"{source}: {name} {kind}; expected finite floats")
    codec.load_state_dict({n: t.float() for n, t in state.items()}, assign=True)
    return codec.eval()


# %%
#| export
DAMAGED = (AttributeError, EOFError, LookupError, BadZipFile, ZlibError)  # NumPy, on broken files


@add_to_class(MaskCodec)
@classmethod
def from_npz(cls, path: str | os.PathLike) -> "MaskCodec":
    """Read the published codec; other arrays in the file are left alone.

    Args:
        path: `vae-oid.npz`; without an encoder in it the codec only decodes.

    Returns:
        The codec in float32 and evaluation mode.

    Raises:
        ValueError: no such file, not an npz, pickled objects, and what `from_state` refuses.
    """
    parts = ("encoder.", "decoder.", "_vq_vae._embedding")
    try:
        with np.load(path, allow_pickle=False) as file:
            state = {n: torch.from_numpy(file[n]) for n in file.files if n.startswith(parts)}
    except (OSError, ValueError, TypeError, RuntimeError, *DAMAGED) as error:
        raise ValueError(f"{path} is not an npz file of arrays ({error})") from None
    return cls.from_state(state, path, fixed_length=False)


@add_to_class(MaskCodec)
@classmethod
def from_pretrained(cls, path: str | os.PathLike) -> "MaskCodec":
    """Read a codec that `save_pretrained` wrote.

    Args:
        path: the file, or the directory that holds `mask_codec.safetensors`.

    Returns:
        The codec in float32 and evaluation mode.

    Raises:
        ValueError: no such file, truncated, and what `from_state` refuses.
    """
    path = codec_file(path)
    state = open_tensors([path])
    with safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
    return cls.from_state(state, path, fixed_length=about.get("fixed_length", "true") == "true")


@add_to_class(MaskCodec)
def save_pretrained(self, path: str | os.PathLike, dtype: torch.dtype = torch.float16) -> None:
    """Write `mask_codec.safetensors`, whole or not at all.

    Args:
        path: the file (`….safetensors`), or a directory, made when absent.
        dtype: of the stored weights.
    """
    path = codec_file(path)
    state = {n: t.to("cpu", dtype).contiguous() for n, t in self.state_dict().items()}
    about = {"format": "pt", "fixed_length": str(self.fixed_length).lower()}
    with replacing(path.parent) as draft:
        save_file(state, draft(path.name), metadata=about)


def codec_file(path: str | os.PathLike) -> Path:
    """The file itself, or the one of that name in a directory."""
    path = Path(path).expanduser()
    return path if path.suffix == ".safetensors" else path / "mask_codec.safetensors"


# %% [markdown]
# ## Against the reference
#
# The published weights are not part of this course. But their names and shapes are public, so we write
# a file like theirs with random numbers, load it, and compare with the same layers written as plain
# calls of PyTorch, both ways. Counted: 1,123,457 parameters in the decoder, 65,536 in the codebook.

# %%
torch.manual_seed(0)
like_theirs = MaskCodec(encoder_blocks=2, fixed_length=False).state_dict()
arrays = {n: (0.05 * torch.randn(t.shape)).numpy() for n, t in like_theirs.items()}
with tempfile.TemporaryDirectory() as folder:
    np.savez(f"{folder}/vae-oid.npz", **arrays)
    published = MaskCodec.from_npz(f"{folder}/vae-oid.npz")

weights = {name: torch.from_numpy(array) for name, array in arrays.items()}
table = weights["_vq_vae._embedding"]


def layer(function, name, x, **how):
    return function(x, weights[name + ".weight"], weights[name + ".bias"], **how)


def block(name, x):
    y = layer(F.conv2d, f"{name}.net.0", x, padding=1).relu()
    y = layer(F.conv2d, f"{name}.net.2", y, padding=1).relu()
    return x + layer(F.conv2d, f"{name}.net.4", y)


codes = torch.randint(128, (5, 16))
x = layer(F.conv2d, "decoder.0", table[codes].view(5, 4, 4, 512).permute(0, 3, 1, 2)).relu()
x = block("decoder.3", block("decoder.2", x))
for up in (4, 6, 8, 10):
    x = layer(F.conv_transpose2d, f"decoder.{up}", x, stride=2, padding=1).relu()
theirs = layer(F.conv2d, "decoder.12", x)[:, 0].clamp(-1, 1)
gap = (published.decode(codes) - theirs).abs().max().item()
assert gap <= 1e-5
sizes = {n: sum(a.size for k, a in arrays.items() if k.startswith(n)) for n in ("decoder", "_vq")}
assert sizes == {"decoder": 1_123_457, "_vq": 65_536}
print(sizes, f"largest difference {gap:.0e}")

x = 2 * (held_masks[:, None] - 0.5)
for down in (0, 2, 4, 6):
    x = layer(F.conv2d, f"encoder.{down}", x, stride=2, padding=1).relu()
x = layer(F.conv2d, "encoder.10", block("encoder.9", block("encoder.8", x)))
nearest = torch.cdist(x.flatten(2).transpose(1, 2), table[None]).argmin(2)
same = (published.encode(held_masks) == nearest).float().mean().item()
assert same == 1
print(f"codes of {len(nearest)} masks: {same:.0%} equal")

# %% [markdown]
# ## See it: shapes nobody trained on
#
# The shipped codec: 128 codes, trained by `tools/train_codec.py` on visible masks of composed scenes
# and on about nine hundred other emoji. The picture `held_out.png` holds 48 shapes of the kinds that
# were kept away from it. Sixteen letters each, IoU above:

# %%
codec = MaskCodec.from_pretrained(ASSETS / "tiny")
sheet = np.asarray(Image.open(ASSETS / "mask_codec" / "held_out.png")) / 255
tiles = sheet.reshape(6, 64, 8, 64).swapaxes(1, 2).reshape(48, 64, 64)
held = torch.tensor(tiles, dtype=torch.float32)
codes = codec.encode(held)
drawn = codec.decode(codes)
ious = mask_iou(drawn > 0, held > 0.5)
print(f"IoU of {len(held)} held-out shapes: mean {ious.mean():.2f}, median {np.median(ious):.2f}")
fig, axes = plt.subplots(3, 1, figsize=(7, 4.6), layout="constrained")
for ax, start in zip(axes, (0, 10, 20)):
    row = slice(start, start + 10)
    pairs(ax, held[row], (drawn[row] + 1) / 2, notes=[f"{value:.2f}" for value in ious[row]])
save_figure(fig, "20_gallery.png")

# %% [markdown]
# What to notice: compact things are nearly perfect. What suffers is thin: legs, stalks, gaps. A cell has
# seven bits, and a thin line needs more of them. And the cat of the beginning, beside its polygon?

# %%
whole = torch.tensor(cat[None], dtype=torch.float32)
spelled = mask_iou(codec.decode(codec.encode(whole))[0] > 0, cat)
corner_bits, letter_bits = 8 * 2 * 10, 16 * 7  # 1,024 steps a coordinate; 128 letters
print(f"eight corners, 4,000 tries:  {corner_bits} bits, IoU {best:.2f}")
print(f"sixteen letters, no search: {letter_bits} bits, IoU {spelled:.2f}")
assert letter_bits < corner_bits and abs(spelled - best) < 0.03

# %% [markdown]
# For a compact shape the polygon is *as good*. What the letters win: fewer bits, no search, holes and
# several parts at no extra cost, and always sixteen words.
#
# What do the letters mean? For each, the mean of all cells for which it was chosen, in these shapes and
# in those of the lesson's own training; a plain tile was never chosen here:

# %%
seen = torch.cat([held, train_masks])
cells = seen.unflatten(2, (4, 16)).unflatten(1, (4, 16)).permute(0, 1, 3, 2, 4).flatten(0, 2)
chosen = codec.encode(seen).flatten()
counts = torch.bincount(chosen, minlength=codec.codes)
letters = torch.zeros(codec.codes, 16, 16).index_add(0, chosen, cells)
letters = letters / counts.clamp(min=1)[:, None, None]
tiles = F.pad(letters, (1, 1, 1, 1), value=0.35).unflatten(0, (8, 16))
mosaic = tiles.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
fig, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
ax.imshow(mosaic, cmap=HEAT, vmin=0, vmax=1)
ax.set_axis_off()
save_figure(fig, "20_alphabet.png")

# %% [markdown]
# Numbered from empty to full; between them, edges at every height and slant. Several letters are plainly
# full: they tell the *neighbours* something.
#
# Does a letter concern only its own cell? Change one letter of every held-out shape, and see where the
# drawing changes:

# %%
torch.manual_seed(0)
changed = codes.clone()
changed[:, 5] = torch.randint(codec.codes, (len(codes),))  # second row, second column
moved = (codec.decode(changed) - drawn).abs().mean(0)
cell = moved[16:32, 16:32].sum() / moved.sum()
border = moved[8:40, 8:40].sum() / moved.sum() - cell
assert cell > 5 / 16 and border > 0.4 * (1 - cell)
print(f"share of all change inside the cell itself: {cell:.2f} (its area: {1 / 16:.2f})")
fig, ax = plt.subplots(figsize=(3.2, 2.9), layout="constrained")
drawing = ax.imshow(moved, cmap=HEAT)
for k in (16, 32, 48):
    ax.axhline(k - 0.5, color=COLOURS["muted"], lw=0.6)
    ax.axvline(k - 0.5, color=COLOURS["muted"], lw=0.6)
ax.set_axis_off()
fig.colorbar(drawing, ax=ax, shrink=0.8, label="mean change")
save_figure(fig, "20_one_letter")

# %% [markdown]
# More than five times its share, and nearly half of the rest lies within eight pixels of it: neighbours
# agree on where an edge meets.
# Good news for a language model: **one wrong word spoils one corner, not the shape**.

# %% [markdown]
# ## At full size
#
# The decoder beside the rest of PaliGemma; and its time beside that of writing a mask's words, for a
# model that writes four words a second: drawing is free, words cost.

# %% tags=["nbval-ignore-output"]
count = sizes["decoder"] + sizes["_vq"]
print(f"{count:,} parameters, {count / 2_923_466_480:.2%} of PaliGemma 3B")
published.decode(codes[:1])
start = time.perf_counter()
for _ in range(10):
    published.decode(codes[:1])
spent = (time.perf_counter() - start) / 10
print(f"drawing a mask: {1000 * spent:.0f} ms; writing its sixteen words: {1000 * 16 / 4:.0f} ms")

# %% [markdown]
# ## A bug people really make: a dead alphabet
#
# The same training without `restart_dead_codes`. The loss falls, nothing complains. One number exposes
# it: **perplexity**, e to the entropy of how often each code is chosen. All 64 equally often gives 64;
# only one gives 1. Watch it, and look at the counts:

# %% tags=["nbval-ignore-output"]
lazy, lazy_history = train(restart=False)
with torch.no_grad():
    lazy_drawn, lazy_codes, _ = lazy(held_masks)
    codes = net(held_masks)[1]
print(f"last losses: {history[-1][0]:.3f} with, {lazy_history[-1][0]:.3f} without")
print(f"held-out IoU without: {mask_iou(lazy_drawn > 0, held_masks > 0.5).mean():.2f}")

fig, axes = plt.subplots(1, 3, figsize=(7.4, 2.4), layout="constrained", width_ratios=(1, 1, 1))
for runs, own, colour, label in (
    (history, codes, "good", "restarted"),
    (lazy_history, lazy_codes, "bad", "not"),
):
    axes[0].plot([loss for loss, _ in runs], color=COLOURS[colour], label=label)
    axes[1].plot([used for _, used in runs], color=COLOURS[colour], label=label)
    counts = torch.bincount(own.flatten(), minlength=64).sort(descending=True).values
    axes[2].plot(counts / counts.sum(), color=COLOURS[colour])
axes[0].set(title="error of the drawing", xlabel="step", ylim=(0, 1))
axes[1].set(title="perplexity, of 64", xlabel="step", ylim=(0, 64))
axes[2].set(title="share of each code", xlabel="codes, sorted")
axes[0].legend(fontsize=8)
save_figure(fig, "20_dead")

# %% [markdown]
# A handful of letters does all the work, and the drawings still look like something. Why: a code that is
# far from all vectors is never chosen, so nothing ever pulls it nearer. The rich get richer.
#
# Cures in use: restarting dead codes (here), moving averages, small random starts, and codebooks made of
# data. All are versions of one idea: put codes where the vectors are.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): count before you run
#
# (a) How many bits do sixteen letters of an alphabet of 128 hold? (b) How many bits would an 8 × 8 grid
# of letters from an alphabet of 1024 hold? (c) With a fifth strided layer in the encoder, and a fifth
# transposed one in the decoder: how many letters does a mask of 64 × 64 get?

# %% tags=["exercise"]
answers = [None, None, None]  # your answer


# %% tags=["check"]
def test_1(answers):
    assert len(answers) == 3 and None not in answers, "three numbers"
    side = 64 // 2**5
    for name, got, right in zip("abc", answers, (16 * 7, 64 * 10, side * side)):
        assert got == right, f"({name}) is not {got}"


check(test_1, answers)

# %% [markdown]
# <details><summary>Hint</summary>
#
# An alphabet of $2^b$ letters holds $b$ bits a letter. Each strided layer halves the side.
#
# </details>

# %% tags=["solution"]
answers = [112, 640, 4]
check(test_1, answers)

# %% [markdown]
# ### Exercise 2 (fill in): straight through
#
# Return the nearest row of `table` for each vector, such that the gradient of the result arrives at
# `z` unchanged, and none at `table`.


# %% tags=["exercise"]
def quantise(z, table):
    return None  # float32, the shape of z


# %% tags=["check"]
def test_2(quantise):
    torch.manual_seed(3)
    table = torch.randn(7, 5, requires_grad=True)
    z = torch.randn(2, 4, 5, requires_grad=True)
    out = quantise(z, table)
    assert out is not None, "return a tensor"
    right = table.detach()[torch.cdist(z.detach(), table.detach()[None]).argmin(2)]
    assert out.shape == z.shape, f"shape {list(out.shape)}"
    assert torch.allclose(out, right, atol=1e-6), "not the nearest rows"
    wanted = torch.randn(2, 4, 5)
    (out * wanted).sum().backward()
    assert z.grad is not None, "no gradient arrives at z"
    assert torch.allclose(z.grad, wanted), "the gradient at z is not the one of the result"
    assert table.grad is None or table.grad.abs().max() == 0, "table gets a gradient"


check(test_2, quantise)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.cdist` for the choice, then `z + (e - z).detach()`.
#
# </details>


# %% tags=["solution"]
def quantise(z, table):
    e = table[torch.cdist(z, table.expand(len(z), -1, -1)).argmin(-1)]
    return z + (e - z).detach()


check(test_2, quantise)

# %% [markdown]
# ### Exercise 3 (extend): write without an encoder
#
# Some copies of the file hold the decoder alone. It can still write: **try, and look**. Return `codes`
# with the letter at `place` replaced by the one of all `codec.codes` letters whose drawing overlaps the
# mask best (`mask_iou` of what is above 0); all other letters stay.


# %% tags=["exercise"]
def try_letters(codec, codes, mask, place):
    return None  # int64[16]


# %% tags=["check"]
def test_3(try_letters):
    for shape, place in ((0, 5), (3, 0), (7, 15)):
        mask, before = held[shape] > 0.5, codes[shape].clone()
        after = try_letters(codec, before, mask, place)
        assert after is not None and after.shape == (16,), "sixteen codes"
        assert torch.equal(before, codes[shape]), "do not change the codes that were given"
        others = torch.arange(16) != place
        assert torch.equal(after[others], before[others]), "only the letter at `place` may change"
        got = mask_iou(codec.decode(after[None])[0] > 0, mask)
        for letter in range(codec.codes):
            trial = before.clone()
            trial[place] = letter
            better = mask_iou(codec.decode(trial[None])[0] > 0, mask) > got
            assert not better, f"shape {shape}, place {place}: letter {letter} overlaps more"


check(test_3, try_letters)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Repeat the codes once for every letter, write `torch.arange(codec.codes)` into the column `place`,
# decode all in one batch.
#
# </details>


# %% tags=["solution"]
def try_letters(codec, codes, mask, place):
    trials = codes.repeat(codec.codes, 1)  # (letters, 16)
    trials[:, place] = torch.arange(codec.codes)
    overlaps = mask_iou(codec.decode(trials) > 0, mask)
    return trials[overlaps.argmax()]


check(test_3, try_letters)

# %% [markdown]
# ## Summary
#
# - A mask is resized to 64 × 64 and written as a 4 × 4 grid of letters.
# - The alphabet is learned: nearest row of a codebook forward, straight through it backward.
# - Letters are mostly local: one wrong word spoils one corner.
# - Loss alone does not show a dead codebook; perplexity does.
# - The published file holds encoder, codebook and decoder; widths are read from it.

# %% [markdown]
# ## Quiz
#
# **1.** Why does the language model not write the 4 × 4 *vectors*, which hold more than their codes?
#
# <details><summary>Answer</summary>
#
# It writes words: a softmax over a vocabulary, trained with cross-entropy. Numbers would need another
# output layer and another loss, and an average of two possible shapes is often no shape at all. A
# choice among words can be unsure without being blurred.
#
# </details>

# %% [markdown]
# **2.** Why does our encoder bring its vectors to a fixed length before it looks for the nearest code?
#
# <details><summary>Answer</summary>
#
# Nothing else bounds them. Longer vectors are further apart, which makes the decoder's work easier, so
# they would grow, and the codebook follows with a delay: the nearest code is far away all the time.
#
# </details>

# %% [markdown]
# **3.** All 128 codes are equally often in use. Is the codec then as good as it can be?
#
# <details><summary>Answer</summary>
#
# No. Perplexity only says that the alphabet is not wasted. A random codebook can be in even use, too;
# the error of the drawing says how good the letters are. And for a language model a third thing
# counts: similar shapes should have similar spellings, for they must be *predicted*.
#
# </details>

# %% [markdown]
# ## References
#
# - Aaron van den Oord et al., *Neural Discrete Representation Learning*, 2017 (VQ-VAE, straight through).
# - Jia Ning et al., *All in Tokens: Unifying Output Space of Visual Tasks via Soft Token*, 2023.
# - Lucas Beyer et al., *PaliGemma: A versatile 3B VLM for transfer*, 2024 (the 128 segmentation words).
# - big_vision: `pp/proj/paligemma/segmentation.py` (the encoder) and
#   `evaluators/proj/paligemma/transfers/segmentation.py` (the decoder), the published readers of
#   `vae-oid.npz`.

# %% [markdown] tags=["navigation"]
# [← Detection](19_detection.ipynb) | [contents](00_overview.ipynb) | [Segmentation →](21_segmentation.ipynb)
