"""A uniform random sample, without replacement, of a stream whose length is not known beforehand."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from harmoq_ao.distributed import all_sum


class Reservoir:
    """Keeps `capacity` items of everything added, every subset of that size being equally likely.

    Each item of the stream has an imaginary independent uniform key, and the reservoir holds the items with the
    smallest keys. Only keys below the largest kept one matter, and their number in a batch is binomial; so a batch
    costs time in proportion to the items it contributes, not to its size. (Keys: Efraimidis & Spirakis, 2006.)

    Args:
        capacity: Largest number of items.
        item_shape: ``(K,)`` for rows, ``()`` for single values.
        seed: Of the private random generator; the global random state is neither read nor changed.
        device: Where the items are stored.
    """

    def __init__(self, capacity: int, item_shape: tuple[int, ...], *, seed: int, device: torch.device) -> None:
        self.seen = 0
        self._rng = np.random.default_rng(seed)
        self._keys = np.empty(0)
        self._mine = np.ones(capacity, dtype=bool)  # slots filled by this process
        self._items = torch.empty((capacity, *item_shape), dtype=torch.float32, device=device)

    @property
    def capacity(self) -> int:
        """Largest number of items."""
        return self._items.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the items' storage (allocated at once) and of the keys."""
        return self._items.numel() * self._items.element_size() + self._keys.nbytes

    def items(self) -> Tensor:
        """The sample, `[R, *item_shape]` with R at most the capacity, float32."""
        return self._items[: len(self._keys)]

    def add(self, rows: Tensor) -> None:
        """Offer every item of `rows`: its rows along the last axis, or its single values if items are values."""
        slots, chosen = self._admit(rows.numel())
        self._mine[slots] = True
        if len(slots):
            picked = self._pick(rows, torch.from_numpy(chosen))
            self._items[torch.from_numpy(slots).to(self._items.device)] = picked.to(self._items)

    def pass_over(self, values: int) -> None:
        """As :meth:`add` for a number of values that another process holds: which of them enter depends on no value."""
        slots, _ = self._admit(values)
        self._mine[slots] = False

    def own(self, own: bool) -> None:
        """Say whether this process or another one puts what was kept so far into :meth:`merge`."""
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
        complete = self.seen == len(self._keys)
        width = self._items.shape[1:].numel()
        size = min(capacity, values.numel())
        flat = Reservoir(capacity if complete else size, (), seed=0, device=self._items.device)
        flat._rng = self._rng
        flat.seen = self.seen * width
        flat._keys = self._rng.random(size) * self._threshold(size, flat.seen)
        keep = torch.from_numpy(self._rng.choice(values.numel(), size, replace=False))
        flat._items[:size] = values[keep.to(values.device)]
        flat._mine[:size] = np.repeat(self._mine[: len(self._keys)], width)[keep.numpy()]
        return flat

    def _threshold(self, size: int, seen: int) -> float:
        """A draw of the smallest of `seen` uniform keys but `size`; below it those `size` keys are uniform."""
        return 1.0 if size == seen else float(self._rng.beta(size + 1, seen - size))

    def _admit(self, values: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots that some of the items in `values` new values take, and the positions of these items."""
        count = values // max(1, self._items[0].numel())
        keys, chosen = self._draw(count)
        self.seen += count
        slots, entering = self._place(keys)
        return slots, chosen[entering]

    def _draw(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and positions of those among `count` new items that could enter, at most `capacity` of them."""
        limit = self._keys.max() if len(self._keys) == self.capacity else 1.0
        below = int(self._rng.binomial(count, limit))
        entering = min(below, self.capacity)
        limit *= self._threshold(entering, below) if entering else 1.0
        keys = self._rng.random(entering) * limit
        return keys, self._rng.choice(count, entering, replace=False)

    def _place(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Merge new keys; slots to overwrite, and which of the new items go there."""
        held = len(self._keys)
        merged = np.concatenate((self._keys, keys))
        size = min(len(merged), self.capacity)
        kept = _smallest(merged, size)
        entering = held + np.flatnonzero(kept[held:])
        kept[held:] = False  # slots beyond those held are free
        free = np.flatnonzero(~kept[:size])
        self._keys = np.concatenate((self._keys, np.empty(size - held)))
        self._keys[free] = merged[entering]
        return free, entering - held

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


def _smallest(keys: np.ndarray, count: int) -> np.ndarray:
    """Mask of the `count` smallest keys."""
    if count >= len(keys):
        return np.ones(len(keys), dtype=bool)
    mask: np.ndarray = keys <= np.partition(keys, count - 1)[count - 1]
    if np.count_nonzero(mask) != count:  # equal keys at the border
        mask[:] = False
        mask[np.argpartition(keys, count - 1)[:count]] = True
    return mask
