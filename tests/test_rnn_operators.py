"""torch.ops.fastnn.rnn and its relatives called raw: schema, fake kernels, and refusal of whatever does not fit."""

import pytest
import torch
from rnn_common import clone_wanting_gradients, pair

from fastnn.recurrent_modes import NUMBER_OF


def raw_arguments(mode, dtype=torch.float32, bidirectional=True, layers=2, state=True):
    name = mode.partition("_")[0]
    _, ours = pair(name, 3, 5, layers, bidirectional=bidirectional, dtype=dtype)
    weights = [p.detach() for p in ours.parameters()]
    given = [torch.randn(layers * (2 if bidirectional else 1), 2, 5, dtype=dtype)] * (2 if name == "LSTM" else 1)
    input = torch.randn(4, 2, 3, dtype=dtype)
    number = NUMBER_OF[mode]
    return [input, None, given if state else [], weights, None, number, layers, bidirectional, False]


def raw_cell_arguments(arguments):
    """A cell's arguments from a network's."""
    h, c = (*(s[0] for s in arguments[2]), None)[:2]
    return [arguments[0][0], arguments[5], h, c, *arguments[3][:4]]


@pytest.mark.parametrize("mode", NUMBER_OF)
def test_opcheck(mode):
    arguments = raw_arguments(mode)
    ops = torch.ops.fastnn
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.rnn.default, arguments, test_utils=tests)
    torch.library.opcheck(ops.rnn_with_reserve.default, arguments, test_utils=tests)
    output, final, reserve = ops.rnn_with_reserve(*arguments)
    backward = [output, list(final), *arguments[:5], output, reserve, *arguments[5:], True, True, True]
    torch.library.opcheck(ops.rnn_backward.default, backward, test_utils=tests)
    cell = raw_cell_arguments(arguments)
    torch.library.opcheck(ops.rnn_cell.default, cell, test_utils=tests)

    input, _, h, c, *weights = cell
    state = [s for s in (h, c) if s is not None]
    arguments = [input, None, state, weights, None, arguments[5], 1, False, False]
    output, final, reserve = ops.rnn_with_reserve(*arguments)
    torch.library.opcheck(ops.rnn_with_reserve.default, arguments, test_utils=tests)
    backward = [None, list(final), *arguments[:5], output, reserve, *arguments[5:], True, True, True]
    torch.library.opcheck(ops.rnn_backward.default, backward, test_utils=tests)


def test_opcheck_with_projection():
    ops = torch.ops.fastnn
    sizes = [(20, 3), (20, 2), (20,), (20,), (2, 5)], [(20, 2), (20, 2), (20,), (20,), (2, 5)]
    weights = [torch.randn(size) for layer in sizes for size in layer]
    state = [torch.randn(2, 4, size) for size in (2, 5)]
    arguments = [torch.randn(6, 4, 3), None, state, weights, None, NUMBER_OF["LSTM"], 2, False, False]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.rnn_with_reserve.default, arguments, test_utils=tests)
    output, final, reserve = ops.rnn_with_reserve(*arguments)
    backward = [output, list(final), *arguments[:5], output, reserve, *arguments[5:], True, True, True]
    torch.library.opcheck(ops.rnn_backward.default, backward, test_utils=tests)
    for position, value in [
        (2, [state[0], state[0]]),
        (2, [state[1], state[1]]),
        (3, weights[:-1]),
        (3, [*weights[:-1], torch.randn(3, 5)]),
        (3, [*weights[:4], torch.randn(2, 6), *weights[5:]]),
        (3, [*weights[:4], torch.randn(2, 2), *weights[5:]]),
        (3, [*weights[:4], torch.randn(10), *weights[5:]]),
        (5, NUMBER_OF["GRU"]),
    ]:
        broken = list(arguments)
        broken[position] = value
        with pytest.raises(RuntimeError):
            ops.rnn(*broken)


def test_raw_operators_refuse_bad_arguments():
    ops = torch.ops.fastnn
    good = raw_arguments("LSTM")
    output, final, reserve = ops.rnn_with_reserve(*good)

    def bad(call, position, value):
        arguments = list(call)
        arguments[position] = value
        return arguments

    sizes = torch.tensor([2, 2])
    for position, value in [
        (0, torch.randn(4, 2, 4)),
        (0, torch.randn(4, 3)),
        (0, torch.randn(0, 2, 3)),
        (0, torch.randn(4, 2, 3).double()),
        (0, torch.randn(4, 2, 3).half()),
        (0, torch.randn(4, 2, 3, device="meta")),
        (0, torch.randn(4, 2, 3).to_sparse()),
        (1, sizes),
        (2, good[2][:1]),
        (2, [good[2][0], good[2][1][:, :1]]),
        (2, [good[2][0], good[2][1].double()]),
        (3, []),
        (3, good[3][:-1]),
        (3, [good[3][0][:, :1], *good[3][1:]]),
        (3, [good[3][0], good[3][1].t(), *good[3][2:]]),
        (3, [w.reshape(-1) for w in good[3]]),
        (4, torch.randn(1, 8, 3)),
        (4, torch.randn(0)),
        (5, -1),
        (5, 4),
        (5, 0),
        (6, 0),
        (6, -1),
        (6, 1 << 62),
        (7, False),
    ]:
        with pytest.raises((RuntimeError, NotImplementedError)):
            ops.rnn(*bad(good, position, value))
    rows = good[0].reshape(8, 3)
    for broken in (
        torch.tensor([], dtype=torch.int64),
        torch.tensor([2, 2, 2]),
        torch.tensor([2, 2, 2, 2, 2]),
        torch.tensor([1, 2, 2, 3]),
        torch.tensor([8, 0]),
        torch.tensor([9, -1]),
        torch.tensor([2, 2, 2, 2], dtype=torch.int32),
        torch.tensor([[2, 2, 2, 2]]),
        torch.tensor([1 << 62, 1 << 62]),
    ):
        with pytest.raises(RuntimeError):
            ops.rnn(rows, broken, [], *good[3:])
    with pytest.raises(RuntimeError):
        ops.rnn(rows, torch.tensor([2, 2, 2, 2]), [], *good[3:8], True)

    backward = [output, list(final), *good[:5], output, reserve, *good[5:], True, True, True]
    ops.rnn_backward(*backward)
    for position, value in [
        (0, output[:1]),
        (0, output.double()),
        (1, []),
        (1, [final[0][:1], None]),
        (1, [final[0][0, :1], None]),
        (1, [final[0][0, :, :1], None]),
        (1, [final[0][0].double(), None]),
        (1, [final[0], final[1][0]]),
        (7, output[:1]),
        (8, reserve[:-1]),
        (8, reserve.double()),
        (8, torch.empty(0)),
        (9, 2),
        (10, 1),
    ]:
        with pytest.raises(RuntimeError):
            ops.rnn_backward(*bad(backward, position, value))

    cell = raw_cell_arguments(good)
    ops.rnn_cell(*cell)
    for position, value in [
        (0, good[0]),
        (0, good[0][0, 0]),
        (1, 7),
        (1, 2),
        (2, None),
        (2, good[2][0]),
        (3, good[2][0][0, :1]),
        (4, good[3][1]),
        (5, good[3][0]),
        (6, None),
        (7, good[3][1]),
    ]:
        with pytest.raises(RuntimeError):
            ops.rnn_cell(*bad(cell, position, value))


def test_raw_operators_refuse_gradients():
    for position in (0, 2, 3):
        arguments = raw_arguments("GRU")
        wanting = clone_wanting_gradients(arguments[position])
        arguments[position] = wanting if position == 0 else list(wanting)
        output, state = torch.ops.fastnn.rnn(*arguments)
        for tensor in (output, *state):
            with pytest.raises(RuntimeError, match="no gradient of its own"):
                tensor.sum().backward()


@pytest.mark.parametrize("mode", NUMBER_OF)
@pytest.mark.parametrize("layers", [1, 2])
def test_gradient_of_the_last_state_alone(mode: str, layers: int, dtype: torch.dtype, instruction_set: str) -> None:
    arguments = raw_arguments(mode, dtype, layers=layers)
    output, final, reserve = torch.ops.fastnn.rnn_with_reserve(*arguments)
    last = torch.randn_like(final[0][-1])
    whole = torch.zeros_like(final[0])
    whole[-1] = last
    results = [
        torch.ops.fastnn.rnn_backward(
            None, [grad, None][: len(final)], *arguments[:5], output, reserve, *arguments[5:], True, True, True
        )
        for grad in (last, whole)
    ]
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(torch.cat([t.flatten() for t in ours]), torch.cat([t.flatten() for t in expected]))


@pytest.mark.parametrize("mode", NUMBER_OF)
@pytest.mark.parametrize("batch_first", [False, True])
def test_layouts_of_the_gradient(mode: str, batch_first: bool, dtype: torch.dtype, instruction_set: str) -> None:
    arguments = raw_arguments(mode, dtype)
    arguments[-1] = batch_first
    arguments[2] = []
    output, final, reserve = torch.ops.fastnn.rnn_with_reserve(*arguments)

    def backward(grad: torch.Tensor) -> torch.Tensor:
        rest = [[None] * len(final), *arguments[:5], output, reserve, *arguments[5:], True, False, True]
        grad_input, _, grad_weights = torch.ops.fastnn.rnn_backward(grad, *rest)
        return torch.cat([t.flatten() for t in (grad_input, *grad_weights)])

    first, second, width = output.shape
    grad = torch.randn(first, second, width, dtype=dtype)
    of_others = torch.randn(first + 1, second + 2, 2 * width + 1, dtype=dtype)
    expanded = [
        torch.randn(sizes, dtype=dtype).expand(output.shape) for sizes in ((1, second, width), (first, 1, width), ())
    ]
    layouts = {
        "the other order": grad.transpose(0, 1).contiguous().transpose(0, 1),
        "columns first": grad.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "part of more": of_others[1:, 1:-1, 3 : width + 3],
        "every other column": of_others[1:, 2:, : 2 * width : 2],
        "one for the first dimension": expanded[0],
        "one for the second": expanded[1],
        "one number": expanded[2],
    }
    for name, layout in layouts.items():
        assert torch.equal(backward(layout), backward(layout.contiguous())), name
    assert torch.equal(backward(layouts["the other order"]), backward(grad))


@pytest.mark.parametrize("mode", NUMBER_OF)
def test_gradients_with_their_sign_turned(mode):
    """As torch.func has them of complex numbers: views that say that each element is the negative of what is there."""
    arguments = raw_arguments(mode)
    output, final, reserve = torch.ops.fastnn.rnn_with_reserve(*arguments)
    final = [torch.randn_like(s) for s in final]
    rest = [*arguments[:5], output, reserve, *arguments[5:], True, True, True]
    turned = [torch._neg_view(-s) for s in final]
    assert all(t.is_neg() for t in turned)
    expected = torch.ops.fastnn.rnn_backward(None, final, *rest)
    torch.testing.assert_close(torch.ops.fastnn.rnn_backward(None, turned, *rest), expected, rtol=0, atol=0)


def test_batch_sizes_elsewhere():
    arguments = raw_arguments("GRU")
    arguments[0], arguments[1] = arguments[0].flatten(0, 1), torch.tensor([2, 2, 2, 2])
    output, final, reserve = torch.ops.fastnn.rnn_with_reserve(*arguments)
    backward = [output, list(final), *arguments[:5], output, reserve, *arguments[5:], True, True, True]
    torch.ops.fastnn.rnn_backward(*backward)
    backward[3] = arguments[1] = arguments[1].to("meta")
    for operator, given in (("rnn", arguments), ("rnn_with_reserve", arguments), ("rnn_backward", backward)):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            getattr(torch.ops.fastnn, operator)(*given)


@pytest.mark.parametrize("batch_first", [False, True])
def test_steps_without_rows(batch_first):
    """Any number, in no time."""
    arguments = raw_arguments("LSTM", state=False)
    sizes = (0, 2**40) if batch_first else (2**40, 0)
    arguments[0], arguments[8] = torch.zeros(*sizes, 3), batch_first
    output, final, reserve = torch.ops.fastnn.rnn_with_reserve(*arguments)
    assert output.shape == (*sizes, 10)
    backward = [output, list(final), *arguments[:5], output, reserve, *arguments[5:], True, True, True]
    grad_input, _, grad_weights = torch.ops.fastnn.rnn_backward(*backward)
    assert grad_input.shape == (*sizes, 3)
    assert all(not g.any() for g in grad_weights)
