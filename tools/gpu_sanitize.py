"""Runs small calls, forward and backward, under a tool that watches the GPU's memory; tools/gpu_run.py starts it so.

    TRITON_INSTRUMENTATION_MODE=gsan python tools/gpu_sanitize.py races
    compute-sanitizer --tool memcheck python tools/gpu_sanitize.py memory

Triton's race detector knows memory of its own allocator alone, and programs of one launch are what may race: "races"
runs the recurrent kernels whose programs wait for each other, on sizes that tests force. "memory" runs the smallest
case of every operator as well. A finding ends the process with an error.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from gpu_cases import Case, all_cases, as_asked, forced_cases

from fastnn.kernels import _launch, _plan_cache, _target


def cases(kind: str) -> Iterator[Case]:
    for case in forced_cases():
        if case.op == "rnn" and case.dtype is torch.float16 and "RELU" not in case.shape:
            yield case
    if kind == "memory":
        seen = set()
        for case in all_cases():
            if case.op not in seen:
                seen.add(case.op)
                yield case


def memory(kind: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Where tensors come from."""
    if kind != "races" or device.type != "cuda":
        return contextlib.nullcontext()
    from triton.experimental import gsan

    return torch.cuda.use_mem_pool(gsan.create_mem_pool())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("races", "memory"))
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: launch nothing")
    options = parser.parse_args()
    device, target = torch.device("cuda", 0), None
    if options.rehearse:
        device, target = torch.device("meta"), _target.TARGETS[2]
        _launch.launch = lambda *args, **options: None
    with _target.assume_target(target) if target else contextlib.nullcontext(), memory(options.kind, device):
        for case in cases(options.kind):
            _plan_cache.Plans.forget_all()
            with as_asked(case):
                case.make(device).training()
            if device.type == "cuda":
                torch.cuda.synchronize()
            print(f"{case.op} {case.shape}: nothing found", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
