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
    for rounds in (20_000, 80_000, 320_000):  # on a busy processor the second thread's turn has to fall into a call
        expected = alone(rounds)
        for _ in range(60):
            values, done = _C.team_rounds([0, 500], rounds, THINGS)
            assert values == expected
            if min(done) > 0:
                return
    pytest.fail("no second thread was ever taken in")


def test_no_rounds() -> None:
    assert _C.team_rounds([0, 0], 0, THINGS)[0] == [0] * THINGS


ONE, GOOD, STALLED = 400e3, 250e3, 8e6  # nanoseconds of a call by one thread, by a team, and by one that has to wait


def seconds(calls: list[tuple[float, float]]) -> float:
    choices = _C.team_choices(calls)
    return sum(team if chosen else one for (one, team), chosen in zip(calls, choices, strict=True)) / 1e9


def test_a_team_that_pays_makes_all_but_few_calls() -> None:
    choices = _C.team_choices([(ONE, GOOD)] * 1000)
    assert choices[0]
    assert 0 < choices.count(False) < 20


@pytest.mark.parametrize(
    "times",
    [
        pytest.param([STALLED], id="always"),
        pytest.param([GOOD] * 12 + [STALLED], id="at the end of each slice of time"),
        pytest.param([1.1 * ONE], id="hardly slower"),
    ],
)
def test_a_team_that_loses_is_soon_done_without(times: list[float]) -> None:
    calls = [(ONE, times[i % len(times)]) for i in range(20_000)]
    assert seconds(calls) < 1.05 * 20_000 * ONE / 1e9


def test_a_team_that_pays_again_comes_back() -> None:
    calls = [(ONE, STALLED)] * 1000 + [(ONE, GOOD)] * 5000
    assert all(_C.team_choices(calls)[-50:-40])


def test_one_stall_is_soon_forgotten() -> None:
    calls = [(ONE, GOOD)] * 500 + [(ONE, STALLED)] * 2 + [(ONE, GOOD)] * 500
    assert _C.team_choices(calls).count(False) < 250
