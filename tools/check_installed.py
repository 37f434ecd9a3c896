"""What every installation of fastnn must do: import, compute what stock does, fuse a model, refuse wrong arguments by
Python exceptions.

    python tools/check_installed.py

It needs fastnn alone. Python looks for modules in this folder and not in the one above, so that what was installed is
checked, and not the sources.
"""

import contextlib
import importlib.metadata

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnn
from fastnn.testing import compare_with_stock


def fused(image: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return fastnn.functional.linear_relu(fastnn.functional.conv_relu_max_pool2d(image, kernel).flatten(1), weight, bias)


def stock(image: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.linear(F.max_pool2d(F.relu(F.conv2d(image, kernel)), 2).flatten(1), weight, bias))


def check_results() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(sizes) for sizes in ((8, 3, 20, 20), (16, 3, 3, 3), (32, 1296), (32,))]
    compare_with_stock(fused, stock, tensors)  # the gradients too


def check_fuse() -> None:
    model = fastnn.fuse(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2)))
    account = fastnn.explain(model, torch.randn(8, 3, 20, 20))
    assert account.calls, account
    assert not account.left, account


def check_refusal() -> None:
    with contextlib.suppress(RuntimeError):
        torch.ops.fastnn.mlp(torch.randn(2, 3), [torch.randn(4, 5), torch.randn(4)], "identity")
        raise AssertionError("a weight that does not fit its input was not refused")


if __name__ == "__main__":
    assert importlib.metadata.version("fastnn-torch") == fastnn.__version__
    check_results()
    check_fuse()
    check_refusal()
    print(fastnn.backend_info())
