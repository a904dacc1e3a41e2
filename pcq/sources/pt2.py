"""``.pt2`` files of ``torch.export``: their weights, and their program without the weights.

``torch.export.load`` can run code of the file: pickled inputs and constants, formulas that are evaluated, operators
that are looked up by name, compiled libraries. Here the weights are read as the bytes they are, and :func:`strip`
keeps of the program only what :func:`screen` knows to be harmless: operators of torch, names, formulas of integers.
:func:`revive` screens again, because a stripped program travels inside artifacts, and only then calls torch.
"""

import ast
import io
import json
import math
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from pcq.errors import CheckFailed, PcqError
from pcq.sources.archive import damaged, read_strided
from pcq.sources.source import Entry
from pcq.sources.tensors import tensor_entries

if TYPE_CHECKING:
    from torch.export import ExportedProgram

CONFIG = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
INPUTS = "data/sample_inputs/model.pt"
MODEL = "models/model.json"
KEPT = re.compile(
    "|".join(map(re.escape, (CONFIG, CONSTANTS, MODEL, INPUTS, "archive_version"))) + r"|data/constants/tensor_\d+"
)
FIXED = {"archive_format": "pt2", "byteorder": "little", ".data/version": "3\n"}
DTYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    10: "complex64", 12: "bool", 13: "bfloat16", 28: "uint16", 29: "float8_e4m3fn", 30: "float8_e5m2",
    31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz", 34: "uint32", 35: "uint64",
}  # fmt: skip
"""The numbers torch.export writes for dtypes (``torch._export.serde.schema.ScalarType``)."""
OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|torchvision)\.(?!from_file)\w+(\.\w+)?"
    r"|torch\.ops\.higher_order\.(cond|while_loop|scan|map_impl|invoke_subgraph|wrap_with_(set_grad_enabled|autocast))"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|getitem|eq|ne|lt|le|gt|ge|and_|or_|not_|xor)"
    r"|math\.(ceil|floor|trunc|sqrt)|torch\._?sym_\w+"
)
NAMES = {"name", "as_name", "forward_arg_names", "parameter_name", "buffer_name", "tensor_constant_name", "fqn"}
FUNCTION = re.compile(
    r"Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|ModularIndexing|Where"
    r"|CeilToInt|FloorToInt|TruncToInt|RoundToInt|ToFloat|TruncToFloat|RoundDecimal|LShift|RShift|PowByNatural|FloatPow"
    r"|FloatTrueDiv|IntTrueDiv|IsNonOverlappingAndDenseIndicator|Identity|floor|ceiling|Abs|And|Or|Not|Eq|Ne|Gt|Ge|Lt"
    r"|Le|Equality|Unequality|GreaterThan|LessThan|StrictGreaterThan|StrictLessThan"
)
SYMBOL = re.compile(r"[a-z]+\d+|oo|int_oo")
FORMULA = (ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.BinOp, ast.UnaryOp, ast.Compare,
           ast.BoolOp, ast.operator, ast.unaryop, ast.cmpop, ast.boolop)  # fmt: skip
TREES = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}


def pt2_entries(path: Path) -> tuple[dict[str, Entry], bytes | None, list[str]]:
    """``-> the state dict's entries, the stripped program or None, notes``; nothing in the file is executed.

    Raises:
        CheckFailed: the archive is damaged.
        PcqError: it holds no weights (compiled, or another kind of package).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = by_name(archive)
            if CONFIG not in records:
                return pickled_weights(archive, records, path)
            entries = {
                name: entry(path, archive, records, payload)
                for name, payload in json.loads(archive.read(records[CONFIG]))["config"].items()
            }
            try:
                return entries, strip(archive), []
            except ValueError as error:
                return entries, None, [unusable(error)]
    except PcqError:
        raise
    except Exception as error:  # a damaged archive raises anything at all
        raise damaged(path, f"{type(error).__name__} {error}") from error


def unusable(error: ValueError) -> str:
    """The note for a program that is left behind."""
    return f"The program in the file is left out, only its weights are taken: {error}."


def by_name(archive: zipfile.ZipFile) -> dict[str, str]:
    """Record name without the archive's root folder -> its name in the zip."""
    return {name.partition("/")[2]: name for name in archive.namelist()}


def entry(path: Path, archive: zipfile.ZipFile, records: Mapping[str, str], payload: Mapping[str, Any]) -> Entry:
    """One weight of the configuration."""
    member = records[f"data/weights/{payload['path_name']}"]
    if payload["use_pickle"]:
        tensor = torch.load(io.BytesIO(archive.read(member)), map_location="cpu", weights_only=True)
        return tensor_entries({member: tensor.detach()}, path, [])[member]
    dtype, shape, stride, offset = layout(payload["tensor_meta"])
    read = partial(read_strided, path, member, getattr(torch, dtype), shape, stride, offset)
    return Entry(shape, dtype, read, (member, shape, stride, offset) if math.prod(shape) else None)


def layout(meta: Mapping[str, Any]) -> tuple[str, tuple[int, ...], tuple[int, ...], int]:
    """``tensor_meta`` -> dtype, shape, stride, offset."""
    shape, stride = (tuple(int(item["as_int"]) for item in meta[key]) for key in ("sizes", "strides"))
    return DTYPES[meta["dtype"]], shape, stride, int(meta["storage_offset"]["as_int"])


def pickled_weights(
    archive: zipfile.ZipFile, records: Mapping[str, str], path: Path
) -> tuple[dict[str, Entry], None, list[str]]:
    """The form that torch wrote before 2.9: the state dict as one pickle."""
    names = {name.rpartition("/")[2]: name for name in archive.namelist()}
    member = names.get("serialized_state_dict.pt") or records.get("data/weights/model.pt")
    if member is None:
        todo = "Give the state dict, or a file of torch.export.save"
        raise PcqError("a .pt2 package without weights to read (compiled?)", where=str(path), todo=todo)
    state = torch.load(io.BytesIO(archive.read(member)), map_location="cpu", weights_only=True)
    notes: list[str] = []
    entries = tensor_entries({name: tensor.detach() for name, tensor in state.items()}, path, notes)
    reason = ValueError("an older torch wrote it; export it again to keep the program")
    return entries, None, [*notes, unusable(reason)]


def strip(archive: zipfile.ZipFile) -> bytes:
    """The program without its weights, source paths and example values: a compressed zip of a few kilobytes.

    Raises:
        ValueError: the program holds something that could run code; its message says what.
    """
    records = by_name(archive)
    weights = json.loads(archive.read(records[CONFIG]))["config"]
    constants = json.loads(archive.read(records[CONSTANTS]))["config"] if CONSTANTS in records else None
    if constants is None or MODEL not in records:
        raise ValueError("an older torch wrote it; export it again to keep the program")
    refuse_pickles(weights, constants)
    model = json.loads(archive.read(records[MODEL]))
    model["guards_code"] = []
    forget(model)
    name_outputs(model)
    screen(model)
    kept: dict[str, str | bytes] = {
        CONFIG: json.dumps({"config": weights}),
        CONSTANTS: json.dumps({"config": constants}),
        MODEL: json.dumps(model),
        INPUTS: zero_inputs(archive.read(records[INPUTS])),
        "archive_version": archive.read(records["archive_version"]),
    }
    for payload in constants.values():
        record = f"data/constants/{payload['path_name']}"
        kept[record] = archive.read(records[record])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
        for name, content in kept.items():
            out.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)  # ZipInfo: no time stamps
    return buffer.getvalue()


def refuse_pickles(weights: Mapping[str, Any], constants: Mapping[str, Any]) -> None:
    """Let pass only tensors stored as their bytes."""
    for name, payload in (*weights.items(), *constants.items()):
        if payload["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]):
            raise ValueError(f"'{name}' is a pickled object")


def forget(model: Any) -> None:
    """Drop what names the exporter's own files: every node's metadata but its module path."""
    for found in dicts(model):
        if isinstance(found.get("metadata"), dict) and "target" in found:
            found["metadata"] = {k: v for k, v in found["metadata"].items() if k == "nn_module_stack"}


def name_outputs(model: Any) -> None:
    """Make outputs of a class that is a dictionary of names, such as Hugging Face's, dictionaries of those names."""
    for found in dicts(model):
        if found.get("out_spec"):
            spec = json.loads(found["out_spec"])
            for tree in dicts(spec):
                if tree.get("type") not in TREES and are_names(json.loads(tree["context"]), len(tree["children_spec"])):
                    tree["type"] = "builtins.dict"
            found["out_spec"] = json.dumps(spec)


def are_names(context: object, count: int) -> bool:
    """Whether what is known of a node of a tree are names of its ``count`` children."""
    return isinstance(context, list) and len(context) == count and all(isinstance(name, str) for name in context)


def zero_inputs(data: bytes) -> bytes:
    """The example inputs with zeros for values; nothing if they are not plain tensors."""
    if not data:
        return b""
    try:
        inputs = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # a pickle of anything else
        return b""
    buffer = io.BytesIO()
    torch.save(_pytree.tree_map_only(Tensor, torch.zeros_like, inputs), buffer)
    return buffer.getvalue()


def dicts(node: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object inside ``node``, itself first."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from dicts(child)


def screen(model: Any) -> None:
    """Let pass only a program that runs nothing but torch's tensor operators.

    Raises:
        ValueError: what is not among them.
    """
    if model.get("guards_code"):
        raise ValueError("it has guards, which are Python code")
    for found in dicts(model):
        for key, value in found.items():
            if key in ("target", "as_operator") and not OPERATOR.fullmatch(str(value)):
                raise ValueError(f"it calls {value}")
            if key == "as_custom_obj" or (key == "custom_obj_values" and value):
                raise ValueError("it holds a custom object")
            if key == "metadata" and "target" in found and set(value) - {"nn_module_stack"}:
                raise ValueError(f"a node carries metadata: {', '.join(value)}")
            if key in NAMES and not all(
                re.fullmatch(r"[\w.]*", str(name)) for name in (value if isinstance(value, list) else [value])
            ):
                raise ValueError(f"{value!r} is not a name")
            if key == "expr_str" and not is_formula(value):
                raise ValueError(f"{value!r} is not a formula of integers")
            if key in ("in_spec", "out_spec") and value:
                for tree in dicts(json.loads(value)):
                    if "type" in tree and (tree["type"] not in TREES or "__enum__" in str(tree.get("context"))):
                        raise ValueError(f"its inputs or outputs are of type {tree['type']}")


def is_formula(text: str) -> bool:
    """Whether ``text`` is arithmetic on symbols and numbers, calling only known functions of sympy and torch."""
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:
        return False
    for node in ast.walk(tree):
        if not isinstance(node, FORMULA):
            return False
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and FUNCTION.fullmatch(node.func.id)):
            return False
        if isinstance(node, ast.Name) and not (FUNCTION.fullmatch(node.id) or SYMBOL.fullmatch(node.id)):
            return False
        if isinstance(node, ast.Constant) and not (
            isinstance(node.value, (bool, int, float))
            or (isinstance(node.value, str) and re.fullmatch(r"\w+", node.value))
        ):
            return False
    return True


def revive(program: bytes, state: Mapping[str, Tensor]) -> "ExportedProgram":
    """Put weights back into a stripped program and load it.

    Args:
        program: what :func:`strip` made.
        state: a value for every weight of the program, of its shape and dtype.

    Raises:
        CheckFailed: the program is damaged, holds code, or is not one this torch can load.
        PcqError: ``state`` does not fit it.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(program)) as archive:
            kept = {name: archive.read(name) for name in archive.namelist() if KEPT.fullmatch(name)}
        screen(json.loads(kept[MODEL]))
        config = json.loads(kept[CONFIG])["config"]
        constants = json.loads(kept[CONSTANTS])["config"]
        refuse_pickles(config, constants)
        kept[INPUTS] = zero_inputs(kept[INPUTS])
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as out:
            for i, (name, payload) in enumerate(config.items()):
                place(payload, name, f"weight_{i}", state)
                bytes_of = state[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy()
                out.writestr(f"pcq/data/weights/weight_{i}", bytes_of.tobytes())
            kept[CONFIG] = json.dumps({"config": config}).encode()
            for name, content in {**kept, **{k: v.encode() for k, v in FIXED.items()}}.items():
                out.writestr(f"pcq/{name}", content)
        buffer.seek(0)
        return torch.export.load(buffer)
    except PcqError:
        raise
    except Exception as error:  # whatever another version of torch trips over
        what = f"the exported program inside does not load ({type(error).__name__}: {error})"
        raise CheckFailed(what, todo="Export it again with this torch, or give the architecture with --arch") from error


def runnable(program: "ExportedProgram") -> nn.Module:
    """A program as a module; ``eval()`` does nothing, for the mode was fixed by the export.

    Inputs that it was exported with by name are taken in their order, too.
    """
    module: nn.Module = program.module()
    module.eval = lambda: module  # type: ignore[method-assign]
    args, named = program.call_spec.in_spec.children() if program.call_spec.in_spec is not None else (None, None)
    if args is not None and named is not None and named.num_children:
        by_position, keys = args.num_children, list(named.context)

        def ordered(_: nn.Module, given: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            extra = given[by_position:]
            return given[:by_position] + extra[len(keys) :], {**dict(zip(keys, extra, strict=False)), **kwargs}

        module.register_forward_pre_hook(ordered, prepend=True, with_kwargs=True)
    return module


def counting(shapes: Sequence[Sequence[object]]) -> list[bool]:
    """Of a program's inputs, whose first axis is open and counts the samples: it is that of the first input."""
    first = str(shapes[0][:1])
    return [len(shape) > 0 and not isinstance(shape[0], int) and str(shape[:1]) == first for shape in shapes]


Inputs = tuple[Tensor, ...] | dict[str, Tensor]
"""What a program takes by position, or by name."""


def example_inputs(program: bytes) -> Inputs:
    """The inputs that a stripped program was exported with, as zeros; empty unless all are tensors, given one way."""
    with zipfile.ZipFile(io.BytesIO(program)) as archive:
        data = zero_inputs(archive.read(INPUTS))
    loaded = torch.load(io.BytesIO(data), weights_only=True) if data else ((), {})
    args, named = loaded if isinstance(loaded, tuple) and len(loaded) == 2 else ((), {})
    tensors = all(isinstance(each, Tensor) for each in (*args, *named.values()))
    return () if not tensors or (args and named) else named or tuple(args)


def place(payload: dict[str, Any], name: str, record: str, state: Mapping[str, Tensor]) -> None:
    """Point one weight's entry at a record of its own."""
    dtype, shape, _, _ = layout(payload["tensor_meta"])
    tensor = state.get(name)
    if tensor is None or tuple(tensor.shape) != shape or str(tensor.dtype) != f"torch.{dtype}":
        found = "is missing" if tensor is None else f"is {tensor.dtype} {list(tensor.shape)}"
        raise PcqError(f"the program's weight '{name}' {found}, where {dtype} {list(shape)} is needed")
    payload["path_name"] = record
    strides = torch.empty(shape, device="meta").stride()
    payload["tensor_meta"] |= {"strides": [{"as_int": s} for s in strides], "storage_offset": {"as_int": 0}}
