"""pytest-benchmark of the three models: ``pytest benchmarks/bench_models.py``."""

from typing import Any

from benchmarks.cases import Case
from benchmarks.suite import grid, run


@grid("models")
def bench_models(benchmark: Any, case: Case, direction: str, threads: int, provider: str) -> None:
    run(benchmark, case, direction, threads, provider)
