"""Files side by side."""

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from pcq import commands
from pcq.report.forms import render, size, table, to_json
from pcq.words import counted, dimensions


def _time(seconds: float) -> str:
    return f"{_ms(seconds)} ms" if seconds < 1 else f"{seconds:.2f} s"


def _ms(seconds: float) -> str:
    """Three digits, or what is before the point."""
    return f"{1000 * seconds:.3g}" if seconds < 0.1 else f"{1000 * seconds:.0f}"


def _spread(found: commands.Spread) -> str:
    """Median and quartiles in one unit."""
    low, high = (_ms(each) if found.median < 1 else f"{each:.2f}" for each in (found.low, found.high))
    return f"{_time(found.median)} ({low}-{high})"


def _ratio(value: float, first: float) -> str:
    return _times(value / first) if first else "-"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio >= 0.01 else f"{ratio:.1g}x"


def _sizes(result: commands.BenchResult) -> str:
    """``3x224x224``; of several inputs with their names, and with the file's where they differ."""
    said: dict[str, str] = {}
    for row in result.rows:
        sizes = [dimensions(each) for each in row.inputs.values()]
        names = [f"{name} " if len(sizes) > 1 else "" for name in row.inputs]
        said.setdefault(", ".join(map(str.__add__, names, sizes)), row.path.name)
    return "; ".join(f"{sizes} ({name})" if len(said) > 1 else sizes for sizes, name in said.items())


@render.register
def _(result: commands.BenchResult) -> RenderableType:
    columns = ("bytes", "load", "peak memory", "first run")
    title = "Loading: medians of fresh processes, and how many times the first file's"
    made = table(title, "file", "runs in", *columns, right=columns)
    first = result.rows[0]
    for row in result.rows:
        made.add_row(
            row.path.name, row.runtime, f"{size(row.nbytes)} {_ratio(row.nbytes, first.nbytes)}",
            f"{_time(row.load.median)} {_ratio(row.load.median, first.load.median)}",
            f"{size(row.peak.median)} {_ratio(row.peak.median, first.peak.median)}", _time(row.first.median),
        )  # fmt: skip
    titles = list(dict.fromkeys(latency.place for row in result.rows for latency in row.latencies))
    runs = table("Latency: median (quartiles), and the median of the rounds' ratios to the first file", "file", *titles,
                 right=tuple(titles))  # fmt: skip
    for row in result.rows:
        known = {latency.place: latency for latency in row.latencies}
        cells = []
        for title in titles:
            if (latency := known.get(title)) is None:
                cells.append("-")
                continue
            ratio = "-" if latency.ratio is None else _times(latency.ratio)
            cells.append(f"{_spread(latency.seconds)} {ratio}")
        runs.add_row(row.path.name, *cells)
    turns = f"{counted(result.rounds, 'round')} and {counted(result.processes, 'process', 'es')}"
    notes = [f"Samples: {_sizes(result)}.", f"{turns}, files in turn; {result.machine}; {result.seconds:.0f} s."]
    if result.plot is not None:
        notes.append(f"Drawn: {result.plot}")
    return Group(made, runs, *[Text(note) for note in notes])


@to_json.register
def _(result: commands.BenchResult) -> dict[str, Any]:
    return {
        "rows": [
            {"path": str(row.path), "runtime": row.runtime, "bytes": row.nbytes, "load": asdict(row.load),
             "first_run": asdict(row.first), "peak_memory": asdict(row.peak), "inputs": row.inputs,
             "latencies": [asdict(latency) for latency in row.latencies]}
            for row in result.rows
        ],
        "rounds": result.rounds,
        "processes": result.processes,
        "machine": result.machine,
        "plot": None if result.plot is None else str(result.plot),
        "seconds": result.seconds,
    }  # fmt: skip
