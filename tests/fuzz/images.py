"""Pictures of every format and mode, whole and broken, and bombs."""

import io
import random
import struct
import zlib
from functools import cache
from pathlib import Path

from mutate import PICTURES, Run, hold, mangle, no_file
from PIL import Image

from paligemma.support.pictures import open_picture

MODES = "1 L P RGB RGBA LA CMYK YCbCr HSV LAB I I;16 I;16B F PA La RGBa RGBX".split()


@cache
def written() -> dict[str, bytes]:
    """A small picture in every format that Pillow writes, and every mode that it takes."""
    Image.init()
    found, picture = {}, Image.open(PICTURES / "scene.png").convert("RGB").resize((40, 30))
    for kind in sorted(set(Image.SAVE) - {"PDF"}):
        for mode in MODES:
            out = io.BytesIO()
            try:
                picture.convert(mode).save(out, kind)
                Image.open(io.BytesIO(out.getvalue())).load()
            except Exception:  # this format has no such mode
                continue
            found[f"{kind} {mode}"] = out.getvalue()
    for kind, options in (("GIF", {"save_all": True}), ("WEBP", {}), ("TIFF", {})):
        out = io.BytesIO()
        picture.save(out, kind, append_images=[picture] * 3, **options)
        found[f"{kind} frames"] = out.getvalue()
    return found


def png(width: int, height: int, depth: int, colour: int, data: bytes, *more: tuple) -> bytes:
    """A PNG file with any header."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


@cache
def large(width: int, height: int, depth: int, colour: int, channels: int) -> bytes:
    """A PNG of zeros: a few kilobytes, and as many pixels as one likes."""
    row = bytes(1 + width * depth * channels // 8)
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return png(width, height, depth, colour, body)


def bomb(rng: random.Random) -> tuple[str, bytes]:
    """Small files of many pixels, around Pillow's bound and far beyond it."""
    how = rng.randrange(6)
    if how == 0:
        width, height = rng.choice([(2**31 - 1, 2**31 - 1), (10**5, 10**5), (1, 2**31 - 1), (0, 5)])
        return f"PNG {width}×{height}", png(width, height, 8, 2, zlib.compress(bytes(100)))
    if how == 1:
        depth, colour, channels = rng.choice([(16, 0, 1), (8, 6, 4), (16, 2, 3), (8, 4, 2)])
        side = 9400 if rng.random() < 0.3 else 3000
        return f"PNG {side}² of {depth} bits", large(side, side, depth, colour, channels)
    if how == 2:
        text = zlib.compress(bytes(70_000_000))
        return "PNG with a text of 70 MB", png(
            8, 8, 8, 0, zlib.compress(bytes(72)), (b"zTXt", b"a\0\0" + text)
        )
    if how == 3:
        width = rng.choice([1, 30_000, 2**30])
        return f"PPM {width} wide", b"P6 %d %d 255\n" % (width, rng.choice([1, 30_000])) + bytes(99)
    if how == 4:
        data = bytearray(written()["BMP RGB"])
        data[18:26] = struct.pack(
            "<ii", rng.choice([-1, 2**31 - 1, 9000]), rng.choice([-(2**31), 9000])
        )
        return "BMP of another size", bytes(data)
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n%%EOF\n"
    return "PostScript that never ends", script


def pictures(rng: random.Random, folder: Path) -> tuple[str, Run]:
    """Every format and mode, whole and broken; bombs; other files of a picture's name."""
    folder.mkdir()
    kind = rng.choice(sorted(written()))
    file, how = folder / f"a.{kind.split()[0].lower()}", rng.random()
    data, whole = written()[kind], False
    if how < 0.15:
        name, whole = kind, True
    elif how < 0.8:
        what, data = mangle(rng, data, 0, rng.choice([64, len(data)]))
        name = f"{kind}: {what}"
    elif how < 0.9:
        name, data = bomb(rng)
    else:
        name = ""
    file.write_bytes(data)
    name = name or no_file(rng, file)

    def run() -> None:
        picture = open_picture(rng.choice([file, str(file)]))
        hold(picture.mode == "RGB" and 0 not in picture.size, "no RGB picture")
        hold(not whole or max(picture.size) <= 1024, "another size")
        picture.resize((112, 112), Image.Resampling.BICUBIC)

    return name, run
