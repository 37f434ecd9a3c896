"""What torch computes before a network: masks and numbers that follow from a model's inputs and buffers alone.

A network computes with floating-point numbers. A mask of booleans, as ``tokens != 0``, is computed by torch, and enters
the network in a form that the layer which takes it knows: see :data:`FORMS`.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node

from fastnn.graph.order import Order, unpack

# ---- forms ----------------------------------------------------------------------------------------------------------


def _numbers(given: Tensor, like: Tensor) -> Tensor:
    return given if given.is_floating_point() else given.to(like.dtype)


def _condition(given: Tensor, like: Tensor) -> Tensor:
    if given.dtype is not torch.bool:
        raise RuntimeError(f"expected a mask of booleans, got {given.dtype}")  # the layer itself has words of its own
    return given.to(like.dtype)


def _addends_of_shown(given: Tensor, like: Tensor) -> Tensor:
    return _addends_of_hidden(~given if given.dtype is torch.bool else given, like)


def _addends_of_hidden(given: Tensor, like: Tensor) -> Tensor:
    if given.dtype is torch.bool:
        return torch.zeros_like(given, dtype=like.dtype).masked_fill_(given, -inf)
    return given.to(like.dtype) if given.dtype is torch.float32 else given  # torch's attention takes float32, too


# How a tensor enters a network, by the name of the form: booleans and integers as numbers; booleans, and nothing else,
# as 1 and 0; and what an attention adds to its scores, where True stands for what is seen, or for what is hidden.
FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "numbers": _numbers,
    "condition": _condition,
    "shown": _addends_of_shown,
    "hidden": _addends_of_hidden,
}


def in_forms(tensors: list[Any], forms: Sequence[tuple[int, str]], like: Sequence[Any]) -> None:
    """Replaces those tensors, at places, that enter a network in a form. The network has the dtype of the first tensor
    of `like` that holds floating-point numbers."""
    number = next((one for one in like if isinstance(one, Tensor) and one.is_floating_point()), None)
    for place, form in forms:
        if number is not None and type(tensors[place]) is Tensor:
            tensors[place] = FORMS[form](tensors[place], number)


# ---- which nodes they are -------------------------------------------------------------------------------------------

_DRAW = frozenset(
    {
        *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "normal"),
        *("multinomial", "poisson", "gumbel_softmax", "rrelu", "empty", "empty_like", "new_empty"),
    }
)
# What asks a tensor for its sizes and not for its elements.
_SIZES = frozenset({"size", "dim", "numel", "ndimension", "len", "unpack"})
_ATTRIBUTES_OF_SIZES = frozenset({"shape", "ndim", "dtype", "device"})
# Functions that give booleans.
GIVE_BOOLEANS = frozenset(
    {
        *("eq", "ne", "lt", "le", "gt", "ge", "not_equal", "less", "less_equal", "greater", "greater_equal"),
        *("logical_not", "logical_and", "logical_or", "logical_xor", "isnan", "isinf", "isfinite", "any", "all"),
        "bool",
    }
)
# Others that give integers, or turn numbers into others, or that no network has.
_OF_NUMBERS = frozenset(
    {
        *("invert", "and_", "or_", "xor", "bitwise_not", "int", "long", "float", "double", "to", "type_as"),
        *("one_hot", "argmax", "argmin", "tril", "triu", "cumsum", "bucketize", "searchsorted", "remainder", "mod"),
    }
)
_ATTENTIONS = (
    *(nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer),
    *(nn.TransformerDecoder, nn.TransformerDecoderLayer, nn.Transformer),
)


def name_of_target(node: Node) -> str:
    return str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", ""))


class Prologue:
    """Which nodes of a graph can run before everything else, and which do.

    constant: nodes through which no gradient reaches a parameter, sizes of any value included. free: nodes that depend
    on the inputs and on buffers alone, and are the same whenever they run. before: free nodes that torch runs. read:
    inputs that such nodes, or layers with masks, take: they may hold other things than floating-point numbers.
    """

    def __init__(
        self, graph: Graph, inputs: Collection[Node], buffers: Collection[Node], order: Order,
        modules: Mapping[str, nn.Module],
    ) -> None:  # fmt: skip
        self.constant: set[Node] = {*inputs, *buffers}
        self.free: set[Node] = {*inputs, *buffers}
        self.sizes: set[Node] = set()  # nodes that are sizes, not tensors
        self.before: set[Node] = set()
        self.read: set[Node] = set()
        writes = set(order.writes)
        for node in graph.nodes:
            if node.op not in ("call_function", "call_method") or node in writes:
                continue
            name = name_of_target(node)
            if name in _DRAW or "dropout" in name:
                continue
            if self._is_size(node, name):
                self.sizes.add(node)
                self.constant.add(node)
            elif all(one in self.constant for one in node.all_input_nodes):
                self.constant.add(node)
            if all(one in self.free for one in node.all_input_nodes):
                self.free.add(node)
        for node in graph.nodes:
            if name_of_target(node) in GIVE_BOOLEANS | _OF_NUMBERS and node.op != "call_module":
                self.add(node)
            for taken in (*masks_of(node, modules), *_numbers_of_embedding(node, modules)):
                self.add(taken)

    def _is_size(self, node: Node, name: str) -> bool:
        if name in _SIZES or (node.target is getattr and node.args[1] in _ATTRIBUTES_OF_SIZES):
            return node.target is not unpack or node.args[0] in self.sizes
        if node.target in (operator.getitem, operator.floordiv, operator.mul, operator.add, operator.sub):
            return bool(node.all_input_nodes) and all(one in self.sizes for one in node.all_input_nodes)
        return False

    def add(self, node: Node) -> bool:
        """Lets torch run a node, and what it is computed from, if that may be -> whether it may."""
        if node not in self.free or node in self.sizes:
            return False
        if not node.op.startswith("call"):
            self.read.add(node)
        elif node not in self.before:
            self.before.add(node)
            for one in node.all_input_nodes:
                self.add(one)
        return True


def masks_of(node: Node, modules: Mapping[str, nn.Module]) -> Iterator[Node]:
    """The masks that a node takes."""
    given: dict[str, Any] = dict(node.kwargs)
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, _ATTENTIONS):
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            given = {**dict(zip(names, node.args, strict=False)), **given}
    elif name_of_target(node) in ("masked_fill", "masked_fill_"):
        given["mask"] = given.get("mask", node.args[1] if len(node.args) > 1 else None)
    elif name_of_target(node) == "where":
        which = 1 if node.op == "call_method" else 0
        given["mask"] = given.get("condition", node.args[which] if len(node.args) > which else None)
    elif node.target is F.scaled_dot_product_attention:
        given["mask"] = given.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
    for name, taken in given.items():
        if "mask" in name and isinstance(taken, Node):
            yield taken


def _numbers_of_embedding(node: Node, modules: Mapping[str, nn.Module]) -> Iterator[Node]:
    """The numbers that an embedding takes, unless the network itself takes them from a column or counts them."""
    is_one = node.target is F.embedding
    if node.op == "call_module":
        is_one = isinstance(modules[str(node.target)], (nn.Embedding, nn.EmbeddingBag))
    taken = node.args[0] if is_one and node.args else None
    if isinstance(taken, Node) and name_of_target(taken) not in ("getitem", "arange", "unsqueeze", "select"):
        yield taken
