"""The tests of the Triton kernels call their launchers directly: on a GPU where there is one, else on CPU tensors
under Triton's interpreter, which tests/test_gpu_kernels.py starts in a process of its own."""

import contextlib
import os
import sys
from pathlib import Path

import pytest
import torch

from fastnn.testing import TOLERANCES

# What cuBLAS asks for where results must repeat, as tests/conftest.py asks of torch.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if _INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


def pytest_configure(config):
    # cuDNN, about weights that come one by one.
    config.addinivalue_line("filterwarnings", "ignore:RNN module weights are not part of:UserWarning")
    if _INTERPRETED:
        _let_scalars_be_ints()
        _replace_the_language_once_a_launch()
        _keep_the_dtypes_of_arrays()
        _let_kernels_assert()
        _say_nothing_of_overflow()
        sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
        import gpu_stand_in

        gpu_stand_in.install()


def _let_scalars_be_ints():
    """The interpreter of Triton 3.6 calls int() on an array of one element, which numpy refuses since 2.4."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_all(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_all


def _replace_the_language_once_a_launch():
    """The interpreter replaces the functions of triton.language by its own when a launch begins, and again in each call
    from kernel to kernel, which takes nearly half of the time of these tests and changes nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    no_changes = getattr(interpreter, "_LangPatchScope", lambda: None)  # (Before Triton 3.7, what is replaced stays.)

    def patch_once(kernel):
        languages = [one for one in kernel.__globals__.values() if one is tl or one is tl.core]
        is_replaced = languages and not any(tl.core.is_builtin(one.load) for one in languages)
        return no_changes() if is_replaced else patch(kernel)

    interpreter._patch_lang = patch_once


def _keep_the_dtypes_of_arrays():
    """The interpreter makes a table of all dtypes whenever it looks up one, and each operation of a kernel looks up
    several."""
    from triton.runtime import interpreter

    find, known = interpreter._get_np_dtype, {}

    def find_once(dtype):
        name = dtype.scalar.name  # (A block's elements have the dtype of one of them.)
        if name not in known:
            known[name] = find(dtype)
        return known[name]

    interpreter._get_np_dtype = find_once


def _let_kernels_assert():
    """Of a launch's options, the interpreter does not see ``debug``."""
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)


def _say_nothing_of_overflow():
    """As a GPU: the interpreter's numpy warns of each inf and NaN that it makes."""
    import numpy

    numpy.seterr(over="ignore", invalid="ignore", divide="ignore")


@contextlib.contextmanager
def _float32_precision(value):
    flags = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [flag.fp32_precision for flag in flags]
    for flag in flags:
        flag.fp32_precision = value
    yield
    for flag, old in zip(flags, before, strict=True):
        flag.fp32_precision = old


@pytest.fixture(autouse=True)
def _exact_float32():
    """No tf32 on a GPU: results are held against float64 in units of float32. (The interpreter is always exact, and
    with tf32 allowed it also gets the kernels that are for tensor cores alone.)"""
    with _float32_precision("tf32" if _INTERPRETED else "ieee"):
        yield


@pytest.fixture
def tf32(_exact_float32):
    with _float32_precision("tf32"):
        yield


@pytest.fixture
def without_tf32(_exact_float32):
    with _float32_precision("ieee"):
        yield


@pytest.fixture
def device():
    return torch.device("cpu" if _INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def _waiting_ends(monkeypatch):
    """A program that waits for ever ends the test, not the tests: on a GPU after some ten seconds."""
    from fastnn.kernels import _launch

    monkeypatch.setattr(_launch, "spin_limit", 100 if _INTERPRETED else 2**24)


@pytest.fixture(autouse=True)
def _without_plans():
    """A test may replace what a plan was made with."""
    from fastnn.kernels._plan_cache import Plans

    Plans.forget_all()


@pytest.fixture
def assert_near():
    """assert_near(actual, exact): ``exact`` in float64; the error is held against the largest value, as sums have it.
    What is beyond the dtype's range is inf. The table's floor stands for stock's own error too, which is not at hand
    here; ``factor`` counts the roundings."""

    def check(actual, exact, factor=1.0):
        assert actual.shape == exact.shape
        rounded = exact.to(actual.dtype).double()
        exact = rounded.where(rounded.isinf(), exact)
        tolerance = factor * TOLERANCES[actual.dtype].ratio * TOLERANCES[actual.dtype].floor
        if _INTERPRETED and actual.dtype is torch.bfloat16:
            tolerance *= 3  # it truncates where a GPU rounds: twice the error, and always towards zero
        scale = exact.abs().nan_to_num(0, 0, 0).max().item() if exact.numel() else 0.0
        torch.testing.assert_close(actual.double().cpu(), exact.cpu(), rtol=0, atol=tolerance * max(scale, 1e-3),
                                   equal_nan=True)  # fmt: skip

    return check


@pytest.fixture
def same_products_in_any_row(monkeypatch):
    """Where bits are compared: the order in which the interpreter's BLAS sums depends on a row's place in its tile on
    some processors, which a GPU's does not."""
    if not _INTERPRETED:
        return
    import numpy
    from triton.runtime import interpreter

    def create_dot(self, a, b, sums, *_):
        product = numpy.einsum("mk,kn->mn", a.data, b.data, dtype=sums.data.dtype)
        return interpreter.TensorHandle(product + sums.data, sums.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
