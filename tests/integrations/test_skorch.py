"""skorch: a net that fuses its module, alone and in a grid search in joblib's processes."""

from typing import Any

import pytest
import torch
from beside_stock import recipe
from torch import Tensor

import fastnn
from fastnn.reference import models as stock_models
from fastnn.testing import assert_close_to_reference

pytest.importorskip("skorch", reason="skorch is not installed")
from sklearn.model_selection import GridSearchCV


class Seeded(stock_models.Autoencoder):
    """The same initial weights in every process, in a dtype of its own."""

    def __init__(self, dtype: torch.dtype, **sizes: int) -> None:
        torch.manual_seed(0)
        super().__init__(**sizes)
        self.to(dtype)


def is_fused(net: Any, *_: Any) -> float:
    return float(fastnn.explain(net.module_).is_fused)


def search(fused: bool, dtype: torch.dtype) -> list[Tensor]:
    """The scores of every fold and setting, and the parameters of the best net."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(48, 3, generator=generator) @ torch.randn(3, 10, generator=generator)
    x = rows.to(dtype).numpy()
    net = recipe("skorch", fused).make_net(
        Seeded, module__dtype=dtype, module__input_size=10, module__encoding_size=5, max_epochs=3, batch_size=8
    )
    settings = {"module__reduced_size": [6, 8], "lr": [0.05, 0.1]}
    scores = {"score": "neg_mean_squared_error", "fused": is_fused}
    found = GridSearchCV(net, settings, cv=3, n_jobs=2, scoring=scores, refit="score", error_score="raise").fit(x, x)
    assert (found.cv_results_["mean_test_fused"] == float(fused)).all()
    assert is_fused(found.best_estimator_) == float(fused)
    of_folds = [torch.tensor(found.cv_results_[f"split{i}_test_score"]) for i in range(3)]
    return [torch.stack(of_folds).to(dtype), *found.best_estimator_.module_.state_dict().values()]


def test_grid_search_in_processes() -> None:
    double = search(False, torch.float64)
    assert_close_to_reference(search(True, torch.float32), search(False, torch.float32), double)
    assert_close_to_reference(search(True, torch.float64), double, double)
