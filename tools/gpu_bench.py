"""Measures stock PyTorch, torch.compile and fastnn on a GPU, one JSON line a measurement as soon as it is made, so that
nothing measured is lost. tools/gpu_run.py starts it once an operator; without a GPU it runs on the CPU, as a rehearsal.

    python tools/gpu_bench.py OP RESULTS.jsonl --seconds 100 [--rehearse]
"""

import argparse
import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import gpu_stand_in
import torch
from gpu_check import floor_of_call

from benchmarks.cases import (
    Case,
    autoencoder_case,
    conv2dnet_case,
    conv_case,
    first_tensor,
    mlp_case,
    rnn_case,
    rnn_model_case,
)

Runner = Callable[[], Any]
FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
# Of the largest element, in 16 bits or tf32; tests are stricter. Rounding may move a maximum, and its gradient with it.
LARGEST_ERROR = {"forward": 0.05, "training": 0.5}
_LENGTHS = (*(5 + 37 * i % 196 for i in range(63)), 200)

# The first of each list is the rehearsal's.
CASES: dict[str, list[Case]] = {
    "models": [conv2dnet_case(32), rnn_model_case((8, 20, 10), 32, 2, 5), autoencoder_case(32, 10, 8, 5)],
    "conv_relu_max_pool": [
        conv_case((64, 1, 28, 28), 32, 3, 2, padding=1),
        conv_case((64, 3, 224, 224), 64, 3, 2, padding=1),
        conv_case((64, 3, 224, 224), 64, 7, 3, stride=2, padding=3, pool_stride=2, pool_padding=1),
        conv_case((64, 32, 112, 112), 32, 3, 2, padding=1),
        conv_case((64, 64, 112, 112), 64, 3, 2, padding=1),
        conv_case((32, 256, 28, 28), 512, 3, 2, padding=1),
    ],
    "rnn": [
        rnn_case("RNN", (1, 128, 64), 128),
        rnn_case("RNN", (32, 128, 64), 128),
        rnn_case("RNN", (32, 512, 64), 256),
        rnn_case("GRU", (32, 128, 64), 128),
        rnn_case("LSTM", (32, 128, 64), 128),
        rnn_case("RNN", (64, 200, 64), 128, lengths=_LENGTHS),
        rnn_case("LSTM", (64, 200, 64), 128, lengths=_LENGTHS),
        rnn_case("GRU", (32, 128, 512), 512),
        rnn_case("LSTM", (64, 200, 512), 512, lengths=_LENGTHS),
    ],
    "mlp": [
        autoencoder_case(256, 784, 128, 32),
        mlp_case(65536, [64] * 7),
        mlp_case(65536, [128] * 5),
        mlp_case(65536, [256] * 5),
        mlp_case(65536, [256, 1024, 256]),
    ],
}
DTYPES = {"models": [FLOAT], "conv_relu_max_pool": [BFLOAT, FLOAT], "rnn": [HALF, FLOAT], "mlp": [HALF, FLOAT]}


@dataclass
class Problem:
    """A case in a dtype and a direction: equal networks, an input and a gradient."""

    case: Case
    dtype: torch.dtype
    direction: str  # "forward" or "training"
    device: torch.device

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.stock, self.fused = (build().to(self.device, self.dtype) for build in (self.case.stock, self.case.fused))
        with torch.no_grad():
            for ours, theirs in zip(self.fused.parameters(), self.stock.parameters(), strict=True):
                ours.copy_(theirs)
            self.input = self.case.make_input(torch.Generator().manual_seed(0)).to(self.device, self.dtype)
            output = first_tensor(self.stock(self.input))
        self.grad_output = torch.randn(output.shape).to(output)

    def runner(self, network: torch.nn.Module, input: Any) -> Runner:
        if self.direction == "forward":
            return lambda: first_tensor(network(input))
        leaves = list(network.parameters())
        return lambda: torch.autograd.grad(first_tensor(network(input)), leaves, self.grad_output)


def eager(problem: Problem) -> Runner:
    return problem.runner(problem.stock, problem.input)


def channels_last(problem: Problem) -> Runner | None:
    if not isinstance(problem.input, torch.Tensor) or problem.input.dim() != 4:
        return None
    network = problem.case.stock().to(problem.device, problem.dtype, memory_format=torch.channels_last)
    network.load_state_dict(problem.stock.state_dict())
    return problem.runner(network, problem.input.contiguous(memory_format=torch.channels_last))


def fastnn(problem: Problem) -> Runner:
    return problem.runner(problem.fused, problem.input)


def fastnn_channels_last(problem: Problem) -> Runner | None:
    if not isinstance(problem.input, torch.Tensor) or problem.input.dim() != 4:
        return None
    return problem.runner(problem.fused, problem.input.contiguous(memory_format=torch.channels_last))


def compiled(problem: Problem) -> Runner:
    torch.compiler.reset()
    if problem.device.type == "cpu":
        return problem.runner(torch.compile(problem.stock, backend="eager"), problem.input)
    network = torch.compile(problem.stock, mode="max-autotune-no-cudagraphs")
    return problem.runner(network, problem.input)


# The slow one, which spends its time compiling, after all cases of the others.
ROUNDS = [
    {"eager": eager, "channels_last": channels_last, "fastnn": fastnn, "fastnn channels_last": fastnn_channels_last},
    {"compile max-autotune": compiled},
]


def in_graph(run: Runner) -> Runner:
    """The same as a CUDA graph: without the time that launching takes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def seconds_a_call(run: Runner, rehearse: bool) -> list[float]:
    """Quartiles of batches of calls, one synchronisation a batch."""
    run()
    calls, batches = (1, 3) if rehearse else (5, 15)
    times: list[float] = []
    while len(times) < batches:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        elapsed = begin.elapsed_time(end) / 1e3
        if elapsed < 2e-3 and not rehearse and not times:
            calls *= 2
            continue
        times.append(elapsed / calls)
    times.sort()
    return [times[len(times) // 4], times[len(times) // 2], times[3 * len(times) // 4]]


def peak_memory(run: Runner) -> int:
    """Bytes that a call takes beyond what is there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def issue_floor(run: Runner) -> float | None:
    """Seconds that issuing the instructions of fastnn's kernels takes at the least, to be read beside the time."""
    try:
        return floor_of_call(run, torch.device("cuda", torch.cuda.current_device()))
    except Exception:  # it must not cost the measurement
        traceback.print_exc()
        return None


def measure(
    problem: Problem, name: str, provider: Callable[[Problem], Runner | None], rehearse: bool
) -> Iterator[dict]:
    row = {
        "case": problem.case.name, "dtype": str(problem.dtype).removeprefix("torch."), "direction": problem.direction,
        "provider": name,
    }  # fmt: skip
    context = torch.inference_mode() if problem.direction == "forward" else torch.enable_grad()
    with context:
        run = provider(problem)
        if run is None:
            return
        result, expected = first_tensor(run()), first_tensor(eager(problem)())
        error = float((result - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
        if not error < LARGEST_ERROR[problem.direction]:
            raise AssertionError(f"the result is {error:.2g} off stock's: nothing to be measured")
        row |= {"error": error, "memory": peak_memory(run)}
        if name.startswith("fastnn") and problem.device.type == "cuda":
            row["floor"] = issue_floor(run)
        yield row | {"graph": False, "seconds": seconds_a_call(run, rehearse)}
        if isinstance(problem.input, torch.Tensor):
            yield row | {"graph": True, "seconds": seconds_a_call(in_graph(run), rehearse)}


def jobs(op: str, device: torch.device, rehearse: bool) -> Iterator[tuple[Problem, str, Any]]:
    cases = CASES[op][:1] if rehearse else CASES[op]
    for providers in ROUNDS:
        for case in cases:
            for dtype in [FLOAT] if rehearse else DTYPES[op]:
                for direction in ("forward", "training"):
                    if "compile max-autotune" in providers and op == "rnn":
                        continue  # it breaks the graph at stock's recurrent layers, by design
                    problem = Problem(case, dtype, direction, device)
                    for name, provider in providers.items():
                        yield problem, name, provider


def compile_kernels(op: str, device: torch.device, rehearse: bool) -> None:
    """Run each of fastnn's calls once, so that Triton's cache on disk has its kernels."""
    for problem, name, provider in jobs(op, device, rehearse):
        if "fastnn" in name:
            # What fails here fails again when it is to be measured.
            with torch.inference_mode(problem.direction == "forward"), contextlib.suppress(Exception):
                run = provider(problem)
                if run is not None:
                    run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=CASES)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seconds", type=float, default=100, help="start no measurement after so long")
    parser.add_argument("--rehearse", action="store_true", help="one small case, on the CPU where there is no GPU")
    parser.add_argument("--compile", action="store_true", help="no measurement: only compile what fastnn takes")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        gpu_stand_in.install()
    if options.compile:
        compile_kernels(options.op, device, options.rehearse)
        return 0
    deadline = time.monotonic() + options.seconds
    skipped = 0
    with options.results.open("a") as results:
        for problem, name, provider in jobs(options.op, device, options.rehearse):
            if time.monotonic() > deadline:
                skipped += 1
                continue
            try:
                rows = list(measure(problem, name, provider, options.rehearse))
            except Exception as error:  # one failure must not cost the other measurements
                traceback.print_exc()
                rows = [{"case": problem.case.name, "dtype": str(problem.dtype).removeprefix("torch."),
                         "direction": problem.direction, "provider": name, "failed": repr(error)[:500]}]  # fmt: skip
            for row in rows:
                results.write(json.dumps({"op": options.op} | row) + "\n")
                results.flush()
    print(f"{options.op}: done, {skipped} measurements left out for want of time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
