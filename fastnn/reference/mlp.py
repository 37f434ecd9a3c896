"""What ``mlp`` means, in plain PyTorch."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "tanh": F.tanh,
    "sigmoid": F.sigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "leaky_relu": F.leaky_relu,
}


def mlp(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[str]
) -> Tensor:
    """``act(x W^T + b)`` layer after layer. input (..., in), weights[i] (out_i, in_i) -> (..., out)."""
    for weight, bias, activation in zip(weights, biases, activations, strict=True):
        input = ACTIVATIONS[activation](F.linear(input, weight, bias))
    return input


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input (..., in), weight (out, in), bias (out) -> (..., out)."""
    return F.relu(F.linear(input, weight, bias))
