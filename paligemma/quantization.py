# Exported from notebooks/22_quantization.ipynb — edit there, then run `make sync`.
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
