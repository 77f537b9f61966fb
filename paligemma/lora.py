# Exported from notebooks/29_lora.ipynb — edit there, then run `make sync`.
"""LoRA: leave the weights alone and learn a small correction of low rank beside them."""

import json
import os
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from paligemma.checkpoint import internal_name, read_tensors, replacing
from paligemma.model import PaliGemmaParts


class LoRALinear(nn.Module):
    """A linear layer that stays as it is, and a correction beside it: W·x + b + (α/r)·B·A·x.

    A and B are at least float32, whatever the type of the frozen weight.

    Args:
        base_layer: the layer; frozen here.
        rank: r, rows of A and columns of B.
        alpha: α; the correction is scaled by α/r.
        dropout: share of the correction's inputs set to 0 in training.

    Raises:
        ValueError: a rank, alpha or dropout that cannot be.

    Source: Hu et al. 2021 (LoRA), section 4.1; `lora.Linear` in peft.
    """

    def __init__(
        self, base_layer: nn.Linear, rank: int = 8, alpha: float = 16, dropout: float = 0.0
    ):
        super().__init__()
        if type(rank) is not int or rank < 1:
            raise ValueError(f"rank is {rank!r}; expected a whole number, 1 or more")
        if not alpha > 0 or not 0 <= dropout < 1:
            raise ValueError(f"alpha {alpha}, dropout {dropout}; expected alpha > 0 and 0 ≤ p < 1")
        weight = base_layer.weight
        where = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False, **where)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False, **where)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=5**0.5)
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(dropout)
        self.train(base_layer.training)  # a new module is in training mode, whatever its model is

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`float[…, in]` → `float[…, out]`, in the type of the frozen layer's output."""
        out = self.base_layer(x)
        small = self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))  # (…, r)
        return (out + self.scale * self.lora_B(small)).to(out.dtype)

    def delta(self) -> torch.Tensor:
        """The correction as one matrix, (α/r)·B·A: `float32[out, in]`."""
        return self.scale * (self.lora_B.weight @ self.lora_A.weight)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of a model, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters learn, and how many there are."""
    counts = [(p.numel() * p.requires_grad, p.numel()) for p in model.parameters()]
    return tuple(map(sum, zip(*counts)))


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer where another one of that name is."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """All linear layers by name.

    Raises:
        ValueError: the model has adapters already.
    """
    if found := adapters(model):
        raise ValueError(
            f"{next(iter(found))} and {len(found) - 1} more layers have adapters already; "
            "call merge_lora or remove_lora first"
        )
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def add_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16,
    targets: Iterable[str] = ("q_proj", "v_proj"),
    dropout: float = 0.0,
) -> list[str]:
    """Freeze a model and put an adapter beside some of its linear layers.

    Args:
        model: a PaliGemma, or one of its parts.
        rank: r of every adapter.
        alpha: α; corrections are scaled by α/r.
        targets: ends of layer names, `*` for anything: "q_proj", "language_model.*.q_proj",
            "vision_tower.*".
        dropout: share of an adapter's inputs set to 0 in training.

    Returns:
        Names of the adapted layers; their output is what it was, for B is 0.

    Raises:
        ValueError: a target that no linear layer has, a rank that is not low, adapters there
            already. The model is then left as it was.
    """
    linears = _linear_layers(model)
    targets = [targets] if isinstance(targets, str) else list(targets)
    found = {t: [name for name in linears if fnmatchcase(f".{name}", f"*.{t}")] for t in targets}
    missing = [t for t in targets if not found[t]] if targets else [""]
    if missing:
        ends = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
        raise ValueError(f"no linear layer is called {missing[0]!r}; this model has {ends}")
    names = [name for name in linears if any(name in group for group in found.values())]
    for name in names:
        shape = list(linears[name].weight.shape)
        if isinstance(rank, int) and rank > min(shape):
            raise ValueError(f"rank {rank} is not low for {name} {shape}; at most {min(shape)}")
    layers = {name: LoRALinear(linears[name], rank, alpha, dropout) for name in names}
    model.requires_grad_(False)
    for name, layer in layers.items():
        _put(model, name, layer)
    return names


def remove_lora(model: nn.Module) -> list[str]:
    """Take the adapters off: the model answers as before them, to the last bit.

    Returns:
        Names of the layers. Their weights stay frozen (`model.requires_grad_()` frees them).
    """
    found = adapters(model)
    for name, layer in found.items():
        _put(model, name, layer.base_layer)
    return list(found)


@torch.no_grad()
def merge_lora(model: nn.Module) -> list[str]:
    """Add each correction to its weight, in float32, and take the adapters off.

    Returns:
        Names of the layers, plain `nn.Linear` again and as fast as before. They stay frozen.
    """
    for layer in adapters(model).values():
        base = layer.base_layer
        total = base.weight.to(layer.lora_A.weight.dtype) + layer.delta()
        base.weight = nn.Parameter(total.to(base.weight.dtype), requires_grad=False)
    return remove_lora(model)


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _stored_name(model: nn.Module, name: str) -> str:
    """A layer's name inside transformers' model of the same kind."""
    return f"model.{name}" if isinstance(model, PaliGemmaParts) else name


def save_lora(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the adapters alone, in the layout that peft reads, each file whole or not at all.

    Args:
        model: with adapters.
        path: directory, made when absent: `adapter_config.json`, `adapter_model.safetensors`.

    Raises:
        ValueError: no adapters, or adapters of different ranks, alphas or dropouts.
    """
    path, found = Path(path), adapters(model)
    kinds = {(layer.rank, layer.alpha, layer.dropout.p) for layer in found.values()}
    if len(kinds) != 1:
        raise ValueError(f"adapters of {len(kinds)} kinds; add_lora makes one kind, save after it")
    (rank, alpha, dropout) = kinds.pop()
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(_stored_name(model, name) for name in found),
        "bias": "none",
        "inference_mode": True,
        "base_model_name_or_path": None,
        "task_type": None,
    }
    tensors = {
        f"base_model.model.{_stored_name(model, name)}.lora_{which}.weight": matrix.detach()
        for name, layer in found.items()
        for which, matrix in (("A", layer.lora_A.weight), ("B", layer.lora_B.weight))
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    path.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        save_file(tensors, draft(WEIGHTS), metadata={"format": "pt"})
        draft(CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


UNSUPPORTED = (
    "use_dora use_rslora use_qalora use_bdlora lora_bias fan_in_fan_out rank_pattern alpha_pattern "
    "modules_to_save trainable_token_indices alora_invocation_tokens layer_replication"
).split()


def _read_adapter_config(path: Path) -> tuple[int, float, float]:
    """Rank, alpha and dropout of an adapter that is plain LoRA.

    Raises:
        ValueError: no such file, not JSON, a field that cannot be, or another method than LoRA.
    """
    file = path / CONFIG
    if not file.is_file():
        raise ValueError(f"no {CONFIG} in {path}; give the directory that save_lora or peft wrote")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); copy the adapter again") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{file} is not of a LoRA adapter: peft_type is not 'LORA'")
    odd = [name for name in UNSUPPORTED if config.get(name)]
    odd += ["bias"] * (config.get("bias", "none") != "none")
    start = config.get("init_lora_weights", True)  # pissa, olora … change the frozen weights too
    odd += ["init_lora_weights"] * (start not in (True, False, None, "gaussian", "orthogonal"))
    if odd:
        raise ValueError(f"{file}: {odd[0]} is {config[odd[0]]!r:.60}; plain LoRA has none")
    numbers = [config.get(name) for name in ("r", "lora_alpha")] + [config.get("lora_dropout", 0.0)]
    if type(numbers[0]) is not int or any(type(value) not in (int, float) for value in numbers):
        raise ValueError(f"{file}: r, lora_alpha, lora_dropout are {numbers}; expected numbers")
    return tuple(numbers)


STORED = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def load_lora(model: nn.Module, path: str | os.PathLike, trainable: bool = False) -> list[str]:
    """Put saved adapters on a model, strictly: each tensor finds its place, each layer both.

    Args:
        model: without adapters; frozen here.
        path: directory that `save_lora` or peft wrote.
        trainable: the adapters will go on learning.

    Returns:
        Names of the adapted layers.

    Raises:
        ValueError: files that are missing, broken or of another method, a tensor without its
            layer or of another shape, adapters there already. The model is then left as it was.
    """
    path, linears = Path(path), _linear_layers(model)
    rank, alpha, dropout = _read_adapter_config(path)
    if not (path / WEIGHTS).is_file():
        raise ValueError(f"no {WEIGHTS} in {path}; save the adapter as safetensors")
    pairs = {}
    for stored, tensor in read_tensors([path / WEIGHTS]):
        match = STORED.fullmatch(stored)
        name = internal_name(match[1]) if match else None
        if name not in linears:
            raise ValueError(f"{path}: {stored} belongs to no linear layer of this model")
        pairs.setdefault(name, {})[match[2]] = tensor
    for name, pair in pairs.items():
        outputs, inputs = linears[name].weight.shape
        shapes = {which: list(tensor.shape) for which, tensor in sorted(pair.items())}
        if shapes != (expected := {"A": [rank, inputs], "B": [outputs, rank]}):
            raise ValueError(f"{path}: adapter of {name} is {shapes}; expected {expected}")
    if not pairs:
        raise ValueError(f"{path}: {WEIGHTS} holds no tensors; save the adapter again")
    names = [name for name in linears if name in pairs]  # the file's order is alphabetical
    layers = {name: LoRALinear(linears[name], rank, alpha, dropout) for name in names}
    model.requires_grad_(False)
    for name, layer in layers.items():
        for which, linear in (("A", layer.lora_A), ("B", layer.lora_B)):
            linear.weight.data.copy_(pairs[name][which])
        _put(model, name, layer.requires_grad_(False))
        layer.lora_A.requires_grad_(trainable), layer.lora_B.requires_grad_(trainable)
    return names
