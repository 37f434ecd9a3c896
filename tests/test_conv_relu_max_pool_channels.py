"""Few outputs a group: a vector of them, or so few that products with four of the input's channels have lanes of
their own."""

from typing import Any

import pytest
import torch
from conv_cases import (
    algorithm,
    assert_like_stock,
    assert_right_with,
    assert_same_bits,
    assert_winners,
    channels_last,
    geometry,
    make,
)

# Batch, channels of a group and size; outputs of a group; kernel; arguments of geometry.
ONE_VECTOR = (
    ((2, 40, 20, 20), 15, (5, 5), {"padding": 2, "pool": 2, "pool_stride": 1}),
    ((2, 33, 17, 17), 15, (3, 3), {"dilation": 2, "groups": 2, "pool": 1}),
    ((2, 96, 17, 18), 14, (2, 2), {"padding": 1, "pool": 3, "pool_stride": 2}),
    ((2, 17, 20, 20), 11, (7, 7), {"padding": 3, "dilation": 2, "pool": 1}),
    ((2, 24, 12, 12, 12), 16, (2, 2, 2), {"padding": 1, "groups": 2, "pool": 2}),
    ((2, 17, 7, 7, 7), 13, (3, 3, 3), {"padding": 1, "groups": 2, "pool": 3, "pool_stride": 2}),
    ((2, 130, 300), 15, (5,), {"stride": 2, "padding": 2, "pool": 3, "pool_stride": 2}),
    ((2, 96, 300), 16, (7,), {"dilation": 2, "pool": 3}),
    ((2, 24, 9, 9), 8, (7, 7), {"stride": 2, "padding": 3, "groups": 2, "pool": 1}),
)
BY_FOUR = (
    ((2, 24, 100), 8, (2,), {"stride": 2, "padding": 1, "groups": 2, "pool": 3}),
    ((2, 16, 7, 7, 7), 8, (2, 2, 2), {"padding": 1, "dilation": 2, "groups": 2, "pool": 2}),
    ((2, 42, 24, 24), 8, (5, 5), {"padding": 2, "dilation": 2, "pool": 1}),
    ((2, 17, 20, 20), 7, (5, 5), {"dilation": 2, "groups": 2, "pool": 3, "pool_stride": 2}),
    ((2, 20, 9, 9, 9), 8, (2, 2, 2), {"padding": 1, "pool": 2}),
    ((2, 13, 19, 19), 7, (7, 7), {"stride": 2, "dilation": 2, "groups": 2, "pool": 2}),
    ((2, 20, 36, 36), 5, (2, 2), {"stride": 2, "pool": 2}),
    ((2, 17, 7, 7, 7), 8, (3, 3, 3), {"padding": 1, "groups": 2, "pool": 3, "pool_stride": 2}),
    ((2, 33, 12, 12, 12), 8, (2, 2, 2), {"dilation": 2, "groups": 2, "pool": 2}),
    ((2, 64, 100), 8, (2,), {"padding": 1, "dilation": 2, "pool": 3, "pool_stride": 2}),
)
BY_FOUR_AVX2 = (
    ((2, 20, 20, 20), 4, (2, 2), {"stride": 2, "groups": 2, "pool": 1}),
    ((2, 96, 9, 9), 4, (7, 7), {"padding": 3, "pool": 1}),
    ((2, 24, 31), 4, (7,), {"stride": 2, "dilation": 2, "pool": 2}),
    ((2, 96, 9, 9, 9), 4, (3, 3, 3), {"stride": 2, "padding": 1, "groups": 2, "pool": 3, "pool_stride": 2}),
)
Case = tuple[tuple[int, ...], int, tuple[int, ...], dict[str, Any]]
FORMATS = pytest.mark.parametrize("last", [False, True], ids=["first", "last"])


def call(case: Case, last: bool) -> tuple[list[torch.Tensor | None], tuple[Any, ...]]:
    size, outputs, kernel, options = case
    groups = options.get("groups", 1)
    grouped = (size[0], size[1] * groups, *size[2:])
    return make(grouped, outputs * groups, kernel, groups, last=last), geometry(len(kernel), **options)


@FORMATS
@pytest.mark.parametrize("case", ONE_VECTOR + BY_FOUR + BY_FOUR_AVX2)
@pytest.mark.parametrize("special", [0.0, float("nan"), float("inf"), 1e-42])
def test_like_stock(instruction_set: str, case: Case, last: bool, special: float) -> None:
    assert_right_with(special, 4, *call(case, last))


@FORMATS
@pytest.mark.parametrize("case", [ONE_VECTOR[0], ONE_VECTOR[2], BY_FOUR[3], BY_FOUR[6]])
def test_winners(instruction_set: str, case: Case, last: bool) -> None:
    assert_winners(*call(case, last))


@FORMATS
@pytest.mark.parametrize("outputs", range(1, 18))
@pytest.mark.parametrize("channels", [62, 63, 64, 65])
def test_every_number_of_outputs(instruction_set: str, outputs: int, channels: int, last: bool) -> None:
    tensors = make((1, channels, 9, 13), outputs, (2, 3), last=last)
    for pool in (1, 2):
        assert_like_stock(tensors, geometry(2, dilation=2, pool=pool), gradients=False)


@FORMATS
@pytest.mark.parametrize("case", [ONE_VECTOR[1], ONE_VECTOR[7], BY_FOUR[0], BY_FOUR[5]])
def test_same_bits_by_any_number_of_threads(instruction_set: str, case: Case, last: bool) -> None:
    assert_same_bits(*call(case, last))


def test_weights_that_lie_elsewhere(instruction_set: str) -> None:
    """Channels last though the input's come first, and neither."""
    for case in (ONE_VECTOR[0], ONE_VECTOR[4], BY_FOUR[1], BY_FOUR[2]):
        (input, weight, bias), arguments = call(case, last=False)
        weights = [channels_last(weight), *([weight.mT] if weight.dim() > 3 else [])]
        for other in weights:
            assert_like_stock([input, other, bias], arguments, gradients=False)


def test_negative_zeros(instruction_set: str) -> None:
    """Windows of them have no winner."""
    for case in (ONE_VECTOR[0], BY_FOUR[0]):
        tensors, arguments = call(case, last=True)
        zeros = [torch.zeros_like(tensors[0]), -tensors[1].abs(), torch.full_like(tensors[2], -0.0)]
        assert_like_stock(zeros, arguments)


@pytest.mark.parametrize(("cases", "instructions"), [(BY_FOUR, "avx512"), (BY_FOUR_AVX2, "avx2")])
def test_chosen(cases: tuple[Case, ...], instructions: str) -> None:
    for case in cases:
        chosen = {algorithm(instructions, *call(case, last)) for last in (False, True)}
        assert chosen & {"by_four", ""}, (case, chosen)
