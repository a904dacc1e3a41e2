"""Make pcq/models/architectures.json: which torchvision and timm classification networks have which names and shapes.

    pip install --no-deps timm==1.0.31 && pip install huggingface_hub
    python tests/benchmarks/index_architectures.py --out pcq/models/architectures.json

Every constructor is built twice on the meta device, with other numbers of classes and input channels, which shows the
head and the stem. Constructors of equal signature are then compared by function, in float64 on the CPU: the same
random weights (BatchNorm statistics too) in each, the same two random images at the usual size and one at an odd size.
Outputs that agree to 1e-8 are one function. Networks above ``--limit`` parameters are indexed but not compared: each
constructor counts as a function of its own, so a state dict of theirs is ambiguous rather than guessed. Deterministic.
"""

import argparse
import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pcq.models.recognition import Slot, signature, tree_hash
from pcq.torchvision_compat import import_torchvision

torchvision = import_torchvision()
import timm  # noqa: E402  (it imports torchvision)

CLASSES, CHANNELS = 1000, 3
OTHER_CLASSES, OTHER_CHANNELS = 1009, 4
TOLERANCE = 1e-8


@dataclass(frozen=True)
class Constructor:
    spec: str
    make: Callable[[int, int], nn.Module]
    input: tuple[int, int, int]


@dataclass(frozen=True)
class Built:
    constructor: Constructor
    shapes: dict[str, tuple[int, ...]]
    head: tuple[Slot, ...]
    stem: tuple[Slot, ...]
    tree: str
    parameters: int


def torchvision_constructors() -> list[Constructor]:
    models = torchvision.models
    variants: dict[str, list[dict[str, Any]]] = defaultdict(lambda: [{}])
    for name in ("googlenet", "inception_v3"):  # pretrained ones transform their input, scratch ones do not
        variants[name] = [
            {"aux_logits": aux, "transform_input": transform} for aux in (True, False) for transform in (False, True)
        ]
    found = []
    for name in models.list_models(module=models):
        size = 299 if name == "inception_v3" else 224
        if name.startswith("vit_"):
            variants[name] = [{}, {"image_size": 384}, {"image_size": 512}, {"image_size": 518}]
        for options in variants[name]:
            given = {k: v for k, v in options.items() if k != "aux_logits" or v is False}
            given = {k: v for k, v in given.items() if v is not False or k == "aux_logits"}
            query = "&".join(f"{k}={v}" for k, v in given.items())
            fixed = options | ({"init_weights": False} if name in ("googlenet", "inception_v3") else {})

            def make(classes: int, channels: int, name: str = name, fixed: dict[str, Any] = fixed) -> nn.Module:
                from pcq.models import with_input_channels

                module = models.get_model(name, weights=None, num_classes=classes, **fixed)
                return module if channels == CHANNELS else with_input_channels(module, channels)

            side = options.get("image_size", size)
            found.append(Constructor(f"torchvision:{name}" + (f"?{query}" if query else ""), make, (3, side, side)))
    return found


def timm_constructors() -> list[Constructor]:
    def constructor(name: str) -> Constructor:
        def make(classes: int, channels: int) -> nn.Module:
            return timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)

        config = timm.get_pretrained_cfg(name, allow_unregistered=True)
        size = tuple(config.input_size) if config is not None and config.input_size else (3, 224, 224)
        return Constructor(f"timm:{name}", make, size)

    return [constructor(name) for name in timm.list_models()]


class WithoutInit(TorchDispatchMode):
    """Random initialisation costs most of a build and is overwritten here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.normal_, torch.ops.aten.uniform_, torch.ops.aten.erfinv_):
            return args[0]
        return func(*args, **(kwargs or {}))


def shapes_of(constructor: Constructor, classes: int, channels: int) -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    try:
        with torch.device("meta"):
            module = constructor.make(classes, channels)
    except (NotImplementedError, RuntimeError):  # reads values while it builds
        with WithoutInit():
            module = constructor.make(classes, channels)
    return module, {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def open_axes(
    shapes: dict[str, tuple[int, ...]], others: dict[str, tuple[int, ...]]
) -> tuple[tuple[Slot, ...], tuple[Slot, ...]]:
    """(head, stem): the axes that grew with the number of classes, and with the number of input channels."""
    if shapes.keys() != others.keys():
        raise ValueError("its names depend on the number of classes or channels")
    head, stem = [], []
    for name, shape in shapes.items():
        for axis, (size, changed) in enumerate(zip(shape, others[name], strict=True)):
            if size == changed:
                continue
            if size * OTHER_CLASSES == changed * CLASSES:
                head.append(Slot(name, axis, size // CLASSES))
            elif size * OTHER_CHANNELS == changed * CHANNELS:
                stem.append(Slot(name, axis, size // CHANNELS))
            else:
                raise ValueError(f"{name} {shape} -> {others[name]} is not proportional")
    return tuple(head), tuple(stem)


def survey(constructor: Constructor) -> Built:
    module, shapes = shapes_of(constructor, CLASSES, CHANNELS)
    try:
        head, stem = open_axes(shapes, shapes_of(constructor, OTHER_CLASSES, OTHER_CHANNELS)[1])
    except Exception as error:
        print(f"  {constructor.spec}: only {CHANNELS} input channels ({str(error)[:80]})")
        head, stem = open_axes(shapes, shapes_of(constructor, OTHER_CLASSES, CHANNELS)[1])
    if not head:
        raise ValueError("it has no classification head")
    tree = tree_hash(module.state_dict()._metadata)
    return Built(constructor, shapes, head, stem, tree, sum(p.numel() for p in module.parameters()))


def random_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under which every part of a network matters: fan-in scaled, gains and variances around one."""
    result = {}
    for name, tensor in state.items():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        generator = torch.Generator().manual_seed(seed)
        if not tensor.is_floating_point():
            result[name] = tensor.clone()
        elif name.endswith(("bias", "running_mean")):
            result[name] = 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        elif tensor.ndim <= 1 or math.prod(tensor.shape) == max(tensor.shape):
            result[name] = 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        else:
            fan_in = math.prod(tensor.shape[1:]) if name.endswith("weight") else 4
            result[name] = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).mul_(1.4 / fan_in**0.5)
    return result


def outputs(constructor: Constructor, state: dict[str, Tensor] | None, sizes: list[tuple[int, ...]]) -> Any:
    """(state used, output for each size or None where the network refuses it)."""
    with WithoutInit():
        module = constructor.make(CLASSES, CHANNELS)
    if state is None:
        state = random_state(module.state_dict())
    module = module.double().eval()
    module.load_state_dict(state, strict=True)
    results: list[Tensor | None] = []
    for index, size in enumerate(sizes):
        x = torch.randn(2 if index == 0 else 1, *size, generator=torch.Generator().manual_seed(index)).double()
        try:
            with torch.no_grad():
                out = module(x)
            out = out[0] if isinstance(out, (tuple, list)) else out
            results.append(out.flatten(1))
        except Exception:
            results.append(None)
    return state, results


def alive(out: Tensor | None) -> bool:
    """The first output exists, is finite and depends on the image."""
    if out is None or not out.isfinite().all():
        return False
    return bool((out[0] - out[1]).abs().max() > 1e-3 * out.abs().max())


def same(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    for x, y in zip(a, b, strict=True):
        if (x is None) != (y is None):
            return False
        if x is None or y is None:
            continue
        if x.shape != y.shape or not (x - y).abs().max() <= TOLERANCE * x.abs().max():
            return False
    return True


def classes_of(group: list[Built], limit: int) -> tuple[list[list[Built]], str]:
    """The group cut into functions, and a word where it could not be compared."""
    if len(group) == 1:
        return [group], ""
    if group[0].parameters > limit:
        return [[built] for built in group], f"{group[0].parameters / 1e6:.0f} M parameters: not compared"
    channels, height, width = group[0].constructor.input
    sizes: list[tuple[int, ...]] = [(channels, height, width), (channels, height + 37, width + 37)]
    state, found, note = None, [], ""
    for built in group:
        state, results = outputs(built.constructor, state, sizes)
        if not alive(results[0]):
            found.append(([built], None))
            note += f"{'; ' * bool(note)}{built.constructor.spec} gave nothing to compare at {sizes[0]}"
            continue
        for members, known in found:
            if known is not None and same(known, results):
                members.append(built)
                break
        else:
            found.append(([built], results))
    return [members for members, _ in found], note


def order(built: Built) -> tuple[bool, int, str]:
    spec = built.constructor.spec
    return not spec.startswith("torchvision:"), len(spec), spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=float, default=320e6, help="parameters above which nothing is compared")
    parser.add_argument("--only", default="", help="only constructors whose spec contains this")
    args = parser.parse_args()
    start = time.time()
    left_out: dict[str, str] = {}
    groups: dict[tuple[tuple[Slot, ...], tuple[Slot, ...], str], list[Built]] = defaultdict(list)
    constructors = [c for c in torchvision_constructors() + timm_constructors() if args.only in c.spec]
    for constructor in constructors:
        try:
            built = survey(constructor)
        except Exception as error:
            left_out[constructor.spec] = str(error).splitlines()[0][:100]
            print(f"  left out {constructor.spec}: {left_out[constructor.spec]}", flush=True)
            continue
        groups[built.head, built.stem, signature(built.shapes, built.head + built.stem)].append(built)
    print(f"{len(constructors)} constructors, {len(groups)} signatures, {time.time() - start:.0f} s", flush=True)

    slots: list[tuple[Slot, ...]] = []
    networks: dict[str, Any] = {}
    ambiguous, not_compared = 0, {}
    for (head, stem, key), group in sorted(groups.items(), key=lambda item: item[0][2]):
        group.sort(key=order)
        functions, note = classes_of(group, int(args.limit))
        if note:
            not_compared[group[0].constructor.spec] = note
        if len(group) > 1:
            named = " | ".join("=".join(b.constructor.spec for b in members) for members in functions)
            print(f"{time.time() - start:5.0f} s  {named}  {note}", flush=True)
        ambiguous += len(functions) > 1
        entry: list[Any] = []
        for pair in (head, stem):
            if pair not in slots:
                slots.append(pair)
            entry.append(slots.index(pair))
        for members in functions:
            trees = sorted({b.tree for b in members}) if len(functions) > 1 else []
            entry.append([members[0].constructor.spec, list(members[0].constructor.input), trees])
        assert key not in networks
        networks[key] = entry
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__}
    lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in networks.items())
    tables = ",\n".join("  " + json.dumps([[s.name, s.axis, s.factor] for s in group]) for group in slots)
    text = (
        f'{{\n "format": 1,\n "versions": {json.dumps(versions)},\n "left_out": {json.dumps(left_out, indent=2)},\n'
        f' "not_compared": {json.dumps(not_compared, indent=2)},\n'
        f' "slots": [\n{tables}\n ],\n "networks": {{\n{lines}\n }}\n}}\n'
    )
    json.loads(text)
    args.out.write_text(text)
    print(f"{len(networks)} signatures, {ambiguous} ambiguous, {len(text)} bytes, {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
