"""Architectures: built from specs without downloads, recognised from names and shapes, filled with weights."""

import functools
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

import pcq
from pcq import models, scores
from pcq.commands import analyze, plan
from pcq.errors import PcqError
from pcq.inventory import PART, inventory
from pcq.models.recognition import Slot, read_index, recognise, signature, tree_hash
from pcq.sources import open_source
from pcq.spec import parse
from pcq.torchvision_compat import import_torchvision
from tests.test_calibrate import Conv1D

CLASSIFIERS = import_torchvision().models.list_models(module=import_torchvision().models)
COMPARED = "resnet18", "mobilenet_v2", "mobilenet_v3_small", "convnext_tiny", "vit_b_32", "swin_t", "densenet121"


class WithoutInit(TorchDispatchMode):
    """Random numbers take seconds even where no memory is."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        random = func.overloadpacket in (torch.ops.aten.normal_, torch.ops.aten.uniform_)
        return args[0] if random else func(*args, **(kwargs or {}))


def on_meta(arch: str) -> nn.Module:
    with torch.device("meta"), WithoutInit():
        return models.build(arch)


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@cache
def known(arch: str) -> dict[str, tuple[int, ...]]:
    return shapes_of(on_meta(arch))


# -- specs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "name", "options"),
    [
        ("torchvision:resnet18?num_classes=10", "torchvision", "resnet18", {"num_classes": 10}),
        ("a/b.py:f?x=[1, 2]&y=hey&z=0.5&w=True", "a/b.py", "f", {"x": [1, 2], "y": "hey", "z": 0.5, "w": True}),
        ("C:\\x\\f.py:g.h", "C:\\x\\f.py", "g.h", {}),
        ("folder:/data/a:b?mean=0.5,0.5", "folder", "/data/a:b", {"mean": (0.5, 0.5)}),
        ("digits", "digits", "", {}),
        ("hf:org/name", "hf", "org/name", {}),
        ("m:f?path=/a=b", "m", "f", {"path": "/a=b"}),
        ("m:f?a=false&b=true&c='true'&d='5'", "m", "f", {"a": False, "b": True, "c": "true", "d": "5"}),
    ],
)
def test_specs_come_apart_and_together(text: str, kind: str, name: str, options: dict[str, object]) -> None:
    spec = parse(text)
    assert (spec.kind, spec.name, spec.options) == (kind, name, options)
    assert parse(str(spec)) == spec


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
        st.integers() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.tuples(st.integers()),
    )
)
@settings(deadline=None, max_examples=50)
def test_specs_keep_every_value(options: dict[str, object]) -> None:
    spec = parse("torchvision:net?" + "&".join(f"{key}={value}" for key, value in options.items()))
    assert spec.options == options
    assert parse(str(spec)) == spec


# -- torchvision beside any torch -----------------------------------------------------------------------------------


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_torchvision_runs_here() -> None:
    assert models.build("torchvision:squeezenet1_1")(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_only_what_is_missing_is_declared_and_nothing_where_the_compiled_half_loads() -> None:
    code = (
        "import torch, pcq.torchvision_compat as c\n"
        "def there(): return [hasattr(torch.ops.torchvision, name) for name in ('nms', 'qnms')]\n"
        "truly = c._compiled_half_loads; c._compiled_half_loads = lambda folders: True\n"
        "print(c.declare_operators(), there())\n"
        "c._compiled_half_loads = lambda folders: False\n"
        "first = torch.library.Library('torchvision', 'DEF'); first.define(c.SCHEMAS[0])\n"
        "print(c.declare_operators(), there(), c.declare_operators())"
    )
    assert run(code).splitlines() == ["True [False, False]", "True [True, True] True"]


def test_without_torchvision_the_rest_runs_and_the_error_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise AttributeError('of another year')")
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from pcq import models; from pcq.data import open_data; from pcq.errors import PcqError\n"
        "m = models.build('pcq.demo.nets:resnet8'); open_data('digits')\n"
        "print(models.recognise({n: tuple(t.shape) for n, t in m.state_dict().items()}))\n"
        "try: models.build('torchvision:resnet18')\n"
        "except PcqError as error: print(error)\n"
        f"del sys.modules['torchvision']; sys.path.insert(0, {str(tmp_path)!r})\n"
        "try: models.build('torchvision:resnet18')\n"
        "except PcqError as error: print(error)"
    )
    nothing, absent, misfit = run(code).splitlines()
    assert nothing == "None"
    assert absent == "this needs torchvision, which is not installed. Run `pip install torchvision --no-deps`"
    assert "does not import beside torch" in misfit
    assert "of another year" in misfit


# -- recognition ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_torchvision_classifier_is_recognised_or_asked_about(name: str) -> None:
    arch = f"torchvision:{name}?num_classes=7"
    shapes = known(arch)
    if name in ("resnet18", "resnet50", "googlenet", "inception_v3"):
        with pytest.raises(models.Ambiguous) as caught:
            recognise(shapes)
        assert caught.value.candidates[0] == arch
        assert all(f"`--arch '{candidate}'`" in str(caught.value) for candidate in caught.value.candidates)
        return
    found = recognise(shapes)
    assert found is not None
    assert found.arch == arch
    assert found.sentence == f"torchvision {name}, 7 classes, from its {len(shapes)} names and shapes"
    assert models.example_shape(found.arch) == found.input_shape


@given(st.sampled_from(COMPARED[1:]), st.integers(1, 30000), st.sampled_from([1, 2, 3, 4, 13]))
@settings(deadline=None, max_examples=15)
def test_the_head_and_the_stem_are_read_off(name: str, classes: int, channels: int) -> None:
    arch = f"torchvision:{name}?num_classes={classes}" + (f"&in_chans={channels}" if channels != 3 else "")
    shapes = shapes_of(on_meta(arch))
    found = recognise(shapes)
    assert found is not None
    assert (found.num_classes, found.input_shape[0]) == (classes, channels)
    assert found.arch == arch
    spec = parse(models.complete(f"torchvision:{name}", shapes))
    expected = {"num_classes": classes, "in_chans": channels}
    assert spec.options == {k: v for k, v in expected.items() if v != {"num_classes": 1000, "in_chans": 3}[k]}


@given(st.data(), st.sampled_from(COMPARED))
@settings(deadline=None, max_examples=40)
def test_one_tensor_more_less_or_larger_is_another_network(data: st.DataObject, name: str) -> None:
    shapes = dict(known(f"torchvision:{name}"))
    chosen = data.draw(st.sampled_from([n for n in shapes if not n.endswith("num_batches_tracked")]))
    shape = shapes.pop(chosen)
    assert recognise(shapes) is None
    assert recognise({**shapes, chosen: shape, "extra": (1,)}) is None
    assert recognise({**shapes, chosen: (*shape, 2)}) is None
    if not chosen.startswith(("fc", "head", "classifier", "heads")) and len(shape) == 1:
        assert recognise({**shapes, chosen: (shape[0] + 1,)}) is None


def test_counters_and_order_do_not_matter() -> None:
    shapes = known("torchvision:mobilenet_v2")
    without = {n: s for n, s in reversed(shapes.items()) if not n.endswith("num_batches_tracked")}
    found = recognise(without)
    assert found is not None
    assert found.arch == "torchvision:mobilenet_v2?num_classes=1000"


def test_module_paths_tell_apart_what_names_cannot() -> None:
    """timm's resnetblur18 has resnet18's names and shapes; a state dict of torch.save tells its module paths too."""
    module = on_meta("torchvision:resnet18?num_classes=10")
    shapes = shapes_of(module)
    with pytest.raises(models.Ambiguous, match="resnetblur18") as caught:
        recognise(shapes)
    assert caught.value.candidates[0] == "torchvision:resnet18?num_classes=10"
    metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    found = recognise(shapes, metadata)
    assert found is not None
    assert found.sentence == "torchvision resnet18, 10 classes, from its 122 names and shapes"
    assert recognise(shapes, ["", "module", *(f"module.{path}" for path in metadata if path)]) == found
    with pytest.raises(models.Ambiguous):
        recognise(shapes, [*metadata, "something.else"])


def test_torchvisions_own_resnet50_is_told_by_its_modules() -> None:
    module = on_meta("torchvision:resnet50")
    with pytest.raises(models.Ambiguous, match="resnetaa50"):
        recognise(shapes_of(module))
    found = recognise(shapes_of(module), module.state_dict()._metadata)  # type: ignore[attr-defined]
    assert found is not None
    assert found.arch == "torchvision:resnet50?num_classes=1000"


def test_a_network_that_is_needed_and_open_is_asked_for_with_the_candidates(tmp_path: Path) -> None:
    """resnet18 without its module paths: whatever needs the network names those that it may be."""
    states = pcq.models.build("torchvision:resnet18?num_classes=10").state_dict()
    save_file(states, tmp_path / "net.safetensors")
    np.savez(tmp_path / "x.npz", x=np.zeros((8, 3, 32, 32), np.float32))
    data = f"npz:{tmp_path / 'x.npz'}"
    candidates = r"fit \d networks .* which one it is:\s+`--arch 'torchvision:resnet18\?"
    made = pcq.quantize(tmp_path / "net.safetensors", "binary-all")
    with pytest.raises(PcqError, match=rf"does not record an architecture: .* {candidates}"):
        pcq.export_onnx(made.path)
    with pytest.raises(PcqError, match=rf"net.safetensors: calibration runs the network, .* {candidates}"):
        analyze(tmp_path / "net.safetensors", "binary-all", calib=data)
    with pytest.raises(PcqError, match=rf"net.safetensors: the architecture is not known: .* {candidates}"):
        pcq.finetune(tmp_path / "net.safetensors", "binary-all", data)


def test_pretrained_and_scratch_inception_differ_in_what_they_do_to_the_input() -> None:
    with pytest.raises(models.Ambiguous) as caught:
        recognise(known("torchvision:inception_v3"))
    assert caught.value.candidates == (
        "torchvision:inception_v3?num_classes=1000",
        "torchvision:inception_v3?transform_input=True&num_classes=1000",
    )
    assert all(shapes_of(on_meta(arch)) == known("torchvision:inception_v3") for arch in caught.value.candidates)


@pytest.mark.parametrize("shapes", [{}, {"weight": (3, 4)}, {"fc.weight": (10,), "fc.bias": ()}, {"x": (0, 0)}])
def test_other_state_dicts_are_nothing(shapes: dict[str, tuple[int, ...]]) -> None:
    assert recognise(shapes) is None


def test_signature_is_a_hash_of_names_shapes_and_open_axes() -> None:
    shapes = {"b": (1000, 2), "a": (3,)}
    free = [Slot("b", 0)]
    assert signature(shapes, free) == signature({"a": (3,), "b": (7, 2)}, free)
    assert len({signature(shapes, free), signature(shapes, []), signature(shapes, [Slot("b", 1)])}) == 3
    assert signature(shapes, free) == hashlib.sha256(b"a 3\nb 1* 2\n").hexdigest()[:12]
    assert tree_hash(["b", "a"]) == tree_hash(["", "a", "b"]) == tree_hash(["x.y.a", "x.y.b"]) != tree_hash(["b", "c"])
    assert tree_hash(["a"]) == tree_hash([]) == hashlib.sha256(b"").hexdigest()[:8]


def test_the_index_is_small_sound_and_complete() -> None:
    file = Path(models.__file__).with_name("architectures.json")
    assert file.stat().st_size < 200_000
    text = json.loads(file.read_text())
    networks = [network for entries in read_index(text).values() for found in entries.values() for network in found]
    specs = {network.spec for network in networks}
    assert len(networks) > 1300
    assert {f"torchvision:{name}" for name in CLASSIFIERS} - specs == set()
    assert not [spec for spec in specs if spec.startswith("timm:") and spec in text["left_out"]]
    assert all(len(network.input) == 3 for network in networks)


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize("name", ["convnext_atto", "deit_tiny_patch16_224", "mobilenetv4_conv_small", "regnety_002"])
def test_timm_networks_are_recognised(name: str) -> None:
    arch = f"timm:{name}?num_classes=5&in_chans=1"
    found = recognise(shapes_of(on_meta(arch)))
    assert found is not None
    assert shapes_of(on_meta(found.arch)) == shapes_of(on_meta(arch))
    assert found.input_shape == models.example_shape(found.arch)


# -- building -------------------------------------------------------------------------------------------------------

OWN = """
import torch
from torch import Tensor, nn
def net(width=4): return nn.Sequential(nn.Linear(3, width), nn.ReLU())
class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.fc = nn.Linear(3, width)
def nothing(): return None
def raises():
    raise ValueError("no weights at hand")
SHARED = nn.Linear(3, 2)
def shared(): return nn.Sequential(SHARED)
def lazy(): return nn.LazyLinear(2)
class Counts(nn.Linear):
    def get_extra_state(self): return {"runs": 0}
    def set_extra_state(self, state): pass
"""


WRAPPERS = """
from torch import distributed as dist
def compiled_parallel(net): return torch.compile(nn.DataParallel(net))
def distributed(net):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return nn.parallel.DistributedDataParallel(net)
    finally:
        dist.destroy_process_group()
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "nets.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "unread.py").write_text("def f(:\n")
    monkeypatch.delitem(sys.modules, "nets", raising=False)  # one of the same name that another test imported
    yield str(tmp_path / "nets.py")
    sys.modules.pop("nets", None)


def test_own_functions_and_classes(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert models.build(f"{own}:net?width=7").state_dict()["0.weight"].shape == (7, 3)
    assert models.build(f"{own}:Net?width=5").state_dict()["fc.weight"].shape == (5, 3)
    monkeypatch.chdir(Path(own).parent)
    assert models.build("nets:net").state_dict()["0.weight"].shape == (4, 3)
    assert models.build("nets.py:net").state_dict()["0.weight"].shape == (4, 3)
    assert models.build("pcq.demo.nets:resnet8?num_classes=3").state_dict()["fc.weight"].shape == (3, 64)


@pytest.mark.parametrize("wrapper", ["torch.compile", "nn.DataParallel", "compiled_parallel", "distributed"])
def test_a_wrapped_network_is_the_one_inside(wrapper: str, own: str) -> None:
    """It had been another architecture."""
    with open(own, "a") as file:
        file.write(WRAPPERS + f"def wrapped(): return {wrapper}(net())\n")
    found = models.build(f"{own}:wrapped")
    assert type(found) is nn.Sequential
    assert list(found.state_dict()) == ["0.weight", "0.bias"]


def test_a_function_that_returns_the_same_weights_again_gives_networks_of_their_own(
    own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(own).parent)
    first, second = models.build("nets:shared"), models.build("nets:shared")
    with torch.no_grad():
        first[0].weight.zero_()
    assert bool(second[0].weight.any())


def test_an_artifact_used_from_another_folder_asks_where_its_network_is(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(models.build(f"{own}:net?width=5").state_dict(), "net.pt")
    path = pcq.quantize("net.pt", "ternary-all", arch="nets.py:net?width=5").path.resolve()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with pytest.raises(PcqError) as told:
        pcq.open_network(path)
    assert str(told.value) == (
        f"nets.py:net?width=5: there is no such file in {elsewhere}. "
        "Say where it is: --arch 'PATH/nets.py:net?width=5'."
    )
    assert pcq.open_network(path, "../nets.py:net?width=5").module is not None


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("a download"))
    for name in ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large", "raft_small"):
        assert on_meta(f"torchvision:{name}") is not None


@pytest.mark.parametrize(
    ("arch", "told"),
    [
        ("torchvision:resnet81", "no network 'resnet81'.*Did you mean 'resnet18'"),
        ("torchvision:", "no network ''"),
        ("torchvision:resnet18?weights=DEFAULT", "'weights' would download weights"),
        ("torchvision:fcn_resnet50?weights_backbone=DEFAULT", "would download weights"),
        ("torchvision:resnet18?num_clases=3", "unexpected keyword argument 'num_clases'"),
        ("torchvision:resnet18?num_classes=many", "Check the options: num_classes='many'"),
        ("resnet18", "not an architecture.*Allowed: torchvision:NAME"),
        ("torchvsion:resnet18", "not an architecture.*Did you mean 'torchvision'"),
        ("OWN:nett", "has no 'nett'.*Did you mean 'net'"),
        ("OWN:nothing", "returned None, not a torch.nn.Module"),
        ("OWN:raises", r"raises\(\) raised ValueError: no weights at hand.*See line 11 of .*nets\.py"),
        ("OWN:lazy", r"lazy layers, whose weights have no shape.*Let 'lazy' run it on a sample"),
        ("OWN:Counts?in_features=3&out_features=2", r"holds something that is no tensor \(_extra_state\)"),
        ("OWN:net?depth=3", r"net\(depth=3\) raised TypeError"),
        ("OWN:nn", "is a module, not a function or class"),
        ("OWN:", "no function is named"),
        ("BROKEN:f", r"imports 'nothing_of_that_name', which is not installed.*pip install nothing_of_that_name"),
        ("UNREAD:f", "importing it raised SyntaxError"),
        ("/nowhere/nets.py:net", "no such file in /nowhere.*Say where it is: --arch PATH/nets.py:net"),
        ("pcq.demo.nets:resnet8?num_classes", "not an option"),
    ],
)
def test_architectures_that_are_wrong(own: str, arch: str, told: str) -> None:
    folder = Path(own).parent
    for word, file in (("OWN", own), ("BROKEN", str(folder / "broken.py")), ("UNREAD", str(folder / "unread.py"))):
        arch = arch.replace(word, file)
    with pytest.raises(PcqError, match=told):
        models.build(arch)


@pytest.mark.parametrize(("arch", "install"), [("timm:resnet18", "timm"), ("hf:/tmp", "transformers")])
def test_a_missing_package_is_named(arch: str, install: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, install, None)
    with pytest.raises(PcqError, match=f"not installed. Run `pip install .*{install}"):
        models.build(arch)


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
def test_timm_specs_that_are_wrong() -> None:
    for arch, told in (
        ("timm:resnet81", "Did you mean"),
        ("timm:hf-hub:someone/net", "has no network"),
        ("timm:resnet18?pretrained=True", "would load other weights"),
        ("timm:resnet18?num_clases=3", "Check the options"),
    ):
        with pytest.raises(PcqError, match=told):
            models.build(arch)
    assert models.example_shape("timm:vit_base_patch16_384?in_chans=1") == (1, 384, 384)


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_hugging_face_networks_keep_no_cache(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 20, "use_cache": True}
    (tmp_path / "config.json").write_text(json.dumps(config | small))
    module, tokens = models.build(f"hf:{tmp_path}").eval(), torch.arange(6)[None]
    assert list(module(tokens)) == ["logits"]
    torch.export.export(module, (tokens,))
    assert "past_key_values" in models.build(f"hf:{tmp_path}?use_cache=true").eval()(tokens)
    with pytest.raises(PcqError, match=r"expected bool, got str \(value: 'yes'\). Check the options: use_cache='yes'"):
        models.build(f"hf:{tmp_path}?use_cache=yes")


@pytest.mark.parametrize(("wraps", "wrapper"), [(1, ""), (2, ""), (1, "module."), (2, "module._orig_mod.")])
def test_a_prefix_of_the_network_itself_is_put_back(wraps: int, wrapper: str, tmp_path: Path) -> None:
    """Everything in it is ``self.model``: what a wrapper puts before every name is then its own."""
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "class Outer(nn.Module):\n"
        "    def __init__(self, wraps=1):\n"
        "        super().__init__()\n"
        "        self.model = Outer(wraps - 1) if wraps > 1 else nn.Linear(6, 4)\n"
        "    def forward(self, x): return self.model(x)\n"
    )
    arch = f"{tmp_path}/own.py:Outer?wraps={wraps}"
    net = models.build(arch).eval()
    torch.save({wrapper + name: value for name, value in net.state_dict().items()}, tmp_path / "net.pt")
    planned = plan(tmp_path / "net.pt", "w8", arch=arch)
    assert planned.source.names == list(net.state_dict())
    x = torch.randn(2, 6)
    assert torch.equal(pcq.open_network(tmp_path / "net.pt", arch).module(x), net(x))
    named = pcq.quantize(tmp_path / "net.pt", "w8", out=tmp_path / "named.safetensors", arch=arch)
    nameless = pcq.quantize(tmp_path / "net.pt", "w8", out=tmp_path / "nameless.safetensors")
    ours, theirs = pcq.open_network(named.path).module, pcq.open_network(nameless.path, arch).module
    assert torch.equal(ours(x), theirs(x))
    assert not torch.equal(ours(x), net(x))


def test_the_part_of_a_checkpoint_that_is_the_network(tmp_path: Path) -> None:
    """Lightning's state dict holds all of its module: the network, a loss's weights, an average of the network."""
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "def net(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))\n"
    )
    arch = f"{tmp_path}/own.py:net"
    net, average = models.build(arch).eval(), models.build(arch)
    state = {f"model.{name}": value for name, value in net.state_dict().items()} | {"loss.weight": torch.ones(2)}
    one, both = tmp_path / "one.ckpt", tmp_path / "both.ckpt"
    torch.save({"state_dict": state, "epoch": 1}, one)
    planned = plan(one, "w8", arch=arch)
    assert planned.source.names == list(net.state_dict())
    assert "Took the 9 tensors under 'model.'; beside them: loss.weight." in planned.source.notes
    x = torch.randn(2, 1, 3, 3)
    assert torch.equal(pcq.open_network(one, arch).module(x), net(x))
    torch.save({"state_dict": state | {f"ema.{name}": value for name, value in average.state_dict().items()}}, both)
    with pytest.raises(PcqError, match=r"'model.' and those under 'ema.' are the network's: open .* --key model"):
        plan(both, "w8", arch=arch)
    assert torch.equal(pcq.open_network(both, arch, key="ema").module(x), average.eval()(x))
    with pytest.raises(PcqError, match=r"there is no state dict 'mod' in it. Allowed: state_dict"):
        plan(both, "w8", arch=arch, key="mod")


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_names_that_transformers_changes_on_loading(tmp_path: Path) -> None:
    """It saves a ViT under other names than its network has; an old BERT's are `gamma` and `beta`, beside heads."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 16, "patch_size": 8}
    vit, bert = tmp_path / "vit", tmp_path / "bert"
    vit.mkdir()
    (vit / "config.json").write_text(json.dumps(config | small))
    module = models.build(f"hf:{vit}").eval()
    module.save_pretrained(vit)  # type: ignore[operator]
    assert open_source(vit).names != list(module.state_dict())
    assert any(f"--arch hf:{vit}" in note for note in plan(vit, "w8").notes)
    planned = plan(vit, "w8", arch=f"hf:{vit}")
    assert planned.source.names == list(module.state_dict())
    assert "Named and put together as transformers loads it." in planned.notes
    image = torch.randn(1, 3, 16, 16)
    loaded = pcq.open_network(vit, f"hf:{vit}").module
    assert torch.equal(loaded(image).logits, module(image).logits)
    made = pcq.quantize(vit, "w8", out=tmp_path / "vit.safetensors", arch=f"hf:{vit}")
    assert next(iter(scores.module_predictor(pcq.open_network(made.path).module)(image))).shape == (2,)

    config = {"model_type": "bert", "architectures": ["BertForPreTraining"], "vocab_size": 20}
    bert.mkdir()
    (bert / "config.json").write_text(json.dumps(config | small))
    module = models.build(f"hf:{bert}").eval()
    tied = "cls.predictions.decoder."
    state = {name: value for name, value in module.state_dict().items() if not name.startswith(tied)}
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {functools.reduce(lambda n, o: n.replace(o, old[o]), old, name): value for name, value in state.items()}
    assert renamed.keys() != state.keys()
    save_file(renamed, bert / "model.safetensors")
    (bert / "config.json").write_text(json.dumps(config | small | {"architectures": ["BertForMaskedLM"]}))
    planned = plan(bert, "w8", arch=f"hf:{bert}")
    assert any("bert.pooler.dense.bias" in n and "cls.seq_relationship.weight" in n for n in planned.notes)
    tokens = torch.arange(6)[None]
    expected = module(tokens).prediction_logits
    assert torch.equal(pcq.open_network(bert, f"hf:{bert}").module(tokens).logits, expected)

    (bert / "config.json").write_text(json.dumps(config | small | {"architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(PcqError, match=r"no values for 2 of .* tensors: classifier\.bias, classifier\.weight"):
        plan(bert, "w8", arch=f"hf:{bert}")  # it would have a head of random numbers


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("says", ["dtype", "torch_dtype"])
def test_hugging_face_networks_compute_in_float32_and_files_keep_their_dtype(says: str, tmp_path: Path) -> None:
    """Most folders say bfloat16: such a network could be neither calibrated nor exported."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 16, "patch_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config | small | {says: "bfloat16"}))
    arch = f"hf:{tmp_path}"
    built = models.build(f"{arch}?dtype=bfloat16")
    assert {value.dtype for value in built.state_dict().values()} == {torch.bfloat16}
    built.save_pretrained(tmp_path)  # type: ignore[operator]
    source = plan(tmp_path, "w8", arch=arch).source  # under other names than in the file
    assert {source.tensor(name).dtype for name in source.names} == {torch.bfloat16}
    made = pcq.quantize(tmp_path, "w8", out=tmp_path / "vit.safetensors", arch=arch)
    for path in (tmp_path, made.path):
        module = pcq.open_network(path, arch).module
        assert {value.dtype for value in module.state_dict().values()} == {torch.float32}
        assert module(torch.randn(1, 3, 16, 16)).logits.isfinite().all()


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_hugging_face_folders(tmp_path: Path) -> None:
    config = {"architectures": ["BertForSequenceClassification"], "model_type": "bert", "hidden_size": 8}
    config |= {"num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 11}
    (tmp_path / "config.json").write_text(json.dumps(config))
    module = models.build(f"hf:{tmp_path}")
    assert type(module).__name__ == "BertForSequenceClassification"
    kinds = {p.name: p.kind for p in inventory(shapes_of(module), dict.fromkeys(shapes_of(module), "float32"), module)}
    assert kinds["bert.embeddings.word_embeddings.weight"] == "embedding"
    assert kinds["classifier.weight"] == "linear"
    for spec, told in ((f"hf:{tmp_path / 'no'}", "nothing is downloaded"), ("hf:bert-base-uncased", "nothing is down")):
        with pytest.raises(PcqError, match=told):
            models.build(spec)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PcqError, match=r"no config\.json"):
        models.build(f"hf:{tmp_path / 'empty'}")


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_own_networks_compute_in_float32(cast: str, own: str, tmp_path: Path) -> None:
    """In half precision they could be neither analyzed nor exported, and calibration blamed the data."""
    with open(own, "a") as file:
        file.write(f"def small(): return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 4)).{cast}()\n")
    arch = f"{own}:small"
    torch.save({n: v.to(torch.float16) for n, v in models.build(arch).state_dict().items()}, tmp_path / "n.pt")
    np.savez(tmp_path / "x.npz", x=np.arange(60).reshape(12, 5) % 9)
    assert analyze(tmp_path / "n.pt", "w4", arch=arch, calib=f"npz:{tmp_path}/x.npz").whole is not None
    assert {value.dtype for value in models.build(arch).state_dict().values()} == {torch.float32}


def test_a_constructor_that_reads_values_is_built_with_them(own: str) -> None:
    with open(own, "a") as file:
        file.write("def reads(): return nn.Linear(3, int(torch.linspace(1, 4, 4)[-1].item()))\n")
    assert on_meta(f"{own}:reads").state_dict()["weight"].shape == (4, 3)


def test_example_shapes() -> None:
    assert models.example_shape("torchvision:inception_v3?num_classes=3") == (3, 299, 299)
    assert models.example_shape("torchvision:vit_b_16?image_size=384&in_chans=1") == (1, 384, 384)
    assert models.example_shape("pcq.demo.nets:resnet8") is None


# -- loading --------------------------------------------------------------------------------------------------------


def small(classes: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5, classes))


def test_loading_is_complete_and_casts() -> None:
    source, target = small(), small()
    nn.init.normal_(source[1].running_mean)
    state = {n: t.half() if t.is_floating_point() else t for n, t in source.state_dict().items()}
    del state["1.num_batches_tracked"]
    models.load_state(target, state)
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype) if name in state else torch.tensor(0))


def test_tied_weights_may_come_once_or_twice() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
            self.head.weight = self.embed.weight

    values = torch.randn(7, 3)
    for names in (["embed.weight"], ["head.weight"], ["embed.weight", "head.weight"]):
        module = Tied()
        models.load_state(module, dict.fromkeys(names, values))
        assert torch.equal(module.embed.weight, values)
        assert module.embed.weight is module.head.weight
    with pytest.raises(PcqError, match="2 tensors are missing"):
        models.load_state(Tied(), {})


def test_modules_that_rename_on_loading_still_load() -> None:
    old, new = torch.nn.utils.weight_norm(nn.Linear(3, 4)), weight_norm(nn.Linear(3, 4))
    models.load_state(new, old.state_dict())
    assert torch.equal(new.parametrizations.weight.original1, old.weight_v)  # type: ignore[union-attr, operator]
    models.check_shapes(new, shapes_of(old))
    with torch.device("meta"):
        models.check_shapes(weight_norm(nn.Linear(3, 4)), shapes_of(old))


def test_parts_of_a_weight_are_left_float_and_say_what_to_do() -> None:
    old, new = torch.nn.utils.weight_norm(nn.Linear(3, 4)), weight_norm(nn.Linear(3, 4))
    for module in (old, new):
        dtypes = dict.fromkeys(shapes_of(module), "float32")
        for network in (module, None):
            _, *parts = sorted(inventory(shapes_of(module), dtypes, network), key=lambda each: len(each.name))
            assert [each.unfit for each in parts] == [PART, PART]


@pytest.mark.parametrize("check", ["load_state", "check_shapes"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda s: s | {"3.weight": torch.zeros(9, 5), "3.bias": torch.zeros(9)},
            r"3\.weight \[9, 5\] where the network",
        ),
        (
            lambda s: s | {"3.weight": torch.zeros(9, 5), "3.bias": torch.zeros(9)},
            "for 9 outputs and the network for 4",
        ),
        (lambda s: s | {"0.weight": torch.zeros(5, 1, 3, 3)}, "for 1 input channels and the network for 3.*in_chans=1"),
        (lambda s: {n: t for n, t in s.items() if n != "3.bias"}, r"1 tensor is missing \(3\.bias\)"),
        (lambda s: s | {"4.bias": torch.zeros(2)}, r"1 tensor is not in the network \(4\.bias\)"),
        (
            lambda s: {f"net.{n}": t for n, t in s.items()},
            "under 'net.' are the network's: open the checkpoint with --key net",
        ),
        (lambda s: {"w": torch.zeros(3)}, "8 tensors are missing.*Only 0 of the checkpoint's 1 names"),
        (lambda s: small(7)[:2].state_dict(), "A variant of the architecture"),
        (lambda s: {n if n < "1" else f"w{n}": t for n, t in s.items()}, "Only 2 of the checkpoint's 8 names"),
    ],
)
def test_weights_that_do_not_fit(check: str, change, told: str) -> None:  # type: ignore[no-untyped-def]
    state = change(dict(small().state_dict()))
    state = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    given = state if check == "load_state" else {name: tuple(tensor.shape) for name, tensor in state.items()}
    with pytest.raises(PcqError, match=told):
        getattr(models, check)(small(), given, "file.py:net")


def test_another_known_networks_weights_are_recognised() -> None:
    with pytest.raises(PcqError, match=r"look like torchvision mobilenet_v2.*--arch 'torchvision:mobilenet_v2\?num"):
        models.check_shapes(on_meta("torchvision:resnet34"), known("torchvision:mobilenet_v2"))
    with pytest.raises(PcqError, match=r"look like one of torchvision:resnet18.*resnetblur18"):
        models.check_shapes(on_meta("torchvision:resnet34"), known("torchvision:resnet18"))


def test_complete_leaves_alone_what_is_said() -> None:
    shapes = known("torchvision:resnet18?num_classes=10")
    assert models.complete("torchvision:resnet18", shapes) == "torchvision:resnet18?num_classes=10"
    assert models.complete("torchvision:resnet18?num_classes=5", shapes) == "torchvision:resnet18?num_classes=5"
    assert models.complete("a.py:f", shapes) == "a.py:f"
    assert models.build("torchvision:resnet18", shapes).state_dict()["fc.weight"].shape == (10, 512)


# -- inventory ------------------------------------------------------------------------------------------------------


class Conv(nn.Conv2d):
    pass


class Zoo(nn.Module):
    """One of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.depthwise, self.grouped = Conv(4, 8, 3, groups=4, bias=False), nn.Conv1d(4, 6, 3, groups=2)
        self.volume, self.up = nn.Conv3d(2, 3, 1), nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.up1, self.fc = nn.ConvTranspose1d(3, 5, 2), nn.Linear(3, 2)
        self.embed, self.bag = nn.Embedding(5, 2), nn.EmbeddingBag(5, 2)
        self.lstm = nn.LSTM(3, 4, bidirectional=True, proj_size=2)
        self.cell = nn.GRUCell(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.cross = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
        self.bn, self.ln, self.gn = nn.BatchNorm2d(4), nn.LayerNorm((2, 3)), nn.GroupNorm(1, 4)
        self.rms, self.prelu, self.bilinear = nn.RMSNorm(3), nn.PReLU(4), nn.Bilinear(2, 3, 4)
        self.normed = weight_norm(nn.Conv2d(2, 3, 3))
        self.tied = nn.Linear(2, 5)
        self.tied.weight = self.embed.weight
        self.position = nn.Parameter(torch.zeros(1, 3, 4))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.turned, self.square = Conv1D(5, 3), Conv1D(3, 3)
        self.register_buffer("table", torch.zeros(3, 4))
        self.register_buffer("index", torch.zeros(3, 4, dtype=torch.int64))


KINDS = """stem.weight conv2d; stem.bias bias; depthwise.weight conv2d 4; grouped.weight conv1d 2; grouped.bias bias;
volume.weight conv3d; volume.bias bias; up.weight conv_transpose2d 2; up.bias bias; up1.weight
conv_transpose1d; up1.bias bias; fc.weight linear; fc.bias bias; embed.weight embedding; bag.weight
embedding; lstm.weight_ih_l0 linear; lstm.weight_hh_l0 linear; lstm.bias_ih_l0 bias; lstm.bias_hh_l0 bias;
lstm.weight_hr_l0 linear; lstm.weight_ih_l0_reverse linear; lstm.weight_hh_l0_reverse linear;
lstm.bias_ih_l0_reverse bias; lstm.bias_hh_l0_reverse bias; lstm.weight_hr_l0_reverse linear; cell.weight_ih
linear; cell.weight_hh linear; cell.bias_ih bias; cell.bias_hh bias; attention.in_proj_weight linear;
attention.in_proj_bias bias; attention.bias_k other; attention.bias_v other; attention.out_proj.weight
linear; attention.out_proj.bias bias; cross.q_proj_weight linear; cross.k_proj_weight linear;
cross.v_proj_weight linear; cross.in_proj_bias bias; cross.out_proj.weight linear; cross.out_proj.bias bias;
bn.weight norm; bn.bias norm; bn.running_mean buffer; bn.running_var buffer; bn.num_batches_tracked buffer;
ln.weight norm; ln.bias norm; gn.weight norm; gn.bias norm; rms.weight norm; prelu.weight other;
bilinear.weight other; bilinear.bias bias; normed.bias bias; normed.parametrizations.weight.original0 other;
normed.parametrizations.weight.original1 other; tied.weight linear; tied.bias bias; turned.weight linear;
turned.bias bias; square.weight linear; square.bias bias; position other; scale other; table buffer; index
buffer"""
WITHOUT_MODULE = {
    "depthwise.weight": ("conv2d", 8),
    "grouped.weight": ("conv1d", 1),
    "bag.weight": ("linear", 1),
    "ln.weight": ("linear", 1),
    "ln.bias": ("other", 1),
    "prelu.weight": ("norm", 1),
    "bilinear.weight": ("conv1d", 1),
    "table": ("other", 1),
}
"""What names and shapes cannot tell."""


def dtypes_of(module: nn.Module) -> dict[str, str]:
    return {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in module.state_dict().items()}


def test_inventory_of_everything() -> None:
    zoo = Zoo()
    entries = [entry.split() for entry in KINDS.replace("\n", " ").split("; ")]
    expected = {name: (kind, int(groups[0]) if groups else 1) for name, kind, *groups in entries}
    found = inventory(shapes_of(zoo), dtypes_of(zoo), zoo)
    assert [p.name for p in found] == list(zoo.state_dict())
    assert {p.name: (p.kind, p.groups) for p in found} == expected
    assert {p.name: p.tied_to for p in found if p.tied_to} == {"tied.weight": "embed.weight"}
    by_name = inventory(shapes_of(zoo), dtypes_of(zoo), tied={"tied.weight": "embed.weight"})
    assert {p.name: (p.kind, p.groups) for p in by_name} == expected | WITHOUT_MODULE
    assert {p.name: p.tied_to for p in by_name if p.tied_to} == {"tied.weight": "embed.weight"}
    assert [p.name for p in found if p.turned] == ["turned.weight", "square.weight"]
    assert [p.name for p in by_name if p.turned] == ["turned.weight"]  # of a square one nothing tells it


@pytest.mark.parametrize("name", [*COMPARED, "shufflenet_v2_x0_5", "mnasnet0_5", "maxvit_t", "efficientnet_b0"])
def test_names_alone_say_what_the_modules_say(name: str) -> None:
    module = on_meta(f"torchvision:{name}")
    shapes, dtypes = shapes_of(module), dtypes_of(module)
    assert inventory(shapes, dtypes) == inventory(shapes, dtypes, module)


def test_a_network_that_asks_for_the_version_of_its_state_loads() -> None:
    """torchvision's MNASNet; a file of tensors has no versions."""
    module = models.build("torchvision:mnasnet0_5?num_classes=3")
    state = {name: torch.zeros_like(tensor) for name, tensor in module.state_dict().items()}
    models.load_state(module, state)
    assert not any(tensor.any() for tensor in module.state_dict().values())
    with pytest.raises(PcqError, match="not in the network"):
        models.load_state(module, {**state, "other": torch.zeros(4)})


def test_a_buffer_that_is_no_longer_saved_may_be_in_the_file():
    """transformers' BERT saved its position_ids once; all-MiniLM-L6-v2 has them still."""
    module = torch.nn.Linear(2, 2)
    module.register_buffer("position_ids", torch.arange(4), persistent=False)
    state = {**module.state_dict(), "position_ids": torch.zeros(4, dtype=torch.int64)}
    models.load_state(module, state)
    assert torch.equal(module.position_ids, torch.arange(4))
    with pytest.raises(PcqError, match="not in the network"):
        models.load_state(module, {**state, "positions": torch.zeros(4)})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(x))
        return out


def test_two_values_for_what_the_architecture_makes_one_tensor_are_refused(tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in Tied().state_dict().items()}
    torch.save(state, tmp_path / "same.pt")
    made = plan(tmp_path / "same.pt", "w8", arch=f"{__name__}:Tied").plan
    assert [entry.parameter.tied_to for entry in made.entries] == [None, "embed.weight"]
    torch.save(state | {"head.weight": state["head.weight"] + 1e-3}, tmp_path / "other.pt")
    with pytest.raises(PcqError, match=r"head\.weight: holds other values than embed\.weight"):
        plan(tmp_path / "other.pt", "w8", arch=f"{__name__}:Tied")
