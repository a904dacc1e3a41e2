"""Numbers, shapes and kinds in words."""

from collections.abc import Sequence

LISTED = 3
"""Names that a sentence has room for."""


def dimensions(sizes: Sequence[int | None]) -> str:
    """``3x224x224``, with ``?`` for any size; without sizes ``one number``."""
    return "x".join("?" if size is None else str(size) for size in sizes) or "one number"


def counted(number: int, noun: str, ending: str = "s") -> str:
    """``1 thread``, ``2,000 threads``."""
    return f"{number:,} {noun}{ending if number != 1 else ''}"


def first_of(names: Sequence[str]) -> str:
    """Names in a sentence: the first few."""
    return f"{', '.join(names[:LISTED])}{', ...' if len(names) > LISTED else ''}"


def kind(value: object) -> str:
    """What it is an instance of: ``an int``, ``a Linear``; ``None``."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
