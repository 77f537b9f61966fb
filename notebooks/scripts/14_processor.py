# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["navigation"]
# [← Gemma](12_gemma.ipynb) | [contents](../README.md) | [PaliGemma →](15_model.ipynb)

# %% [markdown]
# # 14 · Processor: what exactly does the model read?
#
# *30 minutes* · part III, Together

# %%
#| export
"""Pictures and prompts to the tensors of one batch."""

import json
import os
from pathlib import Path

import torch

from paligemma.image_processor import ImageProcessor
from paligemma.tokenizer import Tokenizer


# %%
#| export
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
        `preprocessor_config.json`.

        Raises:
            ValueError: a file is missing, or they disagree about the picture's size or the
                id of `<image>`.
        """
        file = Path(path) / "config.json"
        if not file.is_file():
            raise ValueError(f"no config.json in {path}; give the directory of a checkpoint")
        config = json.loads(file.read_text())
        tokenizer = Tokenizer.from_pretrained(path)
        image_id = config.get("image_token_index", config.get("image_token_id", 257152))
        if image_id != tokenizer.image_id:
            raise ValueError(
                f"{file} says that <image> is token {image_id}, tokenizer.model makes it "
                f"{tokenizer.image_id}; these files belong to different checkpoints"
            )
        vision = config.get("vision_config", {})
        size, patch = vision.get("image_size", 224), vision.get("patch_size", 14)
        image_processor = ImageProcessor.from_pretrained(path, size)
        if image_processor.size != size:
            raise ValueError(
                f"{path}: preprocessor_config.json resizes to {image_processor.size} pixels, "
                f"config.json expects {size}; these files belong to different checkpoints"
            )
        return cls(tokenizer, image_processor, (size // patch) ** 2)

    def __call__(self, images, prompts, suffixes=None) -> dict[str, torch.Tensor]:
        """Prepare one picture and prompt, or equally long lists of them.

        Args:
            images: a path, `PIL.Image` or `uint8[H, W, 3]`, or a list of B of these.
            prompts: a string, or B strings.
            suffixes: the answers to learn, B strings; makes `labels`.

        Returns:
            A dict with `pixel_values` float32[B, 3, H, W], and int64[B, L], padded on the left:
            `input_ids`, `attention_mask` (0 = padding), `token_type_ids` (0 prefix, 1 suffix)
            and, with suffixes, `labels` (-100 except on the suffix and eos).

        Raises:
            ValueError: different numbers of pictures, prompts and suffixes, or none.
        """
        images = images if isinstance(images, list | tuple) else [images]
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        suffixes = [suffixes] if isinstance(suffixes, str) else suffixes
        counts = {len(images), len(prompts), len(prompts if suffixes is None else suffixes)}
        if len(counts) != 1 or not prompts:
            raise ValueError(
                f"got {len(images)} pictures, {len(prompts)} prompts"
                + ("" if suffixes is None else f" and {len(suffixes)} suffixes")
                + "; expected the same number of each, at least one"
            )
        prefixes = [self.encode_prefix(prompt) for prompt in prompts]
        answers = [] if suffixes is None else [self.encode_suffix(text) for text in suffixes]
        batch = {"pixel_values": self.image_processor(images)}
        return batch | collate(prefixes, answers, self.tokenizer.pad_id)

    def encode_prefix(self, prompt: str) -> list[int]:
        """`<image>`×N, bos, the prompt's pieces, newline."""
        if not isinstance(prompt, str):
            raise ValueError(f"a prompt is {type(prompt).__name__}; expected a string")
        t = self.tokenizer
        image = [t.image_id] * self.num_image_tokens
        return [*image, t.bos_id, *t.encode(prompt), t.newline_id]

    def encode_suffix(self, text: str) -> list[int]:
        """The answer's pieces, eos."""
        return [*self.tokenizer.encode(text), self.tokenizer.eos_id]

    def decode(self, ids) -> str:
        """Generated ids, `int64[T]` or a list, to text; what follows the first eos is ignored."""
        ids = [int(i) for i in ids]
        if self.tokenizer.eos_id in ids:
            ids = ids[: ids.index(self.tokenizer.eos_id)]
        return self.tokenizer.decode(ids)


# %%
#| export
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
    """
    rows = [p + s for p, s in zip(prefixes, suffixes or [[]] * len(prefixes), strict=True)]
    shape = (len(rows), max(map(len, rows)))
    input_ids = torch.full(shape, pad_id)
    attention_mask, token_type_ids = torch.zeros(shape).long(), torch.zeros(shape).long()
    for i, row in enumerate(rows):
        input_ids[i, -len(row) :] = torch.tensor(row)
        attention_mask[i, -len(row) :] = 1
        token_type_ids[i, shape[1] - len(row) + len(prefixes[i]) :] = 1
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
    }
    if suffixes:
        batch["labels"] = input_ids.masked_fill(token_type_ids == 0, -100)
    return batch
