# Exported from notebooks/22_quantization.ipynb — edit there, then run `make sync`.
"""Weights in eight or four bits: a smaller model that decodes faster, because it reads less."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from paligemma.model import PaliGemma
from paligemma.support.arguments import check_quantization


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


def replace_linears(module: nn.Module, new: Callable[[nn.Linear], nn.Module]) -> None:
    """Put `new(layer)` in the place of each linear layer inside a module."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, new(layer))


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


@cache
def kernel_block() -> int | None:
    """Rows in a block of this processor's int4 kernel; None: in an order that we do not know."""
    codes = (torch.arange(64, device="cpu")[:, None] + 7 * torch.arange(32, device="cpu")) % 16
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    except (RuntimeError, AttributeError):  # private names: another PyTorch may have others
        return None
    return next((b for b in (64, 32) if torch.equal(pack_int4(codes.byte(), b), packed)), None)


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

    def chunks(self) -> list[slice]:
        """W's rows in slices of a few megabytes, and of whole blocks."""
        step = max(64, CHUNK // self.in_features // 64 * 64)
        return [slice(i, i + step) for i in range(0, self.qweight.shape[0], step)]

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


@cache
def multiplies_bytes() -> bool:
    """Are products of int8 matrices fast here, and exact? (Older processors overflow 16 bits.)"""
    worst = torch.full((64, 64), 127, dtype=torch.int8, device="cpu")
    try:
        exact = bool((torch.ops.aten._int_mm(worst, worst) == 64 * 127**2).all())
    except (RuntimeError, AttributeError):  # a private name: another PyTorch may have another
        return False
    return exact and torch.backends.mkldnn.is_available()


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
