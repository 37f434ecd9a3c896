"""The program of ``make bench-conv``, ``bench-rnn``, ``bench-mlp`` and ``bench-frozen``: the cases of one op, or the
whole models, every provider, side by side."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.cases import CASES, Case
from benchmarks.problem import DIRECTIONS, Problem
from benchmarks.providers import PROVIDERS, prepare
from benchmarks.report import RESULTS, as_time, report_failures
from benchmarks.timing import bandwidth, environment, interleave, peak_flops, quartiles, speedups
from fastnn.testing import using_threads


def measure(
    case: Case,
    direction: str,
    threads: int,
    providers: list[str],
    seconds: float,
    peak: float,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Every provider that serves the case, in turns, after each has been checked."""
    problem = Problem(case, direction, dtype)
    with using_threads(threads), problem.context():
        prepared = {name: prepare(name, problem) for name in providers}
        timings = interleave({name: run for name, run in prepared.items() if run is not None}, seconds)
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
        "quartiles": {name: [q * 1e6 for q in timing.quartiles] for name, timing in timings.items()},
        "best_rival": best,
        "best_rival_over_fastnn": rivals[best].median / ours.median,
        "best_rival_over_fastnn_quartiles": quartiles(speedups(ours, rivals[best])),
        "best_rival_over_frozen": rivals[best].median / timings["fastnn frozen"].median
        if "fastnn frozen" in timings
        else None,
        "eager_over_fastnn": rivals["eager"].median / ours.median if "eager" in rivals else None,
        "bound": bound,
        "percent_of_bound": 100 * least[bound] / ours.median,
    }


def thread_speedup(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """How many times faster fastnn is than on one thread; None for that itself, or if it was not measured."""
    key = (row["case"], row["direction"], 1)
    single = [r for r in rows if (r["case"], r["direction"], r["threads"]) == key]
    if row["threads"] == 1 or not single:
        return None
    return single[0]["microseconds"]["fastnn"] / row["microseconds"]["fastnn"]


def as_markdown(rows: list[dict[str, Any]], info: dict[str, Any]) -> str:
    """One table: times of all, then what matters."""
    providers = [name for name in PROVIDERS if any(name in row["microseconds"] for row in rows)]
    heading = ["case", "direction", "threads", *providers, "best rival / fastnn", "spread", "eager / fastnn"]
    heading += ["% of its bound", "1 thread / this"]
    peaks = ", ".join(f"{flops / 1e9:.0f} GFLOP/s on {count} thread(s)" for count, flops in info["peak"].items())
    lines = [
        ", ".join(
            f"{name} {info[name]}" for name in ("processor", "instruction_set", "dtype", "torch", "fastnn", "time")
        ),
        f"FMA peak, float32: {peaks}",
        "",
        "| " + " | ".join(heading) + " |",
        "|" + "---|" * len(heading),
    ]
    for row in rows:
        times = row["microseconds"]
        low, high = row["best_rival_over_fastnn_quartiles"]
        cells = [
            row["case"],
            row["direction"],
            str(row["threads"]),
            *(as_time(times[name]) if name in times else "" for name in providers),
            f"**{row['best_rival_over_fastnn']:.2f}**",
            f"{low:.2f}-{high:.2f}",
            f"{row['eager_over_fastnn']:.2f}" if row["eager_over_fastnn"] else "",
            f"{row['percent_of_bound']:.0f} ({row['bound']})",
            f"{speedup:.2f}" if (speedup := thread_speedup(row, rows)) else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


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
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of <op>.json and <op>.md")
    arguments = parser.parse_args()
    if "fastnn" not in arguments.providers or len(arguments.providers) < 2:
        parser.error("--providers must name fastnn and at least one rival")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    console = Console()
    dtype = getattr(torch, arguments.dtype)
    info = environment() | {"dtype": arguments.dtype, "peak": {}}
    for threads in arguments.threads:
        with using_threads(threads):
            info["peak"][threads] = peak_flops()
    rows, failures = [], []
    cases = [case for case in CASES[arguments.op] if arguments.only in case.name]
    jobs = [(case, direction, n) for case in cases for direction in arguments.directions for n in arguments.threads]
    for done, (case, direction, threads) in enumerate(jobs):
        title = f"{case.name}, {direction}, {threads} thread(s)"
        try:
            with console.status(f"{done + 1} of {len(jobs)}: {title}"):
                row = measure(
                    case, direction, threads, arguments.providers, arguments.seconds, info["peak"][threads], dtype
                )
        except AssertionError as error:
            failures.append(f"{title}: {error}")
            continue
        rows.append(row)
        report_row(title, row, console)
    arguments.output.mkdir(parents=True, exist_ok=True)
    # models.json is what benchmarks.report writes.
    name = "frozen" if arguments.op == "models" else arguments.op
    result = arguments.output / f"{name}{'' if arguments.dtype == 'float32' else f'_{arguments.dtype}'}.json"
    result.write_text(json.dumps({"environment": info, "rows": rows}, indent=1) + "\n")
    result.with_suffix(".md").write_text(as_markdown(rows, info))
    console.print(f"Written: {result}, {result.with_suffix('.md')}")
    report_failures(failures, console)


if __name__ == "__main__":
    main()
