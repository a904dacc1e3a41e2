"""A recipe says what to do with which weights: strict YAML in, frozen dataclasses out, every mistake at once."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pcq.errors import PcqError, raise_all
from pcq.recipe.check import check
from pcq.recipe.schema import FORMAT, kind_of, spell_out
from pcq.recipe.strict_yaml import Data, Document, Place, parse, read, scalar
from pcq.rules import Rule
from pcq.settings import Finetune
from pcq.shipped import header, shipped_recipes, shipped_text


@dataclass(frozen=True)
class Recipe:
    """What to do with which weights.

    Attributes:
        name: the file's name without ``.yaml``, unless the file says otherwise.
        description: the comment that the file begins with; not compared.
        rules: the first that matches a weight decides.
        finetune: how `pcq finetune` trains; None: the file does not say, and it goes by the defaults.
        budget: what the quantized file or its weights may take, such as `3MB` or `2.5bits`; levels are then chosen
            for the weights to which the rules give any.
        places: file and line of each rule, as far as known.
        shipped: whether it is one that came with pcq, as it came: there is no file to correct.
    """

    name: str
    description: str = field(compare=False)
    rules: tuple[Rule, ...]
    finetune: Finetune | None = None
    budget: str | None = None
    places: tuple[str, ...] = field(default=(), compare=False, repr=False)
    shipped: bool = field(default=False, compare=False, repr=False)

    def where(self, rule: int) -> str:
        """File and line of rule number ``rule``, counted from 0."""
        return self.places[rule] if rule < len(self.places) else self.name

    def todo(self, correction: str) -> str:
        """What to do about a rule that decides nothing: ``correction``, or what stands for it in a shipped recipe."""
        if not self.shipped:
            return correction
        if any(each.name == f"{self.name}-all" for each in shipped_recipes()):
            return f"Take the recipe `{self.name}-all`, which treats the first and last layer like the others"
        return f"Correct a copy: `pcq recipes show {self.name} > my.yaml`"

    def to_json(self) -> dict[str, Any]:
        """What is done, defaults written out, as plain data: itself a recipe file (the description is not in it)."""
        said: dict[str, Any] = {"pcq": FORMAT, "name": self.name, "rules": [_rule_to_json(rule) for rule in self.rules]}
        if self.budget is not None:
            said["budget"] = self.budget
        return said if self.finetune is None else said | {"finetune": _without_none(asdict(self.finetune))}

    @staticmethod
    def from_json(data: Mapping[str, Any], where: str = "recipe") -> "Recipe":
        """The recipe that ``to_json`` wrote, or anything of a recipe file's shape.

        Raises:
            PcqError: every mistake, each with its place in ``data`` behind ``where``.
        """
        return _resolve(Document(where, dict(data), {}, frozenset(), ()), {})


def _rule_to_json(rule: Rule) -> dict[str, Any]:
    said: dict[str, Any] = {"match": [_without_none(asdict(match)) for match in rule.match]}
    if rule.levels is None:
        said["keep"] = rule.keep
    else:
        said |= {"levels": {"kind": kind_of(rule.levels), **_without_none(asdict(rule.levels))}, "per": rule.per}
    return said | ({"group": rule.group} if rule.group else {}) | ({"optional": True} if rule.optional else {})


def _without_none(fields: dict[str, Any]) -> dict[str, Any]:
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
    return {key: value for key, value in plain.items() if value is not None and value != []}


def load_recipe(path_or_name: str | Path | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, or the shipped one of that name where there is no such file.

    Args:
        path_or_name: a file, or a name with or without ``.yaml``; a loaded recipe is given back.
        overrides: ``path=value`` each, such as ``rules.0.levels.bits=3``; values are read as in a file.

    Raises:
        PcqError: there is no such recipe, or there are mistakes in it; all of them, each with file and line; or changes
            of a loaded recipe are asked for, which has no file any more.
    """
    if isinstance(path_or_name, Recipe):
        if overrides:
            what = "the recipe is loaded already, and changes are made where one is read"
            raise PcqError(what, where="overrides", todo="Give them to load_recipe, or give the recipe's file or name")
        return path_or_name
    path = Path(path_or_name)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError):  # not even a possible name
        is_folder = exists = False
    if is_folder:
        raise PcqError("this is a folder, not a recipe", where=str(path_or_name))
    if exists:
        return parse_recipe(read(path), str(path_or_name), overrides)
    if path.parent != Path():
        raise PcqError("there is no such file", where=str(path_or_name))
    recipe = parse_recipe(
        shipped_text(path.name, "a file, or one of "), f"{path.name.removesuffix('.yaml')}.yaml", overrides
    )
    return replace(recipe, shipped=not overrides)


def parse_recipe(text: str, file: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that ``text`` is, from a file named ``file``.

    Raises:
        PcqError: as :func:`load_recipe`.
    """
    document = parse(text, file)
    if not isinstance(document.data, dict):
        raise_all([*document.problems, PcqError("a recipe is a mapping with the keys `pcq` and `rules`", where=file)])
    wheres, problems = override(document.data, overrides)
    stem = Path(file).name.removesuffix(".yaml").removesuffix(".yml")
    return _resolve(document, wheres, problems, re.sub(r"[^\w.+-]+", "-", stem) or "recipe", header(text))


def _resolve(
    document: Document,
    wheres: dict[Place, str],
    problems: Sequence[PcqError] = (),
    name: str = "recipe",
    description: str = "",
) -> Recipe:
    """Check everything and build the recipe; ``name`` holds where the file does not say."""
    file, places = check(document, wheres, problems)
    rules = tuple(Rule(**vars(rule)) for rule in file.rules)
    return Recipe(file.name or name, description, rules, file.finetune, file.budget, places)


def override(data: Data, overrides: Sequence[str]) -> tuple[dict[Place, str], list[PcqError]]:
    """Change ``data`` in place; which override set what, and what is wrong with them.

    A path is made of keys and list indices (from 0), with dots between. What the path's last key may be is left to the
    check of the whole recipe.
    """
    wheres: dict[Place, str] = {}
    problems: list[PcqError] = []
    for text in overrides:
        try:
            wheres[_set(data, text)] = f"--set {text}"
        except PcqError as error:
            problems.append(PcqError(error.what, where=f"--set {text}", allowed=error.allowed, todo=error.todo))
    return wheres, problems


def _set(data: Data, text: str) -> Place:
    path, equals, said = text.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        raise PcqError("this is not `path=value`", todo="Write it as in `rules.0.levels.bits=3`")
    if said.strip()[:1] in tuple("[{\"'"):
        document = parse(said, "--set")
        raise_all(list(document.problems))
        value = document.data
    else:
        value = scalar(said.strip())
    place: Place = ()
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        key = _key(data, part, ".".join(map(str, place)) or "the recipe")
        if following is None:
            data[key] = value  # type: ignore[index]
        elif isinstance(data, dict):
            data[part] = spell_out(part, data[part]) if part in data else {}
        place = (*place, key)
        data = data[key]  # type: ignore[index]
    return place


def _key(data: Data, part: str, path: str) -> str | int:
    """``part`` as a key of ``data``, which stands at ``path``."""
    if isinstance(data, dict):
        return part
    if not isinstance(data, list):
        raise PcqError(f"{path} is a single value, so there is no '{part}' in it")
    if not part.isdecimal() or int(part) >= len(data):
        raise PcqError(f"{path} has no item {part}", allowed=f"0 to {len(data) - 1}" if data else "")
    return int(part)
