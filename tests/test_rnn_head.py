"""The recurrent model's training step, which one function records, against the two functions that it stands for."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastnn
from fastnn import models
from fastnn.testing import assert_close_to_reference

CELLS = ("RNN", "GRU", "LSTM")


def gradients(model: nn.Module, x: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    output = model(x)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return [output, *torch.autograd.grad((output * weight).sum(), wanted)]


class Apart(nn.Module):
    """The model's layers, each recorded by a function of its own."""

    def __init__(self, model: models.RNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.model.rnn(x)
        h = state[0] if isinstance(state, tuple) else state
        return fastnn.functional.mlp(h[-1], (self.model.fc.weight,), (self.model.fc.bias,))


def is_one_function(output: Tensor) -> bool:
    return output.grad_fn is not None and output.grad_fn.name() == "RnnWithHeadBackward"


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("layers", "hidden", "batch"), [(1, 17, 1), (2, 32, 8), (3, 15, 9)])
def test_bits_of_the_two_functions(cell: str, layers: int, hidden: int, batch: int, dtype: torch.dtype) -> None:
    model = models.RNN(7, hidden, layers, 33, cell).to(dtype)  # a head not so small that it is left to stock
    x = torch.randn(batch, 6, 7, dtype=dtype, requires_grad=True)
    assert is_one_function(model(x))
    wanted = [x, *model.parameters()]
    for ours, theirs in zip(gradients(model, x, wanted), gradients(Apart(model), x, wanted), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("cell", CELLS)
def test_stock_layers_in_their_place(cell: str) -> None:
    model = models.RNN(5, 16, 2, 33, cell)
    replaced = copy.deepcopy(model)
    replaced.rnn = getattr(nn, cell)(5, 16, 2, batch_first=True)
    replaced.load_state_dict(model.state_dict())
    x = torch.randn(4, 9, 5)
    exact = copy.deepcopy(replaced).double()
    results = [gradients(m, x.to(next(m.parameters()).dtype), list(m.parameters())) for m in (model, replaced, exact)]
    assert_close_to_reference(*results)


@pytest.mark.parametrize("cell", CELLS)
def test_as_stock(cell: str) -> None:
    model = models.RNN(5, 16, 2, 3, cell)
    stock = fastnn.reference.models.RNN(5, 16, 2, 3, cell)
    stock.load_state_dict(model.state_dict())
    exact = copy.deepcopy(stock).double()
    x = torch.randn(4, 9, 5)
    results = [gradients(m, x.to(next(m.parameters()).dtype), list(m.parameters())) for m in (model, stock, exact)]
    assert_close_to_reference(*results)


@pytest.mark.parametrize("frozen", ["rnn", "fc", "fc.weight", "rnn.weight_ih_l0", "all"])
def test_frozen_parameters(frozen: str) -> None:
    model = models.RNN(4, 8, 2, 33, "GRU")
    x = torch.randn(2, 5, 4, requires_grad=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen == "all" or name.startswith(frozen)))
    wanted = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    assert is_one_function(model(x))
    for ours, theirs in zip(gradients(model, x, wanted), gradients(Apart(model), x, wanted), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("cell", CELLS)
def test_gradgradcheck(cell: str) -> None:
    model = models.RNN(3, 4, 2, 2, cell).double()
    names, parameters = zip(*model.named_parameters(), strict=True)
    x = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        for name, parameter in zip(names, parameters, strict=True):
            layer, _, own = name.partition(".")
            getattr(model, layer)._parameters[own] = parameter
        return model(x)

    leaves = (x, *(parameter.detach().clone().requires_grad_() for parameter in parameters))
    model.rnn._flat_weights = list(leaves[1:-2])
    assert is_one_function(call(*leaves))
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def no_bias(model: Any) -> None:
    model.fc.bias = None


def test_without_bias() -> None:
    model = models.RNN(4, 8, 2, 3)
    no_bias(model)
    x = torch.randn(2, 5, 4)
    wanted = list(model.parameters())
    output = model(x)
    assert is_one_function(output)
    h = model.rnn(x)[1][-1]
    expected = torch.autograd.grad(nn.functional.linear(h, model.fc.weight).sum(), wanted)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), wanted), expected)


@pytest.mark.parametrize("what", ["hook", "dropout", "parametrization", "float16", "autocast", "no gradient"])
def test_what_is_left_to_the_layers(what: str) -> None:
    model = models.RNN(4, 8, 2, 3)
    x = torch.randn(2, 5, 4)
    seen = []
    if what == "hook":
        model.rnn.register_forward_hook(lambda *_: seen.append(1))
    elif what == "dropout":
        model.rnn.dropout = 0.5
    elif what == "parametrization":
        nn.utils.parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    elif what == "float16":
        model, x = model.half(), x.half()
    elif what == "no gradient":
        model.requires_grad_(False)
    with torch.autocast("cpu", enabled=what == "autocast"):
        output = model(x)
    assert not is_one_function(output)
    assert output.requires_grad == (what != "no gradient")
    assert len(seen) == (what == "hook")


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 0, 4), (4,)])
def test_arguments_that_do_not_fit(shape: tuple[int, ...]) -> None:
    model, stock = models.RNN(4, 8, 2, 3), fastnn.reference.models.RNN(4, 8, 2, 3)
    outcomes = []
    for m in (model, stock):
        try:
            outcomes.append(m(torch.randn(shape)).shape)
        except Exception as error:
            outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1]


def test_weights_changed_before_backward() -> None:
    model = models.RNN(4, 8, 2, 3)
    output = model(torch.randn(2, 5, 4))
    with torch.no_grad():
        model.rnn.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
