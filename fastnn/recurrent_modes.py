"""The modes of recurrent networks, as the extension's table has them (csrc/kernels/rnn.h)."""

from typing import NamedTuple

from fastnn._extension import load_extension


class Mode(NamedTuple):
    """One mode, by the name that ``torch.nn.RNNBase`` has for it."""

    name: str
    gates: int  # rows of the weights for each hidden unit
    states: int  # h, and LSTM's c
    saved: int  # numbers that a step saves of each hidden unit for backward, besides the output


# In the order of the numbers by which operators take them.
MODES = tuple(Mode(*row) for row in load_extension().recurrent_modes())
MODE_OF = {mode.name: mode for mode in MODES}
NUMBER_OF = {mode.name: number for number, mode in enumerate(MODES)}
