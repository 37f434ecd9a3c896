"""The way of a user's call: modules and functions on a GPU, with what PyTorch does around them. Without a GPU all of it
runs on the CPU's kernels and on stand-ins (tools/gpu_stand_in.py), so that this file itself is tested."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastnn
from fastnn.kernels._plan_cache import Plans
from fastnn.reference import models as stock_models

# PyTorch's own, on a GPU: about tf32, about weights that a copy has scattered.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning"),
]
ON_GPU = torch.cuda.is_available()

NETWORKS = {  # stock, fused, input
    "conv2d": (
        lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
        lambda: fastnn.nn.ConvReLUMaxPool2d(3, 8, 3, padding=1),
        (4, 3, 12, 12),
    ),
    "rnn": (lambda: torch.nn.RNN(6, 16), lambda: fastnn.nn.RNN(6, 16), (5, 3, 6)),
    "gru": (
        lambda: torch.nn.GRU(6, 16, bidirectional=True),
        lambda: fastnn.nn.GRU(6, 16, bidirectional=True),
        (5, 3, 6),
    ),
    "lstm": (lambda: torch.nn.LSTM(6, 16, 2), lambda: fastnn.nn.LSTM(6, 16, 2), (5, 3, 6)),
    "wide": (lambda: torch.nn.GRU(6, 520), lambda: fastnn.nn.GRU(6, 520), (9, 3, 6)),
    # All layers at once.
    "layers": (lambda: torch.nn.GRU(6, 32, 3), lambda: fastnn.nn.GRU(6, 32, 3), (40, 3, 6)),
    "mlp": (
        lambda: torch.nn.Sequential(torch.nn.Linear(10, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)),
        lambda: fastnn.nn.MLP([10, 8, 4]),
        (32, 10),
    ),
    "Conv2DNet": (lambda: stock_models.Conv2DNet(7), lambda: fastnn.models.Conv2DNet(7), (4, 3, 20, 20)),
    "RNN": (lambda: stock_models.RNN(10, 32, 2, 5), lambda: fastnn.models.RNN(10, 32, 2, 5), (3, 6, 10)),
    "Autoencoder": (lambda: stock_models.Autoencoder(10, 8, 5), lambda: fastnn.models.Autoencoder(10, 8, 5), (32, 10)),
}  # fmt: skip


def make(name, device, dtype=torch.float32):
    """Stock and fused network of equal weights, on the device, and an input."""
    stock, fused, sizes = NETWORKS[name]
    stock, fused = stock(), fused()
    with torch.no_grad():
        for ours, theirs in zip(fused.parameters(), stock.parameters(), strict=True):
            ours.copy_(theirs)
    return stock.to(device, dtype), fused.to(device, dtype), torch.randn(sizes).to(device, dtype)


def first(result):
    return result[0] if isinstance(result, tuple) else result


def step(network, input):
    """Output and the gradients of the input and the parameters."""
    input = input.detach().requires_grad_()
    output = first(network(input))
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view(output.shape)
    return [output, *torch.autograd.grad((output * weight).sum(), [input, *network.parameters()])]


def assert_as_exact_as_stock(stock, fused, input, assert_near):
    exact = step(copy.deepcopy(stock).double().cpu(), input.double().cpu())
    for got, want in zip(step(fused, input), exact, strict=True):
        # Rounding may move a maximum, and with it a gradient, to a neighbour that is as good: judge the mass.
        assert_near(got.detach(), want.detach(), factor=4 if input.dtype is torch.float32 else 16)


@pytest.mark.parametrize("name", NETWORKS)
def test_forward_and_backward(name, device, assert_near):
    assert_as_exact_as_stock(*make(name, device), assert_near)


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm", "conv2d"])
def test_tf32(name, device, assert_near, tf32):
    stock, fused, input = make(name, device)
    exact = step(copy.deepcopy(stock).double().cpu(), input.double().cpu())
    for got, want in zip(step(fused, input), exact, strict=True):
        assert_near(got.detach(), want.detach(), factor=4000)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["rnn", "gru", "lstm", "wide", "mlp"])
def test_16_bit(name, dtype, device, assert_near):
    assert_as_exact_as_stock(*make(name, device, dtype), assert_near)


@pytest.mark.parametrize("name", ["conv2d", "lstm", "mlp"])
def test_gradcheck(name, device):
    _, fused, input = make(name, device, torch.float64)
    small = input[:2].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: first(fused(x)), (small,), fast_mode=True)


# With bfloat16, other kernels run than in float32: those with matrix instructions, those that wait for each other.
BOTH_KINDS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@BOTH_KINDS
@pytest.mark.parametrize("name", NETWORKS)
def test_results_repeat_bit_for_bit(name, dtype, device):
    _, fused, input = make(name, device, dtype)
    for a, b in zip(step(fused, input), step(fused, input), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NETWORKS)
def test_non_contiguous_input(name, device):
    _, fused, input = make(name, device)
    strided = torch.stack([input, input], -1)[..., 0]
    assert not strided.is_contiguous()
    # The CPU's kernels read it where it lies, and may take another algorithm, with another order of summation.
    exact = {"rtol": 0, "atol": 0} if ON_GPU else {}
    torch.testing.assert_close(first(fused(strided)), first(fused(input)), **exact)


@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_packed(cell, device, assert_near):
    stock, fused = getattr(torch.nn, cell)(6, 16).double(), getattr(fastnn.nn, cell)(6, 16).to(device)
    fused.load_state_dict(stock.state_dict())
    padded, lengths = torch.randn(9, 20, 6), torch.arange(20) % 9 + 1
    packed = pack_padded_sequence(padded.to(device), lengths, enforce_sorted=False)
    exact = pack_padded_sequence(padded.double(), lengths, enforce_sorted=False)
    assert_near(fused(packed)[0].data.detach(), stock(exact)[0].data.detach(), factor=4)


@BOTH_KINDS
@pytest.mark.parametrize("name", NETWORKS)
def test_cuda_graph(name, dtype, device):
    _, fused, input = make(name, device, dtype)
    with torch.no_grad():
        expected = first(fused(input * 2))
        graph, static = torch.cuda.CUDAGraph(), input.clone()
        fused(static)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            output = first(fused(static))
        static.copy_(input * 2)
        graph.replay()
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


@BOTH_KINDS
@pytest.mark.parametrize("name", NETWORKS)
def test_training_in_a_cuda_graph(name, dtype, device):
    _, fused, input = make(name, device, dtype)
    captured, expected = capture(lambda: step(fused, input))
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)


def make_packed(cell, device, dtype=torch.float32, hidden=16):
    network = getattr(fastnn.nn, cell)(6, hidden, device=device, dtype=dtype)
    packed = pack_padded_sequence(torch.randn(9, 4, 6, device=device, dtype=dtype), torch.tensor([9, 7, 3, 1]))
    return network, packed


def packed_step(network, packed):
    output = network(packed)[0].data
    return [output, *torch.autograd.grad(output.square().sum(), list(network.parameters()))]


# Whatever the card, by kernels of ours: whether stock's can be captured is another matter.
@pytest.mark.parametrize(("cell", "hidden", "dtype"), [
    ("GRU", 16, torch.float32), ("LSTM", 16, torch.bfloat16), ("LSTM", 300, torch.bfloat16),
])  # fmt: skip
def test_packed_sequences_in_a_cuda_graph(cell, hidden, dtype, device):
    network, packed = make_packed(cell, device, dtype, hidden)
    captured, expected = capture(lambda: packed_step(network, packed))
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)


def capture(step):
    """What a replay leaves in the tensors that a graph of ``step`` was captured with, after plans are gone; and what
    ``step`` gives. (CUDA refuses to capture whatever waits for the GPU.)"""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = [tensor.clone() for tensor in step()]
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = step()
    Plans.forget_all()
    torch.cuda.empty_cache()
    graph.replay()
    return captured, expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_autocast(name, dtype, device):
    stock, fused, input = make(name, device)
    if not ON_GPU:
        dtype = torch.bfloat16  # oneDNN has no LSTM in float16 on every CPU
    with torch.autocast(device.type, dtype):
        expected, actual = step(stock, input), step(fused, input)
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == want.dtype
    torch.testing.assert_close(actual[0], expected[0], rtol=0.05, atol=0.05)


def test_large(device):
    """Elements that 32 bits do not number: the last image and the last row are right."""
    half, most = torch.float16, 2**31 if ON_GPU else 2**21
    conv = fastnn.nn.ConvReLUMaxPool2d(16, 16, 3, padding=1, device=device, dtype=half)
    images = torch.randn(2, 16, 64, 64, device=device, dtype=half).repeat(most // 119_000, 1, 1, 1)
    assert images.numel() > most
    with torch.no_grad():
        output = conv(images)
        torch.testing.assert_close(output[-1], conv(images[-2:])[-1], rtol=0, atol=0)
        del images, output
        mlp = fastnn.nn.MLP([128, 64, 32], device=device, dtype=half)
        rows = torch.randn(128, 128, device=device, dtype=half).repeat(most // 15_000, 1)
        assert rows.numel() > most
        torch.testing.assert_close(mlp(rows)[-128:], mlp(rows[-128:]), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mlp", "packed"])
def test_another_thread_and_stream(name, device):
    """Backward too; once with what a plan of the first thread's and stream's has kept, once without."""
    if name == "packed":
        fused, input = make_packed("GRU", device)
        run = packed_step
    else:
        _, fused, input = make(name, device)
        run = step
    expected = run(fused, input)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def in_thread():
        with torch.cuda.stream(stream):
            kept = run(fused, input)
            Plans.forget_all()
            again = run(fused, input)
        stream.synchronize()
        return threading.get_ident(), kept, again

    with ThreadPoolExecutor(1) as pool:
        thread, *results = pool.submit(in_thread).result()
    assert thread != threading.get_ident()
    for actual in results:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_a_packed_batch_waits_for_nothing(cell, device):
    """Training with new batch sizes: torch raises where the CPU would wait for the GPU."""
    network, packed = make_packed(cell, device, torch.bfloat16)
    packed_step(network, packed)
    Plans.forget_all()
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed_step(network, packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["conv2d", "lstm", "mlp"])
def test_torch_compile(name, device):
    _, fused, input = make(name, device)
    compiled = torch.compile(fused, fullgraph=True)
    torch.testing.assert_close(first(compiled(input)), first(fused(input)))


def test_raw_operators_refuse_tensors_of_another_device(device):
    rows, weight = torch.randn(4, 3, device=device), torch.randn(2, 3, device="cpu" if ON_GPU else "meta")
    with pytest.raises(RuntimeError, match="same device"):
        torch.ops.fastnn.mlp(rows, [weight], "identity")


def test_recomputation(device):
    weights = [torch.randn(sizes, device=device).requires_grad_() for sizes in ((24, 10), (24, 24), (5, 24))]
    rows = torch.randn(70, 10, device=device, requires_grad=True)
    kept, again = (
        torch.autograd.grad(fastnn.functional.mlp(rows, weights, [None] * 3, "gelu", recompute=recompute).sum(),
                            [rows, *weights])
        for recompute in (False, True)
    )  # fmt: skip
    for got, want in zip(again, kept, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("grad_mode", [True, False])
def test_raw_operators_run_in_grad_mode_and_refuse_gradients(grad_mode, device):
    weights = [w.to(device).requires_grad_() for w in torch.nn.RNN(3, 16)._flat_weights]
    input = torch.randn(4, 2, 3, device=device)
    with torch.set_grad_enabled(grad_mode):
        output, _ = torch.ops.fastnn.rnn(input, None, [], weights, None, 0, 1, False, False)
    assert output.isfinite().all()
    if grad_mode:
        with pytest.raises(RuntimeError, match="no gradient of its own"):
            output.sum().backward()
