"""The launch of a kernel, at the first call and at those that follow."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton

from fastnn._torch import raw_stream
from fastnn.kernels._target import INTERPRETED


@contextlib.contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """For stock's functions inside an operator: the operator's caller has seen to autocast."""
    if device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
        yield
        return
    with torch.autocast("cuda", enabled=False):
        yield


# How often a program that waits for another one looks, 0 for no end: for tests, in which a kernel that waits for ever
# is to end in a device assert, not to hang.
spin_limit = 0


def meeting_options() -> dict[str, Any]:
    """Of a kernel whose programs wait for each other: all of them must run at once."""
    # Triton keeps its asserts only with ``debug``, which would check all integers for overflow as well.
    asserts = {"debug": True, "sanitize_overflow": False} if spin_limit else {}
    return {"SPIN_LIMIT": spin_limit, "launch_cooperative_grid": True, **asserts}


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """With ``device`` as torch's current one, for what is asked of that alone."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> Any:
    """Run ``kernel`` on ``device``. ``options``: its constexprs, num_warps and num_stages. -> what Triton compiled."""
    # Named, because Triton 3.9 warns where it is not.
    options["enable_fp_fusion"] = True
    if INTERPRETED:
        for name in ("launch_cooperative_grid", "debug", "sanitize_overflow"):
            options.pop(name, None)
    with on(device):
        return kernel[grid](*args, **options)


class Launcher:
    """A kernel with its grid and constants, to be launched again and again on tensors that differ in address alone.

    Triton finds out at every launch which of its compiled kernels the arguments take, which costs 15 us. That is the
    same for all tensors that begin at multiples of 16 bytes, as nearly all do: asked once, kept here.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], device: torch.device, **options: Any) -> None:
        self.grid, self.device = grid, device
        self._kernel, self._options = kernel, options
        self._compiled: Any = None

    def __call__(self, *args: Any) -> None:
        if self._compiled is not None and self.device.index == torch.cuda.current_device() and not _is_profiled():
            addresses, misaligned = _addresses(args)
            if not misaligned % 16:
                stream = raw_stream(self.device.index)
                compiled = self._compiled
                compiled.run(*self._whole_grid, stream, compiled.function, compiled.packed_metadata, None, None, None,
                             *addresses, *self._constants)  # fmt: skip
                return
        compiled = launch(self._kernel, self.grid, self.device, *args, **self._options)
        # Not under the interpreter; and AMD's compiler also looks at the size of the memory behind a pointer.
        if compiled is not None and not torch.version.hip and not _addresses(args)[1] % 16:
            self._constants = tuple(self._options[name] for name in self._kernel.arg_names[len(args) :])
            self._whole_grid = (*self.grid, 1, 1)[:3]
            self._compiled = compiled


def _addresses(args: Sequence[Any]) -> tuple[list[Any], int]:
    """Arguments with addresses in place of tensors, and all their bits together."""
    result, bits = [], 0
    for argument in args:
        if isinstance(argument, torch.Tensor):
            argument = argument.data_ptr()
            bits |= argument
        elif isinstance(argument, tuple):
            argument, inner = _addresses(argument)
            argument, bits = tuple(argument), bits | inner
        result.append(argument)
    return result, bits


def _is_profiled() -> bool:
    """Whether somebody has asked Triton to be told of launches."""
    runtime = triton.knobs.runtime
    # Chains of hooks, in whose place users also put None or a single one.
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))
