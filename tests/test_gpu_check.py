"""tools/gpu_check.py finds what it is there for: a kernel made to be at fault fails, the same made well does not."""

import ast
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


@triton.jit
def meeting(data, arrived, steps, programs, RELEASE: tl.constexpr, ACQUIRE: tl.constexpr, LOOKS: tl.constexpr):
    # type: ignore[no-untyped-def]
    place = data + tl.arange(0, 128)
    for step in range(steps):
        tl.store(place + 128 * tl.program_id(0), tl.load(place, cache_modifier=".cg") + 1)
        tl.debug_barrier()
        tl.atomic_add(arrived, 1, sem=RELEASE)
        if LOOKS:
            while tl.atomic_add(arrived, 0, sem=ACQUIRE) < (step + 1) * programs:
                pass
        tl.debug_barrier()


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "tools")
    return importlib.import_module("gpu_check")


def target_named(check: Any, name: str) -> Any:
    return next(target for target in check._target.TARGETS if target.name == name)


def product_launch(check: Any, warps: int = 4, grid: tuple[int, ...] = (1,), steps: int = 100, **sizes: Any) -> Any:
    tensors = tuple(torch.empty(16, dtype=dtype, device="meta") for dtype in (torch.float16,) * 2 + (torch.float32,))
    constexprs = {"BY_DOT": True, "PRECISION": "ieee"} | sizes
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    return check.Launch(product, grid, (*tensors, steps), constexprs, options)


def report_on(check: Any, monkeypatch: pytest.MonkeyPatch, target: str, launch: Any) -> Any:
    """On a case, of which the roofline knows nothing, that has this launch alone."""
    case = check.Case("op", "shape", torch.float16, lambda device: None)
    monkeypatch.setattr(check, "all_cases", lambda: iter([case]))
    monkeypatch.setattr(check, "forced_cases", lambda: iter([]))
    monkeypatch.setattr(check, "record_launches", lambda *_: [launch])
    return check.check([target_named(check, target)], [])


def faults(check: Any, monkeypatch: pytest.MonkeyPatch, target: str, **sizes: Any) -> tuple[str, int]:
    """What the table says of a launch of the first kernel above, and how many launches it counts as failed."""
    report = report_on(check, monkeypatch, target, product_launch(check, **sizes))
    return report.rows[0].problems, report.failed


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_good_kernel(check: Any, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    assert faults(check, monkeypatch, target, M=64, N=64, K=32) == ("", 0)


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


def test_floor_is_instructions_by_turns_by_programs(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def floor(**launch: Any) -> Any:
        sizes = {"M": 64, "N": 64, "K": 32} | launch
        return report_on(check, monkeypatch, "sm_90", product_launch(check, **sizes)).rows[0].floor

    one, longer = floor(), floor(steps=300)
    assert (one.turns, longer.turns) == (100, 300)
    assert longer.hot == one.hot > 20
    # 4 warps: one a scheduler.
    assert longer.seconds - one.seconds == pytest.approx(200 * one.hot / 1.755e9)
    assert 100 * one.hot / 1.755e9 < one.seconds < 100 * one.hot / 1.755e9 + 1e-6
    # One program a processor, or three of them on the one with the most to do.
    assert floor(grid=(11, 12)).seconds == one.seconds
    assert floor(grid=(2 * 132 + 1,)).seconds == pytest.approx(3 * one.seconds)
    assert one.barriers > 0
    assert one.waits == 0
    assert set(one.loads) <= {64, 128}
    assert floor(M=16, N=16, K=16, BY_DOT=False).loads.keys() <= {16, 32, 64, 128}
    assert f"{one.hot} instructions x 100" in str(one)


def test_every_loop_of_every_kernel_has_its_turns(check: Any) -> None:
    """A new loop whose range the launch does not tell belongs into gpu_floor.LOCALS."""
    seen = set()
    for case in check.all_cases():
        for launch in check.record_launches(case, target_named(check, "sm_90")):
            values = check.gpu_floor.values_of(launch.kernel, launch.grid, launch.arguments, launch.constexprs)
            for function, loop in check.gpu_floor.loops_of(launch.kernel):
                assert check.gpu_floor.trips(loop, function, values) >= (0 if "LAYERS" in ast.unparse(loop) else 1)
                seen.add((launch.kernel.__name__, function.__name__, ast.unparse(loop).split(":")[0]))
    kernels = {kernel for kernel, _, _ in seen}
    assert {"conv_forward", "backward", "wave_forward", "spread_backward", "resident_chain_forward"} <= kernels
    assert ("wave_forward", "wait_until", "while tl.atomic_add(count_ptr, 0, sem='acquire') < count") in seen


def test_a_loop_whose_turns_nobody_knows_is_a_fault(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = product_launch(check, M=64, N=64, K=32)
    renamed = launch._replace(arguments=launch.arguments[:3])
    monkeypatch.setattr(check, "build", lambda *_, build=check.build: build(launch, target_named(check, "sm_90")))
    report = report_on(check, monkeypatch, "sm_90", renamed)
    assert "how often `for .. in range(steps)` of product turns" in report.rows[0].problems
    assert report.failed == 1


def test_turns(check: Any) -> None:
    """Of a convolution with a window of 4 places and 9 taps of 64 channels; of a wavefront of 20 steps."""
    target = target_named(check, "sm_90")

    def turns(shape: str, kernel: str) -> dict[str, int]:
        case = next(c for c in check.all_cases() if c.shape == shape and c.dtype.itemsize == 2)
        launch = next(la for la in check.record_launches(case, target) if la.kernel.__name__ == kernel)
        values = check.gpu_floor.values_of(launch.kernel, launch.grid, launch.arguments, launch.constexprs)
        return {
            f"{function.__name__} {ast.unparse(getattr(loop, 'target', loop)).split()[0]}":
                check.gpu_floor.trips(loop, function, values)
            for function, loop in check.gpu_floor.loops_of(launch.kernel)
        }  # fmt: skip

    convolution = turns("64 channels, channels last", "conv_forward")
    assert convolution["conv_forward step"] == 9
    assert convolution["conv_forward first_place"] in (1, 2, 4)
    wave = turns("RNN_TANH model", "wave_forward")
    assert {name: wave[name] for name in ("wave_forward first", "forward_steps step", "_fill_gates step")} == {
        "wave_forward first": 3, "forward_steps step": 8, "_fill_gates step": 1
    }  # fmt: skip


def test_a_floor_above_the_prediction_is_a_fault(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Predicted:
        def __init__(self, seconds: float) -> None:
            self.seconds = lambda: (1.0, 1.0, seconds)
            self.row = lambda: ("op", "shape", "float16")

    monkeypatch.setattr(check.gpu_roofline, "predictions", lambda _: {"training": Predicted(1e-3)})
    launch = product_launch(check, M=64, N=64, K=32)
    report = report_on(check, monkeypatch, "sm_90", launch)
    assert [bound.is_exceeded for bound in report.bounds] == [False]
    assert report.failed == 0
    assert "within the predicted 1000.0 us" in str(report.bounds[0])
    monkeypatch.setattr(check.gpu_roofline, "predictions", lambda _: {"training": Predicted(1e-6)})
    report = report_on(check, monkeypatch, "sm_90", launch)
    assert [bound.is_exceeded for bound in report.bounds] == [True]
    assert report.failed == 1
    assert report_on(check, monkeypatch, "sm_80", launch).bounds == []  # of whose clock nothing is known


NVIDIA = pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_90", "sm_100"])


def meeting_launch(check: Any, *constexprs: Any, steps: int = 100) -> Any:
    tensors = (torch.empty(16, device="meta"), torch.empty(16, dtype=torch.int32, device="meta"))
    values = dict(zip(("RELEASE", "ACQUIRE", "LOOKS"), constexprs, strict=True))
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True, "launch_cooperative_grid": True}
    return check.Launch(meeting, (2,), (*tensors, steps, 2), values, options)


def meeting_faults(check: Any, target: str, *constexprs: Any) -> list[str]:
    launch = meeting_launch(check, *constexprs)
    return list(check.gpu_sass.faults_of_waiting(check.build(launch, target_named(check, target)).code))


@NVIDIA
def test_a_meeting_of_programs(check: Any, target: str) -> None:
    assert meeting_faults(check, target, "release", "acquire", True) == []
    assert meeting_faults(check, target, "relaxed", "acquire", True) == ["announces without a fence"]
    assert meeting_faults(check, target, "release", "relaxed", True) == ["waits without emptying the first-level cache"]
    assert meeting_faults(check, target, "release", "acquire", False) == ["no waiting loop"]


@NVIDIA
@pytest.mark.parametrize("kernel", ["spread_forward", "spread_backward", "wave_forward", "wave_backward"])
def test_kernels_that_wait(check: Any, kernel: str, target: str) -> None:
    """The smallest of each."""
    own = target_named(check, target)
    launches = (
        launch for case in check.forced_cases() if case.op == "rnn" and case.dtype is torch.float16
        for launch in check.record_launches(case, own) if launch.kernel.__name__ == kernel
    )  # fmt: skip
    built = check.build(next(launches), own)
    assert list(check.gpu_sass.faults_of_waiting(built.code)) == []


@pytest.mark.parametrize(("which", "products", "meetings"), [("all", 2, 2), ("sample", 1, 1), ("waiting", 1, 2)])
def test_which_launches(check: Any, monkeypatch: pytest.MonkeyPatch, which: str, products: int, meetings: int) -> None:
    """Of two that the compiler tells apart, a multiple of 16 being one of them, of each of two kernels."""
    launches = [product_launch(check, steps=steps, M=64, N=64, K=32) for steps in (100, 160)]
    launches += [meeting_launch(check, "release", "acquire", True, steps=steps) for steps in (100, 160)]
    monkeypatch.setattr(check, "all_cases", lambda: [check.Case("op", "shape", torch.float16, lambda device: None)])
    monkeypatch.setattr(check, "forced_cases", list)
    monkeypatch.setattr(check, "record_launches", lambda *_: launches)
    monkeypatch.setattr(check, "build", lambda *_: check.Built(40, 0, 0, 1024, 8))
    rows = check.check([target_named(check, "sm_90")], [], which).rows
    assert [row.kernel for row in rows] == ["product"] * products + ["meeting"] * meetings
    assert [row.waits for row in rows] == [False] * products + [True] * meetings


POLL = """
.L_x_1:
    /*0000*/ BAR.SYNC.DEFER_BLOCKING 0x0 ;
    /*0010*/ LDG.E.STRONG.GPU R16, desc[UR18][R16.64] ;
    /*0020*/ CCTL.IVALL ;
    /*0030*/ @!P2 BRA `(.L_x_1) ;
    /*0040*/ BAR.SYNC.DEFER_BLOCKING 0x0 ;
    /*0050*/ LDG.E R2, desc[UR18][R2.64] ;
    /*0060*/ STG.E desc[UR18][R2.64], R2 ;
    /*0070*/ BAR.SYNC.DEFER_BLOCKING 0x0 ;
    /*0080*/ MEMBAR.ALL.CTA ;
    /*0090*/ @P2 MEMBAR.ALL.GPU ;
    /*00a0*/ ERRBAR ;
    /*00b0*/ @P2 REDG.E.ADD.STRONG.GPU desc[UR18][R16.64], R19 ;
"""


@pytest.mark.parametrize(
    ("instruction", "fault"),
    [
        ("", []),
        ("LDG.E.STRONG.GPU", ["waits without an acquiring load"]),
        ("CCTL.IVALL", ["waits without emptying the first-level cache"]),
        ("0040", ["no barrier behind a waiting loop"]),
        ("0070", ["announces before all threads have come"]),
        ("MEMBAR.ALL.GPU", ["announces without a fence"]),
        ("REDG", ["announces nothing"]),
    ],
)
def test_each_part_of_a_meeting(check: Any, monkeypatch: pytest.MonkeyPatch, instruction: str, fault: list) -> None:
    """Without one instruction after the other."""
    kept = [line for line in POLL.splitlines() if not instruction or instruction not in line]
    loop = ast.parse("while True: pass").body[0]
    monkeypatch.setattr(check.gpu_sass, "source_loop", lambda lines: loop)
    assert list(check.gpu_sass.faults_of_waiting(check.gpu_sass.read_listing("\n".join(kept)))) == fault


def test_more_programs_than_run_at_once(check: Any) -> None:
    case = next(case for case in check.all_cases() if case.shape == "RNN_TANH model")
    target = target_named(check, "sm_90")
    launch = next(la for la in check.record_launches(case, target) if la.kernel.__name__ == "wave_forward")
    for grid, problems in (launch.grid, []), ((40000,), ["more programs than run at once"]):
        launch = launch._replace(grid=grid)
        built = check.build(launch, target)
        assert list(check.faults(built, check.floor_of(built, launch, target), launch, case, target)) == problems


def test_forced_cases_launch_what_tests_force(check: Any) -> None:
    target = target_named(check, "sm_90")
    forced = {
        (launch.kernel.__name__, case.op)
        for case in check.forced_cases() for launch in check.record_launches(case, target)
    }  # fmt: skip
    assert forced >= {("spread_forward", "rnn"), ("wave_backward", "rnn"), ("resident_chain_forward", "mlp"),
                      ("conv_forward", "conv_relu_max_pool"), ("pool_forward", "conv_relu_max_pool")}  # fmt: skip
    assert all(case.is_forced for case in check.forced_cases())
    assert not any(case.is_forced for case in check.all_cases())


def test_the_command_fails_with_a_launch_at_fault(check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    summary = tmp_path / "summary.md"
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--write", str(summary)])
    built, floor = check.Built(40, 0, 0, 1024, 8), check.gpu_floor.Floor(1e-6, 50, 10, 2, 3, 0, {16: 4, 64: 1})
    good = check.Row("kernel", "case", "float16", "ieee", "4 warps", "sm_90", built, floor, True, "")
    bad = good._replace(problems="spills in a loop")
    bound = check.Bound("case", "float16", "forward", 1e-6, 2e-6)
    monkeypatch.setattr(check, "check", lambda *_: check.Report([good, bad], [bound]))
    assert check.main() == 1
    assert "2 launches compiled" in summary.read_text()
    assert "2 of programs that wait for each other" in summary.read_text()
    assert "| kernel | sm_90 | 2 | 40 | 0 | 0 | 1024 | 8 | 3 | 16 | 1 |\n" in summary.read_text()
    assert summary.read_text().endswith("| case | float16 | forward | 1.0 | 2.0 |  |\n")
    monkeypatch.setattr(check, "check", lambda *_: check.Report([good], [bound._replace(floor=3e-6)]))
    assert check.main() == 1
    assert summary.read_text().endswith("| case | float16 | forward | 3.0 | 2.0 | at fault |\n")
    monkeypatch.setattr(check, "check", lambda *_: check.Report([good], [bound]))
    assert check.main() == 0
    monkeypatch.setattr(check, "check", lambda *_: check.Report([], []))
    assert check.main() == 1  # nothing was compiled
