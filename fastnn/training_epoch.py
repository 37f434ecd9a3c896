"""The batches of an epoch, as torch's DataLoader makes them of tensors in memory, without its cost for each batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

Rows = Tensor | tuple[Tensor, ...] | list[Tensor]
_GATHERED = 1 << 22  # elements of all tensors that are gathered at once, so that a large data set is not copied whole


def batches_of(
    input: Rows, target: Rows, batch_size: int, shuffle: bool, generator: torch.Generator | None, drop_last: bool
) -> tuple[int, Iterator[tuple[Any, Any]]]:
    """How many batches there are, and the batches: those that ``DataLoader(TensorDataset(input, target), batch_size,
    shuffle=shuffle, generator=generator, drop_last=drop_last)`` gives, in the same order, with generators left in the
    same state.

    Args:
        input, target: a tensor, or several in a tuple, all with as many rows.

    Raises:
        TypeError: there is something else than tensors.
        ValueError: there are no rows, or not as many in each tensor, or batch_size is below 1.
    """
    tensors = [*_tensors(input, "input"), *_tensors(target, "target")]
    rows = {len(tensor) if tensor.dim() else -1 for tensor in tensors}
    if len(rows) != 1 or min(rows) < 0:
        raise ValueError(f"epoch: expected as many rows in each tensor, got {[tuple(t.shape) for t in tensors]}")
    (count,) = rows
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size should be a positive integer value, but got batch_size={batch_size}")
    if count == 0:
        raise ValueError("epoch: expected at least one row")
    batches = count // batch_size if drop_last else -(-count // batch_size)
    return batches, _batches(input, target, tensors, batch_size, shuffle, generator, drop_last)


def _tensors(given: Rows, name: str) -> Sequence[Tensor]:
    several = given if isinstance(given, (tuple, list)) else (given,)
    if not several or not all(isinstance(one, Tensor) for one in several):
        raise TypeError(f"epoch: expected {name} to be a tensor or a tuple of tensors, got a {type(given).__name__}")
    return several


def _batches(
    input: Rows,
    target: Rows,
    tensors: list[Tensor],
    batch_size: int,
    shuffle: bool,
    generator: torch.Generator | None,
    drop_last: bool,
) -> Iterator[tuple[Any, Any]]:
    count = len(tensors[0])
    # A DataLoader draws a seed for its workers, even where it has none.
    torch.empty((), dtype=torch.int64).random_(generator=generator)
    sampler: Any = RandomSampler(range(count), generator=generator) if shuffle else SequentialSampler(range(count))

    def both(some: list[Tensor]) -> tuple[Any, Any]:
        inputs = len(input) if isinstance(input, (tuple, list)) else 1
        x, y = some[:inputs], some[inputs:]
        return (
            tuple(x) if isinstance(input, (tuple, list)) else x[0],
            tuple(y) if isinstance(target, (tuple, list)) else y[0],
        )

    if shuffle and generator is torch.default_generator:  # from which a model may draw between two batches
        for indices in BatchSampler(sampler, batch_size, drop_last):
            yield both([tensor[indices] for tensor in tensors])
        return
    order = torch.tensor(list(sampler)) if shuffle else None
    end = count // batch_size * batch_size if drop_last else count
    elements = sum(tensor.numel() for tensor in tensors) // count
    together = max(1, _GATHERED // max(1, elements * batch_size)) * batch_size
    for first in range(0, end, together):
        last = min(end, first + together)
        some = [
            # A copy in any case: a model or a loss may change its batch in place.
            tensor[first:last].clone(memory_format=torch.contiguous_format)
            if order is None
            else tensor.index_select(0, order[first:last].to(tensor.device))
            for tensor in tensors
        ]
        # Each batch is a view of the rows that were gathered together.
        yield from map(both, map(list, zip(*(tensor.split(batch_size) for tensor in some), strict=True)))


def with_progress(batches: Iterable[Any], count: int | None, progress: bool | None) -> Iterable[Any]:
    """The batches, with a bar that moves at most ten times a second, if tqdm is installed."""
    if not progress:
        return batches
    try:
        from tqdm import tqdm
    except ImportError:
        return batches
    bar: Iterable[Any] = tqdm(batches, total=count, unit="batch", mininterval=0.1)
    return bar
