"""Time this package on a GPU beside transformers: decoding, eager and compiled, and prefill.

One process, random weights of PaliGemma 3B's shape (on the card, nothing is read from a disk), the
same weights for all. What matters first comes first, and each line is printed as soon as it is
known, so a run that is cut short still says something. `bench.py --device cuda` calls this.

    python tools/bench_gpu.py                                    # on a GPU, about seven minutes
    python tools/bench_gpu.py --device cpu --size tiny --dtype float32      # tries the script
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import TEXT_TOKENS
from random_checkpoint import LOUD, SIZES

from paligemma.compilation import CompiledDecoder
from paligemma.generation import generate
from paligemma.model import PaliGemma
from paligemma.support.config import config_dict

COLUMNS = ("what", "batch", "tokens/s", "ms a step", "of the memory's rate", "first call s")


def random_model(config, device: torch.device, dtype: torch.dtype) -> PaliGemma:
    """Ours with random weights at which logits spread, as tools/random_checkpoint.py draws them."""
    with torch.device("meta"):
        model = PaliGemma(config)
    model = model.to(dtype).to_empty(device=device).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.normal_(std=0.02)
                if name.startswith("vision_tower.") and "norm" in name and name.endswith("weight"):
                    weight.add_(1)
            else:
                loud = LOUD if "down_proj" in name else 1.0
                weight.normal_(std=loud / weight[0].numel() ** 0.5)
    return model


def same_in_transformers(ours: PaliGemma, device: torch.device, dtype: torch.dtype):
    """transformers' PaliGemma on the very same tensors."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration
    from transformers.utils import logging

    logging.set_verbosity_error()
    value: dict[str, Any] = config_dict(ours.config)
    value["projection_dim"] = ours.config.text_config.hidden_size
    with torch.device(device):
        model: Any = PaliGemmaForConditionalGeneration._from_config(
            PaliGemmaConfig(**value), dtype=dtype, attn_implementation="sdpa"
        )
    state = {f"model.{name}": weight for name, weight in ours.state_dict().items()}
    missing = model.load_state_dict(state, strict=False, assign=True)
    assert not missing.unexpected_keys, missing.unexpected_keys
    model.tie_weights()
    model.generation_config.eos_token_id = None
    return model.eval()


def make_inputs(config, batch: int, size: int, device: torch.device, dtype: torch.dtype) -> dict:
    """`batch` random pictures of `size` pixels, each with eight tokens of prompt."""
    generator = torch.Generator().manual_seed(1)
    image = torch.full((batch, (size // config.vision_config.patch_size) ** 2), 0)
    image += config.image_token_index
    words = torch.randint(10, config.image_token_index, (batch, TEXT_TOKENS), generator=generator)
    pixels = torch.rand(batch, 3, size, size, generator=generator) * 2 - 1
    return {
        "input_ids": torch.cat([image, words], 1).to(device),
        "pixel_values": pixels.to(device, dtype),
    }


def seconds(work: Callable, device: torch.device, times: int = 3) -> float:
    """The median of some runs, each waited for."""
    found = []
    for _ in range(times):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory_rate(device: torch.device) -> float:
    """Bytes a second that the card reads and writes when it copies."""
    block = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    other = torch.empty_like(block)
    other.copy_(block)
    return 2 * block.nbytes / seconds(lambda: other.copy_(block), device, 5)


def answer_with_ours(decoder) -> Callable:
    def answer(inputs: dict, tokens: int) -> torch.Tensor:
        return generate(decoder, **inputs, max_new_tokens=tokens, eos_token_id=-1)

    return answer


def answer_with_theirs(model, cache: str) -> Callable:
    @torch.inference_mode()
    def answer(inputs: dict, tokens: int) -> torch.Tensor:
        ids = inputs["input_ids"]
        out = model.generate(
            **inputs,
            attention_mask=torch.ones_like(ids),
            token_type_ids=torch.zeros_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=cache,  # with "static", transformers compiles on a GPU
        )
        return out[:, ids.shape[1] :]

    return answer


def decode(answer: Callable, inputs: dict, tokens: int, device: torch.device) -> dict:
    """Seconds a step, from the difference of a long and a short answer, and of the first call."""
    wait(device)
    start = time.perf_counter()
    answer(inputs, 1 + tokens)
    wait(device)
    first = time.perf_counter() - start
    answer(inputs, 1 + tokens)
    short = seconds(lambda: answer(inputs, 1), device)
    long = seconds(lambda: answer(inputs, 1 + tokens), device)
    return {"step": (long - short) / tokens, "first": first}


def bench(args: argparse.Namespace) -> dict:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    config = SIZES[args.size]
    card = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    rate = memory_rate(device)
    result: dict[str, Any] = {"device": card, "rate": rate, "torch": torch.__version__}
    result |= {"dtype": args.dtype, "decode": [], "prefill": []}
    print(f"{card}, torch {torch.__version__}, {args.dtype}; copying: {rate / 1e9:,.0f} GB/s")
    side = config.vision_config.image_size

    model = random_model(config, device, torch.float32)  # equal tokens first, in float32
    inputs = make_inputs(config, 1, side, device, torch.float32)
    plain = answer_with_ours(model)(inputs, 1 + args.tokens)
    fast = answer_with_ours(CompiledDecoder(model))(inputs, 1 + args.tokens)
    result["equal"] = torch.equal(plain, fast)
    result["distinct"] = len(set(plain[0].tolist()))
    print(
        f"float32, eager and compiled: equal tokens {result['equal']}, {result['distinct']} kinds"
    )
    del model
    torch.compiler.reset()

    model = random_model(config, device, dtype)
    theirs = same_in_transformers(model, device, dtype)
    weights = sum(w.nbytes for w in model.language_model.parameters())
    print(" | ".join(COLUMNS))
    decoder = CompiledDecoder(model)
    contenders = {
        "ours, compiled": answer_with_ours(decoder),
        "transformers, compiled": answer_with_theirs(theirs, "static"),
        "ours": answer_with_ours(model),
        "transformers": answer_with_theirs(theirs, "dynamic"),
    }
    for batch in args.batches:
        inputs = make_inputs(config, batch, side, device, dtype)
        length = inputs["input_ids"].shape[1] + args.tokens // 2
        cache = model.make_cache(batch, length).nbytes
        for name, answer in contenders.items():
            if batch > args.most_compiled and name == "transformers, compiled":
                continue  # each batch size is another minute of compiling
            found = decode(answer, inputs, args.tokens, device)
            share = (weights + cache) / found["step"] / rate
            result["decode"].append({"name": name, "batch": batch, "share": share} | found)
            speed = f"{batch / found['step']:,.0f} | {1e3 * found['step']:.2f}"
            print(f"{name} | {batch} | {speed} | {share:.0%} | {found['first']:.0f}", flush=True)
    print("prefill | size | ours ms | transformers ms")
    for size in args.sizes if args.size == "3b" else [side]:
        if size != side:  # the same blocks read a larger picture; only its positions are more
            larger = SIZES[args.size].vision_config
            wide = type(config)(type(larger)(**vars(larger) | {"image_size": size}))
            del model, theirs, contenders, decoder
            model = random_model(wide, device, dtype)
            theirs = same_in_transformers(model, device, dtype)
            contenders, decoder = {}, None
        inputs = make_inputs(config, 1, size, device, dtype)
        answers = answer_with_ours(model), answer_with_theirs(theirs, "dynamic")
        times = []
        for answer in answers:
            answer(inputs, 1)
            times.append(seconds(partial(answer, inputs, 1), device, 5))
        result["prefill"].append({"size": size, "ours": times[0], "transformers": times[1]})
        print(f"prefill | {size} | {1e3 * times[0]:.1f} | {1e3 * times[1]:.1f}", flush=True)
    if device.type == "cuda":
        result["peak"] = torch.cuda.max_memory_allocated()
        print(f"peak memory: {result['peak'] / 1e9:.1f} GB (both models share their weights)")
    return result


def main(arguments: list[str] | None = None) -> None:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    add = parser.add_argument
    add("--device", default="cuda")
    add("--size", choices=list(SIZES), default="3b", help="default: %(default)s")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s")
    add("--batches", type=int, nargs="+", default=[1, 8, 32])
    add("--sizes", type=int, nargs="+", default=[224, 448, 896], help="of pictures, for prefill")
    add("--tokens", type=int, default=64, help="default: %(default)s")
    add("--most_compiled", type=int, default=8, help="largest batch for transformers compiled")
    add("--json", type=Path, metavar="FILE", help="write every measurement here")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; try --device cpu --size tiny --dtype float32")
    result = bench(args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
