"""Which GPU a call runs on, and the tiles that suit it."""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret


class Target(NamedTuple):
    """A kind of GPU, as far as the choice of a kernel's configuration goes."""

    backend: str  # "cuda" or "hip"
    arch: int | str  # 90 for sm_90, or "gfx942"
    shared_memory: int  # bytes one program may use
    processors: int

    @property
    def name(self) -> str:
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)


# The targets that tools/gpu_check.py compiles for; an installed card describes itself.
TARGETS = (
    Target("cuda", 80, 166912, 108),
    Target("cuda", 86, 101376, 84),
    Target("cuda", 90, 232448, 132),
    Target("cuda", 100, 232448, 148),
    Target("hip", "gfx942", 65536, 304),
)
_REFERENCE_TARGET = TARGETS[2]
_assumed: Target | None = None


@functools.cache
def _describe(device: torch.device) -> Target:
    properties = torch.cuda.get_device_properties(device)
    processors = properties.multi_processor_count
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.split(":")[0], 65536, processors)
    arch = properties.major * 10 + properties.minor
    # Which torch's stubs lack, and some of its builds.
    shared_memory = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Target("cuda", arch, shared_memory, processors)


def target_of(device: torch.device) -> Target:
    """The card that ``device`` is; under the interpreter, the one the tables are made for first."""
    return _assumed or (_describe(device) if device.type == "cuda" else _REFERENCE_TARGET)


@contextlib.contextmanager
def assume_target(target: Target) -> Iterator[None]:
    """Choose configurations as on ``target``, to compile or test them on a machine without it."""
    global _assumed
    previous, _assumed = _assumed, target
    try:
        yield
    finally:
        _assumed = previous


# Cards whose matrix instructions take large tiles of operands from shared memory; on others operands fill registers.
LARGE_TILES = (90, 100, 103)


def padded(size: int) -> int:
    """The size of the tile that holds ``size``: a power of two, and at least what a matrix instruction takes."""
    return max(16, triton.next_power_of_2(size))
