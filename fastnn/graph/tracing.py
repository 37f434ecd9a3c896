"""A module's forward as a graph of layers and functions, by torch.fx, where that is what every call does."""

from __future__ import annotations

import copy
import inspect
import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastnn.graph.matcher import why_not_read
from fastnn.ops._autograd import autocast_is_on

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Fused:
    """Stands in the place of ``module.forward``. `left`: of the whole model, what a trial has decided to leave."""

    def __init__(self, module: nn.Module, left: dict[Any, str]) -> None:
        self.module, self.left = module, left

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "left": self.left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.stock)

    @property
    def __code__(self) -> Any:  # torch.export names its inputs by it
        return type(self.module).forward.__code__

    @property
    def stock(self) -> Callable[..., Any]:
        return type(self.module).forward.__get__(self.module)


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, of modules too that keep what they have computed in an attribute, as weight_norm and spectral_norm
    do, which ``copy.deepcopy`` refuses."""
    computed = [t for module in model.modules() for t in module.__dict__.values() if isinstance(t, Tensor)]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in computed if not t.is_leaf})


def may_hold_layers(module: nn.Module) -> bool:
    """Whether a module's forward is worth tracing: it has a forward of its own and modules in it, and is no layer of
    torch.nn but Sequential."""
    kind = type(module)
    if kind.__module__.startswith(("torch.nn", "torch.ao", "fastnn.nn")) and kind.__name__ not in ("Sequential",):
        return False
    if kind.forward is nn.Module.forward or kind.__call__ is not nn.Module.__call__:
        return False
    return bool(module._modules) or bool(module._parameters)


class UntraceableError(Exception):
    """Raised while tracing, where the trace would not be what the model does."""


class _Proxy(fx.Proxy):
    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # `isinstance(x, Tensor)` would be answered for the proxy, and the wrong branch traced. torch's own code asks
        # too, and knows what to do, but for `torch.is_tensor`.
        frame = sys._getframe(1)
        if frame.f_globals.get("__name__", "").partition(".")[0] == "torch":
            asks = frame.f_code.co_name == "is_tensor"
        else:
            asks = "isinstance" in frame.f_code.co_names
        if asks:
            raise UntraceableError("its forward asks for the class of a tensor")
        return fx.Proxy


class _NothingHappens(TorchDispatchMode):
    """Refuses what a forward does to real tensors while it is traced, and would not do at later calls."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            raise UntraceableError("its forward changes a tensor that is no input")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise UntraceableError("its forward draws random numbers")
        return func(*args, **(kwargs or {}))


def _modes() -> tuple[bool, ...]:
    """What a ``with`` of torch's changes for all that is inside."""
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast_is_on()


class _Tracer(fx.Tracer):
    """Traces a module through those that it calls, but not through layers, nor through what cannot be traced."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()  # torch.fx patches classes while it traces, which other threads see
        self.inlined: list[nn.Module] = []
        self.trace_asserts = True
        self.modes = _modes()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes and threading.get_ident() == self.thread:
            # The trace holds what is computed, not under which `with torch.no_grad()`.
            raise UntraceableError("its forward changes whether gradients are recorded, or autocast")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = m.__dict__.get("forward")
        if isinstance(own, Fused):
            return any(m.__dict__[name] for name in HOOKS) or not may_hold_layers(m)
        if type(m) is nn.Flatten:  # of which its function is as good
            return why_not_read(m) is not None
        return why_not_read(m) is not None or not may_hold_layers(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        state = (dict(m.__dict__), dict(self.num_calls), copy.copy(self.module_stack), list(self.inlined))
        last = next(iter(reversed(self.graph.nodes)), None)
        try:
            result = super().call_module(m, lambda *a, **k: type(m).forward(m, *a, **k), args, kwargs)
            _check_unchanged(m, state[0])
            self.inlined.append(m)
            return result
        except Exception:  # whatever a forward may raise that is given proxies: the module stays one call
            for node in reversed(self.graph.nodes):
                if node is last:
                    break
                self.graph.erase_node(node)
            m.__dict__.clear()
            m.__dict__.update(state[0])
            self.num_calls, self.module_stack, self.inlined = state[1], state[2], state[3]
            return self.create_proxy("call_module", path, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        if type(a) is _Proxy:
            return a.node
        if isinstance(a, (Tensor, torch.ScriptObject)) and not any(
            a is held for held in (*self.root.parameters(), *self.root.buffers())
        ):
            raise UntraceableError("its forward makes a tensor of its own")
        return super().create_arg(a)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in input_names(root_fn))]


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


def _check_unchanged(module: nn.Module, before: dict[str, Any]) -> None:
    now = module.__dict__
    if now.keys() != before.keys() or any(now[name] is not value for name, value in before.items()):
        raise UntraceableError("its forward changes an attribute of the module")


def words_of(error: Exception) -> str:
    if isinstance(error, UntraceableError):
        return f"{error}, so it cannot be traced"
    return f"its forward cannot be traced: {str(error).partition(chr(10))[0] or type(error).__name__}"


_trace_lock = threading.RLock()


def trace(module: nn.Module) -> tuple[fx.Graph, _Tracer]:
    """What ``module`` does, as a graph of layers and functions. Raises if that cannot be told, for all calls, from one
    run with stand-ins for tensors."""
    with _trace_lock:
        tracer = _Tracer()
        before = dict(module.__dict__)
        python_state = random.getstate()
        numpy = sys.modules.get("numpy")
        numpy_state = numpy.random.get_state() if numpy else None
        try:
            with _NothingHappens():
                graph = tracer.trace(module)
            _check_unchanged(module, before)
            drew = random.getstate() != python_state
            if numpy and numpy_state:
                drew |= any(map(_differ, numpy.random.get_state(), numpy_state))
            if drew:
                raise UntraceableError("its forward draws random numbers")
        except Exception:
            module.__dict__.clear()
            module.__dict__.update(before)
            raise
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)
        return graph, tracer


def _differ(one: Any, other: Any) -> bool:
    return bool((one != other).any()) if hasattr(one, "any") else bool(one != other)
