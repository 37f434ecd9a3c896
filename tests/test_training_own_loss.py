"""Losses of the user's own in a training step: part of the network where it has what they consist of, called between
two operators elsewhere, and in each case what stock's loop does."""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import fastnn

ONE, TWO, ORDINARY = "one operator call", "two operator calls", "forward and backward by autograd"


class Net(nn.Module):
    """A row of 4 through a hidden layer to a row of 3."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class Heads(Net):
    """Two results: scores and a value."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden = torch.tanh(self.first(x))
        return self.last(hidden), self.value(hidden).squeeze(-1)


def _made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


def _rows(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)), dtype=torch.float64)


X, Y = _rows(7, 4), _rows(7, 3)
CLASSES = torch.tensor([0, 2, 1, 1, 0, 2, 2])
SHARES = F.softmax(_rows(7, 3), -1).index_put((torch.tensor([0]), torch.tensor([1])), torch.tensor(0.0).double())
WEIGHTS = torch.tensor([1.0, 0.5, 3.0], dtype=torch.float64)


def _check(
    loss_for: Callable[[nn.Module], Callable[[Any, Any], Tensor]], target: Any, how: str, kind: type[nn.Module] = Net,
    change: Callable[[int], None] = lambda number: None, steps: int = 4, **settings: Any,
) -> fastnn.TrainingStep:  # fmt: skip
    """Steps of ours and of stock's from the same state. loss_for: gives a model's loss. change: is called before each
    step, of both."""
    mine, stock = _made(kind), _made(kind)
    # Decay and momentum show whether a parameter without a gradient is left alone.
    ours, theirs = (torch.optim.AdamW(m.parameters(), 0.02, weight_decay=0.3) for m in (mine, stock))
    step = fastnn.training_step(mine, loss_for(mine), ours, **settings)
    own, other = copy.deepcopy(target), copy.deepcopy(target)
    loss = loss_for(stock)
    for number in range(steps):
        change(number)
        torch.manual_seed(number)
        found, after = step(X, own), torch.get_rng_state()
        change(number)
        torch.manual_seed(number)
        theirs.zero_grad()
        expected = loss(stock(X), other)
        expected.backward()
        if "max_norm" in settings:
            nn.utils.clip_grad_norm_(stock.parameters(), settings["max_norm"])
        theirs.step()
        assert torch.equal(after, torch.get_rng_state())
        assert found.shape == expected.shape
        assert not found.requires_grad
        assert_close(found, expected.detach(), rtol=1e-9, atol=1e-12)
    assert step.explain().startswith(how), step.explain()
    assert_close(mine.state_dict(), stock.state_dict(), rtol=1e-8, atol=1e-10)
    assert_close(own, other, rtol=0, atol=0)  # stock's loss may have changed it in place, too
    return step


def _focal(output: Tensor, target: Tensor) -> Tensor:
    each = F.cross_entropy(output, target, reduction="none")
    return ((1 - torch.exp(-each)) ** 2 * each).mean()


LOSSES: dict[str, tuple[Callable[[Any, Any], Tensor], Any, str]] = {
    "weighted squares": (lambda y, t: (WEIGHTS * (y - t) ** 2).mean(), Y, ONE),
    "root of the mean": (lambda y, t: torch.sqrt(F.mse_loss(y, t)), Y, ONE),
    "norm": (lambda y, t: (y - t).norm(dim=1).sum(), Y, ONE),
    "by the batch": (lambda y, t: ((y - t) ** 2).sum() / y.shape[0] + (y - t).abs().sum() / len(y), Y, ONE),
    "quantile": (lambda y, t: torch.maximum(0.9 * (t - y), -0.1 * (t - y)).mean(), Y, ONE),
    "clipped, as of PPO": (lambda y, t: -torch.min(y * t, torch.clamp(y, 0.8, 1.2) * t).mean(), Y, ONE),
    "the larger": (lambda y, t: torch.max(y, t).sum(), Y, ONE),
    "some columns": (lambda y, t: F.l1_loss(y[:, 1:], t[:, 1:]), Y, ONE),
    "masked": (lambda y, t: (((y - t) ** 2) * (t > 0).double()).sum() / (t > 0).sum(), Y, ONE),
    "cosine": (lambda y, t: 1 - F.cosine_similarity(y, t).mean(), Y, ONE),
    "contrast": (lambda y, t: F.cross_entropy(y @ t.mT, torch.arange(len(y))), Y, ONE),
    "focal": (_focal, CLASSES, ONE),
    "classes with weights": (lambda y, t: F.cross_entropy(y, t, weight=WEIGHTS), CLASSES, ONE),
    "a sum over classes with weights": (
        lambda y, t: F.nll_loss(F.log_softmax(y, 1), t, weight=WEIGHTS, reduction="sum"), CLASSES, ONE,
    ),
    "each class with its weight": (
        lambda y, t: F.cross_entropy(y, t, weight=WEIGHTS, reduction="none").square().mean(), CLASSES, ONE,
    ),
    "smoothed labels": (lambda y, t: 2 * F.cross_entropy(y, t, label_smoothing=0.1), CLASSES, ONE),
    "smoothed labels, a sum": (
        lambda y, t: F.cross_entropy(y, t, label_smoothing=0.3, reduction="sum") / 7, CLASSES, ONE,
    ),
    "gathered": (lambda y, t: -F.log_softmax(y, -1).gather(1, t[:, None]).mean(), CLASSES, ONE),
    "gathered by a column": (lambda y, t: F.mse_loss(y.gather(-1, t), y.new_ones(7, 1)), CLASSES[:, None], ONE),
    "divergence": (lambda y, t: F.kl_div(F.log_softmax(y, -1), t, reduction="batchmean"), SHARES, ONE),
    "divergence of logarithms": (
        lambda y, t: F.kl_div(F.log_softmax(y, -1), t, reduction="sum", log_target=True), F.log_softmax(Y, -1), ONE,
    ),
    "from a teacher": (
        lambda y, t: nn.KLDivLoss(reduction="none")(F.log_softmax(y / 2, -1), F.softmax(t / 2, -1)).mean(), Y, ONE,
    ),
    "of probabilities": (lambda y, t: F.binary_cross_entropy(torch.sigmoid(y), t), SHARES, ONE),
    "of probabilities, each": (
        lambda y, t: F.binary_cross_entropy(y.sigmoid(), (t > 0).double(), reduction="none").amax(1).sum(), Y, ONE,
    ),
    "of probabilities that are targets": (
        lambda y, t: F.binary_cross_entropy(t[:, 1:], torch.sigmoid(y[:, 1:]), reduction="sum")
        + F.binary_cross_entropy(torch.sigmoid(y[:, :1]), torch.sigmoid(y[:, 1:2])),
        F.softmax(Y, -1), ONE,
    ),
    "of weighted probabilities": (
        lambda y, t: F.binary_cross_entropy(torch.sigmoid(y), t, weight=WEIGHTS), SHARES, TWO,
    ),
    "of counts": (lambda y, t: F.poisson_nll_loss(y, t), Y.abs().round(), ONE),
    "of counts and their rates": (
        lambda y, t: F.poisson_nll_loss(y.exp(), t, log_input=False, eps=1e-3, reduction="sum"), Y.abs().round(), ONE,
    ),
    "of counts, in full": (lambda y, t: F.poisson_nll_loss(y, t, full=True), Y.abs().round(), TWO),
    "several tensors": (lambda y, t: F.mse_loss(y, t[0]) + F.cross_entropy(y, t[1]), (Y, CLASSES), ONE),
    "a list of tensors": (lambda y, t: F.mse_loss(y, t[0]) * t[1].mean(), [Y, _rows(3)], ONE),
    "unpacked": (lambda y, t: sum(F.mse_loss(y, one) for one in t), (Y, Y + 1), ONE),
    "a choice by booleans": (lambda y, t: torch.where(t[1], y, t[0]).square().mean(), (Y, Y > 0), ONE),
    "by its class": (lambda y, t: F.mse_loss(y, t) if isinstance(t, Tensor) else y.sum(), Y, ONE),
    "by values": (lambda y, t: F.mse_loss(y, t) if y.sum() > 0 else F.l1_loss(y, t), Y, TWO),
    "changes the target": (lambda y, t: (y - t.mul_(0.5)).square().mean(), Y, TWO),
    "one number in a row": (lambda y, t: ((y - t) ** 2).mean().reshape(1), Y, TWO),
    "noise on the target": (lambda y, t: F.mse_loss(y, t + 0.1 * torch.randn_like(t)), Y, ONE),
    "half detached": (lambda y, t: F.mse_loss(y, t) + F.l1_loss(y[:, :1], y.detach()[:, 1:2]), Y, ONE),
    "another class": (lambda y, t: F.mse_loss(y, t["target"]), {"target": Y}, TWO),
    "half of it": (lambda y, t: F.mse_loss(y, t.chunk(2, dim=1)[0]), torch.cat([Y, Y], 1), ONE),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_as_stock(name: str) -> None:
    loss, target, how = LOSSES[name]
    _check(lambda model: loss, target, how)


@pytest.mark.parametrize("settings", [{"max_norm": 0.1}, {"keep_gradients": True}])
def test_with_settings(settings: dict[str, Any]) -> None:
    loss, target, how = LOSSES["several tensors"]
    step = _check(lambda model: loss, target, how, **settings)
    gradients = [p.grad for p in step.model.parameters()]
    assert all((gradient is not None) == ("keep_gradients" in settings) for gradient in gradients)


def test_several_results() -> None:
    def loss(results: tuple[Tensor, Tensor], target: tuple[Tensor, ...]) -> Tensor:
        scores, value = results
        actions, returns, before = target
        log_probability = F.log_softmax(scores, -1).gather(1, actions.unsqueeze(1)).squeeze(1)
        ratio, gain = torch.exp(log_probability - before), returns - value.detach()
        surrogate = -torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
        entropy = -(F.softmax(scores, -1) * F.log_softmax(scores, -1)).sum(-1).mean()
        return surrogate + 0.5 * F.mse_loss(value, returns) - 0.01 * entropy

    _check(lambda model: loss, (CLASSES, _rows(7), -_rows(7).abs()), ONE, Heads)


def test_one_of_the_results_alone() -> None:
    """The other's layer has no gradient, and stock's optimizer leaves it alone."""
    _check(lambda model: lambda results, target: F.mse_loss(results[0], target), Y, ONE, Heads)


@pytest.mark.parametrize("module", [nn.BCELoss(), nn.BCELoss(reduction="sum"), nn.PoissonNLLLoss(log_input=False)])
def test_losses_of_probabilities_and_rates(module: nn.Module) -> None:
    _check(lambda model: lambda results, target: results[1].square().mean() + module(results[0].sigmoid(), target),
           SHARES, ONE, Heads)  # fmt: skip

    class Ends(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sigmoid()

    _check(lambda model: module, SHARES, ONE, Ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_of_exactly_0_and_1(dtype: torch.dtype) -> None:
    """The loss is 100 at most and its derivative 1e12. What is no probability is refused in torch's words."""
    targets = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.3, 1.0, 0.0]], dtype=dtype)

    def losses(kind: Callable[[nn.Module], nn.Module], last: float) -> tuple[Tensor, Tensor]:
        model = nn.Hardtanh(0.0, 2.0)
        scale = nn.Parameter(torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1e-40, last], dtype=dtype))

        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale, self.inner = scale, model

            def forward(self, x: Tensor) -> Tensor:
                return F.binary_cross_entropy(self.scale * x, targets, reduction="none")

        result = kind(Scaled())(torch.ones(1, 7, dtype=dtype))
        result.sum().backward()
        assert scale.grad is not None
        return result.detach(), scale.grad

    assert_close(losses(fastnn.fuse, 1 - 1e-7), losses(lambda model: model, 1 - 1e-7), rtol=1e-6, atol=1e-9)
    for last in (-1e-7, 1.5, math.nan):
        with pytest.raises(RuntimeError, match="all elements of input should be between 0 and 1"):
            losses(fastnn.fuse, last)


def test_targets_that_are_no_probabilities() -> None:
    """Torch's loss takes them or refuses them, as the version of torch does."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()).double()
    stock = copy.deepcopy(model)
    step = fastnn.training_step(model, nn.BCELoss(), torch.optim.SGD(model.parameters(), 0.1))
    for target in (SHARES, Y, SHARES):
        expected: Any = None
        try:
            expected = F.binary_cross_entropy(stock(X), target).detach()
        except RuntimeError as error:
            with pytest.raises(RuntimeError, match=str(error)):
                step(X, target)
        else:
            assert_close(step(X, target), expected)
        stock.load_state_dict(model.state_dict())


def test_a_penalty_on_parameters() -> None:
    def loss_for(model: Any) -> Callable[[Any, Any], Tensor]:
        return lambda y, t: F.mse_loss(y, t) + 0.1 * model.first.weight.square().sum() + model.last.bias.abs().sum()

    _check(loss_for, Y, ONE)


class Uncertain(nn.Module):
    """A loss with a parameter and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.full((), 0.5, dtype=torch.float64))
        self.register_buffer("weights", WEIGHTS.clone())
        self.inner = nn.CrossEntropyLoss(weight=WEIGHTS.clone(), reduction="none")

    def forward(self, y: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        of_values = (self.weights * (y - target[0]) ** 2).mean()
        return torch.exp(-self.log_variance) * of_values + self.log_variance + self.inner(y, target[1]).mean()


@pytest.mark.parametrize("is_trained", [True, False])
def test_a_loss_with_parameters(is_trained: bool) -> None:
    """Those that the optimizer has are trained; others get their gradient, as in stock's loop."""
    results = []
    for fused in (True, False):
        model, loss = _made(Net), Uncertain()
        parameters = [*model.parameters(), *(loss.parameters() if is_trained else ())]
        optimizer = torch.optim.Adam(parameters, 0.05)
        target = Y, CLASSES
        step = fastnn.training_step(model, loss, optimizer) if fused else None
        for _ in range(3):
            if step is not None:
                step(X, target)
            else:
                optimizer.zero_grad()
                loss(model(X), target).backward()
                optimizer.step()
        if step is not None:
            assert step.explain().startswith(ONE if is_trained else ORDINARY)
        gradient = None if is_trained else loss.log_variance.grad
        results.append((model.state_dict(), loss.state_dict(), gradient))
    assert_close(*results, rtol=1e-9, atol=1e-12)


def test_what_changes_between_steps() -> None:
    """A setting in a closure, in an object and in a module, and a tensor."""

    class Annealed:
        factor = 0.0

        def __call__(self, y: Tensor, t: Tensor) -> Tensor:
            return self.factor * F.mse_loss(y, t) + F.l1_loss(y, t)

    annealed, share, weights = Annealed(), [0.0], WEIGHTS.clone()

    def set_factor(number: int) -> None:
        annealed.factor = number / 3

    def set_share(number: int) -> None:
        share[0] = number / 3
        weights.fill_(1 + number)

    _check(lambda model: annealed, Y, ONE, change=set_factor)
    _check(lambda model: lambda y, t: share[0] * F.mse_loss(y, t) + (weights * y).sum(), Y, ONE, change=set_share)
    module = nn.HuberLoss(reduction="none")

    def set_delta(number: int) -> None:
        module.delta = 0.5 + number

    _check(lambda model: lambda y, t: module(y, t).sum(), Y, ONE, change=set_delta)


def test_another_loss_and_another_form_of_target() -> None:
    mine, stock = _made(Net), _made(Net)
    ours, theirs = (torch.optim.SGD(m.parameters(), 0.1) for m in (mine, stock))

    def loss(y: Tensor, t: Any) -> Tensor:
        return F.mse_loss(y, t[0]) + F.l1_loss(y, t[-1])  # rows of a tensor, or tensors

    step = fastnn.training_step(mine, loss, ours)
    for number, target in enumerate([torch.stack([Y, Y + 1]), (Y, Y - 1), [Y], (Y, Y, Y), torch.stack([Y, Y])] * 2):
        if number == 5:
            step.loss = lambda y, t: loss(y, t) + y.square().sum()
        theirs.zero_grad()
        step.loss(stock(X), target).backward()
        theirs.step()
        step(X, target)
        assert step.explain().startswith(ONE), step.explain()
    assert_close(mine.state_dict(), stock.state_dict(), rtol=1e-9, atol=1e-12)


def test_what_a_loss_does_besides() -> None:
    seen: list[float] = []

    def loss(y: Tensor, t: Tensor) -> Tensor:
        value = F.mse_loss(y, t)
        seen.append(value.item())
        return value

    _check(lambda model: loss, Y, TWO)
    assert len(seen) == 8
    assert len({round(value, 9) for value in seen}) == 4


def test_errors_are_those_of_the_loss() -> None:
    model = _made(Net)
    before = copy.deepcopy(model.state_dict())
    step = fastnn.training_step(
        model,
        lambda y, t: (y - t).square().mean() + F.cross_entropy(y, t.long()[:, 0]),
        torch.optim.SGD(model.parameters()),
    )
    with pytest.raises(RuntimeError, match="must match the size"):
        step(X, Y[:, :2])
    with pytest.raises(IndexError, match="out of bounds"):
        step(X, Y.abs() + 9)
    for loss in (lambda y, t: y, lambda y, t: (y.mean(), t.mean()), lambda y, t: y.detach().mean()):
        with pytest.raises((RuntimeError, AttributeError)):
            fastnn.training_step(model, loss, torch.optim.SGD(model.parameters()))(X, Y)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(step(X, CLASSES[:, None].double().expand(7, 3)).isfinite(), torch.tensor(True))


CHANGES: dict[str, Callable[[list[Tensor]], Any]] = {
    "pop": lambda t: t.pop(),
    "append": lambda t: t.append(t[0]),
    "reverse": lambda t: t.reverse(),
    "extend": lambda t: t.extend(t[:1]),
    "delete": lambda t: t.__delitem__(0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_losses_that_change_the_list_of_targets(name: str) -> None:
    def loss(y: Tensor, t: list[Tensor]) -> Tensor:
        value = F.mse_loss(y, t[0]) * len(t)
        CHANGES[name](t)
        return value

    _check(lambda model: loss, [Y + i for i in range(6)], TWO)


def test_a_divergence_from_what_is_trained() -> None:
    """Where the target underflows to 0, its slope is NaN in stock."""

    def loss(y: Tensor, t: Tensor) -> Tensor:
        return F.kl_div(t, F.softmax(y * 3000, 1), reduction="sum")

    mine, stock = _made(Net), _made(Net)
    ours, theirs = (torch.optim.SGD(m.parameters(), 0.1) for m in (mine, stock))
    step = fastnn.training_step(mine, loss, ours)
    step(X, Y)
    loss(stock(X), Y).backward()
    theirs.step()
    assert step.explain().startswith(ONE)
    for p, q in zip(mine.parameters(), stock.parameters(), strict=True):
        assert torch.equal(p.isnan(), q.isnan())
    assert any(p.isnan().any() for p in mine.parameters())


def test_targets_that_require_gradients() -> None:
    """Which they get at every step, the first one, too."""
    model = _made(Net)
    weight = torch.full((), 2.0, dtype=torch.float64, requires_grad=True)

    def loss(y: Tensor, t: tuple[Tensor, Tensor]) -> Tensor:
        return t[1] * F.mse_loss(y, t[0])

    step = fastnn.training_step(model, loss, torch.optim.SGD(model.parameters()))
    for number in range(2):
        step(X, (Y, weight))
        assert weight.grad is not None, number
        weight.grad = None


@pytest.mark.parametrize("by_size", [False, True])
def test_a_batch_that_the_network_refuses(by_size: bool) -> None:
    """An ignored label is one: the loss itself takes it, and the steps behind it, too."""

    class Sized(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if len(x) > 2 and x.shape[1] == 4 else x

    ignored = torch.tensor([0, 2, -100, 1, 0, -100, 2])

    def loss(y: Tensor, t: Tensor) -> Tensor:
        return 2 * F.cross_entropy(y, t)

    mine, stock = (_made(Sized if by_size else Net) for _ in range(2))
    ours, theirs = (torch.optim.Adam(m.parameters(), 0.02) for m in (mine, stock))
    step = fastnn.training_step(mine, loss, ours)
    for labels in (CLASSES, ignored, CLASSES):
        theirs.zero_grad()
        expected = loss(stock(X), labels)
        expected.backward()
        theirs.step()
        assert_close(step(X, labels), expected.detach(), rtol=1e-9, atol=1e-12)
        assert "ordinary" not in step.explain()
    assert_close(mine.state_dict(), stock.state_dict(), rtol=1e-8, atol=1e-10)


def test_targets_of_inference_mode() -> None:
    model = _made(Net)
    with torch.inference_mode():
        target = torch.randn(7, 3, dtype=torch.float64)
    step = fastnn.training_step(model, lambda y, t: (y * t).sum(), torch.optim.SGD(model.parameters()))
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        step(X, target)


def test_another_loss_after_one_that_goes_the_ordinary_way() -> None:
    model, other = _made(Net), _made(Net)
    step = fastnn.training_step(model, lambda y, t: F.mse_loss(y, other(t)), torch.optim.SGD(model.parameters()))
    step(X, X)
    assert step.explain().startswith(ORDINARY)
    assert all(p.grad is not None for p in other.parameters())
    step.loss = lambda y, t: F.mse_loss(y, t) * 2
    step(X, Y)
    assert step.explain().startswith(ONE)


def test_an_epoch_with_random_numbers_and_a_label_to_ignore() -> None:
    """A step of one call is refused after it has drawn numbers, which are drawn once all the same."""
    mine, stock = (nn.Sequential(_made(Net), nn.Dropout(0.3), nn.Linear(3, 3).double()) for _ in range(2))
    stock.load_state_dict(mine.state_dict())
    x, classes = _rows(24, 4), torch.arange(24) % 3
    classes[9] = -100

    def loss(y: Tensor, t: Tensor) -> Tensor:
        return 1.5 * F.cross_entropy(y, t)

    ours, theirs = (torch.optim.SGD(m.parameters(), 0.1) for m in (mine, stock))
    torch.manual_seed(3)
    losses = fastnn.training_step(mine, loss, ours).epoch(x, classes, 4)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    expected = []
    for rows, labels in torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, classes), 4):
        theirs.zero_grad()
        value = loss(stock(rows), labels)
        value.backward()
        theirs.step()
        expected.append(value.detach())
    assert torch.equal(torch.get_rng_state(), after)
    assert_close(losses, torch.stack(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("several", [False, True])
def test_epochs(several: bool) -> None:
    x, y, classes = _rows(50, 4), _rows(50, 3), torch.arange(50) % 3
    target = (y, classes) if several else y

    def loss(output: Tensor, given: Any) -> Tensor:
        wanted, labels = given if several else (given, None)
        own = (WEIGHTS * (output - wanted).abs()).mean()
        return own if labels is None else own + F.cross_entropy(output, labels)

    mine, stock = _made(Net), _made(Net)
    ours, theirs = (torch.optim.Adam(m.parameters(), 0.02) for m in (mine, stock))
    step = fastnn.training_step(mine, loss, ours)
    for epoch in range(2):
        losses = step.epoch(x, target, 8, shuffle=True, generator=torch.Generator().manual_seed(epoch))
        data = torch.utils.data.TensorDataset(x, y, classes)
        generator = torch.Generator().manual_seed(epoch)
        expected = []
        for rows, wanted, labels in torch.utils.data.DataLoader(data, 8, shuffle=True, generator=generator):
            theirs.zero_grad()
            value = loss(stock(rows), (wanted, labels) if several else wanted)
            value.backward()
            theirs.step()
            expected.append(value.detach())
        assert_close(losses, torch.stack(expected), rtol=1e-9, atol=1e-12)
    assert step.explain().startswith(ONE)
    assert_close(mine.state_dict(), stock.state_dict(), rtol=1e-8, atol=1e-10)


def test_copies_and_modes() -> None:
    model = _made(Heads)
    step = fastnn.training_step(
        model, functools.partial(_of_heads, factor=0.5), torch.optim.Adam(model.parameters(), 0.02)
    )
    step(X, (Y, _rows(7)))
    other = copy.deepcopy(step)
    for one in (step, other):
        one(X, (Y, _rows(7)))
        assert one.explain().startswith(ONE)
    assert_close(step.model.state_dict(), other.model.state_dict(), rtol=0, atol=0)
    step.model.eval()
    step(X, (Y, _rows(7)))
    assert "eval mode" in step.explain()
    step.model.train()
    step(X, (Y, _rows(7)))
    assert step.explain().startswith(ONE)
    assert "ordinary" not in step.explain()


def _of_heads(results: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], factor: float) -> Tensor:
    return F.mse_loss(results[0], target[0]) + factor * F.mse_loss(results[1], target[1])


def _pair(optimizer: Callable[..., torch.optim.Optimizer], model: nn.Module) -> tuple[Any, ...]:
    stock = copy.deepcopy(model)
    return stock, optimizer(stock.parameters(), 0.05), model, optimizer(model.parameters(), 0.05)


def _weight_penalty(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        base = F.mse_loss(output, target)
        gradients = torch.autograd.grad(base, list(model.parameters()), create_graph=True, allow_unused=True)
        return base + sum(one.square().sum() for one in gradients if one is not None)

    return loss


def test_loss_that_differentiates_by_the_parameters() -> None:
    """The gradients of parameters which a loss asks for by itself are those of the model, and not None."""
    _check(_weight_penalty, Y, ORDINARY)


def _freeze_first(model: Any, optimizer: torch.optim.Optimizer, turn: int) -> None:
    model[0].requires_grad_(turn == 0)


def _reload(model: Any, optimizer: torch.optim.Optimizer, turn: int) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


EDITS_WITHIN_LOSS: dict[str, Callable[[Any, torch.optim.Optimizer, int], Any]] = {
    "learning rate": lambda model, optimizer, turn: optimizer.param_groups[0].update(lr=0.1 / (turn + 1)),
    "weight decay": lambda model, optimizer, turn: optimizer.param_groups[0].update(weight_decay=0.1 * turn),
    "state cleared": lambda model, optimizer, turn: optimizer.state.clear(),
    "state loaded": _reload,
    "layer frozen": _freeze_first,
}


@pytest.mark.parametrize("settings", [{}, {"max_norm": 0.3}, {"keep_gradients": True}])
@pytest.mark.parametrize("edit", EDITS_WITHIN_LOSS)
def test_what_a_loss_changes_counts_in_the_same_step(edit: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    stock, stock_optimizer, model, optimizer = _pair(torch.optim.Adam, model)

    turn = 0

    def loss_of(model: nn.Module, optimizer: torch.optim.Optimizer, output: Tensor, target: Tensor) -> Tensor:
        EDITS_WITHIN_LOSS[edit](model, optimizer, turn)
        return F.mse_loss(output, target)

    step = fastnn.training_step(
        model, lambda output, target: loss_of(model, optimizer, output, target), optimizer, **settings
    )
    for turn in range(4):  # noqa: B007  (`loss_of` reads it)
        x, y = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
        stock_optimizer.zero_grad()
        loss_of(stock, stock_optimizer, stock(x), y).backward()
        if "max_norm" in settings:
            nn.utils.clip_grad_norm_([p for p in stock.parameters() if p.grad is not None], settings["max_norm"])
        stock_optimizer.step()
        step(x, y)
        assert_close(model.state_dict(), stock.state_dict())


class _WithView(nn.Module):
    """Two outputs that share memory."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.fc(x)
        return y, y[:, :2]


class _WithDetached(_WithView):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.fc(x)
        return y, y.detach()


@pytest.mark.parametrize("kind", [_WithView, _WithDetached])
def test_outputs_that_share_memory(kind: type[nn.Module]) -> None:
    def loss(outputs: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        whole, part = outputs
        part.clamp_(-0.1, 0.1)
        return F.mse_loss(whole, target)

    _check(lambda model: loss, _rows(7, 6), ORDINARY, kind)


class _Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2).double()

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self.fc(output), target)


def test_loss_with_parameters_that_is_met_at_a_call() -> None:
    torch.manual_seed(0)
    model, loss = nn.Sequential(nn.Linear(3, 2)).double(), _Teacher()
    stock, stock_optimizer, model, optimizer = _pair(torch.optim.SGD, model)
    step = fastnn.training_step(model, F.mse_loss, optimizer)
    step.loss = loss
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    loss(stock(x), y).backward()
    stock_optimizer.step()
    step(x, y)
    assert_close(model.state_dict(), stock.state_dict())
