"""Every figure of README and docs, measured in one go and written into them: ``make results``, in under an hour.

Each part is a program of this folder, which writes one file. The short form (``--short``) measures too briefly to be
believed, mostly on one thread and without compilers. It is there to try the machinery, and leaves its files, its plots
and its copies of the pages in build/short.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import render, zoo
from benchmarks.stored import RESULTS, ROOT

_BRIEF = ("--seconds", "0.001")
_NO_COMPILERS = ("--threads", "1", "--providers", "eager", "channels_last", "fastnn", "fastnn frozen")
_ENGINES = ("onnx_runtime", "openvino")


@dataclass(frozen=True)
class Part:
    """One result file: the program that writes it, with its arguments in the full form and in the short one."""

    name: str
    program: tuple[str, ...]
    full: tuple[str, ...]
    short: tuple[str, ...]

    def command(self, short: bool, folder: Path) -> list[str]:
        name, *arguments = (*self.program, *(self.short if short else self.full), "--output", str(folder))
        return [sys.executable, "-m", f"benchmarks.{name}", *arguments]


def _compare(name: str, op: str, *full: str) -> Part:
    return Part(name, ("compare", op), full, (*_BRIEF, *_NO_COMPILERS, *_ENGINES))


PARTS = [
    Part("models", ("report",), ("--seconds", "4"), _BRIEF),
    _compare("frozen", "models", "--seconds", "2"),
    *(_compare(op, op, "--seconds", "1", "--threads", "1") for op in ("conv_relu_max_pool", "rnn", "mlp")),
    Part(
        "zoo",
        ("zoo",),
        # Compiling with frozen weights would take a quarter of an hour: `make bench-zoo` does it.
        ("--seconds", "0.25", "--contenders", *(name for name in zoo.CONTENDERS if name != "compile frozen")),
        (*_BRIEF, "--threads", "1", "--contenders", "stock", "fused", "frozen", "onnxruntime"),
    ),
    Part(
        "step",
        ("step",),
        (),
        (*_BRIEF, "--threads", "1", "--contenders", "stock", "stock, fused Adam", "training_step"),
    ),
    Part(
        "epoch",
        ("epoch",),
        (),
        (*_BRIEF, "--threads", "1", "--contenders", "stock, DataLoader", "training_step, DataLoader", "epoch"),
    ),
    Part("curves", ("curves",), (), _BRIEF),
    Part("layers", ("layers",), (), (*_BRIEF, "--threads", "1")),
    Part("layers_avx2", ("layers", "--isa", "avx2", "--threads", "1"), (), _BRIEF),
    Part("memory", ("memory",), (), _BRIEF),
    Part("scaling", ("scaling",), (), _BRIEF),
    Part("overhead", ("overhead",), (), _BRIEF),
]


def main() -> None:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="measure too briefly to be believed, to build/short")
    parser.add_argument(
        "--only", nargs="*", choices=names, default=names, help="measure these (none: write pages alone)"
    )
    parser.add_argument("--root", type=Path, help="folder of the pages and of benchmarks/results")
    arguments = parser.parse_args()
    root = arguments.root or (ROOT / "build" / "short" if arguments.short else ROOT)
    failed = []
    for part in PARTS:
        if part.name in arguments.only:
            start = time.perf_counter()
            run = subprocess.run(part.command(arguments.short, root / RESULTS.relative_to(ROOT)), cwd=ROOT, check=False)
            failed += [part.name] * (run.returncode != 0)
            print(f"{part.name}: {(time.perf_counter() - start) / 60:.1f} minutes\n", flush=True)
    if failed:
        raise SystemExit(f"Failed, so that no page was written: {', '.join(failed)}")
    render.write_pages(root)


if __name__ == "__main__":
    main()
