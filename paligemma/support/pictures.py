"""Pictures of every kind as plain RGB, and the settings with which a checkpoint wants them."""

import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from paligemma.support.arguments import as_number, is_whole
from paligemma.support.files import read_json, shorten, spell_path
from paligemma.support.replacing import settled

Picture = str | os.PathLike | Image.Image | np.ndarray  # what `open_picture` takes
STRIP = 1 << 22  # pixels that are converted at a time, where that takes more than the result
LARGEST = 4096  # side of what a vision tower reads, pixels; published: 896
EXTREME = 1e6  # no mean or deviation of brightness is larger, or as small as its inverse
OVERSHOOT = 0.25  # resizing with a sharp filter leaves 0…1 by less than this


class ImageError(ValueError):
    """A picture that cannot be used; the message says which and why."""


# ---------------------------------------------------------------- opening


def open_picture(image: Picture) -> Image.Image:
    """Open a picture as upright 8-bit RGB.

    The range of a deep grey picture follows from its mode, never from its values: modes I;16… and
    I hold 0…65535 (as Pillow's readers of 16-bit files give them), mode F holds 0…1, where up to
    0.25 beyond either end is overshoot of a filter and is clipped. NaN and infinity become black.

    Args:
        image: a path, a `PIL.Image` of any mode, or `uint8[H, W, 3]` in RGB order.

    Returns:
        A `PIL.Image` in mode RGB: EXIF rotation applied, transparency laid over white,
        the first frame of an animated file, ICC profile ignored.

    Raises:
        ImageError: not a picture, truncated, empty, more pixels than `PIL.Image.MAX_IMAGE_PIXELS`
            (a decompression bomb), an array of another kind, or grey values beyond their range.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ImageError(
                f"got an array {image.dtype}{list(image.shape)}; expected uint8[H, W, 3] in RGB "
                f"order: {_advice(image)}"
            )
        return Image.fromarray(image)
    if isinstance(image, Image.Image):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _decode(image)
        except ImageError:
            raise
        except Exception as error:
            raise ImageError(f"the given PIL.Image cannot be decoded ({error})") from None
    if not isinstance(image, str | os.PathLike):
        raise ImageError(
            f"got {type(image).__name__}; expected a path, a PIL.Image or a uint8[H, W, 3] array"
        )
    return _open_file(image)


def _open_file(path: str | os.PathLike) -> Image.Image:
    """Decode one file; every way in which that fails becomes an `ImageError`."""
    name, path = os.fspath(path), spell_path(path)
    if isinstance(name, str) and name.startswith(("http://", "https://")):
        raise ImageError(f"picture {shorten(name)} is an address; download it first")
    if not os.path.exists(name):
        name = os.path.expanduser(name)
    if not os.path.isfile(name):
        what = "does not exist"
        if os.path.exists(name):
            what = "is a directory" if os.path.isdir(name) else "is not a regular file"
        raise ImageError(f"picture {path} {what}; give the path of an image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(name) as file:
                return _decode(file)
    except ImageError as error:
        raise ImageError(f"picture {path}: {error}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ImageError(
            f"picture {path} has more than {Image.MAX_IMAGE_PIXELS or 0:,} pixels; make it smaller "
            "(or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it)"
        ) from None
    except UnidentifiedImageError:
        raise ImageError(
            f"{path} is not a picture that Pillow can read; convert it to PNG or JPEG"
        ) from None
    except Exception as error:  # decoders of broken files raise nearly everything
        raise ImageError(f"picture {path} cannot be decoded ({error}); is it complete?") from None


def _decode(image: Image.Image) -> Image.Image:
    """All pixels of an opened picture, upright, in RGB; raises whatever Pillow raises."""
    if image.format == "EPS":
        raise ImageError("it is PostScript, a program; convert it to PNG where you trust it")
    image.load()
    if 0 in image.size:
        raise ImageError(f"it is {image.width} × {image.height} pixels: it is empty")
    try:
        image = ImageOps.exif_transpose(image) or image
    except Exception:  # unreadable EXIF data: take the picture as it lies
        pass
    return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to 8-bit RGB, with transparency laid over white."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = _grey_to_8_bits(image)
    if image.mode == "La":  # alpha already multiplied in; Pillow knows one way out
        image = image.convert("LA")
    has_alpha = {"A", "a"} & set(image.getbands())
    if has_alpha or image.info.get("transparency") is not None:
        laid = Image.new("RGB", image.size)
        for top, strip in _strips(image):
            white = Image.new("RGBA", strip.size, "white")
            laid.paste(Image.alpha_composite(white, strip.convert("RGBA")).convert("RGB"), (0, top))
        return laid
    return image if image.mode == "RGB" else image.convert("RGB")


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """A picture in parts, each with its place from the top: what is made of them takes less."""
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Deep greys (modes I, I;16…, F) to mode L, by the range of their mode."""
    top, slack = (1, OVERSHOOT) if image.mode == "F" else (65535, 0)
    hidden = image.info.get("transparency")  # one grey that means "see through"
    grey = np.empty((image.height, image.width), np.uint8)
    least, most = np.inf, -np.inf
    for start, strip in _strips(image):
        values = np.array(strip, dtype=np.float64)
        seen = np.isfinite(values)
        least = min(least, values.min(where=seen, initial=np.inf))
        most = max(most, values.max(where=seen, initial=-np.inf))
        values[~seen] = 0
        part = np.clip(np.round(values * (255 / top)), 0, 255)
        if hidden is not None:
            part[seen & (values == hidden)] = 255
        grey[start : start + len(part)] = part
    if least < -slack or most > top + slack:
        raise ImageError(
            f"its mode is {image.mode}, which holds 0…{top}, but its values run from {least:.6g} "
            f'to {most:.6g}; if they are brightnesses in 0…255 give image.convert("L"), else '
            f"scale them to 0…{top} first"
        )
    return Image.fromarray(grey)


def _advice(array: np.ndarray) -> str:
    """Python that turns an array of another kind into what is expected; it has to work."""
    if 0 in array.shape:
        return "it is empty"
    shape, how, given = array.shape, "array", ""
    if len(shape) == 4 and shape[-1] in (1, 3, 4):
        return f"this is a batch; give {shape[0]} pictures, list(array), of that kind"
    if len(shape) == 3 and shape[2] not in (1, 3, 4):
        how, shape = f"{how}.transpose(1, 2, 0)", (*shape[1:], shape[0])
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3, 4)):
        return "height, width and three colours, or a grey or transparent PIL.Image"
    if array.dtype == bool:
        how = f'{how}.astype("uint8") * 255'
    elif array.dtype == np.uint16:
        how, given = f'({how} // 257).astype("uint8")', " if it holds 0…65535"
    elif array.dtype.kind in "iu" and array.dtype != np.uint8:
        how, given = f'{how}.clip(0, 255).astype("uint8")', " if it holds 0…255"
    elif array.dtype.kind == "f":
        how, given = f'({how}.clip(0, 1) * 255).round().astype("uint8")', " if it holds 0…1"
    elif array.dtype != np.uint8:
        return "numbers, 0…255"
    if shape[-1] == 1 and len(shape) == 3:
        how = f"({how})[:, :, 0]"
    if len(shape) == 2 or shape[2] != 3:
        how = f"PIL.Image.fromarray({how})"
    return f"give {how}{given}"


# ---------------------------------------------------------------- settings


def check_settings(size: Any, mean: Any, std: Any, resample: Any) -> tuple:
    """The four settings of an image processor as int, two triples of floats and a Pillow filter.

    Raises:
        ValueError: a setting with which no picture could be processed.
    """
    if not is_whole(size) or not 1 <= int(size) <= LARGEST:
        raise ValueError(
            f"size is {shorten(size)}; expected a side in pixels such as 224, at most {LARGEST}"
        )
    if isinstance(resample, bool) or resample not in list(Image.Resampling):
        known = ", ".join(f"{kind.value} {kind.name.lower()}" for kind in Image.Resampling)
        raise ValueError(
            f"resample is {shorten(resample)}; expected one of Pillow's filters: {known}"
        )
    mean, std = _three_numbers("image_mean", mean), _three_numbers("image_std", std)
    if min(map(abs, std)) < 1 / EXTREME:
        raise ValueError(f"image_std is {std}; it divides, so none may be 0")
    return int(size), mean, std, Image.Resampling(resample)


def _three_numbers(name: str, values: Any) -> tuple[float, ...]:
    """Check `mean` or `std`: one finite number for each of red, green and blue."""
    items = list(values) if isinstance(values, Iterable) else []
    if len(items) != 3 or not all(
        not isinstance(item, bool) and abs(as_number(item)) < EXTREME for item in items
    ):
        raise ValueError(
            f"{name} is {shorten(values)}; expected three numbers such as (0.5, 0.5, 0.5)"
        )
    return tuple(float(item) for item in items)


def read_settings(path: str | os.PathLike, size: int) -> dict[str, Any]:
    """What a checkpoint directory says about pictures: size, mean, std, resample.

    `preprocessor_config.json`, or `processor_config.json`, which transformers 5 writes and which
    holds the same one level down; without either, the published defaults at `size`.

    Raises:
        ValueError: a broken file, or one that asks for other steps than PaliGemma's.
    """
    folder = settled(path)
    file, newer = folder / "preprocessor_config.json", folder / "processor_config.json"
    config: Any = {}
    if file.is_file():
        config = read_json(file, dict)
    elif newer.is_file():
        file = newer
        config = read_json(newer, dict).get("image_processor") or {}  # type: ignore[union-attr]
        if not isinstance(config, dict):
            raise ValueError(f"{file}: image_processor is {shorten(config)}; expected settings")
    config = {key: value for key, value in config.items() if value is not None}

    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not config.get(step, True):
            raise ValueError(f"{file}: {step} is false; PaliGemma's pictures need this step")
    if config.get("do_center_crop") or config.get("do_pad"):
        raise ValueError(f"{file}: asks to crop or pad; PaliGemma squashes the whole picture")
    factor = config.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or not abs(factor * 255 - 1) < 1e-6:
        raise ValueError(
            f"{file}: rescale_factor is {shorten(factor)}; expected 1/255, bytes to 0…1"
        )
    side = config.get("size", size)
    if isinstance(side, dict):
        if side.get("height") is None or side.get("height") != side.get("width"):
            raise ValueError(
                f"{file}: size is {shorten(side)}; expected a square, height equal to width"
            )
        side = side["height"]
    half = (0.5, 0.5, 0.5)
    mean, std = config.get("image_mean", half), config.get("image_std", half)
    try:
        found = check_settings(side, mean, std, config.get("resample", Image.Resampling.BICUBIC))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return dict(zip(("size", "mean", "std", "resample"), found, strict=True))


def settings_dict(
    size: int, mean: tuple, std: tuple, resample: int, image_seq_length: int | None = None
) -> dict[str, Any]:
    """The same as the published `preprocessor_config.json` has it."""
    return {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(mean),
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": image_seq_length,
        "image_std": list(std),
        "processor_class": "PaliGemmaProcessor",
        "resample": int(resample),
        "rescale_factor": 1 / 255,
        "size": {"height": size, "width": size},
    }
