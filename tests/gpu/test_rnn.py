"""fastnn.kernels.rnn.launch against stock's networks in float64."""

import pytest
import torch
import triton
import triton.language as tl
from torch.nn.utils.rnn import PackedSequence

from fastnn.kernels import _activation, _plan_cache, _target
from fastnn.kernels.rnn import launch as kernels
from fastnn.kernels.rnn import launchers as _rnn_launch
from fastnn.kernels.rnn import plan as _rnn_config
from fastnn.kernels.rnn import wave as _rnn_wave
from fastnn.kernels.rnn.problem import check_problem
from fastnn.recurrent_modes import NUMBER_OF

INF, NAN = float("inf"), float("nan")
NETWORKS = {
    "RNN_TANH": (torch.nn.RNN, {"nonlinearity": "tanh"}),
    "RNN_RELU": (torch.nn.RNN, {"nonlinearity": "relu"}),
    "GRU": (torch.nn.GRU, {}),
    "LSTM": (torch.nn.LSTM, {}),
}


def make(mode, dtype, device, inputs=5, hidden=7, layers=1, bidirectional=False, batch_first=False, bias=True,
         length=4, batch=3, batch_sizes=None, state=True):  # fmt: skip
    """A stock network in float64 and the operator's arguments with the same values."""
    network, options = NETWORKS[mode]
    stock = network(inputs, hidden, layers, bidirectional=bidirectional, batch_first=batch_first, bias=bias, **options)
    stock = stock.to(dtype).double()
    if batch_sizes is not None:
        batch, input = batch_sizes[0], torch.randn(sum(batch_sizes), inputs)
    else:
        input = torch.randn(batch, length, inputs) if batch_first else torch.randn(length, batch, inputs)
    sizes = (layers * (2 if bidirectional else 1), batch, hidden)
    states = [torch.randn(sizes) for _ in range(2 if mode == "LSTM" else 1)] if state else []
    arguments = {
        "input": input.to(device, dtype),
        "batch_sizes": None if batch_sizes is None else torch.tensor(batch_sizes),
        "state": [s.to(device, dtype) for s in states],
        "weights": [w.detach().to(device, dtype) for w in stock._flat_weights],
        "masks": None,
        "mode": NUMBER_OF[mode],
        "num_layers": layers,
        "bidirectional": bidirectional,
        "batch_first": batch_first,
    }
    return stock, arguments


def run_stock(stock, arguments):
    """Output, final state, and the leaves: input, state, weights, all of the network's dtype."""
    like = stock._flat_weights[0]
    input = arguments["input"].detach().to(like).requires_grad_()
    state = [s.detach().to(like).requires_grad_() for s in arguments["state"]]
    hx = None if not state else tuple(state) if len(state) == 2 else state[0]
    if arguments["batch_sizes"] is None:
        output, final = stock(input, hx)
    else:
        packed, final = stock(PackedSequence(input, arguments["batch_sizes"]), hx)
        output = packed.data
    return output, list(final) if isinstance(final, tuple) else [final], [input, *state, *stock._flat_weights]


def check(stock, arguments, assert_near, factor=4, grad_output=None):
    """Forward and every gradient -> the input's."""
    expected, expected_final, leaves = run_stock(stock, arguments)
    output, final, reserve = kernels.rnn_with_reserve(**arguments)
    assert_near(output, expected.detach(), factor)
    for got, want in zip(final, expected_final, strict=True):
        assert_near(got, want.detach(), factor)
    torch.testing.assert_close(kernels.rnn(**arguments)[0], output, rtol=0, atol=0, equal_nan=True)

    grads = [torch.randn(t.shape).to(output) for t in (output, *final)]
    if grad_output is not None:
        grads = [grad_output, *map(torch.zeros_like, final)]
    # GRU on a CPU computes grad - grad * z, which is NaN of an inf; on a GPU stock's is grad * (1 - z), as ours.
    large = [g.to(expected).nan_to_num(NAN, 1e200, -1e200) for g in grads]
    gradients = torch.autograd.grad((expected, *expected_final), leaves, large)
    grad_input, grad_state, grad_weights = kernels.rnn_backward(
        grads[0], grads[1:], **arguments, output=output, reserve=reserve, input_wanted=True, state_wanted=True,
        weights_wanted=True,
    )  # fmt: skip
    actual = [grad_input, *grad_state[: len(arguments["state"])], *grad_weights]
    for got, want in zip(actual, gradients, strict=True):
        assert_near(got, want, 2 * factor)
    return grad_input


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mode", NUMBER_OF)
def test_one_layer(mode, dtype, device, assert_near):
    check(*make(mode, dtype, device), assert_near)


@pytest.mark.parametrize("mode", NUMBER_OF)
def test_layers_directions_batch_first_without_state(mode, device, assert_near):
    options = {"layers": 2, "bidirectional": True, "batch_first": True, "length": 3, "state": False}
    check(*make(mode, torch.float32, device, **options), assert_near)


@pytest.mark.parametrize("mode", NUMBER_OF)
def test_packed(mode, device, assert_near):
    options = {"bidirectional": True, "batch_sizes": [4, 3, 3, 1]}
    check(*make(mode, torch.float32, device, **options), assert_near)


def test_sequences_of_several_tiles(device, assert_near):
    check(*make("RNN_TANH", torch.float32, device, batch_sizes=[18, 17, 2]), assert_near)
    check(*make("GRU", torch.float32, device, batch=17, length=2, bias=False), assert_near)


@pytest.mark.parametrize("mode", ["RNN_TANH", "LSTM"])
def test_bfloat16(mode, device, assert_near):
    check(*make(mode, torch.bfloat16, device), assert_near)


@pytest.fixture
def spread(monkeypatch):
    """Weights shared out among programs, whatever the size."""
    monkeypatch.setattr(_rnn_config, "_FEWEST_SPREAD_STEPS", 1)
    monkeypatch.setattr(_rnn_config, "rnn_config", lambda *_: _rnn_config.Config(16, 4, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mode", NUMBER_OF)
def test_weights_shared_by_programs(mode, dtype, device, assert_near, spread):
    check(*make(mode, dtype, device, hidden=19), assert_near)


@pytest.mark.parametrize("mode", NUMBER_OF)
def test_weights_shared_by_programs_in_any_network(mode, device, assert_near, spread):
    options = {"layers": 2, "bidirectional": True, "length": 3, "hidden": 19, "state": False}
    check(*make(mode, torch.float32, device, batch_first=True, **options), assert_near)
    check(*make(mode, torch.float32, device, bidirectional=True, batch_sizes=[18, 17, 17, 2], hidden=17), assert_near)


@pytest.mark.parametrize("mode", ["RNN_RELU", "LSTM"])
def test_one_program_waits_for_itself_alone(mode, device, assert_near, spread):
    check(*make(mode, torch.float32, device, hidden=9), assert_near)


@pytest.fixture
def wave(monkeypatch):
    """All layers at once, whatever the size, eight steps behind each other."""
    monkeypatch.setattr(_rnn_config, "wave_chunk", lambda *_: 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mode", NUMBER_OF)
def test_layers_as_a_wavefront(mode, dtype, device, assert_near, wave):
    check(*make(mode, dtype, device, hidden=19, layers=3, length=19), assert_near)


@pytest.mark.parametrize("mode", NUMBER_OF)
def test_layers_of_any_network_as_a_wavefront(mode, device, assert_near, wave):
    options = {"layers": 2, "length": 11, "batch": 18, "state": False, "bias": False, "batch_first": True}
    check(*make(mode, torch.float32, device, **options), assert_near)
    sizes = [18] * 4 + [17, 17, 3, 2, 1, 1]  # more than a chunk
    check(*make(mode, torch.float32, device, layers=3, batch_sizes=sizes), assert_near)


def test_bfloat16_as_a_wavefront(device, assert_near, wave):
    check(*make("GRU", torch.bfloat16, device, layers=2, length=9), assert_near)


# A device assert would take the GPU from all other tests of the process.
@pytest.mark.skipif(not _target.INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("sharing", ["spread", "wave"])
def test_a_program_that_waits_for_ever_fails(sharing, device, monkeypatch, request):
    request.getfixturevalue(sharing)
    _, arguments = make("RNN_TANH", torch.float32, device, hidden=9, layers=2)
    output, final, reserve = kernels.rnn_with_reserve(**arguments)
    if sharing == "spread":  # the others, as it looks, have never come
        monkeypatch.setattr(kernels, "_arrived", lambda launch: torch.full(launch.grid[:2], -1000, dtype=torch.int32))
    else:  # the second to run comes first
        monkeypatch.setattr(_rnn_wave, "run_wave", lambda launch, layers, chunk, tensors, sizes:
                            launch(*tensors, 1, chunk, *sizes))  # fmt: skip
    with pytest.raises(Exception, match="waits for one that does not come"):
        kernels.rnn(**arguments)
    with pytest.raises(Exception, match="waits for one that does not come"):
        kernels.rnn_backward(output, final, **arguments, output=output, reserve=reserve, input_wanted=True,
                             state_wanted=True, weights_wanted=True)  # fmt: skip


@pytest.mark.parametrize("mode", NUMBER_OF)
def test_a_wavefront_is_layer_after_layer(mode, device, monkeypatch, same_products_in_any_row):
    """Bit for bit, wherever chunks end."""
    _, arguments = make(mode, torch.float32, device, layers=3, length=11, hidden=24)
    wanted = {"input_wanted": True, "state_wanted": True, "weights_wanted": True}
    results = []
    for chunk in (0, 8, 64):
        monkeypatch.setattr(_rnn_config, "wave_chunk", lambda *_, chunk=chunk: chunk)
        _plan_cache.Plans.forget_all()
        output, final, reserve = kernels.rnn_with_reserve(**arguments)
        gradients = kernels.rnn_backward(None, final, **arguments, output=output, reserve=reserve, **wanted)
        results.append([output, *final, reserve, gradients[0], *gradients[1], *gradients[2]])
    for result in results[2:]:
        for got, want in zip(result, results[1], strict=True):
            assert torch.equal(got, want)
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.fixture(params=["resident", "spread", "wave"])
def sizes(request):
    """Sizes off every tile, of a network that one kind of kernels runs."""
    if request.param == "resident":
        return {"hidden": 19, "length": 4}
    request.getfixturevalue(request.param)
    return {"hidden": 19, "length": 4} if request.param == "spread" else {"hidden": 19, "length": 10, "layers": 2}


def make_of_one_sign(mode, device, sizes, scale=0.5, dtype=torch.float16):
    """``make`` with weights of ``scale``'s sign and all else positive, so that sums with one inf are inf: with NaN in
    stock's results too, nothing would be seen of one that comes from a lane beside them."""
    stock, arguments = make(mode, dtype, device, **sizes)
    for tensor in (arguments["input"], *arguments["state"]):
        tensor.abs_().mul_(0.25).add_(0.25)
    set_weights(stock, arguments, [weight.abs() * scale for weight in stock._flat_weights])
    return stock, arguments


def set_weights(stock, arguments, values):
    with torch.no_grad():
        for weight, own, value in zip(stock._flat_weights, arguments["weights"], values, strict=True):
            weight.copy_(own.copy_(value))


def keep_gradients_of_one_sign(stock, arguments, hidden):
    """Of GRU too, where they have the state's difference to the new gate as a factor: positive while that gate is
    negative and the state decays slowly."""
    values = [weight.clone() for weight in stock._flat_weights]
    for b_ih, b_hh in zip(values[2::4], values[3::4], strict=True):
        b_ih[hidden : 2 * hidden] = b_hh[hidden : 2 * hidden] = 2
        b_ih[2 * hidden :], b_hh[2 * hidden :] = -2.5, 1
    set_weights(stock, arguments, values)


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("mode", NUMBER_OF)
def test_a_state_that_is_not_finite_stays_where_it_is(mode, value, device, assert_near, sizes):
    stock, arguments = make_of_one_sign(mode, device, sizes, -0.5 if value < 0 else 0.5)
    arguments["state"][0][0, 0, 1] = value
    if value != value:
        check(stock, arguments, assert_near)
        assert not kernels.rnn(**arguments)[0][:, 1:].isnan().any()
        return
    assert not run_stock(stock, arguments)[0].isnan().any()
    check(stock, arguments, assert_near)


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("mode", NUMBER_OF)
def test_a_gradient_that_is_not_finite_spreads_as_in_stock(mode, value, device, assert_near, sizes):
    stock, arguments = make_of_one_sign(mode, device, sizes)
    if mode == "GRU":
        keep_gradients_of_one_sign(stock, arguments, sizes["hidden"])
    grad = torch.ones(sizes["length"], 3, 19).to(device, torch.float16)
    grad[-1, 0, 1] = value
    grad_input = check(stock, arguments, assert_near, grad_output=grad)
    assert grad_input[:, 1:].isfinite().all()
    assert (grad_input[:, 0].isnan() if value != value else grad_input[:, 0] == value).all()


def test_overflow(device, assert_near, sizes):
    """In forward in the first sequence, in backward in the second. Not of float16: stock's sums have that too, those of
    the kernels float32, so that they do not overflow together."""
    stock, arguments = make_of_one_sign("RNN_RELU", device, sizes, 1, torch.float32)
    arguments["state"][0][0, 0] = 3e38
    grad = torch.ones(sizes["length"], 3, 19, device=device)
    grad[:, 1] = 3e38
    grad_input = check(stock.float(), arguments, assert_near, 8, grad_output=grad)
    assert grad_input[:, 1].isinf().any()
    assert grad_input[:, 2].isfinite().all()


def test_overflow_of_float16(device, assert_near, sizes):
    stock, arguments = make_of_one_sign("RNN_RELU", device, sizes, 1)
    arguments["state"][0][0, 0] = 65504
    output = kernels.rnn(**arguments)[0]
    assert_near(output, run_stock(stock, arguments)[0].detach())
    assert output[:, 0].isinf().all()


@pytest.mark.parametrize("mode", NUMBER_OF)
def test_stocks_kernels_where_weights_do_not_fit(mode, device, assert_near, monkeypatch):
    monkeypatch.setattr(_rnn_config, "rnn_config", lambda *_: None)
    check(*make(mode, torch.float32, device, layers=2), assert_near)
    check(*make(mode, torch.float32, device, bidirectional=True, batch_sizes=[3, 2], state=False), assert_near)


def assert_gradients(leaves, results, wanted_leaves, wanted, assert_near):
    """Of all results, each weighted with other random numbers."""
    grads = [torch.randn(w.shape, dtype=torch.float64) for w in wanted]
    gradients = torch.autograd.grad(results, leaves, [g.to(r) for g, r in zip(grads, results, strict=True)])
    expected = torch.autograd.grad(wanted, wanted_leaves, grads)
    for got, want in zip((*results, *gradients), (*wanted, *expected), strict=True):
        assert_near(got.detach(), want.detach().reshape(got.shape), 8)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(
    ("mode", "kind"),
    [(mode, kind) for mode in NUMBER_OF for kind in ("sequences", "packed", "cell")] + [("LSTM", "projected")],
)
def test_stocks_own_gradient(mode, kind, device, assert_near, monkeypatch):
    """Asked before a gradient is recorded: the answer where the operator would run stock's kernels, else None."""
    if kind == "projected":
        stock, arguments = projected(device)
    else:
        options = {"batch_sizes": [3, 2]} if kind == "packed" else {"length": 1} if kind == "cell" else {"layers": 2}
        stock, arguments = make(mode, torch.float32, device, **options)
    expected, expected_final, wanted_leaves = run_stock(stock, arguments)
    if kind == "cell":
        arguments |= {"input": arguments["input"][0], "state": [s[0] for s in arguments["state"]]}
        expected = expected[0]
        expected_final = [s[0] for s in expected_final]
    if kind != "projected":
        assert kernels.with_stocks_gradient(**arguments) is None
    monkeypatch.setattr(_rnn_config, "rnn_config", lambda *_: None)
    _plan_cache.Plans.forget_all()
    leaves = [arguments["input"], *arguments["state"], *arguments["weights"]]
    for leaf in leaves:
        leaf.requires_grad_()
    output, final = kernels.with_stocks_gradient(**arguments)
    wanted = [w.reshape(r.shape) for w, r in zip((expected, *expected_final), (output, *final), strict=True)]
    assert_gradients(leaves, [output, *final], wanted_leaves, wanted, assert_near)


def projected(device):
    stock = torch.nn.LSTM(5, 7, 2, proj_size=3, bidirectional=True).double()
    arguments = {
        "input": torch.randn(4, 3, 5, device=device), "batch_sizes": None,
        "state": [torch.randn(4, 3, size, device=device) for size in (3, 7)],
        "weights": [w.detach().to(device, torch.float32) for w in stock._flat_weights], "masks": None,
        "mode": NUMBER_OF["LSTM"], "num_layers": 2, "bidirectional": True, "batch_first": False,
    }  # fmt: skip
    return stock, arguments


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_projections(device, assert_near):
    stock, arguments = projected(device)
    stock.load_state_dict({name: w.float() for name, w in stock.state_dict().items()})
    arguments["weights"] = [w.detach().to(device, torch.float32) for w in stock._flat_weights]
    check(stock, arguments, assert_near)


@pytest.mark.parametrize("mode", NUMBER_OF)
def test_stocks_cell(mode, device, assert_near, monkeypatch):
    monkeypatch.setattr(_rnn_config, "rnn_config", lambda *_: None)
    for state in (True, False):
        stock, arguments = make(mode, torch.float32, device, length=1, state=state)
        _, expected, _ = run_stock(stock, arguments)
        h, c = (*(s[0] for s in arguments["state"]), None, None)[:2]
        final = kernels.rnn_cell(arguments["input"][0], arguments["mode"], h, c, *arguments["weights"])
        for got, want in zip(final, expected, strict=True):
            assert_near(got, want[0].detach(), 4)


@pytest.mark.parametrize("way", ["layers", "wavefront", "stock"])
def test_masks_between_layers(way, device, assert_near, monkeypatch):
    monkeypatch.setattr(_rnn_config, "wave_chunk", lambda *_: 8 if way == "wavefront" else 0)
    if way == "stock":
        monkeypatch.setattr(_rnn_config, "rnn_config", lambda *_: None)
    stock, arguments = make("GRU", torch.float32, device, layers=2, length=3, batch=2)
    masks = torch.randint(0, 2, (1, 6, 7)).to(device, torch.float32) * 2
    first, second = torch.nn.GRU(5, 7).double(), torch.nn.GRU(7, 7).double()
    for layer, part in enumerate((first, second)):
        for name, _ in list(part.named_parameters()):
            getattr(part, name).data = getattr(stock, name.replace("l0", f"l{layer}")).data
    h = arguments["state"][0].double().cpu()
    input = arguments["input"].double().cpu().requires_grad_()
    middle, _ = first(input, h[:1])
    expected, _ = second(middle * masks.double().cpu().view(3, 2, 7), h[1:])
    arguments["masks"] = masks
    output, _, reserve = kernels.rnn_with_reserve(**arguments)
    assert_near(output, expected.detach(), 4)
    grad = torch.randn_like(output)
    got = kernels.rnn_backward(grad, [None], **arguments, output=output, reserve=reserve, input_wanted=True,
                               state_wanted=False, weights_wanted=False)  # fmt: skip
    assert_near(got[0], torch.autograd.grad(expected, input, grad.double().cpu())[0], 8)
    assert got[1:] == ([], [])


@pytest.mark.parametrize("mode", NUMBER_OF)
def test_cell(mode, device, assert_near):
    stock, arguments = make(mode, torch.float32, device, length=1)
    _, expected, leaves = run_stock(stock, arguments)
    arguments |= {"input": arguments["input"][0], "state": [s[0] for s in arguments["state"]]}
    h, c = (*arguments["state"], None)[:2]
    final = kernels.rnn_cell(arguments["input"], arguments["mode"], h, c, *arguments["weights"])
    output, kept_final, reserve = kernels.rnn_with_reserve(**arguments)
    assert torch.equal(kernels.rnn(**arguments)[0], output)
    for got, again, want in zip(final, kept_final, expected, strict=True):
        assert_near(got, want[0].detach(), 4)
        assert torch.equal(again, got)
    grads = [torch.randn_like(s) for s in final]
    grad_input, grad_state, grad_weights = kernels.rnn_backward(
        None, grads, **arguments, output=output, reserve=reserve, input_wanted=True, state_wanted=True,
        weights_wanted=True,
    )  # fmt: skip
    wanted = torch.autograd.grad(expected, leaves, [g[None].double().cpu() for g in grads])
    for got, want in zip([grad_input, *grad_state, *grad_weights], wanted, strict=True):
        assert_near(got, want.reshape(got.shape), 8)


def test_empty_batch(device):
    _, arguments = make("LSTM", torch.float32, device, batch=0)
    output, final, reserve = kernels.rnn_with_reserve(**arguments)
    assert output.shape == (4, 0, 7)
    gradients = kernels.rnn_backward(output, final, **arguments, output=output, reserve=reserve, input_wanted=True,
                                     state_wanted=True, weights_wanted=True)  # fmt: skip
    assert gradients[0].shape == (4, 0, 5)
    assert [g.shape for g in gradients[2]] == [w.shape for w in arguments["weights"]]


REFUSED = {
    "mode must be between": {"mode": 4},
    "for each of 3 layers": {"num_layers": 3},
"input must have 3 dimensions": {"input": torch.ones(5)},
    "one step of one layer": {"input": torch.ones(3, 5), "bidirectional": True},
    "expected weights of size": {"input": torch.ones(4, 3, 6)},
    "expected state of size": {"input": torch.ones(4, 2, 5)},
    "length to be larger than 0": {"input": torch.ones(0, 3, 5)},
    "expected no state or 1": {"state": [torch.ones(1, 3, 7)] * 2},
    "dtype": {"state": [torch.ones(1, 3, 7).double()]},
    "expected masks of size": {"masks": torch.ones(1, 12, 7)},
    "sum to 3": {"input": torch.ones(4, 5), "batch_sizes": torch.tensor([2, 1])},
    "decreasing order": {"input": torch.ones(4, 5), "batch_sizes": torch.tensor([1, 3])},
    "CPU int64": {"input": torch.ones(4, 5), "batch_sizes": torch.tensor([2, 2], dtype=torch.int32)},
    "does not go with": {"input": torch.ones(4, 5), "batch_sizes": torch.tensor([3, 1]), "batch_first": True},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refuses(message, device):
    _, arguments = make("RNN_TANH", torch.float32, device)
    changes = {
        name: value.to(device) if isinstance(value, torch.Tensor) and name != "batch_sizes" else value
        for name, value in REFUSED[message].items()
    }
    with pytest.raises(RuntimeError, match=message):
        kernels.rnn(**(arguments | changes))


def test_backward_refuses(device):
    _, arguments = make("GRU", torch.float32, device)
    output, final, reserve = kernels.rnn_with_reserve(**arguments)
    good = {"grad_output": output, "grad_state": final, "output": output, "reserve": reserve}
    wanted = {"input_wanted": True, "state_wanted": True, "weights_wanted": True}
    for change in ({"grad_output": output[1:]}, {"grad_state": []}, {"grad_state": [final[0][:, 1:]]},
                   {"output": output[1:]}, {"reserve": reserve[1:]}, {"reserve": reserve.double()}):  # fmt: skip
        with pytest.raises(RuntimeError):
            kernels.rnn_backward(**(good | change), **arguments, **wanted)


def chosen(mode, hidden, batch=32, dtype=torch.float16, precision="ieee", target=_target.TARGETS[2], **options):
    network = _rnn_config.RnnNetwork(mode, hidden, batch, dtype, precision, **options)
    return _rnn_config.rnn_config(network, target)


def test_choice_of_kernel():
    ampere, hip = _target.TARGETS[1], _target.TARGETS[4]
    assert chosen("RNN_TANH", 128) is not None
    assert chosen("RNN_TANH", 256) is not None
    assert chosen("RNN_TANH", 256, target=ampere) is None
    assert chosen("RNN_TANH", 512, inputs=512) is None
    assert chosen("RNN_TANH", 128, dtype=torch.float32, precision="tf32") is not None
    assert chosen("RNN_TANH", 128, dtype=torch.float32) is None
    assert chosen("LSTM", 128) is not None
    assert chosen("LSTM", 256, inputs=256) is None
    assert chosen("LSTM", 16, dtype=torch.float32) is None
    assert chosen("LSTM", 16, dtype=torch.float32, target=hip) is not None
    assert chosen("LSTM", 8, dtype=torch.float64) is None


def test_sequences_of_a_program():
    """The fewest with which all programs run at once; of a large batch more."""
    h100, hip = _target.TARGETS[2], _target.TARGETS[4]
    assert chosen("LSTM", 128).block_batch == 8
    assert chosen("LSTM", 128, 8 * h100.processors).block_batch == 8
    assert chosen("LSTM", 128, 8 * h100.processors, directions=2).block_batch == 16
    assert chosen("LSTM", 128, 16384).block_batch == 16
    assert chosen("RNN_TANH", 128, 16384).block_batch == 32
    assert chosen("RNN_TANH", 64, 8, target=hip).block_batch == 16  # a matrix instruction's fewest there


def test_choice_of_a_wavefront():
    h100, hip = _target.TARGETS[2], _target.TARGETS[4]
    config = _rnn_config.Config(16, 4)

    def chunk(layers, steps, batch, hidden=128, gates=1, itemsize=2, directions=1, config=config, target=h100):
        return _rnn_config.wave_chunk(config, layers, directions, steps, batch, hidden, gates, itemsize, target)

    assert chunk(2, 20, 8, hidden=32) == 8
    assert chunk(3, 128, 32) == 16
    assert chunk(2, 128, 32, gates=4) == 16
    assert chunk(1, 128, 32) == 0
    assert chunk(2, 128, 32, directions=2) == 0  # a layer needs both directions, to their ends
    assert chunk(2, 4, 32) == 0  # the second layer would wait for all of the first
    assert chunk(2, 128, 2048) == 0  # more programs than processors
    assert chunk(2, 128, 32, hidden=256) == 0
    assert chunk(2, 128, 32, gates=4, target=_target.TARGETS[1]) == 0  # not enough memory on chip
    assert chunk(2, 128, 32, config=config._replace(units=16)) == 0
    assert chunk(2, 128, 32, target=hip) == 0


@pytest.mark.parametrize(
    ("mode", "forward", "backward"),
    [("RNN_TANH", 384, 256), ("RNN_RELU", 384, 256), ("GRU", 192, 128), ("LSTM", 192, 128)],
)
def test_cudnn_keeps_the_weights_of_narrow_networks(mode, forward, backward):
    def keeps(hidden, forward, dtype=torch.bfloat16, **options):
        network = _rnn_config.RnnNetwork(mode, hidden, 100, dtype, **options)
        return _rnn_config.cudnn_keeps_weights(network, _target.TARGETS[2], forward)

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for widest, is_forward in ((forward, True), (backward, False)):
            assert keeps(widest, is_forward, dtype, layers=3, directions=2)
            assert not keeps(widest + 1, is_forward, dtype)
    assert not keeps(16, True, packed=True)
    assert not keeps(16, True, torch.float64)


def test_cudnn_keeps_the_weights_of_wide_float16_networks():
    def keeps(mode, hidden=512, batch=32, dtype=torch.float16, target=_target.TARGETS[2], **options):
        network = _rnn_config.RnnNetwork(mode, hidden, batch, dtype, inputs=options.pop("inputs", 256), **options)
        answers = {_rnn_config.cudnn_keeps_weights(network, target, forward) for forward in (True, False)}
        return answers == {True}

    assert keeps("LSTM")
    assert keeps("LSTM", 1024, 128)
    assert keeps("RNN_TANH", 896, 88)
    assert keeps("RNN_TANH", 768, 96)
    assert not keeps("RNN_TANH", 896, 96)
    assert not keeps("GRU")
    assert not keeps("LSTM", dtype=torch.bfloat16)
    assert not keeps("LSTM", layers=2)
    assert not keeps("LSTM", directions=2)
    assert not keeps("LSTM", packed=True)
    assert not keeps("LSTM", inputs=64)
    assert not keeps("LSTM", 1152)
    assert not keeps("LSTM", 320)
    assert not keeps("LSTM", batch=136)
    assert not keeps("LSTM", batch=12)
    assert keeps("LSTM", target=_target.TARGETS[0])
    assert not keeps("LSTM", target=_target.TARGETS[1])  # sm_86
    assert not keeps("LSTM", target=_target.TARGETS[2]._replace(processors=64))


def test_choice_of_sharing_weights():
    half, brain = torch.float16, torch.bfloat16

    def shares(*arguments, **options):
        config = chosen(*arguments, **options)
        return config is not None and config.units > 0

    assert shares("RNN_TANH", 512, dtype=brain)
    assert shares("LSTM", 1024, 16, brain, directions=2)
    assert shares("GRU", 512, dtype=torch.float32, precision="tf32")
    assert not shares("RNN_TANH", 512, inputs=512)  # cuDNN keeps these on chip
    assert shares("RNN_TANH", 512, inputs=512, packed=True)  # but not packed
    assert shares("RNN_TANH", 512, inputs=64)  # nor with such an input
    assert shares("GRU", 512, dtype=half, inputs=512)
    # Its backward does so up to a narrower network than its forward.
    for mode, hidden in (("GRU", 160), ("LSTM", 192)):
        assert not shares(mode, hidden, dtype=brain)
        assert shares(mode, hidden, dtype=brain, training=True)
        assert not shares(mode, 128, dtype=torch.float32, precision="tf32", training=True)
    assert not shares("RNN_TANH", 300, dtype=brain)
    assert shares("RNN_TANH", 300, dtype=brain, training=True)
    assert shares("RNN_TANH", 300, dtype=brain, packed=True)
    assert not shares("GRU", 512, dtype=torch.float32)  # no matrix units
    assert not shares("RNN_TANH", 512, 128, brain)  # a product a step keeps a GPU busy
    assert not shares("LSTM", 2048, 16, brain)  # more than all processors hold
    assert not shares("RNN_TANH", 512, dtype=brain, target=_target.TARGETS[4])
    # More weights than four warps have registers for.
    assert chosen("LSTM", 512, dtype=brain).num_warps == 4
    assert chosen("LSTM", 512, dtype=torch.float32, precision="tf32").num_warps == 8


@pytest.mark.parametrize(("length", "shared"), [(1, False), (3, False), (4, True)])
def test_few_steps_do_not_share_weights(length, shared, device):
    with _target.assume_target(_target.TARGETS[2]):
        _, arguments = make("GRU", torch.float16, device, hidden=257, batch_sizes=[2] * length)
        arguments["layers"] = arguments.pop("num_layers")
        config = _rnn_config.config_of(check_problem("rnn", **arguments), training=False)
    assert (config is not None and config.units > 0) == shared


@triton.jit
def _exp2_stand_in(x):
    return tl.exp2(x)


@triton.jit
def _reciprocal_stand_in(x):
    return 1.0 / x


@triton.jit
def _tanh_stand_in(x):
    rough = _activation.tanh(x) * 1.00048828125  # wrong by 2**-11
    return tl.where(rough > 1, 1.0, tl.where(rough < -1, -1.0, rough))


@pytest.fixture
def ptx(monkeypatch):
    """PTX's instructions, or in the interpreter what computes as much."""
    if _target.INTERPRETED:
        monkeypatch.setattr(_activation, "_exp2_ptx", _exp2_stand_in)
        monkeypatch.setattr(_activation, "_reciprocal_ptx", _reciprocal_stand_in)
        monkeypatch.setattr(_activation, "_tanh_ptx", _tanh_stand_in)


@triton.jit
def _tanh_and_sigmoid(x_ptr, tanh_ptr, sigmoid_ptr, size: tl.constexpr, math: tl.constexpr):
    offs = tl.arange(0, size)
    x = tl.load(x_ptr + offs)
    tl.store(tanh_ptr + offs, _activation.tanh(x, math))
    tl.store(sigmoid_ptr + offs, _activation.sigmoid(x, math))


WAYS = ["PORTABLE"] if torch.version.hip else ["PORTABLE", "PTX", "PTX_ROUGH"]


@pytest.mark.parametrize("math", WAYS)
def test_tanh_and_sigmoid(math, device, ptx):
    """Relative errors, of small and large arguments alike."""
    sizes = torch.logspace(-30, 1.9, 2045)
    for sign in (1, -1):
        x = torch.cat([sign * sizes, torch.tensor([0.0, sign * INF, NAN])]).to(device)
        results = torch.empty(2, 2048, device=device)
        _tanh_and_sigmoid[(1,)](x, *results, size=2048, math=getattr(_activation, math).value)
        exact = torch.stack([x.double().tanh(), x.double().sigmoid()])
        small = torch.finfo(torch.float32).tiny  # below it NVIDIA's instructions give zero
        errors = (results.double() - exact).abs() / exact.abs().clamp(min=small)
        errors = torch.where(exact == results, 0, errors).nan_to_num(1e9)[:, :-1]
        assert results[:, -1].isnan().all()
        assert errors[0].max() < (2**-10.9 if math == "PTX_ROUGH" else 6e-7)
        # exp rounds the product of its argument with log2 e.
        assert errors[1].max() < 1e-5


@pytest.mark.skipif(torch.version.hip is not None, reason="NVIDIA's instructions")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", NUMBER_OF)
def test_a_rough_tanh_is_enough_for_16_bits(mode, dtype, device, assert_near, ptx, monkeypatch):
    monkeypatch.setattr(_rnn_launch, "_math", lambda problem: _activation.PTX_ROUGH.value)
    check(*make(mode, dtype, device, length=9), assert_near)


def test_gate_gradients_are_read_where_they_lie(device):
    """No order of kinds has to be made for the products with the input's and the recurrent weights."""
    for mode in NUMBER_OF:
        _, arguments = make(mode, torch.float32, device)
        arguments["layers"] = arguments.pop("num_layers")
        problem = check_problem("rnn", **arguments)
        grad_gates = torch.randn(12, 1 if problem.gates == 1 else 4, 7, device=device)
        for part in (kernels._of_input(problem, grad_gates), *kernels._of_state(problem, grad_gates)):
            assert part.untyped_storage().data_ptr() == grad_gates.data_ptr()
