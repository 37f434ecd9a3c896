"""The precision of dots: what stock's flags allow, and which numbers a matrix unit takes."""

from typing import Any

import torch
import triton.language as tl

from fastnn.kernels._target import INTERPRETED, Target

_TL_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

_FLAGS: dict[str, Any] = {
    "linear": torch.backends.cuda.matmul,
    "conv": torch.backends.cudnn.conv,
    "rnn": torch.backends.cudnn.rnn,
}

# Cards whose tensor cores multiply in tf32 at seven times the speed of float32 and more: three products for one pay.
_FAST_TF32 = (80, 90, 100, 103)
# Tensor cores truncate while they add. Dots of so many products, between which the compiler adds in float32, are as
# exact in three times tf32 as in float32; longer ones are not.
MOST_PRODUCTS_IN_TF32X3 = 32


def dot_precision(dtype: torch.dtype, stock: str, target: Target) -> str:
    """``input_precision`` for tl.dot, from the flag that the stock layer obeys: ``stock`` is "linear", "conv" or "rnn".

    Where it forbids tf32, a convolution is made of three tf32 products; not a chain of linear layers or a recurrent
    step, whose dots are longer than ``MOST_PRODUCTS_IN_TF32X3``."""
    if dtype is not torch.float32 or target.backend == "hip":
        return "ieee"
    if _FLAGS[stock].fp32_precision == "tf32":
        return "tf32"
    return "tf32x3" if stock == "conv" and target.arch in _FAST_TF32 else "ieee"


def uses_matrix_units(dtype: torch.dtype, precision: str, target: Target) -> bool:
    """Whether a dot becomes matrix instructions; on NVIDIA's cards a float32 one in one product without tf32 does
    not."""
    return dtype.itemsize == 2 or precision in ("tf32", "tf32x3") or target.backend == "hip"


def operand_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype of a dot's operands: the tensors' own, except that the interpreter keeps bfloat16 as integers, which
    only a conversion to float32 reads right."""
    return tl.float32 if INTERPRETED and dtype is torch.bfloat16 else _TL_DTYPES[dtype]
