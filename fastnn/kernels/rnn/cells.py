"""The arithmetic of a recurrent step, forward and backward, on tiles of float32: once, for all kernels.

What a step keeps for backward, and the gradients before the activations, are stacks of kinds. GRU's begin with the
hidden half of the new gate, so that the last three (r, z, n) lie as the input's weights take them, and the first three
hold what the recurrent weights meet; LSTM's are i, f, g, o, and among what is kept the cell's state after them.
"""

import triton
import triton.language as tl

from fastnn.kernels._activation import PTX, PTX_ROUGH, RELU, TANH, activate, activation_gradient, sigmoid, tanh
from fastnn.kernels.rnn.tile import unstack_4
from fastnn.recurrent_modes import MODE_OF, NUMBER_OF

SIMPLE_RELU = tl.constexpr(NUMBER_OF["RNN_RELU"])
GRU = tl.constexpr(NUMBER_OF["GRU"])
LSTM = tl.constexpr(NUMBER_OF["LSTM"])  # from GRU on, they have gates
# Numbers that a step saves of each hidden unit for backward, besides the output.
GRU_SAVED = tl.constexpr(MODE_OF["GRU"].saved)
LSTM_SAVED = tl.constexpr(MODE_OF["LSTM"].saved)


@triton.jit
def simple_cell(sums, MODE: tl.constexpr, MATH: tl.constexpr):
    if MODE == SIMPLE_RELU:
        return activate(sums, RELU)
    else:
        return activate(sums, TANH, MATH)


@triton.jit
def gru_cell(sum_r, sum_z, x_n, hidden_n, h, MATH: tl.constexpr):
    """-> the new h, and r, z, n."""
    r, z = sigmoid(sum_r, MATH), sigmoid(sum_z, MATH)
    n = tanh(x_n + r * hidden_n, MATH)
    return n + z * (h - n), r, z, n


@triton.jit
def lstm_cell(sum_i, sum_f, sum_g, sum_o, c, MATH: tl.constexpr):
    """-> the new h and c, and i, f, g, o."""
    i, f, o = sigmoid(sum_i, MATH), sigmoid(sum_f, MATH), sigmoid(sum_o, MATH)
    g = tanh(sum_g, MATH)
    c = f * c + i * g
    return o * tanh(c, MATH), c, i, f, g, o


@triton.jit
def cell_back(grad_h, grad_c, values, c, MODE: tl.constexpr, MATH: tl.constexpr):
    """From the gradients of a step's h, but for its output's, and of its c -> those of its kinds before the
    activations, a tuple; of the h before it, but for what goes through the gates; of the c before it; and that c.
    ``values``: what the step kept, see _rnn_backward_kernels.load_step. c and its gradient are LSTM's: else they are
    handed back."""
    grad_h += values[0].to(tl.float32)
    kept = values[1].to(tl.float32)
    through = tl.zeros_like(grad_h)
    if MODE == GRU:
        hidden_n, r, z, n = unstack_4(kept)
        grad_n = grad_h * (1.0 - z) * (1.0 - n * n)
        grad_z = grad_h * (values[2].to(tl.float32) - n) * z * (1.0 - z)
        grad_r = grad_n * hidden_n * r * (1.0 - r)
        grads = (grad_n * r, grad_r, grad_z, grad_n)
        through = grad_h * z
    elif MODE == LSTM:
        i, f, g, o = unstack_4(kept)
        c_before = values[2].to(tl.float32)
        # Not roughly: where c is large, the difference to 1 is all that is left of the gradient.
        tanh_c = tanh(c, PTX if MATH == PTX_ROUGH else MATH)
        grad_c += grad_h * o * (1.0 - tanh_c * tanh_c)
        grad_i = grad_c * g * i * (1.0 - i)
        grad_f = grad_c * c_before * f * (1.0 - f)
        grad_g = grad_c * i * (1.0 - g * g)
        grad_o = grad_h * tanh_c * o * (1.0 - o)
        grads = (grad_i, grad_f, grad_g, grad_o)
        grad_c, c = grad_c * f, c_before
    elif MODE == SIMPLE_RELU:
        grads = (activation_gradient(grad_h, kept, RELU),)
    else:
        grads = (activation_gradient(grad_h, kept, TANH),)
    return grads, through, grad_c, c
