# Exported from notebooks/14_processor.ipynb — edit there, then run `make sync`.
"""Pictures and prompts to the tensors of one batch."""

import os
from collections.abc import Iterable

import torch

from paligemma.image_processor import ImageProcessor
from paligemma.support.arguments import as_lists
from paligemma.support.config import read_config
from paligemma.support.files import find_folder
from paligemma.support.pictures import Picture
from paligemma.support.replacing import replacing
from paligemma.support.tokens import encode_within
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
    from_right = torch.arange(int(lengths.max()), 0, -1)  # [L]: L, …, 2, 1
    real = from_right <= lengths[:, None]  # [B, L]
    is_suffix = from_right <= answer_lengths[:, None]  # [B, L]
    input_ids = torch.full(real.shape, pad_id)
    input_ids[real] = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
    batch = {
        "input_ids": input_ids,
        "attention_mask": real.long(),
        "token_type_ids": is_suffix.long(),
    }
    return batch | ({"labels": input_ids.masked_fill(~is_suffix, -100)} if suffixes else {})


class Processor:
    """Lay out `<image>`×N, bos, prompt, newline (and for training answer, eos) for a batch.

    Args:
        tokenizer: turns the text into ids.
        image_processor: turns the pictures into pixel values.
        num_image_tokens: N, image tokens a picture; (image_size / patch_size)².
        context: the most tokens that a row may have (`max_position_embeddings`).

    Source: PaliGemma paper, section 3.2 and figure 2; `PaliGemmaProcessor` in transformers.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_processor: ImageProcessor,
        num_image_tokens: int,
        context: int = 8192,
    ):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.num_image_tokens, self.context = num_image_tokens, context

    def __call__(
        self,
        images: Picture | list | tuple,
        prompts: str | list[str],
        suffixes: str | list[str] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Prepare one picture and prompt, or equally long lists of them.

        Args:
            images: a path, `PIL.Image` or `uint8[H, W, 3]`, or a list of B: each one of these, or a
                list of several for one prompt.
            prompts: a string, or B strings.
            suffixes: the answers to learn, one or B strings; makes `labels`.

        Returns:
            A dict: `pixel_values` float32[P, 3, H, W], the P pictures in order; int64[B, L],
            padded on the left: `input_ids`, `attention_mask` (0 = padding), `token_type_ids`
            (0 prefix, 1 suffix) and, with suffixes, `labels` (-100 except on the suffix and eos).

        Raises:
            ValueError: unequal numbers, none at all, no strings, a text that spells `<image>`, or
                one that is longer than the context.
        """
        groups, texts, answers = as_lists(images, prompts, suffixes)
        prefixes = [self.encode_prefix(text, len(group)) for text, group in zip(texts, groups)]
        pictures = [picture for group in groups for picture in group]
        batch = {"pixel_values": self.image_processor(pictures)}
        endings = [self.encode_suffix(answer) for answer in answers]
        return batch | collate(prefixes, endings, self.tokenizer.pad_id)

    def encode_prefix(self, prompt: str, num_images: int = 1) -> list[int]:
        """`<image>`×(N · num_images), bos, the prompt's tokens, newline; at most `context`."""
        t = self.tokenizer
        image = [t.image_id] * (self.num_image_tokens * num_images)
        words = encode_within(t, prompt, self.context - len(image) - 2)
        return [*image, t.bos_id, *words, t.newline_id]

    def encode_suffix(self, text: str) -> list[int]:
        """The answer's tokens, eos; at most `context`."""
        return [*encode_within(self.tokenizer, text, self.context - 1), self.tokenizer.eos_id]

    def decode(self, ids: Iterable[int]) -> str:
        """Generated ids, `int64[L]` or a list, to text; what follows the first eos is ignored."""
        ids = [*map(int, ids), self.tokenizer.eos_id]
        return self.tokenizer.decode(ids[: ids.index(self.tokenizer.eos_id)])

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> "Processor":
        """Read a checkpoint: `config.json`, `tokenizer.model` with its lists of added tokens and,
        where present, `preprocessor_config.json`.

        Raises:
            ValueError: a file is missing, broken, or belongs to another checkpoint.
        """
        path = find_folder(path)
        config = read_config(path)
        tokenizer = Tokenizer.from_pretrained(path)
        if config["image_token_index"] != tokenizer.image_id:
            raise ValueError(
                f"{path}: config.json says that <image> is token {config['image_token_index']}, "
                f"tokenizer.model makes it {tokenizer.image_id}; these files belong to different "
                "checkpoints"
            )
        rows = config["text_config"]["vocab_size"]
        if len(tokenizer) > rows:
            raise ValueError(
                f"{path}: the tokenizer has ids up to {len(tokenizer) - 1}, the embedding of "
                f"config.json {rows} rows; these files belong to different checkpoints"
            )
        size, patch = config["vision_config"]["image_size"], config["vision_config"]["patch_size"]
        image_processor = ImageProcessor.from_pretrained(path, size)
        if image_processor.size != size:
            raise ValueError(
                f"{path}: preprocessor_config.json resizes to {image_processor.size} pixels, "
                f"config.json expects {size}; these files belong to different checkpoints"
            )
        context = config["text_config"]["max_position_embeddings"]
        return cls(tokenizer, image_processor, (size // patch) ** 2, context)

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write what `from_pretrained` reads, but for `config.json`, which the model writes."""
        with replacing(path) as draft:
            self.tokenizer.save_pretrained(draft)
            self.image_processor.save_pretrained(draft, self.num_image_tokens)
