"""Random Python forwards (semantics.py): fused, stepped, frozen and compiled, they compute what Python would now."""

import itertools

import pytest
import semantics
import torch

BATCH = 20  # cases of one test
BATCHES = {"fuse": 8, "alike": 3, "fuse example": 1, "training_step": 3, "freeze": 1}
COMPILED = range(4)


def check(kind: str, first: int, count: int) -> int:
    """How many of the cases were fused. The message of a failure holds the source."""
    fused = 0
    for case in itertools.islice(semantics.cases(first, kind), count):
        try:
            fused += semantics.compare(case, kind)
        except semantics.DifferenceError as error:
            raise AssertionError(f"seed {case.seed}\n{case.text}\n{error}") from None
    return fused


@pytest.mark.parametrize(
    ("kind", "first"), [(kind, BATCH * batch) for kind, count in BATCHES.items() for batch in range(count)]
)
def test_computes_what_python_would(kind: str, first: int) -> None:
    fused = check(kind, first, BATCH)
    assert fused or kind not in ("fuse", "alike")  # else nothing is tested


@pytest.mark.parametrize("seed", COMPILED)
@pytest.mark.filterwarnings("ignore")
def test_compiled(seed: int) -> None:
    check("backend", seed, 1)
    torch._dynamo.reset()


def test_a_case_is_the_same_each_time() -> None:
    assert [semantics.generate(seed).text for seed in range(9)] == [semantics.generate(seed).text for seed in range(9)]
