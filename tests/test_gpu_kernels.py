"""Runs tests/gpu under Triton's interpreter, which has to be chosen before Triton is imported: in another process."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

_TESTS = Path(__file__).parent / "gpu"
_LONG = [_TESTS / "test_rnn.py", _TESTS / "test_conv_relu_max_pool.py"]
# The other files share a process, which imports torch and Triton once for them.
_GROUPS = {path.stem: [path] for path in _LONG} | {"others": sorted({*_TESTS.glob("test_*.py")} - {*_LONG})}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("paths", _GROUPS.values(), ids=_GROUPS)
def test_under_the_interpreter(paths):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *map(str, paths)]
    result = subprocess.run(command, env=environment, cwd=_TESTS.parent.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
