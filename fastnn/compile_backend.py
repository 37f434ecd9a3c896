"""``torch.compile(model, backend="fastnn")``: the matches of ``fastnn/graph/matcher.py``, the rest by Inductor.

torch finds it by the entry point of that name (pyproject.toml), without fastnn having been imported.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastnn._torch import inductor
from fastnn.graph.matcher import insert, match


def fastnn(
    graph: torch.fx.GraphModule, example_inputs: list[Any], mode: str | None = None, options: Any = None
) -> Callable[..., Any]:
    """Puts fastnn's operators into the graph that Dynamo has captured, and compiles it by Inductor, which gets `mode`
    and `options`."""
    found = match(graph.graph, dict(graph.named_modules())).found
    if found:
        insert(graph.graph, found, {node: node for node in graph.graph.nodes}, _no_modules)
        graph.graph.lint()
        graph.recompile()
    compiled: Callable[..., Any] = inductor(mode, options)(graph, example_inputs)
    return compiled


def _no_modules(module: nn.Module, name: str) -> str:
    raise AssertionError("Dynamo captures functions, whose tensors are nodes")
