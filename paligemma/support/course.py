"""What the course's notebooks need and no lesson is about."""

from collections.abc import Callable


def add_to_class(cls: type) -> Callable:
    """Add a function to a class, as a method, in a later cell: `@add_to_class(PaliGemma)`.

    The exporter (tools/export.py) writes such a method into the body of the class.
    """

    def add(method):
        name = method.fget.__name__ if isinstance(method, property) else method.__name__
        setattr(cls, name, method)
        return method

    return add
