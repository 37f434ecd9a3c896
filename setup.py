"""Builds fastnn._C: operators and module once, the kernels once per instruction set."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = Path("csrc")
VERSION = "0.1.0"
# Of the kernels, what takes the instruction set as data.
ISA_INDEPENDENT = [
    CSRC / "kernels" / path
    for path in (Path("team.cpp"), Path("conv", "plan.cpp"), Path("conv", "backward", "plan.cpp"))
]

COMMON_FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
# No -ffast-math: it drops NaN and can set flush-to-zero for the whole process.
# Python brings -fwrapv along, which costs the inner loops 4 %: counters that may wrap around are kept in memory.
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fno-wrapv"]
# What GCC needs beside: Python may bring -fno-strict-overflow instead, which clang takes for -fwrapv.
GCC_KERNEL_FLAGS = ["-fstrict-overflow"]
# What is compiled for: "linux-x86_64", "macosx-11.0-arm64". It is not this machine where a cross compiler runs.
TARGET = sysconfig.get_platform()
# The sets that have kernels of their own (csrc/simd/isa.h), with the flags that each takes.
if TARGET.endswith(("x86_64", "amd64")):
    INSTRUCTION_SETS = {
        "baseline": [],
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    }
elif TARGET.endswith(("aarch64", "arm64")):
    INSTRUCTION_SETS = {"neon": [], "neon_bf16": ["-mcpu=generic+bf16"]}
    # There GCC orders instructions before it assigns registers, and large register tiles would not fit.
    GCC_KERNEL_FLAGS += ["-fno-schedule-insns"]
else:
    INSTRUCTION_SETS = {"baseline": []}


def module_macros():
    """What fastnn._C says of its own build."""
    # fastnn/_digest.py without importing fastnn, which needs the extension.
    spec = importlib.util.spec_from_file_location("_digest", ROOT / "fastnn" / "_digest.py")
    digest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(digest)
    return [
        ("FASTNN_VERSION", f'"{VERSION}"'),
        ("FASTNN_SOURCE_DIGEST", f'"{digest.source_digest(ROOT / CSRC)}"'),
        ("FASTNN_INTERFACE_DIGEST", f'"{digest.interface_digest(ROOT / "fastnn")}"'),
        ("FASTNN_TORCH_VERSION", f'"{torch.__version__}"'),
    ]


class BuildExtension(build_ext):
    """Compiles each source with its own flags, two or more at a time."""

    def finalize_options(self):
        super().finalize_options()
        self.is_for_release = not (self.inplace or self.editable_mode)  # setuptools sets inplace to 0 while it builds
        if self.editable_mode:  # instead of a temporary folder: keeps the objects for the next build
            self.build_temp = os.path.join("build", f"temp.{self.plat_name}-{sys.implementation.cache_tag}")

    def build_extension(self, ext):
        compiler = self.compiler.compiler_cxx[0]
        if shutil.which(compiler) is None:
            raise SystemExit(
                f"fastnn: no C++ compiler ('{compiler}' not found). Install one: 'apt-get install g++' on Debian and "
                "Ubuntu, 'dnf install gcc-c++' on Fedora, 'xcode-select --install' on macOS; or set CXX."
            )
        # setuptools before 72 has one command for C and C++.
        self.compiler.compiler_so = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)
        jobs = [(source, "common", []) for source in ext.sources]
        version = subprocess.run([*self.compiler.compiler_cxx, "--version"], capture_output=True, text=True).stdout
        kernel_flags = KERNEL_FLAGS if "clang" in version else KERNEL_FLAGS + GCC_KERNEL_FLAGS
        for isa, flags in INSTRUCTION_SETS.items():
            isa_flags = [f"-DFASTNN_ISA={isa}", *kernel_flags, *flags]
            sources = [path for path in sorted(CSRC.glob("kernels/**/*.cpp")) if path not in ISA_INDEPENDENT]
            jobs += [(str(source), isa, isa_flags) for source in sources]
        jobs.sort(key=lambda job: job[1] != "avx512")  # the slowest first
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda job: self.compile_one(ext, *job), jobs))
        output = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(
            objects,
            output,
            libraries=self.get_libraries(ext),
            library_dirs=ext.library_dirs,
            extra_postargs=[*ext.extra_link_args, *self.flags_of_release()],
            build_temp=self.build_temp,
            target_lang="c++",
        )

    def flags_of_release(self):
        """The names of functions are for profilers, and a tenth of the file: a wheel goes without."""
        return ["-Wl,--strip-all"] if self.is_for_release and not TARGET.startswith("macosx") else []

    def compile_one(self, ext, source, folder, flags):
        output_dir = os.path.join(self.build_temp, folder)
        (compiled,) = self.compiler.object_filenames([source], output_dir=output_dir)
        is_module = source == str(CSRC / "module.cpp")
        # The module carries the digests of all sources (folders show that one is gone) and torch's version.
        ops = Path("fastnn", "ops")
        everything = [CSRC, *CSRC.rglob("*"), ops, *ops.rglob("*.py"), torch.version.__file__]
        included = f"{compiled}.d"  # by the compiler: what it read, as a rule of make
        if self.is_current(compiled, everything if is_module else self.read_rule(included)):
            return compiled
        print(f"fastnn: compiling {source} ({folder})", flush=True)
        self.compiler.compile(
            [source],
            output_dir=output_dir,
            macros=[*ext.define_macros, *(module_macros() if is_module else [])],
            include_dirs=ext.include_dirs,
            extra_postargs=[*ext.extra_compile_args, *COMMON_FLAGS, *flags, "-MMD", "-MF", included],
        )
        return compiled

    def read_rule(self, path):
        """The prerequisites of a rule of make, or none where it was not written yet."""
        if not os.path.exists(path):
            return []
        return shlex.split(Path(path).read_text().replace("\\\n", " "))[1:]

    def is_current(self, compiled, inputs):
        if self.force or not inputs or not os.path.exists(compiled):
            return False
        built = os.path.getmtime(compiled)
        return all(os.path.exists(path) and os.path.getmtime(path) <= built for path in [*inputs, "setup.py"])


def extension():
    torch_root = Path(torch.__file__).parent
    is_macos = TARGET.startswith("macosx")
    link = ["-Wl,-undefined,dynamic_lookup"] if is_macos else ["-Wl,--as-needed", "-Wl,--exclude-libs,ALL"]
    return Extension(
        "fastnn._C",
        sources=[
            str(path)
            for path in [
                CSRC / "module.cpp",
                *sorted(CSRC.glob("ops/*.cpp")),
                *sorted(CSRC.glob("network/*.cpp")),
                *sorted(CSRC.glob("simd/*.cpp")),
                *ISA_INDEPENDENT,
            ]
        ],
        depends=[str(p) for p in sorted(CSRC.glob("**/*.h"))],
        # System headers: their warnings are not ours.
        extra_compile_args=["-isystem", pybind11.get_include(), "-isystem", str(torch_root / "include")],
        library_dirs=[str(torch_root / "lib")],
        libraries=["torch_cpu"],
        extra_link_args=link,
        define_macros=[
            ("TORCH_TARGET_VERSION", "0x020a000000000000"),  # the stable ABI of torch 2.10
        ],
        language="c++",
    )


setup(version=VERSION, ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
