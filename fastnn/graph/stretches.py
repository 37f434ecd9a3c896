"""Stretches of a fused graph: nodes that are layers of a network, which run in one call.

Under autograd each stretch is one function, forward in one call and backward in another. In inference it is one call
of an operator, which folds batch norms into convolutions and chooses how values lie in memory.

Between stretches are the borders: nodes that are no layers of a network, which torch runs. A layer's level is the
number of borders on the longest path that leads to it. In inference a stretch has all layers of a level, so that no
path from one of them to another passes a border.

Under autograd a caller may ask for gradients at several times and places. What the model returns is a border for the
layers that take it, because a caller may ask for gradients with respect to it. A stretch then has only layers that are
connected by values with gradients, because a caller may go backward through each part in a call of its own: two critics
in one module are two stretches, and so are features and a probe of what they give, detached.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Graph, Node

from fastnn._torch import saved_tensors_are_hooked
from fastnn.graph import fused_layers  # noqa: F401 (registers its rows)
from fastnn.graph.guard import Guard
from fastnn.graph.joining import drop_unused_parts
from fastnn.graph.order import Order
from fastnn.graph.prologue import Prologue, changes_what_it_reads, set_forms
from fastnn.graph.reader import NotANetworkError, Reader, changed_statistics, draws, has_side_effects, used_lines
from fastnn.graph.rewriting import rewrite_unpacked
from fastnn.network_program import KINDS, VIEWS, Line, Value, write
from fastnn.network_program import read as read_text
from fastnn.ops._autograd import is_plain, wants_gradient
from fastnn.ops.network import InferenceNetwork
from fastnn.ops.network_training import TrainedNetwork

# What a node costs that a stretch does not pay, in calls of torch's functions, forward and backward. A function of
# autograd that is written in Python costs 30 us, one of torch's own about 6, a product three times as much, and the
# stretch itself about 60. A batch norm and a max-pool are torch's slowest functions, which go through contiguous images
# pixel by pixel.
_COST_IN_PYTHON, _LEAST_COST = 5, 11
_COSTS = {**dict.fromkeys(("batch_norm", "max_pool"), 4), **dict.fromkeys(("conv", "conv_transpose", "linear"), 3)}
_LEAST_CALLS = 2  # In inference, a stretch takes the place of at least so many calls.
_MOST_REFUSALS = 3  # After so many refusals of the operators, a stretch's layers run one by one at once.
_BEFORE = -1  # the level of what torch runs before all stretches
_ROOT = "fastnn_module"  # the name of the graph's input that is the module itself


@dataclass
class StretchedGraph:
    """The graph as Python: ``function(module, module, *inputs, *tensors)``, with the tensors of `sources`. The first
    module is the `self` of the code that torch.fx writes, the second is an input of the graph, which its calls get."""

    function: Callable[..., Any]
    sources: list[tuple[Any, Any]]
    guard: Guard
    networks: list[str]  # the programs

    def mapped(self, of: Callable[[Any], Any]) -> StretchedGraph:
        """The same for another model. `of` gives, for an object, the one in its place, or the object itself."""
        return replace(self, sources=[(of(own), name) for own, name in self.sources], guard=self.guard.mapped(of))

    def run(self, module: Any, inputs: Sequence[Tensor]) -> Any:
        return self.function(module, module, *inputs, *[own[name] for own, name in self.sources])


class NetworkCall:
    """Runs a stretch: as a network, or its layers one by one where the network's operator does not take the call.

    It is called with the module and the values that the stretch takes. `places` has the places among these values of
    the program's inputs and parameters, `counters` those of batch norms' counters. `same` has pairs of places whose
    tensors were one when the model was read: only then does a parameter stand for both. `forms` has the inputs that
    enter the network in a form (prologue.py).
    """

    __name__ = "network"  # torch.fx writes a call of it as that of a function of this name and module
    __module__ = "fastnn"

    def __init__(
        self,
        program: TrainedNetwork | InferenceNetwork,
        places: Sequence[int],
        same: Sequence[tuple[int, int]],
        counters: Sequence[int],
        forms: Sequence[tuple[int, str]],
        layers: Graph,
    ) -> None:
        self.program, self.places, self.same, self.counters = program, places, same, counters
        self.forms, self._draws = forms, any(draws(line) for line in read_text(program.text))
        self._layers = layers
        self._one_by_one: Callable[..., Any] | None = None
        # How often the operator refused what the layers took, by the inputs' numbers of dimensions.
        self._refused: dict[tuple[int, ...], int] = {}

    def __call__(self, module: Any, *values: Any) -> Any:
        tensors = [values[place] for place in self.places]
        refused: tuple[int, ...] | None = None
        if (not self.forms or self._set_forms(tensors)) and self._may_run_at_once(tensors, values):
            random = torch.get_rng_state() if self._draws else None
            try:
                outputs = self.program.run(tensors)
            except RuntimeError:  # the layers have words of their own for it
                refused = self._dims(tensors)
                if random is not None:
                    torch.set_rng_state(random)
            else:
                for place in self.counters:
                    values[place].add_(1)
                return outputs
        if self._one_by_one is None:
            self._one_by_one = compiled(self._layers, f"<layers of {type(module).__name__}>")
        outputs = self._one_by_one(module, values)
        if refused is not None:  # What the layers refuse, too, says nothing about the operator.
            self._refused[refused] = self._refused.get(refused, 0) + 1
        return outputs

    def _dims(self, tensors: Sequence[Tensor]) -> tuple[int, ...]:
        return tuple([one.dim() for one in tensors[: self.program.inputs]])

    def _set_forms(self, tensors: list[Any]) -> bool:
        """Replaces the inputs that enter the network in a form. Returns False where one of them has no such form."""
        in_form = {place for place, _ in self.forms}
        others = [one for place, one in enumerate(tensors) if place not in in_form and isinstance(one, Tensor)]
        try:
            set_forms(tensors, self.forms, next((one.dtype for one in others if one.is_floating_point()), None))
        except RuntimeError:
            return False
        return True

    def _may_run_at_once(self, tensors: Sequence[Any], values: Sequence[Any]) -> bool:
        program, number = self.program, tensors[-1]
        for place, one in enumerate(tensors[: program.inputs]):
            if type(one) is not Tensor or not one.is_cpu or not program.takes(place, one):
                return False
            if one.is_floating_point():
                number = one
        for first, second in self.same:
            if values[first] is not values[second]:
                return False
        if self._refused and self._refused.get(self._dims(tensors), 0) >= _MOST_REFUSALS:
            return False
        if not is_plain(number) or wants_gradient(*tensors) is not program.records:
            return False
        return not (program.records and saved_tensors_are_hooked())


def tensors_of(
    graph: Graph, sources: Sequence[tuple[Any, Any]], inputs: Sequence[Node], modules: dict[str, nn.Module]
) -> dict[Node, tuple[Any, Any]]:
    """Where the nodes of a graph that are tensors of the model are found. inputs: those that are inputs of the graph,
    of which `fastnn_tensor_3` is the fourth of the sources."""
    tensors = {node: sources[int(str(node.target).rpartition("_")[2])] for node in inputs}
    for node in graph.nodes:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            held = next((one for one in (modules[owner]._parameters, modules[owner]._buffers) if name in one), None)
            if held is not None:
                tensors[node] = held, name
    return tensors


def buffers_of(tensors: dict[Node, tuple[Any, Any]]) -> list[Node]:
    held = ((node, own.get(name)) for node, (own, name) in tensors.items() if isinstance(own, dict))
    return [node for node, one in held if isinstance(one, Tensor) and not isinstance(one, nn.Parameter)]


def compiled(graph: Graph, file: str) -> Callable[..., Any]:
    """A graph as a function of a module and the graph's inputs."""
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, file, "exec"), scope)
    function: Callable[..., Any] = scope["forward"]
    return function


@dataclass(eq=False)
class _Layer:
    """A node that adds lines."""

    node: Node
    lines: Sequence[Line]
    counters: Sequence[tuple[Any, Any]]
    has_effect: bool  # draws random numbers, or changes statistics
    has_gradients: bool  # takes parameters, or what is made with them
    cost: int = 0  # as a function of autograd: see _COST_IN_PYTHON
    calls: int = 0  # how many calls the node is in inference


@dataclass(eq=False)
class _Stretch:
    layers: list[_Layer]

    @property
    def nodes(self) -> list[Node]:
        return [layer.node for layer in self.layers]

    @property
    def lines(self) -> list[Line]:
        return [line for layer in self.layers for line in layer.lines]


def find_stretches(
    graph: Graph, sources: list[tuple[Any, Any]], names: Sequence[str], modules: dict[str, nn.Module], records: bool
) -> StretchedGraph | None:
    """Reads a fused graph, whose inputs are those of `names` and then the tensors of `sources`, for calls that autograd
    `records`, or else for inference. Returns None where no stretch is worth a call."""
    drop_unused_parts(graph, modules)
    returned = set(graph.output_node().all_input_nodes) if records else set()
    views: set[Node] = set()
    while True:
        reading = _Reading(graph, sources, len(names), modules, returned, views, records)
        if not reading.read():
            return None
        # Several nodes may be one value, such as an activation and nn.Identity of it.
        values = {reading.reader.values[node] for node in returned if node in reading.reader.values}
        alike = {node for node, value in reading.reader.values.items() if value in values}
        if not alike <= returned:
            returned |= alike
            continue
        sharing = reading.choose()
        if sharing <= views:
            return reading.stretched()
        views |= sharing


class _SideEffectError(Exception):
    """A layer draws random numbers, or changes statistics."""


_PARAMETERS = frozenset({"weight", "bias", "mean", "variance", "weights"})


class _Reading:
    """Finds the nodes of a graph that are layers of a network, and divides them into stretches. returned: nodes whose
    value the model returns. views: nodes that torch runs, because what they give shares memory with other results of a
    stretch, or with what it takes."""

    def __init__(
        self,
        graph: Graph,
        sources: list[tuple[Any, Any]],
        inputs: int,
        modules: dict[str, nn.Module],
        returned: set[Node],
        views: set[Node],
        records: bool,
    ) -> None:
        self.graph, self.sources, self.modules, self.records = graph, list(sources), modules, records
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        self.inputs = placeholders[:inputs]
        self.order = Order(graph, modules)
        tensors = tensors_of(graph, sources, placeholders[inputs:], modules)
        self.is_in_turn = changes_what_it_reads(graph, tensors, self.order, modules)
        self.prologue = Prologue(graph, self.inputs, buffers_of(tensors), self.order, modules)
        self.reader = Reader(modules, self.order, self.inputs, self.prologue, takes_computed=True)
        self.reader.tensors.update(tensors)
        self.output, self.returned, self.views = graph.output_node(), returned, views
        self.stretches: dict[int, list[_Stretch]] = {}  # by level, in the order in which they run
        self.borders: dict[int, list[Node]] = {}
        self.stretch_of: dict[Value, _Stretch] = {}  # of each value that a line gives
        # The inputs, what layers without parameters make of them, and what is detached. (Where an input does have a
        # gradient, such layers give it as a stretch of their own, or as functions of torch's.)
        self.without_gradients = {self.reader.values[node] for node in self.inputs}

    # ---- what each node is ------------------------------------------------------------------------------------------

    def read(self) -> bool:
        """Reads the nodes. Returns False where there is no stretch, or a border changes what others read."""
        reader = self.reader
        if self.is_in_turn:
            return False
        levels: dict[Node, int] = {}
        is_border: set[Node] = set()
        layers: dict[int, list[_Layer]] = {}
        first_free, last_drawn = 0, 0  # the first level behind all borders up to here, and the last that draws numbers
        last_written: dict[Value, int] = {}  # the last level that writes a batch norm's statistics
        for node in self.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            before = [levels.get(one, 0) + (one in is_border or self._is_returned(one)) for one in node.all_input_nodes]
            level = max(before, default=0)
            if node in reader.done:
                levels[node] = level
                continue
            count, counted = len(reader.lines), len(reader.counters)
            reader.draws = False
            try:
                self._read_layer(node, is_border)
                if not self.records:
                    reader.lines[count:] = self._of_inference(reader.lines[count:])
            except _SideEffectError:
                return False
            except NotANetworkError:
                del reader.lines[count:], reader.counters[counted:]
                if node in self.order.writes:
                    return False
                if node in self.prologue.before:
                    self.borders.setdefault(_BEFORE, []).append(node)
                    reader.give(node)
                    if node in reader.values:
                        self.without_gradients.add(reader.values[node])
                    continue
                level = max((levels.get(one, 0) + self._is_returned(one) for one in node.all_input_nodes), default=0)
                level = max(level, last_drawn)
                is_border.add(node)
                first_free = max(first_free, level + 1)
                if node.op != "get_attr":
                    self.borders.setdefault(level, []).append(node)
                reader.give(node)
            else:
                if reader.draws:
                    level = last_drawn = max(level, last_drawn, first_free)
                changed = [value for line in reader.lines[count:] for value in changed_statistics(line)]
                level = max([level, *(last_written.get(value, 0) for value in changed)])
                last_written.update(dict.fromkeys(changed, level))
                if lines := reader.lines[count:]:
                    layer = self._layer_of(node, lines, reader.counters[counted:], bool(reader.draws or changed))
                    layers.setdefault(level, []).append(layer)
            levels[node] = level
        for level, some in layers.items():
            self.stretches[level] = self._connected(some) if self.records else [_Stretch(some)]
            for stretch in self.stretches[level]:
                self.stretch_of.update((value, stretch) for line in stretch.lines for value in line.outputs)
        return any(self._is_worth_a_call(one) for stretches in self.stretches.values() for one in stretches)

    def _is_worth_a_call(self, stretch: _Stretch) -> bool:
        if self.records:
            return sum(layer.cost for layer in stretch.layers) >= _LEAST_COST
        return sum(layer.calls for layer in stretch.layers) >= _LEAST_CALLS

    def _of_inference(self, lines: Sequence[Line]) -> list[Line]:
        """The lines as a network has them in inference. Raises where it has no such layers, or would have to change
        something."""
        found = []
        for line in lines:
            if line.layer == "linear" and self._is_computed(line.inputs["weight"][0]):
                found += _as_product(line)
            else:
                found.append(line)
        self._check_inference(found)
        return found

    def _is_computed(self, value: Value) -> bool:
        return value.tensor is None and value not in self.reader.computed

    def _check_inference(self, lines: Sequence[Line]) -> None:
        for line in lines:
            if has_side_effects(line):
                raise _SideEffectError
            if not KINDS[line.layer].infers:
                raise NotANetworkError(f"{line.layer} is a layer of training alone")
            for name in _PARAMETERS & line.inputs.keys():
                if any(map(self._is_computed, line.inputs[name])):
                    raise NotANetworkError(f"a {line.layer} has a {name} that is computed")

    def _is_returned(self, node: Node) -> bool:
        return node in self.returned and node.op != "placeholder"

    def _read_layer(self, node: Node, is_border: set[Node]) -> None:
        if node in self.prologue.before:
            raise NotANetworkError("torch runs it before")
        if node in self.views or (node.target is operator.getitem and node.args[0] in is_border):
            raise NotANetworkError("it shares memory with others, or may be a part of a tuple")
        self.reader.read(node)

    def _layer_of(self, node: Node, lines: Sequence[Line], counters: Sequence[Any], has_effect: bool) -> _Layer:
        has_gradients = False
        for line in lines:
            taken = {self.reader.forms.get(value, (value, ""))[0] for value in line.taken()}
            tensors = (value.tensor for values in line.inputs.values() for value in values)
            of_parameters = any(isinstance(tensor, nn.Parameter) for tensor in tensors)
            of_parameters = of_parameters or not taken <= self.without_gradients
            has_gradients = has_gradients or of_parameters
            if line.layer == "detach" or not of_parameters:
                self.without_gradients.update(line.outputs)
        layer = _Layer(node, lines, counters, has_effect, has_gradients)
        costs = [_COSTS.get(line.layer, 1) for line in lines if line.layer not in VIEWS]
        if costs and node.op == "call_module" and next(self.modules[str(node.target)].children(), None) is not None:
            layer.cost, layer.calls = sum(costs), len(costs)  # a module of others, such as an attention
        elif costs:
            layer.cost, layer.calls = _COST_IN_PYTHON if self._is_in_python(node) else max(costs), 1
        return layer

    def _connected(self, layers: Sequence[_Layer]) -> list[_Stretch]:
        """Divides the layers of a level into those that are connected by values with gradients, in an order in which
        they can run: random numbers and statistics keep their order, too. Layers that have no such order otherwise are
        one stretch."""
        maker = {value: layer for layer in layers for line in layer.lines for value in line.outputs}
        forms, group_of = self.reader.forms, {layer: [layer] for layer in layers}

        def join(some: Iterable[_Layer]) -> None:
            largest, *others = sorted({id(group_of[layer]): group_of[layer] for layer in some}.values(), key=len)[::-1]
            for group in others:
                group_of.update(dict.fromkeys(group, largest))
                largest += group

        before: list[tuple[_Layer, _Layer]] = []  # by values without gradients
        for layer in layers:
            for value in {forms.get(value, (value, ""))[0] for line in layer.lines for value in line.taken()}:
                source = maker.get(value, layer)
                if source is not layer and value in self.without_gradients:
                    before.append((source, layer))
                else:
                    join((source, layer))
        # A layer without gradients goes with those that take what it gives, unless that would connect them.
        takers: dict[_Layer, list[_Layer]] = {}
        for layer, taker in before:
            takers.setdefault(layer, []).append(taker)
        for layer in reversed(layers):
            groups = {id(group_of[taker]): taker for taker in takers.get(layer, ())}
            if not layer.has_gradients and len(groups) == 1:
                join((layer, *groups.values()))
        before += pairwise(layer for layer in layers if layer.has_effect)
        while True:
            first_of = {layer: group_of[layer][0] for layer in layers}  # which stands for its group
            follows: dict[_Layer, set[_Layer]] = {first: set() for first in first_of.values()}
            for one, other in before:
                if first_of[one] is not first_of[other]:
                    follows[first_of[other]].add(first_of[one])
            try:
                order = list(TopologicalSorter(follows).static_order())
            except CycleError as error:
                join(error.args[1])
            else:
                return [_Stretch([layer for layer in layers if first_of[layer] is first]) for first in order]

    def _is_in_python(self, node: Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.modules[str(node.target)], (nn.RNNBase, nn.RNNCellBase))
        return str(getattr(node.target, "__module__", "")).startswith("fastnn.ops")

    # ---- and what becomes of it --------------------------------------------------------------------------------------

    def choose(self) -> set[Node]:
        """Chooses the stretches that are worth a call, and finds what others take of each -> the nodes whose results
        share memory, which a call cannot give."""
        self.node_of: dict[Value, Node] = {}  # the first node that is this value
        for node in self.graph.nodes:
            if node in self.reader.values:
                self.node_of.setdefault(self.reader.values[node], node)
        self.parts: dict[Value, tuple[Node, Sequence[int]]] = {}
        for node, parts in self.reader.parts.items():
            for value, path in _paths(parts):
                self.parts.setdefault(value, (node, path))
        all_stretches = [one for some in self.stretches.values() for one in some]
        self.chosen = dict.fromkeys(one for one in all_stretches if self._is_worth_a_call(one))
        while True:
            self.needed = self._needed()
            unused = [one for one in self.chosen if not self.needed[one]]
            if not unused:
                break
            for one in unused:
                del self.chosen[one]
        sharing = [value for one in self.chosen for value in self._sharing(one)]
        return {self.node_of[value] if value in self.node_of else self.parts[value][0] for value in sharing}

    def stretched(self) -> StretchedGraph | None:
        """Writes the graph anew, with a call for each stretch."""
        self.guard = self.reader.guard
        if not self.chosen:
            return None
        self.new = Graph()
        self.root = self.new.placeholder(_ROOT)
        self.copies: dict[Node, Any] = {}  # of nodes, in the new graph
        self.values: dict[Value, Any] = {}  # nodes of the new graph
        self.places: dict[tuple[int, Any], Node] = {}  # the inputs of the new graph that are tensors
        self.new_sources: list[tuple[Any, Any]] = []
        for node in self.inputs:
            self.values[self.reader.values[node]] = self.new.placeholder(str(node.target))
        self._place_tensors()
        networks = []
        for level in sorted({*self.stretches, *self.borders}):
            for stretch in self.stretches.get(level, ()):
                if stretch in self.chosen:
                    networks.append(self._write_call(stretch, self.needed[stretch]))
                    continue
                for node in stretch.nodes:
                    self._copy(node)
            for node in self.borders.get(level, ()):
                self._copy(node)
        self.new.output(fx.node.map_arg(self.output.args[0], self._copy))
        self.guard.seal()
        return StretchedGraph(compiled(self.new, "<stretches>"), self.new_sources, self.guard, networks)

    def _needed(self) -> dict[_Stretch, list[Value]]:
        """For each chosen stretch, the values that others take."""
        needed: dict[_Stretch, list[Value]] = {stretch: [] for stretch in self.chosen}
        seen: set[Node] = set()

        def take_value(value: Value, taker: _Stretch | None) -> None:
            value, _ = self.reader.forms.get(value, (value, ""))
            own = self.stretch_of.get(value)
            if own is not None and own is not taker and own in self.chosen:
                if value not in needed[own]:
                    needed[own].append(value)
            elif own is not taker or own is None:
                if value in self.node_of:
                    take_args(self.node_of[value])
                elif value in self.parts:
                    take_args(self.parts[value][0])

        def take(node: Node) -> None:
            value = self.reader.values.get(node)
            if value is not None and self.stretch_of.get(value) in self.chosen:
                take_value(value, None)
            elif node in self.reader.parts:
                for part, _ in _paths(self.reader.parts[node]):
                    if self.stretch_of.get(part) in self.chosen:
                        take_value(part, None)
                    else:
                        take_args(node)
            else:
                take_args(node)

        def take_args(node: Node) -> None:
            if node not in seen:
                seen.add(node)
                for one in node.all_input_nodes:
                    take(one)

        for some in self.borders.values():
            for node in some:
                take_args(node)
        for stretch in (one for some in self.stretches.values() for one in some):
            if stretch not in self.chosen:
                for node in stretch.nodes:
                    take_args(node)
                continue
            for line in stretch.lines:
                for value in line.taken():
                    take_value(value, stretch)
        take_args(self.output)
        return needed

    def _sharing(self, stretch: _Stretch) -> list[Value]:
        """The results of a stretch that a call cannot give: they share memory with what it takes or with its other
        results, or are booleans; and results that are nothing but another order or a repetition of a value, which torch
        gives at no cost and with its own strides."""
        lines = stretch.lines
        maker = {value: line for line in lines for value in line.outputs}
        taken = {value for line in lines for value in line.taken()}
        sharing: set[Value] = set()
        at_root: dict[Value, list[tuple[Value, Value | None]]] = {}  # the results that lie in the memory of a value
        for result in self.needed[stretch]:
            root, part = result, None  # part: of a split, the last on the way from the root
            while root in maker and maker[root].layer in VIEWS:
                part = root if maker[root].layer == "split" and part is None else part
                root = maker[root].inputs["input"][0]
            if root not in maker or (maker[result].layer in ("transpose", "permute", "expand") and result not in taken):
                sharing.add(result)
            else:
                at_root.setdefault(root, []).append((result, part))
        for root, results in at_root.items():
            # The parts of one split lie side by side. Other results may overlap.
            splits = {maker[part] if part else None for _, part in results}
            apart = len({part for _, part in results}) == len(results) and None not in splits and len(splits) == 1
            if len(results) > 1 and not apart:
                sharing.update(result for result, _ in results if result is not root)
        return [value for value in self.needed[stretch] if value in sharing or value in self.reader.booleans]

    def _place_tensors(self) -> None:
        """Makes inputs of all tensors that the new graph may read."""
        for own, name in [*self.sources, *self.reader.sources, *self.reader.counters]:
            key = id(own), name
            if key not in self.places:
                self.places[key] = self.new.placeholder(f"fastnn_tensor_{len(self.new_sources)}")
                self.new_sources.append((own, name))
        for node, (own, name) in self.reader.tensors.items():
            if node.op == "placeholder":
                self.copies[node] = self.places[id(own), name]

    def _copy(self, node: Node) -> Any:
        """What a node of the old graph is in the new one: that node, or a nested tuple of nodes."""
        if node in self.copies:
            return self.copies[node]
        value = self.reader.values.get(node)
        if value is not None and value in self.values:
            return self.values[value]
        parts = self.reader.parts.get(node)
        if parts is not None and all(value in self.values for value, _ in _paths(parts)):
            copy: Any = _map_parts(parts, self.values.__getitem__)
        else:
            copy = self.new.node_copy(node, self._copy)
            if value is not None:
                self.values.setdefault(value, copy)
        self.copies[node] = copy
        return copy

    def node_in_new(self, value: Value) -> Any:
        """The new graph's node that is a value: made by a call, or by the node of the old graph that was copied, or a
        part of what that node gives, or a parameter that is computed."""
        if value not in self.values:
            if value in self.reader.computed:
                self.values[value] = self.new.get_attr(self.reader.computed[value])
            elif value in self.node_of:
                return self._copy(self.node_of[value])
            else:
                whole, path = self.parts[value]
                self.values[value] = _part_of(self.new, self._copy(whole), path)
        return self.values[value]

    def _write_call(self, stretch: _Stretch, results: Sequence[Value]) -> str:
        """Writes the call of a stretch -> its program."""
        reader = self.reader
        lines = used_lines(stretch.lines, results)
        made = {value for line in lines for value in line.outputs}
        given = list(dict.fromkeys(value for line in lines for value in line.taken() if value not in made))
        dtypes = ["int64" if value in reader.integers else "" for value in given]
        program: TrainedNetwork | InferenceNetwork
        tensors: Sequence[Tensor | Value]
        if self.records:
            text, tensors = write([(value, "") for value in given], lines, results, dtypes)
            program = TrainedNetwork(text)
        else:
            program, tensors = _inference_network(given, reader.computed, lines, results, dtypes)
            given = [value for value in given if value not in tensors]
        arguments = _Arguments(self)
        in_form = [reader.forms.get(value, (value, "")) for value in given]
        places = [arguments.place_of(value) for value, _ in in_form]
        forms = [(place, form) for place, (_, form) in enumerate(in_form) if form]
        first = {id(own[name]): (own, name) for own, name in reversed(reader.sources)}
        of_tensors = [
            arguments.place_of(one) if isinstance(one, Value) else arguments.place_of_tensor(*first[id(one)])
            for one in tensors
        ]
        same = []
        for place, tensor in zip(of_tensors, tensors, strict=True):
            others = [arguments.place_of_tensor(own, name) for own, name in reader.sources if own[name] is tensor]
            same += [(place, other) for other in others if other != place]
        counters = [arguments.place_of_tensor(own, name) for layer in stretch.layers for own, name in layer.counters]
        layers = self._layers_of(stretch, results, arguments)
        call = NetworkCall(program, [*places, *of_tensors], same, counters, forms, layers)
        node = self.new.call_function(call, (self.root, *arguments.nodes))
        for number, value in enumerate(results):
            self.values[value] = self.new.call_function(operator.getitem, (node, number))
        return program.text

    def _layers_of(self, stretch: _Stretch, results: Sequence[Value], arguments: _Arguments) -> Graph:
        """The layers of a stretch one by one: a graph that takes the tuple of the arguments and gives a tuple."""
        graph, reader = Graph(), self.reader
        taken = graph.placeholder("fastnn_values")
        copies: dict[Node, Any] = {}
        arguments_taken: dict[int, Node] = {}

        def argument(place: int) -> Node:
            if place not in arguments_taken:
                arguments_taken[place] = graph.call_function(operator.getitem, (taken, place))
            return arguments_taken[place]

        def copy(node: Node) -> Any:
            if node not in copies:
                copies[node] = make(node)
            return copies[node]

        def make(node: Node) -> Any:
            if node.op == "placeholder" and node in reader.tensors:
                return argument(arguments.place_of_tensor(*reader.tensors[node]))
            value, parts = reader.values.get(node), reader.parts.get(node)
            if value is not None and self.stretch_of.get(value) is not stretch:
                return argument(arguments.place_of(value))
            if parts is not None and any(self.stretch_of.get(part) is not stretch for part, _ in _paths(parts)):
                return _map_parts(parts, lambda part: argument(arguments.place_of(part)))
            return graph.node_copy(node, copy)

        for node in stretch.nodes:
            copy(node)
        outputs = []
        for value in results:
            if value in self.node_of:
                outputs.append(copy(self.node_of[value]))
                continue
            whole, path = self.parts[value]
            outputs.append(_part_of(graph, copy(whole), path))
        graph.output(tuple(outputs))
        return graph


def _as_product(line: Line) -> list[Line]:
    """A linear layer whose weight the network computes, such as a part of an attention's weight, as a product."""
    product = {"input": line.inputs["input"], "other": line.inputs["weight"]}
    lines = [Line("matmul", product, [Value(())], {"turns_other": True})]
    if line.inputs.get("bias"):
        operands = {"input": lines[-1].outputs, "other": line.inputs["bias"]}
        lines.append(Line("binary", operands, [Value(())], {"function": "add"}))
    if (activation := line.attributes.get("activation", "identity")) != "identity":
        lines.append(Line("activation", {"input": lines[-1].outputs}, [Value(())], {"activation": activation}))
    lines[-1].outputs = line.outputs
    return lines


def _inference_network(
    given: Sequence[Value],
    computed: Container[Value],
    lines: Sequence[Line],
    results: Sequence[Value],
    dtypes: Sequence[str],
) -> tuple[InferenceNetwork, list[Tensor | Value]]:
    """The network of these lines in inference, and its parameters: tensors, and values that are computed before."""
    parameters: list[Tensor | Value] = []
    texts = []
    inputs = [(value, f"{{{place}}}") for place, value in enumerate(given) if value not in computed]
    sizes = {value: f"{{{place}}}" for place, value in enumerate(given) if value in computed}
    of_inputs = [dtype for value, dtype in zip(given, dtypes, strict=True) if value not in computed]
    for addends in (True, False):
        text, some = write(inputs, rewrite_unpacked(lines, results, addends), results, of_inputs, sizes)
        parameters = parameters or some
        place_of = {id(one): place for place, one in enumerate(parameters)}
        texts.append((text, [place_of[id(one)] for one in some]))
    asked = [value not in computed for value in given]
    places = [place for place, one in enumerate(parameters) if isinstance(one, Value)]
    return InferenceNetwork(asked, places, texts if texts[0][0] != texts[1][0] else texts[:1]), parameters


class _Arguments:
    """The arguments of a stretch's call: nodes of the new graph."""

    def __init__(self, reading: _Reading) -> None:
        self.nodes: list[Node] = []
        self._reading = reading
        self._places: dict[Any, int] = {}

    def _place(self, key: Any, node: Callable[[], Node]) -> int:
        if key not in self._places:
            self.nodes.append(node())
            self._places[key] = len(self.nodes) - 1
        return self._places[key]

    def place_of(self, value: Value) -> int:
        return self._place(value, lambda: self._reading.node_in_new(value))

    def place_of_tensor(self, own: Any, name: Any) -> int:
        key = id(own), name
        return self._place(key, lambda: self._reading.places[key])


def _paths(parts: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[Value, tuple[int, ...]]]:
    """The values in nested lists and dicts (Reader.parts), each with the indices that lead to it."""
    for index, part in parts.items() if isinstance(parts, dict) else enumerate(parts):
        if isinstance(part, list):
            yield from _paths(part, (*path, index))
        else:
            yield part, (*path, index)


def _part_of(graph: Graph, whole: Any, path: Sequence[int]) -> Any:
    """A part of what a node gives, which is a nested tuple or a dict of nodes, or one node that gives such a thing."""
    for index in path:
        whole = (
            whole[index] if isinstance(whole, (tuple, dict)) else graph.call_function(operator.getitem, (whole, index))
        )
    return whole


def _map_parts(parts: Any, of: Callable[[Value], Any]) -> Any:
    if isinstance(parts, dict):
        return {index: of(part) for index, part in parts.items()}
    return tuple(_map_parts(part, of) if isinstance(part, list) else of(part) for part in parts)
