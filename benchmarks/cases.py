"""Every case that is measured, once."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastnn
from fastnn.reference import models as stock_models


@dataclass(frozen=True)
class Case:
    """One network at one input size, built on stock layers and on fused ones."""

    name: str
    shape: tuple[int, ...]
    stock: Callable[[], nn.Module]
    fused: Callable[[], nn.Module]
    flops: float  # of one forward
    lengths: tuple[int, ...] | None = None  # of a packed sequence
    input_gradient: bool = True  # whether a training step wants it: a layer does, a whole model does not
    step_bytes: float = 0  # of the weights that are read anew at each of `serial_steps` steps
    serial_steps: int = 0

    def make_input(self, generator: torch.Generator) -> Any:
        x = torch.randn(self.shape, generator=generator)
        if self.lengths is None:
            return x
        return pack_padded_sequence(x, torch.tensor(self.lengths), batch_first=True, enforce_sorted=False)


# ---- convolution ------------------------------------------------------------------------------------------


Size = int | Sequence[int]


def conv_case(
    shape: tuple[int, ...],
    out_channels: int,
    kernel: Size,
    pool: Size,
    *,
    stride: Size = 1,
    padding: Size = 0,
    dilation: int = 1,
    groups: int = 1,
    pool_stride: Size | None = None,
    pool_padding: Size = 0,
    ceil_mode: bool = False,
) -> Case:
    dims, in_channels = len(shape) - 2, shape[1]
    each = [(size,) * dims if isinstance(size, int) else tuple(size) for size in (kernel, stride, padding)]
    conv = {
        **dict(zip(("kernel_size", "stride", "padding"), each, strict=True)),
        "dilation": dilation,
        "groups": groups,
    }
    pooling = {"kernel_size": pool, "stride": pool_stride, "padding": pool_padding}

    def stock() -> nn.Module:
        layer = getattr(nn, f"Conv{dims}d")(in_channels, out_channels, **conv)
        return nn.Sequential(layer, nn.ReLU(), getattr(nn, f"MaxPool{dims}d")(**pooling, ceil_mode=ceil_mode))

    def fused() -> nn.Module:
        layer = getattr(fastnn.nn, f"ConvReLUMaxPool{dims}d")
        pools = {f"pool_{key}": value for key, value in pooling.items()}
        return layer(in_channels, out_channels, **conv, **pools, ceil_mode=ceil_mode)

    pixels = math.prod(
        (size + 2 * p - dilation * (k - 1) - 1) // s + 1 for size, k, s, p in zip(shape[2:], *each, strict=True)
    )
    flops = 2.0 * shape[0] * out_channels * pixels * in_channels // groups * math.prod(each[0])
    step = f"/{stride}" if stride != 1 else ""
    pool_step = f"/{pool_stride}" if pool_stride else ""
    others = (f" dilation {dilation}" if dilation > 1 else "") + (f" groups {groups}" if groups > 1 else "")
    name = f"{shape} {in_channels}->{out_channels} k{kernel}{step}{others} pool {pool}{pool_step}"
    return Case(name, shape, stock, fused, flops)


CONV_RELU_MAX_POOL = [
    conv_case((64, 1, 28, 28), 32, 3, 2, padding=1),
    conv_case((8, 3, 224, 224), 64, 3, 2, padding=1),
    conv_case((1, 3, 224, 224), 64, 7, 3, stride=2, padding=3, pool_stride=2, pool_padding=1),
    conv_case((8, 3, 224, 224), 64, 7, 3, stride=2, padding=3, pool_stride=2, pool_padding=1),
    conv_case((4, 64, 112, 112), 128, 3, 2, padding=1),
    conv_case((8, 256, 28, 28), 512, 3, 2, padding=1),
    conv_case((32, 16, 4096), 32, 5, 4),
    conv_case((2, 1, 64, 64, 64), 16, 3, 2, padding=1),
]

# ---- recurrent layers -------------------------------------------------------------------------------------

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def rnn_case(
    cell: str,
    shape: tuple[int, int, int],
    hidden: int,
    layers: int = 1,
    *,
    bidirectional: bool = False,
    lengths: tuple[int, ...] | None = None,
) -> Case:
    features = shape[2]
    options = {"num_layers": layers, "batch_first": True, "bidirectional": bidirectional}
    directions = 2 if bidirectional else 1
    widths = [features] + [hidden * directions] * (layers - 1)
    steps = sum(lengths) if lengths else shape[0] * shape[1]
    flops = sum(2.0 * GATES[cell] * hidden * (hidden + width) * steps * directions for width in widths)
    name = f"{cell} {shape} h{hidden}" + (f" x{layers}" if layers > 1 else "")
    longest = max(lengths) if lengths else shape[1]
    return Case(
        name + (" bidirectional" if bidirectional else "") + (" packed" if lengths else ""),
        shape,
        lambda: getattr(nn, cell)(features, hidden, **options),
        lambda: getattr(fastnn.nn, cell)(features, hidden, **options),
        flops,
        lengths,
        step_bytes=4.0 * GATES[cell] * hidden**2,
        serial_steps=longest * layers * directions,
    )


def cell_case(cell: str, batch: int, features: int, hidden: int) -> Case:
    return Case(
        f"{cell}Cell ({batch}, {features}) h{hidden}",
        (batch, features),
        lambda: getattr(nn, f"{cell}Cell")(features, hidden),
        lambda: getattr(fastnn.nn, f"{cell}Cell")(features, hidden),
        2.0 * GATES[cell] * hidden * (hidden + features) * batch,
        step_bytes=4.0 * GATES[cell] * hidden * (hidden + features),
        serial_steps=1,
    )


_LENGTHS = (*(5 + 37 * i % 196 for i in range(63)), 200)  # 64 sequences of 5 to 200 steps

RNN = [
    rnn_case("RNN", (1, 128, 64), 64),
    rnn_case("RNN", (1, 128, 64), 128),
    rnn_case("RNN", (32, 128, 64), 128, 2),
    rnn_case("RNN", (64, 100, 256), 512),
    rnn_case("GRU", (1, 128, 64), 128),
    rnn_case("GRU", (32, 128, 64), 128, 2),
    rnn_case("LSTM", (1, 128, 64), 128),
    rnn_case("LSTM", (32, 128, 64), 128, 2),
    *(rnn_case(cell, (64, 200, 64), 128, lengths=_LENGTHS) for cell in GATES),
    rnn_case("LSTM", (16, 64, 32), 64, 2, bidirectional=True),
    *(cell_case(cell, 1, 64, 64) for cell in GATES),
    # Large products: nothing is gained by fusing them, and nothing may be lost.
    rnn_case("LSTM", (16, 30, 100), 512),
    rnn_case("LSTM", (16, 30, 256), 1024),
    rnn_case("LSTM", (32, 50, 128), 256, 2),
    rnn_case("GRU", (16, 30, 256), 1024),
    cell_case("LSTM", 32, 128, 128),
]

# ---- fully connected --------------------------------------------------------------------------------------


def chain_flops(rows: int, widths: Sequence[int]) -> float:
    return 2.0 * rows * sum(a * b for a, b in pairwise(widths))


def mlp_case(rows: int, widths: Sequence[int]) -> Case:
    def stock() -> nn.Module:
        layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
        return nn.Sequential(*layers[:-1])

    name = f"MLP ({rows}, {widths[0]}) " + "-".join(map(str, widths[1:]))
    return Case(name, (rows, widths[0]), stock, lambda: fastnn.nn.MLP(widths), chain_flops(rows, widths))


def linear_relu_case(rows: int, features: int, outputs: int) -> Case:
    return Case(
        f"LinearReLU ({rows}, {features}) {outputs}",
        (rows, features),
        lambda: nn.Sequential(nn.Linear(features, outputs), nn.ReLU()),
        lambda: fastnn.nn.LinearReLU(features, outputs),
        chain_flops(rows, (features, outputs)),
    )


class TwoHeads(nn.Module):
    """What a variational autoencoder's encoder ends in, mean and log variance, here simply added up."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.mean, self.log_variance = nn.Linear(features, outputs), nn.Linear(features, outputs)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mean(hidden) + self.log_variance(hidden)


def variational_case(rows: int, features: int, hidden: int, encoding: int) -> Case:
    """The linear layers of a variational autoencoder, as a user would write them."""

    def stock() -> nn.Module:
        encoder = nn.Linear(features, hidden), nn.ReLU(), TwoHeads(hidden, encoding)
        return nn.Sequential(*encoder, nn.Linear(encoding, hidden), nn.ReLU(), nn.Linear(hidden, features))

    def fused() -> nn.Module:
        encoder = fastnn.nn.LinearReLU(features, hidden), TwoHeads(hidden, encoding)
        return nn.Sequential(*encoder, fastnn.nn.MLP([encoding, hidden, features]))

    flops = chain_flops(rows, (features, hidden, 2 * encoding)) + chain_flops(rows, (encoding, hidden, features))
    name = f"VAE ({rows}, {features}) {hidden}-{encoding}"
    return Case(name, (rows, features), stock, fused, flops, input_gradient=False)


# ---- the three models -------------------------------------------------------------------------------------


def model_case(name: str, shape: tuple[int, ...], sizes: str, flops: float, **arguments: Any) -> Case:
    return Case(
        f"{name} {shape} {sizes}".rstrip(),
        shape,
        lambda: getattr(stock_models, name)(**arguments),
        lambda: getattr(fastnn.models, name)(**arguments),
        flops,
        input_gradient=False,
    )


def conv2dnet_case(batch: int) -> Case:
    flops = 2.0 * batch * (10 * 100 * 75 + 10 * 9 * 40 + 10 * 10)
    return model_case("Conv2DNet", (batch, 3, 20, 20), "", flops, num_classes=10)


def rnn_model_case(shape: tuple[int, int, int], hidden: int, layers: int, outputs: int) -> Case:
    flops = rnn_case("RNN", shape, hidden, layers).flops + 2.0 * shape[0] * hidden * outputs
    arguments = {"input_size": shape[2], "hidden_size": hidden, "num_layers": layers, "output_size": outputs}
    return model_case("RNN", shape, f"h{hidden} x{layers}", flops, **arguments)


def autoencoder_case(rows: int, features: int, reduced: int, encoding: int) -> Case:
    flops = chain_flops(rows, (features, reduced, encoding, reduced, features))
    arguments = {"input_size": features, "reduced_size": reduced, "encoding_size": encoding}
    return model_case("Autoencoder", (rows, features), f"{reduced}-{encoding}", flops, **arguments)


# At the sizes that DESIGN.md gives, then at one realistic size each.
MODELS = [
    conv2dnet_case(32),
    rnn_model_case((8, 20, 10), 32, 2, 5),
    autoencoder_case(32, 10, 8, 5),
    conv2dnet_case(256),
    rnn_model_case((32, 128, 64), 128, 2, 10),
    autoencoder_case(256, 784, 128, 32),
]

MLP = [
    MODELS[2],
    *(autoencoder_case(rows, 784, 128, 32) for rows in (1, 64, 256, 4096)),
    mlp_case(1024, [64] * 7),
    # Large products: nothing is gained by fusing them, and nothing may be lost.
    mlp_case(256, [1024, 1024, 1024, 10]),
    linear_relu_case(256, 1024, 1024),
    mlp_case(128, [784, 512, 512, 10]),
    variational_case(128, 784, 400, 20),
]

CASES = {
    "models": MODELS,
    "conv_relu_max_pool": [MODELS[0], *CONV_RELU_MAX_POOL],
    "rnn": [MODELS[1], *RNN],
    "mlp": MLP,
}


def first_tensor(result: Any) -> Tensor:
    """The output proper of what a module returns: itself, or the first part of (output, state) or a packed sequence."""
    return result if isinstance(result, Tensor) else first_tensor(result[0])
