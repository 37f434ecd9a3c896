"""The three reference models on fused layers: constructors, parameter names and state dicts of
``fastnn.reference.models``."""

from typing import Any

from torch import Tensor, is_grad_enabled

from fastnn import nn
from fastnn.nn.mlp import linear_parameters
from fastnn.nn.rnn import train_with_head
from fastnn.ops.mlp import activation_digits, mlp, mlp_of_parameters, mlp_reconstruction_error

_IDENTITY = activation_digits(("identity",))


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer(x)`` by the fused operator: of a few rows, half of the time of stock's."""
    return mlp_of_parameters(x, linear_parameters((layer,)), _IDENTITY)


class Conv2DNet(nn.Module):
    """A small convolutional classifier. Input (N, 3, 20, 20) -> (N, num_classes)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvReLUMaxPool2d(3, 10, kernel_size=5, stride=2, padding=2, pool_kernel_size=2)
        self.conv2 = nn.ConvReLUMaxPool2d(10, 10, kernel_size=2, stride=2, padding=1, pool_kernel_size=2)
        self.output = nn.Linear(10, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return _linear(self.output, self.conv2(self.conv1(x)).flatten(1))


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
        head = linear_parameters((self.fc,))
        trained = train_with_head(self.rnn, x, head) if is_grad_enabled() else None
        if trained is not None:
            return trained
        _, state = self.rnn(x)  # no state given: zeros
        h = state[0] if isinstance(state, tuple) else state
        # The last layer's last output: a smaller tensor to take it from than all outputs.
        return mlp_of_parameters(h[-1], head, _IDENTITY)


_AUTOENCODER_ACTIVATIONS = ("relu", "identity", "relu", "identity")
_AUTOENCODER_DIGITS = activation_digits(_AUTOENCODER_ACTIVATIONS)


class Autoencoder(nn.Module):
    """Compresses a row of features and restores it. Input (..., input_size) -> (..., input_size)."""

    def __init__(self, input_size: int, reduced_size: int, encoding_size: int) -> None:
        super().__init__()
        self.encoder_1 = nn.Linear(input_size, reduced_size)
        self.encoder_2 = nn.Linear(reduced_size, encoding_size)
        self.decoder_1 = nn.Linear(encoding_size, reduced_size)
        self.decoder_2 = nn.Linear(reduced_size, input_size)

    def forward(self, x: Tensor) -> Tensor:
        return mlp_of_parameters(x, linear_parameters(self._modules.values()), _AUTOENCODER_DIGITS)

    def encode(self, x: Tensor) -> Tensor:
        """(..., input_size) -> (..., encoding_size)."""
        first, second = self.encoder_1, self.encoder_2
        return mlp(x, (first.weight, second.weight), (first.bias, second.bias))

    def decode(self, encoding: Tensor) -> Tensor:
        """(..., encoding_size) -> (..., input_size)."""
        first, second = self.decoder_1, self.decoder_2
        return mlp(encoding, (first.weight, second.weight), (first.bias, second.bias))

    def reconstruction_error(self, x: Tensor) -> Tensor:
        """Mean squared error of each row, high for a row unlike those of the training: (..., input_size) -> (...)."""
        layers: Any = self._modules.values()
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        return mlp_reconstruction_error(x, weights, biases, _AUTOENCODER_ACTIVATIONS)
