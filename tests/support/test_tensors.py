"""The weights of a checkpoint: which files, whose model, each tensor accounted for; shards."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from paligemma.support.files import CheckpointError, open_tensors
from paligemma.support.replacing import replacing
from paligemma.support.tensors import (
    INDEX,
    SINGLE,
    check_family,
    match_tensors,
    open_arrays,
    weight_files,
    write_weights,
)

TENSORS = {f"layer.{i}.weight": torch.full((4, 4), float(i)) for i in range(5)}  # 64 bytes each


def test_files_beside_the_weights(tmp_path):
    for name in ("adapter_model.safetensors", "mask_codec.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        weight_files(tmp_path)
    (tmp_path / "part-b.safetensors").touch()
    (tmp_path / "part-a.safetensors").touch()
    (tmp_path / "folder.safetensors").mkdir()
    assert [file.name for file in weight_files(tmp_path)] == [
        "part-a.safetensors",
        "part-b.safetensors",
    ]
    (tmp_path / SINGLE).touch()
    assert weight_files(str(tmp_path)) == [tmp_path / SINGLE]


def test_another_format(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"holds model\.gguf, llama\.cpp's GGUF format; load"):
        weight_files(tmp_path)


def test_weights_in_shards(tmp_path):
    for limit, count in ((10**6, 1), (128, 3), (1, 5), (10**6, 1)):
        with replacing(tmp_path) as draft:
            write_weights(draft, TENSORS, limit)
        assert len(weight_files(tmp_path)) == count
        found = open_tensors(weight_files(tmp_path))
        assert found.keys() == TENSORS.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
        assert len(list(tmp_path.iterdir())) == count + (count > 1)
    index = json.dumps({"weight_map": {"a": "x" * 400 + ".safetensors"}})
    (tmp_path / SINGLE).unlink()
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match="1 of 1 shards missing") as caught:
        weight_files(tmp_path)
    assert len(str(caught.value)) < 250 + len(str(tmp_path))


def test_shards_of_two_saves(tmp_path):
    for _ in range(2):
        old = {file: file.read_bytes() for file in tmp_path.glob("*.safetensors")}
        with replacing(tmp_path) as draft:
            write_weights(draft, TENSORS, 128)
    file, data = old.popitem()
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="shards of 2 saves"):
        open_tensors(weight_files(tmp_path))
    save_file(load_file(file), file)  # a shard that says nothing belongs to no known save
    with pytest.raises(CheckpointError, match="shards of 2 saves"):
        open_tensors(weight_files(tmp_path))


def test_match():
    expected = {"a": torch.empty(2, device="meta"), "b": torch.empty(1, 3, device="meta")}
    good = {"a": torch.ones(2), "b": torch.ones(1, 3)}
    match_tensors("here", good, expected)
    match_tensors("here", good, expected, finite=True)
    cases = {
        r"here holds C, for which this model has no place": good | {"c": torch.ones(1)},
        r"here: A is \[3\]; expected \[2\]": good | {"a": torch.ones(3)},
        r"here: A is torch\.uint8; expected float32": good | {"a": torch.ones(2).byte()},
        r"here lacks 1 of 2 tensors, the first is B": {"a": good["a"]},
    }
    for message, tensors in cases.items():
        with pytest.raises(CheckpointError, match=message):
            match_tensors("here", tensors, expected, str.upper)
    for value in (float("nan"), float("inf")):
        bad = good | {"a": torch.tensor([1, value])}
        match_tensors("here", bad, expected)
        with pytest.raises(CheckpointError, match="here: a holds NaN or infinity"):
            match_tensors("here", bad, expected, finite=True)


ONE = [f"language_model.layers.{i}.self_attn.q_proj.weight" for i in range(3)]
TWO = ONE + ["language_model.layers.0.pre_feedforward_layernorm.weight"]
VISION = [f"vision_tower.encoder.layers.{i}.self_attn.q_proj.weight" for i in range(2)]


def test_family():
    check_family("here", ONE + VISION, ONE + VISION)
    check_family("here", TWO, TWO)
    check_family("here", ["extra"], TWO)  # too little to tell
    cases = [
        (ONE, TWO, "weights of a PaliGemma 1 beside the config.json of a PaliGemma 2"),
        (TWO, ONE, "weights of a PaliGemma 2 beside the config.json of a PaliGemma 1"),
        (ONE[:2] + VISION, ONE + VISION, "2 layers of the language_model; config.json asks for 3"),
        (ONE + VISION, ONE[:2] + VISION, "3 layers of the language_model; config.json asks for 2"),
        (ONE + VISION, ONE + VISION[:1], r"2 layers of the vision_tower; .*vision_config\.num_hi"),
        (ONE + ["a.absmax"], ONE, "quantised by another program"),
    ]
    for stored, expected, message in cases:
        with pytest.raises(CheckpointError, match=message):
            check_family("here", stored, expected)
    for method, message in (
        ({"quant_method": "awq"}, "here was quantised by awq; load the model it was made from"),
        ({"bits": 4}, "quantised by another program"),
        ("yes", "quantised by yes"),
        ({"quant_method": ["x"]}, "quantised by another program"),
        ({"quant_method": "paligemma"}, r"use paligemma\.load"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_family("here", ONE, ONE, method)


# ---------------------------------------------------------------- npz


def test_arrays_and_only_those_that_are_asked_for(tmp_path):
    np.savez(tmp_path / "a.npz", **{"x.a": np.arange(3), "y": np.array([{}], dtype=object)})
    (found,) = open_arrays(tmp_path / "a.npz", ("x.",)).items()
    assert found[0] == "x.a" and found[1].tolist() == [0, 1, 2]
    with pytest.raises(CheckpointError, match="not an npz file of arrays"):
        open_arrays(tmp_path / "a.npz", ("y",))


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(1 << 26, np.float64))
    assert (tmp_path / "a.npz").stat().st_size < 1_000_000

    def unpack(*_, **__):
        raise AssertionError("it was unpacked")

    monkeypatch.setattr(np, "load", unpack)
    with pytest.raises(CheckpointError, match="512 MiB unpacked"):
        open_arrays(tmp_path / "a.npz", ("x",))


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises(CheckpointError, match="no file"):
        open_arrays(tmp_path / "a.npz", ("x",))
