"""Ways to do harm to a process that saves: killed at any moment, at each step, no room, no right.

A child process, made by `fork`, does the work; this one looks at what it left.
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What changes a folder; Python tells of it before it happens (`sys.addaudithook`).
STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.utime"}
# A child's exit codes: it worked; a clear error, and the old files count; the new ones; no such.
DONE, KEPT, SWITCHED, BROKEN = 0, 3, 4, 5
KILLED = -signal.SIGKILL
# In memory nothing waits for a disk; what a killed process wrote is there just the same.
FAST = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def fork(work: Callable[[], Any]) -> int:
    """Start a child that does some work; its process number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = BROKEN
    try:
        work()
        code = DONE
    except ValueError as error:  # of the package: one line that says what is in the folder now
        text = str(error)
        if "cannot" in text and "\n" not in text:
            says = {"its files are as they were": KEPT, "holds a complete save": SWITCHED}
            code = next((says[words] for words in says if words in text), BROKEN)
    finally:
        if code == BROKEN:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)


def end(pid: int) -> int:
    """Wait for a child: its exit code, -9 when it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_after(seconds: float, pid: int) -> int:
    """kill -9 after some time, if the child is still there."""
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(min(0.001, seconds))
    os.kill(pid, signal.SIGKILL)
    return end(pid)


def at_step(number: int, folder: Path, act: Callable[[], Any]) -> None:
    """Do something just before this process's `number`-th step that concerns a folder."""
    left, inside = [number], str(folder)

    def hook(event: str, details: tuple) -> None:
        if event in STEPS and str(details[0]).startswith(inside):
            left[0] -= 1
            if left[0] == 0:
                act()

    sys.addaudithook(hook)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_room() -> None:
    raise OSError(28, "No space left on device")


def no_larger_files(size: int) -> None:
    """From now on this process's files end at `size` bytes: writing more fails."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def no_rights(folder: Path) -> None:
    """From now on this process may not write into a folder."""
    folder.chmod(0o555)
    if os.geteuid() == 0:  # root may write anywhere
        os.setgid(65534)
        os.setuid(65534)


@contextmanager
def small_disk(size: int) -> Iterator[Path | None]:
    """A disk of `size` bytes, mounted; None where this process may not do that."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["-t", "tmpfs", "-o", f"size={size}", "none", folder]
        made = subprocess.run(["mount", *options], capture_output=True).returncode == 0
        try:
            yield Path(folder) if made else None
        finally:
            if made:
                subprocess.run(["umount", folder], check=True)


def fill(file: Path, free: int) -> None:
    """Make a file so large that its disk has `free` bytes left."""
    with open(file, "wb") as out:
        out.write(bytes(max(0, shutil.disk_usage(file.parent).free - free)))
