"""pytest-benchmark of mlp: ``pytest benchmarks/bench_mlp.py``."""

from typing import Any

from benchmarks.cases import Case
from benchmarks.suite import grid, run


@grid("mlp")
def bench_mlp(benchmark: Any, case: Case, direction: str, threads: int, provider: str) -> None:
    run(benchmark, case, direction, threads, provider)
