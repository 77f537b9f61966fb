"""tools/random_checkpoint.py and tools/bench.py."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from paligemma.checkpoint import load_model, published_name
from paligemma.generation import generate
from paligemma.model import PaliGemma, PaliGemmaConfig

TOOLS = Path(__file__).parent.parent / "tools"


def tool(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


random_checkpoint, bench = tool("random_checkpoint"), tool("bench")
TINY = random_checkpoint.SIZES["tiny"]


def write(path, **options):
    random_checkpoint.write_checkpoint(path, TINY, **options)
    return path


@pytest.mark.parametrize("layout", random_checkpoint.LAYOUTS)
@pytest.mark.parametrize("shard", [10_000, 5_000_000_000])
def test_both_libraries_load_it_and_agree(tmp_path, layout, shard):
    from transformers import PaliGemmaForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = write(tmp_path, dtype=torch.float32, layout=layout, max_shard_bytes=shard)
    assert (path / "model.safetensors").exists() == (shard > 10_000)
    ours = load_model(path)
    theirs, report = PaliGemmaForConditionalGeneration.from_pretrained(
        path, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    inputs = bench.make_inputs(path)
    zeros = torch.zeros_like(inputs["input_ids"])
    with torch.no_grad():
        expected = theirs(**inputs, token_type_ids=zeros).logits
        found = ours(**inputs).logits
    assert found.isfinite().all()
    assert (found - expected).abs().max() < 1e-5
    # Worth comparing: the answer is no single token repeated.
    new = generate(ours, **inputs, max_new_tokens=24, eos_token_id=-1)
    assert len(set(new[0].tolist())) >= 8


def test_seed_decides_every_byte(tmp_path):
    one, two, other = (write(tmp_path / str(i), seed=i // 2) for i in range(3))
    name = "model.safetensors"
    assert (one / name).read_bytes() == (two / name).read_bytes()
    assert (one / name).read_bytes() != (other / name).read_bytes()


def test_full_size_has_the_published_names_and_count():
    assert random_checkpoint.SIZES["3b"] == PaliGemmaConfig()
    with torch.device("meta"):
        model = PaliGemma(random_checkpoint.SIZES["3b"])
    assert sum(p.numel() for p in model.parameters()) == 2_923_466_480
    names = {published_name(name) for name in model.state_dict()}
    assert "vision_tower.vision_model.encoder.layers.26.mlp.fc2.bias" in names
    assert "language_model.model.layers.17.self_attn.o_proj.weight" in names
    config = random_checkpoint.sparse_config(PaliGemmaConfig(), torch.bfloat16)
    assert "head_dim" not in config["text_config"]  # sparse, as published
    assert "image_size" not in config["vision_config"]


def test_blocks_are_small_and_make_up_the_tensor():
    generator = torch.Generator().manual_seed(0)
    shape = torch.Size((9000, 2048))
    blocks = list(random_checkpoint.random_rows("x", shape, torch.float32, generator))
    assert len(blocks) > 1 and max(b.nbytes for b in blocks) <= 2**25
    whole = torch.cat(blocks)
    assert whole.shape == shape
    assert whole.std().item() == pytest.approx(2048**-0.5, rel=0.01)


def test_nothing_is_overwritten_without_being_asked(tmp_path, capsys):
    folder = tmp_path / "new"
    arguments = [str(folder), "--size", "tiny"]
    random_checkpoint.main(arguments)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit) as stop:
        random_checkpoint.main([*arguments, "--seed", "1"])
    assert stop.value.code == 2 and "not empty" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == before
    random_checkpoint.main([*arguments, "--seed", "1", "--force"])
    assert (folder / "model.safetensors").read_bytes() != before
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit):
        random_checkpoint.main([*arguments, "--force"])
    assert "thesis.txt" in capsys.readouterr().err
    assert (folder / "thesis.txt").exists() and (folder / "model.safetensors").exists()


def test_measuring_ours_in_this_process(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "LEAST_SECONDS", 0.01)
    path = write(tmp_path)
    found = bench.measure("ours", path, None, "dynamic", 0, tokens=4)
    assert set(bench.ROWS) <= set(found)
    assert all(found[key] > 0 for key in bench.ROWS if key != "decode")
    assert found["first"] >= found["load"] and found["memory"] >= found["libraries"]
    assert found["dtype"] == "bfloat16" and found["prompt"] == 16 + 8
    model = load_model(path, dtype=None)
    inputs = bench.make_inputs(path)
    expected = generate(model, **inputs, max_new_tokens=5, eos_token_id=-1)
    assert found["ids"] == expected[0].tolist()


def test_products_are_those_of_a_prefill(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "LEAST_SECONDS", 0)
    path = write(tmp_path)
    model, inputs = load_model(path), bench.make_inputs(path)
    seen = Counter()
    hooks = [
        layer.register_forward_hook(
            lambda layer, x, _: seen.update([(x[0][0].shape[0], *reversed(layer.weight.shape))])
        )
        for layer in model.modules()
        if isinstance(layer, torch.nn.Linear)
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    assert bench.product_shapes(path) == seen
    found = bench.products(path, None, 0)
    assert found["seconds"] > 0
    assert found["flops"] == sum(2 * m * k * n * times for (m, k, n), times in seen.items())


def test_transformers_gives_the_same_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "LEAST_SECONDS", 0)
    path = write(tmp_path, dtype=torch.float32)
    inputs = bench.make_inputs(path)
    answers = [
        make()[0](inputs, 12)
        for make in (
            bench.make_ours(path, None, False),
            bench.make_transformers(path, None, "dynamic"),
        )
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 12


def test_quantized_weights_are_measured_like_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "LEAST_SECONDS", 0.01)
    path = write(tmp_path / "original")
    assert bench.quantize(path, "int8", tmp_path / "int8") > 0
    found = bench.measure("int8", tmp_path / "int8", None, "dynamic", 0, tokens=4)
    assert len(found["ids"]) == 5 and found["prompt"] == 16 + 8


def fake_result():
    ours = {"import": 1, "load": 0.2, "first": 2.0, "prefill": 1.0, "decode": 8.0, "memory": 5.0}
    theirs = {"import": 3, "load": 0.1, "first": 3, "prefill": 2.0, "decode": 4.0, "memory": 6.0}
    return {
        "model": "made up",
        "weights": 3_000_000,
        "prompt": 264,
        "tokens": 32,
        "dtype": "bfloat16",
        "threads": 2,
        "cores": 2,
        "machine": "a machine",
        "versions": {"python": "3", "torch": "2", "transformers": "5"},
        "cache": "dynamic",
        "quantize_seconds": {"int4": 90.4},
        "products": [{"seconds": 0.9, "flops": 1.8e12}] * 3,
        "rounds": {
            "ours": [ours, ours, ours | {"decode": 9.0}],
            "int4": [ours] * 3,
            "transformers": [theirs] * 3,
        },
        "median": {"ours": ours, "int4": ours | {"decode": 16.0}, "transformers": theirs},
        "agreement": bench.agreement([5, 6, 7, 8], [5, 6, 9, 8]),
    }


def test_ratios_say_how_much_better_ours_is():
    result = fake_result()
    assert bench.ratio(result, "prefill") == 2  # half the seconds
    assert bench.ratio(result, "decode") == 2  # twice the tokens a second
    assert bench.ratio(result, "load") == 0.5  # twice the seconds: worse
    table = bench.markdown(result)
    assert bench.ratio(result, "decode", "int4") == 4
    cells = "4.0 tokens/s | 8.0 tokens/s (2.00 ×) | 16.0 tokens/s (4.00 ×)"
    assert f"| decode | {cells} |" in table and "once took 90 s (int4)" in table
    assert "first 2 of 4 greedy tokens are equal" in table  # a difference is told, not hidden
    assert "slowest to the fastest: ours 8.0–9.0, int4 8.0–8.0, transformers 4.0–4.0 t" in table
    assert "0.900 s, measured in each round (2000 GFLOP/s): 90 % of our prefill, 45 %" in table
    result["agreement"] = bench.agreement([1, 2], [1, 2])
    assert "all 2 greedy tokens are equal" in bench.markdown(result)


def test_figure_is_the_same_twice(tmp_path):
    files = [tmp_path / "a" / "one.svg", tmp_path / "two.svg"]
    for file in files:
        bench.draw(fake_result(), file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "tokens/s" in files[0].read_text()


def test_the_shards_hold_the_weights_that_are_counted(tmp_path):
    path = write(tmp_path, max_shard_bytes=10_000)
    weights = sum(p.numel() for p in bench.model_without_memory(path).parameters())
    assert weights == sum(p.numel() for p in load_model(path).parameters())
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * weights


@pytest.mark.parametrize("name", ["bench", "random_checkpoint"])
def test_help_says_what_it_does(name, capsys):
    with pytest.raises(SystemExit) as stop:
        tool(name).main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and f"python tools/{name}.py" in text


def test_bad_arguments_are_one_clear_line(tmp_path, capsys):
    for arguments, message in (
        (["--model_path", str(tmp_path)], "no config.json"),
        (["--rounds", "0"], "1 or more"),
    ):
        with pytest.raises(SystemExit) as stop:
            bench.main(arguments)
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_peak_memory_keeps_the_highest_mark():
    before = bench.peak_memory()
    size = max(before, 2**28)
    block = torch.ones(size // 4)
    assert bench.peak_memory() > before
    top = bench.peak_memory()
    del block
    assert bench.peak_memory() > top - 2**24  # the kernel's own count wavers by a few pages


def test_the_gpu_script_runs_on_a_cpu(tmp_path, monkeypatch, capsys):
    """Ours and transformers on the same tensors, every column filled; compiling left out here."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.syspath_prepend(str(TOOLS))
    file = tmp_path / "found.json"
    where = ["--device", "cpu", "--size", "tiny", "--dtype", "float32"]
    tool("bench_gpu").main([*where, "--batches", "1", "2", "--tokens", "4", "--json", str(file)])
    found = json.loads(file.read_text())
    assert found["equal"] and found["distinct"] > 2
    assert [(run["name"], run["batch"]) for run in found["decode"]][-1] == ("transformers", 2)
    assert all(run["step"] > 0 for run in found["decode"]) and found["prefill"][0]["ours"] > 0
    assert "ours, compiled | 1 |" in capsys.readouterr().out


def test_the_gpu_script_says_that_there_is_no_gpu(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        bench.main(["--device", "cuda"])
    assert exit.value.code == 2 and "there is no GPU here" in capsys.readouterr().err


def test_peers_that_are_not_installed_are_left_out(tmp_path, monkeypatch, capsys):
    """Ours alone is measured then; with llama.cpp and ONNX Runtime there are five rows more."""
    monkeypatch.syspath_prepend(TOOLS)
    import bench_peers

    monkeypatch.setattr(bench_peers, "find_spec", lambda name: None)
    path, file = write(tmp_path / "model"), tmp_path / "rounds.json"
    options = "--peers --rounds 1 --tokens 3 --threads 1".split()
    bench.main([*options, "--model_path", str(path), "--json", str(file)])
    printed = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in printed.splitlines()[2:5]]
    assert rows == ["ours bfloat16", "ours int8", "ours int4"]
    rounds = json.loads(file.read_text())
    assert {name: len(runs[0]["ids"]) for name, runs in rounds.items()} == dict.fromkeys(rows, 4)
    assert bench.machine() in printed
