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
# # 07 · RMSNorm: why divide every vector by its own length?
#
# *40 minutes* · part II, Language
#
# **What you will be able to do**
#
# - say what happens to numbers in 18 layers when nobody watches their size;
# - compute RMSNorm with a pencil, and draw what it keeps and what it throws away;
# - explain the $(1 + w)$ of Gemma and why the inside is float32;
# - recognise two norms that load without an error and ruin the model.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("rms_norm")

# %% [markdown]
# ## Setup
#
# From earlier lessons: the drawing helpers (01) and the `ImageProcessor` (02), for one picture.
# The cells that begin with `#| export` become the file
# [rms_norm.py](../paligemma/rms_norm.py); this first one gives it its opening lines.

# %%
#| export
"""Root-mean-square normalisation, with Gemma's (1 + w)."""

import torch
from torch import nn

# %% tags=["setup"]
import time

import matplotlib.pyplot as plt
import torch.nn.functional as F
from safetensors.torch import load_file

from paligemma.image_processor import ImageProcessor
from paligemma.plotting import show_images
from paligemma.support.course import check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS

torch.manual_seed(7)
torch.set_printoptions(precision=3, sci_mode=False)

# %% [markdown]
# ## The problem: sizes multiply
#
# How large is a vector? One number for it is the **root mean square**: square the entries, take
# their mean, take the root. For a vector of random signs and usual size 1 it is about 1, whatever
# the width.
#
# A layer is a matrix product. A matrix that makes vectors a little larger or smaller does no harm.
# Eighteen of them, one after the other, do.


# %%
def rms(x):
    return x.square().mean(-1).sqrt()


def random_layer(gain, D=256):
    """A matrix that multiplies the size of a random vector by about `gain`."""
    return gain * torch.randn(D, D) / D**0.5


sizes = {}
for gain in (0.75, 1.0, 1.33):
    x, sizes[gain] = torch.randn(64, 256), [1.0]
    for _ in range(18):
        x = x @ random_layer(gain)
        sizes[gain].append(rms(x).mean().item())
    print(f"gain {gain:4}: after 18 layers {sizes[gain][-1]:7.3f}, and {gain}¹⁸ = {gain**18:.3f}")

# %% [markdown]
# A quarter less in each layer, and almost nothing arrives. A third more, and the numbers are over
# a hundred times too large. Training changes gains all the time, so no choice at the start
# protects us.
#
# Gemma's layers do not replace $x$, they *add* to it: $x + f(x)$, the **residual stream**. That
# saves small signals. It does not stop growth.

# %%
stream = {"x + f(x)": [1.0], "x + f(norm(x))": [1.0], "what f reads, with norm": [1.0]}
a = b = torch.randn(64, 256)
for _ in range(18):
    layer = random_layer(1.0)
    a = a + a @ layer
    read = b / rms(b)[:, None]
    b = b + read @ layer
    for name, x in zip(stream, (a, b, read)):
        stream[name].append(rms(x).mean().item())
for name, curve in stream.items():
    print(f"{name:24} at the end {curve[-1]:6.1f}")

# %%
fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
for (gain, curve), colour in zip(sizes.items(), ("vision", "muted", "language")):
    axes[0].plot(curve, color=COLOURS[colour])
    axes[0].text(18.3, curve[-1], f"gain {gain}", color=COLOURS[colour], va="center")
for (name, curve), colour in zip(stream.items(), ("language", "together", "ink")):
    axes[1].plot(curve, color=COLOURS[colour], ls="--" if "reads" in name else "-")
    place = {"x": 18.3, "y": curve[-1], "va": "center", "color": COLOURS[colour]}
    axes[1].text(s=name.replace(", ", ",\n"), **place)
axes[1].set_ylim(0.5, 800)
titles = ("each layer replaces x", "each layer adds to x")
for ax, right, title in zip(axes, (22.5, 27), titles):
    ax.set(yscale="log", xlim=(0, right), xticks=(0, 6, 12, 18), title=title)
    ax.set(xlabel="layer", ylabel="root mean square")
save_figure(fig, "07_sizes")

# %% [markdown]
# **What to notice.** The scale is logarithmic: a straight line multiplies at each step. On the
# right, adding without a norm still multiplies (by $\sqrt 2$ here). With a norm *before* each layer
# the stream grows slowly, and what a layer **reads** always has size 1 (dashed). So each layer can
# count on its input. That is the whole purpose.

# %% [markdown]
# ## By hand
#
# Four numbers: 1, −1, 5, 3. Squares: 1, 1, 25, 9. Their mean is 36 / 4 = 9, and the root of 9 is
# 3. Divide by it:

# %%
x = torch.tensor([1.0, -1, 5, 3])
print("mean of squares:", x.square().mean().item(), " rms:", rms(x).item())
print("x / rms:     ", x / rms(x))
print("10 x / rms:  ", 10 * x / rms(10 * x))

# %% [markdown]
# Signs stay. Ratios stay: the third number is still five times the first. Only the size is
# gone, and it is gone for good: ten times as large an input gives the same result.
#
# ### The older one: LayerNorm
#
# SigLIP ([lesson 05](05_siglip.ipynb)) uses LayerNorm. It first subtracts the mean, here 2, and then divides by the
# root mean square of what is left:
#
# $$\text{LayerNorm: } \frac{x - \bar x}{\operatorname{rms}(x - \bar x)} \qquad
# \text{RMSNorm: } \frac{x}{\operatorname{rms}(x)}$$

# %%
centred = x - x.mean()
print("x minus its mean:", centred)
print("LayerNorm:       ", centred / rms(centred))
assert torch.allclose(centred / rms(centred), F.layer_norm(x, (4,)), atol=1e-4)

# %% [markdown]
# The first number was positive and is now negative. LayerNorm asks "more than the average of this
# vector?", RMSNorm asks "how much, compared with the vector's size?"
#
# A picture shows it best. Take vectors of **two** numbers, then of **three**, and mark where each
# norm puts them.

# %%
fig = plt.figure(figsize=(8.2, 4), layout="constrained")
plane, space = fig.add_subplot(1, 2, 1), fig.add_subplot(1, 2, 2, projection="3d")
for ax, D in ((plane, 2), (space, 3)):
    points = torch.randn(40, D) * 0.85 + 0.4
    on_sphere, centred = F.rms_norm(points, (D,)), F.layer_norm(points, (D,))
    for start, end in zip(points, on_sphere):
        ax.plot(*torch.stack((start, end)).T, color=COLOURS["muted"], lw=0.5, alpha=0.7)
    ax.scatter(*points.T, s=8, color=COLOURS["muted"], label="before")
    ax.scatter(*on_sphere.T, s=20, color=COLOURS["language"], label="RMSNorm")
    ax.scatter(*centred.T, s=30, color=COLOURS["vision"], label="LayerNorm")
plane.add_patch(plt.Circle((0, 0), 2**0.5, fill=False, color=COLOURS["language"], lw=0.7))
plane.set(aspect="equal", xlim=(-3.4, 3.4), ylim=(-3.4, 3.4), title="two numbers")
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
# RMSNorm pulls each point along its own ray onto a circle, or a sphere, of radius $\sqrt D$. The
# **direction** is kept whole.
#
# LayerNorm first drops the part along $(1, 1, \dots)$. Of two numbers only "the first is larger" or
# "the second is larger" is left: two points. Of three, a circle. With 2048 numbers, losing one
# dimension is hardly felt. And so is not dropping it: RMSNorm works as well and does less.

# %% [markdown]
# ## As a loop
#
# Three ingredients are still missing. A small **eps** is added to the mean square, so that a vector
# of zeros does not divide by zero. Each channel has a learned **weight** $w$, and the result is
# multiplied by $1 + w$:
#
# $$y_i = \frac{x_i}{\sqrt{\frac1D\sum_j x_j^2 + \varepsilon}}\,(1 + w_i)$$
#
# The third, the number format, comes below.


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


x, weight = torch.randn(5, 16) * 4, torch.randn(16) * 0.3
slow = rms_norm_loop(x, weight)
print("size of each row before:", rms(x))
print("size of each row after: ", rms(slow))

# %% [markdown]
# Each token is normalised **alone**: no statistic mixes tokens, pictures or the batch. So the
# result for a token does not depend on who else is in the batch, and a cached token ([lesson 11](11_kv_cache.ipynb))
# stays valid.
#
# ## Vectorised
#
# The mean runs over the last axis. `keepdim` leaves an axis of size 1, so that the scale of each
# vector meets all its numbers. `rsqrt` is $1/\sqrt{\cdot}$: one division for each vector instead
# of $D$.


# %%
def rms_norm_fast(x, weight, eps=1e-6):
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)  # (L, 1)
    return x * scale * (1 + weight)  # (L, D)


assert torch.allclose(rms_norm_fast(x, weight), slow, atol=1e-6)
print("loop and tensor form agree")

# %% [markdown]
# ### Why $1 + w$, and $w$ starts at 0?
#
# Most libraries multiply by a weight that starts at 1. Gemma stores the *difference* from 1. On
# paper it is the same function. But a stored number has a format. bfloat16 keeps 8 significant
# bits, so its numbers lie close together near 0 and far apart near 1. Add a small training step
# to each:

# %%
step = 0.003
for start in (1.0, 0.0):
    weight = torch.tensor(start, dtype=torch.bfloat16)
    print(f"weight {start:.0f} + {step} =", f"{(weight + step).item():.4f}")
nearest = torch.nextafter(torch.tensor(1.0).bfloat16(), torch.tensor(2.0).bfloat16())
print("the next bfloat16 number after 1 is", nearest.item())

# %% [markdown]
# Near 1 the step vanished; near 0 it was kept. There is a second reason: **weight decay** pulls
# all weights towards 0 during training. For $1 + w$ this means "towards doing nothing", which is a
# sensible rest position. A plain weight would be pulled towards switching the layer off.
#
# The sum $1 + w$ has to be made in float32, or the gain is thrown away again.

# %% [markdown]
# ### Why float32 inside?
#
# A **mean of squares** is the worst job for a short format: squares are large, and a sum of 2048
# of them has to count small against large. First bfloat16, summed one by one, as a careless kernel
# would do it. The answer should be 2048:

# %%
total = torch.tensor(0.0, dtype=torch.bfloat16)
for _ in range(2048):
    total = total + 1
print("2048 ones, one by one:", total.item(), " with a float32 sum:", torch.ones(2048).sum().item())

# %% [markdown]
# At 256 the next bfloat16 number is 258. Adding 1 rounds back to 256, for ever. (PyTorch's own
# `sum` keeps a float32 total inside, so it escapes.)
#
# float16 counts finer but ends at 65,504, and squares get there quickly. Here is a vector of
# size 300; single channels of trained models grow far larger (Sun et al. 2024).

# %%
x = torch.randn(2048) * 300
half = x.half()
mean_square = half.square().mean()
print("mean of squares in float16:", mean_square.item())
print("1 / its root:              ", mean_square.rsqrt().item())
print("normalised in float16:     ", (half * mean_square.rsqrt())[:4])
print("normalised in float32:     ", (x * x.square().mean().rsqrt())[:4])

# %% [markdown]
# The squares overflow to infinity, one over infinity is 0, and the whole vector is **zero**. No
# error, no `nan`: the layer just goes silent.
#
# So the module widens first, does all its work in float32, and rounds **once**, at the end.

# %% [markdown]
# ## The module


# %%
#| export
class RMSNorm(nn.Module):
    """x / rms(x) · (1 + weight), computed in float32 whatever the input's type.

    Args:
        hidden_size: width D of the vectors.
        eps: added to the mean square, so that a zero vector stays finite.

    Source: Zhang & Sennrich 2019; `RMSNorm` in gemma_pytorch (the weight starts at 0, not 1).
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`float[…, D]` → `float[…, D]` of the same dtype."""
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return (h * (1.0 + self.weight.float())).type_as(x)


# %% [markdown]
# Equal to the loop, for any number of axes in front; and a bfloat16 input is the float32 result,
# rounded once.

# %%
norm = RMSNorm(16)
x = torch.randn(2, 3, 16) * 4  # (B, L, D)
with torch.no_grad():
    norm.weight.normal_(std=0.3)
    out = norm(x)
    slow = rms_norm_loop(x.flatten(0, 1), norm.weight).view(2, 3, 16)
    short = norm(x.bfloat16())
    rounded_once = norm(x.bfloat16().float()).bfloat16()
assert out.shape == x.shape and torch.allclose(out, slow, atol=1e-6)
assert short.dtype == torch.bfloat16 and torch.equal(short, rounded_once)
print(tuple(out.shape), out.dtype, "|", tuple(short.shape), short.dtype)

# %% [markdown]
# ### What eps does
#
# For a zero vector the size is 0 and $0 \cdot \infty$ would be `nan`, which spreads to every
# token through attention. With eps the zero vector stays zero. How large must a vector be for
# eps not to matter? We feed sizes from a millionth to a million, in two formats.

# %%
print("zeros without eps:", rms_norm_fast(torch.zeros(3), torch.zeros(3), eps=0.0))
print("zeros with eps:   ", RMSNorm(3)(torch.zeros(3)).detach())
direction = F.rms_norm(torch.randn(2048), (2048,))
largest = direction.abs().max().item()
print(f"largest of its 2048 numbers: {largest:.2f}, so it passes 256 at size {256 / largest:.0f}")
sizes_in = torch.logspace(-6, 6, 121)
curves = {
    "float32 inside": RMSNorm(2048)(sizes_in[:, None] * direction).detach(),
    "float16 inside": rms_norm_fast((sizes_in[:, None] * direction).half(), torch.zeros(())),
}
fig, ax = plt.subplots(figsize=(6.8, 2.9), layout="constrained")
for (name, out), colour, style in zip(curves.items(), ("good", "bad"), ("-", "--")):
    ax.plot(sizes_in, rms(out.float()).nan_to_num(0), style, color=COLOURS[colour], label=name)
ax.axvline(1e-3, color=COLOURS["muted"], lw=1, ls=":")
ax.text(1.3e-3, 0.1, "√eps", color=COLOURS["inside"])
ax.set(xscale="log", xlabel="size of the input", ylabel="size of the output", ylim=(-0.05, 1.2))
ax.legend(loc="upper left")
save_figure(fig, "07_eps")

# %% [markdown]
# Down to about $\sqrt\varepsilon = 0.001$ every input comes out with size 1. Below, eps wins and
# small noise is not blown up. The dashed line falls to zero as soon as **one** number passes 256,
# whose square float16 cannot hold. In a vector of 2048 numbers that is early, at size 57. The
# float32 line goes on.

# %% [markdown]
# ## Against the reference
#
# PyTorch has `F.rms_norm`, with a plain weight: we hand it $1 + w$. The stored file holds inputs,
# weights and outputs of transformers' `GemmaRMSNorm`, in float32 and bfloat16.
# `tests/test_rms_norm.py` computes it afresh.

# %% tags=["nbval-ignore-output"]
ref = load_file("reference/rms_norm.safetensors")
norm = RMSNorm(64)
norm.load_state_dict({"weight": ref["weight"]})
with torch.no_grad():
    ours = norm(ref["x"])
    torchs = F.rms_norm(ref["x"], (64,), weight=1 + norm.weight, eps=1e-6)
for name, theirs in (("F.rms_norm", torchs), ("GemmaRMSNorm", ref["y"])):
    gap = (ours - theirs).abs().max().item()
    assert gap <= 1e-5
    print(f"{name:13} largest difference {gap:.1e}")
assert torch.equal(norm(ref["x_bfloat16"]), ref["y_bfloat16"])
print("bfloat16      equal, bit for bit")

# %% [markdown]
# ## See it: a picture through the norm
#
# The vectors of a language model cannot be looked at. But a patch of pixels is a vector too, of
# numbers between −1 (black) and 1 (white). So cut a grey cat into patches ([lesson 03](03_patch_embedding.ipynb); 196 numbers
# each without colour), normalise each one, and draw it again.

# %%
cat = ImageProcessor(224)(sample_picture("cat")).mean(1, keepdim=True)  # (1, 1, 224, 224), grey
patches = F.unfold(cat, 14, stride=14)[0].T  # (N, 196)
versions = {
    "before": patches,
    "after RMSNorm": F.rms_norm(patches, (196,)),
    "after LayerNorm": F.layer_norm(patches, (196,), eps=1e-8),
}
pictures = []
for name, p in versions.items():
    print(f"{name:16} sizes from {rms(p).min():.2f} to {rms(p).max():.2f}")
    white = 1 if name == "before" else 2  # which value is drawn as white; its negative as black
    picture = F.fold(p.T[None], (224, 224), 14, stride=14)[0, 0]  # (224, 224)
    pictures.append((picture / white / 2 + 0.5).clamp(0, 1))
save_figure(show_images(pictures, list(versions), height=2.3), "07_cat.png")

# %% [markdown]
# **What to notice.** After RMSNorm all patches are equally strong: the faint ones speak up. But
# bright stays bright and dark stays dark, because signs are kept. LayerNorm removes each patch's
# mean brightness, and only texture is left.
#
# The same happens to a token's 2048 numbers: *what* it says is kept, *how loud* it was is not.

# %% [markdown]
# ## At full size
#
# Gemma 2B has 18 layers with two norms each, before attention and before the MLP, and one last
# norm: 37. We count on the meta device.
#
# For each number a norm does four operations: square, add, and two products. In bfloat16 it reads
# two bytes and writes two. Below it stands beside one linear layer of the same width, for a whole
# prompt.

# %%
D, layers, L = 2048, 18, 264  # 256 image tokens and 8 of text
with torch.device("meta"):
    norms = nn.ModuleList(RMSNorm(D) for _ in range(2 * layers + 1))
parameters = sum(p.numel() for p in norms.parameters())
print(f"{len(norms)} norms × {D} = {parameters:,} parameters")
print(f"share of the language model: {parameters / 2_508_662_784:.4%}")

norm_flops, norm_bytes = 4 * L * D, 4 * L * D
linear_flops, linear_bytes = 2 * L * D * D, 2 * D * D + 4 * L * D
print("           MFLOPs      MB   FLOPs a byte")
for name, flops, size in (
    ("RMSNorm", norm_flops, norm_bytes),
    ("Linear", linear_flops, linear_bytes),
):
    print(f"{name:8} {flops / 1e6:8.1f} {size / 1e6:7.1f} {flops / size:14.0f}")
print(f"ratio of FLOPs 1 : {linear_flops // norm_flops}")

# %% [markdown]
# A processor can do tens of operations while one byte arrives. A norm asks for *one*: it is
# **memory bound**, its time is the time to move the vector. So it costs more time than its FLOPs
# suggest. A fused kernel, which reads once and writes once, helps; our lines walk over the vector
# several times. Beside an MLP ([lesson 08](08_geglu.ipynb)) it stays small all the same. Measured here, in float32:


# %% tags=["nbval-ignore-output"]
def best_ms(run, repeat=30):
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


x, norm, linear = torch.randn(L, D), RMSNorm(D), nn.Linear(D, D, bias=False)
with torch.no_grad():
    a, b = best_ms(lambda: norm(x)), best_ms(lambda: linear(x))
print(f"norm {a:.2f} ms, linear {b:.1f} ms: 1 : {b / a:.0f} in time")

# %% [markdown]
# ## A bug people really make: the missing 1
#
# A colleague loads Gemma's weights into an engine that has an RMSNorm already. The names fit, the
# shapes fit, `load_state_dict` is strict and says nothing. Then the model answers with random
# words. We rebuild it in small: a hidden vector that clearly means "cat", the last norm, and a head
# of eight words.

# %%
words = "a cat dog on the mat sat .".split()
head = torch.randn(8, 64) * 0.08
hidden = 40 * head[1] + torch.randn(64)  # points to "cat"
checkpoint = {"weight": torch.randn(64) * 0.1}  # as stored: small numbers around 0


class EnginesRMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


# %%
fig, axes = plt.subplots(1, 2, figsize=(7.4, 2.6), sharey=True, layout="constrained")
for ax, kind, colour in zip(axes, (RMSNorm, EnginesRMSNorm), ("good", "bad")):
    norm = kind(64)
    print(norm.load_state_dict(checkpoint), end=" ")
    with torch.no_grad():
        out = norm(hidden)
        chances = (head @ out).softmax(-1)
    print(f"size of the normed vector {rms(out):.2f}")
    ax.bar(words, chances, color=COLOURS[colour])
    ax.set_title("ours" if kind is RMSNorm else "the engine's")
axes[0].set_ylabel("probability of the next word")
save_figure(fig, "07_missing_one")

# %% [markdown]
# The engine multiplies by $w$ where Gemma means $1 + w$. The vector shrinks to a tenth, the
# scores with it, and the probabilities are nearly even: it has an opinion about nothing. Inside
# the model each block then reads almost nothing and adds almost nothing.
#
# Even a *strict* load cannot see it: names and shapes carry no meaning. The weights above are
# invented; trained ones differ by channel, the error is the same.

# %% [markdown]
# ### The check that finds it
#
# Ask about behaviour, not about shapes: **a stored weight of zero must leave size 1**. The cure for
# such an engine is to add 1 to each norm weight when it is loaded. Exactly once: some converters
# do it when they *write* the file, and a reader who adds it again gets $2 + w$.

# %%
for name, kind, add in (
    ("ours", RMSNorm, 0),
    ("the engine's", EnginesRMSNorm, 0),
    ("the engine's, 1 added once", EnginesRMSNorm, 1),
    ("the engine's, 1 added twice", EnginesRMSNorm, 2),
):
    norm = kind(64)
    norm.load_state_dict({"weight": torch.zeros(64) + add})
    print(f"{name:28} size {rms(norm(hidden)).item():.2f}")

# %% [markdown]
# ### A second one: the norm in bfloat16
#
# Someone finds the conversions to float32 wasteful and removes them. The numbers still agree within
# 1 %. What is lost? Take a channel whose learned factor is 1.003, and compare
# the errors over a thousand vectors.


# %%
def lean_norm(x, weight, eps=1e-6):
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * scale * (1 + weight)  # all of it in the type of x


x = (torch.randn(1000, 256) * 5).bfloat16()
norm = RMSNorm(256).bfloat16()
norm.weight.data.fill_(0.003)
exact = F.rms_norm(x.double(), (256,), eps=1e-6) * (1 + norm.weight.double())
with torch.no_grad():
    for name, out in (("float32 inside", norm(x)), ("lean", lean_norm(x, norm.weight))):
        error = out.double() / exact - 1
        shift = error.mean(-1).abs()  # an error that all numbers of a vector share
        print(f"{name:15} per number {error.abs().mean():.2%}, shared {shift.mean():.2%}")

# %% [markdown]
# Per number the lean form is only about twice as bad. But ours errs up and down at random, which
# the next layer's sums average away. The lean errors are **shared**: the scale of a whole vector
# is rounded, and the learned 0.003 never arrives. Shared errors do not average away; they pile
# up over 37 norms.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): how long?
#
# The *length* of a vector is the root of its **sum** of squares. With eps negligible, how long is a
# vector of 2048 numbers after RMSNorm when
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
    assert lengths is not None and len(lengths) == 4, "give a list of four numbers"
    x, norm = torch.randn(2048), RMSNorm(2048)
    for place, (w, vector) in enumerate([(0.0, x), (1.0, x), (0.0, 1000 * x), (0.0, 0 * x)]):
        norm.weight.data.fill_(w)
        true = norm(vector).norm().item()
        assert abs(lengths[place] - true) < 0.02, f"number {place + 1} is not {lengths[place]}"


check(test_1, lengths)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The mean of the squares is 1 after the division, so their sum is 2048. The factor is
# $1 + w$, not $w$.
#
# </details>

# %% tags=["solution"]
# √2048 = 45.25, the factor that Gemma puts on its word embeddings (lesson 12): no coincidence.
lengths = [2048**0.5, 2 * 2048**0.5, 2048**0.5, 0.0]
check(test_1, lengths)

# %% [markdown]
# ### Exercise 2 (break): silence a float16 norm
#
# "Our vectors never exceed size 10", says a colleague, "so float16 is safe." Build a
# `float16[2048]` of finite numbers with rms ≤ 10 that a float16 norm (`lean_norm`) turns into
# zeros.


# %% tags=["exercise"]
def silent_vector():
    return None  # your code: float16[2048]


# %% tags=["check"]
def test_2(silent_vector):
    x = silent_vector()
    assert isinstance(x, torch.Tensor), "return a tensor"
    assert x.dtype == torch.float16 and x.shape == (2048,), "it must be float16[2048]"
    assert x.isfinite().all() and x.any(), "finite numbers, not all of them zero"
    assert rms(x.float()) <= 10, f"its size is {rms(x.float()):.1f}, more than 10"
    assert not lean_norm(x, torch.zeros(2048).half()).any(), "float16 still gives an answer"
    assert RMSNorm(2048)(x).any(), "the right norm is silent too"


check(test_2, silent_vector)

# %% [markdown]
# <details><summary>Hint</summary>
#
# One channel is enough. Which number has a square above 65,504, and how large is the rms of a
# vector with this number and 2047 zeros? Such lonely large channels are common in trained models.
#
# </details>


# %% tags=["solution"]
def silent_vector():
    x = torch.zeros(2048, dtype=torch.float16)
    x[0] = 300  # its square is 90,000: infinity; the rms is only 300 / √2048 = 6.6
    return x


check(test_2, silent_vector)

# %% [markdown]
# ### Exercise 3 (extend): fold the weight away
#
# After Gemma's norms stand linear layers without bias. Then $(1 + w)$ can be moved into the next
# matrix once, and the norm needs no weight any more. Engines and quantisers do this. Return a new
# `nn.Linear` so that `folded(x / rms)` equals `linear(norm(x))`; change neither input.


# %% tags=["exercise"]
def fold(norm, linear):
    return None  # your code: an nn.Linear without bias


# %% tags=["check"]
def test_3(fold):
    for D, out in ((4, 4), (16, 24)):
        norm, linear = RMSNorm(D), nn.Linear(D, out, bias=False)
        norm.weight.data.normal_()
        before = linear.weight.clone()
        folded = fold(norm, linear)
        assert isinstance(folded, nn.Linear), "return an nn.Linear"
        assert folded.weight.shape == (out, D), f"its weight must be {(out, D)}"
        assert torch.equal(linear.weight, before), "the given layer was changed"
        x = torch.randn(5, D)
        got, expected = folded(RMSNorm(D)(x)), linear(norm(x))
        scaled_rows = out == D and torch.allclose(
            folded.weight, before * (1 + norm.weight)[:, None], atol=1e-6
        )
        assert not scaled_rows, "scale the columns, one for each input channel, not the rows"
        assert torch.allclose(got, expected, atol=1e-4), "the outputs differ"


check(test_3, fold)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `linear.weight` has the shape (out, D). Input channel $i$ meets column $i$. Make a new layer of
# the same size and copy the product into its weight under `torch.no_grad()`.
#
# </details>


# %% tags=["solution"]
def fold(norm, linear):
    folded = nn.Linear(linear.in_features, linear.out_features, bias=False)
    with torch.no_grad():
        folded.weight.copy_(linear.weight * (1 + norm.weight))  # (out, D) · (D,): by column
    return folded


check(test_3, fold)

# %% [markdown]
# ## Summary
#
# - Sizes multiply from layer to layer. A norm before each layer gives it an input of size 1,
#   always.
# - RMSNorm keeps the direction of a vector and forgets its length. LayerNorm also removes the mean.
# - Gemma stores $w$ around 0 and means $1 + w$: finer in bfloat16, and a good rest position.
# - Squares and sums need float32; round once, at the end.
# - A norm's cost is moving bytes; its danger is being nearly right.

# %% [markdown]
# ## Quiz
#
# **1.** The norm makes all tokens equally large. Why does the residual stream still grow?
#
# <details><summary>Answer</summary>
#
# Only what a layer *reads* is normalised; the stream itself goes on unnormalised, and each layer
# adds to it. In the figure it grew like the square root of the number of layers. A last norm
# brings it back before the head.
#
# </details>

# %% [markdown]
# **2.** Can a batch of one and a batch of a hundred give a token different norms?
#
# <details><summary>Answer</summary>
#
# No. The mean runs over the channels of one token only. (BatchNorm is the one that mixes
# examples.) This is also why padding cannot disturb it.
#
# </details>

# %% [markdown]
# **3.** A model has been trained with a plain weight (no 1). You load it into our RMSNorm. What
# happens, and how do you repair it?
#
# <details><summary>Answer</summary>
#
# Nothing is reported, and each channel is multiplied by $1 + \text{weight}$, about twice too much,
# in another proportion for each channel. Subtract 1 from the stored norm weights when loading,
# exactly once, in float32.
#
# </details>

# %% [markdown]
# ## References
#
# - Biao Zhang and Rico Sennrich, *Root Mean Square Layer Normalization*, 2019
#   ([arXiv 1910.07467](https://arxiv.org/abs/1910.07467)), section 4.
# - Jimmy Lei Ba et al., *Layer Normalization*, 2016
#   ([arXiv 1607.06450](https://arxiv.org/abs/1607.06450)), section 3.
# - Ruibin Xiong et al., *On Layer Normalization in the Transformer Architecture*, 2020
#   ([arXiv 2002.04745](https://arxiv.org/abs/2002.04745)).
# - Mingjie Sun et al., *Massive Activations in Large Language Models*, 2024
#   ([arXiv 2402.17762](https://arxiv.org/abs/2402.17762)).
# - `RMSNorm` in gemma_pytorch, `gemma/model.py`; `GemmaRMSNorm` in transformers,
#   `models/gemma/modeling_gemma.py`.
# - The missing 1: [executorch #19901](https://github.com/pytorch/executorch/pull/19901);
#   added twice: [mold #1078](https://github.com/utensils/mold/pull/1078).

# %% [markdown] tags=["navigation"]
# [← Tokenizer](06_tokenizer.ipynb) | [contents](00_overview.ipynb) | [GeGLU →](08_geglu.ipynb)
