"""A pytest plugin: with --shard 1/4 every fourth test runs, the second of them first."""

from typing import Any


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--shard", default="0/1")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    first, step = map(int, config.getoption("--shard").split("/"))
    items[:] = items[first::step]
