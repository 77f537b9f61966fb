"""Lesson 25: the scenes are what they say, the same everywhere, and apart between splits."""

import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from paligemma import scenes
from paligemma.detection import encode_boxes
from paligemma.scenes import LANGUAGES, NAMES, PLURALS, SIZE, SPLITS, TASKS, SceneDataset
from paligemma.support import backgrounds
from paligemma.support.sprites import ANGLES

TASK_NAMES = (*TASKS, "segment")


def digest(image, *texts):
    return hashlib.sha256(np.asarray(image).tobytes() + repr(texts).encode()).hexdigest()


def everything(item):
    scene = item["scene"]
    truth = (item["prefix"], item["suffix"], item["task"], scene.kinds)
    return digest(item["image"], *truth, scene.boxes.tolist(), scene.owner.tobytes())


# ---------------------------------------------------------------- always the same


def test_any_number_of_workers_makes_the_same_items():
    data = SceneDataset(48, tasks=TASK_NAMES)
    made = [
        [everything(item) for item in DataLoader(data, batch_size=None, num_workers=workers)]
        for workers in (0, 1, 2)
    ]
    assert made[0] == made[1] == made[2]
    assert made[0] == [everything(data[i]) for i in range(48)], "a second epoch is the same"
    assert made[0][::-1] == [everything(data[i]) for i in reversed(range(48))], "in any order"
    assert len(set(made[0])) == 48


def test_every_argument_counts():
    same = {digest(scenes.make_scene(7, "test").image) for _ in range(3)}
    others = [
        scenes.make_scene(8, "test"),
        scenes.make_scene(7, "validation"),
        scenes.make_scene(7, "test", seed=1),
        scenes.make_scene(7, "test", unseen=True),
        scenes.make_scene(7, "test", objects=(5,)),
    ]
    assert len(same) == 1 and len(same | {digest(s.image) for s in others}) == 6


def test_the_world_is_the_one_that_the_tiny_model_was_trained_in():
    """What is drawn, in the order of training (pixels may differ with Pillow's fonts)."""
    found = hashlib.sha256()
    for index, split in itertools.product(range(10), SPLITS):
        scene = scenes.make_scene(index, split, seed=1, unseen=split == "test")
        texts = [scenes.task(np.random.default_rng(index), scene, name) for name in TASKS]
        found.update(repr((scene.kinds, scene.boxes.tolist(), texts)).encode())
        rng = np.random.default_rng(index)
        scenes.background(rng)
        found.update(repr(int(rng.integers(1 << 30))).encode())  # how often it drew
    assert found.hexdigest() == "35750834768ec511add9825875816a62bc6416a72dd7b11d5c14681f6132ccd0"


def test_making_a_scene_leaves_global_randomness_and_sprites_alone():
    np.random.seed(0)
    first, table = np.random.random(), digest(scenes.sprites()[0][3][2][0][0])
    np.random.seed(0)
    scene = scenes.make_scene(3)
    assert np.random.random() == first
    scene.image[:] = 0  # a user may draw into the picture
    again = [scenes.make_scene(i).image for i in range(40)]
    assert digest(scenes.sprites()[0][3][2][0][0]) == table
    photos = [digest(photo) for photo in backgrounds.photographs()]
    for image in again:
        image[:] = 0
    assert [digest(photo) for photo in backgrounds.photographs()] == photos


def test_what_is_asked_does_not_change_the_picture():
    for tasks in (("count",), ("where",), TASKS):
        data = SceneDataset(20, tasks=tasks)
        for i in range(20):
            assert np.array_equal(data[i]["image"], scenes.make_scene(i).image)


# ---------------------------------------------------------------- the splits


def test_splits_share_no_picture():
    made = {
        (split, unseen): {digest(scenes.make_scene(i, split, unseen=unseen).image)
                          for i in range(200)}
        for split, unseen in (*((s, False) for s in SPLITS), ("test", True))
    }  # fmt: skip
    assert all(len(found) == 200 for found in made.values()), "scenes repeat within a split"
    for a, b in itertools.combinations(made.values(), 2):
        assert not a & b, "a picture stands in two splits"


def test_a_tenth_of_the_pairs_is_held_out_and_every_kind_keeps_partners():
    assert len(scenes.HELD_OUT) == round(0.1 * len(NAMES) * (len(NAMES) - 1) / 2)
    assert all(i < j for i, j in scenes.HELD_OUT)
    missing = Counter(kind for pair in scenes.HELD_OUT for kind in pair)
    assert max(missing.values()) <= 15
    a, b = min(scenes.HELD_OUT)
    assert scenes.has_unseen_pair([b, a]) and scenes.has_unseen_pair([a, 47, b, a])
    assert not scenes.has_unseen_pair([a, a]) and not scenes.has_unseen_pair([])


@pytest.mark.parametrize("split", SPLITS)
def test_held_out_pairs_never_stand_together(split):
    for i in range(400):
        kinds = sorted(set(scenes.make_scene(i, split).kinds))
        assert not set(itertools.combinations(kinds, 2)) & scenes.HELD_OUT, (split, i)


def test_drawn_kinds_are_what_was_asked_for():
    rng, seen, different = np.random.default_rng(5), set(), Counter()
    for count in (1, 2, 3, 4, 5) * 400:
        kinds = scenes.draw_kinds(rng, count)
        assert len(kinds) == count
        assert not set(itertools.combinations(sorted(set(kinds)), 2)) & scenes.HELD_OUT
        seen |= set(kinds)
        different[len(set(kinds))] += 1
    assert seen == set(range(len(NAMES))), "every kind appears"
    assert set(different) == {1, 2, 3}


def test_unseen_scenes_always_hold_an_unseen_pair():
    pairs = set()
    for i in range(200):
        kinds = sorted(set(scenes.make_scene(i, "test", unseen=True, objects=(1, 2, 4)).kinds))
        held = set(itertools.combinations(kinds, 2)) & scenes.HELD_OUT
        assert held
        pairs |= held
    assert len(pairs) > 60, "many different ones"


# ---------------------------------------------------------------- true by construction


@pytest.fixture(scope="module")
def made():
    return [scenes.make_scene(i, "validation") for i in range(400)]


def test_boxes_masks_and_owner_agree(made):
    for scene in made:
        count = len(scene.kinds)
        assert scene.image.shape == (SIZE, SIZE, 3) and scene.image.dtype == np.uint8
        assert scene.masks.shape == (count, SIZE, SIZE) and scene.masks.dtype == bool
        assert set(np.unique(scene.owner)) == set(range(count + 1)), "every object is visible"
        assert (scene.masks.sum(0) == (scene.owner > 0)).all(), "one owner for each pixel"
        for mask, box in zip(scene.masks, scene.boxes.tolist(), strict=True):
            assert list(Image.fromarray(mask).getbbox()) == box
        centres = scene.boxes[:, 0] + scene.boxes[:, 2]
        assert (np.diff(centres) > 0).all(), "kinds and boxes go from left to right"


def test_some_objects_overlap_and_stay_visible(made):
    cut = 0
    for scene in made:
        for a, b in itertools.combinations(scene.boxes.tolist(), 2):
            cut += min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])
        assert scene.masks.sum((1, 2)).min() >= 60
    assert cut >= 20


def test_all_numbers_of_objects_and_all_kinds_appear(made):
    counts = Counter(len(scene.kinds) for scene in made)
    assert set(counts) == {1, 2, 3, 4, 5} and min(counts.values()) >= 50
    assert {kind for scene in made for kind in scene.kinds} == set(range(len(NAMES)))
    assert len(NAMES) >= 48


def look_up(crop, table):
    """The kind whose picture is most like the crop (both on black, squeezed to 12 x 12)."""
    small = np.asarray(Image.fromarray(crop).resize((12, 12), Image.Resampling.BOX), dtype=float)
    return int(np.argmin(((table - small) ** 2).sum((1, 2, 3))))


def test_kinds_and_boxes_say_what_the_picture_shows(monkeypatch):
    monkeypatch.setattr(scenes, "background", lambda rng: np.zeros((SIZE, SIZE, 3), np.uint8))
    upright = [[[a[ANGLES.index(0)][:1] * 2] * 5 for a in k] for k in scenes.sprites()]
    monkeypatch.setattr(scenes, "sprites", lambda: upright)
    table = []
    for name in NAMES:  # read afresh, not through the module under test
        with Image.open(scenes.ASSETS / "emoji" / f"{name}.png") as opened:
            picture = opened.convert("RGBA").convert("RGBa")
        picture = picture.crop(picture.getchannel(3).point(lambda a: 255 * (a > 127)).getbbox())
        small = picture.resize((12, 12), Image.Resampling.BOX)
        table.append(np.asarray(small, dtype=float)[..., :3])
    right = total = 0
    for i in range(80):
        scene = scenes.make_scene(i, "validation", objects=(1, 2, 3))
        outside = scene.image.astype(int).sum(2)
        for x0, y0, x1, y1 in scene.boxes:
            outside[y0:y1, x0:x1] = 0
        assert (outside > 0).sum() <= 40, "something is painted outside every box"
        for kind, (x0, y0, x1, y1) in zip(scene.kinds, scene.boxes):
            total += 1
            right += look_up(scene.image[y0:y1, x0:x1], np.stack(table)) == kind
    assert right >= 0.9 * total, f"{right} of {total} boxes show the kind they name"


def test_compose_blends_as_pillow_does():
    rng = np.random.default_rng(0)
    for kind, size in ((0, 2), (20, 7), (45, 10)):
        colour, alpha, mask = scenes.sprites()[kind][size][1][1]
        h, w = mask.shape
        ground = rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
        picture = Image.fromarray(ground)
        straight = colour * 255.0 / np.maximum(np.minimum(alpha, 255), 1)
        cover = Image.fromarray(np.minimum(alpha[..., 0], 255).astype(np.uint8))
        picture.paste(Image.fromarray(straight.clip(0, 255).round().astype("u1")), (5, 9), cover)
        scene = scenes.compose(
            ground.copy(), [(colour, alpha, mask)], np.array([[5, 9, 5 + w, 9 + h]])
        )
        assert np.abs(np.asarray(picture).astype(int) - scene.image).max() <= 2


def test_place_keeps_its_promises():
    rng = np.random.default_rng(1)
    for _ in range(200):
        boxes = scenes.place(rng, [20, 30, 25], [25, 20, 35])
        if boxes is None:
            continue
        assert (boxes >= 0).all() and (boxes <= SIZE).all()
        assert (boxes[:, 2] - boxes[:, 0]).tolist() == [20, 30, 25]
        for a, b in itertools.combinations(boxes.tolist(), 2):
            assert abs(a[0] + a[2] - b[0] - b[2]) >= 20
            assert scenes._shared(a, b) <= 0.12
    assert scenes.place(rng, [112, 112], [112, 112]) is None


def test_backgrounds_vary_and_are_pixels():
    rng = np.random.default_rng(2)
    found = [scenes.background(rng) for _ in range(150)]
    assert all(b.shape == (SIZE, SIZE, 3) and b.dtype == np.uint8 for b in found)
    plain = sum(bool((b == b[0, 0]).all()) for b in found)
    assert 5 <= plain <= 35 and len({digest(b) for b in found}) == 150


@pytest.mark.parametrize("family", [*backgrounds.SMOOTH, backgrounds.photograph,
                                    *backgrounds.PATTERNS])  # fmt: skip
def test_each_family_of_backgrounds(family):
    rng = np.random.default_rng(3)
    found = [family(rng) for _ in range(40)]
    assert all(b.shape == (SIZE, SIZE, 3) and b.dtype == np.uint8 for b in found)
    assert len({digest(b) for b in found}) == 40
    again = np.random.default_rng(3)
    assert [digest(family(again)) for _ in range(40)] == [digest(b) for b in found]
    found[0][:] = 0  # a scene is blended into it: nothing may be read-only or shared


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("names", "language", "caption"),
    [
        (["cat"], "en", "a cat"),
        (["owl"], "en", "an owl"),
        (["cat", "dog", "dog"], "en", "a cat and two dogs"),
        (["dog", "cat", "dog"], "en", "two dogs and a cat"),
        (["strawberry"] * 5, "en", "five strawberries"),
        (["bee", "cat", "car", "car"], "en", "a bee, a cat and two cars"),
        (["owl"], "de", "Eule"),
        (["owl", "dog", "dog"], "de", "Eule, Hundegesicht ×2"),
        (["owl", "owl"], "fr", "chouette ×2"),
    ],
)
def test_captions_read_from_left_to_right(names, language, caption):
    assert scenes.caption_of([NAMES.index(name) for name in names], language) == caption


def test_names_tell_the_kinds_apart():
    for language in LANGUAGES:
        said = [scenes.phrase(kind, n, language) for kind in range(len(NAMES)) for n in (1, 2)]
        assert len(set(said)) == len(said), language
    assert not set(NAMES) & set(PLURALS)


def test_place_names():
    grid = [
        [scenes.place_name((x - 5, y - 5, x + 5, y + 5)) for x in (15, 56, 97)]
        for y in (15, 56, 97)
    ]
    assert grid == [
        ["top left", "top", "top right"],
        ["left", "middle", "right"],
        ["bottom left", "bottom", "bottom right"],
    ]
    assert scenes.place_name((0, 0, 2, 2)) == "top left"
    assert scenes.place_name((110, 110, 112, 112)) == "bottom right"
    assert scenes.clear_place((10, 10, 20, 20))
    assert not scenes.clear_place((32, 10, 42, 20)), "37 lies on the line at 37.3"
    assert not scenes.clear_place((10, 70, 20, 80)), "75 lies on the line at 74.7"


# ---------------------------------------------------------------- questions and answers


def is_true(scene, prompt, answer):
    """Whether the answer follows from the scene, worked out another way than in the module."""
    names = [NAMES[kind] for kind in scene.kinds]
    words = prompt.rstrip("?").split()
    if "many" in words:
        return answer == str([PLURALS[kind] for kind in scene.kinds].count(words[4]))
    if words[2:4] == ["is", "there"]:
        article = "an" if words[-1][0] in "aeiou" else "a"
        return words[-2] == article and answer == ("yes" if words[-1] in names else "no")
    if "where" in words:
        ys, xs = np.nonzero(scene.owner == 1 + names.index(words[-1]))
        y, x = (ys.min() + ys.max() + 1) / 2, (xs.min() + xs.max() + 1) / 2
        third = [int(3 * v / SIZE) for v in (y, x)]
        said = f"{('top', '', 'bottom')[third[0]]} {('left', '', 'right')[third[1]]}".strip()
        return names.count(words[-1]) == 1 and answer == (said or "middle")
    if words[0] in ("detect", "segment"):
        asked = prompt.split(" ", 1)[1].split(" ; ")
        boxes = [f"{encode_boxes([box], SIZE, SIZE)[0]} {name}" for name in asked
                 for n, box in zip(names, scene.boxes) if n == name]  # fmt: skip
        return answer == " ; ".join(boxes)
    return answer == scenes.caption_of(scene.kinds, words[1])


def test_every_answer_is_true():
    data = SceneDataset(700, "test", tasks=TASK_NAMES)
    kinds_of_prompts = Counter()
    for item in (data[i] for i in range(700)):
        assert is_true(item["scene"], item["prefix"], item["suffix"]), item
        kinds_of_prompts[item["task"]] += 1
    assert set(kinds_of_prompts) == set(TASK_NAMES) and min(kinds_of_prompts.values()) > 30


def test_yes_and_no_are_balanced(made):
    rng, answers, yes, asked = np.random.default_rng(0), Counter(), Counter(), Counter()
    for scene in made * 5:
        prompt, answer = scenes.task(rng, scene, "is there")
        answers[answer] += 1
        asked[prompt] += 1
        yes[prompt] += answer == "yes"
    assert set(answers) == {"yes", "no"} and abs(answers["yes"] / 2000 - 0.5) < 0.04
    assert len(asked) == len(NAMES)
    assert all(0.15 < yes[p] / n < 0.85 for p, n in asked.items()), "a kind gives the answer away"


def test_counts_reach_from_none_to_five(made):
    rng = np.random.default_rng(0)
    answers = Counter(scenes.task(rng, scene, "count")[1] for scene in made * 2)
    assert set(answers) == set("012345")
    assert answers.most_common(1)[0][1] / answers.total() < 0.45, "a blind guess does too well"


def test_where_falls_back_to_a_count():
    rng = np.random.default_rng(0)
    twins = next(s for i in range(99) if (s := scenes.make_scene(i, objects=(2,))).kinds[0]
                 == s.kinds[1])  # fmt: skip
    assert "how many" in scenes.task(rng, twins, "where")[0]


def test_an_unknown_task_or_language_is_an_error():
    rng, scene = np.random.default_rng(0), scenes.make_scene(0)
    with pytest.raises(ValueError, match=r"task must be one of caption.* got 'wher'"):
        scenes.task(rng, scene, "wher")
    with pytest.raises(ValueError, match="language must be one of en, de, fr, got 'it'"):
        scenes.task(rng, scene, "caption", "it")


def test_an_item_names_the_task_that_was_really_asked():
    data = SceneDataset(200, "test", tasks=("where",))
    for item in (data[i] for i in range(200)):
        assert item["task"] == ("count" if "how many" in item["prefix"] else "where")
    assert len({item["task"] for item in (data[i] for i in range(200))}) == 2


def test_languages_and_tasks_are_drawn_from_what_is_given():
    data = SceneDataset(60, tasks=("caption",), languages=("de", "fr"))
    assert {data[i]["prefix"] for i in range(60)} == {"caption de", "caption fr"}
    assert len(data) == 60 and data[0]["task"] == "caption"
    assert {len(data[i]["scene"].kinds) for i in range(60)} == {1, 2, 3, 4, 5}
    few = SceneDataset(20, objects=(2,))
    assert {len(few[i]["scene"].kinds) for i in range(20)} == {2}


# ---------------------------------------------------------------- bad input


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"train, validation, test.*'dev'"):
        scenes.make_scene(0, "dev")
    for split in ("train", "validation"):
        with pytest.raises(ValueError, match="test split"):
            scenes.make_scene(0, split, unseen=True)
    with pytest.raises(ValueError):
        scenes.make_scene(-1)
    data = SceneDataset(5)
    for index in (-1, 5):
        with pytest.raises(IndexError, match=f"scene {index} of 5"):
            data[index]
    assert len(list(data)) == 5
