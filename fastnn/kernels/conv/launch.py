"""``fastnn::conv_relu_max_pool`` on a GPU: one launch where the convolution is short enough for its output to be worth
keeping on chip; else stock's convolution with ReLU, max-pool and their gradient in one launch behind or before it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastnn.kernels import _launch, _plan_cache, _precision, _target
from fastnn.kernels._check import check
from fastnn.kernels.conv.geometry import Problem, as_image, channels_last, divisors, memory_format
from fastnn.kernels.conv.plan import Plan, facts, plan_backward, plan_forward

# ---- forward ----------------------------------------------------------------------------------------------


def conv_relu_max_pool(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[int], algorithm: str | None = None
) -> Tensor:
    """``fastnn::conv_relu_max_pool``: input (images, in channels, ...), weight (out channels, in channels / groups,
    ...), bias (out channels) or None, geometry as Geometry.flat gives it -> (images, out channels, ...). There are
    no algorithms to be asked for by name."""
    _check_no_algorithm("conv_relu_max_pool", algorithm)
    return _forward("conv_relu_max_pool", input, weight, bias, geometry, False)[0]


def conv_relu_max_pool_with_winners(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[int], algorithm: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """``fastnn::conv_relu_max_pool_with_winners``: the output, and each window's winner by its place, uint8."""
    _check_no_algorithm("conv_relu_max_pool_with_winners", algorithm)
    return _forward("conv_relu_max_pool_with_winners", input, weight, bias, geometry, True)


def _check_no_algorithm(op: str, algorithm: str | None) -> None:
    check(algorithm is None, op, ": algorithm '", algorithm, "' does not apply to a GPU")


_plans = _plan_cache.Plans()


def _forward(
    op: str, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[int], with_winners: bool
) -> tuple[Tensor, Tensor | None]:
    target = _target.target_of(input.device)
    precision = _precision.dot_precision(input.dtype, "conv", target)
    key = (op, *geometry, target, precision, facts(input), facts(weight), facts(bias))
    plan = _plans.get(key)
    if plan is None:
        plan = _plans.keep(key, plan_forward(op, input, weight, bias, geometry, with_winners, precision, target))
    problem = plan.problem
    output = torch.empty(
        problem.sizes(problem.out_size), dtype=input.dtype, device=input.device, memory_format=plan.format
    )
    winners = torch.empty_like(output, dtype=torch.uint8) if with_winners else None
    if output.numel() > 0:
        (_run_fused if plan.fused else _run_stock)(plan, input, weight, bias, output, winners)
    return output, winners


def _kernel_input(plan: Plan, input: Tensor) -> Tensor:
    """The input in the format that the fused kernels take."""
    if plan.x_format is torch.contiguous_format:
        return input.contiguous()
    return as_image(input).contiguous(memory_format=plan.x_format)


def _kernel_weight(plan: Plan, weight: Tensor) -> Tensor:
    return as_image(weight).contiguous(memory_format=plan.w_format)


def _run_fused(
    plan: Plan, input: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor, winners: Tensor | None
) -> None:
    problem, x, w = plan.problem, _kernel_input(plan, input), _kernel_weight(plan, weight)
    if plan.packs is not None:
        pack_x, pack_w = plan.packs
        x, w = pack_x(x), pack_w(w)
    plan.launch(
        *(x, w, None if bias is None else bias.contiguous(), output, winners, problem.pooled_pixels),
        *(problem.in_size, problem.conv_size, problem.out_size, plan.divisors, plan.steps),
    )


def _run_stock(
    plan: Plan, input: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor, winners: Tensor | None
) -> None:
    problem, arguments = plan.problem, plan.arguments
    with _launch.without_autocast(input.device):
        conv = torch.convolution(
            input, weight, bias, arguments.stride, arguments.padding, arguments.dilation, False, [0] * problem.dims,
            arguments.groups,
        )  # fmt: skip
    conv = conv.contiguous(memory_format=plan.format)
    plan.launch(conv, output, winners, problem.pooled_pixels, problem.conv_size, problem.out_size, plan.divisors)


# ---- backward ---------------------------------------------------------------------------------------------


def conv_relu_max_pool_backward(
    grad_output: Tensor,
    winners: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: Sequence[int],
    input_wanted: bool,
    weight_wanted: bool,
    bias_wanted: bool,
    algorithm: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastnn::conv_relu_max_pool_backward``: the gradients of input, weight and bias; one that is not wanted comes
    back empty."""
    _check_no_algorithm("conv_relu_max_pool_backward", algorithm)
    wanted = (input_wanted, weight_wanted, bias_wanted)
    target = _target.target_of(input.device)
    precision = _precision.dot_precision(input.dtype, "conv", target)
    tensors = (grad_output, winners, input, weight)
    key = ("backward", *geometry, *wanted, target, precision, *map(facts, tensors))
    plan = _plans.get(key)
    if plan is None:
        plan = _plans.keep(key, plan_backward(*tensors, geometry, precision, target))
    problem = plan.problem
    if problem.images == 0:
        gradients: Sequence[Tensor | None] = (input.new_empty(input.shape), torch.zeros_like(weight),
                                              weight.new_zeros(weight.shape[0]))  # fmt: skip
    else:
        # With a pooled volume's channels last, tiles of channels are read whole.
        grad_output, winners = _pooled_last(problem, grad_output), _pooled_last(problem, winners)
        run = _fused_gradients if plan.fused else _stock_gradients
        gradients = run(plan, grad_output, winners, input, weight, wanted)
    like = (input, weight, weight.new_empty(weight.shape[0]))
    grad_input, grad_weight, grad_bias = (
        tensor.new_empty((0, *tensor.shape[1:])) if not is_wanted or gradient is None else gradient
        for gradient, is_wanted, tensor in zip(gradients, wanted, like, strict=True)
    )
    return (
        grad_input.contiguous(memory_format=plan.format),
        grad_weight.contiguous(memory_format=memory_format(weight)),
        grad_bias,
    )


def _pooled_last(problem: Problem, tensor: Tensor) -> Tensor:
    """A pooled tensor with its channels last in memory, as images of height 1 where it is 1-d."""
    return as_image(tensor).contiguous(memory_format=channels_last(problem.dims))


def _stock_gradients(
    plan: Plan, grad_output: Tensor, winners: Tensor, input: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> Sequence[Tensor | None]:
    problem, arguments = plan.problem, plan.arguments
    sizes = problem.sizes(problem.conv_size)
    if problem.dims == 1:
        sizes.insert(2, 1)
    grad_conv = torch.empty(sizes, dtype=input.dtype, device=input.device,
                            memory_format=channels_last(problem.dims))  # fmt: skip
    pixels = problem.images * math.prod(problem.conv_size)
    plan.launch(grad_output, winners, grad_conv, pixels, problem.conv_size, problem.out_size, plan.divisors)
    if problem.dims == 1:
        grad_conv = grad_conv.squeeze(2)
    with _launch.without_autocast(input.device):
        return torch.ops.aten.convolution_backward(
            grad_conv, input, weight, [weight.shape[0]], arguments.stride, arguments.padding, arguments.dilation,
            False, [0] * problem.dims, arguments.groups, list(wanted),
        )  # fmt: skip


def _fused_gradients(
    plan: Plan, grad_output: Tensor, winners: Tensor, input: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> Sequence[Tensor | None]:
    problem = plan.problem
    input_wanted, weight_wanted, bias_wanted = wanted
    grad_input = grad_weight = grad_bias = None
    if input_wanted:
        grad_input = torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=plan.format)
        pixels = problem.images * math.prod(problem.in_size)
        plan.launch(
            *(grad_output, winners, _kernel_weight(plan, weight), grad_input, pixels),
            *(problem.in_size, problem.conv_size, problem.out_size, plan.divisors),
        )
    if weight_wanted:
        grad_weight, grad_bias = _weight_gradient(plan, grad_output, winners, input, weight, bias_wanted)
    elif bias_wanted:
        alive = grad_output.masked_fill(winners >= problem.places, 0.0)
        grad_bias = alive.flatten(2).sum((0, 2), dtype=torch.float32).to(weight.dtype)
    return grad_input, grad_weight, grad_bias


def _weight_gradient(
    plan: Plan, grad_output: Tensor, winners: Tensor, input: Tensor, weight: Tensor, bias_wanted: bool
) -> tuple[Tensor, Tensor | None]:
    problem, launch, out_channels = plan.problem, plan.launch_weight, weight.shape[0]
    assert launch is not None
    parts = launch.grid[0]
    weight_parts = weight.new_empty(parts, out_channels, problem.depth, dtype=torch.float32)
    bias_parts = weight.new_empty(parts, out_channels, dtype=torch.float32) if bias_wanted else None
    launch(
        *(grad_output, winners, _kernel_input(plan, input), weight_parts, bias_parts, problem.pooled_pixels),
        *(problem.in_size, problem.conv_size, problem.out_size, divisors(problem.out_size)),
    )
    grad_weight = weight_parts.sum(0).to(weight.dtype).view(weight.shape)
    return grad_weight, None if bias_parts is None else bias_parts.sum(0).to(weight.dtype)
