"""`paligemma-train`: what comes out loads everywhere, what stops goes on, mistakes are one line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from paligemma import load, scenes
from paligemma.inference import TINY
from paligemma.lora import adapters
from paligemma.quantization import quantize_model
from paligemma.support.quantized import save_quantized
from paligemma.support.train_command import main

ROOT = Path(__file__).resolve().parents[2]
LORA = ["--lora", "4", "--learning_rate", "5e-3"]
QUICK = ["--steps", "4", "--batch_size", "4", "--workers", "0", "--answers", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A folder of twelve pictures with a caption each."""
    folder = tmp_path_factory.mktemp("mine")
    lines, data = [], scenes.SceneDataset(12, tasks=("caption",), objects=(1,))
    for i in range(12):
        Image.fromarray(data[i]["image"]).save(folder / f"{i}.png")
        texts = {key: data[i][key] for key in ("prefix", "suffix")}
        lines.append(json.dumps({"image": f"{i}.png", **texts}))
    (folder / "mine.jsonl").write_text("\n".join(lines))
    return folder


def command(capsys, *options):
    """Exit code, standard output and standard error of the command."""
    try:
        code = main(list(map(str, options)))
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def logits(model):
    """What a model of the shipped one's shape says of a picture and an answer."""
    ids = torch.tensor([[*load().processor.encode_prefix("caption en"), 9, 8, 7]])
    pixels = torch.rand(1, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        return model(
            input_ids=ids, pixel_values=pixels, token_type_ids=torch.zeros_like(ids)
        ).logits


# ---------------------------------------------------------------- what comes out


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of peft
def test_an_adapter_that_paligemma_and_peft_load(capsys, mine, tmp_path):
    from peft import PeftModel
    from transformers import PaliGemmaForConditionalGeneration

    output = tmp_path / "new" / "run"
    code, out, _ = command(capsys, "--data", mine, "--output", output, *LORA, *QUICK)
    assert code == 0 and out.endswith(f"{output} holds the adapter\n")
    ours = load(adapter=output).model
    base = PaliGemmaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, output).eval()
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-4
    assert (logits(ours) - logits(load().model)).abs().max() > 0.1, "it has learnt something"
    assert load(output).model is not None, "the adapter names its base"
    found = json.loads((output / "training.json").read_text())
    assert len(found["losses"]) == 4 and found["after"]["loss"] < found["before"]["loss"]
    assert f"held out: loss {found['after']['loss']:.3f}" in out


def test_a_model_that_paligemma_and_transformers_load(capsys, mine, tmp_path):
    from transformers import PaliGemmaForConditionalGeneration

    options = ["--full", "--learning_rate", "1e-3", "--checkpointing", "--accumulate", "2"]
    code, out, _ = command(capsys, "--data", mine, "--output", tmp_path, *options, *QUICK)
    assert code == 0 and out.endswith(f"{tmp_path} holds the model\n")
    ours = load(tmp_path)
    theirs = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    assert (logits(ours.model) - logits(theirs)).abs().max() <= 1e-4
    assert ours.codec is not None, "masks go on"
    before = load().model.state_dict()
    assert all(not torch.equal(tensor, before[name])
               for name, tensor in ours.model.state_dict().items() if tensor.ndim > 1)  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "start", "middle"),
    [("--freeze_tower", "language_model.", ""), ("--attention_only", "language_model.", "attn")],
)
def test_recipes(capsys, mine, tmp_path, recipe, start, middle):
    """What is frozen is what it was, and some of what isn't has moved."""
    options = [recipe, "--learning_rate", "1e-2", "--held_out", "0"]
    code, out, _ = command(capsys, "--data", mine, "--output", tmp_path, *options, *QUICK)
    assert code == 0 and "held out" not in out and out.startswith("12 examples, ")
    before, after = (load(path).model.state_dict() for path in (None, tmp_path))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(moved) > 10 and all(n.startswith(start) and middle in n for n in moved)


@pytest.mark.parametrize("recipe", [LORA, ["--freeze_tower", "--learning_rate", "1e-3"]])
def test_bfloat16_with_masters_in_float32(capsys, mine, tmp_path, recipe, monkeypatch):
    from paligemma import training

    types, step = [], training.train_step

    def looked_at(model, *rest):
        types.append({(p.requires_grad, p.dtype) for p in model.parameters()})
        return step(model, *rest)

    monkeypatch.setattr(training, "train_step", looked_at)
    options = [*recipe, *QUICK, "--dtype", "bfloat16", "--checkpointing"]
    code, _, _ = command(capsys, "--data", mine, "--output", tmp_path, *options)
    assert code == 0 and types == [{(False, torch.bfloat16), (True, torch.float32)}] * 4
    found = json.loads((tmp_path / "training.json").read_text())
    assert found["after"]["loss"] < found["before"]["loss"]
    file = next(tmp_path.glob("*model.safetensors"))
    dtype = torch.float32 if recipe is LORA else torch.bfloat16
    assert {tensor.dtype for tensor in load_file(file).values()} == {dtype}
    assert load(tmp_path)(Image.new("RGB", (50, 50)), "caption en")


def test_a_file_for_the_test_and_one_prompt_for_all(capsys, mine, tmp_path):
    lines = [json.loads(line) for line in (mine / "mine.jsonl").read_text().split("\n")]
    for name, some in {"data_train9.jsonl": lines[:9], "data_val3.jsonl": lines[9:]}.items():
        rows = [{"image": str(mine / x["image"]), "suffix": x["suffix"]} for x in some]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    options = [*LORA, *QUICK, "--prefix", "caption en", "--output", tmp_path / "out"]
    code, out, _ = command(capsys, "--data", tmp_path, *options)
    assert code == 0 and "\n9 examples, " in out
    assert json.loads((tmp_path / "out/training.json").read_text())["after"]["examples"] == 3


# ---------------------------------------------------------------- stopped, and on

MORE = ["--steps", "24", "--batch_size", "2", "--save_every", "1", "--held_out", "0"]


def program(mine, output):
    options = [*LORA, *QUICK, *MORE, "--lora_dropout", "0.1", "--data", mine, "--output", output]
    words = [sys.executable, "-m", "paligemma.support.train_command", *map(str, options)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip


@pytest.fixture(scope="module")
def whole(mine, tmp_path_factory):
    """The folder of a run that nobody stopped."""
    output = tmp_path_factory.mktemp("whole")
    with program(mine, output) as running:
        assert running.wait() == 0, running.stderr.read()
    return output


@pytest.mark.parametrize("with_signal", ["SIGKILL", "SIGINT"])
def test_a_stopped_run_goes_on_to_the_same_end(mine, whole, tmp_path, with_signal):
    with program(mine, tmp_path) as running:
        while not (tmp_path / "checkpoint.pt").is_file() and running.poll() is None:
            time.sleep(0.01)
        running.send_signal(getattr(signal, with_signal))
        _, err = running.communicate()
    if with_signal == "SIGINT":
        assert running.returncode == 130 and err.endswith("of 24; the same command goes on\n")
    else:
        assert running.returncode == -signal.SIGKILL
    assert not (tmp_path / "adapter_config.json").exists(), "it was stopped on the way"
    with program(mine, tmp_path) as running:
        assert running.wait() == 0, running.stderr.read()
    for name in ("adapter_model.safetensors", "training.json", "adapter_config.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_run_that_has_ended_has_nothing_left_to_do(capsys, mine, tmp_path):
    options = ["--data", mine, "--output", tmp_path, *LORA, *QUICK]
    first, second = (command(capsys, *options) for _ in range(2))
    assert first == second and first[0] == 0


# ---------------------------------------------------------------- mistakes

MISTAKES = {
    "no recipe": ([], "one of the arguments --lora --full --freeze_tower --attention_only is"),
    "two": ([*LORA, "--full"], "not allowed with argument --lora"),
    "abbreviated": ([*LORA, "--learn", "1"], "unrecognized arguments: --learn"),
    "rank": (["--lora", "0"], "argument --lora: '0' is not a whole number from 1 to 1e+09"),
    "high rank": (["--lora", "500"], "rank 500 is not low for"),
    "rank of what": (["--lora", "four"], "'four' is not a whole number"),
    "alpha": ([*LORA, "--lora_alpha", "nan"], "'nan' is not a number from 0.001"),
    "dropout": ([*LORA, "--lora_dropout", "1"], "'1' is not a number from 0 to 0.99"),
    "targets": ([*LORA, "--lora_targets", "query"], "no linear layer is called 'query'"),
    "steps": ([*LORA, "--steps", "0"], "argument --steps: '0' is not a whole number from 1"),
    "both lengths": ([*LORA, "--epochs", "1", "--steps", "1"], "not allowed with argument"),
    "epochs": ([*LORA, "--epochs", "inf"], "'inf' is not a number from 0"),
    "batch": ([*LORA, "--batch_size", "13"], "--batch_size is 13; there are 11 examples"),
    "accumulate": ([*LORA, "--accumulate", "9"], "accumulate is 9, more parts than the 4 examples"),
    "rate 0": (["--lora", "4", "--learning_rate", "0"], "learning_rate is 0.0; expected a finite"),
    "rate": (["--lora", "4", "--learning_rate", "inf"], "'inf' is not a number from 0 to 10"),
    "share": ([*LORA, "--held_out", "1.5"], "'1.5' is not a number from 0 to 1"),
    "all": ([*LORA, "--held_out", "1"], "a share of 1.0 of 12 pictures cannot be held out"),
    "seed": ([*LORA, "--seed", "-1"], "'-1' is not a whole number from 0"),
    "workers": ([*LORA, "--workers", "1000"], "'1000' is not a whole number from 0 to 64"),
    "device": ([*LORA, "--device", "abacus"], "device is 'abacus'; expected 'auto' or one of"),
    "dtype": ([*LORA, "--dtype", "int8"], "argument --dtype: invalid choice"),
    "flag": ([*LORA, "--checkpointing", "maybe"], "'maybe' is neither True nor False"),
    "model": ([*LORA, "--model_path", "nowhere"], "no directory 'nowhere'"),
    "data": ([*LORA, "--data", "nowhere"], "there is no file nowhere; give a *.jsonl"),
    "no data": ([*LORA, "--data", ROOT / "tools"], "tools holds no *.jsonl"),
    "a file": ([*LORA, "--output", ROOT / "README.md"], "README.md is a file; expected a dir"),
    "others": ([*LORA, "--output", ROOT / "tools"], "tools holds other files; give a new dir"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line_and_exit_2(capsys, mine, tmp_path, case):
    options, message = MISTAKES[case]
    quick = QUICK[2:] if "length" in case or case == "epochs" else QUICK
    output = tmp_path / "out"
    code, _, err = command(capsys, "--data", mine, "--output", output, *quick, *options)
    assert code == 2 and err.count("\n") == 1 and len(err) < 500
    assert err.startswith("paligemma-train: error: ") and message in err
    assert not output.exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--lora_alpha", "3"], r"training.json was made with lora_alpha None, now it is 3.0"),
        (["--batch_size", "5"], r"checkpoint.pt was made with batch_size 4, now it is 5"),
        (["--dtype", "bfloat16"], r"was made with dtype 'float32', now it is 'bfloat16'"),
        (["--held_out", "0.5"], r"was made with data '\w+', now it is '\w+'"),
    ],
)
def test_a_run_of_something_else_is_left_alone(capsys, mine, tmp_path, option, message):
    same = ["--data", mine, "--output", tmp_path, *LORA, *QUICK]
    assert command(capsys, *same)[0] == 0
    before = {file.name: file.read_bytes() for file in tmp_path.glob("adapter*")}
    code, _, err = command(capsys, *same, *option)
    assert code == 2 and err.count("\n") == 1
    assert re.search(message, err)
    assert {file.name: file.read_bytes() for file in tmp_path.glob("adapter*")} == before


def test_what_cannot_be_trained(capsys, mine, tmp_path):
    pg = load()
    quantize_model(pg.model, "int8")
    save_quantized(pg.model, tmp_path / "int8")
    pg.processor.save_pretrained(tmp_path / "int8")
    options = ["--data", mine, "--output", tmp_path / "out", "--model_path", tmp_path / "int8"]
    code, _, err = command(capsys, *options, *LORA, *QUICK)
    assert code == 2 and "is quantised; give the original weights" in err


def test_broken_lines_pictures_and_losses(capsys, mine, tmp_path):
    good = (mine / "mine.jsonl").read_text()
    for name in os.listdir(mine):
        os.link(mine / name, tmp_path / name)
    (tmp_path / "mine.jsonl").unlink()
    options = ["--data", tmp_path, "--output", tmp_path / "out", "--held_out", "0", *QUICK]

    def said(text, *more):
        (tmp_path / "mine.jsonl").write_text(text)
        code, _, err = command(capsys, *options, *more)
        assert code == 2 and len(err) < 500
        return err.rstrip("\n").split("\n")[-1]

    assert "mine.jsonl, line 13: Expecting value" in said(good + "\n?", *LORA)
    assert "line 1: there is no picture" in said(good.replace("0.png", "no.png", 1), *LORA)
    assert "0.png: the text contains '<image>'" in said(
        good.replace("caption en", "<image>"), *LORA
    )
    assert "lower learning_rate" in said(good, "--full", "--learning_rate", "10", "--steps", "30")
    (tmp_path / "5.png").unlink()
    (tmp_path / "5.png").write_text("no picture")
    assert "5.png is not a picture" in said(good, "--lora", "2", "--output", tmp_path / "two")


def test_help_names_every_option(capsys):
    code, out, _ = command(capsys, "--help")
    assert code == 0 and "usage: paligemma-train" in out and "default: 5 % of all" in out
    assert all(len(line) < 100 for line in out.split("\n"))


def test_a_start_is_light():
    """Help and mistakes wait for no PyTorch."""
    code = "import sys; from paligemma.support.train_command import make_parser; make_parser();"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_adapters_are_where_they_should_be(capsys, mine, tmp_path):
    options = [*LORA, *QUICK, "--lora_targets", "q_proj", "--held_out", "0"]
    assert command(capsys, "--data", mine, "--output", tmp_path, *options)[0] == 0
    from paligemma.checkpoint import load_model
    from paligemma.lora import load_adapter

    model = load_model(TINY)
    load_adapter(model, tmp_path)
    assert all(name.endswith("q_proj") for name in adapters(model))
    assert {layer.scale for layer in adapters(model).values()} == {2.0}
