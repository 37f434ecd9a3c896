"""Random cases of one op against stock PyTorch, all drawn from one seed: where is fastnn slower?

``python -m benchmarks.sweep mlp`` checks and times each case in both directions, looks at those that seem slower again
for longer, and lists the losses that remain.
"""

import argparse
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.cases import Case, mlp_case
from benchmarks.problem import DIRECTIONS, Problem
from benchmarks.providers import prepare
from benchmarks.timing import interleave
from fastnn.testing import DTYPES, using_threads

TOLERATED = 0.97  # of stock's speed; below is a loss
_LOOK_AGAIN = 5  # times as long, where the first look shows one


@dataclass(frozen=True)
class Outcome:
    case: Case
    direction: str
    speedup: float  # stock's time over ours
    microseconds: float  # ours


def _log_uniform(draw: random.Random, most: int) -> int:
    return int(most ** draw.random())


def random_mlp(draw: random.Random) -> Case:
    """Rows 1 to 8192, widths 1 to 2048, 1 to 8 layers."""
    widths = [_log_uniform(draw, 2048) for _ in range(draw.randint(1, 8) + 1)]
    return mlp_case(_log_uniform(draw, 8192), widths)


GENERATORS: dict[str, Callable[[random.Random], Case]] = {"mlp": random_mlp}


def measure(case: Case, direction: str, dtype: torch.dtype, seconds: float) -> Outcome:
    """Stock against fused, the best of each: what a busy machine adds is never negative."""
    problem = Problem(case, direction, dtype)
    with problem.context():
        runners = {name: prepare(name, problem) for name in ("eager", "fastnn")}
        for longer in (1, _LOOK_AGAIN):
            timings = interleave(runners, longer * seconds, rounds=3 * longer)
            best = {name: min(timing.samples) for name, timing in timings.items()}
            speedup = best["eager"] / best["fastnn"]
            if speedup >= TOLERATED:
                break
    return Outcome(case, direction, speedup, best["fastnn"] * 1e6)


def summary(outcomes: list[Outcome]) -> str:
    """The spread of the speedups in each direction, and every loss, the worst first."""
    lines = []
    for direction in dict.fromkeys(outcome.direction for outcome in outcomes):
        speedups = sorted(outcome.speedup for outcome in outcomes if outcome.direction == direction)
        losses = sum(speedup < TOLERATED for speedup in speedups)
        spread = f"least {speedups[0]:.2f}, median {statistics.median(speedups):.2f}, most {speedups[-1]:.2f}"
        lines.append(f"{direction}: {len(speedups)} cases, {losses} losses; stock / fastnn: {spread}")
    for outcome in sorted(outcomes, key=lambda outcome: outcome.speedup):
        if outcome.speedup < TOLERATED:
            lines.append(describe(outcome))
    return "\n".join(lines)


def describe(outcome: Outcome) -> str:
    return f"{outcome.speedup:6.2f}  {outcome.microseconds:10.1f} us  {outcome.direction}  {outcome.case.name}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=list(GENERATORS))
    parser.add_argument("--count", type=int, default=200, help="cases (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="measure the cases whose name contains this text")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--threads", type=int, default=1)
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    parser.add_argument("--dtype", choices=list(dtypes), default="float32")
    parser.add_argument("--seconds", type=float, default=0.1, help="measuring time of a case (default: %(default)s)")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    cases = [GENERATORS[arguments.op](draw) for _ in range(arguments.count)]
    outcomes, failures = [], []
    with using_threads(arguments.threads):
        for case in cases:
            if arguments.only not in case.name:
                continue
            for direction in arguments.directions:
                try:
                    outcomes.append(measure(case, direction, dtypes[arguments.dtype], arguments.seconds))
                except AssertionError as error:
                    failures.append(f"{case.name}, {direction}: {error}")
                else:
                    print(describe(outcomes[-1]), flush=True)
    print(f"\n{arguments.op}, {arguments.dtype}, seed {arguments.seed}, {arguments.threads} thread(s)")
    print(summary(outcomes))
    if failures:
        raise SystemExit("Wrong, and so not measured:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
