"""``fastnn::rnn`` on a GPU: a layer's input products in one GEMM, its recurrence in one launch with the recurrent
weights on chip, or all layers' in one launch; backward the same in reverse, then large GEMMs. Where that does not pay,
stock's kernels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnn.kernels import _launch
from fastnn.kernels._check import check, check_same_kind, check_sizes
from fastnn.kernels.rnn import plan as _rnn_config
from fastnn.kernels.rnn.backward_kernels import backward
from fastnn.kernels.rnn.kernels import forward
from fastnn.kernels.rnn.launchers import both, input_products, launcher, run_spread, strides_of_gates
from fastnn.kernels.rnn.plan import Config
from fastnn.kernels.rnn.problem import Problem, check_output_like, check_problem
from fastnn.kernels.rnn.spread_kernels import spread_backward, spread_forward
from fastnn.kernels.rnn.stock import run_stock, stock_backward, stock_cell, stock_forward
from fastnn.kernels.rnn.wave import wave_backward, wave_forward
from fastnn.recurrent_modes import MODE_OF


def _spread_state(problem: Problem, parts: Sequence[Tensor | None]) -> Tensor:
    """(states, directions, batch, hidden) in float32, None for zeros."""
    sizes = (problem.states, problem.directions, problem.batch, problem.hidden)
    state = torch.zeros(sizes, dtype=torch.float32, device=problem.kind.device)
    for own, part in zip(state, parts, strict=True):
        if part is not None:
            own.copy_(part)
    return state


def _arrived(launch: _launch.Launcher) -> Tensor:
    return torch.zeros(launch.grid[0] * launch.grid[1], dtype=torch.int32, device=launch.device)


# ---- forward ----------------------------------------------------------------------------------------------


def rnn(
    input: Tensor, batch_sizes: Tensor | None, state: Sequence[Tensor], weights: Sequence[Tensor],
    masks: Tensor | None, mode: int, num_layers: int, bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """``fastnn::rnn``: see fastnn.ops.rnn.rnn for the arguments. An input (batch, in) without batch_sizes is a cell's:
    one step of one layer."""
    if _is_cell("rnn", input, batch_sizes, num_layers, bidirectional):
        output, final = rnn(input.unsqueeze(0), None, _unsqueezed(state), weights, masks, mode, num_layers,
                            bidirectional, batch_first)  # fmt: skip
        return output.squeeze(0), [s.squeeze(0) for s in final]
    problem = check_problem("rnn", input, batch_sizes, state, weights, masks, mode, num_layers, bidirectional,
                            batch_first)  # fmt: skip
    return _forward(problem, None)


def rnn_with_reserve(
    input: Tensor, batch_sizes: Tensor | None, state: Sequence[Tensor], weights: Sequence[Tensor],
    masks: Tensor | None, mode: int, num_layers: int, bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:  # fmt: skip
    """``fastnn::rnn_with_reserve``: also the outputs of all layers but the last, (layers - 1, rows, directions *
    hidden), and what the cells keep, (layers * directions, rows, kept, hidden), in one tensor."""
    if _is_cell("rnn_with_reserve", input, batch_sizes, num_layers, bidirectional):
        output, final, reserve = rnn_with_reserve(input.unsqueeze(0), None, _unsqueezed(state), weights, masks, mode,
                                                  num_layers, bidirectional, batch_first)  # fmt: skip
        return output.squeeze(0), [s.squeeze(0) for s in final], reserve
    problem = check_problem("rnn_with_reserve", input, batch_sizes, state, weights, masks, mode, num_layers,
                            bidirectional, batch_first)  # fmt: skip
    reserve = input.new_empty(problem.reserve_size)
    return (*_forward(problem, reserve), reserve)


def rnn_cell(
    input: Tensor, mode: int, h: Tensor | None, c: Tensor | None, weight_ih: Tensor, weight_hh: Tensor,
    bias_ih: Tensor | None = None, bias_hh: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """``fastnn::rnn_cell``: one step; input (batch, in), h and c (batch, hidden) or None for zeros."""
    op = "rnn_cell"
    check(input.dim() == 2, op, ": expected input to be 2D (batch, features), got ", input.dim(), "D tensor instead")
    state = [s.unsqueeze(0) for s in (h, c) if s is not None]
    weights = [w for w in (weight_ih, weight_hh, bias_ih, bias_hh) if w is not None]
    problem = check_problem(op, input.unsqueeze(0), None, state, weights, None, mode, 1, False, False)
    if problem.rows > 0 and _rnn_config.config_of(problem, training=False) is None:
        with _launch.without_autocast(input.device):
            return stock_cell(problem, input, [s for s in (h, c) if s is not None], weights)
    return [s.squeeze(0) for s in _forward(problem, None)[1]]


def with_stocks_gradient(
    input: Tensor, batch_sizes: Tensor | None, state: Sequence[Tensor], weights: Sequence[Tensor],
    masks: Tensor | None, mode: int, num_layers: int, bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, Sequence[Tensor]] | None:  # fmt: skip
    """What the operator gives, recorded by stock's autograd, where stock's kernels run the network; else None."""
    is_cell = _is_cell("rnn", input, batch_sizes, num_layers, bidirectional)
    shaped, states = (input.unsqueeze(0), _unsqueezed(state)) if is_cell else (input, state)
    problem = check_problem("rnn", shaped, batch_sizes, states, weights, masks, mode, num_layers, bidirectional,
                            batch_first)  # fmt: skip
    if problem.rows == 0 or _rnn_config.config_of(problem, training=True) is not None:
        return None
    if is_cell:
        final = stock_cell(problem, input, state, weights)
        return final[0], final
    output, *final = run_stock(problem, problem.input, problem.state, problem.weights, train=True)
    return output, final


def _is_cell(op: str, input: Tensor, batch_sizes: Tensor | None, num_layers: int, bidirectional: bool) -> bool:
    if input.dim() != 2 or batch_sizes is not None:
        return False
    check(num_layers == 1 and not bidirectional, op, ": a 2D input is one step of one layer")
    return True


def _unsqueezed(tensors: Sequence[Any]) -> list[Any]:
    return [None if tensor is None else tensor.unsqueeze(0) for tensor in tensors]


def _forward(problem: Problem, reserve: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Output and final state; with a reserve, that is filled too."""
    output = problem.new_output()
    final_state = [problem.input.new_empty(sizes) for sizes in problem.state_sizes]
    if problem.rows == 0:
        return problem.as_given(output), final_state
    config = _rnn_config.config_of(problem, training=reserve is not None)
    if config is None:
        return stock_forward(problem)
    if config.chunk:
        wave_forward(problem, reserve, output, final_state, config)
        return problem.as_given(output), final_state
    x = problem.input
    for layer in range(problem.layers):
        last = layer + 1 == problem.layers
        layer_output = output if last else problem.new_output()
        saved = None
        if reserve is not None:
            hidden_outputs, kept = problem.split_reserve(reserve)
            layer_output = output if last else hidden_outputs[layer]
            saved = kept[problem.of_layer(layer)] if MODE_OF[problem.mode].saved else None
        _run_layer(problem, layer, x, layer_output, saved, final_state, config)
        x = layer_output if last or problem.masks is None else layer_output * problem.masks[layer]
    return problem.as_given(output), final_state


def _run_layer(
    problem: Problem, layer: int, x: Tensor, output: Tensor, saved: Tensor | None, final_state: Sequence[Tensor],
    config: Config,
) -> None:  # fmt: skip
    """x: (rows, in), or in the first layer the input as given."""
    gates = x.new_empty(problem.directions, problem.rows, problem.gates * problem.hidden)
    input_products(problem, layer, x, gates)
    initial = problem.initial(layer)
    final = [state[problem.of_layer(layer)] for state in final_state]
    weight, bias = problem.stacked_recurrent(layer)
    sizes = (problem.steps, problem.batch, problem.rows, *strides_of_gates(problem, layer))
    if config.units:
        launch = launcher(problem, spread_forward, config, bias, saved, problem.schedule)
        state = _spread_state(problem, initial)
        hidden = gates.new_empty(2, *state.shape[1:])
        hidden[1].copy_(state[0])
        tensors = (gates, weight, bias, hidden, state, output, saved, _arrived(launch), problem.schedule)
        run_spread(launch, problem.steps, tensors, sizes)
        for tensor, own in zip(final, state, strict=True):
            tensor.copy_(own)
        return
    launch = launcher(problem, forward, config, bias, *initial, saved, problem.schedule)
    launch(gates, weight, bias, *both(initial), output, saved, *both(final), problem.schedule, *sizes)


# ---- backward ---------------------------------------------------------------------------------------------


def rnn_backward(
    grad_output: Tensor | None, grad_state: Sequence[Tensor | None], input: Tensor, batch_sizes: Tensor | None,
    state: Sequence[Tensor], weights: Sequence[Tensor], masks: Tensor | None, output: Tensor, reserve: Tensor,
    mode: int, num_layers: int, bidirectional: bool, batch_first: bool, input_wanted: bool, state_wanted: bool,
    weights_wanted: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """``fastnn::rnn_backward``: the gradients of input, state and weights; those not wanted come back empty."""
    op = "rnn_backward"
    if _is_cell(op, input, batch_sizes, num_layers, bidirectional):
        grad = None if grad_output is None else grad_output.unsqueeze(0)
        grad_input, grad_initial, grad_weights = rnn_backward(
            grad, _unsqueezed(grad_state), input.unsqueeze(0), None, _unsqueezed(state), weights, masks,
            output.unsqueeze(0), reserve, mode, num_layers, bidirectional, batch_first, input_wanted, state_wanted,
            weights_wanted,
        )  # fmt: skip
        return grad_input.squeeze(0) if input_wanted else grad_input, [g.squeeze(0) for g in grad_initial], grad_weights
    problem = check_problem(op, input, batch_sizes, state, weights, masks, mode, num_layers, bidirectional, batch_first)
    check(len(grad_state) == problem.states, op, ": expected ", problem.states, " grad_state, got ", len(grad_state))
    for tensor, sizes in zip(grad_state, problem.state_sizes, strict=True):
        if tensor is not None:
            check_same_kind(problem.kind, tensor, "grad_state")
            check_sizes(op, tensor, sizes, "grad_state")
    time_major = None if grad_output is None else check_output_like(problem, grad_output, "grad_output")
    output = check_output_like(problem, output, "output")
    check_same_kind(problem.kind, reserve, "reserve")
    check_sizes(op, reserve, (problem.reserve_size,), "reserve")
    wanted = (input_wanted, state_wanted, weights_wanted)
    config = _rnn_config.config_of(problem, training=True)
    with _launch.without_autocast(input.device):
        if config is None or problem.rows == 0:
            return stock_backward(problem, grad_output, grad_state, wanted)
        return _backward(problem, time_major, grad_state, output, reserve.contiguous(), wanted, config)


def _backward(
    problem: Problem, grad: Tensor | None, grad_state: Sequence[Tensor | None], output: Tensor, reserve: Tensor,
    wanted: tuple[bool, bool, bool], config: Config,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    input_wanted, state_wanted, weights_wanted = wanted
    hidden_outputs, kept = problem.split_reserve(reserve)
    grad_initial = [problem.input.new_empty(sizes) for sizes in problem.state_sizes]
    grad_weights: list[Tensor] = []
    all_gates = (
        wave_backward(problem, grad, grad_state, output, reserve, grad_initial, config) if config.chunk else None
    )
    for layer in reversed(range(problem.layers)):
        layer_output = output if layer + 1 == problem.layers else hidden_outputs[layer]
        if all_gates is None:
            grad_gates = _reverse_layer(problem, layer, grad, grad_state, layer_output, kept, grad_initial, config)
        else:
            grad_gates = all_gates[layer : layer + 1]
        x = problem.time_major(problem.input) if layer == 0 else hidden_outputs[layer - 1]
        if layer > 0 and problem.masks is not None:
            x = x * problem.masks[layer - 1]
        if weights_wanted:
            grad_weights = _weight_gradients(problem, layer, grad_gates, x, layer_output) + grad_weights
        if input_wanted if layer == 0 else all_gates is None:
            grad = _input_gradient(problem, layer, grad_gates)
            if layer > 0 and problem.masks is not None:
                grad = grad * problem.masks[layer - 1]
    grad_input = problem.input.new_empty(0)
    if input_wanted and grad is not None:
        grad_input = problem.as_given(grad).contiguous()
    return grad_input, grad_initial if state_wanted else [], grad_weights


def _reverse_layer(
    problem: Problem, layer: int, grad: Tensor | None, grad_state: Sequence[Tensor | None], output: Tensor,
    kept: Tensor, grad_initial: Sequence[Tensor], config: Config,
) -> Tensor:  # fmt: skip
    """The gradients before the activations, (directions, rows, kinds, hidden): one kind, or those of _rnn_cells."""
    of_layer = problem.of_layer(layer)
    grad_gates = output.new_empty(problem.directions, problem.rows, 1 if problem.gates == 1 else 4, problem.hidden)
    grad_final = [None if g is None else g.contiguous()[of_layer] for g in grad_state]
    grad_start = [g[of_layer] for g in grad_initial]
    initial = problem.initial(layer)
    w_hh, _ = problem.stacked_recurrent(layer)
    sizes = (problem.steps, problem.batch, problem.rows)
    saved = None if problem.gates == 1 else kept[of_layer]
    if config.units:
        launch = launcher(problem, spread_backward, config, grad, *both(initial), problem.schedule)
        state = _spread_state(problem, grad_final)
        tensors = (grad, output, saved, *both(initial), w_hh, grad_gates, state, _arrived(launch), problem.schedule)
        run_spread(launch, problem.steps + 1, tensors, sizes)
        for tensor, own in zip(grad_start, state, strict=True):
            tensor.copy_(own)
        return grad_gates
    launch = launcher(problem, backward, config, grad, *grad_final, *initial, problem.schedule)
    launch(grad, output, saved, *both(initial), w_hh, *both(grad_final), grad_gates, *both(grad_start),
           problem.schedule, *sizes)  # fmt: skip
    return grad_gates


def _of_input(problem: Problem, grad_gates: Tensor) -> Tensor:
    """Of one direction's (rows, kinds, hidden), what the input's weights meet: (rows, gates * hidden)."""
    return grad_gates[:, -problem.gates :].flatten(1)


def _of_state(problem: Problem, grad_gates: Tensor) -> list[Tensor]:
    """The same for the recurrent weights, (rows, .. * hidden) each, in the order of the weights' rows."""
    if problem.mode == "GRU":
        return [grad_gates[:, 1:3].flatten(1), grad_gates[:, 0]]
    return [grad_gates.flatten(1)]


def _weight_gradients(problem: Problem, layer: int, grad_gates: Tensor, x: Tensor, output: Tensor) -> list[Tensor]:
    result = []
    for direction, own in enumerate(grad_gates):
        before = problem.states_before(layer, direction, output)
        recurrent = before.new_empty(problem.gates * problem.hidden, problem.hidden)
        start = 0
        for part in _of_state(problem, own):
            torch.mm(part.t(), before, out=recurrent[start : start + part.shape[1]])
            start += part.shape[1]
        result += [_of_input(problem, own).t() @ x, recurrent]
        if problem.has_biases:
            sums = own.sum(0, keepdim=True)
            result += [_of_input(problem, sums).flatten(), torch.cat(_of_state(problem, sums), 1).flatten()]
    return result


def _input_gradient(problem: Problem, layer: int, grad_gates: Tensor) -> Tensor:
    """(rows, in)"""
    grad = _of_input(problem, grad_gates[0]) @ problem.weights_of(layer, 0)[0]
    if problem.directions == 2:
        grad = torch.addmm(grad, _of_input(problem, grad_gates[1]), problem.weights_of(layer, 1)[0])
    return grad
