"""A chain of linear layers with activations: schema's Python side, autograd and the public functions."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnn.ops._autograd import (
    apply_function,
    autocast,
    autocast_is_on,
    call_kernel,
    check_same_device,
    differentiate_twice,
    is_inference,
    needs_autograd,
    needs_reference,
    register_loop_vmap,
)
from fastnn.reference import mlp as reference

# The operator takes activations by their place in this list (csrc/kernels/mlp.h has the same).
ACTIVATION_NAMES = tuple(reference.ACTIVATIONS)
_NUMBER_OF = {name: number for number, name in enumerate(ACTIVATION_NAMES)}
_KEEPS_INPUT = frozenset({"gelu", "gelu_tanh", "silu"})
_mlp_op = torch.ops.fastnn.mlp.default
_mlp_reconstruction_error_op = torch.ops.fastnn.mlp_reconstruction_error.default
_mlp_with_hidden_op = torch.ops.fastnn.mlp_with_hidden.default
_mlp_backward_op = torch.ops.fastnn.mlp_backward.default


def mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str | Sequence[str] = "relu",
    *,
    recompute: bool = False,
) -> Tensor:
    """Apply a chain of linear layers, ``activation`` after each but the last, in one call.

    Args:
        input: (..., in_features), float32, float64 or bfloat16; other dtypes take PyTorch's own path.
        weights: one (out_features, in_features) a layer, as ``torch.nn.Linear`` has them.
        biases: one (out_features) or None a layer.
        activation: one name, used after every layer but the last, or one a layer: identity, relu, tanh, sigmoid,
            gelu, gelu_tanh, silu, leaky_relu.
        recompute: keep only the input for backward, and run forward again there: less memory, more time.

    Returns:
        (..., out_features of the last layer).

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit together.
        ValueError: an activation that is not in the list, or not one a layer.
    """
    weights, biases = tuple(weights), tuple(biases)
    names = activation_names(activation, len(weights))
    if len(biases) != len(weights):
        raise ValueError(f"mlp: expected {len(weights)} biases, one a weight, got {len(biases)}")
    return _mlp(input, weights, biases, names, recompute)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``relu(linear(input, weight, bias))``: input (..., in), weight (out, in), bias (out) -> (..., out)."""
    return _mlp(input, (weight,), (bias,), ("relu",))


def activation_names(activation: str | Sequence[str], layers: int) -> tuple[str, ...]:
    names = (
        (activation,) * (layers - 1) + ("identity",) * min(layers, 1)
        if isinstance(activation, str)
        else tuple(activation)
    )
    if len(names) != layers:
        raise ValueError(f"mlp: expected {layers} activations, one a weight, got {len(names)}")
    for name in names:
        if name not in _NUMBER_OF:
            raise ValueError(f"mlp: activation must be one of {', '.join(ACTIVATION_NAMES)}, got {name!r}")
    return names


def mlp_reconstruction_error(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str | Sequence[str] = "relu",
) -> Tensor:
    """Mean squared difference between each row and what the chain makes of it, without keeping the reconstruction.

    Takes the arguments of :func:`mlp`, of a chain with as many outputs as inputs: (..., features) -> (...).
    """
    weights, biases = tuple(weights), tuple(biases)
    names = activation_names(activation, len(weights))
    parameters: Sequence[Tensor | None] = (*weights, *biases)
    if input.dim() != 2 or needs_autograd(input, *parameters) or needs_reference(autocast(input)[0]):
        return torch.mean((mlp(input, weights, biases, names) - input) ** 2, dim=-1)
    input, *parameters = autocast(input, *parameters)
    layers = len(weights)
    return call_kernel(
        _mlp_reconstruction_error_op, input, parameters[:layers], parameters[layers:], activation_numbers(names)
    )


def _mlp(
    input: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    names: tuple[str, ...],
    recompute: bool = False,
) -> Tensor:
    return mlp_of_parameters(input, (*weights, *biases), activation_numbers(names), recompute)


def activation_numbers(names: Sequence[str]) -> list[int]:
    """The names as the operators take them."""
    return [_NUMBER_OF[name] for name in names]


def mlp_of_parameters(
    input: Tensor, parameters: Sequence[Tensor | None], numbers: list[int], recompute: bool = False
) -> Tensor:
    """:func:`mlp` for callers that know their arguments: ``parameters`` are the weights, then the biases;
    ``numbers`` the activations from :func:`activation_numbers`."""
    if autocast_is_on():
        input, *parameters = autocast(input, *parameters)
    layers = len(numbers)
    if needs_reference(input) or layers == 0 or input.dim() == 0:
        names = [ACTIVATION_NAMES[number] for number in numbers]
        return reference.mlp(input, parameters[:layers], parameters[layers:], names)
    rows = input if input.dim() == 2 else input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
    if is_inference():
        output = _mlp_op(rows, parameters[:layers], parameters[layers:], numbers)
    elif needs_autograd(input, *parameters):
        output = apply_function(Mlp, rows, numbers, layers, recompute, *parameters)[0]
    else:
        output = call_kernel(_mlp_op, rows, parameters[:layers], parameters[layers:], numbers)
    return output if input.dim() == 2 else output.reshape(*input.shape[:-1], output.shape[-1])


class Mlp(torch.autograd.Function):
    """``fastnn::mlp_with_hidden`` with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, numbers: list[int], layers: int, recompute: bool, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        arguments = (input, parameters[:layers], parameters[layers:], numbers)
        if recompute:
            return (_mlp_op(*arguments),)
        output, hidden = _mlp_with_hidden_op(*arguments)
        return (output, *hidden)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, ctx.numbers, ctx.layers, ctx.recompute, *parameters = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(input, *parameters, *(() if ctx.recompute else output))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Any, ...]:
        needed, layers, saved = ctx.needs_input_grad, ctx.layers, ctx.saved_tensors
        if ctx.recompute:
            with torch.no_grad():
                saved = (*saved, *Mlp.forward(saved[0], ctx.numbers, layers, False, *saved[1:]))
        wanted = (needed[0], True in needed[4 : 4 + layers], True in needed[4 + layers :])
        compute = MlpBackward.apply if torch.is_grad_enabled() else MlpBackward.forward
        grad_input, *grad_parameters = compute(grad_output, ctx.numbers, layers, wanted, *saved)
        return (grad_input, None, None, None, *grad_parameters)


class MlpBackward(torch.autograd.Function):
    """``fastnn::mlp_backward``, differentiable through the reference."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_output: Tensor, numbers: list[int], layers: int, wanted: tuple[bool, bool, bool], *saved: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        input, weights, biases = saved[0], saved[1 : 1 + layers], saved[1 + layers : 1 + 2 * layers]
        output, *hidden = saved[1 + 2 * layers :]
        grad_input, grad_weights, grad_biases = _mlp_backward_op(
            grad_output, input, weights, numbers, output, hidden, *wanted
        )
        none = (None,) * layers
        if wanted[2] and any(bias is None for bias in biases):
            grad_biases = [None if bias is None else grad for grad, bias in zip(grad_biases, biases, strict=True)]
        return (
            grad_input if wanted[0] else None,
            *(grad_weights if wanted[1] else none),
            *(grad_biases if wanted[2] else none),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        grad_output, ctx.numbers, ctx.layers, _, *saved = inputs
        ctx.outputs_given = [gradient is not None for gradient in output]
        ctx.saved_count = len(saved)
        ctx.save_for_backward(grad_output, *saved[: 1 + 2 * ctx.layers])

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Any, ...]:
        grad_output, *inputs = ctx.saved_tensors
        given = [i for i, present in enumerate(ctx.outputs_given) if present]
        names = [ACTIVATION_NAMES[number] for number in ctx.numbers]

        def forward(*tensors: Tensor) -> Tensor:
            everything = list(inputs)
            for i, tensor in zip(given, tensors, strict=True):
                everything[i] = tensor
            parameters = everything[1:]
            return reference.mlp(everything[0], parameters[: ctx.layers], parameters[ctx.layers :], names)

        second = differentiate_twice(forward, grad_output, [inputs[i] for i in given], [grad_grads[i] for i in given])
        result: list[Tensor | None] = [None] * ctx.saved_count
        for i, gradient in zip(given, second[1:], strict=True):
            result[i] = gradient
        return (second[0], None, None, None, *result)


@torch.library.register_fake("fastnn::mlp")
def _(input: Tensor, weights: list[Tensor], biases: list[Tensor | None], activations: list[int]) -> Tensor:
    check_same_device(input, *weights, *biases)
    return input.new_empty(input.shape[0], weights[-1].shape[0])


@torch.library.register_fake("fastnn::mlp_reconstruction_error")
def _(input: Tensor, weights: list[Tensor], biases: list[Tensor | None], activations: list[int]) -> Tensor:
    check_same_device(input, *weights, *biases)
    return input.new_empty(input.shape[0])


@torch.library.register_fake("fastnn::mlp_with_hidden")
def _(
    input: Tensor, weights: list[Tensor], biases: list[Tensor | None], activations: list[int]
) -> tuple[Tensor, list[Tensor]]:
    check_same_device(input, *weights, *biases)
    outputs = [input.new_empty(input.shape[0], weight.shape[0]) for weight in weights]
    output_serves = ACTIVATION_NAMES[activations[-1]] not in _KEEPS_INPUT
    return input.new_empty(outputs[-1].shape), outputs[:-1] if output_serves else outputs


@torch.library.register_fake("fastnn::mlp_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    weights: list[Tensor],
    activations: list[int],
    output: Tensor,
    hidden: list[Tensor],
    input_wanted: bool,
    weights_wanted: bool,
    biases_wanted: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    check_same_device(grad_output, input, *weights, output, *hidden)
    return (
        input.new_empty(input.shape[0] if input_wanted else 0, input.shape[1]),
        [weight.new_empty(weight.shape) for weight in weights] if weights_wanted else [],
        [weight.new_empty(weight.shape[0]) for weight in weights] if biases_wanted else [],
    )


for _name in ("mlp", "mlp_reconstruction_error", "mlp_with_hidden", "mlp_backward"):
    register_loop_vmap(_name)
