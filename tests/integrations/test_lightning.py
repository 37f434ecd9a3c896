"""Lightning: a callback that fuses, and steps by fastnn.training_step with Lightning's count of steps kept right."""

from pathlib import Path
from typing import Any

import pytest
import torch
from beside_stock import MODELS, Batches, Train, check_training, make, recipe
from torch import Tensor, nn

pytest.importorskip("lightning", reason="lightning is not installed")

pytestmark = [
    # Lightning's own call of something in PyTorch; its advice on machines of many cores.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning"),
]
QUIET: dict[str, Any] = {
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def training(kind: str, fused: bool, **options: Any) -> Train:
    page = recipe("Lightning", fused)

    def train(model: nn.Module, batches: Batches) -> list[Tensor]:
        trainer, losses = page.train(model, batches, getattr(page, kind), **QUIET | options)
        assert trainer.global_step == len(batches)
        return losses

    return train


@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize("kind", ["Ordinary", "InOneCall"])
@pytest.mark.parametrize("name", MODELS)
def test_the_recipes(name: str, kind: str, max_norm: float | None) -> None:
    ours = training(kind, fused=True, gradient_clip_val=max_norm)
    check_training(name, ours, training("Ordinary", fused=False, gradient_clip_val=max_norm))


def test_one_call_refuses_what_it_would_not_do() -> None:
    with pytest.raises(ValueError, match="updates at each batch"):
        training("InOneCall", fused=True, accumulate_grad_batches=2)(*make("cnn"))


@pytest.mark.parametrize("kind", ["Ordinary", "InOneCall"])
def test_steps_are_counted(kind: str, tmp_path: Path) -> None:
    """A training ends at `max_steps`, and one that goes on from a checkpoint gives what one without a break gives."""
    page, models = recipe("Lightning"), [make("autoencoder") for _ in range(3)]
    trainer, few = page.train(*models[0], getattr(page, kind), **QUIET | {"max_steps": 4})
    assert trainer.global_step == len(few) == 4
    _, expected = page.train(*models[1], getattr(page, kind), **QUIET | {"max_epochs": 2})
    (broken, batches), (fresh, _) = models[2], make("autoencoder")
    trainer, first = page.train(broken, batches, getattr(page, kind), **QUIET)
    trainer.save_checkpoint(tmp_path / "epoch.ckpt")
    trainer, rest = page.train(
        fresh, batches, getattr(page, kind), tmp_path / "epoch.ckpt", **QUIET | {"max_epochs": 2}
    )
    assert trainer.global_step == 2 * len(batches)
    torch.testing.assert_close(torch.stack([*first, *rest]), torch.stack(expected), rtol=0, atol=0)


def test_the_benchmark_program() -> None:
    from benchmarks.lightning_loop import LOOPS

    for train in LOOPS.values():
        model, batches = make("autoencoder")
        times = train(model, batches)
        assert len(times) == len(batches)
        assert times == sorted(times)
