"""The pipeline and the command: every option, every mistake in one line, nothing heavy."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import paligemma
from paligemma.checkpoint import load_model, save_model
from paligemma.inference import (
    SMALL,
    TINY,
    Options,
    Pipeline,
    find_checkpoint,
    find_codec,
    load,
    main,
    task_prompt,
)
from paligemma.processor import Processor
from paligemma.quantization import save_quantized
from paligemma.segmentation import MaskCodec
from paligemma.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
SCENE = TINY.parent / "pictures" / "scene.png"
CAPTION = "a cat and two dogs"
PROMPTS = {"caption": "caption en", "count": "answer en how many dogs are there?"}


def reference() -> dict[str, torch.Tensor]:
    """What transformers answers with the shipped weights, from picture files to ids."""
    from sentencepiece import SentencePieceProcessor
    from transformers import PaliGemmaForConditionalGeneration
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    model = PaliGemmaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    pictures = SiglipImageProcessorPil.from_pretrained(TINY)
    sp = SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
    image_id, layout = model.config.image_token_id, model.config.text_config.num_image_tokens
    tensors = {}
    for name in ("scene", "scene2", "scene3"):
        with Image.open(SCENE.with_name(f"{name}.png")) as file:
            pixels = pictures(file.convert("RGB"), return_tensors="pt")["pixel_values"]
        for task, prompt in PROMPTS.items():
            words = [2, *sp.encode(prompt), *sp.encode("\n")]
            ids = torch.tensor([[image_id] * layout + words])
            out = model.generate(
                input_ids=ids,
                pixel_values=pixels,
                attention_mask=torch.ones_like(ids),
                token_type_ids=torch.zeros_like(ids),
                max_new_tokens=20,
                do_sample=False,
                eos_token_id=1,
                pad_token_id=0,
            )
            tensors[f"{name}_{task}"] = out[0, ids.shape[1] :]
    return tensors


@pytest.fixture(scope="module")
def pg():
    return load()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, sentencepiece_file):
    """A checkpoint as people have them: weights written by transformers, and a tokenizer.model."""
    from random_models import reference_config
    from transformers import PaliGemmaForConditionalGeneration

    path = tmp_path_factory.mktemp("checkpoint")
    tokenizer = Tokenizer(sentencepiece_file)
    config = reference_config()
    config.image_token_index = config.image_token_id = tokenizer.image_id
    config.text_config.vocab_size = -(-len(tokenizer) // 64) * 64
    torch.manual_seed(3)
    PaliGemmaForConditionalGeneration(config).save_pretrained(path)
    shutil.copy(sentencepiece_file, path / "tokenizer.model")
    return path


def run(capsys, *arguments):
    """Exit code, standard output and standard error of the command."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def program(*arguments, **options):
    """The command as a process of its own."""
    command = [sys.executable, "-m", "paligemma.inference", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=120, **options)


# ---------------------------------------------------------------- the object


@pytest.mark.parametrize(
    "image",
    [
        SCENE,
        str(SCENE),
        Image.open(SCENE).convert("RGB"),
        np.array(Image.open(SCENE).convert("RGB")),
        Image.open(SCENE).convert("RGBA"),
    ],
    ids=["Path", "str", "PIL", "array", "RGBA"],
)
def test_answers_any_kind_of_picture(pg, image):
    assert pg(image, "caption en") == CAPTION


def test_a_folder_written_by_transformers_answers_as_transformers(folder):
    from transformers import PaliGemmaForConditionalGeneration

    own = load(folder)
    model = PaliGemmaForConditionalGeneration.from_pretrained(folder).eval()
    prompt = "answer en how many cat are there"
    batch = own.processor(SCENE, prompt)
    out = model.generate(
        input_ids=batch["input_ids"],
        pixel_values=batch["pixel_values"],
        attention_mask=batch["attention_mask"],
        token_type_ids=batch["token_type_ids"],
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=1,
        pad_token_id=0,
    )
    expected = own.processor.decode(out[0, batch["input_ids"].shape[1] :])
    assert own(SCENE, prompt, max_new_tokens=16) == expected


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 4}], ids=["greedy", "drawn"])
def test_pieces_join_to_what_is_returned(pg, options):
    for prompt in ("caption en", "", "answer en 🐝 <loc0001>"):
        pieces = list(pg.stream(SCENE, prompt, **options))
        assert "".join(pieces) == pg(SCENE, prompt, **options)
        assert all(pieces)


def test_batch_equals_singles(pg):
    images = [SCENE.with_name(f"{name}.png") for name in ("scene", "scene2", "scene3", "scene")]
    prompts = ["caption en", "answer en how many bees are there?", "", "caption en"]
    assert pg.batch(images, prompts) == [pg(i, p) for i, p in zip(images, prompts)]
    assert pg.batch(tuple(images), prompts, max_new_tokens=1) == [
        pg(i, p, max_new_tokens=1) for i, p in zip(images, prompts)
    ]


def test_a_seed_repeats_and_none_differs(pg):
    def draw(seed):
        return pg(SCENE, "caption en", temperature=3.0, seed=seed, max_new_tokens=8)

    assert draw(0) == draw(0)
    assert len({draw(seed) for seed in range(5)}) > 1
    assert len({draw(None) for _ in range(5)}) > 1
    images, prompts = [SCENE] * 2, ["caption en"] * 2
    options = {"temperature": 3.0, "seed": 1, "max_new_tokens": 8}
    drawn = [pg.batch(images, prompts, **options) for _ in range(2)]
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[0][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 0}, "top_k is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is"),
        ({"seed": 0.5}, "seed is 0.5"),
    ],
)
def test_options_are_refused_before_the_first_piece(pg, options, message):
    with pytest.raises(ValueError, match=message):
        pg.stream(SCENE, "caption en", **options)  # not even iterated over
    with pytest.raises(ValueError, match=message):
        pg.batch([SCENE], ["caption en"], **options)


def test_other_mistakes_are_refused_at_once(pg):
    with pytest.raises(ValueError, match="does not exist"):
        pg.stream("nowhere.png", "caption en")
    with pytest.raises(ValueError, match="'<image>'"):
        pg.stream(SCENE, "<image>caption en")
    with pytest.raises(ValueError, match="2 pictures, 1 prompts"):
        pg.batch([SCENE, SCENE], ["caption en"])
    with pytest.raises(TypeError, match="temprature"):
        pg.stream(SCENE, "caption en", temprature=1)


def test_options_have_the_documented_defaults():
    assert vars(Options()) == {
        "max_new_tokens": 100,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": None,
        "seed": None,
    }


def test_a_stopped_stream_leaves_the_model_as_it_was(pg):
    pieces = pg.stream(SCENE, "caption en")
    first = next(pieces)
    pieces.close()
    assert CAPTION.startswith(first)
    assert pg(SCENE, "caption en") == CAPTION
    assert not torch.is_inference_mode_enabled()


# ---------------------------------------------------------------- boxes

BOXES = "<loc0514><loc0050><loc0788><loc0343> cat ; <loc0263><loc0406> dog"


@pytest.fixture
def writes_boxes(monkeypatch):
    """Every model answers with one good box and one cut off, and finds each token 80 % likely."""

    def steps(model, input_ids, log_probs=None, eos_token_id=1, **_):
        for token in [*Tokenizer(TINY / "tokenizer.model").encode(BOXES), eos_token_id]:
            log_probs.append(torch.tensor([0.8]).log())
            yield torch.tensor([token])

    monkeypatch.setattr("paligemma.inference.generate_steps", steps)


def test_detect_gives_boxes_of_the_given_picture(pg, writes_boxes):
    wide = Image.new("RGB", (1023, 200))
    (detection,) = pg.detect(wide, "cat ; dog")
    assert detection.label == "cat" and detection.score == pytest.approx(0.8)
    assert detection.box == pytest.approx((50, 514 / 1023 * 200, 343, 788 / 1023 * 200))


def test_detect_reads_whatever_the_shipped_model_says(pg):
    for detection in pg.detect(SCENE, "cat ; dog"):
        x0, y0, x1, y1 = detection.box
        assert 0 <= x0 < x1 <= 448 and 0 <= y0 < y1 <= 448 and 0 <= detection.score <= 1


@pytest.mark.parametrize(
    ("what", "prompt"),
    [
        ("cat", "detect cat"),
        ("cat;dog ;", "detect cat ; dog"),
        (" detect cat ; dog", "detect cat ; dog"),
    ],
)
def test_names_are_laid_out_as_in_training(what, prompt):
    assert task_prompt("detect", what) == prompt


@pytest.mark.parametrize("what", ["", " ; ", "detect", "detect ", None])
def test_nothing_named_is_refused(pg, what):
    with pytest.raises(ValueError, match="names nothing to detect"):
        pg.detect(SCENE, what)


def test_detect_on_the_command_line(capsys, tmp_path, writes_boxes):
    file = tmp_path / "boxes.png"
    task = ("--image_file_path", SCENE, "--task", "detect", "--prompt", "cat ; dog")
    assert run(capsys, *task, "--output", file) == (0, "cat\t0.80\t22 225 150 345\n", "")
    scene, drawn = (Image.open(f).convert("RGB") for f in (SCENE, file))
    changed = (np.asarray(scene) != np.asarray(drawn)).any(axis=2)
    assert drawn.size == scene.size and changed[226, 60] and not changed[300, 80]
    code, out, err = run(capsys, *task, "--json")
    assert (code, err) == (0, "")
    box = {"label": "cat", "score": 0.8, "box": [21.9, 225.09, 150.21, 345.09]}
    assert json.loads(out) == {"prompt": "detect cat ; dog", "detections": [box]}


def test_detect_needs_names(capsys):
    code, out, err = run(capsys, "--image_file_path", SCENE, "--task", "detect")
    assert (code, out) == (2, "") and "names nothing to detect" in err and err.count("\n") == 1


# ---------------------------------------------------------------- masks

MASKS = (
    "<loc0000><loc0000><loc1023><loc0511>" + "".join(f"<seg{i:03d}>" for i in range(16)) + " cat"
    " ; <loc0000><loc0000><loc1023><loc0511><seg001> dog"
)


class HalfCodec(MaskCodec):
    """Draws the left half of every box."""

    def decode(self, codes):
        drawn = torch.full((len(codes), 64, 64), -1.0)
        drawn[..., :32] = 1
        return drawn


@pytest.fixture
def writes_masks(monkeypatch):
    def steps(model, input_ids, log_probs=None, eos_token_id=1, **_):
        for token in [*Tokenizer(TINY / "tokenizer.model").encode(MASKS), eos_token_id]:
            log_probs.append(torch.tensor([0.8]).log())
            yield torch.tensor([token])

    monkeypatch.setattr("paligemma.inference.generate_steps", steps)


@pytest.fixture
def halves(pg):
    return Pipeline(pg.model, pg.processor, HalfCodec(width=8, code_width=8))


def test_segment_gives_masks_of_the_given_picture(halves, writes_masks):
    (segment,) = halves.segment(Image.new("RGB", (1023, 200)), "cat")
    assert segment.label == "cat" and segment.score == pytest.approx(0.8)
    assert segment.box == pytest.approx((0, 0, 511, 200))
    assert segment.mask.shape == (200, 1023)
    assert segment.mask[:, :255].all() and not segment.mask[:, 257:].any()


def test_segment_needs_a_codec(pg):
    with pytest.raises(ValueError, match=r"no mask codec; put vae-oid\.npz"):
        Pipeline(pg.model, pg.processor).segment(SCENE, "cat")


def test_a_codec_beside_the_weights_is_found(tmp_path):
    assert find_codec(tmp_path) is None
    MaskCodec(width=8, code_width=8).save_pretrained(tmp_path)
    assert isinstance(find_codec(tmp_path), MaskCodec)


def test_segment_on_the_command_line(capsys, tmp_path, writes_masks, halves, monkeypatch):
    from pycocotools.mask import decode, frPyObjects

    monkeypatch.setattr("paligemma.inference.load", lambda *_, **__: halves)
    picture = tmp_path / "masks.png"
    task = ("--image_file_path", SCENE, "--task", "segment", "--prompt", "cat")
    code, out, _ = run(capsys, *task, "--output", picture)
    label, score, box, pixels = out.split("\t")
    assert (code, label, score) == (0, "cat", "0.80") and len(box.split()) == 4
    _, out, _ = run(capsys, *task, "--json")
    (found,) = json.loads(out)["segments"]
    mask = decode(frPyObjects(found["mask"], *found["mask"]["size"]))
    assert mask.sum() == int(pixels) == (mask[:, : mask.shape[1] // 2]).sum() > 0
    with Image.open(picture) as drawn, Image.open(SCENE) as plain:
        assert drawn.size == plain.size and drawn.tobytes() != plain.convert("RGB").tobytes()


# ---------------------------------------------------------------- fewer bits


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_weights_answer_and_come_back(pg, tmp_path, mode, capsys):
    small = load(quantize=mode)
    assert small.model.dtype == torch.bfloat16
    assert small(SCENE, "caption en") == pg(SCENE, "caption en")
    for file in ("tokenizer.model", "preprocessor_config.json"):
        shutil.copy(TINY / file, tmp_path)
    save_quantized(small.model, tmp_path)
    assert load(tmp_path)(SCENE, "caption en") == pg(SCENE, "caption en")
    with pytest.raises(ValueError, match=f"was quantised with mode '{mode}'"):
        load(tmp_path, quantize="int8" if mode == "int4" else "int4")
    code, out, err = run(capsys, "--image_file_path", SCENE, "--quantize", mode)
    assert (code, out) == (0, pg(SCENE, "caption en") + "\n") and not err


# ---------------------------------------------------------------- a picture looked at once


def test_an_encoded_picture_gives_the_same_answers(pg, monkeypatch):
    once, prompts = pg.encode(SCENE), list(PROMPTS.values())
    looked = []
    tower = type(pg.model.vision_tower)
    monkeypatch.setattr(tower, "forward", lambda *_: looked.append(1))
    answers = [pg(once, prompt) for prompt in prompts]
    together = pg.batch([once, once], prompts)
    found = pg.detect(once, "cat")
    monkeypatch.undo()
    assert not looked
    assert answers == [pg(SCENE, prompt) for prompt in prompts] == together
    assert [d.box for d in found] == [d.box for d in pg.detect(SCENE, "cat")]
    mixed = pg.batch([once, SCENE.with_name("scene2.png")], prompts)
    assert mixed == [pg(SCENE, prompts[0]), pg(SCENE.with_name("scene2.png"), prompts[1])]


def test_encoded_pictures_and_prompts_must_be_as_many(pg):
    once = pg.encode(SCENE)
    with pytest.raises(ValueError, match="2 pictures, 1 prompts"):
        pg.batch([once, once], ["caption en"])
    assert pg.encode(once) is once


# ---------------------------------------------------------------- loading


def test_small_checkpoints_compute_in_float32_large_as_stored(tmp_path, monkeypatch):
    stored = load_model(TINY, dtype=None).dtype
    assert stored == torch.bfloat16
    assert load().model.dtype == torch.float32
    assert load(dtype=torch.float16).model.dtype == torch.float16
    size = (TINY / "model.safetensors").stat().st_size
    for limit, dtype in ((size, torch.float32), (size - 1, stored)):
        monkeypatch.setattr("paligemma.inference.SMALL", limit)
        assert load().model.dtype == dtype
    assert SMALL == 10**9


def test_loads_what_save_model_writes(tmp_path, pg):
    save_model(pg.model, tmp_path)
    for name in ("tokenizer.model", "preprocessor_config.json"):
        shutil.copy(TINY / name, tmp_path)
    assert load(tmp_path)(SCENE, "caption en") == CAPTION
    assert load(str(tmp_path))(SCENE, "caption en") == CAPTION


def test_a_loaded_model_is_in_evaluation_mode(pg):
    assert not any(module.training for module in pg.model.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantize": "int2"}, "expected None, 'int8' or 'int4'"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16'; expected such as torch.float32"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
        ({"path": "no/such/folder"}, "no directory no/such/folder"),
        ({"path": "weights.bin"}, "no directory weights.bin"),
        ({"path": ROOT / "tests"}, "no config.json"),
    ],
)
def test_loading_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        load(**arguments)


def test_a_hub_name_is_fetched(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(TINY)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load("some-owner/some.model-3b")(SCENE, "caption en") == CAPTION
    patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.npz"]
    assert asked == {"some-owner/some.model-3b": patterns}


def test_a_folder_wins_over_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    assert find_checkpoint("owner/name") == Path("owner/name")


def test_without_the_hub_or_its_package_the_message_says_so(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def fail(*_, **__):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=r"owner/name is no directory, and the hub .*: no$"):
        load("owner/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        load("owner/name")


def test_the_package_itself_offers_load():
    assert paligemma.load is load and paligemma.Pipeline is Pipeline
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = paligemma.lode


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "flags",
    [
        ["--image_file_path", SCENE],
        ["--image-file-path", SCENE],
        [f"--image-file-path={SCENE}"],
        ["--image_file_path", SCENE, "--prompt", "caption en"],
        ["--image_file_path", SCENE, "--model_path", TINY],
        ["--image_file_path", SCENE, "--model-path", TINY, "--task", "answer"],
        ["--image_file_path", SCENE, "--max_tokens_to_generate", "50"],
        ["--image_file_path", SCENE, "--only_cpu"],
        ["--image_file_path", SCENE, "--only_cpu", "False"],
        ["--image_file_path", SCENE, "--only-cpu=true", "--seed", "1"],
        ["--image_file_path", SCENE, "--do_sample", "False", "--temperature", "5"],
        ["--image_file_path", SCENE, "--do-sample", "no"],
        ["--image_file_path", SCENE, "--temperature", "9", "--top_p", "1"],  # greedy all the same
        ["--image_file_path", SCENE, "--do_sample", "--temperature", "0"],
        ["--image_file_path", SCENE, "--do_sample", "--top_p", "0.0001", "--temperature", "1"],
    ],
    ids=lambda flags: " ".join(str(f) for f in flags[2:]) or str(flags[0])[:18],
)
def test_greedy_command_lines_print_the_caption(capsys, flags):
    assert run(capsys, *flags) == (0, CAPTION + "\n", "")


def test_max_tokens_cut_the_answer(capsys, pg):
    for n in (1, 3):
        code, out, _ = run(capsys, "--image_file_path", SCENE, "--max-tokens-to-generate", n)
        assert (code, out) == (0, pg(SCENE, "caption en", max_new_tokens=n) + "\n")
        assert out.strip() != CAPTION


@pytest.mark.parametrize("flag", [["--do_sample"], ["--do_sample", "True"], ["--do-sample=1"]])
def test_sampling_options_reach_the_model(capsys, pg, flag):
    more = ["--temperature", "3", "--top_p", "0.95", "--seed", "7"]
    code, out, _ = run(capsys, "--image_file_path", SCENE, *flag, *more)
    expected = pg(SCENE, "caption en", temperature=3.0, top_p=0.95, seed=7)
    assert (code, out) == (0, expected + "\n")
    assert expected != CAPTION, "choose another seed: this one says the same as greedy"
    default = pg(SCENE, PROMPTS["count"], temperature=0.8, top_p=0.9, seed=5)
    arguments = ["--image_file_path", SCENE, "--prompt", PROMPTS["count"], *flag, "--seed", "5"]
    assert run(capsys, *arguments) == (0, default + "\n", "")


def test_json_is_one_object(capsys):
    code, out, err = run(capsys, "--image_file_path", SCENE, "--json")
    assert (code, err) == (0, "") and out.count("\n") == 1
    assert json.loads(out) == {"prompt": "caption en", "answer": CAPTION}


def test_values_that_look_like_flags_stay_values(capsys, pg):
    prompt = "--do-sample"
    code, out, _ = run(capsys, "--image_file_path", SCENE, f"--prompt={prompt}", "--json")
    assert code == 0
    assert json.loads(out) == {"prompt": prompt, "answer": pg(SCENE, prompt)}


def test_help_and_version(capsys):
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    for option in ("image_file_path", "prompt", "model_path", "max_tokens_to_generate", "seed"):
        assert f"--{option}" in out
    for option in ("temperature", "top_p", "do_sample", "only_cpu", "quantize", "output", "json"):
        assert f"--{option}" in out
    assert max(map(len, out.splitlines())) <= 100
    assert run(capsys, "--version") == (0, f"paligemma {paligemma.__version__}\n", "")


MISTAKES = {
    "no picture": ([], "required: --image_file_path"),
    "missing picture": (["--image_file_path", "nowhere.png"], "nowhere.png does not exist"),
    "line break in a name": (["--image_file_path", "no\nwhere.png"], "no where.png does not exist"),
    "directory": (["--image_file_path", "."], "is a directory"),
    "no picture inside": (["--image_file_path", "notes.txt"], "not a picture"),
    "half a picture": (["--image_file_path", "half.png"], "cannot be decoded"),
    "no such model": (["--model_path", "nowhere"], "no directory nowhere"),
    "empty model": (["--model_path", "empty"], "empty"),
    "temperature": (["--temperature", "hot"], "invalid float value: 'hot'"),
    "low temperature": (["--temperature", "-1", "--do_sample"], "temperature is -1.0"),
    "unused temperature": (["--temperature", "-1"], "temperature is -1.0"),
    "nan": (["--temperature", "nan"], "temperature is nan"),
    "top_p": (["--top_p", "0"], "top_p is 0.0"),
    "high top_p": (["--top_p", "90"], "top_p is 90.0"),
    "no tokens": (["--max_tokens_to_generate", "0"], "max_new_tokens is 0"),
    "half a token": (["--max_tokens_to_generate", "2.5"], "invalid int value"),
    "seed": (["--seed", "-3"], "seed is -3"),
    "huge seed": (["--seed", "9" * 30], "seed is 999"),
    "boolean": (["--do_sample", "maybe"], "'maybe' is neither True nor False"),
    "control token": (["--prompt", "<image> caption en"], "'<image>'"),
    "output folder": (["--output", "nowhere/out.png"], "its directory does not exist"),
    "output is a folder": (["--output", "empty"], "it is a directory"),
    "output format": (["--output", "out.xyz"], "no picture format"),
    "no output format": (["--output", "out"], "no picture format"),
    "quantize": (["--quantize", "int2"], "invalid choice: 'int2'"),
    "task": (["--task", "dance"], "invalid choice: 'dance'"),
    "unknown": (["--verbose"], "unrecognized arguments: --verbose"),
    "abbreviated": (["--temp", "1"], "unrecognized arguments: --temp"),
    "left over": (["photo.jpg"], "unrecognized arguments: photo.jpg"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_2(capsys, tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("hello")
    Path("half.png").write_bytes(SCENE.read_bytes()[:5000])
    Path("empty").mkdir()
    flags, message = MISTAKES[mistake]
    if flags and "--image_file_path" not in flags:
        flags = ["--image_file_path", SCENE, *flags]
    code, out, err = run(capsys, *flags)
    assert (code, out) == (2, "")
    assert err.startswith("paligemma: error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert message in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "half.png", "notes.txt"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--image_file_path", "nowhere.png"],
        ["--temperature", "-1"],
        ["--top_p", "2"],
        ["--max_tokens_to_generate", "0"],
        ["--seed", "-1"],
        ["--output", "nowhere/x.png"],
        ["--output", "x.xyz"],
    ],
)
def test_cheap_checks_come_before_the_weights(capsys, monkeypatch, flags):
    def refuse(*_, **__):
        raise AssertionError("loaded the weights first")

    monkeypatch.setattr("paligemma.inference.load_model", refuse)
    if "--image_file_path" not in flags:
        flags = ["--image_file_path", SCENE, *flags]
    assert run(capsys, *flags)[0] == 2


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("paligemma.inference.load_model", fail)
    with pytest.raises(ZeroDivisionError):
        main(["--image_file_path", str(SCENE)])


def test_a_full_gpu_is_said_in_one_line(capsys, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("paligemma.inference.load_model", fail)
    code, out, err = run(capsys, "--image_file_path", SCENE)
    assert (code, out) == (1, "")
    assert err == "paligemma: error: the GPU's memory is full; try --only_cpu\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_seen_before_the_weights(capsys, tmp_path):
    tmp_path.chmod(0o500)
    code, out, err = run(capsys, "--image_file_path", SCENE, "--output", tmp_path / "out.png")
    tmp_path.chmod(0o700)
    assert (code, out) == (2, "") and "read-only" in err


# ---------------------------------------------------------------- the written picture


@pytest.mark.parametrize("name", ["out.png", "out.jpg", "out.WEBP"])
def test_output_is_the_picture_with_its_answer(capsys, tmp_path, name):
    code, out, err = run(capsys, "--image_file_path", SCENE, "--output", tmp_path / name)
    assert (code, out, err) == (0, CAPTION + "\n", "")
    assert [p.name for p in tmp_path.iterdir()] == [name], "nothing else is left behind"
    with Image.open(tmp_path / name) as written, Image.open(SCENE) as scene:
        assert written.width == scene.width and written.height > scene.height
        top = np.asarray(written.convert("RGB"))[: scene.height].astype(int)
        close = np.abs(top - np.asarray(scene.convert("RGB"))).mean()
        assert close <= (0 if name == "out.png" else 6)
        strip = np.asarray(written.convert("L"))[scene.height :]
        assert strip.min() < 100 < strip.max(), "the answer is written below"


def test_a_failed_write_keeps_the_old_file(capsys, tmp_path, monkeypatch):
    file = tmp_path / "out.png"
    file.write_text("precious")

    def half(self, target, *_, **__):
        Path(target).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", half)
    code, out, err = run(capsys, "--image_file_path", SCENE, "--output", file)
    assert (code, out) == (2, CAPTION + "\n")
    assert "cannot write" in err and "disk full" in err and err.count("\n") == 1
    assert file.read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]


# ---------------------------------------------------------------- as processes


def test_the_module_streams_answers_and_nothing_else(folder):
    done = program("--image_file_path", SCENE, "--model_path", folder, "--prompt", "cat dog")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == load(folder)(SCENE, "cat dog") + "\n"
    assert done.stderr == b""


@pytest.mark.parametrize("sent", [b"", b"no picture", SCENE.read_bytes()[:5000]], ids=len)
def test_no_picture_comes_through_a_pipe(capsys, monkeypatch, sent):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(sent)))
    code, out, err = run(capsys, "--image_file_path", "-")
    assert (code, out) == (2, "")
    assert err.startswith("paligemma: error: ") and err.count("\n") == 1


def test_inference_py_is_the_same_command_and_reads_a_pipe(tmp_path):
    command = [sys.executable, ROOT / "inference.py", "--image_file_path", "-"]
    options = {"capture_output": True, "cwd": tmp_path, "timeout": 120}
    done = subprocess.run(command, input=SCENE.read_bytes(), **options)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{CAPTION}\n".encode(), b"")
    done = subprocess.run(command, input=b"no picture", **options)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"paligemma: error: what came on standard input is not a picture\n"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_launch_script_works_and_takes_a_model(tmp_path, folder):
    script = ROOT / "launch_inference.sh"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    options = {"capture_output": True, "timeout": 120, "text": True, "env": environment}
    done = subprocess.run(["bash", script], cwd=tmp_path, **options)
    assert (done.returncode, done.stdout, done.stderr) == (0, CAPTION + "\n", "")
    changed = script.read_text().replace('MODEL_PATH=""', f'MODEL_PATH="{folder}"')
    changed = changed.replace('cd "$(dirname "$0")"', f'cd "{ROOT}"')
    (tmp_path / "mine.sh").write_text(changed)
    done = subprocess.run(["bash", tmp_path / "mine.sh"], **options)
    picture = ROOT / "paligemma" / "assets" / "pictures" / "scene.png"
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == load(folder)(picture, "caption en") + "\n"


ENDLESS = """
import sys, time
from paligemma import inference
def pieces(*_, **__):
    for n in range(1000):
        yield "word "
        time.sleep(0.02)
inference.Pipeline.stream = pieces
sys.exit(inference.main(sys.argv[1:]))
"""


def endless():
    """The command with a model that does not stop talking."""
    command = [sys.executable, "-c", ENDLESS, "--image_file_path", str(SCENE)]
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A shell that runs the tests in the background lets its children ignore Ctrl-C.
    heed = (lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) if os.name == "posix" else None
    return subprocess.Popen(command, env=buffered, preexec_fn=heed, **pipes)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_ends_quietly_with_130():
    process = endless()
    assert process.stdout.read(5) == b"word "  # it streams: this came long before the end
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")


def test_a_closed_pipe_is_quiet():
    process = endless()
    assert process.stdout.read(5) == b"word "
    process.stdout.close()
    began = time.monotonic()
    err = process.stderr.read()
    process.wait(timeout=60)
    process.stderr.close()
    assert (process.returncode, err) == (0, b"")
    assert time.monotonic() - began < 15, "it went on talking to nobody"


def test_import_is_light():
    """`import paligemma` brings nothing; load() neither drawing, nor the reference, nor a hub."""
    code = """
import sys
import paligemma
assert "torch" not in sys.modules and "paligemma.inference" not in sys.modules
pg = paligemma.load()
pg(sys.argv[1], "caption en")
heavy = "matplotlib transformers huggingface_hub PIL.ImageShow PIL.ImageTk scipy pandas IPython"
print(*(name for name in heavy.split() if name in sys.modules))
"""
    command = [sys.executable, "-c", code, str(SCENE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("\n", "")


def test_the_processor_reads_the_shipped_folder():
    assert Processor.from_pretrained(TINY).num_image_tokens == 64
