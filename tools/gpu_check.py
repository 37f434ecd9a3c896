"""Compiles every kernel and configuration that fastnn ships, for every target, on a machine without a GPU.

The launchers run on meta tensors and hand their launches over instead of launching, so that what is compiled here,
alignment included, is what a user's call compiles. Prints a table (kernel, configuration, registers, spills, shared
memory, matrix instructions; on an H100 the issue floor) and fails

- on a spill in a loop, on shared memory beyond the target's limit, on a 16-bit or tf32 dot without matrix instruction;
- where programs wait for each other, on a step that is missing in the sequence by which results reach them
  (gpu_sass.py), and on more programs than run at once;
- where the instructions of a call take longer to be issued (gpu_floor.py) than the roofline says that it takes.

    python tools/gpu_check.py [--target sm_90 ...] [--op mlp ...] [--sample | --waiting] [--write SUMMARY.md]
"""

import argparse
import contextlib
import itertools
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import gpu_floor
import gpu_roofline
import gpu_sass
import torch
import triton
from gpu_cases import DIRECTIONS, Case, all_cases, as_asked, forced_cases
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastnn.kernels import _launch, _plan_cache, _precision, _target
from fastnn.kernels.rnn import launch as rnn_launch

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
    grid: tuple[int, ...]
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
    code: gpu_sass.Code | None = None  # NVIDIA's


class Row(NamedTuple):
    """Of the table: what was compiled for a target, first for which case."""

    kernel: str
    case: str
    dtype: str
    precision: str
    configuration: str
    target: str
    built: Built
    floor: gpu_floor.Floor | None
    waits: bool  # its programs for each other
    problems: str

    def __str__(self) -> str:
        figures = [str(figure) for figure in self.built if not isinstance(figure, gpu_sass.Code | None)]
        return "  ".join([*self[:6], *figures, *([str(self.floor)] if self.floor else []), self.problems or "ok"])


class Bound(NamedTuple):
    """Of a case and direction: seconds that issuing its launches takes at least, and that are predicted of the call."""

    case: str
    dtype: str
    direction: str
    floor: float
    predicted: float

    @property
    def is_exceeded(self) -> bool:
        return self.floor > self.predicted

    def __str__(self) -> str:
        verdict = "ABOVE" if self.is_exceeded else "within"
        return (
            f"{self.case}  {self.dtype}  {self.direction}: floor {1e6 * self.floor:.1f} us, {verdict} the predicted "
            f"{1e6 * self.predicted:.1f} us"
        )


class Report(NamedTuple):
    rows: list[Row]
    bounds: list[Bound]

    @property
    def failed(self) -> int:
        return sum(bool(row.problems) for row in self.rows) + sum(bound.is_exceeded for bound in self.bounds)


@contextlib.contextmanager
def recorded(dispatches: bool) -> Iterator[list[tuple[Launch, Any]]]:
    """The launches that launchers ask for, and with ``dispatches`` what Triton has compiled for them and launched."""
    launches: list[tuple[Launch, Any]] = []
    launch, call = _launch.launch, _launch.Launcher.__call__

    def record(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **keywords: Any) -> Any:
        compiled = launch(kernel, grid, device, *args, **keywords) if dispatches else None
        constexprs = {name: value for name, value in keywords.items() if name not in _OPTIONS}
        options = {name: value for name, value in keywords.items() if name in _OPTIONS}
        launches.append((Launch(kernel, grid, args, constexprs, options | {"enable_fp_fusion": True}), compiled))
        return compiled

    def call_anew(self: _launch.Launcher, *args: Any) -> None:
        self._compiled = None  # which would be launched without our knowing
        call(self, *args)

    _plan_cache.Plans.forget_all()
    _launch.launch, _launch.Launcher.__call__ = record, call_anew  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        _launch.launch, _launch.Launcher.__call__ = launch, call  # type: ignore[method-assign]


def record_launches(case: Case, target: _target.Target, direction: str = "training") -> list[Launch]:
    """The launches of a case on ``target``."""
    # Stock's recurrent backward launches nothing of ours, and nobody takes what it gives. On the meta device it would
    # go through every step of a sequence.
    without_stock = mock.patch.object(rnn_launch, "stock_backward", return_value=(None, [], []))
    with _target.assume_target(target), as_asked(case), recorded(dispatches=False) as launches, without_stock:
        getattr(case.make(torch.device("meta")), direction)()
    return [launch for launch, _ in launches]


def floor_of_call(run: Callable[[], object], device: torch.device) -> float | None:
    """Seconds that a call on this machine's GPU takes at the least to issue its launches' instructions; None where
    nothing is known of its clock."""
    target = _target.target_of(device)
    if target.name not in gpu_floor.CLOCK or _target.INTERPRETED:
        return None
    with recorded(dispatches=True) as launches:
        run()
    floors = (floor_of(_read_cubin(compiled), launch, target) for launch, compiled in launches)
    return sum(floor.seconds for floor in floors if floor)


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
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    code = gpu_sass.disassemble(compiled.asm["cubin"])
    matrix = [number for number, own in enumerate(code.instructions) if re.search(r"MMA\b", own.opcode.split(".")[0])]
    with_matrix = [loop for loop in code.loops if any(loop.first <= number <= loop.last for number in matrix)]
    hot = code.innermost() + code.innermost(with_matrix)
    spills = [number for number, own in enumerate(code.instructions) if own.starts("STL", "LDL")]
    return Built(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=len(spills),
        spills_in_loops=sum(any(loop.first <= number <= loop.last for loop in hot) for number in spills),
        shared_memory=compiled.metadata.shared,
        matrix_instructions=len(matrix),
        code=code,
    )


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


def floor_of(built: Built, launch: Launch, target: _target.Target) -> gpu_floor.Floor | None:
    """None for a target of whose clock nothing is known."""
    if built.code is None or target.name not in gpu_floor.CLOCK:
        return None
    values = gpu_floor.values_of(launch.kernel, launch.grid, launch.arguments, launch.constexprs)
    return gpu_floor.floor(
        built.code, launch.kernel, values, math.prod(launch.grid), launch.options["num_warps"], built.registers,
        built.shared_memory, target.processors, gpu_floor.CLOCK[target.name],
    )  # fmt: skip


def faults(
    built: Built, floor: gpu_floor.Floor | None, launch: Launch, case: Case, target: _target.Target
) -> Iterator[str]:
    if built.shared_memory > target.shared_memory:
        yield f"shared memory over {target.shared_memory}"
    if built.spills_in_loops and not case.is_forced:  # which no user's call is
        yield "spills in a loop"
    precision = launch.constexprs.get("PRECISION")  # of a kernel with dots
    if precision and _precision.uses_matrix_units(case.dtype, precision, target) and built.matrix_instructions == 0:
        yield "no matrix instruction"
    if _waits(launch):
        if built.code is not None:
            yield from gpu_sass.faults_of_waiting(built.code)
        if floor is not None and math.prod(launch.grid) > floor.at_once * target.processors:
            yield "more programs than run at once"


def _waits(launch: Launch) -> bool:
    """Whether programs wait for each other."""
    return bool(launch.options.get("launch_cooperative_grid"))


def configuration(launch: Launch) -> str:
    blocks = [f"{name[6:].lower()} {value}" for name, value in launch.constexprs.items() if name.startswith("BLOCK_")]
    return ", ".join([*blocks, f"{launch.options['num_warps']} warps", f"{launch.options['num_stages']} stages"])


def summary(report: Report) -> list[str]:
    """Markdown: a line a kernel and target, with the worst of its configurations' figures; then a line a case of which
    the roofline says something."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in report.rows:
        groups.setdefault((row.kernel, row.target), []).append(row)
    lines = [
        "| kernel | target | configurations | registers | spills | of them in hot loops | shared memory |"
        " fewest matrix instructions, 16 bits and tf32 | most barriers a turn of the hot loop |"
        " narrowest loads there, bits | at fault |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (kernel, target), group in sorted(groups.items()):
        worst = [max(row.built[column] for row in group) for column in range(4)]
        matrix = [
            row.built.matrix_instructions for row in group
            if row.precision and (row.dtype != "float32" or row.precision.startswith("tf32"))
        ]  # fmt: skip
        floors = [row.floor for row in group if row.floor]
        barriers = max((floor.barriers for floor in floors), default="")
        loads = min((bits for floor in floors for bits in floor.loads), default="")
        at_fault = sum(bool(row.problems) for row in group)
        columns = [kernel, target, len(group), *worst, min(matrix, default=""), barriers, loads, at_fault]
        lines.append(f"| {' | '.join(map(str, columns))} |")
    if report.bounds:
        lines += ["", "What issuing a call's instructions takes on an H100 at the least (`tools/gpu_floor.py`), and",
                  "what `gpu_roofline.md` predicts of the call: the prediction must not be below the floor.", "",
                  "| case | dtype | direction | floor µs | predicted µs | |", "|---|---|---|---|---|---|"]  # fmt: skip
    for bound in report.bounds:
        columns = [bound.case, bound.dtype, bound.direction, f"{1e6 * bound.floor:.1f}", f"{1e6 * bound.predicted:.1f}",
                   "at fault" if bound.is_exceeded else ""]  # fmt: skip
        lines.append(f"| {' | '.join(columns)} |")
    return lines


def check_target(target: _target.Target, ops: Sequence[str], which: str) -> Report:
    """``which``: launches, "all"; "sample", of each kernel one; or "waiting", that and all of the kernels whose
    programs wait for each other."""
    report = Report([], [])
    seen: dict[Any, Built] = {}
    for case in itertools.chain(all_cases(), () if which == "sample" else forced_cases()):
        if ops and case.op not in ops:
            continue
        predicted = gpu_roofline.predictions(case) if which == "all" else {}
        for direction in ("training",) if which == "sample" else DIRECTIONS:
            floors = []
            for launch in record_launches(case, target, direction):
                # Layers of one shape launch one kernel.
                is_whole = which == "all" or (which == "waiting" and _waits(launch))
                key = _key(launch) if is_whole else (launch.kernel.__name__, launch.constexprs.get("MODE"))
                is_new = key not in seen
                built = seen[key] = build(launch, target) if is_new else seen[key]
                problems = []
                try:
                    floor = floor_of(built, launch, target)
                except LookupError as error:
                    floor, problems = None, [str(error)]
                floors.append(0.0 if floor is None else floor.seconds)
                if is_new:
                    report.rows.append(Row(
                        launch.kernel.__name__, f"{case.op} {case.shape}", str(case.dtype).removeprefix("torch."),
                        launch.constexprs.get("PRECISION", ""), configuration(launch), target.name, built, floor,
                        _waits(launch), ", ".join([*problems, *faults(built, floor, launch, case, target)]),
                    ))  # fmt: skip
                    print(report.rows[-1], flush=True)
            if direction in predicted and any(floors):
                dtype = predicted[direction].row()[2]
                seconds = predicted[direction].seconds()[-1]
                report.bounds.append(Bound(f"{case.op} {case.shape}", dtype, direction, sum(floors), seconds))
                print(report.bounds[-1], flush=True)
    return Report([row._replace(built=row.built._replace(code=None)) for row in report.rows], report.bounds)


def _key(launch: Launch) -> str:
    return repr((launch.kernel.__name__, describe_all(launch), launch.options))


def check(targets: Sequence[_target.Target], ops: Sequence[str], which: str = "all") -> Report:
    """The same for several targets, side by side."""
    if len(targets) == 1:
        return check_target(targets[0], ops, which)
    # Not forked: compilers have threads.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(targets), os.cpu_count() or 1), mp_context=spawn) as pool:
        reports = list(pool.map(check_target, targets, itertools.repeat(ops), itertools.repeat(which)))
    return Report(*([each for part in parts for each in part] for parts in zip(*reports, strict=True)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = {target.name: target for target in _target.TARGETS}
    parser.add_argument("--target", action="append", choices=known, help="default: all")
    parser.add_argument("--op", action="append", help="default: all")
    fewer = parser.add_mutually_exclusive_group()
    fewer.add_argument("--sample", dest="which", action="store_const", const="sample", default="all",
                       help="of each kernel one launch only")  # fmt: skip
    fewer.add_argument("--waiting", dest="which", action="store_const", const="waiting",
                       help="the same, but all launches of programs that wait for each other")  # fmt: skip
    parser.add_argument("--write", type=Path, help="also write a summary as Markdown")
    options = parser.parse_args()
    started = time.monotonic()
    report = check([known[name] for name in options.target or known], options.op or [], options.which)
    waiting = sum(row.waits for row in report.rows)
    verdict = (
        f"{len(report.rows)} launches compiled with Triton {triton.__version__}, {waiting} of programs that wait "
        f"for each other, and {len(report.bounds)} floors held against predictions, {report.failed} at fault"
    )
    print(f"{verdict}, in {time.monotonic() - started:.0f} s")
    if options.write:
        command = "gpu-check-tritons" if options.which == "waiting" else "gpu-check"
        title = f"# What compilers make of the GPU kernels\n\n`make {command}`, on a machine without a GPU: "
        options.write.write_text("\n".join([f"{title}{verdict}.", "", *summary(report)]) + "\n")
    return 1 if report.failed or not report.rows else 0


if __name__ == "__main__":
    sys.exit(main())
