"""The private names of PyTorch that fastnn uses, in one place: what each is for, and the public code that runs instead
where a torch no longer has the name. tests/test_torch_names.py checks that the installed torch has each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import Any, TypeAlias

import torch
import torch.utils._device
from torch import Tensor, nn
from torch.autograd import forward_ad as forward_ad
from torch.nn import common_types
from torch.nn.modules import conv as _conv
from torch.nn.modules import module as _module
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # sees every operator that is called

pytree = _pytree
ConvNd = _conv._ConvNd  # what Conv1d, Conv2d and Conv3d derive from
# For annotations: one number, or one a dimension.
size_1_t: TypeAlias = common_types._size_1_t
size_2_t: TypeAlias = common_types._size_2_t
size_3_t: TypeAlias = common_types._size_3_t

NAMES: list[str] = []  # within torch, those that have a fallback here


def _private(name: str, fallback: Any) -> Any:
    NAMES.append(name)
    try:
        return attrgetter(name)(torch)
    except AttributeError:
        return fallback


def _suggest_memory_format(tensor: Tensor) -> torch.memory_format:
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


# ---- which modes are on: each is asked at every call, and takes 40 ns, a tenth of what the public ways take ----------

autocast_is_on: Callable[[], bool] = _private(
    "_C._is_any_autocast_enabled", lambda: torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
)
is_tracing: Callable[[], bool] = _private("_C._is_tracing", torch.jit.is_tracing)
# Transforms of torch.func. Without the name every call takes the way of transforms, which is right and slower.
transforms_active: Callable[[], bool] = _private("_C._are_functorch_transforms_active", lambda: True)
# Hooks of all modules. Without the name fused models run their stock forwards.
has_any_global_hook: Callable[[], bool] = getattr(_module, "_has_any_global_hook", lambda: True)
_count_of_function_modes: Callable[[], int] = _private("_C._len_torch_function_stack", lambda: 1)
_function_modes: Callable[[], Sequence[Any]] = _private("overrides._get_current_function_mode_stack", list)
_device_context: Any = _private("utils._device.DeviceContext", ())


def functions_are_watched() -> bool:
    """Whether a ``TorchFunctionMode`` is on that may change what torch's functions do. The mode that sets a default
    device does not count."""
    return bool(_count_of_function_modes()) and any(type(mode) is not _device_context for mode in _function_modes())


# Whether the backward that is running keeps the graph, as ``retain_graph=True`` asks.
backward_may_run_again: Callable[[], bool] = _private("_C._autograd._get_current_graph_task_keep_graph", lambda: True)
_top_hooks: Callable[[bool], Any] = _private("_C._autograd._top_saved_tensors_default_hooks", lambda ignored: True)


def saved_tensors_are_hooked() -> bool:
    """Whether what is saved for backward goes through somebody's hooks, as within ``torch.autograd.graph.save_on_cpu``
    and activation checkpoints. Without the private name it counts as if it always did."""
    return _top_hooks(False) is not None


# ---- what tensors are ------------------------------------------------------------------------------------------------

# torch.autograd.grad makes batches of gradients for is_grads_batched. No public name detects them or takes them apart.
is_legacy_batchedtensor: Callable[[Tensor], bool] = _private("_C._functorch.is_legacy_batchedtensor", lambda t: False)
remove_batch_dim: Callable[..., Tensor] = _private("_remove_batch_dim", None)
add_batch_dim: Callable[..., Tensor] = _private("_add_batch_dim", None)
# Parameters, and tensors that intercept operators but no functions, have this in place of a __torch_function__.
no_torch_function: Any = _private("_C._disabled_torch_function_impl", nn.Parameter.__torch_function__)
suggest_memory_format: Callable[[Tensor], torch.memory_format] = _private(
    "_prims_common.suggest_memory_format", _suggest_memory_format
)
OpOverload: Any = type(torch.ops.aten.relu.default)


def direct_call(operator: Any) -> Callable[..., Any]:
    """What calling an operator does in the end. This saves 0.25 us. torch.compile knows only the operator itself."""
    call: Callable[..., Any] = getattr(operator, "_op", operator)
    return call


def statically_known_true(value: Any) -> bool:
    """Whether torch.export knows that a size, or a comparison of sizes, is true for all inputs. (The module is imported
    here, since it brings sympy with it, which takes as long as the rest of fastnn.)"""
    module = import_module("torch.fx.experimental.symbolic_shapes")
    return bool(getattr(module, "statically_known_true", bool)(value))


def remember_builtins() -> None:
    """Makes torch.compile list Python's builtins now, for callers who replace one of the builtins for a while.
    torch.compile knows a builtin by its identity, and makes the list at its first use. If the list were made while
    ``len`` is replaced, every later compilation would stop at Python's own ``len``. Where torch has no
    ``is_builtin_callable``, that can still happen. (The module is imported here, since importing it takes a second.)"""
    module = import_module("torch._dynamo.trace_rules")
    getattr(module, "is_builtin_callable", bool)(len)


def guard_of_sizes(exported: Any) -> Callable[..., Any] | None:
    """What an exported model asks of the sizes of its inputs where it compares one with another: a function of all
    input tensors that raises an AssertionError for others. None where it compares none, or where torch has no such
    function: then a model that does something else for batches larger than another size is not noticed."""
    if not getattr(exported, "_guards_code", True):
        return None
    guard: Callable[..., Any] | None = getattr(exported.module(), "_guards_fn", None)
    return guard


# ---- what the build and the machine have -----------------------------------------------------------------------------

operator_names: Callable[[], list[str]] = _private("_C._dispatch_get_all_op_names", list)
has_kernel: Callable[[str, str], bool] = _private("_C._dispatch_has_kernel_for_dispatch_key", lambda name, key: True)


def onednn_dtypes() -> frozenset[torch.dtype]:
    """The dtypes that oneDNN computes in on this processor, as far as torch asks it to."""
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    return frozenset(
        {torch.float32, torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else {torch.float32}
    )


def raw_stream(device: int) -> int:
    """The handle of a GPU's current stream, without an object around it: 1 us less at every launch."""
    get = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return int(torch.cuda.current_stream(device).cuda_stream if get is None else get(device))


# What torch.compile makes of its arguments mode, options and dynamic for its own backend.
_inductor_with_options: Any = _private("_TorchCompileInductorWrapper", None)


def inductor(mode: str | None = None, options: Any = None) -> Callable[..., Any]:
    """The compiler that takes a captured graph and example inputs, with a mode or options as torch.compile takes
    them."""
    compiler: Callable[..., Any]
    if (mode or options) and _inductor_with_options is not None:
        compiler = _inductor_with_options(mode, options, None)
    else:
        compiler = partial(torch._dynamo.lookup_backend("inductor"), **{"config_patches": options} if options else {})
    return compiler


# Hooks of all optimizers. Without the names nothing is known of such hooks.
OF_OPTIMIZER_MODULE = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
optimizer_module = import_module("torch.optim.optimizer")  # which torch.optim has no attribute for
global_optimizer_hooks: Sequence[dict[int, Any]] = [getattr(optimizer_module, name, {}) for name in OF_OPTIMIZER_MODULE]


def note_step_of(optimizer: torch.optim.Optimizer) -> None:
    """Tells the optimizer's schedulers that it has made a step. Without that they warn."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


# ---- attributes of torch's objects, which are read in place of methods that take longer or are not there -------------

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of a module
TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
OF_FORWARD_AD = ("_current_level",)  # at least 0 while a level of forward-mode differentiation is open
OF_MODULES = ("_parameters", "_buffers", "_modules", *HOOKS, "_compiled_call_impl", "_apply", "_load_from_state_dict")
OF_CONVOLUTIONS = ("_reversed_padding_repeated_twice",)  # the padding as F.pad takes it
OF_RECURRENT_LAYERS = ("_flat_weights", "_flat_weights_names", "_update_flat_weights")
# `_op` is what calling an operator does in the end: see direct_call. `_schema` tells an operator's arguments.
OF_OPERATORS = ("_op", "_schema")
OF_OPTIMIZERS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
OF_TENSORS = ("_version", *TENSOR_HOOKS)
# What a DistributedDataParallel has where it averages in another way than by the mean of all gradients.
OF_DISTRIBUTED_DATA_PARALLEL = ("_comm_hooks", "buffer_hook", "mixed_precision", "parameters_to_ignore", "device_ids")
