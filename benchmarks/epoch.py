"""An epoch over rows in memory: stock's loops, fastnn.training_step in them, step.epoch, JAX with lax.scan; and what it
costs to make a step.

``make bench-epoch``. The losses of a whole epoch are compared before anything is timed.
"""

import argparse
import copy
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastnn
from benchmarks.cases import MODELS
from benchmarks.jax_step import jax_epoch
from benchmarks.stored import OUTPUT, save
from benchmarks.timing import interleave
from fastnn.reference import models
from fastnn.testing import using_threads

CONTENDERS = (
    "stock, DataLoader",
    "stock, index",
    "training_step, DataLoader",
    "training_step, index",
    "epoch",
    "jax scan",
)
_LR = 1e-3
_EPOCHS_OF_A_THREAD = 6  # which take half a second
_MADE = 20  # models of a kind for each of which a step is made


class SkipNet(nn.Module):
    """Rows through three blocks, each of which adds to what it gets."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return self.last(x)


def _lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


@dataclass(frozen=True)
class Loop:
    """A model, and the sizes of a batch."""

    name: str
    make: Callable[[], nn.Module]
    batch: tuple[int, ...]
    batches: int = 100  # of an epoch


LOOPS = [
    *(Loop(case.name, case.stock, case.shape) for case in MODELS[:3]),
    *(Loop(case.name, case.stock, case.shape, 10) for case in MODELS[3:]),
    Loop("LeNet-5 (16, 1, 28, 28)", _lenet, (16, 1, 28, 28)),
    Loop("SkipNet (32, 16)", SkipNet, (32, 16)),
]
Epoch = Callable[[], Tensor]  # returns the losses


def _by_stock(model: nn.Module, batches: Callable[[], Iterator[Any]]) -> Epoch:
    optimizer = torch.optim.Adam(model.parameters(), lr=_LR, fused=True)

    def epoch() -> Tensor:
        losses = []
        for x, y in batches():
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    return epoch


def _step_of(model: nn.Module) -> fastnn.TrainingStep:
    return fastnn.training_step(model, F.mse_loss, torch.optim.Adam(model.parameters(), lr=_LR), strict=True)


def epochs_of(loop: Loop, contenders: list[str]) -> dict[str, Epoch]:
    torch.manual_seed(0)
    stock = loop.make()
    size = loop.batch[0]
    x = torch.randn(loop.batches * size, *loop.batch[1:])
    with torch.no_grad():
        y = torch.randn(len(x), *stock(x[:2]).shape[1:])

    def loaded() -> Iterator[Any]:
        generator = torch.Generator().manual_seed(0)
        return iter(DataLoader(TensorDataset(x, y), size, shuffle=True, generator=generator))

    def chosen() -> Iterator[Any]:
        generator = torch.Generator().manual_seed(0)
        torch.empty((), dtype=torch.int64).random_(generator=generator)  # as a DataLoader does
        for places in torch.randperm(len(x), generator=generator).split(size):
            yield x[places], y[places]

    def by_step(batches: Callable[[], Iterator[Any]]) -> Epoch:
        step = _step_of(copy.deepcopy(stock))
        return lambda: torch.stack([step(*batch) for batch in batches()])

    def by_epoch() -> Epoch:
        step = _step_of(copy.deepcopy(stock))
        return lambda: step.epoch(x, y, size, shuffle=True, generator=torch.Generator().manual_seed(0))

    def by_jax() -> Epoch | None:
        if not isinstance(stock, (models.Autoencoder, models.RNN, models.Conv2DNet)):
            return None
        run = jax_epoch(stock, x, y, _LR, size)
        if run is None:
            return None
        generator = torch.Generator().manual_seed(0)
        torch.empty((), dtype=torch.int64).random_(generator=generator)
        places = torch.randperm(len(x), generator=generator)
        return lambda: run(places)

    makers: dict[str, Callable[[], Epoch | None]] = {
        "stock, DataLoader": lambda: _by_stock(copy.deepcopy(stock), loaded),
        "stock, index": lambda: _by_stock(copy.deepcopy(stock), chosen),
        "training_step, DataLoader": lambda: by_step(loaded),
        "training_step, index": lambda: by_step(chosen),
        "epoch": by_epoch,
        "jax scan": by_jax,
    }
    epochs = {name: made for name in contenders if (made := makers[name]()) is not None}
    losses = {name: torch.as_tensor([float(loss) for loss in epoch()]) for name, epoch in epochs.items()}
    expected = next(iter(losses.values()))
    for found in losses.values():
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)
    return epochs


def threads_scale(rounds: int) -> float:
    """How many times as much two threads train, each an autoencoder of its own, as one does in the same time: the
    median of the rounds, which differ by a third where the machine is shared. Each thread trains for half a second,
    beside which it does not count when the system starts a thread."""
    x = torch.randn(320_000, 10)
    steps = [_step_of(models.Autoencoder(10, 7, 5)) for _ in range(2)]

    def train(step: fastnn.TrainingStep) -> None:
        for _ in range(_EPOCHS_OF_A_THREAD):
            step.epoch(x, x, 32, shuffle=True)

    ratios = []
    for _ in range(rounds):
        start = time.perf_counter()
        for step in steps:
            train(step)
        alone = time.perf_counter() - start
        both = [threading.Thread(target=train, args=(step,)) for step in steps]
        start = time.perf_counter()
        for one in both:
            one.start()
        for one in both:
            one.join()
        ratios.append(alone / (time.perf_counter() - start))
    return sorted(ratios)[rounds // 2]


def making(loop: Loop) -> float:
    """The seconds that it takes to make a step, with its first call, once one was made for a model of the same kind."""
    x = torch.randn(loop.batch)
    with torch.no_grad():
        y = torch.randn_like(loop.make()(x))
    made = []
    for _ in range(_MADE + 1):
        model = loop.make()
        optimizer = torch.optim.Adam(model.parameters(), lr=_LR)
        start = time.perf_counter()
        step = fastnn.training_step(model, F.mse_loss, optimizer, strict=True)
        step(x, y)
        first = time.perf_counter()
        step(x, y)
        made.append(2 * first - start - time.perf_counter())  # without the step itself
    return statistics.median(made[1:])


def as_line(row: dict[str, Any]) -> str:
    each = {name: time / row["batches"] for name, time in row["microseconds"].items()}
    ratio = each["stock, DataLoader"] / each["epoch"]
    cells = ", ".join(f"{name} {time:.1f} us" for name, time in each.items())
    made = f"; a further step is made in {row['making']:.0f} us" if "making" in row else ""
    return f"{row['case']}, {row['threads']} thread(s): {ratio:.1f}x, a batch:\n  {cells}{made}"


def measure(loop: Loop, threads: int, contenders: list[str], seconds: float) -> dict[str, Any]:
    """The microseconds of an epoch by each contender, and on one thread those of making a step."""
    with using_threads(threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about other people's software
        timings = interleave(epochs_of(loop, contenders), seconds)
        row = {
            **{"case": loop.name, "direction": "epoch", "threads": threads, "batches": loop.batches},
            "microseconds": {name: timing.median * 1e6 for name, timing in timings.items()},
        }
        return row | ({"making": 1e6 * making(loop)} if threads == 1 else {})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.epoch", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="the models whose name contains this text")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--seconds", type=float, default=3.0, help="measuring time of a row (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of epoch.json")
    arguments = parser.parse_args()
    with using_threads(1):  # This comes first: other software's threads keep the cores busy later.
        scale = threads_scale(15 if arguments.seconds >= 1 else 1)
    print(f"two threads train {scale:.2f} times as much as one")
    rows = []
    for loop in LOOPS:
        if arguments.only not in loop.name:
            continue
        for threads in arguments.threads:
            rows.append(measure(loop, threads, arguments.contenders, arguments.seconds))
            print(as_line(rows[-1]), flush=True)
    if not arguments.only:
        save(arguments.output, "epoch", rows, arguments.seconds, threads_scale=scale)


if __name__ == "__main__":
    main()
