"""What the kernels share on the way to a GPU: which card it is, the precision of dots, the launch itself."""

import contextlib
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

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


_FLAGS: dict[str, Any] = {
    "linear": torch.backends.cuda.matmul,
    "conv": torch.backends.cudnn.conv,
    "rnn": torch.backends.cudnn.rnn,
}


# Cards whose tensor cores multiply in tf32 at seven times the speed of float32 and more: three products for one pay.
_FAST_TF32 = (80, 90, 100, 103)
# Cards whose matrix instructions take large tiles of operands from shared memory; on others operands fill registers.
LARGE_TILES = (90, 100, 103)
# Tensor cores truncate while they add. Dots of so many products, between which the compiler adds in float32, are as
# exact in three times tf32 as in float32; longer ones are not.
MOST_PRODUCTS_IN_TF32X3 = 32


def dot_precision(dtype: torch.dtype, stock: str, target: Target) -> str:
    """``input_precision`` for tl.dot, from the flag that the stock layer obeys: ``stock`` is "linear", "conv" or "rnn".

    Where it forbids tf32, a convolution is made of three tf32 products; not a chain of linear layers or a recurrent
    step, whose dots are longer than ``MOST_PRODUCTS_IN_TF32X3``."""
    if dtype is not torch.float32 or target.backend == "hip":
        return "ieee"
    if _FLAGS[stock].fp32_precision == "tf32":
        return "tf32"
    return "tf32x3" if stock == "conv" and target.arch in _FAST_TF32 else "ieee"


def uses_matrix_units(dtype: torch.dtype, precision: str, target: Target) -> bool:
    """Whether a dot becomes matrix instructions; on NVIDIA's cards a float32 one in one product without tf32 does
    not."""
    return dtype.itemsize == 2 or precision in ("tf32", "tf32x3") or target.backend == "hip"


def operand_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype of a dot's operands: the tensors' own, except that the interpreter keeps bfloat16 as integers, which
    only a conversion to float32 reads right."""
    return tl.float32 if INTERPRETED and dtype is torch.bfloat16 else _TL_DTYPES[dtype]


@functools.cache
def _table() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(Path(__file__).with_name("tuned.json").read_text())


def tuned(config: Any, target: Target, *shape_class: Any) -> Any:
    """``config`` with what tools/gpu_tune.py has measured to be faster for such shapes on such a GPU."""
    own = _table().get(target.name)
    return config._replace(**own.get(" ".join(map(str, shape_class)), {})) if own else config


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
                stream = torch._C._cuda_getCurrentRawStream(self.device.index)
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


class Plans(dict):
    """What an operator has made of the arguments of earlier calls, by all that it depends on (:func:`facts` of the
    tensors): checks, choices and launchers cost ten times what a launch does. No plan holds a user's tensor."""

    _MOST = 1024
    _all: ClassVar[list["Plans"]] = []

    def __init__(self) -> None:
        super().__init__()
        self._all.append(self)

    def keep(self, key: Any, plan: Any) -> Any:
        if len(self) >= self._MOST:
            self.clear()
        self[key] = plan
        return plan

    @classmethod
    def forget_all(cls) -> None:
        for plans in cls._all:
            plans.clear()


def facts(tensor: torch.Tensor | None) -> Any:
    """All of a tensor that a plan may depend on."""
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device, tensor.layout)
