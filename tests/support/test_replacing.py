"""Files of one save appear together or not at all: drafts, the switch, what is left of others."""

import errno
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from paligemma.support import replacing as module
from paligemma.support.replacing import DRAFT, OLDER, SWITCHED, SaveError, replacing, settled

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX")


def names_in(folder):
    return sorted(file.name for file in folder.iterdir())


def write(folder, **files):
    with replacing(folder) as draft:
        for name, text in files.items():
            (draft / name).write_text(text)


def read(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_all_or_none(tmp_path):
    folder = tmp_path / "new" / "folder"  # made when absent
    with replacing(folder) as draft:
        (draft / "a").write_text("1")
        (draft / "b").write_text("2")
        assert not (folder / "a").exists()
    assert read(folder) == {"a": "1", "b": "2"}
    with pytest.raises(KeyError), replacing(folder) as draft:
        (draft / "a").write_text("3")
        (draft / "c").write_text("4")
        raise KeyError("anything")
    assert read(folder) == {"a": "1", "b": "2"}
    write(folder, a="5")
    assert read(folder) == {"a": "5", "b": "2"}


def test_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("~/models", a="1")
    assert read(settled("~/models")) == {"a": "1"} == read(tmp_path / "models")


def test_a_save_made_of_several(tmp_path):
    write(tmp_path, a="old")
    with replacing(tmp_path) as draft:
        write(draft, a="1")
        write(draft, b="2")
        assert read(draft).items() >= {"a": "1", "b": "2"}.items() and names_in(draft)[0] == OLDER
        assert (tmp_path / "a").read_text() == "old"
    assert read(tmp_path) == {"a": "1", "b": "2"}
    message = rf"cannot write {tmp_path} \(no space\); its files are as they were"
    with pytest.raises(SaveError, match=message), replacing(tmp_path) as draft:
        write(draft, a="3")
        with replacing(draft):
            raise OSError("no space")
    assert read(tmp_path) == {"a": "1", "b": "2"}


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDED = [INDEX, *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))]
OTHERS = ["a", "mask_codec.safetensors", "model.txt"]


def test_weights_take_the_place_of_all_older_ones(tmp_path):
    write(tmp_path, **dict.fromkeys([*SHARDED, *OTHERS], "1"))
    write(tmp_path, a="no weights")
    assert names_in(tmp_path) == sorted([*SHARDED, *OTHERS])
    write(tmp_path, **{SINGLE: "2"})
    assert names_in(tmp_path) == sorted([SINGLE, *OTHERS])
    with replacing(tmp_path) as draft:  # and so do those of a save inside another
        write(draft, **dict.fromkeys(SHARDED, "3"))
    assert names_in(tmp_path) == sorted([*SHARDED, *OTHERS])


@POSIX
def test_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    with replacing(tmp_path) as draft:
        save_file({"a": torch.ones(1)}, draft / "a")  # makes its files private
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode


# ---------------------------------------------------------------- what cannot be written


def test_errors_are_one_line(tmp_path):
    def fill(draft):
        raise OSError(errno.ENOSPC, "No space left on device")

    def torch_says(draft):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    for write_half, reason in (
        (fill, "No space left on device"),
        (torch_says, "the disk took only a part"),
        (lambda draft: save_file({}, draft / "missing" / "a"), "No such file"),
    ):
        with pytest.raises(SaveError) as caught, replacing(tmp_path) as draft:
            write_half(draft)
        text = str(caught.value)
        assert text.startswith(f"cannot write {tmp_path} (") and reason in text and "\n" not in text
        assert names_in(tmp_path) == []
        assert isinstance(caught.value, OSError) and isinstance(caught.value, ValueError)
    with pytest.raises(RuntimeError, match="out of memory"), replacing(tmp_path):
        raise RuntimeError("out of memory")


def test_what_is_in_the_way_is_seen_before_the_switch(tmp_path):
    (tmp_path / "b").mkdir()
    with pytest.raises(SaveError, match=r"\(b is a directory\); its files are as they were"):
        write(tmp_path, a="1", b="2")
    assert names_in(tmp_path) == ["b"]
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="File exists"):
        write(tmp_path / "file", a="1")


# ---------------------------------------------------------------- what others left


KILLED = """
import os, sys
from paligemma.support import replacing
with replacing.replacing(sys.argv[1]) as draft:
    (draft / "a").write_text("new")
    if sys.argv[2] == "before the switch":
        os._exit(9)
    replacing._move = lambda _: None
    replacing._switch(draft, replacing.Path(sys.argv[1]))
    os._exit(9)
"""


def kill(folder, when):
    assert subprocess.run([sys.executable, "-c", KILLED, str(folder), when]).returncode == 9


@POSIX
def test_killed_before_the_switch(tmp_path):
    write(tmp_path, a="old", b="old")
    kill(tmp_path, "before the switch")
    assert len(names_in(settled(tmp_path))) == 3
    with replacing(tmp_path):  # of a process that is still at work
        kill(tmp_path, "before the switch")
        assert len(names_in(tmp_path)) == 4, "one left, one at work"
        write(tmp_path, c="of another save")
        assert len(names_in(tmp_path)) == 4, "the one at work"
    assert read(tmp_path) == {"a": "old", "b": "old", "c": "of another save"}


@POSIX
@pytest.mark.parametrize("last", [settled, lambda folder: write(folder, b="newer")])
def test_killed_after_the_switch(tmp_path, last):
    write(tmp_path, a="old", b="old")
    kill(tmp_path, "after the switch")
    assert names_in(tmp_path) == [SWITCHED, "a", "b"] and (tmp_path / "a").read_text() == "old"
    last(tmp_path)
    assert read(tmp_path) == {"a": "new", "b": "old" if last is settled else "newer"}


def test_a_save_that_cannot_be_completed(tmp_path, monkeypatch):
    (tmp_path / SWITCHED).mkdir()
    (tmp_path / SWITCHED / "a").write_text("new")

    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", read_only)
        with pytest.raises(
            SaveError, match=r"\(Read-only file system\); open it once where it can"
        ):
            settled(tmp_path)
    assert read(settled(tmp_path)) == {"a": "new"}


def test_hostile_folders(tmp_path):
    """Nothing outside the folder is moved or removed, whatever lies in it."""
    folder, outside = tmp_path / "model", tmp_path / "outside"
    outside.mkdir()
    (outside / SINGLE).write_text("precious")
    (folder / SWITCHED).mkdir(parents=True)
    (folder / "mine").write_text("precious")
    (folder / SWITCHED / OLDER).write_text(f"../outside/{SINGLE}\n{outside / SINGLE}\nmine\n\0\n..")
    assert read(settled(folder)) == {"mine": "precious"}
    (folder / SWITCHED).symlink_to(outside)
    (folder / f"{DRAFT}x").symlink_to(outside)
    assert read(settled(folder) / SWITCHED) == {SINGLE: "precious"}
    with pytest.raises(SaveError, match="cannot write"):
        write(folder, a="1")
    assert read(outside) == {SINGLE: "precious"}
    (folder / SWITCHED).unlink()
    if hasattr(os, "mkfifo"):  # it would be waited for
        for name in (SWITCHED, f"{DRAFT}y"):
            (folder / name).mkdir()
            os.mkfifo(folder / name / OLDER)
        write(folder, a="1")
        assert sorted(set(names_in(folder)) - {f"{DRAFT}x"}) == ["a", "mine"]


def test_without_locks(tmp_path, monkeypatch):
    """Windows, and file systems that lock nothing: saves work; nobody's draft is removed."""
    monkeypatch.setattr(module, "fcntl", None)
    (tmp_path / f"{DRAFT}x").mkdir()
    write(tmp_path, a="1")
    assert names_in(tmp_path) == [f"{DRAFT}x", "a"]
    monkeypatch.undo()

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if module.fcntl:
        (tmp_path / f"{DRAFT}x" / OLDER).touch()
        monkeypatch.setattr(module.fcntl, "flock", no_locks)
        write(tmp_path, a="2")
        assert names_in(tmp_path) == [f"{DRAFT}x", "a"] and (tmp_path / "a").read_text() == "2"
