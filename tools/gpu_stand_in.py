"""torch.cuda on a machine without a GPU, as far as the tests and benchmarks for one use it, so that each of their lines
runs before it meets a GPU: streams that do nothing, events that look at a clock, graphs that record operators and run
them again on the same tensors."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastnn.graph.stretches import NetworkCall


class Stream:
    def wait_stream(self, stream: "Stream") -> None:
        pass

    def synchronize(self) -> None:
        pass


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.seconds - self.seconds)


class CUDAGraph(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if torch.Tag.inplace_view not in function.tags:  # which leave memory as it is
            # As they are now: such a function may give a tensor another shape later.
            self.calls.append(tree_map_only(torch.Tensor, torch.Tensor.detach, (function, args, kwargs or {}, result)))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, result in self.calls:
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)


@contextlib.contextmanager
def graph(graph: CUDAGraph) -> Iterator[None]:
    with graph:
        yield


def install() -> None:
    """In place of torch.cuda's own, which there is nothing behind. ``is_available`` goes on telling the truth."""
    nothing = {
        name: lambda *args: None
        for name in ("synchronize", "reset_peak_memory_stats", "empty_cache", "set_sync_debug_mode")
    } | {name: lambda *args: 0 for name in ("memory_allocated", "max_memory_allocated")}  # fmt: skip
    own = {"Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph, "graph": graph, "current_stream": Stream,
           "stream": contextlib.nullcontext}  # fmt: skip
    for name, value in (nothing | own).items():
        setattr(torch.cuda, name, value)
    # Networks train on the CPU alone: a GPU's layers run one by one.
    NetworkCall._may_run_at_once = lambda *args: False  # type: ignore[method-assign]
