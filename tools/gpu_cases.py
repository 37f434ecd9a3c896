"""The launches that the GPU tools look at: the benchmark shapes, one a shape class of the kernels' tables.

Every case calls an operator's launcher as a user's call does, on tensors of a given device: "meta" is enough to see
which kernels it would launch with which arguments.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastnn.kernels import mlp
from fastnn.ops.mlp import ACTIVATION_NAMES

FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16


class Case(NamedTuple):
    op: str
    shape: str
    dtype: torch.dtype
    run: Callable[[torch.device], object]
    allow_tf32: bool = False


def all_cases() -> Iterator[Case]:
    yield from mlp_cases()


# ---- mlp --------------------------------------------------------------------------------------------------

MLP_SHAPES = [  # rows, widths
    (32, (10, 8, 5, 8, 10)),
    (256, (784, 128, 32, 128, 784)),
    (65536, (64, 64, 64, 64, 64)),
    (65536, (128, 128, 128, 128, 128)),
    (65536, (256, 256, 256, 256)),
    (65536, (256, 1024)),
]


def _mlp_case(rows: int, widths: tuple[int, ...], dtype: torch.dtype, allow_tf32: bool, name: str) -> Case:
    def run(device: torch.device) -> None:
        def new(*sizes: int) -> Tensor:
            return torch.randn(sizes, device=device).to(dtype)

        weights = [new(b, a) for a, b in pairwise(widths)]
        biases = [new(b) for b in widths[1:]]
        numbers = [ACTIVATION_NAMES.index(name)] * len(weights)
        input = new(rows, widths[0])
        output, hidden = mlp.mlp_with_hidden(input, weights, biases, numbers)
        mlp.mlp_backward(output, input, weights, numbers, output, hidden, True, True, True)

    shape = f"({rows}, {'-'.join(map(str, widths))}) {name}"
    return Case("mlp", shape, dtype, run, allow_tf32)


def mlp_cases() -> Iterator[Case]:
    for rows, widths in MLP_SHAPES:
        for dtype, allow_tf32 in [(BFLOAT, False), (FLOAT, False), (FLOAT, True)]:
            yield _mlp_case(rows, widths, dtype, allow_tf32, "relu")
    yield _mlp_case(65536, (128, 128, 128), HALF, False, "gelu")
