"""Small random PaliGemma models of transformers, which many tests compare with."""

import torch

IMAGE_TOKENS, IMAGE_ID = 16, 500
KINDS = {"MHA": 4, "GQA": 2, "MQA": 1}  # key/value heads for 4 query heads


WINDOW = 12  # of the random PaliGemma 2: fewer than its image tokens


def reference_config(kv_heads: int = 1, gemma2: bool = False):
    """A PaliGemma of some 100,000 parameters: 56-pixel pictures, 16 image tokens, 512 words.

    With `gemma2` a PaliGemma 2: a query scale, caps that bite and a window shorter than the prompt.
    """
    from transformers import PaliGemmaConfig

    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
        "vision_use_head": False,
    }
    text = {
        "model_type": "gemma",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "head_dim": 16,
        "vocab_size": 512,
    }
    if gemma2:
        text |= {"model_type": "gemma2", "query_pre_attn_scalar": 11, "sliding_window": WINDOW}
        text |= {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    return PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        projection_dim=48,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )


def reference_model(kv_heads: int = 1, seed: int = 0, gemma2: bool = False):
    """transformers' PaliGemma with random weights of a size at which logits spread."""
    from transformers import PaliGemmaForConditionalGeneration

    torch.manual_seed(seed)
    model = PaliGemmaForConditionalGeneration(reference_config(kv_heads, gemma2)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            scale = 0.1 if weight.dim() == 1 else weight.shape[-1] ** -0.5
            weight.copy_(torch.randn_like(weight) * scale)
    return model


def random_batch(rows: int = 3, text: int = 12, padding: tuple = (0, 3, 5), seed: int = 1) -> dict:
    """Pictures and left-padded prompts of unequal length for the models above."""
    generator = torch.Generator().manual_seed(seed)
    length = IMAGE_TOKENS + text
    input_ids = torch.zeros(rows, length, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row in range(rows):
        pad = padding[row % len(padding)]
        input_ids[row, pad : pad + IMAGE_TOKENS] = IMAGE_ID
        words = torch.randint(3, 480, (text - pad,), generator=generator)
        input_ids[row, pad + IMAGE_TOKENS :] = words
        attention_mask[row, pad:] = 1
    pixel_values = torch.rand(rows, 3, 56, 56, generator=generator) * 2 - 1
    return {
        "input_ids": input_ids,
        "pixel_values": pixel_values,
        "attention_mask": attention_mask,
    }
