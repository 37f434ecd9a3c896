"""RNN, GRU, LSTM and their cells as modules: upstream's own samples, errors, state dicts, cells against stock's."""

import copy
import pickle

import pytest
import torch
from rnn_common import (
    CELLS,
    NETWORKS,
    assert_pooled_close,
    check_same,
    outcome,
    pair,
    results_of_both,
    run,
    tensors_of,
)
from torch.nn.utils.rnn import pack_sequence
from torch.testing._internal.common_modules import module_db

import fastnn.nn
from fastnn.nn import rnn as fused

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


@pytest.mark.parametrize("name", CELLS)
def test_cells_without_hidden_features(name):
    """Stock takes them, the operator does not."""
    for grad in (False, True):
        cell = getattr(fused, name)(3, 0)
        for hx in (None, torch.randn(2, 0)):
            state = (hx, hx) if name == "LSTMCell" and hx is not None else hx
            input = torch.randn(2, 3, requires_grad=grad)
            for tensor in tensors_of([cell(input, state)]):
                assert tensor.shape == (2, 0)


# ---- upstream's own samples -------------------------------------------------------------------------------


def upstream(name):
    return next(info for info in module_db if info.module_cls is getattr(torch.nn, name))


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS + CELLS)
def test_upstream_samples(name, dtype, training):
    info = upstream(name)
    samples = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=training)
    results = []
    for sample in samples:
        arguments = sample.constructor_input
        stock, ours = pair(name, *arguments.args, **{"dtype": dtype, **arguments.kwargs})
        stock.train(training), ours.train(training)
        assert not sample.forward_input.kwargs
        results.append(results_of_both(stock, ours, *sample.forward_input.args, seed=5))
    assert_pooled_close(results)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_small_state_of_a_packed_lstm(dtype):
    """Not compared with stock, which reads beyond its end."""
    lstm = fused.LSTM(3, 4, 2).to(dtype)
    packed = pack_sequence([torch.randn(3, 3), torch.randn(2, 3)]).to(dtype)
    state = torch.zeros(2, 2, 4, dtype=dtype)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(2, 2, 4\), got \[0, 2, 4\]"):
        lstm(packed, (state, state[:0]))


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


AUTOCAST_OPTIONS = {
    "plain": {},
    "all": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "no bias": {"bias": False},
    "projection": {"proj_size": 2},
}


def autocast_inputs(stock, options):
    """Of each dtype, alone and with a state of each, batched, not batched and packed."""
    cell, lstm = not hasattr(stock, "num_layers"), "LSTM" in type(stock).__name__
    layers = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    for dtype in (torch.float32, torch.bfloat16):
        for state_dtype in (None, torch.float32, torch.bfloat16):
            h, c = [
                None if state_dtype is None else torch.randn(2, size) if cell else torch.randn(layers, 2, size)
                for size in (options.get("proj_size") or 5, 5)
            ]
            hx = None if h is None else (h.to(state_dtype), c.to(state_dtype)) if lstm else h.to(state_dtype)
            if cell:
                yield torch.randn(2, 3, dtype=dtype), hx
                continue
            yield torch.randn(2, 2, 3, dtype=dtype), hx
            yield pack_sequence([torch.randn(4, 3, dtype=dtype), torch.randn(2, 3, dtype=dtype)]), hx
        yield torch.randn(4, 3, dtype=dtype), None


def of_stock(module, *args):
    """What a stock layer gives in autocast. Skips the test where the processor has no bfloat16 in oneDNN."""
    try:
        return module(*args)
    except RuntimeError as error:
        if "could not create a primitive" in str(error):
            pytest.skip("oneDNN has no LSTM in bfloat16 for this processor")
        raise


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", AUTOCAST_OPTIONS)
@pytest.mark.parametrize("name", NETWORKS + CELLS)
def test_autocast_gives_stocks_dtypes(name, options, training, monkeypatch):
    options = AUTOCAST_OPTIONS[options]
    if "proj_size" in options and name != "LSTM":
        pytest.skip("LSTM alone has projections")
    if name in CELLS and not options.keys() <= {"bias"}:
        pytest.skip("a cell has no such option")
    stock, ours = pair(name, 3, 5, **options)
    fallen_back = []
    monkeypatch.setattr(ours, "_stock", fallen_back)
    for input, hx in autocast_inputs(stock, options):
        grads = []
        for module in (stock, ours):
            with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
                result = tensors_of([of_stock(module, input, hx) if module is stock else module(input, hx)])
            grads.append(
                (result, torch.autograd.grad(sum(t.float().sum() for t in result), list(module.parameters())))
                if training
                else (result, ())
            )
        (expected, expected_grads), (actual, actual_grads) = grads
        assert [t.dtype for t in actual] == [t.dtype for t in expected]
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(actual_grads, expected_grads, rtol=5e-2, atol=0.1)


@pytest.mark.parametrize("name", NETWORKS + CELLS)
def test_autocast_where_there_is_nothing_to_cast(name):
    stock, ours = pair(name, 3, 5)
    input = torch.randn(4, 2, 3) if name in NETWORKS else torch.randn(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            check_same(stock, ours, input)
            with torch.autocast("cpu", torch.bfloat16):
                expected = tensors_of([of_stock(stock, input)])
                torch.testing.assert_close(tensors_of([ours(input)]), expected, rtol=2e-2, atol=2e-2)
        double = (stock.double(), ours.double())
        check_same(*double, input.double())
    with torch.autocast("cpu", torch.float16):
        assert outcome(lambda: ours.float()(input)) == outcome(lambda: stock.float()(input))


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


@pytest.mark.parametrize("name", CELLS)
def test_cell_protocol(name):
    stock, ours = pair(name, 3, 5)
    assert repr(ours) == repr(stock)
    stock.load_state_dict(ours.state_dict())
    ours.load_state_dict(stock.state_dict())
    input = torch.randn(2, 3)
    expected = tensors_of([ours(input)])
    empty = getattr(fused, name)(3, 5, device="meta")
    assert tensors_of([empty(input.to("meta"))])[0].shape == expected[0].shape
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(stock.state_dict())
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), empty):
        assert all(torch.equal(a, e) for a, e in zip(tensors_of([twin(input)]), expected, strict=True))
    for module in (stock, ours):
        torch.nn.utils.parametrizations.weight_norm(module, "weight_hh")
    check_same(stock, ours, input)
    parameters = {n: torch.ones_like(p) for n, p in ours.named_parameters()}
    changed = tensors_of([torch.func.functional_call(ours, parameters, (input,))])
    assert not torch.equal(changed[0], expected[0])


def replace_flat_weights(module):
    module._flat_weights = [torch.full_like(w, 0.1) for w in module._flat_weights]


def replace_one_flat_weight(module):
    module._flat_weights[1] = torch.full_like(module._flat_weights[1], 0.1)


def replace_then_assign(module):
    replace_flat_weights(module)
    module.weight_hh_l0 = torch.nn.Parameter(module.weight_hh_l0.detach() * 2)


def replace_then_convert(module):
    replace_flat_weights(module)
    module.double().float()


def replace_too_few(module):
    module._flat_weights = module._flat_weights[:3]


def replace_by_another_dtype(module):
    module._flat_weights = [w.detach().double() for w in module._flat_weights]


def delete_a_weight(module):
    del module.weight_ih_l0


def call_functionally(module):
    parameters = {n: torch.full_like(p, 0.1) for n, p in module.named_parameters()}
    torch.func.grad(lambda p: torch.func.functional_call(module, p, (torch.ones(1, 1, 3),))[0].sum())(parameters)


@pytest.mark.parametrize(
    "change",
    [
        replace_flat_weights,
        replace_one_flat_weight,
        replace_then_assign,
        replace_then_convert,
        replace_too_few,
        replace_by_another_dtype,
        delete_a_weight,
        call_functionally,
    ],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_flat_weights(name, change):
    """A list assigned to `_flat_weights` counts until an attribute is assigned to, as in stock."""
    stock, ours = pair(name, 3, 5, 2)
    change(stock), change(ours)
    input = torch.randn(4, 2, 3)
    for twins in ((stock, ours), (copy.deepcopy(stock), copy.deepcopy(ours))):
        expected, actual = (outcome(lambda m=m: m(input), value=True) for m in twins)
        if isinstance(expected[0], torch.Tensor):
            torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-6)
        else:
            assert actual == expected


def test_deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        for name in NETWORKS:
            check_same(*pair(name, 3, 5, 2, bidirectional=True), torch.randn(4, 2, 3))
    finally:
        torch.use_deterministic_algorithms(False)


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
    torch.testing.assert_close(run(ours, input), run(stock, input), rtol=2e-5, atol=5e-6)
    parameters = {n: torch.ones_like(p) for n, p in ours.named_parameters()}
    assert not torch.equal(torch.func.functional_call(ours, parameters, (input,))[0], ours(input)[0])


def test_stock_path():
    for name in NETWORKS:
        stock, ours = pair(name, 3, 8, dtype=torch.float16)
        with torch.no_grad():
            torch.testing.assert_close(ours(torch.ones(5, 2, 3).half())[0], stock(torch.ones(5, 2, 3).half())[0])


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", NETWORKS + CELLS)
def test_kernels_answer_what_they_cover(name, dtype, monkeypatch):
    """What the operator refuses goes to stock without a word: nothing else may."""

    def refuse(*_):
        raise AssertionError("the stock module was asked")

    module = getattr(fused, name)
    monkeypatch.setattr(module._stock, "forward", refuse)
    if name in CELLS:
        cell = module(3, 5, dtype=dtype)
        run(cell, torch.randn(2, 3, dtype=dtype)), run(cell, torch.randn(3, dtype=dtype))
        return
    for options in ({}, {"num_layers": 2, "bidirectional": True, "dropout": 0.5}, {"proj_size": 2}):
        if "proj_size" in options and name != "LSTM":
            continue
        network = module(3, 5, dtype=dtype, **options)
        run(network, torch.randn(4, 2, 3, dtype=dtype)), run(network, torch.randn(4, 3, dtype=dtype))
        run(network, pack_sequence([torch.randn(n, 3, dtype=dtype) for n in (2, 4)], enforce_sorted=False))


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_an_input_that_changes_behind_a_batch_first_layer(kind: str) -> None:
    """A residual written in place trains, as in stock, which keeps a copy of such an input. A second derivative needs
    the input itself."""
    torch.manual_seed(0)
    first = torch.nn.Linear(6, 6).double()
    stock = getattr(torch.nn, kind)(6, 6, batch_first=True).double()
    ours = getattr(fastnn.nn, kind)(6, 6, batch_first=True).double()
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(4, 5, 6).double()
    gradients = []
    for layer in (stock, ours):
        y = first(x)
        y += layer(y)[0]
        gradients.append(torch.autograd.grad(y.square().sum(), [*first.parameters(), *layer.parameters()]))
    torch.testing.assert_close(*gradients)
    twice = []
    for layer in (stock, ours):
        y = first(x)
        (slope,) = torch.autograd.grad(layer(y)[0].square().sum(), y, create_graph=True)
        twice.append(torch.autograd.grad(slope.square().sum(), [*first.parameters(), *layer.parameters()]))
    torch.testing.assert_close(*twice)
    y = first(x)
    output = ours(y)[0]
    y += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(output.sum(), first.weight, create_graph=True)


@pytest.mark.parametrize("kind", ["RNNCell", "GRUCell", "LSTMCell", "RNN", "GRU", "LSTM"])
def test_an_input_that_changes_behind_a_layer_whose_weights_are_not_trained(kind: str) -> None:
    """Stock saves what is multiplied by a trained weight, so that input and h may change where none is trained. A
    second derivative needs them themselves."""
    torch.manual_seed(0)
    ours = getattr(fastnn.nn, kind)(6, 6).double().requires_grad_(False)
    cell = kind.endswith("Cell")
    x = torch.randn((4, 6) if cell else (5, 4, 6)).double()
    start = torch.randn((4, 6) if cell else (1, 4, 6)).double()
    c = torch.randn(start.shape).double()
    gradients = []
    for change in (False, True):
        first, second = x.clone().requires_grad_(), start.clone().requires_grad_()
        input, h = first * 1, second * 1
        output = ours(input, (h, c) if "LSTM" in kind else h)
        output = output[0] if isinstance(output, tuple) else output
        if change:
            input += 1
            h += 1
        gradients.append(torch.autograd.grad(output.square().sum(), [first, second], retain_graph=True))
    torch.testing.assert_close(*gradients)
    with pytest.raises(RuntimeError, match="modified by an inplace operation: the input"):
        torch.autograd.grad(output.sum(), [first, second], create_graph=True)


@pytest.mark.parametrize("trained", ["bias", "weight_ih", "weight_hh"])
@pytest.mark.parametrize("kind", ["RNNCell", "GRUCell", "RNN", "GRU"])
def test_what_may_change_follows_from_the_weights_that_are_trained(kind: str, trained: str) -> None:
    """The input may change where no weight of the input is trained, and h where no weight of h is."""
    torch.manual_seed(0)
    ours = getattr(fastnn.nn, kind)(6, 6).double()
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(trained in name)
    sizes = ((4, 6), (4, 6)) if kind.endswith("Cell") else ((5, 4, 6), (1, 4, 6))
    x, start = (torch.randn(size, dtype=torch.float64) for size in sizes)
    for changed, weight in enumerate(("weight_ih", "weight_hh")):
        gradients = []
        for changes in (False, True):
            leaves = [x.clone().requires_grad_(), start.clone().requires_grad_()]
            values = [leaf * 1 for leaf in leaves]
            output = ours(*values)
            output = output[0] if isinstance(output, tuple) else output
            if changes:
                values[changed] += 1
                if trained == weight:
                    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                        output.sum().backward()
                    break
            wanted = [*leaves, *(one for one in ours.parameters() if one.requires_grad)]
            gradients.append(torch.autograd.grad(output.square().sum(), wanted))
        if len(gradients) == 2:
            torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_refused_input_takes_no_random_numbers(dtype: torch.dtype) -> None:
    """The masks of dropout are drawn as if the call had not been."""
    drawn = []
    for make in (torch.nn.LSTM, fused.LSTM):
        model = make(6, 8, 2, dropout=0.4, dtype=dtype)
        torch.manual_seed(0)
        with pytest.raises(RuntimeError):
            model(torch.ones(3, 5, 7, dtype=dtype))
        drawn.append((torch.rand(1), model(torch.ones(3, 5, 6, dtype=dtype))[0].count_nonzero(), torch.rand(1)))
    torch.testing.assert_close(*drawn)
