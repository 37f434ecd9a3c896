"""Linear layers fused with their activations."""

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastnn.ops.mlp import activation_digits, activation_names, join_parameters, linear_relu, mlp_of_parameters

_MODULES: dict[str, Any] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
}


class LinearReLU(nn.Linear):
    """``relu(x W^T + b)`` in one kernel: a ``torch.nn.Linear`` (same arguments, parameters, initial weights and state
    dict) with its ReLU. See :func:`fastnn.functional.linear_relu`."""

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) -> (..., out_features)."""
        return linear_relu(input, self.weight, self.bias)


class MLP(nn.Sequential):
    """A chain of ``Linear`` layers with an activation between them and none after the last, run in one call.

    It is a ``torch.nn.Sequential`` of the stock modules, ``Linear, activation, Linear, ...``: same children, initial
    weights and state dict. Hooks of the children do not run, since the children are not called. See
    :func:`fastnn.functional.mlp`.

    Args:
        sizes: features of the input, then of each layer's output; at least two.
        activation: one name for all gaps, or one a layer (the last included): identity, relu, tanh, sigmoid, gelu,
            gelu_tanh, silu, leaky_relu.
        bias: whether the layers have one.
        device, dtype: of the parameters.

    Raises:
        ValueError: fewer than two sizes, or an activation that is not in the list.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str | Sequence[str] = "relu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(sizes) < 2:
            raise ValueError(f"MLP: sizes must name the input's features and at least one layer's, got {list(sizes)}")
        names = activation_names(activation, len(sizes) - 1)
        children: list[nn.Module] = []
        for (in_features, out_features), name in zip(pairwise(sizes), names, strict=True):
            children.append(nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype))
            if name != "identity":
                children.append(_MODULES[name]())
        super().__init__(*children)
        self.activations = names
        self._digits = activation_digits(names)

    def forward(self, input: Tensor) -> Tensor:
        """input (..., sizes[0]) -> (..., sizes[-1])."""
        linears = [child for child in self._modules.values() if isinstance(child, nn.Linear)]
        return mlp_of_parameters(input, linear_parameters(linears), self._digits)


def linear_parameters(linears: Collection[Any]) -> list[Tensor]:
    """The parameters of ``Linear`` layers as operators take them, read anew: they may have been replaced."""
    weights, biases, complete = [], [], True
    for linear in linears:
        try:
            # A third of the time of attributes, for which nn.Module looks into _parameters last.
            own = linear._parameters
            weight, bias = own["weight"], own["bias"]
        except KeyError:  # it is parametrised
            weight, bias = linear.weight, linear.bias
        weights.append(weight)
        biases.append(bias)
        if bias is None:
            complete = False
    if not complete:
        return join_parameters(weights, biases)
    weights += biases
    return weights
