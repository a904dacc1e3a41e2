"""torchvision beside any torch.

The torchvision wheel of the package index is built against a CUDA torch. Beside a CPU torch its compiled half does not
load, and ``import torchvision`` stops at «operator torchvision::nms does not exist», because it registers shape rules
for two operators that nobody declared. Declaring their schemas first is enough for models, transforms and datasets;
compiled operators (NMS itself, image decoding) stay absent. Where the compiled half loads, nothing is declared.
"""

import importlib.machinery
import importlib.util
import sys
from types import ModuleType

import torch

from pcq.errors import PcqError

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a Library that is collected takes its declarations with it


def declare_operators() -> bool:
    """Make a later ``import torchvision`` work, without importing it. False if torchvision is not installed."""
    if sys.modules.get("torchvision") is not None or _declared:
        return True
    found = importlib.util.find_spec("torchvision")
    if found is None or not found.submodule_search_locations:
        return False
    if not _compiled_half_loads(list(found.submodule_search_locations)):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in SCHEMAS:
            if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
                library.define(schema)
        _declared.append(library)
    return True


def _compiled_half_loads(folders: list[str]) -> bool:
    compiled = importlib.machinery.PathFinder.find_spec("_C", folders)
    if compiled is None or compiled.origin is None:
        return False
    try:
        torch.ops.load_library(compiled.origin)
    except OSError:
        return False
    return True


def import_torchvision() -> ModuleType:
    """The torchvision module.

    Raises:
        PcqError: it is not installed, or does not fit the installed torch.
    """
    if not declare_operators():
        raise PcqError("this needs torchvision, which is not installed", todo="Run `pip install torchvision --no-deps`")
    try:
        import torchvision
    except Exception as error:  # whatever a torchvision of another year trips over
        raise PcqError(
            f"torchvision is installed but does not import beside torch {torch.__version__}: {error}",
            todo="Install the torchvision that belongs to it: `pip install --upgrade torchvision --no-deps`",
        ) from error
    module: ModuleType = torchvision
    return module
