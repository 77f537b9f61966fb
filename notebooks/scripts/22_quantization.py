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
# [← Segmentation](21_segmentation.ipynb) | [contents](00_overview.ipynb) | [Inference →](24_inference.ipynb)

# %% [markdown]
# # 22 · Quantization: how few bits can a weight have?
#
# *45 minutes* · part IV, Answering
#
# **What you will be able to do**
#
# - round a matrix to 8 or 4 bits with a pencil, and say what each rounding can cost;
# - choose where a scale belongs: one for the matrix, for a row, for 32 neighbours;
# - pack two weights into a byte and multiply with them without unpacking;
# - compute from bytes alone how fast a model can write.

# %% tags=["map"]
from paligemma.plotting import model_map

model_map("gemma", "gemma2")

# %% [markdown]
# ## Setup
#
# From earlier lessons: the decoder ([12](12_gemma.ipynb), [13](13_gemma2.ipynb)), the model
# ([15](15_model.ipynb)), checkpoints ([16](16_checkpoint.ipynb)) and the token loop
# ([18](18_generation.ipynb)). The cells that begin with `#| export` become
# [quantization.py](../paligemma/quantization.py).

# %%
#| export
"""Weights in eight or four bits: a smaller model that decodes faster, because it reads less."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from paligemma.checkpoint import (
    CheckpointError,
    config_dict,
    empty_model,
    internal_name,
    load_model,
    published_name,
    read_config,
    read_tensors,
    replacing,
    weight_files,
)
from paligemma.gemma import GemmaModel
from paligemma.gemma2 import Gemma2Model, soft_cap
from paligemma.model import PaliGemma

# %% tags=["setup"]
import copy
import tempfile
import time
from importlib import resources
from itertools import zip_longest

import matplotlib.pyplot as plt

from paligemma.generation import generate
from paligemma.model import PaliGemmaConfig
from paligemma.plotting import COLOURS, check, sample_picture, save_figure, show_heatmap
from paligemma.processor import Processor

TINY = resources.files("paligemma") / "assets" / "tiny"
_ = torch.manual_seed(21), torch.set_grad_enabled(False)  # we only answer; nothing is trained

# %% [markdown]
# ## The problem: one token, all weights
#
# To write one token, a model multiplies one row of numbers with **every** weight of its language part.
# Each weight travels from memory to the processor, is used in one multiplication, and is dropped. The
# processor waits for memory, not the other way round ([lesson 18](18_generation.ipynb)'s roofline).
#
# So the time of a token is the *bytes* of the weights divided by the memory's speed. Where are the
# bytes of PaliGemma 3B?

# %%
with torch.device("meta"):
    big = PaliGemma(PaliGemmaConfig())
parts = {"attention": 0, "feed-forward": 0, "head": big.language_model.embed_tokens.weight.numel()}
for name, weight in big.language_model.named_parameters():
    if "_proj" in name:
        parts["attention" if "self_attn" in name else "feed-forward"] += weight.numel()
total = sum(parts.values())
for name, count in parts.items():
    print(f"{name:13} {count / 1e6:6.0f} million weights, {100 * count / total:2.0f} %")
print(f"read for each token, 16 bits each: {2 * total / 1e9:.2f} GB")

# %% [markdown]
# A memory that delivers 40 GB a second therefore allows eight tokens a second, whatever the processor.
# With 8 bits a weight it is sixteen; with 4 bits, thirty-two. The arithmetic stays the same. (The
# *embedding* looks up a few rows, but the *head*, the same matrix, is read whole: a fifth of all bytes.)
#
# So: how few bits can a weight have before the answers change?

# %% [markdown]
# ## By hand
#
# Four rows, four columns. We allow the whole numbers −7 … 7, which fit in four bits. A row's largest
# number has to become 7, so its **scale** is `largest / 7`. Divide, round: these are the **codes**.

# %%
W = torch.tensor(
    [[1.4, -0.7, 0.5, 0.0], [0.2, 0.9, -2.1, 0.4], [-7.0, 3.0, 1.0, 0.6], [0.05, -0.03, 0.07, 0.02]]
)
scale = W.abs().amax(1) / 7
codes = (W / scale[:, None]).round()
for row in range(4):
    print(f"scale {scale[row]:.2f}  codes", codes[row].int().tolist())

# %% [markdown]
# Check the first row: 1.4 / 7 = 0.2; then 0.5 / 0.2 = 2.5, which is rounded to the *even* neighbour 2,
# as PyTorch rounds all halves. Back: codes times scale.

# %%
back = codes * scale[:, None]
fig, axes = plt.subplots(1, 3, figsize=(8.4, 2.6), layout="constrained")
show_heatmap(W, "weights", annotate=".2f", centre=0, ax=axes[0])
show_heatmap(codes, "codes (4 bits each)", annotate=".0f", centre=0, ax=axes[1])
show_heatmap(back - W, "error", annotate=".2f", centre=0, ax=axes[2])
fig

# %% [markdown]
# What to notice: each error is at most **half a step** of its own row. The third row has a large step,
# because of its −7: the 0.6 beside it became 1. The last row has small numbers and a small step; with one
# scale for the whole matrix (1.0) all of it would have become 0.
#
# And we never need `back`: $y_i = s_i \sum_k c_{ik} x_k$, so the scale is applied once, after the sum.

# %%
x = torch.tensor([1.0, 2.0, 0.5, -1.0])
print("exact    ", [round(v, 3) for v in (W @ x).tolist()])
print("quantised", [round(v, 3) for v in ((codes @ x) * scale).tolist()])

# %% [markdown]
# ## As a loop, with eight bits
#
# The same with −127 … 127, the plainest way. A row of zeros has no largest number to divide by: any
# scale will do.


# %%
def quantize_loop(weight):
    codes, scales = torch.zeros_like(weight, dtype=torch.int8), []
    for i, row in enumerate(weight.tolist()):
        largest = max(abs(value) for value in row)
        scales.append(largest / 127 if largest > 0 else 1.0)
        for k, value in enumerate(row):
            codes[i, k] = round(value / scales[-1])
    return codes, torch.tensor(scales)


slow = quantize_loop(W)
print(slow[0].tolist())

# %% [markdown]
# ## The module, part one: eight bits
#
# Vectorised it is four lines. One detail: the model computes in bfloat16, so the scale will be stored in
# bfloat16, which has 8 significant bits. **Round the scale first**, then compute the codes for the rounded
# scale. The other way round, every weight of a row would be off by the scale's error.


# %%
#| export
def quantize_int8(
    weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row to whole numbers from -127 to 127 times a scale of its own.

    Args:
        weight: `float[N, K]`, one row for each output channel.
        dtype: of the scales. They are rounded first, so that the numbers fit the rounded scale.

    Returns:
        codes `int8[N, K]` and scales `dtype[N]`; weight ≈ codes · scales[:, None].

    Raises:
        ValueError: the weight holds NaN or infinity.
    """
    weight = weight.float()
    scales = (weight.abs().amax(1) / 127).to(dtype)
    _check_finite(scales)
    scales = torch.where(scales > 0, scales, 1.0)  # a row of zeros: any scale will do
    codes = (weight / scales.float()[:, None]).round().clamp(-127, 127)
    return codes.to(torch.int8), scales


def _check_finite(scales: torch.Tensor) -> None:
    if not bool(scales.isfinite().all()):
        raise ValueError(
            "the weight holds NaN or infinity, or numbers too large for the type of its scales; "
            "check the checkpoint"
        )


# %%
codes, scales = quantize_int8(W, torch.float32)
assert torch.equal(codes, slow[0])
torch.testing.assert_close(scales, slow[1])
for dtype in (torch.float32, torch.bfloat16):
    codes, scales = quantize_int8(W, dtype)
    error = (codes * scales.float()[:, None] - W).abs() / scales.float()[:, None]
    print(f"scales in {str(dtype)[6:]:8} largest error {error.max():.2f} steps")

# %% [markdown]
# ## Where do real weights lie?
#
# Here is one row of the tiny model's first down-projection: 32 neighbouring weights as dots, and below
# them the values that each scheme can represent.

# %%
model, processor = load_model(TINY), Processor.from_pretrained(TINY)
down = model.language_model.layers[0].mlp.down_proj.weight
row = int(down.abs().amax(1).argsort()[len(down) // 2])  # a middling row
group = down[row, :32].sort().values
fig, ax = plt.subplots(figsize=(8, 2.6), layout="constrained")
ax.scatter(group, torch.full((32,), 3.0), s=22, color=COLOURS["ink"], zorder=3)
low, high, most, all_most = group[0], group[-1], down[row].abs().max(), down.abs().max()
grids = [
    ("4 bits, own zero and scale", torch.linspace(low, high, 16), "together"),
    ("4 bits, scale of the row", torch.arange(-7, 8) * most / 7, "language"),
    ("4 bits, one scale for all", torch.arange(-7, 8) * all_most / 7, "bad"),
]
for y, (_, values, colour) in zip((2, 1, 0), grids):
    ax.vlines(values, y - 0.3, y + 0.3, color=COLOURS[colour], lw=1.3)
span = 1.15 * float(most)
ax.set(xlim=(-span, span), ylim=(-0.6, 3.5), xlabel="value of a weight")
ax.set_yticks([3, 2, 1, 0], ["32 weights of a row", *(name for name, *_ in grids)])
ax.tick_params(left=False)
save_figure(fig, "22_grid")

# %% [markdown]
# What to notice: a few large weights *elsewhere* stretch the grid for all, and only some values fall where
# this row lives. Such **outliers** hurt those who share their scale; 32 neighbours with their own scale and
# zero use all 16 values.
#
# ### What a scale costs
#
# A group of $g$ weights at 4 bits with a scale and a zero of 16 bits each costs $4 + 32/g$ bits a weight: error
# against bits. We measure both on the tiny decoder.


# %%
def fake(weight, bits, group):
    """Round to 2**bits evenly spaced values between the ends of each group, and back."""
    groups = weight.unflatten(1, (-1, group))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    return (((groups - low) / step).round() * step + low).flatten(1)


def relative(approximate, exact):
    return float((approximate - exact).norm() / exact.norm())


layers = [m.weight for m in model.language_model.layers.modules() if isinstance(m, nn.Linear)]
fig, ax = plt.subplots(figsize=(5.6, 3), layout="constrained")
for bits, colour in ((3, "accent"), (4, "language"), (5, "together")):
    cost = [bits + 32 / g for g in (16, 32, 64, 128)]
    errors = [
        sum(relative(fake(w, bits, g), w) for w in layers) / len(layers) for g in (16, 32, 64, 128)
    ]
    ax.plot(cost, errors, "o-", color=COLOURS[colour], label=f"{bits} bits, groups of 128 … 16")
    print(bits, "bits:", [f"{c:.2f} → {100 * e:.1f} %" for c, e in zip(cost, errors)])
ax.set(xlabel="bits a weight, scales included", ylabel="error / weight", ylim=(0, None))
ax.legend(fontsize=8)
save_figure(fig, "22_bits")

# %% [markdown]
# One bit more halves the error. Smaller groups help too, but each bit buys less. Eight bits need none.
#
# ## The module, part two: four bits
#
# For each group 16 values from its least weight to its greatest. But the ends are the rarest places: if we
# **clip** there a little, the grid gets finer for all others. So we try three ranges and keep the one with
# the least squared error.

# %%
#| export
CLIPS = (1.0, 0.95, 0.9)  # shares of a group's range that are tried


def quantize_int4(
    weight: torch.Tensor, group_size: int = 64, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each group of a row to 16 evenly spaced values: its own scale, its own zero.

    The values span the group's range, or a little less where that makes the squared error
    smaller: clipping one outlier can serve the others.

    Args:
        weight: `float[N, K]`, K a multiple of the group size.
        group_size: neighbours along the input that share a scale and a zero.
        dtype: of scales and zeros; they are rounded first.

    Returns:
        codes `uint8[N, K]`, 0 to 15, and `dtype[N, K / group_size, 2]`, scale and zero;
        weight ≈ (codes - 8) · scale + zero.

    Raises:
        ValueError: the weight holds NaN or infinity.
    """
    groups = weight.float().unflatten(1, (-1, group_size))  # (N, K/g, g)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    best = None
    for clip in CLIPS:
        scale = ((high - low) * (clip / 15)).to(dtype).float()
        zero = ((low + high + scale) / 2).to(dtype).float()  # the middle lies between 7 and 8
        _check_finite(zero)
        scale = torch.where(scale > 0, scale, 1.0)  # all equal: the zero says it all
        codes = ((groups - zero) / scale).round().clamp(-8, 7)
        error = torch.addcmul(zero, codes, scale).sub(groups).square().sum(-1, keepdim=True)
        if best is None:
            best = error, codes, scale, zero
        else:
            better = error < best[0]
            best = [torch.where(better, *pair) for pair in zip((error, codes, scale, zero), best)]
    _, codes, scale, zero = best
    return (codes + 8).to(torch.uint8).flatten(1), torch.cat([scale, zero], -1).to(dtype)


# %%
for g in (32, 64, 128):
    plain = sum(relative(fake(w, 4, g), w) for w in layers) / len(layers)
    ours = []
    for w in layers:
        codes, scales = quantize_int4(w, g)
        step, zero = scales.float().repeat_interleave(g, 1).unbind(-1)
        ours.append(relative((codes.float() - 8) * step + zero, w))
    print(
        f"groups of {g:3}: plain {100 * plain:.1f} %, clipped {100 * sum(ours) / len(ours):.1f} %"
    )

# %% [markdown]
# ## Two weights in a byte
#
# Memory knows no half bytes. Two codes share one: one in the low half (`byte & 15`), one in the high half
# (`byte >> 4`). *Which* two is a matter of taste for us, but not for the processor: it wants to take a
# few bytes at once and get a block of rows side by side. The order differs between processors.


# %%
#| export
def pack_int4(codes: torch.Tensor, block: int = 64) -> torch.Tensor:
    """Two codes a byte, in the order that PyTorch's CPU kernel reads.

    A block of rows lies together, column by column; the low half of a byte is a row of the
    block's first half, the high half is the row block / 2 below.

    Args:
        codes: `uint8[N, K]`, 0 to 15; N a multiple of the block.
        block: rows in a block, 64 for AVX-512 and 32 for AVX2.

    Returns:
        `uint8[N, K / 2]`, the bytes of all blocks one after another.
    """
    n, k = codes.shape
    low, high = codes.view(n // block, 2, block // 2, k).unbind(1)  # (N/block, block/2, K)
    return (low | high << 4).transpose(1, 2).reshape(n, k // 2)


def unpack_int4(packed: torch.Tensor, block: int = 64) -> torch.Tensor:
    """The inverse of `pack_int4`: `uint8[N, K / 2]` → `uint8[N, K]`."""
    n, half = packed.shape
    pairs = packed.view(n // block, 2 * half, block // 2)  # (N/block, K, block/2)
    return torch.cat([pairs & 15, pairs >> 4], -1).transpose(1, 2).reshape(n, 2 * half)


@cache
def kernel_block() -> int | None:
    """Rows in a block of this machine's int4 kernel; None: in an order that we do not know."""
    codes = torch.arange(64 * 32, device="cpu").mul(7).remainder(16).view(64, 32)
    codes = (codes + codes.new_tensor(range(64))[:, None]).remainder(16)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    except (RuntimeError, AttributeError):  # private names: another PyTorch may have others
        return None
    known = (b for b in (64, 32) if torch.equal(pack_int4(codes.byte(), b), packed))
    return next(known, None)


# %%
small = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]], dtype=torch.uint8)  # 4 rows, 2 columns
packed = pack_int4(small, block=4)
for byte in packed.flatten().tolist():
    print(f"byte {byte:3} = {byte >> 4} · 16 + {byte & 15}")
assert torch.equal(unpack_int4(packed, block=4), small)

# %% [markdown]
# Column 0 first: rows 0 and 2 share a byte, then 1 and 3. A file from a machine with another order is repacked
# when it is loaded.
#
# ## The layer: few rows or many
#
# Decoding multiplies **one** row with W: it should be read packed, and PyTorch has kernels for that. Prefill
# multiplies 264 rows: arithmetic is the work, so we unpack a chunk that fits the cache and use the ordinary
# product.

# %%
#| export
PAGE = 4096  # bytes, of the memory
CHUNK = 2**21  # weights that are taken out of their packing at a time: a few megabytes


class QuantizedLinear(nn.Module):
    """x·Wᵀ + bias with W in few bits; the input and the output keep their type.

    Few rows in bfloat16 on a CPU (decoding) go to a kernel that reads the packed weights. In all
    other cases a chunk of W after another is unpacked and multiplied as usual: for many rows
    (prefill), in other types and on other devices that is faster.

    Args:
        in_features, out_features: int K and N.
        bias: does it have one.
        dtype: of scales, bias and inputs.
        multiple: K is filled up with zeros to a multiple of this.
    """

    few = 0  # most rows for which the kernel is faster

    def __init__(self, in_features, out_features, bias=False, dtype=None, multiple=32):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.fill = -in_features % multiple
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`float[…, K]` → `float[…, N]`."""
        rows = F.pad(x.reshape(-1, self.in_features), (0, self.fill))  # (M, K)
        learning = torch.is_grad_enabled() and x.requires_grad  # the kernels have no gradient
        fits = rows.device.type == "cpu" and rows.dtype == self.scales.dtype == torch.bfloat16
        if fits and 0 < rows.shape[0] <= self.few and not learning and self.has_kernel():
            y = self.kernel(rows.contiguous())
        else:
            step = max(64, CHUNK // rows.shape[1] // 64 * 64)
            starts = range(0, self.qweight.shape[0], step)
            y = torch.cat([self.chunk(rows, slice(i, i + step)) for i in starts], 1)
        y = y[:, : self.out_features].reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


# %%
#| export
class Int8Linear(QuantizedLinear):
    """Eight bits a weight and one scale for each output channel."""

    few = 8

    def __init__(self, in_features, out_features, bias=False, dtype=None, group_size=None):
        # PyTorch's kernel reads 16 columns at a time, also where fewer are left.
        super().__init__(in_features, out_features, bias, dtype, multiple=16)
        codes = torch.empty(out_features, in_features + self.fill, dtype=torch.int8)
        self.register_buffer("qweight", codes)
        self.register_buffer("scales", torch.empty(out_features, dtype=dtype))

    def set_rows(self, start: int, weight: torch.Tensor) -> None:
        """Quantise `float[n, K]` into the rows from `start` on."""
        codes, scales = quantize_int8(F.pad(weight, (0, self.fill)), self.scales.dtype)
        rows = slice(start, start + weight.shape[0])
        self.qweight[rows], self.scales[rows] = codes, scales

    def dequantize(self) -> torch.Tensor:
        """The weight as it acts: `float32[N, K]`."""
        return (self.qweight.float() * self.scales.float()[:, None])[:, : self.in_features]

    def has_kernel(self) -> bool:
        """PyTorch has the kernel on every CPU."""
        return hasattr(torch.ops.aten, "_weight_int8pack_mm")

    def kernel(self, rows: torch.Tensor) -> torch.Tensor:
        """`bfloat16[M, K]` → `bfloat16[M, N]`, straight from the codes."""
        multiply, (n, k) = torch.ops.aten._weight_int8pack_mm, self.qweight.shape
        if rows.shape[0] > 1 or n % 2 or not k < PAGE <= 2 * k:
            return multiply(rows, self.qweight, self.scales)
        # Processors read ahead only within a page: two short rows of W pass for one that fills it.
        codes, ones = self.qweight.view(n // 2, 2 * k), self.scales.new_ones(n // 2)
        pairs = multiply(torch.block_diag(rows, rows), codes, ones)  # (2, N / 2)
        return pairs.T.reshape(1, n) * self.scales

    def chunk(self, rows: torch.Tensor, part: slice) -> torch.Tensor:
        """The outputs of one slice: whole numbers to -127 … 127 are exact in every float type."""
        return rows @ self.qweight[part].to(rows.dtype).T * self.scales[part].to(rows.dtype)


# %%
#| export
class Int4Linear(QuantizedLinear):
    """Four bits a weight; a scale and a zero for each group along the input."""

    few = 64

    def __init__(self, in_features, out_features, bias=False, dtype=None, group_size=64):
        super().__init__(in_features, out_features, bias, dtype, multiple=group_size)
        n, k = out_features + -out_features % 64, in_features + self.fill  # whole blocks
        self.group_size, self.block = group_size, kernel_block() or 64
        self.register_buffer("qweight", torch.zeros(n, k // 2, dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(k // group_size, n, 2, dtype=dtype))

    def set_rows(self, start: int, weight: torch.Tensor) -> None:
        """Quantise `float[n, K]` into the rows from `start` on, a multiple of 64."""
        weight = F.pad(weight, (0, self.fill, 0, -weight.shape[0] % 64))
        codes, scales = quantize_int4(weight, self.group_size, self.scales.dtype)
        rows = slice(start, start + weight.shape[0])
        self.qweight[rows] = pack_int4(codes, self.block)
        self.scales[:, rows] = scales.transpose(0, 1)

    def repack(self, stored_block: int) -> None:
        """Codes that another machine packed, in this machine's order."""
        if stored_block != self.block:
            self.qweight = pack_int4(unpack_int4(self.qweight, stored_block), self.block)

    def dequantize(self) -> torch.Tensor:
        """The weight as it acts: `float32[N, K]`."""
        columns = self._columns(slice(None), torch.float32)  # (K, N)
        return columns.T[: self.out_features, : self.in_features]

    def has_kernel(self) -> bool:
        """Whether this machine's kernel reads our order."""
        return kernel_block() == self.block

    def kernel(self, rows: torch.Tensor) -> torch.Tensor:
        """`bfloat16[M, K]` → `bfloat16[M, N]`, straight from the codes."""
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return multiply(rows, self.qweight, self.group_size, self.scales)

    def chunk(self, rows: torch.Tensor, part: slice) -> torch.Tensor:
        """The outputs of one slice, whole blocks."""
        return rows @ self._columns(part, rows.dtype)

    def _columns(self, part: slice, dtype: torch.dtype) -> torch.Tensor:
        """Some rows of W, transposed: `dtype[K, n]`, rounded once (`addcmul` adds in float32)."""
        g, block, wide = self.group_size, self.block, torch.promote_types(dtype, self.scales.dtype)
        scales = self.scales[:, part].unflatten(1, (-1, block)).permute(3, 1, 0, 2).to(wide)
        scale, zero = scales[:, :, :, None].contiguous()  # (n/block, K/g, 1, block)
        packed = self.qweight[part].view(-1, scale.shape[1], g, block // 2)
        codes = scale.new_empty(*packed.shape[:-1], block)  # (n/block, K/g, g, block)
        for half, bits in zip(codes.split(block // 2, -1), (packed & 15, packed >> 4)):
            half.copy_(bits.view(torch.int8).sub_(8))
        weight = torch.addcmul(zero, codes, scale).to(dtype)
        return weight.flatten(1, 2).transpose(0, 1).flatten(1)  # (K, n)


# %% [markdown]
# The kernels have edges that no error message tells. The int8 kernel takes 16 columns at a time; given 40,
# it reads 8 that are not there, and returns garbage or crashes. In float32 both kernels are slow. Neither
# has a gradient. So the layer fills up its columns with zeros, and uses a kernel only where it is right
# *and* fast.

# %%
torch.manual_seed(0)
weight = torch.randn(70, 40)  # neither is a multiple of 16
for kind in (Int8Linear, Int4Linear):
    layer = kind(40, 70, dtype=torch.bfloat16, group_size=32)
    layer.set_rows(0, weight)
    for rows in (1, 100):
        x = torch.randn(rows, 40).bfloat16()
        expected = x.float() @ layer.dequantize().T
        error = relative(layer(x).float(), expected)
        assert error < 0.01
        print(f"{kind.__name__} {rows:3} rows → {list(layer(x).shape)}, like its own weight: True")

# %% [markdown]
# ## Against the reference
#
# Three references, all PyTorch's own. Its rounding (`fake_quantize_per_channel_affine`), with our scales,
# gives our weights. `F.linear` with the dequantised weight gives our outputs in float32. And the kernels,
# which work in bfloat16, agree with the chunks as closely as bfloat16 allows.

# %%
w = torch.randn(96, 128)
codes, scales = quantize_int8(w, torch.float32)
zeros = torch.zeros(len(w), dtype=torch.int32)
theirs = torch.fake_quantize_per_channel_affine(w, scales, zeros, 0, -127, 127)
gap = (codes * scales[:, None] - theirs).abs().max().item()
print(f"rounding: {gap:.1e}")
assert gap <= 1e-6
for kind in (Int8Linear, Int4Linear):
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        layer = kind(w.shape[1], w.shape[0], dtype=dtype, group_size=32)
        layer.set_rows(0, w)
        x = torch.randn(4, w.shape[1]).to(dtype)
        gap = relative(layer(x).float(), F.linear(x.float(), layer.dequantize()))
        assert gap <= most
        print(f"{kind.__name__}, {str(dtype)[6:]:8} differs from F.linear by less than {most:.0e}")

# %% [markdown]
# ## The whole model
#
# Which layers? Those of the language model. The vision tower runs once a picture, on many rows: few bits save
# it memory, no time. It stays, but takes eight beside four bits, where it would be a third. Of the
# embedding a prompt reads few rows; it stays exact, and the **head** gets a quantised copy.
#
# The tied weights meet in the head, so there the class changes. One original weight is needed at a time.


# %%
#| export
class QuantizedGemmaModel(GemmaModel):
    """Gemma whose head is a quantised copy of the embedding."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`float[B, L, D]` → `float32[B, L, V]`."""
        return self.lm_head(hidden).float()


class QuantizedGemma2Model(Gemma2Model):
    """Gemma 2 whose head is a quantised copy of the embedding."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`float[B, L, D]` → `float32[B, L, V]`, capped."""
        return soft_cap(self.lm_head(hidden), self.config.final_logit_softcapping)


MODES = {"int8": Int8Linear, "int4": Int4Linear}
HEADS = {GemmaModel: QuantizedGemmaModel, Gemma2Model: QuantizedGemma2Model}
GROUPS = (32, 64, 128, 256)  # what the int4 kernel knows
SPARED = ("attention", "head")  # what int4 can leave at eight bits


# %%
#| export
def _empty(mode: str, linear: nn.Module, dtype: torch.dtype, group_size: int) -> QuantizedLinear:
    """A quantised layer, still without its weight, for a linear layer or an embedding."""
    n, k = linear.weight.shape
    new = MODES[mode](k, n, getattr(linear, "bias", None) is not None, dtype, group_size)
    if new.bias is not None:
        new.bias = linear.bias.detach().to(dtype)
    return new


def _swap(
    model: PaliGemma, mode: str, group_size: int, eight: tuple, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor, QuantizedLinear]]:
    """Put empty quantised layers in, one at a time; what is done between is the caller's.

    Yields:
        the name of a weight in the model, the tensor, and the layer that has to take it.
    """
    language = model.language_model
    head_mode = "int8" if "head" in eight else mode
    language.lm_head = _empty(head_mode, language.embed_tokens, dtype, group_size)
    language.__class__ = HEADS[type(language)]
    # The largest weight first, while nothing else is in memory yet.
    yield "language_model.embed_tokens.weight", language.embed_tokens.weight, language.lm_head
    tower = "vision_tower." if mode == "int4" else "language_model."
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.startswith(("language_model.", tower)):
            parent, _, child = name.rpartition(".")
            spared = name.startswith("vision") or ("attention" in eight and ".self_attn." in name)
            new = _empty("int8" if spared else mode, layer, dtype, group_size)
            setattr(model.get_submodule(parent), child, new)
            yield f"{name}.weight", layer.weight, new


def _choose(
    model: PaliGemma, mode: str, group_size: int | None, eight: Sequence[str] | None
) -> tuple[int, tuple[str, ...]]:
    """Group size, and what keeps eight bits; narrow models need care more than they need speed."""
    if type(model.language_model) not in HEADS:
        raise ValueError("the model is quantised already; load the original weights again")
    if mode not in MODES:
        raise ValueError(f"the mode is {mode!r}; expected 'int8' or 'int4'")
    narrow = model.config.text_config.hidden_size < 1024
    group_size = (32 if narrow else 64) if group_size is None else group_size
    if group_size not in GROUPS:
        raise ValueError(f"group_size is {group_size!r}; expected 32, 64, 128 or 256")
    eight = (SPARED if narrow else ()) if eight is None else eight
    if isinstance(eight, str) or not set(eight) <= set(SPARED):
        raise ValueError(f"eight is {eight!r}; expected a list of 'attention', 'head', or neither")
    return group_size, tuple(sorted(eight)) if mode == "int4" else ()


# %%
#| export
@torch.no_grad()
def quantize_model(
    model: PaliGemma,
    mode: str = "int8",
    group_size: int | None = None,
    eight: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    read: Callable[[str], torch.Tensor] | None = None,
) -> PaliGemma:
    """Quantise the linear layers of the language model and the head's copy of the embedding.

    The vision tower sees many rows once for each picture, where few bits save no time: it stays,
    except that beside four bits, where it would be a third of the memory, it takes eight.
    Projector and norms are small; of the embedding only the prompt's rows are read. They stay.

    Args:
        model: changed in place.
        mode: "int8" or "int4".
        group_size: for int4: 32, 64, 128 or 256; None: 64, or 32 below a width of 1024.
        eight: what keeps eight bits in an int4 model, of "attention" and "head"; None: nothing,
            or both below a width of 1024.
        dtype: of the scales; None: the model's.
        read: gives a weight by its name in the model; None: the model's own tensors.

    Returns:
        The same model.

    Raises:
        ValueError: an unknown mode or group size, a model that is quantised already, or NaN.
    """
    group_size, eight = _choose(model, mode, group_size, eight)
    for name, weight, new in _swap(model, mode, group_size, eight, dtype or model.dtype):
        weight = weight if read is None else read(name)
        step = max(64, CHUNK // 4 // weight.shape[1] // 64 * 64)  # the search needs room
        new.to(weight.device)
        for start in range(0, weight.shape[0], step):
            new.set_rows(start, weight[start : start + step])
    return model


# %%
exact = model
models = {"float32": exact}
for mode in ("int8", "int4"):
    models[mode] = quantize_model(copy.deepcopy(exact), mode)
read = [n for n in exact.state_dict() if "_proj" in n or n.endswith("embed_tokens.weight")]
read = [n for n in read if n.startswith("language_model.")]
weights = sum(exact.get_parameter(n).numel() for n in read)
for mode in ("int8", "int4"):
    state = models[mode].state_dict()
    size = sum(t.nbytes for n, t in state.items() if n.endswith(("qweight", "scales")))
    print(f"{mode}: {8 * size / weights:.2f} bits a weight")

# %% [markdown]
# (Here the scales are in float32, as the tiny model computes, and int4 spares attention and head; we shall see
# why. At full size it is 8.01 and 4.5.)
#
# Do the models still answer? The course's three scenes, four questions each (boxes not printed):

# %%
QUESTIONS = ["caption en", "answer en how many dogs are there?", "answer en is there a cat?"]
QUESTIONS.append("detect dog ; bee ; rocket")
SCENES = ["scene", "scene2", "scene3"]
pictures = [sample_picture(scene) for scene in SCENES for _ in QUESTIONS]
batch = processor(pictures, QUESTIONS * len(SCENES))
inputs = {name: batch[name] for name in ("input_ids", "pixel_values", "attention_mask")}


def ask(model):
    ids = generate(model, **inputs, max_new_tokens=16)
    return [processor.decode(row) for row in ids]


said = {name: ask(model) for name, model in models.items()}
for i, scene in enumerate(SCENES):
    for mode in models:
        print(f"{scene:7} {mode:8}", said[mode][4 * i : 4 * i + 3])

# %% [markdown]
# ## See it: how few bits?
#
# Words are a coarse measure. A finer one: by how much do the **logits** change, compared with how much they
# vary? And to answer the question of the title, we go on down: 8, 7, … 2 bits, in groups of 32, head
# included.


# %%
def rounded_model(bits, group=32):
    model = copy.deepcopy(exact)
    for layer in model.language_model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = fake(layer.weight, bits, group)
    model.language_model.embed_tokens.weight.data = fake(
        model.language_model.embed_tokens.weight, bits, group
    )
    return model


def pair_up(answer, truth):
    """Words at the same place; a box is four words."""
    return zip_longest(*(text.replace("><", "> <").split() for text in (answer, truth)))


def logits_of(model):
    return model(**inputs, logits_to_keep=1).logits[:, -1]


true_logits = logits_of(exact)
centred = true_logits - true_logits.mean(-1, keepdim=True)
bits_tried, shift, same = list(range(8, 1, -1)), [], []
for bits in bits_tried:
    model = rounded_model(bits)
    shift.append(float((logits_of(model) - true_logits).norm() / centred.norm()))
    answers = ask(model)
    words = [(a, b) for x, y in zip(answers, said["float32"]) for a, b in pair_up(x, y)]
    same.append(sum(a == b for a, b in words) / len(words))
    print(f"{bits} bits: logits off by {100 * shift[-1]:4.1f} %   {answers[0]!r:.50}")

# %%
fig, ax = plt.subplots(figsize=(5.6, 3), layout="constrained")
ax.bar(bits_tried, same, color=COLOURS["language"], alpha=0.35, label="words unchanged")
ax.plot(bits_tried, shift, "o-", color=COLOURS["vision"], label="change of the logits")
ax.set(xlabel="bits a weight", ylabel="share", ylim=(0, 1.05), xticks=bits_tried)
ax.invert_xaxis()
fig.legend(loc="outside upper center", ncols=2, fontsize=8)
save_figure(fig, "22_fewer_bits")

# %% [markdown]
# What to notice: the logits' error about doubles with each bit that is taken, as the grid's step does. The
# answers care late: mostly the best word wins by more than that. Where two words are nearly tied, such as
# two neighbouring places of a box, they change first. Then comes the cliff.
#
# ### Which layer is sensitive?
#
# Quantise **one** kind of layer at a time to 4 bits and watch the logits.

# %%
kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "head"]
shifts, shares = [], []
for kind in kinds:
    model, count = copy.deepcopy(exact), 0
    for name, layer in model.language_model.named_modules():
        if name.endswith(kind):
            layer.weight.data, count = fake(layer.weight, 4, 32), count + layer.weight.numel()
    if kind == "head":
        table = fake(model.language_model.embed_tokens.weight, 4, 32)
        model.language_model.logits = lambda h, table=table: F.linear(h, table).float()
        count = table.numel()
    shifts.append(100 * float((logits_of(model) - true_logits).norm() / centred.norm()))
    shares.append(100 * count / weights)
fig, ax = plt.subplots(figsize=(6.4, 2.8), layout="constrained")
ax.barh(kinds, shifts, color=COLOURS["language"])
for y, (shift_, share) in enumerate(zip(shifts, shares)):
    ax.text(shift_, y, f"  {share:.0f} % of the weights", va="center", fontsize=8)
ax.set(xlabel="change of the logits when only these have 4 bits, %", xlim=(0, 1.35 * max(shifts)))
ax.invert_yaxis()
print(
    f"together: {100 * shift[bits_tried.index(4)]:.0f} %, "
    f"root of the sum of squares: {sum(s**2 for s in shifts) ** 0.5:.0f} %"
)
save_figure(fig, "22_layers")

# %% [markdown]
# The errors are nearly independent: together they grow about like the root of the sum of squares. Compare the length of a
# bar with its share: attention is small and sensitive. The head is large, and its error goes straight into
# the logits. So in narrow models, where four bits cost answers, ours get feed-forward layers only. In large
# models some *inputs* are outliers too; GPTQ and AWQ (references) weigh each weight by what flows through it.

# %% [markdown]
# ## Files: quantise once, map for ever
#
# A 3B checkpoint has 5.8 GB. Whoever quantises because memory is short must not need all of it. So each
# weight is mapped ([lesson 16](16_checkpoint.ipynb)), quantised, and let go. Let go *really*: a page that was read stays in memory as
# long as its mapping lives. So each weight gets a mapping of its own.


# %%
#| export
def load_quantized(
    path: str | os.PathLike,
    mode: str | None = None,
    group_size: int | None = None,
    eight: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> PaliGemma:
    """Load a checkpoint with few bits a weight; the whole original is never in memory.

    Args:
        path: a directory that `save_quantized` wrote: its tensors stay mapped, loading takes next
            to no time. Or one with original weights: each is mapped, quantised and let go.
        mode: "int8" or "int4"; None: as the directory was saved.
        group_size, eight: as in `quantize_model`; None: as saved, or chosen by the width.
        device: where the weights go.
        dtype: to compute in; None: as stored.

    Returns:
        A `PaliGemma` in evaluation mode.

    Raises:
        CheckpointError: a directory that cannot be used, or was quantised in another mode.
        ValueError: as in `quantize_model`.
    """
    saved = read_quantization(path)
    if saved is not None:
        asked = {"mode": mode, "group_size": group_size}
        asked["eight"] = None if eight is None else sorted(eight)
        for name, value in asked.items():
            if value not in (None, saved[name]):
                raise CheckpointError(
                    f"{path} was quantised with {name} {saved[name]!r}, not {value!r}; "
                    "quantise the original weights"
                )
        model = _load_saved(path, saved)
    else:
        model = load_model(path, dtype=None)
        quantize_model(model, mode or "int8", group_size, eight, dtype, _reader(path))
    return model.to(device=device, dtype=dtype).eval()


def _reader(path: str | os.PathLike) -> Callable[[str], torch.Tensor]:
    """A function that maps one weight by its name in the model, with a mapping of its own.

    When the weight is let go its pages are too; in a common mapping of the file they would stay.
    """
    place = {internal_name(n): (f, n) for f in weight_files(path) for n, _ in read_tensors([f])}

    def read(name: str) -> torch.Tensor:
        file, stored = place[name]
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(stored)

    return read


# %% [markdown]
# The result can be saved. `config.json` says how it was made, so that no one takes codes for weights, and
# all is written under other names first, as in [lesson 16](16_checkpoint.ipynb). Loading is strict, as ever.

# %%
#| export
KEY, METHOD = "quantization_config", "paligemma"


def read_quantization(path: str | os.PathLike) -> dict | None:
    """How a directory was quantised: mode, group_size, eight, block; None: not at all.

    Raises:
        CheckpointError: it was quantised by something else.
    """
    file = Path(path) / "config.json"
    read_config(path)  # says what is wrong with the file as a whole
    found = json.loads(file.read_text(encoding="utf-8")).get(KEY)
    if found is None:
        return None
    good = isinstance(found, dict) and found.get("quant_method") == METHOD
    eights = ([], ["attention"], ["head"], ["attention", "head"])
    allowed = {"mode": list(MODES), "eight": eights, "group_size": GROUPS, "block": (32, 64)}
    if not good or any(found.get(name) not in values for name, values in allowed.items()):
        raise CheckpointError(f"{file}: {KEY} is {found!r:.130}; expected one of save_quantized")
    return {name: found[name] for name in allowed}


def save_quantized(model: PaliGemma, path: str | os.PathLike) -> None:
    """Write a quantised model: `config.json`, which names the mode, and one safetensors file.

    Both are written under other names and renamed when whole. `load_model` refuses the directory;
    `load_quantized` maps it.

    Raises:
        ValueError: the model is not quantised.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    if not layers:
        raise ValueError("the model is not quantised; use save_model, or quantize_model first")
    language = model.language_model
    four = any(isinstance(layer, Int4Linear) for layer in layers)
    how = {"mode": "int4" if four else "int8", "eight": []}
    for name, layer in (
        ("attention", language.layers[0].self_attn.q_proj),
        ("head", language.lm_head),
    ):
        if four and isinstance(layer, Int8Linear):
            how["eight"].append(name)
    how |= {"group_size": 64, "block": 64, "quant_method": METHOD}  # int8 has neither
    for layer in layers:
        if isinstance(layer, Int4Linear):
            how |= {"group_size": layer.group_size, "block": layer.block}
    dtype = {"dtype": str(model.dtype).removeprefix("torch.")}
    config = json.dumps(config_dict(model.config) | dtype | {KEY: how}, indent=2)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    state = {published_name(n): t.detach().cpu() for n, t in model.state_dict().items()}
    with replacing(path) as draft:
        save_file(state, draft("model.safetensors"), metadata={"format": "pt"})
        draft("config.json").write_text(config + "\n")


# %%
#| export
def _load_saved(path: str | os.PathLike, how: dict) -> PaliGemma:
    """A directory of `save_quantized`, mapped and strict."""
    model = empty_model(path, read_config(path))
    with torch.device("meta"):
        for _ in _swap(model, how["mode"], how["group_size"], how["eight"], torch.float32):
            pass
    expected = model.state_dict()
    state = {internal_name(name): tensor for name, tensor in read_tensors(weight_files(path))}
    missing, foreign = sorted(expected.keys() - state), sorted(state.keys() - expected)
    if missing or foreign:
        raise CheckpointError(
            f"{path} lacks {len(missing)} tensors and holds {len(foreign)} that do not belong to "
            f"it, such as {(missing + foreign)[0]}; save it again"
        )
    for name, tensor in state.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape or tensor.is_floating_point() != wanted.is_floating_point():
            raise CheckpointError(
                f"{path}: {name} is {tensor.dtype}{list(tensor.shape)}; expected {wanted.dtype}"
                f"{list(wanted.shape)}: save it again"
            )
    model.load_state_dict(state, strict=True, assign=True)
    for layer in model.modules():
        if isinstance(layer, Int4Linear):
            layer.repack(how["block"])
    return model


# %%
with tempfile.TemporaryDirectory() as folder:
    first = load_quantized(TINY, "int4")  # bfloat16, as stored
    save_quantized(first, folder)
    again = load_quantized(folder)
    pair = [
        m.language_model(torch.ones(1, 1, 128).bfloat16(), torch.zeros(1, 1).long())
        for m in (first, again)
    ]
    print("the same to the last bit:", torch.equal(*pair))
    print(json.loads((Path(folder) / "config.json").read_text())[KEY])
    try:
        load_model(folder)
    except CheckpointError as error:
        print("load_model refuses:", str(error).split(" holds ")[-1])

# %% [markdown]
# ## At full size
#
# One feed-forward matrix of the 3B model, 2048 × 16,384, times one row, on **one** core. We take processor
# time, which other programs disturb least, and several copies in turn: a single packed matrix would stay in
# the processor's cache and look too fast. The pace of the model is its bytes for each token, divided by the
# reading speed. For bfloat16 there are two products: oneDNN's, and PyTorch's own ([lesson 18](18_generation.ipynb)).


# %% tags=["nbval-ignore-output"]
def seconds(function, rounds=5):
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return best


def wide_layer(mode):
    layer = MODES[mode](2048, 16384, dtype=torch.bfloat16, group_size=64)
    layer.qweight.random_()  # speed does not ask what the weights are
    layer.scales.fill_(0.01)
    return layer


dense = nn.Linear(2048, 16384, bias=False, dtype=torch.bfloat16)
one_of_each = {"16 bits, PyTorch": dense, "16 bits, oneDNN": dense}
one_of_each |= {mode: wide_layer(mode) for mode in MODES}
threads = torch.get_num_threads()
torch.set_num_threads(1)
x, measured = torch.randn(1, 2048).bfloat16(), {}
for name, layer in one_of_each.items():
    copies = [copy.deepcopy(layer) for _ in range({"int8": 4, "int4": 8}.get(name, 2))]
    size = sum(t.nbytes for t in layer.state_dict().values())
    torch.backends.mkldnn.enabled = name != "16 bits, PyTorch"
    speed = size * len(copies) / seconds(lambda copies=copies: [c(x) for c in copies])
    measured[name] = size / dense.weight.numel(), speed
    print(f"{name:18} {8 * measured[name][0]:5.2f} bits a weight, read at {speed / 1e9:4.1f} GB/s")
torch.backends.mkldnn.enabled = True
torch.set_num_threads(threads)

# %% tags=["nbval-ignore-output"]
fig, ax = plt.subplots(figsize=(5.8, 3.1), layout="constrained")
best = max(speed for _, speed in measured.values())
grid = torch.linspace(1, 5.3, 50)
ax.plot(grid, best / 1e9 / grid, color=COLOURS["muted"], label=f"one core at {best / 1e9:.0f} GB/s")
for (name, (size, speed)), colour in zip(measured.items(), ("inside", "bad", "vision", "language")):
    read_bytes, rate = size * total / 1e9, speed / (size * total)
    ax.plot(read_bytes, rate, "o", color=COLOURS[colour], zorder=3)
    note = f"{name}: {rate:.1f}"
    box = {"facecolor": COLOURS["paper"], "edgecolor": "none", "pad": 1}
    style = {"textcoords": "offset points", "color": COLOURS[colour], "va": "center", "bbox": box}
    ax.annotate(note, (read_bytes, rate), (9, 0), **style)
ax.set(xlabel="GB read for a token of PaliGemma 3B", ylabel="tokens a second")
ax.set(xlim=(1, 7.6), ylim=(0, 1.1 * best / 1e9))
ax.legend(fontsize=8)
save_figure(fig, "22_roofline")

# %% [markdown]
# What to notice: bytes are a promise, and the kernel keeps it or not. A point below the line waits for its
# **core**: unpacking is work. Four bits are well ahead all the same. How much eight bits gain over sixteen
# differs between processors; they always take half the memory. Where more cores share a memory, the lower
# points climb.
#
# ### Why two ways through a layer
#
# The same matrix with more and more rows, each way forced.

# %% tags=["nbval-ignore-output"]
torch.set_num_threads(1)
fig, axes = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained", sharey=True)
counts, styles = (
    [1, 2, 4, 8, 16, 64, 256],
    {"kernel": "language", "chunks": "vision", "bfloat16": "muted"},
)
for ax, mode in zip(axes, MODES):
    times, layer = {name: [] for name in styles}, MODES[mode](2048, 4096, dtype=torch.bfloat16)
    part = copy.deepcopy(dense.weight[:4096])
    layer.qweight.random_(), layer.scales.fill_(0.01)
    for rows in counts:
        x = torch.randn(rows, 2048).bfloat16()
        ways = {"kernel": layer.kernel, "chunks": layer, "bfloat16": lambda x: x @ part.T}
        layer.few = 0  # calling the layer now goes through chunks
        for name, way in ways.items():
            times[name].append(1e3 * seconds(lambda way=way, x=x: way(x), 3))
    for name, colour in styles.items():
        ax.plot(counts, times[name], "o-", color=COLOURS[colour], label=name, markersize=4)
    ax.axvline(type(layer).few, color=COLOURS["ink"], lw=0.7, ls=":")
    ax.set(xscale="log", yscale="log", title=mode, xlabel="rows", xticks=counts, xticklabels=counts)
    ax.minorticks_off()
axes[0].set_ylabel("ms")
axes[0].legend(fontsize=8)
torch.set_num_threads(threads)
save_figure(fig, "22_rows")

# %% [markdown]
# What to notice: the kernel starts lowest and rises with every row; the chunks start high, at the price of
# unpacking, and hardly rise. The layer changes over at the dotted line. For many
# rows few bits bring **nothing**: prefill does not get faster.

# %% [markdown]
# ## A bug people really make: the scale of the wrong side
#
# A colleague writes the quantiser from memory. The largest number "along the dimension": `amax(0)`. Our
# `q_proj` is square, so all shapes fit and nothing complains. He checks that codes times scale gives the
# weight back, and it does.


# %%
def quantize_colleague(weight):
    scales = weight.abs().amax(0) / 127  # one for each column
    return (weight / scales).round().to(torch.int8), scales


q_proj = exact.language_model.layers[0].self_attn.q_proj.weight
codes, scales = quantize_colleague(q_proj)
print("square:", list(q_proj.shape))
print(f"codes · scales, his check: error {100 * relative(codes * scales, q_proj):.2f} %")
x = torch.randn(8, q_proj.shape[1])
layer = Int8Linear(q_proj.shape[1], len(q_proj), dtype=torch.float32)
layer.qweight, layer.scales = codes, scales
print(f"in the layer: output off by {100 * relative(layer(x), x @ q_proj.T):.0f} %")

# %% [markdown]
# Before you read on: why does his check pass?
#
# Because it undoes its own mistake: he divides by a scale per *column* and multiplies by it again. The layer
# multiplies after the sum over columns, where only a scale per **row** can be taken out of the sum. The check
# that counts compares *outputs*, with an input that is not all ones, and with a matrix that is not square.

# %%
for make in (quantize_colleague, lambda w: quantize_int8(w, torch.float32)):
    k_proj = exact.language_model.layers[0].self_attn.k_proj.weight  # not square
    codes, scales = make(k_proj)
    try:
        error = relative((x @ codes.float().T) * scales, x @ k_proj.T)
        print(f"not square: output off by {100 * error:.1f} %")
    except RuntimeError:
        print("not square: the shapes do not fit, and the bug is found")

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): bits, all included
#
# How many bits does a weight take, scales and zeros included, all of them in bfloat16?
# (a) int4 in groups of 32, scale and zero; (b) int4 in groups of 128, scale and zero; (c) int4 in groups of 64,
# a scale only; (d) int8, one scale for a row of 2048.

# %% tags=["exercise"]
bits = [None] * 4  # your answer


# %% tags=["check"]
def test_1(bits):
    assert len(bits) == 4 and None not in bits, "four numbers"
    for name, value, (code, group, extra) in zip(
        "abcd", bits, ((4, 32, 2), (4, 128, 2), (4, 64, 1), (8, 2048, 1))
    ):
        assert abs(value - (code + 16 * extra / group)) < 1e-3, f"({name}): extra bits / group size"


check(test_1, bits)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Each bfloat16 number has 16 bits, which the weights of its group share.
#
# </details>

# %% tags=["solution"]
bits = [5.0, 4.25, 4.25, 8 + 16 / 2048]
check(test_1, bits)

# %% [markdown]
# ### Exercise 2 (fill in): and back
#
# Undo `quantize_int4`: from codes and scales make the weight as it acts, `float32[N, K]`. Scales are
# `float[N, K / g, 2]`: scale and zero.


# %% tags=["exercise"]
def dequantize_int4(codes, scales):
    return None  # float32[N, K]


# %% tags=["check"]
def test_2(dequantize_int4):
    torch.manual_seed(0)
    for n, k, g in ((3, 64, 32), (5, 256, 64)):
        weight = torch.randn(n, k) + 0.3
        codes, scales = quantize_int4(weight, g)
        value = dequantize_int4(codes, scales)
        assert value is not None and value.shape == (n, k), "expected float32[N, K]"
        assert value.dtype == torch.float32, "compute in float32"
        error = relative(value, weight)
        assert error < 0.12, f"off by {100 * error:.0f} %: 8 is subtracted from unsigned codes?"


check(test_2, dequantize_int4)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `codes` are unsigned: 3 − 8 would be 251. Make them float first. `repeat_interleave(g, 1)` gives every
# weight its group's numbers, and $g$ is K divided by the number of groups.
#
# </details>


# %% tags=["solution"]
def dequantize_int4(codes, scales):
    group = codes.shape[1] // scales.shape[1]
    scale, zero = scales.float().repeat_interleave(group, 1).unbind(-1)
    return (codes.float() - 8) * scale + zero


check(test_2, dequantize_int4)

# %% [markdown]
# ### Exercise 3 (break): a row that eight bits ruin
#
# Find a row of 64 weights of which `quantize_int8` keeps **one** and turns all others to zero, though none of
# them is zero. Then see what groups of 32 in 4 bits make of the half without the outlier.


# %% tags=["exercise"]
def bad_row():
    return None  # float32[64]


# %% tags=["check"]
def test_3(bad_row):
    row = bad_row()
    assert row is not None and row.shape == (64,), "64 numbers"
    assert (row != 0).all(), "no weight may be zero"
    codes, _ = quantize_int8(row[None])
    assert int((codes != 0).sum()) == 1, f"{int((codes != 0).sum())} codes are not zero"
    codes, scales = quantize_int4(row[None], 32)
    kept = dequantize_int4(codes, scales)[0]
    errors = [relative(kept[half], row[half]) for half in (slice(0, 32), slice(32, 64))]
    assert min(errors) < 0.2, "one half should be fine in groups: only one outlier"


check(test_3, bad_row)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A code is zero when the weight is less than half a step, which is a 254th of the largest.
#
# </details>


# %% tags=["solution"]
def bad_row():
    row = torch.linspace(0.5, 1.0, 64)
    row[0] = 300.0
    return row


check(test_3, bad_row)

# %% [markdown]
# ## Summary
#
# - A token costs the bytes it reads: fewer bits a weight, more tokens a second, if the kernel keeps up.
# - A code is a weight divided by a scale, rounded; the error is half a step at most.
# - The fewer share a scale, the less one outlier hurts: a row for 8 bits, 32 to 128 neighbours with their
#   own zero for 4.
# - Few rows: read packed. Many rows: unpack and multiply. Prefill gains nothing.
# - Check outputs, not weights.

# %% [markdown]
# ## Quiz
#
# **1.** Why is the head quantised and the embedding not, though they are the same matrix?
#
# <details><summary>Answer</summary>
#
# For each token the head reads all 257,216 rows, the embedding one. Time is saved only where bytes are read.
# The exact rows stay on disk and are mapped, so those that nobody looks up take no memory either.
#
# </details>

# %% [markdown]
# **2.** A batch of 64 prompts is decoded together. How much faster does int8 make it?
#
# <details><summary>Answer</summary>
#
# Hardly at all. Each weight that is read now serves 64 rows, so arithmetic is the bottleneck, and it is
# done in bfloat16 as before. What remains is the smaller memory.
#
# </details>

# %% [markdown]
# **3.** Someone halves the int4 groups from 64 to 32. What happens to error, memory and speed?
#
# <details><summary>Answer</summary>
#
# The error falls by about an eighth. A weight takes 5 bits instead of 4.5, so memory grows by a ninth, and
# decoding, which waits for memory, slows down by about as much.
#
# </details>

# %% [markdown]
# ## References
#
# - Tim Dettmers et al., *LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale*, 2022, sections 2
#   and 4 (scales for rows; outliers).
# - Tim Dettmers, Luke Zettlemoyer, *The case for 4-bit precision*, 2023 (bits against accuracy).
# - Elias Frantar et al., *GPTQ*, 2022; Ji Lin et al., *AWQ*, 2023 (what large models need beyond rounding).
# - PyTorch: `aten/src/ATen/native/cpu/int8mm_kernel.cpp` and `int4mm_kernel.cpp`, the two kernels.

# %% [markdown] tags=["navigation"]
# [← Segmentation](21_segmentation.ipynb) | [contents](00_overview.ipynb) | [Inference →](24_inference.ipynb)
