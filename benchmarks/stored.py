"""The files in which results are kept: rows, and beside them all that their figures depend on."""

import json
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fastnn

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"  # what README and docs show; only `make results` writes there
OUTPUT = ROOT / "build" / "results"  # where a program writes that is run alone
_SOURCES = ("csrc", "fastnn", "benchmarks/*.py", "tests/zoo")
_DIGITS = 4


def environment() -> dict[str, Any]:
    """What a figure depends on, to be stored beside it."""
    info = fastnn.backend_info()
    return {
        "processor": _processor(),
        "instruction_set": info.instruction_set,
        "fastnn": info.version,
        "torch": info.torch,
        "python": info.python,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def save(folder: Path, name: str, rows: list[dict[str, Any]], seconds: float, **more: Any) -> None:
    """Write ``name.json``: what was measured, for how many seconds a row, and where."""
    info = environment() | {"threads": sorted({row["threads"] for row in rows}), "seconds_a_row": seconds}
    content = _rounded({"environment": info, **more, "rows": rows})
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(json.dumps(content, indent=1) + "\n")
    print(f"Written: {file}")


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The content of every result file of the folder, by name, but for what a GPU's tools have left there."""
    files = [file for file in sorted(folder.glob("*.json")) if not file.name.startswith("gpu_")]
    return {file.stem: json.loads(file.read_text()) for file in files}


def select(rows: Iterable[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The rows that have these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _rounded(value: Any) -> Any:
    """The same with as many digits as a measurement has, so that files stay small."""
    if isinstance(value, dict):
        return {str(key): _rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _commit() -> str:
    """The commit that is checked out, and whether what is measured differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no", "--", *_SOURCES)
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine()
