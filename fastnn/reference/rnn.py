"""What ``rnn`` means, in plain PyTorch."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn.recurrent_modes import MODE_OF

State = tuple[Tensor, ...]


def _elman(activation: Callable[[Tensor], Tensor]) -> Callable[..., State]:
    def cell(
        input: Tensor, state: State, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
    ) -> State:
        return (activation(F.linear(input, w_ih, b_ih) + F.linear(state[0], w_hh, b_hh)),)

    return cell


def _gru(
    input: Tensor, state: State, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> State:
    input_r, input_z, input_n = F.linear(input, w_ih, b_ih).chunk(3, 1)
    hidden_r, hidden_z, hidden_n = F.linear(state[0], w_hh, b_hh).chunk(3, 1)
    r, z = torch.sigmoid(input_r + hidden_r), torch.sigmoid(input_z + hidden_z)
    n = torch.tanh(input_n + r * hidden_n)
    return ((state[0] - n) * z + n,)


def _lstm(
    input: Tensor, state: State, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> State:
    i, f, g, o = (F.linear(input, w_ih, b_ih) + F.linear(state[0], w_hh, b_hh)).chunk(4, 1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


CELLS: dict[str, Callable[..., State]] = {
    "RNN_TANH": _elman(torch.tanh),
    "RNN_RELU": _elman(torch.relu),
    "GRU": _gru,
    "LSTM": _lstm,
}


def rnn_cell(input: Tensor, state: State, weights: Sequence[Tensor], mode: str) -> State:
    """One step: input (batch, in), state [] for zeros, [h] or [h, c] of (batch, hidden), weights as
    ``torch.nn.RNNCell`` has them, and maybe a projection (outputs, hidden) of h -> the new state."""
    if not state:
        state = tuple(input.new_zeros(input.shape[0], size) for size in state_sizes(weights))
    weights, projection = split_projection(weights)
    new_state = CELLS[mode](input, state, *weights)
    return new_state if projection is None else (F.linear(new_state[0], projection), *new_state[1:])


def split_projection(weights: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor | None]:
    """The weights of one direction of one layer without the projection, which makes their number odd."""
    return (weights[:-1], weights[-1]) if len(weights) % 2 else (weights, None)


def state_sizes(weights: Sequence[Tensor]) -> tuple[int, int]:
    """How many elements h and c have, from the weights of one direction of one layer."""
    projection = split_projection(weights)[1]
    outputs = weights[1].shape[1]
    return outputs, outputs if projection is None else projection.shape[1]


def rnn(
    input: Tensor,
    batch_sizes: Tensor | None,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Tensor | None,
    mode: str,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, State]:
    """All layers, directions and steps. See :func:`fastnn.ops.rnn.rnn` for the arguments."""
    if batch_sizes is None:
        sequence = input.transpose(0, 1) if batch_first else input
        steps = list(sequence.unbind(0))
    else:
        steps = list(input.split(batch_sizes.tolist()))
    directions = 2 if bidirectional else 1
    count = num_layers * directions
    each = len(weights) // count
    if not state:
        sizes = state_sizes(weights[:each])[: MODE_OF[mode].states]
        state = [input.new_zeros(count, steps[0].shape[0], size) for size in sizes]
    finals = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            start = tuple(s[index] for s in state)
            output, final = _one_direction(
                steps, start, weights[index * each : (index + 1) * each], mode, reverse=direction == 1
            )
            outputs.append(output)
            finals.append(final)
        steps = [torch.cat(parts, 1) for parts in zip(*outputs, strict=True)]
        if masks is not None and layer + 1 < num_layers:
            rows = [step.shape[0] for step in steps]
            steps = [step * mask for step, mask in zip(steps, masks[layer].split(rows), strict=True)]
    final_state = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
    if batch_sizes is not None:
        return torch.cat(steps), final_state
    stacked = torch.stack(steps)
    return stacked.transpose(0, 1) if batch_first else stacked, final_state


def _one_direction(
    steps: Sequence[Tensor], state: State, weights: Sequence[Tensor], mode: str, reverse: bool
) -> tuple[list[Tensor], State]:
    """Sequences are sorted by length: the first rows of the state step, the others keep theirs."""
    outputs = []
    for step in reversed(steps) if reverse else steps:
        running = step.shape[0]
        new = rnn_cell(step, tuple(s[:running] for s in state), weights, mode)
        outputs.append(new[0])
        state = tuple(torch.cat([n, s[running:]]) for n, s in zip(new, state, strict=True))
    return outputs[::-1] if reverse else outputs, state
