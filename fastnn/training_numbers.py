"""Writes a loss and an optimizer as numbers, in the form that the operators of a training step take (StepNumbers in
csrc/network/step.cpp), or says why that cannot be done."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnn._extension import load_extension
from fastnn._torch import TENSOR_HOOKS
from fastnn.graph.training_program import NotANetworkError
from fastnn.nn._hooks import has_own_call

# ---- losses -------------------------------------------------------------------------------------------------------


class _Loss(NamedTuple):
    """A row of the extension's table of losses (csrc/kernels/update.h)."""

    name: str  # of torch's function
    number: str | None  # torch's name of the one number that the loss depends on, such as "beta"
    default: float  # torch's default of that number
    weight: str | None  # torch's name of the tensor of weights

    @property
    def kind(self) -> int:
        return _LOSSES.index(self)


_LOSSES = [_Loss(*row) for row in load_extension().losses()]
LOSS_OF_PROGRAM = float(len(_LOSSES))  # the kind of a loss that the program computes itself, as its output
_MODULES: dict[type, str] = {
    nn.MSELoss: "mse_loss",
    nn.L1Loss: "l1_loss",
    nn.SmoothL1Loss: "smooth_l1_loss",
    nn.HuberLoss: "huber_loss",
    nn.CrossEntropyLoss: "cross_entropy",
    nn.NLLLoss: "nll_loss",
    nn.BCEWithLogitsLoss: "binary_cross_entropy_with_logits",
}
_NAMES: dict[Any, str] = {getattr(F, name): name for name in _MODULES.values()}


def settings_of_loss(loss: Any) -> dict[str, Any]:
    """The settings of a loss: the attributes of a module, or the arguments of a functools.partial."""
    if isinstance(loss, functools.partial):
        return dict(loss.keywords)
    if not isinstance(loss, nn.Module):
        return {}
    names = ("reduction", "beta", "delta", "label_smoothing", "ignore_index", "weight", "pos_weight")
    settings = {name: getattr(loss, name) for name in names if hasattr(loss, name)}
    return settings | {"has_own_call": has_own_call(loss), "type": type(loss)}


def numbers_of_loss(loss: Any, of_log_softmax: bool) -> tuple[list[float], Tensor | None]:
    """Four numbers (the kind of the loss, whether it is a mean, the loss's own number, the class to ignore) and the
    tensor of weights. A model that ends in log_softmax must have nll_loss: the two together are the cross entropy of
    log_softmax's input."""
    settings: dict[str, Any] = {}
    if isinstance(loss, functools.partial) and not loss.args:
        settings, loss = dict(loss.keywords), loss.func
    if isinstance(loss, nn.Module):
        settings = settings_of_loss(loss)
        name = None if settings.pop("has_own_call") else _MODULES.get(settings.pop("type"))
    else:
        name = _NAMES.get(loss) if isinstance(loss, Hashable) else None
    if name is None:
        raise NotANetworkError(f"the loss is {getattr(loss, '__name__', type(loss).__name__)}")
    if of_log_softmax != (name == "nll_loss"):
        raise NotANetworkError("nll_loss and log_softmax are not together")
    row = next(row for row in _LOSSES if row.name == ("cross_entropy" if name == "nll_loss" else name))
    reduction = settings.pop("reduction", "mean")
    if reduction not in ("mean", "sum"):
        raise NotANetworkError(f"the loss's reduction is {reduction!r}")
    number = float(settings.pop(row.number or "", row.default))
    if row.number in ("beta", "delta") and not number > 0:
        raise NotANetworkError(f"the loss's {row.number} is {number}")
    ignore_index = float(settings.pop("ignore_index", -100))
    weight = settings.pop(row.weight, None) if row.weight else None  # other weights are refused below
    if any(value is not None for value in settings.values()):
        raise NotANetworkError(f"the loss has {', '.join(settings)}")
    return [float(row.kind), float(reduction == "mean"), number, ignore_index], weight


# ---- optimizers and parameters --------------------------------------------------------------------------------------


class Optimizer(NamedTuple):
    """A row of the extension's table of optimizers (csrc/kernels/optimizers.h)."""

    name: str  # of the class in torch.optim
    settings: Sequence[str]  # a group's settings, which become numbers; beta1 and beta2 are the group's betas
    numbers: Sequence[tuple[str, float]]  # the numbers kept for each parameter, each with its first value
    states: Sequence[tuple[str, str | None]]  # the tensors kept for each parameter, each with the setting that needs it

    @property
    def kind(self) -> int:
        return _OPTIMIZERS.index(self)

    @property
    def group_settings(self) -> tuple[str, ...]:
        """The settings by the names that they have in a group."""
        return tuple(dict.fromkeys("betas" if name in _BETAS else name for name in self.settings))


_BETAS = ("beta1", "beta2")
_OPTIMIZERS = [Optimizer(*row) for row in load_extension().optimizers()]
OPTIMIZERS: dict[type, Optimizer] = {getattr(torch.optim, row.name): row for row in _OPTIMIZERS}
OPTIMIZERS[torch.optim.AdamW] = OPTIMIZERS[torch.optim.Adam]
# The bit of a parameter's layout which says that SGD's momentum begins with this step.
IS_FIRST = 1 << load_extension().most_optimizer_states


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raises NotANetworkError where the operators do not have the optimizer, or its settings are no numbers."""
    row = OPTIMIZERS.get(type(optimizer))
    if row is None:
        raise NotANetworkError(f"the optimizer is {type(optimizer).__name__}")
    class_step = type(optimizer).step
    own_step = optimizer.__dict__.get("step")  # schedulers put a step there that calls the class's
    if (own_step is not None and getattr(own_step, "__wrapped__", None) is not class_step) or not _is_of_torch(
        class_step
    ):
        raise NotANetworkError("the optimizer's step has been replaced")
    for group in optimizer.param_groups:
        if group.get("capturable") or group.get("differentiable"):
            raise NotANetworkError("the optimizer is capturable or differentiable")
        settings = [group.get(name) for name in row.group_settings]
        if any(isinstance(one, Tensor) for one in _flatten(settings)):  # it could change in place, unseen
            raise NotANetworkError("a setting of the optimizer is a tensor")


def _is_of_torch(step: Any) -> bool:
    """Whether torch.optim has defined a method ``step`` and each function that it wraps. A function's globals tell
    that, because functools.wraps copies its name and its module."""
    while step is not None:
        if not getattr(step, "__globals__", {}).get("__name__", "").startswith("torch.optim."):
            return False
        step = getattr(step, "__wrapped__", None)
    return True


def _flatten(values: Sequence[Any]) -> list[Any]:
    """The values, where each tuple or list (`betas` is a tuple) is replaced by its elements."""
    return [one for value in values for one in (value if isinstance(value, (tuple, list)) else (value,))]


def check_parameters(parameters: Sequence[Any], optimizer: torch.optim.Optimizer) -> None:
    """Raises NotANetworkError where the operators do not support a model's parameters, or not with this optimizer."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(p is None for p in parameters):
        raise NotANetworkError("a parameter is gone")
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise NotANetworkError("none of the model's parameters requires a gradient")
    if len({id(p) for p in parameters}) != len(parameters):
        raise NotANetworkError("a parameter is used twice")
    if not any(id(p) in own for p in trained):
        raise NotANetworkError("the optimizer has none of the model's parameters")
    kinds = {(p.dtype, p.device.type) for p in parameters}
    if kinds not in ({(torch.float32, "cpu")}, {(torch.float64, "cpu")}):
        raise NotANetworkError(f"the parameters are {', '.join(sorted(f'{d} on {place}' for d, place in kinds))}")
    if any(
        type(p) is not nn.Parameter or not p.is_leaf or any(getattr(p, one, None) for one in TENSOR_HOOKS)
        for p in trained
    ):
        raise NotANetworkError("a parameter is computed from others or hooked")
    if not all(p.is_contiguous() for p in parameters):
        raise NotANetworkError("a parameter is not contiguous")


def kept_by(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> tuple[str, ...]:
    """The names of the states of a group's parameters, in the table's order, with "" for a state that the group's
    settings do not need."""
    states = OPTIMIZERS[type(optimizer)].states
    return tuple(name if setting is None or group[setting] else "" for name, setting in states)


def new_number(value: float) -> Tensor:
    """A number of an optimizer's state, as torch.optim makes it."""
    return torch.tensor(value, dtype=torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32)


def numbers_of_group(row: Optimizer, group: dict[str, Any]) -> list[float]:
    """The settings of a group in the table's order. Those that torch's class does not have are 0."""
    betas = dict(zip(_BETAS, group.get("betas", ()), strict=False))
    return [float(betas[name] if name in _BETAS else group.get(name, 0)) for name in row.settings]
