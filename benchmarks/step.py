"""A whole training step (forward, loss, backward, Adam): stock, compiled, fastnn's layers, fastnn.training_step, JAX.

``make bench-step``. The losses of ten steps are compared before anything is timed.
"""

import argparse
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnn
from benchmarks.cases import MODELS, Case
from benchmarks.jax_step import jax_step
from benchmarks.stored import OUTPUT, save
from benchmarks.timing import interleave
from fastnn.testing import using_threads

CONTENDERS = ("stock", "stock, fused Adam", "compile", "fastnn layers", "training_step", "jax")
_LR = 1e-3
Step = Callable[[], Any]  # returns the loss


def _ordinary(model: Callable[..., Tensor], parameters: Any, x: Tensor, y: Tensor, **options: Any) -> Step:
    optimizer = torch.optim.Adam(parameters, lr=_LR, **options)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return step


def _in_one_call(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    optimizer = torch.optim.Adam(model.parameters(), lr=_LR)
    step = fastnn.training_step(model, F.mse_loss, optimizer, strict=True)
    return lambda: step(x, y)


def _compiled(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Forward, loss and backward, and the optimizer, compiled."""
    optimizer = torch.optim.Adam(model.parameters(), lr=_LR, foreach=True)
    loss_of = torch.compile(lambda: F.mse_loss(model(x), y))
    update = torch.compile(optimizer.step)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        update()
        return loss

    return step


def steps_of(case: Case, contenders: list[str]) -> dict[str, Step]:
    torch.manual_seed(0)
    stock, x = case.stock(), case.make_input(torch.Generator().manual_seed(0))
    y = torch.randn(stock(x).shape)
    models = {contender: copy.deepcopy(stock) for contender in CONTENDERS}
    fused = fastnn.fuse(models["fastnn layers"])
    makers: dict[str, Callable[[], Step | None]] = {
        "stock": lambda: _ordinary(models["stock"], models["stock"].parameters(), x, y),
        "stock, fused Adam": lambda: _ordinary(stock, stock.parameters(), x, y, fused=True),
        "compile": lambda: _compiled(models["compile"], x, y),
        "fastnn layers": lambda: _ordinary(fused, fused.parameters(), x, y, fused=True),
        "training_step": lambda: _in_one_call(models["training_step"], x, y),
        "jax": lambda: jax_step(models["jax"], x, y, _LR),
    }
    steps = {}
    for contender in contenders:
        step = makers[contender]()
        if step is not None:
            steps[contender] = step
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Converting a tensor with requires_grad")
        losses = {contender: [float(step()) for _ in range(10)] for contender, step in steps.items()}
    expected = next(iter(losses.values()))
    for found in losses.values():
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-4)
    return steps


def as_line(row: dict[str, Any]) -> str:
    times = row["microseconds"]
    best = min(times[name] for name in CONTENDERS[:2] if name in times)
    cells = ", ".join(f"{name} {time:.1f} us" for name, time in times.items())
    return f"{row['case']}, {row['threads']} thread(s): {best / times['training_step']:.1f}x\n  {cells}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="the models whose name contains this text")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time of a row (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of step.json")
    arguments = parser.parse_args()
    rows = []
    for case in MODELS:
        if arguments.only not in case.name:
            continue
        for threads in arguments.threads:
            with using_threads(threads), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about other people's software
                torch.compiler.reset()
                timings = interleave(steps_of(case, arguments.contenders), arguments.seconds)
            microseconds = {name: timing.median * 1e6 for name, timing in timings.items()}
            rows.append({"case": case.name, "direction": "step", "threads": threads, "microseconds": microseconds})
            print(as_line(rows[-1]), flush=True)
    if not arguments.only:
        save(arguments.output, "step", rows, arguments.seconds)


if __name__ == "__main__":
    main()
