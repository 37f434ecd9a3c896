"""tools/gpu_check.py finds what it is there for: a kernel made to be at fault fails, the same made well does not."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl


@triton.jit
def product(  # type: ignore[no-untyped-def]
    a, b, out, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BY_DOT: tl.constexpr, PRECISION: tl.constexpr
):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    sums = tl.zeros([M, N], tl.float32)
    for step in range(steps):
        x = tl.load(a + step * M * K + m[:, None] * K + k[None, :])
        y = tl.load(b + step * K * N + k[:, None] * N + n[None, :])
        if BY_DOT:
            sums = tl.dot(x, y, sums, input_precision=PRECISION)
        else:
            # With the absolute value, or compilers recognise the product.
            sums += tl.sum(tl.abs(x[:, :, None].to(tl.float32) * y[None, :, :].to(tl.float32)), 1)
    tl.store(out + m[:, None] * N + n[None, :], sums)


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "tools")
    return importlib.import_module("gpu_check")


def faults(check: Any, monkeypatch: pytest.MonkeyPatch, target: str, warps: int = 4, **sizes: Any) -> tuple[str, int]:
    """What the table says of a launch of the kernel above, and how many launches it counts as failed."""
    tensors = tuple(torch.empty(16, dtype=dtype, device="meta") for dtype in (torch.float16,) * 2 + (torch.float32,))
    constexprs = {"BY_DOT": True, "PRECISION": "ieee"} | sizes
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    launch = check.Launch(product, (1,), (*tensors, 100), constexprs, options)
    case = check.Case("op", "shape", torch.float16, lambda device: lambda: None)
    monkeypatch.setattr(check, "all_cases", lambda: iter([case]))
    monkeypatch.setattr(check, "record_launches", lambda *_: [launch])
    rows, failed = check.check([t for t in check._target.TARGETS if t.name == target], [])
    return rows[0][-1], failed


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_good_kernel(check: Any, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    assert faults(check, monkeypatch, target, M=64, N=64, K=32) == ("ok", 0)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_spills_in_a_loop(check: Any, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    what, failed = faults(check, monkeypatch, target, warps=1, M=128, N=256, K=32)
    assert "spills in a loop" in what
    assert failed == 1


@pytest.mark.parametrize(("target", "limit"), [("sm_80", 166912), ("sm_90", 232448), ("gfx942", 65536)])
def test_too_much_shared_memory(check: Any, monkeypatch: pytest.MonkeyPatch, target: str, limit: int) -> None:
    what, failed = faults(check, monkeypatch, target, warps=8, M=64, N=256, K=512)
    assert f"shared memory over {limit}" in what
    assert failed == 1


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_no_matrix_instruction(check: Any, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    what, failed = faults(check, monkeypatch, target, M=16, N=16, K=16, BY_DOT=False)
    assert what == "no matrix instruction"
    assert failed == 1


@pytest.mark.parametrize(("limit", "asserts"), [(0, False), (1000, True)])
def test_waiting_for_ever_ends_in_an_assert(
    check: Any, monkeypatch: pytest.MonkeyPatch, limit: int, asserts: bool
) -> None:
    """Where a limit is set, as for tests; else the kernel has no such code."""
    monkeypatch.setattr(check._launch, "spin_limit", limit)
    target = next(target for target in check._target.TARGETS if target.name == "sm_90")
    case = next(case for case in check.all_cases() if case.shape == "RNN_TANH model")
    launch = next(launch for launch in check.record_launches(case, target) if "wave" in launch.kernel.__name__)
    compiled = check.compile_launch(launch, target)
    assert ("waits for one that does not come" in compiled.asm["ttir"]) == asserts
    assert ("__assertfail" in compiled.asm["ptx"]) == asserts


def test_the_command_fails_with_a_launch_at_fault(check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    summary = tmp_path / "summary.md"
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--write", str(summary)])
    row = ("kernel", "case", "float16", "ieee", "4 warps", "sm_90", "40", "0", "0", "1024", "8")
    monkeypatch.setattr(check, "check", lambda *_: ([(*row, "ok"), (*row, "spills in a loop")], 1))
    assert check.main() == 1
    assert "2 launches compiled" in summary.read_text()
    assert summary.read_text().endswith("| kernel | sm_90 | 2 | 40 | 0 | 0 | 1024 | 8 | 1 |\n")
    monkeypatch.setattr(check, "check", lambda *_: ([(*row, "ok")], 0))
    assert check.main() == 0
    monkeypatch.setattr(check, "check", lambda *_: ([], 0))
    assert check.main() == 1  # nothing was compiled
