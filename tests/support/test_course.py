"""The course's furniture: sample pictures, checks of exercises, saved figures, the map."""

import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from PIL import Image

from paligemma.plotting import show_images
from paligemma.support.course import add_to_class, check, sample_picture, save_figure
from paligemma.support.course_map import BOXES, FRAMES, NUMBERS, STEMS, model_map
from paligemma.support.drawing import COLOURS

NOISE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def test_methods_are_added_as_they_are():
    class Toy:
        pass

    @add_to_class(Toy)
    def play(self):
        return 1

    @add_to_class(Toy)
    @property
    def name(self):
        return "toy"

    @add_to_class(Toy)
    @classmethod
    def make(cls):
        return cls()

    assert (Toy().play(), Toy().name, type(Toy.make())) == (1, "toy", Toy)


@pytest.mark.parametrize("name", ["cat", "coffee", "astronaut", "scene"])
def test_sample_pictures(name):
    picture = sample_picture(name)
    assert picture.mode == "RGB"
    assert min(picture.size) >= 224


def test_unknown_sample_picture():
    with pytest.raises(ValueError, match=r"no sample picture 'dog': choose from .*cat"):
        sample_picture("dog")


# ---------------------------------------------------------------- check and save_figure


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (AssertionError("the sum is 3\nmore"), "✗ not yet: the sum is 3\n"),
        (AssertionError(), "✗ not yet: AssertionError"),
        (KeyError("x"), "✗ not yet: KeyError: 'x'\n"),
        (SystemExit(2), "✗ not yet: SystemExit: 2\n"),
        (RecursionError("deep"), "✗ not yet: RecursionError: deep\n"),
    ],
)
def test_check_tells_the_reason_and_goes_on(capsys, error, said):
    def test(answer):
        raise error

    assert check(test, None) is None
    out, err = capsys.readouterr()
    assert out.startswith(said) and not err


def test_check_when_right_and_when_interrupted(capsys):
    check(lambda a, b: None, 1, 2)
    assert capsys.readouterr().out == "✓ correct\n"

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(interrupted)


def test_figures_are_saved_where_asked_and_the_same_each_time(tmp_path, monkeypatch):
    monkeypatch.setenv("PALIGEMMA_FIGURES", str(tmp_path / "figures"))
    for name in ("one", "two"):
        figure = model_map("rope")
        assert save_figure(figure, name) is figure
        picture = Image.fromarray(NOISE)
        assert save_figure(picture, name) is picture
        save_figure(show_images(NOISE), f"{name}-figure.png")
    folder = tmp_path / "figures"
    for kind in (".svg", ".png", "-figure.png"):
        assert (folder / f"one{kind}").read_bytes() == (folder / f"two{kind}").read_bytes()
    svg = (folder / "one.svg").read_text()
    assert "RoPE</text>" in svg and "dc:date" not in svg
    assert np.array_equal(np.asarray(Image.open(folder / "one.png")), NOISE)


def test_nothing_is_saved_unasked(tmp_path, monkeypatch):
    monkeypatch.delenv("PALIGEMMA_FIGURES", raising=False)
    monkeypatch.chdir(tmp_path)
    figure, _ = plt.subplots()
    assert save_figure(figure, "name") is figure
    assert list(tmp_path.iterdir()) == []
    assert plt.get_fignums() == []


# ---------------------------------------------------------------- the map


def test_map_shows_the_lessons_that_exist_and_their_numbers():
    folder = Path(__file__).resolve().parents[2] / "notebooks"
    names = sorted(path.stem for path in folder.glob("[0-9][0-9]_*.ipynb"))
    assert {f"{number}_{stem}" for stem, number in NUMBERS.items()} == set(names)
    drawn = {entry[0] for entry in (*BOXES, *FRAMES)} | {"plotting", "overview"}
    assert drawn == set(STEMS)


def test_unknown_lesson():
    with pytest.raises(ValueError, match="no lesson 'ropes': choose from overview, plotting"):
        model_map("rope", "ropes")


def fills(figure):
    return [patch.get_facecolor() for patch in figure.axes[0].patches]


def test_each_stem_lights_something():
    solid = {stem: to_rgb(COLOURS[part]) for stem, part in STEMS.items()}
    dark = fills(model_map("plotting"))
    for stem in list(STEMS)[2:]:
        changed = [a[:3] for a, b in zip(fills(model_map(stem)), dark, strict=True) if a != b]
        assert changed, stem
        assert stem in ("processor",) or solid[stem] in changed, stem
    assert fills(model_map()) == fills(model_map("overview")) == fills(model_map(*STEMS))


@pytest.mark.parametrize("stems", [(), ("lora",)])
def test_no_text_of_the_map_overlaps_or_is_cut(stems):
    figure = model_map(*stems)
    canvas = FigureCanvasAgg(figure).get_renderer()
    found = [
        (text.get_text(), text.get_window_extent(canvas))
        for ax in figure.axes
        for text in ax.texts
        if text.get_text() != "+"
    ]
    page = figure.bbox
    for name, box in found:
        assert box.x0 >= page.x0 and box.x1 <= page.x1, f"{name} is cut"
        assert box.y0 >= page.y0 and box.y1 <= page.y1, f"{name} is cut"
    for (one, a), (two, b) in itertools.combinations(found, 2):
        assert not a.overlaps(b), f"{one} overlaps {two}"
    to_pixel = figure.axes[0].transData.transform
    for _, left, bottom, width, height, text in BOXES:
        corner = to_pixel([(left, bottom), (left + width, bottom + height)])
        inside = [box for name, box in found if name == text]
        assert any(
            box.x0 > corner[0, 0] and box.x1 < corner[1, 0] and box.y1 < corner[1, 1]
            for box in inside
            if box.y0 > corner[0, 1]
        ), f"{text!r} leaves its box"
