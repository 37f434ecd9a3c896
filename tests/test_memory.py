"""No call leaves memory behind that nobody can reach, and a training step takes no more than it should."""

import copy
import ctypes
import functools
import gc
import os
import pickle
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fastnn
from fastnn import models
from fastnn._extension import load_extension

CALLS = 300


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


def page_faults(run: Callable[[], object]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(torch.__version__.startswith("2.10."), reason="torch 2.10 does not tell when it frees memory")
def test_steps_keep_their_memory_until_they_go() -> None:
    """Of what fastnn allocates: the model has no layer that is left to torch."""
    layers = nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 48 * 48, 64), nn.ReLU()
    model = nn.Sequential(*layers, nn.Linear(64, 4))
    x, y = torch.randn(16, 8, 48, 48), torch.randn(16, 4)
    step = fastnn.training_step(model, nn.functional.mse_loss, torch.optim.Adam(model.parameters()))
    extension = load_extension()
    for _ in range(3):
        step(x, y)
    kept, most = extension.kept_memory()
    assert 4 * (model[3].weight.numel() + 2 * 16 * 32 * 48 * 48) < kept < most
    faults = [page_faults(functools.partial(step, x, y)) for _ in range(5)]
    assert statistics.median(faults) < 20, faults
    assert extension.kept_memory()[0] == kept
    del step
    gc.collect()
    assert extension.kept_memory()[0] == 0


def test_gradients_in_kept_memory_are_like_others() -> None:
    model = fastnn.fuse(nn.Sequential(nn.Linear(600, 600), nn.ReLU(), nn.Linear(600, 600)))
    model(torch.randn(4, 600)).square().sum().backward()
    for parameter in (model[0].weight, model[2].weight):
        gradient = parameter.grad
        assert gradient is not None
        before = gradient.clone()
        for other in (copy.deepcopy(gradient), pickle.loads(pickle.dumps(gradient)), gradient.share_memory_()):
            assert torch.equal(other, before)
        assert gradient.is_shared()
        assert torch.equal(gradient.add_(1), before + 1)
    del model, parameter, gradient, other
    gc.collect()
    assert load_extension().kept_memory()[0] == 0


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not tell a process's peak")
def test_memory_of_a_training_step() -> None:
    run = subprocess.run([sys.executable, "-c", TRAINING_STEP], capture_output=True, text=True, check=True)
    kept, peak = map(int, run.stdout.split())
    conv = 8 * 64 * 224 * 224
    assert kept <= 0.3 * conv
    assert peak <= 0.4 * conv  # of the 4 that the gradient of the convolution's output would take
