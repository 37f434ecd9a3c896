"""``python -m fastnn`` prints what this installation is made of and runs on; ``bench`` measures a model of yours, and
``explain`` says what becomes of its layers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torch import Tensor, nn

from fastnn import bench
from fastnn.explanation import explain
from fastnn.info import backend_info
from fastnn.loading import load_model, random_inputs


def _threads(text: str) -> list[int]:
    counts = [int(count) for count in text.split(",")]
    if any(count < 1 for count in counts):
        raise ValueError(text)
    return counts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastnn", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument(
        "model", help="package.module:factory or file.py:factory, a torch.nn.Module or a function that makes one"
    )
    model.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="SIZES",
        help="32,3,32,32 or 8,20:int64:100 (integers below 100); an --input for each input",
    )
    measured = commands.add_parser("bench", parents=[model], help="measure it under stock, torch.compile and fastnn")
    measured.add_argument("--train", action="store_true", help="whole training steps, in place of inference")
    measured.add_argument("--threads", type=_threads, default=[1], metavar="1,2", help="numbers of threads (1)")
    measured.add_argument("--seconds", type=float, default=1.0, help="of timing for each contender (1)")
    measured.add_argument("--no-memory", action="store_true", help="leave peak memory out, which takes a process each")
    measured.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes a compiler")
    measured.add_argument("--json", metavar="FILE", help="write the figures there")
    measured.add_argument("--plot", metavar="FILE", help="draw them there (needs matplotlib)")
    measured.add_argument("--peak-of", help=argparse.SUPPRESS)
    explained = commands.add_parser("explain", parents=[model], help="what becomes of every layer, and why")
    explained.add_argument("--train", action="store_true", help="of the model in training, in place of inference")
    return parser


def _explain(model: nn.Module, inputs: Sequence[Tensor]) -> str:
    try:
        return str(explain(model, *inputs))
    except (RuntimeError, TypeError, IndexError) as error:  # the model does not take these inputs
        words = str(error).partition("\n")[0]
        raise ValueError(
            f"{type(model).__name__} does not take these inputs: {words} (Each input has an --input of its own, and "
            f"integers are written as 8,20:int64:100.)"
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        if given.command == "bench":
            bench.run(given)
        elif given.command == "explain":
            print(_explain(load_model(given.model).train(given.train), random_inputs(given.input)))
        else:
            print(backend_info())
    except ValueError as error:
        parser.exit(2, f"fastnn: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
