"""How views, indices, concatenations and splits are layers of a network, and the sizes that a forward asks for."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from fastnn.graph.order import unpack
from fastnn.graph.reader import (
    NotANetworkError,
    Reader,
    Size,
    each_dimension,
    module_row,
    only_first_is_taken,
    only_user,
    row,
)
from fastnn.network_program import Line, Value
from fastnn.nn._hooks import layer_forward

# ---- other orders of elements ---------------------------------------------------------------------------------------


@row(torch.flip)
def _flip(read: Reader, node: Node, x: Any, dims: Any) -> None:
    read.add(node, "flip", {"input": [read.data(x)]}, dims=_integers(dims))


@row("flip")
def _flip_method(read: Reader, node: Node, x: Any, *given: Any, dims: Any = None) -> None:
    """The method takes numbers one by one, too."""
    if not given and dims is None:
        raise NotANetworkError("flip has no dimensions")
    _flip(read, node, x, dims if not given else given if type(given[0]) is int else given[0])


@row(torch.roll, "roll")
def _roll(read: Reader, node: Node, x: Any, shifts: Any, dims: Any = None) -> None:
    if dims is None or dims == ():
        raise NotANetworkError("a tensor is rotated as if it were flat")
    every = [[one] if type(one) is int else one for one in (shifts, dims)]
    read.add(node, "roll", {"input": [read.data(x)]}, shifts=_integers(every[0]), dims=_integers(every[1]))


def _integers(given: Any) -> list[int]:
    if not all(type(one) is int for one in given):
        raise NotANetworkError("a call's numbers depend on sizes")
    return list(given)


@row(F.channel_shuffle)
def _channel_shuffle(read: Reader, node: Node, x: Any, groups: int) -> None:
    if type(groups) is not int or groups < 1:
        raise NotANetworkError("the groups of a channel shuffle are no number")
    read.add(node, "channel_shuffle", {"input": [read.data(x)]}, groups=groups)


@module_row(nn.ChannelShuffle)
def _channel_shuffle_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    _channel_shuffle(read, node, x, module.groups)
    read.note(module, "groups")


_OTHER_SIZES = ("view", "reshape", "flatten", "ravel")  # methods by which an index is given other sizes
_MOST_INDICES = 4096  # each call compares them with what they were


def indices_held_by(module: nn.Module, name: str) -> tuple[Any, ...] | None:
    """The sizes and the numbers of a buffer of indices; None where it is none, or has too many for a network."""
    held = module._buffers.get(name)
    if type(held) is not Tensor or held.dtype != torch.int64 or held.device.type != "cpu":
        return None
    return (tuple(held.shape), *held.flatten().tolist()) if 0 < held.numel() <= _MOST_INDICES else None


def _indices(read: Reader, given: Any) -> tuple[tuple[int, ...], list[int]]:
    """The sizes of an index and its numbers: a list that the forward gives, or a buffer, which each call compares."""
    if isinstance(given, (list, tuple)) and given:
        return (len(given),), _integers(given)
    if isinstance(given, Node) and given.target in _OTHER_SIZES and not given.kwargs:
        if not all(type(one) is int or isinstance(one, (tuple, list)) for one in given.args[1:]):
            raise NotANetworkError("an index is viewed as another dtype")
        sizes, numbers = _indices(read, given.args[0])
        try:  # torch itself says which sizes these then are
            seen = getattr(torch.tensor(numbers).view(sizes), str(given.target))(*given.args[1:])
        except RuntimeError as error:
            raise NotANetworkError("an index is given other sizes that do not fit") from error
        return tuple(seen.shape), numbers
    if isinstance(given, Node) and given in read.tensors:
        held, name = read.tensors[given]
        module = next((one for one in read.modules.values() if one._buffers is held), None)
        known = None if module is None else indices_held_by(module, name)
        if module is not None and known is not None:
            read.guard.note_call(indices_held_by, (module, name), known)
            return known[0], list(known[1:])
    raise NotANetworkError("an index is computed from something else")


@row(torch.index_select, "index_select")
def _index_select(read: Reader, node: Node, x: Any, dim: Any, index: Any) -> None:
    if type(dim) is not int or not isinstance(index, Node):
        raise NotANetworkError("a dimension depends on sizes, or an index is no tensor")
    if dim == 0 and _is_given(read, index):
        return _gather_rows(read, node, read.data(x), index, rank=1)
    sizes, numbers = _indices(read, index)
    if len(sizes) != 1 or min(numbers) < 0:
        raise NotANetworkError("an index is no row of numbers")
    read.add(node, "index_select", {"input": [read.data(x)]}, dim=dim, index=numbers)


def _is_given(read: Reader, index: Any) -> bool:
    """Whether an index is what a network is given, such as an input, and no buffer, whose numbers the program has."""
    root = index
    while isinstance(root, Node) and root.target in _OTHER_SIZES:
        root = root.args[0]
    return isinstance(index, Node) and root not in read.tensors and read.values.get(index) in read.given


def _gather_rows(read: Reader, node: Node, value: Value, index: Node, *, rank: int = 0) -> None:
    """x[index], of numbers that are not below zero. rank: how many dimensions the index must have; 0 for any."""
    inputs = {"places": [_given_numbers(read, index)], "input": [value]}
    read.add(node, "gather_rows", inputs, rank=rank)


def _given_numbers(read: Reader, index: Node) -> Value:
    if read.is_boolean(index):
        raise NotANetworkError("an index chooses by booleans")
    return read.whole_numbers(read.value(index))


@row(torch.gather, "gather")
def _gather(read: Reader, node: Node, x: Any, dim: Any, index: Any, *, sparse_grad: bool = False) -> None:
    """Of each row of a matrix the element that a column of numbers says."""
    if dim not in (1, -1) or not isinstance(index, Node) or sparse_grad:
        raise NotANetworkError("elements are gathered along another dimension than the second")
    inputs = {"places": [_given_numbers(read, index)], "input": [read.data(x)]}
    read.add(node, "pick", inputs, wraps=False, keepdim=True)


@row(torch.index_add, "index_add", "index_add_")
def _index_add(read: Reader, node: Node, x: Any, dim: Any, index: Any, source: Any, *, alpha: Any = 1) -> None:
    if dim != 0 or alpha != 1 or not isinstance(index, Node):
        raise NotANetworkError("rows are added with a factor, or along another dimension than the first")
    places = _given_numbers(read, index)
    read.add(node, "add_rows", {"places": [places], "input": [read.data(x)], "source": [read.data(source)]})


def _add_index(read: Reader, value: Value, dim: int, indices: Sequence[Any]) -> tuple[Value, int]:
    """Adds an index of several numbers in each of some neighbouring dimensions -> the value, and how many dimensions
    have come in their place."""
    every = [_indices(read, one) for one in indices]
    sizes = every[0][0]
    if any(other != sizes for other, _ in every):
        raise NotANetworkError("indices are broadcast")
    numbers = [one for _, of_dimension in every for one in of_dimension]
    value = read.add(None, "index_select", {"input": [value]}, dim=dim, dims=len(every), index=numbers)
    if len(sizes) != 1:
        place = dim + len(every) - 1 if dim < 0 else dim
        kind, more = ("unflatten", {"sizes": list(sizes)}) if sizes else ("squeeze", {})
        value = read.add(None, kind, {"input": [value]}, dim=place, **more)
    return value, len(sizes)


# ---- what moves elements --------------------------------------------------------------------------------------------


@row(torch.ravel, "ravel")
def _ravel(read: Reader, node: Node, x: Any) -> None:
    _flatten(read, node, x)


@row(torch.flatten, "flatten")
def _flatten(read: Reader, node: Node, x: Any, start_dim: int = 0, end_dim: int = -1) -> None:
    read.add(node, "flatten", {"input": [read.data(x)]}, start_dim=start_dim, end_dim=end_dim)


@row(torch.unflatten, "unflatten")
def _unflatten(read: Reader, node: Node, x: Any, dim: int, sizes: Any) -> None:
    read.add(node, "unflatten", {"input": [read.data(x)]}, dim=dim, sizes=each_dimension(sizes, len(sizes)))


@module_row(nn.Unflatten)
def _unflatten_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    sizes = module.unflattened_size
    read.add(node, "unflatten", {"input": [read.data(x)]}, dim=module.dim, sizes=each_dimension(sizes, len(sizes)))
    read.note(module, "dim", "unflattened_size")


@row("view", "reshape", torch.reshape)
def _view(read: Reader, node: Node, x: Any, *sizes: Any, **named: Any) -> None:
    if named or not sizes or any(isinstance(one, torch.dtype) for one in sizes):
        raise NotANetworkError("a view is of another dtype")
    written, like = write_sizes(read, sizes)
    read.add(node, "reshape", {"input": [read.data(x)], "like": like}, sizes=written)


def write_sizes(read: Reader, sizes: Sequence[Any]) -> tuple[list[Any], list[Value]]:
    """Sizes that a call gives, one by one or in a tuple, as a program has them -> these, and the values `like`."""
    asked = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    written: list[Any] = []
    like: list[Value] = []
    for size in asked:
        known = read.sizes.get(size) if isinstance(size, Node) else None
        if known is not None:
            factors = [str(known.factor)] if known.factor != 1 or not known.dimensions else []
            for value_of, dim in known.dimensions:
                if value_of not in like:
                    like.append(value_of)
                factors.append(f"{like.index(value_of)}.{dim}")
            divided = f"/{known.divisor}" if known.divisor != 1 else ""
            written.append("*".join(factors) + divided)
        elif type(size) is int:
            written.append(size)
        else:
            raise NotANetworkError("a tensor's sizes are computed")
    return written, like


def size_value(read: Reader, node: Node, power: float = 1.0) -> Value:
    """A power of a size, as a number that a network computes with."""
    written, like = write_sizes(read, (node,))
    return read.add(None, "size", {"like": like}, sizes=written, power=float(power))


@row("view_as", "reshape_as")
def _view_as(read: Reader, node: Node, x: Any, other: Any) -> None:
    read.add(node, "reshape", {"input": [read.data(x)], "like": [read.value(other)]})


@row("expand", "broadcast_to", torch.broadcast_to)
def _expand(read: Reader, node: Node, x: Any, *sizes: Any) -> None:
    written, like = write_sizes(read, sizes)
    read.add(node, "expand", {"input": [read.data(x)], "like": like}, sizes=written)


@row("expand_as")
def _expand_as(read: Reader, node: Node, x: Any, other: Any) -> None:
    read.add(node, "expand", {"input": [read.data(x)], "like": [read.value(other)]})


@row("repeat")
def _repeat(read: Reader, node: Node, x: Any, *sizes: Any) -> None:
    written, like = write_sizes(read, sizes)
    read.add(node, "repeat", {"input": [read.data(x)], "like": like}, sizes=written)


@row(torch.zeros)
def _zeros(read: Reader, node: Node, *sizes: Any, **named: Any) -> None:
    _note_constant(read, node, sizes, 0.0, **named)


@row(torch.ones)
def _ones(read: Reader, node: Node, *sizes: Any, **named: Any) -> None:
    _note_constant(read, node, sizes, 1.0, **named)


@row("new_zeros")
def _new_zeros(read: Reader, node: Node, x: Any, *sizes: Any, **named: Any) -> None:
    _note_constant(read, node, sizes, 0.0, read.data(x), **named)


@row("new_ones")
def _new_ones(read: Reader, node: Node, x: Any, *sizes: Any, **named: Any) -> None:
    _note_constant(read, node, sizes, 1.0, read.data(x), **named)


@row("new_full")
def _new_full(read: Reader, node: Node, x: Any, size: Any, fill_value: Any, **named: Any) -> None:
    _note_constant(read, node, size, fill_value, read.data(x), **named)


@row(torch.zeros_like)
def _zeros_like(read: Reader, node: Node, x: Any, **named: Any) -> None:
    _note_constant(read, node, None, 0.0, read.data(x), **named)


@row(torch.ones_like)
def _ones_like(read: Reader, node: Node, x: Any, **named: Any) -> None:
    _note_constant(read, node, None, 1.0, read.data(x), **named)


@row(torch.full_like)
def _full_like(read: Reader, node: Node, x: Any, fill_value: Any, **named: Any) -> None:
    _note_constant(read, node, None, fill_value, read.data(x), **named)


def _note_constant(
    read: Reader, node: Node, sizes: Any, number: Any, like: Value | None = None, /, *, dtype: Any = None,
    device: Any = None, **others: Any
) -> None:  # fmt: skip
    """Notes a tensor that is full of a number."""
    if type(number) not in (int, float) or not isfinite(number):
        raise NotANetworkError("a constant has settings that no network knows")
    inputs, attributes = sizes_of_constant(
        read, sizes, like, dtype=dtype, device=device, takes_first_sizes=False, **others
    )
    read.constants[node] = inputs, {**attributes, "value": float(number)}


def sizes_of_constant(
    read: Reader, sizes: Any, like: Value | None, /, *, dtype: Any = None, device: Any = None,
    takes_first_sizes: bool = True, **others: Any
) -> tuple[dict[str, list[Value]], dict[str, Any]]:  # fmt: skip
    """The inputs and attributes that give a line these sizes, or without them the sizes of `like`. The dtype is that of
    `like`, or the model's. takes_first_sizes: whether the line has the attribute `keeps`."""
    if others:
        raise NotANetworkError("a constant has settings that no network knows")
    if not (device is None or isinstance(device, Node) or torch.device(device).type == "cpu"):
        raise NotANetworkError(f"a constant lies on {device}")
    if dtype is None and like is None:
        dtype = torch.get_default_dtype()
    if not (dtype is None or isinstance(dtype, Node)) and dtype != read.dtype():
        raise NotANetworkError(f"a constant is of {dtype}")
    if sizes is None:
        return {"like": [like] if like else []}, {}
    if takes_first_sizes and len(sizes) == 1 and isinstance(sizes[0], Node) and sizes[0] in read.first_sizes:
        value, count = read.first_sizes[sizes[0]]
        return {"like": [value]}, {"keeps": count}
    written, known = write_sizes(read, sizes)
    return {"like": known}, {"sizes": written}


@row(torch.squeeze, "squeeze")
def _squeeze(read: Reader, node: Node, x: Any, dim: Any = "every") -> None:
    if dim == "every":
        read.add(node, "squeeze", {"input": [read.data(x)]}, every=True)
        return
    if type(dim) is not int:
        raise NotANetworkError("squeeze takes away several dimensions")
    read.add(node, "squeeze", {"input": [read.data(x)]}, dim=dim)


@row(torch.unsqueeze, "unsqueeze")
def _unsqueeze(read: Reader, node: Node, x: Any, dim: int) -> None:
    if x in read.ranges:
        return _note_range_with_one(read, node, x)
    read.add(node, "unsqueeze", {"input": [read.data(x)]}, dim=dim)


@row(torch.transpose, "transpose", torch.swapaxes, "swapaxes", torch.swapdims, "swapdims")
def _transpose(read: Reader, node: Node, x: Any, first: int, second: int) -> None:
    read.add(node, "transpose", {"input": [read.data(x)]}, first=first, second=second)


@row(torch.movedim, "movedim", torch.moveaxis, "moveaxis")
def _movedim(read: Reader, node: Node, x: Any, source: Any, destination: Any) -> None:
    """A dimension moves as it changes places with its neighbours, one by one."""
    are_numbers = type(source) is int and type(destination) is int
    if not are_numbers or (source < 0) != (destination < 0) or source == destination:
        raise NotANetworkError("a dimension stays, or moves to a place that depends on how many there are")
    value, step = read.data(x), 1 if source < destination else -1
    for dim in range(source, destination, step):
        value = read.add(None, "transpose", {"input": [value]}, first=dim, second=dim + step)
    read.values[node] = value


@row(torch.narrow, "narrow")
def _narrow(read: Reader, node: Node, x: Any, dim: Any, start: Any, length: Any) -> None:
    if not all(type(one) is int for one in (dim, start, length)) or start < 0 or length < 1:
        raise NotANetworkError("a part of a dimension depends on sizes")
    read.values[node] = slice_to_size(read, read.data(x), dim, start, start + length, fits=True)


@row("unfold")
def _windows(read: Reader, node: Node, x: Any, dimension: Any, size: Any, step: Any) -> None:
    """Windows of one of the last two dimensions, whose elements come last."""
    if not all(type(one) is int for one in (dimension, size, step)) or dimension not in (-1, -2):
        raise NotANetworkError("windows are of a dimension that is counted from the first")
    if size < 1 or step < 1:
        raise NotANetworkError("windows are empty, or have no step")
    value = read.add(None, "windows", {"input": [read.data(x)]}, dim=dimension, size=size, step=step)
    value = read.add(None, "unflatten", {"input": [value]}, dim=dimension, sizes=[-1, size])
    if dimension == -2:
        value = read.add(None, "transpose", {"input": [value]}, first=-1, second=-2)
    read.values[node] = value


@row(torch.t, "t")
def _turn(read: Reader, node: Node, x: Any) -> None:
    read.add(node, "permute", {"input": [read.data(x)]}, dims=[1, 0])  # (which refuses other numbers of dimensions)


@row(torch.permute, "permute")
def _permute(read: Reader, node: Node, x: Any, *dims: Any) -> None:
    given = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    read.add(node, "permute", {"input": [read.data(x)]}, dims=list(given))


@row(torch.clone, "clone")
def _clone(read: Reader, node: Node, x: Any) -> None:
    # A product with 1 lies in memory as x does, and so does torch's copy. (What "contiguous" gives would not.)
    read.add(node, "binary", {"input": [read.data(x)]}, function="mul", number=1.0)


@row("contiguous")
def _contiguous(read: Reader, node: Node, x: Any) -> None:
    read.add(node, "contiguous", {"input": [read.data(x)]})


@module_row(nn.Flatten)
def _flatten_module(read: Reader, node: Node, module: Any, x: Any) -> None:
    _flatten(read, node, x, module.start_dim, module.end_dim)
    read.note(module, "start_dim", "end_dim")


@row(torch.cat, torch.concat)
def _cat(read: Reader, node: Node, parts: Any, dim: int = 0) -> None:
    read.add(node, "cat", {"inputs": [read.data(one) for one in parts]}, dim=dim)


@row(torch.stack)
def _stack(read: Reader, node: Node, parts: Any, dim: int = 0) -> None:
    values = [read.add(None, "unsqueeze", {"input": [read.data(one)]}, dim=dim) for one in parts]
    read.add(node, "cat", {"inputs": values}, dim=dim)


@row(torch.chunk, "chunk")
def _chunk(read: Reader, node: Node, x: Any, chunks: int, dim: int = 0) -> None:
    _add_split(read, node, x, dim, chunks=chunks)


@row(torch.split, "split")
def _split(read: Reader, node: Node, x: Any, size: Any, dim: int = 0) -> None:
    places: list[Any] = [user.args[1] if user.target is operator.getitem else None for user in node.users]
    if type(size) is int and size > 0 and places and all(type(place) is int and place >= 0 for place in places):
        # A part that is not whole, or not there, is refused: torch then gives it, or raises.
        read.parts[node] = {
            place: slice_to_size(read, read.data(x), dim, place * size, (place + 1) * size, fits=True)
            for place in dict.fromkeys(places)
        }
    elif type(size) is int:
        _add_split(read, node, x, dim, size=size)
    else:
        _add_split(read, node, x, dim, sizes=list(size))


@row(torch.unbind, "unbind")
def _unbind(read: Reader, node: Node, x: Any, dim: int = 0) -> None:
    takes_parts = all(user.target is operator.getitem and type(user.args[1]) is int for user in node.users)
    if not node.users or not takes_parts:
        return _add_split(read, node, x, dim, unbind=True)
    places = dict.fromkeys(user.args[1] for user in node.users)
    read.parts[node] = {
        place: read.add(None, "select", {"input": [read.data(x)]}, dim=dim, index=place) for place in places
    }


def _add_split(read: Reader, node: Node, x: Any, dim: int, **attributes: Any) -> None:
    """Adds a split. There are as many parts as the model unpacks, or as the call names."""
    count = attributes.get("chunks") or len(attributes.get("sizes", ()))
    unpacked = only_user(node)
    if unpacked is not None and unpacked.target is unpack:
        count = int(unpacked.args[1])  # type: ignore[arg-type]
    if not count:
        raise NotANetworkError("a tensor is split into parts whose number depends on its sizes")
    parts = [Value(()) for _ in range(count)]
    read.lines.append(Line("split", {"input": [read.data(x)]}, parts, {"dim": dim, **attributes}))
    read.parts[node] = parts


# ---- sizes and parts ------------------------------------------------------------------------------------------------


@row("size")
def _size(read: Reader, node: Node, x: Any, dim: Any = None) -> None:
    if dim is None:
        read.shapes[node] = read.value(x)
    else:
        _add_size(read, node, read.value(x), dim)


@row("dim", "ndimension")
def _rank(read: Reader, node: Node, x: Any) -> None:
    read.ranks[node] = read.value(x), 0


@row(getattr)
def _attribute(read: Reader, node: Node, x: Any, name: str) -> None:
    if name == "shape":
        read.shapes[node] = read.value(x)
    elif name == "values" and x.target in (torch.max, "max", torch.min, "min") and x in read.parts:
        read.values[node] = read.parts[x][0]
    elif name == "mT":
        read.add(node, "transpose", {"input": [read.data(x)]}, first=-2, second=-1)
    elif name == "T":
        _turn(read, node, x)
    elif name == "ndim":
        read.ranks[node] = read.value(x), 0
    elif name == "data":
        read.add(node, "detach", {"input": [read.data(x)]})
    elif name not in ("device", "dtype"):
        raise NotANetworkError(f"the model asks a tensor for {name}")


def _add_size(read: Reader, node: Node, value: Value, dim: Any) -> None:
    if type(dim) is not int:
        raise NotANetworkError("the model asks for several sizes at once")
    read.sizes[node] = Size(((value, dim),))


@row(unpack)
def _unpack(read: Reader, node: Node, whole: Any, count: int) -> None:
    if whole in read.shapes:
        read.shapes[node] = read.shapes[whole]
    elif whole in read.parts and (len(read.parts[whole]) == count or only_first_is_taken(node)):
        read.parts[node] = read.parts[whole]
    elif whole in read.values:  # a tensor, of which each part is an index of its first dimension
        parts = [Value(()) for _ in range(count)]
        read.lines.append(Line("split", {"input": [read.data(whole)]}, parts, {"dim": 0, "unbind": True}))
        read.parts[node] = parts
    else:
        raise NotANetworkError("the model unpacks something that is no tensor")


@row(torch.arange)
def _arange(
    read: Reader, node: Node, start: Any, end: Any = None, step: Any = 1, *, dtype: Any = None, device: Any = None
) -> None:
    size = start if end is None else end
    from_zero = end is None or (type(start) is int and start == 0)
    if step != 1 or not from_zero or not (type(size) is int or size in read.sizes) or dtype not in (None, torch.int64):
        raise NotANetworkError("numbers begin behind 0, have a step, or an end that is no size")
    if not all(_takes_numbers(read, user) or _puts_one_in_front(user) or _picks(user) for user in node.users):
        raise NotANetworkError("numbers in a row go to more than embeddings")
    read.ranges[node] = size, False


def _puts_one_in_front(node: Node) -> bool:
    """Whether a node is `unsqueeze(0)`, or an index of None."""
    if node.target in (torch.unsqueeze, "unsqueeze"):
        return bool(node.args[1:] == (0,) or node.kwargs.get("dim") == 0)
    return node.target is operator.getitem and node.args[1] in (None, (None,), (None, slice(None)))


def _note_range_with_one(read: Reader, node: Node, x: Node) -> None:
    size, has_one_in_front = read.ranges[x]
    if has_one_in_front or not _puts_one_in_front(node) or not all(_takes_numbers(read, user) for user in node.users):
        raise NotANetworkError("numbers in a row go to more than embeddings")
    read.ranges[node] = size, True


def slice_to_size(read: Reader, value: Value, dim: int, start: int, stop: Any, **attributes: Any) -> Value:
    """The elements of a dimension from `start` up to a size, which is a number or follows from other values'."""
    if type(stop) is int:
        return read.add(None, "slice", {"input": [value]}, dim=dim, start=start, stop=stop, **attributes)
    written, like = write_sizes(read, (stop,))
    return read.add(None, "slice", {"input": [value], "like": like}, dim=dim, start=start, sizes=written, **attributes)


def _takes_numbers(read: Reader, node: Node) -> bool:
    """Whether a node is an embedding."""
    if node.op == "call_module":
        return layer_forward(read.modules[str(node.target)]) in (nn.Embedding.forward, nn.EmbeddingBag.forward)
    return node.target is F.embedding


@row(operator.getitem)
def _index(read: Reader, node: Node, whole: Any, index: Any) -> None:
    if whole in read.shapes:
        if isinstance(index, slice) and type(index.start) is int and index.stop is None and index.step is None:
            read.tails[node] = read.shapes[whole], index.start
            return None
        return _add_size(read, node, read.shapes[whole], index)
    if whole in read.ranges:
        return _note_range_with_one(read, node, whole)
    if whole in read.parts:
        part = read.parts[whole][index]
        if isinstance(part, list):
            read.parts[node] = part
        else:
            read.values[node] = part
        return
    steps = list(index) if isinstance(index, tuple) else [index]
    if node.users and all(_takes_numbers(read, user) for user in node.users):  # x[:, 2]
        *before, place = steps
        if type(place) is int and all(one == slice(None) for one in before):
            read.columns[node] = read.value(whole), len(before), place
            return
    value = read.data(whole)
    dim = 0
    if _picks(node) and not any(one in read.tensors for one in steps[:2]):
        return _pick(read, node, value, *steps[:2])
    if len(steps) == 1 and _is_given(read, steps[0]):
        return _gather_rows(read, node, value, steps[0])
    if steps[0] is Ellipsis:
        del steps[0]
        if not steps or None in steps or (len(steps) > 1 and any(type(one) is int for one in steps)):
            raise NotANetworkError("an index behind an ellipsis is more than one number, or parts")
        dim = -len(steps)
    lists = [i for i, one in enumerate(steps) if isinstance(one, (list, Node))]
    if lists and (any(type(one) is int for one in steps) or lists != list(range(lists[0], lists[-1] + 1))):
        raise NotANetworkError("an index has numbers beside lists, or lists apart from one another")
    for i, one in enumerate(steps):
        if i not in lists:
            value, gone = _choose(read, value, one, dim)
            dim += 0 if gone else 1
        elif i == lists[0]:
            value, dims = _add_index(read, value, dim, [steps[place] for place in lists])
            dim += len(lists) if dim < 0 else dims  # from the end, the dimensions behind have the numbers that they had
    if value is read.data(whole):  # x[:]
        value = read.add(None, "slice", {"input": [value]}, dim=0)
    read.values[node] = value


def _picks(node: Node) -> bool:
    """Whether a node is an index of two tensors, as in y[torch.arange(len(y)), lengths - 1]."""
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple) or len(node.args[1]) < 2:
        return False
    first, second, *rest = node.args[1]
    return isinstance(first, Node) and isinstance(second, Node) and all(one == slice(None) for one in rest)


def _pick(read: Reader, node: Node, value: Value, rows: Node, places: Node) -> None:
    inputs = {"places": [read.whole_numbers(read.value(places))], "input": [value]}
    if rows not in read.ranges:
        inputs["rows"] = [read.whole_numbers(read.value(rows))]
    elif not _is_size_of(read, rows, value):
        raise NotANetworkError("an index counts other rows than the tensor has")
    read.add(node, "pick", inputs)


def _is_size_of(read: Reader, rows: Node, value: Value) -> bool:
    """Whether numbers in a row go up to a value's first size."""
    size, has_one_in_front = read.ranges[rows]
    return not has_one_in_front and isinstance(size, Node) and read.sizes.get(size) == Size(((value, 0),))


def _choose(read: Reader, value: Value, index: Any, dim: int) -> tuple[Value, bool]:
    """Applies one part of an index -> the value, and whether the dimension is gone."""
    if type(index) is int:
        return read.add(None, "select", {"input": [value]}, dim=dim, index=index), True
    if index is None:
        return read.add(None, "unsqueeze", {"input": [value]}, dim=dim), False
    if isinstance(index, slice):
        start, stop, step = index.start, index.stop, index.step
        start_is_number = start is None or type(start) is int
        if isinstance(stop, Node) and stop in read.sizes and start_is_number and step in (None, 1):
            return slice_to_size(read, value, dim, start or 0, stop), False
        if not all(one is None or type(one) is int for one in (start, stop, step)) or (step or 1) < 1:
            raise NotANetworkError("an index depends on the input's sizes")
        if (start, stop, step) in ((None, None, None), (0, None, None)):
            return value, False
        given = {"start": start or 0, **({} if stop is None else {"stop": stop}), "step": step or 1}
        return read.add(None, "slice", {"input": [value]}, dim=dim, **given), False
    raise NotANetworkError(f"an index is a {type(index).__name__}")
