"""Stock's kernels (cuDNN, MIOpen) behind ``fastnn::rnn``, for networks whose recurrent weights do not fit on chip. They
keep what they need for backward in a form of their own, so stock_backward runs forward again: a raw operator knows no
other way. fastnn.ops.rnn, before it records a gradient, asks ``rnn.with_stocks_gradient``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnn.kernels import _launch
from fastnn.kernels.rnn.problem import Problem

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
    "GRU": torch.gru,
    "LSTM": torch.lstm,
}


_CELLS: dict[str, Callable[..., Any]] = {
    "RNN_TANH": torch.rnn_tanh_cell,
    "RNN_RELU": torch.rnn_relu_cell,
    "GRU": torch.gru_cell,
    "LSTM": torch.lstm_cell,
}


def stock_cell(problem: Problem, input: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """One step: input (batch, in), state and the new state (batch, hidden) each."""
    state = state or [input.new_zeros(problem.batch, problem.hidden)] * problem.states
    new = _CELLS[problem.mode](input, tuple(state) if problem.mode == "LSTM" else state[0], *weights)
    return list(new) if problem.mode == "LSTM" else [new]


def run_stock(
    problem: Problem, input: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor], train: bool
) -> tuple[Tensor, ...]:
    """Output and final state, by the layers between which nothing is dropped."""
    if not state:
        state = [input.new_zeros(sizes) for sizes in problem.state_sizes]
    layers_each = problem.layers if problem.masks is None else 1
    per_call = len(weights) // problem.layers * layers_each
    finals = []
    x = input
    for layer in range(0, problem.layers, layers_each):
        first = layer * problem.directions
        start = [s[first : first + layers_each * problem.directions] for s in state]
        hx = tuple(start) if problem.mode == "LSTM" else start[0]
        flat = list(weights[layer // layers_each * per_call : (layer // layers_each + 1) * per_call])
        options = (problem.has_biases, layers_each, 0.0, train, problem.directions == 2)
        function = _FUNCTIONS[problem.mode]
        if problem.batch_sizes is None:
            x, *final = function(x, hx, flat, *options, problem.batch_first)
        else:
            x, *final = function(x, torch.tensor(problem.batch_sizes), hx, flat, *options)
        finals.append(final)
        if problem.masks is not None and layer + 1 < problem.layers:
            x = x * problem.as_given(problem.masks[layer])
    return (x, *(torch.cat(parts) for parts in zip(*finals, strict=True)))


def stock_forward(problem: Problem) -> tuple[Tensor, list[Tensor]]:
    with _launch.without_autocast(problem.kind.device):
        output, *final_state = run_stock(problem, problem.input, problem.state, problem.weights, train=False)
    return problem.as_given(problem.time_major(output)), final_state


def stock_backward(
    problem: Problem, grad_output: Tensor | None, grad_state: Sequence[Tensor | None],
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    input_wanted, state_wanted, weights_wanted = wanted
    states = problem.state or [problem.input.new_zeros(sizes) for sizes in problem.state_sizes]
    with torch.enable_grad():
        input = problem.input.detach().requires_grad_()
        state = [s.detach().requires_grad_() for s in states]
        weights = [w.detach().requires_grad_() for w in problem.weights]
        outputs = run_stock(problem, input, state, weights, train=True)
    grads = (grad_output, *grad_state)
    given = [i for i, grad in enumerate(grads) if grad is not None]
    leaves = [input, *state, *weights]
    gradients: Sequence[Tensor] = [torch.zeros_like(leaf) for leaf in leaves]
    if given:
        gradients = torch.autograd.grad(
            [outputs[i] for i in given], leaves, [grads[i] for i in given], allow_unused=True, materialize_grads=True
        )
    grad_input = gradients[0].contiguous() if input_wanted else input.new_empty(0)
    grad_states, grad_weights = gradients[1 : 1 + len(state)], gradients[1 + len(state) :]
    return grad_input.detach(), list(grad_states) if state_wanted else [], list(grad_weights) if weights_wanted else []
