"""YAML without surprises: text -> plain data and the line of everything in it (METHOD.md, trap 7).

YAML readers disagree about ``on``, ``1e-3``, ``012`` and about which of two equal keys wins; a recipe must mean one
thing. So the data is built here from PyYAML's parser events, and PyYAML resolves nothing. A plain scalar is

* ``true`` or ``false``: a boolean (``yes``, ``on``, ``True`` are text);
* decimal digits: an int; with a point or an exponent: a float, ``1e-3`` too;
* anything else, and everything in quotes: text.

Refused, each with its line: numbers that readers disagree on (``012``, ``0x1f``, ``1_000``), numbers that are not
finite, keys without a value, ``null``, duplicate keys, keys that are not text, anchors, aliases, merge keys, tags,
several documents, tabs, nesting deeper than ``DEPTH``, more than ``SIZE`` bytes, bytes that are not UTF-8.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from pcq.errors import PcqError, raise_all

Data: TypeAlias = bool | int | float | str | list["Data"] | dict[str, "Data"]
Place: TypeAlias = tuple[str | int, ...]
"""Keys and list indices that lead to a value."""

SIZE = 64_000
"""Bytes of the largest file that is read; PyYAML needs up to a second for it."""

DEPTH = 12
"""How many mappings and lists may stand inside one another."""

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(?=\.?[0-9])(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][-+]?[0-9]+)?")
_DISPUTED = re.compile(r"[-+]?(0[0-9_.]+([eE][-+]?[0-9]+)?|0[xob][0-9a-fA-F_]+|[0-9]+(:[0-5]?[0-9])+|[0-9]+(_[0-9]+)+)")
_UNSEEN = {
    "\x85\u2028\u2029": (
        "the line separator {}: YAML readers disagree whether a line ends there",
        "Delete it, or replace it with a line break",
    ),
    "\ufeff": ("a byte order mark ({}), which only the beginning of a file may have", "Delete it"),
    "\xa0": ("a no-break space ({}); YAML is indented with spaces", "Replace it with spaces"),
}
"""What no editor shows, and what to say of it."""

_ODD = re.compile("[\x85\u2028\u2029\ufeff]|^[ ]*\xa0", re.MULTILINE)
_LINE_END = re.compile(r"\r\n|\r|\n")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF|nan|NaN|NAN)")
_NULL = ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True)
class Document:
    """What a file says.

    Attributes:
        file: its name, for messages.
        data: the value; a refused part of it is an empty text.
        lines: the line of each place in ``data``, counted from 1: of its key, or of a list item's first character.
        refused: places whose value was refused, so that nobody complains about them twice.
        problems: what was refused, and why.
    """

    file: str
    data: Data
    lines: dict[Place, int]
    refused: frozenset[Place]
    problems: tuple[PcqError, ...]


def scalar(text: str) -> Data:
    """What a plain scalar means.

    Raises:
        PcqError: it is a number or a null that cannot be taken at its word.
    """
    if text in ("true", "false"):
        return text == "true"
    if text in _NULL:
        raise PcqError(
            f"{text} is not a value" if text else "a value is missing", todo="Give a value or leave out the key"
        )
    if _NOT_FINITE.fullmatch(text):
        raise PcqError(f"{text} is not a finite number")
    whole = _INT.fullmatch(text)
    if not whole and not _FLOAT.fullmatch(text):
        if _DISPUTED.fullmatch(text):
            raise PcqError(
                f"YAML readers disagree about what number {text} is",
                todo=f'Write it in plain decimal digits, or as the text "{text}"',
            )
        return text
    if len(text) > 40 or not math.isfinite(float(text)):
        raise PcqError(f"the number {text[:20]}{'…' * (len(text) > 20)} is too large")
    return int(text) if whole else float(text)


def read(path: Path) -> str:
    """The text of a file.

    Raises:
        PcqError: it cannot be read, is larger than ``SIZE``, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(SIZE + 1)
    except OSError as error:
        raise PcqError(f"the file cannot be read: {error.strerror or error}", where=str(path)) from None
    if len(raw) > SIZE:
        raise PcqError(f"the file is larger than {SIZE // 1000} kB; a recipe is a page of text", where=str(path))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{path}:{1 + raw.count(10, 0, error.start)}"
        found = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else f"byte 0x{raw[error.start]:02x}"
        raise PcqError(f"the file is not UTF-8 text ({found})", where=where, todo="Save it as UTF-8") from None


def parse(text: str, file: str) -> Document:
    """The one document in ``text``; ``file`` is its name for messages.

    Raises:
        PcqError: it cannot be read to its end; with it come the problems found before.
    """
    builder = _Builder(text, file)
    try:
        data = builder.document()
    except PcqError as error:
        raise_all([*builder.problems, error])
        raise
    return Document(file, data, builder.lines, frozenset(builder.refused), tuple(builder.problems))


class _Builder:
    """One pass over the parser's events."""

    def __init__(self, text: str, file: str) -> None:
        self.text, self.file = text, file
        self.lines: dict[Place, int] = {}
        self.refused: set[Place] = set()
        self.problems: list[PcqError] = []

    def events(self) -> Iterator[Any]:
        """PyYAML's events; what it cannot parse becomes a sentence."""
        if odd := _ODD.search(self.text):
            mark, line = odd[0][-1], len(_LINE_END.findall(self.text, 0, odd.start())) + 1
            what, todo = next(said for marks, said in _UNSEEN.items() if mark in marks)
            raise PcqError(what.format(f"U+{ord(mark):04X}"), where=f"{self.file}:{line}", todo=todo)
        try:
            yield from yaml.parse(self.text, Loader=yaml.SafeLoader)
        except yaml.reader.ReaderError as error:
            line = self.text.count("\n", 0, error.position) + 1
            what = f"a control character (0x{error.character:02x})"
            raise PcqError(what, where=f"{self.file}:{line}", todo="Delete it") from None
        except yaml.MarkedYAMLError as error:
            raise _syntax(error, self.file) from None

    def wrong(self, mark: Any, what: str, place: Place | None = None, **more: str) -> str:
        """Note a problem; the empty text that stands for the refused value."""
        self.problems.append(PcqError(what, where=f"{self.file}:{mark.line + 1}", **more))
        if place is not None:
            self.refused.add(place)
        return ""

    def stop(self, event: Any, what: str, todo: str) -> PcqError:
        """A problem after which nothing can be read."""
        return PcqError(what, where=f"{self.file}:{event.start_mark.line + 1}", todo=todo)

    def document(self) -> Data:
        events = self.events()
        data: Data = ""
        seen = 0
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                seen += 1
                if seen > 1:
                    raise self.stop(event, "a second document starts here", "Put one recipe in one file")
                data = self.value(next(events), events, ())
        if not seen or data == "":
            raise PcqError("there is nothing in it", where=self.file)
        return data

    def value(self, event: Any, events: Iterator[Any], place: Place) -> Data:
        mark = event.start_mark
        self.lines.setdefault(place, mark.line + 1)
        if len(place) > DEPTH:
            raise self.stop(event, f"more than {DEPTH} mappings and lists inside one another", "Make it simpler")
        if isinstance(event, yaml.AliasEvent):
            return self.wrong(
                mark,
                f"*{event.anchor} without quotes is a YAML alias, and aliases are not supported",
                place,
                todo=f'For a pattern write it in quotes: "*{event.anchor}"',
            )
        if event.anchor is not None:
            self.wrong(
                mark, f"the YAML anchor &{event.anchor} is not supported", todo="Write the value out in each place"
            )
        if event.tag is not None:
            self.wrong(mark, f"the YAML tag {_tag(event.tag)} is not supported", todo="Leave it out")
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event, place)
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Data] = []
            while not isinstance(event := next(events), yaml.SequenceEndEvent):
                items.append(self.value(event, events, (*place, len(items))))
            return items
        return self.mapping(events, place)

    def scalar(self, event: Any, place: Place) -> Data:
        if not event.implicit[0]:
            return str(event.value)
        try:
            return scalar(event.value)
        except PcqError as error:
            what, todo = error.what, error.todo
        if event.value in _NULL and place and isinstance(key := place[-1], str):
            what = f"`{key}` has no value"
            todo = "Put a space after the colon" if ":" in key else todo
        return self.wrong(event.start_mark, what, place, todo=todo)

    def mapping(self, events: Iterator[Any], place: Place) -> Data:
        entries: dict[str, Data] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            mark = event.start_mark
            if not isinstance(event, yaml.ScalarEvent) or (event.implicit[0] and event.value in _NULL):
                where = f"{self.file}:{mark.line + 1}"
                raise PcqError(
                    "a key must be a word", where=where, todo="Put text that starts with *, [ or { in quotes"
                )
            key, here = event.value, (*place, event.value)
            if event.anchor is not None or event.tag is not None:
                self.wrong(mark, f"the key {key} has an anchor or a tag", todo="Leave it out")
            if key == "<<":
                self.wrong(mark, "the YAML merge key << is not supported", todo="Write the entries out")
                self.skip(events)
            elif key in entries:
                self.wrong(mark, f"`{key}` is given twice, first on line {self.lines[here]}", todo="Delete one of them")
                self.skip(events)
            else:
                self.lines[here] = mark.line + 1
                entries[key] = self.value(next(events), events, here)
        return entries

    def skip(self, events: Iterator[Any]) -> None:
        """Read past a value whose key was refused already."""
        depth = 0
        for event in events:
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth == 0:
                return


def _tag(tag: str) -> str:
    """As it is written in a file."""
    return tag.replace("tag:yaml.org,2002:", "!!")


def _syntax(error: yaml.MarkedYAMLError, file: str) -> PcqError:
    """PyYAML's words for a syntax error, in ours."""
    mark = error.problem_mark or error.context_mark
    assert mark is not None, error
    problem, context = error.problem or "", error.context or ""
    opened = error.context_mark.line + 1 if error.context_mark else mark.line + 1
    what, todo = f"this is not YAML ({problem})", ""
    if "alias" in context:
        what, todo = "a * without quotes starts a YAML alias", 'Put the pattern in quotes, such as "*.bias"'
    elif "'\\t'" in problem or (mark.buffer and mark.buffer[mark.pointer : mark.pointer + 1] == "\t"):
        what, todo = "a tab; YAML is indented with spaces", "Replace it with spaces"
    elif "cannot start any token" in problem:
        what, todo = (
            f"{problem.removesuffix(' that cannot start any token')} at the start of a value",
            "Put it in quotes",
        )
    elif "mapping values are not allowed" in problem:
        what, todo = "a colon where none can be", "Check the indentation, and put text that holds a colon in quotes"
    elif "expected <block end>" in problem and "<scalar>" in problem:
        what, todo = "something follows a value that has ended", "Put the whole value into one pair of quotes"
    elif "expected <block end>" in problem:
        what, todo = "this line is indented differently from the lines it belongs with", "Align it with them"
    elif "could not find expected ':'" in problem:
        what, todo = "a key without a colon and a space behind it", "Write `key: value`"
    elif "escape" in problem:
        what, todo = f"{problem} in double quotes", "Write the value in single quotes"
    elif "quoted scalar" in context:
        what, todo = f"the quote opened on line {opened} is not closed", "Close it"
    elif "flow" in context:
        bracket = "[" if "sequence" in context else "{" if "mapping" in context else "bracket"
        what, todo = f"the {bracket} opened on line {opened} is not closed, or a comma is missing", "Close it"
    return PcqError(what, where=f"{file}:{mark.line + 1}", todo=todo)
