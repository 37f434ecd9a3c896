"""Guards: they compare, at every call of a trace, everything that the trace depends on with what it was.

A trace stands for a forward only as long as everything that the forward read is what it was: attributes, settings of
layers, globals, closures, the code of functions. The tracer notes each such read in a :class:`Guard`. Most calls find
the very same objects, which C compares in a fraction of a microsecond (csrc/guard.h); for another object the guard
looks at values: an equal number, or a tensor in a tensor's place, changes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from operator import is_
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fastnn._extension import load_extension
from fastnn._torch import HOOKS
from fastnn.nn._hooks import own_methods

_extension = load_extension()
ABSENT = _extension.absent  # stands for the value of a key that is not there
_ANY = _extension.any  # stands for a value that may change
_SOME_TENSOR = _extension.some_tensor  # stands for any tensor, since each call is given the present one
_holds = _extension.guard_holds

TOKEN = "_fastnn_token"  # the attribute of a fused module that tells it from its shallow copies: see forward.py

# Values of these types cannot change, so that any two that are equal are interchangeable.
CONSTANTS: tuple[type, ...] = (
    *(type(None), bool, int, float, complex, str, bytes, type(Ellipsis), range),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)


def is_constant(value: Any) -> bool:
    """Whether a value, and all in it, can never change."""
    kind = type(value)
    if kind is tuple or kind is frozenset:
        return all(map(is_constant, value))
    if kind is slice:
        return all(map(is_constant, (value.start, value.stop, value.step)))
    return kind in CONSTANTS or _is_numpy_number(value)


def _is_numpy_number(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and issubclass(type(value), (numpy.number, numpy.bool_))


def is_same(before: Any, now: Any) -> bool:
    """Whether code that read `before` would do just the same with `now`."""
    if before is now:
        return True
    if before is _SOME_TENSOR:
        return type(now) in _TENSORS
    kind = type(before)
    if type(now) is not kind or kind is frozenset or not is_constant(before):
        return False  # (Equal sets may have another order.)
    if kind is tuple:
        return len(before) == len(now) and all(map(is_same, before, now))
    if kind is slice or kind is range:
        return all(is_same(getattr(before, name), getattr(now, name)) for name in ("start", "stop", "step"))
    if kind in (float, complex) or _is_numpy_number(before):
        return repr(before) == repr(now)  # the sign of zero counts, and NaN is NaN
    return bool(before == now)


_TENSORS = (Tensor, nn.Parameter)  # whose functions are torch's own
_extension.set_tensor_classes(_TENSORS)


class Held:
    """Wraps an argument that cannot be hashed, such as a set, so that a call that is noted can be a key of a dict."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Cell:
    """A closure's cell as a container whose one item is what it holds."""

    def __init__(self, cell: CellType) -> None:
        self.cell = cell

    def __getitem__(self, _: Any) -> Any:
        return self.cell.cell_contents


class Guard:
    """The reads of a trace, and the values that they gave. Values that are compared by identity are kept alive, so that
    no other object can get their addresses.

    by_value: whether an equal number, or a tensor in another's place, counts as unchanged.
    """

    def __init__(self, by_value: bool = True) -> None:
        self._by_value = by_value
        self._items: dict[tuple[int, Any], tuple[Any, Any, Any]] = {}
        self._contents: dict[int, tuple[Any, list[Any]]] = {}
        self._types: dict[int, tuple[Any, type, tuple[type, ...], Any]] = {}
        self._layers: dict[int, tuple[nn.Module, frozenset[str]]] = {}
        self._empty: dict[int, Any] = {}
        self._functions: dict[int, tuple[FunctionType, Any, Any, Any]] = {}
        self._calls: dict[tuple[Any, ...], tuple[Callable[..., Any], tuple[Any, ...], Any]] = {}
        self._instances: dict[int, dict[str, Any]] = {}
        self._tuples: tuple[tuple[Any, ...], ...] = ()

    # ---- what is noted ----------------------------------------------------------------------------------------------

    def note_item(self, container: Any, key: Any, value: Any) -> None:
        """Notes a read of a dict, a class (its own dict) or a cell (any key). value: ABSENT where there is none."""
        self._items.setdefault((id(container), key), (container, key, self._kept(value)))

    def note_instance(self, instance: Any, key: str, value: Any) -> None:
        """Notes an attribute in an object's own dict. C compares the whole dict, which is faster than key by key."""
        own = instance.__dict__
        self._instances[id(own)] = own
        self.note_type(instance)
        self.note_item(own, key, value)

    def note_contents(self, container: Any) -> None:
        """Notes all that a list, tuple, dict or cell holds, or a class's own dict."""
        if isinstance(container, Cell):
            self.note_item(container.cell, None, container[0])
        elif id(container) not in self._contents:
            self._contents[id(container)] = (container, self._all_kept(container))

    def _kept(self, value: Any) -> Any:
        """What is noted for a value: for a tensor only that it is one, so that replaced tensors are not kept alive."""
        return _SOME_TENSOR if self._by_value and type(value) in _TENSORS else value

    def _all_kept(self, container: Any) -> list[Any]:
        return list(map(self._kept, _flat(container)))

    def note_type(self, instance: Any) -> None:
        """Notes an object's class, the identity of its dict, and what its classes hold, except those of torch."""
        if id(instance) in self._types:
            return
        kind = type(instance)
        self._types[id(instance)] = (instance, kind, kind.__mro__, _own_dict(instance))
        for one in kind.__mro__:
            if one.__module__.partition(".")[0] not in ("torch", "fastnn", "builtins"):
                self.note_contents(one)

    def note_empty(self, container: Any) -> None:
        self._empty[id(container)] = container

    def note_function(self, function: FunctionType) -> None:
        self._functions.setdefault(id(function), _parts(function))

    def note_call(self, function: Callable[..., Any], args: tuple[Any, ...], value: Any) -> None:
        """Notes the result of a function that each call of the trace calls again: it tells of a mode that anybody may
        change, or of numbers that a module holds."""
        self._calls[function, args] = (function, args, value)

    def note_layer(self, module: nn.Module) -> None:
        """Notes a module that is called, or whose forward is run: its class, that class's forward, and whether it has a
        forward of its own and hooks."""
        own = module.__dict__
        self.note_type(module)
        for name in HOOKS:
            if name in own:
                self.note_instance(module, name, own[name])
                if own[name]:
                    self.note_contents(own[name])
                else:
                    self.note_empty(own[name])
        self.note_instance(module, "forward", own.get("forward", ABSENT))
        self._layers[id(module)] = (module, own_methods(module))
        for name in ("forward", "__call__"):
            for kind in type(module).__mro__:
                if name in vars(kind):
                    self.note_item(kind, name, vars(kind)[name])
                    break

    def note_settings(self, module: nn.Module, names: Sequence[str]) -> None:
        """Notes a layer that an operator replaces: the attributes that say what it computes, and whether it has each of
        its tensors."""
        own = module.__dict__
        for name in names:
            self.note_instance(module, name, own.get(name, ABSENT))
            if isinstance(own.get(name), list):
                self.note_contents(own[name])
        for name in ("_parameters", "_buffers"):
            self.note_instance(module, name, own[name])
            self.note_contents(own[name])

    # ---- of another module -----------------------------------------------------------------------------------------

    def mapped(self, of: Callable[[Any], Any]) -> Guard:
        """The same notes of other objects: `of` gives, for each object, the one in its place, or the object itself."""
        other = Guard(self._by_value)
        for (_, key), (container, _, value) in self._items.items():
            container = of(container)
            other._items[id(container), key] = (container, key, of(value))
        for container, held in self._contents.values():
            container = of(container)
            other._contents[id(container)] = (container, list(map(of, held)))
        for instance, kind, order, own in self._types.values():
            instance = of(instance)
            other._types[id(instance)] = (instance, kind, order, of(own))
        for module, names in self._layers.values():
            module = of(module)
            other._layers[id(module)] = (module, names)
        other._empty = {id(one): one for one in map(of, self._empty.values())}
        other._functions = self._functions  # no module has functions of its own and is alike to others
        for function, args, value in self._calls.values():
            other.note_call(function, tuple(map(of, args)), value)
        other._instances = {id(own): own for own in map(of, self._instances.values())}
        return other

    def begins(self) -> bool:
        """Seals notes that were made of another module, where they hold for this one."""
        if not self._holds_by_value():
            return False
        self.seal()
        return self.holds()

    # ---- and compared ---------------------------------------------------------------------------------------------

    def seal(self) -> None:
        """Ends the notes. Call it once everything has been noted."""
        self._tuples = self._as_tuples()

    def holds(self) -> bool:
        """Whether all that was noted is as it was."""
        if not _holds(self._tuples):
            if not self._by_value or not self._holds_by_value():
                return False
            self.seal()
        return not self._calls or all(function(*args) == value for function, args, value in self._calls.values())

    def _holds_by_value(self) -> bool:
        for instance, kind, order, own in self._types.values():
            if type(instance) is not kind or kind.__mro__ is not order:
                return False
            if _own_dict(instance) is not own:
                return False
        if any(own_methods(module) != names for module, names in self._layers.values()):
            return False
        if any(self._empty.values()):
            return False
        for place, (container, key, before) in self._items.items():
            now = _item(container, key)
            if not is_same(before, now):
                return False
            self._items[place] = (container, key, self._kept(now))
        for number, (container, before) in self._contents.items():
            now = _flat(container)
            if len(before) != len(now) or not all(map(is_same, before, now)):
                return False
            self._contents[number] = (container, list(map(self._kept, now)))
        return all(all(map(is_, parts, _parts(parts[0]))) for parts in self._functions.values())

    def _as_tuples(self) -> tuple[tuple[Any, ...], ...]:
        """What was noted, in the form in which C compares it."""
        contents: list[Any] = []
        for container, held in self._contents.values():
            contents += [container, tuple(held)]
        for own in self._instances.values():
            noted = {key: self._items[id(own), key][2] if (id(own), key) in self._items else _ANY for key in own}
            contents += [own, _in_a_row(noted.items())]
        items: list[Any] = []
        for container, key, value in self._items.values():
            if id(container) not in self._instances:
                items += [container, key, value]
        return (
            *(tuple(contents), tuple(items), _in_a_row(self._types.values()), tuple(self._empty.values())),
            _in_a_row(self._functions.values()),
        )


def _own_dict(instance: Any) -> Any:
    if isinstance(instance, type) or type(instance).__dictoffset__ == 0:
        return None
    return instance.__dict__


def _in_a_row(tuples: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple([one for each in tuples for one in each])


def _parts(function: FunctionType) -> tuple[FunctionType, Any, Any, Any]:
    return function, function.__code__, function.__defaults__, function.__kwdefaults__


def _item(container: Any, key: Any) -> Any:
    if isinstance(container, type):
        return vars(container).get(key, ABSENT)
    if isinstance(container, CellType):
        try:
            return container.cell_contents
        except ValueError:  # it is empty
            return ABSENT
    return container.get(key, ABSENT)


def _flat(container: Any) -> list[Any]:
    if isinstance(container, type):
        container = dict(vars(container))
    if isinstance(container, dict):
        return list(_in_a_row(container.items()))
    return list(container)
