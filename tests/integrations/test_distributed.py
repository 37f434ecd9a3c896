"""DistributedDataParallel and FSDP2 of fused models, in two processes of this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch_distributed = pytest.importorskip("torch.distributed")
if not (torch_distributed.is_available() and torch_distributed.is_gloo_available()):
    pytest.skip("torch was built without gloo", allow_module_level=True)


@pytest.mark.parametrize("way", ["DistributedDataParallel", "FSDP2", "blocks"])
def test_two_processes(way: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = Path(__file__).with_name("two_processes.py")
    result = subprocess.run(
        [*torchrun, str(program), way], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-6000:]
