"""Folders, the hub, JSON, safetensors, atomic writes: each fault is one clear line."""

import json
import os
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from paligemma.support.files import (
    CheckpointError,
    adapter_base,
    check_folder,
    check_path,
    find_folder,
    open_tensors,
    read_json,
    shorten,
    spell_path,
)

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX")


def one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message and message
    return message


# ---------------------------------------------------------------- values


def test_shorten():
    assert shorten("cat") == "'cat'" and shorten([1, None]) == "[1, None]"
    assert len(shorten("x" * 10_000)) == len(shorten(list(range(1000)))) == 60
    assert shorten("x" * 100, 10) == "'xxxxxxxx…"
    assert shorten("a\nb") == r"'a\nb'"
    assert shorten(10**5000) == "a int"
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert shorten(deep) == "a list"
    while deep:  # taken apart here: its own end would be as deep
        deep = deep.pop()


# ---------------------------------------------------------------- JSON


def test_json(tmp_path):
    file = tmp_path / "a.json"
    for value in ({"a": 1}, [1, 2], {}, []):
        file.write_text(json.dumps(value))
        assert read_json(file) == read_json(str(file)) == value
        assert read_json(file, type(value)) == value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"3", "is 3; expected a JSON object"),
        (b"null", "is None; expected a JSON object"),
        (b'"' + b"x" * 10_000 + b'"', "expected a JSON object"),
        (b"9" * 10_000, "is not JSON"),
    ],
)
def test_json_that_is_none(tmp_path, data, message):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json(tmp_path / "a.json")
    assert len(one_line(caught)) < 250 + len(str(tmp_path))


def test_json_of_another_kind(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"is \[1\]; expected a JSON object"):
        read_json(tmp_path / "a.json", dict)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is \{\}; expected a JSON list"):
        read_json(tmp_path / "a.json", list)


def test_no_json(tmp_path):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    for name in ("absent.json", "folder.json", "loop.json", "x" * 300):
        with pytest.raises(CheckpointError, match=f"no {name} in"):
            read_json(tmp_path / name)


@POSIX
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no pipe\.json"):
        read_json(tmp_path / "pipe.json")
    with pytest.raises(CheckpointError, match="no file"):
        open_tensors([tmp_path / "model.safetensors"])


@POSIX
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root reads all")
def test_unreadable_json(tmp_path):
    (tmp_path / "a.json").touch(0o000)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        read_json(tmp_path / "a.json")


# ---------------------------------------------------------------- folders and the hub


def test_a_directory_is_itself(tmp_path, monkeypatch):
    assert find_folder(tmp_path) == find_folder(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    assert find_folder("~/models") == find_folder("~/models/") == tmp_path / "models"
    monkeypatch.chdir(tmp_path)
    assert find_folder("models").resolve() == (tmp_path / "models").resolve()


def test_hub_cache(tmp_path):
    cache = tmp_path / "models--google--paligemma-3b-pt-224"
    with_nothing = cache / "snapshots"
    with_nothing.mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds no snapshot; download it again"):
        find_folder(cache)
    for age, commit in ((300, "aaa"), (100, "bbb"), (200, "ccc")):
        (cache / "snapshots" / commit).mkdir()
        os.utime(cache / "snapshots" / commit, (10**9 - age, 10**9 - age))
    assert find_folder(cache).name == "bbb"  # the newest
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("aaa\n")
    (cache / "refs" / "float16").write_text("ccc")
    assert find_folder(cache).name == "aaa"  # what main is
    assert find_folder(cache, "float16").name == "ccc"
    assert find_folder(cache, "bbb").name == "bbb"
    assert find_folder(cache / "snapshots" / "ccc").name == "ccc"
    with pytest.raises(CheckpointError, match="no snapshot of v2"):
        find_folder(cache, "v2")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("https://example.org/google/paligemma", "is an address; download it first"),
        ("s3://bucket/model", "is an address; download it first"),
        ("no/such/folder", "no directory 'no/such/folder'; give a checkpoint directory or a hub"),
        ("nothing", "no directory 'nothing'"),
        ("~/no/such", "no directory '~/no/such'"),
        ("../a/b", "no directory"),
        ("x" * 10_000, "no directory"),
        ("a\0b", "no directory"),
        ("a\nb", "no directory"),
        ("", "path is ''; expected a directory or a hub name"),
        (None, "path is None; expected"),
        (3, "path is 3; expected"),
    ],
)
def test_no_directory(path, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        find_folder(path)
    assert len(one_line(caught)) < 350


def test_a_file_of_the_directory(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file; expected a directory: give") as caught:
        find_folder(tmp_path / "model.safetensors")
    assert repr(str(tmp_path)) in str(caught.value)


def test_long_directories_are_named_whole(tmp_path):
    folder = tmp_path / ("d" * 100)
    folder.mkdir()
    (folder / "config.json").touch()
    with pytest.raises(CheckpointError, match=str(folder)):
        find_folder(folder / "config.json")


def test_revision_of_a_directory(tmp_path):
    with pytest.raises(CheckpointError, match="revision is 'float16'"):
        find_folder(tmp_path, "float16")


class GatedRepoError(Exception):
    """As huggingface_hub calls it."""


def unauthorised():
    error = OSError("401 Client Error.\n\nCannot access repository someone/model.")
    error.response = types.SimpleNamespace(status_code=401)
    return error


GATED = "403 Client Error. (Request ID: x)\n\nAccess to model google/paligemma is restricted."


@pytest.mark.parametrize(
    ("error", "messages"),
    [
        (
            GatedRepoError(GATED),
            ["log in", "accept the licence at https://huggingface.co/someone/model", "403 Client"],
        ),
        (unauthorised(), ["log in", "licence", "401 Client Error. Cannot access repository"]),
        (OSError("offline"), ["the hub did not give it: offline"]),
        (ValueError(""), ["the hub did not give it: ValueError"]),
        (OSError("x" * 10_000), ["the hub did not give it: xxx"]),
    ],
)
def test_the_hub_refuses(monkeypatch, error, messages):
    def snapshot_download(name, **options):
        raise error

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(CheckpointError) as caught:
        find_folder("someone/model")
    assert all(message in one_line(caught) for message in messages)
    assert len(str(caught.value)) < 600


def test_the_hub_gives(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options["revision"]))
        assert "tokenizer.model" in options["allow_patterns"]
        return str(tmp_path)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert find_folder("someone/model_1.5") == find_folder("a/b", "float16") == tmp_path
    assert asked == [("someone/model_1.5", None), ("a/b", "float16")]


def test_without_the_hubs_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        find_folder("someone/model")


# ---------------------------------------------------------------- what lies in a directory


def test_adapter_alone(tmp_path):
    assert adapter_base(tmp_path) is None
    file = tmp_path / "adapter_config.json"
    for base, expected in (("google/x", "google/x"), (None, ""), (3, "")):
        file.write_text(json.dumps({"base_model_name_or_path": base}))
        assert adapter_base(tmp_path) == expected
    with pytest.raises(
        CheckpointError, match=r"an adapter alone; load its base .* adapter=.*not n"
    ):
        check_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # beside a base
    assert adapter_base(tmp_path) is None
    check_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("paligemma-3b-Q4_K_M.gguf", "GGUF"),
        ("paligemma-3b-pt-224.f16.npz", "NumPy arrays"),
        ("weights.npz", "MLX"),
        ("model.weights.h5", "Keras"),
        ("flax_model.msgpack", "Flax"),
        ("model.onnx", "ONNX"),
        ("pytorch_model.bin", "pickle, which can run any code"),
        ("consolidated.pth", "convert it to safetensors"),
    ],
)
def test_other_formats(tmp_path, name, message):
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=message) as caught:
        check_folder(tmp_path)
    assert f"no config.json in {tmp_path}; it holds {name}, " in one_line(caught)


def test_other_formats_do_not_cry_wolf(tmp_path):
    for name in ("vae-oid.npz", ".hidden.bin", "training_args.bin", "README.md"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="; give the directory of a checkpoint"):
        check_folder(tmp_path)


# ---------------------------------------------------------------- tensors


def test_tensors(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "1.safetensors")
    save_file({"c": torch.ones(1, dtype=torch.bfloat16)}, tmp_path / "2.safetensors")
    found = open_tensors([tmp_path / "1.safetensors", str(tmp_path / "2.safetensors")])
    assert {name: tuple(t.shape) for name, t in found.items()} == {"a": (2,), "b": (3,), "c": (1,)}
    assert found["c"].dtype == torch.bfloat16 and open_tensors([]) == {}
    save_file({"a": torch.ones(2)}, tmp_path / "3.safetensors")
    with pytest.raises(CheckpointError, match="holds a twice, in two files"):
        open_tensors([tmp_path / "1.safetensors", tmp_path / "3.safetensors"])


@pytest.mark.parametrize("data", [b"", b"\0" * 8, b"<html>" * 20, b"\xff" * 100, b"PK\3\4" * 9])
def test_no_tensors(tmp_path, data):
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="is truncated or not a safetensors file"):
        open_tensors([tmp_path / "a.safetensors"])
    with pytest.raises(CheckpointError, match="no file"):
        open_tensors([tmp_path / "absent.safetensors"])


def test_paths_in_messages():
    assert spell_path("a/b.png") == "a/b.png"
    assert spell_path("a\nb") == r"a\nb"
    assert len(spell_path("n/" * 2000)) < 200
    with pytest.raises(CheckpointError, match="path is 3; expected a string or a Path"):
        check_path(3)


def test_what_takes_several_lines_is_shortened_to_one():
    assert shorten(torch.zeros(2, 2)) == "tensor([[0., 0.], [0., 0.]])"
