"""What the tests and the benchmarks share: dtypes, the one table of tolerances, comparison with stock PyTorch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastnn._extension import load_extension

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@dataclass(frozen=True)
class Tolerance:
    """How far a result may be from the float64 one: ``ratio`` times stock's own error, plus ``floor`` times the largest
    magnitude in the result."""

    ratio: float
    floor: float
    reason: str


TOLERANCES = {
    torch.float32: Tolerance(2.0, 4 * 2.0**-23, "stock may be exact by luck where another order of summation rounds"),
    torch.float64: Tolerance(
        2.0, 256 * 2.0**-52, "no wider type: the reference has errors of its own, sums of rounded"
    ),
    torch.bfloat16: Tolerance(2.0, 2.0**-7, "one rounding to bfloat16 more or less at the end of a float32 sum"),
    torch.float16: Tolerance(2.0, 2.0**-10, "one rounding to float16 more or less at the end of a float32 sum"),
}


def assert_close_to_reference(ours: Any, stock: Any, reference: Any, what: str = "result") -> None:
    """Check ``ours`` by the table of tolerances, tensor by tensor.

    Args:
        ours: a tensor, None, or a sequence of such.
        stock: the same from plain PyTorch in the same dtype.
        reference: the same from plain PyTorch in float64, on the same numbers.
        what: the name of the result in the message of a failure.
    """
    if isinstance(ours, Tensor):
        _assert_tensor_close(ours, stock, reference, what)
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(stock), f"{what}: {len(ours)} parts, stock has {len(stock)}"
        for i, part in enumerate(ours):
            assert_close_to_reference(part, stock[i], reference[i], f"{what}[{i}]")
    else:
        assert ours is stock is None, f"{what}: {ours!r}, stock has {stock!r}"


def _assert_tensor_close(ours: Tensor, stock: Tensor, reference: Tensor, what: str) -> None:
    assert ours.dtype == stock.dtype, f"{what}: {ours.dtype}, stock has {stock.dtype}"
    assert ours.shape == stock.shape, f"{what}: {tuple(ours.shape)}, stock has {tuple(stock.shape)}"
    tolerance = TOLERANCES[ours.dtype]
    ours, stock, reference = (t.detach().double() for t in (ours, stock, reference))
    special = ~stock.isfinite()
    assert torch.equal(special, ~ours.isfinite()), f"{what}: NaN or infinity in other places than stock's"
    torch.testing.assert_close(ours[special], stock[special], rtol=0, atol=0, equal_nan=True)
    ours, stock, reference = ours[~special], stock[~special], reference[~special]
    if ours.numel() == 0:
        return
    error, stock_error = (float((t - reference).abs().max()) for t in (ours, stock))
    allowed = tolerance.ratio * stock_error + tolerance.floor * float(reference.abs().max())
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g} (stock's is {stock_error:.3g})"


def compare_with_stock(
    ours: Callable[..., Any],
    stock: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    gradients: bool = True,
) -> None:
    """Check that ``ours(*tensors)`` and, with a random gradient of the output, the gradients of every floating-point
    tensor are as close to float64 as those of ``stock(*tensors)``.

    The functions return a tensor or a sequence of tensors; NaN and infinity must be where stock has them.
    """
    doubles = [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
    runs = ((ours, tensors), (stock, tensors), (stock, doubles))
    results, stock_results, reference = (_outputs_and_gradients(f, arguments, gradients) for f, arguments in runs)
    assert_close_to_reference(results[0], stock_results[0], reference[0], "output")
    assert_close_to_reference(results[1], stock_results[1], reference[1], "gradient")


def _outputs_and_gradients(
    function: Callable[..., Any], tensors: Sequence[Tensor | None], gradients: bool
) -> tuple[list[Tensor], list[Tensor | None]]:
    leaves = [
        t.detach().requires_grad_(gradients and t.is_floating_point()) if t is not None else None for t in tensors
    ]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    if not wanted:
        return outputs, []
    generator = torch.Generator().manual_seed(0)
    # Numbers that are rounded to bfloat16 are the same in every dtype.
    grads = [torch.randn(o.shape, generator=generator).bfloat16().to(o.dtype) for o in outputs]
    return outputs, list(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))


def instruction_sets(*, bfloat16: bool = True) -> list[str]:
    """The instruction sets compiled in that this machine can run; without ``bfloat16``, only those whose kernels differ
    from another set's in more than bfloat16."""
    names: list[str] = load_extension().supported_instruction_sets()
    return [name for name in names if bfloat16 or not name.endswith("_bf16")]


@contextmanager
def using_instruction_set(name: str) -> Iterator[None]:
    """Run the kernels of instruction set ``name`` within the block."""
    extension = load_extension()
    before = extension.instruction_set()
    extension.use_instruction_set(name)
    try:
        yield
    finally:
        extension.use_instruction_set(before)


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Run PyTorch, and the kernels with it, on ``count`` threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
