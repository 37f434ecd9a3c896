"""The table that turns operators of an exported graph into layers of a network, with a row for each operator.

A row is a function. It gets a node and adds the lines that compute what the node computes; or it raises NotALayerError
with the reason, and torch runs the node.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Collection, Sequence
from math import isfinite, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from fastnn import activations
from fastnn._torch import statically_known_true
from fastnn.graph import fused_layers  # noqa: F401 (registers its rows)
from fastnn.graph.reader import ROWS as FUNCTION_ROWS
from fastnn.graph.reader import NotANetworkError
from fastnn.network_program import COMPARISONS, UNARY, Line, Value, conv_attributes
from fastnn.ops.conv_relu_max_pool import pad_of_ends, same_padding
from fastnn.recurrent_modes import MODES

_aten, _ops = torch.ops.aten, torch.ops.fastnn
_END = 2**63 - 1  # the end of a slice that has none

# The layers that make a network worth a call: those that have weights.
ANCHORS = ("conv", "conv_transpose", "linear", "rnn", "embedding", "layer_norm")


_UNKNOWN_SIZES = "has sizes that follow from the input's in a way that a frozen model does not know"


class NotALayerError(Exception):
    """Why a node is no layer of a network."""


RANGES = (_aten.arange.default, _aten.arange.start)  # the operators that give numbers in a row


class Reader:
    """Reads nodes in the graph's order. `values`: each node's result as a value of the program. `nodes`: all nodes.
    outside: nodes that torch runs. The other nodes of booleans are values that are 1 and 0, `booleans`, which only
    layers that take masks may see."""

    def __init__(self, graph: Graph, constants: dict[str, Tensor], outside: Collection[Node] = ()) -> None:
        self.nodes = list(graph.nodes)
        self.constants, self.outside = constants, outside
        self.booleans: set[Value] = set()
        # Whether the node that is being read gives booleans, and whether it only moves them.
        self._gives_booleans = self._moves_booleans = False
        self.values: dict[Node, Value] = {}
        self.taken: set[Value] = set()  # the values that are some node's result
        self.parts: dict[Node, list[Value]] = {}  # the results of a node that has several
        # Of a node that chooses one column of an input of integers: the input, the dimension and the place in it.
        self.columns: dict[Node, tuple[Node, int, int]] = {}
        self.ranges: set[Node] = set()  # nodes that are numbers in a row from 0 on, which embeddings alone take
        self.indices: dict[Node, Tensor] = {}  # nodes that copy indices of the model, which indexing alone takes
        self.lines: list[Line] = []  # the lines of the node that is being read
        kinds = {tensor.dtype for tensor in constants.values() if tensor.is_floating_point()}
        self.dtype = next(iter(kinds)) if len(kinds) == 1 else torch.float32

    def read(self, node: Node) -> list[Line]:
        """The lines that compute what the node computes."""
        if self._is_column(node) or self._is_range(node) or self._is_index(node):
            return []
        read = ROWS.get(node.target)
        if read is None:
            raise NotALayerError("has no counterpart in a frozen model")
        result = node.meta.get("val")
        self._gives_booleans = isinstance(result, Tensor) and result.dtype == torch.bool
        self._moves_booleans = self._gives_booleans and node.target in _MOVES
        if node in self.outside and not self._gives_booleans:
            raise NotALayerError("is needed outside of all networks")
        is_refused = node in self.outside or not all(_takes_booleans(user, node) for user in node.users)
        if isinstance(result, Tensor) and result.dtype != self.dtype and (is_refused or not self._gives_booleans):
            raise NotALayerError(f"gives {result.dtype}")
        self.lines = []
        try:
            read(self, node, *node.args, **node.kwargs)
        except (TypeError, ValueError, IndexError, ArithmeticError, AttributeError) as error:
            raise NotALayerError(f"has arguments that a frozen model does not know: {error}") from error
        return self.lines

    def _is_column(self, node: Node) -> bool:
        """Notes a node that chooses one column of an input of integers, as in x[:, 2], which embeddings alone take."""
        if node.target not in (_aten.select.int, _aten.slice.Tensor) or node.meta["val"].dtype != torch.int64:
            return False
        if not all(self._is_column(user) or user.target is _aten.embedding.default for user in node.users):
            return False
        given: Any = node.args[0]
        if node.target is _aten.slice.Tensor:  # of the whole, which comes before a number that chooses
            return given.op == "placeholder" and _same(_sizes(given), _sizes(node))
        if given.target is _aten.slice.Tensor:
            if not _same(_sizes(given.args[0]), _sizes(given)):
                return False
            given = given.args[0]
        if given.op != "placeholder" or not all(type(one) is int for one in node.args[1:]):
            return False
        self.columns[node] = given, node.args[1], node.args[2]  # type: ignore[assignment]
        return True

    def _is_range(self, node: Node) -> bool:
        """Notes torch.arange of a size, and what puts dimensions of one in front of it."""
        is_first = node.target in RANGES and (len(node.args) == 1 or (len(node.args) == 2 and node.args[0] == 0))
        if not is_first and not (_puts_one_in_front(node) and node.args[0] in self.ranges):
            return False
        users = set(node.users)
        while more := {user for user in users if _puts_one_in_front(user)}:
            users = (users - more).union(*(one.users for one in more))
        if any(user.target is not _aten.embedding.default for user in users):
            return False
        if node.meta["val"].dtype != torch.int64 or -1 in self.write_sizes(_sizes(node))[0]:
            return False
        self.ranges.add(node)
        return True

    def _is_index(self, node: Node) -> bool:
        """Notes a copy of indices that the forward names, as in x[:, [1, 3]]."""
        if node.target is not _aten.lift_fresh_copy.default or not isinstance(node.args[0], Node):
            return False
        held = self.constants.get(node.args[0].name)
        takers = (_aten.index.Tensor, _aten.index_select.default)
        if held is None or held.dtype != torch.int64 or any(user.target not in takers for user in node.users):
            return False
        self.indices[node] = held
        return True

    # ---- what rows use ----

    def index(self, node: Any) -> Tensor:
        """The indices that a node is, which the model holds."""
        held = self.indices.get(node, self.constants.get(getattr(node, "name", "")))
        if held is None or held.dtype != torch.int64 or held.numel() == 0:
            raise NotALayerError("takes an index that is no tensor of integers of the model")
        return held

    def value(self, node: Any) -> Value:
        """The value that is the node's result, or the weight that the node stands for."""
        if not isinstance(node, Node):
            raise NotALayerError("takes something that is no tensor")
        known = self.values.get(node)
        if known is None:
            tensor = self.constants.get(node.name)
            given = tensor if tensor is not None else node.meta.get("val")
            if not isinstance(given, Tensor):
                raise NotALayerError("takes something that is no tensor")
            if given.dtype == torch.bool and tensor is not None:
                known = self.values[node] = Value(given.shape, tensor.to(self.dtype))
                self.booleans.add(known)
                return known
            if given.dtype != self.dtype and (tensor is not None or given.dtype not in (torch.int64, torch.bool)):
                raise NotALayerError(f"takes {given.dtype}")
            known = self.values[node] = Value(given.shape, None if tensor is None else tensor.detach())
            self.taken.add(known)
        return known

    def _may_be_value(self, node: Node) -> bool:
        """Whether a placeholder is an input of the model that a program can have."""
        given = node.meta.get("val")
        if node.name in self.constants or not isinstance(given, Tensor):
            return False
        return given.dtype in (self.dtype, torch.int64, torch.bool)

    def data(self, node: Any) -> Value:
        """The value that is the node's result, which must not be a weight."""
        if self._moves_booleans and node.meta["val"].dtype == torch.bool:
            return self.condition(node)
        value = self.value(node)
        if value.tensor is not None:
            raise NotALayerError("does not depend on the input in the way that a layer does")
        if node.meta["val"].dtype != self.dtype:
            raise NotALayerError(f"takes {node.meta['val'].dtype}")
        return value

    def condition(self, node: Any) -> Value:
        """A mask of booleans, as 1 and 0."""
        if not isinstance(node, Node) or node.meta["val"].dtype != torch.bool:
            raise NotALayerError("takes a mask that is not of booleans")
        value = self.value(node)
        if value not in self.booleans:
            value = self.add("cast", {"input": [value]}, value.sizes)
            self.booleans.add(value)
        return value

    def weight(self, node: Any) -> list[Value]:
        """A weight, or nothing where there is none."""
        if node is None:
            return []
        value = self.value(node)
        if value.tensor is None:
            raise NotALayerError("takes something that is neither the input nor a parameter of the model")
        return [value]

    def weights(self, **nodes: Any) -> dict[str, list[Value]]:
        found = {name: self.weight(node) for name, node in nodes.items()}
        return {name: values for name, values in found.items() if values}

    def add(self, layer: str, inputs: dict[str, list[Value]], sizes: Sequence[Any], /, **attributes: Any) -> Value:
        """Adds a line -> the value that it gives."""
        result = Value(sizes)
        self.lines.append(Line(layer, inputs, [result], attributes))
        return result

    def finish(self, node: Node, value: Value) -> None:
        """Makes this value the node's result; a copy of the value, where it is another node's result already."""
        if value in self.taken:
            sizes = [f"0.{dim}" for dim in range(len(value.sizes))]
            value = self.add("reshape", {"input": [value], "like": [value]}, value.sizes, sizes=sizes)
        self.values[node] = value
        self.taken.add(value)
        if self._gives_booleans:
            self.booleans.add(value)

    def reshape(self, value: Value, sizes: Sequence[Any], asked: Sequence[Any] = ()) -> Value:
        """Reshapes a value to these sizes. Of the sizes that depend on the inputs one can be left out, since it follows
        from the others. asked: the sizes in the model's own call, which may contain -1."""
        if _same(value.sizes, sizes):
            return value
        written, like = self.write_sizes(sizes, value, asked or sizes)
        if written.count(-1) > 1:
            raise NotALayerError(_UNKNOWN_SIZES)
        return self.add("reshape", {"input": [value], "like": like}, sizes, sizes=written)

    def write_sizes(
        self, sizes: Sequence[Any], first: Value | None = None, asked: Sequence[Any] = ()
    ) -> tuple[list[Any], list[Value]]:
        """Sizes as a program has them -> these, and the values `like`. A size that depends on the inputs is written as
        the dimension of some value that has this size, or as -1 where there is none. It looks at the value `first`
        before others."""
        written: list[Any] = []
        like: list[Value] = []
        for size, wanted in zip(sizes, asked or sizes, strict=True):
            if isinstance(wanted, int) or isinstance(size, int):
                written.append(wanted if isinstance(wanted, int) else size)
                continue
            found = self._size_of_some(first, size)
            if found is None:
                written.append(-1)
                continue
            if found[0] not in like:
                like.append(found[0])
            written.append(f"{like.index(found[0])}.{found[1]}")
        return written, like

    def whole_sizes(self, sizes: Sequence[Any], first: Value | None = None) -> tuple[list[Any], list[Value]]:
        """What `write_sizes` gives, where each size must be known."""
        written, like = self.write_sizes(sizes, first)
        if -1 in written:
            raise NotALayerError(_UNKNOWN_SIZES)
        return written, like

    def _size_of_some(self, first: Value | None, size: Any) -> tuple[Value, int] | None:
        """Finds a value and a dimension of it that has this size."""
        known = [one for one in self.values.values() if one.tensor is None]
        inputs = (self.value(node) for node in self.nodes if node.op == "placeholder" and self._may_be_value(node))
        for one in itertools.chain([] if first is None else [first], known, inputs):
            for dim, other in enumerate(one.sizes):
                if not isinstance(other, int) and str(other) == str(size):
                    return one, dim
        return None

    def permute(self, value: Value, dims: Sequence[int]) -> Value:
        if list(dims) == list(range(len(dims))):
            return value
        return self.add("permute", {"input": [value]}, [value.sizes[d] for d in dims], dims=list(dims))

    def slice(
        self, value: Value, dim: int, start: Any, stop: Any, step: Any, sizes: Sequence[Any], **attributes: Any
    ) -> Value:
        if start == 0 and step == 1 and not isinstance(stop, int):
            written, like = self.whole_sizes([sizes[dim]])
            inputs = {"input": [value], "like": like}
            return self.add("slice", inputs, sizes, dim=dim, start=0, sizes=written, **attributes)
        if not all(isinstance(one, int) for one in (start, stop, step)):
            raise NotALayerError("takes a part whose place depends on the input's sizes")
        return self.add("slice", {"input": [value]}, sizes, dim=dim, start=start, stop=stop, step=step, **attributes)

    def activate(self, value: Value, text: str) -> Value:
        return value if text == "identity" else self.add("activation", {"input": [value]}, value.sizes, activation=text)

    def binary(self, function: str, value: Value, number: float, **attributes: Any) -> Value:
        return self.add(
            "binary", {"input": [value]}, value.sizes, function=function, number=float(number), **attributes
        )


def _puts_one_in_front(node: Node) -> bool:
    return node.target is _aten.unsqueeze.default and bool(node.args[1] == 0)


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether the sizes are the same for every input."""
    return len(one) == len(other) and all(statically_known_true(a == b) for a, b in zip(one, other, strict=True))


def _sizes(node: Node) -> Sequence[Any]:
    sizes: Sequence[Any] = node.meta["val"].shape
    return sizes


def _numbers(given: Any, dims: int) -> list[int]:
    """The numbers of an argument that has one for each dimension, or one for all."""
    numbers = [given] if isinstance(given, int) else list(given)
    if not all(isinstance(one, int) for one in numbers):
        raise NotALayerError("has settings that depend on the input's sizes")
    return numbers if len(numbers) == dims else numbers * dims


ROWS: dict[Any, Callable[..., None]] = {}


def _row(*targets: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(function: Callable[..., None]) -> Callable[..., None]:
        ROWS.update(dict.fromkeys(targets, function))
        return function

    return register


# ---- layers with weights --------------------------------------------------------------------------------------------


@_row(
    *(getattr(_aten, f"conv{d}d").default for d in (1, 2, 3)), *(getattr(_aten, f"conv{d}d").padding for d in (1, 2, 3))
)
def _conv(
    read: Reader, node: Node, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1
) -> None:  # fmt: skip
    given = read.weights(weight=weight, bias=bias)
    kernel = given["weight"][0].sizes[2:]
    dims = len(kernel)
    value = read.data(x)
    if len(value.sizes) != dims + 2:
        raise NotALayerError("is a single image without a batch")
    if isinstance(padding, str):
        padding, ends = same_padding(kernel, _numbers(dilation, dims)) if padding == "same" else (0, [])
        if any(ends):
            sizes = [*value.sizes[:2], *(size + end for size, end in zip(value.sizes[2:], ends, strict=True))]
            value = read.add("pad", {"input": [value]}, sizes, padding=pad_of_ends(ends), value=0.0)
    settings = {"stride": stride, "padding": padding, "dilation": dilation}
    attributes: dict[str, Any] = {name: _numbers(value, dims) for name, value in settings.items()}
    read.finish(node, read.add("conv", {"input": [value], **given}, _sizes(node), **attributes, groups=groups))


@_row(*(getattr(_aten, name).default for name in ("conv_transpose1d",)),
      *(getattr(_aten, name).input for name in ("conv_transpose2d", "conv_transpose3d")))  # fmt: skip
def _conv_transpose(
    read: Reader, node: Node, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1
) -> None:  # fmt: skip
    given = read.weights(weight=weight, bias=bias)
    dims = len(given["weight"][0].sizes) - 2
    if any(one != 1 for one in _numbers(dilation, dims)):
        raise NotALayerError("is a dilated transposed convolution")
    settings = {"stride": stride, "padding": padding, "output_padding": output_padding}
    attributes: dict[str, Any] = {name: _numbers(value, dims) for name, value in settings.items()}
    if any(one > 16 for one in attributes["stride"]):
        raise NotALayerError("has strides of more than 16")
    value = read.data(x)
    if len(value.sizes) != dims + 2:
        raise NotALayerError("is a single image without a batch")
    made = read.add("conv_transpose", {"input": [value], **given}, _sizes(node), **attributes, groups=groups)
    read.finish(node, made)


@_row(_ops.conv_relu_max_pool.default)
def _conv_relu_max_pool(
    read: Reader, node: Node, x: Any, weight: Any, bias: Any, geometry: Any, algorithm: Any = None
) -> None:
    given = read.weights(weight=weight, bias=bias)
    attributes = conv_attributes(geometry, len(given["weight"][0].sizes) - 2)
    inputs = {"input": [read.data(x)], **given}
    read.finish(node, read.add("conv", inputs, _sizes(node), **attributes, activation="relu"))


@_row(_aten.linear.default)
def _linear(read: Reader, node: Node, x: Any, weight: Any, bias: Any = None) -> None:
    inputs = {"input": [read.data(x)], **read.weights(weight=weight, bias=bias)}
    if len(inputs["weight"][0].sizes) != 2:
        raise NotALayerError("has a weight of one dimension")
    read.finish(node, read.add("linear", inputs, _sizes(node)))


@_row(_ops.mlp.default)
def _mlp(read: Reader, node: Node, x: Any, parameters: Any, text: str) -> None:
    layers = activations.parse(text)
    value = read.data(x)
    for i, activation in enumerate(layers):
        bias = parameters[len(layers) + i] if len(parameters) > len(layers) else None
        given = read.weights(weight=parameters[i], bias=bias)
        sizes = [*value.sizes[:-1], given["weight"][0].sizes[0]]
        value = read.add("linear", {"input": [value], **given}, sizes, activation=str(activation))
    read.finish(node, value)


@_row(_aten.embedding.default)
def _embedding(read: Reader, node: Node, weight: Any, numbers: Any, *rest: Any) -> None:
    column: dict[str, Any] = {}
    if numbers in read.ranges:  # the first rows of the table
        sizes = _sizes(node)
        rows = read.slice(read.value(weight), 0, 0, _sizes(numbers)[-1], 1, sizes[-2:], fits=True)
        return read.finish(node, read.reshape(rows, sizes))
    if numbers in read.columns:
        numbers, dim, index = read.columns[numbers]
        column = {"selects": True, "dim": dim, "index": index}
    value = read.value(numbers)
    if numbers.meta["val"].dtype != torch.int64 or numbers.op != "placeholder":
        raise NotALayerError("takes numbers that are no input of the model")
    inputs = {"input": [value], **read.weights(weight=weight)}
    read.finish(node, read.add("embedding", inputs, _sizes(node), **column))


@_row(_aten.batch_norm.default)
def _batch_norm(
    read: Reader, node: Node, x: Any, gamma: Any, beta: Any, mean: Any, var: Any, training: bool, momentum: float,
    eps: float, *rest: Any
) -> None:  # fmt: skip
    if training:
        raise NotALayerError("takes the statistics of its batch")
    _normalize(read, node, x, gamma, beta, mean, var, eps)


@_row(_aten._native_batch_norm_legit_no_training.default)
def _batch_norm_of_three_results(
    read: Reader, node: Node, x: Any, gamma: Any, beta: Any, mean: Any, var: Any, momentum: float, eps: float
) -> None:
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        raise NotALayerError("gives its statistics")
    _normalize(read, node, x, gamma, beta, mean, var, eps)
    read.parts[node] = [read.values.pop(node)]


def _normalize(read: Reader, node: Node, x: Any, gamma: Any, beta: Any, mean: Any, var: Any, eps: float) -> None:
    """Adds a normalization with known statistics, as a multiplication and an addition for each channel."""
    if mean is None or var is None:
        raise NotALayerError("takes the statistics of its batch")

    def double(node: Any, default: float) -> Tensor:
        tensor = read.weight(node)[0].tensor if node is not None else None
        return torch.tensor(default, dtype=torch.float64) if tensor is None else tensor.double()

    value = read.data(x)
    scale = torch.rsqrt(double(var, 1.0) + eps) * double(gamma, 1.0)
    shift = double(beta, 0.0) - double(mean, 0.0) * scale
    sizes = (-1,) + (1,) * (len(value.sizes) - 2)
    for function, numbers in (("mul", scale), ("add", shift)):
        tensor = numbers.to(read.dtype).reshape(sizes)
        inputs = {"input": [value], "other": [Value(tensor.shape, tensor)]}
        value = read.add("binary", inputs, value.sizes, function=function)
    read.finish(node, value)


@_row(_aten.layer_norm.default)
def _layer_norm(
    read: Reader, node: Node, x: Any, sizes: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *rest: Any
) -> None:
    given = read.weights(weight=weight, bias=bias)
    if not all(isinstance(size, int) for size in sizes):
        raise NotALayerError("normalizes over sizes that depend on the input's")
    for name, values in given.items():
        tensor = values[0].tensor
        assert tensor is not None
        given[name] = [Value((tensor.numel(),), tensor.reshape(-1))]
    inputs = {"input": [read.data(x)], **given}
    read.finish(node, read.add("layer_norm", inputs, _sizes(node), features=prod(sizes), epsilon=float(eps)))


# ---- recurrent layers -----------------------------------------------------------------------------------------------


def _add_rnn(
    read: Reader, node: Node, value: Value, state: Sequence[Value], weights: Sequence[Value], mode: str,
    *, layers: int, bidirectional: bool, batch_first: bool
) -> None:  # fmt: skip
    directions = 2 if bidirectional else 1
    each = len(weights) // (layers * directions)
    inputs = {
        "input": [value],
        **{name: [one] for name, one in zip("hc", state, strict=False)},
        "weights": list(weights),
    }
    outputs = [Value(one.shape) for one in _tensors(node.meta["val"])]
    attributes = {
        "mode": mode,
        "bidirectional": bidirectional,
        "batch_first": batch_first,
        "bias": each >= 4,
        "projected": each % 2 == 1,
    }
    read.lines.append(Line("rnn", inputs, outputs, attributes))
    read.parts[node] = outputs


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of a nested result, in their order."""
    return [value] if isinstance(value, Tensor) else [one for part in value for one in _tensors(part)]


def _is_zeros(node: Any) -> bool:
    """Whether a state is zeros, with which a recurrent operator starts if none is given."""
    return isinstance(node, Node) and node.target in (_aten.new_zeros.default, _aten.zeros.default)


def _state(read: Reader, nodes: Sequence[Any]) -> list[Value]:
    return [] if all(map(_is_zeros, nodes)) else [read.data(one) for one in nodes]


@_row(_ops.rnn.default)
def _rnn(
    read: Reader, node: Node, x: Any, batch_sizes: Any, state: Any, weights: Any, masks: Any, mode: int, layers: int,
    bidirectional: bool, batch_first: bool
) -> None:  # fmt: skip
    if batch_sizes is not None or masks is not None:
        raise NotALayerError("has packed sequences, which a frozen model cannot take")
    value = read.data(x)
    given = [read.weight(one)[0] for one in weights]
    states = _state(read, state)
    if len(value.sizes) != 3:
        raise NotALayerError("is one step, or has no batch")
    _add_rnn(
        read, node, value, states, given, MODES[mode].name,
        layers=layers, bidirectional=bidirectional, batch_first=batch_first,
    )  # fmt: skip


@_row(_ops.rnn_cell.default)
def _rnn_cell(
    read: Reader, node: Node, x: Any, mode: int, h: Any, c: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any = None,
    bias_hh: Any = None
) -> None:  # fmt: skip
    given = [read.weight(one)[0] for one in (weight_ih, weight_hh, bias_ih, bias_hh) if one is not None]
    _add_cell(
        read, node, read.data(x), _state(read, [one for one in (h, c) if one is not None]), given, MODES[mode].name
    )


def _add_cell(
    read: Reader, node: Node, value: Value, states: Sequence[Value], weights: Sequence[Value], mode: str
) -> None:
    """Adds one step of one layer, as a sequence of one step."""
    steps = read.reshape(value, (1, *value.sizes))
    states = [read.reshape(one, (1, *one.sizes)) for one in states]
    _add_rnn(read, node, steps, states, weights, mode, layers=1, bidirectional=False, batch_first=False)
    # The new state is h, which is also the output, and for LSTM c.
    wanted = _tensors(node.meta["val"])
    line = read.lines[-1]
    line.outputs = [Value((1, *wanted[0].shape)), *(Value((1, *one.shape)) for one in wanted)]
    read.parts[node] = [read.reshape(one, whole.shape) for one, whole in zip(line.outputs[1:], wanted, strict=True)]


@_row(operator.getitem)
def _part(read: Reader, node: Node, whole: Any, index: Any) -> None:
    parts = read.parts.get(whole)
    if parts is None or not isinstance(index, int):
        raise NotALayerError("takes a part of something that a frozen model does not know")
    if isinstance(node.meta["val"], Tensor):
        read.finish(node, parts[index])
    else:  # the states, behind the output
        read.parts[node] = parts[index:]


# ---- element by element ---------------------------------------------------------------------------------------------


@_row(*activations.OPERATORS)
def _activation(read: Reader, node: Node, x: Any, *rest: Any, **named: Any) -> None:
    activation = activations.from_operator(node.target, rest, named)
    if activation is None:
        raise NotALayerError("has parameters that no kernel has")
    read.finish(node, read.activate(read.data(x), str(activation)))


_BINARY = {
    **{getattr(_aten, name).Tensor: name for name in ("add", "sub", "mul", "div")},
    **{getattr(_aten, name).Scalar: name for name in ("add", "sub", "mul", "div")},
    _aten.maximum.default: "maximum",
    _aten.minimum.default: "minimum",
    operator.add: "add",
    operator.mul: "mul",
}


@_row(*_BINARY, _aten.rsub.Scalar)
def _binary(read: Reader, node: Node, x: Any, y: Any, alpha: Any = 1, **named: Any) -> None:
    if alpha != 1 or named:
        raise NotALayerError("has a factor or a rounding mode")
    function, reverses = _BINARY.get(node.target, "sub"), node.target is _aten.rsub.Scalar
    if not isinstance(node.meta["val"], Tensor):
        raise NotALayerError("computes a number")
    if isinstance(y, (int, float)):
        read.finish(node, read.binary(function, read.data(x), y, reverses=reverses))
        return
    if isinstance(x, (int, float)):
        read.finish(node, read.binary(function, read.data(y), x, reverses=True))
        return
    x, y = _without_expand(x, node), _without_expand(y, node)
    first, second = read.value(x), read.value(y)
    if first.tensor is not None:  # the first operand of a line is computed
        first, second, reverses = second, first, not reverses
    for value, from_node in ((first, x), (second, y)):
        if value.tensor is None and not from_node.meta["val"].is_floating_point():
            raise NotALayerError("takes integers")
    inputs = {"input": [first], "other": [second]}
    read.finish(node, read.add("binary", inputs, _sizes(node), function=function, reverses=reverses))


def _without_expand(operand: Node, result: Node) -> Any:
    """Of a tensor that is expanded before it is an operand, the tensor: an operand broadcasts by itself."""
    if operand.target not in (_aten.expand.default, _aten.expand_as.default):
        return operand
    others = [one for one in result.all_input_nodes if one is not operand]
    alike = [one for one in others if _same(_sizes(one), _sizes(operand))]
    return operand.args[0] if alike else operand


_UNARY = {getattr(_aten, name).default: name for name in UNARY}


@_row(*_UNARY)
def _unary(read: Reader, node: Node, x: Any) -> None:
    value = read.data(x)
    read.finish(node, read.add("unary", {"input": [value]}, value.sizes, function=_UNARY[node.target]))


@_row(_aten.matmul.default, _aten.mm.default, _aten.bmm.default)
def _matmul(read: Reader, node: Node, x: Any, y: Any) -> None:
    first, second = read.value(x), read.value(y)
    if min(len(first.sizes), len(second.sizes)) < 2 or (first.tensor is not None and second.tensor is not None):
        raise NotALayerError("multiplies a vector")
    if second.tensor is not None and second.tensor.dim() == 2:
        weight = second.tensor.t().contiguous()
        made = read.add("linear", {"input": [first], "weight": [Value(weight.shape, weight)]}, _sizes(node))
    else:
        made = read.add("matmul", {"input": [first], "other": [second]}, _sizes(node))
    read.finish(node, made)


@_row(_aten.scaled_dot_product_attention.default)
def _attention(
    read: Reader, node: Node, q: Any, k: Any, v: Any, mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: Any = None, enable_gqa: bool = False
) -> None:  # fmt: skip
    given = {"query": [read.data(q)], "key": [read.data(k)], "value": [read.data(v)]}
    if dropout_p or enable_gqa or not isinstance(scale, (int, float, type(None))):
        raise NotALayerError("has a dropout, groups of queries, or a scale that is computed")
    if mask is not None and mask.meta["val"].dtype == torch.bool:
        shown = read.condition(mask)
        given["mask"] = [read.add("unary", {"input": [shown]}, shown.sizes, function="log")]  # It is 0, or -inf.
    elif mask is not None:
        given["mask"] = [read.value(mask)]
    text = "" if scale is None else repr(float(scale))
    read.finish(node, read.add("attention", given, _sizes(node), is_causal=is_causal, scale=text))


# Where a layer takes a mask; and operators that move booleans, or make booleans of them.
_MASKS = {
    **dict.fromkeys((_aten.where.self, _aten.where.ScalarOther, _aten.where.ScalarSelf), 0),
    _aten.masked_fill.Scalar: 1,
    _aten.scaled_dot_product_attention.default: 3,
}
_MOVES = frozenset(
    {
        *(_aten.slice.Tensor, _aten.unsqueeze.default, _aten.expand.default, _aten.select.int, _aten.view.default),
        *(_aten.permute.default, _aten.transpose.int, _aten.squeeze.dim),
    }
)
_OF_BOOLEANS = _MOVES | frozenset(
    {
        *(_aten.logical_not.default, _aten.bitwise_not.default, _aten.logical_and.default, _aten.bitwise_and.Tensor),
        *(_aten.logical_or.default, _aten.bitwise_or.Tensor, _aten.__and__.Tensor, _aten.__or__.Tensor),
    }
)


def _takes_booleans(user: Node, mask: Node) -> bool:
    target: Any = user.target
    place = _MASKS.get(target)
    if place is None:
        return target in _OF_BOOLEANS
    return [i for i, one in enumerate(user.args) if one is mask] == [place] or user.kwargs.get("attn_mask") is mask


@_row(_aten.prelu.default)
def _prelu(read: Reader, node: Node, x: Any, weight: Any) -> None:
    value, slope = read.data(x), read.value(weight)
    if slope.tensor is not None and slope.tensor.numel() == 1 and isfinite(number := float(slope.tensor)):
        return read.finish(node, read.activate(value, f"leaky_relu({number!r})"))
    read.finish(node, read.add("prelu", {"input": [value], "weight": [slope]}, value.sizes))


@_row(_aten.group_norm.default)
def _group_norm(
    read: Reader, node: Node, x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *rest: Any
) -> None:
    inputs = {"input": [read.data(x)], **read.weights(weight=weight, bias=bias)}
    read.finish(node, read.add("group_norm", inputs, _sizes(node), groups=groups, epsilon=float(eps)))


@_row(_aten.instance_norm.default)
def _instance_norm(
    read: Reader, node: Node, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, uses_input: bool,
    momentum: float, eps: float, *rest: Any
) -> None:  # fmt: skip
    if mean is not None or variance is not None or not uses_input:
        raise NotALayerError("has running statistics")
    inputs = {"input": [read.data(x)], **read.weights(weight=weight, bias=bias)}
    read.finish(node, read.add("group_norm", inputs, _sizes(node), groups=0, epsilon=float(eps)))


@_row(_aten.softmax.int, _aten.log_softmax.int, _aten._softmax.default, _aten._log_softmax.default)
def _softmax(read: Reader, node: Node, x: Any, dim: int, dtype: Any = None) -> None:
    value = read.data(x)
    if dtype not in (None, False, read.dtype):
        raise NotALayerError("gives another dtype")
    logarithm = node.target in (_aten.log_softmax.int, _aten._log_softmax.default)
    read.finish(node, read.add("softmax", {"input": [value]}, value.sizes, dim=dim, logarithm=logarithm))


# ---- functions of several layers, which fused graphs have, too ------------------------------------------------------


class _AsFused:
    """The reader as a row of ``fused_layers.py`` sees it, for a node whose arguments are those of torch's function."""

    def __init__(self, read: Reader) -> None:
        self._read, self.lines, self.values = read, read.lines, dict[Node, Value]()
        # No node that a row sees is a size, and nothing changes in place.
        self.sizes: dict[Node, Any] = {}
        self.saved: set[Value] = set()

    @property
    def booleans(self) -> set[Value]:
        return self._read.booleans

    def condition(self, node: Any) -> Value:
        return self._read.condition(node)

    def is_boolean(self, node: Any) -> bool:
        return bool(node.meta["val"].dtype == torch.bool)

    boolean = condition  # which raises for a node of anything else

    def data(self, node: Any) -> Value:
        value = self._read.value(node)
        if node.meta["val"].dtype != self._read.dtype:
            raise NotALayerError(f"takes {node.meta['val'].dtype}")
        return value

    def optional(self, node: Any) -> list[Value]:
        return [] if node is None else [self.data(node)]

    def dtype(self) -> torch.dtype:
        return self._read.dtype

    def add(self, node: Node | None, layer: str, inputs: dict[str, list[Value]], /, **attributes: Any) -> Value:
        sizes: Sequence[Any] = ()
        if layer == "check_sizes":
            sizes = inputs["input"][0].sizes
            like = [value.sizes for value in inputs["like"]]
            asked = [
                own if one == -1 else like[0][int(one.partition(".")[2])]
                for one, own in zip(attributes["sizes"], sizes, strict=True)
            ]
            if not _same(sizes, asked):
                raise NotALayerError("takes tensors whose sizes are broadcast")
        if layer == "expand":
            own, sizes = inputs["input"][0].sizes, inputs["like"][0].sizes
            behind = sizes[len(sizes) - len(own) :]
            if len(own) > len(sizes) or not all(
                one == 1 or _same([one], [to]) for one, to in zip(own, behind, strict=True)
            ):
                raise NotALayerError("takes tensors whose sizes are broadcast")
        result = self._read.add(layer, {name: values for name, values in inputs.items() if values}, sizes, **attributes)
        if node is not None:
            self.values[node] = result
        return result

    add_of_booleans = add


_FUSED_ROWS: dict[Any, Any] = {
    **{
        getattr(getattr(_aten, name), kind): getattr(torch, name)
        for name in COMPARISONS
        for kind in ("Scalar", "Tensor")
    },
    **dict.fromkeys((_aten.logical_not.default, _aten.bitwise_not.default), torch.logical_not),
    **dict.fromkeys((_aten.logical_and.default, _aten.bitwise_and.Tensor, _aten.__and__.Tensor), torch.logical_and),
    **dict.fromkeys((_aten.logical_or.default, _aten.bitwise_or.Tensor, _aten.__or__.Tensor), torch.logical_or),
    **dict.fromkeys((_aten.where.self, _aten.where.ScalarOther, _aten.where.ScalarSelf), torch.where),
    _aten.masked_fill.Scalar: torch.masked_fill,
    _aten.neg.default: torch.neg,
    _aten.reciprocal.default: torch.reciprocal,
    _aten.addcmul.default: torch.addcmul,
    _aten.addcdiv.default: torch.addcdiv,
    **dict.fromkeys((_aten.lerp.Scalar, _aten.lerp.Tensor), torch.lerp),
    _aten.square.default: torch.square,
    _aten.pow.Tensor_Scalar: torch.pow,
    **dict.fromkeys((_aten.clamp.default, _aten.clip.default), torch.clamp),
    _aten.clamp_min.default: torch.clamp_min,
    _aten.clamp_max.default: torch.clamp_max,
    _aten.hardsigmoid.default: F.hardsigmoid,
    _aten.glu.default: F.glu,
    _aten.log_sigmoid.default: F.logsigmoid,
    _aten.rms_norm.default: F.rms_norm,  # with an epsilon: see _rms_norm
    **dict.fromkeys((_aten.mean.default, _aten.mean.dim), torch.mean),
    **dict.fromkeys((_aten.sum.default, _aten.sum.dim_IntList), torch.sum),
    _aten.amax.default: torch.amax,
    _aten.amin.default: torch.amin,
    _aten.cumsum.default: torch.cumsum,
    _aten.linalg_vector_norm.default: torch.linalg.vector_norm,
    _aten.linalg_norm.default: torch.linalg.norm,
    **dict.fromkeys((_aten.var.dim, _aten.var.correction), torch.var),
    **dict.fromkeys((_aten.std.dim, _aten.std.correction), torch.std),
    _aten.logsumexp.default: torch.logsumexp,
    _aten.cosine_similarity.default: F.cosine_similarity,
    _aten.einsum.default: torch.einsum,
    _aten.flip.default: torch.flip,
    _aten.roll.default: torch.roll,
    _aten.channel_shuffle.default: F.channel_shuffle,
    _aten.unfold.default: "unfold",
    _aten.bilinear.default: F.bilinear,
}
# Of these, functions for which a network needs a tensor that has dimensions.
_OVER_DIMENSIONS = (
    _aten.amax.default,
    _aten.amin.default,
    _aten.cumsum.default,
    _aten.logsumexp.default,
    _aten.cosine_similarity.default,
)


@_row(*_FUSED_ROWS)
def _as_function(read: Reader, node: Node, *args: Any, **kwargs: Any) -> None:
    seen = _AsFused(read)
    if any(isinstance(one, Node) and not _sizes(one) for one in args) and node.target in _OVER_DIMENSIONS:
        raise NotALayerError("takes a single number")
    kwargs.pop("path", None)  # of einsum
    try:
        FUNCTION_ROWS[_FUSED_ROWS[node.target]](seen, node, *args, **kwargs)
    except NotANetworkError as reason:
        raise NotALayerError(f"is no layer: {reason}") from reason
    result = seen.values[node]
    result.sizes = tuple(_sizes(node))
    read.finish(node, result)


@_row(_aten.rms_norm.default)
def _rms_norm(read: Reader, node: Node, x: Any, sizes: Any, weight: Any = None, eps: Any = None) -> None:
    _as_function(read, node, x, sizes, weight, torch.finfo(read.dtype).eps if eps is None else eps)


# ---- pools and means ------------------------------------------------------------------------------------------------


@_row(*(getattr(_aten, f"max_pool{d}d").default for d in (1, 2, 3)))
def _max_pool(
    read: Reader, node: Node, x: Any, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False
) -> None:  # fmt: skip
    value = read.data(x)
    dims = int(str(node.target).partition("max_pool")[2][0])
    if len(value.sizes) != dims + 2:
        raise NotALayerError("is a single image without a batch")
    settings = {"kernel": kernel, "stride": stride or kernel, "padding": padding, "dilation": dilation}
    attributes: dict[str, Any] = {name: _numbers(given, dims) for name, given in settings.items()}
    read.finish(node, read.add("max_pool", {"input": [value]}, _sizes(node), **attributes, ceil_mode=ceil_mode))


@_row(*(getattr(_aten, f"max_pool{d}d_with_indices").default for d in (2, 3)))
def _max_pool_with_indices(read: Reader, node: Node, *args: Any, **kwargs: Any) -> None:
    _check_places(node)
    meta = node.meta["val"]
    try:
        node.meta["val"] = meta[0]
        _max_pool(read, node, *args, **kwargs)
    finally:
        node.meta["val"] = meta
    read.parts[node] = [read.values.pop(node)]


@_row(*(getattr(_aten, f"avg_pool{d}d").default for d in (1, 2, 3)))
def _avg_pool(
    read: Reader, node: Node, x: Any, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: Any = None
) -> None:  # fmt: skip
    value = read.data(x)
    dims = int(str(node.target).partition("avg_pool")[2][0])
    if ceil_mode or divisor_override is not None or len(value.sizes) != dims + 2:
        raise NotALayerError("has ceil_mode, a divisor of its own or no batch")
    settings = {"kernel": kernel, "stride": stride or kernel, "padding": padding}
    attributes: dict[str, Any] = {name: _numbers(given, dims) for name, given in settings.items()}
    made = read.add("avg_pool", {"input": [value]}, _sizes(node), **attributes, count_include_pad=count_include_pad)
    read.finish(node, made)


@_row(*(getattr(_aten, f"adaptive_avg_pool{d}d").default for d in (1, 2, 3)))
def _adaptive_avg_pool(read: Reader, node: Node, x: Any, sizes: Any) -> None:
    value = read.data(x)
    dims = len(sizes)
    if len(value.sizes) != dims + 2:
        raise NotALayerError("is a single image without a batch")
    if all(size == 1 for size in sizes):
        made = read.add("mean", {"input": [value]}, _sizes(node), dims=list(range(2, 2 + dims)), keepdim=True)
    else:
        inputs = value.sizes[2:]
        if not all(isinstance(one, int) and one % size == 0 for one, size in zip(inputs, sizes, strict=True)):
            raise NotALayerError("averages windows of several sizes")
        kernel = [one // size for one, size in zip(inputs, sizes, strict=True)]
        made = read.add("avg_pool", {"input": [value]}, _sizes(node), kernel=kernel)
    read.finish(node, made)


@_row(_aten.max.dim)
def _max(read: Reader, node: Node, x: Any, dim: int, keepdim: bool = False) -> None:
    _check_places(node)
    sizes = node.meta["val"][0].shape
    read.parts[node] = [read.add("amax", {"input": [read.data(x)]}, sizes, dims=[dim], keepdim=keepdim)]


@_row(*(getattr(_aten, f"adaptive_max_pool{d}d").default for d in (1, 2, 3)))
def _adaptive_max_pool(read: Reader, node: Node, x: Any, output_size: Any) -> None:
    _check_places(node)
    value, dims = read.data(x), len(output_size)
    if any(one != 1 for one in output_size) or len(value.sizes) != dims + 2:
        raise NotALayerError("gives more than one element a channel, or has no batch")
    which = list(range(2, 2 + dims))
    sizes = node.meta["val"][0].shape
    read.parts[node] = [read.add("amax", {"input": [value]}, sizes, dims=which, keepdim=True)]


def _check_places(node: Node) -> None:
    """Raises if the places of the largest elements are needed."""
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        raise NotALayerError("gives the places of the largest elements")


# ---- what moves elements --------------------------------------------------------------------------------------------


@_row(_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)
def _view(read: Reader, node: Node, x: Any, sizes: Sequence[Any]) -> None:
    read.finish(node, read.reshape(read.data(x), _sizes(node), sizes))


@_row(
    _aten.flatten.using_ints,
    *(_aten.unsqueeze.default, _aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.unflatten.int),
)
def _reshape(read: Reader, node: Node, x: Any, *rest: Any, **named: Any) -> None:
    read.finish(node, read.reshape(read.data(x), _sizes(node)))


@_row(_aten.expand.default)
def _expand(read: Reader, node: Node, x: Any, sizes: Sequence[Any], *rest: Any, **named: Any) -> None:
    value = read.data(x)
    if _same(value.sizes, _sizes(node)):
        return read.finish(node, value)
    written, like = read.whole_sizes(_sizes(node), value)
    read.finish(node, read.add("expand", {"input": [value], "like": like}, _sizes(node), sizes=written))


@_row(_aten.expand_as.default)
def _expand_as(read: Reader, node: Node, x: Any, other: Any) -> None:
    inputs = {"input": [read.data(x)], "like": [read.value(other)]}
    read.finish(node, read.add("expand", inputs, _sizes(node)))


@_row(_aten.repeat.default)
def _repeat(read: Reader, node: Node, x: Any, repeats: Sequence[Any]) -> None:
    numbers = [one.meta["val"] if isinstance(one, Node) else one for one in repeats]
    written, like = read.whole_sizes(numbers)
    read.finish(node, read.add("repeat", {"input": [read.data(x)], "like": like}, _sizes(node), sizes=written))


@_row(
    *(_aten.zeros.default, _aten.ones.default, _aten.full.default, _aten.new_zeros.default, _aten.new_ones.default),
    *(_aten.new_full.default, _aten.zeros_like.default, _aten.ones_like.default, _aten.full_like.default),
)
def _full(read: Reader, node: Node, *given: Any, **named: Any) -> None:
    name = node.target.__name__  # type: ignore[union-attr]
    number = 0.0 if "zeros" in name else 1.0 if "ones" in name else given[2 if name.startswith("new") else 1]
    if type(number) not in (int, float):
        raise NotALayerError("is full of something that is computed")
    written, like = read.whole_sizes(_sizes(node))
    read.finish(node, read.add("full", {"like": like}, _sizes(node), sizes=written, value=float(number)))


@_row(_aten.pixel_shuffle.default, _aten.pixel_unshuffle.default)
def _pixel_shuffle(read: Reader, node: Node, x: Any, r: int) -> None:
    value, found = read.data(x), _sizes(node)
    if len(found) != 4:
        raise NotALayerError("is a single image without a batch")
    apart: tuple[Any, ...]
    if node.target is _aten.pixel_shuffle.default:
        apart, dims = (*found[:2], r, r, *value.sizes[2:]), (0, 1, 4, 2, 5, 3)
    else:
        apart, dims = (*value.sizes[:2], found[2], r, found[3], r), (0, 1, 3, 5, 2, 4)
    read.finish(node, read.reshape(read.permute(read.reshape(value, apart), dims), found))


@_row(_aten.permute.default)
def _permute(read: Reader, node: Node, x: Any, dims: Sequence[int]) -> None:
    value = read.data(x)
    read.finish(node, read.permute(value, [d % len(value.sizes) for d in dims]))


@_row(_aten.transpose.int, _aten.swapaxes.default, _aten.swapdims.default)
def _transpose(read: Reader, node: Node, x: Any, first: int, second: int) -> None:
    value = read.data(x)
    dims = list(range(len(value.sizes)))
    dims[first], dims[second] = dims[second], dims[first]
    read.finish(node, read.permute(value, dims))


@_row(_aten.movedim.int)
def _movedim(read: Reader, node: Node, x: Any, source: int, destination: int) -> None:
    value = read.data(x)
    dims = list(range(len(value.sizes)))
    moved = dims.pop(source)
    dims.insert(destination % len(value.sizes), moved)
    read.finish(node, read.permute(value, dims))


@_row(_aten.mT.default)
def _mt(read: Reader, node: Node, x: Any) -> None:
    _transpose(read, node, x, -2, -1)


@_row(_aten.t.default)
def _t(read: Reader, node: Node, x: Any) -> None:
    value = read.data(x)
    read.finish(node, read.permute(value, list(range(len(value.sizes)))[::-1]))


@_row(_aten.clone.default, _aten.contiguous.default)
def _contiguous(read: Reader, node: Node, x: Any, memory_format: Any = None) -> None:
    if memory_format in (torch.channels_last, torch.channels_last_3d):
        raise NotALayerError("asks for another order of elements in memory")
    value = read.data(x)
    read.finish(node, read.add("contiguous", {"input": [value]}, value.sizes))


@_row(_aten.slice.Tensor)
def _slice(read: Reader, node: Node, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> None:
    is_constant = getattr(x, "name", "") in read.constants
    value = read.value(x) if is_constant else read.data(x)
    if _same(value.sizes, _sizes(node)) and not is_constant:
        return read.finish(node, value)
    stop = _END if end is None else end
    read.finish(node, read.slice(value, dim, 0 if start is None else start, stop, step, _sizes(node)))


@_row(_aten.narrow.default)
def _narrow(read: Reader, node: Node, x: Any, dim: int, start: Any, length: Any) -> None:
    stop = start + length
    _slice(read, node, x, dim, start, _END if start < 0 and stop == 0 else stop)


@_row(_aten.select.int)
def _select(read: Reader, node: Node, x: Any, dim: int, index: Any) -> None:
    value = read.data(x)
    rank = len(value.sizes)
    if not isinstance(index, int):
        raise NotALayerError("chooses by a number that depends on the input")
    sizes = list(value.sizes)
    sizes[dim % rank] = 1
    one = read.slice(value, dim % rank, index, _END if index == -1 else index + 1, 1, sizes)
    read.finish(node, read.reshape(one, _sizes(node)))


@_row(_aten.cat.default)
def _cat(read: Reader, node: Node, parts: Any, dim: int = 0) -> None:
    if any(len(_sizes(one)) != len(_sizes(node)) for one in parts):
        raise NotALayerError("joins values of other dimensions")
    read.finish(node, read.add("cat", {"inputs": [read.data(one) for one in parts]}, _sizes(node), dim=dim))


@_row(_aten.stack.default)
def _stack(read: Reader, node: Node, parts: Any, dim: int = 0) -> None:
    sizes = list(_sizes(node))
    sizes[dim] = 1
    values = [read.reshape(read.data(one), sizes) for one in parts]
    read.finish(node, read.add("cat", {"inputs": values}, _sizes(node), dim=dim))


@_row(_aten.split.Tensor, _aten.split.sizes, _aten.split_with_sizes.default, _aten.chunk.default, _aten.unbind.int)
def _split(read: Reader, node: Node, x: Any, *rest: Any, **named: Any) -> None:
    value = read.data(x)
    is_unbind = node.target is _aten.unbind.int
    names = ("dim",) if is_unbind else ("parts", "dim")
    dim = {**dict(zip(names, rest, strict=False)), **named}.get("dim", 0) % len(value.sizes)
    parts, first = [], 0
    for tensor in node.meta["val"]:
        sizes = list(tensor.shape)
        if is_unbind:
            sizes.insert(dim, 1)
        part = read.slice(value, dim, first, first + sizes[dim], 1, sizes)
        first += sizes[dim]
        parts.append(read.reshape(part, tensor.shape))
    read.parts[node] = parts


@_row(_aten.pad.default, _aten.constant_pad_nd.default)
def _pad(read: Reader, node: Node, x: Any, padding: Any, *rest: Any, **named: Any) -> None:
    mode, number = "constant", 0.0
    for given in (*rest, *named.values()):
        if isinstance(given, str):
            mode = given
        elif given is not None:
            number = float(given)
    if not all(isinstance(one, int) for one in padding):
        raise NotALayerError("pads by sizes")
    inputs = {"input": [read.data(x)]}
    if mode == "constant":
        return read.finish(node, read.add("pad", inputs, _sizes(node), padding=list(padding), value=number))
    if min(padding) < 0:
        raise NotALayerError(f"takes pixels away, by {mode}")
    read.finish(node, read.add("border", inputs, _sizes(node), padding=list(padding), mode=mode))


@_row(_aten.index.Tensor)
def _index(read: Reader, node: Node, x: Any, indices: Any) -> None:
    value, chosen = read.data(x), [i for i, one in enumerate(indices) if one is not None]
    if chosen != list(range(chosen[0], chosen[-1] + 1)):
        raise NotALayerError("has indices apart from one another")
    every = [read.index(indices[i]) for i in chosen]
    if any(one.shape != every[0].shape for one in every):
        raise NotALayerError("has indices that are broadcast")
    numbers = [number for one in every for number in one.flatten().tolist()]
    sizes = [*value.sizes[: chosen[0]], every[0].numel(), *value.sizes[chosen[-1] + 1 :]]
    inputs = {"input": [value]}  # of which the neighbouring dimensions that have an index become one
    value = read.add("index_select", inputs, sizes, dim=chosen[0], dims=len(every), index=numbers)
    read.finish(node, value if every[0].dim() == 1 else read.reshape(value, _sizes(node)))


@_row(_aten.index_select.default)
def _index_select(read: Reader, node: Node, x: Any, dim: int, index: Any) -> None:
    inputs = {"input": [read.data(x)]}
    numbers = read.index(index).flatten().tolist()
    read.finish(node, read.add("index_select", inputs, _sizes(node), dim=dim, index=numbers))


@_row(
    *(_aten.upsample_nearest1d.vec, _aten.upsample_nearest2d.vec),
    *(_aten.upsample_linear1d.vec, _aten.upsample_bilinear2d.vec),
)
def _upsample(read: Reader, node: Node, x: Any, output_size: Any, *rest: Any) -> None:
    value = read.data(x)
    linear = "linear" in str(node.target)
    aligns, factors = (rest[0] if linear else False), rest[-1]
    asked: dict[str, Any]
    if factors is None:
        written, like = read.whole_sizes(_sizes(node)[2:], value)
        asked = {"sizes": written}
    elif all(float(factor).is_integer() for factor in factors):
        like, asked = [], {"factors": [int(factor) for factor in factors]}
    else:
        raise NotALayerError("enlarges by factors that are no whole numbers")
    inputs = {"input": [value], "like": like} if like else {"input": [value]}
    made = read.add("upsample", inputs, _sizes(node), **asked, linear=linear, align_corners=bool(aligns))
    read.finish(node, made)
