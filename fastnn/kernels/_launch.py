"""What the kernels share on the way to a GPU: which card it is, the precision of dots, the launch itself."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret

_TL_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


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


def dot_precision(dtype: torch.dtype, stock: str, target: Target) -> str:
    """``input_precision`` for tl.dot, from the flag that the stock layer obeys: ``stock`` is "linear", "conv" or
    "rnn". tf32x3 is no substitute for ieee: tensor cores truncate while they add, beyond twice stock's error."""
    if dtype is not torch.float32 or target.backend == "hip":
        return "ieee"
    cudnn: Any = torch.backends.cudnn
    flags = {"linear": torch.backends.cuda.matmul, "conv": cudnn.conv, "rnn": cudnn.rnn}
    return "tf32" if flags[stock].fp32_precision == "tf32" else "ieee"


def uses_matrix_units(dtype: torch.dtype, precision: str, target: Target) -> bool:
    """Whether a dot becomes matrix instructions; on NVIDIA's cards a float32 one without tf32 does not."""
    return dtype.itemsize == 2 or precision == "tf32" or target.backend == "hip"


def operand_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype of a dot's operands: the tensors' own, except that the interpreter keeps bfloat16 as integers, which
    only a conversion to float32 reads right."""
    return tl.float32 if INTERPRETED and dtype is torch.bfloat16 else _TL_DTYPES[dtype]


def padded(size: int) -> int:
    """The size of the tile that holds ``size``: a power of two, and at least what a matrix instruction takes."""
    return max(16, triton.next_power_of_2(size))


@contextlib.contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """For stock's functions inside an operator: the operator's caller has seen to autocast."""
    if device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
        yield
        return
    with torch.autocast("cuda", enabled=False):
        yield


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
    """Run ``kernel`` on ``device``. ``options``: its constexprs, num_warps and num_stages."""
    # Named, because Triton 3.9 warns where it is not.
    options["enable_fp_fusion"] = True
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*args, **options)
        return
    with torch.cuda.device(device):
        kernel[grid](*args, **options)
