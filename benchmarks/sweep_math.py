"""The packed tanh and sigmoid against float64, in ULP, over every float32: ``python -m benchmarks.sweep_math``.

Takes some minutes; ``--step 101`` looks at every 101st number only. tests/test_math.py does that in seconds.
"""

import argparse

import torch
from torch import Tensor

import fastnn
from fastnn.testing import instruction_sets, using_instruction_set

FUNCTIONS = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}
LIMIT = 4.0
_BLOCK = 1 << 17  # numbers at a time: few enough for the cache


def ulps(actual: Tensor, exact: Tensor) -> Tensor:
    """The distance of ``actual`` (float32) from ``exact`` (float64), in units of the last place of the latter."""
    rounded = exact.float().abs()
    unit = torch.nextafter(rounded, torch.tensor(torch.inf)).double() - rounded.double()
    return (actual.double() - exact).abs() / unit


def worst_error(name: str, step: int = 1) -> tuple[float, float]:
    """The largest error of the function in ULP over every ``step``-th float32 that is not NaN, and where it is."""
    worst, where = 0.0, 0.0
    identity = torch.ones(1, 1)
    end = 1 << 31
    for first in range(-end, end, _BLOCK * step):
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
    step = parser.parse_args().step
    for isa in instruction_sets():
        with using_instruction_set(isa):
            for name in FUNCTIONS:
                worst, where = worst_error(name, step)
                print(f"{isa:>9} {name:>8}: {worst:.2f} ULP at {where!r}", flush=True)
                assert worst <= LIMIT


if __name__ == "__main__":
    main()
