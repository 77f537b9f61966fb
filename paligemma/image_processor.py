# Exported from notebooks/02_image_processor.ipynb — edit there, then run `make sync`.
"""From a picture file to the normalised tensor that the vision tower reads."""

import json
import os
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from paligemma.support.pictures import (
    Picture,
    check_settings,
    open_picture,
    read_settings,
    settings_dict,
)
from paligemma.support.replacing import replacing


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
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: int = Image.Resampling.BICUBIC

    def __post_init__(self):
        settings = check_settings(self.size, self.mean, self.std, self.resample)
        self.size, self.mean, self.std, self.resample = settings

    def __call__(self, images: Picture | list[Picture] | tuple[Picture, ...]) -> torch.Tensor:
        """One picture of any kind that `open_picture` takes, or B of them in a list, to
        `float32[B, 3, size, size]`, in -1…1 with the default mean and std."""
        pictures = images if isinstance(images, list | tuple) else [images]
        if not pictures:
            raise ValueError("the list of pictures is empty; give at least one")
        return torch.stack([self.to_pixel_values(picture) for picture in pictures])

    def to_pixel_values(self, image: Picture) -> torch.Tensor:
        """One picture to `float32[3, size, size]`."""
        picture = open_picture(image).resize((self.size, self.size), self.resample)
        pixels = np.array(picture, dtype=np.float32) / 255  # [size, size, 3] in 0…1
        pixels = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # [3, size, size]

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, size: int = 224) -> "ImageProcessor":
        """Read `preprocessor_config.json`; a directory without one gives the defaults at `size`.

        Raises:
            ValueError: a broken file, or one that asks for other steps than PaliGemma's.
        """
        return cls(**read_settings(path, size))

    def save_pretrained(self, path: str | os.PathLike, image_seq_length: int | None = None) -> None:
        """Write `preprocessor_config.json` in the published form, whole or not at all.

        Args:
            path: directory, made when absent.
            image_seq_length: N, image tokens a picture, which transformers reads from this file.
        """
        settings = settings_dict(self.size, self.mean, self.std, self.resample, image_seq_length)
        with replacing(path) as draft:
            text = json.dumps(settings, indent=2)
            (draft / "preprocessor_config.json").write_text(text + "\n")
