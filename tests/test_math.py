"""The packed functions of csrc/simd/math.h, through the operator that applies them."""

import pytest
import torch

import fastnn
from benchmarks.sweep_math import FUNCTIONS, LIMIT, worst_error


@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_is_a_few_ulp(name: str, instruction_set: str) -> None:
    assert worst_error(name, step=10007)[0] <= LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_special_values(name: str, dtype: torch.dtype, instruction_set: str) -> None:
    # Without -0, which is 0 already in the sum of the linear layer before.
    tiny = torch.finfo(dtype).tiny
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, tiny, -tiny, 1e30, -1e30, 100.0, -100.0], dtype=dtype)
    actual = fastnn.functional.mlp(x[:, None], [torch.ones(1, 1, dtype=dtype)], [None], [name])[:, 0]
    expected = FUNCTIONS[name](x.double()).to(dtype)
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-6, atol=0)
    if name == "tanh":
        assert torch.equal(torch.signbit(actual[1:]), torch.signbit(x[1:]))
