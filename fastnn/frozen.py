"""``fastnn.freeze``: a model for inference alone, its weights packed, run by one operator call or one for each part."""

import inspect
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fastnn import nn
from fastnn._torch import OpOverload, pytree
from fastnn.fusion import fuse
from fastnn.graph.exported import VIEWS, Exported, Segment, read
from fastnn.graph.rehearsal import cloned, copied, leaving_no_trace
from fastnn.ops.frozen import frozen_op, frozen_packed, read_program, write_program
from fastnn.recurrent_modes import MODES

_frozen_call = frozen_op._op  # what calling it comes to, 0.25 us sooner; torch.compile knows only the former
_is_compiling = torch.compiler.is_compiling


def freeze(model: nn.Module, example_input: Any) -> "FrozenModel | FrozenGraph":
    """``model`` as it is now, for inference alone, in as few operator calls as it allows.

    Layers that fastnn has an operator for are fused as by :func:`fastnn.fuse`, batch norms become part of the layers
    before them, and each chain of such layers, ``flatten`` and activations becomes one operator call. A model that is
    one chain becomes a :class:`FrozenModel`; of others, what lies between the chains stays as it is, in a
    :class:`FrozenGraph`. Dropout is left out. The frozen model is compared with the model, on the example and on a
    batch of another size, before it is returned.

    Args:
        model: float32 or float64, on the CPU. It is not changed, and later changes of it do not reach the frozen model.
        example_input: (batch, ...), or a tuple of such inputs. The frozen model takes any batch size, and is fastest
            for sizes like these. It takes other sizes in further dimensions (lengths, heights) where the model does.

    Raises:
        ValueError: there is nothing to freeze, or the model does something that cannot be captured; the message names
            the layer and says why.
    """
    inputs = tuple(example_input) if isinstance(example_input, (tuple, list)) else (example_input,)
    _check_arguments(model, inputs)
    # The export takes a batch of one for a constant.
    doubled = tuple(torch.cat([input, input]) for input in inputs)
    is_single = any(input.shape[0] == 1 for input in inputs)

    def as_it_is() -> nn.Module:
        """A copy in eval mode, which no call has changed."""
        with torch.inference_mode(False):
            return fuse(copied(model)).eval()

    with _as_in_inference(), leaving_no_trace() as again:
        try:
            expected = as_it_is()(*cloned(inputs))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"freeze: {type(model).__name__} does not take example_input: {error}") from error
        # Once more, as nothing that the model does may depend on the batch's size.
        other = doubled if is_single else tuple(input[:1] for input in inputs)
        again()
        try:
            expected_of_other = as_it_is()(*cloned(other))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ValueError(_words_of_batch(model, inputs, other, error)) from error
        with _export_lock:
            exported = read(as_it_is(), doubled if is_single else inputs)
        frozen = _build(model, exported, inputs)
        for some, wanted in ((inputs, expected), (other, expected_of_other)):
            again()
            _compare(frozen, some, wanted, exported.draws)
    return frozen


_export_lock = threading.RLock()  # torch.export keeps in globals what it is at


def _words_of_batch(model: nn.Module, inputs: tuple[Tensor, ...], other: tuple[Tensor, ...], error: Exception) -> str:
    sizes = " and ".join(str(tuple(input.shape)) for input in inputs)
    words = (
        f"freeze: what {type(model).__name__} does depends on the batch's size, which is dimension 0 of each input: it"
        f" takes {sizes}, but of {' and '.join(str(tuple(input.shape)) for input in other)} it says: {error}"
    )
    first = {input.shape[0] for input in inputs}
    if len(first) == 1:
        return words
    odd = next(i for i, input in enumerate(inputs) if input.shape[0] != inputs[0].shape[0])
    batch = inputs[0].shape[0]
    where = [dim for dim, size in enumerate(inputs[odd].shape) if size == batch]
    found = f" It may have the batch in dimension {where[0]}, as a recurrent layer's state has;" if where else ""
    return (
        f"{words}. Input {odd} has {inputs[odd].shape[0]} in dimension 0 where input 0 has {batch}.{found} such an"
        f" input is not taken: transpose it within the model"
    )


def _build(model: nn.Module, exported: Exported, inputs: tuple[Tensor, ...]) -> "FrozenModel | FrozenGraph":
    name = type(model).__name__
    if not exported.segments:
        why = f": {str(exported.refusals[0]).removeprefix('freeze: ')}" if exported.refusals else ""
        raise ValueError(f"freeze: there is nothing in {name} to freeze{why}")
    for segment in exported.segments:
        tensors = [tensor for stage in segment.stages for tensor in stage.tensors]
        if len({t.dtype for t in tensors}) != 1 or tensors[0].dtype not in (torch.float32, torch.float64):
            found = ", ".join(sorted({str(tensor.dtype) for tensor in tensors}))
            raise ValueError(f"freeze: expected parameters of one dtype, float32 or float64, got {found}")
    if exported.is_one_chain:
        return _frozen_chain(exported.segments[0], tuple(inputs[0].shape))
    return FrozenGraph(*_write_graph(exported))


def _frozen_chain(segment: Segment, sizes: tuple[int, ...]) -> "FrozenModel":
    weights = torch.cat([tensor.detach().reshape(-1) for stage in segment.stages for tensor in stage.tensors])
    return FrozenModel(write_program((stage.name, stage.numbers) for stage in segment.stages), weights, sizes)


def _check_arguments(model: Any, inputs: tuple[Any, ...]) -> None:
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"freeze: expected a model that is a torch.nn.Module, got a {type(model).__name__}")
    for place, input in enumerate(inputs):
        if not isinstance(input, Tensor):
            where = f", and its element {place}" if len(inputs) > 1 else ""
            raise ValueError(
                f"freeze: expected example_input{where} to be a Tensor, or a tuple of Tensors, got a "
                f"{type(input).__name__}: tensors within tuples and dicts, as an LSTM's state, are not taken"
            )
        if input.dim() < 1 or input.numel() == 0 or not input.is_cpu:
            raise ValueError(
                "freeze: expected example_input to be on the CPU, of size (batch, ...) and not empty, got size "
                f"{tuple(input.shape)} on {input.device}"
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
    frozen: "FrozenModel | FrozenGraph", inputs: tuple[Tensor, ...], expected: Any, draws: Sequence[str]
) -> None:
    results, spec = pytree.tree_flatten(frozen(*inputs))
    wanted, wanted_spec = pytree.tree_flatten(expected)
    same = spec == wanted_spec and all(map(_is_alike, results, wanted))
    if same and all(map(_is_close, results, wanted)):
        return
    words = (
        "freeze: the frozen model does not compute what the model does on an input of size "
        f"{', '.join(str(tuple(input.shape)) for input in inputs)}: expected a result of size "
        f"{_sizes_of(wanted)}, got {_sizes_of(results)}"
    )
    if same:
        words += " with other values"
        if draws:
            words += f"; it draws random numbers ({', '.join(draws)}), and others than the model does"
    raise ValueError(words)


def _is_alike(result: Any, wanted: Any) -> bool:
    """Whether both are tensors of one size, or objects of one class."""
    if isinstance(result, Tensor) and isinstance(wanted, Tensor):
        return result.shape == wanted.shape
    return type(result) is type(wanted)


def _is_close(result: Any, wanted: Any) -> bool:
    if not isinstance(result, Tensor):
        return bool(result == wanted)
    return torch.allclose(result, wanted, rtol=1e-3, atol=1e-4, equal_nan=True)


def _sizes_of(results: list[Any]) -> str:
    return ", ".join(str(tuple(one.shape)) if isinstance(one, Tensor) else repr(one) for one in results)


@contextmanager
def _as_in_inference() -> Iterator[None]:
    """Nothing is recorded for a gradient, and no dtype changed by autocast."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


class FrozenModel(nn.Module):
    """What :func:`freeze` returns: immutable, without gradients, safe to call from several threads.

    It can be saved (``torch.save``, pickle), loaded (by ``torch.load`` with ``weights_only=True`` too) on another
    machine, where its weights are packed anew, and exported (``torch.export``). It prints as the layers that it runs;
    ``program`` is what the operator reads, a line a stage. Other ``weights`` of the same size come by
    ``load_state_dict``, which packs them, or for a call by ``torch.func.functional_call``, which uses them as they are,
    and slower. They must not be changed in place.
    """

    weights: Tensor
    packed: Tensor

    def __init__(self, program: str, weights: Tensor, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self._program, self._sizes = program, sizes
        self.register_buffer("weights", weights)
        self._pack()

    def _pack(self) -> None:
        self.register_buffer("packed", frozen_packed(self.weights, self._program, self._sizes), persistent=False)
        self._arguments = (self.weights, self.packed, self._program)

    @property
    def program(self) -> str:
        return self._program.replace(";", "\n").rstrip()

    def forward(self, input: Tensor) -> Tensor:
        """input (batch, ...) as the model's -> what the model returned for it."""
        arguments = self._arguments
        if self._buffers["weights"] is arguments[0] and not _is_compiling():
            return _frozen_call(input, *arguments)
        # Weights that have been exchanged since they were packed are used as they are, without the packed ones. In an
        # export both attributes are other objects, and belong together.
        others = self.weights is not arguments[0] and self.packed is arguments[1]
        return frozen_op(input, self.weights, self.packed[:0] if others else self.packed, self._program)

    def __call__(self, input: Tensor) -> Tensor:
        # nn.Module's own takes 0.6 us to look for hooks, a quarter of a small network's time.
        return self.forward(input)

    def _refuse_hook(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a FrozenModel runs no hooks")

    register_forward_hook = register_forward_pre_hook = _refuse_hook
    register_full_backward_hook = register_full_backward_pre_hook = _refuse_hook

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._pack()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "FrozenModel":
        weights = self.weights
        super()._apply(fn, recurse)
        try:
            self._pack()
        except RuntimeError:  # a dtype or a device that is not for it
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
        return "\n  ".join([f"{type(self).__name__}(", *_describe(self._program)]) + "\n)"


# Of what a saved frozen model holds: its program, in which what a stage says may change, and the steps of a graph.
_VERSION = 2


def _of_this_version(state: dict[str, Any]) -> dict[str, Any]:
    """What was saved, without the version. RuntimeError where another version of fastnn has written it."""
    version = state.get("version")
    if version != _VERSION:
        raise RuntimeError(
            f"this frozen model was saved in form {version or 1}, and this version of fastnn reads form {_VERSION}: "
            "freeze the model again"
        )
    return {name: value for name, value in state.items() if name != "version"}


def _describe(program: str) -> Iterator[str]:
    """A line a layer, as the layers themselves print."""
    for name, numbers in read_program(program):
        if name == "input":
            yield f"input size: ({', '.join(map(_describe_range, numbers[::2], numbers[1::2]))})"
        elif name == "mlp":
            widths = numbers[1:2] + numbers[2::2]
            for i, activation in enumerate(numbers[3::2]):
                linear = nn.Linear(widths[i], widths[i + 1], bool(numbers[0]), device="meta")
                yield str(linear) if activation == "identity" else f"{linear}, {activation}"
        elif name == "conv":
            yield _describe_conv(*numbers)
        elif name == "rnn":
            yield _describe_rnn(*numbers)
        else:
            yield name


def _describe_range(least: int, most: int) -> str:
    if least == most:
        return str(least or "any")
    return f"{least} to {most}" if most else f"{least} or more"


def _describe_conv(dims: int, biased: int, out: int, in_each: int, *numbers: int) -> str:
    def part(i: int) -> Any:  # one number, if it is that of all dimensions
        part = numbers[i * dims : (i + 1) * dims]
        return part[0] if len(set(part)) == 1 else part

    groups, ceil_mode = numbers[8 * dims :]
    layer = getattr(nn, f"ConvReLUMaxPool{dims}d")(
        *(in_each * groups, out, part(0), part(1), part(2), part(3), groups, bool(biased)),
        pool_kernel_size=part(4),
        pool_stride=part(5),
        pool_padding=part(6),
        pool_dilation=part(7),
        ceil_mode=bool(ceil_mode),
        device="meta",
    )
    return str(layer)


def _describe_rnn(
    mode: int, num_layers: int, directions: int, batch_first: int, biased: int, last: int, *sizes: int
) -> str:
    features, hidden, projected = sizes
    kind, _, nonlinearity = MODES[mode].name.partition("_")
    layer = getattr(nn, kind)(
        *(features, hidden, num_layers),
        **({"nonlinearity": nonlinearity.lower()} if nonlinearity else {}),
        **({"proj_size": projected} if projected else {}),
        bias=bool(biased),
        batch_first=bool(batch_first),
        bidirectional=directions == 2,
        device="meta",
    )
    return f"{layer}, last step" if last else str(layer)


# ---- models that are more than one chain -------------------------------------------------------------------------


class FrozenGraph(nn.Module):
    """What :func:`freeze` returns of a model that is more than one chain: its chains as frozen models, and what lies
    between them, operator by operator. Immutable, without gradients, safe to call from several threads.

    It can be saved, loaded (by ``torch.load`` with ``weights_only=True`` too) and exported. It prints as the chains and
    operators that it runs.
    """

    def __init__(
        self, parts: list[FrozenModel], constants: list[Tensor], steps: list[Any], ranges: list[Any], output: Any
    ) -> None:
        # parts: the chains. steps: each the name of an operator, or the number of a chain, its arguments, and the
        # values that nobody needs after it. A value is an input, a constant or a step's result, by its number in this
        # order. ranges: of each input's sizes, the least and the most. output: a value, or a list, tuple or dict of
        # such.
        super().__init__()
        self.parts = nn.ModuleList(parts)
        for number, constant in enumerate(constants):
            self.register_buffer(f"constant_{number}", constant)
        self._constants, self._steps, self._ranges, self._output = len(constants), steps, ranges, output
        self._names = [f"constant_{i}" for i in range(len(constants))]
        self._run = _as_function(steps, output, len(ranges) + len(constants), len(parts))

    def forward(self, *inputs: Tensor) -> Any:
        """The model's inputs -> what the model returned for them."""
        if len(inputs) != len(self._ranges):
            raise TypeError(f"expected {len(self._ranges)} inputs, got {len(inputs)}")
        for input, ranges in zip(inputs, self._ranges, strict=True):
            _check_sizes(input, ranges)
        buffers, parts = self._buffers, self.parts._modules.values()
        arguments = (*inputs, *[buffers[name] for name in self._names], *parts)
        if not torch.is_grad_enabled():
            return self._run(*arguments)
        with torch.no_grad():
            return self._run(*arguments)

    def __call__(self, *inputs: Tensor) -> Any:
        return self.forward(*inputs)  # as a FrozenModel's

    def _refuse_hook(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a FrozenGraph runs no hooks")

    register_forward_hook = register_forward_pre_hook = _refuse_hook
    register_full_backward_hook = register_full_backward_pre_hook = _refuse_hook

    def __getstate__(self) -> dict[str, Any]:
        parts = [(part._program, part.weights, part._sizes) for part in self.parts]
        constants = [getattr(self, f"constant_{i}") for i in range(self._constants)]
        return {
            "version": _VERSION,
            "parts": parts,
            "constants": constants,
            "rest": (self._steps, self._ranges, self._output),
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


def _write_graph(exported: Exported) -> tuple[Any, ...]:
    """The arguments of a FrozenGraph."""
    numbers = {node: i for i, node in enumerate(exported.inputs)}
    last = {segment.nodes[-1]: segment for segment in exported.segments}
    needed = {output for output in exported.outputs if isinstance(output, Node)}
    nodes: list[Node] = []
    for node in reversed(list(exported.graph.nodes)):
        if node in needed and node not in numbers:
            nodes.insert(0, node)
            if node.name not in exported.constants:
                needed.update([last[node].input] if node in last else node.all_input_nodes)
    constants = [node for node in nodes if node.name in exported.constants]
    calls = [node for node in nodes if node.name not in exported.constants]
    numbers.update({node: len(numbers) + i for i, node in enumerate([*constants, *calls])})
    outputs = {output for output in exported.outputs if isinstance(output, Node)}
    users: dict[Node, Node] = {}  # each value's last
    for node in calls:
        users.update(dict.fromkeys([last[node].input] if node in last else node.all_input_nodes, node))
    parts: list[FrozenModel] = []
    steps: list[Any] = []
    for node in calls:
        done = [numbers[one] for one, user in users.items() if user is node and one not in outputs]
        if node in last:
            segment = last[node]
            sizes = tuple(_hint(size) for size in segment.input.meta["val"].shape)
            parts.append(_frozen_chain(segment, sizes))
            steps.append((len(parts) - 1, (_TUPLE, [(_VALUE, numbers[segment.input])]), (_DICT, {}), done))
        else:
            steps.append((_name(node), _write(node.args, numbers), _write(dict(node.kwargs), numbers), done))
    output = pytree.tree_unflatten(exported.outputs, exported.out_spec)
    tensors = [exported.constants[node.name].detach().clone() for node in constants]
    return parts, tensors, steps, exported.ranges, _write(output, numbers)


def _hint(size: Any) -> int:
    """A size of the example."""
    return size if isinstance(size, int) else int(size.node.hint)


def _name(node: Node) -> str:
    """An operator's, by which `_function` finds it."""
    target = node.target
    if target in VIEWS:  # which the export has chosen for the example's strides
        target = torch.ops.aten.reshape.default
    if isinstance(target, OpOverload):
        return str(target)
    if getattr(target, "__module__", "") in ("_operator", "operator"):
        return f"operator.{target.__name__}"  # type: ignore[union-attr]
    raise ValueError(f"freeze: a frozen model cannot hold {target}")


def _function(name: Any) -> Any:
    """What a step calls. Names come from files, too: nothing but torch's and fastnn's operators, and arithmetic."""
    namespace, _, rest = name.partition(".")
    if namespace == "operator" and rest in _ARITHMETIC:
        return getattr(operator, rest)
    if namespace in ("aten", "fastnn"):
        packet, _, overload = rest.partition(".")
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    raise ValueError(f"a frozen model cannot hold {name}")


# Of sizes, as torch.export writes it.
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


def _write(value: Any, numbers: dict[Node, int]) -> Any:
    """An argument in lists, tuples, strings and numbers, in which nodes are the numbers of their values."""
    if isinstance(value, Node):
        return (_VALUE, numbers[value])
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


def _as_function(steps: list[Any], output: Any, values: int, parts: int) -> Callable[..., Any]:
    """What the steps do, as Python code, which takes a third of the time of going through them. The steps may come from
    a file: of what is in them the code holds nothing but numbers, everything else goes by names that are made here."""
    scope: dict[str, Any] = {}

    def name_of(thing: Any) -> str:
        scope[f"c{len(scope)}"] = thing
        return f"c{len(scope) - 1}"

    def as_code(value: Any) -> str:
        """What `_write` was given."""
        if not isinstance(value, tuple):
            return name_of(value)
        kind, content = value
        if kind == _VALUE:
            return f"v{int(content)}"
        if kind == _DICT:
            return "{" + ", ".join(f"{name_of(name)}: {as_code(one)}" for name, one in content.items()) + "}"
        if kind == _TORCH:
            return name_of(getattr(torch, content))
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
    raise RuntimeError(f"frozen: expected an input of size [{expected}], got {list(sizes)}")


torch.serialization.add_safe_globals([FrozenModel, FrozenGraph])
