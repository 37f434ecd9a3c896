"""The callables that replace the ``forward`` of modules when a model is fused."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from sys import getrefcount
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor, fx, is_grad_enabled, nn
from torch.overrides import has_torch_function

from fastnn._torch import functions_are_watched, is_tracing, transforms_active
from fastnn.graph.alike import Kind, NotAlikeError, Parts, keep, kind_of
from fastnn.graph.guard import TOKEN
from fastnn.graph.joining import join_heads
from fastnn.graph.matcher import RECURRENT, Left, Match, insert, kernel_sizes, match, settings_of
from fastnn.graph.order import follow_writes
from fastnn.graph.stretches import StretchedGraph, compiled, find_stretches
from fastnn.graph.tracing import Fused, UntraceableError, input_names, trace
from fastnn.nn import rnn as fused_rnn
from fastnn.nn._hooks import has_global_hooks, layer_class, layer_forward
from fastnn.ops._autograd import is_compiling, is_exporting


class Observer(Protocol):
    """Watches a fused model run. It is given each trace and each recurrent layer that is due, and has to run it."""

    def see_trace(self, module: nn.Module, trace: Trace, inputs: Sequence[Tensor]) -> Any: ...

    def see_recurrent(self, forward: FusedRecurrent, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


observer: Observer | None = None
_observing = 0  # the thread whose calls the observer sees
_observer_lock = threading.Lock()


@contextmanager
def observing(by: Observer) -> Iterator[None]:
    """Within the block, fused models that this thread calls hand their traces and recurrent layers to an observer."""
    global observer, _observing
    with _observer_lock:
        observer, _observing = by, threading.get_ident()
        try:
            yield
        finally:
            observer = None


class _Token:
    """An object to which only a fused module's own dict and the forward in that dict refer.

    A shallow copy of the module (``copy.copy``, a replica of DataParallel) has the same forward, which cannot tell
    which of the two called it. But the dict of such a copy refers to the token too, which adds a reference to it.
    """


STRETCHES = "stretches"  # the key in `left` of all stretches of layers (stretches.py)
_MOST_TRACES = 8  # the most traces of a module that are kept, each for a state to which the module may return
_FREE_TRIES = 8  # After so many tries of a module that has changed, tracing may only take this part of the time:
_MOST_TIME = 0.01


LeftByMode = dict[bool, dict[Any, str]]  # what stays unfused, and why, in training (True) and in eval mode


class FusedModule(Fused):
    """Replaces ``module.forward``. `left_by_mode`: what trials have decided to leave unfused in the whole model."""

    # It has no dict, since functools.update_wrapper would copy that.
    __slots__ = ("__weakref__", "left_by_mode", "module", "token")

    def __init__(self, module: nn.Module, left_by_mode: LeftByMode) -> None:
        self.module, self.left_by_mode = module, left_by_mode
        self.token = module.__dict__[TOKEN] = _Token()
        module.__dict__["forward"] = self

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "left_by_mode": self.left_by_mode, "token": self.token}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    @property
    def left(self) -> dict[Any, str]:
        """What stays unfused in the mode that the module is in, and why."""
        return self.left_by_mode[self.module.training]

    # The attributes of the bound method that it replaces.

    @property
    def __self__(self) -> nn.Module:
        return self.module

    @property
    def __func__(self) -> Any:
        """A function that runs this forward for its own module, while that is fused, and the class's forward for other
        modules. Libraries such as accelerate wrap the function of a method and put the result into the model: so they
        wrap this forward."""
        stock = type(self.module).forward

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            is_own = module is self.module and module.__dict__.get(TOKEN) is self.token
            return self(*args, **kwargs) if is_own else stock(module, *args, **kwargs)

        functools.update_wrapper(forward, stock)
        forward.__dict__.pop("__wrapped__")  # so that unwrapping gives this function
        forward.__dict__["__signature__"] = inspect.signature(stock)
        return forward

    @property
    def __name__(self) -> str:
        return str(type(self.module).forward.__name__)

    @property
    def __annotations__(self) -> dict[str, Any]:  # type: ignore[override]
        return type(self.module).forward.__annotations__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.stock)

    @property
    def __code__(self) -> Any:  # torch.export names its inputs by it
        return type(self.module).forward.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    @property
    def stock(self) -> Callable[..., Any]:
        return functools.partial(type(self.module).forward, self.module)

    def own(self) -> FusedModule:
        """The forward of the module for which the caller was called: a shallow copy of a module gets its own."""
        caller = sys._getframe(2).f_locals.get("self")
        if caller is self.module:
            return self
        if isinstance(caller, nn.Module) and caller.__dict__.get("forward") is self:
            is_copy = caller.__dict__.get(TOKEN) is self.token
            # (Another module may call this one's forward.)
            return type(self)(caller, self.left_by_mode) if is_copy else self
        holders = [one for one in gc.get_referrers(self.token) if isinstance(one, dict) and one.get("forward") is self]
        if len(holders) > 1 or (holders and holders[0] is not self.module.__dict__):
            raise RuntimeError(
                f"fuse: a {type(self.module).__name__} and its shallow copy have one forward: call the module, which "
                f"tells the two apart, and not its forward"
            )
        if not holders and TOKEN in self.module.__dict__:  # its owner has put another forward there, which calls this
            self.token = self.module.__dict__[TOKEN] = _Token()
        return self  # (Another thread may have held the token for a moment.)


class FusedRecurrent(FusedModule):
    """Runs a recurrent layer by the layer of ``fastnn.nn`` of the same name."""

    __slots__ = ("_stock_forward", "_twin")

    def __init__(self, module: nn.Module, left_by_mode: LeftByMode) -> None:
        super().__init__(module, left_by_mode)
        self._stock_forward, self._twin = type(module).forward, None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stock_forward, self._twin = type(self.module).forward, None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not is_compiling() and getrefcount(self.token) != _REFERENCES and (own := self.own()) is not self:
            return own(*args, **kwargs)
        if self.module in self.left or type(self.module).forward is not self._stock_forward:
            return self.stock(*args, **kwargs)
        if "parametrizations" in self.module._modules:  # The class of such a module computes its weights.
            return self.stock(*args, **kwargs)
        if observer is not None and _observing == threading.get_ident():
            return observer.see_recurrent(self, args, kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        twin = self.twin()
        return type(twin).forward(twin, *args, **kwargs)

    def twin(self) -> Any:
        """The module as an object of fastnn's class. Both objects share one dictionary of attributes."""
        if self._twin is None or self._twin.__dict__ is not self.module.__dict__:
            kind = getattr(fused_rnn, RECURRENT[layer_forward(self.module)])
            self._twin = kind.__new__(kind)
            object.__setattr__(self._twin, "__dict__", self.module.__dict__)
        return self._twin


def _is_like_tensor(arg: Any) -> bool:
    """Whether an object of another class is a tensor whose class does not watch what is computed with it."""
    return isinstance(arg, Tensor) and (is_exporting() or not has_torch_function((arg,)))


_strided = torch.strided
_unread = object()  # in place of the stretches that a trace has not been searched for yet
_write_lock = threading.Lock()
_RECURRENT_SETTINGS = ("mode", "num_layers", "batch_first", "bidirectional", "dropout", "proj_size", "bias")


class _Code:
    """The Python of a fused graph, which the first run writes. It holds no module, so that those that are alike share
    it."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._function: Callable[..., Any] | None = None

    def written(self, modules: dict[str, nn.Module]) -> Callable[..., Any]:
        with _write_lock:
            if self._function is None:
                join_heads(self._graph, modules)
                self._function = compiled(self._graph, f"<fused {type(modules['']).__name__}>")
        return self._function


class Trace:
    """The trace of a module's forward, with its matches fused. ``run(module, *inputs, *tensors)`` computes what the
    forward does, as long as the guard holds: with any inputs, or with inputs of the same sizes as those given."""

    def __init__(self, module: nn.Module, left: dict[Any, str], inputs: Sequence[Tensor] | None = None) -> None:
        forward: Any = type(module).forward
        self.names = input_names(forward)
        # A decorated forward may tell arguments by position from those by name.
        anything = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
        self.takes_keywords = not forward.__code__.co_flags & anything and not hasattr(forward, "__wrapped__")
        self.stock_graph, tracer = trace(module, inputs)
        follow_writes(self.stock_graph)
        self.sizes = None if inputs is None else _sizes_of(inputs)  # None: it is for any inputs
        self.guard = tracer.guard
        self.tensors = tracer.tensors  # containers and keys of the graph's further inputs
        self.modules = dict(module.named_modules())
        self.passed = tracer.inlined
        self.called = tracer.called  # layers
        self.matches = match(self.stock_graph, self.modules)
        for found in list(self.matches.found):
            reason = left.get(key_of(found))
            if reason is not None:
                self.matches.found.remove(found)
                self.matches.left += [Left(layer, reason) for layer in found.layers]
        graph, self.sources = self.write()
        self._code = _Code(graph)
        for found in self.matches.found:
            for layer in found.modules:
                self.guard.note_settings(layer, settings_of(layer))
        for layer in tracer.called:
            if isinstance(getattr(layer, "padding", None), str):  # the kernel's size turns it into numbers
                self.guard.note_call(kernel_sizes, (layer,), kernel_sizes(layer))
            if isinstance(layer, nn.RNNBase):  # it may become one call with what follows (joining.py)
                self.guard.note_settings(layer, _RECURRENT_SETTINGS)
        self.is_idle = not self.matches.found  # then the module's own forward is as good, and needs no guard
        self.run: Callable[..., Any] = self._write_and_run
        self.guard.seal()
        self.holds = self.guard.holds
        self.kind: Kind | None = None  # what is kept of it for modules that are alike
        self.known_stretches: dict[bool, StretchedGraph | None] = {}  # by whether autograd records

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the trace is for inputs of these sizes (and dtypes, on which a view's sizes may depend)."""
        return self.sizes is None or _sizes_of(inputs) == self.sizes

    @classmethod
    def of(cls, module: nn.Module, left: dict[Any, str]) -> Trace:
        """The trace of a module: that of one that was alike, where the guard says that it is this one's too, or else
        a new trace, which is kept for others."""
        parts = Parts(module)
        kind = kind_of(parts)
        trace = None if kind is None else kind.trace.mapped(parts.object_at)
        if trace is None or not trace.guard.begins():
            trace, kind = cls(module, left), None
            if parts.key is not None:
                with suppress(NotAlikeError):
                    kind = Kind(trace.mapped(parts.place_of))
        trace.kind = kind
        if kind is not None:
            keep(parts, kind)
        return trace

    def mapped(self, of: Callable[[Any], Any]) -> Trace:
        """The trace of another module. `of` gives, for an object, the one in its place, or the object itself."""
        other = copy.copy(self)
        other.modules = {name: of(module) for name, module in self.modules.items()}
        other.matches = self.matches.of(other.modules)
        other.passed, other.called = list(map(of, self.passed)), list(map(of, self.called))
        other.tensors, other.sources = [
            [(of(own), name) for own, name in some] for some in (self.tensors, self.sources)
        ]
        other.guard = self.guard.mapped(of)
        other.holds, other.run = other.guard.holds, other._write_and_run
        other.known_stretches = {}
        return other

    def stretched(self, module: nn.Module, records: bool) -> StretchedGraph | None:
        """What runs in place of the trace, for autograd if that `records`, else in inference; None where the trace
        itself is as good, or the module is no longer what was traced."""
        is_read = records in self.known_stretches
        if is_read and ((known := self.known_stretches[records]) is None or known.guard.holds()):
            return known
        if not self.holds():
            return None
        kind, parts = self.kind, Parts(module)
        is_alike = kind is not None and kind_of(parts) is kind
        found: StretchedGraph | None = None
        if not is_read and is_alike and kind is not None and records in kind.stretched:
            found = kind.stretched[records].mapped(parts.object_at)
            if not found.guard.begins():
                found = None
        if found is None:
            found = find_stretches(*self.write(), self.names, self.modules, records)
            if found is not None and is_alike and kind is not None:
                with suppress(NotAlikeError):
                    kind.stretched[records] = found.mapped(parts.place_of)
        self.known_stretches[records] = found
        return found

    def _write_and_run(self, module: nn.Module, *args: Any) -> Any:
        """The first run. (A training step never comes here.)"""
        self.run = self._code.written(self.modules)
        return self.run(module, *args)

    def further_inputs(self) -> list[Any]:
        """What the traced graph takes besides the call's own inputs."""
        return [own[name] for own, name in self.tensors]

    def write(self) -> tuple[fx.Graph, list[tuple[Any, Any]]]:
        """The graph with its matches fused. Its inputs are the module's, then tensors of layers: `fastnn_tensor_0` and
        so on. The second result has, for each of these tensors, the dictionary and the key under which it is found."""
        sources: list[tuple[Any, Any]] = list(self.tensors)

        def lift(module: nn.Module, name: str) -> str:
            sources.append((module._parameters if name in module._parameters else module._buffers, name))
            return f"fastnn_tensor_{len(sources) - 1}"

        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(self.stock_graph, values))
        insert(graph, self.matches.found, values, lift)
        return graph, sources


def _sizes_of(inputs: Sequence[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(one.shape, one.dtype) for one in inputs]


def asks_for_sizes(module: nn.Module) -> bool:
    """Whether a fused module's forward can only be traced for inputs of certain sizes."""
    forward = module.__dict__.get("forward")
    return isinstance(forward, FusedForward) and forward.asks_for_sizes


def key_of(found: Match) -> Any:
    """The key of a match in `left`: its first layer's module, or the name of its function's node."""
    first = found.layers[0]
    return first.module if first.module is not None else first.node.name


def may_hold_layers(module: nn.Module) -> bool:
    """Whether a module's forward is worth tracing: the module is no layer and has submodules or parameters."""
    kind = type(module)
    if kind.__module__.startswith(("torch.", "fastnn.nn")) and kind is not nn.Sequential:
        return False
    if layer_class(kind) is not None or isinstance(module, torch.jit.ScriptModule):
        return False
    forward = next(vars(one)["forward"] for one in kind.__mro__ if "forward" in vars(one))
    if not isinstance(forward, FunctionType) or forward is nn.Module.forward or kind.__call__ is not nn.Module.__call__:
        return False
    return bool(module._modules) or bool(module._parameters)


class FusedForward(FusedModule):
    """Runs a module's trace. Without one it runs the module's own forward, whose layers may be fused themselves."""

    __slots__ = ("_begin", "_spent", "asks_for_sizes", "traces", "tries", "why")

    def __init__(self, module: nn.Module, left_by_mode: LeftByMode) -> None:
        super().__init__(module, left_by_mode)
        self.forget()

    def forget(self) -> None:
        # The traces by training mode, the one used last in front.
        self.traces: dict[bool, tuple[Trace, ...]] = {True: (), False: ()}
        self.why: str | None = None  # the reason why there is no trace
        self.asks_for_sizes = False  # whether there may be traces for inputs of certain sizes alone
        self.tries = 0
        self._begin, self._spent = time.monotonic(), 0.0  # seconds: the start, and the time that tracing has taken

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():  # its guards are made from what the module's own forward reads
            return self.stock(*args, **kwargs)
        if getrefcount(self.token) != _REFERENCES and (own := self.own()) is not self:
            return own(*args, **kwargs)
        traces = self.traces[self.module.training]
        trace = traces[0] if traces else None
        if trace is None or kwargs or len(args) != len(trace.names):
            trace, args, kwargs = self._look_closer(args, kwargs)
            if trace is None:
                return self.stock(*args, **kwargs)
        stretched = None  # also where the guard of the stretches does not hold
        if trace.known_stretches.get(is_grad_enabled(), _unread) is not None:  # to ask each time would cost 0.3 us
            stretched = self._stretches_of(trace)
        if trace.is_idle and stretched is None:
            return self.stock(*args)
        for arg in args:
            if type(arg) is not Tensor and not _is_like_tensor(arg):
                return self.stock(*args)
            if arg.layout is not _strided or arg.is_nested:
                return self.stock(*args)
        if has_global_hooks() or (functions_are_watched() and not is_exporting()):
            return self.stock(*args)
        if not trace.holds() or not trace.fits(args):
            trace = self.trace(inputs=args)
            if trace is None:
                return self.stock(*args)
            stretched = self._stretches_of(trace)
            if trace.is_idle and stretched is None:
                return self.stock(*args)
        if observer is not None and _observing == threading.get_ident():
            return observer.see_trace(self.module, trace, args)
        if stretched is not None:
            return stretched.run(self.module, args)
        return trace.run(self.module, *args, *[own[name] for own, name in trace.sources])

    def _stretches_of(self, trace: Trace) -> StretchedGraph | None:
        """What runs in place of the trace. None where stretches of layers have been left as single layers, or somebody
        writes down which operators run."""
        if STRETCHES in self.left:
            return None
        stretched = trace.stretched(self.module, is_grad_enabled())
        return None if stretched is not None and (is_tracing() or is_exporting()) else stretched

    def _look_closer(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """The trace for such arguments, or None, and the arguments in the order of its inputs."""
        if any(isinstance(arg, fx.Proxy) for arg in args):
            return None, args, kwargs
        of_tensors = not kwargs and all(isinstance(arg, Tensor) for arg in args)
        trace = self.trace(inputs=args if of_tensors else None)
        if trace is None or len(args) + len(kwargs) != len(trace.names):
            return None, args, kwargs
        if kwargs and not trace.takes_keywords:
            return None, args, kwargs
        names = trace.names[len(args) :]
        if kwargs.keys() != set(names):
            return None, args, kwargs
        return trace, (*args, *(kwargs[name] for name in names)), {}

    def trace(self, now: bool = False, inputs: Sequence[Tensor] | None = None) -> Trace | None:
        """The trace for the state that the module is in, and for inputs like these. Where the forward could not be
        traced, or differs at each call, tracing is tried again, since something may have changed: more and more
        seldom, unless `now`."""
        traces = self.traces[self.module.training]
        for known in traces:
            if (inputs is None or known.fits(inputs)) and known.holds():
                self.traces[self.module.training] = (known, *(one for one in traces if one is not known))
                return known
        begin = time.monotonic()
        free = _FREE_TRIES if self.why is None or self.asks_for_sizes else 1
        if not now and self.tries >= free and self._spent > _MOST_TIME * (begin - self._begin):
            return None
        self.tries += 1
        trace: Trace | None = None
        try:
            trace = self._trace_anew(inputs)
            self.why = None
        except UntraceableError as error:
            self.why = str(error)
        self._spent += time.monotonic() - begin
        if trace is not None:
            self.traces[self.module.training] = (trace, *traces[: _MOST_TRACES - 1])
        return trace

    def _trace_anew(self, inputs: Sequence[Tensor] | None) -> Trace:
        """A trace for any inputs, or else for inputs of these sizes."""
        try:
            return Trace.of(self.module, self.left)
        except UntraceableError as error:
            self.asks_for_sizes = error.asks_for_sizes
            # (While somebody watches which operators run, or maps over a batch, sizes are more than numbers.)
            is_watched = is_exporting() or is_tracing() or functions_are_watched()
            if inputs is None or not error.asks_for_sizes or is_watched or transforms_active():
                raise
        try:
            return Trace(self.module, self.left, inputs)
        except UntraceableError:
            self.asks_for_sizes = False
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.forget()


def _count_references() -> int:
    """The number of references to a token that no copy holds, as FusedModule counts them."""
    module = nn.Module()
    fused = FusedModule(module, {})
    return getrefcount(fused.token)


_REFERENCES = _count_references()
