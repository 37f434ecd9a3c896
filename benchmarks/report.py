"""The program of ``make bench``: the three models on fused layers against the same on stock ones."""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.cases import MODELS, Case
from benchmarks.problem import Problem
from benchmarks.providers import prepare
from benchmarks.step import steps_of
from benchmarks.stored import OUTPUT, save
from benchmarks.timing import interleave, is_reliable, quartiles, speedups
from fastnn.testing import using_threads

DIRECTIONS = ("inference", "training", "step")


def measure(case: Case, direction: str, threads: int, seconds: float) -> dict[str, Any]:
    """Stock against fused on one case, after checking that the fused model is right. A "step" is a whole training step
    with Adam: stock's fused optimizer against ``fastnn.training_step``."""
    with using_threads(threads):
        if direction == "step":
            steps = steps_of(case, ["stock, fused Adam", "training_step"])
            timings = interleave(dict(zip(("stock", "fused"), steps.values(), strict=True)), seconds)
        else:
            problem = Problem(case, direction)
            with problem.context():
                runners = {"stock": prepare("eager", problem), "fused": prepare("fastnn", problem)}
                timings = interleave(runners, seconds)
    ratios = speedups(timings["fused"], timings["stock"])
    ratio, ratio_quartiles = statistics.median(ratios), quartiles(ratios)
    return {
        "case": case.name,
        "direction": direction,
        "threads": threads,
        "microseconds": {name: timing.median * 1e6 for name, timing in timings.items()},
        "ratio": ratio,
        "ratio_quartiles": ratio_quartiles,
        "reliable": is_reliable(ratio, ratio_quartiles),
    }


def _mark_waiting(rows: list[dict[str, Any]]) -> None:
    """Rows of several threads in which stock's calls take many times as long as on one are no measurement either: its
    threads waited for a processor that others had."""
    alone = {(row["case"], row["direction"]): row["microseconds"]["stock"] for row in rows if row["threads"] == 1}
    for row in rows:
        if row["microseconds"]["stock"] > 5 * alone.get((row["case"], row["direction"]), float("inf")):
            row["reliable"] = False


def measure_all(threads: list[int], seconds: float, console: Console) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows, and the words of the cases that failed their check and so have none."""
    jobs = [(case, direction, count) for case in MODELS for direction in DIRECTIONS for count in threads]
    columns = (TextColumn("{task.description:52}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    rows, failures = [], []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(jobs))
        for case, direction, count in jobs:
            progress.update(task, description=f"{case.name}, {direction}, {_threads_text(count)}")
            try:
                rows.append(measure(case, direction, count, seconds))
            except AssertionError as error:
                failures.append(f"{case.name}, {direction}, {_threads_text(count)}: {error}")
            progress.advance(task)
    _mark_waiting(rows)
    return rows, failures


def as_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="fastnn against stock PyTorch: median times; spread is the middle half", box=box.SIMPLE_HEAD)
    for name in ("model (input)", "direction"):
        table.add_column(name, no_wrap=True)
    for name in ("threads", "stock", "fused", "ratio", "spread"):
        table.add_column(name, no_wrap=True, justify="right")
    for i, row in enumerate(rows):
        low, high = row["ratio_quartiles"]
        table.add_row(
            row["case"],
            row["direction"],
            str(row["threads"]),
            as_time(row["microseconds"]["stock"]),
            as_time(row["microseconds"]["fused"]),
            as_ratio(row),
            f"{low:.1f}-{high:.1f}",
            end_section=i + 1 < len(rows) and rows[i + 1]["case"] != row["case"],
        )
    return table


def as_ratio(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.1f}x" if row["reliable"] else "worthless"


def print_table(rows: list[dict[str, Any]], console: Console) -> None:
    """In full, even where the console says that it is narrow, as a pipe does; with a word on rows that say nothing."""
    table = as_table(rows)
    console.width = max(console.width, Console(width=1000).measure(table).maximum)
    console.print(table)
    worthless = sum(not row["reliable"] for row in rows)
    if worthless:
        console.print(
            f"{worthless} of {len(rows)} rows are worthless: their spread is larger than what they measure. Something "
            "else keeps this machine busy; measure again when it is idle.",
            style="bold red",
            highlight=False,
        )


def as_time(microseconds: float) -> str:
    return f"{microseconds:.1f} µs" if microseconds < 1000 else f"{microseconds / 1000:.2f} ms"


def report_failures(failures: list[str], console: Console) -> None:
    """No time is given for a wrong result; the program ends with an error instead."""
    for failure in failures:
        console.print(f"[bold red]Wrong result, not measured:[/bold red] {failure}", highlight=False, soft_wrap=True)
    if failures:
        raise SystemExit(1)


def _threads_text(count: int) -> str:
    return f"{count} thread" + ("s" if count > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5, help="measuring time of each row (default: %(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts (default: 1 2)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of models.json")
    arguments = parser.parse_args()

    console = Console()
    rows, failures = measure_all(arguments.threads, arguments.seconds, console)
    print_table(rows, console)
    save(arguments.output, "models", rows, arguments.seconds)
    report_failures(failures, console)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
