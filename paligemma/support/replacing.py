"""Replace files of a folder together: whatever happens, all files of a save count, or none.

A save writes its files, whole, into a hidden folder inside the one that they are for. Renaming that
hidden folder is the switch: before it the old files count, after it the new ones. Then they move to
their places. Who is killed before the switch leaves a draft, which the next save removes; who is
killed after it leaves files on their way, which the next reader or writer moves on (`settled`).
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows: processes don't wait for each other, and drafts stay
    fcntl = None

DRAFT, SWITCHED = ".paligemma-draft-", ".paligemma-switched"
OLDER = ".paligemma-older"  # in a draft, held by its writer: which files it makes superfluous
# Of these a save may have fewer than the one before, of which none may be left.
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


class SaveError(OSError, ValueError):
    """Files that could not be written; the message says which ones count now."""


@contextmanager
def replacing(folder: str | os.PathLike) -> Iterator[Path]:
    """Write into a draft of a folder; at the end all of it appears in the folder, or nothing.

    with replacing(folder) as draft:
        (draft / "config.json").write_text(text)

    The folder's other files stay, except older weights where the draft holds weights. A save may
    be made of several: each of them is given the draft as its folder.

    Args:
        folder: `~` is the home directory; made when absent.

    Raises:
        SaveError: a full disk, a read-only directory, a directory where a file shall be.
    """
    folder = Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            with _locked(folder):
                _remove_left(folder)
                draft = folder / f"{DRAFT}{secrets.token_hex(4)}"
                draft.mkdir()
                stack.callback(shutil.rmtree, draft, ignore_errors=True)
                (draft / OLDER).touch()
                stack.enter_context(_locked(draft / OLDER))
            yield draft
            _switch(draft, folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        if (reason := _reason(error)) is None:
            raise
        failed = SaveError(f"cannot write {folder} ({reason}); its files are as they were")
        failed.strerror = reason  # for the save that this one may be part of
        raise failed from None
    settled(folder)


def settled(folder: str | os.PathLike) -> Path:
    """The folder, `~` spelled out, with each file of its last complete save in its place.

    Raises:
        SaveError: a save was interrupted after its switch, and cannot be completed here.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise ValueError(f"path is of type {type(folder).__name__}; expected a directory")
    folder = Path(folder).expanduser()
    if _is_switched(folder):
        try:
            with _locked(folder):
                _move(folder)
        except OSError as error:
            raise SaveError(
                f"{folder} holds a complete save, interrupted before all was in its place, and "
                f"cannot be written ({_reason(error)}); open it once where it can"
            ) from None
    return folder


def _switch(draft: Path, folder: Path) -> None:
    """Make the files of a draft the ones that count."""
    names, mode = sorted(os.listdir(draft)), draft.stat().st_mode & 0o666
    for name in names:
        if (folder / name).is_dir():
            raise IsADirectoryError(f"{name} is a directory")
        (draft / name).chmod(mode)  # safetensors makes its files private to their owner
        _write_through(draft / name)
    with _locked(folder):
        _move(folder)  # what a killed save left on its way
        if any(map(WEIGHTS.fullmatch, names)):
            older = [n for n in os.listdir(folder) if WEIGHTS.fullmatch(n) and n not in names]
            (draft / OLDER).write_text("\n".join(older))
            _write_through(draft / OLDER)
        _write_through(draft)
        draft.rename(folder / SWITCHED)


def _is_switched(folder: Path) -> bool:
    return os.path.isdir(folder / SWITCHED) and not os.path.islink(folder / SWITCHED)


def _move(folder: Path) -> None:
    """Bring switched files to their places; any of the steps may have been done before."""
    if not _is_switched(folder):
        return
    _write_through(folder)  # the switch itself, before anything older goes
    switched = folder / SWITCHED
    if (switched / OLDER).is_file():
        for name in (switched / OLDER).read_text(errors="replace").split("\n"):
            if WEIGHTS.fullmatch(name):  # nothing else is removed, whoever wrote the list
                (folder / name).unlink(missing_ok=True)
    for name in sorted(os.listdir(switched)):
        if name != OLDER:
            os.replace(switched / name, folder / name)
    (switched / OLDER).unlink(missing_ok=True)  # last: until then the list is needed
    switched.rmdir()


def _remove_left(folder: Path) -> None:
    """Remove the drafts of processes that were killed. (Where nobody can know: leave them.)"""
    for draft in folder.glob(f"{DRAFT}*") if fcntl else ():
        with suppress(OSError):  # a running process holds it, or the file system has no locks
            if (draft / OLDER).is_file():
                with _locked(draft / OLDER, wait=False):
                    pass
            shutil.rmtree(draft)


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a file or folder, as one process at a time can (on file systems that have locks).

    Raises:
        OSError: without waiting, when it can't be held.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if not wait:
                raise
        yield
    finally:
        os.close(descriptor)


def _write_through(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk before what comes next."""
    if fcntl is None:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str | None:
    """Why something could not be written, in words; None: the error is about something else."""
    if isinstance(error, RuntimeError):  # torch.save has no other class, and does not say why
        return "the disk took only a part" if "inline_container" in str(error) else None
    return getattr(error, "strerror", None) or str(error)
