"""Our language model beside llama.cpp and ONNX Runtime GenAI, those that are installed here.

The peers don't know PaliGemma's layout, so all of them get the language model alone, as a Gemma:
ours in bfloat16, int8 and int4; llama.cpp in BF16, Q8_0 and Q4_0; ONNX Runtime in int8 and int4.
The same weights, tokens and threads; every measurement in a process of its own, all in turn.

    pip install llama-cpp-python gguf              # compiles; 20 minutes on two cores
    pip install onnxruntime-genai onnx-ir
    python tools/bench.py --peers --model_path checkpoints/random-3b --rounds 3
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from paligemma.checkpoint import load_model
from paligemma.quantization import quantize_model

LLAMA = ("BF16", "Q8_0", "Q4_0")
ONNX = ("int8", "int4")
OURS = ("bfloat16", "int8", "int4")
PROMPT = 264  # tokens: those of a picture at 224 pixels and 8 of text
Step = Callable[[list[int]], int]  # the new tokens → the likeliest next one


# ---------------------------------------------------------------- their files


def text_weights(model_path: Path):
    """The language model's tensors, mapped, and its config."""
    model = load_model(model_path, dtype=None).language_model
    return model.state_dict(), model.config


def write_gguf(model_path: Path, kind: str, file: Path) -> None:
    """The language model in llama.cpp's format, its matrices in one of its types."""
    import gguf  # pyright: ignore[reportMissingImports]

    weights, c = text_weights(model_path)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA, c.num_hidden_layers)
    out = gguf.GGUFWriter(str(file), "gemma", use_temp_file=True)
    out.add_context_length(c.max_position_embeddings)
    out.add_embedding_length(c.hidden_size)
    out.add_block_count(c.num_hidden_layers)
    out.add_feed_forward_length(c.intermediate_size)
    out.add_head_count(c.num_attention_heads)
    out.add_head_count_kv(c.num_key_value_heads)
    out.add_layer_norm_rms_eps(c.rms_norm_eps)
    out.add_key_length(c.head_dim)
    out.add_value_length(c.head_dim)
    out.add_vocab_size(c.vocab_size)
    out.add_tokenizer_model("none")
    for name, tensor in weights.items():
        as_float, stored = tensor.float().numpy(), kind
        if tensor.ndim == 1:
            as_float, stored = as_float + 1, "F32"  # llama.cpp multiplies by w, Gemma by 1 + w
        stored = gguf.GGMLQuantizationType[stored]
        theirs = names.get_name(f"model.{name}", try_suffixes=(".weight",))
        out.add_tensor(theirs, gguf.quants.quantize(as_float, stored), raw_dtype=stored)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def write_onnx(model_path: Path, precision: str, folder: Path) -> None:
    """The language model as transformers stores a Gemma, built into ONNX Runtime's format."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import GemmaConfig, PreTrainedTokenizerFast

    weights, c = text_weights(model_path)
    source = folder / "source"
    source.mkdir(parents=True)
    fields = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    fields += "num_key_value_heads head_dim rms_norm_eps max_position_embeddings"
    config = GemmaConfig(**{name: getattr(c, name) for name in fields.split()}, dtype="bfloat16")
    config.architectures = ["GemmaForCausalLM"]
    config.save_pretrained(source)
    named = {f"model.{name}": tensor.contiguous() for name, tensor in weights.items()}
    save_file(named, source / "model.safetensors", metadata={"format": "pt"})
    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}  # the builder asks for a tokenizer
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(source)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source)]
    command += ["-o", str(folder), "-p", precision, "-e", "cpu", "-c", str(folder / "cache")]
    subprocess.run(command, check=True, capture_output=True)


# ---------------------------------------------------------------- one process each


def llama_step(file: Path, threads: int, room: int) -> Step:
    import llama_cpp  # pyright: ignore[reportMissingImports]
    import numpy as np

    model = llama_cpp.Llama(
        str(file), n_ctx=room, n_batch=room, n_ubatch=room, verbose=False,
        n_threads=threads, n_threads_batch=threads,
    )  # fmt: skip

    def step(tokens: list[int]) -> int:
        model.eval(tokens)
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).argmax())

    return step


def onnx_step(folder: Path, threads: int, room: int) -> Step:
    import onnxruntime_genai as og  # pyright: ignore[reportMissingImports]

    config = og.Config(str(folder))
    options = {"intra_op_num_threads": threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = og.Model(config)
    search = og.GeneratorParams(model)
    search.set_search_options(max_length=room, min_length=room, do_sample=False)
    generator = og.Generator(model, search)

    def step(tokens: list[int]) -> int:
        if len(tokens) > 1:
            generator.append_tokens(tokens)
        generator.generate_next_token()  # the one that it chose last is known to it
        return int(generator.get_next_tokens()[0])

    return step


def ours_step(model_path: Path, mode: str, room: int) -> Step:
    """Our prefill and our decode step, as `generate` has them."""
    model = load_model(model_path, dtype=None)
    if mode != "bfloat16":
        quantize_model(model, mode)
    cache = model.make_cache(1, room)

    @torch.inference_mode()
    def step(tokens: list[int]) -> int:
        ids = torch.tensor([tokens])
        return int(model(ids, cache=cache, logits_to_keep=1).logits[0, -1].argmax())

    return step


def worker(args: argparse.Namespace) -> dict:
    """What one process measures."""
    program, kind = args.worker.split(" ")
    torch.set_num_threads(args.threads)
    room = 2 * PROMPT + 2 * args.tokens + 8
    if program == "ours":
        step = ours_step(args.files, kind, room)
    elif program == "llama.cpp":
        step = llama_step(args.files, args.threads, room)
    else:
        step = onnx_step(args.files, args.threads, room)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(10, 250, (PROMPT,), generator=generator).tolist()
    answer(step, prompt, args.tokens)
    return answer(step, prompt, args.tokens)  # in the same context, warm


def answer(step: Step, prompt: list[int], tokens: int) -> dict:
    """A prefill and `tokens` steps after it, timed."""
    start = time.perf_counter()
    ids = [step(prompt)]
    middle = time.perf_counter()
    for _ in range(tokens):
        ids.append(step(ids[-1:]))
    end = time.perf_counter()
    return {"prefill": middle - start, "decode": tokens / (end - middle), "ids": ids}


# ---------------------------------------------------------------- all of them


def contenders() -> list[str]:
    """ "program kind" of all that can run here."""
    found = [f"ours {kind}" for kind in OURS]
    if find_spec("llama_cpp") and find_spec("gguf"):
        found += [f"llama.cpp {kind}" for kind in LLAMA]
    if find_spec("onnxruntime_genai") and find_spec("onnx_ir"):
        found += [f"ONNX-Runtime {kind}" for kind in ONNX]
    return found


def bench(args: argparse.Namespace, folder: Path) -> dict[str, list[dict]]:
    """Write everyone's files, then measure in turn."""
    files, rounds = {}, {name: [] for name in contenders()}
    for name in rounds:
        program, kind = name.split(" ")
        files[name] = args.model_path
        if program != "ours":
            print(f"writing {name}", file=sys.stderr, flush=True)
            files[name] = folder / f"{kind}.gguf" if program == "llama.cpp" else folder / kind
            (write_gguf if program == "llama.cpp" else write_onnx)(
                args.model_path, kind, files[name]
            )
    for i in range(args.rounds):
        for name in rounds if i % 2 == 0 else reversed(list(rounds)):
            command = [sys.executable, __file__, "--worker", name, "--files", str(files[name])]
            command += ["--tokens", str(args.tokens), "--threads", str(args.threads)]
            environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
            run = subprocess.run(command, capture_output=True, text=True, env=environment)
            if run.returncode:
                raise SystemExit(f"measuring {name} failed:\n{run.stderr[-2000:]}")
            rounds[name].append(json.loads(run.stdout.splitlines()[-1]))
            result = rounds[name][-1]
            text = f"prefill {result['prefill']:.2f} s, decode {result['decode']:.1f} tokens/s"
            print(f"round {i + 1} of {args.rounds}: {name} {text}", file=sys.stderr, flush=True)
    return rounds


def markdown(rounds: dict[str, list[dict]], args: argparse.Namespace, machine: str) -> str:
    """Medians, and how they came about."""
    lines = ["| language model alone | prefill s | decode tokens/s |", "|---|---:|---:|"]
    for name, runs in rounds.items():
        prefill, decode = (statistics.median(r[key] for r in runs) for key in ("prefill", "decode"))
        lines.append(f"| {name.replace('-', ' ')} | {prefill:.2f} | {decode:.1f} |")
    return "\n".join(
        [
            *lines,
            "",
            f"Median of {args.rounds} rounds in turn, each in a process of its own; "
            f"{PROMPT} tokens in, {args.tokens} decoded one by one; {args.threads} threads on "
            f"{machine}.",
        ]
    )


def main(args: argparse.Namespace, machine: str) -> None:
    """What `bench.py --peers` does."""
    args.threads = args.threads or torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        rounds = bench(args, Path(folder))
    print(markdown(rounds, args, machine))
    if args.json:
        args.json.write_text(json.dumps(rounds, indent=1) + "\n")


if __name__ == "__main__":  # one measurement, see `bench`
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker")
    parser.add_argument("--files", type=Path)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--threads", type=int)
    print(json.dumps(worker(parser.parse_args())))
