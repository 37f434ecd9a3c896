"""What a type checker and an editor see of the package."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastnn.nn

ROOT = Path(fastnn.nn.__file__).parent.parent.parent
USE = """
from typing_extensions import assert_type
import fastnn
import fastnn.nn.functional as G
from fastnn.functional import mlp, relu
from fastnn.nn import functional as F

assert_type(nn.GRU(4, 5, num_layers=2, batch_first=True), fastnn.nn.GRU)
assert_type(nn.LSTM(4, 5, proj_size=2), fastnn.nn.LSTM)
assert_type(nn.RNN(4, 5, nonlinearity="relu"), fastnn.nn.RNN)
assert_type(nn.MLP([3, 4]), fastnn.nn.MLP)
assert_type(nn.Linear(3, 4), torch.nn.Linear)
x = torch.randn(2, 3)
assert_type(relu(F.softmax(G.relu(x), dim=1)), torch.Tensor)
assert_type(mlp(x, [], []), torch.Tensor)
assert_type(nn.functional.linear_relu(x, x), torch.Tensor)
nn.init.zeros_(nn.utils.rnn.pad_sequence([x]))
assert_type(fastnn.freeze(nn.MLP([3, 4]), x), fastnn.FrozenModel | fastnn.FrozenGraph)
assert_type(fastnn.fuse(nn.Linear(3, 4)), torch.nn.Module)
fastnn.models.RNN(3, 4, 1, 2, cell="GRU")
"""


def test_mypy_strict_takes_what_the_readme_shows(tmp_path: Path) -> None:
    """What mypy has read of torch is kept beside what it keeps for `make lint`: this takes most of the time."""
    pytest.importorskip("mypy")
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert snippets
    (tmp_path / "use.py").write_text("\n".join([*snippets, USE]))
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent"]
    command += [f"--cache-dir={ROOT / '.mypy_cache' / 'strict'}", str(tmp_path / "use.py")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_editors_show_the_arguments_of_recurrent_layers(name: str) -> None:
    """As stock's, by an overload: its __init__ itself takes what it is given."""
    ours, stock = (first_signature(getattr(module, name)) for module in (fastnn.nn, torch.nn))
    assert ours == stock
    assert ("num_layers", "1") in ours


def first_signature(kind: type) -> list[tuple[str, str]]:
    """The parameters of ``__init__`` with their default values."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    functions = [statement for statement in definition.body if isinstance(statement, ast.FunctionDef)]
    arguments = next(function for function in functions if function.name == "__init__").args
    defaults = [""] * (len(arguments.args) - len(arguments.defaults)) + [ast.unparse(d) for d in arguments.defaults]
    return list(zip([argument.arg for argument in arguments.args], defaults, strict=True))
