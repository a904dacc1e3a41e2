"""The recipes that come with pcq, and the JSON Schema for editors."""

import copy
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcq import shipped
from pcq.errors import PcqError
from pcq.plan import Parameter, make_plan
from pcq.recipe import Recipe, json_schema, load_recipe, parse_recipe, shipped_recipes, shipped_text
from pcq.recipe.strict_yaml import parse

ROOT = Path(__file__).parent.parent
NAMES = [each.name for each in shipped_recipes()]
SCHEMA = json_schema()


def test_what_is_shipped() -> None:
    assert NAMES == [
        "binary", "binary-all", "codebook4", "imagenet-ternary", "mixed", "nf4", "paper-binary", "paper-quaternary",
        "paper-ternary", "quaternary", "ternary", "ternary-all", "w2", "w3", "w4", "w4-g64", "w6", "w8",
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_what_it_is_for_and_what_to_type(name: str) -> None:
    each = next(each for each in shipped_recipes() if each.name == name)
    lines = each.text.splitlines()
    assert each.text == shipped_text(name) == shipped_text(f"{name}.yaml")
    assert each.text.endswith("\n")
    assert 20 < len(each.summary) < 100
    assert each.summary.endswith(".")
    assert f"#   pcq quantize model.pt --recipe {name}" in lines
    assert "# yaml-language-server: $schema=schema.json" in lines
    assert max(map(len, lines)) <= 100
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description.startswith(each.summary)
    assert "yaml-language-server" not in recipe.description
    assert Recipe.from_json(recipe.to_json()) == recipe


# What they do

RESNET = [
    Parameter("conv1.weight", (64, 3, 7, 7), "float32", "conv2d"),
    Parameter("bn1.weight", (64,), "float32", "norm"),
    Parameter("layer1.0.conv1.weight", (64, 64, 3, 3), "float32", "conv2d"),
    Parameter("layer1.0.conv2.weight", (64, 64, 3, 3), "float32", "conv2d"),
    Parameter("fc.weight", (1000, 64), "float32", "linear"),
    Parameter("fc.bias", (1000,), "float32", "bias"),
]
MOBILENET = [
    Parameter("stem.weight", (32, 3, 3, 3), "float32", "conv2d"),
    Parameter("dw.weight", (32, 1, 3, 3), "float32", "conv2d", groups=32),
    Parameter("pw.weight", (64, 32, 1, 1), "float32", "conv2d"),
    Parameter("fc.weight", (10, 64), "float32", "linear"),
]
TRANSFORMER = [
    Parameter("tok.weight", (100, 64), "float32", "embedding"),
    Parameter("pos_embed", (1, 10, 64), "float32", "other"),
    Parameter("block.0.in_proj_weight", (192, 64), "float32", "linear"),
    Parameter("block.0.fc1.weight", (128, 64), "float32", "linear"),
    Parameter("block.0.fc2.weight", (64, 128), "float32", "linear"),
    Parameter("head.weight", (100, 64), "float32", "linear", tied_to="tok.weight"),
]
UNET = [
    Parameter("down.weight", (64, 2, 9), "float32", "conv1d"),
    Parameter("middle.weight", (64, 64, 9), "float32", "conv1d"),
    Parameter("up.weight", (64, 32, 4), "float32", "conv_transpose1d"),
    Parameter("out.weight", (8, 32, 1), "float32", "conv1d"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "net", [RESNET, MOBILENET, TRANSFORMER, UNET], ids=["resnet", "mobilenet", "transformer", "unet"]
)
def test_every_recipe_fits_every_network_and_makes_it_smaller(name: str, net: list[Parameter]) -> None:
    plan = make_plan(load_recipe(name), net)
    weights = [p.name for p in net if p.name.endswith("weight") and p.kind != "norm" and p.tied_to is None]
    assert [entry.parameter.name for entry in plan.quantized] == weights
    assert all(entry.nbytes < entry.parameter.nbytes for entry in plan.quantized)
    assert plan.bytes_after < plan.bytes_before / 2


@pytest.mark.parametrize(
    ("name", "net", "expected"),
    [
        ("binary", RESNET, ["uniform 8-bit", "binary", "binary", "uniform 8-bit"]),
        ("ternary", RESNET, ["uniform 8-bit", "ternary", "ternary", "uniform 8-bit"]),
        ("ternary", TRANSFORMER, ["uniform 4-bit", "uniform 8-bit", "ternary", "uniform 8-bit"]),
        ("quaternary", RESNET, ["uniform 8-bit", "least-squares binary", "least-squares binary", "uniform 8-bit"]),
        ("w2", TRANSFORMER, ["uniform 4-bit", "uniform 8-bit", "uniform 2-bit", "uniform 8-bit"]),
        ("w3", RESNET, ["uniform 8-bit", "uniform 3-bit", "uniform 3-bit", "uniform 8-bit"]),
        ("w4", RESNET, ["uniform 4-bit"] * 4),
        ("w4-g64", RESNET, ["uniform 4-bit"] * 4),
        ("w6", RESNET, ["uniform 6-bit"] * 4),
        ("w8", RESNET, ["uniform 8-bit"] * 4),
        ("mixed", MOBILENET, ["uniform 8-bit", "uniform 8-bit", "uniform 4-bit", "uniform 8-bit"]),
        ("binary-all", RESNET, ["binary"] * 4),
        ("ternary-all", TRANSFORMER, ["ternary"] * 4),
        ("codebook4", RESNET, ["k-means, 16 levels, per tensor"] * 4),
        ("nf4", RESNET, ["fixed nf4, absmax scale, groups of 64"] * 4),
        ("paper-binary", RESNET, ["fixed {-1, 1}, per tensor"] * 4),
        ("paper-ternary", RESNET, ["fixed {-1, 0, 1}, per tensor"] * 4),
        ("paper-quaternary", RESNET, ["fixed {-1, -0.3, 0.3, 1}, per tensor"] * 4),
    ],
)
def test_what_each_does(name: str, net: list[Parameter], expected: list[str]) -> None:
    texts = [entry.text for entry in make_plan(load_recipe(name), net).quantized]
    assert len(texts) == len(expected)
    assert all(text.startswith(start) for text, start in zip(texts, expected, strict=True)), texts


def test_a_network_of_two_layers_is_not_silently_left_at_8_bits() -> None:
    """`ternary` keeps the first and last layer at 8 bits; where there is no other, it says so, and what to take."""
    net, nothing = [RESNET[0], RESNET[4]], r"rule 3 \(\"\*\"\) decides nothing: rule 1 \(first, last\) before it"
    for name in ("ternary", "binary"):
        with pytest.raises(PcqError, match=nothing + rf".*Take the recipe `{name}-all`, "):
            make_plan(load_recipe(name), net)
        assert make_plan(load_recipe(f"{name}-all"), net).quantized
    with pytest.raises(PcqError, match=nothing + r".*Correct a copy: `pcq recipes show w2 > my.yaml`"):
        make_plan(load_recipe("w2"), net)
    changed = load_recipe("ternary", ["rules.2.levels=binary"])
    for own in (changed, parse_recipe(shipped_text("ternary"), "ternary.yaml")):
        with pytest.raises(PcqError, match=nothing + r".*Move it up, or: correct it"):
            make_plan(own, net)


# Where they are


def test_the_wheel_carries_them() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]["recipes"] == "pcq/recipes"


def test_they_are_found_in_the_package_and_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "pcq" / "shipped.py"))
    assert shipped.folder() == tmp_path / "recipes"
    (tmp_path / "pcq" / "recipes").mkdir(parents=True)
    (tmp_path / "pcq" / "recipes" / "mine.yaml").write_text("# Mine.\npcq: 1\n")
    assert shipped.shipped_recipes() == (("mine", "Mine.", "# Mine.\npcq: 1\n"),)


def test_listing_them_needs_no_torch() -> None:
    code = (
        "import sys; from pcq.shipped import shipped_recipes; assert shipped_recipes(); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# The JSON Schema


def valid(value: Any, schema: dict[str, Any]) -> bool:
    """JSON Schema validation, for the keywords that ours uses; any other is a KeyError."""
    types = {
        "object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float),
    }  # fmt: skip

    def same(a: Any, b: Any) -> bool:
        return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)

    def properties(said: dict[str, Any]) -> bool:
        return not isinstance(value, dict) or all(valid(v, said[k]) for k, v in value.items() if k in said)

    checks: dict[str, Any] = {
        "$ref": lambda ref: valid(value, SCHEMA["$defs"][ref.removeprefix("#/$defs/")]),
        "anyOf": lambda options: any(valid(value, option) for option in options),
        "oneOf": lambda options: sum(valid(value, option) for option in options) == 1,
        "type": lambda name: isinstance(value, types[name]) and (name == "boolean" or not isinstance(value, bool)),
        "const": lambda only: same(value, only),
        "enum": lambda options: any(same(value, option) for option in options),
        "properties": properties,
        "additionalProperties": lambda no: (
            no or not isinstance(value, dict) or not set(value) - set(schema["properties"])
        ),
        "required": lambda keys: not isinstance(value, dict) or set(keys) <= set(value),
        "minProperties": lambda least: not isinstance(value, dict) or len(value) >= least,
        "items": lambda item: not isinstance(value, list) or all(valid(each, item) for each in value),
        "minItems": lambda least: not isinstance(value, list) or len(value) >= least,
        "pattern": lambda _: True,
    }
    ignored = {"$schema", "$defs", "title", "description", "default"}
    return all(checks[keyword](argument) for keyword, argument in schema.items() if keyword not in ignored)


def test_the_committed_schema_is_current() -> None:
    """``pcq recipes schema > recipes/schema.json`` makes it so."""
    assert json.loads((ROOT / "recipes" / "schema.json").read_text(encoding="utf-8")) == SCHEMA


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipes_are_valid_against_the_schema(name: str) -> None:
    assert valid(parse(shipped_text(name), name).data, SCHEMA)
    assert valid(load_recipe(name).to_json(), SCHEMA)


@pytest.mark.parametrize(
    "change",
    [
        {"pcq": 2}, {"pcq": True}, {"pcq": "1"}, {"rules": []}, {"rules": {}}, {"rule": []},
        {"rules": [{"match": "first"}]},
        {"rules": [{"levels": "binary"}]}, {"rules": [{"match": [], "levels": "binary"}]},
        {"rules": [{"match": {}, "levels": "binary"}]}, {"rules": [{"match": 3, "levels": "binary"}]},
        {"rules": [{"match": {"typ": "conv"}, "levels": "binary"}]},
        {"rules": [{"match": {"type": "cnv"}, "levels": "binary"}]},
        {"rules": [{"match": "first", "levels": "binary", "keep": "x"}]},
        {"rules": [{"match": "first", "levels": "uniform"}]}, {"rules": [{"match": "first", "levels": "ternery"}]},
        {"rules": [{"match": "first", "levels": {"bits": 3}}]},
        {"rules": [{"match": "first", "levels": {"kind": "ternary", "bits": 3}}]},
        {"rules": [{"match": "first", "levels": {"kind": "uniform", "bits": "3"}}]},
        {"rules": [{"match": "first", "levels": {"kind": "uniform", "bits": 3, "scale": "mze"}}]},
        {"rules": [{"match": "first", "levels": "binary", "per": "row"}]},
        {"rules": [{"match": "first", "levels": "binary", "optional": "yes"}]},
    ],
)  # fmt: skip
def test_the_schema_refuses_what_the_loader_refuses(change: dict[str, Any]) -> None:
    data = {**load_recipe("ternary").to_json(), **change}
    assert not valid(data, SCHEMA)
    with pytest.raises(PcqError):
        Recipe.from_json(data)


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every container in it and each of its keys."""
    keys = list(data) if isinstance(data, dict) else list(range(len(data))) if isinstance(data, list) else []
    return [(data, key) for key in keys] + [place for key in keys for place in places(data[key])]


PIECES = ["first", "*", "binary", "uniform", "conv", 0, 3, 64, 1.5, True, [], {}, ["last"], {"type": "conv"}, [1, 2]]


@given(st.sampled_from(NAMES), st.data())
@settings(deadline=None, max_examples=200)
def test_the_schema_never_refuses_what_the_loader_takes(name: str, draw: st.DataObject) -> None:
    data = copy.deepcopy(parse(shipped_text(name), name).data)
    for _ in range(draw.draw(st.integers(1, 2))):
        holder, key = draw.draw(st.sampled_from(places(data)))
        if draw.draw(st.booleans()):
            holder[key] = copy.deepcopy(draw.draw(st.sampled_from(PIECES)))
        else:
            del holder[key]
    try:
        parse_recipe(json.dumps(data), "r.yaml")
    except PcqError:
        return
    assert valid(data, SCHEMA)
