"""A convolution that neither ReLU nor a pool follows: by our kernels where they are faster (algorithms that multiply
less, depthwise convolutions and narrow groups, signals, contiguous images of few channels or under kernels of one
pixel, float64), else torch's own.

In a model such a convolution stands before a batch norm that takes the statistics of its output, or before an addition.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnn.ops._autograd import (
    check_same_device,
    gradients_by_reference,
    in_torchs_words,
    is_plain,
    wants_gradient,
)
from fastnn.ops._raw_operator import raw_operator
from fastnn.ops.conv_relu_max_pool import FlatGeometry, gradients_like, output_like
from fastnn.reference import conv_relu_max_pool as reference
from fastnn.reference.conv_relu_max_pool import Geometry

_op = torch.ops.fastnn.convolution.default
_backward_op = torch.ops.fastnn.convolution_backward.default
_algorithm_op = torch.ops.fastnn.convolution_algorithm.default


def convolution(input: Tensor, weight: Tensor, bias: Tensor | None, *, geometry: FlatGeometry, dims: int) -> Tensor:
    """What ``torch.nn.functional.conv{dims}d`` computes, with its errors.

    input (batch, in_channels, ...), weight (out_channels, in_channels / groups, ...), bias (out_channels) or None ->
    (batch, out_channels, ...). geometry: the :func:`flat_geometry` of the convolution with a pool of one pixel.
    """
    if not _is_ours(input, weight, bias, geometry, dims):
        return _stock(input, weight, bias, geometry, dims)
    run = Convolution.apply if wants_gradient(input, weight, bias) else _without_gradient
    try:
        output: Tensor = run(input, weight, bias, geometry, dims)
    except RuntimeError as error:  # such as a tensor whose storage has been freed
        raise in_torchs_words(error, _stock, input, weight, bias, geometry, dims) from None
    return output


def _without_gradient(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: FlatGeometry, dims: int) -> Tensor:
    output: Tensor = _op(input, weight, bias, geometry)
    return output


def _stock(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: FlatGeometry, dims: int) -> Tensor:
    stride, padding, dilation, groups, *_ = Geometry.of_flat(geometry, dims)
    return reference.CONV[dims](input, weight, bias, stride, padding, dilation, groups)


# The calls that our kernels take, by all that the choice follows from: asking the planner takes some microseconds.
_chosen: dict[Any, bool] = {}
_MOST_CHOSEN = 1024
# Kernels of one pixel save a quarter of torch's time; with fewer products than these an autograd function costs more.
_LEAST_PRODUCTS = 1 << 22


def _is_ours(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: FlatGeometry, dims: int) -> bool:
    if (
        input.dtype is not torch.float32
        or weight.dtype is not torch.float32
        or (bias is not None and bias.dtype is not torch.float32)
        or not input.is_cpu
        or input.dim() != dims + 2
        or not is_plain(input)
    ):
        return False
    try:
        of_bias = None if bias is None else bias.shape
        key = (input.shape, input.stride(), weight.shape, weight.stride(), of_bias, geometry, torch.get_num_threads())
        found = _chosen.get(key)
        if found is None:
            if len(_chosen) >= _MOST_CHOSEN:
                _chosen.clear()
            with torch.no_grad():
                algorithms = _algorithm_op(input, weight, bias, geometry)
                found = any(name not in ("stock", "none") for name in algorithms)
                if algorithms[0] == "pointwise":
                    found = input.numel() * weight.shape[0] >= _LEAST_PRODUCTS
                _chosen[key] = found
    except RuntimeError:  # a tensor without strides, such as a sparse one; or sizes that torch refuses in its own words
        return False
    return found


class Convolution(torch.autograd.Function):
    """It saves input and weight."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: FlatGeometry, dims: int) -> Any:
        output = _op(input, weight, bias, geometry)
        ctx.save_for_backward(input, weight, bias)
        ctx.geometry, ctx.dims = geometry, dims
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        input, weight, bias = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        result: Sequence[Any]
        if torch.is_grad_enabled():
            stock = functools.partial(_stock, geometry=ctx.geometry, dims=ctx.dims)
            result = gradients_by_reference(stock, (input, weight, bias), wanted, grads)
        else:
            result = _backward_op(grads[0], input, weight, ctx.geometry, *wanted)
        return (*(g if w else None for g, w in zip(result, wanted, strict=True)), None, None)


@raw_operator("convolution")
def _(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[int]) -> Tensor:
    check_same_device(input, weight, bias)
    return output_like(input, weight, geometry, input.dtype)


@raw_operator("convolution_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: Sequence[int],
    input_wanted: bool,
    weight_wanted: bool,
    bias_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_same_device(grad_output, input, weight)
    return gradients_like(input, weight, input_wanted, weight_wanted, bias_wanted)
