"""The programs for a machine with a GPU, as far as they run without one: what fails there must not cost the rest."""

import importlib
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch):
    """tool(name): a module of tools/."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "tools")

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_failing_and_crashing_tests_cost_no_others(tool, tmp_path: Path) -> None:
    files = {
        "test_good.py": "def test_good(): pass",
        "test_bad.py": "def test_bad(): assert False\ndef test_good(): pass",
        "test_crash.py": "import os\ndef test_crash(): os._exit(7)",
        "test_hang.py": "import pathlib, time\ndef test_good(): pass\n"
        f"def test_hang(): pathlib.Path({str(tmp_path / 'hangs')!r}).touch(); time.sleep(60)",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    gpu_run = tool("gpu_run")
    paths = [tmp_path / name for name in files]
    started = gpu_run.start_tests(paths[:3], tmp_path, rehearse=True)
    result = gpu_run.finish_tests(started, 60)
    assert (result["passed"], result["failed"]) == (2, ["test_bad.py::test_bad"])
    assert result["unfinished"] == ["test_crash.py"]
    assert set(result["tails"]) == {"test_bad.py", "test_crash.py"}
    started = gpu_run.start_tests(paths[3:], tmp_path, rehearse=True)
    while not (tmp_path / "hangs").exists():
        time.sleep(0.1)
    hanging = gpu_run.finish_tests(started, 1, grace=60)  # on a busy machine
    assert hanging["unfinished"] == ["test_hang.py"]
    assert hanging["passed"] == 1


def test_shards_run_every_test_once(tool, tmp_path: Path) -> None:
    (tmp_path / "test_three.py").write_text("".join(f"def test_{i}(): assert {i} != 1\n" for i in range(3)))
    gpu_run = tool("gpu_run")
    result = gpu_run.finish_tests(gpu_run.start_tests([tmp_path / "test_three.py"], tmp_path, True, shards=4), 60)
    assert (result["passed"], result["failed"], result["unfinished"]) == (2, ["test_three.py::test_1"], [])
    assert set(result["tails"]) == {"test_three.py 2/4"}


def test_warnings_are_no_failures_on_a_card(tool, tmp_path: Path) -> None:
    (tmp_path / "test_warns.py").write_text("import warnings\ndef test_warns(): warnings.warn('of another driver')\n")
    gpu_run = tool("gpu_run")
    result = gpu_run.finish_tests(gpu_run.start_tests([tmp_path / "test_warns.py"], tmp_path, True), 60)
    assert (result["passed"], result["failed"]) == (1, [])


def test_recurrent_tests_run_first_and_by_themselves(tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_run = tool("gpu_run")
    order: list[Any] = []

    def start(paths, folder, rehearse, shards=1):
        order.append(([path.stem for path in paths], shards))

    def finish(started, seconds):
        order.append("finished")
        return {"passed": 1, "skipped": 2, "failed": ["a"], "unfinished": [], "tails": {str(len(order)): "log"}}

    monkeypatch.setattr(gpu_run, "start_tests", start)
    monkeypatch.setattr(gpu_run, "finish_tests", finish)
    monkeypatch.setattr(gpu_run, "start_compiling", lambda rehearse: [])
    result = gpu_run.run_tests(tmp_path, time.monotonic() + 1, True)
    assert order[:2] == [(["test_rnn"], 1), "finished"]
    assert "test_mlp" in order[2][0]
    assert "test_rnn" not in order[2][0]
    assert result == {"passed": 2, "skipped": 4, "failed": ["a", "a"], "unfinished": [],
                      "tails": {"2": "log", "4": "log"}}  # fmt: skip


def test_sanitizers_that_are_at_hand(tool, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_run = tool("gpu_run")
    monkeypatch.setattr(gpu_run.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(gpu_run.importlib.util, "find_spec", lambda name: object())
    assert gpu_run.sanitizers() == {
        "races": ({"TRITON_INSTRUMENTATION_MODE": "gsan"}, []),
        "memory": ({}, ["/bin/compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "3"]),
    }
    rehearsed = gpu_run.sanitize(120, rehearse=True)
    assert {name: result["status"] for name, result in rehearsed.items()} == {"races": 0, "memory": 0}
    assert "GRU, spread: nothing found" in rehearsed["races"]["output"]
    assert "conv_relu_max_pool" in rehearsed["memory"]["output"]
    monkeypatch.setattr(gpu_run.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu_run.importlib.util, "find_spec", lambda name: None)
    assert gpu_run.sanitizers() == {}


def test_table(tool) -> None:
    row = {"op": "mlp", "case": "a", "dtype": "float32", "direction": "forward", "graph": False, "memory": 10}
    rows = [
        row | {"provider": "eager", "seconds": [1e-6, 2e-6, 3e-6], "memory": 20},
        row | {"provider": "fastnn", "seconds": [1e-6, 1e-6, 1e-6], "floor": 4e-7},
        row | {"provider": "compile", "failed": "it did"},
    ]
    assert tool("gpu_run").as_table(rows)[2:] == [
        "| mlp | a | float32 | forward | launches | 2.0 | 1.0 | 0.4 | 2.00x | 50% |"
    ]


def test_nothing_is_expected_to_be_slower_than_stock(tool) -> None:
    predictions = list(tool("gpu_roofline").all_predictions())
    assert {prediction.op for prediction in predictions} == {"conv_relu_max_pool", "rnn", "mlp"}
    for prediction in predictions:
        stock, _, ours = prediction.seconds()
        assert ours < stock / 0.97, prediction.row()


def test_nothing_wrong_is_measured(tool) -> None:
    gpu_bench = tool("gpu_bench")
    problem = gpu_bench.Problem(gpu_bench.CASES["mlp"][0], torch.float32, "forward", torch.device("cpu"))
    wrong = gpu_bench.eager(problem)
    with pytest.raises(AssertionError, match="nothing to be measured"):
        next(gpu_bench.measure(problem, "wrong", lambda _: lambda: 1.1 * wrong(), rehearse=True))


class HostTensors(TorchDispatchMode):
    """Which functions are given tensors of the CPU beside those of a device, or tensors that no function has made but
    a Python list: to bring them to a GPU waits for it, and no CUDA graph can be captured meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.made: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        result = function(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        if len({t.device.type for t in given + made}) > 1:
            self.found.add(str(function))
        if any(t.device.type != "cpu" and id(t) not in self.made for t in given):
            self.found.add(str(function))
        self.made |= {id(t): t for t in made}
        return result


@pytest.mark.parametrize("op", ["mlp", "conv_relu_max_pool", "rnn"])
def test_calls_bring_nothing_to_the_gpu(op: str, tool, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastnn.kernels import _launch, _plan_cache, _target  # only now: they import Triton

    gpu_cases = tool("gpu_cases")
    monkeypatch.setattr(_launch, "launch", lambda *args, **options: None)
    cases = [c for c in gpu_cases.all_cases() if c.op == op and c.dtype.itemsize == 2]
    with _target.assume_target(_target.TARGETS[2]), torch.no_grad():
        for case in cases:
            _plan_cache.Plans.forget_all()
            with HostTensors() as host:
                run = case.make(torch.device("meta")).training
                run()
                host.found.clear()  # what a plan keeps for the next call
                run()
            assert host.found == set(), case
    _plan_cache.Plans.forget_all()
