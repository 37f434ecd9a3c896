"""pytest-benchmark of the recurrent layers and their cells: ``pytest benchmarks/bench_rnn.py``."""

from typing import Any

from benchmarks.cases import Case
from benchmarks.suite import grid, run


@grid("rnn")
def bench_rnn(benchmark: Any, case: Case, direction: str, threads: int, provider: str) -> None:
    run(benchmark, case, direction, threads, provider)
