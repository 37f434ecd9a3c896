"""What the operators share on the way from a public function to a kernel: which path a call takes, autocast
and double backward."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnn._torch import (
    add_batch_dim,
    autocast_is_on,
    forward_ad,
    is_legacy_batchedtensor,
    is_tracing,
    pytree,
    remove_batch_dim,
    transforms_active,
)

_is_grad_enabled = torch.is_grad_enabled
_float32 = torch.float32
is_compiling = torch.compiler.is_dynamo_compiling  # by torch.compile
is_exporting = torch.compiler.is_exporting

KERNEL_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16})


def needs_reference(input: Tensor) -> bool:
    """Whether plain PyTorch must compute the call, because the kernels do not cover it: other dtypes, forward-mode
    differentiation, and ``torch.jit.trace`` and ``torch.onnx``, whose graphs can hold no gradient written in Python and
    will be loaded where fastnn is not installed. (The operator itself refuses tensors that do not fit the input.)"""
    if forward_mode_is_on() or (not is_compiling() and is_tracing()):
        return True
    if is_exporting() and torch.onnx.is_in_onnx_export():
        return True
    return input.dtype not in KERNEL_DTYPES and not (input.dtype is torch.float16 and input.is_cuda)


def is_plain(input: Tensor) -> bool:
    """Whether a call needs only the kernel and perhaps a gradient, so that an operator may be called directly
    (``_torch.direct_call``). There must be no autocast, compilation, tracing, export or ``torch.func`` transform, and
    the kernels must cover the dtype."""
    return (
        (input.dtype is _float32 or input.dtype in KERNEL_DTYPES)
        and not autocast_is_on()
        and not transforms_active()
        and forward_ad._current_level < 0
        and not is_compiling()
        and not is_tracing()
        and not is_exporting()
    )


def forward_mode_is_on() -> bool:
    """Whether tensors may have tangents, of forward-mode differentiation."""
    return forward_ad._current_level >= 0


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether eager autograd is to record a call with these tensors."""
    if _is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Whether the call must go through the op's ``autograd.Function``: a gradient is wanted, or a ``torch.func``
    transform is active."""
    return wants_gradient(*tensors) or transforms_active()


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
    """Checks the tensors of a fake kernel, which is called as soon as one of them is a meta tensor."""
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(sorted(map(str, devices)))}!"
        )


def in_torchs_words(error: RuntimeError, reference: Callable[..., Any], *args: Any) -> Exception:
    """The exception for arguments that an operator has refused: PyTorch's, if the reference refuses them too."""
    try:
        reference(*args)
    except (IndexError, RuntimeError, TypeError, ValueError) as torchs:
        return torchs
    return error


def call_kernel(op: Callable[..., Any], *args: Any) -> Any:
    """Run a raw operator for a caller that records gradients itself."""
    if not torch.is_grad_enabled():
        return op(*args)
    with torch.no_grad():
        return op(*args)


def eager_recorder(function: type[torch.autograd.Function]) -> Callable[..., tuple[Tensor, ...]]:
    """:func:`recorder` for calls that are plain (:func:`is_plain`).

    It makes a twin of the function, whose forward is ``record``. ``record`` saves the tensors that only backward needs,
    but does not make them outputs, since each output costs autograd microseconds on both ways. The twin is applied
    without the 10 microseconds that ``apply`` spends on ``inspect.signature`` to fill in default arguments, of which
    our functions have none. The function's backward gets gradients of at least the caller's outputs.
    """

    def eager_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        for grad in grads:
            if grad is None:
                continue
            if is_legacy_batchedtensor(grad):
                ctx.is_batched = True  # backward runs several times
                return one_by_one(lambda *rows: function.backward(ctx, *rows), grads)
            if grad.is_sparse:  # as that of a table whose rows ``embedding(sparse=True)`` has taken
                return eager_backward(ctx, *[one if one is None else one.to_dense() for one in grads])
        return function.backward(ctx, *grads)

    members = {"forward": staticmethod(function.record), "backward": staticmethod(eager_backward)}  # type: ignore[attr-defined]
    twin = type(function.__name__, (torch.autograd.Function,), members)
    return super(torch.autograd.Function, twin).apply  # type: ignore[misc]


def recorder(
    function: type[torch.autograd.Function], record_plain: Callable[..., tuple[Tensor, ...]], results: int
) -> Callable[..., tuple[Tensor, ...]]:
    """``function.apply``, which returns to the caller only the first ``results`` outputs (-2: all but two).

    The others are what backward needs. Transforms and compilation must see them as outputs; other calls go to
    ``record_plain``, the function's :func:`eager_recorder`.
    """

    def apply(*args: Any) -> tuple[Tensor, ...]:
        if is_compiling():
            return function.apply(*_distinct(args))[:results]
        if transforms_active():
            return function.apply(*args)[:results]
        return record_plain(*args)

    return apply


def _distinct(args: Sequence[Any]) -> list[Any]:
    """The arguments, with a view in place of each tensor that has stood before: ``torch.compile`` refuses an autograd
    function that is given one tensor twice, such as an LSTM's h and c that are the same zeros."""
    distinct: list[Any] = []
    for one in args:
        is_again = isinstance(one, Tensor) and any(one is other for other in distinct)
        distinct.append(one.view_as(one) if is_again else one)
    return distinct


def one_by_one(backward: Callable[..., Any], grads: Sequence[Tensor | None]) -> Any:
    """``backward(*grads)`` where some of ``grads`` are batches of gradients, as ``torch.autograd.grad`` makes them with
    ``is_grads_batched=True``, which is no transform of ``torch.func``. It calls backward for each row of the batch."""
    batch = next(grad for grad in grads if grad is not None and is_legacy_batchedtensor(grad))

    def rows_of(grad: Tensor, level: int, size: int) -> Tensor:  # `size` is that of a tensor without a batch
        return remove_batch_dim(grad, level, size, 0)

    level = next(level for level in range(1, 64) if rows_of(batch, level, 0).shape[0] > 0)
    size = rows_of(batch, level, 0).shape[0]
    batches = [None if grad is None else rows_of(grad, level, size) for grad in grads]
    results = [backward(*(None if rows is None else rows[i] for rows in batches)) for i in range(size)]

    def batch_of(*rows: Tensor | None) -> Tensor | None:
        there = [row for row in rows if row is not None]
        return add_batch_dim(torch.stack(there), 0, level) if there else None

    return pytree.tree_map(batch_of, *results)


def wants_graph() -> bool:
    """Whether backward must itself be differentiable (``create_graph=True``), and no transform takes care of that."""
    return torch.is_grad_enabled() and not transforms_active() and not is_compiling()


def gradients_by_reference(
    reference: Callable[..., Any], tensors: Sequence[Any], needed: Sequence[bool], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients for a backward that must be differentiable (:func:`wants_graph`). Plain autograd computes them from
    the reference's outputs, with respect to the tensors that need one, at the cost of stock's own double backward."""

    def own_view(tensor: Tensor) -> Tensor:
        """A view of a tensor that needs a gradient: one tensor may stand at two places, each of which has its own
        gradient. The function that ``torch.func.vjp`` returns runs after its transform has ended; outside of the
        transform, the tensor may need no gradient."""
        view = tensor.view_as(tensor)
        return view if view.requires_grad else view.detach().requires_grad_()

    own = [own_view(one) if needs else one for one, needs in zip(tensors, needed, strict=True)]
    outputs = reference(*own)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    given = [(one, grad) for one, grad in zip(outputs, grads, strict=True) if grad is not None and one.requires_grad]
    wanted = [one for one, needs in zip(own, needed, strict=True) if needs]
    found: Any = iter(())
    if given and wanted:
        some, of_some = zip(*given, strict=True)
        found = iter(torch.autograd.grad(some, wanted, of_some, create_graph=True, allow_unused=True))
    return [next(found, None) if needs else None for needs in needed]


def differentiate_twice(
    reference: Callable[..., Any],
    grad_output: Any,
    tensors: Sequence[Any],
    given: Sequence[bool],
    needed: Sequence[bool],
    grad_grads: Sequence[Tensor | None],
) -> tuple[Any, list[Tensor | None]]:
    """The backward of a backward kernel, which can be differentiated again. The kernels of backward have no backward of
    their own, so that the reference takes their place.

    Args:
        grad_output: the gradient of what ``reference(*tensors)`` returns.
        tensors: the arguments of the first forward; None stands for one that is missing.
        given: which of ``tensors`` the backward kernel gave a gradient for.
        needed: which of ``tensors`` need a gradient now. They may be others than those in ``given``: where
            ``torch.func.grad`` differentiates by the input, a loss of this gradient is differentiated by the weights.
        grad_grads: the gradients of those gradients, one per tensor, None where there is none.

    Returns:
        The gradient of ``grad_output``, and one per tensor, None where none is needed.
    """
    if any(grad is not None and is_legacy_batchedtensor(grad) for grad in grad_grads):
        call = functools.partial(differentiate_twice, reference, grad_output, tensors, given, needed)
        return one_by_one(lambda *rows: call(rows), grad_grads)
    first = [i for i, was_given in enumerate(given) if was_given]
    second = [i for i, needs in enumerate(needed) if needs]

    def backward(grad_output: Any, *at_second: Tensor) -> Any:
        everything = list(tensors)
        for i, tensor in zip(second, at_second, strict=True):
            everything[i] = tensor

        def forward(*at_first: Tensor) -> Any:
            arguments = list(everything)
            for i, tensor in zip(first, at_first, strict=True):
                arguments[i] = tensor
            return reference(*arguments)

        vjp = torch.func.vjp(forward, *[everything[i] for i in first])[1]
        return vjp(grad_output)

    vjp = torch.func.vjp(backward, grad_output, *[tensors[i] for i in second])[1]
    grads = tuple(torch.zeros_like(tensors[i]) if grad_grads[i] is None else grad_grads[i] for i in first)
    of_grad_output, *found = vjp(grads)
    gradients: list[Tensor | None] = [None] * len(tensors)
    for i, gradient in zip(second, found, strict=True):
        gradients[i] = gradient
    return of_grad_output, gradients
