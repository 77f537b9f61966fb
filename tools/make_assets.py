"""Make the pictures that the course ships: Noto emoji sprites, demo scenes, photographs.

The emoji come from the npm package `emoji-datasource-google`, their names in other languages from
`cldr-annotations-full`, the photographs from the wheel of scikit-image. All are copied once into
`paligemma/assets/` and committed; nobody needs to run this again unless a kind is added.

    python tools/make_assets.py                      # runs `npm pack` in temporary folders
    python tools/make_assets.py --package DIR --names DIR      # already unpacked packages
"""

import argparse
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ASSETS = Path(__file__).resolve().parent.parent / "paligemma" / "assets"
NPM_PACKAGE = "emoji-datasource-google@16.0.0"
NPM_NAMES = "cldr-annotations-full@48.2.0"
LANGUAGES = ("de", "fr")  # besides English, whose names and plurals are in KINDS

# (name, plural, short name in the package); the article follows from the name's first letter.
KINDS = [
    ("cat", "cats", "cat"),
    ("dog", "dogs", "dog"),
    ("lion", "lions", "lion_face"),
    ("tiger", "tigers", "tiger"),
    ("horse", "horses", "horse"),
    ("cow", "cows", "cow"),
    ("pig", "pigs", "pig"),
    ("rabbit", "rabbits", "rabbit"),
    ("bear", "bears", "bear"),
    ("panda", "pandas", "panda_face"),
    ("frog", "frogs", "frog"),
    ("monkey", "monkeys", "monkey_face"),
    ("elephant", "elephants", "elephant"),
    ("penguin", "penguins", "penguin"),
    ("duck", "ducks", "duck"),
    ("owl", "owls", "owl"),
    ("whale", "whales", "whale"),
    ("octopus", "octopuses", "octopus"),
    ("crab", "crabs", "crab"),
    ("snail", "snails", "snail"),
    ("butterfly", "butterflies", "butterfly"),
    ("bee", "bees", "bee"),
    ("turtle", "turtles", "turtle"),
    ("snake", "snakes", "snake"),
    ("tulip", "tulips", "tulip"),
    ("cactus", "cactuses", "cactus"),
    ("mushroom", "mushrooms", "mushroom"),
    ("tree", "trees", "deciduous_tree"),
    ("apple", "apples", "apple"),
    ("banana", "bananas", "banana"),
    ("lemon", "lemons", "lemon"),
    ("strawberry", "strawberries", "strawberry"),
    ("carrot", "carrots", "carrot"),
    ("pizza", "pizzas", "pizza"),
    ("burger", "burgers", "hamburger"),
    ("cake", "cakes", "cake"),
    ("car", "cars", "car"),
    ("bus", "buses", "bus"),
    ("bike", "bikes", "bike"),
    ("boat", "boats", "boat"),
    ("rocket", "rockets", "rocket"),
    ("house", "houses", "house"),
    ("ball", "balls", "soccer"),
    ("guitar", "guitars", "guitar"),
    ("key", "keys", "key"),
    ("umbrella", "umbrellas", "umbrella"),
    ("balloon", "balloons", "balloon"),
    ("crown", "crowns", "crown"),
]

# name here -> (file in skimage.data, height in pixels)
PICTURES = {
    "cat": ("chelsea.png", 300),
    "coffee": ("coffee.png", 300),
    "astronaut": ("astronaut.png", 448),
}
BACKGROUNDS = {  # seen only as crops of 112 pixels behind scenes
    "brick": ("brick.png", 256),
    "grass": ("grass.png", 256),
    "gravel": ("gravel.png", 256),
    "camera": ("camera.png", 300),
    "hubble": ("hubble_deep_field.jpg", 300),
    "retina": ("retina.jpg", 300),
    "clock": ("clock_motion.png", 260),
}


def unpack(package, folder):
    """Download and unpack an npm package into `folder`, return the package's root."""
    subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True)
    with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
        archive.extractall(folder, filter="data")
    return Path(folder) / "package"


def make_emoji(package, names):
    """Copy the 64 x 64 sprites of KINDS and write kinds.json, with CLDR's names."""
    spoken = {
        language: json.loads((names / "annotations" / language / "annotations.json").read_text())
        for language in LANGUAGES
    }
    entries = {e["short_name"]: e for e in json.loads((package / "emoji.json").read_text())}
    folder = ASSETS / "emoji"
    folder.mkdir(parents=True, exist_ok=True)
    kinds = []
    for name, plural, short in KINDS:
        entry = entries[short]
        source = package / "img" / "google" / "64" / entry["image"]
        with Image.open(source) as picture:
            picture.convert("RGBA").save(folder / f"{name}.png", optimize=True)
        kinds.append(
            {
                "name": name,
                "plural": plural,
                "codepoint": entry["unified"],
                "category": entry["category"],
            }
        )
        character = chr(int(entry["unified"].split("-")[0], 16))
        for language in LANGUAGES:
            annotation = spoken[language]["annotations"]["annotations"][character]
            kinds[-1][language] = annotation["tts"][0]
    (folder / "kinds.json").write_text(json.dumps(kinds, indent=1, ensure_ascii=False) + "\n")
    # kept beside the pictures: the licences of the packages they were taken from
    shutil.copyfile(package / "LICENSE", folder / "LICENSE.emoji-datasource-google")
    shutil.copyfile(names / "LICENSE", folder / "LICENSE.cldr")
    return len(kinds)


def make_pictures(pictures, best, largest):
    """Write photographs as JPEG, of the best quality that keeps each below `largest` bytes.

    Args:
        pictures: PICTURES or BACKGROUNDS.
        best: quality to try first.
        largest: bytes.
    """
    import skimage  # type: ignore[import-not-found]  # only here

    folder = ASSETS / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    for name, (source, height) in pictures.items():
        with Image.open(Path(str(skimage.__file__)).parent / "data" / source) as opened:
            picture = opened.convert("RGB")
        width = round(picture.width * height / picture.height)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        target = folder / f"{name}.jpg"
        for quality in range(best, 30, -4):
            picture.save(target, quality=quality, optimize=True)
            if target.stat().st_size <= largest:
                break
    return len(pictures)


def compose_demo(kinds, places, first, second, size=448):
    """A large scene for people to look at, made by hand.

    Args:
        kinds: names, left to right.
        places: (x, y, side, degrees) of each, the centre and the side in pixels.
        first, second: colours (r, g, b) of the sky and of the ground.
        size: side of the picture, pixels.
    """
    ramp = np.linspace(0, 1, size)[:, None, None] ** 1.5
    field = np.asarray(first) * (1 - ramp) + np.asarray(second) * ramp
    picture = Image.fromarray(np.broadcast_to(field, (size, size, 3)).round().astype(np.uint8))
    for name, (x, y, side, degrees) in zip(kinds, places):
        with Image.open(ASSETS / "emoji" / f"{name}.png") as opened:
            sprite = opened.convert("RGBA").resize((side, side), Image.Resampling.LANCZOS)
        sprite = sprite.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
        picture.paste(sprite, (x - sprite.width // 2, y - sprite.height // 2), sprite)
    return picture


DEMOS = {
    "scene": (
        ("cat", "dog", "dog"),
        ((72, 300, 128, 6), (236, 160, 124, -5), (360, 310, 128, 4)),
        (196, 224, 246),
        (176, 214, 150),
    ),
    "scene2": (
        ("bee", "tulip"),
        ((130, 130, 140, -8), (310, 290, 168, 3)),
        (252, 236, 200),
        (150, 200, 140),
    ),
    "scene3": (
        ("rocket", "balloon", "balloon"),
        ((96, 300, 140, 0), (230, 130, 120, 4), (364, 250, 132, -6)),
        (60, 80, 150),
        (240, 190, 170),
    ),
}


def make_scenes():
    """Write the pictures of DEMOS."""
    for name, demo in DEMOS.items():
        compose_demo(*demo).save(ASSETS / "pictures" / f"{name}.png", optimize=True)
    return len(DEMOS)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--package", type=Path, help="an unpacked emoji-datasource-google")
    parser.add_argument("--names", type=Path, help="an unpacked cldr-annotations-full")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        package = options.package or unpack(NPM_PACKAGE, first)
        kinds = make_emoji(package, options.names or unpack(NPM_NAMES, second))
    photographs = make_pictures(PICTURES, 92, 60_000) + make_pictures(BACKGROUNDS, 90, 30_000)
    print(f"{kinds} kinds, {make_scenes()} scenes and {photographs} photographs written")


if __name__ == "__main__":
    main()
