"""fastnn.functional.conv_relu_max_pool against plain PyTorch: values, layouts, threads."""

from typing import Any

import pytest
import torch
from conv_cases import (
    FUSED,
    RAW_WITH_WINNERS,
    assert_like_stock,
    channels_last,
    error_of,
    flat,
    geometry,
    make,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fastnn.reference import conv_relu_max_pool as reference
from fastnn.testing import compare_with_stock, using_threads


class TestValues:
    def test_output_channels(self, instruction_set: str, dtype: torch.dtype) -> None:
        for out_channels in (1, 2, 7, 8, 10, 16, 17, 31, 32, 33, 50):
            assert_like_stock(make((2, 3, 13, 17), out_channels, (3, 3), dtype=dtype), geometry(2, padding=1))

    def test_input_channels(self, instruction_set: str, dtype: torch.dtype) -> None:
        for in_channels in (1, 2, 7, 8, 9, 15, 16, 17, 33):
            tensors = make((2, in_channels, 9, 11), 12, (3, 2), dtype=dtype)
            assert_like_stock(tensors, geometry(2, padding=1))
            assert_like_stock([channels_last(tensors[0]), *tensors[1:]], geometry(2, padding=1))

    def test_widths(self, instruction_set: str) -> None:
        for width in (2, 3, 13, 14, 15, 16, 28, 29, 30, 61, 300):
            assert_like_stock(make((1, 2, 5, width), 18, (2, 2)), geometry(2, padding=1))

    @pytest.mark.parametrize("groups", [2, 3, 6])
    def test_groups(self, instruction_set: str, groups: int) -> None:
        assert_like_stock(make((2, 6, 8, 9), 12, (3, 3), groups), geometry(2, groups=groups))
        assert_like_stock(make((3, 6, 8, 9), 6, (3, 3), groups), geometry(2, padding=1, groups=groups))

    @pytest.mark.parametrize(
        "arguments",
        [
            geometry(2, stride=(2, 3), padding=(1, 2)),
            geometry(2, dilation=(2, 3), padding=3),
            geometry(2, pool=3, pool_stride=2, pool_padding=1),
            geometry(2, pool=(3, 2), pool_stride=(1, 3), pool_dilation=(2, 1), ceil_mode=True),
            geometry(2, pool=(4, 1), pool_stride=1, pool_padding=(2, 0), pool_dilation=3),
            geometry(2, padding=5, pool=2, pool_stride=5),
            geometry(2, pool=1, pool_stride=1),
            geometry(2, pool=2, pool_stride=3, ceil_mode=True),
        ],
    )
    def test_geometries(self, instruction_set: str, dtype: torch.dtype, arguments: tuple[Any, ...]) -> None:
        assert_like_stock(make((2, 3, 19, 21), 20, (3, 2), dtype=dtype), arguments)

    @pytest.mark.parametrize("bias", [True, False])
    def test_one_dimension(self, instruction_set: str, dtype: torch.dtype, bias: bool) -> None:
        assert_like_stock(make((3, 5, 700), 33, (5,), dtype=dtype, bias=bias), geometry(1, padding=2, pool=4))
        assert_like_stock(
            make((2, 4, 501), 8, (3,), 2, dtype, bias),
            geometry(1, stride=2, groups=2, pool=3, pool_stride=2, pool_padding=1, ceil_mode=True),
        )

    def test_three_dimensions(self, instruction_set: str, dtype: torch.dtype) -> None:
        assert_like_stock(make((2, 2, 7, 8, 9), 17, (3, 3, 3), dtype=dtype), geometry(3, padding=1))
        assert_like_stock(
            make((1, 4, 9, 6, 8), 6, (2, 1, 3), 2, dtype),
            geometry(3, stride=(1, 2, 1), groups=2, pool=3, pool_stride=(2, 1, 2), pool_padding=1),
        )

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(data=st.data())
    def test_random_geometries(self, data: st.DataObject) -> None:
        torch.manual_seed(0)
        dims = data.draw(st.integers(1, 3))

        def each(least: int, most: int) -> list[int]:
            return data.draw(st.lists(st.integers(least, most), min_size=dims, max_size=dims))

        groups = data.draw(st.integers(1, 3))
        pool = each(1, 3)
        arguments = geometry(
            dims, each(1, 3), each(0, 3), each(1, 2), groups, pool, each(1, 3),
            [p // 2 * data.draw(st.integers(0, 1)) for p in pool], each(1, 2), data.draw(st.booleans()),
        )  # fmt: skip
        size = (data.draw(st.integers(0, 3)), groups * data.draw(st.integers(1, 18)), *each(3, 12 if dims < 3 else 7))
        # Several channels: the tolerance is a share of the largest output, which must not be small by chance.
        tensors = make(size, groups * data.draw(st.integers(4, 18)), tuple(each(1, 3)), groups)
        stock_error = error_of(reference.conv_relu_max_pool, *tensors, *arguments)
        if stock_error:
            assert error_of(FUSED[dims], *tensors, *arguments) == stock_error
            return
        tensors = [channels_last(t) if t.dim() > 2 and data.draw(st.booleans()) else t for t in tensors]
        assert_like_stock(tensors, arguments)


class TestSpecialValues:
    def test_nan_and_infinity(self, instruction_set: str, dtype: torch.dtype) -> None:
        input = torch.randn(2, 2, 12, 12, dtype=dtype)
        input[0, 0, 3, 4] = float("nan")
        input[0, 1, 9, 9] = float("inf")
        input[1, 0, 2, 2] = float("-inf")
        weight = torch.randn(20, 2, 1, 1, dtype=dtype)
        assert_like_stock([input, weight, None], geometry(2, pool=3, pool_stride=2, pool_padding=1), gradients=False)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # stock's bfloat16 gives 0
    def test_negative_zero_stays(self, instruction_set: str, dtype: torch.dtype) -> None:
        """As max(x, 0) has it, and torch on x86-64; torch's ReLU on ARM makes 0 of -0."""
        zeros = torch.full((1, 1, 4, 4), -0.0, dtype=dtype)
        one = torch.ones(1, 1, 1, 1, dtype=dtype)
        bias = torch.full((1,), -0.0, dtype=dtype)
        assert FUSED[2](zeros, one, bias, *geometry(2)).signbit().all()

    def test_denormals_stay(self, instruction_set: str) -> None:
        input = torch.full((1, 1, 4, 4), 1e-40)
        assert_close(FUSED[2](input, torch.ones(1, 1, 1, 1)), input[..., :2, :2], rtol=0, atol=0)

    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_ties_go_to_the_first_and_nan_to_the_last(self, instruction_set: str, dims: int) -> None:
        weight = torch.ones(1, 1, *[1] * dims)
        for fill, expected in ((1.0, 0), (float("nan"), -1), (0.0, None)):
            input = torch.full((1, 1, *[2] * dims), fill, requires_grad=True)
            (gradient,) = torch.autograd.grad(FUSED[dims](input, weight).sum(), input)
            wanted = torch.zeros(2**dims)
            if expected is not None:
                wanted[expected] = 1
            assert_close(gradient.flatten(), wanted, rtol=0, atol=0)

    def test_windows_of_padding_alone(self, instruction_set: str, dtype: torch.dtype) -> None:
        # Dilated windows that begin in the padding and step over a short convolution.
        tensors = make((2, 3, 4, 3), 5, (1, 1), dtype=dtype)
        arguments = geometry(2, pool=2, pool_stride=1, pool_padding=1, pool_dilation=5)
        with pytest.raises(RuntimeError, match="too small"):
            FUSED[2](*tensors, *arguments)
        tensors = make((2, 3, 5, 5), 5, (1, 1), dtype=dtype)
        arguments = geometry(2, pool=2, pool_stride=1, pool_padding=1, pool_dilation=6)
        assert torch.isinf(FUSED[2](*tensors, *arguments)).any()
        compare_with_stock(
            lambda *t: FUSED[2](*t, *arguments).nan_to_num(neginf=0),
            lambda *t: reference.conv_relu_max_pool(*t, *arguments).nan_to_num(neginf=0),
            tensors,
            dtype is not torch.bfloat16,
        )


class TestLayouts:
    @pytest.mark.parametrize("which", ["input", "weight", "both"])
    def test_channels_last(self, instruction_set: str, dtype: torch.dtype, which: str) -> None:
        for dims, size in ((2, (2, 20, 9, 10)), (3, (2, 5, 4, 6, 5))):
            input, weight, bias = make(size, 18, (3,) * dims, dtype=dtype)
            input = channels_last(input) if which != "weight" else input
            weight = channels_last(weight) if which != "input" else weight
            assert_like_stock([input, weight, bias], geometry(dims, padding=1))
            with using_threads(2):  # stock's choice for three dimensions depends on it
                stock = reference.conv_relu_max_pool(input, weight, bias, *geometry(dims, padding=1))
            assert FUSED[dims](input, weight, bias, padding=1).stride() == stock.stride()

    def test_strided_expanded_and_offset(self, instruction_set: str) -> None:
        input, weight, bias = make((2, 3, 12, 14), 10, (3, 3))
        for view in (
            torch.randn(4, 6, 24, 14)[1::2, ::2, ::2],
            torch.randn(2, 3, 14, 12).transpose(2, 3),
            input[:1].expand(4, -1, -1, -1),
            input[..., :1].expand(-1, -1, -1, 9),
            torch.randn(10, 3, 12, 14)[3:5].flip(0),
        ):
            assert_like_stock([view, weight, bias], geometry(2, padding=1))
        assert_like_stock([input, weight.transpose(2, 3), bias[:1].expand(10)], geometry(2))

    def test_unbatched(self, dtype: torch.dtype) -> None:
        for dims in (1, 2, 3):
            input, weight, bias = make((1, 4, *[8] * dims), 6, (3,) * dims, dtype=dtype)
            assert_like_stock([input[0], weight, bias], geometry(dims))

    def test_empty_batch(self, dtype: torch.dtype) -> None:
        assert_like_stock(make((0, 4, 9, 9), 6, (3, 3), dtype=dtype), geometry(2))

    def test_large_windows(self) -> None:
        # More places than a byte has: no winners are kept, stock's path has the gradient.
        tensors = make((2, 3, 20, 20), 5, (3, 3))
        assert_like_stock(tensors, geometry(2, pool=16))
        with pytest.raises(RuntimeError, match="at most 254 elements, got 256"):
            RAW_WITH_WINNERS(*tensors, flat(geometry(2, pool=16)))


class TestThreads:
    @pytest.mark.parametrize(
        ("size", "out_channels", "kernel", "arguments"),
        [
            ((4, 3, 40, 44), 40, (3, 3), geometry(2, padding=1)),
            ((1, 16, 30, 30), 64, (3, 3), geometry(2, pool=3, pool_stride=2, pool_padding=1)),
            ((2, 64, 30, 30), 64, (3, 3), geometry(2, padding=1)),
            ((3, 64, 31, 15), 96, (3, 3), geometry(2, padding=1, pool=3, pool_stride=3)),
            ((2, 160, 7, 9), 192, (3, 3), geometry(2, padding=1)),
            ((90, 3, 20, 20), 10, (5, 5), geometry(2, stride=2, padding=2)),
            ((1, 200, 7, 7), 100, (3, 3), geometry(2)),
            ((3, 8, 900), 16, (5,), geometry(1, pool=4)),
            ((1, 2, 12, 13, 14), 16, (3, 3, 3), geometry(3, pool=3, pool_stride=2)),
            ((3, 30, 9, 9), 40, (7, 7), geometry(2, padding=3, pool=3, pool_stride=1)),
            ((1, 70, 40, 40), 70, (5, 5), geometry(2, padding=2, groups=70, pool=3, pool_stride=2)),
            # Gradients of parts of an image.
            ((1, 3, 151, 60), 16, (7, 7), geometry(2, stride=2, padding=3, pool=3, pool_stride=2, pool_padding=1)),
            ((1, 4, 200, 31), 12, (2, 3), geometry(2, stride=(3, 1))),
            ((1, 3, 3001), 10, (5,), geometry(1, padding=2, dilation=2)),
            ((1, 8, 70, 9, 10), 12, (2, 1, 1), geometry(3, groups=2, pool=3, pool_stride=2)),
        ],
    )
    def test_any_number_gives_the_same_bits(
        self, dtype: torch.dtype, size: tuple[int, ...], out_channels: int, kernel: Any, arguments: tuple[Any, ...]
    ) -> None:
        tensors = make(size, out_channels, kernel, arguments[3], dtype)
        fused = FUSED[len(kernel)]
        expected = fused(*tensors, *arguments)
        for threads in (2, 3, 5):
            with using_threads(threads):
                assert torch.equal(fused(*tensors, *arguments), expected)
                assert torch.equal(RAW_WITH_WINNERS(*tensors, flat(arguments))[0], expected)
                assert_like_stock(tensors, arguments)
