"""conv_relu_max_pool's gradients: sizes and layouts that backward takes in ways of its own, and special values."""

import itertools
import math
from typing import Any

import pytest
import torch
from conv_cases import (
    CONV,
    FUSED,
    RAW,
    RAW_ALGORITHM,
    RAW_BACKWARD,
    RAW_WITH_WINNERS,
    assert_like_stock,
    channels_last,
    flat,
    geometry,
    make,
)
from torch import Tensor

from fastnn.testing import assert_close_to_reference, using_threads

ALGORITHMS = ("taps", "depthwise", "winograd", "winners", "stock")

# What each algorithm is forced on: classes of geometry, with sizes about those of vectors.
GEOMETRIES = {
    "1-d": ((2, 3, 70), 17, (5,), geometry(1, padding=2, pool=3)),
    "3-d": ((2, 2, 6, 9, 17), 9, (2, 3, 3), geometry(3, padding=(0, 1, 1), pool=(1, 2, 2))),
    "one element": ((3, 4, 15, 17), 33, (1, 1), geometry(2)),
    "overlapping": ((2, 3, 21, 35), 15, (3, 3), geometry(2, padding=1, pool=3, pool_stride=2, pool_padding=1)),
    "ceil_mode": ((2, 1, 20, 31), 16, (3, 2), geometry(2, pool=(2, 3), ceil_mode=True)),
    "apart": ((2, 4, 19, 20), 5, (3, 3), geometry(2, pool=2, pool_stride=3, pool_dilation=2)),
    "no pooling": ((2, 2, 9, 16), 31, (3, 3), geometry(2, padding=1, pool=1)),
    "dilation": ((2, 3, 18, 33), 20, (3, 3), geometry(2, padding=2, dilation=(2, 3))),
    "many channels": ((2, 33, 10, 9), 70, (3, 3), geometry(2, padding=1)),
    "stride": ((2, 20, 23, 30), 18, (3, 4), geometry(2, stride=(2, 3), padding=1)),
    "strides over": ((2, 20, 13, 15), 6, (1, 1), geometry(2, stride=(2, 3))),
    "groups": ((2, 12, 11, 12), 30, (3, 3), geometry(2, padding=1, groups=3)),
    "depthwise": ((2, 17, 21, 20), 17, (3, 5), geometry(2, padding=1, groups=17)),
    "depthwise, multiplied": ((2, 16, 14, 33), 48, (3, 3), geometry(2, stride=2, padding=1, dilation=2, groups=16)),
    "no pooling, groups": ((3, 18, 10, 7), 40, (3, 3), geometry(2, padding=(0, 2), groups=2, pool=1)),
    "a single pixel": ((3, 9, 3, 3), 20, (3, 3), geometry(2, pool=1)),
}


def gradient_of_the_convolution(
    grad_output: Tensor, winners: Tensor, sizes: torch.Size, arguments: tuple[Any, ...]
) -> Tensor:
    """From the winners one place at a time, in float64."""
    pool, pool_stride, pool_padding, pool_dilation = arguments[4:8]
    along = list(zip(pool, pool_stride, pool_padding, pool_dilation, sizes[2:], grad_output.shape[2:], strict=True))
    room = [max(p + size, (n - 1) * s + (k - 1) * d + 1) for k, s, p, d, size, n in along]
    padded = torch.zeros(*sizes[:2], *room, dtype=torch.float64)
    for number, place in enumerate(itertools.product(*map(range, pool))):
        starts = [i * d for i, (_, _, _, d, _, _) in zip(place, along, strict=True)]
        slices = [slice(i, i + s * (n - 1) + 1, s) for i, (_, s, _, _, _, n) in zip(starts, along, strict=True)]
        padded[(..., *slices)] += grad_output.double() * (winners == number)
    return padded[(..., *[slice(p, p + size) for _, _, p, _, size, _ in along])]


def assert_gradients_of_winners(
    input: Tensor, weight: Tensor, arguments: tuple[Any, ...], algorithm: str | None = None
) -> tuple[Tensor, ...]:
    """Backward is as accurate as torch's own convolution from the exact gradient of the convolution's output."""
    stride, padding, dilation, groups = arguments[:4]
    output, winners = RAW_WITH_WINNERS(input, weight, None, flat(arguments))
    grad_output = torch.randn_like(output)
    sizes = CONV[len(stride)](input, weight, None, stride, padding, dilation, groups).shape
    grad_conv = gradient_of_the_convolution(grad_output, winners, sizes, arguments)
    exact, stock = (
        torch.ops.aten.convolution_backward(
            grad_conv.to(kind), input.to(kind).contiguous(), weight.to(kind).contiguous(), [len(weight)], stride,
            padding, dilation, False, [0] * len(stride), groups, [True] * 3,
        )
        for kind in (torch.float64, input.dtype)
    )  # fmt: skip
    gradients = RAW_BACKWARD(grad_output, winners, input, weight, flat(arguments), True, True, True, algorithm)
    assert_close_to_reference(list(gradients), list(stock), list(exact))
    return gradients


class TestAlgorithms:
    @pytest.mark.parametrize("case", GEOMETRIES)
    def test_each_wherever_it_applies(self, instruction_set: str, dtype: torch.dtype, case: str) -> None:
        size, outputs, kernel, arguments = GEOMETRIES[case]
        stride, groups = arguments[0], arguments[3]
        channels, dense = size[1] // groups, set(stride) == {1}
        is_small = channels <= 16 and channels * math.prod(kernel) <= 128
        transforms = kernel == (3, 3) and set(arguments[2]) == {1} and set(arguments[4]) == {1}
        by_winograd = dense and transforms and dtype is not torch.bfloat16
        applies = (is_small and dense, channels == 1, by_winograd, True, dense)
        for last in (False, True) if len(kernel) > 1 else (False,):
            input, weight, _ = make(size, outputs, kernel, groups, dtype, last=last)
            for algorithm, is_applicable in zip(ALGORITHMS, applies, strict=True):
                if is_applicable:
                    with using_threads(2 if last else 1):
                        assert_gradients_of_winners(input, weight, arguments, algorithm)
                else:
                    with pytest.raises(RuntimeError, match="does not apply to this call"):
                        assert_gradients_of_winners(input, weight, arguments, algorithm)

    # Kernels of one pixel: contiguous images are multiplied as they lie.
    @pytest.mark.parametrize(
        ("sizes", "outputs"),
        [((2, 32, 20, 21), 70), ((3, 5, 17, 19), 29), ((2, 40, 9, 15), 3), ((5, 18, 133), 20), ((2, 3, 4, 5, 6), 17)],
    )
    @pytest.mark.parametrize("threads", [1, 2])
    def test_pointwise(self, sizes: tuple[int, ...], outputs: int, threads: int, instruction_set: str) -> None:
        dims = len(sizes) - 2
        input, weight, bias = make(sizes, outputs, (1,) * dims)
        arguments = geometry(dims, pool=1)
        with using_threads(threads):
            assert RAW_ALGORITHM(input, weight, bias, flat(arguments)) == ("pointwise", "pointwise")
            assert_gradients_of_winners(input, weight, arguments)
            input[0, 1, ..., 2] = torch.nan
            input[1, 0, ..., 0] = torch.inf
            output, winners = RAW_WITH_WINNERS(input, weight, bias, flat(arguments))
            expected = CONV[dims](input, weight, bias).relu()
            torch.testing.assert_close(output, expected, equal_nan=True)
            assert torch.equal(winners == 255, output <= 0)
            assert torch.equal(RAW(input, weight, bias, flat(arguments)).nan_to_num(), output.nan_to_num())

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_sums_over_many_images(self, algorithm: str, instruction_set: str) -> None:
        """The bias's gradient is the sum of equal terms, which a running sum in float32 would round ever more."""
        groups, images = (4 if algorithm == "depthwise" else 1), 60000
        input, weight = torch.ones(images, 4, 3, 3), torch.ones(4, 4 // groups, 3, 3)
        arguments = flat(geometry(2, padding=1, groups=groups, pool=1))
        output, winners = RAW_WITH_WINNERS(input, weight, None, arguments)
        gradient = torch.full((), 0.1).expand_as(output)
        made = RAW_BACKWARD(gradient, winners, input, weight, arguments, True, True, True, algorithm)[2]
        exact = gradient.double().sum((0, 2, 3))
        assert_close_to_reference(made, exact.float(), exact)

    def test_there_is_no_other(self) -> None:
        input, weight, _ = make((1, 2, 6, 6), 3, (3, 3))
        with pytest.raises(RuntimeError, match="there is no algorithm 'pixels'"):
            assert_gradients_of_winners(input, weight, geometry(2), "pixels")


class TestBackward:
    @pytest.mark.parametrize(
        ("size", "channels", "kernel", "arguments"),
        [
            ((3, 20, 8, 8), 512, (11, 11), geometry(2, padding=5, pool=3, pool_stride=2, pool_padding=1)),
            ((2, 3, 40, 60), 20, (21, 31), geometry(2, padding=(10, 15))),
            ((2, 16, 9, 9), 2048, (5, 5), geometry(2, padding=2, groups=16)),
        ],
    )
    def test_long_sums_in_the_input_gradient(
        self,
        instruction_set: str,
        size: tuple[int, ...],
        channels: int,
        kernel: tuple[int, ...],
        arguments: Any,
    ) -> None:
        assert_like_stock(make(size, channels, kernel, arguments[3]), arguments)

    @pytest.mark.parametrize("special", [torch.inf, -torch.inf, torch.nan])
    def test_special_gradients_stay_in_their_group(self, instruction_set: str, special: float) -> None:
        input, weight, _ = make((2, 8, 9, 10), 12, (2, 2), 4)
        arguments = flat(geometry(2, groups=4))
        output, winners = RAW_WITH_WINNERS(input, weight, None, arguments)
        winners.fill_(0)
        grad_output = torch.ones_like(output)
        grad_output[1, 3:6, 2, 3] = special  # of the second group
        grad_input, grad_weight, grad_bias = RAW_BACKWARD(grad_output, winners, input, weight, arguments, *[True] * 3)
        touched = ~grad_input.isfinite()
        assert touched[1, 2:4, 4:6, 6:8].all()
        assert touched.sum() == 8
        assert (~grad_weight.isfinite()).flatten(1).all(1).tolist() == [3 <= i < 6 for i in range(12)]
        assert grad_bias.isfinite().sum() == 9

    @pytest.mark.parametrize("last", ["", "both"])
    @pytest.mark.parametrize(
        ("size", "channels", "kernel", "arguments"),
        [
            # Windows that overlap across the bands that the gradient of the convolution is laid out in.
            ((3, 2, 24, 24), 12, (7, 7), geometry(2, padding=3, pool=3, pool_stride=1, pool_padding=1)),
            ((1, 4, 40, 39), 144, (3, 3), geometry(2, padding=1, groups=2, pool=3, pool_stride=2)),
            ((1, 3, 9, 30, 41), 20, (2, 3, 1), geometry(3, pool=(3, 2, 3), pool_stride=(1, 3, 2))),
            ((2, 40, 90, 70), 40, (3, 3), geometry(2, padding=1, groups=40, pool=3, pool_stride=2)),
            ((2, 24, 30, 29), 48, (5, 4), geometry(2, stride=(2, 1), groups=24, pool=2, pool_dilation=2)),
            ((1, 17, 9, 40), 17, (1, 13), geometry(2, padding=(0, 6), groups=17, pool=(3, 2))),
            # Large windows.
            ((2, 5, 33, 32), 9, (3, 3), geometry(2, pool=5, pool_dilation=2, pool_stride=3, pool_padding=2)),
            ((1, 20, 23, 22), 18, (1, 1), geometry(2, groups=2, pool=5)),
            # Bands that are small so that many channels of the input stay in the cache.
            ((1, 200, 6, 12, 13), 5, (1, 1, 1), geometry(3)),
            # Groups of few channels.
            ((2, 24, 15, 20), 32, (1, 1), geometry(2, groups=4, pool=3, pool_stride=2)),
            ((2, 8, 7, 8, 9), 24, (2, 2, 2), geometry(3, groups=4, pool=3, pool_stride=1, pool_padding=1)),
            ((2, 12, 30), 6, (3,), geometry(1, padding=1, groups=6)),
            ((2, 4, 13, 12), 4, (3, 5), geometry(2, groups=2, pool=(4, 3))),
            ((2, 16, 8, 9, 20), 16, (2, 3, 3), geometry(3, dilation=(1, 2, 1), groups=16, pool_stride=1)),
            # Kernels of one element.
            ((2, 5, 70, 61), 3, (1, 1), geometry(2, pool=3, pool_stride=1, pool_padding=1)),
            ((1, 2, 9001), 37, (1,), geometry(1, pool=3, pool_stride=2)),
            ((1, 1, 50, 90), 2, (1, 1), geometry(2, pool=(2, 3), pool_dilation=2)),
            ((9, 33, 7, 4, 5), 1, (1, 1, 1), geometry(3, pool=2)),
            # Images of which only a window is in memory.
            ((1, 16, 9001), 5, (5,), geometry(1, padding=2, pool=3, pool_stride=2)),
            ((1, 16, 9001), 5, (4,), geometry(1, dilation=3)),
            ((2, 3, 190, 191), 8, (7, 7), geometry(2, stride=2, padding=3, pool=3, pool_stride=2, pool_padding=1)),
            ((1, 40, 60, 61), 6, (3, 2), geometry(2, padding=1, dilation=2)),
            ((1, 16, 103, 100), 3, (2, 2), geometry(2, stride=(5, 3))),
            ((1, 8, 20, 30, 31), 6, (3, 3, 2), geometry(3, padding=1)),
            ((1, 20, 12, 40, 41), 3, (1, 1, 1), geometry(3, stride=(1, 1, 3), pool=(2, 3, 2))),
            ((1, 20, 3, 80, 41), 20, (3, 3, 3), geometry(3, padding=(0, 1, 1), groups=20, pool=(1, 2, 2))),
        ],
    )
    def test_backward_in_bands(
        self,
        instruction_set: str,
        dtype: torch.dtype,
        size: tuple[int, ...],
        channels: int,
        kernel: tuple[int, ...],
        arguments: Any,
        last: str,
    ) -> None:
        input, weight, bias = make(size, channels, kernel, arguments[3], dtype)
        if last:
            input, weight = channels_last(input), channels_last(weight)
        assert_like_stock([input, weight, bias], arguments)
        output, winners = RAW_WITH_WINNERS(input, weight, bias, flat(arguments))
        gradients = RAW_BACKWARD(output, winners, input, weight, flat(arguments), True, True, True)
        for wanted in ((True, False, False), (False, True, False), (False, False, True)):
            some = RAW_BACKWARD(output, winners, input, weight, flat(arguments), *wanted)
            for alone, together, is_wanted in zip(some, gradients, wanted, strict=True):
                assert torch.equal(alone, together) if is_wanted else alone.shape[0] == 0

    @pytest.mark.parametrize("last", ["", "input", "weight", "both"])
    @pytest.mark.parametrize(
        ("size", "channels", "kernel", "pool", "pool_stride"),
        [
            ((4, 64, 10, 9), 96, (7, 7), (2, 2), (2, 1)),
            ((5, 20, 14, 14), 130, (11, 11), (3, 2), (1, 2)),
            ((4, 1030, 3, 2, 3), 33, (2, 2, 2), (2, 1, 1), (1, 1, 1)),
            ((3, 64, 50, 52), 12, (1, 1), (2, 2), (2, 2)),
            ((2, 32, 12, 24, 25), 70, (1, 1, 1), (2, 2, 2), (3, 1, 2)),
        ],
    )
    def test_by_stock(
        self,
        dtype: torch.dtype,
        size: tuple[int, ...],
        channels: int,
        kernel: tuple[int, ...],
        pool: tuple[int, ...],
        pool_stride: tuple[int, ...],
        last: str,
    ) -> None:
        arguments = geometry(len(kernel), pool=pool, pool_stride=pool_stride)
        input, weight, bias = make(size, channels, kernel, 1, dtype)
        input = channels_last(input) if last in ("input", "both") else input
        weight = channels_last(weight) if last in ("weight", "both") else weight
        expected = dtype is not torch.float64 and math.prod(kernel) > 1
        assert (RAW_ALGORITHM(input, weight, bias, flat(arguments))[1] == "stock") == expected
        gradients = assert_gradients_of_winners(input, weight, arguments)
        assert gradients[0].stride() == torch.empty_like(input).stride()
        output, winners = RAW_WITH_WINNERS(input, weight, bias, flat(arguments))
        given = (torch.randn_like(output), winners, input, weight, flat(arguments))
        gradients, again = (RAW_BACKWARD(*given, True, True, True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
        assert RAW_BACKWARD(*given, True, True, False)[2].numel() == 0

    @pytest.mark.parametrize(("groups", "backward"), [(1, "winners"), (2, "winners"), (64, "depthwise")])
    def test_which_has_channels_in_the_lanes(self, groups: int, backward: str) -> None:
        tensors = make((2, 64, 9, 9), 64, (3, 3), groups)
        assert RAW_ALGORITHM(*tensors, flat(geometry(2, groups=groups)))[1] == backward

    @pytest.mark.parametrize(
        ("channels", "outputs", "kernel", "stride", "backward"),
        [(1, 32, 3, 1, "taps"), (2, 5, 3, 1, "taps"), (1, 32, 3, 2, "winners"), (16, 32, 3, 1, "winners")],
    )
    def test_which_has_pixels_in_the_lanes(
        self, channels: int, outputs: int, kernel: int, stride: int, backward: str
    ) -> None:
        tensors = make((2, channels, 28, 28), outputs, (kernel, kernel))
        assert RAW_ALGORITHM(*tensors, flat(geometry(2, stride=stride, padding=1)))[1] == backward

    @pytest.mark.parametrize("dims", [1, 2, 3])
    @pytest.mark.parametrize(
        "pool", [{}, {"pool": 3, "pool_stride": 2, "pool_padding": 1}, {"pool": 2, "ceil_mode": True}]
    )
    @pytest.mark.parametrize(("outputs", "dilation", "last"), [(3, 1, False), (70, 2, False), (33, 1, True)])
    def test_pixels_in_the_lanes_for_each_tap(
        self, dims: int, pool: dict[str, Any], outputs: int, dilation: int, last: bool, instruction_set: str
    ) -> None:
        size = {1: (2, 1, 2500), 2: (2, 1, 45, 61), 3: (2, 1, 11, 13, 37)}[dims]
        tensors = make(size, outputs, (3,) * dims, last=last and dims > 1)
        arguments = geometry(dims, padding=1, dilation=dilation, **pool)
        if dims < 3:  # there, vectors of few lanes make it lists
            assert RAW_ALGORITHM(*tensors, flat(arguments))[1] == "taps"
        assert_like_stock(tensors, arguments)

    @pytest.mark.parametrize("of", ["input", "weight"])
    def test_infinity_does_not_spread_to_the_next_row(self, of: str) -> None:
        input, weight, _ = make((1, 1, 28, 28), 32, (3, 3), bias=False)
        (input if of == "input" else weight).view(-1)[0] = torch.inf
        output, winners = RAW_WITH_WINNERS(input, weight, None, flat(geometry(2, padding=1)))
        winners.fill_(0)
        grad_output = torch.zeros_like(output)
        gradients = RAW_BACKWARD(grad_output, winners, input, weight, flat(geometry(2, padding=1)), True, True, False)
        # The last tap of a row does not meet the first pixel, nor the first tap's weight the last pixels.
        assert not gradients[1 if of == "input" else 0][..., -1].isnan().any()

    def test_infinite_gradient_stays_in_its_place(self, instruction_set: str) -> None:
        input = torch.rand(1, 3, 8, 8, requires_grad=True)
        weight = torch.rand(4, 3, 3, 3)
        output = FUSED[2](input, weight)
        grad = torch.zeros_like(output)
        grad[0, 0, 0, 0] = float("inf")
        (gradient,) = torch.autograd.grad(output, input, grad)
        assert gradient.isinf().sum() == 27
        assert not gradient.isnan().any()

    def test_backward_repeats_bit_for_bit(self) -> None:
        tensors = [t.requires_grad_() for t in make((6, 8, 30, 30), 24, (3, 3))]

        def gradients() -> tuple[Tensor, ...]:
            return torch.autograd.grad(FUSED[2](*tensors, padding=1).square().sum(), tensors)

        with using_threads(2):
            for first, second in zip(gradients(), gradients(), strict=True):
                assert torch.equal(first, second)

    @pytest.mark.parametrize("case", ["stride", "apart", "overlapping", "3-d", "zipped"])
    @pytest.mark.parametrize("layout", ["channels last", "expanded", "every second", "a part", "turned"])
    def test_gradients_wherever_they_lie(self, instruction_set: str, case: str, layout: str) -> None:
        sizes = {**GEOMETRIES, "zipped": ((3, 40, 12, 18), 33, (3, 3), geometry(2))}[case]
        dtype = torch.bfloat16 if case == "zipped" else torch.float32
        input, weight, _ = make(*sizes[:3], sizes[3][3], dtype)
        output, winners = RAW_WITH_WINNERS(input, weight, None, flat(sizes[3]))
        gradient = torch.randn_like(output)
        if layout == "channels last":
            gradient = channels_last(gradient)
        elif layout == "expanded":
            gradient = gradient[..., :1].expand_as(output)
        elif layout == "every second":
            gradient = torch.stack([gradient, torch.full_like(gradient, math.nan)], -1)[..., 0]
        elif layout == "a part":
            gradient = torch.nn.functional.pad(gradient, (1, 2, 3, 1), value=math.nan)[..., 3:-1, 1:-2]
        else:
            gradient = gradient.transpose(-1, -2).contiguous().transpose(-1, -2)

        def gradients(grad_output: Tensor, input_wanted: bool) -> tuple[Tensor, ...]:
            wanted = (input_wanted, True, True)
            return RAW_BACKWARD(grad_output, winners, input, weight, flat(sizes[3]), *wanted, "winners")

        for input_wanted in (True, False):
            expected = gradients(gradient.contiguous(), input_wanted)
            for found, wanted in zip(gradients(gradient, input_wanted), expected, strict=True):
                assert torch.equal(found, wanted)

    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize(
        ("channels", "outputs", "kernel", "groups", "backward"),
        [(1, 16, 3, 1, "taps"), (3, 64, 5, 1, "winners"), (64, 64, 3, 64, "depthwise")],
    )
    def test_images_shared_by_threads(
        self, batch: int, channels: int, outputs: int, kernel: int, groups: int, backward: str
    ) -> None:
        tensors = make((batch, channels, 61, 70), outputs, (kernel, kernel), groups)
        arguments = geometry(2, groups=groups)
        assert RAW_ALGORITHM(*tensors, flat(arguments))[1] == backward
        with using_threads(2):
            assert_like_stock(tensors, arguments)
