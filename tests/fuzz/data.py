"""Mask codecs, data sets and the states of training runs."""

import io
import json
import pickle
import random
import struct
import zipfile
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
from mutate import (
    PICTURES,
    TINY,
    Payload,
    Run,
    broken_json,
    broken_tensors,
    hold,
    mangle,
    no_file,
    value,
)

from paligemma.checkpoint import load_model
from paligemma.inference import find_codec
from paligemma.mask_codec import MaskCodec
from paligemma.support.pictures import open_picture
from paligemma.training import JsonlDataset, TrainingConfig, train

# ---------------------------------------------------------------- mask codecs


@cache
def codec_arrays() -> dict[str, np.ndarray]:
    codec = find_codec(TINY)
    return {name: tensor.numpy() for name, tensor in codec.state_dict().items()}


def codecs(rng: random.Random, folder: Path) -> tuple[str, Run]:
    """vae-oid.npz and mask_codec.safetensors."""
    folder.mkdir()
    if rng.random() < 0.4:
        file = folder / "mask_codec.safetensors"
        name, data = broken_tensors(rng, (TINY / file.name).read_bytes())
        file.write_bytes(data)
    else:
        file = folder / "vae-oid.npz"
        name = npz(rng, file)
    if rng.random() < 0.05:
        name = no_file(rng, file)
    read = MaskCodec.from_npz if file.suffix == ".npz" else MaskCodec.from_pretrained

    def run() -> None:
        codec = read(file)
        drawn = codec.decode(torch.zeros(1, 16, dtype=torch.int64))
        hold(bool(drawn.isfinite().all()), "a mask of NaN")
        if codec.encoder is not None:
            codec.encode(torch.ones(1, 64, 64))

    return name, run


def npz(rng: random.Random, file: Path) -> str:
    arrays = dict(codec_arrays())
    key, how = rng.choice(sorted(arrays)), rng.randrange(9)
    if how == 0:
        arrays[key] = np.array([Payload(file.parent.parent / "executed")], dtype=object)
        name = "a pickled object"
    elif how == 1:
        kinds = [
            "int8",
            "uint8",
            "complex64",
            "U4",
            "datetime64[s]",
            "float16",
            "longdouble",
            "i4,f4",
        ]
        kind = rng.choice(kinds)
        arrays[key] = np.zeros(arrays[key].shape, dtype=kind)
        name = f"{key} of {kind}"
    elif how == 2:
        arrays[key] = np.full_like(arrays[key], rng.choice([np.nan, np.inf, -np.inf]))
        name = f"{key} not finite"
    elif how == 3:
        arrays[key] = rng.choice([arrays[key][None], arrays[key].ravel()[:3], np.float32(3)])
        name = f"{key} of another shape"
    elif how == 4:
        del arrays[key]
        name = f"without {key}"
    elif how == 5:
        name = "an odd header"
        header = rng.choice([(2**40, 2**20), (10**9,), (-1,), (0,), (3, 3)])
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {header}, }}\n"
        text = rng.choice(
            [text, "__import__('os')\n", "(" * 5000 + "\n", "{}\n", text[:9]]
        ).encode()
        body = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(64)
        with zipfile.ZipFile(file, "w") as made:
            made.writestr(f"{key}.npy", body)
        return name
    elif how == 6:  # hundreds of megabytes of zeros in less than one, said to be four gigabytes
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**28}, 4), }}\n".encode()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
            with made.open(
                f"{rng.choice(['decoder.0.bias', key])}.npy", "w", force_zip64=True
            ) as out:
                out.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)
                for _ in range(rng.choice([64, 320])):
                    out.write(bytes(2**20))
        return "a bomb"
    np.savez(file, **arrays)
    if how > 6:
        name, data = mangle(
            rng, file.read_bytes(), *rng.choice([(0, None), (-9999, None), (0, 300)])
        )
        file.write_bytes(data)
    return name


# ---------------------------------------------------------------- training


def datasets(rng: random.Random, folder: Path) -> tuple[str, Run]:
    """JSON lines of picture, prefix, suffix."""
    folder.mkdir()
    good = {"image": str(PICTURES / "scene.png"), "prefix": "caption en", "suffix": "a cat"}
    lines, how = [json.dumps(good).encode()] * 3, rng.random()
    file = folder / "train.jsonl"
    if how < 0.4:
        name, lines[1] = broken_json(rng, good)
    elif how < 0.7:
        field = rng.choice(sorted(good))
        odd = good | {field: value(rng)}
        lines[1] = json.dumps(odd).encode(errors="surrogatepass")
        name = f"{field} = {odd[field]!r:.40}"
    elif how < 0.8:
        images = ["../../x", "", ".", "/dev/zero", "\x00", "n" * 300, "a/../../b"]
        lines[1] = json.dumps(good | {"image": rng.choice(images)}).encode()
        name = "a picture elsewhere"
    elif how < 0.9:
        name, data = mangle(rng, b"\n".join(lines))
        lines = data.split(b"\n")
    else:
        name = ""
    file.write_bytes(b"\n".join(lines))
    name = name or no_file(rng, file)
    given = rng.choice([file, folder])

    def run() -> None:
        data = JsonlDataset(given)
        for item in (data[i] for i in range(len(data))):
            hold(all(isinstance(item[k], str) for k in ("prefix", "suffix")), "no texts")
            open_picture(item["image"])

    return name, run


DATA = [{"image": np.zeros((8, 8, 3), np.uint8), "prefix": "caption en", "suffix": "a"}] * 2
ONCE = {"batch_size": 1, "save_every": 1, "save": False}


@cache
def run_state() -> bytes:
    """The checkpoint of a run that stopped after one step."""
    place = Path(mkdtemp())
    train(small(), DATA, TrainingConfig(steps=1, folder=place, **ONCE))
    return (place / "checkpoint.pt").read_bytes()


def small():
    """The shipped model, of which little is trained: runs are quick."""
    model = load_model(TINY)
    model.requires_grad_(False)
    model.multi_modal_projector.requires_grad_(True)
    return model


def resumes(rng: random.Random, folder: Path) -> tuple[str, Run]:
    """checkpoint.pt, flipped, cut, foreign, with other things inside, or with code."""
    folder.mkdir()
    file, how = folder / "checkpoint.pt", rng.random()
    if how < 0.3:
        name, data = mangle(rng, run_state())
        file.write_bytes(data)
    elif how < 0.85:
        state = torch.load(io.BytesIO(run_state()), weights_only=True)
        name = spoil_state(rng, state)
        torch.save(state, file)
    elif how < 0.95:
        name, bad = "code", Payload(folder.parent / "executed")
        if rng.random() < 0.5:
            torch.save({"model": bad, "config": bad}, file)
        else:
            file.write_bytes(pickle.dumps(bad))
    else:
        name = no_file(rng, file)

    def run() -> None:
        losses = train(small(), DATA, TrainingConfig(steps=2, folder=folder, **ONCE))
        hold(len(losses) >= 2 and all(np.isfinite(losses)), f"losses {losses}"[:80])

    return name, run


def spoil_state(rng: random.Random, state: dict) -> str:
    field = rng.choice(sorted(state))
    inner, how = state[field], rng.random()
    if how < 0.2:
        del state[field]
        return f"without {field}"
    if how < 0.5 or not isinstance(inner, (dict, list)) or not inner:
        state[field] = rng.choice(
            [value(rng), torch.zeros(3), {}, [], [1.0, 2.0, 3.0], [float("nan")]]
        )
        return f"{field} = {state[field]!r:.40}"
    if field == "optimizer" and rng.random() < 0.7:
        slot = rng.choice(sorted(inner["state"][0]))
        odd = [
            torch.zeros(3),
            torch.full((2, 2), torch.nan),
            torch.zeros(3, dtype=torch.int8),
            value(rng),
        ]
        inner["state"][0][slot] = rng.choice(odd)
        return f"optimizer.{slot}"
    key = rng.choice(list(inner)) if isinstance(inner, dict) else 0
    inner[key] = rng.choice([value(rng), torch.zeros(2), torch.zeros(2, dtype=torch.int64)])
    if isinstance(inner[key], torch.Tensor) and field == "model" and rng.random() < 0.5:
        inner[key] = torch.full((128, 128), torch.nan)
    return f"{field}.{key} = {inner[key]!r:.30}"
