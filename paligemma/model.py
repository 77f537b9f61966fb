# Exported from notebooks/15_model.ipynb — edit there, then run `make sync`.
"""PaliGemma: vision tower, projector and language model over one prefix-LM sequence."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from paligemma.gemma import GemmaConfig, GemmaModel
from paligemma.gemma2 import Gemma2Config, Gemma2Model
from paligemma.kv_cache import KVCache
from paligemma.siglip import SiglipVisionConfig, SiglipVisionModel
from paligemma.support.arguments import check_context, check_inputs, check_pictures


def prefix_lm_mask(
    attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None, length: int
) -> torch.Tensor:
    """Who may look at whom: prefix at prefix in both directions, suffix only backwards.

                         is looked at
                    image  prompt  suffix
        image       1 1 1   1 1    0 0 0
        prompt      1 1 1   1 1    0 0 0
        suffix      1 1 1   1 1    1 0 0
                    1 1 1   1 1    1 1 0
                    1 1 1   1 1    1 1 1

    Args:
        attention_mask: `int64[B, S]`, 0 on padding: the tokens of the cache, and the L new ones.
        token_type_ids: `int64[B, L]`, 0 prefix, 1 suffix; None: all prefix, or behind a cache
            all suffix.
        length: L, the number of new tokens (the queries).

    Returns:
        `bool[B, 1, L, S]`, True where query i may look at key j.

    Source: PaliGemma paper, figure 2; Raffel et al. 2020 (prefix LM).
    """
    total = attention_mask.shape[1]
    past = total - length
    if token_type_ids is None:
        token_type_ids = torch.full_like(attention_mask[:, past:], 1 if past else 0)
    key = torch.arange(total, device=attention_mask.device)
    query = key[past:, None]  # [L, 1]
    prefix = F.pad(token_type_ids == 0, (past, 0), value=True)[:, None, None, :]
    real = attention_mask.bool()[:, None, None, :]  # [B, 1, 1, S]
    # A padded query sees itself: a softmax over nothing would be 0/0.
    return real & (prefix | (key <= query)) | (key == query)  # [B, 1, L, S]


@dataclass
class PaliGemmaConfig:
    """Shape of the whole model; the defaults are PaliGemma 3B at 224 pixels.

    Source: Beyer et al. 2024 (PaliGemma); the published `config.json`.
    """

    vision_config: SiglipVisionConfig = field(default_factory=SiglipVisionConfig)
    text_config: GemmaConfig = field(default_factory=GemmaConfig)  # or a Gemma2Config
    image_token_index: int = 257152
    pad_token_id: int = 0
    eos_token_id: int = 1
    bos_token_id: int = 2
    name_or_path: str = ""  # where the weights came from


@dataclass
class PaliGemmaOutput:
    """What a forward pass returns: `logits` float32[B, L, V] and, with labels, the mean loss."""

    logits: torch.Tensor
    loss: torch.Tensor | None = None

    def __getitem__(self, index):
        """By number, the loss first where there is one: as in transformers."""
        return tuple(t for t in (self.loss, self.logits) if t is not None)[index]


class PaliGemmaProjector(nn.Module):
    """One linear layer from the vision tower's width to the language model's."""

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`float[B, N, D of vision]` → `float[B, N, D of text]`."""
        return self.linear(x)


def suffix_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each labelled token given what is before it, a scalar; 0 if none is.

    Args:
        logits: `float32[B, L, V]`.
        labels: `int64[B, L]`, -100 where nothing is to be learned; shifted here, once.
    """
    shift_logits, shift_labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = F.cross_entropy(shift_logits, shift_labels, ignore_index=-100, reduction="sum")
    return total / (shift_labels != -100).sum().clamp(min=1)


class PaliGemma(nn.Module):
    """A picture and a prompt in, the next token's logits out (PaliGemma paper, section 3)."""

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.config, text = config, config.text_config
        self.vision_tower = SiglipVisionModel(config.vision_config)
        self.multi_modal_projector = PaliGemmaProjector(config)
        self.language_model = (
            Gemma2Model(text) if isinstance(text, Gemma2Config) else GemmaModel(text)
        )

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`float[P, 3, H, W]` → `float[P, N, D]`, the vectors that stand for P pictures."""
        return self.multi_modal_projector(self.vision_tower(pixel_values.to(self.dtype)))

    def merge(self, input_ids: torch.Tensor, image_features: torch.Tensor | None) -> torch.Tensor:
        """One sequence of words, times √D, and of pictures, as they are: `float[B, L, D]`.

        Args:
            input_ids: `int64[B, L]`.
            image_features: `float[P, N, D]`; they fill the `<image>` tokens in order over the rows.

        Raises:
            ValueError: not exactly one `<image>` token for each vector.
        """
        is_image = input_ids == self.config.image_token_index  # [B, L]
        check_pictures(is_image, image_features)
        inputs_embeds = self.language_model.embed(input_ids.masked_fill(is_image, 0))  # [B, L, D]
        if image_features is None:
            return inputs_embeds
        return inputs_embeds.masked_scatter(
            is_image[..., None], image_features.to(inputs_embeds.dtype)
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        cache: KVCache | None = None,
        image_features: torch.Tensor | None = None,
        logits_to_keep: int | None = None,
    ) -> PaliGemmaOutput:
        """Logits for the new tokens, and the loss when there are labels.

        Args:
            input_ids: `int64[B, L]`, the new tokens.
            pixel_values: `float[P, 3, H, W]`, the pictures of the `<image>` tokens, in order over
                the rows; a row may hold several.
            attention_mask: `int64[B, S]`, 0 on padding, cached tokens and new ones; None: none.
            token_type_ids: `int64[B, L]`, 0 prefix, 1 suffix; None: prefix (suffix after a cache).
            labels: `int64[B, L]`, -100 where nothing is to be learned; not shifted.
            cache: from `make_cache`; gains the L tokens.
            image_features: `float[P, N, D]` from `encode_image`, instead of `pixel_values`.
            logits_to_keep: only the last so many positions get logits (and a loss); None: all.

        Returns:
            `PaliGemmaOutput`: logits `float32[B, L or logits_to_keep, V]`, loss a scalar or None.

        Raises:
            ValueError: tensors that do not fit, labels without types, a picture given twice, more
                tokens than `max_position_embeddings`.
        """
        past, length = 0 if cache is None else len(cache), input_ids.shape[1]
        all_see_all = (
            attention_mask is None and token_type_ids is None and (length == 1 or not past)
        )
        attention_mask = check_inputs(input_ids, past, attention_mask, token_type_ids, labels)
        check_context(past + length, self.config.text_config.max_position_embeddings)
        if pixel_values is not None:
            if image_features is not None:
                raise ValueError("got pixel_values and image_features; give one of them")
            image_features = self.encode_image(pixel_values)  # [P, N, D]
        if past and image_features is None:  # the picture is cached; a new <image> is a word
            x = self.language_model.embed(input_ids)
        else:
            x = self.merge(input_ids, image_features)  # [B, L, D]
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past:]  # [B, L]
        mask = None if all_see_all else prefix_lm_mask(attention_mask, token_type_ids, length)
        hidden = self.language_model(x, position_ids, mask, cache)  # [B, L, D]
        keep = min(logits_to_keep or length, length)
        logits = self.language_model.logits(hidden[:, -keep:])  # [B, keep, V]
        loss = None if labels is None else suffix_loss(logits, labels[:, -keep:])
        return PaliGemmaOutput(logits, loss)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.language_model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights and of the cache."""
        return self.language_model.embed_tokens.weight.dtype

    def make_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `batch_size` rows of up to `max_length` tokens, within the context."""
        c = self.config.text_config
        check_context(max_length, c.max_position_embeddings)
        shape = (batch_size, c.num_key_value_heads, max_length, c.head_dim)
        return KVCache(c.num_hidden_layers, *shape, self.device, self.dtype)
