"""Few sequences, large recurrent weights: threads share the hidden units of each step (csrc/ops/rnn_threads.h)."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from rnn_common import check_same, pair, random_state, tensors_of
from torch.nn.utils.rnn import pack_sequence

import fastnn.nn
from fastnn import testing

BATCH, LENGTH, FEATURES = 3, 60, 20
NETWORKS = {
    "RNN": lambda dtype: fastnn.nn.RNN(FEATURES, 250, 2, bidirectional=True, dtype=dtype),
    "GRU": lambda dtype: fastnn.nn.GRU(FEATURES, 130, 2, batch_first=True, dtype=dtype),
    "LSTM": lambda dtype: fastnn.nn.LSTM(FEATURES, 130, 2, dropout=0.5, dtype=dtype),
    "projected LSTM": lambda dtype: fastnn.nn.LSTM(FEATURES, 200, 2, proj_size=90, bias=False, dtype=dtype),
}


def state_of(module, dtype):
    state = random_state(module, BATCH, dtype)
    if module.proj_size:
        state = (state[0][..., : module.proj_size].contiguous(), state[1])
    return state


def results(ours, input, state, threads):
    torch.manual_seed(5)
    with testing.using_threads(threads):
        with torch.no_grad():
            alone = tensors_of(ours(input, state))
        ours.zero_grad()
        outputs = tensors_of(ours(input, state))
        sum((output.float() ** 2).sum() for output in outputs).backward()
    return [*alone, *outputs, *(parameter.grad for parameter in ours.parameters())]


@pytest.mark.parametrize("name", NETWORKS)
def test_no_bit_depends_on_the_threads(name, dtype, instruction_set):
    ours = NETWORKS[name](dtype)
    sizes = (BATCH, LENGTH, FEATURES) if ours.batch_first else (LENGTH, BATCH, FEATURES)
    packed = pack_sequence([torch.randn(n, FEATURES, dtype=dtype) for n in (LENGTH + 10, 40, 1)])
    for input in (torch.randn(sizes, dtype=dtype), packed):
        state = state_of(ours, dtype)
        expected = results(ours, input, state, 1)
        for threads in (2, 3, 5):
            for ours_now, one_thread in zip(results(ours, input, state, threads), expected, strict=True):
                assert torch.equal(ours_now, one_thread)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_matches_stock(name):
    stock, ours = pair(name, FEATURES, 250, 2)
    with testing.using_threads(3):
        check_same(stock, ours, torch.randn(LENGTH, 1, FEATURES), random_state(stock, 1, torch.float32))


def test_callers_at_the_same_time():
    """More threads than processors: each caller has some of its own."""
    ours = fastnn.nn.LSTM(FEATURES, 130)
    input = torch.randn(LENGTH, 1, FEATURES)

    def run(_):
        with torch.no_grad():
            return ours(input)[0]

    with testing.using_threads(2):
        expected = run(0)
        with ThreadPoolExecutor(4) as pool:
            for output in pool.map(run, range(40)):
                assert torch.equal(output, expected)
