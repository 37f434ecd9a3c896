"""conv_relu_max_pool on upstream's samples: those of PyTorch's own tests of convolutions, crossed with those of its
tests of max-pools. Same results, same strides, same errors."""

import itertools
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import upstream_samples
from conv_cases import CONV, FUSED
from torch import Tensor

from fastnn.testing import assert_close_to_reference

COUNT = 60  # of 720, 2160 and 960 pairs
POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def samples(name: str, dtype: torch.dtype, names: Sequence[str]) -> list[tuple[Tensor, dict[str, Any]]]:
    """Upstream's inputs of a function of torch.nn.functional, each with its other arguments by their names."""
    known = upstream_samples.functions()
    op = next(op for op in known if op.name == f"nn.functional.{name}" and not op.variant_test_name)
    return [
        (sample.input, dict(zip(names, sample.args, strict=False)) | sample.kwargs)
        for sample in op.sample_inputs("cpu", dtype, requires_grad=False)
    ]


def pools(dims: int) -> list[dict[str, Any]]:
    """The different arguments of max-pools."""
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    found = {}
    for _, arguments in samples(f"max_pool{dims}d", torch.float32, names):
        arguments.pop("return_indices", None)
        found[repr(sorted(arguments.items()))] = arguments
    return list(found.values())


def outcome(
    function: Callable[..., Tensor], tensors: Sequence[Tensor | None], gradients: bool, dtype: torch.dtype
) -> list[Tensor] | str:
    """The output and the gradients that the function gives, computed in this dtype, or its error."""
    leaves = [t if t is None else t.to(dtype).requires_grad_(gradients) for t in tensors]
    try:
        output = function(*leaves)
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    # Stock's gradient of a window of padding alone is written outside of its tensor.
    if not gradients or output.numel() == 0 or output.isneginf().any():
        return [output]
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [output, *torch.autograd.grad(output, [leaf for leaf in leaves if leaf is not None], grad_output)]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_like_stock_on_upstreams_samples(dtype: torch.dtype, dims: int) -> None:
    draw = random.Random(dims)
    names = ("weight", "bias", "stride", "padding", "dilation", "groups")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of stock: padding "same" of an even kernel copies
        pairs = list(itertools.product(samples(f"conv{dims}d", dtype, names), pools(dims)))
        for (input, conv), pool in draw.sample(pairs, COUNT):
            options = {name: value for name, value in conv.items() if name not in ("weight", "bias")}
            pooled = {name if name == "ceil_mode" else f"pool_{name}": value for name, value in pool.items()}

            def stock(*tensors: Tensor | None, options: Any = options, pool: Any = pool) -> Tensor:
                return POOL[dims](F.relu(CONV[dims](*tensors, **options)), **pool)

            def fused(*tensors: Tensor | None, options: Any = options, pooled: Any = pooled) -> Tensor:
                return FUSED[dims](*tensors, **options, **pooled)

            tensors = [input, conv["weight"], conv.get("bias")]
            # In bfloat16, stock rounds before it compares: another winner where two round to the same.
            gradients = dtype is not torch.bfloat16
            ours, theirs = (outcome(function, tensors, gradients, dtype) for function in (fused, stock))
            what = f"{tuple(input.shape)}, {tuple(conv['weight'].shape)}, {options}, {pool}"
            if isinstance(ours, str) or isinstance(theirs, str):
                assert ours == theirs, what
                continue
            assert_close_to_reference(ours, theirs, outcome(stock, tensors, gradients, torch.float64), what)
            assert ours[0].stride() == theirs[0].stride(), what
