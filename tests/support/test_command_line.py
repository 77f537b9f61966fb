"""The command: every option, every mistake in one line, several pictures, nothing heavy."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import paligemma
from paligemma.inference import TINY, load
from paligemma.support.command_line import main
from paligemma.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
SCENE = TINY.parent / "pictures" / "scene.png"
CAPTION = "a cat and two dogs"
COUNT = "answer en how many dogs are there?"


@pytest.fixture(scope="module")
def pg():
    return load()


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
    command = [sys.executable, "-m", "paligemma", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=120, **options)


@pytest.fixture
def folder(tmp_path):
    """Three pictures, one that is none, and other files."""
    for name in ("scene", "scene2", "scene3"):
        shutil.copy(SCENE.with_name(f"{name}.png"), tmp_path)
    (tmp_path / "scene2b.jpg").write_text("no picture")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / ".hidden.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    return tmp_path


CAPTIONS = {
    "scene.png": CAPTION,
    "scene2.png": "a bee and a tulip",
    "scene3.png": "a rocket and two balloons",
}


# ---------------------------------------------------------------- one picture


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
    options = {"temperature": 3.0, "top_p": 0.95}
    drawn = {seed: pg(SCENE, "caption en", **options, seed=seed) for seed in range(9)}
    seed, expected = next((s, text) for s, text in drawn.items() if text != CAPTION)
    more = ["--temperature", "3", "--top_p", "0.95", "--seed", seed]
    assert run(capsys, "--image_file_path", SCENE, *flag, *more) == (0, expected + "\n", "")
    default = pg(SCENE, COUNT, temperature=0.8, top_p=0.9, seed=5)
    arguments = ["--image_file_path", SCENE, "--prompt", COUNT, *flag, "--seed", "5"]
    assert run(capsys, *arguments) == (0, default + "\n", "")


def test_json_is_one_object(capsys):
    code, out, err = run(capsys, "--image_file_path", SCENE, "--json")
    assert (code, err) == (0, "") and out.count("\n") == 1
    assert json.loads(out) == {"image": str(SCENE), "prompt": "caption en", "answer": CAPTION}


def test_values_that_look_like_flags_stay_values(capsys, pg):
    prompt = "--do-sample"
    code, out, _ = run(capsys, "--image_file_path", SCENE, f"--prompt={prompt}", "--json")
    assert code == 0
    assert json.loads(out) == {"image": str(SCENE), "prompt": prompt, "answer": pg(SCENE, prompt)}


def test_help_and_version(capsys):
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    for option in ("image_file_path", "prompt", "model_path", "max_tokens_to_generate", "seed"):
        assert f"--{option}" in out
    for option in ("temperature", "top_p", "do_sample", "only_cpu", "quantize", "output", "json"):
        assert f"--{option}" in out
    assert "--adapter" in out and "--task {answer,detect,segment}" in out
    assert max(map(len, out.splitlines())) <= 100
    assert run(capsys, "--version") == (0, f"paligemma {paligemma.__version__}\n", "")


MISTAKES = {
    "no picture": ([], "required: --image_file_path"),
    "missing picture": (["--image_file_path", "nowhere.png"], "nowhere.png does not exist"),
    "line break in a name": (
        ["--image_file_path", "no\nwhere.png"],
        r"no\nwhere.png does not exist",
    ),
    "directory": (["--image_file_path", "empty"], "is a directory without pictures"),
    "long name": (["--image_file_path", "n" * 300 + ".png"], "does not exist"),
    "no picture inside": (["--image_file_path", "notes.txt"], "not a picture"),
    "half a picture": (["--image_file_path", "half.png"], "cannot be decoded"),
    "an address": (["--model_path", "https://example.org/x"], "download it first"),
    "no such model": (["--model_path", "nowhere"], "no directory 'nowhere'"),
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
    "left over": (["--seed", "1", "photo.jpg"], "unrecognized arguments: photo.jpg"),
    "line break": (["--verbose", "a\nb"], "unrecognized arguments: --verbose a b"),
    "a loop": (["--image_file_path", "loop"], "loop does not exist"),
    "a pipe": (["--image_file_path", "pipe"], "pipe is not a regular file"),
    "zeros without end": (["--image_file_path", "/dev/zero"], "is not a regular file"),
    "a path of 4,000 letters": (["--image_file_path", "n/" * 2000], "does not exist"),
    "a model that is a loop": (["--model_path", "loop"], "no directory 'loop'"),
    "config.json is a pipe": (["--model_path", "odd"], "no config.json in odd"),
    "a long model": (["--model_path", "n/" * 2000], "no directory 'n/n/"),
    "a long word": (["--task", "n" * 5000], "invalid choice: 'nnn"),
    "more than the context": (["--max_tokens_to_generate", "100000"], "this model reads 8192"),
    "a megabyte": (["--prompt", "a " * 65_000], "the text has"),
    "no adapter": (["--adapter", "nowhere"], "no directory 'nowhere'"),
    "adapter without files": (["--adapter", "empty"], "no adapter_config.json in empty"),
    "nothing to detect": (["--task", "detect"], "names nothing to detect"),
    "several into a file": (["--image_file_path", SCENE, SCENE, "--output", "x.png"], "make it"),
    "two of one name": (
        ["--image_file_path", SCENE, SCENE, "--output", "empty"],
        "two pictures would be written to empty/scene.png",
    ),
    "over themselves": (
        ["--image_file_path", SCENE, "half.png", "--output", "."],
        "half.png is one of the pictures",
    ),
}


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX files")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_2(capsys, tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("hello")
    Path("half.png").write_bytes(SCENE.read_bytes()[:5000])
    Path("empty").mkdir()
    Path("odd").mkdir()
    Path("loop").symlink_to("loop")
    for pipe in ("pipe", "odd/config.json"):
        os.mkfifo(pipe)
    flags, message = MISTAKES[mistake]
    if flags and "--image_file_path" not in flags:
        flags = ["--image_file_path", SCENE, *flags]
    code, out, err = run(capsys, *flags)
    assert (code, out) == (2, "")
    assert err.startswith("paligemma: error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert message in err
    assert len(err) < 450, "what was typed is not said in full"
    left = ["empty", "half.png", "loop", "notes.txt", "odd", "pipe"]
    assert sorted(p.name for p in tmp_path.iterdir()) == left


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


# ---------------------------------------------------------------- boxes and masks

BOXES = "<loc0514><loc0050><loc0788><loc0343> cat ; <loc0263><loc0406> dog"
SEGS = "".join(f"<seg{i:03d}>" for i in range(16))
MASKS = f"<loc0514><loc0050><loc0788><loc0343>{SEGS} cat ; <loc0000><loc0000><loc1023><seg001> dog"


def writes(text):
    """A model that answers with this text whatever it is asked, each token 80 % likely."""

    def steps(model, input_ids, pixel_values, mask, config, generator, features, log_probs):
        for token in [*Tokenizer(TINY / "tokenizer.model").encode(text), 1]:
            log_probs.append(torch.tensor([0.8]).log())
            yield torch.tensor([token])

    return steps


def test_detect_on_the_command_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("paligemma.inference.generate_steps", writes(BOXES))
    file = tmp_path / "boxes.png"
    task = ("--image_file_path", SCENE, "--task", "detect", "--prompt", "cat ; dog")
    assert run(capsys, *task, "--output", file) == (0, "cat\t0.80\t22 225 150 345\n", "")
    scene, drawn = (Image.open(f).convert("RGB") for f in (SCENE, file))
    changed = (np.asarray(scene) != np.asarray(drawn)).any(axis=2)
    assert drawn.size == scene.size and changed[226, 60] and not changed[300, 80]
    code, out, err = run(capsys, *task, "--json")
    assert (code, err) == (0, "")
    box = {"label": "cat", "score": 0.8, "box": [21.9, 225.09, 150.21, 345.09]}
    assert json.loads(out) == {
        "image": str(SCENE),
        "prompt": "detect cat ; dog",
        "detections": [box],
    }


def test_segment_on_the_command_line(capsys, tmp_path, monkeypatch):
    from pycocotools.mask import decode, frPyObjects

    monkeypatch.setattr("paligemma.inference.generate_steps", writes(MASKS))
    picture = tmp_path / "masks.png"
    task = ("--image_file_path", SCENE, "--task", "segment", "--prompt", "cat")
    code, out, _ = run(capsys, *task, "--output", picture)
    label, score, box, pixels = out.split("\t")
    assert (code, label, score) == (0, "cat", "0.80") and len(box.split()) == 4
    _, out, _ = run(capsys, *task, "--json")
    (found,) = json.loads(out)["segments"]
    mask = decode(frPyObjects(found["mask"], *found["mask"]["size"]))
    assert mask.sum() == int(pixels) > 0
    with Image.open(picture) as drawn, Image.open(SCENE) as plain:
        assert drawn.size == plain.size and drawn.tobytes() != plain.convert("RGB").tobytes()


def test_nothing_found_is_said_beside(capsys, monkeypatch):
    monkeypatch.setattr("paligemma.inference.generate_steps", writes("no box"))
    task = ["--image_file_path", SCENE, "--task", "detect", "--prompt", "cat"]
    assert run(capsys, *task) == (0, "", "nothing found\n")
    code, out, err = run(capsys, *task, "--json")
    assert (code, err) == (0, "") and json.loads(out)["detections"] == []


def test_the_adapter_and_the_bits_reach_load(capsys, monkeypatch, pg):
    given = {}
    monkeypatch.setattr(
        "paligemma.inference.load", lambda path, **how: given.update(how, path=path) or pg
    )
    flags = ["--adapter", "a/b", "--quantize", "int4", "--only_cpu", "--model-path", "c"]
    assert run(capsys, "--image_file_path", SCENE, *flags) == (0, CAPTION + "\n", "")
    progress = given.pop("progress")
    assert given == {
        "path": "c",
        "device": "cpu",
        "quantize": "int4",
        "adapter": "a/b",
        "compile": False,
    }
    assert progress is False
    run(capsys, "--image_file_path", SCENE)
    assert given["device"] == "auto" and given["adapter"] is None


def test_without_a_compiler_it_says_so_and_answers(capsys, monkeypatch):
    def compile(*args, **options):
        raise RuntimeError("no compiler\nmore about it")

    monkeypatch.setattr(torch, "compile", compile)
    code, out, err = run(capsys, "--image_file_path", SCENE, "--compile")
    assert (code, out) == (0, CAPTION + "\n")
    assert err == "paligemma: nothing can be compiled here, going on without: no compiler\n"


# ---------------------------------------------------------------- several pictures


def test_a_folder_gives_a_line_for_each_picture(capsys, folder):
    (folder / "scene2b.jpg").unlink()
    code, out, err = run(capsys, "--image_file_path", folder)
    assert (code, err) == (0, "")
    assert out == "".join(f"{folder / name}\t{text}\n" for name, text in CAPTIONS.items())
    code, out, err = run(capsys, "--image_file_path", folder, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "") and lines == [
        {"image": str(folder / name), "prompt": "caption en", "answer": text}
        for name, text in CAPTIONS.items()
    ]


@pytest.mark.parametrize("names", [["{}"], ["{}/scene.png", "{}/scene2b.jpg", "{}/scene2.png"]])
def test_a_picture_that_cannot_be_read_is_reported_and_passed_over(capsys, folder, names):
    names = [name.format(folder) for name in names]
    code, out, err = run(capsys, "--image_file_path", *names, folder / "none.png", "--json")
    answers = {
        Path(line["image"]).name: line["answer"] for line in map(json.loads, out.splitlines())
    }
    assert code == 1 and answers.items() <= CAPTIONS.items() and len(answers) >= 2
    bad, missing = err.splitlines()
    assert "scene2b.jpg is not a picture" in bad and "none.png does not exist" in missing
    assert bad.startswith("paligemma: ") and "error" not in bad


def test_nothing_that_can_be_read_loads_no_weights(capsys, folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("loaded the weights")

    monkeypatch.setattr("paligemma.inference.load_model", refuse)
    code, out, err = run(capsys, "--image_file_path", folder / "notes.txt", folder / "scene2b.jpg")
    assert (code, out, err.count("\n")) == (1, "", 2)


def test_the_weights_are_loaded_once(capsys, folder, monkeypatch):
    loads = []
    monkeypatch.setattr("paligemma.inference.load", lambda *a, **k: loads.append(1) or load())
    run(capsys, "--image_file_path", folder, folder / "scene.png")
    assert loads == [1]


def test_several_pictures_are_drawn_into_a_folder(capsys, folder, tmp_path_factory):
    drawn = tmp_path_factory.mktemp("drawn")
    task = ["--task", "detect", "--prompt", "cat ; bee ; rocket"]
    code, out, err = run(capsys, "--image_file_path", folder, *task, "--output", drawn)
    assert code == 1 and err.count("\n") == 1  # the picture that is none
    assert sorted(path.name for path in drawn.iterdir()) == sorted(CAPTIONS)
    for line in out.splitlines():
        name, _, score, box = line.split("\t")
        assert Path(name).name in CAPTIONS and 0 <= float(score) <= 1 and len(box.split()) == 4
    for name in CAPTIONS:
        with Image.open(drawn / name) as new, Image.open(folder / name) as old:
            assert new.size == old.size and new.tobytes() != old.convert("RGB").tobytes()


def test_a_bar_is_for_people(capsys, folder, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    code, out, _ = run(capsys, "--image_file_path", folder)
    assert code == 1 and out.count("\n") == 3
    assert "pictures: 100%" in terminal.getvalue() and "4/4" in terminal.getvalue()


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


@pytest.mark.parametrize(
    "door", [["-m", "paligemma"], ["-m", "paligemma.inference"], [ROOT / "inference.py"]], ids=str
)
def test_every_door_leads_to_the_command(tmp_path, door):
    command = [sys.executable, *door, "--image_file_path", SCENE, "--prompt", "caption en"]
    done = subprocess.run(command, capture_output=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{CAPTION}\n".encode(), b"")
    done = subprocess.run(command[:-2] + ["--no"], capture_output=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, b"") and done.stderr.count(b"\n") == 1


def test_the_installed_script_is_the_command():
    text = (ROOT / "pyproject.toml").read_text()
    assert '\npaligemma = "paligemma.support.command_line:main"\n' in text


@pytest.mark.parametrize("sent", [b"", b"no picture", SCENE.read_bytes()[:5000]], ids=len)
def test_no_picture_comes_through_a_pipe(capsys, monkeypatch, sent):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(sent)))
    code, out, err = run(capsys, "--image_file_path", "-")
    assert (code, out) == (2, "")
    assert err.startswith("paligemma: error: ") and err.count("\n") == 1


def test_a_bomb_comes_through_a_pipe(capsys, monkeypatch):
    """Both of Pillow's bounds: the one of its warning, and the one of its error."""
    plain = SCENE.read_bytes()
    for side in (10_000, 1_000_000):
        size = side.to_bytes(4, "big") * 2
        header = plain[12:16] + size + plain[24:29]
        bomb = plain[:12] + header + zlib.crc32(header).to_bytes(4, "big") + plain[33:]
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bomb)))
        code, out, err = run(capsys, "--image_file_path", "-")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "the picture on standard input has more than 89,478,485 pixels" in err


def test_standard_input_is_not_read_without_end(capsys, monkeypatch):
    class Endless(io.RawIOBase):
        given = 0

        def readable(self):
            return True

        def readinto(self, buffer):
            self.given += len(buffer)
            return len(buffer)

    monkeypatch.setattr("paligemma.support.picture_files.STANDARD_INPUT", 1 << 20)
    source = Endless()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(source)))
    code, out, err = run(capsys, "--image_file_path", "-")
    assert (code, out) == (2, "") and "standard input has more than 1 MiB" in err
    assert source.given < 1 << 22


def test_it_reads_a_pipe(tmp_path):
    command = [sys.executable, ROOT / "inference.py", "--image_file_path", "-"]
    options = {"capture_output": True, "cwd": tmp_path, "timeout": 120}
    done = subprocess.run(command, input=SCENE.read_bytes(), **options)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{CAPTION}\n".encode(), b"")
    done = subprocess.run(command, input=b"no picture", **options)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"paligemma: error: what came on standard input is not a picture\n"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_launch_script_works_and_takes_a_model(tmp_path):
    script = ROOT / "launch_inference.sh"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    options = {"capture_output": True, "timeout": 120, "text": True, "env": environment}
    done = subprocess.run(["bash", script], cwd=tmp_path, **options)
    assert (done.returncode, done.stdout, done.stderr) == (0, CAPTION + "\n", "")
    changed = script.read_text().replace('MODEL_PATH=""', f'MODEL_PATH="{tmp_path}/none"')
    changed = changed.replace('cd "$(dirname "$0")"', f'cd "{ROOT}"')
    (tmp_path / "mine.sh").write_text(changed)
    done = subprocess.run(["bash", tmp_path / "mine.sh"], **options)
    assert (done.returncode, done.stdout) == (2, "") and f"{tmp_path}/none" in done.stderr


ENDLESS = """
import sys, time
from paligemma import inference
from paligemma.support.command_line import main
def pieces(*_, **__):
    for n in range(1000):
        yield "word "
        time.sleep(0.02)
inference.Pipeline.stream = pieces
sys.exit(main(sys.argv[1:]))
"""


def start(code):
    """A process that asks about the scene, and heeds Ctrl-C."""
    command = [sys.executable, "-c", code, "--image_file_path", str(SCENE)]
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A shell that runs the tests in the background lets its children ignore Ctrl-C.
    heed = (lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) if os.name == "posix" else None
    return subprocess.Popen(command, env=buffered, preexec_fn=heed, **pipes)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_ends_quietly_with_130():
    process = start(ENDLESS)
    assert process.stdout.read(5) == b"word "  # it streams: this came long before the end
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")


def test_a_closed_pipe_is_quiet():
    process = start(ENDLESS)
    assert process.stdout.read(5) == b"word "
    process.stdout.close()
    began = time.monotonic()
    err = process.stderr.read()
    process.wait(timeout=60)
    process.stderr.close()
    assert (process.returncode, err) == (0, b"")
    assert time.monotonic() - began < 15, "it went on talking to nobody"


STARTING = """
import sys, time
class Slow:
    def find_spec(self, name, *_):
        if name == "paligemma.inference":
            print("importing", flush=True)
            try:
                time.sleep(60)
            except BaseException:  # as compiled modules do
                raise ImportError("half a module")
sys.meta_path.insert(0, Slow())
from paligemma.support.command_line import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_while_it_starts_is_silent():
    process = start(STARTING)
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("flags", "buffered"),
    [(["--help"], True), (["--help"], False), (["--image_file_path", str(SCENE)], True)],
)
def test_full_and_closed_outputs_are_one_line_or_none(flags, buffered):
    command = [sys.executable, "-m", "paligemma", *flags]
    environment = os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith(b"paligemma: error: standard output cannot be written")
    assert done.stderr.count(b"\n") == 1
    reader, writer = os.pipe()
    os.close(reader)  # nobody listens
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "code"),
    [
        (f"--image_file_path {SCENE} >&-", 0),
        ("--image_file_path nowhere.png 2>&-", 2),
        ("--image_file_path nowhere.png 2>/dev/full", 2),
        ("--image_file_path - <&-", 2),
    ],
)
def test_channels_may_be_missing(line, code):
    whole = ["bash", "-c", f"{sys.executable} -m paligemma {line}"]
    done = subprocess.run(whole, capture_output=True, timeout=120, cwd=ROOT)
    assert done.returncode == code and b"Traceback" not in done.stderr
    assert done.stderr.count(b"\n") <= 1


def test_what_a_console_cannot_print_is_written_out():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    french = program("--image_file_path", SCENE, "--prompt", "caption fr", env=environment)
    assert (french.returncode, french.stderr) == (0, b"")
    expected = load()(SCENE, "caption fr")
    assert not expected.isascii(), "the test wants an answer with accents"
    assert (
        french.stdout.decode("ascii").strip()
        == expected.encode("ascii", "backslashreplace").decode()
    )


def test_import_is_light(tmp_path):
    """`import paligemma` and `--help` bring nothing; answering neither matplotlib, nor the
    reference, nor a hub; drawing no matplotlib either."""
    code = """
import sys
import paligemma
assert "torch" not in sys.modules and "paligemma.inference" not in sys.modules
from paligemma.support.command_line import main
try:
    main(["--version"])
except SystemExit:
    pass
assert "torch" not in sys.modules and "PIL" not in sys.modules
common = ["--image_file_path", sys.argv[1], "--output", sys.argv[2]]
main(common)
main([*common, "--task", "segment", "--prompt", "cat"])
heavy = "matplotlib transformers huggingface_hub PIL.ImageShow PIL.ImageTk scipy pandas IPython"
print(*(name for name in heavy.split() if name in sys.modules), file=sys.stderr)
"""
    command = [sys.executable, "-c", code, str(SCENE), str(tmp_path / "out.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "\n")
