"""Compiled kernels launched without Triton's dispatch, and plans kept; and that operators, launchers and modules fit
together, as far as that can be told from outside."""

import importlib
import inspect
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastnn
from fastnn import kernels
from fastnn.kernels import _launch, _plan_cache, _target


class Kernel:
    """Triton's, as far as a launch looks at it."""

    arg_names = ("input", "weights", "rows", "BLOCK")

    def __init__(self):
        self.dispatched, self.launched = 0, []

    def __getitem__(self, grid):
        def dispatch(*args, **options):
            self.dispatched += 1
            return SimpleNamespace(
                function="function", packed_metadata="metadata", run=lambda *args: self.launched.append(args)
            )

        return dispatch


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # a CPU's index
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0x5EA, raising=False)


def test_compiled_kernels_are_launched_without_dispatch(on_a_gpu):
    kernel = Kernel()
    launch = _launch.Launcher(kernel, (3, 2), torch.device("cpu"), BLOCK=16, num_warps=4)
    a, b = torch.ones(8), torch.ones(8)
    launch(a, (b, None), 8)
    assert (kernel.dispatched, kernel.launched) == (1, [])
    launch(b, (a, None), 8)
    assert kernel.dispatched == 1
    assert kernel.launched == [
        (3, 2, 1, 0x5EA, "function", "metadata", None, None, None, b.data_ptr(), (a.data_ptr(), None), 8, 16)
    ]


def test_tensors_at_odd_addresses_are_left_to_triton(on_a_gpu):
    kernel = Kernel()
    launch = _launch.Launcher(kernel, (3,), torch.device("cpu"), BLOCK=16)
    odd = torch.ones(8)[1:]
    for _ in range(2):
        launch(odd, (), 7)
    launch(torch.ones(8), (), 7)
    assert (kernel.dispatched, kernel.launched) == (3, [])
    launch(torch.ones(8), (odd,), 7)
    assert (kernel.dispatched, kernel.launched) == (4, [])


def test_hooks_see_every_launch(on_a_gpu, monkeypatch):
    """Triton has a chain of hooks; other versions and users None or a single one in its place."""
    runtime = _launch.triton.knobs.runtime
    kernel = Kernel()
    launch = _launch.Launcher(kernel, (3,), torch.device("cpu"), BLOCK=16)
    launch(torch.ones(8), (), 8)
    for hook, dispatched in [
        (None, 1),
        (SimpleNamespace(calls=[]), 1),
        (SimpleNamespace(calls=[print]), 2),
        (print, 3),
    ]:
        monkeypatch.setattr(runtime, "launch_enter_hook", hook)
        launch(torch.ones(8), (), 8)
        assert kernel.dispatched == dispatched
    monkeypatch.setattr(runtime, "launch_enter_hook", None)
    monkeypatch.setattr(runtime, "launch_exit_hook", print)
    launch(torch.ones(8), (), 8)
    assert kernel.dispatched == 4


def test_plans_are_forgotten_when_there_are_many(monkeypatch):
    plans = _plan_cache.Plans()
    monkeypatch.setattr(_plan_cache.Plans, "_MOST", 2)
    assert [plans.keep(key, -key) for key in range(3)] == [0, -1, -2]
    assert plans == {2: -2}
    _plan_cache.Plans.forget_all()
    assert plans == {}


def test_a_plan_depends_on_all_facts():
    tensor = torch.ones(2, 3)
    others = (torch.ones(3, 2), tensor.double(), tensor.to("meta"), tensor.to_sparse())
    assert len({_plan_cache.facts(t) for t in (None, tensor, torch.zeros(2, 3), *others)}) == 6


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in kernels._OPERATORS.items() for n in names])
def test_launchers_take_what_operators_do(module, name):
    launcher = getattr(importlib.import_module(f"fastnn.kernels.{module}.launch"), name)
    schema = getattr(torch.ops.fastnn, name).default._schema
    assert list(inspect.signature(launcher).parameters) == [argument.name for argument in schema.arguments]


def test_precision_follows_torchs_flags():
    """The new flags and the old ones; in a process of its own, since torch does not let go of the old."""
    flags = {
        "pass": ("ieee", "tf32", "tf32"),
        "torch.set_float32_matmul_precision('high')": ("tf32", "tf32", "tf32"),
        "torch.backends.cuda.matmul.allow_tf32 = True": ("tf32", "tf32", "tf32"),
        "torch.backends.cudnn.allow_tf32 = False": ("ieee", "tf32x3", "ieee"),
        "torch.backends.cudnn.conv.fp32_precision = 'ieee'": ("ieee", "tf32x3", "tf32"),
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'": ("tf32", "tf32", "tf32"),
    }
    lines = [
        "import torch",
        "from fastnn.kernels._precision import dot_precision",
        "from fastnn.kernels._target import TARGETS",
    ]
    for flag in flags:
        lines += ["if os.fork() == 0:", f"    {flag}", "    print(ask(), flush=True)", "    os._exit(0)", "os.wait()"]
    ask = "ask = lambda: tuple(dot_precision(torch.float32, op, TARGETS[2]) for op in ('linear', 'conv', 'rnn'))"
    program = "\n".join(["import os", *lines[:3], ask, *lines[3:]])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(precisions) for precisions in flags.values()]


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:PyTorch was compiled without cuDNN")  # stock's flatten_parameters
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # the same, in a torch with cuDNN
@pytest.mark.parametrize(
    ("module", "sizes", "name"),
    [
        (lambda: fastnn.nn.RNN(6, 16), (5, 3, 6), "rnn"),
        (lambda: fastnn.nn.GRU(6, 520), (5, 3, 6), "rnn"),  # whichever kernels run it
        (lambda: fastnn.nn.LSTM(6, 16, proj_size=4), (5, 3, 6), "rnn"),
        (lambda: fastnn.nn.GRUCell(6, 2000), (3, 6), "rnn_cell"),
        (lambda: fastnn.nn.LSTMCell(6, 16), (3, 6), "rnn_cell"),
        (lambda: fastnn.nn.ConvReLUMaxPool2d(3, 8, 3), (2, 3, 8, 8), "conv_relu_max_pool"),
        (lambda: fastnn.nn.MLP([6, 4, 2]), (3, 6), "mlp"),
    ],
)
def test_modules_on_a_gpu_reach_the_operators(module, sizes, name):
    mode = FakeTensorMode()

    def on_a_gpu(tensor):
        return FakeTensor(mode, tensor.to("meta", torch.float16), torch.device("cuda:0"))

    module, input = module(), on_a_gpu(torch.empty(sizes))
    parameters = {key: on_a_gpu(tensor) for key, tensor in module.named_parameters()}
    with mode, _target.assume_target(_target.TARGETS[2]), torch.no_grad(), Called() as called:
        torch.func.functional_call(module, parameters, input)
    assert f"fastnn::{name}" in called.names
