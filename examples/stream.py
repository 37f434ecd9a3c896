"""Answers one sample at a time, as a sensor gives them: a recurrent network whose state goes in and out of each call.

python examples/stream.py [--cell GRU] [--hidden 32] [--short] [--threads 1] [--output stream.png]
"""

import argparse
import io
import time
import warnings
from collections.abc import Callable

import torch
from common import GREY, OURS, STOCK, arguments, figure, save
from torch import Tensor, nn
from tqdm import tqdm

import fastnn

FEATURES, WARM_UP = 6, 200  # features of a sample, and samples before times count
RIVAL = "#4f83cc"


class Stream(nn.Module):
    """One step of a recurrent layer and a head: sample (1, 1, FEATURES), state (1, 1, hidden) -> the answer (1, 1) and
    the next state. An LSTM's state is a pair of such tensors."""

    def __init__(self, cell: str, hidden: int) -> None:
        super().__init__()
        self.layer = getattr(nn, cell)(FEATURES, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, sample: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        is_pair = len(state) > 1
        output, after = self.layer(sample, state if is_pair else state[0])
        return self.head(output[:, -1]), *(after if is_pair else (after,))


def onnx_runtime(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., list[Tensor]] | None:
    """The model in ONNX Runtime, where that is installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    program = io.BytesIO()
    with warnings.catch_warnings():  # about how torch exports
        warnings.simplefilter("ignore")
        torch.onnx.export(model, inputs, program, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(program.getvalue(), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def run(*given: Tensor) -> list[Tensor]:
        results = session.run(None, dict(zip(names, (one.numpy() for one in given), strict=True)))
        return [torch.from_numpy(result) for result in results]

    return run


def answer(model: Callable[..., list[Tensor]], samples: Tensor, state: tuple[Tensor, ...], name: str) -> Tensor:
    """Runs over all samples -> the microseconds of each call (samples,), behind the answers (samples,)."""
    answers, times = torch.empty(len(samples)), torch.empty(len(samples))
    for i, sample in enumerate(tqdm(samples.split(1), desc=name, unit="sample", mininterval=0.5)):
        begin = time.perf_counter_ns()
        result, *state = model(sample.unsqueeze(0), *state)
        times[i] = (time.perf_counter_ns() - begin) / 1e3
        answers[i] = float(result)
    return torch.stack([answers, times])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cell", choices=("RNN", "GRU", "LSTM"), default="GRU")
    parser.add_argument("--hidden", type=int, default=32)
    given = arguments(parser, "stream.png")
    model = Stream(given.cell, given.hidden).eval()
    samples = torch.randn(2_000 if given.short else 20_000, FEATURES)
    state = tuple(torch.zeros(1, 1, given.hidden) for _ in range(2 if given.cell == "LSTM" else 1))
    inputs = (samples[:1].unsqueeze(0), *state)
    ways = {"stock": model, "fastnn": fastnn.freeze(model, inputs), "ONNX Runtime": onnx_runtime(model, inputs)}
    with torch.inference_mode():
        found = {name: answer(way, samples, state, name) for name, way in ways.items() if way is not None}
    for name, one in found.items():
        torch.testing.assert_close(one[0], found["stock"][0], rtol=1e-3, atol=1e-4)
        median, late = one[1, WARM_UP:].quantile(torch.tensor([0.5, 0.999]))
        print(f"{name:13} {median:6.1f} us a sample, 99.9 of 100 in {late:.1f} us")

    drawing, (axes,) = figure(1)
    for (name, one), color in zip(found.items(), (STOCK, OURS, RIVAL), strict=False):
        times = one[1, WARM_UP:]
        axes.hist(times.log10().numpy(), 120, range=(0, 3), histtype="step", color=color, label=name, linewidth=1.4)
    axes.set(
        xlabel="microseconds a sample", ylabel="samples", yscale="log", title=f"{given.cell}, one sample at a time"
    )
    axes.set_xticks([0, 1, 2, 3], ["1", "10", "100", "1000"])
    axes.legend(frameon=False, labelcolor=GREY)
    save(drawing, given.output)


if __name__ == "__main__":
    main()
