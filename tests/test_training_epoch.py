"""step.epoch: the batches of a DataLoader, in its order, with its draws; the curve of a loop of stock's."""

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import fastnn
from fastnn import _C
from fastnn.ops import training_step as operators


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)).double()


def stock_losses(model: nn.Module, batches: Any, optimizer: torch.optim.Optimizer, scheduler: Any = None) -> Tensor:
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("rows", [1, 7, 24])
@pytest.mark.parametrize("batch_size", [1, 6, 40])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("order", ["as they are", "shuffled", "shuffled by a generator", "by the default generator"])
def test_is_the_loop_over_a_data_loader(rows: int, batch_size: int, drop_last: bool, order: str) -> None:
    mine = network()
    theirs = copy.deepcopy(mine)
    x, y = torch.randn(rows, 6).double(), torch.randn(rows, 3).double()
    generators: list[torch.Generator | None] = [None, None]
    if order == "shuffled by a generator":
        generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    elif order == "by the default generator":
        generators = [torch.default_generator] * 2
    settings = {"batch_size": batch_size, "shuffle": order != "as they are", "drop_last": drop_last}
    optimizer = torch.optim.Adam(theirs.parameters())
    step = fastnn.training_step(mine, F.mse_loss, torch.optim.Adam(mine.parameters()))
    for seed in (1, 2):
        torch.manual_seed(seed)
        loader = DataLoader(TensorDataset(x, y), generator=generators[0], **settings)
        expected = stock_losses(theirs, loader, optimizer) if len(loader) else torch.empty(len(list(loader)))
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        losses = step.epoch(x, y, generator=generators[1], **settings)
        assert_close(losses, expected.to(losses.dtype))
        assert torch.equal(torch.get_rng_state(), after)
    assert_close(dict(mine.named_parameters()), dict(theirs.named_parameters()))
    if generators[0] is not None:
        assert torch.equal(generators[0].get_state(), generators[1].get_state())  # type: ignore[union-attr]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 2), nn.Linear(3, 2)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(a), self.two(b)


def test_several_tensors() -> None:
    def loss(outputs: tuple[Tensor, ...], targets: tuple[Tensor, ...]) -> Tensor:
        return sum(F.mse_loss(a, b) for a, b in zip(outputs, targets, strict=True))  # type: ignore[return-value]

    mine = TwoInputs()
    theirs = copy.deepcopy(mine)
    a, b, c, d = (torch.randn(9, size) for size in (4, 3, 2, 2))
    step = fastnn.training_step(mine, loss, torch.optim.SGD(mine.parameters(), 0.1))
    found = step.epoch((a, b), (c, d), 4)
    optimizer, expected = torch.optim.SGD(theirs.parameters(), 0.1), []
    for rows in (slice(0, 4), slice(4, 8), slice(8, 9)):
        optimizer.zero_grad()
        value = loss(theirs(a[rows], b[rows]), (c[rows], d[rows]))
        value.backward()
        optimizer.step()
        expected.append(value.detach())
    assert_close(found, torch.stack(expected))


def test_batches_of_the_caller() -> None:
    mine = network()
    theirs = copy.deepcopy(mine)
    x, y = torch.randn(20, 6).double(), torch.randn(20, 3).double()
    step = fastnn.training_step(mine, F.mse_loss, torch.optim.SGD(mine.parameters(), 0.1))
    torch.manual_seed(3)
    found = step.epoch(DataLoader(TensorDataset(x, y), 6, shuffle=True))
    torch.manual_seed(3)
    loader = DataLoader(TensorDataset(x, y), 6, shuffle=True)
    assert_close(found, stock_losses(theirs, loader, torch.optim.SGD(theirs.parameters(), 0.1)))


def test_scheduler_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    mine = network()
    theirs = copy.deepcopy(mine)
    x, y = torch.randn(20, 6).double(), torch.randn(20, 3).double()
    optimizers = [torch.optim.SGD(model.parameters(), 0.5) for model in (mine, theirs)]
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) for optimizer in optimizers]
    step = fastnn.training_step(mine, F.mse_loss, optimizers[0])
    torch.manual_seed(0)
    found = step.epoch(x, y, 5, scheduler=schedulers[0], progress=True)
    torch.manual_seed(0)
    expected = stock_losses(theirs, DataLoader(TensorDataset(x, y), 5), optimizers[1], schedulers[1])
    assert_close(found, expected)
    assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()


def test_an_exception_leaves_whole_steps() -> None:
    mine = network()
    theirs = copy.deepcopy(mine)
    x, y = torch.randn(20, 6).double(), torch.randn(20, 3).double()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield x[:5], y[:5]
        yield x[5:10], y[5:10]
        raise KeyboardInterrupt

    step = fastnn.training_step(mine, F.mse_loss, torch.optim.Adam(mine.parameters()))
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        step.epoch(batches())
    torch.manual_seed(0)
    stock_losses(theirs, [(x[:5], y[:5]), (x[5:10], y[5:10])], torch.optim.Adam(theirs.parameters()))
    assert_close(dict(mine.named_parameters()), dict(theirs.named_parameters()))


def test_what_is_no_data() -> None:
    step = fastnn.training_step(model := network(), F.mse_loss, torch.optim.SGD(model.parameters(), 0.1))
    x, y = torch.randn(4, 6).double(), torch.randn(4, 3).double()
    for bad in ((x, y[:3], 2), (x[:0], y[:0], 2), (x, y, 0), (x, y, -1), (x, y, True), (x, torch.tensor(1.0), 2)):
        with pytest.raises(ValueError, match=r"rows|row|batch_size"):
            step.epoch(*bad)
    with pytest.raises(ValueError, match="drop_last should be a boolean value, but got drop_last=0"):
        step.epoch(x, y, 2, drop_last=0)
    for other in (([1, 2], y, 2), (x, "y", 2), ((), y, 2)):
        with pytest.raises(TypeError, match="expected"):
            step.epoch(*other)


def test_a_batch_is_a_copy() -> None:
    """A model may change its batch in place, and views what is not contiguous."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.add_(1).view(len(x), -1))

    x, y = torch.zeros(2, 2, 8).permute(2, 0, 1), torch.zeros(8, 1)
    model = Noisy()
    step = fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), 0.1))
    for shuffle in (False, True):
        step.epoch(x, y, 4, shuffle=shuffle)
    assert not x.any()


def test_arguments_that_say_two_things() -> None:
    x, y, model = torch.randn(4, 6), torch.randn(4, 3), network().float()
    step = fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), 0.1))
    loader = DataLoader(TensorDataset(x, y), 2)
    for wrong in (lambda: step.epoch((x, x)), lambda: step.epoch(loader, shuffle=True)):
        with pytest.raises(TypeError, match="expected tensors, a target and a batch_size, or only an iterable"):
            wrong()
    assert len(step.epoch(loader)) == 2
    assert len(step.epoch([(x, y)])) == 1


# ---- many steps in one call -------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps each call has made that made more than one."""
    made: list[int] = []
    run = operators.bound_epoch

    def counted(*arguments: Any) -> Tensor:
        losses = run(*arguments)
        made.append(len(losses))
        return losses

    monkeypatch.setattr(operators, "bound_epoch", counted)
    return made


def _batch_norm_and_dropout() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3),
        nn.Linear(36, 3),
    ).double()  # fmt: skip


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_one_call_makes_the_steps_of_the_loop(calls: list[int], shuffle: bool, drop_last: bool) -> None:
    """With the same masks, statistics and counts, and the optimizer's state."""
    torch.manual_seed(0)
    theirs = _batch_norm_and_dropout()
    mine = copy.deepcopy(theirs)
    x, y = torch.randn(203, 1, 8, 8).double(), torch.randint(0, 3, (203,))
    optimizers = [torch.optim.SGD(model.parameters(), 0.05, momentum=0.9) for model in (theirs, mine)]
    step = fastnn.training_step(mine, F.cross_entropy, optimizers[1], strict=True, max_norm=1.0)
    for epoch in range(2):
        generators = [torch.Generator().manual_seed(epoch) for _ in range(2)]
        torch.manual_seed(epoch)
        loader = DataLoader(TensorDataset(x, y), 5, shuffle=shuffle, generator=generators[0], drop_last=drop_last)
        expected = []
        for a, b in loader:
            optimizers[0].zero_grad()
            loss = F.cross_entropy(theirs(a), b)
            loss.backward()
            nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizers[0].step()
            expected.append(loss.detach())
        after = torch.get_rng_state()
        torch.manual_seed(epoch)
        found = step.epoch(x, y, 5, shuffle=shuffle, generator=generators[1], drop_last=drop_last)
        assert_close(found, torch.stack(expected))
        assert torch.equal(torch.get_rng_state(), after)
        assert torch.equal(generators[0].get_state(), generators[1].get_state())
    assert_close(mine.state_dict(), theirs.state_dict())
    assert sum(calls) >= 2 * (40 if drop_last else 41) - 2  # all but the first step of each
    assert len(calls) < sum(calls)


def test_an_epoch_takes_up_the_pace_of_the_one_before(calls: list[int]) -> None:
    model = nn.Sequential(nn.Linear(4, 3)).double()
    step = fastnn.training_step(model, F.mse_loss, torch.optim.Adam(model.parameters()), strict=True)
    x, y = torch.randn(60, 4).double(), torch.randn(60, 3).double()
    for _ in range(2):
        step.epoch(x, y, 2)
    begin = len(calls)
    step.epoch(x, y, 2)
    assert calls[begin:] == [30]
    step.epoch(x, y, 3)  # of which nothing is known as yet
    assert calls[begin + 1] == 1


def test_a_first_batch_that_is_refused_draws_nothing(calls: list[int]) -> None:
    model = _batch_norm_and_dropout()
    x, y = torch.randn(10, 1, 8, 8).double(), torch.randint(0, 3, (10,))
    step = fastnn.training_step(model, F.cross_entropy, torch.optim.Adam(model.parameters()), strict=True)
    step.epoch(x, y, 5)
    y[1] = 7
    torch.manual_seed(1)
    torch.empty((), dtype=torch.int64).random_()  # as a DataLoader does
    expected = torch.get_rng_state()
    torch.manual_seed(1)
    with pytest.raises(IndexError, match="Target 7 is out of bounds"):
        step.epoch(x, y, 5)
    assert torch.equal(torch.get_rng_state(), expected)


def test_a_step_that_is_refused_leaves_those_before_it(calls: list[int]) -> None:
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(4, 3)).double()
    mine = copy.deepcopy(theirs)
    x, y = torch.randn(60, 4).double(), torch.randint(0, 3, (60,))
    y[41] = 7
    optimizers = [torch.optim.Adam(model.parameters(), 0.05) for model in (theirs, mine)]
    for first in range(0, 40, 2):
        optimizers[0].zero_grad()
        F.cross_entropy(theirs(x[first : first + 2]), y[first : first + 2]).backward()
        optimizers[0].step()
    step = fastnn.training_step(mine, F.cross_entropy, optimizers[1], strict=True)
    with pytest.raises(IndexError, match="Target 7 is out of bounds"):
        step.epoch(x, y, 2)
    assert calls
    assert_close(mine.state_dict(), theirs.state_dict())
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert_close(optimizers[1].state[p], optimizers[0].state[q])


def test_threads_train_models_of_their_own() -> None:
    x = torch.randn(2000, 6).double()

    def train(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)).double()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
        step = fastnn.training_step(model, F.mse_loss, torch.optim.Adam(model.parameters()), strict=True)
        step.epoch(x, x, 8, shuffle=True, generator=generator)
        return model.state_dict()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(train, range(8)))
    for seed, state in enumerate(found):
        assert_close(state, train(seed), rtol=0, atol=0)


def test_the_raw_operator_is_safe() -> None:
    x, y, weight = torch.randn(9, 3), torch.randn(9, 2), torch.randn(2, 3)
    text = "fastnn.network 1\ninput -> x\nweight -> w sizes=2,3\nlinear input=x weight=w -> y\noutput input=y"
    bound = torch.ops.fastnn.bind_training_step([weight], [], text, None, [0, 0])
    numbers = torch.tensor([0, 1, 0, 0, 0, -1, 0.1, *[0] * 5], dtype=torch.float64)
    order = torch.randperm(9)
    run = torch.ops.fastnn.bound_training_epoch
    good = [[x], y, order, 0, 9, 2, bound, numbers]
    assert run(*good).shape == (5,)
    torch.library.opcheck(run.default, tuple(good), test_utils=("test_schema", "test_faketensor"))
    assert run([x], y, None, 2, 5, 2**62, bound, numbers).shape == (1,)

    def bad(place: int, *values: Any) -> None:
        for value in values:
            arguments = list(good)
            arguments[place] = value
            kept = weight.clone()
            with pytest.raises(RuntimeError):
                run(*arguments)
            assert torch.equal(weight, kept)

    bad(0, [], [x[:8]], [x, x], [x.t()], [x.double()], [torch.randn(())], [x.to("meta")], [x.half()])
    bad(1, y[:8], y.t(), torch.randn(()), y.double(), y.half())
    bad(2, order + 1, order - 1, order.float(), order[None], order[:3], order.repeat(2)[::2])
    bad(3, -1, 9, 2**63 - 1)
    bad(4, 0, 10, -1, 2**63 - 1)
    bad(5, 0, -1)
    bad(6, bound + 1000, numbers)
    _C.release_training_step(int(bound))
