"""Forwards as people write them: each is followed, trains in one call, and computes what stock does."""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import fastnn

pytestmark = pytest.mark.usefixtures("float64_by_default")
ROWS, STEPS, IMAGES = (6, 8), (6, 5, 8), (6, 3, 8, 8)


class Everything(nn.Module):
    """Layers, settings and buffers, of which a function of the module and the input uses some."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc0, self.fc1, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.gru, self.lstm = nn.GRU(8, 8, batch_first=True), nn.LSTM(8, 8, 2, batch_first=True)
        self.norm, self.drop = nn.LayerNorm(8), nn.Dropout(0.1)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.named = nn.ModuleDict({"first": nn.Linear(8, 8), "second": nn.Linear(8, 8)})
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.scales = nn.ParameterList([nn.Parameter(torch.randn(8)) for _ in range(2)])
        self.register_buffer("positions", torch.randn(1, 10, 8))
        self.device, self.scale, self.activation, self.debug = "cpu", np.sqrt(8.0), F.relu, False
        self.config = {"activation": "relu", "layers": 2}
        self.function = function

    def zeros(self, batch: int) -> Tensor:
        return next(self.parameters()).data.new_zeros(1, batch, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


FORWARDS: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...]]] = {}


def forward_of(*sizes: int) -> Callable[[Callable[[Any, Tensor], Tensor]], Callable[[Any, Tensor], Tensor]]:
    def register(function: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
        FORWARDS[function.__name__.removeprefix("_")] = function, sizes
        return function

    return register


@forward_of(*ROWS)
def _names_of_layers(m: Any, x: Tensor) -> Tensor:
    for i in range(2):
        x = torch.relu(getattr(m, f"fc{i}")(x))
    return m.head(x)


@forward_of(*STEPS)
def _a_state_like_the_parameters(m: Any, x: Tensor) -> Tensor:
    return m.head(m.gru(x, m.zeros(x.size(0)))[0][:, -1])


@forward_of(*STEPS)
def _states_of_zeros(m: Any, x: Tensor) -> Tensor:
    h = torch.zeros(2, x.size(0), 8, device=x.device, dtype=x.dtype)
    out, (h, _) = m.lstm(x, (h, torch.zeros_like(h)))
    return m.head(out[:, -1, :] + h[-1])


@forward_of(*ROWS)
def _the_parameters_device(m: Any, x: Tensor) -> Tensor:
    x = x.to(next(m.parameters()).device).to(m.device)
    return m.head(m.fc0(x) * torch.ones(8, dtype=m.fc0.weight.dtype))


@forward_of(*ROWS)
def _a_penalty(m: Any, x: Tensor) -> Tensor:
    return m.head(x) + 0.01 * sum(p.square().sum() for p in m.fc0.parameters())


@forward_of(*ROWS)
def _a_penalty_on_all(m: Any, x: Tensor) -> Tensor:
    return m.head(m.fc1(m.fc0(x))) + 0.01 * sum(p.square().sum() for p in m.parameters())


@forward_of(*STEPS)
def _sizes(m: Any, x: Tensor) -> Tensor:
    batch, steps, features = x.shape
    assert features == 8, f"expected 8 features, got {x.shape}"
    if x.ndim != 3:
        raise ValueError("expected three dimensions")
    return m.head(m.fc0(x).reshape(batch * steps, features).view(batch, steps, -1).mean(1))


@forward_of(*STEPS)
def _positions(m: Any, x: Tensor) -> Tensor:
    return m.head((m.fc0(x) * math.sqrt(8) + m.positions[:, : x.size(1)] * m.scale / np.float64(2)).mean(1))


@forward_of(*ROWS)
def _all_but_the_last(m: Any, x: Tensor) -> Tensor:
    for layer in m.layers[:-1]:
        x = m.activation(layer(x))
    for layer in reversed(m.layers):
        x = torch.tanh(layer(x))
    return m.head(m.layers[-1](m.block[:2](x)))


@forward_of(*ROWS)
def _residuals(m: Any, x: Tensor) -> Tensor:
    for i, layer in enumerate(m.layers):
        y = m.drop(m.activation(layer(m.norm(x))))
        x = x + y if i > 0 else y
    for scale, layer in zip(m.scales, m.named.values(), strict=True):
        x = x * scale + layer(x)
    return m.head(x)


@forward_of(*ROWS)
def _a_configuration(m: Any, x: Tensor) -> Tensor:
    activation = {"relu": torch.relu, "tanh": torch.tanh}[m.config["activation"]]
    for layer in m.layers[: m.config["layers"]]:
        x = activation(layer(x))
    if m.debug:
        print(x)
    return m.head(getattr(F, m.config["activation"])(m.named["first"](x)))


@forward_of(*ROWS)
def _layers_of_all_before(m: Any, x: Tensor) -> Tensor:
    features = [x]
    for layer in m.layers:
        features.append(torch.relu(layer(sum(features))))
    return m.head(torch.stack(features).mean(0) + torch.cat(features, dim=-1)[..., 8:16])


@forward_of(*STEPS)
def _a_loop_over_steps(m: Any, x: Tensor) -> Tensor:
    h, all_steps = x.new_zeros(x.size(0), 8), []
    for t in range(x.size(1)):
        h = torch.tanh(m.fc0(x[:, t]) + m.fc1(h))
        all_steps.append(h)
    return m.head(torch.stack(all_steps, 1).max(1).values)


@forward_of(*ROWS)
def _functions_within(m: Any, x: Tensor) -> Tensor:
    def block(value: Tensor, layer: Any) -> Tensor:
        return torch.relu(layer(value)) + value

    leaky, gate = functools.partial(F.leaky_relu, negative_slope=0.2), lambda value: torch.sigmoid(value) * value
    x = functools.reduce(block, m.layers, x)
    i = 0
    while i < len(m.scales):
        x = leaky(x) * m.scales[i]
        i += 1
    return m.head(gate(x))


@forward_of(*ROWS)
def _layers_that_are_made(m: Any, x: Tensor) -> Tensor:
    x = nn.Dropout(0.2)(nn.ReLU()(m.fc0(x)))
    return m.head(nn.Softmax(dim=1)(m.fc1(x))) + nn.MSELoss()(x, torch.zeros_like(x))


@forward_of(*IMAGES)
def _pools_that_are_made(m: Any, x: Tensor) -> Tensor:
    return m.head(nn.AdaptiveAvgPool2d((1, 8))(nn.ZeroPad2d(1)(x)).mean(1).flatten(1))


@forward_of(*ROWS)
def _modes(m: Any, x: Tensor) -> Tensor:
    x = F.dropout(m.fc0(x), 0.2, m.training) if m.training else x
    return m.head(x) * torch.tensor(2.0) + torch.tensor([1.0, 2.0, 3.0])


@forward_of(*ROWS)
def _an_older_style(m: Any, x: Tensor) -> Tensor:
    zeros = torch.autograd.Variable(torch.zeros(x.size(0), 8))
    frozen = torch.autograd.Variable(m.fc1(x)) + m.fc0(x).data
    return m.head((m.fc0(x) + zeros).view(x.size(0), -1) * frozen)


@forward_of(*STEPS)
def _attention(m: Any, x: Tensor) -> Tensor:
    query, key = m.fc0(x), m.fc1(x)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))
    mask = torch.triu(torch.ones(x.size(1), x.size(1), dtype=torch.bool), 1)
    return m.head((scores.masked_fill(mask, float("-inf")).softmax(-1) @ x).mean(1))


@pytest.mark.parametrize("name", FORWARDS)
def test_trains_in_one_call(name: str) -> None:
    function, sizes = FORWARDS[name]
    stock = Everything(function)
    model = copy.deepcopy(stock)
    ours, theirs = (torch.optim.Adam(one.parameters(), 0.01) for one in (model, stock))
    step = fastnn.training_step(model, nn.MSELoss(), ours)
    for number in range(4):
        x = torch.randn(4 if number == 2 else sizes[0], *sizes[1:], generator=torch.Generator().manual_seed(number))
        y = torch.ones(len(x), 3)
        torch.manual_seed(number)
        theirs.zero_grad()
        expected = F.mse_loss(stock(x), y)
        expected.backward()
        theirs.step()
        torch.manual_seed(number)
        assert_close(step(x, y), expected.detach(), rtol=1e-7, atol=1e-9)
        assert step.explain().startswith("one operator call"), step.explain()
        assert "ordinary" not in step.explain(), step.explain()
    assert_close(model.state_dict(), stock.state_dict(), rtol=1e-6, atol=1e-8)
    found = []
    for one in (model.eval(), stock.eval()):
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(one(x))
    assert_close(*found, rtol=1e-7, atol=1e-9)


def test_the_first_parameter_may_change() -> None:
    """Its dtype, the module that has it, and whether there is one before it."""
    stock = Everything(FORWARDS["the_parameters_device"][0])
    model = fastnn.fuse(copy.deepcopy(stock))
    changes: list[Callable[[Any], Any]] = [
        lambda m: m.float(),
        lambda m: setattr(m.fc0, "weight", nn.Parameter(torch.eye(8))),
        lambda m: m.double(),
        lambda m: setattr(m.fc0, "bias", None),
        lambda m: m.register_parameter("own", nn.Parameter(torch.zeros(1, dtype=torch.float32))),
        lambda m: m.to("meta"),
    ]
    for change in changes:
        for one in (model, stock):
            change(one)
        for dtype in (torch.float32, torch.float64):
            found = []
            for one in (model, stock):
                try:
                    found.append(one(torch.ones(2, 8, dtype=dtype)))
                except RuntimeError as error:
                    found.append(type(error))
            if isinstance(found[1], Tensor) and not found[1].is_meta:
                assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)
            else:
                assert type(found[0]) is type(found[1])


@pytest.mark.parametrize("change", ["tied", "untied", "an iterator of its own"])
def test_parameters_that_change(change: str) -> None:
    """Each tensor is given once, at its first place, by what finds parameters now."""
    function = FORWARDS["a_penalty_on_all"][0]
    stock = Everything(function)
    if change == "untied":
        stock.fc1.weight = stock.fc0.weight
    model = copy.deepcopy(stock)
    ours, theirs = (torch.optim.SGD(one.parameters(), 0.01) for one in (model, stock))
    step, x = fastnn.training_step(model, nn.MSELoss(), ours), torch.randn(6, 8)
    for number in range(5):
        if number == 2:
            for one in (model, stock):
                if change == "an iterator of its own":
                    one.named_parameters = lambda *_, m=one, **__: iter([("w", m.fc0.weight)])
                else:
                    one.fc1.weight = one.fc0.weight if change == "tied" else nn.Parameter(torch.eye(8))
        theirs.zero_grad()
        expected = F.mse_loss(stock(x), torch.ones(6, 3))
        expected.backward()
        theirs.step()
        assert_close(step(x, torch.ones(6, 3)), expected.detach(), rtol=1e-9, atol=1e-9)
