"""Loss over wall time on real data: stock's loop over a DataLoader beside ``step.epoch``.

All models begin with the same weights and see the same batches, so that the curves are the same but for the time. That
is asserted for the first epochs; later ones differ by how rounding errors grow.
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastnn
from benchmarks.stored import OUTPUT, save
from fastnn.reference import models
from fastnn.testing import using_threads

_BATCH, _LR = 32, 1e-3
_COMPARED = 3  # epochs


@dataclass(frozen=True)
class Task:
    """A model, what it reads and what it is to say, and its loss."""

    name: str
    make: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]


def _digits() -> tuple[Tensor, Tensor]:
    """Handwritten digits (rows, 8, 8), and which they are."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.from_numpy(digits.images).float() / 16, torch.from_numpy(digits.target).long()


def _as_images() -> tuple[Tensor, Tensor]:
    images, which = _digits()
    return images[:, None], which


def _tumours() -> tuple[Tensor, Tensor]:
    """The thirty numbers of each tumour, twice."""
    from sklearn.datasets import load_breast_cancer

    numbers = torch.from_numpy(load_breast_cancer().data).float()
    rows = (numbers - numbers.mean(0)) / numbers.std(0)
    return rows, rows


def _network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )


TASKS = [
    Task("digits, convolutional network", _network, _as_images, F.cross_entropy),
    Task("digits row by row, recurrent network", lambda: models.RNN(8, 32, 2, 10), _digits, F.cross_entropy),
    Task("tumours, autoencoder", lambda: models.Autoencoder(30, 20, 8), _tumours, F.mse_loss),
]
Epoch = Callable[[torch.Generator], Tensor]  # returns the losses of one pass


def _by_stock(task: Task, model: nn.Module, x: Tensor, y: Tensor) -> Epoch:
    optimizer = torch.optim.Adam(model.parameters(), lr=_LR, fused=True)

    def epoch(generator: torch.Generator) -> Tensor:
        losses = []
        for some_x, some_y in DataLoader(TensorDataset(x, y), _BATCH, shuffle=True, generator=generator):
            optimizer.zero_grad()
            loss = task.loss(model(some_x), some_y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    return epoch


def _by_fastnn(task: Task, model: nn.Module, x: Tensor, y: Tensor) -> Epoch:
    step = fastnn.training_step(model, task.loss, torch.optim.Adam(model.parameters(), lr=_LR), strict=True)
    return lambda generator: step.epoch(x, y, _BATCH, shuffle=True, generator=generator)


def measure(task: Task, seconds: float) -> dict[str, Any]:
    """The mean loss of each epoch, and the second at which it ended, for as many epochs as stock makes in this time."""
    torch.manual_seed(0)
    stock, (x, y) = task.make(), task.data()
    losses: dict[str, list[float]] = {}
    ends: dict[str, list[float]] = {}
    epochs = 1
    for name, begin in (("stock, DataLoader", _by_stock), ("epoch", _by_fastnn)):
        begin(task, copy.deepcopy(stock), x, y)(torch.Generator())  # warms up
        epoch, generator = begin(task, copy.deepcopy(stock), x, y), torch.Generator().manual_seed(0)
        losses[name], ends[name] = [], []
        start = time.perf_counter()
        while len(losses[name]) < epochs:
            losses[name].append(float(epoch(generator).mean()))
            ends[name].append(time.perf_counter() - start)
            if name == "stock, DataLoader" and ends[name][-1] < seconds:
                epochs += 1
    ours, theirs = (torch.tensor(one[:_COMPARED]) for one in losses.values())
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    return {"case": task.name, "direction": "curve", "threads": 1, "seconds": ends, "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="of stock's training (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of curves.json")
    arguments = parser.parse_args()
    with using_threads(1):
        rows = [measure(task, arguments.seconds) for task in TASKS]
    for row in rows:
        stock, ours = (ends[-1] for ends in row["seconds"].values())
        print(f"{row['case']}: {len(row['losses']['epoch'])} epochs, {stock / ours:.1f}x: {stock:.2f} and {ours:.3f} s")
    save(arguments.output, "curves", rows, arguments.seconds)


if __name__ == "__main__":
    main()
