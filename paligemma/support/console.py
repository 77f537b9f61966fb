"""Standard output and error that can always be written to, and a Ctrl-C that is silent."""

import io
import os
import signal
import sys
import threading
from importlib import import_module


def one_line(message: str) -> str:
    """A message without its line breaks, and cut where something huge was quoted."""
    message = " ".join(message.split())
    return message if len(message) <= 400 else message[:300] + " … " + message[-90:]


def make_channels_safe() -> None:
    """Standard output and error can be written to, whatever they are and whatever is written."""
    for name in ("stdout", "stderr"):
        channel = getattr(sys, name)
        if channel is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(channel, io.TextIOWrapper):  # "é" on a console without it becomes "\xe9"
            channel.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Nobody takes what is still in the buffer of standard output; without this Python complains
    at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(message: str) -> None:
    """One line on standard error, where there is one."""
    try:
        sys.stderr.write(one_line(message) + "\n")
        sys.stderr.flush()
    except OSError:
        pass


def import_slowly(name: str) -> None:
    """Import a module that brings in PyTorch.

    Ctrl-C meanwhile ends the process at once and silently: an import that is interrupted says so
    in forty lines, or as another error.
    """
    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        import_module(name)
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
