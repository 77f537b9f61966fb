"""Write a checkpoint of random weights in the published layout, without ever holding it whole.

Speed and memory depend on shapes, not on what was learnt: with `--size 3b` this stands in for
the real PaliGemma 3B at 224 pixels (2,923,466,480 weights, 5.8 GB in bfloat16).
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from paligemma.checkpoint import empty_model, published_name
from paligemma.gemma import GemmaConfig
from paligemma.model import PaliGemmaConfig
from paligemma.siglip import SiglipVisionConfig
from paligemma.support.config import TEXT_DEFAULTS, VISION_DEFAULTS, config_dict
from paligemma.support.tensors import INDEX

SIZES = {
    "tiny": PaliGemmaConfig(
        SiglipVisionConfig(32, 64, 2, 2, image_size=56),
        GemmaConfig(576, 32, 64, 2, 4, 1, 8),
        image_token_index=512,
    ),
    "small": PaliGemmaConfig(  # 141 million weights, 256 image tokens
        SiglipVisionConfig(384, 1536, 8, 6),
        GemmaConfig(32832, 768, 3072, 12, 6, 1, 128),
        image_token_index=32768,
    ),
    "3b": PaliGemmaConfig(),
}
LAYOUTS = {
    "hub": published_name,  # as Google published it
    "memory": lambda name: f"model.{name}",  # as transformers names its modules
}
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
# The feed-forward layers are made louder than what they are added to: otherwise the model would
# repeat one token for ever, and two implementations that give the same answer would prove little.
LOUD = 8.0


def sparse_config(config: PaliGemmaConfig, dtype: torch.dtype) -> dict:
    """`config.json` as published: fields that have transformers' default are left out."""
    value: dict[str, Any] = config_dict(config)
    value["torch_dtype"] = str(dtype).removeprefix("torch.")
    text = TEXT_DEFAULTS[value["text_config"]["model_type"]]
    for section, defaults in (("text_config", text), ("vision_config", VISION_DEFAULTS)):
        for name, default in defaults.items():
            if value[section][name] == default:
                del value[section][name]
    return value


def random_rows(
    name: str, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Blocks of rows of one tensor, at most 32 MB in float32 each; scales that keep logits finite.

    Norms are near the identity, biases near 0, matrices have a standard deviation of
    1/√(fan in), so that every activation keeps about its size.
    """
    fan_in = math.prod(shape[1:])
    rows = max(1, 2**23 // fan_in)
    for start in range(0, shape[0], rows):
        size = (min(rows, shape[0] - start), *shape[1:])
        block = torch.randn(size, generator=generator)
        if len(shape) == 1:
            layer_norm = name.startswith("vision_tower.") and "norm" in name
            block = block * 0.02 + (1.0 if layer_norm and name.endswith("weight") else 0.0)
        else:
            loud = LOUD if "down_proj" in name else 1.0
            block *= loud / math.sqrt(fan_in)
        yield block.to(dtype)


def write_shard(
    file: Path, tensors: dict[str, tuple[str, torch.Size]], dtype: torch.dtype, generator, bar
) -> None:
    """Write one safetensors file: header length, header, then every tensor's bytes in turn."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for stored, (_, shape) in tensors.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        header[stored] = {
            "dtype": DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts on a multiple of 8 bytes
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors.values():
            for block in random_rows(name, shape, dtype, generator):
                out.write(block.view(torch.uint8).numpy().data)
                bar.update(block.nbytes)


def write_checkpoint(
    path: Path,
    config: PaliGemmaConfig,
    dtype: torch.dtype = torch.bfloat16,
    layout: str = "hub",
    seed: int = 0,
    max_shard_bytes: int = 5_000_000_000,
    progress: bool = False,
) -> int:
    """Write config.json, the shards and their index.

    Args:
        path: an empty or new directory.
        config: shapes.
        dtype: of the weights.
        layout: a key of `LAYOUTS`.
        seed: the same seed, the same files.
        max_shard_bytes: more than that is split, as published.
        progress: show a bar on standard error.

    Returns:
        Bytes of weights.
    """
    shapes = {name: t.shape for name, t in empty_model(config).state_dict().items()}
    shards, size = [{}], 0
    for name, shape in shapes.items():
        nbytes = shape.numel() * dtype.itemsize
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][LAYOUTS[layout](name)] = (name, shape)
        size += nbytes
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    total = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    path.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for file, tensors in zip(files, shards, strict=True):
            write_shard(path / file, tensors, dtype, generator, bar)
    if len(shards) > 1:
        index = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": index}
        (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    value = sparse_config(config, dtype)
    (path / "config.json").write_text(json.dumps(value, indent=2) + "\n")
    return total


def clear(path: Path, force: bool) -> None:
    """Make room for a checkpoint; without `force` a directory that holds anything is refused.

    Raises:
        ValueError: a file is in the way, the directory is not empty, or (with `force`) it holds
            anything but an earlier checkpoint.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; give the name of a directory")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not force:
        raise ValueError(f"{path} is not empty; give another directory, or --force to replace it")
    ours = {*path.glob("*.safetensors"), path / INDEX, path / "config.json"}
    foreign = sorted(set(path.iterdir()) - ours)
    if foreign:
        raise ValueError(
            f"{path} also holds {foreign[0].name}, which no checkpoint of this tool has; "
            "remove it yourself, or give another directory"
        )
    for file in ours:
        file.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""example:
  python tools/random_checkpoint.py checkpoints/random-3b --size 3b
  python tools/bench.py --model_path checkpoints/random-3b --rounds 3
  rm -r checkpoints/random-3b

There is no tokenizer.model: load_model and tools/bench.py need none, Processor does.""",
    )
    parser.add_argument("directory", type=Path, help="where to write; must be new or empty")
    parser.add_argument("--size", choices=SIZES, default="3b", help="shapes (default: %(default)s)")
    parser.add_argument("--layout", choices=LAYOUTS, default="hub", help="tensor names")
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    parser.add_argument("--dtype", choices=names, default="bfloat16", help="of the weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace an earlier checkpoint")
    args = parser.parse_args(arguments)
    config, dtype = SIZES[args.size], getattr(torch, args.dtype)
    try:
        clear(args.directory, args.force)
        wanted = sum(t.numel() for t in empty_model(config).parameters()) * dtype.itemsize
        parent = next(p for p in (args.directory, *args.directory.absolute().parents) if p.exists())
        free = shutil.disk_usage(parent).free
        if wanted > free:
            raise ValueError(f"needs {wanted / 1e9:.1f} GB, {parent} has {free / 1e9:.1f} GB free")
    except ValueError as error:
        parser.error(str(error))
    show = sys.stderr.isatty()
    total = write_checkpoint(args.directory, config, dtype, args.layout, args.seed, progress=show)
    print(f"{args.directory}: {total // dtype.itemsize:,} weights, {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
