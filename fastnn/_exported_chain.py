"""Reads an exported model: the operators on the way from its input to its output, as the stages of a frozen network."""

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
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fastnn.ops.frozen import conv_numbers
from fastnn.ops.mlp import ACTIVATION_NAMES, names_of_code

_aten = torch.ops.aten
_ACTIVATIONS: dict[Any, str] = {
    _aten.relu.default: "relu",
    _aten.tanh.default: "tanh",
    _aten.sigmoid.default: "sigmoid",
    _aten.silu.default: "silu",
    _aten.gelu.default: "gelu",
    _aten.leaky_relu.default: "leaky_relu",
}
_VIEWS = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)
_ANY = (0, 0)  # a size without limits, in an input stage
_RNN_DIRECTIONS, _RNN_BATCH_FIRST, _RNN_LAST = 2, 3, 5  # places among the numbers of an rnn stage


@dataclass
class Stage:
    """One stage of a program: its name and numbers (csrc/ops/frozen_stages.h), and its weights in their order."""

    name: str
    numbers: list[int]
    tensors: list[Tensor] = field(default_factory=list)


def read_chain(model: nn.Module, example_input: Tensor) -> list[Stage]:
    """The stages that compute what ``model`` does, for an input of any batch size. The first, "input", says what its
    other sizes may be.

    ``example_input``: of a batch of at least two. Raises ValueError where there are no such stages.
    """
    try:
        # (A size of 1 is always taken for a constant.)
        return _read(model, example_input, [dim for dim, size in enumerate(example_input.shape) if size > 1])
    except ValueError:  # ``view(-1, 320)``, for one, flattens images of one size alone
        return _read(model, example_input, [0])


def _read(model: nn.Module, example_input: Tensor, free: Sequence[int]) -> list[Stage]:
    """The same, with the example's sizes in all dimensions that are not ``free``."""
    exported = _export(model, example_input, free)
    input, output = _ends(exported)
    ranges = _ranges(exported)
    if ranges.get(str(_sizes(input)[0])) != _ANY:
        raise ValueError(f"freeze: what {type(model).__name__} does depends on the batch's size")
    chain = _Chain(input, _constants(exported))
    for node in _path(exported.graph, input, output):
        chain.add(node)
    if chain.node is not output:
        raise _refusal(output, "does not depend on the input")
    chain.settle()
    numbers: list[int] = []
    for size, known in zip(_sizes(input), example_input.shape, strict=True):
        required = chain.required.get(str(size))
        numbers += ranges.get(str(size), (known, known)) if required is None else (required, required)
    return [Stage("input", numbers), *chain.stages]


def _export(model: nn.Module, example_input: Tensor, free: Sequence[int]) -> ExportedProgram:
    """``model`` as a graph that changes nothing in place."""
    sizes = dict.fromkeys(free, Dim.AUTO)
    try:
        exported = torch.export.export(model, (example_input,), dynamic_shapes=(sizes,), strict=False)
        if any(node.op == "call_function" and node.is_impure() for node in exported.graph.nodes):
            with warnings.catch_warnings():  # torch's own, about its own code
                warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
                exported = exported.run_decompositions({})
    except Exception as error:  # of whatever kind: the model itself has run, so it is the export that cannot take it
        raise ValueError(f"freeze: torch.export cannot take {type(model).__name__}: {error}") from error
    signature = exported.graph_signature
    changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if changed:
        raise ValueError(f"freeze: {type(model).__name__} changes {', '.join(changed)} in place, at every call")
    return exported


def _ends(exported: ExportedProgram) -> tuple[Node, Node]:
    """The nodes of the input and of the output."""
    (name,) = exported.graph_signature.user_inputs
    input = next(node for node in exported.graph.nodes if node.name == name)
    (outputs,) = exported.graph.output_node().args
    (output,) = outputs
    return input, output


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


def _path(graph: Graph, input: Node, output: Node) -> list[Node]:
    """The operators that take part in what becomes of the input's numbers, in their order: neither those that only ask
    for its sizes or kind, nor those whose result is not used."""
    needed, nodes = {output}, list(graph.nodes)
    for node in reversed(nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    carrying = {input}
    for node in nodes:
        asks = node.target is _aten.new_zeros.default or isinstance(node.meta.get("val"), torch.SymInt)
        if not asks and not carrying.isdisjoint(node.all_input_nodes):
            carrying.add(node)
    return [node for node in nodes if node in needed and node in carrying and node.op == "call_function"]


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
        named: Any = self.reshape.args[1] if self.reshape.target in _VIEWS else [None]
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
        names = names_of_code(node.args[2])  # type: ignore[arg-type]
        parameters = self.constants_of(node, node.args[1])
        self.add_layers(parameters[: len(names)], parameters[len(names) :], names)

    def add_layers(self, weights: list[Tensor], biases: list[Tensor], names: Sequence[str]) -> None:
        if not _same(_sizes(self.node)[-1:], self.sizes[-1:]):
            self.settle()
        self.require(self.sizes[-1], weights[0].shape[1])
        stage = self.last("mlp")
        if stage is None or stage.numbers[0] != bool(biases):
            stage = Stage("mlp", [int(bool(biases)), weights[0].shape[1]])
            self.stages.append(stage)
        for i, (weight, name) in enumerate(zip(weights, names, strict=True)):
            stage.numbers += [weight.shape[0], ACTIVATION_NAMES.index(name)]
            stage.tensors += [weight, biases[i]] if biases else [weight]
        self.sizes = (*self.sizes[:-1], weights[-1].shape[0])

    def add_activation(self, node: Node) -> None:
        name = _ACTIVATIONS[node.target]
        if name == "gelu" and node.kwargs.get("approximate", "none") == "tanh":
            name = "gelu_tanh"
        if name == "leaky_relu" and node.args[1:] not in ((), (0.01,)):
            raise _refusal(node, "has a slope other than 0.01")
        stage = self.last("mlp")
        if stage is None or stage.numbers[-1] != ACTIVATION_NAMES.index("identity"):
            raise _refusal(node, "does not follow a Linear layer, as it must in a frozen model")
        stage.numbers[-1] = ACTIVATION_NAMES.index(name)

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
    **dict.fromkeys(_ACTIVATIONS, _Chain.add_activation),
    _aten.linear.default: _Chain.add_linear,
    torch.ops.fastnn.mlp.default: _Chain.add_mlp,
    torch.ops.fastnn.conv_relu_max_pool.default: _Chain.add_conv,
    torch.ops.fastnn.rnn.default: _Chain.add_rnn,
    operator.getitem: _Chain.add_result,
    _aten.select.int: _Chain.add_select,
    _aten.slice.Tensor: _Chain.add_slice,
    _aten.dropout.default: _Chain.add_dropout,
    **dict.fromkeys((_aten.clone.default, _aten.contiguous.default, _aten.alias.default), _Chain.add_copy),
    **dict.fromkeys(
        (
            *(*_VIEWS, _aten.flatten.using_ints, _aten.unsqueeze.default),
            *(_aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims),
        ),
        _Chain.add_reshape,
    ),
}
