"""Train the model that ships: a whole PaliGemma from nothing, in the world of the scenes.

    torchrun --standalone --nproc-per-node 2 tools/train_tiny.py --work runs/tiny \\
        --config paligemma/assets/tiny/recipe.json      # train, or go on; Ctrl-C saves and stops
    python tools/train_tiny.py --work runs/tiny --export runs/tiny/model

`paligemma.training.train` fine-tunes any model on any data. From nothing more is needed, and it is
here (`tiny_batches.py` makes the data). A head that is thrown away asks every patch what it shows,
first alone and then beside the words: a caption alone teaches a small tower too little. Scenes
begin with one object. Location words have soft targets: bin 500 is next to bin 501. What the model
reads of its own answer is a little wrong, as its own words will be. A picture is encoded once for
all questions about it. Matrices inside blocks learn by Muon (PyTorch 2.9 or newer), the rest by
AdamW, with products in bfloat16. With several processes each steps on its own, and every few steps
they average their weights ("local SGD"), so that on a busy machine nobody waits at each step. One
process goes on bit for bit; with more, the optimizers of the others start from rank 0's.
"""

import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny_batches import NOTHING, PATCH, TINY, Batches, Recipe
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from paligemma import scenes
from paligemma.checkpoint import load_model, save_model
from paligemma.gemma import GemmaConfig
from paligemma.image_processor import ImageProcessor
from paligemma.model import PaliGemma, PaliGemmaConfig
from paligemma.processor import Processor
from paligemma.siglip import SiglipVisionConfig
from paligemma.support.command import Parser
from paligemma.support.replacing import replacing, settled
from paligemma.support.runs import noted_interrupt, read_checkpoint

# ---------------------------------------------------------------- the model


def make_model(recipe: Recipe, image_id: int) -> PaliGemma:
    """A PaliGemma of this size, with weights drawn at a scale that small models like."""
    vision = SiglipVisionConfig(
        hidden_size=recipe.vision_width,
        intermediate_size=4 * recipe.vision_width,
        num_hidden_layers=recipe.vision_layers,
        num_attention_heads=4,
        image_size=scenes.SIZE,
        patch_size=PATCH,
    )
    text = GemmaConfig(
        vocab_size=-(-(image_id + 1) // 64) * 64,
        hidden_size=recipe.text_width,
        intermediate_size=recipe.text_mlp,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
    )
    model = PaliGemma(PaliGemmaConfig(vision, text, image_token_index=image_id))
    # PyTorch draws embeddings with deviation 1; times √D they would drown the picture.
    nn.init.normal_(model.language_model.embed_tokens.weight, std=recipe.text_width**-0.5)
    nn.init.normal_(model.vision_tower.embeddings.position_embedding.weight, std=0.02)
    return model


class PatchHead(nn.Module):
    """Says for each patch which kind covers it, whose centre lies in it, and its object's box."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 2 * (NOTHING + 1))
        self.box = nn.Linear(width, 4)
        weight = torch.ones(NOTHING + 1)
        weight[NOTHING] = 0.2  # most of the picture
        self.weight = nn.Buffer(weight, persistent=False)

    def forward(self, features, targets, boxes) -> tuple[torch.Tensor, torch.Tensor]:
        """float32[B, N, D], int64[B, 2, N], float32[B, N, 4] → (loss, accuracy on objects)."""
        logits = self.linear(features).unflatten(-1, (2, NOTHING + 1)).transpose(1, 2)
        logits, flat = logits.flatten(0, 2), targets.flatten()
        loss = F.cross_entropy(logits, flat, self.weight)
        error = (self.box(features) - boxes)[targets[:, 0] < NOTHING].abs().mean()
        return loss + 2 * error, (logits.argmax(-1) == flat)[flat < NOTHING].float().mean()


class Bfloat16Product(torch.autograd.Function):
    """`F.linear` whose three products (forward, two gradients) are made of bfloat16 factors.

    `torch.autocast` would put GELU and attention into bfloat16 too, where a CPU is slower.
    """

    @staticmethod
    def forward(context, x, weight, bias):
        """float32[..., D], float32[E, D], float32[E] or None to float32[..., E]."""
        x, weight = x.bfloat16(), weight.bfloat16()
        context.save_for_backward(x, weight)
        context.has_bias = bias is not None
        y = F.linear(x, weight).float()
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(context, *gradients):
        """float32[..., E] to the gradients of x, weight, bias."""
        x, weight = context.saved_tensors
        rows = gradients[0].flatten(0, -2)
        to_x = (rows.bfloat16() @ weight).float().view(x.shape)
        to_weight = (rows.bfloat16().T @ x.flatten(0, -2)).float()
        return to_x, to_weight, rows.sum(0) if context.has_bias else None


def use_bfloat16_products(module: nn.Module) -> None:
    """Let every linear layer inside multiply in bfloat16; its weights stay float32."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            product = partial(_product, layer)
            layer.forward = product  # type: ignore[method-assign]


def _product(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return Bfloat16Product.apply(x, layer.weight, layer.bias)


# ---------------------------------------------------------------- the loss


def soft_locations(softness: float, bins: int = 1024) -> torch.Tensor:
    """For each location word, how much of the target its neighbours get: float32[1024, 1024]."""
    bin_ = torch.arange(bins)
    return torch.softmax(-((bin_[:, None] - bin_[None, :]) ** 2) / (2 * softness**2), dim=-1)


def answer_loss(logits, labels, first_location: int, soft: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the labelled tokens; a location's target is a bell around it."""
    shift_logits, shift_labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    shift_logits = shift_logits[shift_labels != -100]
    shift_labels = shift_labels[shift_labels != -100]
    log_p, place = shift_logits.log_softmax(-1), shift_labels - first_location
    located = (place >= 0) & (place < len(soft))
    loss = F.nll_loss(log_p[~located], shift_labels[~located], reduction="sum")
    bells = log_p[located, first_location : first_location + len(soft)] * soft[place[located]]
    return (loss - bells.sum()) / max(1, len(shift_labels))


def text_logits(model: PaliGemma, features: torch.Tensor, group: dict) -> torch.Tensor:
    """The model's own forward on a group of texts: logits of the answers, float32[B, keep, V]."""
    ids, mask, types = (group[k] for k in ("input_ids", "attention_mask", "token_type_ids"))
    return model(
        ids,
        attention_mask=mask,
        token_type_ids=types,
        image_features=features[group["picture"]],
        logits_to_keep=group["keep"],
    ).logits


# ---------------------------------------------------------------- the run


class Run:
    """A run's state: model, head, optimizers, running mean, curves."""

    def __init__(self, recipe: Recipe, folder: Path, tokenizer: Path = TINY):
        torch.manual_seed(recipe.seed)
        self.recipe, self.folder = recipe, folder
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.processor = Processor.from_pretrained(tokenizer)
        self.batches = Batches(self.processor, recipe)
        self.soft = soft_locations(recipe.softness)
        self.model = make_model(recipe, self.processor.tokenizer.image_id)
        self.head = PatchHead(recipe.vision_width)
        if recipe.bfloat16:
            use_bfloat16_products(self.model)
        self.parameters = [*self.model.parameters(), *self.head.parameters()]
        self.optimizers = self.make_optimizers()
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))
        self.step, self.seconds, self.curves, self.recent = 0, 0.0, [], []
        if (settled(folder) / "checkpoint.pt").exists():
            self.load()

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for matrices inside blocks; AdamW for the rest, without decay on vectors."""
        named = [*self.model.named_parameters(), *self.head.named_parameters()]
        inside = [p for name, p in named if p.ndim == 2 and "layers" in name]
        others = [p for name, p in named if p.ndim > 1 and not (p.ndim == 2 and "layers" in name)]
        vectors = {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0}
        adamw = [{"params": others, "weight_decay": 0.01}, vectors]
        return [
            torch.optim.AdamW(adamw, lr=self.recipe.lr, betas=(0.9, 0.98), fused=True),
            torch.optim.Muon(
                inside, lr=self.recipe.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            ),
        ]

    def start_from(self, folder: Path, steps: int = 150) -> None:
        """Take another model's weights, and teach a new head what its tower sees."""
        self.model.load_state_dict(load_model(folder).state_dict())
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(self.recipe.ema))
        optimizer = torch.optim.AdamW(self.head.parameters(), lr=3e-3)
        for i in range(steps):
            batch = self.batches.train(100_000 + i, self.recipe.curriculum[-1][1], look=True)
            with torch.no_grad():
                seen = self.model.vision_tower(batch["pixels"])
            self.head(seen, batch["kinds"], batch["boxes"])[0].backward()
            optimizer.step()
            optimizer.zero_grad()

    def state(self) -> dict:
        """Everything that the next step depends on."""
        return {
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "curves": self.curves,
            "recent": self.recent,
            "config": asdict(self.recipe),
        }

    def save(self) -> None:
        """Write the checkpoint and the curves."""
        with replacing(self.folder) as draft:
            torch.save(self.state(), draft / "checkpoint.pt")
            (draft / "curves.json").write_text(json.dumps(self.curves))

    def load(self) -> None:
        """Take up the saved run. Rates, lengths and shares may have changed; sizes may not."""
        shapes = {name: value.shape for name, value in self.model.state_dict().items()}
        state = read_checkpoint(self.folder / "checkpoint.pt", {}, shapes)
        for name in ("model", "head", "ema"):
            getattr(self, name).load_state_dict(state[name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]
        self.curves, self.recent = state["curves"], state["recent"]

    def learning_rate(self) -> float:
        """Warm up at the start of each stage, hold, fall to 0 along half a cosine at the end."""
        r, step = self.recipe, self.step
        since = step - r.look_steps if step >= r.look_steps else step
        left = min(1.0, (r.total_steps - step) / max(1, r.cool_steps))
        return r.lr * min(1.0, (since + 1) / r.warm_steps) * math.sin(left * math.pi / 2) ** 2

    def objects(self) -> tuple:
        """The curriculum: which numbers of objects the scenes of this step have."""
        since = self.step - self.recipe.look_steps
        if since < 0:  # who looks may see everything
            return self.recipe.curriculum[-1][1]
        return [numbers for start, numbers in self.recipe.curriculum if since >= start][-1]

    def loss(self, batch: dict) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss of one batch, and its parts for the curves."""
        seen = self.model.vision_tower(batch["pixels"])
        patch, accuracy = self.head(seen, batch["kinds"], batch["boxes"])
        metrics = {"patch loss": patch.item(), "patch right": accuracy.item()}
        loss = 0.5 * patch if batch["groups"] else patch
        features = self.model.multi_modal_projector(seen)
        for group in batch["groups"]:
            logits, labels = text_logits(self.model, features, group), group["labels"]
            part = answer_loss(
                logits, labels[:, -group["keep"] :], self.batches.first_location, self.soft
            )
            metrics[f"{group['name']} loss"] = part.item()
            loss = loss + (0.5 if group["name"] == "segment" else 1.0) * part
        return loss, metrics

    def take_step(self) -> dict[str, float]:
        """One step on this process's part of batch number `step`: the losses."""
        rate, parts = self.learning_rate(), self.recipe.accumulate
        for optimizer, factor in zip(self.optimizers, (0.5, 1.0)):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        found, look = [], self.step < self.recipe.look_steps
        for i in range(parts):
            part = (self.rank * parts + i, self.size * parts)
            loss, metrics = self.loss(self.batches.train(self.step, self.objects(), look, part))
            (loss / parts).backward()
            found.append(metrics)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return mean_of(found)

    @torch.no_grad()
    def average_parameters(self, stop: bool) -> bool:
        """Give every process the mean of all weights; whether any of them wants to stop."""
        if self.size == 1:
            return stop
        flat = torch.cat([*(p.flatten() for p in self.parameters), torch.tensor([float(stop)])])
        dist.all_reduce(flat)
        flat /= self.size
        for p, part in zip(self.parameters, flat[:-1].split([p.numel() for p in self.parameters])):
            p.copy_(part.view_as(p))
        return bool(flat[-1])

    def mean_model(self) -> PaliGemma:
        """A model with the running mean of the weights."""
        model = PaliGemma(self.model.config)
        model.load_state_dict(self.ema.module.state_dict())
        return model.eval()

    @torch.inference_mode()
    def validate(self, count: int = 192) -> dict[str, float]:
        """Percent of validation answers of which every token is the first choice, by task.

        True words are fed in, so for boxes only names count: see `paligemma.evaluation` for what
        the model does with its own.
        """
        model, result = self.mean_model(), {}
        made = [scenes.make_scene(i, "validation") for i in range(count)]
        features, first = model.encode_image(self.batches.pixels(made)), self.batches.first_location
        for name in scenes.TASKS:
            pairs = [scenes.task(np.random.default_rng(i), s, name) for i, s in enumerate(made)]
            kept = [i for i, (p, _) in enumerate(pairs) if name != "where" or "where" in p]
            group = self.batches.texts([pairs[i] for i in kept], kept)
            labels = group["labels"][:, -group["keep"] :][:, 1:]
            choice = text_logits(model, features, group)[:, :-1].argmax(-1)
            located = (labels >= first) & (labels < first + 1024)
            correct = (choice == labels) | (labels == -100) | located
            result[name] = 100 * float(correct.all(1).float().mean())
        return result


def mean_of(metrics: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each value of the last dict, over the dicts that have it."""
    return {k: float(np.mean([m[k] for m in metrics if k in m])) for k in metrics[-1]}


def train(run: Run, save_every: float = 60.0, validate_every: int = 250) -> None:
    """Go on to the last step; Ctrl-C stops where the processes meet, with a checkpoint."""
    recipe, started, spent = run.recipe, time.perf_counter(), run.seconds
    saved = started
    hidden = None if run.rank == 0 else True
    bar = tqdm(total=recipe.total_steps, initial=run.step, disable=hidden, unit="step")
    with noted_interrupt(signal.SIGINT, signal.SIGTERM) as interrupted, bar:
        while run.step < recipe.total_steps:
            run.recent.append(run.take_step())
            bar.update()
            done = run.step == recipe.total_steps
            if run.step % recipe.meet_every and not done:
                continue
            stop = run.average_parameters(bool(interrupted))
            run.ema.update_parameters(run.model)
            run.seconds = spent + time.perf_counter() - started
            if run.rank == 0 and (run.step % 50 == 0 or done):
                point = mean_of(run.recent) | {"step": run.step, "seconds": run.seconds}
                if run.step > recipe.look_steps and run.step % validate_every == 0:
                    point |= run.validate()
                run.curves.append(point)
                bar.set_postfix({k: f"{v:.3f}" for k, v in point.items() if v < 20})
                run.recent = []
            if run.rank == 0 and (stop or done or time.perf_counter() - saved > save_every):
                run.save()
                saved = time.perf_counter()
            if stop:
                break


def export(run: Run, target: Path, tokenizer: Path = TINY) -> None:
    """Write the running mean to `target`: bfloat16, the published layout, recipe and curves."""
    recipe = run.recipe
    stages = {"looks": 0, "speaks": recipe.look_steps}
    stages["cools"] = recipe.total_steps - recipe.cool_steps
    record = {"recipe": asdict(recipe), "seconds": round(run.seconds), "stages": stages}
    with replacing(target) as draft:
        save_model(run.mean_model().to(torch.bfloat16), draft)
        shutil.copyfile(tokenizer / "tokenizer.model", draft / "tokenizer.model")
        ImageProcessor(scenes.SIZE).save_pretrained(draft)
        curves = json.dumps(record | {"points": run.curves})
        (draft / "curves.json").write_text(curves + "\n")
        (draft / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """The command line; 2 and one line on bad input."""
    parser = Parser(  # whose errors are one line
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the run")
    parser.add_argument("--config", type=Path, help="JSON with the fields of Recipe")
    parser.add_argument("--init", type=Path, help="start from the weights in this folder")
    parser.add_argument("--export", type=Path, help="write the run's model here, do not train")
    options = parser.parse_args(arguments)
    parallel = "RANK" in os.environ  # started by torchrun
    try:
        config = options.config or options.work / "config.json"
        recipe = Recipe.read(config)
        torch.set_num_threads(1)
        if parallel:
            dist.init_process_group("gloo")
        run = Run(recipe, options.work)
        if options.export:
            export(run, options.export)
            return 0
        if options.init and run.step == 0:
            run.start_from(options.init)
        if run.rank == 0:
            with replacing(options.work) as draft:
                text = json.dumps(asdict(recipe), indent=1)
                (draft / "config.json").write_text(text + "\n")
        train(run)
        if parallel:
            dist.barrier()  # nobody leaves while another still talks to it
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if parallel and dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
