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
# # 20 · Mask codec: how do sixteen tokens draw any shape?
#
# *45 minutes* · part IV, Answering
#
# **What you will be able to do**
#
# - say why a shape costs sixteen tokens, and which sixteen;
# - quantise vectors with a pencil, and send a gradient *through* a choice;
# - train a mask codec and see from one number whether its codes are alive;
# - load the published codec, its encoder too.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("mask_codec")

# %% [markdown]
# ## Setup
#
# From earlier lessons: the tokens `<seg000>` … `<seg127>` ([06](06_tokenizer.ipynb)) and
# root-mean-square normalisation ([07](07_rms_norm.ipynb)). The `#| export` cells become
# [mask_codec.py](../paligemma/mask_codec.py).

# %%
#| export
"""Masks as sixteen codes: a VQ-VAE that writes any shape of 64 × 64 pixels, and draws it again."""

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from paligemma.support.arguments import as_tensor
from paligemma.support.files import open_tensors
from paligemma.support.replacing import replacing, settled
from paligemma.support.tensors import match_tensors, open_arrays

# %% tags=["setup"]
import tempfile
from importlib import resources

import matplotlib.pyplot as plt
from PIL import Image

from paligemma.support.course import HEAT, add_to_class, check, save_figure
from paligemma.support.drawing import COLOURS, CYCLE

ASSETS = resources.files("paligemma") / "assets"

# %% [markdown]
# ## The problem: a shape is long
#
# A box is four tokens. A shape inside it? It does not depend on where the box lies or how large it is,
# so we resize the inside of the box to 64 × 64. The opaque pixels of an emoji are an exact mask:


# %%
def square(name, degrees=0):
    """The shape of an emoji in its box, float32[64, 64] in [0, 1]."""
    sprite = Image.open(ASSETS / "emoji" / f"{name}.png").convert("RGBA").resize((128, 128))
    alpha = sprite.rotate(degrees, Image.Resampling.BICUBIC, expand=True).getchannel("A")
    opaque = alpha.point(lambda value: 255 * (value >= 128))
    inside = opaque.crop(opaque.getbbox()).resize((64, 64), Image.Resampling.BILINEAR)
    return np.asarray(inside, dtype=np.float32) / 255


# %%
cat = square("cat") > 0.5
runs = 1 + int((cat.ravel()[1:] != cat.ravel()[:-1]).sum())
print(f"{cat.size} pixels, or {runs} runs of equal pixels")
assert runs > 100

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(2.6, 2.8), layout="constrained")
ax.imshow(cat, cmap=HEAT, vmin=0, vmax=1)
for edge in range(0, 65, 16):
    ax.axhline(edge - 0.5, color=COLOURS["accent"], lw=2)
    ax.axvline(edge - 0.5, color=COLOURS["accent"], lw=2)
ax.set_axis_off()
ax.set_title("4,096 pixels, 16 cells")
save_figure(fig, "20_square.png")

# %% [markdown]
# More than a hundred numbers for one cat, even as runs. A language model writes token by token, at full
# price each ([lesson 18](18_generation.ipynb)). What can we get for **sixteen**?
#
# PaliGemma does what writing does: a fixed alphabet, `<seg000>` … `<seg127>`, and sixteen letters for
# every shape. Nobody designs the letters. They are *learned*, together with a small network that draws
# what they spell.

# %% [markdown]
# ## Vector quantisation, by hand
#
# An encoder will turn the square into a 4 × 4 grid of vectors. A vector is no token. So there is a
# table of vectors, the **codebook**, and each vector is replaced by the nearest row: its number is
# the *code*. This is **vector quantisation**. Four rows, one vector to write:

# %%
codebook = torch.tensor([[0.2, 0.3], [0.8, 0.2], [0.3, 0.9], [0.9, 0.8]])
z = torch.tensor([0.6, 0.4])
for number, row in enumerate(codebook):
    print(f"code {number}: distance² = {(z - row).square().sum():.2f}")

# %% [markdown]
# Code 1 it is. For many vectors at once: $|z - e|^2 = |z|^2 - 2\,z \cdot e + |e|^2$, where $|z|^2$ is the
# same for every code and can be left out.


# %%
def nearest(z):
    return (codebook.square().sum(1) - 2 * z @ codebook.T).argmin(-1)


torch.manual_seed(0)
cloud = torch.rand(400, 2)
assert nearest(z) == 1
assert torch.equal(nearest(cloud), torch.cdist(cloud, codebook).argmin(1))
print(torch.bincount(nearest(cloud)).tolist(), "points a code")

# %% [markdown]
# ## The gradient goes straight through
#
# Training needs to know: how should $z$ change to make the drawing better? But the number of the
# nearest row does not change when $z$ moves a little. The true gradient is zero or undefined, and
# PyTorch says so:

# %%
z = torch.tensor([[0.45, 0.28]], requires_grad=True)
wanted = torch.tensor([0.95, 0.75])
e = codebook[nearest(z)]
try:
    (e - wanted).square().sum().backward()
except RuntimeError as error:
    print(str(error)[:45], "…")

# %% [markdown]
# The trick is one line, the **straight-through** estimate. Forward, the value is $e$, exactly. Backward,
# the bracket counts as a constant, so the gradient at $e$ is handed to $z$ as if nothing had been chosen:

# %%
straight = z + (e - z).detach()
(straight - wanted).square().sum().backward()
print("value        ", [f"{v:.2f}" for v in straight[0].tolist()], "= code", int(nearest(z)))
print("gradient at z", [f"{v:.2f}" for v in z.grad[0].tolist()])
assert torch.allclose(straight, e) and torch.allclose(z.grad, 2 * (e - wanted))

# %% [markdown]
# Is a wrong gradient any good? It points from the *code* to what is wanted, and $z$ walks that way.

# %%
walk, point = [], torch.tensor([[0.45, 0.28]], requires_grad=True)
for _ in range(14):
    e = codebook[nearest(point)]
    loss = (point + (e - point).detach() - wanted).square().sum()
    walk.append((*point[0].tolist(), int(nearest(point)), loss.item()))
    (slope,) = torch.autograd.grad(loss, point)
    point.data -= 0.04 * slope

# %%
xs, ys, chosen, losses = zip(*walk)
print("codes ", chosen)
print("losses", [f"{v:.2f}" for v in losses])
assert losses[0] > 2 * losses[2] > 4 * losses[-1] and chosen[0] == 0 and chosen[-1] == 3

# %% tags=["hide-input"]
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.1), layout="constrained")
for ax in (left, right):
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
for number, colour in enumerate(CYCLE[:4]):
    left.scatter(*cloud[nearest(cloud) == number].T, s=7, color=colour, alpha=0.6)
    for ax in (left, right):
        ax.scatter(*codebook[number], s=190, marker="s", color=colour, edgecolor="white", zorder=3)
        ax.text(*codebook[number], number, color="white", ha="center", va="center", zorder=4)
right.plot(xs, ys, color=COLOURS["muted"], lw=1)
right.scatter(xs, ys, s=28, c=[CYCLE[c] for c in chosen], zorder=3)
right.scatter(*wanted, marker="x", s=70, color=COLOURS["bad"], zorder=5)
left.set_title("400 vectors, four codes")
right.set_title("z walks; its colour is the code")
save_figure(fig, "20_straight")

# %% [markdown]
# For some steps the loss stays the same; then $z$ crosses a border, and a better code is chosen.
#
# Still missing: who moves the codebook? The drawing's loss does not (its gradient went past it). A
# second loss pulls each chosen row to the vectors that chose it, and, more gently, the vectors to
# their row:
#
# | loss | encoder | codebook | decoder |
# |---|---|---|---|
# | drawing against truth | moves | – | moves |
# | $|\,e - \mathrm{sg}(z)\,|^2$ | – | moves | – |
# | $\tfrac14\,|\,z - \mathrm{sg}(e)\,|^2$ | moves | – | – |
#
# sg is *stop gradient*, `detach`; the sum of the last two rows is called `apart` below.

# %% [markdown]
# ## The module: encoder, codebook, decoder
#
# Two parts first: a block in which neighbouring cells talk, and the codebook.


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


# %%
#| export
class Codebook(nn.Module):
    """The vectors that codes stand for: `codes` rows of `width` numbers."""

    def __init__(self, codes: int, width: int):
        super().__init__()
        self._embedding = nn.Parameter(torch.randn(codes, width))

    def nearest(self, z: torch.Tensor) -> torch.Tensor:
        """Number of the nearest row: `float32[..., width]` → `int64[...]`."""
        e = self._embedding
        return (e.square().sum(1) - 2 * z @ e.T).argmin(-1)  # |z|² is the same for all

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """The rows of codes: `int64[...]` → `float32[..., width]`."""
        return F.embedding(codes, self._embedding)


# %% [markdown]
# The encoder halves the side four times, 64 → 32 → 16 → 8 → 4. The decoder is the published one, layer by
# layer: a 1 × 1 convolution, two blocks, and four transposed convolutions that double the side again.


# %%
#| export
def make_encoder(widths: Sequence[int], code_width: int, blocks: int = 1) -> nn.Sequential:
    """Strided convolutions of these widths, residual blocks, a 1 × 1 to the codebook's width."""
    layers: list[nn.Module] = []
    for before, after in pairwise((1, *widths)):
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    layers += [ResidualBlock(widths[-1]) for _ in range(blocks)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], code_width, 1))


# %%
#| export
class MaskCodec(nn.Module):
    """Masks to codes and back: 64 × 64 pixels ↔ sixteen codes, four rows of four.

    Args:
        codes, code_width: rows of the codebook, and numbers in each.
        width: channels of the decoder's first layers, a multiple of 8.

    Source: Ning et al., *All in Tokens*, 2023; parameters have the names of `vae-oid.npz`.
    """

    def __init__(self, codes: int = 128, code_width: int = 512, width: int = 128):
        super().__init__()
        self.codes = codes
        self._vq_vae = Codebook(codes, code_width)
        layers = [nn.Conv2d(code_width, width, 1), nn.ReLU()]
        layers += [ResidualBlock(width), ResidualBlock(width)]
        for before, after in pairwise((width, width, width // 2, width // 4, width // 8)):
            layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(width // 8, 1, 1))
        widths = (width // 8, width // 4, width // 2, width)  # the decoder's, mirrored
        self.encoder: nn.Module | None = make_encoder(widths, code_width)
        self.fixed_length = True  # of the encoder's vectors; the published: False


# %% [markdown]
# Masks to vectors. Our own encoder gives them a fixed length ([lesson 07](07_rms_norm.ipynb), without a
# weight). Otherwise they may grow and grow, and the codebook runs after them.


# %%
#| export
@add_to_class(MaskCodec)
def encode_vectors(self, masks: torch.Tensor) -> torch.Tensor:
    """What the encoder says: `float32[B, 64, 64]` in [0, 1] → `float32[B, 16, code_width]`."""
    if self.encoder is None:
        raise ValueError("this codec has no encoder: it only decodes; load the whole file")
    z = self.encoder(2 * (masks[:, None] - 0.5))  # [B, code_width, 4, 4]
    z = z.flatten(2).transpose(1, 2)  # [B, 16, code_width]
    return F.rms_norm(z, z.shape[2:]) if self.fixed_length else z


# %% [markdown]
# Vectors to pixels; and both for training, straight through the choice:


# %%
#| export
@add_to_class(MaskCodec)
def decode_vectors(self, vectors: torch.Tensor) -> torch.Tensor:
    """What the decoder draws: `float32[B, 16, code_width]` → `float32[B, 64, 64]`."""
    grid = vectors.transpose(1, 2).unflatten(2, (GRID, GRID))  # [B, code_width, 4, 4]
    return self.decoder(grid)[:, 0]


@add_to_class(MaskCodec)
def forward(self, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One pass for training: the drawing, its codes, how far codebook and encoder are apart."""
    z = self.encode_vectors(masks)
    codes = self._vq_vae.nearest(z)  # [B, 16]
    e = self._vq_vae(codes)
    apart = F.mse_loss(e, z.detach()) + 0.25 * F.mse_loss(z, e.detach())
    return self.decode_vectors(z + (e - z).detach()), codes, apart


# %%
torch.manual_seed(0)
net = MaskCodec(codes=32, code_width=8, width=32)
some = torch.tensor(np.stack([square("cat"), square("dog"), square("tree")]))
drawn, codes, apart = net(some)
print("codes", list(codes.shape), "drawing", list(drawn.shape))

# %%
drawn.mean().backward()
assert net._vq_vae._embedding.grad is None and net.encoder[0].weight.grad.abs().max() > 0

# %% [markdown]
# That is the table's first row: a gradient arrives at the encoder, and none at the codebook.
#
# ## Train one
#
# Real masks: 40 kinds of emoji, each in five turns and mirrored. Eight kinds are held out.

# %%
KINDS = sorted(path.stem for path in (ASSETS / "emoji").glob("*.png"))
HELD = KINDS[3::6]


# %%
def squares(kinds, turns):
    shapes = np.stack([square(kind, turn) for kind in kinds for turn in turns])
    return torch.tensor(np.concatenate([shapes, shapes[:, :, ::-1]]))


# %%
train_masks = squares([kind for kind in KINDS if kind not in HELD], (-20, -10, 0, 10, 20))
held_masks = squares(HELD, (0, 15))
assert (len(KINDS) - len(HELD), len(HELD), len(train_masks)) == (40, 8, 400)


# %%
def training(net, steps=240):
    """Train a codec; hand out the masks, the codes and the error of the drawing of each step."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
    for _ in range(steps):
        some = train_masks[torch.randint(len(train_masks), (32,))]
        drawn, codes, apart = net(some)
        loss = F.mse_loss(drawn, 2 * some - 1)
        optimizer.zero_grad()
        (loss + 0.25 * apart).backward()
        optimizer.step()
        yield some, codes, loss.item()


# %% [markdown]
# How good is a drawing? As with boxes: what both share, divided by what they cover together.


# %%
#| export
def mask_iou(a, b) -> np.ndarray:
    """Intersection over union of masks, bool[..., height, width], arrays or tensors.

    Returns:
        float64[...], 0 (apart, or both empty) to 1 (equal).
    """
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    shared, together = (a & b).sum((-1, -2)), (a | b).sum((-1, -2))
    return shared / np.maximum(together, 1)


# %% tags=["nbval-ignore-output"]
torch.manual_seed(1)
net = MaskCodec(codes=64, code_width=16, width=32)
steps = [(codes, loss) for _, codes, loss in training(net)]

# %% tags=["nbval-ignore-output"]
with torch.no_grad():
    drawn, codes, _ = net(held_masks)
fits = mask_iou(drawn > 0, held_masks > 0.5)
print(f"IoU of kinds that it never saw: {fits.mean():.2f}")
assert fits.mean() > 0.75 and fits[2 * HELD.index("elephant")] < fits.mean()


# %% tags=["hide-input", "nbval-ignore-output"]
def pairs(ax, truth, drawn, notes=()):
    """True masks above, drawn ones below, a note over each."""
    rows = [np.concatenate([np.pad(np.asarray(m), 3) for m in part], 1) for part in (truth, drawn)]
    ax.imshow(np.concatenate(rows), cmap=HEAT, vmin=0, vmax=1)
    ax.set_axis_off()
    for column, note in enumerate(notes):
        ax.text(70 * column + 35, -4, note, ha="center")


fig, (left, right) = plt.subplots(
    1, 2, figsize=(9, 2.6), layout="constrained", width_ratios=(1, 1.8)
)
left.plot([loss for _, loss in steps], color=COLOURS["vision"])
left.set(xlabel="step", ylabel="error of the drawing", ylim=(0, None))
notes = [f"{kind}\nIoU {fit:.2f}" for kind, fit in zip(HELD, fits[::2])]
pairs(right, held_masks[:12:2], (drawn[:12:2] + 1) / 2, notes[:6])
save_figure(fig, "20_training.png")

# %% [markdown]
# It never saw these kinds, and still draws something like them. Corners are soft; the elephant has lost
# its legs. A good beginning for a few seconds of training, and yet something is badly wrong with this
# codec. The section on the bug shows what.

# %% [markdown]
# ## Two methods for everybody else
#
# One writes masks, one draws codes, and each checks what it gets: codes may be from an untrusted text.


# %%
#| export
@add_to_class(MaskCodec)
@torch.no_grad()
def encode(self, masks: torch.Tensor) -> torch.Tensor:
    """Masks as codes: `float32[B, 64, 64]` in [0, 1] (or bool) → `int64[B, 16]`, row by row.

    Raises:
        ValueError: another shape, values outside 0 to 1, or a codec without an encoder.
    """
    masks = as_tensor(masks, "masks")
    if masks.ndim != 3 or masks.shape[1:] != (SIDE, SIDE):
        raise ValueError(f"masks are {list(masks.shape)}; expected [B, 64, 64]: crop_masks")
    masks = masks.to(self._vq_vae._embedding)
    if not ((masks >= 0) & (masks <= 1)).all():
        raise ValueError("masks have values outside 0 to 1; expected 1 inside, 0 outside")
    return self._vq_vae.nearest(self.encode_vectors(masks))


# %%
#| export
@add_to_class(MaskCodec)
@torch.no_grad()
def decode(self, codes: torch.Tensor) -> torch.Tensor:
    """Draw codes: `int64[B, 16]` → `float32[B, 64, 64]` in [-1, 1], inside the object above 0.

    Raises:
        ValueError: another shape or type, or a code that is not in the codebook.
    """
    codes = as_tensor(codes, "codes")
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
# **encoder** that wrote the masks for PaliGemma's training. It differs from ours in its widths,
# which are seen from the tensors, two blocks in its encoder, and vectors of any length. `match_tensors`
# ([tensors.py](../paligemma/support/tensors.py)) sees to it that no tensor is missing or damaged.


# %%
#| export
@add_to_class(MaskCodec)
@classmethod
def from_state(
    cls, state: Mapping[str, torch.Tensor], source: str | os.PathLike, fixed_length: bool
) -> "MaskCodec":
    """Build the codec whose widths a file's tensors show, and load them, strictly."""
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
        codec = cls(codes, code_width, width)
        codec.encoder = make_encoder(widths, code_width, blocks) if widths else None
    codec.fixed_length = fixed_length
    match_tensors(source, state, codec.state_dict(), finite=True)
    codec.load_state_dict({n: t.float() for n, t in state.items()}, assign=True)
    return codec.eval()


# %% [markdown]
# Two kinds of file: the published one, and our own, which holds the same names as safetensors
# ([lesson 16](16_checkpoint.ipynb)).


# %%
#| export
@add_to_class(MaskCodec)
@classmethod
def from_npz(cls, path: str | os.PathLike) -> "MaskCodec":
    """Read the published `vae-oid.npz`; without an encoder in it the codec only decodes.

    Raises:
        ValueError: no such file, not an npz, pickled objects, and what `from_state` refuses.
    """
    parts = ("encoder.", "decoder.", "_vq_vae._embedding")
    return cls.from_state(open_arrays(path, parts), path, fixed_length=False)


# %%
#| export
@add_to_class(MaskCodec)
@classmethod
def from_pretrained(cls, path: str | os.PathLike) -> "MaskCodec":
    """Read what `save_pretrained` wrote: the file, or the directory that holds it.

    Raises:
        ValueError: no such file, truncated, and what `from_state` refuses.
    """
    path = codec_file(path)
    settled(path.parent)
    state = open_tensors([path])
    with safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
    return cls.from_state(state, path, fixed_length=about.get("fixed_length", "true") == "true")


# %%
#| export
@add_to_class(MaskCodec)
def save_pretrained(self, path: str | os.PathLike, dtype: torch.dtype = torch.float16) -> None:
    """Write `mask_codec.safetensors`, whole or not at all, into a directory, made if absent."""
    path = codec_file(path)
    state = {n: t.to("cpu", dtype).contiguous() for n, t in self.state_dict().items()}
    about = {"format": "pt", "fixed_length": str(self.fixed_length).lower()}
    with replacing(path.parent) as draft:
        save_file(state, draft / path.name, metadata=about)


def codec_file(path: str | os.PathLike) -> Path:
    """The file itself, or the one of that name in a directory."""
    path = Path(path).expanduser()
    return path if path.suffix == ".safetensors" else path / "mask_codec.safetensors"


# %% [markdown]
# ## Against the reference
#
# The published weights are not part of this course. But their names and shapes are public, so we write
# a file like theirs with random numbers, load it, and compare with the same layers as plain calls of
# PyTorch, both ways.

# %%
torch.manual_seed(0)
like_theirs = MaskCodec()
like_theirs.encoder = make_encoder((24, 40, 56, 72), 512, blocks=2)
weights = {n: 0.05 * torch.randn(t.shape) for n, t in like_theirs.state_dict().items()}
with tempfile.TemporaryDirectory() as folder:
    np.savez(f"{folder}/vae-oid.npz", **{n: t.numpy() for n, t in weights.items()})
    published = MaskCodec.from_npz(f"{folder}/vae-oid.npz")

# %%
sizes = {n: sum(t.numel() for k, t in weights.items() if n in k) for n in ("decoder", "_vq_vae")}
print("parameters:", sizes)
assert sizes == {"decoder": 1_123_457, "_vq_vae": 65_536}


# %%
def layer(function, name, x, **how):
    return function(x, weights[name + ".weight"], weights[name + ".bias"], **how)


def block(name, x):
    y = layer(F.conv2d, f"{name}.net.0", x, padding=1).relu()
    y = layer(F.conv2d, f"{name}.net.2", y, padding=1).relu()
    return x + layer(F.conv2d, f"{name}.net.4", y)


# %%
some_codes = torch.randint(128, (5, 16))
grid = weights["_vq_vae._embedding"][some_codes].view(5, 4, 4, 512).permute(0, 3, 1, 2)
x = block("decoder.3", block("decoder.2", layer(F.conv2d, "decoder.0", grid).relu()))
for up in (4, 6, 8, 10):
    x = layer(F.conv_transpose2d, f"decoder.{up}", x, stride=2, padding=1).relu()
theirs = layer(F.conv2d, "decoder.12", x)[:, 0].clamp(-1, 1)
gap = (published.decode(some_codes) - theirs).abs().max().item()
print(f"largest difference of five drawings: {gap:.0e}")
assert gap <= 1e-5

# %%
x = 2 * (held_masks[:, None] - 0.5)
for down in (0, 2, 4, 6):
    x = layer(F.conv2d, f"encoder.{down}", x, stride=2, padding=1).relu()
x = layer(F.conv2d, "encoder.10", block("encoder.9", block("encoder.8", x)))
away = torch.cdist(x.flatten(2).transpose(1, 2), weights["_vq_vae._embedding"][None])
same = (published.encode(held_masks) == away.argmin(2)).float().mean().item()
print(f"codes of {len(held_masks)} masks: {same:.0%} equal")
assert same == 1

# %% [markdown]
# ## See it: shapes nobody trained on
#
# The codec that ships with the course: the same class, 128 codes, trained by `tools/train_codec.py` on
# masks of composed scenes and on other emoji. The picture `held_out.png` holds 48 shapes that were
# kept away from it.

# %%
codec = MaskCodec.from_pretrained(ASSETS / "tiny")
sheet = np.asarray(Image.open(ASSETS / "mask_codec" / "held_out.png")) / 255
tiles = sheet.reshape(6, 64, 8, 64).swapaxes(1, 2).reshape(48, 64, 64)
held = torch.tensor(tiles, dtype=torch.float32)  # [48, 64, 64]

# %%
codes = codec.encode(held)
drawn = codec.decode(codes)
ious = mask_iou(drawn > 0, held > 0.5)
print(f"IoU of {len(held)} held-out shapes: mean {ious.mean():.2f}, median {np.median(ious):.2f}")

# %% tags=["hide-input"]
fig, axes = plt.subplots(3, 1, figsize=(8, 5.4), layout="constrained")
for ax, start in zip(axes, (0, 10, 20)):
    row = slice(start, start + 10)
    pairs(ax, held[row], (drawn[row] + 1) / 2, notes=[f"{value:.2f}" for value in ious[row]])
save_figure(fig, "20_gallery.png")

# %% [markdown]
# Over each pair stands its IoU. What to notice: compact things are nearly perfect. What suffers is thin:
# legs, stalks, gaps. We can measure that: how much of a shape lies within two pixels of its edge?

# %%
inner = 1 - F.max_pool2d(1 - (held > 0.5).float()[:, None], 5, stride=1, padding=2)[:, 0]
thin = 1 - inner.sum((1, 2)) / (held > 0.5).sum((1, 2))
related = np.corrcoef(thin, ious)[0, 1]
print(f"correlation of thinness and IoU: {related:.2f}")
assert related < -0.85

# %% [markdown]
# A cell has seven bits, and a thin line needs more of them.
#
# What do the codes mean? For each, the mean of all cells for which it was chosen, in these shapes and in
# those of the lesson's own training:

# %%
seen = torch.cat([held, train_masks])
cells = seen.unflatten(2, (4, 16)).unflatten(1, (4, 16)).permute(0, 1, 3, 2, 4).flatten(0, 2)
chosen = codec.encode(seen).flatten()  # one code for each cell of 16 × 16 pixels
letters = torch.stack([cells[chosen == code].mean(0) for code in range(codec.codes)])

# %%
filled = letters.mean((1, 2))
order = np.corrcoef(filled, np.arange(codec.codes))[0, 1]
print(f"number and filling go together: {order:.2f}; plainly full: {int((filled > 0.98).sum())}")
assert order > 0.9 and (filled > 0.98).sum() >= 5

# %% tags=["hide-input"]
tiles = F.pad(letters, (1, 1, 1, 1), value=0.35).unflatten(0, (8, 16))
mosaic = tiles.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
fig, ax = plt.subplots(figsize=(8, 4.1), layout="constrained")
ax.imshow(mosaic, cmap=HEAT, vmin=0, vmax=1)
ax.set_axis_off()
save_figure(fig, "20_alphabet.png")

# %% [markdown]
# Numbered from empty to full; between them, edges at every height and slant. Several codes are plainly
# full: of their own cell they say the same.
#
# Does a code concern only its own cell? Change one code of every held-out shape, and see where the
# drawing changes:

# %%
torch.manual_seed(0)
changed = codes.clone()
changed[:, 5] = torch.randint(codec.codes, (len(codes),))  # second row, second column
other = codec.decode(changed)
moved = (other - drawn).abs().mean(0)  # [64, 64]

# %%
share = (moved[16:32, 16:32].sum() / moved.sum()).item()
near = (moved[8:40, 8:40].sum() / moved.sum()).item()
print(f"of all change: {share:.2f} in the cell, {near:.2f} in it or within eight pixels of it")
assert share > 5 / 16 and near > 0.6

# %%
lost = ious.mean() - mask_iou(other > 0, held > 0.5).mean()
print(f"IoU lost by one wrong code: {lost:.3f}")
assert lost < 0.05

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(3.6, 3.1), layout="constrained")
drawing = ax.imshow(moved, cmap=HEAT)
for k in (16, 32, 48):
    ax.axhline(k - 0.5, color=COLOURS["muted"], lw=0.6)
    ax.axvline(k - 0.5, color=COLOURS["muted"], lw=0.6)
ax.set_axis_off()
fig.colorbar(drawing, ax=ax, shrink=0.8, label="mean change")
save_figure(fig, "20_one_letter")

# %% [markdown]
# The cell is a sixteenth of the picture and gets more than five times its share; with eight pixels
# around it, over six tenths. So neighbours have a say too. Good news for a language model: **one wrong
# token spoils one corner, not the shape**.
#
# ## At full size
#
# Drawing beside writing, in bytes read: the codec once, or the language model of the 3B sixteen times
# in bfloat16 ([lesson 18](18_generation.ipynb)).

# %%
drawing, writing = 4 * sum(sizes.values()), 16 * 2 * 2_508_662_784
print(f"draw a mask: {drawing / 1e6:.1f} MB; write its sixteen tokens: {writing / 1e9:.0f} GB")
assert writing > 10_000 * drawing

# %% [markdown]
# Drawing is free, tokens cost.
#
# ## A bug people really make: a dead codebook
#
# Back to the codec that we trained. Its loss fell, nothing complained. How often is each of its 64 codes
# chosen? One number tells: **perplexity**, e to the entropy of these shares. All 64 equally often gives
# 64; only one gives 1.


# %%
def perplexity(codes, size=64):
    """How many codes are really in use: e to the entropy of their shares."""
    shares = torch.bincount(codes.flatten(), minlength=size) / codes.numel()
    return torch.exp(-torch.special.xlogy(shares, shares).sum()).item()


# %% tags=["nbval-ignore-output"]
in_use = [perplexity(codes) for codes, _ in steps]
print(f"codes in use at the last step: {in_use[-1]:.1f} of 64")
assert in_use[-1] < 10

# %% [markdown]
# A handful of codes does all the work. Why: a row that is far from all vectors is never chosen, so
# nothing ever pulls it nearer. The rich get richer.
#
# The cure: from time to time, move each row that nobody chose onto a vector that the encoder says *now*.


# %%
#| export
@torch.no_grad()
def restart_dead_codes(codec: MaskCodec, masks: torch.Tensor, counts: torch.Tensor) -> int:
    """Move codes that nobody chose lately on top of what the encoder says now of some masks.

    Args:
        masks: `float32[B, 64, 64]`.
        counts: `[codes]`, how often each code was chosen.

    Returns:
        How many were dead.
    """
    dead = (counts == 0).nonzero()[:, 0]
    z = codec.encode_vectors(masks).flatten(0, 1)  # [16 B, code_width]
    codec._vq_vae._embedding[dead] = z[torch.randint(len(z), (len(dead),), device=z.device)]
    return len(dead)


# %% tags=["nbval-ignore-output"]
torch.manual_seed(1)
alive, counts, alive_steps = MaskCodec(codes=64, code_width=16, width=32), torch.zeros(64), []
for step, (some, codes_now, loss) in enumerate(training(alive)):
    alive_steps.append((codes_now, loss))
    counts += torch.bincount(codes_now.flatten(), minlength=64)
    if step % 20 == 0 and step < 190:  # later ones would have no time to settle
        restart_dead_codes(alive, some, counts)
        counts.zero_()

# %% tags=["nbval-ignore-output"]
with torch.no_grad():
    alive_drawn, alive_codes, _ = alive(held_masks)
    lazy_codes = net(held_masks)[1]
alive_fits = mask_iou(alive_drawn > 0, held_masks > 0.5)
for name, own, fit in (("as before", lazy_codes, fits), ("restarted", alive_codes, alive_fits)):
    print(f"{name}: {perplexity(own):4.1f} codes in use, IoU of held-out kinds {fit.mean():.2f}")
assert perplexity(alive_codes) > 4 * perplexity(lazy_codes) and alive_fits.mean() > fits.mean()

# %% tags=["nbval-ignore-output"]
first = [np.mean([loss for _, loss in run[:120]]) for run in (steps, alive_steps)]
print("mean loss of the first 120 steps:", [f"{value:.2f}" for value in first])
assert abs(first[0] / first[1] - 1) < 0.15

# %% tags=["hide-input", "nbval-ignore-output"]
fig, axes = plt.subplots(1, 3, figsize=(9, 2.7), layout="constrained")
for run, own, colour, label in (
    (alive_steps, alive_codes, "good", "restarted"),
    (steps, lazy_codes, "bad", "as before"),
):
    axes[0].plot([loss for _, loss in run], color=COLOURS[colour], label=label)
    axes[1].plot([perplexity(codes_now) for codes_now, _ in run], color=COLOURS[colour])
    used = torch.bincount(own.flatten(), minlength=64).sort(descending=True).values
    axes[2].plot(used / used.sum(), color=COLOURS[colour])
axes[0].set(title="error of the drawing", xlabel="step", ylim=(0, 1))
axes[1].set(title="perplexity, of 64", xlabel="step", ylim=(0, 64))
axes[2].set(title="share of each code", xlabel="codes, sorted")
axes[0].legend()
save_figure(fig, "20_dead")

# %% [markdown]
# Same start, same number of steps. For half of the run the losses differ by less than 15%: the loss does
# not show the illness, perplexity does.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): count before you run
#
# (a) How many bits does an 8 × 8 grid of codes from a codebook of 1,024 hold? (b) With a fifth strided
# layer in the encoder, and a fifth transposed one in the decoder: how many codes does a mask of 64 × 64
# get? (c) Code number 9 of a mask, counted from 0, is changed: in which row of pixels, from 0, does its
# cell begin?

# %% tags=["exercise"]
answers = [None, None, None]  # your answer


# %% tags=["check"]
def test_1(answers):
    numbers = isinstance(answers, list | tuple) and [type(a) for a in answers] == [int] * 3
    assert numbers, "a list of three whole numbers, please"
    slips = {
        ("a", 64): "(a) counts the codes, not their bits",
        ("a", 10): "(a) counts the bits of one code",
        ("a", 112): "(a) asks for a larger grid and a larger codebook than ours",
        ("a", 448): "(a) takes a codebook of 128",
        ("a", 65536): "(a) counts the codes times the rows; bits are asked for",
        ("b", 16): "(b) is what four layers give",
        ("b", 8): "(b) halves the number of codes; a layer halves the side",
        ("c", 16): "(c) names the column of pixels, or counts codes column by column",
        ("c", 9): "(c) names the code, not a row of pixels",
        ("c", 2): "(c) names the row of cells; a cell is 16 pixels high",
    }
    side = 64 // 2**5
    for name, got, right in zip("abc", answers, (64 * 10, side * side, 16 * (9 // 4))):
        assert got == right, slips.get((name, got), f"({name}) is not {got}")


check(test_1, answers)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A codebook of $2^b$ rows holds $b$ bits a code. Each strided layer halves the side. Codes are counted
# row by row, four in each.
#
# </details>

# %% tags=["solution"]
# 10 bits for each of 64 codes; 64 halved five times is 2; number 9 is in the third row of cells.
answers = [640, 4, 32]
check(test_1, answers)

# %% [markdown]
# ### Exercise 2 (write): quantise, straight through
#
# Return the nearest row of `table` for each vector of `z`, such that the gradient of the result arrives at
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
    assert isinstance(out, torch.Tensor), "return a tensor"
    assert out.shape == z.shape, f"the result has shape {list(out.shape)}, z has {list(z.shape)}"
    rows = table.detach()[torch.cdist(z.detach(), table.detach()[None]).argmin(2)]
    assert torch.allclose(out, rows, atol=1e-6), "the values are not those of the nearest rows"
    assert out.requires_grad, "no gradient can leave the result"
    wanted = torch.randn(2, 4, 5)
    (out * wanted).sum().backward()
    assert z.grad is not None, "no gradient arrives at z"
    assert torch.allclose(z.grad, wanted), "the gradient at z is not the one at the result"
    assert table.grad is None or table.grad.abs().max() == 0, "table gets a gradient"


check(test_2, quantise)

# %% [markdown]
# <details><summary>Hint</summary>
#
# First the choice (`torch.cdist`, or the formula of this lesson), then the trick: what must be a
# constant for backward, so that only `z` is left?
#
# </details>


# %% tags=["solution"]
# Forward, z cancels and e is left; backward, the bracket is a constant, and z is left.
def quantise(z, table):
    e = table[torch.cdist(z, table.expand(len(z), -1, -1)).argmin(-1)]
    return z + (e - z).detach()


check(test_2, quantise)

# %% [markdown]
# ### Exercise 3 (extend): write without an encoder
#
# Some copies of the file hold the decoder alone. It can still write: **try, and look**. Return `codes`
# with the code number `at` replaced by the one of all `codec.codes` whose drawing overlaps the mask best
# (`mask_iou` of what is above 0); all other codes stay.


# %% tags=["exercise"]
def try_codes(codec, codes, mask, at):
    return None  # int64[16]


# %% tags=["check"]
def test_3(try_codes):
    for shape, at in ((0, 5), (3, 0), (7, 15)):
        mask, before = held[shape] > 0.5, codec.encode(held[shape : shape + 1])[0]
        given = before.clone()
        after = try_codes(codec, given, mask, at)
        assert isinstance(after, torch.Tensor) and after.shape == (16,), (
            "return a tensor of 16 codes"
        )
        assert torch.equal(before, given), "do not change the codes that were given"
        others = torch.arange(16) != at
        assert torch.equal(after[others], before[others]), "only the code number `at` may change"
        trials = before.repeat(codec.codes, 1)
        trials[:, at] = torch.arange(codec.codes)
        got = mask_iou(codec.decode(after[None])[0] > 0, mask)
        missed = (mask_iou(codec.decode(trials) > 0, mask) > got).sum()
        assert missed == 0, f"shape {shape}, code number {at}: {missed} other codes overlap more"


check(test_3, try_codes)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Repeat the codes once for every code of the codebook, write `torch.arange(codec.codes)` into the column
# `at`, decode all in one batch.
#
# </details>


# %% tags=["solution"]
# All trials in one batch: the decoder is so small that trying everything is cheap.
def try_codes(codec, codes, mask, at):
    trials = codes.repeat(codec.codes, 1)  # [rows of the codebook, 16]
    trials[:, at] = torch.arange(codec.codes)
    overlaps = mask_iou(codec.decode(trials) > 0, mask)
    return trials[overlaps.argmax()]


check(test_3, try_codes)

# %% [markdown]
# ## Summary
#
# - A mask is resized to 64 × 64 and written as a 4 × 4 grid of codes.
# - The codebook is learned: nearest row forward, straight through it backward.
# - Codes are mostly local: one wrong token spoils one corner.
# - Loss alone does not show a dead codebook; perplexity does.
# - The published file holds encoder, codebook and decoder; widths are read from it.

# %% [markdown]
# ## Quiz
#
# **1.** Why does the language model not write the 4 × 4 *vectors*, which hold more than their codes?
#
# <details><summary>Answer</summary>
#
# It writes tokens: a softmax over a vocabulary. Numbers would need another output layer and another loss,
# and an average of two possible shapes is often no shape at all.
#
# </details>

# %% [markdown]
# **2.** Why does our encoder bring its vectors to a fixed length before it looks for the nearest row?
#
# <details><summary>Answer</summary>
#
# Nothing else bounds them. Longer vectors are further apart, which makes the decoder's work easier, so
# they would grow, and the codebook follows with a delay: the nearest row is far away all the time.
#
# </details>

# %% [markdown]
# **3.** All 128 codes are equally often in use. Is the codec then as good as it can be?
#
# <details><summary>Answer</summary>
#
# No. Perplexity only says that no row is wasted. A random codebook can be in even use, too; the error of
# the drawing says how good the codes are.
#
# </details>

# %% [markdown]
# ## References
#
# - Aaron van den Oord et al., *Neural Discrete Representation Learning*, 2017 (VQ-VAE, straight through).
# - Jia Ning et al., *All in Tokens: Unifying Output Space of Visual Tasks via Soft Token*, 2023.
# - Lucas Beyer et al., *PaliGemma: A versatile 3B VLM for transfer*, 2024 (its 128 codes).
# - big_vision: `pp/proj/paligemma/segmentation.py` (the encoder) and
#   `evaluators/proj/paligemma/transfers/segmentation.py` (the decoder), the published readers of
#   `vae-oid.npz`.

# %% [markdown] tags=["navigation"]
# [← Detection](19_detection.ipynb) | [contents](00_overview.ipynb) | [Segmentation →](21_segmentation.ipynb)
