"""The record that drivers of benchmarks keep (tests/benchmarks/record.py)."""

import json
from pathlib import Path

import pytest

from pcq.recipe import load_recipe
from tests.benchmarks import record


def test_a_run_is_made_once_and_its_line_says_where_and_when(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = record.arguments("doc")
    record.recipe_arguments(parser, ["w4", "w2"])
    out = tmp_path / "out.jsonl"
    out.write_text('{"recipe": "w4", "seed": 0, "lost": 7}\n')  # of an older form, without a certificate
    made: list[record.Row] = []

    def run(key: record.Row) -> record.Row:
        made.append(key)
        return {"lost": 3}

    def table(rows: list[record.Row]) -> str:
        return record.markdown("| recipe | lost |", ([row["recipe"], row["lost"]] for row in rows))

    for said in ([str(out)], [str(out)], [str(out), "--table", "--recipes", "w8"]):
        args = parser.parse_args(said)
        record.fill(args, [{"recipe": r, "seed": s} for s in args.seeds for r in args.recipes], run, table, "numpy")
    assert made == [{"recipe": "w2", "seed": 0}]
    assert capsys.readouterr().out.endswith("| recipe | lost |\n|---|---|\n| w4 | 7 |\n| w2 | 3 |\n")
    line = json.loads(out.read_text().splitlines()[1])
    assert line.keys() == {"recipe", "seed", "lost", "numpy", *record.certificate()}
    assert "CPU cores" in line["machine"]
    assert line["torch"][0].isdigit()


def test_a_recipe_for_all_layers_is_the_last_rule_alone() -> None:
    made, plain = record.recipe("w2+all"), load_recipe("w2")
    assert made.name == "w2+all"
    assert made.rules == plain.rules[-1:]
    assert record.recipe("w2") == plain
