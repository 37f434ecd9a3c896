"""The fused operations as functions."""

from fastnn.ops.mlp import linear_relu, mlp, mlp_reconstruction_error

__all__ = ["linear_relu", "mlp", "mlp_reconstruction_error"]
