"""Programs of the last few image sizes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmoq_ao.common.errors import ConfigError
from harmoq_ao.runtime.per_size import PerSizeModel, check_count


def _model(keep: int) -> PerSizeModel[int, Any]:
    return PerSizeModel(SimpleNamespace(traits=None, example_shapes=[]), keep)


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(1, 4))
def test_the_most_recently_used_stay(sizes: list[int], keep: int) -> None:
    model = _model(keep)
    for index, size in enumerate(sizes):
        recent = list(dict.fromkeys(reversed(sizes[:index])))[:keep]
        program = Mock(return_value=(size, index))
        made = model.program(size, program)
        assert made[0] == size
        assert program.call_count == (size not in recent)


@pytest.mark.parametrize("keep", [0, -1, 1.0, True, "4", None])
def test_how_many_is_a_whole_number(keep: object) -> None:
    with pytest.raises(ConfigError, match="keep must be a whole number"):
        check_count("keep", keep)
