"""Whether a layer may be passed by: its operator called in place of the module."""

from typing import Any

from torch.nn.modules.module import _has_any_global_hook


def has_hooks(module: Any) -> bool:
    """Whether calling ``module`` does more than its ``forward``."""
    own = module.__dict__  # half of the time of attributes
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or _has_any_global_hook()
    )
