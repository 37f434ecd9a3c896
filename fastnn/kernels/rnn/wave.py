"""All layers of ``fastnn::rnn`` in one launch, forward and backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnn.kernels.rnn import wave_kernels as kernels
from fastnn.kernels.rnn.launchers import both, input_products, launcher, run_wave, strides_of_gates
from fastnn.kernels.rnn.plan import Config
from fastnn.kernels.rnn.problem import Problem
from fastnn.recurrent_modes import MODE_OF


def _weights(problem: Problem) -> tuple[tuple[Tensor | None, ...], ...]:
    """The layers' weight_ih, weight_hh, bias_ih and bias_hh."""
    layers = (problem.weights_of(layer, 0) for layer in range(problem.layers))
    return tuple(zip(*(tuple(None if t is None else t.contiguous() for t in layer) for layer in layers), strict=True))


def _progress(problem: Problem, tiles: int) -> Tensor:
    return torch.zeros(problem.layers * tiles, dtype=torch.int32, device=problem.kind.device)


def wave_forward(
    problem: Problem, reserve: Tensor | None, output: Tensor, final_state: Sequence[Tensor], config: Config
) -> None:
    """Fills output (rows, hidden), final_state, and the reserve if there is one."""
    gates = output.new_empty(problem.layers, problem.rows, problem.gates * problem.hidden)
    input_products(problem, 0, problem.input, gates[:1])
    if reserve is None:
        hidden_outputs, saved = output.new_empty(problem.layers - 1, problem.rows, problem.hidden), None
    else:
        hidden_outputs, saved = problem.split_reserve(reserve)
    saved = saved if MODE_OF[problem.mode].saved else None
    weights_ih, weights_hh, biases_ih, biases_hh = _weights(problem)
    biases = (biases_ih, biases_hh) if problem.has_biases else (None, None)
    h0, c0 = both(problem.state)
    masks = None if problem.masks is None else problem.masks.contiguous()
    launch = launcher(problem, kernels.wave_forward, config, *biases, masks, h0, saved, problem.schedule)
    tensors = (gates, weights_ih, weights_hh, *biases, masks, h0, c0, hidden_outputs, output, saved,
               *both(final_state), _progress(problem, launch.grid[0]), problem.schedule)  # fmt: skip
    sizes = (problem.steps, problem.batch, problem.rows, *strides_of_gates(problem, 0))
    run_wave(launch, problem.layers, config.chunk, tensors, sizes)


def wave_backward(
    problem: Problem, grad_output: Tensor | None, grad_state: Sequence[Tensor | None], output: Tensor, reserve: Tensor,
    grad_initial: Sequence[Tensor], config: Config,
) -> Tensor:  # fmt: skip
    """Fills grad_initial -> the gradients before the activations, (layers, rows, kinds, hidden)."""
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    hidden_outputs, saved = problem.split_reserve(reserve)
    saved = saved if MODE_OF[problem.mode].saved else None
    grad_gates = output.new_empty(problem.layers, problem.rows, 1 if problem.gates == 1 else 4, problem.hidden)
    weights_ih, weights_hh, _, _ = _weights(problem)
    h0, c0 = both(problem.state)
    grad_h_n, grad_c_n = both([None if grad is None else grad.contiguous() for grad in grad_state])
    masks = None if problem.masks is None else problem.masks.contiguous()
    launch = launcher(problem, kernels.wave_backward, config, masks, h0, grad_h_n, grad_c_n, problem.schedule)
    tensors = (grad_output, torch.empty_like(hidden_outputs), weights_ih, weights_hh, masks, h0, c0, hidden_outputs,
               output, saved, grad_h_n, grad_c_n, grad_gates, *both(grad_initial), _progress(problem, launch.grid[0]),
               problem.schedule)  # fmt: skip
    run_wave(launch, problem.layers, config.chunk, tensors, (problem.steps, problem.batch, problem.rows))
    return grad_gates
