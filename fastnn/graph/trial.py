"""Compares each candidate of a fused model with torch's layers: are its results the same, and is it faster?"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastnn._torch import pytree, transforms_active
from fastnn.graph import forward
from fastnn.graph.forward import STRETCHES, FusedForward, FusedModule, FusedRecurrent, LeftByMode, Trace, key_of
from fastnn.graph.matcher import Match
from fastnn.graph.rehearsal import cloned, copied, leaving_no_trace

_SECONDS = 0.04  # A candidate is timed for at least so long,
_LEAST_ROUNDS = 5  # and for at least so many rounds.
# How far a candidate's result may be from stock's, as a share of the result's norm; for dtypes that are not named, the
# last number holds.
_CLOSE = {torch.float64: 1e-8, torch.float32: 1e-3}
_CLOSE_OTHERWISE = 3e-2
# Where a value lies at ReLU's kink, or two elements of a pool's window are equal but for rounding, rounding
# decides which elements of a gradient are zero. So one element of a gradient in _FEW may differ by any amount,
# while the norm of all differences is below this share of the gradient's norm.
_FEW, _CLOSE_WITH_FEW = 100, 0.1


def try_candidates(model: nn.Module, stock: nn.Module, inputs: Sequence[Any], left: LeftByMode) -> None:
    """Runs a copy of the fused model on its inputs, and `stock`, which is an unfused copy. Writes into `left`, for the
    modes in which the model's modules are, by a candidate's key, why that candidate stays unfused."""
    if torch.is_inference_mode_enabled():  # what is copied there could not be trained
        with torch.inference_mode(False):
            return try_candidates(model, copied(stock), inputs, left)
    twin = copied(model)
    of_twin = dict(zip(twin.modules(), model.modules(), strict=True))
    fused_twins = (module.__dict__["forward"] for module in twin.modules() if _is_fused(module))
    of_modes: LeftByMode | None = next((fused.left_by_mode for fused in fused_twins), None)
    trial = _Trial({} if of_modes is None else of_modes[model.training], model.training)
    try:
        with leaving_no_trace():
            with forward.observing(trial):
                twin(*cloned(tuple(inputs)))
            with suppress(Exception):  # a model that fails in a second run, or in backward, keeps its fusions
                trial.settle(twin, stock, tuple(inputs))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        words = str(error).partition("\n")[0]  # torch.fx adds the node in further lines
        raise ValueError(f"fuse: the model does not take the example inputs: {words}") from error
    found = {of_twin.get(key, key): why for key, why in trial.left.items()}
    for mode in {module.training for module in model.modules()}:
        left[mode].update(found)
    for module in model.modules():
        fused = module.__dict__.get("forward")
        if isinstance(fused, FusedForward):
            fused.forget()


def _is_fused(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), FusedModule)


class _Trial:
    def __init__(self, left: dict[Any, str], training: bool) -> None:
        self.left, self.training = left, training
        self.tried: list[Any] = []  # the keys of all candidates

    def settle(self, twin: nn.Module, stock: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Chooses among the whole models: with stretches of layers as one call each, with the
        candidates that are faster by themselves, or stock, since comparing the model with its trace takes time at every
        call. twin, stock: copies of the model, fused and unfused."""
        kept = [key for key in self.tried if key not in self.left]
        single = copied(twin)
        for model in (twin, single):
            for module in model.modules():
                fused = module.__dict__.get("forward")
                if isinstance(fused, FusedForward):
                    fused.forget()
                    if model is single:
                        fused.left_by_mode = {mode: {**fused.left, STRETCHES: ""} for mode in (True, False)}
        models = (twin, single, stock)
        parameters = {model: [p for p in model.parameters() if p.requires_grad] for model in models}

        def step(model: nn.Module) -> None:
            records = self.training and bool(parameters[model])
            with torch.set_grad_enabled(records):
                outputs = [t for t in pytree.tree_leaves(model(*cloned(inputs))) if isinstance(t, Tensor)]
            wanted = [t for t in outputs if t.requires_grad]
            if records and wanted:
                ones = [torch.ones_like(t) for t in wanted]
                torch.autograd.grad(wanted, parameters[model], ones, allow_unused=True)

        for model in models:
            step(model)
        together, apart, stock_time = _time(*(functools.partial(step, model) for model in models))
        if together < min(apart, stock_time):
            return
        mode = "training" if self.training else "inference"
        words = f"{_microseconds(min(apart, stock_time))}, {_microseconds(together)} with them"
        self.left[STRETCHES] = f"the whole model is as fast without them: {words} ({mode})"
        if apart >= stock_time:
            words = f"the whole model is as fast without it: {_microseconds(stock_time)}"
            self.left.update(dict.fromkeys(kept, f"{words}, {_microseconds(apart)} fused ({mode})"))

    def see_trace(self, module: nn.Module, trace: Trace, inputs: Sequence[Tensor]) -> Any:
        return _TrialRun(module, trace, self).run(*inputs, *trace.further_inputs())

    def see_recurrent(self, fused: FusedRecurrent, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def run(function: Callable[..., Any]) -> Callable[[Sequence[Tensor]], Any]:
            _, spec = pytree.tree_flatten((args, kwargs))

            def call(tensors: Sequence[Tensor]) -> Any:
                some, named = pytree.tree_unflatten(list(tensors), spec)
                return function(*some, **named)

            return call

        given, _ = pytree.tree_flatten((args, kwargs))
        parameters = list(fused.module.parameters())
        self.compare(fused.module, run(fused.run), run(fused.stock), given, parameters)
        return fused.stock(*args, **kwargs)

    def compare(
        self,
        key: Any,
        ours: Callable[[Sequence[Any]], Any],
        stock: Callable[[Sequence[Any]], Any],
        given: Sequence[Any],
        parameters: Sequence[Tensor],
    ) -> None:
        """Runs both on the same inputs; notes in `left` if their results differ or ours is not faster."""
        self.tried.append(key)
        if transforms_active():  # the tensors within a transform cannot be made leaves, whose gradients are compared
            self.left[key] = "it runs within a transform of torch.func here"
            return
        inputs = [
            value.detach().requires_grad_(self.training and value.is_floating_point())
            if isinstance(value, Tensor)
            else value
            for value in given
        ]
        leaves = [t for t in (*inputs, *parameters) if isinstance(t, Tensor) and t.requires_grad]

        def step(function: Callable[[Sequence[Any]], Any]) -> tuple[list[Tensor], list[Tensor]]:
            with torch.set_grad_enabled(self.training and bool(leaves)):
                outputs = [t for t in pytree.tree_leaves(function(inputs)) if isinstance(t, Tensor)]
            wanted = [t for t in outputs if t.requires_grad]
            if not wanted:
                return outputs, []
            ones = [torch.ones_like(t) for t in wanted]
            gradients = torch.autograd.grad(wanted, leaves, ones, allow_unused=True)
            return outputs, [g for g in gradients if g is not None]

        state = torch.get_rng_state()
        results = []
        for function in (ours, stock):
            torch.set_rng_state(state)
            try:
                results.append(step(function))
            except NotImplementedError as error:  # from torch, which has no kernel for meta tensors, for example
                self.left[key] = f"it cannot run on these inputs: {error}"
                return
        (outputs, gradients), (expected, of_stock) = results
        if not (_agree(outputs, expected, few=False) and _agree(gradients, of_stock, few=True)):
            self.left[key] = self.left[STRETCHES] = "on the example, its results are not stock's"
            return
        our_time, stock_time = _time(lambda: step(ours), lambda: step(stock))
        if our_time >= stock_time:
            self.left[key] = (
                f"stock is as fast here: {_microseconds(stock_time)}, fused {_microseconds(our_time)}"
                f" ({'training' if self.training else 'inference'})"
            )


class _TrialRun(fx.Interpreter):
    """Runs the stock layers of a trace, and tries each match once its last layer has run."""

    def __init__(self, module: nn.Module, trace: Trace, trial: _Trial) -> None:
        super().__init__(module, garbage_collect_values=False, graph=trace.stock_graph)
        self.trial = trial
        self.last = {match.nodes[-1]: match for match in trace.matches.found}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        match = self.last.get(n)
        if match is not None:
            self._try(match)
        return result

    def _try(self, match: Match) -> None:
        given = self.env[match.layers[0].input]
        tensors = [None if place is None else self._value(*place) for place in match.tensors]

        def ours(inputs: Sequence[Any]) -> Any:
            return match.call(inputs[0], tensors)

        calls = [self._call_of(node) for node in match.nodes]

        def stock(inputs: Sequence[Any]) -> Any:
            value = inputs[0]
            for function, args, kwargs in calls:
                value = function(value, *args, **kwargs)
            return value

        parameters = [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]
        self.trial.compare(key_of(match), ours, stock, [given], parameters)

    def _call_of(self, node: fx.Node) -> tuple[Callable[..., Any], Any, Any]:
        """What a node calls, and its arguments after the first, ready so that timing the call measures nothing else."""
        function: Any = node.target
        if node.op == "call_module":
            function = self.fetch_attr(str(node.target))
        elif node.op == "call_method":
            function = getattr(Tensor, str(node.target))
        given = node.args if "input" in node.kwargs else node.args[1:]
        named = {name: value for name, value in node.kwargs.items() if name != "input"}
        args, kwargs = fx.node.map_arg((given, named), self.env.__getitem__)
        return function, args, kwargs

    def _value(self, layer: Any, name: str) -> Any:
        value = layer.tensors[name]
        return self.env[value] if layer.module is None else getattr(layer.module, value)


def _agree(ours: Sequence[Tensor], stock: Sequence[Tensor], few: bool) -> bool:
    """Whether the results are the same but for rounding. few: whether few elements may differ (see `_FEW`)."""
    return len(ours) == len(stock) and all(
        _is_close(a.detach(), b.detach(), few) for a, b in zip(ours, stock, strict=True)
    )


def _is_close(a: Tensor, b: Tensor, few: bool) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not b.is_floating_point():
        return True
    same = (a == b) | (a.isnan() & b.isnan())  # infinities and NaN, too
    difference = torch.where(same, 0.0, (a - b).abs()).flatten()
    close, scale = _CLOSE.get(b.dtype, _CLOSE_OTHERWISE), float(b.nan_to_num(0.0, 0.0, 0.0).norm()) + 1e-6
    error, others = float(difference.norm()), difference.numel() - difference.numel() // _FEW
    if error <= close * scale:
        return True
    if not few or not error <= _CLOSE_WITH_FEW * scale:
        return False
    return float(difference.topk(others, largest=False, sorted=False).values.norm()) <= close * scale


def _time(*functions: Callable[[], Any]) -> list[float]:
    """The median time of each function in seconds. The functions run in turns."""
    samples: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + _SECONDS
    while len(samples[0]) < _LEAST_ROUNDS or time.perf_counter() < end:
        for function, taken in zip(functions, samples, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in samples]


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
