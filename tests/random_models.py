"""Random models of layers that networks have, and between them of functions that no network has: "borders"."""

import argparse
import functools
import linecache
import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fastnn
from fastnn.graph import stretches

WIDTH, STEPS, BATCH = 6, 4, 3


class _Writer:
    """Writes a random forward. Its values are rows (BATCH, WIDTH), sequences (BATCH, STEPS, WIDTH) and states
    (1, BATCH, WIDTH)."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lines = ["x = x"]
        self.layers: dict[str, nn.Module] = {}
        self.values: dict[str, list[str]] = {"row": [], "sequence": ["x"], "state": []}
        self.pairs: list[str] = []  # of states

    def layer(self, layer: nn.Module) -> str:
        self.layers[f"l{len(self.layers)}"] = layer
        return f"self.l{len(self.layers) - 1}"

    def new(self, kind: str) -> str:
        self.values[kind].append(f"{kind}{len(self.lines)}_{len(self.values[kind])}")
        return self.values[kind][-1]

    def pick(self, kind: str) -> str:
        some = self.values[kind]
        return self.random.choice(some[-4:]) if some else {"row": "x[:, 0]", "state": "x[None, :, 1]"}[kind]

    def write(self) -> None:
        kind = self.random.choice(("row", "sequence", "sequence", "state"))
        x, y = self.pick(kind), self.pick(kind)
        way = self.random.choice(("layer", "unary", "unary", "binary", "recurrent", "recurrent", "parts", "change"))
        getattr(self, f"_{way}")(kind, x, y)

    def _layer(self, kind: str, x: str, y: str) -> None:
        layer = self.random.choice((nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)))
        self.lines.append(f"{self.new(kind)} = {self.layer(layer)}({x})")

    def _unary(self, kind: str, x: str, y: str) -> None:
        borders = ("{}.cummax(-1)[0]", "{}.sort(-1)[0]", "{}.flip(-1)", "{0}.sort(-1)[0] + {0}")
        masks = ("torch.where({0} > 0, {0}, 0.5 * {0})", "{0}.masked_fill({1} > 0.3, 0.5)", "{0} * ~({1} < 0)")
        form = self.random.choice(("torch.relu({})", "{}.tanh()", "0.5 * {}", *masks, *borders))
        given = {"row": "x[:, 0]", "sequence": "x", "state": "x[None, :, 1]"}[kind]
        self.lines.append(f"{self.new(kind)} = {form.format(x, given)}")

    def _binary(self, kind: str, x: str, y: str) -> None:
        forms = ("{} + {}", "{} * torch.sigmoid({})", "torch.maximum({}, {})", "{} - {}.cummax(-1)[0]")
        form = self.random.choice(forms)
        self.lines.append(f"{self.new(kind)} = {form.format(x, y)}")

    def _recurrent(self, kind: str, x: str, y: str) -> None:
        if kind == "row":
            cell, h, c = self.layer(nn.LSTMCell(WIDTH, WIDTH)), self.pick("row"), self.pick("row")
            self.lines.append(f"{self.new('row')}, {self.new('row')} = {cell}({x}, ({h}, {c}))")
            return
        is_lstm, has_state = self.random.random() < 0.6, self.random.random() < 0.6
        rnn = self.layer((nn.LSTM if is_lstm else nn.GRU)(WIDTH, WIDTH, batch_first=True))
        given = [self.pick("sequence") + self.random.choice(("", ".flip(1)", ".cummax(1)[0]"))]
        if has_state:
            given.append(self._pair() if is_lstm else self.pick("state"))
        output = self.new("sequence") if self.random.random() < 0.6 else "_"
        if not is_lstm:
            state = self.new("state")
        elif self.random.random() < 0.5:
            state = f"({self.new('state')}, {self.new('state')})"
        else:
            state = f"pair{len(self.lines)}"
            self.pairs.append(state)
        self.lines.append(f"{output}, {state} = {rnn}({', '.join(given)})")

    def _pair(self) -> str:
        if self.pairs and self.random.random() < 0.7:
            return self.random.choice(self.pairs[-2:])
        return f"({self.pick('state')}, {self.pick('state')})"

    def _parts(self, kind: str, x: str, y: str) -> None:
        way = self.random.choice((".chunk(2, -1)", f".split([{WIDTH}, {WIDTH}], -1)", "unbind"))
        if way == "unbind":
            names = [self.new("row") for _ in range(STEPS)]
            self.lines.append(f"{', '.join(names)} = {self.pick('sequence')}.unbind(1)")
            return
        both = f"torch.cat([{x}, {y}], -1){way}"
        if self.random.random() < 0.5:
            self.lines.append(f"{self.new(kind)}, {self.new(kind)} = {both}")
        else:
            self.lines.append(f"{self.new(kind)} = {both}[{self.random.randrange(2)}]")

    def _change(self, kind: str, x: str, y: str) -> None:
        """Rows become a sequence, and a sequence or a state becomes rows."""
        rows = ", ".join(self.pick("row") for _ in range(STEPS))
        sequence, state = self.pick("sequence"), self.pick("state")
        changes = {
            "sequence": (f"torch.stack([{rows}], 1)",),
            "row": (f"{sequence}.mean(1)", f"{sequence}[:, -1]", f"{state}[0]"),
            "state": (f"{self.pick('row')}.unsqueeze(0)",),
        }[kind]
        self.lines.append(f"{self.new(kind)} = {self.random.choice(changes)}")


def source_and_layers(seed: int) -> tuple[str, dict[str, nn.Module]]:
    torch.manual_seed(seed)
    writer = _Writer(seed)
    for _ in range(writer.random.randint(4, 14)):
        writer.write()
    results = [name for some in writer.values.values() for name in some[-writer.random.randint(1, 3) :]]
    result = results[0] if len(results) == 1 else f"({', '.join(results)})"
    body = "\n        ".join([*writer.lines, f"return {result}"])
    return f"class Model(nn.Module):\n    def forward(self, x):\n        {body}\n", writer.layers


def make(seed: int) -> nn.Module:
    source, layers = source_and_layers(seed)
    file = f"<model of seed {seed}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope: dict[str, Any] = {"nn": nn, "torch": torch, "__name__": __name__}
    exec(compile(source, file, "exec"), scope)
    model: nn.Module = scope["Model"]()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model.double()


def _results(model: nn.Module, x: Tensor) -> tuple[Any, Any]:
    own = x.clone().requires_grad_()
    outputs = torch.utils._pytree.tree_leaves(model(own))
    leaves = [own, *model.parameters()]
    return outputs, torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves, allow_unused=True)


def check(seed: int) -> int:
    """Compares a random model with the same one fused: in inference, and with its gradients. Returns the number of
    networks that the fused one has become."""
    stock, fused = make(seed), fastnn.fuse(make(seed))
    x = torch.randn(BATCH, STEPS, WIDTH, dtype=torch.float64)
    for _ in range(2):
        with torch.no_grad():
            assert_close(fused(x), stock(x), rtol=1e-9, atol=1e-9)
        assert_close(_results(fused, x), _results(stock, x), rtol=1e-8, atol=1e-8)
    traces: dict[bool, Any] = getattr(fused.forward, "traces", {})  # a model without layers stays as it is
    stretched = [one for some in traces.values() for trace in some for one in trace.known_stretches.values()]
    return sum(len(one.networks) for one in stretched if one is not None)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/random_models.py", description=__doc__)
    parser.add_argument("--seeds", type=int, default=300, help="how many models are tried (default: 300)")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    given = parser.parse_args()
    stretches._LEAST_COST = 1
    seeds = range(given.first, given.first + given.seeds)
    try_all((f"seed {seed}", functools.partial(check, seed)) for seed in seeds)


def try_all(cases: Iterable[tuple[str, Callable[[], int]]]) -> None:
    """Runs cases, each a name and a function that returns how many networks it has compared, tells which have failed,
    and ends the program."""
    tried = networks = failures = 0
    for name, case in cases:
        tried += 1
        try:
            networks += case()
        except Exception as error:
            failures += 1
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    print(f"{tried} cases, {networks} networks, {failures} failures")
    raise SystemExit(failures > 0)


if __name__ == "__main__":
    main()
