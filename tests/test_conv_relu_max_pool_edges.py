"""Conv pixels at the edges, which not all taps meet: dot products of the taps that do, depthwise rows with their
padding in a copy, and the few pixels of a tile, whose sums are split."""

from typing import Any

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

# Few outputs of many channels: size with batch and channels, outputs, kernel, stride, padding, dilation.
FEW_OUTPUTS = (
    ((2, 48, 9, 10), 1, (3, 3), 1, 1, 1),
    ((2, 33, 9, 8), 2, (3, 3), 1, 1, 2),
    ((1, 40, 12, 11), 3, (5, 5), 3, 2, 1),
    ((3, 16, 7, 7), 5, (7, 7), 1, 3, 1),
    ((2, 31, 8, 9), 7, (2, 4), 2, (1, 2), 1),
    ((2, 32, 5, 6, 7), 3, (3, 3, 3), 1, 1, 1),
    ((1, 24, 6, 7, 5), 4, (3, 2, 3), 2, (1, 1, 1), 1),
    ((2, 64, 30), 2, (5,), 2, 2, 2),
)


# Large kernels on small images: size, kernel, padding, stride.
SHORT_ROWS = (
    ((7, 7), (7, 7), (3, 3), 1),
    ((5, 6), (5, 3), (4, 1), 1),
    ((8, 8), (11, 11), (5, 5), 2),
    ((6, 4), (5, 5), (2, 2), 1),
    ((3, 5, 6), (3, 3, 3), (1, 1, 1), 1),
)


# Kernels some of whose rows or slices meet nothing but padding, or all of them: size, kernel, padding, stride and
# dilation. Rows of more conv pixels than are made together, and of fewer.
OUTER_ROWS = (
    ((12, 12), (3, 3), (1, 1), 1, 1),
    ((6, 11), (5, 3), (4, 0), 1, 1),
    ((9, 9), (11, 11), (5, 5), 1, 1),
    ((13, 13), (7, 7), (3, 3), 2, 1),
    ((8, 20), (5, 2), (5, 1), 1, 2),
    ((2, 10), (3, 3), (5, 1), 1, 1),
    ((7, 5), (3, 3), (1, 1), 1, 1),
    ((4, 6), (5, 1), (4, 0), 3, 1),
    ((5, 4, 9), (3, 3, 3), (1, 1, 1), 1, 1),
    ((4, 6, 8), (2, 3, 1), (1, 2, 0), 1, 1),
    ((3, 5, 5), (3, 2, 2), (2, 1, 1), 1, 2),
    ((2, 3, 10), (3, 1, 3), (3, 0, 1), 1, 1),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "outputs", "kernel", "stride", "padding", "dilation"), FEW_OUTPUTS)
def test_few_outputs(
    instruction_set: str,
    dtype: torch.dtype,
    size: tuple[int, ...],
    outputs: int,
    kernel: tuple[int, ...],
    stride: int,
    padding: int | tuple[int, ...],
    dilation: int,
) -> None:
    for groups in (1, 2):
        grouped = (size[0], size[1] * groups, *size[2:])
        tensors = make(grouped, outputs * groups, kernel, groups, dtype, last=True)
        for pool in (1, 2):
            assert_like_stock(tensors, geometry(len(kernel), stride, padding, dilation, groups, pool=pool))


@pytest.mark.parametrize("special", [0.0, -0.0, float("nan"), float("inf"), 1e-42])
def test_special_values_of_few_outputs(instruction_set: str, special: float) -> None:
    for outputs in (1, 3):
        tensors = make((2, 64, 9, 9), outputs, (3, 3), last=True)
        assert_right_with(special, 3, tensors, geometry(2, padding=1, pool=2))


def test_pixels_in_the_padding_alone(instruction_set: str) -> None:
    """Their sums have no products."""
    for dtype in DTYPES:
        tensors = make((2, 48, 5, 5), 2, (2, 2), 1, dtype, last=True)
        assert_like_stock(tensors, geometry(2, 3, 4, pool=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("channels", [2, 7, 16, 17, 40, 65])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (5, 1, 2), (7, 2, 1), (11, 1, 1), (8, 3, 1)])
def test_depthwise(
    instruction_set: str, dtype: torch.dtype, last: bool, channels: int, kernel: int, stride: int, dilation: int
) -> None:
    for height, width in ((13, 24), (22, 12)):
        tensors = make((2, channels, height, width), channels, (kernel, kernel), channels, dtype, last=last)
        assert_like_stock(
            tensors, geometry(2, stride, dilation * (kernel - 1) // 2, dilation, channels, pool=2), gradients=False
        )


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("columns", [*range(1, 20), 31, 33])
def test_depthwise_of_every_length(instruction_set: str, columns: int, last: bool) -> None:
    """Tiles of every number of pixels, of which few have their sums split, in one and in two vectors."""
    for channels in (12, 29, 64):
        for kernel, padding in ((5, 0), (11, 5)):
            size = (2, channels, kernel + 2, columns + (kernel - 1 if padding == 0 else 0))
            tensors = make(size, channels, (kernel, kernel), channels, last=last)
            assert_like_stock(tensors, geometry(2, padding=padding, groups=channels, pool=1), gradients=False)


@pytest.mark.parametrize("special", [0.0, -0.0, float("nan"), float("inf"), 1e-42])
def test_special_values_of_depthwise(instruction_set: str, special: float) -> None:
    for last in (False, True):
        tensors = make((2, 40, 15, 15), 40, (11, 11), 40, last=last)
        assert_right_with(special, 3, tensors, geometry(2, padding=5, groups=40, pool=2))


def test_same_bits_by_any_number_of_threads(instruction_set: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_same_bits(make((3, 64, 9, 9), 2, (3, 3), 1, dtype, last=True), geometry(2, padding=1, pool=2))
        assert_same_bits(
            make((2, 80, 18, 18), 80, (11, 11), 80, dtype, last=True),
            geometry(2, padding=5, groups=80, pool=3, pool_stride=1),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize(("size", "kernel", "padding", "stride"), SHORT_ROWS)
def test_short_rows_two_together(
    instruction_set: str,
    dtype: torch.dtype,
    last: bool,
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    padding: tuple[int, ...],
    stride: int,
) -> None:
    """An odd number of rows, rows that share no taps, windows that overlap, outputs of one vector and of two."""
    for outputs, pool, pool_stride in ((16, 1, 1), (40, 2, 1), (33, 3, 2)):
        tensors = make((2, 24, *size), outputs, kernel, dtype=dtype, last=last)
        assert_like_stock(tensors, geometry(len(size), stride, padding, pool=pool, pool_stride=pool_stride))


def test_same_bits_of_short_rows_by_any_number_of_threads(instruction_set: str) -> None:
    for dtype in DTYPES:
        for size, kernel, padding, stride in SHORT_ROWS:
            tensors = make((1, 24, *size), 40, kernel, dtype=dtype, last=True)
            assert_same_bits(tensors, geometry(len(size), stride, padding, pool=2, pool_stride=1))


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", OUTER_ROWS)
def test_kernel_rows_outside(instruction_set: str, dtype: torch.dtype, last: bool, layer: tuple[Any, ...]) -> None:
    """Of odd channels and even, outputs of a part of a vector and of more than a block, each way of pooling."""
    size, kernel, padding, stride, dilation = layer
    for channels, outputs, pool, pool_stride in ((3, 16, 2, 2), (20, 40, 2, 2), (9, 5, 1, 1), (16, 33, 2, 1)):
        tensors = make((2, channels, *size), outputs, kernel, dtype=dtype, last=last)
        assert_like_stock(tensors, geometry(len(size), stride, padding, dilation, pool=pool, pool_stride=pool_stride))


def test_same_bits_without_kernel_rows_by_any_number_of_threads(instruction_set: str) -> None:
    for dtype in DTYPES:
        for size, kernel, padding, stride, dilation in OUTER_ROWS:
            tensors = make((1, 20, *size), 40, kernel, dtype=dtype, last=True)
            assert_same_bits(tensors, geometry(len(size), stride, padding, dilation, pool=2, pool_stride=1))


@pytest.mark.parametrize("special", [0.0, -0.0, float("nan"), float("inf"), 1e-42])
def test_special_values_beside_kernel_rows_outside(instruction_set: str, special: float) -> None:
    for size, kernel, padding, stride, dilation in OUTER_ROWS[:8]:
        for pool, pool_stride in ((2, 2), (2, 1)):
            tensors = make((2, 8, *size), 24, kernel)
            arguments = geometry(2, stride, padding, dilation, pool=pool, pool_stride=pool_stride)
            assert_right_with(special, 3, tensors, arguments)


def test_chosen() -> None:
    few = make((4, 256, 20, 20), 1, (3, 3), last=True)
    assert algorithm("avx512", few, geometry(2, padding=1, pool=2)) in ("dots", "")
    depthwise = make((4, 64, 28, 28), 64, (11, 11), 64, last=True)
    assert algorithm("avx512", depthwise, geometry(2, padding=5, groups=64, pool=2)) in ("depthwise", "")
