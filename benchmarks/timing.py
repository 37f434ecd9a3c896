"""Timing that a busy machine disturbs little: contenders take turns in one process, and medians are compared."""

import functools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

import fastnn

REHEARSAL_SECONDS = 5e-3  # below which nothing that was measured is to be believed
_BLOCK_SECONDS = 3e-3
_LARGEST_SPREAD = 1.5  # of the middle half of the rounds' speed-ups (measured on an idle machine: below 1.2)
_SPIN_SECONDS = 80e-3  # for which other engines' threads keep a core busy after a call (measured: 20 to 77 ms)


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one sample a round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def quartiles(samples: tuple[float, ...]) -> tuple[float, float]:
    if len(samples) < 2:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


def speedups(of: Timing, over: Timing) -> tuple[float, ...]:
    """How many times faster ``of`` is than ``over``, round by round, so that a drift of the machine cancels."""
    return tuple(theirs / ours for ours, theirs in zip(of.samples, over.samples, strict=True))


def is_reliable(ratio: float, ratio_quartiles: tuple[float, float]) -> bool:
    """Whether a speed-up says something: on a busy machine rounds differ by more than what is to be measured."""
    low, high = ratio_quartiles
    return max(ratio, high) <= _LARGEST_SPREAD * min(ratio, low)


def interleave(runners: dict[str, Callable[[], Any]], seconds: float, rounds: int = 7) -> dict[str, Timing]:
    """Time the runners in turns: in each round every one runs a block of calls, in alternating order.

    Args:
        runners: what to time, warmed up.
        seconds: about how long to measure in all; at least ``rounds`` rounds are made.
        rounds: the least number of rounds; two where the seconds say that it is a rehearsal.
    """
    calls = {name: _calls_in_block(run) for name, run in runners.items()}
    samples: dict[str, list[float]] = {name: [] for name in runners}
    order = list(runners)
    end = time.perf_counter() + seconds
    rounds = 2 if seconds < REHEARSAL_SECONDS else rounds
    done = 0
    while done < rounds or time.perf_counter() < end:
        for name in order if done % 2 == 0 else reversed(order):
            _settle(runners[name])
            samples[name].append(_time_block(runners[name], calls[name]))
        done += 1
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _settle(run: Callable[[], Any]) -> None:
    """Let the threads of the runner before go to sleep and, where there are several, its own find their cores."""
    time.sleep(1e-3)
    end = time.perf_counter() + (0 if torch.get_num_threads() == 1 else _SPIN_SECONDS)
    run()
    while time.perf_counter() < end:
        run()


def _time_block(run: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _calls_in_block(run: Callable[[], Any]) -> int:
    calls = 1
    while (seconds := _time_block(run, calls)) * calls < _BLOCK_SECONDS:
        calls = max(calls + 1, min(10 * calls, int(_BLOCK_SECONDS / max(seconds, 1e-9))))
    return calls


def peak_flops() -> float:
    """Float32 operations a second, a multiply-add counted as two, that the current threads can do at best."""
    threads = torch.get_num_threads()
    rounds = 500_000

    def burst() -> float:
        start = time.perf_counter()
        operations = sum(pool.map(fastnn._C.multiply_adds, [rounds] * threads))
        return operations / (time.perf_counter() - start)

    with ThreadPoolExecutor(threads) as pool:
        return max(burst() for _ in range(15))


@functools.lru_cache
def bandwidth(megabytes: float) -> float:
    """Bytes a second that one thread reads from a buffer of this size, over and over: pick the size to sit in the cache
    or memory of interest."""
    size = int(megabytes * 1e6)
    rounds = max(4, int(2e8 / size))

    def seconds(rounds: int) -> float:
        start = time.perf_counter()
        fastnn._C.read(size, rounds)
        return time.perf_counter() - start

    # What more rounds take, without the buffer's allocation.
    return size * rounds / (min(seconds(rounds + 1) for _ in range(9)) - min(seconds(1) for _ in range(9)))
