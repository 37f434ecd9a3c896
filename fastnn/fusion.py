"""``fastnn.fuse``: changes a model so that fastnn's operators run the layers that they can compute.

Only the ``forward`` of instances is replaced. Each module that calls layers gets a :class:`FusedForward`, which runs a
trace of the module in which one operator replaces the layers of each match (``fastnn/graph/matcher.py``); each
recurrent layer gets a :class:`FusedRecurrent`. A trace is valid for the module as it was: whatever the trace depends
on is compared at every call, and where something has changed the module is traced anew.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from fastnn._extension import load_extension
from fastnn.graph.account import account_for
from fastnn.graph.forward import FusedForward, FusedModule, FusedRecurrent, LeftByMode, may_hold_layers
from fastnn.graph.guard import TOKEN
from fastnn.graph.matcher import RECURRENT
from fastnn.graph.rehearsal import copied
from fastnn.graph.trial import try_candidates
from fastnn.nn._hooks import layer_forward


def fuse(model: nn.Module, example_inputs: Any = None, *, strict: bool = False) -> nn.Module:
    """Make a model faster, in place, and return it. Its class, methods, submodules, parameters and state dict stay what
    they were; fastnn's operators run the layers that they can compute, in training and in inference.

    Convolutions with their ReLU and max-pool (and, between them, batch norm), chains of linear layers and activations,
    and recurrent layers become operators of fastnn; everything else, and what cannot be traced, stays as it is:
    :func:`fastnn.explain` lists all of it. Where gradients are recorded, each stretch of layers that
    :func:`fastnn.training_step` takes is one function of autograd, if it is worth one; where they are not, a stretch is
    one call, which reads the parameters as they are. A forward that decides by sizes, or loops over a tensor, is
    followed for the sizes that it is given. :func:`unfuse` gives the stock model back. Optimizers, trainers and what
    else holds the model go on working, as do checkpoints, ``copy.deepcopy`` and pickle. For a stock model beside the
    fused one, copy it first: ``fastnn.fuse(copy.deepcopy(model))``.

    Args:
        model: any module. Wrappers such as DistributedDataParallel come after ``fuse``.
        example_inputs: a tensor, or a tuple of the model's arguments. With them, each candidate is compared with
            torch's layers on what the model gives it (outputs, and gradients where there are parameters to train) and
            timed, in the mode that the model is in; a candidate that is not faster here stays unfused in this mode,
            and all candidates do where the whole model is not faster with them. Call ``fuse`` again in the other mode,
            to try that too. Copies of the model are called for this, some dozens of times, and so are their hooks.
        strict: raise on the first layer that could be fused and is not.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: with ``strict``, a layer stays unfused, and why; or the model does not take the example inputs, or
            cannot be copied. Then a model that was stock is left as stock, where ``strict`` was not the reason.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: expected a model that is a torch.nn.Module, got a {type(model).__name__}")
    left: LeftByMode = {True: {}, False: {}}
    was_fused = False
    for module in model.modules():
        present = module.__dict__.get("forward")
        if isinstance(present, FusedModule):
            left, was_fused = present.left_by_mode, True
    for module in model.modules():
        _fuse_module(module, left)
    if example_inputs is not None:
        inputs = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
        try:
            try_candidates(model, unfuse(copied(model)), inputs, left)
        except BaseException:
            if not was_fused:
                unfuse(model)
            raise
    weakref.finalize(model, load_extension().release_kept_memory).atexit = False
    if strict:
        for row in account_for(model):
            if row.is_candidate and not row.operator:
                raise ValueError(f"fuse: {row.layer or 'the model itself'} stays as it is: {row.why}")
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse`: remove from ``model``, in place, what it has put there, and return the model."""
    for module in model.modules():
        fused = module.__dict__.get("forward")
        if isinstance(fused, FusedModule) and module.__dict__.get(TOKEN) is fused.token:  # not another's
            del module.__dict__["forward"]
        module.__dict__.pop(TOKEN, None)  # so that functions made from the removed forward run the class's forward
    return model


def _fuse_module(module: nn.Module, left: LeftByMode) -> None:
    if "forward" in module.__dict__ or isinstance(module, torch.jit.ScriptModule):
        return
    if layer_forward(module) in RECURRENT:
        FusedRecurrent(module, left)
    elif may_hold_layers(module):
        FusedForward(module, left)
