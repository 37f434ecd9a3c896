"""Contiguous images: columns apart, channels brought together band by band, rows asked for ahead, and rows that windows
do not fill."""

import pytest
import torch
from conv_cases import (
    algorithm,
    assert_like_stock,
    assert_right_with,
    assert_same_bits,
    geometry,
    make,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [2, 3, 4, 5])
@pytest.mark.parametrize("channels", [1, 2, 3, 31, 33])
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 15, 16, 17, 31, 33])
def test_columns_apart(instruction_set: str, dtype: torch.dtype, stride: int, channels: int, columns: int) -> None:
    """A kernel of one tap that strides: columns are picked from rows, whole vectors of them and parts."""
    tensors = make((2, channels, 2 * stride, columns * stride + 1), 5, (1, 1), dtype=dtype)
    assert_like_stock(tensors, geometry(2, stride, pool=1), gradients=False)


@pytest.mark.parametrize("channels", [2, 33, 64, 512])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        ((14, 15), (3, 3), 3, 0),
        ((20, 9), (2, 2), 2, 1),
        ((9, 33), (1, 1), 1, 0),
        ((17, 18), (3, 3), 1, 1),
        ((5, 6, 7), (2, 2, 2), 2, 0),
    ],
)
def test_channels_brought_together(
    instruction_set: str, channels: int, size: tuple[int, ...], kernel: tuple[int, ...], stride: int, padding: int
) -> None:
    """In pairs, where a pixel's channels may crowd the cache's sets or not, of windows that share rows or not."""
    for groups in (1, 2):
        for pool, pool_stride in ((1, 1), (2, 1), (2, 2)):
            tensors = make((2, channels * groups, *size), 20 * groups, kernel, groups, torch.bfloat16)
            arguments = geometry(len(size), stride, padding, groups=groups, pool=pool, pool_stride=pool_stride)
            assert_like_stock(tensors, arguments, gradients=False)


# More than 6 MB in either type: rows in place and copied, short ones, of three slices, in parts, of groups, and under
# more blocks of outputs than a cache holds the weight of.
ASKED_FOR = [
    ((14, 256, 30, 31), 40, (2, 2), 3, 1),
    ((40, 512, 13, 13), 24, (3, 3), 2, 1),
    ((5, 512, 11, 12, 10), 33, (3, 3, 3), 3, 1),
    ((3, 512, 17, 18, 9), 20, (1, 1, 1), 1, 1),
    ((5, 24, 30000), 20, (5,), 1, 1),
    ((12, 256, 34, 35), 36, (3, 3), 2, 4),
    ((6, 384, 28, 60), 350, (3, 3), 2, 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(("size", "outputs", "kernel", "stride", "groups"), ASKED_FOR)
def test_what_is_next_is_asked_for(
    instruction_set: str,
    size: tuple[int, ...],
    outputs: int,
    kernel: tuple[int, ...],
    stride: int,
    groups: int,
    padding: int,
    dtype: torch.dtype,
) -> None:
    """Images that a cache does not hold, up to the last rows and slices, beyond which there is nothing to ask for."""
    tensors = make(size, outputs, kernel, groups, dtype)
    for pool, pool_stride in ((2, 2), (3, 2)):
        arguments = geometry(len(kernel), stride, padding, groups=groups, pool=pool, pool_stride=pool_stride)
        assert_like_stock(tensors, arguments, gradients=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "outputs", "kernel", "stride", "padding", "groups"),
    [
        ((17, 64, 80, 81), 20, 1, 1, 0, 1),
        ((17, 72, 80, 81), 40, 1, 1, 0, 2),
        ((17, 64, 80, 81), 33, 2, 2, 0, 1),
        ((17, 50, 82, 100), 10, 3, 3, 1, 1),
    ],
)
def test_pixels_are_asked_for(
    instruction_set: str,
    size: tuple[int, ...],
    outputs: int,
    kernel: int,
    stride: int,
    padding: int,
    groups: int,
    dtype: torch.dtype,
) -> None:
    """Channels last, more than 12 MB in either type, few products with each number."""
    tensors = make(size, outputs, (kernel, kernel), groups, dtype, last=True)
    for pool, pool_stride in ((2, 2), (3, 1)):
        arguments = geometry(2, stride, padding, groups=groups, pool=pool, pool_stride=pool_stride)
        assert_like_stock(tensors, arguments, gradients=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs", [1, 3, 13])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("columns", [*range(3, 20), 31, 33, 34, 65])
def test_rows_that_windows_do_not_fill(
    instruction_set: str, dtype: torch.dtype, outputs: int, kernel: int, columns: int
) -> None:
    """Columns behind the last window lie between the rows."""
    for pool, pool_stride in ((2, 2), (3, 2), (3, 4)):
        tensors = make((2, 9, kernel + 6, columns + kernel - 1), outputs, (kernel, kernel), dtype=dtype)
        assert_like_stock(tensors, geometry(2, pool=pool, pool_stride=pool_stride), gradients=False)


@pytest.mark.parametrize("special", [0.0, -0.0, float("nan"), float("inf"), 1e-42])
def test_special_values(instruction_set: str, special: float) -> None:
    """Also in the columns behind the last window, which no output may see."""
    for kernel, stride, pool in ((1, 1, 2), (3, 1, 2), (1, 3, 2)):
        tensors = make((2, 40, 17, 17), 3, (kernel, kernel))
        for column in (3, 16):
            assert_right_with(special, column, tensors, geometry(2, stride, pool=pool))


def test_same_bits_by_any_number_of_threads(instruction_set: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_same_bits(make((3, 64, 17, 17), 3, (1, 1), 1, dtype), geometry(2, pool=2))
        assert_same_bits(make((2, 512, 28, 28), 64, (2, 2), 1, dtype), geometry(2, 3, pool=3, pool_stride=2))
        assert_same_bits(make((9, 512, 28, 28), 64, (2, 2), 1, dtype), geometry(2, 3, pool=3, pool_stride=2))


def test_chosen() -> None:
    """A last column without a window does not cost rows their place."""
    for columns in (32, 33):
        tensors = make((1, 256, columns, columns), 4, (1, 1))
        assert algorithm("avx512", tensors, geometry(2, pool=2)) in ("rows", "")
