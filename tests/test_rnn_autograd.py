"""Differentiation and tracing of the recurrent op: gradcheck, torch.func, torch.compile, torch.export."""

import shutil

import pytest
import torch
from fusing import package
from rnn_common import (
    CELLS,
    NETWORKS,
    clone_wanting_gradients,
    pair,
    plain_cell,
    plain_network,
    random_state,
    run,
    tensors_of,
)
from torch.nn.utils.rnn import pack_sequence

from fastnn import nn


@pytest.mark.parametrize("features", [{}, {"bidirectional": True, "num_layers": 2}, {"bias": False}], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_gradcheck(name, features):
    _, ours = pair(name, 3, 4, dtype=torch.float64, **features)
    parameters = dict(ours.named_parameters())
    input = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    state = clone_wanting_gradients(random_state(ours, 2, torch.float64))
    states = tensors_of([state])

    def call(input, *rest):
        hx = rest[: len(states)] if name == "LSTM" else rest[0]
        weights = dict(zip(parameters, rest[len(states) :], strict=True))
        return tuple(tensors_of(torch.func.functional_call(ours, weights, (input, hx))))

    arguments = (input, *states, *parameters.values())
    assert torch.autograd.gradcheck(call, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, arguments, fast_mode=True)


@pytest.mark.parametrize("name", CELLS)
def test_cells_gradgradcheck(name):
    _, ours = pair(name, 3, 4, dtype=torch.float64)
    parameters = dict(ours.named_parameters())
    input, *state = (torch.randn(2, size, dtype=torch.float64, requires_grad=True) for size in (3, 4, 4))

    def call(input, h, c, *weights):
        hx = (h, c) if name == "LSTMCell" else h
        return torch.func.functional_call(ours, dict(zip(parameters, weights, strict=True)), (input, hx))

    arguments = (input, *state, *parameters.values())
    assert torch.autograd.gradcheck(call, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, arguments, fast_mode=True)


@pytest.mark.parametrize("name", NETWORKS)
def test_packed_gradgradcheck(name):
    _, ours = pair(name, 3, 4, dtype=torch.float64, bidirectional=True)
    packed = pack_sequence([torch.randn(n, 3, dtype=torch.float64) for n in (3, 2, 2)])

    def call(data):
        output, final = ours(packed._replace(data=data))
        return tuple(tensors_of([output.data, final]))

    data = packed.data.clone().requires_grad_()
    assert torch.autograd.gradcheck(call, (data,), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (data,), fast_mode=True)


@pytest.mark.parametrize("name", NETWORKS)
def test_some_gradients_only(name):
    """Gradients of one output alone, and for one argument alone."""
    stock, ours = pair(name, 3, 20, 2)
    for used in (0, 1):
        grads = []
        for module in (stock, ours):
            module.zero_grad()
            tensors_of(module(torch.ones(4, 2, 3)))[used].sum().backward()
            grads.append([p.grad for p in module.parameters()])
        for e, a in zip(*grads, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    ours.requires_grad_(False)
    stock.requires_grad_(False)
    for e, a in zip(run(stock, torch.ones(4, 2, 3))[1], run(ours, torch.ones(4, 2, 3))[1], strict=True):
        assert (e is None) == (a is None)
        if e is not None:
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("name", NETWORKS)
def test_func_transforms(name):
    stock, ours = pair(name, 3, 5, dtype=torch.float64)
    parameters = {n: p.detach() for n, p in stock.named_parameters()}

    def loss(module):
        def call(parameters, input):
            return torch.func.functional_call(module, parameters, (input,))[0].square().sum()

        return call

    batch = torch.randn(4, 6, 2, 3, dtype=torch.float64)
    for transform in (
        lambda f: torch.func.grad(f)(parameters, batch[0]),
        lambda f: torch.func.vmap(torch.func.grad(f), (None, 0))(parameters, batch),
        lambda f: torch.func.vmap(f, (None, 0))(parameters, batch),
        lambda f: torch.func.jacrev(f)(parameters, batch[0]),
    ):
        expected, actual = transform(loss(plain_network(ours))), transform(loss(ours))
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", CELLS)
def test_func_transforms_of_cells(name):
    _, ours = pair(name, 3, 4, dtype=torch.float64)
    parameters = {n: p.detach() for n, p in ours.named_parameters()}
    batch = torch.randn(5, 2, 3, dtype=torch.float64)

    def loss(module):
        def call(parameters, input):
            return sum(t.square().sum() for t in tensors_of([torch.func.functional_call(module, parameters, (input,))]))

        return call

    for transform in (
        lambda f: torch.func.grad(f)(parameters, batch[0]),
        lambda f: torch.func.vmap(torch.func.grad(f), (None, 0))(parameters, batch),
        lambda f: torch.func.jacrev(f)(parameters, batch[0]),
        lambda f: torch.func.jvp(lambda x: f(parameters, x), (batch[0],), (batch[1],)),
    ):
        torch.testing.assert_close(transform(loss(ours)), transform(loss(plain_cell(ours))))


@pytest.mark.parametrize("name", NETWORKS)
def test_forward_mode(name):
    _, ours = pair(name, 3, 4, dtype=torch.float64)
    primal, tangent = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    _, actual = torch.func.jvp(lambda x: ours(x)[0], (primal,), (tangent,))
    _, expected = torch.func.jvp(lambda x: plain_network(ours)(x)[0], (primal,), (tangent,))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", NETWORKS + CELLS)
def test_batches_of_gradients(name):
    """`is_grads_batched` and `vectorize`: a vmap of autograd's own, which is none of torch.func's."""
    _, ours = pair(name, 3, 4, dtype=torch.float64)
    sizes = (3, 2, 3) if name in NETWORKS else (2, 3)
    input = torch.randn(sizes, dtype=torch.float64, requires_grad=True)
    call = lambda x: tuple(tensors_of(ours(x)) if name in NETWORKS else tensors_of([ours(x)]))  # noqa: E731
    output = call(input)[0]
    batch = torch.randn(4, *output.shape, dtype=torch.float64)
    actual = torch.autograd.grad(output, [input, *ours.parameters()], batch, is_grads_batched=True, retain_graph=True)
    rows = [torch.autograd.grad(output, [input, *ours.parameters()], row, retain_graph=True) for row in batch]
    torch.testing.assert_close(actual, tuple(torch.stack(parts) for parts in zip(*rows, strict=True)))
    jacobians = [torch.autograd.functional.jacobian(call, input.detach(), vectorize=v) for v in (False, True)]
    torch.testing.assert_close(*jacobians)
    assert torch.autograd.gradcheck(call, (input,), check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (input,), check_batched_grad=True, fast_mode=True)


@pytest.mark.parametrize("name", NETWORKS)
def test_compile_fullgraph(name):
    _, ours = pair(name, 3, 8, 2, batch_first=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    input = torch.randn(4, 5, 3)
    expected, expected_grads = run(ours, input)
    actual, actual_grads = run(compiled, input)
    for a, e in zip([*actual, *actual_grads], [*expected, *expected_grads], strict=True):
        torch.testing.assert_close(a, e)
    with torch.no_grad():
        torch.testing.assert_close(compiled(input)[0], expected[0])


def test_compile_fullgraph_of_one_tensor_in_two_places():
    """A loop of cells often begins with h and c that are the same zeros."""
    lstm, cell, gru = nn.LSTM(3, 3), nn.LSTMCell(3, 3), nn.GRUCell(3, 3)

    def call(x):
        return lstm(x, (x, x))[0], cell(x[0], (x[0], x[0]))[1], (lambda row: gru(row, row))(x[0])

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 2, 3, requires_grad=True)
    results = []
    for run_call in (call, compiled):
        outputs = run_call(x)
        results.append((outputs, torch.autograd.grad([output.sum() for output in outputs], x)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", NETWORKS)
def test_export_with_dynamic_shapes(name):
    length, batch = torch.export.Dim("length", min=2, max=100), torch.export.Dim("batch", min=2, max=100)
    for batch_first in (False, True):
        _, ours = pair(name, 3, 8, 2, bidirectional=True, batch_first=batch_first)
        ours.requires_grad_(False)
        shapes = {0: batch, 1: length} if batch_first else {0: length, 1: batch}
        program = torch.export.export(ours, (torch.randn(5, 4, 3),), dynamic_shapes=(shapes,))
        for sizes in [(9, 7, 3), (2, 50, 3)]:
            input = torch.randn(sizes)
            for a, e in zip(tensors_of(program.module()(input)), tensors_of(ours(input)), strict=True):
                torch.testing.assert_close(a, e)


@pytest.mark.parametrize("name", CELLS)
def test_export_cells_with_dynamic_batch(name):
    _, ours = pair(name, 3, 8)
    ours.requires_grad_(False)
    batch = torch.export.Dim("batch", min=2, max=100)
    program = torch.export.export(ours, (torch.randn(4, 3),), dynamic_shapes=({0: batch},))
    input = torch.randn(9, 3)
    torch.testing.assert_close(tensors_of([program.module()(input)]), tensors_of([ours(input)]))


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_export_gives_the_state_that_a_call_leaves_out(wants_gradient):
    """AOTInductor's packages cannot hand an operator an empty list."""
    for make, sizes in (
        (lambda: nn.RNN(4, 3), (5, 2, 4)),
        (lambda: nn.GRU(4, 3, 2, batch_first=True, bidirectional=True), (5, 2, 4)),
        (lambda: nn.LSTM(4, 3, proj_size=2), (5, 2, 4)),
        (lambda: nn.LSTM(4, 3), (5, 4)),
        (lambda: nn.GRUCell(4, 3), (2, 4)),
        (lambda: nn.LSTMCell(4, 3), (2, 4)),
    ):
        module, x = make().requires_grad_(wants_gradient), torch.randn(sizes)
        exported = torch.export.export(module, (x,))
        lists = [
            argument
            for node in exported.graph.nodes
            if str(node.target).startswith("fastnn.rnn")
            for argument in node.args
            if isinstance(argument, (list, tuple))
        ]
        assert all(lists)
        torch.testing.assert_close(exported.module()(x), module(x))


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a compiler")
@pytest.mark.filterwarnings("ignore")  # torch's, of its own code
def test_aot_inductor(tmp_path):
    class All(torch.nn.Module):
        """One package of all, since compiling takes its time."""

        def __init__(self):
            super().__init__()
            self.networks = torch.nn.ModuleList([nn.RNN(4, 4), nn.GRU(4, 4), nn.LSTM(4, 4)])
            self.cells = torch.nn.ModuleList([nn.RNNCell(4, 4), nn.GRUCell(4, 4), nn.LSTMCell(4, 4)])

        def forward(self, x):
            return [network(x) for network in self.networks], [cell(x[0]) for cell in self.cells]

    model, x = All().eval(), torch.randn(5, 2, 4)
    path = package(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), model(x))


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_compile_fullgraph_under_autocast(name):
    module = getattr(nn, name)(4, 3)
    x = torch.randn(5, 2, 4) if name in NETWORKS else torch.randn(2, 4)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), module(x))
