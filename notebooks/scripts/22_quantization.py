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
# [← Segmentation](21_segmentation.ipynb) | [contents](00_overview.ipynb) | [Compilation →](23_compilation.ipynb)

# %% [markdown]
# # 22 · Quantization: how few bits can a weight have?
#
# *50 minutes* · part IV, Answering
#
# **What you will be able to do**
#
# - round a matrix to 8 or 4 bits with a pencil, and say what each rounding can cost;
# - write an eight-bit layer in one line, and one that multiplies whole numbers only;
# - choose where a scale belongs: to the matrix, to a row, to 64 neighbours;
# - say when few bits save time and when they don't.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("quantization", "gemma")

# %% [markdown]
# ## Setup
#
# From earlier lessons: the model ([15](15_model.ipynb)), checkpoints ([16](16_checkpoint.ipynb)) and the token loop
# ([18](18_generation.ipynb)). The cells that begin with `#| export` become [quantization.py](../paligemma/quantization.py).

# %%
#| export
"""Weights in eight or four bits: a smaller model that decodes faster, because it reads less."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from paligemma.model import PaliGemma
from paligemma.support.arguments import check_quantization

# %% tags=["setup"]
import copy
import time
import timeit
from importlib import resources

import matplotlib.pyplot as plt

from paligemma.checkpoint import load_model
from paligemma.generation import generate
from paligemma.model import PaliGemmaConfig
from paligemma.plotting import show_heatmap
from paligemma.processor import Processor
from paligemma.support.course import add_to_class, check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS

TINY = resources.files("paligemma") / "assets" / "tiny"
_ = torch.manual_seed(21), torch.set_grad_enabled(False)  # we only answer; nothing is trained

# %% [markdown]
# ## The problem: one token, all weights
#
# To write one token, a model multiplies one row of numbers with **every** weight of its language part. The processor
# waits for memory ([lesson 18](18_generation.ipynb)), so the time of a token is the *bytes* of the weights divided by the memory's
# speed. Where are the bytes of PaliGemma 3B?

# %%
with torch.device("meta"):
    big = PaliGemma(PaliGemmaConfig()).language_model
sizes = {name: w.numel() for name, w in big.named_parameters() if "norm" not in name}
total = sum(sizes.values())
for part, key in {"attention": "self_attn", "MLP": "mlp", "head": "embed_tokens"}.items():
    count = sum(size for name, size in sizes.items() if key in name)
    print(f"{part:9} {count / 1e6:5.0f} million weights, {count / total:3.0%}")
print(f"read for each token, 16 bits each: {2 * total / 1e9:.2f} GB")
rates = [round(40e9 / (total * bits / 8)) for bits in (16, 8, 4)]
print("tokens a second from a memory of 40 GB/s, with 16, 8 and 4 bits:", rates)
assert rates == [8, 16, 32]

# %% [markdown]
# The processor may be as fast as it likes: only fewer bytes help. Storing numbers in fewer bits is called **quantisation**. How few can a weight have
# before the answers change?

# %% [markdown]
# ## By hand
#
# Four rows, four columns. We allow the whole numbers −7 … 7, which fit in four bits. A row's largest number has
# to become 7, so its **scale** is `largest / 7`. Divide, round: these are the **codes**.

# %%
W = torch.tensor(
    [[1.4, -0.7, 0.5, 0.0], [0.2, 0.9, -2.1, 0.4], [-7.0, 3.0, 1.0, 0.6], [0.05, -0.03, 0.07, 0.02]]
)

# %%
scales = W.abs().amax(1) / 7
codes = (W / scales[:, None]).round()
for scale, row in zip(scales, codes):
    print(f"scale {scale:.2f}  codes", row.int().tolist())

# %% [markdown]
# The first row: 1.4 / 7 = 0.2, then 0.5 / 0.2 = 2.5, which PyTorch rounds to the *even* neighbour 2. Back:
# codes times scale.

# %%
back = codes * scales[:, None]
error = (back - W).abs()
assert (error <= scales[:, None] / 2 + 1e-6).all(), "half a step at most"
assert back[2, 3] == 1 and not W[3].round().any(), "0.6 became 1; in whole steps row 3 would vanish"

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 3, figsize=(8.4, 2.6), layout="constrained")
show_heatmap(W, "weights", annotate=".2f", centre=0, ax=axes[0])
show_heatmap(codes, "codes (4 bits each)", annotate=".0f", centre=0, ax=axes[1])
show_heatmap(back - W, "error", annotate=".2f", centre=0, ax=axes[2])
fig

# %% [markdown]
# What to notice: each error is at most **half a step** of its own row. The third row's −7 makes its step large: the 0.6
# became 1. With one scale for the whole matrix (1.0) the last row would have become 0.
#
# And a product never needs `back`: $y_i = s_i \sum_j c_{ij} x_j$. The scale is applied once, after the sum.

# %%
x = torch.tensor([1.0, 2.0, 0.5, -1.0])
y = (codes @ x) * scales
print("exact    ", [round(v, 3) for v in (W @ x).tolist()])
print("quantised", [round(v, 3) for v in y.tolist()])
torch.testing.assert_close(y, back @ x)

# %% [markdown]
# ## As a loop, with eight bits
#
# The same with −127 … 127, which a byte holds (**int8**), one row the plainest way.


# %%
def quantize_row(row):
    scale = max(abs(value) for value in row) / 127
    return [round(value / scale) for value in row], scale


for row in W.tolist():
    print(quantize_row(row)[0])

# %% [markdown]
# ## Vectorised
#
# Two lines. (Given a row of zeros, the loop would divide by zero.)


# %%
#| export
def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row to whole numbers from -127 to 127 times a scale of its own.

    Args:
        weight: `float[out, in]`, one row for each output; or what a layer is given, `[rows, in]`.

    Returns:
        codes `int8[out, in]` and scales `float32[out]`; weight ≈ codes · scales[:, None].
    """
    largest = weight.abs().amax(1).float()
    scales = (largest / 127).clamp(min=1e-30)  # a row of zeros: any scale will do
    return (weight / scales[:, None]).round_().to(torch.int8), scales


# %%
codes, scales = quantize_int8(W)
assert codes.tolist() == [quantize_row(row)[0] for row in W.tolist()]
steps = (codes * scales[:, None] - W).abs() / scales[:, None]
print(f"as the loop; largest error {steps.max():.2f} steps")
assert steps.max() <= 0.5001

# %% [markdown]
# ## The layer is one line
#
# A linear layer with such a weight: `forward` is the product from above.


# %%
class SimpleInt8(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.codes, self.scales = quantize_int8(linear.weight)

    def forward(self, x):
        return x @ self.codes.to(x.dtype).T * self.scales


# %% [markdown]
# And a function that puts another layer in the place of every linear one:


# %%
#| export
def replace_linears(module: nn.Module, new: Callable[[nn.Linear], nn.Module]) -> None:
    """Put `new(layer)` in the place of each linear layer inside a module."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, new(layer))


# %% [markdown]
# Does the tiny model still answer? The course's three scenes, four questions each:

# %%
exact, processor = load_model(TINY), Processor.from_pretrained(TINY)
SCENES = ["scene", "scene2", "scene3"]
QUESTIONS = ["caption en", "answer en how many dogs are there?", "answer en is there a cat?"]
QUESTIONS.append("detect dog ; bee ; rocket")
pictures = [sample_picture(scene) for scene in SCENES for _ in QUESTIONS]
batch = processor(pictures, QUESTIONS * len(SCENES))
inputs = {name: batch[name] for name in ("input_ids", "pixel_values", "attention_mask")}


# %%
def ask(model):
    ids = generate(model, **inputs, max_new_tokens=16)
    return F.pad(ids, (0, 16 - ids.shape[1]))  # [12, 16]


simple = copy.deepcopy(exact)
replace_linears(simple.language_model, SimpleInt8)
before, after = ask(exact), ask(simple)
print([processor.decode(ids) for ids in after[:3]])
assert torch.equal(after[:3], before[:3])

# %% [markdown]
# That is the whole idea. Three things are missing: fewer bits than eight; the *head*, a fifth of the bytes; and
# speed, because `codes.to(x.dtype)` writes the large matrix out again before each product.
#
# ## Both sides in whole numbers
#
# Processors multiply bytes faster than other numbers. So let x have codes, too, and a scale $t_r$ for each of its rows, made
# when the row comes: $y_{ri} = t_r s_i \sum_j a_{rj} c_{ij}$.

# %%
a, t = quantize_int8(x[None])
c, s = quantize_int8(W)
whole = a.int() @ c.int().T  # not a fraction anywhere
print("codes of x", a.tolist(), " whole sums", whole.tolist())
both = whole * t[:, None] * s
print("both sides", [round(v, 3) for v in both[0].tolist()])
assert (both - W @ x).abs().max() < 0.12

# %% [markdown]
# Is a scale for a row enough? We look at what the layers of the tiny model are given by our twelve questions, and round it
# in three ways.

# %%
given = {}
hooks = [
    layer.register_forward_hook(lambda layer, args, _: given.update({layer: args[0].flatten(0, 1)}))
    for layer in exact.language_model.layers.modules()
    if isinstance(layer, nn.Linear)
]
_ = exact(**inputs), [hook.remove() for hook in hooks]


# %%
def back_from_codes(rows):
    codes, scales = quantize_int8(rows)
    return codes * scales[:, None]


def relative(approximate, exact):
    return float((approximate - exact).norm() / exact.norm())


# %%
WAYS = ["weights only", "x too, a scale for each row", "x too, one scale for all rows"]
costs = {}
for name, layer in exact.language_model.layers[1].named_modules():
    if isinstance(layer, nn.Linear):
        x, w, y = given[layer], back_from_codes(layer.weight), layer(given[layer])
        step = x.abs().max() / 127
        rounded_x = [x, back_from_codes(x), (x / step).round() * step]
        costs[name.split(".")[-1]] = [relative(each @ w.T, y) for each in rounded_x]
assert all(only < row < one for only, row, one in costs.values())
only, row, one = costs.pop("down_proj")
largest = max(max(cost) for cost in costs.values())
assert largest < 0.015 < row < 0.03 < 0.07 < one

# %% tags=["hide-input"]
costs["down_proj"] = [only, row, one]
fig, ax = plt.subplots(figsize=(7.4, 2.8), layout="constrained")
for i, (way, colour) in enumerate(zip(WAYS, ("ink", "language", "bad"))):
    heights = [100 * cost[i] for cost in costs.values()]
    places = [place + 0.26 * (i - 1) for place in range(len(costs))]
    ax.bar(places, heights, 0.24, color=COLOURS[colour], label=way)
ax.set_xticks(range(len(costs)), list(costs))
ax.set_ylabel("error of the output, %")
ax.legend()
save_figure(fig, "22_activations")

# %% [markdown]
# What to notice: `down_proj`. Its inputs are products of two numbers ([lesson 08](08_geglu.ipynb)), so a few are very
# large. Such **outliers** stretch the scale of all who share it. With one scale for all rows its output would be off by
# more than 7 %; with a scale for each row a loud row harms only itself.

# %% [markdown]
# ## Where do real weights lie?
#
# Below: 32 neighbouring weights of the tiny decoder as dots, and the values that the codes can represent, three ways.

# %%
down = exact.language_model.layers[0].mlp.down_proj.weight
row = down[down.abs().amax(1).argsort()[len(down) // 2]]  # a middling row
group = row[:32]
low, high = group.aminmax()
steps = {"own zero and scale": (high - low) / 15}
steps |= {"scale of the row": row.abs().max() / 7, "one scale for all": down.abs().max() / 7}
assert 2 * steps["own zero and scale"] < steps["one scale for all"]

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(8, 2.6), layout="constrained")
ax.scatter(group, torch.full((32,), 3.0), s=22, color=COLOURS["ink"], zorder=3)
grids = [torch.linspace(low, high, 16)]
grids += [torch.arange(-7, 8) * steps[name] for name in list(steps)[1:]]
for y, values, colour in zip((2, 1, 0), grids, ("together", "language", "bad")):
    ax.vlines(values, y - 0.3, y + 0.3, color=COLOURS[colour], lw=1.3)
span = 1.15 * float(row.abs().max())
ax.set(xlim=(-span, span), ylim=(-0.6, 3.5), xlabel="value of a weight")
ax.set_yticks([3, 2, 1, 0], ["32 weights of a row", *(f"4 bits, {name}" for name in steps)])
ax.tick_params(left=False)
save_figure(fig, "22_grid")

# %% [markdown]
# What to notice: weights have outliers, too. A few large ones *elsewhere* stretch the grid for all, to more than twice the step.
# But a scale and a zero of one's own need room: at 16 bits each, a
# group of $g$ weights costs $4 + 32/g$ bits a weight. So we measure error against bits, on the tiny decoder.


# %%
def rounded(weight, bits, group):
    """Round to 2**bits evenly spaced values between the ends of each group, and back."""
    groups = weight.unflatten(1, (-1, group))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    return (((groups - low) / step).round() * step + low).flatten(1)


# %%
layers = [m.weight for m in exact.language_model.layers.modules() if isinstance(m, nn.Linear)]
errors = {}
for bits, g in ((3, 64), (4, 64), (4, 32), (5, 64)):
    errors[bits, g] = sum(relative(rounded(w, bits, g), w) for w in layers) / len(layers)
    print(f"{bits} bits + {32 / g:.1f} for groups of {g}: error {errors[bits, g]:.3f}")
assert all(0.4 < errors[b + 1, 64] / errors[b, 64] < 0.6 for b in (3, 4))
assert 0.85 < errors[4, 32] / errors[4, 64] < 0.9

# %% [markdown]
# One bit more halves the error. Half a bit spent on groups of 32 instead of 64 takes only an eighth off it.
#
# ## Four bits
#
# **int4** is `rounded` kept as codes: 16 values from a group's least weight to its greatest. The kernel that we are going
# to use wants the value of code 8 as the group's "zero".


# %%
#| export
def quantize_int4(weight: torch.Tensor, group_size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each group of a row to 16 evenly spaced values, from its least to its greatest.

    Args:
        weight: `float[out, in]`, `in` a multiple of the group size.
        group_size: neighbours along the input that share a scale and a zero.

    Returns:
        codes `uint8[out, in]`, 0 to 15, and scale and zero `float32[out, in / group_size, 2]`;
        weight ≈ (codes - 8) · scale + zero.
    """
    groups = weight.float().unflatten(1, (-1, group_size))  # [out, in / g, g]
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / 15).clamp(min=1e-30)  # all equal: the zero says it all
    codes = ((groups - low[..., None]) / scales[..., None]).round()
    return codes.to(torch.uint8).flatten(1), torch.stack([scales, low + 8 * scales], -1)


# %% [markdown]
# Again a layer of one line, but for taking the codes back to numbers:


# %%
class SimpleInt4(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.codes, self.scales = quantize_int4(linear.weight, 32)

    def forward(self, x):
        scale, zero = self.scales.repeat_interleave(32, 1).unbind(-1)
        return x @ ((self.codes.to(x.dtype) - 8) * scale + zero).T


# %%
unit = SimpleInt4(exact.language_model.layers[0].mlp.down_proj)(torch.eye(down.shape[1])).T
torch.testing.assert_close(unit, rounded(down, 4, 32), rtol=0, atol=1e-5)
simple = copy.deepcopy(exact)
replace_linears(simple.language_model, SimpleInt4)
print([processor.decode(ids) for ids in ask(simple)[:3]])
assert torch.equal(ask(simple)[:3], before[:3])

# %% [markdown]
# ## Two weights in a byte
#
# Memory knows no half bytes. Two codes share one: its low half and its high half.

# %%
byte = 3 | 5 << 4
print(f"3 and 5 in one byte: {byte}; taken apart: {byte & 15} and {byte >> 4}")

# %% [markdown]
# *Which* two matters to the processor: it wants to take a few bytes at once and get a block of rows side by side. So
# a row shares its bytes with the row half a block below. How long a block is differs between processors.


# %%
#| export
def pack_int4(codes: torch.Tensor, block: int = 64) -> torch.Tensor:
    """Two codes a byte, in the order that PyTorch's CPU kernel reads.

    A block of rows lies together, column by column; the high half of a byte is the code that
    stands block / 2 rows below that of the low half.

    Args:
        codes: `uint8[out, in]`, 0 to 15; `out` a multiple of the block.
        block: rows in a block, 64 for AVX-512 and 32 for AVX2.

    Returns:
        `uint8[out, in / 2]`, the bytes of all blocks one after another.
    """
    rows, columns = codes.shape
    low, high = codes.view(rows // block, 2, block // 2, columns).unbind(1)
    return (low | high << 4).transpose(1, 2).reshape(rows, columns // 2)


def unpack_int4(packed: torch.Tensor, block: int = 64) -> torch.Tensor:
    """The inverse of `pack_int4`: `uint8[out, in / 2]` → `uint8[out, in]`."""
    rows, half = packed.shape
    pairs = packed.view(rows // block, 2 * half, block // 2)
    return torch.cat([pairs & 15, pairs >> 4], -1).transpose(1, 2).reshape(rows, 2 * half)


# %%
small = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]], dtype=torch.uint8)  # 4 rows, 2 columns
packed = pack_int4(small, block=4)
print([f"{byte & 15} and {byte >> 4}" for byte in packed.flatten().tolist()])
assert torch.equal(unpack_int4(packed, block=4), small)

# %% [markdown]
# Column 0 first: rows 0 and 2, then rows 1 and 3. To learn this processor's order we let PyTorch pack some codes, and
# look:


# %%
#| export
@cache
def kernel_block() -> int | None:
    """Rows in a block of this processor's int4 kernel; None: in an order that we do not know."""
    codes = (torch.arange(64, device="cpu")[:, None] + 7 * torch.arange(32, device="cpu")) % 16
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    except (RuntimeError, AttributeError):  # private names: another PyTorch may have others
        return None
    return next((b for b in (64, 32) if torch.equal(pack_int4(codes.byte(), b), packed)), None)


# %% [markdown]
# ## The layer: few rows or many
#
# Decoding multiplies **one** row with W: the codes should be read as they lie, and PyTorch has kernels for that. Where
# none fits we turn the codes back into numbers, a chunk after another, and use the ordinary product. Four methods
# differ between eight and four bits:


# %%
#| export
CHUNK = 2**21  # weights that are taken out of their codes at a time: a few megabytes


class QuantizedLinear(nn.Module):
    """x·Wᵀ + bias with W in few bits.

    On a CPU a kernel multiplies with the codes as they lie. Where there is none for these rows
    (other devices, gradients, four bits and many rows) a chunk of W after another is turned back
    into numbers and multiplied as usual. `in_features` is filled up with zeros to a multiple of
    `multiple`; `dtype` is the type of scales, bias and inputs.
    """

    group_size: int = 64  # int8 has no groups
    block: int = 64  # nor blocks
    has_kernel: bool  # on this processor
    qweight: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    # Four methods differ:
    set_rows: Callable  # (slice, float32[rows, in]): quantise into this slice of the rows
    fits: Callable  # (float[rows, in]) → does the kernel take these rows?
    kernel: Callable  # (float[rows, in]) → float[rows, out], straight from the codes
    multiply: Callable  # (float[rows, in], slice) → the outputs of this slice

    def __init__(self, in_features, out_features, bias=False, dtype=None, multiple=1):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.fill = -in_features % multiple
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype) if bias else None)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


# %% [markdown]
# The two ways through the layer:


# %%
#| export
@add_to_class(QuantizedLinear)
def chunks(self) -> list[slice]:
    """W's rows in slices of a few megabytes, and of whole blocks."""
    step = max(64, CHUNK // self.in_features // 64 * 64)
    return [slice(i, i + step) for i in range(0, self.qweight.shape[0], step)]


@add_to_class(QuantizedLinear)
def forward(self, x: torch.Tensor) -> torch.Tensor:
    """`float[…, in]` → `float[…, out]`."""
    rows = F.pad(x.reshape(-1, self.in_features), (0, self.fill))
    learning = torch.is_grad_enabled() and x.requires_grad  # the kernels have no gradient
    if rows.device.type == "cpu" and len(rows) and not learning and self.fits(rows):
        y = self.kernel(rows.contiguous())
    else:
        y = torch.cat([self.multiply(rows, part) for part in self.chunks()], 1)
    y = y[:, : self.out_features].reshape(*x.shape[:-1], self.out_features)
    return y if self.bias is None else y + self.bias.to(y.dtype)


# %% [markdown]
# Making one goes by the same chunks, so that a weight of a gigabyte needs no second gigabyte in float32:


# %%
#| export
@add_to_class(QuantizedLinear)
@classmethod
def from_weight(cls, weight: torch.Tensor, bias=None, group_size: int = 64):
    """Quantise `float[out, in]`, a chunk at a time; on the meta device only shapes."""
    n_out, n_in = weight.shape
    new = cls(n_in, n_out, bias is not None, weight.dtype, group_size).to(weight.device)
    new.bias = None if bias is None else bias.detach()
    for part in [] if weight.is_meta else new.chunks():
        rows = weight[part].float()
        if not bool(rows.isfinite().all()):
            raise ValueError("the weight holds NaN or infinity; check the checkpoint")
        missing = new.qweight[part].shape[0] - rows.shape[0]
        new.set_rows(part, F.pad(rows, (0, new.fill, 0, missing)))
    return new


# %% [markdown]
# ### Eight bits
#
# PyTorch's product of bytes is called `_int_mm`. Older processors add two products in 16 bits, where $2 · 127 · 255$ has no
# room, and **no error tells**. So we let it multiply the worst case, and look.


# %%
#| export
@cache
def multiplies_bytes() -> bool:
    """Are products of int8 matrices fast here, and exact? (Older processors overflow 16 bits.)"""
    worst = torch.full((64, 64), 127, dtype=torch.int8, device="cpu")
    try:
        exact = bool((torch.ops.aten._int_mm(worst, worst) == 64 * 127**2).all())
    except (RuntimeError, AttributeError):  # a private name: another PyTorch may have another
        return False
    return exact and torch.backends.mkldnn.is_available()


# %% [markdown]
# The kernel is the formula from above, for some outputs at a time. A chunk is the one-line layer: x stays as it is.


# %%
#| export
PIECE = 2**18  # sums at a time: a megabyte, which stays in the processor's cache


class Int8Linear(QuantizedLinear):
    """Eight bits a weight and one scale for each output; the kernel rounds its input, too."""

    def __init__(self, in_features, out_features, bias=False, dtype=None, group_size=None):
        super().__init__(in_features, out_features, bias, dtype)
        codes = torch.empty(out_features, in_features, dtype=torch.int8)
        self.register_buffer("qweight", codes)
        self.register_buffer("scales", torch.empty(out_features, dtype=dtype))
        self.has_kernel = multiplies_bytes()

    def set_rows(self, part: slice, weight: torch.Tensor) -> None:
        self.qweight[part], self.scales[part] = quantize_int8(weight)

    def fits(self, x: torch.Tensor) -> bool:
        return self.has_kernel

    def kernel(self, x: torch.Tensor) -> torch.Tensor:
        codes, scales = quantize_int8(x)
        size, pieces = max(64, PIECE // len(x)), []
        for rows, own in zip(self.qweight.split(size), self.scales.split(size)):
            sums = torch.ops.aten._int_mm(codes, rows.T)  # int32[rows of x, size], exact
            pieces.append((sums * (scales[:, None] * own)).to(x.dtype))
        return torch.cat(pieces, 1)

    def multiply(self, x: torch.Tensor, part: slice) -> torch.Tensor:
        return x @ self.qweight[part].to(x.dtype).T * self.scales[part].to(x.dtype)


# %% [markdown]
# ### Four bits
#
# A chunk first takes the two codes of each byte apart. A block of packed rows lies column by column, so what comes
# out is Wᵀ.


# %%
#| export
FEW = 64


class Int4Linear(QuantizedLinear):
    """Four bits a weight; a scale and a zero for each group along the input."""

    def __init__(self, in_features, out_features, bias=False, dtype=None, group_size=64):
        super().__init__(in_features, out_features, bias, dtype, multiple=group_size)
        rows, columns = out_features + -out_features % 64, in_features + self.fill  # whole blocks
        self.group_size, self.block = group_size, kernel_block() or 64
        self.has_kernel = kernel_block() is not None
        self.register_buffer("qweight", torch.empty(rows, columns // 2, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(columns // group_size, rows, 2, dtype=dtype))

    def set_rows(self, part: slice, weight: torch.Tensor) -> None:
        codes, scales = quantize_int4(weight, self.group_size)
        self.qweight[part] = pack_int4(codes, self.block)
        self.scales[:, part] = scales.transpose(0, 1)

    def fits(self, x: torch.Tensor) -> bool:
        few = len(x) <= FEW  # for more rows chunks are faster
        return self.has_kernel and few and x.dtype == self.scales.dtype == torch.bfloat16

    def kernel(self, x: torch.Tensor) -> torch.Tensor:
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return multiply(x, self.qweight, self.group_size, self.scales)

    def multiply(self, x: torch.Tensor, part: slice) -> torch.Tensor:
        groups, block = self.scales.shape[0], self.block
        pairs = self.qweight[part].view(-1, groups, self.group_size, block // 2)
        codes = torch.cat([pairs & 15, pairs >> 4], -1).view(torch.int8) - 8  # [·, in/g, g, block]
        scales = self.scales[:, part].unflatten(1, (-1, block)).permute(3, 1, 0, 2)
        # One addcmul rounds once; it is twice as fast when scale and zero lie contiguously.
        scale, zero = scales[:, :, :, None].to(x.dtype).contiguous()  # [·, in/g, 1, block] each
        weight = torch.addcmul(zero, codes.to(x.dtype), scale).flatten(1, 2)  # [·, in, block]
        return x @ weight.transpose(0, 1).flatten(1)  # Wᵀ: [in, rows]


# %% [markdown]
# ## Against the reference
#
# PyTorch's own rounding, given our scales, makes our weights.

# %%
w = torch.randn(70, 40)
codes, scales = quantize_int8(w)
zeros = torch.zeros(len(w), dtype=torch.int32)
theirs = torch.fake_quantize_per_channel_affine(w, scales, zeros, 0, -127, 127)
torch.testing.assert_close(codes * scales[:, None], theirs, rtol=0, atol=1e-6)

# %% [markdown]
# And each layer gives what `F.linear` gives with the weight as it acts, whichever way the rows go.


# %%
def acting(layer):
    """The weight of a layer without bias as it acts: what it makes of the rows of a unit matrix."""
    return copy.deepcopy(layer).float()(torch.eye(layer.in_features)).T


# %%
for kind in (Int8Linear, Int4Linear):
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        layer = kind.from_weight(w.to(dtype), group_size=32)
        for rows in (1, 100):  # the kernel (in bfloat16), and chunks
            x = torch.randn(rows, 40, dtype=dtype)
            y = layer(x).float()
            if kind is Int8Linear and multiplies_bytes():
                x = back_from_codes(x)  # what the layer makes of its input
            assert relative(y, F.linear(x.float(), acting(layer))) <= most
        print(f"{kind.__name__}, {str(dtype)[6:]:8} differs from F.linear by less than {most:.0e}")

# %% [markdown]
# ## The whole model
#
# Which layers? Those of the language model, and the head, which gets a quantised copy of the embedding
# ([`GemmaModel.head`](12_gemma.ipynb)). The embedding itself stays exact, because a prompt reads few of its rows; so does the vision tower,
# which runs once a picture, on many rows. (Beside four bits it takes eight, to save memory.)


# %%
#| export
MODES = {"int8": Int8Linear, "int4": Int4Linear}


@torch.no_grad()
def quantize_model(
    model: PaliGemma, mode: str = "int8", group_size: int = 64, dtype: torch.dtype | None = None
) -> PaliGemma:
    """Quantise the linear layers of the language model, and a copy of the embedding as its head.

    Args:
        model: changed in place, and returned.
        mode: "int8" or "int4"; beside four bits the vision tower takes eight.
        group_size: for int4: 32, 64, 128 or 256.
        dtype: to compute in afterwards; None: the type of the weights, which have to have one.

    Raises:
        ValueError: an unknown mode or group size, a model that is quantised already, adapters
            that are not merged, weights of several types, or NaN. Only NaN is found on the way.
    """
    check_quantization(model, mode, group_size, one_type=dtype is None)
    language, kind = model.language_model, MODES[mode]
    language.head = kind.from_weight(language.embed_tokens.weight, None, group_size)
    replace_linears(language, lambda old: kind.from_weight(old.weight, old.bias, group_size))
    if mode == "int4":
        replace_linears(
            model.vision_tower, lambda old: Int8Linear.from_weight(old.weight, old.bias)
        )
    return model.to(dtype=dtype)


# %% [markdown]
# (`check_quantization` of [support/arguments.py](../paligemma/support/arguments.py) refuses what can't be quantised.) And the answers?

# %%
words = (before > 0) & (before < 1024)  # of the tiny tokenizer; its location tokens follow
locations = before >= 1024


def same(after, kind):
    return (after == before)[kind].float().mean().item()


# %% tags=["nbval-ignore-output"]
kept = {mode: ask(quantize_model(copy.deepcopy(exact), mode)) for mode in MODES}
for mode, after in kept.items():
    print(
        f"{mode}: same words {same(after, words):.0%}, same locations {same(after, locations):.0%}"
    )
assert same(kept["int8"], words) == 1 > same(kept["int8"], locations)
assert same(kept["int4"], words) > 0.85 and same(kept["int4"], locations) < 0.3

# %% [markdown]
# With eight bits not a word has changed, with four hardly one; but many of the location tokens have. (The codes can be saved and
# mapped again: [support/quantized.py](../paligemma/support/quantized.py).)
#
# ## See it: how few bits?
#
# We go down from 8 bits to 2, in groups of 32, and round the embedding too (so 8 bits here are not mode int8).


# %%
def with_bits(bits):
    model = copy.deepcopy(exact)
    for layer in model.language_model.modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            layer.weight.data = rounded(layer.weight, bits, 32)
    return model


# %%
kept, stayed = {}, {}
for bits in range(8, 1, -1):
    after = ask(with_bits(bits))
    kept[bits], stayed[bits] = same(after, words), same(after, locations)
    print(f"{bits} bits: same words {kept[bits]:4.0%}, same locations {stayed[bits]:3.0%}")
    assert bits < 6 or (after - before)[locations].abs().max() <= 11, "of 1,023"
assert all(kept[bits] > 0.95 > kept[3] > kept[2] for bits in (8, 7, 6, 5, 4)) and kept[2] < 0.6
assert min(stayed[8], stayed[7], stayed[6]) > 0.6 > 0.4 > stayed[5] > stayed[4]

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(6.4, 3.1), layout="constrained")
bits = torch.tensor(list(kept))
ax.bar(bits + 0.2, [*kept.values()], 0.38, color=COLOURS["language"], label="words unchanged")
label = "location tokens unchanged"
ax.bar(bits - 0.2, [*stayed.values()], 0.38, color=COLOURS["accent"], label=label)
ax.set(xlabel="bits a weight", ylabel="share", ylim=(0, 1.05), xticks=list(kept))
ax.invert_xaxis()
fig.legend(loc="outside upper center", ncols=2)
save_figure(fig, "22_fewer_bits")

# %% [markdown]
# What to notice: the words stay down to 4 bits, and fall below. The location tokens go first: each is a choice between
# neighbours that are nearly tied. Down to 6 bits they move by about a hundredth of the picture at most.

# %% [markdown]
# ## At full size: what it saves
#
# A quarter of an MLP matrix of the 3B model, 2048 × 4096, on **one** core. Few rows go through eight copies in turn: a
# single one would stay in the processor's cache and look too fast.


# %%
def milliseconds(ways, x):
    """Processor time of a product, the best of four rounds: the first one warms up."""
    once = lambda: [way(x) for way in ways]
    return 1e3 * min(timeit.repeat(once, timer=time.process_time, number=1, repeat=4)) / len(ways)


# %%
def wide(kind):
    layer = kind(2048, 4096, dtype=torch.bfloat16)
    layer.qweight.random_()  # speed does not ask what the weights are
    layer.scales.fill_(0.01)
    return layer


def in_chunks(layer):
    return lambda x: [layer.multiply(x, part) for part in layer.chunks()]


ways = {"16 bits": [nn.Linear(2048, 4096, bias=False, dtype=torch.bfloat16) for _ in range(8)]}
for mode, kind in MODES.items():
    layers = [wide(kind) for _ in range(8)]
    ways[f"{mode} kernel"] = [layer.kernel for layer in layers]
    ways[f"{mode} chunks"] = [in_chunks(layer) for layer in layers]

# %% tags=["nbval-ignore-output"]
threads = torch.get_num_threads()
torch.set_num_threads(1)
COUNTS, times = (1, 8, 64, 256), {}
for rows in COUNTS:
    x = torch.randn(rows, 2048).bfloat16()
    for name, copies in ways.items():
        times[name, rows] = milliseconds(copies[: 8 if rows <= 8 else 1], x)
torch.set_num_threads(threads)

# %% tags=["hide-input", "nbval-ignore-output"]
fig, axes = plt.subplots(1, 2, figsize=(8.4, 3), layout="constrained", sharey=True)
for ax, mode in zip(axes, MODES):
    curves = {f"{mode} kernel": "language", f"{mode} chunks": "vision", "16 bits": "ink"}
    for name, colour in curves.items():
        curve = [times[name, rows] for rows in COUNTS]
        ax.plot(COUNTS, curve, "o-", color=COLOURS[colour], label=name, markersize=4)
    ax.set(xscale="log", yscale="log", title=mode, xlabel="rows", xticks=COUNTS, xticklabels=COUNTS)
    ax.minorticks_off()
axes[1].axvline(FEW, color=COLOURS["muted"], lw=1, ls=":")
axes[0].set_ylabel("ms")
for ax in axes:
    ax.legend()
save_figure(fig, "22_rows")

# %% [markdown]
# What to notice: at one row the kernels are lowest. The bytes promise 2 and 3.6 times the pace of 16 bits; how much is
# kept differs between processors. With many rows arithmetic is the work. A processor does more of it at once with
# bytes; but four bits save **no time** there: unpacking comes on top of the same product. So that layer changes over
# at the dotted line.

# %% [markdown]
# ## A bug people really make: the scale of the wrong side
#
# A colleague writes the quantiser from memory: `amax(0)`. Our `q_proj` is square, so all shapes fit and nothing
# complains. He checks that codes times scale gives the weight back, and it does.


# %%
def quantize_colleague(weight):
    scales = weight.abs().amax(0) / 127  # one for each column
    return (weight / scales).round().to(torch.int8), scales


q_proj = exact.language_model.layers[0].self_attn.q_proj.weight
codes, scales = quantize_colleague(q_proj)
x = torch.randn(8, 128)
his_check = relative(codes * scales, q_proj)
output = relative(x @ codes.float().T * scales, x @ q_proj.T)
print(f"his check: off by {his_check:.1%}; the layer's output: off by {output:.0%}")
assert his_check < 0.01 and output > 0.1

# %% [markdown]
# Before you read on: why does his check pass?
#
# Because it undoes its own mistake: he divides by a scale per *column* and multiplies by it again. The layer
# multiplies after the sum over columns, and only a scale per **row** can be taken out of that sum. The check
# that counts compares *outputs*, and of a matrix that is not square.

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
    assert len(bits) == 4 and all(isinstance(b, int | float) for b in bits), "four numbers, please"
    cases = ((4, 32, 2), (4, 128, 2), (4, 64, 1), (8, 2048, 1))
    for name, value, (code, group, numbers) in zip("abcd", bits, cases):
        extra = (value - code) * group
        assert value > code, f"({name}): the scales need room, too"
        assert abs(extra - 16 * numbers) < 0.1, (
            f"({name}): a whole group would spend {extra:.4g} bits on what its weights share"
        )


check(test_1, bits)

# %% [markdown]
# <details><summary>Hint</summary>
#
# What a group shares is stored once; divide its bits among the group's weights.
#
# </details>

# %% tags=["solution"]
# 16 bits for each shared number, divided among those who share it
bits = [4 + 32 / 32, 4 + 32 / 128, 4 + 16 / 64, 8 + 16 / 2048]
check(test_1, bits)

# %% [markdown]
# ### Exercise 2 (write): any number of bits
#
# Write `quantize(weight, bits)`, as `quantize_int8` but for any number of bits: whole codes (as floats, `[out, in]`)
# and scales `[out]`. With 4 bits the codes run from −7 to 7.


# %% tags=["exercise"]
def quantize(weight, bits):
    return None, None  # codes, scales


# %% tags=["check"]
def test_2(quantize):
    torch.manual_seed(0)
    for bits in (2, 3, 4, 6):
        weight, most = torch.randn(5, 40) * torch.logspace(-2, 2, 5)[:, None], 2 ** (bits - 1) - 1
        weight[2] = -weight[2].abs()  # a row whose largest number is negative
        answer = quantize(weight, bits)
        assert isinstance(answer, tuple) and len(answer) == 2, "return codes and scales"
        codes, scales = answer
        assert codes is not None and codes.shape == (5, 40), "codes have the shape of the weight"
        assert scales.shape == (5,), f"scales are {list(scales.shape)}: one for each row, please"
        assert torch.equal(codes, codes.float().round()), "codes are whole numbers"
        largest = codes.abs().amax(1)
        assert (largest <= most).all(), f"{bits} bits: a code of {largest.max():.3g} is too large"
        assert (largest == most).all(), (
            f"{bits} bits: a row uses codes up to {largest.min():.0f} only"
        )
        error = ((codes * scales[:, None] - weight).abs() / scales[:, None]).max()
        assert error < 0.501, f"{bits} bits: an error of {error:.3g} steps; half a step is enough"
    codes, scales = quantize(torch.zeros(2, 8), 4)
    assert (codes * scales[:, None] == 0).all(), "a row of zeros has to stay zero"


check(test_2, quantize)

# %% [markdown]
# <details><summary>Hint</summary>
#
# One bit is spent on the sign. Which code has the largest weight of a row, and what is that weight's scale?
#
# </details>


# %% tags=["solution"]
def quantize(weight, bits):
    most = 2 ** (bits - 1) - 1  # one bit for the sign; as many codes below zero as above
    scales = (weight.abs().amax(1) / most).clamp(min=1e-30)
    return (weight / scales[:, None]).round(), scales


check(test_2, quantize)

# %% [markdown]
# ### Exercise 3 (break): a row that eight bits ruin
#
# Find a row of 64 weights of which `quantize_int8` keeps **one** and turns all others to zero, though none of
# them is zero. In groups of 32 with 4 bits, each weight of the half without that one should come through well.


# %% tags=["exercise"]
def bad_row():
    return None  # float32[64]


# %% tags=["check"]
def test_3(bad_row):
    row = bad_row()
    assert isinstance(row, torch.Tensor) and row.shape == (64,), "one row of 64 numbers, a tensor"
    assert row.isfinite().all(), "weights are finite"
    assert (row != 0).all(), "no weight may be zero"
    codes, _ = quantize_int8(row[None])
    left = int((codes != 0).sum())
    assert left == 1, f"{left} codes are not zero"
    kept = acting(Int4Linear.from_weight(row[None], group_size=32))[0]
    errors = ((kept - row) / row).abs().view(2, 32).amax(1)  # the worst weight of each half
    assert errors.min() < 0.2, f"in groups, the better half still errs by {errors.min():.0%}"


check(test_3, bad_row)

# %% [markdown]
# <details><summary>Hint</summary>
#
# When is a weight rounded to code 0? Compare it with the step, and the step with the row's largest weight.
#
# </details>


# %% tags=["solution"]
def bad_row():
    row = torch.linspace(0.5, 1.0, 64)
    row[0] = 300.0  # the step is 300 / 127 = 2.4, and all others are less than half of it
    return row


check(test_3, bad_row)

# %% [markdown]
# ## Summary
#
# - A token costs the bytes it reads: fewer bits a weight, more tokens a second.
# - A code is a weight divided by a scale, rounded; the error is half a step at most.
# - With codes on both sides a product is whole numbers and two scales.
# - The fewer share a scale, the less an outlier hurts: a row for 8 bits, 64 neighbours for 4.
# - Many rows: bytes multiply faster, four bits don't. Check outputs, not weights.

# %% [markdown]
# ## Quiz
#
# **1.** Why is the head quantised and the embedding not, though they are the same matrix?
#
# <details><summary>Answer</summary>
#
# For each token the head reads all 257,216 rows, the embedding one. Time is saved where bytes are read.
#
# </details>

# %% [markdown]
# **2.** A batch of 256 prompts is decoded together. How much faster does int4 make it?
#
# <details><summary>Answer</summary>
#
# Not at all: slower. Each weight that is read serves 256 rows, so arithmetic is the work; it is done in bfloat16 as
# before, after unpacking. What remains is the smaller memory.
#
# </details>

# %% [markdown]
# **3.** Someone halves the int4 groups from 64 to 32. What happens to error, memory and speed?
#
# <details><summary>Answer</summary>
#
# The error falls by about an eighth. A weight takes 5 bits instead of 4.5: memory grows by a ninth, and decoding,
# which waits for memory, takes about as much longer.
#
# </details>

# %% [markdown]
# ## References
#
# - Tim Dettmers et al., *LLM.int8()*, 2022, sections 2 and 4 (scales for rows; outliers).
# - Guangxuan Xiao et al., *SmoothQuant*, 2022, section 3 (outliers in activations; what they cost).
# - Elias Frantar et al., *GPTQ*, 2022; Ji Lin et al., *AWQ*, 2023 (what large models need beyond rounding).
# - PyTorch: `aten/src/ATen/native/cpu/int4mm_kernel.cpp`; oneDNN, *Nuances of int8 computations* (the overflow).

# %% [markdown] tags=["navigation"]
# [← Segmentation](21_segmentation.ipynb) | [contents](00_overview.ipynb) | [Compilation →](23_compilation.ipynb)
