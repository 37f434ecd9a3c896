"""No call leaves memory behind that nobody can reach, and a training step takes no more than it should."""

import ctypes
import gc
import os
import subprocess
import sys
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


# What the process takes for a step, apart from what a small step and its libraries have already taken.
TRAINING_STEP = """
import torch, fastnn.nn

def kilobytes(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

torch.set_num_threads(1)
layer = fastnn.nn.ConvReLUMaxPool2d(3, 64, 3, padding=1)
layer(torch.randn(1, 3, 64, 64, requires_grad=True)).sum().backward()
x = torch.randn(8, 3, 224, 224, requires_grad=True)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
before = kilobytes("VmRSS")
output = layer(x)
kept = kilobytes("VmRSS") - before
output.sum().backward()
print(kept * 1024 - output.nbytes, (kilobytes("VmHWM") - before) * 1024 - output.nbytes - x.grad.nbytes)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not tell a process's peak")
def test_memory_of_a_training_step() -> None:
    run = subprocess.run([sys.executable, "-c", TRAINING_STEP], capture_output=True, text=True, check=True)
    kept, peak = map(int, run.stdout.split())
    conv = 8 * 64 * 224 * 224
    assert kept <= 0.3 * conv
    assert peak <= 0.4 * conv  # of the 4 that the gradient of the convolution's output would take
