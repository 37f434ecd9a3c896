"""Everything that a GPU can tell about fastnn, in one command of under nine minutes, on a machine without a network:
builds the extension, runs the GPU tests, the sanitizers that are at hand, then the benchmarks, whatever fails on the
way, and writes one JSON and one table with the card's name to benchmarks/results/.

    python tools/gpu_run.py [--minutes 8.5] [--rehearse]

It needs Python, torch, triton, pybind11, setuptools, pytest, pytest-benchmark and a C++ compiler. With --rehearse it
runs every step on the CPU in little time, the kernels under Triton's interpreter, and writes to a temporary folder.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

ROOT = Path(__file__).parent.parent
OPS = ("models", "rnn", "conv_relu_max_pool", "mlp")
SANITIZED = {0: "nothing found", 124: "not finished"}  # by exit status
NO_TESTS = 5  # pytest's exit status: a file may have fewer tests than shards


def run(
    command: Sequence[str | Path], seconds: float, folder: Path = ROOT, environment: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> tuple[int, str]:  # fmt: skip
    """Exit status and output of a Python command in ``folder``; 124 where it took too long."""
    own = os.environ | {"PYTHONPATH": str(ROOT)} | dict(environment or {})
    try:
        done = subprocess.run(
            [*prefix, sys.executable, *map(str, command)], cwd=folder, env=own, timeout=max(seconds, 1),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired as expired:
        output = expired.output or b""
        return 124, output.decode(errors="replace") if isinstance(output, bytes) else output
    return done.returncode, done.stdout


def build(seconds: float) -> dict[str, Any]:
    """Compile the extension where pyproject.toml is not seen: setuptools before 77 refuses its way of naming a license,
    and a machine without a network has the setuptools that it has."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("setup.py", "csrc", "fastnn", "build"):
            (folder / name).symlink_to(ROOT / name)
        (ROOT / "build").mkdir(exist_ok=True)
        status, output = run(["-W", "ignore", "setup.py", "-q", "build_ext", "--inplace"], seconds, folder)
    return {"status": status, "seconds": time.monotonic() - started, "output": output[-2000:]}


class TestRun(NamedTuple):
    name: str
    report: Path
    process: subprocess.Popen


def start_tests(paths: Sequence[Path], folder: Path, rehearse: bool, shards: int = 1) -> list[TestRun]:
    """``shards`` processes a file, all side by side: most of their time is the compiler's. A crash costs one shard."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"}
    if rehearse:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    started = []
    for path, shard in itertools.product(paths, range(shards)):
        name = path.name if shards == 1 else f"{path.name} {shard + 1}/{shards}"
        report = folder / f"{path.stem}.{shard}.xml"
        # A warning that another torch or driver gives there is no failure, as it is in `make test`.
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-W", "default", "-p", "no:cacheprovider",
                   "-p", "gpu_shard", f"--shard={shard}/{shards}", f"--junitxml={report}", str(path)]  # fmt: skip
        with report.with_suffix(".log").open("w") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        started.append(TestRun(name, report, process))
    return started


def start_compiling(rehearse: bool) -> list[subprocess.Popen]:
    """The benchmark's kernels, into Triton's cache on disk, beside the tests: its own time is too short for that."""
    options = ["--compile", *(["--rehearse"] if rehearse else [])]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return [
        subprocess.Popen([sys.executable, "tools/gpu_bench.py", op, os.devnull, *options], cwd=ROOT, **quiet)
        for op in OPS
    ]


def wait_for(processes: Sequence[subprocess.Popen], seconds: float) -> list[subprocess.Popen]:
    """-> those that still run after so long, all together."""
    deadline = time.monotonic() + seconds
    running = []
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            running.append(process)
    return running


def kill(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def finish_tests(started: Sequence[TestRun], seconds: float, grace: float = 5) -> dict[str, Any]:
    """``grace``: seconds for those that have to be stopped, in which pytest writes down what it has found out."""
    late = wait_for([test_run.process for test_run in started], seconds)
    for process in late:
        process.send_signal(signal.SIGINT)
    kill(wait_for(late, grace))
    result: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": [], "unfinished": [], "tails": {}}
    for name, report, process in started:
        if process.returncode not in (0, NO_TESTS):
            result["tails"][name] = report.with_suffix(".log").read_text(errors="replace")[-3000:]
        tests: list[ElementTree.Element] = []
        try:
            tests += ElementTree.parse(report).iter("testcase")
            finished = process not in late
        except (FileNotFoundError, ElementTree.ParseError):  # none or half of one, of who was killed
            finished = False
        if not finished:
            result["unfinished"].append(name)
        for test in tests[:-1] if process in late else tests:  # the last was not finished
            outcome = {child.tag for child in test}
            if outcome & {"failure", "error"}:
                result["failed"].append(f"{name.split()[0]}::{test.get('name')}")
            else:
                result["skipped" if "skipped" in outcome else "passed"] += 1
    return result


def run_tests(folder: Path, deadline: float, rehearse: bool) -> dict[str, Any]:
    """The recurrent tests first, by themselves: their programs wait for each other, and should one wait for ever, no
    other test is to look like the reason. Then the others, with what the benchmark's kernels have to be compiled."""
    paths = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    recurrent = [path for path in paths if path.stem == "test_rnn"]
    first = finish_tests(start_tests(recurrent, folder, rehearse), 0.4 * (deadline - time.monotonic()))
    shards = max(1, min(4, (os.cpu_count() or 1) // 4))
    started = start_tests([path for path in paths if path not in recurrent], folder, rehearse, shards)
    compiling = start_compiling(rehearse)
    others = finish_tests(started, 0.4 * (deadline - time.monotonic()))
    kill(compiling)
    # Numbers, lists and, of the tails, dictionaries.
    return {name: value | others[name] if name == "tails" else value + others[name] for name, value in first.items()}


def sanitizers() -> dict[str, tuple[dict[str, str], list[str]]]:
    """By name those at hand on this machine: what they add to the environment, and what they put before Python."""
    found: dict[str, tuple[dict[str, str], list[str]]] = {}
    # Triton's, from 3.9 on: races between programs, by vector clocks.
    if importlib.util.find_spec("triton.experimental") and importlib.util.find_spec("triton.experimental.gsan"):
        found["races"] = ({"TRITON_INSTRUMENTATION_MODE": "gsan"}, [])
    if tool := shutil.which("compute-sanitizer"):
        found["memory"] = ({}, [tool, "--tool", "memcheck", "--error-exitcode", "3"])
    return found


def sanitize(seconds: float, rehearse: bool) -> dict[str, Any]:
    """gpu_sanitize.py once with each of them: exit status and output."""
    results: dict[str, Any] = {}
    for name, (environment, prefix) in sanitizers().items():
        command = ["tools/gpu_sanitize.py", name, *(["--rehearse"] if rehearse else [])]
        if rehearse:
            environment, prefix = {}, []
        status, output = run(command, seconds, environment=environment, prefix=prefix)
        results[name] = {"status": status, "output": output[-3000:]}
    return results


def benchmark(folder: Path, deadline: float, rehearse: bool) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """All measurements, and the ends of the logs of the runs that failed."""
    path, logs = folder / "measurements.jsonl", {}
    for i, op in enumerate(OPS):
        share = (deadline - time.monotonic()) / (len(OPS) - i)
        command = ["tools/gpu_bench.py", op, path, "--seconds", str(0.8 * share), *(["--rehearse"] if rehearse else [])]
        status, output = run(command, share)
        print(output[-300:], flush=True)
        if status:
            logs[op] = f"exit status {status}\n{output[-3000:]}"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # half a line, of who was killed
            rows.append(json.loads(line))
    return rows, logs


def as_table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: one line a case, dtype, direction and way of launching; times in microseconds, and how much faster
    fastnn is than the fastest of the others. Beside fastnn's time what issuing its kernels' instructions takes alone
    (gpu_floor.py): a time far above it waits for something else."""
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if "failed" not in row:
            key = (row["op"], row["case"], row["dtype"], row["direction"], "graph" if row["graph"] else "launches")
            groups.setdefault(key, {})[row["provider"]] = row
    providers = sorted({provider for group in groups.values() for provider in group}, key=lambda p: ("fastnn" in p, p))
    header = ["operator", "case", "dtype", "direction", "as", *providers, "floor of fastnn", "fastnn is faster",
              "memory of eager"]  # fmt: skip
    lines = [header, ["---"] * len(header)]
    for key, group in groups.items():
        times = {provider: row["seconds"][1] * 1e6 for provider, row in group.items()}
        ours = [time for provider, time in times.items() if "fastnn" in provider]
        others = [time for provider, time in times.items() if "fastnn" not in provider]
        ratio = f"{min(others) / min(ours):.2f}x" if ours and others else ""
        memory = [group[p]["memory"] if p in group else None for p in ("fastnn", "eager")]
        share = f"{memory[0] / memory[1]:.0%}" if memory[0] is not None and memory[1] else ""
        floor = group.get("fastnn", {}).get("floor")
        least = "" if floor is None else f"{floor * 1e6:.1f}"
        lines.append([*key, *(f"{times[p]:.1f}" if p in times else "" for p in providers), least, ratio, share])
    return [f"| {' | '.join(line)} |" for line in lines]


def describe() -> dict[str, Any]:
    available = torch.cuda.is_available()
    return {
        "card": torch.cuda.get_device_name() if available else "no GPU",
        "capability": torch.cuda.get_device_capability() if available else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if available else None,
        "triton": triton.__version__,
        "tf32": {"linear": torch.backends.cuda.matmul.fp32_precision, "cudnn": torch.backends.cudnn.fp32_precision},
    }


def write(report: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    name = "gpu_" + report["card"].lower().replace(" ", "_").replace("/", "_")
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    tests = report["tests"]
    lines = [f"# fastnn on {report['card']}", "",
             f"torch {report['torch']}, CUDA {report['cuda']}, cuDNN {report['cudnn']}, Triton {report['triton']}. "
             f"{tests['passed']} tests passed, {len(tests['failed'])} failed, {tests['skipped']} skipped.", "",
             *(f"- failed: {test}" for test in tests["failed"]),
             *(f"- not finished: {name}" for name in tests["unfinished"]),
             *(f"- sanitizer, {name}: {SANITIZED.get(result['status'], 'see the JSON')}"
               for name, result in report["sanitizers"].items()),
             *(f"- failed: {row['provider']} on {row['case']}, {row['dtype']}, {row['direction']}: {row['failed']}"
               for row in report["measurements"] if "failed" in row), "",
             "Median microseconds a call.", "", *as_table(report["measurements"])]  # fmt: skip
    table = folder / f"{name}.md"
    table.write_text("\n".join(lines) + "\n")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.5, help="for all of it")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--rehearse", action="store_true", help="every step in little time, on the CPU")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("no GPU is to be seen; --rehearse goes through the steps without one")
    deadline = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        built = build(0.5 * (deadline - time.monotonic()))
        print(f"built in {built['seconds']:.0f} s, status {built['status']}", flush=True)
        if built["status"]:
            print(built["output"], flush=True)
        tests = run_tests(folder, deadline, options.rehearse)
        print({name: tests[name] for name in ("passed", "skipped", "failed", "unfinished")}, flush=True)
        sanitized = sanitize(0.1 * (deadline - time.monotonic()), options.rehearse)
        print({name: result["status"] for name, result in sanitized.items()}, flush=True)
        measurements, logs = benchmark(folder, deadline - 5, options.rehearse)
        report = describe() | {"build": built, "tests": tests, "sanitizers": sanitized, "measurements": measurements}
        report["logs"] = logs
        table = write(report, folder / "results" if options.rehearse else options.results)
        print(table.read_text())
    found = any(result["status"] for result in sanitized.values())
    return int(bool(built["status"] or tests["failed"] or tests["unfinished"] or found or logs))


if __name__ == "__main__":
    sys.exit(main())
