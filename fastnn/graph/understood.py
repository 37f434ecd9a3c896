"""What code may do while it is traced: which functions become nodes or are called as they are, and which instructions
end the trace."""

from __future__ import annotations

import dis
import functools
import math
import operator
import types
from typing import Any

import torch

from fastnn import functional
from fastnn.graph.order import FACTORIES, functions_of_torch

# ---- what may be called ---------------------------------------------------------------------------------------------

_FACTORIES = (
    *FACTORIES,
    *("as_tensor", "scalar_tensor", "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like"),
    *("normal", "triu_indices", "hann_window", "hamming_window", "blackman_window", "bartlett_window"),
    "kaiser_window",
)
# Functions that give a constant and tell of a mode: they are asked again at each call.
_MODES = (
    *("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "get_default_dtype", "get_num_threads"),
    *("are_deterministic_algorithms_enabled", "get_autocast_dtype", "get_float32_matmul_precision"),
)
PURE_FUNCTIONS = frozenset(
    {
        *(abs, all, any, divmod, iter, len, max, min, next, pow, round, sorted, sum),
        *(value for module in (math, operator) for value in vars(module).values() if callable(value)),
        functools.reduce,
    }
)
PURE_CLASSES = frozenset(
    {
        *(bool, complex, dict, enumerate, filter, float, frozenset, int, list, map, range, reversed, set, slice, str),
        *(tuple, zip, torch.device, torch.Size, torch.finfo, torch.iinfo, functools.partial),
    }
)
# Methods of tensors that do more than compute, or give what is no tensor.
WRITERS = frozenset(
    {
        *("apply_", "backward", "data_ptr", "map_", "numpy", "register_hook", "register_post_accumulate_grad_hook"),
        *("retain_grad", "set_", "share_memory_", "storage", "tolist", "typed_storage", "untyped_storage"),
        *("__array__", "__dlpack__", "sorted_indices", "unsorted_indices"),
    }
)
# Attributes of tensors and of packed sequences that are never None.
ATTRIBUTES = frozenset(
    {
        *("T", "mT", "H", "mH", "real", "imag", "data", "shape", "dtype", "device", "layout", "ndim", "itemsize"),
        *("nbytes", "requires_grad", "is_leaf", "is_cuda", "is_cpu", "is_sparse", "is_nested", "batch_sizes"),
    }
)


@functools.cache
def primitives() -> frozenset[Any]:
    """The functions of torch that become nodes: they act on tensors, or make one."""
    found = set(functions_of_torch())
    found |= {getattr(torch, name) for name in _FACTORIES if hasattr(torch, name)}
    found |= {f for f in vars(functional).values() if str(getattr(f, "__module__", "")).startswith("fastnn.ops")}
    return frozenset(found)


@functools.cache
def mode_functions() -> frozenset[Any]:
    return frozenset(getattr(torch, name) for name in _MODES if hasattr(torch, name))


_FUNCTION_TYPES = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
)


_NOT_PURE = frozenset(
    {
        *(
            operator.is_,
            operator.is_not,
            operator.setitem,
            operator.delitem,
            operator.attrgetter,
            operator.methodcaller,
        ),
        *(operator.itemgetter, operator.call if hasattr(operator, "call") else None),
    }
)


def is_primitive(value: Any) -> bool:
    """Whether a function becomes a node, or is called as it is."""
    if not isinstance(value, _FUNCTION_TYPES):
        return False
    if value in _NOT_PURE:
        return False
    return value in primitives() or value in PURE_FUNCTIONS or value in mode_functions()


# ---- what code must not do ------------------------------------------------------------------------------------------

# Attributes, besides those of objects, that code may ask for though their names begin and end with underscores.
_SPECIAL_NAMES = ("__class__", "__name__", "__call__", "__len__", "__getitem__", "__iter__", "__contains__", "__init__")
_CATCHES = ("SETUP_FINALLY", "SETUP_ASYNC_WITH", "BEFORE_ASYNC_WITH")
_WRITES_GLOBALS = ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_NAME", "DELETE_NAME")


@functools.lru_cache(maxsize=4096)
def why_not_run(code: types.CodeType) -> tuple[str, int] | None:
    """The first thing in a function's code that stand-ins cannot see or must not do, with the number of its line."""
    line = code.co_firstlineno
    before: dis.Instruction | None = None
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        line = _line_of(instruction) or line
        # (A with block has such code, too, which ends the block.)
        is_caught = before is not None and before.opname == "PUSH_EXC_INFO" and name != "WITH_EXCEPT_START"
        if name in _CATCHES or is_caught:
            return "it catches exceptions", line
        if name in _WRITES_GLOBALS:
            return f"it writes the global {instruction.argval}", line
        if name in ("STORE_DEREF", "DELETE_DEREF") and instruction.argval in code.co_freevars:
            return f"it writes the variable {instruction.argval} of an outer function", line
        is_none = before is not None and before.opname == "LOAD_CONST" and before.argval is None
        if name == "IS_OP" and (not is_none or instruction.is_jump_target):
            return "it asks whether two objects are one", line
        if name.startswith("MATCH_"):
            return "it matches patterns of classes, sequences or mappings", line
        if is_special(instruction.argval) and name.startswith(
            ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR")
        ):
            return f"it asks for {instruction.argval}", line
        if name == "IMPORT_NAME":
            return "it imports a module", line
        if name != "CACHE":
            before = instruction
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType) and (reason := why_not_run(constant)):
            return reason
    return None


def is_special(name: Any) -> bool:
    """Whether an attribute of this name tells of how an object is made, as a function's globals."""
    return isinstance(name, str) and name.startswith("__") and name.endswith("__") and name not in _SPECIAL_NAMES


def _line_of(instruction: dis.Instruction) -> int | None:
    line = getattr(instruction, "line_number", None)  # since Python 3.13
    if line is None and not isinstance(instruction.starts_line, bool):
        line = instruction.starts_line
    return line


@functools.lru_cache(maxsize=4096)
def asks_for_none(code: types.CodeType) -> bool:
    names = {instruction.opname for instruction in dis.get_instructions(code)}
    return "IS_OP" in names or any(name.endswith("NONE") for name in names)
