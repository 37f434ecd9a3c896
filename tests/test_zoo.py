"""fuse, explain and freeze on real models (tests/zoo): the same numbers, state dicts, optimizers; every layer accounted
for."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusing import fused_copy
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree
from zoo import ZOO, Entry

import fastnn
from fastnn.graph.matcher import RECURRENT, kind_of
from fastnn.nn._hooks import forward_of
from fastnn.testing import assert_close_to_reference

each_model = pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO.keys())


def build(entry: Entry) -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(1)
    model, inputs = entry.small(), entry.small_inputs()
    for module in model.modules():  # statistics as after some training, gamma of both signs
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, -1, 1)
            nn.init.normal_(module.bias)
    return model, inputs


def tensors_of(output: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]


def step(model: nn.Module, inputs: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs, and gradients of a weighted sum of them."""
    torch.manual_seed(2)
    outputs = tensors_of(model(*inputs))
    generator = torch.Generator().manual_seed(3)
    loss = sum((o * torch.randn(o.shape, generator=generator).to(o.dtype)).sum() for o in outputs)
    return outputs, list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


def doubled(inputs: Any) -> Any:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


@each_model
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_outputs_gradients_and_state(entry: Entry, training: bool) -> None:
    model, inputs = build(entry)
    model.double().train(training)
    fused = fused_copy(model)
    for _ in range(2):
        theirs, ours = step(model, doubled(inputs)), step(fused, doubled(inputs))
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-8, atol=1e-9)
        for mine, their in zip(ours[1], theirs[1], strict=True):
            if their is None:
                assert mine is None
                continue
            torch.testing.assert_close(mine, their, rtol=1e-6, atol=1e-8 * max(1.0, float(their.abs().max())))
    assert list(fused.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(fused.state_dict(), model.state_dict(), rtol=1e-9, atol=1e-10)


@each_model
def test_float32_inference(entry: Entry) -> None:
    model, inputs = build(entry)
    model.eval()
    fused = fused_copy(model)
    with torch.no_grad():
        exact = tensors_of(copy.deepcopy(model).double()(*doubled(inputs)))
        assert_close_to_reference(tensors_of(fused(*inputs)), tensors_of(model(*inputs)), exact)


@each_model
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_ten_steps_follow_stock(entry: Entry, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    model, inputs = build(entry)
    model.double()
    fused = copy.deepcopy(model)
    made_before = optimizer(fused.parameters(), lr=1e-3)
    assert fastnn.fuse(fused) is fused
    theirs = optimizer(model.parameters(), lr=1e-3)
    for number in range(10):
        for network, steps in ((model, theirs), (fused, made_before)):
            torch.manual_seed(number)
            steps.zero_grad()
            sum(o.square().mean() for o in tensors_of(network(*doubled(inputs)))).backward()
            steps.step()
    # Adam divides by gradients, among them those that are zero but for rounding: of a bias before batch norm.
    atol = 1e-7 if optimizer is torch.optim.SGD else 2e-2
    torch.testing.assert_close(dict(fused.named_parameters()), dict(model.named_parameters()), rtol=1e-5, atol=atol)
    state = made_before.state_dict()["state"]
    assert state.keys() == theirs.state_dict()["state"].keys()


@each_model
def test_unfuse_copies_and_checkpoints(entry: Entry) -> None:
    model, inputs = build(entry)
    model.eval()
    fused = fastnn.fuse(fused_copy(model))
    assert type(fused) is type(model)
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in model.named_modules()]
    with torch.no_grad():
        expected = tensors_of(fused(*inputs))
        copies = [copy.deepcopy(fused)]
        if not any(map(is_parametrized, model.modules())):  # which torch does not save whole
            saved = io.BytesIO()
            torch.save(fused, saved)
            saved.seek(0)
            copies += [pickle.loads(pickle.dumps(fused)), torch.load(saved, weights_only=False)]
        for other in copies:
            torch.testing.assert_close(tensors_of(other(*inputs)), expected, rtol=0, atol=0)
        other = entry.small().eval()
        other.load_state_dict(fused.state_dict())
        torch.testing.assert_close(tensors_of(other(*inputs)), tensors_of(model(*inputs)), rtol=0, atol=0)
        stock = fastnn.unfuse(fused)
        assert stock is fused
        assert not any("forward" in module.__dict__ for module in stock.modules())
        torch.testing.assert_close(tensors_of(stock(*inputs)), tensors_of(model(*inputs)), rtol=0, atol=0)


@each_model
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_every_layer_is_accounted_for(entry: Entry, training: bool) -> None:
    model, inputs = build(entry)
    fused = fused_copy(model.train(training))
    before = copy.deepcopy(fused.state_dict())
    report = fastnn.explain(fused, *inputs)
    torch.testing.assert_close(fused.state_dict(), before, rtol=0, atol=0)
    named = {name for row in report.rows for name in row.layer.split(", ")}
    for name, module in model.named_modules():
        if kind_of(module) is not None or forward_of(type(module)) in RECURRENT:
            assert name in named, f"{name} ({type(module).__name__}) is missing in\n{report}"
    assert all(row.why for row in report.rows)
    assert report.calls or training
    assert report.to_dict()["rows"][0]["layer"] == report.rows[0].layer
    assert str(report).count("\n") >= len(report.rows)


@each_model
def test_with_example_inputs(entry: Entry) -> None:
    """The trial changes neither numbers nor statistics, and says of what it leaves how fast it was."""
    model, inputs = build(entry)
    model.train()
    before = copy.deepcopy(model.state_dict())
    fused = fused_copy(model, inputs)
    torch.testing.assert_close(fused.state_dict(), before, rtol=0, atol=0)
    fused.eval()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(tensors_of(fused(*inputs)), tensors_of(model(*inputs)), rtol=1e-3, atol=1e-4)
    for row in fastnn.explain(fused, *inputs).left:
        assert "results are not stock's" not in row.why
