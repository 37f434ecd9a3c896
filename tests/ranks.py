"""A program of several processes, which tests/test_training_ranks.py starts: each of the cases that the command line
names trains models with a process group, beside DistributedDataParallel, and checks what comes of it.

    ranks.py <file where the processes meet> <number of processes> <case> ...
"""

import copy
import datetime
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fastnn

CASES: dict[str, Callable[[], None]] = {}
Batch = tuple[Tensor, Tensor]


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


# ---- models, batches and the loop of stock ------------------------------------------------------------------------


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def norms() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3, bias=False), nn.BatchNorm1d(3)
    )


class Branches(nn.Module):
    """A part that never trains, and one that trains where it is said."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.never, self.sometimes, self.uses = mlp(), nn.Linear(2, 2), nn.Linear(3, 3), True

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return self.sometimes(y) if self.uses else y


def own_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().pow(1.5).mean()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 0.02, weight_decay=0.1)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, dampening=0.2)


def asgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.ASGD(model.parameters(), 0.05)  # which no operator has


def model_of(make: Callable[[], nn.Module]) -> nn.Module:
    """Another in each process, until the first one's is broadcast."""
    torch.manual_seed(dist.get_rank())
    return make().double()


def batches_of(count: int = 4, rows: int = 5, last: int | None = None) -> list[Batch]:
    """Those of this process. The last has `last` rows."""
    torch.manual_seed(100 + dist.get_rank())
    sizes = [rows] * (count - 1) + [last or rows]
    return [(torch.randn(n, 6).double(), torch.randn(n, 3).double()) for n in sizes]


def by_stock(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[..., Tensor],
    batches: Sequence[Batch],
    max_norm: float | None = None,
    micro_batches: int = 1,
) -> list[Tensor]:
    """Trains a model in DistributedDataParallel."""
    losses = []
    for i, (x, y) in enumerate(batches):
        if (i + 1) % micro_batches:
            with model.no_sync():  # type: ignore[operator]
                value = loss(model(x), y)
                value.backward()
        else:
            value = loss(model(x), y)
            value.backward()
            if max_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(value.detach())
    return losses


def by_step(step: Any, batches: Sequence[Batch], micro_batches: int = 1) -> list[Tensor]:
    return [step.accumulate(x, y) if (i + 1) % micro_batches else step(x, y) for i, (x, y) in enumerate(batches)]


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    own = optimizer.state_dict()["state"]
    return [*model.state_dict().values(), *(own[i][name] for i in sorted(own) for name in sorted(own[i]))]


def check_same_bits(model: nn.Module) -> None:
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    every = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(every, flat)
    assert all(torch.equal(one, flat) for one in every), "the processes have other parameters"


def compare(
    make: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    batches: Sequence[Batch],
    loss: Callable[..., Tensor] = F.mse_loss,
    *,
    says: str = "by operators",
    wrap: bool = False,
    max_norm: float | None = None,
    micro_batches: int = 1,
    keep_gradients: bool = False,
) -> None:
    """Trains by training_step and by stock."""
    model = model_of(make)
    stock = copy.deepcopy(model)
    parallel = DistributedDataParallel(stock, find_unused_parameters=make is Branches)
    their_optimizer = make_optimizer(stock)
    expected = by_stock(parallel, their_optimizer, loss, batches, max_norm, micro_batches)
    settings: dict[str, Any] = {"max_norm": max_norm, "keep_gradients": keep_gradients}
    optimizer = make_optimizer(model)
    if wrap:
        step = fastnn.training_step(DistributedDataParallel(model), loss, optimizer, **settings)
        assert step.model is model
    else:
        step = fastnn.training_step(model, loss, optimizer, process_group=dist.group.WORLD, **settings)
    losses = by_step(step, batches, micro_batches)
    assert says in step.explain(), step.explain()
    assert f"all-reduce over {dist.get_world_size()} processes" in step.explain()
    assert_close(losses, expected, rtol=1e-10, atol=1e-10)
    assert_close(states(model, optimizer), states(stock, their_optimizer), rtol=1e-10, atol=1e-10)
    check_same_bits(model)
    for p in model.parameters():
        assert (p.grad is not None) == keep_gradients


# ---- the cases ------------------------------------------------------------------------------------------------------


@case
def operators() -> None:
    for make in (mlp, norms):
        for make_optimizer in (adam, momentum):
            for max_norm in (None, 0.3):
                compare(make, make_optimizer, batches_of(), max_norm=max_norm, keep_gradients=max_norm is None)


@case
def a_loss_of_ones_own() -> None:
    compare(norms, momentum, batches_of(), own_loss, says="the loss by itself (the loss is own_loss)", max_norm=0.3)
    compare(mlp, adam, batches_of(), own_loss, says="the loss by itself (the loss is own_loss)", keep_gradients=True)


@case
def the_ordinary_way() -> None:
    compare(norms, asgd, batches_of(), says="forward and backward by autograd", max_norm=0.3)
    compare(mlp, asgd, batches_of(), says="the optimizer's own step: the optimizer is ASGD", keep_gradients=True)


@case
def distributed_data_parallel() -> None:
    compare(norms, adam, batches_of(), wrap=True, max_norm=0.3)
    compare(norms, asgd, batches_of(), says="by autograd", wrap=True)


@case
def accumulate() -> None:
    for wrap in (False, True):
        compare(norms, momentum, batches_of(6), says="gradients lay in p.grad", micro_batches=3, wrap=wrap)
    compare(norms, asgd, batches_of(4), says="by autograd", micro_batches=2, max_norm=0.2)


@case
def uneven_last_batch() -> None:
    for make_optimizer, says in ((adam, "by operators"), (asgd, "by autograd")):
        compare(norms, make_optimizer, batches_of(last=2 + dist.get_rank()), says=says)


@case
def unused_parameters() -> None:
    compare(Branches, adam, batches_of())
    compare(Branches, asgd, batches_of(), says="by autograd")
    # Processes of which only the last uses a part, all of them by operators of their own network.
    for make_optimizer in (adam, asgd):
        model = model_of(Branches)
        never = copy.deepcopy(model.never) if dist.get_rank() == 0 else None
        model.uses = dist.get_rank() == dist.get_world_size() - 1
        stock = copy.deepcopy(model)
        their_optimizer, optimizer = make_optimizer(stock), make_optimizer(model)
        parallel = DistributedDataParallel(stock, find_unused_parameters=True)
        expected = by_stock(parallel, their_optimizer, F.mse_loss, batches_of())
        step = fastnn.training_step(model, F.mse_loss, optimizer, process_group=dist.group.WORLD)
        assert_close(by_step(step, batches_of()), expected, rtol=1e-10, atol=1e-10)
        assert_close(states(model, optimizer), states(stock, their_optimizer), rtol=1e-10, atol=1e-10)
        check_same_bits(model)
        if never is not None:
            assert_close(dict(model.never.named_parameters()), dict(never.named_parameters()), rtol=0, atol=0)


@case
def one_process_goes_the_ordinary_way() -> None:
    for make_optimizer in (adam, momentum):
        model = model_of(mlp)
        stock = copy.deepcopy(model)
        optimizer, their_optimizer = make_optimizer(model), make_optimizer(stock)
        expected = by_stock(DistributedDataParallel(stock), their_optimizer, F.mse_loss, batches_of(6), 0.3)
        group = dist.group.WORLD
        step = fastnn.training_step(model, F.mse_loss, optimizer, process_group=group, max_norm=0.3)
        losses = []
        for i, (x, y) in enumerate(batches_of(6)):
            differs = i in (0, 3) and dist.get_rank() == 1
            losses.append(step(x.clone().requires_grad_() if differs else x, y))
            assert ("the last step went the ordinary way" in step.explain()) == differs
        assert_close(losses, expected, rtol=1e-10, atol=1e-10)
        assert_close(states(model, optimizer), states(stock, their_optimizer), rtol=1e-10, atol=1e-10)
        check_same_bits(model)


@case
def a_process_that_raises() -> None:
    class OwnError(Exception):
        pass

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if target.isnan().any():
            raise OwnError
        return F.mse_loss(output, target)

    for of_caller in (False, True):
        for make_optimizer in (adam, momentum, asgd):
            model = model_of(mlp)
            stock = copy.deepcopy(model)
            optimizer, their_optimizer = make_optimizer(model), make_optimizer(stock)
            parallel = DistributedDataParallel(stock)
            expected = by_stock(parallel, their_optimizer, F.mse_loss, batches_of())
            used = loss if of_caller else F.mse_loss
            step = fastnn.training_step(model, used, optimizer, process_group=dist.group.WORLD)
            losses = []
            for i, (x, y) in enumerate(batches_of()):
                if i in (0, 2):
                    before = copy.deepcopy(states(model, optimizer))
                    raises = dist.get_rank() == 1
                    bad = y.clone().fill_(torch.nan) if of_caller else y[:, :2]
                    if i == 2:
                        step.accumulate(x, y)  # which is dropped
                    try:
                        step(x, bad if raises else y)
                    except (RuntimeError, OwnError) as error:
                        assert ("another process raised" in str(error)) != raises, error  # noqa: PT017
                    else:
                        raise AssertionError("no error")
                    assert_close(states(model, optimizer), before, rtol=0, atol=0)
                    assert all(p.grad is None for p in model.parameters())
                losses.append(step(x, y))
            assert_close(losses, expected, rtol=1e-10, atol=1e-10)
            assert_close(states(model, optimizer), states(stock, their_optimizer), rtol=1e-10, atol=1e-10)
            check_same_bits(model)


@case
def epoch() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for rows, batch_size, drop_last in ((23, 4, False), (23, 4, True), (1, 2, False), (12, 3, False)):
        torch.manual_seed(7)
        x, y = torch.randn(rows, 6).double(), torch.randn(rows, 3).double()
        for shuffle in (False, True):
            model = model_of(lambda: nn.Sequential(mlp(), nn.Dropout(0.3)))
            stock = copy.deepcopy(model)
            optimizer, their_optimizer = adam(model), adam(stock)
            sampler: Any = DistributedSampler(TensorDataset(x, y), size, rank, shuffle, seed=5)
            loader = DataLoader(TensorDataset(x, y), batch_size, sampler=sampler, drop_last=drop_last)
            step = fastnn.training_step(model, F.mse_loss, optimizer, process_group=dist.group.WORLD)
            parallel = DistributedDataParallel(stock)
            for number in range(3):
                sampler.set_epoch(number)
                torch.manual_seed(rank)
                expected = by_stock(parallel, their_optimizer, F.mse_loss, list(loader))
                torch.manual_seed(rank)
                if number == 2:
                    losses = step.epoch(loader)
                else:
                    generator = torch.Generator().manual_seed(5 + number) if shuffle else None
                    losses = step.epoch(x, y, batch_size, shuffle=shuffle, generator=generator, drop_last=drop_last)
                assert_close(list(losses), expected, rtol=1e-10, atol=1e-10)
            assert_close(states(model, optimizer), states(stock, their_optimizer), rtol=1e-10, atol=1e-10)
            check_same_bits(model)
    for settings in (
        {"shuffle": True},
        {"shuffle": True, "generator": torch.Generator().manual_seed(rank)},
        {"batch_size": 2 + rank},
    ):
        try:
            step.epoch(x, y, **{"batch_size": 2, **settings})
        except ValueError as error:
            assert "generator" in str(error)  # noqa: PT017
        else:
            raise AssertionError("no error")


@case
def what_averages_by_itself() -> None:
    model = model_of(mlp)
    stock = copy.deepcopy(model)
    their_optimizer = adam(stock)
    expected = by_stock(DistributedDataParallel(stock), their_optimizer, F.mse_loss, batches_of())
    sharded = copy.deepcopy(model)
    for tensor in sharded.state_dict().values():
        dist.broadcast(tensor, 0)
    fully_shard(sharded)
    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.02, weight_decay=0.1)
    step = fastnn.training_step(model, F.mse_loss, zero, process_group=dist.group.WORLD)
    assert "the optimizer is ZeroRedundancyOptimizer" in step.explain()
    assert_close(by_step(step, batches_of()), expected, rtol=1e-10, atol=1e-10)
    assert_close(model.state_dict(), stock.state_dict(), rtol=1e-10, atol=1e-10)
    check_same_bits(model)
    optimizer = adam(sharded)
    step = fastnn.training_step(sharded, F.mse_loss, optimizer)
    assert "forward and backward by autograd" in step.explain(), step.explain()
    assert_close(by_step(step, batches_of()), expected, rtol=1e-10, atol=1e-10)
    whole = {name: value.full_tensor() for name, value in sharded.state_dict().items()}
    assert_close(whole, dict(stock.state_dict()), rtol=1e-10, atol=1e-10)
    refused(ValueError, "FSDP2", sharded, optimizer, dist.group.WORLD)


@case
def hooks_of_distributed_data_parallel() -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    model = model_of(norms)
    stock = copy.deepcopy(model)
    optimizer, their_optimizer = adam(model), adam(stock)
    expected = by_stock(DistributedDataParallel(stock), their_optimizer, F.mse_loss, batches_of(), None, 2)
    parallel = DistributedDataParallel(model)
    parallel.register_comm_hook(None, allreduce_hook)
    step = fastnn.training_step(parallel, F.mse_loss, optimizer)
    assert step.model is parallel
    assert_close(by_step(step, batches_of(), 2), expected, rtol=1e-10, atol=1e-10)
    assert_close(states(model, optimizer), states(stock, their_optimizer), rtol=1e-10, atol=1e-10)


def refused(kind: type[Exception], words: str, model: nn.Module, optimizer: torch.optim.Optimizer, group: Any) -> None:
    try:
        fastnn.training_step(model, F.mse_loss, optimizer, process_group=group)
    except kind as error:
        assert words in str(error), error  # noqa: PT017
    else:
        raise AssertionError("no error")


@case
def arguments() -> None:
    model = model_of(mlp)
    refused(TypeError, "expected a process group of torch.distributed", model, adam(model), "gloo")
    other = model_of(lambda: nn.Linear(6, 3 + dist.get_rank()))
    refused(ValueError, "have other parameters", other, adam(other), dist.group.WORLD)
    first = dist.new_group([0])
    if dist.get_rank():
        refused(TypeError, "that this process belongs to", model, adam(model), first)
    refused(ValueError, "another process group", DistributedDataParallel(model), adam(model), dist.new_group())
    # A copy of a step trains a copy of the model.
    step = fastnn.training_step(model, F.mse_loss, adam(model), process_group=dist.group.WORLD)
    second = copy.deepcopy(step)
    assert_close(by_step(second, batches_of()), by_step(step, batches_of()), rtol=0, atol=0)
    check_same_bits(second.model)
    # A group of one process, in single precision.
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    alone = mlp()
    step = fastnn.training_step(alone, F.mse_loss, adam(alone), process_group=groups[dist.get_rank()], strict=True)
    x, y = (tensor.float() for tensor in batches_of()[0])
    assert_close(step(x, y), F.mse_loss(copy.deepcopy(alone)(x), y), rtol=1, atol=1)


@case
def a_process_that_does_not_come() -> None:
    group = dist.new_group(timeout=datetime.timedelta(seconds=1))
    model = model_of(mlp)
    step = fastnn.training_step(model, F.mse_loss, adam(model), process_group=group)
    (x, y), *_ = batches_of()
    step(x, y)
    if dist.get_rank() == 1:
        time.sleep(2.5)
        return
    before, begin = copy.deepcopy(model.state_dict()), time.monotonic()
    try:
        step(x, y)
    except RuntimeError as error:
        assert "did not come to this step within" in str(error)  # noqa: PT017
    else:
        raise AssertionError("no error")
    assert time.monotonic() - begin < 2.4
    assert_close(model.state_dict(), before, rtol=0, atol=0)


@case
def a_process_that_ends() -> None:
    model = model_of(mlp)
    step = fastnn.training_step(model, F.mse_loss, adam(model), process_group=dist.group.WORLD)
    (x, y), *_ = batches_of()
    step(x, y)
    if dist.get_rank() == 1:
        os._exit(0)  # without a word
    try:
        step(x, y)
    except RuntimeError as error:
        assert "another process has ended" in str(error)  # noqa: PT017
    else:
        raise AssertionError("no error")
    os._exit(0)


def run(file: str, rank: int, size: int, cases: Sequence[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{file}", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=30)
    )
    for name in cases:
        begin = time.monotonic()
        CASES[name]()
        print(f"process {rank}: {name} {time.monotonic() - begin:.2f} s", flush=True)
    dist.destroy_process_group()


def main(file: str, size: str, *cases: str) -> int:
    """Forks, so that only one process spends seconds on imports. Returns how many processes have failed."""
    children = []
    for rank in range(int(size)):
        child = os.fork()
        if child == 0:
            try:
                run(file, rank, int(size), cases)
                os._exit(0)
            except BaseException:
                print(f"process {rank}:\n{traceback.format_exc()}", flush=True)
                os._exit(1)  # the others see that the connection is closed
        children.append(child)
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
