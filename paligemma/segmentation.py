# Exported from notebooks/21_segmentation.ipynb — edit there, then run `make sync`.
"""Masks as words: a learned codec of sixteen codes a mask, and objects with masks in an answer."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from paligemma.checkpoint import replacing
from paligemma.detection import Found, decode_box, encode_boxes, find_objects, score_spans
from paligemma.tokenizer import Tokenizer

GRID = 4  # codes along a side
SIDE = 64  # pixels along a side of the square that the codes draw


def resize_weights(
    points: torch.Tensor, spacing: torch.Tensor, low, high, size: int
) -> torch.Tensor:
    """How much each of `size` pixels counts at points on a line: bilinear, smoothed if spread.

    Args:
        points: `float64[n, m]`, in pixels.
        spacing: `float64[n, 1]`, from one to the next.
        low, high: `float64[n, 1]`: only pixels that touch this stretch count.
        size: of the line.

    Returns:
        `float32[n, m, size]`; each row sums to 1.
    """
    pixels = torch.arange(size, dtype=torch.float64)
    reach = spacing.clamp(min=1)[..., None]
    weights = (1 - (points[..., None] - pixels - 0.5).abs() / reach).clamp(min=0)
    weights = weights * ((pixels + 1 > low) & (pixels < high))[:, None]
    return (weights / weights.sum(-1, keepdim=True)).float()


def crop_masks(boxes: Sequence, masks: Sequence) -> torch.Tensor:
    """Cut each mask out along its box and resize it to the square that codes draw.

    Args:
        boxes: n boxes (x0, y0, x1, y1) in pixels; the part inside the picture counts.
        masks: bool[n, H, W], each as large as the picture (of one or of several pictures).

    Returns:
        `float32[n, 64, 64]` in [0, 1].

    Raises:
        ValueError: not one mask for each box, or a box without inside.
    """
    boxes = torch.from_numpy(np.array(boxes, dtype=np.float64).reshape(-1, 4))
    masks = torch.from_numpy(np.ascontiguousarray(masks, dtype=bool))
    if masks.ndim != 3 or len(masks) != len(boxes):
        if len(boxes) or masks.numel():
            raise ValueError(
                f"{len(boxes)} boxes and masks {list(masks.shape)}; "
                "expected a mask [height, width] for each box"
            )
        return torch.zeros(0, SIDE, SIDE)
    sizes = torch.tensor(masks.shape[:0:-1], dtype=torch.float64)  # width, height
    low = torch.minimum(boxes[:, :2].clamp(min=0), sizes)
    high = torch.minimum(boxes[:, 2:].clamp(min=0), sizes)
    if not (high > low).all():
        bad = boxes[~(high > low).all(1)][0].tolist()
        raise ValueError(f"box {bad} has no inside in the picture; expected x0 < x1 and y0 < y1")
    steps = (torch.arange(SIDE, dtype=torch.float64) + 0.5) / SIDE
    points = low[..., None] + (high - low)[..., None] * steps  # (n, 2, 64)
    spacing = (high - low) / SIDE
    across, down = (
        resize_weights(points[:, i], spacing[:, [i]], low[:, [i]], high[:, [i]], masks.shape[2 - i])
        for i in (0, 1)
    )
    return (down @ masks.float() @ across.transpose(1, 2)).clamp(0, 1)  # (n, 64, 64)


def paste_mask(drawn: torch.Tensor, box: Sequence[float], width: int, height: int) -> np.ndarray:
    """Resize what codes draw to its box (bilinear) and put it into the picture.

    Args:
        drawn: `float32[64, 64]`, inside where above 0.
        box: (x0, y0, x1, y1), pixels; parts beyond the picture are cut off.
        width, height: of the picture, pixels.

    Returns:
        bool[height, width].
    """
    mask = np.zeros((height, width), dtype=bool)
    places, weights = [], []
    for low, high, size in ((box[1], box[3], height), (box[0], box[2], width)):
        first, last = (min(max(int(np.ceil(v - 0.5)), 0), size) for v in (low, high))
        points = (torch.arange(first, last, dtype=torch.float64) + 0.5 - low) / (high - low) * SIDE
        spacing = torch.tensor([[SIDE / (high - low)]], dtype=torch.float64)
        ends = torch.tensor([[0.0]]), torch.tensor([[float(SIDE)]])
        weights.append(resize_weights(points[None].clamp(0.5, SIDE - 0.5), spacing, *ends, SIDE)[0])
        places.append(slice(first, last))
    mask[tuple(places)] = (weights[0] @ drawn.float().cpu() @ weights[1].T > 0).numpy()
    return mask


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


def make_decoder(code_width: int, width: int) -> nn.Sequential:
    """Layers from a 4 × 4 grid of codebook vectors to a 64 × 64 picture of one channel.

    Source: the published `vae-oid.npz`, whose names `decoder.0` … `decoder.12` these are.
    """
    layers = [nn.Conv2d(code_width, width, 1), nn.ReLU()]
    layers += [ResidualBlock(width), ResidualBlock(width)]
    for before, after in pairwise((width, width, width // 2, width // 4, width // 8)):
        layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width // 8, 1, 1))


def make_encoder(code_width: int, width: int) -> nn.Sequential:
    """The decoder's mirror, one block shorter: 64 × 64 pixels to a 4 × 4 grid of vectors."""
    layers = []
    for before, after in pairwise((1, width // 8, width // 4, width // 2, width)):
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, ResidualBlock(width), nn.Conv2d(width, code_width, 1))


class Codebook(nn.Module):
    """The vectors that codes stand for.

    Args:
        codes: how many.
        width: of each.
    """

    def __init__(self, codes: int, width: int):
        super().__init__()
        self._embedding = nn.Parameter(torch.randn(codes, width))

    def nearest(self, z: torch.Tensor) -> torch.Tensor:
        """Number of the nearest vector: `float32[..., width]` → `int64[...]`."""
        e = self._embedding
        return (e.square().sum(1) - 2 * z @ e.T).argmin(-1)  # |z|² is the same for all

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """The vectors of codes: `int64[...]` → `float32[..., width]`."""
        return F.embedding(codes, self._embedding)


class MaskVQVAE(nn.Module):
    """The network of a mask codec: 64 × 64 pixels → sixteen vectors → codes → 64 × 64 pixels.

    Args:
        codes: size of the codebook.
        code_width: of its vectors.
        width: channels of the inner layers, a multiple of 8.
        encoder: False: without one, as the published file.

    Source: Ning et al., *All in Tokens*, 2023; the defaults are those of `vae-oid.npz`.
    """

    def __init__(
        self, codes: int = 128, code_width: int = 512, width: int = 128, encoder: bool = True
    ):
        super().__init__()
        self.codes = codes
        self._vq_vae = Codebook(codes, code_width)
        self.encoder = make_encoder(code_width, width) if encoder else None
        self.decoder = make_decoder(code_width, width)

    def look(self, masks: torch.Tensor) -> torch.Tensor:
        """What the encoder says: `float32[B, 64, 64]` in [0, 1] → `float32[B, 16, code_width]`."""
        z = self.encoder(2 * masks[:, None] - 1)  # (B, code_width, 4, 4)
        z = z.flatten(2).transpose(1, 2)  # (B, 16, code_width)
        return F.rms_norm(z, z.shape[2:])  # of fixed length: it cannot run away from its codes

    def draw(self, vectors: torch.Tensor) -> torch.Tensor:
        """What the decoder paints: `float32[B, 16, code_width]` → `float32[B, 64, 64]`."""
        grid = vectors.transpose(1, 2).unflatten(2, (GRID, GRID))  # (B, code_width, 4, 4)
        return self.decoder(grid)[:, 0]

    def forward(self, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One pass for training, gradients straight through the choice of codes.

        Returns:
            what is drawn (`float32[B, 64, 64]`), the codes (`int64[B, 16]`) and how far codebook
            and encoder are apart (a loss: the codebook moves fully, the encoder by a quarter).
        """
        z = self.look(masks)
        codes = self._vq_vae.nearest(z)
        e = self._vq_vae(codes)
        apart = F.mse_loss(e, z.detach()) + 0.25 * F.mse_loss(z, e.detach())
        return self.draw(z + (e - z).detach()), codes, apart


@torch.no_grad()
def restart_dead_codes(net: MaskVQVAE, masks: torch.Tensor, counts: torch.Tensor) -> int:
    """Give codes that nobody chooses a new place: on top of what the encoder says now.

    Args:
        net: in training.
        masks: `float32[B, 64, 64]`, a batch to take places from.
        counts: `int64[codes]`, how often each code was chosen lately.

    Returns:
        How many were dead.
    """
    dead = (counts == 0).nonzero()[:, 0]
    z = net.look(masks).flatten(0, 1)  # (16 B, code_width)
    net._vq_vae._embedding[dead] = z[torch.randint(len(z), (len(dead),), device=z.device)]
    return len(dead)


@torch.no_grad()
def search_codes(
    codec: "MaskCodec",
    masks: torch.Tensor,
    tries: int = 32,
    sweeps: int = 2,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Encode with a decoder: try codes, keep those whose drawing overlaps the mask best (IoU).

    Cell after cell its own code and `tries` others are drawn in their places: those which, drawn
    alone all over, fit the cell's part of the mask best.

    Args:
        codec: whose `decode` is used.
        masks: `float32[B, 64, 64]` in [0, 1].
        tries: candidates of each cell.
        sweeps: times through the cells.
        start: `int64[B, 16]`, such as the encoder's; None: the best fit of each cell alone.

    Returns:
        `int64[B, 16]`.
    """
    inside = masks > 0.5
    everywhere = torch.arange(codec.codes, device=masks.device)[:, None].expand(-1, GRID**2)
    cost = torch.cdist(_cells(2 * masks - 1), _cells(codec.decode(everywhere)))
    best = cost.topk(min(tries, codec.codes), largest=False).indices  # (16, B, tries)
    codes = best[..., 0].T.clone() if start is None else start.clone()  # (B, 16)
    for cell in list(range(GRID**2)) * sweeps:
        candidates = torch.cat((codes[:, cell : cell + 1], best[cell]), dim=1)  # (B, 1 + tries)
        trial = codes[:, None].repeat(1, candidates.shape[1], 1)  # (B, 1 + tries, 16)
        trial[:, :, cell] = candidates
        drawn = codec.decode(trial.flatten(0, 1)).unflatten(0, trial.shape[:2]) > 0
        both = (drawn & inside[:, None]).sum((2, 3))
        overlap = both / (drawn | inside[:, None]).sum((2, 3)).clamp(min=1)
        codes[:, cell] = candidates.gather(1, overlap.argmax(1, keepdim=True))[:, 0]
    return codes


def _cells(pictures: torch.Tensor) -> torch.Tensor:
    """Cut into the squares that single codes stand for: (B, 64, 64) → (16, B, 256)."""
    step = SIDE // GRID
    squares = pictures.unflatten(2, (GRID, step)).unflatten(1, (GRID, step))
    return squares.permute(1, 3, 0, 2, 4).reshape(GRID**2, -1, step * step)


BROKEN_ZIP = (BadZipFile, ZlibError)


class CodecFiles:
    """Reading and writing of a mask codec."""

    @classmethod
    def from_npz(cls, path: str | os.PathLike) -> "MaskCodec":
        """Read the published decoder and codebook; other arrays in the file are left alone.

        Args:
            path: `vae-oid.npz`.

        Returns:
            A codec without an encoder, in evaluation mode.

        Raises:
            ValueError: no such file, not an npz, an array missing or of the wrong shape.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                names = [n for n in arrays.files if n.startswith(("decoder.", "_vq_vae._emb"))]
                state = {name: torch.from_numpy(arrays[name]) for name in names}
        except (OSError, ValueError, AttributeError, TypeError, EOFError, *BROKEN_ZIP) as error:
            raise ValueError(f"{path} is not an npz file of arrays ({error})") from None
        return _from_state(cls, path, state)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> "MaskCodec":
        """Read a codec that `save_pretrained` wrote.

        Args:
            path: the file, or the directory that holds `mask_codec.safetensors`.

        Returns:
            The codec in float32 and evaluation mode.

        Raises:
            ValueError: no such file, truncated, a tensor missing or of the wrong shape.
        """
        path = _codec_file(path)
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is not a file of a mask codec ({error})") from None
        return _from_state(cls, path, state)

    def save_pretrained(self, path: str | os.PathLike, dtype: torch.dtype = torch.float16) -> None:
        """Write `mask_codec.safetensors`, whole or not at all.

        Args:
            path: the file (`….safetensors`), or a directory, made when absent.
            dtype: of the stored weights.
        """
        path = _codec_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {n: t.to("cpu", dtype).contiguous() for n, t in self.state_dict().items()}
        with replacing(path.parent) as draft:
            save_file(state, draft(path.name), metadata={"format": "pt"})


def _codec_file(path: str | os.PathLike) -> Path:
    """The file itself, or the one of that name in a directory."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / "mask_codec.safetensors"


def _from_state(cls: type, path, state: dict[str, torch.Tensor]) -> "MaskCodec":
    """Build the codec whose widths a file's tensors show, and load them, strictly."""
    try:
        codes, code_width = state["_vq_vae._embedding"].shape
        width = state["decoder.0.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"{path} holds no codebook and decoder.0.weight ({error})") from None
    if width < 8 or width % 8 or not codes:
        raise ValueError(f"{path}: {codes} codes, width {width}; expected width a multiple of 8")
    encoder = any(name.startswith("encoder.") for name in state)
    with torch.random.fork_rng(devices=[]):  # loading draws no one else's random numbers
        codec = cls(codes, code_width, width, encoder)
    expected = codec.state_dict()
    for name in [*expected, *state]:
        if name not in state or name not in expected:
            what = "lacks" if name in expected else "holds, for no part of a mask codec,"
            raise ValueError(f"{path} {what} {name}; download it again")
        if state[name].shape != expected[name].shape:
            raise ValueError(
                f"{path}: {name} is {list(state[name].shape)}, "
                f"expected {list(expected[name].shape)}"
            )
    codec.load_state_dict(state)
    return codec.eval()


class MaskCodec(CodecFiles, MaskVQVAE):
    """Masks to codes and back: 64 × 64 pixels ↔ sixteen codes, four rows of four.

    Args: as in `MaskVQVAE`; without an encoder, `encode` searches.
    """

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Draw codes.

        Args:
            codes: `int64[B, 16]`, row by row, each 0 to `self.codes` - 1.

        Returns:
            `float32[B, 64, 64]` in [-1, 1]; inside the object where above 0.

        Raises:
            ValueError: another shape or type, or a code that is not in the codebook.
        """
        codes = torch.as_tensor(codes)
        if codes.ndim != 2 or codes.shape[1] != GRID**2 or codes.is_floating_point():
            raise ValueError(
                f"codes are {codes.dtype} {list(codes.shape)}; expected whole numbers [B, 16]"
            )
        if codes.numel() and not 0 <= codes.min() <= codes.max() < self.codes:
            low, high = int(codes.min()), int(codes.max())
            raise ValueError(f"codes go from {low} to {high}; expected 0 to {self.codes - 1}")
        codes = codes.to(self._vq_vae._embedding.device, torch.int64)
        return self.draw(self._vq_vae(codes)).clamp(-1, 1)

    @torch.no_grad()
    def encode(self, masks: torch.Tensor) -> torch.Tensor:
        """Write masks as codes; without an encoder by search, which is far slower.

        Args:
            masks: `float32[B, 64, 64]` in [0, 1] (or bool).

        Returns:
            `int64[B, 16]`.

        Raises:
            ValueError: another shape, or values outside 0 to 1.
        """
        masks = torch.as_tensor(masks)
        if masks.ndim != 3 or masks.shape[1:] != (SIDE, SIDE):
            raise ValueError(f"masks are {list(masks.shape)}; expected [B, 64, 64]: crop_masks")
        masks = masks.to(self._vq_vae._embedding)
        if not ((masks >= 0) & (masks <= 1)).all():
            raise ValueError("masks have values outside 0 to 1; expected 1 inside, 0 outside")
        if self.encoder is not None:
            return self._vq_vae.nearest(self.look(masks))
        found = [search_codes(self, part) for part in masks.split(16)]
        return torch.cat(found) if found else masks.new_zeros(0, GRID**2, dtype=torch.int64)


def encode_segments(
    boxes: Sequence, masks: Sequence, codec: MaskCodec, width: float, height: float
) -> list[str]:
    """Write each object's box and mask as twenty words.

    Args:
        boxes: n boxes (x0, y0, x1, y1), pixels.
        masks: bool[n, height, width], as large as the picture; those of several pictures of one
            size may be encoded together, which is faster.
        codec: with an encoder.
        width, height: of the picture, pixels.

    Returns:
        "<loc>×4<seg>×16" for each.

    Raises:
        ValueError: as in `encode_boxes` and `crop_masks`.
    """
    words = encode_boxes(boxes, width, height)
    codes = codec.encode(crop_masks(boxes, masks)).tolist()
    return [w + "".join(f"<seg{code:03d}>" for code in own) for w, own in zip(words, codes)]


@dataclass(frozen=True, eq=False)
class Segment:
    """One object that was found, with its shape.

    Args:
        label: its name, as the model wrote it.
        box: (x0, y0, x1, y1) in pixels of the given picture.
        mask: bool[H, W], as large as the given picture.
        score: how sure the model was, 0 to 1; 1 where nothing is known.
    """

    label: str
    box: tuple[float, float, float, float]
    mask: np.ndarray
    score: float = 1.0


def parse_segments(
    text: str, width: int, height: int, codec: MaskCodec, dropped: list | None = None
) -> list[Segment]:
    """Read the objects with masks of a model's answer; whatever the text, it raises nothing.

    Args:
        text: "<loc>×4<seg>×16 label" joined by " ; ", with anything around.
        width, height: of the picture, pixels.
        codec: draws the masks.
        dropped: a list that gets (piece of text, what is wrong with it) for each broken object.

    Returns:
        The well-formed objects, in order, with score 1.

    Raises:
        ValueError: a picture without size.
    """
    found = _with_masks(text, codec, dropped)
    return _segments(found, [1.0] * len(found), width, height, codec)


def score_segments(
    ids: Sequence[int],
    log_probs: Sequence[float],
    tokenizer: Tokenizer,
    width: int,
    height: int,
    codec: MaskCodec,
    dropped: list | None = None,
) -> list[Segment]:
    """`parse_segments` of an answer given as tokens, each object with its score.

    Args:
        ids: the tokens of one answer.
        log_probs: of each token, as `generate_steps` collects them.
        tokenizer: spells them.
        width, height, codec, dropped: as in `parse_segments`.

    Returns:
        The well-formed objects, in order.
    """
    found = _with_masks(tokenizer.decode(ids), codec, dropped)
    spans = [(f.start, f.end) for f in found]
    scores = score_spans(spans, ids, log_probs, tokenizer)
    return _segments(found, scores, width, height, codec)


def _with_masks(text: str, codec: MaskCodec, dropped: list | None) -> list[Found]:
    """The well-formed objects that have a mask."""
    kept = []
    for found in find_objects(text):
        problem = found.problem
        if problem is None and not found.segs:
            problem = "0 <seg>, expected 16"
        elif problem is None and max(found.segs) >= codec.codes:
            problem = f"a number beyond <seg{codec.codes - 1:03d}>"
        if problem is None:
            kept.append(found)
        elif dropped is not None:
            dropped.append((text[found.start : found.end].strip(), problem))
    return kept


def _segments(
    found: Iterable[Found], scores: Iterable[float], width: int, height: int, codec: MaskCodec
) -> list[Segment]:
    """Draw all masks in one batch and put each into its box."""
    if not all(size > 0 and int(size) == size for size in (width, height)):
        raise ValueError(f"the picture is {width} × {height}; expected whole numbers of pixels")
    found = list(found)
    if not found:
        return []
    drawings = codec.decode(torch.tensor([f.segs for f in found]))
    segments = []
    for one, drawn, score in zip(found, drawings, scores):
        box = decode_box(one.locs, width, height)
        mask = paste_mask(drawn, box, int(width), int(height))
        segments.append(Segment(one.label, box, mask, score))
    return segments
