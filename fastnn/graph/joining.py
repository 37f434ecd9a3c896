"""Joins neighbouring nodes of a fused graph into one call, because small networks spend most of their time on calls.

Two groups of nodes are joined: convolution blocks, a flattening and linear layers, which ``fastnn::network_unpacked``
runs in one call in inference; and a recurrent layer with a linear layer on its last step, which training records as one
function.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.fx import Graph, Node

from fastnn._torch import HOOKS, direct_call
from fastnn.activations import layers_of, parse
from fastnn.graph.order import Order, unpack
from fastnn.network_program import Line, Value, conv_attributes, write
from fastnn.nn.rnn import _Recurrent
from fastnn.ops._autograd import is_plain, wants_gradient
from fastnn.ops.conv_relu_max_pool import conv_relu_max_pool
from fastnn.ops.mlp import mlp_of_parameters
from fastnn.ops.network import network_unpacked

_network_call = direct_call(network_unpacked)


class _Step(NamedTuple):
    """One of the calls that are joined. numbers: a convolution's geometry, or the activations of linear layers."""

    kind: str
    tensors: int
    numbers: tuple[Any, ...]
    function: Callable[..., Tensor]


class JoinedLayers:
    """Runs convolution blocks, ``flatten`` and linear layers: by one operator where no gradient is recorded, which
    saves a sixth of a small network's time, else by an operator each. It is called with the input and all tensors."""

    __name__ = "network"  # torch.fx writes a call of it as that of a function of this name and module
    __module__ = "fastnn"

    def __init__(self, steps: Sequence[_Step]) -> None:
        self.steps = steps
        self.takes_nothing = all(step.function is not flatten_rows for step in steps)  # inputs of no rows, that is

    def __call__(self, input: Tensor, *tensors: Tensor | None) -> Tensor:
        if not is_grad_enabled() and type(input) is Tensor and self._may_run_at_once(input):
            shapes = tuple([None if tensor is None else tensor.shape for tensor in tensors])
            try:
                return _network_call(input, self._in_order(tensors), _program(self, shapes))
            except RuntimeError:  # the layers have words of their own for it
                pass
        return self.run(input, *tensors)

    def _may_run_at_once(self, input: Tensor) -> bool:
        is_usual = input.is_cpu and input.is_contiguous() and (self.takes_nothing or input.numel() != 0)
        return is_usual and input.dtype is not torch.bfloat16 and is_plain(input)

    def _in_order(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """The tensors in the program's order: each layer's weight, then its bias."""
        result: list[Tensor] = []
        first = 0
        for step in self.steps:
            some: Any = tensors[first : first + step.tensors]
            first += step.tensors
            if step.kind == "mlp":
                layers = layers_of(step.numbers[0])
                for i in range(layers):
                    result.append(some[i])
                    if step.tensors > layers:
                        result.append(some[layers + i])
            else:
                result += [tensor for tensor in some if tensor is not None]
        return result

    def run(self, input: Tensor, *tensors: Tensor | None) -> Tensor:
        first = 0
        for step in self.steps:
            input = step.function(input, *tensors[first : first + step.tensors])
            first += step.tensors
        return input


@lru_cache(maxsize=256)
def _program(network: JoinedLayers, shapes: tuple[Sequence[int] | None, ...]) -> str:
    """The program of the joined layers, for tensors of these sizes."""
    rank = len(shapes[0])  # type: ignore[arg-type]
    start = value = Value([None] * rank)
    lines: list[Line] = []

    def add(layer: str, tensors: Sequence[Sequence[int] | None], attributes: dict[str, Any]) -> None:
        nonlocal value
        given = {name: [_weight(shape)] for name, shape in zip(("weight", "bias"), tensors, strict=False) if shape}
        lines.append(Line(layer, {"input": [value], **given}, [Value(())], attributes))
        value = lines[-1].outputs[0]

    first = 0
    for step in network.steps:
        some: Any = shapes[first : first + step.tensors]
        first += step.tensors
        if step.kind == "conv":
            add("conv", some, {"activation": "relu", **conv_attributes(step.numbers, len(some[0]) - 2)})
        elif step.kind == "flatten":
            lines.append(Line("reshape", {"input": [value], "like": [value]}, [Value(())], {"sizes": ["0.0", -1]}))
            value = lines[-1].outputs[0]
        else:
            layers = parse(step.numbers[0])
            for i, activation in enumerate(layers):
                bias = some[len(layers) + i : len(layers) + i + 1]
                add("linear", [some[i], *bias], {"activation": str(activation)})
    return write([(start, ",".join([":"] * rank))], lines, [value])[0]


def _weight(shape: Sequence[int]) -> Value:
    return Value(shape, torch.empty(tuple(shape), device="meta"))


class RecurrentHead:
    """Runs ``linear(last step of recurrent(x))``, in training by one function. It is called with the recurrent layer,
    the input, and the linear layer's weight and bias."""

    __name__ = "recurrent_with_head"  # as above
    __module__ = "fastnn"

    def __init__(self, part: int, index: Any) -> None:
        # part: 0 where the step is taken from the output, 1 from the state, by `index`.
        self.part, self.index = part, index

    def __call__(self, module: Any, input: Tensor, *parameters: Tensor) -> Tensor:
        if not isinstance(input, Tensor) or input.dim() != 3:  # a packed sequence, or one without a batch
            result = module(input)[self.part]
            state = result[0] if self.part and isinstance(result, tuple) else result
            return mlp_of_parameters(state[self.index], parameters, "identity")
        if is_grad_enabled() and input.is_cpu and is_plain(input):
            layer = kernel_of(module)
            if layer is not None and wants_gradient(input, *layer._flat_weights, *parameters):
                trained: Tensor | None = layer._run_plain(input, None, parameters)
                if trained is not None:
                    return trained
        _, state = module(input)
        # The last layer's last output: a smaller tensor to take it from than all outputs.
        h = state[0] if isinstance(state, tuple) else state
        return mlp_of_parameters(h[-1], parameters, "identity")


def kernel_of(module: nn.Module) -> Any:
    """The layer of ``fastnn.nn`` that runs a recurrent module: the module itself, or the one that its fused forward
    runs. None where the module has to be called, because it has hooks or stays unfused."""
    if any(module.__dict__[name] for name in HOOKS):
        return None
    forward: Any = module.__dict__.get("forward")
    if isinstance(module, _Recurrent):
        return module if forward is None else None
    return forward.twin() if hasattr(forward, "twin") and module not in forward.left else None


def drop_unused_parts(graph: Graph, modules: Mapping[str, nn.Module]) -> None:
    """Removes nodes that take a part of a result of several parts, where nobody uses that part."""
    for node in reversed(list(graph.nodes)):
        if node.target is operator.getitem and not node.users and _is_there(node, modules):
            graph.erase_node(node)


def _is_there(part: Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a result is sure to have this part, because it has been unpacked, or a recurrent layer gives it."""
    whole: Any = part.args[0]
    if whole.target is unpack:
        return True
    while whole.target is operator.getitem:
        whole = whole.args[0]
    return whole.op == "call_module" and isinstance(modules[str(whole.target)], nn.RNNBase) and part.args[1] in (0, 1)


def join(graph: Graph, modules: Mapping[str, nn.Module]) -> None:
    """Replaces each group of nodes that can be joined by one call."""
    drop_unused_parts(graph, modules)
    write_flattenings(graph, behind=conv_relu_max_pool)
    for node in list(graph.nodes):
        _join_head(graph, node, modules)
    taken: set[Node] = set()
    for node in list(graph.nodes):
        if node not in taken:
            taken.update(_join_network(graph, node, modules))


def _join_network(graph: Graph, first: Node, modules: Mapping[str, nn.Module]) -> list[Node]:
    nodes: list[Node] = []
    node: Node | None = first
    steps: list[_Step] = []
    while node is not None and (step := _step(node, [s.kind for s in steps])) is not None:
        nodes.append(node)
        steps.append(step)
        follower = next(iter(node.users)) if len(node.users) == 1 else None
        node = follower if follower is not None and follower.args and follower.args[0] is node else None
    while steps and steps[-1].kind == "flatten":
        nodes.pop()
        steps.pop()
    if sum(step.kind != "flatten" for step in steps) < 2:
        return []
    tensors = [value for node in nodes for value in _tensors_of(node)]
    order = Order(graph, modules)
    if not order.is_there(tensors, nodes[0], ("placeholder",)) or not order.may_be_one(nodes):
        return []
    with graph.inserting_before(nodes[0]):
        call = graph.call_function(JoinedLayers(steps), (nodes[0].args[0], *tensors))
    nodes[-1].replace_all_uses_with(call)
    for node in reversed(nodes):
        graph.erase_node(node)
    return nodes


def _tensors_of(node: Node) -> Sequence[Any]:
    if node.target is conv_relu_max_pool:
        return node.args[1:3]
    return node.args[1] if node.target is mlp_of_parameters else ()  # type: ignore[return-value]


def _step(node: Node, before: Sequence[str]) -> _Step | None:
    """The node as the next step after those before."""
    if node.op != "call_function":
        return _flattening(node) if flattens(node) and before and before[-1] == "conv" else None
    if node.target is conv_relu_max_pool and "mlp" not in before and "flatten" not in before:
        geometry, dims = node.kwargs["geometry"], node.kwargs["dims"]
        return _Step("conv", 2, geometry, lambda x, w, b: conv_relu_max_pool(x, w, b, geometry, dims))  # type: ignore
    if flattens(node) and before and before[-1] == "conv":
        return _flattening(node)
    if node.target is mlp_of_parameters and before and before[-1] == "flatten":
        activations: Any = node.kwargs["activations"]
        tensors: Any = node.args[1]
        return _Step("mlp", len(tensors), (activations,), lambda x, *p: mlp_of_parameters(x, p, activations))
    return None


def _flattening(node: Node) -> _Step:
    return _Step("flatten", 0, (), flatten_rows if node.target is flatten_rows else lambda x: x.flatten(1))


def flatten_rows(x: Tensor) -> Tensor:
    """``torch.flatten(x, 1)``, with the words that a view has for what it cannot take: no rows, or other strides."""
    return x.view(x.size(0), -1)


def flattens(node: Node) -> bool:
    """Whether it makes one of all dimensions but the batch."""
    if node.target is flatten_rows:
        return True
    if node.target is torch.flatten or node.target == "flatten":
        given = {"start_dim": 0, "end_dim": -1, **dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False))}
        return {**given, **node.kwargs} == {"start_dim": 1, "end_dim": -1}
    return False


def write_flattenings(graph: Graph, behind: Any = None) -> None:
    """Writes ``x.view(x.size(0), -1)``, also with reshape and with shape, as one function of x, so that x has one user.
    behind: a function whose results are the only x that count; without it, any x counts."""
    for node in list(graph.nodes):
        sizes = sizes_of_view(node)
        if len(sizes) != 2 or sizes[1] != -1:
            continue
        x = node.args[0]
        if not isinstance(x, Node) or not _is_batch(sizes[0], x) or (behind is not None and x.target is not behind):
            continue
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_function(flatten_rows, (x,)))
        unused = [node]
        while unused and not unused[0].users:
            first = unused.pop(0)
            unused += [one for one in first.all_input_nodes if one is not x]
            graph.erase_node(first)


def sizes_of_view(node: Node) -> Sequence[Any]:
    """The sizes in a call of ``x.view(...)`` or reshape; none where the node is no such call."""
    if node.target not in ("view", "reshape", torch.reshape) or node.kwargs:
        return ()
    sizes = node.args[1:]
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes


def _is_batch(size: Any, x: Node) -> bool:
    """Whether a size is x.size(0), x.size()[0] or x.shape[0]."""
    if not isinstance(size, Node) or size.kwargs:
        return False
    if size.target == "size":
        return size.args == (x, 0)
    if size.target is not operator.getitem or size.args[1] != 0:
        return False
    all_sizes = size.args[0]
    return isinstance(all_sizes, Node) and (
        (all_sizes.target == "size" and all_sizes.args == (x,))
        or (all_sizes.target is getattr and all_sizes.args == (x, "shape"))
    )


def _join_head(graph: Graph, layer: Node, modules: Mapping[str, nn.Module]) -> None:
    """``linear`` of the last step of a recurrent layer, taken from its output or from its final state."""
    module = modules.get(str(layer.target)) if layer.op == "call_module" else None
    if not isinstance(module, nn.RNNBase) or len(layer.args) != 1 or layer.kwargs or kernel_of(module) is None:
        return
    if module.bidirectional or module.dropout:
        return
    parts = {user.args[1]: user for user in layer.users if user.target is operator.getitem and user.args[0] is layer}
    if len(parts) != len(layer.users) or not parts.keys() <= {0, 1}:
        return
    if len(parts) != 1:
        return
    path = [layer, *parts.values()]
    last: Any = -1
    if 0 in parts:
        last = (slice(None), -1) if module.batch_first else -1
    elif module.mode == "LSTM":
        h = next(iter(path[-1].users))
        if h.target is not operator.getitem or h.args[1] != 0:
            return
        path.append(h)
    if any(len(node.users) != 1 for node in path):
        return
    step = next(iter(path[-1].users))
    if step.target is not operator.getitem or not chooses_last(step.args[1], last) or len(step.users) != 1:
        return
    head = next(iter(step.users))
    if head.target is not mlp_of_parameters or head.kwargs["activations"] != "identity" or head.args[0] is not step:
        return
    parameters: Any = head.args[1]
    order = Order(graph, modules)
    if not order.is_there(parameters, layer, ("placeholder",)) or not order.may_be_one([layer, head]):
        return
    with graph.inserting_before(layer):
        call = graph.call_function(
            RecurrentHead(int(0 not in parts), step.args[1]),
            (graph.get_attr(str(layer.target)), layer.args[0], *parameters),
        )
    head.replace_all_uses_with(call)
    for node in (head, step, *reversed(path)):
        graph.erase_node(node)


def chooses_last(index: Any, last: Any) -> bool:
    """Whether the index is the last step's: ``[:, -1]``, or ``[:, -1, :]``."""
    if not isinstance(last, tuple):
        return index == last or index in ((-1,), (-1, slice(None)), (-1, slice(None), slice(None)))
    return index in ((slice(None), -1), (slice(None), -1, slice(None)))
