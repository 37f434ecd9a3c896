"""Rows with two input channels a multiplication (bfloat16), and what all rows in place go by: several slices at once,
steps of the kernel that its stride and dilation have in common."""

from typing import Any

import pytest
import torch
from conv_cases import (
    FUSED,
    algorithm,
    assert_like_stock,
    assert_right_with,
    assert_same_bits,
    assert_winners,
    geometry,
    make,
)

OVERLAPPING = {"pool": 3, "pool_stride": 1, "pool_padding": 1}
# Read where they lie: one tap, columns picked by twos and threes; more outputs than a tile has.
IN_PLACE = (
    ((2, 40, 17, 33), 5, (1, 1), geometry(2)),
    ((2, 130, 9, 16), 12, (1, 1), geometry(2, **OVERLAPPING)),
    ((2, 64, 8, 8, 8), 31, (1, 1, 1), geometry(3)),
    ((2, 96, 20, 45), 8, (3, 3), geometry(2, 2, **OVERLAPPING)),
    ((2, 48, 40, 52), 7, (3, 3), geometry(2, 3, pool=2)),
    ((2, 24, 9, 13, 35), 4, (2, 2, 2), geometry(3, 2, pool=3, pool_stride=2, pool_padding=1)),
    ((3, 64, 300), 6, (1,), geometry(1, pool=4)),
)
# From a tile: padding, odd channels, groups, phases of the stride that have taps and that have none.
COPIED = (
    ((2, 7, 19, 33), 5, (3, 3), geometry(2, padding=1)),
    ((2, 3, 16, 31), 4, (2, 5), geometry(2, padding=(1, 2), pool=(2, 3))),
    ((2, 20, 18, 35), 8, (3, 3), geometry(2, 2, 1, groups=4)),
    ((2, 18, 18, 35), 6, (3, 3), geometry(2, 2, 1, groups=2)),
    ((2, 12, 21, 33), 4, (2, 3), geometry(2, (2, 3), 1, (2, 3), pool=2)),
    ((2, 10, 9, 12, 17), 3, (2, 2, 2), geometry(3, 2, 1, 2, pool=3, pool_stride=1)),
    ((2, 33, 120), 2, (5,), geometry(1, 4, 2, 2, pool=3)),
)


@pytest.mark.parametrize("special", [0.0, float("nan"), -float("inf")])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize(("size", "outputs", "kernel", "arguments"), IN_PLACE + COPIED)
def test_like_stock(
    instruction_set: str,
    size: tuple[int, ...],
    outputs: int,
    kernel: tuple[int, ...],
    arguments: tuple[Any, ...],
    last: bool,
    special: float,
) -> None:
    tensors = make(size, outputs, kernel, arguments[3], torch.bfloat16, last=last)
    assert_right_with(special, 5, tensors, arguments)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 15, 16, 17, 31, 33, 48])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 1, 0), (2, 2, 0), (3, 3, 0), (3, 1, 1), (1, 3, 0)])
def test_columns(instruction_set: str, columns: int, kernel: int, stride: int, padding: int) -> None:
    for channels in (2, 9, 34):
        for outputs in (1, 12, 13):
            size = (2, channels, 3 * stride, columns * stride)
            tensors = make(size, outputs, (kernel, kernel), 1, torch.bfloat16)
            assert_like_stock(tensors, geometry(2, stride, padding, pool=(2, 1)))


@pytest.mark.parametrize(("size", "outputs", "kernel", "arguments"), IN_PLACE + COPIED)
def test_same_bits_and_winners(
    size: tuple[int, ...], outputs: int, kernel: tuple[int, ...], arguments: tuple[Any, ...]
) -> None:
    tensors = make(size, outputs, kernel, arguments[3], torch.bfloat16)
    assert_same_bits(tensors, arguments)
    if len(kernel) == 2:
        assert_winners(tensors, arguments)


def test_chosen() -> None:
    for size, outputs, kernel, arguments in (
        ((8, 512, 8, 8, 8), 16, (1, 1, 1), geometry(3)),
        ((1, 128, 224, 224), 8, (3, 3), geometry(2, 2, **OVERLAPPING)),
        ((4, 96, 32, 32, 32), 8, (2, 2, 2), geometry(3, 2, 1, 2, 4, pool=4)),
    ):
        tensors = make(size, outputs, kernel, arguments[3], torch.bfloat16)
        assert algorithm("avx512", tensors, arguments) != "rows_by_two"
        assert algorithm("avx512_bf16", tensors, arguments) in ("rows_by_two", "")


def test_an_odd_channel_has_no_other_beside_it(instruction_set: str) -> None:
    """What lies behind the last channel, here of the next group or image, counts for nothing."""
    arguments = geometry(2, padding=1, groups=2)
    tensors = make((3, 14, 12, 33), 6, (3, 3), 2, torch.bfloat16)
    expected = FUSED[2](*tensors, *arguments)
    tensors[0][:, 7:] = torch.nan
    torch.testing.assert_close(FUSED[2](*tensors, *arguments)[:, :3], expected[:, :3], rtol=0, atol=0)


def test_views(instruction_set: str) -> None:
    """Channels, rows and columns with others between."""
    whole = torch.randn(4, 80, 40, 70, dtype=torch.bfloat16)
    weight, bias = torch.randn(7, 20, 3, 3, dtype=torch.bfloat16) / 13, torch.randn(7, dtype=torch.bfloat16)
    for view in (
        whole[::2, ::4],
        whole[:2, 1:21, ::2, ::2],
        whole[:, 5:25, 3:, 1:],
        whole[1:2, :20].expand(3, -1, -1, -1),
    ):
        for padding in (0, 1):
            assert_like_stock([view, weight, bias], geometry(2, 2, padding, pool=3, pool_stride=2))


@pytest.mark.parametrize(
    ("size", "outputs", "kernel", "arguments"),
    [
        ((1, 512, 8, 8, 8), 1, (1, 1, 1), geometry(3, pool=3, pool_stride=2, pool_padding=1)),
        ((2, 20, 9, 7, 17), 3, (1, 1, 1), geometry(3, **OVERLAPPING)),
        ((2, 3, 7, 9, 18), 2, (3, 3, 3), geometry(3, padding=1, **OVERLAPPING)),
        ((1, 4, 31, 6, 16), 2, (1, 1, 1), geometry(3, pool=(5, 1, 1), pool_stride=(2, 1, 1))),
        ((2, 12, 9, 12, 17), 3, (2, 2, 2), geometry(3, 2, 1, 2, pool=3, pool_stride=1)),
        ((2, 12, 40, 61), 3, (3, 2), geometry(2, (3, 2), (1, 0), (3, 2))),
        ((2, 12, 40, 61), 3, (2, 3), geometry(2, (4, 4), 2, (2, 2))),
    ],
)
def test_slices_and_steps_in_common(
    instruction_set: str,
    dtype: torch.dtype,
    size: tuple[int, ...],
    outputs: int,
    kernel: tuple[int, ...],
    arguments: tuple[Any, ...],
) -> None:
    for last in (False, True):
        tensors = make(size, outputs, kernel, arguments[3], dtype, last=last)
        assert_like_stock(tensors, arguments, gradients=False)
    assert_same_bits(tensors, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 2, 7, 65, 300])
@pytest.mark.parametrize("kernel", [(1, 1), (1, 3), (2, 2), (3, 3), (5, 5), (9, 8)])
def test_weights_packed_in_runs(
    instruction_set: str, dtype: torch.dtype, channels: int, kernel: tuple[int, int]
) -> None:
    """Taps of one channel and the next follow one another, or with views of the weight do not."""
    for outputs in (7, 8, 40):
        input, weight, bias = make((1, channels, 11, 12), outputs, kernel, 1, dtype)
        assert_like_stock([input, weight, bias], geometry(2), gradients=False)
        apart = weight.repeat(1, 2, 1, 1)[:, ::2]
        assert_like_stock([input, apart, bias], geometry(2), gradients=False)
