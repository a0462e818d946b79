"""What is made anew for every image size, and kept for the last few."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

Size = TypeVar("Size")
Program = TypeVar("Program")


def kept(programs: OrderedDict[Size, Program], size: Size, make: Callable[[], Program], keep: int) -> Program:
    """The program of a size, made now if it is not there; the least recently used one makes room.

    Args:
        programs: The programs there are; changed in place.
        size: Whatever tells sizes apart.
        make: Makes the program of this size.
        keep: How many there may be, at least 1.
    """
    if size not in programs:
        while len(programs) >= keep:
            programs.popitem(last=False)
        programs[size] = make()
    programs.move_to_end(size)
    return programs[size]
