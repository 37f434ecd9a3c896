"""Large recurrent layers, whose gradients of weights and input are products of all rows
(csrc/ops/rnn_large.h)."""

import pytest
import torch
from rnn_common import FEATURES, NETWORKS, check_same, pair, random_state, run
from torch.nn.utils.rnn import pack_sequence

from fastnn import testing

BATCH, LENGTH, INPUTS = 9, 5, 30
HIDDEN = {"RNN": 257, "GRU": 150, "LSTM": 130}  # weights of just more than 2^16 elements, off every tile


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("name", NETWORKS)
def test_matches_stock(name, features, instruction_set):
    for dtype in (torch.float32, torch.float64):
        stock, ours = pair(name, INPUTS, HIDDEN[name], dtype=dtype, **features)
        sizes = (BATCH, LENGTH, INPUTS) if features.get("batch_first") else (LENGTH, BATCH, INPUTS)
        check_same(stock, ours, torch.randn(sizes, dtype=dtype))
        check_same(stock, ours, torch.randn(sizes, dtype=dtype), random_state(stock, BATCH, dtype))
        sequences = [torch.randn(n, INPUTS, dtype=dtype) for n in (9, 9, 8, 5, 5, 3, 2, 1, 1)]
        check_same(stock, ours, pack_sequence(sequences), random_state(stock, BATCH, dtype))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_dropout_and_threads(name, threads):
    with testing.using_threads(threads):
        stock, ours = pair(name, INPUTS, HIDDEN[name], 3, dropout=0.4, bidirectional=True)
        check_same(stock, ours, torch.randn(8, BATCH, INPUTS), seed=3)


@pytest.mark.parametrize("name", NETWORKS)
def test_some_gradients_alone(name):
    _, ours = pair(name, INPUTS, HIDDEN[name], 2, dtype=torch.float64)
    input = torch.randn(LENGTH, BATCH, INPUTS, dtype=torch.float64, requires_grad=True)
    inputs = [input, *ours.parameters()]
    everything = torch.autograd.grad(ours(input)[0].square().sum(), inputs)
    ours.requires_grad_(False)
    (alone,) = torch.autograd.grad(ours(input)[0].square().sum(), [input])
    torch.testing.assert_close(alone, everything[0])
    ours.requires_grad_(True)
    weights = torch.autograd.grad(ours(input.detach())[0].square().sum(), list(ours.parameters()))
    torch.testing.assert_close(weights, everything[1:])


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells(name):
    hidden = HIDDEN[name.removesuffix("Cell")]
    stock, ours = pair(name, INPUTS, hidden)
    states = [torch.randn(40, hidden) for _ in range(2)]
    state = tuple(states) if name == "LSTMCell" else states[0]
    check_same(stock, ours, torch.randn(40, INPUTS), state)
    check_same(stock, ours, torch.randn(40, INPUTS))


@pytest.mark.parametrize("name", NETWORKS)
def test_repeats_bit_for_bit(name):
    _, ours = pair(name, INPUTS, HIDDEN[name], 2, bidirectional=True)
    input = torch.randn(LENGTH, BATCH, INPUTS)
    for threads in (1, 2):
        with testing.using_threads(threads):
            (_, first), (_, second) = run(ours, input), run(ours, input)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_changes_no_dtype():
    """Torch's products are those of the operator's own dtype, whatever autocast would make of them."""
    torch.manual_seed(0)
    hidden, x = HIDDEN["LSTM"], torch.randn(LENGTH, BATCH, INPUTS)
    weights = [torch.randn(4 * hidden, size) / 10 for size in (INPUTS, hidden)]
    config = 3, 1, False, False

    def gradients():
        output, _, reserve = torch.ops.fastnn.rnn_with_reserve(x, None, [], weights, None, *config)
        arguments = (x, None, [], weights, None, output, reserve, *config, True, False, True)
        grad_input, _, grad_weights = torch.ops.fastnn.rnn_backward(output, [None, None], *arguments)
        return [grad_input, *grad_weights]

    plain = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(gradients(), plain, rtol=0, atol=0)
