"""Forwards that set traps for whoever traces a forward once and answers later calls by that trace.

A case takes `fuse`, which is :func:`fastnn.fuse` or a function that leaves the model as it is, and returns what the
calls of its models gave. Both must give the same: test_hostile_forwards.py holds them against each other.
"""

import abc
import builtins
import collections
import contextlib
import copy
import enum
import functools
import math
import operator
import textwrap
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.overrides import TorchFunctionMode

import fastnn

Fuse = Callable[[nn.Module], nn.Module]
Seen = list[Any]
Case = Callable[[Fuse], Seen]

CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    assert function.__name__ not in CASES
    CASES[function.__name__] = function
    return function


def outcome(function: Case, fuse: Fuse) -> Seen:
    """What a case gives with one of the two, from the same random numbers and in double precision."""
    default = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        return function(fuse)
    finally:
        torch.set_default_dtype(default)


def same(a: Any, b: Any) -> bool:
    """Whether types, order and numbers are the same: those of tensors but for what another order of sums changes."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if (a.dtype, a.shape, a.stride(), a.requires_grad) != (b.dtype, b.shape, b.stride(), b.requires_grad):
            return False
        return torch.allclose(a.detach(), b.detach(), rtol=1e-9, atol=1e-12, equal_nan=True)
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, (float, complex)):
        return repr(a) == repr(b)
    return a == b


def tensors_in(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, (tuple, list)):
        return [tensor for part in result for tensor in tensors_in(part)]
    return []


def after(args: tuple[Any, ...]) -> Seen:
    """The inputs after a call, and where torch's random numbers stand."""
    random_state = hash(torch.get_rng_state().numpy().tobytes())
    return [[arg.detach().clone() for arg in args if isinstance(arg, Tensor)], random_state]


def gradients(model: nn.Module, result: Any) -> Seen:
    model.zero_grad(set_to_none=True)
    reached = [tensor.abs() if tensor.is_complex() else tensor for tensor in tensors_in(result) if tensor.requires_grad]
    if not reached or not torch.is_grad_enabled():
        return []
    try:
        sum(tensor.sum() for tensor in reached).backward()
    except RuntimeError as error:
        return [type(error)]
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]


def observe(model: nn.Module, *args: Any, **kwargs: Any) -> Seen:
    """What a call gives: a result, gradients and buffers, or an exception; and the inputs and random state after it."""
    try:
        result = model(*args, **kwargs)
    except Exception as error:
        return [type(error), str(error)[:100], *after(args)]
    found = gradients(model, result)
    return [result, found, [buffer.clone() for buffer in model.buffers()], *after(args)]


def observe_input_gradient(model: nn.Module, x: Tensor) -> Seen:
    x = x.clone().requires_grad_()
    return [observe(model, x), x.grad]


def observe_changes(model: nn.Module, *changes: Callable[[Any], Any], x: Tensor | None = None) -> Seen:
    """Two calls of the model as it is, and two more after each change."""
    x = rows() if x is None else x
    seen = [observe(model, x), observe(model, x)]
    for change in changes:
        change(model)
        seen += [observe(model, x), observe(model, x)]
    return seen


def rows(*sizes: int, seed: int = 7) -> Tensor:
    return torch.randn(sizes or (3, 4), generator=torch.Generator().manual_seed(seed))


def images(*sizes: int) -> Tensor:
    return rows(*(sizes or (2, 3, 8, 8)))


def namespace(source: str) -> dict[str, Any]:
    """The globals of a module of this source, which cases may change without reaching another's."""
    names = {"Chain": Chain, "torch": torch, "__name__": "hostile"}
    exec(textwrap.dedent(source), names)
    return names


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another attribute of a module or class that is not the case's own, until the block ends."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


class Chain(nn.Module):
    """Two linear layers around a ReLU, which become one operator. Cases add in `prepare` what their forward reads."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(4, 4)
        self.fc2 = nn.Linear(4, 4)
        self.prepare()

    def prepare(self):
        pass

    def chain(self, x):
        return self.fc2(F.relu(self.fc1(x)))

    def forward(self, x):
        return self.chain(x)


class Convolution(nn.Module):
    """A convolution, ReLU and pooling, which become one operator."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.prepare()

    def prepare(self):
        pass

    def forward(self, x):
        return self.pool(self.relu(self.conv(x)))


class NormedConvolution(Convolution):
    def forward(self, x):
        return self.pool(self.relu(self.bn(self.conv(x))))


class Untraced(nn.Module):
    """Calls a function that no trace enters, for the forward has a `try`."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        try:
            return self.function(x)
        except ValueError:
            return None


# What a module that is not traced returns may be None, or have a part that is. So may what a packed sequence holds.


@case
def untraced_result_is_none_then_tensor(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.has_head = False
            self.head = nn.Linear(4, 4)
            self.untraced = Untraced(lambda x: self.head(x) if self.has_head else None)

        def forward(self, x):
            h = self.chain(x)
            result = self.untraced(h)
            if result is None:
                return h
            return result

    def change(model):
        model.has_head = True

    return observe_changes(fuse(Model()), change)


@case
def part_of_untraced_result_is_none_then_tensor(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.has_head = False
            self.head = nn.Linear(4, 4)
            self.untraced = Untraced(lambda x: (x, self.head(x) if self.has_head else None))

        def forward(self, x):
            h, extra = self.untraced(self.chain(x))
            return h if extra is None else h + extra

    def change(model):
        model.has_head = True

    return observe_changes(fuse(Model()), change)


@case
def packed_sequence_without_indices(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.rnn = nn.GRU(4, 4, batch_first=True)

        def forward(self, x, lengths):
            packed = pack_padded_sequence(x, lengths, batch_first=True)
            output, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
            if packed.unsorted_indices is not None:
                output = output.index_select(0, packed.unsorted_indices)
            return self.chain(output)

    return [observe(fuse(Model()), rows(3, 5, 4), torch.tensor([5, 3, 2]))]


# A tuple that holds a tensor is replaced by one that holds another.


@case
def tuple_of_tensors_replaced(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.scales = (torch.ones(4), 2.0)

        def forward(self, x):
            return self.chain(x) * self.scales[0] * self.scales[1]

    def change(model):
        model.scales = (torch.full((4,), 3.0), 2.0)

    return observe_changes(fuse(Model()), change)


@case
def global_tuple_of_tensors_replaced(fuse: Fuse) -> Seen:
    names = namespace("""
        SCALES = (torch.ones(4),)

        class Model(Chain):
            def forward(self, x):
                return self.chain(x) * SCALES[0]
    """)

    def change(_):
        names["SCALES"] = (torch.full((4,), 3.0),)

    return observe_changes(fuse(names["Model"]()), change)


@case
def tuple_of_tensors_in_list_replaced(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.scales = [(torch.ones(4),)]

        def forward(self, x):
            return self.chain(x) * self.scales[0][0]

    def change(model):
        model.scales[0] = (torch.full((4,), 3.0),)

    return observe_changes(fuse(Model()), change)


# A forward reads and writes attributes of functions and methods: their own, their defaults, cells and globals.


@case
def function_attribute_read(fuse: Fuse) -> Seen:
    def helper(x):
        return x

    helper.gain = 3.0

    class Model(Chain):
        def forward(self, x):
            return helper(self.chain(x)) * getattr(helper, "gain", 1.0)

    def change(_):
        helper.gain = 5.0

    return observe_changes(fuse(Model()), change)


@case
def function_attribute_asked_for(fuse: Fuse) -> Seen:
    def helper(x):
        return x

    helper.gain = 3.0

    class Model(Chain):
        def forward(self, x):
            return helper(self.chain(x)) * (2.0 if hasattr(helper, "gain") else 1.0)

    return observe_changes(fuse(Model()))


@case
def function_attribute_written(fuse: Fuse) -> Seen:
    def helper(x):
        return x

    class Model(Chain):
        def forward(self, x):
            helper.last = 7
            return helper(self.chain(x))

    return [observe_changes(fuse(Model())), getattr(helper, "last", None)]


@case
def method_attribute_read(fuse: Fuse) -> Seen:
    class Model(Chain):
        def method(self, x):
            return x

        method.gain = 3.0

        def forward(self, x):
            return self.method(self.chain(x)) * getattr(self.method, "gain", 1.0)

    def change(_):
        Model.method.gain = 5.0

    return observe_changes(fuse(Model()), change)


@case
def method_attribute_written(fuse: Fuse) -> Seen:
    class Model(Chain):
        def method(self, x):
            return x

        def forward(self, x):
            self.method.__func__.calls = getattr(self.method.__func__, "calls", 0) + 1
            return self.chain(x) * self.method.calls

    return observe_changes(fuse(Model()))


@case
def function_name_read(fuse: Fuse) -> Seen:
    def relu(x):
        return F.relu(x)

    class Model(Chain):
        def prepare(self):
            self.act = relu

        def forward(self, x):
            return self.act(self.chain(x)) * (2.0 if self.act.__name__ == "relu" else 1.0)

    def change(_):
        relu.__name__ = "other"

    return observe_changes(fuse(Model()), change)


@case
def function_docstring_read(fuse: Fuse) -> Seen:
    def relu(x):
        """First."""
        return F.relu(x)

    class Model(Chain):
        def prepare(self):
            self.act = relu

        def forward(self, x):
            return self.act(self.chain(x)) * (2.0 if self.act.__doc__ == "First." else 1.0)

    def change(_):
        relu.__doc__ = "Second."

    return observe_changes(fuse(Model()), change)


@case
def function_module_read(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.act = lambda x: x

        def forward(self, x):
            return self.chain(x) * (2.0 if self.act.__module__ == "elsewhere" else 3.0)

    def change(model):
        model.act.__module__ = "elsewhere"

    return observe_changes(fuse(Model()), change)


@case
def function_defaults_written(fuse: Fuse) -> Seen:
    def helper(x, gain=2.0):
        return x * gain

    class Model(Chain):
        def forward(self, x):
            h = helper(self.chain(x))
            helper.__defaults__ = (5.0,)
            return h

    return observe_changes(fuse(Model()))


@case
def function_cell_written(fuse: Fuse) -> Seen:
    gain = 2.0

    def helper(x):
        return x * gain

    class Model(Chain):
        def forward(self, x):
            h = helper(self.chain(x))
            helper.__closure__[0].cell_contents = 5.0
            return h

    return [observe_changes(fuse(Model())), gain]


@case
def function_globals_read(fuse: Fuse) -> Seen:
    names = namespace("""
        SCALE = 2.0

        def helper(x):
            return x

        class Model(Chain):
            def forward(self, x):
                return self.chain(x) * helper.__globals__.get("SCALE", 1.0)
    """)

    def change(_):
        names["SCALE"] = 3.0

    return observe_changes(fuse(names["Model"]()), change)


@case
def function_globals_asked_for(fuse: Fuse) -> Seen:
    names = namespace("""
        SCALE = 2.0

        def helper(x):
            return x

        class Model(Chain):
            def forward(self, x):
                return self.chain(x) * (2.0 if "SCALE" in helper.__globals__ else 3.0)
    """)
    return observe_changes(fuse(names["Model"]()))


@case
def function_globals_written(fuse: Fuse) -> Seen:
    names = namespace("""
        SCALE = 2.0

        def helper(x):
            return x

        class Model(Chain):
            def forward(self, x):
                helper.__globals__["SCALE"] = 9.0
                return self.chain(x)
    """)
    return [observe_changes(fuse(names["Model"]())), names["SCALE"]]


# A partial is an object like others: what it holds changes, it has attributes, and it is equal to itself alone.


class WithPartial(Chain):
    def prepare(self):
        self.act = functools.partial(F.leaky_relu, negative_slope=0.1)

    def forward(self, x):
        return self.act(self.chain(x))


@case
def partial_keywords_changed(fuse: Fuse) -> Seen:
    def change(model):
        model.act.keywords["negative_slope"] = 0.5

    return observe_changes(fuse(WithPartial()), change)


@case
def partial_made_another(fuse: Fuse) -> Seen:
    def change(model):
        model.act.__setstate__((F.relu, (), {}, {}))

    return observe_changes(fuse(WithPartial()), change)


@case
def partial_attribute_written(fuse: Fuse) -> Seen:
    class Model(WithPartial):
        def forward(self, x):
            self.act.last = 3
            return self.act(self.chain(x))

    model = fuse(Model())
    return [observe_changes(model), getattr(model.act, "last", None)]


@case
def partial_attribute_read(fuse: Fuse) -> Seen:
    class Model(WithPartial):
        def forward(self, x):
            return self.act(self.chain(x)) * getattr(self.act, "gain", 1.0)

    def change(model):
        model.act.gain = 4.0

    model = Model()
    model.act.gain = 2.0
    return observe_changes(fuse(model), change)


@case
def partial_compared(fuse: Fuse) -> Seen:
    class Model(WithPartial):
        def prepare(self):
            super().prepare()
            self.same = self.act
            self.acts = [self.act]

        def forward(self, x):
            h = self.chain(x) * (2.0 if self.act == self.same else 3.0)
            return h * (5.0 if self.act in self.acts else 7.0)

    return observe_changes(fuse(Model()))


# Whether two objects are one is asked by functions of the operator module, and of conditional expressions.


@case
def inputs_are_one_object(fuse: Fuse) -> Seen:
    class Model(Chain):
        def forward(self, a, b):
            return self.chain(a) * (2.0 if operator.is_(a, b) else 3.0)

    model = fuse(Model())
    a = rows()
    b = rows(seed=8)
    return [observe(model, a, b), observe(model, a, a), observe(model, a, b)]


@case
def buffers_become_one_object(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.register_buffer("one", torch.ones(4))
            self.register_buffer("other", torch.ones(4))

        def forward(self, x):
            return self.chain(x) * (2.0 if operator.is_(self.one, self.other) else 3.0)

    def change(model):
        model.other = model.one

    return observe_changes(fuse(Model()), change)


@case
def equal_numbers_become_one_object(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.one = float("1000.5")
            self.other = float("1000.5")

        def forward(self, x):
            return self.chain(x) * (2.0 if operator.is_(self.one, self.other) else 3.0)

    def change(model):
        model.other = model.one

    return observe_changes(fuse(Model()), change)


@case
def input_is_another_or_none(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.takes_two = True

        def forward(self, a, b):
            if a is (b if self.takes_two else None):
                return self.chain(a) * 2
            return self.chain(a)

    model = fuse(Model())
    a = rows()
    b = rows(seed=9)
    return [observe(model, a, b), observe(model, a, a)]


# A forward asks its input what it is and which attributes it has: the answers are those of a tensor.


@case
def input_has_attributes(fuse: Fuse) -> Seen:
    class Model(Chain):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            return self.chain(x) * (2.0 if hasattr(x, self.name) else 3.0)

    own = ["__array__", "__iter__", "__len__", "__float__", "__array_priority__", "__dict__", "__getitem__"]
    others = ["_fields", "batch_sizes", "node", "tracer", "__torch_function__"]
    return [observe(fuse(Model(name)), rows()) for name in own + others]


@case
def input_may_be_dict(fuse: Fuse) -> Seen:
    class Model(Chain):
        def forward(self, x):
            if hasattr(x, "keys"):
                x = x["a"]
            return self.chain(x)

    return observe_changes(fuse(Model()))


@case
def input_may_be_packed(fuse: Fuse) -> Seen:
    class Model(Chain):
        def forward(self, x):
            if hasattr(x, "batch_sizes"):
                return self.chain(x.data) * 2
            return self.chain(x)

    return observe_changes(fuse(Model()))


@case
def class_of_input_compared(fuse: Fuse) -> Seen:
    class Model(Chain):
        def forward(self, x):
            return self.chain(x) * (2.0 if x.__class__ == Tensor else 3.0)

    return observe_changes(fuse(Model()))


@case
def class_of_input_named(fuse: Fuse) -> Seen:
    class Model(Chain):
        def forward(self, x):
            return self.chain(x) * (2.0 if x.__class__.__name__ == "Tensor" else 3.0)

    return observe_changes(fuse(Model()))


@case
def module_of_input_named(fuse: Fuse) -> Seen:
    class Model(Chain):
        def forward(self, x):
            return self.chain(x) * (2.0 if x.__module__.startswith("torch") else 3.0)

    return observe_changes(fuse(Model()))


@case
def dict_of_input_counted(fuse: Fuse) -> Seen:
    class Model(Chain):
        def forward(self, x):
            return self.chain(x) * (2.0 + len(x.__dict__))

    return observe_changes(fuse(Model()))


# Methods of a layer or of its class, which its forward calls or which call its forward, are replaced.


@case
def forward_of_layer_class_replaced(fuse: Fuse) -> Seen:
    class Layer(nn.Linear):
        pass

    class Model(Chain):
        def prepare(self):
            self.fc2 = Layer(4, 4)

    def change(_):
        Layer.forward = lambda self, x: F.linear(x, self.weight) * 5

    return observe_changes(fuse(Model()), change)


@case
def call_of_layer_class_replaced(fuse: Fuse) -> Seen:
    class Layer(nn.Linear):
        pass

    class Model(Chain):
        def prepare(self):
            self.fc2 = Layer(4, 4)

    def change(_):
        Layer.__call__ = lambda self, x: nn.Module.__call__(self, x) * 3

    return observe_changes(fuse(Model()), change)


@case
def conv_forward_of_class_replaced(fuse: Fuse) -> Seen:
    class Layer(nn.Conv2d):
        pass

    class Model(Convolution):
        def prepare(self):
            self.conv = Layer(3, 4, 3)

    def change(_):
        Layer._conv_forward = lambda self, x, weight, bias: F.conv2d(x, weight * 2, bias)

    return observe_changes(fuse(Model()), change, x=images())


def doubled_conv_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight * 2, bias)


@case
def conv_forward_of_layer_replaced(fuse: Fuse) -> Seen:
    def change(model):
        model.conv._conv_forward = doubled_conv_forward

    return observe_changes(fuse(Convolution()), change, x=images())


@case
def conv_forward_of_layer_is_another_method(fuse: Fuse) -> Seen:
    class Model(Convolution):
        def prepare(self):
            def forward(self, x, weight, bias):
                return F.conv2d(x, weight * 2, bias)

            self.conv._conv_forward = types.MethodType(forward, self.conv)

    return observe_changes(fuse(Model()), x=images())


@case
def conv_forward_of_layer_is_partial(fuse: Fuse) -> Seen:
    class Model(Convolution):
        def prepare(self):
            self.conv._conv_forward = functools.partial(doubled_conv_forward)

    return observe_changes(fuse(Model()), x=images())


@case
def check_of_layer_replaced(fuse: Fuse) -> Seen:
    def refuse(x):
        raise KeyError("refused")

    def change(model):
        model.bn._check_input_dim = refuse

    return observe_changes(fuse(NormedConvolution()).eval(), change, x=images())


# A layer's settings and tensors come from properties, from its class, or lie in its dict before its parameters.


@case
def padding_is_property(fuse: Fuse) -> Seen:
    class Layer(nn.Conv2d):
        @property
        def padding(self):
            return self.__dict__["pads"]

        @padding.setter
        def padding(self, value):
            self.__dict__["pads"] = value

    class Model(Convolution):
        def prepare(self):
            self.conv = Layer(3, 4, 3, padding=1)

    def change(model):
        model.conv.__dict__["pads"] = (0, 0)

    return observe_changes(fuse(Model()), change, x=images())


@case
def training_is_property(fuse: Fuse) -> Seen:
    class Norm(nn.BatchNorm2d):
        frozen = True

        @property
        def training(self):
            return not self.frozen

        @training.setter
        def training(self, value):
            pass

    class Model(NormedConvolution):
        def prepare(self):
            self.bn = Norm(4)

    def change(_):
        Norm.frozen = False

    return observe_changes(fuse(Model()), change, x=images())


@case
def eps_is_of_class(fuse: Fuse) -> Seen:
    class Norm(nn.BatchNorm2d):
        pass

    class Model(NormedConvolution):
        def prepare(self):
            self.bn = Norm(4)
            del self.bn.eps
            Norm.eps = 1e-5
            self.eval()

    def change(_):
        Norm.eps = 1.0

    return observe_changes(fuse(Model()), change, x=images())


@case
def slope_is_of_class(fuse: Fuse) -> Seen:
    class Activation(nn.LeakyReLU):
        pass

    class Model(Chain):
        def prepare(self):
            self.act = Activation()
            del self.act.negative_slope
            Activation.negative_slope = 0.01

        def forward(self, x):
            return self.fc2(self.act(self.fc1(x)))

    def change(_):
        Activation.negative_slope = 0.5

    return observe_changes(fuse(Model()), change)


@case
def bias_is_of_class(fuse: Fuse) -> Seen:
    class Layer(nn.Linear):
        pass

    class Model(Chain):
        def prepare(self):
            self.fc2 = Layer(4, 4)
            del self.fc2.bias
            Layer.bias = torch.full((4,), 2.0)

    def change(_):
        Layer.bias = torch.full((4,), 7.0)

    def remove(_):
        Layer.bias = None

    return observe_changes(fuse(Model()), change, remove)


class ScaledLayer(nn.Linear):
    """Its weight is computed of two parameters wherever it is read."""

    def __init__(self):
        super().__init__(4, 4)
        self._parameters["stored"] = self._parameters.pop("weight")
        self._parameters["scale"] = nn.Parameter(torch.ones(1))

    @property
    def weight(self):
        if "scale" not in self._parameters:
            raise AttributeError("weight")
        return self._parameters["stored"] * self._parameters["scale"]


@case
def weight_is_property_of_what_forward_changes(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.fc2 = ScaledLayer()

        def forward(self, x):
            self.fc2.scale.data.mul_(2)
            return self.chain(x)

    return observe_changes(fuse(Model()))


@case
def weight_is_property_of_random_numbers(fuse: Fuse) -> Seen:
    class Layer(ScaledLayer):
        reads = 0

        @property
        def weight(self):
            if "scale" not in self._parameters:
                raise AttributeError("weight")
            Layer.reads += 1
            return self._parameters["stored"] + torch.randn(4, 4)

    class Model(Chain):
        def prepare(self):
            self.fc2 = Layer()

        def forward(self, x):
            return self.chain(x + torch.rand(3, 4))

    return [observe_changes(fuse(Model())), Layer.reads]


@case
def weight_is_property_before_parameter(fuse: Fuse) -> Seen:
    class Layer(nn.Linear):
        pass

    class Model(Chain):
        def prepare(self):
            self.fc2 = Layer(4, 4)
            Layer.weight = property(lambda self: self._parameters["weight"] * 3)

    return observe_changes(fuse(Model()))


@case
def weight_becomes_property(fuse: Fuse) -> Seen:
    class Layer(nn.Linear):
        pass

    class Model(Chain):
        def prepare(self):
            self.fc2 = Layer(4, 4)

    def change(_):
        Layer.weight = property(lambda self: self._parameters["weight"] * 3)

    return observe_changes(fuse(Model()), change)


@case
def weight_put_into_dict(fuse: Fuse) -> Seen:
    def change(model):
        model.fc2.__dict__["weight"] = torch.ones(4, 4)

    return observe_changes(fuse(Chain()), change)


# Computed weights are computed when their layer runs, once, and not where the call begins.


@case
def weight_norm_of_what_forward_changes(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            parametrizations.weight_norm(self.fc2)

        def forward(self, x):
            self.fc2.parametrizations.weight.original0.data.mul_(2)
            return self.chain(x)

    return observe_changes(fuse(Model()))


@case
def spectral_norm_when_an_earlier_layer_raises(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            parametrizations.spectral_norm(self.fc2)

    model = fuse(Model())
    return [observe(model, rows()), observe(model, rows(3, 5)), observe(model, rows())]


@case
def spectral_norm_read_before_its_layer(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            parametrizations.spectral_norm(self.fc2)
            self.fc3 = nn.Linear(4, 4)

        def forward(self, x):
            h = x * self.fc2.parametrizations.weight[0]._u.sum()
            return self.fc3(F.relu(self.fc2(h)))

    return observe_changes(fuse(Model()))


@case
def spectral_norm_of_weight_used_by_function(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            parametrizations.spectral_norm(self.fc1)

        def forward(self, x):
            return F.linear(F.relu(F.linear(x, self.fc1.weight)), self.fc2.weight)

    return observe_changes(fuse(Model()))


@case
def spectral_norm_read_before_and_after_its_layer(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            parametrizations.spectral_norm(self.fc1)

        def forward(self, x):
            before = self.fc1.parametrizations.weight[0]._u.clone()
            h = self.chain(x)
            return h + before.sum() + self.fc1.parametrizations.weight[0]._u.sum()

    return observe_changes(fuse(Model()))


@case
def hook_replaces_weight_that_is_read_after_the_call(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.normed = torch.nn.utils.weight_norm(nn.Linear(4, 4))

        def forward(self, x):
            h = self.normed(self.chain(x))
            return h + self.normed.weight.sum()

    model = fuse(Model())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step(_):
        optimizer.step()

    return observe_changes(model, step, step)


# What padding="same" comes to is a matter of the weight's sizes and not of the kernel size that a layer was made with.


class PaddedAlike(Convolution):
    def prepare(self):
        self.conv = nn.Conv2d(3, 4, 3, padding="same")


@case
def same_padding_of_another_kernel(fuse: Fuse) -> Seen:
    def change(model):
        model.conv.weight = nn.Parameter(torch.ones(4, 3, 5, 5))
        model.conv.kernel_size = (5, 5)

    return observe_changes(fuse(PaddedAlike()), change, x=images())


@case
def same_padding_of_another_weight(fuse: Fuse) -> Seen:
    def change(model):
        model.conv.weight = nn.Parameter(torch.ones(4, 3, 5, 5))

    return observe_changes(fuse(PaddedAlike()), change, x=images())


# Settings of layers are lists, which are changed in place.


@case
def stride_in_list_changed(fuse: Fuse) -> Seen:
    class Model(Convolution):
        def prepare(self):
            self.pool = nn.MaxPool2d([2, 2], stride=[2, 2])

    def change(model):
        model.pool.stride[0] = 1

    return observe_changes(fuse(Model()), change, x=images())


@case
def padding_in_list_changed(fuse: Fuse) -> Seen:
    class Model(Convolution):
        def prepare(self):
            self.conv.padding = [1, 1]

    def change(model):
        model.conv.padding[0] = 0

    return observe_changes(fuse(Model()), change, x=images())


# An object's whole dict is replaced, or a module's dict of modules.


@case
def dict_of_object_replaced(fuse: Fuse) -> Seen:
    class Settings:
        pass

    class Model(Chain):
        def prepare(self):
            self.settings = Settings()
            self.settings.gain = 2.0

        def forward(self, x):
            return self.chain(x) * self.settings.gain

    def change(model):
        model.settings.__dict__ = {"gain": 5.0}

    return observe_changes(fuse(Model()), change)


@case
def dict_of_model_replaced(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.gain = 2.0

        def forward(self, x):
            return self.chain(x) * self.gain

    def change(model):
        model.__dict__ = {**model.__dict__, "gain": 5.0}

    return observe_changes(fuse(Model()), change)


@case
def dict_of_child_replaced(fuse: Fuse) -> Seen:
    class Child(nn.Module):
        gain = 1.0

        def __init__(self):
            super().__init__()
            self.gain = 2.0

        def forward(self, x):
            return x * self.gain

    class Model(Chain):
        def prepare(self):
            self.child = Child()

        def forward(self, x):
            return self.child(self.chain(x))

    def change(model):
        model.child.__dict__ = {**model.child.__dict__, "gain": 5.0}

    return observe_changes(fuse(Model()), change)


@case
def dict_of_children_replaced(fuse: Fuse) -> Seen:
    def change(model):
        model._modules = {"fc1": nn.Identity(), "fc2": model.fc2}

    return observe_changes(fuse(Chain()), change)


@case
def dict_of_recurrent_layer_replaced(fuse: Fuse) -> Seen:
    def change(model):
        model.__dict__ = dict(model.__dict__)
        model.batch_first = True

    return observe_changes(fuse(nn.GRU(4, 4)), change, x=rows(3, 2, 4))


# Names that are found among the builtins change.


@case
def builtin_number_changed(fuse: Fuse) -> Seen:
    class Model(Chain):
        def forward(self, x):
            return self.chain(x) * HOSTILE_SCALE  # noqa: F821

    def change(_):
        builtins.HOSTILE_SCALE = 4.0

    with replaced(builtins, "HOSTILE_SCALE", 2.0):
        return observe_changes(fuse(Model()), change)


@case
def builtin_function_replaced(fuse: Fuse) -> Seen:
    class Model(Chain):
        def forward(self, x):
            return self.chain(x) * abs(-2.0)

    model = fuse(Model())
    seen = observe_changes(model)
    with replaced(builtins, "abs", lambda value: 7.0):
        return [*seen, observe(model, rows()), observe(model, rows())]


# What == and != and truth mean is a matter of classes, of either side of the comparison, and may change.


class Empty:
    pass


class Pair(Chain):
    """Compares what two classes make."""

    def __init__(self, one, other):
        super().__init__()
        self.one = one()
        self.other = other()

    def forward(self, x):
        return self.chain(x) * (2.0 if self.one == self.other else 3.0)


@case
def equality_added(fuse: Fuse) -> Seen:
    class Thing:
        pass

    def change(_):
        Thing.__eq__ = lambda self, other: True

    return observe_changes(fuse(Pair(Thing, Thing)), change)


@case
def equality_of_right_side(fuse: Fuse) -> Seen:
    class Anything:
        def __eq__(self, other):
            return True

    return observe_changes(fuse(Pair(Empty, Anything)))


@case
def equality_of_subclass_comes_first(fuse: Fuse) -> Seen:
    class Nothing:
        def __eq__(self, other):
            return False

    class Anything(Nothing):
        def __eq__(self, other):
            return True

    return observe_changes(fuse(Pair(Nothing, Anything)))


@case
def inequality_without_equality(fuse: Fuse) -> Seen:
    class Thing:
        def __ne__(self, other):
            return False

    class Model(Pair):
        def forward(self, x):
            return self.chain(x) * (2.0 if self.one != self.other else 3.0)

    return observe_changes(fuse(Model(Thing, Thing)))


@case
def truth_added(fuse: Fuse) -> Seen:
    class Thing:
        pass

    class Model(Pair):
        def forward(self, x):
            return self.chain(x) * (2.0 if self.one else 3.0)

    def change(_):
        Thing.__bool__ = lambda self: False

    return observe_changes(fuse(Model(Thing, Thing)), change)


@case
def call_added(fuse: Fuse) -> Seen:
    class Thing:
        pass

    class Model(Pair):
        def forward(self, x):
            return self.chain(x) * (2.0 if callable(self.one) else 3.0)

    def change(_):
        Thing.__call__ = lambda self: 1

    return observe_changes(fuse(Model(Thing, Thing)), change)


@case
def order_of_local_set(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

        def forward(self, x):
            for layer in set(self.layers):
                x = layer(x)
            return self.chain(x)

    model = Model()
    stock = model(rows())
    return [same(fuse(model)(rows()), stock)]


# What isinstance answers is a matter of metaclasses, of registers and of what an object has by then.


@case
def instance_by_metaclass(fuse: Fuse) -> Seen:
    answers = [True]

    class Meta(type):
        def __instancecheck__(cls, thing):
            return answers[0]

    class Kind(metaclass=Meta):
        pass

    class Model(Chain):
        def forward(self, x):
            return self.chain(x) * (2.0 if isinstance(3, Kind) else 3.0)

    def change(_):
        answers[0] = False

    return observe_changes(fuse(Model()), change)


@case
def instance_by_register(fuse: Fuse) -> Seen:
    class Kind(abc.ABC):  # noqa: B024
        pass

    class Thing:
        pass

    class Model(Chain):
        def prepare(self):
            self.thing = Thing()

        def forward(self, x):
            return self.chain(x) * (2.0 if isinstance(self.thing, Kind) else 3.0)

    def change(_):
        Kind.register(Thing)

    return observe_changes(fuse(Model()), change)


@case
def instance_by_protocol(fuse: Fuse) -> Seen:
    @typing.runtime_checkable
    class Kind(typing.Protocol):
        def fit(self): ...

    class Thing:
        pass

    class Model(Chain):
        def prepare(self):
            self.thing = Thing()

        def forward(self, x):
            return self.chain(x) * (2.0 if isinstance(self.thing, Kind) else 3.0)

    def change(model):
        model.thing.fit = lambda: 1

    return observe_changes(fuse(Model()), change)


# How an attribute is found changes: by methods, descriptors, bases and metaclasses that come later.


class Reading(Chain):
    """Reads an attribute of an object, or takes 1 where there is none."""

    def __init__(self, thing):
        super().__init__()
        self.thing = thing

    def forward(self, x):
        return self.chain(x) * getattr(self.thing, "gain", 1.0)


@case
def getattribute_added(fuse: Fuse) -> Seen:
    class Thing:
        gain = 1.0

    def change(_):
        Thing.__getattribute__ = lambda self, name: 9.0

    thing = Thing()
    thing.gain = 2.0
    return observe_changes(fuse(Reading(thing)), change)


@case
def getattr_added(fuse: Fuse) -> Seen:
    class Thing:
        pass

    def change(_):
        Thing.__getattr__ = lambda self, name: 9.0

    return observe_changes(fuse(Reading(Thing())), change)


@case
def bases_changed(fuse: Fuse) -> Seen:
    class First:
        gain = 2.0

    class Second:
        gain = 5.0

    class Thing(First):
        pass

    def change(_):
        Thing.__bases__ = (Second,)

    return observe_changes(fuse(Reading(Thing())), change)


@case
def property_added_to_metaclass(fuse: Fuse) -> Seen:
    class Meta(type):
        pass

    class Thing(metaclass=Meta):
        gain = 2.0

    def change(_):
        Meta.gain = property(lambda cls: 7.0)

    return observe_changes(fuse(Reading(Thing)), change)


@case
def descriptor_gets_set(fuse: Fuse) -> Seen:
    class Descriptor:
        def __get__(self, instance, owner=None):
            return 3.0

    class Model(Chain):
        gain = Descriptor()

        def prepare(self):
            self.__dict__["gain"] = 8.0

        def forward(self, x):
            return self.chain(x) * self.gain

    def change(_):
        Descriptor.__set__ = lambda *args: None

    return observe_changes(fuse(Model()), change)


@case
def object_becomes_descriptor(fuse: Fuse) -> Seen:
    class Thing:
        gain = 3.0

    class Other:
        gain = 9.0

    class Model(Chain):
        thing = Thing()

        def forward(self, x):
            return self.chain(x) * self.thing.gain

    def change(_):
        Thing.__get__ = lambda *args: Other

    return observe_changes(fuse(Model()), change)


@case
def descriptor_with_delete_alone(fuse: Fuse) -> Seen:
    class Descriptor:
        def __get__(self, instance, owner=None):
            return 3.0

        def __delete__(self, instance):
            pass

    class Model(Chain):
        gain = Descriptor()

        def prepare(self):
            self.__dict__["gain"] = 8.0

        def forward(self, x):
            return self.chain(x) * self.gain

    return observe_changes(fuse(Model()))


@case
def class_renamed(fuse: Fuse) -> Seen:
    class Model(Chain):
        def forward(self, x):
            return self.chain(x) * (2.0 if type(self).__name__ == "Model" else 3.0)

    def change(_):
        Model.__name__ = "Other"

    return observe_changes(fuse(Model()), change)


# Subclasses of property and staticmethod give what their own __get__ gives.


@case
def property_of_class(fuse: Fuse) -> Seen:
    class ClassProperty(property):
        def __get__(self, instance, owner=None):
            return self.fget(owner)

    class Model(Chain):
        gain = 2.0

        def prepare(self):
            self.gain = 5.0

        @ClassProperty
        def doubled(cls):  # noqa: N805
            return cls.gain * 2

        def forward(self, x):
            return self.chain(x) * self.doubled

    def change(_):
        Model.gain = 3.0

    return observe_changes(fuse(Model()), change)


@case
def property_that_keeps_its_value(fuse: Fuse) -> Seen:
    class CachedProperty(property):
        def __get__(self, instance, owner=None):
            if not hasattr(instance, "kept"):
                instance.__dict__["kept"] = self.fget(instance)
            return instance.kept

    class Model(Chain):
        def prepare(self):
            self.gain = 5.0

        @CachedProperty
        def doubled(self):
            return self.gain * 2

        def forward(self, x):
            return self.chain(x) * self.doubled

    def change(model):
        model.gain = 3.0

    return observe_changes(fuse(Model()), change)


@case
def staticmethod_that_gives_another(fuse: Fuse) -> Seen:
    class Another(staticmethod):
        def __get__(self, instance, owner=None):
            return lambda x: x * 7

    class Model(Chain):
        @Another
        def scaled(x):  # noqa: N805
            return x

        def forward(self, x):
            return self.scaled(self.chain(x))

    return observe_changes(fuse(Model()))


# Values that are equal are not the same: zeros and ones of other types, orders of sets, what lies in them.


@case
def record_changed_in_place(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.record = np.zeros(1, dtype=[("gain", float)])[0]
            self.record["gain"] = 2

        def forward(self, x):
            return self.chain(x) * float(self.record["gain"])

    def change(model):
        model.record["gain"] = 3

    return observe_changes(fuse(Model()), change)


class WithSet(Chain):
    """Its result is one of the order in which a set gives its numbers."""

    def prepare(self):
        self.numbers = frozenset([0, 8])

    def forward(self, x):
        h = self.chain(x)
        for number in self.numbers:
            h = h * 2 + number
        return h


@case
def frozenset_of_another_zero(fuse: Fuse) -> Seen:
    class Model(WithSet):
        def prepare(self):
            self.numbers = frozenset({0.0})

        def forward(self, x):
            (number,) = self.numbers
            return 1.0 / (self.chain(x) * 0.0 + number)

    def change(model):
        model.numbers = frozenset({-0.0})

    return observe_changes(fuse(Model()), change)


@case
def frozenset_of_another_type(fuse: Fuse) -> Seen:
    class Model(WithSet):
        def prepare(self):
            self.numbers = frozenset({1})

        def forward(self, x):
            (number,) = self.numbers
            return self.chain(x), torch.tensor(number)

    def to_float(model):
        model.numbers = frozenset({1.0})

    def to_bool(model):
        model.numbers = frozenset({True})

    return observe_changes(fuse(Model()), to_float, to_bool)


@case
def frozenset_in_another_order(fuse: Fuse) -> Seen:
    def change(model):
        model.numbers = frozenset([8, 0])

    return observe_changes(fuse(WithSet()), change)


@case
def set_filled_in_another_order(fuse: Fuse) -> Seen:
    def change(model):
        model.numbers.clear()
        model.numbers.add(8)
        model.numbers.add(0)

    model = WithSet()
    model.numbers = {0, 8}
    return observe_changes(fuse(model), change)


@case
def range_with_another_stop(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.range = range(0, 4, 2)

        def forward(self, x):
            return self.chain(x) * self.range.stop

    def change(model):
        model.range = range(0, 3, 2)

    return observe_changes(fuse(Model()), change)


class WithSlice(Chain):
    def __init__(self, part):
        super().__init__()
        self.part = part


@case
def slice_of_list_that_changes(fuse: Fuse) -> Seen:
    class Model(WithSlice):
        def forward(self, x):
            return self.chain(x) * self.part.start[0]

    def change(model):
        model.part.start[0] = 3.0

    return observe_changes(fuse(Model(slice([1.0], None))), change)


@case
def slice_of_equal_numbers(fuse: Fuse) -> Seen:
    class Model(WithSlice):
        def forward(self, x):
            return self.chain(x), torch.tensor(self.part.start), 1 / torch.tensor(self.part.stop)

    def change(model):
        model.part = slice(True, -0.0)

    return observe_changes(fuse(Model(slice(1, 0.0))), change)


@case
def slice_of_tensors(fuse: Fuse) -> Seen:
    class Model(WithSlice):
        def forward(self, x):
            return self.chain(x) * self.part.stop

    def change(model):
        model.part = slice(torch.tensor([1, 2]), 3)

    return observe_changes(fuse(Model(slice(torch.tensor([1, 2]), 3))), change)


# Lists, dicts and sets that a forward reads are of their own classes, and show so.


@case
def class_of_list_compared(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.sizes = [1]

        def forward(self, x):
            return self.chain(x) * (2.0 if self.sizes.__class__ == list else 3.0)  # noqa: E721

    return observe_changes(fuse(Model()))


@case
def class_of_dict_named(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.sizes = {"a": 1}

        def forward(self, x):
            return self.chain(x) * len(self.sizes.__class__.__name__)

    return observe_changes(fuse(Model()))


@case
def set_shown(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.sizes = {1}

        def forward(self, x):
            return self.chain(x) * len(f"{self.sizes}")

    return observe_changes(fuse(Model()))


# A match statement takes the case that fits the object's class.


@case
def match_of_named_tuple(fuse: Fuse) -> Seen:
    sizes = collections.namedtuple("Sizes", "height width")

    class Model(Chain):
        def prepare(self):
            self.sizes = sizes(2.0, 3.0)

        def forward(self, x):
            match self.sizes:
                case [height, width]:
                    return self.chain(x) * height * width
                case _:
                    return self.chain(x)

    return observe_changes(fuse(Model()))


@case
def match_of_mapping(fuse: Fuse) -> Seen:
    class Settings(collections.abc.Mapping):
        def __init__(self):
            self.values = {"gain": 2.0}

        def __getitem__(self, name):
            return self.values[name]

        def __iter__(self):
            return iter(self.values)

        def __len__(self):
            return len(self.values)

    class Model(Chain):
        def prepare(self):
            self.settings = Settings()

        def forward(self, x):
            match self.settings:
                case {}:
                    return self.chain(x) * 4
                case _:
                    return self.chain(x)

    return observe_changes(fuse(Model()))


@case
def match_of_deque(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.sizes = collections.deque([1.0])

        def forward(self, x):
            match self.sizes:
                case [*sizes]:
                    return self.chain(x) * len(sizes) * 4
                case _:
                    return self.chain(x)

    return observe_changes(fuse(Model()))


# Names of children, parameters and arguments are keywords, hold quotes, or are names that generated code uses.


class ThroughChildren(Chain):
    """Calls a norm of each of these names before the chain."""

    def __init__(self, *names):
        super().__init__()
        self.names = names
        for name in names:
            self.add_module(name, nn.LayerNorm(4))

    def forward(self, x):
        for name in self.names:
            x = getattr(self, name)(x)
        return self.chain(x)


@case
def children_named_by_keywords(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.heads = nn.ModuleDict({"class": nn.LayerNorm(4), "in": nn.LayerNorm(4)})

        def forward(self, x):
            return self.heads["in"](self.heads["class"](self.chain(x)))

    return observe_changes(fuse(Model()))


@case
def parameter_named_by_keyword(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.register_parameter("lambda", nn.Parameter(torch.ones(4)))

        def forward(self, x):
            return self.chain(x) * getattr(self, "lambda")

    return observe_changes(fuse(Model()))


@case
def children_with_strange_names(fuse: Fuse) -> Seen:
    names = ['a"b', "a\\", "a b", "é", "__x", "None"]
    return [observe(fuse(ThroughChildren(name)), rows()) for name in names]


@case
def children_named_self_and_output(fuse: Fuse) -> Seen:
    return observe_changes(fuse(ThroughChildren("self", "output")))


@case
def attention_named_self(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.self = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            return self.chain(self.self(x, x, x)[0])

    return observe_changes(fuse(Model()), x=rows(2, 3, 4))


@case
def argument_named_torch(fuse: Fuse) -> Seen:
    double = torch.float64

    class Model(Chain):
        def forward(self, torch):
            return F.softmax(self.chain(torch).to(double), -1)

    return observe_changes(fuse(Model()))


@case
def argument_named_self(fuse: Fuse) -> Seen:
    class Model(ThroughChildren):
        def forward(this, self):  # noqa: N805
            return this.norm(this.chain(self))

    return observe_changes(fuse(Model("norm")))


@case
def argument_named_device(fuse: Fuse) -> Seen:
    cpu = torch.device("cpu")

    class Model(Chain):
        def forward(self, x, device):
            return self.chain(x) + device + torch.zeros(4, device=cpu)

    return [observe(fuse(Model()), rows(), rows(seed=8))]


@case
def arguments_named_as_in_generated_code(fuse: Fuse) -> Seen:
    source = """
        class Model(Chain):
            def prepare(self):
                self.norm = torch.nn.LayerNorm(4)

            def forward(self, ARGUMENT):
                h = torch.clamp(self.norm(self.chain(ARGUMENT)), -float("inf"), 1.0)
                return h[..., 1:3].data + ARGUMENT.shape[0]
    """
    names = ["inf", "nan", "getattr", "NoneType", "fx_pytree", "pytree", "fastnn", "fastnn_ops_mlp_mlp_of_parameters"]
    names += ["mlp_of_parameters", "tensor", "tensor_3", "slice", "math", "operator", "operator_add", "linear", "input"]
    names += ["fc1", "relu"]
    models = [namespace(source.replace("ARGUMENT", name))["Model"] for name in names]
    return [observe(fuse(model()), rows()) for model in models]


# Constants of every kind are handed to torch, returned, and keys of what is returned.


@case
def factor_of_complex_infinity(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.factor = complex(math.inf, math.nan)

        def forward(self, x):
            return self.chain(x) * self.factor

    return observe_changes(fuse(Model()))


class Color(enum.Enum):
    RED = 1


class Mode(enum.Flag):
    ONE = 1
    TWO = 2


@case
def constants_returned(fuse: Fuse) -> Seen:
    class Model(Chain):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x):
            return self.chain(x), self.value

    values = [math.nan, math.inf, -0.0, 10**40, True, None, ..., "a\nb'\"", b"x", complex(math.inf, 0)]
    values += [range(3), slice(1, 2), (1, (2,)), frozenset({1}), Color.RED, Mode.ONE | Mode.TWO]
    values += [torch.float32, torch.device("cpu"), torch.strided, torch.channels_last]
    values += [np.float32(2), np.int64(3), np.bool_(True), np.str_("x"), np.longdouble(2)]
    return [observe(fuse(Model(value)), rows()) for value in values]


@case
def constants_are_keys(fuse: Fuse) -> Seen:
    class Model(Chain):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x):
            return {self.value: self.chain(x)}

    values = ["a", 1, 1.5, None, True, ..., b"x", math.inf, math.nan, complex(1, 2), (1, "a"), frozenset({1})]
    values += [torch.float32, torch.device("cpu"), torch.strided, torch.channels_last, np.int64(3), torch.Size([2])]
    seen = []
    for value in values:
        result, *_ = observe(fuse(Model(value)), rows())
        (key,) = result
        seen.append([type(key), repr(key)])
    return seen


# Settings of layers are tuples and lists of numbers that only a call knows.


@case
def pool_of_size_in_tuple(fuse: Fuse) -> Seen:
    class Model(Convolution):
        def forward(self, x):
            return F.max_pool2d(F.relu(self.conv(x)), (x.size(2) // 4, 2))

    model = fuse(Model())
    return [observe(model, images()), observe(model, images(2, 3, 12, 8))]


@case
def stride_of_size_in_list(fuse: Fuse) -> Seen:
    class Model(Convolution):
        def forward(self, x):
            return F.relu(F.conv2d(x, self.conv.weight, stride=[x.size(0), 1]))

    model = fuse(Model())
    return [observe(model, images()), observe(model, images(1, 3, 12, 8))]


@case
def pool_over_length_of_text(fuse: Fuse) -> Seen:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 5, (3, 4))
            self.fc = nn.Linear(5, 2)

        def forward(self, x):
            h = F.max_pool2d(F.relu(self.conv(x)), (x.size(2) - 2, 1))
            return self.fc(h.flatten(1))

    model = fuse(Model())
    return [observe(model, rows(2, 1, 7, 4)), observe(model, rows(2, 1, 9, 4))]


@case
def pool_of_whole_image_in_list(fuse: Fuse) -> Seen:
    class Model(Convolution):
        def forward(self, x):
            shape = x.shape
            return F.max_pool2d(F.relu(self.conv(x)), kernel_size=[shape[2], shape[3]])

    model = fuse(Model())
    return [observe(model, images()), observe(model, images(2, 3, 6, 6))]


# Functions that do not look so write to weights and buffers, between the layers of what becomes one operator.


@case
def embedding_renormalizes_tied_weight(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.embedding = nn.Embedding(6, 4, max_norm=0.5)
            self.fc2 = nn.Linear(4, 6)
            self.fc2.weight = self.embedding.weight

        def forward(self, x, indices):
            h = F.relu(self.fc1(x))
            embedded = self.embedding(indices)
            return self.fc2(h) + embedded.sum()

    with torch.no_grad():
        return [observe(fuse(Model()), rows(), torch.arange(6))]


@case
def embedding_function_renormalizes_weight(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.fc2 = nn.Linear(4, 6)

        def forward(self, x, indices):
            h = F.relu(self.fc1(x))
            embedded = F.embedding(indices, self.fc2.weight, max_norm=0.5)
            return self.fc2(h) + embedded.sum()

    with torch.no_grad():
        return [observe(fuse(Model()), rows(), torch.arange(6))]


@case
def embedding_bag_renormalizes_tied_weight(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.bag = nn.EmbeddingBag(4, 4, max_norm=0.3)
            self.fc2.weight = self.bag.weight

        def forward(self, x, indices):
            h = F.relu(self.fc1(x))
            embedded = self.bag(indices)
            return self.fc2(h) + embedded.sum()

    with torch.no_grad():
        return [observe(fuse(Model()), rows(), torch.arange(4).view(2, 2))]


@case
def batch_norm_writes_statistics_of_another(fuse: Fuse) -> Seen:
    class Model(NormedConvolution):
        def forward(self, x):
            h = self.conv(x)
            wide = x[:, :1].expand(-1, 4, -1, -1)
            torch.native_batch_norm(wide, None, None, self.bn.running_mean, self.bn.running_var, True, 0.5, 1e-5)
            return self.pool(self.relu(self.bn(h)))

    return observe_changes(fuse(Model()).eval(), x=images())


@case
def weight_sorted_by_numpy(fuse: Fuse) -> Seen:
    class Model(Chain):
        def forward(self, x):
            h = F.relu(self.fc1(x))
            self.fc2.weight.detach().numpy().sort()
            return self.fc2(h)

    return observe_changes(fuse(Model()))


# Shifts and other operators write in place, as statements and as functions of the operator module.


@case
def shift_in_place(fuse: Fuse) -> Seen:
    class Model(Chain):
        def forward(self, x, numbers):
            other = numbers
            other <<= 1
            numbers >>= 0
            return self.chain(x), numbers

    return [observe(fuse(Model()), rows(), torch.tensor([1, 2]))]


@case
def operator_functions_in_place(fuse: Fuse) -> Seen:
    class Model(Chain):
        def forward(self, x, numbers):
            operator.ilshift(numbers, 1)
            operator.iadd(numbers, 1)
            operator.ixor(numbers, 3)
            return self.chain(x), numbers

    return [observe(fuse(Model()), rows(), torch.tensor([1, 2]))]


# What is written in place after a layer may be what a fused operator keeps for backward, where stock keeps none of it.


@case
def input_of_frozen_layers_written(fuse: Fuse) -> Seen:
    class Model(Chain):
        def forward(self, x):
            x = x * 1
            h = self.chain(x)
            x.add_(1)
            return h + x

    return observe_input_gradient(fuse(Model().requires_grad_(False)), rows())


@case
def residual_of_frozen_layers_written(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.requires_grad_(False)
            self.embedding = nn.Linear(4, 4)

        def forward(self, x):
            x = self.embedding(x)
            h = self.chain(x)
            x += h
            return x

    return observe_input_gradient(fuse(Model()), rows())


@case
def input_of_relu_and_pool_written(fuse: Fuse) -> Seen:
    class Model(Convolution):
        def forward(self, x):
            x = x * 1.0
            h = self.pool(self.relu(x))
            x.mul_(2)
            return h + self.pool(x)

    return observe_input_gradient(fuse(Model()), images())


@case
def result_of_convolution_written_after_pool(fuse: Fuse) -> Seen:
    class Model(Convolution):
        def forward(self, x):
            x = self.conv(x)
            pooled = self.pool(self.relu(x))
            x += 1
            return pooled.sum() + x

    return observe_input_gradient(fuse(Model()), images())


# A part that nobody uses is read all the same, and raises where there is none.


@case
def unused_row_beyond_the_end(fuse: Fuse) -> Seen:
    class Model(Chain):
        def forward(self, x):
            x[10]
            return self.chain(x)

    return [observe(fuse(Model()), rows())]


@case
def unused_key_that_is_missing(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.untraced = Untraced(lambda x: {"a": x})

        def forward(self, x):
            parts = self.untraced(self.chain(x))
            parts["b"]
            return parts["a"]

    return [observe(fuse(Model()), rows())]


# Subclasses of recurrent layers return something else than a pair.


@case
def recurrent_subclass_returns_three(fuse: Fuse) -> Seen:
    class Layer(nn.LSTM):
        def forward(self, x):
            try:
                return x, x, x
            except ValueError:
                return None

    class Model(Chain):
        def prepare(self):
            self.rnn = Layer(4, 4)

        def forward(self, x):
            output, _ = self.rnn(self.chain(x))
            return output

    return [observe(fuse(Model()), rows())]


@case
def recurrent_subclass_returns_iterator(fuse: Fuse) -> Seen:
    class Layer(nn.GRU):
        def forward(self, x):
            try:
                return iter([x, x])
            except ValueError:
                return None

    class Model(Chain):
        def prepare(self):
            self.rnn = Layer(4, 4)

        def forward(self, x):
            output, _ = self.rnn(self.chain(x))
            return output

    return [observe(fuse(Model()), rows())]


# Recurrent layers with a head are called with one sequence that is no batch, and with packed ones.


class LastStep(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(4, 5, batch_first=True)
        self.fc = nn.Linear(5, 2)

    def forward(self, x):
        return self.fc(self.rnn(x)[0][:, -1])


@case
def head_of_lstm_on_unbatched_input(fuse: Fuse) -> Seen:
    model = fuse(LastStep(nn.LSTM))
    seen = [observe(model, rows(3, 5, 4)), observe(model, rows(5, 4)), observe(model, rows(3, 4))]
    with torch.no_grad():
        return [*seen, observe(model.eval(), rows(5, 4))]


@case
def head_of_gru_on_unbatched_input(fuse: Fuse) -> Seen:
    class Model(LastStep):
        def forward(self, x):
            return self.fc(self.rnn(x)[0][:, -1, :])

    model = fuse(Model(nn.GRU))
    return [observe(model, rows(3, 5, 4)), observe(model, rows(5, 4))]


@case
def head_of_gru_on_packed_input(fuse: Fuse) -> Seen:
    class Model(LastStep):
        def forward(self, x, lengths):
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            _, hidden = self.rnn(packed)
            return self.fc(hidden[-1])

    model = fuse(Model(nn.GRU))
    lengths = torch.tensor([2, 5, 3])
    seen = [observe(model, rows(3, 5, 4), lengths)]
    with torch.no_grad():
        return [*seen, observe(model.eval(), rows(3, 5, 4), lengths)]


# A parameter is read before a module that is not traced replaces it, and used after.


@case
def parameter_replaced_between_read_and_use(fuse: Fuse) -> Seen:
    class Replacing(nn.Module):
        def __init__(self, models):
            super().__init__()
            self.models = models

        def forward(self, x):
            try:
                model = self.models[0]
                model.weight = nn.Parameter(model.weight.detach() * 2)
                return x
            except ValueError:
                return None

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.other = nn.Parameter(torch.randn(4, 4))
            self.untraced = Replacing([self])

        def forward(self, x):
            linear, relu, weight, other = F.linear, F.relu, self.weight, self.other
            h = self.untraced(x)
            return linear(relu(linear(h, weight)), other)

    return observe_changes(fuse(Model()))


# A ReLU becomes one that works in place.


@case
def relu_becomes_inplace(fuse: Fuse) -> Seen:
    class Model(Convolution):
        def forward(self, x):
            return self.pool(self.relu(x))

    def change(model):
        model.relu.inplace = True

    return observe_changes(fuse(Model()), change, x=images())


# Layers get hooks, activations and parts that run code of the user's, which changes what the forward reads after them.


class Counting(Chain):
    """Multiplies what a layer gives by a number that code within the layer may raise."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.gain = 1.0

    def forward(self, x):
        return self.layer(self.chain(x)) * self.gain


@case
def hook_added_beside_that_of_weight_norm(fuse: Fuse) -> Seen:
    def change(model):
        def raise_gain(*_):
            model.gain += 1

        model.layer.register_forward_pre_hook(raise_gain)

    model = fuse(Counting(torch.nn.utils.weight_norm(nn.Linear(4, 4))))
    return observe_changes(model, change)


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)


@case
def activation_of_transformer_replaced(fuse: Fuse) -> Seen:
    def change(model):
        def activation(x):
            model.gain += 1
            return F.relu(x)

        model.layer.activation = activation

    return observe_changes(fuse(Counting(encoder_layer())), change, x=rows(2, 3, 4))


@case
def norm_of_transformer_replaced(fuse: Fuse) -> Seen:
    class Norm(nn.Module):
        def __init__(self, models):
            super().__init__()
            self.models = models

        def forward(self, x):
            self.models[0].gain += 1
            return x

    def change(model):
        model.layer.norm1 = Norm([model])

    return observe_changes(fuse(Counting(encoder_layer())), change, x=rows(2, 3, 4))


# The forward of one fused model becomes an attribute of another, or its forward; then fusing is undone.


@case
def forward_of_child_becomes_attribute(fuse: Fuse) -> Seen:
    class Model(Chain):
        def prepare(self):
            self.child = Chain()

        def forward(self, x):
            h = self.chain(x)
            extra = getattr(self, "extra", None)
            return h if extra is None else extra(h)

    def change(model):
        model.extra = model.child.forward

    return observe_changes(fuse(Model()), change)


@case
def unfuse_of_wrapper_that_borrows(fuse: Fuse) -> Seen:
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model
            self.forward = model.forward

    return observe_changes(Wrapper(fuse(Chain())), fastnn.unfuse)


@case
def unfuse_of_models_that_share_a_forward(fuse: Fuse) -> Seen:
    first = fuse(Chain())
    second = fuse(Chain())
    second.forward = first.forward
    seen = [observe(first, rows()), observe(second, rows())]
    fastnn.unfuse(nn.ModuleList([first, second]))
    return [*seen, observe(first, rows()), observe(second, rows())]


# A forward is decorated by what tells positional arguments from keywords.


@case
def decorator_asks_for_keywords(fuse: Fuse) -> Seen:
    def decorate(forward):
        @functools.wraps(forward)
        def decorated(self, *args, **kwargs):
            return forward(self, *args, **kwargs) * (2.0 if kwargs else 3.0)

        return decorated

    class Model(Chain):
        @decorate
        def forward(self, x):
            return self.chain(x)

    model = fuse(Model())
    return [observe(model, rows()), observe(model, x=rows()), observe(model, rows())]


@case
def decorator_counts_arguments(fuse: Fuse) -> Seen:
    def decorate(forward):
        @functools.wraps(forward)
        def decorated(*args, **kwargs):
            return forward(*args, **kwargs) * len(args)

        return decorated

    class Model(Chain):
        @decorate
        def forward(self, x, y):
            return self.chain(x) + y

    model = fuse(Model())
    return [observe(model, rows(), rows()), observe(model, rows(), y=rows()), observe(model, x=rows(), y=rows())]


# Weights are tensors of a class of the user's, and modes stand around the call, which change what torch's functions do.


@case
def weight_is_of_tensor_subclass(fuse: Fuse) -> Seen:
    class Doubled(Tensor):
        @classmethod
        def __torch_function__(cls, function, kinds, args=(), kwargs=None):
            result = super().__torch_function__(function, kinds, args, kwargs or {})
            return result * 2 if function is F.linear else result

    model = fuse(Chain())
    model.fc2.weight = nn.Parameter(model.fc2.weight.detach().as_subclass(Doubled))
    result = model(rows())
    return [type(result).__name__, result.detach().as_subclass(Tensor)]


@case
def mode_around_the_call(fuse: Fuse) -> Seen:
    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, kinds, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            return result * 2 if function is F.relu else result

    model = fuse(Chain())
    seen = [observe(model, rows())]
    with Mode():
        result = model(rows())
    return [*seen, result]


# A wrapper takes over what a fused forward has in its dict, and is copied.


@case
def copy_of_model_with_wrapped_forward(fuse: Fuse) -> Seen:
    model = fuse(Chain())
    seen = [observe(model, rows())]
    forward = model.forward
    doubled = functools.partial(lambda module, *args: forward(*args) * 2, model)
    model.forward = functools.update_wrapper(doubled, forward)
    seen.append(observe(model, rows()))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.fc1.weight.mul_(3)
    return [*seen, observe(model, rows()), type(other)]


# A view into rows raises for an empty batch and for other strides.


@case
def view_of_empty_and_strided_batches(fuse: Fuse) -> Seen:
    class Model(Convolution):
        def prepare(self):
            self.fc = nn.Linear(64, 2)

        def forward(self, x):
            h = self.pool(self.relu(self.conv(x)))
            return self.fc(h.view(h.size(0), -1))

    model = fuse(Model())
    inputs = [images(), images(0, 3, 8, 8), images().to(memory_format=torch.channels_last)]
    seen = [observe(model, x) for x in inputs]
    model.eval()
    with torch.no_grad():
        return seen + [observe(model, x) for x in inputs]


# One list is returned twice.


@case
def one_list_returned_twice(fuse: Fuse) -> Seen:
    class Model(Chain):
        def forward(self, x):
            results = [self.chain(x)]
            return results, results

    first, second = fuse(Model())(rows())
    return [first is second]


# The forward of a class is a static method, a class method, a builtin or an object that can be called.


@case
def forward_is_static_method(fuse: Fuse) -> Seen:
    class Model(Chain):
        @staticmethod
        def forward(x):
            return x * 2

    return observe_changes(fuse(Model()))


@case
def forward_is_class_method(fuse: Fuse) -> Seen:
    class Model(Chain):
        gain = 3

        @classmethod
        def forward(cls, x):
            return x * cls.gain

    return observe_changes(fuse(Model()))


@case
def forward_is_builtin(fuse: Fuse) -> Seen:
    class Model(Chain):
        forward = torch.relu

    return observe_changes(fuse(Model()))


@case
def forward_is_callable_object(fuse: Fuse) -> Seen:
    class Tripling:
        def __call__(self, x):
            return x * 3

    class Model(Chain):
        forward = Tripling()

    return observe_changes(fuse(Model()))


@case
def forward_of_child_is_static_method(fuse: Fuse) -> Seen:
    class Child(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        @staticmethod
        def forward(x):
            return x * 2

    class Model(Chain):
        def prepare(self):
            self.child = Child()

        def forward(self, x):
            return self.child(self.chain(x))

    return observe_changes(fuse(Model()))


_MAYBE_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "plus": lambda x: +x,
    "cpu": lambda x: x.cpu(),
    "swapdims": lambda x: x.swapdims(0, 1),
    "reshape_as": lambda x: x.reshape_as(x),
    "type_as": lambda x: x.type_as(x),
    "einsum": lambda x: torch.einsum("ij->ji", x),
    "moveaxis": lambda x: x.moveaxis(0, 1),
    "tensor_split": lambda x: x.tensor_split(1)[0],
    "broadcast_to": lambda x: x.broadcast_to(4, 4),
}


class _WritesToItsInputLater(nn.Module):
    """The frozen layers' input is changed in place under another name, or by an `out`, after they have run."""

    def __init__(self, view: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(4, 4).requires_grad_(False) for _ in range(2))
        self.view = view

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = x if self.view is None else self.view(x)
        h = self.second(self.first(x).relu())
        if self.view is None:
            torch.add(h.detach(), 1, out=x.detach())
        else:
            y.add_(1)
        return h + x


@case
def input_written_under_another_name(fuse: Fuse) -> Seen:
    seen: Seen = []
    for view in (*_MAYBE_VIEWS.values(), None):
        model = fuse(_WritesToItsInputLater(view))
        x = torch.randn(4, 4, requires_grad=True)
        output = model(x)
        output.sum().backward()
        seen += [output.detach(), x.grad]
    return seen


def _raised(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except (RuntimeError, ValueError) as error:
        return type(error).__name__, str(error)


@case
def batch_norm_of_other_channels(fuse: Fuse) -> Seen:
    seen: Seen = []
    for training in (True, False):
        for channels in (3, 5, 1):
            for affine in (True, False):
                model = fuse(nn.Sequential(nn.BatchNorm2d(4, affine=affine), nn.ReLU(), nn.MaxPool2d(2)))
                model.train(training)
                x = torch.randn(2, channels, 6, 6)
                seen.append(_raised(lambda model=model, x=x: model(x)))
                seen += [buffer.clone() for buffer in model.buffers()]
    return seen


@case
def batch_norm_that_does_not_fit_its_convolution(fuse: Fuse) -> Seen:
    seen: Seen = []
    for channels in (1, 3):
        model = fuse(nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))).eval()
        for shape in ((2, 3, 30, 30), (2, 3, 8, 8), (3, 30, 30), (2, 8, 8)):
            seen.append(_raised(lambda model=model, shape=shape: model(torch.ones(shape))))
    return seen


@case
def recurrent_layers_on_tensors_of_too_few_dimensions(fuse: Fuse) -> Seen:
    layers = [fuse(kind(4, 5)) for kind in (nn.RNN, nn.GRU, nn.LSTM)]
    shapes: tuple[tuple[int, ...], ...] = ((), (4,), (2, 3, 4, 4))
    return [_raised(lambda l=l, s=s: l(torch.ones(s))) for l in layers for s in shapes]  # noqa: E741


@case
def tensors_of_other_layouts(fuse: Fuse) -> Seen:
    model = fuse(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    pooled = fuse(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)))
    parts = [torch.randn(2, 4), torch.randn(3, 4)]
    seen: Seen = []
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            ragged = torch.nested.nested_tensor(parts, layout=torch.jagged)
            seen += [part.detach() for part in model(ragged).unbind()]
    images = torch.randn(1, 2, 4, 4, dtype=torch.float32)
    with torch.no_grad():
        seen.append(pooled(images.to_mkldnn()).to_dense())
    return seen


@case
def batch_norm_whose_weight_is_a_column(fuse: Fuse) -> Seen:
    seen: Seen = []
    for layers in ((nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))):
        model = fuse(nn.Sequential(*layers, nn.ReLU(), nn.MaxPool2d(2)))
        norm = next(layer for layer in layers if isinstance(layer, nn.BatchNorm2d))
        norm.weight = nn.Parameter(torch.randn(4, 1))
        for training in (True, False):
            model.train(training)
            seen.append(_raised(lambda model=model: model(torch.ones(2, 3, 6, 6))))
    return seen
