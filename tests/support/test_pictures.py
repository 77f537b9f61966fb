"""Pictures of every kind, broken files, arrays with advice that works, and settings."""

import json
import os
import re
import tracemalloc
import warnings

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from paligemma.support import pictures
from paligemma.support.pictures import (
    ImageError,
    check_settings,
    open_picture,
    read_settings,
    settings_dict,
)


def noise(width=13, height=7, channels=3, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels if channels > 1 else pixels[:, :, 0])


def pixel(image, x=0, y=0):
    return open_picture(image).getpixel((x, y))


def refused(image, words):
    with pytest.raises(ImageError, match=words) as caught:
        open_picture(image)
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


# ---------------------------------------------------------------- every mode


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBX", (1, 2, 3, 0), (1, 2, 3)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (0, 51), (204, 204, 204)),
        ("La", (0, 51), (204, 204, 204)),
        ("RGBa", (0, 0, 0, 51), (204, 204, 204)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("I;16", 257 * 9, (9, 9, 9)),
        ("I;16B", 257 * 9, (9, 9, 9)),
        ("I;16L", 65535, (255, 255, 255)),
        ("I", 257 * 9, (9, 9, 9)),
        ("I", 65535, (255, 255, 255)),
        ("I", 200, (1, 1, 1)),  # of 65535: the mode decides, not the largest value
        ("F", 0.2, (51, 51, 51)),
        ("F", 1.0, (255, 255, 255)),
        ("F", 1.2, (255, 255, 255)),  # overshoot of a filter
        ("F", -0.2, (0, 0, 0)),
        ("F", float("nan"), (0, 0, 0)),
        ("F", float("inf"), (0, 0, 0)),
    ],
)
def test_modes(mode, colour, expected):
    image = Image.new(mode, (3, 2), colour)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_picture(image)
    assert opened.mode == "RGB" and opened.size == (3, 2)
    assert opened.getpixel((1, 1)) == expected


def test_no_mode_is_forgotten():
    from PIL import ImageMode

    for mode in ("1", "L", "I", "F", "P", "RGB", "RGBX", "RGBA", "CMYK", "YCbCr", "LAB", "HSV"):
        assert ImageMode.getmode(mode)
        assert open_picture(Image.new(mode, (2, 2))).mode == "RGB"
    for mode in ("RGBa", "LA", "La", "PA", "I;16", "I;16L", "I;16B", "I;16N"):
        assert open_picture(Image.new(mode, (2, 2))).mode == "RGB"


@pytest.mark.parametrize(
    ("mode", "values", "words"),
    [
        ("F", [0.0, 200.0], r"mode is F, which holds 0…1, but .* from 0 to 200; .*convert"),
        ("F", [-1.0, 1.0], "from -1 to 1"),
        ("F", [0.1, 1.3], "0.1 to 1.3"),
        ("F", [0.0, 65535.0], "to 65535"),
        ("I", [-5, 7], "mode is I, which holds 0…65535, but its values run from -5 to 7"),
        ("I", [0, 10**9], r"0 to 1e\+09"),
    ],
)
def test_greys_beyond_the_range_of_their_mode(tmp_path, mode, values, words):
    image = Image.new(mode, (2, 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    refused(image, words)
    image.save(tmp_path / "x.tif")
    refused(tmp_path / "x.tif", rf"picture .*x\.tif: its mode is {mode}, which holds")


def test_advice_for_greys_works():
    image = Image.new("F", (2, 1))
    image.putpixel((1, 0), 51.2)
    refused(image, r'give image.convert\("L"\)')
    assert pixel(image.convert("L"), 1) == (51, 51, 51)


def test_one_value_more_changes_no_other():
    """The first version took the range from the maximum: a cliff at 1, at 255."""
    values = np.array([[0.2, 0.5, 1.0]], np.float32)
    over = np.array([[0.2, 0.5, 1.01]], np.float32)
    assert np.array_equal(
        open_picture(Image.fromarray(values)), open_picture(Image.fromarray(over))
    )
    deep = [Image.fromarray(np.array([[9000, top]], np.int32)) for top in (255, 256, 65535)]
    assert [pixel(image) for image in deep] == [(35, 35, 35)] * 3


def test_16_bit_png_is_scaled_and_its_clear_grey_is_white(tmp_path):
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert [pixel(tmp_path / "a.png", x)[0] for x in range(4)] == [0, 1, 128, 255]
    Image.fromarray(values).save(tmp_path / "b.png", transparency=257)
    assert [pixel(tmp_path / "b.png", x)[0] for x in range(4)] == [0, 255, 128, 255]


def test_palette_with_one_alpha_a_colour(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0, 0, 0, 0, 0, 0, 0])
    for x in range(3):
        image.putpixel((x, 0), x)
    image.save(tmp_path / "p.png", transparency=b"\x00\x33\xff")
    with Image.open(tmp_path / "p.png") as file:
        assert file.mode == "P"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [pixel(tmp_path / "p.png", x)[0] for x in range(3)] == [255, 204, 0]


def test_cmyk_jpeg_is_not_inverted(tmp_path):
    red = Image.new("RGB", (16, 16), (220, 30, 40)).convert("CMYK")
    red.save(tmp_path / "adobe.jpg", quality=95)
    assert b"Adobe" in (tmp_path / "adobe.jpg").read_bytes()
    assert np.abs(np.subtract(pixel(tmp_path / "adobe.jpg", 8, 8), (220, 30, 40))).max() <= 3


def test_colour_profile_is_ignored(tmp_path):
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    image = noise()
    image.save(tmp_path / "icc.png", icc_profile=profile)
    assert open_picture(tmp_path / "icc.png").tobytes() == image.tobytes()


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff", "mpo"])
def test_first_frame_of_many(tmp_path, kind):
    frames = [Image.new("RGB", (16, 8), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "webp" else {}
    options |= {"quality": 95} if kind == "mpo" else {}
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], **options)
    with Image.open(tmp_path / f"a.{kind}") as file:
        assert file.n_frames == 3
        assert np.abs(np.subtract(pixel(tmp_path / f"a.{kind}"), (255, 0, 0))).max() <= 3
        file.seek(1)  # whoever opens it may choose another
        assert np.abs(np.subtract(pixel(file), (0, 0, 255))).max() <= 3


# ---------------------------------------------------------------- EXIF


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6)).convert("RGB")
    method = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # stored so; the viewer turns it back
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if method is None else upright.transpose(method)
    stored.save(tmp_path / "e.png", exif=exif)
    assert open_picture(tmp_path / "e.png").tobytes() == upright.tobytes()
    with Image.open(tmp_path / "e.png") as file:
        assert open_picture(file).size == (6, 4)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff\x01\x12",
        b"Exif\0\0XX\0\x2a\0\0\0\x08",
        b"Exif\0\0",
        b"garbage",
        b"Exif\0\0MM\0\x2a\xff\xff\xff\xff",
    ],
)
def test_broken_exif_is_no_reason_to_refuse(tmp_path, exif):
    noise().save(tmp_path / "e.jpg", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_picture(tmp_path / "e.jpg").size == (13, 7)


def test_exif_reader_that_fails(monkeypatch):
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda image: 1 / 0)
    assert open_picture(noise()).size == (13, 7)


# ---------------------------------------------------------------- what is no picture


def test_array_in_rgb_order():
    pixels = np.zeros((4, 5, 3), np.uint8)
    pixels[:, :, 0] = 255
    assert pixel(pixels) == (255, 0, 0)
    assert pixel(pixels[:, :, ::-1]) == (0, 0, 255)  # a view with a negative step
    assert pixel(pixels[::2, ::2]) == (255, 0, 0)


ARRAYS = [
    np.full((4, 5), 51, np.uint8),
    np.full((4, 5, 1), 51, np.uint8),
    np.full((4, 5, 4), (51, 51, 51, 255), np.uint8),
    np.full((3, 4, 5), 51, np.uint8),
    np.full((1, 4, 5), 51, np.uint8),
    np.full((4, 5, 3), 0.2, np.float32),
    np.full((4, 5), 0.2, np.float64),
    np.full((3, 4, 5), 0.2, np.float16),
    np.full((4, 5, 3), 51, np.int64),
    np.full((4, 5), 51, np.int32),
    np.full((4, 5), 51 * 257, np.uint16),
    np.full((4, 5, 4), 51 * 257, np.uint16),
    np.ones((4, 5), bool),
    np.ones((4, 5, 3), bool),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{list(a.shape)}")
def test_advice_for_other_arrays_works(array):
    """Each is refused with Python that makes the right picture of it."""
    refused(array, r"got an array .*expected uint8\[H, W, 3\] in RGB order: give ")
    with pytest.raises(ImageError) as caught:
        open_picture(array)
    advice = re.search(r"give (.*?)( if it holds .*)?$", str(caught.value))
    assert advice
    better = open_picture(eval(advice[1], {"array": array, "PIL": PIL}))
    assert better.size == (5, 4)
    level = 255 if array.dtype == bool else 51
    if array.dtype != np.uint16 or array.ndim == 2:
        assert better.getpixel((1, 2)) == (level,) * 3
    assert ("if it holds 0…1" in str(caught.value)) == (array.dtype.kind == "f")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((0, 4, 3), np.uint8), "it is empty"),
        (np.zeros((4, 0, 3), np.uint8), "it is empty"),
        (np.zeros((2, 4, 4, 3), np.uint8), "a batch; give 2 pictures, list"),
        (np.array(None), "height, width and three colours"),
        (np.zeros((5, 6, 2), np.uint8), "height, width and three colours"),
        (np.zeros(7, np.uint8), "height, width and three colours"),
        (np.zeros((4, 4, 3), complex), "numbers, 0…255"),
    ],
)
def test_arrays_that_no_advice_saves(array, words):
    refused(array, rf"got an array .*expected uint8\[H, W, 3\] in RGB order: .*{words}")


@pytest.mark.parametrize("thing", [None, 7, b"cat.jpg", torch.zeros(4, 4, 3), {"path": "x"}])
def test_wrong_types(thing):
    refused(thing, f"got {type(thing).__name__}; expected a path, a PIL.Image or a uint8")


def test_wrong_paths(tmp_path):
    refused(tmp_path / "none.jpg", "none.jpg does not exist; give the path")
    refused("https://example.org/cat.jpg", "cat.jpg' is an address; download it first")
    refused(str(tmp_path), "is a directory")
    refused("", "does not exist")
    refused("x" * 5000, "does not exist")
    refused("a\0b", "does not exist")


def test_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    noise().save(tmp_path / "x.png")
    assert open_picture("~/x.png").size == (13, 7)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is not a regular file")


@pytest.mark.parametrize(
    "content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8"]
)
def test_files_that_are_no_pictures(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    refused(tmp_path / "x.png", "x.png (is not a picture|cannot be decoded)")


def test_another_kind_of_file(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    refused(tmp_path / "notes.txt", "is not a picture that Pillow can read; convert it")


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "bmp", "tiff", "ppm"])
def test_truncated_files(tmp_path, kind):
    noise(64, 64).save(tmp_path / "x", kind)
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(data[: len(data) // 2])
    refused(tmp_path / "x", "is not a picture|cannot be decoded .*is it complete")


def test_opened_but_truncated(tmp_path):
    noise(64, 64).save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(data[: len(data) // 2])
    with Image.open(tmp_path / "x.png") as image:  # reads only the head
        refused(image, "the given PIL.Image cannot be decoded")


def test_closed_picture(tmp_path):
    noise().save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        pass
    refused(image, "cannot be decoded")


def test_empty_picture():
    refused(Image.new("RGB", (0, 5)), "it is 0 × 5 pixels: it is empty")


@pytest.mark.parametrize("factor", [1.5, 3])  # Pillow warns above 1 and raises above 2
def test_decompression_bomb(tmp_path, monkeypatch, factor):
    Image.new("1", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(100 * 100 / factor))
    refused(tmp_path / "bomb.png", r"bomb.png has more than [\d,]+ pixels; make it smaller")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # whoever trusts it
    assert open_picture(tmp_path / "bomb.png").size == (100, 100)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "bmp", "tiff"])
@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=6), st.data())
def test_damaged_files_open_or_are_refused(tmp_path, kind, damage, data):
    noise(20, 20).quantize(16).convert("RGB").save(tmp_path / "good", kind)
    content = bytearray((tmp_path / "good").read_bytes())
    for place, value in damage:
        content[place % len(content)] = value
    content = content[: data.draw(st.integers(0, len(content)))]
    (tmp_path / "bad").write_bytes(content)
    try:
        assert open_picture(tmp_path / "bad").mode == "RGB"
    except ImageError as error:
        assert "bad" in str(error)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "values", [0.5, (0.5, 0.5), "abc", "123", ("1", "2", "3"), (True, 1, 1), (1, 2, 1j), None]
)
def test_means_that_are_none(values):
    for place, name in ((1, "image_mean"), (2, "image_std")):
        given = [8, (0.5,) * 3, (0.5,) * 3, 3]
        given[place] = values
        with pytest.raises(ValueError, match=f"{name} is .*expected three numbers"):
            check_settings(*given)


def test_numbers_of_numpy_will_do():
    found = check_settings(np.int64(8), np.full(3, 0.25, np.float32), [1, 2, 3], np.int64(2))
    assert found == (8, (0.25,) * 3, (1, 2, 3), Image.Resampling.BILINEAR)
    assert [type(value) for value in (found[0], found[1][0])] == [int, float]


def test_settings_come_back(tmp_path):
    given = {"size": 56, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings_dict(**given)))
    assert read_settings(tmp_path, 8) == given


# ---------------------------------------------------------------- bounds


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_greys_are_converted_strip_by_strip(mode, monkeypatch):
    values = np.random.default_rng(0).random((50, 7))
    values = (values if mode == "F" else values * 65535).astype(
        {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    )
    if mode == "F":
        values[3, 2], values[30, 5] = np.nan, 1.2
    image = Image.fromarray(values)
    image.info["transparency"] = values[40, 1].item()
    assert image.mode == mode
    expected = open_picture(image).tobytes()
    for strip in (1, 20, 70):
        monkeypatch.setattr(pictures, "STRIP", strip)
        assert open_picture(image).tobytes() == expected
    values[45, 0] = 2 if mode == "F" else values[45, 0]
    if mode == "F":
        refused(Image.fromarray(values), "to 2;")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_is_laid_over_white_strip_by_strip(mode, monkeypatch):
    image = noise(7, 50, 4).convert(mode)
    if mode == "P":
        image.info["transparency"] = 3
    expected = open_picture(image).tobytes()
    for strip in (1, 20, 70):
        monkeypatch.setattr(pictures, "STRIP", strip)
        assert open_picture(image).tobytes() == expected


def test_a_deep_grey_takes_little_more_than_itself(monkeypatch):
    monkeypatch.setattr(pictures, "STRIP", 1 << 14)
    image = Image.new("I;16", (1000, 1000), 40000)
    tracemalloc.start()
    open_picture(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 1000 * 1000, "a number of eight bytes for each pixel would be 8 MB"


def test_postscript_is_not_run(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")  # its name says nothing

    def run(*_, **__):
        raise AssertionError("a program was run")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", run)
    refused(tmp_path / "a.png", "it is PostScript, a program")
    with Image.open(tmp_path / "a.png") as image:
        refused(image, "it is PostScript, a program")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"size": 10**6}, "size is 1000000; expected .* at most 4096"),
        ({"size": {"height": 5000, "width": 5000}}, "size is 5000; expected .* at most 4096"),
        ({"image_mean": [10**400] * 3}, "image_mean is .* expected three numbers"),
        ({"image_mean": "123"}, "image_mean is '123'; expected three numbers"),
        ({"image_std": [1e-300] * 3}, "it divides, so none may be 0"),
        ({"rescale_factor": 10**400}, "rescale_factor is 1000.*…; expected 1/255"),
        ({"rescale_factor": float("nan")}, "rescale_factor is nan; expected 1/255"),
    ],
    ids=str,
)
def test_settings_that_no_picture_can_have(tmp_path, setting, words):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(setting))
    with pytest.raises(ValueError, match=words):
        read_settings(tmp_path, 224)
