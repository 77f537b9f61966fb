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
# [← Detection](19_detection.ipynb) | [contents](00_overview.ipynb) | [Quantization →](22_quantization.ipynb)

# %% [markdown]
# # 21 · Segmentation: how do sixteen words draw any shape?
#
# *45 minutes* · part IV, Answering
#
# **What you will be able to do**
#
# - say why a shape costs sixteen words, and which sixteen;
# - quantise vectors with a pencil, and send a gradient *through* a choice;
# - train a mask codec and see from one number whether its alphabet is alive;
# - load the published decoder, read masks from untrusted text, and put them into a picture.

# %% tags=["map"]
from paligemma.plotting import model_map

model_map("segmentation")

# %% [markdown]
# ## Setup
#
# From earlier lessons: `<loc>` and `<seg>` words ([06](06_tokenizer.ipynb)), root-mean-square
# normalisation ([07](07_rms_norm.ipynb)), and boxes, their parser and their scores
# ([19](19_detection.ipynb)). The cells that begin with `#| export` become
# [segmentation.py](../paligemma/segmentation.py).

# %%
#| export
"""Masks as words: a learned codec of sixteen codes a mask, and objects with masks in an answer."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from paligemma.checkpoint import replacing
from paligemma.detection import Found, decode_box, encode_boxes, find_objects, score_spans
from paligemma.tokenizer import Tokenizer

# %% tags=["setup"]
import math
import tempfile
import time
from importlib import resources

import matplotlib.pyplot as plt
from PIL import Image, ImageDraw

from paligemma.plotting import COLOURS, CYCLE, HEAT, check, draw_masks, sample_picture
from paligemma.plotting import save_figure, show_images

ASSETS = resources.files("paligemma") / "assets"

# %% [markdown]
# ## The problem: a shape is long
#
# A box is four words. A shape inside it? The course's scene is composed of emoji, so their opaque
# pixels are exact masks. Three obvious ways to write the cat: each pixel, the runs of equal pixels,
# the pixels of the outline.

# %%
PLACED = [("cat", 72, 300, 128, 6), ("dog", 236, 160, 124, -5), ("dog", 360, 310, 128, 4)]


def emoji_mask(name, side, degrees):
    """The opaque pixels of an emoji, bool[h, w]."""
    sprite = Image.open(ASSETS / "emoji" / f"{name}.png").convert("RGBA")
    sprite = sprite.resize((side, side), Image.Resampling.LANCZOS)
    sprite = sprite.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    return np.asarray(sprite.getchannel("A")) >= 128


def box_around(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


names, masks = [name for name, *_ in PLACED], np.zeros((3, 448, 448), bool)
for mask, (name, x, y, side, degrees) in zip(masks, PLACED):
    shape = emoji_mask(name, side, degrees)
    h, w = shape.shape
    mask[y - h // 2 : y - h // 2 + h, x - w // 2 : x - w // 2 + w] = shape
boxes = [box_around(mask) for mask in masks]

x0, y0, x1, y1 = boxes[0]
cat = masks[0][y0:y1, x0:x1]
runs = 1 + int((cat.ravel()[1:] != cat.ravel()[:-1]).sum())
padded = np.pad(cat, 1)
around = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
print(f"pixels {cat.size}, runs {runs}, pixels of the outline {int((cat & ~around).sum())}")

# %% [markdown]
# Hundreds of words for one cat. A language model writes one word after another, at full price each
# ([lesson 18](18_generation.ipynb)). What can we get for **sixteen**? Eight corners of a polygon,
# two numbers each:

# %%
centre = np.array([(x0 + x1) / 2, (y0 + y1) / 2])
ys, xs = np.nonzero(masks[0])
offsets = np.stack([xs, ys], 1) + 0.5 - centre
angles = np.arctan2(offsets[:, 1], offsets[:, 0])
corners = []
for turn in np.arange(8) * math.pi / 4 - math.pi + math.pi / 8:
    near = np.abs(angles - turn) < 0.1
    corners.append(tuple(centre + offsets[near][np.linalg.norm(offsets[near], axis=1).argmax()]))
canvas = Image.new("L", (448, 448))
ImageDraw.Draw(canvas).polygon(corners, fill=255)
polygon = np.asarray(canvas) > 0


def mask_iou(a, b):
    """Intersection over union of two masks, or of each pair."""
    a, b = np.asarray(a), np.asarray(b)
    return (a & b).sum((-1, -2)) / (a | b).sum((-1, -2))


scene = sample_picture("scene")
views = [draw_masks(scene, [m]).crop((0, 220, 160, 380)) for m in (masks[0], polygon)]
titles = ["the truth", f"eight corners: IoU {mask_iou(polygon, masks[0]):.2f}"]
fig = show_images([v.resize((240, 240)) for v in views], titles, height=2.6)
save_figure(fig, "21_corners.png")

# %% [markdown]
# One ear is gone. A polygon spends its numbers on *where* corners lie, and knows nothing about how
# things usually look.
#
# PaliGemma does what writing does: a fixed **alphabet**, `<seg000>` … `<seg127>`, and sixteen
# letters for every shape. But nobody designs the letters. They are *learned*, together with a small
# network that draws what they spell.

# %% [markdown]
# ## From picture to square and back
#
# Letters shall say what the shape is, not where or how large: the box says that already. So the
# inside of the box is resized to 64 × 64.
#
# Resizing a line is a **matrix**: each new pixel is a weighted mean of old ones. By hand: six pixels
# to four, then to twelve.


# %%
#| export
GRID = 4  # codes along a side
SIDE = 64  # pixels along a side of the square that the codes draw


def resize_weights(
    points: torch.Tensor, spacing: torch.Tensor, low, high, size: int
) -> torch.Tensor:
    """How much each of `size` pixels counts at points on a line: bilinear, smoothed if spread.

    Args:
        points: `float64[n, m]`, in pixels.
        spacing: `float64[n, 1]`, from one to the next.
        low, high: `float64[n, 1]`: only pixels that touch this stretch count.
        size: of the line.

    Returns:
        `float32[n, m, size]`; each row sums to 1.
    """
    pixels = torch.arange(size, dtype=torch.float64)
    reach = spacing.clamp(min=1)[..., None]
    weights = (1 - (points[..., None] - pixels - 0.5).abs() / reach).clamp(min=0)
    weights = weights * ((pixels + 1 > low) & (pixels < high))[:, None]
    return (weights / weights.sum(-1, keepdim=True)).float()


# %%
def ruler(before, after):
    step = before / after
    points = (torch.arange(after, dtype=torch.float64) + 0.5)[None] * step
    ends = torch.zeros(1, 1), torch.full((1, 1), float(before))
    return resize_weights(points, torch.tensor([[step]], dtype=torch.float64), *ends, before)[0]


line = torch.tensor([0.0, 0, 1, 1, 1, 0])
print(ruler(6, 4).round(decimals=2))
for length in (4, 12):
    print(length, [f"{value:.2f}" for value in ruler(6, length) @ line])

# %% [markdown]
# To fewer pixels, each looks at more neighbours, so that nothing falls between two of them. To more
# pixels, each looks at the nearest two. A picture is resized by one matrix from the left, one from the
# right:
#
# $$\text{square} = W_\text{down}\;\text{mask}\;W_\text{across}^{\top}$$
#
# With a batch of such matrices, all masks of a training batch are cut and resized at once.


# %%
#| export
def crop_masks(boxes: Sequence, masks: Sequence) -> torch.Tensor:
    """Cut each mask out along its box and resize it to the square that codes draw.

    Args:
        boxes: n boxes (x0, y0, x1, y1) in pixels; the part inside the picture counts.
        masks: bool[n, H, W], each as large as the picture (of one or of several pictures).

    Returns:
        `float32[n, 64, 64]` in [0, 1].

    Raises:
        ValueError: not one mask for each box, or a box without inside.
    """
    boxes = torch.from_numpy(np.array(boxes, dtype=np.float64).reshape(-1, 4))
    masks = torch.from_numpy(np.ascontiguousarray(masks, dtype=bool))
    if masks.ndim != 3 or len(masks) != len(boxes):
        if len(boxes) or masks.numel():
            raise ValueError(
                f"{len(boxes)} boxes and masks {list(masks.shape)}; "
                "expected a mask [height, width] for each box"
            )
        return torch.zeros(0, SIDE, SIDE)
    sizes = torch.tensor(masks.shape[:0:-1], dtype=torch.float64)  # width, height
    low = torch.minimum(boxes[:, :2].clamp(min=0), sizes)
    high = torch.minimum(boxes[:, 2:].clamp(min=0), sizes)
    if not (high > low).all():
        bad = boxes[~(high > low).all(1)][0].tolist()
        raise ValueError(f"box {bad} has no inside in the picture; expected x0 < x1 and y0 < y1")
    steps = (torch.arange(SIDE, dtype=torch.float64) + 0.5) / SIDE
    points = low[..., None] + (high - low)[..., None] * steps  # (n, 2, 64)
    spacing = (high - low) / SIDE
    across, down = (
        resize_weights(points[:, i], spacing[:, [i]], low[:, [i]], high[:, [i]], masks.shape[2 - i])
        for i in (0, 1)
    )
    return (down @ masks.float() @ across.transpose(1, 2)).clamp(0, 1)  # (n, 64, 64)


# %% [markdown]
# The way back is the same matrix with the roles exchanged. The threshold comes **last**: values
# between the pixels of the square give a smooth edge, however large the picture.
#
# PyTorch's own `interpolate` with `antialias=True` is the reference below. And there and back, without
# any codes yet, costs almost nothing.


# %%
#| export
def paste_mask(drawn: torch.Tensor, box: Sequence[float], width: int, height: int) -> np.ndarray:
    """Resize what codes draw to its box (bilinear) and put it into the picture.

    Args:
        drawn: `float32[64, 64]`, inside where above 0.
        box: (x0, y0, x1, y1), pixels; parts beyond the picture are cut off.
        width, height: of the picture, pixels.

    Returns:
        bool[height, width].
    """
    mask = np.zeros((height, width), dtype=bool)
    places, weights = [], []
    for low, high, size in ((box[1], box[3], height), (box[0], box[2], width)):
        first, last = (min(max(int(np.ceil(v - 0.5)), 0), size) for v in (low, high))
        points = (torch.arange(first, last, dtype=torch.float64) + 0.5 - low) / (high - low) * SIDE
        spacing = torch.tensor([[SIDE / (high - low)]], dtype=torch.float64)
        ends = torch.tensor([[0.0]]), torch.tensor([[float(SIDE)]])
        weights.append(resize_weights(points[None].clamp(0.5, SIDE - 0.5), spacing, *ends, SIDE)[0])
        places.append(slice(first, last))
    mask[tuple(places)] = (weights[0] @ drawn.float().cpu() @ weights[1].T > 0).numpy()
    return mask


# %%
square = crop_masks(boxes, masks)
gap = 0.0
for own, (x0, y0, x1, y1), mask in zip(square, boxes, masks):
    inside = torch.tensor(mask[None, None, y0:y1, x0:x1]).float()
    theirs = F.interpolate(inside, (64, 64), mode="bilinear", antialias=True)[0, 0]
    gap = max(gap, (own - theirs).abs().max().item())
assert gap <= 1e-5
back = [paste_mask(2 * own - 1, box, 448, 448) for own, box in zip(square, boxes)]
print("largest difference to F.interpolate:", f"{gap:.0e}")
print("IoU after there and back:", [f"{value:.3f}" for value in mask_iou(back, masks)])

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
save_figure(fig, "21_straight")

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
# That file holds no encoder. Ours is the mirror image, with one line of its own in `look`: vectors get
# a fixed length ([lesson 07](07_rms_norm.ipynb), without a weight). Otherwise they grow and grow, and the codebook
# runs after them.


# %%
#| export
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


def make_decoder(code_width: int, width: int) -> nn.Sequential:
    """Layers from a 4 × 4 grid of codebook vectors to a 64 × 64 picture of one channel.

    Source: the published `vae-oid.npz`, whose names `decoder.0` … `decoder.12` these are.
    """
    layers = [nn.Conv2d(code_width, width, 1), nn.ReLU()]
    layers += [ResidualBlock(width), ResidualBlock(width)]
    for before, after in pairwise((width, width, width // 2, width // 4, width // 8)):
        layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width // 8, 1, 1))


def make_encoder(code_width: int, width: int) -> nn.Sequential:
    """The decoder's mirror, one block shorter: 64 × 64 pixels to a 4 × 4 grid of vectors."""
    layers = []
    for before, after in pairwise((1, width // 8, width // 4, width // 2, width)):
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, ResidualBlock(width), nn.Conv2d(width, code_width, 1))


# %%
#| export
class Codebook(nn.Module):
    """The vectors that codes stand for.

    Args:
        codes: how many.
        width: of each.
    """

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
class MaskVQVAE(nn.Module):
    """The network of a mask codec: 64 × 64 pixels → sixteen vectors → codes → 64 × 64 pixels.

    Args:
        codes: size of the codebook.
        code_width: of its vectors.
        width: channels of the inner layers, a multiple of 8.
        encoder: False: without one, as the published file.

    Source: Ning et al., *All in Tokens*, 2023; the defaults are those of `vae-oid.npz`.
    """

    def __init__(
        self, codes: int = 128, code_width: int = 512, width: int = 128, encoder: bool = True
    ):
        super().__init__()
        self.codes = codes
        self._vq_vae = Codebook(codes, code_width)
        self.encoder = make_encoder(code_width, width) if encoder else None
        self.decoder = make_decoder(code_width, width)

    def look(self, masks: torch.Tensor) -> torch.Tensor:
        """What the encoder says: `float32[B, 64, 64]` in [0, 1] → `float32[B, 16, code_width]`."""
        z = self.encoder(2 * masks[:, None] - 1)  # (B, code_width, 4, 4)
        z = z.flatten(2).transpose(1, 2)  # (B, 16, code_width)
        return F.rms_norm(z, z.shape[2:])  # of fixed length: it cannot run away from its codes

    def draw(self, vectors: torch.Tensor) -> torch.Tensor:
        """What the decoder paints: `float32[B, 16, code_width]` → `float32[B, 64, 64]`."""
        grid = vectors.transpose(1, 2).unflatten(2, (GRID, GRID))  # (B, code_width, 4, 4)
        return self.decoder(grid)[:, 0]

    def forward(self, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One pass for training, gradients straight through the choice of codes.

        Returns:
            what is drawn (`float32[B, 64, 64]`), the codes (`int64[B, 16]`) and how far codebook
            and encoder are apart (a loss: the codebook moves fully, the encoder by a quarter).
        """
        z = self.look(masks)
        codes = self._vq_vae.nearest(z)
        e = self._vq_vae(codes)
        apart = F.mse_loss(e, z.detach()) + 0.25 * F.mse_loss(z, e.detach())
        return self.draw(z + (e - z).detach()), codes, apart


# %%
torch.manual_seed(0)
net = MaskVQVAE(codes=32, code_width=8, width=32)
drawn, chosen, apart = net(square)
assert chosen.flatten().tolist() == nearest_loop(
    net.look(square).flatten(0, 1), net._vq_vae._embedding
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
def restart_dead_codes(net: MaskVQVAE, masks: torch.Tensor, counts: torch.Tensor) -> int:
    """Give codes that nobody chooses a new place: on top of what the encoder says now.

    Args:
        net: in training.
        masks: `float32[B, 64, 64]`, a batch to take places from.
        counts: `int64[codes]`, how often each code was chosen lately.

    Returns:
        How many were dead.
    """
    dead = (counts == 0).nonzero()[:, 0]
    z = net.look(masks).flatten(0, 1)  # (16 B, code_width)
    net._vq_vae._embedding[dead] = z[torch.randint(len(z), (len(dead),), device=z.device)]
    return len(dead)


# %%
KINDS = sorted(path.stem for path in (ASSETS / "emoji").glob("*.png"))
HELD = KINDS[3::6]


def squares(kinds, turns):
    shapes = [emoji_mask(kind, 64, turn) for kind in kinds for turn in turns]
    shapes += [shape[:, ::-1] for shape in shapes]
    return torch.cat([crop_masks([box_around(shape)], shape[None]) for shape in shapes])


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
    net = MaskVQVAE(codes=size, code_width=16, width=32)
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
save_figure(fig, "21_training.png")

# %% [markdown]
# What to notice: kinds that it never saw come out recognisably. It did not learn 40 kinds, it learned
# *pieces of edges*. A few seconds, 400 masks: the corners are soft. The codec that ships with the course
# is the same class, trained for minutes on a thousand shapes.

# %% [markdown]
# ## The published file has no encoder
#
# `vae-oid.npz` holds codebook and decoder: enough to read answers, not to write masks. Yet a decoder
# alone can encode: **try, and look**. Each cell starts with the code whose drawing fits that cell best;
# then cell after cell, 32 candidates are drawn, and the best stays. Where there *is* an encoder, the
# search may start from its codes, and finds better ones.


# %%
#| export
@torch.no_grad()
def search_codes(
    codec: "MaskCodec",
    masks: torch.Tensor,
    tries: int = 32,
    sweeps: int = 2,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Encode with a decoder: try codes, keep those whose drawing overlaps the mask best (IoU).

    Cell after cell its own code and `tries` others are drawn in their places: those which, drawn
    alone all over, fit the cell's part of the mask best.

    Args:
        codec: whose `decode` is used.
        masks: `float32[B, 64, 64]` in [0, 1].
        tries: candidates of each cell.
        sweeps: times through the cells.
        start: `int64[B, 16]`, such as the encoder's; None: the best fit of each cell alone.

    Returns:
        `int64[B, 16]`.
    """
    inside = masks > 0.5
    everywhere = torch.arange(codec.codes, device=masks.device)[:, None].expand(-1, GRID**2)
    cost = torch.cdist(_cells(2 * masks - 1), _cells(codec.decode(everywhere)))
    best = cost.topk(min(tries, codec.codes), largest=False).indices  # (16, B, tries)
    codes = best[..., 0].T.clone() if start is None else start.clone()  # (B, 16)
    for cell in list(range(GRID**2)) * sweeps:
        candidates = torch.cat((codes[:, cell : cell + 1], best[cell]), dim=1)  # (B, 1 + tries)
        trial = codes[:, None].repeat(1, candidates.shape[1], 1)  # (B, 1 + tries, 16)
        trial[:, :, cell] = candidates
        drawn = codec.decode(trial.flatten(0, 1)).unflatten(0, trial.shape[:2]) > 0
        both = (drawn & inside[:, None]).sum((2, 3))
        overlap = both / (drawn | inside[:, None]).sum((2, 3)).clamp(min=1)
        codes[:, cell] = candidates.gather(1, overlap.argmax(1, keepdim=True))[:, 0]
    return codes


def _cells(pictures: torch.Tensor) -> torch.Tensor:
    """Cut into the squares that single codes stand for: (B, 64, 64) → (16, B, 256)."""
    step = SIDE // GRID
    squares = pictures.unflatten(2, (GRID, step)).unflatten(1, (GRID, step))
    return squares.permute(1, 3, 0, 2, 4).reshape(GRID**2, -1, step * step)


# %% [markdown]
# Then files: widths are seen from the tensors, and every expected tensor must be there with its shape.
# And last the class that everybody uses: network, files, and two functions that check what they get.


# %%
#| export
BROKEN_ZIP = (BadZipFile, ZlibError)


class CodecFiles:
    """Reading and writing of a mask codec."""

    @classmethod
    def from_npz(cls, path: str | os.PathLike) -> "MaskCodec":
        """Read the published decoder and codebook; other arrays in the file are left alone.

        Args:
            path: `vae-oid.npz`.

        Returns:
            A codec without an encoder, in evaluation mode.

        Raises:
            ValueError: no such file, not an npz, an array missing or of the wrong shape.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                names = [n for n in arrays.files if n.startswith(("decoder.", "_vq_vae._emb"))]
                state = {name: torch.from_numpy(arrays[name]) for name in names}
        except (OSError, ValueError, AttributeError, TypeError, EOFError, *BROKEN_ZIP) as error:
            raise ValueError(f"{path} is not an npz file of arrays ({error})") from None
        return _from_state(cls, path, state)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> "MaskCodec":
        """Read a codec that `save_pretrained` wrote.

        Args:
            path: the file, or the directory that holds `mask_codec.safetensors`.

        Returns:
            The codec in float32 and evaluation mode.

        Raises:
            ValueError: no such file, truncated, a tensor missing or of the wrong shape.
        """
        path = _codec_file(path)
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is not a file of a mask codec ({error})") from None
        return _from_state(cls, path, state)

    def save_pretrained(self, path: str | os.PathLike, dtype: torch.dtype = torch.float16) -> None:
        """Write `mask_codec.safetensors`, whole or not at all.

        Args:
            path: the file (`….safetensors`), or a directory, made when absent.
            dtype: of the stored weights.
        """
        path = _codec_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {n: t.to("cpu", dtype).contiguous() for n, t in self.state_dict().items()}
        with replacing(path.parent) as draft:
            save_file(state, draft(path.name), metadata={"format": "pt"})


# %%
#| export
def _codec_file(path: str | os.PathLike) -> Path:
    """The file itself, or the one of that name in a directory."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / "mask_codec.safetensors"


def _from_state(cls: type, path, state: dict[str, torch.Tensor]) -> "MaskCodec":
    """Build the codec whose widths a file's tensors show, and load them, strictly."""
    try:
        codes, code_width = state["_vq_vae._embedding"].shape
        width = state["decoder.0.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"{path} holds no codebook and decoder.0.weight ({error})") from None
    if width < 8 or width % 8 or not codes:
        raise ValueError(f"{path}: {codes} codes, width {width}; expected width a multiple of 8")
    encoder = any(name.startswith("encoder.") for name in state)
    with torch.random.fork_rng(devices=[]):  # loading draws no one else's random numbers
        codec = cls(codes, code_width, width, encoder)
    expected = codec.state_dict()
    for name in [*expected, *state]:
        if name not in state or name not in expected:
            what = "lacks" if name in expected else "holds, for no part of a mask codec,"
            raise ValueError(f"{path} {what} {name}; download it again")
        if state[name].shape != expected[name].shape:
            raise ValueError(
                f"{path}: {name} is {list(state[name].shape)}, "
                f"expected {list(expected[name].shape)}"
            )
    codec.load_state_dict(state)
    return codec.eval()


# %%
#| export
class MaskCodec(CodecFiles, MaskVQVAE):
    """Masks to codes and back: 64 × 64 pixels ↔ sixteen codes, four rows of four.

    Args: as in `MaskVQVAE`; without an encoder, `encode` searches.
    """

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
            raise ValueError(
                f"codes are {codes.dtype} {list(codes.shape)}; expected whole numbers [B, 16]"
            )
        if codes.numel() and not 0 <= codes.min() <= codes.max() < self.codes:
            low, high = int(codes.min()), int(codes.max())
            raise ValueError(f"codes go from {low} to {high}; expected 0 to {self.codes - 1}")
        codes = codes.to(self._vq_vae._embedding.device, torch.int64)
        return self.draw(self._vq_vae(codes)).clamp(-1, 1)

    @torch.no_grad()
    def encode(self, masks: torch.Tensor) -> torch.Tensor:
        """Write masks as codes; without an encoder by search, which is far slower.

        Args:
            masks: `float32[B, 64, 64]` in [0, 1] (or bool).

        Returns:
            `int64[B, 16]`.

        Raises:
            ValueError: another shape, or values outside 0 to 1.
        """
        masks = torch.as_tensor(masks)
        if masks.ndim != 3 or masks.shape[1:] != (SIDE, SIDE):
            raise ValueError(f"masks are {list(masks.shape)}; expected [B, 64, 64]: crop_masks")
        masks = masks.to(self._vq_vae._embedding)
        if not ((masks >= 0) & (masks <= 1)).all():
            raise ValueError("masks have values outside 0 to 1; expected 1 inside, 0 outside")
        if self.encoder is not None:
            return self._vq_vae.nearest(self.look(masks))
        found = [search_codes(self, part) for part in masks.split(16)]
        return torch.cat(found) if found else masks.new_zeros(0, GRID**2, dtype=torch.int64)


# %% [markdown]
# ## Against the reference
#
# The published weights are not part of this course. But their names and shapes are public, so we write
# a file like theirs with random numbers, load it, and compare with the same layers written as plain
# calls of PyTorch. Counted: 1,123,457 parameters in the decoder, 65,536 in the codebook.

# %%
torch.manual_seed(0)
names_and_shapes = MaskCodec(encoder=False).state_dict()
arrays = {n: (0.05 * torch.randn(t.shape)).numpy() for n, t in names_and_shapes.items()}
with tempfile.TemporaryDirectory() as folder:
    np.savez(f"{folder}/vae-oid.npz", **arrays)
    published = MaskCodec.from_npz(f"{folder}/vae-oid.npz")


def layer(function, name, x, **how):
    return function(x, weights[name + ".weight"], weights[name + ".bias"], **how)


weights = {name: torch.from_numpy(array) for name, array in arrays.items()}
codes = torch.randint(128, (5, 16))
x = weights["_vq_vae._embedding"][codes].view(5, 4, 4, 512).permute(0, 3, 1, 2)
x = layer(F.conv2d, "decoder.0", x).relu()
for block in (2, 3):
    y = layer(F.conv2d, f"decoder.{block}.net.0", x, padding=1).relu()
    y = layer(F.conv2d, f"decoder.{block}.net.2", y, padding=1).relu()
    x = x + layer(F.conv2d, f"decoder.{block}.net.4", y)
for up in (4, 6, 8, 10):
    x = layer(F.conv_transpose2d, f"decoder.{up}", x, stride=2, padding=1).relu()
theirs = layer(F.conv2d, "decoder.12", x)[:, 0].clamp(-1, 1)
gap = (published.decode(codes) - theirs).abs().max().item()
assert gap <= 1e-5
sizes = {n: sum(a.size for k, a in arrays.items() if k.startswith(n)) for n in ("decoder", "_vq")}
print(sizes, f"largest difference {gap:.0e}")

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
few, inside = held[:8], held[:8] > 0.5
for name, start in (("by search alone", None), ("from there by search", codes[:8])):
    searched = codec.decode(search_codes(codec, few, start=start)) > 0
    print(f"eight of them by encoder {ious[:8].mean():.2f}, {name}", end=" ")
    print(f"{mask_iou(searched, inside).mean():.2f}")
fig, axes = plt.subplots(3, 1, figsize=(7, 4.6), layout="constrained")
for ax, start in zip(axes, (0, 10, 20)):
    row = slice(start, start + 10)
    pairs(ax, held[row], (drawn[row] + 1) / 2, notes=[f"{value:.2f}" for value in ious[row]])
save_figure(fig, "21_gallery.png")

# %% [markdown]
# What to notice: compact things are nearly perfect. What suffers is thin: legs, stalks, gaps. A cell has
# seven bits, and a thin line needs more of them.
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
save_figure(fig, "21_alphabet.png")

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
print(f"share of all change inside the cell itself: {cell:.2f} (its area: {1 / 16:.2f})")
fig, ax = plt.subplots(figsize=(3.2, 2.9), layout="constrained")
drawing = ax.imshow(moved, cmap=HEAT)
for k in (16, 32, 48):
    ax.axhline(k - 0.5, color=COLOURS["muted"], lw=0.6)
    ax.axvline(k - 0.5, color=COLOURS["muted"], lw=0.6)
ax.set_axis_off()
fig.colorbar(drawing, ax=ax, shrink=0.8, label="mean change")
save_figure(fig, "21_one_letter")

# %% [markdown]
# Far more than its share, and most of the rest is its border: neighbours agree on where an edge meets.
# Good news for a language model: **one wrong word spoils one corner, not the shape**.

# %% [markdown]
# ## As words
#
# Twenty words an object, then its name: `<loc>` × 4, `<seg>` × 16. Objects are joined by ` ; `. For
# reading, `find_objects` of [lesson 19](19_detection.ipynb) already knows runs of `<seg>`, and names what is wrong; here an
# object *without* a mask is broken, too.


# %%
#| export
def encode_segments(
    boxes: Sequence, masks: Sequence, codec: MaskCodec, width: float, height: float
) -> list[str]:
    """Write each object's box and mask as twenty words.

    Args:
        boxes: n boxes (x0, y0, x1, y1), pixels.
        masks: bool[n, height, width], as large as the picture; those of several pictures of one
            size may be encoded together, which is faster.
        codec: with an encoder.
        width, height: of the picture, pixels.

    Returns:
        "<loc>×4<seg>×16" for each.

    Raises:
        ValueError: as in `encode_boxes` and `crop_masks`.
    """
    words = encode_boxes(boxes, width, height)
    codes = codec.encode(crop_masks(boxes, masks)).tolist()
    return [w + "".join(f"<seg{code:03d}>" for code in own) for w, own in zip(words, codes)]


@dataclass(frozen=True, eq=False)
class Segment:
    """One object that was found, with its shape.

    Args:
        label: its name, as the model wrote it.
        box: (x0, y0, x1, y1) in pixels of the given picture.
        mask: bool[H, W], as large as the given picture.
        score: how sure the model was, 0 to 1; 1 where nothing is known.
    """

    label: str
    box: tuple[float, float, float, float]
    mask: np.ndarray
    score: float = 1.0


# %%
#| export
def parse_segments(
    text: str, width: int, height: int, codec: MaskCodec, dropped: list | None = None
) -> list[Segment]:
    """Read the objects with masks of a model's answer; whatever the text, it raises nothing.

    Args:
        text: "<loc>×4<seg>×16 label" joined by " ; ", with anything around.
        width, height: of the picture, pixels.
        codec: draws the masks.
        dropped: a list that gets (piece of text, what is wrong with it) for each broken object.

    Returns:
        The well-formed objects, in order, with score 1.

    Raises:
        ValueError: a picture without size.
    """
    found = _with_masks(text, codec, dropped)
    return _segments(found, [1.0] * len(found), width, height, codec)


def score_segments(
    ids: Sequence[int],
    log_probs: Sequence[float],
    tokenizer: Tokenizer,
    width: int,
    height: int,
    codec: MaskCodec,
    dropped: list | None = None,
) -> list[Segment]:
    """`parse_segments` of an answer given as tokens, each object with its score.

    Args:
        ids: the tokens of one answer.
        log_probs: of each token, as `generate_steps` collects them.
        tokenizer: spells them.
        width, height, codec, dropped: as in `parse_segments`.

    Returns:
        The well-formed objects, in order.
    """
    found = _with_masks(tokenizer.decode(ids), codec, dropped)
    spans = [(f.start, f.end) for f in found]
    scores = score_spans(spans, ids, log_probs, tokenizer)
    return _segments(found, scores, width, height, codec)


# %%
#| export
def _with_masks(text: str, codec: MaskCodec, dropped: list | None) -> list[Found]:
    """The well-formed objects that have a mask."""
    kept = []
    for found in find_objects(text):
        problem = found.problem
        if problem is None and not found.segs:
            problem = "0 <seg>, expected 16"
        elif problem is None and max(found.segs) >= codec.codes:
            problem = f"a number beyond <seg{codec.codes - 1:03d}>"
        if problem is None:
            kept.append(found)
        elif dropped is not None:
            dropped.append((text[found.start : found.end].strip(), problem))
    return kept


def _segments(
    found: Iterable[Found], scores: Iterable[float], width: int, height: int, codec: MaskCodec
) -> list[Segment]:
    """Draw all masks in one batch and put each into its box."""
    if not all(size > 0 and int(size) == size for size in (width, height)):
        raise ValueError(f"the picture is {width} × {height}; expected whole numbers of pixels")
    found = list(found)
    if not found:
        return []
    drawings = codec.decode(torch.tensor([f.segs for f in found]))
    segments = []
    for one, drawn, score in zip(found, drawings, scores):
        box = decode_box(one.locs, width, height)
        mask = paste_mask(drawn, box, int(width), int(height))
        segments.append(Segment(one.label, box, mask, score))
    return segments


# %%
words = encode_segments(boxes, masks, codec, 448, 448)
answer = " ; ".join(f"{own} {name}" for own, name in zip(words, names))
print(answer.replace(" ; ", " ;\n"))
segments = parse_segments(answer, 448, 448, codec)
for own, mask in zip(segments, masks):
    print(own.label, own.mask.shape, own.mask.dtype, f"IoU {mask_iou(own.mask, mask):.2f}")
shown = draw_masks(scene, [s.mask for s in segments], [s.label for s in segments])
titles = ["the given picture", "read from the text above"]
fig = show_images([scene.resize((300, 300)), shown.resize((300, 300))], titles, height=2.9)
save_figure(fig, "21_scene.png")

# %% [markdown]
# A model's answer is untrusted. Every broken object is dropped and named; the good one survives:

# %%
LOCS, SEGS = words[0][:36], words[0][36:]
BROKEN = {
    "cut off": f"{LOCS}{SEGS[:72]}",
    "one word short": f"{LOCS}{SEGS[:-8]} cat",
    "no mask": f"{LOCS} cat",
    "no name": f"{LOCS}{SEGS}",
    "no such word": f"{LOCS}{SEGS[:-8]}<seg128> cat",
}
for what, text in BROKEN.items():
    dropped = []
    kept = parse_segments(f"{text} ; {words[1]} dog", 448, 448, codec, dropped)
    print(f"{what:15}", [s.label for s in kept], dropped[0][1])

# %% [markdown]
# ## At full size
#
# The decoder beside the rest of PaliGemma, on the meta device; and its time beside that of writing a
# mask's words, for a model that writes four words a second: drawing is free, words cost.
#
# Below: which step loses more of a shape, the square or the letters? A cat of every size, there and
# back. It is the letters, at any size.

# %% tags=["nbval-ignore-output"]
with torch.device("meta"):
    full = MaskVQVAE(encoder=False)
count = sum(p.numel() for p in full.parameters())
print(f"{count:,} parameters, {count / 2_923_466_480:.2%} of PaliGemma 3B")
codes = torch.randint(128, (1, 16))
published.decode(codes)
start = time.perf_counter()
for _ in range(10):
    published.decode(codes)
spent = (time.perf_counter() - start) / 10
print(f"drawing a mask: {1000 * spent:.0f} ms; writing its sixteen words: {1000 * 16 / 4:.0f} ms")

# %%
sides, plain, coded = (24, 32, 48, 64, 96, 128, 192, 256, 384), [], []
for side in sides:
    shape = emoji_mask("cat", side, 6)
    box = box_around(shape)
    own = crop_masks([box], shape[None])
    h, w = shape.shape
    plain.append(mask_iou(paste_mask(2 * own[0] - 1, box, w, h), shape))
    coded.append(mask_iou(paste_mask(codec.decode(codec.encode(own))[0], box, w, h), shape))
fig, ax = plt.subplots(figsize=(5.4, 2.6), layout="constrained")
ax.plot(sides, plain, "o-", color=COLOURS["muted"], label="square only")
ax.plot(sides, coded, "o-", color=COLOURS["accent"], label="square and sixteen codes")
ax.set(
    xscale="log", xticks=sides, xticklabels=sides, xlabel="side of the cat, pixels", ylabel="IoU"
)
ax.minorticks_off()
ax.set_ylim(0.8, 1.005)
ax.legend(loc="lower right")
save_figure(fig, "21_sizes")

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
save_figure(fig, "21_dead")

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
# (a) How many words is the answer to `segment dog` with two dogs, when `dog` and ` ; ` are one word
# each? (b) How many bits do sixteen letters of an alphabet of 128 hold? (c) How many bits would an 8 × 8
# grid of letters from an alphabet of 1024 hold?

# %% tags=["exercise"]
answers = [None, None, None]  # your answer


# %% tags=["check"]
def test_1(answers):
    assert len(answers) == 3 and None not in answers, "three numbers"
    words_of_two = 2 * (4 + 16) + 2 + 1
    for name, got, right in zip("abc", answers, (words_of_two, 16 * 7, 64 * 10)):
        assert got == right, f"({name}) is not {got}"


check(test_1, answers)

# %% [markdown]
# <details><summary>Hint</summary>
#
# An alphabet of $2^b$ letters holds $b$ bits a letter. An object is corners, letters, name.
#
# </details>

# %% tags=["solution"]
answers = [43, 112, 640]
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
# ### Exercise 3 (extend): one picture of labels
#
# Masks of different objects may overlap. Many programs want one array instead: for each pixel the number
# of its segment in the list, -1 where there is none. Where several claim a pixel, the surest gets it; of
# equally sure ones the first.


# %% tags=["exercise"]
def label_map(segments, width, height):
    return None  # int array [height, width]


# %% tags=["check"]
def test_3(label_map):
    left, right = np.zeros((2, 3, 6), bool)
    left[:, :4] = right[1:, 2:] = True
    whole = (0, 0, 6, 3)
    for scores in ((0.5, 0.9), (0.9, 0.5), (0.7, 0.7)):
        parts = [Segment("a", whole, left, scores[0]), Segment("b", whole, right, scores[1])]
        got = label_map(parts, 6, 3)
        assert got is not None and np.shape(got) == (3, 6), "an array of height × width"
        first = 1 if scores[1] > scores[0] else 0
        assert got[2][2] == first, f"scores {scores}: the surest gets the shared pixel"
        assert (got[0][0], got[2][5], got[0][5]) == (0, 1, -1), "own pixels, and -1 for none"
    assert (np.asarray(label_map([], 6, 3)) == -1).all(), "no segments: all -1"


check(test_3, label_map)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Paint from unsure to sure: who paints last, wins. Sort the numbers 0, 1, … by (score, -number).
#
# </details>


# %% tags=["solution"]
def label_map(segments, width, height):
    labels = np.full((height, width), -1)
    for number in sorted(range(len(segments)), key=lambda n: (segments[n].score, -n)):
        labels[segments[number].mask] = number
    return labels


check(test_3, label_map)

# %% [markdown]
# ## Summary
#
# - A mask is cut out along its box, resized to 64 × 64, and written as a 4 × 4 grid of letters.
# - The alphabet is learned: nearest row of a codebook forward, straight through it backward.
# - Letters are mostly local: one wrong word spoils one corner.
# - Loss alone does not show a dead codebook; perplexity does.
# - Threshold last, after resizing to the given picture.

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
# **2.** A box in the answer is ten pixels too far to the left. What happens to the mask?
#
# <details><summary>Answer</summary>
#
# It moves along, and stays the same shape: letters say what is *inside the box*. So IoU of masks is
# limited by the boxes, and a good mask cannot repair a bad one.
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
# - big_vision: `evaluators/proj/paligemma/transfers/segmentation.py`, the published reader of
#   `vae-oid.npz`.

# %% [markdown] tags=["navigation"]
# [← Detection](19_detection.ipynb) | [contents](00_overview.ipynb) | [Quantization →](22_quantization.ipynb)
