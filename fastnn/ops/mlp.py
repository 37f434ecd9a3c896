"""A chain of linear layers with activations: the public functions, the gradients and the shapes for tracing."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnn._extension import load_extension
from fastnn._torch import direct_call
from fastnn.activations import NAMES, Activation, join, last_of, layers_of, parse_one
from fastnn.ops._autograd import (
    autocast,
    call_kernel,
    check_same_device,
    differentiate_twice,
    eager_recorder,
    gradients_by_reference,
    in_torchs_words,
    is_plain,
    needs_autograd,
    needs_reference,
    recorder,
    wants_gradient,
    wants_graph,
)
from fastnn.ops._raw_operator import raw_operator
from fastnn.reference import mlp as reference

MOST_LAYERS: int = load_extension().most_layers  # the most layers in one call of the operators
# Below so many multiply-adds, autograd's own linear is faster in training than a single linear layer here: nothing is
# fused, and a function written in Python costs about 5 us. From about 1000 on, stock's products may take 40 us.
_SMALL_LINEAR = 500
_mlp_op = torch.ops.fastnn.mlp.default
_mlp_call = direct_call(_mlp_op)
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
        weights: one (out_features, in_features) per layer, as ``torch.nn.Linear`` has them.
        biases: one (out_features) or None per layer.
        activation: one, used after every layer but the last, or one per layer. Each is a name of
            ``fastnn.activations.NAMES``, followed by its parameters where they are not torch's defaults: ``"relu"``,
            ``"leaky_relu(0.2)"``.
        recompute: save only the input for backward, which runs forward again: less memory, more time.

    Returns:
        (..., out_features of the last layer).

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit together.
        TypeError: an activation that is neither a name nor a list of names.
        ValueError: an activation that there is no kernel for, or not one per layer.
    """
    weights, biases = tuple(weights), tuple(biases)
    layers = len(weights)
    activations = join_activations(activation, layers)
    if len(biases) != layers:
        raise ValueError(f"mlp: expected {layers} biases, one a weight, got {len(biases)}")
    return mlp_of_parameters(input, join_parameters(weights, biases), activations, recompute)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``relu(linear(input, weight, bias))``: input (..., in), weight (out, in), bias (out) -> (..., out).

    A weight (in), with a bias () or none, gives (...), as in ``torch.nn.functional.linear``.
    """
    if weight.dim() == 1:
        return reference.linear_relu(input, weight, bias)
    return mlp_of_parameters(input, (weight,) if bias is None else (weight, bias), "relu")


def _names_of(activation: str | Iterable[str]) -> str | tuple[str, ...]:
    if isinstance(activation, str):
        return activation
    names = tuple(activation) if isinstance(activation, Iterable) else (activation,)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"mlp: activation must be a name, or a list of one a layer, of {', '.join(NAMES)}, got {activation!r}"
            )
    return names


def read_activations(activation: str | Sequence[str], layers: int) -> tuple[Activation, ...]:
    """The activations that a user named, one per layer; a single name stands for all layers but the last."""
    names = _names_of(activation)
    if isinstance(names, str):
        names = (names,) * (layers - 1) + ("identity",) * min(layers, 1)
    if len(names) != layers:
        raise ValueError(f"mlp: expected {layers} activations, one a weight, got {len(names)}")
    return tuple([parse_one(name) for name in names])


def join_activations(activation: str | Sequence[str], layers: int) -> str:
    """The activations that a user named, as the one text that the operators take."""
    called = (_names_of(activation), layers)
    text = _texts.get(called)
    if text is None:
        text = _texts[called] = join(read_activations(called[0], layers))
    return text


# The texts of activations in earlier calls, by the names that the call gave and its number of layers.
_texts: dict[tuple[str | tuple[str, ...], int], str] = {}


def mlp_reconstruction_error(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str | Sequence[str] = "relu",
) -> Tensor:
    """Mean squared difference between each row and the output of the chain for it.

    Takes the arguments of :func:`mlp`, of a chain with as many outputs as inputs: (..., features) -> (...).
    """
    output = mlp(input, weights, biases, activation)
    if output.shape != input.shape:
        raise RuntimeError(
            f"mlp_reconstruction_error: expected as many outputs of the last layer as features of the input, "
            f"{input.shape[-1]}, got {output.shape[-1]}"
        )
    return torch.mean((output - input) ** 2, dim=-1)


def join_parameters(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """The parameters as the operators take them: the weights, then the biases, or no biases at all. If only some are
    missing, zeros take their place."""
    given = [bias for bias in biases if bias is not None]
    if given and len(given) < len(weights):
        given = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
    return [*weights, *given]


def split_parameters(parameters: Sequence[Tensor], layers: int) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """The weights, and a bias or None per weight."""
    return parameters[:layers], parameters[layers:] or (None,) * layers


def mlp_of_parameters(input: Tensor, parameters: Sequence[Tensor], activations: str, recompute: bool = False) -> Tensor:
    """:func:`mlp` for callers that know their arguments: ``parameters`` as :func:`join_parameters` returns them,
    ``activations`` as the text of ``fastnn.activations``, of one layer or more."""
    rank = input.dim()
    try:
        if rank == 2 and parameters and activations.count("|") < MOST_LAYERS and is_plain(input):
            if wants_gradient(input, *parameters):
                if activations == "identity" and _is_small_linear(input, *parameters):
                    return torch.nn.functional.linear(input, *parameters)
                return _record_plain(input, activations, recompute, *parameters)[0]
            return _mlp_call(input, parameters, activations)
        layers = layers_of(activations)
        if layers > MOST_LAYERS:
            weights, biases = split_parameters(parameters, layers)
            for first in range(0, layers, MOST_LAYERS):
                some = slice(first, first + MOST_LAYERS)
                of_some = join_parameters(weights[some], biases[some])
                input = mlp_of_parameters(input, of_some, join(activations.split("|")[some]), recompute)
            return input
        input, *parameters = autocast(input, *parameters)
        if rank > 0 and layers and not needs_reference(input):
            rows = input if rank == 2 else input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
            if needs_autograd(input, *parameters):
                output = _record(rows, activations, recompute, *parameters)[0]
            else:
                output = call_kernel(_mlp_op, rows, parameters, activations)
            return output if rank == 2 else output.reshape(*input.shape[:-1], output.shape[-1])
    except NotImplementedError:  # only PyTorch computes with such tensors: DTensor, sparse, quantized
        pass
    except RuntimeError as error:  # a subclass may have no rule for the operator, as DTensor in torch 2.10
        if type(input) is Tensor and _are_usual(parameters, layers_of(activations)):
            raise in_torchs_words(error, _reference, input, parameters, activations) from None
    return _reference(input, parameters, activations)


def _are_usual(parameters: Sequence[Tensor], layers: int) -> bool:
    """Whether weights are matrices that have a bias for each output. PyTorch takes vectors as weights, too, and
    broadcasts biases."""
    weights, biases = split_parameters(parameters, layers)
    return all(
        weight.dim() == 2 and (bias is None or bias.shape == weight.shape[:1])
        for weight, bias in zip(weights, biases, strict=False)
    )


def _reference(input: Tensor, parameters: Sequence[Tensor], activations: str) -> Tensor:
    each = activations.split("|") if activations else ()
    return reference.mlp(input, *split_parameters(parameters, len(each)), each)


def mlp_with_some_biases(input: Tensor, parameters: Sequence[Tensor | None], activations: str) -> Tensor:
    """:func:`mlp_of_parameters` for layers of which some have no bias: None is in its place."""
    layers = len(parameters) // 2
    weights: Any = parameters[:layers]
    if any(weight.dim() == 1 for weight in weights):  # PyTorch takes no bias then, not even of zeros
        return reference.mlp(input, weights, parameters[layers:], activations.split("|"))
    return mlp_of_parameters(input, join_parameters(weights, parameters[layers:]), activations)


def _is_small_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether the call is one small linear layer. Its shapes must be among those that the operator takes (linear takes
    more), and its number of rows must not be a symbol, as it is in ``torch.export``."""
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
    def forward(input: Tensor, activations: str, recompute: bool, *parameters: Tensor) -> tuple[Tensor, ...]:
        if recompute:
            return (_mlp_op(input, parameters, activations),)
        output, hidden = _mlp_with_hidden_op(input, parameters, activations)
        # Backward gets a copy of the output, since the caller may change the output in place.
        return (output, *((output.clone(),) if _saves_output(activations) else ()), *hidden)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        Mlp._keep(ctx, inputs, output[1:])

    @staticmethod
    def record(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        input, activations, recompute, *parameters = inputs
        if recompute:
            Mlp._keep(ctx, inputs, ())
            return (_mlp_op(input, parameters, activations),)
        output, hidden = _mlp_with_hidden_op(input, parameters, activations)
        Mlp._keep(ctx, inputs, (output, *hidden) if _saves_output(activations) else hidden)
        return (output,)

    @staticmethod
    def _keep(ctx: Any, inputs: tuple[Any, ...], made: Sequence[Tensor]) -> None:
        input, activations, recompute, *parameters = inputs
        ctx.call = (activations, recompute, len(parameters))
        ctx.save_for_backward(input, *parameters, *made)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Any, ...]:
        activations, recompute, parameters = ctx.call
        needed, saved, layers = ctx.needs_input_grad, ctx.saved_tensors, layers_of(activations)
        if wants_graph():
            both = saved[: 1 + parameters]
            own = [needed[0], *needed[3:]]
            found = gradients_by_reference(lambda *all: _by_reference(all, activations), both, own, [grad_output])
            return (found[0], None, None, *found[1:])
        if recompute:
            with torch.no_grad():
                output, hidden = _mlp_with_hidden_op(saved[0], saved[1:], activations)
            saved = (*saved, output, *hidden)
        elif not _saves_output(activations):
            # The operator expects a tensor of the output's sizes here, but does not read it. The gradient has these
            # sizes.
            saved = (*saved[: 1 + parameters], grad_output, *saved[1 + parameters :])
        wanted = (needed[0], True in needed[3 : 3 + layers], True in needed[3 + layers :])
        compute = MlpBackward.apply if torch.is_grad_enabled() else MlpBackward.forward
        grad_input, *grad_parameters = compute(grad_output, activations, parameters, wanted, *saved)
        return (grad_input, None, None, *grad_parameters)


def _by_reference(tensors: Sequence[Tensor], activations: str) -> Tensor:
    """Computes the chain by the reference. tensors: the input and the parameters."""
    names = activations.split("|")
    return reference.mlp(tensors[0], *split_parameters(tensors[1:], len(names)), names)


def _saves_output(activations: str) -> bool:
    """Whether backward needs the output of the last layer."""
    return last_of(activations).derived_from == "output"


_record_plain = eager_recorder(Mlp)
_record = recorder(Mlp, _record_plain, results=1)


class MlpBackward(torch.autograd.Function):
    """``fastnn::mlp_backward``, differentiable through the reference."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_output: Tensor, activations: str, parameters: int, wanted: tuple[bool, bool, bool], *saved: Tensor
    ) -> tuple[Tensor | None, ...]:
        layers, biases = layers_of(activations), 1 + parameters
        output, hidden = saved[biases], saved[biases + 1 :]
        grad_input, grad_weights, grad_biases = _mlp_backward_op(
            grad_output, saved[0], saved[1 : 1 + layers], activations, output, hidden, *wanted
        )
        return (
            grad_input if wanted[0] else None,
            *(grad_weights if wanted[1] else (None,) * layers),
            *(grad_biases if wanted[2] else (None,) * (parameters - layers)),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        grad_output, ctx.activations, parameters, _, *saved = inputs
        ctx.given = [gradient is not None for gradient in output]
        ctx.made = len(saved) - 1 - parameters  # tensors that forward made for backward
        ctx.save_for_backward(grad_output, *saved[: 1 + parameters])

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Any, ...]:
        grad_output, *inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[4 : 4 + len(inputs)]

        def by_reference(*tensors: Tensor) -> Tensor:
            return _by_reference(tensors, ctx.activations)

        of_grad_output, found = differentiate_twice(by_reference, grad_output, inputs, ctx.given, needed, grad_grads)
        return (of_grad_output, None, None, None, *found, *(None,) * ctx.made)


@raw_operator("mlp")
def _(input: Tensor, parameters: list[Tensor], activations: str) -> Tensor:
    check_same_device(input, *parameters)
    return input.new_empty(input.shape[0], parameters[layers_of(activations) - 1].shape[0])


@raw_operator("mlp_with_hidden")
def _(input: Tensor, parameters: list[Tensor], activations: str) -> tuple[Tensor, list[Tensor]]:
    check_same_device(input, *parameters)
    layers, output_serves = layers_of(activations), last_of(activations).derived_from != "input"
    outputs = [input.new_empty(input.shape[0], weight.shape[0]) for weight in parameters[:layers]]
    return input.new_empty(outputs[-1].shape), outputs[:-1] if output_serves else outputs


@raw_operator("mlp_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    weights: list[Tensor],
    activations: str,
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
