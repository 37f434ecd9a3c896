"""The table of activations: what Python adds to the extension's, and every activation everywhere that takes one."""

import copy
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import fastnn
from fastnn.activations import (
    KINDS,
    NAMES,
    OPERATORS,
    TORCH_NAMES,
    Cos,
    Exp,
    Sin,
    from_operator,
    functions,
    join,
    parse,
    parse_one,
)
from fastnn.functional import mlp
from fastnn.reference import mlp as reference
from fastnn.testing import compare_with_stock

# Texts of every activation, with torch's defaults and with other parameters, and torch's module of each.
MODULES: dict[str, nn.Module] = {
    "relu": nn.ReLU(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "leaky_relu": nn.LeakyReLU(),
    "leaky_relu(0.2)": nn.LeakyReLU(0.2),
    "leaky_relu(0.0)": nn.LeakyReLU(0.0),
    "leaky_relu(-1.5)": nn.LeakyReLU(-1.5),
    "elu": nn.ELU(),
    "elu(0.3)": nn.ELU(0.3),
    "elu(-2.0)": nn.ELU(-2.0),
    "hardswish": nn.Hardswish(),
    "softplus": nn.Softplus(),
    "softplus(0.5,3.0)": nn.Softplus(0.5, 3.0),
    "softplus(-3.0,20.0)": nn.Softplus(-3.0),
    "hardtanh": nn.Hardtanh(),
    "hardtanh(-2.0,0.5)": nn.Hardtanh(-2.0, 0.5),
    "hardtanh(0.0,6.0)": nn.ReLU6(),
    "selu": nn.SELU(),
    "mish": nn.Mish(),
    "exp": Exp(),
    "sin": Sin(),
    "cos": Cos(),
}


def chain(activation: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    parts = (nn.Linear(9, 17), activation, nn.Linear(17, 5), copy.deepcopy(activation))
    return nn.Sequential(*parts).to(dtype)


def test_each_name_has_a_module_here() -> None:
    assert {text.partition("(")[0] for text in MODULES} == set(NAMES) - {"identity", "relu6"}


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.parameters])
def test_defaults_are_torchs(name: str) -> None:
    defaults = {one.name: one.default for one in inspect.signature(type(parse_one(name).module())).parameters.values()}
    assert {parameter: defaults[parameter] for parameter in KINDS[name].parameters} == KINDS[name].parameters


@pytest.mark.parametrize("text", MODULES)
def test_text_and_module_are_the_same(text: str) -> None:
    activation, module, x = parse_one(text), MODULES[text], torch.linspace(-5, 5, 41)
    assert str(activation) == text
    assert type(activation.module()) is type(module)
    assert activation.module().state_dict() == {}
    assert_close(activation(x), module(x), rtol=0, atol=0)
    assert_close(activation.module()(x), module(x), rtol=0, atol=0)


def test_text_of_several_layers() -> None:
    text = "relu|leaky_relu(0.2)|identity"
    assert join(parse(text)) == text
    assert join(parse("leaky_relu(negative_slope=0.01)|leaky_relu( 2 )")) == "leaky_relu|leaky_relu(2.0)"
    for bad in (
        "",
        "relu|",
        "relu()",
        "relu(1)",
        "leaky_relu(1,2)",
        "leaky_relu(x)",
        "leaky_relu(inf)",
        "ReLU",
        "relu6(1)",
    ):
        with pytest.raises(ValueError, match="activation"):
            parse(bad)


@pytest.mark.parametrize("text", MODULES)
def test_mlp_of_any_parameters(instruction_set: str, dtype: torch.dtype, text: str) -> None:
    model = chain(MODULES[text], dtype)
    x = torch.randn(23, 9, dtype=dtype) * 3
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    tensors = [x, *(one.detach() for one in (*weights, *biases))]
    activations = [text, text]
    compare_with_stock(
        lambda x, *p: mlp(x, p[:2], p[2:], activations),
        lambda x, *p: reference.mlp(x, p[:2], p[2:], activations),
        tensors,
    )


@pytest.mark.parametrize("text", MODULES)
def test_fuse_takes_it(text: str) -> None:
    model = chain(MODULES[text], torch.float64)
    fused = fastnn.fuse(copy.deepcopy(model), strict=True)
    x = torch.randn(6, 9, dtype=torch.float64)
    assert str(fastnn.explain(fused, x)).count("mlp")
    for one in (x, x * 10):
        ours, theirs = fused(one), model(one)
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for mine, other in zip(fused.parameters(), model.parameters(), strict=True):
        assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-10, equal_nan=True)  # exp of exp overflows


@pytest.mark.parametrize("text", MODULES)
def test_freeze_takes_it(text: str) -> None:
    model = chain(MODULES[text]).eval()
    frozen = fastnn.freeze(model, torch.randn(6, 9))
    assert isinstance(frozen, fastnn.FrozenModel)
    x = torch.randn(4, 9) * 3
    assert_close(frozen(x), model(x))
    assert text in repr(frozen)


@pytest.mark.parametrize("text", MODULES)
def test_training_step_takes_it(text: str) -> None:
    model = chain(MODULES[text], torch.float64)
    alone = nn.Sequential(
        nn.BatchNorm1d(9), MODULES[text], *model
    ).double()  # first an activation without a linear layer
    for stock in (model, alone):
        ours = copy.deepcopy(stock)
        step = fastnn.training_step(ours, nn.MSELoss(), torch.optim.SGD(ours.parameters(), 0.1), strict=True)
        optimizer = torch.optim.SGD(stock.parameters(), 0.1)
        for _ in range(5):
            x, y = torch.randn(7, 9, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
            optimizer.zero_grad()
            loss = F.mse_loss(stock(x), y)
            loss.backward()
            optimizer.step()
            assert_close(step(x, y), loss.detach(), rtol=1e-10, atol=1e-10)
        for mine, other in zip(ours.parameters(), stock.parameters(), strict=True):
            assert_close(mine, other, rtol=1e-9, atol=1e-9)


class Calls(nn.Module):
    """A linear layer, then a function or a method."""

    def __init__(self, called: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.called = called

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        called = self.called
        return getattr(h, called)() if isinstance(called, str) else called(h)


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_functions_and_methods(name: str) -> None:
    for called, kind, _ in functions():
        if kind == name:
            model, x = Calls(called).eval(), torch.randn(5, 4)
            fused = fastnn.fuse(copy.deepcopy(model))
            assert_close(fused(x), model(x))
            if not getattr(called, "__name__", called).endswith("_"):  # of those some are calls that a trace refuses
                assert "mlp" in str(fastnn.explain(fused, x)), called


def test_parameters_that_torch_refuses() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Hardtanh(-1, 1))
    model[1].max_val = -2.0
    fused, x = fastnn.fuse(copy.deepcopy(model)), torch.randn(2, 3)
    for one in (model, fused):
        with pytest.raises(ValueError, match="min_val cannot be greater"):
            one(x)
    with pytest.raises(ValueError, match="torch refuses these parameters"):
        mlp(x, [torch.ones(4, 3)], [None], ["hardtanh(1,-1)"])


def test_operators_with_other_parameters() -> None:
    leaky = torch.ops.aten.leaky_relu.default
    assert str(from_operator(leaky, (0.3,), {})) == "leaky_relu(0.3)"
    assert str(from_operator(leaky, (), {"negative_slope": 0.01})) == "leaky_relu"
    assert from_operator(leaky, (float("nan"),), {}) is None
    assert str(from_operator(torch.ops.aten.gelu.default, (), {"approximate": "tanh"})) == "gelu_tanh"
    assert set(OPERATORS.values()) == {kind for _, kind, _ in functions()}
