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
# [← Quantization](22_quantization.ipynb) | [contents](00_overview.ipynb) | [Inference →](24_inference.ipynb)

# %% [markdown]
# # 23 · Compilation: where does the time of a small step go?
#
# *45 minutes* · part IV, Answering
#
# **What you will be able to do**
#
# - count what a decode step does, and say which part of it is arithmetic;
# - write a step whose shapes never change, and show that it gives the same tokens;
# - compile it, and find what breaks a graph.

# %% tags=["map"]
from paligemma.support.course_map import model_map

model_map("compilation")

# %% [markdown]
# ## Setup
#
# The cache comes from [lesson 11](11_kv_cache.ipynb), the model from [lesson 15](15_model.ipynb), `generate` from [lesson 18](18_generation.ipynb). One thread: a step this small gains nothing from a second. The compiled cells need a C++ compiler (g++ or clang; on a Mac `xcode-select --install`).

# %%
#| export
"""A decode step of fixed shape, compiled: the same tokens, with less between the products."""

import copy
import warnings
import weakref

import torch

from paligemma.kv_cache import KVCache
from paligemma.model import PaliGemma, PaliGemmaOutput
from paligemma.support.arguments import check_context

# %% tags=["setup"]
import math
import time
from collections import Counter

import matplotlib.pyplot as plt
from torch.utils._python_dispatch import TorchDispatchMode

from paligemma.checkpoint import load_model
from paligemma.generation import generate
from paligemma.processor import Processor
from paligemma.support.course import add_to_class, check, sample_picture, save_figure
from paligemma.support.drawing import COLOURS

torch.set_num_threads(1)
TINY = "../paligemma/assets/tiny"
model, processor = load_model(TINY), Processor.from_pretrained(TINY)
_ = torch.set_grad_enabled(False)

# %% [markdown]
# ## The problem
#
# [Lesson 18](18_generation.ipynb) found that a decode step has to read all weights once, and that this sets the least time that it can take. Large models come near to it. Small ones, and large ones on a fast GPU, do not: there the *arithmetic* is over before the *instructions* have been given.
#
# Let us listen in: PyTorch has a hook through which every operation passes. Ours counts them by name.


# %%
class Listen(TorchDispatchMode):
    """Counts the operations that reach PyTorch's kernels."""

    def __init__(self):
        super().__init__()
        self.operations = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


# %%
batch = processor([sample_picture("scene")], ["caption en"])
input_ids, pixel_values = batch["input_ids"], batch["pixel_values"]
length = input_ids.shape[1]
cache = model.make_cache(1, 128)
logits = model(input_ids, pixel_values, cache=cache).logits[:, -1]
token = logits.argmax(-1, keepdim=True)  # int64[B, 1]

# %%
with Listen() as heard:
    model(token, cache=cache)
total = heard.operations.total()
print(f"{total} operations for one token")

# %% [markdown]
# Which of them are work? Products of matrices and attention. Views compute nothing, they only say where numbers lie.

# %%
products = {"mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu"}
busy = sum(heard.operations[name] for name in products)
views = {"view", "_unsafe_view", "t", "slice", "transpose", "split", "unsqueeze", "expand"}
launched = total - sum(heard.operations[name] for name in views)

# %%
print(f"{launched} compute something, {busy} of them are products and attention")
assert total - busy > 8 * busy and launched > 4 * busy

# %% tags=["hide-input"]
figure, axis = plt.subplots(figsize=(9, 3), layout="constrained")
common = heard.operations.most_common(18)
colours = [COLOURS["language"] if name in products else COLOURS["muted"] for name, _ in common]
axis.bar(range(len(common)), [n for _, n in common], color=colours)
names = ["attention" if "attention" in name else name for name, _ in common]
axis.set_xticks(range(len(common)), names, rotation=40, ha="right")
axis.set_ylabel("calls for one token")
save_figure(figure, "23_operations")

# %% [markdown]
# **What to notice.** The coloured bars are the work. All others reshape, add, scale, turn and copy a few hundred numbers. Each costs a trip through Python and PyTorch's dispatcher and, if it computes, the launch of a kernel: a few millionths of a second. Hundreds of them, for each token of each answer.

# %% [markdown]
# ## By hand: what would have to stay the same?
#
# The remedy is to give the instructions **once** and play them back: record the step as a **graph**, join neighbouring operations into one, run it again for each token. A recording fits only if nothing in it changes. What changes from step to step?

# %%
for step in range(3):
    cache = model.make_cache(1, 128)
    model(input_ids, pixel_values, cache=cache)
    for _ in range(step):
        model(token, cache=cache)
    print(f"after {step} tokens: keys", list(cache.keys[0][:, :, : len(cache)].shape))

# %% [markdown]
# One shape in a step changes, the number of keys. Python cuts it out of the cache by a number that it counts itself. So:
#
# 1. Always read the **whole room** of the cache, and hide what is not filled yet by a mask.
# 2. Keep the position of the next token **in a tensor**, which the graph reads and advances.
#
# With pencil and paper: a room of four, two keys filled. Hidden scores are $-\infty$, and their weights 0.

# %%
two = torch.tensor([1.0, 2.0]).softmax(-1)
room = torch.tensor([1.0, 2.0, 7.0, 7.0])  # two slots hold something old
visible = torch.tensor([True, True, False, False])
whole = room.masked_fill(~visible, float("-inf")).softmax(-1)
print("two keys:  ", two, "\nwhole room:", whole)
assert torch.allclose(two, whole[:2]) and (whole[2:] == 0).all()

# %% [markdown]
# ## The module
#
# ### A cache that is read whole
#
# While the prompt is read, it is the `KVCache` that we know. After that, new keys go to `slot`, a tensor, and attention gets the whole room. `visible` says which slots hold a token.


# %%
#| export
class StaticCache(KVCache):
    """A `KVCache` that, once the prompt is read, is always seen whole: nothing changes its shape.

    Args: as for `KVCache`; `max_length` is the room.

    Source: `StaticCache` in transformers; the cache of gpt-fast.
    """

    def __init__(self, *shape, **options):
        super().__init__(*shape, **options)
        batch, device = self.keys[0].shape[0], self.keys[0].device
        self.visible = torch.zeros(batch, 1, 1, self.max_length, dtype=torch.bool, device=device)
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.static = False  # not yet: the prompt is being read


# %% [markdown]
# The prompt is in: what it filled is visible, but for its padding. (Why the rest becomes 0: the section on the bug.)


# %%
#| export
@add_to_class(StaticCache)
def begin(self, attention_mask: torch.Tensor) -> None:
    """The prompt is in: `int64[B, S]`, 0 on its padding. From now on one token at a time."""
    past = len(self)
    for tensor in (*self.keys, *self.values):
        tensor[:, :, past:] = 0  # a weight of 0 times whatever the memory holds must be 0
    self.visible.zero_()
    self.visible[..., :past] = attention_mask.bool()[:, None, None]
    self.slot.fill_(past)
    self.static = True


# %%
#| export
@add_to_class(StaticCache)
def update(
    self, layer_idx: int, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As in `KVCache`; after `begin` the room, `float[B, K, S, Dh]`, the token at `slot`."""
    if not self.static:
        return KVCache.update(self, layer_idx, k, v)
    keys, values = self.keys[layer_idx], self.values[layer_idx]
    keys.index_copy_(2, self.slot, k)
    values.index_copy_(2, self.slot, v)
    return keys, values


# %% [markdown]
# ### The step
#
# No number in it is counted by Python. The position of the new token is the number of visible ones before it: so padding, which is not visible, needs no care.


# %%
#| export
def decode_step(model: PaliGemma, token: torch.Tensor, cache: StaticCache) -> torch.Tensor:
    """The next token's logits; nothing in here depends on how many tokens there were.

    Args:
        model: in evaluation mode.
        token: `int64[B, 1]`, the token chosen last.
        cache: after `begin`; gains the token.

    Returns:
        `float32[B, 1, V]`.
    """
    cache.visible.index_fill_(-1, cache.slot, True)
    position_ids = cache.visible.sum(-1)[:, 0] - 1  # [B, 1]
    language = model.language_model
    hidden = language(language.embed(token), position_ids, cache.visible, cache)  # [B, 1, D]
    cache.slot.add_(1)
    return language.logits(hidden)


# %% [markdown]
# The same tokens? Twenty steps of both, side by side:


# %%
def static_cache(room=128, batch=1):
    c = model.config.text_config
    return StaticCache(c.num_hidden_layers, batch, c.num_key_value_heads, room, c.head_dim)


plain, static = model.make_cache(1, 128), static_cache()
for cache in (plain, static):
    model(input_ids, pixel_values, cache=cache)
static.begin(torch.ones_like(input_ids))

# %%
largest, ids = 0.0, token
for _ in range(20):
    one = model(ids, cache=plain).logits
    other = decode_step(model, ids, static)
    largest = max(largest, (one - other).abs().max().item())
    ids = one.argmax(-1)
print(f"largest difference of a logit in 20 steps: {largest:.0e}")
assert largest < 1e-4

# %% [markdown]
# ## What breaks a graph
#
# `torch.compile` runs the Python of a step once, with stand-ins for tensors, and writes the operations down. Where Python must *decide* by a value, the recording stops. (`fullgraph=True` makes that an error.) To watch it we hand it a compiler of our own, which compiles nothing and counts:


# %%
def recorded(function, *calls, **options):
    """How many graphs torch.compile records for these calls; 0 where it has to stop."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(function, backend=count, fullgraph=True, **options)
    try:
        for arguments in calls:
            compiled(*arguments)
    except torch._dynamo.exc.TorchDynamoException:
        return 0
    return len(graphs)


# %%
def asks(x, mask):
    return x if bool(mask.all()) else x.masked_fill(~mask, 0)


def peeks(x, mask):
    return x * 2 if x.max().item() > 1 else x


def tensors_only(x, mask):
    return torch.where(x.max() > 1, x * 2, x).masked_fill(~mask, 0)


# %%
x, mask = torch.ones(4), torch.tensor([True, True, False, True])
counts = {f.__name__: recorded(f, (x, mask)) for f in (asks, peeks, tensors_only)}
print(counts)
assert list(counts.values()) == [0, 0, 1]

# %% [markdown]
# `if tensor > 0`, `bool(tensor)`, `tensor.item()`: each asks the machine for a value, and waits for it. On a GPU that wait is costly even without a compiler: all that was queued has to finish first.
#
# And a shape that grows? With `dynamic=False`, a recording for exactly the shapes that it meets, each length needs a new one:


# %%
def square(x):
    return x * x


growing = recorded(square, *[(torch.ones(n),) for n in (5, 6, 7)], dynamic=False)
fixed = recorded(square, *[(torch.ones(7),) for _ in range(3)], dynamic=False)
print(f"growing: {growing} graphs; fixed: {fixed}")
assert growing == 3 and fixed == 1

# %% [markdown]
# And our step? One graph, for as many tokens as we like:

# %%
static.begin(torch.ones(1, len(static), dtype=torch.int64))
steps = [(model, token, static)] * 3
count = recorded(decode_step, *steps, dynamic=False)
print("decode_step:", count, "graph")
assert count == 1

# %% [markdown]
# ## Compiled
#
# Now with the real compiler, *inductor*. On a CPU it writes C++, on a GPU Triton, and joins neighbours: what was ten trips through memory becomes one loop. `reduce-overhead` adds **CUDA graphs** where there is a GPU: one call launches all kernels of the step.
#
# The first call takes a while: it records, writes a program and compiles that.

# %% tags=["nbval-ignore-output"]
torch.compiler.reset()
fast_step = torch.compile(decode_step, fullgraph=True, mode="reduce-overhead")
static.begin(torch.ones_like(input_ids))
start = time.perf_counter()
fast_step(model, token, static)
print(f"the first call: {time.perf_counter() - start:.0f} s")


# %%
def write(step, count=40):
    """Greedy tokens `int64[1, count]`, the prompt being in the cache."""
    static.begin(torch.ones_like(input_ids))
    ids, written = token, []
    for _ in range(count):
        ids = step(model, ids, static)[:, -1].argmax(-1, keepdim=True)
        written.append(ids)
    return torch.cat(written, 1)


# %%
assert torch.equal(write(decode_step), write(fast_step))
print("the same forty tokens")


# %%
def write_plainly(count=40):
    """The same with the cache that grows."""
    cache, ids = model.make_cache(1, 128), token
    model(input_ids, pixel_values, cache=cache)
    start = time.perf_counter()
    for _ in range(count):
        ids = model(ids, cache=cache).logits[:, -1].argmax(-1, keepdim=True)
    return time.perf_counter() - start


# %%
def seconds(step):
    start = time.perf_counter()
    write(step)
    return time.perf_counter() - start


# %% tags=["nbval-ignore-output"]
times = {
    "as before": min(write_plainly() for _ in range(5)),
    "fixed shape": min(seconds(decode_step) for _ in range(5)),
    "compiled": min(seconds(fast_step) for _ in range(5)),
}
for name, value in times.items():
    print(f"{name:12} {1000 * value / 40:.2f} ms a token")

# %% tags=["hide-input", "nbval-ignore-output"]
figure, axis = plt.subplots(figsize=(7, 1.8), layout="constrained")
colours = [COLOURS["muted"], COLOURS["muted"], COLOURS["accent"]]
axis.barh(list(times), [1000 * t / 40 for t in times.values()], color=colours)
axis.invert_yaxis()
axis.set_xlabel("milliseconds a token, the tiny model, this machine")
save_figure(figure, "23_times")

# %% [markdown]
# **What to notice.** The fixed shape alone gains nothing; it even reads keys that are hidden. It is what lets the compiler in, and the compiler joins what stood between the products.

# %% [markdown]
# ### Standing in for the model
#
# `generate` asks its model for two things: a cache, and logits. So we need no second loop, only something that answers both. It holds the model and the step:


# %%
#| export
class CompiledDecoder:
    """Takes a model's place in `generate`: prompts as ever, then one compiled step a token.

    It compiles for each batch size and room (a multiple of 128 tokens) that it meets, which takes
    a while, once. Prefill is not compiled: its shape is a different one each time.

    Args:
        model: in evaluation mode; later changes of its weights are seen, of its layers too.
        step: in place of the compiled `decode_step`.
    """

    def __init__(self, model: PaliGemma, step=None):
        self.model = model
        # Not fullgraph: after many shapes PyTorch goes on uncompiled, instead of with an error.
        options = {"mode": "reduce-overhead", "dynamic": False}
        self.step = step or torch.compile(decode_step, **options)
        self.spare: dict[tuple, list[StaticCache]] = {}  # memory to be used again


# %% [markdown]
# The cache: its room is rounded up to a multiple of 128, so that few lengths are compiled.


# %%
#| export
@add_to_class(CompiledDecoder)
def make_cache(self, batch_size: int, max_length: int) -> StaticCache:
    c, room = self.model.config.text_config, -(-max_length // 128) * 128  # rounded up
    shape = c.num_hidden_layers, batch_size, c.num_key_value_heads, room, c.head_dim
    return StaticCache(*shape, device=self.model.device, dtype=self.model.dtype)


# %% [markdown]
# The logits: a prompt goes to the model, and then the cache begins; a single token goes to the step.


# %%
#| export
@add_to_class(CompiledDecoder)
def __call__(
    self,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    *,
    cache: StaticCache,
    **options,
) -> PaliGemmaOutput:
    """As `PaliGemma.forward`: a prompt first, then `int64[B, 1]`, always with the cache."""
    if cache.static:
        torch.compiler.cudagraph_mark_step_begin()  # what the last step returned may go
        return PaliGemmaOutput(self.step(self.model, input_ids, cache))
    output = self.model(input_ids, pixel_values, attention_mask, cache=cache, **options)
    cache.begin(torch.ones_like(input_ids) if attention_mask is None else attention_mask)
    return output


# %%
decoder = CompiledDecoder(model, step=fast_step)
answer = generate(decoder, input_ids, pixel_values)
print(processor.decode(answer[0].tolist()))
assert torch.equal(answer, generate(model, input_ids, pixel_values))

# %% [markdown]
# ### The same memory again
#
# A CUDA graph holds *addresses*. Where the next answer's cache lies elsewhere, the recording does not fit and is made anew. Two caches, and where their first keys lie:

# %%
first, second = (decoder.make_cache(1, 100) for _ in range(2))
print("the same memory:", first.keys[0].data_ptr() == second.keys[0].data_ptr())
assert first.keys[0].data_ptr() != second.keys[0].data_ptr()

# %% [markdown]
# Two answers written at the same time need that. But when an answer is over and its cache gone, its memory can serve the next. So the decoder keeps the memory (the *store*) and tells the compiler that its addresses stay. It hands out copies that share the memory; `weakref.finalize` notices when a copy is gone:


# %%
#| export
@add_to_class(CompiledDecoder)
def new_store(self, batch_size: int, room: int) -> StaticCache:
    """Memory for a cache, at addresses that stay."""
    c = self.model.config.text_config
    shape = c.num_hidden_layers, batch_size, c.num_key_value_heads, room, c.head_dim
    store = StaticCache(*shape, device=self.model.device, dtype=self.model.dtype)
    for tensor in (*store.keys, *store.values, store.visible, store.slot):
        torch._dynamo.mark_static_address(tensor)
    return store


# %%
#| export
@add_to_class(CompiledDecoder)
def make_cache(self, batch_size: int, max_length: int) -> StaticCache:
    """A static cache for `batch_size` rows of up to `max_length` tokens.

    Its memory is used again once the answer is over and the cache gone: a CUDA graph holds
    addresses, so other memory would mean another recording.
    """
    check_context(max_length, self.model.config.text_config.max_position_embeddings)
    room = -(-max_length // 128) * 128
    kind = batch_size, room, self.model.device, self.model.dtype
    if kind not in self.spare:
        self.spare = {kind: []}  # of one kind at a time
    spare = self.spare[kind]
    try:
        store = spare.pop()
    except IndexError:  # asking first would leave a gap for another thread
        store = self.new_store(batch_size, room)
    cache = copy.copy(store)  # shares the tensors
    cache._lengths = [0] * len(store.keys)
    weakref.finalize(cache, spare.append, store)
    return cache


# %%
first, second = (decoder.make_cache(1, 100) for _ in range(2))
address = first.keys[0].data_ptr()
assert second.keys[0].data_ptr() != address  # two at the same time
del first  # an answer is over
assert decoder.make_cache(1, 100).keys[0].data_ptr() == address

# %% [markdown]
# Not every machine has a compiler. Then an answer that comes more slowly is better than none:


# %%
#| export
def compile_decode(model: PaliGemma) -> CompiledDecoder | PaliGemma:
    """What to give to `generate`: a `CompiledDecoder`, or, with a warning, the model as it is.

    On a CPU a C++ compiler is needed (g++, clang, on Windows MSVC), on a GPU Triton.
    """
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=model.device))
    except Exception as error:  # which kind it is differs between versions and backends
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"nothing can be compiled here, going on without: {reason}", stacklevel=2)
        return model
    return CompiledDecoder(model)


# %% [markdown]
# ## Against the reference
#
# The reference is the step that we trust. Three prompts of different lengths in one batch, so with padding:

# %%
pictures = [sample_picture(name) for name in ("scene", "scene2", "scene3")]
prompts = ["caption en", "answer en where is the tulip?", "detect rocket"]
inputs = processor(pictures, prompts)
names = ("input_ids", "pixel_values", "attention_mask")
inputs = [inputs[name] for name in names]

# %%
trusted = generate(model, *inputs)
mine = generate(CompiledDecoder(model, step=decode_step), *inputs)
print([processor.decode(row.tolist()) for row in mine])
assert torch.equal(mine, trusted)

# %% [markdown]
# And the compiled step's logits beside those of the model, for one token:

# %%
one, other = model.make_cache(1, 128), static_cache()
for cache in (one, other):
    model(input_ids, pixel_values, cache=cache)
other.begin(torch.ones_like(input_ids))

# %%
gap = (model(token, cache=one).logits - fast_step(model, token, other)).abs().max().item()
print(f"largest difference: {gap:.0e}")
assert gap <= 1e-5

# %% [markdown]
# ## At full size
#
# What is there to gain at 3B? A decode step in bfloat16 reads the language model once. Beside that time stands what it costs to *launch* the operations one by one; 5 millionths of a second each is a usual figure for a GPU.

# %%
weights = 2 * 2.508e9  # bytes of Gemma 2B in bfloat16, its table once
launching = 5e-6 * launched / 4 * 18  # seconds; as many a layer as here, 18 layers
for name, rate in (("a laptop, 30 GB/s", 30e9), ("an H100, 3,350 GB/s", 3350e9)):
    reading = weights / rate
    print(f"{name:20} reads for {1e3 * reading:6.1f} ms, launches for {1e3 * launching:.1f} ms")
assert launching > 2 * weights / 3350e9 and launching < 0.1 * weights / 30e9

# %% [markdown]
# On a laptop a large model waits for its memory, and a compiler has little to win. On a GPU the same model waits for its instructions more than half of the time: there a graph can more than double the speed.

# %% [markdown]
# ## A bug people really make
#
# A colleague's `begin` leaves out one line: the one that fills the rest of the room with zeros. "Those slots are masked, their weight is exactly 0." The tests pass. In production, now and then, an answer is empty or nonsense; and then it is fine again.
#
# Freshly allocated memory holds whatever was there before. Most of it looks like numbers.


# %%
def weigh(leftover):
    """What three keys give, of a room of four; the hidden slot's value is `leftover`."""
    weights = torch.tensor([1.0, 2.0, 3.0, float("-inf")]).softmax(-1)
    values = torch.tensor([10.0, 20.0, 30.0, leftover])
    return (weights * values).sum().item()


for leftover in (0.0, 12345.0, float("nan")):
    print(f"leftover {leftover:8}: {weigh(leftover):.2f}")
assert weigh(0.0) == weigh(12345.0) and math.isnan(weigh(float("nan")))

# %% [markdown]
# $0 \cdot 12345 = 0$, but $0 \cdot \mathrm{NaN} = \mathrm{NaN}$. A mask hides numbers, and NaN is none. The check: fill the room with NaN on purpose, then ask.


# %%
def begin_colleague(cache, attention_mask):
    past = len(cache)
    cache.visible[..., :past] = attention_mask.bool()[:, None, None]
    cache.slot.fill_(past)
    cache.static = True


# %%
survives = []
for begin in (StaticCache.begin, begin_colleague):
    poisoned = static_cache()
    for tensor in (*poisoned.keys, *poisoned.values):
        tensor.fill_(float("nan"))
    model(input_ids, pixel_values, cache=poisoned)
    begin(poisoned, torch.ones_like(input_ids))
    survives.append(bool(decode_step(model, token, poisoned).isfinite().all()))
print("finite logits: ours", survives[0], "· the colleague's", survives[1])
assert survives == [True, False]

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 (predict): how often is it compiled?
#
# `CompiledDecoder` compiles once for each batch size and room. How many times does it compile, each time a new decoder, for: **(a)** three prompts of 65, 67 and 70 tokens, one after the other, at most 20 new tokens; **(b)** one prompt alone, then two in a batch, then one again; **(c)** one prompt of 68 tokens, at most 20 new tokens, then the same with at most 100?

# %% tags=["exercise"]
compiled_times = (None, None, None)


# %% tags=["check"]
def test_1(compiled_times):
    fine = isinstance(compiled_times, tuple | list) and len(compiled_times) == 3
    assert fine and all(type(n) is int for n in compiled_times), "give three whole numbers"
    asked = [[(1, 85), (1, 87), (1, 90)], [(1, 88), (2, 88), (1, 88)], [(1, 88), (1, 168)]]
    why = [
        "rooms are rounded up; do these three differ?",
        "a batch size that was met before needs nothing new",
        "compare the two rooms",
    ]
    for letter, given, calls, hint in zip("abc", compiled_times, asked, why):
        decoder = CompiledDecoder(model, step=decode_step)
        shapes = {tuple(decoder.make_cache(*call).keys[0].shape) for call in calls}
        assert given == len(shapes), f"({letter}): {hint}"


check(test_1, compiled_times)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A room holds prompt and answer. Which multiples of 128 do you need?
#
# </details>

# %% tags=["solution"]
compiled_times = (1, 2, 2)  # all fit in 128; batches of 1 and 2; 128 and 256
check(test_1, compiled_times)

# %% [markdown]
# ### Exercise 2 (write): attention in a room
#
# Write one step of attention for one head, recordable: put the new `k` and `v` (`[1, Dh]`) into `keys` and `values` (`[S, Dh]`) at `slot` (`int64[1]`), make the slot visible, and let `q` (`[1, Dh]`) look at all that is visible.


# %% tags=["exercise"]
def attend_in_room(q, k, v, keys, values, visible, slot):
    """The attention of q: float[1, Dh]. Changes keys, values and visible in place."""
    return None  # your answer


# %% tags=["check"]
def test_2(attend):
    torch.manual_seed(1)
    keys, values, visible = torch.zeros(8, 4), torch.zeros(8, 4), torch.zeros(8, dtype=torch.bool)
    seen_k, seen_v = [], []
    for step in range(5):
        q, k, v = torch.randn(3, 1, 4)
        seen_k.append(k), seen_v.append(v)
        slot = torch.tensor([step])
        out = attend(q, k, v, keys, values, visible, slot)
        assert isinstance(out, torch.Tensor) and out.shape == (1, 4), "return a float[1, Dh]"
        assert visible.sum() == step + 1, "after each step one more slot is visible"
        assert torch.equal(keys[: step + 1], torch.cat(seen_k)), "keys aren't where they belong"
        assert torch.equal(values[: step + 1], torch.cat(seen_v)), "values aren't where they belong"
        true = torch.nn.functional.scaled_dot_product_attention(
            q, torch.cat(seen_k), torch.cat(seen_v)
        )
        assert (out - true).abs().max() < 1e-5, f"step {step}: not the attention of what was seen"
    args = [torch.randn(1, 4) for _ in range(3)] + [keys, values, visible]
    try:  # tensors without values: whoever asks for one gets an error
        attend(*(t.to("meta") for t in (*args, slot)))
    except RuntimeError:
        raise AssertionError("it asks for a value of `slot`, and the machine has to wait") from None
    calls = [(*args, torch.tensor([n])) for n in (5, 6, 7)]
    assert recorded(attend, *calls, dynamic=False) == 1, "it takes more than one recording"


check(test_2, attend_in_room)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `index_copy_` and `index_fill_` take a tensor for the index. Hide with $-\infty$ before the softmax, and divide by $\sqrt{D_h}$.
#
# </details>


# %% tags=["solution"]
def attend_in_room(q, k, v, keys, values, visible, slot):
    keys.index_copy_(0, slot, k)  # the slot is a tensor: nothing is cut out by a Python number
    values.index_copy_(0, slot, v)
    visible.index_fill_(0, slot, True)
    scores = (q @ keys.T) / keys.shape[1] ** 0.5
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ values


check(test_2, attend_in_room)

# %% [markdown]
# ### Exercise 3 (fill in): stop without asking
#
# Rows of a batch end at different times. This colleague asks the machine at each step and for each row. Write it with tensors alone: a row that had ended writes 0, and a row that writes `eos` has ended from then on.


# %%
def finish_slowly(token, done, eos):
    """int64[B], bool[B] → the token to write, and who has ended."""
    token, done = token.clone(), done.clone()
    for row in range(len(token)):
        if done[row]:
            token[row] = 0
        elif token[row] == eos:
            done[row] = True
    return token, done


# %% tags=["exercise"]
def finish(token, done, eos):
    return None  # your answer: two tensors


# %% tags=["check"]
def test_3(finish):
    token, done = torch.tensor([5, 1, 7, 1]), torch.tensor([False, False, True, True])
    for eos in (1, 7, 5):
        given = (token.clone(), done.clone())
        out = finish(*given, eos)
        assert isinstance(out, tuple) and len(out) == 2, "return two tensors"
        assert torch.equal(given[0], token) and torch.equal(given[1], done), "the inputs changed"
        words, ended = finish_slowly(token, done, eos)
        assert torch.equal(out[0], words), "the tokens differ: what does an ended row write?"
        assert torch.equal(out[1], ended), "`done` differs: who has ended, before or just now?"
    assert recorded(lambda t, d: finish(t, d, 1), (token, done)) == 1, "it can't be recorded"


check(test_3, finish)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `masked_fill` for the tokens. For `done`: this *or* that.
#
# </details>


# %% tags=["solution"]
def finish(token, done, eos):
    token = token.masked_fill(done, 0)  # first: an ended row's token doesn't count
    return token, done | (token == eos)


check(test_3, finish)

# %% [markdown]
# ## Summary
#
# - A small step is mostly instructions: for each product more than eight others that compute next to nothing.
# - A graph is recorded once and played back. So no shape may change, and no value may be asked for.
# - A static cache is read whole; a mask hides what is empty, and the empty part must hold numbers.
# - The step is compiled, the prompt is not; `generate` stays the one loop that it was.

# %% [markdown]
# ## Quiz
#
# **1.** The static step reads 128 keys where 70 are filled. Why is it not slower in the end?
#
# <details><summary>Answer</summary>
#
# Reading keys is a small part of a step: the weights are read too, and they are far larger. With long rooms and large batches that changes, which is why the room is rounded up to 128 and not to the longest answer ever.
#
# </details>

# %% [markdown]
# **2.** Why is `done.all()` in `generate` no harm, though it asks for a value?
#
# <details><summary>Answer</summary>
#
# It stands outside the compiled step. It does make the machine wait once a token. Who wants that back checks only every few tokens, and throws away what was written beyond the end.
#
# </details>

# %% [markdown]
# **3.** Why isn't the prompt's pass compiled as well?
#
# <details><summary>Answer</summary>
#
# It has hundreds of positions, so its products are large and the instructions a small share. And its shape is another one for each prompt, so it would be compiled again and again.
#
# </details>

# %% [markdown]
# ## References
#
# - PyTorch team 2023, *Accelerating Generative AI with PyTorch II: GPT, Fast*; the repository gpt-fast.
# - Ansel et al. 2024, *PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode Transformation and Graph Compilation*.
# - PyTorch's documentation: `torch.compile`, CUDAGraph Trees.
# - `StaticCache` in transformers.

# %% [markdown] tags=["navigation"]
# [← Quantization](22_quantization.ipynb) | [contents](00_overview.ipynb) | [Inference →](24_inference.ipynb)
