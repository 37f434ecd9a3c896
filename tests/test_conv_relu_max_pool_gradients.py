"""conv_relu_max_pool's gradients on every kind of geometry."""

import functools

import pytest
import torch
from conv_cases import CASES, RAW_BACKWARD, channels_last, flat, given, integers, outputs_and_winners
from torch import Tensor

from fastnn.reference import conv_relu_max_pool as reference
from fastnn.testing import DTYPES, instruction_sets, using_instruction_set, using_threads

KERNELS = [(name, dtype) for dtype in DTYPES for name in instruction_sets(bfloat16=dtype is torch.bfloat16)]


@functools.cache
def case_with_gradients(name: str) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
    """Input and weight, winners, the output's gradient and the exact ones of input, weight and bias: integers of which
    all sums are exact in float32. A third of the output's gradient is zero."""
    case = CASES[name]
    torch.manual_seed(0)
    tensors = integers(*case[:3], case.arguments[3], factor=1)
    output, winners = outputs_and_winners(tensors, case.arguments)
    gradient = torch.randint_like(output, -1, 2)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    stride, padding, dilation, groups, *pool = case.arguments
    dims = len(stride)
    rectified = reference.CONV[dims](*leaves, stride, padding, dilation, groups).relu()
    # Not by max_pool's own gradient, which writes that of windows of padding alone outside of its tensor.
    index = reference.POOL[dims](rectified, *pool, return_indices=True)[1].where(output.isfinite(), 0)
    picked = rectified.flatten(2).gather(2, index.flatten(2)).view_as(output)
    exact = torch.autograd.grad(picked, leaves, gradient.where(output.isfinite(), 0))
    return [tensor.detach() for tensor in tensors[:2]], winners, gradient, list(exact)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("instructions", "dtype"), KERNELS, ids=lambda value: str(value).removeprefix("torch."))
def test_exact_on_integers(instructions: str, dtype: torch.dtype, name: str) -> None:
    """Rounded once, by one thread and by two; each alone as with the others."""
    tensors, winners, gradient, exact = case_with_gradients(name)
    arguments = flat(CASES[name].arguments)
    with using_instruction_set(instructions):
        for last in (False, True) if len(CASES[name].kernel) > 1 else (False,):
            input, weight, _ = given([*tensors, None], dtype, last)
            saved = [t if not last else channels_last(t) for t in (gradient.to(dtype), winners)]
            gradients = RAW_BACKWARD(*saved, input, weight, arguments, True, True, True)
            for ours, expected in zip(gradients, exact, strict=True):
                torch.testing.assert_close(ours, expected.to(dtype), rtol=0, atol=0)
            with using_threads(2):
                for i in range(3):
                    wanted = [i == j for j in range(3)]
                    alone = RAW_BACKWARD(*saved, input, weight, arguments, *wanted)
                    assert torch.equal(alone[i], gradients[i])
                    assert all(t.shape[0] == 0 for t, is_wanted in zip(alone, wanted, strict=True) if not is_wanted)
