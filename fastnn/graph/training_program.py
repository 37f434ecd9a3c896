"""A fused graph as the program of a network that a training step runs (csrc/network/train.h)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.fx import Node

from fastnn._torch import pytree
from fastnn.graph.alike import NotAlikeError, Parts, kind_of
from fastnn.graph.forward import Trace
from fastnn.graph.fused_layers import dim_of_log_softmax
from fastnn.graph.guard import Guard
from fastnn.graph.joining import drop_unused_parts
from fastnn.graph.order import Order
from fastnn.graph.reader import NotANetworkError, Reader, used_lines
from fastnn.network_program import Value, write


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

    def mapped(self, of: Callable[[Any], Any]) -> TrainingProgram:
        """The same for another model. `of` gives, for an object, the one in its place, or the object itself."""
        sources, counters = [[(of(own), name) for own, name in some] for some in (self.sources, self.counters)]
        return replace(self, sources=sources, counters=counters, guard=self.guard.mapped(of))

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
    reader = Reader(trace.modules, Order(graph, trace.modules), inputs)
    for node in placeholders[len(inputs) :]:  # `fastnn_tensor_3` is the fourth source
        reader.tensors[node] = sources[int(str(node.target).rpartition("_")[2])]
    (output,) = [node for node in graph.nodes if node.op == "output"]
    log_softmax: int | None = None
    if isinstance(output.args[0], Node):
        log_softmax = dim_of_log_softmax(output.args[0], trace.modules)
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or node in reader.done:
            continue
        if node is output.args[0] and log_softmax is not None and len(node.users) == 1:
            reader.note_log_softmax(node)
            reader.values[node] = reader.value(node.args[0])
            continue
        reader.read(node)
    results: list[Value] = []

    def number_of(leaf: Any) -> Any:
        if not isinstance(leaf, Node):
            raise NotANetworkError("the model returns something that is no tensor")
        value = reader.value(leaf)
        if value in reader.given or value.tensor is not None:
            raise NotANetworkError("the model returns its input or a parameter")
        if value not in results:
            results.append(value)
        return results.index(value)

    outputs = pytree.tree_map(number_of, output.args[0])
    if not results:
        raise NotANetworkError("the model returns no tensor")
    lines = used_lines(reader.lines, results)
    if not lines:
        raise NotANetworkError("there is no layer in the model")
    dtypes = ["int64" if value in reader.integers else "" for value in reader.given]
    text, tensors = write([(value, "") for value in reader.given], lines, results, dtypes)
    reader.guard.seal()
    first = {id(own[name]): place for place, (own, name) in reversed(list(enumerate(reader.sources)))}
    parameters = [first[id(tensor)] for tensor in tensors]
    return TrainingProgram(
        text, reader.sources, parameters, len(inputs), outputs, log_softmax, reader.guard, reader.counters, reader.draws
    )
