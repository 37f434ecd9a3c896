"""The sizes of the values in a trace that is made for inputs of certain sizes.

Each value has a stand-in on the meta device, which has sizes and no elements; torch computes it where it is needed.
Code that asks for sizes, or loops over a tensor, gets numbers, and the trace serves for such inputs only. The sizes
rest on settings of layers and on the sizes of the model's tensors, too, which the guard notes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastnn._torch import HOOKS, pytree
from fastnn.graph.guard import Guard, Held, is_constant

# The methods and attributes that give a tensor's sizes and nothing else.
SIZE_METHODS = frozenset({"size", "dim", "ndimension", "numel", "nelement"})
SIZE_ATTRIBUTES = frozenset({"shape", "ndim"})
# Methods that change a tensor's own sizes.
RESIZING_METHODS = frozenset(
    {
        *("squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_", "swapdims_", "resize_", "resize_as_"),
        *("as_strided_", "resize_as_sparse_"),
    }
)
_UNKNOWN = object()
# What torch raises for arguments that it does not take, and on the meta device where sizes depend on values. (A
# NotImplementedError is a RuntimeError.)
_EXPECTED = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)


class _HooksError(Exception):
    """A layer has hooks, which may change it."""


class Sizes:
    """The stand-ins of a trace's values. Each is computed when somebody asks for its sizes, with what it depends on."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = inputs
        self._values: dict[fx.Node, Any] = {}
        self._called: dict[fx.Node, nn.Module] = {}
        self._sources: dict[fx.Node, tuple[Any, Any]] = {}
        self._layers: dict[nn.Module, nn.Module] = {}
        self._tensors: list[tuple[Any, Any]] = []  # containers and keys of the model's tensors whose sizes are known

    def note_input(self, node: fx.Node, place: int) -> None:
        self._values[node] = _on_meta(self._inputs[place])

    def note_tensor(self, node: fx.Node, container: Any, key: Any) -> None:
        """Says where a node that is a tensor of the model is found."""
        self._sources[node] = container, key

    def note_layer(self, node: fx.Node, layer: nn.Module) -> None:
        """Says that a node calls a layer of torch."""
        self._called[node] = layer

    def answer(self, node: fx.Node, name: str, args: Sequence[Any] = ()) -> Any:
        """What a tensor says of its sizes; None where that is not known."""
        value = self._value(node)
        if not isinstance(value, Tensor):
            return None
        try:
            said = getattr(value, name)
            return said(*args) if name in SIZE_METHODS else said
        except _EXPECTED:
            return None

    def parts(self, node: fx.Node) -> int | None:
        """How many parts a tensor or a tuple has that somebody loops over; None where that is not known."""
        value = self._value(node)
        if isinstance(value, Tensor):
            return len(value) if value.dim() else None
        return len(value) if isinstance(value, (tuple, list)) else None

    def is_tensor(self, node: fx.Node) -> bool:
        return isinstance(self._value(node), Tensor)

    def _value(self, node: fx.Node) -> Any:
        waiting = [node]
        while waiting:
            missing = [one for one in waiting[-1].all_input_nodes if one not in self._values]
            if missing and waiting[-1] not in self._values:
                waiting += missing
            else:
                one = waiting.pop()
                if one not in self._values:
                    self._values[one] = self._computed(one)
        return self._values[node]

    def _computed(self, node: fx.Node) -> Any:
        """The stand-in of a result; _UNKNOWN where it cannot be computed."""
        if node in self._sources:
            container, key = self._sources[node]
            self._tensors.append((container, key))
            return _on_meta(container[key])
        if any(self._values[one] is _UNKNOWN for one in node.all_input_nodes):
            return _UNKNOWN
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self._values.__getitem__)
        if "device" in kwargs:
            kwargs["device"] = "meta"
        try:
            # (Some functions, such as torch.normal, make tensors on the CPU all the same, and draw random numbers.)
            with torch.no_grad(), torch.device("meta"), torch.random.fork_rng(devices=[]):
                if node.op == "call_function":
                    value = node.target(*args, **kwargs)  # type: ignore[operator]
                elif node.op == "call_method":
                    value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                elif node in self._called:
                    value = self._of_layer(self._called[node])(*args, **kwargs)
                else:  # The node calls code of the user's, which must not run twice.
                    return _UNKNOWN
                return pytree.tree_map_only(Tensor, _on_meta, value)
        except (_HooksError, *_EXPECTED):
            return _UNKNOWN

    def note_in(self, guard: Guard) -> None:
        """Notes what the sizes rest on."""
        for layer in self._layers:
            guard.note_settings(layer, [name for name, value in layer.__dict__.items() if is_constant(value)])
            self._tensors += [(own, key) for own in (layer._parameters, layer._buffers) for key in own]
        held = Held(self._tensors)
        guard.note_call(_sizes_of, (held,), _sizes_of(held))

    def _of_layer(self, layer: nn.Module) -> Callable[..., Any]:
        """What computes a layer's stand-in: torch's own forward, without hooks, on a copy of the layer; or, for a
        recurrent layer, which torch would run step by step, a function."""
        if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
            self._layers[layer] = layer
            of_one: Callable[..., Any] = _recurrent if isinstance(layer, nn.RNNBase) else _cell
            return functools.partial(of_one, layer)
        return functools.partial(type(layer).forward, self._copy_of(layer))

    def _copy_of(self, layer: nn.Module) -> nn.Module:
        """A copy of a layer whose tensors have no elements."""
        if layer in self._layers:
            return self._layers[layer]
        own = layer.__dict__
        if any(own[name] for name in HOOKS):
            raise _HooksError
        copy = type(layer).__new__(type(layer))
        for name, value in own.items():
            if name in ("_parameters", "_buffers"):
                value = {key: None if one is None else _on_meta(one) for key, one in value.items()}
            elif name == "_modules":
                value = {key: None if one is None else self._copy_of(one) for key, one in value.items()}
            elif isinstance(value, list) and all(isinstance(one, Tensor) for one in value):
                value = [_on_meta(one) for one in value]
            if name != "forward":
                copy.__dict__[name] = value
        self._layers[layer] = copy
        return copy


def _recurrent(layer: nn.RNNBase, x: Tensor, state: Any = None) -> Any:
    directions, width = (2 if layer.bidirectional else 1), layer.proj_size or layer.hidden_size
    batch = [] if x.dim() == 2 else [x.shape[0 if layer.batch_first else 1]]
    states = [x.new_empty(layer.num_layers * directions, *batch, size) for size in (width, layer.hidden_size)]
    output = x.new_empty(*x.shape[:-1], directions * width)
    return output, tuple(states) if layer.mode == "LSTM" else states[0]


def _cell(layer: nn.RNNCellBase, x: Tensor, state: Any = None) -> Any:
    states = [x.new_empty(*x.shape[:-1], layer.hidden_size) for _ in range(2)]
    return tuple(states) if isinstance(layer, nn.LSTMCell) else states[0]


def _on_meta(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_like(tensor, device="meta", requires_grad=False)


def _sizes_of(held: Held) -> tuple[Any, ...]:
    return tuple([getattr(container[key], "shape", None) for container, key in held.value])
