"""A uniform random sample, without replacement, of a stream of unknown length."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from harmoq_ao.common.distributed import all_sum

_LARGEST_POPULATION = 10**9  # numpy draws no hypergeometric number beyond; the binomial is the same there to 1e-4


class Reservoir:
    """Keeps `capacity` items of everything added, every subset of that size being equally likely.

    How many items of a uniform sample of the stream lie in its newest batch is hypergeometric. So many are drawn from
    the batch, and as many of the items held until then give way, each of them as likely as any other: a batch costs
    time in proportion to the items it contributes, not to its size.

    Args:
        capacity: Largest number of items.
        item_shape: ``(K,)`` for rows, ``()`` for single values.
        seed: Of the private random generator; the global random state is neither read nor changed.
        device: Where the items are stored.
    """

    def __init__(self, capacity: int, item_shape: tuple[int, ...], *, seed: int, device: torch.device) -> None:
        self.seen = 0
        self._rng = np.random.default_rng(seed)
        self._mine = np.ones(capacity, dtype=bool)  # slots filled by this process
        self._items = torch.empty((capacity, *item_shape), dtype=torch.float32, device=device)

    @property
    def capacity(self) -> int:
        """Largest number of items."""
        return self._items.shape[0]

    @property
    def _held(self) -> int:
        """Items kept so far."""
        return min(self.seen, self.capacity)

    @property
    def nbytes(self) -> int:
        """Bytes of the items' storage, which is allocated at once."""
        return self._items.numel() * self._items.element_size()

    def items(self) -> Tensor:
        """The sample, `[R, *item_shape]` with R at most the capacity, float32."""
        return self._items[: self._held]

    def add(self, rows: Tensor) -> None:
        """Offer every item of `rows`: its rows along the last axis, or its single values if items are values."""
        slots, chosen = self._admit(rows.numel())
        self._mine[slots] = True
        if len(slots):
            picked = self._pick(rows, torch.from_numpy(chosen))
            self._items[torch.from_numpy(slots).to(self._items.device)] = picked.to(self._items)

    def pass_over(self, values: int) -> None:
        """As :meth:`add` for values that another process holds: which of them enter does not depend on the values."""
        slots, _ = self._admit(values)
        self._mine[slots] = False

    def own(self, own: bool) -> None:
        """Choose whether this process contributes what it kept so far to :meth:`merge`."""
        self._mine[:] = own

    def merge(self) -> None:
        """Fill the slots of items that other ranks hold; on every rank the sample of one process that saw all.

        Raises:
            RankLostError: A rank did not take part.
        """
        held = self.items()
        mine = torch.from_numpy(self._mine[: len(held)]).to(held.device)
        mine = mine.view(-1, *(1,) * (held.dim() - 1))
        held.copy_(all_sum(torch.where(mine, held, torch.zeros_like(held))))

    def flattened(self, capacity: int) -> Reservoir:
        """A reservoir of single values that goes on from this one of rows.

        Its first values are drawn from the kept rows; where the rows are already a part of the stream only, the
        capacity is at most the number of values they hold.
        """
        values = self.items().reshape(-1)
        width = self._items.shape[1:].numel()
        size = min(capacity, values.numel())
        flat = Reservoir(capacity if self.seen <= self.capacity else size, (), seed=0, device=self._items.device)
        flat._rng = self._rng
        flat.seen = self.seen * width
        keep = torch.from_numpy(self._rng.choice(values.numel(), size, replace=False))
        flat._items[:size] = values[keep.to(values.device)]
        flat._mine[:size] = np.repeat(self._mine[: self._held], width)[keep.numpy()]
        return flat

    def _admit(self, values: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots that some of the items in `values` new values take, and the positions of these items."""
        count = values // max(1, self._items[0].numel())
        held, size = self._held, min(self.seen + count, self.capacity)
        entering = self._entering(count, size)
        slots = np.concatenate((self._choose(held, held + entering - size), np.arange(held, size)))
        self.seen += count
        return slots, self._choose(count, entering)

    def _entering(self, count: int, size: int) -> int:
        """How many items of a sample of `size` are among the last `count` of the stream."""
        if self.seen + count < _LARGEST_POPULATION:
            return int(self._rng.hypergeometric(count, self.seen, size))
        entering = int(self._rng.binomial(size, count / (self.seen + count)))
        return min(count, max(size - self._held, entering))  # as many as there are, and as are needed to fill it

    def _choose(self, count: int, size: int) -> np.ndarray:
        """`size` different numbers below `count`, in random order."""
        return self._rng.choice(count, size, replace=False) if size else np.empty(0, dtype=np.int64)

    def _pick(self, rows: Tensor, index: Tensor) -> Tensor:
        """Items of `rows` by flat index, without copying the whole tensor."""
        rows_of = rows if self._items.dim() == 2 else rows.unsqueeze(-1)
        if rows_of.dim() == 1:
            rows_of = rows_of.unsqueeze(0)
        index = index.to(rows.device)
        if rows_of.is_contiguous():
            picked = rows_of.view(-1, rows_of.shape[-1]).index_select(0, index)
        else:
            picked = rows_of[torch.unravel_index(index, rows_of.shape[:-1])]
        return picked.view(-1, *self._items.shape[1:])
