# Exported from notebooks/29_lora.ipynb — edit there, then run `make sync`.
"""LoRA: leave the weights alone and learn a small correction of low rank beside them."""

import json
import os
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from safetensors.torch import save_file
from torch import nn

from paligemma.checkpoint import internal_name
from paligemma.model import PaliGemma
from paligemma.support.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CheckpointError,
    find_folder,
    shorten,
)
from paligemma.support.lora_files import read_lora_config, read_lora_tensors
from paligemma.support.replacing import replacing


class LoRALinear(nn.Module):
    """A linear layer that stays as it is, and a correction beside it: W·x + b + (α/r)·B·A·x.

    A and B are at least float32, whatever the type of the frozen weight.

    Args:
        base_layer: the layer; frozen here.
        rank, alpha: r and α; with `use_rslora` the scale is α/√r.
        dropout: share of the correction's inputs set to 0 in training.

    Raises:
        ValueError: a rank, alpha or dropout that cannot be.

    Source: Hu et al. 2021 (LoRA), section 4.1; Kalajdzievski 2023 (rsLoRA); `lora.Linear` in peft.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        use_rslora: bool = False,
    ):
        super().__init__()
        if type(rank) is not int or rank < 1:
            raise ValueError(f"rank is {shorten(rank)}; expected a whole number, 1 or more")
        if not 0 < alpha < float("inf") or not 0 <= dropout < 1:
            raise ValueError(f"alpha {alpha}, dropout {dropout}; expected alpha > 0 and 0 ≤ p < 1")
        weight = base_layer.weight
        where = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        self.rank, self.alpha, self.use_rslora = rank, alpha, use_rslora
        self.scale = alpha / (rank**0.5 if use_rslora else rank)
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
        small = self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))  # […, r]
        return (out + self.scale * self.lora_B(small)).to(out.dtype)

    def delta(self) -> torch.Tensor:
        """The correction as one matrix, (α/r)·B·A: `float32[out, in]`."""
        return self.scale * (self.lora_B.weight @ self.lora_A.weight)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of a model, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters learn, and how many there are."""
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return learning, sum(p.numel() for p in model.parameters())


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer where another one of that name is."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """All linear layers by name. Raises ValueError: adapters there already, or quantised."""
    if "language_model.head" in dict(model.named_modules()):
        raise ValueError("the model is quantised; put adapters on the original weights")
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
    use_rslora: bool = False,
) -> list[str]:
    """Freeze a model and put an adapter beside some of its linear layers.

    Args:
        model: a PaliGemma, or one of its parts.
        rank, alpha, dropout, use_rslora: of every adapter, as in `LoRALinear`.
        targets: ends of layer names, `*` for anything: "q_proj", "language_model.*.q_proj".

    Returns:
        Names of the adapted layers; their output is what it was, for B is 0.

    Raises:
        ValueError: a target that no linear layer has, a rank that is not low, adapters already.
    """
    linears = linear_layers(model)
    targets = [targets] if isinstance(targets, str) else list(targets)
    found = {t: [name for name in linears if fnmatchcase(f".{name}", f"*.{t}")] for t in targets}
    missing = [t for t in targets if not found[t]] if targets else [""]
    if missing:
        ends = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
        raise ValueError(f"no linear layer is called {shorten(missing[0])}; this model has {ends}")
    names = [name for name in linears if any(name in group for group in found.values())]
    for name in names:
        shape = list(linears[name].weight.shape)
        if isinstance(rank, int) and rank > min(shape):
            raise ValueError(f"rank {rank} is not low for {name} {shape}; at most {min(shape)}")
    layers = {n: LoRALinear(linears[n], rank, alpha, dropout, use_rslora) for n in names}
    model.requires_grad_(False)
    for name, layer in layers.items():
        put(model, name, layer)
    return names


def remove_lora(model: nn.Module) -> list[str]:
    """Take the adapters off; the weights stay frozen. Returns the names of their layers."""
    found = adapters(model)
    for name, layer in found.items():
        put(model, name, layer.base_layer)
    return list(found)


@torch.no_grad()
def merge_lora(model: nn.Module) -> list[str]:
    """Add each correction to its weight, in float32; take the adapters off. Returns the names."""
    for layer in adapters(model).values():
        base = layer.base_layer
        total = base.weight.to(layer.lora_A.weight.dtype) + layer.delta()
        base.weight = nn.Parameter(total.to(base.weight.dtype), requires_grad=False)
    return remove_lora(model)


def stored_name(model: nn.Module, name: str) -> str:
    """A layer's name inside transformers' model of the same kind."""
    return f"model.{name}" if isinstance(model, PaliGemma) else name


def save_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the adapters alone, in the layout that peft reads, both files or none.

    Args:
        model: with adapters.
        path: directory, made when absent: `adapter_config.json`, `adapter_model.safetensors`.

    Raises:
        ValueError: no adapters, or adapters of different ranks, alphas, dropouts or scales.
    """
    found = adapters(model)
    kinds = {(m.rank, m.alpha, m.dropout.p, m.use_rslora) for m in found.values()}
    if len(kinds) != 1:
        raise ValueError(f"adapters of {len(kinds)} kinds; add_lora makes one kind, save after it")
    rank, alpha, dropout, use_rslora = kinds.pop()
    base = getattr(model, "config", None)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": use_rslora,
        "target_modules": sorted(stored_name(model, name) for name in found),
        "bias": "none",
        "inference_mode": True,
        "base_model_name_or_path": getattr(base, "name_or_path", None) or None,
        "task_type": None,
    }
    tensors = {}
    for name, layer in found.items():
        start = f"base_model.model.{stored_name(model, name)}"
        tensors[f"{start}.lora_A.weight"] = layer.lora_A.weight.detach().cpu().contiguous()
        tensors[f"{start}.lora_B.weight"] = layer.lora_B.weight.detach().cpu().contiguous()
    with replacing(path) as draft:
        save_file(tensors, draft / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        (draft / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


def load_adapter(model: nn.Module, path: str | os.PathLike, trainable: bool = False) -> list[str]:
    """Put saved adapters on a model, strictly: each tensor finds its place, each layer both.

    Args:
        model: without adapters; frozen here.
        path: directory that `save_adapter` or peft wrote, or its name on the hub.
        trainable: the adapters will go on learning.

    Returns:
        Names of the adapted layers.

    Raises:
        ValueError: files or tensors that do not fit; the model is then left as it was.
    """
    linears, path = linear_layers(model), find_folder(path)
    arguments, pairs = read_lora_config(path), {}
    for stored, pair in read_lora_tensors(path).items():
        name = internal_name(stored)
        if name not in linears:
            raise CheckpointError(f"{path}: {stored} belongs to no linear layer of this model")
        if name in pairs:
            raise CheckpointError(f"{path} holds {stored} twice, under different names")
        outputs, inputs = linears[name].weight.shape
        shapes = {which: list(tensor.shape) for which, tensor in sorted(pair.items())}
        expected = {"A": [arguments["rank"], inputs], "B": [outputs, arguments["rank"]]}
        if shapes != expected:
            other = f"{path}: adapter of {name} is {shapes}; expected {expected}"
            raise CheckpointError(f"{other}: is it of another base model?")
        pairs[name] = pair
    names = [name for name in linears if name in pairs]  # the file's order is alphabetical
    layers = {name: LoRALinear(linears[name], **arguments) for name in names}
    model.requires_grad_(False)
    for name, layer in layers.items():
        layer.lora_A.weight.data.copy_(pairs[name]["A"])
        layer.lora_B.weight.data.copy_(pairs[name]["B"])
        layer.lora_A.requires_grad_(trainable)
        layer.lora_B.requires_grad_(trainable)
        put(model, name, layer)
    return names
