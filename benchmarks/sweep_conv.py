"""Random conv_relu_max_pool layers against stock PyTorch, all drawn from one seed: where is fastnn slower?

``python -m benchmarks.sweep_conv`` checks and times each layer in both directions and both memory formats against the
better of stock's two formats, looks again for longer where fastnn seems slower, and lists the losses that remain.
"""

import argparse
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.cases import Case, conv_case
from benchmarks.problem import DIRECTIONS, Problem
from benchmarks.providers import in_channels_last, prepare
from benchmarks.timing import interleave
from fastnn.testing import DTYPES, using_threads

TOLERATED = 0.97  # of stock's speed; below is a loss
STOCK = ("eager", "channels_last")
_LOOK_AGAIN = 8  # times as long, where the first look shows a loss
_CHANNELS = (1, 2, 3, 4, 8, 10, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 512)
_SIZES = {1: (16, 50, 100, 500, 2000, 4096), 2: (5, 7, 8, 14, 20, 28, 32, 56, 64, 112, 224), 3: (5, 8, 14, 20, 32)}
_POOLS = ((2, 2, 0), (2, 2, 0), (2, 2, 0), (3, 2, 1), (3, 3, 0), (4, 4, 0), (3, 1, 1))  # kernel, stride, padding


@dataclass(frozen=True)
class Outcome:
    case: Case
    direction: str
    format: str  # of fastnn's input and weight
    speedup: float  # the better stock format's time over fastnn's
    microseconds: float  # fastnn's


def random_layers(seed: int) -> Iterator[Case]:
    """Layers of 1 to 3 dimensions, 1 to 512 channels, kernels of 1 to 11; a few seconds of stock's time at most."""
    draw = random.Random(seed)
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
            yield case


def measure(case: Case, direction: str, dtype: torch.dtype, seconds: float) -> list[Outcome]:
    """Everybody's best time counts: what a busy machine adds is never negative."""
    problem = Problem(case, direction, dtype)
    with problem.context():
        runners = {name: prepare(name, problem) for name in (*STOCK, "fastnn")}
        runners["fastnn channels_last"] = in_channels_last(problem, problem.fused)
        runners = {name: run for name, run in runners.items() if run is not None}
        for name in runners.keys() - {*STOCK, "fastnn"}:
            problem.check(runners[name])
        for longer in (1, _LOOK_AGAIN):
            timings = interleave(runners, longer * seconds, rounds=3 * longer)
            best = {name: min(timing.samples) for name, timing in timings.items()}
            stock = min(best.pop(name) for name in STOCK if name in best)
            if stock / max(best.values()) >= TOLERATED:
                break
    return [Outcome(case, direction, name, stock / time, time * 1e6) for name, time in best.items()]


def summary(outcomes: list[Outcome]) -> str:
    """The spread of the speedups in each direction, and every loss, the worst first."""
    lines = []
    for kind in dict.fromkeys((outcome.direction, outcome.format) for outcome in outcomes):
        speedups = sorted(outcome.speedup for outcome in outcomes if (outcome.direction, outcome.format) == kind)
        losses = sum(speedup < TOLERATED for speedup in speedups)
        mean = math.exp(sum(map(math.log, speedups)) / len(speedups))
        lines.append(
            f"{', '.join(kind)}: {len(speedups)} layers, {losses} losses; better stock format / fastnn: "
            f"least {speedups[0]:.2f}, geometric mean {mean:.2f}, most {speedups[-1]:.2f}"
        )
    losses_first = sorted(outcomes, key=lambda outcome: outcome.speedup)
    return "\n".join(lines + [describe(outcome) for outcome in losses_first if outcome.speedup < TOLERATED])


def describe(outcome: Outcome) -> str:
    return (
        f"{outcome.speedup:6.2f}  {outcome.microseconds:10.1f} us  {outcome.direction}, {outcome.format}  "
        f"{outcome.case.name}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep_conv", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="layers (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="measure the layers whose name contains this text")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--threads", type=int, default=1)
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    parser.add_argument("--dtype", choices=list(dtypes), default="float32")
    parser.add_argument("--seconds", type=float, default=0.1, help="measuring time of a layer (default: %(default)s)")
    arguments = parser.parse_args()
    layers = list(itertools.islice(random_layers(arguments.seed), arguments.count))
    outcomes, failures = [], []
    with using_threads(arguments.threads):
        for i, layer in enumerate(layers):
            if arguments.only not in layer.name:
                continue
            for direction in arguments.directions:
                try:
                    found = measure(layer, direction, dtypes[arguments.dtype], arguments.seconds)
                except AssertionError as error:
                    failures.append(f"{layer.name}, {direction}: {error}")
                    continue
                outcomes += found
                print(*(f"{i + 1:3} of {len(layers)} {describe(outcome)}" for outcome in found), sep="\n", flush=True)
    print(f"\n{arguments.dtype}, seed {arguments.seed}, {arguments.threads} thread(s)")
    print(summary(outcomes))
    if failures:
        raise SystemExit("Wrong, and so not measured:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
