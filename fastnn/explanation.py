"""``fastnn.explain``: for each layer that could be fused, the operator and algorithm that run it, or why none does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastnn._torch import TorchDispatchMode
from fastnn.fusion import fuse
from fastnn.graph import forward as forwards
from fastnn.graph.account import WHY, ExplainedCall, account_for, stretches_of, traces_of
from fastnn.graph.forward import FusedModule, FusedRecurrent, Trace
from fastnn.graph.matcher import Layer
from fastnn.graph.rehearsal import cloned, copied, leaving_no_trace, needed_inputs, signature_of
from fastnn.nn import FUSED

_ops = torch.ops.fastnn
_ALGORITHM_OF = {
    _ops.conv_relu_max_pool.default: _ops.conv_relu_max_pool_algorithm.default,
    _ops.conv_relu_max_pool_with_winners.default: _ops.conv_relu_max_pool_algorithm.default,
    _ops.convolution.default: _ops.convolution_algorithm.default,
}


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found. Prints as a table."""

    rows: tuple[ExplainedCall, ...]
    is_fused: bool = True  # False: it describes what `fastnn.fuse` would do
    # The layers' names in networks, of each stretch of layers that is one function of autograd where gradients are
    # recorded, and of each that is one call where they are not.
    stretches: tuple[tuple[str, ...], ...] = ()
    inference: tuple[tuple[str, ...], ...] = ()

    @property
    def calls(self) -> tuple[ExplainedCall, ...]:
        """The rows of fused layers."""
        return tuple(row for row in self.rows if row.operator)

    @property
    def left(self) -> tuple[ExplainedCall, ...]:
        """The rows of layers that stay as they are."""
        return tuple(row for row in self.rows if not row.operator)

    def to_dict(self) -> dict[str, Any]:
        """The rows as lists, dictionaries, strings and bools."""
        stretches, inference = (list(map(list, some)) for some in (self.stretches, self.inference))
        rows = [asdict(row) for row in self.rows]
        return {"is_fused": self.is_fused, "rows": rows, "stretches": stretches, "inference": inference}

    def __str__(self) -> str:
        if not self.rows:
            return "there is no layer that fastnn could fuse"
        heading = tuple(field.name for field in fields(ExplainedCall) if field.name != "is_candidate")
        rows = [heading]
        for row in self.rows:
            rows.append(
                tuple(getattr(row if row.operator else replace(row, operator="left"), name) for name in heading)
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(heading))]
        lines = ["  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        for stretch in self.stretches:
            lines.append(f"Where gradients are recorded, one function: {', '.join(stretch)}")
        for stretch in self.inference:
            lines.append(f"Where they are not, one call: {', '.join(stretch)}")
        if not self.is_fused:
            lines.append("The model is not fused yet: this is what fastnn.fuse would do.")
        return "\n".join(lines)


def explain(model: nn.Module, *inputs: Any) -> Explanation:
    """Run ``model(*inputs)`` once, without gradients, and account for every convolution, pool, linear layer, activation
    and recurrent layer: the operator that runs it and by which algorithm, or why it stays torch's. Below stand the
    stretches of layers that are one function where gradients are recorded, and one call where they are not. Several
    inputs may come in one tuple, too.

    Without inputs nothing is run, and the algorithms, which follow from sizes, are left out. A stock model is
    reported as :func:`fastnn.fuse` would make it. The model itself is not changed. The algorithms of
    ``conv_relu_max_pool`` are in forward those of csrc/kernels/conv: ``winograd``, ``phases``, ``pixels``,
    ``depthwise``, ``direct``, and ``stock``, torch's own convolution followed by ReLU and max-pool in one pass; the
    table says why each is chosen. In backward they are ``winners``, which visits only the argmax of each window,
    ``depthwise``, which has channels in the lanes, ``taps``, which has pixels there (for few input channels),
    ``winograd`` and ``stock``. ``convolution``, which has no ReLU and no pool, has the same; in backward two where the
    gradients of input and weight have an algorithm each.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: expected a torch.nn.Module, got a {type(model).__name__}")
    is_one = len(inputs) == 1 and isinstance(inputs[0], (tuple, list))
    if is_one and needed_inputs(signature_of(model)) == len(inputs[0]) > 1:
        inputs = tuple(inputs[0])  # as fuse and freeze take them
    is_fused = _is_fused(model)
    model = copied(model) if is_fused else fuse(copied(model))
    if not inputs:
        return Explanation(tuple(account_for(model)), is_fused, *_stretches_of(model))
    traces_of(model)
    if any(map(forwards.asks_for_sizes, model.modules())):
        with leaving_no_trace(), torch.no_grad():
            model(*cloned(inputs))  # which traces it for these sizes
    recorder = _Recorder()
    hooks = []
    in_traces = {layer for trace in traces_of(model).values() if trace for layer in trace.called}
    for name, module in model.named_modules():
        if type(module) in FUSED and module not in in_traces:
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: recorder.begin(name)))
            hooks.append(module.register_forward_hook(lambda *_: recorder.end()))
    watch = _Watch(model, recorder)
    try:
        with leaving_no_trace(), torch.no_grad(), recorder, forwards.observing(watch):
            model(*cloned(inputs))
    finally:
        for hook in hooks:
            hook.remove()
    called = list(dict.fromkeys(recorder.calls))  # a cell in a loop makes the same call many times
    seen = {name for call in called for name in call.layer.split(", ")}
    rows = called + [row for row in account_for(model) if not row.operator and row.layer not in seen]
    return Explanation(tuple(rows), is_fused, *_stretches_of(model))


def _stretches_of(model: nn.Module) -> Iterator[tuple[tuple[str, ...], ...]]:
    for records in (True, False):
        yield tuple(stretches_of(model, records))


def _is_fused(model: nn.Module) -> bool:
    """Whether :func:`fuse` has changed the model, or some of its layers are those of fastnn.nn."""
    modules = list(model.modules())
    return any(isinstance(m.__dict__.get("forward"), FusedModule) or type(m) in FUSED for m in modules)


def _text_of(input: Tensor) -> str:
    return f"{tuple(input.shape)} {str(input.dtype).removeprefix('torch.')}"


class _Recorder(TorchDispatchMode):
    """Writes down every call of an operator of fastnn."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[ExplainedCall] = []
        self.layers: list[str] = []  # the layers that are running, the innermost last

    def begin(self, layer: str) -> None:
        self.layers.append(layer)

    def end(self) -> None:
        self.layers.pop()

    def leave(self, input: Tensor) -> None:
        """Notes that torch has computed the layer that runs."""
        self.calls.append(ExplainedCall(self.layers[-1], "", _text_of(input), "", "", WHY["torch"]))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastnn":
            algorithms = ("fused", "fused")
            if func in _ALGORITHM_OF:
                algorithms = _ALGORITHM_OF[func](*args)
            input = next(argument for argument in args if isinstance(argument, Tensor))
            layer = self.layers[-1] if self.layers else ""
            operator = func.overloadpacket.__name__
            left = operator == "convolution" and algorithms[0] == "stock"  # it has no ReLU and no pool behind it
            why = WHY["torch" if left else algorithms[0]]
            self.calls.append(ExplainedCall(layer, operator, _text_of(input), *algorithms, why))
        return func(*args, **(kwargs or {}))


class _Watch:
    """Tells the recorder which layers of a fused model an operator stands for."""

    def __init__(self, model: nn.Module, recorder: _Recorder) -> None:
        self.recorder = recorder
        self.names = {module: name for name, module in model.named_modules()}

    def see_trace(self, module: nn.Module, trace: Trace, inputs: Sequence[Tensor]) -> Any:
        return _WatchedRun(module, trace, self).run(*inputs, *trace.further_inputs())

    def see_recurrent(self, fused: FusedRecurrent, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.recorder.begin(self.names[fused.module])
        try:
            return fused.run(*args, **kwargs)
        finally:
            self.recorder.end()


class _WatchedRun(fx.Interpreter):
    """Runs a trace's stock graph, with each match in the place of its layers."""

    def __init__(self, module: nn.Module, trace: Trace, watch: _Watch) -> None:
        super().__init__(module, garbage_collect_values=False, graph=trace.stock_graph)
        self.watch = watch
        name = watch.names[module]
        self.prefix = f"{name}." if name else ""
        self.matches = {match.nodes[-1]: match for match in trace.matches.found}
        self.skipped = {node for match in trace.matches.found for node in match.nodes[:-1]}

    def run_node(self, n: fx.Node) -> Any:
        if n in self.skipped:
            return None
        match = self.matches.get(n)
        if match is None:
            return self._run_layer(n)
        recorder = self.watch.recorder
        recorder.begin(", ".join(self.prefix + layer.name for layer in match.layers))
        try:
            tensors = [None if place is None else self._value(*place) for place in match.tensors]
            before = len(recorder.calls)
            result = match.call(self.env[match.layers[0].input], tensors)
            if len(recorder.calls) == before:  # the function of the match has left it to torch
                recorder.leave(self.env[match.layers[0].input])
            return result
        finally:
            recorder.end()

    def _run_layer(self, n: fx.Node) -> Any:
        if n.op != "call_module" or type(self.fetch_attr(str(n.target))) not in FUSED:
            return super().run_node(n)
        self.watch.recorder.begin(f"{self.prefix}{n.target}")
        try:
            return super().run_node(n)
        finally:
            self.watch.recorder.end()

    def _value(self, layer: Layer, name: str) -> Any:
        value = layer.tensors[name]
        return self.env[value] if layer.module is None else getattr(layer.module, value)
