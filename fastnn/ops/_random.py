"""The numbers of torch's generator on the CPU, drawn by compiled code (csrc/ops/random.cpp).

What a network drops is what torch would drop from the same seed. torch draws the numbers one by one, which can take as
long as all layers together. So a call of a network lends the generator's state to compiled code, and stores the state
that this leaves.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastnn._extension import load_extension
from fastnn._torch import direct_call
from fastnn.ops._autograd import is_plain

_lend = direct_call(torch.ops.fastnn.lend_random_state.default)
_take_back = load_extension().take_back_random_state
_DRAWN = (torch.float32, torch.float64)


@cache
def draws_as_torch() -> bool:
    """Whether compiled code draws the numbers that torch draws here, and leaves the same state. (It does not where
    torch draws by a library of Intel's, nor if torch should change its generator.)"""
    generator = torch.Generator().manual_seed(2**40 + 7)
    for dtype in (torch.float32, torch.float64):
        for count, probability in ((1, 0.5), (1001, 0.3), (700, 0.9)):
            state, theirs = generator.get_state(), torch.empty(count, dtype=dtype)
            theirs.bernoulli_(probability, generator=generator)
            torch.empty(1).uniform_(generator=generator)  # takes one word, where the others take two
            try:
                ours = torch.ops.fastnn.draw_ones(state, theirs, probability)
            except RuntimeError:  # the state is of another kind
                return False
            after = torch.Generator()
            after.set_state(state)
            torch.empty(1).uniform_(generator=after)
            if not torch.equal(ours, theirs) or not torch.equal(after.get_state(), generator.get_state()):
                return False
    return True


def draw_ones(like: Tensor, probability: float) -> Tensor:
    """A tensor like a contiguous one, of ones, of this probability, and zeros, as ``bernoulli_`` draws them."""
    if not like.is_cpu or like.dtype not in _DRAWN or not is_plain(like) or not draws_as_torch():
        return torch.empty_like(like).bernoulli_(probability)
    state = torch.get_rng_state()
    ones: Tensor = torch.ops.fastnn.draw_ones(state, like, probability)
    torch.set_rng_state(state)
    return ones


class Lent:
    """For a call in which networks draw, if ``draws``: lends the state of torch's generator to this thread."""

    __slots__ = ("_state",)

    def __init__(self, draws: bool) -> None:
        self._state: Tensor | None = torch.get_rng_state() if draws and draws_as_torch() else None

    def __enter__(self) -> None:
        if self._state is not None:
            _lend(self._state)

    def __exit__(self, *error: Any) -> None:
        if self._state is not None and _take_back():
            torch.set_rng_state(self._state)
