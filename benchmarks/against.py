"""Another revision of fastnn against this one: is anything slower than it was?

``python -m benchmarks.against REV`` builds the revision in a folder of its own, then both run the same cases in turns,
in two processes, in the same minutes. Of two processes of the same code one may be a fifth faster with two threads for
as long as they live, the second to start more often: so pairs are started anew, in turns. The ratios are of medians of
all rounds.
"""

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent
_BLOCK_SECONDS = 20e-3


def build(revision: str) -> Path:
    """The folder of a built copy of the revision."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", f"{revision}^{{commit}}"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    folder = ROOT / "build" / "against" / commit
    if not folder.exists():
        folder.mkdir(parents=True)
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    print(f"building {commit} in {folder} (minutes, the first time)", flush=True)
    command = [sys.executable, "-W", "ignore::UserWarning", "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, check=True)
    return folder


# ---- a worker: one revision in a process of its own ------------------------------------------------------------


def _import_fastnn(folder: Path) -> None:
    """Import that folder's fastnn, whichever is installed; the benchmarks stay these."""
    spec = importlib.util.spec_from_file_location(
        "fastnn", folder / "fastnn" / "__init__.py", submodule_search_locations=[str(folder / "fastnn")]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fastnn"] = module
    spec.loader.exec_module(module)


def work(folder: Path) -> None:
    """Answer requests, one line of JSON each: a case to prepare, or another block of calls to time."""
    _import_fastnn(folder)
    import time

    import torch

    from benchmarks.cases import CASES
    from benchmarks.layers import layer_cases
    from benchmarks.problem import Problem

    cases: dict[str, list[Any]] = {**CASES, "layers": [case for _, case in layer_cases()]}
    run, calls = lambda: None, 1
    for line in sys.stdin:
        request = json.loads(line)
        if "case" in request:
            torch.set_num_threads(request["threads"])
            case = cases[request["op"]][request["case"]]
            problem = Problem(case, request["direction"], getattr(torch, request["dtype"]))
            problem.check_fused()
            run, calls = problem.runner(problem.fused, problem.input), 1
        with torch.inference_mode() if request["direction"] == "inference" else torch.enable_grad():
            while True:
                run()
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                seconds = time.perf_counter() - start
                if seconds > _BLOCK_SECONDS / 2 or "case" not in request:
                    break
                calls = max(calls + 1, min(10 * calls, int(calls * _BLOCK_SECONDS / seconds)))
        print(json.dumps(seconds / calls), flush=True)


class Worker:
    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.against", "--work", str(folder)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ}
        )

    def ask(self, request: dict[str, Any]) -> float:
        """Seconds a call."""
        to: IO[str] = self.process.stdin  # type: ignore[assignment]
        back: IO[str] = self.process.stdout  # type: ignore[assignment]
        print(json.dumps(request), file=to, flush=True)
        answer = back.readline()
        if not answer:
            raise SystemExit(f"a worker ended at {request}")
        return float(json.loads(answer))

    def end(self) -> None:
        self.process.communicate()


# ---- both -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against", description=__doc__.splitlines()[0])
    parser.add_argument("revision", nargs="?", help="a commit to compare with")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--ops", nargs="+", default=["conv_relu_max_pool"], help="ops of benchmarks/cases.py, or layers"
    )
    parser.add_argument("--only", default="", help="the cases whose name contains this text")
    both = ["inference", "training"]
    parser.add_argument("--directions", nargs="+", choices=both, default=both)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--rounds", type=int, default=3, help="measurements of a case by a pair (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=4, help="of processes, one after another (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.work:
        return work(arguments.work)
    if not arguments.revision:
        parser.error("which revision?")
    folders = {"this": ROOT, "that": build(arguments.revision)}
    from benchmarks.cases import CASES
    from benchmarks.layers import layer_cases

    cases = {**CASES, "layers": [case for _, case in layer_cases()]}
    chosen = [
        (op, n, case.name) for op in arguments.ops for n, case in enumerate(cases[op]) if arguments.only in case.name
    ]
    calls = list(itertools.product(chosen, arguments.dtypes, arguments.directions, arguments.threads))
    samples: list[dict[str, list[float]]] = [{name: [] for name in folders} for _ in calls]
    for pair in range(arguments.pairs):
        print(f"pair {pair + 1} of {arguments.pairs}", flush=True)
        workers = {name: Worker(folders[name]) for name in sorted(folders, reverse=pair % 2 == 1)}
        for ((op, number, _), dtype, direction, threads), of_call in zip(calls, samples, strict=True):
            request = {"direction": direction, "threads": threads, "dtype": dtype}
            for worker in workers.values():
                worker.ask({**request, "op": op, "case": number})
            for turn in range(arguments.rounds):
                for name in sorted(workers, reverse=turn % 2 == 1):
                    of_call[name].append(workers[name].ask(request))
            ratio = statistics.median(of_call["that"]) / statistics.median(of_call["this"])
            print(f"  {ratio:5.2f}  {op}, {dtype}, {direction}, {threads} thread(s)", flush=True)
        for worker in workers.values():
            worker.end()
    ratios: dict[str, list[float]] = {}
    for ((op, _, case_name), dtype, direction, threads), of_call in zip(calls, samples, strict=True):
        this, that = (statistics.median(of_call[name]) for name in ("this", "that"))
        kind = f"{op}, {dtype}, {direction}, {threads} thread(s)"
        ratios.setdefault(kind, []).append(that / this)
        print(f"{that / this:6.2f}  {this * 1e6:11.1f} us  {kind}  {case_name}")
    print(f"\ntime of {arguments.revision} over time of this tree")
    for kind, values in ratios.items():
        mean = statistics.geometric_mean(values)
        print(f"{kind}: {len(values)} cases, least {min(values):.2f}, geometric mean {mean:.2f}")


if __name__ == "__main__":
    main()
