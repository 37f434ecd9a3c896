"""What the operators share on the way from a public function to a kernel: which path a call takes, autocast,
double backward and the vmap rule of a raw operator."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

KERNEL_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16})


def needs_reference(*tensors: Tensor | None) -> bool:
    """Whether the call is outside what kernels cover, so that plain PyTorch answers it: other dtypes, other
    layouts, and forward-mode differentiation."""
    if forward_ad._current_level >= 0:
        return True
    return any(t is not None and (not _has_kernel_dtype(t) or t.layout is not torch.strided) for t in tensors)


def _has_kernel_dtype(tensor: Tensor) -> bool:
    return tensor.dtype in KERNEL_DTYPES or (tensor.dtype is torch.float16 and tensor.is_cuda)


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Whether the call must go through the op's ``autograd.Function``: a gradient is wanted, or a ``torch.func``
    transform is at work."""
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast would hand them to a matrix product on their device; unchanged outside autocast."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype is not torch.float64 else t for t in tensors
    )


def call_kernel(op: Callable[..., Any], *args: Any) -> Any:
    """Run a raw operator for a caller who has seen to gradients."""
    if not torch.is_grad_enabled():
        return op(*args)
    with torch.no_grad():
        return op(*args)


def differentiate_twice(
    reference: Callable[..., Any], grad_output: Any, tensors: Sequence[Tensor], grad_grads: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of ``vjp(reference)(grad_output, *tensors)`` with respect to ``(grad_output, *tensors)``, itself
    differentiable. The backward kernels have no backward of their own: the reference is what they compute."""

    def backward(grad_output: Any, *tensors: Tensor) -> Any:
        _, vjp = torch.func.vjp(reference, *tensors)
        return vjp(grad_output)

    _, vjp = torch.func.vjp(backward, grad_output, *tensors)
    return vjp(tuple(grad_grads))


def register_loop_vmap(name: str) -> None:
    """Give the operator ``fastnn::name`` a vmap rule: a call an example, the results stacked."""
    op = getattr(torch.ops.fastnn, name)

    def example(argument: Any, dim: Any, i: int) -> Any:
        if isinstance(argument, (list, tuple)):
            dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(argument)
            return [example(a, d, i) for a, d in zip(argument, dims, strict=True)]
        return argument if dim is None else argument.select(dim, i)

    def stack(results: Sequence[Any]) -> Any:
        if isinstance(results[0], (list, tuple)):
            return tuple(stack(parts) for parts in zip(*results, strict=True))
        return torch.stack(list(results))

    def dims_of(result: Any) -> Any:
        return type(result)(dims_of(r) for r in result) if isinstance(result, (list, tuple)) else 0

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        if info.batch_size == 0:
            raise RuntimeError(f"fastnn::{name}: vmap over an empty dimension is not supported")
        calls = [op(*(example(a, d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(info.batch_size)]
        result = stack(calls)
        return result, dims_of(result)

    torch.library.register_vmap(f"fastnn::{name}", rule)
