"""Argument checks of the GPU operators, as csrc/ops/check.h has them: whatever an operator is given, a RuntimeError
and nothing worse. A kernel trusts sizes, dtypes and devices, so each of them is checked here first."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Expected(NamedTuple):
    """The first tensor argument of an operator, to which the others are compared."""

    op: str
    dtype: torch.dtype
    device: torch.device


def check(condition: bool, *message: object) -> None:
    """RuntimeError, with the parts joined, unless ``condition``."""
    if not condition:
        raise RuntimeError("".join(str(part) for part in message))


def check_first(op: str, tensor: Tensor, name: str) -> Expected:
    check(tensor.layout is torch.strided, op, ": expected ", name, " to be a dense tensor")
    check(
        tensor.dtype in DTYPES,
        *(op, ': "', name, "\" not implemented for '", tensor.dtype),
        "'; use float32, float64, bfloat16 or float16",
    )
    return Expected(op, tensor.dtype, tensor.device)


def check_same_kind(expected: Expected, tensor: Tensor, name: str, dtype: torch.dtype | None = None) -> None:
    """Same device, and same dtype (or ``dtype``), as the first argument."""
    dtype = dtype or expected.dtype
    if tensor.device != expected.device:
        raise RuntimeError(
            f"{expected.op}: expected all tensors to be on the same device, but {name} is on {tensor.device}, "
            f"not on {expected.device}"
        )
    check(tensor.layout is torch.strided, expected.op, ": expected ", name, " to be a dense tensor")
    check(
        tensor.dtype is dtype,
        *(expected.op, ": expected ", name, " to have dtype ", dtype, ", but got ", tensor.dtype),
    )


def check_sizes(op: str, tensor: Tensor, sizes: Sequence[int], name: str) -> None:
    check(tuple(tensor.shape) == tuple(sizes), op, ": expected ", name, " of size ", list(sizes), ", got ",
          list(tensor.shape))  # fmt: skip
