"""Forward of groups of one channel: channels in the lanes, and small images copied with their padding."""

from typing import Any

import pytest
import torch
from conv_cases import (
    FUSED,
    assert_like_float64,
    assert_like_stock,
    assert_same_bits,
    geometry,
    make,
)


class TestDepthwise:
    """bfloat16 is widened where it lies if few taps meet it; else taps side by side are multiplied in pairs, an odd
    last one alone."""

    @pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
    @pytest.mark.parametrize(
        ("size", "multiplier", "kernel", "arguments"),
        [
            ((2, 40, 9, 17), 1, (3, 3), geometry(2, padding=1)),
            ((1, 33, 8, 16), 1, (5, 5), geometry(2, padding=2, pool=3, pool_stride=1, pool_padding=1)),
            ((2, 17, 15, 31), 2, (4, 2), geometry(2, padding=(2, 1), dilation=(1, 2))),
            ((2, 31, 33, 40), 1, (7, 7), geometry(2, padding=(0, 3), stride=(1, 2))),
            ((1, 48, 64, 70), 1, (3, 6), geometry(2, padding=(1, 3), pool=3, pool_stride=2)),
            ((2, 9, 10, 10), 1, (2, 2), geometry(2, stride=3)),
            ((2, 34, 9, 9), 1, (1, 1), geometry(2, stride=2)),
            ((2, 16, 7, 7, 8), 1, (3, 3, 3), geometry(3, padding=1)),
            ((1, 32, 7, 9, 11), 1, (2, 2, 2), geometry(3, stride=3)),
            ((1, 35, 32, 32), 1, (3, 3), geometry(2, stride=2, padding=1)),
            ((1, 33, 8, 8, 16), 1, (2, 2, 2), geometry(3, stride=3)),
            ((2, 24, 200), 1, (65,), geometry(1, padding=7)),
            ((2, 24, 150), 2, (31,), geometry(1, padding=15, dilation=2)),
        ],
    )
    @pytest.mark.parametrize("special", [False, True])
    def test_like_stock(
        self,
        instruction_set: str,
        size: tuple[int, ...],
        multiplier: int,
        kernel: tuple[int, ...],
        arguments: tuple[Any, ...],
        last: bool,
        special: bool,
    ) -> None:
        arguments = (*arguments[:3], size[1], *arguments[4:])
        tensors = make(size, multiplier * size[1], kernel, size[1], torch.bfloat16, last=last and len(kernel) > 1)
        if special:  # few, so that windows beside them have to be finite
            tensors[0][0, ::2, ..., 4].fill_(torch.nan)
            assert_like_float64(tensors, arguments)
        else:
            assert_like_stock(tensors, arguments)

    def test_infinity_stays_in_its_windows(self, instruction_set: str) -> None:
        tensors = make((2, 24, 12, 12), 24, (3, 3), 24, torch.bfloat16)
        tensors[0][0, :, 3:5, 6].fill_(torch.inf)
        arguments = geometry(2, padding=1, groups=24)
        ours = FUSED[2](*tensors, *arguments)
        exact = FUSED[2](*(tensor.double() for tensor in tensors if tensor is not None), *arguments)
        assert torch.equal(ours.isposinf(), exact.isposinf())
        assert torch.equal(ours.isnan(), exact.isnan())


class TestPaddedImages:
    """Small images of depthwise layers, copied with their padding."""

    @pytest.mark.parametrize("channels", [2, 7, 15, 16, 17, 31, 32, 33, 65])
    @pytest.mark.parametrize("last", [False, True])
    def test_widths(self, instruction_set: str, dtype: torch.dtype, channels: int, last: bool) -> None:
        arguments = geometry(2, padding=1, dilation=2, groups=channels, pool=3)
        assert_like_stock(make((3, channels, 8, 8), channels, (3, 3), channels, dtype, last=last), arguments)

    @pytest.mark.parametrize(
        ("size", "multiplier", "kernel", "arguments"),
        [
            ((2, 20, 7, 9), 2, (5, 3), geometry(2, padding=(2, 1), pool=2, pool_stride=1, pool_padding=1)),
            ((2, 33, 5, 6, 7), 1, (3, 3, 3), geometry(3, padding=1, pool=(2, 1, 2))),
            ((2, 17, 9, 8), 1, (3, 3), geometry(2, stride=(2, 1), padding=2)),
            ((3, 18, 30), 1, (9,), geometry(1, padding=4, pool=3, pool_stride=2)),
        ],
    )
    @pytest.mark.parametrize("last", [False, True])
    @pytest.mark.parametrize("value", [0.0, float("nan")])
    def test_geometries(
        self,
        instruction_set: str,
        size: tuple[int, ...],
        multiplier: int,
        kernel: tuple[int, ...],
        arguments: tuple[Any, ...],
        last: bool,
        value: float,
    ) -> None:
        channels = size[1]
        tensors = make(size, channels * multiplier, kernel, channels, last=last)
        tensors[0][-1, 1:3, 2] = value
        assert_like_stock(tensors, (*arguments[:3], channels, *arguments[4:]), gradients=value == 0)

    def test_same_bits_for_any_number_of_threads(self) -> None:
        arguments = geometry(2, padding=1, groups=70, pool=3, pool_stride=1)
        for last in (False, True):
            assert_same_bits(make((5, 70, 9, 9), 70, (3, 3), 70, last=last), arguments)


class TestSharedColumns:
    """Taps each of which meets under one pixel what the tap before it meets under the next pixel, or some columns
    further on; of rows too short for that, and with columns left over."""

    @pytest.mark.parametrize("channels", [3, 16, 17, 33])
    @pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
    @pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (3, 1), (2, 2), (1, 2), (3, 2), (4, 2)])
    def test_like_stock(
        self, instruction_set: str, dtype: torch.dtype, channels: int, last: bool, stride: int, dilation: int
    ) -> None:
        for columns, kernel in ((40, 7), (33, 3), (64, 11), (20, 6)):
            columns += (kernel - 1) * (dilation - 1)
            tensors = make((1, channels, 5, columns), channels, (2, kernel), channels, dtype, last=last)
            for padding in (0, kernel // 2):
                arguments = geometry(2, (1, stride), (0, padding), (1, dilation), channels, pool=(2, 1))
                assert_like_stock(tensors, arguments, gradients=False)

    @pytest.mark.parametrize("special", [float("nan"), float("inf"), 1e-42])
    def test_special_values(self, instruction_set: str, special: float) -> None:
        for last in (False, True):
            tensors = make((2, 20, 6, 40), 20, (3, 7), 20, last=last)
            tensors[0][0, ::2, 2, 7] = special
            assert_like_stock(tensors, geometry(2, (1, 2), (1, 3), groups=20), gradients=False)

    def test_same_bits_for_any_number_of_threads(self) -> None:
        for stride in (1, 2):
            tensors = make((3, 40, 12, 50), 40, (3, 7), 40, last=True)
            assert_same_bits(tensors, geometry(2, stride, (1, 3), groups=40))
