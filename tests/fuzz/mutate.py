"""What the families share: hostile values, broken JSON, broken bytes, things that are no files."""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from copy import deepcopy
from importlib import resources
from pathlib import Path

TINY = Path(str(resources.files("paligemma") / "assets" / "tiny"))
PICTURES = TINY.parent / "pictures"
Run = Callable[[], object]  # reads what a case made: returns, or raises


class Wrong(Exception):
    """What was read without complaint isn't what it should be."""


def hold(true: object, message: str) -> None:
    if not true:
        raise Wrong(message)


# ---------------------------------------------------------------- values

VALUES = [None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf")]
VALUES += [2**31, 2**63, 10**400, -(10**400), 100_000, "", "x", "123", "abc", "../x", "/etc/passwd"]
VALUES += ["a\nb", "\x00", "é" * 500, "9" * 5000, [], {}, [[]], [1, 2, 3], [None] * 3, {"a": 1}]
VALUES += ["<image>", "default", "float32", [0] * 10_000, {"": None}, "\ud800"]


def value(rng: random.Random) -> object:
    """Something that a field does not expect."""
    if rng.random() < 0.1:
        return rng.choice([rng.randrange(-(2**40), 2**40), rng.gauss(0, 1e6), str(rng.random())])
    return deepcopy(rng.choice(VALUES))  # a case may go on to break what it was given


def places(tree: object, path: tuple = ()) -> list[tuple]:
    """The paths to every value inside nested objects and lists."""
    inner = tree.items() if isinstance(tree, dict) else ()
    inner = enumerate(tree[:5]) if isinstance(tree, list) else inner
    return [p for key, sub in inner for p in ((*path, key), *places(sub, (*path, key)))]


def spoil(rng: random.Random, tree: dict, within: str | None = None) -> str:
    """Replace, remove or rename one value inside a JSON object; says which."""
    found = [path for path in places(tree) if within is None or path[0] == within]
    path = rng.choice(found)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    name, how = ".".join(map(str, path)), rng.random()
    if how < 0.1:
        del inner[path[-1]]
        return f"{name} removed"
    if how < 0.15 and isinstance(inner, dict):
        inner[f"{path[-1]}_"] = inner.pop(path[-1])
        return f"{name} renamed"
    inner[path[-1]] = value(rng)
    return f"{name} = {inner[path[-1]]!r:.40}"


BROKEN_JSON = {
    "empty": "",
    "null": "null",
    "number": "3",
    "string": '"config"',
    "list": "[]",
    "no keys": "{}",
    "NaN": "NaN",
    "deep lists": "[" * 100_000 + "]" * 100_000,
    "deep objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "digits": '{"model_type": ' + "9" * 10_000 + "}",
    "half": '{"model_type": "pali',
    "comment": "// {}",
    "nul": "\x00" * 100,
}


def broken_json(rng: random.Random, tree: object) -> tuple[str, bytes]:
    """A JSON text that is none, or not what it was; for objects often just one value changed."""
    text = json.dumps(tree)
    how = rng.randrange(6)
    if how == 0:
        name = rng.choice(sorted(BROKEN_JSON))
        return name, BROKEN_JSON[name].encode()
    if how == 1:
        name, data = mangle(rng, text.encode())
        return f"text {name}", data
    if how == 2:
        code = rng.choice(["utf-16", "utf-32", "utf-8-sig", "latin-1", "cp037"])
        return code, text.encode(code)
    copy = json.loads(text)
    if not isinstance(copy, dict) or not copy:
        return "as it was", text.encode()
    names = [spoil(rng, copy) for _ in range(rng.choice([1, 1, 1, 2, 4])) if copy]
    return "; ".join(names)[:100], json.dumps(copy).encode(errors="surrogatepass")


# ---------------------------------------------------------------- bytes


def mangle(rng: random.Random, data: bytes, start: int = 0, end: int | None = None) -> tuple:
    """Bytes of data[start:end] flipped, cut, doubled, zeroed, or random: (what, bytes)."""
    end = len(data) if end is None else min(end, len(data))
    out, what = (
        bytearray(data),
        rng.choice(["flip", "flip", "cut", "zero", "noise", "double", "swap"]),
    )
    at = rng.randrange(start, max(end, start + 1))
    size = min(rng.choice([1, 4, 16, 256]), max(end - at, 1))
    if what == "flip":
        for _ in range(rng.choice([1, 2, 8, 64])):
            at = rng.randrange(start, max(end, start + 1))
            if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
    elif what == "cut":
        del out[at:]
    elif what == "zero":
        out[at : at + size] = bytes(size)
    elif what == "noise":
        out[at : at + size] = rng.randbytes(size)
    elif what == "double":
        out[at:at] = out[at : at + size]
    else:
        other = rng.randrange(start, max(end, start + 1))
        out[at : at + size], out[other : other + size] = (
            out[other : other + size],
            out[at : at + size],
        )
    return f"{what} at {at}", bytes(out)


def read_header(data: bytes) -> tuple[dict, bytes]:
    """The header of a safetensors file, and what follows it."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header: object, body: bytes) -> bytes:
    """A safetensors file with any header, an object or text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


DTYPES = (
    "F64 F32 F16 BF16 I64 I32 I16 I8 U8 U16 U32 U64 BOOL F8_E4M3 F8_E5M2 F8_E8M0 F4 C64 X".split()
)


def broken_tensors(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    """A safetensors file with something wrong in it: (what, bytes)."""
    header, body = read_header(data)
    names = [name for name in header if name != "__metadata__"]
    name, how = rng.choice(names), rng.randrange(16)
    entry = header[name]
    if how < 3:
        what, spoilt = mangle(rng, data, 0, rng.choice([8, len(data) - len(body)]))
        return f"header: {what}", spoilt
    if how < 5:
        what, spoilt = mangle(rng, data, len(data) - len(body))
        return f"data: {what}", spoilt
    if how == 5:
        entry["dtype"] = rng.choice([*DTYPES, value(rng)])
        return f"dtype {entry['dtype']!r:.20}", with_header(header, body)
    if how == 6:
        entry["shape"] = rng.choice(
            [entry["shape"][::-1], [2**40, 2**40], [-1], [0], [], value(rng)]
        )
        return f"shape {entry['shape']!r:.30}", with_header(header, body)
    if how == 7:
        low, high = entry["data_offsets"]
        options = [[high, low], [0, high], [low, high + 2], [0, 2**62], [-4, 4], value(rng)]
        entry["data_offsets"] = rng.choice(options)
        return f"offsets {entry['data_offsets']!r:.30}", with_header(header, body)
    if how == 8:
        return f"{spoil(rng, header)}", with_header(header, body)
    if how == 9:
        text = json.dumps(header)[:-1] + ", " + json.dumps({name: entry})[1:]
        return "a name twice", with_header(text.encode(), body)
    if how == 10:
        padding = rng.choice([10**3, 10**6, 2 * 10**7])
        return f"{padding} spaces", with_header(json.dumps(header).encode() + b" " * padding, body)
    if how == 11:
        deep = rng.choice([b"[" * 10**5, b'{"a":' * 10**5, b'{"a": "' + b"x" * 10**6])
        return "a deep header", with_header(deep, body)
    if how == 12:
        size = rng.choice([0, 1, 2**20, 2**40, 2**63, 2**64 - 1])
        return f"header of {size} bytes", struct.pack("<Q", size) + data[8:]
    if how == 13:
        del header[name]
        return "a tensor fewer", with_header(header, body)
    if how == 14:
        header["__metadata__"] = value(rng)
        return f"metadata {header['__metadata__']!r:.30}", with_header(header, body)
    low, high = entry["data_offsets"]
    bad = rng.choice([b"\xff\xff", b"\x80\x7f", b"\x80\xff"]) * ((high - low) // 2)
    return "NaN or infinity", with_header(header, body[:low] + bad + body[high:])


# ---------------------------------------------------------------- files


def link_tiny(folder: Path, *without: str) -> None:
    """A checkpoint directory that shares the shipped files, but for some."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in CHECKPOINT:
        if name not in without:
            os.symlink(TINY / name, folder / name)


CHECKPOINT = "config.json model.safetensors tokenizer.model preprocessor_config.json".split()
CHECKPOINT.append("mask_codec.safetensors")


def no_file(rng: random.Random, file: Path) -> str:
    """Something that isn't a regular file, or an empty or foreign one, in place of a file."""
    file.unlink(missing_ok=True)
    what = rng.choice(
        ["pipe", "folder", "loop", "dangling", "zeros", "empty", "zip", "absent", "text"]
    )
    if what == "pipe":
        os.mkfifo(file)
    elif what == "folder":
        file.mkdir()
    elif what == "loop":
        os.symlink(file.name, file)
    elif what == "dangling":
        os.symlink(file.parent / "nowhere", file)
    elif what == "zeros":
        os.symlink("/dev/zero", file)
    elif what == "empty":
        file.touch()
    elif what == "zip":
        made = shutil.make_archive(str(file.parent / "made"), "zip", PICTURES, "scene.png")
        os.replace(made, file)
    elif what == "text":
        file.write_text("<html>Please log in</html>\n" * 50)
    return f"{what} for {file.name}"


class Payload:
    """A pickle of this makes a file where none may be: it proves that code was run."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)
