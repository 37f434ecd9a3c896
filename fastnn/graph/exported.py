"""Reads an exported model: chains of operators as the stages of frozen networks, and what lies between them.

A chain goes on for as long as the stages of csrc/ops/frozen_stages.h can follow it and nobody else asks for what it has
come to. A model that is one chain becomes a :class:`fastnn.FrozenModel`, others a :class:`fastnn.FrozenGraph`.
"""

import contextlib
import copy
import inspect
import io
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fastnn import activations
from fastnn._torch import OpOverload, statically_known_true
from fastnn.ops.frozen import conv_numbers

_aten = torch.ops.aten
VIEWS = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)
_COPIES = (_aten.clone.default, _aten.contiguous.default, _aten.alias.default)
_NO_LIMITS = (0, 0)  # a size without limits, in an input stage
_RNN_DIRECTIONS, _RNN_BATCH_FIRST, _RNN_LAST = 2, 3, 5  # places among the numbers of an rnn stage


@dataclass
class Stage:
    """One stage of a program: its name and numbers (csrc/ops/frozen_stages.h), and its weights in their order."""

    name: str
    numbers: list[Any]
    tensors: list[Tensor] = field(default_factory=list)


@dataclass
class Segment:
    """Operators of the graph that are one frozen network: `nodes`, from what `input` gives to what the last does."""

    input: Node
    nodes: list[Node]
    stages: list[Stage]  # the first is "input", and says what sizes that may have


@dataclass
class Exported:
    """A model as a graph of operators without side effects, in inference."""

    graph: Graph
    inputs: list[Node]
    outputs: list[Any]  # nodes and constants, in the order of `out_spec`
    out_spec: Any
    constants: dict[str, Tensor]  # by the names of nodes: parameters, buffers, and what follows from them alone
    segments: list[Segment]
    refusals: list[ValueError]  # why chains did not begin or go on, in the graph's order
    ranges: list[list[int]]  # of each input: of each size the least and the most, 0 for no limit
    draws: list[str]  # operators that draw random numbers

    @property
    def is_one_chain(self) -> bool:
        """Whether the one segment is all that there is from the one input to the one output."""
        return (
            len(self.inputs) == 1
            and len(self.segments) == 1
            and self.segments[0].input is self.inputs[0]
            and self.outputs == [self.segments[0].nodes[-1]]
            and self.out_spec.is_leaf()
        )


def read(model: nn.Module, inputs: tuple[Tensor, ...]) -> Exported:
    """``model`` in chains, for inputs of any batch size. (The first dimension of each is of at least two here.)"""
    # (A size of 1 is always taken for a constant.)
    free = [[dim for dim, size in enumerate(input.shape) if size > 1] for input in inputs]
    try:
        first = _read(model, inputs, free)
        if first.is_one_chain:
            return first
    except ValueError:
        first = None
    # ``view(-1, 320)``, for one, flattens images of one size alone.
    try:
        other = _read(model, inputs, [[0]] * len(inputs))
    except ValueError:
        if first is None:
            raise
        return first
    return other if first is None or other.is_one_chain else first


def _read(model: nn.Module, inputs: tuple[Tensor, ...], free: Sequence[Sequence[int]]) -> Exported:
    """The same, with the example's sizes in all dimensions that are not ``free``."""
    exported = _export(model, inputs, free)
    graph, constants = exported.graph, _constants(exported)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
    by_name = {node.name: node for node in graph.nodes}
    placeholders = [by_name[name] for name in exported.graph_signature.user_inputs]
    ranges = _ranges(exported)
    if any(ranges.get(str(_sizes(input)[0])) != _NO_LIMITS for input in placeholders):
        raise ValueError(f"freeze: what {type(model).__name__} does depends on the batch's size")
    _drop_copies(graph)
    _fold_constants(graph, constants)
    _fold_batch_norm(graph, constants)
    segments, refusals, required = _split(graph, constants, ranges)
    (outputs,) = graph.output_node().args
    draws = [str(node.target) for node in graph.nodes if _draws(node)]
    sizes = [
        [
            bound
            for size, known in zip(_sizes(placeholder), input.shape, strict=True)
            for bound in _bounds(size, ranges, required, int(known))
        ]
        for placeholder, input in zip(placeholders, inputs, strict=True)
    ]
    return Exported(
        graph, placeholders, list(outputs), exported.call_spec.out_spec, constants, segments, refusals, sizes, draws
    )


def _bounds(size: Any, ranges: dict[str, tuple[int, int]], required: dict[str, int], known: int) -> Sequence[int]:
    number = required.get(str(size))
    return ranges.get(str(size), (known, known)) if number is None else (number, number)


def _split(
    graph: Graph, constants: dict[str, Tensor], ranges: dict[str, tuple[int, int]]
) -> tuple[list[Segment], list[ValueError], dict[str, int]]:
    """The longest chains, one after another."""
    segments: list[Segment] = []
    refusals: list[ValueError] = []
    required: dict[str, int] = {}
    taken: set[Node] = set()
    for first in graph.nodes:
        if first in taken or first.target not in _BEGINNINGS or not isinstance(first.args[0], Node):
            is_operator = first.op == "call_function" and isinstance(first.meta["val"], Tensor)
            if is_operator and first.target not in _READERS and not _is_zero_state(first):
                refusals.append(_refusal(first, "has no counterpart in a frozen model"))
            continue
        if first.name in constants or first.args[0].name in constants:
            refusals.append(_refusal(first, "does not depend on the input"))
            continue
        found = max(
            (_grow(start, constants, refusals) for start in _starts(first)),
            key=lambda grown: 0 if grown is None else len([node for node in grown[1] if node.target in _BEGINNINGS]),
        )
        if found is None:
            continue
        chain, nodes, stages = found
        input: Any = nodes[0].args[0]
        numbers: list[int] = []
        for size in _sizes(input):
            numbers += _bounds(size, ranges, chain.required, int(size) if isinstance(size, int) else 0)
        required.update(chain.required)
        segments.append(Segment(input, nodes, [Stage("input", numbers), *stages]))
        taken.update(nodes)
    return segments, refusals, required


def _starts(first: Node) -> list[Node]:
    """Where a chain may begin whose first layer is that: there, or before, at the reshapes that make the layer's rows
    of more dimensions, which the chain has too then, and may undo."""
    start: Any = first
    while True:
        before = start.args[0]
        if _READERS.get(before.target) not in (_Chain.add_reshape, _Chain.add_copy):
            break
        if {user for user in before.users if not _is_zero_state(user)} != {start}:
            break
        start = before
    return [start] if start is first else [start, first]


def _grow(
    first: Node, constants: dict[str, Tensor], refusals: list[ValueError]
) -> tuple["_Chain", list[Node], list[Stage]] | None:
    """The chain from this operator on, as far as it can end; None where it cannot even begin."""
    chain = _Chain(first.args[0], constants)  # type: ignore[arg-type]
    nodes: list[Node] = []
    best: tuple[_Chain, list[Node], list[Stage]] | None = None
    node: Node | None = first
    while node is not None:
        before = chain.copy()
        try:
            chain.add(node)
        except ValueError as refusal:
            refusals.append(refusal)
            chain = before
            break
        nodes.append(node)
        if node.target is not torch.ops.fastnn.rnn.default:  # whose results come in parts
            ended = chain.copy()
            try:
                ended.settle()
                best = (ended, list(nodes), ended.stages)
            except ValueError as refusal:
                refusals.append(refusal)
        users = [user for user in node.users if not _is_zero_state(user)]
        if node.target is torch.ops.fastnn.rnn.default and len(users) > 1:
            refusals.append(_refusal(node, "has a second result, which a frozen model cannot use in this way"))
        node = users[0] if len(users) == 1 and users[0].op == "call_function" and users[0].args[0] is node else None
    return best


def _is_zero_state(node: Node) -> bool:
    """Whether a node is what a recurrent operator starts from, where no state was given."""
    rnn = torch.ops.fastnn.rnn.default
    return node.target is _aten.new_zeros.default and all(user.target is rnn for user in node.users)


def _drop_copies(graph: Graph) -> None:
    """Takes out what only passes on its input: nothing in the graph changes a tensor in place."""
    results = graph.output_node().all_input_nodes
    for node in list(graph.nodes):
        copies = (node.target in _COPIES and not node.kwargs) or (
            node.target is _aten.dropout.default and node.args[2] is False
        )
        if copies and node not in results:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _draws(node: Node) -> bool:
    """Whether a node draws random numbers."""
    operator = node.target
    return isinstance(operator, OpOverload) and torch.Tag.nondeterministic_seeded in operator.tags


def _fold_constants(graph: Graph, constants: dict[str, Tensor]) -> None:
    """Computes what depends on constants alone, such as weights with a batch norm folded in."""
    by_node = {node: constants[node.name] for node in graph.nodes if node.name in constants}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op != "call_function" or not inputs or not all(one in by_node for one in inputs):
            continue
        if not isinstance(node.target, OpOverload) or _draws(node):
            continue
        args, kwargs = map_arg((node.args, node.kwargs), by_node.__getitem__)
        value = node.target(*args, **kwargs)
        if isinstance(value, Tensor):
            by_node[node] = constants[node.name] = value.detach()


def _fold_batch_norm(graph: Graph, constants: dict[str, Tensor]) -> None:
    """Has the layer before a batch norm do its work, where that layer's result has no other use."""
    for norm in list(graph.nodes):
        read_norm = _BATCH_NORMS.get(norm.target)
        if read_norm is None or (statistics := read_norm(norm)) is None:
            continue
        layer, result, arguments, eps = statistics
        read_layer = _WEIGHTS_OF.get(layer.target)
        if read_layer is None or len(layer.users) != 1 or layer.args[0].name in constants:
            continue
        places = read_layer(layer)
        if places is None or not all(one is None or one.name in constants for one in (*places, *arguments)):
            continue
        weight, bias = (None if one is None else constants[one.name] for one in places)
        gamma, beta, mean, var = (None if one is None else constants[one.name] for one in arguments)
        if weight is None or mean is None or var is None:
            continue
        scale = torch.rsqrt(var + eps) * (1 if gamma is None else gamma)
        shift = (0 if beta is None else beta) - mean * scale + (0 if bias is None else bias * scale)
        folded = []
        for name, value in (("weight", weight * scale.reshape(-1, *(1,) * (weight.dim() - 1))), ("bias", shift)):
            with graph.inserting_before(next(iter(graph.nodes))):
                node = graph.placeholder(f"{norm.name}_{name}")
            node.meta["val"] = value
            constants[node.name] = value
            folded.append(node)
        if layer.target is torch.ops.fastnn.mlp.default:
            layer.args = (layer.args[0], folded, *layer.args[2:])
        else:
            layer.args = (layer.args[0], *folded, *layer.args[3:])
        result.replace_all_uses_with(layer)
        for node in dict.fromkeys([result, norm]):
            graph.erase_node(node)


def _batch_norm(norm: Node) -> tuple[Any, Node, Sequence[Any], Any] | None:
    """The layer before, the node of the result, gamma, beta, mean and variance, and epsilon; None in training."""
    return None if norm.args[5] else (norm.args[0], norm, norm.args[1:5], norm.args[7])


def _batch_norm_of_three_results(norm: Node) -> tuple[Any, Node, Sequence[Any], Any] | None:
    (result,) = norm.users if len(norm.users) == 1 else (None,)
    if result is None or result.target is not operator.getitem or result.args[1] != 0:
        return None
    return norm.args[0], result, norm.args[1:5], norm.args[6]


_BATCH_NORMS: dict[Any, Callable[[Node], Any]] = {
    _aten.batch_norm.default: _batch_norm,
    _aten._native_batch_norm_legit_no_training.default: _batch_norm_of_three_results,
}


def _weights_of_mlp(layer: Node) -> tuple[Node, Node | None] | None:
    parameters: Any = layer.args[1]
    if layer.args[2] != "identity":
        return None
    return parameters[0], parameters[1] if len(parameters) > 1 else None


def _weights_of_layer(layer: Node) -> tuple[Any, Any]:
    return layer.args[1], layer.args[2] if len(layer.args) > 2 else None


_WEIGHTS_OF: dict[Any, Callable[[Node], Any]] = {
    **dict.fromkeys(
        (_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.linear.default), _weights_of_layer
    ),
    torch.ops.fastnn.mlp.default: _weights_of_mlp,
}


def _export(model: nn.Module, inputs: tuple[Tensor, ...], free: Sequence[Sequence[int]]) -> ExportedProgram:
    """``model`` as a graph that changes nothing in place."""
    # By the names of arguments, of which one may take several inputs (*inputs).
    sizes = inspect.signature(model.forward).bind(*(dict.fromkeys(dims, Dim.AUTO) for dims in free)).arguments
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # where torch writes the whole graph that it has failed at
            exported = torch.export.export(model, inputs, dynamic_shapes=dict(sizes), strict=False)
        if any(node.op == "call_function" and node.is_impure() for node in exported.graph.nodes):
            with warnings.catch_warnings():  # torch's own, about its own code
                warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
                exported = exported.run_decompositions({})
    except Exception as error:  # of whatever kind: the model itself has run, so it is the export that cannot take it
        words = str(error).partition("\n")[0]
        raise ValueError(f"freeze: torch.export cannot take {type(model).__name__}: {words}") from error
    signature = exported.graph_signature
    changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if changed:
        raise ValueError(f"freeze: {type(model).__name__} changes {', '.join(changed)} in place, at every call")
    return exported


def _ranges(exported: ExportedProgram) -> dict[str, tuple[int, int]]:
    """Of the input's sizes that are free, by their names: the least and the most for which the export holds. (It leaves
    0 and 1 out of every range.)"""
    return {
        str(symbol): (
            0 if bounds.lower <= 2 else int(bounds.lower),
            0 if bounds.upper >= 2**31 else int(bounds.upper),
        )
        for symbol, bounds in exported.range_constraints.items()
    }


def _constants(exported: ExportedProgram) -> dict[str, Tensor]:
    """The model's own tensors, by the names of their nodes."""
    signature = exported.graph_signature
    tensors = {**exported.constants, **exported.state_dict}
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    return {node: tensors[name] for node, name in names.items()}


def _sizes(node: Node) -> Sequence[Any]:
    """Of its result, or of the first of its results: int, or SymInt where they depend on the input's."""
    value = node.meta["val"]
    return (value if isinstance(value, Tensor) else value[0]).shape


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether the sizes are the same for every input."""
    return len(one) == len(other) and all(statically_known_true(a == b) for a, b in zip(one, other, strict=True))


def _refusal(node: Node, why: str) -> ValueError:
    layers = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = layers[-1] if layers else ("", "")
    if path.startswith("_empty_nn_module_stack"):  # torch.export's word for none
        path = kind = ""
    where = f"layer '{path}'" if path else "the model itself"
    return ValueError(f"freeze: {node.target}, of {where}{f' ({kind})' if kind else ''}, {why}")


class _Chain:
    """The stages of a chain of operators, each of which takes the result of the one before.

    Reshapes keep the order of the elements, and a linear layer sees nothing but rows. So the program does not follow
    the model's reshapes: its own sizes, `sizes`, may be other ones than the model's for a while. Where an operator, or
    the end, depends on all of them, `settle` makes them the same again.
    """

    def __init__(self, input: Node, constants: dict[str, Tensor]) -> None:
        self.node = input  # whose result the stages have come to
        self.sizes = _sizes(input)  # that the program has for it
        self.reshape = input  # the last that there was
        self.state_of: Node | None = None  # the recurrent operator whose final state, not whose output, it is
        self.stages: list[Stage] = []
        self.required: dict[str, int] = {}  # what stages ask of sizes that the export has left free
        self.constants = constants

    def copy(self) -> "_Chain":
        other = copy.copy(self)
        other.stages = [Stage(stage.name, list(stage.numbers), list(stage.tensors)) for stage in self.stages]
        other.required = dict(self.required)
        return other

    def add(self, node: Node) -> None:
        """Take the next operator; ValueError if it has no place in a chain of stages."""
        add = _READERS.get(node.target)
        if add is None:
            raise _refusal(node, "has no counterpart in a frozen model")
        if node.args[0] is not self.node:
            raise _refusal(node, "takes something other than the result of the operator before it")
        if self.state_of is not None and node.target not in (operator.getitem, _aten.select.int):
            raise self.refusal_of_state()
        add(self, node)
        self.node = node

    def settle(self) -> None:
        """Has the program's sizes be the model's."""
        if self.state_of is not None:
            raise self.refusal_of_state()
        sizes = _sizes(self.node)
        if _same(sizes, self.sizes):
            return
        if not _same(sizes, (self.sizes[0], prod(self.sizes[1:]))):
            raise _refusal(
                self.reshape,
                "changes sizes in a way that a frozen model cannot: it can make one of all dimensions but the batch",
            )
        # ``view(-1, 320)`` says how many they must be, which the symbols of sizes may not.
        named: Any = self.reshape.args[1] if self.reshape.target in VIEWS else [None]
        self.stages.append(Stage("flatten", [named[-1]] if isinstance(named[-1], int) and named[-1] > 0 else []))
        self.sizes = sizes

    def last(self, name: str) -> Stage | None:
        """The last stage, if it is of that name."""
        return self.stages[-1] if self.stages and self.stages[-1].name == name else None

    def require(self, size: Any, number: int) -> None:
        """Has ``size`` be that number, if it is one of the input's that are free."""
        self.required[str(size)] = number

    def constant(self, node: Node, argument: Any) -> Tensor:
        if not isinstance(argument, Node) or argument.name not in self.constants:
            raise _refusal(node, "takes something that is neither the input nor a parameter of the model")
        return self.constants[argument.name]

    def constants_of(self, node: Node, arguments: Any) -> list[Tensor]:
        return [self.constant(node, argument) for argument in arguments if argument is not None]

    def refusal_of_state(self) -> ValueError:
        assert self.state_of is not None
        return _refusal(self.state_of, "has a second result, which a frozen model cannot use in this way")

    # ---- a method for each kind of operator -----------------------------------------------------------------------

    def add_linear(self, node: Node) -> None:
        self.add_layers([self.constant(node, node.args[1])], self.constants_of(node, node.args[2:]), ["identity"])

    def add_mlp(self, node: Node) -> None:
        names = activations.parse(str(node.args[2]))
        parameters = self.constants_of(node, node.args[1])
        self.add_layers(parameters[: len(names)], parameters[len(names) :], names)

    def add_layers(self, weights: list[Tensor], biases: list[Tensor], names: Sequence[Any]) -> None:
        if not _same(_sizes(self.node)[-1:], self.sizes[-1:]):
            self.settle()
        if len(self.sizes) < 2:
            raise _refusal(self.node, "is a single row without a batch")
        self.require(self.sizes[-1], weights[0].shape[1])
        stage = self.last("mlp")
        if stage is None or stage.numbers[0] != bool(biases):
            stage = Stage("mlp", [int(bool(biases)), weights[0].shape[1]])
            self.stages.append(stage)
        for i, (weight, name) in enumerate(zip(weights, names, strict=True)):
            stage.numbers += [weight.shape[0], str(name)]
            stage.tensors += [weight, biases[i]] if biases else [weight]
        self.sizes = (*self.sizes[:-1], weights[-1].shape[0])

    def add_activation(self, node: Node) -> None:
        activation = activations.from_operator(node.target, node.args[1:], node.kwargs)
        if activation is None:
            raise _refusal(node, "has parameters that no kernel has")
        stage = self.last("mlp")
        if stage is None or stage.numbers[-1] != "identity":
            raise _refusal(node, "does not follow a Linear layer, as it must in a frozen model")
        stage.numbers[-1] = str(activation)

    def add_conv(self, node: Node) -> None:
        self.settle()
        geometry: Any = node.args[3]
        tensors = self.constants_of(node, node.args[1:3])
        self.require(self.sizes[1], tensors[0].shape[1] * geometry[-2])
        self.stages.append(Stage("conv", conv_numbers(tensors[0].shape, len(tensors) > 1, geometry), tensors))
        self.sizes = _sizes(node)

    def add_rnn(self, node: Node) -> None:
        self.settle()
        arguments: Any = node.args
        _, batch_sizes, state, weights, masks, mode, layers, bidirectional, batch_first = arguments
        is_zero = all(part.target is _aten.new_zeros.default for part in state)  # what fastnn.ops.rnn takes for none
        if batch_sizes is not None or not is_zero or masks is not None:
            raise _refusal(node, "has packed sequences or a state, which a frozen model cannot take")
        tensors = self.constants_of(node, weights)
        directions = 2 if bidirectional else 1
        each = len(tensors) // (directions * layers)
        in_features, hidden, projected = tensors[0].shape[1], tensors[1].shape[1], 0
        if each % 2:
            projected, hidden = tensors[int(each) - 1].shape
        flags = [int(bool(batch_first)), int(each >= 4), 0]
        numbers = [mode, layers, directions, *flags, in_features, hidden, projected]
        self.require(self.sizes[-1], in_features)
        self.stages.append(Stage("rnn", numbers, tensors))
        self.sizes = _sizes(node)

    def add_result(self, node: Node) -> None:
        """The output of a recurrent network; or its final states, and of these the first, h."""
        if self.state_of is None:
            self.state_of = self.node if node.args[1] == 1 else None
        elif node.args[1] != 0:
            raise self.refusal_of_state()

    def add_select(self, node: Node) -> None:
        """The last step of a recurrent network's output, or the last layer's final h, which is the same."""
        stage = self.last("rnn")
        if stage is None or stage.numbers[_RNN_LAST]:
            raise _refusal(node, "does not follow a recurrent layer, as it must in a frozen model")
        if self.state_of is not None:
            if node.args[1:] != (0, -1) or stage.numbers[_RNN_DIRECTIONS] != 1:
                raise self.refusal_of_state()
            self.state_of = None
        else:
            self.settle()
            if node.args[1:] != (stage.numbers[_RNN_BATCH_FIRST], -1):
                raise _refusal(node, "does not choose the last step, as it must in a frozen model")
        stage.numbers[_RNN_LAST] = 1
        self.sizes = _sizes(node)

    def add_reshape(self, node: Node) -> None:
        self.reshape = node

    def add_slice(self, node: Node) -> None:
        if not _same(_sizes(node), _sizes(self.node)):
            raise _refusal(node, "takes a part of its input, which a frozen model cannot")

    def add_dropout(self, node: Node) -> None:
        if node.args[2] is not False:
            raise _refusal(node, "drops elements in eval mode too")

    def add_copy(self, node: Node) -> None:
        """Nothing: memory is the frozen network's own."""


_READERS: dict[Any, Callable[[_Chain, Node], None]] = {
    **dict.fromkeys(activations.OPERATORS, _Chain.add_activation),
    _aten.linear.default: _Chain.add_linear,
    torch.ops.fastnn.mlp.default: _Chain.add_mlp,
    torch.ops.fastnn.conv_relu_max_pool.default: _Chain.add_conv,
    torch.ops.fastnn.rnn.default: _Chain.add_rnn,
    operator.getitem: _Chain.add_result,
    _aten.select.int: _Chain.add_select,
    _aten.slice.Tensor: _Chain.add_slice,
    _aten.dropout.default: _Chain.add_dropout,
    **dict.fromkeys(_COPIES, _Chain.add_copy),
    **dict.fromkeys(
        (
            *(*VIEWS, _aten.flatten.using_ints, _aten.unsqueeze.default),
            *(_aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims),
        ),
        _Chain.add_reshape,
    ),
}
_BEGINNINGS = (
    _aten.linear.default,
    torch.ops.fastnn.mlp.default,
    torch.ops.fastnn.conv_relu_max_pool.default,
    torch.ops.fastnn.rnn.default,
)
