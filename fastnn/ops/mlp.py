"""A chain of linear layers with activations: schema's Python side, autograd and the public functions."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnn.ops._autograd import (
    autocast,
    call_kernel,
    check_same_device,
    differentiate_twice,
    eager_recorder,
    in_torchs_words,
    is_plain,
    needs_autograd,
    needs_reference,
    recorder,
    wants_gradient,
)
from fastnn.ops._raw_operator import raw_operator
from fastnn.reference import mlp as reference

# The operator takes activations by their place in this list (csrc/kernels/mlp.h has the same).
ACTIVATION_NAMES = tuple(reference.ACTIVATIONS)
_DIGIT_OF = {name: str(place) for place, name in enumerate(ACTIVATION_NAMES)}
MOST_LAYERS = 20  # of one call of the operators
KEEPS_INPUT = frozenset({"gelu", "gelu_tanh", "silu"})
# Activations of the last layer for whose derivative the output is kept.
_KEEPS_OUTPUT = frozenset(ACTIVATION_NAMES.index(name) for name in ("relu", "tanh", "sigmoid", "leaky_relu"))
_LEAKY_RELU = ACTIVATION_NAMES.index("leaky_relu")
_IDENTITY, _RELU = _DIGIT_OF["identity"], _DIGIT_OF["relu"]
# Multiply-adds of a lone linear layer below which autograd's own linear is faster in training: nothing is fused, and a
# function written in Python costs some 5 us more. From some 1000 on, stock's products have shapes that take 40 us.
_SMALL_LINEAR = 500
_mlp_op = torch.ops.fastnn.mlp.default
_mlp_call = _mlp_op._op  # what calling it comes to, 0.25 us sooner; torch.compile knows only the former
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
        TypeError: an activation that is neither a name nor a list of names.
        ValueError: an activation that is not in the list, or not one a layer.
    """
    weights, biases = tuple(weights), tuple(biases)
    layers = len(weights)
    called = (activation if isinstance(activation, str) else _list_of_names(activation), layers)
    digits = _digits_of_call.get(called)
    if digits is None:
        digits = _digits_of_call[called] = activation_digits(activation_names(activation, layers))
    if len(biases) != layers:
        raise ValueError(f"mlp: expected {layers} biases, one a weight, got {len(biases)}")
    return mlp_of_parameters(input, join_parameters(weights, biases), digits, recompute)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``relu(linear(input, weight, bias))``: input (..., in), weight (out, in), bias (out) -> (..., out).

    A weight (in), with a bias () or none, gives (...), as in ``torch.nn.functional.linear``.
    """
    if weight.dim() == 1:
        return reference.linear_relu(input, weight, bias)
    return mlp_of_parameters(input, (weight,) if bias is None else (weight, bias), _RELU)


def _list_of_names(activation: Iterable[str]) -> tuple[str, ...]:
    names = tuple(activation) if isinstance(activation, Iterable) else (activation,)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"mlp: activation must be a name, or a list of one a layer, of {', '.join(ACTIVATION_NAMES)}, got "
                f"{activation!r}"
            )
    return names


def activation_names(activation: str | Sequence[str], layers: int) -> tuple[str, ...]:
    names = (
        (activation,) * (layers - 1) + ("identity",) * min(layers, 1)
        if isinstance(activation, str)
        else _list_of_names(activation)
    )
    if len(names) != layers:
        raise ValueError(f"mlp: expected {layers} activations, one a weight, got {len(names)}")
    for name in names:
        if name not in _DIGIT_OF:
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
    parameters = join_parameters(weights, biases)
    if (
        input.dim() == 2
        and len(names) <= MOST_LAYERS
        and not needs_autograd(input, *parameters)
        and not needs_reference(autocast(input)[0])
    ):
        given, *parameters = autocast(input, *parameters)
        try:
            return call_kernel(_mlp_reconstruction_error_op, given, parameters, operator_code(activation_digits(names)))
        except NotImplementedError:  # as of mlp_of_parameters
            pass
    return torch.mean((mlp(input, weights, biases, names) - input) ** 2, dim=-1)


def join_parameters(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """As the operators take them: the weights, then the biases, or no biases at all. One that is missing among others
    is zeros."""
    given = [bias for bias in biases if bias is not None]
    if given and len(given) < len(weights):
        given = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
    return [*weights, *given]


def split_parameters(parameters: Sequence[Tensor], layers: int) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """The weights, and a bias or None a weight."""
    return parameters[:layers], parameters[layers:] or (None,) * layers


# Of the activations met so far: by how a call named them and its number of layers, and by digits.
_digits_of_call: dict[tuple[str | tuple[str, ...], int], str] = {}
_codes: dict[str, int] = {}


def activation_digits(names: Sequence[str]) -> str:
    """The names in short: a digit a layer, its place in ``ACTIVATION_NAMES``."""
    digits = "".join(_DIGIT_OF[name] for name in names)
    if 0 < len(digits) <= MOST_LAYERS:
        _codes[digits] = operator_code(digits)
    return digits


def operator_code(digits: str) -> int:
    """As the operators take them: octal, after a leading 1."""
    return int("1" + digits, 8)


def _names_of(digits: str) -> list[str]:
    return [ACTIVATION_NAMES[int(digit)] for digit in digits]


def layers_of_code(code: int) -> int:
    return code.bit_length() // 3


def names_of_code(code: int) -> list[str]:
    """What :func:`operator_code` was made of."""
    return _names_of(f"{code:o}"[1:])


def mlp_of_parameters(input: Tensor, parameters: Sequence[Tensor], digits: str, recompute: bool = False) -> Tensor:
    """:func:`mlp` for callers that know their arguments: ``parameters`` as of :func:`join_parameters`, ``digits`` the
    activations as of :func:`activation_digits`."""
    rank = input.dim()
    try:
        if rank == 2 and (code := _codes.get(digits)) and is_plain(input):
            if wants_gradient(input, *parameters):
                if digits == _IDENTITY and _is_small_linear(input, *parameters):
                    return torch.nn.functional.linear(input, *parameters)
                return _record_plain(input, code, recompute, *parameters)[0]
            return _mlp_call(input, parameters, code)
        if len(digits) > MOST_LAYERS:
            weights, biases = split_parameters(parameters, len(digits))
            for first in range(0, len(digits), MOST_LAYERS):
                some = slice(first, first + MOST_LAYERS)
                input = mlp_of_parameters(input, join_parameters(weights[some], biases[some]), digits[some], recompute)
            return input
        input, *parameters = autocast(input, *parameters)
        if rank > 0 and digits and not needs_reference(input):
            rows = input if rank == 2 else input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
            if needs_autograd(input, *parameters):
                output = _record(rows, operator_code(digits), recompute, *parameters)[0]
            else:
                output = call_kernel(_mlp_op, rows, parameters, operator_code(digits))
            return output if rank == 2 else output.reshape(*input.shape[:-1], output.shape[-1])
    except NotImplementedError:  # tensors that only stock computes with: DTensor, sparse, quantized
        pass
    except RuntimeError as error:
        raise in_torchs_words(error, _reference, input, parameters, digits) from None
    return _reference(input, parameters, digits)


def _reference(input: Tensor, parameters: Sequence[Tensor], digits: str) -> Tensor:
    return reference.mlp(input, *split_parameters(parameters, len(digits)), _names_of(digits))


def mlp_with_some_biases(input: Tensor, parameters: Sequence[Tensor | None], digits: str) -> Tensor:
    """The same of layers of which some have no bias, None in its place."""
    layers = len(digits)
    weights: Any = parameters[:layers]
    return mlp_of_parameters(input, join_parameters(weights, parameters[layers:]), digits)


def _is_small_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Of shapes that the operator takes too, stock's linear taking more; and of rows that are a number, not a symbol as
    in ``torch.export``."""
    rows = input.shape[0]
    return (
        type(rows) is int
        and weight.dim() == 2
        and rows * weight.numel() < _SMALL_LINEAR
        and (bias is None or bias.shape == weight.shape[:1])
    )


class Mlp(torch.autograd.Function):
    """``fastnn::mlp_with_hidden`` with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, code: int, recompute: bool, *parameters: Tensor) -> tuple[Tensor, ...]:
        if recompute:
            return (_mlp_op(input, parameters, code),)
        output, hidden = _mlp_with_hidden_op(input, parameters, code)
        # The caller may change the first in place.
        return (output, *((output.clone(),) if code % 8 in _KEEPS_OUTPUT else ()), *hidden)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        Mlp._keep(ctx, inputs, output[1:])

    @staticmethod
    def record(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        input, code, recompute, *parameters = inputs
        if recompute:
            Mlp._keep(ctx, inputs, ())
            return (_mlp_op(input, parameters, code),)
        output, hidden = _mlp_with_hidden_op(input, parameters, code)
        Mlp._keep(ctx, inputs, (output, *hidden) if code % 8 in _KEEPS_OUTPUT else hidden)
        # Stock's leaky ReLU keeps its input, so that its output may be changed in place.
        return (output.clone() if code % 8 == _LEAKY_RELU else output,)

    @staticmethod
    def _keep(ctx: Any, inputs: tuple[Any, ...], made: Sequence[Tensor]) -> None:
        input, code, recompute, *parameters = inputs
        ctx.call = (code, recompute, len(parameters))
        ctx.save_for_backward(input, *parameters, *made)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Any, ...]:
        code, recompute, parameters = ctx.call
        needed, saved, layers = ctx.needs_input_grad, ctx.saved_tensors, layers_of_code(code)
        if recompute:
            with torch.no_grad():
                output, hidden = _mlp_with_hidden_op(saved[0], saved[1:], code)
            saved = (*saved, output, *hidden)
        elif code % 8 not in _KEEPS_OUTPUT:
            # In the output's place anything of its sizes: it will not be looked at.
            saved = (*saved[: 1 + parameters], grad_output, *saved[1 + parameters :])
        wanted = (needed[0], True in needed[3 : 3 + layers], True in needed[3 + layers :])
        compute = MlpBackward.apply if torch.is_grad_enabled() else MlpBackward.forward
        grad_input, *grad_parameters = compute(grad_output, code, parameters, wanted, *saved)
        return (grad_input, None, None, *grad_parameters)


_record_plain = eager_recorder(Mlp)
_record = recorder(Mlp, _record_plain, results=1)


class MlpBackward(torch.autograd.Function):
    """``fastnn::mlp_backward``, differentiable through the reference."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_output: Tensor, code: int, parameters: int, wanted: tuple[bool, bool, bool], *saved: Tensor
    ) -> tuple[Tensor | None, ...]:
        layers, biases = layers_of_code(code), 1 + parameters
        output, hidden = saved[biases], saved[biases + 1 :]
        grad_input, grad_weights, grad_biases = _mlp_backward_op(
            grad_output, saved[0], saved[1 : 1 + layers], code, output, hidden, *wanted
        )
        return (
            grad_input if wanted[0] else None,
            *(grad_weights if wanted[1] else (None,) * layers),
            *(grad_biases if wanted[2] else (None,) * (parameters - layers)),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        grad_output, ctx.code, parameters, _, *saved = inputs
        ctx.outputs_given = [gradient is not None for gradient in output]
        ctx.saved_count = len(saved)
        ctx.save_for_backward(grad_output, *saved[: 1 + parameters])

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Any, ...]:
        grad_output, *inputs = ctx.saved_tensors
        given = [i for i, present in enumerate(ctx.outputs_given) if present]
        names = names_of_code(ctx.code)

        def forward(*tensors: Tensor) -> Tensor:
            everything = list(inputs)
            for i, tensor in zip(given, tensors, strict=True):
                everything[i] = tensor
            return reference.mlp(everything[0], *split_parameters(everything[1:], len(names)), names)

        second = differentiate_twice(forward, grad_output, [inputs[i] for i in given], [grad_grads[i] for i in given])
        result: list[Tensor | None] = [None] * ctx.saved_count
        for i, gradient in zip(given, second[1:], strict=True):
            result[i] = gradient
        return (second[0], None, None, None, *result)


@raw_operator("mlp")
def _(input: Tensor, parameters: list[Tensor], activations: int) -> Tensor:
    check_same_device(input, *parameters)
    return input.new_empty(input.shape[0], parameters[len(names_of_code(activations)) - 1].shape[0])


@raw_operator("mlp_reconstruction_error")
def _(input: Tensor, parameters: list[Tensor], activations: int) -> Tensor:
    check_same_device(input, *parameters)
    return input.new_empty(input.shape[0])


@raw_operator("mlp_with_hidden")
def _(input: Tensor, parameters: list[Tensor], activations: int) -> tuple[Tensor, list[Tensor]]:
    check_same_device(input, *parameters)
    names = names_of_code(activations)
    outputs = [input.new_empty(input.shape[0], weight.shape[0]) for weight in parameters[: len(names)]]
    output_serves = names[-1] not in KEEPS_INPUT
    return input.new_empty(outputs[-1].shape), outputs[:-1] if output_serves else outputs


@raw_operator("mlp_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    weights: list[Tensor],
    activations: int,
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
