# Exported from notebooks/14_processor.ipynb — edit there, then run `make sync`.
"""Pictures and prompts to the tensors of one batch."""

import json
import os
from pathlib import Path

import torch

from paligemma.image_processor import ImageProcessor
from paligemma.tokenizer import Tokenizer


def collate(
    prefixes: list[list[int]], suffixes: list[list[int]], pad_id: int = 0
) -> dict[str, torch.Tensor]:
    """Rows of unequal length to rectangular tensors, padded on the left.

    Args:
        prefixes: B lists of ids.
        suffixes: B lists of ids, or an empty list when there is nothing to learn.
        pad_id: fills the left.

    Returns:
        `input_ids`, `attention_mask`, `token_type_ids` and, with suffixes, `labels`;
        all `int64[B, L]`.

    Raises:
        ValueError: no rows, or another number of suffixes.
    """
    if not prefixes or len(suffixes) not in (0, len(prefixes)):
        raise ValueError(
            f"got {len(prefixes)} prefixes and {len(suffixes)} suffixes; expected at least one "
            "prefix, and as many suffixes or none"
        )
    answers = suffixes or [[]] * len(prefixes)
    rows = [prefix + answer for prefix, answer in zip(prefixes, answers)]
    lengths, answer_lengths = torch.tensor([[len(r), len(a)] for r, a in zip(rows, answers)]).T
    from_right = torch.arange(int(lengths.max()), 0, -1)  # (L,): L, …, 2, 1
    real = from_right <= lengths[:, None]  # (B, L)
    is_suffix = from_right <= answer_lengths[:, None]  # (B, L)
    input_ids = torch.full(real.shape, pad_id)
    input_ids[real] = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
    batch = {
        "input_ids": input_ids,
        "attention_mask": real.long(),
        "token_type_ids": is_suffix.long(),
    }
    return batch | ({"labels": input_ids.masked_fill(~is_suffix, -100)} if suffixes else {})


def read_layout(path: str | os.PathLike) -> tuple[int, int, int]:
    """Side of the picture, side of a patch (pixels) and id of `<image>`, from `config.json`.

    Raises:
        ValueError: no such file, not JSON, or a field that cannot be.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"no config.json in {path}; give the directory of a checkpoint")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); copy the published file again") from None
    vision = config.get("vision_config", {}) if isinstance(config, dict) else None
    if not isinstance(vision, dict):
        raise ValueError(f"{file} holds no object with a vision_config; copy the published file")
    fields = {
        "vision_config.image_size": vision.get("image_size", 224),
        "vision_config.patch_size": vision.get("patch_size", 14),
        "image_token_index": config.get("image_token_index", config.get("image_token_id", 257152)),
    }
    for name, value in fields.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{file}: {name} is {value!r}; expected a positive whole number")
    size, patch, image_id = fields.values()
    if size % patch:
        raise ValueError(f"{file}: image_size {size} is not a multiple of patch_size {patch}")
    return size, patch, image_id


def as_lists(images, prompts, suffixes) -> tuple[list, list[str], list[str] | None]:
    """One of each or lists of them → lists of equal length; suffixes may be None."""
    images = list(images) if isinstance(images, list | tuple) else [images]
    texts = {"prompts": prompts, "suffixes": [] if suffixes is None else suffixes}
    for name, values in texts.items():
        values = [values] if isinstance(values, str) else values
        if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
            raise ValueError(f"{name}: got {values!r:.80}; expected a string or a list of strings")
        texts[name] = list(values)
    prompts, answers = texts.values()
    counts = {len(images), len(prompts), len(prompts if suffixes is None else answers)}
    if len(counts) != 1 or not prompts:
        raise ValueError(
            f"got {len(images)} pictures, {len(prompts)} prompts"
            + ("" if suffixes is None else f" and {len(answers)} suffixes")
            + "; expected the same number of each, at least one"
        )
    return images, prompts, None if suffixes is None else answers


class Processor:
    """Lay out `<image>`×N, bos, prompt, newline (and for training answer, eos) for a batch.

    Args:
        tokenizer: turns the text into ids.
        image_processor: turns the pictures into pixel values.
        num_image_tokens: N, image tokens a picture; (image_size / patch_size)².

    Source: PaliGemma paper, section 3.2 and figure 2; `PaliGemmaProcessor` in transformers.
    """

    def __init__(
        self, tokenizer: Tokenizer, image_processor: ImageProcessor, num_image_tokens: int
    ):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.num_image_tokens = num_image_tokens

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> "Processor":
        """Read a checkpoint directory: `tokenizer.model`, `config.json` and, where present,
        `preprocessor_config.json`; a `ValueError` if one is missing, broken or of another model."""
        return _from_pretrained(cls, path)

    def __call__(self, images, prompts, suffixes=None) -> dict[str, torch.Tensor]:
        """Prepare one picture and prompt, or equally long lists of them.

        Args:
            images: a path, `PIL.Image` or `uint8[H, W, 3]`, or a list of B of these.
            prompts: a string, or B strings.
            suffixes: the answers to learn, one or B strings; makes `labels`.

        Returns:
            A dict with `pixel_values` float32[B, 3, H, W], and int64[B, L], padded on the left:
            `input_ids`, `attention_mask` (0 = padding), `token_type_ids` (0 prefix, 1 suffix)
            and, with suffixes, `labels` (-100 except on the suffix and eos).

        Raises:
            ValueError: unequal numbers, none at all, no strings, or a text that spells `<image>`.
        """
        images, prompts, suffixes = as_lists(images, prompts, suffixes)
        prefixes = [self.encode_prefix(prompt) for prompt in prompts]
        answers = [self.encode_suffix(text) for text in suffixes or []]
        batch = {"pixel_values": self.image_processor(images)}
        return batch | collate(prefixes, answers, self.tokenizer.pad_id)

    def encode_prefix(self, prompt: str) -> list[int]:
        """`<image>`×N, bos, the prompt's pieces, newline."""
        t = self.tokenizer
        return [t.image_id] * self.num_image_tokens + [t.bos_id, *t.encode(prompt), t.newline_id]

    def encode_suffix(self, text: str) -> list[int]:
        """The answer's pieces, eos."""
        return [*self.tokenizer.encode(text), self.tokenizer.eos_id]

    def decode(self, ids) -> str:
        """Generated ids, `int64[T]` or a list, to text; what follows the first eos is ignored."""
        ids = [*map(int, ids), self.tokenizer.eos_id]
        return self.tokenizer.decode(ids[: ids.index(self.tokenizer.eos_id)])


def _from_pretrained(cls: type[Processor], path: str | os.PathLike) -> Processor:
    """A processor from the files of a checkpoint, which have to agree."""
    size, patch, image_id = read_layout(path)
    tokenizer = Tokenizer.from_pretrained(path)
    if image_id != tokenizer.image_id:
        raise ValueError(
            f"{path}: config.json says that <image> is token {image_id}, tokenizer.model makes "
            f"it {tokenizer.image_id}; these files belong to different checkpoints"
        )
    image_processor = ImageProcessor.from_pretrained(path, size)
    if image_processor.size != size:
        raise ValueError(
            f"{path}: preprocessor_config.json resizes to {image_processor.size} pixels, "
            f"config.json expects {size}; these files belong to different checkpoints"
        )
    return cls(tokenizer, image_processor, (size // patch) ** 2)
