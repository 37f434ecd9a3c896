"""How sums, means, norms, maxima and matrix products are layers of a network."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fastnn.graph.order import detached
from fastnn.graph.prologue import name_of_target
from fastnn.graph.reader import NotANetworkError, Reader, module_row, only_first_is_taken, row
from fastnn.network_program import Value


@row(torch.mean, "mean")
def _mean(read: Reader, node: Node, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> None:
    _add_mean(read, node, x, dim, keepdim, dtype, False)


@row(torch.sum, "sum")
def _sum(read: Reader, node: Node, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> None:
    _add_mean(read, node, x, dim, keepdim, dtype, True)


def _add_mean(read: Reader, node: Node, x: Any, dim: Any, keepdim: bool, dtype: Any, sums: bool) -> None:
    if dtype is not None:
        raise NotANetworkError("a mean or a sum has a dtype of its own")
    read.add(node, "mean", {"input": [read.data(x)]}, dims=_dims_given(dim), keepdim=bool(keepdim), sums=sums)


def _dims_given(dim: Any) -> list[int]:
    """The dimensions that a reduction names; none where it goes over all."""
    dims = [] if dim is None else [dim] if type(dim) is int else list(dim)
    if not all(type(one) is int for one in dims):
        raise NotANetworkError("a reduction goes over dimensions that a call gives")
    return dims


@row(torch.norm, "norm")
def _norm(
    read: Reader, node: Node, x: Any, p: Any = "fro", dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> None:
    _check_dtype(dtype)
    dims = _dims_given(dim)
    if p == "fro" and len(dims) > 2:
        raise NotANetworkError("a matrix's norm goes over more than two dimensions")
    _add_norm(read, node, read.data(x), 2.0 if p in ("fro", None) else p, dims, keepdim)


@row(torch.linalg.vector_norm)
def _vector_norm(
    read: Reader, node: Node, x: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> None:
    _check_dtype(dtype)
    _add_norm(read, node, read.data(x), ord, _dims_given(dim), keepdim)


@row(torch.linalg.norm)
def _linalg_norm(
    read: Reader, node: Node, x: Any, ord: Any = None, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> None:
    _check_dtype(dtype)
    if ord is not None and type(dim) is not int:
        raise NotANetworkError("a norm may be a matrix's")
    _add_norm(read, node, read.data(x), 2.0 if ord is None else ord, _dims_given(dim), keepdim)


def _check_dtype(dtype: Any) -> None:
    if dtype is not None:
        raise NotANetworkError("a norm has a dtype of its own")


def _add_norm(read: Reader, node: Node | None, x: Value, p: Any, dims: Sequence[int], keepdim: bool) -> Value:
    """Adds the Euclidean norm, or the sum of the magnitudes (p = 1), over some dimensions."""
    if p not in (1, 2) or isinstance(p, bool):
        raise NotANetworkError(f"a norm is of degree {p}")
    options = {"dims": list(dims), "keepdim": bool(keepdim), "sums": True}
    if p == 1:
        magnitudes = read.add(None, "unary", {"input": [x]}, function="abs")
        return read.add(node, "mean", {"input": [magnitudes]}, **options)
    squares = read.add(None, "binary", {"input": [x], "other": [x]}, function="mul")
    sums = read.add(None, "mean", {"input": [squares]}, **options)
    return read.add(node, "unary", {"input": [sums]}, function="root")


@row(F.pairwise_distance)
def _pairwise_distance(
    read: Reader, node: Node, x1: Any, x2: Any, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> None:
    rest = read.add(None, "binary", {"input": [read.data(x1)], "other": [read.data(x2)]}, function="sub")
    rest = read.add(None, "binary", {"input": [rest]}, function="add", number=float(eps))
    _add_norm(read, node, rest, p, [-1], keepdim)


@module_row(nn.PairwiseDistance)
def _pairwise_distance_module(read: Reader, node: Node, module: Any, x1: Any, x2: Any) -> None:
    _pairwise_distance(read, node, x1, x2, module.norm, module.eps, module.keepdim)
    read.note(module, "norm", "eps", "keepdim")


@row(F.normalize)
def _normalize(read: Reader, node: Node, x: Any, p: float = 2.0, dim: Any = 1, eps: float = 1e-12) -> None:
    value = read.data(x)
    norm = read.add(None, "clamp", {"input": [_add_norm(read, None, value, p, _dims_given(dim), True)]}, min=float(eps))
    read.add(node, "binary", {"input": [value], "other": [norm]}, function="div")


@row(torch.var, "var")
def _var(
    read: Reader, node: Node, x: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *,
    correction: Any = None,
) -> None:  # fmt: skip
    _add_variance(read, node, x, dim, unbiased, keepdim, correction)


@row(torch.std, "std")
def _std(
    read: Reader, node: Node, x: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *,
    correction: Any = None,
) -> None:  # fmt: skip
    variance = _add_variance(read, None, x, dim, unbiased, keepdim, correction)
    read.add(node, "unary", {"input": [variance]}, function="root")


@row(torch.var_mean, torch.std_mean)
def _var_mean(
    read: Reader, node: Node, x: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *,
    correction: Any = None,
) -> None:  # fmt: skip
    spread = _add_variance(read, None, x, dim, unbiased, keepdim, correction)
    if node.target is torch.std_mean:
        spread = read.add(None, "unary", {"input": [spread]}, function="root")
    dims = [] if type(dim) is bool else _dims_given(dim)
    mean = read.add(None, "mean", {"input": [read.data(x)]}, dims=dims, keepdim=bool(keepdim))
    read.parts[node] = [spread, mean]


def _add_variance(
    read: Reader, node: Node | None, x: Any, dim: Any, unbiased: Any, keepdim: bool, correction: Any
) -> Value:
    if type(dim) is bool and unbiased is None and correction is None and not keepdim:  # x.var(False)
        dim, unbiased = None, dim
    if (unbiased is not None and correction is not None) or type(unbiased) not in (bool, type(None)):
        raise NotANetworkError("a variance has two corrections")
    if type(dim) is bool or (dim is not None and type(dim) is not int and not dim):
        raise NotANetworkError("a variance goes over no dimensions")
    less = float(correction) if correction is not None else 1.0 if unbiased is None else float(unbiased)
    value, dims = read.data(x), _dims_given(dim)
    mean = read.add(None, "mean", {"input": [value]}, dims=dims, keepdim=True)
    rest = read.add(None, "binary", {"input": [value], "other": [mean]}, function="sub")
    squares = read.add(None, "binary", {"input": [rest], "other": [rest]}, function="mul")
    return read.add(node, "mean", {"input": [squares]}, dims=dims, keepdim=bool(keepdim), correction=less)


@row(torch.amax, "amax")
def _amax(read: Reader, node: Node, x: Any, dim: Any = (), keepdim: bool = False) -> None:
    read.add(node, "amax", {"input": [read.data(x)]}, dims=_dims_given(dim), keepdim=bool(keepdim))


@row(torch.amin, "amin")
def _amin(read: Reader, node: Node, x: Any, dim: Any = (), keepdim: bool = False) -> None:
    _add_smallest(read, node, x, _dims_given(dim), keepdim, "even")


def _add_smallest(read: Reader, node: Node | None, x: Any, dims: Sequence[int], keepdim: bool, ties: str) -> Value:
    negative = read.add(None, "binary", {"input": [read.data(x)]}, function="mul", number=-1.0)
    largest = read.add(None, "amax", {"input": [negative]}, dims=list(dims), keepdim=bool(keepdim), ties=ties)
    smallest = read.add(node, "binary", {"input": [largest]}, function="mul", number=-1.0)
    read.saved.add(smallest)
    return smallest


@row(torch.cumsum, "cumsum")
def _cumsum(read: Reader, node: Node, x: Any, dim: Any, *, dtype: Any = None) -> None:
    _check_dtype(dtype)
    if type(dim) is not int:
        raise NotANetworkError("a sum goes along a dimension that a call gives")
    read.add(node, "cumsum", {"input": [read.data(x)]}, dim=dim)


@row(torch.logsumexp, "logsumexp")
def _logsumexp(read: Reader, node: Node, x: Any, dim: Any, keepdim: bool = False) -> None:
    value, dims = read.data(x), _dims_given(dim)
    if not dims:
        raise NotANetworkError("a logarithm of a sum goes over no dimension")
    largest = read.add(None, "amax", {"input": [value]}, dims=dims, keepdim=True)
    # An infinite maximum is replaced by a finite one, since infinity minus infinity is NaN.
    if read.dtype() is None:
        raise NotANetworkError("the dtype of a logarithm of a sum is not known")
    most = 3e38 if read.dtype() is not torch.float64 else 1.7e308
    largest = read.add(None, "clamp", {"input": [largest]}, min=-most, max=most)
    rest = read.add(None, "binary", {"input": [value], "other": [largest]}, function="sub")
    powers = read.add(None, "activation", {"input": [rest]}, activation="exp")
    sums = read.add(None, "mean", {"input": [powers]}, dims=dims, keepdim=True, sums=True)
    logarithm = read.add(None, "unary", {"input": [sums]}, function="log")
    value = read.add(None, "binary", {"input": [logarithm], "other": [largest]}, function="add")
    # (The dimensions have one element now, and a mean over them takes them away.)
    read.values[node] = value if keepdim else read.add(None, "mean", {"input": [value]}, dims=dims)


@row(torch.max, "max")
def _max(read: Reader, node: Node, x: Any, dim: Any = None, keepdim: bool = False) -> None:
    """The largest elements of a dimension. Their places, the second result, are no value of a network. Or the larger of
    two tensors' elements."""
    if isinstance(dim, Node):
        return _add_extreme(read, node, x, dim, "maximum")
    _check_one_dimension(node, dim)
    value = read.add(None, "amax", {"input": [read.data(x)]}, dims=[dim], keepdim=bool(keepdim), ties="first")
    read.parts[node] = [value]


@row(torch.min, "min")
def _min(read: Reader, node: Node, x: Any, dim: Any = None, keepdim: bool = False) -> None:
    if isinstance(dim, Node):
        return _add_extreme(read, node, x, dim, "minimum")
    _check_one_dimension(node, dim)
    read.parts[node] = [_add_smallest(read, None, x, [dim], keepdim, "first")]


@row(torch.maximum, torch.minimum, "maximum", "minimum")
def _maximum_or_minimum(read: Reader, node: Node, x: Any, y: Any) -> None:
    _add_extreme(read, node, x, y, name_of_target(node))


def _add_extreme(read: Reader, node: Node, x: Any, y: Any, function: str) -> None:
    """Of each pair of elements the larger one ("maximum") or the smaller one ("minimum")."""
    read.add(node, "binary", {"input": [read.data(x)], "other": [read.data(y)]}, function=function)


def _check_one_dimension(node: Node, dim: Any) -> None:
    if type(dim) is not int:
        raise NotANetworkError("a maximum or minimum is of a whole tensor")
    if not only_first_is_taken(node):
        raise NotANetworkError("the places of a maximum or minimum are read")


@row(operator.matmul, torch.matmul, torch.bmm, torch.mm, "matmul", "bmm", "mm")
def _matmul(read: Reader, node: Node, x: Any, y: Any) -> None:
    first, second = read.data(x), read.data(y)
    if node.target in (torch.mm, "mm"):  # matmul takes any number of dimensions
        first, second = (_checked(read, one, [-1, -1]) for one in (first, second))
    elif node.target in (torch.bmm, "bmm"):
        first = _checked(read, first, [-1, -1, -1])
        second = _checked(read, second, ["0.0", -1, -1], first)
    read.add(node, "matmul", {"input": [first], "other": [second]})


@row(F.bilinear)
def _bilinear(read: Reader, node: Node, x1: Any, x2: Any, weight: Any, bias: Any = None) -> None:
    _add_bilinear(read, node, read.data(x1), read.data(x2), [read.value(weight)], read.optional(bias))


@module_row(nn.Bilinear)
def _bilinear_module(read: Reader, node: Node, module: Any, x1: Any, x2: Any) -> None:
    _add_bilinear(read, node, read.data(x1), read.data(x2), read.own(module, "weight"), read.own(module, "bias"))
    read.note(module)


def _add_bilinear(read: Reader, node: Node, x1: Value, x2: Value, weight: list[Value], bias: list[Value]) -> None:
    """The second operand goes through a linear layer that has an output for each pair of an output and a feature of the
    first operand; then each output is a product of two vectors."""
    # The operands must be matrices of as many rows. (Torch broadcasts no others.)
    x1 = read.add(None, "check_sizes", {"input": [x1], "like": [x2]}, sizes=["0.0", -1])
    outputs, first = weight[0].sizes[:2]
    rows = read.add(None, "flatten", {"input": weight}, start_dim=0, end_dim=1)
    turned = read.add(None, "transpose", {"input": [rows]}, first=0, second=1)
    of_pairs = read.add(None, "matmul", {"input": [x2], "other": [turned]})
    of_pairs = read.add(None, "unflatten", {"input": [of_pairs]}, dim=-1, sizes=[outputs, first])
    column = read.add(None, "unsqueeze", {"input": [x1]}, dim=-1)
    products = read.add(None, "matmul", {"input": [of_pairs], "other": [column]})
    value = read.add(None, "squeeze", {"input": [products]}, dim=-1)
    if bias:
        value = read.add(None, "binary", {"input": [value], "other": bias}, function="add")
    read.values[node] = value


@row(torch.inner, "inner")
def _inner(read: Reader, node: Node, x: Any, y: Any) -> None:
    turned = read.add(None, "permute", {"input": [read.data(y)]}, dims=[1, 0])  # (which refuses all but matrices)
    read.add(node, "matmul", {"input": [read.data(x)], "other": [turned]})


@row(torch.addmm, torch.baddbmm, "addmm", "baddbmm")
def _addmm(read: Reader, node: Node, x: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1) -> None:
    if beta != 1 or alpha != 1:
        raise NotANetworkError("a sum has a factor")
    batch = ["0.0"] if node.target in (torch.baddbmm, "baddbmm") else []
    first = _checked(read, read.data(left), [-1, -1, *[-1] * len(batch)])
    second = _checked(read, read.data(right), [*batch, -1, -1], first if batch else None)
    product = read.add(None, "matmul", {"input": [first], "other": [second]})
    total = read.add(None, "binary", {"input": [product], "other": [read.data(x)]}, function="add")
    read.values[node] = _checked(read, total, [f"0.{dim}" for dim in range(2 + len(batch))], product)


@row(F.cosine_similarity)
def _cosine_similarity(read: Reader, node: Node, x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> None:
    if not eps >= 0:
        raise NotANetworkError("a cosine's epsilon is below zero")
    directions = []
    second = read.data(x2)
    # torch takes norms of the tensors that it has expanded. (Where the second is the smaller one, the network refuses.)
    first = read.add(None, "expand", {"input": [read.data(x1)], "like": [second]})
    for value in (first, second):
        norm = _add_norm(read, None, value, 2, [dim], True)
        least = read.add(None, "clamp", {"input": [norm]}, min=float(eps))
        # As in torch, the gradient of a norm below epsilon is that of the norm: what makes it larger is a constant.
        more = read.add(None, "binary", {"input": [least], "other": [norm]}, function="sub")
        more = read.add(None, "detach", {"input": [more]})
        norm = read.add(None, "binary", {"input": [norm], "other": [more]}, function="add")
        directions.append(read.add(None, "binary", {"input": [value], "other": [norm]}, function="div"))
    products = read.add(None, "binary", {"input": directions[:1], "other": directions[1:]}, function="mul")
    read.add(node, "mean", {"input": [products]}, dims=[dim], sums=True)


@module_row(nn.CosineSimilarity)
def _cosine_similarity_module(read: Reader, node: Node, module: Any, x1: Any, x2: Any) -> None:
    _cosine_similarity(read, node, x1, x2, module.dim, module.eps)
    read.note(module, "dim", "eps")


@row("detach", torch.detach, detached)
def _detach(read: Reader, node: Node, x: Any) -> None:
    read.add(node, "detach", {"input": [read.data(x)]})


_EINSUM = re.compile(r"[A-Za-z ]+,[A-Za-z ]+(->[A-Za-z ]*)?")  # of two tensors, without an ellipsis


@row(torch.einsum)
def _einsum(read: Reader, node: Node, equation: Any, *given: Any) -> None:
    operands = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    if not isinstance(equation, str) or not _EINSUM.fullmatch(equation) or len(operands) != 2:
        raise NotANetworkError("an einsum is of other than two tensors, or has an ellipsis")
    left, arrow, result = equation.replace(" ", "").partition("->")
    names = left.split(",")
    letters = "".join(names)
    if not arrow:
        result = "".join(sorted(one for one in set(letters) if letters.count(one) == 1))
    if not all(len(set(name)) == len(name) > 0 for name in (*names, result or "a")) or not set(result) <= set(letters):
        raise NotANetworkError("an einsum has a diagonal")
    first, second = map(read.data, operands)
    first = _checked(read, first, [-1] * len(names[0]))
    second = _checked(read, second, [f"0.{names[0].index(one)}" if one in names[0] else -1 for one in names[1]], first)
    kept = [result + name for name in names[::-1]]
    _add_product(read, node, [_summed(read, *one) for one in zip((first, second), names, kept, strict=True)], result)


def _checked(read: Reader, value: Value, sizes: Sequence[Any], like: Value | None = None) -> Value:
    """The value, which must have as many dimensions as there are sizes, and these sizes where they are not -1."""
    inputs = {"input": [value], "like": [like] if like else []}
    return read.add(None, "check_sizes", inputs, sizes=list(sizes))


def _summed(read: Reader, value: Value, name: str, kept: str) -> tuple[Value, str]:
    """Sums over the dimensions of an einsum's operand that nothing else has."""
    alone = [dim for dim, letter in enumerate(name) if letter not in kept]
    if alone:
        value = read.add(None, "mean", {"input": [value]}, dims=alone, sums=True)
    return value, "".join(letter for letter in name if letter in kept)


def _arranged(read: Reader, value: Value, name: str, order: str) -> Value:
    """Brings dimensions into an order, in which "1" is a dimension of one element that is not there yet."""
    letters = [letter for letter in order if letter != "1"]
    if letters != list(name):
        value = read.add(None, "permute", {"input": [value]}, dims=[name.index(letter) for letter in letters])
    for dim, letter in enumerate(order):
        if letter == "1":
            value = read.add(None, "unsqueeze", {"input": [value]}, dim=dim)
    return value


def _add_product(read: Reader, node: Node, values: Sequence[tuple[Value, str]], result: str) -> None:
    """Adds an einsum of two operands: a product of matrices whose rows are dimensions of the first alone and whose
    columns are dimensions of the second alone; or, where one has no such dimension, products and a sum."""
    (first, a), (second, b) = values
    batch = "".join(letter for letter in a if letter in b and letter in result)
    summed = "".join(letter for letter in a if letter in b and letter not in result)
    rows, columns = ("".join(one for one in own if one not in other) for own, other in ((a, b), (b, a)))
    if summed and rows and columns:
        # All but the last of the rows, and of the columns, are dimensions of the batch that the other operand lacks.
        ahead, behind = rows[:-1], columns[:-1]
        lefts = batch + ahead + "1" * len(behind) + rows[-1] + summed
        rights = batch + "1" * len(ahead) + behind + summed + columns[-1]
        left, right = _arranged(read, first, a, lefts), _arranged(read, second, b, rights)
        if len(summed) > 1:
            at = len(rights) - len(summed) - 1
            left = read.add(None, "flatten", {"input": [left]}, start_dim=-len(summed))
            right = read.add(None, "flatten", {"input": [right]}, start_dim=at, end_dim=at + len(summed) - 1)
        value = read.add(None, "matmul", {"input": [left], "other": [right]})
        name = batch + ahead + behind + rows[-1] + columns[-1]
    else:
        name = batch + rows + columns + summed
        left = _arranged(read, first, a, batch + rows + "1" * len(columns) + summed)
        right = _arranged(read, second, b, batch + "1" * len(rows) + columns + summed)
        value = read.add(None, "binary", {"input": [left], "other": [right]}, function="mul")
        if summed:
            value = read.add(None, "mean", {"input": [value]}, dims=[-1 - i for i in range(len(summed))], sums=True)
        name = name[: len(name) - len(summed)]
    read.values[node] = _arranged(read, value, name, result)
