"""Calibration: the tape, the layers' patches, the quadratic's solvers against slow twins, and the whole."""

import gc
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pcq import tape as tapes
from pcq.calibrate import starts
from pcq.calibrate.batchnorm import reestimate
from pcq.calibrate.layers import find, patches
from pcq.calibrate.moments import influence, target
from pcq.calibrate.oneshot import Settings, View, calibrate, moments
from pcq.calibrate.quadratic import (
    Codes,
    Quadratic,
    descend,
    gptq,
    largest_eigenvalue,
    nearest,
    parameters_of,
    proxconnect,
    refit,
)
from pcq.calibrate.starts import best_of, better, improved, search
from pcq.calibrate.steps import Step, calibrate_measured, less_like
from pcq.calibrate.streams import Streams
from pcq.demo.nets import resnet8
from pcq.errors import PcqError
from pcq.grids import Affine, Codebook
from pcq.inventory import inventory
from pcq.qtensor import quantize
from pcq.quantizers import AdditivePowersOfTwo, Binary, Fixed, KMeans, LeastSquaresBinary, Quantizer, Ternary, Uniform
from pcq.rows import Rows
from pcq.rules import Match, Rule


class Conv1D(nn.Module):
    """As in transformers: a Linear whose matrix is ``[in, out]``."""

    def __init__(self, out: int, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width, out)), nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], len(self.bias))


QUANTIZERS: list[Quantizer] = [
    Binary(), Ternary(), Uniform(2), Uniform(3, symmetric=False), KMeans(4), LeastSquaresBinary(2),
    AdditivePowersOfTwo(4), Fixed((-1.0, -0.3, 0.3, 1.0)), Fixed("nf4", scale="absmax"),
]  # fmt: skip
LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), (4, 9)),
    "conv2d strided": (nn.Conv2d(4, 6, 3, 2, 1), (4, 7, 8)),
    "conv2d dilated": (nn.Conv2d(4, 6, (3, 2), dilation=(2, 1), padding=(0, 1)), (4, 7, 8)),
    "conv2d grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 7, 8)),
    "conv2d depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding="same"), (4, 7, 8)),
    "conv2d reflecting": (nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), (4, 7, 8)),
    "conv2d circular": (nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), (4, 7, 8)),
    "conv3d": (nn.Conv3d(2, 3, (1, 2, 3), padding=1), (2, 4, 5, 6)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3, 2), (4, 5)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), (4, 5, 6)),
    "transposed2d dilated": (nn.ConvTranspose2d(4, 6, (3, 2), (1, 3), (2, 0), 0, dilation=(2, 1)), (4, 5, 6)),
    "transposed3d": (nn.ConvTranspose3d(2, 3, 2, 2), (2, 3, 2, 3)),
    "linear": (nn.Linear(5, 3), (5,)),
    "linear of sequences": (nn.Linear(5, 3, bias=False), (7, 5)),
    "linear, turned": (Conv1D(3, 5), (7, 5)),
}


def _plan(module: nn.Module, quantizer: Quantizer) -> dict[str, tuple[Rows, Quantizer]]:
    weights = {name: p for name, p in module.named_parameters() if p.ndim > 1}
    return {name: (Rows(tuple(weight.shape)), quantizer) for name, weight in weights.items()}


def _layer(module: nn.Module, x: Tensor) -> tuple[tapes.Tape, object]:
    tape = tapes.record(module, (x,))
    layers, refused = find(tape, {"weight": tuple(module.weight.shape)})
    assert not refused
    return tape, layers[0]


@pytest.mark.parametrize("kind", LAYERS)
def test_patches_times_rows_are_the_layers_output(kind):
    module, shape = LAYERS[kind]
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    tape, layer = _layer(module, x)
    values = tapes.run(tape, tapes.state(module), {tape.inputs[0]: x}, 0, layer.op)
    seen = patches(layer, values[layer.x])
    rows = layer.channels(tuple(module.weight.shape)).split(module.weight.detach())
    weight = rows.reshape(layer.groups, -1, rows.shape[1])
    y = (seen @ weight.transpose(1, 2)).permute(1, 0, 2).flatten(1)  # [m, c]
    if module.bias is not None:
        y = y + module.bias.detach()
        assert layer.bias == "bias"
    expected = module(x).detach()
    if layer.geometry is not None:
        expected = expected.movedim(1, -1)
    torch.testing.assert_close(y, expected.reshape(len(y), -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_moments_against_a_brute_force_twin(kind):
    """Gram matrices from the layer's response to unit weights: no unfolding on the twin's side."""
    module, shape = LAYERS[kind]
    module = nn.Sequential(module)[0]
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(2))
    tape, layer = _layer(module, x[:2])
    tensors = tapes.state(module)
    streams = Streams(tape, [(x[:2],), (x[2:],)], tensors, tensors, 2**20)
    view = View.of(layer, Rows(tuple(module.weight.shape)))
    weight = view.split(tensors["weight"])
    found = moments(layer, weight, streams, Settings(positions=10**9))
    groups, r, n = weight.shape
    response = torch.empty(groups, n, 0)
    columns = []
    for j in range(n):
        unit = torch.zeros(groups, r, n)
        unit[:, 0, j] = 1
        with torch.no_grad():
            bare = {
                "weight": view.weight(unit),
                **({"bias": torch.zeros_like(module.bias)} if module.bias is not None else {}),
            }
            y = torch.func.functional_call(module, bare, (x,))
        y = y.movedim(1, -1) if layer.geometry is not None else y
        columns.append(y.reshape(-1, groups, r)[:, :, 0].T)
    response = torch.stack(columns, 2).double()  # [G, m, n]
    y = response @ weight.transpose(1, 2).double()
    share = torch.ones_like(y[..., :1])
    if layer.geometry is None:
        share = torch.cat([influence(part) for part in y.chunk(2, 1)], 1)  # of each batch
    share = share / share.sum(1, keepdim=True)
    mean, y_mean = (response * share).sum(1, keepdim=True), (y * share).sum(1)
    about = mean if module.bias is not None else torch.zeros_like(mean)  # nothing would take up an error of the mean
    cov = ((response - about) * share).transpose(1, 2) @ (response - about)
    if layer.geometry is None:  # positions are drawn with replacement only where there are more than asked for
        assert response.shape[1] == x.numel() // n
    torch.testing.assert_close(found.mean.double(), mean[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.cov.double(), cov, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.cross.double(), cov, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.y_mean.double(), y_mean, rtol=1e-4, atol=1e-5)
    y_var = ((y - y_mean[:, None]).square() * share).sum(1)
    torch.testing.assert_close(found.y_var.double(), y_var, rtol=1e-4, atol=1e-5)


def _problem(seed: int, groups: int = 2, r: int = 3, n: int = 5) -> Quadratic:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 4 * n, n, generator=g) @ torch.randn(groups, n, n, generator=g)
    return Quadratic(torch.randn(groups, r, n, generator=g), x.transpose(1, 2) @ x / (4 * n) + 0.01 * torch.eye(n))


def _per_channel(q: Quadratic) -> Tensor:
    groups, r, n = q.target.shape
    return torch.arange(groups * r).reshape(groups, r, 1).expand(groups, r, n).contiguous()


def _slow_gptq(q: Quadratic, start: Codes) -> Tensor:
    """After each rounding the open columns get the least-squares values, solved anew every time."""
    out = torch.empty_like(q.target)
    levels = start.grid.levels()
    for group, channel in itertools.product(range(q.target.shape[0]), range(q.target.shape[1])):
        h = q.h[group].double()
        order = h.diagonal().float().sort(descending=True, stable=True).indices.tolist()
        target, now = q.target[group, channel].double(), q.target[group, channel].double().clone()
        for step, j in enumerate(order):
            own = levels[start.row[group, channel, j]].double()
            now[j] = own[(own - now[j]).abs().argmin()]
            rest, done = order[step + 1 :], order[: step + 1]
            if rest:
                pull = h[rest][:, done] @ (now[done] - target[done])
                now[rest] = target[rest] - torch.linalg.solve(h[rest][:, rest], pull)
        out[group, channel] = now.float()
    return out


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: q.text)
@given(seed=st.integers(0, 10**6), block=st.sampled_from([1, 2, 64]))
@settings(deadline=None, max_examples=15)
def test_gptq_is_its_slow_twin(quantizer, seed, block):
    q = _problem(seed)
    grid = quantizer.fit(q.target.flatten(0, 1))
    row = _per_channel(q) if grid.g > 1 else torch.zeros_like(_per_channel(q))
    fast = gptq(q, grid, row, block=block)
    torch.testing.assert_close(fast.decode(), _slow_gptq(q, fast), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: q.text)
@given(seed=st.integers(0, 10**6), block=st.sampled_from([1, 2, 64]))
@settings(deadline=None, max_examples=15)
def test_descent_ends_where_no_single_change_of_a_code_helps(quantizer, seed, block):
    q = _problem(seed)
    grid = quantizer.fit(q.target.flatten(0, 1))
    row = _per_channel(q) if grid.g > 1 else torch.zeros_like(_per_channel(q))
    start = nearest(grid, row, q.target)
    losses = [q.loss(start.decode())]
    found = start
    for _ in range(50):
        found, changes = descend(q, found, 1, block=block)
        losses.append(q.loss(found.decode()))
        assert (losses[-1] <= losses[-2] * (1 + 1e-5) + 1e-7).all()
        if not changes:
            break
    else:
        pytest.fail("50 sweeps did not do")
    base = losses[-1]
    for j in range(q.target.shape[2]):
        for code in range(grid.count):
            other = found.codes.clone()
            other[..., j] = code
            loss = q.loss(Codes(other, grid, row).decode())
            assert (loss >= base * (1 - 1e-4) - 1e-6).all(), (j, code)


SEARCHED = [q for q in QUANTIZERS if not (isinstance(q, Fixed) and q.scale == "none")]


@pytest.mark.parametrize("quantizer", SEARCHED, ids=lambda q: q.text)
@pytest.mark.parametrize("per", ["channel", "tensor", "group"])
def test_the_best_of_several_starts_is_that_of_each_alone(quantizer, per):
    """Stacked into one problem, against one after the other; groups of channels, each with its own H."""
    q = _problem(11, groups=2, r=3, n=8)
    shape = (6, 8)
    rows = {"channel": Rows(shape), "tensor": Rows(shape, axis=None), "group": Rows(shape, group=4)}[per]
    grid = quantizer.fit(rows.split(q.target.reshape(shape)))
    row = rows.merge(torch.arange(rows.g)[:, None].expand(rows.g, rows.width).contiguous()).reshape(2, 3, 8)
    tried = [(1.0, 0), (1.3, 1), (0.8, -1), (1.1, 2)]
    alone = [best_of(q, grid, row, [start]) for start in tried]
    together = best_of(q, grid, row, tried)
    losses = torch.stack([q.loss(codes.decode()) for codes in alone])
    shared = per == "tensor" or parameters_of(grid).shape[0] == 1
    least = losses[losses.sum((1, 2)).argmin()] if shared else losses.amin(0)
    torch.testing.assert_close(q.loss(together.decode()), least, rtol=1e-4, atol=1e-6)
    assert len({float(each.sum()) for each in losses}) > 1
    if isinstance(grid, Affine) and isinstance(grid.zero_point, Tensor):
        assert isinstance(together.grid, Affine)
        assert isinstance(together.grid.zero_point, Tensor)
        assert together.grid.zero_point.dtype == grid.zero_point.dtype


@pytest.mark.parametrize("quantizer", SEARCHED, ids=lambda q: q.text)
@given(seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=10)
def test_the_search_is_never_worse_than_its_first_start(quantizer, seed):
    q = _problem(seed)
    grid = quantizer.fit(q.target.flatten(0, 1))
    row = _per_channel(q) if grid.g > 1 else torch.zeros_like(_per_channel(q))
    first, found = improved(q, gptq(q, grid, row)), search(q, grid, row)
    bound = q.loss(first.decode())
    mine = q.loss(found.decode())
    if parameters_of(grid).shape[0] == 1:
        bound, mine = bound.sum(), mine.sum()
    assert (mine <= bound * (1 + 1e-3) + 1e-6).all()
    levels = found.grid.levels()
    assert (levels.diff(dim=1) >= 0).all()
    assert int(found.codes.max()) < grid.count


def test_of_channels_that_share_levels_all_or_none_are_taken():
    for seed in range(30):
        q = _problem(seed, groups=1, r=6)
        grid, row = Ternary().fit(q.target.reshape(1, -1)), torch.zeros_like(_per_channel(q))
        tried = [best_of(q, grid, row, [(factor, 0)]) for factor in (1.0, 1.1)]
        sums = [float(q.loss(codes.decode()).sum()) for codes in tried]
        assert float(q.loss(better(q, *tried).decode()).sum()) == min(sums)


def test_a_start_is_improved_by_levels_and_two_sweeps():
    lost = torch.zeros(4)
    for seed in range(20):
        q = _problem(seed, r=6, n=12)
        start = gptq(q, Uniform(3).fit(q.target.flatten(0, 1)), _per_channel(q))
        refitted = refit(q, start)
        made = start, refitted, descend(q, refitted, 1)[0], improved(q, start)
        lost += torch.stack([q.loss(codes.decode()).sum() for codes in made])
    assert (lost.diff() < -0.001 * lost[0]).all(), lost


SCALES = (1.0, 1.14, 1.32, 0.9, 1.06, 1.22, 0.96, 1.45)
NEARBY = (0.92, 0.96, 1.0, 1.04, 1.08)


@pytest.mark.parametrize(("most", "limit"), [(25, ""), (3, "_NUMBERS"), (3, "_PRODUCTS"), (1, "_NUMBERS")])
@pytest.mark.parametrize(
    "quantizer", [Ternary(), Uniform(4, symmetric=False), KMeans(16), KMeans(17)], ids=lambda q: q.text
)
def test_the_search_is_its_slow_twin(quantizer, most, limit, monkeypatch):
    """Channel by channel and start by start: several scales, then scales and zero points around the best."""
    q = _problem(5, groups=1, r=8, n=12)
    grid, row = quantizer.fit(q.target[0]), _per_channel(q)
    if limit:
        monkeypatch.setattr(starts, limit, most * row.numel() * (12 if limit == "_PRODUCTS" else 1))
    if isinstance(grid, Affine) and isinstance(grid.zero_point, Tensor):
        moves = list(itertools.product(NEARBY, range(-2, 3))) if most > 3 else [(1.0, 0), (0.96, 0), (1.0, -1)]
    else:
        moves = [(factor, 0) for factor in (NEARBY if most > 3 else (1.0, 0.96, 1.04))]
    many = grid.count <= 16 and most > 1
    found = q.loss(search(q, grid, row).decode())[0]
    for channel in range(8):
        alone, own = Quadratic(q.target[:, [channel]], q.h), torch.zeros_like(row[:, :1])

        def best(grid, tried, alone=alone, own=own):
            made = [best_of(alone, grid, own, [start]) for start in tried]
            return min(made, key=lambda codes: float(alone.loss(codes.decode())))

        scale = best(grid.map(lambda t, c=channel: t[[c]]), [(factor, 0) for factor in SCALES[: most if many else 1]])
        least = alone.loss(scale.decode())
        if many:
            least = least.minimum(alone.loss(best(scale.grid, moves).decode()))
        torch.testing.assert_close(found[channel], least[0, 0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: q.text)
@pytest.mark.parametrize("per", ["channel", "tensor", "group"])
def test_refit_is_the_least_squares_solution(quantizer, per):
    """Against float64 least squares over the levels' parameters, all at once."""
    q = _problem(7, groups=1, r=4, n=8)
    rows = {"channel": Rows((4, 8)), "tensor": Rows((4, 8), axis=None), "group": Rows((4, 8), group=4)}[per]
    grid = quantizer.fit(rows.split(q.target[0]))
    if isinstance(grid, Codebook) and grid.scale is None and grid.g != rows.g:
        return  # levels that are given cannot be refitted
    index = rows.merge(torch.arange(rows.g)[:, None].expand(rows.g, rows.width).contiguous())[None]
    start = gptq(q, grid, index)
    found = refit(q, start, steps=60)
    before, after = q.loss(start.decode()).sum(), q.loss(found.decode()).sum()
    assert after <= before
    root = torch.linalg.cholesky(q.h[0].double())
    if isinstance(grid, Codebook) and grid.scale is None:
        slots, width, base = index[0] * grid.count + start.codes[0].long(), rows.g * grid.count, torch.ones(4, 8)
    else:
        ones = grid.map(lambda t: t)
        unit = type(grid)(**{**ones.__dict__, "scale": torch.ones(rows.g)})
        slots, width, base = index[0], rows.g, Codes(start.codes, unit, index).decode()[0]
    design = torch.zeros(4, 8, width, dtype=torch.float64).scatter_(2, slots[..., None], base[..., None].double())
    a = torch.einsum("rnw,nm->rmw", design, root).reshape(32, width)
    b = (q.target[0].double() @ root).reshape(32)
    best = (a @ torch.linalg.lstsq(a, b, driver="gelsd").solution - b).square().sum()
    assert after >= best * (1 - 1e-3) - 1e-6
    kept = torch.equal(found.decode(), start.decode())
    assert kept or after <= best * (1 + 1e-2) + 1e-6 or per != "tensor"


@given(seed=st.integers(0, 10**6), free=st.booleans())
@settings(deadline=None, max_examples=10)
def test_proxconnect_is_its_slow_twin(seed, free):
    """The same iteration written out for one channel in float64; and it never ends above where it started."""
    q = _problem(seed, groups=1, r=1, n=4)
    q = Quadratic(q.target.double(), q.h.double())
    start = nearest(Ternary().fit(q.target[0].float()), _per_channel(q), q.target)
    found = proxconnect(q, start, 40, free=False)
    t, h = q.target[0, 0], q.h[0]
    levels = start.grid.levels()[0].double()
    d = h.diagonal()
    unit = h / (d.sqrt()[:, None] * d.sqrt())
    top = 1.05 * largest_eigenvalue(unit[None])[0]
    exact = float(torch.linalg.eigvalsh(unit)[-1])
    assert 0.96 * exact <= float(top) / 1.05 <= exact * (1 + 1e-9)
    latent, best, least = t.clone(), None, float("inf")
    for step in range(40):
        s = min(1.0, step / 12)
        point = levels[(latent[:, None] - levels).abs().argmin(1)]
        loss = float((point - t) @ h @ (point - t))
        if (s == 1 or step % 10 == 0) and loss < least:
            best, least = point, loss
        latent = latent - ((1 - s) * latent + s * point - t) @ h / (top * d)
    reached = float(q.loss(found.decode().double()).sum())
    assert reached == pytest.approx(least, rel=1e-3), (found.decode(), best)
    single = Quadratic(q.target.float(), q.h.float())
    moved = proxconnect(single, start, 40, free=free)
    assert single.loss(moved.decode()).sum() <= single.loss(start.decode()).sum()


@pytest.mark.parametrize("wish", [(3.0, 1.0), (1.0, 3.0)])
def test_a_scale_that_channels_share_is_judged_by_the_loss_of_all(wish):
    """One of the two loses by what is best for both."""
    q = Quadratic(torch.tensor(wish)[None, :, None].expand(1, 2, 2).contiguous(), torch.eye(2)[None])
    grid = Affine(torch.ones(1), 1.0, 3)
    shared = Codes(torch.full((1, 2, 2), 2, dtype=torch.uint8), grid, torch.zeros(1, 2, 2, dtype=torch.long))
    assert not shared.own
    assert torch.equal(refit(q, shared).decode(), torch.full((1, 2, 2), 2.0))
    each = Codes(shared.codes, Affine(torch.ones(2), 1.0, 3), torch.tensor([[[0, 0], [1, 1]]]))
    assert each.own
    assert torch.equal(refit(q, each).decode(), q.target)


def test_refit_refuses_levels_out_of_order():
    q = Quadratic(torch.tensor([[[5.0, -5.0]]]), torch.eye(2)[None])
    grid = Codebook(torch.tensor([[-1.0, 1.0]]))
    start = Codes(torch.tensor([[[0, 1]]], dtype=torch.uint8), grid, torch.zeros(1, 1, 2, dtype=torch.long))
    assert torch.equal(refit(q, start).grid.table, grid.table)
    right = Codes(torch.tensor([[[1, 0]]], dtype=torch.uint8), grid, torch.zeros(1, 1, 2, dtype=torch.long))
    torch.testing.assert_close(refit(q, right).grid.table, torch.tensor([[-5.0, 5.0]]))


class _Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.e = nn.Bilinear(4, 4, 2)

    def forward(self, x):
        return self.e(self.b(self.a(self.a(x))).relu_(), x)


def test_what_cannot_be_calibrated_is_named():
    module = _Twice()
    tape = tapes.record(module, (torch.randn(3, 4),))
    layers, refused = find(tape, {n: tuple(p.shape) for n, p in module.named_parameters() if p.ndim > 1})
    assert [layer.weight for layer in layers] == ["b.weight"]
    assert refused["a.weight"] == "it is used more than once"
    assert "does not use it" in refused["c.weight"]
    assert "does not know" in refused["e.weight"]


class _Random(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class _Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class _Writing(nn.Module):
    """Writes into parts, into parts of parts, and into the whole, and reads what was written and what was not."""

    def forward(self, x):
        y = x.clone()
        inner = y[:, 1:][..., ::2]
        inner.mul_(3)
        y[0, 1] = inner[1, 0, 0]
        y += 1
        y[:, 0] -= y[:, 1]
        return y * 2, y[:, :1]


class _Sharing(nn.Module):
    """Reads a part that was written to through the whole."""

    def forward(self, x):
        y = x.clone()
        part = y[:, 1:]
        y.mul_(3)
        return part + 1


@pytest.mark.parametrize(
    "module", [_Writing(), nn.GRU(4, 5, 2, bidirectional=True), nn.LSTM(4, 5), nn.InstanceNorm1d(3)]
)
def test_writes_in_place_and_recurrent_layers_are_replayed(module):
    x, other = (torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    tape = tapes.record(module.eval(), (x,))
    with torch.no_grad():
        want = tree_leaves(module(other))
    for gradient in (False, True):
        values = tapes.run(tape, tapes.state(module), {tape.inputs[0]: other}, 0, len(tape.ops), gradient=gradient)
        for got, exact in zip(tree_leaves(tapes.output(tape, values)), want, strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-6)


def test_samples_may_lie_in_memory_in_another_order_than_those_recorded():
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.Flatten(), nn.Unflatten(1, (4, 72))).eval()
    x = torch.randn(2, 3, 8, 8)
    tape = tapes.record(module, (x,))
    swapped = {tape.inputs[0]: x.contiguous(memory_format=torch.channels_last)}
    values = tapes.run(tape, tapes.state(module), swapped, 0, len(tape.ops))
    torch.testing.assert_close(tapes.output(tape, values), module(x))


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-37])
def test_where_next_to_nothing_enters_the_target_is_the_weights(size):
    weight, cov = torch.randn(1, 3, 6), torch.full((1, 6, 6), size)
    torch.testing.assert_close(target(weight, cov, cov, 0.01), weight)


class _Positions(nn.Module):
    """Adds what it makes of a table alone."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(24.0).reshape(2, 3, 4))

    def forward(self, x):
        return x + self.table.view(6, 4).sum(1)


def test_so_may_tensors():
    module, x = _Positions(), torch.randn(2, 6)
    tape = tapes.record(module, (x,))
    moved = module.table.transpose(0, 1).contiguous().transpose(0, 1)
    values = tapes.run(tape, {"table": moved}, {tape.inputs[0]: x}, 0, len(tape.ops))
    assert torch.equal(tapes.output(tape, values), module(x))


@pytest.mark.parametrize("module", [_Random(), _Branching(), _Sharing()])
def test_a_forward_pass_that_cannot_be_replayed_is_refused(module):
    with pytest.raises(PcqError):
        tapes.record(module, (torch.randn(3, 4),))


class _Watchful(nn.Module):
    """Says whether what its first half made was gone when its second half was done; the garbage is not collected."""

    def forward(self, x):
        first = x * 2
        at = weakref.ref(first)
        second = first + 1
        del first
        self.gone = at() is None
        return second


def test_recording_and_replaying_hold_no_tensor_that_is_no_longer_read():
    module, x = _Watchful(), torch.randn(3, 4)
    gc.disable()
    try:
        tape = tapes.record(module, (x,))
        assert module.gone
        values = tapes.run(tape, {}, {tape.inputs[0]: x}, 0, len(tape.ops))
        assert torch.equal(tapes.output(tape, values), x * 2 + 1)
        at = [weakref.ref(tensor) for tensor in values.values()]
        del values
        assert at
        assert all(ref() is None for ref in at)
    finally:
        gc.enable()


def test_a_transformer_is_replayed_and_all_its_linears_found():
    module = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    tape = tapes.record(module, (torch.randn(2, 5, 8),))
    weights = {n: tuple(p.shape) for n, p in module.named_parameters() if p.ndim > 1}
    layers, refused = find(tape, weights)
    assert not refused
    assert {layer.weight: layer.bias for layer in layers} == {name: name.replace("weight", "bias") for name in weights}
    assert module.training
    assert torch.backends.mha.get_fastpath_enabled()


def calibration_net() -> nn.Module:
    torch.manual_seed(0)
    net = resnet8()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            module.momentum = None
    net.train()
    with torch.no_grad():
        net(torch.randn(64, 1, 8, 8))
    return net.eval()


def _apply(net: nn.Module, result, x: Tensor) -> Tensor:
    tensors = {**{n: q.dequantize() for n, q in result.quantized.items()}, **result.changed}
    with torch.no_grad():
        return torch.func.functional_call(net, tensors, (x,))


def test_calibration_is_deterministic_streams_and_beats_rounding():
    net, x = calibration_net(), torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    plan = _plan(net, Uniform(2))
    before = {n: t.clone() for n, t in net.state_dict().items()}
    whole = calibrate(net, plan, (x,), Settings(batch=40))
    again = calibrate(net, plan, (x,), Settings(batch=40, memory=0))  # nothing kept: every stretch computed again
    for name in plan:
        assert torch.equal(whole.quantized[name].codes, again.quantized[name].codes)
        assert torch.equal(whole.quantized[name].dequantize(), again.quantized[name].dequantize())
    assert whole.changed.keys() == again.changed.keys()
    assert all(torch.equal(whole.changed[name], again.changed[name]) for name in whole.changed)
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert not whole.plain
    plain = calibrate(net, plan, (x,), Settings(method="nearest", corrected=False, match="none"))
    fresh = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        y = net(fresh)
    errors = [float((_apply(net, r, fresh) - y).square().mean()) for r in (whole, plain)]
    assert errors[0] < errors[1] / 2, errors


class _Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(8, 8), layer, nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.layer(self.first(x))[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_block_with_a_recurrent_layer_is_refined(kind):
    torch.manual_seed(0)
    net = _Recurrent(kind(8, 8, batch_first=True)).eval()
    x = torch.randn(96, 5, 8)
    found = calibrate_measured(net, _plan(net, Uniform(2)), (x[:64],), (x[64:],), Settings(batch=32, refine=30))
    assert [step for step in found.steps if step.name.endswith("blocks refined")]


def test_norms_without_statistics_are_calibrated_around():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.InstanceNorm2d(8), nn.Conv2d(8, 4, 3),
        nn.BatchNorm2d(4, track_running_stats=False),
    ).eval()  # fmt: skip
    x = torch.randn(64, 1, 8, 8)
    found = calibrate(net, _plan(net, Uniform(3)), (x,), Settings(batch=32))
    tape = tapes.record(net, (x[:32],))
    assert reestimate(tape, tapes.state(net), [(x[:32],)]).keys() == {"1.running_mean", "1.running_var"}
    assert torch.isfinite(_apply(net, found, x)).all()


def test_what_enters_a_linear_comes_from_the_quantized_ones_before():
    """Weights are transposed on the tape before they are used: a transposition of the float one must not be kept."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x, plan = torch.randn(64, 5, 6), _plan(net, Uniform(2))
    kept = calibrate(net, plan, (x,), Settings(batch=16))
    again = calibrate(net, plan, (x,), Settings(batch=16, memory=0))  # nothing kept: every stretch computed again
    assert kept.layers == again.layers
    for name in plan:
        assert torch.equal(kept.quantized[name].codes, again.quantized[name].codes)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: q.text)
@pytest.mark.parametrize("axis", [0, None, "group"])
def test_every_kind_of_levels_and_rows_is_calibrated(quantizer, axis):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, groups=2)
    )
    net.eval()
    x = torch.randn(16, 2, 6, 6)
    plan = {}
    for name, p in net.named_parameters():
        if p.ndim > 1:
            layout = {"axis": 1, "blocks": 2} if name.startswith("3") else {"axis": 0}
            layout = {"axis": None} if axis is None else layout
            plan[name] = (Rows(tuple(p.shape), **layout, group=5 if axis == "group" else None), quantizer)
    result = calibrate(net, plan, (x,), Settings(rounds=2))
    assert not result.plain
    for name, (rows, _) in plan.items():
        found = result.quantized[name]
        assert found.rows == rows
        assert found.grid.g in (1, rows.g)
        assert found.dequantize().isfinite().all()
    assert all(report.solved <= report.nearest * 1.0001 for report in result.layers)


def test_matching_gives_every_channel_the_float_moments():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5, eps=1e-12)).eval()
    nn.init.uniform_(net[1].weight, 0.5, 2)
    nn.init.normal_(net[1].bias)
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    x = torch.randn(64, 6) @ torch.randn(6, 6)
    for chosen in (Settings(method="nearest", corrected=False), Settings()):
        result = calibrate(net, _plan(net, Ternary()), (x,), chosen)
        with torch.no_grad():
            y, y_q = net(x), _apply(net, result, x)
        torch.testing.assert_close(y_q.mean(0), y.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(y_q.std(0), y.std(0), rtol=1e-4, atol=1e-5)


def test_a_channel_without_spread_is_matched_without_an_epsilon_too():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, eps=0.0)).eval()
    with torch.no_grad():
        net[0].weight[0] = 0
    result = calibrate(net, _plan(net, Ternary()), (torch.randn(64, 6),), Settings())
    assert all(tensor.isfinite().all() for tensor in result.changed.values())


def test_a_bias_alone_takes_the_mean():
    torch.manual_seed(0)
    net, x = nn.Linear(6, 5), torch.randn(64, 6) + 1
    result = calibrate(net, _plan(net, Binary()), (x,), Settings(batch=64))
    with torch.no_grad():
        share = influence((net(x) - net.bias)[None])[0]
        means = [(y * share).sum(0) / share.sum() for y in (_apply(net, result, x), net(x))]
    torch.testing.assert_close(*means, rtol=1e-4, atol=1e-5)


class _Biased(nn.Module):
    """Biases that cannot take up the mean of a layer's output alone, without its being felt elsewhere, or at all."""

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.first, self.last = nn.Linear(8, 16, bias=False), nn.Linear(16, 16)
        self.register_buffer("made", torch.randn(16), persistent=False)
        self.one, self.heads = nn.Parameter(torch.ones(1)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        y = self.first(x)
        match self.kind:
            case "shared":
                y = y + self.last.bias
            case "made by the network's code":
                y = y + self.made
            case "one number":
                y = y + self.one
            case "of heads":
                y = (y.view(-1, 4, 4) + self.heads).flatten(1)
        return self.last(y.relu())


@pytest.mark.parametrize("kind", ["shared", "made by the network's code", "one number", "of heads"])
def test_a_bias_that_is_no_number_for_each_channel_of_one_layer_stays(kind):
    net, x = _Biased(kind).eval(), torch.randn(160, 8)
    result = calibrate(net, _plan(net, Ternary()), (x,), Settings())
    assert set(result.changed) == (set() if kind == "shared" else {"last.bias"})
    found = calibrate_measured(net, _plan(net, Ternary()), (x[:128],), (x[128:],), Settings(method="gptq", refine=10))
    assert "made" not in found.changed


class _Viewed(nn.Module):
    """A weight that is used in another shape than its own."""

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.first, self.last = kind, nn.Linear(8, 16, bias=False), nn.Linear(16, 4)
        self.conv = nn.Conv1d(8, 16, 1, bias=False)

    def forward(self, x):
        match self.kind:
            case "a convolution by a matrix":
                y = F.conv1d(x[..., None], self.first.weight.view(16, 8, 1)).flatten(1)
            case "other rows":
                y = x @ self.first.weight.view(8, 16)
            case "a matrix by a convolution":
                y = F.linear(x, self.conv.weight.view(16, -1))
        return self.last(y.relu())


@pytest.mark.parametrize(
    ("kind", "name"),
    [("a convolution by a matrix", "first"), ("other rows", "first"), ("a matrix by a convolution", "conv")],
)
def test_a_weight_used_in_another_shape_is_a_layer_where_its_rows_are_the_same(kind, name):
    net, x = _Viewed(kind).eval(), torch.randn(160, 8)
    result = calibrate(
        net, {n: each for n, each in _plan(net, Uniform(3)).items() if n[:4] in (name[:4], "last")}, (x,)
    )
    known = [report.weight for report in result.layers]
    assert known == (["conv.weight", "last.weight"] if name == "conv" else ["last.weight"])
    assert name == "conv" or "does not know" in result.plain["first.weight"]


def test_a_turned_matrix_is_calibrated_as_a_linear_is():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6))
    turned = nn.Sequential(Conv1D(16, 8), nn.ReLU(), Conv1D(6, 16))
    turned.load_state_dict({n: t.t() if t.ndim > 1 else t for n, t in net.state_dict().items()})
    x = torch.randn(200, 3, 8)
    shapes = {name: tuple(t.shape) for name, t in turned.state_dict().items()}
    found = inventory(shapes, dict.fromkeys(shapes, "float32"), turned)
    rule = Rule((Match(name=("*",)),), Uniform(2))
    plan = {p.name: (rule.rows(p), Uniform(2)) for p in found if p.kind == "linear"}
    assert all(rows.axis == 1 for rows, _ in plan.values())
    theirs = calibrate(net, _plan(net, Uniform(2)), (x,), Settings(batch=40))
    ours = calibrate(turned, plan, (x,), Settings(batch=40))
    assert not ours.plain
    for name, weight in theirs.quantized.items():
        torch.testing.assert_close(ours.quantized[name].dequantize(), weight.dequantize().t())


def test_no_samples_is_said():
    with pytest.raises(PcqError, match="no calibration samples"):
        calibrate(nn.Linear(2, 2), {}, (torch.empty(0, 2),))


def test_padding_is_part_of_the_samples_path():
    """A convolution that pads inside its own forward is seen with what really enters it."""

    class Padded(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)

    torch.manual_seed(0)
    net, x = Padded(2, 3, 3, stride=2), torch.randn(4, 2, 6, 6) + 3
    result = calibrate(net, _plan(net, Ternary()), (x,))
    with torch.no_grad():
        y, y_q = net(x), _apply(net, result, x)
    torch.testing.assert_close(y_q.mean((0, 2, 3)), y.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


class Overflows(nn.Module):
    """The squares of what enters the last layer are infinite in float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) * 1e25)


def test_a_layer_whose_input_overflows_is_rounded_and_named():
    network = Overflows().eval()
    plan = {name: (Rows(tuple(p.shape)), Ternary()) for name, p in network.named_parameters() if p.ndim == 2}
    found = calibrate(network, plan, (torch.randn(64, 4),), Settings(corrected=True))
    assert found.plain == {"last.weight": "what enters it is not finite on these samples"}
    rows, quantizer = plan["last.weight"]
    assert torch.equal(found.quantized["last.weight"].codes, quantize(quantizer, network.last.weight, rows).codes)
    assert [report.weight for report in found.layers] == ["first.weight"]


def test_what_a_step_is_given_up_for_is_said():
    before = Step("before", 0.2, 90.0)
    assert less_like(Step("better", 0.1, 90.0), before) == ""
    assert less_like(Step("like no more", 0.1, 89.9), before) == "not kept: the agreement is lower"
    assert less_like(Step("far", 0.2, 95.0), before) == "not kept: the error is not lower"
    assert less_like(Step("no predictions", 0.1, None), Step("before", 0.2, None)) == ""
