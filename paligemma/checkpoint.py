# Exported from notebooks/16_checkpoint.ipynb — edit there, then run `make sync`.
"""Read and write checkpoints in the published layout, strictly and memory-mapped."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from paligemma.gemma import GemmaConfig
from paligemma.model import PaliGemma, PaliGemmaConfig
from paligemma.siglip import SiglipVisionConfig

INDEX = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the tensor or field."""


def read_config(path: str | os.PathLike) -> PaliGemmaConfig:
    """Read `config.json` of a checkpoint directory; absent fields get the published defaults.

    Raises:
        CheckpointError: no such file, not JSON, a required field missing or of the wrong type,
            or another architecture than PaliGemma.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"no config.json in {path}; give the directory of a checkpoint")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({error}); download it again") from None
    _expect(file, config, "model_type", "paligemma")
    text, vision = config.get("text_config", {}), config.get("vision_config", {})
    if text.get("model_type") == "gemma2":
        raise CheckpointError(
            f"{file} is a PaliGemma 2 checkpoint (text_config.model_type gemma2); "
            "this version reads PaliGemma 1 (gemma)"
        )
    _expect(file, text, "model_type", "gemma")
    for name in ("hidden_act", "hidden_activation"):  # "gelu" in old configs means the tanh form
        _expect(file, text, name, None, "gelu", "gelu_pytorch_tanh")
    _expect(file, vision, "hidden_act", None, "gelu_pytorch_tanh")
    text = {"vocab_size": config.get("vocab_size"), **text}
    rope = text.get("rope_parameters") or {}
    text.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    top = {k: config[k] for k in ("pad_token_id", "eos_token_id", "bos_token_id") if config.get(k)}
    return PaliGemmaConfig(
        _build(file, "vision_config", SiglipVisionConfig, vision, VISION_OPTIONAL),
        _build(file, "text_config", GemmaConfig, text, TEXT_OPTIONAL),
        config.get("image_token_index", config.get("image_token_id", 257152)),
        **top,
    )


VISION_OPTIONAL = {"image_size", "layer_norm_eps", "num_channels"}
TEXT_OPTIONAL = {"head_dim", "rms_norm_eps", "rope_theta"}


def _expect(file: Path, config: dict, name: str, *allowed) -> None:
    if config.get(name) not in allowed:
        raise CheckpointError(
            f"{file}: {name} is {config.get(name)!r}; a PaliGemma checkpoint has {allowed[-1]!r}"
        )


def _build(file: Path, section: str, kind: type, values: dict, optional: set[str]):
    """Fill a config dataclass; a missing or mistyped field is named."""
    found = {}
    for field in fields(kind):
        value = values.get(field.name)
        if value is None and field.name in optional:
            continue
        number = int if field.type is int else (int, float)
        if not isinstance(value, number) or isinstance(value, bool) or value <= 0:
            raise CheckpointError(
                f"{file}: {section}.{field.name} is {value!r}; expected a positive number"
            )
        found[field.name] = value
    return kind(**found)


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


def weight_files(path: str | os.PathLike) -> list[Path]:
    """The safetensors files of a checkpoint directory, from its index where there is one.

    Raises:
        CheckpointError: none there, only pickled weights, or a shard of the index missing.
    """
    path = Path(path)
    if (path / INDEX).is_file():
        try:
            names = sorted(set(json.loads((path / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path / INDEX} is not an index of shards ({error})") from None
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{path} lacks {missing[0]} ({len(missing)} of {len(names)} shards missing); "
                "download the checkpoint again"
            )
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickled = [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]
        raise CheckpointError(
            f"{path} holds {pickled[0].name}, a pickle, which can run any code when opened; "
            "convert it to safetensors"
            if pickled
            else f"no *.safetensors in {path}; give the directory of a checkpoint"
        )
    return files


def read_tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of all files, memory-mapped: bytes are read when they are used.

    Raises:
        CheckpointError: truncated, or not a safetensors file.
    """
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    yield name, tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is truncated or not a safetensors file ({error}); download it again"
            ) from None


def load_model(
    path: str | os.PathLike,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    progress: bool = False,
) -> PaliGemma:
    """Load a checkpoint directory, every tensor accounted for.

    Args:
        path: directory with `config.json` and `*.safetensors` (with an index when sharded).
        device: where the weights go.
        dtype: of the weights; None: as stored. Stored type on the CPU: the tensors stay mapped,
            so that loading takes next to no time and no second copy in memory.
        progress: show a bar on standard error.

    Returns:
        A `PaliGemma` in evaluation mode.

    Raises:
        CheckpointError: (a `ValueError`) a missing, left-over, doubled or wrongly shaped tensor,
            a file that cannot be read, or a config that does not fit.
    """
    config = read_config(path)
    with torch.device("meta"):  # shapes without memory
        model = PaliGemma(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    stored = read_tensors(weight_files(path))
    if progress:
        stored = tqdm(stored, total=len(shapes), desc="loading weights", unit=" tensors")
    state = {}
    for name, tensor in stored:
        key = _place(path, name, tensor, shapes, state)
        state[key] = tensor.to(device=device, dtype=dtype or tensor.dtype)
    _check_complete(path, state, shapes)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


EMBEDDING, HEAD = "language_model.embed_tokens.weight", "lm_head.weight"


def _place(path, name: str, tensor: torch.Tensor, shapes: dict, state: dict) -> str:
    """Where a stored tensor belongs; raises when it belongs nowhere."""
    key = internal_name(name)
    shape = shapes.get(EMBEDDING if key == HEAD else key)
    if shape is None:
        raise CheckpointError(f"{path} holds {name}, for which this model has no place")
    if key in state:
        raise CheckpointError(f"{path} holds {name} twice, under different names or in two files")
    if tensor.shape != shape:
        raise CheckpointError(
            f"{path}: {name} is {list(tensor.shape)}; config.json makes it {list(shape)}"
        )
    if not tensor.is_floating_point():
        raise CheckpointError(f"{path}: {name} is {tensor.dtype}; expected floating point")
    return key


def _check_complete(path, state: dict, shapes: dict) -> None:
    """Every expected tensor is there, and a stored head is the embedding (tied weights)."""
    missing = [published_name(key) for key in shapes if key not in state]
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of {len(shapes)} tensors, the first is {missing[0]}; "
            "download the checkpoint again"
        )
    head = state.pop(HEAD, None)
    if head is not None and not torch.equal(head[:8], state[EMBEDDING][:8]):
        raise CheckpointError(f"{path}: {HEAD} differs from the embedding; PaliGemma ties the two")


def config_dict(config: PaliGemmaConfig) -> dict:
    """A `PaliGemmaConfig` in the form of the published `config.json`."""
    text, vision = asdict(config.text_config), asdict(config.vision_config)
    tokens = {"num_image_tokens": config.vision_config.num_image_tokens}
    width = config.text_config.hidden_size
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "image_token_index": config.image_token_index,
        "hidden_size": width,
        "projection_dim": width,
        "vocab_size": config.text_config.vocab_size,
        "text_config": {"model_type": "gemma", **text, **tokens},
        "vision_config": {
            "model_type": "siglip_vision_model",
            **vision,
            **tokens,
            "projection_dim": width,
            "vision_use_head": False,
        },
    }


def save_model(
    model: PaliGemma, path: str | os.PathLike, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write `config.json` and safetensors in the published layout.

    Each file appears whole or not at all: it is written under another name and then renamed.

    Args:
        model: any device; written in the type of its weights.
        path: directory, made when absent.
        max_shard_bytes: more than that is split into shards with an index.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {published_name(name): t.detach() for name, t in model.state_dict().items()}
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.cpu().contiguous()
        size += tensor.nbytes
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        with _replacing(path / name) as temporary:
            save_file(shard, temporary, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        _write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    else:
        (path / INDEX).unlink(missing_ok=True)
    dtype = {"dtype": str(model.dtype).removeprefix("torch.")}
    _write_json(path / "config.json", config_dict(model.config) | dtype)


@contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """A temporary name to write to, renamed to `file` when all went well, removed when not."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(file: Path, value: dict) -> None:
    with _replacing(file) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")
