"""RNN, GRU, LSTM and their cells against torch.nn's: outputs, gradients, strides, errors, and all ways to call them."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.testing._internal.common_modules import module_db

from fastnn import testing
from fastnn.nn import rnn as fused
from fastnn.ops import rnn as op
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
    """As close to float64 as stock is, gradients too, in the same strides; and the same bits without gradients.

    `seed` is set before each call that draws random numbers.
    """
    expected = run(stock, *args, seed=seed)
    actual = run(ours, *args, seed=seed)
    truth = run(copy.deepcopy(stock).double(), *to_double(args), seed=seed)
    testing.assert_close_to_reference(actual, expected, truth)
    for a, e in zip(actual[0], expected[0], strict=True):
        assert a.stride() == e.stride()
    if seed is not None:
        torch.manual_seed(seed)
    with torch.no_grad():
        for a, e in zip(tensors_of(ours(*args)), actual[0], strict=True):
            assert torch.equal(a, e)
            assert a.stride() == e.stride()


def to_double(nested):
    if isinstance(nested, PackedSequence):
        return nested._replace(data=nested.data.double())
    if isinstance(nested, torch.Tensor):
        return nested.double()
    return nested if nested is None else tuple(to_double(part) for part in nested)


# ---- networks against stock -------------------------------------------------------------------------------


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


# ---- upstream's own samples -------------------------------------------------------------------------------


def upstream(name):
    return next(info for info in module_db if info.module_cls is getattr(torch.nn, name))


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS + CELLS)
def test_upstream_samples(name, dtype, training):
    # Not any seed: on tensors of four elements stock is at times exact by luck (twenty times rarer than the kernels).
    torch.manual_seed(7)
    info = upstream(name)
    samples = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=training)
    assert samples
    for sample in samples:
        arguments = sample.constructor_input
        stock, ours = pair(name, *arguments.args, **{"dtype": dtype, **arguments.kwargs})
        stock.train(training), ours.train(training)
        assert not sample.forward_input.kwargs
        check_same(stock, ours, *sample.forward_input.args, seed=5)


@pytest.mark.parametrize("name", NETWORKS + CELLS)
def test_upstream_errors(name):
    info = upstream(name)
    if info.module_error_inputs_func is None:
        pytest.skip("upstream has none")
    for error in info.module_error_inputs_func(info, "cpu", torch.float32, False, True):
        sample = error.module_error_input
        module = getattr(fused, name)
        arguments = sample.constructor_input
        if error.error_on.name == "CONSTRUCTION_ERROR":
            with pytest.raises(error.error_type, match=error.error_regex):
                module(*arguments.args, **arguments.kwargs)
        else:
            built = module(*arguments.args, **arguments.kwargs)
            with pytest.raises(error.error_type, match=error.error_regex):
                built(*sample.forward_input.args, **sample.forward_input.kwargs)


def outcome(call):
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    except Exception as error:
        return type(error), str(error)
    return [str(w.message) for w in caught]


CONSTRUCTIONS = [
    ((3, 4, 0), {}),
    ((3, 0), {}),
    ((0, 4), {}),
    ((3.0, 4), {}),
    ((3, 4.0), {}),
    ((3, 4), {"dropout": 2}),
    ((3, 4), {"dropout": True}),
    ((3, 4), {"dropout": 0.5}),
    ((3, 4), {"bias": 1}),
    ((3, 4), {"batch_first": "yes"}),
    ((3, 4), {"proj_size": -1}),
    ((3, 4), {"proj_size": 4}),
    ((3, 4), {"nonlinearity": "sigmoid"}),
    ((3, 4, 1, "relu"), {}),
    ((3, 4, 1, "gelu"), {}),
    ((3,), {}),
]


@pytest.mark.parametrize("name", NETWORKS)
def test_construction_errors(name):
    for args, kwargs in CONSTRUCTIONS:
        expected = outcome(lambda a=args, k=kwargs: getattr(torch.nn, name)(*a, **k))
        actual = outcome(lambda a=args, k=kwargs: getattr(fused, name)(*a, **k))
        assert actual == expected


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_call_errors(name, batch_first):
    stock, ours = pair(name, 3, 4, batch_first=batch_first)
    h = torch.randn(1, 2, 4)

    def state(h, c=None):
        return (h, h if c is None else c) if name == "LSTM" else h

    good = torch.randn(2, 2, 3)
    packed = pack_sequence([torch.randn(3, 3), torch.randn(2, 3)])
    bad_calls = [
        (torch.randn(2, 2, 2, 3),),
        (torch.randn(3),),
        (torch.randn(2, 2, 4),),
        (torch.randn(0, 0, 3),),
        (torch.randn(2, 0, 3) if batch_first else torch.randn(0, 2, 3),),
        (good.double(),),
        (good.to(torch.int64),),
        (good, state(torch.randn(1, 3, 4))),
        (good, state(torch.randn(2, 2, 4))),
        (good, state(torch.randn(1, 2, 5))),
        (good, state(torch.randn(2, 4))),
        (good, state(h.double())),
        (good, state(h, torch.randn(1, 3, 4))),
        (torch.randn(2, 3), state(h)),
        (packed, state(torch.randn(1, 3, 4))),
        (packed._replace(data=torch.randn(5, 4)),),
        ([1, 2, 3],),
        (None,),
    ]
    for arguments in bad_calls:
        assert outcome(lambda a=arguments: ours(*a)) == outcome(lambda a=arguments: stock(*a))


@pytest.mark.parametrize("name", CELLS)
def test_cell_errors(name):
    stock, ours = pair(name, 3, 4)
    two = name == "LSTMCell"
    for input, hx in [
        (torch.randn(2, 2, 3), None),
        (torch.randn(2, 4), None),
        (torch.randn(2, 3).double(), None),
        (torch.randn(2, 3), torch.randn(3, 4)),
        (torch.randn(2, 3), torch.randn(2, 5)),
        (torch.randn(2, 3), torch.randn(2, 2, 4)),
        (torch.randn(3), torch.randn(2, 4)),
    ]:
        arguments = (input, (hx, hx) if two and hx is not None else hx)
        assert outcome(lambda a=arguments: ours(*a)) == outcome(lambda a=arguments: stock(*a))


# ---- cells ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CELLS)
def test_cells_match_stock(name, dtype):
    for batch, inputs, hidden, bias in [(1, 64, 64, True), (3, 5, 7, True), (20, 3, 33, False), (0, 4, 4, True)]:
        stock, ours = pair(name, inputs, hidden, bias, dtype=dtype)
        h = torch.randn(2, batch, hidden, dtype=dtype)
        state = tuple(h) if name == "LSTMCell" else h[0]
        input = torch.randn(batch, inputs, dtype=dtype)
        check_same(stock, ours, input, state)
        check_same(stock, ours, input)
        if batch:
            first = tuple(s[0] for s in state) if name == "LSTMCell" else state[0]
            check_same(stock, ours, input[0], first)
    if name == "RNNCell":
        check_same(*pair(name, 3, 4, nonlinearity="relu"), torch.randn(2, 3))


# ---- autograd ---------------------------------------------------------------------------------------------


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


def test_forward_mode():
    _, ours = pair("GRU", 3, 4, dtype=torch.float64)
    primal, tangent = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    _, actual = torch.func.jvp(lambda x: ours(x)[0], (primal,), (tangent,))
    _, expected = torch.func.jvp(lambda x: plain_network(ours)(x)[0], (primal,), (tangent,))
    torch.testing.assert_close(actual, expected)


# ---- compile, export, opcheck, autocast -------------------------------------------------------------------


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


@pytest.mark.parametrize("name", NETWORKS)
def test_export_with_dynamic_shapes(name):
    _, ours = pair(name, 3, 8, 2, bidirectional=True)
    ours.requires_grad_(False)
    length, batch = torch.export.Dim("length", min=2, max=100), torch.export.Dim("batch", min=2, max=100)
    program = torch.export.export(ours, (torch.randn(5, 4, 3),), dynamic_shapes=({0: length, 1: batch},))
    input = torch.randn(9, 7, 3)
    for a, e in zip(tensors_of(program.module()(input)), tensors_of(ours(input)), strict=True):
        torch.testing.assert_close(a, e)


def raw_arguments(mode, dtype=torch.float32, bidirectional=True, layers=2, state=True):
    name = mode.partition("_")[0]
    _, ours = pair(name, 3, 5, layers, bidirectional=bidirectional, dtype=dtype)
    weights = [p.detach() for p in ours.parameters()]
    given = [torch.randn(layers * (2 if bidirectional else 1), 2, 5, dtype=dtype)] * (2 if name == "LSTM" else 1)
    input = torch.randn(4, 2, 3, dtype=dtype)
    number = op.MODES.index(mode)
    return [input, None, given if state else [], weights, None, number, layers, bidirectional, False]


def raw_cell_arguments(arguments):
    """A cell's arguments from a network's."""
    h, c = (*(s[0] for s in arguments[2]), None)[:2]
    return [arguments[0][0], arguments[5], h, c, *arguments[3][:4]]


@pytest.mark.parametrize("mode", op.MODES)
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


@pytest.mark.parametrize("name", NETWORKS + CELLS)
def test_autocast_gives_stocks_dtypes(name):
    stock, ours = pair(name, 3, 5)
    input = torch.randn(4, 2, 3) if name in NETWORKS else torch.randn(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        for a, e in zip(tensors_of([ours(input)]), tensors_of([stock(input)]), strict=True):
            assert a.dtype == e.dtype
            torch.testing.assert_close(a, e)


# ---- life as a module -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_module_protocol(name):
    stock, ours = pair(name, 3, 5, 2, bidirectional=True)
    assert repr(ours) == repr(stock)
    assert [len(group) for group in ours.all_weights] == [len(group) for group in stock.all_weights]
    stock.load_state_dict(ours.state_dict())
    ours.load_state_dict(stock.state_dict())
    input = torch.randn(4, 2, 3)
    expected = ours(input)[0]
    ours.flatten_parameters()
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(input)[0], expected)
    empty = getattr(fused, name)(3, 5, 2, bidirectional=True, device="meta")
    assert empty(input.to("meta"))[0].shape == expected.shape
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(stock.state_dict())
    assert torch.equal(empty(input)[0], expected)
    assert ours.double()(input.double())[0].dtype == torch.float64


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_read_at_every_call(name):
    stock, ours = pair(name, 5, 5, 2)
    input = torch.randn(4, 2, 5)
    for module in (stock, ours):
        module.weight_hh_l1 = module.weight_hh_l0  # tied
    check_same(stock, ours, input)
    with torch.no_grad():
        for module in (stock, ours):
            module.weight_ih_l0.data.mul_(0.5)
    check_same(stock, ours, input)
    for module in (stock, ours):
        torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    torch.testing.assert_close(ours(input)[0], stock(input)[0], rtol=2e-5, atol=2e-6)
    parameters = {n: torch.ones_like(p) for n, p in ours.named_parameters()}
    assert not torch.equal(torch.func.functional_call(ours, parameters, (input,))[0], ours(input)[0])


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


def test_stock_path():
    for name in NETWORKS:
        stock, ours = pair(name, 3, 8, dtype=torch.float16)
        with torch.no_grad():
            torch.testing.assert_close(ours(torch.ones(5, 2, 3).half())[0], stock(torch.ones(5, 2, 3).half())[0])


# ---- raw operators ----------------------------------------------------------------------------------------


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


def test_reference_is_stock():
    """The specification itself, against torch: dense and packed."""
    for mode in op.MODES:
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
