"""Models that are alike: what one of them was traced to serves the others.

Two modules are alike where a trace cannot tell them apart: everything in their dicts, and in the dicts, lists and
modules in these, is the same, but for the numbers in tensors. Then the trace of the second follows from that of the
first by putting the second's objects in the place of the first's, and so does its program of a training step. Where
only sizes differ, and numbers that modules of the user's have, the trace may still do. In either case it is used only
if its guard, in which all stands that the trace has read, says that it is the second's too: globals and classes are
compared by that as well.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from contextlib import suppress
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastnn._torch import functions_are_watched
from fastnn.graph.guard import TOKEN, Held
from fastnn.graph.tracing import Fused
from fastnn.nn._hooks import layer_class

_MOST_KEPT = 128  # keys. The classes in them, and what these refer to, are kept alive.
# What layers have besides their tensors' sizes, and no match asks for.
_SIZES = frozenset(
    {
        *("in_features", "out_features", "in_channels", "out_channels", "num_features", "normalized_shape"),
        *("input_size", "hidden_size", "num_embeddings", "embedding_dim"),
    }
)
_PLAIN = frozenset({type(None), bool, int, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format})
_DICTS, _TENSORS = (dict, OrderedDict), (Tensor, nn.Parameter)
_kinds: OrderedDict[tuple[Any, ...], Kind] = OrderedDict()
_lock = threading.Lock()


class _Place:
    """Takes the place of a module's own object in what is kept: the object with this number among the module's."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


class NotAlikeError(Exception):
    """Raised where it cannot be told which other modules are alike."""


class Kind:
    """What is kept for modules that are alike, with places for their objects: the trace of the forward, the program of
    a training step, once there was one, and the stretches of layers, once they have run."""

    def __init__(self, trace: Any) -> None:
        self.trace = trace
        self.network: Any = None
        self.stretched: dict[bool, Any] = {}  # by whether autograd records


class Parts:
    """What a module consists of. `structure` is equal for modules that are alike but for sizes and numbers, `key` for
    modules that are wholly alike; both are None where that cannot be told. `objects` are the parts that each module has
    for itself, in an order that is the same for modules of one structure."""

    def __init__(self, module: nn.Module) -> None:
        self.objects: list[Any] = []
        self.structure: tuple[Any, ...] | None = None
        self.key: tuple[Any, ...] | None = None
        self._places: dict[int, int] = {}
        self._structure: list[Any] = []
        self._numbers: list[Any] = []
        if functions_are_watched() or torch.jit.is_tracing():  # who does so would see that tensors' sizes are read
            return
        with suppress(NotAlikeError):
            self._add(module, self._numbers)
            self.structure = tuple(self._structure)
            self.key = self.structure, tuple(self._numbers)

    def _add(self, value: Any, numbers: list[Any]) -> None:
        """Appends the type of a value and what else tells it from other values. The type comes first, so that different
        values never give the same sequence. numbers: the list to which numbers are appended."""
        structure, kind = self._structure, type(value)
        structure.append(kind)
        if kind in _PLAIN:
            (numbers if kind is int else structure).append(value)
            return
        if kind is float:
            numbers.append(repr(value))  # the sign of zero counts, and NaN is NaN
            return
        if kind is tuple and _PLAIN.issuperset(kinds := tuple(map(type, value))):
            numbers += (kinds, value)
            return
        known = self._places.get(id(value))
        if known is not None:
            structure += (_Place, known)
            return
        self._places[id(value)] = len(self.objects)
        self.objects.append(value)
        if kind in _DICTS:
            structure.append(len(value))
            for name, one in value.items():
                if type(name) is not str:
                    raise NotAlikeError
                structure.append(name)
                if name != TOKEN:
                    self._add(one, self._numbers if name in _SIZES else numbers)
        elif kind is list or kind is tuple:
            structure.append(len(value))
            for one in value:  # a guard notes what a list holds, but a tuple itself
                self._add(one, numbers if kind is list else structure)
        elif kind in _TENSORS:
            self._numbers += (value.shape, value.dtype, value.device)
        elif issubclass(kind, nn.Module):
            self._add(value.__dict__, self._numbers if layer_class(kind) is None else structure)
        elif kind is weakref.ref:
            self._add(value(), numbers)
        elif kind is set and all(type(one) is str for one in value):
            structure.append(frozenset(value))
        elif _is_for_all(value):
            structure.append(value)
        elif not issubclass(kind, Fused) or any(value.left_by_mode.values()):
            raise NotAlikeError

    def place_of(self, value: Any) -> Any:
        """What is kept of a value: where it is to be found, if it is the module's own. NotAlikeError of a module that
        is no part of this one."""
        if type(value) is Held:
            return Held(self.place_of(value.value))
        number = self._places.get(id(value))
        if number is not None:
            return _Place(number)
        if isinstance(value, nn.Module):
            raise NotAlikeError
        return value

    def object_at(self, place: Any) -> Any:
        """The module's own for a kept place; any other value itself."""
        if type(place) is Held:
            return Held(self.object_at(place.value))
        return self.objects[place.number] if type(place) is _Place else place


def _is_for_all(value: Any) -> bool:
    """Whether a value is a class, or a function that lives as long as its module: the same object for all who have it,
    and nothing that was made for one model alone."""
    if isinstance(value, FunctionType):
        return "<locals>" not in value.__qualname__ and value.__closure__ is None
    if isinstance(value, BuiltinFunctionType):
        return value.__self__ is None or isinstance(value.__self__, ModuleType | type)
    return type(value) is type


def kind_of(parts: Parts) -> Kind | None:
    """What was kept of a module that was wholly alike; or of one of the same structure, if that trace will do."""
    with _lock:
        for key in (parts.key, parts.structure):
            known = None if key is None else _kinds.get(key)
            if known is not None:
                return known if key is parts.key else Kind(known.trace)
    return None


def keep(parts: Parts, kind: Kind) -> None:
    """Keeps something for modules that are alike."""
    with _lock:
        for key in (parts.key, parts.structure):
            if key is not None:
                _kinds[key] = kind
                _kinds.move_to_end(key)
        while len(_kinds) > _MOST_KEPT:
            _kinds.popitem(last=False)
