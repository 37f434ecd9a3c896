"""Workers of a DataLoader that run fused models."""

import copy

import pytest
import torch
from beside_stock import MODELS, make, recipe
from torch.utils.data import get_worker_info

import fastnn
from fastnn.testing import assert_close_to_reference, using_threads

# Python's, of a process with threads that forks: that this works is what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")


def expect_fused(worker: int) -> None:
    assert fastnn.explain(get_worker_info().dataset.encoder).is_fused


@pytest.mark.parametrize(("start", "workers", "name"), [*(("fork", 2, name) for name in MODELS), ("spawn", 1, "cnn")])
def test_workers_run_a_fused_model(start: str, workers: int, name: str) -> None:
    """After the process that starts them has computed on two threads."""
    model, batches = make(name)
    double = copy.deepcopy(model.eval()).double()
    stock, reference = [model(x) for x, _ in batches], [double(x.double()) for x, _ in batches]
    with using_threads(2):
        fastnn.fuse(model)(torch.randn(1024, *batches[0][0].shape[1:]))
        options = {"num_workers": workers, "multiprocessing_context": start, "worker_init_fn": expect_fused}
        encoded = recipe("DataLoader").encode(model, batches, **options)
    assert_close_to_reference([output for output, _ in encoded], stock, reference)
