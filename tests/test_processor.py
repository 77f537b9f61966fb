"""The layout of a batch: parity with transformers, any lengths, and files and inputs that lie."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import paligemma
from paligemma.image_processor import ImageProcessor
from paligemma.processor import Processor, collate
from paligemma.support.pictures import open_picture
from paligemma.tokenizer import Tokenizer

TINY = Path(paligemma.__file__).parent / "assets" / "tiny"
TEXTS = [
    ("caption en", "a cat and two dogs"),
    ("answer en how many cats are there?", "2"),
    ("detect cat ; dog", "<loc0008><loc0061><loc0960><loc0854> cat"),
    ("", "yes"),
]
INTEGERS = ("input_ids", "attention_mask", "token_type_ids", "labels")


def their_processor(path, size, patch):
    """`PaliGemmaProcessor` of transformers over a SentencePiece file."""
    from transformers import GemmaTokenizer, PaliGemmaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    ours = Tokenizer.from_pretrained(path)
    control = {
        f"{name}_token": ours.sp.id_to_piece(getattr(ours, f"{name}_id"))
        for name in ("pad", "eos", "bos")
    }
    tokenizer = GemmaTokenizer.from_pretrained(
        path, mask_token=None, padding_side="left", **control
    )
    added = [piece for piece, i in ours.added.items() if i >= ours.sp.get_piece_size()]
    tokenizer.add_tokens(added)  # where the file ends before them, as in some releases
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    images = SiglipImageProcessorPil(
        size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    images.image_seq_length = (size // patch) ** 2
    return PaliGemmaProcessor(images, tokenizer)


def theirs(path, images, texts, suffixes=True, size=112, patch=14):
    prompts, answers = map(list, zip(*texts, strict=True))
    return their_processor(path, size, patch)(
        images=images,
        text=[f"<image>{prompt}" for prompt in prompts],
        suffix=answers if suffixes else None,
        return_tensors="pt",
        padding=True,
    )


def reference():
    """The integers of one batch, made by transformers with the tokenizer that ships."""
    batch = theirs(TINY, [Image.new("RGB", (20, 10))] * len(TEXTS), TEXTS)
    return {name: batch[name] for name in INTEGERS}


@pytest.fixture(scope="module")
def tiny():
    return Processor.from_pretrained(TINY)


@pytest.fixture
def folder(tmp_path):
    """A copy of the shipped checkpoint's small files, to be spoilt."""
    for name in ("config.json", "preprocessor_config.json", "tokenizer.model"):
        shutil.copy(TINY / name, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def small(sentencepiece_file):
    """Over a tokenizer file without loc and seg; 9 image tokens."""
    return Processor(Tokenizer(sentencepiece_file), ImageProcessor(42), 9)


def pictures(count):
    return [Image.new("RGB", (20 + i, 10), (i, 40, 90)) for i in range(count)]


# ------------------------------------------------------------------ parity


def test_agrees_with_transformers(tiny):
    random = np.random.default_rng(0)
    images = [
        Image.fromarray(random.integers(0, 256, (50, 30 + i, 3), dtype=np.uint8))
        for i in range(len(TEXTS))
    ]
    expected = theirs(TINY, images, TEXTS)
    prompts, answers = map(list, zip(*TEXTS, strict=True))
    ours = tiny(images, prompts, answers)
    for name in INTEGERS:
        assert torch.equal(ours[name], expected[name]), name
    torch.testing.assert_close(ours["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-6)


def test_agrees_with_transformers_where_the_file_lacks_loc_and_seg(sentencepiece_file, small):
    texts = [("detect cat ; dog", "<loc0001><loc1023><seg127> cat"), ("how many", "two")]
    expected = theirs(sentencepiece_file.parent, pictures(2), texts, size=42)
    ours = small(pictures(2), *map(list, zip(*texts, strict=True)))
    for name in INTEGERS:
        assert torch.equal(ours[name], expected[name]), name


def test_agrees_with_transformers_without_answers(tiny):
    expected = theirs(TINY, pictures(len(TEXTS)), TEXTS, suffixes=False)
    ours = tiny(pictures(len(TEXTS)), [prompt for prompt, _ in TEXTS])
    assert set(ours) == {"pixel_values", "input_ids", "attention_mask", "token_type_ids"}
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(ours[name], expected[name]), name


def test_several_pictures_agree_with_transformers(tiny):
    """Also of unequal number: `<image>` tokens of all, then bos; the pictures flat, in order."""
    a, b, c, d, e = pictures(5)
    groups, prompts, answers = [[a, b], [c], [d, e, a]], ["caption en", "more?", ""], ["x", "", "y"]
    expected = their_processor(TINY, 112, 14)(
        images=groups,
        text=["<image>" * len(group) + prompt for group, prompt in zip(groups, prompts)],
        suffix=answers,
        return_tensors="pt",
        padding=True,
    )
    ours = tiny([[a, b], c, (d, e, a)], prompts, answers)
    for name in INTEGERS:
        assert torch.equal(ours[name], expected[name]), name
    assert ours["pixel_values"].shape == (6, 3, 112, 112)
    torch.testing.assert_close(ours["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-6)


# ------------------------------------------------------------------ the layout


def test_the_row_is_what_the_paper_says(small):
    t = small.tokenizer
    row = small(pictures(1), "detect cat", "<loc0003> cat")["input_ids"][0].tolist()
    image, rest = row[:9], row[9:]
    assert image == [t.image_id] * 9
    prompt, answer = t.sp.encode("detect cat"), t.sp.encode(" cat")
    loc = t.sp.get_piece_size() + 3
    assert rest == [2, *prompt, t.newline_id, loc, *answer, 1]


def test_several_pictures_are_one_prompt_with_more_places(small):
    batch = small([pictures(2)], "cat")
    t, ids = small.tokenizer, batch["input_ids"][0].tolist()
    assert ids == [t.image_id] * 18 + [t.bos_id, *t.encode("cat"), t.newline_id]
    assert ids == small.encode_prefix("cat", 2) == small.encode_prefix("cat", num_images=2)
    alone = torch.cat([small(picture, "cat")["pixel_values"] for picture in pictures(2)])
    assert torch.equal(batch["pixel_values"], alone)
    one = small([pictures(1)], "cat")
    assert all(torch.equal(one[k], v) for k, v in small(pictures(1), "cat").items())


def test_a_newline_of_the_prompt_stays_apart(tmp_path):
    """Gemma has pieces of several newlines; prompt and newline must not merge into one."""
    import sentencepiece as spm

    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["cat dog bee"] * 9),
        model_writer=out,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["\n", "\n\n"],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    (tmp_path / "tokenizer.model").write_bytes(out.getvalue())
    processor = Processor(Tokenizer.from_pretrained(tmp_path), ImageProcessor(14), 1)
    tokenizer = processor.tokenizer
    assert len(tokenizer.encode("\n\n")) == 1, "a tokenizer that would merge"
    for prompt in ("cat\n", "cat\n\n", "\n", " ", "cat "):
        ids = processor.encode_prefix(prompt)
        assert ids[2:] == [*tokenizer.encode(prompt), tokenizer.newline_id]


words = st.lists(
    st.sampled_from("cat dog bee ? ; <loc0001> <seg007> how many 你好 ♥ \n".split(" ")), max_size=8
).map(" ".join)
lengths = st.lists(st.tuples(words, words), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None)
@given(texts=lengths)
def test_every_row_of_a_batch_is_the_row_alone(small, texts):
    """Unequal lengths: cut the padding off and the row made alone is left, in each tensor."""
    prompts, answers = map(list, zip(*texts, strict=True))
    batch = small(pictures(len(texts)), prompts, answers)
    longest = batch["input_ids"].shape[1]
    assert all(batch[name].dtype == torch.int64 for name in INTEGERS)
    assert batch["attention_mask"].sum(1).max() == longest, "no column is padding everywhere"
    for i, (prompt, answer) in enumerate(texts):
        alone = small(pictures(len(texts))[i], prompt, answer)
        length = alone["input_ids"].shape[1]
        assert alone["attention_mask"].all()
        for name in INTEGERS:
            assert torch.equal(batch[name][i, longest - length :], alone[name][0]), name
        padding = {name: set(batch[name][i, : longest - length].tolist()) for name in INTEGERS}
        assert padding["input_ids"] <= {0} and padding["labels"] <= {-100}
        assert padding["attention_mask"] <= {0} and padding["token_type_ids"] <= {0}
        torch.testing.assert_close(batch["pixel_values"][i], alone["pixel_values"][0])


@settings(max_examples=30, deadline=None)
@given(texts=lengths)
def test_labels_are_the_answer_and_eos_in_place(small, texts):
    prompts, answers = map(list, zip(*texts, strict=True))
    batch = small(pictures(len(texts)), prompts, answers)
    for i, answer in enumerate(answers):
        labels, ids = batch["labels"][i], batch["input_ids"][i]
        wanted = [*small.tokenizer.encode(answer), small.tokenizer.eos_id]
        assert labels[labels != -100].tolist() == wanted
        assert labels[-len(wanted) :].tolist() == wanted, "at the end"
        assert torch.equal(labels[labels != -100], ids[labels != -100]), "not shifted"
        assert torch.equal(labels != -100, batch["token_type_ids"][i] == 1)


@settings(max_examples=30, deadline=None)
@given(texts=lengths)
def test_answers_do_not_change_the_prefix(small, texts):
    prompts, answers = map(list, zip(*texts, strict=True))
    asked = small(pictures(len(texts)), prompts)
    taught = small(pictures(len(texts)), prompts, answers)
    for i in range(len(texts)):
        real = taught["attention_mask"][i].bool() & (taught["token_type_ids"][i] == 0)
        prefix = asked["input_ids"][i][asked["attention_mask"][i].bool()]
        assert torch.equal(taught["input_ids"][i][real], prefix)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.lists(st.integers(0, 9), max_size=6), st.lists(st.integers(0, 9), max_size=6)),
        min_size=1,
        max_size=5,
    ),
    pad=st.integers(0, 9),
)
def test_collate_equals_plain_python(rows, pad):
    """Ids of any value, `pad` among them: what is real depends on length alone."""
    prefixes, suffixes = map(list, zip(*rows, strict=True))
    batch = collate(prefixes, suffixes, pad)
    longest = max(len(p) + len(s) for p, s in rows)
    for i, (p, s) in enumerate(rows):
        space = longest - len(p) - len(s)
        assert batch["input_ids"][i].tolist() == [pad] * space + p + s
        assert batch["attention_mask"][i].tolist() == [0] * space + [1] * len(p + s)
        assert batch["token_type_ids"][i].tolist() == [0] * (space + len(p)) + [1] * len(s)
        assert batch["labels"][i].tolist() == [-100] * (space + len(p)) + s


def test_collate_leaves_its_lists_alone():
    prefixes, suffixes = [[1, 2], [3]], [[4], [5, 6]]
    collate(prefixes, suffixes)
    assert prefixes == [[1, 2], [3]] and suffixes == [[4], [5, 6]]


@pytest.mark.parametrize(("prefixes", "suffixes"), [([], []), ([[1]], [[2], [3]]), ([], [[1]])])
def test_collate_refuses_other_numbers(prefixes, suffixes):
    with pytest.raises(ValueError, match=f"{len(prefixes)} prefixes and {len(suffixes)} suffixes"):
        collate(prefixes, suffixes)


# ------------------------------------------------------------------ what comes in


def test_one_or_many(small):
    alone = small(pictures(1)[0], "cat", "yes")
    for images, prompts, suffixes in (
        (pictures(1), ["cat"], ["yes"]),
        (tuple(pictures(1)), ("cat",), ("yes",)),
        (np.array(pictures(1)[0]), "cat", "yes"),
        ([np.array(pictures(1)[0])], "cat", ["yes"]),
    ):
        batch = small(images, prompts, suffixes)
        assert batch.keys() == alone.keys()
        assert all(torch.equal(batch[name], alone[name]) for name in alone)


@pytest.mark.parametrize("place", ["prompts", "suffixes"])
@pytest.mark.parametrize("control", ["<image>", "<bos>", "<eos>", "<pad>"])
def test_control_tokens_are_refused(small, place, control):
    texts = {"prompts": ["cat", "dog"], "suffixes": ["yes", "no"]}
    texts[place][1] = f"a {control} b"
    with pytest.raises(ValueError, match=rf"'{control}'.*processor"):
        small(pictures(2), **texts)


def test_what_only_looks_like_control_is_text(small):
    for text in ("< image>", "<IMAGE>", "<im", "image>", "<loc9999>"):
        assert small.tokenizer.image_id not in small.encode_prefix(text)[9:]


@pytest.mark.parametrize(
    ("images", "prompts", "suffixes", "words"),
    [
        (
            2,
            ["a"],
            None,
            r"2 pictures, 1 prompts; expected the same.*several pictures: \[\[a, b\]\]",
        ),
        (3, "a", None, r"3 pictures, 1 prompts.*the same for each: \[prompt\] \* 3"),
        (1, ["a", "b"], None, "1 pictures, 2 prompts"),
        (2, ["a", "b"], ["c"], "2 pictures, 2 prompts and 1 suffixes"),
        (2, ["a", "b"], [], "2 pictures, 2 prompts and 0 suffixes"),
        (2, ["a", "b"], "c", "2 pictures, 2 prompts and 1 suffixes"),
        (0, [], None, "0 pictures, 0 prompts.*at least one"),
        (0, [], [], "0 pictures, 0 prompts and 0 suffixes"),
    ],
)
def test_numbers_have_to_agree(small, images, prompts, suffixes, words):
    with pytest.raises(ValueError, match=words):
        small(pictures(images), prompts, suffixes)


@pytest.mark.parametrize("wrong", [None, 3, b"cat", ["cat", None], [["cat"]], {"cat": 1}])
def test_texts_that_are_none(small, wrong):
    with pytest.raises(ValueError, match=r"prompts: got .*expected a string or a list of strings"):
        small(pictures(1), wrong)
    if wrong is not None:
        with pytest.raises(ValueError, match=r"suffixes: got .*expected a string"):
            small(pictures(1), ["cat"], wrong)


def test_pictures_that_are_none(small):
    for wrong in (None, 3, [None], [[None]], [[pictures(2)]]):
        with pytest.raises(ValueError, match=r"got (NoneType|int|list); expected a path, a PIL"):
            small(wrong, "cat")
    with pytest.raises(ValueError, match=r"prompt 1 has no picture"):
        small([pictures(1), []], ["cat", "dog"])
    with pytest.raises(ValueError, match=r"prompt 0 has no picture"):
        small([[]], "cat")


# ------------------------------------------------------------------ decode


def test_decode_undoes_the_suffix(tiny):
    for _, answer in TEXTS:
        ids = tiny.encode_suffix(answer)
        assert tiny.decode(ids) == answer
        assert tiny.decode(torch.tensor([*ids, 0, 0])) == answer
        assert tiny.decode([*ids, *tiny.tokenizer.encode("more")]) == answer, "after eos"
    assert tiny.decode([]) == tiny.decode([1]) == ""


# ------------------------------------------------------------------ files


def test_reads_a_checkpoint(folder):
    processor = Processor.from_pretrained(folder)
    assert processor.num_image_tokens == 64 and processor.image_processor.size == 112
    assert processor.tokenizer.image_id == 2176
    (folder / "preprocessor_config.json").unlink()  # then the size is config.json's
    assert Processor.from_pretrained(str(folder)).image_processor.size == 112


def edit(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for name, value in changes.items():
        if name in ("image_size", "patch_size"):
            config["vision_config"][name] = value
        else:
            config[name] = value
    file.write_text(json.dumps(config))


def test_published_defaults(folder):
    """The published config.json leaves out what is usual."""
    (folder / "preprocessor_config.json").unlink()
    config = {"model_type": "paligemma", "vision_config": {"patch_size": 14}, "text_config": {}}
    (folder / "config.json").write_text(json.dumps(config | {"image_token_index": 2176}))
    processor = Processor.from_pretrained(folder)
    assert processor.num_image_tokens == 256 and processor.image_processor.size == 224
    config["vision_config"]["image_size"] = 448
    (folder / "config.json").write_text(json.dumps(config | {"image_token_id": 2176}))
    assert Processor.from_pretrained(folder).num_image_tokens == 1024


def test_home_directory(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    assert Processor.from_pretrained(f"~/{folder.name}").num_image_tokens == 64


def test_saved_and_read_again(folder, tiny):
    """With tokens that a fine-tune added; by us and by transformers."""
    (folder / "added_tokens.json").write_text(json.dumps({"<angle>": 2177}))
    processor = Processor.from_pretrained(folder)
    processor.image_processor = ImageProcessor(112, std=(0.4, 0.5, 0.6))
    processor.save_pretrained(folder / "new")
    shutil.copy(folder / "config.json", folder / "new")
    again = Processor.from_pretrained(folder / "new")
    assert again.image_processor == processor.image_processor
    ours = processor([pictures(2), pictures(1)], ["turn <angle>", "caption en"], ["<angle>", "a"])
    twice = again([pictures(2), pictures(1)], ["turn <angle>", "caption en"], ["<angle>", "a"])
    assert (ours["input_ids"] == 2177).sum() == 2
    assert all(torch.equal(ours[name], twice[name]) for name in ours)

    from transformers import GemmaTokenizer, PaliGemmaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    theirs = PaliGemmaProcessor(
        SiglipImageProcessorPil.from_pretrained(folder / "new"),
        GemmaTokenizer.from_pretrained(str(folder / "new")),
    )
    expected = theirs(
        images=[pictures(2), pictures(1)],
        text=["<image><image>turn <angle>", "<image>caption en"],
        suffix=["<angle>", "a"],
        return_tensors="pt",
        padding=True,
    )
    for name in (*INTEGERS, "pixel_values"):
        torch.testing.assert_close(ours[name], expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("text", ["", "{", "nope", "[" * 100_000])
def test_config_that_is_not_json(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        Processor.from_pretrained(folder)


def test_config_that_is_not_text(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ValueError, match="is not JSON"):
        Processor.from_pretrained(folder)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"'])
def test_config_that_is_no_object(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is .*expected a JSON object"):
        Processor.from_pretrained(folder)


@pytest.mark.parametrize("value", [[], None, 3])
def test_config_without_the_vision_tower(folder, value):
    edit(folder, vision_config=value)
    with pytest.raises(ValueError, match=r"config\.json: vision_config is .*expected an object"):
        Processor.from_pretrained(folder)


@pytest.mark.parametrize("name", ["image_size", "patch_size"])
@pytest.mark.parametrize("value", [0, -14, "112", 14.0, True, [112], {}])
def test_config_fields_that_cannot_be(folder, name, value):
    edit(folder, **{name: value})
    with pytest.raises(ValueError, match=rf"config\.json: .*{name} is .*positive whole number"):
        Processor.from_pretrained(folder)


@pytest.mark.parametrize("value", [-14, "112", 14.0, True, {}])
def test_image_tokens_that_cannot_be(folder, value):
    edit(folder, image_token_index=value)
    with pytest.raises(ValueError, match=r"config\.json: image_token_index is .*expected"):
        Processor.from_pretrained(folder)


def test_patches_have_to_fit(folder):
    edit(folder, patch_size=15)
    with pytest.raises(ValueError, match="image_size 112 is not a multiple of patch_size 15"):
        Processor.from_pretrained(folder)


def test_files_of_different_checkpoints(folder):
    edit(folder, image_token_index=257152)
    with pytest.raises(ValueError, match=r"token 257152, tokenizer\.model makes it 2176"):
        Processor.from_pretrained(folder)
    edit(folder, image_token_index=0)
    with pytest.raises(ValueError, match=r"token 0, tokenizer\.model makes it 2176"):
        Processor.from_pretrained(folder)
    edit(folder, image_token_index=2176, image_size=224)
    with pytest.raises(ValueError, match=r"resizes to 112 pixels, config\.json expects 224"):
        Processor.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model"])
def test_missing_files(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        Processor.from_pretrained(folder)


def test_more_tokens_than_rows(folder):
    """64 rows after <loc> and <seg>: <image>, and 63 that a fine-tune may use."""
    tokens = {f"<x{i}>": 2177 + i for i in range(63)}
    (folder / "added_tokens.json").write_text(json.dumps(tokens))
    assert len(Processor.from_pretrained(folder).tokenizer) == 2240
    (folder / "added_tokens.json").write_text(json.dumps(tokens | {"<y>": 2240}))
    with pytest.raises(ValueError, match=r"ids up to 2240, the embedding of config.json 2240 rows"):
        Processor.from_pretrained(folder)


def test_no_such_folder(tmp_path):
    with pytest.raises(ValueError, match=r"no directory .*nowhere"):
        Processor.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no config\.json in"):
        Processor.from_pretrained(tmp_path)


# ------------------------------------------------------------------ nothing has been lost


PIXEL = Image.new("RGB", (1, 1))


def bomb(folder):
    Image.new("1", (100, 100)).save(folder / "bomb.png")
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 5000
    try:
        open_picture(folder / "bomb.png")
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def half(folder, opened):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(
        folder / "x.png"
    )
    data = (folder / "x.png").read_bytes()
    (folder / "x.png").write_bytes(data[: len(data) // 2])
    with Image.open(folder / "x.png") as image:
        open_picture(image if opened else folder / "x.png")


def tokenizer_of(folder, data):
    (folder / "tokenizer.model").write_bytes(data)
    Tokenizer.from_pretrained(folder)


def pictures_as(folder, **settings):
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    ImageProcessor.from_pretrained(folder)


def config_as(folder, text):
    (folder / "config.json").write_text(text)
    Processor.from_pretrained(folder)


def config_with(folder, **changes):
    edit(folder, **changes)
    Processor.from_pretrained(folder)


# The refusals of the three modules before care moved to support (of a model file: test_tokenizer).
FIRST_REFUSALS = {
    "0 × 5 pixels: it is empty": lambda f: open_picture(Image.new("RGB", (0, 5))),
    "nowhere does not exist; give the path of an image file": lambda f: open_picture(f / "nowhere"),
    "is a directory; give the path of an image file": lambda f: open_picture(f),
    "is not a regular file; give the path of an image file": lambda f: open_picture("/dev/null"),
    "has more than 5,000 pixels; make it smaller .*if you trust it": bomb,
    "not a picture that Pillow can read; convert it to PNG": lambda f: open_picture(__file__),
    "cannot be decoded .*; is it complete": lambda f: half(f, opened=False),
    "the given PIL.Image cannot be decoded": lambda f: half(f, opened=True),
    r"array float64\[4, 4, 3\]; expected uint8\[H, W, 3\]": lambda f: open_picture(
        np.ones((4, 4, 3))
    ),
    r"got int; expected a path, a PIL.Image or a uint8\[H, W, 3\]": lambda f: open_picture(7),
    "the list of pictures is empty; give at least one": lambda f: ImageProcessor(8)([]),
    "size is 0; expected a side in pixels such as 224": lambda f: ImageProcessor(0),
    "resample is 9; expected one of Pillow's filters": lambda f: ImageProcessor(8, resample=9),
    "image_mean is 1; expected three numbers": lambda f: ImageProcessor(8, mean=1),
    "image_std is .* divides, so none may be 0": lambda f: ImageProcessor(8, std=(0, 1, 1)),
    "preprocessor_config.json: do_resize is false": lambda f: pictures_as(f, do_resize=False),
    "asks to crop or pad; PaliGemma squashes": lambda f: pictures_as(f, do_pad=True),
    "rescale_factor is 1; expected 1/255": lambda f: pictures_as(f, rescale_factor=1),
    "expected a square, height equal to width": lambda f: pictures_as(f, size={"height": 2}),
    "preprocessor_config.json: size is '8'; expected": lambda f: pictures_as(f, size="8"),
    "no tokenizer at .*needs its tokenizer.model": lambda f: Tokenizer(f / "other.model"),
    "is not a SentencePiece model; expected the published": lambda f: tokenizer_of(f, b"no"),
    "the text is int; expected a string": lambda f: Tokenizer.from_pretrained(f).encode(7),
    "contains '<eos>', which only": lambda f: Tokenizer.from_pretrained(f).encode("<eos>"),
    "half of a surrogate pair": lambda f: Tokenizer.from_pretrained(f).encode("\ud83d"),
    "id -100 is negative; drop the -100": lambda f: Tokenizer.from_pretrained(f).decode([-100]),
    "got 0 prefixes and 1 suffixes": lambda f: collate([], [[1]]),
    "config.json is not JSON": lambda f: config_as(f, "{"),
    r"config.json is \[\]; expected a JSON object": lambda f: config_as(f, "[]"),
    "image_size is 0; .*positive whole number": lambda f: config_with(f, image_size=0),
    "112 is not a multiple of patch_size 15": lambda f: config_with(f, patch_size=15),
    "token 7, tokenizer.model makes it 2176": lambda f: config_with(f, image_token_index=7),
    "resizes to 112 pixels, config.json expects 224": lambda f: config_with(f, image_size=224),
    "prompts: got 7; expected a string or": lambda f: Processor.from_pretrained(f)(PIXEL, 7),
    "got 1 pictures, 2 prompts": lambda f: Processor.from_pretrained(f)(PIXEL, ["a", "b"]),
}


@pytest.mark.parametrize("words", FIRST_REFUSALS)
def test_each_refusal_of_the_first_version_is_still_there(folder, words):
    with pytest.raises(ValueError, match=words) as caught:
        FIRST_REFUSALS[words](folder)
    assert "\n" not in str(caught.value), "one line"
