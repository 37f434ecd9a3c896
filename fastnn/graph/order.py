"""The order in which a graph's nodes run, and which of them may change what others read."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node

from fastnn._torch import pytree
from fastnn.nn._hooks import has_own_call, layer_class


def in_place(operation: str, value: Any, other: Any) -> Any:
    """Computes ``value += other`` or the like, by its name in the module ``operator``. (For ``operator.iadd`` itself
    torch.fx would write code that assigns to a variable which other nodes still read.)"""
    return getattr(operator, operation)(value, other)


def unpack(values: Any, count: int) -> tuple[Any, ...]:
    """``a, b = values``, with Python's own errors."""
    result = tuple(values)
    if len(result) > count:
        raise ValueError(f"too many values to unpack (expected {count})")
    if len(result) < count:
        raise ValueError(f"not enough values to unpack (expected {count}, got {len(result)})")
    return result


def detached(value: Any) -> Any:
    """What comes out of a ``torch.no_grad()`` block: tensors, alone or in a tuple, are detached."""
    return pytree.tree_map_only(Tensor, Tensor.detach, value)


def follow_writes(graph: Graph) -> None:
    """Lets the nodes behind a method that changes a tensor in place take the method's result, which is that tensor.
    Then one node stands for the value before the change, and another for the value after it."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        changed = node.args[0] if node.args else None
        if node.op == "call_method" and writes_in_place(str(node.target)) and isinstance(changed, Node):
            for user in list(changed.users):
                if place[user] > place[node]:
                    user.replace_input_with(changed, node)


def writes_in_place(method: str) -> bool:
    """Whether a method or function changes its first tensor, as torch's names say: ``add_``, but not ``__add__``."""
    return method.endswith("_") and not method.endswith("__")


class Order:
    """The order in which a graph's nodes run, and which of them may change what others read."""

    def __init__(self, graph: Graph, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.place = {node: i for i, node in enumerate(graph.nodes)}
        self.writes = [node for node in graph.nodes if not _only_computes(node, modules)]

    def may_be_one(self, nodes: Sequence[Node]) -> bool:
        """Whether all the nodes may run where the first of them stands, in their order: nothing between them
        changes a tensor or a mode."""
        first, last = self.place[nodes[0]], self.place[nodes[-1]]
        return not any(first < self.place[node] < last and node not in nodes for node in self.writes)

    def is_written_after(self, nodes: Sequence[Node], value: Node) -> bool:
        """Whether a value, or another that may share its memory, is changed in place after the first of the nodes runs,
        by a node that is none of them. (A fused operator may save its input for backward where the layer would not.)"""
        first = self.place[nodes[0]]
        writers = [node for node in self.writes if self.place[node] > first and node not in nodes]
        if not writers:
            return False
        aliases = self.roots(value)
        for node in self.place:  # in their order
            if self._may_be_view(node) and not aliases.isdisjoint(node.all_input_nodes):
                aliases.add(node)
        return any(not aliases.isdisjoint(self._may_be_written_by(writer)) for writer in writers)

    def roots(self, *values: Node) -> set[Node]:
        """The nodes that may have made the memory in which values lie."""
        return {value for value in self._ways_to_roots(*values) if not self._may_be_views_of(value)}

    def views_written_by(self, writer: Node) -> set[Node]:
        """The nodes that may be views, through which a node that writes may change memory."""
        ways = self._ways_to_roots(*self._may_be_written_by(writer))
        return {value for value in ways if self._may_be_views_of(value)}

    def _ways_to_roots(self, *values: Node) -> set[Node]:
        """The nodes from which values may have their memory: views, views of which they are views, and roots."""
        seen, left = set(values), list(values)
        while left:
            before = [node for node in self._may_be_views_of(left.pop()) if node not in seen]
            seen.update(before)
            left += before
        return seen

    def _may_be_views_of(self, value: Node) -> Sequence[Node]:
        """The nodes in whose memory a value may lie."""
        if not self._may_be_view(value):
            return ()
        is_in_place = value.op == "call_method" and writes_in_place(str(value.target))
        return self._may_be_written_by(value) if is_in_place or value.target is in_place else value.all_input_nodes

    def roots_written_by(self, writer: Node) -> set[Node]:
        """The nodes that may have made the memory which a node that writes may change."""
        return self.roots(*self._may_be_written_by(writer))

    def may_be_new(self, writer: Node, value: Node) -> bool:
        """Whether a node that changes a value in place may give a new tensor instead: no other node takes the old one,
        and nothing outside the graph has it."""
        aliases = self.roots(value)
        if any(root.op in ("placeholder", "get_attr") for root in aliases):
            return False
        for node in self.place:  # in their order
            if node is not writer and self._may_be_view(node) and not aliases.isdisjoint(node.all_input_nodes):
                aliases.add(node)
        others = {user for alias in aliases for user in alias.users} - aliases - {writer}
        return not others

    def _may_be_view(self, node: Node) -> bool:
        """Whether a node's result may share the memory of its inputs. It may, unless the node is known to make new
        memory."""
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            makes_new = layer_class(type(module)) is not None and not isinstance(module, _LAYERS_THAT_PASS_ON)
            return not makes_new or bool(getattr(module, "inplace", False))
        if not node.op.startswith("call"):
            return False
        if node.target is getattr and node.args[1] in _NO_TENSORS:
            return False
        if node.target in (operator.add, operator.mul) and any(map(_may_be_tuple, node.all_input_nodes)):
            return True
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        return name not in _MAKES_NEW or is_asked_to_write(node) or "out" in node.kwargs

    def _may_be_written_by(self, node: Node) -> Sequence[Node]:
        """The nodes whose memory a node that writes may change."""
        is_known = node.op == "call_method" or (node.op == "call_function" and node.target is in_place)
        if is_known and "out" not in node.kwargs:
            return [value for value in node.args if isinstance(value, Node)][:1]
        return node.all_input_nodes

    def is_there(self, values: Iterable[Any], first: Node, ready: Sequence[str] = ("placeholder", "get_attr")) -> bool:
        """Whether these values are computed before `first` runs, or are nodes of the kinds that are `ready`."""
        nodes = [value for value in values if isinstance(value, Node) and value.op not in ready]
        return all(self.place[node] < self.place[first] for node in nodes)


_NO_TENSORS = ("shape", "ndim", "dtype", "device")  # attributes of tensors


def _may_be_tuple(node: Node) -> bool:
    """Whether a node may give several tensors, of which a sum, or a multiple, is a longer tuple."""
    if node.target is operator.getitem:
        return _may_be_tuple(node.all_input_nodes[0])
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name in _GIVE_SEVERAL


_GIVE_SEVERAL = frozenset(
    {
        *("atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "meshgrid", "align_tensors", "unpack"),
        *("split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "dsplit", "chunk", "unbind", "unsafe_split"),
        *("unsafe_chunk", "unsafe_split_with_sizes"),
    }
)
_WRITING_METHODS = ("backward", "retain_grad", "register_hook", "register_post_accumulate_grad_hook")
_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
_LAYERS_THAT_PASS_ON = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
)
# Functions and methods whose result never lies in the memory of what they are given.
_MAKES_NEW = frozenset(
    {
        *("add", "sub", "mul", "div", "truediv", "pow", "neg", "matmul", "mm", "bmm", "addmm", "baddbmm", "clone"),
        *("exp", "log", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "relu", "relu6", "leaky_relu", "elu", "gelu"),
        *("selu", "celu", "silu", "mish", "softplus", "hardtanh", "hardswish", "softmax", "log_softmax", "linear"),
        *("sum", "mean", "amax", "amin", "argmax", "argmin", "cat", "concat", "stack", "eq", "ne", "lt", "le", "gt"),
        *("conv1d", "conv2d", "conv3d", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d"),
        *("avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "batch_norm", "ge"),
        *("layer_norm", "group_norm", "embedding", "zeros_like", "ones_like", "rand_like", "randn_like"),
        *("mse_loss", "l1_loss", "cross_entropy", "nll_loss", "size", "dim", "numel"),
        *("empty", "zeros", "ones", "full", "rand", "randn", "empty_like", "full_like"),
        *("new_empty", "new_zeros", "new_ones", "new_full"),
        *("max", "min", "maximum", "minimum", "clamp", "where", "abs", "std", "var", "sort", "argsort", "topk"),
        *("cumsum", "logsumexp", "cdist", "one_hot"),
    }
)


_PURE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor", "lshift", "rshift"),
        *("neg", "pos", "invert", "not_", "abs", "eq", "ne", "lt", "le", "gt", "ge", "is_", "is_not", "getitem"),
    )
)


# Functions that make a tensor of numbers alone. (torch does not count them among those that a class may override.)
FACTORIES = ("arange", "empty", "eye", "full", "linspace", "logspace", "ones", "tensor", "zeros", "tril_indices")
_MAKE_CONSTANTS = frozenset(getattr(torch, name) for name in FACTORIES)


def _only_computes(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node changes nothing that another may read: no tensor, no statistics, no mode."""
    if node.op in ("placeholder", "get_attr", "output"):
        return True
    if node.op == "call_module":
        module = modules[str(node.target)]
        if layer_class(type(module)) is None or has_own_call(module) or getattr(module, "inplace", False):
            return False
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            return module.max_norm is None  # with it, a call makes longer rows shorter
        return not (isinstance(module, _NORMS) and module.training)
    if node.op == "call_method":
        return not writes_in_place(str(node.target)) and str(node.target) not in _WRITING_METHODS
    function: Any = node.target
    if function is getattr or function in _PURE_OPERATORS:
        return True
    if function is unpack or str(getattr(function, "__module__", "")).startswith("fastnn"):  # joining.py, operators
        return not node.kwargs.get("training") and function is not in_place
    if function in _MAKE_CONSTANTS:
        return "out" not in node.kwargs
    if function not in functions_of_torch() or function.__name__.endswith("_") or "out" in node.kwargs:
        return False
    name = function.__name__
    if "batch_norm" in name or "instance_norm" in name:  # they change running statistics
        return node.kwargs.get("training") is False
    if name.startswith("embedding"):
        return "max_norm" not in node.kwargs and len(node.args) < 4
    return not is_asked_to_write(node)


def is_asked_to_write(node: Node) -> bool:
    """Whether a function is called with ``inplace=True``, by name or by position."""
    if node.op != "call_function" or not _may_be_in_place(node.target):
        return False
    names = inspect.signature(node.target).parameters  # type: ignore[arg-type]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return given.get("inplace", False) is not False


@cache
def functions_of_torch() -> frozenset[Any]:
    """The functions of torch that act on tensors and on nothing else."""
    found = {function for some in torch.overrides.get_overridable_functions().values() for function in some}
    no_operators = ("boolean_dispatch", "handle_torch_function", "assert_int_or_pair")
    for name, function in vars(F).items():
        if name.startswith(("_", "has_torch_function")) or name in no_operators or isinstance(function, type):
            continue
        if callable(function):
            found.add(function)
    packing = ("pack_padded_sequence", "pad_packed_sequence", "pack_sequence", "pad_sequence")
    return frozenset({*found, *(getattr(nn.utils.rnn, name) for name in packing)})


@cache
def _may_be_in_place(function: Any) -> bool:
    try:
        return "inplace" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a function of C
        return False
