"""The private names of PyTorch in fastnn/_torch.py, in the torch at hand."""

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from torch import nn

from fastnn import _torch

# A name with an underscore, of torch or one of its modules. (torch._check is documented.)
_PRIVATE = re.compile(
    r"(?<![\w.])(?:torch|nn|F|optim)(?:\.[a-z]\w*)*\._(?!check\b)[A-Za-z]\w*|from torch[\w.]* import [^\n]*\b_\w+"
)

_PYTHONS = {"_getframe", "_make", "_replace"}
_DOCUMENTED = {"_check"}  # of torch

FILES = [path for path in (Path(__file__).parents[1] / "fastnn").rglob("*.py") if path.name != "_torch.py"]


@pytest.mark.parametrize("name", _torch.NAMES)
def test_each_name_is_there_and_taken(name: str) -> None:
    value = attrgetter(name)(torch)
    assert any(taken is value for taken in vars(_torch).values())


def test_the_names_that_are_imported_late_are_there() -> None:
    module = import_module("torch.fx.experimental.symbolic_shapes")
    assert module.statically_known_true is not bool
    assert _torch.statically_known_true(True)
    assert not _torch.statically_known_true(False)
    assert import_module("torch._dynamo.trace_rules").is_builtin_callable(len)


def test_attributes_of_objects_are_there() -> None:
    layer = nn.LSTM(2, 2)
    optimizer = torch.optim.SGD(layer.parameters())
    for value, names in (
        (layer, (*_torch.OF_MODULES, *_torch.OF_RECURRENT_LAYERS)),
        (nn.Conv1d(1, 1, 1), _torch.OF_CONVOLUTIONS),
        (torch.ops.aten.relu.default, _torch.OF_OPERATORS),
        (optimizer, _torch.OF_OPTIMIZERS),
        (layer.weight_ih_l0, _torch.OF_TENSORS),
        (_torch.forward_ad, _torch.OF_FORWARD_AD),
        (_torch.optimizer_module, _torch.OF_OPTIMIZER_MODULE),
    ):
        for name in names:
            assert hasattr(value, name), name


def test_what_they_tell() -> None:
    assert not _torch.autocast_is_on()
    assert not _torch.functions_are_watched()
    with torch.autocast("cpu"):
        assert _torch.autocast_is_on()
    with torch.device("cpu"):
        assert not _torch.functions_are_watched()
    images = torch.empty(2, 3, 4, 5)
    last = images.to(memory_format=torch.channels_last)
    for tensor in (images, last):
        assert _torch.suggest_memory_format(tensor) == _torch._suggest_memory_format(tensor)


def test_no_other_file_names_what_is_private() -> None:
    for path in FILES:
        found = _PRIVATE.findall(path.read_text())
        assert not found, f"{path}: {found}"


def _made_in(tree: ast.AST) -> Iterator[str]:
    """The names of functions, classes and attributes that a file makes."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def test_each_private_attribute_is_listed() -> None:
    trees = {path: ast.parse(path.read_text()) for path in FILES}
    lists = (getattr(_torch, name) for name in vars(_torch) if name.startswith("OF_"))
    known = {*_PYTHONS, *_DOCUMENTED, *_torch.TENSOR_HOOKS, *(name for names in lists for name in names)}
    known.update(name for tree in trees.values() for name in _made_in(tree))
    for path, tree in trees.items():
        read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        operators = {name for name in read if hasattr(torch.ops.aten, name)}  # ATen's, which are its schema
        found = {name for name in read - known - operators if re.match("_[^_]", name)}
        assert not found, f"{path}: {found}"
