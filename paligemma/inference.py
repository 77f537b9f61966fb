# Exported from notebooks/24_inference.ipynb — edit there, then run `make sync`.
"""The whole model behind one object: pictures and prompts in, answers out."""

import os
import runpy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from numbers import Integral
from pathlib import Path

import numpy as np
import torch

from paligemma.checkpoint import load_model, save_model
from paligemma.compilation import compile_decode
from paligemma.detection import Detection, score_detections
from paligemma.generation import GenerationConfig, generate_steps
from paligemma.generation import stream as text_pieces
from paligemma.mask_codec import MaskCodec
from paligemma.model import PaliGemma
from paligemma.processor import Processor, collate
from paligemma.quantization import quantize_model
from paligemma.segmentation import Segment, score_segments
from paligemma.support.adapters import add_adapter, find_adapter, refuse_adapter
from paligemma.support.arguments import check_context
from paligemma.support.config import parse_device, parse_dtype
from paligemma.support.files import find_folder, shorten
from paligemma.support.pictures import open_picture
from paligemma.support.quantized import load_quantized, read_quantization, save_quantized
from paligemma.support.replacing import replacing
from paligemma.support.tensors import weight_files
from paligemma.tokenizer import Tokenizer

TINY = Path(str(resources.files("paligemma") / "assets" / "tiny"))  # the checkpoint that ships
SMALL = 1_000_000_000  # bytes of weights up to which load() computes in float32


class Pipeline:
    """A model with its processor: pictures and prompts in, text out. What `paligemma.load` returns.

    A picture is a path, a `PIL.Image` or `uint8[H, W, 3]` in RGB order; a list of these for one
    prompt about several pictures; or what `encode` made of either. A prompt is such as
    "caption en" or "answer en how many cats are there?". Options of an answer: the fields of
    `GenerationConfig` (max_new_tokens, temperature, top_p, top_k), and `seed`, which makes a draw
    repeatable.

    Args:
        model: in evaluation mode, on any device.
        processor: from the same checkpoint.
        codec: a `MaskCodec` that draws the masks of `segment`; None: this model has none.
        decoder: what `generate` asks, such as a `CompiledDecoder` of the model; None: the model.
    """

    def __init__(self, model: PaliGemma, processor: Processor, codec=None, decoder=None):
        self.model, self.processor = model, processor
        self.codec, self.decoder = codec, decoder

    def encode(self, image) -> "EncodedImage":
        """Look at a picture once, to ask many things about it; use the result in its place."""
        return self._look([image])[0]

    @torch.inference_mode()
    def _look(self, images: Sequence) -> "list[EncodedImage]":
        """`encode` each of several, in one pass of the vision tower."""
        looked, groups = list(images), {}  # groups: the pictures of each prompt that are new
        for i, image in enumerate(images):
            if not isinstance(image, EncodedImage):
                several = image if isinstance(image, list | tuple) else [image]
                groups[i] = [open_picture(one) for one in several]
        if groups:
            counts = [len(group) for group in groups.values()]
            pixels = self.processor.image_processor(
                [one for group in groups.values() for one in group]
            )
            features = self.model.encode_image(pixels.to(self.model.device)).split(counts)
            for (i, group), seen in zip(groups.items(), features):
                looked[i] = EncodedImage(seen, group[0].size)
        return looked

    def _lay_out(
        self, prompts: Sequence[str], images: Sequence, new: int
    ) -> tuple[torch.Tensor, ...]:
        """The ids of B prompts about B pictures, and their attention mask, `int64[B, L]` both."""
        text = self.model.config.text_config
        shape, prefixes = (self.processor.num_image_tokens, text.hidden_size), []
        for prompt, image in zip(prompts, images, strict=True):
            if isinstance(image, EncodedImage):
                if image.features.shape[1:] != shape:
                    raise ValueError(
                        "a picture was encoded by another model; encode it with this one"
                    )
                image = list(image.features)
            count = len(image) if isinstance(image, list | tuple) else 1
            prefixes.append(self.processor.encode_prefix(prompt, count))
        check_context(max(map(len, prefixes)) + new - 1, text.max_position_embeddings)
        batch = collate(prefixes, [], self.processor.tokenizer.pad_id)
        return tuple(batch[key].to(self.model.device) for key in ("input_ids", "attention_mask"))

    def _steps(
        self, images: Sequence, prompts: Sequence[str], options: dict, log_probs: list | None = None
    ) -> Iterator[torch.Tensor]:
        """Answer B prompts about B pictures (each what `encode` takes): `int64[B]`, token by token.

        All that can be wrong is found here; only the language model waits for the first step.
        """
        device = self.model.device
        config = check_options(**{"eos_token_id": self.processor.tokenizer.eos_id} | options)
        generator, seed = torch.Generator(device), options.get("seed")
        generator.seed() if seed is None else generator.manual_seed(int(seed))
        input_ids, mask = self._lay_out(prompts, images, config.max_new_tokens)
        looked = self._look(images)
        features = torch.cat([one.features.to(device) for one in looked])
        decoder = self.decoder or self.model
        return generate_steps(
            decoder, input_ids, None, mask, config, generator, features, log_probs
        )

    def __call__(self, image, prompt: str, **options) -> str:
        """Answer one prompt about one picture: the pieces of `stream`, joined."""
        return "".join(self.stream(image, prompt, **options))

    def stream(self, image, prompt: str, **options) -> Iterator[str]:
        """Answer piece by piece, as the tokens come; a piece never ends in mid-character.

        Raises:
            ValueError: an unusable picture, prompt or option; at once, not at the first piece.
        """
        steps = self._steps([image], [prompt], options)
        return text_pieces((int(token) for token in steps), self.processor.tokenizer)

    def batch(self, images: Sequence, prompts: str | Sequence[str], **options) -> list[str]:
        """Answer B prompts, or one for all, about B pictures; in float32 the same as one by one.

        Raises:
            ValueError: as in `stream`, or pictures and prompts that are not as many.
        """
        texts = [prompts] if isinstance(prompts, str) else prompts
        for what, values in (("pictures", images), ("prompts", texts)):
            if isinstance(values, str | np.ndarray) or not isinstance(values, Iterable):
                raise ValueError(f"got one {type(values).__name__}; expected a list of {what}")
        images = list(images)
        prompts = list(texts) * len(images) if isinstance(prompts, str) else list(texts)
        if len(images) != len(prompts) or not images:
            raise ValueError(
                f"got {len(images)} pictures, {len(prompts)} prompts; expected one prompt for all "
                "pictures or one each, and at least one picture"
            )
        ids = torch.stack(list(self._steps(images, prompts, options)), dim=1)
        return [self.processor.decode(row.tolist()) for row in ids]

    def detect(self, image, what: str | Sequence[str], **options) -> list[Detection]:
        """Find the things named, "cat", "cat ; dog" or ["cat", "dog"]; boxes in pixels of `image`.

        Raises:
            ValueError: as in `stream`, or nothing named.
        """
        return score_detections(*self._scored(image, task_prompt("detect", what), options))

    def _scored(self, image, prompt, options) -> tuple[list[int], list[float], Tokenizer, int, int]:
        """An answer's tokens, the logarithms of their probabilities, who spells them, the size."""
        once, log_probs = self.encode(image), []
        if len(once.features) != 1:
            raise ValueError(f"got {len(once.features)} pictures; boxes and masks are those of one")
        ids = [int(token) for token in self._steps([once], [prompt], options, log_probs)]
        return ids, [float(value) for value in log_probs], self.processor.tokenizer, *once.size

    def segment(self, image, what: str | Sequence[str], prefix=True, **options) -> list[Segment]:
        """Find the things named, with their shapes; masks as large as `image`.

        With prefix=False the model is asked the bare sentence, such as "the dog on the left".

        Raises:
            ValueError: as in `detect`, or the model came without a mask codec.
        """
        if self.codec is None:
            files = "vae-oid.npz or mask_codec.safetensors into its directory"
            raise ValueError(f"this model has no mask codec; put {files}, or set pipeline.codec")
        prompt = task_prompt("segment", what) if prefix else what
        return score_segments(*self._scored(image, prompt, options), self.codec)

    def to(self, where: torch.device | torch.dtype | str | int) -> "Pipeline":
        """Move the model to "cuda", or let it compute in `torch.bfloat16`; else a ValueError."""
        named = getattr(torch, where, None) if isinstance(where, str) else where
        if isinstance(named, torch.dtype):
            self.model.to(parse_dtype(named))
        elif not isinstance(where, torch.dtype):
            self.model.to(parse_device(where))
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Write model, processor and mask codec into a directory, which `load` opens again."""
        quantized = self.model.language_model.head is not None
        refuse_adapter(path)
        with replacing(path) as draft:  # all files at once
            (save_quantized if quantized else save_model)(self.model, draft)
            self.processor.save_pretrained(draft)
            if self.codec is not None:
                self.codec.save_pretrained(draft, torch.float32)

    def __repr__(self) -> str:
        config, dtype = self.model.config, str(self.model.dtype).removeprefix("torch.")
        kind = type(config.text_config).__name__.removesuffix("Config")
        masks = "without masks" if self.codec is None else "with masks"
        side = config.vision_config.image_size
        return f"Pipeline({kind}, {side} pixels, {masks}, {dtype} on {self.model.device})"


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """What the vision tower made of a picture (or of several, for one prompt): `Pipeline.encode`.

    Args:
        features: `float[P, N, D]`, of one model, with the weights that it had then.
        size: width and height of the (first) picture, pixels.
    """

    features: torch.Tensor
    size: tuple[int, int]


def check_options(seed: int | None = None, **options) -> GenerationConfig:
    """The options of an answer, checked.

    Raises:
        ValueError: one that does not exist, or is out of range.
    """
    known = [field.name for field in fields(GenerationConfig)]
    for name in options:
        if name not in known:
            raise ValueError(f"{name} is no option; expected one of {', '.join(known)}, seed")
    if seed is not None and not (isinstance(seed, Integral) and 0 <= seed < 2**63):
        raise ValueError(f"seed is {shorten(seed)}; expected a whole number from 0 to 2**63 - 1")
    return GenerationConfig(**options)


def task_prompt(task: str, what: str | Sequence[str]) -> str:
    """`"detect", "cat;dog"` or `["cat", "dog"]` → `"detect cat ; dog"`.

    Raises:
        ValueError: nothing is named.
    """
    listed = isinstance(what, list | tuple) and all(isinstance(name, str) for name in what)
    text = ";".join(what) if listed else what if isinstance(what, str) else ""
    names = [name.strip() for name in text.strip().removeprefix(f"{task} ").split(";")]
    names = [name for name in names if name]
    if not names or names == [task]:
        raise ValueError(f"{shorten(what)} names nothing to {task}; expected such as 'cat ; dog'")
    return f"{task} {' ; '.join(names)}"


def find_codec(folder: Path) -> MaskCodec | None:
    """The mask codec beside a model's weights: ours, or the published `vae-oid.npz`."""
    if (folder / "mask_codec.safetensors").is_file():
        return MaskCodec.from_pretrained(folder)
    published = folder / "vae-oid.npz"
    return MaskCodec.from_npz(published) if published.is_file() else None


def load(
    path: str | os.PathLike | None = None,
    device: torch.device | str | int = "cpu",
    dtype: torch.dtype | str | None = None,
    quantize: str | None = None,
    adapter: str | os.PathLike | None = None,
    compile: bool = False,
    revision: str | None = None,
    progress: bool = False,
) -> Pipeline:
    """Load a checkpoint with its processor.

    Args:
        path: a checkpoint directory, or a name on the Hugging Face hub (needs `huggingface_hub`)
            such as "google/paligemma-3b-mix-224"; None: the tiny model that ships.
        device: "cpu", "cuda", "cuda:1", 1, "mps"; "auto": an accelerator where there is one.
        dtype: to compute in, `torch.bfloat16` or "bfloat16"; None: float32 for less than 1 GB of
            weights, else the type they are stored in (quantised: always that).
        quantize: "int8" or "int4": fewer bits a weight in the language model; None: as the
            checkpoint is. What `save` wrote of a quantised model is recognised.
        adapter: a directory with a LoRA adapter, as peft saves it; one in `path` is found. `path`
            may also be an adapter alone, if the base that it names is a directory.
        compile: compile the decode step: a slow first answer, fast ones after it.
        revision: branch, tag or commit, for a hub name.
        progress: show a bar on standard error while loading.

    Raises:
        ValueError: nothing usable at `path`, or an option that this version does not know.
    """
    if quantize not in (None, "int8", "int4"):
        raise ValueError(f"quantize is {shorten(quantize)}; expected None, 'int8' or 'int4'")
    device, dtype = parse_device(device), parse_dtype(dtype)
    folder, adapter = find_adapter(TINY if path is None else find_folder(path, revision), adapter)
    processor, codec = Processor.from_pretrained(folder), find_codec(folder)
    quantized = read_quantization(folder) is not None
    if quantized and adapter is not None:
        raise ValueError(f"{folder} is quantised; load the original weights to add an adapter")
    if quantized or (quantize and adapter is None):
        model = load_quantized(folder, quantize, device=device, dtype=dtype)
    else:
        if dtype is None and sum(file.stat().st_size for file in weight_files(folder)) <= SMALL:
            dtype = torch.float32
        model = load_model(folder, device, dtype, progress)
        if adapter is not None:
            add_adapter(model, adapter)
        if quantize:
            quantize_model(model, quantize)
    return Pipeline(model, processor, codec, compile_decode(model) if compile else None)


if __name__ == "__main__" and "__file__" in globals():
    runpy.run_module("paligemma", run_name="__main__")
