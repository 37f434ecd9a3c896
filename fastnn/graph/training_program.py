"""A fused graph as the program of a network that a training step runs (csrc/network/train.h)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from fastnn._torch import pytree
from fastnn.graph.alike import NotAlikeError, Parts, kind_of
from fastnn.graph.elementwise_layers import dim_of_log_softmax
from fastnn.graph.forward import Trace
from fastnn.graph.guard import Guard
from fastnn.graph.joining import drop_unused_parts
from fastnn.graph.order import Order
from fastnn.graph.prologue import Prologue, changes_what_it_reads, set_forms
from fastnn.graph.reader import NotANetworkError, Reader, used_lines
from fastnn.graph.stretches import buffers_of, compiled, tensors_of
from fastnn.network_program import Line, Value, write


@dataclass
class TrainingProgram:
    """A program's text, and where the model holds the tensors that the program reads."""

    text: str
    # Where each tensor that the program reads is found. The model may hold one tensor at several places.
    sources: list[tuple[Any, Any]]
    parameters: list[int]  # of each of the program's weights, the source that is its first
    inputs: int
    outputs: Any  # what the forward returns, with numbers of the program's outputs in the place of tensors
    log_softmax: int | None  # the dimension of a log_softmax behind the only output
    guard: Guard  # of layers that the graph calls and the program does not: their attributes that became numbers
    counters: list[tuple[Any, str]]  # where each batch norm's number of batches is found
    draws: bool  # a step takes numbers from torch's generator
    prologue: PrologueCall | None  # what torch computes before; None where the program takes the inputs as they are

    def mapped(self, of: Callable[[Any], Any]) -> TrainingProgram:
        """The same for another model. `of` gives, for an object, the one in its place, or the object itself."""
        sources, counters = [[(of(own), name) for own, name in some] for some in (self.sources, self.counters)]
        prologue = None if self.prologue is None else self.prologue.mapped(of)
        return replace(self, sources=sources, counters=counters, guard=self.guard.mapped(of), prologue=prologue)

    def describe(self) -> Iterator[str]:
        """The names of the layers, in their order."""
        for line in self.text.split("\n")[1:]:
            name = line.split(" ")[0]
            if name not in ("input", "weight", "output"):
                yield name

    @property
    def gives_one(self) -> bool:
        """Whether the forward returns one tensor."""
        return isinstance(self.outputs, int)


def training_program_of(model: nn.Module, trace: Trace) -> TrainingProgram:
    """The network that a model's trace is. A model that is like an earlier one gets the earlier one's network.
    NotANetworkError where the trace is none."""
    kind, parts = trace.kind, Parts(model)
    if (
        kind is None or kind_of(parts) is not kind
    ):  # the model has changed since it was traced: the sizes of tensors may
        return _read_training_program(trace)
    if kind.network is not None:
        network: TrainingProgram = kind.network.mapped(parts.object_at)
        if network.guard.begins():
            return network
    network = _read_training_program(trace)
    with suppress(NotAlikeError):
        kind.network = network.mapped(parts.place_of)
    return network


def _read_training_program(trace: Trace) -> TrainingProgram:
    graph, sources = trace.write()
    drop_unused_parts(graph, trace.modules)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = placeholders[: len(trace.names)]
    order = Order(graph, trace.modules)
    tensors = tensors_of(graph, sources, placeholders[len(inputs) :], trace.modules)
    if changes_what_it_reads(graph, tensors, order, trace.modules):
        raise NotANetworkError("the model reads a buffer that one of its layers changes")
    prologue = Prologue(graph, inputs, buffers_of(tensors), order, trace.modules)
    reader = _read_nodes(graph, trace, inputs, tensors, order, prologue)
    output = graph.output_node()
    results: list[Value] = []

    def number_of(leaf: Any) -> Any:
        if not isinstance(leaf, Node):
            raise NotANetworkError("the model returns something that is no tensor")
        value = reader.value(leaf)
        if value in reader.given or value in reader.forms or value.tensor is not None:
            raise NotANetworkError("the model returns its input or a parameter")
        if value in reader.booleans:
            raise NotANetworkError("the model returns booleans")
        if value not in results:
            results.append(value)
        return results.index(value)

    outputs = pytree.tree_map(number_of, output.args[0])
    if not results:
        raise NotANetworkError("the model returns no tensor")
    lines = used_lines(reader.lines, results)
    if not lines:
        raise NotANetworkError("there is no layer in the model")
    given, before = _given(reader, inputs, lines)
    dtypes = ["int64" if value in reader.integers else "" for value in given]
    text, weights = write([(value, "") for value in given], lines, results, dtypes)
    reader.guard.seal()
    place_of = {id(own[name]): place for place, (own, name) in reversed(list(enumerate(reader.sources)))}
    parameters = [place_of[id(tensor)] for tensor in weights]
    log_softmax = _dim_of_log_softmax(output.args[0], trace)
    return TrainingProgram(
        text, reader.sources, parameters, len(inputs), outputs, log_softmax, reader.guard, reader.counters,
        reader.draws, None if before is None else _prologue_call(before, inputs, tensors),
    )  # fmt: skip


def _dim_of_log_softmax(output: Any, trace: Trace) -> int | None:
    return dim_of_log_softmax(output, trace.modules) if isinstance(output, Node) else None


def _read_nodes(
    graph: Graph, trace: Trace, inputs: Sequence[Node], tensors: dict[Node, tuple[Any, Any]], order: Order,
    prologue: Prologue,
) -> Reader:  # fmt: skip
    """Reads all nodes. Those that are no layers, and that torch can run before, become part of the prologue."""
    output: Any = graph.output_node().args[0]
    log_softmax = _dim_of_log_softmax(output, trace)
    while True:
        reader = Reader(trace.modules, order, inputs, prologue)
        reader.tensors.update(tensors)
        try:
            for node in graph.nodes:
                if node.op in ("placeholder", "output") or node in reader.done:
                    continue
                if node in prologue.before:
                    reader.give(node)
                elif node is output and log_softmax is not None and len(node.users) == 1:
                    reader.note_log_softmax(node)
                    reader.values[node] = reader.value(node.args[0])
                else:
                    reader.read(node)
        except NotANetworkError:
            if not prologue.add(node):
                raise
        else:
            return reader


def _given(
    reader: Reader, inputs: Sequence[Node], lines: Sequence[Line]
) -> tuple[list[Value], list[tuple[Node, str]] | None]:
    """What a program is given: the inputs of the model, in their order, or else what the prologue gives: nodes, each
    with a form."""
    own = [reader.values[node] for node in inputs]
    made = {value for line in lines for value in line.outputs}
    taken = list(dict.fromkeys(value for line in lines for value in line.taken() if value not in made))
    if not taken or set(taken) == set(own):
        return own, None
    node_of = {value: node for node, value in reversed(reader.values.items())}
    forms = [reader.forms.get(value, (value, "")) for value in taken]
    return taken, [(node_of[base], form) for base, form in forms]


@dataclass
class PrologueCall:
    """The part of a model that torch runs before the network: ``function(None, *inputs, *buffers)`` gives what the
    network takes, some of it in `forms`."""

    function: Callable[..., Any]
    sources: list[tuple[Any, Any]]  # of the buffers
    forms: list[tuple[int, str]]

    def run(self, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """dtype: the network's."""
        buffers = [own[name] for own, name in self.sources]
        if any(one.requires_grad for one in buffers):
            raise RuntimeError("a buffer requires a gradient")
        with torch.no_grad():
            given = list(self.function(None, *inputs, *buffers))
            set_forms(given, self.forms, dtype)
        return given

    def mapped(self, of: Callable[[Any], Any]) -> PrologueCall:
        return replace(self, sources=[(of(own), name) for own, name in self.sources])


def _prologue_call(
    given: Sequence[tuple[Node, str]], inputs: Sequence[Node], tensors: dict[Node, tuple[Any, Any]]
) -> PrologueCall:
    reached: set[Node] = set()
    nodes = [node for node, _ in given]
    while nodes:
        node = nodes.pop()
        if node not in reached:
            reached.add(node)
            nodes += node.all_input_nodes
    buffers = [node for node in tensors if node in reached]
    graph = Graph()
    copies = {node: graph.placeholder(f"fastnn_input_{place}") for place, node in enumerate([*inputs, *buffers])}

    def copy(node: Node) -> Node:
        if node not in copies:
            copies[node] = graph.node_copy(node, copy)
        return copies[node]

    graph.output(tuple([copy(node) for node, _ in given]))
    forms = [(place, form) for place, (_, form) in enumerate(given) if form]
    return PrologueCall(compiled(graph, "<before the network>"), [tensors[node] for node in buffers], forms)
