"""What people pass; more refusals stand in tests/test_processor.py and tests/test_model.py."""

import numpy as np
import pytest
import torch

from paligemma.support.arguments import (
    as_lists,
    as_tensor,
    as_text,
    check_boxes,
    check_context,
    check_inputs,
    check_pictures,
    check_size,
    check_steps,
)


@pytest.mark.parametrize(
    ("given", "groups"),
    [
        (("a", "p"), [["a"]]),
        ((["a"], "p"), [["a"]]),
        (("a", ["p"]), [["a"]]),
        ((["a", "b"], ["p", "q"]), [["a"], ["b"]]),
        ((("a", "b"), ("p", "q")), [["a"], ["b"]]),
        (([["a", "b"]], "p"), [["a", "b"]]),
        (([("a", "b"), "c"], ["p", "q"]), [["a", "b"], ["c"]]),
    ],
)
def test_one_or_many(given, groups):
    found, prompts, answers = as_lists(*given)
    assert found == groups and answers == []
    assert prompts == ["p", "q"][: len(groups)]
    assert as_lists(*given, ["x", "y"][: len(groups)])[2] == ["x", "y"][: len(groups)]


def test_the_given_lists_are_left_alone():
    images, prompts = [["a"], "b"], ["p", "q"]
    groups, texts, _ = as_lists(images, prompts)
    groups[0].append("c")
    texts.append("r")
    assert images == [["a"], "b"] and prompts == ["p", "q"]


@pytest.mark.parametrize("images", [[["a"], []], [[], ["a"]]])
def test_a_prompt_without_a_picture(images):
    with pytest.raises(ValueError, match=rf"prompt {images.index([])} has no picture"):
        as_lists(images, ["p", "q"])


@pytest.mark.parametrize("past", [0, 3])
def test_no_mask_is_a_mask_of_ones_and_a_mask_comes_back_as_it_is(past):
    ids = torch.zeros(2, 4, dtype=torch.int64)
    types, mask = torch.ones_like(ids), torch.zeros(2, past + 4, dtype=torch.int64)
    made = check_inputs(ids, past, None, types, ids)
    assert made.dtype == torch.int64 and torch.equal(made, torch.ones(2, past + 4).long())
    assert check_inputs(ids, past, mask, None, None) is mask


@pytest.mark.parametrize("name", ["attention_mask", "token_type_ids", "labels"])
@pytest.mark.parametrize("shape", [(2, 3), (2, 5), (1, 4), (4,)])
def test_a_tensor_that_does_not_fit_the_ids(name, shape):
    ids = torch.zeros(2, 4, dtype=torch.int64)
    given = {"attention_mask": None, "token_type_ids": ids, "labels": None}
    given[name] = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"{name} is .* expected \[2, 4\]"):
        check_inputs(ids, 0, **given)


def test_labels_need_types():
    ids = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="labels need token_type_ids"):
        check_inputs(ids, 0, None, None, ids)


def test_pictures_are_counted_over_all_rows():
    is_image = torch.tensor([[True, True, False], [True, True, True]])
    check_pictures(is_image, torch.zeros(5, 1, 8))
    check_pictures(~is_image & is_image, None)
    for features in (None, torch.zeros(2, 2, 8), torch.zeros(2, 3, 8)):
        with pytest.raises(ValueError, match=r"hold 5 <image> tokens .* same Processor"):
            check_pictures(is_image, features)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, None, "9"])
def test_a_limit_that_is_none(steps):
    with pytest.raises(ValueError, match=r"max_new_tokens is .* at least 1"):
        check_steps(steps, 1)


@pytest.mark.parametrize("eos", [1.0, True, None, [1]])
def test_an_end_that_is_none(eos):
    with pytest.raises(ValueError, match=r"eos_token_id is .* expected one token id"):
        check_steps(9, eos)


def test_limits_and_ends_that_are_right():
    for steps, eos in ((1, 1), (torch.tensor([7]).numpy()[0], -1)):
        check_steps(steps, eos)


def test_a_row_fits_the_context():
    check_context(8192, 8192)
    with pytest.raises(ValueError, match="8193 tokens; this model reads 8192 at most, 1 fewer"):
        check_context(8193, 8192)


def repr_short(value: object) -> str:
    return repr(value)[:20]


@pytest.mark.parametrize(
    "size", [None, "9", 0, -1, float("nan"), 10**400, [3], 2.5], ids=repr_short
)
def test_sizes(size):
    check_size(3, 4.5)
    check_size(3, np.float32(4), whole=True)
    for pair in ((size, 4), (4, size)):
        with pytest.raises(ValueError, match=r"the picture is .*; expected whole numbers"):
            check_size(*pair, whole=True)


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        (3, "boxes are 3"),
        ([3], "a box is 3; expected four"),
        (["abcd"], "a box is 'abcd'"),
        ([[1, 2, 3]], "a box is"),
        ([[1, 2, 3, 10**400]], "a box is"),
        ([[1, 2, 3, float("nan")]], "a box is"),
        ([[5, 2, 3, 4]], "inside out"),
    ],
    ids=repr_short,
)
def test_boxes(boxes, words):
    assert list(check_boxes(torch.tensor([[1, 2, 3, 4]]))) == [[1, 2, 3, 4]]
    with pytest.raises(ValueError, match=words):
        list(check_boxes(boxes))


@pytest.mark.parametrize("values", ["abc", None, [[1], [1, 2]], print, 10**400], ids=repr_short)
def test_tensors(values):
    assert as_tensor([[1, 2]], "codes").tolist() == [[1, 2]]
    with pytest.raises(ValueError, match=r"codes are .*; expected a tensor of numbers"):
        as_tensor(values, "codes")


def test_texts():
    assert as_text("\ud800\x00") == "\ud800\x00"
    with pytest.raises(ValueError, match="the text is None; expected a string"):
        as_text(None)
