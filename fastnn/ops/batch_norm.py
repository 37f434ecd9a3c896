"""Batch norm, ReLU and max-pool in one pass, after a convolution or without one.

A batch norm whose statistics are known multiplies each channel by a number and adds another. After a convolution, the
numbers go into the convolution's weights. Otherwise ``conv_relu_max_pool`` computes the batch norm, as a convolution
whose kernel is one pixel and whose groups have one channel each.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn._torch import forward_ad, is_tracing
from fastnn.ops._autograd import (
    autocast_is_on,
    gradients_by_reference,
    is_compiling,
    is_exporting,
    transforms_active,
)
from fastnn.ops.conv_relu_max_pool import (
    MOST_PLACES,
    conv_relu_max_pool,
    conv_relu_max_pool1d,
    conv_relu_max_pool2d,
    conv_relu_max_pool3d,
    flat_geometry,
)
from fastnn.reference import conv_relu_max_pool as reference

_CONV_RELU_MAX_POOL = (conv_relu_max_pool1d, conv_relu_max_pool2d, conv_relu_max_pool3d)
_backward_op = torch.ops.fastnn.conv_relu_max_pool_backward.default
_with_winners_op = torch.ops.fastnn.conv_relu_max_pool_with_winners.default

# With fewer pixels than these, batch norm is not folded into the weight. Folding takes about 0.6 ns for each element of
# the weight, for the 8 bytes that are moved; the convolution takes 0.02 ns for each element and pixel. At so many
# pixels folding takes a fifth of the convolution's time, which is about what one call in place of three saves.
_PIXELS_TO_FOLD_FOR = 150


def conv_batch_norm_relu_max_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    eps: float = 1e-5,
    pool_kernel_size: Any = 1,
    pool_stride: Any = None,
    pool_padding: Any = 0,
    pool_dilation: Any = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """``max_pool(relu(batch_norm(conv(input))))`` with the running statistics, as ``torch.nn``'s layers in eval mode.

    input (batch, in_channels, ...) or without batch, weight (out_channels, in_channels / groups, ...), statistics,
    gamma and beta (out_channels) -> (batch, out_channels, ...).
    """
    dims = weight.dim() - 2
    pool = (pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode)
    norm = (running_mean, running_var, gamma, beta)
    is_mixed = any(tensor is not None and tensor.dtype is not weight.dtype for tensor in norm)
    if input.dim() == dims + 1 or is_mixed or not _fit(weight.shape[0], *norm):
        # Batch norm has to refuse the convolution's output, to broadcast over it, or to convert it.
        convolved = reference.CONV[dims](input, weight, bias, stride, padding, dilation, groups)
        if convolved.dim() == dims + 2 or dims == 1:  # (BatchNorm1d takes two dimensions, too.)
            normed = F.batch_norm(convolved, running_mean, running_var, gamma, beta, False, 0.0, eps)
            return relu_max_pool(normed, dims=dims, **_names(pool))
        raise ValueError(f"expected {dims + 2}D input (got {dims + 1}D input)")
    if not (is_compiling() or is_exporting()) and _has_few_pixels(input, dims):
        convolved = reference.CONV[dims](input, weight, bias, stride, padding, dilation, groups)
        return relu_max_pool(convolved, *_scale_and_shift(running_mean, running_var, gamma, beta, eps), **_names(pool))
    scale, shift = _scale_and_shift(running_mean, running_var, gamma, beta, eps)
    if bias is not None:
        shift = torch.addcmul(shift, bias, scale)
    folded = weight * scale.reshape(-1, *(1,) * (dims + 1))
    return _CONV_RELU_MAX_POOL[dims - 1](input, folded, shift, stride, padding, dilation, groups, *pool)


def batch_norm_relu_max_pool(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    num_batches_tracked: Tensor | None = None,
    *,
    dims: int,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pool_kernel_size: Any = 1,
    pool_stride: Any = None,
    pool_padding: Any = 0,
    pool_dilation: Any = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """``max_pool(relu(batch_norm(input)))``. In ``training`` it takes the statistics of the batch, updates the running
    statistics by them, and adds one to ``num_batches_tracked``."""
    pool = (pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode)
    is_features = input.dim() == 2 and dims == 1  # without a length: each row is a signal to the pool
    if input.dim() != dims + 2 and not is_features:
        raise ValueError(f"expected {dims + 2}D input (got {input.dim()}D input)")
    if num_batches_tracked is not None and training:
        num_batches_tracked.add_(1)
    if is_features or not _fit(input.shape[1], running_mean, running_var, gamma, beta):  # it raises the error
        normed = F.batch_norm(input, running_mean, running_var, gamma, beta, training, momentum, eps)
        return reference.POOL[dims](F.relu(normed), *pool)
    if not training and running_mean is not None and running_var is not None:
        return relu_max_pool(input, *_scale_and_shift(running_mean, running_var, gamma, beta, eps), **_names(pool))
    geometry = flat_geometry(dims, 1, 0, 1, input.shape[1], *pool)
    if geometry is None or not _may_train_by_kernel(input, gamma, beta, running_mean, running_var, geometry, dims):
        normed = F.batch_norm(input, running_mean, running_var, gamma, beta, training, momentum, eps)
        return relu_max_pool(normed, dims=dims, **_names(pool))
    output: Tensor = BatchNormReluMaxPool.apply(input, gamma, beta, running_mean, running_var, momentum, eps, geometry)
    return output


def relu_max_pool(
    input: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    pool_kernel_size: Any = 2,
    pool_stride: Any = None,
    pool_padding: Any = 0,
    pool_dilation: Any = 1,
    ceil_mode: bool = False,
    dims: int | None = None,
) -> Tensor:
    """``max_pool(relu(scale * input + shift))``, without an index for each window, and in one pass.

    Args:
        input: (batch, channels, ...), of one to three dimensions that are pooled.
        scale, shift: (channels), or None for ones and zeros.
        pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode: as ``torch.nn.functional.max_pool2d``
            has them.
        dims: how many dimensions are pooled, where ``input`` may come without a batch.

    Returns:
        (batch, channels, ...), of the pooled sizes. It has gradients for ``input``, ``scale`` and ``shift``.

    Raises:
        ValueError: an input of other dimensions.
        RuntimeError: what stock's multiplication or pooling would raise.
    """
    dims = input.dim() - 2 if dims is None else dims
    if dims not in reference.POOL:
        raise ValueError(f"relu_max_pool: expected a 3D, 4D or 5D input (got {input.dim()}D input)")
    pool = (pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode)
    channels = input.shape[1] if input.dim() == dims + 2 else 0
    geometry = flat_geometry(dims, 1, 0, 1, channels, *pool)
    sizes = (-1, *(1,) * dims)
    if geometry is None or channels == 0 or any(t is not None and t.dtype is not input.dtype for t in (scale, shift)):
        scaled = input if scale is None else input * scale.reshape(sizes)
        shifted = scaled if shift is None else scaled + shift.reshape(sizes)
        return reference.POOL[dims](F.relu(shifted), *pool).to(input.dtype)
    # Adding -0 changes no number, not even -0.
    weight = input.new_ones(channels) if scale is None else scale
    bias = input.new_full((channels,), -0.0) if shift is None else shift
    return conv_relu_max_pool(input, weight.reshape(-1, 1, *(1,) * dims), bias, geometry, dims)


def _fit(channels: int, *tensors: Tensor | None) -> bool:
    """Whether a batch norm's tensors have a number for each channel. (The code here would broadcast others.)"""
    return all(tensor is None or tensor.shape == (channels,) for tensor in tensors)


def _has_few_pixels(input: Tensor, dims: int) -> bool:
    return input.dim() == dims + 2 and input.numel() < _PIXELS_TO_FOLD_FOR * input.shape[1]


def _scale_and_shift(
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(var + eps)
    if gamma is not None:
        scale = scale * gamma
    return scale, -mean * scale if beta is None else torch.addcmul(beta, mean, scale, value=-1)


def _names(pool: Sequence[Any]) -> dict[str, Any]:
    return dict(
        zip(("pool_kernel_size", "pool_stride", "pool_padding", "pool_dilation", "ceil_mode"), pool, strict=True)
    )


def _may_train_by_kernel(
    input: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    geometry: Sequence[int],
    dims: int,
) -> bool:
    """Whether :class:`BatchNormReluMaxPool` covers a call: float tensors of one dtype on the CPU, in eager mode."""
    kinds = {(t.dtype, t.device.type) for t in (input, gamma, beta, mean, var) if t is not None}
    places = 1
    for size in geometry[3 * dims : 4 * dims]:
        places *= size
    return (
        kinds in ({(torch.float32, "cpu")}, {(torch.float64, "cpu")})
        and input.dim() == dims + 2
        and input.numel() > input.shape[1] > 0
        and places <= MOST_PLACES
        and all(type(size) is int for size in input.shape)  # batch_norm_update_stats is not traced with symbols
        and not autocast_is_on()
        and not transforms_active()
        and not is_compiling()
        and not is_exporting()
        and not is_tracing()
        and forward_ad._current_level < 0
    )


# A variance is held against so many squares of the rounding error of its mean. BatchNormTraining has the number too.
_ROUNDING = 16.0


class BatchNormReluMaxPool(torch.autograd.Function):
    """Batch norm, ReLU and max-pool in training. It saves the input, two numbers a channel and a byte a window."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, gamma: Any, beta: Any, mean: Any, var: Any, momentum: float, eps: float,
                geometry: tuple[int, ...]) -> Tensor:  # fmt: skip
        batch_mean, batch_var = torch.ops.aten.batch_norm_update_stats(input, mean, var, momentum)
        scale, _ = _scale_and_shift(batch_mean, batch_var, gamma, None, eps)
        # A channel that is constant, but for the rounding of its mean, gives exactly beta. Multiplied by its scale,
        # which is large, the rounding error would move the result away from beta, perhaps to the other side of ReLU's
        # 0.
        limit = _ROUNDING * torch.finfo(batch_var.dtype).eps ** 2
        scale.masked_fill_(batch_var <= batch_mean.square() * limit, 0)
        shift = -batch_mean * scale if beta is None else torch.addcmul(beta, batch_mean, scale, value=-1)
        weight = scale.reshape(-1, *(1,) * (input.dim() - 1))
        output, winners = _with_winners_op(input, weight, shift, geometry)
        ctx.eps, ctx.geometry = eps, geometry
        ctx.save_for_backward(input, gamma, beta, batch_mean, torch.rsqrt(batch_var + eps), winners)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        input, gamma, beta, batch_mean, batch_invstd, winners = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], gamma is not None, beta is not None]
        result: Sequence[Any]
        if torch.is_grad_enabled():
            needed = [bool(w and n) for w, n in zip(wanted, ctx.needs_input_grad, strict=False)]
            by_reference = functools.partial(_by_reference, ctx.eps, ctx.geometry)
            result = gradients_by_reference(by_reference, (input, gamma, beta), needed, grads)
        else:
            result = _gradients(
                grads[0], input, gamma, batch_mean, batch_invstd, winners, ctx.eps, ctx.geometry, wanted
            )
        return (*(g if w else None for g, w in zip(result, wanted, strict=True)), None, None, None, None, None)


def _gradients(
    grad_output: Tensor,
    input: Tensor,
    gamma: Tensor | None,
    batch_mean: Tensor,
    batch_invstd: Tensor,
    winners: Tensor,
    eps: float,
    geometry: tuple[int, ...],
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    ones = input.new_ones(input.shape[1], *(1,) * (input.dim() - 1))
    grad_normed, _, _ = _backward_op(grad_output, winners, input, ones, geometry, True, False, False)
    gradients: tuple[Tensor, ...] = torch.ops.aten.native_batch_norm_backward(
        grad_normed, input, gamma, None, None, batch_mean, batch_invstd, True, eps, wanted
    )
    return gradients


def _by_reference(eps: float, geometry: Sequence[int], input: Tensor, gamma: Any, beta: Any) -> Tensor:
    normed = F.batch_norm(input, None, None, gamma, beta, True, 0.0, eps)
    pool: Tensor = reference.max_pool(F.relu(normed), *reference.Geometry.of_flat(geometry, input.dim() - 2)[4:])
    return pool
