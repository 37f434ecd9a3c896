"""Random cases of one op against stock PyTorch, all drawn from one seed: where is fastnn slower?

``python -m benchmarks.sweep mlp`` checks and times each case in both directions, looks at those that seem slower again
for longer, and lists the losses that remain, those of convolutions with what bounds them. Images are measured in both
memory formats, each against the better of stock's two; the summary has the better of ours against that besides.
"""

import argparse
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.bounds import describe_bounds
from benchmarks.cases import Case, conv_case, mlp_case
from benchmarks.problem import DIRECTIONS, Problem
from benchmarks.providers import in_channels_last, prepare
from benchmarks.stored import environment
from benchmarks.timing import interleave
from fastnn.testing import DTYPES, using_threads

TOLERATED = 0.97  # of stock's speed; below is a loss
_LOOK_AGAIN = 5  # times as long, where the first look shows one
_STOCK = ("eager", "channels_last")

_CHANNELS = (1, 2, 3, 4, 8, 10, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 512)
_SIZES = {1: (16, 50, 100, 500, 2000, 4096), 2: (5, 7, 8, 14, 20, 28, 32, 56, 64, 112, 224), 3: (5, 8, 14, 20, 32)}
_POOLS = ((2, 2, 0), (2, 2, 0), (2, 2, 0), (3, 2, 1), (3, 3, 0), (4, 4, 0), (3, 1, 1))  # kernel, stride, padding


@dataclass(frozen=True)
class Outcome:
    case: Case
    direction: str
    provider: str  # fastnn, in either memory format
    speedup: float  # stock's time over ours
    microseconds: float  # ours
    bounds: str = ""  # of a loss: what nobody can be faster than


def _log_uniform(draw: random.Random, most: int) -> int:
    return int(most ** draw.random())


def random_mlp(draw: random.Random) -> Case:
    """Rows 1 to 8192, widths 1 to 2048, 1 to 8 layers."""
    widths = [_log_uniform(draw, 2048) for _ in range(draw.randint(1, 8) + 1)]
    return mlp_case(_log_uniform(draw, 8192), widths)


def random_conv(draw: random.Random) -> Case:
    """1 to 3 dimensions, 1 to 512 channels, kernels of 1 to 11, batches of 1 to 64."""
    while True:
        dims = draw.choice((1, 2, 2, 2, 3))
        inputs, outputs, batch = (
            draw.choice(_CHANNELS),
            draw.choice(_CHANNELS),
            draw.choice((1, 1, 2, 4, 8, 16, 32, 64)),
        )
        groups = draw.choice((1, 1, 1, 1, 1, 2, 4, inputs))
        if groups == inputs:
            outputs = inputs * draw.choice((1, 1, 2))  # depthwise
        kernel = draw.choice((1, 2, 3, 3, 3, 5, 7, 11) if dims < 3 else (1, 2, 3))
        stride, dilation, padding = (
            draw.choice((1, 1, 1, 2, 3)),
            draw.choice((1, 1, 1, 2)),
            draw.choice((0, kernel // 2)),
        )
        size = draw.choice(_SIZES[dims])
        pool, pool_stride, pool_padding = draw.choice(_POOLS)
        conv = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        if inputs % groups or outputs % groups or conv < max(pool - 2 * pool_padding, 1):
            continue
        case = conv_case(
            (batch, inputs, *[size] * dims), outputs, kernel, pool, stride=stride, padding=padding, dilation=dilation,
            groups=groups, pool_stride=pool_stride, pool_padding=pool_padding,
        )  # fmt: skip
        elements = batch * max(inputs * size**dims, outputs * conv**dims)
        if 1e3 < case.flops < 2e9 and elements < 1.5e7:
            return case


GENERATORS: dict[str, Callable[[random.Random], Case]] = {"conv_relu_max_pool": random_conv, "mlp": random_mlp}


def stock_is_unsafe(case: Case, direction: str) -> bool:
    """Whether stock writes beyond its memory, as guard pages show: oneDNN does, in the gradient of the weight of 1x1
    kernels that stride over three channels, and the sweep may crash many cases later."""
    return direction == "training" and case.shape[1] == 3 and " k1/" in case.name


def measure(case: Case, direction: str, dtype: torch.dtype, seconds: float) -> list[Outcome]:
    """Stock against fused, the best of each: what a busy machine adds is never negative."""
    problem = Problem(case, direction, dtype)
    with problem.context():
        runners = {name: prepare(name, problem) for name in (*_STOCK, "fastnn")}
        ours = runners["fastnn channels_last"] = in_channels_last(problem, problem.fused)
        if ours is not None:
            problem.check(ours, runners["channels_last"])
        served = {name: run for name, run in runners.items() if run is not None}
        for longer in (1, _LOOK_AGAIN):
            timings = interleave(served, longer * seconds, rounds=3 * longer)
            best = {name: min(timing.samples) for name, timing in timings.items()}
            stock = min(best.pop(name) for name in _STOCK if name in best)
            if stock / max(best.values()) >= TOLERATED:
                break
    lost = [name for name, time in best.items() if stock / time < TOLERATED]
    bounds = describe_bounds(problem) if lost and direction == "inference" else ""
    return [
        Outcome(case, direction, name, stock / time, time * 1e6, bounds if name in lost else "")
        for name, time in best.items()
    ]


def summary(outcomes: list[Outcome]) -> str:
    """The spread of the speedups in each direction and format, and with the better format of each case; and every loss,
    the worst first."""
    formats = len({outcome.provider for outcome in outcomes})
    by_kind: dict[tuple[str, str], dict[int, float]] = {}  # and by case
    for outcome in outcomes:
        for provider in (outcome.provider, "the better format of each")[:formats]:
            speedups_of = by_kind.setdefault((outcome.direction, provider), {})
            key = id(outcome.case)
            speedups_of[key] = max(outcome.speedup, speedups_of.get(key, 0.0))
    lines = []
    for kind, speedups_of in by_kind.items():
        speedups = sorted(speedups_of.values())
        losses = sum(speedup < TOLERATED for speedup in speedups)
        spread = f"least {speedups[0]:.2f}, median {statistics.median(speedups):.2f}, most {speedups[-1]:.2f}"
        mean = f"geometric mean {statistics.geometric_mean(speedups):.2f}"
        lines.append(f"{', '.join(kind)}: {len(speedups)} cases, {losses} losses; stock / fastnn: {spread}, {mean}")
    for outcome in sorted(outcomes, key=lambda outcome: outcome.speedup):
        if outcome.speedup < TOLERATED:
            lines.append(describe(outcome))
    return "\n".join(lines)


def describe(outcome: Outcome) -> str:
    kind = f"{outcome.direction}, {outcome.provider}"
    line = f"{outcome.speedup:6.2f}  {outcome.microseconds:10.1f} us  {kind}  {outcome.case.name}"
    return f"{line}; {outcome.bounds}" if outcome.bounds else line


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
    parser.add_argument("--output", type=Path, help="file for the summary and the losses")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    cases = [GENERATORS[arguments.op](draw) for _ in range(arguments.count)]
    outcomes, failures = [], []
    with using_threads(arguments.threads):
        for number, case in enumerate(cases, 1):
            if arguments.only not in case.name:
                continue
            for direction in arguments.directions:
                if stock_is_unsafe(case, direction):
                    print(f"{number:4} of {len(cases)} left out, since stock's {direction} is not safe: {case.name}")
                    continue
                try:
                    found = measure(case, direction, dtypes[arguments.dtype], arguments.seconds)
                except AssertionError as error:
                    failures.append(f"{case.name}, {direction}: {error}")
                    continue
                outcomes += found
                for outcome in found:
                    print(f"{number:4} of {len(cases)} {describe(outcome)}", flush=True)
    settings = f"seed {arguments.seed}, {arguments.threads} thread(s), {arguments.dtype}"
    text = f"{arguments.op}, {settings}; {environment()}\n{summary(outcomes)}\n"
    print(f"\n{text}")
    if arguments.output:
        arguments.output.write_text(text)
    if failures:
        raise SystemExit("Wrong, and so not measured:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
