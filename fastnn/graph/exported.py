"""Reads an exported model as networks (``network_program.py``) and the operators between them.

Operators that are layers become networks, each as large as possible. The other operators are borders, which torch runs.
A model that is one network becomes a :class:`fastnn.FrozenModel`, others become a :class:`fastnn.FrozenGraph`.
"""

import builtins
import contextlib
import inspect
import io
import linecache
import math
import operator
import os
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fastnn._torch import OpOverload, guard_of_sizes, pytree, remember_builtins
from fastnn.graph.aten_layers import ANCHORS, RANGES, NotALayerError, Reader
from fastnn.graph.rewriting import rewrite
from fastnn.network_program import Line, Value, write

_aten = torch.ops.aten
VIEWS = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)
_COPIES = (_aten.clone.default, _aten.contiguous.default, _aten.alias.default)
_NO_LIMITS = (0, 0)  # a size without limits


@dataclass
class Segment:
    """Operators of the graph that are one network. `inputs` and `outputs` are nodes; `ranges` has the least and the
    most that each input's sizes may be, 0 for no limit."""

    inputs: list[Node]
    outputs: list[Node]
    program: str
    weights: list[Tensor]


@dataclass
class Exported:
    """A model as a graph of operators without side effects, in inference."""

    graph: Graph
    inputs: list[Node]
    outputs: list[Any]  # nodes and constants, in the order of `out_spec`
    out_spec: Any
    constants: dict[str, Tensor]  # by the names of nodes: parameters, buffers, and what follows from them alone
    units: list[Segment | Node]  # in an order in which they can run
    refusals: list[ValueError]  # why operators are in no network, in the graph's order
    ranges: list[list[int]]  # of each input: of each size the least and the most, 0 for no limit
    draws: list[str]  # operators that draw random numbers

    @property
    def segments(self) -> list[Segment]:
        return [unit for unit in self.units if isinstance(unit, Segment)]

    @property
    def is_one_network(self) -> bool:
        """Whether the one segment is all that there is between the inputs and the outputs."""
        return (
            len(self.segments) == 1
            and set(self.segments[0].inputs) <= set(self.inputs)
            and all(isinstance(one, Node) and one in self.segments[0].outputs for one in self.outputs)
        )


class DependsOnBatchError(ValueError):
    """What the model does depends on the batch's size."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(f"freeze: what {type(model).__name__} does depends on the batch's size")


def read(
    model: nn.Module, inputs: tuple[Any, ...], batch_dims: Sequence[int | None], fixed: Collection[tuple[int, int]] = ()
) -> Exported:
    """Reads ``model`` for inputs of any batch size. `inputs` may be nested; their batch size is two or more.
    `batch_dims` has the batch's dimension for each tensor in them, None for one without a batch. fixed: the tensors and
    dimensions whose size stays that of the example."""
    leaves = pytree.tree_leaves(inputs)
    # (A size of 1 is always taken for a constant.)
    free = [
        [dim for dim, size in enumerate(leaf.shape) if size > 1 and (place, dim) not in fixed]
        for place, leaf in enumerate(leaves)
    ]
    try:
        first = _read(model, inputs, batch_dims, free)
        if first.is_one_network:
            return first
    except ValueError:
        first = None
    # For example, ``view(-1, 320)`` flattens images of one size only.
    try:
        other = _read(model, inputs, batch_dims, [[] if dim is None else [dim] for dim in batch_dims])
    except ValueError:
        if first is None:
            raise
        return first
    return other if first is None or other.is_one_network else first


def _read(
    model: nn.Module, inputs: tuple[Any, ...], batch_dims: Sequence[int | None], free: Sequence[Sequence[int]]
) -> Exported:
    """Reads the model for the example's sizes in all dimensions that are not ``free``."""
    exported = _export(model, inputs, free)
    graph, constants = exported.graph, _constants(exported)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            if node.target is _aten._assert_tensor_metadata.default:
                pass  # The export's own check that a conversion's input is as it was.
            elif node.is_impure() and "sym_constrain" not in str(node.target):
                raise _refusal(node, "refuses values or sizes, which a frozen model cannot")
            graph.erase_node(node)
    by_name = {node.name: node for node in graph.nodes}
    placeholders = [by_name[name] for name in exported.graph_signature.user_inputs]
    ranges = _ranges(exported)
    with_dims = zip(placeholders, batch_dims, strict=True)
    batches = [_sizes(input)[dim] for input, dim in with_dims if dim is not None]
    leaves = pytree.tree_leaves(inputs)
    if any(ranges.get(str(batch)) != _NO_LIMITS for batch in batches):
        raise DependsOnBatchError(model)
    _check_large_batches(model, exported, leaves, batch_dims)
    _drop_copies(graph)
    _fold_constants(graph, constants)
    (outputs,) = graph.output_node().args
    draws = [str(node.target) for node in graph.nodes if _draws(node)]
    sizes = [
        [bound for size, known in zip(_sizes(node), leaf.shape, strict=True) for bound in _bounds(size, ranges, known)]
        for node, leaf in zip(placeholders, leaves, strict=True)
    ]
    units, refusals = _split(graph, constants, dict(zip(placeholders, sizes, strict=True)), ranges)
    return Exported(
        graph, placeholders, list(outputs), exported.call_spec.out_spec, constants, units, refusals, sizes, draws
    )


def _bounds(size: Any, ranges: dict[str, tuple[int, int]], known: int) -> tuple[int, int]:
    """The least and the most that a size may be, 0 for no limit. The size is a number, a symbol of the export, or
    computed from such. A symbol without a range in the export has the example's size, `known`."""
    return (size, size) if isinstance(size, int) else ranges.get(str(size), (known, known))


def _check_large_batches(
    model: nn.Module, exported: ExportedProgram, leaves: Sequence[Tensor], batch_dims: Sequence[int | None]
) -> None:
    """Refuses a model that does something else for batches that are larger than all other sizes. (The limits that a
    comparison with a number sets are known already.) The inputs for this take no memory, however large they are.

    Two sizes in a row are tried, and the model is refused where both fail. Where only one fails, the export has merely
    noted that a size is no multiple of some number. How torch views a tensor may depend on that, but no result does."""
    guard = guard_of_sizes(exported)
    if guard is None:
        return
    with_dims = list(zip(leaves, batch_dims, strict=True))
    batch = math.gcd(*(leaf.shape[dim] for leaf, dim in with_dims if dim is not None))
    larger = max(size for leaf in leaves for size in leaf.shape) + 1
    refusals = []
    for other in (larger, larger + 1):
        given = []
        for leaf, dim in with_dims:
            sizes = list(leaf.shape)
            if dim is not None:
                sizes[dim] = sizes[dim] // batch * other  # an input may have several rows for each of the batch
                leaf = leaf.narrow(dim, 0, 1)
            given.append(leaf.expand(sizes))
        try:
            guard(*given)
        except AssertionError as error:
            refusals.append(error)
    if len(refusals) == 2:
        raise DependsOnBatchError(model) from refusals[0]


def _split(
    graph: Graph, constants: dict[str, Tensor], limits: dict[Node, list[int]], ranges: dict[str, tuple[int, int]]
) -> tuple[list[Segment | Node], list[ValueError]]:
    """Divides the graph's operators into networks and single nodes, in an order in which they can run.

    A border is an operator that is no layer. Count for each layer the most borders on a path that leads to it: layers
    with the same count become one network, because no path from one of them to another passes a border.
    """
    outside: set[Node] = set()
    while True:
        try:
            return _split_with(graph, constants, limits, ranges, outside)
        except _NeededOutsideError as needed:
            outside.update(needed.nodes)


class _NeededOutsideError(Exception):
    """Torch must run these nodes, although a network has read them. Either they are booleans, which the network has
    read as 1 and 0, and torch or another network takes them. Or they are computed from sizes alone, as a mask of later
    steps is, and torch takes them: torch then runs all of this before the networks, and it is no border between
    layers."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes


def _split_with(
    graph: Graph,
    constants: dict[str, Tensor],
    limits: dict[Node, list[int]],
    ranges: dict[str, tuple[int, int]],
    outside: Collection[Node],
) -> tuple[list[Segment | Node], list[ValueError]]:
    refusals: list[ValueError] = []
    reader = Reader(graph, constants, outside)
    levels: dict[Node, int] = {}  # how many borders there are before a node
    of_value: dict[Value, int] = {}
    lines: dict[int, list[Line]] = {}
    taken: dict[int, list[Node]] = {}
    units: list[Segment | Node] = []
    first: set[Node] = set()  # borders that no layer comes before: they run before all networks
    from_sizes: set[Node] = set()  # tensors that are computed from sizes, and from no other tensor
    for node in graph.nodes:
        if node.op != "call_function" or node.name in constants:
            continue
        if node.users and all(user.name in constants for user in node.users):  # it is the parts of a constant
            continue
        depends_on = [one for one in node.all_input_nodes if one.name not in constants]
        before = max((levels.get(one, 0) for one in depends_on), default=0)
        is_tensor = isinstance(node.meta.get("val"), Tensor)
        given = [one for one in node.all_input_nodes if isinstance(one.meta.get("val"), (Tensor, list, tuple))]
        if is_tensor and all(one in from_sizes for one in given):
            from_sizes.add(node)
        try:
            if not depends_on and node.target not in RANGES:
                raise NotALayerError("does not depend on the input")
            found = reader.read(node)
        except NotALayerError as reason:
            known = [one for one in depends_on if one in reader.values]
            by_network = [one for one in known if one in from_sizes and one not in units]
            if needed := by_network + [one for one in known if reader.values[one] in reader.booleans]:
                raise _NeededOutsideError(needed) from reason
            if is_tensor:
                refusals.append(_refusal(node, str(reason)))
            if all(one.op == "placeholder" or one in first for one in depends_on):
                first.add(node)
            # A size is no tensor; it is known as soon as its tensor is.
            levels[node] = before + (is_tensor and node not in first)
            units.append(node)
            continue
        finally:
            for one in depends_on:  # what torch has computed becomes a value when a layer first uses it
                if one in reader.values:
                    of_value.setdefault(reader.values[one], levels.get(one, 0))
        values = [value for line in found for value in line.taken()]
        if node in reader.values:
            values.append(reader.values[node])
        level = max((of_value.get(value, 0) for value in values), default=before)
        for line in found:
            of_value.update(dict.fromkeys(line.outputs, level))
        levels[node] = level
        lines.setdefault(level, []).extend(found)
        taken.setdefault(level, []).append(node)
    elsewhere = {  # values that a network takes only for their sizes, or that no node of it takes
        value
        for level, some in lines.items()
        for line in some
        for value in line.taken()
        if of_value.get(value, level) != level
    }
    for level, nodes in taken.items():
        if any(line.layer in ANCHORS for line in lines[level]):
            units.append(_segment(lines[level], set(nodes), reader, elsewhere, limits, ranges))
        else:
            units += nodes
    return _in_order(units), refusals


def _in_order(units: Sequence[Segment | Node]) -> list[Segment | Node]:
    """Sorts the units, so that each comes behind those whose results it takes."""
    maker = {node: unit for unit in units for node in (unit.outputs if isinstance(unit, Segment) else [unit])}
    ordered: dict[int, Segment | Node] = {}  # by identity
    waiting = [(unit, False) for unit in reversed(units)]
    while waiting:
        unit, is_ready = waiting.pop()
        if id(unit) in ordered:
            continue
        if is_ready:
            ordered[id(unit)] = unit
            continue
        waiting.append((unit, True))
        taken = unit.inputs if isinstance(unit, Segment) else unit.all_input_nodes
        waiting += [(maker[node], False) for node in taken if node in maker]
    return list(ordered.values())


def _segment(
    lines: list[Line],
    nodes: set[Node],
    reader: Reader,
    elsewhere: Collection[Value],
    limits: dict[Node, list[int]],
    ranges: dict[str, tuple[int, int]],
) -> Segment:
    """Makes a network of these lines. elsewhere: values that other networks take."""
    outputs = [
        node
        for node in reader.nodes
        if node in nodes
        and node in reader.values
        and (reader.values[node] in elsewhere or any(user not in nodes for user in node.users))
    ]
    if booleans := [node for node in outputs if reader.values[node] in reader.booleans]:
        raise _NeededOutsideError(booleans)
    results = [reader.values[node] for node in outputs]
    rewritten = rewrite(lines, results)
    made = {value for line in rewritten for value in line.outputs}
    needed = {value for line in rewritten for value in line.taken()} - made
    inputs = [node for node in reader.nodes if reader.values.get(node) in needed]
    sizes = []
    for node in inputs:
        known = limits.setdefault(node, [bound for size in _sizes(node) for bound in _bounds(size, ranges, 0)])
        for line in rewritten:
            if line.inputs.get("input", [None])[0] is reader.values[node] and (found := _required(line)) is not None:
                dim, size = found
                known[2 * dim : 2 * dim + 2] = [size, size]
        sizes.append(",".join(map(_range_in_words, known[::2], known[1::2])))
    dtypes = [_DTYPES.get(node.meta["val"].dtype, "") for node in inputs]
    given: list[tuple[Value, str]] = [(reader.values[node], size) for node, size in zip(inputs, sizes, strict=True)]
    program, weights = write(given, rewritten, results, dtypes)
    return Segment(inputs, outputs, program, weights)


_DTYPES = {torch.int64: "int64", torch.bool: "bool"}  # of inputs that hold no floating-point numbers


def _required(line: Line) -> tuple[int, int] | None:
    """The dimension of a layer's input whose size the weights fix, and that size."""
    rank, weight = len(line.inputs["input"][0].sizes), line.weight("weight")
    if line.layer == "conv" and weight is not None:
        return 1, weight.shape[1] * int(line.attributes.get("groups", 1))
    if line.layer == "conv_transpose" and weight is not None:
        return 1, weight.shape[0]
    if line.layer == "linear" and weight is not None:
        return rank - 1, weight.shape[1]
    weights = line.inputs.get("weights")
    return (2, weights[0].sizes[1]) if line.layer == "rnn" and weights else None


def _range_in_words(least: int, most: int) -> str:
    if least == most != 0:
        return str(least)
    return f"{least or ''}:{most or ''}"


def _drop_copies(graph: Graph) -> None:
    """Removes nodes that only copy their input, since nothing in the graph changes a tensor in place."""
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
    target = node.target
    return isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def _fold_constants(graph: Graph, constants: dict[str, Tensor]) -> None:
    """Computes what depends on constants alone, such as weights with a batch norm folded in."""
    by_node: dict[Node, Any] = {node: constants[node.name] for node in graph.nodes if node.name in constants}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op != "call_function" or not inputs or not all(one in by_node for one in inputs):
            continue
        if not (isinstance(node.target, OpOverload) or node.target is operator.getitem) or _draws(node):
            continue
        args, kwargs = map_arg((node.args, node.kwargs), by_node.__getitem__)
        value = by_node[node] = node.target(*args, **kwargs)
        if isinstance(value, Tensor):
            by_node[node] = constants[node.name] = value.detach()


def _export(model: nn.Module, inputs: tuple[Any, ...], free: Sequence[Sequence[int]]) -> ExportedProgram:
    """Exports ``model`` as a graph that changes nothing in place."""
    # By the names of arguments: one argument (*inputs) may take several inputs.
    spec = pytree.tree_structure(inputs)
    nested = pytree.tree_unflatten([dict.fromkeys(dims, Dim.AUTO) for dims in free], spec)
    sizes = inspect.signature(model.forward).bind(*nested).arguments
    try:
        # (torch writes a graph that failed to the standard error.)
        with contextlib.redirect_stderr(io.StringIO()), _no_search_for_causal_masks(model), _lengths_as_sizes():
            exported = torch.export.export(model, inputs, dynamic_shapes=dict(sizes), strict=False)
        if any(node.op == "call_function" and node.is_impure() for node in exported.graph.nodes):
            with warnings.catch_warnings():  # torch's own, about its own code
                warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
                exported = exported.run_decompositions({})
    except Exception as error:  # of any class: the model itself has run, so the export is what failed
        words = f"{str(error).partition(chr(10))[0]}{_place_of(error)}"
        raise ValueError(f"freeze: torch.export cannot take {type(model).__name__}: {words}") from error
    signature = exported.graph_signature
    changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    changed += getattr(signature, "parameters_to_mutate", {}).values()  # from torch 2.13 on
    if changed:
        raise ValueError(f"freeze: {type(model).__name__} changes {', '.join(changed)} in place, at every call")
    return exported


@contextlib.contextmanager
def _no_search_for_causal_masks(model: nn.Module) -> Iterator[None]:
    """torch's encoders and decoders compare a mask's numbers with a causal one's, unless a hint tells them what it is,
    and no graph can hold what depends on numbers. Here the hint says that the mask is not causal, so that an attention
    adds it to its scores, whatever it is: with a causal mask, too, the results are the same."""
    hints: dict[Any, str] = {nn.TransformerEncoder.forward: "is_causal", nn.TransformerDecoder.forward: "tgt_is_causal"}

    def hint(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = inspect.signature(module.forward).bind(*args, **keywords)
        name = hints[type(module).forward]
        if given.arguments.get(name) is None:
            given.arguments[name] = False
        return given.args, given.kwargs

    with contextlib.ExitStack() as hooks:
        for module in model.modules():
            if type(module).forward in hints:
                hooks.enter_context(module.register_forward_pre_hook(hint, with_kwargs=True))
        yield


@contextlib.contextmanager
def _lengths_as_sizes() -> Iterator[None]:
    """Makes ``len(x)`` of a tensor what ``x.size(0)`` is, which may depend on the batch. Python's own ``len`` returns
    plain numbers alone, so that an export takes the example's."""
    remember_builtins()
    of_python = builtins.len

    def length(one: Any) -> Any:
        return one.shape[0] if isinstance(one, Tensor) and one.dim() else of_python(one)

    builtins.len = length
    try:
        yield
    finally:
        builtins.len = of_python


# Where torch's own code and ours lie. (A folder of the user's may be called "fastnn", too.)
_PACKAGES = tuple(
    os.path.join(folder, "") for folder in (os.path.dirname(torch.__file__), str(Path(__file__).parents[1]))
)


def _place_of(error: BaseException) -> str:
    """The line of the model's own code that was running."""
    place = ""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if not code.co_filename.startswith(_PACKAGES):
            text = linecache.getline(code.co_filename, trace.tb_lineno).strip()
            place = f" (line {trace.tb_lineno} of {os.path.basename(code.co_filename)}{f': {text}' if text else ''})"
        trace = trace.tb_next
    return place


def _ranges(exported: ExportedProgram) -> dict[str, tuple[int, int]]:
    """For each free size of the inputs, by its name: the least and the most for which the export is valid. (The export
    leaves 0 and 1 out of every range.)"""
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
    """The sizes of a node's result: int, or SymInt where they depend on the inputs' sizes."""
    sizes: Sequence[Any] = node.meta["val"].shape
    return sizes


def _refusal(node: Node, why: str) -> ValueError:
    layers = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = layers[-1] if layers else ("", "")
    if path.startswith("_empty_nn_module_stack"):  # torch.export's word for none
        path = kind = ""
    where = f"layer '{path}'" if path else "the model itself"
    return ValueError(f"freeze: {node.target}, of {where}{f' ({kind})' if kind else ''}, {why}")
