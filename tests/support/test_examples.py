"""Examples of one's own: the layouts of data sets, each line checked, nothing learnt and tested."""

import json
import os

import pytest
from PIL import Image

from paligemma.support.examples import find_examples, find_held_out, hold_out, read_examples

GOOD = {"image": "a.png", "prefix": "caption en", "suffix": "rot, süß"}
LINE = json.dumps(GOOD, ensure_ascii=False)


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    return tmp_path


def write(file, *lines):
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(lines or [LINE]), "utf-8")
    return file


# ---------------------------------------------------------------- which file

LAYOUTS = {  # files of a data set → the one to learn from, the one for the test
    "one file": (["mine.jsonl"], 0, None),
    "big_vision": (["data_train90.jsonl", "data_val10.jsonl"], 0, 1),
    "roboflow": (
        [f"_annotations.{split}.jsonl" for split in ("train", "valid", "test")], 0, 1,
    ),
    "roboflow, with its folder": (
        [f"dataset/_annotations.{split}.jsonl" for split in ("test", "train", "valid")], 1, 2,
    ),
    "maestro": ([f"{split}/annotations.jsonl" for split in ("train", "valid", "test")], 0, 1),
    "val": ([f"{split}/annotations.jsonl" for split in ("train", "val")], 0, 1),
    "no test": (["train/annotations.jsonl", "test/annotations.jsonl"], 0, None),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    names, train, held_out = LAYOUTS[layout]
    files = [write(tmp_path / name) for name in names]
    assert find_examples(tmp_path) == find_examples(str(tmp_path)) == files[train]
    assert find_examples(files[train]) == files[train], "a file is taken as it is given"
    assert find_held_out(files[train]) == (None if held_out is None else files[held_out])
    if held_out is not None:
        assert find_held_out(files[held_out]) is None, "never the file itself"


def test_no_file_or_several(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \*.jsonl"):
        find_examples(tmp_path)
    write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl")
    with pytest.raises(
        ValueError, match=r"holds 2 files \*.jsonl, \['a.jsonl', 'b.jsonl'\]; give one"
    ):
        find_examples(tmp_path)
    with pytest.raises(ValueError, match=r"there is no file .*none\.jsonl"):
        read_examples(tmp_path / "none.jsonl")


# ---------------------------------------------------------------- its lines


def test_lines(folder):
    """A mark at the start, Windows' line ends, empty lines and more keys are no mistakes."""
    more = json.dumps(GOOD | {"id": 7, "boxes": [1]})
    write(folder / "mine.jsonl", "\ufeff" + LINE + "\r", "", more, "  ")
    expected = GOOD | {"image": str(folder / "a.png")}
    assert read_examples(folder) == [expected] * 2


def test_an_empty_answer_is_one(folder):
    write(folder / "mine.jsonl", json.dumps(GOOD | {"suffix": ""}))
    assert read_examples(folder)[0]["suffix"] == ""


def test_pictures_lie_beside_the_file_or_where_it_says(folder):
    (folder / "in").mkdir()
    for name in ("../a.png", str(folder / "a.png")):
        file = write(folder / "in" / "mine.jsonl", json.dumps(GOOD | {"image": name}))
        (item,) = read_examples(file)
        assert os.path.samefile(item["image"], folder / "a.png")


def without(key):
    return json.dumps({k: v for k, v in GOOD.items() if k != key})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Expecting"),
        (LINE + LINE, "line 2: Extra data"),
        ("[1, 2]", r"line 2: it is \[1, 2\]; expected an object with image, prefix and suffix"),
        (without("image"), "line 2: it has no image; expected"),
        (without("suffix"), "line 2: it has no suffix; expected"),
        (without("prefix"), "line 2: it has no prefix; .* or give one prefix for all"),
        (json.dumps(GOOD | {"prefix": 7}), "line 2: prefix is 7; expected a string"),
        (json.dumps(GOOD | {"suffix": None}), "line 2: suffix is None; expected a string"),
        (json.dumps(GOOD | {"image": ["a.png"]}), r"line 2: image is \['a.png'\]; expected"),
        (json.dumps(GOOD | {"image": "b.png"}), "line 2: there is no picture .*b.png"),
        (json.dumps(GOOD | {"image": ""}), "line 2: there is no picture"),
        (json.dumps(GOOD | {"image": "a\0.png"}), "line 2: "),
        (json.dumps(GOOD | {"image": "x" * 5000}), "line 2: there is no picture"),
        (json.dumps(GOOD | {"suffix": ["x" * 5000]}), "line 2: suffix is"),
        ("[" * 100_000, "line 2"),
        ("1" * 5000, "line 2"),
    ],
)
def test_a_broken_line_is_named_by_its_number(folder, line, message):
    write(folder / "mine.jsonl", LINE, line)
    with pytest.raises(ValueError, match=message) as caught:
        read_examples(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_files_that_hold_no_examples(folder):
    file = write(folder / "a.jsonl", "")
    with pytest.raises(ValueError, match="holds no line; expected an object"):
        read_examples(folder)
    file.write_bytes(LINE.encode() + b"\n\xff\xfe{")
    with pytest.raises(ValueError, match="line 2: 'utf-8' codec can't decode"):
        read_examples(folder)


# ---------------------------------------------------------------- held out


def test_no_picture_is_learnt_and_tested():
    items = [{"image": f"{i % 20}.png", "prefix": str(i), "suffix": ""} for i in range(60)]
    learnt, tested = hold_out(items, 0.1)
    assert len(learnt) == 54 and len(tested) == 6, "two of twenty pictures, three examples each"
    assert not {x["image"] for x in learnt} & {x["image"] for x in tested}
    assert sorted(learnt + tested, key=items.index) == items
    assert hold_out(items, 0.1) == (learnt, tested) != hold_out(items, 0.1, seed=1)
    assert len(hold_out(items, 0.001)[1]) == 3, "one picture at least"


@pytest.mark.parametrize("share", [0, 1, -0.5, float("nan"), 0.99])
def test_shares_that_cannot_be_held_out(share):
    items = [{"image": f"{i}.png"} for i in range(4)]
    with pytest.raises(ValueError, match="of 4 pictures cannot be held out"):
        hold_out(items, share)
