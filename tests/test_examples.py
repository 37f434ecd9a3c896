"""What the examples assert fails where it ought to, and a rival that is not installed is left out. (``make examples``
runs the examples themselves.)"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

for needed in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(needed)


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The examples' folder, from which they import one another."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    yield importlib.import_module
    for name in ("common", "search"):
        sys.modules.pop(name, None)


def _rows(common: Any) -> list[Any]:
    return [common.Rows(torch.randn(50, 4), torch.randint(3, (50,)), 8)] * 40


def test_both_loops_of_the_examples_make_the_same_steps(examples: Any, capsys: pytest.CaptureFixture[str]) -> None:
    common = examples("common")
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    for epochs in (_rows(common), [[(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(40)]] * 6):
        stock, ours = common.train_both(model, nn.CrossEntropyLoss(), epochs, lr=1e-2)
        assert len(stock.losses) == len(ours.losses) == 240
        assert_close(torch.tensor(ours.losses), torch.tensor(stock.losses), rtol=1e-2, atol=1e-3)
        printed = capsys.readouterr().out
        assert "in double precision 200 losses are stock's" in printed
        assert "one operator call: linear; activation; dropout; linear" in printed
        assert "times as fast" in printed


def test_the_examples_refuse_another_curve(examples: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    common = examples("common")
    loop = common.our_loop
    monkeypatch.setattr(common, "our_loop", lambda model, loss, lr: loop(model, loss, 1.01 * lr))
    with pytest.raises(AssertionError, match="the losses differ by"):
        common.train_both(nn.Sequential(nn.Linear(4, 3)), nn.CrossEntropyLoss(), _rows(common), lr=1e-2)


def test_search_leaves_jax_out_where_it_is_missing(
    examples: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    search = examples("search")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jax" else find(name))
    assert search.by_vmap(search.settings_of(2), 1) is None
    assert "JAX's vmap is left out" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="a loss differs"):
        search.check_losses([(1.0, 0.5)], [(1.1, 0.5)], 1e-3)


def test_search_draws_the_orders_of_a_data_loader(examples: Any) -> None:
    search = examples("search")
    (settings,) = search.settings_of(1)
    _, _, generator = search.model_of(settings)
    loader = torch.utils.data.DataLoader(torch.arange(20), 7, shuffle=True, generator=generator)
    expected = torch.stack([torch.cat(list(loader)) for _ in range(3)])
    assert torch.equal(search.orders_of([settings], 3, 20)[0].long(), expected)
