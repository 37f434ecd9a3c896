"""fastnn.kernels.mlp.launch against the reference in float64."""

from itertools import pairwise

import pytest
import torch

from fastnn.activations import NAMES, join, parse_one
from fastnn.kernels import _target
from fastnn.kernels.mlp import launch as kernels
from fastnn.kernels.mlp import plan as _mlp_plan
from fastnn.ops.mlp import join_parameters
from fastnn.reference.mlp import mlp as reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(rows, widths, dtype, device, bias=True):
    input = torch.randn(rows, widths[0]).to(device, dtype)
    weights = [(torch.randn(o, i) / i**0.5).to(device, dtype) for i, o in pairwise(widths)]
    biases = [torch.randn(w.shape[0]).to(device, dtype) if bias else None for w in weights]
    return input, weights, biases


def check(rows, widths, names, dtype, device, assert_near, bias=True):
    """Forward and every gradient of one chain."""
    input, weights, biases = make(rows, widths, dtype, device, bias)
    grad = torch.randn(rows, widths[-1]).to(input)
    check_on(input, weights, biases, grad, names, assert_near)


def check_on(input, weights, biases, grad, names, assert_near, dtype=torch.float64):
    """-> output and the input's gradient, by the reference in ``dtype``."""
    activations = join(names)
    exact = [t.to("cpu", dtype).requires_grad_() for t in (input, *weights)]
    exact_biases = [None if b is None else b.to("cpu", dtype).requires_grad_() for b in biases]
    expected = reference(exact[0], exact[1:], exact_biases, names)
    output, hidden = kernels.mlp_with_hidden(input, join_parameters(weights, biases), activations)
    assert_near(output, expected.detach())
    again = kernels.mlp(input, join_parameters(weights, biases), activations)
    torch.testing.assert_close(again, output, rtol=0, atol=0, equal_nan=True)

    wanted = [*exact, *(b for b in exact_biases if b is not None)]
    gradients = torch.autograd.grad(expected, wanted, grad.to(expected))
    grad_input, grad_weights, grad_biases = kernels.mlp_backward(
        grad, input, weights, activations, output, hidden, True, True, True
    )
    actual = [grad_input, *grad_weights, *(g for g, b in zip(grad_biases, biases, strict=True) if b is not None)]
    for got, want in zip(actual, gradients, strict=True):
        assert_near(got, want, factor=4)
    return expected.detach(), gradients[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(10, 8, 5, 8, 10), (40, 17, 3), (100, 33, 16, 90)])
def test_chain(widths, dtype, device, assert_near):
    check(21, widths, ("tanh", "sigmoid", "identity", "tanh")[: len(widths) - 1], dtype, device, assert_near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_all_layers_on_chip(dtype, device, assert_near, monkeypatch):
    monkeypatch.setattr(_mlp_plan, "is_resident", lambda *_: True)
    few = _target.Target("cuda", 90, 232448, 2)
    with _target.assume_target(few):
        check(150, (10, 20, 5, 12), ("relu", "gelu", "tanh"), dtype, device, assert_near)


@pytest.mark.parametrize("name", [*NAMES, "leaky_relu(0.3)", "elu(0.5)", "softplus(3.0,2.0)", "hardtanh(-0.5,2.0)"])
def test_every_activation(name, device, assert_near):
    before = "tanh" if name == "exp" else name  # of exp of exp nothing is left but infinities
    check(19, (7, 12, 9, 6), (before, before, name), torch.float32, device, assert_near)


@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_one_layer_with_fused_epilogue(name, device, assert_near):
    check(19, (40, 20), (name,), torch.float16, device, assert_near)
    check(19, (40, 20), (name,), torch.float32, device, assert_near, bias=False)


def test_wide_layers_take_one_launch_each(device, assert_near):
    widths = (20, 300, 24)
    target = _target.target_of(device)
    assert _mlp_plan.chain_config(widths, 18, torch.float32, "ieee", target) is None
    check(18, widths, ("silu", "identity"), torch.float32, device, assert_near)


def test_float64_and_empty_sizes_take_stocks_path(device):
    for rows, widths, dtype in [
        (0, (4, 3, 2), torch.float32),
        (3, (0, 4, 2), torch.float32),
        (3, (4, 3), torch.float64),
    ]:
        input, weights, biases = make(rows, widths, dtype, device)
        names, activations = ["relu"] * len(weights), join(["relu"] * len(weights))
        output, hidden = kernels.mlp_with_hidden(input, join_parameters(weights, biases), activations)
        torch.testing.assert_close(output, reference(input, weights, biases, names))
        gradients = kernels.mlp_backward(output, input, weights, activations, output, hidden, True, True, True)
        assert gradients[0].shape == input.shape
        assert [g.shape for g in gradients[1]] == [w.shape for w in weights]


def test_nan_passes_and_relus_gradient_there_is_one(device):
    input, weights, biases = make(17, (6, 8, 5), torch.float32, device)
    input[3] = float("nan")
    output, hidden = kernels.mlp_with_hidden(input, join_parameters(weights, biases), "relu|relu")
    assert output[3].isnan().all()
    assert not output[4].isnan().any()
    grad_input = kernels.mlp_backward(output, input, weights, "relu|relu", output, hidden, True, False, False)[0]
    assert grad_input[3].isnan().all()
    assert not grad_input[4].isnan().any()


INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=["chain", "resident chain", "layer"])
def widths(request, monkeypatch):
    """Off every tile, of layers that one kind of kernels runs."""
    if request.param == "layer":
        return (5, 7)
    monkeypatch.setattr(_mlp_plan, "is_resident", lambda *_: request.param == "resident chain")
    return (5, 7, 7, 4)


def make_positive(widths, dtype, device):
    """Sums with one inf are inf, never inf - inf: with NaN in the reference too, nothing would be seen of one that
    comes from a lane beside them."""
    input, weights, biases = make(19, widths, dtype, device)
    for tensor in (input, *weights, *biases):
        tensor.abs_()
    return input, weights, biases


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("name", ["relu", "sigmoid", "silu"])
def test_rows_that_are_not_finite(name, value, widths, device, assert_near):
    input, weights, biases = make_positive(widths, torch.float32, device)
    names = (name,) * len(weights)
    grad = torch.rand(19, widths[-1], device=device)
    input[3, 1] = value
    output, grad_input = check_on(input, weights, biases, grad, names, assert_near)
    assert value != INF or not output.isnan().any()
    assert torch.cat([grad_input[:3], grad_input[4:]]).isfinite().all()


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("name", ["relu", "sigmoid", "silu"])
def test_gradients_that_are_not_finite(name, value, widths, device, assert_near):
    input, weights, biases = make_positive(widths, torch.float32, device)
    grad = torch.rand(19, widths[-1], device=device)
    grad[3, 1] = value
    _, grad_input = check_on(input, weights, biases, grad, (name,) * len(weights), assert_near)
    assert (grad_input[3].isnan() if value != value else grad_input[3] == value).all()
    assert torch.cat([grad_input[:3], grad_input[4:]]).isfinite().all()


@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
def test_overflow(name, widths, device, assert_near):
    """Of float16, forward in one row and backward in another, far from where rounding decides."""
    input, weights, biases = make_positive(widths, torch.float16, device)
    for weight in weights:
        weight.mul_(4)
    grad = torch.rand(19, widths[-1]).to(input)
    input[3], grad[3], grad[4] = 65504, 1e-6, 65504
    names = (name,) * len(weights)
    output, grad_input = check_on(input, weights, biases, grad, names, assert_near, torch.float16)
    assert output[3].isinf().all()
    assert grad_input[4].isinf().all()
    assert not output.isnan().any()


def test_non_contiguous_arguments(device, assert_near):
    input, weights, biases = make(18, (6, 8, 5), torch.float32, device)
    strided = [t.t().contiguous().t() for t in (input, *weights)]
    expected = kernels.mlp(input, join_parameters(weights, biases), "tanh|identity")
    torch.testing.assert_close(
        kernels.mlp(strided[0], join_parameters(strided[1:], biases), "tanh|identity"), expected, rtol=0, atol=0
    )


def test_gradients_that_are_not_wanted_are_empty(device):
    input, weights, biases = make(18, (6, 8, 5), torch.float32, device)
    output, hidden = kernels.mlp_with_hidden(input, join_parameters(weights, biases), "tanh|identity")
    gradients = kernels.mlp_backward(output, input, weights, "tanh|identity", output, hidden, False, False, False)
    assert gradients[0].shape == (0, 6)
    assert gradients[1:] == ([], [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(input=a["input"][0]), "expected input to be 2D"),
        (lambda a: a.update(input=a["input"].to(torch.int32)), "not implemented for"),
        (lambda a: a.update(activations="", parameters=[]), "expected an activation a layer"),
        (lambda a: a.update(parameters=a["parameters"][1::-1]), "cannot be multiplied"),
        (lambda a: a.update(parameters=[a["parameters"][0].double(), a["parameters"][1]]), "dtype"),
        (lambda a: a.update(parameters=[a["parameters"][0].to("meta"), a["parameters"][1]]), "same device"),
        (lambda a: a.update(parameters=a["parameters"][:3]), "expected 2 weights and 2 or no biases"),
        (lambda a: a.update(parameters=a["parameters"][:2] + a["parameters"][:1:-1]), "expected biases of size"),
        (lambda a: a.update(activations="relu"), "expected 1 weights"),
        (lambda a: a.update(activations="relu|gelo"), "expected an activation a layer"),
    ],
)
def test_forward_refuses(change, message, device):
    input, weights, biases = make(4, (6, 8, 5), torch.float32, device)
    arguments = {"input": input, "parameters": [*weights, *biases], "activations": "relu|identity"}
    change(arguments)
    with pytest.raises(RuntimeError, match=message):
        kernels.mlp(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(grad_output=a["grad_output"][1:]), "expected grad_output of size"),
        (lambda a: a.update(output=a["output"][1:]), "expected hidden of size"),
        (lambda a: a.update(hidden=[]), "expected 1 hidden tensors, got 0"),
        (lambda a: a.update(hidden=a["hidden"] * 2), "expected 1 hidden tensors, got 2"),
        (lambda a: a.update(hidden=[a["hidden"][0].double()]), "dtype"),
    ],
)
def test_backward_refuses(change, message, device):
    input, weights, biases = make(4, (6, 8, 5), torch.float32, device)
    output, hidden = kernels.mlp_with_hidden(input, join_parameters(weights, biases), "relu|identity")
    arguments = {"grad_output": output, "input": input, "weights": weights, "activations": "relu|identity",
                 "output": output, "hidden": hidden, "input_wanted": True, "weights_wanted": True,
                 "biases_wanted": True}  # fmt: skip
    change(arguments)
    with pytest.raises(RuntimeError, match=message):
        kernels.mlp_backward(**arguments)


def test_choice_of_kernel():
    half, target = torch.bfloat16, _target.TARGETS[2]
    narrow = (64, 128, 128, 64)
    assert _mlp_plan.chain_config(narrow, 65536, half, "ieee", target).block_rows == 128
    config = _mlp_plan.chain_config(narrow, 65536, half, "ieee", target)
    assert not _mlp_plan.is_resident(narrow, 65536, half, "ieee", config, target)
    assert _mlp_plan.is_resident(narrow, 131072, half, "ieee", config, target)
    assert not _mlp_plan.is_resident(narrow, 131072, half, "ieee", config, _target.TARGETS[3])
    # Two of 64 wide programs fit a processor, one of 128; and each has four tiles.
    for width, rows, programs in ((64, 135168, 264), (64, 101376, 198), (64, 67584, 132), (128, 135168, 132)):
        config = _mlp_plan.chain_config([width] * 5, rows, half, "ieee", target)
        assert _mlp_plan.resident_programs([width] * 5, rows, half, config, target) == programs
    assert not _mlp_plan.is_resident((256, 128, 128), 131072, half, "ieee", config, target)
    assert _mlp_plan.chain_config(narrow, 32, half, "ieee", target).block_rows == 16
    assert _mlp_plan.chain_config((64, 256, 256, 64), 65536, half, "ieee", target) is not None
    assert _mlp_plan.chain_config((64, 512, 64), 65536, half, "ieee", target) is None
    assert _mlp_plan.chain_config(narrow, 65536, torch.float32, "ieee", target) is None
    assert _mlp_plan.chain_config(narrow, 65536, torch.float32, "tf32", target) is not None
    assert _mlp_plan.chain_config((64, 256, 256, 64), 65536, half, "ieee", _target.TARGETS[1]) is None
    for rows, backward, fused in [(131072, False, True), (131072, True, False), (64, True, True)]:
        config = _mlp_plan.chain_config([64] * 5, rows, torch.float32, "ieee", target, backward)
        assert (config is not None) == fused
    assert _mlp_plan.layer_config(65536, 4096, 4096, parse_one("relu"), half, "ieee", target) is None
    assert _mlp_plan.layer_config(65536, 256, 1024, parse_one("relu"), half, "ieee", target) is not None
    assert _mlp_plan.layer_config(65536, 256, 1024, parse_one("identity"), half, "ieee", target) is None
