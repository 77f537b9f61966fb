"""COCO to JSON lines: boxes and masks come back, masks are pycocotools', mistakes have a place."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from pycocotools import mask as coco_mask

from paligemma import scenes
from paligemma.detection import box_iou, parse_detections
from paligemma.inference import TINY
from paligemma.mask_codec import MaskCodec, mask_iou
from paligemma.segmentation import parse_segments
from paligemma.support.coco import decompress, draw_mask
from paligemma.support.coco_command import main
from paligemma.training import JsonlDataset

W, H = 200, 120
SQUARE = [[20, 30, 60, 30, 60, 70, 20, 70]]


def coco(**changes) -> dict:
    """Two pictures, three kinds, three objects in the first and none in the second."""
    tables = {
        "images": [
            {"id": 7, "file_name": "a.png", "width": W, "height": H},
            {"id": 8, "file_name": "b.png", "width": W, "height": H},
        ],
        "categories": [
            {"id": 0, "name": "things"},  # as Roboflow writes it: nothing is one
            {"id": 3, "name": "fire  hydrant"},
            {"id": 1, "name": "cat"},
        ],
        "annotations": [
            {"image_id": 7, "category_id": 1, "bbox": [120, 8, 50.5, 40], "iscrowd": 0},
            {"image_id": 7, "category_id": 3, "bbox": [20, 30, 40, 40], "segmentation": SQUARE},
            {"image_id": 7, "category_id": 1, "bbox": [2, 3, 30, 90]},
        ],
    }
    return tables | changes


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (W, H)).save(tmp_path / name)
    return tmp_path


def convert(capsys, folder, tables, *options):
    """Exit code, standard output and standard error of the command."""
    file = folder / "mine.json"
    file.write_text(tables if isinstance(tables, str) else json.dumps(tables))
    try:
        code = main([str(file), *map(str, options)])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


# ---------------------------------------------------------------- there and back


def test_boxes_come_back(capsys, folder):
    code, out, err = convert(capsys, folder, coco())
    assert (code, err) == (0, "") and out == f"2 examples in {folder / 'mine.jsonl'}\n"
    full, empty = JsonlDataset(folder)
    assert full["prefix"] == empty["prefix"] == "detect fire hydrant ; cat"
    assert full["image"].endswith("a.png") and empty["suffix"] == ""
    found = parse_detections(full["suffix"], W, H)
    assert [d.label for d in found] == ["fire hydrant", "cat", "cat"], "as asked, left to right"
    expected = [(20, 30, 60, 70), (2, 3, 32, 93), (120, 8, 170.5, 48)]
    gaps = np.abs(np.subtract([d.box for d in found], expected)) / [W, H, W, H]
    assert gaps.max() <= 1 / 1024


def test_prompts_that_name_what_is_there(capsys, folder):
    code, out, err = convert(capsys, folder, coco(), "--names", "present")
    assert (code, out[:9], err) == (0, "1 example", "left out: 1 pictures without objects\n")


def test_masks_come_back(capsys, folder):
    """The shipped codec draws emoji's shapes: those of two scenes, given as COCO has them."""
    made = [scenes.make_scene(i, "test", objects=(2, 3)) for i in range(2)]
    tables = coco(images=[], annotations=[], categories=[])
    tables["categories"] = [{"id": i, "name": name} for i, name in enumerate(scenes.NAMES)]
    for i, scene in enumerate(made):
        Image.fromarray(scene.image).save(folder / f"{i}.png")
        row = {"id": i, "file_name": f"{i}.png", "width": scenes.SIZE, "height": scenes.SIZE}
        tables["images"].append(row)
        for kind, (x0, y0, x1, y1), mask in zip(scene.kinds, scene.boxes.tolist(), scene.masks):
            rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            rle["counts"] = rle["counts"].decode()
            row = {"image_id": i, "category_id": kind, "segmentation": rle}
            tables["annotations"].append(row | {"bbox": [x0, y0, x1 - x0, y1 - y0]})
    code, _, err = convert(capsys, folder, tables, "--task", "segment")
    assert (code, err) == (0, "")
    codec = MaskCodec.from_pretrained(TINY)
    for item, scene in zip(JsonlDataset(folder), made, strict=True):
        assert item["prefix"].startswith("segment ")
        found = parse_segments(item["suffix"], scenes.SIZE, scenes.SIZE, codec)
        assert sorted(s.label for s in found) == sorted(scenes.NAMES[k] for k in scene.kinds)
        best = box_iou([s.box for s in found], scene.boxes).argmax(1).tolist()
        ious = [mask_iou(s.mask, scene.masks[j]) for s, j in zip(found, best)]
        assert min(ious) > 0.6, ious


def test_pictures_elsewhere_and_an_output(capsys, folder):
    (folder / "deep").mkdir()
    output = folder / "deep" / "out.jsonl"
    assert convert(capsys, folder, coco(), "--output", output, "--pictures", folder)[0] == 0
    assert len(JsonlDataset(output)) == 2
    assert json.loads(output.read_text().split("\n")[0])["image"] == "../a.png"


def test_what_is_left_out_is_said(capsys, folder):
    more = [
        {"image_id": 8, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        {"image_id": 8, "category_id": 1, "bbox": [50, 50, 0, 9]},
        {"image_id": 8, "category_id": 1, "bbox": [W + 5, 0, 9, 9]},
    ]
    tables = coco(annotations=coco()["annotations"] + more)
    code, _, err = convert(capsys, folder, tables)
    assert (code, err) == (0, "left out: 1 crowds, 2 boxes without inside\n")
    assert JsonlDataset(folder)[1]["suffix"] == ""


# ---------------------------------------------------------------- masks


@settings(max_examples=60, deadline=None)
@given(arrays.arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40))))
def test_run_lengths_are_those_of_pycocotools(mask):
    height, width = mask.shape
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    text = rle["counts"].decode()
    assert (draw_mask({"size": [height, width], "counts": text}, width, height) == mask).all()
    plain = {"size": [height, width], "counts": decompress(text)}
    assert (draw_mask(plain, width, height) == mask).all()


def test_long_runs_and_steps_back():
    mask = np.zeros((3000, 700), bool)
    mask[5:2000, 3:600] = mask[7, 650] = True
    text = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    assert (draw_mask({"size": [3000, 700], "counts": text}, 700, 3000) == mask).all()


@pytest.mark.parametrize("parts", [1, 2])
def test_polygons_are_nearly_those_of_pycocotools(parts):
    """Pillow and pycocotools differ in pixels that a line cuts, and nowhere else."""
    rng, angles = np.random.default_rng(parts), np.linspace(0, 2 * np.pi, 12, endpoint=False)
    polygons = []
    for part in range(parts):
        radius = rng.uniform(15, 45, len(angles))
        x, y = 60 + 70 * part + radius * np.cos(angles), 60 + radius * np.sin(angles)
        polygons.append(np.stack([x, y], 1).flatten().tolist())
    theirs = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, H, W))).astype(bool)
    assert mask_iou(draw_mask(polygons, W, H), theirs) > 0.95


def test_a_whole_pixel_is_a_pixel():
    expected = np.zeros((H, W), bool)
    expected[30:70, 20:60] = True
    assert mask_iou(draw_mask(SQUARE, W, H), expected) > 0.95


# ---------------------------------------------------------------- mistakes


def row(table, number=0, **changes):
    tables = coco()
    tables[table][number] = {**tables[table][number], **changes}
    return tables


NO_BOX = coco(annotations=[{"image_id": 7, "category_id": 1}])
BROKEN = {
    "no JSON": ("{", "mine.json is not JSON"),
    "a list": ("[]", "expected a JSON object"),
    "no table": ({"images": []}, "has no list categories; expected annotations as COCO"),
    "no row": (coco(images=[5]), "images[0] is 5; expected an object"),
    "no width": (row("images", width=None), "images[0]: width is None; expected a number of"),
    "width": (row("images", width=0), "images[0]: width is 0; expected a number of pixels"),
    "file": (row("images", file_name=3), "images[0]: file_name is 3; expected a text"),
    "id": (row("categories", id=[1]), "categories[0]: id is [1]; expected an id"),
    "name": (row("categories", 2, name="a;b"), "categories[2]: the name is 'a;b'; rename it"),
    "no name": (row("categories", 2, name=" "), "the name is ''; rename it"),
    "picture": (row("annotations", image_id=9), "annotations[0] has image_id 9, an id that"),
    "kind": (row("annotations", 1, category_id="x"), "annotations[1] has category_id 'x', an id"),
    "no box": (NO_BOX, "annotations[0]: bbox is None; expected 4 finite numbers"),
    "NaN": (row("annotations", bbox=[0, 0, float("nan"), 1]), "expected 4 finite numbers"),
    "digits": (row("annotations", bbox=[0, 0, 10**400, 1]), "expected 4 finite numbers"),
    "three": (row("annotations", bbox=[0, 0, 1]), "expected 4 finite numbers"),
    "negative": (row("annotations", bbox=[9, 9, -5, 5]), "expected x, y, width, height"),
    "empty": (coco(annotations=[]), "holds no object that can be learned"),
    "no picture": (row("images", file_name="c.png"), "c.png: no such file"),
    "size": (row("images", height=W, width=H), "a.png is 200 × 120 pixels, seen upright; the"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_mistakes_are_one_line_and_exit_2(capsys, folder, case):
    tables, message = BROKEN[case]
    code, out, err = convert(capsys, folder, tables)
    assert (code, out) == (2, "") and err.count("\n") == 1 and len(err) < 500
    assert err.startswith("paligemma-coco: error: ") and message in err
    assert not (folder / "mine.jsonl").exists()


SEGMENTATIONS = {
    "none": (None, "a.png: segmentation is None; expected polygons or a mask"),
    "no list": ([], "segmentation is []"),
    "two corners": ([[1, 2, 3, 4]], "expected x, y of three corners or more"),
    "odd": ([[1, 2, 3, 4, 5, 6, 7]], "expected x, y of three corners or more"),
    "no numbers": ([["a"] * 6], "a polygon is ['a', 'a', 'a', 'a', 'a', 'a']; expected finite"),
    "size": ({"size": [W, H], "counts": [W * H]}, "do not fill [120, 200]"),
    "short": ({"size": [H, W], "counts": [5]}, "do not fill [120, 200]"),
    "negative": ({"size": [H, W], "counts": [-5, W * H + 5]}, "do not fill [120, 200]"),
    "characters": ({"size": [H, W], "counts": "~é"}, "compressed run lengths hold '~'"),
    "end": ({"size": [H, W], "counts": "P"}, "compressed run lengths end in mid-number"),
    "long": ({"size": [H, W], "counts": "o" * 10**6}, "compressed run lengths hold 'o'"),
}


@pytest.mark.parametrize("case", SEGMENTATIONS)
def test_segmentations_that_are_none(capsys, folder, case):
    segmentation, message = SEGMENTATIONS[case]
    tables = row("annotations", 1, segmentation=segmentation)
    tables["annotations"] = tables["annotations"][1:2]
    code, out, err = convert(capsys, folder, tables, "--task", "segment")
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err


def test_far_corners_do_no_harm():
    far = draw_mask([[-1e12, 30, 1e12, 30, 1e12, 70, -1e12, 70]], W, H)
    assert far[35:65].all() and not far[:25].any() and not far[75:].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "x.txt"], "--output is x.txt; expected a file *.jsonl"),
        (["--task", "caption"], "invalid choice"),
        (["--task", "segment", "--model_path", "nowhere"], "no directory 'nowhere'"),
        (["--pictures", "nowhere"], "nowhere/a.png: no such file"),
    ],
)
def test_options(capsys, folder, options, message):
    code, _, err = convert(capsys, folder, coco(), *options)
    assert code == 2 and err.count("\n") == 1 and message in err


def test_a_picture_that_is_turned_when_seen(capsys, folder):
    """A camera's picture stored on its side: its annotations are those of the upright one."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (H, W)).save(folder / "a.png", exif=exif)
    assert convert(capsys, folder, coco())[0] == 0
    Image.new("RGB", (W, H)).save(folder / "a.png", exif=exif)
    code, _, err = convert(capsys, folder, coco())
    assert code == 2 and "a.png is 120 × 200 pixels, seen upright" in err
