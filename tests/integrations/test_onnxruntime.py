"""ONNX Runtime in the same process, on as many threads, by turns and at the same time."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from beside_stock import MODELS, OwnCalls, make, recipe, train_plainly

from fastnn.testing import assert_close_to_reference, using_threads

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx needs, is not installed")

# The exporter's, about its own code and of stock's recurrent layers too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights:UserWarning"),
]


@pytest.mark.parametrize("name", MODELS)
def test_by_turns(name: str) -> None:
    model, batches = make(name, rows=64)
    stock, double = copy.deepcopy(model).eval(), copy.deepcopy(model).double().eval()
    with torch.no_grad(), using_threads(2), OwnCalls() as called:
        results = recipe("ONNX Runtime").predict_by_turns(model, batches)
        assert sum(called.counts.values()) >= len(batches)
        expected, reference = [stock(x) for x, _ in batches], [double(x.double()) for x, _ in batches]
    for predicted, what in zip(zip(*results, strict=True), ("fastnn", "ONNX Runtime"), strict=True):
        assert_close_to_reference(predicted, expected, reference, what)


def test_at_the_same_time() -> None:
    """One thread trains a fused model while another predicts by ONNX Runtime."""
    page = recipe("ONNX Runtime")
    model, batches = make("cnn", steps=30, rows=64)
    alone = copy.deepcopy(model)
    session = page.make_session(model.eval(), batches[0][0])
    feed = {session.get_inputs()[0].name: batches[0][0].numpy()}
    expected = session.run(None, feed)[0]
    page.fastnn.fuse(model).train()
    page.fastnn.fuse(alone).train()
    with using_threads(2), ThreadPoolExecutor(1) as pool:
        losses = train_plainly(alone, batches)
        training = pool.submit(train_plainly, model, batches)
        predicted = [session.run(None, feed)[0]]
        while not training.done():
            predicted.append(session.run(None, feed)[0])
    torch.testing.assert_close(training.result(), losses, rtol=0, atol=0)
    for one in predicted:
        torch.testing.assert_close(one, expected, rtol=0, atol=0)
