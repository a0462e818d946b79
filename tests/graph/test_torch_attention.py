"""The switch of torch's fused attention."""

from __future__ import annotations

import threading

import pytest
from torch.backends import mha

from harmoq_ao.graph import without_fast_path


@pytest.mark.parametrize("before", [True, False])
def test_the_switch_is_put_back_when_the_last_user_leaves(before: bool) -> None:
    mha.set_fastpath_enabled(before)
    inside, leave = threading.Event(), threading.Event()

    def use() -> None:
        with without_fast_path():
            inside.set()
            leave.wait(10)

    try:
        other = threading.Thread(target=use)
        with without_fast_path():
            other.start()
            assert inside.wait(10)
        assert not mha.get_fastpath_enabled()
        leave.set()
        other.join(10)
        assert mha.get_fastpath_enabled() is before
    finally:
        mha.set_fastpath_enabled(True)
