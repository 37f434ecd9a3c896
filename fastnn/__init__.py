"""Fused CPU and GPU kernels for convolutional, recurrent and fully connected networks in PyTorch."""

from fastnn._extension import load_extension

_C = load_extension()
__version__: str = _C.version

from fastnn import functional, kernels, models, nn, reference  # noqa: E402 (the operators must be registered first)
from fastnn.explanation import ExplainedCall, Explanation, explain  # noqa: E402
from fastnn.frozen import FrozenGraph, FrozenModel, freeze  # noqa: E402
from fastnn.fusion import fuse, unfuse  # noqa: E402
from fastnn.info import BackendInfo, backend_info  # noqa: E402
from fastnn.training_step import TrainingStep, training_step  # noqa: E402

__all__ = [
    "BackendInfo",
    "ExplainedCall",
    "Explanation",
    "FrozenGraph",
    "FrozenModel",
    "TrainingStep",
    "backend_info",
    "explain",
    "freeze",
    "functional",
    "fuse",
    "kernels",
    "models",
    "nn",
    "reference",
    "training_step",
    "unfuse",
]
