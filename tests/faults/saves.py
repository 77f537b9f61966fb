"""A save is harmed: one version lies in the folder then, whole, and the next save tidies up."""

import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from harm import (
    BROKEN,
    FAST,
    KEPT,
    KILLED,
    at_step,
    die,
    end,
    fill,
    fork,
    kill_after,
    no_larger_files,
    no_rights,
    no_room,
    small_disk,
)
from kinds import KINDS, Kind

Outcomes = Iterator[str | None]  # of each try: None, or what was wrong


class Saves:
    """Saves of one kind into a folder, and the version that lies there."""

    def __init__(self, kind: Kind, folder: Path):
        self.kind, self.folder, self.version = kind, folder, 2
        for version in (1, 2):
            kind.save(version, folder)

    def save_next(self) -> None:
        self.kind.save(self.version + 1, self.folder)

    def judge(self, *allowed: int) -> str | None:
        """None: one of the allowed versions is there, whole; the next save leaves nothing else."""
        try:
            version, whole = self.kind.load(self.folder)
        except Exception as error:
            return f"does not load: {error}"
        finally:
            self.version += 1
        if not whole or version not in allowed:
            return f"a mixture, or version {version}; expected one of {allowed}"
        self.save_next()
        self.version += 1
        with tempfile.TemporaryDirectory(dir=FAST) as fresh:
            self.kind.save(self.version, Path(fresh))
            left = set(os.listdir(self.folder)) ^ set(os.listdir(fresh))
        return f"left or lost: {left}" if left else None


def killed_at_random(saves: Saves, count: int, rng: random.Random) -> Outcomes:
    """kill -9 while a process saves version after version."""
    for _ in range(count):
        reading, writing = os.pipe()

        def save_on(writing: int = writing) -> None:
            while True:
                saves.save_next()
                saves.version += 1
                os.write(writing, b"x")

        pid = fork(save_on)
        kill_after(rng.uniform(0, 0.4), pid)
        os.close(writing)
        with os.fdopen(reading, "rb") as said:
            saves.version += len(said.read())
        yield saves.judge(saves.version, saves.version + 1)


def killed_at_each_step(saves: Saves, count: int, rng: random.Random) -> Outcomes:
    """kill -9 before the first step of a save, before the second, … until all have been."""
    code, step = KILLED, 0
    while code == KILLED:
        step += 1

        def save(step: int = step) -> None:
            at_step(step, saves.folder, die)
            saves.save_next()

        code = end(fork(save))
        yield f"exit {code}" if code > 0 else saves.judge(saves.version, saves.version + 1)


def no_room_at_each_step(saves: Saves, count: int, rng: random.Random) -> Outcomes:
    """The disk is full at the first step of a save, at the second, … until all have been."""
    reached, step = True, 0
    while reached:
        step += 1
        before, (reading, writing) = set(os.listdir(saves.folder)), os.pipe()

        def save(step: int = step, writing: int = writing) -> None:
            at_step(step, saves.folder, lambda: (os.write(writing, b"x"), no_room()))
            saves.save_next()

        code = end(fork(save))
        os.close(writing)
        with os.fdopen(reading, "rb") as said:
            reached = bool(said.read())
        if code == BROKEN or (code == KEPT and set(os.listdir(saves.folder)) != before):
            yield f"exit {code}, files {sorted(os.listdir(saves.folder))}"
        else:
            yield saves.judge(saves.version + (code != KEPT))


def refused(
    saves: Saves, prepare: Callable[[], object], repair: Callable[[], object] = int
) -> str | None:
    """A save that cannot succeed: a clear message, the old files whole, and no others."""
    before = set(os.listdir(saves.folder))

    def save() -> None:
        prepare()
        saves.save_next()

    code = end(fork(save))
    left = set(os.listdir(saves.folder)) ^ before
    repair()
    if code != KEPT or left:
        return f"exit {code}, left or lost: {left}"
    return saves.judge(saves.version)


def files_too_large(saves: Saves, count: int, rng: random.Random) -> Outcomes:
    """Writing fails in the midst of a file, at a limit that the system sets to all files."""
    largest = max(file.stat().st_size for file in saves.folder.iterdir()) // 3
    for size in rng.sample(range(1, largest), count):
        yield refused(saves, lambda size=size: no_larger_files(size))


def full_disk(saves: Saves, count: int, rng: random.Random) -> Outcomes:
    """The disk, a small one, is full when a part is written. (None where none can be mounted.)"""
    with small_disk(2**25) as disk:
        for _ in range(count if disk else 0):
            with tempfile.TemporaryDirectory(dir=disk) as folder:
                here, rest = Saves(saves.kind, Path(folder, "model")), Path(folder, "rest")
                used = sum(file.stat().st_size for file in here.folder.iterdir())
                free = int(rng.uniform(0, 0.6) * used)
                yield refused(here, lambda rest=rest, free=free: fill(rest, free), rest.unlink)


def read_only(saves: Saves, count: int, rng: random.Random) -> Outcomes:
    """The directory may not be written to."""
    yield refused(saves, lambda: no_rights(saves.folder), lambda: saves.folder.chmod(0o755))


HARMS = {
    "killed at random": killed_at_random,
    "killed at each step": killed_at_each_step,
    "no room at each step": no_room_at_each_step,
    "file limit": files_too_large,
    "full disk": full_disk,
    "read-only": read_only,
}


def tries(name: str, harm: str, count: int, seed: int) -> Outcomes:
    """The outcomes of one kind under one harm."""
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        os.chmod(folder, 0o755)  # who has no rights must still find it
        path = Path(folder) / "model"
        yield from HARMS[harm](Saves(KINDS[name], path), count, random.Random(f"{seed} {name}"))
