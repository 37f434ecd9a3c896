"""``fastnn::mlp`` on a GPU: a chain of narrow layers in one launch, other layers one at a time, with a fused epilogue
where the sums are short and by stock's kernels where they are long."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn.activations import Activation
from fastnn.kernels import _launch, _plan_cache, _precision, _target
from fastnn.kernels._activation import STOCK_GRADIENTS
from fastnn.kernels.mlp.plan import Chain, Plan, plan_backward, plan_forward, saved_of, saves_input
from fastnn.ops.mlp import split_parameters


def _contiguous(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


# ---- forward ----------------------------------------------------------------------------------------------


def mlp(input: Tensor, parameters: Sequence[Tensor], activations: str) -> Tensor:
    """``fastnn::mlp``: input (rows, in); parameters, the weights (out_i, in_i), then the biases (out_i) or none
    -> (rows, out of the last)."""
    return _forward("mlp", input, parameters, activations, save=False)[0]


def mlp_with_hidden(input: Tensor, parameters: Sequence[Tensor], activations: str) -> tuple[Tensor, list[Tensor]]:
    """``fastnn::mlp_with_hidden``: the output, and what backward needs of each layer."""
    return _forward("mlp_with_hidden", input, parameters, activations, save=True)


_plans = _plan_cache.Plans()


def _forward(
    op: str, input: Tensor, parameters: Sequence[Tensor], activations: str, save: bool
) -> tuple[Tensor, list[Tensor]]:
    target = _target.target_of(input.device)
    precision = _precision.dot_precision(input.dtype, "linear", target)
    key = (op, activations, save, target, precision, _plan_cache.facts(input), *map(_plan_cache.facts, parameters))
    plan = _plans.get(key)
    if plan is None:
        plan = _plans.keep(key, plan_forward(op, input, parameters, activations, target, precision))
    weights, biases = split_parameters(parameters, plan.chain.layers)
    if plan.launch is not None:
        return _run_chain(plan, plan.launch, input, weights, biases, save)
    x, saved = input, []
    for i, (weight, bias, activation) in enumerate(zip(weights, biases, plan.activations, strict=True)):
        x, kept = _run_layer(plan.launches[i], x, weight, bias, activation, save and plan.saves_input[i])
        # The output itself serves for the last layer, unless the derivative needs the activation's input.
        if save and (kept is not None or i + 1 < plan.chain.layers):
            saved.append(x if kept is None else kept)
    return x, saved


def _run_chain(
    plan: Plan, launch: _launch.Launcher, input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    save: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    chain = plan.chain
    output = input.new_empty(chain.rows, chain.widths[-1])
    saved: list[Tensor | None] = [None] * chain.layers
    if save:
        saved[:-1] = [input.new_empty(chain.rows, width) for width in chain.widths[1:-1]]
        saved[-1] = torch.empty_like(output) if plan.saves_input[-1] else None
    launch(input.contiguous(), _contiguous(weights), _contiguous(biases), tuple(saved), output, chain.rows)
    return output, [tensor for tensor in saved if tensor is not None]


def _run_layer(
    launch: _launch.Launcher | None, x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """The layer's output, and with ``keep`` the activation's input."""
    if launch is None:
        with _launch.without_autocast(x.device):
            sums = F.linear(x, weight, bias)
            return activation(sums), sums if keep else None
    rows = x.shape[0]
    output = x.new_empty(rows, weight.shape[0])
    kept = torch.empty_like(output) if keep else None
    launch(x.contiguous(), *_contiguous((weight, bias)), kept, output, rows)
    return output, kept


# ---- backward ---------------------------------------------------------------------------------------------


def mlp_backward(
    grad_output: Tensor, input: Tensor, weights: Sequence[Tensor], activations: str, output: Tensor,
    hidden: Sequence[Tensor], input_wanted: bool, weights_wanted: bool, biases_wanted: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """``fastnn::mlp_backward``: grad_output and output (rows, out of the last), hidden as mlp_with_hidden gave it.
    A gradient that is not wanted comes back empty."""
    target = _target.target_of(input.device)
    precision = _precision.dot_precision(input.dtype, "linear", target)
    tensors = (grad_output, input, *weights, output, *hidden)
    wanted = (input_wanted, biases_wanted)
    key = ("backward", activations, target, precision, wanted, len(weights), *map(_plan_cache.facts, tensors))
    plan = _plans.get(key)
    if plan is None:
        plan = plan_backward(grad_output, input, weights, activations, output, hidden, target, precision)
        _plans.keep(key, plan)
    chain, numbers, saved = plan.chain, plan.activations, _contiguous(saved_of(plan.activations, output, hidden))
    with _launch.without_autocast(input.device):
        if plan.launch is not None:
            grad_sums, grad_biases, grad_input = _chain_gradients(
                chain, plan.launch, grad_output, weights, saved, input_wanted, biases_wanted
            )
        else:
            grad_sums, grad_biases, grad_input = _layer_gradients(
                chain, grad_output, weights, numbers, saved, input_wanted, biases_wanted
            )
        grad_weights = []
        if weights_wanted:
            layer_inputs = [input, *map(_layer_output, numbers[:-1], saved[:-1])]
            grad_weights = [g.t() @ x for g, x in zip(grad_sums, layer_inputs, strict=True)]
    return input.new_empty(0, chain.widths[0]) if grad_input is None else grad_input, grad_weights, grad_biases


def _layer_output(activation: Activation, saved: Tensor) -> Tensor:
    return activation(saved) if saves_input(activation) else saved


def _chain_gradients(
    chain: Chain, launch: _launch.Launcher, grad_output: Tensor, weights: Sequence[Tensor], saved: tuple[Tensor, ...],
    input_wanted: bool, biases_wanted: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:  # fmt: skip
    """The gradients before each activation, those of the biases, and the input's."""
    grad_sums = tuple(torch.empty_like(tensor) for tensor in saved)
    bias_parts: tuple[Tensor | None, ...] = (None,) * chain.layers
    if biases_wanted:
        bias_parts = tuple(
            grad_output.new_empty(launch.grid[0], width, dtype=torch.float32) for width in chain.widths[1:]
        )
    grad_input = grad_output.new_empty(chain.rows, chain.widths[0]) if input_wanted else None
    launch(grad_output.contiguous(), _contiguous(weights), saved, grad_sums, bias_parts, grad_input, chain.rows)
    # Parts are added up in a fixed order: results repeat bit for bit.
    grad_biases = [parts.sum(0).to(grad_output.dtype) for parts in bias_parts if parts is not None]
    return list(grad_sums), grad_biases, grad_input


def _layer_gradients(
    chain: Chain, grad: Tensor, weights: Sequence[Tensor], activations: Sequence[Activation], saved: tuple[Tensor, ...],
    input_wanted: bool, biases_wanted: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:  # fmt: skip
    """The same by stock's kernels."""
    grad_sums: list[Tensor] = []
    for i in reversed(range(chain.layers)):
        grad = STOCK_GRADIENTS[activations[i].kind.name](grad, saved[i], *activations[i].parameters)
        grad_sums.insert(0, grad)
        if i > 0 or input_wanted:
            grad = grad @ weights[i]
    grad_biases = [g.sum(0) for g in grad_sums] if biases_wanted else []
    return grad_sums, grad_biases, grad if input_wanted else None
