"""NVIDIA machine code (SASS) as far as tools/gpu_check.py looks at it: instructions with the lines of Python that they
come from, loops, and the order of memory operations in kernels whose programs wait for each other."""

import ast
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import triton

Line = tuple[str, int]  # a file's name and a line's number


class Instruction(NamedTuple):
    text: str  # with its predicate
    lines: tuple[Line, ...]  # the innermost function first, then where that was inlined, up to the kernel

    @property
    def opcode(self) -> str:
        """As in LDG.E.64: what it does, how wide, and for whom memory is to be in order."""
        return self.text.removeprefix("@!").removeprefix("@").partition(" ")[2 if self.text[0] == "@" else 0].split()[0]

    def starts(self, *names: str) -> bool:
        return self.opcode.split(".")[0] in names


class Loop(NamedTuple):
    """Instructions by their numbers, from the label that is jumped back to on to the jump. Waiting loops are those of
    `while` in the source, and of the compiler's own waits for copies and memory."""

    first: int
    last: int
    lines: tuple[Line, ...]
    waits: bool

    def encloses(self, other: "Loop") -> bool:
        return (self.first, self.last) != (other.first, other.last) and (
            self.first <= other.first and other.last <= self.last
        )


class Code(NamedTuple):
    instructions: Sequence[Instruction]
    loops: Sequence[Loop]

    def loops_around(self, number: int) -> list[Loop]:
        return [loop for loop in self.loops if loop.first <= number <= loop.last]

    def innermost(self, loops: Sequence[Loop] | None = None) -> list[Loop]:
        loops = self.loops if loops is None else loops
        return [loop for loop in loops if not any(loop.encloses(other) for other in loops)]


def disassemble(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", "-gi", file.name]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return read_listing(listing)


_LINE = re.compile(r'//## File "([^"]+)", line (\d+)')
_LABEL = re.compile(r"(\.L\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.+?)\s*;")
_JUMP = re.compile(r"\bBRA\b.*?(\.L\w+)")
# What the compiler waits with where no line of the source does: for copies, and for tensor memory.
_COMPILERS_WAITS = ("SYNCS", "UTCATOMSWS", "NANOSLEEP")


def read_listing(listing: str) -> Code:
    """nvdisasm's, with the lines that inlined code comes from."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    lines: tuple[Line, ...] = ()
    follows = False  # a chain of inlined lines goes on
    for text in map(str.strip, listing.splitlines()):
        if found := _LINE.match(text):
            line = (_name_of(found[1]), int(found[2]))
            lines = (*lines, line) if follows else (line,)
            follows = True
            continue
        follows = False
        if found := _LABEL.match(text):
            labels[found[1]] = len(instructions)
        elif (found := _INSTRUCTION.match(text)) and found[1] != "NOP":  # padding behind the end
            instructions.append(Instruction(found[1], lines))
    loops = []
    for number, instruction in enumerate(instructions):
        jump = _JUMP.search(instruction.text)
        # A jump to itself is padding too.
        if jump and labels.get(jump[1], number) < number:
            body = instructions[labels[jump[1]] : number + 1]
            waits = isinstance(source_loop(instruction.lines), ast.While) or (
                source_loop(instruction.lines) is None and any(i.starts(*_COMPILERS_WAITS) for i in body)
            )
            loops.append(Loop(labels[jump[1]], number, instruction.lines, waits))
    return Code(instructions, loops)


def _name_of(path: str) -> str:
    """A file of kernels by its name in fastnn/kernels, which the compiler's cache may have from another copy of it."""
    return path.rpartition("/fastnn/kernels/")[2] if "/fastnn/kernels/" in path else Path(path).name


_FOLDERS = (Path(__file__).parent.parent / "fastnn" / "kernels", Path(__file__).parent.parent / "tests")


@functools.cache
def _source(name: str) -> dict[int, tuple[ast.For | ast.While, str]]:
    """By line the loops of a file and the functions that they are in."""
    path = next((folder / name for folder in _FOLDERS if (folder / name).exists()), None)
    tree = ast.parse(path.read_text() if path else "")
    return {
        node.lineno: (node, function.name)
        for function in ast.walk(tree) if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function) if isinstance(node, ast.For | ast.While)
    }  # fmt: skip


def source_loop(lines: Sequence[Line]) -> ast.For | ast.While | None:
    """The Python loop at the first of the lines."""
    return _source(lines[0][0]).get(lines[0][1], (None, ""))[0] if lines else None


def function_of(lines: Sequence[Line]) -> str:
    """The function that the Python loop at the first of the lines is in."""
    return _source(lines[0][0])[lines[0][1]][1]


# ---- what a kernel does at a time -------------------------------------------------------------------------


_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}


def load_bits(instruction: Instruction) -> int:
    """Bits a thread reads from global memory at once, 0 for what reads none."""
    if not instruction.starts("LDG", "LDGSTS"):
        return 0
    return next((_BITS[part] for part in instruction.opcode.split(".") if part in _BITS), 32)


def is_barrier(instruction: Instruction) -> bool:
    return instruction.starts("BAR")


# ---- programs that wait for each other --------------------------------------------------------------------


def _is_strong(instruction: Instruction) -> bool:
    """Seen by, or seeing, other programs."""
    return ".STRONG.GPU" in instruction.opcode or ".STRONG.SYS" in instruction.opcode


def _is_fence(instruction: Instruction) -> bool:
    return re.match(r"MEMBAR\.(ALL|SC)\.(GPU|SYS)", instruction.opcode) is not None


def faults_of_waiting(code: Code) -> Iterator[str]:
    """What is missing in the sequence by which one program's results reach another that waits for them. By the names
    of instructions alone, which are the same for all of NVIDIA's cards from sm_80 on:

    - release: BAR, so that all threads have stored; MEMBAR of the whole card, by the thread that then announces it;
      RED, ATOM or a strong ST, with no other store in between.
    - acquire, in the waiting loop: a strong load, or an atomic; CCTL.IVALL, which empties the first-level cache; and
      behind the loop BAR, before any thread reads.
    """
    instructions = code.instructions
    polls = [loop for loop in code.loops if isinstance(source_loop(loop.lines), ast.While)]
    if not polls:
        yield "no waiting loop"
    for loop in polls:
        body = instructions[loop.first : loop.last + 1]
        looks = [i for i, own in enumerate(body) if own.starts("LD", "LDG", "ATOM", "ATOMG") and _is_strong(own)]
        if not looks:
            yield "waits without an acquiring load"
        elif not any(own.opcode.startswith("CCTL.IVALL") for own in body[looks[-1] :]):
            yield "waits without emptying the first-level cache"
        after = next((own for own in instructions[loop.last + 1 :] if own.starts("BAR", *_MEMORY)), None)
        if after is None or not is_barrier(after):
            yield "no barrier behind a waiting loop"
    announced = [
        number for number, own in enumerate(instructions)
        if own.starts("RED", "REDG", "ATOM", "ATOMG", "ST", "STG") and _is_strong(own)
        and not any(loop.first <= number <= loop.last for loop in polls)
    ]  # fmt: skip
    if not announced:
        yield "announces nothing"
    for number in announced:
        before = [own for own in instructions[:number] if own.starts("BAR", *_STORES) or _is_fence(own)]
        if not before or not _is_fence(before[-1]):
            yield "announces without a fence"
        elif len(before) < 2 or not is_barrier(before[-2]):
            yield "announces before all threads have come"


_STORES = ("ST", "STG", "RED", "REDG", "ATOM", "ATOMG")
_MEMORY = ("LD", "LDG", "LDGSTS", *_STORES)
