# Exported from notebooks/16_checkpoint.ipynb — edit there, then run `make sync`.
"""Read and write checkpoints in the published layout, strictly and memory-mapped."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from paligemma.gemma import GemmaConfig
from paligemma.gemma2 import Gemma2Config
from paligemma.model import PaliGemma, PaliGemmaConfig
from paligemma.siglip import SiglipVisionConfig

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


VISION_OPTIONAL = {"image_size", "layer_norm_eps", "num_channels"}
TEXT_OPTIONAL = {"head_dim", "rms_norm_eps", "rope_theta"}
CAPS = {"attn_logit_softcapping", "final_logit_softcapping"}
TEXT_OPTIONAL |= CAPS | {"sliding_window", "query_pre_attn_scalar"}  # of Gemma 2
TEXT_CONFIGS = {"gemma": GemmaConfig, "gemma2": Gemma2Config}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the tensor or field."""


def _read_object(file: Path) -> dict:
    """The one JSON object in a file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is {value!r:.60}; expected a JSON object: download it again")
    return value


def _section(file: Path, config: dict, name: str) -> dict:
    """One of the two inner objects of a config."""
    section = config.get(name)
    if not isinstance(section, dict):
        raise CheckpointError(f"{file}: {name} is {section!r:.60}; expected an object of fields")
    return section


def _expect(file: Path, values: dict, name: str, *allowed, section: str = "") -> None:
    """A field that decides which code is right has one of the values we know."""
    if values.get(name) not in allowed:
        raise CheckpointError(
            f"{file}: {section}{name} is {values.get(name)!r:.60}; "
            f"a PaliGemma checkpoint has {allowed[-1]!r}"
        )


def _build(file: Path, section: str, kind: type, values: dict, optional: set[str]):
    """Fill a config dataclass; a missing or mistyped field is named."""
    found = {}
    for field in fields(kind):
        value = values.get(field.name)
        if value is None and field.name in optional:
            continue
        number = int if field.type is int else (int, float)
        good = isinstance(value, number) and not isinstance(value, bool)
        if not good or not 0 < value < float("inf"):
            raise CheckpointError(
                f"{file}: {section}.{field.name} is {value!r:.60}; expected a positive "
                f"{'whole ' if field.type is int else ''}number"
            )
        found[field.name] = value
    return kind(**found)


def _token(file: Path, config: dict, default: int, *names: str) -> int:
    """A token's number under one of its names."""
    value = next((config[name] for name in names if config.get(name) is not None), default)
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{file}: {names[0]} is {value!r:.60}; expected 0 or more")
    return value


def _rope_theta(file: Path, text: dict):
    """The base of the rotation, which newer configs keep one level down; None: the default."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind != "default":
        raise CheckpointError(f"{file}: text_config asks for RoPE {kind!r:.60}; expected 'default'")
    return rope.get("rope_theta") if text.get("rope_theta") is None else text["rope_theta"]


def _check_gemma2(file: Path, text: dict) -> None:
    """The parts of Gemma 2 that some configs may switch off or move are as PaliGemma 2 has them."""
    for name in sorted(CAPS | {"sliding_window"}):
        if name in text and text[name] is None:
            raise CheckpointError(f"{file}: text_config.{name} is null; PaliGemma 2 has a number")
    layers = text.get("layer_types")
    kinds = ("sliding_attention", "full_attention")
    if layers is not None and (
        not isinstance(layers, list) or any(layer != kinds[i % 2] for i, layer in enumerate(layers))
    ):
        raise CheckpointError(
            f"{file}: text_config.layer_types is {layers!r:.60}; expected sliding_attention and "
            "full_attention in turn"
        )


def read_config(path: str | os.PathLike) -> PaliGemmaConfig:
    """Read `config.json` of a checkpoint directory; absent fields get the published defaults.

    Raises:
        CheckpointError: no such file, not JSON, a required field missing or of the wrong type,
            or another architecture than PaliGemma.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"no config.json in {path}; give the directory of a checkpoint")
    config = _read_object(file)
    _expect(file, config, "model_type", "paligemma")
    text, vision = (_section(file, config, name) for name in ("text_config", "vision_config"))
    _expect(file, text, "model_type", "gemma2", "gemma", section="text_config.")
    kind = TEXT_CONFIGS[text["model_type"]]
    if kind is Gemma2Config:
        _check_gemma2(file, text)
    _expect(file, vision, "model_type", None, "siglip_vision_model", section="vision_config.")
    for name in ("hidden_act", "hidden_activation"):  # "gelu" in old configs means the tanh form
        _expect(file, text, name, None, "gelu", "gelu_pytorch_tanh", section="text_config.")
    _expect(file, vision, "hidden_act", None, "gelu_pytorch_tanh", section="vision_config.")
    image_token = _token(file, config, 257152, "image_token_index", "image_token_id")
    rows = config.get("vocab_size")
    if type(rows) is int and rows <= image_token:  # counted without <image>
        rows = -(-(image_token + 1) // 64) * 64
    text = text | {"rope_theta": _rope_theta(file, text)}
    text = text | {"vocab_size": rows if text.get("vocab_size") is None else text["vocab_size"]}
    return PaliGemmaConfig(
        _build(file, "vision_config", SiglipVisionConfig, vision, VISION_OPTIONAL),
        _build(file, "text_config", kind, text, TEXT_OPTIONAL),
        image_token,
        _token(file, config, 0, "pad_token_id"),
        _token(file, config, 1, "eos_token_id"),
        _token(file, config, 2, "bos_token_id"),
    )


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(path: str | os.PathLike) -> list[Path]:
    """The safetensors files of a checkpoint directory, and no others that may lie beside them.

    They are the shards of `model.safetensors.index.json`, else `model.safetensors`, else every
    `*.safetensors`.

    Raises:
        CheckpointError: none there, only pickled weights, a shard of the index missing, or two
            whole sets of weights.
    """
    path = Path(path)
    single, shards = path / SINGLE, []
    if (path / INDEX).is_file():
        shards = _shards(path / INDEX)
        missing = [file.name for file in shards if not file.is_file()]
        if missing and not (single.is_file() and len(missing) == len(shards)):
            raise CheckpointError(
                f"{path} lacks {missing[0]} ({len(missing)} of {len(shards)} shards missing); "
                "download the checkpoint again"
            )
        if not missing and single.is_file() and single not in shards:
            raise CheckpointError(
                f"{path} holds {SINGLE} and the {len(shards)} shards of {INDEX}; "
                "remove the one that is out of date"
            )
        if not missing:
            return shards
    files = [single] if single.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        pickled = sorted(
            p.name for end in ("bin", "pt", "pth", "ckpt") for p in path.glob(f"*.{end}")
        )
        raise CheckpointError(
            f"{path} holds {pickled[0]}, a pickle, which can run any code when opened; "
            "convert it to safetensors"
            if pickled
            else f"no *.safetensors in {path}; give the directory of a checkpoint"
        )
    return files


def _shards(index: Path) -> list[Path]:
    """The files that an index names, each once."""
    found = _read_object(index).get("weight_map")
    names = list(found.values()) if isinstance(found, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{index} is not an index of shards: weight_map is {found!r:.60}")
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r:.60}, which is not a file beside it")
    return [index.parent / name for name in sorted(set(names))]


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


class _NoInit(TorchFunctionMode):
    """Leave new weights as they are: on the meta device there is nothing to fill.

    It saves more than it seems: the first random number there makes torch load its compiler.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def empty_model(path, config: PaliGemmaConfig) -> PaliGemma:
    """The model with shapes and no memory."""
    try:
        with torch.device("meta"), _NoInit():
            return PaliGemma(config)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: config.json fits no model: {error}") from None


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
    if tensor.dtype not in FLOATS:
        raise CheckpointError(
            f"{path}: {name} is {tensor.dtype}; expected float32, bfloat16 or float16"
        )
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
    if head is not None and not torch.equal(head.to(state[EMBEDDING]), state[EMBEDDING]):
        raise CheckpointError(f"{path}: {HEAD} differs from the embedding; PaliGemma ties the two")


def _check_generation(path, names: list[str], shapes: dict) -> None:
    """The weights are of the PaliGemma that config.json describes, 1 or 2."""
    stored, expected = (
        2 if any("_feedforward_layernorm." in name for name in group) else 1
        for group in (names, shapes)
    )
    if stored != expected and any("self_attn.q_proj" in name for name in names):
        raise CheckpointError(
            f"{path} holds the weights of a PaliGemma {stored} beside the config.json of a "
            f"PaliGemma {expected}; take both from the same download"
        )


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype!r}; expected torch.float32, torch.bfloat16, … or None")
    model = empty_model(path, read_config(path))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    files = weight_files(path)
    _check_generation(path, [name for name, _ in read_tensors(files)], shapes)
    stored = read_tensors(files)
    if progress:
        stored = tqdm(stored, total=len(shapes), desc="loading weights", unit=" tensors")
    state = {}
    for name, tensor in stored:
        key = _place(path, name, tensor, shapes, state)
        move = key != HEAD  # a stored head is only compared
        state[key] = tensor.to(device=device, dtype=dtype or tensor.dtype) if move else tensor
    _check_complete(path, state, shapes)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def config_dict(config: PaliGemmaConfig) -> dict:
    """A `PaliGemmaConfig` in the form of the published `config.json`."""
    text, vision = asdict(config.text_config), asdict(config.vision_config)
    tokens = {"num_image_tokens": config.vision_config.num_image_tokens}
    width = config.text_config.hidden_size
    model_type = "gemma2" if isinstance(config.text_config, Gemma2Config) else "gemma"
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
        "text_config": {"model_type": model_type, **text, **tokens},
        "vision_config": {
            "model_type": "siglip_vision_model",
            **vision,
            **tokens,
            "projection_dim": width,
            "vision_use_head": False,
        },
    }


@contextmanager
def replacing(path: Path) -> Iterator[Callable[[str], Path]]:
    """Give out temporary names in a directory; all get their real names at the end, or none."""
    drafts = {}

    def draft(name: str) -> Path:
        file = path / f".{name}.{os.getpid()}.tmp"
        file.touch()
        drafts[file] = path / name, file.stat().st_mode
        return file

    try:
        yield draft
        for file, (target, mode) in drafts.items():
            file.chmod(mode)  # safetensors makes its files private to their owner
            os.replace(file, target)
    finally:
        for file in drafts:
            file.unlink(missing_ok=True)


def _split(tensors: dict[str, torch.Tensor], max_bytes: int) -> list[list[str]]:
    """Names of the tensors in each shard, in order; a shard holds at least one."""
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def save_model(
    model: PaliGemma, path: str | os.PathLike, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write `config.json` and safetensors in the published layout.

    Everything is written under other names first and renamed when it is whole; then weights of an
    earlier save that are no longer part of it are removed.

    Args:
        model: any device; written in the type of its weights.
        path: directory, made when absent.
        max_shard_bytes: more than that is split into shards with an index.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {published_name(name): t.detach() for name, t in model.state_dict().items()}
    shards = _split(tensors, max_shard_bytes)
    many = len(shards) > 1
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if many else [SINGLE]
    dtype = {"dtype": str(model.dtype).removeprefix("torch.")}
    with replacing(path) as draft:
        for file, shard in zip(names, shards, strict=True):
            whole = {name: tensors[name].cpu().contiguous() for name in shard}
            save_file(whole, draft(file), metadata={"format": "pt"})
        if many:
            place = {
                name: file for file, shard in zip(names, shards, strict=True) for name in shard
            }
            total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
            index = json.dumps({"metadata": total, "weight_map": place}, indent=2)
            draft(INDEX).write_text(index + "\n")
        config = json.dumps(config_dict(model.config) | dtype, indent=2)
        draft("config.json").write_text(config + "\n")
    if not many:
        (path / INDEX).unlink(missing_ok=True)
    for file in path.glob("model*.safetensors"):
        shard = re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", file.name)
        if shard and file.name not in names:
            file.unlink()
