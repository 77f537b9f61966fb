"""Pictures of every kind, broken files, settings, and the same pixels as transformers."""

import json
import os
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from paligemma.image_processor import ImageError, ImageProcessor, open_image
from paligemma.plotting import sample_picture

PHOTOS = ("cat", "coffee", "astronaut")
seeds = st.integers(0, 2**31)


def theirs(image, size=224):
    """Pixel values of transformers' Pillow processor (its default needs torchvision)."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    processor = SiglipImageProcessorPil(size={"height": size, "width": size})
    return processor(image, return_tensors="pt")["pixel_values"][0]


def reference() -> dict[str, torch.Tensor]:
    """The three photographs: all of it at 28 × 28, each sixteenth pixel at 224 × 224."""
    tensors = {}
    for name in PHOTOS:
        tensors[f"{name}_28"] = theirs(sample_picture(name), 28)
        tensors[f"{name}_224"] = theirs(sample_picture(name))[:, ::16, ::16]
    return tensors


def noise(width=13, height=7, channels=3, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels if channels > 1 else pixels[:, :, 0])


def pixel(image, x=0, y=0):
    return open_image(image).getpixel((x, y))


# ---------------------------------------------------------------- the same as transformers


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("size", [28, 224, 448])
def test_photographs_agree_with_transformers(name, size):
    photo = sample_picture(name)
    ours = ImageProcessor(size)(photo)[0]
    assert (ours - theirs(photo, size)).abs().max() <= 1e-6


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV"])
def test_modes_agree_with_transformers(mode):
    image = noise(31, 17)
    image = image.convert("RGBA" if mode in ("RGBA", "LA", "PA") else "RGB")
    if "A" in image.getbands():
        image.putalpha(noise(31, 17, 1, seed=1))
    image = image.convert(mode)
    assert (ImageProcessor(28)(image)[0] - theirs(image, 28)).abs().max() <= 1e-6


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.integers(1, 60), seeds)
def test_any_size_agrees_with_transformers(width, height, seed):
    image = noise(width, height, seed=seed)
    ours = ImageProcessor(28)(image)[0]
    assert ours.shape == (3, 28, 28) and ours.dtype == torch.float32 and ours.is_contiguous()
    assert (ours - theirs(image, 28)).abs().max() <= 1e-6


def test_transparent_files_agree_with_transformers(tmp_path):
    for name, options in {
        "P": {"transparency": 3},
        "RGB": {"transparency": (10, 20, 30)},
        "L": {"transparency": 7},
    }.items():
        image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert(name)
        image.putpixel((2, 2), options["transparency"])
        image.save(tmp_path / "x.png", **options)
        ours = ImageProcessor(8)(tmp_path / "x.png")[0]
        with Image.open(tmp_path / "x.png") as file:
            assert torch.equal(ours, theirs(file, 8)), name
        assert (ours[:, 2, 2] == 1).all(), f"{name}: the clear pixel is not white"


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
        ("I", 200, (200, 200, 200)),
        ("I", -5, (0, 0, 0)),
        ("I", 10**9, (255, 255, 255)),
        ("F", 0.2, (51, 51, 51)),
        ("F", 200.4, (200, 200, 200)),
        ("F", 257 * 9.0, (9, 9, 9)),
        ("F", float("nan"), (0, 0, 0)),
        ("F", float("inf"), (0, 0, 0)),
    ],
)
def test_modes(mode, colour, expected):
    image = Image.new(mode, (3, 2), colour)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_image(image)
    assert opened.mode == "RGB" and opened.size == (3, 2)
    assert opened.getpixel((1, 1)) == expected


def test_no_mode_is_forgotten():
    from PIL import ImageMode

    for mode in ("1", "L", "I", "F", "P", "RGB", "RGBX", "RGBA", "CMYK", "YCbCr", "LAB", "HSV"):
        assert ImageMode.getmode(mode)
        assert open_image(Image.new(mode, (2, 2))).mode == "RGB"
    for mode in ("RGBa", "LA", "La", "PA", "I;16", "I;16L", "I;16B", "I;16N"):
        assert open_image(Image.new(mode, (2, 2))).mode == "RGB"


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
    assert open_image(tmp_path / "icc.png").tobytes() == image.tobytes()


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
    assert open_image(tmp_path / "e.png").tobytes() == upright.tobytes()
    with Image.open(tmp_path / "e.png") as file:
        assert open_image(file).size == (6, 4)


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
        assert open_image(tmp_path / "e.jpg").size == (13, 7)


def test_exif_reader_that_fails(monkeypatch):
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda image: 1 / 0)
    assert open_image(noise()).size == (13, 7)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 3)])
def test_extreme_shapes(size):
    out = ImageProcessor(28)(Image.new("RGB", size, (255, 127, 0)))
    assert out.shape == (1, 3, 28, 28)
    assert torch.allclose(out.amax((2, 3)), out.amin((2, 3))), "a plain picture stays plain"
    assert out[0, 0].max() == 1 and out[0, 2].min() == -1


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), seeds)
def test_values_stay_in_range_and_can_be_undone(width, height, size, seed):
    image = noise(width, height, seed=seed)
    out = ImageProcessor(size)(image)[0]
    assert out.min() >= -1 and out.max() <= 1
    back = ((out * 0.5 + 0.5) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(back, image.resize((size, size), Image.Resampling.BICUBIC))


def test_the_given_picture_is_not_changed():
    image = noise().convert("RGBA")
    before = image.tobytes(), image.mode
    ImageProcessor(8)(image)
    assert (image.tobytes(), image.mode) == before


def test_list_tuple_and_single():
    image = noise()
    process = ImageProcessor(8)
    one = process(image)
    assert one.shape == (1, 3, 8, 8)
    assert torch.equal(process([image, image]), one.repeat(2, 1, 1, 1))
    assert torch.equal(process((image,)), one)
    with pytest.raises(ValueError, match="empty; give at least one"):
        process([])


# ---------------------------------------------------------------- what is no picture


def refused(image, words):
    with pytest.raises(ImageError, match=words) as caught:
        open_image(image)
    assert isinstance(caught.value, ValueError)


def test_array_in_rgb_order():
    pixels = np.zeros((4, 5, 3), np.uint8)
    pixels[:, :, 0] = 255
    assert pixel(pixels) == (255, 0, 0)
    assert pixel(pixels[:, :, ::-1]) == (0, 0, 255)  # a view with a negative step
    assert pixel(pixels[::2, ::2]) == (255, 0, 0)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.int64),
        np.zeros((4, 4, 3), bool),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 0, 3), np.uint8),
        np.array(None),
    ],
)
def test_wrong_arrays(array):
    refused(array, r"got an array .*expected uint8\[H, W, 3\].*fromarray")


@pytest.mark.parametrize("thing", [None, 7, b"cat.jpg", torch.zeros(4, 4, 3), {"path": "x"}])
def test_wrong_types(thing):
    refused(thing, f"got {type(thing).__name__}; expected a path, a PIL.Image or a uint8")


def test_wrong_paths(tmp_path):
    refused(tmp_path / "none.jpg", "none.jpg does not exist; give the path")
    refused("https://example.org/cat.jpg", "https://example.org/cat.jpg does not exist")
    refused(str(tmp_path), "is a directory")
    refused("", "does not exist")
    refused("x" * 5000, "does not exist")
    refused("a\0b", "does not exist")


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
    refused(Image.new("RGB", (0, 5)), "0 × 5 pixels: it is empty")


@pytest.mark.parametrize("factor", [1.5, 3])  # Pillow warns above 1 and raises above 2
def test_decompression_bomb(tmp_path, monkeypatch, factor):
    Image.new("1", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(100 * 100 / factor))
    refused(tmp_path / "bomb.png", r"bomb.png has more than [\d,]+ pixels; make it smaller")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # whoever trusts it
    assert open_image(tmp_path / "bomb.png").size == (100, 100)


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
        assert open_image(tmp_path / "bad").mode == "RGB"
    except ImageError as error:
        assert "bad" in str(error)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("size", [0, -1, 224.0, "224", True, None, (224, 224)])
def test_wrong_size(size):
    with pytest.raises(ValueError, match=r"size is .*expected a side in pixels"):
        ImageProcessor(size)


@pytest.mark.parametrize("values", [0.5, (0.5, 0.5), "abc", (0.5, None, 0.5), (1, 2, float("nan"))])
@pytest.mark.parametrize("name", ["mean", "std"])
def test_wrong_mean_and_std(name, values):
    with pytest.raises(ValueError, match=f"image_{name} is .*expected three numbers"):
        ImageProcessor(28, **{name: values})


def test_std_of_zero():
    with pytest.raises(ValueError, match="none may be 0"):
        ImageProcessor(28, std=(1, 0, 1))


@pytest.mark.parametrize("resample", [9, -1, "bicubic", None, 2.5, True])
def test_wrong_filter(resample):
    with pytest.raises(ValueError, match=r"resample is .*3 bicubic"):
        ImageProcessor(28, resample=resample)


def test_other_settings_are_obeyed():
    image = Image.new("RGB", (2, 2), (255, 51, 0))
    out = ImageProcessor(1, mean=(0, 0.2, 0.5), std=(1, 0.5, 0.25))(image)
    assert torch.allclose(out.flatten(), torch.tensor([1.0, 0.0, -2.0]))
    big = noise(16, 16)
    nearest = ImageProcessor(8, resample=0)(big)[0, :, 0, 0]
    assert torch.allclose(nearest, torch.tensor(big.getpixel((1, 1))) / 127.5 - 1, atol=1e-6)


def test_round_trip(tmp_path):
    ImageProcessor(448, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 2).save_pretrained(tmp_path)
    again = ImageProcessor.from_pretrained(tmp_path, size=7)
    assert again == ImageProcessor(448, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 2)


def test_transformers_reads_what_we_write_and_we_read_what_it_writes(tmp_path):
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    ImageProcessor(56, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)).save_pretrained(tmp_path)
    reader = SiglipImageProcessorPil.from_pretrained(tmp_path)
    image = noise(31, 17)
    pixels = reader(image, return_tensors="pt")["pixel_values"]
    assert (ImageProcessor.from_pretrained(tmp_path)(image) - pixels).abs().max() <= 1e-6
    (tmp_path / "preprocessor_config.json").unlink()
    reader.save_pretrained(tmp_path)
    again = ImageProcessor.from_pretrained(tmp_path)
    assert (again.size, again.mean, again.std) == (56, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_no_file_gives_the_defaults(tmp_path):
    assert ImageProcessor.from_pretrained(tmp_path, 448) == ImageProcessor(448)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "PaliGemmaProcessor"}')
    assert ImageProcessor.from_pretrained(tmp_path, 448) == ImageProcessor(448)


def test_nested_file_of_transformers_5(tmp_path):
    nested = {"image_processor": {"size": {"height": 56, "width": 56}, "image_mean": [0, 0, 0]}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    again = ImageProcessor.from_pretrained(tmp_path)
    assert (again.size, again.mean) == (56, (0, 0, 0))
    (tmp_path / "preprocessor_config.json").write_text('{"size": 28}')  # the published one wins
    assert ImageProcessor.from_pretrained(tmp_path).size == 28


def test_sparse_file_and_nulls(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"size": null, "resample": null}')
    assert ImageProcessor.from_pretrained(tmp_path, 448) == ImageProcessor(448)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{size: 224}", "is not JSON"),
        ("", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        ("[1, 2]", "holds list; expected settings"),
        ('"224"', "holds str"),
        ('{"size": "224"}', "size is '224'"),
        ('{"size": {"height": 224}}', "expected a square"),
        ('{"size": {"height": 224, "width": 448}}', "expected a square"),
        ('{"size": {"shortest_edge": 224}}', "expected a square"),
        ('{"size": {"height": "a", "width": "a"}}', "size is 'a'"),
        ('{"size": -3}', "size is -3"),
        ('{"image_mean": 0.5}', "image_mean is 0.5; expected three numbers"),
        ('{"image_std": [0, 1, 1]}', "none may be 0"),
        ('{"image_std": [NaN, 1, 1]}', "expected three numbers"),
        ('{"resample": 17}', "resample is 17"),
        ('{"resample": []}', "resample is"),
        ('{"do_resize": false}', "do_resize is false"),
        ('{"do_rescale": false}', "do_rescale is false"),
        ('{"do_normalize": false}', "do_normalize is false"),
        ('{"do_center_crop": true}', "asks to crop or pad"),
        ('{"do_pad": true}', "asks to crop or pad"),
        ('{"rescale_factor": 1}', "rescale_factor is 1"),
        ('{"rescale_factor": "x"}', "rescale_factor is 'x'"),
    ],
)
def test_bad_files_of_settings(tmp_path, text, words):
    file = tmp_path / "preprocessor_config.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=words) as caught:
        ImageProcessor.from_pretrained(tmp_path)
    assert type(caught.value) is ValueError
    assert "preprocessor_config.json" in str(caught.value), "the message names the file"
