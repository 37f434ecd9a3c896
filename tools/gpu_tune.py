"""Measures other configurations than the rules' for the shapes of tools/gpu_cases.py on this machine's GPU, and writes
those that are faster to fastnn/kernels/tuned.json, where the operators look: a user's call never tunes.

The table's keys are the kind of GPU and the class of shapes for which a rule chooses; its values are the fields of the
configuration that differ. tools/gpu_check.py compiles what the table says, too.

    python tools/gpu_tune.py [--minutes 20] [--op mlp ...] [--rehearse]
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from gpu_bench import seconds_a_call
from gpu_cases import Case, all_cases, float32_precision

from fastnn.kernels import _launch, _plan_cache, _target

TABLE = Path(_target.__file__).with_name("tuned.json")
FIELDS = {  # what else a field of a configuration may be
    "num_warps": (4, 8, 16),
    "num_stages": (2, 3, 4),
    "block_pixels": (32, 64, 128),
    "block_rows": (16, 32, 64, 128),
    "block_batch": (8, 16, 32),
    "chunk": (8, 16, 32),
    "block_in": (16, 32, 64, 128),
    "block_out": (16, 32, 64, 128),
    "block_k": (16, 32, 64),
}
WORTH = 0.97  # of the time so far: less of a gain is noise

Table = dict[str, dict[str, int]]  # of one kind of GPU


class Trial:
    """A case, measured with a table in place of the shipped one."""

    def __init__(self, case: Case, device: torch.device, table: Table, rehearse: bool) -> None:
        self.device, self.table, self.rehearse = device, table, rehearse
        self.asked: dict[str, Any] = {}  # the classes that the case is in, with what the rules and the table choose
        self.run: Callable[[], object] = case.make(device).training
        _target.tuned = self._tuned
        self.best = self._seconds()

    def _tuned(self, config: Any, target: _target.Target, *shape_class: Any) -> Any:
        key = " ".join(map(str, shape_class))
        self.asked[key] = config._replace(**self.table.get(key, {}))
        return self.asked[key]

    def _seconds(self) -> float:
        _plan_cache.Plans.forget_all()
        if self.device.type == "meta":
            self.run()
            return 1.0
        return seconds_a_call(self.run, self.rehearse)[1]

    def try_change(self, key: str, field: str, value: int) -> bool:
        """Whether it is faster so; then the table says so."""
        before = self.table.get(key, {})
        self.table[key] = before | {field: value}
        try:
            seconds = self._seconds()
        except Exception as error:  # it may not compile, or not fit: then it is no candidate
            print(f"  {key}: {field} {value}: {type(error).__name__}", flush=True)
            seconds = float("inf")
        if seconds < WORTH * self.best:
            print(f"  {key}: {field} {value}: {self.best * 1e6:.1f} -> {seconds * 1e6:.1f} us", flush=True)
            self.best = seconds
            return True
        if before:
            self.table[key] = before
        else:
            del self.table[key]
        return False


def candidates(trial: Trial) -> Iterator[tuple[str, str, int]]:
    """One field after another of every configuration that the case asks for."""
    for key in list(trial.asked):
        for field in trial.asked[key]._fields:
            for value in FIELDS.get(field, ()):
                if value != getattr(trial.asked[key], field):
                    yield key, field, value


def tune(cases: Sequence[Case], device: torch.device, table: Table, deadline: float, rehearse: bool) -> None:
    for case in cases:
        if time.monotonic() > deadline:
            print(f"no time left for {case.op} {case.shape}")
            continue
        print(f"{case.op} {case.shape} {case.dtype}", flush=True)
        with float32_precision(case), torch.no_grad():
            trial = Trial(case, device, table, rehearse)
            for candidate in candidates(trial):
                if time.monotonic() < deadline:
                    trial.try_change(*candidate)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--op", action="append", help="default: all")
    parser.add_argument(
        "--rehearse", action="store_true", help="without a GPU: go through all changes, measure nothing"
    )
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("no GPU is to be seen; --rehearse goes through the steps without one")
    device = torch.device("meta" if options.rehearse else "cuda")
    shipped = json.loads(TABLE.read_text())
    target = _target.target_of(torch.device("meta") if options.rehearse else torch.device("cuda", 0))
    table = shipped.setdefault(target.name, {})
    original, launch = _target.tuned, _launch.launch
    if options.rehearse:
        _launch.launch = lambda *args, **options: None
    try:
        cases = [case for case in all_cases() if not options.op or case.op in options.op]
        tune(cases, device, table, time.monotonic() + 60 * options.minutes, options.rehearse)
    finally:
        _target.tuned, _launch.launch = original, launch
    print(f"{len(table)} classes of shapes on {target.name} are run otherwise than by the rules")
    if not options.rehearse:
        TABLE.write_text(json.dumps(shipped, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
