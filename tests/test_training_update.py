"""fastnn.training_step of models that are no network: autograd's gradients, and the update by one operator."""

import copy
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_training_step import OPTIMIZERS, check_same, ordinary
from torch import Tensor, nn
from torch.testing import assert_close

import fastnn

module = import_module("fastnn.training_step")  # whose name is also its function


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parameters each update by an operator had."""
    made: list[int] = []
    update = module.update_in_one_call

    def count(binding: Any, gradients: Any) -> Any:
        kept = update(binding, gradients)
        made.append(len(gradients))
        return kept

    monkeypatch.setattr(module, "update_in_one_call", count)
    return made


class Sorts(nn.Module):
    """Its first `used` layers have gradients. Sorting is no layer of a network."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.used = 3

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[: self.used]:
            x = layer(x).sort(1)[0].tanh()
        return x


def _models(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    stock = Sorts().to(dtype)
    return stock, copy.deepcopy(stock), torch.randn(5, 6, dtype=dtype), torch.randn(5, 6, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str, dtype: torch.dtype, updates: list[int]) -> None:
    stock, mine, x, y = _models(dtype)
    theirs, ours = OPTIMIZERS[name](stock.parameters()), OPTIMIZERS[name](mine.parameters())
    step = fastnn.training_step(mine, F.mse_loss, ours, max_norm=0.3)
    assert "the update by an operator" in step.explain()
    close = {"rtol": 1e-7, "atol": 1e-9} if dtype is torch.float64 else {"rtol": 2e-3, "atol": 2e-4}
    for number in range(8):
        if number == 5:  # back and forth
            ordinary(mine, F.mse_loss, ours, x, y, 0.3)
            ordinary(stock, F.mse_loss, theirs, x, y, 0.3)
        inputs = x + 0.1 * number
        assert_close(step(inputs, y), ordinary(stock, F.mse_loss, theirs, inputs, y, 0.3), **close)
        assert all(p.grad is None for p in mine.parameters())
    check_same((mine, ours), (stock, theirs), **close)
    assert updates == [6] * 8


@pytest.mark.parametrize("name", ["adam", "momentum"])
def test_gradients_that_come_and_go(name: str, updates: list[int]) -> None:
    stock, mine, x, y = _models()
    theirs, ours = OPTIMIZERS[name](stock.parameters()), OPTIMIZERS[name](mine.parameters())
    step = fastnn.training_step(mine, F.mse_loss, ours)
    for used in (1, 1, 3, 3, 2, 3, 1, 1):
        stock.used = mine.used = used
        assert_close(step(x, y), ordinary(stock, F.mse_loss, theirs, x, y))
    check_same((mine, ours), (stock, theirs))
    assert updates == [2, 2, 6, 6, 4, 6, 2, 2]


def test_settings_and_parameters_that_change(updates: list[int]) -> None:
    stock, mine, x, y = _models()
    optimizers = [
        torch.optim.SGD([{"params": m.layers[0].parameters(), "lr": 0.2}, {"params": m.layers[1:].parameters()}], 0.1)
        for m in (stock, mine)
    ]
    theirs, ours = optimizers
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(one, 0.8) for one in optimizers]
    step = fastnn.training_step(mine, F.mse_loss, ours)
    for number in range(9):
        assert_close(step(x, y), ordinary(stock, F.mse_loss, theirs, x, y))
        for scheduler in schedulers:
            scheduler.step()
        for model, optimizer in ((stock, theirs), (mine, ours)):
            if number == 2:
                optimizer.param_groups[1]["momentum"] = 0.5
            elif number == 4:
                model.layers[1].weight.requires_grad_(False)
            elif number == 5:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            elif number == 6:
                model.layers[1].weight.requires_grad_()
    check_same((mine, ours), (stock, theirs))
    assert updates == [6, 6, 6, 6, 6, 5, 5, 6, 6]


@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_kept_gradients_and_those_of_batches_before(max_norm: float | None, updates: list[int]) -> None:
    stock, mine, x, y = _models()
    theirs, ours = OPTIMIZERS["adam"](stock.parameters()), OPTIMIZERS["adam"](mine.parameters())
    step = fastnn.training_step(mine, F.mse_loss, ours, max_norm=max_norm, keep_gradients=True)
    for _ in range(3):
        step.accumulate(x + 1, y)
        step(x, y)
        theirs.zero_grad()
        (F.mse_loss(stock(x + 1), y) + F.mse_loss(stock(x), y)).backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(stock.parameters(), max_norm)
        theirs.step()
        assert_close([p.grad for p in mine.parameters()], [p.grad for p in stock.parameters()])
    check_same((mine, ours), (stock, theirs))
    assert updates == [6] * 3


def test_micro_batches_of_a_network(updates: list[int]) -> None:
    """A step that finds gradients of other batches goes the ordinary way, up to the update."""
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    mine = copy.deepcopy(stock)
    theirs, ours = OPTIMIZERS["adam"](stock.parameters()), OPTIMIZERS["adam"](mine.parameters())
    step = fastnn.training_step(mine, F.mse_loss, ours)
    x, y = torch.randn(2, 7, 4, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    for number in range(6):
        theirs.zero_grad()
        if number % 2:
            step.accumulate(x[1], y)
            F.mse_loss(stock(x[1]), y).backward()
        step(x[0], y)
        F.mse_loss(stock(x[0]), y).backward()
        theirs.step()
    check_same((mine, ours), (stock, theirs))
    assert updates == [4] * 3


class _Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(9, 4, sparse=True), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.words(x).mean(1)).sort(1)[0]


def _hooked(optimizer: torch.optim.Optimizer) -> None:
    optimizer.register_step_post_hook(lambda own, args, kwargs: own.param_groups[0].update(lr=0.01))


def _channels_last(model: nn.Module) -> None:
    model.layers[0].weight.data = model.layers[0].weight.data.t().contiguous().t()  # type: ignore[union-attr, index]


CHANGES: dict[str, Callable[[nn.Module, torch.optim.Optimizer], Any]] = {
    "hooks": lambda model, optimizer: _hooked(optimizer),
    "strides": lambda model, optimizer: _channels_last(model),
    "half": lambda model, optimizer: model.layers[1].to(torch.float32),  # type: ignore[union-attr, index]
    "a tensor": lambda model, optimizer: optimizer.param_groups[0].update(lr=torch.tensor(0.2)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_optimizer_does_itself(name: str, updates: list[int]) -> None:
    class Casts(Sorts):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x.to(layer.weight.dtype)).sort(1)[0].tanh()  # type: ignore[union-attr, operator]
            return x.double()

    torch.manual_seed(0)
    stock = Casts().double()
    mine, x, y = copy.deepcopy(stock), torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    theirs, ours = (torch.optim.SGD(model.parameters(), 0.1) for model in (stock, mine))
    step = fastnn.training_step(mine, F.mse_loss, ours)
    for number in range(5):
        assert_close(step(x, y), ordinary(stock, F.mse_loss, theirs, x, y))
        if number == 1:
            CHANGES[name](stock, theirs)
            CHANGES[name](mine, ours)
    check_same((mine, ours), (stock, theirs), 1e-6, 1e-7)
    assert updates == [6] * 2


def test_sparse_gradients(updates: list[int]) -> None:
    torch.manual_seed(0)
    stock = _Words().double()
    mine, x, y = copy.deepcopy(stock), torch.randint(9, (5, 3)), torch.randn(5, 6, dtype=torch.float64)
    theirs, ours = (torch.optim.SGD(model.parameters(), 0.1) for model in (stock, mine))
    step = fastnn.training_step(mine, F.mse_loss, ours)
    for _ in range(3):
        assert_close(step(x, y), ordinary(stock, F.mse_loss, theirs, x, y))
    check_same((mine, ours), (stock, theirs))
    assert not updates


def test_an_error_leaves_optimizer_and_model_alone() -> None:
    _, mine, x, y = _models()
    optimizer = torch.optim.Adam(mine.parameters())
    step = fastnn.training_step(mine, F.mse_loss, optimizer)
    before = copy.deepcopy(mine.state_dict())
    with pytest.raises(RuntimeError):
        step(x[:, :5], y)
    assert not optimizer.state
    assert_close(mine.state_dict(), before, rtol=0, atol=0)
    step(x, y)
    assert len(optimizer.state) == 6
