# Exported from notebooks/20_mask_codec.ipynb — edit there, then run `make sync`.
"""Masks as sixteen codes: a VQ-VAE that writes any shape of 64 × 64 pixels, and draws it again."""

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from paligemma.support.arguments import as_tensor
from paligemma.support.files import open_tensors
from paligemma.support.replacing import replacing, settled
from paligemma.support.tensors import match_tensors, open_arrays

GRID = 4  # codes along a side
SIDE = 64  # pixels along a side of the square that the codes draw


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions and a 1 × 1, added to what came in."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.net(x)


class Codebook(nn.Module):
    """The vectors that codes stand for: `codes` rows of `width` numbers."""

    def __init__(self, codes: int, width: int):
        super().__init__()
        self._embedding = nn.Parameter(torch.randn(codes, width))

    def nearest(self, z: torch.Tensor) -> torch.Tensor:
        """Number of the nearest row: `float32[..., width]` → `int64[...]`."""
        e = self._embedding
        return (e.square().sum(1) - 2 * z @ e.T).argmin(-1)  # |z|² is the same for all

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """The rows of codes: `int64[...]` → `float32[..., width]`."""
        return F.embedding(codes, self._embedding)


def make_encoder(widths: Sequence[int], code_width: int, blocks: int = 1) -> nn.Sequential:
    """Strided convolutions of these widths, residual blocks, a 1 × 1 to the codebook's width."""
    layers: list[nn.Module] = []
    for before, after in pairwise((1, *widths)):
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    layers += [ResidualBlock(widths[-1]) for _ in range(blocks)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], code_width, 1))


class MaskCodec(nn.Module):
    """Masks to codes and back: 64 × 64 pixels ↔ sixteen codes, four rows of four.

    Args:
        codes, code_width: rows of the codebook, and numbers in each.
        width: channels of the decoder's first layers, a multiple of 8.

    Source: Ning et al., *All in Tokens*, 2023; parameters have the names of `vae-oid.npz`.
    """

    def __init__(self, codes: int = 128, code_width: int = 512, width: int = 128):
        super().__init__()
        self.codes = codes
        self._vq_vae = Codebook(codes, code_width)
        layers = [nn.Conv2d(code_width, width, 1), nn.ReLU()]
        layers += [ResidualBlock(width), ResidualBlock(width)]
        for before, after in pairwise((width, width, width // 2, width // 4, width // 8)):
            layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(width // 8, 1, 1))
        widths = (width // 8, width // 4, width // 2, width)  # the decoder's, mirrored
        self.encoder: nn.Module | None = make_encoder(widths, code_width)
        self.fixed_length = True  # of the encoder's vectors; the published: False

    def encode_vectors(self, masks: torch.Tensor) -> torch.Tensor:
        """What the encoder says: `float32[B, 64, 64]` in [0, 1] → `float32[B, 16, code_width]`."""
        if self.encoder is None:
            raise ValueError("this codec has no encoder: it only decodes; load the whole file")
        z = self.encoder(2 * (masks[:, None] - 0.5))  # [B, code_width, 4, 4]
        z = z.flatten(2).transpose(1, 2)  # [B, 16, code_width]
        return F.rms_norm(z, z.shape[2:]) if self.fixed_length else z

    def decode_vectors(self, vectors: torch.Tensor) -> torch.Tensor:
        """What the decoder draws: `float32[B, 16, code_width]` → `float32[B, 64, 64]`."""
        grid = vectors.transpose(1, 2).unflatten(2, (GRID, GRID))  # [B, code_width, 4, 4]
        return self.decoder(grid)[:, 0]

    def forward(self, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One pass for training: the drawing, its codes, how far codebook and encoder are apart."""
        z = self.encode_vectors(masks)
        codes = self._vq_vae.nearest(z)  # [B, 16]
        e = self._vq_vae(codes)
        apart = F.mse_loss(e, z.detach()) + 0.25 * F.mse_loss(z, e.detach())
        return self.decode_vectors(z + (e - z).detach()), codes, apart

    @torch.no_grad()
    def encode(self, masks: torch.Tensor) -> torch.Tensor:
        """Masks as codes: `float32[B, 64, 64]` in [0, 1] (or bool) → `int64[B, 16]`, row by row.

        Raises:
            ValueError: another shape, values outside 0 to 1, or a codec without an encoder.
        """
        masks = as_tensor(masks, "masks")
        if masks.ndim != 3 or masks.shape[1:] != (SIDE, SIDE):
            raise ValueError(f"masks are {list(masks.shape)}; expected [B, 64, 64]: crop_masks")
        masks = masks.to(self._vq_vae._embedding)
        if not ((masks >= 0) & (masks <= 1)).all():
            raise ValueError("masks have values outside 0 to 1; expected 1 inside, 0 outside")
        return self._vq_vae.nearest(self.encode_vectors(masks))

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Draw codes: `int64[B, 16]` → `float32[B, 64, 64]` in [-1, 1], inside the object above 0.

        Raises:
            ValueError: another shape or type, or a code that is not in the codebook.
        """
        codes = as_tensor(codes, "codes")
        if codes.ndim != 2 or codes.shape[1] != GRID**2 or codes.is_floating_point():
            kind = f"{codes.dtype} {list(codes.shape)}"
            raise ValueError(f"codes are {kind}; expected whole numbers [B, 16]")
        if codes.numel() and not 0 <= codes.min() <= codes.max() < self.codes:
            low, high = int(codes.min()), int(codes.max())
            raise ValueError(f"codes go from {low} to {high}; expected 0 to {self.codes - 1}")
        codes = codes.to(self._vq_vae._embedding.device, torch.int64)
        return self.decode_vectors(self._vq_vae(codes)).clamp(-1, 1)

    @classmethod
    def from_state(
        cls, state: Mapping[str, torch.Tensor], source: str | os.PathLike, fixed_length: bool
    ) -> "MaskCodec":
        """Build the codec whose widths a file's tensors show, and load them, strictly."""
        downs = (0, 2, 4, 6) if any(name.startswith("encoder.") for name in state) else ()
        try:
            codes, code_width = state["_vq_vae._embedding"].shape
            width = len(state["decoder.0.bias"])
            widths = [len(state[f"encoder.{layer}.bias"]) for layer in downs]
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{source} is no mask codec: it lacks, or has bent, {error}") from None
        if not codes or not code_width or width < 8 or width % 8:
            raise ValueError(f"{source}: {codes} codes, width {width}; expected a multiple of 8")
        blocks = sum(f"encoder.{layer}.net.0.bias" in state for layer in range(8, len(state)))
        with torch.device("meta"):  # shapes only, and no random numbers are drawn
            codec = cls(codes, code_width, width)
            codec.encoder = make_encoder(widths, code_width, blocks) if widths else None
        codec.fixed_length = fixed_length
        match_tensors(source, state, codec.state_dict(), finite=True)
        codec.load_state_dict({n: t.float() for n, t in state.items()}, assign=True)
        return codec.eval()

    @classmethod
    def from_npz(cls, path: str | os.PathLike) -> "MaskCodec":
        """Read the published `vae-oid.npz`; without an encoder in it the codec only decodes.

        Raises:
            ValueError: no such file, not an npz, pickled objects, and what `from_state` refuses.
        """
        parts = ("encoder.", "decoder.", "_vq_vae._embedding")
        return cls.from_state(open_arrays(path, parts), path, fixed_length=False)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> "MaskCodec":
        """Read what `save_pretrained` wrote: the file, or the directory that holds it.

        Raises:
            ValueError: no such file, truncated, and what `from_state` refuses.
        """
        path = codec_file(path)
        settled(path.parent)
        state = open_tensors([path])
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        return cls.from_state(state, path, fixed_length=about.get("fixed_length", "true") == "true")

    def save_pretrained(self, path: str | os.PathLike, dtype: torch.dtype = torch.float16) -> None:
        """Write `mask_codec.safetensors`, whole or not at all, into a directory, made if absent."""
        path = codec_file(path)
        state = {n: t.to("cpu", dtype).contiguous() for n, t in self.state_dict().items()}
        about = {"format": "pt", "fixed_length": str(self.fixed_length).lower()}
        with replacing(path.parent) as draft:
            save_file(state, draft / path.name, metadata=about)


def mask_iou(a, b) -> np.ndarray:
    """Intersection over union of masks, bool[..., height, width], arrays or tensors.

    Returns:
        float64[...], 0 (apart, or both empty) to 1 (equal).
    """
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    shared, together = (a & b).sum((-1, -2)), (a | b).sum((-1, -2))
    return shared / np.maximum(together, 1)


def codec_file(path: str | os.PathLike) -> Path:
    """The file itself, or the one of that name in a directory."""
    path = Path(path).expanduser()
    return path if path.suffix == ".safetensors" else path / "mask_codec.safetensors"


@torch.no_grad()
def restart_dead_codes(codec: MaskCodec, masks: torch.Tensor, counts: torch.Tensor) -> int:
    """Move codes that nobody chose lately on top of what the encoder says now of some masks.

    Args:
        masks: `float32[B, 64, 64]`.
        counts: `[codes]`, how often each code was chosen.

    Returns:
        How many were dead.
    """
    dead = (counts == 0).nonzero()[:, 0]
    z = codec.encode_vectors(masks).flatten(0, 1)  # [16 B, code_width]
    codec._vq_vae._embedding[dead] = z[torch.randint(len(z), (len(dead),), device=z.device)]
    return len(dead)
