"""Lists of added tokens as releases write them; with a tokenizer: tests/test_tokenizer.py."""

import json

import pytest
from sentencepiece import SentencePieceProcessor

from paligemma.support.tokens import check_text, place_tokens, read_added_tokens, token_files


def test_no_lists(tmp_path):
    assert read_added_tokens(tmp_path) == ({}, set())


def test_lists_are_joined(tmp_path):
    (tmp_path / "added_tokens.json").write_text('{"<a>": 10, "<b>": 11}')
    entries = {"11": {"content": "<b>"}, "12": {"content": "<c>", "lstrip": True}}
    config = {"added_tokens_decoder": entries, "bos_token": "<bos>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    listed = [{"id": 13, "content": "<d>"}, {"id": 10, "content": "<a>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": listed}))
    tokens = {"<a>": 10, "<b>": 11, "<c>": 12, "<d>": 13}
    assert read_added_tokens(tmp_path) == (tokens, {"<c>"})


@pytest.mark.parametrize("before", [{}, {"first": {"added_tokens": 5}}])
def test_only_the_list_of_a_large_file_is_parsed(tmp_path, before):
    """What follows the list is not looked at, nor is another thing of that name before it."""
    listed = [{"id": 13, "content": "<ä>"}]
    text = json.dumps({**before, "added_tokens": listed, "model": {"a": 1}}, indent=2)
    (tmp_path / "tokenizer.json").write_text(text)
    assert read_added_tokens(tmp_path)[0] == {"<ä>": 13}
    (tmp_path / "tokenizer.json").write_text(text[:-4])
    assert read_added_tokens(tmp_path)[0] == {"<ä>": 13}


def test_places_and_files(sentencepiece_file, tmp_path):
    sp = SentencePieceProcessor(model_file=str(sentencepiece_file))
    size = sp.get_piece_size()
    added, image = place_tokens(sp, ["<l0>", "<l1>"], "<image>", sentencepiece_file)
    assert (added, image) == ({"<l0>": size, "<l1>": size + 1}, size + 2)
    files = token_files(sp, added | {"<image>": image}, "<image>")
    assert files["added_tokens.json"] == {"<l0>": size, "<l1>": size + 1, "<image>": size + 2}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert read_added_tokens(tmp_path)[0] == added | {"<image>": image}
    assert place_tokens(sp, ["<l0>", "<l1>"], "<image>", tmp_path / "x") == (added, image)


def test_texts():
    check_text("a <b> c", ("<eos>",))
    with pytest.raises(ValueError, match="contains '<eos>', which only the processor may place"):
        check_text("a <eos>", ("<eos>",))
