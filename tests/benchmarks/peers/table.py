"""The tables of ``compare.py``'s results: points lost against float, and whether pcq's distance to a peer is a tie.

    python tests/benchmarks/peers/table.py OUT.json [MORE.json ...]

The interval of a difference is 95 %: ``sqrt((1.96 s_i)^2 + (2.78 s_d)^2)``, ``s_i`` the standard error over the test
images of the difference of the two tools' correctness on the same image (averaged over draws; images of one photo
count as one sum of theirs), ``s_d`` that of the difference of means over the draws of calibration samples (2.78:
Student's t at four degrees of freedom). It is rather too wide: the scatter over draws holds some of that over images.
Of a single draw there is no ``s_d``, and the interval is of that draw alone.
"""

import base64
import json
import math
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from problem import LEVELS

Cell = dict[str, Any]


def right(cell: Cell) -> NDArray[np.float64]:
    """``[draws, images]``: whether each prediction was right."""
    runs = [run for run in cell["runs"] if "right" in run]
    bits = [np.unpackbits(np.frombuffer(zlib.decompress(base64.b85decode(r["right"])), np.uint8)) for r in runs]
    return np.stack(bits)[:, : cell["images"]].astype(np.float64)


def standard_error(x: NDArray[np.float64], parts: dict[str, tuple[int, int]] | None) -> float:
    """Of the mean of ``x``, of which some in a row may belong together: part -> how many, and how many together."""
    sizes = [size for count, size in (parts or {"": (len(x), 1)}).values() for _ in range(count // size)]
    sums = np.array([part.sum() for part in np.split(x - x.mean(), np.cumsum(sizes)[:-1])])
    return math.sqrt(len(sums) / (len(sums) - 1) * float((sums**2).sum())) / len(x)


def difference(one: Cell, other: Cell) -> tuple[float, float]:
    """Points by which ``one`` is better, and the half width of its interval."""
    a, b = right(one), right(other)
    images = a.mean(0) - b.mean(0)
    over_images = standard_error(images, one.get("parts"))
    over_draws = math.sqrt(sum(x.mean(1).var(ddof=1) / len(x) for x in (a, b))) if min(len(a), len(b)) > 1 else 0
    return 100 * float(images.mean()), 100 * math.hypot(1.96 * over_images, 2.78 * over_draws)


def scored(cell: Cell | None) -> bool:
    return cell is not None and any("right" in run for run in cell["runs"])


def table(cells: list[Cell]) -> str:
    """One network's table: a row for each tool and a column for each kind of levels.

    In square brackets how much was right of each part of the test samples, where they are of several.
    """
    levels = [name for name in LEVELS if any(c["levels"] == name for c in cells)]
    tools = sorted({c["tool"] for c in cells}, key=lambda tool: (tool != "pcq", tool))
    found = {(c["tool"], c["levels"]): c for c in cells}
    lines = ["| tool | " + " | ".join(levels) + " |", "|---" * (len(levels) + 1) + "|"]
    for tool in tools:
        row = []
        for name in levels:
            cell = found.get((tool, name))
            if cell is None or not scored(cell):
                row.append("-")
                continue
            scores = [run["test"] for run in cell["runs"] if "test" in run]
            text = f"{cell['float'] - sum(scores) / len(scores):.2f}"
            if told := [run["parts"] for run in cell["runs"] if "parts" in run]:
                means = {name: sum(each[name] for each in told) / len(told) for name in told[0]}
                text += f" [{', '.join(f'{name} {value:.1f} %' for name, value in means.items())}]"
            own = found.get(("pcq", name))
            if tool != "pcq" and scored(own):
                assert own is not None
                by, width = difference(own, cell)
                verdict = "tie" if abs(by) <= width else "pcq better" if by > 0 else "pcq worse"
                text += f" ({by:+.2f} ± {width:.2f}: {verdict})"
            row.append(text)
        lines.append(f"| {tool} | " + " | ".join(row) + " |")
    lines += ["", "| tool, levels | chosen | tried | val | seconds of CPU | MB |", "|---|---|---|---|---|---|"]
    for (tool, name), cell in sorted(found.items(), key=lambda item: (item[0][0] != "pcq", item[0])):
        runs = [run for run in cell["runs"] if "test" in run]
        if not runs:
            errors = sorted({t["error"] for t in cell["tried"] if "error" in t})
            known = [t["val"] for t in cell["tried"] if "val" in t]
            why = "none was scored on test" if known else f"none: {'; '.join(errors) or 'no such levels'}"
            val = f"{max(known):.2f}" if known else ""
            lines.append(f"| {tool}, {name} | {why} | {len(cell['tried'])} | {val} | | |")
            continue
        chosen = ", ".join(f"{key} {value}" for key, value in cell["chosen"].items())
        best = max(t["val"] for t in cell["tried"] if "val" in t)
        cpu, peak = (sum(run[key] for run in runs) / len(runs) for key in ("cpu_seconds", "peak_mb"))
        lines.append(f"| {tool}, {name} | {chosen} | {len(cell['tried'])} | {best:.2f} | {cpu:.0f} | {peak:.0f} |")
    return "\n".join(lines)


def main() -> None:
    cells: dict[tuple[str, str, str], Cell] = {}
    for path in sys.argv[1:]:
        for cell in json.loads(Path(path).read_text())["cells"]:
            cells[cell["network"], cell["levels"], cell["tool"]] = cell
    for network in dict.fromkeys(key[0] for key in cells):
        own = [cell for key, cell in cells.items() if key[0] == network]
        floats = {cell["float"] for cell in own if "float" in cell}
        print(f"\n## {network}, float {', '.join(f'{value:.2f}' for value in floats)}\n")
        print(table(own))


if __name__ == "__main__":
    main()
