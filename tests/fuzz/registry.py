"""Registry of mutations: what a loader may be handed, a function each, found by kind.

A mutation is written once, below a decorator, and all tests of its kind use it::

    @IMAGES.add
    def truncated(rng: Random) -> Image:
        ...

It takes a seeded generator and nothing else that changes, so case ``i`` of a seed is always the same. `cases` goes
through a kind's mutations in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Generic, TypeVar

Made = TypeVar("Made")


@dataclass(frozen=True)
class FileCase:
    """A file to be: its bytes and the suffix that it claims."""

    data: bytes
    suffix: str

    def write(self, folder: Path, name: str) -> Path:
        """Write it and return its path."""
        path = folder / f"{name}{self.suffix}"
        path.write_bytes(self.data)
        return path


@dataclass
class Registry(Generic[Made]):
    """The mutations of one kind by name."""

    mutations: dict[str, Callable[[Random], Made]] = field(default_factory=dict)

    def add(self, mutation: Callable[[Random], Made]) -> Callable[[Random], Made]:
        """Register a mutation under its own name."""
        assert mutation.__name__ not in self.mutations, "two mutations share a name"
        self.mutations[mutation.__name__] = mutation
        return mutation

    def cases(self, count: int, seed: int = 0) -> Iterator[tuple[str, Made]]:
        """``count`` cases, named ``MUTATION-NUMBER``, the mutations in turn."""
        names = list(self.mutations)
        for index in range(count):
            name = names[index % len(names)]
            yield f"{name}-{index}", self.mutations[name](Random(f"{seed}/{name}/{index}"))


def add_damage(
    registry: Registry[FileCase], intact: Callable[[Random], tuple[bytes, str]], header: int, most: int
) -> None:
    """Register what any kind of file may have suffered, and the file that has not.

    Args:
        registry: Of the kind.
        intact: Makes a valid file: its bytes and suffix.
        header: Length of the part that counts as its header.
        most: Bytes of the header that are replaced at most.
    """

    def damage(name: str, change: Callable[[bytes, Random], bytes]) -> None:
        def mutation(rng: Random) -> FileCase:
            data, suffix = intact(rng)
            return FileCase(change(data, rng), suffix)

        mutation.__name__ = name
        registry.add(mutation)

    damage("intact", lambda data, rng: data)
    damage("truncated", cut)
    damage("flipped_bytes", flipped)
    damage("flipped_header", lambda data, rng: flipped(data[:header], rng, most) + data[header:])


def flipped(data: bytes, rng: Random, most: int = 8) -> bytes:
    """Up to ``most`` bytes replaced."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, most)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def cut(data: bytes, rng: Random) -> bytes:
    """Less than the whole, perhaps nothing."""
    return data[: rng.randrange(len(data))]


def odd_value(rng: Random) -> Any:
    """A value of JSON, or one that a caller in Python could pass, that few fields take."""
    return rng.choice(_ODD)()


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


_ODD: tuple[Callable[[], Any], ...] = (
    lambda: None,
    lambda: True,
    lambda: -1,
    lambda: 0,
    lambda: 1,
    lambda: 9,
    lambda: 2**63,
    lambda: -(10**30),
    lambda: 10**5000,  # longer than Python writes out
    lambda: 4.0,
    lambda: float("nan"),
    lambda: float("inf"),
    lambda: -1e308,
    lambda: "",
    lambda: "8",
    lambda: "x" * 10_000,
    lambda: "\x00\ud800",
    lambda: "[red]bold[/]",
    list,
    lambda: [[]],
    lambda: [None, {}, "a"],
    dict,
    lambda: {"": 0},
    lambda: {"sites": ["*"], "weight_bits": {}},
    lambda: _nested(20),
    lambda: _nested(5000),  # deeper than Python writes out
)
