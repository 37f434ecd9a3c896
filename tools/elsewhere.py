"""Builds and tests fastnn for what this machine is not: other processors, compilers and releases of torch.

Each target works on a copy of the sources in ``build/elsewhere/<target>``, with an extension and objects of its own:

    aarch64    64-bit ARM: cross-compiled, its inner loops counted, then run by an emulator on an arm64 Debian that is
               unpacked, not installed
    baseline   x86-64 without AVX: the ordinary build, run by an emulator as a processor of 2008
    clang      this machine's processor, built by clang
    macos      arm64 macOS: compiled and linked by zig, not run; torch's wheel for it has every name that is asked of it
    torches    the oldest and the newest release of torch, each in an environment of its own, with the whole suite

The warnings of the compilers of aarch64, clang and macos are errors. An emulator is slow, so that of the operators'
tests every so many run; ``--all`` runs them all. Arguments behind ``--`` go to pytest. What a target needs of Debian's
packages is installed by apt-get where that is allowed.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import machine_code

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "elsewhere"
# The tests of the three models and of the operators, in two groups that take about as long as each other.
OP_TESTS = (
    ("models", "mlp*", "rnn*", "math", "team"),
    ("conv*", "activations", "batch_norm", "network"),
)

OLDEST_TORCH = "2.10.*"  # that pyproject.toml allows: the extension uses nothing that is newer without asking
# What runs in an emulated arm64 Debian: its Python, and what torch and the tests import. pip would add packages of
# CUDA, since it asks this machine what torch needs.
DEBIAN, PYTHON = "trixie", "3.13"
ARM_PACKAGES = "debian-archive-keyring mmdebstrap qemu-user g++-aarch64-linux-gnu"
ARM_WHEELS = (
    f"torch=={OLDEST_TORCH} numpy typing_extensions sympy mpmath networkx jinja2 markupsafe fsspec filelock setuptools "
    "pytest iniconfig pluggy packaging pygments hypothesis sortedcontainers expecttest pybind11"
)
# The first processor of the kind with NEON alone, and one with everything that the emulator knows, bfloat16 included.
ARM_PROCESSORS = ("neoverse-n1", "max")

PIP_INSTALL = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
# Without a release of torch that this machine may be held at.
UNCONSTRAINED = {**os.environ, "PIP_CONSTRAINT": os.devnull}


def say(text: str) -> None:
    print(f"fastnn: {text}", flush=True)


def run(command: Sequence[str | Path], **keywords: object) -> None:
    subprocess.run([str(part) for part in command], check=True, **keywords)  # type: ignore[call-overload]


def need(command: str, packages: str) -> None:
    """Make sure that a command is there, by Debian's packages if they may be installed."""
    if shutil.which(command):
        return
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *packages.split()]
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise SystemExit(f"fastnn: there is no '{command}': '{shlex.join(install)}' first")
    say(f"installing {packages}")
    run(["apt-get", "update", "-qq"])
    run([*install, "-qq"], stdout=subprocess.DEVNULL, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})


def copy_sources(name: str) -> Path:
    """A copy of everything that a build or a test reads, with the times of the originals, so that objects stay."""
    tree = BUILD / name / "tree"
    keep = shutil.ignore_patterns(".*", "build", "dist", "__pycache__", "*.so", "*.egg-info")
    for path in tree.iterdir() if tree.exists() else ():
        if path.name != "build" and path.is_dir():
            shutil.rmtree(path)
    shutil.copytree(ROOT, tree, ignore=keep, dirs_exist_ok=True)
    return tree


def build(tree: Path, *command: str, **environment: str) -> None:
    """Compile the extension of a copy, into the copy, or run another command of setup.py."""
    command = command or ("build_ext", "--inplace")
    setup = [sys.executable, "-W", "ignore::UserWarning", "setup.py", "-q", *command]
    run(setup, cwd=tree, env={**os.environ, **environment})


def op_tests(group: Sequence[str]) -> list[str]:
    return [str(path.relative_to(ROOT)) for name in group for path in sorted(ROOT.glob(f"tests/test_{name}.py"))]


def run_emulated(tree: Path, python: list[str], environment: dict[str, str], given: argparse.Namespace) -> None:
    """Run the tests of the operators, a process of the emulator for each group, since no test can start another."""
    every = [] if given.all else ["--every", str(given.every)]
    command = [*python, "-m", "pytest", "-p", "no:cacheprovider", "-q", *every]

    def run_group(group: Sequence[str]) -> int:
        files = op_tests(group)
        return subprocess.run([*command, *files, *given.pytest], cwd=tree, env=os.environ | environment).returncode

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if any(list(pool.map(run_group, OP_TESTS))):
            raise SystemExit(1)


def unpacked_debian() -> Path:
    """An arm64 Debian with Python, torch and what the tests import."""
    root = BUILD / "aarch64" / "root"
    stamp = root / "complete"
    if stamp.exists() and stamp.read_text() == ARM_WHEELS:
        return root
    say("unpacking an arm64 Debian with Python and torch (a minute)")
    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    packages = "python3,python3-dev,libstdc++6,libgomp1"
    bootstrap = ["mmdebstrap", "--variant=extract", "--arch=arm64", f"--include={packages}", "--skip=check/qemu"]
    run([*bootstrap, "--quiet", DEBIAN, root])
    (root / "lib").symlink_to("usr/lib")  # where programs look for the dynamic loader
    abi = f"cp{PYTHON.replace('.', '')}"
    only = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON, "--abi", abi]
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (28, 27, 17)] + [
        "--platform=manylinux2014_aarch64"
    ]
    run([*PIP_INSTALL, "--target", root / "opt" / "site", *only, "--abi", "none", *platforms, *ARM_WHEELS.split()],
        env=UNCONSTRAINED)  # fmt: skip
    stamp.write_text(ARM_WHEELS)
    return root


def cross_environment(root: Path) -> dict[str, str]:
    """What tells setuptools that it builds for the unpacked Debian, whose Python has other names and headers."""
    triplet = "aarch64-linux-gnu"
    data = f"_sysconfigdata__{triplet}"
    configuration = root / "opt" / "sysconfig"  # this file of its standard library alone, for this machine's Python
    configuration.mkdir(exist_ok=True)
    shutil.copy(root / "usr" / "lib" / f"python{PYTHON}" / f"{data}.py", configuration)
    headers = root / "usr" / "include"
    flags = f"-I{headers / f'python{PYTHON}'} -idirafter {headers}"
    return {
        "CXX": f"{triplet}-g++ -Werror {flags}",
        "LDFLAGS": f"-L{root / 'opt' / 'site' / 'torch' / 'lib'} -Wl,--allow-shlib-undefined",
        "PYTHONPATH": str(configuration),
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",
        "_PYTHON_SYSCONFIGDATA_NAME": data,
    }


def test_aarch64(given: argparse.Namespace) -> None:
    for command in ("mmdebstrap", "qemu-aarch64", "aarch64-linux-gnu-g++"):
        need(command, ARM_PACKAGES)
    root = unpacked_debian()
    tree = copy_sources("aarch64")
    say("compiling for aarch64 (three minutes)")
    build(tree, **cross_environment(root))
    objects = next(tree.glob("build/temp.linux-aarch64-*"))
    print(machine_code.check(objects, "aarch64-linux-gnu-objdump"))
    paths = {"PYTHONHOME": f"{root}/usr", "PYTHONPATH": f"{root}/opt/site"}

    def python_on(processor: str) -> list[str]:
        return ["qemu-aarch64", "-L", str(root), "-cpu", processor, f"{root}/usr/bin/python{PYTHON}"]

    for processor in ARM_PROCESSORS:
        say(f"testing on {processor}")
        run_emulated(tree, python_on(processor), paths, given)
    say("testing a wheel")
    installed = root / "opt" / "wheel"
    shutil.rmtree(installed, ignore_errors=True)
    build(tree, "bdist_wheel", "--dist-dir", str(installed), **cross_environment(root))
    (wheel,) = installed.glob("*.whl")
    shutil.unpack_archive(wheel, installed, "zip")
    both = {**paths, "PYTHONPATH": f"{paths['PYTHONPATH']}:{installed}"}
    run([*python_on(ARM_PROCESSORS[0]), "check_installed.py"], cwd=ROOT / "tools", env=os.environ | both)


def test_baseline(given: argparse.Namespace) -> None:
    need("qemu-x86_64", "qemu-user")
    tree = copy_sources("baseline")
    shutil.copy(next(ROOT.glob("fastnn/_C.*.so")), tree / "fastnn")
    say("testing on a Nehalem, which has no AVX")
    run_emulated(tree, ["qemu-x86_64", "-cpu", "Nehalem", sys.executable], {}, given)


def test_clang(given: argparse.Namespace) -> None:
    compiler = os.environ.get("CXX", "clang++")
    need(compiler, "clang")
    tree = copy_sources("clang")
    say(f"compiling with {compiler} (three minutes)")
    build(tree, CXX=f"{compiler} -Werror")
    files = [path for group in OP_TESTS for path in op_tests(group)]
    run([sys.executable, "-m", "pytest", "--numprocesses", "auto", *files, *given.pytest], cwd=tree)


def test_macos(given: argparse.Namespace) -> None:
    """What can be known without a Mac: everything compiles and links, and torch has what the extension asks of it."""
    tools, site = BUILD / "macos" / "tools", BUILD / "macos" / "site"
    if not site.exists():
        say("fetching zig, and torch's wheel for macOS")
        run([*PIP_INSTALL, "--target", tools, "ziglang", "lief"])
        only = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON]
        platforms = ["--platform", "macosx_14_0_arm64", "--platform", "macosx_11_0_arm64"]
        run([*PIP_INSTALL, "--target", site, *only, *platforms, f"torch=={OLDEST_TORCH}"], env=UNCONSTRAINED)
    tree, libraries = copy_sources("macos"), site / "torch" / "lib"
    zig = BUILD / "macos" / "c++"  # one word, since setuptools takes a command of several apart
    command = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-macos.11.0", "-fno-sanitize=undefined"]
    zig.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    zig.chmod(0o755)
    say("compiling for macOS (three minutes)")
    build(
        tree,
        CXX=f"{zig} -Werror",
        LDSHARED=f"{zig} -shared",
        LDCXXSHARED=f"{zig} -shared",
        LDFLAGS=f"-L{libraries}",
        PYTHONPATH=str(tools),
        _PYTHON_HOST_PLATFORM="macosx-11.0-arm64",
    )
    sys.path.insert(0, str(tools))
    import lief

    may_be_missing = 0x40  # N_WEAK_REF of Mach-O: the extension asks whether this torch has the name

    def names(path: Path, which: str) -> set[str]:
        binaries = lief.MachO.parse(path)  # owns what at() returns
        symbols = getattr(binaries.at(0), which)
        return {str(symbol.name) for symbol in symbols if not symbol.description & may_be_missing}

    wanted = names(next(tree.glob("fastnn/_C.*")), "imported_symbols")
    given_by_torch = set[str]().union(*(names(path, "exported_symbols") for path in libraries.glob("libtorch*.dylib")))
    of_torch = {name for name in wanted if re.search("torch|aoti|c10", name)}
    missing = sorted(of_torch - given_by_torch)
    if missing or not of_torch:
        raise SystemExit(f"fastnn: torch for macOS lacks {', '.join(missing) or 'everything'}")
    say(f"linked for macOS, where torch has each of the {len(of_torch)} names that the extension asks of it")


def test_torches(given: argparse.Namespace) -> None:
    """The whole suite on each release, with an extension that is built beside it."""
    for release, wanted in (OLDEST_TORCH.strip(".*"), f"torch=={OLDEST_TORCH}"), ("newest", "torch"):
        tree = copy_sources(f"torch-{release}")
        python = tree.parent / "venv" / "bin" / "python"
        if not python.exists():
            say(f"making an environment with torch {release}")
            run([sys.executable, "-m", "venv", tree.parent / "venv"])
        run([python, *PIP_INSTALL[1:], "--upgrade", wanted, "setuptools>=77", "pybind11>=2.13"], env=UNCONSTRAINED)
        run([python, *PIP_INSTALL[1:], "--no-build-isolation", "--editable", f"{tree}[test,bench]"], env=UNCONSTRAINED)
        run([python, "-m", "pytest", "--numprocesses", "auto", *given.pytest], cwd=tree)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/elsewhere.py", description=__doc__.splitlines()[0])
    targets = {"aarch64": test_aarch64, "baseline": test_baseline, "clang": test_clang, "macos": test_macos,
               "torches": test_torches}  # fmt: skip
    parser.add_argument("target", choices=targets)
    parser.add_argument("--all", action="store_true", help="run all tests of the operators")
    parser.add_argument("--every", type=int, default=20, help="else every so many of them (default: %(default)s)")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest")
    given = parser.parse_args()
    targets[given.target](given)


if __name__ == "__main__":
    main()
