"""Many pictures: each answered once, whatever is unreadable, stopped, or killed on the way."""

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import answer_pictures
import pytest
from answer_pictures import Answerer, list_images, read_answers

import paligemma
from paligemma.inference import TINY

TOOL = Path(answer_pictures.__file__)
SCENES = [TINY.parent / "pictures" / f"{name}.png" for name in ("scene", "scene2", "scene3")]


@pytest.fixture(scope="module")
def pg():
    return paligemma.load()


# ---------------------------------------------------------------- one process


def test_answers_are_those_one_by_one_and_what_is_at_fault_stands_alone(pg, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    paths = [str(path) for path in (*SCENES, broken, tmp_path / "none.png", *SCENES[:2])]
    lines = Answerer("caption en", "answer", {}, path=None)({"image": paths})["line"]
    for path, record in zip(paths, map(json.loads, lines), strict=True):
        assert (record["image"], record["prompt"]) == (path, "caption en")
        if Path(path) in SCENES:
            assert record["answer"] == pg(path, "caption en") and "error" not in record
        else:
            assert Path(path).name in record["error"] and "answer" not in record


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_objects_are_those_of_the_command(task, capsys):
    from paligemma.support.command_line import main

    prompt = f"{task} cat"
    line = Answerer(prompt, task, {}, path=None)({"image": [str(SCENES[0])]})["line"][0]
    main(["--image_file_path", str(SCENES[0]), "--task", task, "--prompt", "cat", "--json"])
    assert json.loads(line) == json.loads(capsys.readouterr().out)


def test_pictures_come_from_a_folder_a_list_or_json_lines(tmp_path):
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    wanted = [tmp_path / "in" / "a.png", tmp_path / "in" / "deeper" / "b.JPG"]
    for path in (*wanted, tmp_path / "in" / "notes.txt"):
        path.touch()
    wanted = [str(path) for path in wanted]
    assert list_images(tmp_path / "in") == wanted
    names = ["in/a.png", "in/deeper/b.JPG", "in/a.png"]
    (tmp_path / "list.txt").write_text("\n".join([*names, ""]))
    assert list_images(tmp_path / "list.txt") == wanted
    lines = [json.dumps({"image": name, "suffix": "a cat"}) for name in names]
    (tmp_path / "data.jsonl").write_text("\n".join([*lines, ""]))
    assert list_images(tmp_path / "data.jsonl") == wanted


BROKEN = {
    "not JSON": ('{"image": "a.png"}\n{"image', "line 2"),
    "no image": ('{"picture": "a.png"}', "line 1"),
    "no object": ("[3]", "line 1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_line_is_named(tmp_path, case):
    text, words = BROKEN[case]
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words):
        list_images(tmp_path / "data.jsonl")


def test_a_folder_holds_answers_to_one_prompt_and_one_for_each(tmp_path):
    line = json.dumps({"image": "a.png", "prompt": "caption en", "answer": "a cat"}) + "\n"
    (tmp_path / "part-00000.jsonl").write_text(line)
    assert read_answers(tmp_path, "caption en")["a.png"]["answer"] == "a cat"
    with pytest.raises(ValueError, match="another prompt"):
        read_answers(tmp_path, "caption de")
    (tmp_path / "part-00001.jsonl").write_text(line)
    with pytest.raises(ValueError, match=r"another line for a\.png"):
        read_answers(tmp_path, "caption en")


def arguments(folder, **changes):
    default = {"task": "answer", "prompt": "caption en", "model_path": None, "max_tokens": 100}
    default |= {"batch_size": 2, "part": 2, "pictures": folder, "output": folder / "answers"}
    return Namespace(**default | changes)


@pytest.fixture
def four(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").symlink_to(SCENES[0])
    return tmp_path


def lines_of(paths, prompt, args):
    """Stands for the cluster."""
    yield from (json.dumps({"image": path, "prompt": prompt, "answer": ""}) for path in paths)


def test_what_was_answered_is_left_out_the_next_time(four, monkeypatch):
    def stops(paths, prompt, args):
        yield from list(lines_of(paths, prompt, args))[:3]
        raise KeyboardInterrupt

    monkeypatch.setattr(answer_pictures, "ask_cluster", stops)
    with pytest.raises(KeyboardInterrupt):
        answer_pictures.run(arguments(four))
    first = four / "answers" / "part-00000.jsonl"
    assert os.listdir(first.parent) == [first.name]  # whole, and nothing half written
    before = first.read_bytes()
    asked = []
    ask = lambda paths, *rest: (asked.extend(paths), lines_of(paths, *rest))[1]  # noqa: E731
    monkeypatch.setattr(answer_pictures, "ask_cluster", ask)
    assert answer_pictures.run(arguments(four)) == 0
    assert asked == [str(four / "2.png"), str(four / "3.png")] and first.read_bytes() == before
    first.unlink()  # whose lines are gone is asked again, and nothing is written over
    assert answer_pictures.run(arguments(four)) == 0
    assert asked[2:] == [str(four / "0.png"), str(four / "1.png")]
    assert len(read_answers(first.parent, "caption en")) == 4


def test_a_picture_without_a_line_is_no_success(four, monkeypatch):
    monkeypatch.setattr(answer_pictures, "ask_cluster", lambda *_: iter(()))
    with pytest.raises(answer_pictures.Failure, match="4 pictures have no answer"):
        answer_pictures.run(arguments(four))


WRONG = {
    "no folder": ({"pictures": Path("nowhere")}, "nowhere"),
    "prompt": ({"prompt": "caption <image>"}, "<image>"),
    "nothing named": ({"task": "detect", "prompt": " "}, "names nothing"),
    "model": ({"model_path": "nowhere/at/all"}, "nowhere"),
    "batch size": ({"batch_size": 0}, "batch_size"),
    "tokens": ({"max_tokens": 0}, "max_new_tokens"),
    "context": ({"prompt": "very " * 5000}, "context|tokens|positions"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_right_is_refused_before_any_cluster(four, case, monkeypatch):
    monkeypatch.setattr(answer_pictures, "ask_cluster", None)
    changes, words = WRONG[case]
    with pytest.raises(ValueError, match=words):
        answer_pictures.run(arguments(four, **changes))
    assert not (four / "answers").exists()


# ---------------------------------------------------------------- a cluster


@pytest.fixture
def cluster(monkeypatch):
    """Ray's own: two nodes with a core each, as processes of this machine."""
    pytest.importorskip("ray", reason='needs pip install -e ".[distributed]"')
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # short, for sockets have names
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        os.mkdir(os.path.join(folder, "ray"))
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "object_store_memory": 100 << 20}
        noticed = {"health_check_period_ms": 1000}  # a killed node, sooner than by default
        head = node | {"include_dashboard": False, "_system_config": noticed}
        made = Cluster(initialize_head=True, head_node_args=head)
        try:
            made.second = made.add_node(**node)
            yield made
        finally:
            made.shutdown()


def is_answering(node) -> bool:
    """Does a process of this node answer a batch? (Ray names its processes after their work.)"""
    import psutil

    raylets = [each.process.pid for each in node.all_processes["raylet"]]
    for process in psutil.Process(raylets[0]).children(recursive=True):
        try:
            if "(Answerer)).submit" in " ".join(process.cmdline()):
                return True
        except psutil.Error:  # it has just ended
            pass
    return False


@pytest.mark.timeout(280)
def test_a_node_is_killed_and_every_picture_is_answered_once(pg, cluster, tmp_path, monkeypatch):
    """Two nodes; one is killed while it answers; then the same command has nothing left to do."""
    expected = {}
    for number in range(480):
        scene = SCENES[number % 3]
        path = tmp_path / f"{number:03}.png"
        path.symlink_to(scene)
        expected[str(path)] = scene
    (tmp_path / "100.png").unlink()
    (tmp_path / "100.png").write_bytes(b"no picture")
    output = tmp_path / "answers"
    options = [tmp_path, "--output", output, "--batch_size", 4, "--part", 8]
    options += ["--address", cluster.address]
    command = [sys.executable, str(TOOL), *map(str, options)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tool:
        while not (is_answering(cluster.second) and list(output.glob("part-*.jsonl"))):
            assert tool.poll() is None, tool.stderr.read()
            time.sleep(0.02)
        cluster.remove_node(cluster.second, allow_graceful=False)
        at_the_kill = len(read_answers(output, "caption en"))
        said = tool.stderr.read()
    assert 0 < at_the_kill < len(expected)
    assert tool.returncode == 1 and "479 answers and 1 errors" in said, said
    answers = read_answers(output, "caption en")  # refuses a picture with two lines
    assert answers.keys() == expected.keys()
    assert "100.png" in answers.pop(str(tmp_path / "100.png"))["error"]
    alone = {scene: pg(scene, "caption en") for scene in SCENES}
    assert {p: r["answer"] for p, r in answers.items()} == {p: alone[expected[p]] for p in answers}
    files = {file: file.read_bytes() for file in output.iterdir()}
    monkeypatch.setattr(answer_pictures, "ask_cluster", None)  # nothing is left to ask
    assert answer_pictures.run(arguments(tmp_path)) == 1
    assert {file: file.read_bytes() for file in output.iterdir()} == files
