"""Time a step of recurrent layers on sequences of 10 to 10,000 steps, part of ``make bench-rnn``: the same for all, if
time is linear in length."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.cases import GATES, rnn_case
from benchmarks.problem import DIRECTIONS, Problem
from benchmarks.providers import prepare
from benchmarks.report import RESULTS
from benchmarks.timing import environment, interleave
from fastnn.testing import using_threads

LENGTHS = (10, 100, 1000, 10_000)
_BATCH, _FEATURES, _HIDDEN = 4, 32, 64


def measure(cell: str, direction: str, lengths: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """Microseconds a step at each length, after checking each against float64."""
    runners = {}
    with using_threads(1):
        for length in lengths:
            problem = Problem(rnn_case(cell, (_BATCH, length, _FEATURES), _HIDDEN), direction)
            with problem.context():
                runners[str(length)] = prepare("fastnn", problem)
        with problem.context():
            timings = interleave(runners, seconds)
    return {
        "cell": cell,
        "direction": direction,
        "microseconds_a_step": {length: timings[str(length)].median / length * 1e6 for length in lengths},
    }


def as_markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"Microseconds a step, batch {_BATCH}, {_FEATURES} features, h{_HIDDEN}, one thread:",
        "",
        "| cell | direction | " + " | ".join(f"{length} steps" for length in LENGTHS) + " | longest / 100 steps |",
        "|" + "---|" * (len(LENGTHS) + 3),
    ]
    for row in rows:
        times = row["microseconds_a_step"]
        cells = [row["cell"], row["direction"], *(f"{times[length]:.2f}" for length in LENGTHS)]
        lines.append("| " + " | ".join([*cells, f"{times[LENGTHS[-1]] / times[100]:.2f}"]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lengths", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3, help="measuring time of each row (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of rnn_lengths.json and .md")
    arguments = parser.parse_args()
    console = Console()
    jobs = [(cell, direction) for cell in GATES for direction in DIRECTIONS]
    rows = []
    for done, (cell, direction) in enumerate(jobs):
        with console.status(f"{done + 1} of {len(jobs)}: {cell}, {direction}, {LENGTHS[0]} to {LENGTHS[-1]} steps"):
            rows.append(measure(cell, direction, LENGTHS, arguments.seconds))
    console.print(as_markdown(rows), highlight=False, soft_wrap=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    result = arguments.output / "rnn_lengths.json"
    result.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    result.with_suffix(".md").write_text(as_markdown(rows))
    console.print(f"Written: {result}, {result.with_suffix('.md')}")


if __name__ == "__main__":
    main()
