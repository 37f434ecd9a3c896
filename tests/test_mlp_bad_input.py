"""What fastnn.functional.mlp and its operators say to arguments that do not fit."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from mlp_chains import make_chain, split

from fastnn.functional import linear_relu, mlp
from fastnn.ops.mlp import join_parameters

# What is not the activations of two layers, though a part of it is.
BAD_TEXTS = (
    *("", "|", "relu", "relu|", "|relu", "relu|identity|identity", "relu|gelo", "relu;identity", "relu,identity"),
    *("relu identity", "relu|identity ", "relu()|relu", "leaky_relu(", "leaky_relu(0.2", "leaky_relu(0.2,1)|identity"),
    *("leaky_relu(nan)|identity", "leaky_relu(1e999)|identity", "relu(1)|identity", "relu|identity\0"),
    "|".join(["identity"] * 99),
)

BAD = {
    "features": lambda x, w, b: (torch.randn(5, 4), w, b),
    "chain": lambda x, w, b: (x, [w[0], torch.randn(3, 8)], b),
    "bias size": lambda x, w, b: (x, w, [b[0], torch.randn(4)]),
    "bias rank": lambda x, w, b: (x, w, [b[0], torch.randn(4, 3)]),
    "weight rank 1": lambda x, w, b: (x, [w[0], torch.randn(7)], b),
    "weight rank 3": lambda x, w, b: (x, [w[0], torch.randn(3, 7, 1)], b),
    "weight dtype": lambda x, w, b: (x, [w[0].double(), w[1]], b),
    "bias dtype": lambda x, w, b: (x, w, [b[0].double(), b[1]]),
    "input dtype": lambda x, w, b: (x.double(), w, b),
    "device": lambda x, w, b: (x, [w[0].to("meta"), w[1]], b),
    "scalar": lambda x, w, b: (torch.tensor(1.0), w, b),
}


class TestBadInput:
    """One exception, from the public functions and from the raw operators, whatever they are given."""

    @pytest.mark.parametrize("case", BAD)
    def test_tensors_that_do_not_fit(self, case: str) -> None:
        arguments = BAD[case](*split(make_chain(5, (6, 7, 3))))
        with pytest.raises(RuntimeError):
            mlp(*arguments)
        with pytest.raises(RuntimeError):
            torch.ops.fastnn.mlp(*arguments, "relu|identity")
        with pytest.raises(RuntimeError):
            torch.ops.fastnn.mlp_with_hidden(*arguments, "relu|identity")

    @pytest.mark.parametrize("rows", [5, 500])
    def test_a_single_layer_in_training(self, rows: int) -> None:
        """Small ones are stock's, which takes a weight (in) that is none of the operator's."""
        x, weight, bias = make_chain(rows, (6, 7))
        for bad in ((weight[0], bias[0]), (weight, bias[:6]), (weight.double(), bias)):
            with pytest.raises(RuntimeError):
                mlp(x.requires_grad_(), bad[:1], bad[1:], "identity")

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_a_bias_of_one_element(self, requires_grad: bool) -> None:
        """PyTorch broadcasts it."""
        x, weights, biases = split(make_chain(5, (6, 7, 3)))
        x.requires_grad_(requires_grad)
        expected = F.linear(F.relu(F.linear(x, weights[0], biases[0][:1].expand(7))), weights[1], biases[1])
        torch.testing.assert_close(mlp(x, weights, [biases[0][:1], biases[1]], "relu"), expected)

    @pytest.mark.parametrize("requires_grad", [False, True])
    @pytest.mark.parametrize("sizes", [(1, 3), (5, 3), ()])
    def test_biases_that_torch_broadcasts(self, sizes: tuple[int, ...], requires_grad: bool) -> None:
        x, weights, biases = split(make_chain(5, (6, 7, 3)))
        x.requires_grad_(requires_grad)
        bias = torch.randn(sizes)
        expected = F.linear(F.relu(F.linear(x, weights[0], biases[0])), weights[1], bias)
        torch.testing.assert_close(mlp(x, weights, [biases[0], bias]), expected)
        torch.testing.assert_close(
            mlp(x, weights[:1], [bias.new_zeros(1, 7)], ["relu"]), F.relu(F.linear(x, weights[0]))
        )
        expected = F.relu(F.linear(expected, weights[1].T, bias.new_ones(1, 7)))
        found = linear_relu(mlp(x, weights, [biases[0], bias]), weights[1].T.contiguous(), bias.new_ones(1, 7))
        torch.testing.assert_close(found, expected)
        for operator in (torch.ops.fastnn.mlp, torch.ops.fastnn.mlp_with_hidden):
            with pytest.raises(RuntimeError):
                operator(x, [*weights, biases[0], bias], "relu|identity")

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_a_weight_that_is_a_vector(self, requires_grad: bool) -> None:
        x, weights, _ = split(make_chain(5, (6, 7, 3)))
        x.requires_grad_(requires_grad)
        expected = F.linear(F.relu(F.linear(x, weights[0])), weights[1][0])
        torch.testing.assert_close(mlp(x, [weights[0], weights[1][0]], [None, None]), expected)

    def test_lists_that_do_not_fit(self) -> None:
        x, weights, biases = split(make_chain(5, (6, 7, 3)))
        with pytest.raises(ValueError, match="expected 2 biases"):
            mlp(x, weights, biases[:1])
        with pytest.raises(ValueError, match="expected 2 activations"):
            mlp(x, weights, biases, ["relu"])
        with pytest.raises(ValueError, match="activation must be one of"):
            mlp(x, weights, biases, "swish")
        with pytest.raises(TypeError):
            mlp(x, None, biases)
        for activations in BAD_TEXTS:
            with pytest.raises(RuntimeError):
                torch.ops.fastnn.mlp(x, join_parameters(weights, biases), activations)
        for lists in (([], [], []), (weights, biases[:1], "relu|identity"), (weights[:1], biases, "relu")):
            with pytest.raises(RuntimeError):
                torch.ops.fastnn.mlp(x, *lists)

    def test_other_layouts_and_dtypes_in_the_raw_operator(self) -> None:
        x, weights, biases = split(make_chain(5, (6, 7, 3)))
        for bad in (x.to_sparse(), x.half(), x.long(), x.to("meta"), x[None], x.to(torch.complex64)):
            with pytest.raises((RuntimeError, NotImplementedError)):
                torch.ops.fastnn.mlp(bad, weights + biases, "relu|identity").sum().item()

    def test_hostile_backward(self) -> None:
        x, weights, biases = split(make_chain(5, (6, 7, 3)))
        output, hidden = torch.ops.fastnn.mlp_with_hidden(x, weights + biases, "relu|identity")
        good = [torch.randn_like(output), x, weights, "relu|identity", output, hidden, True, True, True]
        hostile = {
            0: [output[:4], output[:, :2], output[0], output.double(), output.to("meta"), output.to_sparse()],
            1: [x[:4], x[:, :5], x[0], x.double(), torch.empty(0, 6), x.to("meta")],
            2: [[], weights[:1], weights[::-1], [weights[0], weights[1].double()], [weights[0][0], weights[1]]],
            3: [*BAD_TEXTS, "gelu|gelu"],
            4: [output[:4], output[:, :2], torch.empty(0), output.double(), output.to("meta")],
            5: [[], [hidden[0][:4]], [hidden[0].double()], [hidden[0][:, :3]], hidden * 2, [torch.empty(0)]],
        }
        torch.ops.fastnn.mlp_backward(*good)
        for place, values in hostile.items():
            for value in values:
                with pytest.raises((RuntimeError, NotImplementedError)):
                    torch.ops.fastnn.mlp_backward(*good[:place], value, *good[place + 1 :])

    def test_rows_of_no_features(self) -> None:
        """Any number, in no time."""
        ops, weight = torch.ops.fastnn, torch.zeros(0, 0)
        for activations in ("relu", "gelu"):  # the second keeps its input
            x = torch.zeros(2**40, 0)
            assert ops.mlp(x, [weight], activations).shape == x.shape
            output, hidden = ops.mlp_with_hidden(x, [weight], activations)
            gradients = ops.mlp_backward(x, x, [weight], activations, output, hidden, True, True, True)
            assert [g.shape for g in (gradients[0], *gradients[1], *gradients[2])] == [x.shape, (0, 0), (0,)]

    def test_gradients_of_no_outputs(self) -> None:
        x, weight = torch.randn(5, 3), torch.zeros(0, 3)
        output, hidden = torch.ops.fastnn.mlp_with_hidden(x, [weight], "relu")
        gradients = torch.ops.fastnn.mlp_backward(output, x, [weight], "relu", output, hidden, True, True, True)
        assert torch.equal(gradients[0], torch.zeros(5, 3))

    @pytest.mark.parametrize("widths", [(0, 2**58, 0), (0, 2**62, 0), (0, 2**45, 0, 2**45)])
    def test_widths_without_memory(self, widths: tuple[int, ...]) -> None:
        x, weights = torch.zeros(5, 0), [torch.zeros(out, width) for width, out in itertools.pairwise(widths)]
        code = "|".join(["identity"] * len(weights))
        with pytest.raises(RuntimeError):
            torch.ops.fastnn.mlp(x, weights, code)
        with pytest.raises(RuntimeError):
            torch.ops.fastnn.mlp_with_hidden(x, weights, code)

    def test_raw_operators_refuse_to_lose_a_gradient(self) -> None:
        x, weights, biases = split(make_chain(5, (6, 7, 3)))
        arguments = [x, weights + biases, "relu|identity"]
        for leaf in (x, weights[1], biases[0]):
            leaf.requires_grad_()
            output = torch.ops.fastnn.mlp(*arguments)
            with pytest.raises(RuntimeError, match="no gradient of its own"):
                output.sum().backward()
            with torch.no_grad():
                torch.ops.fastnn.mlp(*arguments)
            leaf.requires_grad_(False)
