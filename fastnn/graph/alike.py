"""Models that are alike: what one of them was traced to serves the others.

Two modules are alike where a trace cannot tell them apart: everything in their dicts, and in the dicts, lists and
modules in these, is the same, but for the numbers in tensors. Then the trace of the second follows from that of the
first by putting the second's objects in the place of the first's. What a forward reads besides, as globals and
classes, is in the trace's guard, which is compared before the trace is used for another module.
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

_MOST_KINDS = 32  # of modules of which a trace is kept; the class of each, and what it refers to, is kept alive
_PLAIN = frozenset({type(None), bool, int, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format})
_DICTS, _TENSORS = (dict, OrderedDict), (Tensor, nn.Parameter)
_kinds: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
_lock = threading.Lock()


class _Place:
    """Stands, in what is kept, for the object of this number of a module."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


class NotAlikeError(Exception):
    """Raised where it cannot be told which other modules are alike."""


class Parts:
    """What a module consists of. `key` is equal for two modules that are alike, or None where that cannot be told;
    `objects` are the parts that each module has for itself, in an order that is the same for both."""

    def __init__(self, module: nn.Module) -> None:
        self.objects: list[Any] = []
        self.key: tuple[Any, ...] | None = None
        self._places: dict[int, int] = {}
        if functions_are_watched() or torch.jit.is_tracing():  # who does so would see that tensors' sizes are read
            return
        key: list[Any] = []
        with suppress(NotAlikeError):
            self._add(module, key)
            self.key = tuple(key)

    def _add(self, value: Any, key: list[Any]) -> None:
        """Appends what tells the value from others: its type first, so that no two sequences run into each other."""
        kind: Any = type(value)
        key.append(kind)
        if kind in _PLAIN:
            key.append(value)
            return
        if kind is float:
            key.append(repr(value))  # the sign of zero counts, and NaN is NaN
            return
        if kind is tuple and _PLAIN.issuperset(kinds := tuple(map(type, value))):
            key += (kinds, value)
            return
        known = self._places.get(id(value))
        if known is not None:
            key += (_Place, known)
            return
        self._places[id(value)] = len(self.objects)
        self.objects.append(value)
        if kind in _DICTS:
            key.append(len(value))
            for name, one in value.items():
                if type(name) is not str:
                    raise NotAlikeError
                key.append(name)
                if name != TOKEN:
                    self._add(one, key)
        elif kind is list or kind is tuple:
            key.append(len(value))
            for one in value:
                self._add(one, key)
        elif kind in _TENSORS:
            key += (value.shape, value.dtype, value.device)
        elif issubclass(kind, nn.Module):
            self._add(value.__dict__, key)
        elif kind is weakref.ref:
            self._add(value(), key)
        elif kind is set and all(type(one) is str for one in value):
            key.append(frozenset(value))
        elif _is_for_all(value):
            key.append(value)
        elif not issubclass(kind, Fused) or value.left:
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


def kind_of(parts: Parts) -> Any:
    """What was kept of a module that was alike, or None."""
    if parts.key is None:
        return None
    with _lock:
        known = _kinds.get(parts.key)
        if known is not None:
            _kinds.move_to_end(parts.key)
    return known


def keep(parts: Parts, kind: Any) -> None:
    """Keeps something for modules that are alike."""
    with _lock:
        _kinds[parts.key] = kind  # type: ignore[index]
        while len(_kinds) > _MOST_KINDS:
            _kinds.popitem(last=False)
