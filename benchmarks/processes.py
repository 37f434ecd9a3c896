"""As many processes of one thread as there are cores, all at once, beside each of them alone.

``make bench-processes``. Each process calls a model of its own over and over. Where the ratio is 1, they do not disturb
each other; what the machine itself costs (caches, memory and frequency are shared) is in stock's ratio, measured in the
same turns. Times are the processor's, since a process whose core another program takes has to wait, alone or not, and
since a process that waits busily shows in them. The last column is by the clock, which means something on an idle
machine.
"""

import argparse
import multiprocessing
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Barrier
from time import perf_counter, process_time
from typing import Any

import torch

from benchmarks.cases import MODELS, Case
from benchmarks.step import steps_of
from benchmarks.stored import environment

RESULTS = Path(__file__).parent / "results"
CASES = MODELS[:3]
_COLUMNS = "Times and ratio are the processor's; the ratio by the clock says nothing where other programs were running."


def runners_of(case: Case) -> dict[str, Callable[[], Any]]:
    """Inference and a training step, by stock and by fastnn."""
    torch.manual_seed(0)
    steps = steps_of(case, ["stock, fused Adam", "training_step"])
    stock, fused = case.stock().eval(), case.fused().eval()
    x = case.make_input(torch.Generator().manual_seed(0))
    return {
        "inference, stock": partial(stock, x),
        "inference, fastnn": partial(fused, x),
        "step, stock": steps["stock, fused Adam"],
        "step, fastnn": steps["training_step"],
    }


def seconds_a_call(run: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """Calls for so many seconds, at least once -> what a call has taken of the processor, and by the clock."""
    begin, used, calls = perf_counter(), process_time(), 0
    while calls == 0 or perf_counter() < begin + seconds:
        run()
        calls += 1
    return (process_time() - used) / calls, (perf_counter() - begin) / calls


def work(place: int, barrier: Barrier, results: Any, seconds: float, rounds: int) -> None:
    """What each process does: in every round it runs a block of calls alone, and another together with all others."""
    torch.set_num_threads(1)
    found = {}
    for case in CASES:
        for name, run in runners_of(case).items():
            with torch.set_grad_enabled(name.startswith("step")):
                seconds_a_call(run, seconds)
                samples = []
                for _ in range(rounds):
                    taken = []
                    for turn in (*range(barrier.parties), None):
                        barrier.wait()
                        if turn in (place, None):
                            taken.append(seconds_a_call(run, seconds))
                    samples.append(taken)
                barrier.wait()
            found[case.name, name] = samples
    results.put(found)


def measure(count: int, seconds: float, rounds: int) -> dict[tuple[str, str], list[list[tuple[float, float]]]]:
    """By model and contender: what a call takes alone and together with all others, in each process and round."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(count), context.Queue()
    processes = [context.Process(target=work, args=(i, barrier, results, seconds, rounds)) for i in range(count)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return {key: [sample for one in found for sample in one[key]] for key in found[0]}


def as_table(rows: dict[tuple[str, str], list[list[tuple[float, float]]]]) -> str:
    lines = ["| model | what | us alone | us beside the others | ratio | by the clock |", "|---|---|---|---|---|---|"]
    for (model, what), samples in rows.items():
        alone, together = (1e6 * statistics.median(times[0] for times in turn) for turn in zip(*samples, strict=True))
        ratios = [statistics.median(slow[i] / fast[i] for fast, slow in samples) for i in range(2)]
        lines.append(f"| {model} | {what} | {alone:.1f} | {together:.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one a core, %(default)s")
    parser.add_argument("--seconds", type=float, default=0.05, help="of a block of calls (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS / "processes.md", help="file for the table")
    given = parser.parse_args()
    table = as_table(measure(given.processes, given.seconds, given.rounds))
    print(table)
    heading = f"{', '.join(environment().values())}\n\n{given.processes} processes of one thread. {_COLUMNS}"
    given.output.write_text(f"{heading}\n\n{table}\n")


if __name__ == "__main__":
    main()
