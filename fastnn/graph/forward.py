"""What the forward of an instance becomes when its model is fused."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, Protocol

from torch import Tensor, fx, nn

from fastnn.graph.joining import join
from fastnn.graph.matcher import RECURRENT, Left, Match, insert, match, settings_of
from fastnn.graph.tracing import HOOKS, Fused, input_names, trace, words_of
from fastnn.nn import rnn as fused_rnn
from fastnn.nn._hooks import forward_of, has_global_hooks
from fastnn.ops._autograd import is_compiling


class Observer(Protocol):
    """Somebody who looks at how a fused model runs: everything that is called goes through it."""

    def see_program(self, module: nn.Module, program: Program, inputs: Sequence[Tensor]) -> Any: ...

    def see_recurrent(self, forward: FusedRecurrent, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


observer: Observer | None = None
_observing = 0  # the thread that the observer looks at
_observer_lock = threading.Lock()


@contextmanager
def observing(by: Observer) -> Iterator[None]:
    """Has fused models that this thread calls run under an observer within the block."""
    global observer, _observing
    with _observer_lock:
        observer, _observing = by, threading.get_ident()
        try:
            yield
        finally:
            observer = None


_MOST_TRACES = 50  # of a module, after which it is taken for one that changes at every call


class FusedRecurrent(Fused):
    """The kernel in place of a recurrent layer's forward, by the layer of ``fastnn.nn`` of that name."""

    _twin: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.left and self.module in self.left:
            return self.stock(*args, **kwargs)
        if observer is not None and _observing == threading.get_ident():
            return observer.see_recurrent(self, args, kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        twin = self.twin()
        return type(twin).forward(twin, *args, **kwargs)

    def twin(self) -> Any:
        """The same module, as one of fastnn's class: all it has is in the one dictionary that both share."""
        if self._twin is None:
            kind = getattr(fused_rnn, RECURRENT[forward_of(type(self.module))])
            self._twin = kind.__new__(kind)
            object.__setattr__(self._twin, "__dict__", self.module.__dict__)
        return self._twin


class Program:
    """A module's forward as traced, its matches fused. ``run(*inputs, *tensors)``."""

    def __init__(self, module: nn.Module, left: dict[Any, str]) -> None:
        self.names = input_names(type(module).forward)
        self.stock_graph, tracer = trace(module)
        self.modules = dict(module.named_modules())
        self.passed = [module, *tracer.inlined]
        self.matches = match(self.stock_graph, self.modules)
        for found in list(self.matches.found):
            reason = left.get(key_of(found))
            if reason is not None:
                self.matches.found.remove(found)
                self.matches.left += [Left(layer, reason) for layer in found.layers]
        graph, self.sources = self.write()
        join(graph, self.modules)
        self.is_idle = not self.matches.found  # the module's own forward is as good, and nothing needs a guard
        code = graph.python_code("self")
        scope = dict(code.globals)
        exec(compile(code.src, f"<fused {type(module).__name__}>", "exec"), scope)
        self.run = scope["forward"]
        self._guard()

    def write(self) -> tuple[fx.Graph, list[tuple[Any, str]]]:
        """The graph with its matches fused, whose inputs are the module's and then tensors of layers, `tensor_0` and so
        on; and of each of these a dictionary and a name by which it is found there."""
        sources: list[tuple[Any, str]] = []

        def lift(module: nn.Module, name: str) -> str:
            own: Any = next((held for held in (module._parameters, module._buffers) if name in held), None)
            sources.append((_Attributes(module) if own is None else own, name))  # (None: a parametrization's)
            return f"tensor_{len(sources) - 1}"

        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(self.stock_graph, values))
        insert(graph, self.matches.found, values, lift)
        return graph, sources

    def _guard(self) -> None:
        """Notes what the trace rests on."""
        read = dict.fromkeys([*self.passed, *(m for found in self.matches.found for m in found.modules)])
        self.hooks = [module.__dict__[name] for module in read for name in HOOKS]
        self.readers: list[tuple[dict[str, Any], Any, Any]] = []
        for module in read:
            own = module.__dict__
            names = settings_of(module) if module not in self.passed else [n for n in own if _may_be_read(n)]
            if names:
                reader = itemgetter(*names)
                self.readers.append((own, reader, reader(own)))
        self.children = [(module._modules, list(module._modules.values())) for module in self.passed]
        self.watched, self.kinds = list(read), list(map(type, read))

    def holds(self) -> bool:
        """Whether the module is as it was traced."""
        if any(self.hooks):
            return False
        try:
            for own, reader, values in self.readers:
                if reader(own) != values:
                    return False
        except (KeyError, RuntimeError, ValueError):  # an attribute that is gone, or arrays compared with others
            return False
        for modules, values in self.children:
            if list(modules.values()) != values:
                return False
        return list(map(type, self.watched)) == self.kinds


def _may_be_read(name: str) -> bool:
    """Whether an attribute may be a setting that the module's forward reads."""
    return not name.startswith("_") and name != "forward" and name not in ("call_super_init", "dump_patches")


def key_of(found: Match) -> Any:
    """By what a trial remembers a match: its first layer's module, or the name of its function's node."""
    first = found.layers[0]
    return first.module if first.module is not None else first.node.name


class _Attributes:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __getitem__(self, name: str) -> Any:
        return getattr(self.module, name)


class FusedForward(Fused):
    """Runs a module's program; where there is none, the module's own forward, whose layers may be fused themselves."""

    def __init__(self, module: nn.Module, left: dict[Any, str]) -> None:
        super().__init__(module, left)
        self.forget()

    def forget(self) -> None:
        self.programs: dict[bool, Program | None] = {}
        self.why: str | None = None  # there is no program
        self.traces = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        program = self.programs.get(self.module.training)
        if program is None or kwargs or len(args) != len(program.names):
            program, args, kwargs = self._look_closer(args, kwargs)
            if program is None:
                return self.stock(*args, **kwargs)
        if program.is_idle:
            return self.stock(*args)
        for arg in args:
            if not isinstance(arg, Tensor):
                return self.stock(*args)
        if is_compiling():
            return program.run(self.module, *args, *[own[name] for own, name in program.sources])
        if has_global_hooks():
            return self.stock(*args)
        if observer is not None and _observing == threading.get_ident():
            return observer.see_program(self.module, program, args)
        if not program.holds():
            program = self.program(anew=True)
            if program is None:
                return self.stock(*args)
        try:
            tensors = [own[name] for own, name in program.sources]
        except KeyError:  # a parameter that has been taken away, as parametrizations do
            program = self.program(anew=True)
            if program is None:
                return self.stock(*args)
            tensors = [own[name] for own, name in program.sources]
        return program.run(self.module, *args, *tensors)

    def _look_closer(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """The program, if there is one for such arguments, and these in its order."""
        if is_compiling() or any(isinstance(arg, fx.Proxy) for arg in args):
            return None, args, kwargs
        program = self.program()
        if program is None or len(args) + len(kwargs) != len(program.names):
            return None, args, kwargs
        names = program.names[len(args) :]
        if kwargs.keys() != set(names):
            return None, args, kwargs
        return program, (*args, *(kwargs[name] for name in names)), {}

    def program(self, anew: bool = False) -> Program | None:
        """That for the mode that the module is in; `anew` where the one there is does not hold."""
        mode = self.module.training
        if mode not in self.programs or anew:
            self.programs[mode] = None
            self.traces += 1
            if self.traces <= _MOST_TRACES:
                try:
                    self.programs[mode] = Program(self.module, self.left)
                except Exception as error:  # whatever a forward may raise that is given proxies
                    self.why = words_of(error)
        return self.programs[mode]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.forget()
