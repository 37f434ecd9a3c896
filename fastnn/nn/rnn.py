"""Recurrent networks and cells in place of torch.nn's.

They derive from ``RNNBase`` rather than from ``torch.nn.RNN``, because ``torch.compile`` refuses any instance of the
latter. Whatever the kernels do not cover (other dtypes) and every argument that does not fit goes through
the stock module's own ``forward``, so that the answer, or the error, is that of the installed torch. What fits is the
operator's to decide, which checks everything anyway.
"""

from collections.abc import Sequence
from operator import is_, itemgetter
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils.rnn import PackedSequence

from fastnn.ops._autograd import autocast_is_on, is_compiling, is_exporting, is_plain, needs_reference
from fastnn.ops.rnn import plain_rnn, plain_rnn_cell, rnn, rnn_cell
from fastnn.ops.rnn_head import train_rnn_with_head
from fastnn.recurrent_modes import NUMBER_OF

# One look-up in place of eight: nn.Module makes attributes slow.
_settings = itemgetter(
    "mode", "num_layers", "bidirectional", "batch_first", "dropout", "training", "_flat_weights", "_parameters"
)


def _covers(input: Any) -> bool:
    """Whether to ask the operator at all."""
    if not isinstance(input, Tensor) or needs_reference(input):
        return False
    # The CPU has no kernels in float16, so stock computes, and its results are float16.
    return not (autocast_is_on() and input.is_cpu and torch.get_autocast_dtype("cpu") is torch.float16)


def _parameters(module: torch.nn.Module, names: Sequence[str]) -> list[Any]:
    """The parameters as they are now: a parametrization or ``functional_call`` may have put others in their place."""
    own = module._parameters
    try:
        return [own[name] for name in names]
    except KeyError:
        return [own[name] if name in own else getattr(module, name) for name in names]


class _OnStock:
    """The base of layers and cells. `_stock` is the stock class that they replace."""

    _stock: Any

    def __prepare_scriptable__(self) -> Any:
        """What ``torch.jit.script`` takes in place of this: the stock module, with the same parameters."""
        twin = self._stock.__new__(self._stock)
        twin.__dict__.update(self.__dict__)
        return twin


class _Recurrent(_OnStock, RNNBase):
    """What RNN, GRU and LSTM share: the way to the kernel, or back to the stock module."""

    _states = 1

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """As the stock module's: input (length, batch, in), (batch, length, in), (length, in) or packed."""
        if isinstance(input, Tensor) and is_plain(input):
            plain = self._run_plain(input, hx)
            if plain is not None:
                return plain
        packed = isinstance(input, PackedSequence)
        if not _covers(input.data if packed else input):
            return self._by_stock(input, hx)
        weights = self._weights()
        draws = self.training and self.dropout and not (is_compiling() or is_exporting())
        random = torch.get_rng_state() if draws else None
        try:
            answer = self._run_packed(input, hx, weights) if packed else self._run(input, hx, weights)
        except (RuntimeError, IndexError):
            answer = None  # the stock module has its own words for arguments that do not fit
            if random is not None:  # dropout's masks are drawn before the operator sees the arguments
                torch.set_rng_state(random)
        return self._by_stock(input, hx) if answer is None else answer

    def _run_plain(self, input: Tensor, hx: Any, head: Sequence[Tensor] | None = None) -> Any:
        """Runs the kernel for the most usual kind of call, in a few microseconds; None for other calls. With a `head`,
        which is the weight and bias of a linear layer on the last step, the result is that layer's, in training."""
        try:
            mode, layers, bidirectional, batch_first, dropout, training, weights, own = _settings(self.__dict__)
            if hx is None:
                state: Any = ()
            elif mode != "LSTM":
                state = (hx,)
            else:
                state = hx
            if (
                input.dim() != 3
                or not isinstance(state, (tuple, list))
                or (training and dropout)
                or len(own) != len(weights)
                or not all(map(is_, own.values(), weights))
            ):
                return None
            if head is not None:
                return train_rnn_with_head(input, weights, head, (NUMBER_OF[mode], layers, bidirectional, batch_first))
            output, final = plain_rnn(
                input, None, state, weights, None, NUMBER_OF[mode], layers, bidirectional, batch_first
            )
        except (AttributeError, KeyError, RuntimeError, TypeError):  # for example because the arguments do not fit
            return None
        return output, final[0] if mode != "LSTM" else tuple(final)

    def _by_stock(self, input: Any, hx: Any) -> tuple[Any, Any]:
        if isinstance(input, PackedSequence):
            states = self.num_layers * (2 if self.bidirectional else 1)
            if any(state.shape[:1] != (states,) for state in self._state(hx) or ()):
                # Stock's LSTM omits this check of packed sequences, and would read beyond the end.
                self.check_forward_args(input.data, hx, input.batch_sizes)
        return self._stock.forward(self, input, hx)

    def _weights(self) -> list[Any]:
        """The weights that stock would use: those in `_flat_weights`, which a user may assign to, or the attributes if
        one of these has been assigned to since."""
        if is_compiling():
            return _parameters(self, self._flat_weights_names)
        weights, flat = list(map(self._parameters.get, self._flat_weights_names)), self._flat_weights
        if len(flat) == len(weights) and all(map(is_, weights, flat)):
            return weights
        if is_exporting():
            return _parameters(self, self._flat_weights_names)
        self._update_flat_weights()
        return self._flat_weights

    def _run(self, input: Tensor, hx: Any, weights: list[Tensor]) -> tuple[Tensor, Any] | None:
        """Runs the kernel on a tensor; None where the stock module has to run."""
        batch_dim = 0 if self.batch_first else 1
        batched = input.dim() == 3
        if not batched:
            input = input.unsqueeze(batch_dim)
        state = self._state(hx)
        if state is None:
            return None
        if not batched:
            state = [s.unsqueeze(1) for s in state]
        dropout = self.dropout if self.training else 0.0
        output, final = rnn(
            input, None, state, weights, self.mode, self.num_layers, self.bidirectional, self.batch_first, dropout
        )
        if not batched:
            output, final = output.squeeze(batch_dim), [s.squeeze(1) for s in final]
        return output, final[0] if self._states == 1 else tuple(final)

    def _run_packed(self, packed: PackedSequence, hx: Any, weights: list[Tensor]) -> tuple[PackedSequence, Any] | None:
        input, batch_sizes, sorted_indices, unsorted_indices = packed
        state = self._state(hx)
        if state is None:
            return None
        if sorted_indices is not None:
            state = [s.index_select(1, sorted_indices) for s in state]
        dropout = self.dropout if self.training else 0.0
        output, final = rnn(
            input, batch_sizes, state, weights, self.mode, self.num_layers, self.bidirectional, False, dropout
        )
        if unsorted_indices is not None:
            final = [s.index_select(1, unsorted_indices) for s in final]
        result = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return result, final[0] if self._states == 1 else tuple(final)

    def _state(self, hx: Any) -> Sequence[Tensor] | None:
        """hx in the form that the operator takes, or None where it is no valid state."""
        if hx is None:
            return ()
        state = (hx,) if self._states == 1 else hx
        if not isinstance(state, (tuple, list)):
            return None
        for tensor in state:
            if not isinstance(tensor, Tensor):
                return None
        return state


class RNN(_Recurrent):
    """``torch.nn.RNN``, all layers, directions and steps in one kernel."""

    _stock = torch.nn.RNN
    nonlinearity: str

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

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

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)


class LSTM(_Recurrent):
    """``torch.nn.LSTM``, all layers, directions and steps in one kernel."""

    _stock = torch.nn.LSTM
    _states = 2

    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    check_forward_args = torch.nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = torch.nn.LSTM.permute_hidden  # type: ignore[assignment]

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)


_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_all_cell_weights = itemgetter(*_CELL_WEIGHTS)  # biases may be None


class _Cell(_OnStock, RNNCellBase):
    """What the three cells share, like :class:`_Recurrent`."""

    _states = 1

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """As the stock cell's: input (batch, in) or (in) -> the new state."""
        if isinstance(input, Tensor) and is_plain(input):
            answer = self._run_plain(input, hx)
            if answer is not None:
                return answer
        if not _covers(input):
            return self._stock.forward(self, input, hx)
        weights = _parameters(self, _CELL_WEIGHTS if self.bias else _CELL_WEIGHTS[:2])
        try:
            answer = self._run(input, hx, weights)
        except RuntimeError:
            answer = None  # the stock module has its own words for arguments that do not fit
        return self._stock.forward(self, input, hx) if answer is None else answer

    def _mode(self) -> str | None:
        """The cell's name in ``fastnn.recurrent_modes.MODES``; None for a nonlinearity that the stock cell will
        refuse."""
        raise NotImplementedError

    def _run_plain(self, input: Tensor, hx: Any) -> Any:
        """Runs the kernel for the most usual kind of call; None for other calls."""
        mode, c = self._mode(), None
        if self._states == 2 and hx is not None:
            if not isinstance(hx, (tuple, list)) or len(hx) != 2:
                return None
            hx, c = hx
        if mode is None or input.dim() != 2:
            return None
        try:
            new_state = plain_rnn_cell(input, NUMBER_OF[mode], hx, c, *_all_cell_weights(self._parameters))
        except (KeyError, RuntimeError):  # the weights are parametrized, or the arguments do not fit
            return None
        return new_state[0] if self._states == 1 else tuple(new_state)

    def _run(self, input: Tensor, hx: Any, weights: list[Tensor]) -> Any:
        """Runs the kernel; None where the stock cell has to run."""
        mode = self._mode()
        if self._states == 1:
            h, c = hx, None
        elif hx is None or len(hx) == 2:
            h, c = hx or (None, None)
        else:
            return None
        batched = input.dim() == 2
        if mode is None:
            return None
        if batched:
            new_state = rnn_cell(input, mode, h, c, *weights)
        else:
            h, c = (None if s is None else s.unsqueeze(0) for s in (h, c))
            new_state = [s.squeeze(0) for s in rnn_cell(input.unsqueeze(0), mode, h, c, *weights)]
        return new_state[0] if self._states == 1 else tuple(new_state)


_MODE_OF = {"tanh": "RNN_TANH", "relu": "RNN_RELU"}


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
        return _MODE_OF.get(self.nonlinearity)


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
