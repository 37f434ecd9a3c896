"""pytest-benchmark of conv_relu_max_pool: ``pytest benchmarks/bench_conv_relu_max_pool.py``."""

from typing import Any

from benchmarks.cases import Case
from benchmarks.suite import grid, run


@grid("conv_relu_max_pool")
def bench_conv_relu_max_pool(benchmark: Any, case: Case, direction: str, threads: int, provider: str) -> None:
    run(benchmark, case, direction, threads, provider)
