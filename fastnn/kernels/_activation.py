"""Activations and their derivatives on tiles, by their numbers in the extension's table (fastnn/activations.py)."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnn.activations import KINDS

RELU = tl.constexpr(KINDS["relu"].number)
TANH = tl.constexpr(KINDS["tanh"].number)
SIGMOID = tl.constexpr(KINDS["sigmoid"].number)
GELU = tl.constexpr(KINDS["gelu"].number)
GELU_TANH = tl.constexpr(KINDS["gelu_tanh"].number)
SILU = tl.constexpr(KINDS["silu"].number)
LEAKY_RELU = tl.constexpr(KINDS["leaky_relu"].number)
ELU = tl.constexpr(KINDS["elu"].number)
HARDSWISH = tl.constexpr(KINDS["hardswish"].number)
SOFTPLUS = tl.constexpr(KINDS["softplus"].number)
HARDTANH = tl.constexpr(KINDS["hardtanh"].number)
SELU = tl.constexpr(KINDS["selu"].number)
MISH = tl.constexpr(KINDS["mish"].number)
EXP = tl.constexpr(KINDS["exp"].number)
SIN = tl.constexpr(KINDS["sin"].number)
COS = tl.constexpr(KINDS["cos"].number)

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_GELU_CUBIC = tl.constexpr(0.044715)
_NORMAL_DENSITY_AT_0 = tl.constexpr(0.3989422804014327)
_SCALE, _ALPHA = 1.0507009873554805, 1.6732632423543772  # SELU's
_SELU_SCALE = tl.constexpr(_SCALE)
_SELU_SCALE_ALPHA = tl.constexpr(_SCALE * _ALPHA)
_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)
_TWICE_LOG2_E = tl.constexpr(2.8853900817779268)
# tanh(x) = x + x (_TANH_3 x^2 + ..) for |x| < 0.55, with a relative error of 4e-8.
_TANH_SMALL_SQUARE = tl.constexpr(0.3025)
_TANH_3 = tl.constexpr(-0.33332947)
_TANH_5 = tl.constexpr(0.13320725)
_TANH_7 = tl.constexpr(-0.05267181)
_TANH_9 = tl.constexpr(0.01643757)


# How exp, tanh and sigmoid are computed.
PORTABLE = tl.constexpr(0)  # in Triton's own terms: for AMD's cards and the interpreter
PTX = tl.constexpr(1)  # as exact, by single instructions of NVIDIA's cards, which tl.exp and / wrap in checks
PTX_ROUGH = tl.constexpr(2)  # tanh by one instruction, with an error of 2**-11: float16's rounding has as much


@triton.jit
def _exp2_ptx(x):
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal_ptx(x):
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _tanh_ptx(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid(x, MATH: tl.constexpr = PORTABLE):
    # Never by tanh: a gate that is nearly closed would be wrong by more than it is open, in every step.
    if MATH == PORTABLE:
        return 1.0 / (1.0 + tl.exp(-x))
    else:
        return _reciprocal_ptx(1.0 + _exp2_ptx(x * _MINUS_LOG2_E))


@triton.jit
def tanh(x, MATH: tl.constexpr = PORTABLE):
    if MATH == PTX_ROUGH:
        return _tanh_ptx(x)
    else:
        square = x * x
        # Where the quotient below would cancel, a polynomial that was fitted to tanh(x) / x.
        inner = (((square * _TANH_9 + _TANH_7) * square + _TANH_5) * square + _TANH_3) * square
        small = x + x * inner
        # 1 - 2 / (exp(2x) + 1): overflow gives 1, and no sign has to be put back.
        if MATH == PTX:
            large = 1.0 - 2.0 * _reciprocal_ptx(1.0 + _exp2_ptx(x * _TWICE_LOG2_E))
        else:
            large = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))
        return tl.where(square < _TANH_SMALL_SQUARE, small, large)


@triton.jit
def _gelu_inner(x):
    # A constexpr stands on the right: on the left the interpreter does not multiply.
    return (x + x * x * x * _GELU_CUBIC) * _SQRT_2_OVER_PI


@triton.jit
def _expm1_below_0(x, MATH: tl.constexpr = PORTABLE):
    t = tanh(x * 0.5, MATH)
    return 2.0 * t / (1.0 - t)  # cancels nowhere below 0


@triton.jit
def _mish_gate(x):
    e = tl.exp(tl.where(x > 20, 20.0, x))  # where x is larger, the gate rounds to 1
    dividend = e * (e + 2.0)
    return dividend / (dividend + 2.0)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, MATH: tl.constexpr = PORTABLE, FIRST: tl.constexpr = 0.0,
             SECOND: tl.constexpr = 0.0):  # fmt: skip
    """x: float32 tile. FIRST and SECOND are the activation's parameters."""
    if ACTIVATION == RELU:
        return tl.where(x <= 0, 0.0, x)  # NaN stays
    elif ACTIVATION == TANH:
        return tanh(x, MATH)
    elif ACTIVATION == SIGMOID:
        return sigmoid(x, MATH)
    elif ACTIVATION == GELU:
        return 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    elif ACTIVATION == GELU_TANH:
        return 0.5 * x * (1.0 + tanh(_gelu_inner(x), MATH))
    elif ACTIVATION == SILU:
        return x * sigmoid(x, MATH)
    elif ACTIVATION == LEAKY_RELU:
        return tl.where(x > 0, x, x * FIRST)
    elif ACTIVATION == ELU:
        return tl.where(x > 0, x, _expm1_below_0(x, MATH) * FIRST)
    elif ACTIVATION == HARDSWISH:
        return x * tl.where(x <= -3, 0.0, tl.where(x >= 3, 6.0, x + 3.0)) / 6.0
    elif ACTIVATION == SOFTPLUS:
        scaled = x * FIRST  # log(1 + exp(a)) = max(a, 0) + log(1 + exp(-|a|))
        small = tl.exp(tl.where(scaled > 0, -scaled, scaled))
        rounded = small + 1.0
        # The logarithm of what the sum was rounded to, put right by how much that was.
        log1p = tl.where(rounded == 1.0, small, tl.log(rounded) * small / (rounded - 1.0))
        return tl.where(scaled > SECOND, x, (tl.where(scaled <= 0, 0.0, scaled) + log1p) / FIRST)
    elif ACTIVATION == HARDTANH:
        return tl.where(x <= FIRST, FIRST, tl.where(x >= SECOND, SECOND, x))
    elif ACTIVATION == SELU:
        return tl.where(x > 0, x * _SELU_SCALE, _expm1_below_0(x, MATH) * _SELU_SCALE_ALPHA)
    elif ACTIVATION == MISH:
        return x * _mish_gate(x)
    elif ACTIVATION == EXP:
        return tl.exp(x)
    elif ACTIVATION == SIN:
        return tl.sin(x)
    elif ACTIVATION == COS:
        return tl.cos(x)
    else:
        return x


@triton.jit
def activation_gradient(grad, saved, ACTIVATION: tl.constexpr, FIRST: tl.constexpr = 0.0, SECOND: tl.constexpr = 0.0):
    """``grad`` times the derivative. saved: what the table says that the derivative is computed from."""
    if ACTIVATION == RELU:
        return tl.where(saved <= 0, 0.0, grad)
    elif ACTIVATION == TANH:
        return grad * (1.0 - saved * saved)
    elif ACTIVATION == SIGMOID:
        return grad * saved * (1.0 - saved)
    elif ACTIVATION == GELU:
        cumulative = 0.5 * (1.0 + tl.erf(saved * _SQRT_HALF))
        return grad * (cumulative + saved * _NORMAL_DENSITY_AT_0 * tl.exp(-0.5 * saved * saved))
    elif ACTIVATION == GELU_TANH:
        t = tanh(_gelu_inner(saved))
        slope = (1.0 + saved * saved * _GELU_CUBIC * 3.0) * _SQRT_2_OVER_PI
        return grad * (0.5 * (1.0 + t) + 0.5 * saved * (1.0 - t * t) * slope)
    elif ACTIVATION == SILU:
        gate = sigmoid(saved)
        return grad * gate * (1.0 + saved * (1.0 - gate))
    elif ACTIVATION == LEAKY_RELU:
        return tl.where(saved > 0, grad, grad * FIRST)
    elif ACTIVATION == ELU:
        return tl.where(saved <= 0, grad * tl.exp(saved) * FIRST, grad)
    elif ACTIVATION == HARDSWISH:
        return tl.where(saved <= -3, 0.0, tl.where(saved < 3, grad * (saved / 3.0 + 0.5), grad))
    elif ACTIVATION == SOFTPLUS:
        return tl.where(saved * FIRST > SECOND, grad, grad * sigmoid(saved * FIRST))
    elif ACTIVATION == HARDTANH:
        return tl.where((saved <= FIRST) | (saved >= SECOND), 0.0, grad)
    elif ACTIVATION == SELU:
        return grad * tl.where(saved <= 0, tl.exp(saved) * _SELU_SCALE_ALPHA, _SELU_SCALE)
    elif ACTIVATION == MISH:
        gate = _mish_gate(saved)
        return grad * (gate + saved * sigmoid(saved) * (1.0 - gate * gate))
    elif ACTIVATION == EXP:
        return grad * saved
    elif ACTIVATION == SIN:
        return grad * tl.cos(saved)
    elif ACTIVATION == COS:
        return -grad * tl.sin(saved)
    else:
        return grad


# The same by torch's kernels, for layers that those compute: (grad, saved, *parameters) -> grad times the derivative.
_aten = torch.ops.aten
STOCK_GRADIENTS: dict[str, Callable[..., Tensor]] = {
    "identity": lambda grad, saved: grad,
    "relu": lambda grad, saved: _aten.threshold_backward(grad, saved, 0),
    "tanh": _aten.tanh_backward,
    "sigmoid": _aten.sigmoid_backward,
    "gelu": _aten.gelu_backward,
    "gelu_tanh": lambda grad, saved: _aten.gelu_backward(grad, saved, approximate="tanh"),
    "silu": _aten.silu_backward,
    "leaky_relu": lambda grad, saved, slope: _aten.leaky_relu_backward(grad, saved, slope, False),
    "elu": lambda grad, saved, alpha: _aten.elu_backward(grad, alpha, 1, 1, False, saved),
    "hardswish": _aten.hardswish_backward,
    "softplus": _aten.softplus_backward,
    "hardtanh": _aten.hardtanh_backward,
    "selu": lambda grad, saved: _aten.elu_backward(grad, _ALPHA, _SCALE, 1, False, saved),
    "mish": _aten.mish_backward,
    "exp": lambda grad, saved: grad * saved,
    "sin": lambda grad, saved: grad * saved.cos(),
    "cos": lambda grad, saved: -grad * saved.sin(),
}
