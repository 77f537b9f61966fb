"""Train the tiny PaliGemma that the course ships (paligemma/assets/tiny), on two CPU cores.

Three stages, one run, in float32:
  look   the vision tower alone learns what each patch shows (its head is thrown away after);
  speak  the whole model learns captions and short answers, with scenes of one object first,
         then of one or two, then of up to four; the patch loss stays on as a small helper;
  cool   the same, with the learning rate falling to zero.

    python tools/train_tiny.py --work DIR             # train; Ctrl-C and run again to go on
    python tools/train_tiny.py --work DIR --export    # write paligemma/assets/tiny
    python tools/train_tiny.py --evaluate             # figures of the shipped model
    python tools/train_tiny.py --evaluate --card      # the same, and write them into its card

DIR gets checkpoint.pt (written whole or not at all), curves.json and tokenizer.model.
"""

import argparse
import io
import json
import os
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import scenes
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from make_tokenizer import PLAIN_TEXT

from paligemma.checkpoint import load_model, save_model
from paligemma.gemma import GemmaConfig
from paligemma.generation import generate
from paligemma.image_processor import ImageProcessor
from paligemma.model import PaliGemma, PaliGemmaConfig
from paligemma.processor import Processor, collate
from paligemma.siglip import SiglipVisionConfig
from paligemma.tokenizer import Tokenizer
from paligemma.training import Muon

TINY = scenes.ASSETS / "tiny"
RECIPE = (
    "seed batch lr look_steps speak_steps cool_steps warm_steps processes meet_every muon "
    "vision_width vision_layers text_width text_layers text_mlp"
).split()

ORDINARY = 640  # pieces before <loc0000>: control ids, "\n", 256 bytes, words and their parts


def make_tokenizer(path, seed=0):
    """Train a small SentencePiece model and give it the published layout.

    The ids: pad 0, eos 1, bos 2, unk 3, "\\n" 4, the ordinary pieces, then `<loc0000>` to
    `<loc1023>` and `<seg000>` to `<seg127>`. `<image>` is the next id, added outside the file.
    """
    from sentencepiece import sentencepiece_model_pb2 as model_pb2  # needs protobuf

    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(30_000):
        count = int(rng.integers(1, 5))
        kinds = scenes.draw_kinds(rng, count)
        scene = scenes.Scene(None, kinds, None)
        lines += [scene.caption, *scenes.question(rng, scene), "caption en"]
    for kind in range(len(scenes.NAMES)):  # every form of every word, equally often
        for count in (1, 2, 3, 4, 5):
            lines += [scenes.phrase(kind, count)] * 40
        lines += [f"where is the {scenes.NAMES[kind]}?", f"detect {scenes.NAMES[kind]}"] * 40
        lines += [f"segment {scenes.NAMES[kind]} ; {scenes.NAMES[(kind + 1) % 48]}"] * 40
    lines += PLAIN_TEXT.splitlines() * 20
    stream = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=stream,
        model_type="bpe",
        vocab_size=ORDINARY,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=["\n"],
        num_threads=1,
        minloglevel=2,
    )
    proto = model_pb2.ModelProto.FromString(stream.getvalue())
    for name in [f"<loc{i:04d}>" for i in range(1024)] + [f"<seg{i:03d}>" for i in range(128)]:
        piece = proto.pieces.add()
        piece.piece, piece.score = name, 0.0
        piece.type = model_pb2.ModelProto.SentencePiece.USER_DEFINED
    path.write_bytes(proto.SerializeToString())


# ---------------------------------------------------------------- data


class Batches:
    """Batches of scenes as tensors; batch `step` depends on its number and nothing else.

    Args:
        processor: `Processor`, lays out the text.
        seed: seed of the world.
        size: scenes a batch.
    """

    def __init__(self, processor, seed=0, size=64):
        self.seed, self.size, self.pad_id = seed, size, processor.tokenizer.pad_id
        self.prefix = lru_cache(maxsize=None)(processor.encode_prefix)
        self.suffix = lru_cache(maxsize=None)(processor.encode_suffix)

    def tensors(self, made, prompts, answers):
        """Scenes, prompts and answers to the tensors that `Processor` makes of them, faster.

        No resizing: a scene has the model's own size.
        """
        pixels = torch.from_numpy(np.stack([scene.image for scene in made])).permute(0, 3, 1, 2)
        batch = {"pixel_values": (pixels.float() / 255 - 0.5) / 0.5}
        suffixes = [self.suffix(answer) for answer in answers]
        batch |= collate([self.prefix(prompt) for prompt in prompts], suffixes, self.pad_id)
        return batch | {"logits_to_keep": max(map(len, suffixes)) + 1}

    def train(self, step, objects, part=(0, 1), asks=0.25):
        """Batch number `step` and what each patch of it shows, int64[B, 2, 64].

        Args:
            step: which.
            part: (i, n): every n-th scene of it, from the i-th.
            objects: numbers of objects to draw from.
            asks: share of questions; the rest are captions.
        """
        made, texts = [], []
        for index in range(step * self.size + part[0], (step + 1) * self.size, part[1]):
            made.append(scenes.make_scene(index, "train", self.seed, objects))
            rng = np.random.default_rng((self.seed, 9, index))
            ask = rng.random() < asks
            texts.append(scenes.question(rng, made[-1]) if ask else caption_task(made[-1]))
        targets = torch.from_numpy(np.stack([scenes.patch_targets(scene) for scene in made]))
        return self.tensors(made, *zip(*texts)), targets


def caption_task(scene):
    """The main task: (prompt, answer)."""
    return "caption en", scene.caption


# ---------------------------------------------------------------- model


def make_model(options, pieces):
    """A PaliGemma of the size asked for, with weights drawn at a scale that small models like."""
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=options.vision_width,
            intermediate_size=4 * options.vision_width,
            num_hidden_layers=options.vision_layers,
            num_attention_heads=4,
            image_size=scenes.SIZE,
            patch_size=scenes.PATCH,
        ),
        text_config=GemmaConfig(
            vocab_size=-(-(pieces + 1) // 64) * 64,
            hidden_size=options.text_width,
            intermediate_size=options.text_mlp,
            num_hidden_layers=options.text_layers,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=32,
        ),
        image_token_index=pieces,
    )
    model = PaliGemma(config)
    torch.nn.init.normal_(model.language_model.embed_tokens.weight, std=options.text_width**-0.5)
    torch.nn.init.normal_(model.vision_tower.embeddings.position_embedding.weight, std=0.02)
    return model


class PatchHead(torch.nn.Module):
    """Says for each patch which kind covers it and which has its centre there; thrown away after.

    Its loss gives the vision tower 64 lessons a picture where a caption gives one.
    """

    def __init__(self, width):
        super().__init__()
        self.classes = len(scenes.NAMES) + 1
        self.linear = torch.nn.Linear(width, 2 * self.classes)
        self.weight = torch.ones(self.classes)
        self.weight[-1] = 0.2  # "nothing here" is most of the picture

    def forward(self, features, targets):
        """float32[B, 64, D] and int64[B, 2, 64] to a loss and the accuracy on objects."""
        logits = self.linear(features).unflatten(-1, (2, self.classes)).transpose(1, 2)
        logits, targets = logits.flatten(0, 2), targets.flatten()
        loss = F.cross_entropy(logits, targets, self.weight)
        there = targets < self.classes - 1
        return loss, (logits.argmax(-1) == targets)[there].float().mean()


def make_optimizers(model, head, options):
    """Muon for matrices inside blocks, AdamW for embeddings, norms, biases and the rest."""
    matrices, others, plain = [], [], []
    for name, p in [*model.named_parameters(), *head.named_parameters()]:
        if options.muon and p.ndim == 2 and "layers" in name:
            matrices.append(p)
        else:
            (others if p.ndim > 1 else plain).append(p)
    groups = [{"params": others, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98), fused=True)
    for group in adamw.param_groups:
        group["factor"] = 0.5 if matrices else 1.0
    return [adamw, Muon(matrices, options.lr)] if matrices else [adamw]


# ---------------------------------------------------------------- training

# (step of the speaking stage, numbers of objects to draw from, from then on)
CURRICULUM = [(0, (1,)), (150, (1, 1, 2, 2)), (500, (1, 1, 2, 2, 2, 3, 3, 4))]


def learning_rate(step, options):
    """Warm up at the start of each stage that starts something new, fall to 0 at the end."""
    total, cool = options.look_steps + options.speak_steps, options.cool_steps
    since = step - options.look_steps if step >= options.look_steps else step
    warm = min(1.0, (since + 1) / options.warm_steps)
    return options.lr * warm * min(1.0, (total - step) / max(1, cool))


def objects_at(step, options):
    """The curriculum: which numbers of objects the scenes of this step have."""
    if step < options.look_steps:
        return CURRICULUM[-1][1]
    return [o for start, o in CURRICULUM if step - options.look_steps >= start][-1]


def training_step(model, head, batch, targets, speak, seen):
    """Loss of one batch; `seen` holds the tower's features after the model ran."""
    if not speak:
        patch_loss, accuracy = head(model.vision_tower(batch["pixel_values"]), targets)
        return patch_loss, {"patch": patch_loss.item(), "patch right": accuracy.item()}
    loss = model(**batch).loss
    patch_loss, accuracy = head(seen["features"], targets)
    total = loss + 0.5 * patch_loss
    return total, {
        "text": loss.item(),
        "patch": patch_loss.item(),
        "patch right": accuracy.item(),
    }


def validate(model, batches, count=256, size=64):
    """Share of captions all of whose tokens are the model's first choice, one and two kinds.

    With the true answer fed in, all tokens right is the same as greedy decoding being right.
    """
    model.eval()
    right = {1: [], 2: [], 3: []}
    with torch.inference_mode():
        for first in range(0, count, size):
            made = [
                scenes.make_scene(i, "validation", batches.seed) for i in range(first, first + size)
            ]
            batch = batches.tensors(made, ["caption en"] * size, [s.caption for s in made])
            labels = batch["labels"][:, -batch["logits_to_keep"] :][:, 1:]
            choice = model(**batch).logits[:, :-1].argmax(-1)
            for scene, good in zip(made, ((choice == labels) | (labels == -100)).all(1).tolist()):
                right[len(set(scene.kinds))].append(good)
    model.train()
    return {f"{kinds} kinds right": float(np.mean(good)) for kinds, good in right.items()}


@torch.no_grad()
def average(parameters):
    """Give every process the mean of all processes' weights, in one message."""
    parameters = list(parameters)
    flat = torch.cat([p.flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.copy_(part.view_as(p))


def train(rank, options):
    """Train, or go on where the checkpoint in `options.work` stopped.

    Each process takes its part of every batch and steps on its own; every `meet_every` steps
    the processes average their weights ("local SGD"). On a busy machine this is much faster than
    averaging gradients at each step or than threads that meet at each operation: nobody waits.
    """
    torch.set_num_threads(1)
    if options.processes > 1:
        rendezvous = f"file://{options.work.resolve()}/.rendezvous"
        dist.init_process_group(
            "gloo", init_method=rendezvous, rank=rank, world_size=options.processes
        )
    torch.manual_seed(options.seed)
    tokenizer_file, checkpoint = options.work / "tokenizer.model", options.work / "checkpoint.pt"
    tokenizer = Tokenizer(tokenizer_file)
    patches = (scenes.SIZE // scenes.PATCH) ** 2
    processor = Processor(tokenizer, ImageProcessor(scenes.SIZE), patches)
    batches = Batches(processor, options.seed, options.batch)
    model, head = make_model(options, tokenizer.image_id), PatchHead(options.vision_width)
    optimizers = make_optimizers(model, head, options)
    seen = {}
    model.vision_tower.register_forward_hook(lambda *call: seen.update(features=call[2]))
    step, spent, curves = 0, 0.0, []
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        head.load_state_dict(saved["head"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        step, spent, curves = saved["step"], saved["seconds"], saved["curves"]
        torch.set_rng_state(saved["rng"])
        print(f"going on at step {step}", flush=True)

    def save():
        state = {
            "model": model.state_dict(),
            "head": head.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "rng": torch.get_rng_state(),
            "step": step,
            "seconds": spent + time.perf_counter() - start,
            "curves": curves,
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
        (options.work / "curves.json").write_text(json.dumps(curves))

    start = saved_at = time.perf_counter()
    total, recent = options.look_steps + options.speak_steps, []
    while step < total:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, options) * group.get("factor", 1.0)
        part = (rank, options.processes)
        batch, targets = batches.train(step, objects_at(step, options), part)
        speak = step >= options.look_steps
        loss, figures = training_step(model, head, batch, targets, speak, seen)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*model.parameters(), *head.parameters()], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent.append(figures)
        step += 1
        met = options.processes == 1
        if not met and (step % options.meet_every == 0 or step == total):
            average([*model.parameters(), *head.parameters()])
            met = True
        if rank == 0 and (step % 50 == 0 or step == total):
            point = {k: float(np.mean([r[k] for r in recent if k in r])) for k in recent[-1]}
            point |= {"step": step, "scenes": step * options.batch}
            point["seconds"] = spent + time.perf_counter() - start
            if speak and (step % 250 == 0 or step == total):
                point |= validate(model, batches)
            curves.append(point)
            recent = []
            print(
                " ".join(f"{k} {v:.3f}" if v < 20 else f"{k} {v:.0f}" for k, v in point.items()),
                flush=True,
            )
        if (
            rank == 0
            and met
            and (time.perf_counter() - saved_at > options.save_every or step == total)
        ):
            save()
            saved_at = time.perf_counter()


# ---------------------------------------------------------------- shipping


def export(options):
    """Write the run's model to paligemma/assets/tiny in bfloat16 and the published layout."""
    saved = torch.load(options.work / "checkpoint.pt", weights_only=True)
    tokenizer = Tokenizer(options.work / "tokenizer.model")
    model = make_model(options, tokenizer.image_id)
    model.load_state_dict(saved["model"])
    TINY.mkdir(parents=True, exist_ok=True)
    save_model(model.to(torch.bfloat16), TINY)
    (TINY / "tokenizer.model").write_bytes((options.work / "tokenizer.model").read_bytes())
    ImageProcessor(scenes.SIZE).save_pretrained(TINY)
    recipe = {k: v for k, v in vars(options).items() if isinstance(v, int | float) and k in RECIPE}
    curves = {"recipe": recipe, "seconds": round(saved["seconds"]), "points": saved["curves"]}
    (TINY / "curves.json").write_text(json.dumps(curves) + "\n")
    print(f"wrote step {saved['step']} to paligemma/assets/tiny")


def collect(wanted, count, **how):
    """The first `count` test scenes for which `wanted(scene)` holds."""
    found, index = [], 0
    while len(found) < count:
        scene = scenes.make_scene(index, "test", **how)
        index += 1
        if wanted(scene):
            found.append(scene)
    return found


def answers(model, processor, images, prompts, size=50):
    """What the model says, greedily, through the package's own path."""
    said = []
    for first in range(0, len(images), size):
        part = slice(first, first + size)
        batch = processor(images[part], prompts[part])
        said += map(processor.decode, generate(model, **select(batch), max_new_tokens=24))
    return said


def select(batch):
    """The tensors that `generate` takes."""
    return {k: batch[k] for k in ("input_ids", "pixel_values", "attention_mask")}


def score(model, processor, made, texts):
    """Share of exact answers in percent: with the right pictures and with each other's."""
    images = [scene.image for scene in made]
    prompts, truths = zip(*texts)
    result = {"scenes": len(made)}
    for name, shown in (("exact", images), ("shuffled", images[1:] + images[:1])):
        said = answers(model, processor, shown, list(prompts))
        result[name] = 100 * float(np.mean([a == b for a, b in zip(said, truths)]))
    return result


def evaluate(count, path=TINY):
    """Figures of a model directory on `count` test scenes each: {task: {scenes, exact, shuffled}}.

    `shuffled` is the control: the same questions, each asked about another scene's picture.
    """
    model, processor = load_model(path), Processor.from_pretrained(path)
    tasks = {
        "caption, one kind (1 to 4 objects)": lambda s: len(set(s.kinds)) == 1,
        "caption, two kinds (2 to 4 objects)": lambda s: len(set(s.kinds)) == 2,
        "caption, three kinds (3 or 4 objects)": lambda s: len(set(s.kinds)) == 3,
        "caption, two kinds never seen together": lambda s: len(set(s.kinds)) == 2,
    }
    figures = {}
    for task, wanted in tasks.items():
        unseen = "never" in task  # then two objects or more, as seen pairs have
        made = collect(wanted, count, unseen=unseen, objects=(2, 3, 4) if unseen else (1, 2, 3, 4))
        figures[task] = score(model, processor, made, [caption_task(scene) for scene in made])
        print(task, figures[task], flush=True)
    for task, word in (("answer how many", "how many"), ("answer yes or no", "is there")):
        made, texts = [], []
        for index, scene in enumerate(collect(lambda s: True, 4 * count)):
            text = scenes.question(np.random.default_rng((11, index)), scene)
            if word in text[0] and len(made) < count:
                made.append(scene)
                texts.append(text)
        figures[task] = score(model, processor, made, texts)
        print(task, figures[task], flush=True)
    return figures


CARD = """---
license: mit
library_name: paligemma
pipeline_tag: image-text-to-text
---

# tiny: a PaliGemma small enough to train on two CPU cores

A model with PaliGemma's architecture and checkpoint layout, and {parameters:,} parameters
instead of 2,923,466,480. It knows one world: scenes of 112 × 112 pixels with one to four emoji of
{kinds} kinds, from left to right, on plain, shaded, noisy or photographic backgrounds. It captions
them: `caption en` → `a cat and two dogs`. It was trained on two questions as well
(`answer en how many cats are there?` → `2`, `answer en is there a bee?` → `yes`); how far it got
with each task stands below.

It is a teaching model. About a photograph, another emoji or any other question it says
something, and that means nothing.

## Figures

Greedy decoding in float32 through `load_model`, `Processor` and `generate`, on test scenes that
training did not see; an answer counts only when every word is right. "Shuffled" is the control:
the same prompts with the pictures permuted between scenes. What a row gains over it comes from
looking at the picture; where the two are close, the task is not learnt. One run, one seed; the
sampling error of a share of {scenes:,} scenes is at most ± {error:.1f} points (95 %).

{table}

{weak}

New in a test scene is how it is composed: the emoji pictures and the two photographs behind some
scenes are the ones of training. The pair rows show about the same mix of two, three and four
objects, but not exactly the same, so a difference of a few points between them means nothing.

To repeat: `python tools/train_tiny.py --evaluate --scenes {scenes}` (seeds are fixed).

## Recipe

* Vision tower: width {vision_width}, {vision_layers} layers, 4 heads, patch 14: 64 image tokens.
  Text: width {text_width}, {text_layers} layers, 4 query heads, 1 key/value head of width 32,
  MLP {text_mlp}. Trained in float32, stored in bfloat16.
* Tokenizer: SentencePiece BPE trained on the captions, {pieces} pieces in the published order:
  control tokens, ordinary pieces, `<loc0000>`…`<loc1023>`, `<seg000>`…`<seg127>`; `<image>` is
  the next id.
* Data: `tools/scenes.py`, composed while training, {seen:,} scenes in all. One pair of kinds in
  ten never stands together in a training scene.
* {look_steps} steps: the vision tower alone learns what each patch shows (a linear head, thrown
  away after). Then {speak_steps} steps of the prefix-LM loss on captions and, one time in
  four, a question, the patch loss added at half weight: one object at first, one or two after
  {second} steps, up to four after {third}.
* Batch {batch}; Muon on the matrices inside the blocks, AdamW on the rest; peak learning rate
  {lr} (half of it for AdamW), constant, then linear to zero over the last {cool_steps} steps;
  gradient norm clipped at 1.
* {minutes:.0f} minutes on two CPU cores shared with other work. The curves are in `curves.json`.

To repeat: `python tools/train_tiny.py --work DIR`, then with `--export`.

## Licence

Weights: MIT, as the course. The emoji pictures they were trained on are Noto Emoji (Google,
Apache License 2.0); see NOTICE.
"""


def write_card(figures):
    """Write the figures and the model card next to the model; nothing in it is typed by hand."""
    curves = json.loads((TINY / "curves.json").read_text())
    rows = [
        f"| {task} | {f['scenes']:,} | {f['exact']:.1f} % | {f['shuffled']:.1f} % |"
        for task, f in figures.items()
    ]
    count = min(f["scenes"] for f in figures.values())
    weak = [task for task, f in figures.items() if f["exact"] - f["shuffled"] < 10]
    text = CARD.format(
        **curves["recipe"],
        parameters=sum(p.numel() for p in load_model(TINY).parameters()),
        kinds=len(scenes.NAMES),
        table="\n".join(
            ["| task | test scenes | exact | shuffled |", "|---|---:|---:|---:|", *rows]
        ),
        scenes=count,
        error=98 / count**0.5,
        weak=f"Not learnt (within ten points of the control): {', '.join(weak) or 'none'}.",
        pieces=Tokenizer.from_pretrained(TINY).sp.get_piece_size(),
        seen=curves["points"][-1]["scenes"],
        second=CURRICULUM[1][0],
        third=CURRICULUM[2][0],
        minutes=curves["seconds"] / 60,
    )
    (TINY / "README.md").write_text(text)
    (TINY / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, help="where the run keeps its checkpoint, curves and tokenizer")
    add("--export", action="store_true", help="write the run's model to paligemma/assets/tiny")
    add("--evaluate", action="store_true", help="print figures of the shipped model")
    add("--card", action="store_true", help="with --evaluate: write them into the model card")
    add("--scenes", type=int, default=1000, help="test scenes a figure (default %(default)s)")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=64)
    add("--lr", type=float, default=6e-3, help="peak learning rate (default %(default)s)")
    add("--look-steps", type=int, default=550)
    add("--speak-steps", type=int, default=1600, help="cooling included")
    add("--cool-steps", type=int, default=500)
    add("--warm-steps", type=int, default=50)
    add("--vision-width", type=int, default=128)
    add("--vision-layers", type=int, default=4)
    add("--text-width", type=int, default=128)
    add("--text-layers", type=int, default=3)
    add("--text-mlp", type=int, default=256)
    add("--adamw", action="store_true", help="AdamW for everything, to compare with Muon")
    add("--save-every", type=float, default=120, help="seconds between checkpoints")
    add("--meet-every", type=int, default=10, help="steps between averages of the processes")
    add("--processes", type=int, default=2, help="of one thread each (default %(default)s)")
    options = parser.parse_args()
    options.muon = not options.adamw
    if options.evaluate:
        figures = evaluate(options.scenes)
        if options.card:
            write_card(figures)
        return
    if options.work is None:
        parser.error("--work DIR is needed: where the run keeps its checkpoint")
    if options.export:
        export(options)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / "tokenizer.model").exists():
        make_tokenizer(options.work / "tokenizer.model")
    (options.work / ".rendezvous").unlink(missing_ok=True)
    if options.processes > 1:
        torch.multiprocessing.spawn(train, (options,), options.processes)
    else:
        train(0, options)


if __name__ == "__main__":
    main()
