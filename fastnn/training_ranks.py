"""The processes that train one model together: what they begin with, and the average of their gradients."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastnn._torch import HOOKS, OF_DISTRIBUTED_DATA_PARALLEL


class Ranks:
    """A process group whose processes each train a model on batches of their own, as DistributedDataParallel does."""

    def __init__(self, group: Any, shares_buffers: bool = True) -> None:
        if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
            words = "a process group of torch.distributed that this process belongs to"
            raise TypeError(f"training_step: expected {words}, got a {type(group).__name__}")
        self._group, self.shares_buffers = group, shares_buffers
        self.rank, self.size = group.rank(), group.size()
        self._device = torch.device("cpu")  # of messages that carry no tensor of the model

    @staticmethod
    def of(model: nn.Module, process_group: Any) -> tuple[nn.Module, Ranks | None]:
        """The model to train, and the processes that train it. Of a DistributedDataParallel it is the model inside."""
        if not isinstance(model, DistributedDataParallel):
            return model, None if process_group is None else Ranks(process_group)
        if process_group is not None and process_group is not model.process_group:
            raise ValueError("training_step: DistributedDataParallel has another process group than process_group")
        if _averages_in_its_own_way(model):
            return model, None
        inner: nn.Module = model.module
        before_each_forward = getattr(model, "forward_sync_buffers", getattr(model, "broadcast_buffers", True))
        return inner, Ranks(model.process_group, bool(before_each_forward))

    def __deepcopy__(self, _: Any) -> Ranks:
        return self

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, broadcast: bool) -> None:
        """Checks that the models of all processes have the same parameters by name and size, and copies the first
        process's parameters to all."""
        trained = trained_by(optimizer)
        tensors = list({id(t): t for t in (*model.parameters(), *model.buffers(), *trained)}.values())
        if any(hasattr(tensor, "full_tensor") for tensor in tensors):
            words = "the model's parameters are in parts (FSDP2), which averages gradients itself"
            raise ValueError(f"training_step: {words}: leave out process_group")
        if tensors:
            self._device = tensors[0].device
        kinds = [(tuple(t.shape), str(t.dtype)) for own in (tensors, trained) for t in own]
        self.check_same(repr(kinds), "training_step: the models or optimizers of the processes have other parameters")
        if broadcast:
            self.broadcast(tensors)

    def check_same(self, text: str, words: str) -> None:
        """Raises ValueError in all processes if their texts differ."""
        digest = zlib.crc32(text.encode())
        both = torch.tensor([digest, -digest], device=self._device)
        with _clear_errors():
            dist.all_reduce(both, dist.ReduceOp.MAX, group=self._group)
        if both.sum() != 0:
            raise ValueError(words)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copies the first process's tensors to all processes, in one message for each device."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel():
                by_device.setdefault(tensor.device, []).append(tensor.detach())
        for own in by_device.values():
            parts = [tensor.reshape(-1).view(torch.uint8) for tensor in own]
            message = torch.cat(parts)
            with _clear_errors():
                dist.broadcast(message, dist.get_global_rank(self._group, 0), group=self._group)
            if self.rank == 0:
                continue
            for tensor, part in zip(own, message.split(list(map(len, parts))), strict=True):
                tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))

    def sum(self, tensor: Tensor) -> None:
        with _clear_errors():
            dist.all_reduce(tensor, group=self._group)


@contextmanager
def _clear_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "training_step: another process has ended, or did not come to this step within the process group's timeout "
            "(do all processes make as many steps?)"
        ) from error


class FlatGradients:
    """The gradients of all parameters that an optimizer trains, in one flat tensor (for each dtype and device, of which
    there is usually one). Behind the gradients there is a number for each parameter, 1 where it has a gradient; one
    that is 1 where the step goes the ordinary way; and one that is 1 where the step has raised."""

    def __init__(self, optimizer: torch.optim.Optimizer, of_program: Sequence[Tensor] = ()) -> None:
        self._parameters = trained_by(optimizer)
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for p in self._parameters:
            kinds.setdefault((p.dtype, p.device), []).append(p)
        views: dict[int, Tensor] = {}  # by a parameter's id
        self._flat: list[tuple[Tensor, Tensor]] = []  # each flat tensor, and the part of it that is gradients
        for (dtype, device), own in kinds.items() or [((torch.float32, torch.device("cpu")), [])]:
            sizes = [p.numel() for p in own]
            notes = 0 if self._flat else len(self._parameters) + 2
            flat = torch.zeros(sum(sizes) + notes, dtype=dtype, device=device)
            gradients = flat[: sum(sizes)]
            for p, part in zip(own, gradients.split(sizes), strict=True):
                views[id(p)] = part.view(p.shape)
            self._flat.append((flat, gradients))
        flat, gradients = self._flat[0]
        self._notes = flat[len(gradients) :]
        self._views = [views[id(p)] for p in self._parameters]
        self.of_program = [views[id(p)] for p in of_program]  # where the operators write
        known = set(map(id, of_program))
        self._own_notes = self._notes.new_tensor([*(id(p) in known for p in self._parameters), 0, 0])
        self._others = [view for p, view in zip(self._parameters, self._views, strict=True) if id(p) not in known]

    def note_program(self) -> None:
        """Notes that the network's gradients have been written."""
        self._notes.copy_(self._own_notes)
        for view in self._others:
            view.zero_()

    def take(self) -> None:
        """Copies the gradients from where autograd has left them."""
        for p, view in zip(self._parameters, self._views, strict=True):
            if p.grad is not None:
                if p.grad.layout != torch.strided:
                    raise TypeError("training_step: sparse gradients cannot be averaged in a process group")
                view.copy_(p.grad)
        self._notes.copy_(self._notes.new_tensor([*(p.grad is not None for p in self._parameters), 1, 0]))

    def average(self, ranks: Ranks, failed: bool = False) -> bool:
        """Averages over all processes -> whether the operators wrote the gradients in all of them, so that they may
        make the update, too. RuntimeError in all processes if one has raised; a process reports that by `failed`."""
        self._notes[-1] = failed
        for flat, gradients in self._flat:
            gradients.div_(ranks.size)
            ranks.sum(flat)
        *counts, ordinary, errors = self._notes.tolist()
        if errors:
            raise RuntimeError("training_step: another process raised an error in this step, and none made an update")
        self._has_gradient = [count != 0 for count in counts]
        return not ordinary and all(count in (0, ranks.size) for count in counts)

    def give(self) -> None:
        """Puts the average into ``p.grad``, where the optimizer takes it from; None where no process had a gradient."""
        for p, view, has_gradient in zip(self._parameters, self._views, self._has_gradient, strict=True):
            p.grad = view if has_gradient else None


def trained_by(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters that an optimizer trains, each once, in its order."""
    every: Sequence[Tensor] = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    return list({id(p): p for p in every}.values())


def _averages_in_its_own_way(model: DistributedDataParallel) -> bool:
    """Whether a DistributedDataParallel has settings or hooks which only its own forward and backward heed."""
    return (
        type(model) is not DistributedDataParallel
        or any(getattr(model, name, None) for name in (*HOOKS, *OF_DISTRIBUTED_DATA_PARALLEL))
        or "forward" in model.__dict__
    )
