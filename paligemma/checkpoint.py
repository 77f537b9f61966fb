# Exported from notebooks/16_checkpoint.ipynb — edit there, then run `make sync`.
"""Read and write checkpoints in the published layout, strictly and memory-mapped."""

import json
import os
import re
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from paligemma.gemma import GemmaConfig
from paligemma.gemma2 import Gemma2Config
from paligemma.model import PaliGemma, PaliGemmaConfig
from paligemma.siglip import SiglipVisionConfig
from paligemma.support.config import config_dict, parse_device, parse_dtype, read_config
from paligemma.support.files import CheckpointError, find_folder, open_tensors
from paligemma.support.replacing import replacing
from paligemma.support.tensors import check_family, match_tensors, weight_files, write_weights

RENAME = [
    (re.compile(r"^model\."), ""),
    (re.compile(r"^vision_tower\.vision_model\."), "vision_tower."),
    (re.compile(r"^language_model\.model\."), "language_model."),
    (re.compile(r"^(language_model\.)?lm_head\.weight$"), "lm_head.weight"),
]


def internal_name(name: str) -> str:
    """A tensor's name in any of the published layouts → its name in our `PaliGemma`."""
    for pattern, replacement in RENAME:
        name = pattern.sub(replacement, name)
    return name


def published_name(name: str) -> str:
    """A tensor's name in our `PaliGemma` → its name in the published layout."""
    name = re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)
    return re.sub(r"^language_model\.", "language_model.model.", name)


def build_config(found: dict) -> PaliGemmaConfig:
    """What `read_config` returns → our dataclasses."""
    text = dict(found["text_config"])
    kind = Gemma2Config if text.pop("model_type") == "gemma2" else GemmaConfig
    return PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**found["vision_config"]),
        text_config=kind(**text),
        image_token_index=found["image_token_index"],
        pad_token_id=found["pad_token_id"],
        eos_token_id=found["eos_token_id"],
        bos_token_id=found["bos_token_id"],
    )


class NoInit(TorchFunctionMode):
    """Leave new weights as they are: on the meta device there is nothing to fill."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def empty_model(config: PaliGemmaConfig) -> PaliGemma:
    """The model with shapes and no memory."""
    with torch.device("meta"), NoInit():
        return PaliGemma(config)


EMBEDDING, HEAD = "language_model.embed_tokens.weight", "lm_head.weight"


def read_state(path: Path, found: dict, expected: dict) -> dict[str, torch.Tensor]:
    """The tensors of a directory under our names, mapped, each accounted for.

    Args:
        path: the directory.
        found: its config, from `read_config`.
        expected: the state dict of the empty model.

    Raises:
        CheckpointError: a missing, left-over, doubled or wrongly shaped tensor.
    """
    state, spelling = {}, {}
    for stored, tensor in open_tensors(weight_files(path)).items():
        name = internal_name(stored)
        if name in state:
            raise CheckpointError(f"{path} holds {stored} twice, under different names")
        # transformers may save the vision tower with a pooling head, which PaliGemma never calls
        if not (found["vision_use_head"] and name.startswith("vision_tower.head.")):
            state[name], spelling[name] = tensor, stored
    head = state.pop(HEAD, None)
    if head is not None:  # the embedding under its other name, or once more
        match_tensors(path, {HEAD: head}, {HEAD: expected[EMBEDDING]})
        state.setdefault(EMBEDDING, head)
    check_family(path, state, expected, found["quantization_config"])
    match_tensors(path, state, expected, lambda name: spelling.get(name) or published_name(name))
    if head is not None and not torch.equal(head.to(state[EMBEDDING]), state[EMBEDDING]):
        raise CheckpointError(f"{path}: {HEAD} differs from the embedding; PaliGemma ties the two")
    return state


def load_model(
    path: str | os.PathLike,
    device: torch.device | str | int = "cpu",
    dtype: torch.dtype | str | None = torch.float32,
    progress: bool = False,
    revision: str | None = None,
) -> PaliGemma:
    """Load a checkpoint directory, every tensor accounted for.

    Args:
        path: directory with `config.json` and `*.safetensors` (with an index when sharded), or
            what else `find_folder` knows: a folder of the hub's cache, a hub name.
        device: where the weights go: "cpu", "cuda:1", 0, "auto".
        dtype: of the weights, `torch.bfloat16` or "bfloat16"; None: as stored. Stored type on
            the CPU: the tensors stay mapped, so that loading takes next to no time and no second
            copy in memory.
        progress: show a bar on standard error.
        revision: branch, tag or commit, for a hub name.

    Returns:
        A `PaliGemma` in evaluation mode. An adapter in the directory is not applied.

    Raises:
        CheckpointError: (a `ValueError`) a missing, left-over, doubled or wrongly shaped tensor,
            a file that cannot be read, or a config that does not fit.
    """
    device, dtype = parse_device(device), parse_dtype(dtype)
    path = find_folder(path, revision)
    found = read_config(path)
    try:
        model = empty_model(build_config(found))
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: config.json fits no model: {error}") from None
    state = read_state(path, found, model.state_dict())
    for name in tqdm(state, "loading weights", unit=" tensors", disable=not progress):
        state[name] = state[name].to(device=device, dtype=dtype or state[name].dtype)
    model.load_state_dict(state, strict=True, assign=True)
    model.config.name_or_path = str(path)
    return model.eval()


def save_model(
    model: PaliGemma, path: str | os.PathLike, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write `config.json` and safetensors in the published layout, which transformers reads.

    Everything is written whole into a draft, then all of it takes its place at once, and that of
    the weights of an earlier save.

    Args:
        model: any device; written in the type of its weights.
        path: directory, made when absent.
        max_shard_bytes: more than that is split into shards with an index.

    Raises:
        ValueError: the model holds more than a PaliGemma does, such as an adapter.
    """
    path, state = Path(path).expanduser(), model.state_dict()
    if extra := sorted(state.keys() - empty_model(model.config).state_dict().keys()):
        raise ValueError(
            f"the model holds {extra[0]}, which no published checkpoint has; merge an adapter "
            "first, and save a quantised model with save_quantized"
        )
    config = config_dict(model.config) | {"dtype": str(model.dtype).removeprefix("torch.")}
    tensors = {published_name(name): tensor for name, tensor in state.items()}
    with replacing(path) as draft:
        write_weights(draft, tensors, max_shard_bytes)
        (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n")
