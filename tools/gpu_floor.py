"""The issue floor of a launch: the time that a GPU needs to issue its instructions, were there nothing to wait for.

A processor has four schedulers, each of which issues one instruction of one warp a cycle. The machine code says how
many instructions a loop has, and from which line of Python it comes; how often it turns follows from that line's
`range` and the launch's arguments. What stands in no loop counts once, also what a branch may leave out.
"""

import ast
import math
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import triton
from gpu_sass import Code, Instruction, Loop, function_of, is_barrier, load_bits, source_loop

SCHEDULERS = 4
CLOCK = {"sm_90": 1.755e9}  # cycles a second; an H100 SXM's under load
# Of a processor, on all of NVIDIA's cards since sm_90.
_REGISTERS, _WARPS, _SHARED_MEMORY = 65536, 64, 233472
_RESERVED_SHARED_MEMORY = 1024  # bytes, of each program

# ---- how often loops turn ---------------------------------------------------------------------------------

Values = Mapping[str, Any]


def _chunk(v: Values) -> int:
    """Steps that a recurrent program runs in a row: all of them, unless layers run at once."""
    return min(v.get("chunk", v["steps"]), v["steps"])


def _tiles_each(v: Values) -> int:
    return triton.cdiv(triton.cdiv(v["pooled_pixels"], v["BLOCK_PIXELS"]), v["tl"].num_programs(0))


# By kernel, or by a function that kernels have in common: what its local names are for the program with the most to do,
# where a loop's range has such names. ("last" and "first" are a chunk's; sequences are as long as the longest.)
_CHUNK: dict[str, Callable[[Values], Any]] = {"first": lambda v: 0, "last": _chunk}
LOCALS: dict[str, dict[str, Callable[[Values], Any]]] = {
    "conv_weight_gradient": {"tiles_each": _tiles_each},
    "forward_steps": _CHUNK,
    "backward_steps": _CHUNK,
    "spread_forward": {"limit": lambda v: v["steps"]},
    "spread_backward": {"limit": lambda v: v["steps"] + 1},
    "_fill_gates": _CHUNK,
    "_fill_gradient": _CHUNK,
    "wave_forward": {"tile": lambda v: types.SimpleNamespace(steps=v["steps"])},
    "wave_backward": {"tile": lambda v: types.SimpleNamespace(steps=v["steps"])},
}


def values_of(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constexprs: Values) -> Values:
    """What the names of a kernel stand for at a launch; program (0, ...) stands for all."""
    known = kernel.fn.__globals__.items()
    constants = {name: value.value for name, value in known if isinstance(value, triton.language.constexpr)}
    language = types.SimpleNamespace(
        cdiv=triton.cdiv, minimum=min, maximum=max, program_id=lambda axis: 0, num_programs=lambda axis: grid[axis]
    )
    return {**constants, **dict(zip(kernel.arg_names, arguments, strict=False)), **constexprs, "tl": language}


def trips(loop: ast.For | ast.While, function: Any, values: Values) -> int:
    """How often a loop of ``function``, which a kernel is or calls, turns each time that it is come to."""
    if isinstance(loop, ast.While):
        return 1  # at the least
    own = function.__name__
    known = {**values, **{name: value(values) for name, value in LOCALS.get(own, {}).items()}, "range": range}
    for statement in ast.walk(function.parse()):
        # Constants that the function makes of its arguments.
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            value = _evaluate(statement.value, known)
            if value is not None:
                known[statement.target.id] = value
    turns = _evaluate(loop.iter, known)
    if turns is None:
        raise LookupError(f"how often `for .. in {ast.unparse(loop.iter)}` of {own} turns: LOCALS does not say")
    return len(turns)


def _evaluate(expression: ast.expr, names: Values) -> Any:
    """None where it has names, or takes attributes, of which only the compiler knows."""
    try:
        return eval(compile(ast.Expression(expression), "a kernel", "eval"), {"__builtins__": {}}, dict(names))
    except (NameError, AttributeError):
        return None


def functions_of(kernel: Any) -> dict[str, Any]:
    """The kernel and all functions that it calls, by name."""
    found = {kernel.__name__: kernel}
    waiting = [kernel]
    while waiting:
        function = waiting.pop()
        for node in ast.walk(function.parse()):
            called = function.fn.__globals__.get(node.id) if isinstance(node, ast.Name) else None
            if isinstance(called, triton.JITFunction) and called.__name__ not in found:
                found[called.__name__] = called
                waiting.append(called)
    return found


# ---- what a launch costs ----------------------------------------------------------------------------------


class Floor(NamedTuple):
    """Of one launch. ``floor`` raises LookupError where it can't tell how often a loop turns."""

    seconds: float
    hot: int  # instructions in the loop that most of them are issued in, or of all where there is no loop
    turns: int  # of that loop in a program
    at_once: int  # programs that fit on a processor
    barriers: int  # in a turn of that loop; and waiting loops there
    waits: int
    loads: dict[int, int]  # in a turn: how many of how many bits

    def __str__(self) -> str:
        loads = " + ".join(f"{count} x {bits}" for bits, count in sorted(self.loads.items())) or "none"
        return (
            f"floor {1e6 * self.seconds:.1f} us: {self.hot} instructions x {self.turns}, {self.at_once} programs fit; "
            f"{self.barriers} barriers and {self.waits} waits a turn; loads of {loads} bits"
        )


def floor(
    code: Code, kernel: Any, values: Values, programs: int, num_warps: int, registers: int, shared_memory: int,
    processors: int, clock: float,
) -> Floor:  # fmt: skip
    functions = functions_of(kernel)
    turns = {loop: 1 if loop.waits else _turns(loop, functions, values) for loop in code.loops}
    working = [loop for loop in code.loops if not loop.waits]
    if len({loop.lines for loop in working}) < len(working):
        raise LookupError("a loop is there twice, as compilers unroll one: nobody knows how often each turns")

    def count(number: int) -> int:
        return math.prod(turns[loop] for loop in code.loops_around(number))

    issued: Counter[Loop | None] = Counter()
    inside: dict[Loop | None, list[Instruction]] = {}
    for number, instruction in enumerate(code.instructions):
        around = [loop for loop in working if loop.first <= number <= loop.last]
        innermost = min(around, key=lambda loop: loop.last - loop.first, default=None)
        issued[innermost] += count(number)
        inside.setdefault(innermost, []).append(instruction)
    hot = max((loop for loop in issued if loop), key=issued.__getitem__, default=None)
    body = inside[hot]
    warps = math.ceil(programs / processors) * num_warps  # of the processor with the most to do
    return Floor(
        seconds=sum(issued.values()) * max(warps / SCHEDULERS, 1) / clock,
        hot=len(body),
        turns=count(hot.first) if hot else 1,
        at_once=programs_at_once(num_warps, registers, shared_memory),
        barriers=sum(map(is_barrier, body)),
        waits=sum(loop.waits and (hot is None or hot.encloses(loop)) for loop in code.loops),
        loads=dict(Counter(bits for bits in map(load_bits, body) if bits)),
    )


def _turns(loop: Loop, functions: Mapping[str, Any], values: Values) -> int:
    source = source_loop(loop.lines)
    if source is None:
        raise LookupError(f"a loop in the machine code is none of Python's: {loop.lines}")
    return trips(source, functions[function_of(loop.lines)], values)


def programs_at_once(num_warps: int, registers: int, shared_memory: int) -> int:
    """That one processor has room for, by registers (given out in eights a thread), warps and shared memory."""
    a_warp = 32 * 8 * math.ceil(registers / 8)
    return min(
        _REGISTERS // (a_warp * num_warps),
        _WARPS // num_warps,
        _SHARED_MEMORY // (shared_memory + _RESERVED_SHARED_MEMORY),
    )


def loops_of(kernel: Any) -> Iterator[tuple[Any, ast.For | ast.While]]:
    """All loops of a kernel that are not unrolled, with the functions that they are in."""
    for function in functions_of(kernel).values():
        for node in ast.walk(function.parse()):
            static = isinstance(node, ast.For) and "static_range" in ast.unparse(node.iter)
            if isinstance(node, ast.For | ast.While) and not static:
                yield function, node
