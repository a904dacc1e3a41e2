"""Plans: which rule decides, how weights are cut into rows, what stays float and why, and what it will weigh."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pcq import qtensor
from pcq.errors import PcqError
from pcq.plan import Kept, Parameter, Plan, Quantized, make_plan
from pcq.recipe import Recipe, parse_recipe
from pcq.recipe.schema import KINDS
from pcq.rows import Rows
from pcq.rules import Kind, Match, Position, Rule, Shape


def conv(name: str, *shape: int, groups: int = 1, kind: str | None = None, **more: Any) -> Parameter:
    return Parameter(name, shape, "float32", kind or f"conv{len(shape) - 2}d", groups, **more)


def linear(name: str, out: int, into: int, **more: Any) -> Parameter:
    return Parameter(name, (out, into), "float32", "linear", **more)


def recipe(*lines: str) -> Recipe:
    return parse_recipe("pcq: 1\nrules:\n" + "".join(f"  {line}\n" for line in lines), "r.yaml")


def plan(parameters: Sequence[Parameter], *lines: str) -> Plan:
    return make_plan(recipe(*lines), parameters)


def complaint(parameters: Sequence[Parameter], *lines: str) -> list[str]:
    with pytest.raises(PcqError) as caught:
        plan(parameters, *lines)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


NET = [
    conv("stem.conv.weight", 8, 3, 3, 3),
    Parameter("stem.bn.weight", (8,), "float32", "norm"),
    Parameter("stem.bn.bias", (8,), "float32", "bias"),
    Parameter("stem.bn.running_mean", (8,), "float32", "buffer"),
    Parameter("stem.bn.num_batches_tracked", (), "int64", "buffer"),
    conv("layer1.0.dw.weight", 8, 1, 3, 3, groups=8),
    conv("layer1.0.pw.weight", 16, 8, 1, 1),
    conv("layer1.1.up.weight", 16, 4, 2, 2, groups=2, kind="conv_transpose2d"),
    Parameter("pos_embed", (1, 5, 8), "float32", "other"),
    Parameter("words.weight", (10, 8), "float32", "embedding"),
    linear("fc.weight", 10, 16),
    Parameter("fc.bias", (10,), "float32", "bias"),
    linear("head.weight", 10, 8, tied_to="words.weight"),
]
EACH = [
    "stem.conv.weight", "layer1.0.dw.weight", "layer1.0.pw.weight", "layer1.1.up.weight", "words.weight", "fc.weight",
]  # fmt: skip


def decided(match: str) -> list[str]:
    """The weights of NET that a rule with this match decides."""
    return [entry.parameter.name for entry in plan(NET, f"- match: {match}", "  levels: ternary").quantized]


@pytest.mark.parametrize(
    ("match", "names"),
    [
        ('"*"', EACH),
        ("first", EACH[:1]),
        ("last", EACH[-1:]),
        ("[first, last]", [EACH[0], EACH[-1]]),
        ("stem.conv", EACH[:1]),
        ("stem.conv.weight", EACH[:1]),
        ('"layer1.*"', EACH[1:4]),
        ('"*.?w"', EACH[1:3]),
        ('"layer1.[0].*"', EACH[1:3]),
        ("{type: conv}", EACH[:4]),
        ("{type: conv2d}", EACH[:3]),
        ("{type: conv_transpose}", EACH[3:4]),
        ("{type: conv_transpose2d}", EACH[3:4]),
        ("{type: [linear, embedding]}", EACH[4:]),
        ("{shape: depthwise}", EACH[1:2]),
        ("{shape: pointwise}", EACH[2:3]),
        ("{shape: [depthwise, pointwise]}", EACH[1:3]),
        ("{min_size: 128, max_size: 200}", ["layer1.0.pw.weight", "fc.weight"]),
        ('{name: "layer1.*", type: conv2d, max_size: 72}', EACH[1:2]),
        ("[{type: linear}, stem.conv, {shape: pointwise}]", [EACH[0], EACH[2], EACH[5]]),
    ],
)
def test_selectors(match: str, names: list[str]) -> None:
    assert decided(match) == names


def test_depthwise_needs_one_input_channel_a_group_and_several_groups() -> None:
    depthwise = Match(shape=("depthwise",))
    assert depthwise.holds(conv("a", 8, 1, 3, groups=8))
    assert depthwise.holds(conv("a", 16, 1, 3, 3, 3, groups=8))
    assert depthwise.holds(conv("a", 8, 2, 3, 3, groups=8, kind="conv_transpose2d"))
    assert not depthwise.holds(conv("stem of a grey image", 8, 1, 3, 3))
    assert not depthwise.holds(conv("grouped", 8, 2, 3, 3, groups=4))
    assert not depthwise.holds(conv("a", 8, 1, 3, 3, groups=4, kind="conv_transpose2d"))
    assert not depthwise.holds(linear("a", 8, 1))
    assert not Match(shape=("pointwise",)).holds(linear("a", 8, 1))


def test_first_and_last_pass_over_embeddings_and_what_cannot_be_quantized() -> None:
    net = [
        Parameter("words.weight", (9, 4), "float32", "embedding"),
        Parameter("empty.weight", (0, 4), "float32", "linear"),
        linear("a.weight", 4, 4),
        linear("b.weight", 4, 4),
        Parameter("int8.weight", (4, 4), "int8", "linear"),
        linear("head.weight", 9, 4, tied_to="words.weight"),
    ]
    got = plan(net, "- match: first", "  levels: ternary", "- match: last", "  levels: binary")
    assert [(entry.parameter.name, entry.rule) for entry in got.quantized] == [("a.weight", 0), ("b.weight", 1)]
    only = plan(net[:3], "- match: {position: [first, last]}", "  levels: ternary")
    assert [entry.parameter.name for entry in only.quantized] == ["a.weight"]


def test_every_tensor_left_float_has_a_reason() -> None:
    net = [
        *NET,
        Parameter("gone.weight", (0, 8), "float32", "linear"),
        Parameter("flat.weight", (8,), "float32", "linear"),
        Parameter("spectrum.weight", (8, 8), "complex64", "linear"),
        Parameter("table", (8, 8), "float32", "buffer"),
    ]
    got = plan(net, '- match: "*.pos_embed"', "  keep: x", "  optional: true", "- match: fc", "  levels: ternary")
    assert {entry.parameter.name: entry.reason for entry in got.kept} == {
        "stem.conv.weight": "no rule matched",
        "stem.bn.weight": "norm",
        "stem.bn.bias": "bias",
        "stem.bn.running_mean": "buffer",
        "stem.bn.num_batches_tracked": "integer buffer",
        "layer1.0.dw.weight": "no rule matched",
        "layer1.0.pw.weight": "no rule matched",
        "layer1.1.up.weight": "no rule matched",
        "pos_embed": "not the weight of a layer",
        "words.weight": "no rule matched",
        "fc.bias": "bias",
        "head.weight": "tied to words.weight",
        "gone.weight": "empty",
        "flat.weight": "1-dimensional",
        "spectrum.weight": "complex numbers",
        "table": "buffer",
    }
    assert [entry.parameter for entry in got.entries] == net


def test_keep_gives_its_reason_to_whatever_it_names() -> None:
    got = plan(NET, '- match: [pos_embed, "layer1.0.*"]', "  keep: fragile", '- match: "*"', "  levels: ternary")
    reasons = {entry.parameter.name: entry.reason for entry in got.kept if entry.reason == "fragile"}
    assert list(reasons) == ["layer1.0.dw.weight", "layer1.0.pw.weight", "pos_embed"]
    assert [entry.parameter.name for entry in got.quantized] == [EACH[0], *EACH[3:]]


def test_tied_parameters_follow_their_holder() -> None:
    got = plan(NET, "- match: words", "  levels: ternary", "- match: head", "  keep: x", "  optional: true")
    assert [entry.parameter.name for entry in got.quantized] == ["words.weight"]
    tied = next(entry for entry in got.kept if entry.parameter.name == "head.weight")
    assert (tied.reason, tied.nbytes) == ("tied to words.weight", 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn"])
def test_any_floating_dtype_can_be_quantized(dtype: str) -> None:
    weight = replace(linear("a.weight", 4, 6), dtype=dtype)
    got = plan([weight], '- match: "*"', "  levels: ternary")
    assert got.bytes_before == torch.zeros(4, 6).to(getattr(torch, dtype)).nbytes
    assert len(got.quantized) == 1


@pytest.mark.parametrize(
    ("parameter", "lines", "rows"),
    [
        (conv("a", 8, 3, 3), (), Rows((8, 3, 3), 0)),
        (conv("a", 8, 1, 3, 3, groups=8), (), Rows((8, 1, 3, 3), 0)),
        (conv("a", 8, 3, 3, kind="conv_transpose1d"), (), Rows((8, 3, 3), 1)),
        (conv("a", 8, 3, 3, groups=4, kind="conv_transpose1d"), (), Rows((8, 3, 3), 1, 4)),
        (linear("a", 8, 3), ("  group: 2",), Rows((8, 3), 0, 1, 2)),
        (conv("a", 8, 3, 3, groups=4, kind="conv_transpose1d"), ("  group: 5",), Rows((8, 3, 3), 1, 4, 5)),
        (conv("a", 8, 3, 3, groups=4, kind="conv_transpose1d"), ("  per: tensor",), Rows((8, 3, 3), None)),
        (Parameter("a", (9, 4), "float32", "embedding"), (), Rows((9, 4), 0)),
    ],
)
def test_rows_follow_the_kind_of_layer(parameter: Parameter, lines: tuple[str, ...], rows: Rows) -> None:
    assert plan([parameter], '- match: "*"', "  levels: ternary", *lines).quantized[0].rows == rows


# Rules that decide nothing

DELETE = "Correct it, delete it, or give it `optional: true`"


def test_a_rule_that_matches_nothing_is_an_error_with_near_names() -> None:
    assert complaint(NET, "- match: fcc", "  levels: ternary") == [
        f"r.yaml:3: rule 1 (fcc) matches nothing. Near: fc. {DELETE}"
    ]
    assert complaint(NET, "- match: layer1", "  levels: ternary") == [
        f'r.yaml:3: rule 1 (layer1) matches nothing. Near: "layer1.*". {DELETE}'
    ]
    assert complaint(NET, "- match: depthwise", "  levels: ternary") == [
        f"r.yaml:3: rule 1 (depthwise) matches nothing. Near: {{shape: depthwise}}. {DELETE}"
    ]
    assert complaint(NET, "- match: linear", "  levels: ternary") == [
        f"r.yaml:3: rule 1 (linear) matches nothing. Near: {{type: linear}}. {DELETE}"
    ]
    assert complaint(NET, "- match: {type: conv3d}", "  levels: ternary") == [
        "r.yaml:3: rule 1 ({type: conv3d}) matches nothing. The weights that can be quantized: "
        f"3 conv2d, 1 conv_transpose2d, 1 embedding, 1 linear. {DELETE}"
    ]
    assert complaint(NET[1:4], "- match: {type: conv3d}", "  levels: ternary") == [
        f"r.yaml:3: rule 1 ({{type: conv3d}}) matches nothing. The weights that can be quantized: none. {DELETE}"
    ]


def test_a_rule_whose_weights_are_all_taken_says_by_which() -> None:
    told = complaint(
        NET,
        "- match: [first, last]", "  keep: x",
        '- match: "*"', "  levels: ternary",
        "- match: first", "  levels: binary",
    )  # fmt: skip
    assert told == [
        "r.yaml:7: rule 3 (first) decides nothing: rule 1 (first, last) before it takes all it matches "
        "(stem.conv.weight). Move it up, or: correct it, delete it, or give it `optional: true`"
    ]
    told = complaint(
        NET,
        '- match: "stem.*"', "  keep: x",
        "- match: fc", "  levels: ternary",
        "- match: [first, last]", "  levels: binary",
    )  # fmt: skip
    assert 'decides nothing: rule 1 ("stem.*") and rule 2 (fc) before it takes all it matches' in told[0]


def test_a_rule_for_what_cannot_be_quantized_says_so() -> None:
    assert complaint(NET, '- match: "*.bias"', "  levels: ternary") == [
        'r.yaml:3: rule 1 ("*.bias") matches only what cannot be quantized '
        f"(stem.bn.bias: bias, fc.bias: bias). {DELETE}"
    ]
    assert complaint(NET, "- match: head", "  keep: x") == [
        f"r.yaml:3: rule 1 (head) matches only what cannot be quantized (head.weight: tied to words.weight). {DELETE}"
    ]
    many = [Parameter(f"{i}.bias", (3,), "float32", "bias") for i in range(9)]
    assert "and 5 more" in complaint(many, '- match: "*"', "  levels: ternary")[0]


def test_all_idle_rules_are_told_together_and_optional_ones_not_at_all() -> None:
    told = complaint(
        NET,
        "- match: fcc", "  levels: ternary",
        "- match: gone", "  levels: ternary", "  optional: true",
        "- match: stemm", "  keep: x",
        '- match: "*"', "  levels: ternary",
    )  # fmt: skip
    assert [line.split(" (")[0] for line in told] == ["r.yaml:3: rule 1", "r.yaml:8: rule 3"]


def test_positions_are_refused_where_the_file_has_lost_the_order() -> None:
    """safetensors sorts by name, within each dtype: its last tensor is not the last layer."""
    names = ["conv1.weight", "conv1.bias", "layer1.0.weight", "layer1.0.bias", "fc.weight", "fc.bias"]
    model = [linear(n, 4, 4) if n.endswith("weight") else Parameter(n, (4,), "float32", "bias") for n in names]
    counters = [Parameter("layer1.1.num_batches_tracked", (), "int64", "buffer")]
    by_name = counters + sorted(model, key=lambda p: p.name)
    lines = ['- match: "layer1.*"', "  levels: ternary", "- match: [first, last]", "  levels: binary"]
    assert len(plan(model + counters, *lines).quantized) == 3
    assert complaint(by_name, *lines) == [
        "r.yaml:5: rule 2 (first, last) goes by position, but the file lists its tensors by name. "
        "Give --arch, which tells the order of the layers, or write their names instead of `first` and `last`"
    ]
    assert len(plan(by_name, '- match: "*"', "  levels: ternary").quantized) == 3


def test_the_order_is_lost_where_the_tenth_of_a_list_comes_before_the_second() -> None:
    model = [linear(f"layers.{i}.{name}_proj.weight", 4, 4) for i in range(12) for name in "qkvo"]
    by_name = sorted(model, key=lambda p: p.name)
    halves = [replace(p, dtype="bfloat16") for p in by_name[::2]] + by_name[1::2]
    assert plan(model, "- match: last", "  levels: ternary").quantized[0].parameter.name == "layers.11.o_proj.weight"
    for lost in (by_name, halves):
        assert "rule 1 (last) goes by position" in complaint(lost, "- match: last", "  levels: ternary")[0]
    few = sorted(model[:40], key=lambda p: p.name)
    assert plan(few, "- match: last", "  levels: ternary").quantized[0].parameter.name == "layers.9.v_proj.weight"


def test_weights_that_do_not_become_smaller_are_noticed() -> None:
    got = plan([linear("a.weight", 4, 3)], '- match: "*"', "  levels: {kind: kmeans, levels: 16}")
    assert got.quantized[0].nbytes > got.quantized[0].parameter.nbytes
    assert got.notes == ("a.weight takes no fewer bytes than before: the scales and tables outweigh what is saved.",)


# Laws

NAMES = st.sampled_from(["stem", "a.conv", "a.b.conv", "a.b.fc", "fc", "words", "pos"]).flatmap(
    lambda name: st.sampled_from([name, f"{name}.weight", f"{name}.bias"])
)


@st.composite
def parameters(draw: st.DrawFn) -> list[Parameter]:
    made = []
    names = draw(st.lists(NAMES, min_size=1, max_size=8, unique=True))
    for name in sorted(names, key=lambda name: name.endswith("bias")):
        kind = draw(
            st.sampled_from([*(k for k in get_args(Kind) if k not in ("conv", "conv_transpose")), "bias", "other"])
        )
        groups = draw(st.sampled_from([1, 2, 4])) if kind.startswith("conv") else 1
        dims = int(kind[-2]) if kind.startswith("conv") else 0
        rank = 2 if kind in ("linear", "embedding") else 2 + dims if dims else draw(st.integers(0, 3))
        shape = tuple(draw(st.sampled_from([1, 4, 4, 8] if i == 0 else [1, 2, 3])) for i in range(rank))
        shape = (4 * shape[0], *shape[1:]) if shape else shape
        dtype = draw(st.sampled_from(["float32", "float32", "float16", "int64"]))
        tied = made[0].name if made and draw(st.integers(0, 9)) == 0 else None
        made.append(Parameter(name, shape, dtype, kind, groups, tied))
    return made


PATTERNS = st.sampled_from(["*", "a.*", "*.conv", "fc", "stem.weight", "?ords*", "*.bias", "a.[bc].*"])
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "name": st.lists(PATTERNS, min_size=1, max_size=2).map(tuple),
    "type": st.lists(st.sampled_from(get_args(Kind)), min_size=1, max_size=3).map(tuple),
    "position": st.lists(st.sampled_from(get_args(Position)), min_size=1, max_size=1).map(tuple),
    "shape": st.lists(st.sampled_from(get_args(Shape)), min_size=1, max_size=1).map(tuple),
    "min_size": st.integers(0, 40),
    "max_size": st.integers(40, 200),
}
MATCHES = st.fixed_dictionaries({}, optional=FIELDS).map(lambda said: Match(**(said or {"name": ("*",)})))
ANY_RULE = st.builds(
    lambda match, levels, per, group: Rule(
        tuple(match), levels, None if levels else "why", per if levels else "channel",
        group if levels and per == "channel" else None, optional=True,
    ),
    st.lists(MATCHES, min_size=1, max_size=2),
    st.none() | st.sampled_from(list(KINDS.values())),
    st.sampled_from(["tensor", "channel"]),
    st.none() | st.integers(1, 9),
)  # fmt: skip


def reference_holds(match: Match, parameter: Parameter, weights: list[Parameter]) -> bool:
    """One predicate after the other, as the documentation has it."""
    if match.name:
        regexes = [p.replace(".", r"\.").replace("*", ".*").replace("?", ".") for p in match.name]
        names = {parameter.name, re.sub(r"\.weight$", "", parameter.name)}
        if not any(re.fullmatch(regex, name) for regex in regexes for name in names):
            return False
    if match.type:
        kinds = {parameter.kind}
        kinds |= {"conv"} if "conv" in parameter.kind else set()
        kinds |= {"conv_transpose"} if "conv_transpose" in parameter.kind else set()
        if not kinds & set(match.type):
            return False
    if match.position:
        wanted = {"first": weights[:1], "last": weights[-1:]}
        if not any(parameter in wanted[position] for position in match.position):
            return False
    if match.shape:
        found = set()
        if "conv" in parameter.kind:
            per_group = parameter.shape[0] / parameter.groups if "transpose" in parameter.kind else parameter.shape[1]
            found |= {"depthwise"} if per_group == 1 and parameter.groups > 1 else set()
            found |= {"pointwise"} if all(size == 1 for size in parameter.shape[2:]) else set()
        if not found & set(match.shape):
            return False
    size = 1
    for length in parameter.shape:
        size *= length
    return (match.min_size or 0) <= size <= (match.max_size if match.max_size is not None else size)


def can_be_quantized(p: Parameter) -> bool:
    return p.kind not in ("bias", "other") and p.dtype != "int64" and p.tied_to is None


@given(parameters(), st.lists(ANY_RULE, min_size=1, max_size=4))
@settings(deadline=None, max_examples=200)
def test_the_first_rule_that_matches_decides(net: list[Parameter], rules: list[Rule]) -> None:
    weights = [p for p in net if can_be_quantized(p) and p.kind != "embedding"]
    got = make_plan(Recipe("r", "", tuple(rules)), net)
    assert [entry.parameter for entry in got.entries] == net
    for entry in got.entries:
        p = entry.parameter
        holding = [i for i, rule in enumerate(rules) if any(reference_holds(m, p, weights) for m in rule.match)]
        if p.tied_to is not None:
            assert entry == Kept(p, f"tied to {p.tied_to}")
            continue
        if not can_be_quantized(p):
            holding = [i for i in holding if rules[i].keep]
        if not holding:
            assert isinstance(entry, Kept)
            assert entry.reason != "why"
        elif rules[holding[0]].keep:
            assert entry == Kept(p, "why")
        else:
            assert isinstance(entry, Quantized)
            assert entry.rule == holding[0]
            assert entry.quantizer is rules[holding[0]].levels


@given(parameters(), st.lists(ANY_RULE, min_size=1, max_size=4))
@settings(deadline=None, max_examples=200)
def test_without_optional_the_idle_rules_are_the_error(net: list[Parameter], rules: list[Rule]) -> None:
    got = make_plan(Recipe("r", "", tuple(rules)), net)
    weights = [p for p in net if can_be_quantized(p) and p.kind != "embedding"]
    used = {entry.rule for entry in got.quantized}
    for entry in got.kept:
        if entry.reason == "why":
            holds = [
                i for i, r in enumerate(rules) if any(reference_holds(m, entry.parameter, weights) for m in r.match)
            ]
            fit = can_be_quantized(entry.parameter)
            used.add(next(i for i in holds if fit or rules[i].keep))
    strict = Recipe("r", "", tuple(replace(rule, optional=False) for rule in rules))
    idle = [i for i in range(len(rules)) if i not in used]
    if not idle:
        assert make_plan(strict, net) == got
        return
    with pytest.raises(PcqError) as caught:
        make_plan(strict, net)
    assert [int(n) - 1 for n in re.findall(r"^r: rule (\d+) \(", str(caught.value), re.MULTILINE)] == idle


@given(parameters(), st.sampled_from(list(KINDS.values())), st.none() | st.integers(1, 9), st.booleans())
@settings(deadline=None, max_examples=60)
def test_predicted_bytes_are_the_bytes(net: list[Parameter], levels: Any, group: int | None, tensor: bool) -> None:
    rule = Rule((Match(("*",)),), levels, per="tensor" if tensor else "channel", group=None if tensor else group)
    got = make_plan(Recipe("r", "", (replace(rule, optional=True),)), net)
    for entry in got.quantized:
        weight = torch.randn(entry.parameter.shape)
        assert qtensor.quantize(entry.quantizer, weight, entry.rows).nbytes == entry.nbytes
        assert entry.bits == 8 * entry.nbytes / weight.numel()
    sizes = {entry.parameter.name: entry.nbytes for entry in got.entries}
    for entry in got.kept:
        dtype = getattr(torch, entry.parameter.dtype)
        alone = torch.zeros(entry.parameter.shape, dtype=dtype).nbytes
        assert sizes[entry.parameter.name] == (0 if entry.parameter.tied_to else alone)
    assert got.bytes_after == sum(sizes.values())
    assert got.bytes_before == sum(
        torch.zeros(p.shape, dtype=getattr(torch, p.dtype)).nbytes for p in net if not p.tied_to
    )


def test_bits_count_scales_and_tables() -> None:
    got = plan([linear("a.weight", 10, 100)], '- match: "*"', "  levels: ternary")
    assert (got.quantized[0].nbytes, got.bits) == (10 * 100 // 5 + 10 * 4, 8 * 240 / 1000)
    assert (got.bytes_before, got.bytes_after) == (4000, 240)
    assert Plan(()).bits == 0


def test_entries_say_what_they_are() -> None:
    weight = linear("a.weight", 10, 100)
    for line, text in [
        ("  per: tensor", "ternary, per tensor"),
        ("  per: channel", "ternary, per channel"),
        ("  group: 64", "ternary, groups of 64"),
        ("  group: 640", "ternary, groups of 100"),
    ]:
        assert plan([weight], '- match: "*"', "  levels: ternary", line).quantized[0].text == text


def test_rules_say_what_they_are() -> None:
    lines = [
        '- match: ["*.a", first, {type: [conv, linear], max_size: 9}]', "  levels: ternary", "  optional: true",
        "- match: {position: last}", "  levels: binary", "  group: 4",
        "- match: x.y", "  keep: fragile",
    ]  # fmt: skip
    assert [str(rule) for rule in recipe(*lines).rules] == [
        '["*.a", first, {type: [conv, linear], max_size: 9}]: ternary, per channel (optional)',
        "last: binary, groups of 4",
        '"x.y": stays float, fragile',
    ]
