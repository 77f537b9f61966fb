# Exported from notebooks/03_patch_embedding.ipynb — edit there, then run `make sync`.
"""A picture cut into patches, each patch one vector with a learned position."""

import torch
from torch import nn


class PatchEmbedding(nn.Module):
    """Cut a square picture into patches and embed each as one vector.

    Args:
        hidden_size: width D of a patch vector.
        image_size: side of the picture in pixels.
        patch_size: side of a patch in pixels; divides `image_size`.
        num_channels: 3 for RGB.

    Raises:
        ValueError: the patch does not divide the picture.

    Source: Dosovitskiy et al. 2021 (ViT), section 3.1; `SiglipVisionEmbeddings` in transformers.
    """

    def __init__(self, hidden_size: int, image_size: int, patch_size: int, num_channels: int = 3):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"image_size {image_size} is not a multiple of patch_size {patch_size}; "
                f"the nearest that fits is {max(1, round(image_size / patch_size)) * patch_size}"
            )
        self.input_shape = (num_channels, image_size, image_size)
        self.num_patches = (image_size // patch_size) ** 2
        self.patch_embedding = nn.Conv2d(num_channels, hidden_size, patch_size, stride=patch_size)
        self.position_embedding = nn.Embedding(self.num_patches, hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`float[B, 3, H, W]` → `float[B, N, D]`, patches row by row from the top left."""
        if pixel_values.shape[1:] != self.input_shape:
            raise ValueError(
                f"pixel_values are {list(pixel_values.shape)}; this model reads "
                f"[B, {', '.join(map(str, self.input_shape))}]: prepare them with ImageProcessor"
            )
        patches = self.patch_embedding(pixel_values)  # [B, D, rows, columns]
        patches = patches.flatten(2).transpose(1, 2)  # [B, N, D]
        return patches + self.position_embedding.weight  # [B, N, D] + [N, D]
