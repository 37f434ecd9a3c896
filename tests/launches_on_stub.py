"""Launches a kernel of every kind through Triton's own driver, with the library of libcuda_stub.c in place of the
card's: by Triton's dispatch, and as `_launch.Launcher` does it the second time. Prints, as JSON, of each kernel its
launches as the stub has seen them, and what tools/gpu_check.py makes of a call's. tests/test_gpu_launch.py starts it,
in a process of its own."""

import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.nvidia.driver import CudaDriver

from fastnn.kernels import _launch, _target

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
gpu_cases, gpu_check = (importlib.import_module(name) for name in ("gpu_cases", "gpu_check"))

H100 = next(target for target in _target.TARGETS if target.name == "sm_90")
CARD = torch.device("cuda", 0)


def assume_a_card() -> None:
    """What torch without CUDA cannot tell Triton's driver."""
    torch.cuda.current_device = lambda: CARD.index  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch._C._cuda_getCurrentRawStream = lambda device: 0x5EA  # type: ignore[attr-defined]
    triton.runtime.driver.set_active(CudaDriver())


def on_memory(argument: Any, offset: int = 0) -> Any:
    """A launch's argument with memory of its own behind every tensor, ``offset`` elements from a whole vector."""
    if isinstance(argument, tuple):
        return tuple(on_memory(part, offset) for part in argument)
    return torch.empty(64, dtype=argument.dtype)[offset:] if isinstance(argument, torch.Tensor) else argument


def addresses(argument: Any) -> Iterator[int]:
    if isinstance(argument, tuple):
        for part in argument:
            yield from addresses(part)
    elif isinstance(argument, torch.Tensor):
        yield argument.data_ptr()


def first_launches() -> Iterator[Any]:
    """Of every kernel the first launch in the cases."""
    seen = set()
    for case in gpu_cases.all_cases():
        for launch in gpu_check.record_launches(case, H100):
            if launch.kernel not in seen:
                seen.add(launch.kernel)
                yield launch


def log_of(launch: Any) -> dict[str, Any]:
    """A launcher's launches: first and again on the same tensors, on others, and those once more by Triton alone; of a
    short kernel, which is compiled once more for it, also at odd addresses. ``dispatched``: how many of the launcher's
    went through Triton's dispatch."""
    log = Path(os.environ["LAUNCHES"])
    log.write_text("")
    first, second = on_memory(launch.arguments), on_memory(launch.arguments)
    dispatched, dispatch = [], _launch.launch

    def counted(*args: Any, **options: Any) -> Any:
        dispatched.append(args)
        return dispatch(*args, **options)

    _launch.launch = counted
    launcher = _launch.Launcher(launch.kernel, launch.grid, CARD, **launch.constexprs, **launch.options)
    for arguments in (first, first, second):
        launcher(*arguments)
    dispatch(launch.kernel, launch.grid, CARD, *second, **launch.constexprs, **launch.options)
    if launch.kernel.__name__ == "pool_forward":
        launcher(*on_memory(launch.arguments, offset=1))
    _launch.launch = dispatch
    lines = [dict(field.split("=") for field in line.split()) for line in log.read_text().splitlines()]
    return {
        "kernel": launch.kernel.__name__,
        "grid": launch.grid,
        "num_warps": launch.options["num_warps"],
        "cooperative": "launch_cooperative_grid" in launch.options,
        "addresses": [list(addresses(first)), list(addresses(second))],
        "dispatched": len(dispatched),
        "launches": lines,
    }


def floors() -> tuple[float | None, float]:
    """Of a call of an operator, from what it launches; and from its launches, compiled for an H100."""
    case = next(case for case in gpu_cases.all_cases() if case.shape == "RNN_TANH model")
    with gpu_cases.as_asked(case):
        of_call = gpu_check.floor_of_call(case.make(torch.device("cpu")).training, torch.device("cpu"))
    launches = gpu_check.record_launches(case, H100)
    return of_call, sum(gpu_check.floor_of(gpu_check.build(la, H100), la, H100).seconds for la in launches)


if __name__ == "__main__":
    assume_a_card()
    print(json.dumps({"kernels": [log_of(launch) for launch in first_launches()], "floors": floors()}))
