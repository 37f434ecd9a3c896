"""Activations and their derivatives on tiles, by their number in fastnn.ops.mlp.ACTIVATION_NAMES."""

import triton
import triton.language as tl

IDENTITY = tl.constexpr(0)
RELU = tl.constexpr(1)
TANH = tl.constexpr(2)
SIGMOID = tl.constexpr(3)
GELU = tl.constexpr(4)
GELU_TANH = tl.constexpr(5)
SILU = tl.constexpr(6)
LEAKY_RELU = tl.constexpr(7)

_LEAKY_SLOPE = tl.constexpr(0.01)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_GELU_CUBIC = tl.constexpr(0.044715)
_NORMAL_DENSITY_AT_0 = tl.constexpr(0.3989422804014327)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    # Of |x|, so that exp cannot overflow to inf / inf; the series keeps small x from cancelling.
    square = x * x
    small = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    decay = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 0.015625, small, tl.where(x < 0, -large, large))


@triton.jit
def _gelu_inner(x):
    # A constexpr stands on the right: on the left the interpreter does not multiply.
    return (x + x * x * x * _GELU_CUBIC) * _SQRT_2_OVER_PI


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """x: float32 tile."""
    if ACTIVATION == RELU:
        return tl.where(x <= 0, 0.0, x)  # NaN stays
    elif ACTIVATION == TANH:
        return tanh(x)
    elif ACTIVATION == SIGMOID:
        return sigmoid(x)
    elif ACTIVATION == GELU:
        return 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    elif ACTIVATION == GELU_TANH:
        return 0.5 * x * (1.0 + tanh(_gelu_inner(x)))
    elif ACTIVATION == SILU:
        return x * sigmoid(x)
    elif ACTIVATION == LEAKY_RELU:
        return tl.where(x < 0, x * _LEAKY_SLOPE, x)
    else:
        return x


@triton.jit
def activation_gradient(grad, saved, ACTIVATION: tl.constexpr):
    """``grad`` times the derivative. saved: the activation's input for gelu, gelu_tanh and silu, else its output."""
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
        return tl.where(saved > 0, grad, grad * _LEAKY_SLOPE)
    else:
        return grad
