"""Check what a recipe file says: every mistake at once, each with its line and in plain words."""

import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from pydantic import ValidationError

from pcq.budget import parse_budget
from pcq.errors import PcqError, did_you_mean, raise_all
from pcq.recipe.schema import FORMAT, KINDS, RecipeFile, required, spelled_out
from pcq.recipe.strict_yaml import Data, Document, Place
from pcq.rules import Match, Rule
from pcq.settings import Finetune


def check(
    document: Document, wheres: Mapping[Place, str] | None = None, problems: Sequence[PcqError] = ()
) -> tuple[RecipeFile, tuple[str, ...]]:
    """The file, and where each of its rules stands.

    Args:
        document: what was read, overrides applied.
        wheres: the places that come from overrides, and from which.
        problems: what was wrong with the overrides.

    Raises:
        PcqError: all that is wrong, in the order of the lines.
    """
    data, said = document.data, dict(wheres or {})
    assert isinstance(data, dict), document
    spelled = spelled_out(data)
    found: list[_Problem] = []
    file = None
    try:
        file = RecipeFile.model_validate_json(json.dumps(spelled))
    except ValidationError as error:
        found = list(_sentences(error.errors(include_url=False), data))
        wrong = [problem.place for problem in found]
        found += [*_other_settings(spelled, wrong), *_other_fields(spelled, wrong)]
    found += _contradictions(spelled, {problem.meant for problem in found})
    meant = {problem.meant for problem in found}
    told = [
        PcqError(problem.what, where=_where(problem.place, document, said), allowed=problem.allowed, todo=problem.todo)
        for problem in found
        if not (problem.place in meant and problem.place != _place(data, problem.place))
        and not _refused(problem.place, document)
    ]
    raise_all(sorted([*document.problems, *told], key=_line) + list(problems))
    assert file is not None
    return file, tuple(_where(("rules", i), document, said) for i in range(len(file.rules)))


@dataclass(frozen=True)
class _Problem:
    """A mistake.

    Attributes:
        place: where it is in the data; for a missing key, where that would be.
        what, allowed, todo: as in PcqError.
        meant: the place that an unknown key was probably meant for.
    """

    place: Place
    what: str
    allowed: str = ""
    todo: str = ""
    meant: Place | None = None


def _refused(place: Place, document: Document) -> bool:
    """Whether its value, or the kind it is of, was refused already when the file was read."""
    return any(place[: len(refused)] == refused or refused == (*place, "kind") for refused in document.refused)


def _where(place: Place, document: Document, overrides: Mapping[Place, str]) -> str:
    """File and line of a place, or the override that it comes from."""
    for length in range(len(place), -1, -1):
        here = place[:length]
        if here in overrides:
            return overrides[here]
        if here in document.lines:
            return f"{document.file}:{document.lines[here]}"
        if (made := next((text for by, text in overrides.items() if by[:length] == here), "")) and length == len(place):
            return made
    return f"{document.file}, {'.'.join(map(str, place))}" if place else document.file


def _line(problem: PcqError) -> int:
    line = problem.where.rpartition(":")[2]
    return int(line) if line.isdecimal() else 10**9


def _place(data: Data, loc: Sequence[str | int]) -> Place:
    """The part of pydantic's location (in the spelled-out data, with tags between) that is in the data."""
    place: Place = ()
    for part in loc:
        if (isinstance(data, dict) and isinstance(part, str) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        ):
            place, data = (*place, part), data[part]  # type: ignore[index]
    return place


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dataclass_type": "a mapping",
}
"""Types of pydantic's errors that say what was expected."""

_YES, _NO = ("yes", "on", "true", "y"), ("no", "off", "false", "n")


def _sentences(errors: Sequence[Any], data: Data) -> Iterator[_Problem]:
    """Pydantic's errors in plain words."""
    expected: dict[Place, list[str]] = {}
    choices: dict[Place, list[str]] = {}
    found: dict[Place, Any] = {}
    for error in errors:
        kind, loc, context = error["type"], error["loc"], error.get("ctx", {})
        place = _place(data, loc)
        if kind == "literal_error" and loc != ("pcq",):
            choices[place] = [word or number for word, number in re.findall(r"'([^']*)'|(\d+)", context["expected"])]
            found[place] = error["input"]
        elif kind in _EXPECTED:
            expected.setdefault(place, []).append(_EXPECTED[kind])
            found[place] = error["input"]
        elif kind == "value_error" and loc == ("finetune",):
            yield from _unfit(context["error"])
        elif kind != "value_error" or not (len(loc) == 2 and loc[0] == "rules"):
            yield _sentence(kind, loc, place, context, error["input"])
    for place in {**expected, **choices}:
        if place in choices and any(other[: len(place)] == place != other for other in expected):
            continue
        yield _unexpected(place, expected.get(place, []), choices.get(place, []), found[place])


def _unfit(error: ValueError) -> Iterator[_Problem]:
    """Settings of ``finetune`` out of range, or against one another, as they say it themselves."""
    for what in str(error).split("\n"):
        yield _Problem(("finetune", what.split()[0]), what)


def _unexpected(place: Place, expected: Sequence[str], choices: Sequence[str], found: Any) -> _Problem:
    """A value of the wrong type, or not one of those allowed."""
    key = _key(place)
    if key == "match":
        expected = ["a pattern, first, last, or a mapping of predicates"]
    wanted = " or ".join([*expected, *([f"one of {', '.join(choices)}"] if len(choices) > 1 else choices)])
    todo = did_you_mean(found, choices) if isinstance(found, str) else ""
    if expected == ["text"] and isinstance(found, int | float):
        todo = f'Put it in quotes: "{_said(found)}"'
    if expected == ["true or false"] and str(found).lower() in (*_YES, *_NO):
        todo = f"Write {str(found.lower() in _YES).lower()}"
    subject = f"each item of `{key}`" if place and isinstance(place[-1], int) and key != "rules" else f"`{key}`"
    subject = "a rule" if key == "rules" and isinstance(place[-1], int) else subject
    return _Problem(place, f"{subject} has to be {wanted}, not {_said(found)}", todo=todo)


def _sentence(kind: str, loc: Sequence[Any], place: Place, context: Mapping[str, Any], found: Any) -> _Problem:
    """Any other mistake."""
    key = str(loc[-1]) if loc else ""
    match kind:
        case "missing" if place == ():
            says = "the format of the recipe" if key == "pcq" else "what to do with which weights"
            todo = f"Write `pcq: {FORMAT}` on the first line" if key == "pcq" else "Write `rules:` and a list of rules"
            return _Problem((key,), f"`{key}` is missing, {says}", todo=todo)
        case "missing" if "levels" in loc:
            example = ", ".join(f"{k}: {v}" for k, v in required(loc[-2]).items())
            todo = f"Write as in `levels: {{kind: {loc[-2]}, {example}}}`"
            return _Problem((*place, key), f"levels of kind {loc[-2]} need `{key}`", todo=todo)
        case "missing":
            todo = 'Say which weights it is for; `match: "*"` is all of them'
            return _Problem((*place, key), f"this rule has no `{key}`", todo=todo)
        case "extra_forbidden" | "unexpected_keyword_argument":
            holder, known = _known(loc)
            hint = did_you_mean(key, known)
            if known == ["kind"]:
                return _Problem(place, f"{holder} have no `{key}`, or anything else to set", todo="Leave it out")
            meant = (*place[:-1], hint.split("'")[1]) if hint else None
            return _Problem(place, f"there is no `{key}` in {holder}", ", ".join(known), hint, meant)
        case "union_tag_invalid":
            hint = did_you_mean(context["tag"], KINDS)
            what = f"there is no kind of levels '{context['tag']}'"
            return _Problem(place, what, ", ".join(KINDS), hint)
        case "union_tag_not_found" if isinstance(found, dict):
            return _Problem((*place, "kind"), "`levels` needs a `kind`", ", ".join(KINDS))
        case "union_tag_not_found":
            bits = isinstance(found, int) and 1 <= found <= 8
            todo = f"Write `levels: {{kind: uniform, bits: {found}}}`" if bits else ""
            what = f"`levels` has to be a kind or a mapping with `kind`, not {_said(found)}"
            return _Problem(place, what, ", ".join(KINDS), todo)
        case "literal_error":
            newer = isinstance(found, int) and found > FORMAT
            what = f"this pcq reads recipes of format {FORMAT}, not {_said(found)}"
            return _Problem(place, what, todo="Update pcq" if newer else f"Write `pcq: {FORMAT}`")
        case "string_pattern_mismatch":
            what = f"`{key}` becomes part of file names and can hold letters, digits and . _ + - only"
            return _Problem(place, what)
        case "value_error":
            what = str(context["error"])
            return _Problem((*place, what.split()[0]), what)
        case "json_invalid":
            return _Problem((), "a text holds half a character (a lone surrogate)", todo="Save it as UTF-8")
    raise AssertionError(kind)


def _known(loc: Sequence[Any]) -> tuple[str, list[str]]:
    """What holds the key at pydantic's location ``loc``, and the keys it may have."""
    match tuple(loc):
        case ("finetune", _):
            return "`finetune`", [each.name for each in fields(Finetune)]
        case (_,):
            return "a recipe", list(RecipeFile.model_fields)
        case ("rules", _, _):
            return "a rule", [each.name for each in fields(Rule)]
        case ("rules", _, "match", *_):
            return "`match`", [each.name for each in fields(Match)]
    assert loc[2] == "levels", loc
    return f"levels of kind {loc[3]}", ["kind", *(each.name for each in fields(KINDS[loc[3]]))]


def _other_settings(spelled: Mapping[str, Data], wrong: Sequence[Place]) -> Iterator[_Problem]:
    """Settings of ``finetune`` out of range beside another mistake: they complain only once all of them are right."""
    settings = spelled.get("finetune")
    refused = {part for place in wrong if place[:1] == ("finetune",) for part in place[1:2]}
    if isinstance(settings, dict) and refused:
        known = {each.name for each in fields(Finetune)}
        sound: dict[str, Any] = {name: settings[name] for name in settings if name in known - refused}
        try:
            Finetune(**sound)
        except ValueError as error:
            yield from _unfit(error)


def _other_fields(spelled: Mapping[str, Data], wrong: Sequence[Place]) -> Iterator[_Problem]:
    """Values out of range beside another mistake: a quantizer is built, and complains, only once all else is right."""
    rules = spelled.get("rules")
    for i, rule in enumerate(rules if isinstance(rules, list) else []):
        levels = rule.get("levels") if isinstance(rule, dict) else None
        kind = levels.get("kind") if isinstance(levels, dict) else None
        if not isinstance(levels, dict) or not isinstance(kind, str) or kind not in KINDS:
            continue
        for name, value in levels.items():
            place: Place = ("rules", i, "levels", name)
            known = name in {each.name for each in fields(KINDS[kind])}
            if not known or any(other[:4] == place for other in wrong):
                continue
            try:
                replace(KINDS[kind], **{name: tuple(value) if isinstance(value, list) else value})  # type: ignore[arg-type]
            except ValueError as error:
                yield _Problem(place, str(error))


def _contradictions(spelled: Mapping[str, Data], meant: Container[Place | None]) -> Iterator[_Problem]:
    """What is wrong between the keys of a rule, and lists of nothing."""
    said = spelled.get("pcq")
    if said == FORMAT and type(said) is not int:  # pydantic takes true and 1.0 for 1
        what = f"this pcq reads recipes of format {FORMAT}, not {_said(said)}"
        yield _Problem(("pcq",), what, todo=f"Write `pcq: {FORMAT}`")
    budget = spelled.get("budget")
    if isinstance(budget, str):
        try:
            parse_budget(budget)
        except PcqError as error:
            yield _Problem(("budget",), error.what, error.allowed)
    rules = spelled.get("rules")
    if rules == []:
        yield _Problem(("rules",), "`rules` is an empty list", todo="Write at least one rule")
    for i, rule in enumerate(rules if isinstance(rules, list) else []):
        if not isinstance(rule, dict):
            continue
        place: Place = ("rules", i)
        given = {**rule, **{key: "" for key in ("levels", "keep") if (*place, key) in meant}}
        for what in Rule.contradictions(given):
            key = what.split("`")[1] if what.startswith("`") else ""
            yield _Problem((*place, key) if key in rule else place, what)
        match = rule.get("match")
        if match == []:
            yield _Problem((*place, "match"), "`match` is an empty list", todo='`match: "*"` matches everything')
        for j, each in enumerate(match if isinstance(match, list) else []):
            for key in [k for k, v in each.items() if v == [] and len(each) > 1] if isinstance(each, dict) else []:
                yield _Problem((*place, "match", j, key), f"`{key}` is an empty list", todo="Leave it out")


def _key(place: Place) -> str:
    """The innermost key."""
    return next((part for part in reversed(place) if isinstance(part, str)), "the recipe")


def _said(value: Any) -> str:
    """A value in a message."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"'{value if len(value) <= 40 else value[:40] + '…'}'"
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list | tuple) else str(value)
