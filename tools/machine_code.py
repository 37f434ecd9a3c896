"""Reads inner loops from compiled kernels and counts their instructions, for processors that nobody has at hand.

    python tools/machine_code.py <folder of objects> [--objdump aarch64-linux-gnu-objdump] [--write file]

The folder has one folder an instruction set. A loop passes if it has at most so many instructions for each vector
multiply-add, no load or store of a spilled register, and no ``dup``, which would spread an element that the
multiplication takes from a lane as it is.
"""

import argparse
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# The loops over the depth of all tiles, which are told by so many multiply-adds and so few instructions for each: those
# that pool results have more.
LEAST_PRODUCTS, MOST_EACH = 8, 4.0

STACK = re.compile(r"\[(sp|x29)\b")
BRANCH = re.compile(r"(?:b|b\.\w+|cbn?z|tbn?z)\s+(?:\w+, )*(?:#\d+, )?([0-9a-f]+) <")
MULTIPLY_ADD = re.compile(r"(fmla|fmls|bfdot)\s")


class Expected(NamedTuple):
    """An inner loop of so many multiply-adds: the set, the object and the function it is in, and what it may cost."""

    what: str
    isa: str
    object: str
    function: str
    multiply_adds: int
    most: float  # instructions for each multiply-add


EXPECTED = [
    Expected("channel tile, 12 pixels x 2 vectors", "neon", "conv/tiles", r"\bchannel_tile<12, 2, float>", 24, 1.71),
    Expected("channel tile in runs, 11 pixels x 2 vectors x 4 products", "neon", "conv/tiles",
             r"\bchannel_tile<11, 2, float>", 88, 1.24),
    Expected("pixel tile, 12 outputs x 2 vectors", "neon", "conv/tiles", r"\bpixel_tile<12, 2, float>", 24, 1.42),
    Expected("window tile, 12 outputs x 2 places", "neon", "conv/tiles", r"\bwindow_tile<12, false, float>", 24, 1.5),
    Expected("panel, 12 rows x 2 vectors", "neon", "rnn_forward",
             r"\bmultiply_rows<12, 2, 1, \d+, false, float>", 24, 1.79),
    Expected("mlp layer, 12 rows x 2 vectors", "neon", "mlp", r"\bpacked_layer<float>.*lambda", 24, 1.7),
    Expected("channel tile in bfloat16, two products each", "neon_bf16", "conv/tiles",
             r"\bchannel_tile<12, 2, fastnn::bfloat16x2>", 24, 1.71),
    Expected("channel tile in bfloat16 in runs, 11 pixels x 2 vectors x 4 products", "neon_bf16", "conv/tiles",
             r"\bchannel_tile<11, 2, fastnn::bfloat16x2>", 88, 1.24),
]  # fmt: skip


class Loop(NamedTuple):
    instructions: list[str]

    def count(self, pattern: re.Pattern[str]) -> int:
        return sum(bool(pattern.search(instruction)) for instruction in self.instructions)

    @property
    def multiply_adds(self) -> int:
        return sum(bool(MULTIPLY_ADD.match(instruction)) for instruction in self.instructions)

    @property
    def spills(self) -> int:
        return self.count(STACK)

    @property
    def spreads(self) -> int:
        return sum(instruction.startswith("dup") for instruction in self.instructions)

    @property
    def each(self) -> float:
        return len(self.instructions) / self.multiply_adds


def functions(compiled: Path, objdump: str) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Every function of an object: its name, and its instructions with their addresses."""
    command = [objdump, "--disassemble", "--no-show-raw-insn", "--demangle", str(compiled)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for part in re.split(r"\n(?=[0-9a-f]+ <.*>:\n)", text)[1:]:
        head, *lines = part.splitlines()
        found = [re.match(r"\s*([0-9a-f]+):\s+(.*)", line) for line in lines]
        yield head.split("<", 1)[1], [(int(match[1], 16), match[2]) for match in found if match]


def inner_loops(body: list[tuple[int, str]]) -> Iterator[Loop]:
    """The loops that have no other one inside: from the target of a backward branch to the branch."""
    spans = []
    for address, instruction in body:
        branch = BRANCH.match(instruction)
        if branch and int(branch[1], 16) <= address:
            spans.append((int(branch[1], 16), address))
    for first, last in spans:
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in spans):
            yield Loop([instruction for address, instruction in body if first <= address <= last])


def loops_of(folder: Path, expected: Expected, objdump: str) -> list[Loop]:
    compiled = folder / expected.isa / "csrc" / "kernels" / f"{expected.object}.o"
    return [
        loop
        for name, body in functions(compiled, objdump)
        if re.search(expected.function, name)
        for loop in inner_loops(body)
        if loop.multiply_adds == expected.multiply_adds
    ]


def refuse_moves(what: str, loop: Loop) -> None:
    """AssertionError about a loop that stores or loads a register that is spilled, or spreads an element."""
    listing = "\n".join(loop.instructions)
    assert loop.spills == 0, f"{what}: {loop.spills} spills in\n{listing}"
    assert loop.spreads == 0, f"{what}: {loop.spreads} times dup in\n{listing}"


def check_tiles(folder: Path, objdump: str) -> int:
    """Look at the loop over the depth in each tile of the convolution. Returns how many tiles there are."""
    tiles = 0
    for isa in sorted({expected.isa for expected in EXPECTED}):
        for name, body in functions(folder / isa / "csrc" / "kernels" / "conv" / "tiles.o", objdump):
            if not re.search(r"\b(channel|pixel|window)_tile<", name):
                continue
            tiles += 1
            for loop in inner_loops(body):
                if loop.multiply_adds >= LEAST_PRODUCTS and loop.each < MOST_EACH:
                    refuse_moves(name, loop)
    return tiles


def check(folder: Path, objdump: str) -> str:
    """The table of the expected loops; AssertionError about one that is missing or costs more."""
    assert check_tiles(folder, objdump) > len(EXPECTED), "the tiles are not where they are looked for"
    head = "| inner loop | instruction set | instructions | multiply-adds | each | at most |"
    lines = [head, "|---|---|---|---|---|---|"]
    for expected in EXPECTED:
        loops = loops_of(folder, expected, objdump)
        assert loops, f"there is no loop of {expected.multiply_adds} multiply-adds in {expected.function}"
        worst = max(loops, key=lambda loop: loop.each)
        for loop in loops:
            refuse_moves(expected.what, loop)
        listing = "\n".join(worst.instructions)
        assert worst.each < expected.most + 0.005, f"{expected.what}: {worst.each:.2f} instructions each in\n{listing}"
        counts = f"{len(worst.instructions)} | {worst.multiply_adds} | {worst.each:.2f} | {expected.most:.2f}"
        lines.append(f"| {expected.what} | {expected.isa} | {counts} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/machine_code.py", description=__doc__.splitlines()[0])
    parser.add_argument("objects", type=Path, help="the folder of an architecture's objects, as setup.py leaves it")
    parser.add_argument("--objdump", default="objdump")
    parser.add_argument("--write", type=Path, help="file for the table")
    given = parser.parse_args()
    table = check(given.objects, given.objdump)
    print(table)
    if given.write:
        given.write.write_text(table + "\n")


if __name__ == "__main__":
    main()
