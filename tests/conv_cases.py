"""What the tests of conv_relu_max_pool share: tensors, arguments, comparison with plain PyTorch."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastnn.nn
from fastnn import functional
from fastnn.reference import conv_relu_max_pool as reference
from fastnn.testing import compare_with_stock, instruction_sets, using_instruction_set, using_threads

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


def assert_like_float64(tensors: list[Tensor | None], arguments: tuple[Any, ...]) -> None:
    """For bfloat16 with a NaN or infinity, which some of stock's ways carry into windows beside."""
    fused = FUSED[tensors[0].dim() - 2]
    ours = fused(*tensors, *arguments)
    exact = fused(*(None if tensor is None else tensor.double() for tensor in tensors), *arguments)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-2, atol=2e-2, equal_nan=True)


def bits(tensor: Tensor) -> Tensor:
    """Equal where the tensor's are, all NaNs alike."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return torch.where(tensor.isnan(), torch.nan, tensor).view(integer)


def assert_same_bits(tensors: list[Tensor | None], arguments: tuple[Any, ...]) -> None:
    """Forward, by any number of threads."""
    fused = FUSED[tensors[0].dim() - 2]
    with using_threads(1):
        expected = fused(*tensors, *arguments)
    for threads in (2, 3, 7):
        with using_threads(threads):
            assert torch.equal(bits(fused(*tensors, *arguments)), bits(expected))


def algorithm(instruction_set: str, tensors: list[Tensor | None], arguments: tuple[Any, ...]) -> str:
    """What such a call takes; nothing where the machine lacks the instruction set."""
    if instruction_set not in instruction_sets():
        return ""
    with using_instruction_set(instruction_set):
        return RAW_ALGORITHM(*tensors, flat(arguments))[0]


def assert_right_with(special: float, column: int, tensors: list[Tensor | None], arguments: tuple[Any, ...]) -> None:
    """Like stock, or with a special value in a column of the last image, like float64."""
    if special == 0:
        return assert_like_stock(tensors, arguments)
    tensors[0][-1:, ..., column] = special
    return assert_like_float64(tensors, arguments)


def assert_winners(tensors: list[Tensor], arguments: tuple[Any, ...]) -> None:
    """Those of float64, but for sums that lie close."""
    output, winners = RAW_WITH_WINNERS(*tensors, flat(arguments))
    exact = RAW_WITH_WINNERS(*(tensor.double() for tensor in tensors), flat(arguments))[1]
    assert torch.equal(output, FUSED[2](*tensors, *arguments))
    assert (winners == exact).double().mean() > 0.999


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
