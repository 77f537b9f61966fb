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
# - show what goes wrong without positions, and what a learned position is;
# - count the tokens, parameters, FLOPs and bytes at 224, 448 and 896 pixels.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("patch_embedding")

# %% [markdown]
# ## Setup
#
# From earlier lessons we need the drawing helpers ([lesson 01](01_plotting.ipynb)) and the `ImageProcessor`, which
# turns a picture file into numbers between −1 and 1 ([lesson 02](02_image_processor.ipynb)).

# %%
#| export
"""A picture cut into patches, each patch one vector with a learned position."""

import torch
from torch import nn

# %% tags=["setup"]
import time

import matplotlib.pyplot as plt
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from paligemma.image_processor import ImageProcessor
from paligemma.plotting import show_heatmap, show_images
from paligemma.support.course import check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS

_ = torch.manual_seed(0)

# %% [markdown]
# ## The problem
#
# A transformer reads a **sequence of vectors**: token 0, token 1, token 2 … A picture is a grid of
# pixels, and each pixel is only three numbers. Something has to stand between the two.
#
# One token for each pixel? Attention ([lesson 04](04_siglip_attention.ipynb)) compares each token with each other token, so the
# work grows with the *square* of their number. Let us count.

# %%
pixels = 224 * 224
print(f"one token a pixel: {pixels:,} tokens, {pixels**2:,} pairs for attention to compare")
patches = (224 // 14) ** 2
print(f"one token a 14×14 patch: {patches} tokens, {patches**2:,} pairs")

# %% [markdown]
# Squares of 14 × 14 pixels bring the pairs down by a factor of 196² ≈ 38,000. Such a square is a
# **patch**. It is the picture's word: small enough to be simple, large enough to hold an edge or
# an eye.
#
# Here is the cat as the vision tower sees it: squashed to 224 × 224, then cut into 16 rows of 16
# patches. `mosaic` only draws patches, each given as one row of numbers.


# %%
def mosaic(patches, side, gap=0):
    """Draw float[N, 3·P·P] in [-1, 1] as `side` rows of patches, with white lines between."""
    tiles = patches.reshape(len(patches), 3, -1)
    size = round(tiles.shape[2] ** 0.5)
    tiles = F.pad((tiles.reshape(-1, 3, size, size) + 1) / 2, (gap,) * 4, value=1.0)
    flat = tiles.reshape(1, len(patches), -1).transpose(1, 2)
    size += 2 * gap
    whole = F.fold(flat, (side * size, len(patches) // side * size), size, stride=size)
    return whole[0].permute(1, 2, 0).clamp(0, 1)


cat = ImageProcessor(224)(sample_picture("cat"))  # (1, 3, 224, 224)
tokens = F.unfold(cat, 14, stride=14)[0].T  # (256, 588), explained below
print(tuple(cat.shape), "→", tuple(tokens.shape))

# %%
figure, axes = plt.subplot_mosaic(
    [["whole", "cut"], ["row", "row"]],
    figsize=(8.4, 5.4),
    height_ratios=[6, 1],
    layout="constrained",
)
axes["whole"].imshow((cat[0].permute(1, 2, 0) + 1) / 2)
axes["whole"].set_title("224 × 224 pixels")
axes["cut"].imshow(mosaic(tokens, 16, gap=1))
axes["cut"].add_patch(
    plt.Rectangle((0, 7 * 16), 255, 16, fill=False, color=COLOURS["language"], linewidth=2)
)
axes["cut"].set_title("16 × 16 patches of 14 × 14 pixels")
axes["row"].imshow(mosaic(tokens[112:128], 1, gap=1))
axes["row"].set_title("tokens 112 … 127 of the sequence (the framed row)")
for axis in axes.values():
    axis.set_axis_off()
save_figure(figure, "03_patches.png")

# %% [markdown]
# The order is that of reading: row by row, from the top left. Token 16 lies right *below* token 0,
# although fifteen others stand between them. Nothing in a sequence says so. That is the second
# half of this lesson.

# %% [markdown]
# ## By hand
#
# A grey picture of 4 × 4 pixels, numbered in reading order, and patches of 2 × 2. With a pencil:
# which four numbers stand in patch 1?

# %%
picture = torch.arange(16).view(4, 4)
patches = torch.stack([picture[y : y + 2, x : x + 2].flatten() for y in (0, 2) for x in (0, 2)])
print(picture, patches, sep="\n\n")

_, (left, right) = plt.subplots(1, 2, figsize=(6, 2.6), layout="constrained")
show_heatmap(picture, "the picture", annotate=True, ax=left)
names = [f"patch {n}" for n in range(4)]
show_heatmap(patches, "one patch a row", rows=names, annotate=True, ax=right)

# %% [markdown]
# Patch 1 is `2 3 6 7`: two numbers from the first line, two from the second. In memory these pairs
# are *not* neighbours, four and five lie between them. Keep this in mind for the bug below.

# %% [markdown]
# Now each patch becomes a **vector**. Every entry of it is a weighted sum of the patch's pixels:
# one row of weights for each entry. We choose two rows by hand: one adds all pixels, one takes
# right minus left.

# %%
weight = torch.tensor([[1, 1, 1, 1], [-1, 1, -1, 1]])  # (D=2, pixels=4)
vectors = patches @ weight.T  # (N=4, D=2)
print(vectors)

# %% [markdown]
# Patch 0 holds 0, 1, 4, 5: the sum is 10, and right minus left is (1 + 5) − (0 + 4) = 2. The whole
# "embedding" is this one matrix product. In the real model the rows of weights are learned, and
# there are 1152 of them.

# %% [markdown]
# ### Where was it?
#
# Take a picture of plain sky: all pixels equal, so all vectors are equal. Top and bottom cannot be
# told apart. The cure is to add to each vector a second one that depends only on the *place*.

# %%
sky = torch.full((4, 4), 5) @ weight.T
places = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])  # one vector a place
print(sky, sky + places, sep="\n\n")

# %% [markdown]
# Now the four are distinct. `places` is a plain table with one row for each place. In SigLIP it
# starts as random numbers and is **learned** like any other weight. Nobody tells the model which
# rows are neighbours.

# %% [markdown]
# ## As a loop
#
# The plainest code for a colour picture: walk over rows and columns, cut a square, write its
# numbers in one line: first all red ones, then green, then blue. `C` is the number of channels,
# `P` the patch's side. Then embed one patch at a time, here into 8 numbers with random weights.


# %%
def patches_by_loop(pixels, P):
    """float[C, H, W] → float[N, C·P·P], row by row."""
    _, H, W = pixels.shape
    patches = []
    for y in range(0, H, P):
        for x in range(0, W, P):
            patches.append(pixels[:, y : y + P, x : x + P].flatten())
    return torch.stack(patches)


slow = patches_by_loop(cat[0], 14)
D = 8
weight, bias = torch.randn(D, 588) / 588**0.5, torch.randn(D)
vectors = torch.stack([weight @ patch + bias for patch in slow])
print(tuple(slow.shape), "→", tuple(vectors.shape))

# %% [markdown]
# ## Vectorised
#
# No loop is needed. Split the height in two axes (which row of patches, which line inside the
# patch), the width likewise. Then bring the two "which patch" axes to the front.
#
# $$(C,\ RP,\ SP) \to (C, R, P, S, P) \to (R, S, C, P, P) \to (RS,\ CPP)$$


# %%
def patches_by_reshape(pixels, P):
    """float[C, H, W] → float[N, C·P·P], row by row."""
    C, H, W = pixels.shape
    grid = pixels.reshape(C, H // P, P, W // P, P)  # (C, R, P, S, P)
    grid = grid.permute(1, 3, 0, 2, 4)  # (R, S, C, P, P)
    return grid.reshape(-1, C * P * P)  # (N, C·P·P)


assert torch.equal(patches_by_reshape(cat[0], 14), slow)
print("equal to the loop, number for number")

# %% [markdown]
# `reshape` only renames addresses; `permute` is what moves patches together. PyTorch also has a
# function for exactly this: `F.unfold`. It returns the patches as columns, hence the transpose.

# %%
unfolded = F.unfold(cat, kernel_size=14, stride=14)  # (B, C·P·P, N)
assert torch.equal(unfolded[0].T, slow)
assert torch.allclose(F.linear(unfolded[0].T, weight, bias), vectors, atol=1e-5)
print(tuple(unfolded.shape), "transposed, equal to the loop")

# %% [markdown]
# ### One convolution does both
#
# A **convolution** slides a small window over the picture and takes a weighted sum at each stop.
# With a window as large as a patch and a jump of a whole patch (`stride=14`), every stop is one
# patch: cutting and multiplying become one.
#
# The result is still a grid, channels first. A sequence wants `(B, N, D)`: join rows and columns
# into one axis, *then* swap it with the channel axis.

# %%
kernel = weight.view(D, 3, 14, 14)  # the same 588 weights a row, seen as a small picture
grid = F.conv2d(cat, kernel, bias, stride=14)  # (B, D, rows, columns)
sequence = grid.flatten(2).transpose(1, 2)  # (B, D, N) → (B, N, D)
assert torch.allclose(sequence[0], vectors, atol=1e-5)
print(tuple(grid.shape), "→", tuple(sequence.shape), "equal to the loop")

# %% [markdown]
# ## The module
#
# The convolution, the table of positions, and two checks. The names `patch_embedding` and
# `position_embedding` are those of the published checkpoint, so its weights load without renaming.


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
        patches = self.patch_embedding(pixel_values)  # (B, D, rows, columns)
        patches = patches.flatten(2).transpose(1, 2)  # (B, N, D)
        return patches + self.position_embedding.weight  # (B, N, D) + (N, D)


# %% [markdown]
# The positions are the *whole* table, always in the same order, so no index is looked up.
# `nn.Embedding` is kept only for its name in the checkpoint. The same table is added to each
# picture of a batch.

# %%
embed = PatchEmbedding(hidden_size=D, image_size=224, patch_size=14)
with torch.no_grad():
    out = embed(cat.repeat(2, 1, 1, 1))
    kernel, bias = embed.patch_embedding.weight.flatten(1), embed.patch_embedding.bias  # (D, 588)
    by_hand = F.linear(slow, kernel, bias) + embed.position_embedding.weight
assert out.shape == (2, 256, D)
assert torch.allclose(out[0], by_hand, atol=1e-5) and torch.equal(out[0], out[1])
print(tuple(out.shape), "equal to loop + matrix product + table")

# %% [markdown]
# ## Against the reference
#
# Does it do what the published implementation does? The file holds a picture, weights and the
# output of `SiglipVisionEmbeddings` from transformers, in small (28 × 28 pixels, patch 7, width
# 16). A test computes it afresh. `load_state_dict` is strict: any missing or misspelt name would
# raise.

# %% tags=["nbval-ignore-output"]
stored = load_file("reference/patch_embedding.safetensors")
ours = PatchEmbedding(hidden_size=16, image_size=28, patch_size=7)
ours.load_state_dict({name: stored[name] for name in ours.state_dict()})
with torch.no_grad():
    difference = (ours(stored["pixel_values"]) - stored["output"]).abs().max().item()
assert difference <= 1e-5
print(f"largest difference: {difference:.1e}")

# %% [markdown]
# ## See it: what positions do
#
# First without them. We shuffle the patches of the cat and embed both pictures with the positions
# set to zero. For each vector of one picture we look for the nearest vector of the other.

# %%
order = torch.randperm(256)
shuffled = F.fold(tokens[order].T[None], (224, 224), 14, stride=14)  # (1, 3, 224, 224)


def gap(embed):
    """Mean distance from a vector of the cat to the nearest one of the shuffled cat."""
    with torch.no_grad():
        return torch.cdist(embed(cat)[0], embed(shuffled)[0]).min(dim=1).values.mean().item()


with_positions, without = PatchEmbedding(64, 224, 14), PatchEmbedding(64, 224, 14)
without.position_embedding.weight.data.zero_()
gaps = [gap(without), gap(with_positions)]
assert gaps[0] < 1e-3 < gaps[1]
print(f"without positions {gaps[0]:.2f}, with positions {gaps[1]:.2f}")

# %%
pair = [mosaic(tokens, 16), mosaic(tokens[order], 16)]
show_images(pair, ["the cat", "the same 256 patches, shuffled"], height=2.8)

# %% [markdown]
# Without positions the two pictures are **the same bag of vectors**. Whatever comes after and
# treats all tokens alike, attention included, cannot tell the cat from the confetti. With
# positions a patch at a new place is a new vector.

# %% [markdown]
# ### What does a learned position look like?
#
# The table starts as noise. Let us learn one, for a task that needs places: *guess a patch's
# colour from all the others*. We take 150 random crops of the three photographs, each as 8 × 8
# patches with one mean colour a patch.


# %%
def crop(index):
    """One random square of a sample photograph as 8 × 8 colours: float[64, 3] in [-1, 1]."""
    photo = sample_picture(("cat", "coffee", "astronaut")[index % 3])
    size = int(torch.randint(100, 300, ()))
    left = int(torch.randint(0, photo.width - size, ()))
    top = int(torch.randint(0, photo.height - size + 1, ()))
    square = photo.crop((left, top, left + size, top + size))
    return ImageProcessor(8)(square)[0].flatten(1).T


colours = torch.cat([crop(index) for index in range(150)], dim=1)  # (64, 150 · 3)
print(tuple(colours.shape))

# %% [markdown]
# The guess is a weighted mean of the other 63 colours. The weights come from the **position
# vectors alone**: large where two of them point the same way (a dot product), turned into shares
# that add up to 1 by softmax. This is a first taste of attention.


# %%
def guess(table):
    """Each patch's colour from the other patches; weights from positions only."""
    scores = table @ table.T  # (64, 64)
    scores = scores.masked_fill(torch.eye(64, dtype=torch.bool), -torch.inf)  # not from itself
    return scores.softmax(dim=-1) @ colours  # (64, 450)


table = nn.Parameter(torch.randn(64, 16) * 0.1)
before = table.detach().clone()
optimizer = torch.optim.Adam([table], lr=0.05)
for step in range(101):
    loss = ((guess(table) - colours) ** 2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (0, 20, 100):
        print(f"step {step:3d}: squared error {loss.item():.3f}")

# %% [markdown]
# At step 0 all places look alike and the guess is the mean of the others. At the end it is about a
# quarter of that. What has the table learned? We take four places and draw how similar (cosine)
# every other place's vector is to theirs.

# %%
figure, axes = plt.subplots(2, 4, figsize=(8.4, 4.6), layout="constrained")
for row, (values, name) in enumerate([(before, "before"), (table.detach(), "learned")]):
    unit = F.normalize(values, dim=1)
    for axis, place in zip(axes[row], (0, 18, 36, 55)):
        show_heatmap((unit @ unit[place]).view(8, 8), centre=0, ax=axis)
        axis.plot(
            place % 8, place // 8, "o", color=COLOURS["paper"], markeredgecolor=COLOURS["ink"]
        )
        axis.set_title(f"{name}, place {place}")
save_figure(figure, "03_positions")

# %% [markdown]
# **What to notice.** Orange is similar, blue is opposite, the dot is the place itself. Nobody told
# the table that place 18 lies below place 10. It *found* the grid, because near patches have near
# colours. Position tables of trained vision transformers show the same spots.

# %% [markdown]
# ### Nothing is lost
#
# A patch of 588 numbers goes into a vector of 1152. There is room for all of it: even from random
# weights the picture can be computed back. So the embedding is no summary, only a change of
# coordinates, learned to make what the next layers need easy to read. Summarising starts in the
# encoder.

# %%
big = PatchEmbedding(hidden_size=1152, image_size=224, patch_size=14)
with torch.no_grad():
    vectors = big(cat)[0] - big.position_embedding.weight - big.patch_embedding.bias  # (256, 1152)
    back = torch.linalg.lstsq(big.patch_embedding.weight.flatten(1), vectors.T).solution.T
assert torch.allclose(back, slow, atol=1e-3)
print("all", back.numel(), "pixel values recovered")

# %% [markdown]
# ## At full size
#
# PaliGemma's vision tower is SigLIP So400m/14: width 1152, patch 14. We build it on the **meta
# device**: shapes without memory. A multiplication with its addition counts as two FLOPs;
# PyTorch's own counter must agree with the formula $2 \cdot N \cdot 588 \cdot 1152$.

# %%
print("size  tokens  parameters   MFLOPs  MB of weights  MB out   (bfloat16)")
for size in (224, 448, 896):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        full = PatchEmbedding(1152, size, 14)
        out = full(torch.empty(1, 3, size, size))
    count = sum(p.numel() for p in full.parameters())
    flops = counter.get_total_flops()
    N = full.num_patches
    assert flops == 2 * N * (3 * 14 * 14) * 1152
    weights, result = count * 2 / 1e6, out.numel() * 2 / 1e6  # two bytes a number
    print(f"{size:4} {N:7} {count:11,} {flops / 1e6:8,.0f} {weights:14.2f} {result:7.2f}")

D, M, layers = 1152, 4304, 27
block = 4 * (D * D + D) + (D * M + M) + (M * D + D) + 4 * D
patch_part = 3 * 14 * 14 * D + D + 256 * D
tower = patch_part + layers * block + 2 * D
print(f"{patch_part:,} of {tower:,} parameters: {patch_part / tower:.2%}")

# %% [markdown]
# Twice the side: four times the tokens, FLOPs and output; of the weights only the table grows.
# Last line: the part's share of the whole tower at 224, whose 27 blocks are counted by formula
# ([lesson 05](05_siglip.ipynb) builds them). The part is nearly free; its *choice* is dear, since it fixes how many
# tokens all later layers carry.
#
# Now the time on this machine: the module at each size, then the three ways at 448.


# %% tags=["nbval-ignore-output"]
def best(function, *inputs):
    """Shortest of three runs, in milliseconds."""
    times = []
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            function(*inputs)
            times.append(time.perf_counter() - start)
    return 1000 * min(times)


for size in (224, 896, 448):
    full, image = PatchEmbedding(1152, size, 14), torch.randn(1, 3, size, size)
    print(f"{size}: {best(full, image):.1f} ms")

kernel, bias = full.patch_embedding.weight.flatten(1), full.patch_embedding.bias
loop = lambda: torch.stack([kernel @ patch + bias for patch in patches_by_loop(image[0], 14)])
matrix = lambda: F.linear(patches_by_reshape(image[0], 14), kernel, bias)
for name, way in {"loop": loop, "reshape": matrix, "Conv2d": lambda: full(image)}.items():
    print(f"{name:8} {best(way):6.1f} ms")

# %% [markdown]
# ## A bug people really make
#
# A colleague writes the module anew. It runs, the shapes are right, the loss goes down. But after
# a day of training the model names colours well and never says *where* anything is. Read `forward`
# and compare the numbers before you scroll on.


# %%
class ColleaguesEmbedding(PatchEmbedding):
    def forward(self, pixel_values):
        patches = self.patch_embedding(pixel_values)  # (B, D, rows, columns)
        patches = patches.reshape(len(patches), self.num_patches, -1)  # (B, N, D)
        return patches + self.position_embedding.weight


torch.manual_seed(3)
right, wrong = PatchEmbedding(588, 224, 14), ColleaguesEmbedding(588, 224, 14)
wrong.load_state_dict(right.state_dict())
right.position_embedding.weight.data.zero_()
wrong.position_embedding.weight.data.zero_()
for embed in (right, wrong):
    out = embed(cat)
    print(f"{tuple(out.shape)}  mean {out.mean():.3f}  spread {out.std():.3f}")

# %% [markdown]
# Same shape, same mean, same spread. To look inside, let the weights *copy*: width 588, an
# identity matrix as kernel, no bias, no positions. Then each output vector should simply be a
# patch, and we can draw it.

# %%
views = []
for embed in (right, wrong):
    embed.patch_embedding.weight.data = torch.eye(588).view(588, 3, 14, 14)
    embed.patch_embedding.bias.data.zero_()
    views.append(mosaic(embed(cat)[0].detach(), 16, gap=1))
save_figure(show_images(views, ["ours", "the colleague's"], height=3.4), "03_bug.png")

# %% [markdown]
# The picture is shredded. The convolution's result lies in memory as D grids of 16 × 16. `reshape`
# to `(N, D)` cuts that memory into runs of D numbers: it mixes **places** where only channels
# belong together. Its "token 0" is filter 0 at all 256 places, then filter 1 at all places, and
# the first part of filter 2.

# %% [markdown]
# ### The check that finds it
#
# Do not look at shapes; ask about **cause and effect**. Change one patch of the picture: exactly
# one token may change. This works for any weights and in any framework.
#
# And it is needed: the scrambling is the same for each picture, so the module still *learns*, only
# badly. No error will ever tell you.


# %%
def tokens_touched(kind):
    """How many tokens change when only the patch in row 3, column 5 does."""
    embed = kind(hidden_size=32, image_size=224, patch_size=14)
    changed = cat.clone()
    changed[:, :, 3 * 14 : 4 * 14, 5 * 14 : 6 * 14] += 1
    moved = (embed(changed) - embed(cat)).abs().amax(dim=2)[0] > 1e-6
    return moved.nonzero().flatten().tolist()


print("ours:", tokens_touched(PatchEmbedding), " expected:", [3 * 16 + 5])
touched = tokens_touched(ColleaguesEmbedding)
print("the colleague's:", len(touched), "tokens:", touched[:5], "…")
assert tokens_touched(PatchEmbedding) == [53] and len(touched) > 1

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): who notices the shuffle?
#
# Embed the cat and the shuffled cat. Three comparisons: **(a)** the *bag* of vectors (in any
# order) without positions; **(b)** the *mean* of all vectors, **with** positions; **(c)** the bag
# with positions. For each: does it change? Answer with three of `True` / `False`.

# %% tags=["exercise"]
answer = None  # your answer, such as (True, True, True)


# %% tags=["check"]
def test_1(answer):
    assert isinstance(answer, tuple) and len(answer) == 3, "give three values: (a, b, c)"
    means = [with_positions(picture)[0].mean(dim=0) for picture in (cat, shuffled)]
    truth = (gaps[0] > 1e-3, not torch.allclose(*means, atol=1e-4), gaps[1] > 1e-3)
    wrong = [letter for letter, a, b in zip("abc", answer, truth) if a is not b]
    assert not wrong, f"{len(wrong)} of the three are not what the computation says"


check(test_1, answer)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The mean of sums is the sum of means. Which part of each sum depends on the order?
#
# </details>

# %% tags=["solution"]
# mean(patch + place) = mean(patch) + mean(place): averaging removes the order again. Positions
# help only where something non-linear (attention, an MLP) acts before the vectors are summed.
answer = (False, False, True)
check(test_1, answer)

# %% [markdown]
# ### Exercise 2 (fill in): which pixels does a token see?
#
# To draw attention on a picture you must know where token `index` lies. Return its box `(x0, y0,
# x1, y1)` in pixels, the last two not included. Mind the order: x runs to the right.


# %% tags=["exercise"]
def patch_box(index, image_size, patch_size):
    return None  # your answer


# %% tags=["check"]
def test_2(patch_box):
    for size, patch in ((28, 7), (24, 4), (224, 14)):
        image = torch.zeros(1, 1, size, size)
        for index in (0, 1, size // patch, (size // patch) ** 2 - 2):
            found = patch_box(index, size, patch)
            assert found is not None and len(found) == 4, "return four numbers"
            x0, y0, x1, y1 = found
            lit = image.clone()
            lit[..., y0:y1, x0:x1] = 1
            rows = F.unfold(lit, patch, stride=patch)[0].T.mean(dim=1)
            assert rows.nonzero().flatten().tolist() == [index], (
                f"token {index} at {size}/{patch}: box {found} lies elsewhere"
            )
            assert rows[index] == 1, f"box {found} does not cover its patch"


check(test_2, patch_box)

# %% [markdown]
# <details><summary>Hint</summary>
#
# With S patches in a row, `divmod(index, S)` gives the row and the column.
#
# </details>


# %% tags=["solution"]
def patch_box(index, image_size, patch_size):
    row, column = divmod(index, image_size // patch_size)
    x, y = column * patch_size, row * patch_size
    return x, y, x + patch_size, y + patch_size


check(test_2, patch_box)

# %% [markdown]
# ### Exercise 3 (extend): a table for a larger picture
#
# A model trained at 224 has 256 positions; at 448 it needs 1024. The usual start is to see the
# table as a small *picture* with D channels and enlarge it. Write `resize_positions(table, side)`:
# float[N, D] → float[side², D], bilinear (`F.interpolate`, `align_corners=False`).


# %% tags=["exercise"]
def resize_positions(table, side):
    return None  # your answer


# %% tags=["check"]
def test_3(resize_positions):
    old = torch.arange(4.0)
    ramp = torch.stack([old.repeat_interleave(4), old.repeat(4)], dim=1)  # (row, column) of 4 × 4
    same, new = resize_positions(ramp, 4), resize_positions(ramp, 8)
    assert same is not None and new is not None, "return the new table"
    assert new.shape == (64, 2), f"8 × 8 places of width 2 wanted, got {tuple(new.shape)}"
    assert torch.allclose(same, ramp), "at the same size nothing may change"
    row, column = new.view(8, 8, 2).unbind(-1)
    assert (row == row[:, :1]).all() and (row.diff(dim=0) >= 0).all(), "rows are mixed up"
    assert (column == column[:1]).all(), "columns are mixed up"
    assert torch.allclose(row[1:3, 0], torch.tensor([0.25, 0.75])), (
        "not bilinear, or corners aligned"
    )


check(test_3, resize_positions)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `F.interpolate` wants `(1, D, rows, columns)`. Go there and back with `reshape` *and* `permute`:
# the bug of this lesson is waiting on both ways.
#
# </details>


# %% tags=["solution"]
def resize_positions(table, side):
    old = round(len(table) ** 0.5)
    grid = table.reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    grid = F.interpolate(grid, (side, side), mode="bilinear", align_corners=False)
    return grid.flatten(2)[0].T  # (side², D)


check(test_3, resize_positions)

# %% [markdown]
# ## Summary
#
# - A picture becomes a sequence by cutting: N = (size / patch)², in reading order.
# - The embedding is one matrix product for each patch. `Conv2d` with kernel = stride is that
#   product.
# - Without positions a picture is a bag of patches; a learned table gives each place its own
#   vector.
# - The part is cheap. The number of tokens it makes is not.
# - Test *what affects what*, not only shapes.

# %% [markdown]
# ## Quiz
#
# **1.** What would `kernel_size=14, stride=7` do at 224 pixels?
#
# <details><summary>Answer</summary>
#
# Patches overlap by half. The window stops (224 − 14) / 7 + 1 = 31 times each way: 961 tokens for
# 256, and each inner pixel is seen four times. The weights keep their shape.
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
