"""What the objects of the kernels define: nothing that the linker could take from one instruction set for another."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def weak_symbols(objects: list[Path]) -> list[str]:
    """The symbols that a linker takes from any one of the objects that define them: inline functions and templates."""
    run = subprocess.run(["nm", "-C", "--defined-only", *objects], capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=2) for line in run.stdout.splitlines()]
    return [line[2] for line in lines if len(line) == 3 and line[1] in "WwVvu"]


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, which comes with the compiler")
def test_inline_functions_of_kernels_are_of_their_instruction_set() -> None:
    folders = {folder for path in ROOT.glob("build/temp.*/*/csrc/kernels/*.o") for folder in [path.parents[2]]}
    kernels = [folder for folder in folders if folder.name != "common"]
    assert kernels, "no objects: build the extension in place first"
    for folder in kernels:
        objects = sorted(folder.glob("csrc/kernels/**/*.o"))
        own = f"fastnn::{folder.name}::"
        weak = weak_symbols(objects)
        assert any(own in symbol for symbol in weak), "nm shows no inline functions: the test sees nothing"
        foreign = [symbol for symbol in weak if own not in symbol]
        assert not foreign, f"{folder.name}: {foreign[:5]}"
