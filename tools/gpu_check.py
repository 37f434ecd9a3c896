"""Compiles every kernel and configuration that fastnn ships, for every target, on a machine without a GPU.

The launchers run on meta tensors and hand their launches over instead of launching, so that what is compiled here,
alignment included, is what a user's call compiles. Prints a table (kernel, configuration, registers, spills, shared
memory, matrix instructions) and fails on a spill in a loop, on shared memory beyond the target's limit, and on a
16-bit or tf32 dot without a matrix instruction.

    python tools/gpu_check.py [--target sm_90 ...] [--op mlp ...] [--sample] [--write SUMMARY.md]
"""

import argparse
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from gpu_cases import Case, all_cases, float32_precision
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastnn.kernels import _launch, _plan_cache, _precision, _target

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "launch_cooperative_grid", "debug", "sanitize_overflow")


class Launch(NamedTuple):
    """A launch that a launcher asked for."""

    kernel: Any
    arguments: tuple[Any, ...]
    constexprs: dict[str, Any]
    options: dict[str, Any]


class Built(NamedTuple):
    """What the compiler made of a launch."""

    registers: int
    spills: int  # instructions
    spills_in_loops: int  # in innermost loops, and in the innermost with matrix instructions
    shared_memory: int
    matrix_instructions: int


def record_launches(case: Case, target: _target.Target) -> list[Launch]:
    """The launches of a case on ``target``."""
    launches = []
    _plan_cache.Plans.forget_all()

    def record(kernel: Any, grid: Any, device: torch.device, *args: Any, **keywords: Any) -> None:
        constexprs = {name: value for name, value in keywords.items() if name not in _OPTIONS}
        options = {name: value for name, value in keywords.items() if name in _OPTIONS}
        launches.append(Launch(kernel, args, constexprs, options | {"enable_fp_fusion": True}))

    launch, _launch.launch = _launch.launch, record
    try:
        with _target.assume_target(target), float32_precision(case), torch.no_grad():
            case.make(torch.device("meta"))()
    finally:
        _launch.launch = launch
    return launches


def describe(argument: Any, path: tuple[int, ...], constants: dict, attributes: dict, specialize: bool = True) -> Any:
    """An argument's type in the compiler's terms, as Triton specialises it at a launch."""
    if isinstance(argument, tuple):
        return tuple(describe(part, (*path, i), constants, attributes) for i, part in enumerate(argument))
    if argument is None or (specialize and isinstance(argument, int) and argument == 1):
        constants[path] = argument
        return "constexpr"
    if isinstance(argument, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return _POINTERS[argument.dtype]
    if isinstance(argument, float):
        return "fp32"
    if specialize and argument % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= argument < 2**31 else "i64"


def describe_all(launch: Launch) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Signature, constants and attributes of a launch."""
    names = launch.kernel.arg_names
    constants: dict[Any, Any] = {(names.index(name),): value for name, value in launch.constexprs.items()}
    attributes: dict[Any, Any] = {}
    signature = {
        parameter.name: describe(argument, (i,), constants, attributes, not parameter.do_not_specialize)
        for i, (parameter, argument) in enumerate(zip(launch.kernel.params, launch.arguments, strict=False))
    }
    return signature | dict.fromkeys(launch.constexprs, "constexpr"), constants, attributes


def compile_launch(launch: Launch, target: _target.Target) -> Any:
    signature, constants, attributes = describe_all(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    gpu = GPUTarget(target.backend, target.arch, 32 if target.backend == "cuda" else 64)
    return triton.compile(source, target=gpu, options=launch.options)


def build(launch: Launch, target: _target.Target) -> Built:
    compiled = compile_launch(launch, target)
    read = _read_cubin if target.backend == "cuda" else _read_amdgcn
    return read(compiled)


def _read_cubin(compiled: Any) -> Built:
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", path], check=True, capture_output=True, text=True).stdout
        machine_code = subprocess.run([tool, "-sass", path], check=True, capture_output=True, text=True).stdout
    instructions = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", machine_code)]
    # A branch backwards closes a loop; the one to itself at a kernel's end is padding.
    jumps = [(re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text), at) for at, text in instructions]
    loops = [(int(jump[1], 16), at) for jump, at in jumps if jump and int(jump[1], 16) < at]
    matrix = [at for at, text in instructions if re.search(r"\b(HMMA|HGMMA|UTC\w*MMA)\b", text)]
    hot = _innermost(loops) + _innermost([(a, b) for a, b in loops if any(a <= at <= b for at in matrix)])
    spills = [at for at, text in instructions if re.search(r"\b(STL|LDL)\b", text)]
    return Built(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=len(spills),
        spills_in_loops=sum(any(first <= at <= last for first, last in hot) for at in spills),
        shared_memory=compiled.metadata.shared,
        matrix_instructions=len(matrix),
    )


def _innermost(loops: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(a, b) for a, b in loops if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in loops)]


def _read_amdgcn(compiled: Any) -> Built:
    text = compiled.asm["amdgcn"]
    spills = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
    return Built(
        registers=int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]),
        spills=spills,
        spills_in_loops=spills,  # the assembly says how many, not where
        shared_memory=compiled.metadata.shared,
        matrix_instructions=len(re.findall(r"v_mfma", text)),
    )


def faults(built: Built, launch: Launch, case: Case, target: _target.Target) -> Iterator[str]:
    if built.spills_in_loops:
        yield "spills in a loop"
    if built.shared_memory > target.shared_memory:
        yield f"shared memory over {target.shared_memory}"
    precision = launch.constexprs.get("PRECISION")  # of a kernel with dots
    if precision and _precision.uses_matrix_units(case.dtype, precision, target) and built.matrix_instructions == 0:
        yield "no matrix instruction"


def configuration(launch: Launch) -> str:
    blocks = [f"{name[6:].lower()} {value}" for name, value in launch.constexprs.items() if name.startswith("BLOCK_")]
    return ", ".join([*blocks, f"{launch.options['num_warps']} warps", f"{launch.options['num_stages']} stages"])


def summary(rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown: a line a kernel and target, with the worst of its configurations' figures."""
    groups: dict[tuple[str, str], list[Sequence[str]]] = {}
    for row in rows:
        groups.setdefault((row[0], row[5]), []).append(row)
    lines = [
        "| kernel | target | configurations | registers | spills | of them in hot loops | shared memory |"
        " fewest matrix instructions, 16 bits and tf32 | at fault |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (kernel, target), group in sorted(groups.items()):
        worst = [str(max(int(row[column]) for row in group)) for column in (6, 7, 8, 9)]
        matrix = [int(row[10]) for row in group if row[3] and (row[2] != "float32" or row[3].startswith("tf32"))]
        at_fault = sum(row[-1] != "ok" for row in group)
        columns = [kernel, target, len(group), *worst, min(matrix, default=""), at_fault]
        lines.append(f"| {' | '.join(map(str, columns))} |")
    return lines


def check_target(target: _target.Target, ops: Sequence[str], sample: bool) -> tuple[list[tuple[str, ...]], int]:
    """The table's rows, and how many of them are at fault. ``sample``: of each kernel one launch."""
    rows, failed = [], 0
    seen: set[Any] = set()
    for case in all_cases():
        if ops and case.op not in ops:
            continue
        for launch in record_launches(case, target):
            name, precision = launch.kernel.__name__, launch.constexprs.get("PRECISION", "")
            # Layers of one shape launch one kernel.
            key = (
                repr((name, launch.constexprs.get("MODE")))
                if sample
                else repr((name, describe_all(launch), launch.options))
            )
            if key in seen:
                continue
            seen.add(key)
            built = build(launch, target)
            problems = ", ".join(faults(built, launch, case, target))
            failed += bool(problems)
            rows.append((
                name, f"{case.op} {case.shape}", str(case.dtype).removeprefix("torch."), precision,
                configuration(launch), target.name, *map(str, built), problems or "ok",
            ))  # fmt: skip
            print("  ".join(rows[-1]), flush=True)
    return rows, failed


def check(
    targets: Sequence[_target.Target], ops: Sequence[str], sample: bool = False
) -> tuple[list[tuple[str, ...]], int]:
    """The same for several targets, side by side."""
    if len(targets) == 1:
        return check_target(targets[0], ops, sample)
    # Not forked: compilers have threads.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(targets), os.cpu_count() or 1), mp_context=spawn) as pool:
        results = list(pool.map(check_target, targets, itertools.repeat(ops), itertools.repeat(sample)))
    return [row for rows, _ in results for row in rows], sum(failed for _, failed in results)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = {target.name: target for target in _target.TARGETS}
    parser.add_argument("--target", action="append", choices=known, help="default: all")
    parser.add_argument("--op", action="append", help="default: all")
    parser.add_argument("--sample", action="store_true", help="of each kernel one launch only")
    parser.add_argument("--write", type=Path, help="also write a summary as Markdown")
    options = parser.parse_args()
    started = time.monotonic()
    rows, failed = check([known[name] for name in options.target or known], options.op or [], options.sample)
    verdict = f"{len(rows)} launches compiled with Triton {triton.__version__}, {failed} at fault"
    print(f"{verdict}, in {time.monotonic() - started:.0f} s")
    if options.write:
        title = "# What compilers make of the GPU kernels\n\n`make gpu-check`, on a machine without a GPU: "
        options.write.write_text("\n".join([f"{title}{verdict}.", "", *summary(rows)]) + "\n")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
