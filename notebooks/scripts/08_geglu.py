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
# - read a gated neuron, also a trained one: what opens it, and what passes through;
# - say where a gate helps and where it does not, from a fair comparison;
# - find two errors that no shape reveals.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("geglu")

# %% [markdown]
# ## Setup
#
# From earlier lessons: the `ImageProcessor` ([lesson 02](02_image_processor.ipynb)), and the `Tokenizer` ([lesson 06](06_tokenizer.ipynb)) and `RMSNorm` ([lesson 07](07_rms_norm.ipynb)), to read the trained layers of the shipped model. The cells that begin with `#| export` become the file [geglu.py](../paligemma/geglu.py).

# %%
#| export
"""Gemma's feed-forward layer: a gated linear unit with tanh GELU."""

import torch
import torch.nn.functional as F
from torch import nn

# %% tags=["setup"]
import math
from importlib import resources

import matplotlib.pyplot as plt
from safetensors.torch import load_file

from paligemma.image_processor import ImageProcessor
from paligemma.plotting import show_heatmap
from paligemma.rms_norm import RMSNorm
from paligemma.support.course import check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS
from paligemma.tokenizer import Tokenizer

torch.manual_seed(8)
torch.set_printoptions(precision=3, sci_mode=False)
torch.set_num_threads(1)  # matrices as small as those here gain nothing from two

# %% [markdown]
# ## The problem
#
# Attention moves information *between* tokens. Then each token has to think about what it collected, **alone**. That is the work of the MLP: widen the vector to many *neurons*, bend each number, narrow back. In SigLIP ([lesson 05](05_siglip.ipynb)) a neuron computes
#
# $$\text{gelu}(u \cdot x)$$
#
# One number decides two things: *whether* the neuron speaks, and *what* it says.

# %% [markdown]
# A neuron of **GeGLU** has two rows of weights instead of one, and multiplies:
#
# $$\text{gelu}(g \cdot x)\;\cdot\;(u \cdot x)$$
#
# The **gate** $g\cdot x$ decides whether. The **up** value $u \cdot x$ is what passes, of either sign. Below, a wave arrives at the up side while the gate is slowly opened and closed.


# %%
def gelu(z):
    return F.gelu(z, approximate="tanh")  # the version that Gemma uses; more of that below


# %%
t = torch.linspace(0, 1, 600)
up = torch.sin(math.tau * 14 * t)
gate = -4 * torch.cos(math.tau * 2 * t)
passes = gelu(gate) * up
assert passes[gate < -3.5].abs().max() < 0.01 and passes.max() > 3.8

# %% tags=["hide-input"]
fig, axes = plt.subplots(3, 1, figsize=(8, 4), sharex=True, layout="constrained")
axes[0].plot(t, up, color=COLOURS["vision"])
axes[1].plot(t, gate, color=COLOURS["muted"], lw=1.2, ls="--")
axes[1].plot(t, gelu(gate), color=COLOURS["language"])
axes[2].plot(t, passes, color=COLOURS["together"])
for ax, name in zip(axes, ("up: u · x", "gate: g · x (dashed)\nand gelu(g · x)", "product")):
    ax.set_ylabel(name, rotation=0, ha="right", va="center")
    ax.axhline(0, color=COLOURS["muted"], lw=0.6)
    ax.set(xticks=(), xlim=(0, 1))
save_figure(fig, "08_gate")

# %% [markdown]
# **What to notice.** Gate far below zero: silence, whatever comes. Gate above zero: the wave passes, as strongly as the gate is open. Two *different* properties of one token meet in a product: "only if A, then as much as B".

# %% [markdown]
# ## By hand
#
# ### GELU
#
# GELU multiplies $x$ by $\Phi(x)$, the share of a bell curve (mean 0, spread 1) that lies below $x$. At 0 half the curve lies below, so $\text{gelu}(0) = 0 \cdot \tfrac12 = 0$. Far right all of it does: $\text{gelu}(x) \approx x$. Far left nothing does: 0.
#
# Exactly, $\Phi(x) = \tfrac12\bigl(1 + \text{erf}(x/\sqrt2)\bigr)$. A cheaper curve of nearly the same form uses tanh:
#
# $$\tfrac12\Bigl(1 + \tanh\bigl(\sqrt{2/\pi}\,(x + 0.044715\,x^3)\bigr)\Bigr)$$


# %%
def gelu_exact(x):
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def gelu_tanh(x):
    return x * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# %%
print("    x   exact    tanh   difference")
for x in (-6, -2, -1, 0, 1, 2, 6):
    a, b = gelu_exact(x), gelu_tanh(x)
    print(f"{x:5} {a:7.4f} {b:7.4f} {b - a:12.5f}")

# %%
x = torch.linspace(-5, 5, 1001)
gap = gelu(x) - F.gelu(x)  # PyTorch's default is the exact one
worst = x[gap.argmax()].abs().item()
print(f"largest difference {gap.max():.5f}, at ±{worst:.1f}")
print(f"smallest value {gelu(x).min():.2f}, at {x[gelu(x).argmin()]:.2f}")
assert gap.max() < 0.0005 and 2.6 < worst < 2.8 and -0.171 < gelu(x).min() < -0.169

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(8.4, 3), layout="constrained")
axes[0].plot(x, x.relu(), color=COLOURS["muted"], lw=1.2, label="relu")
axes[0].plot(x, F.gelu(x), color=COLOURS["vision"], lw=3.5, alpha=0.5, label="gelu, exact")
axes[0].plot(x, gelu(x), color=COLOURS["language"], ls="--", label="gelu, tanh")
axes[0].set(xlim=(-4, 4), ylim=(-0.5, 4), xlabel="x", title="the curves")
axes[0].legend(loc="upper left")
axes[1].plot(x, gap * 1e4, color=COLOURS["bad"])
axes[1].set(xlabel="x", ylabel="in units of 0.0001", title="tanh minus exact")
save_figure(fig, "08_gelu")

# %% [markdown]
# On the left the two lie on each other. On the right, ten thousand times larger, they differ. Gemma was trained with the **tanh** version. Keep this picture in mind for the bug below.
#
# Unlike relu, which is $\max(x, 0)$, GELU has no corner, and it is slightly negative left of zero.

# %% [markdown]
# ### A gated layer
#
# A token of width 2 and three neurons. For each neuron a gate row, an up row, and a column of `down` that says where its product goes. With a pencil: the gates are $3+2 = 5$, $-3-2 = -5$ and $-1 + 2 = 1$.

# %%
x = torch.tensor([1.0, 2])
gate = torch.tensor([[3.0, 1], [-3, -1], [-1, 1]])  # [M, D]: three neurons, width 2
up = torch.tensor([[1.0, 1], [4, 0], [0, -1]])  # [M, D]
down = torch.tensor([[1.0, 1, 1], [0, 2, -1]])  # [D, M]

# %%
passes = gelu(gate @ x) * (up @ x)
print("gate g · x:  ", (gate @ x).tolist())
print("up u · x:    ", (up @ x).tolist())
print("passes:      ", passes)
print("down, output:", down @ passes)

# %% [markdown]
# The first neuron is open and passes its 3 five times as strongly. The second is shut: its 4 never arrives. The third is open a little, and what it passes is negative. A plain GELU neuron can say nothing below −0.17; this one said −1.68.

# %% [markdown]
# ## As a loop
#
# One token and one neuron at a time. Each neuron reads the token twice, multiplies, and adds its own column of `down`, scaled by the product, to the output.


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


# %%
D, M, L = 8, 24, 5
gate, up = torch.randn(2, M, D) / D**0.5
down = torch.randn(D, M) / M**0.5
x = torch.randn(L, D)
slow = geglu_loop(x, gate, up, down)

# %% [markdown]
# ## Vectorised
#
# All neurons of all tokens at once are matrix products; the gating is a product entry by entry.


# %%
def geglu(x, gate, up, down):
    passes = gelu(x @ gate.T) * (x @ up.T)  # [L, M]
    return passes @ down.T  # [L, D]


assert torch.allclose(geglu(x, gate, up, down), slow, atol=1e-5)
print("loop and tensor form agree")

# %% [markdown]
# ## The module
#
# Three linear layers without bias, under the names of the published weights. Their order matters more than it seems: `gate_proj` is the one that goes through GELU.


# %%
#| export
class GeGLU(nn.Module):
    """down(gelu(gate(x)) · up(x)): one projection decides how much of another passes.

    Args:
        hidden_size: width D of the residual stream.
        intermediate_size: width M of the gate and of what it gates.

    Source: Shazeer 2020 (GLU variants); `GemmaMLP` in gemma_pytorch and transformers.
    """

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`float[B, L, D]` → `float[B, L, D]`."""
        gate = F.gelu(self.gate_proj(x), approximate="tanh")  # [B, L, M]
        return self.down_proj(gate * self.up_proj(x))


# %%
layer = GeGLU(D, M).requires_grad_(False)
for name, weight in (("gate", gate), ("up", up), ("down", down)):
    layer.get_parameter(f"{name}_proj.weight").copy_(weight)
    print(f"{name}_proj.weight", tuple(weight.shape))
assert torch.allclose(layer(x[None])[0], slow, atol=1e-5)

# %% [markdown]
# ## Against the reference
#
# The stored file holds weights, an input and the output of transformers' `GemmaMLP` (width 32, 64 neurons). `tests/test_geglu.py` computes it afresh. The load is strict.

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
# A patch of pixels is a vector too, so a GeGLU can read it. We choose one neuron's weights by hand. **Up**: left half minus right half, an edge detector. **Gate**: minus the mean brightness. It should say "an edge, but only where it is dark".

# %%
cat = ImageProcessor(224)(sample_picture("cat")).mean(1, keepdim=True)  # [1, 1, 224, 224], grey
patches = F.unfold(cat, 4, stride=4)[0].T  # [N, 16] with N = 56 · 56
neuron = GeGLU(16, 1).requires_grad_(False)
neuron.up_proj.weight.copy_(torch.tensor([1.0, 1, -1, -1]).repeat(4) / 8)  # left minus right
neuron.gate_proj.weight.fill_(-6 / 16)  # minus the mean, times 6
neuron.down_proj.weight.fill_(1)
passes = neuron(patches)[:, 0]  # [N]; `down` copies it to all 16 outputs

# %% tags=["hide-input"]
maps = {
    "up: left − right": neuron.up_proj(patches),
    "gelu(gate): how open": gelu(neuron.gate_proj(patches)),
    "what passes": passes,
}
fig, axes = plt.subplots(1, 4, figsize=(9.6, 2.7), layout="constrained")
axes[0].imshow(cat[0, 0])
axes[0].set(title="the picture, grey")
axes[0].set_axis_off()
for ax, (title, values) in zip(axes[1:], maps.items()):
    most = values.abs().quantile(0.99).item()  # a few extremes would make all the rest pale
    show_heatmap(values.view(56, 56).clamp(-most, most), title, centre=0, ax=ax)
save_figure(fig, "08_cat.png")

# %% [markdown]
# **What to notice.** The up side finds edges everywhere, orange and blue for the two directions. The gate opens where it is dark: eyes, nose, stripes, a corner at the top. Only the edges there are left; cheeks, whiskers and background are nearly silent. Both signs survive.

# %% [markdown]
# ### What a trained gate opens on
#
# Nobody writes such weights in the real model; they are learned. The shipped model has four GeGLU layers of 256 neurons. We open the first and let it read single tokens, straight from the table. (In the model, attention adds something before. We leave that out.)

# %%
folder = resources.files("paligemma") / "assets" / "tiny"
weights = load_file(str(folder / "model.safetensors"))
own = "language_model.model."
weights = {k.removeprefix(own): w.float() for k, w in weights.items() if k.startswith(own)}


def trained_mlp(block):
    """The norm before a trained block's MLP, and the MLP."""
    norm, mlp = RMSNorm(128), GeGLU(128, 256)
    norm.load_state_dict({"weight": weights[f"layers.{block}.post_attention_layernorm.weight"]})
    mlp.load_state_dict({k: weights[f"layers.{block}.mlp.{k}"] for k in mlp.state_dict()})
    return norm.requires_grad_(False), mlp.requires_grad_(False)


# %%
sp = Tokenizer.from_pretrained(folder).sp
tokens = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
x = weights["embed_tokens.weight"][: len(tokens)] * 128**0.5  # [V, D]
norm, mlp = trained_mlp(0)
gates = mlp.gate_proj(norm(x))  # [V, M]: each token at each neuron's gate

# %% [markdown]
# Its captions are full of "a cat" and "two cats". Is there a neuron for the plural? We look for the one that is most often open for `▁cats` and shut for `▁cat`, in half of the nouns, and test it on the other half:

# %%
pairs = [(a, f"{a}s") for a in tokens if len(a) > 3 and a[0] == "▁" and f"{a}s" in tokens]
one = torch.tensor([tokens.index(a) for a, _ in pairs])
many = torch.tensor([tokens.index(b) for _, b in pairs])


def plural_neuron(gates):
    """The best neuron on half of the nouns, and how often it is right on the other half."""
    right = (gates[many] > 0) & (gates[one] < 0)  # [nouns, M]
    best = right[::2].float().mean(0).argmax().item()
    return best, right[1::2, best].float().mean().item()


# %%
plural, share = plural_neuron(gates)
untrained = [GeGLU(128, 256).gate_proj(norm(x)).detach() for _ in range(20)]
chance = torch.tensor([plural_neuron(g)[1] for g in untrained])
print(f"{len(pairs)} nouns; trained neuron {plural}: right for {share:.0%} of the other half")
print(f"best neuron of an untrained layer: {chance.mean():.0%} on average")
assert (gates[many, plural] > 0).all() and (gates[one, plural] < 0).all()
assert share > 0.95 and chance.mean() < share - 0.1

# %% [markdown]
# The table itself already tells one from many, so even an untrained layer has a neuron that is often right. Training made one that is right for every noun. And the locations: which of the 1024 open a neuron?

# %%
opened = gelu(gates)[1024:2048]  # [1024, M]: the tokens <loc0000> … <loc1023>
for neuron in (99, 225, 22):
    top = opened[:, neuron].topk(100).indices
    print(f"neuron {neuron:3}: the hundred that open it most: {top.min()} to {top.max()}")
    assert top.max() - top.min() < 200
assert opened[:740, 22].max() < 0.3 and opened[900:, 22].min() > 3

# %% tags=["hide-input"]
fig, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.4), layout="constrained")
order = gates[many, plural].argsort()
for index, colour, name in ((one, "muted", "one"), (many, "language", "many")):
    left.scatter(range(len(pairs)), gates[index[order], plural], s=18, color=COLOURS[colour])
    left.text(len(pairs), gates[index, plural].mean(), name, color=COLOURS[colour], va="center")
left.axhline(0, color=COLOURS["ink"], lw=0.8)
left.set(xlim=(-1, 48), xticks=(), xlabel="nouns", title=f"gate of neuron {plural}: shut below 0")
sides = ("right", "left", "left")
for neuron, colour, ha in zip((99, 225, 22), ("vision", "together", "accent"), sides):
    right.plot(opened[:, neuron], color=COLOURS[colour], lw=1.2)
    at = opened[:, neuron].argmax().item()
    right.text(at, 8.4, f"neuron {neuron}", color=COLOURS[colour], ha=ha)
right.set(xlim=(0, 1080), ylim=(-0.6, 9.2), xlabel="location token", title="gelu(gate): how open")
save_figure(fig, "08_trained")

# %% [markdown]
# **What to notice.** Left, each noun has two dots: its plural opens the gate, its singular shuts it. Right, three neurons open for a part of the picture each: around 430, around 600, and near the lower or right edge. Neuron 22 is silent below 740. That is what "whether" means: *is it many? is it near the edge?*

# %% [markdown]
# ## Is it worth it? A fair comparison
#
# A gated neuron has more weights than a plain one, so equal *parameters* means fewer neurons. Three small networks with two inputs and one output:
#
# - plain, $\text{gelu}(u \cdot x)$: 20 neurons × 3 = 60;
# - plain with biases: 15 neurons × 4, and one more = 61;
# - GeGLU: 12 neurons × 5 = 60.
#
# Each learns a **product**, $x_0 x_1$, and a **sum of bends**, $\max(x_0, 0) - |x_1|$, from random points. Eight seeds train side by side, on the first axis.


# %%
def new_weights(kind, M, rng, seeds=8):
    shapes = [(2, M), (M, 1)]
    shapes += {"plain": [], "plain + bias": [(1, M), (1, 1)], "GeGLU": [(2, M)]}[kind]
    new = [torch.randn(seeds, *s, generator=rng) / s[0] ** 0.5 for s in shapes]
    return [w.requires_grad_() for w in new]


def network(kind, x, up, down, extra=0, shift=0):
    """float[points, 2] → float[seeds, points, 1]"""
    if kind == "GeGLU":
        return gelu(x @ extra) * (x @ up) @ down
    return gelu(x @ up + extra) @ down + shift


# %%
def fit(kind, M, target, steps=500):
    """Relative error of each seed after training; 1 is no better than the mean."""
    rng = torch.Generator().manual_seed(0)
    weights = new_weights(kind, M, rng)
    optimizer = torch.optim.Adam(weights)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
    for _ in range(steps):
        x = torch.rand(128, 2, generator=rng) * 4 - 2
        loss = (network(kind, x, *weights) - target(x)).square().mean((1, 2)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    x = torch.rand(2000, 2, generator=rng) * 4 - 2
    error = (network(kind, x, *weights) - target(x)).square().mean((1, 2)).sqrt()
    return (error / target(x).std()).detach()


# %%
targets = {
    "product": lambda x: x[:, :1] * x[:, 1:],
    "sum of bends": lambda x: x[:, :1].relu() - x[:, 1:].abs(),
}
kinds = {"plain": 20, "plain + bias": 15, "GeGLU": 12}
error = {(name, kind): fit(kind, kinds[kind], targets[name]) for name in targets for kind in kinds}

# %%
for name in targets:
    plain = torch.cat((error[name, "plain"], error[name, "plain + bias"]))
    gated = error[name, "GeGLU"]
    print(f"{name:13} all GeGLU better: {bool(gated.max() < plain.min())},", end=" ")
    print(f"all GeGLU worse: {bool(gated.min() > plain.max())}")
assert error["product", "GeGLU"].max() < error["product", "plain + bias"].min()
assert gated.min() > plain.max()

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
for ax, name in zip(axes, targets):
    for place, (kind, colour) in enumerate(zip(kinds, ("muted", "vision", "language"))):
        values = error[name, kind]
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
# A dot is a seed, a line the median. On the product, every GeGLU beats every plain network: it *has* a multiplication, the others build one out of bends. On the sum of bends it is the other way round: far from zero a gated neuron grows like a square, a ramp does not.
#
# So a gate is not better at everything. In language models of equal size it gave a slightly lower loss (Shazeer 2020, who offers no explanation).

# %% [markdown]
# ## At full size
#
# Gemma 2B: width 2048, 16,384 neurons, 18 layers.

# %%
D, M, layers, whole = 2048, 16384, 18, 2_923_466_480
one_layer = 3 * D * M
attention = 2 * D * D + 2 * D * 256  # its four matrices, in one layer
print(f"one layer: {one_layer:,} parameters, {one_layer / attention:.1f} times its attention")
print(f"{layers} layers: {layers * one_layer:,}, {layers * one_layer / whole:.0%} of PaliGemma 3B")
print(f"{2 * layers * one_layer / 1e9:.1f} GB in bfloat16, and as many GFLOPs for each token")
assert one_layer > 10 * attention and 0.61 < layers * one_layer / whole < 0.63

# %% [markdown]
# PaliGemma is mostly GeGLU. Whoever wants a smaller or faster model starts here: [lesson 22](22_quantization.ipynb) is mainly about these matrices. And a weight costs two FLOPs a token, a multiplication and an addition: as many GFLOPs as GB.

# %% [markdown]
# ## A bug people really make: the other GELU
#
# A port of Gemma gives the right top word in nearly every test. Its numbers differ from the reference a little: "rounding", says the author, and loosens the test. Is it rounding? We send all tokens through the four trained GeGLU layers, and compare the stream after each. Beside it, true rounding: float32 against float64.


# %%
def run(activation, x):
    """What stands in the stream after each trained layer, attention left out."""
    out = []
    for norm, mlp in map(trained_mlp, range(4)):
        norm, mlp = norm.to(x.dtype), mlp.to(x.dtype)
        h = F.rms_norm(x, (128,), 1 + norm.weight, 1e-6)  # ours would round to float32
        x = x + mlp.down_proj(activation(mlp.gate_proj(h)) * mlp.up_proj(h))
        out.append(x.double())
    return out


def off(a, b):
    return torch.stack([(u - v).norm() / v.norm() for u, v in zip(a, b)])


# %%
reference, port = run(gelu, x), run(F.gelu, x)
wrong, rounding = off(port, reference), off(reference, run(gelu, x.double()))
top = [(last @ x.double().T).argmax(-1) for last in (port[-1], reference[-1])]
print(f"same top word: {(top[0] == top[1]).float().mean():.1%} of {len(x)}")
print(f"more than 100 times rounding after every layer: {bool((wrong > 100 * rounding).all())}")
assert (top[0] == top[1]).float().mean() > 0.99 and (wrong > 100 * rounding).all()
assert (wrong.diff() > 0).all()

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
steps = range(1, 5)
ax.plot(steps, wrong, "o-", color=COLOURS["bad"], label="exact GELU instead of tanh")
ax.plot(steps, rounding, "o-", color=COLOURS["good"], label="float32 rounding")
ax.set(yscale="log", ylim=(1e-7, 1e-2), xlim=(0.7, 4.3), xticks=steps)
ax.set(xlabel="after layer", ylabel="relative difference")
ax.legend(loc="center right")
save_figure(fig, "08_other_gelu")

# %% [markdown]
# More than a hundred times rounding, and it grows with depth: each layer adds its share. The cause is one missing argument: `F.gelu(x)` is the *exact* version. Several inference engines shipped Gemma with it, because the first published config said only "gelu".
#
# Does it matter, if the top word stays? A test loosened to 0.001 hides the *next* bug.

# %% [markdown]
# ### The check that finds it
#
# Do not ask "close enough?" Ask "as close as rounding allows?" And test at the number where the two versions differ most, not at random ones:


# %%
def is_tanh_gelu(activation):
    return abs(activation(torch.tensor(worst)).item() - gelu_tanh(worst)) < 1e-5


assert is_tanh_gelu(gelu) and not is_tanh_gelu(F.gelu)
print("tanh: ", is_tanh_gelu(gelu), " exact:", is_tanh_gelu(F.gelu))

# %% [markdown]
# ### A second one: gate and up swapped
#
# Another port stores both matrices as one, because one large product is faster (exercise 2). It loads strictly. The output has the right shape and about the right size. Its answers are wrong. What do you suspect from these numbers?

# %%
norm, mlp = trained_mlp(0)
h = norm(x)
g, u = mlp.gate_proj(h), mlp.up_proj(h)
right, swapped = gelu(g) * u, gelu(u) * g  # what passes, [V, M]
size = [mlp.down_proj(p).norm(dim=-1).mean().item() for p in (right, swapped)]
alike = F.cosine_similarity(mlp.down_proj(right), mlp.down_proj(swapped)).mean()
print(f"mean length: right {size[0]:.0f}, port {size[1]:.0f}; cosine between them {alike:.2f}")
assert 0.8 < size[1] / size[0] < 1.25 and alike > 0.5

# %% [markdown]
# The port takes the first half for the gate; the file has up first. Both halves have the same shape, so nothing complains. What becomes of three pairs of numbers?

# %%
for a, b in ((3, 3), (1, 3), (3, -3)):
    product = f"right {gelu_tanh(a) * b:.2f}, swapped {gelu_tanh(b) * a:.2f}"
    print(f"gate {a}, up {b:2}: {product}")

# %% [markdown]
# So it depends on the signs. Sort the trained neurons' cases by the signs of $g\cdot x$ and $u\cdot x$:

# %%
equal = g * u > 0
for name, chosen in (("equal signs", equal), ("opposite signs", ~equal)):
    error_here = (right - swapped)[chosen].norm() / right[chosen].norm()
    print(f"{name:15} {chosen.float().mean():.0%} of the cases, relative error {error_here:.0%}")
assert 0.4 < equal.float().mean() < 0.6
assert (right - swapped)[equal].norm() < 0.2 * right[equal].norm()
assert (right - swapped)[~equal].norm() > right[~equal].norm()

# %% [markdown]
# With equal signs the difference is small. With opposite signs one form passes what the other shuts, and the error is larger than the value. Half of the cases are nearly right: that is why the outputs resemble each other.
#
# The check: **shut the gate**. With a gate that is strongly negative, the output must be zero (nearly). Swapped, it is not.


# %%
def gate_shuts(layer):
    """layer(x, gate, up, down): is a neuron with a strongly negative gate silent?"""
    one = torch.ones(1, 1)
    return layer(one, -10 * one, one, one).abs().item() < 1e-3


swapped_way = lambda x, gate, up, down: geglu(x, up, gate, down)
assert gate_shuts(geglu) and not gate_shuts(swapped_way)
print("right:", gate_shuts(geglu), " swapped:", gate_shuts(swapped_way))

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): what passes?
#
# Five gated neurons see these numbers. Without running anything, what does each pass on, to the nearest whole number?
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
    ok = isinstance(passes, (list, tuple)) and len(passes) == 5
    assert ok and all(isinstance(p, (int, float)) for p in passes), "give a list of five numbers"
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
# An open gate multiplies, a shut one or one at 0 gives nothing, however large the up value is.
passes = [12, 0, 0, -12, 0]
check(test_1, passes)

# %% [markdown]
# ### Exercise 2 (write): one product instead of two
#
# Gate and up read the same input, so their weights can be stacked, **gate first**, into one matrix `gate_up` of shape $[2M, D]$. Then one large product does the work of two. Write both: the stacking, and the layer that uses it.


# %% tags=["exercise"]
def merge(layer):
    return None  # a GeGLU → float[2M, D]


def merged_forward(x, gate_up, down):
    return None  # float[B, L, D], with only two matrix products


# %% tags=["check"]
from torch.utils._python_dispatch import TorchDispatchMode


class Products(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "mm" in func.__name__  # mm, addmm, bmm: the matrix products
        return func(*args, **(kwargs or {}))


def test_2(merge, merged_forward):
    for width, neurons, shape in ((8, 24, (2, 5, 8)), (16, 4, (1, 3, 16))):
        layer, x = GeGLU(width, neurons).requires_grad_(False), torch.randn(shape) * 3
        weight = merge(layer)
        assert isinstance(weight, torch.Tensor), "merge returns a tensor"
        assert weight.shape == (2 * neurons, width), f"merged shape must be {(2 * neurons, width)}"
        assert torch.equal(weight[:neurons], layer.gate_proj.weight), "the gate comes first"
        assert torch.equal(weight[neurons:], layer.up_proj.weight), "below the gate stands up"
        down = layer.down_proj.weight
        with Products() as products:
            out = merged_forward(x, weight, down)
        assert isinstance(out, torch.Tensor) and out.shape == x.shape, f"return shape {shape}"
        gate, up = (x @ weight.T).chunk(2, -1)
        for wrong, why in (
            (gate * gelu(up), "GELU went to the up half"),
            (gelu(gate) * gelu(up), "only one half goes through GELU"),
            (F.gelu(gate) * up, "that is the exact GELU; Gemma's is the tanh one"),
            (gate * up, "the gate goes through GELU"),
        ):
            assert not torch.allclose(out, wrong @ down.T, atol=1e-6), why
        assert torch.allclose(out, layer(x), atol=1e-5), "the output differs from the layer's"
        assert products.count == 2, f"right, but with {products.count} matrix products, not two"


check(test_2, merge, merged_forward)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.cat` along axis 0 stacks the rows. After the product, `chunk(2, dim=-1)` cuts the last axis into its two halves, in the same order.
#
# </details>


# %% tags=["solution"]
def merge(layer):
    return torch.cat((layer.gate_proj.weight, layer.up_proj.weight))  # [2M, D]


def merged_forward(x, gate_up, down):
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)  # [B, L, M] each, from one product
    return F.linear(F.gelu(gate, approximate="tanh") * up, down)


check(test_2, merge, merged_forward)

# %% [markdown]
# ### Exercise 3 (extend): multiply exactly
#
# The trained networks came close to $x_0 x_1$. **Two** gated neurons can do it *exactly*, for all numbers. Find their weights: `gate` and `up` are `float[2, 2]` (a row for each neuron), `down` is `float[1, 2]`.


# %% tags=["exercise"]
def multiplier():
    return None  # gate, up, down


# %% tags=["check"]
def test_3(multiplier):
    weights = multiplier()
    ok = isinstance(weights, (tuple, list)) and len(weights) == 3
    assert ok and all(isinstance(w, torch.Tensor) for w in weights), "return three tensors"
    gate, up, down = (w.float() for w in weights)
    shapes = gate.shape == up.shape == (2, 2) and down.shape == (1, 2)
    assert shapes, "shapes (2, 2), (2, 2), (1, 2)"
    for scale in (10.0, 1.0, 0.1):
        x = torch.randn(200, 2) * scale
        out = geglu(x, gate, up, down)[:, 0]
        error = (out - x[:, 0] * x[:, 1]).abs() / scale**2
        at = error.argmax()
        (a, b), got = x[at].tolist(), out[at].item()
        assert error[at] < 1e-3, f"{a:.2f} times {b:.2f} gives {got:.2f}"


check(test_3, multiplier)

# %% [markdown]
# <details><summary>Hint</summary>
#
# $\text{gelu}(x) = x\,\Phi(x)$, and $\Phi(x) + \Phi(-x) = 1$. So what is $\text{gelu}(x) - \text{gelu}(-x)$? (The tanh version keeps this property.)
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
# - An MLP lets each token think alone. A gated neuron multiplies two readings of the token: *whether* and *what*.
# - A trained gate opens on a property: a plural, an edge of the picture.
# - Two gated neurons multiply exactly. A gate does not help everywhere.
# - GELU comes in two versions, 0.0005 apart. Gemma means tanh.
# - 62 % of PaliGemma's weights are GeGLU. Gate and up have one shape: test behaviour, shut the gate.

# %% [markdown]
# ## Quiz
#
# **1.** Why has the gate an activation, and the up side none?
#
# <details><summary>Answer</summary>
#
# Without GELU the layer would be a product of two linear readings: it could never shut. With GELU on both, the product could hardly be negative. One bent side gives the switch, the straight side keeps sign and size.
#
# </details>

# %% [markdown]
# **2.** A test compares your port's layer with the reference on inputs of size 0.01 and finds a difference of 1e-9. Why is that no proof for the right GELU?
#
# <details><summary>Answer</summary>
#
# Near zero both versions are $x/2$ plus the same small term, and agree. They differ most at about ±2.7. A test must use numbers as large as the model's own.
#
# </details>

# %% [markdown]
# **3.** A gated layer has three matrices, a plain one two. How wide is a GeGLU with as many parameters as a plain MLP of width $4D$?
#
# <details><summary>Answer</summary>
#
# $3 \cdot D \cdot M = 2 \cdot D \cdot 4D$, so $M = \tfrac83 D$. Gemma 2B does not save: its $M$ is $8D$.
#
# </details>

# %% [markdown]
# ## References
#
# - Noam Shazeer, *GLU Variants Improve Transformer*, 2020 ([arXiv 2002.05202](https://arxiv.org/abs/2002.05202)), sections 2 and 3.
# - Dan Hendrycks and Kevin Gimpel, *Gaussian Error Linear Units*, 2016 ([arXiv 1606.08415](https://arxiv.org/abs/1606.08415)), section 2.
# - `GemmaMLP` in gemma_pytorch, `gemma/model.py`, and in transformers, `models/gemma/modeling_gemma.py`.
# - The other GELU, as it was met: [CTranslate2 #1658](https://github.com/OpenNMT/CTranslate2/issues/1658), [mlc-llm #2106](https://github.com/mlc-ai/mlc-llm/pull/2106).

# %% [markdown] tags=["navigation"]
# [← RMSNorm](07_rms_norm.ipynb) | [contents](00_overview.ipynb) | [RoPE →](09_rope.ipynb)
