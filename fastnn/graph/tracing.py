"""A module's forward as a graph of layers and functions, where that graph is what every call would do.

The forward runs once, in a world of stand-ins. The functions that it calls are made anew from their code, with globals
and closures that ask the tracer for each name, so that nothing enters this world unseen:

- The call's tensors, and tensors that belong to the model, are :class:`Traced`: what is done with them becomes nodes of
  the graph, in their order, and is done at each call.
- Constants (numbers, strings, None, tuples of them) enter as they are. Where each was read is noted in the guard.
- Modules, other objects, classes and Python modules are stand-ins whose attributes are read as Python reads them, and
  noted; lists and dicts are copies that cannot be changed, whose contents are noted.
- Functions written in Python are made anew in turn, layers and functions of torch become nodes, and a few functions of
  Python that only compute (``len``, ``math.sqrt``) are called.
- What a ``torch.no_grad()`` block makes is detached where it is used outside of the block. Any other with block ends
  the trace.
- Everything else ends the trace, as does every write to what outlives the call, every question about a tensor's values
  that decides where the code goes on, and code that catches exceptions.

So a trace rests on what it has noted and on nothing else; what cannot be noted is not traced. A module inside whose
forward cannot be traced is called as it is, and since its code may change anything, nothing may be read after it.
"""

from __future__ import annotations

import builtins
import cmath
import functools
import inspect
import keyword
import linecache
import operator
import os
import sys
import types
from abc import ABCMeta
from collections.abc import Callable, Iterator, Sequence
from enum import Enum, EnumMeta
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from fastnn._torch import HOOKS
from fastnn.graph.guard import ABSENT, CONSTANTS, Cell, Guard, Held, is_constant
from fastnn.graph.matcher import computes_only
from fastnn.graph.order import Order, detached, unpack
from fastnn.graph.sizes import RESIZING_METHODS, Sizes
from fastnn.graph.stand_ins import (
    ClassStandIn,
    FixedDict,
    FixedList,
    FixedSet,
    Function,
    Globals,
    Instance,
    Namespace,
    NotUnderstood,
    Primitive,
    StandIn,
    Super,
    Traced,
    class_name,
    is_a,
    real_of,
)
from fastnn.graph.understood import (
    PURE_CLASSES,
    PURE_FUNCTIONS,
    asks_for_none,
    is_primitive,
    is_special,
    mode_functions,
    why_not_run,
)
from fastnn.nn._hooks import layer_class, own_methods
from fastnn.ops._autograd import forward_mode_is_on


class UntraceableError(Exception):
    """Raised while tracing, where the graph would not be what every call of the forward does.

    asks_for_sizes: whether the forward has asked for sizes, so that it may be traced for inputs of certain sizes.
    """

    asks_for_sizes = False


def listed(*items: Any) -> list[Any]:
    """A list, which in traced code stands for one that outlives the call."""
    return list(items)


class Fused:
    """What stands in the place of a fused module's ``forward``."""

    __slots__ = ()


class _NoGradBlock:
    """What ``torch.no_grad()`` gives in traced code."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def __enter__(self) -> None:
        self._tracer.no_grad_blocks += 1

    def __exit__(self, *_: Any) -> None:
        self._tracer.no_grad_blocks -= 1


class Tracer(fx.Tracer):
    """Runs a module's forward in the world of stand-ins. `guard` holds what was read, `inlined` the modules whose
    forwards were run, `tensors` a container and a key for each further input that the graph has. `sizes`: those of the
    values, where the trace is for inputs of certain sizes."""

    def __init__(self, root: nn.Module, sizes: Sizes | None) -> None:
        super().__init__()
        self.root, self.sizes = root, sizes
        self.asks_for_sizes = False
        self.graph = fx.Graph(tracer_cls=Tracer)
        self.guard = Guard()
        self.inlined: list[nn.Module] = []
        self.called: list[nn.Module] = []
        self.tensors: list[tuple[Any, Any]] = []
        self.places = {module: name for name, module in root.named_modules()}
        self.opaque: str | None = None  # what has run whose code is not known
        self.refused: UntraceableError | None = None
        self.codes: set[types.CodeType] = set()  # of functions made anew
        self._stand_ins: dict[int, Any] = {}
        self._inputs: dict[tuple[int, Any], Traced] = {}
        self._has_maybe_none = self._asks_for_none = False
        self._count = 0  # of the calls in a trace for certain sizes
        self._recomputed: set[int] = set()  # layers whose hooks have set attributes of theirs
        self.no_grad_blocks = 0  # how many of them the code is in
        self._without_gradient: set[fx.Node] = set()  # made in such blocks
        self._builtins: dict[str, Any] = {
            "isinstance": self._isinstance,
            "getattr": self._getattr,
            "hasattr": self._hasattr,
            "type": self._type,
            "super": self._super,
            "callable": self._callable,
        }

    def run(self) -> fx.Graph:
        forward = self.function(_class_forward(self.root))
        names = input_names(type(self.root).forward)
        args = [self.node("placeholder", f"the_{n}" if n in _TAKEN else n, ()) for n in names]
        if self.sizes is not None:
            for place, arg in enumerate(args):
                self.sizes.note_input(arg.node, place)
        self.inlined.append(self.root)
        self.guard.note_layer(self.root)
        result = forward(self.stand_in(Instance, self.root), *args)
        if self.refused is not None:
            raise self.refused
        self.graph.output(self.create_arg(self._given_back(result, set())))
        if self._without_gradient:
            self._stop_gradients()
        if self.sizes is not None:
            self.sizes.note_in(self.guard)
        return self.graph

    def _stop_gradients(self) -> None:
        """Detaches what comes out of ``torch.no_grad()`` blocks. A block may give nothing that lies in memory which was
        made outside, because that may be the same tensor, whose gradient is recorded; and it may change no such memory
        in place, because the change has no part in a gradient."""
        if forward_mode_is_on():
            self.refuse("it has a block without gradients, which does not end those of forward mode")
        self.guard.note_call(forward_mode_is_on, (), False)
        modules, made = dict(self.root.named_modules()), self._without_gradient
        order = Order(self.graph, modules)
        for writer in order.writes:
            if writer.op == "call_module" and not getattr(modules[str(writer.target)], "inplace", False):
                continue  # Such a layer changes only what is its own, as it does where gradients are recorded.
            if writer in made and not made.issuperset(order.roots_written_by(writer)):
                self.refuse("it changes a tensor in place where no gradients are recorded")
            # Torch may refuse to change a view in place that was made where gradients are recorded, or where not.
            if not made.isdisjoint(order.views_written_by(writer)):
                self.refuse("it changes a view in place that was made where no gradients are recorded")
        for node in list(self.graph.nodes):
            outside = [user for user in node.users if user not in made]
            if node not in made or not outside:
                continue
            if not made.issuperset(order.roots(node)):
                self.refuse("where no gradients are recorded, it makes another view of a tensor")
            with self.graph.inserting_after(node):
                stopped = self.graph.call_function(detached, (node,))
            for user in outside:
                user.replace_input_with(node, stopped)

    def refuse(self, why: str) -> NoReturn:
        """Ends the trace, even if somebody swallows the exception."""
        if self.refused is None:
            self.refused = UntraceableError(why)
        raise self.refused

    # ---- nodes ------------------------------------------------------------------------------------------------------

    def node(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Traced:
        return self.create_proxy(op, target, args, kwargs or {})  # type: ignore[return-value]

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> fx.Proxy:
        if kind == "call_function" and len(args) > _place_of_out(target):
            self.refuse(f"it gives {target.__name__} a tensor to write to, by position")
        if self.no_grad_blocks and "floor" in getattr(target, "__name__", str(target)):
            # The graph records gradients in a block, too, and torch has none of a division that rounds down.
            self.refuse("it rounds down where no gradients are recorded")
        if self.no_grad_blocks and kwargs.get("requires_grad", False) is not False:
            self.refuse("it makes a tensor that requires a gradient where no gradients are recorded")
        made = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        if self.no_grad_blocks and kind.startswith("call"):
            self._without_gradient.add(made.node)
        if self.sizes is not None and kind in ("call_function", "call_method"):
            self._count += 1
            if self._count > _MOST_NODES:
                self.refuse(f"it does more than {_MOST_NODES} things in a loop")
            if getattr(target, "__name__", target) in RESIZING_METHODS or "out" in kwargs:
                self.refuse("it changes a tensor's sizes")
        return made

    def size(self, node: fx.Node, name: str, args: Sequence[Any] = ()) -> Any:
        """What a tensor says of its sizes, where the trace is for certain sizes; else None."""
        self.asks_for_sizes = True
        if self.sizes is None or not all(map(is_constant, args)):
            return None
        return self.sizes.answer(node, name, args)

    def proxy(self, node: fx.Node) -> Traced:
        return Traced(node, self)

    def create_arg(self, a: Any) -> Any:
        if is_a(a, Traced):
            return a.node
        kind = type(a)
        if kind is torch.Size:
            a, kind = tuple(a), tuple
        if kind is FixedList or kind is FixedDict:
            a, kind = kind.__bases__[0](a), kind.__bases__[0]
        if kind is dict and not all(type(key) is str for key in a):
            self.refuse("it makes a dict whose keys are no texts")
        if kind not in (tuple, list, dict, slice, range):
            name = class_name(a) if is_a(a, StandIn) else kind.__name__
            if kind.__module__ == "numpy" and is_constant(a):
                return a.item()
            if kind not in CONSTANTS or kind is bytes or (kind is complex and not _is_plain_complex(a)):
                self.refuse(f"it hands a {name} to torch, or returns it")
        return super().create_arg(a)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self.refuse("it decides by the values, or the sizes, of a tensor")

    def parts(self, value: Traced, count: int) -> Iterator[Any]:
        """``a, b = value``."""
        if not self._is_recurrent(value.node) or count != 2:
            value = self.node("call_function", unpack, (value, count))
        return iter([self.node("call_function", operator.getitem, (value, i)) for i in range(count)])

    def count(self, value: Traced) -> int:
        """``len(value)``."""
        self.asks_for_sizes = True
        count = None if self.sizes is None else self.sizes.parts(value.node)
        if count is None:
            self.refuse("it loops over a tensor, or asks for its length")
        return count

    def all_parts(self, value: Traced) -> Iterator[Any]:
        """``for part in value``."""
        count = self.count(value)
        if self.sizes is not None and self.sizes.is_tensor(value.node):
            value = self.node("call_function", torch.unbind, (value,))
        return self.parts(value, count)

    def _is_recurrent(self, node: fx.Node) -> bool:
        """Whether a node gives a recurrent layer's two results, or an LSTM's two states."""
        layer: Any = node
        if node.target is operator.getitem and node.args[1] == 1:
            layer = node.args[0]
        if layer.op != "call_module":
            return False
        kind = layer_class(type(self.root.get_submodule(str(layer.target))))
        return kind is not None and issubclass(kind, nn.LSTM if layer is not node else nn.RNNBase)

    def _given_back(self, result: Any, seen: set[int]) -> Any:
        """Checks what the forward returns: new objects, each only once, and constants."""
        if is_a(result, (list, dict)):
            if id(result) in seen:
                self.refuse("it returns one list or dict twice")
            seen.add(id(result))
        if is_a(result, (FixedList, FixedDict, StandIn, torch.Size)):
            self.refuse(f"it returns a {type(real_of(result)).__name__.strip('_').lower()} that outlives the call")
        if is_a(result, (tuple, list)):
            for one in result:
                self._given_back(one, seen)
        if is_a(result, dict):
            for one in result.values():
                self._given_back(one, seen)
        elif not is_a(result, (tuple, list, Traced)) and type(result) not in _GIVEN_BACK:
            self.refuse(f"it returns a {type(result).__name__}")
        return result

    # ---- what enters ------------------------------------------------------------------------------------------------

    def read(self) -> None:
        """Must be called before anything is read that may change."""
        if self.opaque is not None:
            self.refuse(f"it goes on after a call of {self.opaque}, which may have changed what it goes on with")

    def stand_in(self, kind: type[Any], real: Any) -> Any:
        """The one stand-in of an object."""
        known = self._stand_ins.get(id(real))
        if known is None:
            known = self._stand_ins[id(real)] = kind(self, real)
        return known

    def enter(self, value: Any, source: tuple[Any, Any] | None = None) -> Any:
        """Turns a value into what traced code may have. source: the container that holds the value, and its key
        there."""
        kind: Any = type(value)
        if is_constant(value):
            return value
        if is_a(value, Tensor):
            return self._input(value, source)
        if is_a(value, nn.Module):
            return self.stand_in(Instance, value)
        if kind is tuple:
            return tuple([self.enter(one, (value, i)) for i, one in enumerate(value)])
        if kind is list or kind is dict or kind is set:
            return self._copy(value)
        if is_primitive(value):
            return self.stand_in(Primitive, value)
        if value is listed:
            return self._listed
        if kind is types.FunctionType:
            return self.function(value)
        if kind is types.MethodType:
            return self.method(value.__func__, self.enter(value.__self__))
        if kind is functools.partial:
            return self._partial(value)
        if kind is types.ModuleType:
            return self.stand_in(Namespace, value)
        if is_a(value, type):
            is_error = issubclass(value, BaseException) and value.__module__ == "builtins"
            return value if is_error else self.stand_in(ClassStandIn, value)
        self.guard.note_type(value)
        if _reads_as_usual(kind):
            return self.stand_in(Instance, value)
        return self.stand_in(NotUnderstood, value)

    def _input(self, tensor: Tensor, source: tuple[Any, Any] | None) -> Traced:
        """A tensor that is read anew at each call: by its name where the module holds it, else as a further input."""
        if source is None:
            self.refuse("it uses a tensor that nothing holds by name")
        container, key = source
        place = (id(container), key)
        if place not in self._inputs:
            last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
            with self.graph.inserting_after(last):
                self._inputs[place] = self.node("placeholder", f"fastnn_tensor_{len(self.tensors)}", ())
            self.tensors.append((container, key))
            if self.sizes is not None:
                self.sizes.note_tensor(self._inputs[place].node, container, key)
        return self._inputs[place]

    def _copy(self, container: Any) -> Any:
        """A list, dict or set that cannot be changed. The one copy of each, as the original is one object."""
        known = self._stand_ins.get(id(container))
        if known is not None:
            return known
        self.read()
        if is_a(container, set):
            if not all(map(is_constant, container)):
                return self.stand_in(NotUnderstood, container)
            self.guard.note_call(_frozen, (Held(container),), frozenset(container))
            return self.stand_in(FixedSet, container)
        elif is_a(container, list):
            self.guard.note_contents(container)
            copy: Any = FixedList([self.enter(one, (container, i)) for i, one in enumerate(container)])
        else:
            self.guard.note_contents(container)
            if not all(map(is_constant, container)):
                return self.stand_in(NotUnderstood, container)
            copy = FixedDict({key: self.enter(one, (container, key)) for key, one in container.items()})
        copy.tracer = self
        self._stand_ins[id(container)] = copy
        return copy

    def _listed(self, *items: Any) -> FixedList:
        made = FixedList(items)
        made.tracer = self
        return made

    # ---- names --------------------------------------------------------------------------------------------------

    def global_value(self, names: dict[str, Any], name: str) -> Any:
        value = names.get(name, ABSENT)
        self.read_item(names, name, value)
        if value is not ABSENT:
            return self.enter(value, (names, name))
        own = self._builtins.get(name)
        if own is not None:
            self.read_item(vars(builtins), name, vars(builtins)[name])
            return own
        value = vars(builtins).get(name, ABSENT)
        self.read_item(vars(builtins), name, value)
        if value is ABSENT:
            raise NameError(f"name {name!r} is not defined")
        return self.enter(value)

    def read_item(self, container: Any, key: Any, value: Any) -> None:
        self.read()
        self.guard.note_item(container, key, value)

    def attribute(self, stand_in: StandIn, name: str) -> Any:
        """``stand_in.name``, found where Python would find it."""
        real = real_of(stand_in)
        if is_a(stand_in, (NotUnderstood, FixedSet)):
            self.refuse(f"it uses a {type(real).__name__}")
        if is_a(stand_in, (Primitive, Function)):
            self.refuse(f"it asks for the attribute {name} of a function")
        if is_a(stand_in, Namespace):
            value = vars(real).get(name, ABSENT)
            if value is ABSENT:
                self.refuse(f"it asks {real.__name__} for {name}")
            self.read_item(vars(real), name, value)
            return self.enter(value, (vars(real), name))
        if is_a(stand_in, ClassStandIn):
            if name == "__name__":
                self.read()
                self.guard.note_call(getattr, (real, name), real.__name__)
                return real.__name__
            owner, value = self.in_classes(real.__mro__, name)
            if owner is None or hasattr(type(real), name) or type(real) not in (type, EnumMeta, ABCMeta):
                self.refuse(f"it asks the class {real.__name__} for {name}")
            if type(value) is classmethod:
                return self.method(value.__func__, stand_in)
            if type(value) is staticmethod:
                value = value.__func__
            elif hasattr(type(value), "__get__") and type(value) is not types.FunctionType and not is_primitive(value):
                self.refuse(f"it asks the class {real.__name__} for {name}")
            return self.enter(value, (vars(owner), name))
        return self._instance_attribute(stand_in, real, name)

    def _instance_attribute(self, stand_in: StandIn, real: Any, name: str) -> Any:
        kind: Any = type(real)
        if issubclass(kind, Enum) and name in ("name", "value"):
            name = f"_{name}_"
        if name == "__class__":
            self.guard.note_type(real)
            return self.stand_in(ClassStandIn, kind)
        if name == "__dict__" or not _reads_as_usual(kind):
            self.refuse(f"it asks a {kind.__name__} for {name}")
        if id(real) in self._recomputed:
            self.refuse(f"it reads {name} of a layer that has computed its weight anew")
        self.guard.note_type(real)
        owner, value = self.in_classes(kind.__mro__, name)
        if owner is not None and type(value).__module__ != "builtins":
            self.guard.note_type(value)
        if owner is not None and (hasattr(type(value), "__set__") or hasattr(type(value), "__delete__")):
            return self.bound(stand_in, owner, name, value)
        self.read()
        own = real.__dict__.get(name, ABSENT)
        self.guard.note_instance(real, name, own)
        if own is not ABSENT and not (name == "forward" and is_a(own, Fused)):
            return self.enter(own, (real.__dict__, name))
        if owner is not None:
            return self.bound(stand_in, owner, name, value)
        if is_a(real, nn.Module):
            for tensors in ("_parameters", "_buffers"):
                held = real.__dict__[tensors]
                self.guard.note_instance(real, tensors, held)
                self.read_item(held, name, held.get(name, ABSENT))
                if name in held:
                    return None if held[name] is None else self._own_tensor(real, name, held)
            children = real.__dict__["_modules"]
            self.guard.note_instance(real, "_modules", children)
            self.read_item(children, name, children.get(name, ABSENT))
            if name in children:
                return self.enter(children[name])
        raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}", name=name, obj=stand_in)

    def _own_tensor(self, module: nn.Module, name: str, held: dict[str, Any]) -> Traced:
        place = (id(held), name)
        if module not in self.places:
            return self._input(held[name], (held, name))
        if place not in self._inputs:
            self._inputs[place] = self.node("get_attr", self._target(module, name), ())
            if self.sizes is not None:
                self.sizes.note_tensor(self._inputs[place].node, held, name)
        return self._inputs[place]

    def _target(self, module: nn.Module, *name: str) -> str:
        """The path by which the graph finds a module, or a tensor of it. The guard notes that the path leads there."""
        names = [one for one in self.places[module].split(".") if one]
        if any(keyword.iskeyword(one) or set(one) & set("\"'\\\n") for one in (*names, *name)) or names[:1] == ["self"]:
            self.refuse("a module's, or a parameter's, name is none that Python could write")
        current = self.root
        for one in names:
            children = current.__dict__["_modules"]
            self.guard.note_instance(current, "_modules", children)
            self.guard.note_item(children, one, children[one])
            current = children[one]
        return ".".join([*names, *name])

    def in_classes(self, kinds: Sequence[type], name: str) -> tuple[Any, Any]:
        """The first of the classes that has the name, and what it has; None where none has."""
        self.read()
        for kind in kinds:
            value = vars(kind).get(name, ABSENT)
            if kind.__module__.partition(".")[0] not in ("torch", "builtins"):
                self.guard.note_contents(kind)
            elif value is not ABSENT and kind is not object:
                self.guard.note_item(kind, name, value)
            if value is not ABSENT:
                return kind, value
        return None, None

    def bound(self, instance: Any, owner: type, name: str, value: Any) -> Any:
        """An attribute that a class has, as Python binds it to an instance."""
        real = real_of(instance)
        if type(value) is types.FunctionType:
            if value is nn.Module.__call__:
                self.refuse("it calls a module by __call__")
            if value is nn.Module.parameters:
                return Function(self, value, functools.partial(self._parameters_of, real))
            return self.method(value, instance)
        if type(value) is property:
            if value.fget is None:
                raise AttributeError(name)
            if is_a(real, nn.Module) and owner.__module__ == "torch.nn.utils.parametrize":
                return self._parametrized(real, name)
            return self.enter(value.fget)(instance)
        if type(value) is staticmethod:
            return self.enter(value.__func__, (vars(owner), name))
        if type(value) is classmethod:
            return self.method(value.__func__, self.stand_in(ClassStandIn, type(real)))
        if hasattr(type(value), "__get__"):
            self.refuse(f"it asks a {type(real).__name__} for {name}, which is a {type(value).__name__}")
        return self.enter(value, (vars(owner), name))

    def _parameters_of(self, module: nn.Module, recurse: Any = True) -> Iterator[Traced]:
        """``module.parameters()``, whose own code would ask which tensor one is."""
        if not is_constant(recurse):
            self.refuse("it asks for some of a module's parameters")
        for part in module.modules():
            for name in ("modules", "named_parameters", "_named_members", "named_modules"):
                own = part.__dict__.get(name, ABSENT)
                self.guard.note_instance(part, name, own)
                if own is not ABSENT or self.in_classes(type(part).__mro__, name)[0] is not nn.Module:
                    self.refuse(f"it asks a {type(part).__name__} for parameters, in a way of its own")
        self.read()
        places = _places_of_parameters(module, recurse)
        self.guard.note_call(_places_of_parameters, (module, recurse), places)
        for part, (_, names) in zip(_parts(module, recurse), places, strict=True):
            for name in ("_parameters", "_modules"):
                held = part.__dict__[name]
                self.guard.note_instance(part, name, held)
                self.guard.note_contents(held)
            for name in names:
                yield self._own_tensor(part, name, part.__dict__["_parameters"])

    def fixed_attribute(self, node: fx.Node, name: str) -> Any:
        """The dtype or the device of a parameter or a buffer, which each call reads again; None for other tensors."""
        path, _, own_name = str(node.target).rpartition(".")
        module = self.root.get_submodule(path) if node.op == "get_attr" else None
        if module is None or not any(own_name in module.__dict__[held] for held in ("_parameters", "_buffers")):
            return None
        self.read()
        found = _attribute_of(module, own_name, name)
        self.guard.note_call(_attribute_of, (module, own_name, name), found)
        return found

    def _parametrized(self, module: nn.Module, name: str) -> Traced:
        """A tensor that torch computes at each reading."""
        if module not in self.places or not is_all_torchs(module) or not computes_only(module):
            self.refuse(f"{name} is computed by a parametrization")
        return self.node("get_attr", self._target(module, name), ())

    # ---- functions --------------------------------------------------------------------------------------------------

    def function(self, function: Any) -> Any:
        """Makes a function anew, of the same code, in the world of stand-ins."""
        known = self._stand_ins.get(id(function))
        if known is not None:
            return known
        if not is_a(function, types.FunctionType):
            self.refuse(f"it calls a {type(function).__name__}")
        code = function.__code__
        reason = why_not_run(code)
        if reason is not None:
            why, line = reason
            self.refuse(f"{why}{_place_in_words(code, line)}")
        self.read()
        self.guard.note_function(function)
        if asks_for_none(code):
            self._asks_for_none = True
            self._check_none()
        globals_key = -id(function.__globals__)  # no object's address is negative
        names = self._stand_ins.get(globals_key)
        if names is None:
            names = self._stand_ins[globals_key] = Globals(self, function.__globals__)
        anew = code.replace()  # without what the interpreter has specialized for the real globals
        self.codes.update(_all_codes(anew))
        cells = []
        for cell in function.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:  # it is empty as yet
                self.read_item(cell, None, ABSENT)
                cells.append(types.CellType())
                continue
            self.read_item(cell, None, value)
            cells.append(types.CellType(value if value is function else self.enter(value, (Cell(cell), 0))))
        made = types.FunctionType(anew, names, function.__name__, None, tuple(cells))
        stand_in = self._stand_ins[id(function)] = Function(self, function, made)
        for cell in made.__closure__ or ():
            if _contents(cell) is function:  # it calls itself
                cell.cell_contents = stand_in
        defaults = function.__defaults__
        made.__defaults__ = (
            None if defaults is None else tuple([self.enter(d, (defaults, i)) for i, d in enumerate(defaults)])
        )
        if function.__kwdefaults__ is not None:
            self.guard.note_contents(function.__kwdefaults__)
            made.__kwdefaults__ = {
                k: self.enter(v, (function.__kwdefaults__, k)) for k, v in function.__kwdefaults__.items()
            }
        return stand_in

    def method(self, function: Any, instance: Any) -> Any:
        """A function whose first argument is bound, as a method's is."""
        entered = self.enter(function)
        made = functools.partial(entered, instance)
        return Function(self, types.MethodType(function, real_of(instance)), made)

    def _partial(self, partial: functools.partial[Any]) -> Any:
        known = self._stand_ins.get(id(partial))
        if known is None:
            self.read()
            self.guard.note_call(_parts_of_partial, (Held(partial),), _parts_of_partial(Held(partial)))
            self.guard.note_contents(partial.keywords)
            args = [self.enter(one, (partial.args, i)) for i, one in enumerate(partial.args)]
            keywords = {name: self.enter(one, (partial.keywords, name)) for name, one in partial.keywords.items()}
            made = functools.partial(self.enter(partial.func), *args, **keywords)
            known = self._stand_ins[id(partial)] = Function(self, partial, made)
        return known

    def call(self, stand_in: StandIn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        real = real_of(stand_in)
        if is_a(stand_in, Primitive):
            if real is torch.is_grad_enabled and self.no_grad_blocks:
                return False
            if real in mode_functions():
                value = real(*args, **kwargs)
                if kwargs or not is_constant(value) or not all(map(is_constant, args)):
                    self.refuse(f"it calls {real.__name__}")
                self.read()
                self.guard.note_call(real, args, value)
                return value
            if real is torch.is_tensor and len(args) == 1 and not kwargs:
                return self._isinstance(args[0], Tensor)
            if real in PURE_FUNCTIONS:
                return real(*args, **kwargs)
            if real in _MAY_GIVE_NONE:
                self._note_maybe_none()
            return self.node("call_function", real, args, kwargs)
        if is_a(stand_in, ClassStandIn):
            if real in PURE_CLASSES:
                return real(*args, **kwargs)
            if real is torch.no_grad and not args and not kwargs:
                return _NoGradBlock(self)
            is_plain = all(map(is_constant, (*args, *kwargs.values())))
            if is_plain and real.__module__ in _FILES_OF_LAYERS_WITHOUT_WEIGHTS and real not in _WITH_WEIGHTS:
                return self.stand_in(Instance, real(*args, **kwargs))
            if is_plain and real.__module__ == "numpy" and is_constant(number := real(*args, **kwargs)):
                return number
            if real is torch.autograd.Variable and len(args) == 1 and is_a(args[0], Traced) and not kwargs:
                return self.node("call_method", "detach", args)
            self.refuse(f"it makes a {real.__name__}")
        if is_a(stand_in, Instance):
            if is_a(real, nn.Module):
                return self.call_layer(real, args, kwargs)
            return self.special(stand_in, "__call__", *args, **kwargs)
        self.refuse(f"it calls {getattr(real, '__name__', None) or f'a {type(real).__name__}'}")

    def special(self, stand_in: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a method that Python calls by itself, as ``len(x)`` calls ``__len__``."""
        real = real_of(stand_in)
        if is_a(stand_in, FixedSet) and name in ("__contains__", "__len__") and all(map(is_constant, args)):
            return getattr(real, name)(*args)
        if not is_a(stand_in, Instance):
            self.refuse(f"it uses a {type(real).__name__}")
        self.guard.note_type(real)
        if name == "__getitem__" and type(real) in (nn.Sequential, nn.ModuleList) and type(args[0]) is slice:
            return self._some_layers(real, args[0])
        owner, value = self.in_classes(type(real).__mro__, name)
        if owner is None and name == "__reversed__":
            length = range(self.special(stand_in, "__len__"))
            return iter([self.special(stand_in, "__getitem__", place) for place in reversed(length)])
        if not is_a(value, types.FunctionType):
            self.refuse(f"it uses {name} of a {type(real).__name__}")
        return self.enter(value)(stand_in, *args, **kwargs)

    def _some_layers(self, layers: Any, places: slice) -> StandIn:
        """``layers[first:last]``, a new module of the same layers."""
        if not all(map(is_constant, (places.start, places.stop, places.step))):
            self.refuse(f"it asks for a part of a {type(layers).__name__} by values that only a call knows")
        self.read()
        self.in_classes(type(layers).__mro__, "__getitem__")
        children = layers.__dict__["_modules"]
        self.guard.note_instance(layers, "_modules", children)
        self.guard.note_contents(children)
        return self.stand_in(Instance, layers[places])

    # ---- modules ------------------------------------------------------------------------------------------------

    def call_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls a module: a layer of torch becomes a node, any other module's forward is run."""
        self.read()
        own = module.__dict__
        if is_a(module, nn.modules.lazy.LazyModuleMixin):
            self.refuse(f"{self._name(module)} is lazy")
        if module not in self.places:
            return self._call_other(module, args, kwargs)
        is_layer = layer_class(type(module)) is not None or is_a(module, torch.jit.ScriptModule)
        if is_layer and not is_a(module, torch.jit.ScriptModule) and own_methods(module) - {"forward"}:
            return self._call_opaque(module, args, kwargs, "it has methods of its own")
        hooks = [hook for name in HOOKS for hook in own[name].values()]
        forward = own.get("forward")
        if hooks or own.get("_compiled_call_impl") is not None or type(module).__call__ is not nn.Module.__call__:
            if is_layer and own.get("_compiled_call_impl") is None and all(map(_is_torchs, hooks)):
                if self.no_grad_blocks:
                    self.refuse(f"{self._name(module)} has hooks, which run where no gradients are recorded")
                self._recomputed.add(id(module))  # weight_norm's, for one, set the weight
                return self._call_as_node(module, args, kwargs)
            return self._call_opaque(module, args, kwargs, "it has hooks, or a call of its own")
        if forward is not None and not is_a(forward, Fused):
            self.guard.note_layer(module)
            return self.enter(forward, (own, "forward"))(*args, **kwargs)
        if is_layer:
            if not is_all_torchs(module):
                return self._call_opaque(module, args, kwargs, "it calls modules, or functions, that are not torch's")
            return self._call_as_node(module, args, kwargs)
        return self._call_inlined(module, args, kwargs)

    def _call_as_node(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced:
        if self.no_grad_blocks and any(is_a(part, _WITH_FAST_PATHS) for part in module.modules()):
            self.refuse(f"{self._name(module)} computes in another way where no gradients are recorded")
        if is_a(module, nn.MultiheadAttention):
            self._note_maybe_none()
        for part in module.modules():
            self.guard.note_layer(part)
            for name, value in part.__dict__.items():
                if callable(value) and name != "forward":
                    self.guard.note_instance(part, name, value)
            self.guard.note_contents(part.__dict__["_modules"])
        self.called.append(module)
        made = self.node("call_module", self._target(module), args, kwargs)
        if self.sizes is not None:
            self.sizes.note_layer(made.node, module)
        return made

    def _call_inlined(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.guard.note_layer(module)
        last = next(iter(reversed(self.graph.nodes)), None)
        before, inlined, called = set(self._inputs), len(self.inlined), len(self.called)
        try:
            forward = self.function(_class_forward(module))
            result = forward(self.stand_in(Instance, module), *args, **kwargs)
            if self.refused is not None:
                raise self.refused
        except Exception as error:  # whatever a forward may raise that is given stand-ins
            for node in reversed(self.graph.nodes):
                if node is last:
                    break
                self.graph.erase_node(node)
            for place in self._inputs.keys() - before:
                if self._inputs[place].node.op == "get_attr":  # which has been erased
                    del self._inputs[place]
            del self.inlined[inlined:], self.called[called:]
            self.refused = None
            return self._call_opaque(module, args, kwargs, words_of(error, self.codes))
        self.inlined.append(module)
        return result

    def _call_other(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the forward of a module that is none of the submodules, such as a loss that a function uses. No path
        leads a node to it, so its forward is run even where it is a layer of torch. If that cannot be traced, neither
        can the caller."""
        own = module.__dict__
        usual = type(module).__call__ is nn.Module.__call__ and own.get("_compiled_call_impl") is None
        if not usual or any(own[name] for name in HOOKS) or is_a(module, torch.jit.ScriptModule):
            self.refuse(f"it calls a {type(module).__name__} that is none of its submodules, and has hooks, or a call "
                        "of its own")  # fmt: skip
        self.guard.note_layer(module)
        forward = own.get("forward")
        if forward is not None and not is_a(forward, Fused):
            return self.enter(forward, (own, "forward"))(*args, **kwargs)
        return self.function(_class_forward(module))(self.stand_in(Instance, module), *args, **kwargs)

    def _call_opaque(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], why: str) -> Traced:
        """Calls code that is not known. It is given only tensors, because it may keep or change other objects."""
        if self.no_grad_blocks:
            self.refuse(f"it calls {self._name(module)} where no gradients are recorded ({why})")
        for one in (*args, *kwargs.values()):
            if not is_a(one, Traced) and not is_constant(one):
                self.refuse(f"it hands a {type(real_of(one)).__name__} to {self._name(module)}")
        self.guard.note_type(module)
        self._note_maybe_none()
        result = self.node("call_module", self._target(module), args, kwargs)
        self.opaque = f"{self._name(module)} ({why})"
        return result

    def _name(self, module: nn.Module) -> str:
        return self.places.get(module) or type(module).__name__

    def _note_maybe_none(self) -> None:
        self._has_maybe_none = True
        self._check_none()

    def _check_none(self) -> None:
        if self._has_maybe_none and self._asks_for_none:
            self.refuse("it asks whether something is None, and something that it is given may be None")

    # ---- builtins that look at objects ------------------------------------------------------------------------------

    def is_equal(self, stand_in: StandIn, other: Any) -> bool:
        """``stand_in == other``, where the user's code does not define it."""
        real = real_of(stand_in)
        if is_a(stand_in, (NotUnderstood, FixedSet)) or is_a(other, (Traced, NotUnderstood, FixedSet)):
            self.refuse(f"it compares a {type(real).__name__}")
        for one in (stand_in, other):
            if is_a(one, Instance):
                kinds = type(real_of(one)).__mro__
                for name in ("__eq__", "__ne__"):
                    if self.in_classes(kinds, name)[1] is not vars(object)[name]:
                        self.refuse(f"it compares a {type(real_of(one)).__name__}")
            elif not is_a(one, StandIn) and type(one).__module__ not in ("builtins", "torch"):
                self.refuse(f"it compares a {type(real).__name__} with a {type(one).__name__}")
        if is_a(stand_in, Function) and is_a(other, Function):
            return bool(real == real_of(other))
        return real is real_of(other)

    def hash_of(self, stand_in: StandIn) -> int:
        real = real_of(stand_in)
        if is_a(stand_in, Instance):
            value = self.in_classes(type(real).__mro__, "__hash__")[1]
            if value not in (object.__hash__, nn.Module.__hash__, Enum.__hash__):
                self.refuse(f"it asks for the hash of a {type(real).__name__}")
        elif is_a(stand_in, NotUnderstood):
            self.refuse(f"it asks for the hash of a {type(real).__name__}")
        return hash(real)

    def truth_of(self, stand_in: StandIn) -> bool:
        real = real_of(stand_in)
        if is_a(stand_in, Instance):
            for name in ("__bool__", "__len__"):
                if self.in_classes(type(real).__mro__, name)[0] is not None:
                    return bool(self.special(stand_in, name))
        elif is_a(stand_in, FixedSet):
            return len(real) != 0
        elif is_a(stand_in, NotUnderstood) or (is_a(real, type) and type(real) not in (type, ABCMeta)):
            self.refuse(f"it asks for the truth of a {type(real).__name__}")
        return True

    def _getattr(self, owner: Any, name: Any, *default: Any) -> Any:
        if is_special(name):
            self.refuse(f"it asks for {name}")
        if is_a(owner, Traced):
            if default and not hasattr(Tensor, name):
                self.refuse(f"it asks whether a tensor has {name}")
            return owner.of_tensor(name)
        if not is_a(owner, (StandIn, Super, *_PLAIN)):
            self.refuse(f"it asks a {type(owner).__name__} for {name}")
        return getattr(owner, name, *default)

    def _hasattr(self, owner: Any, name: Any) -> bool:
        if is_special(name) or (is_a(owner, Traced) and (owner.node.op != "placeholder" or not hasattr(Tensor, name))):
            self.refuse(f"it asks whether something has {name}")
        if is_a(owner, Traced):
            return True
        if not is_a(owner, (StandIn, *_PLAIN)):
            self.refuse(f"it asks whether a {type(owner).__name__} has {name}")
        return hasattr(owner, name)

    def _isinstance(self, value: Any, kinds: Any) -> bool:
        if is_a(value, _NoGradBlock):
            self.refuse("it asks for the class of a torch.no_grad()")
        wanted = _real_classes(kinds)
        if wanted is None or any(type(kind).__instancecheck__ is not type.__instancecheck__ for kind in wanted):
            self.refuse("it asks isinstance for something else than plain classes")
        if is_a(value, Traced):
            if self._is_surely_tensor(value.node) and all(kind in _KNOWN_OF_TENSORS for kind in wanted):
                return Tensor in wanted
            self.refuse("it asks for the class of a tensor")
        real = real_of(value)
        if is_a(value, StandIn):
            self.guard.note_type(real)
        return issubclass(type(real), tuple(wanted))

    def _is_surely_tensor(self, node: fx.Node) -> bool:
        """Whether a value is a tensor. Of what functions give that is known only where sizes are."""
        if node.op == "placeholder":
            return True
        self.asks_for_sizes = True
        return self.sizes is not None and self.sizes.is_tensor(node)

    def _type(self, value: Any, *others: Any) -> Any:
        if others or is_a(value, (Traced, Super, _NoGradBlock)) or (callable(value) and not is_a(value, StandIn)):
            self.refuse("it asks for the class of a tensor, or makes one")
        kind = type(real_of(value))
        if is_a(value, StandIn):
            self.guard.note_type(real_of(value))
        return self.stand_in(ClassStandIn, kind.__bases__[0] if kind in (FixedList, FixedDict) else kind)

    def _super(self, *args: Any) -> Any:
        if args:
            after, instance = args
        else:
            frame = sys._getframe(1)
            after, instance = frame.f_locals.get("__class__"), frame.f_locals.get(frame.f_code.co_varnames[0])
        if not is_a(after, ClassStandIn) or not is_a(instance, Instance):
            self.refuse("it calls super() of something else than its module")
        self.guard.note_type(real_of(instance))
        return Super(self, real_of(after), instance)

    def _callable(self, value: Any) -> bool:
        if is_a(value, Traced):
            self.refuse("it asks whether a tensor can be called")
        if is_a(value, Instance):
            return self.in_classes(type(real_of(value)).__mro__, "__call__")[0] is not None
        return callable(real_of(value))


# Constants that code generated by torch.fx returns unchanged.
_GIVEN_BACK = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)
# The files of torch's layers that a forward may make for itself, but for those of them that have weights
# (_WITH_WEIGHTS).
_FILES_OF_LAYERS_WITHOUT_WEIGHTS = tuple(
    f"torch.nn.modules.{name}"
    for name in (
        *("activation", "distance", "dropout", "flatten", "fold", "loss", "padding", "pixelshuffle", "pooling"),
        "upsampling",
    )
)
_WITH_WEIGHTS = (nn.PReLU, nn.MultiheadAttention)
# Layers that compute in another way where no gradients are recorded.
_WITH_FAST_PATHS = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)
# Values whose attributes need not be noted.
_PLAIN = (bool, int, float, complex, str, bytes, tuple, list, dict, set, frozenset, type(None))
_MOST_NODES = 8192  # of a trace whose loops follow sizes
# What the generated code has names of its own for.
_TAKEN = frozenset({"self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree", *vars(builtins)})
_MAY_GIVE_NONE = (F.multi_head_attention_forward, nn.utils.rnn.pack_padded_sequence, nn.utils.rnn.pack_sequence)
_KNOWN_OF_TENSORS = (Tensor, tuple, list, dict, str, int, float, bool, type(None), PackedSequence, nn.Module)


def _real_classes(kinds: Any) -> list[type] | None:
    found: list[type] = []
    for kind in kinds if is_a(kinds, tuple) else (kinds,):
        if is_a(kind, tuple):
            inner = _real_classes(kind)
            if inner is None:
                return None
            found += inner
        elif is_a(real_of(kind), type):
            found.append(real_of(kind))
        else:
            return None
    return found


def _frozen(held: Held) -> frozenset[Any]:
    return frozenset(held.value)


def _is_plain_complex(number: complex) -> bool:
    """Whether Python reads a complex number's text as the same number: infinities, NaN and -0.0 get lost there."""
    return cmath.isfinite(number) and all(part != 0 or repr(part) == "0.0" for part in (number.real, number.imag))


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return ABSENT


def _parts_of_partial(held: Held) -> tuple[int, int, int]:
    """Which function and arguments a partial has. (The guard holds them.)"""
    return id(held.value.func), id(held.value.args), id(held.value.keywords)


def _all_codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code, and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _all_codes(constant)


def _reads_as_usual(kind: type) -> bool:
    """Whether an attribute of such an object is found in its classes and its own dict, and nowhere else."""
    if _in_classes(kind, "__getattribute__") not in _USUAL_GETATTRIBUTE or kind.__dictoffset__ == 0:
        return False
    if kind.__module__ in ("builtins", "_thread"):
        return False
    return _in_classes(kind, "__getattr__") in (None, nn.Module.__getattr__)


_USUAL_GETATTRIBUTE = (object.__getattribute__, types.SimpleNamespace.__getattribute__)


def _in_classes(kind: type, name: str) -> Any:
    """What a class's instances find by a name. (``getattr`` would ask the class's own class too.)"""
    return next((vars(one)[name] for one in kind.__mro__ if name in vars(one)), None)


def _class_forward(module: nn.Module) -> Any:
    return type(module).forward


def _is_torchs(value: Any) -> bool:
    """Whether a function, or an object that can be called, is of torch or of fastnn."""
    module = getattr(value, "__module__", None) or type(value).__module__
    return str(module).partition(".")[0] in ("torch", "fastnn")


def is_all_torchs(layer: nn.Module) -> bool:
    """Whether a layer of torch runs no code but torch's: not where it has been given modules or functions, as a
    transformer's layers may be, or a parametrization of the user's."""
    for part in layer.modules():
        if part is not layer and (any(part.__dict__[name] for name in HOOKS) or "forward" in part.__dict__):
            return False
        if not _is_torchs(type(part)) and layer_class(type(part)) is None:
            return False
        if any(is_a(value, types.FunctionType) and not _is_torchs(value) for value in part.__dict__.values()):
            return False
    return True


def input_names(forward: Callable[..., Any]) -> list[str]:
    """The arguments that a call must give, which are to be tensors; others keep their defaults."""
    names = []
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        if parameter.default is not parameter.empty:
            continue
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD and parameter.kind is not parameter.POSITIONAL_ONLY:
            raise UntraceableError(f"its forward takes {parameter}")
        names.append(parameter.name)
    if not names:
        raise UntraceableError("its forward takes no argument")
    return names


@functools.cache
def _place_of_out(function: Any) -> int:
    """The place of ``out`` among the arguments of a function of Python, where it may be given by position."""
    if not is_a(function, types.FunctionType):
        return sys.maxsize
    kinds = inspect.signature(function).parameters
    is_positional = "out" in kinds and kinds["out"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    return list(kinds).index("out") if is_positional else sys.maxsize


def _parts(module: nn.Module, recurse: Any) -> list[nn.Module]:
    return list(nn.Module.modules(module)) if recurse else [module]


def _places_of_parameters(module: nn.Module, recurse: Any) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """Of each module within, its number and the names of its parameters, each tensor at its first place alone."""
    seen: set[int] = set()
    found = []
    for place, part in enumerate(_parts(module, recurse)):
        names = []
        for name, tensor in part.__dict__["_parameters"].items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                names.append(name)
        found.append((place, tuple(names)))
    return tuple(found)


def _attribute_of(module: nn.Module, tensor: str, name: str) -> Any:
    return getattr(getattr(module, tensor, None), name, None)


# ---- reasons --------------------------------------------------------------------------------------------------------


def words_of(error: Exception, codes: set[types.CodeType] | None = None) -> str:
    """Why there is no trace, with the line of the user's code that was running."""
    place = ""
    if codes is not None and "(line " not in str(error):
        trace = error.__traceback__
        while trace is not None:
            code = trace.tb_frame.f_code
            if code in codes and f"{os.sep}torch{os.sep}" not in code.co_filename:
                place = _place_in_words(code, trace.tb_lineno)
            trace = trace.tb_next
    text = str(error).partition("\n")[0] or type(error).__name__
    if is_a(error, UntraceableError):
        return f"{text}{place}"
    return f"it cannot be run on stand-ins for tensors: {text}{place}"


def _place_in_words(code: types.CodeType, line: int) -> str:
    text = linecache.getline(code.co_filename, line).strip()
    shown = f": {text}" if text else ""
    return f" (line {line} of {os.path.basename(code.co_filename)}{shown})"


def trace(module: nn.Module, inputs: Sequence[Tensor] | None = None) -> tuple[fx.Graph, Tracer]:
    """What ``module`` does, as a graph of layers and functions, with the guard that it rests on. UntraceableError where
    that cannot be told, for all calls that the guard lets pass, from one run. inputs: with them, what it does with
    inputs of these sizes."""
    tracer = Tracer(module, None if inputs is None else Sizes(inputs))
    try:
        graph = tracer.run()
    except Exception as error:  # whatever a forward may raise that is given stand-ins
        untraceable = UntraceableError(words_of(tracer.refused or error, tracer.codes))
        untraceable.asks_for_sizes = tracer.asks_for_sizes
        raise untraceable from error
    return graph, tracer
