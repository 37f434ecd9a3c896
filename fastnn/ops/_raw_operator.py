"""Registers all that an operator needs besides its kernels: a fake kernel, the refusal of gradients, and rules for the
transforms of ``torch.func``.

The public functions have gradients (each op's ``autograd.Function``); a raw operator is the forward alone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnn._torch import pytree

_REFUSAL = (
    "an operator of torch.ops.fastnn has no gradient of its own; call it through fastnn.functional or fastnn.nn, or "
    "under torch.no_grad(). (A frozen model has none: it is for inference alone.)"
)


def check_given(op: Any, arguments: Sequence[Any]) -> None:
    """Checks that a kernel written in Python got no None for a tensor: it gets None where a caller gives an undefined
    tensor. (csrc/ops/check.h does the same for kernels in C++.)"""
    for argument, given in zip(op._schema.arguments, arguments, strict=False):
        if given is None and isinstance(argument.type, torch.TensorType):
            raise RuntimeError(f"{op.name()}: {argument.name} must be a tensor, got None")


class RefuseGradient(torch.autograd.Function):
    """Returns the output of a raw operator, one of whose inputs requires grad. Asking for the gradient raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(output: Tensor, input: Tensor) -> Tensor:
        check_given(torch.ops.fastnn.refuse_gradient.default, (output, input))
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        raise RuntimeError(_REFUSAL)


def refuse_gradients(result: Any, arguments: Any) -> Any:
    """The ``result`` of a raw operator written in Python; its tensors refuse gradients if an argument requires one.
    (Those in C++ have the same in csrc/ops/register.h.)"""
    found = next((t for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor) and t.requires_grad), None)
    if found is None or not torch.is_grad_enabled():
        return result
    return pytree.tree_map_only(
        Tensor, lambda t: RefuseGradient.apply(t, found) if t.is_floating_point() else t, result
    )


_library = torch.library.Library("fastnn", "IMPL")
_library.impl("refuse_gradient", RefuseGradient.apply, "Autograd")
for _name in ("CPU", "CUDA", "Meta"):
    _library.impl("refuse_gradient", RefuseGradient.forward, _name)


class _Call:
    """An operator and the structure of its arguments; after the call, the structure of its result too."""

    def __init__(self, op: Any, arguments: pytree.TreeSpec) -> None:
        self.op, self.arguments = op, arguments
        self.result: pytree.TreeSpec | None = None

    def __call__(self, *leaves: Any) -> tuple[Tensor, ...]:
        tensors, self.result = pytree.tree_flatten(self.op(*pytree.tree_unflatten(list(leaves), self.arguments)))
        return tuple(tensors)


class Transformed(torch.autograd.Function):
    """Runs a raw operator under a transform of ``torch.func``: vmap makes one call per example, and gradients and
    tangents are refused."""

    @staticmethod
    def forward(call: _Call, *leaves: Any) -> tuple[Tensor, ...]:
        return call(*leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*(t for t in output if not t.is_floating_point()))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise RuntimeError(_REFUSAL)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_REFUSAL)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], call: _Call, *leaves: Any) -> Any:
        given = list(zip(leaves, in_dims[1:], strict=True))
        if info.batch_size == 0:  # an example of zeros says what sizes the results have
            example = [x if dim is None else x.new_zeros([*x.shape[:dim], *x.shape[dim + 1 :]]) for x, dim in given]
            stacked = tuple(output.new_empty((0, *output.shape)) for output in call(*example))
        else:
            examples = ([x if dim is None else x.select(dim, i) for x, dim in given] for i in range(info.batch_size))
            stacked = tuple(torch.stack(outputs) for outputs in zip(*(call(*one) for one in examples), strict=True))
        return stacked, (0,) * len(stacked)


def raw_operator(name: str) -> Callable[[Callable[..., Any]], None]:
    """Decorates the fake kernel of ``fastnn::name``: registers it, the refusal of gradients, and the rules."""
    op = getattr(torch.ops.fastnn, name).default

    def transformed(*args: Any) -> Any:
        leaves, structure = pytree.tree_flatten(args)
        call = _Call(op, structure)
        tensors = Transformed.apply(call, *leaves)
        assert call.result is not None
        return pytree.tree_unflatten(list(tensors), call.result)

    def register(fake: Callable[..., Any]) -> None:
        def checked(*args: Any) -> Any:
            check_given(op, args)
            return refuse_gradients(fake(*args), args)

        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        _library.impl(name, transformed, "FuncTorchDynamicLayerFrontMode")
        torch.library.register_fake(f"fastnn::{name}", checked)

    return register
