"""What a user types to name a network or a data set: ``KIND:NAME?key=value&key=value``, or a function of their own.

    torchvision:resnet18?num_classes=10        path/to/file.py:function?key=value        package.module:function

Values are Python literals where they parse as one (``10``, ``0.5``, ``True``, ``[1, 2]``), or ``true`` and ``false``;
text otherwise.
"""

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcq.errors import PcqError, did_you_mean
from pcq.torchvision_compat import declare_operators
from pcq.words import kind


@dataclass(frozen=True)
class Spec:
    """``kind:name?options`` taken apart. ``kind`` is what stands before the last colon of a file or module path."""

    kind: str
    name: str
    options: Mapping[str, Any]

    def __str__(self) -> str:
        body = f"{self.kind}:{self.name}" if self.name else self.kind
        return body + ("?" + "&".join(f"{k}={_written(v)}" for k, v in self.options.items()) if self.options else "")


def parse(text: str) -> Spec:
    """Take a spec apart; ``str`` of the result is a spec of the same meaning.

    Raises:
        PcqError: an option that is not ``key=value``, or given twice.
    """
    body, _, query = text.strip().partition("?")
    kind, name = body.rsplit(":", 1) if _is_file(body) else body.partition(":")[::2]
    options: dict[str, Any] = {}
    for part in query.split("&") if query else []:
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise PcqError(f"'{part}' is not an option", where=text, allowed="?key=value&key=value behind the name")
        if key in options:
            raise PcqError(f"the option '{key}' is given twice", where=text, todo="Keep one of the two")
        options[key] = _literal(value)
    return Spec(kind, name, options)


def _is_file(body: str) -> bool:
    return ".py:" in body


_WORDS = {"true": True, "false": False}
"""As text, both would count as true."""


def _literal(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _written(value: Any) -> str:
    """What :func:`_literal` reads as ``value``: text that looks like something else is quoted."""
    return repr(value) if isinstance(value, str) and _literal(value) != value else str(value)


def is_own(spec: Spec) -> bool:
    """Whether the spec names a function of the user's: a ``.py`` file or a dotted module path before the colon."""
    return spec.kind.endswith(".py") or (bool(spec.name) and all(part.isidentifier() for part in spec.kind.split(".")))


def call(spec: Spec, **offered: object) -> object:
    """Call the function, or the class, that ``spec`` names with the spec's options and return what it returns.

    This runs the user's code. ``offered`` arguments are passed too if the function has parameters of those names.

    Raises:
        PcqError: no such file, module or name; the import or the call raised.
    """
    declare_operators()
    with running(spec, "importing it"):
        target = _target(spec, str(spec))
        with contextlib.suppress(TypeError, ValueError):
            known = inspect.signature(target).parameters
            offered = {key: value for key, value in offered.items() if key in known}
        options = {**offered, **spec.options}
    with running(spec, f"{spec.name}({', '.join(f'{key}={value!r}' for key, value in options.items())})"):
        return target(**options)


def takes(spec: Spec, argument: str) -> bool:
    """Whether :func:`call` would offer that ``argument`` to the function, and the spec does not give it itself."""
    with running(spec, "importing it"):
        target = _target(spec, str(spec))
        try:
            return argument in inspect.signature(target).parameters and argument not in spec.options
        except (TypeError, ValueError):
            return argument not in spec.options


@contextlib.contextmanager
def running(spec: Spec, what: str) -> Iterator[None]:
    """The user's code runs inside: its file's folder (or the working folder) comes first on ``sys.path``.

    Raises:
        PcqError: whatever it raised, with the line of the user's own file.
    """
    folder = os.fspath(Path(spec.kind).resolve().parent if spec.kind.endswith(".py") else Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    except PcqError:
        raise
    except (Exception, SystemExit) as error:
        raised = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise PcqError(f"{what} raised {raised}", where=str(spec), todo=_line_in(error, spec)) from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _target(spec: Spec, where: str) -> Callable[..., object]:
    if not spec.name:
        raise PcqError("no function is named", where=where, allowed="file.py:function or package.module:function")
    try:
        module = _load_file(Path(spec.kind)) if spec.kind.endswith(".py") else importlib.import_module(spec.kind)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if spec.kind == missing or spec.kind.startswith(f"{missing}."):
            todo = f"Install the package that has it, or run where `python -c 'import {spec.kind}'` works"
            raise PcqError(f"there is no module '{missing}'", where=where, todo=todo) from error
        todo = f"Run `pip install {missing.partition('.')[0]}`, if that is its package's name"
        raise PcqError(f"it imports '{missing}', which is not installed", where=where, todo=todo) from error
    target: Any = module
    for part in spec.name.split("."):
        if not hasattr(target, part):
            names = [name for name in vars(target) if not name.startswith("_")]
            raise PcqError(f"it has no '{part}'", where=where, todo=did_you_mean(part, names))
        target = getattr(target, part)
    if not callable(target):
        raise PcqError(f"'{spec.name}' is {kind(target)}, not a function or class", where=where)
    called: Callable[..., object] = target
    return called


def _load_file(path: Path) -> object:
    if not path.is_file():
        raise PcqError("there is no such file", where=str(path))
    name = f"pcq_own_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _line_in(error: BaseException, spec: Spec) -> str:
    """``"See line 12 of nets.py"`` for the innermost line of the user's own file in the traceback, or nothing."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename).name == Path(spec.kind).name:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"See line {line} of {spec.kind}" if line else ""
