"""fastnn.kernels.rnn.schedule: what a packed batch brings to a GPU, on GPUs and streams that are made up."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastnn.kernels import _plan_cache
from fastnn.kernels.rnn import schedule as _rnn_schedule
from fastnn.kernels.rnn.schedule import schedule_of

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


class Stream:
    def __init__(self):
        self.waited_for = []

    def record_event(self):
        return ("event of", self)

    def wait_event(self, event):
        self.waited_for.append(event)


@pytest.fixture
def cuda(monkeypatch):
    """Two GPUs, as far as a schedule uses them; the first is current. ``copies``: (page-locked, non_blocking) of each
    copy to a GPU; ``recorded``: the streams that a tensor's memory waits for."""
    state = SimpleNamespace(current=0, streams=[Stream(), Stream()], capturing=None, copies=[], recorded=[])

    @contextlib.contextmanager
    def device(device):
        before, state.current = state.current, device.index
        yield
        state.current = before

    page_locked, to = [], torch.Tensor.to

    def pin_memory(tensor):
        page_locked.append(tensor)
        return tensor

    def copy(tensor, device, non_blocking=False):
        state.copies.append((any(tensor is t for t in page_locked), non_blocking))
        return to(tensor, device)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.current)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state.streams[device.index])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing == state.current)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", copy)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: state.recorded.append(stream))
    monkeypatch.setattr(_rnn_schedule, "_read_by_graphs", set())
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield state


def test_values():
    assert schedule_of("rnn", (4, 3, 3, 1), torch.device("cpu")).tolist() == [0, 4, 7, 10, 11, 4, 3, 3, 1]
    assert schedule_of("rnn", (2,), torch.device("cpu")).tolist() == [0, 2, 1, 1]


def test_one_copy_from_page_locked_memory_that_nothing_waits_for(cuda):
    first = schedule_of("rnn_with_reserve", (3, 2), SECOND)
    assert first.device == SECOND
    assert schedule_of("rnn_backward", (3, 2), SECOND) is first
    assert cuda.copies == [(True, True)]
    schedule_of("rnn", (3, 2), FIRST)
    schedule_of("rnn", (3, 1), SECOND)
    assert len(cuda.copies) == 3
    assert cuda.recorded == []
    assert cuda.streams[1].waited_for == []


def test_another_stream_waits_for_the_copy_and_the_memory_for_the_stream(cuda):
    schedule, made_on = schedule_of("rnn", (3, 2), SECOND), cuda.streams[1]
    other = cuda.streams[1] = Stream()
    for _ in range(2):
        assert schedule_of("rnn", (3, 2), SECOND) is schedule
    assert cuda.recorded == [other]
    assert other.waited_for == [("event of", made_on)]
    cuda.streams[1] = made_on
    schedule_of("rnn", (3, 2), SECOND)
    assert (cuda.recorded, made_on.waited_for) == ([other], [])


def test_a_captured_graph_keeps_what_it_reads(cuda):
    schedule = schedule_of("rnn", (3, 2), SECOND)
    cuda.streams[1], cuda.capturing = Stream(), 1  # and the first GPU is current
    assert schedule_of("rnn", (3, 2), SECOND) is schedule
    assert (cuda.recorded, cuda.streams[1].waited_for, cuda.current) == ([], [], 0)
    _plan_cache.Plans.forget_all()
    assert [kept._tensor is schedule for kept in _rnn_schedule._read_by_graphs] == [True]


def test_another_gpus_capture_is_none_of_a_tensors(cuda):
    cuda.capturing = 0
    schedule_of("rnn", (3, 2), SECOND)
    assert not _rnn_schedule._read_by_graphs


def test_a_capture_refuses_new_batch_sizes(cuda):
    cuda.capturing = 1
    with pytest.raises(RuntimeError, match="once before the capture"):
        schedule_of("rnn", (3, 2), SECOND)
    assert cuda.copies == []


def test_forward_and_backward_of_networks_share_a_schedule(device, monkeypatch):
    """Whatever differs between calls but the batch sizes."""
    from fastnn.kernels.rnn import launch as rnn

    made = []
    values = _rnn_schedule._values
    monkeypatch.setattr(_rnn_schedule, "_values", lambda sizes: made.append(sizes) or values(sizes))
    for hidden in (5, 6):
        arguments = {
            "input": torch.randn(5, 3, device=device), "batch_sizes": torch.tensor([3, 2]), "state": [],
            "weights": [torch.randn(hidden, size, device=device) for size in (3, hidden)], "masks": None, "mode": 0,
            "num_layers": 1, "bidirectional": False, "batch_first": False,
        }  # fmt: skip
        output, final, reserve = rnn.rnn_with_reserve(**arguments)
        rnn.rnn_backward(output, final, **arguments, output=output, reserve=reserve, input_wanted=True,
                         state_wanted=True, weights_wanted=True)  # fmt: skip
    assert made == [(3, 2)]
