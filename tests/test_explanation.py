"""fastnn.explain names the operators that a model calls, and their algorithms."""

import dataclasses

import pytest
import torch
from fusing import Scaled
from torch import Tensor, nn

import fastnn
import fastnn.nn
from fastnn import functional

FORWARD, BACKWARD = (
    {"winograd", "phases", "pixels", "depthwise", "direct", "stock"},
    {"taps", "depthwise", "winograd", "winners", "stock"},
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
    assert lines[0].split() == ["layer", "operator", "input", "forward", "backward", "why"]
    assert len(lines) == 5
    assert len({line.index("conv_relu_max_pool") for line in lines[1:4]}) == 1
    assert "output" in lines[4]
    assert " left " in lines[4]


def test_other_operators_and_stock_layers() -> None:
    calls = fastnn.explain(fastnn.nn.MLP([3, 4, 2]), torch.randn(5, 3)).calls
    assert [(call.operator, call.forward) for call in calls] == [("mlp", "fused")]
    assert str(fastnn.explain(nn.Identity(), torch.randn(5, 3))) == "there is no layer that fastnn could fuse"
    half = fastnn.nn.ConvReLUMaxPool2d(3, 4, 3).half()
    assert fastnn.explain(half, torch.randn(1, 3, 8, 8).half()).calls == ()


def test_a_stock_model_is_told_what_fuse_would_do() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1))
    report = fastnn.explain(model, torch.randn(2, 3, 9, 9))
    assert not report.is_fused
    assert [(row.layer, row.operator) for row in report.rows] == [("0, 1, 2", "conv_relu_max_pool"), ("3", "")]
    assert report.left[0].why == "average and adaptive pools are torch's"
    assert "The model is not fused yet" in str(report)
    assert not any("forward" in module.__dict__ for module in model.modules())
    fused = fastnn.explain(fastnn.fuse(model), torch.randn(2, 3, 9, 9))
    assert fused.is_fused
    assert fused.rows == report.rows
    assert [(row.layer, row.operator) for row in fastnn.explain(model).rows] == [
        (row.layer, row.operator) for row in report.rows
    ]
    rows = [dataclasses.asdict(row) for row in fused.rows]
    assert fused.to_dict() == {"is_fused": True, "rows": rows, "stretches": [], "inference": [["conv", "mean"]]}


def test_inputs_in_a_tuple() -> None:
    a, b = torch.randn(2, 4), torch.randn(2, 3)
    model = Scaled().eval()
    assert str(fastnn.explain(model, (a, b))) == str(fastnn.explain(model, a, b))
    with pytest.raises(TypeError, match=r"explain: expected a torch\.nn\.Module, got a type"):
        fastnn.explain(nn.Linear)  # type: ignore[arg-type]
