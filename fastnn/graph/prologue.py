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


def _numbers(given: Tensor, dtype: torch.dtype) -> Tensor:
    return given if given.is_floating_point() else given.to(dtype)


def _numbers_but_no_booleans(given: Tensor, dtype: torch.dtype) -> Tensor:
    return _numbers(_checked(given, given.dtype is not torch.bool), dtype)


def _condition(given: Tensor, dtype: torch.dtype) -> Tensor:
    return _checked(given, given.dtype is torch.bool).to(dtype)


def _addends_of_shown(given: Tensor, dtype: torch.dtype) -> Tensor:
    return _addends_of_hidden(~given if given.dtype is torch.bool else given, dtype)


def _addends_of_hidden(given: Tensor, dtype: torch.dtype) -> Tensor:
    # torch's attention takes float32 beside float64, too.
    return _exact_addends_of_hidden(given.to(dtype) if given.dtype is torch.float32 else given, dtype)


def _exact_addends_of_hidden(given: Tensor, dtype: torch.dtype) -> Tensor:
    _checked(given, not given.requires_grad)  # a network has no gradient for a mask
    return torch.zeros_like(given, dtype=dtype).masked_fill_(given, -inf) if given.dtype is torch.bool else given


def _checked(given: Tensor, is_right: bool) -> Tensor:
    if not is_right:  # The layers themselves then take the tensor, or raise errors of their own.
        raise RuntimeError(f"a network does not take such a mask or operand, of {given.dtype}")
    return given


# The forms in which a tensor enters a network, by name: the numbers of an operand in the network's dtype; a mask as 1
# and 0; or what an attention adds to its scores, made from a mask in which True means shown, or hidden.
FORMS: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "numbers": _numbers,
    "no booleans": _numbers_but_no_booleans,
    "condition": _condition,
    "shown": _addends_of_shown,
    "hidden": _addends_of_hidden,
    "hidden exactly": _exact_addends_of_hidden,
}


def set_forms(tensors: list[Any], forms: Sequence[tuple[int, str]], dtype: torch.dtype | None) -> None:
    """Replaces the tensor at each place of `forms` by its form for a network of this dtype. Raises RuntimeError where a
    tensor has no such form."""
    for place, form in forms:
        if dtype is None or type(tensors[place]) is not Tensor:
            raise RuntimeError("a network does not take such tensors")
        tensors[place] = FORMS[form](tensors[place], dtype)


# ---- which nodes they are -------------------------------------------------------------------------------------------

# Functions that draw random numbers, besides those of dropout.
DRAW = frozenset(
    {
        *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "normal"),
        *("multinomial", "poisson", "binomial", "gumbel_softmax", "rrelu", "fractional_max_pool2d"),
        *("fractional_max_pool3d", "scaled_dot_product_attention"),
    }
)
# Functions that give booleans.
GIVE_BOOLEANS = frozenset(
    {
        *("eq", "ne", "lt", "le", "gt", "ge", "not_equal", "less", "less_equal", "greater", "greater_equal", "bool"),
        *("logical_not", "logical_and", "logical_or", "logical_xor", "isnan", "isinf", "isfinite"),
    }
)
# Others that give integers, or turn numbers into others, or that no network has.
_OF_NUMBERS = frozenset(
    {
        *("invert", "and_", "or_", "xor", "bitwise_not", "int", "long", "float", "double", "to", "type_as", "any"),
        *("one_hot", "argmax", "argmin", "tril", "triu", "cumsum", "bucketize", "searchsorted", "remainder", "mod"),
        *("all", "count_nonzero", "isin", "repeat_interleave"),
    }
)
# Further functions that compute the same whenever they run: they draw no numbers and change nothing.
_PURE = frozenset(
    {
        *GIVE_BOOLEANS,
        *_OF_NUMBERS,
        *("add", "sub", "mul", "div", "truediv", "floordiv", "pow", "neg", "abs", "square", "sqrt", "rsqrt", "exp"),
        *("log", "log1p", "expm1", "sin", "cos", "tanh", "sigmoid", "relu", "clamp", "clamp_min", "clamp_max"),
        *("minimum", "maximum", "round", "floor", "ceil", "trunc", "sign", "sum", "mean", "prod", "amax", "amin"),
        *("max", "min", "cumprod", "softmax", "where", "masked_fill", "gather", "index_select", "sort", "topk"),
        *("getitem", "getattr", "unsqueeze", "squeeze", "view", "reshape", "flatten", "unflatten", "transpose", "t"),
        *("permute", "contiguous", "expand", "expand_as", "repeat", "flip", "roll", "cat", "concat", "stack", "chunk"),
        *("split", "unbind", "select", "narrow", "movedim", "pad", "clone", "detach", "view_as", "diag"),
        *("arange", "zeros", "ones", "full", "eye", "linspace", "zeros_like", "ones_like", "full_like", "new_zeros"),
        *("new_ones", "new_full", "tensor", "size", "dim", "numel", "ndimension", "len", "unpack"),
    }
)
# What asks a tensor for its sizes and not for its elements.
_SIZES = frozenset({"size", "dim", "numel", "ndimension", "len", "unpack"})
_ATTRIBUTES_OF_SIZES = frozenset({"shape", "ndim", "dtype", "device"})
_ATTENTIONS = (
    *(nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer),
    *(nn.TransformerDecoder, nn.TransformerDecoderLayer, nn.Transformer),
)


def name_of_target(node: Node) -> str:
    """The name of the function or method that a node calls."""
    if not node.op.startswith("call"):
        return ""
    return str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", ""))


class Prologue:
    """The nodes of a graph that torch computes before a network.

    free: nodes that depend on the inputs and on buffers alone, and give the same whenever they run. before: the free
    nodes that torch computes. They give booleans or integers, or are computed from such, and no network may compute
    with these as with its own numbers. sizes: nodes that give sizes of tensors, and no tensors.
    """

    def __init__(
        self, graph: Graph, inputs: Collection[Node], buffers: Collection[Node], order: Order,
        modules: Mapping[str, nn.Module],
    ) -> None:  # fmt: skip
        self.free: set[Node] = {*inputs, *buffers}
        self.sizes: set[Node] = set()
        self.before: set[Node] = set()
        # Inputs that hold booleans or integers, for all that is known: they are compared, converted, or taken as masks.
        self._others: set[Node] = set()
        writes = set(order.writes)
        for node in graph.nodes:
            name = name_of_target(node)
            if node.op not in ("call_function", "call_method") or node in writes or name not in _PURE:
                continue
            if self._is_size(node, name):
                self.sizes.add(node)
            if all(one in self.free for one in node.all_input_nodes):
                self.free.add(node)
        for node in graph.nodes:
            if name_of_target(node) in GIVE_BOOLEANS | _OF_NUMBERS:
                self.add(node)
            for taken in (
                *masks_of(node, modules), *_numbers_of_embedding(node, modules), *_indices(node),
                *_classes(node, modules),
            ):  # fmt: skip
                self.add(taken)
        for node in graph.nodes:  # Torch also computes what follows from booleans and integers.
            if node.op.startswith("call") and any(self._is_other(one) for one in node.all_input_nodes):
                self.add(node)

    def _is_size(self, node: Node, name: str) -> bool:
        if name in _SIZES or (node.target is getattr and node.args[1] in _ATTRIBUTES_OF_SIZES):
            return node.target is not unpack or node.args[0] in self.sizes
        if node.target in (operator.getitem, operator.floordiv, operator.mul, operator.add, operator.sub):
            return bool(node.all_input_nodes) and all(one in self.sizes for one in node.all_input_nodes)
        return False

    def _is_other(self, node: Node) -> bool:
        return node in self._others or node in self.before

    def add(self, node: Node) -> bool:
        """Lets torch run a node, and what it is computed from, if that may be -> whether it may."""
        if node not in self.free or node in self.sizes:
            return False
        if not node.op.startswith("call"):
            self._others.add(node)
        elif node not in self.before:
            self.before.add(node)
            for one in node.all_input_nodes:
                self.add(one)
        return True


def changes_what_it_reads(
    graph: Graph, tensors: Mapping[Node, tuple[Any, Any]], order: Order, modules: Mapping[str, nn.Module]
) -> bool:
    """Whether a layer of the graph changes a tensor of the model, such as the running mean of a batch norm, that
    another node reads: then each must run in its turn."""
    written: set[Any] = set()
    for node in order.writes:
        if node.op == "call_module":
            written.update(id(one._buffers) for one in modules[str(node.target)].modules())
        written.update((id(tensors[one][0]), tensors[one][1]) for one in node.all_input_nodes if one in tensors)
    read = (key for key in tensors if any(user not in order.writes for user in key.users))
    return any(id(own) in written or (id(own), name) in written for own, name in map(tensors.__getitem__, read))


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


def _indices(node: Node) -> Iterator[Node]:
    """The tensors by which a node indexes another."""
    if node.target is operator.getitem:
        steps = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        yield from (one for one in steps if isinstance(one, Node))
    elif name_of_target(node) in ("index_select", "gather", "index_add", "index_add_"):
        given = node.kwargs.get("index", node.args[2] if len(node.args) > 2 else None)
        if isinstance(given, Node):
            yield given


def _classes(node: Node, modules: Mapping[str, nn.Module]) -> Iterator[Node]:
    """The classes that a loss takes."""
    is_one = node.target in (F.cross_entropy, F.nll_loss)
    if node.op == "call_module":
        is_one = isinstance(modules[str(node.target)], (nn.CrossEntropyLoss, nn.NLLLoss))
    taken = node.kwargs.get("target", node.args[1] if len(node.args) > 1 else None)
    if is_one and isinstance(taken, Node):
        yield taken


def _numbers_of_embedding(node: Node, modules: Mapping[str, nn.Module]) -> Iterator[Node]:
    """The numbers that an embedding takes, unless the network itself takes them from a column or counts them."""
    is_one = node.target is F.embedding
    if node.op == "call_module":
        is_one = isinstance(modules[str(node.target)], (nn.Embedding, nn.EmbeddingBag))
    taken = node.args[0] if is_one and node.args else None
    if isinstance(taken, Node) and name_of_target(taken) not in ("getitem", "arange", "unsqueeze", "select"):
        yield taken
