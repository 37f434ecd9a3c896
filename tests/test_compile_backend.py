"""torch.compile(model, backend="fastnn"): the same numbers, fastnn's operators in the graph, nobody else touched."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusing import fused_copy
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils import _pytree as pytree
from zoo import ZOO

from fastnn import compile_backend

# From torch 2.15 on, dynamo itself reads the .grad of a value when a function goes on behind a graph break.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

MODELS = ("CIFAR tutorial", "M5", "Char-CNN", "VAE", "CRNN")


def without_chance(model: nn.Module) -> nn.Module:
    """Inductor draws other random numbers than eager PyTorch."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def tensors_of(output: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_computes_what_the_model_does(name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = without_chance(ZOO[name].small()).train(training)
    if name == "VAE":
        model.reparameterize = lambda mean, log_variance: mean  # type: ignore[assignment]
    stock, inputs = copy.deepcopy(model), ZOO[name].small_inputs()
    found: list[str] = []
    match = compile_backend.match

    def watched(graph: Any, modules: Any) -> Any:
        result = match(graph, modules)
        found.extend(one.operator for one in result.found)
        return result

    monkeypatch.setattr(compile_backend, "match", watched)
    # (Dynamo leaves recurrent layers of torch.nn out of its graphs.)
    compiled = torch.compile(model, backend="fastnn", fullgraph=name != "CRNN")
    for _ in range(2):
        ours, theirs = tensors_of(compiled(*inputs)), tensors_of(stock(*inputs))
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        for one, outputs in ((model, ours), (stock, theirs)):
            one.zero_grad()
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        for mine, their in zip(model.parameters(), stock.parameters(), strict=True):
            assert_close(mine.grad, their.grad, rtol=1e-3, atol=1e-3 * float(their.grad.abs().max() + 1))
    assert_close(model.state_dict(), stock.state_dict(), rtol=1e-4, atol=1e-4)
    assert found


def test_any_batch() -> None:
    torch.compiler.reset()
    model = ZOO["CIFAR tutorial"].small()
    compiled = torch.compile(model, backend="fastnn", fullgraph=True, dynamic=True)
    for batch in (2, 3, 7):
        x = torch.randn(batch, 3, 32, 32)
        assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_any_batch_of_a_batch_norm_that_trains() -> None:
    torch.compiler.reset()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    stock = copy.deepcopy(model)
    compiled = torch.compile(model, backend="fastnn", fullgraph=True, dynamic=True)
    for batch in (2, 3, 7):
        x = torch.randn(batch, 3, 12, 12)
        assert_close(compiled(x), stock(x), rtol=1e-4, atol=1e-5)
    assert_close(model.state_dict(), stock.state_dict(), rtol=1e-4, atol=1e-5)


def test_a_plain_compile_afterwards_is_unaffected() -> None:
    torch.compiler.reset()
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4)
    torch.compile(model, backend="fastnn")(x)
    torch.compiler.reset()
    graphs: list[Any] = []

    def look(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.compile(model, backend=look)(x)
    assert "fastnn" not in graphs[0].code


def test_found_without_an_import() -> None:
    code = (
        "import sys, torch; assert 'fastnn' not in sys.modules\n"
        "assert 'fastnn' in torch.compiler.list_backends()\n"
        "x = torch.randn(2, 4); model = torch.nn.Linear(4, 3)\n"
        "y = torch.compile(model, backend='fastnn', fullgraph=True)(x)\n"
        "assert 'fastnn' in sys.modules; torch.testing.assert_close(y, model(x))"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=300)


def test_a_fused_model_compiled() -> None:
    torch.compiler.reset()
    model = without_chance(ZOO["VGG-11 bn"].small()).eval()
    fused, (x,) = fused_copy(model), ZOO["VGG-11 bn"].small_inputs()
    compiled = torch.compile(fused, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


class Frozen(nn.Module):
    """A backbone without gradients, or under another autocast."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.back, self.head, self.norm, self.last = (
            nn.Linear(8, 16),
            nn.Linear(16, 16),
            nn.LayerNorm(16),
            nn.Linear(16, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        context = torch.no_grad() if self.how == "no_grad" else torch.autocast("cpu", torch.bfloat16, enabled=False)
        with context:
            h = self.back(x)
        return self.last(self.norm(self.head(torch.relu(h))))


class Changes(nn.Module):
    """Changes what a layer of a match reads, between that match's layers."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "buffer":
            y = self.conv(x)
            self.mean.add_(1)
            return torch.relu(nn.functional.batch_norm(y, self.mean, self.var))
        h = torch.relu(self.a(x))
        with torch.no_grad():
            self.b.weight.clamp_(min=0)
        return self.b(h)


@pytest.mark.parametrize("how", ["no_grad", "autocast"])
def test_nothing_moves_across_a_mode(how: str) -> None:
    x, found = torch.ones(3, 8), []
    for backend in ("eager", "fastnn"):
        torch.manual_seed(0)
        torch.compiler.reset()
        model = Frozen(how)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            output = torch.compile(model, backend=backend)(x)
        output.float().sum().backward()
        found.append((output, {name: p.grad for name, p in model.named_parameters()}))
    assert found[0][0].dtype == found[1][0].dtype
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        assert (gradient is None) == (found[1][1][name] is None), name


@pytest.mark.parametrize("how", ["buffer", "weight"])
@pytest.mark.parametrize("grad", [False, True])
def test_nothing_moves_across_a_write(how: str, grad: bool) -> None:
    torch.compiler.reset()
    model = Changes(how)
    compiled = torch.compile(copy.deepcopy(model), backend="fastnn")
    x = torch.randn(2, 3, 8, 8) if how == "buffer" else torch.randn(5, 8)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("backend", ["fastnn", "aot_eager"])
def test_a_fused_recurrent_layer_with_a_head(kind: str, backend: str) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.fc = getattr(nn, kind)(8, 32, batch_first=True), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.rnn(x)[0][:, -1])

    torch.compiler.reset()
    model, x = Network(), torch.randn(4, 5, 8)
    fused = fused_copy(model)
    fused(x)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(torch.compile(fused, backend=backend)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "given", [{"options": {"max_autotune": False}}, {"mode": "reduce-overhead"}, {"mode": "default"}, {"options": {}}]
)
def test_what_torch_compile_is_given(given: dict[str, Any]) -> None:
    torch.compiler.reset()
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    assert_close(torch.compile(model, backend="fastnn", **given)(x), model(x))
    torch.compiler.reset()


def test_options_reach_inductor() -> None:
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="Unexpected optimization option no_option"):
        torch.compile(nn.Linear(4, 8), backend="fastnn", options={"no_option": 1})(torch.randn(3, 4))


def test_a_function_without_inputs() -> None:
    torch.compiler.reset()

    def pooled() -> Tensor:
        return F.max_pool2d(F.relu(torch.arange(64.0).reshape(1, 1, 8, 8) - 30), 2)

    assert_close(torch.compile(pooled, backend="fastnn")(), pooled())


@pytest.mark.parametrize("sizes", [((8,), None), ((4, 8), (1, 4)), ((4, 8), (5, 4)), ((4, 8), ())])
def test_linear_layers_that_torch_broadcasts(sizes: tuple[Any, Any]) -> None:
    torch.compiler.reset()
    weight, bias = (None if one is None else torch.randn(one) for one in sizes)
    first, x = torch.randn(8, 6), torch.randn(5, 6)

    def chain(x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, first)), weight, bias)

    assert_close(torch.compile(chain, backend="fastnn")(x), chain(x))
