"""PaliGemma, built from scratch: one notebook, one module, one idea at a time.

import paligemma

pg = paligemma.load()                  # the tiny model that ships with the package
print(pg("photo.jpg", "caption en"))   # greedy
for piece in pg.stream("photo.jpg", "caption en"):
    print(piece, end="", flush=True)
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paligemma.inference import Pipeline, load

__all__ = ["Pipeline", "load"]
__version__ = "0.1.0"


def __getattr__(name: str):
    # Imported on first use: `paligemma --help` and a lesson's module need no whole model.
    if name in __all__:
        from paligemma import inference

        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
