"""Whether a layer may be passed by: its operator called in place of the module."""

from collections.abc import Callable
from typing import Any

from torch.nn import Module
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


def may_pass_by(module: Any, stock: type) -> bool:
    """Whether calling ``module`` runs ``stock.forward`` and nothing else: it may be of a subclass, as parametrizations
    make one."""
    kind = type(module)
    return (
        (kind is stock or forward_of(kind) is stock.forward)  # type: ignore[attr-defined]
        and not has_own_call(module)
        and not has_global_hooks()
    )
