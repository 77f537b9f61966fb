"""The pipeline: every kind of picture and option, one way to every answer, loading and saving."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import paligemma
from paligemma.checkpoint import load_model, save_model
from paligemma.inference import (
    TINY,
    EncodedImage,
    Pipeline,
    check_options,
    find_codec,
    load,
    task_prompt,
)
from paligemma.mask_codec import MaskCodec
from paligemma.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
SCENE = TINY.parent / "pictures" / "scene.png"
CAPTION = "a cat and two dogs"
PROMPTS = {"caption": "caption en", "count": "answer en how many dogs are there?"}


def reference() -> dict[str, torch.Tensor]:
    """What transformers answers with the shipped weights, from picture files to ids."""
    from sentencepiece import SentencePieceProcessor
    from transformers import PaliGemmaForConditionalGeneration
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    model = PaliGemmaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    pictures = SiglipImageProcessorPil.from_pretrained(TINY)
    sp = SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
    image_id, layout = model.config.image_token_id, model.config.text_config.num_image_tokens
    tensors = {}
    for name in ("scene", "scene2", "scene3"):
        with Image.open(SCENE.with_name(f"{name}.png")) as file:
            pixels = pictures(file.convert("RGB"), return_tensors="pt")["pixel_values"]
        for task, prompt in PROMPTS.items():
            words = [2, *sp.encode(prompt), *sp.encode("\n")]
            ids = torch.tensor([[image_id] * layout + words])
            out = model.generate(
                input_ids=ids,
                pixel_values=pixels,
                attention_mask=torch.ones_like(ids),
                token_type_ids=torch.zeros_like(ids),
                max_new_tokens=20,
                do_sample=False,
                eos_token_id=1,
                pad_token_id=0,
            )
            tensors[f"{name}_{task}"] = out[0, ids.shape[1] :]
    return tensors


@pytest.fixture(scope="module")
def pg():
    return load()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, sentencepiece_file):
    """A checkpoint as people have them: weights written by transformers, and a tokenizer.model."""
    from random_models import reference_config
    from transformers import PaliGemmaForConditionalGeneration

    path = tmp_path_factory.mktemp("checkpoint")
    tokenizer = Tokenizer(sentencepiece_file)
    config = reference_config()
    config.image_token_index = config.image_token_id = tokenizer.image_id
    config.text_config.vocab_size = -(-len(tokenizer) // 64) * 64
    torch.manual_seed(3)
    model = PaliGemmaForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():  # else it repeats its last word for ever
            weight.mul_(0.2 if "embed_tokens" in name else 10)
    model.save_pretrained(path)
    shutil.copy(sentencepiece_file, path / "tokenizer.model")
    return path


# ---------------------------------------------------------------- the object


@pytest.mark.parametrize(
    "image",
    [
        SCENE,
        str(SCENE),
        Image.open(SCENE).convert("RGB"),
        np.array(Image.open(SCENE).convert("RGB")),
        Image.open(SCENE).convert("RGBA"),
    ],
    ids=["Path", "str", "PIL", "array", "RGBA"],
)
def test_answers_any_kind_of_picture(pg, image):
    assert pg(image, "caption en") == CAPTION


def test_a_folder_written_by_transformers_answers_as_transformers(folder):
    from transformers import PaliGemmaForConditionalGeneration

    own = load(folder)
    model = PaliGemmaForConditionalGeneration.from_pretrained(folder).eval()
    prompt = "answer en how many cat are there"
    batch = own.processor(SCENE, prompt)
    out = model.generate(
        input_ids=batch["input_ids"],
        pixel_values=batch["pixel_values"],
        attention_mask=batch["attention_mask"],
        token_type_ids=batch["token_type_ids"],
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=1,
        pad_token_id=0,
    )
    expected = own.processor.decode(out[0, batch["input_ids"].shape[1] :])
    assert own(SCENE, prompt, max_new_tokens=16) == expected


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 4}], ids=["greedy", "drawn"])
def test_pieces_join_to_what_is_returned(pg, options):
    for prompt in ("caption en", "", "answer en 🐝 <loc0001>"):
        pieces = list(pg.stream(SCENE, prompt, **options))
        assert "".join(pieces) == pg(SCENE, prompt, **options)
        assert all(pieces)


def test_batch_equals_singles(pg):
    images = [SCENE.with_name(f"{name}.png") for name in ("scene", "scene2", "scene3", "scene")]
    prompts = ["caption en", "answer en how many bees are there?", "", "caption en"]
    assert pg.batch(images, prompts) == [pg(i, p) for i, p in zip(images, prompts)]
    assert pg.batch(tuple(images), prompts, max_new_tokens=1) == [
        pg(i, p, max_new_tokens=1) for i, p in zip(images, prompts)
    ]
    assert pg.batch(iter(images), "caption en") == [pg(image, "caption en") for image in images]


def test_a_seed_repeats_and_none_differs(pg):
    def draw(seed):
        return pg(SCENE, "caption en", temperature=3.0, seed=seed, max_new_tokens=8)

    assert draw(0) == draw(0)
    assert len({draw(seed) for seed in range(5)}) > 1
    assert len({draw(None) for _ in range(5)}) > 1
    images, prompts = [SCENE] * 2, ["caption en"] * 2
    options = {"temperature": 3.0, "seed": 1, "max_new_tokens": 8}
    drawn = [pg.batch(images, prompts, **options) for _ in range(2)]
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[0][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 0}, "top_k is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"seed": 10**400}, "seed is 1000000000000.{1,60};"),
        ({"temprature": 1}, "temprature is no option; expected one of max_new_tokens, .*, seed"),
    ],
)
def test_options_are_refused_before_the_first_piece(pg, options, message):
    with pytest.raises(ValueError, match=message):
        pg.stream(SCENE, "caption en", **options)  # not even iterated over
    with pytest.raises(ValueError, match=message):
        pg.batch([SCENE], ["caption en"], **options)
    with pytest.raises(ValueError, match=message):
        pg.detect(SCENE, "cat", **options)


def test_options_have_the_documented_defaults():
    config = check_options()
    assert (config.max_new_tokens, config.temperature, config.top_p) == (100, 0.0, 1.0)
    assert config.top_k is None


def test_options_may_be_numbers_of_numpy(pg):
    options = {"max_new_tokens": np.int64(2), "temperature": np.float32(2), "seed": np.int64(3)}
    options |= {"top_k": np.int32(5), "top_p": np.float64(0.9)}
    plain = {"max_new_tokens": 2, "temperature": 2.0, "seed": 3, "top_k": 5, "top_p": 0.9}
    assert pg(SCENE, "caption en", **options) == pg(SCENE, "caption en", **plain)


def test_an_answer_is_of_the_weights_as_they_are():
    """Whatever changes them, and without anybody being told."""
    pg = load()
    prompts = ["caption en", "answer en how many dogs are there?"]

    def whole_passes(prompt):
        batch, said = pg.processor(SCENE, prompt), []
        ids = batch["input_ids"]
        for _ in range(8):
            types = torch.zeros_like(ids)
            types[:, batch["input_ids"].shape[1] :] = 1
            with torch.no_grad():
                logits = pg.model(ids, batch["pixel_values"], token_type_ids=types).logits
            said.append(int(logits[0, -1].argmax()))
            if said[-1] == 1:
                break
            ids = torch.cat([ids, torch.tensor([[said[-1]]])], 1)
        return pg.processor.decode(said)

    def check():
        answers = [pg(SCENE, prompt, max_new_tokens=8) for prompt in prompts]
        assert answers == [whole_passes(prompt) for prompt in prompts]
        return answers

    before = check()
    weights = [w for w in pg.model.language_model.parameters() if w.ndim == 2]
    torch.manual_seed(0)
    for change in (
        lambda w: w.data.mul_(1 + torch.randn_like(w)),
        lambda w: w.data.copy_(w.data.roll(1, 0)),
        lambda w: setattr(w, "data", w.data.flip(0)),
    ):
        for weight in weights:
            change(weight)
        after = check()
        assert after != before, "the change is large enough to be seen"
        before = after
    batch = pg.processor(SCENE, "caption en", "two dogs and a cat")
    optimizer = torch.optim.AdamW(pg.model.parameters(), lr=1e-2, fused=True)
    pg.model.train()
    for _ in range(12):
        optimizer.zero_grad()
        pg.model(**batch).loss.backward()
        optimizer.step()
    pg.model.eval()
    assert check() != before


def test_it_answers_under_autocast(pg):
    once = pg.encode(SCENE)
    with torch.autocast("cpu", torch.bfloat16):
        assert pg(SCENE, "caption en") == pg(once, "caption en") == CAPTION
        assert pg.batch([SCENE, once], "caption en") == [CAPTION] * 2
    assert pg(pg.encode(SCENE), "caption en") == CAPTION


def test_a_stopped_stream_leaves_the_model_as_it_was(pg):
    pieces = pg.stream(SCENE, "caption en")
    first = next(pieces)
    pieces.close()
    assert CAPTION.startswith(first)
    assert pg(SCENE, "caption en") == CAPTION
    assert not torch.is_inference_mode_enabled()


# ---------------------------------------------------------------- boxes

BOXES = "<loc0514><loc0050><loc0788><loc0343> cat ; <loc0263><loc0406> dog"


def writes(text):
    """A model that answers with this text whatever it is asked, each token 80 % likely."""

    def steps(model, input_ids, pixel_values, mask, config, generator, features, log_probs):
        steps.ids = input_ids
        for token in [*Tokenizer(TINY / "tokenizer.model").encode(text), 1]:
            log_probs.append(torch.tensor([0.8]).log())
            yield torch.tensor([token])

    return steps


@pytest.fixture
def writes_boxes(monkeypatch):
    """Every model answers with one good box and one cut off, and finds each token 80 % likely."""

    monkeypatch.setattr("paligemma.inference.generate_steps", writes(BOXES))


def test_detect_gives_boxes_of_the_given_picture(pg, writes_boxes):
    wide = Image.new("RGB", (1023, 200))
    (detection,) = pg.detect(wide, "cat ; dog")
    assert detection.label == "cat" and detection.score == pytest.approx(0.8)
    assert detection.box == pytest.approx((50, 514 / 1023 * 200, 343, 788 / 1023 * 200))


def test_detect_reads_whatever_the_shipped_model_says(pg):
    for detection in pg.detect(SCENE, "cat ; dog"):
        x0, y0, x1, y1 = detection.box
        assert 0 <= x0 < x1 <= 448 and 0 <= y0 < y1 <= 448 and 0 <= detection.score <= 1


@pytest.mark.parametrize(
    ("what", "prompt"),
    [
        ("cat", "detect cat"),
        ("cat;dog ;", "detect cat ; dog"),
        (" detect cat ; dog", "detect cat ; dog"),
        (["cat", "dog"], "detect cat ; dog"),
        (("cat",), "detect cat"),
    ],
)
def test_names_are_laid_out_as_in_training(what, prompt):
    assert task_prompt("detect", what) == prompt


@pytest.mark.parametrize("what", ["", " ; ", "detect", "detect ", None, [], ["", " "], [1], 3])
def test_nothing_named_is_refused(pg, what):
    with pytest.raises(ValueError, match="names nothing to detect"):
        pg.detect(SCENE, what)


# ---------------------------------------------------------------- masks

MASKS = (
    "<loc0000><loc0000><loc1023><loc0511>" + "".join(f"<seg{i:03d}>" for i in range(16)) + " cat"
    " ; <loc0000><loc0000><loc1023><loc0511><seg001> dog"
)


class HalfCodec(MaskCodec):
    """Draws the left half of every box."""

    def decode(self, codes):
        drawn = torch.full((len(codes), 64, 64), -1.0)
        drawn[..., :32] = 1
        return drawn


@pytest.fixture
def writes_masks(monkeypatch):
    monkeypatch.setattr("paligemma.inference.generate_steps", writes(MASKS))


@pytest.fixture
def halves(pg):
    return Pipeline(pg.model, pg.processor, HalfCodec(width=8, code_width=8))


def test_segment_gives_masks_of_the_given_picture(halves, writes_masks):
    (segment,) = halves.segment(Image.new("RGB", (1023, 200)), "cat")
    assert segment.label == "cat" and segment.score == pytest.approx(0.8)
    assert segment.box == pytest.approx((0, 0, 511, 200))
    assert segment.mask.shape == (200, 1023)
    assert segment.mask[:, :255].all() and not segment.mask[:, 257:].any()


def test_segment_needs_a_codec(pg):
    with pytest.raises(ValueError, match=r"no mask codec; put vae-oid\.npz"):
        Pipeline(pg.model, pg.processor).segment(SCENE, "cat")


def test_a_codec_beside_the_weights_is_found(tmp_path):
    assert find_codec(tmp_path) is None
    MaskCodec(width=8, code_width=8).save_pretrained(tmp_path)
    assert isinstance(find_codec(tmp_path), MaskCodec)


def test_a_bare_sentence_is_asked_as_it_is(halves, monkeypatch):
    """As the published ft-refcoco-seg models want it, which answer without a label."""
    answer = writes(MASKS.split(" cat")[0])
    monkeypatch.setattr("paligemma.inference.generate_steps", answer)
    (segment,) = halves.segment(SCENE, "the cat on the left", prefix=False)
    assert segment.label == "" and segment.mask[:, :100].all()
    asked = halves.processor.decode(answer.ids[0])
    assert asked == "the cat on the left\n"
    halves.segment(SCENE, "the cat on the left")
    assert halves.processor.decode(answer.ids[0]) == "segment the cat on the left\n"


def test_boxes_are_those_of_one_picture(pg):
    with pytest.raises(ValueError, match="got 2 pictures; boxes and masks are those of one"):
        pg.detect([SCENE, SCENE], "cat")


# ---------------------------------------------------------------- fewer bits


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_weights_answer_and_come_back(pg, tmp_path, mode):
    small = load(quantize=mode)
    assert small.model.dtype == torch.bfloat16
    assert small(SCENE, "caption en") == pg(SCENE, "caption en")
    small.save(tmp_path)
    again = load(tmp_path)
    assert again(SCENE, "caption en") == pg(SCENE, "caption en")
    assert again.model.language_model.head is not None
    with pytest.raises(ValueError, match=f"was quantised with mode '{mode}'"):
        load(tmp_path, quantize="int8" if mode == "int4" else "int4")
    with pytest.raises(
        ValueError, match="is quantised; load the original weights to add an adapter"
    ):
        load(tmp_path, adapter=adapter_folder(tmp_path / "adapter"))


# ---------------------------------------------------------------- a picture looked at once


def test_an_encoded_picture_gives_the_same_answers(pg):
    once, prompts = pg.encode(SCENE), list(PROMPTS.values())
    looked = []
    hook = pg.model.vision_tower.register_forward_hook(lambda *_: looked.append(1))
    answers = [pg(once, prompt) for prompt in prompts]
    together = pg.batch([once, once], prompts)
    found = pg.detect(once, "cat")
    assert not looked
    assert pg.batch([once, SCENE, SCENE.with_name("scene2.png")], "caption en")
    assert len(looked) == 1, "what is new passes the tower together"
    hook.remove()
    assert answers == [pg(SCENE, prompt) for prompt in prompts] == together
    assert [d.box for d in found] == [d.box for d in pg.detect(SCENE, "cat")]
    mixed = pg.batch([once, SCENE.with_name("scene2.png")], prompts)
    assert mixed == [pg(SCENE, prompts[0]), pg(SCENE.with_name("scene2.png"), prompts[1])]
    assert pg.encode(once) is once


def test_a_picture_encoded_by_another_model_is_refused(pg, folder):
    other = load(folder).encode(SCENE)
    for wrong in (other, EncodedImage(pg.encode(SCENE).features[..., :64], (448, 448))):
        with pytest.raises(ValueError, match="encoded by another model"):
            pg(wrong, "caption en")


def test_several_pictures_in_one_prompt(folder):
    """Encoded or not, one by one or in a batch; the tokens are those of transformers."""
    from transformers import PaliGemmaForConditionalGeneration

    own = load(folder)
    model = PaliGemmaForConditionalGeneration.from_pretrained(folder).eval()
    pair = [SCENE, SCENE.with_name("scene2.png")]
    prompt = "answer en how many cat are there"
    batch = own.processor([pair], prompt)
    out = model.generate(
        input_ids=batch["input_ids"],
        pixel_values=batch["pixel_values"],
        attention_mask=batch["attention_mask"],
        token_type_ids=batch["token_type_ids"],
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=1,
        pad_token_id=0,
    )
    expected = own.processor.decode(out[0, batch["input_ids"].shape[1] :])
    options = {"max_new_tokens": 12}
    assert own(pair, prompt, **options) == expected
    assert own(tuple(pair), prompt, **options) == expected
    assert own(own.encode(pair), prompt, **options) == expected
    assert own(pair[::-1], prompt, **options) != expected, "the order is seen"
    mixed = own.batch([pair, SCENE, own.encode(pair)], prompt, **options)
    assert mixed == [expected, own(SCENE, prompt, **options), expected]
    assert own.encode(pair).features.shape[0] == 2


# ---------------------------------------------------------------- loading


def test_small_checkpoints_compute_in_float32_large_as_stored(tmp_path, monkeypatch):
    stored = load_model(TINY, dtype=None).dtype
    assert stored == torch.bfloat16
    assert load().model.dtype == torch.float32
    assert load(dtype=torch.float16).model.dtype == torch.float16
    size = (TINY / "model.safetensors").stat().st_size
    for limit, dtype in ((size, torch.float32), (size - 1, stored)):
        monkeypatch.setattr("paligemma.inference.SMALL", limit)
        assert load().model.dtype == dtype


def test_loads_what_save_model_writes(tmp_path, pg):
    save_model(pg.model, tmp_path)
    for name in ("tokenizer.model", "preprocessor_config.json"):
        shutil.copy(TINY / name, tmp_path)
    assert load(tmp_path)(SCENE, "caption en") == CAPTION
    assert load(str(tmp_path))(SCENE, "caption en") == CAPTION


def test_a_loaded_model_is_in_evaluation_mode(pg):
    assert not any(module.training for module in pg.model.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantize": "int2"}, "expected None, 'int8' or 'int4'"),
        ({"dtype": "float17"}, "dtype is 'float17'; expected torch.float32"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
        ({"path": "no/such/folder"}, "no directory 'no/such/folder'"),
        ({"path": "weights.bin"}, "no directory 'weights.bin'"),
        ({"path": ROOT / "tests"}, "no config.json"),
        ({"path": "https://example.org/model"}, "download it first"),
        ({"device": "gpu"}, "device is 'gpu'; expected 'auto' or one of this machine's"),
        ({"device": "meta"}, "device is 'meta'"),
        ({"adapter": "no/adapter/here"}, "no directory 'no/adapter/here'"),
        ({"adapter": TINY}, "no adapter_config.json"),
    ],
)
def test_loading_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        load(**arguments)


def test_a_hub_name_is_fetched(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def download(name, revision, allow_patterns):
        asked[name] = revision, allow_patterns
        return str(TINY)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    own = load("some-owner/some.model-3b", revision="bfloat16")
    assert own(SCENE, "caption en") == CAPTION
    revision, patterns = asked.pop("some-owner/some.model-3b")
    assert revision == "bfloat16" and {"*.json", "*.safetensors", "tokenizer.model"} < set(patterns)


def test_a_folder_wins_over_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, "owner/name")
    assert load("owner/name")(SCENE, "caption en") == CAPTION


def test_homes_devices_and_types_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(TINY, tmp_path / "tiny")
    own = load("~/tiny", device="auto", dtype="bfloat16")
    assert own.model.dtype == torch.bfloat16


def test_without_the_hub_or_its_package_the_message_says_so(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def fail(*_, **__):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=r"owner/name is no directory, and the hub .*: no network"):
        load("owner/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        load("owner/name")


def test_the_package_itself_offers_load():
    assert paligemma.load is load and paligemma.Pipeline is Pipeline
    assert {"load", "Pipeline", "__version__"} <= set(dir(paligemma))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = paligemma.lode


# ---------------------------------------------------------------- saving, moving


def test_what_is_saved_loads_again_and_answers_the_same(pg, tmp_path):
    pg.save(tmp_path / "new" / "folder")
    again = load(tmp_path / "new" / "folder")
    for prompt in PROMPTS.values():
        assert again(SCENE, prompt) == pg(SCENE, prompt)
    ours, theirs = pg.segment(SCENE, "cat ; dog"), again.segment(SCENE, "cat ; dog")
    assert [s.label for s in ours] == [s.label for s in theirs]
    assert all((a.mask == b.mask).all() for a, b in zip(ours, theirs))
    again.save(tmp_path / "new" / "folder")  # over itself, mapped as it is
    assert load(tmp_path / "new" / "folder")(SCENE, "caption en") == CAPTION


def test_what_is_saved_is_read_by_transformers(folder, tmp_path):
    from transformers import PaliGemmaForConditionalGeneration

    load(folder).save(tmp_path)
    theirs = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)
    original = PaliGemmaForConditionalGeneration.from_pretrained(folder)
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


def test_to_moves_and_converts(pg):
    own = load()
    assert own.to(torch.bfloat16) is own and own.model.dtype == torch.bfloat16
    assert own(SCENE, "caption en") == CAPTION
    assert own.to("float32").to("cpu")(SCENE, "caption en") == CAPTION
    assert own.model.dtype == torch.float32
    for wrong in ("gpu", "int8", torch.int8, None, "cuda:99"):
        with pytest.raises(ValueError, match="expected"):
            own.to(wrong)


def test_its_repr_says_what_it_is(pg):
    assert repr(pg) == "Pipeline(Gemma, 112 pixels, with masks, float32 on cpu)"
    assert "without masks" in repr(Pipeline(pg.model, pg.processor))


# ---------------------------------------------------------------- adapters


def adapter_folder(path, base=None):
    """A trained adapter for the shipped model, as `save_adapter` writes it."""
    from paligemma import lora

    model = load_model(TINY)
    lora.add_lora(model, rank=4)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    lora.save_adapter(model, path)
    config = json.loads((path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None if base is None else str(base)
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("where", ["beside", "argument", "alone"])
def test_an_adapter_is_applied(pg, tmp_path, where):
    from paligemma import lora

    adapter = adapter_folder(tmp_path / "adapter", base=TINY)
    model = load_model(TINY)
    lora.load_adapter(model, adapter)
    batch = pg.processor(SCENE, "caption en")
    with torch.no_grad():
        expected = model(batch["input_ids"], batch["pixel_values"]).logits
    if where == "beside":
        shutil.copytree(TINY, tmp_path / "both")
        shutil.copytree(adapter, tmp_path / "both", dirs_exist_ok=True)
        own = load(tmp_path / "both")
    else:
        own = load(adapter=adapter) if where == "argument" else load(adapter)
    with torch.no_grad():
        logits = own.model(batch["input_ids"], batch["pixel_values"]).logits
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert not any("lora" in name for name, _ in own.model.named_parameters())
    own.save(tmp_path / "whole")
    with torch.no_grad():
        again = load(tmp_path / "whole").model(batch["input_ids"], batch["pixel_values"]).logits
    assert torch.equal(again, logits)


def test_a_model_is_not_saved_beside_the_adapter_that_it_holds(tmp_path):
    shutil.copytree(TINY, tmp_path / "both")
    shutil.copytree(adapter_folder(tmp_path / "adapter"), tmp_path / "both", dirs_exist_ok=True)
    pg = load(tmp_path / "both")
    before = {file.name: file.read_bytes() for file in (tmp_path / "both").iterdir()}
    with pytest.raises(ValueError, match=r"would be added once more .* give another directory"):
        pg.save(tmp_path / "both")
    assert {file.name: file.read_bytes() for file in (tmp_path / "both").iterdir()} == before
    pg.save(tmp_path / "whole")
    again = load(tmp_path / "whole").model.state_dict()
    assert all(torch.equal(again[name], value) for name, value in pg.model.state_dict().items())


def test_an_adapter_and_fewer_bits(tmp_path):
    adapter = adapter_folder(tmp_path / "adapter")
    small = load(adapter=adapter, quantize="int8")
    assert small.model.language_model.head is not None
    full = load(adapter=adapter, dtype="bfloat16")
    assert small(SCENE, "caption en") == full(SCENE, "caption en")


def test_an_adapter_without_its_base_says_how(tmp_path):
    for base, message in ((None, "is not named in it"), ("google/x", "'google/x' is no directory")):
        path = adapter_folder(tmp_path / str(base).replace("/", "-"), base)
        with pytest.raises(ValueError, match=f"adapter alone, .*{message}.*; load the base with"):
            load(path)
    with pytest.raises(ValueError, match="holds an adapter itself"):
        load(path, adapter=path)


# ---------------------------------------------------------------- refusals of the first version

REFUSED = {
    "an option that does not exist": (
        lambda pg: pg(SCENE, "caption en", temprature=1),
        "temprature",
    ),
    "tokens": (lambda pg: pg(SCENE, "caption en", max_new_tokens=0), "max_new_tokens is 0"),
    "many tokens": (lambda pg: pg(SCENE, "caption en", max_new_tokens=10**7), "this model reads"),
    "a megabyte": (lambda pg: pg(SCENE, "a" * 1_000_000), "the text has 1000000 characters"),
    "a long prompt": (lambda pg: pg(SCENE, "a " * 9000), "tokens; the model reads 8126"),
    "temperature": (lambda pg: pg(SCENE, "caption en", temperature=-1), "temperature is -1"),
    "top_p": (lambda pg: pg(SCENE, "caption en", top_p=0), "top_p is 0"),
    "top_k": (lambda pg: pg(SCENE, "caption en", top_k=-2), "top_k is -2"),
    "seed": (lambda pg: pg(SCENE, "caption en", seed="x"), "seed is 'x'; expected a whole number"),
    "no picture": (lambda pg: pg("nowhere.png", "caption en"), "nowhere.png does not exist"),
    "a number for a picture": (lambda pg: pg(3, "caption en"), "got int; expected a path"),
    "float pixels": (lambda pg: pg(np.zeros((4, 4, 3)), "caption en"), "expected uint8"),
    "control token": (lambda pg: pg(SCENE, "<image>caption en"), "'<image>'"),
    "no text": (lambda pg: pg(SCENE, None), "text is NoneType; expected a string"),
    "unequal": (lambda pg: pg.batch([SCENE, SCENE], ["caption en"]), "2 pictures, 1 prompts"),
    "nothing": (lambda pg: pg.batch([], []), "0 pictures, 0 prompts"),
    "one path": (lambda pg: pg.batch(SCENE, ["caption en"]), "expected a list of pictures"),
    "one name": (lambda pg: pg.batch(str(SCENE), "caption en"), "expected a list of pictures"),
    "no list": (lambda pg: pg.batch([SCENE], None), "expected a list of prompts"),
    "no strings": (lambda pg: pg.batch([SCENE], [3]), "expected a string"),
    "nothing to detect": (lambda pg: pg.detect(SCENE, ""), "names nothing to detect"),
    "nothing to segment": (lambda pg: pg.segment(SCENE, ";"), "names nothing to segment"),
    "no codec": (
        lambda pg: Pipeline(pg.model, pg.processor).segment(SCENE, "cat"),
        r"no mask codec; put vae-oid\.npz or mask_codec\.safetensors .* set pipeline\.codec",
    ),
    "bits": (
        lambda _: load(quantize="int2"),
        "quantize is 'int2'; expected None, 'int8' or 'int4'",
    ),
    "type": (lambda _: load(dtype=torch.int8), "dtype is torch.int8"),
    "no folder": (lambda _: load("no/such/folder"), "no directory 'no/such/folder'"),
    "not a checkpoint": (lambda _: load(ROOT / "tests"), "no config.json"),
    "no name": (lambda _: paligemma.lode, "no attribute 'lode'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_first_version_refused_is_refused(pg, case):
    call, message = REFUSED[case]
    kind = AttributeError if case == "no name" else ValueError
    with pytest.raises(kind, match=message) as caught:
        call(pg)
    assert "\n" not in str(caught.value)


def test_what_is_too_long_is_refused_before_any_work(pg, monkeypatch):
    """At the very edge of the context it answers; one token more, and nothing is even looked at."""
    prompt = pg.processor.encode_prefix("caption en")
    room = pg.model.config.text_config.max_position_embeddings - len(prompt) + 1
    assert pg(SCENE, "caption en", max_new_tokens=room) == CAPTION

    def refuse(*_, **__):
        raise AssertionError("it began to work")

    monkeypatch.setattr(pg.model.vision_tower, "forward", refuse)
    monkeypatch.setattr(pg.model, "make_cache", refuse)
    for ask in (pg, pg.stream, lambda image, text, **how: pg.batch([image], text, **how)):
        with pytest.raises(ValueError, match="1 fewer: lower max_new_tokens"):
            ask(SCENE, "caption en", max_new_tokens=room + 1)
    monkeypatch.setattr(pg.processor.tokenizer, "encode", refuse)
    with pytest.raises(ValueError, match="characters; the model reads 8126 tokens"):
        pg(SCENE, "cat " * 250_000)
    with pytest.raises(ValueError, match="the model reads 0"):
        pg([SCENE] * 200, "caption en")
