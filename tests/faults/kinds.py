"""What is saved while processes are killed: each kind in versions that can be told apart.

Every number of version v is made of v: weights, config, sizes of pictures, words of the tokenizer,
rank scales. So what is loaded equals one version as a whole, or it is a mixture.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import paligemma
from paligemma.checkpoint import load_model, save_model
from paligemma.gemma import GemmaConfig
from paligemma.image_processor import ImageProcessor
from paligemma.inference import TINY, Pipeline
from paligemma.lora import adapters, add_lora, load_adapter, save_adapter
from paligemma.mask_codec import MaskCodec
from paligemma.model import PaliGemma, PaliGemmaConfig
from paligemma.processor import Processor
from paligemma.quantization import quantize_model
from paligemma.siglip import SiglipVisionConfig
from paligemma.support.quantized import load_quantized, save_quantized
from paligemma.tokenizer import Tokenizer


@dataclass
class Kind:
    """A way to save: `save(version, folder)`; `load(folder)` → (version, whether it is whole)."""

    save: Callable[[int, Path], Any]
    load: Callable[[Path], tuple[int, bool]]


def small_model(version: int) -> PaliGemma:
    """A model whose weights are all `version`, and whose config says so too."""
    text = GemmaConfig(2240, 64, 128, 2, 2, 1, 32, rope_theta=10_000.0 + version)
    vision = SiglipVisionConfig(64, 128, 2, 2, image_size=28, patch_size=14)
    model = PaliGemma(PaliGemmaConfig(vision, text, image_token_index=2176)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(version)
    return model


def version_of(model: PaliGemma) -> int:
    return int(model.config.text_config.rope_theta - 10_000)


def same_state(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- models


def save_single(version: int, folder: Path) -> None:
    save_model(small_model(version), folder)


def save_shards(version: int, folder: Path) -> None:
    """In one file, or in shards, fewer or more, by the version."""
    save_model(small_model(version), folder, (5_000_000_000, 400_000, 100_000)[version % 3])


def load_whole(folder: Path) -> tuple[int, bool]:
    model = load_model(folder, dtype=None)
    version = version_of(model)
    return version, same_state(model, small_model(version))


def quantized(version: int) -> PaliGemma:
    """int8 and int4 by turns."""
    return quantize_model(small_model(version), ("int8", "int4")[version % 2])


def load_few_bits(folder: Path) -> tuple[int, bool]:
    model = load_quantized(folder)
    version = version_of(model)
    return version, same_state(model, quantized(version))


# ---------------------------------------------------------------- adapters


def adapted(version: int) -> PaliGemma:
    model = small_model(0)
    add_lora(model, 1 + version % 3, alpha=version)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_A.weight.fill_(version)
            layer.lora_B.weight.fill_(-version)
    return model


def load_lora(folder: Path) -> tuple[int, bool]:
    model = small_model(0)
    load_adapter(model, folder)
    version = int(next(iter(adapters(model).values())).alpha)
    expected = adapted(version)
    ranks = {(layer.rank, layer.alpha) for layer in adapters(model).values()}
    return version, same_state(model, expected) and ranks == {(1 + version % 3, version)}


# ---------------------------------------------------------------- pipelines


def pipeline(version: int) -> Pipeline:
    """Model (quantised, every other one), tokenizer, pictures' settings and mask codec."""
    tokenizer = Tokenizer(TINY / "tokenizer.model")
    tokenizer.added[f"<version{version}>"] = tokenizer.image_id + 1
    processor = Processor(tokenizer, ImageProcessor(28, mean=(version,) * 3), 4)
    codec = MaskCodec(16, 8, 16)
    with torch.no_grad():
        for parameter in codec.parameters():
            parameter.fill_(version)
    model = quantized(version) if version % 4 > 1 else small_model(version)
    return Pipeline(model, processor, codec)


def load_pipeline(folder: Path) -> tuple[int, bool]:
    found = paligemma.load(folder)
    version = version_of(found.model)
    expected = pipeline(version)
    parts, theirs = found.processor, expected.processor
    return version, (
        same_state(found.model, expected.model)
        and same_state(found.codec, expected.codec)
        and parts.image_processor.mean == theirs.image_processor.mean
        and parts.tokenizer.added == theirs.tokenizer.added
    )


KINDS = {
    "model, one file": Kind(save_single, load_whole),
    "model, shards": Kind(save_shards, load_whole),
    "int8 over int4": Kind(lambda v, folder: save_quantized(quantized(v), folder), load_few_bits),
    "adapter": Kind(lambda v, folder: save_adapter(adapted(v), folder), load_lora),
    "whole pipeline": Kind(lambda v, folder: pipeline(v).save(folder), load_pipeline),
}
