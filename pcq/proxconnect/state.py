"""What a run is saved as: tensors and plain values."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pcq.errors import PcqError
from pcq.grids import Affine, Codebook, Grid

FORMAT = 2
STATE = ("run", "step", "hardened", "asked", "weights")
WEIGHT = ("latent", "mu", "grid", "codes", "quantizer", "rows")
"""What a saved state holds beside its format, and of each weight."""


def refuse_partial(state: Mapping[str, Any]) -> None:
    """
    Raises:
        PcqError: of another version, or not all that :meth:`ProxConnect.state_dict` gives.
    """
    allowed = "what ProxConnect.state_dict() gave"
    if not isinstance(state, Mapping) or "format" not in state:
        held = f": its keys are {', '.join(map(str, list(state)[:3]))}" if isinstance(state, Mapping) and state else ""
        raise PcqError(f"this is no state of a ProxConnect{held}", where="ProxConnect state", allowed=allowed)
    if state["format"] != FORMAT:
        raise PcqError(f"the ProxConnect state has format {state['format']!r}", allowed=f"format {FORMAT}")
    missing = [key for key in STATE if key not in state]
    missing += [
        f"{key} of {name}" for name, saved in state.get("weights", {}).items() for key in WEIGHT if key not in saved
    ]
    if missing:
        what = f"it is not whole: {', '.join(missing[:3])}{', ...' * (len(missing) > 3)} missing"
        raise PcqError(what, where="ProxConnect state", allowed=allowed)


def grid_state(grid: Grid) -> dict[str, Any]:
    if isinstance(grid, Affine):
        return {"kind": "affine", "scale": grid.scale, "zero_point": grid.zero_point, "count": grid.count}
    return {"kind": "codebook", "table": grid.table, "scale": grid.scale}


def grid_from(state: Mapping[str, Any], device: torch.device) -> Grid:
    here: dict[str, Any] = {
        key: value.to(device) if isinstance(value, Tensor) else value for key, value in state.items()
    }
    if here["kind"] == "affine":
        return Affine(here["scale"], here["zero_point"], here["count"])
    return Codebook(here["table"], here["scale"])
