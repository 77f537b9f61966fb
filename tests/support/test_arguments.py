"""What people pass, as lists of equal length; the refusals stand in tests/test_processor.py."""

import pytest

from paligemma.support.arguments import as_lists


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
