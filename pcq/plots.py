"""Pictures, as PNG bytes; the only room that imports matplotlib (``pip install "pcq[plots]"``)."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pcq.errors import PcqError
from pcq.marks import SOFTWARE
from pcq.prox import Prox, proximal

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def prox_figure(prox: Prox, levels: Sequence[float], strengths: Sequence[float] = STRENGTHS, title: str = "") -> bytes:
    """Draw a proximal map as Figure 1 of arXiv 2110.13220 does: one curve for each strength, the identity dashed.

    Args:
        prox: whose map.
        levels: two or more finite numbers, in any order; they are the grid lines of both axes.
        strengths: numbers in [0, 1].
        title: a line above; the prox itself where empty.

    Returns:
        A PNG.

    Raises:
        PcqError: matplotlib is not installed, or the levels or strengths are not as above.
    """
    ascending = sorted({float(level) for level in levels})
    if len(ascending) < 2 or not all(map(_finite, ascending)):
        raise PcqError(f"the levels to draw are {list(levels)}", allowed="two or more different finite numbers")
    if not strengths or not all(0 <= strength <= 1 for strength in strengths):
        raise PcqError(f"the strengths to draw are {list(strengths)}", allowed="one or more numbers from 0 to 1")
    figure = _figure(5.2, 5.0)
    table = torch.tensor([ascending], dtype=torch.float64)
    margin = 0.25 * (ascending[-1] - ascending[0])
    ends = ascending[0] - margin, ascending[-1] + margin
    middles = (table[:, 1:] + table[:, :-1]) / 2
    beside = 1e-9 * (ends[1] - ends[0])
    weights = torch.cat([torch.linspace(*ends, 801, dtype=torch.float64)[None], middles - beside, middles + beside], 1)
    weights = weights.sort(1).values

    axes = figure.add_subplot()
    axes.plot(ends, ends, linestyle="--", color="0.55", linewidth=1, label="identity")
    for strength in strengths:
        mapped = proximal(weights, table, prox.shifts(strength))
        shade = 0.15 + 0.75 * strength
        axes.plot(weights[0], mapped[0], color=(0.85 * shade, 0.25, 1 - shade), label=f"strength {strength:g}")
    ticks = [f"{level:.3g}" for level in ascending] if len(ascending) <= 17 else [""] * len(ascending)
    axes.set_xticks(ascending, ticks, rotation=90 if len(ascending) > 6 else 0)
    axes.set_yticks(ascending, ticks)
    axes.grid(linewidth=0.5, color="0.85")
    axes.set(xlim=ends, ylim=ends, aspect="equal", xlabel="latent weight", ylabel="weight", title=title or str(prox))
    axes.legend(loc="upper left", fontsize="small", framealpha=0.9)
    return _png(figure)


def bars(values: Sequence[tuple[str, float, bool]], title: str, measure: str) -> bytes:
    """A horizontal bar for each ``(name, value, marked)``, the first on top, on a logarithmic axis.

    Returns:
        A PNG.

    Raises:
        PcqError: matplotlib is not installed.
    """
    figure = _figure(7.0, min(100.0, 1.2 + 0.2 * len(values)))
    axes = figure.add_subplot()
    places = range(len(values))
    colours = ["#c0392b" if marked else "#7f8c8d" for _, _, marked in values]
    least = min((value for _, value, _ in values if value > 0), default=1.0)
    axes.barh(places, [max(value, least / 2) for _, value, _ in values], color=colours, left=0)
    axes.set_yticks(places, [name for name, _, _ in values], fontsize="x-small")
    axes.set(xscale="log", xlabel=measure, title=title)
    axes.set_xlim(least / 2)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.grid(axis="x", linewidth=0.5, color="0.85")
    return _png(figure)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PcqError("drawing needs matplotlib", todo='Install it: `pip install "pcq[plots]"`') from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _png(figure: Any) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": SOFTWARE})
    return png.getvalue()


def require_matplotlib() -> None:
    """So that its absence is said before any work.

    Raises:
        PcqError: it is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise PcqError("drawing needs matplotlib", todo='Install it: `pip install "pcq[plots]"`') from error


def bench_figure(files: Sequence[tuple[str, float, float, float, Mapping[str, float]]]) -> bytes:
    """Bars for files side by side: size, load time, peak memory, and a panel for each latency.

    Args:
        files: name, bytes, seconds to load, bytes of memory, and seconds by what the latency is of.

    Returns:
        A PNG.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    panels: dict[str, list[float | None]] = {
        "size on disk, MB": [each[1] / 1e6 for each in files],
        "load, ms": [1000 * each[2] for each in files],
        "peak memory, MB": [each[3] / 1e6 for each in files],
    }
    for said in dict.fromkeys(said for each in files for said in each[4]):
        panels[f"{said}, ms"] = [1000 * each[4][said] if said in each[4] else None for each in files]
    figure = Figure(figsize=(9, 0.9 + len(panels) * (0.45 + 0.24 * len(files))), dpi=130, layout="constrained")
    names = [each[0] for each in files]
    for axes, (title, values) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True):
        colours = ["0.45", *(f"C{i}" for i in range(len(files) - 1))]
        bars = axes.barh(range(len(files)), [value or 0 for value in values], color=colours)
        axes.bar_label(
            bars, ["-" if value is None else f"{value:.3g}" for value in values], padding=3, fontsize="small"
        )
        axes.set_yticks(range(len(files)), names, fontsize="small")
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(title, loc="left", fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _finite(number: float) -> bool:
    return abs(number) < float("inf")
