"""What the tests of the recurrent op share: pairs of stock and fused modules, and the comparison of two of them."""

import copy
import warnings

import torch
from torch.nn.utils.rnn import PackedSequence

from fastnn import testing
from fastnn.nn import rnn as fused
from fastnn.reference import rnn as plain

NETWORKS = ("RNN", "GRU", "LSTM")
CELLS = ("RNNCell", "GRUCell", "LSTMCell")
FEATURES = {
    "plain": {},
    "deep": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "deep bidirectional": {"num_layers": 2, "bidirectional": True},
    "no bias": {"bias": False, "num_layers": 2},
    "batch first": {"batch_first": True},
    "batch first bidirectional": {"batch_first": True, "bidirectional": True, "num_layers": 2},
}
# (batch, length, in, hidden): below, at and beyond whole vectors and tiles.
SHAPES = [(1, 2, 2, 3), (3, 5, 4, 7), (2, 4, 3, 130), (13, 6, 17, 33), (40, 7, 9, 16)]


def pair(name, *args, dtype=torch.float32, **kwargs):
    """The stock module and ours, with the same seed and so the same weights."""
    torch.manual_seed(0)
    stock = getattr(torch.nn, name)(*args, dtype=dtype, **kwargs)
    torch.manual_seed(0)
    ours = getattr(fused, name)(*args, dtype=dtype, **kwargs)
    for theirs, parameter in zip(stock.parameters(), ours.parameters(), strict=True):
        assert torch.equal(theirs, parameter)
    return stock, ours


def plain_network(module):
    """The reference as a module with the same parameters: stock's cannot be mapped over."""

    class Plain(type(module)):
        def _run(self, input, hx, weights):
            output, final = plain.rnn(
                input, None, [], weights, None, self.mode, self.num_layers, self.bidirectional, self.batch_first
            )
            return output, final

    result = copy.deepcopy(module)
    result.__class__ = Plain
    return result


def plain_cell(module):
    """The reference as a cell with the same parameters."""

    class Plain(type(module)):
        def _run(self, input, hx, weights):
            states = () if hx is None else hx if self._states == 2 else (hx,)
            state = plain.rnn_cell(input, states, weights, self._mode())
            return state[0] if self._states == 1 else state

    result = copy.deepcopy(module)
    result.__class__ = Plain
    return result


def tensors_of(nested):
    if isinstance(nested, torch.Tensor):
        return [nested] if nested.is_floating_point() else []
    return [t for part in nested if part is not None for t in tensors_of(part)]


def random_state(module, batch, dtype):
    count = module.num_layers * (2 if module.bidirectional else 1)
    state = [torch.randn(count, batch, module.hidden_size, dtype=dtype) for _ in range(2)]
    return tuple(state) if module.mode == "LSTM" else state[0]


def clone_wanting_gradients(nested):
    if isinstance(nested, PackedSequence):
        return nested._replace(data=clone_wanting_gradients(nested.data))
    if isinstance(nested, torch.Tensor):
        return nested.detach().clone().requires_grad_(nested.is_floating_point())
    return nested if nested is None else tuple(clone_wanting_gradients(part) for part in nested)


def run(module, *args, seed=None):
    """Outputs, and the gradients of arguments and parameters for random gradients of the outputs."""
    args = [clone_wanting_gradients(arg) for arg in args]
    module.zero_grad()
    if seed is not None:
        torch.manual_seed(seed)
    outputs = tensors_of(module(*args))
    torch.manual_seed(1)
    torch.autograd.backward(outputs, [torch.randn(o.shape, dtype=o.dtype) for o in outputs])
    return outputs, [t.grad for t in [*tensors_of(args), *module.parameters()]]


def check_same(stock, ours, *args, seed=None):
    """As close to float64 as stock is, gradients too, in the same strides; and the same bits without gradients."""
    testing.assert_close_to_reference(*results_of_both(stock, ours, *args, seed=seed))


def results_of_both(stock, ours, *args, seed=None):
    """What `run` gives for ours, for stock and in float64, after all but the closeness has been checked.

    `seed` is set before each call that draws random numbers.
    """
    expected = run(stock, *args, seed=seed)
    actual = run(ours, *args, seed=seed)
    truth = run(copy.deepcopy(stock).double(), *to_double(args), seed=seed)
    for a, e in zip(actual[0], expected[0], strict=True):
        assert a.stride() == e.stride()
    if seed is not None:
        torch.manual_seed(seed)
    with torch.no_grad():
        for a, e in zip(tensors_of(ours(*args)), actual[0], strict=True):
            assert torch.equal(a, e)
            assert a.stride() == e.stride()
    return actual, expected, truth


def assert_pooled_close(results):
    """As close to float64 as stock is over all of `results` (of results_of_both) together.

    Stock is at times exact by luck on a tensor of a few elements, never on all of a hundred. Each tensor is brought to
    a largest magnitude between 1/2 and 1 by a power of two, which rounds nothing.
    """
    pools = [[], [], []]
    for triple in results:
        flat = [[*outputs, *(g for g in gradients if g is not None)] for outputs, gradients in triple]
        for tensors in zip(*flat, strict=True):
            scale = 0.5 ** int(torch.frexp(tensors[2].abs().max()).exponent) if tensors[2].numel() else 1.0
            for pool, tensor in zip(pools, tensors, strict=True):
                pool.append((tensor.detach() * scale).flatten())
    testing.assert_close_to_reference(*(torch.cat(pool) for pool in pools))


def to_double(nested):
    if isinstance(nested, PackedSequence):
        return nested._replace(data=nested.data.double())
    if isinstance(nested, torch.Tensor):
        return nested.double()
    return nested if nested is None else tuple(to_double(part) for part in nested)


def outcome(call, value=False):
    """What a call raises, or else warns of; or, if `value` is asked for, the tensors it returns."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = call()
    except Exception as error:
        return type(error), str(error)
    return tensors_of(result) if value else [str(w.message) for w in caught]
