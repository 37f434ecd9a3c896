"""``fastnn.freeze``: a model for inference alone, its weights packed, run by one operator call or one for each part."""

import inspect
import math
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fastnn import nn
from fastnn._torch import OpOverload, direct_call, pytree
from fastnn.fusion import fuse
from fastnn.graph.exported import VIEWS, DependsOnBatchError, Exported, Segment, read
from fastnn.graph.rehearsal import cloned, copied, leaving_no_trace
from fastnn.ops._autograd import autocast_is_on
from fastnn.ops.network import network_of_one, network_op, pack_network

_network_call, _network_of_one_call = direct_call(network_op), direct_call(network_of_one)
_is_compiling = torch.compiler.is_compiling


def freeze(model: nn.Module, example_input: Any) -> "FrozenModel | FrozenGraph":
    """``model`` as it is now, in eval mode, for inference alone, in as few operator calls as it allows.

    The model's layers become networks, each of which is one operator call: batch norms, activations, sums and pools
    become part of the layers before them, and dropout is left out. A model whose every layer a network has becomes a
    :class:`FrozenModel`; of others, what no network has stays as it is, in a :class:`FrozenGraph`. The frozen model is
    compared with the model, on the example and on a batch of another size, before it is returned.

    Args:
        model: float32 or float64, on the CPU. It is not changed, and later changes of it do not reach the frozen model.
        example_input: (batch, ...), or a tuple of a model's inputs, which may be tuples, lists and dicts of tensors
            themselves, as an LSTM's state. The batch is dimension 0 of each input, or dimension 1, as of a state;
            inputs but the first may have none, as a mask (steps, steps). The frozen model takes any batch size and
            memory format, and is fastest for those of the example. It takes other sizes in further dimensions (lengths,
            heights) where the model does, and does with them what it does with the example's: one that enlarges images
            to the size of another, for one, keeps to the example's sizes.

    Raises:
        ValueError: there is nothing to freeze, or the model does something that cannot be captured, or it keeps
            something from one call to the next; the message names the layer and says why.
    """
    inputs = tuple(example_input) if isinstance(example_input, (tuple, list)) else (example_input,)
    leaves, spec = pytree.tree_flatten(inputs)
    _check_arguments(model, inputs, leaves)
    # torch.export takes a tensor that is given twice, as zeros for h and c, for one input.
    leaves = [leaf.detach().clone() for leaf in leaves]
    inputs = pytree.tree_unflatten(leaves, spec)

    def as_it_is() -> nn.Module:
        """A copy in eval mode, which no call has changed."""
        with torch.inference_mode(False):
            return fuse(copied(model)).eval()

    def in_double(*given: Any) -> Any:
        """What the model gives in float64, as a measure of errors."""
        again()
        return as_it_is().double()(*pytree.tree_map_only(Tensor, _double, given))

    def frozen_by(batch_dims: Sequence[int | None], given: Any, other: Any, expected: Sequence[Any]) -> Any:
        """The frozen model, read with the inputs `given`, where these dimensions are the batch. It is compared with
        what is expected of the example and of the inputs `other`."""
        fixed: set[tuple[int, int]] = set()
        while True:
            with _export_lock:
                exported = read(as_it_is(), given, batch_dims, fixed)
            frozen = _build(model, exported, leaves, spec)
            for some, wanted in zip((inputs, other), expected, strict=True):
                again()
                _compare(frozen, some, wanted, in_double, exported.draws)
            found = _find_dependence(as_it_is, in_double, frozen, exported.ranges, leaves, spec, again)
            if found is None:
                return frozen
            place, dim = found
            if dim == batch_dims[place]:
                raise DependsOnBatchError(model)
            fixed.add(found)

    with _as_in_inference(), leaving_no_trace() as again:
        rehearsed = as_it_is()
        try:
            expected = cloned(rehearsed(*cloned(inputs)))  # copies, since the second call may change these results
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"freeze: {type(model).__name__} does not take example_input: {error}") from error
        # The model runs on another batch size, too, because nothing that it does may depend on the batch size. Where
        # the run fails, or where it turns out later that something depends on it, another dimension may be the batch.
        refusal: ValueError | None = None
        for batch_dims in _tries(model, leaves):
            with_dims = list(zip(leaves, batch_dims, strict=True))
            is_single = any(dim is not None and leaf.shape[dim] == 1 for leaf, dim in with_dims)
            # torch.export would treat a batch size of one as a constant.
            doubled = [leaf if dim is None else torch.cat([leaf, leaf], dim) for leaf, dim in with_dims]
            first = [leaf if dim is None else leaf.narrow(dim, 0, 1) for leaf, dim in with_dims]
            other = pytree.tree_unflatten(doubled if is_single else first, spec)
            again()
            try:
                expected_of_other = as_it_is()(*cloned(other))
            except Exception as error:  # the model's own Python may refuse a batch in any words
                # The words of a guess that gives each input a batch say most.
                if refusal is None or not (None in batch_dims or isinstance(refusal, DependsOnBatchError)):
                    refusal = ValueError(_words_of_batch(model, leaves, first if not is_single else doubled, error))
                    refusal.__cause__ = error
                continue
            given = pytree.tree_unflatten(doubled, spec) if is_single else inputs
            try:
                frozen = frozen_by(batch_dims, given, other, (expected, expected_of_other))
                again()  # The second call comes last, since torch.export has better words for what it refuses itself.
                _check_second_call(rehearsed, inputs, expected, in_double)
                return frozen
            except DependsOnBatchError as error:
                refusal = error
        assert refusal is not None
        raise refusal


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor.clone()


def _find_dependence(
    as_it_is: Callable[[], nn.Module],
    in_double: Callable[..., Any],
    frozen: "FrozenModel | FrozenGraph",
    ranges: Sequence[Sequence[int]],
    leaves: Sequence[Tensor],
    spec: Any,
    again: Callable[[], None],
) -> tuple[int, int] | None:
    """Looks for a tensor and a dimension in which another size makes the model do something else, because its Python
    looks at sizes or squeezes a dimension. None where none was found. Each dimension is tried with one more than the
    example's size, and with 1. A size that the model or the frozen model does not take counts as no difference."""
    for place, leaf in enumerate(leaves):
        for dim, known in enumerate(leaf.shape):
            least, most = ranges[place][2 * dim : 2 * dim + 2]
            for size in {known + 1, 1} - {known}:
                if size < least or (most and size > most):
                    continue
                more = torch.cat([leaf, leaf.narrow(dim, 0, 1)], dim)
                resized = [*leaves[:place], more.narrow(dim, 0, size), *leaves[place + 1 :]]
                inputs = pytree.tree_unflatten(resized, spec)
                try:
                    again()
                    wanted = as_it_is()(*cloned(inputs))
                    again()
                    found = frozen(*inputs)
                except Exception:  # the model's own Python may refuse a size in any words
                    continue
                if not _agree(found, wanted, partial(in_double, *inputs)):
                    return place, dim
    return None


_export_lock = threading.RLock()  # torch.export keeps its state in globals, which two threads would mix up


def _tries(model: nn.Module, leaves: Sequence[Tensor]) -> Iterator[list[int | None]]:
    """Yields guesses which dimension of each input is the batch, the likely guesses first.

    The batch is dimension 0 of all inputs; or dimension 0 of the first and dimension 1 of some others, which may be
    states; or dimension 1 of all, where the model has layers whose inputs have the steps first. If one of these is an
    attention, dimension 1 is tried first: a table of positions often limits the steps, and so they cannot be the
    batch. Where no such guess is right, the batch of each further input is where its size is the batch's; it has none
    (None) where there is no such size, and may have none if it may be a mask (steps, steps)."""
    may_be_second = [leaf.dim() > 1 and leaf.shape[1] == leaves[0].shape[0] for leaf in leaves[1:]]
    choices = [[0, 1] if may_be and place < _MOST_GUESSED else [0] for place, may_be in enumerate(may_be_second)]
    tries: list[list[int | None]] = [[0, *dims] for dims in sorted(product(*choices), key=sum)]
    steps_first = [one for one in model.modules() if getattr(one, "batch_first", None) is False]
    attends = any(isinstance(one, torch.nn.MultiheadAttention) for one in steps_first)
    may_be_first = [0]
    if leaves[0].dim() > 1 and (attends or any(isinstance(one, torch.nn.RNNBase) for one in steps_first)):
        may_be_first = [1, 0] if attends else [0, 1]
        if all(leaf.dim() > 1 and leaf.shape[1] == leaves[0].shape[1] for leaf in leaves):
            tries.insert(0 if attends else len(tries), [1] * len(leaves))
    for dim in may_be_first:
        batch = leaves[0].shape[dim]
        guesses: list[list[int | None]] = []
        for place, leaf in enumerate(leaves[1:]):
            found = next((one for one in (dim, 1 - dim) if leaf.dim() > one and leaf.shape[one] == batch), None)
            may_be_mask = leaf.dim() == 2 and leaf.shape[0] == leaf.shape[1] and place < _MOST_GUESSED
            guesses.append([found, None] if may_be_mask else [found])
        tries += [[dim, *dims] for dims in product(*guesses)]
    yield from (dims for place, dims in enumerate(tries) if dims not in tries[:place])


_MOST_GUESSED = 5  # inputs of which both dimensions are tried


def _words_of_batch(model: nn.Module, leaves: Sequence[Tensor], other: Sequence[Tensor], error: Exception) -> str:
    sizes, others = (" and ".join(str(tuple(input.shape)) for input in some) for some in (leaves, other))
    return (
        f"freeze: what {type(model).__name__} does depends on the batch's size, which is dimension 0 or 1 of each "
        f"input that has one: it takes {sizes}, but of {others} it says: {error}"
    )


def _build(model: nn.Module, exported: Exported, leaves: Sequence[Tensor], spec: Any) -> "FrozenModel | FrozenGraph":
    name = type(model).__name__
    if not exported.segments:
        why = f": {str(exported.refusals[0]).removeprefix('freeze: ')}" if exported.refusals else ""
        raise ValueError(f"freeze: there is nothing in {name} to freeze{why}")
    for segment in exported.segments:
        found = {tensor.dtype for tensor in segment.weights}
        if len(found) != 1 or not found <= {torch.float32, torch.float64}:
            words = ", ".join(sorted(map(str, found)))
            raise ValueError(f"freeze: expected parameters of one dtype, float32 or float64, got {words}")
    structure = _structure(spec)
    if exported.is_one_network:
        segment = exported.segments[0]
        places = {node: place for place, node in enumerate(segment.outputs)}
        results = pytree.tree_unflatten(exported.outputs, exported.out_spec)
        order = [exported.inputs.index(node) for node in segment.inputs]
        sizes = [tuple(leaves[place].shape) for place in order]
        last = _channels_last([leaves[place] for place in order])
        return FrozenModel(segment.program, _joined(segment), sizes, order, structure, _write(results, places), last)
    parts, constants, steps, ranges, output = _write_graph(exported, leaves)
    return FrozenGraph(parts, constants, steps, ranges, output, structure)


def _channels_last(inputs: Sequence[Tensor | None]) -> list[int]:
    """The numbers of those that lie channels last, without gaps."""
    return [
        number
        for number, one in enumerate(inputs)
        if one is not None and one.dim() > 2 and not one.is_contiguous() and one.movedim(1, -1).is_contiguous()
    ]


def _joined(segment: Segment) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in segment.weights])


def _structure(spec: Any) -> Any:
    """Describes how a model's inputs are nested, by lists, tuples and strings."""
    count = spec.num_leaves
    return _write(pytree.tree_unflatten([_Leaf(place) for place in range(count)], spec), {})


class _Leaf:
    """A tensor's place among those of a nested structure."""

    def __init__(self, place: int) -> None:
        self.place = place


def _check_arguments(model: Any, inputs: tuple[Any, ...], leaves: Sequence[Any]) -> None:
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"freeze: expected a model that is a torch.nn.Module, got a {type(model).__name__}")
    if not leaves:
        raise ValueError(
            "freeze: expected example_input to be a Tensor, or Tensors in tuples, lists and dicts, got none"
        )
    for place, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            where = f", and its element {place}" if len(leaves) > 1 else ""
            raise ValueError(
                f"freeze: expected example_input{where} to be a Tensor, or Tensors in tuples, lists and dicts, got a "
                f"{type(leaf).__name__}"
            )
        if leaf.dim() < 1 or leaf.numel() == 0 or not leaf.is_cpu:
            raise ValueError(
                "freeze: expected example_input to be on the CPU, of size (batch, ...) and not empty, got size "
                f"{tuple(leaf.shape)} on {leaf.device}"
            )
    for name, parameter in model.named_parameters():
        if not parameter.is_cpu:
            raise ValueError(f"freeze: expected a model on the CPU, but {name} is on {parameter.device}: model.cpu()")
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*inputs)
    except TypeError as error:
        raise ValueError(
            f"freeze: {type(model).__name__} takes {signature}, and example_input has {len(inputs)} inputs: {error}"
        ) from error


def _compare(
    frozen: "FrozenModel | FrozenGraph",
    inputs: tuple[Any, ...],
    expected: Any,
    in_double: Callable[..., Any],
    draws: Sequence[str],
) -> None:
    try:
        found = frozen(*inputs)
    except RuntimeError as error:
        raise ValueError(f"freeze: the frozen model does not take what the model does: {error}") from error
    if _agree(found, expected, partial(in_double, *inputs)):
        return
    results, wanted = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    words = (
        "freeze: the frozen model does not compute what the model does on an input of size "
        f"{_sizes_of(pytree.tree_leaves(inputs))}: expected a result of size {_sizes_of(wanted)}, got "
        f"{_sizes_of(results)}"
    )
    if len(results) == len(wanted) and all(map(_is_alike, results, wanted)):
        words += " with other values"
        if draws:
            words += f"; it draws random numbers ({', '.join(draws)}), and others than the model does"
    raise ValueError(words)


def _check_second_call(model: nn.Module, inputs: tuple[Any, ...], expected: Any, in_double: Callable[..., Any]) -> None:
    """Calls a model again that has returned `expected` for these inputs. Raises ValueError where the second call
    returns something else: such a model keeps something from one call to the next, as a counter or a state."""
    words = f"freeze: {type(model).__name__} keeps something from one call to the next, which a frozen model would not"
    try:
        found = model(*cloned(inputs))
    except Exception as error:  # the model's own Python may refuse a second call in any words
        raise ValueError(f"{words}: its second call fails: {error}") from error
    if not _agree(found, expected, partial(in_double, *inputs)):
        raise ValueError(f"{words}: its second call returns something else than its first")


def _agree(found: Any, expected: Any, compute_exact: Callable[[], Any]) -> bool:
    """Whether both are the same but for rounding. compute_exact: gives the results in float64."""
    results, spec = pytree.tree_flatten(found)
    wanted, wanted_spec = pytree.tree_flatten(expected)
    if spec != wanted_spec or not all(map(_is_alike, results, wanted)):
        return False
    if all(map(_is_close, results, wanted)):
        return True
    # A model may enlarge rounding errors, as a SIREN does. Those of the frozen model are compared with the model's own.
    try:
        exact = pytree.tree_leaves(compute_exact())
    except (RuntimeError, TypeError):  # A model whose Python names a dtype may not run in float64.
        return False
    return len(exact) == len(results) and all(map(_is_as_exact, results, wanted, exact))


def _is_alike(result: Any, wanted: Any) -> bool:
    """Whether both are tensors of one size and dtype, or objects of one class."""
    if isinstance(result, Tensor) and isinstance(wanted, Tensor):
        return result.shape == wanted.shape and result.dtype == wanted.dtype
    return type(result) is type(wanted)


def _is_close(result: Any, wanted: Any) -> bool:
    if not isinstance(result, Tensor):
        return bool(result == wanted)
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return torch.equal(result, wanted)
    # The scale is the median of the elements that differ. The largest may be a mask's -1e9, beside which any error
    # would look small.
    others = wanted[wanted.isfinite() & (wanted != 0) & (result != wanted)].abs()
    scale = float(others.median()) if others.numel() else 0.0
    return torch.allclose(result, wanted, rtol=1e-3, atol=max(1e-3 * scale, 1e-6), equal_nan=True)


def _is_as_exact(result: Any, wanted: Any, exact: Any) -> bool:
    """Whether the frozen model's error is at most four times the model's, which must be small itself."""
    if not isinstance(result, Tensor) or not result.is_floating_point() or result.shape != exact.shape:
        return _is_close(result, wanted)
    ours, models = (float((one.double() - exact).abs().max()) for one in (result, wanted))
    return models < 0.1 * float(exact.abs().max()) and ours <= 4 * models


def _sizes_of(results: list[Any]) -> str:
    return ", ".join(str(tuple(one.shape)) if isinstance(one, Tensor) else repr(one) for one in results)


@contextmanager
def _as_in_inference() -> Iterator[None]:
    """Within the block, autograd records nothing and autocast changes no dtype."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


class _Frozen(nn.Module):
    """What both kinds of frozen models have in common: they are called without hooks, and take their inputs apart."""

    _inputs: Any  # how the inputs are nested, as `_write` has it
    _count: int  # of tensors among them

    def __call__(self, input: Any, *others: Any) -> Any:
        # nn.Module's own takes 0.6 us to look for hooks, a quarter of a small network's time.
        return self.forward(input, *others)

    def _refuse_hook(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"a {type(self).__name__} runs no hooks")

    register_forward_hook = register_forward_pre_hook = _refuse_hook
    register_full_backward_hook = register_full_backward_pre_hook = _refuse_hook

    def _leaves(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The tensors of the inputs, in their order. TypeError where the inputs are nested in another way."""
        kind, content = self._inputs
        if len(inputs) == 1 < len(content) and isinstance(inputs[0], (tuple, list)):  # as freeze takes them
            inputs = tuple(inputs[0])
        if len(inputs) != len(content):
            raise TypeError(f"expected {len(content)} inputs, got {len(inputs)}")
        if all(one[0] == _VALUE for one in content):
            return inputs
        found: list[Any] = []
        _take_apart((kind, content), inputs, found)
        return tuple(found)


def _take_apart(structure: Any, given: Any, found: list[Any]) -> None:
    kind, content = structure
    if kind == _VALUE:
        found.append(given)
        return
    if kind == _DICT:
        if not isinstance(given, dict) or not content.keys() <= given.keys():
            keys = f"a dict with {', '.join(map(str, given))}" if isinstance(given, dict) else type(given).__name__
            raise TypeError(f"expected a dict with {', '.join(map(str, content))}, got {keys}")
    elif not isinstance(given, (tuple, list)) or len(given) != len(content):
        raise TypeError(f"expected a {kind} of {len(content)} where the inputs have {type(given).__name__}")
    for name, one in content.items() if kind == _DICT else enumerate(content):
        _take_apart(one, given[name], found)


class FrozenModel(_Frozen):
    """What :func:`freeze` returns: immutable, without gradients, safe to call from several threads.

    It can be saved (``torch.save``, pickle), loaded (by ``torch.load`` with ``weights_only=True`` too) on another
    machine, where its weights are packed anew, and exported (``torch.export``). It prints as the layers that it runs;
    ``program`` is the text that the operator reads, a line a layer. ``load_state_dict`` puts other ``weights`` of the
    same size in, and packs them; ``torch.func.functional_call`` uses other weights for one call, unpacked, which is
    slower. Weights must not be changed in place.
    """

    weights: Tensor
    packed: Tensor
    _channels_last: Sequence[int] = ()  # what a model that an older version saved does not say

    def __init__(
        self,
        program: str,
        weights: Tensor,
        sizes: Sequence[Sequence[int]],
        order: Sequence[int],
        inputs: Any,
        output: Any,
        channels_last: Sequence[int] = (),
    ) -> None:
        # sizes: the sizes of the network's inputs, for which the weights are packed. order: for each input of the
        # network, which of the model's tensors it is. inputs, output: how the model's inputs and its result are nested;
        # in the result, numbers stand for the network's outputs. channels_last: the numbers of the network's inputs
        # that are expected to lie so; others may, which is slower.
        super().__init__()
        self._program, self._sizes, self._order = program, [tuple(one) for one in sizes], list(order)
        self._channels_last = list(channels_last)
        self._inputs, self._output = inputs, output
        self._plain = inputs == (_TUPLE, [(_VALUE, 0)]) and output == (_VALUE, 0) and self._order == [0]
        self.register_buffer("weights", weights)
        self._pack()

    def _pack(self) -> None:
        sizes = list(chain.from_iterable(self._sizes))
        packed = pack_network(self.weights, self._program, sizes, self._channels_last)
        self.register_buffer("packed", packed, persistent=False)
        self._arguments = (self.weights, self.packed, self._program)

    @property
    def program(self) -> str:
        return self._program

    def forward(self, input: Any, *others: Any) -> Any:
        """The model's inputs -> what the model returned for them."""
        arguments = self._arguments
        if self._buffers["weights"] is arguments[0] and not _is_compiling():
            if self._plain and not others:
                return _network_of_one_call(input, *arguments)
            call, call_of_one = _network_call, _network_of_one_call
        else:
            # Weights that have been exchanged since they were packed are used as they are, without the packed ones. In
            # an export both attributes are other objects, and belong together.
            exchanged = self.weights is not arguments[0] and self.packed is arguments[1]
            arguments = (self.weights, self.packed[:0] if exchanged else self.packed, self._program)
            call, call_of_one = network_op, network_of_one
        leaves = self._leaves((input, *others))
        if self._plain:
            return call_of_one(leaves[0], *arguments)
        return _read_back(self._output, call([leaves[place] for place in self._order], *arguments))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._pack()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "FrozenModel":
        weights = self.weights
        super()._apply(fn, recurse)
        try:
            self._pack()
        except RuntimeError:  # the operator does not take this dtype or device
            self.weights = weights
            self._pack()
            raise
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_buffers"] = {"weights": self.weights}
        del state["_arguments"]
        return state | {"version": _VERSION}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(_of_this_version(state))
        self._pack()

    def __repr__(self) -> str:
        lines = [line for line in self._program.split("\n")[1:] if not line.startswith("weight ")]
        return "\n  ".join([f"{type(self).__name__}(", *lines]) + "\n)"


def _read_back(structure: Any, values: Sequence[Any]) -> Any:
    """Builds a nested result from these values and a structure that `_write` has written."""
    if not isinstance(structure, tuple):
        return structure
    kind, content = structure
    if kind == _VALUE:
        return values[content]
    if kind == _DICT:
        return {name: _read_back(one, values) for name, one in content.items()}
    if kind == _TORCH:
        return _torch_constant(content)
    parts = [_read_back(one, values) for one in content]
    return parts if kind == _LIST else tuple(parts)


# The version of the form in which a frozen model is saved. It is raised when the meaning of a program's lines, or of a
# graph's steps, changes.
_VERSION = 3


def _of_this_version(state: dict[str, Any]) -> dict[str, Any]:
    """Removes the version from what was saved. RuntimeError where it was saved in another form."""
    version = state.get("version")
    if version != _VERSION:
        raise RuntimeError(
            f"this frozen model was saved in form {version or 1}, and this version of fastnn reads form {_VERSION}: "
            "freeze the model again"
        )
    return {name: value for name, value in state.items() if name != "version"}


# ---- models that are more than one network ----------------------------------------------------------------------


class FrozenGraph(_Frozen):
    """What :func:`freeze` returns for a model that is more than one network: the networks as frozen models, and the
    operators between them. Immutable, without gradients, safe to call from several threads.

    It can be saved, loaded (by ``torch.load`` with ``weights_only=True`` too) and exported. It prints as the networks
    and operators that it runs.
    """

    def __init__(
        self,
        parts: list[FrozenModel],
        constants: list[Tensor],
        steps: list[Any],
        ranges: list[Any],
        output: Any,
        inputs: Any,
    ) -> None:
        # parts: the networks. steps: each has the name of an operator or the number of a network, the arguments, and
        # the values that no later step needs. Values are numbered: first the inputs, then the constants, then the
        # results of the steps. ranges: for each input's sizes, the least and the most. output: a value, or a list,
        # tuple or dict of values. inputs: how the model's inputs are nested.
        super().__init__()
        self.parts = nn.ModuleList(parts)
        for number, constant in enumerate(constants):
            self.register_buffer(f"constant_{number}", constant)
        self._constants, self._steps, self._ranges, self._output = len(constants), steps, ranges, output
        self._inputs = inputs
        self._names = [f"constant_{i}" for i in range(len(constants))]
        self._run = _as_function(steps, output, len(ranges) + len(constants), len(parts))

    def forward(self, input: Any, *others: Any) -> Any:
        """The model's inputs -> what the model returned for them."""
        leaves = self._leaves((input, *others))
        for leaf, ranges in zip(leaves, self._ranges, strict=True):
            _check_sizes(leaf, ranges)
        buffers, parts = self._buffers, self.parts._modules.values()
        arguments = (*leaves, *[buffers[name] for name in self._names], *parts)
        if not torch.is_grad_enabled() and not autocast_is_on():
            return self._run(*arguments)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return self._run(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        parts = [
            (
                part._program,
                part.weights,
                part._sizes,
                part._order,
                part._inputs,
                part._output,
                part._channels_last,
            )
            for part in self.parts
        ]
        constants = [getattr(self, f"constant_{i}") for i in range(self._constants)]
        return {
            "version": _VERSION,
            "parts": parts,
            "constants": constants,
            "rest": (self._steps, self._ranges, self._output, self._inputs),
            "training": self.training,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = _of_this_version(state)
        parts = [FrozenModel(*part) for part in state["parts"]]
        FrozenGraph.__init__(self, parts, state["constants"], *state["rest"])
        self.training = state["training"]

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}("]
        for name, *_ in self._steps:
            part = repr(self.parts[name]) if isinstance(name, int) else name
            lines += [f"  {line}" for line in part.splitlines()]
        return "\n".join([*lines, ")"])


_VALUE, _LIST, _TUPLE, _DICT, _TORCH = "value", "list", "tuple", "dict", "torch"


def _write_graph(exported: Exported, leaves: Sequence[Tensor]) -> tuple[Any, ...]:
    """The arguments of a FrozenGraph, without the last one. leaves: the example inputs."""
    examples = dict(zip(exported.inputs, leaves, strict=True))
    outputs = {output for output in exported.outputs if isinstance(output, Node)}
    needed = set(outputs)
    units: list[Segment | Node] = []
    for unit in reversed(exported.units):
        gives = unit.outputs if isinstance(unit, Segment) else [unit]
        if any(node in needed for node in gives):
            units.insert(0, unit)
            needed.update(unit.inputs if isinstance(unit, Segment) else unit.all_input_nodes)
    constants = [node for node in exported.graph.nodes if node in needed and node.name in exported.constants]
    numbers = {node: number for number, node in enumerate([*exported.inputs, *constants])}
    users: dict[Node, Any] = {}  # the last user of each value
    for unit in units:
        taken = unit.inputs if isinstance(unit, Segment) else unit.all_input_nodes
        users.update(dict.fromkeys(taken, unit))
    parts: list[FrozenModel] = []
    steps: list[Any] = []
    count = len(numbers)
    for unit in units:
        done = [numbers[one] for one, user in users.items() if user is unit and one not in outputs and one in numbers]
        if isinstance(unit, Node):
            steps.append((_name(unit), _write(unit.args, numbers), _write(dict(unit.kwargs), numbers), done))
            numbers[unit] = count
            count += 1
            continue
        sizes = [tuple(_hint(size) for size in node.meta["val"].shape) for node in unit.inputs]
        given = (_TUPLE, [(_VALUE, place) for place in range(len(sizes))])
        is_one = len(unit.outputs) == 1
        result = (_VALUE, 0) if is_one else (_LIST, [(_VALUE, place) for place in range(len(unit.outputs))])
        last = _channels_last([examples.get(node) for node in unit.inputs])
        parts.append(FrozenModel(unit.program, _joined(unit), sizes, list(range(len(sizes))), given, result, last))
        arguments = (_TUPLE, [(_VALUE, numbers[node]) for node in unit.inputs])
        steps.append((len(parts) - 1, arguments, (_DICT, {}), done))
        if is_one:
            numbers[unit.outputs[0]] = count
            count += 1
            continue
        whole, count = count, count + 1
        for place, node in enumerate(unit.outputs):
            is_last = place + 1 == len(unit.outputs)
            getitem: Any = (
                "operator.getitem",
                (_TUPLE, [(_VALUE, whole), place]),
                (_DICT, {}),
                [whole] if is_last else [],
            )
            steps.append(getitem)
            numbers[node] = count
            count += 1
    # A result that lies in a constant is copied, so that a caller who changes it in place changes no later call.
    returned = dict(numbers)
    for node in numbers:
        if node in outputs and _lies_in(node, constants):
            steps.append(("aten.clone.default", (_TUPLE, [(_VALUE, numbers[node])]), (_DICT, {}), []))
            returned[node], count = count, count + 1
    output = pytree.tree_unflatten(exported.outputs, exported.out_spec)
    tensors = [exported.constants[node.name].detach().clone() for node in constants]
    return parts, tensors, steps, exported.ranges, _write(output, returned)


def _lies_in(node: Node, constants: Sequence[Node]) -> bool:
    """Whether a value is one of the constants, or may be a view of one, as the operator's schema says."""
    while node not in constants:
        target, takes = node.target, node.all_input_nodes
        may_be_view = target is operator.getitem or (
            isinstance(target, OpOverload) and any(one.alias_info is not None for one in target._schema.arguments)
        )
        if not (may_be_view and takes):
            return False
        node = takes[0]
    return True


def _hint(size: Any) -> int:
    """A size of the example; 1 where it depends on values."""
    hint = size if isinstance(size, int) else size.node.hint
    return 1 if hint is None else max(1, int(hint))


def _name(node: Node) -> str:
    """The name by which `_function` finds the operator of a node."""
    target = node.target
    if target in VIEWS:  # which the export has chosen for the example's strides
        target = torch.ops.aten.reshape.default
    if isinstance(target, OpOverload):
        _function(str(target))
        return str(target)
    if getattr(target, "__module__", "") in ("_operator", "operator"):
        return f"operator.{target.__name__}"  # type: ignore[union-attr]
    if target in _OF_SIZES.values():
        return f"{target.__module__}.{target.__name__}"  # type: ignore[union-attr]
    raise ValueError(f"freeze: a frozen model cannot hold {getattr(target, '__name__', target)}")


def _function(name: Any) -> Any:
    """The function that a step calls, by its name. Names may come from files that anybody has written, so only
    operators of torch and fastnn, and arithmetic, are found."""
    namespace, _, rest = name.partition(".")
    if namespace == "operator" and rest in _ARITHMETIC:
        return getattr(operator, rest)
    if name in _OF_SIZES:
        return _OF_SIZES[name]
    packet, _, overload = rest.partition(".")
    is_special = packet.startswith("__") and packet not in _OF_BITS
    if namespace in ("aten", "fastnn") and overload and not is_special and not overload.startswith("__"):
        found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
        # An exported graph changes nothing in place. An operator that does might write to a file that is mapped to a
        # tensor's memory.
        if isinstance(found, OpOverload) and not found._schema.is_mutable and packet not in _REFUSED:
            return found
    raise ValueError(f"a frozen model cannot hold {name}")


_OF_BITS = ("__and__", "__or__", "__xor__", "__lshift__", "__rshift__")  # operators of torch whose names are like these
_REFUSED = (
    "from_file",
    "as_strided",
    "as_strided_copy",
    "_sparse_coo_tensor_unsafe",
    "_sparse_compressed_tensor_unsafe",
)


# The arithmetic of sizes, as torch.export writes it.
_ARITHMETIC = (
    "add",
    "sub",
    "mul",
    "floordiv",
    "truediv",
    "mod",
    "neg",
    "getitem",
    "pow",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
)
# What torch.export writes where Python's own functions of numbers take a size.
_OF_SIZES = {
    f"{one.__module__}.{one.__name__}": one
    for one in (
        torch.sym_min,
        torch.sym_max,
        torch.sym_int,
        torch.sym_float,
        torch.sym_not,
        math.ceil,
        math.floor,
        math.trunc,
        round,
    )
}


def _write(value: Any, numbers: dict[Node, int]) -> Any:
    """Writes an argument as lists, tuples, strings and numbers. In place of a node stands its value's number."""
    if isinstance(value, Node):
        if value not in numbers:  # such as a generator of random numbers
            raise ValueError(f"freeze: a frozen model cannot hold {value}")
        return (_VALUE, numbers[value])
    if isinstance(value, _Leaf):
        return (_VALUE, value.place)
    if isinstance(value, dict):
        return (_DICT, {name: _write(one, numbers) for name, one in value.items()})
    if isinstance(value, (list, tuple)) and type(value).__name__ in ("list", "tuple", "immutable_list", "Size"):
        return (_LIST if isinstance(value, list) else _TUPLE, [_write(one, numbers) for one in value])
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return (_TORCH, str(value).removeprefix("torch."))
    if isinstance(value, torch.device):
        return str(value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ValueError(f"freeze: a frozen model cannot hold an argument or a result that is a {type(value).__name__}")


def _torch_constant(name: Any) -> Any:
    """Finds a dtype, layout or memory format of torch by its name. Names may come from files that anybody has
    written."""
    found = getattr(torch, str(name), None)
    if not isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
        raise ValueError(f"a frozen model cannot hold torch.{name}")
    return found


def _as_function(steps: list[Any], output: Any, values: int, parts: int) -> Callable[..., Any]:
    """Writes the steps as Python code, which runs in a third of the time of a loop over them. The steps may come from a
    file that anybody has written, so the code holds only numbers from them; all else gets names that are made here."""
    scope: dict[str, Any] = {}

    def name_of(thing: Any) -> str:
        scope[f"c{len(scope)}"] = thing
        return f"c{len(scope) - 1}"

    def as_code(value: Any) -> str:
        """The code of an argument that `_write` has written."""
        if not isinstance(value, tuple):
            return name_of(value)
        kind, content = value
        if kind == _VALUE:
            return f"v{int(content)}"
        if kind == _DICT:
            return "{" + ", ".join(f"{name_of(name)}: {as_code(one)}" for name, one in content.items()) + "}"
        if kind == _TORCH:
            return name_of(_torch_constant(content))
        inner = "".join(f"{as_code(one)}, " for one in content)
        return f"[{inner}]" if kind == _LIST else f"({inner})"

    names = [*(f"v{i}" for i in range(values)), *(f"p{i}" for i in range(parts))]
    lines = [f"def run({', '.join(names)}):"]
    for i, (function, args, kwargs, done) in enumerate(steps, start=values):
        called = f"p{function}" if isinstance(function, int) else name_of(_function(function))
        keywords = f", **{as_code(kwargs)}" if kwargs[1] else ""
        lines.append(f" v{i} = {called}(*{as_code(args)}{keywords})")
        lines += [f" v{int(number)} = None" for number in done]
    lines.append(f" return {as_code(output)}")
    exec("\n".join(lines), scope)
    run: Callable[..., Any] = scope["run"]
    return run


def _check_sizes(input: Tensor, ranges: list[int]) -> None:
    sizes = input.shape
    if len(sizes) * 2 == len(ranges):
        for i, size in enumerate(sizes):
            least, most = ranges[2 * i], ranges[2 * i + 1]
            if size < least or (most and size > most):
                break
        else:
            return
    expected = ", ".join(map(_describe_range, ranges[::2], ranges[1::2]))
    raise RuntimeError(f"network: expected an input of size [{expected}], got {list(sizes)}")


def _describe_range(least: int, most: int) -> str:
    if least == most:
        return str(least or "any")
    return f"{least} to {most}" if most else f"{least} or more"


torch.serialization.add_safe_globals([FrozenModel, FrozenGraph])
