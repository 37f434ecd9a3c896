"""The account of a fused model: for each layer that could be fused, the operator that runs it, or the reason why none
does. It says what is known without a call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fastnn._extension import load_extension
from fastnn.graph.forward import STRETCHES, FusedForward, FusedRecurrent, Trace
from fastnn.graph.matcher import RECURRENT, Layer, kind_of, why_not_read
from fastnn.network_program import read
from fastnn.nn._hooks import layer_forward

# The text about each algorithm of the CPU's convolution, and about operators with only one algorithm.
WHY: dict[str, str] = {
    **load_extension().conv_algorithms()["forward"],
    "fused": "one call, sums stay in cache",
    "none": "there is nothing to compute",
    "torch": "torch's own operators are as fast for these sizes",
}


@dataclass(frozen=True)
class ExplainedCall:
    """A layer, or several layers that run as one operator call.

    `operator`, `forward` and `backward` are empty for an unfused layer; `input` is empty for one that was not called.
    """

    layer: str  # its name in the model, or that of its function
    operator: str
    input: str
    forward: str  # the algorithms that are chosen for the sizes
    backward: str
    why: str  # the reason for the algorithm, or for not fusing the layer
    is_candidate: bool = True  # whether fastnn has an operator for such a layer


def traces_of(model: nn.Module) -> dict[nn.Module, Trace | None]:
    """The trace, or None, of each module that runs one or might, except modules inside an outer module's trace."""
    found: dict[nn.Module, Trace | None] = {}
    inside: set[nn.Module] = set()
    for module in model.modules():
        fused = module.__dict__.get("forward")
        if isinstance(fused, FusedForward) and module not in inside:
            found[module] = trace = fused.trace(now=True)
            inside.update(trace.passed if trace else ())
    return found


def stretches_of(model: nn.Module, records: bool) -> Iterator[tuple[str, ...]]:
    """Yields, for each stretch of layers that is one function of autograd, if that `records`, or else one call in
    inference, the names of the layers in networks."""
    for module, trace in traces_of(model).items():
        if trace is None or STRETCHES in module.__dict__["forward"].left:
            continue
        stretched = trace.stretched(module, records)
        for program in () if stretched is None else stretched.networks:
            yield tuple(line.layer for line in read(program) if line.layer not in ("input", "weight", "output"))


def account_for(model: nn.Module) -> list[ExplainedCall]:
    """The rows of a fused model, without the algorithms, which depend on the sizes of a call."""
    rows: list[ExplainedCall] = []
    names = {module: name for name, module in model.named_modules()}
    known: set[nn.Module] = set()
    inside: dict[nn.Module, str] = {}  # modules in an outer module's trace: ""; modules without a trace: why
    for module, trace in traces_of(model).items():
        name = names[module]
        if trace is None:
            inside[module] = module.__dict__["forward"].why or ""
            continue
        for part in trace.passed:
            inside[part] = ""
        prefix = f"{name}." if name else ""
        for found in trace.matches.found:
            rows.append(_row(prefix, found.layers, found.operator, ""))
            known.update(found.modules)
        for one in trace.matches.left:
            rows.append(_row(prefix, [one.layer], "", one.reason))
            known.update([one.layer.module] if one.layer.module is not None else [])
    for module, name in names.items():
        fused = module.__dict__.get("forward")
        kind = kind_of(module)
        if module in known or (kind is None and layer_forward(module) not in RECURRENT):
            continue
        if isinstance(fused, FusedRecurrent):
            is_computed = is_parametrized(module)
            reason = "its weights are computed by parametrizations" if is_computed else fused.left.get(module)
            row = ExplainedCall(name, "" if reason else "rnn", "", "", "", reason or WHY["fused"])
        else:
            row = ExplainedCall(name, "", "", "", "", _why_left(model, names, module, inside), kind in _CANDIDATES)
        rows.append(row)
    return rows


_CANDIDATES = ("conv1d", "conv2d", "conv3d", "linear", *RECURRENT.values())


def _row(prefix: str, layers: Sequence[Layer], operator: str, why: str) -> ExplainedCall:
    names = ", ".join(prefix + layer.name for layer in layers)
    return ExplainedCall(names, operator, "", "", "", why, any(layer.kind in _CANDIDATES for layer in layers))


def _why_left(model: nn.Module, names: dict[nn.Module, str], module: nn.Module, inside: dict[nn.Module, str]) -> str:
    """Why a layer that is in no trace is not fused."""
    if why := why_not_read(module):
        return why
    name = names[module]
    while name:
        name = name.rpartition(".")[0]
        outer = model.get_submodule(name)
        if inside.get(outer):
            return f"in {type(outer).__name__}: {inside[outer]}"
        if type(outer).__module__.startswith("torch.nn.modules.transformer"):
            return f"{type(outer).__name__} is torch's"
    return "the model's forward does not call it"
