"""Fixtures for every test: one seed, poisoned memory, and each instruction set in turn where a test asks for it."""

import gc
import os
from collections.abc import Iterator

# Before torch is loaded, whose OpenMP looks at it once: a thread that waits for others sleeps. It would spin, for
# milliseconds where another process has their processor: with two workers on two cores that was 180 of the 790 seconds
# of CPU time that all tests took.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from fastnn import testing

if not torch.cuda.is_available():
    # Here torch.manual_seed would write down its caller for each kind of GPU, should one be initialized later. That
    # takes 2 ms a call, and many tests call it before each run of a network.
    torch.manual_seed = torch.default_generator.manual_seed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, help="run only every so many of the tests, where each takes long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The GPU kernels' tests come first: they take longest, and other workers take what comes after them."""
    items.sort(key=lambda item: item.path.name != "test_gpu_kernels.py")
    items[:] = items[:: config.getoption("every")]


def pytest_collection_finish() -> None:
    """What imports and thousands of tests are made of stays until the end: no garbage collection looks at it again. And
    collections are rarer, since what compilers and exporters keep makes each of them long."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tests are small: waking a second thread costs more than it gives. Those about threads ask for them."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Have ``torch.empty`` give NaN, so that a kernel that reads or leaves what it should have written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=testing.instruction_sets(bfloat16=False))
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with the kernels of each instruction set that this machine has and that has kernels of its own."""
    with testing.using_instruction_set(request.param):
        yield request.param


@pytest.fixture(params=testing.instruction_sets())
def every_instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same for the convolution in bfloat16: each that this machine has."""
    with testing.using_instruction_set(request.param):
        yield request.param


@pytest.fixture(params=testing.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Run the test in each dtype that has kernels."""
    return request.param
