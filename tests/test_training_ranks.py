"""training_step in several processes of this machine, beside DistributedDataParallel (the cases are in ranks.py); and
its operators by themselves."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import fastnn
from fastnn import _C

PROGRAM = Path(__file__).with_name("ranks.py")
FIRST = ["operators", "a_loss_of_ones_own", "the_ordinary_way", "distributed_data_parallel", "accumulate"]
SECOND = ["uneven_last_batch", "unused_parameters", "one_process_goes_the_ordinary_way", "a_process_that_raises"]
THIRD = ["epoch", "what_averages_by_itself", "hooks_of_distributed_data_parallel", "arguments"]
LAST = ["a_process_that_does_not_come", "a_process_that_ends"]


@pytest.mark.skipif(
    sys.platform != "linux" or not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="forks processes that meet by gloo",
)
@pytest.mark.parametrize(("size", "cases"), [(2, [*FIRST, *SECOND, *THIRD, *LAST]), (4, [*FIRST, *SECOND, "epoch"])])
def test_processes_train_as_with_distributed_data_parallel(size: int, cases: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fastnn.__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", str(PROGRAM), str(tmp_path / "meeting"), str(size), *cases]
    output = tmp_path / "output"
    with output.open("w") as file:
        program = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        failed = program.wait(180)
    finally:
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGKILL)  # its processes too
            program.wait()
        print(output.read_text())
    assert failed == 0, output.read_text()[-6000:]


NUMBERS = torch.tensor([0, 1, 0, 0, 0, -1, 0.1, *[0] * 5], dtype=torch.float64)  # of mse_loss and SGD
LINEAR = "linear input=x weight=w bias=b -> y"
PROGRAM_TEXT = f"fastnn.network 1\ninput -> x\nweight -> w sizes=2,3\nweight -> b sizes=2\n{LINEAR}\noutput input=y"


def test_the_raw_operators_are_safe() -> None:
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    parameters = [torch.randn(2, 3), torch.randn(2)]
    bound = torch.ops.fastnn.bind_training_step(parameters, [], PROGRAM_TEXT, None, [0, 0, 0, 0])
    flat = torch.full((9,), torch.nan)
    gradients = [flat[1:7].view(2, 3), flat[7:]]
    run, update = torch.ops.fastnn.bound_training_gradients, torch.ops.fastnn.bound_training_update
    good = [[x], y, bound, NUMBERS, gradients]
    before = copy.deepcopy(parameters)
    own = [p.clone().requires_grad_() for p in parameters]
    expected = F.mse_loss(F.linear(x, *own), y)
    expected.backward()
    assert_close(run(*good), expected.detach())
    assert_close(gradients, [p.grad for p in own])
    assert flat[0].isnan()
    assert_close(parameters, before, rtol=0, atol=0)
    clipped = NUMBERS.clone()
    clipped[5] = 0.01
    scale = update(gradients, bound, clipped)
    assert_close(scale, 0.01 / (flat[1:].norm() + 1e-6))
    assert_close(parameters, [p - 0.1 * scale * g for p, g in zip(before, gradients, strict=True)])
    for op, arguments in ((run, good), (update, [gradients, bound, NUMBERS])):
        torch.library.opcheck(op.default, tuple(arguments), test_utils=("test_schema", "test_faketensor"))
    for op, of_gradients, of_bound, of_numbers in ((run, 4, 2, 3), (update, 0, 1, 2)):

        def refused(place: int, *values: Any, op: Any = op) -> None:
            for value in values:
                arguments = list(good) if op is run else [gradients, bound, NUMBERS]
                arguments[place] = value
                kept = copy.deepcopy([parameters, flat])
                with pytest.raises(RuntimeError):
                    op(*arguments)
                assert_close([parameters, flat], kept, rtol=0, atol=0, equal_nan=True)

        w, b = gradients
        freed = torch.randn(2)
        freed.untyped_storage().resize_(0)
        refused(of_gradients, [], [w], [w, b, b], [b, w], [w.t(), b], [w.double(), b.double()], [w, b.to("meta")])
        refused(of_gradients, [w, freed], [w, torch.randn(4)[::2]], [w[None], b], [w, b.half()])
        refused(of_bound, bound + 1000, bound.double(), bound.repeat(2), bound.to("meta"))
        refused(of_numbers, NUMBERS[:-1], NUMBERS.float(), torch.full_like(NUMBERS, torch.nan), NUMBERS.to("meta"))
        if op is run:
            refused(0, [], [x, x], [x[:, :2]], [x.double()], [x[:0]], [x.to("meta")])
            refused(1, y[:, :1], y.double(), y.long(), y.to("meta"))
    parameters[0].resize_(3, 3)
    for op, arguments in ((run, good), (update, [gradients, bound, NUMBERS])):
        with pytest.raises(RuntimeError):
            op(*arguments)
    _C.release_training_step(int(bound))
    with pytest.raises(RuntimeError, match="no step is bound"):
        update(gradients, bound, NUMBERS)
