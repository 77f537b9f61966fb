"""Adapters as peft stores them: three releases' spellings read, what is no plain LoRA refused."""

import re
from pathlib import Path

import torch

from paligemma.support.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CheckpointError,
    open_tensors,
    other_format,
    read_json,
    shorten,
)
from paligemma.support.tensors import FLOATS

# `base_model.model.….lora_A.weight`; in a state dict saved by other programs the adapter's own
# name stands in it too: `….lora_A.default.weight`.
STORED = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.(\w+))?\.weight")
OTHER_METHODS = (  # fields of peft's LoraConfig that change what the two matrices mean
    "use_dora use_qalora use_bdlora lora_bias fan_in_fan_out rank_pattern alpha_pattern "
    "modules_to_save trainable_token_indices target_parameters alora_invocation_tokens "
    "layer_replication arrow_config kasa_config monteclora_config"
).split()
STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # these leave the base as it is
MERGE = "merge it in peft (merge_and_unload), save the model and load that"


def read_lora_config(folder: Path) -> dict:
    """The arguments of an adapter's layers: rank, alpha, dropout, use_rslora.

    Raises:
        CheckpointError: no such file, not JSON, a field that cannot be, or another method than
            plain LoRA.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise CheckpointError(
            f"no {ADAPTER_CONFIG} in {folder}; give the directory that save_adapter or peft wrote"
        )
    config = read_json(file, dict)
    if config.get("peft_type") != "LORA":
        kind = shorten(config.get("peft_type"))
        raise CheckpointError(f"{file}: peft_type is {kind}; expected 'LORA': {MERGE}")
    odd = [name for name in OTHER_METHODS if config.get(name)]
    odd += ["bias"] * (config.get("bias", "none") != "none")
    start = config.get("init_lora_weights", True)  # pissa, olora … change the base too
    odd += ["init_lora_weights"] * (start not in STARTS)
    if odd:
        raise CheckpointError(
            f"{file}: {odd[0]} is {shorten(config[odd[0]])}, which plain LoRA has not; {MERGE}"
        )
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout")
    dropout = 0.0 if dropout is None else dropout
    numbers = type(rank) is int and all(type(value) in (int, float) for value in (alpha, dropout))
    if not numbers or max(map(abs, (rank, alpha, dropout))) > 1e9:
        raise CheckpointError(
            f"{file}: r, lora_alpha, lora_dropout are {shorten([rank, alpha, dropout])}; "
            "expected numbers"
        )
    scaled = config.get("use_rslora", False)
    if scaled not in (True, False, None):
        raise CheckpointError(f"{file}: use_rslora is {shorten(scaled)}; expected true or false")
    return {"rank": rank, "alpha": alpha, "dropout": dropout, "use_rslora": bool(scaled)}


def read_lora_tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """For each layer, by its name in transformers' model: A `float[r, in]` and B `float[out, r]`.

    Raises:
        CheckpointError: no safetensors, a broken file, a tensor that is neither A nor B, not of
            a float type or not finite, or several adapters in one file.
    """
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        other = other_format(folder)
        found = f"; it holds {other}" if other else ""
        raise CheckpointError(f"no {ADAPTER_WEIGHTS} in {folder}{found}: save it with a newer peft")
    pairs, adapters = {}, set()
    for stored, tensor in open_tensors([file]).items():
        found = STORED.fullmatch(stored)
        if found is None:
            raise CheckpointError(
                f"{folder}: {shorten(stored, 200)[1:-1]} belongs to no linear layer; {MERGE}"
            )
        layer, which, adapter = found.groups()
        adapters.add(adapter)
        if len(adapters) > 1:
            names = sorted(str(name or "unnamed") for name in adapters)
            raise CheckpointError(
                f"{folder} holds several adapters, {' and '.join(names)}; save one of them"
            )
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"{folder}: {stored} is {tensor.dtype}; expected a float type")
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{folder}: {stored} holds NaN or infinity; train it again")
        if which in pairs.setdefault(layer, {}):
            raise CheckpointError(f"{folder} holds {stored} twice, under different names")
        pairs[layer][which] = tensor
    if not pairs:
        raise CheckpointError(f"{folder}: {ADAPTER_WEIGHTS} holds no tensors; save it again")
    return pairs
