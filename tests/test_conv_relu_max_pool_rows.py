"""Sizes at which forward goes along rows in ways of its own: images or windows in the lanes, phases of the stride,
groups together, pools that overlap."""

from typing import Any

import pytest
import torch
from conv_cases import (
    FUSED,
    RAW_ALGORITHM,
    algorithm,
    assert_like_stock,
    assert_right_with,
    assert_same_bits,
    flat,
    geometry,
    make,
)

from fastnn.reference import conv_relu_max_pool as reference


class TestLanes:
    """Small images, or bands of their rows, in the lanes."""

    @pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
    @pytest.mark.parametrize(
        ("size", "out_channels", "kernel", "arguments"),
        [
            ((32, 3, 20, 20), 10, (5, 5), geometry(2, stride=2, padding=2)),
            ((33, 10, 5, 5), 10, (2, 2), geometry(2, stride=2, padding=1)),
            ((15, 3, 9, 8), 13, (3, 3), geometry(2, padding=1)),
            ((31, 2, 9, 8), 1, (3, 3), geometry(2, pool=3, pool_stride=1, pool_padding=1)),
            ((47, 4, 6, 7), 6, (3, 2), geometry(2, groups=2, pool=(2, 1))),
            ((17, 3, 10), 5, (3,), geometry(1, dilation=2)),
            ((16, 2, 5, 6, 4), 7, (2, 2, 2), geometry(3, padding=1, pool=2)),
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

    def test_chosen_for_small_images(self) -> None:
        input, weight, bias = make((32, 3, 20, 20), 10, (5, 5))
        assert RAW_ALGORITHM(input, weight, bias, flat(geometry(2, stride=2, padding=2)))[0] == "lanes"

    def test_same_bits_for_any_number_of_threads(self) -> None:
        assert_same_bits(make((40, 3, 40, 40), 10, (5, 5)), geometry(2, stride=2, padding=2))

    @pytest.mark.parametrize("special", ["nothing", "negative zero", "infinite weight", "infinite input"])
    @pytest.mark.parametrize("padding", [(2, 0), (0, 2), (4, 4)])
    def test_rows_in_the_padding(self, instruction_set: str, padding: tuple[int, int], special: str) -> None:
        """Left out by some numbers of threads, if their products are zeros that change nothing."""
        input, weight, bias = make((32, 3, 20, 20), 10, (5, 5))
        arguments = geometry(2, stride=2, padding=padding)
        if special == "negative zero":
            bias[:5], weight[:5] = -0.0, -0.0
        elif special == "infinite weight":
            weight[0, :, 0, 3], weight[4, 1, 4, 4] = torch.inf, -torch.inf
        elif special == "infinite input":
            input[3, 1, 0], input[17, 2, 19] = torch.inf, torch.nan
        assert_same_bits([input, weight, bias], arguments)
        if special == "infinite input":
            ours = FUSED[2](input, weight, bias, *arguments)
            exact = FUSED[2](input.double(), weight.double(), bias.double(), *arguments)
            torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5, equal_nan=True)
        elif special != "infinite weight":  # which makes NaN of padding that algorithms may leave out
            assert_like_stock([input, weight, bias], arguments)


class TestInPlace:
    """Rows of many channels read where they lie, ahead where they don't fit the cache."""

    SIZES = (((4, 96, 1030), 10, (3,), geometry(1)), ((2, 48, 61, 67), 2, (2, 3), geometry(2, pool=3, pool_stride=2)))

    @pytest.mark.parametrize(("size", "out_channels", "kernel", "arguments"), SIZES)
    def test_like_stock(
        self,
        instruction_set: str,
        size: tuple[int, ...],
        out_channels: int,
        kernel: tuple[int, ...],
        arguments: tuple[Any, ...],
    ) -> None:
        assert_like_stock(make(size, out_channels, kernel), arguments)

    @pytest.mark.parametrize(("size", "out_channels", "kernel", "arguments"), SIZES)
    def test_chosen(
        self, size: tuple[int, ...], out_channels: int, kernel: tuple[int, ...], arguments: tuple[Any, ...]
    ) -> None:
        input, weight, bias = make(size, out_channels, kernel)
        assert RAW_ALGORITHM(input, weight, bias, flat(arguments))[0] == "rows"


class TestWindows:
    """Consecutive windows in the lanes, pooled in registers."""

    @pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
    @pytest.mark.parametrize(
        ("size", "out_channels", "kernel", "arguments"),
        [
            ((2, 1, 28, 28), 32, (3, 3), geometry(2, padding=1)),
            ((1, 2, 45, 70), 13, (3, 5), geometry(2, padding=(0, 4), dilation=(2, 1))),
            ((2, 4, 41, 43), 10, (3, 2), geometry(2, groups=2, stride=(2, 1), padding=1, pool=(2, 3))),
            ((1, 2, 33, 60), 17, (2, 3), geometry(2, padding=(1, 2), stride=(1, 3), pool=(3, 2), pool_stride=(5, 2))),
            ((1, 1, 60, 60), 9, (1, 1), geometry(2, padding=6, pool=4, stride=(3, 1))),
            ((2, 1, 13, 14, 40), 7, (2, 3, 3), geometry(3, padding=1, pool=2)),
            ((1, 3, 12, 11, 39), 21, (2, 1, 3), geometry(3, padding=(1, 0, 9), pool=(3, 2, 3), dilation=(1, 1, 2))),
            ((1, 3, 40, 90), 20, (7, 7), geometry(2, padding=3)),
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

    @pytest.mark.parametrize("pool", [(2, 2), (3, 2), (2, 3), (1, 4)])
    @pytest.mark.parametrize("value", [-0.0, float("nan"), float("inf"), -float("inf"), 1e30])
    def test_special_values(self, instruction_set: str, pool: tuple[int, int], value: float) -> None:
        tensors = make((2, 1, 20, 50), 11, (3, 3))
        tensors[0][0, 0, 3:5, 8] = value
        tensors[0][1, 0, 19, 49] = value
        assert_like_stock(tensors, geometry(2, padding=1, pool=pool), gradients=False)
        weight_too = [tensors[0], tensors[1].clone(), tensors[2]]
        weight_too[1][7, 0, 1, 1] = value
        assert_like_stock(weight_too, geometry(2, padding=1, pool=pool), gradients=False)

    def test_zeros_keep_their_signs(self) -> None:
        input = torch.tensor([[-0.0, -0.0, -1.0, -0.0, -0.0, 0.0, 0.0, -0.0] * 16]).repeat(2, 1, 1)
        weight, arguments = torch.ones(8, 1, 1), geometry(1)
        bias = torch.full((8,), -0.0)
        expected = reference.conv_relu_max_pool(input, weight, bias, *arguments)
        result = FUSED[1](input, weight, bias, *arguments)
        assert torch.equal(result.signbit(), expected.signbit())

    def test_chosen_for_few_input_channels(self) -> None:
        def algorithm(channels: int, out_channels: int, **pool: int) -> str:
            input, weight, bias = make((8, channels, 28, 28), out_channels, (3, 3))
            return RAW_ALGORITHM(input, weight, bias, flat(geometry(2, padding=1, **pool)))[0]

        assert algorithm(1, 32) == "windows"
        assert algorithm(3, 64) == "windows"
        assert algorithm(1, 32, pool=3, pool_stride=2) != "windows"

    def test_same_bits_for_any_number_of_threads(self) -> None:
        assert_same_bits(make((1, 2, 150, 224), 24, (3, 3)), geometry(2, padding=1))


class TestPhases:
    """Fewer multiplications along a row, for each phase of its stride."""

    STEM = geometry(2, stride=2, padding=3, pool=3, pool_stride=2, pool_padding=1)

    @pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
    @pytest.mark.parametrize(
        ("size", "out_channels", "kernel", "arguments"),
        [
            ((1, 3, 64, 63), 64, (7, 7), STEM),
            ((2, 3, 65, 61), 40, (7, 7), geometry(2, stride=2, padding=3, pool=(3, 4), pool_stride=(1, 2))),
            ((1, 3, 70, 131), 97, (11, 11), geometry(2, stride=4, padding=2, pool=3, pool_stride=2)),
            ((2, 20, 21, 67), 96, (3, 3), geometry(2, padding=1, pool=3, pool_stride=2)),
            (
                (1, 40, 21, 33),
                192,
                (2, 3),
                geometry(2, groups=2, padding=(0, 2), dilation=(2, 1), pool=3, pool_stride=2),
            ),
            ((1, 24, 33, 34), 96, (4, 2), geometry(2, stride=(3, 1), padding=1, pool=3, pool_stride=2)),
            ((2, 3, 19, 90), 96, (5, 11), geometry(2, stride=(1, 3), padding=2, pool=3, pool_stride=1)),
            ((3, 96, 201), 130, (3,), geometry(1, padding=1, pool=3)),
            # Long kernels, in pieces.
            ((2, 64, 100), 96, (7,), geometry(1, padding=3)),
            ((1, 16, 33, 40), 96, (5, 5), geometry(2, groups=2, padding=2, pool=3, pool_stride=2)),
            ((1, 8, 40, 70), 48, (2, 19), geometry(2, stride=(1, 2), padding=(0, 9), pool=3, pool_stride=2)),
            ((1, 12, 9, 10, 33), 96, (3, 3, 3), geometry(3, padding=1, pool=3, pool_stride=2, pool_padding=1)),
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

    @pytest.mark.parametrize("value", [-0.0, float("nan"), float("inf"), -float("inf"), 1e30])
    @pytest.mark.parametrize("which", [0, 1])
    def test_special_values(self, instruction_set: str, which: int, value: float) -> None:
        tensors = make((1, 3, 64, 64), 48, (7, 7))
        tensors[which][0, 1, 3, 3] = value  # of the kernel: never in the padding
        assert_like_stock(tensors, self.STEM, gradients=False)

    def test_large_values_in_another_slice(self) -> None:
        tensors = make((1, 12, 9, 10, 33), 96, (3, 3, 3))
        tensors[0][0, 3, 8, 2, 5] = 1e30
        assert_like_stock(tensors, geometry(3, padding=1, pool=3, pool_stride=2, pool_padding=1), gradients=False)

    def test_some_of_the_columns(self, instruction_set: str) -> None:
        input, weight, bias = make((1, 3, 64, 127), 64, (7, 14))
        assert_like_stock([input[..., ::2], weight[..., ::2], bias], self.STEM)
        assert_like_stock([input[..., :63], weight[..., :7], bias], self.STEM)

    def test_chosen_for_strides_and_overlapping_windows(self) -> None:
        input, weight, bias = make((1, 3, 224, 224), 64, (7, 7))
        assert RAW_ALGORITHM(input, weight, bias, flat(self.STEM))[0] == "phases"
        input, weight, bias = make((1, 16, 28, 28), 512, (3, 3))
        arguments = geometry(2, padding=1, pool=3, pool_stride=2)
        assert RAW_ALGORITHM(input, weight, bias, flat(arguments))[0] == "phases"

    def test_chosen_for_long_kernels(self) -> None:
        input, weight, bias = make((1, 32, 40, 40), 96, (5, 5))
        arguments = geometry(2, padding=2, pool=3, pool_stride=2)
        assert RAW_ALGORITHM(input, weight, bias, flat(arguments))[0] == "phases"

    def test_same_bits_for_any_number_of_threads(self) -> None:
        assert_same_bits(make((1, 3, 90, 90), 64, (7, 7)), self.STEM)
        assert_same_bits(make((3, 20, 40, 50), 96, (3, 3)), geometry(2, padding=1, pool=3, pool_stride=2))


class TestGroupsTogether:
    """Groups of few channels, which lie side by side in memory."""

    @pytest.mark.parametrize(
        ("size", "out_channels", "kernel", "arguments"),
        [
            ((2, 32, 9, 24), 16, (1, 1), geometry(2, groups=4, pool=4)),
            ((1, 8, 9, 10, 11), 24, (2, 2, 2), geometry(3, groups=4, pool=3, pool_stride=1, pool_padding=1)),
            ((2, 12, 20, 21), 6, (3, 3), geometry(2, groups=6, stride=2, padding=1, pool=3, pool_stride=2)),
            ((2, 300, 40, 37), 3, (3, 3), geometry(2, groups=3, padding=1)),
        ],
    )
    def test_like_stock(
        self,
        instruction_set: str,
        dtype: torch.dtype,
        size: tuple[int, ...],
        out_channels: int,
        kernel: tuple[int, ...],
        arguments: tuple[Any, ...],
    ) -> None:
        assert_like_stock(make(size, out_channels, kernel, arguments[3], dtype, last=True), arguments)


class TestPoolsThatOverlap:
    """The largest of each column first, which NaN and infinities must pass through as well."""

    @pytest.mark.parametrize("out_channels", [3, 20, 40])
    @pytest.mark.parametrize(
        "pool",
        [
            {"pool": 3, "pool_stride": 1, "pool_padding": 1},
            {"pool": (2, 5), "pool_stride": (1, 2), "pool_padding": (1, 2)},
            {"pool": 4, "pool_stride": 3, "pool_dilation": (1, 2)},
            {"pool": (3, 30), "pool_stride": (2, 3)},
        ],
    )
    @pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -float("inf")])
    def test_special_values(
        self, instruction_set: str, dtype: torch.dtype, out_channels: int, pool: dict[str, Any], value: float
    ) -> None:
        tensors = make((2, 3, 17, 70), out_channels, (3, 3), 1, dtype)
        tensors[0][0, 1, 3:5, 8] = value
        tensors[0][1, :, 16, 69] = value
        arguments = geometry(2, padding=1, **pool)
        if dtype is not torch.bfloat16:
            return assert_like_stock(tensors, arguments, gradients=False)
        # Stock's bfloat16 has them in other places than float64.
        result = FUSED[2](*tensors, *arguments)
        expected = reference.conv_relu_max_pool(*(tensor.double() for tensor in tensors), *arguments)
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(result.isinf(), expected.isinf())


class TestPaddedWindows:
    """Windows beyond the conv pixels: rows read in place are moved apart for them, edges are pooled by columns."""

    @pytest.mark.parametrize("size", [(5, 16), (7, 17), (16, 15), (13, 33), (33, 3), (1, 31)])
    @pytest.mark.parametrize("kernel", [1, 2])
    @pytest.mark.parametrize("outputs", [1, 3, 12])
    def test_rows_in_place(self, instruction_set: str, size: tuple[int, int], kernel: int, outputs: int) -> None:
        side = kernel - 1
        tensors = make((2, 40, size[0] + side, size[1] + side), outputs, (kernel, kernel))
        for stride in (1, 2):
            assert_like_stock(tensors, geometry(2, pool=3, pool_stride=stride, pool_padding=1), gradients=False)
            assert_same_bits(tensors, geometry(2, pool=3, pool_stride=stride, pool_padding=(1, 0)))

    def test_chosen(self) -> None:
        arguments = geometry(2, pool=3, pool_stride=1, pool_padding=1)
        assert RAW_ALGORITHM(*make((1, 128, 56, 56), 1, (1, 1)), flat(arguments))[0] == "rows"

    @pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
    @pytest.mark.parametrize("special", [0.0, float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize(
        ("columns", "pool", "pool_stride", "pool_padding", "pool_dilation"),
        [(3, 3, 1, 1, 1), (5, 3, 1, 1, 1), (8, 3, 2, 1, 1), (7, 5, 1, 2, 1), (7, 3, 1, 1, 2), (40, 4, 1, 2, 1)],
    )
    def test_columns(
        self,
        instruction_set: str,
        dtype: torch.dtype,
        columns: int,
        pool: int,
        pool_stride: int,
        pool_padding: int,
        pool_dilation: int,
        special: float,
        last: bool,
    ) -> None:
        arguments = geometry(
            3, pool=pool, pool_stride=pool_stride, pool_padding=pool_padding, pool_dilation=pool_dilation
        )
        tensors = make((2, 3, 5, 6, columns), 20, (1, 1, 1), 1, dtype, last=last)
        assert_right_with(special, 2, tensors, arguments)


class TestPickedColumns:
    """Kernels that stride over contiguous images, few outputs: vectors pick their columns where these lie."""

    @pytest.mark.parametrize("columns", [3, 7, 8, 9, 15, 16, 17, 31, 33, 50])
    @pytest.mark.parametrize(("kernel", "stride"), [(1, 2), (1, 3), (2, 2), (2, 3), (3, 2), (3, 3), (5, 3)])
    @pytest.mark.parametrize(("channels", "outputs", "groups"), [(40, 1, 1), (33, 3, 1), (6, 10, 2), (5, 5, 5)])
    def test_like_stock(
        self,
        instruction_set: str,
        dtype: torch.dtype,
        channels: int,
        outputs: int,
        groups: int,
        kernel: int,
        stride: int,
        columns: int,
    ) -> None:
        height, width = (kernel + stride * (conv - 1) + 1 for conv in (5, columns))
        tensors = make((5, channels, height, width), outputs, (kernel, kernel), groups, dtype)
        for pool, pool_stride, pool_padding in ((2, 2, 0), (3, 2, 1), (3, 3, 0)):
            arguments = geometry(
                2, stride, groups=groups, pool=pool, pool_stride=pool_stride, pool_padding=pool_padding
            )
            assert_like_stock(tensors, arguments, gradients=False)

    @pytest.mark.parametrize("special", [0.0, -0.0, float("nan"), float("inf")])
    @pytest.mark.parametrize(("kernel", "stride"), [(1, 3), (2, 3), (3, 2)])
    def test_special_values(self, instruction_set: str, kernel: int, stride: int, special: float) -> None:
        """Also in columns that the kernel strides over, which no output may see."""
        for column in (9, 10, 11):
            tensors = make((2, 40, 20, 50), 3, (kernel, kernel))
            assert_right_with(special, column, tensors, geometry(2, stride, pool=3, pool_stride=2))

    @pytest.mark.parametrize(
        ("size", "kernel", "dilation"),
        [((3, 20, 100), (2,), 1), ((2, 24, 7, 9, 35), (2, 2, 2), 2), ((2, 24, 5, 8, 33), (1, 1, 1), 1)],
    )
    def test_dimensions(
        self, instruction_set: str, dtype: torch.dtype, size: tuple[int, ...], kernel: tuple[int, ...], dilation: int
    ) -> None:
        arguments = geometry(len(kernel), 2, dilation=dilation, pool=2)
        assert_like_stock(make(size, 4, kernel, 1, dtype), arguments, gradients=False)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_chosen(self, dtype: torch.dtype) -> None:
        tensors = make((1, 48, 112, 112), 16, (3, 3), 4, dtype)
        arguments = geometry(2, 2, groups=4, pool=2)
        assert algorithm("avx512", tensors, arguments) in ("rows", "")
        assert_same_bits(tensors, arguments)


class TestBfloat16InPlace:
    """Kernels of one tap and few outputs widen rows on the way."""

    @pytest.mark.parametrize("columns", [3, 8, 15, 16, 17, 33])
    @pytest.mark.parametrize(("channels", "outputs"), [(40, 1), (130, 4), (300, 12)])
    @pytest.mark.parametrize("special", [0.0, float("nan"), -float("inf")])
    def test_special_values(
        self, instruction_set: str, channels: int, outputs: int, columns: int, special: float
    ) -> None:
        for pool in ({"pool": 2}, {"pool": 3, "pool_stride": 1, "pool_padding": 1}):
            tensors = make((2, channels, 17, columns), outputs, (1, 1), 1, torch.bfloat16)
            assert_right_with(special, 2, tensors, geometry(2, **pool))

    def test_chosen(self) -> None:
        tensors = make((1, 256, 32, 32), 4, (1, 1), 1, torch.bfloat16)
        assert algorithm("avx512", tensors, geometry(2, pool=2)) in ("rows", "")
        assert_same_bits(tensors, geometry(2, pool=2))
