"""Runs tests/gpu under Triton's interpreter, which has to be chosen before Triton is imported: in another process.

The processes run one after another beside the other tests (conftest.py starts them), and these tests wait for them.
"""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

_TESTS = Path(__file__).parent / "gpu"
_pool = ThreadPoolExecutor(1)
_runs: dict[Path, Future] = {}


def begin(paths):
    for path in paths:
        _runs[path] = _pool.submit(_run, path)


def end():
    """Runs no more than have begun."""
    _pool.shutdown(wait=False, cancel_futures=True)


def _run(path):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(path)]
    return subprocess.run(command, env=environment, cwd=_TESTS.parent.parent, capture_output=True, text=True)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("path", sorted(_TESTS.glob("test_*.py")), ids=lambda path: path.stem)
def test_under_the_interpreter(path):
    result = _runs[path].result()
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
