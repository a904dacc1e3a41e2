"""What every tensor of a state dict is: from the module that holds it where there is one, else from name and shape.

Without a module some things cannot be known, and are taken to be the usual case: a convolution of one input channel is
depthwise unless it is the first one (``[c, 1, k, k]``); other grouped convolutions count as ungrouped; a transposed
convolution shows only where its bias is longer or shorter than its first axis; a two-dimensional weight is a linear
layer unless its layer is called an embedding.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from pcq.plan import Parameter

CONVOLUTIONS = {3: "conv1d", 4: "conv2d", 5: "conv3d"}
EMBEDDING = re.compile(
    r"(^|_)(embed|embedd?ings?|emb|wte|wpe|tok|vocab|token_embedding_table|relative_attention_bias)($|_tokens|_positions)"
)
RECURRENT = re.compile(r"^weight_(ih|hh|hr)(_l\d+(_reverse)?)?$")
ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.|(^|\.)weight_(g|v|orig)$")
PART = "part of a weight (weight_norm or the like): remove that before saving"
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def inventory(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    module: nn.Module | None = None,
    tied: Mapping[str, str] | None = None,
) -> list[Parameter]:
    """One :class:`Parameter` for every tensor, in the order of ``shapes``.

    Args:
        shapes: names and shapes of the state dict.
        dtypes: their dtypes without ``torch.``.
        module: the network they belong to (it may be on the meta device); names it does not have are judged without.
        tied: name -> first name of the same tensor; what the module itself shares is added.
    """
    holders = _holders(module) if module is not None else {}
    shared = _tied_in(module, shapes) | dict(tied or {}) if module is not None else dict(tied or {})
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)} if module is not None else set()
    first = next((name for name, shape in shapes.items() if _weight(name) and len(shape) in CONVOLUTIONS), None)
    parameters = []
    for name, shape in shapes.items():
        dtype = dtypes[name]
        kind, groups = "buffer", 1
        if name not in buffers and name.rpartition(".")[2] not in BUFFERS and _is_float(dtype):
            holder = holders.get(name)
            known = None if holder is None else _by_module(holder, name.rpartition(".")[2], len(shape))
            kind, groups = known or _by_name(name, shapes, first)
        turned = kind == "linear" and _turned(name, shapes, holders.get(name))
        why = PART if kind == "other" and PARAMETRIZED.search(name) else ""
        parameters.append(Parameter(name, shape, dtype, kind, groups, shared.get(name), why, turned))
    return parameters


def _holders(module: nn.Module) -> dict[str, nn.Module]:
    """Parameter name -> the module it is an attribute of."""
    return {
        f"{path}.{name}" if path else name: owner
        for path, owner in module.named_modules(remove_duplicate=False)
        for name in owner._parameters
    }


def _tied_in(module: nn.Module, shapes: Iterable[str]) -> dict[str, str]:
    owned = {name: id(p) for name, p in module.named_parameters(remove_duplicate=False)}
    first: dict[int, str] = {}
    return {
        name: first[owned[name]] for name in shapes if name in owned and first.setdefault(owned[name], name) != name
    }


def _is_float(dtype: str) -> bool:
    return bool(getattr(torch, dtype).is_floating_point)


def _weight(name: str) -> bool:
    return name.rpartition(".")[2] == "weight"


def _by_module(holder: nn.Module, name: str, ndim: int) -> tuple[str, int] | None:
    """(kind, groups) from the type of the module that holds the parameter; None where the type says nothing."""
    if isinstance(holder, nn.modules.conv._ConvNd):
        if name != "weight":
            return ("bias" if name == "bias" else "other"), 1
        return f"conv{'_transpose' if holder.transposed else ''}{ndim - 2}d", holder.groups
    if isinstance(holder, nn.Linear):
        return {"weight": "linear", "bias": "bias"}.get(name, "other"), 1
    if isinstance(holder, (nn.Embedding, nn.EmbeddingBag)):
        return ("embedding" if name == "weight" else "other"), 1
    if isinstance(holder, NORMS):
        return "norm", 1
    if isinstance(holder, nn.MultiheadAttention):
        return ("linear" if name in ATTENTION else "bias" if name == "in_proj_bias" else "other"), 1
    if isinstance(holder, (nn.RNNBase, nn.RNNCellBase)):
        return ("linear" if RECURRENT.match(name) else "bias"), 1
    if isinstance(holder, (nn.Bilinear, nn.PReLU)) or type(holder).__name__ == "ParametrizationList":
        return ("bias" if name == "bias" else "other"), 1
    return None


def _turned(name: str, shapes: Mapping[str, tuple[int, ...]], holder: nn.Module | None) -> bool:
    """Whether a matrix is ``[in, out]``: transformers' Conv1D; without a module, if its bias is as long as its rows."""
    if holder is not None:
        return type(holder).__name__ == "Conv1D"
    (out, width), bias = shapes[name], shapes.get(f"{name.removesuffix('weight')}bias")
    return bias == (width,) and width != out


def _by_name(name: str, shapes: Mapping[str, tuple[int, ...]], first_convolution: str | None) -> tuple[str, int]:
    """(kind, groups) from the name and the shapes around it."""
    path, _, last = name.rpartition(".")
    shape = shapes[name]
    stem = f"{path}." if path else ""
    if len(shape) <= 1:
        gain = shapes.get(f"{stem}weight", shapes.get(f"{stem}gamma"))
        if last in ("bias", "beta"):
            return ("norm" if gain is not None and len(gain) == 1 else "bias"), 1
        return ("norm" if last in ("weight", "gamma") and shape else "bias" if "bias" in last else "other"), 1
    if len(shape) == 2 and (last in ATTENTION or RECURRENT.match(last)):
        return "linear", 1
    if last != "weight" or "parametrizations" in path.split("."):
        return "other", 1
    if len(shape) == 2:
        return ("embedding" if EMBEDDING.search(path.rpartition(".")[2].lower()) else "linear"), 1
    if len(shape) not in CONVOLUTIONS:
        return "other", 1
    bias = shapes.get(f"{stem}bias", (shape[0],))
    if len(bias) == 1 and bias[0] != shape[0] and bias[0] % shape[1] == 0:
        return f"conv_transpose{len(shape) - 2}d", bias[0] // shape[1]
    depthwise = shape[1] == 1 and shape[0] > 1 and name != first_convolution
    return CONVOLUTIONS[len(shape)], shape[0] if depthwise else 1
