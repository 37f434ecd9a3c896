"""RNN, GRU and LSTM against torch.nn's: outputs, gradients and strides, on every path through the kernels."""

import copy
import itertools

import pytest
import torch
from rnn_common import FEATURES, NETWORKS, SHAPES, check_same, pair, random_state, run, tensors_of
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from fastnn import testing
from fastnn.recurrent_modes import NUMBER_OF
from fastnn.reference import rnn as plain


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("name", NETWORKS)
def test_matches_stock(name, features, dtype):
    for batch, length, inputs, hidden in SHAPES:
        stock, ours = pair(name, inputs, hidden, dtype=dtype, **features)
        sizes = (batch, length, inputs) if features.get("batch_first") else (length, batch, inputs)
        input = torch.randn(sizes, dtype=dtype)
        check_same(stock, ours, input)
        check_same(stock, ours, input, random_state(stock, batch, dtype))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_instruction_set(name, instruction_set):
    for dtype, (batch, length, inputs, hidden) in itertools.product(testing.DTYPES, SHAPES[1:4]):
        stock, ours = pair(name, inputs, hidden, 2, bidirectional=True, dtype=dtype)
        input = torch.randn(length, batch, inputs, dtype=dtype)
        check_same(stock, ours, input, random_state(stock, batch, dtype))


def test_relu():
    for features in FEATURES.values():
        stock, ours = pair("RNN", 5, 33, nonlinearity="relu", **features)
        check_same(stock, ours, torch.randn(4, 3, 5))


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_single_rows(nonlinearity, instruction_set):
    """One sequence: units short of a vector, of a tile and of two tiles, and weights that stay in the nearest cache or
    don't; state given or not; a direction backwards in time, and a layer that writes over its input."""
    for dtype, hidden in itertools.product((torch.float32, torch.float64), (3, 16, 31, 32, 40, 64, 80, 90, 100)):
        stock, ours = pair("RNN", 5, hidden, 2, nonlinearity=nonlinearity, bidirectional=hidden % 4 == 0, dtype=dtype)
        input = torch.randn(19, 1, 5, dtype=dtype)
        check_same(stock, ours, input)
        check_same(stock, ours, input, random_state(stock, 1, dtype))
        check_same(stock, ours, pack_sequence([input[:, 0]]))


@pytest.mark.parametrize("name", NETWORKS)
def test_unbatched(name):
    for batch_first in (False, True):
        stock, ours = pair(name, 5, 20, 2, batch_first=batch_first)
        state = random_state(stock, 1, torch.float32)
        state = tuple(s.squeeze(1) for s in state) if name == "LSTM" else state.squeeze(1)
        check_same(stock, ours, torch.randn(7, 5), state)
        check_same(stock, ours, torch.randn(7, 5))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed(name, enforce_sorted):
    lengths = [9, 9, 6, 5, 5, 5, 2, 1, 1] if enforce_sorted else [5, 1, 9, 6, 2, 9, 5]
    for dtype, bidirectional in itertools.product(testing.DTYPES, (False, True)):
        stock, ours = pair(name, 5, 20, 2, bidirectional=bidirectional, dtype=dtype)
        packed = pack_sequence([torch.randn(n, 5, dtype=dtype) for n in lengths], enforce_sorted=enforce_sorted)
        check_same(stock, ours, packed)
        check_same(stock, ours, packed, random_state(stock, len(lengths), dtype))


@pytest.mark.parametrize("name", NETWORKS)
def test_packed_equals_one_by_one(name):
    _, ours = pair(name, 6, 24, 2, bidirectional=True)
    sequences = [torch.randn(n, 6) for n in (30, 17, 17, 4, 1)]
    output, final = ours(pack_sequence(sequences))
    padded, lengths = torch.nn.utils.rnn.pad_packed_sequence(output)
    for i, sequence in enumerate(sequences):
        alone, alone_final = ours(sequence)
        torch.testing.assert_close(padded[: lengths[i], i], alone, rtol=1e-5, atol=1e-6)
        for many, one in zip(tensors_of([final]), tensors_of([alone_final]), strict=True):
            torch.testing.assert_close(many[:, i], one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_threads(name, threads):
    """Enough work for several threads, also with sequences of very different lengths."""
    with testing.using_threads(threads):
        stock, ours = pair(name, 32, 64, 2, bidirectional=True)
        check_same(stock, ours, torch.randn(20, 7, 32), random_state(stock, 7, torch.float32))
        lengths = [60, 20, 5, 5, 2, 1]
        check_same(stock, ours, pack_sequence([torch.randn(n, 32) for n in lengths]))


@pytest.mark.parametrize("name", NETWORKS)
def test_threads_do_not_change_a_bit(name):
    _, ours = pair(name, 32, 96, 2, bidirectional=True)
    packed = pack_sequence([torch.randn(n, 32) for n in (60, 20, 5, 5, 2, 1)])
    inputs = torch.randn(30, 9, 32), torch.randn(200, 1, 32), packed
    for input in inputs:
        results = []
        for threads in (1, 2, 3):
            with testing.using_threads(threads), torch.no_grad():
                results.append(tensors_of(ours(input)))
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_dropout_draws_as_stock(name):
    for bidirectional, dropout, batch_first in itertools.product((False, True), (0.3, 1.0), (False, True)):
        stock, ours = pair(name, 5, 20, 3, dropout=dropout, bidirectional=bidirectional, batch_first=batch_first)
        check_same(stock, ours, torch.randn(8, 8, 5), seed=3)
        stock.eval(), ours.eval()
        check_same(stock, ours, torch.randn(8, 8, 5))
    stock, ours = pair(name, 5, 20, 2, dropout=0.5)
    check_same(stock, ours, pack_sequence([torch.randn(n, 5) for n in (7, 4, 2)]), seed=3)
    ours.dropout = stock.dropout = 0.1  # may change between calls
    check_same(stock, ours, torch.randn(8, 3, 5), seed=4)


@pytest.mark.parametrize("name", NETWORKS)
def test_strided_inputs(name):
    stock, ours = pair(name, 6, 20, batch_first=True)
    check_same(stock, ours, torch.randn(6, 4, 5).permute(1, 2, 0))
    check_same(stock, ours, torch.randn(1, 5, 6).expand(4, 5, 6))
    check_same(stock, ours, torch.randn(4, 5, 13)[:, :, 3:9])
    check_same(stock, ours, torch.randn(0, 5, 6))


@pytest.mark.parametrize("name", NETWORKS)
def test_long_sequences_stay_accurate(name):
    """After 1,000 steps the error against float64 is at most twice stock's, plus a few roundings."""
    stock, ours = pair(name, 8, 40, 2)
    input = torch.randn(1000, 3, 8)
    with torch.no_grad():
        truth = copy.deepcopy(stock).double()(input.double())[0]
        stock_error = (stock(input)[0] - truth).abs().max()
        error = (ours(input)[0] - truth).abs().max()
    assert error <= 2 * stock_error + 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_stay_accurate(name):
    stock, ours = pair(name, 8, 40, 2, bidirectional=True)
    input = torch.randn(100, 5, 8)
    _, truth = run(copy.deepcopy(stock).double(), input.double())
    _, expected = run(stock, input)
    _, actual = run(ours, input)
    for a, e, t in zip(actual, expected, truth, strict=True):
        scale = t.abs().max()
        assert (a - t).abs().max() <= 2 * (e - t).abs().max() + 8 * torch.finfo(torch.float32).eps * scale


@pytest.mark.parametrize("name", NETWORKS)
def test_nan_and_infinity_propagate(name):
    for value in (float("nan"), float("inf"), -float("inf")):
        stock, ours = pair(name, 4, 20)
        input = torch.randn(6, 3, 4)
        input[2, 1, 0] = value
        with torch.no_grad():
            expected, actual = stock(input)[0], ours(input)[0]
        torch.testing.assert_close(actual, expected, equal_nan=True, rtol=2e-5, atol=2e-6)
    stock, ours = pair("RNN", 4, 20, nonlinearity="relu")
    input[2, 1, 0] = float("nan")
    torch.testing.assert_close(ours(input)[0], stock(input)[0], equal_nan=True)


@pytest.mark.parametrize("name", NETWORKS)
def test_repeats_bit_for_bit(name):
    _, ours = pair(name, 16, 48, 2)
    input = torch.randn(30, 9, 16)
    first, first_grads = run(ours, input)
    second, second_grads = run(ours, input)
    for a, b in zip([*first, *first_grads], [*second, *second_grads], strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_projection(features, instruction_set):
    """proj_size: fewer outputs than hidden units, below, at and beyond whole vectors."""
    for dtype, (batch, length, inputs, hidden, projected) in itertools.product(
        testing.DTYPES, [(1, 3, 2, 5, 2), (3, 5, 4, 40, 33), (13, 6, 17, 64, 32)]
    ):
        stock, ours = pair("LSTM", inputs, hidden, proj_size=projected, dtype=dtype, **features)
        sizes = (batch, length, inputs) if features.get("batch_first") else (length, batch, inputs)
        input = torch.randn(sizes, dtype=dtype)
        count = stock.num_layers * (2 if stock.bidirectional else 1)
        state = tuple(torch.randn(count, batch, size, dtype=dtype) for size in (projected, hidden))
        check_same(stock, ours, input)
        check_same(stock, ours, input, state)
        packed = pack_sequence([torch.randn(n, inputs, dtype=dtype) for n in (7, 3, 3, 1)])
        check_same(stock, ours, packed)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projection_with_dropout_threads_and_second_derivatives():
    stock, ours = pair("LSTM", 32, 64, 2, proj_size=24, bidirectional=True, dropout=0.3)
    for threads in (1, 2, 3):
        with testing.using_threads(threads):
            check_same(stock, ours, torch.randn(20, 7, 32), seed=3)
    _, ours = pair("LSTM", 3, 4, proj_size=2, dtype=torch.float64)
    input = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tensors_of(ours(x)), (input,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: tensors_of(ours(x)), (input,), fast_mode=True)


def test_reference_is_stock():
    """The specification itself, against torch: dense and packed."""
    for mode in NUMBER_OF:
        name = mode.partition("_")[0]
        kwargs = {"nonlinearity": "relu"} if mode == "RNN_RELU" else {}
        stock, ours = pair(name, 3, 5, 2, bidirectional=True, dtype=torch.float64, **kwargs)
        input = torch.randn(6, 4, 3, dtype=torch.float64)
        state = tensors_of([random_state(stock, 4, torch.float64)])
        hx = tuple(state) if name == "LSTM" else state[0]
        weights = list(ours.parameters())
        output, final = plain.rnn(input, None, state, weights, None, mode, 2, True, False)
        torch.testing.assert_close([output, *final], tensors_of(stock(input, hx)))
        packed = pack_padded_sequence(input, [6, 4, 4, 1])
        output, final = plain.rnn(packed.data, packed.batch_sizes, state, weights, None, mode, 2, True, False)
        stock_output, stock_final = stock(packed, hx)
        torch.testing.assert_close([output, *final], tensors_of([stock_output.data, stock_final]))
