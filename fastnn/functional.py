"""The fused operations as functions, beside everything in ``torch.nn.functional``."""

from typing import Any

import torch.nn.functional
from torch.nn.functional import *  # noqa: F403 (the point of this module)

from fastnn._stock import stock_attribute
from fastnn.ops.batch_norm import relu_max_pool as relu_max_pool
from fastnn.ops.conv_relu_max_pool import conv_relu_max_pool1d as conv_relu_max_pool1d
from fastnn.ops.conv_relu_max_pool import conv_relu_max_pool2d as conv_relu_max_pool2d
from fastnn.ops.conv_relu_max_pool import conv_relu_max_pool3d as conv_relu_max_pool3d
from fastnn.ops.mlp import linear_relu as linear_relu
from fastnn.ops.mlp import mlp as mlp
from fastnn.ops.mlp import mlp_reconstruction_error as mlp_reconstruction_error


def __getattr__(name: str) -> Any:
    # What the star import leaves out: names with an underscore.
    return stock_attribute(__name__, torch.nn.functional, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn.functional)})
