"""What tests of whole models share."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastnn
from fastnn.graph.rehearsal import copied


def run_and_list(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What a call gives, and the names of the operators of ours that it has run, in their order."""
    with torch.profiler.profile(acc_events=True) as profile:  # without acc_events torch 2.10 warns once
        result = call()
    return result, [event.name for event in profile.events() if event.name.startswith("fastnn::")]


def package(exported: torch.export.ExportedProgram, path: Path) -> str:
    """Compile an exported model by AOTInductor into a file of this path, which is returned. The code that is compiled
    only calls operators, so that the compiler's optimization would take seconds and make nothing faster."""
    options = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    with warnings.catch_warnings():  # torch's own, about its own code
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        return str(torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options))


class Calls(nn.Module):
    """A function of the input and of some layers."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.layers)


class Scaled(nn.Module):
    """A linear layer of one input, times another."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.fc(a) * b


def fused_copy(model: nn.Module, *args: Any, **options: Any) -> nn.Module:
    """A fused copy, beside the stock model that it is held against."""
    return fastnn.fuse(copied(model), *args, **options)
