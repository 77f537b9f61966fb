# Exported from notebooks/02_image_processor.ipynb — edit there, then run `make sync`.
"""From a picture file to the normalised tensor that the vision tower reads."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError


class ImageError(ValueError):
    """A picture that cannot be used; the message says which and why."""


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to 8-bit RGB: transparency over white, 16 bits scaled rather than clipped."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.clip(np.round(values / 257), 0, 255).astype(np.uint8)).convert(
            "RGB"
        )
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image), nan=0.0, posinf=1.0, neginf=0.0)
        if values.max(initial=0.0) <= 1.0:  # floats are either 0…1 or already 0…255
            values = values * 255
        return Image.fromarray(np.clip(np.round(values), 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def open_image(image: str | os.PathLike | Image.Image | np.ndarray) -> Image.Image:
    """Open a picture as upright 8-bit RGB.

    Args:
        image: a path, a `PIL.Image` of any mode, or `uint8[H, W, 3]` in RGB order.

    Returns:
        A `PIL.Image` in mode RGB: EXIF rotation applied, transparency laid over white,
        the first frame of an animation, 16-bit values scaled to 8 bits.

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
        return _to_rgb(ImageOps.exif_transpose(image))
    if not isinstance(image, str | os.PathLike):
        raise ImageError(
            f"got {type(image).__name__}; expected a path, a PIL.Image or a uint8[H, W, 3] array"
        )
    return _open_file(Path(image))


def _open_file(path: Path) -> Image.Image:
    """Decode one file; every way in which that fails becomes an `ImageError`."""
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise ImageError(f"picture {path} {what}; give the path of an image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                file.load()
                return _to_rgb(ImageOps.exif_transpose(file))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ImageError(
            f"picture {path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller "
            "(or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it)"
        ) from None
    except UnidentifiedImageError:
        raise ImageError(
            f"{path} is not a picture that Pillow can read; convert it to PNG or JPEG"
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(f"picture {path} cannot be decoded ({error}); is it complete?") from None


class ImageProcessor:
    """Pictures to pixel values: squash to a square, scale to 0…1, normalise to -1…1.

    Args:
        size: side of the square in pixels (224, 448 or 896 in the published checkpoints).
        mean: subtracted from each channel after scaling to 0…1.
        std: divides each channel after that.
        resample: Pillow filter (3 = bicubic, as in the published `preprocessor_config.json`).

    Source: `SiglipImageProcessor` in transformers; PaliGemma paper, section 3.1.
    """

    def __init__(
        self,
        size: int = 224,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        resample: int = Image.Resampling.BICUBIC,
    ):
        self.size = size
        self.mean = mean
        self.std = std
        self.resample = Image.Resampling(resample)

    def __call__(self, images) -> torch.Tensor:
        """Prepare one picture or a list of them.

        Args:
            images: what `open_image` takes, or a list of these (length B).

        Returns:
            `float32[B, 3, size, size]` in -1…1 (with the default mean and std).
        """
        if not isinstance(images, list | tuple):
            images = [images]
        return torch.stack([self._pixels(open_image(image)) for image in images])

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        image = image.resize((self.size, self.size), self.resample)
        pixels = np.array(image, dtype=np.float32) / 255  # (size, size, 3) in 0…1
        pixels = (pixels - np.float32(self.mean)) / np.float32(self.std)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # (3, size, size)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, size: int = 224) -> "ImageProcessor":
        """Read `preprocessor_config.json`; a directory without one gives the defaults at `size`."""
        file = Path(path) / "preprocessor_config.json"
        if not file.is_file():
            return cls(size)
        config = json.loads(file.read_text())
        side = config.get("size", size)
        if isinstance(side, dict):
            if side.get("height") != side.get("width"):
                raise ValueError(f"{file}: size {side} is not a square; PaliGemma reads squares")
            side = side["height"]
        return cls(
            side,
            tuple(config.get("image_mean", (0.5, 0.5, 0.5))),
            tuple(config.get("image_std", (0.5, 0.5, 0.5))),
            config.get("resample", Image.Resampling.BICUBIC),
        )

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write `preprocessor_config.json` in the published form."""
        config = {
            "do_convert_rgb": None,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(self.mean),
            "image_processor_type": "SiglipImageProcessor",
            "image_seq_length": None,
            "image_std": list(self.std),
            "processor_class": "PaliGemmaProcessor",
            "resample": int(self.resample),
            "rescale_factor": 1 / 255,
            "size": {"height": self.size, "width": self.size},
        }
        (Path(path) / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")
