"""The three reference models on fused layers: constructors, parameter names and state dicts of
``fastnn.reference.models``. ``fuse`` joins their layers as it would those of any model of that form."""

import torch
from torch import Tensor

from fastnn import nn
from fastnn.fusion import fuse


class Conv2DNet(nn.Module):
    """A small convolutional classifier. Input (N, 3, 20, 20) -> (N, num_classes)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvReLUMaxPool2d(3, 10, kernel_size=5, stride=2, padding=2, pool_kernel_size=2)
        self.conv2 = nn.ConvReLUMaxPool2d(10, 10, kernel_size=2, stride=2, padding=1, pool_kernel_size=2)
        self.output = nn.Linear(10, num_classes)
        fuse(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.conv2(self.conv1(x)).flatten(1))


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
        fuse(self)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.rnn(x)  # the state is zeros, since none is given
        return self.fc(output[:, -1])


class Autoencoder(nn.Module):
    """Compresses a row of features and restores it. Input (..., input_size) -> (..., input_size)."""

    def __init__(self, input_size: int, reduced_size: int, encoding_size: int) -> None:
        super().__init__()
        self.encoder_1 = nn.Linear(input_size, reduced_size)
        self.encoder_2 = nn.Linear(reduced_size, encoding_size)
        self.decoder_1 = nn.Linear(encoding_size, reduced_size)
        self.decoder_2 = nn.Linear(reduced_size, input_size)
        fuse(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def encode(self, x: Tensor) -> Tensor:
        """(..., input_size) -> (..., encoding_size)."""
        return self.encoder_2(torch.relu(self.encoder_1(x)))

    def decode(self, encoding: Tensor) -> Tensor:
        """(..., encoding_size) -> (..., input_size)."""
        return self.decoder_2(torch.relu(self.decoder_1(encoding)))

    def reconstruction_error(self, x: Tensor) -> Tensor:
        """Mean squared error of each row, high for a row unlike those of the training: (..., input_size) -> (...)."""
        return torch.mean((self(x) - x) ** 2, dim=-1)
