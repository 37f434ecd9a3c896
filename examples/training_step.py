"""Trains the three models by ``fastnn.training_step``, by stock PyTorch's loop and, where it is installed, by JAX, and
draws loss over time.

    python examples/training_step.py [--seconds 2] [--output losses.png]

All start from the same parameters and see the same batch, so the curves are the same but for time.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnn
from fastnn.reference import models

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.jax_step import jax_step

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Conv2DNet (32, 3, 20, 20)": (lambda: models.Conv2DNet(10), (32, 3, 20, 20)),
    "RNN (8, 20, 10)": (lambda: models.RNN(10, 32, 2, 5), (8, 20, 10)),
    "Autoencoder (32, 10)": (lambda: models.Autoencoder(10, 8, 5), (32, 10)),
}


def stock_loop(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def one_call(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    step = fastnn.training_step(model, F.mse_loss, optimizer, strict=True)
    return lambda: float(step(x, y))


def jax_loop(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], float] | None:
    step = jax_step(model, x, y, lr=1e-3)
    return None if step is None else lambda: float(step())


def losses(step: Callable[[], float], seconds: float) -> tuple[list[float], list[float]]:
    """Milliseconds and the loss at each step, after one to warm up."""
    step()
    times, values = [], []
    start = time.perf_counter()
    while not times or times[-1] < 1e3 * seconds:
        values.append(step())
        times.append((time.perf_counter() - start) * 1e3)
    return times, values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2, help="for each curve (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("losses.png"), help="the plot (default: %(default)s)")
    arguments = parser.parse_args()
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    torch.set_num_threads(1)
    figure, panels = plt.subplots(1, len(CASES), figsize=(12, 3.6))
    for panel, (name, (make, sizes)) in zip(panels, CASES.items(), strict=True):
        torch.manual_seed(0)
        model, x = make(), torch.randn(sizes)
        y = model(x).detach() + torch.randn(())  # something that can be learnt
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        for label, begin in (("stock PyTorch", stock_loop), ("JAX", jax_loop), ("fastnn.training_step", one_call)):
            step = begin(copy.deepcopy(model), x, y)
            if step is None:
                continue
            times, values = losses(step, arguments.seconds)
            panel.plot(times, values, label=f"{label}: {len(times) / times[-1]:.1f} steps a millisecond")
        panel.set(title=name, xlabel="milliseconds", ylabel="loss", yscale="log", xscale="log")
        panel.legend(frameon=False, fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(arguments.output, dpi=120)
    print(f"Written: {arguments.output}")


if __name__ == "__main__":
    main()
