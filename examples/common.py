"""What the examples share: the command line, the same training by stock's loop and by fastnn, and how plots look."""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import fastnn

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GREY, STOCK, OURS = "#8a8f98", "#8a8f98", "#e07b39"  # Colours that are seen on white and on black.
COMPARED = 200  # In double precision the two loss curves have to agree for so many steps,
TOLERANCE = 1e-6  # to so much of the first loss. In single precision rounding errors grow from step to step.


def arguments(parser: argparse.ArgumentParser, output: str) -> argparse.Namespace:
    """The command line of an example: what the parser has already, and what all examples take."""
    parser.add_argument("--short", action="store_true", help="few epochs, to see that the example works")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (1)")
    parser.add_argument("--output", default=output, help=f"the drawing ({output})")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    return given


@dataclass
class Trained:
    """A model after its training, with the loss of every step and the seconds that all steps took."""

    model: nn.Module
    losses: list[float]
    seconds: float


Value = Tensor | PackedSequence


@dataclass
class Rows:
    """Tensors in memory, of which an epoch takes batches of this size, in an order that it draws. Rows that make no
    whole batch are left out."""

    x: Tensor
    y: Tensor
    size: int

    def __len__(self) -> int:
        return len(self.x) // self.size

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """A batch, in the order in which the rows lie."""
        some = slice(number * self.size, (number + 1) * self.size)
        return self.x[some], self.y[some]

    def settings(self, generator: torch.Generator) -> dict[str, Any]:
        """What DataLoader and ``step.epoch`` are told alike."""
        return {"batch_size": self.size, "shuffle": True, "generator": generator, "drop_last": True}


Epoch = Rows | list[tuple[Value, Tensor]]  # rows in memory, or batches
Train = Callable[[Epoch, torch.Generator], list[float]]  # returns the losses of one epoch


def stock_loop(model: nn.Module, loss: nn.Module, lr: float) -> Train:
    """Stock's loop, by Adam: rows come from a DataLoader."""
    optimizer = torch.optim.Adam(model.parameters(), lr)

    def train(epoch: Epoch, generator: torch.Generator) -> list[float]:
        values = []
        if isinstance(epoch, Rows):
            batches = DataLoader(TensorDataset(epoch.x, epoch.y), **epoch.settings(generator))
        else:
            batches = epoch
        for x, y in batches:
            optimizer.zero_grad()
            value = loss(model(x), y)
            value.backward()
            optimizer.step()
            values.append(value.detach())
        return torch.stack(values).tolist()

    return train


def our_loop(model: nn.Module, loss: nn.Module, lr: float) -> Train:
    """The same by ``fastnn.training_step``: many steps in one call, where there are rows."""
    step = fastnn.training_step(model, loss, torch.optim.Adam(model.parameters(), lr))

    def train(epoch: Epoch, generator: torch.Generator) -> list[float]:
        if isinstance(epoch, Rows):
            return step.epoch(epoch.x, epoch.y, **epoch.settings(generator)).tolist()
        return step.epoch(epoch).tolist()

    return train


def train(name: str, make: Callable[..., Train], model: nn.Module, loss: nn.Module, epochs: list, lr: float) -> Trained:
    """Trains a copy of the model, with the seed that all trainings have, so that all take the same batches and drop the
    same elements."""
    own = copy.deepcopy(model).train()
    train_one, values = make(own, loss, lr), []
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    begin = time.perf_counter()
    for epoch in tqdm(epochs, desc=name, unit="epoch"):
        values += train_one(epoch, generator)
    seconds = time.perf_counter() - begin
    return Trained(own, values, seconds)


def train_both(model: nn.Module, loss: nn.Module, epochs: list, lr: float) -> tuple[Trained, Trained]:
    """Trains two copies of a model on the same batches with the same seed, one by stock's loop and one by fastnn, and
    asserts beforehand that both compute the same: the losses of the first steps, in double precision."""

    def double(value: Value) -> Value:
        return value.double() if value.data.is_floating_point() else value

    first: list[Epoch] = []
    for epoch in epochs:
        left = COMPARED - sum(map(len, first))
        if left <= 0:
            break
        if isinstance(epoch, Rows):
            first.append(Rows(double(epoch.x), double(epoch.y), epoch.size))
        else:
            first.append([(double(x), double(y)) for x, y in epoch[:left]])
    exact = copy.deepcopy(model).double()
    theirs, mine = (
        train("checking", make, exact, loss, first, lr).losses[:COMPARED] for make in (stock_loop, our_loop)
    )
    worst = max(abs(a - b) for a, b in zip(theirs, mine, strict=True))
    assert worst <= TOLERANCE * theirs[0], f"the losses differ by {worst}"
    print(f"in double precision {len(mine)} losses are stock's, to {worst / theirs[0]:.0e} of the first")

    explained = copy.deepcopy(model).train()
    step = fastnn.training_step(explained, loss, torch.optim.Adam(explained.parameters(), lr))
    step(*epochs[0][0])  # Only a step that was made says whether it went as one call.
    print(f"fastnn.training_step: {step.explain()}")
    stock = train("training, stock", stock_loop, model, loss, epochs, lr)
    ours = train("training, fastnn", our_loop, model, loss, epochs, lr)
    print(
        f"trained {stock.seconds / ours.seconds:.1f} times as fast: {ours.seconds:.2f} s, stock {stock.seconds:.2f} s"
    )
    return stock, ours


def predict_both(model: nn.Module, x: Value) -> Tensor:
    """What the model predicts, by ``fastnn.freeze`` or, where that refuses the model, by ``fastnn.fuse``, compared with
    stock's prediction in numbers and in time."""
    stock = copy.deepcopy(fastnn.unfuse(model)).eval()
    try:
        ours, way = fastnn.freeze(stock, (x,)), "frozen"
    except ValueError as reason:
        print(f"not frozen: {reason}")
        ours, way = fastnn.fuse(copy.deepcopy(stock)), "fused"
    with torch.no_grad():
        predicted = ours(x)
        torch.testing.assert_close(predicted, stock(x), rtol=1e-3, atol=1e-4)
        of_stock, of_ours = seconds_of((stock, ours), x)
    print(f"{way}, it predicts {len(predicted)} rows {of_stock / of_ours:.1f} times as fast: {1e6 * of_ours:.0f} us")
    return predicted


def seconds_of(models: Sequence[nn.Module], x: Value) -> list[float]:
    """The median time of 31 calls of each model. They take turns, so that whatever slows the machine slows all."""
    times = [[] for _ in models]
    for _ in range(31):
        for model, own in zip(models, times, strict=True):
            begin = time.perf_counter()
            model(x)
            own.append(time.perf_counter() - begin)
    return [statistics.median(own) for own in times]


def figure(columns: int) -> tuple[plt.Figure, list[plt.Axes]]:
    """A drawing of so many plots beside each other, which reads well on white and on black."""
    drawing, axes = plt.subplots(1, columns, figsize=(4.2 * columns, 3.4), layout="constrained", squeeze=False)
    for one in axes[0]:
        one.tick_params(which="both", colors=GREY)
        one.xaxis.label.set_color(GREY)
        one.yaxis.label.set_color(GREY)
        one.title.set_color(GREY)
        for side in one.spines.values():
            side.set_color(GREY)
    return drawing, list(axes[0])


def draw_losses(axes: plt.Axes, stock: Trained, ours: Trained) -> None:
    """The two loss curves over the time that each training has taken."""
    together = max(1, len(stock.losses) // 60)  # steps whose mean is drawn: single steps go up and down
    for name, one, color, style in (("stock", stock, STOCK, "--"), ("fastnn", ours, OURS, "-")):
        means = torch.tensor(one.losses[: len(one.losses) // together * together]).view(-1, together).mean(1)
        seconds = torch.linspace(0, one.seconds, len(means))
        axes.plot(seconds, means, style, color=color, label=name, linewidth=1.6)
    axes.set(xlabel="seconds", ylabel="loss", yscale="log", title="the same curve, sooner")
    axes.legend(frameon=False, labelcolor=GREY)


def save(drawing: plt.Figure, file: str) -> None:
    drawing.savefig(file, transparent=True, dpi=160)
    print(f"written: {file}")
