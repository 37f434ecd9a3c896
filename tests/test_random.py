"""Numbers of torch's generator that compiled code draws: those that torch draws from the same seed."""

import copy
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnn
from fastnn.ops import _random

DRAW = torch.ops.fastnn.draw_ones_of_state.default


def theirs(state: Tensor, count: int, probability: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What torch draws from a state, and the state after it."""
    generator = torch.Generator()
    generator.set_state(state)
    ones = torch.empty(count, dtype=dtype).bernoulli_(probability, generator=generator)
    return ones, generator.get_state()


@pytest.mark.skipif(not _random.draws_as_torch(), reason="torch draws by another library here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9, 1 - 2**-53, 1.0])
@pytest.mark.parametrize("words_before", [0, 1, 2, 623, 624, 625])
def test_the_same_numbers_and_state(dtype: torch.dtype, probability: float, words_before: int) -> None:
    generator = torch.Generator().manual_seed(5)
    torch.empty(words_before).uniform_(generator=generator)  # takes a word each
    state = generator.get_state()
    for count in (0, 1, 2, 311, 312, 313, 1000):
        expected, after = theirs(state, count, probability, dtype)
        assert torch.equal(DRAW(state, torch.empty(count, dtype=dtype), probability), expected)
        assert torch.equal(state, after)


def test_what_is_drawn_where_torch_draws_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the generator sees other numbers than ours. (Then nothing is drawn by ourselves.)"""
    monkeypatch.setattr(Tensor, "bernoulli_", lambda self, *_, **__: self.fill_(1))
    assert not _random.draws_as_torch()


@pytest.mark.parametrize("wrong", ["short", "zeros", "left", "next", "floats", "strided"])
def test_bytes_that_are_no_state_are_refused(wrong: str) -> None:
    state = torch.Generator().manual_seed(1).get_state()
    if wrong == "left":
        state[8:12] = 255
    elif wrong == "next":
        torch.empty(3).uniform_(generator=(generator := torch.Generator().manual_seed(1)))
        state = generator.get_state()
        state[16] += 1
    bad = {"short": state[:-8], "zeros": torch.zeros_like(state), "floats": state.float()}
    bad["strided"] = torch.zeros(2 * state.numel(), dtype=torch.uint8)[::2].copy_(state)
    with pytest.raises(RuntimeError):
        DRAW(bad.get(wrong, state), torch.empty(4), 0.5)
    with pytest.raises(RuntimeError):
        DRAW(state, torch.empty(4, dtype=torch.int64), 0.5)
    with pytest.raises(RuntimeError):
        DRAW(torch.get_rng_state(), torch.empty(4), torch.nan)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "rows": lambda: nn.Sequential(nn.Linear(9, 33), nn.ReLU(), nn.Dropout(0.3), nn.Linear(33, 4), nn.Dropout(0.6)),
    "all": lambda: nn.Sequential(nn.Linear(9, 8), nn.Dropout(1.0), nn.Linear(8, 4)),
    "features": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 9)), nn.Conv1d(1, 7, 3), nn.Dropout1d(0.4), nn.Flatten(), nn.Linear(49, 4)
    ),
    "steps": lambda: Steps(),
}


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(3, 5, 3, dropout=0.4, batch_first=True), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.dropout(self.rnn(x.unflatten(1, (3, 3)))[0][:, -1], 0.2, self.training))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_models_drop_what_stock_drops(name: str, dtype: torch.dtype) -> None:
    """In fused training and in steps; and numbers that are drawn between them are those that stock leaves."""
    torch.manual_seed(11)
    stock = MODELS[name]().to(dtype)
    fused, stepped = copy.deepcopy(stock), copy.deepcopy(stock)
    fastnn.fuse(fused)
    optimizer = torch.optim.SGD(stock.parameters(), 0.1)
    step = fastnn.training_step(stepped, F.mse_loss, torch.optim.SGD(stepped.parameters(), 0.1))
    x, y = torch.randn(6, 9, dtype=dtype), torch.randn(6, 4, dtype=dtype)
    between: list[list[Tensor]] = [[], [], []]
    for found, train in zip(between, (stock, fused, step), strict=True):
        torch.manual_seed(3)
        for _ in range(3):
            if train is step:
                step(x, y)
            else:
                optimizer.zero_grad()
                loss = F.mse_loss(train(x), y)
                loss.backward()
                if train is stock:
                    optimizer.step()
                else:
                    with torch.no_grad():
                        for p in fused.parameters():
                            p.sub_(p.grad, alpha=0.1)
                            p.grad = None
            found += [torch.rand(1), torch.randn(1), torch.randint(100, (2,))]
    for own in between[1:]:
        assert all(map(torch.equal, own, between[0]))
    for own in (fused, stepped):
        for a, b in zip(own.parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(a, b)


def test_two_threads_drop() -> None:
    """They never drop the same elements."""
    models = [nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 1)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    steps = [fastnn.training_step(m, F.mse_loss, torch.optim.SGD(m.parameters(), 0.0)) for m in models]
    x, y = torch.randn(50, 4), torch.randn(50, 1)
    losses: list[list[float]] = [[], []]

    def train(which: int) -> None:
        losses[which] += [float(steps[which](x, y)) for _ in range(300)]

    threads = [threading.Thread(target=train, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(found) for found in losses] == [300, 300]
    assert len({*losses[0], *losses[1]}) > 590  # few are equal by chance


def test_ones_of_other_tensors() -> None:
    with pytest.raises(RuntimeError):
        torch.ops.fastnn.draw_ones(torch.empty(3, dtype=torch.int32), 0.5)
    torch.manual_seed(2)
    ours = [_random.draw_ones(torch.empty(5, 7, dtype=dtype), 0.3) for dtype in (torch.float32, torch.bfloat16)]
    torch.manual_seed(2)
    stock = [torch.empty(5, 7, dtype=dtype).bernoulli_(0.3) for dtype in (torch.float32, torch.bfloat16)]
    assert all(map(torch.equal, ours, stock))
