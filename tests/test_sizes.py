"""Forwards that ask for sizes, decide by them or loop over tensors: traced for the sizes that they are given."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusing import run_and_list
from test_training_networks import By
from torch import Tensor, nn
from torch.testing import assert_close

import fastnn
from fastnn.graph import tracing


def _steps(m: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(x.size(0), 5)
    for t in range(x.size(1)):
        h = m.cell(x[:, t], h)
    return m.head(h)


def _two_cells(m: Any, x: Tensor) -> Tensor:
    h1, c1, h2, c2 = (torch.zeros(x.size(0), 5, dtype=x.dtype) for _ in range(4))
    outputs = []
    for step in x.split(1, dim=1):
        h1, c1 = m.cell(step.squeeze(1), (h1, c1))
        h2, c2 = m.other(h1, (h2, c2))
        outputs.append(m.head(h2))
    return torch.stack(outputs, 1)


def _over_a_tensor(m: Any, x: Tensor) -> Tensor:
    h = None
    for step in x.transpose(0, 1):
        h = m.cell(step, h)
    return m.head(h) * len(x)


def _skips(m: Any, x: Tensor) -> Tensor:
    for block in m.blocks:
        y = block(x)
        x = x + y if x.shape == y.shape else y
    return x.mean((2, 3))


def _padded(m: Any, x: Tensor) -> Tensor:
    y = m.up(m.down(x))
    rows, columns = x.size(2) - y.size(2), x.size()[3] - y.size()[3]
    y = F.pad(y, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
    return m.last(torch.cat([x, y], dim=1))


def _ranks(m: Any, x: Tensor) -> Tensor:
    if x.dim() == 2:
        x = x.unsqueeze(0)
    batch, steps, _ = x.shape
    assert x.ndim == 3
    assert x.numel() == batch * steps * 3
    return m.head(torch.relu(m.first(x.reshape(batch * steps, 3))).view(batch, -1, 5).amax(dim=1))


def _blocks() -> nn.Module:
    layers = ((3, 6, 1), (6, 6, 1), (6, 8, 2), (8, 8, 1))
    return nn.ModuleList(
        nn.Sequential(nn.Conv2d(i, o, 3, stride=s, padding=1), nn.BatchNorm2d(o), nn.ReLU6()) for i, o, s in layers
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "steps": (lambda: By(_steps, cell=nn.GRUCell(3, 5), head=nn.Linear(5, 2)), (4, 6, 3), (4, 3, 3)),
    "two cells": (
        lambda: By(_two_cells, cell=nn.LSTMCell(3, 5), other=nn.LSTMCell(5, 5), head=nn.Linear(5, 2)),
        (4, 6, 3),
        (1, 7, 3),
    ),
    "over a tensor": (lambda: By(_over_a_tensor, cell=nn.RNNCell(3, 5), head=nn.Linear(5, 2)), (4, 6, 3), (3, 2, 3)),
    "skips": (lambda: By(_skips, blocks=_blocks()), (2, 3, 9, 8), (3, 3, 6, 6)),
    "padded": (
        lambda: By(
            _padded, down=nn.Conv2d(2, 4, 3, 2), up=nn.ConvTranspose2d(4, 3, 2, stride=2), last=nn.Conv2d(5, 1, 3)
        ),
        (2, 2, 11, 10),
        (2, 2, 12, 13),
    ),
    "ranks": (lambda: By(_ranks, first=nn.Linear(3, 5), head=nn.Linear(5, 2)), (4, 6, 3), (6, 3)),
}


def _pair(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = MODELS[name][0]().double()
    return copy.deepcopy(model), fastnn.fuse(model)


def _same(stock: nn.Module, fused: nn.Module, *sizes: int) -> None:
    x = torch.randn(sizes, dtype=torch.float64, requires_grad=True)
    random = torch.get_rng_state()
    results = []
    for model in (stock, fused):
        y = model(x)
        gradients = torch.autograd.grad(y.square().sum(), [x, *model.parameters()], allow_unused=True)
        with torch.no_grad():
            results.append((y, model(x), *gradients))
    assert torch.equal(torch.get_rng_state(), random)
    assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_computes_what_stock_does(name: str) -> None:
    stock, fused = _pair(name)
    _, first, other = MODELS[name]
    for sizes in (first, other, first, (2 + first[0], *first[1:]), other):
        for _ in range(2):
            _same(stock, fused, *sizes)
    for model in (stock, fused):
        model.eval()
    _same(stock, fused, *first)
    if name != "padded":  # sizes of which a padding is computed at each call
        assert all(trace.sizes is not None for trace in fused.forward.traces[True])
    assert_close(fused.state_dict(), stock.state_dict())


@pytest.mark.parametrize("name", ["steps", "two cells", "skips"])
@torch.no_grad()
def test_is_one_call(name: str) -> None:
    _, fused = _pair(name)
    x = torch.randn(MODELS[name][1], dtype=torch.float64)
    fused.eval()(x)
    assert run_and_list(lambda: fused(x))[1] == ["fastnn::network_of_parameters"]
    report = fastnn.explain(fused, x)
    assert len(report.inference) == 1
    assert not any(row.why for row in report.left if "decides" in row.why)


def _hold_a_wider_layer(m: Any) -> None:
    m.blocks[0][0] = nn.Conv2d(3, 4, 1).double()
    m.blocks[0][1] = nn.BatchNorm2d(4).double()
    m.blocks[1][0] = nn.Conv2d(4, 6, 3, padding=1).double()


def _take_another_weight(m: Any) -> None:
    weight = torch.linspace(-1, 1, 3 * 9).reshape(3, 3, 3, 1).double()
    m.blocks[0][0].weight, m.blocks[0][0].bias = nn.Parameter(weight), None
    m.blocks[0][1] = nn.Identity()
    m.blocks[1][0] = nn.Conv2d(3, 6, 3, padding=1).double()


CHANGES: dict[str, Callable[[Any], None]] = {
    "stride": lambda m: setattr(m.blocks[1][0], "stride", (2, 2)),
    "padding": lambda m: setattr(m.blocks[1][0], "padding", (0, 0)),
    "layers": _hold_a_wider_layer,
    "weight": _take_another_weight,
    "code": lambda m: setattr(m, "function", lambda m, x: _skips(m, x) * x.shape[0]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_sizes_rest_on_is_compared(name: str) -> None:
    stock, fused = _pair("skips")
    _same(stock, fused, 2, 3, 9, 8)
    for model in (stock, fused):
        torch.manual_seed(5)
        CHANGES[name](model)
    for _ in range(2):
        _same(stock, fused, 2, 3, 9, 8)


def test_values_still_end_a_trace() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.first(x)
        return y * len(x) if y.sum() > 0 else y[: len(x) // 2]

    model = fastnn.fuse(By(forward, first=nn.Linear(3, 3)))
    for sign in (1, -1, 1):
        x = sign * torch.ones(4, 3)
        y = model.first(x)
        assert_close(model(x), y * 4 if y.sum() > 0 else y[:2])
    assert "decides by the values" in (model.forward.why or "")  # type: ignore[operator, union-attr]


def test_sizes_that_change_in_place() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.first(x)
        y.unsqueeze_(0)
        return y * y.dim() if len(x) > 1 else y

    stock = By(forward, first=nn.Linear(3, 3)).double()
    _same(stock, fastnn.fuse(copy.deepcopy(stock)), 4, 3)


def test_tracing_draws_nothing() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        noise = torch.normal(0.0, 1.0, (len(x), 3), dtype=x.dtype) + torch.rand(3, dtype=x.dtype)
        y = F.dropout(m.first(x), 0.5)
        return y + noise if y.shape == noise.shape else y

    stock = By(forward, first=nn.Linear(3, 3)).double()
    fused = fastnn.fuse(copy.deepcopy(stock))
    x = torch.randn(4, 3, dtype=torch.float64)
    for _ in range(2):
        results = []
        for model in (stock, fused):
            torch.manual_seed(3)
            results.append((model(x), torch.rand(2)))
        assert_close(*results)


def test_loops_without_end_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_MOST_NODES", 20)
    stock, fused = _pair("steps")
    _same(stock, fused, 2, 3, 3)
    assert fused.forward.traces[True]
    _same(stock, fused, 2, 40, 3)
    assert "more than 20" in fused.forward.why


@pytest.mark.parametrize("name", MODELS)
def test_training_steps(name: str) -> None:
    stock, fused = _pair(name)
    _, first, other = MODELS[name]
    optimizers = [torch.optim.Adam(model.parameters(), 0.01) for model in (stock, fused)]
    step = fastnn.training_step(fused, nn.MSELoss(), optimizers[1])
    for i, sizes in enumerate((first, first, other, first)):
        x = torch.randn(sizes, dtype=torch.float64)
        target = torch.randn(copy.deepcopy(stock)(x).shape, dtype=torch.float64)
        optimizers[0].zero_grad()
        loss = nn.functional.mse_loss(stock(x), target)
        loss.backward()
        optimizers[0].step()
        assert_close(step(x, target), loss.detach(), rtol=1e-9, atol=1e-9)
        if name not in ("ranks", "padded"):  # which have a layer that no step has
            assert step._last_why == "", i
    assert_close(fused.state_dict(), stock.state_dict(), rtol=1e-7, atol=1e-7)


def test_epochs() -> None:
    stock, fused = _pair("steps")
    x, y = torch.randn(19, 4, 3, dtype=torch.float64), torch.randn(19, 2, dtype=torch.float64)
    curves = []
    for model in (stock, fused):
        step = fastnn.training_step(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), 0.1))
        curves.append(torch.cat([step.epoch(x, y, 8) for _ in range(3)]))
    assert_close(*curves)
    assert_close(fused.state_dict(), stock.state_dict())


def test_a_length_leaves_nothing_in_the_graph() -> None:
    model = fastnn.fuse(By(lambda m, x: m.first(x) * len(x), first=nn.Linear(3, 3)))
    x = torch.randn(4, 3)
    assert_close(model(x), model.first(x) * 4)
    (trace,) = model.forward.traces[True]  # type: ignore[operator, union-attr]
    assert [node.op for node in trace.stock_graph.nodes] == ["placeholder", "call_module", "call_function", "output"]
