"""The arguments of ``fastnn::conv_relu_max_pool`` on a GPU, checked, as (depth, height, width) of a 3-d problem."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastnn._torch import suggest_memory_format
from fastnn.kernels._check import Expected, check, check_first, check_same_kind
from fastnn.reference.conv_relu_max_pool import Geometry

LARGEST = 2**31 - 2**10  # kernels number pixels, a last tile's too, and the elements of an image with 32 bits

Triple = tuple[int, int, int]


class Problem(NamedTuple):
    kind: Expected
    dims: int
    images: int
    groups: int
    channels: int  # of one group
    out_channels: int  # of one group
    geometry: tuple[Triple, ...]  # as the kernels' GEOMETRY
    in_size: Triple
    conv_size: Triple
    out_size: Triple
    in_last: bool  # whether the input's channels are last in memory

    @property
    def taps(self) -> int:
        return math.prod(self.geometry[0])

    @property
    def depth(self) -> int:
        """Products that one value of the convolution sums up."""
        return self.channels * self.taps

    @property
    def places(self) -> int:
        """Elements of a pool window."""
        return math.prod(self.geometry[4])

    @property
    def recomputed(self) -> float:
        """How often a pixel of the convolution is computed: windows overlap, or leave some out."""
        return self.places * math.prod(self.out_size) / math.prod(self.conv_size)

    @property
    def pooled_pixels(self) -> int:
        """Of all images."""
        return self.images * math.prod(self.out_size)

    @property
    def values(self) -> int:
        """Of the convolution's output."""
        return self.images * self.groups * self.out_channels * math.prod(self.conv_size)

    @property
    def work(self) -> float:
        """Floating-point operations of the convolution."""
        return 2.0 * self.values * self.depth

    def sizes(self, of: Triple) -> list[int]:
        """A tensor's sizes, with all out channels."""
        return [self.images, self.groups * self.out_channels, *of[3 - self.dims :]]


def _check_values(op: str, arguments: Geometry) -> None:
    check(min(arguments.padding) >= 0, "negative padding is not supported")
    check(min(arguments.stride) > 0, "non-positive stride is not supported")
    check(min(arguments.dilation) > 0, "non-positive dilation is not supported")
    check(arguments.groups > 0, "non-positive groups is not supported")
    for name in ("kernel_size", "stride", "dilation"):
        values = list(getattr(arguments, f"pool_{name}"))
        check(min(values) > 0, f"pool_{name} should be greater than zero, but got ", values)
    for padding, kernel in zip(arguments.pool_padding, arguments.pool_kernel_size, strict=True):
        check(0 <= padding <= kernel // 2, "pad should be non-negative and at most half of kernel size, but got pad=",
              padding, " and kernel_size=", kernel)  # fmt: skip
    for given in arguments:
        for value in given if isinstance(given, Sequence) else (given,):
            check(value < LARGEST, op, ": ", value, " is too large, expected less than 2**31")


def _check_tensors(kind: Expected, input: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    check_same_kind(kind, weight, "weight")
    sizes, channels = list(weight.shape), input.shape[1]
    check(weight.dim() == input.dim(), "Expected ", weight.dim(), "-dimensional input for ", weight.dim(),
          "-dimensional weight ", sizes, ", but got ", input.dim(), "-dimensional input of size ", list(input.shape),
          " instead")  # fmt: skip
    given = f"Given groups={groups}, weight of size {sizes}, expected "
    check(sizes[0] >= groups and sizes[0] % groups == 0, given, "weight to be divisible by ", groups, " at dimension 0")
    check(channels == sizes[1] * groups, given, "input", list(input.shape), " to have ", sizes[1] * groups,
          " channels, but got ", channels, " channels instead")  # fmt: skip
    check(min(input.shape[1:]) > 0, "Only zero batch or zero channel inputs are supported, but got input shape: ",
          list(input.shape))  # fmt: skip
    check(min(sizes[2:]) > 0, "expected a kernel of at least one element, but got weight of size ", sizes)
    if bias is not None:
        check_same_kind(kind, bias, "bias")
        check(tuple(bias.shape) == (sizes[0],), given, "bias to be 1-dimensional with ", sizes[0],
              " elements, but got bias of size ", list(bias.shape), " instead")  # fmt: skip


def _pooled_size(conv: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    room = conv + 2 * padding - dilation * (kernel - 1) - 1 + (stride - 1 if ceil_mode else 0)
    size = room // stride + 1
    # With ceil_mode the last window must still begin inside the input or its left padding.
    return size - 1 if ceil_mode and (size - 1) * stride >= conv + padding else size


def _triple(values: Sequence[int], filler: int) -> Triple:
    first, second, third = (*[filler] * (3 - len(values)), *values)
    return first, second, third


def check_problem(op: str, input: Tensor, weight: Tensor, bias: Tensor | None, arguments: Geometry) -> Problem:
    kind = check_first(op, input, "input")
    dims = input.dim() - 2
    check(1 <= dims <= 3, op, ": expected input to be 3D, 4D or 5D (batch, channels, 1 to 3 dimensions), got ",
          input.dim(), "D tensor instead")  # fmt: skip
    _check_values(op, arguments)
    _check_tensors(kind, input, weight, bias, arguments.groups)
    kernel, stride, dilation = (
        _triple(weight.shape[2:], 1),
        _triple(arguments.stride, 1),
        _triple(arguments.dilation, 1),
    )
    padding, in_size = _triple(arguments.padding, 0), _triple(input.shape[2:], 1)
    pool = (
        _triple(arguments.pool_kernel_size, 1),
        _triple(arguments.pool_stride, 1),
        _triple(arguments.pool_padding, 0),
        _triple(arguments.pool_dilation, 1),
    )
    padded = [size + 2 * pad for size, pad in zip(in_size, padding, strict=True)]
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    check(all(e <= p for e, p in zip(extents, padded, strict=True)), "Calculated padded input size per channel: ",
          padded[3 - dims :], ". Kernel size: ", extents[3 - dims :],
          ". Kernel size can't be greater than actual input size")  # fmt: skip
    conv_size = _triple([(p - e) // s + 1 for p, e, s in zip(padded, extents, stride, strict=True)], 1)
    out_size = _triple([_pooled_size(*sizes, arguments.ceil_mode) for sizes in zip(conv_size, *pool, strict=True)], 1)
    check(min(out_size) > 0, "Given input size: ", list(conv_size[3 - dims :]), ". Calculated output size: ",
          list(out_size[3 - dims :]), ". Output size is too small")  # fmt: skip
    groups, images = arguments.groups, input.shape[0]
    for channels, size in ((weight.shape[1], in_size), (weight.shape[0], conv_size)):
        check(max(groups * channels, images) * math.prod(size) < LARGEST, op, ": input too large, expected less than "
              "2**31 elements an image and 2**31 pixels")  # fmt: skip
    geometry = (kernel, stride, padding, dilation, *pool)
    return Problem(
        kind, dims, images, groups, weight.shape[1], weight.shape[0] // groups, geometry, in_size, conv_size, out_size,
        as_image(input).is_contiguous(memory_format=channels_last(dims)),
    )  # fmt: skip


def memory_format(*tensors: Tensor) -> torch.memory_format:
    """Channels last if one of the tensors is, as stock's convolution gives it."""
    for tensor in tensors:
        if tensor.dim() > 3:
            suggested = suggest_memory_format(tensor)
            if suggested is not torch.contiguous_format:
                return suggested
    return torch.contiguous_format


def channels_last(dims: int) -> torch.memory_format:
    return torch.channels_last_3d if dims == 3 else torch.channels_last


def as_image(tensor: Tensor) -> Tensor:
    """A 1-d tensor as images of height 1: 1-d tensors have no format with the channels last."""
    return tensor.unsqueeze(2) if tensor.dim() == 3 else tensor


def divisors(size: Triple) -> tuple[int, ...]:
    """(multiplier, shift) of each of the sizes, by which kernels divide without a division: for 0 <= n < 2**31 and a
    size above 1, n // size is the upper half of the 64-bit product n * multiplier, shifted to the right. The
    multiplier, 32 bits without a sign, as an int32."""
    result = []
    for each in size:
        bits = (each - 1).bit_length()
        result += [triton.cdiv(2 ** (31 + bits), each) - 2**32, max(bits - 1, 0)]
    return tuple(result)
