"""3x3 kernels under 2x2 pools, of many channels: Winograd's tiles of 2x2 conv pixels, in bfloat16 of 4x4."""

import pytest
import torch
from conv_cases import (
    algorithm,
    assert_like_float64,
    assert_like_stock,
    assert_right_with,
    assert_same_bits,
    assert_winners,
    channels_last,
    geometry,
    make,
)

# Runs of tiles that end within a row, a row of windows that fills half of the last tiles, items of several images,
# channels that fill part of a vector or of a block, and depths beyond what one chain of additions takes.
CASES = (
    ((2, 64, 21, 26), 64, 1, 1),
    ((3, 40, 34, 9), 50, 0, 1),
    ((2, 128, 30, 30), 96, 2, 2),
    ((40, 64, 8, 8), 64, 1, 1),
    ((5, 96, 5, 7), 33, 1, 1),
    ((1, 72, 64, 130), 80, 1, 1),
    ((1, 300, 15, 14), 72, 1, 1),
    ((2, 256, 9, 40), 48, 0, 1),
    ((9, 80, 3, 3), 144, 1, 1),
)
BOTH = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize(("size", "out_channels", "padding", "groups"), CASES)
@pytest.mark.parametrize("dtype", BOTH)
def test_like_stock(
    instruction_set: str,
    dtype: torch.dtype,
    size: tuple[int, ...],
    out_channels: int,
    padding: int,
    groups: int,
    last: bool,
) -> None:
    tensors = make(size, out_channels, (3, 3), groups, dtype, last=last)
    assert_like_stock(tensors, geometry(2, padding=padding, groups=groups))


def test_chosen() -> None:
    for size, out_channels, padding, groups in (CASES[0], CASES[2], CASES[3], CASES[5]):
        for dtype in BOTH:
            for last in (False, True):
                tensors = make(size, out_channels, (3, 3), groups, dtype, last=last)
                for instructions in ("avx2", "avx512", "avx512_bf16"):
                    assert algorithm(instructions, tensors, geometry(2, padding=padding, groups=groups)) in (
                        "winograd",
                        "",
                    )


@pytest.mark.parametrize("special", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("dtype", BOTH)
def test_special_values_stay_in_place(instruction_set: str, dtype: torch.dtype, special: float) -> None:
    arguments = geometry(2, padding=1)
    assert_right_with(special, 5, make((2, 64, 20, 20), 64, (3, 3), dtype=dtype), arguments)
    for which in (0, 1):
        tensors = make((2, 64, 20, 20), 64, (3, 3), dtype=dtype)
        tensors[which][1, 2, 1, 1] = special
        assert_like_float64(tensors, arguments)
        assert_like_stock(tensors, arguments, gradients=False)


@pytest.mark.parametrize("edge", [1, 7, 8, 9, 15, 16, 17, 31, 33])
@pytest.mark.parametrize("dtype", BOTH)
def test_sizes(instruction_set: str, dtype: torch.dtype, edge: int) -> None:
    for height, width in ((edge, 34), (34, edge)):
        assert_like_stock(make((2, 64, height, width), 64, (3, 3), dtype=dtype), geometry(2, padding=1 + (edge == 1)))


@pytest.mark.parametrize("channels", [31, 33, 47, 49, 63, 65, 127, 129])
@pytest.mark.parametrize("dtype", BOTH)
def test_channels(instruction_set: str, dtype: torch.dtype, channels: int) -> None:
    for last in (False, True):
        assert_like_stock(make((3, channels, 20, 22), channels, (3, 3), dtype=dtype, last=last), geometry(2, padding=1))


@pytest.mark.parametrize("dtype", BOTH)
def test_winners(instruction_set: str, dtype: torch.dtype) -> None:
    for size, out_channels, padding, groups in CASES:
        assert_winners(make(size, out_channels, (3, 3), groups, dtype), geometry(2, padding=padding, groups=groups))


@pytest.mark.parametrize("dtype", BOTH)
def test_views(instruction_set: str, dtype: torch.dtype) -> None:
    input, weight, bias = make((3, 192, 21, 46), 66, (3, 3), dtype=dtype)
    arguments = geometry(2, padding=1)
    assert_like_stock([input[:, ::2, :, ::2], weight[:, 1::2], bias], arguments)
    assert_like_stock([input[:, 1:65, 1:, ::3], weight[:, :64], bias], arguments)
    assert_like_stock([channels_last(input)[:, 2:130, :, 3:], channels_last(weight)[:, 64:], bias], arguments)
    assert_like_stock(
        [input[:, :64, 4:5].expand(-1, -1, 20, -1), weight[:, :64, :, :1].expand(-1, -1, 3, 3), None], arguments
    )


@pytest.mark.parametrize("dtype", BOTH)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    for size, out_channels, padding, groups in CASES:
        tensors = make(size, out_channels, (3, 3), groups, dtype)
        assert_same_bits(tensors, geometry(2, padding=padding, groups=groups))


@pytest.mark.parametrize("dtype", BOTH)
def test_long_sums(instruction_set: str, dtype: torch.dtype) -> None:
    for last in (False, True):
        assert_like_stock(make((2, 512, 18, 18), 64, (3, 3), dtype=dtype, last=last), geometry(2, padding=1))
