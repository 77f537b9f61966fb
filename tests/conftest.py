"""Checkpoints and a tokenizer that many tests share."""

import io
import os

import pytest
from random_models import KINDS, reference_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict:
    """Directories written by transformers' `save_pretrained`: {"MHA": path, "GQA": …, "MQA": …}."""
    root = tmp_path_factory.mktemp("checkpoints")
    for kind, kv_heads in KINDS.items():
        reference_model(kv_heads).save_pretrained(root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(scope="session")
def gemma2_checkpoint(tmp_path_factory):
    """A directory written by transformers: a small PaliGemma 2 with two key/value heads."""
    path = tmp_path_factory.mktemp("checkpoints") / "gemma2"
    reference_model(2, gemma2=True).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory):
    """A small tokenizer.model without loc and seg pieces: pad 0, eos 1, bos 2, unk 3."""
    import sentencepiece as spm

    words = "cat dog bee answer caption detect segment en how many are there is a the two".split()
    sentences = [" ".join(words[i:] + words[:i]) for i in range(len(words))] * 20
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=out,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["\n"],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(out.getvalue())
    return file
