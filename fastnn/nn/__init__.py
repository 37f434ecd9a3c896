"""Everything in ``torch.nn``, with fused layers in place of, or beside, the stock ones.

``import fastnn.nn as nn`` instead of ``import torch.nn as nn`` is all that a model needs; ``torch.nn`` itself is
never changed.
"""

from typing import Any

import torch.nn
from torch.nn import *  # noqa: F403 (the point of this module)

from fastnn.nn.conv_relu_max_pool import ConvReLUMaxPool1d, ConvReLUMaxPool2d, ConvReLUMaxPool3d
from fastnn.nn.mlp import MLP, LinearReLU
from fastnn.nn.rnn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell  # type: ignore[assignment]

FUSED = (
    *(ConvReLUMaxPool1d, ConvReLUMaxPool2d, ConvReLUMaxPool3d),
    *(RNN, GRU, LSTM, RNNCell, GRUCell, LSTMCell),
    *(LinearReLU, MLP),
)


def __getattr__(name: str) -> Any:
    # What the star import leaves out: names added to torch.nn later, and those with an underscore.
    return getattr(torch.nn, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn)})
