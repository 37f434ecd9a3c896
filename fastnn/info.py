"""What this installation of fastnn is made of and runs on."""

import importlib.util
import platform
from dataclasses import dataclass, fields

import torch

from fastnn._extension import load_extension
from fastnn._torch import has_kernel, operator_names


@dataclass(frozen=True)
class BackendInfo:
    """Versions, processor and operators, as :func:`backend_info` found them. Prints as a table."""

    version: str
    torch: str
    built_with_torch: str
    compiler: str
    python: str
    triton: str | None
    instruction_set: str
    supported_instruction_sets: tuple[str, ...]
    threads: int
    gpu: str | None
    cpu_operators: tuple[str, ...]
    cuda_operators: tuple[str, ...]

    def __str__(self) -> str:
        rows = []
        for field in fields(self):
            value = getattr(self, field.name)
            text = ", ".join(value) if isinstance(value, tuple) else value
            rows.append(f"{field.name.replace('_', ' '):27} {text if text not in (None, '') else 'none'}")
        return "\n".join(rows)


def backend_info() -> BackendInfo:
    """Describe the compiled extension, the instruction set in use, the threads, the GPU and the operators that have a
    kernel on each."""
    extension = load_extension()
    return BackendInfo(
        version=extension.version,
        torch=torch.__version__,
        built_with_torch=extension.built_with_torch,
        compiler=extension.compiler,
        python=platform.python_version(),
        triton=_triton_version(),
        instruction_set=extension.instruction_set(),
        supported_instruction_sets=tuple(extension.supported_instruction_sets()),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        cpu_operators=_operators_with_kernel("CPU"),
        cuda_operators=_operators_with_kernel("CUDA"),
    )


def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton  # only now: it takes a while

    return triton.__version__


def _operators_with_kernel(dispatch_key: str) -> tuple[str, ...]:
    names = [name for name in operator_names() if name.startswith("fastnn::")]
    return tuple(sorted(n for n in names if has_kernel(n, dispatch_key)))
