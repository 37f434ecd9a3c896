"""The arguments of ``fastnn::rnn`` on a GPU, checked, and where their parts lie."""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastnn.kernels import _plan_cache, _precision, _target
from fastnn.kernels._check import Expected, check, check_first, check_same_kind, check_sizes
from fastnn.kernels.rnn.schedule import schedule_of
from fastnn.recurrent_modes import MODE_OF, MODES


@dataclass
class Problem:
    """A network of ``layers * directions`` cells on ``rows`` steps of sequences, time-major. All but the tensors is
    found out once for all calls alike, and what is derived from it is ``kept`` for the next of them."""

    kind: Expected
    mode: str
    layers: int
    directions: int
    batch_first: bool
    batch_sizes: tuple[int, ...] | None
    precision: str
    target: _target.Target
    steps: int = 0
    batch: int = 0
    rows: int = 0
    hidden: int = 0
    outputs: int = 0  # features of h: hidden, or those that LSTM's are projected to
    has_biases: bool = False
    is_projected: bool = False
    kept: dict[Any, Any] = field(default_factory=dict)

    def bind(
        self, input: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor], masks: Tensor | None
    ) -> "Problem":
        problem = copy.copy(self)
        problem.input, problem.weights, problem.masks = input, weights, masks
        problem.state = [tensor.contiguous() for tensor in state]
        return problem

    input: Tensor = field(init=False, repr=False)
    state: list[Tensor] = field(init=False, repr=False)
    weights: Sequence[Tensor] = field(init=False, repr=False)
    masks: Tensor | None = field(init=False, repr=False)

    @property
    def gates(self) -> int:
        return MODE_OF[self.mode].gates

    @property
    def states(self) -> int:
        return MODE_OF[self.mode].states

    @property
    def width(self) -> int:
        return self.directions * self.outputs

    @property
    def state_sizes(self) -> list[tuple[int, int, int]]:
        """Of h, and of c if there is one."""
        cells = self.layers * self.directions
        return [(cells, self.batch, size) for size in (self.outputs, self.hidden)][: self.states]

    @property
    def reserve_size(self) -> int:
        kept = (self.layers - 1) * self.outputs + self.layers * MODE_OF[self.mode].saved * self.hidden
        return self.rows * self.directions * kept

    def of_layer(self, layer: int) -> slice:
        """The layer's directions among all."""
        return slice(layer * self.directions, (layer + 1) * self.directions)

    def initial(self, layer: int) -> list[Tensor | None]:
        """The layer's initial states, None for zeros."""
        return [state[self.of_layer(layer)] for state in self.state] or [None] * self.states

    def split_reserve(self, reserve: Tensor) -> tuple[Tensor, Tensor]:
        """(layers - 1, rows, width) outputs of the other layers, (layers * directions, rows, kept, hidden)."""
        outputs = (self.layers - 1) * self.rows * self.width
        return (
            reserve[:outputs].view(self.layers - 1, self.rows, self.width),
            reserve[outputs:].view(self.layers * self.directions, self.rows, MODE_OF[self.mode].saved, self.hidden),
        )

    def weights_of(self, layer: int, direction: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """weight_ih, weight_hh, bias_ih, bias_hh"""
        each = 4 if self.has_biases else 2
        first = (layer * self.directions + direction) * each
        w_ih, w_hh, *biases = self.weights[first : first + each]
        b_ih, b_hh = biases or (None, None)
        return w_ih, w_hh, b_ih, b_hh

    def stacked_recurrent(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """weight_hh (directions, gates * hidden, hidden) and bias_hh (directions, gates * hidden) of a layer."""
        cells = [self.weights_of(layer, direction) for direction in range(self.directions)]
        if self.directions == 1:
            _, w_hh, _, b_hh = cells[0]
            return w_hh.contiguous(), None if b_hh is None else b_hh.contiguous()
        return (
            torch.stack([w_hh for _, w_hh, _, _ in cells]),
            torch.stack([b_hh for *_, b_hh in cells if b_hh is not None]) if self.has_biases else None,
        )

    def new_output(self) -> Tensor:
        return self.input.new_empty(self.rows, self.width)

    def as_given(self, rows: Tensor) -> Tensor:
        """(rows, features) as the input's dimensions are ordered."""
        if self.batch_sizes is not None:
            return rows
        output = rows.view(self.steps, self.batch, rows.shape[1])
        return output.transpose(0, 1) if self.batch_first else output

    def time_major(self, tensor: Tensor) -> Tensor:
        """The reverse: dense (rows, features)."""
        return (
            (tensor.transpose(0, 1) if self.batch_first else tensor).reshape(self.rows, tensor.shape[-1]).contiguous()
        )

    @functools.cached_property
    def schedule(self) -> Tensor | None:
        """For a packed batch, where each step's rows begin, with the end, and then each sequence's length."""
        if self.batch_sizes is None:
            return None
        return schedule_of(self.kind.op, self.batch_sizes, self.kind.device)

    def _rows_before(self, direction: int) -> Tensor:
        """In a packed batch, the row of the step before each row; past all rows, the sequence."""
        assert self.schedule is not None
        starts = self.schedule[: self.steps + 1]
        row = torch.arange(self.rows, device=self.kind.device)
        step = torch.searchsorted(starts, row, right=True) - 1
        sequence = row - starts[step]
        other = step + 1 if direction else step - 1
        clamped = other.clamp(0, self.steps - 1)
        before = starts[clamped] + sequence
        runs = (other == clamped) & (before < starts[clamped + 1])
        return torch.where(runs, before, self.rows + sequence)

    def states_before(self, layer: int, direction: int, output: Tensor) -> Tensor:
        """What each row's step began with: (rows, hidden), from the layer's output (rows, width)."""
        index = layer * self.directions + direction
        first = self.state[0][index] if self.state else output.new_zeros(self.batch, self.hidden)
        own = output[:, direction * self.hidden : (direction + 1) * self.hidden]
        if self.batch_sizes is not None:
            return torch.cat([own, first]).index_select(0, self._rows_before(direction))
        return torch.cat([first, own[: -self.batch]] if direction == 0 else [own[self.batch :], first])


def _check_weights(problem: Problem, input: Tensor, weights: Sequence[Tensor]) -> None:
    op, cells, given = problem.kind.op, problem.layers * problem.directions, len(weights)
    each = given // cells if problem.layers > 0 and given % cells == 0 else 0
    problem.is_projected = problem.mode == "LSTM" and each in (3, 5)
    check(each in (2, 4) or problem.is_projected, op, ": expected 2 weights, or 4 with biases, and maybe LSTM's"
          " projection, for each of ", problem.layers, " layers and ", problem.directions, " directions, got ",
          given)  # fmt: skip
    check(weights[0].dim() == 2 and weights[1].dim() == 2 and weights[1].shape[1] > 0, op,
          ": expected weights[1] of size (gates * hidden, hidden)")  # fmt: skip
    problem.has_biases, problem.outputs = each >= 4, weights[1].shape[1]
    problem.hidden = weights[0].shape[0] // problem.gates if problem.is_projected else problem.outputs
    gates = problem.gates * problem.hidden
    for i, weight in enumerate(weights):
        check_same_kind(problem.kind, weight, "weights")
        inputs = input.shape[-1] if i < each * problem.directions else problem.width
        sizes: list[tuple[int, ...]] = [(gates, inputs), (gates, problem.outputs)]
        sizes += [(gates,), (gates,)] if problem.has_biases else []
        sizes += [(problem.outputs, problem.hidden)] if problem.is_projected else []
        check_sizes(op, weight, sizes[i % each], "weights")


def _sizes(op: str, batch_sizes: Tensor | None) -> tuple[int, ...] | None:
    if batch_sizes is None:
        return None
    check(batch_sizes.device.type == "cpu" and batch_sizes.dtype is torch.int64, op,
          ": batch_sizes should be a 1D CPU int64 tensor")  # fmt: skip
    check(batch_sizes.dim() == 1 and batch_sizes.numel() > 0, op, ": batch_sizes should be 1D and not empty")
    return tuple(batch_sizes.tolist())


def _set_packed_steps(problem: Problem, sizes: tuple[int, ...], rows: int) -> None:
    op = problem.kind.op
    check(all(0 < size <= before for size, before in zip(sizes, [rows, *sizes], strict=False)), op,
          ": batch_sizes should be positive and in decreasing order")  # fmt: skip
    check(sum(sizes) == rows, op, ": batch_sizes sum to ", sum(sizes), ", but input has ", rows, " rows")
    problem.steps, problem.batch, problem.rows = len(sizes), sizes[0], rows


_plans = _plan_cache.Plans()


def check_problem(
    op: str, input: Tensor, batch_sizes: Tensor | None, state: Sequence[Tensor], weights: Sequence[Tensor],
    masks: Tensor | None, mode: int, layers: int, bidirectional: bool, batch_first: bool,
) -> Problem:  # fmt: skip
    target = _target.target_of(input.device)
    precision = _precision.dot_precision(input.dtype, "rnn", target)
    options = (mode, layers, bidirectional, batch_first, _sizes(op, batch_sizes), precision, target)
    key = (op, *options, len(state), *map(_plan_cache.facts, (input, masks, *state, *weights)))
    plan = _plans.get(key)
    if plan is None:
        plan = _plans.keep(key, _make_problem(op, input, state, weights, masks, *options))
    return plan.bind(input, state, weights, masks)


def _make_problem(
    op: str, input: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor], masks: Tensor | None, mode: int,
    layers: int, bidirectional: bool, batch_first: bool, batch_sizes: tuple[int, ...] | None, precision: str,
    target: _target.Target,
) -> Problem:  # fmt: skip
    check(0 <= mode < len(MODES), op, ": mode must be between 0 and ", len(MODES) - 1, ", got ", mode)
    kind, dims = check_first(op, input, "input"), 3 if batch_sizes is None else 2
    check(input.dim() == dims, op, ": input must have ", dims, " dimensions, got ", input.dim())
    check(batch_sizes is None or not batch_first, op, ": batch_first does not go with batch_sizes")
    directions = 2 if bidirectional else 1
    problem = Problem(kind, MODES[mode].name, layers, directions, batch_first, batch_sizes, precision, target)
    _check_weights(problem, input, weights)
    if batch_sizes is not None:
        _set_packed_steps(problem, batch_sizes, input.shape[0])
    else:
        problem.batch, problem.steps = input.shape[:2] if batch_first else (input.shape[1], input.shape[0])
        check(problem.steps > 0, "Expected sequence length to be larger than 0 in RNN")
        problem.rows = problem.steps * problem.batch
    check(
        len(state) in (0, problem.states), op, ": expected no state or ", problem.states, " tensors, got ", len(state)
    )
    for tensor, sizes in zip(state, problem.state_sizes, strict=False):
        check_same_kind(kind, tensor, "state")
        check_sizes(op, tensor, sizes, "state")
    if masks is not None:
        check_same_kind(kind, masks, "masks")
        check_sizes(op, masks, (layers - 1, problem.rows, problem.width), "masks")
    # Kernels number them with 32 bits, a last tile's too.
    check(max(problem.steps, problem.batch, problem.rows) < 2**31 - 2**10, op, ": 2**31 rows or more")
    return problem


def check_output_like(problem: Problem, tensor: Tensor, name: str) -> Tensor:
    """A tensor of the output's sizes, checked -> (rows, width), dense."""
    check_same_kind(problem.kind, tensor, name)
    sizes: tuple[int, ...] = (problem.steps, problem.batch, problem.width)
    if problem.batch_sizes is not None:
        sizes = (problem.rows, problem.width)
    elif problem.batch_first:
        sizes = (problem.batch, problem.steps, problem.width)
    check_sizes(problem.kind.op, tensor, sizes, name)
    return problem.time_major(tensor)
