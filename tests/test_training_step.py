"""fastnn.training_step: the same parameters, losses and optimizer state as the ordinary loop, and what is no one
call."""

import copy
import dataclasses
import functools
import gc
import threading
import types
import weakref
from collections.abc import Callable, Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from fusing import Calls
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import ZOO

import fastnn
from fastnn import _C
from fastnn.reference import models as stock_models
from fastnn.testing import using_threads


class Steps(nn.Module):
    """A linear layer on each step of a recurrent one."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.LSTM(4, 6, 2, bidirectional=True, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0])


class LastState(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn, self.fc = getattr(nn, kind)(4, 6, 2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.rnn(x)
        return self.fc((state[0] if isinstance(self.rnn, nn.LSTM) else state)[-1])


class BothDirections(nn.Module):
    """The last step of both, with elements dropped between the layers and behind them."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 5, 3, batch_first=batch_first, bidirectional=True, dropout=0.3)
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.rnn(x)
        return self.fc(self.drop(output)[:, -1, :] if self.rnn.batch_first else output[-1])


class Views(nn.Module):
    """Flattened as tutorials do it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.fc, self.how = nn.Conv2d(3, 4, 3, padding="same"), nn.Linear(4 * 5 * 4, 3), how

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        if self.how == "size":
            x = x.view(x.size(0), -1)
        elif self.how == "shape":
            x = x.reshape((x.shape[0], -1))
        elif self.how == "sizes":
            x = torch.reshape(x, (x.size()[0], -1))
        else:
            x = x.view(-1, 80)
        return self.fc(x)


# name: the model, and its input's sizes
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "autoencoder": (lambda: stock_models.Autoencoder(10, 8, 5), (32, 10)),
    "cnn": (lambda: stock_models.Conv2DNet(4), (6, 3, 20, 20)),
    "rnn": (lambda: stock_models.RNN(4, 6, 2, 3), (5, 7, 4)),
    "gru": (lambda: LastState("GRU"), (7, 5, 4)),
    "lstm": (lambda: LastState("LSTM"), (7, 5, 4)),
    "all steps": (Steps, (5, 7, 4)),
    "chain": (
        lambda: nn.Sequential(nn.Linear(7, 9, bias=False), nn.Tanh(), nn.Linear(9, 5, bias=False), nn.GELU()),
        (11, 7),
    ),
    "some biases": (
        lambda: nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 6, bias=False), nn.Tanh(), nn.Linear(6, 5)),
        (11, 7),
    ),
    "chain over steps": (lambda: nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 2)), (3, 5, 4)),
    "1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 5, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(35, 3)),
        (4, 2, 16),
    ),
    "lenet": (ZOO["LeNet-5"].small, (3, 1, 28, 28)),
    "batch norm": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5, momentum=0.3, eps=1e-3), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Flatten(), nn.Linear(20, 3)),
        ),
        (5, 3, 14, 14),
    ),
    "batch norm, 1d, bare": (
        lambda: nn.Sequential(
            *(nn.Conv1d(2, 4, 5, 2, 1, groups=2), nn.BatchNorm1d(4, affine=False), nn.ReLU(), nn.MaxPool1d(2)),
            *(nn.Flatten(), nn.Linear(28, 3)),
        ),
        (4, 2, 31),
    ),
    "batch norm of rows": (
        lambda: nn.Sequential(
            *(nn.BatchNorm1d(7, affine=False), nn.Linear(7, 9), nn.BatchNorm1d(9), nn.ReLU()),
            *(nn.Linear(9, 8, bias=False), nn.BatchNorm1d(8, track_running_stats=False), nn.LeakyReLU()),
            nn.Linear(8, 3),
        ),
        (11, 7),
    ),
    "batch norm, not pooled": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
            *(nn.Conv2d(6, 5, 3, 2), nn.BatchNorm2d(5), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(5, 3),
        ),
        (5, 3, 13, 10),
    ),
    "averages": (
        lambda: nn.Sequential(nn.Conv1d(2, 5, 3), nn.Tanh(), nn.AdaptiveAvgPool1d(3), nn.Flatten(), nn.Linear(15, 2)),
        (4, 2, 16),
    ),
    "averages, 3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.AdaptiveAvgPool3d((2, 1, 3)), nn.Flatten(), nn.Linear(18, 2)),
        (3, 2, 5, 4, 6),
    ),
    "flat": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2)), (5, 1, 3, 4)),
    **{
        f"view by {how}": (functools.partial(Views, how), (3, 3, 10, 8)) for how in ("size", "shape", "sizes", "number")
    },
    "drops in both directions": (functools.partial(BothDirections, True), (5, 7, 4)),
    "drops, steps first": (functools.partial(BothDirections, False), (7, 5, 4)),
    "drops all": (lambda: nn.Sequential(nn.Linear(7, 9), nn.Dropout(1.0), nn.Dropout(0.0), nn.Linear(9, 5)), (11, 7)),
    "drops": (
        lambda: nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, 5), nn.Dropout(0.1)),
        (11, 7),
    ),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.02),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.95), amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, maximize=True),
    "fused adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.9),
    "centered": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5, weight_decay=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "adagrad, all": lambda p: torch.optim.Adagrad(p, 0.1, 0.1, 0.01, initial_accumulator_value=0.5, maximize=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.02),
    "adamax, all": lambda p: torch.optim.Adamax(p, 0.02, (0.8, 0.9), 1e-3, weight_decay=0.05, maximize=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.02),
    "nadam, all": lambda p: torch.optim.NAdam(p, 0.02, (0.8, 0.9), 1e-3, 0.05, 0.1, maximize=True),
    "nadam, decoupled": lambda p: torch.optim.NAdam(p, 0.02, weight_decay=0.05, decoupled_weight_decay=True),
    "rmsprop, maximize": lambda p: torch.optim.RMSprop(p, lr=0.01, eps=0.1, momentum=0.5, maximize=True),
}


def batch(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, sizes = MODELS[name]
    model, x = make().to(dtype), torch.randn(sizes, dtype=dtype)
    return model, x, torch.randn(model(x).shape, dtype=dtype)


def ordinary(
    model: nn.Module, loss: Any, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, max_norm: float | None = None
) -> Tensor:
    optimizer.zero_grad()
    value = loss(model(x), y)
    value.backward()
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return value.detach()


def check_same(ours: Any, theirs: Any, rtol: float = 1e-7, atol: float = 1e-9) -> None:
    """Models and optimizers."""
    for one, other in zip(ours, theirs, strict=True):
        mine, their = one.state_dict(), other.state_dict()
        if "state" in mine:
            assert mine["param_groups"] == their["param_groups"]
            mine, their = ({f"{k}": v for k, v in s["state"].items()} for s in (mine, their))
            mine, their = (
                {k: {n: t for n, t in v.items() if t is not None} for k, v in s.items()} for s in (mine, their)
            )
        assert_close(mine, their, rtol=rtol, atol=atol)


def follow(
    name: str,
    optimizer: Callable[[Any], torch.optim.Optimizer],
    loss: Any = F.mse_loss,
    steps: int = 12,
    dtype: torch.dtype = torch.float64,
    how: str = "one operator call",
    max_norm: float | None = None,
    target: Tensor | None = None,
) -> None:
    model, x, y = batch(name, dtype)
    y = y if target is None else target
    mine = copy.deepcopy(model)
    theirs, ours = optimizer(model.parameters()), optimizer(mine.parameters())
    step = fastnn.training_step(mine, loss, ours, max_norm=max_norm, strict=True)
    step._ordinary = None  # type: ignore[assignment, method-assign]  # which no step takes
    close = {"rtol": 1e-7, "atol": 1e-9} if dtype is torch.float64 else {"rtol": 2e-3, "atol": 2e-4}
    for number in range(steps):
        inputs = x + 0.1 * (number % 7)
        torch.manual_seed(number)
        expected = ordinary(model, loss, theirs, inputs, y, max_norm)
        torch.manual_seed(number)
        assert_close(step(inputs, y), expected, **close)
    assert step.explain().startswith(how)
    check_same((mine, ours), (model, theirs), **close)
    assert all(p.grad is None for p in mine.parameters())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_models(name: str, dtype: torch.dtype) -> None:
    follow(name, OPTIMIZERS["sgd"], dtype=dtype)
    follow(name, OPTIMIZERS["adam"], steps=5)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("model", ["autoencoder", "cnn"])
def test_optimizers(name: str, model: str) -> None:
    follow(model, OPTIMIZERS[name])
    follow(model, OPTIMIZERS[name], max_norm=0.05)


@pytest.mark.parametrize("name", ["adagrad", "adamax", "nadam"])
def test_optimizers_in_single_precision(name: str) -> None:
    follow("autoencoder", OPTIMIZERS[name], dtype=torch.float32, steps=20)


@pytest.mark.skipif(torch.__version__.startswith("2.10."), reason="torch 2.10's own raises a KeyError then")
def test_an_adagrad_that_has_lost_its_state() -> None:
    stock, x, y = batch("autoencoder")
    ours = copy.deepcopy(stock)
    optimizers = [torch.optim.Adagrad(m.parameters(), initial_accumulator_value=0.5) for m in (stock, ours)]
    step = fastnn.training_step(ours, F.mse_loss, optimizers[1], strict=True)
    for _ in range(3):
        ordinary(stock, F.mse_loss, optimizers[0], x, y)
        step(x, y)
        for optimizer in optimizers:
            optimizer.state.clear()
    check_same([ours], [stock])


@pytest.mark.parametrize("model", ["autoencoder", "cnn", "rnn", "batch norm"])
def test_two_hundred_steps(model: str) -> None:
    follow(model, OPTIMIZERS["adam"], steps=200)
    follow(model, OPTIMIZERS["momentum"], steps=200, max_norm=1.0)


CLASSES = torch.tensor([0, 3, 1, -100, 2, 3])
LOSSES: dict[str, tuple[Any, Tensor | None]] = {
    "mse": (nn.MSELoss(), None),
    "mse, sum": (nn.MSELoss(reduction="sum"), None),
    "l1": (F.l1_loss, None),
    "smooth l1": (nn.SmoothL1Loss(beta=0.5), None),
    "huber": (functools.partial(F.huber_loss, delta=0.3), None),
    "classes": (nn.CrossEntropyLoss(), CLASSES),
    "classes, sum": (functools.partial(F.cross_entropy, reduction="sum"), CLASSES),
    "weights of classes": (nn.CrossEntropyLoss(torch.tensor([1.0, 2, 0.5, 3]).double()), CLASSES),
    "smoothed": (nn.CrossEntropyLoss(torch.tensor([1.0, 2, 0.5, 3]).double(), label_smoothing=0.2), CLASSES),
    "smoothed, sum": (nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum", ignore_index=3), CLASSES.clamp(0)),
    "logits": (nn.BCEWithLogitsLoss(), torch.rand(6, 4).double()),
    "logits, weights": (
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2, 3, 4]).double()),
        torch.ones(6, 4).double(),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    loss, target = LOSSES[name]
    follow("cnn", OPTIMIZERS["sgd"], loss, target=target)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(torch.ones(4), label_smoothing=0.2)])
def test_classes_of_pixels(loss: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 4, 1), nn.ReLU()).double()
    mine, loss = copy.deepcopy(model), loss.double()
    theirs, ours = (torch.optim.Adam(one.parameters(), lr=0.01) for one in (model, mine))
    x, y = torch.randn(2, 3, 12, 10).double(), torch.randint(4, (2, 5, 4))
    y[0, 2, 1] = -100
    step = fastnn.training_step(mine, loss, ours, strict=True)
    for _ in range(4):
        assert_close(step(x, y), ordinary(model, loss, theirs, x, y))
    check_same((mine, ours), (model, theirs))


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_parts_of_what_a_recurrent_layer_gives(kind: str, batch_first: bool) -> None:
    """By negative indices; of a square input, where other parts have the same sizes."""

    class Part(nn.Module):
        def __init__(self, part: Callable[[Any], Tensor]) -> None:
            super().__init__()
            self.rnn, self.fc, self.part = getattr(nn, kind)(4, 6, batch_first=batch_first), nn.Linear(6, 3), part

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.part(self.rnn(x)))

    x, y = torch.randn(5, 5, 4).double(), torch.randn(5, 3).double()
    for part in (lambda out: out[-1][-1], lambda out: out[0][-1], lambda out: out[-2][:, -1], lambda out: out[-1][0]):
        model = Part(part).double()
        mine = copy.deepcopy(model)
        theirs, ours = (torch.optim.SGD(one.parameters(), 0.05) for one in (model, mine))
        step = fastnn.training_step(mine, F.mse_loss, ours)
        target = y if part(model.rnn(x)).dim() == 2 else y[None]
        for _ in range(3):
            assert_close(step(x, target), ordinary(model, F.mse_loss, theirs, x, target))
        check_same((mine, ours), (model, theirs))


# Those that are a chain in training.
CHAINS = (
    "LeNet-5",
    "CIFAR tutorial",
    "MNIST example",
    "AlexNet",
    "VGG-11 bn",
    "C3D",
    "Char-CNN",
    "MLP with batch norm",
)


@pytest.mark.parametrize("name", CHAINS)
def test_real_models(name: str) -> None:
    torch.manual_seed(0)
    model, (x,) = ZOO[name].small().double(), ZOO[name].small_inputs()
    x, mine = x.double(), copy.deepcopy(model)
    loss = F.nll_loss if name == "MNIST example" else F.cross_entropy
    theirs, ours = (torch.optim.SGD(one.parameters(), 1e-3, momentum=0.9) for one in (model, mine))
    step = fastnn.training_step(mine, loss, ours, strict=True)
    step._ordinary = None  # type: ignore[assignment, method-assign]
    y = torch.randint(model(x).shape[1], x.shape[:1])
    mine.load_state_dict(model.state_dict())
    for number in range(30):
        torch.manual_seed(number)
        expected = ordinary(model, loss, theirs, x, y)
        torch.manual_seed(number)
        assert_close(step(x, y), expected, rtol=1e-6, atol=1e-8)
    check_same((mine, ours), (model, theirs), rtol=1e-6, atol=1e-8)


def test_views_that_do_not_fit() -> None:
    model, _, _ = batch("view by number")
    step = fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), 0.1), strict=True)
    with pytest.raises(RuntimeError, match=r"shape '\[-1, 80\]' is invalid for input of size 84"):
        step(torch.randn(1, 3, 14, 6).double(), torch.randn(1, 3).double())


def test_batch_norm_of_single_values() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 4), nn.BatchNorm1d(3), nn.ReLU(), nn.MaxPool1d(1), nn.Flatten())
    step = fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1), strict=True)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        step(torch.randn(1, 2, 4), torch.randn(1, 3))


def test_nll_loss_behind_log_softmax() -> None:
    """The MNIST example, its dropout and all."""
    torch.manual_seed(0)
    model, x, y = ZOO["MNIST example"].small().double(), torch.randn(3, 1, 28, 28).double(), torch.tensor([1, 9, 4])
    mine = copy.deepcopy(model)
    theirs, ours = (torch.optim.Adam(one.parameters()) for one in (model, mine))
    step = fastnn.training_step(mine, F.nll_loss, ours, strict=True)
    assert step.explain().startswith("one operator call")
    for number in range(3):
        torch.manual_seed(number)
        expected = ordinary(model, F.nll_loss, theirs, x, y)
        torch.manual_seed(number)
        assert_close(step(x, y), expected)
    check_same((mine, ours), (model, theirs))


OTHER_LOSSES: dict[str, Any] = {
    "a function": lambda a, b: (a - b).abs().pow(1.5).mean(),
    "a reduction of the user's": lambda a, b: F.mse_loss(a, b, reduction="none").sum(),
    "weights of elements": lambda a, b: F.binary_cross_entropy_with_logits(a, torch.sigmoid(b), weight=b.abs()),
}


@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_losses_of_the_users_own(name: str) -> None:
    how = "one operator call" if name == "a reduction of the user's" else "two operator calls"
    follow("cnn", OPTIMIZERS["adam"], OTHER_LOSSES[name], steps=4, how=how)


@pytest.mark.parametrize("model", MODELS)
def test_models_with_a_loss_of_the_users_own(model: str) -> None:
    follow(model, OPTIMIZERS["momentum"], OTHER_LOSSES["a function"], how="two operator calls", max_norm=1.0)


def test_losses_that_do_not_fit_log_softmax() -> None:
    """Behind log_softmax another than nll_loss, nll_loss behind something else, and nll_loss of another dimension."""
    torch.manual_seed(0)
    behind, classes = nn.Sequential(nn.Linear(5, 4), nn.LogSoftmax(-1)).double(), torch.tensor([0, 3, 1])
    for model, loss, x, y in (
        (behind, F.cross_entropy, torch.randn(3, 5), classes),
        (behind, nn.KLDivLoss(reduction="batchmean"), torch.randn(3, 5), torch.rand(3, 4).double()),
        (behind[:1], F.nll_loss, torch.randn(3, 5), classes),
        (behind, F.nll_loss, torch.randn(2, 3, 5), torch.randint(3, (2, 4))),
    ):
        mine, x = copy.deepcopy(model), x.double()
        theirs, ours = (torch.optim.SGD(one.parameters(), 0.1) for one in (model, mine))
        step = fastnn.training_step(mine, loss, ours, strict=True)
        for _ in range(3):
            assert_close(step(x, y), ordinary(model, loss, theirs, x, y))
        check_same((mine, ours), (model, theirs))


def test_targets_of_any_kind() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(3, 5)
    mine = copy.deepcopy(model)
    theirs, ours = (torch.optim.Adam(one.parameters()) for one in (model, mine))
    y = {"mean": torch.randn(3), "scale": 2.0}

    def loss(output: Tensor, target: dict[str, Any]) -> Tensor:
        return ((output.mean(1) - target["mean"]) * target["scale"]).square().sum()

    step = fastnn.training_step(mine, loss, ours, strict=True)
    for _ in range(3):
        assert_close(step(x, y), ordinary(model, loss, theirs, x, y))
    check_same((mine, ours), (model, theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_weights_that_are_tied_or_no_longer(steps: int, ties: bool, optimizer: str) -> None:
    """After any number of steps, of which the first creates the optimizer's states."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    if not ties:
        model[2].weight = model[0].weight
    mine = copy.deepcopy(model)
    theirs, ours = (getattr(torch.optim, optimizer)(one.parameters(), 0.1) for one in (model, mine))
    step = fastnn.training_step(mine, F.mse_loss, ours, strict=True)
    for number in range(steps + 3):
        if number == steps:
            for one in (model, mine):
                one[0].weight = one[2].weight if ties else nn.Parameter(torch.eye(4).double())
        x, y = torch.randn(2, 3, 4).double()
        assert_close(step(x, y), ordinary(model, F.mse_loss, theirs, x, y), rtol=1e-9, atol=1e-12)
    assert_close(mine.state_dict(), model.state_dict(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("is_followed", [True, False])
def test_a_loss_that_uses_parameters_by_itself(is_followed: bool) -> None:
    """A penalty: its gradient must not get lost, whether the loss can be followed or not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    x, y, mine = torch.randn(3, 5).double(), torch.randn(3, 2).double(), copy.deepcopy(model)
    theirs, ours = (torch.optim.Adam(one.parameters()) for one in (model, mine))

    def penalized(of: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        def parameters() -> list[nn.Parameter]:
            return list(of.parameters() if is_followed else dict(of.named_parameters()).values())

        return lambda output, target: F.mse_loss(output, target) + sum(p.square().sum() for p in parameters())

    step = fastnn.training_step(mine, penalized(mine), ours)
    for number in range(3):
        torch.manual_seed(number)
        expected = ordinary(model, penalized(model), theirs, x, y)
        torch.manual_seed(number)
        assert_close(step(x, y), expected)
    how = step.explain()
    assert how.startswith("one operator call") if is_followed else how.endswith("the loss uses parameters by itself")
    check_same((mine, ours), (model, theirs))


def test_a_loss_that_changes_the_output_in_place() -> None:
    follow("autoencoder", OPTIMIZERS["sgd"], lambda a, b: a.sub_(b).square_().mean(), how="two operator calls")


TARGETS: dict[str, tuple[str, Any, Callable[[Tensor], Tensor]]] = {
    "probabilities of classes": ("batch norm", F.cross_entropy, lambda y: y.softmax(1)),
    "probabilities, smoothed": ("drops", nn.CrossEntropyLoss(label_smoothing=0.1), lambda y: y.softmax(1)),
    "broadcast": ("batch norm of rows", F.mse_loss, lambda y: y[:1]),
    "weights of positives along another dimension": (
        "drops",
        nn.BCEWithLogitsLoss(pos_weight=torch.arange(1.0, 12).double()[:, None]),
        lambda y: y.sigmoid(),
    ),
    "of another dtype": ("drops in both directions", F.l1_loss, lambda y: y.float()),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", TARGETS)
def test_targets_that_only_the_loss_takes(name: str) -> None:
    kind, loss, of = TARGETS[name]
    _, _, y = batch(kind)
    how = "two operator calls and between them the loss (its target"
    follow(kind, OPTIMIZERS["momentum"], loss, steps=4, how=how, target=of(y))


def test_targets_that_nothing_takes() -> None:
    """The loss's own words; and the next step is one call again."""
    model, x, y = batch("batch norm")
    step = fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), 0.1), strict=True)
    before = copy.deepcopy(model.state_dict())
    with (
        pytest.raises(RuntimeError, match=r"The size of tensor a \(3\) must match"),
        pytest.warns(UserWarning, match="Using a target size"),
    ):
        step(x, y[:, :2])
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    step(x, y)
    assert step.explain().startswith("one operator call")


def test_a_learning_rate_that_is_a_tensor() -> None:
    """A scheduler changes it in place."""
    model, x, y = batch("autoencoder")
    mine = copy.deepcopy(model)
    theirs, ours = (torch.optim.Adam(one.parameters(), torch.tensor(0.1), foreach=False) for one in (model, mine))
    step = fastnn.training_step(mine, F.mse_loss, ours)
    assert step.explain().endswith("a setting of the optimizer is a tensor")
    schedules = [torch.optim.lr_scheduler.StepLR(one, 1, 0.5) for one in (theirs, ours)]
    for _ in range(3):
        assert_close(step(x, y), ordinary(model, F.mse_loss, theirs, x, y))
        for schedule in schedules:
            schedule.step()
    check_same((mine, ours), (model, theirs))


def test_a_loss_that_draws_numbers_and_uses_parameters_by_itself() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2)
    mine = copy.deepcopy(model)
    theirs, ours = (torch.optim.SGD(one.parameters(), 0.1) for one in (model, mine))

    def noisy(of: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda a, b: F.mse_loss(a + torch.randn_like(a), b) + 1e-3 * of.weight.square().sum()

    torch.manual_seed(1)
    expected = [ordinary(model, noisy(model), theirs, x, y) for _ in range(3)]
    torch.manual_seed(1)
    step = fastnn.training_step(mine, noisy(mine), ours)
    assert_close([step(x, y) for _ in range(3)], expected)


def test_a_loss_under_a_checkpoint() -> None:
    """Whose graph does not show what it uses."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).double(), torch.randn(4, 3).double(), torch.randn(4, 2).double()
    for penalty in (0.0, 0.1):
        one, other = copy.deepcopy(model), copy.deepcopy(model)

        def loss_of(of: nn.Module, penalty: float = penalty) -> Callable[[Tensor, Tensor], Tensor]:
            def inner(a: Tensor, b: Tensor) -> Tensor:
                return F.mse_loss(a, b) + (penalty * of.weight.square().sum() if penalty else 0.0)

            return lambda a, b: torch.utils.checkpoint.checkpoint(inner, a, b, use_reentrant=True)

        theirs, ours = (torch.optim.SGD(m.parameters(), 0.1) for m in (one, other))
        step = fastnn.training_step(other, loss_of(other), ours)
        for _ in range(3):
            assert_close(step(x, y), ordinary(one, loss_of(one), theirs, x, y))
        check_same((other, ours), (one, theirs))


@dataclasses.dataclass
class Unhashable:
    factor: float

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return F.mse_loss(a, b) * self.factor


@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, F.huber_loss])
def test_weights_of_elements(loss: Callable[..., Tensor]) -> None:
    """That torch's functions take too, though not of classes."""
    weight, target, x = torch.tensor([1.0, 0.0, 5.0]), torch.randn(3), torch.randn(3, 1)
    stock = nn.Sequential(nn.Linear(1, 1), nn.Flatten(0))
    ours = copy.deepcopy(stock)
    weighted = functools.partial(loss, weight=weight)
    step = fastnn.training_step(ours, weighted, torch.optim.SGD(ours.parameters(), 0.1))
    expected = ordinary(stock, weighted, torch.optim.SGD(stock.parameters(), 0.1), x, target)
    assert_close(step(x, target), expected)
    assert_close(list(ours.parameters()), list(stock.parameters()))
    with pytest.raises(ValueError, match="same size"):
        fastnn.training_step(nn.Linear(4, 3), weighted, torch.optim.SGD(ours.parameters()))(
            torch.randn(5, 4), torch.randn(5, 3)
        )


def test_losses_with_more_to_them_than_their_numbers() -> None:
    follow("autoencoder", OPTIMIZERS["sgd"], Unhashable(2.0))
    hooked, seen = nn.MSELoss(), []
    hooked.register_forward_hook(lambda *_: seen.append(1))
    follow("autoencoder", OPTIMIZERS["sgd"], hooked, steps=3, how="two operator calls")
    assert len(seen) == 6
    model, x, y = batch("autoencoder")
    y.requires_grad_()
    fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), 0.1))(x, y)
    assert y.grad is not None


def test_states_that_are_replaced() -> None:
    """Twice between two steps, so that the new one may lie where the old one was; and by None, as older torch did."""
    model, x, y = batch("autoencoder")
    mine = copy.deepcopy(model)
    theirs, ours = (torch.optim.SGD(one.parameters(), 0.1, momentum=0.9) for one in (model, mine))
    step = fastnn.training_step(mine, F.mse_loss, ours, strict=True)
    saved: list[Any] = []
    for number in range(9):
        if number == 3:
            saved = [copy.deepcopy(one.state_dict()) for one in (theirs, ours)]
        for one, state in zip((theirs, ours), saved if number == 6 else (), strict=False):
            one.load_state_dict(copy.deepcopy(state))
            one.load_state_dict(copy.deepcopy(state))
        if number == 7:
            for one in (theirs, ours):
                state = copy.deepcopy(one.state_dict())
                one.load_state_dict({**state, "state": {i: {"momentum_buffer": None} for i in state["state"]}})
        assert_close(step(x, y), ordinary(model, F.mse_loss, theirs, x, y))
    check_same((mine, ours), (model, theirs))


@pytest.mark.parametrize("name", ["momentum", "adamw", "fused adam", "centered"])
def test_schedules_of_each_step(name: str) -> None:
    """OneCycleLR moves the momentum, or the first of the betas, too."""
    model, x, y = batch("autoencoder")
    mine = copy.deepcopy(model)
    theirs, ours = (OPTIMIZERS[name](one.parameters()) for one in (model, mine))
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(one, 0.05, total_steps=9, cycle_momentum=name != "centered")
        for one in (theirs, ours)
    ]
    step = fastnn.training_step(mine, F.mse_loss, ours, strict=True)
    for number in range(9):
        if number == 6:
            for one in (theirs, ours):
                one.param_groups[0]["weight_decay"] = 0.3
        assert_close(step(x, y), ordinary(model, F.mse_loss, theirs, x, y))
        for schedule in schedules[: 2 * (number < 8)]:
            schedule.step()
    check_same((mine, ours), (model, theirs))


def _exchange_states(optimizer: torch.optim.Optimizer) -> None:
    """Of two biases of one size, in the same places of the dict."""
    first, second = (p for p in optimizer.param_groups[0]["params"] if p.shape == (8,))
    states = dict(optimizer.state)
    optimizer.state.clear()
    for p, state in states.items():
        optimizer.state[second if p is first else first if p is second else p] = state


STATE_EDITS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], Any]] = {
    "forgotten": lambda model, optimizer: optimizer.state.clear(),
    "one forgotten": lambda model, optimizer: optimizer.state.pop(next(model.parameters())),
    "another dict": lambda model, optimizer: optimizer.state.update(
        {p: {name: tensor.clone() for name, tensor in state.items()} for p, state in optimizer.state.items()}
    ),
    "another step": lambda model, optimizer: [
        state.update(step=state["step"].clone()) for state in optimizer.state.values()
    ],
    "another average": lambda model, optimizer: [
        state.update(exp_avg=state["exp_avg"] * 2) for state in optimizer.state.values()
    ],
    "more kept": lambda model, optimizer: [
        optimizer.param_groups[0].update(amsgrad=True),
        *(state.update(max_exp_avg_sq=state["exp_avg_sq"].clone()) for state in optimizer.state.values()),
    ],
    "states exchanged": lambda model, optimizer: _exchange_states(optimizer),
    "moved to another group": lambda model, optimizer: optimizer.add_param_group(
        {"params": [optimizer.param_groups[0]["params"].pop()], "lr": 0.1}
    ),
    "an empty group": lambda model, optimizer: optimizer.add_param_group({"params": []}),
    "a bias less": lambda model, optimizer: (
        optimizer.state.pop(optimizer.param_groups[0]["params"].pop()),
        setattr(model.decoder_2, "bias", None),
    ),
    "other data": lambda model, optimizer: [setattr(p, "data", p.data * 0.5) for p in model.parameters()],
    "another parameter": lambda model, optimizer: [
        optimizer.state.pop(optimizer.param_groups[0]["params"].pop(0)),
        next(model.parameters()).requires_grad_(False),
    ],
}


@pytest.mark.parametrize("name", STATE_EDITS)
def test_edits_between_steps_are_seen(name: str) -> None:
    model, x, y = batch("autoencoder")
    mine = copy.deepcopy(model)
    theirs, ours = (torch.optim.Adam(one.parameters(), lr=0.01) for one in (model, mine))
    step = fastnn.training_step(mine, F.mse_loss, ours, strict=True)
    for number in range(6):
        if number == 3:
            STATE_EDITS[name](model, theirs)
            STATE_EDITS[name](mine, ours)
        assert_close(step(x, y), ordinary(model, F.mse_loss, theirs, x, y))
    assert step.explain().startswith("one operator call")
    check_same((mine, ours), (model, theirs))


def test_a_copy_of_a_step_is_one_of_its_own() -> None:
    model, x, y = batch("autoencoder")
    step = fastnn.training_step(model, F.mse_loss, torch.optim.Adam(model.parameters(), 0.01), strict=True)
    for _ in range(3):
        step(x, y)
    other = copy.deepcopy(step)
    expected = [step(x, y) for _ in range(3)]
    del step
    gc.collect()
    assert_close([other(x, y) for _ in range(3)], expected, rtol=0, atol=0)


def test_parameters_that_change_their_ways() -> None:
    """Memory formats, hooks."""
    model, x, y = batch("cnn")
    mine, called = copy.deepcopy(model), []
    theirs, ours = (torch.optim.SGD(one.parameters(), 0.05) for one in (model, mine))
    step = fastnn.training_step(mine, F.mse_loss, ours, strict=True)
    for number in range(4):
        if number == 2:
            mine.to(memory_format=torch.channels_last)
        assert_close(step(x, y), ordinary(model, F.mse_loss, theirs, x, y))
    check_same((mine, ours), (model, theirs))
    mine.to(memory_format=torch.contiguous_format)
    mine.conv1.weight.register_post_accumulate_grad_hook(lambda p: called.append(1))
    fastnn.training_step(mine, F.mse_loss, ours)(x, y)
    assert called == [1]


def test_a_loss_that_raises_changes_nothing() -> None:
    model, x, y = batch("batch norm")

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if output.isfinite().all():  # so that it is called with tensors, and not traced
            raise KeyboardInterrupt
        return output.sum()

    optimizer = OPTIMIZERS["adam"](model.parameters())
    step = fastnn.training_step(model, loss, optimizer, strict=True)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(KeyboardInterrupt):
        step(x, y)
    with pytest.raises(RuntimeError, match="does not require grad"):
        fastnn.training_step(model, lambda output, target: output.detach().sum(), optimizer)(x, y)
    assert_close(model.state_dict(), before[0], rtol=0, atol=0)
    assert str(optimizer.state_dict()) == str(before[1])


def _with_spectral_norm() -> nn.Module:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    return model


OTHERS: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "by a sorted value": (
        lambda: Calls(lambda x, a, b: a(x) * b(x).sort(1)[0], nn.Linear(4, 4), nn.Linear(4, 4)),
        torch.optim.SGD,
        "sort is no layer",
    ),
    "dropout of channels": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.FeatureAlphaDropout(), nn.Linear(4, 4)),
        torch.optim.SGD,
        "FeatureAlphaDropout",
    ),
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None)),
        torch.optim.SGD,
        "cumulative average",
    ),
    "optimizer": (lambda: nn.Sequential(nn.Linear(4, 4)), torch.optim.Adadelta, "the optimizer is Adadelta"),
    "frozen spectral norm": (_with_spectral_norm, torch.optim.SGD, "computed from something else"),
    "an orthogonal weight": (
        lambda: nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))),
        torch.optim.SGD,
        "computed from something else",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_one_call(name: str) -> None:
    make, optimizer, why = OTHERS[name]
    torch.manual_seed(0)
    model, x, y = make(), torch.randn(5, 4), torch.randn(5, 4)
    mine = make()
    mine.load_state_dict(model.state_dict())
    theirs, ours = (optimizer(one.parameters(), lr=0.1) for one in (model, mine))
    with pytest.raises(ValueError, match=f"this is not one call: .*{why}"):
        fastnn.training_step(mine, F.mse_loss, ours, strict=True)
    step = fastnn.training_step(mine, F.mse_loss, ours, max_norm=1.0)
    assert why in step.explain()
    for number in range(4):
        torch.manual_seed(number)
        value = step(x, y)
        torch.manual_seed(number)
        assert_close(value, ordinary(model, F.mse_loss, theirs, x, y, 1.0), rtol=1e-4, atol=1e-5)
        assert not value.requires_grad
    check_same((mine, ours), (model, theirs), rtol=1e-3, atol=1e-4)


# ---- the optimizer stays the user's -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["momentum", "amsgrad", "centered"])
def test_back_and_forth(name: str) -> None:
    """Ordinary steps between ours, a checkpoint, a scheduler, and groups of parameters of which one is frozen."""
    model, x, y = batch("cnn")
    mine = copy.deepcopy(model)

    def made(one: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
        groups = [
            {"params": list(one.conv1.parameters())},
            {"params": [*one.conv2.parameters(), *one.output.parameters()]},
        ]
        groups[0]["lr"] = 0.001
        optimizer = OPTIMIZERS[name](groups)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    (theirs, their_schedule), (ours, our_schedule) = made(model), made(mine)
    step = fastnn.training_step(mine, F.mse_loss, ours, strict=True)
    for number in range(12):
        if number == 5:
            for one in (model, mine):
                one.conv2.weight.requires_grad_(False)
        if number == 8:
            saved = copy.deepcopy((mine.state_dict(), ours.state_dict()))
            mine.load_state_dict(saved[0])
            ours.load_state_dict(saved[1])
            for one in (model, mine):
                one.conv2.weight.requires_grad_(True)
        run = step if number % 3 else functools.partial(ordinary, mine, F.mse_loss, ours)
        assert_close(run(x, y), ordinary(model, F.mse_loss, theirs, x, y))
        their_schedule.step()
        our_schedule.step()
    check_same((mine, ours), (model, theirs))


def test_gradients_that_are_kept() -> None:
    model, x, y = batch("autoencoder")
    mine = copy.deepcopy(model)
    theirs, ours = (torch.optim.Adam(one.parameters()) for one in (model, mine))
    step = fastnn.training_step(mine, F.mse_loss, ours, max_norm=0.5, keep_gradients=True, strict=True)
    for _ in range(3):
        step(x, y)
        ordinary(model, F.mse_loss, theirs, x, y, max_norm=0.5)
        for p, q in zip(mine.parameters(), model.parameters(), strict=True):
            assert_close(p.grad, q.grad)
    check_same((mine, ours), (model, theirs))


def test_a_step_bumps_versions() -> None:
    model, x, y = batch("autoencoder")
    step = fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), 0.1), strict=True)
    before = [p._version for p in model.parameters()]
    value = model(x).sum()
    step(x, y)
    assert all(p._version > version for p, version in zip(model.parameters(), before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize(("name", "kind"), [("momentum", "cnn"), ("adam", "cnn"), ("adam", "batch norm")])
def test_a_failed_step_changes_nothing(name: str, kind: str) -> None:
    model, x, y = batch(kind, torch.float32)
    optimizer = OPTIMIZERS[name](model.parameters())
    step = fastnn.training_step(model, F.cross_entropy, optimizer, strict=True)
    classes = torch.randint(3, x.shape[:1])
    for trained in (False, True):
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        for bad in (
            (x[:, :2], classes),
            (x, classes[:3]),
            (x, classes + 9),
            (x.double(), classes),
            (x.to("meta"), classes),
            (x[:0], classes[:0]),
            (None, classes),
            (x, "classes"),
        ):
            if bad[0] is not None and bad[0].numel() == 0:
                continue  # the mean of nothing is NaN, in stock too
            if kind == "batch norm" and not all(isinstance(one, Tensor) and one.is_cpu for one in bad):
                continue  # which is no one call, and stock counts the batch before it fails
            with pytest.raises((RuntimeError, TypeError, AttributeError, ValueError, IndexError, NotImplementedError)):
                step(*bad)
            assert_close(model.state_dict(), before[0], rtol=0, atol=0)
            assert str(optimizer.state_dict()) == str(before[1])
        if not trained:
            step(x, classes)
    del y


def test_nan_and_infinity_travel() -> None:
    for value in (float("nan"), float("inf")):
        model, x, y = batch("autoencoder")
        mine = copy.deepcopy(model)
        x[3, 2] = value
        theirs, ours = (torch.optim.Adam(one.parameters()) for one in (model, mine))
        step = fastnn.training_step(mine, F.mse_loss, ours, max_norm=1.0, strict=True)
        for _ in range(2):
            assert step(x, y).isfinite() == ordinary(model, F.mse_loss, theirs, x, y, 1.0).isfinite()
        for p, q in zip(mine.parameters(), model.parameters(), strict=True):
            assert torch.equal(p.isnan(), q.isnan())


def test_the_same_bits_on_any_number_of_threads() -> None:
    results = []
    for threads in (1, 2):
        with using_threads(threads):
            model, x, y = batch("autoencoder", torch.float32)
            x, y = x.repeat(40, 1), y.repeat(40, 1)
            step = fastnn.training_step(model, F.mse_loss, torch.optim.Adam(model.parameters()), strict=True)
            results.append([step(x, y) for _ in range(3)][-1])
    assert torch.equal(*results)


def test_several_python_threads() -> None:
    alone: dict[int, Tensor] = {}
    together: dict[int, Tensor] = {}
    lock = threading.Lock()
    torch.manual_seed(0)
    models = [stock_models.Autoencoder(10, 8, 5) for _ in range(4)]

    def run(number: int, results: dict[int, Tensor]) -> None:
        model, x = copy.deepcopy(models[number]), torch.ones(32, 10)
        with lock:
            step = fastnn.training_step(model, F.mse_loss, torch.optim.Adam(model.parameters()), strict=True)
        for _ in range(50):
            results[number] = step(x, x)

    for number in range(4):
        run(number, alone)
    threads = [threading.Thread(target=run, args=(number, together)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_edits_of_the_model_are_seen() -> None:
    model, x, y = batch("lenet")
    mine = copy.deepcopy(model)
    ours = torch.optim.SGD(mine.parameters(), 0.05)
    step = fastnn.training_step(mine, F.mse_loss, ours, strict=True)
    theirs = torch.optim.SGD(model.parameters(), 0.05)
    for edit in (
        lambda one: None,
        lambda one: one.classifier.__setitem__(1, nn.Tanh()),
        lambda one: one.classifier.append(nn.Softmax(1)),
        lambda one: one.eval(),
        lambda one: one.train(),
    ):
        for one in (model, mine):
            edit(one)
        for _ in range(2):
            assert_close(step(x, y), ordinary(model, F.mse_loss, theirs, x, y))
    check_same((mine, ours), (model, theirs))


SETTINGS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "dropout": ("drops", lambda model: setattr(model[2], "p", 0.7), "one"),
    "momentum": ("batch norm of rows", lambda model: setattr(model[2], "momentum", 0.7), "one"),
    "eps": ("batch norm of rows", lambda model: setattr(model[2], "eps", 0.1), "one"),
    "slope": ("batch norm of rows", lambda model: setattr(model[6], "negative_slope", 0.2), "one"),
    "frozen statistics": ("batch norm of rows", lambda model: model[2].eval(), "one"),
    "dropout between layers": ("drops in both directions", lambda model: setattr(model.rnn, "dropout", 0.6), "one"),
    "parts": ("averages, 3d", lambda model: setattr(model[1], "output_size", (3, 1, 2)), "one"),
    "no statistics kept": ("batch norm", lambda model: setattr(model[1], "track_running_stats", False), "one"),
    "no statistics": (
        "batch norm of rows",
        lambda model: [setattr(model[2], name, None) for name in ("running_mean", "running_var")],
        "one",
    ),
    "no counter": ("batch norm", lambda model: setattr(model[1], "num_batches_tracked", None), "one"),
    "another activation": ("averages", lambda model: setattr(model[1], "__class__", nn.Sigmoid), "one"),
    "hook": (
        "batch norm, not pooled",
        lambda model: model[6].register_forward_hook(lambda module, args, output: 2 * output) and None,
        "forward and backward",
    ),
}


def test_a_dropout_that_changes_each_step() -> None:
    model, x, y = batch("drops")
    mine = copy.deepcopy(model)
    theirs, ours = (torch.optim.SGD(one.parameters(), 0.05) for one in (model, mine))
    step = fastnn.training_step(mine, F.mse_loss, ours, strict=True)
    for number in range(60):
        model[2].p = mine[2].p = number / 100
        torch.manual_seed(number)
        expected = ordinary(model, F.mse_loss, theirs, x, y)
        torch.manual_seed(number)
        assert_close(step(x, y), expected)
    assert step.explain().startswith("one operator call")


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_of_the_model_are_called(kind: str) -> None:
    model, x, y = batch("autoencoder")
    step = fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), 0.1), strict=True)
    called: list[int] = []
    for number in range(4):
        if number == 2:
            getattr(model, f"register_{kind}_hook")(lambda *_: called.append(1))
        step(x, y)
    assert called == [1, 1]
    assert "the model has hooks" in step.explain()


def test_hooks_of_all_modules_and_optimizers_are_called() -> None:
    model, x, y = batch("autoencoder")
    step = fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), 0.1), strict=True)
    step(x, y)
    called: list[int] = []
    for register in (
        nn.modules.module.register_module_forward_hook,
        import_module("torch.optim.optimizer").register_optimizer_step_post_hook,
    ):
        handle = register(lambda *_: called.append(1) and None)
        step(x, y)
        handle.remove()
        assert called
        called.clear()
    step(x, y)
    assert not called


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_infinite_parameters_without_weight_decay(name: str) -> None:
    """A class that is masked by its bias."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(5, 4)).double(), torch.randn(6, 5).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    with torch.no_grad():
        model[0].bias[3] = -torch.inf
    mine = copy.deepcopy(model)
    theirs, ours = (OPTIMIZERS[name](one.parameters()) for one in (model, mine))
    for one in (theirs, ours):
        one.param_groups[0]["weight_decay"] = 0
    step = fastnn.training_step(mine, F.cross_entropy, ours, strict=True)
    for _ in range(3):
        assert_close(step(x, y), ordinary(model, F.cross_entropy, theirs, x, y))
    check_same((mine, ours), (model, theirs))


def test_channels_last_inputs_drop_the_same_elements() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Dropout(0.2), nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Dropout(0.3), nn.Conv2d(4, 4, 2), nn.ReLU()),
        *(nn.Dropout(0.3), nn.AdaptiveAvgPool2d(3), nn.Dropout(0.3), nn.Flatten(), nn.Linear(36, 2)),
    ).double()
    x, y = torch.randn(3, 3, 9, 8).double().to(memory_format=torch.channels_last), torch.randn(3, 2).double()
    for loss in (F.mse_loss, OTHER_LOSSES["a function"]):
        mine, stock = copy.deepcopy(model), copy.deepcopy(model)
        theirs, ours = (torch.optim.SGD(one.parameters(), 0.05) for one in (stock, mine))
        step = fastnn.training_step(mine, loss, ours, strict=True)
        for number in range(4):
            torch.manual_seed(number)
            expected = ordinary(stock, loss, theirs, x, y)
            torch.manual_seed(number)
            assert_close(step(x, y), expected)
        check_same((mine, ours), (stock, theirs))


def test_channels_that_are_pruned_between_steps() -> None:
    def prune(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for i, names in ((0, ["weight", "bias"]), (1, ["weight", "bias", "running_mean", "running_var"])):
            for name in names:
                tensor = getattr(model[i], name)
                value = tensor.detach()[:4].clone()
                setattr(model[i], name, nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value)
        model[4].weight = nn.Parameter(model[4].weight.detach()[:, :4].clone())
        optimizer.param_groups[0]["params"] = list(model.parameters())

    model, x, y = batch("batch norm")
    mine = copy.deepcopy(model)
    theirs, ours = (torch.optim.SGD(one.parameters(), 0.05) for one in (model, mine))
    step = fastnn.training_step(mine, F.mse_loss, ours, strict=True)
    for number in range(4):
        if number == 2:
            prune(model, theirs)
            prune(mine, ours)
        assert_close(step(x, y), ordinary(model, F.mse_loss, theirs, x, y))
    assert step.explain().startswith("one operator call")
    check_same((mine, ours), (model, theirs))


def test_inputs_that_only_the_ordinary_way_takes() -> None:
    """Without a batch behind a layer of any dimensions; and a model whose dtype is no longer that of the state."""
    torch.manual_seed(0)
    unbatched = nn.Sequential(nn.Tanh(), nn.Conv1d(2, 3, 3)).double()
    x, y = torch.randn(2, 8).double(), torch.randn(3, 6).double()
    step = fastnn.training_step(unbatched, F.mse_loss, torch.optim.SGD(unbatched.parameters(), 0.1), strict=True)
    assert_close(step(x, y), F.mse_loss(unbatched(x), y), rtol=1, atol=1)
    step(x[None], y[None])
    assert step.explain().startswith("one operator call")
    model, x, y = batch("autoencoder", torch.float32)
    mine = copy.deepcopy(model)
    theirs, ours = (torch.optim.SGD(one.parameters(), 0.1, momentum=0.9) for one in (model, mine))
    step = fastnn.training_step(mine, F.mse_loss, ours, strict=True)
    for number in range(4):
        if number == 2:
            (model.double(), mine.double())
            x, y = x.double(), y.double()
        assert_close(step(x, y), ordinary(model, F.mse_loss, theirs, x, y))


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_change_between_steps_are_seen(name: str) -> None:
    kind, edit, how = SETTINGS[name]
    model, x, y = batch(kind)
    mine = copy.deepcopy(model)
    theirs, ours = (torch.optim.SGD(one.parameters(), 0.05) for one in (model, mine))
    step = fastnn.training_step(mine, F.mse_loss, ours, strict=True)
    for number in range(4):
        if number == 2:
            edit(model)
            edit(mine)
        torch.manual_seed(number)
        expected = ordinary(model, F.mse_loss, theirs, x, y)
        torch.manual_seed(number)
        assert_close(step(x, y), expected)
    assert step.explain().startswith(how)
    check_same((mine, ours), (model, theirs))


LOSS_EDITS: dict[str, Callable[[Any, nn.CrossEntropyLoss], Any]] = {
    "another": lambda step, loss: setattr(step, "loss", nn.CrossEntropyLoss(label_smoothing=0.3)),
    "smoothing": lambda step, loss: setattr(loss, "label_smoothing", 0.3),
    "weights": lambda step, loss: setattr(loss, "weight", torch.tensor([1.0, 2, 3, 4]).double()),
    "weights in place": lambda step, loss: loss.weight.mul_(torch.tensor([1.0, 2, 3, 4]).double()),
    "hook": lambda step, loss: loss.register_forward_hook(lambda module, args, output: 3 * output) and None,
}


@pytest.mark.parametrize("name", LOSS_EDITS)
def test_edits_of_the_loss_are_seen(name: str) -> None:
    model, x, _ = batch("cnn")
    mine, one, other = copy.deepcopy(model), *(nn.CrossEntropyLoss(torch.ones(4).double()) for _ in range(2))
    theirs, ours = (torch.optim.SGD(m.parameters(), 0.05) for m in (model, mine))
    step = fastnn.training_step(mine, one, ours, strict=True)
    stock = SimpleNamespace(loss=other)
    for number in range(4):
        if number == 2:
            LOSS_EDITS[name](step, one)
            LOSS_EDITS[name](stock, other)
        assert_close(step(x, CLASSES), ordinary(model, stock.loss, theirs, x, CLASSES))
    check_same((mine, ours), (model, theirs))


def test_hooks_of_parameters_are_seen() -> None:
    model, x, y = batch("autoencoder")
    step = fastnn.training_step(model, F.mse_loss, torch.optim.Adam(model.parameters()), strict=True)
    called: list[int] = []
    parameter = next(model.parameters())
    parameter.register_hook(lambda grad: None).remove()  # which leaves an empty dict
    step(x, y)
    step(x, y)
    assert step.explain().startswith("one operator call")
    parameter.register_hook(lambda grad: called.append(1))
    step(x, y)
    assert called == [1]


def test_bad_arguments() -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(TypeError, match=r"expected a model that is a torch\.nn\.Module, got a str"):
        fastnn.training_step("model", F.mse_loss, optimizer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected an optimizer of torch\.optim, got a float"):
        fastnn.training_step(model, F.mse_loss, 0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a loss that can be called, got a str"):
        fastnn.training_step(model, "mse", optimizer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected max_norm to be at least 0, got -1"):
        fastnn.training_step(model, F.mse_loss, optimizer, max_norm=-1)


NUMBERS = torch.tensor([0, 1, 0, 0, 0, -1, 0.1, *[0] * 5], dtype=torch.float64)  # of mse_loss and SGD


def raw_calls(name: str) -> tuple[list[Any], Callable[[], list[Any]]]:
    """Arguments of network_with_pass for a model, and those of training_step_backward, with SGD, after one more."""
    model, x, _ = batch(name, torch.float32)
    step = fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), 0.1), strict=True)
    assert step._reading is not None
    own, text = step._reading.of_program(step._reading.tensors()), step._reading.network.text
    layout = [n for tensor in own for n in (0 if tensor.requires_grad else -1, 0)]
    parameters = [tensor.detach() for tensor in own]

    def after_forward() -> list[Any]:
        outputs, kept = torch.ops.fastnn.network_with_pass([x], parameters, text)
        return [[torch.randn(outputs[0].shape)], kept, parameters, [], layout, NUMBERS, True]

    return [[x], parameters, text], after_forward


@pytest.mark.parametrize("name", MODELS)
def test_opcheck(name: str) -> None:
    forward, after_forward = raw_calls(name)
    schema, fake = ("test_schema",), ("test_faketensor",)
    if "drops" not in name:  # whose mask is another in each call
        # (Each call gives another number, so that the schema's check of equal results has to look at the outputs.)
        torch.library.opcheck(torch.ops.fastnn.network_with_pass.default, forward, test_utils=fake)
    torch.library.opcheck(torch.ops.fastnn.training_step_backward.default, after_forward(), test_utils=schema)
    torch.library.opcheck(torch.ops.fastnn.training_step_backward.default, after_forward(), test_utils=fake)
    (x,), parameters, text = forward
    *_, layout, numbers, _ = after_forward()
    torch.library.opcheck(
        torch.ops.fastnn.bind_training_step.default, (parameters, [], text, None, layout), test_utils=(*schema, *fake)
    )
    bound = torch.ops.fastnn.bind_training_step(parameters, [], text, None, layout)
    target = torch.zeros(after_forward()[0][0].shape)
    if "drops" not in name:
        for op, inputs in (("bound_training_step", x), ("bound_training_step_of_several", [x])):
            torch.library.opcheck(
                getattr(torch.ops.fastnn, op).default, (inputs, target, bound, numbers), test_utils=(*schema, *fake)
            )


@pytest.mark.parametrize("name", MODELS)
def test_what_lies_between_two_calls_is_not_trusted(name: str) -> None:
    _, after_forward = raw_calls(name)
    good = after_forward()
    gradients, kept, parameters = good[:3]
    run = torch.ops.fastnn.training_step_backward

    def refused(arguments: list[Any]) -> None:
        before = copy.deepcopy(parameters)
        with pytest.raises(RuntimeError):
            run(*arguments)
        assert_close(parameters, before, rtol=0, atol=0)

    refused([gradients, kept + 1000, *good[2:]])
    refused([gradients, kept.double(), *good[2:]])
    longer = [torch.cat([p.flatten(), torch.zeros(9)]) for p in parameters]
    for other in ([], [*parameters, parameters[0]], longer, [p.double() for p in parameters]):
        refused([*after_forward()[:2], other, *good[3:]])
    for gradient in (gradients[0][:-1], gradients[0].double(), gradients[0][..., None]):
        refused([[gradient], *after_forward()[1:]])
    for some in ([], gradients * 2, [None]):
        refused([some, *after_forward()[1:]])
    run(*good)
    refused(good)  # once more


class _Careful(torch.optim.SGD):
    """Refuses gradients that are not finite."""

    def step(self, closure: Any = None) -> Any:
        if not all(p.grad is None or p.grad.isfinite().all() for p in self.param_groups[0]["params"]):
            raise FloatingPointError
        return super().step(closure)


@pytest.mark.parametrize("keep_gradients", [False, True])
def test_gradients_of_an_update_that_raised_are_dropped(keep_gradients: bool) -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    ours = copy.deepcopy(stock)
    optimizer = _Careful(stock.parameters(), 0.1)
    step = fastnn.training_step(ours, F.mse_loss, _Careful(ours.parameters(), 0.1), keep_gradients=keep_gradients)
    for number in range(4):
        x, y = torch.randn(6, 4), torch.randn(6, 1)
        if number == 1:
            x[0, 0] = torch.nan
        optimizer.zero_grad()
        F.mse_loss(stock(x), y).backward()
        if number == 1:
            with pytest.raises(FloatingPointError):
                optimizer.step()
            with pytest.raises(FloatingPointError):
                step(x, y)
        else:
            optimizer.step()
            step(x, y)
    assert_close(ours.state_dict(), stock.state_dict())


def test_forwards_wait_until_they_are_forgotten() -> None:
    x, weight = torch.randn(4, 3), torch.randn(2, 3)
    text = "fastnn.network 1\ninput -> x\nweight -> w sizes=2,3\nlinear input=x weight=w -> y\noutput input=y"
    first = torch.ops.fastnn.network_with_pass([x], [weight], text)[1]
    reference = weakref.ref(weight)
    _C.forget_pass(int(first))
    _C.forget_pass(int(first))
    kept = torch.ops.fastnn.network_with_pass([x], [weight], text)[1]
    del weight
    for _ in range(1 << 15):  # an agent may keep as many log-probabilities until it learns from them
        last = torch.ops.fastnn.network_with_pass([x], [torch.randn(2, 3)], text)[1]
        assert reference() is not None
    for number in range(int(kept), int(last) + 1):
        _C.forget_pass(number)
    assert reference() is None
    with pytest.raises(RuntimeError, match="no forward of this number"):
        torch.ops.fastnn.training_step_backward([torch.randn(4, 2)], kept, [], [], [], NUMBERS, False)


def _linear(layer: str = "linear", activation: str = "identity", more: Sequence[str] = (), output: str = "y") -> str:
    """A program of one layer, and more."""
    lines = ["fastnn.network 1", "input -> x", "weight -> w sizes=2,3", "weight -> b sizes=2"]
    lines.append(f"{layer} input=x weight=w bias=b -> y activation={activation}")
    return "\n".join([*lines, *more, f"output input={output}"])


def test_the_raw_operator_is_safe() -> None:
    run = torch.ops.fastnn.training_step
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    weight, bias = torch.randn(2, 3), torch.randn(2)
    numbers = NUMBERS.clone()
    good = [[x], y, [weight, bias], [], _linear(), None, [0, 0, 0, 0], numbers, True]
    before = weight.clone()
    loss, gradients = run(*good)
    assert_close(loss, F.mse_loss(F.linear(x, before, bias + 0.1 * gradients[1]), y))
    assert_close(weight, before - 0.1 * gradients[0])

    def bad(place: int, *values: Any) -> None:
        for value in values:
            arguments = list(good)
            arguments[place] = value
            kept = weight.clone(), bias.clone()
            with pytest.raises(RuntimeError):
                run(*arguments)
            assert torch.equal(weight, kept[0])
            assert torch.equal(bias, kept[1])

    bad(0, *([one] for one in (x[:, :2], x.double(), x.bfloat16(), x[:0], torch.randn(3), x.to("meta"), x.long())))
    bad(0, [], [x, x])
    bad(1, y[:, :1], y.long(), y.double(), y[:2])
    bad(2, [], [weight], [weight, bias, bias], [weight.t(), bias], [weight, bias[:1]], [weight.double(), bias.double()])
    bad(3, [torch.zeros(())], [weight])
    bad(4, "", ";", "mlp 1 1 identity;", _linear(activation="identitx"), _linear("other"), _linear("conv"))
    last = "input=y -> z"
    bad(
        4,
        _linear(more=[f"flatten {last} start_dim=1 end_dim=0"], output="z"),
        _linear(more=[f"flatten {last} start_dim=5"], output="z"),
        _linear(more=[f"dropout {last} p=1.5"], output="z"),
        _linear(more=[f"dropout {last}"], output="z"),
        _linear(more=[f"adaptive_avg_pool {last} sizes=1,1"], output="z"),
        _linear(more=[f"adaptive_avg_pool {last} sizes="], output="z"),
        _linear(more=[f"split {last} chunks=2"], output="z"),
        _linear(more=["split input=y -> z z chunks=2"], output="z"),
        _linear(more=["rnn input=y weights=w,b -> z mode=RNN_TANH bias=0"], output="z"),
        _linear(more=["rnn input=y weights=w,b -> z mode=OTHER bias=0"], output="z"),
        _linear(more=[f"select {last} dim=9 index=0"], output="z"),
        _linear(more=[f"select {last} dim=1 index=7"], output="z"),
        _linear(more=[f"permute {last} dims=0,0"], output="z"),
        _linear(more=[f"max_pool {last} kernel=2"], output="z"),
        _linear(more=["embedding input=x weight=w -> z"], output="z"),
        _linear(output="x"),
        _linear(output="y,y"),
        _linear(output="w"),
    )  # fmt: skip
    bad(5, torch.ones(3), torch.ones(2).double())
    freed = numbers.clone()
    freed.untyped_storage().resize_(0)
    adam = numbers.clone()
    adam[4] = 1  # with none of its states
    bad(6, [], [0, 0, 0], [0, 0] * 3, [1, 0, 0, 0], [-2, 0, 0, 0], [0, 0, 0, 16], [0, 2**63 - 1, 0, 0], [0, 1, 0, 0])
    bad(7, freed, adam)
    bad(7, numbers[:-1], numbers.float(), torch.full_like(numbers, 99.0), torch.full_like(numbers, float("nan")))
    bad(7, torch.full_like(numbers, -5.0), numbers[:6], numbers.repeat(2)[::2])


def test_a_bound_step_is_safe() -> None:
    x, y, weight = torch.randn(4, 3), torch.randn(4, 2), torch.randn(2, 3)
    bind, run = torch.ops.fastnn.bind_training_step, torch.ops.fastnn.bound_training_step
    text = "fastnn.network 1\ninput -> x\nweight -> w sizes=2,3\nlinear input=x weight=w -> y\noutput input=y"
    bound = bind([weight], [], text, None, [0, 0])
    expected = F.mse_loss(x @ weight.t(), y)
    assert_close(run(x, y, bound, NUMBERS), expected)
    for bad in (bound + 1000, bound.double(), bound.repeat(2), bound[:0], -bound, bound.to("meta")):
        with pytest.raises(RuntimeError):
            run(x, y, bad, NUMBERS)
    for edit in (
        lambda: weight.resize_(3, 3),
        lambda: weight.resize_(2, 3).t_(),
        lambda: weight.t_().untyped_storage().resize_(3),
    ):
        edit()
        with pytest.raises(RuntimeError):
            run(x, y, bound, NUMBERS)
    _C.release_training_step(int(bound))
    _C.release_training_step(int(bound))
    with pytest.raises(RuntimeError, match="no step is bound"):
        run(x, y, bound, NUMBERS)
    with pytest.raises(TypeError):
        _C.release_training_step(2**63)


def test_steps_let_go_of_what_they_were_bound_to() -> None:
    model, x, y = batch("autoencoder")
    parameter = weakref.ref(next(model.parameters()))
    step = fastnn.training_step(model, F.mse_loss, torch.optim.Adam(model.parameters()), strict=True)
    step(x, y)
    del model, step
    gc.collect()
    assert parameter() is None


def test_the_raw_operator_is_safe_with_batch_norm() -> None:
    x, weight = torch.randn(2, 3, 6, 6), torch.randn(3, 3, 3, 3)
    statistics = [torch.zeros(3), torch.ones(3), torch.ones(3), torch.zeros(3)]
    norm = "batch_norm input=x mean=w0 variance=w1 weight=w2 bias=w3 -> y dims=2 momentum=0.5 epsilon=0.5"
    norm += " activation=relu"

    def run(parameters: list[Tensor], line: str, trained: int) -> None:
        layout = [-1, 0] * (len(parameters) - trained) + [0, 0] * trained
        weights = [f"weight -> w{i} sizes=" for i in range(len(parameters))]
        text = "\n".join(["fastnn.network 1", "input -> x", *weights, line, "output input=y"])
        torch.ops.fastnn.training_step([x], x, parameters, [], text, None, layout, NUMBERS, False)

    run(statistics, norm, 2)
    for parameters, program, trained in (
        (statistics, norm, 4),  # running statistics have no gradient
        ([*statistics[:3], torch.zeros(2)], norm, 2),
        (statistics, norm.replace("dims=2", "dims=1"), 2),
        (statistics, norm.replace("relu", "tanh"), 2),
        (statistics, norm.replace("variance=w1 ", ""), 2),
        (statistics, norm + " pool=9", 2),
        ([weight], "conv input=x weight=w0 -> y padding=2147483648", 1),
        ([weight], "conv input=x weight=w0 -> y padding=1 stride=2147483648 dilation=2147483648", 1),
        ([weight], "conv input=x weight=w0 -> y padding=1 stride=0", 1),
        ([weight], "conv input=x weight=w0 -> y padding=1 groups=2", 1),
        ([weight], "conv input=x weight=w0 -> y padding=1,1,1", 1),
        ([weight], "conv input=x weight=w0 -> y padding=1 activation=tanh", 1),
        ([weight[:, :, :1, :1].contiguous()], "conv input=x weight=w0 -> y stride=2 padding=1", 1),
        ([weight], "conv_transpose input=x weight=w0 -> y groups=2", 1),
        ([weight], "conv_transpose input=x weight=w0 -> y padding=2147483648", 1),
    ):
        with pytest.raises(RuntimeError):
            run(parameters, program, trained)


# ---- what a step is held to by the loop that it stands for ------------------------------------------------------


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).double()


def small_batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 8, generator=generator).double(), torch.randn(5, 4, generator=generator).double()


@pytest.mark.parametrize("keep", [False, True])
def test_gradients_that_lie_there_count(keep: bool) -> None:
    """Those of micro-batches, of which a step is the last."""
    model = small()
    mine, (theirs, ours) = copy.deepcopy(model), (None, None)
    theirs, ours = (torch.optim.SGD(one.parameters(), 0.5) for one in (model, mine))
    step = fastnn.training_step(mine, F.mse_loss, ours, keep_gradients=keep, strict=True)
    for number in range(3):
        for one, optimizer in ((model, theirs), (mine, ours)):
            if keep:
                optimizer.zero_grad()
            x, y = small_batch(2 * number)
            F.mse_loss(one(x), y).backward()
        x, y = small_batch(2 * number + 1)
        F.mse_loss(model(x), y).backward()
        theirs.step()
        step(x, y)
        assert "gradients lay in p.grad" in step.explain()
        if not keep:
            theirs.zero_grad()
        check_same((mine, ours), (model, theirs))
    theirs.zero_grad()
    assert_close(step(*small_batch()), ordinary(model, F.mse_loss, theirs, *small_batch()))
    assert step.explain() == "one operator call: linear; linear"
    if keep:
        F.mse_loss(mine(x), y).backward()
        with pytest.raises(RuntimeError, match="gradients that the optimizer has used already"):
            step(x, y)


@pytest.mark.parametrize("keep", [False, True])
def test_gradients_that_are_zeroed_in_place(keep: bool) -> None:
    model = small()
    mine = copy.deepcopy(model)
    theirs, ours = (torch.optim.SGD(one.parameters(), 0.5) for one in (model, mine))
    step = fastnn.training_step(mine, F.mse_loss, ours, keep_gradients=keep)
    for number in range(4):
        x, y = small_batch(number)
        ordinary(model, F.mse_loss, theirs, x, y)
        if number == 1:
            ordinary(mine, F.mse_loss, ours, x, y)
        else:
            step(x, y)
        for optimizer in (theirs, ours):
            optimizer.zero_grad(set_to_none=False)
        for one, other in zip(mine.parameters(), model.parameters(), strict=True):
            assert_close(one, other)


@pytest.mark.parametrize("keep", [False, True])
def test_another_optimizer(keep: bool) -> None:
    model = small()
    mine = copy.deepcopy(model)
    step = fastnn.training_step(
        mine, F.mse_loss, torch.optim.SGD(mine.parameters(), 0.5, momentum=0.9), keep_gradients=keep
    )
    theirs = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    for number in range(6):
        if number == 3:
            theirs = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
            step.optimizer = torch.optim.SGD(mine.parameters(), 0.5, momentum=0.9)
        x, y = small_batch(number)
        assert_close(step(x, y), ordinary(model, F.mse_loss, theirs, x, y))
        if keep:
            for one, other in zip(mine.parameters(), model.parameters(), strict=True):
                assert_close(one.grad, other.grad)
        assert step.explain() == "one operator call: linear; linear"
        theirs.zero_grad()
        for one, other in zip(mine.parameters(), model.parameters(), strict=True):
            assert_close(one, other)


def test_a_model_that_has_its_own_step() -> None:
    model = small()
    model.step = fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), 0.5))  # type: ignore
    twin = copy.deepcopy(model)
    assert twin.step is not model.step
    assert twin.step.model is twin
    assert twin.step.explain() == "one operator call: linear; linear"
    assert_close(twin.step(*small_batch()), model.step(*small_batch()))
    for one, other in zip(twin.parameters(), model.parameters(), strict=True):
        assert_close(one, other)


def test_gradients_that_the_optimizer_has_used_do_not_count() -> None:
    model = small()
    mine = copy.deepcopy(model)
    theirs, ours = (torch.optim.Adam(one.parameters(), 0.1) for one in (model, mine))
    for number in range(6):
        x, y = small_batch(number)
        if number == 2:
            step = fastnn.training_step(mine, F.mse_loss, ours, strict=True)
        expected = ordinary(model, F.mse_loss, theirs, x, y)
        assert_close(ordinary(mine, F.mse_loss, ours, x, y) if number < 2 or number == 4 else step(x, y), expected)
    check_same((mine, ours), (model, theirs))


@pytest.mark.parametrize("kind", ["reads", "calls in eval", "calls in training"])
def test_a_loss_sees_what_the_forward_has_moved(kind: str) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=0.5), nn.ReLU(), nn.Linear(8, 3)
        return nn.Sequential(*layers).double()

    def loss_of(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(output: Tensor, target: Tensor) -> Tensor:
            if kind == "reads":
                moved = model[1].running_mean[:3] * model[1].num_batches_tracked
                return F.mse_loss(output, target) + (output.mean(0) - moved).square().sum()
            with torch.no_grad():
                model.train("training" in kind)
                other = model(3 * x + 1)
                model.train()
            return F.mse_loss(output, target) + F.mse_loss(output, other)

        return loss

    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(5, 6, generator=generator).double(), torch.randn(5, 3, generator=generator).double()
    model, mine = made(), made()
    theirs, ours = (torch.optim.SGD(one.parameters(), 0.1) for one in (model, mine))
    step = fastnn.training_step(mine, loss_of(mine), ours, strict=True)
    for _ in range(3):
        assert_close(step(x, y), ordinary(model, loss_of(model), theirs, x, y))
    assert step.explain().startswith("two operator calls")
    check_same((mine, ours), (model, theirs))


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6, 1e12])
def test_cross_entropy_keeps_what_logits_have_in_common(offset: float) -> None:
    model = nn.Linear(4, 4).double()
    nn.init.eye_(model.weight)
    nn.init.zeros_(model.bias)
    x, y = torch.randn(8, 4).double() + offset, torch.arange(8) % 4
    step = fastnn.training_step(nn.Sequential(model), F.cross_entropy, torch.optim.SGD(model.parameters(), 0.0))
    expected = F.cross_entropy(model(x), y)
    assert_close(step(x, y), expected.detach(), rtol=1e-12, atol=0)


def test_a_refused_forward_gives_its_random_numbers_back() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.gru, self.fc = nn.Dropout(0.5), nn.GRU(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.gru(self.drop(x))[0])

    model = Network()
    mine, x, y = copy.deepcopy(model), torch.randn(5, 6), torch.randn(5, 3)  # without a batch
    step = fastnn.training_step(mine, F.mse_loss, torch.optim.SGD(mine.parameters(), 0.1), strict=True)
    torch.manual_seed(1)
    expected = F.mse_loss(model(x), y)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert_close(step(x, y), expected.detach())
    assert torch.equal(torch.get_rng_state(), state)


def test_settings_that_are_tensors_within_a_tuple() -> None:
    model = small()
    mine = copy.deepcopy(model)
    theirs, ours = (
        torch.optim.Adam(one.parameters(), 0.1, betas=(torch.tensor(0.9), torch.tensor(0.999))) for one in (model, mine)
    )
    step = fastnn.training_step(mine, F.mse_loss, ours)
    for number in range(4):
        if number == 2:
            for optimizer in (theirs, ours):
                optimizer.param_groups[0]["betas"][0].fill_(0.1)
        assert_close(step(*small_batch(number)), ordinary(model, F.mse_loss, theirs, *small_batch(number)))
    assert "a setting of the optimizer is a tensor" in step.explain()


def test_an_optimizers_step_that_is_replaced_is_called() -> None:
    model, calls = small(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = fastnn.training_step(model, F.mse_loss, optimizer, strict=True)
    step(*small_batch())
    real = optimizer.step
    optimizer.step = lambda *args: calls.append(1) or real(*args)  # type: ignore[method-assign, func-returns-value]
    step(*small_batch())
    assert len(calls) == 1
    assert "the optimizer's step has been replaced" in step.explain()


@pytest.mark.parametrize("is_bound", [False, True])
@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("loss", [F.mse_loss, lambda output, target: torch.linalg.norm(output - target)])
def test_a_step_that_is_replaced_on_the_optimizers_class_is_called(
    is_bound: bool, wraps: bool, loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """functools.wraps copies the name, module and attributes of torch's function to the one in its place."""
    model, calls = small(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = fastnn.training_step(model, loss, optimizer)
    if is_bound:
        step(*small_batch())
    real = torch.optim.SGD.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", functools.wraps(real)(counted) if wraps else counted)
    for number in range(3):
        step(*small_batch())
        assert len(calls) == number + 1
    assert "the optimizer's step has been replaced" in step.explain()


def test_l1_loss_at_nan() -> None:
    model = small()
    mine, (x, y) = copy.deepcopy(model), small_batch()
    y[0, 0] = torch.nan
    step = fastnn.training_step(mine, F.l1_loss, torch.optim.SGD(mine.parameters(), 0.1), keep_gradients=True)
    F.l1_loss(model(x), y).backward()
    step(x, y)
    for p, q in zip(mine.parameters(), model.parameters(), strict=True):
        assert_close(p.grad, q.grad)


class SumOfInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        return self.fc(a + b) * scale


@pytest.mark.parametrize("wrong", [torch.randn(2, 8), {"a": 1, "b": 2}])
def test_several_inputs_come_in_nothing_else(wrong: Any) -> None:
    model = SumOfInputs()
    step = fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(TypeError, match="the model takes 2 inputs, in a tuple, got a"):
        step(wrong, torch.zeros(4))


def test_arguments_that_no_step_can_call() -> None:
    class OnlyByName(SumOfInputs):
        def forward(self, a: Tensor, *, b: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(a, b)

    model = OnlyByName()
    with pytest.raises(TypeError, match=r"a step gives a model its inputs, and OnlyByName takes \(a: .*'b'"):
        fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters()))
    with pytest.raises(TypeError, match=r"a step gives no closure, and LBFGS\.step takes"):
        fastnn.training_step(small(), F.mse_loss, torch.optim.LBFGS(small().parameters()))


def test_several_inputs_come_in_a_tuple() -> None:
    mine, theirs = SumOfInputs().double(), SumOfInputs().double()
    theirs.load_state_dict(mine.state_dict())
    step = fastnn.training_step(mine, F.mse_loss, torch.optim.Adam(mine.parameters()))
    optimizer = torch.optim.Adam(theirs.parameters())
    for _ in range(3):
        a, b, y = torch.randn(5, 8).double(), torch.randn(5, 8).double(), torch.randn(5, 4).double()
        optimizer.zero_grad()
        loss = F.mse_loss(theirs(a, b), y)
        loss.backward()
        optimizer.step()
        assert_close(step((a, b), y), loss.detach())
    assert_close(dict(mine.named_parameters()), dict(theirs.named_parameters()))
    assert "one operator call" in step.explain()


def test_gradients_are_kept_from_when_it_is_said_until_it_is_not() -> None:
    mine, x, y = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(5, 4), torch.randn(5, 3)
    step = fastnn.training_step(mine, F.mse_loss, torch.optim.SGD(mine.parameters(), 0.1), strict=True)
    for keep_gradients in (False, True, False):
        step.keep_gradients = keep_gradients
        step(x, y)
        assert all((p.grad is not None) == keep_gradients for p in mine.parameters())
        assert "ordinary" not in step.explain()


@pytest.mark.parametrize("keep_gradients", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_accumulate(keep_gradients: bool, max_norm: float | None) -> None:
    """Micro-batches train as one batch does, again and again, with steps of one batch between them."""
    mine = small()
    theirs = copy.deepcopy(mine)
    step = fastnn.training_step(
        mine, F.mse_loss, torch.optim.Adam(mine.parameters()), max_norm=max_norm, keep_gradients=keep_gradients
    )
    optimizer = torch.optim.Adam(theirs.parameters())
    for together in (3, 1, 1, 2):
        batches = [small_batch() for _ in range(together)]
        optimizer.zero_grad()
        losses = [F.mse_loss(theirs(x), y) for x, y in batches]
        for loss in losses:
            loss.backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        optimizer.step()
        found = [step.accumulate(x, y) for x, y in batches[:-1]] + [step(*batches[-1])]
        assert_close(found, [loss.detach() for loss in losses])
        assert_close(dict(mine.named_parameters()), dict(theirs.named_parameters()))
        assert all((p.grad is not None) == keep_gradients for p in mine.parameters())


def test_explain_says_why_the_last_step_was_another() -> None:
    model = small().float()
    step = fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), 0.1), strict=True)
    x, y = (one.float() for one in small_batch())
    with torch.autocast("cpu", torch.bfloat16):
        step(x, y)
    assert "the last step went the ordinary way: autocast" in step.explain()
    step(x, y)
    assert step.explain() == "one operator call: linear; linear"


# ---- parameters that the optimizer does not have ----------------------------------------------------------------


@pytest.mark.parametrize("loss", [F.cross_entropy, lambda output, target: F.cross_entropy(output, target)])
@pytest.mark.parametrize("head", [nn.Linear(16, 4), nn.Sequential(nn.Linear(16, 4), nn.Hardshrink())])
def test_a_head_first_then_the_body(head: nn.Module, loss: Any) -> None:
    """Steps leave no gradient where the optimizer has no parameter, so that none counts once it has."""
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), copy.deepcopy(head)).double()
    mine = copy.deepcopy(stock)
    x, y = torch.randn(9, 6).double(), torch.randint(0, 4, (9,))
    theirs, ours = (torch.optim.SGD(model[2].parameters(), 0.1) for model in (stock, mine))
    step = fastnn.training_step(mine, loss, ours)
    for number in range(8):
        if number == 4:
            for model, optimizer in ((stock, theirs), (mine, ours)):
                optimizer.add_param_group({"params": model[0].parameters()})
        assert_close(step(x, y), ordinary(stock, loss, theirs, x, y))
        assert all(p.grad is None for p in mine.parameters())
    assert_close(mine.state_dict(), stock.state_dict())


def test_a_layer_that_is_never_called_is_left_alone() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    torch.manual_seed(0)
    stock = Spare().double()
    mine = copy.deepcopy(stock)
    x = torch.randn(5, 4).double()
    theirs, ours = (torch.optim.AdamW(model.parameters(), 0.1) for model in (stock, mine))
    step = fastnn.training_step(mine, F.mse_loss, ours, strict=True)
    for _ in range(3):
        assert_close(step(x, x), ordinary(stock, F.mse_loss, theirs, x, x))
    check_same((mine, ours), (stock, theirs))


@pytest.mark.parametrize("settings", [{}, {"max_norm": 0.5}, {"keep_gradients": True}])
def test_gradients_of_parameters_outside_the_model(settings: dict[str, Any]) -> None:
    """A gradient that the caller has left in another of the optimizer's parameters counts at every step, not only at
    the first."""
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    other = nn.Parameter(torch.ones(3, dtype=torch.float64))
    model, own_other = copy.deepcopy(stock), copy.deepcopy(other)
    stock_optimizer = torch.optim.Adam([*stock.parameters(), other], 0.1)
    optimizer = torch.optim.Adam([*model.parameters(), own_other], 0.1)
    step = fastnn.training_step(model, F.cross_entropy, optimizer, **settings)
    for turn in range(6):
        x, y = torch.randn(5, 8, dtype=torch.float64), torch.randint(4, (5,))
        if turn % 2:
            for one in (other, own_other):
                (turn * one.square()).sum().backward()
        F.cross_entropy(stock(x), y).backward()
        if "max_norm" in settings:
            nn.utils.clip_grad_norm_([*stock.parameters(), other], settings["max_norm"])
        stock_optimizer.step()
        stock_optimizer.zero_grad()
        step(x, y)
        assert_close(model.state_dict(), stock.state_dict())
        assert_close(own_other, other)


class _Checked(nn.Module):
    """Its backward raises where a gradient is not finite, when the second layer has its gradient already."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if h.requires_grad:
            h.register_hook(self.check)
        return self.b(h)

    def check(self, gradient: Tensor) -> None:
        if not gradient.isfinite().all():
            raise FloatingPointError("not finite")


@pytest.mark.parametrize("accumulates", [False, True])
def test_a_step_that_raises_in_backward_leaves_no_gradients(accumulates: bool) -> None:
    torch.manual_seed(0)
    model = _Checked().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = fastnn.training_step(model, F.mse_loss, optimizer)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    if accumulates:
        step.accumulate(x, y)
    before = copy.deepcopy([p.grad for p in model.parameters()])
    with pytest.raises(FloatingPointError):
        step(x, y * torch.nan)
    assert_close([p.grad for p in model.parameters()], before)
    stock = copy.deepcopy(model)
    F.mse_loss(stock(x), y).backward()
    step(x, y)
    for p, other, gradient in zip(model.parameters(), stock.parameters(), before, strict=True):
        assert other.grad is not None
        assert_close(p, other - 0.1 * (other.grad if gradient is None else other.grad + gradient))


def test_groups_that_exchange_their_parameters() -> None:
    """What is trained after the exchange are the optimizer's parameters, also where steps go the ordinary way."""
    torch.manual_seed(0)
    model = _Checked().double()
    optimizer = torch.optim.SGD(model.b.parameters(), 0.1)
    step = fastnn.training_step(model, F.mse_loss, optimizer)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    step(x, y)
    optimizer.param_groups[0]["params"] = list(model.a.parameters())
    stock = copy.deepcopy(model)
    F.mse_loss(stock(x), y).backward()
    step(x, y)
    assert_close(model.a.weight, stock.a.weight - 0.1 * stock.a.weight.grad)
    assert_close(model.b.weight, stock.b.weight)
    assert model.b.weight.grad is None


@pytest.mark.parametrize("by_hooks", [True, False])
def test_kept_gradients_count_once_where_a_step_calls_no_hooks(by_hooks: bool) -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    model = copy.deepcopy(stock)
    optimizers = [torch.optim.SGD(one.parameters(), 0.1) for one in (stock, model)]
    if not by_hooks:
        for one in optimizers:
            one.step = types.MethodType(torch.optim.SGD.step.__wrapped__, one)  # type: ignore[method-assign, attr-defined]
    step = fastnn.training_step(model, F.mse_loss, optimizers[1], keep_gradients=True)
    for _ in range(4):
        x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
        optimizers[0].zero_grad()
        F.mse_loss(stock(x), y).backward()
        optimizers[0].step()
        step(x, y)
        assert_close(model.state_dict(), stock.state_dict())
        assert_close([p.grad for p in model.parameters()], [p.grad for p in stock.parameters()])


def test_betas_in_a_list_that_is_changed_in_place() -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    model = copy.deepcopy(stock)
    optimizers = [torch.optim.Adam([{"params": one.parameters(), "betas": [0.9, 0.999]}]) for one in (stock, model)]
    step = fastnn.training_step(model, F.mse_loss, optimizers[1], strict=True)
    for turn in range(4):
        x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
        for one in optimizers:
            one.param_groups[0]["betas"][0] = 0.9 - 0.2 * turn
        optimizers[0].zero_grad()
        F.mse_loss(stock(x), y).backward()
        optimizers[0].step()
        step(x, y)
        assert_close(model.state_dict(), stock.state_dict())


def test_the_model_of_a_step_cannot_be_exchanged() -> None:
    model = nn.Linear(3, 2)
    step = fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(AttributeError):
        step.model = nn.Linear(3, 2)  # type: ignore[misc]
    assert step.model is model
