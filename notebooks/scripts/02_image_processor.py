# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags
#     comment_magics: false
#     notebook_metadata_filter: kernelspec
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["navigation"]
# [← Pictures](01_plotting.ipynb) | [contents](00_overview.ipynb) | [Patch embedding →](03_patch_embedding.ipynb)

# %% [markdown]
# # 02 · Image processor: what does a model receive instead of a picture?
#
# *40 minutes* · part I, Seeing
#
# **What you will be able to do**
#
# - turn a photograph into the floats that the model reads, and back;
# - resize a row of pixels with a pencil, and a whole picture with two matrix products, as Pillow does;
# - find out by *looking* whether a model gets the picture you think it gets.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("image_processor")

# %% [markdown]
# ## Setup
#
# From [lesson 01](01_plotting.ipynb) we take the sample photographs and the drawing helpers. Pillow reads the files; NumPy calculates. Nothing here is random.

# %%
#| export
"""From a picture file to the normalised tensor that the vision tower reads."""

import json
import os
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from paligemma.support.replacing import replacing
from paligemma.support.pictures import (
    Picture,
    check_settings,
    open_picture,
    read_settings,
    settings_dict,
)

# %% tags=["setup"]
import io
import math
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch.nn.functional as F
from PIL import ImageOps
from safetensors.torch import load_file

from paligemma.plotting import show_heatmap, show_images
from paligemma.support.course import add_to_class, check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS

# %% [markdown]
# ## The problem
#
# A camera writes 4000 × 3000 pixels. PaliGemma's eye was trained on squares of 224 × 224 numbers between −1 and 1, and reads nothing else. Between the two stand a few lines of code that nobody looks at.
#
# What should happen to a picture that is not square? There are three usual answers.

# %%
coffee = sample_picture("coffee")
squash = coffee.resize((224, 224))
crop = ImageOps.fit(coffee, (224, 224))
pad = ImageOps.pad(coffee, (224, 224), color="#808080")

# %% tags=["hide-input"]
titles = [f"{coffee.width} × {coffee.height}", "squash", "crop the centre", "pad"]
show_images([coffee, squash, crop, pad], titles, height=2)

# %% [markdown]
# **Squash** keeps everything but bends proportions. **Crop** keeps proportions but throws the sides away: who asks for the spoon gets no answer. **Pad** keeps both and wastes a third of the numbers.
#
# PaliGemma squashes. It was trained that way, so it knows squashed cups. What counts is to do as the training did.

# %%
wasted = (np.asarray(pad) == 128).all(axis=2).mean()
print(f"padding: {wasted:.0%} of the square is grey")
assert 0.3 < wasted < 0.37

# %% [markdown]
# ## The plain way
#
# Open, RGB, **resize**, scale, channels first. That is the whole lesson in five lines:


# %%
def to_pixel_values(file, size=224):
    """A picture file to float32[3, size, size], in -1…1."""
    image = Image.open(file).convert("RGB")
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.array(image, dtype=np.float32) / 255  # [size, size, 3] in 0…1
    pixels = (pixels - 0.5) / 0.5
    return torch.from_numpy(pixels).permute(2, 0, 1)  # [3, size, size]


# %% [markdown]
# Bytes 0…255 become 0…1, and $(x - 0.5) / 0.5$ brings them to $[-1, 1]$. This is to **normalise**: grey is 0, and dark and bright are equally far from it.

# %%
cat = sample_picture("cat")
file = io.BytesIO()
cat.save(file, "png")
tensor = to_pixel_values(file)
print(list(tensor.shape), tensor.dtype, f"{tensor.min():.2f} … {tensor.max():.2f}")
assert tensor.min() >= -1 and tensor.max() <= 1

# %% [markdown]
# ### What did the model receive?
#
# Everything after the resize can be undone without loss. This gives us the most useful tool of the lesson.


# %%
def what_it_saw(pixel_values):
    """float[3, H, W] as the model reads it → uint8[H, W, 3], as people look at it."""
    back = (pixel_values.permute(1, 2, 0) * 0.5 + 0.5) * 255
    return back.round().clamp(0, 255).to(torch.uint8).numpy()


small = np.asarray(cat.resize((224, 224), Image.Resampling.BICUBIC))
assert np.array_equal(what_it_saw(tensor), small)
show_images([cat, what_it_saw(tensor)], ["the photograph", "what the model receives"], height=2)

# %% [markdown]
# Four of the five lines are clear. One hides the whole difficulty: `resize`.
#
# ## Throwing pixels away is not resizing
#
# To go from 448 to 112 pixels one could keep each fourth pixel. Here is a test picture of rings that get finer outwards. Both small versions are 112 × 112; only one of them is honest.

# %%
y, x = np.mgrid[-224:224, -224:224]
rings = (127.5 + 127.5 * np.cos((x**2 + y**2) * np.pi / 640)).astype(np.uint8)
fourth = rings[2::4, 2::4]
bicubic = Image.fromarray(rings).resize((112, 112), Image.Resampling.BICUBIC)

# %% tags=["hide-input"]
views = [Image.fromarray(rings), Image.fromarray(fourth), bicubic]
titles = ["448 × 448", "each fourth pixel", "Pillow's bicubic"]
figure = show_images([view.convert("RGB") for view in views], titles, height=2.9)
save_figure(figure, "02_rings.png")

# %% [markdown]
# **What to notice.** Keeping each fourth pixel *invents* rings that are not there. This is **aliasing**: a pattern finer than the new grid comes back as a coarse one. The right picture turns it into grey, which is true: from far away fine rings *are* grey. How does it know?

# %% [markdown]
# ## By hand
#
# One dimension is enough. Eight pixels shall become four. A new pixel is a **weighted mean** of old ones: near ones count much, far ones little. The *kernel* of **bicubic** resizing says how much, for a distance $d$ measured in pixels:
#
# $$k(d) = \begin{cases} 1.5\,|d|^3 - 2.5\,|d|^2 + 1 & |d| < 1 \\ -0.5\,|d|^3 + 2.5\,|d|^2 - 4\,|d| + 2 & |d| < 2 \\ 0 & \text{else} \end{cases}$$


# %%
def kernel(d):
    """Pillow's bicubic kernel (a = -0.5, also called Catmull-Rom)."""
    d = abs(d)
    if d < 1:
        return 1.5 * d**3 - 2.5 * d**2 + 1
    if d < 2:
        return -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    return 0.0


print([kernel(d) for d in (0, 0.5, 1, 1.5, 2)])

# %% [markdown]
# At its own place a pixel counts fully, one pixel further nothing. Between 1 and 2 it is slightly *negative*: that is what keeps edges sharp.
#
# Now the decisive step. **When shrinking, the kernel is stretched** by the same factor. To see why, add up how much each old pixel counts, in all new pixels together:


# %%
def say(factor, stretch):
    """What each of `factor` neighbouring old pixels counts, in all new pixels together."""
    centres = [(i + 0.5) * factor for i in range(-4, 5)]
    weight = lambda j, centre: kernel((j + 0.5 - centre) / stretch) / stretch
    return [round(sum(weight(j, c) for c in centres), 4) for j in range(factor)]


print("by 4, not stretched:", say(4, 1))
print("by 4, stretched:    ", say(4, 4))
print("by 8, not stretched:", say(8, 1))
assert say(4, 1) == [-0.0625, 0.5625, 0.5625, -0.0625] and say(4, 4) == [0.25] * 4
assert say(8, 1).count(0) == 4 and say(8, 8) == [0.125] * 8

# %% tags=["hide-input"]
figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained", sharey=True)
for axis, stretch, title in ((axes[0], 1, "not stretched"), (axes[1], 4, "stretched 4 times")):
    d = np.linspace(-9, 9, 721)
    axis.plot(d, [kernel(v / stretch) for v in d], color=COLOURS["vision"])
    old = np.arange(-8.5, 9)
    heights = [kernel(v / stretch) for v in old]
    ignored = [h == 0 for h in heights]
    axis.vlines(old, 0, heights, color=COLOURS["vision"], linewidth=1)
    marks = [COLOURS["bad"] if skip else COLOURS["vision"] for skip in ignored]
    axis.scatter(old, heights, c=marks, s=22, zorder=3)
    axis.axhline(0, color=COLOURS["muted"], linewidth=0.8)
    axis.set_title(f"{title}: {len(old) - sum(ignored)} of {len(old)} old pixels count")
    axis.set_xlabel("distance from the new pixel, in old pixels")
axes[0].set_ylabel("weight")
save_figure(figure, "02_kernel")

# %% [markdown]
# **What to notice.** By 4, not stretched, two of four pixels have all the say. By 8, half of them count *nothing*: a stripe that falls there is gone. Stretched, each old pixel counts as much as its neighbour. This is called **antialiasing**.

# %% [markdown]
# Now the pencil. The row is an edge, from dark to bright, between old pixels 4 and 5. New pixel 1 covers old pixels 2 and 3, so its centre is at $(1 + 0.5) \cdot 2 = 3.0$. Old pixel $j$ has its centre at $j + 0.5$. Its distance is divided by 2, since the kernel is stretched by 2.

# %%
row = [0, 0, 0, 0, 0, 200, 200, 200]
distances = [(j + 0.5 - 3.0) / 2 for j in range(8)]
weights = [kernel(d) for d in distances]
mean = sum(w * value for w, value in zip(weights, row)) / sum(weights)
print("distances:", distances)
print("weights:  ", [round(w, 4) for w in weights], "sum", round(sum(weights), 4))
print("new pixel 1:", round(mean, 2))
assert mean < 0

# %% [markdown]
# A negative brightness! The dark side of an edge is pushed below 0, the bright side above 200, and so the edge looks crisp. A pixel cannot be negative, so it is clipped to 0. On the bright side there is room up to 255, and the *overshoot* stays.

# %% [markdown]
# ## As a loop
#
# The same for every new pixel. Two details: near the border the kernel hangs over the edge, so we divide by the sum of the weights that remain. And when a picture *grows*, the kernel is not narrowed (`max(…, 1)`).
#
# A row is a picture of height 1, so we can ask Pillow at once.


# %%
def resize_row(row, size):
    """Resize a list of brightnesses to `size` values, as Pillow's bicubic does."""
    scale = len(row) / size
    stretch = max(scale, 1.0)
    new = []
    for i in range(size):
        centre, total, mean = (i + 0.5) * scale, 0.0, 0.0
        for j, value in enumerate(row):
            weight = kernel((j + 0.5 - centre) / stretch)
            total += weight
            mean += weight * value
        new.append(min(255, max(0, math.floor(mean / total + 0.5))))
    return new


# %%
strip = Image.fromarray(np.array([row], dtype=np.uint8))
for size in (4, 16):
    pillow = np.asarray(strip.resize((size, 1), Image.Resampling.BICUBIC))[0].tolist()
    assert pillow == resize_row(row, size)
    print(size, "pixels, ours and Pillow's:", pillow)

# %% [markdown]
# ## Vectorised
#
# The weights do not depend on the brightnesses. Write them down once, one row for each new pixel, and resizing is a **matrix product**. A picture needs two: one along the width, one along the height.


# %%
def resize_matrix(old, new):
    """float64[new, old]: row i holds the weights of new pixel i."""
    scale = old / new
    centres = (np.arange(new)[:, None] + 0.5) * scale
    d = np.abs(np.arange(old) + 0.5 - centres) / max(scale, 1.0)
    near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    weights = np.where(d < 1, near, np.where(d < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


# %%
to_bytes = lambda values: np.clip(np.floor(values + 0.5), 0, 255)
for size in (4, 16, 3, 1):
    assert to_bytes(resize_matrix(8, size) @ row).tolist() == resize_row(row, size)
print("equal to the loop")

# %% tags=["hide-input"]
show_heatmap(
    resize_matrix(8, 4).round(2),
    "from 8 old pixels (columns) to 4 new ones (rows)",
    rows=["new 0", "new 1", "new 2", "new 3"],
    columns=[str(j) for j in range(8)],
    annotate=".2f",
    centre=0,
)

# %% [markdown]
# A band that walks down the diagonal: each new pixel looks at its own neighbourhood.
#
# Now a photograph: first the width, round to bytes, then the height, and round again. Pillow does it in this order too.


# %%
def resize_picture(pixels, size):
    """uint8[H, W, 3] → uint8[size, size, 3] with two matrix products."""
    height, width, _ = pixels.shape
    wide = to_bytes(np.einsum("xw,hwc->hxc", resize_matrix(width, size), pixels))
    return to_bytes(np.einsum("yh,hxc->yxc", resize_matrix(height, size), wide)).astype(np.uint8)


# %%
gap = np.abs(resize_picture(np.asarray(cat), 224).astype(int) - small)
print(f"{(gap > 0).sum()} of {gap.size:,} numbers differ, by {gap.max()} at most")
assert gap.max() <= 1 and (gap > 0).sum() <= 10

# %% [markdown]
# Pillow keeps its weights as whole numbers (times $2^{22}$) to be fast; that tips values that lay almost exactly on a half. Otherwise our few lines *are* its bicubic.

# %% [markdown]
# ## What a real program adds
#
# ### Eight files, one cat
#
# The five lines work for a good file. Here is the same cat in eight kinds of file. Pillow calls the kind of a picture its *mode*; `RGB` is what we want.

# %% tags=["hide-input"]
small = cat.resize((150, 100))
alpha = Image.fromarray((np.mgrid[:100, :150][1] * 255 // 149).astype(np.uint8))  # fades in
faded = small.copy()
faded.putalpha(alpha)
deep = Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 257)
paints = small.quantize(12)  # mode P: each pixel is the number of a colour
note = Image.Exif()
note[0x0112] = 6  # orientation: turn by 90° to the right
kinds = {
    "turned by EXIF": (small.transpose(Image.Transpose.ROTATE_90), "jpeg", {"exif": note}),
    "16-bit grey": (deep, "png", {}),
    "transparent": (faded, "png", {}),
    "clear colour": (paints, "png", {"transparency": paints.getpixel((145, 60))}),
    "CMYK": (small.convert("CMYK"), "jpeg", {"quality": 95}),
    "palette": (paints, "png", {}),
    "1 bit": (small.convert("1"), "png", {}),
    "animated": (small, "gif", {"save_all": True, "append_images": [small.rotate(180)]}),
}
print("eight kinds:", ", ".join(kinds))

# %% [markdown]
# Each is opened twice: the plain way, and with `open_picture`, the careful way.

# %%
plain, opened = [], []
with tempfile.TemporaryDirectory() as folder:
    for picture, kind, options in kinds.values():
        file = Path(folder) / f"cat.{kind}"
        picture.save(file, **options)
        plain.append(Image.open(file).convert("RGB"))
        opened.append(open_picture(file))
different = [name for name, a, b in zip(kinds, plain, opened) if a.tobytes() != b.tobytes()]
print("different:", ", ".join(different))
assert different == ["turned by EXIF", "16-bit grey", "transparent", "clear colour"]

# %% tags=["hide-input"]
square = lambda image: ImageOps.pad(image, (150, 150), color=COLOURS["muted"])
pictures = [square(image) for image in plain + opened]
figure = show_images(pictures, list(kinds), columns=8, height=1.1)
for axis, name in ((figure.axes[0], "plain"), (figure.axes[8], "careful")):
    axis.text(-12, 75, name, rotation=90, ha="right", va="center", fontsize=9)
save_figure(figure, "02_modes.png")

# %% [markdown]
# **What to notice.** Four of eight kinds come out *different* from the plain way, and none of them with an error: the cat lies on its side, the deep greys turn white, the faded cat is not faded, and the clear part is filled with a colour. The model would be blamed for each.

# %% [markdown]
# What `open_picture` does is care, not a new idea, so it stands in [support/pictures.py](../paligemma/support/pictures.py):
#
# - it turns the picture as its EXIF note says, and lays transparency over **white**, as transformers does;
# - a deep grey is scaled by the range of its *kind*, 0…65535, never by its largest value: one bright pixel would darken the rest;
# - of arrays it takes `uint8[H, W, 3]` alone, and a broken file gives **one** kind of error, with a sentence in it.

# %% [markdown]
# ### The class
#
# The plain way, with `open_picture` in front and four settings.


# %%
#| export
@dataclass
class ImageProcessor:
    """Pictures to pixel values: squash to a square, scale to 0…1, normalise to -1…1.

    Args:
        size: side of the square in pixels (224, 448 or 896 in the published checkpoints).
        mean: subtracted from each channel after scaling to 0…1.
        std: divides each channel after that.
        resample: Pillow filter (3 = bicubic, as in the published `preprocessor_config.json`).

    Source: `SiglipImageProcessor` in transformers; PaliGemma paper, section 3.1.
    """

    size: int = 224
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: int = Image.Resampling.BICUBIC

    def __post_init__(self):
        settings = check_settings(self.size, self.mean, self.std, self.resample)
        self.size, self.mean, self.std, self.resample = settings

    def __call__(self, images: Picture | list[Picture] | tuple[Picture, ...]) -> torch.Tensor:
        """One picture of any kind that `open_picture` takes, or B of them in a list, to
        `float32[B, 3, size, size]`, in -1…1 with the default mean and std."""
        pictures = images if isinstance(images, list | tuple) else [images]
        if not pictures:
            raise ValueError("the list of pictures is empty; give at least one")
        return torch.stack([self.to_pixel_values(picture) for picture in pictures])

    def to_pixel_values(self, image: Picture) -> torch.Tensor:
        """One picture to `float32[3, size, size]`."""
        picture = open_picture(image).resize((self.size, self.size), self.resample)
        pixels = np.array(picture, dtype=np.float32) / 255  # [size, size, 3] in 0…1
        pixels = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # [3, size, size]


# %%
processor = ImageProcessor(224)
batch = processor([cat, coffee, np.asarray(coffee)])
print(list(batch.shape), batch.dtype)
assert torch.equal(batch[0], tensor) and torch.equal(batch[1], batch[2])

# %%
with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "notes.txt").write_text("no picture")
    for wrong in (Path(folder) / "notes.txt", folder, np.zeros((8, 8)), 7):
        try:
            processor(wrong)
        except ValueError as error:
            print("✗", str(error).replace(folder, "…").replace(os.sep, "/"))

# %% [markdown]
# ### A checkpoint's settings
#
# A **checkpoint** is a trained model in files: weights and settings. It brings a `preprocessor_config.json` (newer versions of transformers write a `processor_config.json`, the same one level down). Whoever ignores it is right until the day when a checkpoint differs. `read_settings` refuses what we do not do: a `do_normalize: false` must not pass in silence.


# %%
#| export
@add_to_class(ImageProcessor)
@classmethod
def from_pretrained(cls, path: str | os.PathLike, size: int = 224) -> "ImageProcessor":
    """Read `preprocessor_config.json`; a directory without one gives the defaults at `size`.

    Raises:
        ValueError: a broken file, or one that asks for other steps than PaliGemma's.
    """
    return cls(**read_settings(path, size))


# %%
#| export
@add_to_class(ImageProcessor)
def save_pretrained(self, path: str | os.PathLike, image_seq_length: int | None = None) -> None:
    """Write `preprocessor_config.json` in the published form, whole or not at all.

    Args:
        path: directory, made when absent.
        image_seq_length: N, image tokens a picture, which transformers reads from this file.
    """
    settings = settings_dict(self.size, self.mean, self.std, self.resample, image_seq_length)
    with replacing(path) as draft:
        text = json.dumps(settings, indent=2)
        (draft / "preprocessor_config.json").write_text(text + "\n")


# %%
with tempfile.TemporaryDirectory() as folder:
    ImageProcessor(448).save_pretrained(folder)
    again = ImageProcessor.from_pretrained(folder)
print(again)
assert again == ImageProcessor(448)

# %% [markdown]
# ## Against the reference
#
# The stored file holds what `SiglipImageProcessorPil` of transformers makes of the three photographs: all of it at 28 × 28, and each sixteenth pixel at 224 × 224. (Without the suffix, transformers takes torchvision to resize, if that is installed; we come back to it.)

# %%
stored = load_file("reference/image_processor.safetensors")
photos = {name: sample_picture(name) for name in ("cat", "coffee", "astronaut")}
for name, photo in photos.items():
    full = (ImageProcessor(28)(photo)[0] - stored[f"{name}_28"]).abs().max().item()
    part = (processor(photo)[0, :, ::16, ::16] - stored[f"{name}_224"]).abs().max().item()
    assert max(full, part) <= 1e-6
    print(f"{name:9} largest difference: {full:.0e} at 28, {part:.0e} at 224")

# %% [markdown]
# Zero: not near, but equal. Both call the same Pillow. And PyTorch? It can resize as well, with the option `antialias`. Left out, it defaults to `False`, and the kernel is not stretched.

# %%
print("largest and mean difference from Pillow, of 255")
for name, photo in photos.items():
    x = torch.tensor(np.asarray(photo)).float().permute(2, 0, 1)[None]
    target = (processor(photo)[0] * 0.5 + 0.5) * 255
    for antialias, least, most in ((True, 0, 5), (False, 20, 70)):
        y = F.interpolate(x, (224, 224), mode="bicubic", antialias=antialias)[0].clamp(0, 255)
        gap = (y - target).abs()
        print(f"{name:9} antialias={antialias!s:5} {gap.max():6.1f} {gap.mean():6.2f}")
        assert least <= gap.max() <= most

# %% [markdown]
# With antialiasing PyTorch and Pillow agree up to a few steps of 255: Pillow rounds and clips between the two passes. Without it, single pixels are off by 20 to 70, and nothing says so: `F.interpolate` gave a picture of the right shape.

# %% [markdown]
# ## See it
#
# How much does it matter on photographs? Shrink the cat to a *very* small picture in three ways, and look at the fur.

# %%
x = torch.tensor(np.asarray(cat)).float().permute(2, 0, 1)[None] / 255
no = F.interpolate(x, (56, 56), mode="bicubic")[0].clamp(0, 1).permute(1, 2, 0)
kept = np.asarray(cat)[2::5, 4::8][:56, :56]
honest = what_it_saw(ImageProcessor(56)(cat)[0])

# %% tags=["hide-input"]
views = [cat, kept, no, honest]
titles = ["the cat", "pixels thrown away", "bicubic, no antialias", "ImageProcessor(56)"]
save_figure(show_images(views, titles, height=2), "02_antialias.png")

# %% [markdown]
# **What to notice.** In the middle pictures the fur turns to grains and the whiskers break into dots. The model was trained on pictures like the last one. To it, grain is texture, and texture is evidence.

# %% [markdown]
# ## At full size
#
# This part has no parameters. What does it cost for a photograph of 12 million pixels? Each new pixel of a pass takes $4 \cdot \text{scale}$ weights, one multiplication and one addition for each, in three channels.

# %%
width, height = 4032, 3024
print("size   weights a pixel (x, y)   million FLOPs   kB as float32")
for size in (224, 448, 896):
    across, down = 4 * width / size, 4 * height / size
    flops = 2 * 3 * (height * size * across + size * size * down)
    memory = 4 * 3 * size**2 / 1e3
    print(f"{size:4} {across:12.0f} {down:10.0f} {flops / 1e6:15.0f} {memory:15.0f}")
    assert height * across > 3 * size * down  # the first pass is more than three quarters

# %% [markdown]
# The first pass dominates: it touches every pixel of the photograph, whatever the new size. So who trains on large photographs stores them small, once; otherwise the accelerator waits while files are decoded and shrunk.

# %% [markdown]
# ## A bug people really make
#
# A user writes: "The model says that everything is in fog." The pictures are loaded as a popular helper does it. It runs, and the numbers look like numbers:


# %%
def load(photo):
    """As torchvision's ToTensor would give it."""
    shrunk = np.asarray(photo.resize((224, 224), Image.Resampling.BICUBIC))
    return torch.tensor(shrunk).permute(2, 0, 1).float() / 255


# %%
loaders = {"ours": lambda photo: processor(photo)[0], "the user's": load}
for name, loader in loaders.items():
    out = loader(photos["astronaut"])
    print(f"{name:10} {list(out.shape)} {out.dtype} {out.min():5.2f} … {out.max():4.2f}")
    assert out.abs().max() <= 1

# %% [markdown]
# Shapes right, types right, all inside $[-1, 1]$. Now use the tool of this lesson: show what the model received.

# %% tags=["hide-input"]
pictures, titles = [], []
for name, loader in loaders.items():
    pictures += [what_it_saw(loader(photos["astronaut"])), what_it_saw(loader(cat))]
    titles += [name, name]
save_figure(show_images(pictures, titles, columns=4, height=2.2), "02_bug.png")

# %% [markdown]
# *Fog* was an exact description: the last step is missing, so no pixel is darker than mid-grey.
#
# How bad is it? Cut the picture into the squares of 14 × 14 pixels that the model will read. What *differs* between squares is information. Which share of the numbers' energy (their sum of squares) is it?


# %%
def information(pixels):
    """Share of the energy by which squares differ from the mean square."""
    squares = F.unfold(pixels[None], 14, stride=14)[0].T  # [256, 588]: one square a row
    return ((squares - squares.mean(dim=0)).square().sum() / squares.square().sum()).item()


# %%
for name, photo in photos.items():
    ours, theirs = (information(loader(photo)) for loader in loaders.values())
    print(f"{name:9} ours {ours:.0%}, the user's {theirs:.0%}")
    assert theirs < 0.5 * ours and load(photo).min() >= 0

# %% [markdown]
# Less than half of the signal's share is left; the rest is a constant that says nothing. The model may still name the scene, so nobody looks for the bug in the loader.
#
# The check: undo the processing for **one** picture, and look.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): three numbers
#
# Without running it, for the default processor: **(a)** which value does a byte of 51 become? **(b)** A picture of 896 × 896 shrinks to 224 × 224: how many old pixels of one row get a weight in a new pixel in the middle? **(c)** The same for 112 × 112, which must grow.

# %% tags=["exercise"]
answer = None  # your answer: (value, count, count)


# %% tags=["check"]
def test_1(answer):
    given = isinstance(answer, tuple | list) and len(answer) == 3
    assert given and all(isinstance(a, int | float) for a in answer), (
        "give three numbers: (a, b, c)"
    )
    value = ImageProcessor(1)(Image.new("RGB", (1, 1), (51, 51, 51))).mean().item()
    shrink, grow = (int((resize_matrix(old, 224)[100] != 0).sum()) for old in (896, 112))
    assert abs(answer[0] - value) < 1e-3, "(a): divide by 255, subtract 0.5, divide by 0.5"
    assert answer[1] == shrink, "(b): the kernel reaches 2 to each side; stretch it first"
    assert answer[2] == grow, "(c): when a picture grows the kernel keeps its width"


check(test_1, answer)

# %% [markdown]
# <details><summary>Hint</summary>
#
# 51 is a fifth of 255. The kernel is not zero from −2 to 2, measured in *stretched* pixels.
#
# </details>

# %% tags=["solution"]
answer = (-0.6, 16, 4)  # 2 · 0.2 - 1; 4 · 4; 4 · 1
check(test_1, answer)

# %% [markdown]
# ### Exercise 2 (write): a processor that pads
#
# Other models pad. Write their processor: the longer side becomes `size`, the picture stands in the middle, above and below (or left and right) is mid-grey, which is **0** after normalising. Bicubic, float32[3, size, size].


# %% tags=["exercise"]
def padded(image, size):
    """A PIL picture in RGB → float32[3, size, size]."""
    return None  # your answer


# %% tags=["check"]
def test_2(padded):
    rng = np.random.default_rng(2)
    for width, height in ((90, 30), (30, 90), (60, 60), (120, 60)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        out, what = padded(image, 60), f"{width} × {height}"
        assert isinstance(out, torch.Tensor), f"{what}: return a tensor"
        assert out.dtype == torch.float32, f"{what}: the dtype is {out.dtype}"
        assert list(out.shape) == [3, 60, 60], f"{what}: the shape is {list(out.shape)}"
        assert out.min() >= -1 and out.max() <= 1, f"{what}: values leave -1…1"
        k = 60 / max(width, height)
        w, h = round(width * k), round(height * k)
        x, y = (60 - w) // 2, (60 - h) // 2
        bars = out.clone()
        bars[:, y : y + h, x : x + w] = 0
        assert bars.abs().max() < 0.01, f"{what}: outside the picture it isn't 0 everywhere"
        inner = out[:, y : y + h, x : x + w]
        true = torch.tensor(np.asarray(image.resize((w, h), Image.Resampling.BICUBIC)))
        true = (true.permute(2, 0, 1).float() / 255 - 0.5) / 0.5
        off = (inner - true).abs().max().item()
        assert off < 0.05, f"{what}: the picture's own numbers are off by up to {off:.1f}"


check(test_2, padded)

# %% [markdown]
# <details><summary>Hint</summary>
#
# First the two new sides, from one factor. Then paste the small picture's numbers into `torch.zeros(3, size, size)`.
#
# </details>


# %% tags=["solution"]
def padded(image, size):
    factor = size / max(image.size)  # one factor for both sides keeps the proportions
    width, height = (round(side * factor) for side in image.size)
    small = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(small, np.float32)).permute(2, 0, 1) / 255
    left, top = (size - width) // 2, (size - height) // 2
    out = torch.zeros(3, size, size)  # 0 is mid-grey once the pixels are normalised
    out[:, top : top + height, left : left + width] = (pixels - 0.5) / 0.5
    return out


check(test_2, padded)

# %% [markdown]
# ### Exercise 3 (break): the picture that is two pictures
#
# Build a 448 × 448 picture which a careless loader, `picture[::2, ::2]`, shrinks to plain **white**, while `ImageProcessor(224)` makes it darker than **mid-grey** everywhere. (Such pictures have been used to attack real systems: people see one thing, the model another.)


# %% tags=["exercise"]
def two_faced():
    return None  # your answer: uint8[448, 448, 3]


# %% tags=["check"]
def test_3(two_faced):
    picture = two_faced()
    assert isinstance(picture, np.ndarray), "two_faced returns no NumPy array"
    assert picture.dtype == np.uint8 and picture.shape == (448, 448, 3), "uint8[448, 448, 3] wanted"
    assert (picture[::2, ::2] == 255).all(), "the careless loader does not get plain white"
    seen = ImageProcessor(224)(picture)
    assert (seen < 0).all(), f"the processor still gets values up to {seen.max():.2f}"


check(test_3, two_faced)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The careless loader looks at one pixel of four. What the other three hold, only the processor will see.
#
# </details>


# %% tags=["solution"]
def two_faced():
    picture = np.zeros((448, 448, 3), dtype=np.uint8)
    picture[::2, ::2] = 255  # a quarter of all pixels: the mean is dark
    return picture


check(test_3, two_faced)

# %% [markdown]
# ## Summary
#
# - A model receives a square of floats in $[-1, 1]$. How it is made, training has fixed.
# - Resizing is a weighted mean, a matrix product along each axis. When shrinking, the kernel must be stretched.
# - `convert("RGB")` does not do what you think for 16 bits, transparency and EXIF.
# - A file comes from a stranger: one kind of error, with a sentence in it.
# - Undo the processing and look: one line that finds most bugs of this kind.

# %% [markdown]
# ## Quiz
#
# **1.** Why does each row of the resize matrix sum to 1?
#
# <details><summary>Answer</summary>
#
# So that a plain picture stays as bright as it was: a weighted mean of equal numbers is that number. Near the border some weights fall outside, and dividing by the rest restores the sum. Forget it, and pictures get dark rims.
#
# </details>

# %% [markdown]
# **2.** Your colleague trains with Pillow's resize and serves with `F.interpolate(…, mode="bicubic")`. What happens?
#
# <details><summary>Answer</summary>
#
# It runs, slightly worse. Without `antialias=True` the served pictures have grain that training pictures never had. The larger the photographs, the stronger the effect, so small test pictures will not show it.
#
# </details>

# %% [markdown]
# **3.** Why refuse a float array, when one could look at its range and guess?
#
# <details><summary>Answer</summary>
#
# A dark picture in 0…255 may lie within 0…1 by chance, and a normalised one may be cut to it. A guess that is right 99 times in 100 makes a bug that nobody can reproduce. An error costs a minute.
#
# </details>

# %% [markdown]
# ## References
#
# - Pillow: `Image.resize`, `ImageOps.exif_transpose`, the list of modes; `src/libImaging/Resample.c` holds the kernel and the two passes.
# - R. Keys 1981, *Cubic convolution interpolation for digital image processing*: the kernel; its *a* is −0.5 here.
# - Parmar, Zhang, Zhu 2022, *On Aliased Resizing and Surprising Subtleties in GAN Evaluation*: what libraries do differently.
# - Xiao et al. 2019, *Seeing is Not Believing* (USENIX Security): attacks by image scaling.
# - Beyer et al. 2024, *PaliGemma*, section 3; `SiglipImageProcessor` in transformers.

# %% [markdown] tags=["navigation"]
# [← Pictures](01_plotting.ipynb) | [contents](00_overview.ipynb) | [Patch embedding →](03_patch_embedding.ipynb)
