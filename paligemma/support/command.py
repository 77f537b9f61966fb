"""What the package's commands share: options, mistakes in one line, exit codes.

Results go to standard output, all else to standard error. Exit codes: 0; 1 where a picture or the
machine failed; 2 after one line about input that cannot be right; 130 after Ctrl-C.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from paligemma.support.console import discard_output, make_channels_safe, say


class Failure(Exception):
    """Something that is neither the user's mistake nor ours: one line, exit 1."""


class Parser(argparse.ArgumentParser):
    """Takes dashes for underscores; an error is one line."""

    def parse_args(self, args=None, namespace=None):  # pyright: ignore
        args = sys.argv[1:] if args is None else args
        return super().parse_args([underscore(a) for a in args], namespace)

    def _print_message(self, message, file=None):  # argparse's own is silent where it fails
        if file is not None and file is sys.stdout:
            file.write(message)
        else:
            say(message)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}")


def underscore(argument: str) -> str:
    """`--top-p=0.9` → `--top_p=0.9`; values stay as they are."""
    if not argument.startswith("--"):
        return argument
    name, *value = argument[2:].split("=", 1)
    return "=".join(["--" + name.replace("-", "_"), *value])


def boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is neither True nor False")
    return values[text.lower()]


# `add(name, **FLAG)`: `--name` alone is True; `--name False` works as well.
FLAG: dict[str, Any] = {
    "type": boolean,
    "nargs": "?",
    "const": True,
    "default": False,
    "metavar": "BOOL",
}


def run_command(
    parser: Parser, run: Callable[[argparse.Namespace], int], argv: Sequence[str] | None
) -> int:
    """Read the options and `run` with them; returns its exit code, or exits with 2 on bad input.

    A `ValueError` is the user's mistake and becomes one line. What is neither that nor the
    machine's trouble is our mistake, and keeps its traceback.
    """
    make_channels_safe()
    try:
        try:
            return run(parser.parse_args(argv))
        finally:
            sys.stdout.flush()  # a full disk or a reader who left shows here, not at the very end
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:  # a wish, not an error
        return 130
    except BrokenPipeError:  # the reader of our output has left, and has enough
        discard_output()
        return 0
    except OSError as error:  # those of files came as ValueError: it is a channel
        discard_output()
        where = error.filename or "standard output"
        say(f"{parser.prog}: error: {where} cannot be written: {error.strerror or error}")
        return 1
    except (Failure, MemoryError) as error:
        say(f"{parser.prog}: error: {str(error) or 'the memory is full'}")
        return 1
