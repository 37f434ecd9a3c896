"""A training step in Lightning's loop and in a plain one: stock, fused, and by fastnn.training_step.

``python -m benchmarks.lightning_loop``. Lightning's loops are those of docs/integrations.md. All read the same
DataLoader, so that what Lightning's loop takes by itself is the difference. Times are medians over steps.
"""

import argparse
import copy
import logging
import statistics
import sys
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

import fastnn
from benchmarks.cases import MODELS
from benchmarks.stored import environment

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "integrations"))
from beside_stock import recipe

RESULTS = Path(__file__).parent / "results"
Batches = list[tuple[Tensor, Tensor]]


class Clock(lightning.Callback):
    """Notes when each step begins."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:
        self.times.append(perf_counter())


def in_lightning(kind: str, fused: bool) -> Callable[[nn.Module, Batches], list[float]]:
    page = recipe("Lightning")

    def train(model: nn.Module, batches: Batches) -> list[float]:
        clock = Clock()
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=1, callbacks=[clock, *([page.Fuse()] if fused else [])], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(getattr(page, kind)(model), DataLoader(batches, batch_size=None))
        return clock.times

    return train


def in_a_loop(make_step: Callable[[nn.Module], Callable[[Tensor, Tensor], Tensor]]) -> Callable[..., list[float]]:
    def train(model: nn.Module, batches: Batches) -> list[float]:
        step, times, losses = make_step(model), [], []
        for x, y in DataLoader(batches, batch_size=None):
            times.append(perf_counter())
            losses.append(step(x, y))
        return times

    return train


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def ordinary_step(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    optimizer = sgd(model)

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


LOOPS = {
    "loop, stock": in_a_loop(ordinary_step),
    "loop, fused": in_a_loop(lambda model: ordinary_step(fastnn.fuse(model))),
    "loop, training_step": in_a_loop(lambda model: fastnn.training_step(model, mse_loss, sgd(model), strict=True)),
    "Lightning, stock": in_lightning("Ordinary", fused=False),
    "Lightning, fused": in_lightning("Ordinary", fused=True),
    "Lightning, training_step": in_lightning("InOneCall", fused=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lightning_loop", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="of a training (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS / "lightning_loop.md", help="file for the table")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # Lightning's, about a machine's cores
    lines = [f"| microseconds a step | {' | '.join(LOOPS)} |", "|---" * (len(LOOPS) + 1) + "|"]
    for case in MODELS[:3]:
        model, x = case.stock(), case.make_input(torch.Generator().manual_seed(0))
        batches = [(x, torch.zeros_like(model(x).detach()))] * given.steps
        taken: dict[str, list[float]] = {name: [] for name in LOOPS}
        for _ in range(given.rounds):
            for name, train in LOOPS.items():
                times = train(copy.deepcopy(model), batches)[10:]
                taken[name] += [after - before for before, after in pairwise(times)]
        cells = [f"{1e6 * statistics.median(times):.0f}" for times in taken.values()]
        lines.append(f"| {case.name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    given.output.write_text("\n".join([", ".join(environment().values()), "", *lines, ""]))


if __name__ == "__main__":
    main()
