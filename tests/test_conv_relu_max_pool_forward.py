"""Sizes at which forward reads channels in ways of its own: dot products, pairs, copies with channels last."""

from typing import Any

import pytest
import torch
from conv_cases import (
    FUSED,
    RAW_ALGORITHM,
    algorithm,
    assert_like_float64,
    assert_like_stock,
    assert_right_with,
    assert_same_bits,
    assert_winners,
    channels_last,
    flat,
    geometry,
    make,
)


class TestDots:
    @pytest.mark.parametrize(
        ("size", "out_channels", "kernel", "last", "arguments"),
        [
            ((3, 65, 7, 7), 19, (7, 7), False, geometry(2, pool=1)),
            ((9, 33, 5, 6), 38, (5, 6), False, geometry(2, pool=1)),
            ((2, 48, 12, 13), 1, (1, 1), True, geometry(2, pool=4)),
            ((2, 40, 11, 9), 2, (1, 1), True, geometry(2, stride=2, pool=3, pool_stride=1, pool_padding=1)),
            ((2, 66, 7, 8), 18, (3, 4), True, geometry(2, pool=2, groups=2)),
            ((1, 32, 5, 5, 5), 34, (2, 5, 5), False, geometry(3, pool=(2, 1, 1), pool_stride=1)),
            ((2, 7, 60), 5, (37,), False, geometry(1, pool=3, pool_stride=2)),
            ((2, 64, 7, 7), 70, (5, 5), False, geometry(2, stride=2, padding=2, pool=3, pool_stride=2, pool_padding=1)),
            ((2, 64, 6, 5), 82, (3, 3), True, geometry(2, padding=1, groups=2)),
            ((1, 96, 4, 5, 4), 40, (3, 3, 3), False, geometry(3, padding=1, pool=4)),
            ((2, 300, 3, 3), 150, (1, 1), False, geometry(2, stride=2, pool=1)),
            # More input than stays in cache.
            ((1, 128, 39, 41), 2, (1, 1), True, geometry(2)),
            ((1, 64, 47, 43), 9, (3, 3), True, geometry(2, pool=3, pool_stride=1)),
            # A copy of the image with its padding is read in pairs, by a weight turned to channels last.
            ((3, 66, 17, 16), 4, (3, 3), True, geometry(2, padding=1, groups=2)),
            ((2, 31, 9, 31), 3, (3, 2), True, geometry(2, padding=(2, 1), dilation=(2, 1))),
            ((2, 62, 15, 33), 8, (5, 3), False, geometry(2, padding=(2, 1), groups=2, pool=3, pool_stride=2)),
            ((5, 33, 8, 9), 5, (3, 3), False, geometry(2, stride=(2, 3), pool=(2, 1))),
            ((2, 17, 5, 6, 7), 1, (2, 3, 1), False, geometry(3, padding=(1, 1, 0))),
            ((2, 40, 31), 7, (3,), False, geometry(1, padding=1, stride=2)),
        ],
    )
    def test_like_stock(
        self,
        instruction_set: str,
        dtype: torch.dtype,
        size: tuple[int, ...],
        out_channels: int,
        kernel: tuple[int, ...],
        last: bool,
        arguments: tuple[Any, ...],
    ) -> None:
        assert_like_stock(make(size, out_channels, kernel, arguments[3], dtype, last=last), arguments)

    def test_chosen_where_the_weight_serves_few_pixels(self) -> None:
        input, weight, bias = make((8, 256, 7, 7), 192, (7, 7))
        assert RAW_ALGORITHM(input, weight, bias, flat(geometry(2, pool=1)))[0] == "dots"
        input, weight, bias = make((8, 256, 14, 14), 192, (7, 7))
        assert RAW_ALGORITHM(input, weight, bias, flat(geometry(2, pool=1)))[0] != "dots"

    def test_same_bits_for_any_number_of_threads(self) -> None:
        assert_same_bits(make((6, 128, 7, 7), 72, (7, 7)), geometry(2, pool=1))


class TestPairs:
    """bfloat16, of which an instruction set may multiply pairs of channels: those that lie side by side are read where
    they are, without the taps in the padding."""

    @pytest.mark.parametrize(
        ("size", "out_channels", "kernel", "last", "arguments"),
        [
            ((2, 20, 8, 8), 40, (11, 11), True, geometry(2, padding=5, pool=3, pool_stride=2)),
            ((2, 20, 8, 9), 40, (5, 1), True, geometry(2, padding=(2, 0), pool=2)),
            ((3, 24, 9, 7), 34, (3, 3), True, geometry(2, groups=2)),
            ((3, 24, 9, 7), 18, (3, 3), True, geometry(2, pool=3, pool_stride=1, pool_padding=1)),
            ((3, 26, 9, 9), 12, (3, 3), True, geometry(2, stride=2, padding=1, groups=2)),
            ((2, 21, 8, 8), 40, (7, 7), True, geometry(2, padding=3)),
            ((1, 6, 5, 6, 7), 33, (3, 3, 3), True, geometry(3, padding=1, dilation=2)),
            ((8, 64, 5, 5, 5), 16, (1, 1, 1), True, geometry(3)),
            ((2, 9, 13, 14), 33, (3, 3), False, geometry(2, padding=1)),
            ((2, 8, 7, 7, 7), 3, (3, 3, 3), False, geometry(3, stride=2, padding=1, pool=3, pool_stride=2)),
            ((2, 8, 5), 16, (3,), False, geometry(1)),
            ((0, 20, 8, 8), 40, (11, 11), True, geometry(2, padding=5)),
            # Many products an element: contiguous input is brought into channels last.
            ((2, 20, 8, 8), 72, (11, 11), False, geometry(2, padding=5, pool=3, pool_stride=2)),
            ((1, 8, 5, 6, 7), 264, (3, 3, 3), False, geometry(3, padding=1, groups=2)),
            ((2, 16, 70), 136, (9,), False, geometry(1, padding=4)),
        ],
    )
    @pytest.mark.parametrize("special", [False, True])
    def test_like_stock(
        self,
        instruction_set: str,
        size: tuple[int, ...],
        out_channels: int,
        kernel: tuple[int, ...],
        last: bool,
        arguments: tuple[Any, ...],
        special: bool,
    ) -> None:
        tensors = make(size, out_channels, kernel, arguments[3], torch.bfloat16, last=last)
        if special:
            tensors[0][-1:, 1].fill_(torch.nan)
        assert_like_stock(tensors, arguments)
        assert FUSED[len(kernel)](*tensors, *arguments).is_contiguous() != last or size[0] == 0

    @pytest.mark.parametrize("first", [0, 1])
    @pytest.mark.parametrize("channels", [20, 21])
    def test_some_of_the_channels(self, instruction_set: str, first: int, channels: int) -> None:
        input, weight, bias = make((2, 24, 9, 9), 34, (3, 3), dtype=torch.bfloat16)
        input, weight = channels_last(input)[:, first : first + channels], channels_last(weight[:, :channels])
        assert_like_stock([input, weight, bias], geometry(2, padding=1))

    def test_same_bits_for_any_number_of_threads(self) -> None:
        assert_same_bits(make((2, 20, 16, 16), 72, (11, 11), dtype=torch.bfloat16, last=True), geometry(2, padding=5))

    def test_dot_products_are_chosen_where_they_are_of_pairs(self) -> None:
        input, weight, bias = make((1, 192, 32, 32), 16, (11, 11), 2, dtype=torch.bfloat16)
        chosen = {
            name: algorithm(name, [channels_last(input), channels_last(weight), bias], geometry(2, padding=5, groups=2))
            for name in ("avx512", "avx512_bf16")
        }
        assert chosen["avx512"] != "dots"
        assert chosen["avx512_bf16"] in ("dots", "")


class TestRowPairs:
    """bfloat16 with an odd number of channels, of which an instruction set may multiply pairs along a row of the
    kernel: an odd row's last pair ends beyond it, where everything has to be finite."""

    CASES = (
        ((2, 3, 21, 23), 33, (7, 7), geometry(2, stride=2, padding=3, pool=3, pool_stride=2, pool_padding=1)),
        ((2, 3, 17, 33), 64, (3, 3), geometry(2, padding=1)),
        ((2, 3, 9, 16), 17, (2, 2), geometry(2)),
        ((1, 3, 16, 31), 16, (3, 4), geometry(2, stride=(1, 3), pool=(2, 1))),
        ((2, 1, 12, 40), 40, (5, 9), geometry(2, stride=2, dilation=(2, 1), padding=(2, 4), pool=3, pool_stride=1)),
        ((3, 9, 8, 15), 36, (3, 3), geometry(2, padding=1, groups=3)),
        ((2, 10, 9, 9), 70, (3, 5), geometry(2, padding=2, groups=2, stride=3, pool=1)),
        ((2, 7, 11, 12), 31, (1, 11), geometry(2, padding=(0, 5), pool=2, ceil_mode=True)),
        ((2, 3, 5, 6, 7), 32, (3, 2, 3), geometry(3, padding=1)),
        ((1, 1, 9, 8, 17), 18, (3, 3, 3), geometry(3, padding=(0, 1, 2), stride=(2, 1, 1), pool=(3, 2, 2))),
        ((2, 3, 700), 48, (5,), geometry(1, stride=2, pool=4)),
        ((0, 3, 17, 33), 64, (3, 3), geometry(2)),
    )

    @pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
    @pytest.mark.parametrize(("size", "out_channels", "kernel", "arguments"), CASES)
    @pytest.mark.parametrize("special", [0.0, float("nan"), float("inf")])
    def test_like_stock(
        self,
        instruction_set: str,
        size: tuple[int, ...],
        out_channels: int,
        kernel: tuple[int, ...],
        arguments: tuple[Any, ...],
        last: bool,
        special: float,
    ) -> None:
        tensors = make(size, out_channels, kernel, arguments[3], torch.bfloat16, last=last)
        assert_right_with(special, 5, tensors, arguments)

    @pytest.mark.parametrize("width", [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65])
    def test_widths(self, instruction_set: str, width: int) -> None:
        for out_channels in (width, 33):
            assert_like_stock(
                make((2, 3, 4, width), out_channels, (3, 3), dtype=torch.bfloat16), geometry(2, padding=1, pool=(2, 1))
            )

    def test_chosen_for_few_products(self) -> None:
        size, out_channels, kernel, arguments = self.CASES[0]
        tensors = make(size, out_channels, kernel, dtype=torch.bfloat16)
        assert algorithm("avx512", tensors, arguments) != "row_pairs"
        assert algorithm("avx512_bf16", tensors, arguments) in ("row_pairs", "")
        tensors[0][0, 0, 0, 0] = torch.nan
        assert algorithm("avx512_bf16", tensors, arguments) != "row_pairs"
        even = make((2, 3, 21, 23), 33, (7, 8), dtype=torch.bfloat16)
        even[0][0, 0, 0, 0] = torch.nan
        assert algorithm("avx512_bf16", even, arguments) in ("row_pairs", "")

    def test_winners(self, instruction_set: str) -> None:
        for size, out_channels, kernel, arguments in self.CASES[:2]:
            assert_winners(make(size, out_channels, kernel, dtype=torch.bfloat16), arguments)

    def test_no_number_left_in_scratch_memory_counts(self, instruction_set: str) -> None:
        for size, out_channels, kernel, arguments in self.CASES[:2]:
            tensors = make(size, out_channels, kernel, dtype=torch.bfloat16)
            spoilt = [torch.full((2, 4, *size[2:]), torch.nan, dtype=torch.bfloat16), None, tensors[2]]
            spoilt[1] = torch.ones(out_channels, 4, *kernel, dtype=torch.bfloat16)
            for rows in range(size[2] - 9, size[2]):
                FUSED[2](*spoilt, *arguments)
                assert_like_stock([tensors[0][:, :, :rows], *tensors[1:]], arguments)

    def test_views(self, instruction_set: str) -> None:
        input, weight, bias = make((3, 6, 9, 40), 33, (3, 3), dtype=torch.bfloat16)
        arguments = geometry(2, padding=1)
        for value, check in ((1.0, assert_like_stock), (float("nan"), assert_like_float64)):
            input[1, 2, 4, 6] = value
            check([input[:, ::2, :, ::2], weight[:, 1::2], bias], arguments)
            check([input[:, 1:4, 1:, ::3], weight[:, :3], bias], arguments)
            check([channels_last(input)[:, 2:5, :, 3:], channels_last(weight)[:, 3:], bias], arguments)
            check([input[:, :3, 4:5].expand(-1, -1, 9, -1), weight[:, :3], bias], arguments)

    def test_same_bits_for_any_number_of_threads(self) -> None:
        for size, out_channels, kernel, arguments in self.CASES[:2]:
            tensors = make(size, out_channels, kernel, dtype=torch.bfloat16)
            assert_same_bits(tensors, arguments)
            assert_same_bits([tensors[0][:1], *tensors[1:]], arguments)


class TestMatrix:
    """bfloat16 that a matrix unit may multiply: runs of channels, or of a row of the kernel, in blocks of up to 32
    numbers, by tiles of up to 16 pixels of a row. Where a run's last block ends beyond it, everything has to be finite.
    """

    CASES = (
        # One block a channel run, several, and some that end beyond.
        ((2, 32, 9, 20), 40, (3, 3), geometry(2, padding=1)),
        ((2, 64, 9, 33), 16, (3, 3), geometry(2, pool=3, pool_stride=2, pool_padding=1)),
        ((2, 130, 7, 18), 34, (1, 1), geometry(2)),
        ((2, 33, 8, 17), 33, (3, 2), geometry(2, padding=1, dilation=2)),
        ((2, 72, 10, 9), 48, (3, 3), geometry(2, stride=2, padding=1, groups=2)),
        # A run a row of the kernel.
        ((2, 3, 21, 47), 33, (7, 7), geometry(2, stride=2, padding=3, pool=3, pool_stride=2, pool_padding=1)),
        ((2, 16, 9, 40), 17, (3, 3), geometry(2, padding=1)),
        ((1, 24, 8, 31), 64, (2, 5), geometry(2, stride=(1, 3), pool=(2, 1))),
        ((2, 23, 6, 21), 24, (1, 11), geometry(2, padding=(0, 5), ceil_mode=True)),
        # Rows in several parts, other dimensions, few pixels a row.
        ((2, 16, 700), 48, (5,), geometry(1, stride=2, pool=4)),
        ((1, 40, 2100), 16, (3,), geometry(1, pool=3, pool_stride=1)),
        ((2, 48, 5, 6, 7), 32, (3, 2, 3), geometry(3, padding=1)),
        ((1, 17, 9, 8, 35), 18, (3, 3, 3), geometry(3, padding=(0, 1, 2), stride=(2, 1, 1), pool=(3, 2, 2))),
        ((3, 64, 5, 5), 96, (3, 3), geometry(2)),
        ((0, 64, 9, 33), 64, (3, 3), geometry(2)),
    )

    @pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
    @pytest.mark.parametrize(("size", "out_channels", "kernel", "arguments"), CASES)
    @pytest.mark.parametrize("special", [0.0, float("nan"), float("inf")])
    def test_like_stock(
        self,
        instruction_set: str,
        size: tuple[int, ...],
        out_channels: int,
        kernel: tuple[int, ...],
        arguments: tuple[Any, ...],
        last: bool,
        special: float,
    ) -> None:
        tensors = make(size, out_channels, kernel, arguments[3], torch.bfloat16, last=last)
        assert_right_with(special, 4, tensors, arguments)

    def test_chosen(self) -> None:
        for size, out_channels, kernel, arguments in self.CASES[:3]:
            for last in (False, True):
                tensors = make(size, out_channels, kernel, dtype=torch.bfloat16, last=last)
                assert algorithm("avx512_bf16", tensors, arguments) != "matrix"
                assert algorithm("amx_bf16", tensors, arguments) in ("matrix", "")

    @pytest.mark.parametrize("width", [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 127, 129])
    def test_widths(self, instruction_set: str, width: int) -> None:
        for in_channels in (16, 64):
            for last in (False, True):
                tensors = make((2, in_channels, 4, width), 33, (3, 1), dtype=torch.bfloat16, last=last)
                assert_like_stock(tensors, geometry(2, pool=(2, 1)))

    @pytest.mark.parametrize("channels", [1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 95, 97])
    def test_channels(self, instruction_set: str, channels: int) -> None:
        for last in (False, True):
            assert_like_stock(
                make((2, channels, 6, 20), channels, (3, 3), dtype=torch.bfloat16, last=last), geometry(2, padding=1)
            )

    def test_winners(self, instruction_set: str) -> None:
        for size, out_channels, kernel, arguments in self.CASES[:2]:
            assert_winners(make(size, out_channels, kernel, dtype=torch.bfloat16), arguments)

    def test_no_number_left_in_scratch_memory_counts(self, instruction_set: str) -> None:
        for size, out_channels, kernel, arguments in self.CASES[5:8]:
            tensors = make(size, out_channels, kernel, dtype=torch.bfloat16)
            spoilt = [torch.full(size, torch.nan, dtype=torch.bfloat16), *tensors[1:]]
            for rows in range(size[2] - 3, size[2]):
                FUSED[2](*spoilt, *arguments)
                assert_like_stock([tensors[0][:, :, :rows], *tensors[1:]], arguments)

    def test_views(self, instruction_set: str) -> None:
        input, weight, bias = make((3, 96, 9, 40), 33, (3, 3), dtype=torch.bfloat16)
        arguments = geometry(2, padding=1)
        for value, check in ((1.0, assert_like_stock), (float("nan"), assert_like_float64)):
            input[1, 2, 4, 6] = value
            check([input[:, ::2, :, ::2], weight[:, 1::2], bias], arguments)
            check([input[:, 1:33, 1:, ::3], weight[:, :32], bias], geometry(2))
            check([channels_last(input)[:, 2:66, :, 3:], channels_last(weight)[:, 32:], bias], geometry(2))
            check([channels_last(input)[:, :32, ::2, 1:38], weight[:, :32], bias], geometry(2))
            check([input[:, :32, 4:5].expand(-1, -1, 9, -1), weight[:, :32], bias], arguments)

    def test_same_bits_for_any_number_of_threads(self) -> None:
        for size, out_channels, kernel, arguments in self.CASES[:8]:
            tensors = make(size, out_channels, kernel, arguments[3], dtype=torch.bfloat16)
            assert_same_bits(tensors, arguments)
            assert_same_bits([tensors[0][:1], *tensors[1:]], arguments)


class TestTurned:
    """Contiguous images that may be brought into channels last first: in squares of a vector's lanes, bfloat16 in
    blocks of 32 channels and 8 columns, and line by line where channels lie a power of two apart."""

    OF_LARGE_WEIGHTS = (
        ((2, 256, 5, 5, 5), 64, (3, 3, 3), geometry(3, stride=2)),
        ((4, 48, 32, 32), 10, (11, 11), geometry(2, stride=2, dilation=2, pool=3, pool_stride=1)),
        ((3, 130, 9, 9), 34, (5, 5), geometry(2, padding=2, groups=2, pool=3, pool_stride=2, stride=2)),
    )

    @pytest.mark.parametrize(
        ("size", "out_channels", "kernel", "arguments"),
        [
            ((7, 64, 7, 9), 5, (1, 1), geometry(2)),
            ((3, 34, 16, 31), 40, (3, 3), geometry(2, padding=1)),
            ((2, 6, 8, 33), 130, (3, 3), geometry(2, pool=3, pool_stride=2)),
            ((13, 96, 9, 15), 7, (2, 2), geometry(2, stride=3)),
            ((2, 32, 7, 66), 9, (1, 2), geometry(2, stride=(2, 1), padding=(0, 1))),
            ((2, 40, 9, 17), 20, (1, 1), geometry(2, stride=2)),
            ((2, 72, 10, 16), 20, (1, 1), geometry(2, stride=3, pool=1)),
            ((2, 34, 9, 33), 20, (1, 1), geometry(2, stride=4)),
            ((1, 128, 11, 26), 12, (1, 1), geometry(2, stride=5, pool=1)),
            ((1, 66, 5, 8, 9), 18, (2, 2, 2), geometry(3, stride=(3, 1, 2), padding=1)),
            ((1, 64, 7, 5, 16), 8, (1, 3, 3), geometry(3, stride=(2, 1, 1), pool=(2, 1, 2))),
            ((4, 64, 33), 6, (2,), geometry(1, stride=2)),
            ((6, 130, 5, 5), 1, (3, 3), geometry(2, stride=3, padding=1)),
            ((2, 256, 5, 5, 7), 8, (2, 2, 2), geometry(3, stride=(3, 1, 2))),
            ((3, 160, 9, 17), 3, (1, 1), geometry(2, stride=2)),
            ((3, 161, 10, 46), 3, (1, 1), geometry(2, stride=3)),
            ((3, 96, 9, 33), 2, (1, 1), geometry(2, stride=4, pool=1)),
            ((2, 40, 32, 32), 3, (3, 3), geometry(2, padding=1)),
            ((1, 67, 8, 8, 16), 5, (2, 2, 2), geometry(3)),
            ((2, 33, 1024), 4, (3,), geometry(1, padding=1)),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    @pytest.mark.parametrize("special", [False, True])
    def test_like_stock(
        self,
        instruction_set: str,
        dtype: torch.dtype,
        size: tuple[int, ...],
        out_channels: int,
        kernel: tuple[int, ...],
        arguments: tuple[Any, ...],
        special: bool,
    ) -> None:
        tensors = make(size, out_channels, kernel, arguments[3], dtype)
        if special:
            tensors[0][-1:, 1].fill_(torch.nan)
            tensors[0][0, -1, 0].fill_(torch.inf)
        assert_like_stock(tensors, arguments, gradients=not special)

    @pytest.mark.parametrize(("size", "stride"), [((8, 96, 14, 14), 2), ((3, 160, 9, 17), 1)])
    def test_chosen_for_few_outputs_of_many_channels(self, size: tuple[int, ...], stride: int) -> None:
        input, weight, bias = make(size, 3, (5, 5))
        arguments = flat(geometry(2, stride=stride, padding=2))
        # Only with channels last have input and weight long runs in common.
        assert RAW_ALGORITHM(input, weight, bias, arguments)[0] == "dots"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_views(self, instruction_set: str, dtype: torch.dtype) -> None:
        input, weight, bias = make((3, 70, 9, 40), 12, (3, 3), dtype=dtype)
        arguments = geometry(2, padding=1)
        assert_like_stock([input[:, :, :, ::2], weight, bias], arguments)
        assert_like_stock([input[:, 1:, 1:, 3:], weight[:, :69], bias], arguments)
        assert_like_stock([input[1:, ::4], weight[:, :18], bias], arguments)
        assert_like_stock([input[:, :, :1].expand(-1, -1, 9, -1), weight, bias], arguments)

    def test_same_bits_for_any_number_of_threads(self) -> None:
        assert_same_bits(make((6, 96, 20, 20), 40, (3, 3), dtype=torch.bfloat16), geometry(2, padding=1))
        assert_same_bits(make((1, 512, 14, 14), 24, (3, 3), dtype=torch.bfloat16), geometry(2))
        assert_same_bits(make((8, 96, 14, 14), 3, (5, 5)), geometry(2, stride=2, padding=2))

    @pytest.mark.parametrize(("size", "out_channels", "kernel", "arguments"), OF_LARGE_WEIGHTS)
    @pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
    def test_large_weights(
        self,
        instruction_set: str,
        size: tuple[int, ...],
        out_channels: int,
        kernel: tuple[int, ...],
        arguments: tuple[Any, ...],
        value: float,
    ) -> None:
        tensors = make(size, out_channels, kernel, arguments[3])
        tensors[0][0, 1, 2] = value
        assert_like_stock(tensors, arguments, gradients=value == 0)
        assert FUSED[len(kernel)](*tensors, *arguments).is_contiguous()

    def test_chosen_for_large_weights(self) -> None:
        for size, out_channels, kernel, arguments in self.OF_LARGE_WEIGHTS[1:2]:
            tensors = make(size, out_channels, kernel)
            assert RAW_ALGORITHM(*tensors, flat(arguments))[0] == "dots"

    def test_same_bits_with_large_weights(self) -> None:
        size, out_channels, kernel, arguments = self.OF_LARGE_WEIGHTS[0]
        assert_same_bits(make(size, out_channels, kernel), arguments)
