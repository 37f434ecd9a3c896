"""fastnn.freeze: the frozen model computes what the model does, for any batch, from any thread, after any journey."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import fastnn
from fastnn import models, nn
from fastnn.testing import using_threads


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
    with torch.profiler.profile() as profile, torch.inference_mode():
        frozen(example)
    assert {event.key for event in profile.key_averages() if "fastnn" in event.key} == {"fastnn::frozen"}
    with pytest.raises(RuntimeError, match="no hooks"):
        frozen.register_forward_hook(print)
    leaf = example.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient of its own"):
        frozen(leaf).sum().backward()


@pytest.mark.parametrize("name", ["cnn", "rnn", "autoencoder"])
def test_saved_loaded_copied_exported(name: str, tmp_path: Path) -> None:
    model, example = make(name)
    frozen = fastnn.freeze(model, example)
    expected = frozen(example)
    buffer = io.BytesIO()
    torch.save(frozen, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(example), expected)
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


class CellState(LastStep):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[1][1][-1]


class FirstLayersState(LastStep):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[1][0]


@pytest.mark.parametrize(
    ("model", "sizes", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)), (3, 4), r"softmax.*of layer '1' .*Softmax"),
        (lambda: nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), (3, 4), "relu.*does not follow a Linear"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(0.5)), (3, 4), "a slope other than 0.01"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), (3, 3, 8, 8), r"conv2d.*of layer '0' .*Conv2d"),
        (lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))), (3, 4), "of layer '0.1'"),
        (Residual, (3, 4), "add"),
        (TwoResults, (3, 4), "one tensor"),
        (lambda: CellState(nn.LSTM(4, 4)), (3, 2, 4), "rnn.*second result"),
        (lambda: FirstLayersState(nn.RNN(4, 4, 2)), (3, 2, 4), "rnn.*second result"),
        (lambda: FirstLayersState(nn.GRU(4, 4, bidirectional=True)), (3, 2, 4), "rnn.*second result"),
        (lambda: nn.Linear(4, 4, dtype=torch.bfloat16), (3, 4), "float32 or float64"),
    ],
)
def test_refuses_what_it_cannot_hold(model: Any, sizes: tuple[int, ...], message: str) -> None:
    model = model()
    with pytest.raises(ValueError, match=message):
        fastnn.freeze(model, torch.randn(sizes, dtype=next(model.parameters()).dtype))


def test_bad_input() -> None:
    frozen = fastnn.freeze(*make("cnn"))
    for bad in (torch.randn(2, 4, 20, 20), torch.randn(2, 3, 200, 200), torch.randn(3, 20), torch.randn(2, 3, 1, 1)):
        with pytest.raises(RuntimeError):
            frozen(bad)
    for bad in (torch.randn(2, 3, 20, 20).double(), torch.randn(2, 3, 20, 20).half(), torch.zeros(2, 3, 20, 20).int()):
        with pytest.raises(RuntimeError):
            frozen(bad)


def test_raw_operators_are_safe() -> None:
    frozen = fastnn.freeze(*make("autoencoder"))
    example, weights, packed = torch.randn(4, 10), frozen.weights, frozen.packed
    run, program = torch.ops.fastnn.frozen, frozen._program
    expected = frozen(example)
    hostile = [
        *("", ";", "mlp", "mlp;", "mlp 1 10;", "other 1 2;", program[:-1], program + "mlp 1 10 10 0;", "flatten 1;"),
        *("mlp 1 10 8 9;", "mlp 2 10 8 0;", "mlp 1 -1 8 0;", f"mlp 0 {2**31} {2**31} 0;", f"mlp 0 {'9' * 40} 1 0;"),
        *(
            "conv 2 1 10;",
            "conv 9 1 1 1;",
            "conv 2 0 1 1 1 1 0 0 0 0;",
            "rnn 0 1 1 1 1 1 10;",
            "rnn 9 9 9 9 9 9 9 9 9;",
        ),
        *(f"rnn 0 {2**31} 2 1 0 0 1 {2**31} 0;", "rnn 0 1 1 1 0 0 0 0 0;", "\0", "mlp 1 10 8 1\0;", "flatten;"),
    ]
    for text in hostile:
        with pytest.raises(RuntimeError):
            run(example, weights, packed, text)
        with pytest.raises(RuntimeError):
            torch.ops.fastnn.frozen_packed(weights, text, [4, 10])
    for bad in (weights[:-1], weights[None], weights.double(), torch.cat([weights, weights[:1]]), weights[::2]):
        with pytest.raises(RuntimeError):
            run(example, bad, packed, program)
    for sizes in ([], [4], [-1, 10], [4, 11], [2**62, 2**62]):
        with pytest.raises(RuntimeError):
            torch.ops.fastnn.frozen_packed(weights, program, sizes)
    # Packed weights that do not fit are not used.
    for other in (packed[:0], packed[:100], packed[:-64], torch.zeros_like(packed), torch.full_like(packed, 255)):
        assert_close(run(example, weights, other.contiguous(), program), expected)
    with pytest.raises(RuntimeError, match="uint8"):
        run(example, weights, packed.int(), program)
    torch.library.opcheck(run, (example, weights, packed, program))


def test_unpacked_operator_is_safe() -> None:
    model, example = make("autoencoder")
    program = fastnn.freeze(model, example)._program
    run, parameters = torch.ops.fastnn.frozen_unpacked, [p.detach() for p in model.parameters()]
    expected = model(example).detach()
    assert_close(run(example, parameters, program), expected)
    with pytest.raises(RuntimeError, match=r"expected weight 0 of size \[8, 10\], got \[10, 8\]"):
        run(example, [parameters[0].reshape(10, 8), *parameters[1:]], program)
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
            run(example, bad, program)
    with pytest.raises(RuntimeError, match="BFloat16"):
        run(example.bfloat16(), [p.bfloat16() for p in parameters], program)
    strided = [p.repeat_interleave(2, 0)[::2] for p in parameters]
    assert_close(run(example.t().contiguous().t(), strided, program), expected)
    torch.library.opcheck(run, (example, parameters, program))
