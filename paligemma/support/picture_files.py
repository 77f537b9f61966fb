"""The pictures of a command: which files are meant, reading them, where drawings are written."""

import io
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from paligemma.support.pictures import open_picture
from paligemma.support.replacing import replacing

# Endings by which the pictures in a folder are known.
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif"}
STANDARD_INPUT = 1 << 28  # bytes; more is no picture


def list_pictures(names: Sequence[str]) -> tuple[list[str], bool]:
    """The files that are meant, folders opened, and whether they may be several.

    Raises:
        ValueError: a folder without pictures, or one that may not be read.
    """
    files = []
    for name in names:
        if not os.path.isdir(name):
            files.append(name)
            continue
        try:
            entries = sorted(os.listdir(name))
        except OSError as error:
            raise ValueError(f"directory {name} cannot be read: {error.strerror}") from None
        entries = [e for e in entries if Path(e).suffix.lower() in PICTURES and e[0] != "."]
        found = [path for e in entries if os.path.isfile(path := os.path.join(name, e))]
        if not found:
            raise ValueError(
                f"{name} is a directory without pictures; give a picture, or a directory of them"
            )
        files += found
    return files, len(names) > 1 or os.path.isdir(names[0])


def read_picture(name: str) -> Image.Image:
    """The picture of that name; `-` reads it from standard input.

    Raises:
        ValueError: not a picture.
    """
    if name != "-":
        return open_picture(name)
    if sys.stdin is None or sys.stdin.closed:
        raise ValueError("standard input is closed; give a file, or pipe a picture in")
    data = sys.stdin.buffer.read(STANDARD_INPUT + 1)
    if len(data) > STANDARD_INPUT:
        raise ValueError(f"standard input has more than {STANDARD_INPUT >> 20} MiB; give a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return open_picture(Image.open(io.BytesIO(data)))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(
            f"the picture on standard input has more than {Image.MAX_IMAGE_PIXELS:,} pixels; "
            "make it smaller"
        ) from None
    except (OSError, SyntaxError):  # what Pillow raises for a header that is no header
        raise ValueError("what came on standard input is not a picture") from None


def plan_output(output: str | None, files: Sequence[str], several: bool) -> list[Path | None]:
    """Where each picture's drawing goes.

    Raises:
        ValueError: somewhere that cannot be written.
    """
    if output is None:
        return [None] * len(files)
    if not several:
        check_output(Path(output))
        return [Path(output)]
    if not os.path.isdir(output):
        raise ValueError(
            f"--output {output} is no directory; of several pictures it is the directory into "
            "which they are written: make it first"
        )
    targets: list[Path | None] = []
    for file in files:
        name = "standard_input.png" if file == "-" else Path(file).name
        target = Path(output, name if is_format(name) else f"{name}.png")
        if target in targets:
            raise ValueError(f"two pictures would be written to {target}; rename one of them")
        if os.path.exists(target) and os.path.exists(file) and os.path.samefile(target, file):
            raise ValueError(f"{target} is one of the pictures; give another directory")
        check_output(target)
        targets.append(target)
    return targets


def is_format(name: str) -> bool:
    """Whether Pillow can write a file with this ending."""
    return Image.registered_extensions().get(Path(name).suffix.lower()) in Image.SAVE


def check_output(file: Path) -> None:
    """Refuse a file that `save_picture` could not write."""
    if not os.path.isdir(file.parent):
        raise ValueError(f"cannot write {file}: its directory does not exist")
    if os.path.isdir(file) or not os.access(file.parent, os.W_OK):
        raise ValueError(f"cannot write {file}: it is a directory, or in one that is read-only")
    if not is_format(file.name):
        raise ValueError(f"cannot write {file}: no picture format; use a name such as answer.png")


def save_picture(image: Image.Image, file: Path) -> None:
    """Write a picture whole or not at all; the format follows the file's ending."""
    try:
        with replacing(file.parent) as draft:
            image.save(draft / file.name)
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot write {file} ({reason}); use a name such as answer.png") from None
