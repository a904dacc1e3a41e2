"""The recipes that come with pcq: ``recipes/`` of the repository, ``pcq/recipes`` of the installed package."""

from pathlib import Path
from typing import NamedTuple

from pcq.errors import PcqError, did_you_mean

MODELINE = "yaml-language-server:"


class Shipped(NamedTuple):
    """A recipe that comes with pcq: its name, what it is for in a line, and its YAML."""

    name: str
    summary: str
    text: str


def folder() -> Path:
    """Where they are."""
    package = Path(__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped_recipes() -> tuple[Shipped, ...]:
    """All of them, by name."""
    files = sorted(folder().glob("*.yaml"), key=lambda file: file.stem)
    texts = {file.stem: file.read_text(encoding="utf-8") for file in files}
    return tuple(Shipped(name, header(text).partition("\n")[0], text) for name, text in texts.items())


def shipped_text(name: str, others: str = "") -> str:
    """The YAML of one; ``name`` with or without ``.yaml``. ``others``: what else could have been given, in words.

    Raises:
        PcqError: there is none of that name.
    """
    texts = {each.name: each.text for each in shipped_recipes()}
    stem = name.removesuffix(".yaml")
    if stem not in texts:
        todo = did_you_mean(stem, texts) or "`pcq recipes list` says what each is for"
        raise PcqError(f"there is no recipe '{name}'", allowed=f"{others}{', '.join(texts)}", todo=todo)
    return texts[stem]


def header(text: str) -> str:
    """The comment that a recipe begins with, without its ``#`` and without the line for editors."""
    lines = []
    for line in text.removeprefix("\ufeff").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].removeprefix(" ").rstrip())
    return "\n".join(line for line in lines if not line.startswith(MODELINE)).strip()
