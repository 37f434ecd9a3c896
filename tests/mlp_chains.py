"""Chains for the tests of mlp."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastnn.activations import NAMES
from fastnn.functional import mlp
from fastnn.reference import mlp as reference
from fastnn.testing import compare_with_stock

# The activations that may follow one another many times. Of exp of exp nothing is left but infinities.
OF_CHAINS = [name for name in NAMES if name != "exp"]


def make_chain(
    rows: int | Sequence[int], widths: Sequence[int], dtype: torch.dtype = torch.float32, bias: bool = True
) -> list[Tensor | None]:
    """The input, the weights, then the biases of a chain whose layers have these widths."""
    shape = (rows,) if isinstance(rows, int) else tuple(rows)
    pairs = list(pairwise(widths))
    return [
        torch.randn(*shape, widths[0], dtype=dtype),
        *(torch.randn(out, into, dtype=dtype) / max(into, 1) ** 0.5 for into, out in pairs),
        *(torch.randn(out, dtype=dtype) if bias else None for _, out in pairs),
    ]


def split(tensors: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    layers = len(tensors) // 2
    return tensors[0], list(tensors[1 : 1 + layers]), list(tensors[1 + layers :])


def assert_like_stock(tensors: Sequence[Tensor | None], activations: Sequence[str], gradients: bool = True) -> None:
    compare_with_stock(
        lambda *t: mlp(*split(t), activations), lambda *t: reference.mlp(*split(t), activations), tensors, gradients
    )


def between(layers: int, activation: str = "relu") -> list[str]:
    return [activation] * (layers - 1) + ["identity"]
