"""Backgrounds of the course's scenes: colours, photographs and patterns, uint8[112, 112, 3] each.

Every family takes the generator that its randomness comes from. The order of the draws is part of
the data: change it, and every scene of every split is another one.
"""

import itertools
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 112  # pixels
PICTURES = Path(str(resources.files("paligemma"))) / "assets" / "pictures"
# Not "cat": a cat in the background would be a lie.
PHOTOGRAPHS = "coffee astronaut brick grass gravel camera hubble retina clock".split()
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789&?!%"


# ---------------------------------------------------------------- made once, used by many


@cache
def photographs() -> list[np.ndarray]:
    """The photographs that backgrounds are cropped from, at two sizes, uint8[h, w, 3] each."""
    arrays = []
    for name in PHOTOGRAPHS:
        with Image.open(PICTURES / f"{name}.jpg") as opened:
            picture = opened.convert("RGB")
        for height in (150, 260):
            width = round(picture.width * height / picture.height)
            arrays.append(np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS)))
    return arrays


@cache
def _ramps() -> np.ndarray:
    """Smooth weights in 0..1 along lines and around points, float32[n, 112, 112, 1]."""
    axis = np.linspace(0, 1, SIZE, dtype=np.float32)
    x, y = axis[None, :], axis[:, None]
    ramps = [np.broadcast_to(r, (SIZE, SIZE)) for r in (x, y, (x + y) / 2, (x + 1 - y) / 2)]
    for cx, cy in itertools.product((0.1, 0.5, 0.9), repeat=2):
        ramps.append(np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 0.18))
    return np.stack(ramps)[..., None].astype(np.float32)


@cache
def _noise() -> np.ndarray:
    """A field of noise that backgrounds take windows of, float32[224, 224, 1]."""
    fine = np.random.default_rng(3).standard_normal((224, 224, 1))
    coarse = np.random.default_rng(4).standard_normal((56, 56, 1))
    return (6 * fine + 6 * coarse.repeat(4, 0).repeat(4, 1)).astype(np.float32)


@cache
def _font(size: int):
    return ImageFont.load_default(size=size)  # Pillow's own font: no file to find


def _colour(rng: np.random.Generator) -> np.ndarray:
    """A random colour, more often soft than strong, float32[3]."""
    low = 120 if rng.random() < 0.7 else 10
    return rng.integers(low, 256, 3).astype(np.float32)


# ---------------------------------------------------------------- smooth ones


def photograph(rng: np.random.Generator) -> np.ndarray:
    """A crop of a photograph, mirrored or not."""
    photo = photographs()[rng.integers(len(photographs()))]
    y = rng.integers(photo.shape[0] - SIZE + 1)
    x = rng.integers(photo.shape[1] - SIZE + 1)
    crop = photo[y : y + SIZE, x : x + SIZE]
    return (crop[:, ::-1] if rng.random() < 0.5 else crop).copy()


def plain(rng: np.random.Generator) -> np.ndarray:
    """One colour."""
    return np.full((SIZE, SIZE, 3), _colour(rng).astype(np.uint8))


def ramp(rng: np.random.Generator) -> np.ndarray:
    """One colour that becomes another along a line or around a point."""
    first, second = _colour(rng), _colour(rng)
    return (first + (second - first) * _ramps()[rng.integers(len(_ramps()))]).astype(np.uint8)


def noise(rng: np.random.Generator) -> np.ndarray:
    """A ramp with noise."""
    y, x = rng.integers(0, SIZE, 2)
    field = ramp(rng) + _noise()[y : y + SIZE, x : x + SIZE] * np.float32(rng.random() * 1.5)
    return np.clip(field, 0, 255).astype(np.uint8)


SMOOTH = (plain, ramp, noise)


def smooth(rng: np.random.Generator) -> np.ndarray:
    """One of SMOOTH."""
    return SMOOTH[rng.integers(len(SMOOTH))](rng)


# ---------------------------------------------------------------- patterns


def _turned(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Where every pixel lies in a frame turned by a random angle: (u, v), float[112, 112] each."""
    angle, (x, y) = rng.random() * np.pi, rng.random(2) * SIZE
    column, row = np.arange(SIZE)[None, :] - x, np.arange(SIZE)[:, None] - y
    u = column * np.cos(angle) + row * np.sin(angle)
    return u, row * np.cos(angle) - column * np.sin(angle)


def _mixed(rng: np.random.Generator, share: np.ndarray) -> np.ndarray:
    """A smooth background and one colour over it where `share`, float[112, 112] in 0..1, says."""
    first, second = smooth(rng), plain(rng)
    strength = 0.15 + 0.85 * rng.random()
    share = (share * strength)[..., None].astype(np.float32)
    return (first + (second.astype(np.float32) - first) * share).astype(np.uint8)


def stripes(rng: np.random.Generator) -> np.ndarray:
    """Stripes of any direction, width and softness."""
    u, _ = _turned(rng)
    period, sharp = 4 + 40 * rng.random() ** 2, 1 + 20 * rng.random()
    wave = np.sin(2 * np.pi * u / period) + rng.random() - 0.5
    return _mixed(rng, np.clip(0.5 + sharp * wave / 2, 0, 1))


def grid(rng: np.random.Generator) -> np.ndarray:
    """Two sets of thin lines that cross at a right angle."""
    period, width = 6 + 30 * rng.random(), 1 + 3 * rng.random()
    return _mixed(rng, np.maximum.reduce([t % period < width for t in _turned(rng)]) * 1.0)


def dots(rng: np.random.Generator) -> np.ndarray:
    """Dots in rows, all of one size."""
    u, v = _turned(rng)
    period = 7 + 30 * rng.random()
    if rng.random() < 0.5:
        u = u + (np.floor(v / period) % 2) * period / 2  # every other row moved by half
    radius = period * (0.15 + 0.3 * rng.random())
    distance = np.hypot(u % period - period / 2, v % period - period / 2)
    return _mixed(rng, np.clip(radius + 0.5 - distance, 0, 1))


def clouds(rng: np.random.Generator) -> np.ndarray:
    """A sum of a few waves of random direction and length."""
    field = np.zeros((SIZE, SIZE))
    for _ in range(rng.integers(2, 6)):
        u, _ = _turned(rng)
        field = field + np.sin(2 * np.pi * u / (8 + 60 * rng.random()))
    field = (field - field.min()) / (np.ptp(field) + 1e-6)
    if rng.random() < 0.5:
        field = np.floor(field * rng.integers(2, 6)) / 5
    return _mixed(rng, field)


def _tints(rng: np.random.Generator, count: int) -> np.ndarray:
    """Colours that differ faintly or strongly from the first, uint8[count, 3]."""
    wild = np.stack([_colour(rng) for _ in range(count)])
    return (wild[0] + (wild - wild[0]) * (0.1 + 0.9 * rng.random())).astype(np.uint8)


def waves(rng: np.random.Generator) -> np.ndarray:
    """Winding bands of a few colours."""
    u, v = _turned(rng)
    width, length = 5 + 25 * rng.random(), 15 + 60 * rng.random()
    bent = u + length * (0.05 + 0.3 * rng.random()) * np.sin(2 * np.pi * v / length)
    tints = _tints(rng, int(rng.integers(2, 6)))
    return tints[np.floor(bent / width).astype(int) % len(tints)]


def mosaic(rng: np.random.Generator) -> np.ndarray:
    """Rectangles of many sizes and colours that fill the picture, turned by a random angle."""
    places = []
    for axis in _turned(rng):
        lines = np.sort(rng.random(rng.integers(4, 24)) * 3 * SIZE - 1.5 * SIZE)
        places.append(np.searchsorted(lines, axis.ravel()).reshape(SIZE, SIZE))
    tints = _tints(rng, 25 * 25).reshape(25, 25, 3)
    return tints[places[0], places[1]]


def shapes(rng: np.random.Generator) -> np.ndarray:
    """Rectangles, ellipses, triangles and lines of any size and colour."""
    picture = Image.fromarray(smooth(rng))
    draw = ImageDraw.Draw(picture)
    largest = 8 + rng.integers(60)
    for _ in range(rng.integers(2, 24)):
        x, y = (rng.random(2) * (SIZE + 10) - 10).tolist()
        w, h = rng.integers(4, largest, 2).tolist()
        colour = tuple(_colour(rng).astype(int).tolist())
        outline = rng.random() < 0.3
        how: dict = {"fill": colour}
        if outline:
            how = {"outline": colour, "width": int(rng.integers(1, 5))}
        form = rng.integers(4)
        if form == 0:
            draw.rectangle((x, y, x + w, y + h), **how)
        elif form == 1:
            draw.ellipse((x, y, x + w, y + h), **how)
        elif form == 2:
            corners = (rng.random((3, 2)) * largest + (x, y)).ravel().tolist()
            draw.polygon(corners, fill=colour)
        else:
            ends = (rng.random((2, 2)) * 2 * largest + (x - largest, y - largest)).ravel().tolist()
            draw.line(ends, fill=colour, width=int(rng.integers(1, 7)))
    return np.asarray(picture).copy()


def letters(rng: np.random.Generator) -> np.ndarray:
    """Lines of letters without meaning."""
    picture = Image.fromarray(smooth(rng))
    draw = ImageDraw.Draw(picture)
    y = -int(rng.integers(0, 8))
    size = int(rng.integers(7, 30))
    colour = tuple(_colour(rng).astype(int).tolist())
    while y < SIZE:
        text = "".join(LETTERS[i] for i in rng.integers(0, len(LETTERS), 2 + 200 // size))
        draw.text((-int(rng.integers(0, 12)), y), text, fill=colour, font=_font(size))
        y += size + int(rng.integers(0, 10))
        if rng.random() < 0.3:
            colour = tuple(_colour(rng).astype(int).tolist())
    return np.asarray(picture).copy()


PATTERNS = (stripes, waves, grid, dots, clouds, mosaic, shapes, letters)


def background(rng: np.random.Generator) -> np.ndarray:
    """A photograph (15 %), one of SMOOTH (25 %) or one of PATTERNS (60 %)."""
    style = rng.random()
    if style < 0.15:
        return photograph(rng)
    if style < 0.4:
        return smooth(rng)
    return PATTERNS[rng.integers(len(PATTERNS))](rng)
