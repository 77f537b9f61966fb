"""What a start, a curriculum and a size are worth: short trainings of equal processor time.

Each runs in a process of one thread until it has used up its minutes of processor time (not of the
clock on the wall: a busy machine changes nothing), validation not counted, at a constant rate.

    python tools/compare_training.py runs/compare            # train all, two at a time, or go on
    python tools/compare_training.py runs/compare --write    # their curves, for lesson 27
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from paligemma import scenes
from paligemma.checkpoint import replacing
from paligemma.contrastive import ContrastiveModel, SiglipTextConfig
from paligemma.training import (
    Trainer,
    TrainingConfig,
    learning_rate,
    make_optimizers,
    mean_of,
    use_bfloat16_products,
    validate,
)

RESULT = scenes.ASSETS / "tiny" / "comparison.json"
BASE = TrainingConfig(
    short=("caption", "caption", "count", "where", "is there"),
    lr=4e-3,
    look_steps=0,
    batch=32,  # what one of the two processes of the long run sees
    total_steps=10**9,
    cool_steps=1,
    ema=0.9,
    processes=1,
    bfloat16=True,
)
WIDTHS = ("vision_width", "text_width", "text_mlp", "vision_layers", "text_layers")
SMALL = dict(zip(WIDTHS, (96, 96, 192, 3, 3)))  # shipped: 128, 128, 256, 4, 4
LARGE = dict(zip(WIDTHS, (192, 192, 384, 6, 6)))
START = 0.2  # share of the time that a start takes
ALL = (1, 2, 3, 4, 5)
STAGES = ((0.35, (1,)), (0.5, (1, 2)), (1.0, ALL))  # numbers of objects, up to this share of time
PAIRS, LENGTH = 64, 24  # of the contrastive start: a batch, and pieces of a caption


@dataclass
class Arm:
    """One training: how its tower starts ("looks", "contrast" or ""), and what else differs."""

    start: str = ""
    stages: tuple = STAGES
    changes: dict = field(default_factory=dict)


ARMS = {
    "looks first": Arm("looks"),
    "speaks at once": Arm("", ((1.0, ALL),)),
    "contrastive first": Arm("contrast"),
    "curriculum only": Arm(),
    "small": Arm("looks", STAGES, SMALL),
    "large": Arm("looks", STAGES, LARGE),
}


def captions(made: list, tokenizer) -> tuple[list[int], torch.Tensor]:
    """Which scenes have a caption that no earlier one has, and those captions, int64[n, LENGTH]."""
    texts = [scenes.caption_of(scene.kinds) for scene in made]
    kept = [i for i, text in enumerate(texts) if text not in texts[:i]]
    ids = [tokenizer.encode(texts[i])[:LENGTH] for i in kept]
    return kept, torch.tensor([row + [tokenizer.pad_id] * (LENGTH - len(row)) for row in ids])


def contrast(run: Trainer, seconds: float) -> None:
    """Train the vision tower on pairs of scene and caption, with SigLIP's loss (lesson 26)."""
    config, tokenizer = run.config, run.processor.tokenizer
    text = SiglipTextConfig(
        vocab_size=run.model.config.text_config.vocab_size,
        hidden_size=config.vision_width,
        intermediate_size=2 * config.vision_width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    pair = ContrastiveModel(run.model.config.vision_config, text)
    use_bfloat16_products(pair)
    optimizers = make_optimizers(pair, nn.Identity(), config.lr)
    start, step, parameters = time.process_time(), 0, list(pair.parameters())
    while time.process_time() - start < seconds:
        objects = (1,) if time.process_time() - start < seconds / 3 else (1, 2)
        first = 10**9 + step * PAIRS  # other scenes than those of the steps to come
        made = [run.batches.scene(first + i, objects) for i in range(PAIRS)]
        kept, ids = captions(made, tokenizer)
        loss = pair.loss(run.batches.pixels([made[i] for i in kept]), ids)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config) * group.get("factor", 1.0)
            optimizer.step(), optimizer.zero_grad()
        step += 1
        if step % 100 == 0:
            print(f"contrastive step {step}: loss {loss.item():.3f}", flush=True)
    own = set(run.model.vision_tower.state_dict())
    tower = {k: v for k, v in pair.vision_model.state_dict().items() if k in own}
    run.model.vision_tower.load_state_dict(tower)
    run.mean = {k: v.clone() for k, v in run.model.state_dict().items()}
    run.seconds = seconds


def train_arm(name: str, folder: Path, minutes: float, looks: int = 20) -> None:
    """Train one, or go on; every `1 / looks` of its time it is validated and saved."""
    torch.set_num_threads(1)
    arm, folder = ARMS[name], folder / name.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    settings, budget = folder / "config.json", 60 * minutes
    config = replace(BASE, **arm.changes)
    run, recent = Trainer(config, folder), []
    if arm.start != "looks":  # no lessons for patches, in no stage
        head = run.head.forward
        run.head.forward = lambda *given: (0 * head(*given)[0], head(*given)[1])
    if arm.start == "contrast" and run.step == 0:
        contrast(run, START * budget)
    if settings.exists():
        run.config = TrainingConfig.read(settings)
    while run.seconds < budget:
        start, share = time.process_time(), run.seconds / budget
        objects = next(numbers for end, numbers in arm.stages if share < end)
        if arm.start == "looks" and share < START:
            look, objects = run.step + 1, ALL
        else:
            look = run.config.look_steps
        run.config = replace(config, look_steps=look, curriculum=((0, objects),))
        recent.append(run.take_step())
        if run.step % config.meet_every == 0:
            run.update_mean()
        before, run.seconds = run.seconds, run.seconds + time.process_time() - start
        if int(before / budget * looks) < int(run.seconds / budget * looks):
            point = {"minutes": run.seconds / 60, "step": run.step} | mean_of(recent)
            run.curves.append(point | validate(run.smoothed(), run.batches))
            settings.write_text(json.dumps(asdict(run.config)))
            run.save()
            recent.clear()
            caption = run.curves[-1]["caption"]
            print(f"{name}: {run.seconds / 60:.1f} min, caption {caption:.1f} %", flush=True)


def write(folder: Path) -> None:
    """Put the curves of all arms into one file."""
    found = {}
    for name, arm in ARMS.items():
        run = Trainer(replace(BASE, **arm.changes), folder / name.replace(" ", "_"))
        weights = sum(p.numel() for p in run.model.parameters())
        points = [{k: round(v, 3) for k, v in p.items()} for p in run.curves]
        found[name] = {"weights": weights, "batch": BASE.batch, "points": points}
    with replacing(RESULT.parent) as draft:
        draft(RESULT.name).write_text(json.dumps(found) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the runs")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS), metavar="NAME")
    parser.add_argument("--minutes", type=float, default=15.0, help="processor time of each")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}, do not train")
    args = parser.parse_args()
    if args.write:
        return write(args.folder)
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(partial(train_arm, folder=args.folder, minutes=args.minutes), args.arms))


if __name__ == "__main__":
    main()
