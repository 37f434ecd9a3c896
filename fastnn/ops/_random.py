"""The numbers of torch's generator on the CPU, drawn by compiled code (csrc/ops/random.cpp).

What a network drops is what torch would drop from the same seed. torch draws the numbers one by one, which can take as
long as all layers together. So compiled code takes the generator's state, draws, and stores the state that this leaves.
It holds the interpreter's lock meanwhile, so that two networks never draw the same numbers.
"""

import torch
from torch import Tensor

from fastnn._extension import load_extension
from fastnn.ops._autograd import is_plain

_DRAWN = (torch.float32, torch.float64)


def draws_as_torch() -> bool:
    """Whether compiled code draws the numbers that torch draws here, and leaves the same state. (It does not where
    torch draws by a library of Intel's, nor if torch should change its generator.)"""
    generator = torch.Generator().manual_seed(2**40 + 7)
    for dtype in _DRAWN:
        for count, probability in ((1, 0.5), (1001, 0.3), (700, 0.9)):
            state, theirs = generator.get_state(), torch.empty(count, dtype=dtype, device="cpu")
            theirs.bernoulli_(probability, generator=generator)
            torch.empty(1, device="cpu").uniform_(generator=generator)  # takes one word, where the others take two
            try:
                ours = torch.ops.fastnn.draw_ones_of_state(state, theirs, probability)
            except RuntimeError:  # the state is of another kind
                return False
            after = torch.Generator()
            after.set_state(state)
            torch.empty(1, device="cpu").uniform_(generator=after)
            if not torch.equal(ours, theirs) or not torch.equal(after.get_state(), generator.get_state()):
                return False
    return True


if draws_as_torch():
    load_extension().draw_from(torch.default_generator)


def draw_ones(like: Tensor, probability: float) -> Tensor:
    """A tensor like a contiguous one, of ones, of this probability, and zeros, as ``bernoulli_`` draws them."""
    if not like.is_cpu or like.dtype not in _DRAWN or not is_plain(like):
        return torch.empty_like(like).bernoulli_(probability)
    ones: Tensor = torch.ops.fastnn.draw_ones(like, probability)
    return ones
