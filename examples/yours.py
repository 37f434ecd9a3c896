"""Takes a torch.nn model of yours from a file: explains it, fuses it, freezes it and trains it, beside stock.

    python examples/yours.py model.py:make --input 32,3,32,32 [--steps 200]

``make`` is a function without arguments, a class, or a model. Without a file the example takes a network of its own.
"""

import argparse
import copy
import importlib.util
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

import fastnn
from fastnn.loading import random_inputs


def example() -> nn.Module:
    """A network for images of 3 channels, for those who have none at hand."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 36, 64), nn.Softplus(), nn.Linear(64, 10)),
    )


def load(place: str) -> nn.Module:
    """The model that ``file.py:name`` has or makes."""
    file, _, name = place.rpartition(":")
    found = importlib.util.spec_from_file_location(Path(file).stem, file)
    if found is None or found.loader is None:
        sys.exit(f"{file} is no Python file")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    made = getattr(module, name)
    model = made if isinstance(made, nn.Module) else made()
    if not isinstance(model, nn.Module):
        sys.exit(f"{place} gives a {type(model).__name__}, not a torch.nn.Module")
    return model


def seconds_of(run: nn.Module, x: Tensor) -> float:
    """The median of 30 calls, without gradients."""
    times = []
    with torch.no_grad():
        for _ in range(30):
            begin = time.perf_counter()
            run(x)
            times.append(time.perf_counter() - begin)
    return sorted(times)[15]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="file.py:name")
    parser.add_argument("--input", default="32,3,32,32", help="its sizes (32,3,32,32)")
    parser.add_argument("--steps", type=int, default=200, help="of training (200)")
    parser.add_argument("--short", action="store_true", help="20 steps")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (1)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    stock = load(given.model) if given.model else example()
    (x,) = random_inputs([given.input])

    print(fastnn.explain(stock.eval(), x))
    fused = fastnn.fuse(copy.deepcopy(stock))
    frozen = fastnn.freeze(stock, x)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), stock(x), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(frozen(x), stock(x), rtol=1e-3, atol=1e-4)
    of_stock = seconds_of(stock, x)
    print(f"predicts: fused {of_stock / seconds_of(fused, x):.1f}, frozen {of_stock / seconds_of(frozen, x):.1f} times "
          "as fast as stock")  # fmt: skip

    ours = copy.deepcopy(stock).train()
    target = torch.randn_like(stock(x)).detach()
    step = fastnn.training_step(ours, F.mse_loss, torch.optim.Adam(ours.parameters()))
    print(step.explain())
    optimizer = torch.optim.Adam(stock.train().parameters())
    seconds, losses = {"stock": 0.0, "fastnn": 0.0}, list[tuple[float, float]]()
    for _ in trange(20 if given.short else given.steps, desc="training both", unit="step"):
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss = F.mse_loss(stock(x), target)
        loss.backward()
        optimizer.step()
        between = time.perf_counter()
        losses.append((float(loss.detach()), float(step(x, target))))
        seconds["stock"] += between - begin
        seconds["fastnn"] += time.perf_counter() - between
    theirs, mine = losses[-1]
    print(f"trains {seconds['stock'] / seconds['fastnn']:.1f} times as fast")
    print(f"the loss went from {losses[0][0]:.2g} to {mine:.2g}, stock's to {theirs:.2g}")


if __name__ == "__main__":
    main()
