"""What the operators share on the way from a public function to a kernel: which path a call takes, autocast,
double backward and the vmap rule of a raw operator."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

autocast_is_on = torch._C._is_any_autocast_enabled
transforms_active = torch._C._are_functorch_transforms_active  # those of torch.func
_is_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling

KERNEL_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16})


def needs_reference(input: Tensor) -> bool:
    """Whether the call is outside what kernels cover, so that plain PyTorch answers it: other dtypes, and
    forward-mode differentiation. (Tensors that do not fit the input are the operator's to refuse.)"""
    if forward_ad._current_level >= 0:
        return True
    return input.dtype not in KERNEL_DTYPES and not (input.dtype is torch.float16 and input.is_cuda)


def is_plain(input: Tensor) -> bool:
    """Whether nothing but the kernel is asked of an operator, so that it may be called by its ``_op``, 0.25 us sooner:
    no gradient, autocast, compilation or ``torch.func`` transform, and a dtype that kernels cover."""
    return (
        not _is_grad_enabled()
        and input.dtype in KERNEL_DTYPES
        and not autocast_is_on()
        and not transforms_active()
        and forward_ad._current_level < 0
        and not _is_compiling()
    )


def is_inference() -> bool:
    """Whether neither gradients nor ``torch.func`` transforms are at work, whatever the tensors."""
    return not torch.is_grad_enabled() and not transforms_active()


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Whether the call must go through the op's ``autograd.Function``: a gradient is wanted, or a ``torch.func``
    transform is at work."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return transforms_active()


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as autocast would hand them to a matrix product on their device; unchanged outside autocast."""
    if not autocast_is_on():
        return tensors
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype is not torch.float64 else t for t in tensors
    )


def check_same_device(*tensors: Tensor | None) -> None:
    """For fake kernels, which a single meta tensor among others is enough to call."""
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(sorted(map(str, devices)))}!"
        )


def call_kernel(op: Callable[..., Any], *args: Any) -> Any:
    """Run a raw operator for a caller who has seen to gradients."""
    if not torch.is_grad_enabled():
        return op(*args)
    with torch.no_grad():
        return op(*args)


def apply_function(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, without the 10 microseconds that ``apply`` spends on ``inspect.signature`` to fill in
    default arguments, of which our functions have none."""
    if torch.compiler.is_compiling() or transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


class RefuseGradient(torch.autograd.Function):
    """The output of a raw operator one of whose inputs required grad, so that asking for the gradient raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(output: Tensor, input: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        raise RuntimeError(
            "an operator of torch.ops.fastnn has no gradient of its own; call it through fastnn.functional or "
            "fastnn.nn, or under torch.no_grad()"
        )


def refuse_gradients(result: Any, arguments: Any) -> Any:
    """``result`` of a raw operator written in Python, its tensors refusing gradients if an argument required one.
    (Those in C++ have the same in csrc/ops/register.h.)"""
    found = next(
        (t for t in torch.utils._pytree.tree_leaves(arguments) if isinstance(t, Tensor) and t.requires_grad), None
    )
    if found is None or not torch.is_grad_enabled():
        return result
    return torch.utils._pytree.tree_map_only(
        Tensor, lambda t: RefuseGradient.apply(t, found) if t.is_floating_point() else t, result
    )


_library = torch.library.Library("fastnn", "IMPL")
_library.impl("refuse_gradient", RefuseGradient.apply, "Autograd")
for _name in ("CPU", "CUDA", "Meta"):
    _library.impl("refuse_gradient", RefuseGradient.forward, _name)


def raw_operator(name: str) -> Callable[[Callable[..., Any]], None]:
    """Decorator of the fake kernel of ``fastnn::name``, which registers it with a vmap rule and nothing for autograd:
    what an operator does where a gradient is wanted is :func:`refuse_gradients`."""

    def register(fake: Callable[..., Any]) -> None:
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"fastnn::{name}", lambda *args: refuse_gradients(fake(*args), args))
        register_loop_vmap(name)

    return register


def differentiate_twice(
    reference: Callable[..., Any], grad_output: Any, tensors: Sequence[Tensor], grad_grads: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Gradients of ``vjp(reference)(grad_output, *tensors)`` with respect to ``(grad_output, *tensors)``, itself
    differentiable. The backward kernels have no backward of their own: the reference is what they compute."""

    def backward(grad_output: Any, *tensors: Tensor) -> Any:
        vjp = torch.func.vjp(reference, *tensors)[1]
        return vjp(grad_output)

    vjp = torch.func.vjp(backward, grad_output, *tensors)[1]
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
