"""The fused operations as functions."""

from fastnn.ops.conv_relu_max_pool import conv_relu_max_pool1d, conv_relu_max_pool2d, conv_relu_max_pool3d
from fastnn.ops.mlp import linear_relu, mlp, mlp_reconstruction_error

__all__ = [
    "conv_relu_max_pool1d",
    "conv_relu_max_pool2d",
    "conv_relu_max_pool3d",
    "linear_relu",
    "mlp",
    "mlp_reconstruction_error",
]
