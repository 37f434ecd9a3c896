"""torch.onnx.export of every layer gives the operators that the stock layer gives: no runtime knows of fastnn."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastnn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporters', of their own code

# Each of our layers, stock's, and the sizes of an input.
LAYERS: list[tuple[nn.Module, nn.Module, tuple[int, ...]]] = [
    *((getattr(fastnn.nn, name)(3, 4), getattr(nn, name)(3, 4), (2, 1, 3)) for name in ("RNN", "GRU")),
    (fastnn.nn.LSTM(3, 4, bidirectional=True), nn.LSTM(3, 4, bidirectional=True), (2, 1, 3)),
    *((getattr(fastnn.nn, name)(3, 4), getattr(nn, name)(3, 4), (2, 3)) for name in ("RNNCell", "GRUCell", "LSTMCell")),
    (fastnn.nn.MLP([3, 5, 4]), nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)), (2, 3)),
    (fastnn.nn.LinearReLU(3, 5), nn.Sequential(nn.Linear(3, 5), nn.ReLU()), (2, 3)),
    *(
        (
            getattr(fastnn.nn, f"ConvReLUMaxPool{dims}d")(2, 3, 3),
            nn.Sequential(getattr(nn, f"Conv{dims}d")(2, 3, 3), nn.ReLU(), getattr(nn, f"MaxPool{dims}d")(2)),
            (2, 2, *[6] * dims),
        )
        for dims in (1, 2, 3)
    ),
    (fastnn.models.Conv2DNet(4), fastnn.reference.models.Conv2DNet(4), (2, 3, 20, 20)),
    (fastnn.models.Autoencoder(6, 5, 4), fastnn.reference.models.Autoencoder(6, 5, 4), (2, 6)),
]


class SideBySide(nn.Module):
    """All layers in one model, since an export takes seconds."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: Tensor) -> list[Any]:
        return [layer(input) for layer, input in zip(self.layers, inputs, strict=True)]


def operators(model: nn.Module, inputs: tuple[Tensor, ...], dynamo: bool) -> list[tuple[str, str]]:
    if dynamo:
        program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
        assert program is not None
        graph = program.model_proto.graph
    else:
        file = io.BytesIO()
        torch.onnx.export(model, inputs, file, dynamo=False)
        graph = onnx.load_from_string(file.getvalue()).graph
    return [(node.domain, node.op_type) for node in graph.node]


@pytest.mark.parametrize("dynamo", [True, False])
def test_every_layer(dynamo: bool) -> None:
    inputs = tuple(torch.randn(sizes) for *_, sizes in LAYERS)
    ours, stock = (SideBySide(list(layers)).eval() for layers in list(zip(*LAYERS, strict=True))[:2])
    exported = operators(ours, inputs, dynamo)
    assert exported == operators(stock, inputs, dynamo)
    assert {domain for domain, _ in exported} == {""}
