"""Architecture specs -> modules, and weights into them.

    torchvision:resnet18?num_classes=10     timm:mobilenetv3_small_100     hf:FOLDER     file.py:function?key=value
    package.module:function?key=value       package.module:Class

Nothing is ever downloaded: networks are built without their pretrained weights, and the weights come from the user.
"""

import copy
import importlib
import importlib.util
import inspect
import shlex
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakTensorKeyDictionary

from pcq import weight_norm
from pcq.errors import PcqError, did_you_mean, first_line
from pcq.models.recognition import Shapes
from pcq.spec import Spec, call, is_own, parse
from pcq.torchvision_compat import declare_operators, import_torchvision
from pcq.words import first_of, kind

HALVES = (torch.float16, torch.bfloat16)
KINDS = "torchvision:NAME, timm:NAME, hf:FOLDER, file.py:function or package.module:function"


def build(arch: str, shapes: Shapes | None = None) -> nn.Module:
    """The network that ``arch`` names, in training mode, randomly initialised, without weight_norm, in float32.

    Args:
        arch: the spec. A ``file.py`` or ``package.module`` in it is imported and called: that runs its code. Under
            ``torch.device("meta")`` the network takes no memory, unless its constructor reads values.
        shapes: the state dict's names and shapes, from which a torchvision or timm spec takes ``num_classes`` and
            ``in_chans`` where it does not say them.

    Raises:
        PcqError: the spec is malformed, names an unknown network, needs a package that is absent, or its function
            raised or returned something else than a module.
    """
    spec = parse(complete(arch, shapes) if shapes is not None else arch)
    try:
        return _build(spec)
    except PcqError as error:
        if torch.get_default_device().type != "meta" or not isinstance(error.__cause__, RuntimeError):
            raise
    with torch.device("cpu"):  # a constructor that reads the values of what it makes
        return _build(spec)


def _build(spec: Spec) -> nn.Module:
    module = _made(spec)
    weight_norm.remove(module)
    return module


def _made(spec: Spec) -> nn.Module:
    match spec.kind:
        case "torchvision":
            return _torchvision(spec)
        case "timm":
            return _timm(spec)
        case "hf":
            return _hugging_face(spec)
        case _ if is_own(spec) and not _misspelt(spec):
            return _own(spec)
        case _:
            raise PcqError("this is not an architecture", where=str(spec), allowed=KINDS, todo=_misspelt(spec))


def _misspelt(spec: Spec) -> str:
    """Which kind was meant by a word that is not a module either."""
    if not spec.kind.isidentifier() or Path(f"{spec.kind}.py").exists() or importlib.util.find_spec(spec.kind):
        return ""
    return did_you_mean(spec.kind, ["torchvision", "timm", "hf"])


def complete(arch: str, shapes: Shapes) -> str:
    """``arch`` with the ``num_classes`` and ``in_chans`` that ``shapes`` ask for, where it leaves them open.

    They are found by building the network without memory and comparing: filled in only if the first axis of its last
    tensors, or the second of its first, is what differs.
    """
    spec = parse(arch)
    if spec.kind not in ("torchvision", "timm"):
        return arch
    with torch.device("meta"):
        module = build(arch)
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    differ = [(own[name], tuple(shapes[name])) for name in own if name in shapes and own[name] != tuple(shapes[name])]
    heads = {b[0] for a, b in differ if len(a) == len(b) and a[0] != b[0] and a[1:] == b[1:]}
    stems = {b[1] for a, b in differ if len(a) == len(b) >= 3 and a[1] == 3 != b[1] and (a[0], a[2:]) == (b[0], b[2:])}
    options = dict(spec.options)
    for key, found in (("num_classes", heads), ("in_chans", stems)):
        if len(found) == 1 and key not in options:
            options[key] = found.pop()
    return str(Spec(spec.kind, spec.name, options))


def _torchvision(spec: Spec) -> nn.Module:
    models = import_torchvision().models
    names = models.list_models()
    if spec.name not in names:
        raise PcqError(
            f"torchvision has no network '{spec.name}'",
            where=str(spec),
            todo=did_you_mean(spec.name, names) or "`torchvision.models.list_models()` lists them",
        )
    options = dict(spec.options)
    if refused := [key for key in options if key.startswith(("weights", "pretrained"))]:
        todo = "Leave it out and give the checkpoint's path instead"
        raise PcqError(f"the option '{refused[0]}' would download weights", where=str(spec), todo=todo)
    channels = options.pop("in_chans", 3)
    if spec.name.startswith(("googlenet", "inception")):
        options.setdefault("init_weights", False)
    if "weights_backbone" in inspect.signature(models.get_model_builder(spec.name)).parameters:
        options["weights_backbone"] = None  # it would be downloaded otherwise
    module = _constructed(spec, lambda: models.get_model(spec.name, weights=None, **options))
    return module if channels == 3 else with_input_channels(module, channels)


def with_input_channels(module: nn.Module, channels: int) -> nn.Module:
    """``module`` with its first convolution replaced by one of the same settings for ``channels`` input channels."""
    name, first = next((n, m) for n, m in module.named_modules() if isinstance(m, nn.Conv2d))
    assert first.groups == 1, (name, first)
    replaced = copy.copy(first)
    replaced._parameters = dict(first._parameters)
    replaced.in_channels = channels
    size = (first.out_channels, channels, *first.kernel_size)
    replaced.weight = nn.Parameter(torch.empty(size, dtype=first.weight.dtype, device=first.weight.device))
    replaced.reset_parameters()
    parent, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(parent), attribute, replaced)
    return module


def _timm(spec: Spec) -> nn.Module:
    timm = _timm_package(spec)
    if spec.name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) or not timm.is_model(spec.name):
        raise PcqError(
            f"timm {timm.__version__} has no network '{spec.name}'",
            where=str(spec),
            todo=did_you_mean(spec.name, timm.list_models()) or "`timm.list_models()` lists them",
        )
    if refused := [key for key in spec.options if key.startswith(("pretrained", "checkpoint"))]:
        todo = "Leave it out and give the checkpoint's path instead"
        raise PcqError(f"the option '{refused[0]}' would load other weights", where=str(spec), todo=todo)
    return _constructed(spec, lambda: timm.create_model(spec.name, pretrained=False, **spec.options))


def _timm_package(spec: Spec) -> Any:
    if not declare_operators():
        import_torchvision()  # says how to get it
    return _package("timm", "pip install --no-deps timm` and `pip install huggingface_hub", spec)


def _hugging_face(spec: Spec) -> nn.Module:
    made, config = _configured(spec)
    return _constructed(spec, lambda: (getattr(made, "_from_config", None) or made.from_config)(config))


def _configured(spec: Spec) -> tuple[Any, Any]:
    """The class of transformers that a folder names, and its configuration."""
    declare_operators()  # transformers imports torchvision where it is installed
    transformers = _package("transformers", "pip install transformers", spec)
    folder = Path(spec.name).expanduser()
    source: str | Path = folder if folder.is_dir() else spec.name
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise PcqError("the folder has no config.json", where=str(folder), allowed="a folder saved by save_pretrained")
    # Whole samples are run, torch.export takes no cache, and all is computed in float32, whatever the file holds.
    options = {"use_cache": False, "dtype": "float32", **spec.options}
    try:
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        told = first_line(error)
        todo = "Give a folder with config.json; nothing is downloaded"
        raise PcqError(f"no configuration could be read: {told}", where=str(spec), todo=todo) from error
    except Exception as error:  # transformers checks the options
        raise _not_built(spec, error) from error
    names = getattr(config, "architectures", None) or []
    found = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if found is None:
        raise PcqError(f"transformers {transformers.__version__} has no '{names[0]}'", where=str(spec))
    return found, config


def as_transformers_loads(arch: str, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]] | None:
    """``state`` under the names of the network ``hf:FOLDER``, and what transformers leaves out of it.

    Older names, a network within a larger one's file and parts that became one tensor are its business; the floats stay
    in the dtype of ``state``, of several in one that holds them all. None where it cannot load ``state`` at all.

    Raises:
        PcqError: the network has weights that it does not find there; it would have made them up.
    """
    made, config = _configured(parse(arch))
    logs = importlib.import_module("transformers.utils.logging")
    verbosity, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    floats = (tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    try:
        dtype = reduce(torch.promote_types, floats, next(floats, torch.float32))
        module, told = made.from_pretrained(
            None, config=config, dtype=dtype, state_dict=dict(state), output_loading_info=True
        )
    except Exception:
        return None  # the comparison of the names says more
    finally:
        logs.set_verbosity(verbosity)
        if bars:
            logs.enable_progress_bar()
    own = len(module.state_dict())
    absent = sorted({*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])})
    if told["error_msgs"] or len(absent) == own:
        return None
    if absent:
        what = f"the checkpoint has no values for {len(absent)} of the network's {own} tensors: {first_of(absent)}"
        todo = "Give the checkpoint of this very network, or its folder, whose config.json names the right architecture"
        raise PcqError(what, where=arch, todo=todo)
    weight_norm.remove(module)
    return dict(module.state_dict()), sorted(told["unexpected_keys"])


def _own(spec: Spec) -> nn.Module:
    file = Path.cwd() / spec.kind
    if spec.kind.endswith(".py") and not file.is_file():  # an artifact may record it as seen from another folder
        there = shlex.quote(str(Spec(f"PATH/{file.name}", spec.name, spec.options)))
        raise PcqError(
            f"there is no such file in {file.parent}", where=str(spec), todo=f"Say where it is: --arch {there}"
        )
    found = _inside(call(spec))
    if not isinstance(found, nn.Module):
        todo = f"Let '{spec.name}' return the network itself"
        raise PcqError(f"it returned {kind(found)}, not a torch.nn.Module", where=str(spec), todo=todo)
    if any(is_lazy(tensor) for tensor in (*found.parameters(), *found.buffers())):
        todo = f"Let '{spec.name}' run it on a sample before it returns it"
        raise PcqError(
            "it has lazy layers, whose weights have no shape before they have run", where=str(spec), todo=todo
        )
    if odd := [name for name, value in found.state_dict().items() if not isinstance(value, torch.Tensor)]:
        what = f"its state holds something that is no tensor ({odd[0]}), which no file of pcq keeps"
        raise PcqError(what, where=str(spec), todo="Leave get_extra_state out, or let it return a tensor")
    weight_norm.remove(found)  # its weights are no leaves, which cannot be copied
    if any(value.dtype in HALVES for value in (*found.parameters(), *found.buffers())):
        found.float()
    if any(parameter in _given for parameter in found.parameters()):
        try:
            found = copy.deepcopy(found)
        except Exception as error:
            what = f"it returned weights that it had returned before, and a copy of them raised {first_line(error)}"
            raise PcqError(what, where=str(spec), todo=f"Let '{spec.name}' make a new network each time") from error
    _given.update((parameter, True) for parameter in found.parameters())
    return found


def _inside(found: Any) -> Any:
    """What ``torch.compile``, DataParallel or DistributedDataParallel has wrapped, else ``found`` itself."""
    while isinstance(found, nn.Module):
        if isinstance(found, nn.DataParallel | nn.parallel.DistributedDataParallel):
            found = found.module
        elif list(found._modules) == ["_orig_mod"]:  # OptimizedModule, whose import would take seconds
            found = found._modules["_orig_mod"]
        else:
            break
    return found


_given = WeakTensorKeyDictionary()
"""Parameters of the user's own networks that were handed out: a function may return the same ones again."""


def _package(name: str, install: str, spec: Spec) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        todo = f"Run `{install}`"
        raise PcqError(f"this needs {error.name}, which is not installed", where=str(spec), todo=todo) from error


def _constructed(spec: Spec, make: Callable[[], Any]) -> nn.Module:
    try:
        module = make()
    except Exception as error:
        raise _not_built(spec, error) from error
    assert isinstance(module, nn.Module), spec
    return module


def _not_built(spec: Spec, error: Exception) -> PcqError:
    options = ", ".join(f"{key}={value!r}" for key, value in spec.options.items())
    todo = f"Check the options: {options}" if options else ""
    told = " ".join(str(error).split())
    return PcqError(f"building it raised {type(error).__name__}: {told}", where=str(spec), todo=todo)


def example_shape(arch: str) -> tuple[int, ...] | None:
    """One sample's shape (channels, height, width) at which ``arch`` is usually run; None where that is not known."""
    spec = parse(arch)
    channels = spec.options.get("in_chans", 3)
    if spec.kind == "torchvision":
        side = spec.options.get("image_size", 299 if spec.name == "inception_v3" else 224)
        return channels, side, side
    if spec.kind == "timm":
        config = _timm_package(spec).get_pretrained_cfg(spec.name, allow_unregistered=True)
        side = spec.options.get("img_size", None if config is None else config.input_size[1:])
        return None if side is None else (channels, *(side if isinstance(side, (tuple, list)) else (side, side)))
    return None
