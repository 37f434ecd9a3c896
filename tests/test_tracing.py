"""torch.jit: what is traced or scripted holds stock's operators: it can be trained, saved, and loaded anywhere."""

import copy
import io

import pytest
import torch

import fastnn
from fastnn import nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # stock's checks of sizes
]

MODULES = {
    "RNN": (lambda: nn.RNN(3, 4, 2, dropout=0.5), (5, 2, 3)),
    "GRU": (lambda: nn.GRU(3, 4, batch_first=True), (5, 2, 3)),
    "LSTM": (lambda: nn.LSTM(3, 4, bidirectional=True), (5, 2, 3)),
    "RNNCell": (lambda: nn.RNNCell(3, 4), (2, 3)),
    "GRUCell": (lambda: nn.GRUCell(3, 4), (2, 3)),
    "LSTMCell": (lambda: nn.LSTMCell(3, 4), (2, 3)),
    "MLP": (lambda: nn.MLP([3, 5, 4]), (2, 3)),
    "LinearReLU": (lambda: nn.LinearReLU(3, 5), (2, 3)),
    "ConvReLUMaxPool2d": (lambda: nn.ConvReLUMaxPool2d(2, 3, 3, padding=1), (2, 2, 8, 8)),
    "Conv2DNet": (lambda: fastnn.models.Conv2DNet(4), (2, 3, 20, 20)),
    "RNN model": (lambda: fastnn.models.RNN(3, 4, 2, 5), (2, 6, 3)),
    "Autoencoder": (lambda: fastnn.models.Autoencoder(10, 8, 5), (2, 10)),
}
RECURRENT = [name for name in MODULES if name.partition("Cell")[0] in ("RNN", "GRU", "LSTM")]


def first(result):
    return result if isinstance(result, torch.Tensor) else first(result[0])


def check_stands_for(module, graph_module, input):
    if hasattr(graph_module, "inlined_graph"):
        kinds = {node.kind() for node in graph_module.inlined_graph.nodes()}
        assert not any("fastnn" in kind or "Python" in kind for kind in kinds)
    saved = io.BytesIO()
    torch.jit.save(graph_module, saved)
    saved.seek(0)
    loaded = torch.jit.load(saved)
    larger = torch.cat([input, input])  # of another batch, or another length
    expected = first(module(larger))
    for twin in (graph_module, loaded):
        actual = first(twin(larger))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        gradients = torch.autograd.grad(actual.sum(), list(twin.parameters()))
        wanted = torch.autograd.grad(first(module(larger)).sum(), list(module.parameters()))
        torch.testing.assert_close(gradients, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_trace(name):
    make, sizes = MODULES[name]
    module, input = make().eval(), torch.randn(sizes)
    check_stands_for(module, torch.jit.trace(module, input), input)
    with torch.no_grad():
        traced = torch.jit.trace(module, input)
    check_stands_for(module, traced, input)


@pytest.mark.parametrize("name", RECURRENT)
def test_script(name):
    make, sizes = MODULES[name]
    input = torch.randn(sizes)
    if "Cell" in name:  # scripted alone, stock's networks too cannot be called
        cell = make()
        check_stands_for(cell, torch.jit.script(cell), input)

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = make()

        def forward(self, x: torch.Tensor):
            return self.layer(x)

    model = Classifier().eval()
    check_stands_for(copy.deepcopy(model), torch.jit.script(model), input)
