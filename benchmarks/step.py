"""A whole training step (forward, loss, backward, Adam): stock, compiled, fastnn's layers, fastnn.training_step, JAX.

``make bench-step``. The losses of ten steps are compared before anything is timed.
"""

import argparse
import copy
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnn
from benchmarks.cases import MODELS, Case
from benchmarks.timing import environment, interleave
from fastnn.testing import using_threads

CONTENDERS = ("stock", "stock, fused Adam", "compile", "fastnn layers", "training_step", "jax")
_LR = 1e-3
_RESULTS = Path(__file__).parent / "results"
Step = Callable[[], Any]  # returns the loss


def _ordinary(model: Callable[..., Tensor], parameters: Any, x: Tensor, y: Tensor, **options: Any) -> Step:
    optimizer = torch.optim.Adam(parameters, lr=_LR, **options)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return step


def _in_one_call(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    optimizer = torch.optim.Adam(model.parameters(), lr=_LR)
    step = fastnn.training_step(model, F.mse_loss, optimizer, strict=True)
    return lambda: step(x, y)


def _compiled(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Forward, loss and backward, and the optimizer, compiled."""
    optimizer = torch.optim.Adam(model.parameters(), lr=_LR, foreach=True)
    loss_of = torch.compile(lambda: F.mse_loss(model(x), y))
    update = torch.compile(optimizer.step)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        update()
        return loss

    return step


def _jax(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> Step | None:
    """The same by jax.jit and optax, from the same parameters; None where they are not installed."""
    if not (importlib.util.find_spec("jax") and importlib.util.find_spec("optax")):
        return None
    import jax
    import jax.numpy as jnp
    import optax

    parameters = {name: jnp.asarray(value.detach().numpy()) for name, value in model.named_parameters()}

    def linear(p: Any, name: str, x: Any) -> Any:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def conv(p: Any, name: str, x: Any, stride: int, padding: int) -> Any:
        x = jax.lax.conv_general_dilated(x, p[f"{name}.weight"], (stride, stride), [(padding, padding)] * 2)
        x = jax.nn.relu(x + p[f"{name}.bias"][:, None, None])
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")

    def network(p: Any, x: Any) -> Any:
        if case.name.startswith("Autoencoder"):
            x = linear(p, "encoder_2", jax.nn.relu(linear(p, "encoder_1", x)))
            return linear(p, "decoder_2", jax.nn.relu(linear(p, "decoder_1", x)))
        if case.name.startswith("Conv2DNet"):
            x = conv(p, "conv2", conv(p, "conv1", x, 2, 2), 2, 1)
            return linear(p, "output", x.reshape(x.shape[0], -1))
        x = x.transpose(1, 0, 2)
        for layer in range(2):
            w_ih, w_hh, b_ih, b_hh = (
                p[f"rnn.{kind}_l{layer}"] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )

            def cell(h: Any, gates: Any, w_hh: Any = w_hh) -> Any:
                h = jnp.tanh(gates + h @ w_hh.T)
                return h, h

            _, x = jax.lax.scan(cell, jnp.zeros((x.shape[1], w_hh.shape[0])), x @ w_ih.T + b_ih + b_hh)
        return linear(p, "fc", x[-1])

    optimizer = optax.adam(_LR)

    @jax.jit
    def update(p: Any, state: Any, x: Any, y: Any) -> Any:
        loss, gradients = jax.value_and_grad(lambda p: jnp.mean((network(p, x) - y) ** 2))(p)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(p, updates), state, loss

    now: list[Any] = [parameters, optimizer.init(parameters)]
    inputs = jnp.asarray(x.numpy()), jnp.asarray(y.numpy())

    def step() -> Any:
        *now[:], loss = update(*now, *inputs)
        return loss.block_until_ready()

    return step


def steps_of(case: Case, contenders: list[str]) -> dict[str, Step]:
    torch.manual_seed(0)
    stock, x = case.stock(), case.make_input(torch.Generator().manual_seed(0))
    y = torch.randn(stock(x).shape)
    models = {contender: copy.deepcopy(stock) for contender in CONTENDERS}
    fused = fastnn.fuse(models["fastnn layers"])
    makers: dict[str, Callable[[], Step | None]] = {
        "stock": lambda: _ordinary(models["stock"], models["stock"].parameters(), x, y),
        "stock, fused Adam": lambda: _ordinary(stock, stock.parameters(), x, y, fused=True),
        "compile": lambda: _compiled(models["compile"], x, y),
        "fastnn layers": lambda: _ordinary(fused, fused.parameters(), x, y, fused=True),
        "training_step": lambda: _in_one_call(models["training_step"], x, y),
        "jax": lambda: _jax(case, models["jax"], x, y),
    }
    steps = {}
    for contender in contenders:
        step = makers[contender]()
        if step is not None:
            steps[contender] = step
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Converting a tensor with requires_grad")
        losses = {contender: [float(step()) for _ in range(10)] for contender, step in steps.items()}
    expected = next(iter(losses.values()))
    for found in losses.values():
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-4)
    return steps


def as_line(row: dict[str, Any]) -> str:
    best = min(row[c] for c in CONTENDERS[:2] if c in row)
    cells = [f"{row[c] * 1e6:9.1f}" if c in row else "        -" for c in CONTENDERS]
    return f"| {row['model']:28} | {row['threads']} | {' | '.join(cells)} | {best / row['training_step']:5.1f}x |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="the models whose name contains this text")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time of a row (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=_RESULTS / "step.md", help="file for the table")
    arguments = parser.parse_args()
    lines = [
        ", ".join(str(value) for value in environment().values()),
        "",
        "Microseconds of a training step with Adam; the last column, stock's better one over training_step.",
        "",
        f"| model | threads | {' | '.join(CONTENDERS)} | ratio |",
        "|---" * (len(CONTENDERS) + 3) + "|",
    ]
    for case in MODELS:
        if arguments.only not in case.name:
            continue
        for threads in arguments.threads:
            with using_threads(threads), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about other people's software
                torch.compiler.reset()
                timings = interleave(steps_of(case, arguments.contenders), arguments.seconds)
            row = {"model": case.name, "threads": threads, **{c: t.median for c, t in timings.items()}}
            lines.append(as_line(row))
            print(lines[-1], flush=True)
    if not arguments.only:
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
