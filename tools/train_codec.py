"""Train the mask codec that ships with the tiny model, on the alpha of real emoji.

Masks come from two places, half and half: what is visible of objects in training scenes (module
scenes), and every shape of Noto emoji (npm package `emoji-datasource-google`) turned, stretched and
partly covered. Of the emoji that are no kind of the scenes, every eighth is never trained on: they
measure the codec (arrows, letters and other signs left out), and the lesson mask_codec shows 48 of
them, from `paligemma/assets/mask_codec/held_out.png`.

    python tools/train_codec.py --work build/codec          # npm pack, then about ten minutes
    python tools/train_codec.py --work build/codec --package DIR      # an unpacked package
    python tools/train_codec.py --work build/codec --report           # measure what is shipped

The state is saved every 100 steps; the same command goes on where it stopped. Last, the decoder
alone is trained on, with codes that no longer change.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from make_assets import NPM_PACKAGE, unpack
from PIL import Image
from torch.nn import functional as F

from paligemma.mask_codec import MaskCodec, mask_iou, restart_dead_codes
from paligemma.scenes import ASSETS, KINDS, NAMES, SIZE, make_scene
from paligemma.segmentation import crop_masks, encode_segments, parse_segments
from paligemma.support.replacing import replacing

SHIPPED = ASSETS / "tiny"
HELD_OUT = ASSETS / "mask_codec" / "held_out.png"
SHOWN = 48  # held-out shapes in the picture, eight in a row


def read_shapes(package):
    """Alpha of every emoji, without variants of skin, flags and near doubles.

    Returns:
        kinds: uint8[48, 64, 64] in the order of KINDS; others: uint8[n, 64, 64]; signs: bool[n],
        whether it is an arrow, a letter or another sign and no picture of a thing.
    """
    kinds = {kind["codepoint"]: i for i, kind in enumerate(KINDS)}
    ours, others, signs, seen = {}, [], [], np.zeros((0, 1024), np.float32)
    entries = json.loads((package / "emoji.json").read_text(encoding="utf-8"))
    for entry in sorted(entries, key=lambda e: (e["unified"] not in kinds, e["sort_order"])):
        file = package / "img" / "google" / "64" / entry["image"]
        if entry["category"] in ("Flags", "Component") or not file.is_file():
            continue
        with Image.open(file) as picture:
            alpha = np.asarray(picture.convert("RGBA").getchannel("A").resize((64, 64)))
        if (alpha >= 128).sum() < 200:
            continue
        shape = crop_masks(*tight(alpha >= 128))[0, ::2, ::2].flatten().numpy()
        both = seen @ shape
        new = not (both > 0.93 * (seen.sum(1) + shape.sum() - both)).any()
        if entry["unified"] in kinds:
            ours[kinds[entry["unified"]]] = alpha
        elif new:  # no near double of one before
            others.append(alpha)
            signs.append(entry["category"] == "Symbols")
        if new:
            seen = np.concatenate([seen, shape[None]])
    return np.stack([ours[kind] for kind in range(len(kinds))]), np.stack(others), np.array(signs)


def tight(mask):
    """([box around what is set], [mask])."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [(columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)], [mask]


def varied(rng, alpha, other):
    """One shape turned, resized, stretched, mirrored and, at times, covered by another.

    Returns:
        uint8[64, 64], the mask inside its box, 0 to 255; None when too little is left.
    """
    picture = Image.fromarray(alpha).rotate(
        rng.uniform(-24, 24), Image.Resampling.BICUBIC, expand=True
    )
    side = 2 ** rng.uniform(math.log2(20), math.log2(90))
    stretch = 2 ** rng.uniform(-0.25, 0.25)
    factors = side / 64 * stretch, side / 64 / stretch
    size = [max(8, round(f * length)) for f, length in zip(factors, picture.size)]
    mask = np.asarray(picture.resize(size, Image.Resampling.LANCZOS)) >= 128
    mask = mask[:, :: 1 if rng.random() < 0.5 else -1].copy()
    if rng.random() < 0.3:
        cover = np.asarray(Image.fromarray(other).resize(size)) >= 128
        shift = (rng.uniform(0.45, 0.95, 2) * rng.choice([-1, 1], 2) * mask.shape).astype(int)
        moved = np.zeros_like(mask)
        low, high = np.maximum(shift, 0), np.minimum(shift, 0) + mask.shape
        moved[low[0] : high[0], low[1] : high[1]] = cover[
            low[0] - shift[0] : high[0] - shift[0], low[1] - shift[1] : high[1] - shift[1]
        ]
        mask &= ~moved
    if mask.sum() < 30:
        return None
    return (crop_masks(*tight(mask))[0] * 255).round().to(torch.uint8)


def pool_of_shapes(shapes, count, seed):
    """`count` varied masks of these shapes, uint8[count, 64, 64]."""
    rng, masks = np.random.default_rng(seed), []
    while len(masks) < count:
        mask = varied(rng, *shapes[rng.integers(0, len(shapes), 2)])
        if mask is not None:
            masks.append(mask)
    return torch.stack(masks)


def scene_masks(split, scenes):
    """Boxes and visible masks of the objects of scenes: (int[n, 4], bool[n, 112, 112])."""
    made = [make_scene(index, split) for index in scenes]
    return np.concatenate([s.boxes for s in made]), np.concatenate([s.masks for s in made])


def pool_of_scenes(scenes):
    """The same as the codec sees them, uint8[n, 64, 64]."""
    parts = []
    for start in range(0, scenes, 500):
        boxes, masks = scene_masks("train", range(start, min(start + 500, scenes)))
        parts.append((crop_masks(boxes, masks) * 255).round().to(torch.uint8))
    return torch.cat(parts)


def scene_overlap(codec, scenes=400):
    """IoU of test scenes' masks, written as text and read again: float64[objects]."""
    boxes, masks = scene_masks("test", range(scenes))
    text = encode_segments(boxes, masks, codec, SIZE, SIZE)
    drawn = [parse_segments(words, SIZE, SIZE, codec)[0].mask for words in text]
    return mask_iou(drawn, masks)


def measure(codec, held):
    """Mean IoU through the sixteen codes, on what training never saw.

    Returns:
        dict: "scenes" (`scene_overlap`); "shapes" (held-out emoji, 64 × 64); "one wrong" (of the
        sixteen codes of a shape a random one is replaced by its nearest neighbour in the
        codebook); "perplexity" (how many of the codes these shapes really use).
    """
    target = held.float() / 255
    codes, e = codec.encode(target), codec._vq_vae._embedding.detach()
    drawn = codec.decode(codes) > 0
    result = {"scenes": scene_overlap(codec), "shapes": mask_iou(drawn, target > 0.5)}
    counts = torch.bincount(codes.flatten(), minlength=codec.codes) / codes.numel()
    perplexity = torch.exp(-torch.special.xlogy(counts, counts).sum())
    near = torch.cdist(e, e).fill_diagonal_(torch.inf).argmin(1)
    rows = torch.arange(len(codes))
    columns = torch.randint(16, (len(codes),), generator=torch.Generator().manual_seed(0))
    codes[rows, columns] = near[codes[rows, columns]]
    result["one wrong"] = mask_iou(codec.decode(codes) > 0, target > 0.5)
    result = {name: round(float(ious.mean()), 4) for name, ious in result.items()}
    return result | {"perplexity": round(float(perplexity), 1)}


def save(path, state):
    with replacing(path.parent) as draft:
        torch.save(state, draft / path.name)


def some_masks(pools, batch):
    """A batch, as much from each pool, half of it mirrored: float32[batch, 64, 64]."""
    masks = torch.cat([p[torch.randint(len(p), (batch // len(pools),))] for p in pools])
    masks = masks.float() / 255
    return torch.where(torch.rand(len(masks), 1, 1) < 0.5, masks.flip(2), masks)


def error(drawn, masks):
    """Squared error, nothing for right beyond ±1, and a push to the right side of 0."""
    target = 2 * masks - 1
    wrong = torch.where(drawn * target.sign() > 1, 0.0, drawn - target)
    return wrong.square().mean() + 0.1 * F.softplus(-4 * drawn * target).mean()


def train(codec, pools, held, work, steps, batch=128, peak=2e-3):
    """Train with AdamW, mirrored masks, dead codes restarted; resumes from `work`."""
    book = [codec._vq_vae._embedding]
    others = [p for p in codec.parameters() if p is not book[0]]
    groups = [{"params": others, "speed": 1}, {"params": book, "speed": 4, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, peak, betas=(0.9, 0.98), weight_decay=1e-4)
    counts, first, file = torch.zeros(codec.codes, dtype=torch.int64), 0, work / "state.pt"
    if file.exists():
        state = torch.load(file, weights_only=True)
        codec.load_state_dict(state["codec"])
        optimizer.load_state_dict(state["optimizer"])
        first, counts = state["step"], state["counts"]
    start, dead = time.time(), 0
    for step in range(first, steps):
        torch.manual_seed(step)
        for group in optimizer.param_groups:
            share = step / steps
            wave = min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * share))
            group["lr"] = peak * group["speed"] * wave
        masks = some_masks(pools, batch)
        if step == 0:  # all codes start where the encoder looks
            restart_dead_codes(codec, masks, counts)
        drawn, codes, apart = codec(masks)
        loss = error(drawn, masks) + 0.25 * apart
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        counts += torch.bincount(codes.flatten(), minlength=codec.codes)
        if (step + 1) % 50 == 0:
            dead = restart_dead_codes(codec, masks, counts) if step < 0.7 * steps else 0
            counts.zero_()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            save(
                file,
                {
                    "codec": codec.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "counts": counts,
                },
            )
            seconds = (time.time() - start) / (step + 1 - first)
            line = f"{step + 1:6} loss {loss.item():.4f} apart {apart.item():.4f} dead {dead}"
            if (step + 1) % 500 == 0:
                codec.eval()
                line += f" {measure(codec, held)}"
                codec.train()
            print(f"{line} {seconds * 1000:.0f} ms a step", flush=True)


@torch.no_grad()
def sort_codes(codec):
    """Number the codes from empty to full: by what each draws alone all over the square."""
    order = codec.decode(torch.arange(codec.codes)[:, None].expand(-1, 16)).mean((1, 2)).argsort()
    codec._vq_vae._embedding.copy_(codec._vq_vae._embedding[order])


def polish(codec, pools, held, steps, batch=128, peak=1e-3):
    """Train the decoder alone, on codes that no longer change: what they spell stays the same."""
    optimizer = torch.optim.AdamW(codec.decoder.parameters(), peak, betas=(0.9, 0.98))
    for step in range(steps):
        torch.manual_seed(step)
        wave = min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = peak * wave
        masks = some_masks(pools, batch)
        drawn = codec.decode_vectors(codec._vq_vae(codec.encode(masks)).detach())
        optimizer.zero_grad()
        error(drawn, masks).backward()
        torch.nn.utils.clip_grad_norm_(codec.decoder.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 500 == 0:
            print(f"decoder {step + 1:6} {measure(codec, held)}", flush=True)


def show_held_out(held):
    """Write the picture of held-out shapes that lesson mask_codec reads."""
    HELD_OUT.parent.mkdir(parents=True, exist_ok=True)
    chosen = held[torch.linspace(0, len(held) - 1, SHOWN).round().long()]
    sheet = chosen.unflatten(0, (-1, 8)).permute(0, 2, 1, 3).flatten(0, 1).flatten(1)
    Image.fromarray(sheet.numpy()).save(HELD_OUT, optimize=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="directory of pools and state")
    parser.add_argument("--package", type=Path, help="an unpacked emoji-datasource-google")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--polish", type=int, default=1500, help="steps of the decoder alone")
    parser.add_argument("--report", action="store_true", help="only measure what is shipped")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    pools = args.work / "pools.pt"
    if not pools.exists():
        with tempfile.TemporaryDirectory() as folder:
            kinds, others, signs = read_shapes(args.package or unpack(NPM_PACKAGE, folder))
        out = np.arange(len(others)) % 8 == 0
        held = torch.cat([crop_masks(*tight(alpha >= 128)) for alpha in others[out & ~signs]])
        trained = np.concatenate([kinds, others[~out]])
        print(f"{len(NAMES)} kinds, {len(others)} other shapes, {len(held)} things held out")
        parts = [pool_of_scenes(5000), pool_of_shapes(trained, 16000, seed=0)]
        held = (held * 255).round().to(torch.uint8)
        save(pools, {"parts": parts, "held": held})
    loaded = torch.load(pools, weights_only=True)
    parts, held = loaded["parts"], loaded["held"]
    if not args.report:
        torch.manual_seed(0)
        codec = MaskCodec(codes=128, code_width=32, width=48)
        codec.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  twice as fast
        train(codec, parts, held, args.work, args.steps)
        sort_codes(codec)
        polish(codec, parts, held, args.polish)
        codec.save_pretrained(SHIPPED)
        show_held_out(held)
    print(measure(MaskCodec.from_pretrained(SHIPPED), held))


if __name__ == "__main__":
    main()
