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
# [← Image processor](02_image_processor.ipynb) | [contents](00_overview.ipynb) | [SigLIP's attention →](04_siglip_attention.ipynb)

# %% [markdown]
# # 03 · Patch embedding: how does a picture become a sequence?
#
# *40 minutes* · part I, Seeing
#
# **What you will be able to do**
#
# - cut a picture into patches in three ways and prove that they agree;
# - say why one strided convolution is the same as one matrix product;
# - show what goes wrong without positions, and what a trained table of them has learned;
# - count the tokens, parameters, FLOPs and bytes at 224, 448 and 896 pixels.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("patch_embedding")

# %% [markdown]
# ## Setup
#
# From earlier lessons we need the drawing helpers ([lesson 01](01_plotting.ipynb)) and the
# `ImageProcessor`, which turns a picture file into numbers between −1 and 1
# ([lesson 02](02_image_processor.ipynb)).

# %%
#| export
"""A picture cut into patches, each patch one vector with a learned position."""

import torch
from torch import nn

# %% tags=["setup"]
from importlib import resources

import matplotlib.pyplot as plt
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from paligemma.image_processor import ImageProcessor
from paligemma.plotting import show_heatmap, show_images
from paligemma.support.course import DIVERGING, check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS

_ = torch.manual_seed(0)

# %% [markdown]
# ## The problem
#
# A transformer reads a **sequence** of vectors, its **tokens**: token 0, token 1, token 2 … A picture
# is a grid of pixels, and each pixel is only three numbers. Something has to stand between the two.
#
# One token for each pixel? Attention ([lesson 04](04_siglip_attention.ipynb)) compares each token with
# each other one, so the work grows with the *square* of their number. Let us count.

# %%
for side in (1, 14):
    tokens = (224 // side) ** 2
    print(
        f"{side:2} × {side:2} pixels a token: {tokens:6,} tokens, {tokens**2:13,} pairs to compare"
    )
assert round(14**4, -3) == 38_000

# %% [markdown]
# Squares of 14 × 14 pixels bring the pairs down by a factor of 196² ≈ 38,000. Such a square is a
# **patch**. It is the picture's word: small enough to be simple, large enough to hold an edge or an
# eye.
#
# Here is the cat as the vision tower sees it: squashed to 224 × 224, then cut into 16 rows of 16
# patches.

# %%
cat = ImageProcessor(224)(sample_picture("cat"))  # [1, 3, 224, 224]
patches = F.unfold(cat, 14, stride=14)[0].T  # [256, 588], explained below
print(tuple(cat.shape), "→", tuple(patches.shape))


# %% tags=["hide-input"]
def mosaic(patches, rows, gap=0):
    """Draw patches, float[N, 3 · side²] in [-1, 1], in some rows, with white lines between."""
    tiles = patches.reshape(len(patches), 3, -1)
    size = round(tiles.shape[2] ** 0.5)
    tiles = F.pad((tiles.reshape(-1, 3, size, size) + 1) / 2, (gap,) * 4, value=1.0)
    flat = tiles.reshape(1, len(patches), -1).transpose(1, 2)
    size += 2 * gap
    whole = F.fold(flat, (rows * size, len(patches) // rows * size), size, stride=size)
    return whole[0].permute(1, 2, 0).clamp(0, 1)


figure, axes = plt.subplot_mosaic(
    [["whole", "cut"], ["row", "row"]],
    figsize=(8.4, 5.4),
    height_ratios=[6, 1],
    layout="constrained",
)
axes["whole"].imshow((cat[0].permute(1, 2, 0) + 1) / 2)
axes["whole"].set_title("224 × 224 pixels")
axes["cut"].imshow(mosaic(patches, 16, gap=1))
axes["cut"].add_patch(
    plt.Rectangle((0, 7 * 16), 255, 16, fill=False, color=COLOURS["vision"], linewidth=2)
)
axes["cut"].set_title("16 × 16 patches of 14 × 14 pixels")
axes["row"].imshow(mosaic(patches[112:128], 1, gap=1))
axes["row"].set_title("tokens 112 … 127 of the sequence (the framed row)")
for axis in axes.values():
    axis.set_axis_off()
save_figure(figure, "03_patches.png")

# %% [markdown]
# The order is that of reading: row by row, from the top left. Token 16 lies right *below* token 0,
# although fifteen others stand between them. Nothing in a sequence says so. That is the second half of
# this lesson.

# %% [markdown]
# ## By hand
#
# A grey picture of 4 × 4 pixels, numbered in reading order, and patches of 2 × 2. With a pencil: which
# four numbers stand in patch 1?

# %%
picture = torch.arange(16).view(4, 4)
corners = [(0, 0), (0, 2), (2, 0), (2, 2)]  # row and column of each patch's first pixel
tiny = torch.stack([picture[y : y + 2, x : x + 2].flatten() for y, x in corners])

# %% tags=["hide-input"]
_, (left, right) = plt.subplots(1, 2, figsize=(6, 2.6), layout="constrained")
show_heatmap(picture, "the picture", annotate=True, ax=left)
names = [f"patch {n}" for n in range(4)]
show_heatmap(tiny, "one patch a row", rows=names, annotate=True, ax=right)

# %% [markdown]
# Patch 1 is `2 3 6 7`: two numbers from the first line, two from the second. In memory these pairs are
# *not* neighbours, four and five lie between them. Keep this in mind for the bug below.
#
# Now each patch becomes a vector, its **embedding**. Every entry of it is a weighted sum of the patch's
# pixels: one row of weights for each entry. We choose two rows by hand: one adds all pixels, one takes
# right minus left.

# %%
weight = torch.tensor([[1, 1, 1, 1], [-1, 1, -1, 1]])  # [D = 2, pixels = 4]
print(tiny @ weight.T)  # [N = 4, D = 2]

# %% [markdown]
# Patch 0 holds 0, 1, 4, 5: the sum is 10, and right minus left is (1 + 5) − (0 + 4) = 2. The whole
# embedding is this one matrix product. In the real model the rows of weights are learned, and there are
# 1152 of them.

# %% [markdown]
# ### Where was it?
#
# Take a picture of plain sky: all pixels equal, so all vectors are equal. Top and bottom cannot be told
# apart. The cure is to add to each vector a second one that depends only on its
# *position* in the sequence, the **position embedding**.

# %%
sky = torch.full((4, 4), 5) @ weight.T
positions = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])  # one vector a position
print(sky, sky + positions, sep="\n\n")

# %% [markdown]
# Now the four are distinct. `positions` is a plain table with one row for each position. In SigLIP it
# starts as random numbers and is **learned** like any other weight. Nobody tells the model which rows
# are neighbours.

# %% [markdown]
# ## As a loop
#
# The plainest code for a colour picture: walk over rows and columns, cut a square, write its numbers in
# one line: first all red ones, then green, then blue.


# %%
def patches_by_loop(pixels, size):
    """float[3, H, W] → float[N, 3 · size²], row by row."""
    patches = []
    for y in range(0, pixels.shape[1], size):
        for x in range(0, pixels.shape[2], size):
            patches.append(pixels[:, y : y + size, x : x + size].flatten())
    return torch.stack(patches)


# %% [markdown]
# Then embed one patch at a time, here into 8 numbers with random weights.

# %%
slow = patches_by_loop(cat[0], 14)
weight, bias = torch.randn(8, 588) / 588**0.5, torch.randn(8)  # D = 8
vectors = torch.stack([weight @ patch + bias for patch in slow])
print(tuple(slow.shape), "→", tuple(vectors.shape))

# %% [markdown]
# ## Vectorised
#
# No loop is needed. Split the height in two axes (which row of patches, which line inside the patch),
# the width likewise. Then bring the two "which patch" axes to the front.

# %%
grid = cat[0].reshape(3, 16, 14, 16, 14)  # [3, rows, lines, columns, dots]
swapped = grid.permute(1, 3, 0, 2, 4)  # [rows, columns, 3, lines, dots]
fast = swapped.reshape(256, 588)  # [N, 3 · lines · dots]
assert torch.equal(fast, slow)
assert swapped.data_ptr() == cat.data_ptr() != fast.data_ptr()
print("equal to the loop, number for number")

# %% [markdown]
# As in [lesson 01](01_plotting.ipynb), the first `reshape` and `permute` move no number; they only give
# axes new names. The last `reshape` must write the patches next to each other, so it copies.
#
# PyTorch has a function for exactly this: `F.unfold`. It returns the patches as columns, hence the
# transpose.

# %%
unfolded = F.unfold(cat, kernel_size=14, stride=14)  # [B, 3 · 14 · 14, N]
assert torch.equal(unfolded[0].T, slow)
torch.testing.assert_close(F.linear(unfolded[0].T, weight, bias), vectors, atol=1e-5, rtol=1e-5)
print(tuple(unfolded.shape), "transposed, equal to the loop")

# %% [markdown]
# ### One convolution does both
#
# A **convolution** slides a small window over the picture and takes a weighted sum at each stop. The
# **stride** is how far it jumps. With a window as large as a patch and a jump of a whole patch, every
# stop is one patch: cutting and multiplying become one.
#
# The result is still a grid, channels first. A sequence wants $[B, N, D]$: join rows and columns into one
# axis, *then* swap it with the channel axis.

# %%
kernel = weight.view(8, 3, 14, 14)  # the same 588 weights a row, seen as a small picture
grid = F.conv2d(cat, kernel, bias, stride=14)  # [B, D, rows, columns]
sequence = grid.flatten(2).transpose(1, 2)  # [B, D, N] → [B, N, D]
torch.testing.assert_close(sequence[0], vectors, atol=1e-5, rtol=1e-5)
print(tuple(grid.shape), "→", tuple(sequence.shape), "equal to the loop")

# %% [markdown]
# ## The module
#
# The convolution and the table of positions, nothing else. The names `patch_embedding` and
# `position_embedding` are those of the published checkpoint, so its weights load without renaming.


# %%
class PatchEmbedding(nn.Module):
    def __init__(self, hidden_size, image_size, patch_size):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, hidden_size, patch_size, stride=patch_size)
        self.position_embedding = nn.Embedding((image_size // patch_size) ** 2, hidden_size)

    def forward(self, pixel_values):
        patches = self.patch_embedding(pixel_values)  # [B, D, rows, columns]
        patches = patches.flatten(2).transpose(1, 2)  # [B, N, D]
        return patches + self.position_embedding.weight  # [B, N, D] + [N, D]


# %% [markdown]
# The positions are the *whole* table, always in the same order, so no index is looked up. (`nn.Embedding`
# is there only for its name in the checkpoint.) The same table is added to each picture of a batch.

# %%
embed = PatchEmbedding(hidden_size=8, image_size=224, patch_size=14).requires_grad_(False)
out = embed(cat.repeat(2, 1, 1, 1))
kernel, bias = embed.patch_embedding.weight.flatten(1), embed.patch_embedding.bias  # [D, 588], [D]
by_hand = F.linear(slow, kernel, bias) + embed.position_embedding.weight
torch.testing.assert_close(out, torch.stack([by_hand, by_hand]), atol=1e-5, rtol=1e-5)
print(tuple(out.shape), "equal to loop + matrix product + table")

# %% [markdown]
# ### What a real program adds
#
# Two mistakes pass in silence. A model for pictures of 230 pixels: 14 goes into it 16 times, and six
# lines at the right and at the bottom are never read. And a picture of a single patch: its one vector is
# added to all 256 rows of the table.

# %%
odd = PatchEmbedding(8, 230, 14).requires_grad_(False)
picture = torch.zeros(1, 3, 230, 230)
edge = picture.clone()
edge[:, :, :, 224:] = 1
print("the edge changes the output:", not torch.equal(odd(edge), odd(picture)))
print("one patch gives", embed(cat[:, :, :14, :14]).shape[1], "tokens")

# %% [markdown]
# So both are refused, with a sentence that says what to do. This is the form that is exported.


# %%
#| export
class PatchEmbedding(nn.Module):
    """Cut a square picture into patches and embed each as one vector.

    Args:
        hidden_size: width D of a patch vector.
        image_size: side of the picture in pixels.
        patch_size: side of a patch in pixels; divides `image_size`.
        num_channels: 3 for RGB.

    Raises:
        ValueError: the patch does not divide the picture.

    Source: Dosovitskiy et al. 2021 (ViT), section 3.1; `SiglipVisionEmbeddings` in transformers.
    """

    def __init__(self, hidden_size: int, image_size: int, patch_size: int, num_channels: int = 3):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"image_size {image_size} is not a multiple of patch_size {patch_size}; "
                f"the nearest that fits is {max(1, round(image_size / patch_size)) * patch_size}"
            )
        self.input_shape = (num_channels, image_size, image_size)
        self.num_patches = (image_size // patch_size) ** 2
        self.patch_embedding = nn.Conv2d(num_channels, hidden_size, patch_size, stride=patch_size)
        self.position_embedding = nn.Embedding(self.num_patches, hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`float[B, 3, H, W]` → `float[B, N, D]`, patches row by row from the top left."""
        if pixel_values.shape[1:] != self.input_shape:
            raise ValueError(
                f"pixel_values are {list(pixel_values.shape)}; this model reads "
                f"[B, {', '.join(map(str, self.input_shape))}]: prepare them with ImageProcessor"
            )
        patches = self.patch_embedding(pixel_values)  # [B, D, rows, columns]
        patches = patches.flatten(2).transpose(1, 2)  # [B, N, D]
        return patches + self.position_embedding.weight  # [B, N, D] + [N, D]


# %%
for build in (
    lambda: PatchEmbedding(8, 230, 14),
    lambda: PatchEmbedding(8, 224, 14)(cat[:, :, :14, :14]),
):
    try:
        build()
    except ValueError as error:
        print("refused:", error)

# %% [markdown]
# ## Against the reference
#
# Does it do what the published implementation does? The file holds a picture, weights and the output of
# `SiglipVisionEmbeddings` from transformers, in small (28 × 28 pixels, patch 7, width 16). A test
# computes it afresh. `load_state_dict` is strict: any missing or misspelt name would raise.

# %% tags=["nbval-ignore-output"]
stored = load_file("reference/patch_embedding.safetensors")
ours = PatchEmbedding(hidden_size=16, image_size=28, patch_size=7).requires_grad_(False)
ours.load_state_dict({name: stored[name] for name in ours.state_dict()})
difference = (ours(stored["pixel_values"]) - stored["output"]).abs().max().item()
print(f"largest difference: {difference:.1e}")
assert difference <= 1e-5

# %% [markdown]
# ## See it: what positions do
#
# First without them. We shuffle the patches of the cat.

# %%
order = torch.randperm(256)
shuffled = F.fold(patches[order].T[None], (224, 224), 14, stride=14)  # [1, 3, 224, 224]
pair = [mosaic(patches, 16), mosaic(patches[order], 16)]
show_images(pair, ["the cat", "the same 256 patches, shuffled"], height=2.8)

# %% [markdown]
# Embed both pictures, once with the positions set to zero. For each vector of one picture look for the
# nearest vector of the other: how far is it?


# %%
def gap(embed):
    """Mean distance from a vector of the cat to the nearest one of the shuffled cat."""
    return torch.cdist(embed(cat)[0], embed(shuffled)[0]).min(dim=1).values.mean().item()


with_positions = PatchEmbedding(64, 224, 14).requires_grad_(False)
without = PatchEmbedding(64, 224, 14).requires_grad_(False)
without.position_embedding.weight.zero_()
print(f"without positions {gap(without):.2f}, with positions {gap(with_positions):.2f}")
assert gap(without) < 1e-3 < 1 < gap(with_positions)

# %% [markdown]
# Without positions the two pictures are **the same bag of vectors**. Whatever comes after and treats all
# tokens alike, attention included, cannot tell the cat from the confetti. With positions a patch at a new
# place is a new vector.

# %% [markdown]
# ### What has a trained table learned?
#
# The table starts as noise. A small PaliGemma ships with this course, trained on emoji scenes of 8 × 8
# patches. Is the vector of a place nearest to that of a neighbour, or of any place? Here is its table
# beside a fresh one.

# %%
path = resources.files("paligemma") / "assets" / "tiny" / "model.safetensors"
name = "vision_tower.vision_model.embeddings.position_embedding.weight"
trained = load_file(str(path))[name].float()  # [64, 128]
places = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))  # row and column of each


def nearest_is_neighbour(table):
    """Share of the places whose nearest vector belongs to one of the eight places around it."""
    nearest = torch.cdist(table, table).fill_diagonal_(torch.inf).argmin(dim=1)
    return ((places - places[nearest]).abs().amax(dim=1) == 1).float().mean().item()


learned, fresh = nearest_is_neighbour(trained), nearest_is_neighbour(torch.randn(64, 128))
print(f"trained {learned:.0%}, fresh {fresh:.0%}")
assert learned > 0.85 and fresh < 0.25

# %% [markdown]
# It has found out who lies next to whom, though nobody told it. What are the 64 vectors like? Look for
# the *directions* along which they differ most (a singular value decomposition finds them), and draw
# where each place stands along each:

# %%
apart = trained - trained.mean(dim=0)  # [64, 128]
along, sizes, _ = torch.linalg.svd(apart, full_matrices=False)  # [64, 64], [64]
shares = sizes.square() / sizes.square().sum()
print("shares of all differences:", [f"{share:.0%}" for share in shares[:4]])
assert shares[:3].sum() > 0.85 and shares[3] < 0.05


# %%
def like(values, other):
    """How alike two lists of 64 numbers are: the size of their correlation, 0 … 1."""
    return torch.corrcoef(torch.stack([values, other]))[0, 1].abs().item()


border = ((places == 0) | (places == 7)).any(dim=1).float()
asked = {"border": border, "column": places[:, 1], "row": places[:, 0]}
found = {name: like(along[:, i], values) for i, (name, values) in enumerate(asked.items())}
print({name: round(value, 2) for name, value in found.items()})
assert min(found.values()) > 0.7

# %% tags=["hide-input"]
figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
for i, (axis, name) in enumerate(zip(axes, ("border or inside", "left or right", "top or bottom"))):
    values = along[:, i].view(8, 8)
    values = values * values[0, 0].sign()  # a direction has no sign of its own
    axis.imshow(values, cmap=DIVERGING, vmin=-values.abs().max(), vmax=values.abs().max())
    axis.set_title(f"direction {i + 1}: {name}")
    axis.set_axis_off()
save_figure(figure, "03_positions")

# %% [markdown]
# **What to notice.** Orange and blue are the two ends of a direction. Three of 128 directions hold about
# nine tenths of all differences, and they are nearly the ones that a person would choose: is it at the
# *border*, how far *right*, how far *down* (the last two lie a little askew). Nobody wrote rows and
# columns into the table. But this model has to put boxes around things, and boxes need places.

# %% [markdown]
# ### Nothing is lost
#
# A patch of 588 numbers goes into a vector of 1152. There is room for all of it: even from random weights
# the picture can be computed back. So the embedding is no summary, only a change of coordinates, learned
# to make what the next layers need easy to read.

# %%
big = PatchEmbedding(hidden_size=1152, image_size=224, patch_size=14).requires_grad_(False)
vectors = big(cat)[0] - big.position_embedding.weight - big.patch_embedding.bias  # [256, 1152]
back = torch.linalg.lstsq(big.patch_embedding.weight.flatten(1), vectors.T).solution.T
torch.testing.assert_close(back, slow, atol=1e-3, rtol=0)
print("all", back.numel(), "pixel values recovered")

# %% [markdown]
# ## At full size
#
# PaliGemma's vision tower is SigLIP So400m/14: width 1152, patch 14. We build it on the device "meta":
# shapes without memory. A multiplication with its addition counts as two FLOPs; PyTorch's own counter
# must agree with the formula $2 \cdot N \cdot 588 \cdot 1152$.

# %%
print("size  tokens  parameters   MFLOPs  MB of weights  MB out   (bfloat16)")
for size in (224, 448, 896):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        full = PatchEmbedding(1152, size, 14)
        out = full(torch.empty(1, 3, size, size))
    count, flops = sum(p.numel() for p in full.parameters()), counter.get_total_flops()
    assert flops == 2 * full.num_patches * 588 * 1152
    weights, result = count * 2 / 1e6, out.numel() * 2 / 1e6  # two bytes a number
    sums = f"{full.num_patches:8} {count:11,} {flops / 1e6:8,.0f}"
    print(f"{size} {sums} {weights:14.2f} {result:7.2f}")
assert 973_440 / 412_442_352 < 0.0025

# %% [markdown]
# Twice the side: four times the tokens, FLOPs and output; of the weights only the table grows. At 224
# the part has a quarter of one percent of the tower's 412,442,352 parameters
# ([lesson 05](05_siglip.ipynb)). It is nearly free. What costs is the choice of `patch_size`: it fixes how
# many tokens all later layers carry.

# %% [markdown]
# ## A bug people really make
#
# A colleague writes the module anew. It runs, the shapes are right, the loss goes down. Read `forward`
# before you scroll on.


# %%
class ColleaguesEmbedding(PatchEmbedding):
    def forward(self, pixel_values):
        patches = self.patch_embedding(pixel_values)  # [B, D, rows, columns]
        patches = patches.reshape(len(patches), self.num_patches, -1)  # [B, N, D]
        return patches + self.position_embedding.weight


# %% [markdown]
# We train both on a small task. In a picture of noise, 4 × 4 patches, one patch holds one of eight
# patterns. *What* is it, and *where* is it?

# %%
patterns = torch.randn(8, 7, 7).sign()  # black and white pixels


def task(B=64):
    what, where = torch.randint(8, (B,)), torch.randint(16, (B,))
    pictures = torch.randn(B, 3, 4, 7, 4, 7)  # [B, 3, rows, lines, columns, dots]
    pictures[torch.arange(B), :, where // 4, :, where % 4] += patterns[what][:, None]
    return pictures.reshape(B, 3, 28, 28), what, where


# %% [markdown]
# Behind the embedding a small network reads every token in the same way, keeps the largest number that
# any token gave, and answers from that.


# %%
def learn(kind):
    """Shares of right answers to "what" and "where", at each of 150 steps."""
    torch.manual_seed(0)
    embed, read, answer = kind(32, 28, 7), nn.Linear(32, 64), nn.Linear(64, 8 + 16)
    optimizer = torch.optim.Adam(nn.ModuleList([embed, read, answer]).parameters(), lr=0.003)
    right = []
    for _ in range(150):
        pictures, what, where = task()
        out = answer(F.relu(read(F.relu(embed(pictures)))).amax(dim=1))  # [B, 24]
        whats, wheres = out.split([8, 16], dim=1)
        loss = F.cross_entropy(whats, what) + F.cross_entropy(wheres, where)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right.append(
            [(whats.argmax(1) == what).float().mean(), (wheres.argmax(1) == where).float().mean()]
        )
    return torch.tensor(right)


# %%
curves = {"ours": learn(PatchEmbedding), "the colleague's": learn(ColleaguesEmbedding)}
halfway = {name: right[60:90].mean(dim=0).tolist() for name, right in curves.items()}
for name, (what, where) in halfway.items():
    print(f"steps 60 to 90, {name:16} what {what:.0%}, where {where:.0%}")
assert halfway["ours"][0] > 0.95 and halfway["the colleague's"][0] < 0.5
assert halfway["ours"][1] < 0.8 < halfway["the colleague's"][1]
assert all(right[-20:, 1].mean() > 0.9 for right in curves.values())

# %% tags=["hide-input"]
figure, axes = plt.subplots(1, 2, figsize=(8.6, 2.8), layout="constrained", sharey=True)
for index, (axis, title) in enumerate(zip(axes, ("what is it?", "where is it?"))):
    for (name, right), colour in zip(curves.items(), ("good", "bad")):
        smooth = F.avg_pool1d(right[None, :, index], 10, stride=5)[0]
        axis.plot(torch.arange(len(smooth)) * 5 + 5, smooth, color=COLOURS[colour], label=name)
    axis.set(title=title, xlabel="step", ylim=(0, 1.03))
axes[0].set_ylabel("share of right answers")
axes[0].legend()
save_figure(figure, "03_what_where")

# %% [markdown]
# Both learn, only the colleague's module is slow to see *what* is there: when ours is nearly always
# right, it is wrong more often than not. And it learns *where* even sooner. So it is not the places that
# it loses. What is it?

# %% [markdown]
# To look inside, let the weights *copy*: width 588, an identity matrix as kernel, no bias, no positions.
# Then each output vector should simply be a patch, and we can draw it.

# %%
views = []
for kind in (PatchEmbedding, ColleaguesEmbedding):
    copy = kind(588, 224, 14).requires_grad_(False)
    copy.patch_embedding.weight.copy_(torch.eye(588).view(588, 3, 14, 14))
    copy.patch_embedding.bias.zero_()
    copy.position_embedding.weight.zero_()
    views.append(mosaic(copy(cat)[0], 16, gap=1))
save_figure(show_images(views, ["ours", "the colleague's"], height=3.4), "03_bug.png")

# %% [markdown]
# The picture is shredded. The convolution's result lies in memory as D grids of 16 × 16. `reshape` to
# $[N, D]$ cuts that memory into runs of D numbers. Its "token 0" is filter 0 at all 256 places, then
# filter 1 at all places, and the first part of filter 2.
#
# So a token knows many places and few filters: hardly *what* is at any of them.

# %% [markdown]
# ### The check that finds it
#
# Do not look at shapes; ask about **cause and effect**. Change one patch of the picture: exactly one token
# may change. This works for any weights and in any framework.


# %%
def tokens_touched(kind):
    """Which tokens change when only the patch in row 3, column 5 does."""
    embed = kind(hidden_size=32, image_size=224, patch_size=14).requires_grad_(False)
    changed = cat.clone()
    changed[:, :, 3 * 14 : 4 * 14, 5 * 14 : 6 * 14] += 1
    moved = (embed(changed) - embed(cat)).abs().amax(dim=2)[0] > 1e-6
    return moved.nonzero().flatten().tolist()


# %%
print("ours:", tokens_touched(PatchEmbedding), " expected:", [3 * 16 + 5])
touched = tokens_touched(ColleaguesEmbedding)
print("the colleague's:", len(touched), "tokens:", touched[:5], "…")
assert tokens_touched(PatchEmbedding) == [53] and len(touched) > 1

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): count
#
# `PatchEmbedding(hidden_size=10, image_size=42, patch_size=7)` reads a picture in colour. **(a)** How
# many tokens does it make? **(b)** How many parameters has it, biases and positions included? **(c)**
# Which token holds the pixel at x = 30, y = 20? Answer with three whole numbers.

# %% tags=["exercise"]
answer = None  # your answer: (tokens, parameters, index)


# %% tags=["check"]
def test_1(answer):
    assert isinstance(answer, tuple | list) and len(answer) == 3, "give three numbers: (a, b, c)"
    assert all(isinstance(value, int) for value in answer), "give whole numbers"
    embed = PatchEmbedding(10, 42, 7)
    assert answer[0] == embed.num_patches, "(a) rows of patches times patches in a row"
    table = embed.position_embedding.weight.numel()
    kernel, bias = (t.numel() for t in embed.patch_embedding.parameters())
    assert answer[1] not in (kernel + bias, kernel), "(b) the table of positions is missing"
    assert answer[1] != kernel + table, "(b) the biases are missing"
    assert answer[1] not in (kernel // 3 + bias + table, kernel // 3 + table), (
        "(b) colour: three channels"
    )
    assert answer[1] == kernel + bias + table, "(b) add up: kernel, biases, table of positions"
    x, y = divmod(answer[2], 6)
    assert (x, y) != (30 // 7, 20 // 7), "(c) y says which row of patches, x which patch in it"
    image = torch.zeros(1, 3, 42, 42)
    image[:, :, 20, 30] = 1
    lit = F.unfold(image, 7, stride=7)[0].sum(dim=0).argmax().item()
    assert answer[2] == lit, "(c) that token's patch does not hold the pixel; both count from 0"


check(test_1, answer)

# %% [markdown]
# <details><summary>Hint</summary>
#
# 42 / 7 patches a side. A patch holds 3 · 7 · 7 numbers; each of the 10 outputs has a weight for each of
# them. For the last question divide y and x by 7.
#
# </details>

# %% tags=["solution"]
# 6 × 6 tokens; 10 rows of 147 weights, 10 biases, 36 positions of width 10; row 2, column 4.
answer = (36, 10 * 147 + 10 + 36 * 10, 2 * 6 + 4)
check(test_1, answer)

# %% [markdown]
# ### Exercise 2 (write): the module as one function
#
# Write the whole part for a batch of pictures, with `reshape`, `permute` and a matrix product; no
# convolution and no `unfold`. `weight` is the convolution's kernel, float[D, 3, size, size]; `table` holds
# the positions, float[N, D]. Return float[B, N, D].


# %% tags=["exercise"]
def embed_by_hand(pixel_values, weight, bias, table):
    return None  # your code


# %% tags=["check"]
def test_2(embed_by_hand):
    torch.manual_seed(0)
    embed = PatchEmbedding(hidden_size=5, image_size=12, patch_size=4).requires_grad_(False)
    kernel, bias = embed.patch_embedding.weight, embed.patch_embedding.bias
    table, x = embed.position_embedding.weight, torch.randn(2, 3, 12, 12)
    out = embed_by_hand(x, kernel, bias, table)
    assert isinstance(out, torch.Tensor), "return a tensor"
    assert out.shape == (2, 9, 5), f"[B, N, D] = [2, 9, 5] wanted, not {list(out.shape)}"

    def same(a, b):
        return torch.allclose(a, b, atol=1e-5)

    right, zeros = embed(x), torch.zeros_like(table)
    assert not same(out, right - bias), "the bias is missing"
    assert not same(out, right - table), "the positions are missing"
    assert not same(out, right - bias - table), "bias and positions are missing"
    assert same(out - embed_by_hand(x, kernel, bias, zeros), table.expand(2, 9, 5)), (
        "each row of the table must be added to one token, the same for each picture"
    )
    rest = x.clone()
    rest[1] += 1
    assert same(embed_by_hand(rest, kernel, bias, table)[0], out[0]), (
        "a picture's tokens depend on the other picture of the batch"
    )
    assert same(embed_by_hand(x[1:], kernel, bias, table)[0], out[1]), (
        "the second picture gives other tokens alone than in a batch"
    )
    changed = x.clone()
    changed[:, :, 4:8, 8:] += 1  # row 1, column 2
    moved = (embed_by_hand(changed, kernel, bias, table) - out).abs().amax(dim=(0, 2)) > 1e-6
    moved = moved.nonzero().flatten().tolist()
    assert len(moved) == 1, (
        f"one patch changed and {len(moved)} tokens moved: which axes belong together?"
    )
    assert moved == [5], "the tokens are not in reading order"
    assert same(out, right), "each token has its patch, but weights meet the wrong pixels of it"


check(test_2, embed_by_hand)

# %% [markdown]
# <details><summary>Hint</summary>
#
# As in "Vectorised", with one axis more in front. The kernel's 3 · size · size weights lie as channel,
# line, dot: so must the patch's numbers. `flatten(1)` makes the kernel a matrix.
#
# </details>


# %% tags=["solution"]
def embed_by_hand(pixel_values, weight, bias, table):
    size = weight.shape[-1]
    side = pixel_values.shape[-1] // size
    grid = pixel_values.reshape(-1, 3, side, size, side, size)
    # Row and column of the patch to the front; inside a patch: channel, line, dot, as in the kernel.
    patches = grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, side * side, 3 * size * size)
    return patches @ weight.flatten(1).T + bias + table


check(test_2, embed_by_hand)

# %% [markdown]
# ### Exercise 3 (extend): a table for a larger picture
#
# A model trained at 224 has 256 positions; at 448 it needs 1024. The usual start is to see the table as a
# small *picture* with D channels and enlarge it. Write `resize_positions(table, side)`: float[N, D] →
# float[side², D], bilinear (`F.interpolate`, `align_corners=False`).


# %% tags=["exercise"]
def resize_positions(table, side):
    return None  # your answer


# %% tags=["check"]
def test_3(resize_positions):
    old = torch.arange(4.0)
    ramp = torch.stack([old.repeat_interleave(4), old.repeat(4)], dim=1)  # (row, column) of 4 × 4
    same, new = resize_positions(ramp, 4), resize_positions(ramp, 8)
    assert isinstance(same, torch.Tensor) and isinstance(new, torch.Tensor), "return the new table"
    assert new.shape == (64, 2), f"8 × 8 places of width 2 wanted, got {list(new.shape)}"
    assert torch.allclose(same, ramp), "at the same size nothing may change: are the axes in order?"
    row, column = new.view(8, 8, 2).unbind(-1)
    assert torch.allclose(row, row[:, :1].expand(8, 8)) and (row.diff(dim=0) >= 0).all(), (
        "the first channel must grow from row to row and be equal within one: rows are mixed up"
    )
    assert torch.allclose(column, column[:1].expand(8, 8)), "columns are mixed up"
    assert torch.unique(row).numel() > 4, "old rows are repeated; between two rows there is a mean"
    assert row.max() <= 3.0001, "bicubic overshoots; bilinear is asked for"
    assert not torch.allclose(row[1, 0], torch.tensor(3 / 7)), "the corners are aligned"
    expected = F.interpolate(old[None, None], 8, mode="linear")[0, 0]
    assert torch.allclose(row[:, 0], expected, atol=1e-5), "not bilinear"


check(test_3, resize_positions)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `F.interpolate` wants `[1, D, rows, columns]`. Go there and back with `reshape` *and* `permute`: the bug
# of this lesson is waiting on both ways.
#
# </details>


# %% tags=["solution"]
def resize_positions(table, side):
    # Channels to the front for the resize, and back behind the places after it.
    old = round(len(table) ** 0.5)
    grid = table.reshape(1, old, old, -1).permute(0, 3, 1, 2)  # [1, D, rows, columns]
    grid = F.interpolate(grid, (side, side), mode="bilinear", align_corners=False)
    return grid.flatten(2)[0].T  # [side², D]


check(test_3, resize_positions)

# %% [markdown]
# ## Summary
#
# - A picture becomes a sequence by cutting: N = (size / patch)², in reading order.
# - The embedding is one matrix product for each patch. `Conv2d` with kernel = stride is that
#   product.
# - Without positions a picture is a bag of patches; a learned table gives each position its
#   own vector.
# - The part is cheap. The number of tokens it makes is not.
# - Test *what affects what*, not only shapes.

# %% [markdown]
# ## Quiz
#
# **1.** What would `kernel_size=14, stride=7` do at 224 pixels?
#
# <details><summary>Answer</summary>
#
# Patches overlap by half. The window stops (224 − 14) / 7 + 1 = 31 times each way: 961 tokens
# instead of 256, and each inner pixel is seen four times. The weights keep their shape.
#
# </details>

# %% [markdown]
# **2.** Why can the 224 checkpoint not read a 448 picture as it is?
#
# <details><summary>Answer</summary>
#
# The convolution could. The table of positions cannot: 256 rows for 1024 patches. It must be
# enlarged (exercise 3) and trained further, and that is why there are separate checkpoints for
# each size.
#
# </details>

# %% [markdown]
# **3.** Going from 224 to 896 pixels, by how much do tokens grow, and by how much the pairs that
# attention compares?
#
# <details><summary>Answer</summary>
#
# The side grows four times, tokens 16 times (256 → 4096), pairs 256 times. For small print or
# small objects this can be worth it; for naming the animal it is not.
#
# </details>

# %% [markdown]
# ## References
#
# - Dosovitskiy et al. 2021, *An Image is Worth 16x16 Words* (ViT), section 3.1; its figure 7 shows
#   learned positions.
# - Zhai et al. 2023, *Sigmoid Loss for Language Image Pre-Training* (SigLIP); Alabdulmohsin et al.
#   2023 for the So400m shape.
# - Beyer et al. 2024, *PaliGemma*, section 3: sizes 224, 448, 896.
# - `SiglipVisionEmbeddings` in transformers, `modeling_siglip.py`; `vit.py` in big_vision.

# %% [markdown] tags=["navigation"]
# [← Image processor](02_image_processor.ipynb) | [contents](00_overview.ipynb) | [SigLIP's attention →](04_siglip_attention.ipynb)
