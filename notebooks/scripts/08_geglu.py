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
# [← RMSNorm](07_rms_norm.ipynb) | [contents](00_overview.ipynb) | [RoPE →](09_rope.ipynb)

# %% [markdown]
# # 08 · GeGLU: what does a gate add to an MLP?
#
# *40 minutes* · part II, Language
#
# **What you will be able to do**
#
# - compute GELU with a pencil and know its two versions apart;
# - read a gated neuron: what opens it, and what passes through;
# - say where a gate helps and where it does not, from a fair comparison;
# - account for most of PaliGemma's weights, and find two errors that no shape reveals.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("geglu")

# %% [markdown]
# ## Setup
#
# From earlier lessons: the drawing helpers (01), the `ImageProcessor` (02), and the vision tower
# (05), to count its weights. The cells that begin with `#| export` become the file
# [geglu.py](../paligemma/geglu.py); this first one gives it its opening lines.

# %%
#| export
"""Gemma's feed-forward layer: a gated linear unit with tanh GELU."""

import torch
import torch.nn.functional as F
from torch import nn

# %% tags=["setup"]
import math
import time

import matplotlib.pyplot as plt
from safetensors.torch import load_file

from paligemma.image_processor import ImageProcessor
from paligemma.plotting import show_heatmap
from paligemma.support.course import check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS
from paligemma.siglip import SiglipVisionConfig, SiglipVisionModel

torch.manual_seed(8)
torch.set_printoptions(precision=3, sci_mode=False)

# %% [markdown]
# ## The problem
#
# Attention moves information *between* tokens. Then each token has to think about what it
# collected, **alone**. That is the work of the **MLP** (multi-layer perceptron): widen the vector to
# many *neurons*, bend each number, narrow back. In SigLIP ([lesson 05](05_siglip.ipynb)) a neuron computes
#
# $$\text{gelu}(u \cdot x)$$
#
# One number decides two things: *whether* the neuron speaks, and *what* it says.

# %% [markdown]
# A **gated** neuron has two rows of weights instead of one, and multiplies:
#
# $$\text{gelu}(g \cdot x)\;\cdot\;(u \cdot x)$$
#
# The **gate** $g\cdot x$ decides whether. The **up** value $u \cdot x$ is what passes, of either
# sign. Below, a wave arrives at the up side while the gate is slowly opened and closed.

# %%
t = torch.linspace(0, 1, 600)
up = torch.sin(math.tau * 14 * t)
gate = -4 * torch.cos(math.tau * 2 * t)
opened = F.gelu(gate, approximate="tanh")

fig, axes = plt.subplots(3, 1, figsize=(7.2, 4), sharex=True, layout="constrained")
axes[0].plot(t, up, color=COLOURS["vision"])
axes[1].plot(t, gate, color=COLOURS["muted"], lw=1.2, ls="--")
axes[1].plot(t, opened, color=COLOURS["language"])
axes[2].plot(t, opened * up, color=COLOURS["together"])
for ax, name in zip(axes, ("up: u · x", "gate: g · x (dashed)\nand gelu(g · x)", "product")):
    ax.set_ylabel(name, rotation=0, ha="right", va="center")
    ax.axhline(0, color=COLOURS["muted"], lw=0.6)
    ax.set(xticks=(), xlim=(0, 1))
save_figure(fig, "08_gate")

# %% [markdown]
# **What to notice.** Gate below zero: silence, whatever comes. Gate above zero: the wave passes, as
# strongly as the gate is open. Two *different* properties of one token meet in a product:
# "only if A, then as much as B".

# %% [markdown]
# ## By hand
#
# ### GELU
#
# GELU multiplies $x$ by $\Phi(x)$, the share of a bell curve (mean 0, spread 1) that lies below
# $x$. At 0 half the curve lies below, so $\text{gelu}(0) = 0 \cdot \tfrac12 = 0$. Far right all of
# it does: $\text{gelu}(x) \approx x$. Far left nothing does: 0.
#
# Exactly, $\Phi(x) = \tfrac12\bigl(1 + \text{erf}(x/\sqrt2)\bigr)$. A cheaper curve of nearly the
# same form uses tanh:
#
# $$\tfrac12\Bigl(1 + \tanh\bigl(\sqrt{2/\pi}\,(x + 0.044715\,x^3)\bigr)\Bigr)$$


# %%
def gelu_exact(x):
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def gelu_tanh(x):
    return x * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


print("    x   exact    tanh   difference")
for x in (-6, -2, -1, 0, 1, 2, 6):
    a, b = gelu_exact(x), gelu_tanh(x)
    print(f"{x:5} {a:7.4f} {b:7.4f} {b - a:12.5f}")

# %%
x = torch.linspace(-5, 5, 501)
exact, tanh = F.gelu(x), F.gelu(x, approximate="tanh")
fig, axes = plt.subplots(1, 2, figsize=(8.2, 3), layout="constrained")
axes[0].plot(x, x.relu(), color=COLOURS["muted"], lw=1.2, label="relu")
axes[0].plot(x, exact, color=COLOURS["vision"], lw=3.5, alpha=0.5, label="gelu, exact")
axes[0].plot(x, tanh, color=COLOURS["language"], ls="--", label="gelu, tanh")
axes[0].set(xlim=(-4, 4), ylim=(-0.5, 4), xlabel="x", title="the curves")
axes[0].legend(loc="upper left")
axes[1].plot(x, (tanh - exact) * 1e4, color=COLOURS["bad"])
axes[1].set(xlabel="x", ylabel="in units of 0.0001", title="tanh minus exact")
save_figure(fig, "08_gelu")

# %% [markdown]
# On the left the two lie on each other. On the right, ten thousand times larger, they differ. Gemma
# was trained with the **tanh** version. Keep this picture in mind for the bug below.
#
# Unlike relu, GELU has no corner, and it is slightly negative left of zero: smallest at about
# −0.75.

# %% [markdown]
# ### A gated layer
#
# A token of width 2 and three neurons. For each neuron a gate row, an up row, and a column of
# `down` that says where its product goes. With a pencil: the gates are $3+2 = 5$, $-3-2 = -5$ and
# $-1 + 2 = 1$.

# %%
x = torch.tensor([1.0, 2])
gate = torch.tensor([[3.0, 1], [-3, -1], [-1, 1]])  # (M, D) = (3, 2)
up = torch.tensor([[1.0, 1], [4, 0], [0, -1]])  # (M, D)
down = torch.tensor([[1.0, 1, 1], [0, 2, -1]])  # (D, M)
opened = F.gelu(gate @ x, approximate="tanh")
print("gate g · x:  ", (gate @ x).tolist())
print("gelu of it:  ", [round(v, 2) + 0.0 for v in opened.tolist()])
print("up u · x:    ", (up @ x).tolist())
print("passes:      ", [round(v, 2) + 0.0 for v in (opened * (up @ x)).tolist()])
print("down, output:", [round(v, 2) for v in (down @ (opened * (up @ x))).tolist()])

# %% [markdown]
# The first neuron is open and passes its 3 five times as strongly. The second is shut: its 4 never
# arrives. The third is half open, and what it passes is negative. A plain GELU neuron could never
# have said −1.68.

# %% [markdown]
# ## As a loop
#
# One token and one neuron at a time. Each neuron reads the token twice, multiplies, and adds its
# own column of `down`, scaled by the product, to the output.


# %%
def geglu_loop(x, gate, up, down):
    """x: float[L, D]; gate, up: float[M, D]; down: float[D, M] → float[L, D]."""
    out = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for j in range(gate.shape[0]):
            opened = gelu_tanh((gate[j] @ x[token]).item())
            value = (up[j] @ x[token]).item()
            out[token] += down[:, j] * (opened * value)
    return out


D, M, L = 8, 24, 5
gate, up = torch.randn(2, M, D) / D**0.5
down = torch.randn(D, M) / M**0.5
x = torch.randn(L, D)
slow = geglu_loop(x, gate, up, down)
print(tuple(slow.shape))

# %% [markdown]
# ## Vectorised
#
# All neurons of all tokens at once are matrix products; the gating is a product entry by entry.

# %%
opened = F.gelu(x @ gate.T, approximate="tanh")  # (L, M)
fast = (opened * (x @ up.T)) @ down.T  # (L, D)
assert torch.allclose(fast, slow, atol=1e-5)
print("loop and tensor form agree")

# %% [markdown]
# ## The module
#
# Three linear layers without bias, under the names of the published checkpoint. Their order matters
# more than it seems: `gate_proj` is the one that goes through GELU.


# %%
#| export
class GeGLU(nn.Module):
    """down(gelu(gate(x)) · up(x)): one projection decides how much of another passes.

    Args:
        hidden_size: width D of the residual stream.
        intermediate_size: width of the gate and of what it gates.

    Source: Shazeer 2020 (GLU variants); `GemmaMLP` in gemma_pytorch and transformers.
    """

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`float[B, L, D]` → `float[B, L, D]`."""
        gate = F.gelu(self.gate_proj(x), approximate="tanh")  # (B, L, intermediate)
        return self.down_proj(gate * self.up_proj(x))


# %%
layer = GeGLU(D, M).requires_grad_(False)
for name, weight in (("gate", gate), ("up", up), ("down", down)):
    layer.get_parameter(f"{name}_proj.weight").copy_(weight)
batch = torch.stack([x, -x])  # (B, L, D)
assert layer(batch).shape == batch.shape
assert torch.allclose(layer(batch)[0], slow, atol=1e-5)
for name, weight in layer.named_parameters():
    print(f"{name:16}", tuple(weight.shape))

# %% [markdown]
# ## Against the reference
#
# The stored file holds weights, an input and the output of transformers' `GemmaMLP` (width 32, 64
# neurons). `tests/test_geglu.py` computes it afresh. The load is strict.

# %% tags=["nbval-ignore-output"]
ref = load_file("reference/geglu.safetensors")
ours = GeGLU(32, 64).requires_grad_(False)
ours.load_state_dict({name: ref[name] for name in ours.state_dict()})
gap = (ours(ref["x"]) - ref["y"]).abs().max().item()
assert gap <= 1e-5
print(f"largest difference: {gap:.1e}")

# %% [markdown]
# ## See it: a gated neuron looks at the cat
#
# A patch of pixels is a vector too, so a GeGLU can read it, and we can see what one neuron does. We
# choose its weights by hand. **Up**: left half minus right half, an edge detector. **Gate**: minus
# the mean brightness. The neuron should say "an edge, but only where it is dark".

# %%
cat = ImageProcessor(224)(sample_picture("cat")).mean(1, keepdim=True)  # (1, 1, 224, 224), grey
patches = F.unfold(cat, 4, stride=4)[0].T  # (N, 16) with N = 56 · 56
neuron = GeGLU(16, 1).requires_grad_(False)
neuron.up_proj.weight.copy_(torch.tensor([1.0, 1, -1, -1]).repeat(4) / 8)  # left minus right
neuron.gate_proj.weight.fill_(-6 / 16)  # minus the mean, times 6
neuron.down_proj.weight.fill_(1)
maps = {
    "up: left − right": neuron.up_proj(patches),
    "gelu(gate): how open": F.gelu(neuron.gate_proj(patches), approximate="tanh"),
    "what passes": neuron(patches)[:, 0],  # `down` copies it to all 16 outputs
}

# %%
fig, axes = plt.subplots(1, 4, figsize=(9.2, 2.6), layout="constrained")
axes[0].imshow(cat[0, 0])
axes[0].set(title="the picture, grey")
axes[0].set_axis_off()
for ax, (title, values) in zip(axes[1:], maps.items()):
    most = values.abs().quantile(0.99).item()  # a few extremes would make all the rest pale
    show_heatmap(values.view(56, 56).clamp(-most, most), title, centre=0, ax=ax)
save_figure(fig, "08_cat.png")

# %% [markdown]
# **What to notice.** The up side finds edges everywhere, orange and blue for the two directions.
# The gate opens on eyes, nose and stripes. Only the edges there are left; cheeks, whiskers and
# background are silent. Both signs survive.
#
# Nobody writes such weights in the real model; they are learned. But each of Gemma's 16,384
# neurons a layer has this form.

# %% [markdown]
# ## Is it worth it? A fair comparison
#
# A gated neuron has more weights than a plain one, so equal *parameters* means fewer neurons. Three
# small networks with two inputs and one output:
#
# - plain, $\text{gelu}(u \cdot x)$: 20 neurons × 3 = 60;
# - plain with biases: 15 neurons × 4, and one more = 61;
# - GeGLU: 12 neurons × 5 = 60.
#
# Each learns a **product**, $x_0 x_1$, and a **sum of bends**, $\max(x_0, 0) - |x_1|$, from random
# points. Eight seeds train side by side: the first axis.


# %%
def fit(kind, neurons, target, seeds=8, steps=500):
    """Relative error (rms, 1 = no better than the mean) of each seed after training."""
    rng = torch.Generator().manual_seed(0)
    new = lambda *s, scale: (torch.randn(seeds, *s, generator=rng) * scale).requires_grad_()
    weights = [new(2, neurons, scale=0.7), new(neurons, 1, scale=neurons**-0.5)]
    if kind == "GeGLU":
        weights.append(new(2, neurons, scale=0.7))
    if kind == "plain + bias":
        weights += [new(1, neurons, scale=1), new(1, 1, scale=0)]

    def model(x, up, down, extra=0, shift=0):
        if kind == "GeGLU":
            return F.gelu(x @ extra, approximate="tanh") * (x @ up) @ down
        return F.gelu(x @ up + extra, approximate="tanh") @ down + shift  # (seeds, points, 1)

    optimizer = torch.optim.Adam(weights)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
    for _ in range(steps):
        x = torch.rand(128, 2, generator=rng) * 4 - 2
        loss = (model(x, *weights) - target(x)).square().mean((1, 2))  # (seeds,)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        rate.step()
    x = torch.rand(2000, 2, generator=rng) * 4 - 2
    error = (model(x, *weights) - target(x)).square().mean((1, 2)).sqrt() / target(x).std()
    return error.detach(), sum(w[0].numel() for w in weights)


# %%
targets = {
    "product": lambda x: x[:, :1] * x[:, 1:],
    "sum of bends": lambda x: x[:, :1].relu() - x[:, 1:].abs(),
}
kinds = {"plain": 20, "plain + bias": 15, "GeGLU": 12}
errors = {}
threads = torch.get_num_threads()
torch.set_num_threads(1)  # matrices this small gain nothing from two
for name, target in targets.items():
    for kind, neurons in kinds.items():
        errors[name, kind], count = fit(kind, neurons, target)
        print(f"{name:13} {kind:13} {count} parameters, 8 seeds trained")
torch.set_num_threads(threads)
gated = {name: errors[name, "GeGLU"] for name in targets}
plain = {name: torch.cat([errors[name, kind] for kind in list(kinds)[:2]]) for name in targets}
print(
    "product: worst GeGLU beats best plain:", bool(gated["product"].max() < plain["product"].min())
)
bends = "sum of bends"
print("bends:   best GeGLU loses to worst plain:", bool(gated[bends].min() > plain[bends].max()))

# %%
fig, axes = plt.subplots(1, 2, figsize=(7.6, 3), sharey=True, layout="constrained")
for ax, name in zip(axes, targets):
    for place, (kind, colour) in enumerate(zip(kinds, ("muted", "vision", "language"))):
        values = errors[name, kind]
        across = place + torch.linspace(-0.15, 0.15, len(values))
        ax.scatter(across, values, s=22, color=COLOURS[colour])
        ax.hlines(values.median(), place - 0.3, place + 0.3, color=COLOURS[colour])
    ax.set(yscale="log", title=name, xlim=(-0.5, 2.5), ylim=(0.01, 0.4))
    ax.set_xticks(range(3), list(kinds))
    ax.set_yticks([0.01, 0.03, 0.1, 0.3], ["1 %", "3 %", "10 %", "30 %"])
    ax.minorticks_off()
axes[0].set_ylabel("relative error (log scale)")
save_figure(fig, "08_fit")

# %% [markdown]
# A dot is a seed, a line the median. On the product, every GeGLU beats every plain network: it
# *has* a multiplication, the others build one out of bends. On the sum of bends it is the other way
# round: far from zero a gated neuron grows like a square, a ramp does not.
#
# So a gate is not better at everything. In language models of equal size it gave a slightly lower
# loss (Shazeer 2020, who offers no explanation).

# %% [markdown]
# ## At full size
#
# Gemma 2B: width 2048, 16,384 neurons, 18 layers. Where do PaliGemma's 2.9 billion parameters sit?
# On the meta device, shapes cost nothing.

# %%
D, M, layers, vocabulary = 2048, 16384, 18, 257216
size = lambda module: sum(p.numel() for p in module.parameters())
with torch.device("meta"):
    one, tower = GeGLU(D, M), SiglipVisionModel(SiglipVisionConfig())
parts = {
    "vision": size(tower),
    "projector": 1152 * D + D,
    "embedding": vocabulary * D,
    "attention": layers * (2 * D * D + 2 * D * 256),  # q and o; one key and one value head
    "norms": (2 * layers + 1) * D,
    "GeGLU": layers * size(one),
}
whole = sum(parts.values())
print(f"one layer: 3 × {D} × {M} = {size(one):,}, in bfloat16 {size(one) * 2 / 1e6:.0f} MB")
for name, count in parts.items():
    print(f"{name:10} {count:13,} {count / whole:6.1%}")
print(f"{'all':10} {whole:13,}")

# %%
fig, ax = plt.subplots(figsize=(8, 1.7), layout="constrained")
left = 0
shades = ("vision", "muted", "together", "accent", "muted", "language")
for (name, count), colour in zip(parts.items(), shades):
    ax.barh(0, count, left=left, color=COLOURS[colour], edgecolor=COLOURS["paper"])
    if count / whole > 0.02:
        text, up_or_in = f"{name}\n{count / whole:.0%}", count / whole > 0.1
        place = {"ha": "center", "va": "center" if up_or_in else "bottom"}
        ink = "white" if up_or_in else COLOURS[colour]
        ax.text(left + count / 2, 0 if up_or_in else 0.44, text, color=ink, **place)
    left += count
ax.set(xlim=(0, whole), ylim=(-0.45, 0.9), yticks=())
ax.set_xticks([b * 1e9 for b in (0, 1, 2)], ["0", "1 billion", "2 billion parameters"])
ax.spines["left"].set_visible(False)
save_figure(fig, "08_share")

# %% [markdown]
# PaliGemma is mostly GeGLU. (Projector and norms are too thin to label.) Whoever wants a smaller or
# faster model starts here: quantisation ([lesson 22](22_quantization.ipynb)) is mainly about these matrices.
#
# A weight costs two FLOPs a token. And each must be *read*, once for all tokens that are
# processed together. We measure a quarter of a layer (4,096 neurons, float32), to keep the notebook
# small:

# %%
prompt = 264  # 256 image tokens and 8 of text
print(f"FLOPs a token and layer: {2 * size(one) / 1e6:.0f} million")
print(f"a prompt of {prompt} tokens, 18 layers: {2 * prompt * parts['GeGLU'] / 1e9:,.0f} GFLOPs")
print(f"as a multiple of attention's projections: {parts['GeGLU'] / parts['attention']:.1f}")
print(f"bytes read for each new token, 18 layers: {2 * parts['GeGLU'] / 1e9:.1f} GB in bfloat16")


# %% tags=["nbval-ignore-output"]
def best_ms(run, repeat=5):
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


quarter = GeGLU(D, M // 4).requires_grad_(False)
for tokens in (1, 16, 256):
    x = torch.randn(tokens, D)
    spent = best_ms(lambda: quarter(x))
    print(f"{tokens:4} tokens: {spent:7.1f} ms, {spent / tokens:6.2f} ms a token")

# %% [markdown]
# One token alone is dear: all weights are read for it. Many together share the reading. So a
# prompt is limited by arithmetic, and writing an answer, token by token, by memory.

# %% [markdown]
# ## A bug people really make: the other GELU
#
# A port of Gemma gives the right top word for each of 64 test tokens. Its numbers differ from
# the reference a little: "rounding", says the author, and loosens the test. Is it rounding? We
# rebuild it: 18 layers with random weights, and after each layer the relative difference between
# port and reference. Beside it, true rounding: float32 against float64.

# %%
stack = [
    (torch.randn(512, 64) / 8, torch.randn(512, 64) / 8, torch.randn(64, 512) / 512**0.5)
    for _ in range(18)
]
tokens = torch.randn(64, 64)


def residual_stream(activation, x):
    """What stands in the stream after each of 18 layers (lesson 07's norm before each)."""
    out = []
    for gate, up, down in stack:
        h = F.rms_norm(x, x.shape[-1:])
        x = x + (activation(h @ gate.to(h).T) * (h @ up.to(h).T)) @ down.to(h).T
        out.append(x.double())
    return out


reference = residual_stream(lambda z: F.gelu(z, approximate="tanh"), tokens)
port = residual_stream(F.gelu, tokens)  # PyTorch's default is the exact one
in_double = residual_stream(lambda z: F.gelu(z, approximate="tanh"), tokens.double())
off = [((a - b).norm() / b.norm()).item() for a, b in zip(port, reference)]
rounding = [((a - b).norm() / b.norm()).item() for a, b in zip(reference, in_double)]
head = torch.randn(64, 1000, dtype=torch.double)
same = (port[-1] @ head).argmax(-1) == (reference[-1] @ head).argmax(-1)
print(f"same top word of 1000: {same.sum()} of {len(same)}")
print(
    f"more than 100 times rounding, in every layer: {min(o / r for o, r in zip(off, rounding)) > 100}"
)

# %%
fig, ax = plt.subplots(figsize=(6.4, 3), layout="constrained")
steps = range(1, 19)
ax.plot(steps, off, color=COLOURS["bad"], label="exact GELU instead of tanh")
ax.plot(steps, rounding, color=COLOURS["good"], label="float32 rounding")
ax.set(yscale="log", ylim=(1e-8, 1e-2), xlim=(0, 19), xticks=(1, 6, 12, 18))
ax.set(xlabel="after layer", ylabel="relative difference")
ax.legend(loc="center right")
save_figure(fig, "08_other_gelu")

# %% [markdown]
# Hundreds of times more than rounding, and it grows with depth: each layer adds its share. The cause
# is one missing argument: `F.gelu(x)` is the *exact* version. Several inference engines shipped
# Gemma with it, because the first published config said only "gelu".
#
# Does it matter, if the top word stays? Near-ties do flip. Worse: a test loosened to 0.001 hides the
# *next* bug.

# %% [markdown]
# ### The check that finds it
#
# Do not ask "close enough?" Ask "as close as rounding allows?" And test at the number where the two
# versions differ most, not at random ones:

# %%
z = torch.linspace(-5, 5, 1001)
gap = (F.gelu(z, approximate="tanh") - F.gelu(z)).abs()
worst = z[gap.argmax()].abs().item()
print(f"largest difference {gap.max():.5f}, at ±{worst:.1f}")


def is_tanh_gelu(activation):
    return abs(activation(torch.tensor(worst)).item() - gelu_tanh(worst)) < 1e-5


print("tanh: ", is_tanh_gelu(lambda z: F.gelu(z, approximate="tanh")))
print("exact:", is_tanh_gelu(F.gelu))

# %% [markdown]
# ### A second one: gate and up swapped
#
# Another port stores both matrices as one, because one large product is faster (exercise 2). It
# loads strictly. The output has the right shape and the right size. Its answers are wrong. What do
# you suspect from these numbers?

# %%
gate, up, down = stack[0]
merged = torch.cat((up, gate))  # as the file has it
first, second = (tokens @ merged.T).chunk(2, dim=-1)
swapped = (F.gelu(first, approximate="tanh") * second) @ down.T
right = (F.gelu(tokens @ gate.T, approximate="tanh") * (tokens @ up.T)) @ down.T
length = lambda v: v.norm(dim=-1).mean()
print(f"mean length: right {length(right):.1f}, port {length(swapped):.1f}")
print(f"cosine between them: {F.cosine_similarity(right, swapped).mean():.2f}")

# %% [markdown]
# The port takes the first half for the gate; the file has up first. Both halves have the
# same shape, so nothing complains. Half of the time it is even right. Look at one neuron by the
# signs of $g\cdot x$ and $u\cdot x$, both of size 3:

# %%
print(" gate   up   right   swapped")
for g, u in ((3, 3), (-3, -3), (3, -3), (-3, 3)):
    print(f"{g:5} {u:4} {gelu_tanh(g) * u:7.2f} {gelu_tanh(u) * g:9.2f}")

# %% [markdown]
# Equal signs: no difference at all. Opposite signs: one form passes −9, the other nearly 0. That
# is why the outputs resemble each other.
#
# The check: **shut the gate**. With a gate that is negative for the input, the output must be zero
# (nearly). Swapped, it is not.


# %%
def gate_shuts(layer):
    """layer(x, gate, up, down): is a neuron with a strongly negative gate silent?"""
    one = torch.ones(1, 1)
    return layer(one, gate=-10 * one, up=one, down=one).abs().item() < 1e-3


right_way = lambda x, gate, up, down: (F.gelu(x @ gate.T, approximate="tanh") * (x @ up.T)) @ down.T
print("right:  ", gate_shuts(right_way))
print("swapped:", gate_shuts(lambda x, gate, up, down: right_way(x, up, gate, down)))

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): what passes?
#
# Five gated neurons see these numbers. Without running anything, what does each pass on, to the
# nearest whole number?
#
# | neuron | $g\cdot x$ | $u\cdot x$ |
# |---|---|---|
# | 0 | 6 | 2 |
# | 1 | −6 | 3 |
# | 2 | 0 | 5 |
# | 3 | 6 | −2 |
# | 4 | −6 | −100 |

# %% tags=["exercise"]
passes = None  # a list of five whole numbers


# %% tags=["check"]
def test_1(passes):
    assert passes is not None and len(passes) == 5, "give a list of five numbers"
    pairs = ((6, 2), (-6, 3), (0, 5), (6, -2), (-6, -100))
    for neuron, (g, u) in enumerate(pairs):
        true = gelu_tanh(g) * u
        assert abs(passes[neuron] - true) < 0.5, f"neuron {neuron} does not pass {passes[neuron]}"


check(test_1, passes)

# %% [markdown]
# <details><summary>Hint</summary>
#
# At 6 GELU is 6, at −6 it is 0 to many digits. The up value is not bent at all.
#
# </details>

# %% tags=["solution"]
passes = [12, 0, 0, -12, 0]
check(test_1, passes)

# %% [markdown]
# ### Exercise 2 (fill in): one product instead of two
#
# Gate and up read the same input, so their weights can be stacked, **gate first**, into one matrix
# `gate_up` of shape $(2M, D)$. Then one large product does the work of two. Write both functions.


# %% tags=["exercise"]
def merge(layer):
    return None  # a GeGLU → float[2M, D]


def merged_forward(x, gate_up, down):
    return None  # float[B, L, D], with only two matrix products


# %% tags=["check"]
def test_2(merge, merged_forward):
    for width, neurons, shape in ((8, 24, (2, 5, 8)), (16, 4, (1, 3, 16))):
        layer, x = GeGLU(width, neurons).requires_grad_(False), torch.randn(shape) * 3
        weight = merge(layer)
        assert isinstance(weight, torch.Tensor), "merge returns a tensor"
        assert weight.shape == (2 * neurons, width), f"merged shape must be {(2 * neurons, width)}"
        assert torch.equal(weight[:neurons], layer.gate_proj.weight), "the gate comes first"
        out = merged_forward(x, weight, layer.down_proj.weight)
        assert isinstance(out, torch.Tensor) and out.shape == x.shape, f"return shape {shape}"
        both = (x @ weight.T).chunk(2, -1)
        swapped = both[0] * F.gelu(both[1], approximate="tanh") @ layer.down_proj.weight.T
        assert not torch.allclose(out, swapped, atol=1e-5), "GELU went to the up half"
        assert torch.allclose(out, layer(x), atol=1e-5), "the output differs from the layer's"


check(test_2, merge, merged_forward)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.cat` along axis 0 stacks the rows. After the product, `chunk(2, dim=-1)` cuts the last axis
# into its two halves, in the same order.
#
# </details>


# %% tags=["solution"]
def merge(layer):
    return torch.cat((layer.gate_proj.weight, layer.up_proj.weight))  # (2M, D)


def merged_forward(x, gate_up, down):
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)  # (B, L, M) each
    return F.linear(F.gelu(gate, approximate="tanh") * up, down)


check(test_2, merge, merged_forward)

# %% [markdown]
# ### Exercise 3 (extend): multiply exactly
#
# The trained networks came close to $x_0 x_1$. **Two** gated neurons can do it *exactly*, for all
# numbers. Find their weights: `gate` and `up` are `float[2, 2]` (a row for each neuron), `down` is
# `float[1, 2]`.


# %% tags=["exercise"]
def multiplier():
    return None  # gate, up, down


# %% tags=["check"]
def test_3(multiplier):
    weights = multiplier()
    assert weights is not None and len(weights) == 3, "return gate, up and down"
    gate, up, down = weights
    assert gate.shape == up.shape == (2, 2) and down.shape == (1, 2), (
        "shapes (2, 2), (2, 2), (1, 2)"
    )
    for scale in (0.1, 1.0, 10.0):
        x = torch.randn(200, 2) * scale
        out = (F.gelu(x @ gate.T, approximate="tanh") * (x @ up.T)) @ down.T
        error = (out[:, 0] - x[:, 0] * x[:, 1]).abs().max() / scale**2
        assert error < 1e-3, f"for numbers of size {scale} it is not the product"


check(test_3, multiplier)

# %% [markdown]
# <details><summary>Hint</summary>
#
# $\text{gelu}(x) = x\,\Phi(x)$, and $\Phi(x) + \Phi(-x) = 1$. So what is
# $\text{gelu}(x) - \text{gelu}(-x)$? (The tanh version keeps this property.)
#
# </details>


# %% tags=["solution"]
def multiplier():
    gate = torch.tensor([[1.0, 0], [-1, 0]])  # x0 and −x0
    up = torch.tensor([[0.0, 1], [0, 1]])  # x1, twice
    down = torch.tensor([[1.0, -1]])  # (gelu(x0) − gelu(−x0)) · x1 = x0 · x1
    return gate, up, down


check(test_3, multiplier)

# %% [markdown]
# ## Summary
#
# - An MLP lets each token think alone. A gated neuron multiplies two readings of the token: *whether*
#   and *what*.
# - That gives a product for free: two neurons multiply exactly. It does not help everywhere.
# - GELU comes in two versions, 0.0005 apart. Gemma means tanh.
# - 62 % of PaliGemma's weights are GeGLU; they set the time of prompt and answer.
# - Gate and up have one shape. Test behaviour: shut the gate.

# %% [markdown]
# ## Quiz
#
# **1.** Why has the gate an activation, and the up side none?
#
# <details><summary>Answer</summary>
#
# Without GELU the layer would be a product of two linear readings: it could never shut. With GELU
# on both, the product could hardly be negative. One bent side gives the switch, the straight side
# keeps sign and size.
#
# </details>

# %% [markdown]
# **2.** A test compares your port's layer with the reference on inputs of size 0.01 and finds a
# difference of 1e-9. Why is that no proof for the right GELU?
#
# <details><summary>Answer</summary>
#
# Near zero both versions are $x/2$ plus the same small term, and agree. They differ most at about
# ±2.7. A test must use numbers as large as the model's own.
#
# </details>

# %% [markdown]
# **3.** You double the number of tokens in a prompt. What happens to this layer's FLOPs, its weights'
# bytes read, and its time?
#
# <details><summary>Answer</summary>
#
# FLOPs double, bytes of weights stay (they are read once for all tokens). With many tokens
# arithmetic is the limit, so time about doubles; from one token to two it hardly changes.
#
# </details>

# %% [markdown]
# ## References
#
# - Noam Shazeer, *GLU Variants Improve Transformer*, 2020
#   ([arXiv 2002.05202](https://arxiv.org/abs/2002.05202)), sections 2 and 3.
# - Dan Hendrycks and Kevin Gimpel, *Gaussian Error Linear Units*, 2016
#   ([arXiv 1606.08415](https://arxiv.org/abs/1606.08415)), section 2.
# - `GemmaMLP` in gemma_pytorch, `gemma/model.py`, and in transformers,
#   `models/gemma/modeling_gemma.py`.
# - The other GELU, as it was met:
#   [CTranslate2 #1658](https://github.com/OpenNMT/CTranslate2/issues/1658),
#   [mlc-llm #2106](https://github.com/mlc-ai/mlc-llm/pull/2106).

# %% [markdown] tags=["navigation"]
# [← RMSNorm](07_rms_norm.ipynb) | [contents](00_overview.ipynb) | [RoPE →](09_rope.ipynb)
