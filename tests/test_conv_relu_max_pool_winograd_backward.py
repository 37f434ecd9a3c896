"""conv_relu_max_pool's gradients by Winograd, where nothing is pooled: forced on every size, and where it is chosen."""

import itertools
from typing import Any

import pytest
import torch
from conv_cases import (
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

from fastnn.testing import assert_close_to_reference, instruction_sets, using_instruction_set, using_threads

INSTRUCTION_SETS = instruction_sets(bfloat16=False)
of_each_kernel = pytest.mark.parametrize(
    ("instructions", "dtype"),
    [(name, dtype) for name in INSTRUCTION_SETS for dtype in (torch.float32, torch.float64)],
    ids=lambda value: str(value).removeprefix("torch."),
)


def draw(
    size: tuple[int, ...], outputs: int, arguments: tuple[Any, ...], dtype: torch.dtype, last: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output's gradient, winners, input and weight."""
    input, weight, bias = make(size, outputs, (3, 3), arguments[3], dtype, last=last)
    output, winners = RAW_WITH_WINNERS(input, weight, bias, flat(arguments))
    return torch.randn_like(output), winners, input, weight


def gradients(tensors: tuple[Tensor, ...], arguments: tuple[Any, ...], *wanted: bool) -> tuple[Tensor, ...]:
    return RAW_BACKWARD(*tensors, flat(arguments), *(wanted or (True, True, True)), "winograd")


def stock(tensors: tuple[Tensor, ...], arguments: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
    gradient, winners, input, weight = tensors
    gradient = torch.where(winners == 255, 0, gradient)
    given = (tensor.to(dtype).contiguous() for tensor in (gradient, input, weight))
    _, padding, _, groups = arguments[:4]
    return list(
        torch.ops.aten.convolution_backward(
            *given, [len(weight)], [1, 1], padding, [1, 1], False, [0, 0], groups, [True] * 3
        )
    )


def assert_accurate(tensors: tuple[Tensor, ...], arguments: tuple[Any, ...], what: str) -> None:
    """Against float64, by one thread and by two, and each gradient alone."""
    ours = gradients(tensors, arguments)
    dtype = tensors[0].dtype
    assert_close_to_reference(ours, stock(tensors, arguments, dtype), stock(tensors, arguments, torch.float64), what)
    with using_threads(2):
        together = gradients(tensors, arguments)
    assert all(map(torch.equal, ours, together)), what
    for i in range(3):
        alone = gradients(tensors, arguments, *(i == j for j in range(3)))
        assert torch.equal(alone[i], ours[i]), what
        assert all(len(alone[j]) == 0 for j in range(3) if j != i)
    assert ours[0].stride() == torch.empty_like(tensors[2]).stride()
    assert ours[1].stride() == torch.empty_like(tensors[3]).stride()


class TestSizes:
    @of_each_kernel
    def test_pixels(self, instructions: str, dtype: torch.dtype) -> None:
        with using_instruction_set(instructions):
            for rows, columns in [(n, 18 - n) for n in range(1, 18)] + [(1, 1), (17, 17), (3, 140)]:
                for padding in ((1, 1), (2, 3), (0, 1), (3, 0), (9, 30)):
                    arguments = geometry(2, padding=padding, pool=1)
                    if rows + 2 * padding[0] < 3 or columns + 2 * padding[1] < 3:
                        continue
                    last = (rows + padding[0]) % 2 == 0
                    tensors = draw((2, 5, rows, columns), 19, arguments, dtype, last)
                    assert_accurate(tensors, arguments, f"{rows}x{columns}, padding {padding}, last {last}")

    @of_each_kernel
    def test_channels(self, instructions: str, dtype: torch.dtype) -> None:
        with using_instruction_set(instructions):
            for count in (1, 2, 3, 4, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 47, 49, 64, 65, 70):
                for channels, outputs in ((count, 5), (3, count), (count, count + 1)):
                    for last in (False, True):
                        arguments = geometry(2, padding=1, pool=1)
                        tensors = draw((2, channels, 6, 5), outputs, arguments, dtype, last)
                        assert_accurate(tensors, arguments, f"{channels} -> {outputs}, last {last}")

    @of_each_kernel
    @pytest.mark.parametrize("batch", [1, 3, 5])
    def test_images_and_groups(self, instructions: str, dtype: torch.dtype, batch: int) -> None:
        with using_instruction_set(instructions):
            for groups, last in itertools.product((1, 2, 3), (False, True)):
                arguments = geometry(2, padding=1, groups=groups, pool=1)
                tensors = draw((batch, 18 * groups, 9, 13), 35 * groups, arguments, dtype, last)
                assert_accurate(tensors, arguments, f"{groups} groups, last {last}")

    @pytest.mark.parametrize("size", [(3, 20, 70, 66), (40, 16, 9, 9), (1, 8, 5, 300)])
    def test_sums_in_parts(self, instruction_set: str, size: tuple[int, ...]) -> None:
        """More tiles than are summed at once, rows of tiles that a part cuts, images that it joins."""
        arguments = geometry(2, padding=1, pool=1)
        assert_accurate(draw(size, 24, arguments, torch.float32), arguments, str(size))

    def test_long_sums(self) -> None:
        """Of numbers of one sign, of which rounding shows."""
        arguments = geometry(2, padding=1, pool=1)
        tensors = draw((8, 32, 96, 96), 32, arguments, torch.float32)
        assert_accurate((tensors[0].abs(), tensors[1], tensors[2].abs(), tensors[3]), arguments, "long sums")


class TestLayouts:
    def test_formats_that_differ_and_views(self, instruction_set: str) -> None:
        arguments = geometry(2, padding=1, pool=1)
        gradient, winners, input, weight = draw((4, 20, 12, 14), 18, arguments, torch.float32)
        expected = gradients((gradient, winners, input, weight), arguments)
        for given, places in itertools.product((gradient, channels_last(gradient)), (winners, channels_last(winners))):
            for pixels, taps in itertools.product((input, channels_last(input)), (weight, channels_last(weight))):
                ours = gradients((given, places, pixels, taps), arguments)
                assert all(map(torch.equal, ours, expected))
        wide = torch.stack([gradient, gradient]).transpose(0, 1)[:, 1]  # images with gaps
        between = torch.stack([winners, winners]).transpose(0, 1)[:, 1]
        for given, places in (
            (wide, winners),
            (gradient, between),
            (wide, between),
            (gradient.mT.contiguous().mT, winners),
        ):
            assert all(map(torch.equal, gradients((given, places, input, weight), arguments), expected))

    def test_expanded_gradient(self) -> None:
        """That of a sum is one number with strides of 0."""
        arguments = geometry(2, padding=1, pool=1)
        _, winners, input, weight = draw((2, 20, 9, 10), 33, arguments, torch.float32, last=True)
        tensors = (torch.ones(1, 1, 1, 1).expand(winners.shape), winners, input, weight)
        expected = gradients((torch.ones(winners.shape), *tensors[1:]), arguments)
        assert all(map(torch.equal, gradients(tensors, arguments), expected))


def test_gradcheck() -> None:
    arguments = geometry(2, padding=1, pool=1)
    tensors = [tensor.requires_grad_() for tensor in make((2, 3, 5, 4), 4, (3, 3), dtype=torch.float64)]

    class ByWinograd(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            output, winners = RAW_WITH_WINNERS(input, weight, bias, flat(arguments))
            ctx.save_for_backward(winners, input, weight)
            return output

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
            return gradients((gradient, *ctx.saved_tensors), arguments)

    assert torch.autograd.gradcheck(ByWinograd.apply, tensors)


class TestSpecialValues:
    """Transforms would spread them over a tile, so such calls go another way, as in forward."""

    @pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf, 1e30])
    @pytest.mark.parametrize("of", [0, 2, 3])
    def test_stay_in_their_places(self, instruction_set: str, special: float, of: int) -> None:
        arguments = geometry(2, padding=1, pool=1)
        tensors = list(draw((2, 20, 9, 10), 33, arguments, torch.float32))
        tensors[1] = torch.zeros_like(tensors[1])
        tensors[of][1, 3, 1, 1] = special
        ours = gradients(tuple(tensors), arguments)
        exact = stock(tuple(tensors), arguments, torch.float64)
        magnitudes = stock(tuple(t.nan_to_num(0, 0, 0).abs() for t in tensors), arguments, torch.float64)
        for mine, right, magnitude in zip(ours, exact, magnitudes, strict=True):
            finite = right.isfinite()
            if special == 1e30:
                assert ((mine.double() - right).abs() <= 1e-4 * magnitude).all()
            assert torch.equal(mine.isfinite(), finite)
            assert torch.equal(mine.isnan(), right.isnan())

    def test_dead_gradients_do_not_count(self, instruction_set: str) -> None:
        arguments = geometry(2, padding=1, pool=1)
        gradient, winners, input, weight = draw((2, 20, 9, 10), 33, arguments, torch.float32)
        given = torch.where(winners == 255, torch.nan, gradient)
        ours = gradients((given, winners, input, weight), arguments)
        assert all(part.isfinite().all() for part in ours)


class TestChoice:
    @pytest.mark.parametrize("last", [False, True])
    @pytest.mark.parametrize(
        ("size", "outputs", "options", "dtype", "is_chosen"),
        [
            ((4, 64, 56, 56), 64, {}, torch.float32, True),
            ((8, 128, 28, 28), 128, {}, torch.float64, True),
            ((8, 512, 7, 7), 512, {}, torch.float32, True),
            ((8, 128, 28, 28), 128, {"groups": 2}, torch.float32, True),
            ((4, 64, 56, 56), 64, {"pool": 2}, torch.float32, False),
            ((4, 64, 56, 56), 64, {"stride": 2}, torch.float32, False),
            ((4, 64, 56, 56), 64, {"dilation": 2}, torch.float32, False),
            ((4, 64, 56, 56), 64, {}, torch.bfloat16, False),
            ((8, 1, 28, 28), 32, {}, torch.float32, False),
            ((32, 16, 32, 32), 16, {}, torch.float32, False),
            ((8, 64, 28, 28), 64, {"groups": 64}, torch.float32, False),
        ],
    )
    def test_where_it_multiplies_less(
        self,
        size: tuple[int, ...],
        outputs: int,
        options: dict[str, Any],
        dtype: torch.dtype,
        is_chosen: bool,
        last: bool,
    ) -> None:
        arguments = geometry(2, **{"padding": 1, "pool": 1, **options})
        tensors = make(size, outputs, (3, 3), arguments[3], dtype, last=last)
        for name in instruction_sets():
            with using_instruction_set(name):
                assert (RAW_ALGORITHM(*tensors, flat(arguments))[1] == "winograd") == is_chosen, name

    def test_in_training(self) -> None:
        """What autograd calls, against plain PyTorch."""
        for last in (False, True):
            tensors = make((2, 64, 33, 31), 72, (3, 3), last=last)
            assert RAW_ALGORITHM(*tensors, flat(geometry(2, padding=1, pool=1)))[1] == "winograd"
            assert_like_stock(tensors, geometry(2, padding=1, pool=1))
