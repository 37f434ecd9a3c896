"""Joins a recurrent layer with the linear layer of its last step into one call, which training records as one function,
because small networks spend most of their time on calls. What else may become one call is in stretches.py.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor, is_grad_enabled, nn
from torch.fx import Graph, Node
from torch.nn.utils.parametrize import is_parametrized

from fastnn._torch import HOOKS
from fastnn.graph.order import Order, unpack
from fastnn.nn.rnn import _Recurrent
from fastnn.ops._autograd import is_plain, wants_gradient
from fastnn.ops.mlp import mlp_of_parameters


class RecurrentHead:
    """Runs ``linear(last step of recurrent(x))``, in training by one function. It is called with the recurrent layer,
    the input, and the linear layer's weight and bias."""

    __name__ = "recurrent_with_head"  # torch.fx writes a call of it as that of a function of this name and module
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
    runs. None where the module has to be called: it has hooks, stays unfused, or its class computes its weights."""
    if any(module.__dict__[name] for name in HOOKS):
        return None
    forward: Any = module.__dict__.get("forward")
    if isinstance(module, _Recurrent):
        return module if forward is None else None
    has_twin = hasattr(forward, "twin") and module not in forward.left and not is_parametrized(module)
    return forward.twin() if has_twin else None


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


def join_heads(graph: Graph, modules: Mapping[str, nn.Module]) -> None:
    """Replaces each recurrent layer whose last step goes to a linear layer, with that layer, by one call."""
    drop_unused_parts(graph, modules)
    for node in list(graph.nodes):
        _join_head(graph, node, modules)


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
