"""An ``MLP`` runs what its children are at the time of a call, as the Sequential of the same children does."""

import copy
import pickle
import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import fastnn
from fastnn.nn import MLP, LinearReLU

FUSED = "fastnn::mlp"


class Calls(TorchDispatchMode):
    """Writes down the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def fused_calls(module: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), Calls() as calls:
        module(x)
    return calls.names.count(FUSED)


def results(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Output and gradients."""
    x = x.clone().requires_grad_()
    output = call(x)
    leaves = [p for p in (x, *module.parameters()) if p.requires_grad]
    return [output, *torch.autograd.grad(output.square().sum(), leaves)]


class LoRALinear(nn.Linear):
    """A Linear with a low-rank change beside it."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.down, self.up = nn.Parameter(torch.randn(2, sizes[0])), nn.Parameter(torch.randn(sizes[1], 2))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input @ self.down.T @ self.up.T


class CallsItself(nn.Linear):
    def __call__(self, input: Tensor) -> Tensor:
        return 2 * super().__call__(input)


def own_forward(module: MLP) -> None:
    stock = module[0].forward
    module[0].forward = lambda x: 3 * stock(x)


# What is done to MLP([8, 8, 8, 8]), and how many fused calls are left of its one.
EDITS: dict[str, tuple[Callable[[MLP], Any], int]] = {
    "nothing": (lambda m: None, 1),
    "another activation": (lambda m: m.__setitem__(1, nn.Tanh()), 1),
    "an activation's setting": (lambda m: m.__setitem__(1, nn.LeakyReLU(0.2)), 1),
    "tanh's approximation of gelu": (lambda m: m.__setitem__(1, nn.GELU(approximate="tanh")), 1),
    "in place": (lambda m: m.__setitem__(1, nn.ReLU(inplace=True)), 1),
    "no activation": (lambda m: m.__setitem__(1, nn.Identity()), 1),
    "no linear layer": (lambda m: m.__setitem__(2, nn.Identity()), 2),
    "two activations": (lambda m: m.insert(1, nn.Tanh()), 2),
    "append an activation": (lambda m: m.append(nn.Sigmoid()), 1),
    "append an unknown one": (lambda m: m.append(nn.Softmax(-1)), 1),
    "append a layer": (lambda m: m.append(nn.Linear(8, 3, bias=False)), 1),
    "append LinearReLU": (lambda m: m.append(LinearReLU(8, 3)), 1),
    "insert": (lambda m: m.insert(2, nn.LayerNorm(8)), 2),
    "insert at the front": (lambda m: m.insert(0, nn.ReLU()), 1),
    "delete": (lambda m: m.__delitem__(1), 1),
    "pop": (lambda m: m.pop(0), 1),
    "extend": (lambda m: m.extend([nn.Tanh(), nn.Linear(8, 2)]), 1),
    "a Sequential within": (lambda m: m.append(nn.Sequential(nn.Tanh(), nn.Linear(8, 2))), 1),
    "an MLP within": (lambda m: m.append(MLP([8, 4, 2])), 2),
    "dropout": (lambda m: m.insert(2, nn.Dropout(0)), 2),
    "LoRA": (lambda m: m.__setitem__(2, LoRALinear(8, 8)), 2),
    "a call of its own": (lambda m: m.__setitem__(0, CallsItself(8, 8)), 1),
    "a forward of its own": (own_forward, 1),
    "parametrized": (lambda m: nn.utils.parametrizations.weight_norm(m[0]), 1),
    "old spectral norm": (lambda m: nn.utils.spectral_norm(m[2]), 2),
    "pruned": (lambda m: nn.utils.prune.l1_unstructured(m[2], "weight", 0.5), 2),
    "no bias": (lambda m: m[0].register_parameter("bias", None), 1),
    "frozen weights": (lambda m: m[0].requires_grad_(False), 1),
    "same layer twice": (lambda m: m.__setitem__(2, m[0]), 1),
    "a hook": (lambda m: m[2].register_forward_hook(lambda module, args, output: 2 * output), 2),
    "a hook before": (lambda m: m[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,)), 2),
    "empty": (lambda m: m.__delitem__(slice(0, 5)), 0),
}


@pytest.mark.parametrize("rows", [(4,), (), (2, 3)])
@pytest.mark.parametrize("edit", EDITS)
def test_edits(edit: str, rows: tuple[int, ...]) -> None:
    module, x = MLP([8, 8, 8, 8]), torch.randn(*rows, 8)
    module(x)
    change, fused = EDITS[edit]
    change(module)
    module.eval()  # the old spectral norm learns at each call in training
    assert_close(
        results(module, module, x), results(module, lambda x: nn.Sequential.forward(module, x), x), rtol=1e-4, atol=1e-5
    )
    assert fused_calls(module, x) == fused


def test_settings_are_read_at_each_call() -> None:
    module, x = MLP([8, 8, 8], activation="gelu"), torch.randn(4, 8)
    for approximate in ("none", "tanh", "none"):
        module[1].approximate = approximate
        assert_close(module(x), nn.Sequential.forward(module, x))
    module[1] = nn.LeakyReLU()
    for slope in (0.01, 0.3):
        module[1].negative_slope = slope
        assert_close(module(x), nn.Sequential.forward(module, x))


def test_hooks_come_and_go() -> None:
    module, x = MLP([8, 8, 8]), torch.randn(4, 8, requires_grad=True)
    seen: list[Any] = []
    for child in module:
        handles = [
            child.register_forward_hook(lambda *_: seen.append("forward")),
            child.register_full_backward_hook(lambda *_: seen.append("backward")),
        ]
        module(x).sum().backward()
        for handle in handles:
            handle.remove()
    assert sorted(seen) == ["backward"] * 3 + ["forward"] * 3
    assert fused_calls(module, x) == 1
    handle = nn.modules.module.register_module_forward_hook(lambda child, *_: seen.append(child))
    try:
        module(x)
    finally:
        handle.remove()
    assert seen[6:] == [*module, module]


@pytest.mark.parametrize("part", [slice(2), slice(2, None), slice(0, 4, 2), slice(0, 0)], ids=str)
def test_slices(part: slice) -> None:
    module, x = MLP([8, 8, 8]), torch.randn(4, 8)
    sliced = module[part]
    assert type(sliced) is MLP
    assert list(sliced.state_dict()) == list(nn.Sequential(*module)[part].state_dict())
    assert_close(sliced(x), nn.Sequential(*module)[part](x))
    assert fused_calls(sliced, x) == (len(sliced) > 0)
    for twin in (copy.deepcopy(sliced), pickle.loads(pickle.dumps(sliced))):
        assert_close(twin(x), sliced(x))


def test_operators_of_sequential() -> None:
    module, x = MLP([8, 8, 8]), torch.randn(4, 8)
    assert module[-1] is list(module)[-1]
    assert_close((module + module)(x), module(module(x)))
    assert_close((module * 2)(x), module(module(x)))


@pytest.mark.filterwarnings("ignore")  # torch's, of its own code
@pytest.mark.skipif(not torch.backends.quantized.supported_engines, reason="torch was built without quantization")
@pytest.mark.skipif(
    platform.machine() == "x86_64" and torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="torch's own quantized layers need AVX2",
)
def test_quantize_dynamic() -> None:
    module, x = MLP([8, 8, 8]), torch.randn(4, 8)
    quantized = torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, torch.qint8)
    stock = torch.ao.quantization.quantize_dynamic(nn.Sequential(*module), {nn.Linear}, torch.qint8)
    assert_close(quantized(x), stock(x))


def test_scripted_child() -> None:
    module, x = MLP([8, 8, 8]), torch.randn(4, 8)
    expected = module(x)
    with pytest.warns((DeprecationWarning, FutureWarning)):
        module[0] = torch.jit.script(module[0])
    assert_close(module(x), expected)


@pytest.mark.parametrize("edit", ["nothing", "another activation", "LoRA", "insert", "a hook", "parametrized"])
def test_compiles_and_exports(edit: str) -> None:
    module, x = MLP([8, 8, 8, 8]), torch.randn(4, 8)
    EDITS[edit][0](module)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = results(module, lambda x: nn.Sequential.forward(module, x), x)
    assert_close(results(module, compiled, x), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        exported = torch.export.export(module.eval(), (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    assert_close(exported.module()(x[:3]), expected[0][:3], rtol=1e-4, atol=1e-5)
    targets = [node.target for node in exported.graph.nodes]
    assert targets.count(torch.ops.fastnn.mlp.default) == EDITS[edit][1]


@pytest.mark.parametrize("edit", ["another activation", "no activation", "append an activation"])
def test_freeze_sees_what_a_call_does(edit: str) -> None:
    module, x = MLP([8, 8, 8, 8]), torch.randn(4, 8)
    EDITS[edit][0](module)
    frozen = fastnn.freeze(module.eval(), x)
    assert_close(frozen(x), nn.Sequential.forward(module, x).detach())


def test_other_inputs_reach_the_children() -> None:
    module, x = MLP([8, 8, 8]), torch.randn(4, 8)
    traced = torch.fx.symbolic_trace(module)
    assert_close(traced(x), module(x))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]


@pytest.mark.parametrize("sizes", [784, None, nn.Linear(3, 4)], ids=str)
def test_sizes_that_are_no_list(sizes: Any) -> None:
    with pytest.raises(TypeError, match=r"sizes must be a list.* such as \[784, 512, 10\]"):
        MLP(sizes, 10)


@pytest.mark.parametrize(
    "activation", [nn.ReLU, nn.ReLU(), None, [nn.ReLU()], torch.relu], ids=lambda value: str(value).split(" at ")[0]
)
def test_activations_that_are_no_names(activation: Any) -> None:
    message = "activation must be a name, or a list of one a layer, of identity, relu"
    with pytest.raises(TypeError, match=message):
        MLP([3, 4], activation=activation)
    with pytest.raises(TypeError, match=message):
        fastnn.functional.mlp(torch.ones(1, 2), [torch.ones(2, 2)], [None], activation)
