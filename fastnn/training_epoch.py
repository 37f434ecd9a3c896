"""The batches of an epoch, as torch's DataLoader makes them of tensors in memory, without its cost for each batch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler

Rows = Tensor | tuple[Tensor, ...] | list[Tensor]


class Batches:
    """The batches that ``DataLoader(TensorDataset(input, target), batch_size, shuffle=shuffle, generator=generator,
    drop_last=drop_last)`` gives, in the same order, with generators left in the same state.

    Args:
        input, target: a tensor, or several in a tuple, all with as many rows.
        share: a process's rank and the number of processes, which have the rows that a DistributedSampler gives them.

    Raises:
        TypeError: ``input`` or ``target`` holds something that is no tensor.
        ValueError: there are no rows, or not as many in each tensor, or batch_size is below 1.
    """

    def __init__(
        self,
        input: Rows,
        target: Rows,
        batch_size: int,
        shuffle: bool,
        generator: torch.Generator | None,
        drop_last: bool,
        share: tuple[int, int] | None = None,
    ) -> None:
        self.inputs, self.targets = _tensors(input, "input"), _tensors(target, "target")
        self._input_is_one, self._target_is_one = isinstance(input, Tensor), isinstance(target, Tensor)
        rows = {len(tensor) if tensor.dim() else -1 for tensor in (*self.inputs, *self.targets)}
        if len(rows) != 1 or min(rows) < 0:
            shapes = [tuple(tensor.shape) for tensor in (*self.inputs, *self.targets)]
            raise ValueError(f"epoch: expected as many rows in each tensor, got {shapes}")
        (self.rows,) = rows
        if share is not None and shuffle and generator is None:
            raise ValueError("epoch: a process group's shuffle needs a generator, in the same state in each process")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size should be a positive integer value, but got batch_size={batch_size}")
        if not isinstance(drop_last, bool):
            raise ValueError(f"drop_last should be a boolean value, but got drop_last={drop_last}")
        if self.rows == 0:
            raise ValueError("epoch: expected at least one row")
        self.batch_size = batch_size
        self.taken = self.rows if share is None else -(-self.rows // share[1])  # rows of this process
        self.count = self.taken // batch_size if drop_last else -(-self.taken // batch_size)
        # A model may draw from torch's own generator between two batches. An order from that generator is therefore
        # drawn batch by batch.
        self.is_drawn_in_turn = shuffle and generator is torch.default_generator and share is None
        self._share, self._shuffle, self._generator, self._drop_last = share, shuffle, generator, drop_last
        self.drawn = ""  # a text that must be the same in all processes that share the rows
        self.order: Tensor | None = None  # the rows in the order of the batches; None where that is the tensors' order

    def begin(self) -> None:
        """Draws the order."""
        # A DataLoader draws a seed for its workers, even where it has none.
        torch.empty((), dtype=torch.int64).random_(generator=None if self._share else self._generator)
        if self._share is not None:
            rank, size = self._share
            places = torch.arange(self.rows)
            rows = torch.randperm(self.rows, generator=self._generator) if self._shuffle else places
            self.drawn = f"{self.rows} {self.batch_size} {self._drop_last} {(rows * places).sum().item()}"
            self.order = rows.repeat(-(-size // self.rows) + 1)[rank : self.taken * size : size]
        elif self._shuffle and not self.is_drawn_in_turn:
            self.order = _permutation(self.rows, self._generator)

    @property
    def sizes(self) -> tuple[Any, ...]:
        """Of a whole batch."""
        return self.batch_size, *[tensor.shape[1:] for tensor in (*self.inputs, *self.targets)]

    def places(self, first: int, last: int) -> tuple[int, int]:
        """The rows [begin, end), as places in the order, of the batches [first, last)."""
        return first * self.batch_size, min(last * self.batch_size, self.taken)

    def __getitem__(self, number: int) -> tuple[Any, Any]:
        """A batch's input and target. They are copies: a model or a loss may change them in place."""
        first, last = self.places(number, number + 1)
        if self.order is None:
            return self._both(lambda tensor: tensor[first:last].clone(memory_format=torch.contiguous_format))
        places = self.order[first:last]
        return self._both(lambda tensor: tensor.index_select(0, places.to(tensor.device)))

    @property
    def rows_of_all(self) -> tuple[Any, Any]:
        """The input and the target of all rows, in the form in which a batch has them."""
        return self._both(lambda tensor: tensor)

    def in_turn(self) -> Iterator[tuple[Any, Any]]:
        """Yields all batches. The rows of each are drawn when its turn comes."""
        sampler: Any = RandomSampler(range(self.rows), generator=self._generator)
        for indices in BatchSampler(sampler, self.batch_size, self._drop_last):
            yield self._both(operator.itemgetter(indices))

    def _both(self, take: Callable[[Tensor], Tensor]) -> tuple[Any, Any]:
        x, y = tuple(map(take, self.inputs)), tuple(map(take, self.targets))
        return (x[0] if self._input_is_one else x), (y[0] if self._target_is_one else y)


def _tensors(given: Rows, name: str) -> Sequence[Tensor]:
    several = given if isinstance(given, (tuple, list)) else (given,)
    if not several or not all(isinstance(one, Tensor) for one in several):
        raise TypeError(f"epoch: expected {name} to be a tensor or a tuple of tensors, got a {type(given).__name__}")
    return several


def _permutation(rows: int, generator: torch.Generator | None) -> Tensor:
    """The order that torch's RandomSampler gives, as a tensor, without a Python object for each row."""
    if generator is None:
        generator = torch.Generator()
        generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
    order = torch.randperm(rows, generator=generator)
    torch.randperm(rows, generator=generator)  # the sampler draws a last round of no rows
    return order


class _NoBar:
    """Takes the place of a bar where none is shown."""

    def update(self, _: int) -> None: ...
    def close(self) -> None: ...


def progress_bar(count: int | None, progress: bool | None) -> Any:
    """A progress bar of ``count`` batches, which moves at most ten times a second. Where none is wanted, or tqdm is not
    installed, nothing is shown."""
    if not progress:
        return _NoBar()
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoBar()
    return tqdm(total=count, unit="batch", mininterval=0.1)
