"""What stands for objects while a forward is traced (tracing.py).

Each stand-in asks the tracer, which reads what the object has and notes that it was read. What would write to an
object, or look at a tensor's values, ends the trace.
"""

from __future__ import annotations

import dis
import operator
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.nn.utils.rnn import PackedSequence

from fastnn.graph.order import in_place
from fastnn.graph.understood import ATTRIBUTES

if TYPE_CHECKING:
    from fastnn.graph.tracing import Tracer


def is_a(value: Any, kinds: type | tuple[type, ...]) -> bool:
    """``isinstance``, which does not ask a stand-in for its ``__class__``."""
    return issubclass(type(value), kinds)


class Traced(fx.Proxy):
    """A value that only a call knows."""

    tracer: Tracer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        own = getattr(Tensor, name, None)
        if callable(own) or (hasattr(PackedSequence, name) and name not in ATTRIBUTES):
            return _Attribute(self, name)
        if name not in ATTRIBUTES:
            self.tracer.refuse(f"it reads the attribute {name} of a tensor")
        return self.tracer.node("call_function", getattr, (self, name))

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            self.tracer.refuse(f"it sets the attribute {name} of a tensor")
        object.__setattr__(self, name, value)

    def __iter__(self) -> Iterator[Any]:
        frame = sys._getframe(1)
        for instruction in dis.get_instructions(frame.f_code):
            if instruction.offset == frame.f_lasti and instruction.opname == "UNPACK_SEQUENCE":
                return self.tracer.parts(self, instruction.argval)
        self.tracer.refuse("it loops over a tensor")

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


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(Traced, f"__i{_name}__", _in_place_method(f"i{_name}"))


class _Attribute(Traced):
    """A tensor's method, or what is to be had by the same name of something else."""

    def __init__(self, owner: Traced, name: str) -> None:
        for key, value in (("tracer", owner.tracer), ("_owner", owner), ("_name", name), ("_node", None)):
            object.__setattr__(self, key, value)

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        if self._node is None:
            made = self.tracer.node("call_function", getattr, (self._owner, self._name)).node
            object.__setattr__(self, "_node", made)
        return self._node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.node("call_method", self._name, (self._owner, *args), kwargs)


class StandIn:
    """For an object: what is read of it is noted, and nothing is written. `kind` is its class or the like."""

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

    def __eq__(self, other: Any) -> Any:
        if type(real_of(self)).__eq__ is not object.__eq__ and not is_a(real_of(self), type):
            return _tracer_of(self).special(self, "__eq__", other)
        return real_of(self) is real_of(other)

    def __ne__(self, other: Any) -> Any:
        return not self == other

    def __hash__(self) -> int:
        if type(real_of(self)).__hash__ is not object.__hash__ and not is_a(real_of(self), type):
            _tracer_of(self).refuse(f"it asks for the hash of a {class_name(self)}")
        return id(real_of(self))

    def __bool__(self) -> bool:
        kind = type(real_of(self))
        for name in ("__bool__", "__len__"):
            if hasattr(kind, name):
                return bool(_tracer_of(self).special(self, name))
        return True

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
    """What a stand-in stands for; any other value itself."""
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


class NotUnderstood(StandIn):
    """For an object that is not understood: whatever is done with it ends the trace."""

    __slots__ = ()


def _refuse_change(self: Any, *_: Any, **__: Any) -> Any:
    self.tracer.refuse(f"it changes a {type(self).__bases__[0].__name__} that outlives the call")


class FixedList(list):
    tracer: Tracer


class FixedDict(dict):
    tracer: Tracer


class FixedSet(set):
    tracer: Tracer


for _kind in (FixedList, FixedDict, FixedSet):
    for _name in (
        *("append", "extend", "insert", "remove", "pop", "clear", "sort", "reverse", "update", "setdefault", "popitem"),
        *("add", "discard", "intersection_update", "difference_update", "symmetric_difference_update"),
        *("__setitem__", "__delitem__", "__iadd__", "__imul__", "__ior__", "__iand__", "__isub__", "__ixor__"),
    ):
        if hasattr(_kind.__bases__[0], _name):
            setattr(_kind, _name, _refuse_change)


class Globals(dict):
    """What a function that was made anew has for globals. Python asks a dict of a class of its own by ``[]``, for
    builtins too."""

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
