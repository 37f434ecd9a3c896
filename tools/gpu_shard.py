"""A pytest plugin: with --shard 1/4 every fourth test runs, the second of them first; and SIGINT stops it."""

import signal
from typing import Any


def pytest_configure(config: Any) -> None:
    # What was started in the background of a shell ignores the signal by which gpu_run stops a test.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--shard", default="0/1")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    first, step = map(int, config.getoption("--shard").split("/"))
    items[:] = items[first::step]
