"""Whether a layer may be passed by: its operator called in place of the module."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch.nn import Flatten, Module, ModuleDict, ModuleList, ParameterDict, ParameterList, Sequential

from fastnn._torch import has_any_global_hook

has_global_hooks: Callable[[], bool] = has_any_global_hook  # hooks of all modules


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


def own_methods(module: Module) -> frozenset[str]:
    """The names under which a module has something of its own in the place of what its classes have."""
    own = module.__dict__.keys()
    return frozenset().union(*[own & vars(kind).keys() for kind in type(module).__mro__])


def forward_of(kind: type) -> Callable[..., Any] | None:
    """What calling a module of this class runs. None for a class with a call of its own."""
    return getattr(kind, "forward", None) if kind.__call__ is Module.__call__ else None


_CONTAINERS = (Module, Sequential, ModuleList, ModuleDict, ParameterList, ParameterDict)
_PARAMETRIZED = "torch.nn.utils.parametrize"  # where the classes of modules with parametrizations are made
# What a class may have that no call of a layer asks for.
_NOT_CALLED = frozenset(
    {
        *("__annotate__", "__annotate_func__", "__annotations__", "__annotations_cache__", "__dict__", "__doc__"),
        *("__firstlineno__", "__init__", "__init_subclass__", "__module__", "__orig_bases__", "__parameters__"),
        *("__qualname__", "__static_attributes__", "__weakref__", "extra_repr", "reset_parameters"),
    }
)


_layer_classes: WeakKeyDictionary[type, tuple[type | None]] = WeakKeyDictionary()


def layer_class(kind: type) -> type | None:
    """The layer of torch, or of fastnn, that a module of this class is: the class itself, or one that it derives from
    without a change to what a call does, as parametrizations make them. None where it is no layer: a module of the
    user's, a container, or a subclass that has methods or attributes of its own.
    """
    known = _layer_classes.get(kind)
    if known is None or kind.__module__.partition(".")[0] != "torch":  # to others something may have been added
        known = _layer_classes[kind] = (_find_layer_class(kind),)
    return known[0]


def _find_layer_class(kind: type) -> type | None:
    own: list[type] = []
    for one in kind.__mro__:
        if one.__module__.partition(".")[0] in ("torch", "fastnn") and one.__module__ != _PARAMETRIZED:
            if not issubclass(one, Module) or one in (*_CONTAINERS, Flatten):
                return None
            if one.__module__.startswith("fastnn.") and not one.__module__.startswith("fastnn.nn."):
                return None  # a model
            return one if all(vars(other).keys() <= _NOT_CALLED for other in own) else None
        if one.__module__ != _PARAMETRIZED:
            own.append(one)
    return None


def layer_forward(module: Module) -> Callable[..., Any] | None:
    """What calling a layer runs (:func:`layer_class`); None of any other module."""
    kind = layer_class(type(module))
    return None if kind is None else forward_of(kind)
