"""The way of a launch down to the card's driver: Triton's own, over the library of libcuda_stub.c, which records what
cuLaunchKernelEx is given. A launch without Triton's dispatch must not differ from one with it in a single byte."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

TESTS = Path(__file__).parent
KERNELS = {"conv_forward", "conv_input_gradient", "conv_weight_gradient", "pack_channels", "pool_forward",
           "spread_gradient", "chain_forward", "chain_backward", "resident_chain_forward", "layer_forward", "forward",
           "backward", "wave_forward", "wave_backward", "spread_forward", "spread_backward"}  # fmt: skip
WAITING = {"wave_forward", "wave_backward", "spread_forward", "spread_backward"}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By launches_on_stub.py."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler is not None, "these tests build a library in C"
    folder = tmp_path_factory.mktemp("driver")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    command = [compiler, "-shared", "-fPIC", "-Wall", "-Werror", f"-I{include}", str(TESTS / "libcuda_stub.c")]
    subprocess.run([*command, "-o", str(folder / "libcuda.so.1")], check=True)
    (folder / "libcuda.so").symlink_to("libcuda.so.1")  # by this name older Tritons link with it
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "LAUNCHES": str(folder / "launches"),
        "TRITON_LIBCUDA_PATH": str(folder),  # to link with,
        "LD_LIBRARY_PATH": str(folder),  # and to load
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),  # with a Triton there
    }
    done = subprocess.run([sys.executable, str(TESTS / "launches_on_stub.py")], env=environment, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture
def recorded(printed: dict[str, Any]) -> dict[str, Any]:
    return {launch["kernel"]: launch for launch in printed["kernels"]}


def pointer(address: int) -> str:
    """As a parameter's bytes."""
    return address.to_bytes(8, sys.byteorder).hex()


def test_every_kernel_is_launched(recorded: dict[str, Any]) -> None:
    assert set(recorded) == KERNELS


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_repeated_launches_are_triton_s_own(kernel: str, recorded: dict[str, Any]) -> None:
    first, again, other, by_triton, *odd = recorded[kernel]["launches"]
    assert again == first
    assert other == by_triton
    assert {name for name in first if first[name] != other[name]} == {"parameters"}
    assert recorded[kernel]["dispatched"] == (2 if odd else 1)
    # Compiled for addresses that are no multiples of 16, with the same parameters in other places.
    assert all(launch["function"] != first["function"] for launch in odd)


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_launches_say_what_was_asked_for(kernel: str, recorded: dict[str, Any]) -> None:
    launch, asked = recorded[kernel]["launches"][0], recorded[kernel]
    assert launch["grid"] == ",".join(map(str, (*asked["grid"], 1, 1)[:3]))
    assert launch["block"] == f"{32 * asked['num_warps']},1,1"
    assert launch["stream"] == "0x5ea"
    # Programs that wait for each other are launched so that all of them run at once.
    assert launch["cooperative"] == ("1" if kernel in WAITING else "")
    assert (launch["cooperative"] == "1") == asked["cooperative"]
    for number, addresses in zip((0, 2), asked["addresses"], strict=True):
        pointers = [p for p in asked["launches"][number]["parameters"].split(",") if len(p) == 16]
        *passed, global_scratch, profile_scratch = pointers
        assert passed == [pointer(address) for address in addresses]
        assert (global_scratch, profile_scratch) == (pointer(0), pointer(0))


def test_a_call_s_floor_is_that_of_its_launches(printed: dict[str, Any]) -> None:
    of_call, of_launches = printed["floors"]
    assert of_call == pytest.approx(of_launches)
    assert of_call > 1e-6
