"""Rows of few conv pixels, which are computed several at a time, and weights too large for the cache, a block of whose
channels serves all images before the next."""

import pytest
import torch
from conv_cases import (
    algorithm,
    assert_like_stock,
    assert_right_with,
    assert_same_bits,
    channels_last,
    geometry,
    make,
)

# Rows of every length up to more than is made together, in two vectors of channels and what is left of a block,
# with windows that overlap, lie apart, or take more rows than a tile.
POOLS = ((1, 1), (2, 2), (3, 2), (3, 1))
LAYERS = (
    ((2, 24, 9), 8, 3, 1),
    ((3, 64, 6), 40, 3, 2),
    ((2, 33, 10), 17, 5, 2),
)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize(
    ("columns", "pool"), [(columns, pool) for columns in range(1, 9) for pool in POOLS if pool[0] <= columns]
)
def test_of_every_length(instruction_set: str, columns: int, pool: tuple[int, int], last: bool) -> None:
    kernel, (size, stride) = 3, pool
    for rows in (size, 7, 11):
        tensors = make((2, 40, rows + kernel - 1, columns + kernel - 1), 50, (kernel, kernel), last=last)
        assert_like_stock(tensors, geometry(2, pool=size, pool_stride=stride))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("size", "out_channels", "kernel", "stride"), LAYERS)
def test_in_every_dtype(
    instruction_set: str, dtype: torch.dtype, size: tuple[int, int, int], out_channels: int, kernel: int, stride: int
) -> None:
    batch, channels, side = size
    for last in (False, True):
        for padding in (0, kernel // 2):
            tensors = make((batch, channels, side, side), out_channels, (kernel, kernel), 1, dtype, last=last)
            assert_like_stock(tensors, geometry(2, stride, padding, pool=3, pool_stride=2, pool_padding=1))


def test_of_slices(instruction_set: str) -> None:
    """Windows that overlap in depth keep the rows of several slices."""
    for pool, stride in ((2, 2), (3, 1), (3, 2)):
        for last in (False, True):
            tensors = make((2, 20, 6, 7, 8), 36, (2, 3, 3), last=last)
            assert_like_stock(tensors, geometry(3, padding=(0, 1, 0), pool=pool, pool_stride=stride))


@pytest.mark.parametrize("special", [0.0, -0.0, float("nan"), float("inf"), 1e-42])
def test_special_values(instruction_set: str, special: float) -> None:
    for pool, stride in ((2, 2), (3, 1)):
        tensors = make((3, 48, 8, 7), 40, (3, 3))
        assert_right_with(special, 3, tensors, geometry(2, pool=pool, pool_stride=stride))


# 1.5 MB of weight in blocks that fit, for images that are read where they lie or copied.
LARGE = ((6, 192, 9, 9), 224, 3)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_large_weights(instruction_set: str, stride: int, last: bool) -> None:
    size, out_channels, kernel = LARGE
    for padding in (0, 1):
        tensors = make(size, out_channels, (kernel, kernel), last=last)
        assert_like_stock(tensors, geometry(2, stride, padding, pool=2), gradients=False)


def test_same_bits_by_any_number_of_threads(instruction_set: str) -> None:
    size, out_channels, kernel = LARGE
    for dtype in (torch.float32, torch.bfloat16):
        for stride, padding in ((1, 0), (2, 1), (3, 1), (3, 0)):
            tensors = make(size, out_channels, (kernel, kernel), 1, dtype)
            for given in (tensors, [channels_last(tensors[0]), channels_last(tensors[1]), tensors[2]]):
                assert_same_bits(given, geometry(2, stride, padding, pool=3, pool_stride=1, pool_padding=1))
    assert_same_bits(make((3, 40, 9, 9), 50, (3, 3)), geometry(2, pool=3, pool_stride=2))


def test_chosen() -> None:
    (_, *image), out_channels, kernel = LARGE
    tensors = make((32, *image), out_channels, (kernel, kernel), last=True)
    assert algorithm("avx512", tensors, geometry(2, 2, pool=2)) in ("direct", "")


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("columns", [2, 3, 6, 7, 8, 15, 16, 29])
@pytest.mark.parametrize(("channels", "stride"), [(256, 2), (512, 1), (512, 2)])
def test_pixels_in_few_sets_of_the_cache(
    instruction_set: str, channels: int, stride: int, columns: int, padding: int
) -> None:
    """2048 or 4096 bytes apart, channels last: fewer of them are computed together."""
    side = (columns - 1) * stride + 2 - 2 * padding
    for outputs in (8, 40):
        tensors = make((1, channels, 4, max(side, 1)), outputs, (2, 2), last=True)
        for pool in ((2, 1), (1, 2)):
            assert_like_stock(tensors, geometry(2, (1, stride), padding, pool=pool), gradients=False)
