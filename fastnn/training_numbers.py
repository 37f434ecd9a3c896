"""A loss and an optimizer in numbers, as the operators of a training step take them (csrc/ops/training_step.cpp,
StepNumbers), or why they have none."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnn._torch import TENSOR_HOOKS
from fastnn.graph.chain import ChainError
from fastnn.nn._hooks import has_own_call

# ---- losses -------------------------------------------------------------------------------------------------------

_MSE, _L1, _SMOOTH_L1, _HUBER, _BCE, _CROSS_ENTROPY, _NLL = range(7)  # csrc/kernels/update.h, LossKind
_FUNCTIONS: dict[Any, int] = {
    F.mse_loss: _MSE,
    F.l1_loss: _L1,
    F.smooth_l1_loss: _SMOOTH_L1,
    F.huber_loss: _HUBER,
    F.cross_entropy: _CROSS_ENTROPY,
    F.nll_loss: _NLL,
    F.binary_cross_entropy_with_logits: _BCE,
}
_MODULES: dict[type, int] = {
    nn.MSELoss: _MSE,
    nn.L1Loss: _L1,
    nn.SmoothL1Loss: _SMOOTH_L1,
    nn.HuberLoss: _HUBER,
    nn.CrossEntropyLoss: _CROSS_ENTROPY,
    nn.NLLLoss: _NLL,
    nn.BCEWithLogitsLoss: _BCE,
}
_NUMBER = {_SMOOTH_L1: "beta", _HUBER: "delta", _CROSS_ENTROPY: "label_smoothing"}


def settings_of_loss(loss: Any) -> dict[str, Any]:
    """What a module's forward, or a function with arguments given, computes by."""
    if isinstance(loss, functools.partial):
        return dict(loss.keywords)
    if not isinstance(loss, nn.Module):
        return {}
    names = ("reduction", "beta", "delta", "label_smoothing", "ignore_index", "weight", "pos_weight")
    settings = {name: getattr(loss, name) for name in names if hasattr(loss, name)}
    return settings | {"has_own_call": has_own_call(loss), "type": type(loss)}


def numbers_of_loss(loss: Any, of_log_softmax: bool) -> tuple[list[float], Tensor | None]:
    """Kind, whether it is the mean, its number and the class to ignore; and the weights of classes. The loss of a model
    that ends in log_softmax is to be nll_loss, which both together are the cross entropy of what was before."""
    settings: dict[str, Any] = {}
    if isinstance(loss, functools.partial) and not loss.args:
        settings, loss = dict(loss.keywords), loss.func
    if isinstance(loss, nn.Module):
        settings = settings_of_loss(loss)
        kind = None if settings.pop("has_own_call") else _MODULES.get(settings.pop("type"))
    else:
        kind = _FUNCTIONS.get(loss) if isinstance(loss, Hashable) else None
    if kind is None:
        raise ChainError(f"the loss is {getattr(loss, '__name__', type(loss).__name__)}")
    if of_log_softmax != (kind == _NLL):
        raise ChainError("nll_loss and log_softmax are not together")
    kind = _CROSS_ENTROPY if kind == _NLL else kind
    reduction = settings.pop("reduction", "mean")
    if reduction not in ("mean", "sum"):
        raise ChainError(f"the loss's reduction is {reduction!r}")
    number = float(settings.pop(_NUMBER.get(kind, ""), 0.0 if kind == _CROSS_ENTROPY else 1.0))
    if kind in (_SMOOTH_L1, _HUBER) and not number > 0:
        raise ChainError(f"the loss's {_NUMBER[kind]} is {number}")
    ignore_index = float(settings.pop("ignore_index", -100))
    weight = settings.pop("pos_weight" if kind == _BCE else "weight", None)
    if any(value is not None for value in settings.values()):
        raise ChainError(f"the loss has {', '.join(settings)}")
    return [float(kind), float(reduction == "mean"), number, ignore_index], weight


# ---- optimizers and parameters --------------------------------------------------------------------------------------

_SGD, _ADAM, _RMSPROP = range(3)
KINDS: dict[type, int] = {
    torch.optim.SGD: _SGD,
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.RMSprop: _RMSPROP,
}
# The states of an optimizer beside `step`, and the setting of a group with which it keeps them, if not always.
_STATES: dict[int, tuple[tuple[str, str | None], ...]] = {
    _SGD: (("momentum_buffer", "momentum"),),
    _ADAM: (("exp_avg", None), ("exp_avg_sq", None), ("max_exp_avg_sq", "amsgrad")),
    _RMSPROP: (("square_avg", None), ("grad_avg", "centered"), ("momentum_buffer", "momentum")),
}
# Of a group's settings, those by which an optimizer moves its parameters.
HYPERPARAMETERS = (
    *("lr", "weight_decay", "momentum", "dampening", "nesterov", "maximize", "betas", "eps", "amsgrad", "alpha"),
    *("centered", "decoupled_weight_decay"),
)
IS_FIRST = 8  # of SGD's momentum. Layout and numbers: csrc/ops/training_step.cpp, StepNumbers


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """ChainError where the operators do not have the optimizer, or its settings are no numbers."""
    if type(optimizer) not in KINDS:
        raise ChainError(f"the optimizer is {type(optimizer).__name__}")
    own_step = optimizer.__dict__.get("step")  # schedulers put one there that calls the class's
    if own_step is not None and getattr(own_step, "__wrapped__", None) is not type(optimizer).step:
        raise ChainError("the optimizer's step has been replaced")
    for group in optimizer.param_groups:
        if group.get("capturable") or group.get("differentiable"):
            raise ChainError("the optimizer is capturable or differentiable")
        settings = [group.get(name) for name in HYPERPARAMETERS]
        if any(isinstance(one, Tensor) for one in _flatten(settings)):  # which may change in place, unseen
            raise ChainError("a setting of the optimizer is a tensor")


def _flatten(values: Sequence[Any]) -> list[Any]:
    """With the elements of tuples and lists, as `betas` is one, in their place."""
    return [one for value in values for one in (value if isinstance(value, (tuple, list)) else (value,))]


def check_parameters(parameters: Sequence[Any], optimizer: torch.optim.Optimizer) -> None:
    """ChainError where the operators do not take a model's parameters, or not with this optimizer."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(p is None for p in parameters):
        raise ChainError("a parameter is gone")
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise ChainError("none of the model's parameters requires a gradient")
    if len({id(p) for p in parameters}) != len(parameters):
        raise ChainError("a parameter is used twice")
    if not all(id(p) in own for p in trained):
        raise ChainError("the optimizer does not have all of the model's parameters")
    if own - {id(p) for p in trained} and any(
        p.requires_grad and id(p) not in {id(q) for q in trained}
        for group in optimizer.param_groups
        for p in group["params"]
    ):
        raise ChainError("the optimizer has parameters that are not the model's")
    kinds = {(p.dtype, p.device.type) for p in parameters}
    if kinds not in ({(torch.float32, "cpu")}, {(torch.float64, "cpu")}):
        raise ChainError(f"the parameters are {', '.join(sorted(f'{d} on {place}' for d, place in kinds))}")
    if any(
        type(p) is not nn.Parameter or not p.is_leaf or any(getattr(p, one, None) for one in TENSOR_HOOKS)
        for p in trained
    ):
        raise ChainError("a parameter is computed from others or hooked")
    if not all(p.is_contiguous() for p in parameters):
        raise ChainError("a parameter is not contiguous")


def kept_by(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> tuple[str, ...]:
    """The states that a group's parameters have, "" for those that they don't."""
    states = _STATES[KINDS[type(optimizer)]]
    return tuple(name if setting is None or group[setting] else "" for name, setting in states)


def new_step() -> Tensor:
    """As torch.optim makes it."""
    return torch.tensor(0.0, dtype=torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32)


def numbers_of_group(kind: int, group: dict[str, Any]) -> list[float]:
    """As StepNumbers reads them; Adam's says in momentum's place whether weight decay is beside the gradient."""
    adam = kind == _ADAM
    numbers = [
        *(group["lr"], group["weight_decay"], group["maximize"]),
        *(group.get("decoupled_weight_decay", False) if adam else group["momentum"],),
        *(group.get("dampening", 0), group.get("nesterov", False)),
        *(group["betas"] if adam else (0, group.get("alpha", 0))),
        group.get("eps", 0),
    ]
    return list(map(float, numbers))
