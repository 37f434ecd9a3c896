"""The fused operations as functions."""

from fastnn.ops.mlp import linear_relu, mlp

__all__ = ["linear_relu", "mlp"]
