"""Recurrent networks and cells in place of torch.nn's.

They derive from ``RNNBase`` rather than from ``torch.nn.RNN``, because ``torch.compile`` refuses any instance of the
latter. Whatever the kernels do not cover (other dtypes, ``proj_size``, autocast) and every argument that does not fit
goes through the stock module's own ``forward``, so that the answer, or the error, is that of the installed torch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils.rnn import PackedSequence

from fastnn.ops._autograd import needs_reference
from fastnn.ops.rnn import rnn, rnn_cell


def _covers(input: Any) -> bool:
    """Whether the kernels take such an input at all."""
    return (
        isinstance(input, Tensor)
        and (input.is_cpu or input.is_cuda or input.is_meta)
        and input.layout is torch.strided
        and not torch._C._is_any_autocast_enabled()
        and not needs_reference(input)
    )


def _gpu_serves(input: Tensor, mode: str, hidden: int, batch: int, directions: int = 1, packed: bool = False) -> bool:
    """On a GPU, whether the recurrent weights stay on chip: where they don't, stock's kernels are the fastest."""
    if not input.is_cuda or torch.compiler.is_compiling():
        return True
    from fastnn.kernels._rnn_config import covers  # only now: it imports Triton

    return covers(mode, hidden, batch, directions, input.dtype, input.device, packed)


def _parameters(module: torch.nn.Module, names: Sequence[str]) -> list[Any]:
    """The parameters as they are now: a parametrization or ``functional_call`` may have put others in their place."""
    own = module._parameters
    return [own[name] if name in own else getattr(module, name) for name in names]


_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _Recurrent(RNNBase):
    """What RNN, GRU and LSTM share: the way to the kernel, or back to the stock module `_stock`."""

    _stock: type[RNNBase]
    _states = 1

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """As the stock module's: input (length, batch, in), (batch, length, in), (length, in) or packed."""
        answer = self._run_packed(input, hx) if isinstance(input, PackedSequence) else self._run(input, hx)
        return self._stock.forward(self, input, hx) if answer is None else answer

    def _run(self, input: Tensor, hx: Any) -> tuple[Tensor, Any] | None:
        """The kernel's answer for a tensor, or None where the stock module's is due."""
        if not _covers(input):
            return None
        batch_dim = 0 if self.batch_first else 1
        batched = len(input.shape) == 3
        if not batched:
            if len(input.shape) != 2:
                return None
            input = input.unsqueeze(batch_dim)
        sizes = input.shape
        if sizes[1 - batch_dim] == 0 or sizes[2] != self.input_size:
            return None
        state = [] if hx is None else self._state(input, sizes[batch_dim], hx, batched)
        weights = _parameters(self, self._flat_weights_names)
        if (
            state is None
            or weights[0].dtype is not input.dtype
            or self.proj_size > 0
            or not self._on_chip(input, sizes[batch_dim])
        ):
            return None
        output, final = self._call(input, None, state, weights, self.batch_first)
        if not batched:
            output, final = output.squeeze(batch_dim), [s.squeeze(1) for s in final]
        return output, final[0] if self._states == 1 else tuple(final)

    def _run_packed(self, packed: PackedSequence, hx: Any) -> tuple[PackedSequence, Any] | None:
        input, batch_sizes, sorted_indices, unsorted_indices = packed
        if not _covers(input) or input.dim() != 2 or input.shape[0] == 0 or input.shape[1] != self.input_size:
            return None
        state = [] if hx is None else self._state(input, int(batch_sizes[0]), hx, True)
        weights = _parameters(self, self._flat_weights_names)
        if (
            state is None
            or weights[0].dtype is not input.dtype
            or self.proj_size > 0
            or not self._on_chip(input, int(batch_sizes[0]), packed=True)
        ):
            return None
        if sorted_indices is not None:
            state = [s.index_select(1, sorted_indices) for s in state]
        output, final = self._call(input, batch_sizes, state, weights, False)
        if unsorted_indices is not None:
            final = [s.index_select(1, unsorted_indices) for s in final]
        result = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return result, final[0] if self._states == 1 else tuple(final)

    def _state(self, input: Tensor, batch: int, hx: Any, batched: bool) -> list[Tensor] | None:
        """hx as the operator takes it, or None if it does not fit."""
        if self._states == 2 and not (isinstance(hx, (tuple, list)) and len(hx) == 2):
            return None
        given = [hx] if self._states == 1 else list(hx)
        count = self.num_layers * (2 if self.bidirectional else 1)
        expected = (count, batch, self.hidden_size) if batched else (count, self.hidden_size)
        for tensor in given:
            if not isinstance(tensor, Tensor) or tensor.shape != expected:
                return None
            if tensor.dtype != input.dtype or tensor.device != input.device:
                return None
        return given if batched else [tensor.unsqueeze(1) for tensor in given]

    def _on_chip(self, input: Tensor, batch: int, packed: bool = False) -> bool:
        return _gpu_serves(input, self.mode, self.hidden_size, batch, 2 if self.bidirectional else 1, packed)

    def _call(
        self, input: Tensor, batch_sizes: Tensor | None, state: list[Tensor], weights: list[Tensor], batch_first: bool
    ) -> tuple[Tensor, Sequence[Tensor]]:
        dropout = self.dropout if self.training else 0.0
        return rnn(
            input, batch_sizes, state, weights, self.mode, self.num_layers, self.bidirectional, batch_first, dropout
        )


class RNN(_Recurrent):
    """``torch.nn.RNN``, all layers, directions and steps in one kernel."""

    _stock = torch.nn.RNN
    nonlinearity: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if len(args) > 3:
            nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        super().__init__(f"RNN_{nonlinearity.upper()}", *args, **kwargs)


class GRU(_Recurrent):
    """``torch.nn.GRU``, all layers, directions and steps in one kernel."""

    _stock = torch.nn.GRU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)


class LSTM(_Recurrent):
    """``torch.nn.LSTM``, all layers, directions and steps in one kernel; ``proj_size`` takes the stock path."""

    _stock = torch.nn.LSTM
    _states = 2

    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    check_forward_args = torch.nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = torch.nn.LSTM.permute_hidden  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)


class _Cell(RNNCellBase):
    """What the three cells share, like :class:`_Recurrent`."""

    _stock: Any
    _states = 1

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """As the stock cell's: input (batch, in) or (in) -> the new state."""
        answer = self._run(input, hx)
        return self._stock.forward(self, input, hx) if answer is None else answer

    def _mode(self) -> str | None:
        """Which of ``fastnn.ops.rnn.MODES``, or None for one that only the stock cell can refuse."""
        raise NotImplementedError

    def _run(self, input: Tensor, hx: Any) -> Any:
        if not _covers(input):
            return None
        sizes, mode = input.shape, self._mode()
        if mode is None or len(sizes) not in (1, 2) or sizes[-1] != self.input_size:
            return None
        given = () if hx is None else (hx,) if self._states == 1 else hx
        if hx is not None and len(given) != self._states:
            return None
        expected = (*sizes[:-1], self.hidden_size)
        for tensor in given:
            if not isinstance(tensor, Tensor) or tensor.shape != expected or tensor.dtype is not input.dtype:
                return None
        weights = _parameters(self, _CELL_WEIGHTS if self.bias else _CELL_WEIGHTS[:2])
        if weights[0].dtype is not input.dtype:
            return None
        if not _gpu_serves(input, mode, self.hidden_size, sizes[0] if len(sizes) == 2 else 1):
            return None
        if len(sizes) == 2:
            state = rnn_cell(input, given, weights, mode)
        else:
            state = rnn_cell(input.unsqueeze(0), [s.unsqueeze(0) for s in given], weights, mode)
            state = [s.squeeze(0) for s in state]
        return state[0] if self._states == 1 else tuple(state)


class RNNCell(_Cell):
    """``torch.nn.RNNCell``, the step in one kernel."""

    _stock = torch.nn.RNNCell
    __constants__ = torch.nn.RNNCell.__constants__
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def _mode(self) -> str | None:
        return {"tanh": "RNN_TANH", "relu": "RNN_RELU"}.get(self.nonlinearity)


class LSTMCell(_Cell):
    """``torch.nn.LSTMCell``, the step in one kernel."""

    _stock = torch.nn.LSTMCell
    _states = 2

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def _mode(self) -> str:
        return "LSTM"


class GRUCell(_Cell):
    """``torch.nn.GRUCell``, the step in one kernel."""

    _stock = torch.nn.GRUCell

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def _mode(self) -> str:
        return "GRU"
