"""Training is harmed and goes on: losses, curves and weights equal those of a run left alone."""

import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harm import DONE, FAST, KILLED, at_step, die, end, fork, kill_after
from kinds import small_model
from saves import Outcomes

from paligemma import scenes
from paligemma.image_processor import ImageProcessor
from paligemma.inference import TINY
from paligemma.lora import add_lora, save_adapter
from paligemma.model import PaliGemma
from paligemma.processor import Processor
from paligemma.tokenizer import Tokenizer
from paligemma.training import TrainingConfig, train

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import train_tiny


def result(folder: Path) -> dict[str, Any]:
    """All files that a run leaves, byte by byte, but for the seconds that it took."""
    found: dict[str, Any] = {}
    for file in folder.rglob("*"):
        if file.name == "checkpoint.pt":  # equal states are not always pickled to equal bytes
            found[file.name] = comparable(torch.load(file, weights_only=True))
        elif file.name == "curves.json":
            found[file.name] = comparable(json.loads(file.read_text()))
        else:
            found[file.name] = file.read_bytes() if file.is_file() else None
    return found


def comparable(state: Any) -> Any:
    """Nested dicts and lists without what a clock said; of tensors the bytes."""
    if isinstance(state, dict):
        return {k: comparable(value) for k, value in state.items() if k != "seconds"}
    if isinstance(state, list | tuple):
        return [comparable(value) for value in state]
    if isinstance(state, torch.Tensor):
        return bytes(state.reshape(-1).view(torch.uint8).numpy())
    return state


# ---------------------------------------------------------------- lesson 27, whole and with LoRA


def ready() -> tuple[PaliGemma, list[dict], Processor]:
    """A model with random weights, and eight pictures with questions."""
    model, generator = small_model(0), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    pictures = np.random.default_rng(0).integers(0, 256, (8, 28, 28, 3), dtype=np.uint8)
    words = ("a cat", "two dogs", "a bee", "nothing")
    data = [
        {"image": picture, "prefix": "caption en", "suffix": words[i % 4]}
        for i, picture in enumerate(pictures)
    ]
    return model, data, Processor(Tokenizer(TINY / "tokenizer.model"), ImageProcessor(28), 4)


SETTINGS = {"steps": 4, "batch_size": 4, "save_every": 1, "warmup_steps": 2, "ema_decay": 0.5}


def train_whole(folder: Path) -> None:
    model, data, processor = ready()
    train(model, data, TrainingConfig(folder=folder, **SETTINGS), processor)


def train_adapter(folder: Path) -> None:
    model, data, processor = ready()
    torch.manual_seed(0)  # the first values of A
    add_lora(model, 2, alpha=2, dropout=0.2)
    train(model, data, TrainingConfig(folder=folder, save=False, **SETTINGS), processor)
    save_adapter(model, folder)


# ---------------------------------------------------------------- the shipped model's own recipe


def train_recipe(folder: Path) -> None:
    sizes = {"vision_width": 16, "vision_layers": 1, "text_width": 16, "text_layers": 1}
    run = {"text_mlp": 16, "batch": 4, "questions": 1, "processes": 1, "meet_every": 1}
    stages = {"look_steps": 1, "total_steps": 4, "warm_steps": 2, "cool_steps": 2}
    recipe = train_tiny.Recipe(**sizes, **run, **stages, curriculum=((0, (1, 2)),))
    run = train_tiny.Run(recipe, folder)
    train_tiny.train(run, save_every=0)
    train_tiny.export(run, folder / "export")


RUNS = {
    "training": train_whole,
    "LoRA training": train_adapter,
    "the recipe": train_recipe,
}


# ---------------------------------------------------------------- harm


def tries(name: str, harm: str, count: int, seed: int) -> Outcomes:
    """kill -9 (at random moments, or before each step that changes the folder), then go on."""
    go_on, rng, step = RUNS[name], random.Random(f"{seed} {name}"), 0
    torch.optim.AdamW([torch.zeros(1)])  # what is slow once: here, and not in each child
    scenes.make_scene(0, "train")
    with tempfile.TemporaryDirectory(dir=FAST) as root:
        alone, start = Path(root, "alone"), time.perf_counter()
        if end(fork(lambda: go_on(alone))) != DONE:
            yield "training does not work"
            return
        seconds, expected = time.perf_counter() - start, result(alone)
        killed = True
        while killed if harm == "killed at each step" else step < count:
            step += 1
            folder = Path(root, str(step))
            if harm == "killed at each step":

                def go(step: int = step, folder: Path = folder) -> None:
                    at_step(step, folder, die)
                    go_on(folder)

                killed = end(fork(go)) == KILLED
            else:
                pid = fork(lambda folder=folder: go_on(folder))
                kill_after(rng.uniform(0.2, 1) * seconds, pid)
            if end(fork(lambda folder=folder: go_on(folder))) != DONE:
                yield "does not go on"
            else:
                found = result(folder)
                differ = {n for n in expected.keys() | found if expected.get(n) != found.get(n)}
                yield f"differ: {differ}" if differ else None
            shutil.rmtree(folder, ignore_errors=True)


HARMS = ("killed at random", "killed at each step")
