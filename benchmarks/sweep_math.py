"""Packed tanh, sigmoid, sin and cos against float64, in ULP, over every float32: ``python -m benchmarks.sweep_math``.

Takes some minutes a function and instruction set: ``--function``, ``--instruction-set`` and ``--part 2/8`` cut it up,
``--step 101`` looks at every 101st number only. tests/test_math.py does that in seconds.
"""

import argparse

import torch
from torch import Tensor

import fastnn
from fastnn.testing import instruction_sets, using_instruction_set, using_threads

FUNCTIONS = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "sin": torch.sin, "cos": torch.cos}
LIMIT = 4.0
_BLOCK = 1 << 17  # numbers at a time: few enough for the cache


def ulps(actual: Tensor, exact: Tensor) -> Tensor:
    """The distance of ``actual`` (float32) from ``exact`` (float64), in units of the last place of the latter."""
    rounded = exact.float().abs()
    unit = torch.nextafter(rounded, torch.tensor(torch.inf)).double() - rounded.double()
    return (actual.double() - exact).abs() / unit


def worst_error(name: str, step: int = 1, part: int = 1, parts: int = 1) -> tuple[float, float]:
    """The largest error of the function in ULP over every ``step``-th float32 that is not NaN, and where it is.

    Of ``parts`` ranges of bit patterns only the ``part``-th is looked at.
    """
    worst, where = 0.0, 0.0
    identity = torch.ones(1, 1)
    begin, end = ((1 << 32) * i // parts - (1 << 31) for i in (part - 1, part))
    for first in range(begin, end, _BLOCK * step):
        bits = torch.arange(first, min(first + _BLOCK * step, end), step).to(torch.int32)
        x = bits.view(torch.float32)
        x = x[~x.isnan()]
        if x.numel() == 0:
            continue
        errors = ulps(fastnn.functional.mlp(x[:, None], [identity], [None], [name])[:, 0], FUNCTIONS[name](x.double()))
        here = int(errors.argmax())
        if float(errors[here]) > worst:
            worst, where = float(errors[here]), float(x[here])
    return worst, where


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--function", choices=FUNCTIONS, nargs="+", default=list(FUNCTIONS))
    parser.add_argument("--instruction-set", choices=instruction_sets(), nargs="+", default=instruction_sets())
    parser.add_argument("--part", default="1/1", help="one range of several, from 1/8 to 8/8 for instance")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    for isa in arguments.instruction_set:
        with using_instruction_set(isa), using_threads(1):  # blocks are too small to share
            for name in arguments.function:
                worst, where = worst_error(name, arguments.step, part, parts)
                print(f"{isa:>9} {name:>8} {arguments.part}: {worst:.2f} ULP at {where!r}", flush=True)
                assert worst <= LIMIT


if __name__ == "__main__":
    main()
