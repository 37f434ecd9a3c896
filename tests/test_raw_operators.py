"""What the raw operators have in common: whatever they are given, an exception and nothing worse; gradients, and the
transforms of torch.func."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastnn.recurrent_modes import NUMBER_OF
from fastnn.reference.conv_relu_max_pool import Geometry

_POOL_2 = Geometry([1], [0], [1], 1, [2], [2], [0], [1], False).flat()


def mlp(x: Tensor) -> Tensor:
    return torch.ops.fastnn.mlp(x, [torch.ones(5, 3), torch.ones(5)], "relu")


def conv(x: Tensor) -> Tensor:
    return torch.ops.fastnn.conv_relu_max_pool(x[None], torch.ones(2, 4, 2), None, _POOL_2)


def conv_by_algorithm(x: Tensor) -> Tensor:
    return torch.ops.fastnn.conv_relu_max_pool(x[None], torch.ones(2, 4, 2), None, _POOL_2, algorithm="phases")


def rnn_cell(x: Tensor) -> Tensor:
    mode, state = NUMBER_OF["RNN_TANH"], torch.zeros(4, 2)
    return torch.ops.fastnn.rnn_cell(x, mode, state, None, torch.ones(2, 3), torch.ones(2, 2))[0]


OPERATORS = [mlp, conv, conv_by_algorithm, rnn_cell]
INPUT = torch.linspace(-1, 1, 12).reshape(4, 3)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian])
def test_gradients_are_refused(operator: Callable[[Tensor], Tensor], transform: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match="no gradient of its own"):
        transform(lambda x: operator(x).sum())(INPUT)
    with pytest.raises(RuntimeError, match="no gradient of its own"):
        torch.func.vmap(transform(lambda x: operator(x).sum()))(torch.stack([INPUT, INPUT]))


@pytest.mark.parametrize("operator", OPERATORS)
def test_tangents_are_refused(operator: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError, match="no gradient of its own"):
        torch.func.jvp(operator, (INPUT,), (INPUT,))


@pytest.mark.parametrize("operator", OPERATORS)
def test_under_transforms_that_do_not_ask_for_its_gradient(operator: Callable[[Tensor], Tensor]) -> None:
    factor = operator(INPUT).sum()
    torch.testing.assert_close(
        torch.func.grad(lambda x: (x * operator(x.detach()).sum()).sum())(INPUT), factor.expand(4, 3)
    )
    batch = torch.stack([INPUT, -INPUT, 2 * INPUT])
    torch.testing.assert_close(torch.func.vmap(operator)(batch), torch.stack([operator(x) for x in batch]))
    nested = torch.func.vmap(torch.func.vmap(operator))(batch[None])
    torch.testing.assert_close(nested[0], torch.stack([operator(x) for x in batch]))


def calls() -> dict[str, list[Any]]:
    """Arguments of each operator that has kernels on the CPU."""
    ops = torch.ops.fastnn
    conv = [torch.randn(2, 3, 8), torch.randn(4, 3, 3), torch.randn(4), [1, 1, 1, 2, 2, 0, 1, 1, 0]]
    output, winners = ops.conv_relu_max_pool_with_winners(*conv)
    chain = [torch.randn(5, 3), torch.randn(6, 3), torch.randn(4, 6), torch.randn(6), torch.randn(4)]
    mlp_output, hidden = ops.mlp_with_hidden(chain[0], chain[1:], "gelu|relu")
    lstm, weights = NUMBER_OF["LSTM"], [torch.randn(size) for size in [(8, 3), (8, 2), (8,), (8,)]]
    state, config = [torch.randn(1, 4, 2), torch.randn(1, 4, 2)], [lstm, 1, False, False]
    rnn = [torch.randn(6, 3), torch.tensor([4, 2]), state, weights, None]
    rnn_output, final_state, reserve = ops.rnn_with_reserve(*rnn, *config)
    cell = [torch.randn(4, 3), lstm, state[0][0], state[1][0], *weights]
    return {
        "conv_relu_max_pool": conv,
        "conv_relu_max_pool_with_winners": conv,
        "conv_relu_max_pool_algorithm": conv,
        "conv_relu_max_pool_backward": [output, winners, *conv[:2], conv[3], True, True, True],
        "mlp": [chain[0], chain[1:], "gelu|relu"],
        "mlp_with_hidden": [chain[0], chain[1:], "gelu|relu"],
        "mlp_backward": [mlp_output, chain[0], chain[1:3], "gelu|relu", mlp_output, hidden, True, True, True],
        "rnn": [*rnn, *config],
        "rnn_with_reserve": [*rnn, *config],
        "rnn_backward": [rnn_output, final_state, *rnn, rnn_output, reserve, *config, True, True, True],
        "rnn_cell": cell,
    }


class TestWhateverIsGiven:
    @pytest.mark.parametrize("name", calls())
    def test_memory_that_was_freed(self, name: str) -> None:
        """As FSDP frees that of parameters between their uses, or partly."""
        operator = getattr(torch.ops.fastnn, name)
        leaves, structure = pytree.tree_flatten(calls()[name])
        operator(*pytree.tree_unflatten(leaves, structure))
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            whole = leaf.numel() * leaf.element_size()
            for left in (0, 1, whole // 2, whole - 1):
                for tensor in (leaf.clone(), leaf.movedim(0, -1).clone().movedim(-1, 0)):
                    tensor.untyped_storage().resize_(left)
                    with pytest.raises(RuntimeError, match="needs a storage of"):
                        operator(*pytree.tree_unflatten([*leaves[:i], tensor, *leaves[i + 1 :]], structure))

    def test_storage_that_is_no_whole_elements(self) -> None:
        """As that of a file may be."""
        x = torch.zeros(0).set_(torch.zeros(62, dtype=torch.uint8).untyped_storage(), 0, (5, 3))
        assert mlp(x).shape == (5, 5)

    @pytest.mark.parametrize("name", calls())
    def test_no_tensor(self, name: str) -> None:
        operator, arguments = getattr(torch.ops.fastnn, name), calls()[name]
        for device in ("cpu", "meta"):
            given = pytree.tree_map_only(Tensor, lambda t, device=device: t.to(device), arguments)
            for i, argument in enumerate(operator.default._schema.arguments):
                if isinstance(argument.type, torch.TensorType):
                    if device == "meta" and name == "conv_relu_max_pool_algorithm":
                        continue
                    with pytest.raises(RuntimeError, match="must be a tensor"):
                        operator(*given[:i], None, *given[i + 1 :])

    def test_no_tensor_to_refuse_the_gradient_of(self) -> None:
        with pytest.raises(RuntimeError, match="output must be a tensor"):
            torch.ops.fastnn.refuse_gradient(None, torch.ones(2))
        with pytest.raises(RuntimeError, match="input must be a tensor"):
            torch.ops.fastnn.refuse_gradient(torch.ones(2), None)
