"""The objects that stand in for real objects while a forward is traced (tracing.py).

Each stand-in asks the tracer, which reads what the object has and notes that it was read. What would write to an
object, or look at a tensor's values, ends the trace.
"""

from __future__ import annotations

import dis
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from fastnn.graph.order import in_place
from fastnn.graph.sizes import SIZE_ATTRIBUTES, SIZE_METHODS
from fastnn.graph.understood import ATTRIBUTES, WRITERS

# The tracer of tracing.py, which imports this file.
Tracer: TypeAlias = Any


def is_a(value: Any, kinds: type | tuple[type, ...]) -> bool:
    """Does what ``isinstance`` does, without asking a stand-in for its ``__class__``."""
    return issubclass(type(value), kinds)


# What a tensor cannot be asked for in a ``torch.no_grad()`` block, which a graph runs with gradients.
_NOT_WITHOUT_GRADIENTS = ("requires_grad", "requires_grad_", "is_leaf")


class Traced(fx.Proxy):
    """A value that only a call knows."""

    tracer: Tracer

    def __getattribute__(self, name: str) -> Any:
        own = object.__getattribute__
        if name != "__dict__" and sys._getframe(1).f_code in own(self, "tracer").codes:
            return own(self, "of_tensor")(name)  # the user's code asks, for which this is a tensor
        return own(self, name)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def of_tensor(self, name: str) -> Any:
        """A tensor's attribute, or one of a tuple with names that a function of torch gives."""
        is_refused = name in _NOT_WITHOUT_GRADIENTS and self.tracer.no_grad_blocks > 0
        if name in WRITERS or name.startswith("__") or is_refused:
            self.tracer.refuse(f"it asks a tensor for {name}")
        if name in SIZE_ATTRIBUTES and (known := self.tracer.size(self.node, name)) is not None:
            return known
        if name in ("device", "dtype") and (fixed := self.tracer.fixed_attribute(self.node, name)) is not None:
            return fixed
        if callable(getattr(Tensor, name, None)):
            return _Attribute(self, name)
        if name not in ATTRIBUTES:
            self.tracer.refuse(f"it reads the attribute {name} of a tensor")
        return self.tracer.node("call_function", getattr, (self, name))

    def __setattr__(self, name: str, value: Any) -> None:
        tracer = object.__getattribute__(self, "__dict__").get("tracer")
        if tracer is not None and sys._getframe(1).f_code in tracer.codes:
            tracer.refuse(f"it sets the attribute {name} of a tensor")
        object.__setattr__(self, name, value)

    def __iter__(self) -> Iterator[Any]:
        frame = sys._getframe(1)
        for instruction in dis.get_instructions(frame.f_code):
            if instruction.offset == frame.f_lasti and instruction.opname == "UNPACK_SEQUENCE":
                return self.tracer.parts(self, instruction.argval)
        return self.tracer.all_parts(self)

    def __len__(self) -> int:
        return int(self.tracer.count(self))

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.node("call_function", operator.setitem, (self, index, value))

    def __abs__(self) -> Any:
        return self.tracer.node("call_function", torch.abs, (self,))

    def __hash__(self) -> int:
        return self.tracer.refuse("it asks which tensor one is")

    def _in_words(self, *_: Any) -> str:
        return self.tracer.refuse("it makes a text of a tensor")

    __repr__ = __str__ = __format__ = _in_words


def _in_place_method(operation: str) -> Callable[[Traced, Any], Any]:
    return lambda self, other: self.tracer.node("call_function", in_place, (operation, self, other))


for _name in (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift"),
):
    setattr(Traced, f"__i{_name}__", _in_place_method(f"i{_name}"))


class _Attribute(Traced):
    """A method of a tensor, or an attribute of the same name of a value that is no tensor."""

    _owner: Traced
    _called: str
    _node: Any

    def __init__(self, owner: Traced, name: str) -> None:
        for key, value in (("tracer", owner.tracer), ("_owner", owner), ("_called", name), ("_node", None)):
            object.__setattr__(self, key, value)

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        if self._node is None:
            made = self.tracer.node("call_function", getattr, (self._owner, self._called)).node
            object.__setattr__(self, "_node", made)
        return self._node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._called in SIZE_METHODS and not kwargs:
            known = self.tracer.size(self._owner.node, self._called, args)
            if known is not None:
                return known
        return self.tracer.node("call_method", self._called, (self._owner, *args), kwargs)


class StandIn:
    """Stands for an object. What is read from it is noted, and nothing can be written. `kind` is its class or the
    like."""

    __slots__ = ("_real", "_tracer")

    def __init__(self, tracer: Tracer, real: Any) -> None:
        object.__setattr__(self, "_tracer", tracer)
        object.__setattr__(self, "_real", real)

    def __getattribute__(self, name: str) -> Any:
        return _tracer_of(self).attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _tracer_of(self).refuse(f"it sets the attribute {name} of a {class_name(self)}")

    def __delattr__(self, name: str) -> None:
        _tracer_of(self).refuse(f"it deletes the attribute {name} of a {class_name(self)}")

    def __setitem__(self, index: Any, value: Any) -> None:
        _tracer_of(self).refuse(f"it sets an item of a {class_name(self)}")

    def __delitem__(self, index: Any) -> None:
        _tracer_of(self).refuse(f"it deletes an item of a {class_name(self)}")

    def __enter__(self) -> Any:
        _tracer_of(self).refuse(f"it has a with block of a {class_name(self)}")

    def __exit__(self, *_: Any) -> None:
        """Python looks for this method before it calls ``__enter__``, which refuses."""

    def __eq__(self, other: Any) -> Any:
        return _tracer_of(self).is_equal(self, other)

    def __ne__(self, other: Any) -> Any:
        return not _tracer_of(self).is_equal(self, other)

    def __hash__(self) -> int:
        return _tracer_of(self).hash_of(self)

    def __bool__(self) -> bool:
        return _tracer_of(self).truth_of(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _tracer_of(self).call(self, args, kwargs)

    def _in_words(self, *_: Any) -> Any:
        _tracer_of(self).refuse(f"it makes a text of a {class_name(self)}")

    __repr__ = __str__ = __format__ = _in_words


def _special_method(name: str) -> Callable[..., Any]:
    return lambda self, *args: _tracer_of(self).special(self, name, *args)


for _name in ("__len__", "__iter__", "__getitem__", "__contains__", "__reversed__"):
    setattr(StandIn, _name, _special_method(_name))


def _tracer_of(stand_in: StandIn) -> Tracer:
    tracer: Tracer = object.__getattribute__(stand_in, "_tracer")
    return tracer


def real_of(value: Any) -> Any:
    """The object that a stand-in stands for; any other value is returned as it is."""
    return object.__getattribute__(value, "_real") if is_a(value, StandIn) else value


def class_name(stand_in: StandIn) -> str:
    return type(real_of(stand_in)).__name__


class Instance(StandIn):
    """For a module, or another object of a class written in Python."""

    __slots__ = ()


class Namespace(StandIn):
    """For a Python module."""

    __slots__ = ()


class ClassStandIn(StandIn):
    """For a class."""

    __slots__ = ()


class Primitive(StandIn):
    """For a function of torch that becomes a node, or one of Python that only computes."""

    __slots__ = ()


class FixedSet(StandIn):
    """For a set, which is asked what it holds and nothing else: a copy would have another order."""

    __slots__ = ()


class Function(StandIn):
    """For a function written in Python, or a method: a call runs `made`."""

    __slots__ = ("_made",)

    def __init__(self, tracer: Tracer, real: Any, made: Callable[..., Any]) -> None:
        super().__init__(tracer, real)
        object.__setattr__(self, "_made", made)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return object.__getattribute__(self, "_made")(*args, **kwargs)


class NotUnderstood(StandIn):
    """For an object that is not understood: whatever is done with it ends the trace."""

    __slots__ = ()


def _refuse_change(self: Any, *_: Any, **__: Any) -> Any:
    self.tracer.refuse(f"it changes a {type(self).__bases__[0].__name__} that outlives the call")


def _refuse_question(self: Any, *_: Any) -> Any:
    self.tracer.refuse(f"it asks for the class of a {type(self).__bases__[0].__name__}")


class FixedList(list[Any]):
    """A copy of a list that outlives the call."""

    tracer: Tracer
    __class__ = property(_refuse_question)


class FixedDict(dict[Any, Any]):
    """A copy of a dict that outlives the call."""

    tracer: Tracer
    __class__ = property(_refuse_question)


for _kind in (FixedList, FixedDict):
    for _name in (
        *("append", "extend", "insert", "remove", "pop", "clear", "sort", "reverse", "update", "setdefault", "popitem"),
        *("__setitem__", "__delitem__", "__iadd__", "__imul__", "__ior__"),
    ):
        if hasattr(_kind.__bases__[0], _name):
            setattr(_kind, _name, _refuse_change)


class Globals(dict):
    """The globals of a function that was made anew. Since its class is not dict, Python reads it by ``[]``, also for
    builtins."""

    def __init__(self, tracer: Tracer, real: dict[str, Any]) -> None:
        super().__init__(__builtins__={}, __name__=real.get("__name__", ""))
        self.tracer, self.real = tracer, real

    def __getitem__(self, name: str) -> Any:
        return self.tracer.global_value(self.real, name)


class Super:
    """``super()`` within a forward."""

    def __init__(self, tracer: Tracer, after: type, instance: Any) -> None:
        object.__setattr__(self, "_parts", (tracer, after, instance))

    def __getattribute__(self, name: str) -> Any:
        tracer, after, instance = object.__getattribute__(self, "_parts")
        kinds = type(real_of(instance)).__mro__
        owner, value = tracer.in_classes(kinds[kinds.index(after) + 1 :], name)
        if owner is None:
            tracer.refuse(f"it asks super() for {name}")
        return tracer.bound(instance, owner, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__getattribute__(self, "_parts")[0].refuse(f"it sets the attribute {name} of super()")
