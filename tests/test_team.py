"""Threads that take steps together (csrc/kernels/team.h): whoever comes, whenever, the outcome is the same."""

import pytest

from fastnn import _C

ROUNDS, THINGS = 300, 37


def alone(rounds: int) -> list[int]:
    values = [0] * THINGS
    for _ in range(rounds):
        values = [(values[i] + values[(i + 1) % THINGS] + i) % 2**64 for i in range(THINGS)]
    return [value - 2**64 if value >= 2**63 else value for value in values]


@pytest.mark.parametrize(
    "delays",
    [
        pytest.param([0], id="alone"),
        pytest.param([0, 0], id="together"),
        pytest.param([0, 50, 100, 150], id="one after another"),
        pytest.param([0, 300_000], id="when all is done"),
        pytest.param([0] * 9, id="more than processors"),
        pytest.param([0] * 40, id="more than a team takes"),
    ],
)
def test_outcome_is_that_of_one_thread(delays: list[int]) -> None:
    for _ in range(3):
        values, done = _C.team_rounds(delays, ROUNDS, THINGS)
        assert values == alone(ROUNDS)
        assert sum(done) == ROUNDS * THINGS


def test_late_threads_take_part() -> None:
    rounds = 20_000
    for _ in range(20):
        values, done = _C.team_rounds([0, 500], rounds, THINGS)
        assert values == alone(rounds)
        if min(done) > 0:
            return
    pytest.fail("no second thread was ever taken in")


def test_no_rounds() -> None:
    assert _C.team_rounds([0, 0], 0, THINGS)[0] == [0] * THINGS
