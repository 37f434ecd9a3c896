"""conv_relu_max_pool's backward where one instruction multiplies two bfloat16, of two winners."""

from typing import Any

import pytest
import torch
from conv_cases import RAW_BACKWARD, RAW_WITH_WINNERS, channels_last, flat, geometry, make
from torch import Tensor

CASES = [
    # Channels about those of a vector, and of two.
    *(((2, channels, 9, 10), 17, (3, 3), geometry(2, padding=1)) for channels in (17, 20, 31, 32, 33, 63, 64, 65)),
    *(((2, 64, 12, 11), channels, (2, 2), geometry(2)) for channels in (1, 2, 15, 16, 33, 130)),
    # Kernels of one register block, and of several.
    ((3, 128, 7, 8), 24, (1, 1), geometry(2)),
    ((2, 70, 30), 40, (1,), geometry(1, pool=3)),
    ((2, 64, 40), 9, (5,), geometry(1, padding=2, stride=2)),
    ((2, 96, 13, 12), 20, (5, 4), geometry(2, padding=2)),
    ((1, 48, 18, 17), 12, (7, 9), geometry(2, padding=(3, 4))),
    ((2, 40, 6, 7, 8), 12, (2, 3, 2), geometry(3, padding=1)),
    ((1, 64, 9, 8, 7), 20, (1, 1, 1), geometry(3)),
    # Strides, dilation, groups, windows apart or cut off by padding.
    ((2, 64, 20, 21), 24, (3, 3), geometry(2, stride=(3, 2), padding=1)),
    ((2, 32, 20, 21), 24, (3, 3), geometry(2, dilation=(2, 3), padding=2)),
    ((2, 64, 14, 14), 48, (3, 3), geometry(2, padding=1, groups=2)),
    ((2, 32, 15, 15), 16, (3, 3), geometry(2, pool=2, pool_stride=3)),
    ((2, 32, 15, 15), 16, (3, 3), geometry(2, pool=(3, 2), pool_padding=1, ceil_mode=True)),
    # Several bands, and windows of the image.
    ((1, 64, 61, 60), 130, (3, 3), geometry(2, padding=1)),
    ((1, 256, 33, 40), 100, (3, 3), geometry(2, padding=1)),
    ((1, 64, 9001), 20, (3,), geometry(1)),
]


def integers(size: tuple[int, ...], channels: int, kernel: tuple[int, ...], arguments: Any) -> list[Tensor]:
    """Input, weight and a gradient of the output, a third of it zeros."""
    input, weight, _ = make(size, channels, kernel, arguments[3], bias=False)
    input, weight = (torch.randint_like(tensor, -2, 3) for tensor in (input, weight))
    output = RAW_WITH_WINNERS(input, weight, None, flat(arguments))[0]
    return [input, weight, torch.randint_like(output, -1, 2)]


def gradients(tensors: list[Tensor], arguments: Any, dtype: torch.dtype, winners: Tensor) -> tuple[Tensor, ...]:
    input, weight, grad_output = (tensor.to(dtype) for tensor in tensors)
    return RAW_BACKWARD(grad_output, winners, input, weight, flat(arguments), True, True, True)


class TestZippedRuns:
    @pytest.mark.parametrize("last", [False, True])
    @pytest.mark.parametrize(("size", "channels", "kernel", "arguments"), CASES)
    def test_exact_on_integers(
        self,
        every_instruction_set: str,
        size: tuple[int, ...],
        channels: int,
        kernel: tuple[int, ...],
        arguments: Any,
        last: bool,
    ) -> None:
        """All sums are exact in float32, so that the gradients are the exact ones, rounded once."""
        tensors = integers(size, channels, kernel, arguments)
        if last:
            tensors = [channels_last(tensor) for tensor in tensors]
        winners = RAW_WITH_WINNERS(tensors[0], tensors[1], None, flat(arguments))[1]
        exact = gradients(tensors, arguments, torch.float64, winners)
        for ours, expected in zip(gradients(tensors, arguments, torch.bfloat16, winners), exact, strict=True):
            assert torch.equal(ours, expected.bfloat16())

    @pytest.mark.parametrize("special", [torch.inf, -torch.inf, torch.nan])
    @pytest.mark.parametrize("of", [0, 1, 2])
    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_special_numbers_stay_in_their_place(
        self, every_instruction_set: str, special: float, of: int, count: int
    ) -> None:
        """Also those beside a winner that has no other to be multiplied with."""
        arguments = geometry(2, padding=1)
        tensors = integers((1, 40, 8, 8), 16, (3, 3), arguments)
        winners = torch.randint(4, (1, 16, 4, 4), dtype=torch.uint8)
        grad_output = tensors[2].zero_()
        grad_output.view(-1)[torch.randperm(grad_output.numel())[: 40 * count]] = 1
        tensors[of].view(-1)[torch.randperm(tensors[of].numel())[:count]] = special
        exact = gradients(tensors, arguments, torch.float64, winners)
        for ours, expected in zip(gradients(tensors, arguments, torch.bfloat16, winners), exact, strict=True):
            torch.testing.assert_close(ours, expected.bfloat16(), rtol=0, atol=0, equal_nan=True)
