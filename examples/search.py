"""Searches a network's settings on scikit-learn's digits: many small models, trained by threads of one process.

python examples/search.py [--models 200] [--workers 2] [--short] [--threads 1] [--output search.png]
"""

import argparse
import multiprocessing
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import GREY, OURS, STOCK, arguments, figure, save
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import fastnn

BATCH = 32


@dataclass(frozen=True)
class Settings:
    """What is searched, and the seed from which weights and batches come."""

    width: int
    lr: float
    weight_decay: float
    seed: int


def settings_of(count: int) -> list[Settings]:
    """So many settings, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(count, 3, generator=generator).tolist()
    return [
        Settings(8 + int(56 * a), 10 ** (-3.5 + 2 * b), 10 ** (-4 + 3 * c), seed)
        for seed, (a, b, c) in enumerate(draws)
    ]


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows and classes to train on, then those to judge by."""
    digits = load_digits()
    x, y = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    first, rest = order[:1200], order[1200:]
    return x[first], y[first], x[rest], y[rest]


def model_of(settings: Settings) -> tuple[nn.Module, torch.optim.Optimizer, torch.Generator]:
    """The model, with weights that follow from the seed alone, whatever other threads draw meanwhile."""
    generator = torch.Generator().manual_seed(settings.seed)
    model = nn.Sequential(nn.Linear(64, settings.width), nn.ReLU(), nn.Linear(settings.width, 10))
    for layer in (model[0], model[2]):
        nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=generator)
        nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(model.parameters(), settings.lr, weight_decay=settings.weight_decay)
    return model, optimizer, generator


def accuracy_of(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == y).float().mean())


def by_fastnn(settings: Settings, epochs: int) -> tuple[float, float]:
    """The last loss and the accuracy of one model, trained by ``step.epoch``, which does not hold Python's lock."""
    x, y, more_x, more_y = data()
    model, optimizer, generator = model_of(settings)
    step = fastnn.training_step(model, F.cross_entropy, optimizer, strict=True)
    for _ in range(epochs):
        losses = step.epoch(x, y, BATCH, shuffle=True, generator=generator)
    return float(losses[-1]), accuracy_of(model, more_x, more_y)


def by_stock(settings: Settings, epochs: int) -> tuple[float, float]:
    """The same by stock's loop."""
    torch.set_num_threads(1)
    x, y, more_x, more_y = data()
    model, optimizer, generator = model_of(settings)
    loader = DataLoader(TensorDataset(x, y), BATCH, shuffle=True, generator=generator)
    for _ in range(epochs):
        for some_x, some_y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(some_x), some_y)
            loss.backward()
            optimizer.step()
    return float(loss), accuracy_of(model, more_x, more_y)


def seconds_of_each(name: str, pool: Executor, train: object, some: list[Settings], epochs: int) -> tuple[float, list]:
    """The time of one model, and what every one has come to."""
    begin = time.perf_counter()
    found = list(tqdm(pool.map(train, some, [epochs] * len(some)), desc=name, total=len(some), unit="model"))
    return (time.perf_counter() - begin) / len(some), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=200, help="how many settings are tried (200)")
    parser.add_argument("--workers", type=int, default=2, help="threads that train, or processes of stock's (2)")
    given = arguments(parser, "search.png")
    count, epochs = (12, 2) if given.short else (given.models, 20)
    some = settings_of(count)
    few = some[: max(given.workers, count // 10)]  # stock trains these alone

    by_fastnn(some[0], 1)
    with ThreadPoolExecutor(given.workers) as threads:
        ours, found = seconds_of_each("fastnn, threads", threads, by_fastnn, some, epochs)
    with ProcessPoolExecutor(given.workers, multiprocessing.get_context("spawn")) as processes:
        list(processes.map(by_stock, few[: given.workers], [1] * given.workers))  # starts the processes
        stock, expected = seconds_of_each("stock, processes", processes, by_stock, few, epochs)
    for (loss, _), (theirs, _) in zip(found, expected, strict=False):
        assert abs(loss - theirs) <= 1e-2 * max(1.0, theirs), f"a loss differs: {loss} and {theirs}"
    ratio = f"{stock / ours:.1f} times as fast: {1e3 * ours:.0f} ms a model, not {1e3 * stock:.0f}"
    print(f"{given.workers} workers trained {ratio}")
    accuracies = [accuracy for _, accuracy in found]
    best = max(range(count), key=accuracies.__getitem__)
    print(f"the best of {count}: {some[best]}, accuracy {accuracies[best]:.3f}")

    drawing, (left, right) = figure(2)
    left.scatter(
        [one.lr for one in some], accuracies, s=[one.width / 2 for one in some], color=OURS, alpha=0.7, linewidths=0
    )
    left.set(xscale="log", xlabel="learning rate", ylabel="accuracy", title=f"{count} models (size: width)")
    right.bar(["stock,\nprocesses", "fastnn,\nthreads"], [stock, ours], color=[STOCK, OURS], width=0.6)
    for place, seconds in enumerate((stock, ours)):
        right.annotate(f"{1e3 * seconds:.0f} ms", (place, seconds), ha="center", va="bottom", color=GREY)
    right.margins(y=0.15)
    right.set(ylabel="seconds a model", title=f"{given.workers} workers, {epochs} epochs a model")
    save(drawing, given.output)


if __name__ == "__main__":
    main()
