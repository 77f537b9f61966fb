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
# [← Segmentation](21_segmentation.ipynb) | [contents](00_overview.ipynb) | [Inference →](24_inference.ipynb)

# %% [markdown]
# # 22 · Quantization: how few bits can a weight have?
#
# *60 minutes* · part IV, Answering
#
# **What you will be able to do**
#
# - round a matrix to 8 or 4 bits with a pencil, and say what each rounding can cost;
# - choose where a scale belongs: one for the matrix, for a row, for 32 neighbours;
# - pack two weights into a byte and multiply with them without unpacking;
# - compute from bytes alone how fast a model can write.

# %% tags=["map"]
from paligemma.support.course_map import model_map

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

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from paligemma.model import PaliGemma
from paligemma.support.files import shorten

# %% tags=["setup"]
import copy
import tempfile
import time
from importlib import resources
from pathlib import Path
from itertools import pairwise, zip_longest

import matplotlib.pyplot as plt

from safetensors.torch import load_file, save_file

from paligemma.checkpoint import load_model
from paligemma.generation import generate
from paligemma.model import PaliGemmaConfig
from paligemma.plotting import show_heatmap
from paligemma.processor import Processor
from paligemma.support.course import check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS

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
# Vectorised it is two lines.


# %%
#| export
def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row to whole numbers from -127 to 127 times a scale of its own.

    Args:
        weight: `float[N, K]`, one row for each output.

    Returns:
        codes `int8[N, K]` and scales `float32[N]`; weight ≈ codes · scales[:, None].
    """
    weight = weight.float()
    scales = (weight.abs().amax(1) / 127).clamp(min=1e-30)  # a row of zeros: any scale will do
    return (weight / scales[:, None]).round().to(torch.int8), scales


# %%
codes, scales = quantize_int8(W)
assert torch.equal(codes, slow[0])
torch.testing.assert_close(scales, slow[1])
error = (codes * scales[:, None] - W).abs() / scales[:, None]
print(f"as the loop; largest error {error.max():.2f} steps")
assert error.max() <= 0.5001

# %% [markdown]
# ### The layer is one line
#
# Now a linear layer with such a weight. Its `forward` is one line, and it takes the place of every
# linear layer in the tiny model's decoder.


# %%
class SimpleInt8(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.codes, self.scales = quantize_int8(linear.weight)

    def forward(self, x):
        return x @ self.codes.to(x.dtype).T * self.scales


def caption(model):
    batch = processor([sample_picture("scene")], ["caption en"])
    ids = generate(model, batch["input_ids"], batch["pixel_values"])
    return processor.decode(ids[0])


model, processor = load_model(TINY), Processor.from_pretrained(TINY)
simple = copy.deepcopy(model)
for name, layer in list(simple.language_model.named_modules()):
    if isinstance(layer, nn.Linear):
        parent, _, child = name.rpartition(".")
        setattr(simple.language_model.get_submodule(parent), child, SimpleInt8(layer))
print("32 bits:", caption(model))
print(" 8 bits:", caption(simple))
assert caption(simple) == caption(model)

# %% [markdown]
# That is the whole idea, and it works. What is missing? The *head*, a fifth of the bytes. Fewer bits than
# eight. And speed: `codes.to(x.dtype)` writes the large matrix out again before each product, so it reads more
# than before, not less. The rest of this lesson is about these three.

# %% [markdown]
# ## Where do real weights lie?
#
# Here is one row of the tiny model's first down-projection: 32 neighbouring weights as dots, and below
# them the values that each scheme can represent.

# %%
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
sizes, mean_error = (16, 32, 64, 128), {}
for bits, colour in ((3, "accent"), (4, "language"), (5, "together")):
    for g in sizes:
        mean_error[bits, g] = sum(relative(fake(w, bits, g), w) for w in layers) / len(layers)
    cost, errors = [bits + 32 / g for g in sizes], [mean_error[bits, g] for g in sizes]
    ax.plot(cost, errors, "o-", color=COLOURS[colour], label=f"{bits} bits, groups of 128 … 16")
    print(bits, "bits:", [f"{c:.2f} → {100 * e:.1f} %" for c, e in zip(cost, errors)])
ax.set(xlabel="bits a weight, scales included", ylabel="error / weight", ylim=(0, None))
ax.legend(fontsize=8)
assert all(
    0.4 < mean_error[bits + 1, g] / mean_error[bits, g] < 0.6 for bits in (3, 4) for g in sizes
)
assert 0.8 < mean_error[4, 32] / mean_error[4, 64] < 0.95, "half a bit more: an eighth less"
save_figure(fig, "22_bits")

# %% [markdown]
# One bit more halves the error. Half a bit spent on groups of 32 instead of 64 takes an eighth off it: that is
# less. Eight bits need no groups.
#
# ## The module, part two: four bits
#
# For each group 16 values from its least weight to its greatest. `fake` above, kept as codes: the kernel
# that we are going to use wants the value of code 8 as "zero".


# %%
#| export
def quantize_int4(weight: torch.Tensor, group_size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each group of a row to 16 evenly spaced values, from its least to its greatest.

    Args:
        weight: `float[N, K]`, K a multiple of the group size.
        group_size: neighbours along the input that share a scale and a zero.

    Returns:
        codes `uint8[N, K]`, 0 to 15, and `float32[N, K / group_size, 2]`, scale and zero;
        weight ≈ (codes - 8) · scale + zero.
    """
    groups = weight.float().unflatten(1, (-1, group_size))  # (N, K/g, g)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / 15).clamp(min=1e-30)  # all equal: the zero says it all
    codes = ((groups - low[..., None]) / scales[..., None]).round()
    return codes.to(torch.uint8).flatten(1), torch.stack([scales, low + 8 * scales], -1)


# %%
for g in (32, 64, 128):
    errors = []
    for w in layers:
        codes, scales = quantize_int4(w, g)
        step, zero = scales.repeat_interleave(g, 1).unbind(-1)
        back = (codes.float() - 8) * step + zero
        torch.testing.assert_close(back, fake(w, 4, g), rtol=0, atol=1e-5)
        errors.append(relative(back, w))
    mean_error[4, g] = sum(errors) / len(errors)
    print(f"groups of {g:3}: {4 + 32 / g:.2f} bits a weight, error {100 * mean_error[4, g]:.1f} %")

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
    """Rows in a block of this processor's int4 kernel; None: in an order that we do not know."""
    codes = (torch.arange(64, device="cpu")[:, None] + 7 * torch.arange(32, device="cpu")) % 16
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    except (RuntimeError, AttributeError):  # private names: another PyTorch may have others
        return None
    return next((b for b in (64, 32) if torch.equal(pack_int4(codes.byte(), b), packed)), None)


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
CHUNK = 2**21  # weights that are taken out of their packing at a time: a few megabytes


class QuantizedLinear(nn.Module):
    """x·Wᵀ + bias with W in few bits.

    Few rows in bfloat16 on a CPU (decoding) go to a kernel that reads the packed weights. In all
    other cases a chunk of W after another is unpacked and multiplied as usual: for many rows
    (prefill), in other types and on other devices that is faster.

    Args:
        in_features, out_features: int K and N.
        bias: does it have one.
        dtype: of scales, bias and inputs.
        multiple: K is filled up with zeros to a multiple of this.
    """

    few: int = 0  # most rows for which the kernel is faster
    group_size: int = 64  # int8 has no groups
    block: int = 64  # nor blocks
    qweight: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, in_features, out_features, bias=False, dtype=None, multiple=1):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.fill = -in_features % multiple
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype) if bias else None)

    @classmethod
    def from_weight(cls, weight: torch.Tensor, bias=None, group_size: int = 64):
        """Quantise `float[N, K]`, a chunk at a time; on the meta device there are only shapes.

        Raises:
            ValueError: the weight holds NaN or infinity.
        """
        n, k = weight.shape
        new = cls(k, n, bias is not None, weight.dtype, group_size).to(weight.device)
        new.bias = None if bias is None else bias.detach()
        for part in [] if weight.is_meta else new.chunks():
            rows = weight[part].float()
            if not bool(rows.isfinite().all()):
                raise ValueError("the weight holds NaN or infinity; check the checkpoint")
            missing = new.qweight[part].shape[0] - rows.shape[0]
            new.set_rows(part, F.pad(rows, (0, new.fill, 0, missing)))
        return new

    def chunks(self) -> list[slice]:
        """W's rows in slices of a few megabytes, and of whole blocks."""
        step = max(64, CHUNK // self.in_features // 64 * 64)
        return [slice(i, i + step) for i in range(0, self.qweight.shape[0], step)]

    def set_rows(self, part: slice, weight: torch.Tensor) -> None:
        """Quantise `float32[n, K]` into one slice."""
        raise NotImplementedError

    def kernel(self, rows: torch.Tensor) -> torch.Tensor:
        """`bfloat16[M, K]` → `bfloat16[M, N]`, straight from the codes."""
        raise NotImplementedError

    def multiply(self, rows: torch.Tensor, part: slice) -> torch.Tensor:
        """`float[M, K]` → `float[M, n]`, the outputs of one slice."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`float[…, K]` → `float[…, N]`."""
        rows = F.pad(x.reshape(-1, self.in_features), (0, self.fill))  # (M, K)
        learning = torch.is_grad_enabled() and x.requires_grad  # the kernels have no gradient
        fits = rows.device.type == "cpu" and rows.dtype == self.scales.dtype == torch.bfloat16
        if fits and 0 < rows.shape[0] <= self.few and not learning:
            y = self.kernel(rows.contiguous())
        else:
            y = torch.cat([self.multiply(rows, part) for part in self.chunks()], 1)
        y = y[:, : self.out_features].reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


# %% [markdown]
# With eight bits a chunk is the one line from above:


# %%
#| export
class Int8Linear(QuantizedLinear):
    """Eight bits a weight and one scale for each output."""

    few = 8

    def __init__(self, in_features, out_features, bias=False, dtype=None, group_size=None):
        # PyTorch's kernel reads 16 columns at a time, also where fewer are left.
        super().__init__(in_features, out_features, bias, dtype, multiple=16)
        codes = torch.empty(out_features, in_features + self.fill, dtype=torch.int8)
        self.register_buffer("qweight", codes)
        self.register_buffer("scales", torch.empty(out_features, dtype=dtype))

    def set_rows(self, part: slice, weight: torch.Tensor) -> None:
        self.qweight[part], self.scales[part] = quantize_int8(weight)

    def kernel(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int8pack_mm(rows, self.qweight, self.scales)

    def multiply(self, rows: torch.Tensor, part: slice) -> torch.Tensor:
        # Whole numbers up to 127 are exact in every float type.
        return rows @ self.qweight[part].to(rows.dtype).T * self.scales[part].to(rows.dtype)


# %% [markdown]
# With four bits it first takes the two codes of each byte apart. A block of packed rows lies column by column, so
# what comes out is Wᵀ.


# %%
#| export
class Int4Linear(QuantizedLinear):
    """Four bits a weight; a scale and a zero for each group along the input."""

    def __init__(self, in_features, out_features, bias=False, dtype=None, group_size=64):
        super().__init__(in_features, out_features, bias, dtype, multiple=group_size)
        n, k = out_features + -out_features % 64, in_features + self.fill  # whole blocks
        self.group_size, self.block = group_size, kernel_block() or 64
        self.few = 64 if kernel_block() else 0
        self.register_buffer("qweight", torch.empty(n, k // 2, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(k // group_size, n, 2, dtype=dtype))

    def set_rows(self, part: slice, weight: torch.Tensor) -> None:
        codes, scales = quantize_int4(weight, self.group_size)
        self.qweight[part] = pack_int4(codes, self.block)
        self.scales[:, part] = scales.transpose(0, 1)

    def kernel(self, rows: torch.Tensor) -> torch.Tensor:
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return multiply(rows, self.qweight, self.group_size, self.scales)

    def multiply(self, rows: torch.Tensor, part: slice) -> torch.Tensor:
        groups, block = self.scales.shape[0], self.block
        pairs = self.qweight[part].view(-1, groups, self.group_size, block // 2)
        codes = torch.cat([pairs & 15, pairs >> 4], -1).view(torch.int8) - 8  # (n/b, K/g, g, b)
        scales = self.scales[:, part].unflatten(1, (-1, block)).permute(3, 1, 0, 2)
        # One addcmul rounds once; it is twice as fast when scale and zero lie contiguously.
        scale, zero = scales[:, :, :, None].to(rows.dtype).contiguous()  # (n/b, K/g, 1, b) each
        weight = torch.addcmul(zero, codes.to(rows.dtype), scale).flatten(1, 2)  # (n/b, K, b)
        return rows @ weight.transpose(0, 1).flatten(1)  # Wᵀ: (K, n)


# %% [markdown]
# The kernels have edges that no error message tells. The int8 kernel takes 16 columns at a time; given 40,
# it reads 8 that are not there, and returns garbage or crashes. In float32 both kernels are slow. Neither
# has a gradient. So the layer fills up its columns with zeros, and uses a kernel only where it is right
# *and* fast.


# %%
def acting(layer):
    """The weight of a layer without bias as it acts: what it makes of the rows of a unit matrix."""
    return copy.deepcopy(layer).float()(torch.eye(layer.in_features)).T


torch.manual_seed(0)
weight = torch.randn(70, 40)  # neither is a multiple of 16
for kind in (Int8Linear, Int4Linear):
    layer = kind.from_weight(weight.bfloat16(), group_size=32)
    for rows in (1, 100):
        x = torch.randn(rows, 40).bfloat16()
        expected = x.float() @ acting(layer).T
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
codes, scales = quantize_int8(w)
zeros = torch.zeros(len(w), dtype=torch.int32)
theirs = torch.fake_quantize_per_channel_affine(w, scales, zeros, 0, -127, 127)
gap = (codes * scales[:, None] - theirs).abs().max().item()
print(f"rounding: {gap:.1e}")
assert gap <= 1e-6
for kind in (Int8Linear, Int4Linear):
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        layer = kind.from_weight(w.to(dtype), group_size=32)
        x = torch.randn(4, w.shape[1]).to(dtype)
        gap = relative(layer(x).float(), F.linear(x.float(), acting(layer)))
        assert gap <= most
        print(f"{kind.__name__}, {str(dtype)[6:]:8} differs from F.linear by less than {most:.0e}")

# %% [markdown]
# ## The whole model
#
# Which layers? Those of the language model. The vision tower runs once a picture, on many rows: few bits save
# it memory, no time. It stays, but takes eight beside four bits, where it would be a third. Of the
# embedding a prompt reads few rows; it stays exact, and the **head** gets a quantised copy.
#
# The tied weights meet in the head: [`GemmaModel.head`](12_gemma.ipynb), when it is set, takes the embedding's
# place there, in Gemma 2 too.


# %%
#| export
def check_one_type(model: nn.Module) -> None:
    """Weights and scales of several float types cannot be multiplied with each other."""
    floats = {str(t.dtype)[6:] for t in model.state_dict().values() if t.is_floating_point()}
    if len(floats) > 1:
        raise ValueError(f"the weights are {' and '.join(sorted(floats))}; give one dtype for all")


MODES = {"int8": Int8Linear, "int4": Int4Linear}
GROUP_SIZES = (32, 64, 128, 256)  # what the int4 kernel knows


@torch.no_grad()
def quantize_model(
    model: PaliGemma,
    mode: str = "int8",
    group_size: int = 64,
    dtype: torch.dtype | None = None,
) -> PaliGemma:
    """Quantise the linear layers of the language model, and a copy of the embedding as its head.

    The vision tower sees many rows once for each picture, where few bits save no time: it stays,
    except that beside four bits, where it would be a third of the memory, it takes eight.
    Projector and norms are small; of the embedding only the prompt's rows are read. They stay.

    Args:
        model: changed in place.
        mode: "int8" or "int4".
        group_size: for int4: 32, 64, 128 or 256.
        dtype: to compute in afterwards; None: the type of the weights, which have to have one.

    Returns:
        The same model.

    Raises:
        ValueError: an unknown mode or group size, a model that is quantised already, adapters
            that are not merged, weights of several types, or NaN. Only NaN is found on the way.
    """
    if mode not in tuple(MODES):
        raise ValueError(f"the mode is {shorten(mode)}; expected 'int8' or 'int4'")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {shorten(group_size)}; expected 32, 64, 128 or 256")
    if model.language_model.head is not None:
        raise ValueError("the model is quantised already; load the original weights again")
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("the model has adapters; call merge_lora first")
    if dtype is None:
        check_one_type(model)
    language, kind = model.language_model, MODES[mode]
    language.head = kind.from_weight(language.embed_tokens.weight, None, group_size)
    kinds = {"language_model": kind} | ({"vision_tower": Int8Linear} if mode == "int4" else {})
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and (part := name.split(".")[0]) in kinds:
            parent, _, child = name.rpartition(".")
            new = kinds[part].from_weight(layer.weight, layer.bias, group_size)
            setattr(model.get_submodule(parent), child, new)
    return model.to(dtype=dtype)


# %%
exact = model
models = {"float32": exact}
for mode in ("int8", "int4"):
    models[mode] = quantize_model(copy.deepcopy(exact), mode)
weights = sum(m.weight.numel() for m in exact.language_model.modules() if isinstance(m, nn.Linear))
weights += exact.language_model.embed_tokens.weight.numel()
bits_used = {}
for mode in ("int8", "int4"):
    state = models[mode].language_model.state_dict()
    size = sum(t.nbytes for n, t in state.items() if n.endswith(("qweight", "scales")))
    bits_used[mode] = 8 * size / weights
    print(f"{mode}: {bits_used[mode]:.2f} bits a weight of the language model")
assert 8 < bits_used["int8"] < 8.4 and 5 <= bits_used["int4"] < 5.4

# %% [markdown]
# (Here the scales are in float32, as the tiny model computes, so a group's two cost one bit a weight. In bfloat16
# and at full size it is 8.01 and 4.5.)
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
assert all(1.4 < b / a < 2.6 for a, b in pairwise(shift[:5]))
assert min(same[:2]) > max(same[3:5]) > max(same[5:]), "a slope"
print("words unchanged, 8 to 2 bits:", [f"{share:.0%}" for share in same])
save_figure(fig, "22_fewer_bits")

# %% [markdown]
# What to notice: from 8 bits down to 4 the logits' error about doubles with each bit that is taken, as the grid's
# step does. The answers go down a slope with it. Where two words are nearly tied, such as two neighbouring
# location words of a box, they change first.
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
together = 100 * shift[bits_tried.index(4)]
assert 0.6 < together / sum(s**2 for s in shifts) ** 0.5 < 1.5
harm = [shift_ / share for shift_, share in zip(shifts, shares)]  # for each per cent of the weights
assert sorted(kinds, key=dict(zip(kinds, harm)).get)[-2:] == ["k_proj", "v_proj"]
assert min(harm) == harm[-1]
save_figure(fig, "22_layers")

# %% [markdown]
# The errors are nearly independent: together they grow about like the root of the sum of squares. Compare the length of a
# bar with its share: keys and values are few, and a weight of theirs counts more than any other; the head is large,
# and a weight of it counts least. Some programs therefore leave attention at eight bits. In large models some
# *inputs* are outliers too; GPTQ and AWQ (references) weigh each weight by what flows through it.

# %% [markdown]
# ## Files: quantise once, map for ever
#
# A 3B checkpoint has 5.8 GB. Whoever quantises because memory is short must not need all of it. The weights are
# mapped ([lesson 16](16_checkpoint.ipynb)): a page comes into memory when it is read, and the system takes it back when it needs
# room. What is written anew are the codes.
#
# The codes can be saved, so that this is done once. Again the plain form first: write all tensors; make a model
# on the *meta device*, which has shapes and no numbers; quantise that, which gives it layers of the right
# shapes; put the tensors in.

# %%
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "int4.safetensors"
    save_file(models["int4"].state_dict(), file)
    with torch.device("meta"):
        again = quantize_model(PaliGemma(exact.config), "int4")
    again.load_state_dict(load_file(file), assign=True)
    size = file.stat().st_size, sum(t.nbytes for t in exact.state_dict().values())
assert torch.equal(again(**inputs).logits, models["int4"](**inputs).logits)
print(f"the same to the last bit; {size[0] / 1e6:.1f} MB instead of {size[1] / 1e6:.1f}")

# %% [markdown]
# What a real program adds is in [support/quantized.py](../paligemma/support/quantized.py): `config.json` says how the weights were made, so that
# no one takes codes for weights; a file from a processor with another order is repacked; each tensor has to
# find its place. `paligemma.load(path, quantize="int4")` uses it.

# %% [markdown]
# ## At full size
#
# One feed-forward matrix of the 3B model, 2048 × 16,384, times one row, on **one** core. We take processor
# time, which other programs disturb least, and several copies in turn: a single packed matrix would stay in
# the processor's cache and look too fast. The pace of the model is its bytes for each token, divided by the
# reading speed. For bfloat16 PyTorch has two products, oneDNN's and its own; which is faster depends on the processor.


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
    few, times, layer = (
        1,
        {name: [] for name in styles},
        MODES[mode](2048, 4096, dtype=torch.bfloat16),
    )
    part = copy.deepcopy(dense.weight[:4096])
    layer.qweight.random_(), layer.scales.fill_(0.01)
    for rows in counts:
        x = torch.randn(rows, 2048).bfloat16()
        ways = {"kernel": layer.kernel, "chunks": layer, "bfloat16": lambda x: x @ part.T}
        few, layer.few = layer.few or few, 0  # calling the layer now goes through chunks
        for name, way in ways.items():
            times[name].append(1e3 * seconds(lambda way=way, x=x: way(x), 3))
    for name, colour in styles.items():
        ax.plot(counts, times[name], "o-", color=COLOURS[colour], label=name, markersize=4)
    ax.axvline(few, color=COLOURS["ink"], lw=0.7, ls=":")
    ax.set(xscale="log", yscale="log", title=mode, xlabel="rows", xticks=counts, xticklabels=counts)
    ax.minorticks_off()
    assert times["chunks"][-1] > 0.9 * times["bfloat16"][-1], "many rows: never faster"
axes[0].set_ylabel("ms")
axes[0].legend(fontsize=8)
torch.set_num_threads(threads)
save_figure(fig, "22_rows")

# %% [markdown]
# What to notice: the kernel starts lowest and rises with every row; the chunks start high, at the price of
# unpacking, and hardly rise. The layer changes over at the dotted line. For many rows few bits save **no time**:
# the product is the same, and the unpacking comes on top. Prefill gets slower.

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
for make in (quantize_colleague, quantize_int8):
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
    kept = acting(Int4Linear.from_weight(row[None], group_size=32))[0]
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
# - Few rows: read packed. Many rows: unpack and multiply. Prefill gains no time.
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
# Not at all: it is slower. Each weight that is read now serves 64 rows, so arithmetic is the bottleneck, it is
# done in bfloat16 as before, and the weights have to be unpacked for it. What remains is the smaller memory.
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
