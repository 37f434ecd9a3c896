"""Searches a network's settings on scikit-learn's digits: many small models, trained by threads of one process.

python examples/search.py [--models 200] [--workers 2] [--short] [--threads 1] [--output search.png]
"""

import argparse
import functools
import importlib.util
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
RIVAL = "#4f83cc"


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


@functools.cache
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


def orders_of(some: list[Settings], epochs: int, rows: int) -> Tensor:
    """The order in which a DataLoader of each model's generator gives the rows: (models, epochs, rows)."""
    orders = torch.empty(len(some), epochs, rows, dtype=torch.int32)
    for settings, own in zip(some, orders, strict=True):
        _, _, generator = model_of(settings)
        for order in own:
            torch.empty((), dtype=torch.int64).random_(generator=generator)  # the seed of its workers
            order.copy_(torch.randperm(rows, generator=generator))
            torch.randperm(rows, generator=generator)  # of which its sampler takes none
    return orders


def by_vmap(some: list[Settings], epochs: int) -> tuple[float, list[tuple[float, float]]] | None:
    """All models at once by JAX: ``vmap`` over models of ``lax.scan`` over batches -> the time of one model, without
    that of compiling, and what every one has come to. Narrower models have zeros for the units that they lack, which
    stay zeros. None where JAX and optax are not installed."""
    if not (importlib.util.find_spec("jax") and importlib.util.find_spec("optax")):
        print("JAX's vmap is left out: it takes jax and optax")
        return None
    import jax
    import jax.numpy as jnp
    import optax

    x, y, more_x, more_y = (jnp.asarray(one.numpy()) for one in data())
    widest, batches = max(settings.width for settings in some), -(-len(x) // BATCH)
    missing = batches * BATCH - len(x)  # rows of the last batch, which count nothing
    counts = jnp.arange(batches * BATCH).reshape(batches, BATCH) < len(x)

    def padded(model: nn.Module) -> list[Tensor]:
        lacks = widest - model[0].out_features
        (w, b), (v, c) = ((layer.weight.detach(), layer.bias.detach()) for layer in (model[0], model[2]))
        return [F.pad(w, (0, 0, 0, lacks)), F.pad(b, (0, lacks)), F.pad(v, (0, lacks)), c]

    weights = [padded(model_of(settings)[0]) for settings in some]
    begin = [jnp.asarray(torch.stack(each).numpy()) for each in zip(*weights, strict=True)]
    rates = jnp.asarray([settings.lr for settings in some]), jnp.asarray([settings.weight_decay for settings in some])
    orders = jnp.asarray(F.pad(orders_of(some, epochs, len(x)), (0, missing)).view(len(some), -1, BATCH).numpy())

    def scores(p: list, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ p[0].T + p[1]) @ p[2].T + p[3]

    def loss_of(p: list, places: jax.Array, counted: jax.Array) -> jax.Array:
        each = optax.softmax_cross_entropy_with_integer_labels(scores(p, x[places]), y[places])
        return (each * counted).sum() / counted.sum()

    def train(p: list, lr: jax.Array, weight_decay: jax.Array, order: jax.Array) -> tuple[jax.Array, jax.Array]:
        optimizer = optax.adamw(lr, weight_decay=weight_decay)

        def step(carry: tuple, given: tuple) -> tuple:
            p, state = carry
            loss, gradients = jax.value_and_grad(loss_of)(p, *given)
            updates, state = optimizer.update(gradients, state, p)
            return (optax.apply_updates(p, updates), state), loss

        every = jnp.tile(counts, (epochs, 1))
        (p, _), losses = jax.lax.scan(step, (p, optimizer.init(p)), (order, every))
        return losses[-1], (scores(p, more_x).argmax(1) == more_y).mean()

    run = jax.jit(jax.vmap(train)).lower(begin, *rates, orders).compile()
    start = time.perf_counter()
    losses, accuracies = jax.block_until_ready(run(begin, *rates, orders))
    return (time.perf_counter() - start) / len(some), list(zip(losses.tolist(), accuracies.tolist(), strict=True))


def check_losses(found: list, expected: list, tolerance: float) -> None:
    """Asserts that the last losses of the models are equal, but for rounding errors."""
    for (loss, _), (theirs, _) in zip(found, expected, strict=False):
        assert abs(loss - theirs) <= tolerance * max(1.0, theirs), f"a loss differs: {loss} and {theirs}"


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
    check_losses(found, expected, 1e-2)
    times = {"stock,\nprocesses": stock, "fastnn,\nthreads": ours}
    ratio = f"{stock / ours:.1f} times as fast: {1e3 * ours:.1f} ms a model, not {1e3 * stock:.1f}"
    print(f"{given.workers} workers trained {ratio}")
    vmapped = by_vmap(some, epochs)
    if vmapped is not None:
        # After one epoch: with high learning rates rounding errors grow over many of them, and XLA's are others.
        check_losses([by_fastnn(settings, 1) for settings in some], by_vmap(some, 1)[1], 1e-3)
        times["JAX,\nvmap"] = vmapped[0]
        print(f"{vmapped[0] / ours:.1f} times as fast as JAX's vmap on all cores: {1e3 * vmapped[0]:.1f} ms a model")
    accuracies = [accuracy for _, accuracy in found]
    best = max(range(count), key=accuracies.__getitem__)
    print(f"the best of {count}: {some[best]}, accuracy {accuracies[best]:.3f}")

    drawing, (left, right) = figure(2)
    left.scatter(
        [one.lr for one in some], accuracies, s=[one.width / 2 for one in some], color=OURS, alpha=0.7, linewidths=0
    )
    left.set(xscale="log", xlabel="learning rate", ylabel="accuracy", title=f"{count} models (size: width)")
    right.bar(times.keys(), times.values(), color=[STOCK, OURS, RIVAL][: len(times)], width=0.6)
    for place, seconds in enumerate(times.values()):
        right.annotate(f"{1e3 * seconds:.1f} ms", (place, seconds), ha="center", va="bottom", color=GREY)
    right.margins(y=0.15)
    right.set(ylabel="seconds a model", title=f"{given.workers} workers, {epochs} epochs a model")
    save(drawing, given.output)


if __name__ == "__main__":
    main()
