"""A packed batch's schedule: what kernels need to know of its ``batch_sizes``, on the GPU."""

import torch
from torch import Tensor

from fastnn.kernels import _launch, _plan_cache
from fastnn.kernels._check import check


def _values(batch_sizes: tuple[int, ...]) -> Tensor:
    """Where each step's rows begin, with the end, and then each sequence's length."""
    sizes = torch.tensor((0, *batch_sizes))
    # A sequence runs in the steps that have more sequences than come before it.
    ended = torch.searchsorted(sizes[1:].flip(0), torch.arange(batch_sizes[0]), right=True)
    return torch.cat([sizes.cumsum(0), len(batch_sizes) - ended])


class Schedule:
    """Copied to the GPU once for all calls with equal batch sizes, without waiting: from page-locked memory, on the
    stream that is current then. Other streams wait for the copy before they read it, and the memory is not used for
    anything else before they have."""

    def __init__(self, batch_sizes: tuple[int, ...], device: torch.device) -> None:
        values = _values(batch_sizes)
        self._streams: set[torch.cuda.Stream] = set()  # on which it may be read
        if device.type != "cuda":
            self._tensor = values.to(device)
            return
        self._tensor = values.pin_memory().to(device, non_blocking=True)
        stream = torch.cuda.current_stream(device)
        self._copied = stream.record_event()
        self._streams.add(stream)

    def on_current_stream(self) -> Tensor:
        """The values, to be read on the current stream of their device."""
        if self._tensor.device.type == "cuda":
            stream = torch.cuda.current_stream(self._tensor.device)
            if stream not in self._streams:
                stream.wait_event(self._copied)
                self._tensor.record_stream(stream)
                self._streams.add(stream)
        return self._tensor

    def in_graph(self) -> Tensor:
        """The values, to be read by a CUDA graph that is being captured: whenever it runs, so they are never freed.
        torch.cuda.graph has waited for the copy before the capture began."""
        _read_by_graphs.add(self)
        return self._tensor


_schedules = _plan_cache.Plans()  # forward and backward have theirs in common
_read_by_graphs: set[Schedule] = set()


def schedule_of(op: str, batch_sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """The schedule, to be read on the current stream of ``device``: (steps + 1 + batch), int64."""
    key = (batch_sizes, device)
    schedule = _schedules.get(key)
    with _launch.on(device):
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            check(schedule is not None, op, ": a CUDA graph that is being captured cannot take new batch_sizes along;"
                  " make the same call once before the capture")  # fmt: skip
            return schedule.in_graph()
    if schedule is None:
        schedule = _schedules.keep(key, Schedule(batch_sizes, device))
    return schedule.on_current_stream()
