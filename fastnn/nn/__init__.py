"""Everything in ``torch.nn``, with fused layers in place of, or beside, the stock ones.

``import fastnn.nn as nn`` instead of ``import torch.nn as nn`` is all that a model needs; ``torch.nn`` itself is
never changed. Its submodules are to be had too: ``fastnn.nn.utils.rnn`` is ``torch.nn.utils.rnn``, and
``fastnn.nn.functional`` has the fused functions as well.
"""

import sys
from typing import Any

import torch.nn

from fastnn._stock import StockSubmodules, stock_attribute
from fastnn.nn import functional as functional
from fastnn.nn.conv_relu_max_pool import ConvReLUMaxPool1d as ConvReLUMaxPool1d
from fastnn.nn.conv_relu_max_pool import ConvReLUMaxPool2d as ConvReLUMaxPool2d
from fastnn.nn.conv_relu_max_pool import ConvReLUMaxPool3d as ConvReLUMaxPool3d
from fastnn.nn.mlp import MLP as MLP
from fastnn.nn.mlp import LinearReLU as LinearReLU
from fastnn.nn.rnn import GRU as GRU
from fastnn.nn.rnn import LSTM as LSTM
from fastnn.nn.rnn import RNN as RNN
from fastnn.nn.rnn import GRUCell as GRUCell
from fastnn.nn.rnn import LSTMCell as LSTMCell
from fastnn.nn.rnn import RNNCell as RNNCell

FUSED = (
    *(ConvReLUMaxPool1d, ConvReLUMaxPool2d, ConvReLUMaxPool3d),
    *(RNN, GRU, LSTM, RNNCell, GRUCell, LSTMCell),
    *(LinearReLU, MLP),
)
_OURS = {"functional": functional, **{fused.__name__: fused for fused in FUSED}}

# The import that this module exists for. It comes after ours, because type checkers take the first import of a name.
from torch.nn import *  # type: ignore[assignment, no-redef] # noqa: E402, F403

globals().update(_OURS)
sys.meta_path.insert(0, StockSubmodules(__name__, "torch.nn"))


def __getattr__(name: str) -> Any:
    # What the star import leaves out: names added to torch.nn later, and those with an underscore.
    return stock_attribute(__name__, torch.nn, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn)})
