"""Training steps in two processes that average their gradients, beside one process that has the whole batch.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.data_parallel

For MLPs of several widths: one all-reduce of as many numbers as the model has parameters; a step of one process on the
whole batch, while the others wait; and a step of all processes on a part of it each, by training_step and by stock's
loop on DistributedDataParallel. Each process has one thread. Medians and, in parentheses, least of many short rounds in
turn, in microseconds by the clock. On a machine with other work only the least ones say what the steps themselves take,
since an all-reduce waits for a process that has lost its core.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastnn

SIZES = [(32, 64), (128, 256), (512, 256), (1024, 512)]  # widths, and rows of the whole batch


def mlp(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def stock_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.mse_loss(model(x), y).backward()
    optimizer.step()


def step_of(model: nn.Module, process_group: Any) -> Callable[..., Tensor]:
    optimizer = torch.optim.Adam(model.parameters())
    return fastnn.training_step(model, F.mse_loss, optimizer, strict=True, process_group=process_group)


def microseconds(run: Callable[[], Any], calls: int) -> float:
    begin = perf_counter()
    for _ in range(calls):
        run()
    return (perf_counter() - begin) / calls * 1e6


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    for width, rows in SIZES:
        x, y = torch.randn(rows, width), torch.randn(rows, width)
        part = x[rank::size].contiguous(), y[rank::size].contiguous()
        flat = torch.zeros(sum(p.numel() for p in mlp(width).parameters()))
        stock = mlp(width)
        parallel = DistributedDataParallel(stock)
        runs = {
            "all-reduce": partial(dist.all_reduce, flat),
            "one process": partial(step_of(mlp(width), None), x, y),
            "all, training_step": partial(step_of(mlp(width), dist.group.WORLD), *part),
            "all, stock": partial(stock_step, parallel, torch.optim.Adam(stock.parameters(), fused=True), *part),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        calls = max(2, min(20, 10**8 // (rows * width * width)))
        for number in range(rounds + 1):
            for name, run in runs.items():
                dist.barrier()
                if name != "one process" or rank == 0:
                    taken = microseconds(run, calls)
                    if number:
                        times[name].append(taken)
        if rank == 0:
            row = ", ".join(f"{name} {statistics.median(own):.0f} ({min(own):.0f})" for name, own in times.items())
            print(f"{flat.numel()} parameters, {rows} rows, {size} processes: {row}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    main(parser.parse_args().rounds)
