"""Whether a layer may be passed by: its operator called in place of the module."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch.nn import Flatten, Module, ModuleDict, ModuleList, ParameterDict, ParameterList, Sequential
from torch.nn.modules.module import _has_any_global_hook

has_global_hooks: Callable[[], bool] = _has_any_global_hook  # hooks of all modules


def has_own_call(module: Any) -> bool:
    """Whether calling ``module`` does more than ``forward`` of its class, were it not for hooks of all modules: it has
    hooks, or a forward of its own."""
    own = module.__dict__  # half of the time of attributes
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def forward_of(kind: type) -> Callable[..., Any] | None:
    """What calling a module of this class runs. None for a class with a call of its own."""
    return getattr(kind, "forward", None) if kind.__call__ is Module.__call__ else None


_CONTAINERS = (Module, Sequential, ModuleList, ModuleDict, ParameterList, ParameterDict)
_PARAMETRIZED = "torch.nn.utils.parametrize"  # where the classes of modules with parametrizations are made
_ALWAYS_ALLOWED = ("extra_repr", "reset_parameters")  # no call of a layer asks for these


_layer_classes: WeakKeyDictionary[type, type | None] = WeakKeyDictionary()


def layer_class(kind: type) -> type | None:
    """The layer of torch, or of fastnn, that a module of this class is: the class itself, or one that it derives from
    without a change to what a call does, as parametrizations make them. None where it is no layer: a module of the
    user's, a container, or a subclass that has a method or an attribute of its own in place of one of the layer's.
    """
    if kind not in _layer_classes:
        _layer_classes[kind] = _find_layer_class(kind)
    return _layer_classes[kind]


def _find_layer_class(kind: type) -> type | None:
    own: list[type] = []
    for one in kind.__mro__:
        if one.__module__.partition(".")[0] in ("torch", "fastnn") and one.__module__ != _PARAMETRIZED:
            if not issubclass(one, Module) or one in (*_CONTAINERS, Flatten):
                return None
            if one.__module__.startswith("fastnn.") and not one.__module__.startswith("fastnn.nn."):
                return None  # a model
            changes = (name for other in own for name in vars(other) if name not in _ALWAYS_ALLOWED)
            return None if any(_is_asked_for(name) and hasattr(one, name) for name in changes) else one
        if one.__module__ != _PARAMETRIZED:
            own.append(one)
    return None


def _is_asked_for(name: str) -> bool:
    return not name.startswith("__") or name in ("__call__", "__getattr__", "__getattribute__", "__setattr__")


def layer_forward(module: Module) -> Callable[..., Any] | None:
    """What calling a layer runs (:func:`layer_class`); None of any other module."""
    kind = layer_class(type(module))
    return None if kind is None else forward_of(kind)


def may_pass_by(module: Any, stock: type) -> bool:
    """Whether calling ``module`` runs ``stock.forward`` and nothing else: it may be of a subclass, as parametrizations
    make one."""
    kind = type(module)
    return (
        (kind is stock or forward_of(kind) is stock.forward)  # type: ignore[attr-defined]
        and not has_own_call(module)
        and not has_global_hooks()
    )
