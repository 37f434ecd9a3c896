"""No call leaves memory behind that nobody can reach."""

import ctypes
import gc
from collections.abc import Callable

import pytest
import torch

import fastnn
from fastnn import models

CALLS = 2000


class Mallinfo2(ctypes.Structure):
    _fields_ = [("values", ctypes.c_size_t * 10)]  # malloc.h names them: [4] is hblkhd, [7] uordblks


def bytes_in_use() -> int:
    """Of the C heap, from which both torch and the operators allocate."""
    gc.collect()
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        pytest.skip("the C library has no mallinfo2")
    mallinfo2.restype = Mallinfo2
    values = mallinfo2().values
    return int(values[4] + values[7])


def inference(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def training(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    x = x.clone().requires_grad_()

    def run() -> None:
        torch.autograd.grad(model(x).sum(), [x, *model.parameters()])

    return run


MODELS = {
    "cnn": (lambda: models.Conv2DNet(3), (2, 3, 20, 20)),
    "rnn": (lambda: models.RNN(3, 4, 2, 2), (2, 3, 3)),
    "lstm": (lambda: models.RNN(3, 4, 2, 2, cell="LSTM"), (2, 3, 3)),
    "autoencoder": (lambda: models.Autoencoder(6, 5, 4), (3, 6)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["inference", "training", "frozen", "refused"])
def test_calls_leave_nothing_behind(name: str, kind: str) -> None:
    make, shape = MODELS[name]
    model, x = make(), torch.randn(shape)
    if kind == "frozen":
        run = inference(fastnn.freeze(model, x), x)
    elif kind == "refused":
        bad = torch.randn(*shape[:-1], shape[-1] + 40).to(torch.float64)

        def run() -> None:
            with torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
                model(bad)
    else:
        run = (inference if kind == "inference" else training)(model, x)
    for _ in range(100):
        run()
    before = bytes_in_use()
    for _ in range(CALLS):
        run()
    assert bytes_in_use() - before < 16 * CALLS
