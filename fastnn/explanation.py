"""Which of fastnn's operators a model calls, and how they will do their work."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_EXPLAINED = {torch.ops.fastnn.conv_relu_max_pool.default: torch.ops.fastnn.conv_relu_max_pool_algorithm.default}


@dataclass(frozen=True)
class ExplainedCall:
    """One operator call: where it comes from, and the algorithms that its sizes lead to."""

    layer: str  # the innermost module's name in the model
    operator: str
    input: str
    forward: str
    backward: str


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found. Prints as a table."""

    calls: tuple[ExplainedCall, ...]

    def __str__(self) -> str:
        if not self.calls:
            return "no operator of fastnn is called"
        heading = ("layer", "operator", "input", "forward", "backward")
        rows = [heading, *(tuple(getattr(call, name) for name in heading) for call in self.calls)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(heading))]
        return "\n".join("  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in rows)


class _Recorder(TorchDispatchMode):
    """Writes down every call of an operator of fastnn."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[ExplainedCall] = []
        self.layers: list[str] = []  # those being run, the innermost last

    def leave(self) -> None:
        self.layers.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastnn":
            algorithms = _EXPLAINED[func](*args) if func in _EXPLAINED else ("fused", "fused")
            input = next(argument for argument in args if isinstance(argument, Tensor))
            text = f"{tuple(input.shape)} {str(input.dtype).removeprefix('torch.')}"
            layer = self.layers[-1] if self.layers else ""
            self.calls.append(ExplainedCall(layer, func.overloadpacket.__name__, text, *algorithms))
        return func(*args, **(kwargs or {}))


def explain(model: nn.Module, *inputs: Any) -> Explanation:
    """Run ``model(*inputs)`` once, without gradients, and report every call of an operator of fastnn that it makes.

    For ``conv_relu_max_pool`` the report names the algorithm of forward (the files of csrc/kernels/conv):

    - ``winograd``: 3x3 kernels of stride 1 by 16 multiplications in place of 36 for four pixels;
    - ``phases``: rows of a kernel that are longer than its stride, two pixels of r taps by r + 1 multiplications;
    - ``pixels``: pixels in the vector's lanes, for few outputs or few inputs;
    - ``depthwise``: groups of one channel, channels last, in the lanes;
    - ``direct``: output channels in the lanes, or the processor's matrix unit for bfloat16;
    - ``stock``: torch's own convolution, some images at a time, with ReLU and max-pool in one pass behind it;

    and of a training step's backward: ``winners``, which visits the windows' winners alone, ``depthwise``, which has
    channels in the lanes, ``taps``, which has pixels there (for few input channels), or ``stock``, torch's own
    convolution. A layer that isn't listed takes PyTorch's own path.
    ``fastnn.models.Conv2DNet``, which otherwise infers by one operator, is reported layer by layer: the algorithms are
    the same.
    """
    recorder = _Recorder()
    hooks = []
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn."):
            continue  # it calls no operator of fastnn, and hooks would keep its MLP from running it in the kernel
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: recorder.layers.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: recorder.leave()))
    try:
        with torch.no_grad(), recorder:
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return Explanation(tuple(recorder.calls))
