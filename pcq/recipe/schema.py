"""What a recipe file may say: the dataclasses as pydantic reads them, and the JSON Schema for editors.

A file may use short forms, which :func:`spelled_out` writes out: a pattern or a position for ``match``, one value where
several are possible, and the name of a kind of levels that needs no more.
"""

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, StringConstraints, Tag, WrapValidator

from pcq.quantizers import (
    AdditivePowersOfTwo,
    Binary,
    Fixed,
    KMeans,
    LeastSquaresBinary,
    Quantizer,
    Ternary,
    Uniform,
)
from pcq.recipe.strict_yaml import Data
from pcq.rules import Match, Position, Rule
from pcq.settings import Finetune

FORMAT = 1
"""The recipe format, a file's ``pcq: 1``."""

KINDS: dict[str, Quantizer] = {
    "binary": Binary(),
    "ternary": Ternary(),
    "lsb": LeastSquaresBinary(bits=2),
    "uniform": Uniform(bits=4),
    "kmeans": KMeans(levels=16),
    "apot": AdditivePowersOfTwo(bits=8),
    "fixed": Fixed(levels="nf4"),
}
"""The word for each kind of levels, and an example of it."""
assert {type(example) for example in KINDS.values()} == set(get_args(Quantizer))


LISTS = tuple(each.name for each in fields(Match) if each.default == ())
"""The predicates that take several values."""


def kind_of(quantizer: Quantizer) -> str:
    """Its word."""
    return next(kind for kind, example in KINDS.items() if type(example) is type(quantizer))


def _without_kind(value: Any, validate: Any) -> Any:
    return validate({k: tuple(v) if isinstance(v, list) else v for k, v in value.items() if k != "kind"})


if TYPE_CHECKING:
    Levels = Quantizer
else:
    Levels = Annotated[
        Union[tuple(Annotated[type(e), WrapValidator(_without_kind), Tag(kind)] for kind, e in KINDS.items())],  # noqa: UP007
        Discriminator(lambda value: value.get("kind") if isinstance(value, dict) else None),
    ]


@dataclass(frozen=True)
class _Rule(Rule):
    """A rule whose ``kind`` tells which quantizer is meant."""

    levels: Levels | None = None


class RecipeFile(BaseModel):
    """A recipe with everything spelled out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    pcq: Literal[1]
    name: Annotated[str, StringConstraints(pattern=r"^[\w.+-]+$")] | None = None
    rules: tuple[_Rule, ...]
    finetune: Finetune | None = None
    budget: str | None = None


def spell_out(key: str, value: Data) -> Data:
    """The value of ``match`` or ``levels`` in full, if it is short for a mapping."""
    if isinstance(value, str) and key == "match":
        return {"position" if value in get_args(Position) else "name": value}
    if isinstance(value, str) and key == "levels":
        return {"kind": value}
    return value


def spelled_out(data: Mapping[str, Data]) -> dict[str, Data]:
    """The whole file in full."""
    rules = data.get("rules")
    if not isinstance(rules, list):
        return dict(data)
    return {**data, "rules": [_rule_spelled_out(rule) if isinstance(rule, dict) else rule for rule in rules]}


def _rule_spelled_out(rule: dict[str, Data]) -> Data:
    rule = {key: spell_out(key, value) if key == "levels" else value for key, value in rule.items()}
    if "match" in rule:
        match = rule["match"]
        given = [spell_out("match", each) for each in (match if isinstance(match, list) else [match])]
        rule["match"] = [
            {k: v if isinstance(v, list) or k not in LISTS else [v] for k, v in each.items()}
            if isinstance(each, dict)
            else each
            for each in given
        ]
    return rule


def required(kind: str) -> dict[str, Any]:
    """The fields that a kind of levels cannot do without, as in its example."""
    example = KINDS[kind]
    return {each.name: getattr(example, each.name) for each in fields(example) if each.default is MISSING}


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file, short forms included, for editors (``recipes/schema.json``)."""
    schema = json.loads(json.dumps(RecipeFile.model_json_schema()).replace(_Rule.__name__, Rule.__name__))
    definitions: dict[str, Any] = schema.pop("$defs")
    for kind, example in KINDS.items():
        made = definitions[type(example).__name__]
        made["properties"] = {"kind": {"const": kind}, **made["properties"]}
        made["required"] = ["kind", *required(kind)]
    for described in (Match, Rule, Finetune, *map(type, KINDS.values())):
        _describe(definitions[described.__name__], described)
    match, rule = definitions["Match"], definitions["Rule"]
    match["minProperties"] = 1
    for key in LISTS:
        match["properties"][key] = _one_or_several(match["properties"][key])
    rule["properties"]["match"] = _one_or_several(
        {"items": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Match"}]}}, rule["properties"]["match"]
    )
    words = [kind for kind in KINDS if not required(kind)]
    levels = [{"$ref": f"#/$defs/{type(example).__name__}"} for example in KINDS.values()]
    rule["properties"]["levels"] |= {"anyOf": [{"enum": words}, *levels]}
    rule["oneOf"] = [{"required": ["levels"]}, {"required": ["keep"]}]
    schema["properties"]["rules"]["minItems"] = 1
    schema["properties"]["budget"]["description"] = "Choose the levels so that it fits: 3MB, 900kB, 2.5bits."
    schema |= {"title": "pcq recipe", "description": "What pcq does with which weights.", "$defs": definitions}
    plain = _plain({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})
    assert isinstance(plain, dict)
    return plain


def _one_or_several(items: dict[str, Any], described: dict[str, Any] | None = None) -> dict[str, Any]:
    several = {"type": "array", "items": items["items"], "minItems": 1}
    about = {key: value for key, value in (described or items).items() if key == "description"}
    return {"anyOf": [items["items"], several], **about}


def _describe(made: dict[str, Any], described: type) -> None:
    """Descriptions from the docstring: its first paragraph, and each entry under ``Attributes:``."""
    text = (inspect.getdoc(described) or "").replace("``", "`")
    about, _, attributes = text.partition("Attributes:")
    made["description"] = " ".join(about.partition("\n\n")[0].split())
    for name, said in re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE):
        if name in made["properties"]:
            made["properties"][name]["description"] = " ".join(said.split())


def _plain(node: Any) -> Any:
    """The schema without what only pydantic needs: titles of fields, and null, which a recipe cannot say."""
    if isinstance(node, list):
        return [_plain(each) for each in node if each != {"type": "null"}]
    if not isinstance(node, dict):
        return node
    kept = {k: _plain(v) for k, v in node.items() if not (k == "default" and v in (None, []))}
    for field in kept.get("properties", {}).values():
        field.pop("title", None)
    options = kept.get("anyOf", ())
    if len(options) == 1:
        kept = {**options[0], **{k: v for k, v in kept.items() if k != "anyOf"}}
    return kept
