"""Every function of torch between two layers of a network, on the samples of PyTorch's own tests: a fused model
against the same model as it is, with gradients and without."""

import argparse
import functools
import itertools
import linecache
from collections.abc import Iterator
from typing import Any

import torch
from random_models import try_all
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map_only

import fastnn
from fastnn.graph import stretches

# Functions that draw random numbers or give memory that nobody has written, and one that trusts its arguments' sizes.
_LEFT_OUT = ("empty", "bernoulli", "normal", "rand", "uniform", "exponential", "geometric", "cauchy", "multinomial",
             "jiterator", "sparse", "native_batch_norm")  # fmt: skip


def functions() -> list[Any]:
    """Upstream's descriptions of torch's functions. Their import takes five seconds, so that it is made here and not
    above: a process that only collects tests need not spend them."""
    from torch.testing._internal.common_methods_invocations import op_db

    return op_db


class _Written(str):
    """An argument as a forward's text has it."""

    __repr__ = str.__str__


def _model(function: Any, args: Any, kwargs: Any, negates: bool) -> nn.Module:
    """A model that calls the function. Tensors among its arguments are arguments of the forward, too. negates: whether
    the result is one tensor of floating point, to which a layer may be applied."""
    names: dict[str, Any] = {"nn": nn, "function": function, "__name__": "upstream"}

    def write(value: Any) -> Any:
        if isinstance(value, Tensor):
            return _Written(f"t{next(numbers)}")
        if value is None or isinstance(value, (bool, int, str)):
            return value
        names[name := f"constant{len(names)}"] = value
        return _Written(name)

    numbers = iter(range(1000))
    args, kwargs = tree_map_only(object, write, (list(args), kwargs))
    tensors = "".join(f", t{i}" for i in range(next(numbers)))
    given = ", ".join(["-(-x)", *map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])
    text = f"""
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
    def forward(self, x, other{tensors}):
        y = function({given})
        return {"-(-y)" if negates else "y"}, self.layer(other)
"""
    linecache.cache["<upstream>"] = (len(text), None, text.splitlines(True), "<upstream>")  # where fuse reads it
    exec(compile(text, "<upstream>", "exec"), names)
    model: nn.Module = names["Model"]()
    return model


def _run(model: nn.Module, tensors: list[Tensor], records: bool) -> Any:
    """The outputs and the gradients, or the type of what is raised."""
    torch.manual_seed(0)
    leaves = [one.detach().clone().requires_grad_(records and one.is_floating_point()) for one in tensors]
    try:
        with torch.set_grad_enabled(records):
            outputs = [
                one for one in tree_leaves(model(leaves[0], torch.ones(2, 3), *leaves[1:])) if type(one) is Tensor
            ]
        wanted = [one for one in outputs if one.requires_grad]
        trained = [one for one in leaves if one.requires_grad]
        if not wanted or not trained:
            return [one.detach() for one in outputs]
        weights = [torch.randn(one.shape, dtype=one.dtype) for one in wanted]
        gradients = torch.autograd.grad(wanted, trained, weights, allow_unused=True)
        return [one.detach() for one in outputs], [one if one is None else one.to_dense() for one in gradients]
    except Exception as error:  # whatever torch's function raises
        return type(error)


def samples(every: int, most: int) -> Iterator[tuple[str, Any, Any]]:
    """The first samples of one of `every` functions that float32 has: a name, the function and the sample."""
    known = [info for info in functions() if not any(one in info.formatted_name for one in _LEFT_OUT)]
    for info in known[::every]:
        if torch.float32 in info.dtypes:
            given = info.sample_inputs("cpu", torch.float32, requires_grad=False)
            for i, sample in enumerate(itertools.islice(given, most)):
                if isinstance(sample.input, Tensor):
                    yield f"{info.formatted_name} {i}", info, sample


def check(info: Any, sample: Any) -> bool:
    """Compares a model that calls the function with the same one fused, twice each. Returns whether the fused one has
    become networks."""
    rest = tree_leaves((sample.args, sample.kwargs))
    if any(callable(one) and not isinstance(one, (type, torch.dtype)) for one in rest):
        return False
    try:
        result = info.op(sample.input.clone(), *sample.args, **sample.kwargs)
    except Exception:  # a sample for another device
        return False
    negates = isinstance(result, Tensor) and result.is_floating_point() and sample.input.is_floating_point()
    stock = _model(info.op, sample.args, sample.kwargs, negates)
    fused = fastnn.fuse(_model(info.op, sample.args, sample.kwargs, negates))
    fused.load_state_dict(stock.state_dict())
    tensors = [sample.input, *(one for one in rest if isinstance(one, Tensor))]
    for records in (False, True)[: 1 + info.supports_autograd]:
        expected = _run(stock, tensors, records)
        for _ in range(2):
            found = _run(fused, tensors, records)
            if isinstance(expected, type):
                assert found is expected, f"raises {found}, and not {expected}"
            else:
                assert_close(found, expected, rtol=1e-4, atol=5e-5, equal_nan=True)
    return "Where" in str(fastnn.explain(fused))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/upstream_samples.py", description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="one of so many functions is tried (default: all)")
    parser.add_argument("--most", type=int, default=40, help="samples of a function (default: 40)")
    given = parser.parse_args()
    stretches._LEAST_COST = stretches._LEAST_CALLS = 1
    some = samples(given.every, given.most)
    try_all((name, functools.partial(check, info, sample)) for name, info, sample in some)


if __name__ == "__main__":
    main()
