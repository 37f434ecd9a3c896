"""What the pytest-benchmark files share: the grid of parameters, and one measurement."""

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.cases import CASES, Case
from benchmarks.problem import DIRECTIONS, Problem
from benchmarks.providers import PROVIDERS, prepare
from benchmarks.stored import environment
from fastnn.testing import using_threads


def grid(op: str) -> Callable[[Any], Any]:
    """Parametrise a test by every case of ``op``, direction, number of threads and provider."""

    def decorate(test: Any) -> Any:
        for marker in (
            pytest.mark.filterwarnings("default"),  # rivals warn as they like
            pytest.mark.parametrize("provider", list(PROVIDERS)),
            pytest.mark.parametrize("threads", [1, 2]),
            pytest.mark.parametrize("direction", DIRECTIONS),
            pytest.mark.parametrize("case", CASES[op], ids=lambda case: case.name),
        ):
            test = marker(test)
        return test

    return decorate


def run(benchmark: Any, case: Case, direction: str, threads: int, provider: str) -> None:
    """Measure one provider, after checking what it computes against float64."""
    problem = Problem(case, direction)
    with using_threads(threads), problem.context():
        runner = prepare(provider, problem)
        if runner is None:
            pytest.skip(f"{provider} does not serve this case")
        benchmark.group = f"{case.name}, {direction}, {threads} thread(s)"
        benchmark.extra_info.update(environment(), threads=threads, provider=provider, flops=problem.flops)
        benchmark(runner)
