"""torch.compile(model, backend="fastnn"): the same numbers, fastnn's operators in the graph, nobody else touched."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from fusing import fused_copy
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils import _pytree as pytree
from zoo import ZOO

from fastnn import compile_backend

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
