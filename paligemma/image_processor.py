# Exported from notebooks/02_image_processor.ipynb — edit there, then run `make sync`.
"""From a picture file to the normalised tensor that the vision tower reads."""

import json
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError


class ImageError(ValueError):
    """A picture that cannot be used; the message says which and why."""


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Deep greys (modes I, I;16…, F) to mode L: scaled to 0…255 rather than clipped."""
    values = np.array(image, dtype=np.float64)
    values[~np.isfinite(values)] = 0
    limits = {"F": (1, 255), "I": (255,)}.get(image.mode, ())
    top = next((limit for limit in limits if values.max(initial=0) <= limit), 65535)
    grey = np.clip(np.round(values * (255 / top)), 0, 255).astype(np.uint8)
    hidden = image.info.get("transparency")
    if hidden is not None:  # one grey that means "see through"
        grey[values == hidden] = 255
    return Image.fromarray(grey)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to 8-bit RGB, with transparency laid over white."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = _grey_to_8_bits(image)
    if image.mode == "La":  # alpha already multiplied in; Pillow knows one way out
        image = image.convert("LA")
    has_alpha = {"A", "a"} & set(image.getbands())
    if has_alpha or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _decode(image: Image.Image) -> Image.Image:
    """All pixels of an opened picture, upright, in RGB; raises whatever Pillow raises."""
    image.load()
    if 0 in image.size:
        raise ImageError(f"the picture is {image.width} × {image.height} pixels: it is empty")
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # unreadable EXIF data: take the picture as it lies
        pass
    return _to_rgb(image)


def _open_file(path: str | os.PathLike) -> Image.Image:
    """Decode one file; every way in which that fails becomes an `ImageError`."""
    if not os.path.isfile(path):
        what = "does not exist"
        if os.path.exists(path):
            what = "is a directory" if os.path.isdir(path) else "is not a regular file"
        raise ImageError(f"picture {path} {what}; give the path of an image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                return _decode(file)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ImageError(
            f"picture {path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller "
            "(or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it)"
        ) from None
    except UnidentifiedImageError:
        raise ImageError(
            f"{path} is not a picture that Pillow can read; convert it to PNG or JPEG"
        ) from None
    except Exception as error:  # decoders of broken files raise nearly everything
        raise ImageError(f"picture {path} cannot be decoded ({error}); is it complete?") from None


def open_image(image: str | os.PathLike | Image.Image | np.ndarray) -> Image.Image:
    """Open a picture as upright 8-bit RGB.

    Args:
        image: a path, a `PIL.Image` of any mode, or `uint8[H, W, 3]` in RGB order.

    Returns:
        A `PIL.Image` in mode RGB: EXIF rotation applied, transparency laid over white,
        the first frame of an animated file, deep greys scaled to 8 bits, ICC profile ignored.

    Raises:
        ImageError: not a picture, truncated, empty, or more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS` (a decompression bomb).
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ImageError(
                f"got an array {image.dtype}{list(image.shape)}; expected uint8[H, W, 3] in RGB "
                "order: convert it with PIL.Image.fromarray(...) first"
            )
        return Image.fromarray(image)
    if isinstance(image, Image.Image):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _decode(image)
        except Exception as error:
            raise ImageError(f"the given PIL.Image cannot be decoded ({error})") from None
    if not isinstance(image, str | os.PathLike):
        raise ImageError(
            f"got {type(image).__name__}; expected a path, a PIL.Image or a uint8[H, W, 3] array"
        )
    return _open_file(image)


def _to_pixel_values(image: Image.Image, size, mean, std, resample) -> torch.Tensor:
    """One RGB picture to `float32[3, size, size]`."""
    image = image.resize((size, size), resample)
    pixels = np.array(image, dtype=np.float32) / 255  # (size, size, 3) in 0…1
    pixels = (pixels - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # (3, size, size)


@dataclass
class ImageProcessor:
    """Pictures to pixel values: squash to a square, scale to 0…1, normalise to -1…1.

    Args:
        size: side of the square in pixels (224, 448 or 896 in the published checkpoints).
        mean: subtracted from each channel after scaling to 0…1.
        std: divides each channel after that.
        resample: Pillow filter (3 = bicubic, as in the published `preprocessor_config.json`).

    Source: `SiglipImageProcessor` in transformers; PaliGemma paper, section 3.1.
    """

    size: int = 224
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resample: int = Image.Resampling.BICUBIC

    def __post_init__(self):
        _check_settings(self)

    def __call__(self, images) -> torch.Tensor:
        """One picture of any kind that `open_image` takes, or B of them in a list, to
        `float32[B, 3, size, size]`, in -1…1 with the default mean and std."""
        images = images if isinstance(images, list | tuple) else [images]
        if not images:
            raise ValueError("the list of pictures is empty; give at least one")
        how = (self.size, self.mean, self.std, self.resample)
        return torch.stack([_to_pixel_values(open_image(image), *how) for image in images])

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, size: int = 224) -> "ImageProcessor":
        """Read `preprocessor_config.json`; a directory without one gives the defaults at `size`."""
        return _read_settings(cls, path, size)

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write `preprocessor_config.json` in the published form."""
        _write_settings(self, path)


def _three_numbers(name: str, values) -> tuple[float, float, float]:
    """Check `mean` or `std`: one finite number for each of red, green and blue."""
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} is {values!r}; expected three numbers such as (0.5, 0.5, 0.5)")
    return numbers


def _check_settings(processor: ImageProcessor) -> None:
    """Refuse settings with which no picture could be processed."""
    size, resample = processor.size, processor.resample
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"size is {size!r}; expected a side in pixels such as 224")
    if isinstance(resample, bool) or resample not in list(Image.Resampling):
        known = ", ".join(f"{kind.value} {kind.name.lower()}" for kind in Image.Resampling)
        raise ValueError(f"resample is {resample!r}; expected one of Pillow's filters: {known}")
    processor.resample = Image.Resampling(resample)
    processor.mean = _three_numbers("image_mean", processor.mean)
    processor.std = _three_numbers("image_std", processor.std)
    if 0 in processor.std:
        raise ValueError(f"image_std is {processor.std}; it divides, so none may be 0")


def _read_config(path: str | os.PathLike) -> tuple[Path, dict]:
    """The file with the image settings, and what it says; no such file gives no settings."""
    file = Path(path) / "preprocessor_config.json"
    newer = Path(path) / "processor_config.json"  # transformers 5 writes this one
    if not file.is_file() and not newer.is_file():
        return file, {}
    file, nested = (file, False) if file.is_file() else (newer, True)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{file} is not JSON ({error}); copy the published file again") from None
    if nested and isinstance(config, dict):
        config = config.get("image_processor") or {}
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds {type(config).__name__}; expected settings, as in {{…}}")
    return file, {key: value for key, value in config.items() if value is not None}


def _write_settings(processor: ImageProcessor, path: str | os.PathLike) -> None:
    """Write `preprocessor_config.json`, the same keys as in the published checkpoints."""
    config = {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(processor.mean),
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": None,
        "image_std": list(processor.std),
        "processor_class": "PaliGemmaProcessor",
        "resample": int(processor.resample),
        "rescale_factor": 1 / 255,
        "size": {"height": processor.size, "width": processor.size},
    }
    (Path(path) / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _read_settings(cls, path: str | os.PathLike, size: int):
    """An image processor with the settings of a checkpoint directory."""
    file, config = _read_config(path)
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not config.get(step, True):
            raise ValueError(f"{file}: {step} is false; PaliGemma's pictures need this step")
    if config.get("do_center_crop") or config.get("do_pad"):
        raise ValueError(f"{file}: asks to crop or pad; PaliGemma squashes the whole picture")
    factor = config.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ValueError(f"{file}: rescale_factor is {factor!r}; expected 1/255, bytes to 0…1")
    side = config.get("size", size)
    if isinstance(side, dict):
        if side.get("height") is None or side.get("height") != side.get("width"):
            raise ValueError(f"{file}: size is {side}; expected a square, height equal to width")
        side = side["height"]
    mean, std = config.get("image_mean", (0.5,) * 3), config.get("image_std", (0.5,) * 3)
    try:
        return cls(side, mean, std, config.get("resample", Image.Resampling.BICUBIC))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
