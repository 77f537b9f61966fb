"""The same pixels as transformers, any size, settings; opening: tests/support/test_pictures.py."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paligemma.image_processor import ImageProcessor
from paligemma.support.course import sample_picture

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


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("size", [0, -1, 224.0, "224", True, None, (224, 224)])
def test_wrong_size(size):
    with pytest.raises(ValueError, match=r"size is .*expected a side in pixels"):
        ImageProcessor(size)


@pytest.mark.parametrize(
    "values", [0.5, (0.5, 0.5), "abc", "123", (0.5, None, 0.5), (1, 2, float("nan"))]
)
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
        ("[1, 2]", r"is \[1, 2\]; expected a JSON object"),
        ('"224"', "is '224'; expected a JSON object"),
        ('{"size": "224"}', "size is '224'"),
        ('{"size": {"height": 224}}', "expected a square"),
        ('{"size": {"height": 224, "width": 448}}', "expected a square"),
        ('{"size": {"shortest_edge": 224}}', "expected a square"),
        ('{"size": {"height": "a", "width": "a"}}', "size is 'a'"),
        ('{"size": -3}', "size is -3"),
        ('{"image_mean": 0.5}', "image_mean is 0.5; expected three numbers"),
        ('{"image_mean": "123"}', "image_mean is '123'; expected three numbers"),
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
    assert "preprocessor_config.json" in str(caught.value), "the message names the file"


def test_a_full_disk_leaves_the_old_settings(tmp_path, monkeypatch):
    ImageProcessor(56).save_pretrained(tmp_path / "new")

    def full_disk(file, text):
        file.write_bytes(text[:9].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        ImageProcessor(28).save_pretrained(tmp_path / "new")
    assert ImageProcessor.from_pretrained(tmp_path / "new").size == 56
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["preprocessor_config.json"]
