"""The three reference models on fused layers: constructors, parameter names and state dicts of
``fastnn.reference.models``."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, is_grad_enabled

from fastnn import nn
from fastnn.nn._hooks import has_global_hooks, has_own_call
from fastnn.nn.mlp import parameters_of_plain
from fastnn.nn.rnn import train_with_head
from fastnn.ops._autograd import is_plain
from fastnn.ops.frozen import conv_numbers, frozen_unpacked, write_program
from fastnn.ops.mlp import activation_digits, mlp_of_parameters, mlp_reconstruction_error, split_parameters

_IDENTITY = activation_digits(("identity",))
_network_call = frozen_unpacked._op


def _linear(layer: Any, x: Tensor) -> Tensor:
    """``layer(x)``, by the fused operator where it is a linear layer: of a few rows, half of the time of stock's."""
    parameters = parameters_of_plain((layer,))
    return layer(x) if parameters is None else mlp_of_parameters(x, parameters, _IDENTITY)


def _infer_at_once(x: Tensor, convs: Sequence[Any], linear: Any) -> Tensor | None:
    """``linear(flatten(convs(x)))`` by one operator, which saves a sixth of a small network's time; None where layers
    have to be called, for an input of another kind or since somebody looks at them."""
    if type(x) is not Tensor or not is_plain(x) or not x.is_cpu or x.dtype is torch.bfloat16 or not x.is_contiguous():
        return None
    if has_global_hooks():
        return None
    parameters, stages = [], []
    for layer in (*convs, linear):
        # Of these classes alone: in a parametrized one's _parameters there is no weight.
        if type(layer) is not (nn.Linear if layer is linear else nn.ConvReLUMaxPool2d) or has_own_call(layer):
            return None
        weight: Any = layer._parameters["weight"]
        bias = layer._parameters["bias"]
        parameters += [weight] if bias is None else [weight, bias]
        stages.append((weight.shape, bias is not None, None if layer is linear else layer._geometry))
    program = _program(tuple(stages))
    try:
        return _network_call(x, parameters, program) if program else None
    except RuntimeError:  # the layers have words of their own for it
        return None


@lru_cache(maxsize=256)
def _program(layers: tuple[tuple[Sequence[int], bool, Sequence[int] | None], ...]) -> str | None:
    """Of layers, each its weight's sizes, whether it has a bias, and its geometry; None where that is in words."""
    *convs, (linear, biased, _) = layers
    stages: list[tuple[str, Sequence[int]]] = []
    for weight, has_bias, geometry in convs:
        if geometry is None:
            return None
        stages.append(("conv", conv_numbers(weight, has_bias, geometry)))
    return write_program([*stages, ("flatten", ()), ("mlp", (int(biased), linear[1], linear[0], 0))])


class Conv2DNet(nn.Module):
    """A small convolutional classifier. Input (N, 3, 20, 20) -> (N, num_classes)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvReLUMaxPool2d(3, 10, kernel_size=5, stride=2, padding=2, pool_kernel_size=2)
        self.conv2 = nn.ConvReLUMaxPool2d(10, 10, kernel_size=2, stride=2, padding=1, pool_kernel_size=2)
        self.output = nn.Linear(10, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        conv1, conv2, output = self._modules["conv1"], self._modules["conv2"], self._modules["output"]
        result = None if is_grad_enabled() else _infer_at_once(x, (conv1, conv2), output)
        return _linear(output, conv2(conv1(x)).flatten(1)) if result is None else result  # type: ignore[misc]


class RNN(nn.Module):
    """A sequence classifier: the recurrent layers, then ``fc`` on the last step.

    Input (N, L, input_size) -> (N, output_size). ``cell`` chooses the layers: "RNN", "GRU" or "LSTM".
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, output_size: int, cell: str = "RNN") -> None:
        super().__init__()
        layers = {"RNN": nn.RNN, "GRU": nn.GRU, "LSTM": nn.LSTM}
        if cell not in layers:
            raise ValueError(f"RNN: cell must be one of {', '.join(layers)}, got {cell!r}")
        self.rnn = layers[cell](input_size, hidden_size, num_layers, batch_first=True)
        self.fc = nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        head = parameters_of_plain((self.fc,)) if is_grad_enabled() else None
        if head is not None:
            trained = train_with_head(self.rnn, x, head)
            if trained is not None:
                return trained
        _, state = self.rnn(x)  # no state given: zeros
        h = state[0] if isinstance(state, tuple) else state
        # The last layer's last output: a smaller tensor to take it from than all outputs.
        return _linear(self.fc, h[-1])


_AUTOENCODER_ACTIVATIONS = ("relu", "identity", "relu", "identity")
_AUTOENCODER_DIGITS, _HALF_DIGITS = activation_digits(_AUTOENCODER_ACTIVATIONS), activation_digits(("relu", "identity"))
_ENCODER, _DECODER = ("encoder_1", "encoder_2"), ("decoder_1", "decoder_2")
_LAYERS = (*_ENCODER, *_DECODER)


class Autoencoder(nn.Module):
    """Compresses a row of features and restores it. Input (..., input_size) -> (..., input_size)."""

    def __init__(self, input_size: int, reduced_size: int, encoding_size: int) -> None:
        super().__init__()
        self.encoder_1 = nn.Linear(input_size, reduced_size)
        self.encoder_2 = nn.Linear(reduced_size, encoding_size)
        self.decoder_1 = nn.Linear(encoding_size, reduced_size)
        self.decoder_2 = nn.Linear(reduced_size, input_size)

    def forward(self, x: Tensor) -> Tensor:
        modules = self._modules
        parameters = parameters_of_plain([modules[name] for name in _LAYERS])
        if parameters is None:
            return self.decode(self.encode(x))
        return mlp_of_parameters(x, parameters, _AUTOENCODER_DIGITS)

    def encode(self, x: Tensor) -> Tensor:
        """(..., input_size) -> (..., encoding_size)."""
        return _two_layers(x, *(self._modules[name] for name in _ENCODER))

    def decode(self, encoding: Tensor) -> Tensor:
        """(..., encoding_size) -> (..., input_size)."""
        return _two_layers(encoding, *(self._modules[name] for name in _DECODER))

    def reconstruction_error(self, x: Tensor) -> Tensor:
        """Mean squared error of each row, high for a row unlike those of the training: (..., input_size) -> (...)."""
        parameters = parameters_of_plain([self._modules[name] for name in _LAYERS])
        if parameters is None:
            return torch.mean((self(x) - x) ** 2, dim=-1)
        return mlp_reconstruction_error(x, *split_parameters(parameters, 4), _AUTOENCODER_ACTIVATIONS)


def _two_layers(x: Tensor, first: Any, second: Any) -> Tensor:
    """``second(relu(first(x)))``"""
    parameters = parameters_of_plain((first, second))
    if parameters is None:
        return second(torch.relu(first(x)))
    return mlp_of_parameters(x, parameters, _HALF_DIGITS)
