"""The plain-PyTorch meaning of every op, and the three models on stock layers: the specification."""

from fastnn.reference import mlp, models

__all__ = ["mlp", "models"]
