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
# [← Tokenizer](06_tokenizer.ipynb) | [contents](00_overview.ipynb) | [GeGLU →](08_geglu.ipynb)

# %% [markdown]
# # 07 · RMSNorm: why divide every vector by its own size?
#
# *35 minutes* · part II, Language
#
# **What you will be able to do**
#
# - compute RMSNorm with a pencil, and draw what it keeps and what it throws away;
# - explain the $(1 + w)$ of Gemma and why the inside is float32;
# - read what the trained norms of a language model do to its stream;
# - recognise a norm that loads without an error and turns the model's vectors round.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("rms_norm")

# %% [markdown]
# ## Setup
#
# From earlier lessons: the `ImageProcessor` ([lesson 02](02_image_processor.ipynb)) for one picture and the `Tokenizer` ([lesson 06](06_tokenizer.ipynb)) of the model that ships with the course. The cells that begin with `#| export` become the file [rms_norm.py](../paligemma/rms_norm.py).

# %%
#| export
"""Root-mean-square normalisation, with Gemma's (1 + w)."""

import torch
from torch import nn

# %% tags=["setup"]
from importlib import resources

import matplotlib.pyplot as plt
import torch.nn.functional as F
from safetensors.torch import load_file

from paligemma.image_processor import ImageProcessor
from paligemma.plotting import show_images
from paligemma.support.course import add_to_class, check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS
from paligemma.tokenizer import Tokenizer

torch.manual_seed(7)
torch.set_printoptions(precision=3, sci_mode=False)

# %% [markdown]
# ## The problem: who shouts?
#
# How large is a vector? One number for it is the **root mean square**: square the entries, take their mean, take the root. For random numbers of usual size 1 it is about 1, whatever the width.
#
# The language model begins with one vector for each token, a row of its table. Here are some of the shipped model, as it reads them:


# %%
def rms(x):
    return x.square().mean(-1).sqrt()


# %%
folder = resources.files("paligemma") / "assets" / "tiny"
weights = load_file(str(folder / "model.safetensors"))
table = weights["language_model.model.embed_tokens.weight"].float()
table = table * 128**0.5  # Gemma reads its rows times √D; lesson 12 says why
print("table:", tuple(table.shape))

# %%
tokenizer = Tokenizer.from_pretrained(folder)
for token in ("<loc0548>", "▁cat", "▁dogs", "5", "<seg000>"):
    print(f"{token:10} size {rms(table[tokenizer.sp.piece_to_id(token)]):.2f}")
loc, seg = rms(table[1024:2048]), rms(table[2048:2176])
print(f"all <loc>: {loc.mean():.2f} on average, all <seg>: {seg.mean():.2f}")
assert seg.mean() > 2 * loc.mean() and seg.min() > 1.5 * loc.max()

# %% [markdown]
# On average a `<seg>` token is more than twice as large as a location. A matrix that reads both would be moved twice as much by the one, for no reason of meaning. And the stream's vectors grow from block to block, as [lesson 05](05_siglip.ipynb) showed.
#
# So each block first makes a copy in which every vector has size 1. Then a layer can count on its input. That is the whole purpose.

# %% [markdown]
# ## By hand
#
# Four numbers: 1, −1, 5, 3. Squares: 1, 1, 25, 9. Their mean is 36 / 4 = 9, and the root of 9 is 3. Divide by it:

# %%
x = torch.tensor([1.0, -1, 5, 3])
print("mean of squares:", x.square().mean().item(), " rms:", rms(x).item())
print("x / rms:     ", x / rms(x))
print("10 x / rms:  ", 10 * x / rms(10 * x))

# %% [markdown]
# Signs stay. Ratios stay: the third number is still five times the first. Only the size is gone, and it is gone for good: ten times as large an input gives the same result.
#
# SigLIP's LayerNorm ([lesson 05](05_siglip.ipynb)) first subtracts the mean, here 2, and divides by the root mean square of what is left:

# %%
centred = x - x.mean()
print("x minus its mean:", centred)
print("LayerNorm:       ", centred / rms(centred))
assert torch.allclose(centred / rms(centred), F.layer_norm(x, (4,)), atol=1e-4)

# %% [markdown]
# The first number was positive and is now negative. LayerNorm asks "more than the average of this vector?", **RMSNorm** asks "how much, compared with the vector's size?"
#
# A picture shows it best. Take vectors of two numbers, then of three, and mark where each norm puts them.

# %%
pairs = torch.randn(40, 2) * 0.85 + 0.4
distance = F.rms_norm(pairs, (2,)).norm(dim=-1)
print(f"RMSNorm: all at a distance of {distance.min():.3f} to {distance.max():.3f} from 0")
ends = F.layer_norm(pairs, (2,), eps=0).round().unique(dim=0)
print("LayerNorm: different ends", ends.tolist())
assert torch.allclose(distance, torch.tensor(2.0).sqrt()) and len(ends) == 2

# %% tags=["hide-input"]
fig = plt.figure(figsize=(9, 4.4), layout="constrained")
plane, space = fig.add_subplot(1, 2, 1), fig.add_subplot(1, 2, 2, projection="3d")
for ax, points in ((plane, pairs), (space, torch.randn(40, 3) * 0.85 + 0.4)):
    D = points.shape[1]
    on_sphere, ends = F.rms_norm(points, (D,)), F.layer_norm(points, (D,), eps=0)
    for start, end in zip(points, on_sphere):
        ax.plot(*torch.stack((start, end)).T, color=COLOURS["muted"], lw=0.5, alpha=0.7)
    ax.scatter(*points.T, s=8, color=COLOURS["muted"], label="before")
    ax.scatter(*on_sphere.T, s=20, color=COLOURS["language"], label="RMSNorm")
    ax.scatter(*ends.T, s=30, color=COLOURS["vision"], label="LayerNorm")
plane.add_patch(plt.Circle((0, 0), 2**0.5, fill=False, color=COLOURS["language"], lw=0.7))
plane.set(aspect="equal", xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), title="two numbers")
u, v = torch.meshgrid(torch.linspace(0, 6.2832, 25), torch.linspace(0, 3.1416, 13), indexing="ij")
ball = 3**0.5 * torch.stack((u.cos() * v.sin(), u.sin() * v.sin(), v.cos()))
space.plot_wireframe(*ball.numpy(), color=COLOURS["language"], lw=0.3, alpha=0.35)
ring = 2**0.5 * torch.stack([(u[:, 0] + turn).cos() for turn in (0, 2.0944, 4.1888)])
space.plot(*ring, color=COLOURS["vision"], lw=0.9)
space.view_init(elev=10, azim=-15)
space.set(xlim=(-2, 2), ylim=(-2, 2), zlim=(-2, 2), title="three numbers")
space.set_box_aspect((1, 1, 1), zoom=1.2)
space.set_axis_off()
fig.legend(*plane.get_legend_handles_labels(), loc="outside lower center", ncols=3)
save_figure(fig, "07_sphere")

# %% [markdown]
# RMSNorm pulls each point along its own ray onto a circle, or a sphere, of radius $\sqrt D$. The **direction** is kept whole.
#
# LayerNorm first drops the part along $(1, 1, \dots)$. Of two numbers only "the first is larger" or "the second is larger" is left: two points. Of three, a circle. With 2048 numbers one dimension more or less is hardly felt, and RMSNorm does less work.

# %% [markdown]
# ## As a loop
#
# Two ingredients are still missing. A small **eps** is added to the mean square, so that a vector of zeros is not divided by zero. And each channel has a learned **weight** $w$; the result is multiplied by $1 + w$:
#
# $$y_i = \frac{x_i}{\sqrt{\frac1D\sum_j x_j^2 + \varepsilon}}\,(1 + w_i)$$


# %%
def rms_norm_loop(x, weight, eps=1e-6):
    """float[L, D] → float[L, D], one vector and one number at a time."""
    out = torch.empty_like(x)
    for row in range(len(x)):
        total = 0.0
        for value in x[row].tolist():
            total += value * value
        scale = (total / x.shape[1] + eps) ** -0.5
        for i in range(x.shape[1]):
            out[row, i] = x[row, i] * scale * (1 + weight[i])
    return out


# %%
x, weight = torch.randn(5, 16) * 4, torch.randn(16) * 0.3
slow = rms_norm_loop(x, weight)
print("size of each row before:", rms(x))
print("with weights of 0:      ", rms(rms_norm_loop(x, torch.zeros(16))))
assert not rms_norm_loop(torch.zeros(1, 16), weight).any()  # zeros stay zeros, thanks to eps

# %% [markdown]
# Each token is normalised **alone**: no statistic mixes tokens or the rows of a batch. So the result for a token does not depend on its neighbours.
#
# ## Vectorised
#
# The mean runs over the last axis. `keepdim` leaves an axis of size 1, so that the scale of each vector meets all its numbers. `rsqrt` is $1/\sqrt{\cdot}$.


# %%
def rms_norm(x, weight, eps=1e-6):
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)  # [L, 1]
    return x * scale * (1 + weight)  # [L, D]


assert torch.allclose(rms_norm(x, weight), slow, atol=1e-6)
print("loop and tensor form agree")

# %% [markdown]
# ## The module
#
# The same two lines as a class. The weight starts at 0: an untrained norm multiplies by 1.


# %%
#| export
class RMSNorm(nn.Module):
    """x / rms(x) · (1 + weight), over the last axis.

    Args:
        hidden_size: width D of the vectors.
        eps: added to the mean square, so that a zero vector stays finite.

    Source: Zhang & Sennrich 2019; `RMSNorm` in gemma_pytorch (the weight starts at 0, not 1).
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * scale * (1 + self.weight)


# %%
norm = RMSNorm(16)
norm.load_state_dict({"weight": weight})
assert torch.allclose(norm(x), slow, atol=1e-6)
print(norm(x[None]).shape, "for any number of axes in front")

# %% [markdown]
# ### Why $1 + w$?
#
# Most libraries multiply by a weight that starts at 1. Gemma stores the *difference* from 1. On paper it is the same function. Two things speak for it. First, a stored number has a format: bfloat16 keeps 8 significant bits, so its numbers lie close together near 0 and far apart near 1. Add a small training step to each:

# %%
step = 0.003
for start in (1.0, 0.0):
    stored = torch.tensor(start, dtype=torch.bfloat16)
    print(f"weight {start:.0f} + {step} =", f"{(stored + step).item():.4f}")
assert torch.tensor(1.0).bfloat16() + step == 1  # the step is lost

# %% [markdown]
# Near 1 the step vanished; near 0 it was kept. Second, *weight decay* in training pulls all weights towards 0. For $1 + w$ this means "towards doing nothing". A plain weight would be pulled towards switching the layer off.

# %% [markdown]
# ### Why float32 inside?
#
# Our module works in the type that it is given. In **float16** numbers end at 65,504, and squares get there quickly. Here is a vector of size 300:

# %%
large = (torch.randn(2048) * 300).half()
zero = torch.zeros(2048).half()
print("mean of squares in float16:", large.square().mean().item())
print("normalised in float16:     ", rms_norm(large, zero)[:4])
print("normalised in float32:     ", rms_norm(large.float(), zero.float())[:4])
assert not rms_norm(large, zero).any()

# %% [markdown]
# The squares overflow to infinity, one over infinity is 0, and the whole vector is **zero**. No error, no `nan`: the layer just goes silent.
#
# **bfloat16** does not overflow, but it rounds. Take a channel weight of 0.003, as above, and compare the errors over a thousand vectors with those of one rounding at the end:

# %%
x = (torch.randn(1000, 256) * 5).bfloat16()
small = torch.full((256,), 0.003).bfloat16()
exact = rms_norm(x.double(), small.double())
all_short = rms_norm(x, small).double() / exact - 1
once = rms_norm(x.float(), small.float()).bfloat16().double() / exact - 1

# %% tags=["nbval-ignore-output"]
for name, error in (("all in bfloat16", all_short), ("rounded once", once)):
    shared = error.mean(-1).abs().mean()  # the error that all numbers of a vector have in common
    print(
        f"{name:15} error of a number {error.abs().mean():.2%}, shared by its vector {shared:.2%}"
    )
assert all_short.mean(-1).abs().mean() > 20 * once.mean(-1).abs().mean()
assert 2 < all_short.abs().mean() / once.abs().mean() < 3

# %% [markdown]
# Number by number, bfloat16 throughout is only two or three times as bad. But rounding once errs up and down at random, which the next layer's sums average away. The other error is **shared**: the scale of a whole vector is rounded, and the learned 0.003 never arrives. Shared errors do not average away.
#
# So the module widens first, works in float32, and rounds **once**, at the end:


# %%
#| export
@add_to_class(RMSNorm)
def forward(self, x: torch.Tensor) -> torch.Tensor:
    """`float[…, D]` → `float[…, D]` of the same dtype, computed in float32."""
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
    return (h * (1.0 + self.weight.float())).type_as(x)


# %%
assert torch.equal(RMSNorm(2048)(large), rms_norm(large.float(), zero.float()).half())
print("float16 in, float16 out, not silent:", RMSNorm(2048)(large)[:4].detach())

# %% [markdown]
# ## Against the reference
#
# PyTorch has `F.rms_norm`, with a plain weight: we hand it $1 + w$. The stored file holds inputs, weights and outputs of transformers' `GemmaRMSNorm`, in float32 and bfloat16. `tests/test_rms_norm.py` computes it afresh.

# %% tags=["nbval-ignore-output"]
ref = load_file("reference/rms_norm.safetensors")
norm = RMSNorm(64).requires_grad_(False)
norm.load_state_dict({"weight": ref["weight"]})
torchs = F.rms_norm(ref["x"], (64,), weight=1 + norm.weight, eps=1e-6)
for name, theirs in (("F.rms_norm", torchs), ("GemmaRMSNorm", ref["y"])):
    gap = (norm(ref["x"]) - theirs).abs().max().item()
    print(f"{name:13} largest difference {gap:.1e}")
    assert gap <= 1e-5
assert torch.equal(norm(ref["x_bfloat16"]), ref["y_bfloat16"])  # bit for bit

# %% [markdown]
# ## See it: a picture through the norm
#
# A patch of pixels is a vector too, of numbers between −1 (black) and 1 (white). So cut a grey cat into patches ([lesson 03](03_patch_embedding.ipynb); 196 numbers each without colour), normalise each one, and draw it again.

# %%
cat = ImageProcessor(224)(sample_picture("cat")).mean(1, keepdim=True)  # [1, 1, 224, 224], grey
patches = F.unfold(cat, 14, stride=14)[0].T  # [N, 196]
loudness = rms(patches)
print(f"sizes of the patches: {loudness.min():.2f} to {loudness.max():.2f}, afterwards all 1")
assert loudness.max() > 10 * loudness.min()

# %% tags=["hide-input"]
versions = {
    "before": patches,
    "after RMSNorm": F.rms_norm(patches, (196,)),
    "after LayerNorm": F.layer_norm(patches, (196,), eps=1e-8),
}
pictures = []
for name, p in versions.items():
    white = 1 if name == "before" else 2  # which value is drawn as white; its negative as black
    picture = F.fold(p.T[None], (224, 224), 14, stride=14)[0, 0]
    pictures.append((picture / white / 2 + 0.5).clamp(0, 1))
save_figure(show_images(pictures, list(versions), height=2.8), "07_cat.png")

# %% [markdown]
# **What to notice.** After RMSNorm all patches are equally strong: the faint ones speak up. But bright stays bright and dark stays dark, because signs are kept. LayerNorm removes each patch's mean brightness, and only texture is left. The same happens to a token's numbers: *what* it says is kept, *how loud* it was is not.

# %% [markdown]
# ### What training made of $w$
#
# The shipped model has four blocks with two norms each, one before attention and one before the MLP, and one last norm before the next token is chosen. Their weights began at 0.

# %%
trained = {}
for layer in range(4):
    for name, read_by in (("input", "attention"), ("post_attention", "MLP")):
        key = f"language_model.model.layers.{layer}.{name}_layernorm.weight"
        trained[f"block {layer + 1}, {read_by}"] = weights[key].float()
trained["last norm"] = weights["language_model.model.norm.weight"].float()

# %%
for name, w in trained.items():
    print(f"{name:18} mean of w {w.mean():5.2f}, negative in {(w < 0).float().mean():4.0%}")
down = torch.stack([(w < 0).float().mean() for w in trained.values()])  # share turned down
assert down[:-2].min() > 0.5 and down[-2] < 0.5 and down[-1] < 0.05
assert max(w.abs().max() for w in list(trained.values())[:-1]) < 0.5

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(9, 3.4), layout="constrained")
for row, (name, w) in enumerate(trained.items()):
    colour = COLOURS["accent" if "last" in name else "language"]
    up = torch.linspace(-0.25, 0.25, len(w))
    ax.scatter(1 + w, row + up, s=7, alpha=0.6, color=colour)
ax.axvline(1, color=COLOURS["ink"], lw=1, ls=":")
ax.set_yticks(range(len(trained)), list(trained))
ax.invert_yaxis()
ax.set(xlabel="1 + w: what each of the 128 channels is multiplied by", xlim=(0.4, 2.6))
save_figure(fig, "07_trained")

# %% [markdown]
# **What to notice.** A dot is a channel; the dotted line is where all began. Inside the blocks the factors stayed between a half and one and a half, and in all but one norm most channels were turned *down*. The last norm turns nearly all of them *up*. It stands before the scores of the next token: larger vectors give larger scores, so a surer choice.

# %% [markdown]
# ## At full size
#
# Gemma 2B has 18 blocks with two norms each, and one last norm: 37. For each number a norm does four operations: square, add, and two products. In bfloat16 it reads two bytes and writes two. Beside it, one linear layer of the same width, for 264 positions (a picture's 256 and a short prompt):

# %%
D, L, norms = 2048, 264, 37
print(f"parameters: {norms * D:,}, {norms * D / 2_508_662_784:.4%} of the language model")
norm_flops, norm_bytes = 4 * L * D, 4 * L * D
linear_flops, linear_bytes = 2 * L * D * D, 2 * D * D + 4 * L * D
print(f"FLOPs a byte: norm {norm_flops / norm_bytes:.0f}, linear {linear_flops / linear_bytes:.0f}")
print(f"FLOPs: 1 to {linear_flops // norm_flops}; bytes: 1 to {linear_bytes / norm_bytes:.1f}")
assert norm_flops == norm_bytes and 4.5 < linear_bytes / norm_bytes < 5.5

# %% [markdown]
# A processor can do tens of operations while one byte arrives. A norm asks for *one*, so its time is the time to move the vector. By operations it is a thousandth of a linear layer, by bytes about a fifth. A fused kernel, which reads once and writes once, helps; our lines walk over the vector several times.

# %% [markdown]
# ## A bug people really make: the missing 1
#
# A colleague loads Gemma's weights into an engine that has an RMSNorm already. Names and shapes fit, the strict load says nothing. Then the model answers with nonsense. The engine's norm is a textbook one:


# %%
class EngineNorm(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-6)


# %%
x = table[tokenizer.encode("a cat and two dogs")]  # [L, 128], what block 1 reads
ours, engine = RMSNorm(128), EngineNorm(128)
ours.load_state_dict({"weight": trained["block 1, attention"]})
print(engine.load_state_dict({"weight": trained["block 1, attention"]}))
alike = F.cosine_similarity(ours(x), engine(x))
print(f"size {rms(ours(x)).mean():.2f} and {rms(engine(x)).mean():.2f}")
print(f"cosine between them {alike.mean():.2f}")
assert alike.max() < -0.9 and rms(engine(x)).mean() < rms(ours(x)).mean() / 2

# %% [markdown]
# The engine multiplies by $w$ where Gemma means $1 + w$. With real weights this is worse than faint: where $w$ is negative, the channel changes its **sign**. The first block reads a vector of less than half the size that points the *other way*. Even a strict load cannot see it: names and shapes carry no meaning.

# %% [markdown]
# ### The check that finds it
#
# Ask about behaviour, not about shapes: **a stored weight of zero must leave size 1**. The cure is to add 1 to each norm weight when it is loaded. Exactly once: some converters do it when they *write* the file, and a reader who adds it again gets $2 + w$.

# %%
for name, kind, add in (
    ("ours", RMSNorm, 0),
    ("the engine's", EngineNorm, 0),
    ("the engine's, 1 added once", EngineNorm, 1),
    ("the engine's, 1 added twice", EngineNorm, 2),
):
    norm = kind(128)
    norm.load_state_dict({"weight": torch.zeros(128) + add})
    print(f"{name:28} size {rms(norm(x)).mean():.2f}")

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): how long?
#
# The *length* of a vector is the root of its **sum** of squares. How long is a vector of 2048 random numbers after our `RMSNorm` when
#
# 1. all stored weights are 0;
# 2. all stored weights are 1;
# 3. all are 0, and the vector was multiplied by 1000 before;
# 4. the vector was all zeros?
#
# Two decimals are enough.

# %% tags=["exercise"]
lengths = None  # a list of four numbers


# %% tags=["check"]
def test_1(lengths):
    ok = isinstance(lengths, (list, tuple)) and len(lengths) == 4
    assert ok and all(isinstance(n, (int, float)) for n in lengths), "give a list of four numbers"
    x, norm = torch.randn(2048), RMSNorm(2048)
    for place, (w, vector) in enumerate([(0.0, x), (1.0, x), (0.0, 1000 * x), (0.0, 0 * x)]):
        norm.weight.data.fill_(w)
        true = norm(vector).norm().item()
        assert abs(lengths[place] - true) < 0.02, f"number {place + 1} is not {lengths[place]}"


check(test_1, lengths)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The mean of the squares is 1 after the division. What is their sum, then? The factor is $1 + w$, not $w$.
#
# </details>

# %% tags=["solution"]
# √2048 = 45.25, the factor that Gemma puts on its rows of the table (lesson 12): no coincidence.
lengths = [2048**0.5, 2 * 2048**0.5, 2048**0.5, 0.0]
check(test_1, lengths)

# %% [markdown]
# ### Exercise 2 (write): Llama's norm
#
# Llama's RMSNorm differs from Gemma's in two ways: the weight is plain (no 1), and the result is rounded to the type of `x` **before** it is multiplied by the weight. The rest is the same: the inside is float32. Write it, without `F.rms_norm`.


# %% tags=["exercise"]
def llama_norm(x, weight, eps):
    return None  # your code: float[…, D] of the type of x and weight


# %% tags=["check"]
def test_2(llama_norm):
    x, ones = torch.randn(3, 5, 64) * 2, torch.ones(64)
    out = llama_norm(x, ones, 1e-6)
    assert isinstance(out, torch.Tensor) and out.shape == x.shape, "return a tensor shaped like x"
    assert not torch.allclose(rms(out), torch.full((3, 5), 2.0), atol=1e-3), "no 1 is added here"
    assert torch.allclose(rms(out), torch.ones(3, 5), atol=1e-3), "with weights 1 each size is 1"
    w = torch.randn(64)
    exact = F.rms_norm(x, (64,), w, 1e-6)
    assert torch.allclose(llama_norm(x, w, 1e-6), exact, atol=1e-5), "the weight is not applied"
    at_eps = llama_norm(torch.full((64,), 0.01), ones, 1e-4)
    assert torch.allclose(rms(at_eps), torch.tensor(0.5**0.5), atol=1e-3), "where is eps?"
    out = llama_norm(x.bfloat16(), w.bfloat16(), 1e-6)
    assert out.dtype == torch.bfloat16, "bfloat16 in, bfloat16 out"
    normed = F.rms_norm(x.bfloat16().float(), (64,), None, 1e-6)
    late = (normed * w.bfloat16().float()).bfloat16()
    assert not torch.equal(out, late), "round to the type of x before the weight, not after it"
    right = torch.equal(out, normed.bfloat16() * w.bfloat16())
    assert right, "in bfloat16 some bits differ: is the inside float32?"


check(test_2, llama_norm)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Begin like our `forward`: widen, divide by the size. Then `type_as(x)`, and only then the weight.
#
# </details>


# %% tags=["solution"]
def llama_norm(x, weight, eps):
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return h.type_as(x) * weight  # two roundings where Gemma has one


check(test_2, llama_norm)

# %% [markdown]
# ### Exercise 3 (extend): fold the weight away
#
# After Gemma's norms stand linear layers without bias. Then $(1 + w)$ can be moved into the next matrix once, and the norm needs no weight any more. Engines do this. Return a new `nn.Linear` so that `folded(x / rms)` equals `linear(norm(x))`; change neither input.


# %% tags=["exercise"]
def fold(norm, linear):
    return None  # your code: an nn.Linear without bias


# %% tags=["check"]
def test_3(fold):
    for D, out in ((4, 4), (16, 24)):
        norm, linear = RMSNorm(D), nn.Linear(D, out, bias=False)
        norm.weight.data.normal_()
        before, w = linear.weight.clone(), norm.weight.clone()
        folded = fold(norm, linear)
        assert isinstance(folded, nn.Linear) and folded is not linear, "return a new nn.Linear"
        assert torch.equal(linear.weight, before), "the given layer was changed"
        assert torch.equal(norm.weight, w), "the given norm was changed"
        assert folded.weight.shape == (out, D), f"its weight must be {(out, D)}"
        assert folded.bias is None, "without a bias, please"
        x = torch.randn(5, D)
        got, expected = folded(RMSNorm(D)(x)), linear(norm(x))
        rows = before * (1 + w)[:, None] if out == D else None
        by_rows = rows is not None and torch.allclose(folded.weight, rows, atol=1e-6)
        assert not by_rows, "w belongs to the inputs of the layer; you scaled its outputs"
        no_one = torch.allclose(folded.weight, before * w, atol=1e-6)
        assert not no_one, "that is the bug of this lesson"
        assert torch.allclose(got, expected, atol=1e-4), "the outputs differ"


check(test_3, fold)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `linear.weight` has the shape `[out, in]`. Which of its rows or columns does input channel $i$ meet? Make a new layer of the same size and copy the product into its weight under `torch.no_grad()`.
#
# </details>


# %% tags=["solution"]
def fold(norm, linear):
    folded = nn.Linear(linear.in_features, linear.out_features, bias=False)
    with torch.no_grad():  # input channel i meets column i: [out, in] · [in]
        folded.weight.copy_(linear.weight * (1 + norm.weight))
    return folded


check(test_3, fold)

# %% [markdown]
# ## Summary
#
# - A norm before each layer gives it vectors of size 1, whatever the stream holds.
# - RMSNorm keeps the direction of a vector and forgets its size. LayerNorm also removes the mean.
# - Gemma stores $w$ around 0 and means $1 + w$. Trained, most are negative in the blocks; the last norm makes nearly all channels larger.
# - Squares and sums need float32; round once, at the end.
# - Its danger is being nearly right: test behaviour, with a weight of zero.

# %% [markdown]
# ## Quiz
#
# **1.** The norm makes all tokens equally large. Why does the residual stream still grow?
#
# <details><summary>Answer</summary>
#
# Only what a layer *reads* is normalised; the stream itself goes on unnormalised, and each layer adds to it. A last norm brings it back to a known size at the end.
#
# </details>

# %% [markdown]
# **2.** Can one row alone and the same row among a hundred give a token different norms?
#
# <details><summary>Answer</summary>
#
# No. The mean runs over the channels of one token only. (BatchNorm is the one that mixes examples.)
#
# </details>

# %% [markdown]
# **3.** A model has been trained with a plain weight (no 1). You load it into our RMSNorm. What happens, and how do you repair it?
#
# <details><summary>Answer</summary>
#
# Nothing is reported, and each channel is multiplied by $1 + \text{weight}$: about twice as much where the weight is near 1, in another proportion elsewhere. Subtract 1 from the stored norm weights when loading, exactly once, in float32.
#
# </details>

# %% [markdown]
# ## References
#
# - Biao Zhang and Rico Sennrich, *Root Mean Square Layer Normalization*, 2019 ([arXiv 1910.07467](https://arxiv.org/abs/1910.07467)), section 4.
# - Jimmy Lei Ba et al., *Layer Normalization*, 2016 ([arXiv 1607.06450](https://arxiv.org/abs/1607.06450)), section 3.
# - Mingjie Sun et al., *Massive Activations in Large Language Models*, 2024 ([arXiv 2402.17762](https://arxiv.org/abs/2402.17762)): single channels that grow very large.
# - `RMSNorm` in gemma_pytorch, `gemma/model.py`; `GemmaRMSNorm` and `LlamaRMSNorm` in transformers.
# - The missing 1: [executorch #19901](https://github.com/pytorch/executorch/pull/19901); added twice: [mold #1078](https://github.com/utensils/mold/pull/1078).

# %% [markdown] tags=["navigation"]
# [← Tokenizer](06_tokenizer.ipynb) | [contents](00_overview.ipynb) | [GeGLU →](08_geglu.ipynb)
