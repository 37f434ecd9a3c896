"""What the tests of conv_relu_max_pool share: tensors, arguments, comparison with plain PyTorch."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastnn.nn
from fastnn import functional
from fastnn.reference import conv_relu_max_pool as reference
from fastnn.testing import compare_with_stock

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
FUSED = {
    1: functional.conv_relu_max_pool1d,
    2: functional.conv_relu_max_pool2d,
    3: functional.conv_relu_max_pool3d,
}
MODULES = {
    1: fastnn.nn.ConvReLUMaxPool1d,
    2: fastnn.nn.ConvReLUMaxPool2d,
    3: fastnn.nn.ConvReLUMaxPool3d,
}
RAW = torch.ops.fastnn.conv_relu_max_pool
RAW_WITH_WINNERS = torch.ops.fastnn.conv_relu_max_pool_with_winners
RAW_ALGORITHM = torch.ops.fastnn.conv_relu_max_pool_algorithm
RAW_BACKWARD = torch.ops.fastnn.conv_relu_max_pool_backward


def geometry(
    dims: int,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    pool: Any = 2,
    pool_stride: Any = None,
    pool_padding: Any = 0,
    pool_dilation: Any = 1,
    ceil_mode: bool = False,
) -> tuple[Any, ...]:
    """The public function's arguments after the tensors."""

    def each(value: Any) -> list[int]:
        return [value] * dims if isinstance(value, int) else list(value)

    pool_stride = pool if pool_stride is None else pool_stride
    return (
        *(each(stride), each(padding), each(dilation), groups),
        *(each(pool), each(pool_stride), each(pool_padding), each(pool_dilation), ceil_mode),
    )


def flat(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    """The same as the operators take them."""
    return reference.Geometry(*arguments).flat()


def make(
    input_size: tuple[int, ...],
    out_channels: int,
    kernel: tuple[int, ...],
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    last: bool = False,
) -> list[Tensor | None]:
    """Input, weight and bias; with ``last``, input and weight channels last."""
    channels = input_size[1] // groups
    depth = max(channels * torch.Size(kernel).numel(), 1)
    input = torch.randn(*input_size, dtype=dtype)
    weight = torch.randn(out_channels, channels, *kernel, dtype=dtype) / depth**0.5
    if last:
        input, weight = channels_last(input), channels_last(weight)
    return [input, weight, torch.randn(out_channels, dtype=dtype) / 2 if bias else None]


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def error_of(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> str | None:
    """The first line of the RuntimeError that the call raises."""
    try:
        function(*args, **kwargs)
    except RuntimeError as error:
        return str(error).split("\n")[0]
    return None


def assert_like_stock(tensors: list[Tensor | None], arguments: tuple[Any, ...], gradients: bool = True) -> None:
    fused = FUSED[len(arguments[0])]
    # In bfloat16, stock rounds before it compares: another winner where two round to the same.
    gradients = gradients and tensors[0].dtype is not torch.bfloat16
    compare_with_stock(
        lambda *t: fused(*t, *arguments),
        lambda *t: reference.conv_relu_max_pool(*t, *arguments),
        tensors,
        gradients,
    )


def outputs_and_winners(tensors: list[Tensor | None], arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Those of plain PyTorch, the winners as the operators give them."""
    stride, padding, dilation, groups, kernel, *pool = arguments
    dims = len(stride)
    activated = reference.CONV[dims](*tensors, stride, padding, dilation, groups).relu()
    output, index = reference.POOL[dims](activated, kernel, *pool, return_indices=True)
    place = torch.zeros_like(index)
    for d, size in enumerate(kernel):
        coordinate = index // math.prod(activated.shape[d + 3 :]) % activated.shape[d + 2]
        windows = torch.arange(output.shape[d + 2]).view(-1, *[1] * (dims - 1 - d))
        first = windows * pool[0][d] - pool[1][d]
        place = place * size + (coordinate - first) // pool[2][d]
    return output, torch.where((output > 0) | output.isnan(), place, 255).to(torch.uint8)


def integers(
    size: tuple[int, ...],
    outputs: int,
    kernel: tuple[int, ...],
    groups: int = 1,
    bias: bool = True,
    factor: int = 12,
) -> list[Tensor | None]:
    """Input, weight and bias in float64: integers, the weight's multiples of a factor. With 12 all sums, and those of
    transforms, are exact in float32; so are F(4x4, 3x3)'s with 24 * 24; with 1 those without transforms are in
    bfloat16."""
    most = 1 if factor == 1 else 2
    drawn = make(size, outputs, kernel, groups, torch.float64, bias)
    input, weight, *rest = (None if t is None else torch.randint_like(t, -most, most + 1) for t in drawn)
    return [input, weight * factor, *rest]


def given(tensors: list[Tensor | None], dtype: torch.dtype, last: bool) -> list[Tensor | None]:
    input, weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in tensors)
    return [channels_last(input), channels_last(weight), bias] if last else [input, weight, bias]


OVERLAPPING = {"pool": 3, "pool_stride": 2, "pool_padding": 1}


class Case(NamedTuple):
    size: tuple[int, ...]
    outputs: int
    kernel: tuple[int, ...]
    arguments: tuple[Any, ...]
    bias: bool = True


def case(size: tuple[int, ...], outputs: int, kernel: tuple[int, ...], bias: bool = True, **options: Any) -> Case:
    return Case(size, outputs, kernel, geometry(len(kernel), **options), bias)


CASES = {
    # One dimension.
    "1d": case((3, 5, 41), 17, (5,), padding=2),
    "1d_overlapping": case((2, 4, 70), 33, (4,), stride=3, pool=3, pool_stride=2, pool_padding=1, ceil_mode=True),
    "1d_dilated_groups": case((2, 6, 50), 10, (3,), bias=False, dilation=3, padding=3, groups=2, pool=(4,)),
    "1d_windows_apart": case((2, 3, 60), 4, (3,), pool=2, pool_stride=5, pool_padding=1, pool_dilation=2),
    "1d_bands": case((1, 20, 9001), 9, (5,), padding=2, pool=3, pool_stride=2),
    "1d_one_column": case((4, 9, 1), 20, (1,), pool=1),
    # Two: strides, dilation, groups, nothing square.
    "3x3": case((2, 5, 12, 13), 19, (3, 3), padding=1),
    "not_square": case((2, 3, 11, 23), 20, (2, 5), stride=(2, 1), padding=(1, 3), pool=(3, 2), pool_stride=(1, 3)),
    "dilated": case((2, 4, 17, 19), 10, (3, 2), dilation=(2, 3), padding=(3, 2)),
    "dilated_rows": case((2, 4, 17, 19), 10, (3, 3), dilation=(2, 1), padding=(3, 1)),
    "groups": case((3, 9, 10, 11), 12, (3, 3), groups=3, padding=1),
    "groups_of_many": case((2, 40, 9, 9), 66, (3, 3), groups=2, padding=1, pool=3, pool_stride=1),
    "1x1": case((2, 40, 9, 17), 33, (1, 1)),
    "1x1_strided": case((2, 17, 12, 11), 5, (1, 1), stride=3, pool=2, pool_stride=1),
    "2x2_strided": case((2, 8, 16, 15), 24, (2, 2), stride=2),
    "3x3_strided": case((2, 20, 18, 35), 8, (3, 3), stride=(3, 2), groups=2, padding=1),
    "stride_beyond_kernel": case((2, 6, 16, 20), 7, (2, 2), stride=3, padding=1, pool=2),
    "stride_beyond_input": case((2, 3, 9, 10), 5, (2, 1), stride=(1, 2**24), dilation=(3, 1), padding=(1, 0), pool=1),
    "5x5": case((2, 3, 14, 15), 10, (5, 5), padding=2, bias=False),
    "first_layer": case((1, 3, 45, 47), 40, (7, 7), stride=2, padding=3, **OVERLAPPING),
    "11x11_strided": case((1, 3, 47, 51), 34, (11, 11), stride=4, padding=2, pool=3, pool_stride=2),
    "4_taps_strided": case((2, 5, 13, 24), 18, (3, 4), stride=(1, 2), padding=1),
    "row": case((2, 3, 6, 40), 9, (1, 9), stride=(1, 3), padding=(0, 4)),
    "column": case((2, 3, 40, 6), 9, (9, 1), stride=(3, 1), padding=(4, 0)),
    "long_row": case((1, 3, 4, 60), 5, (1, 32)),
    "longer_row": case((1, 3, 4, 60), 5, (1, 33)),
    "beyond_input": case((2, 4, 8, 8), 20, (11, 11), padding=5, **OVERLAPPING),
    "outside_input": case((2, 5, 5, 5), 6, (2, 2), stride=3, padding=4, pool=1),
    "one_pixel": case((3, 7, 1, 1), 35, (3, 3), padding=1, pool=1),
    # Windows: overlapping, apart, dilated, cut off by ceil_mode, of padding alone, large.
    "overlapping": case((2, 4, 13, 14), 18, (3, 3), padding=1, pool=3, pool_stride=1, pool_padding=1),
    "apart": case((2, 4, 15, 16), 5, (3, 3), pool=2, pool_stride=3, padding=1),
    "dilated_windows": case((2, 4, 17, 18), 7, (3, 3), pool=4, pool_stride=1, pool_padding=(2, 1), pool_dilation=3),
    "ceil_mode": case((2, 4, 14, 15), 6, (3, 3), pool=(3, 2), pool_stride=3, pool_padding=1, ceil_mode=True),
    "padding_alone": case((2, 3, 7, 8), 5, (3, 3), padding=0, pool=2, pool_stride=1, pool_padding=1, pool_dilation=6),
    "in_much_padding": case((2, 3, 6, 7), 4, (3, 3), padding=5, pool=2, pool_stride=5),
    "large_windows": case((1, 3, 33, 30), 4, (3, 3), pool=(15, 16), pool_stride=(7, 9)),
    "no_pool": case((2, 4, 9, 10), 16, (3, 3), pool=1),
    # Depths that are summed in parts (more than 128 products), and of a whole band (more than 256).
    "deep_in_parts": case((2, 16, 9, 16), 20, (3, 3), padding=1),
    "deep_1x1": case((2, 257, 6, 11), 33, (1, 1)),
    "deep_band": case((1, 300, 24, 90), 5, (1, 1), **OVERLAPPING),
    "deep_3x3": case((1, 130, 14, 15), 34, (3, 3), padding=1),
    "deep_strided": case((1, 41, 21, 20), 40, (5, 5), stride=2, padding=2, pool=3, pool_stride=1),
    # Positions of the kernel of which many, or all, lie in padding.
    "deep_atrous": case((2, 70, 9, 7), 36, (3, 3), dilation=(4, 6), padding=(4, 6)),
    "deep_all_padding": case((2, 130, 3, 4), 17, (3, 3), dilation=5, padding=5, pool=1),
    "deep_atrous_strided": case(
        (1, 150, 12, 17), 40, (4, 5), stride=(3, 2), dilation=(2, 3), padding=(5, 7), groups=2, pool=3, pool_stride=2
    ),
    "deep_padded_3d": case((1, 33, 3, 4, 5), 18, (3, 3, 3), padding=2, stride=(1, 2, 1), pool=2, ceil_mode=True),
    "deep_signal": case((3, 90, 11), 35, (5,), dilation=3, padding=8, pool=2),
    "deep_in_runs": case((2, 100, 5, 26), 20, (2, 2), dilation=(1, 2)),  # which parts of the sums cut
    "channels_2048_bytes_apart": case((1, 512, 4, 18), 8, (2, 2)),
    # Several bands of rows and of columns; several blocks of outputs; more images than lanes.
    "bands_of_rows": case((1, 24, 90, 70), 9, (3, 3), padding=1, **OVERLAPPING),
    "bands_of_columns": case((1, 130, 6, 300), 5, (3, 3), padding=1, pool=2, pool_stride=2),
    "bands_of_long_rows": case((1, 48, 7, 500), 5, (3, 5), padding=(1, 2), stride=(1, 2), pool=3, pool_stride=1),
    "many_outputs": case((2, 10, 10, 9), 135, (3, 3), padding=1),
    "many_images": case((35, 3, 6, 7), 10, (3, 3), padding=1, pool=3, pool_stride=2),
    "many_tiny_images": case((37, 20, 4, 4), 18, (3, 3), padding=1),
    # Three.
    "3d": case((2, 4, 6, 7, 8), 18, (3, 3, 3), padding=1),
    "3d_overlapping": case((1, 5, 7, 9, 10), 17, (3, 3, 3), padding=(0, 1, 1), **OVERLAPPING),
    "3d_not_cubic": case((2, 6, 5, 8, 17), 8, (2, 1, 3), stride=(1, 2, 1), groups=2, pool=(1, 2, 2)),
    "3d_dilated": case((1, 3, 9, 10, 12), 5, (2, 3, 2), dilation=(2, 1, 3), padding=1, pool=(2, 3, 1), bias=False),
    "3d_slices_apart": case((1, 3, 11, 9, 9), 6, (1, 3, 3), stride=(2, 1, 1), pool=(2, 2, 2), pool_stride=(3, 2, 1)),
    "3d_1x1": case((2, 33, 5, 6, 5), 7, (1, 1, 1), pool=3, pool_stride=1, pool_padding=1, pool_dilation=(1, 2, 1)),
    "3d_1x1_strided": case((2, 9, 7, 9, 8), 6, (1, 1, 1), stride=(2, 1, 3), pool=(1, 2, 1)),
    # Groups of one channel.
    "depthwise": case((2, 37, 12, 13), 37, (3, 3), padding=1, groups=37),
    "depthwise_strided": case((2, 16, 21, 22), 16, (5, 4), stride=(2, 3), padding=2, groups=16, **OVERLAPPING),
    "depthwise_dilated": case((1, 70, 17, 16), 70, (3, 3), dilation=(1, 2), padding=2, groups=70, pool_stride=1),
    "depthwise_bands": case((1, 33, 120, 60), 33, (3, 3), groups=33, pool=2),
    "depthwise_pixels": case((3, 20, 1, 2), 20, (1, 1), groups=20, pool=1),
    "depthwise_twofold": case((2, 9, 10, 10), 18, (3, 3), groups=9),
    "depthwise_3d": case((2, 18, 5, 6, 7), 18, (2, 3, 3), padding=1, groups=18, pool=(2, 3, 2), pool_stride=1),
    # 3x3 of many channels.
    "winograd": case((2, 64, 21, 26), 40, (3, 3), padding=1),
    "winograd_groups": case((2, 66, 9, 11), 34, (3, 3), padding=2, groups=2, pool=3, pool_stride=1, pool_padding=1),
    "winograd_bands": case((1, 40, 66, 130), 17, (3, 3), padding=1),
}  # fmt: skip
