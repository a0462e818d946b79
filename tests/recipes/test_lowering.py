"""The table of fused kernels."""

from __future__ import annotations

import pytest

from harmoq_ao.common.errors import InputError
from harmoq_ao.recipes.lowering import general, lowerings, replaced, row
from harmoq_ao.sites.report import Lowering
from tests.models import BY_NAME


def test_a_row_counts_sites_by_kernel_and_reason() -> None:
    found = [
        Lowering("triton window_attention"),
        Lowering("triton mlp"),
        Lowering("triton mlp"),
        Lowering("triton lowbit_linear", "operands (1, 2) and (3, 4) are odd"),
        Lowering("triton lowbit_linear", "operands (5, 6) and (7,) are odd"),
    ]
    assert row(BY_NAME["HAT"], found) == "| HAT | 1 |  |  | 2 | 2: operands ... and ... are odd |\n"


def test_reasons_lose_what_differs_from_site_to_site() -> None:
    assert general("no MLP: its forward does not trace: TraceError: x at /a/b.py:3") == (
        "no MLP: its forward does not trace"
    )
    assert general("scores (2, 1, 64) are none\nmore") == "scores ... are none"


def test_the_table_is_replaced_and_nothing_else() -> None:
    document = "a\n<!-- python -m harmoq_ao.recipes.lowering -->\nold\n<!-- end -->\nb\n"
    assert replaced(document, "new\n") == document.replace("old", "new")
    with pytest.raises(InputError, match="no place"):
        replaced("a", "new")


def test_an_architecture() -> None:
    kernels = {low.kernel for low in lowerings(BY_NAME["Swin2SR"]).values()}
    assert kernels == {"triton window_attention", "triton mlp"}
