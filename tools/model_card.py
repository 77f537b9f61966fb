"""Measure the shipped tiny model and write its card, its gallery of mistakes and README's table.

    python tools/model_card.py                 # 1,000 test scenes a row, half an hour
    python tools/model_card.py --written       # write again from the figures measured last

Nothing in the card that is a result is typed by hand.
"""

import argparse
import json
import re
import textwrap
from dataclasses import asdict
from pathlib import Path

from other_renderer import NEW, measure_all
from tiny_batches import Recipe
from train_codec import scene_overlap

from paligemma import scenes
from paligemma.evaluation import evaluate, predict, row_questions
from paligemma.inference import load
from paligemma.mask_codec import MaskCodec
from paligemma.plotting import show_images

ROOT = Path(__file__).resolve().parent.parent
TINY = scenes.ASSETS / "tiny"

CARD = """---
license: mit
library_name: paligemma
pipeline_tag: image-text-to-text
---

# tiny: a PaliGemma small enough to train on two CPU cores

A model with PaliGemma's architecture and checkpoint layout, and {parameters:,} parameters instead
of 2,923,466,480. It knows one world: scenes of 112 × 112 pixels with one to five emoji of {kinds}
kinds on plain, shaded, noisy, patterned or photographic backgrounds.

| prompt | answer |
|---|---|
| `caption en`, `caption de`, `caption fr` | `a cat and two dogs`, `Hundegesicht ×2`, … |
| `answer en how many dogs are there?` | `2` |
| `answer en where is the cat?` | `top left`, `middle`, … (which ninth of the picture) |
| `answer en is there a bee?` | `yes` or `no` |
| `detect cat ; dog` | `<loc0402><loc0311><loc0594><loc0429> cat ; …` |
| `segment cat` | `<loc…>` × 4, `<seg…>` × 16, `cat` |

It is a teaching model. About a photograph, another emoji or any other question it says something,
and that means nothing.

## Figures

Greedy decoding in float32 through `paligemma.load` and `Pipeline.batch`, on test scenes of
one to five objects that training did not see. An answer counts only when every word is right;
boxes count as F1 at an overlap (IoU) of 0.5 with the right label; masks as their mean overlap with
the pixels that are really visible, 0 for an object that was not found. "Shuffled" is the control:
the same prompts with the pictures permuted between scenes. What a row gains over it comes from
looking at the picture. One run, one seed; the sampling error of a share of {scenes:,} scenes is
at most ± {error:.1f} points (95 %).

{table}

{weak}

New in a test scene is how it is composed: the emoji pictures and the nine photographs behind some
scenes are the ones of training. The row "kinds never seen together" has two objects or more in
every scene, the row above it one as well. "Another renderer" is a program written apart from the
training code (`tools/other_renderer.py`): scenes of 448 pixels, laid out in another way, on three
families of background that training never drew (checks, rings, Voronoi cells), a third each.

To repeat: `python tools/model_card.py --scenes {scenes}` (seeds are fixed).

## What it gets wrong

The first eight test scenes whose caption is not right in every word.

![Scenes and wrong captions](failures.png)

## Recipe

* Vision tower: width {vision_width}, {vision_layers} layers, 4 heads, patch 14: 64 image tokens.
  Text: width {text_width}, {text_layers} layers, 4 query heads, 1 key/value head of width 32,
  MLP {text_mlp}. Weights float32 in training, stored in bfloat16.
* Tokenizer: SentencePiece BPE trained on the scenes' texts (`tools/make_tokenizer.py`), {pieces}
  pieces in the published order: control tokens, ordinary pieces, `<loc0000>`…`<loc1023>`,
  `<seg000>`…`<seg127>`; `<image>` is the next id.
* Data: `paligemma.scenes`, composed while training, {seen:,} pictures in all. One pair of kinds
  in ten never stands together in a training scene. Of the pictures {arrived:.0%} are resized as if
  they had arrived larger, {lit:.0%} are brighter, darker or of other contrast.
* Masks: `mask_codec.safetensors`, a VQ-VAE of {codec:,} parameters (`tools/train_codec.py`,
  lesson mask_codec). Masks of test scenes come back from their sixteen codes with a mean overlap of
  {codec_overlap:.3f}: the ceiling of the row "segment".
* {look_steps} steps: the vision tower alone learns what each patch shows (a linear head, thrown
  away after). Then {speak_steps} steps of the prefix-LM loss, {questions} short questions and
  one `detect` (or `segment`: {segments:.0%}) for each picture, the patch loss added at half
  weight. Curriculum (steps since then: numbers of objects): {curriculum}.
* Location tokens have soft targets: a bell of standard deviation {softness:g} bins of 1023.
* Batch {batch}; Muon on the matrices inside the blocks, AdamW on the rest; peak learning rate
  {lr} (half of it for AdamW), held, then to zero over the last {cool_steps} steps; gradient norm
  clipped at 1; the running mean of the weights is what ships.
* {minutes:.0f} minutes on two CPU cores shared with other work. The curves are in `curves.json`.
{story}
To repeat: `torchrun --standalone --nproc-per-node {processes} tools/train_tiny.py
  --config paligemma/assets/tiny/recipe.json --work DIR`, then
  `python tools/train_tiny.py --work DIR --export DIR2`.

## Licence

Weights: MIT, as the course. The emoji pictures they were trained on are Noto Emoji (Google,
Apache License 2.0); see NOTICE.
"""


def table(figures):
    """The figures as a Markdown table."""
    rows = ["| task | test scenes | right | shuffled |", "|---|---:|---:|---:|"]
    for task, f in figures.items():
        if task == "another renderer":
            right = f"caption {f['caption']:.1f} %, how many {f['count']:.1f} %, "
            rows.append(f"| {task} | {f['scenes']:,} | {right}detect F1 {f['detect']:.1f} % | |")
        elif task == "segment":
            right = f"mean IoU {f['iou']:.1f} %"
            rows.append(f"| {task} | {f['scenes']:,} | {right} | IoU {f['shuffled']:.1f} % |")
        elif "f1" in f:
            right = f"F1 {f['f1']:.1f} %, mean IoU {f['iou']:.1f} %"
            rows.append(f"| {task} | {f['scenes']:,} | {right} | F1 {f['shuffled']:.1f} % |")
        else:
            rows.append(
                f"| {task} | {f['scenes']:,} | {f['exact']:.1f} % | {f['shuffled']:.1f} % |"
            )
    return "\n".join(rows)


def figure_of(f):
    """The figure that a row is judged by, percent."""
    return next(f[key] for key in ("exact", "f1", "iou", "caption") if key in f)


def write_gallery(path, count=8, tries=400):
    """A picture of the first scenes whose caption is wrong, with the truth and what was said."""
    asked, prompts, truths = row_questions("caption en", tries)
    predictions = predict(load(TINY), [scene.image for scene in asked], prompts)
    triples = zip(asked, predictions, truths)
    wrong = [(scene, text, truth) for scene, text, truth in triples if text != truth][:count]
    titles = [
        textwrap.fill(text, 24) + "\n(" + textwrap.fill(truth, 26) + ")" for _, text, truth in wrong
    ]
    figure = show_images([scene.image for scene, _, _ in wrong], titles, columns=4, height=2.4)
    figure.savefig(path, dpi=80, bbox_inches="tight")


def write_card(figures):
    """The card and README's table."""
    curves = json.loads((TINY / "curves.json").read_text())
    recipe, points = asdict(Recipe(**curves["recipe"])), curves["points"]
    count = min(f["scenes"] for f in figures.values())
    gain = {t: figure_of(f) - f["shuffled"] for t, f in figures.items() if "shuffled" in f}
    pg, codec = load(TINY), MaskCodec.from_pretrained(TINY)
    weights = sum(p.numel() for p in pg.model.parameters())
    weak = [task for task, g in gain.items() if g < 10]
    (TINY / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")
    recipe["curriculum"] = ", ".join(
        f"{start}: {'/'.join(map(str, objects))}" for start, objects in recipe["curriculum"]
    )
    text = CARD.format(
        **recipe,
        parameters=weights,
        kinds=len(scenes.NAMES),
        table=table(figures),
        scenes=count,
        error=98 / count**0.5,
        weak=f"Not learnt (within ten points of the control): {', '.join(weak) or 'none'}.",
        pieces=pg.processor.tokenizer.sp.get_piece_size(),
        seen=points[-1]["step"] * recipe["batch"],
        speak_steps=points[-1]["step"] - recipe["look_steps"],
        minutes=curves["seconds"] / 60,
        codec=sum(p.numel() for p in codec.parameters()),
        codec_overlap=scene_overlap(codec).mean(),
        story=curves.get("story", ""),
    )
    (TINY / "README.md").write_text(text)
    (TINY / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    readme = (ROOT / "README.md").read_text()
    block = f"<!-- tiny -->\n{table(figures)}\n<!-- /tiny -->"
    readme = re.sub(r"<!-- tiny -->.*<!-- /tiny -->", lambda _: block, readme, flags=re.DOTALL)
    size = f"of {weights / 1e6:.1f} million parameters"
    readme = re.sub(r"of \S+ million parameters", size, readme)
    minutes = f"trained in {curves['seconds'] / 60:.0f} minutes"
    readme = re.sub(r"trained in \S+ minutes", minutes, readme)
    (ROOT / "README.md").write_text(readme)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=1000, help="test scenes a row")
    parser.add_argument("--written", action="store_true", help="do not measure again")
    options = parser.parse_args()
    if options.written:
        figures = json.loads((TINY / "figures.json").read_text())
    else:
        pg, each = load(TINY), -(-options.scenes // len(NEW))
        figures = evaluate(pg, options.scenes, progress=print)
        elsewhere = measure_all(pg, each, NEW)["another renderer"]
        figures["another renderer"] = {"scenes": each * len(NEW)} | elsewhere
    write_gallery(TINY / "failures.png")
    write_card(figures)
    print({task: round(figure_of(f), 1) for task, f in figures.items()})


if __name__ == "__main__":
    main()
