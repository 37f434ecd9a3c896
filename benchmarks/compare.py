"""The program of ``make bench-conv``, ``bench-rnn``, ``bench-mlp`` and ``bench-frozen``: the cases of one op, or the
whole models, every provider, side by side."""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.bounds import BUFFERS, traffic
from benchmarks.cases import CASES, Case
from benchmarks.problem import DIRECTIONS, Problem
from benchmarks.providers import PROVIDERS, prepare
from benchmarks.report import as_time, report_failures
from benchmarks.stored import OUTPUT, save
from benchmarks.timing import Timing, bandwidth, interleave, peak_flops, quartiles, speedups
from fastnn.testing import using_threads


def times(problem: Problem, threads: int, providers: list[str], seconds: float, rounds: int = 7) -> dict[str, Timing]:
    """Every provider that serves the problem, in turns, after each has been checked."""
    with using_threads(threads), problem.context():
        prepared = {name: prepare(name, problem) for name in providers}
        return interleave({name: run for name, run in prepared.items() if run is not None}, seconds, rounds)


def measure(
    case: Case,
    direction: str,
    threads: int,
    providers: list[str],
    seconds: float,
    peak: float,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """The case's times, and what bounds them."""
    problem = Problem(case, direction, dtype)
    timings = times(problem, threads, providers, seconds)
    ours = timings["fastnn"]
    rivals = {name: timing for name, timing in timings.items() if not name.startswith("fastnn")}
    best = min(rivals, key=lambda name: rivals[name].median)
    # The least time that the multiply-adds take, or the reads (each thread has a cache), whichever is longer.
    least = {"multiply-adds": problem.flops / peak}
    if problem.bytes > 0:
        least["cache"] = problem.bytes / (threads * bandwidth(case.step_bytes / 1e6))
    bound = max(least, key=lambda name: least[name])
    return {
        "case": case.name,
        "direction": direction,
        "threads": threads,
        "microseconds": {name: timing.median * 1e6 for name, timing in timings.items()},
        "best_rival": best,
        "best_rival_over_fastnn": rivals[best].median / ours.median,
        "best_rival_over_fastnn_quartiles": quartiles(speedups(ours, rivals[best])),
        "bound": bound,
        "percent_of_bound": 100 * least[bound] / ours.median,
        "operations": problem.flops,
        "bytes_of_inference": traffic(problem),
    }


def report_row(title: str, row: dict[str, Any], console: Console) -> None:
    times = ", ".join(f"{name} {as_time(value)}" for name, value in row["microseconds"].items())
    ratio = f"{row['best_rival_over_fastnn']:.2f}x against {row['best_rival']}"
    console.print(
        f"[bold]{title}[/bold]: {ratio}, {row['percent_of_bound']:.0f} % of the {row['bound']} bound\n  {times}",
        highlight=False,
        soft_wrap=True,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("op", choices=list(CASES))
    parser.add_argument("--only", default="", help="measure the cases whose name contains this text")
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS))
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default: %(default)s")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts (default: 1 2)")
    parser.add_argument("--seconds", type=float, default=5, help="measuring time of each row (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of <op>.json")
    arguments = parser.parse_args()
    if "fastnn" not in arguments.providers or len(arguments.providers) < 2:
        parser.error("--providers must name fastnn and at least one rival")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    console = Console()
    dtype = getattr(torch, arguments.dtype)
    peaks = {}
    for threads in arguments.threads:
        with using_threads(threads):
            peaks[threads] = peak_flops()
    rows, failures = [], []
    cases = [case for case in CASES[arguments.op] if arguments.only in case.name]
    jobs = [(case, direction, n) for case in cases for direction in arguments.directions for n in arguments.threads]
    for done, (case, direction, threads) in enumerate(jobs):
        title = f"{case.name}, {direction}, {threads} thread(s)"
        try:
            with console.status(f"{done + 1} of {len(jobs)}: {title}"):
                row = measure(case, direction, threads, arguments.providers, arguments.seconds, peaks[threads], dtype)
        except AssertionError as error:
            failures.append(f"{title}: {error}")
            continue
        rows.append(row)
        report_row(title, row, console)
    # models.json is what benchmarks.report writes.
    name = "frozen" if arguments.op == "models" else arguments.op
    name += "" if arguments.dtype == "float32" else f"_{arguments.dtype}"
    bandwidths = {megabytes: bandwidth(megabytes) for megabytes in BUFFERS}
    save(arguments.output, name, rows, arguments.seconds, dtype=arguments.dtype, peak=peaks, bandwidth=bandwidths)
    report_failures(failures, console)


if __name__ == "__main__":
    main()
