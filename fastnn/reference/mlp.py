"""What ``mlp`` means, in plain PyTorch."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fastnn.activations import parse_one


def mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
) -> Tensor:
    """``act(x W^T + b)`` layer after layer. input (..., in), weights[i] (out_i, in_i) -> (..., out)."""
    for weight, bias, activation in zip(weights, biases, activations, strict=True):
        input = parse_one(activation)(F.linear(input, weight, bias))
    return input


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input (..., in), weight (out, in), bias (out) -> (..., out)."""
    return F.relu(F.linear(input, weight, bias))
