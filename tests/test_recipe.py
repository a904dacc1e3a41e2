"""Recipes: strict YAML, every mistake at once in plain words, overrides, and the round trip through JSON."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcq.errors import PcqError, Problems
from pcq.quantizers import Binary, Fixed, KMeans, LeastSquaresBinary, Quantizer, Ternary, Uniform
from pcq.recipe import Recipe, load_recipe, parse_recipe, shipped_text
from pcq.recipe.schema import KINDS
from pcq.recipe.strict_yaml import SIZE, parse, scalar
from pcq.rules import Kind, Match, Position, Rule, Shape

KINDS_ALLOWED = "Allowed: binary, ternary, lsb, uniform, kmeans, apot, fixed."
QUOTE_STAR = 'Put the pattern in quotes, such as "*.bias".'


def rules(*lines: str) -> str:
    return "pcq: 1\nrules:\n" + "".join(f"  {line}\n" for line in lines)


def complaint(text: str, overrides: Sequence[str] = ()) -> list[str]:
    with pytest.raises(PcqError) as caught:
        parse_recipe(text, "r.yaml", overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


BAD: dict[str, tuple[str, list[str]]] = {
    # the file
    "empty": ("", ["r.yaml: there is nothing in it."]),
    "comments only": ("# ternary\n\n# weights\n", ["r.yaml: there is nothing in it."]),
    "a word": ("ternary\n", ["r.yaml: a recipe is a mapping with the keys `pcq` and `rules`"]),
    "a list": ("- match: first\n", ["r.yaml: a recipe is a mapping with the keys `pcq` and `rules`"]),
    "two documents": (
        rules("- match: first", "  levels: binary") + "---\npcq: 1\n",
        ["r.yaml:5: a second document starts here. Put one recipe in one file."],
    ),
    "tab": (
        "pcq: 1\nrules:\n\t- match: first\n",
        ["r.yaml:3: a tab; YAML is indented with spaces. Replace it with spaces."],
    ),
    "line separator": (
        "pcq: 1\r\n# so\u2028called\r\nrules: []\r\n",
        [
            "r.yaml:2: the line separator U+2028: YAML readers disagree whether a line ends there. "
            "Delete it, or replace it with a line break."
        ],
    ),
    "next line": (
        rules('- match: "a\x85b"', "  levels: binary"),
        [
            "r.yaml:3: the line separator U+0085: YAML readers disagree whether a line ends there. "
            "Delete it, or replace it with a line break."
        ],
    ),
    "byte order mark": (
        "pcq: 1\n\ufeffrules: []\n",
        ["r.yaml:2: a byte order mark (U+FEFF), which only the beginning of a file may have. Delete it."],
    ),
    "no-break space": (
        "pcq: 1\nrules:\n \xa0- match: first\n",
        ["r.yaml:3: a no-break space (U+00A0); YAML is indented with spaces. Replace it with spaces."],
    ),
    "control character": ("pcq: 1\nrules: \x07\n", ["r.yaml:2: a control character (0x07). Delete it."]),
    "too deep": (
        "pcq: 1\nrules: " + "[" * 40,
        ["r.yaml:2: more than 12 mappings and lists inside one another. Make it simpler."],
    ),
    "unclosed quote": (
        rules("- match: 'first", "  levels: binary"),
        ["r.yaml:5: the quote opened on line 3 is not closed. Close it."],
    ),
    "unclosed bracket": (
        rules("- match: first", "  levels: {kind: uniform, bits: 3"),
        ["r.yaml:5: the { opened on line 4 is not closed, or a comma is missing. Close it."],
    ),
    "colon in text": (
        rules("- match: first", "  keep: note: fragile"),
        ["r.yaml:4: a colon where none can be. Check the indentation, and put text that holds a colon in quotes."],
    ),
    "bad indent": (
        "pcq: 1\nrules:\n  - match: first\n    keep: x\n - match: last\n",
        ["r.yaml:5: this line is indented differently from the lines it belongs with. Align it with them."],
    ),
    "no space after a colon": (
        "pcq: 1\nrules:\n  - match: {type:conv}\n    levels: binary\n",
        ["r.yaml:3: `type:conv` has no value. Put a space after the colon."],
    ),
    "text after a quote": (
        rules("- match: 'a' b", "  keep: x"),
        ["r.yaml:3: something follows a value that has ended. Put the whole value into one pair of quotes."],
    ),
    "escape": (
        rules(r'- match: "a\.b"', "  keep: x"),
        ["r.yaml:3: found unknown escape character '.' in double quotes. Write the value in single quotes."],
    ),
    "unquoted at": (
        rules("- match: @first", "  keep: x"),
        ["r.yaml:3: found character '@' at the start of a value. Put it in quotes."],
    ),
    # YAML that readers disagree about
    "unquoted star": (
        rules("- match: *", "  levels: binary"),
        [f"r.yaml:3: a * without quotes starts a YAML alias. {QUOTE_STAR}"],
    ),
    "unquoted pattern": (
        rules("- match: *.bias", "  levels: binary"),
        [f"r.yaml:3: a * without quotes starts a YAML alias. {QUOTE_STAR}"],
    ),
    "alias": (
        rules("- match: *conv", "  levels: binary"),
        [
            "r.yaml:3: *conv without quotes is a YAML alias, and aliases are not supported. "
            'For a pattern write it in quotes: "*conv".'
        ],
    ),
    "anchor and merge": (
        rules("- &a", "  match: first", "  levels: binary", "- <<: *a", "  match: last", "  keep: x"),
        [
            "r.yaml:3: the YAML anchor &a is not supported. Write the value out in each place.",
            "r.yaml:6: the YAML merge key << is not supported. Write the entries out.",
        ],
    ),
    "tag": (
        rules("- match: !!python/name:os.system first", "  levels: binary"),
        ["r.yaml:3: the YAML tag !!python/name:os.system is not supported. Leave it out."],
    ),
    "duplicate key": (
        rules("- match: first", "  levels: binary", "  match: last"),
        ["r.yaml:5: `match` is given twice, first on line 3. Delete one of them."],
    ),
    "octal": (
        rules("- match: first", "  levels: binary", "  group: 012"),
        [
            "r.yaml:5: YAML readers disagree about what number 012 is. "
            'Write it in plain decimal digits, or as the text "012".'
        ],
    ),
    "no value": (
        rules("- match: first", "  levels: binary", "  group:"),
        ["r.yaml:5: `group` has no value. Give a value or leave out the key."],
    ),
    "null": (
        rules("- match: first", "  levels: binary", "  group: null"),
        ["r.yaml:5: `group` has no value. Give a value or leave out the key."],
    ),
    "key is a list": (
        rules("- {[a]: b}"),
        ["r.yaml:3: a key must be a word. Put text that starts with *, [ or { in quotes."],
    ),
    "infinity": (
        rules("- match: first", "  levels: {kind: fixed, levels: [-.inf, 1]}"),
        ["r.yaml:4: -.inf is not a finite number."],
    ),
    "overflow": (
        rules("- match: first", "  levels: {kind: fixed, levels: [1e999, 1]}"),
        ["r.yaml:4: the number 1e999 is too large."],
    ),
    "yes is not true": (
        rules("- match: first", "  levels: binary", "  optional: yes"),
        ["r.yaml:5: `optional` has to be true or false, not 'yes'. Write true."],
    ),
    "1e1 is not whole": (
        rules("- match: first", "  levels: binary", "  group: 1e1"),
        ["r.yaml:5: `group` has to be a whole number, not 10.0."],
    ),
    "true is not a number": (
        rules("- match: first", "  levels: binary", "  group: true"),
        ["r.yaml:5: `group` has to be a whole number, not true."],
    ),
    "text is not a number": (
        rules("- match: first", "  levels:", "    kind: uniform", '    bits: "3"'),
        ["r.yaml:6: `bits` has to be a whole number, not '3'."],
    ),
    "number is not text": (
        rules("- match: {name: [a, 2]}", "  levels: binary"),
        ['r.yaml:3: each item of `name` has to be text, not 2. Put it in quotes: "2".'],
    ),
    # the recipe
    "no format": (
        "rules:\n  - match: first\n    levels: binary\n",
        ["r.yaml:1: `pcq` is missing, the format of the recipe. Write `pcq: 1` on the first line."],
    ),
    "newer format": (
        "pcq: 2\nrules:\n  - match: first\n    levels: binary\n",
        ["r.yaml:1: this pcq reads recipes of format 1, not 2. Update pcq."],
    ),
    "format true": (
        "pcq: true\nrules:\n  - match: first\n    levels: binary\n",
        ["r.yaml:1: this pcq reads recipes of format 1, not true. Write `pcq: 1`"],
    ),
    "format 1.0": (
        "pcq: 1.0\nrules:\n  - match: first\n    levels: binary\n",
        ["r.yaml:1: this pcq reads recipes of format 1, not 1.0. Write `pcq: 1`"],
    ),
    "no rules": (
        "pcq: 1\n",
        ["r.yaml:1: `rules` is missing, what to do with which weights. Write `rules:` and a list of rules."],
    ),
    "rules empty": ("pcq: 1\nrules: []\n", ["r.yaml:2: `rules` is an empty list. Write at least one rule."]),
    "rules a word": ("pcq: 1\nrules: ternary\n", ["r.yaml:2: `rules` has to be a list, not 'ternary'."]),
    "rule a word": (rules("- ternary"), ["r.yaml:3: a rule has to be a mapping, not 'ternary'."]),
    "unknown section": (
        rules("- match: first", "  levels: binary") + "rule: 3\n",
        [
            "r.yaml:5: there is no `rule` in a recipe. Allowed: pcq, name, rules, finetune, budget. "
            "Did you mean 'rules'?"
        ],
    ),
    "hostile name": (
        "name: ../../x\n" + rules("- match: first", "  levels: binary"),
        ["r.yaml:1: `name` becomes part of file names and can hold letters, digits and . _ + - only."],
    ),
    "unknown key": (
        rules("- match: first", "  level: binary"),
        [
            "r.yaml:4: there is no `level` in a rule. "
            "Allowed: match, levels, keep, per, group, optional. Did you mean 'levels'?"
        ],
    ),
    "no match": (
        rules("- levels: binary"),
        ['r.yaml:3: this rule has no `match`. Say which weights it is for; `match: "*"` is all of them.'],
    ),
    "neither levels nor keep": (
        rules("- match: first"),
        ["r.yaml:3: a rule needs `levels`, or `keep` with the reason to stay float."],
    ),
    "levels and keep": (
        rules("- match: first", "  levels: binary", "  keep: x"),
        ["r.yaml:3: a rule has `levels` or `keep`, not both."],
    ),
    "keep without a reason": (
        rules("- match: first", "  keep: ' '"),
        ["r.yaml:4: `keep` needs the reason to stay float."],
    ),
    "keep with a group": (
        rules("- match: first", "  keep: x", "  group: 8"),
        ["r.yaml:3: `per` and `group` say how levels are shared, and this rule has no `levels`"],
    ),
    "group of a tensor": (
        rules("- match: first", "  levels: binary", "  per: tensor", "  group: 8"),
        ["r.yaml:6: `group` cuts each channel, so it cannot go with `per: tensor`"],
    ),
    "group 0": (
        rules("- match: first", "  levels: binary", "  group: 0"),
        ["r.yaml:5: `group` has to be 1 or more, not 0."],
    ),
    "unknown kind": (
        rules("- match: first", "  levels: ternery"),
        [f"r.yaml:4: there is no kind of levels 'ternery'. {KINDS_ALLOWED} Did you mean 'ternary'?"],
    ),
    "no kind": (
        rules("- match: first", "  levels: {bits: 3}"),
        [f"r.yaml:4: `levels` needs a `kind`. {KINDS_ALLOWED}"],
    ),
    "levels a number": (
        rules("- match: first", "  levels: 4"),
        [
            f"r.yaml:4: `levels` has to be a kind or a mapping with `kind`, not 4. {KINDS_ALLOWED} "
            "Write `levels: {kind: uniform, bits: 4}`"
        ],
    ),
    "kind without its field": (
        rules("- match: first", "  levels: uniform"),
        ["r.yaml:4: levels of kind uniform need `bits`. Write as in `levels: {kind: uniform, bits: 4}`"],
    ),
    "unknown field of a kind": (
        rules("- match: first", "  levels: {kind: uniform, bit: 3}"),
        [
            "r.yaml:4: there is no `bit` in levels of kind uniform. "
            "Allowed: kind, bits, symmetric, scale. Did you mean 'bits'?"
        ],
    ),
    "field of a kind without any": (
        rules("- match: first", "  levels: {kind: binary, bits: 2}"),
        ["r.yaml:4: levels of kind binary have no `bits`, or anything else to set. Leave it out."],
    ),
    "unknown choice": (
        rules("- match: first", "  levels: {kind: uniform, bits: 3, scale: absmx}"),
        ["r.yaml:4: `scale` has to be one of mse, absmax, mean, not 'absmx'. Did you mean 'absmax'?"],
    ),
    "neither a list nor nf4": (
        rules("- match: first", "  levels: {kind: fixed, levels: nf3}"),
        ["r.yaml:4: `levels` has to be a list or nf4, not 'nf3'. Did you mean 'nf4'?"],
    ),
    "not a number in a list": (
        rules("- match: first", "  levels: {kind: fixed, levels: [-1, one]}"),
        ["r.yaml:4: each item of `levels` has to be a number, not 'one'."],
    ),
    "match a number": (
        rules("- match: 3", "  levels: binary"),
        ["r.yaml:3: `match` has to be a pattern, first, last, or a mapping of predicates, not 3."],
    ),
    "match of nothing": (
        rules("- match: []", "  levels: binary"),
        ['r.yaml:3: `match` is an empty list. `match: "*"` matches everything.'],
    ),
    "no predicates": (
        rules("- match: {}", "  levels: binary"),
        ['r.yaml:3: a match needs at least one predicate; the name "*" matches everything.'],
    ),
    "a predicate of nothing": (
        rules("- match: {type: conv, name: []}", "  levels: binary"),
        ["r.yaml:3: `name` is an empty list. Leave it out."],
    ),
    "unknown predicate": (
        rules("- match: {typ: conv}", "  levels: binary"),
        [
            "r.yaml:3: there is no `typ` in `match`. "
            "Allowed: name, type, position, shape, min_size, max_size. Did you mean 'type'?"
        ],
    ),
    "unknown position": (
        rules("- match: {position: frist}", "  levels: binary"),
        ["r.yaml:3: `position` has to be one of first, last, not 'frist'. Did you mean 'first'?"],
    ),
    "unknown shape": (
        rules("- match: {shape: [pointwise, 1x1]}", "  levels: binary"),
        ["r.yaml:3: each item of `shape` has to be one of depthwise, pointwise, not '1x1'."],
    ),
    "negative size": (
        rules("- match: {min_size: -1}", "  levels: binary"),
        ["r.yaml:3: min_size has to be 0 or more, not -1."],
    ),
    "sizes crossed": (
        rules("- match: {min_size: 9, max_size: 8}", "  levels: binary"),
        ["r.yaml:3: max_size has to be min_size or more, not 8."],
    ),
}


@pytest.mark.parametrize(("text", "expected"), BAD.values(), ids=BAD)
def test_a_mistake_is_told_with_its_line_and_what_to_do(text: str, expected: list[str]) -> None:
    assert complaint(text) == expected


def test_all_mistakes_of_a_file_are_told_together_in_the_order_of_its_lines() -> None:
    text = """rules:
  - match: frist
    levels: ternery
    per: row
  - match: {typ: conv, min_size: many}
    levels: {kind: lsb, bits: 9, refine: -1, bit: 3}
    group: 012
    group: 3
  - macth: last
    levels: {kind: uniform, bits: 3, symmetric: on}
  - match: "*"
    levels: [ternary]
    keep: because
tuning: {}
"""
    lines = complaint(text)
    assert [int(line.split(":")[1]) for line in lines] == [1, 3, 4, 5, 5, 6, 6, 6, 7, 8, 9, 10, 11, 12, 14]
    with pytest.raises(Problems) as caught:
        parse_recipe(text, "r.yaml")
    assert len(caught.value.problems) == 15


def test_a_mistake_is_not_told_twice() -> None:
    """An unknown key that was meant for a required one, or a refused value, is one mistake."""
    assert len(complaint(rules("- macth: first", "  levels: {kind: uniform, bitts: 3}"))) == 2
    assert len(complaint(rules("- match: *q", "  levels: {kind: *q, bits: 3}"))) == 2


def test_range_mistakes_are_told_beside_others() -> None:
    told = complaint(rules("- match: first", "  levels: {kind: lsb, bits: 9, refine: -1, x: 1}"))
    assert told == [
        "r.yaml:4: there is no `x` in levels of kind lsb. Allowed: kind, bits, refine.",
        "r.yaml:4: bits has to be a whole number from 1 to 4, not 9.",
        "r.yaml:4: refine has to be a whole number from 0 to 1000, not -1.",
    ]
    told = complaint(
        rules("- match: first", "  levels: ternary")
        + "finetune:\n  refit: -1\n  epochs: 3\n  lr: fast\n  steps: 2\n  sed: 3\n  freeze: [1]\n  clip: -1\n"
    )
    assert told[0] == "r.yaml:6: refit is -1, which has to be 0 or a number of steps."
    assert told[2:] == [
        "r.yaml:9: steps and epochs both say how long to train; keep one of them.",
        told[3],
        'r.yaml:11: each item of `freeze` has to be text, not 1. Put it in quotes: "1".',
        "r.yaml:12: clip is -1, which has to be 0 or more, and finite.",
    ]
    assert "`lr` has to be a number" in told[1]
    assert "there is no `sed`" in told[3]


# What scalars mean


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True), ("false", False), ("0", 0), ("-0", 0), ("+7", 7), ("12", 12), ("1e-3", 1e-3), ("1E3", 1e3),
        ("0.3", 0.3), ("-0.3", -0.3), (".5", 0.5), ("1.", 1.0), ("-1.5e+2", -150.0), ("0e0", 0.0),
    ],
)  # fmt: skip
def test_plain_scalars_of_yaml_1_2(text: str, value: Any) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


TEXTS = "on off yes no Yes True TRUE y n e3 1e . - + -. 1x1 1.2.3 2026-11-23 = a_1 0x".split()  # noqa: SIM905
DISPUTED = "012 -012 00 01.5 0x1F 0o17 0b1 1_000 1:30 .inf -.INF .nan ~ null Null 1e999".split()  # noqa: SIM905


@pytest.mark.parametrize("text", TEXTS)
def test_everything_else_is_text(text: str) -> None:
    assert scalar(text) == text


@pytest.mark.parametrize("text", DISPUTED)
def test_what_yaml_readers_disagree_about_is_refused(text: str) -> None:
    with pytest.raises(PcqError):
        scalar(text)


def test_quoted_scalars_are_text() -> None:
    assert parse("[\"1\", 'true', \"null\", '']", "f").data == ["1", "true", "null", ""]


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(deadline=None)
def test_every_float_is_read_back(value: float) -> None:
    assert scalar(repr(value)) == value


@given(st.integers(-(10**30), 10**30))
@settings(deadline=None)
def test_every_integer_is_read_back(value: int) -> None:
    assert scalar(str(value)) == value


DATA = st.recursive(
    st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=80), inner, max_size=3),
    max_leaves=8,  # a key in YAML has at most 1024 characters, and JSON takes up to 12 for one
)


@given(DATA)
@settings(deadline=None)
def test_json_is_yaml(data: Any) -> None:
    """So the recipe in an artifact is a recipe file."""
    document = parse(json.dumps([data]), "f")
    assert document.problems == ()
    assert json.loads(json.dumps(document.data)) == [data]


# Files


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    def told(raw: bytes) -> str:
        (tmp_path / "r.yaml").write_bytes(raw)
        with pytest.raises(PcqError) as caught:
            load_recipe(tmp_path / "r.yaml")
        return str(caught.value).removeprefix(f"{tmp_path}/r.yaml")

    good = rules("- match: first", "  levels: binary")
    assert told(good.encode("utf-16")) == ":1: the file is not UTF-8 text (UTF-16). Save it as UTF-8."
    assert told(b"pcq: 1\n# \xe9t\xe9\n") == ":2: the file is not UTF-8 text (byte 0xe9). Save it as UTF-8."
    assert told(b"# " + b"x" * SIZE) == ": the file is larger than 64 kB; a recipe is a page of text."


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    text = "# For windows.\n" + rules("- match: first", "  levels: binary")
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    (tmp_path / "s.yml").write_text(text)
    assert load_recipe(tmp_path / "r.yaml").rules == load_recipe(tmp_path / "s.yml").rules
    assert load_recipe(tmp_path / "r.yaml").description == "For windows."


def test_a_file_comes_before_a_shipped_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = load_recipe("ternary.yaml")
    assert shipped == load_recipe("ternary")
    assert shipped.name == "ternary"
    (tmp_path / "ternary.yaml").write_text(rules("- match: first", "  levels: binary"))
    assert load_recipe("ternary.yaml").rules == (Rule((Match(position=("first",)),), Binary()),)
    assert load_recipe("ternary") == shipped


def test_what_cannot_be_opened_is_told(tmp_path: Path) -> None:
    def told(path: str | Path) -> str:
        with pytest.raises(PcqError) as caught:
            load_recipe(path)
        return str(caught.value)

    with pytest.raises(PcqError, match="there is no recipe 'my.yaml'. Allowed: binary, binary-all, "):
        shipped_text("my.yaml")
    assert told("ternery").startswith("there is no recipe 'ternery'. Allowed: a file, or one of binary, binary-all, ")
    assert told("ternery").endswith("Did you mean 'ternary'?")
    assert told("xyz.yaml").endswith("`pcq recipes list` says what each is for.")
    assert told(tmp_path / "r.yaml") == f"{tmp_path}/r.yaml: there is no such file."
    assert told("x" * 5000).startswith("there is no recipe 'xxx")
    assert told("a/" + "x" * 5000).endswith("x: there is no such file.")
    assert told(tmp_path) == f"{tmp_path}: this is a folder, not a recipe."


def test_name_and_description_come_from_the_file() -> None:
    text = "# First line,\n# second.\n#\n# yaml-language-server: $schema=x\n" + rules(
        "- match: first", "  levels: binary"
    )
    recipe = parse_recipe(text, "some/my recipe.yaml")
    assert (recipe.name, recipe.description) == ("my-recipe", "First line,\nsecond.")
    assert parse_recipe(text + "name: other\n", "r.yaml").name == "other"
    assert parse_recipe(text, ".yaml").name == "recipe"


def test_each_rule_knows_its_line() -> None:
    recipe = parse_recipe(rules("- match: first", "  levels: binary", "", "- match: last", "  keep: x"), "r.yaml")
    assert [recipe.where(i) for i in range(2)] == ["r.yaml:3", "r.yaml:6"]


# Short forms and round trips


def test_short_forms_are_what_they_stand_for() -> None:
    short = rules(
        "- match: first", "  levels: ternary",
        '- match: ["*.a", last, {type: conv, shape: [depthwise, pointwise]}]', "  keep: x",
    )  # fmt: skip
    assert parse_recipe(short, "r.yaml").rules == (
        Rule((Match(position=("first",)),), Ternary()),
        Rule(
            (
                Match(name=("*.a",)),
                Match(position=("last",)),
                Match(type=("conv",), shape=("depthwise", "pointwise")),
            ),
            keep="x",
        ),
    )


def few(values: Sequence[Any]) -> st.SearchStrategy[Any]:
    """One value or a list of some."""
    return st.sampled_from(values) | st.lists(st.sampled_from(values), min_size=1, max_size=3, unique=True)


SIZES = st.integers(0, 10**6)
MATCH = st.fixed_dictionaries(
    {},
    optional={
        "name": st.text(min_size=1) | st.lists(st.text(min_size=1), min_size=1, max_size=3),
        "type": few(get_args(Kind)),
        "position": few(get_args(Position)),
        "shape": few(get_args(Shape)),
        "min_size": SIZES,
        "max_size": SIZES.map(lambda size: size + 10**6),
    },
).filter(bool)
ANY_MATCH = MATCH | st.sampled_from(["first", "last", "*", "conv1", "012", "on", "1e-3", "null"]) | st.text()
SCALES = {"uniform": ["mse", "absmax", "mean"], "fixed": ["none", "absmax", "mse"]}
LEVELS = st.one_of(
    st.sampled_from(["binary", "ternary"]),
    st.sampled_from(["binary", "ternary"]).map(lambda kind: {"kind": kind}),
    st.fixed_dictionaries(
        {"kind": st.just("lsb"), "bits": st.integers(1, 4)}, optional={"refine": st.integers(0, 1000)}
    ),
    st.fixed_dictionaries(
        {"kind": st.just("uniform"), "bits": st.integers(1, 8)},
        optional={"symmetric": st.booleans(), "scale": st.sampled_from(SCALES["uniform"])},
    ),
    st.fixed_dictionaries({"kind": st.just("kmeans"), "levels": st.integers(2, 256)}),
    st.fixed_dictionaries({"kind": st.just("apot"), "bits": st.integers(2, 8)}, optional={"terms": st.just(1)}),
    st.fixed_dictionaries(
        {
            "kind": st.just("fixed"),
            "levels": st.just("nf4")
            | st.lists(st.integers(-9, 9) | st.floats(10, 1e6, width=32), min_size=2, max_size=20, unique=True),
        },
        optional={"scale": st.sampled_from(SCALES["fixed"])},
    ),
)
MATCHES = ANY_MATCH | st.lists(ANY_MATCH, min_size=1, max_size=3)
RULE = st.one_of(
    st.fixed_dictionaries(
        {"match": MATCHES, "keep": st.text(min_size=1).filter(str.strip)}, optional={"optional": st.booleans()}
    ),
    st.fixed_dictionaries({"match": MATCHES, "levels": LEVELS, "per": st.sampled_from(["tensor", "channel"])}),
    st.fixed_dictionaries(
        {"match": MATCHES, "levels": LEVELS}, optional={"group": st.integers(1, 4096), "optional": st.booleans()}
    ),
)
FILES = st.fixed_dictionaries({"pcq": st.just(1), "rules": st.lists(RULE, min_size=1, max_size=5)})


def block(data: Any, indent: str = "") -> str:
    """YAML in block style, with JSON's scalars."""
    if isinstance(data, dict) and data:
        return "".join(f"\n{indent}{json.dumps(key)}: {block(value, indent + '  ')}" for key, value in data.items())
    if isinstance(data, list) and data:
        return "".join(f"\n{indent}- {block(value, indent + '  ')}" for value in data)
    return json.dumps(data)


@given(FILES)
@settings(deadline=None, max_examples=100)
def test_round_trip(data: dict[str, Any]) -> None:
    """YAML in both styles, JSON, and JSON read as YAML: the same recipe."""
    recipe = parse_recipe(block(data), "r.yaml")
    assert parse_recipe(json.dumps(data), "r.yaml") == recipe
    said = json.loads(json.dumps(recipe.to_json()))
    assert Recipe.from_json(said) == recipe
    assert parse_recipe(json.dumps(said), "other.yaml") == recipe
    assert Recipe.from_json(said).to_json() == said
    assert len(recipe.rules) == len(data["rules"])
    for rule, given_rule in zip(recipe.rules, data["rules"], strict=True):
        assert rule.keep == given_rule.get("keep")
        levels = given_rule.get("levels")
        if levels is not None:
            said_levels = {"kind": levels} if isinstance(levels, str) else levels
            assert type(rule.levels) is type(KINDS[said_levels["kind"]])
            for key, value in said_levels.items():
                if key != "kind":
                    assert getattr(rule.levels, key) == (tuple(value) if isinstance(value, list) else value)


def test_json_pins_the_defaults() -> None:
    """A default that changes later must not change what an old artifact says."""
    recipe = parse_recipe(rules("- match: first", "  levels: {kind: uniform, bits: 3}"), "r.yaml")
    assert recipe.to_json() == {
        "pcq": 1,
        "name": "r",
        "rules": [
            {
                "match": [{"position": ["first"]}],
                "levels": {"kind": "uniform", "bits": 3, "symmetric": True, "scale": "mse"},
                "per": "channel",
            }
        ],
    }


def test_mistakes_in_json_are_told_with_their_place() -> None:
    with pytest.raises(PcqError) as caught:
        Recipe.from_json({"pcq": 1, "rules": [{"match": "first", "levels": {"kind": "uniform", "bits": 9}}]}, "x")
    assert str(caught.value) == "x, rules.0.levels.bits: bits has to be a whole number from 1 to 8, not 9."


def test_every_kind_of_levels_has_a_word() -> None:
    assert {type(example) for example in KINDS.values()} == set(get_args(Quantizer))


# Nothing but a recipe or a PcqError comes out, whatever goes in

JARGON = ("Input should", "pydantic", "union_tag", "literal", "Traceback", "_Rule", "lambda", "dataclass")


def outcome(text: str) -> None:
    try:
        parse_recipe(text, "r.yaml")
    except PcqError as error:
        told = str(error)
        assert told.strip()
        assert not any(word in told and word not in text for word in JARGON), told


@given(st.text())
@settings(deadline=None, max_examples=200)
def test_any_text(text: str) -> None:
    outcome(text)


@given(st.text(alphabet="pcq:1 rules\n -match*levs{}[]'\"&!|>#,?~%@\t0.", max_size=60))
@settings(deadline=None, max_examples=200)
def test_any_yaml_like_text(text: str) -> None:
    outcome(text)


@given(FILES, st.data())
@settings(deadline=None, max_examples=100)
def test_a_recipe_with_a_piece_cut_out_or_repeated(data: dict[str, Any], draw: st.DataObject) -> None:
    text = block(data)
    start = draw.draw(st.integers(0, len(text)))
    stop = draw.draw(st.integers(start, min(len(text), start + 20)))
    outcome(text[:start] + text[stop:])
    outcome(text[:stop] + text[start:])


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every container in it and each of its keys."""
    keys = list(data) if isinstance(data, dict) else list(range(len(data))) if isinstance(data, list) else []
    return [(data, key) for key in keys] + [place for key in keys for place in places(data[key])]


@given(FILES, DATA, st.data())
@settings(deadline=None, max_examples=150)
def test_a_recipe_with_a_value_replaced_by_anything(data: dict[str, Any], other: Any, draw: st.DataObject) -> None:
    data = json.loads(json.dumps(data))
    holder, key = draw.draw(st.sampled_from(places(data)))
    holder[key] = other
    outcome(json.dumps(data))


@given(DATA)
@settings(deadline=None)
def test_from_json_of_anything(data: Any) -> None:
    with suppress(PcqError):
        Recipe.from_json({"pcq": 1, "rules": data})


# Overrides

BASE = rules("- match: first", "  levels: ternary", "- match: {type: conv}", "  levels: {kind: uniform, bits: 4}")


def test_overrides_change_what_the_file_says() -> None:
    changes = ["rules.1.levels.bits=3", "rules.1.group=64", "rules.0.levels.kind=lsb", "rules.0.levels.bits=2"]
    changes += ["rules.0.match=*.stem", "rules.1.match.min_size=100", "rules.1.match.type=[conv2d, linear]"]
    assert parse_recipe(BASE, "r.yaml", changes).rules == (
        Rule((Match(name=("*.stem",)),), LeastSquaresBinary(2)),
        Rule((Match(type=("conv2d", "linear"), min_size=100),), Uniform(3), group=64),
    )
    levels = "rules.0.levels={kind: kmeans, levels: 5}"
    assert parse_recipe(BASE, "r.yaml", [levels]).rules[0].levels == KMeans(5)
    assert (
        parse_recipe(BASE, "r.yaml", ["rules.0.levels=binary", "rules.0.levels=ternary"]).rules[0].levels == Ternary()
    )
    assert parse_recipe(BASE, "r.yaml", ["name=mine"]).name == "mine"


def test_overrides_of_a_loaded_recipe_are_refused_and_not_forgotten() -> None:
    recipe = load_recipe("ternary-all")
    assert load_recipe(recipe) is recipe
    with pytest.raises(PcqError, match="loaded already"):
        load_recipe(recipe, ["rules.0.levels=binary"])


def test_overrides_work_on_a_recipe_that_json_wrote() -> None:
    said = json.dumps(parse_recipe(BASE, "r.yaml").to_json())
    assert parse_recipe(said, "r.yaml", ["rules.1.match.0.name=x"]).rules[1].match == (Match(("x",), ("conv",)),)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("x", "this is not `path=value`. Write it as in `rules.0.levels.bits=3`"),
        ("a..b=3", "this is not `path=value`. Write it as in `rules.0.levels.bits=3`"),
        ("rules.7.group=3", "rules has no item 7. Allowed: 0 to 1."),
        ("rules.first.group=3", "rules has no item first. Allowed: 0 to 1."),
        ("rules.1.levels.bits.x=3", "rules.1.levels.bits is a single value, so there is no 'x' in it."),
        (
            "ruls.0.group=3",
            "there is no `ruls` in a recipe. Allowed: pcq, name, rules, finetune, budget. Did you mean 'rules'?",
        ),
        (
            "rules.1.levles.bits=3",
            "there is no `levles` in a rule. "
            "Allowed: match, levels, keep, per, group, optional. Did you mean 'levels'?",
        ),
        ("rules.1.levels.bits=9", "bits has to be a whole number from 1 to 8, not 9."),
        ("rules.0.levels.bits=2", "there is no `bits` in levels of kind ternary. Allowed: kind, scale."),
        ("rules.0.optional=yes", "`optional` has to be true or false, not 'yes'. Write true."),
        ("rules.0.group=1e-3", "`group` has to be a whole number, not 0.001."),
        ("rules.0.group=", "a value is missing. Give a value or leave out the key."),
        (
            "rules.0.group=012",
            "YAML readers disagree about what number 012 is. Write it in plain decimal digits, or as the text \"012\".",
        ),
        ("rules.0.match=[a", "the [ opened on line 1 is not closed, or a comma is missing. Close it."),
        ("rules=3", "`rules` has to be a list, not 3."),
    ],
)  # fmt: skip
def test_a_mistake_in_an_override_names_it(override: str, message: str) -> None:
    assert complaint(BASE, [override]) == [f"--set {override}: {message}"]


def test_mistakes_of_file_and_overrides_are_told_together() -> None:
    told = complaint(rules("- match: first", "  levels: ternery"), ["rules.0.group=0", "x"])
    assert [line.split(": ")[0] for line in told] == ["r.yaml:4", "--set rules.0.group=0", "--set x"]


# In Python


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Match(), "at least one predicate"),
        (lambda: Match(min_size=-1), "min_size has to be 0 or more"),
        (lambda: Rule((), Binary()), "names nothing"),
        (lambda: Rule((Match(("*",)),)), "needs `levels`, or `keep`"),
        (lambda: Rule((Match(("*",)),), Binary(), "why"), "not both"),
        (lambda: Rule((Match(("*",)),), Fixed("nf4"), per="tensor", group=4), "cannot go with"),
    ],
)
def test_records_that_make_no_sense_cannot_be_made(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
