"""Checkpoints, their configs, quantised saves and adapters."""

import json
import random
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from mutate import (
    PICTURES,
    TINY,
    Payload,
    Run,
    broken_json,
    broken_tensors,
    hold,
    link_tiny,
    no_file,
    value,
    with_header,
)

import paligemma
from paligemma.checkpoint import load_model, save_model
from paligemma.lora import add_lora, save_adapter
from paligemma.model import PaliGemma
from paligemma.processor import Processor

SCENE = PICTURES / "scene.png"


@cache
def processor() -> Processor:
    return Processor.from_pretrained(TINY)


def answer(pipeline: paligemma.Pipeline) -> None:
    """It loaded: then it answers, in words."""
    hold(isinstance(pipeline(SCENE, "caption en", max_new_tokens=3), str), "no text")


def loads(folder: Path, **options) -> Run:
    return lambda: answer(paligemma.load(folder, **options))


# ---------------------------------------------------------------- weights


def checkpoints(rng: random.Random, folder: Path) -> tuple[str, Run]:
    """Broken weights, broken indices, foreign things in their place."""
    link_tiny(folder, "model.safetensors")
    file, how = folder / "model.safetensors", rng.random()
    data = (TINY / "model.safetensors").read_bytes()
    if how < 0.6:
        name, spoilt = broken_tensors(rng, data)
        file.write_bytes(spoilt)
    elif how < 0.7:
        name = no_file(rng, file)
    elif how < 0.75:
        name = "a pickle"
        torch.save({"a": Payload(folder.parent / "executed")}, file)
    elif how < 0.8:
        name = switched(rng, folder)
    else:
        name = sharded(rng, folder)

    def run() -> None:
        model = load_model(folder, dtype=rng.choice([None, torch.float32, torch.bfloat16]))
        hold(isinstance(model, PaliGemma), "no model")
        answer(paligemma.Pipeline(model, processor()))

    return name, run


@cache
def shards() -> tuple[dict, dict[str, bytes]]:
    """The shipped weights in shards: the index, and the files."""
    place = Path(mkdtemp())
    save_model(load_model(TINY, dtype=None), place, max_shard_bytes=10**6)
    index = json.loads((place / "model.safetensors.index.json").read_text())
    return index, {file.name: file.read_bytes() for file in place.glob("*.safetensors")}


def switched(rng: random.Random, folder: Path) -> str:
    """What an interrupted save leaves, with other things in it than a save would write."""
    place = folder / ".paligemma-switched"
    place.mkdir()
    odd = [
        "../model.safetensors",
        "/etc/passwd",
        "config.json",
        "model.safetensors",
        "\x00",
        "n" * 300,
    ]
    (place / ".paligemma-older").write_text("\n".join(rng.sample(odd, 3)))
    inner = rng.choice(["config.json", "model.safetensors", "tokenizer.model"])
    return f"switched: {no_file(rng, place / inner)}"


def sharded(rng: random.Random, folder: Path) -> str:
    index, files = json.loads(json.dumps(shards()[0])), dict(shards()[1])
    shard, weights = rng.choice(sorted(files)), index["weight_map"]
    tensor, how = rng.choice(sorted(weights)), rng.randrange(6)
    if how == 0:
        del files[shard]
        name = "a shard is absent"
    elif how == 1:
        name, files[shard] = broken_tensors(rng, files[shard])
    elif how == 2:
        outside = [
            "../x",
            f"/{shard}",
            f"../{folder.name}/{shard}",
            "",
            ".",
            "..",
            "a/../b",
            "config.json",
        ]
        weights[tensor] = rng.choice([*outside, "\x00", "n" * 300, shard.upper(), value(rng)])
        name = f"index: {weights[tensor]!r:.30}"
    elif how == 3:
        files["model.safetensors"] = (TINY / "model.safetensors").read_bytes()
        name = "single and shards"
    elif how == 4:
        weights[tensor] = shard
        name = "a tensor in another shard, says the index"
    else:
        name = "index"
    text = json.dumps(index).encode(errors="surrogatepass")
    if how == 5:
        name, text = broken_json(rng, index)
    (folder / "model.safetensors.index.json").write_bytes(text)
    for file, data in files.items():
        (folder / file).write_bytes(data)
    return name


# ---------------------------------------------------------------- config.json and its neighbours


def configs(rng: random.Random, folder: Path) -> tuple[str, Run]:
    """config.json with any field changed, of PaliGemma or of PaliGemma 2."""
    link_tiny(folder, "config.json")
    file, config = folder / "config.json", json.loads((TINY / "config.json").read_text())
    if rng.random() < 0.3:
        text = {"query_pre_attn_scalar": 32, "sliding_window": 8, "attn_logit_softcapping": 50.0}
        text |= {"model_type": "gemma2", "final_logit_softcapping": 30.0}
        config["text_config"] |= text | {"layer_types": ["sliding_attention", "full_attention"] * 2}
    config["text_config"] |= {"max_position_embeddings": 8192, "rope_scaling": None}
    how = rng.random()
    if how < 0.1:
        name = no_file(rng, file)
    elif how < 0.3:
        part = config[rng.choice(["text_config", "vision_config"])]
        field = rng.choice([name for name, one in part.items() if isinstance(one, int)])
        part[field] = rng.choice([100_000, 10**7, 10**9, 2**63, 10**400, 0, -1, 3])
        name = f"{field} = {part[field]!r:.20}"
        file.write_text(json.dumps(config))
    else:
        name, text = broken_json(rng, config)
        file.write_bytes(text)

    def run() -> None:
        model = load_model(folder)
        answer(paligemma.Pipeline(model, Processor.from_pretrained(folder)))

    return name, run


def settings(rng: random.Random, folder: Path) -> tuple[str, Run]:
    """preprocessor_config.json and processor_config.json."""
    link_tiny(folder, "preprocessor_config.json")
    wanted = json.loads((TINY / "preprocessor_config.json").read_text())
    newer = rng.random() < 0.3
    file = folder / ("processor_config.json" if newer else "preprocessor_config.json")
    if rng.random() < 0.15:
        name = no_file(rng, file)
    elif rng.random() < 0.3:
        field = rng.choice(["image_mean", "image_std", "size", "resample", "rescale_factor"])
        odd = ["123", [1, 2], [1, 2, 3], [10**400] * 3, [True] * 3, ["0.5"] * 3, {"height": 10**6}]
        odd += [{"height": 10**6, "width": 10**6}, 10**5, 10**9, [1e308] * 3, [1e-320] * 3]
        wanted[field] = rng.choice([*odd, value(rng)])
        name = f"{field} = {wanted[field]!r:.40}"
        text = json.dumps({"image_processor": wanted} if newer else wanted)
        file.write_bytes(text.encode(errors="surrogatepass"))
    else:
        name, text = broken_json(rng, {"image_processor": wanted} if newer else wanted)
        file.write_bytes(text)

    def run() -> None:
        from paligemma.image_processor import ImageProcessor

        pixels = ImageProcessor.from_pretrained(folder, 112)(SCENE)
        hold(pixels.ndim == 4 and bool(pixels.isfinite().all()), "pixels that are no numbers")
        Processor.from_pretrained(folder)

    return name, run


# ---------------------------------------------------------------- quantised saves and adapters


@cache
def quantized(mode: str) -> dict[str, bytes]:
    place = Path(mkdtemp())
    paligemma.load(quantize=mode).save(place)
    return {file.name: file.read_bytes() for file in place.iterdir() if file.is_file()}


def quantised(rng: random.Random, folder: Path) -> tuple[str, Run]:
    """What `save_quantized` wrote, spoilt: weights of other types, other settings."""
    mode = rng.choice(["int8", "int4"])
    files, how = dict(quantized(mode)), rng.random()
    if how < 0.6:
        name, files["model.safetensors"] = broken_tensors(rng, files["model.safetensors"])
    else:
        config = json.loads(files["config.json"])
        if how < 0.85:
            part = config["quantization_config"]
            part[rng.choice(sorted(part))] = rng.choice(["int8", "int4", 32, 64, value(rng)])
            name = f"{part!r:.90}"
            files["config.json"] = json.dumps(config).encode(errors="surrogatepass")
        else:
            name, files["config.json"] = broken_json(rng, config)
    folder.mkdir()
    for file, data in files.items():
        (folder / file).write_bytes(data)
    return f"{mode}: {name}", loads(folder, quantize=rng.choice([None, None, mode]))


@cache
def adapter_files() -> dict[str, bytes]:
    model, place = load_model(TINY), Path(mkdtemp())
    add_lora(model, rank=4)
    save_adapter(model, place)
    return {file.name: file.read_bytes() for file in place.iterdir() if file.is_file()}


def adapters(rng: random.Random, folder: Path) -> tuple[str, Run]:
    """An adapter, given to the shipped model: its config or its tensors spoilt."""
    folder.mkdir()
    files, how = dict(adapter_files()), rng.random()
    config = json.loads(files["adapter_config.json"])
    alone = rng.random() < 0.2
    config["base_model_name_or_path"] = str(TINY) if alone else None
    files["adapter_config.json"] = json.dumps(config).encode()
    if how < 0.4:
        name, data = broken_tensors(rng, files["adapter_model.safetensors"])
        files["adapter_model.safetensors"] = data
    elif how < 0.6:
        field = rng.choice(["r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "peft_type"])
        config[rng.choice([field, "base_model_name_or_path", "modules_to_save"])] = value(rng)
        name = f"{config!r:.90}"
        files["adapter_config.json"] = json.dumps(config).encode(errors="surrogatepass")
    elif how < 0.9:
        name, files["adapter_config.json"] = broken_json(rng, config)
    else:
        name = "tensors of another file"
        files["adapter_model.safetensors"] = with_header({}, b"")
    for file, data in files.items():
        (folder / file).write_bytes(data)
    if rng.random() < 0.1:
        name = no_file(rng, folder / rng.choice(sorted(files)))
    return name, loads(folder) if alone else loads(TINY, adapter=folder)
