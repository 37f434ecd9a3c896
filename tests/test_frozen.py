"""fastnn.freeze: the frozen model computes what the model does, for any batch, from any thread, after any journey."""

import contextlib
import copy
import io
import math
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fusing import Scaled, run_and_list
from test_training_networks import MODELS
from torch import Tensor
from torch.testing import assert_close

import fastnn
from fastnn import models, nn
from fastnn.testing import using_threads


class CumulativeProduct(nn.Module):
    """What no network has a layer for: a border between two networks."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumprod(-1)


class LastStep(nn.Module):
    """The last step of a recurrent layer's output."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output = self.layer(x)[0]
        return output[:, -1] if self.layer.batch_first else output[-1]


class FirstResult(LastStep):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Reshaped(nn.Module):
    """Reshapes around its layers, none of which mixes one sample with another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.first(x.reshape(-1, 4)).relu_()
        return self.second(rows.unsqueeze(1).view(-1, 18)).unsqueeze(1)[:].squeeze(1)


def sequential() -> nn.Module:
    layers = [nn.Linear(7, 9), nn.Tanh(), nn.Dropout(), nn.LinearReLU(9, 33, bias=False), nn.Identity()]
    return nn.Sequential(*layers, nn.MLP([33, 17, 5], "gelu"), nn.Sigmoid())


# name: the model, and an input's sizes
CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "cnn": (lambda: models.Conv2DNet(10), (32, 3, 20, 20)),
    "rnn": (lambda: models.RNN(10, 32, 2, 5), (8, 20, 10)),
    "gru": (lambda: models.RNN(5, 17, 1, 3, "GRU"), (3, 7, 5)),
    "lstm": (lambda: models.RNN(6, 9, 2, 4, "LSTM"), (5, 4, 6)),
    "autoencoder": (lambda: models.Autoencoder(10, 8, 5), (32, 10)),
    "wide autoencoder": (lambda: models.Autoencoder(784, 128, 32), (3, 784)),
    "chain": (sequential, (11, 7)),
    "chain over steps": (sequential, (3, 4, 7)),
    "reshaped": (Reshaped, (4, 3, 4)),
    "in place": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)), (4, 4)),
    "1d": (lambda: nn.Sequential(nn.ConvReLUMaxPool1d(2, 9, 3, padding=1), nn.ConvReLUMaxPool1d(9, 4, 3)), (3, 2, 33)),
    "3d": (
        lambda: nn.Sequential(
            nn.ConvReLUMaxPool3d(2, 8, 3, padding=1, pool_kernel_size=3, pool_stride=2, ceil_mode=True),
            nn.Flatten(),
            nn.Linear(8 * 4 * 4 * 4, 3),
        ),
        (2, 2, 8, 8, 8),
    ),
    "deep conv": (lambda: nn.ConvReLUMaxPool2d(64, 32, 3, padding=1, groups=2, bias=False), (2, 64, 12, 12)),
    "both directions": (lambda: FirstResult(nn.GRU(4, 6, 2, bidirectional=True, batch_first=True)), (3, 5, 4)),
    "projected": (lambda: FirstResult(nn.LSTM(4, 6, 2, batch_first=True, proj_size=3)), (2, 5, 4)),
    "steps first": (lambda: LastStep(nn.LSTM(4, 6, 2, bias=False)), (5, 3, 4)),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, sizes = CASES[name]
    return model().to(dtype).eval(), torch.randn(sizes, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_computes_what_the_model_does(name: str, dtype: torch.dtype) -> None:
    model, example = make(name, dtype)
    frozen = fastnn.freeze(model, example)
    with torch.no_grad():
        for batch in (1, 2, 9, 70, 0):
            sizes = list(example.shape)
            sizes[1 if name == "steps first" else 0] = batch
            input = torch.randn(sizes, dtype=dtype)
            assert_close(frozen(input), model(input))
        expected = model(example)
        assert_close(frozen(example.transpose(0, 1).contiguous().transpose(0, 1)), expected)
        with using_threads(2):
            assert torch.equal(frozen(example), frozen(example))
            assert_close(frozen(example), expected)


def test_example_of_one() -> None:
    model, example = make("cnn")
    with torch.no_grad():
        assert_close(fastnn.freeze(model, example[:1])(example), model(example))


def test_other_lengths_and_sizes() -> None:
    model, example = make("rnn")
    frozen = fastnn.freeze(model, example)
    longer = torch.randn(3, 50, 10)
    conv, image = make("1d")
    frozen_conv = fastnn.freeze(conv, image)
    with torch.no_grad():
        assert_close(frozen(longer), model(longer))
        assert_close(frozen_conv(image[..., :20]), conv(image[..., :20]))


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # torch 2.10's, of its own code
def test_is_one_call_and_immutable() -> None:
    model, example = make("cnn")
    model.train()
    frozen = fastnn.freeze(model, example)
    assert model.training
    with torch.no_grad():
        before = frozen(example)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(frozen(example), before)
    assert not list(frozen.parameters())
    with torch.inference_mode():
        assert run_and_list(lambda: frozen(example))[1] == ["fastnn::network_of_one"]
    with pytest.raises(RuntimeError, match="no hooks"):
        frozen.register_forward_hook(print)
    leaf = example.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient of its own"):
        frozen(leaf).sum().backward()


@pytest.mark.filterwarnings("ignore:.*buffer is not writable")  # torch 2.10's, of its own code
@pytest.mark.parametrize("name", ["cnn", "rnn", "autoencoder"])
def test_saved_loaded_copied_exported(name: str, tmp_path: Path) -> None:
    model, example = make(name)
    frozen = fastnn.freeze(model, example)
    expected = frozen(example)
    buffer = io.BytesIO()
    torch.save(frozen, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True)(example), expected)
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(example), expected)
    assert torch.equal(copy.deepcopy(frozen)(example), expected)
    exported = torch.export.export(frozen, (example,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(exported, tmp_path / "frozen.pt2")
    loaded = torch.export.load(tmp_path / "frozen.pt2").module()
    assert torch.equal(loaded(example), expected)
    assert_close(loaded(example[:3]), expected[:3])
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(example), expected)

    other = fastnn.freeze(CASES[name][0](), example)
    other.load_state_dict(frozen.state_dict())
    assert torch.equal(other(example), expected)
    assert_close(frozen.double()(example.double()).float(), expected)


def test_freeze_before_anything_is_compiled() -> None:
    """torch.compile lists Python's builtins when it is first used, which freeze must not disturb."""
    code = """
import torch, fastnn
x = torch.randn(2, 4)
frozen = fastnn.freeze(torch.nn.Linear(4, 3).eval(), x)
compiled = torch.compile(lambda x: frozen(x) * len((x, x)), backend="eager", fullgraph=True)
torch.testing.assert_close(compiled(x), frozen(x) * 2)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=300)


def test_saved_by_another_version() -> None:
    frozen = fastnn.freeze(*make("autoencoder"))
    graph = fastnn.freeze(nn.Sequential(nn.Linear(3, 4), CumulativeProduct(), nn.Linear(4, 2)), torch.randn(2, 3))
    assert isinstance(graph, fastnn.FrozenGraph)
    for one in (frozen, graph):
        state = one.__getstate__()
        for version in (None, state["version"] + 1):
            other = {**state, "version": version}
            with pytest.raises(RuntimeError, match=r"saved in form .* freeze the model again"):
                type(one).__new__(type(one)).__setstate__(other)


@pytest.mark.parametrize("name", ["cnn", "rnn", "autoencoder", "deep conv"])
def test_on_another_instruction_set(name: str) -> None:
    model, example = make(name)
    best = fastnn._C.instruction_set()
    frozen = fastnn.freeze(model, example)
    with torch.no_grad():
        expected = model(example)
        try:
            for other in fastnn._C.supported_instruction_sets():
                fastnn._C.use_instruction_set(other)
                assert_close(frozen(example), expected)
                assert_close(pickle.loads(pickle.dumps(frozen))(example), expected)
        finally:
            fastnn._C.use_instruction_set(best)


@pytest.mark.parametrize("name", ["cnn", "rnn", "autoencoder"])
def test_threads_share_it(name: str) -> None:
    model, example = make(name)
    frozen = fastnn.freeze(model, example)
    expected = frozen(example)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: all(torch.equal(frozen(example), expected) for _ in range(50)), range(8)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


class TwoResults(Residual):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x), x


class TwoInputs(Residual):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.layer(x + y)


class Joined(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layer(x)])


class WithABorder(Residual):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.layer(x.cumprod(-1)) + y


class AroundABorder(Residual):
    """A border that a value goes around."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y + torch.relu(self.layer(y.cumprod(-1)))


class Split(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).split(2, -1)[1]


class Branched(Residual):
    """The second use of the input is that of a layer which a chain could hold."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return torch.cat([torch.tanh(y), self.layer(x)])


class Reused(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(self.layer(x), self.layer(self.layer.weight))


class Unused(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer.weight)


class Counting(Residual):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.layer(x)


class ChangesInput(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mul_(2))


class ChangesPart(Residual):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y[:, 0].relu_()
        return y


class DependsOnValues(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


class CellState(LastStep):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[1][1][-1]


class FirstLayersState(LastStep):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[1][0]


class AllStates(LastStep):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[1]


class FirstStep(LastStep):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][0]


# Models that are one network, and their inputs' sizes.
NETWORKS: list[tuple[Any, list[tuple[int, ...]]]] = [
    (lambda: nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)), [(3, 4)]),
    (lambda: nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), [(3, 4)]),
    (lambda: nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(0.5), nn.Linear(4, 3)), [(3, 4)]),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 2)), [(3, 3, 8, 8)]),
    (Residual, [(3, 4)]),
    (TwoInputs, [(3, 4), (3, 4)]),
    (Joined, [(3, 4)]),
    (Split, [(3, 4)]),
    (Branched, [(3, 4)]),
    (lambda: FirstStep(nn.GRU(4, 4)), [(3, 2, 4)]),
    (lambda: nn.Sequential(AllStates(nn.GRU(4, 4)), nn.Linear(4, 4)), [(3, 2, 4)]),
    (lambda: CellState(nn.LSTM(4, 4)), [(3, 2, 4)]),
    (lambda: FirstLayersState(nn.RNN(4, 4, 2)), [(3, 2, 4)]),
    (lambda: FirstLayersState(nn.GRU(4, 4, bidirectional=True)), [(3, 2, 4)]),
]
# Models with borders, their inputs' sizes, and how many networks they have.
BORDERS: list[tuple[Any, list[tuple[int, ...]], int]] = [
    (lambda: nn.Sequential(nn.Linear(4, 4), CumulativeProduct()), [(3, 4)], 1),
    (lambda: nn.Sequential(CumulativeProduct(), nn.Linear(4, 4)), [(3, 4)], 1),
    (lambda: nn.Sequential(nn.Linear(4, 4), CumulativeProduct(), nn.Linear(4, 3)), [(3, 4)], 2),
    (AroundABorder, [(3, 4)], 2),
    (ChangesPart, [(3, 4)], 1),
    (TwoResults, [(3, 4)], 1),  # the second is the input itself
]


def freezes(model: nn.Module, sizes: list[tuple[int, ...]]) -> Any:
    """The frozen model, which computes what the model does for batches of any size, saved, copied and compiled too."""
    model = model.eval()
    frozen = fastnn.freeze(model, tuple(torch.randn(size) for size in sizes))
    saved = io.BytesIO()
    torch.save(frozen, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    with torch.no_grad():
        for batch in (1, 2, 7):
            inputs = tuple(torch.randn(batch, *size[1:]) for size in sizes)
            expected = model(*inputs)
            for one in (frozen, loaded, copy.deepcopy(frozen)):
                assert_close(one(*inputs), expected)
        torch.compiler.reset()
        exported = torch.export.export(frozen, inputs).module()
        assert_close(exported(*inputs), expected)
        assert_close(torch.compile(frozen, backend="eager", fullgraph=True)(*inputs), expected)
    return frozen


@pytest.mark.parametrize(("model", "sizes"), NETWORKS)
def test_is_one_network(model: Any, sizes: list[tuple[int, ...]]) -> None:
    assert isinstance(freezes(model(), sizes), fastnn.FrozenModel)


@pytest.mark.parametrize(("model", "sizes", "networks"), BORDERS)
def test_what_lies_between_stays(model: Any, sizes: list[tuple[int, ...]], networks: int) -> None:
    assert len(freezes(model(), sizes).parts) == networks


def test_batch_norms_become_part_of_the_layer_before() -> None:
    """After convolutions with and without a pool, after linear layers; not after what has a second use."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5, affine=False), nn.Flatten()),
        *(nn.Linear(45, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8), nn.BatchNorm1d(8)),
    )
    for module in model:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    model.eval()
    frozen = fastnn.freeze(model, torch.randn(4, 3, 12, 12))
    assert "binary" not in frozen.program
    with torch.no_grad():
        x = torch.randn(9, 3, 12, 12)
        assert_close(frozen(x), model(x))
        skip = Residual().eval()
        skip.layer = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        x = torch.randn(5, 4)
        assert_close(fastnn.freeze(skip.eval(), x)(x), skip(x))


def test_a_frozen_graph_is_safe() -> None:
    frozen = fastnn.freeze(WithABorder().eval(), (torch.randn(3, 4), torch.randn(3, 4)))
    with pytest.raises(TypeError, match="expected 2 inputs, got 1"):
        frozen(torch.randn(3, 4))
    with pytest.raises(RuntimeError, match=r"expected an input of size \[any, 4\], got \[3, 5\]"):
        frozen(torch.randn(3, 5), torch.randn(3, 4))
    with pytest.raises(RuntimeError, match="runs no hooks"):
        frozen.register_forward_hook(lambda *_: None)
    hostile = ("os.system", "operator.attrgetter", "torch.load", "aten", "aten.__init__.__getattribute__", "aten.relu")
    hostile += ("aten.relu.__call__", "aten.relu.__setattr__", "aten.from_file.default", "aten.copy_.default")
    for name in (*hostile, "aten.as_strided.default", "aten.no_such.default", "fastnn.__dict__.pop"):
        state = frozen.__getstate__()
        steps, *rest = state["rest"]
        state["rest"] = ([(name, *steps[0][1:])], *rest)
        with pytest.raises(ValueError, match="cannot hold"):
            frozen.__setstate__(state)
    state = frozen.__getstate__()
    state["rest"] = (state["rest"][0], state["rest"][1], ("torch", "load"), state["rest"][3])
    with pytest.raises(ValueError, match="cannot hold"):
        frozen.__setstate__(state)


@pytest.mark.parametrize(
    ("model", "sizes", "message"),
    [
        (
            lambda: nn.Sequential(nn.CELU()),
            (3, 3, 8, 8),
            r"nothing in Sequential.*of layer '0' .*CELU.*has no counterpart",
        ),
        (Unused, (3, 4), "nothing in Unused to freeze"),
        (nn.Identity, (3, 4), "nothing in Identity to freeze"),
        (Counting, (3, 4), "Counting changes calls in place"),
        (ChangesInput, (3, 4), "ChangesInput changes x in place"),
        (DependsOnValues, (3, 4), "torch.export cannot take DependsOnValues"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16)),
            (3, 4),
            "float32 or float64, got torch.bfloat16",
        ),
        (lambda: nn.Sequential(nn.Linear(4, 4)), (3, 5), "Sequential does not take example_input: .*mat1 and mat2"),
        (TwoInputs, (3, 4), r"TwoInputs takes \(x: .*, y: .*example_input has 1 inputs: missing"),
    ],
)
def test_refuses_what_it_cannot_hold(model: Any, sizes: tuple[int, ...], message: str) -> None:
    model = model()
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    with pytest.raises(ValueError, match=message):
        fastnn.freeze(model, torch.randn(sizes, dtype=dtype))


def test_an_embedding() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
    frozen, x = fastnn.freeze(model, torch.randint(9, (3, 5))), torch.randint(9, (7, 5))
    with torch.no_grad():
        assert_close(frozen(x), model(x))
        for bad in (-1, 9):
            with pytest.raises(RuntimeError, match="index out of range in self"):
                frozen(torch.full((2, 5), bad))
        with pytest.raises(RuntimeError, match="int64"):
            frozen(torch.zeros(2, 5))


class Calls(nn.Module):
    """A layer and a function of its result."""

    def __init__(self, layer: Any, function: Any, then: Any = None) -> None:
        super().__init__()
        self.layer, self.function, self.then = layer, function, then

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(self.layer(x))
        return x if self.then is None else self.then(x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.reshape(5, -1, 4), "Calls does depends on the batch"),
        (lambda x: x.reshape(10, 6, 4), "Calls does depends on the batch"),
        (lambda x: x if x.shape[0] > 4 else x + 1, "Calls does depends on the batch"),
        (lambda x: x if x.shape[0] % 2 == 0 else x + 1, r"does not compute what .* of size \(1, 6, 4\)"),
    ],
)
def test_refuses_what_depends_on_the_batch(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastnn.freeze(Calls(nn.Linear(4, 4), function), torch.randn(10, 6, 4))


@pytest.mark.parametrize(
    "function",
    [lambda x: x.reshape(-1, 4), lambda x: x.reshape(-1, 8), lambda x: x.reshape(x.shape[1], x.shape[0], 4)],
)
@pytest.mark.parametrize("then", [None, lambda: nn.Linear(4, 3), lambda: FirstResult(nn.GRU(4, 4))])
def test_reshapes_that_mix_the_samples(function: Any, then: Any) -> None:
    """They are not followed, whatever comes after them: what comes out is the model's."""
    model = Calls(nn.Linear(4, 4), function, then and then()).eval()
    try:
        model(torch.randn(10, 6, 4))
    except RuntimeError:
        return  # rows of eight, which the layer after them does not take
    frozen = fastnn.freeze(model, torch.randn(10, 6, 4))
    with torch.no_grad():
        for batch in (1, 3, 10):
            x = torch.randn(batch, 6, 4)
            assert_close(frozen(x), model(x))


def test_sizes_that_the_model_fixes_are_fixed() -> None:
    model = Calls(nn.Linear(4, 4), lambda x: x.reshape(-1, 24))
    frozen = fastnn.freeze(model, torch.randn(10, 6, 4))
    with torch.no_grad():
        x = torch.randn(3, 6, 4)
        assert_close(frozen(x), model(x))
    with pytest.raises(RuntimeError, match=r"expected an input of size \[any, 6, any\], got \[2, 12, 4\]"):
        frozen(torch.randn(2, 12, 4))  # of which the model makes (4, 24)
    branches = Calls(nn.Linear(4, 4), lambda x: x if x.shape[1] > 5 else x + 1)
    frozen = fastnn.freeze(branches, torch.randn(10, 7, 4))
    assert "sizes=:,6:,4" in repr(frozen)
    with pytest.raises(RuntimeError, match=r"expected an input of size \[any, 6 or more, 4\], got \[2, 5, 4\]"):
        frozen(torch.randn(2, 5, 4))
    images = Calls(nn.ConvReLUMaxPool2d(1, 2, 1), lambda x: x.view(-1, 24))
    frozen = fastnn.freeze(images, torch.randn(3, 1, 6, 8))
    with torch.no_grad():
        x = torch.randn(5, 1, 6, 8)
        assert_close(frozen(x), images(x))
        x = torch.randn(2, 1, 12, 8)  # of which the model makes (4, 24)
        assert_close(frozen(x), images(x))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.empty(0, 3, 20, 20), r"not empty, got size \(0, 3, 20, 20\)"),
        (torch.randn(()), r"\(batch, ...\).*got size \(\)"),
        (torch.randn(3), "Conv2DNet does not take example_input: Expected 3D"),
        ((torch.randn(3, 4), torch.randn(3, 4)), "example_input has 2 inputs: too many"),
        ("image", "expected example_input to be a Tensor, or Tensors in tuples, .*, got a str"),
        (torch.randn(2, 3, 20, 20, device="meta"), "on the CPU.* on meta"),
    ],
)
def test_refuses_examples_that_show_nothing(example: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastnn.freeze(models.Conv2DNet(4), example)


def test_bad_input() -> None:
    model, example = make("cnn")
    frozen = fastnn.freeze(model, example)
    for bad in (torch.randn(2, 4, 20, 20), torch.randn(2, 3, 200, 200), torch.randn(3, 20), torch.randn(2, 3, 1, 1)):
        with pytest.raises(RuntimeError):
            frozen(bad)
    with pytest.raises(RuntimeError, match=r"expected an input of size \[any, 3, .*\], got \[3, 20, 20\]"):
        frozen(example[0])
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int32):
        with pytest.raises(RuntimeError, match="expected input to have dtype Float, but got"):
            frozen(example.to(dtype))
    with torch.no_grad():
        assert_close(frozen(example), model(example))


@pytest.mark.parametrize(("name", "refused"), [("cnn", 40), ("1d", 4)])
def test_input_refused_half_way_changes_nothing(name: str, refused: int) -> None:
    """A later stage refuses what the first ones take: the call after it must not find half a plan."""
    model, example = make(name)
    parameters = [p.detach() for p in model.parameters()]
    program = fastnn.freeze(model, example)._program
    bad = torch.randn(*example.shape[:2], *(refused for _ in example.shape[2:]))
    run = torch.ops.fastnn.network_of_parameters
    # Without the sizes of the input, which would refuse it at once.
    program = re.sub(r"(?<=sizes=)\S+", ",".join([":"] * example.dim()), program, count=1)
    (expected,) = run([example], parameters, program)
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"an input of size .* does not fit the network"):
            run([bad], parameters, program)
        assert torch.equal(run([example], parameters, program)[0], expected)


def test_input_wider_than_every_output() -> None:
    """Each thread has scratch memory for a block of rows of the widest of input and outputs."""
    model = nn.Sequential(nn.Linear(70000, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    example = torch.randn(48, 70000)
    with torch.no_grad():
        expected = model(example)
        for threads in (1, 2):
            with using_threads(threads):
                assert_close(fastnn.freeze(model, example)(example), expected)


def test_weights_of_functional_call() -> None:
    for name in ("autoencoder", "cnn", "gru"):
        model, example = make(name)
        frozen = fastnn.freeze(model, example)
        other_model = CASES[name][0]()
        other = fastnn.freeze(other_model, example)
        expected, of_other = frozen(example), other(example)
        assert not torch.allclose(expected, of_other)
        weights = {"weights": other.weights}
        assert_close(torch.func.functional_call(frozen, weights, (example,)), of_other)
        assert torch.equal(frozen(example), expected)

        def call(weights: Any, x: Tensor, frozen: Any = frozen) -> Tensor:
            return torch.func.functional_call(frozen, weights, (x,))

        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        assert_close(compiled(weights, example), of_other)
        both = {"weights": torch.stack([frozen.weights, other.weights])}
        assert_close(torch.func.vmap(call, (0, None))(both, example), torch.stack([expected, of_other]))


def test_weights_replaced() -> None:
    model, example = make("autoencoder")
    frozen, other = fastnn.freeze(model, example), fastnn.freeze(CASES["autoencoder"][0](), example)
    frozen.weights = other.weights.clone()
    assert_close(frozen(example), other(example))


@pytest.mark.parametrize("mode", [torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)])
def test_frozen_in_other_modes(mode: Any) -> None:
    model, example = make("autoencoder")
    expected = model(example)
    with mode:
        frozen = fastnn.freeze(model, example)
    assert_close(frozen(example), expected)


def test_refused_conversion_changes_nothing() -> None:
    model, example = make("autoencoder")
    frozen = fastnn.freeze(model, example)
    expected = frozen(example)
    for convert in (lambda: frozen.half(), lambda: frozen.bfloat16(), lambda: frozen.to("meta")):
        with pytest.raises(RuntimeError):
            convert()
        assert torch.equal(frozen(example), expected)


def test_prints_its_layers() -> None:
    layers = [
        nn.ConvReLUMaxPool2d(4, 6, 3, padding=(1, 2), groups=2, pool_kernel_size=2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(6 * 10 * 11, 8, bias=False),
        nn.GELU("tanh"),
        nn.Linear(8, 2, bias=False),
    ]
    frozen = fastnn.freeze(nn.Sequential(*layers), torch.randn(2, 4, 20, 20))
    assert repr(frozen).splitlines() == [
        "FrozenModel(",
        "  input -> x0 sizes=:,4,:,:",
        "  conv input=x0 weight=w0 bias=w1 -> v0 padding=1,2 pool=2 groups=2 ceil_mode=1 activation=relu",
        "  reshape input=v0 like=v0 -> v1 sizes=0.0,-1",
        "  linear input=v1 weight=w2 -> v2 activation=gelu_tanh",
        "  linear input=v2 weight=w3 -> v3",
        "  output input=v3",
        ")",
    ]
    assert "weight -> w0 sizes=6,2,3,3" in frozen.program
    rnn = nn.LSTM(4, 6, 2, batch_first=True, proj_size=3, bidirectional=True)
    frozen = fastnn.freeze(nn.Sequential(LastStep(rnn), nn.Linear(6, 2)), torch.randn(2, 5, 4))
    assert "mode=LSTM bidirectional=1 batch_first=1 projected=1 last=1" in repr(frozen)


HOSTILE_LINES = [
    "",
    "x",
    "linear",
    "-> y",
    "linear -> y",
    "linear input=x weight=w0 ->",
    "linear input=x weight=w0",
    "other input=x -> y",
    "linear input=y weight=w0 -> y",
    "linear input=x weight=x -> y",
    "linear input=w1 weight=w0 -> y",
    "linear input=x,x weight=w0 -> y",
    "linear input=x weight=w0 -> x",
    "linear input=x weight=w0 -> y z",
    "linear input=x weight=w0 bias=w0 -> y",
    "linear input=x other=x -> y",
    "linear input=x input=x weight=w0 -> y",
    "linear input=x weight=w0 -> y size=3",
    "linear input=x weight=w0 -> y activation=relo",
    "activation input=x -> y",
    "activation input=x -> y activation=relu(1",
    "activation input=x -> y activation=relu activation=relu",
    "reshape input=x -> y sizes=-1,-1",
    "reshape input=x -> y sizes=-2",
    "reshape input=x -> y sizes=7",
    "reshape input=x -> y sizes=0.0",
    "reshape input=x like=x -> y sizes=1.0,-1",
    "reshape input=x like=x -> y sizes=0.9,-1",
    "reshape input=x -> y sizes=a",
    "reshape input=x -> y sizes=9223372036854775807,9223372036854775807",
    "permute input=x -> y dims=0",
    "permute input=x -> y dims=1,1",
    "permute input=x -> y dims=0,99",
    "permute input=x -> y dims=0,2",
    "slice input=x -> y dim=5",
    "slice input=x -> y dim=0 step=0",
    "slice input=x -> y dim=0 start=99999999999999999999",
    "cat -> y",
    "cat inputs=x,w9 -> y",
    "cat inputs=x,w0 -> y dim=1",
    "cat inputs=x -> y dim=-17",
    "pad input=x -> y padding=1",
    "pad input=x -> y padding=-9,-9",
    "pad input=x -> y padding=1,1,1,1,1,1",
    "pad input=x -> y padding=2147483648,2147483648,2147483648,2147483648",
    "mean input=x -> y dims=2",
    "softmax input=x y=x -> y",
    "layer_norm input=x -> y features=0",
    "layer_norm input=x -> y features=7",
    "layer_norm input=x weight=w0 -> y features=10",
    "embedding input=x weight=w0 -> y",
    "binary input=x -> y function=pow",
    "binary input=x -> y",
    "binary input=x other=w0 -> y function=add",
    "conv input=x weight=w0 -> y",
    "conv input=x weight=w4 -> y",
    "max_pool input=x -> y kernel=2",
    "max_pool input=x -> y kernel=1,1,1,1",
    "avg_pool input=x -> y kernel=0",
    "upsample input=x -> y factors=2",
    "upsample input=x -> y factors=1,1,1",
    "rnn input=x -> y mode=GRU",
    "rnn input=x weights=w0,w0 -> y mode=GRU",
    "rnn input=x weights=w0,w0,w0,w0 -> y mode=LSTM",
    "rnn input=x weights=w0 -> y mode=no",
    "conv_transpose input=x weight=w0 -> y",
    "flatten input=x -> y start_dim=1 end_dim=0",
    "flatten input=x -> y start_dim=2",
    "squeeze input=x -> y",
    "squeeze input=x -> y dim=2",
    "unsqueeze input=x -> y dim=4",
    "transpose input=x -> y first=0",
    "transpose input=x -> y first=0 second=2",
    "select input=x -> y dim=0 index=4",
    "select input=x -> y dim=0 index=-5",
    "select input=x -> y dim=0 index=99999999999999999999",
    "split input=x -> y z",
    "split input=x -> y dim=1 sizes=3,3",
    "split input=x -> y z dim=1 sizes=3,3",
    "split input=x -> y z dim=1 size=4611686018427387904",
    "contiguous -> y",
    "adaptive_avg_pool input=x -> y sizes=1",
    "adaptive_avg_pool input=x -> y sizes=0",
    "batch_norm input=x -> y dims=1",
    "batch_norm input=x mean=w1 variance=w1 -> y dims=1 trains=0",
    "batch_norm input=x mean=w1 variance=w0 -> y dims=1 trains=0",
    "batch_norm input=x mean=w1 variance=w1 -> y dims=4 trains=0",
    "batch_norm input=x mean=w1 variance=w1 -> y dims=1 trains=1",
    "fold conv_weight=w0 mean=w1 variance=w1 -> y z",
    "fold conv_weight=x mean=w1 variance=w1 -> y z",
    "fold conv_weight=w0 mean=w1 variance=w1 -> y",
    "fold mean=w1 variance=w1 -> y z",
    "clamp input=x -> y min=a",
    "clamp input=x -> y least=0",
    "unary input=x -> y function=exp",
    "unary input=x -> y",
    "expand input=x -> y",
    "expand input=x -> y sizes=2",
    "expand input=x -> y sizes=7,-1",
    "expand input=x like=x -> y sizes=9223372036854775807,0.1",
    "repeat input=x -> y sizes=1",
    "repeat input=x -> y sizes=1,-1",
    "repeat input=x -> y sizes=9223372036854775807,9223372036854775807",
    "full like=x,x -> y value=1 sizes=2.0",
    "full like=x -> y value=1 sizes=0.2",
    "full -> y value=1 sizes=-1",
    "full -> y value=1 sizes=4611686018427387904",
    "full -> y sizes=2",
    "attention query=x key=x -> y",
    "attention query=x key=x value=w1 -> y",
    "attention query=x key=x value=x -> y scale=a",
    "amax input=x -> y dims=2",
    "amax input=x -> y dims=-3",
    "group_norm input=x -> y",
    "group_norm input=x -> y groups=-1",
    "group_norm input=x -> y groups=0",
    "group_norm input=x weight=w0 -> y groups=1",
    "group_norm input=x weight=w1 -> y groups=3",
    "group_norm input=x -> y groups=1 dims=2",
    "embedding input=x weight=w0 -> y selects=1 dim=1",
    "noise like=x -> y",
    "dropout input=x -> y p=0.5",
    "matmul input=x other=x -> y",
    "output input=x",
    "weight -> q sizes=10",
    "input -> q sizes=10",
    "\0",
    "linear\0",
]


@pytest.fixture(scope="module")
def frozen_autoencoder() -> fastnn.FrozenModel:
    return fastnn.freeze(*make("autoencoder"))


@pytest.mark.parametrize("line", HOSTILE_LINES)
def test_a_line_that_does_not_fit_is_refused(line: str, frozen_autoencoder: fastnn.FrozenModel) -> None:
    frozen = frozen_autoencoder
    lines = frozen.program.replace("x0", "x").split("\n")
    place = next(i for i, one in enumerate(lines) if one.startswith("linear"))
    text = "\n".join([*lines[:place], line, *lines[place:]])
    with pytest.raises(RuntimeError, match="network"):
        torch.ops.fastnn.network_of_one(torch.randn(4, 10), frozen.weights, frozen.packed, text)


def test_raw_operators_are_safe() -> None:
    frozen = fastnn.freeze(*make("autoencoder"))
    example, weights, packed = torch.randn(4, 10), frozen.weights, frozen.packed
    run, program = torch.ops.fastnn.network_of_one, frozen.program
    expected = frozen(example)
    lines = program.split("\n")
    hostile = ["", "\n", "fastnn.network 2", lines[0], "\n".join(lines[1:]), "\n".join(lines[:-1]), program + program]
    hostile += [
        program.replace("sizes=:,10", sizes) for sizes in ("sizes=5:,10", "sizes=:,11", "sizes=:", "sizes=1:3,10")
    ]
    hostile += [
        program.replace("sizes=8,10", sizes) for sizes in ("sizes=8", "sizes=8,11", "sizes=-8,10", f"sizes={2**40},10")
    ]
    for text in hostile:
        with pytest.raises(RuntimeError):
            run(example, weights, packed, text)
        with pytest.raises(RuntimeError):
            torch.ops.fastnn.pack_network(weights, text, [4, 10])
    for bad in (weights[:-1], weights[None], weights.double(), torch.cat([weights, weights[:1]]), weights[::2]):
        with pytest.raises(RuntimeError):
            run(example, bad, packed, program)
    for sizes in ([], [4], [-1, 10], [0, 10], [4, 11], [4, 10, 1], [2**62, 2**62], [2**62, 10]):
        with pytest.raises(RuntimeError):
            torch.ops.fastnn.pack_network(weights, program, sizes)
    # Packed weights that do not fit are not used.
    for other in (packed[:0], packed[:100], packed[:-64], torch.zeros_like(packed), torch.full_like(packed, 255)):
        assert_close(run(example, weights, other.contiguous(), program), expected)
    assert_close(run(example, weights, torch.cat([packed[:1], packed])[1:], program), expected)  # off its alignment
    with pytest.raises(RuntimeError, match="uint8"):
        run(example, weights, packed.int(), program)
    torch.library.opcheck(run, (example, weights, packed, program))
    several = torch.ops.fastnn.network
    for inputs in ([], [example, example], [example[0]], [example.double()], [example.long()]):
        with pytest.raises(RuntimeError):
            several(inputs, weights, packed, program)
    assert torch.equal(several([example], weights, packed, program)[0], expected)
    torch.library.opcheck(several, ([example], weights, packed, program))


@pytest.mark.parametrize("name", ["cnn", "1d", "3d"])
def test_packing_for_sizes_that_no_tensor_has(name: str) -> None:
    frozen = fastnn.freeze(*make(name))
    (sizes,) = frozen._sizes
    program = re.sub(r"(?<=sizes=)\S+", ",".join([":"] * len(sizes)), frozen.program, count=1)
    for bad in (0, 2**31, 2**32, 2**62, 2**63 - 1):
        for dim in range(len(sizes)):
            hostile = [*sizes[:dim], bad, *sizes[dim + 1 :]]
            if bad == 0 or dim > 0:
                with pytest.raises(RuntimeError):
                    torch.ops.fastnn.pack_network(frozen.weights, program, hostile)
            else:  # some are only large
                with contextlib.suppress(RuntimeError):
                    torch.ops.fastnn.pack_network(frozen.weights, program, hostile)
    frozen._sizes = [(0, *sizes[1:])]
    with pytest.raises(RuntimeError, match="expected sizes of at least 1"):
        pickle.loads(pickle.dumps(frozen))


def test_operator_of_parameters_is_safe() -> None:
    model, example = make("autoencoder")
    program = fastnn.freeze(model, example)._program
    run, parameters = torch.ops.fastnn.network_of_parameters, [p.detach() for p in model.parameters()]
    expected = model(example).detach()
    assert_close(run([example], parameters, program)[0], expected)
    with pytest.raises(RuntimeError, match=r"expected weight 0 of size \[8, 10\], got \[10, 8\]"):
        run([example], [parameters[0].reshape(10, 8), *parameters[1:]], program)
    for inputs in ([], [example, example], [example.double()], [example[:, :9]], [example.to("meta")]):
        with pytest.raises(RuntimeError):
            run(inputs, parameters, program)
    first = parameters[0]
    for bad in (
        *(
            [],
            parameters[:-1],
            [*parameters, first],
            parameters[::-1],
            [torch.cat([p.reshape(-1) for p in parameters])],
        ),
        *([p.double() for p in parameters], [first[:, :9], *parameters[1:]], [first.to("meta"), *parameters[1:]]),
    ):
        with pytest.raises(RuntimeError):
            run([example], bad, program)
    with pytest.raises(RuntimeError, match="BFloat16"):
        run([example.bfloat16()], [p.bfloat16() for p in parameters], program)
    with pytest.raises(RuntimeError, match="expected parameters to be contiguous"):
        run([example], [p.repeat_interleave(2, 0)[::2] for p in parameters], program)
    assert_close(run([example.t().contiguous().t()], parameters, program)[0], expected)
    torch.library.opcheck(run, ([example], parameters, program))


# ---- what models may give and take ------------------------------------------------------------------------------


class Gives(nn.Module):
    def __init__(self, give: Callable[..., Any], takes: int = 1) -> None:
        super().__init__()
        self.net, self.give, self.takes = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), give, takes

    def forward(self, *inputs: Tensor) -> Any:
        return self.give(self.net(torch.cat(inputs, 1)), inputs[0])


GIVES: dict[str, Callable[..., Any]] = {
    "a number": lambda y, x: (y, x.shape[0]),
    "None and a text": lambda y, x: (y, None, "text"),
    "a random one": lambda y, x: y + torch.randn(()),
}


@pytest.mark.parametrize("name", GIVES)
def test_results_that_are_no_tensors(name: str) -> None:
    model, x = Gives(GIVES[name]).eval(), torch.randn(4, 6)
    state = torch.get_rng_state()
    frozen = fastnn.freeze(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    for rows in (4, 1, 7):
        x = torch.randn(rows, 6)
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        found = frozen(x)
        if isinstance(expected, tuple):
            assert found[1:] == expected[1:]
            found, expected = found[0], expected[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_several_inputs_as_one_argument() -> None:
    model, inputs = Gives(lambda y, x: y).eval(), (torch.randn(4, 2), torch.randn(4, 4))
    frozen = fastnn.freeze(model, inputs)
    torch.testing.assert_close(frozen(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


class Streams(nn.Module):
    """A recurrent layer with its state, and a head on its last step."""

    def __init__(self, kind: Any = nn.GRU, batch_first: bool = True) -> None:
        super().__init__()
        self.layer, self.fc = kind(3, 16, 2, batch_first=batch_first), nn.Linear(16, 1)

    def forward(self, x: Tensor, state: Any) -> Any:
        output, state = self.layer(x, state)
        return self.fc(output[:, -1] if self.layer.batch_first else output[-1]), state


class StreamsOfCells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.gru, self.fc = nn.LSTMCell(3, 16), nn.GRUCell(16, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor, state: Any) -> Any:
        h, c = self.cell(x, state["lstm"])
        other = self.gru(h, state["gru"])
        return self.fc(other), {"lstm": (h, c), "gru": other}


def streams() -> dict[str, tuple[nn.Module, Callable[[int], Any]]]:
    def state(batch: int, count: int = 2) -> Any:
        return tuple(torch.randn(2, batch, 16) for _ in range(count))

    return {
        "gru": (Streams(), lambda n: (torch.randn(n, 1, 3), *state(n, 1))),
        "rnn, batch second": (Streams(nn.RNN, False), lambda n: (torch.randn(5, n, 3), *state(n, 1))),
        "lstm": (Streams(nn.LSTM), lambda n: (torch.randn(n, 1, 3), state(n))),
        "lstm of longer sequences": (Streams(nn.LSTM), lambda n: (torch.randn(n, 7, 3), state(n))),
        "cells": (
            StreamsOfCells(),
            lambda n: (torch.randn(n, 3), {"lstm": (torch.randn(n, 16), torch.randn(n, 16)), "gru": torch.randn(n, 8)}),
        ),
    }


@pytest.mark.parametrize("name", streams())
def test_states_go_in_and_out(name: str) -> None:
    model, make_inputs = streams()[name]
    model.eval()
    for batch in (1, 2, 3):
        frozen = fastnn.freeze(model, make_inputs(batch))
        assert isinstance(frozen, fastnn.FrozenModel)
        for other in (1, 2, 5):
            inputs = make_inputs(other)
            with torch.no_grad():
                torch.testing.assert_close(frozen(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    saved = io.BytesIO()
    torch.save(frozen, saved)
    saved.seek(0)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(saved, weights_only=True)(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


def test_a_tensor_that_is_given_twice_is_two_inputs() -> None:
    model, zeros = streams()["lstm"][0].eval(), torch.zeros(2, 1, 16)
    x, h, c = torch.randn(1, 1, 3), torch.randn(2, 1, 16), torch.randn(2, 1, 16)
    for example in ((x, (zeros, zeros)), (x, (zeros, zeros[:]))):
        frozen = fastnn.freeze(model, example)
        with torch.no_grad():
            torch.testing.assert_close(frozen(x, (h, c)), model(x, (h, c)), rtol=1e-4, atol=1e-5)


class TwoSequences(Streams):
    def forward(self, x: Tensor, y: Tensor, state: Any) -> Any:  # type: ignore[override]
        return super().forward(torch.cat([x, y], -1), state)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 2), (3, 1), (1, 4)])
def test_the_batch_is_found_in_each_input(batch: int, length: int) -> None:
    model = TwoSequences().eval()
    example = (torch.randn(batch, length, 1), torch.randn(batch, length, 2), torch.zeros(2, batch, 16))
    frozen = fastnn.freeze(model, example)
    with torch.no_grad():
        for rows in (1, 2, 5):
            inputs = (torch.randn(rows, length, 1), torch.randn(rows, length, 2), torch.randn(2, rows, 16))
            torch.testing.assert_close(frozen(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


def test_inputs_nested_in_another_way_are_refused() -> None:
    model, make_inputs = streams()["lstm"]
    x, (h, c) = make_inputs(2)
    frozen = fastnn.freeze(model.eval(), (x, (h, c)))
    for bad in ((x,), (x, h, c), (x, h), (x, (h,)), (x, (h, c, c)), (x, {"h": h, "c": c})):
        with pytest.raises(TypeError, match="expected"):
            frozen(*bad)


def test_what_is_refused_is_named() -> None:
    x, h = torch.randn(2, 1, 3), torch.zeros(2, 2, 16)
    with pytest.raises(ValueError, match=r"its element 2 to be a Tensor, or Tensors in tuples, .*, got a str"):
        fastnn.freeze(Streams().eval(), (x, (h, "c")))
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
    with pytest.raises(ValueError, match=r"depends on the batch's size, .* it takes \(6,\), but of \(1,\)"):
        fastnn.freeze(plain, torch.randn(6))
    without = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU()).eval()
    with pytest.raises(ValueError, match=r"freeze: .*depends on the batch's size.*more than 1 value per channel"):
        fastnn.freeze(without, torch.randn(3, 6))
    frozen = fastnn.freeze(plain, torch.randn(4, 6))
    with pytest.raises(RuntimeError, match="A frozen model has none"):
        frozen(torch.randn(4, 6, requires_grad=True)).sum().backward()


def test_threads_freeze_models_at_once() -> None:
    models = [nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)) for _ in range(8)]
    x = torch.randn(4, 8)
    with ThreadPoolExecutor(4) as pool:
        for model, frozen in zip(models, pool.map(lambda model: fastnn.freeze(model, x), models), strict=True):
            torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("left", [0, 64])
def test_packed_weights_whose_memory_was_freed(left: int) -> None:
    frozen = fastnn.freeze(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6))
    frozen.packed.untyped_storage().resize_(left)
    with pytest.raises(RuntimeError, match="packed needs a storage of"):
        frozen(torch.randn(4, 6))


# ---- what a model's Python does with sizes ----------------------------------------------------------------------


def sizes_that_matter() -> dict[str, tuple[Any, tuple[int, ...], list[tuple[int, ...]]]]:
    """Models whose Python looks at sizes: a function of a layer's result and the input, the example's size, and other
    sizes for which the model does something else."""

    def padded(y: Tensor, x: Tensor) -> Tensor:
        return y if x.shape[1] % 2 == 0 else torch.nn.functional.pad(y, (0, 0, 0, 1))

    def windows(y: Tensor, x: Tensor) -> Tensor:
        n, length, c = y.shape
        inner = y.view(n, length // 3, 3, c)
        mixed = inner.cumprod(2)
        return mixed.view(n, length // 3 * 3, -1)

    return {
        "odd lengths are padded": (padded, (3, 6, 4), [(3, 7, 4), (2, 8, 4)]),
        "squeeze": (lambda y, x: y.squeeze(1), (3, 5, 4), [(3, 1, 4), (3, 6, 4)]),
        "a square": (lambda y, x: y if x.shape[1] == x.shape[2] else y + 1, (3, 4, 4), [(3, 5, 4)]),
        "one step": (lambda y, x: y[:, 0] if x.shape[1] == 1 else y, (3, 5, 4), [(3, 1, 4)]),
        "a short slice": (lambda y, x: y[:, :8], (3, 5, 4), [(3, 9, 4), (3, 12, 4), (3, 1, 4)]),
        "a view before a border": (lambda y, x: y.view(y.size(0), -1).cumprod(-1), (3, 5, 4), [(2, 5, 4), (2, 7, 4)]),
        "windows": (windows, (2, 6, 4), [(3, 9, 4), (1, 3, 4)]),
        "layer norm over all": (
            lambda y, x: torch.nn.functional.layer_norm(y, y.shape[1:]), (3, 5, 4), [(2, 5, 4), (2, 7, 4)]
        ),
        "steps as rows": (lambda y, x: y[:, -1:].reshape(-1, 2), (3, 5, 4), [(2, 5, 4), (2, 1, 4)]),
        "a scale of more dimensions": (lambda y, x: y * torch.ones(1, 1, 1, 1), (3, 5, 4), [(2, 5, 4)]),
    }  # fmt: skip


@pytest.mark.parametrize("name", sizes_that_matter())
def test_never_other_than_the_model(name: str) -> None:
    """The frozen model does what the model does, or refuses the size."""
    function, example, others = sizes_that_matter()[name]

    class LooksAtSizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return function(self.layer(x), x)

    model = LooksAtSizes().eval()
    frozen = fastnn.freeze(model, torch.randn(example))
    answered = 0
    for size in (example, *others):
        x = torch.randn(size)
        with torch.no_grad():
            expected = model(x)
            try:
                found = frozen(x)
            except RuntimeError:
                continue
        answered += 1
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert answered


def test_a_mask_does_not_hide_other_results() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("mask", torch.tensor([True, True, True, False]))

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x) if x.shape[1] % 2 == 0 else self.fc(x) + 1
            return y.masked_fill(self.mask, -1e9)

    model = Masked().eval()
    frozen, x = fastnn.freeze(model, torch.randn(3, 6, 4)), torch.randn(3, 7, 4)
    with pytest.raises(RuntimeError, match="expected an input of size"):
        frozen(x)


@pytest.mark.parametrize(
    "function",
    [
        lambda y: torch.where((y > 0) & (y < 1), y, -y),
        lambda y: torch.where((y > 0) | (y < -1), y, -y),
        lambda y: torch.where((y > 0) ^ (y < 1), y, -y),
        lambda y: torch.fft.rfft(y),
    ],
)
def test_operators_at_the_border(function: Callable[[Tensor], Tensor]) -> None:
    model, x = Calls(nn.Linear(4, 4), function).eval(), torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(fastnn.freeze(model, x)(x), model(x))


def test_a_model_that_refuses_sizes_in_its_own_words() -> None:
    class Asserts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[1] > 1, "needs two steps"
            return self.fc(x)

    model, x = Asserts().eval(), torch.randn(3, 5, 4)
    with torch.no_grad():
        torch.testing.assert_close(fastnn.freeze(model, x)(x), model(x))


@pytest.mark.parametrize("function", [lambda x: x if x.shape[0] % 2 == 0 else x + 1, torch.squeeze])
@pytest.mark.parametrize("batch", [2, 3, 10])
def test_a_batch_that_matters_is_refused(batch: int, function: Callable[[Tensor], Tensor]) -> None:
    model = Calls(nn.Linear(4, 4), function)
    with pytest.raises(ValueError, match=r"depends on the batch|does not compute what"):
        fastnn.freeze(model, torch.randn(batch, 6, 4))


def test_inputs_as_freeze_takes_them() -> None:
    model = Scaled().eval()
    a, b = torch.randn(2, 4), torch.randn(2, 3)
    frozen = fastnn.freeze(model, (a, b))
    assert_close(frozen((a, b)), model(a, b))
    assert_close(frozen(a, b), model(a, b))
    for wrong in ((a,), (a, b, b)):
        with pytest.raises(TypeError, match=f"expected 2 inputs, got {len(wrong)}"):
            frozen(*wrong)


def test_dicts_say_which_keys_they_should_have() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, given: dict[str, Tensor]) -> Tensor:
            return self.fc(given["a"]) * given["b"]

    model = Named().eval()
    given = {"a": torch.randn(2, 4), "b": torch.randn(2, 3)}
    frozen = fastnn.freeze(model, (given,))
    assert_close(frozen({**given, "label": torch.zeros(2)}), model(given))
    for wrong in ({"a": given["a"]}, {"a": given["a"], "c": given["b"]}):
        with pytest.raises(TypeError, match=f"expected a dict with a, b, got a dict with {', '.join(wrong)}"):
            frozen(wrong)
    with pytest.raises(TypeError, match="expected a dict with a, b, got Tensor"):
        frozen(given["a"])


def test_what_cannot_be_exported_is_named_by_its_line() -> None:
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                return self.fc(x)
            return -self.fc(x)

    with pytest.raises(ValueError, match=r"torch.export cannot take Decides: .*if x\.sum\(\) > 0"):
        fastnn.freeze(Decides(), torch.randn(3, 4))


# ---- the networks that training takes ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_networks(name: str) -> None:
    make, sizes = MODELS[name]
    torch.manual_seed(0)
    model = make().eval().double()
    frozen = fastnn.freeze(model, torch.randn(sizes, dtype=torch.float64))
    assert isinstance(frozen, fastnn.FrozenModel)
    for batch in (sizes[0], 1, 9):
        x = torch.randn(batch, *sizes[1:], dtype=torch.float64)
        assert_close(frozen(x), model(x), rtol=1e-9, atol=1e-9)


class Attends(nn.Module):
    """Torch's own encoder layers, attention by itself with a mask of the past, and a product of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True)
        self.weight = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x) @ self.weight
        q, k, v = h.chunk(3, -1)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@torch.no_grad()
def test_attention(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Attends().to(dtype).eval(), torch.randn(3, 7, 8, dtype=dtype)
    frozen = fastnn.freeze(model, x)
    assert isinstance(frozen, fastnn.FrozenModel)
    for sizes in ((3, 7, 8), (1, 7, 8), (4, 9, 8)):
        x = torch.randn(sizes, dtype=dtype)
        assert_close(frozen(x), model(x))


class MaskedTransformer(nn.Module):
    """An encoder, a decoder or both of torch's, whose mask no hint describes: torch compares the mask's numbers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        encoder, decoder = nn.TransformerEncoderLayer, nn.TransformerDecoderLayer
        self.kind = kind
        self.register_buffer("table", nn.Transformer.generate_square_subsequent_mask(12))
        if kind.startswith("encoder"):
            self.layers: nn.Module = nn.TransformerEncoder(
                encoder(8, 2, 12, batch_first=True), 2, enable_nested_tensor=False
            )
        elif kind == "decoder":
            self.layers = nn.TransformerDecoder(decoder(8, 2, 12, batch_first=True, norm_first=True), 2)
        else:
            self.layers = nn.Transformer(8, 2, 1, 1, 12, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        steps = x.size(1)
        if self.kind == "encoder":
            return self.out(
                self.layers(x, nn.Transformer.generate_square_subsequent_mask(steps, dtype=x.dtype)) + memory
            )
        if self.kind == "encoder, mask of another kind":
            near = torch.ones(steps, steps).triu(2).bool()
            return self.out(self.layers(x, mask=near) + memory)
        table = self.table[:steps, :steps]
        if self.kind == "decoder":
            return self.out(self.layers(x, memory, table))
        return self.out(self.layers(memory, x, tgt_mask=table))


@pytest.mark.parametrize("kind", ["encoder", "encoder, mask of another kind", "decoder", "transformer"])
@torch.no_grad()
def test_masks_that_no_hint_describes(kind: str) -> None:
    torch.manual_seed(0)
    model = MaskedTransformer(kind).double().eval()

    def inputs(batch: int, steps: int) -> tuple[Tensor, Tensor]:
        given = torch.randn(2, batch, steps, 8, dtype=torch.float64)
        return given[0], given[1]

    frozen = fastnn.freeze(model, inputs(3, 7))
    if "encoder" not in kind:  # the mask is a part of a table
        assert isinstance(frozen, fastnn.FrozenModel)
    else:  # torch makes the mask, from sizes alone
        assert len([module for module in frozen.modules() if isinstance(module, fastnn.FrozenModel)]) == 1
    for batch, steps in ((3, 7), (1, 7), (5, 10)):
        given = inputs(batch, steps)
        assert_close(frozen(*given), model(*given), rtol=1e-9, atol=1e-9)
    assert not any(module._forward_pre_hooks for module in model.modules())


class MaskIsAnInput(nn.Module):
    """The transformer of PyTorch's tutorial, to which the mask of later steps, without a batch, is given."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first)
        self.encoder, self.out = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.out(self.encoder(x, mask))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("steps", "batch"), [(7, 3), (4, 4), (5, 1)])
@torch.no_grad()
def test_a_mask_that_has_no_batch(batch_first: bool, steps: int, batch: int) -> None:
    torch.manual_seed(0)
    model = MaskIsAnInput(batch_first=batch_first).double().eval()

    def inputs(steps: int, batch: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(*((batch, steps) if batch_first else (steps, batch)), 8, dtype=torch.float64)
        return x, nn.Transformer.generate_square_subsequent_mask(steps, dtype=torch.float64)

    frozen = fastnn.freeze(model, inputs(steps, batch))
    assert isinstance(frozen, fastnn.FrozenModel)
    for sizes in ((steps, batch), (steps, 1), (steps, 6), (steps + 2, batch)):
        given = inputs(*sizes)
        assert_close(frozen(*given), model(*given), rtol=1e-9, atol=1e-9)
    with pytest.raises((RuntimeError, ValueError)):
        frozen(inputs(steps, batch)[0], inputs(steps + 1, batch)[1])


class Translates(nn.Module):
    """The steps come first, the batch comes first in the mask of padding, and the mask of steps has none."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Transformer(8, 2, 1, 1, 12)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor, padding: Tensor) -> Tensor:
        return self.layers(x, y, tgt_mask=mask, src_key_padding_mask=padding, memory_key_padding_mask=padding)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@torch.no_grad()
def test_masks_of_steps_and_of_padding() -> None:
    torch.manual_seed(0)
    model = Translates().double().eval()

    def inputs(steps: int, batch: int) -> tuple[Tensor, ...]:
        x, y = torch.randn(5, batch, 8, dtype=torch.float64), torch.randn(steps, batch, 8, dtype=torch.float64)
        padding = torch.zeros(batch, 5, dtype=torch.bool)
        padding[-1, 3:] = True
        return x, y, torch.ones(steps, steps).triu(1).bool(), padding

    frozen = fastnn.freeze(model, inputs(4, 3))
    for sizes in ((4, 3), (4, 1), (4, 6), (7, 2)):
        given = inputs(*sizes)
        assert_close(frozen(*given), model(*given), rtol=1e-9, atol=1e-9)


class Scales(nn.Module):
    """A second input is a factor a feature, or is added to the scores of an attention; places have an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.places = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        y = self.layer(x + self.places) if x.dim() == 3 else self.layer(x)
        return torch.softmax(y @ y.mT + other, -1) @ y if other.dim() == 2 else y * other


@pytest.mark.parametrize(("sizes", "other"), [((3, 6), (6,)), ((3, 5, 6), (5, 5)), ((5, 5, 6), (5, 5))])
@torch.no_grad()
def test_an_input_without_a_batch_that_may_be_narrowed(sizes: tuple[int, ...], other: tuple[int, ...]) -> None:
    """One row of the second input is broadcast, so that the model takes it for a batch of one, too."""
    torch.manual_seed(0)
    model, second = Scales().double().eval(), torch.randn(other, dtype=torch.float64)
    frozen = fastnn.freeze(model, (torch.randn(sizes, dtype=torch.float64), second))
    for batch in (sizes[0], 1, 7):
        x = torch.randn(batch, *sizes[1:], dtype=torch.float64)
        assert_close(frozen(x, second), model(x, second), rtol=1e-9, atol=1e-9)


class Compares(nn.Module):
    """What the model does depends on how the batch's size compares with another size."""

    def __init__(self, with_its_own: bool) -> None:
        super().__init__()
        self.layer, self.with_its_own = nn.Linear(6, 6), with_its_own

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        y = self.layer(x)
        limit = x.shape[1] if self.with_its_own else other.shape[0]
        return y * 2 + other.sum() if x.shape[0] < limit else y


class Repeats(Compares):
    """The second input has a whole number of rows for each of the batch, which is no such dependence."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.layer(x).repeat_interleave(other.shape[0] // x.shape[0], 0) + other


@torch.no_grad()
def test_a_batch_that_is_compared_with_another_size() -> None:
    for with_its_own in (True, False):
        with pytest.raises(ValueError, match="depends on the batch's size"):
            fastnn.freeze(Compares(with_its_own).eval(), (torch.randn(3, 7, 6), torch.randn(5, 6)))
    model = Repeats(True).double().eval()
    frozen = fastnn.freeze(model, (torch.randn(4, 6).double(), torch.randn(8, 6).double()))
    given = torch.randn(3, 6).double(), torch.randn(6, 6).double()
    assert_close(frozen(*given), model(*given), rtol=1e-9, atol=1e-9)


class TakesParts(nn.Module):
    """Torch runs an operator on one of several results that a network has."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer, self.rnn = kind, nn.Linear(6, 6), nn.LSTM(6, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "chunk":
            return torch.logcumsumexp(self.layer(x).chunk(2, -1)[0], 1)
        if self.kind == "unbind":
            return torch.sort(self.layer(x).unbind(1)[0], -1)[0]
        return self.layer(self.rnn(x)[0].topk(2, dim=1)[0].sum(1))


@pytest.mark.parametrize("kind", ["chunk", "unbind", "rnn"])
@torch.no_grad()
def test_torch_takes_one_of_several_results(kind: str) -> None:
    torch.manual_seed(0)
    model = TakesParts(kind).double().eval()
    frozen = fastnn.freeze(model, torch.randn(3, 5, 6, dtype=torch.float64))
    for batch in (3, 1, 4):
        x = torch.randn(batch, 5, 6, dtype=torch.float64)
        assert_close(frozen(x), model(x), rtol=1e-9, atol=1e-9)


class WeightsFromSizes(nn.Module):
    """What torch computes of sizes alone, of the input's and of a value's, is used in the middle of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv1d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu()
        twos = torch.ones(y.size(2), dtype=y.dtype) * 2
        later = (twos[:, None] * twos[None]).triu(1)
        places = torch.arange(x.size(2) - 2, dtype=y.dtype)
        near = 0.5 ** (places[:, None] - places[None]).abs()
        return self.last(((y * twos) @ later + (y @ near) @ (twos[:, None] * twos).tril()).transpose(1, 2))


@torch.no_grad()
def test_what_follows_from_sizes_alone() -> None:
    torch.manual_seed(0)
    model = WeightsFromSizes().double().eval()
    frozen = fastnn.freeze(model, torch.randn(2, 3, 9, dtype=torch.float64))
    assert len([module for module in frozen.modules() if isinstance(module, fastnn.FrozenModel)]) == 1
    for sizes in ((2, 3, 9), (1, 3, 9), (5, 3, 6)):
        x = torch.randn(sizes, dtype=torch.float64)
        assert_close(frozen(x), model(x), rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(len(x), -1),
        lambda x: x / len(x),
        lambda x: x + torch.ones(len(x), 1, 4),
        lambda x: x[torch.arange(len(x)), 0],
        lambda x: x[:, : min(x.size(0), 3)],
        lambda x: x / max(len(x) - 1, 1),
        lambda x: x * x.size(0) ** -0.5,
        lambda x: x[: round(len(x) / 2)],
        lambda x: x[: math.ceil(len(x) / 2) + math.floor(len(x) / 4)],
    ],
)
def test_numbers_that_follow_from_the_batch(function: Callable[[Tensor], Tensor]) -> None:
    model = Calls(nn.Linear(4, 4), function).eval()
    frozen = fastnn.freeze(model, torch.randn(5, 6, 4))
    for one in (frozen, pickle.loads(pickle.dumps(frozen))):
        for batch in (1, 2, 3, 5, 8):
            x = torch.randn(batch, 6, 4)
            assert_close(one(x), model(x))


def test_a_state_of_as_many_rows_as_the_input() -> None:
    class States(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.fc = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.gru(x, torch.zeros(1, len(x), 5))[0][:, -1])

    model, x = States().eval(), torch.randn(3, 6, 4)
    frozen = fastnn.freeze(model, x)
    assert type(frozen) is fastnn.FrozenModel
    with torch.no_grad():
        assert_close(frozen(x[:2]), model(x[:2]))


class StepsFirst(nn.Module):
    """The transformer of PyTorch's tutorial: a table of positions, which limits the steps, and the steps first."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.randn(9, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 12)
        self.encoder, self.out = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(x + self.places[: x.size(0)]))


@torch.no_grad()
def test_steps_first() -> None:
    torch.manual_seed(0)
    model, x = StepsFirst().double().eval(), torch.randn(6, 4, 8, dtype=torch.float64)
    frozen = fastnn.freeze(model, x)
    assert isinstance(frozen, fastnn.FrozenModel)
    for batch in (4, 1, 7):
        x = torch.randn(6, batch, 8, dtype=torch.float64)
        assert_close(frozen(x), model(x), rtol=1e-9, atol=1e-9)


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "swapaxes": lambda x: x.swapaxes(1, 2),
    "movedim": lambda x: x.movedim(1, -1),
    "movedim back": lambda x: x.movedim(-1, 1),
    "mT": lambda x: x.mT,
    "narrow": lambda x: x.narrow(1, 1, 3),
    "narrow, to the end": lambda x: x.narrow(1, -2, 2),
    "larger": lambda x: torch.nn.functional.interpolate(x, size=9),
    "smaller": lambda x: torch.nn.functional.interpolate(x, size=3, mode="linear"),
    "rms": lambda x: torch.nn.functional.rms_norm(x, (6,), eps=0.1),
    "rms of small numbers": lambda x: torch.nn.functional.rms_norm(1e-8 * x, (6,)),
}


class Moves(nn.Module):
    def __init__(self, move: Callable[[Tensor], Tensor], slopes: int) -> None:
        super().__init__()
        self.move, self.conv = move, nn.Conv1d(5, 5, 3, padding=1)
        self.slope, self.out = nn.PReLU(slopes, init=-0.3), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.move(self.out(self.slope(self.conv(x))))


@pytest.mark.parametrize("slopes", [1, 5])
@pytest.mark.parametrize("name", MOVES)
@torch.no_grad()
def test_moves(name: str, slopes: int) -> None:
    torch.manual_seed(0)
    model = Moves(MOVES[name], slopes).double().eval()
    frozen = fastnn.freeze(model, torch.randn(3, 5, 6, dtype=torch.float64))
    assert isinstance(frozen, fastnn.FrozenModel)
    for batch in (3, 1, 4):
        x = torch.randn(batch, 5, 6, dtype=torch.float64)
        assert_close(frozen(x), model(x), rtol=1e-9, atol=1e-9)


class Places(nn.Module):
    """Numbers in a row, for an embedding and as a result."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.mean, self.fc, self.words = mean, nn.Linear(8, 8), nn.Embedding(7, 8)

    def forward(self, x: Tensor) -> Any:
        y = self.words(torch.arange(x.size(1)))
        return self.fc(x) + (y.mean(0) if self.mean else y), torch.arange(5)


@torch.no_grad()
def test_numbers_in_a_row() -> None:
    for mean in (False, True):
        model = Places(mean).eval()
        frozen = fastnn.freeze(model, torch.randn(3, 4, 8))
        for _ in range(2):
            x = torch.randn(2, 4, 8)
            found = frozen(x)
            assert_close(found, model(x))
            found[1].zero_()  # a new tensor at each call
        for run in (model, frozen):
            with pytest.raises((IndexError, RuntimeError)):
                run(torch.randn(2, 9, 8))


@torch.no_grad()
def test_a_slope_that_is_not_finite() -> None:
    for slope in (torch.inf, torch.nan):
        model = nn.Sequential(nn.Linear(4, 4), nn.PReLU(init=slope)).eval()
        x = torch.randn(3, 4)
        assert_close(fastnn.freeze(model, x)(x), model(x), equal_nan=True)


@torch.no_grad()
def test_columns_of_some_rows() -> None:
    """An embedding of a column that is cut reads the column that torch has cut."""

    class OfSome(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.fc = nn.Embedding(9, 3), nn.Linear(3, 2)

        def forward(self, numbers: Tensor) -> Tensor:
            return self.fc(self.words(numbers[:, 1:, 0]).sum(1) + self.words(numbers[:, -1, 1]))

    model, numbers = OfSome().eval(), torch.randint(0, 9, (5, 4, 2))
    frozen, fused = fastnn.freeze(model, numbers), fastnn.fuse(copy.deepcopy(model))
    for batch in (5, 1, 3):
        assert_close(frozen(numbers[:batch]), model(numbers[:batch]))
        assert_close(fused(numbers[:batch]), model(numbers[:batch]))


class Siren(nn.Module):
    """Each layer enlarges the rounding errors of the one before some fifteen times."""

    def __init__(self, factor: float = 30.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 64), nn.Linear(64, 64), nn.Linear(64, 64)])
        self.out, self.factor = nn.Linear(64, 1), factor

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(self.factor * layer(x))
        return self.out(x)


def test_a_model_that_enlarges_rounding_errors() -> None:
    torch.manual_seed(0)
    model, x = Siren(), torch.rand(300, 2) * 2 - 1
    exact = copy.deepcopy(model).double()(x.double()).detach()
    with torch.no_grad():
        results = (fastnn.freeze(model, x)(x), model(x))
    ours, models = (float((one.double() - exact).abs().max()) for one in results)
    assert ours <= 4 * models
    with pytest.raises(ValueError, match="with other values"):  # of which float32 leaves nothing
        fastnn.freeze(Siren(3000.0), x)


class Stateful(nn.Module):
    """Keeps something from one call to the next in a plain attribute. kind: what it keeps."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(6, 6), kind
        self.calls, self.earlier = 0, []  # type: ignore[var-annotated]

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        y = self.layer(x)
        if self.kind == "a number":
            return y * self.calls
        if self.kind == "a list":
            self.earlier.append(1.5)
            return y * sum(self.earlier)
        if self.kind == "refuses" and self.calls > 1:
            raise AssertionError("only once")
        return y


def test_models_that_keep_something_between_calls() -> None:
    x = torch.rand(3, 6)
    for kind, words in [("a number", "something else"), ("a list", "something else"),
                        ("refuses", "second call fails: only once")]:  # fmt: skip
        with pytest.raises(ValueError, match=f"Stateful keeps something from one call to the next.*{words}"):
            fastnn.freeze(Stateful(kind).eval(), x)
    model = Stateful("nothing that its results depend on").eval()
    with torch.no_grad():
        assert_close(fastnn.freeze(model, x)(x), model(x))


class WithConstants(nn.Module):
    """Returns what does not depend on its input, or only on its size."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(40.0).reshape(10, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        twice = self.table * 2
        repeated = (self.table[0] * 2).expand(x.shape[0], 4)
        return self.layer(x), twice, repeated.unsqueeze(1), twice, self.layer.weight.detach().sum(0)


def test_constant_results_are_new_at_each_call() -> None:
    """The caller may change them in place."""
    model, x = WithConstants().eval(), torch.rand(3, 4)
    frozen = fastnn.freeze(model, x)
    with torch.no_grad():
        expected = model(x)
        for _ in range(3):
            results = frozen(x)
            assert_close(results, expected)
            for result in results:
                result += 10
    assert_close(pickle.loads(pickle.dumps(frozen))(x), tuple(one.detach() for one in expected))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("large", [3e38, torch.inf, torch.nan])
@pytest.mark.parametrize("place", ["weight", "input"])
def test_convolution_of_numbers_that_transforms_would_spoil(place: str, large: float, channels_last: bool) -> None:
    """Packed or not, a weight or an input with such numbers is multiplied directly, and spoils no pixel beside them."""
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 32, 3, padding=1)
    model = nn.Sequential(conv, nn.Sigmoid()).eval()
    x = torch.randn(2, 32, 12, 12).contiguous(
        memory_format=torch.channels_last if channels_last else torch.preserve_format
    )
    if place == "weight":
        with torch.no_grad():
            conv.weight[3, 4, 1, 1] = large
    frozen = fastnn.freeze(model, x.clone())
    if place == "input":
        x[1, 5, 6, 7] = large
    with torch.no_grad():
        assert_close(frozen(x), model(x), equal_nan=True)


@pytest.mark.parametrize("example_is_last", [False, True])
@pytest.mark.parametrize("kind", ["images", "signals", "in parts", "reshaped"])
def test_inputs_channels_last(kind: str, example_is_last: bool) -> None:
    """An input may lie in either format, whichever the example had, and the model may have been saved before."""
    torch.manual_seed(0)
    signals = kind == "signals"
    conv: Any = nn.Conv1d if signals else nn.Conv2d
    rest = {
        "images": [conv(20, 7, 1), nn.Sigmoid()],
        "signals": [conv(20, 7, 3, padding=1)],
        "in parts": [CumulativeProduct(), conv(20, 7, 3, stride=2)],
        "reshaped": [nn.Flatten(), nn.Linear(20 * 99, 5)],
    }[kind]
    model = nn.Sequential(conv(18, 20, 3, padding=1), nn.ReLU(), *rest).eval()
    contiguous = torch.randn(3, 18, *([37] if signals else [9, 11]))
    last = contiguous.movedim(1, -1).contiguous().movedim(-1, 1)
    frozen = fastnn.freeze(model, last if example_is_last else contiguous)
    old = frozen.__getstate__()
    if isinstance(frozen, fastnn.FrozenModel):
        del old["_channels_last"]
    else:
        old["parts"] = [part[:6] for part in old["parts"]]
    saved_by_older_version = type(frozen).__new__(type(frozen))
    saved_by_older_version.__setstate__(old)
    with torch.no_grad():
        for one in (frozen, pickle.loads(pickle.dumps(frozen)), saved_by_older_version):
            for x in (contiguous, last, last[1:], torch.cat([last, last])[::2], last[:0]):
                if kind != "reshaped" or x.shape[0]:
                    assert_close(one(x), model(x))
