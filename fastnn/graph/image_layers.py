"""How pools, paddings, interpolations and transposed convolutions are layers of a network."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fastnn.graph.reader import NotANetworkError, Reader, Size, each_dimension, module_row, row
from fastnn.graph.shape_layers import write_sizes
from fastnn.network_program import Value


@module_row(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _conv_transpose(read: Reader, node: Node, module: Any, x: Any) -> None:
    inputs = {"input": [read.data(x)], "weight": read.own(module, "weight"), "bias": read.own(module, "bias")}
    names = ("stride", "padding", "output_padding", "dilation")
    settings = {name: list(getattr(module, name)) for name in names}
    read.add(node, "conv_transpose", inputs, **settings, groups=module.groups)
    read.note(module, *names, "groups", "padding_mode")


_POOLS: dict[Any, tuple[str, int]] = {
    **{getattr(F, f"avg_pool{d}d"): ("avg", d) for d in (1, 2, 3)},
    **{getattr(F, f"adaptive_avg_pool{d}d"): ("adaptive", d) for d in (1, 2, 3)},
}


@row(*(function for function, (kind, _) in _POOLS.items() if kind == "avg"))
def _avg_pool(
    read: Reader, node: Node, x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: Any = None
) -> None:  # fmt: skip
    dims = _POOLS[node.target][1]
    _add_avg_pool(read, node, x, dims, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


@module_row(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
def _avg_pool_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    _add_avg_pool(read, node, x, _dims_of(module), *(getattr(module, name, None) for name in names))
    read.note(module, *(name for name in names if hasattr(module, name)))


def _dims_of(module: nn.Module) -> int:
    kinds = {d: (getattr(nn, f"AvgPool{d}d"), getattr(nn, f"AdaptiveAvgPool{d}d")) for d in (1, 2, 3)}
    return next(dims for dims, both in kinds.items() if isinstance(module, both))


def _add_avg_pool(
    read: Reader, node: Node, x: Any, dims: int, kernel: Any, stride: Any, padding: Any, ceil_mode: Any,
    counts_padding: Any, divisor: Any
) -> None:  # fmt: skip
    if ceil_mode or divisor is not None:
        raise NotANetworkError("an average pool has ceil_mode or a divisor of its own")
    value = read.data(x)
    if _is_whole_image(read, value, dims, kernel, stride, padding):
        read.add(node, "mean", {"input": [value]}, dims=list(range(-dims, 0)), keepdim=True, rank=dims + 2)
        return
    size = each_dimension(kernel, dims)
    steps = size if stride in (None, (), []) else each_dimension(stride, dims)
    read.add(
        node, "avg_pool", {"input": [value]}, kernel=size, stride=steps, padding=each_dimension(padding, dims),
        count_include_pad=bool(counts_padding),
    )  # fmt: skip


_MAX_POOLS = {getattr(F, f"max_pool{d}d"): d for d in (1, 2, 3)}


@row(*_MAX_POOLS)
def _max_pool_of_computed_size(
    read: Reader, node: Node, x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False
) -> None:  # fmt: skip
    """A max-pool whose settings the matcher does not read, because they are no numbers."""
    dims = _MAX_POOLS[node.target]
    value = read.data(x)
    if return_indices or dilation != 1 or not _is_whole_image(read, value, dims, kernel_size, stride, padding):
        raise NotANetworkError("a max-pool's settings depend on the input's sizes")
    read.values[node] = _largest(read, value, dims)


def _is_whole_image(read: Reader, value: Value, dims: int, kernel: Any, stride: Any, padding: Any) -> bool:
    """Whether a pool has one window, of the image's own sizes: `F.max_pool2d(x, x.shape[2:])`. That is so for images in
    a batch; without a batch, `x.shape[2:]` means other windows, and the network must refuse them."""
    if stride not in (None, (), []) or padding not in (0, (0,) * dims, [0] * dims):
        return False
    if isinstance(kernel, Node) and kernel in read.tails:
        return read.tails[kernel] in ((value, 2), (value, -dims))
    sizes = kernel if isinstance(kernel, (tuple, list)) else [kernel]
    known = [read.sizes.get(size) if isinstance(size, Node) else None for size in sizes]
    return any(known == [Size(((value, first + dim),)) for dim in range(dims)] for first in (2, -dims))


@row(*(function for function, (kind, _) in _POOLS.items() if kind == "adaptive"))
def _adaptive(read: Reader, node: Node, x: Any, output_size: Any) -> None:
    _add_adaptive(read, node, x, _POOLS[node.target][1], output_size)


@module_row(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
def _adaptive_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    _add_adaptive(read, node, x, _dims_of(module), module.output_size)
    read.note(module, "output_size")


def _add_adaptive(read: Reader, node: Node, x: Any, dims: int, sizes: Any) -> None:
    numbers = each_dimension(sizes, dims)
    if any(one < 1 for one in numbers):
        raise NotANetworkError("an adaptive pool has no size")
    read.add(node, "adaptive_avg_pool", {"input": [read.data(x)]}, sizes=numbers)


@row(F.interpolate)
def _interpolate(
    read: Reader, node: Node, x: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
    align_corners: Any = None, recompute_scale_factor: Any = None, antialias: bool = False
) -> None:  # fmt: skip
    if recompute_scale_factor or antialias:
        raise NotANetworkError("an interpolation recomputes its factors, or smooths")
    _add_upsample(read, node, x, size, scale_factor, mode, align_corners)


@module_row(nn.Upsample)
def _upsample_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    if module.recompute_scale_factor:
        raise NotANetworkError("an interpolation recomputes its factors")
    _add_upsample(read, node, x, module.size, module.scale_factor, module.mode, module.align_corners)
    read.note(module, "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")


def _add_upsample(read: Reader, node: Node, x: Any, size: Any, factor: Any, mode: str, aligns: Any) -> None:
    dims = {"linear": 1, "bilinear": 2}.get(mode)
    if dims is None and mode != "nearest":
        raise NotANetworkError(f"an interpolation's mode is {mode}")
    inputs = {"input": [read.data(x)]}
    if size is not None:
        asked, inputs["like"] = _write_sizes_of_image(read, size, dims)
        if not 1 <= len(asked) <= 2:
            raise NotANetworkError("an interpolation has more than two dimensions")
        attributes = {"sizes": asked}
    else:
        if not isinstance(factor, (tuple, list)):
            factor = [factor] * (dims or 1)  # of the nearest pixels, one factor stands for all dimensions
        if not all(float(one).is_integer() for one in factor):
            raise NotANetworkError("an interpolation's factors are no whole numbers")
        if len(factor) > 2:
            raise NotANetworkError("an interpolation has more than two dimensions")
        attributes = {"factors": [int(one) for one in factor]}
    read.add(node, "upsample", inputs, **attributes, linear=mode != "nearest", align_corners=bool(aligns))


def _write_sizes_of_image(read: Reader, size: Any, dims: int | None) -> tuple[list[Any], list[Value]]:
    """The sizes of an image's dimensions as a program has them -> these, and the values `like`. dims: how many there
    are, if that is known."""
    if isinstance(size, Node) and size in read.tails:
        value, first = read.tails[size]
        count = -first if first < 0 else dims or 2  # (a network refuses where there are not as many)
        return [f"0.{dim}" for dim in range(first, first + count)], [value]
    if type(size) is int:
        if dims is None:
            raise NotANetworkError("one size stands for all dimensions of an image")
        size = (size,) * dims
    return write_sizes(read, size if isinstance(size, (tuple, list)) else (size,))


@row(F.pad)
def _pad(read: Reader, node: Node, x: Any, pad: Any, mode: str = "constant", value: Any = None) -> None:
    _add_pad(read, node, x, pad, mode, value)


@module_row(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
def _pad_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    _add_pad(read, node, x, module.padding, "constant", module.value)
    read.note(module, "padding", "value")


@module_row(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d)
def _reflection_pad(read: Reader, node: Node, module: Any, x: Any) -> None:
    _add_border(read, node, module, x, "reflect")


@module_row(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d)
def _replication_pad(read: Reader, node: Node, module: Any, x: Any) -> None:
    _add_border(read, node, module, x, "replicate")


@module_row(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d)
def _circular_pad(read: Reader, node: Node, module: Any, x: Any) -> None:
    _add_border(read, node, module, x, "circular")


def _add_border(read: Reader, node: Node, module: Any, x: Any, mode: str) -> None:
    _add_pad(read, node, x, module.padding, mode, None)
    read.note(module, "padding")


def _add_pad(read: Reader, node: Node, x: Any, pad: Any, mode: str, value: Any) -> None:
    if not all(type(one) is int and one >= 0 for one in pad):
        raise NotANetworkError("a padding takes elements away, or depends on sizes")
    if mode == "constant":
        read.add(node, "pad", {"input": [read.data(x)]}, padding=list(pad), value=float(value or 0.0))
    elif value:
        raise NotANetworkError(f"a padding of {mode} has a value")
    else:
        read.add(node, "border", {"input": [read.data(x)]}, padding=list(pad), mode=mode)


_LARGEST = {getattr(F, f"adaptive_max_pool{d}d"): d for d in (1, 2, 3)}


@row(*_LARGEST)
def _adaptive_max(read: Reader, node: Node, x: Any, output_size: Any, return_indices: bool = False) -> None:
    _add_adaptive_max(read, node, x, _LARGEST[node.target], output_size, return_indices)


@module_row(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
def _adaptive_max_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    dims = next(d for d in (1, 2, 3) if isinstance(module, getattr(nn, f"AdaptiveMaxPool{d}d")))
    _add_adaptive_max(read, node, x, dims, module.output_size, module.return_indices)
    read.note(module, "output_size", "return_indices")


def _add_adaptive_max(read: Reader, node: Node, x: Any, dims: int, sizes: Any, indices: bool) -> None:
    if indices or any(one != 1 for one in each_dimension(sizes, dims)):
        raise NotANetworkError("an adaptive max-pool gives more than one element a channel, or places")
    read.values[node] = _largest(read, read.data(x), dims)


def _largest(read: Reader, value: Value, dims: int) -> Value:
    """The largest element of each channel of images in a batch. Of equal ones the first gets the gradient, as in a
    pool."""
    if dims > 1:
        value = read.add(None, "flatten", {"input": [value]}, start_dim=-dims)
    value = read.add(None, "amax", {"input": [value]}, dims=[-1], keepdim=True, ties="first", rank=3)
    for _ in range(dims - 1):
        value = read.add(None, "unsqueeze", {"input": [value]}, dim=-1)
    return value


@row(F.local_response_norm)
def _local_response_norm(
    read: Reader, node: Node, x: Any, size: Any, alpha: Any = 1e-4, beta: Any = 0.75, k: Any = 1.0
) -> None:
    """Each element is divided by a power of the mean square of its neighbours in other channels."""
    if type(size) is not int or size < 1 or not all(type(one) in (int, float) for one in (alpha, beta, k)):
        raise NotANetworkError("a local response norm has settings that no network knows")
    if not (alpha >= 0 and k > 0 and beta > 0):  # the power is taken by a logarithm
        raise NotANetworkError("a local response norm divides by what may be negative")
    value = read.data(x)
    squares = read.add(None, "binary", {"input": [value], "other": [value]}, function="mul")
    pixels = read.add(None, "flatten", {"input": [squares]}, start_dim=2)
    planes = read.add(None, "unsqueeze", {"input": [pixels]}, dim=1)
    padded = read.add(None, "pad", {"input": [planes]}, padding=[0, 0, size // 2, (size - 1) // 2], value=0.0)
    means = read.add(None, "avg_pool", {"input": [padded]}, kernel=[size, 1], stride=[1, 1])
    pixels = read.add(None, "squeeze", {"input": [means]}, dim=1)
    means = read.add(None, "reshape", {"input": [pixels], "like": [value]}, sizes=[])
    means = read.add(None, "binary", {"input": [means]}, function="mul", number=float(alpha))
    means = read.add(None, "binary", {"input": [means]}, function="add", number=float(k))
    power = read.add(None, "unary", {"input": [means]}, function="log")
    power = read.add(None, "binary", {"input": [power]}, function="mul", number=float(beta))
    power = read.add(None, "activation", {"input": [power]}, activation="exp")
    read.add(node, "binary", {"input": [value], "other": [power]}, function="div")


@module_row(nn.LocalResponseNorm)
def _local_response_norm_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    _local_response_norm(read, node, x, module.size, module.alpha, module.beta, module.k)
    read.note(module, "size", "alpha", "beta", "k")


@row(F.pixel_shuffle, torch.pixel_shuffle)
def _pixel_shuffle(read: Reader, node: Node, x: Any, upscale_factor: int) -> None:
    r = upscale_factor
    apart = ["0.0", f"0.1/{r * r}", r, r, "0.2", "0.3"]
    _move_pixels(read, node, x, apart, [0, 1, 4, 2, 5, 3], ["0.0", f"0.1/{r * r}", f"{r}*0.2", f"{r}*0.3"])


@row(F.pixel_unshuffle, torch.pixel_unshuffle)
def _pixel_unshuffle(read: Reader, node: Node, x: Any, downscale_factor: int) -> None:
    r = downscale_factor
    apart = ["0.0", "0.1", f"0.2/{r}", r, f"0.3/{r}", r]
    _move_pixels(read, node, x, apart, [0, 1, 3, 5, 2, 4], ["0.0", f"{r * r}*0.1", f"0.2/{r}", f"0.3/{r}"])


@module_row(nn.PixelShuffle)
def _pixel_shuffle_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    _pixel_shuffle(read, node, x, module.upscale_factor)
    read.note(module, "upscale_factor")


@module_row(nn.PixelUnshuffle)
def _pixel_unshuffle_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    _pixel_unshuffle(read, node, x, module.downscale_factor)
    read.note(module, "downscale_factor")


def _move_pixels(read: Reader, node: Node, x: Any, apart: list[Any], dims: list[int], joined: list[str]) -> None:
    """Takes dimensions of images apart, permutes them and joins them."""
    value = read.data(x)
    parts = read.add(None, "reshape", {"input": [value], "like": [value]}, sizes=apart)
    moved = read.add(None, "permute", {"input": [parts]}, dims=dims)
    read.add(node, "reshape", {"input": [moved], "like": [value]}, sizes=joined)
