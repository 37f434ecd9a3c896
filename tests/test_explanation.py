"""fastnn.explain names the operators that a model calls, and their algorithms."""

import torch
from torch import Tensor, nn

import fastnn
import fastnn.nn
from fastnn import functional

FORWARD, BACKWARD = (
    {"winograd", "phases", "pixels", "depthwise", "direct", "stock"},
    {"winners", "depthwise", "taps", "stock"},
)

GEOMETRY = [1, 1, 0, 0, 1, 1, 2, 2, 2, 2, 0, 0, 1, 1, 1, 0]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            fastnn.nn.ConvReLUMaxPool2d(3, 64, 3, padding="same"), fastnn.nn.ConvReLUMaxPool2d(64, 96, 3, padding=1)
        )
        self.output = nn.Linear(96, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(functional.conv_relu_max_pool2d(self.features(x), torch.ones(96, 96, 1, 1)).mean((2, 3)))


def test_every_call_is_reported_with_its_layer() -> None:
    model, input = Network(), torch.randn(2, 3, 64, 64)
    before = model(input)
    calls = fastnn.explain(model, input).calls
    assert [call.layer for call in calls] == ["features.0", "features.1", ""]
    assert {call.operator for call in calls} == {"conv_relu_max_pool"}
    assert [call.input for call in calls] == [f"(2, {c}, {s}, {s}) float32" for c, s in ((3, 64), (64, 32), (96, 16))]
    assert all(call.forward in FORWARD and call.backward in BACKWARD for call in calls)
    assert calls[1].forward == "winograd"
    assert torch.equal(model(input), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_values_that_an_algorithm_cannot_take() -> None:
    model, input = Network(), torch.randn(2, 3, 64, 64)
    input[0, 0, 0, 0] = float("inf")
    assert fastnn.explain(model, input).calls[1].forward == "direct"


def test_an_algorithm_that_is_asked_for() -> None:
    class Raw(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.fastnn.conv_relu_max_pool(x, torch.ones(9, 3, 3, 3), None, GEOMETRY, "phases")

    assert fastnn.explain(Raw(), torch.randn(1, 3, 8, 8)).calls[0].forward == "phases"


def test_prints_as_a_table() -> None:
    lines = str(fastnn.explain(Network(), torch.randn(1, 3, 64, 64))).split("\n")
    assert lines[0].split() == ["layer", "operator", "input", "forward", "backward"]
    assert len(lines) == 4
    assert len({line.index("conv_relu_max_pool") for line in lines[1:]}) == 1


def test_other_operators_and_stock_layers() -> None:
    calls = fastnn.explain(fastnn.nn.MLP([3, 4, 2]), torch.randn(5, 3)).calls
    assert [(call.operator, call.forward) for call in calls] == [("mlp", "fused")]
    stock = fastnn.explain(nn.Linear(3, 4), torch.randn(5, 3))
    assert str(stock) == "no operator of fastnn is called"
    half = fastnn.nn.ConvReLUMaxPool2d(3, 4, 3).half()
    assert fastnn.explain(half, torch.randn(1, 3, 8, 8).half()).calls == ()
