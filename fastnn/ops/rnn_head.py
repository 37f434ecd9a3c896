"""A recurrent network with a linear layer on its last state, in training: one ``autograd.Function`` for both.

In a small step, each function that autograd records in Python costs about 40 us, and taking the last layer's state out
of the others costs 10, which is as long as the kernels take.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnn._torch import direct_call
from fastnn.ops._autograd import eager_recorder
from fastnn.ops.mlp import _mlp_backward_op, _mlp_with_hidden_op, mlp_of_parameters
from fastnn.ops.rnn import RnnConfig, _backward_op, _with_reserve_call, plain_rnn
from fastnn.recurrent_modes import MODES

_with_hidden_call, _mlp_backward_call = direct_call(_mlp_with_hidden_op), direct_call(_mlp_backward_op)
_backward_call = direct_call(_backward_op)


def train_rnn_with_head(input: Tensor, weights: Sequence[Tensor], head: Sequence[Tensor], config: RnnConfig) -> Tensor:
    """``linear(h, *head)``, where h is the last layer's final state and the network starts from zeros. Callers know
    that the call is plain (:func:`is_plain`) and on the CPU, and that a gradient is wanted. ``weights`` as for
    :func:`rnn`."""
    result: Any = _record(input, config, len(weights), *weights, *head)
    return result


class RnnWithHead(torch.autograd.Function):
    """The function that :func:`train_rnn_with_head` records for autograd."""

    @staticmethod
    def record(ctx: Any, input: Tensor, config: RnnConfig, weights: int, *tensors: Tensor) -> Any:
        output, final_state, reserve = _with_reserve_call(input, None, (), tensors[:weights], None, *config)
        h = final_state[0][-1]
        result, _ = _with_hidden_call(h, tensors[weights:], "identity")
        ctx.call = (config, weights)
        # The result is not saved: the caller may change it, and backward through a linear layer does not need it.
        ctx.save_for_backward(input, output, reserve, h, *tensors)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        config, weights = ctx.call
        input, output, reserve, h, *tensors = ctx.saved_tensors
        own, head = tensors[:weights], tensors[weights:]
        if torch.is_grad_enabled():
            return RnnWithHead._backward_to_differentiate(ctx, grad, input, own, head)
        needed = ctx.needs_input_grad
        head_needed = needed[3 + weights :]
        grad_h, grad_head_weight, grad_head_bias = _mlp_backward_call(
            grad, h, head[:1], "identity", grad, (), True, head_needed[0], True in head_needed[1:]
        )
        grads = (grad_h, None) if MODES[config[0]].states == 2 else (grad_h,)  # of the last layer alone
        own_needed = True in needed[3 : 3 + weights]
        grad_input, _, grad_weights = _backward_call(
            None, grads, input, None, (), own, None, output, reserve, *config, needed[0], False, own_needed
        )
        return (
            grad_input if needed[0] else None,
            None,
            None,
            *(grad_weights if own_needed else (None,) * weights),
            *(grad_head_weight or (None,)),
            *(grad_head_bias or (None,) * (len(head) - 1)),
        )

    @staticmethod
    def _backward_to_differentiate(
        ctx: Any, grad: Tensor, input: Tensor, weights: Sequence[Tensor], head: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """The gradients for a second derivative, by the two functions whose gradients can be differentiated."""
        mode, layers, bidirectional, batch_first = ctx.call[0]
        _, state = plain_rnn(input, None, (), weights, None, mode, layers, bidirectional, batch_first)
        result = mlp_of_parameters(state[0][-1], head, "identity")
        inputs: Any = (input, None, None, *weights, *head)
        places = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        found = torch.autograd.grad(result, [inputs[i] for i in places], grad, create_graph=True)
        gradients: Any = [None] * len(inputs)
        for i, gradient in zip(places, found, strict=True):
            gradients[i] = gradient
        return tuple(gradients)


_record = eager_recorder(RnnWithHead)
