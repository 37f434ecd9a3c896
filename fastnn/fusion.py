"""``fastnn.fuse``: the user's own model, with the layers that fastnn has an operator for run by it.

Nothing of the model changes but the ``forward`` of instances: each module that calls layers gets a
:class:`FusedForward`, which runs what was traced of it, the layers of each match of ``fastnn/graph/matcher.py`` by
one operator; each recurrent layer gets a :class:`FusedRecurrent`. A trace holds for the module as it was: whatever it
depends on is compared at every call, and where something has changed the module is traced anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastnn.graph.account import account_for
from fastnn.graph.forward import FusedForward, FusedModule, FusedRecurrent, may_hold_layers
from fastnn.graph.guard import TOKEN
from fastnn.graph.matcher import RECURRENT
from fastnn.graph.trial import try_candidates
from fastnn.nn._hooks import layer_forward


def fuse(model: nn.Module, example_inputs: Any = None, *, strict: bool = False) -> nn.Module:
    """Make a model faster, in place, and return it: its class, methods, submodules, parameters and state dict are what
    they were, and the layers that fastnn has an operator for are run by that, in training and in inference.

    Convolutions with their ReLU and max-pool (and, between them, batch norm), chains of linear layers and activations,
    and recurrent layers become operators of fastnn; all else stays as it is, as does everything that cannot be traced:
    :func:`fastnn.explain` lists both. :func:`unfuse` gives the stock model back. Optimizers, trainers and whatever else
    holds the model go on working, as do checkpoints, ``copy.deepcopy`` and pickle. Whoever wants the stock model beside
    the fused one copies it first: ``fastnn.fuse(copy.deepcopy(model))``.

    Args:
        model: any module. Wrappers such as DistributedDataParallel come after ``fuse``.
        example_inputs: a tensor, or a tuple of the model's arguments. With them, each candidate is compared with stock
            on what the model gives it (outputs, and gradients where there are parameters to train) and timed, in the
            mode that the model is in; one that is not faster here stays stock.
        strict: raise on the first layer that is left.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: with ``strict``, a layer that is left, and why; or example inputs that the model does not take.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: expected a model that is a torch.nn.Module, got a {type(model).__name__}")
    left: dict[Any, str] = {}
    for module in model.modules():
        present = module.__dict__.get("forward")
        if isinstance(present, FusedModule):
            left = present.left
    for module in model.modules():
        _fuse_module(module, left)
    if example_inputs is not None:
        inputs = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
        try_candidates(model, inputs, left)
    if strict:
        for row in account_for(model):
            if row.is_candidate and not row.operator:
                raise ValueError(f"fuse: {row.layer or 'the model itself'} stays as it is: {row.why}")
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """The stock model again: takes what :func:`fuse` put there off ``model``, in place, and returns it."""
    for module in model.modules():
        fused = module.__dict__.get("forward")
        if isinstance(fused, FusedModule) and module.__dict__.get(TOKEN) is fused.token:  # not one that it borrows
            del module.__dict__["forward"]
            module.__dict__.pop(TOKEN, None)
    return model


def _fuse_module(module: nn.Module, left: dict[Any, str]) -> None:
    if "forward" in module.__dict__ or isinstance(module, torch.jit.ScriptModule):
        return
    if layer_forward(module) in RECURRENT:
        FusedRecurrent(module, left)
    elif may_hold_layers(module):
        FusedForward(module, left)
