"""Steps and chunks of them."""

from __future__ import annotations

import pytest

from benchmarks.gpu import plan
from benchmarks.gpu.contenders import CONTENDERS
from benchmarks.gpu.models import MODELS
from benchmarks.gpu.problems import checks, sanitized, timings

LISTS = [(list(checks(tiny)), list(timings(tiny)), sanitized(tiny)) for tiny in (False, True)]


@pytest.mark.parametrize("tiny", [False, True])
def test_full_goes_on_after_quick_and_repeats_nothing(tiny: bool) -> None:
    quick, full = (make(*LISTS[tiny], tiny=tiny) for make in (plan.quick, plan.full))
    assert full[: len(quick)] == quick
    assert len({step.name for step in full}) == len(full)
    assert {step.subject for step in quick if step.kind == "check"} == set(LISTS[tiny][0])


def test_every_step_names_what_there_is() -> None:
    for step in plan.full(*LISTS[0]):
        if step.kind == "model":
            assert step.subject.split("/")[0] in {shape.name for shape in (plan.MAIN, *plan.shapes())}
            assert step.subject.split("/")[1] in CONTENDERS
            assert step.ours == plan.is_ours(step.subject.split("/")[1])
        if step.kind in ("prepare", "agree"):
            assert step.subject.split(" ")[0] in MODELS
        assert step.together != (step.kind in ("time", "model"))


@pytest.mark.parametrize("budget", [540.0, 300.0])
def test_chunks_fit_into_the_budget_and_leave_nothing_out(budget: float) -> None:
    steps = plan.full(*LISTS[0])
    chunks = plan.chunks(steps, budget, 12)
    assert [step for chunk in chunks for step in chunk] == steps
    for chunk in chunks:
        assert sum(step.seconds / (12 if step.together else 1) for step in chunk) <= budget


def test_quick_fits_into_two_chunks_whose_second_is_autotuning() -> None:
    first, second = plan.chunks(plan.quick(*LISTS[0]), 540, 12)
    assert all("max-autotune" in step.name or step.name.endswith(plan.UNROUNDED) for step in second)
    assert len(first) > 100


def test_one_of_each_form_is_sanitized() -> None:
    assert {name.partition(":")[0] for name in LISTS[0][0]} == {name.partition(":")[0] for name in LISTS[0][2]}
    assert len(LISTS[0][2]) < 20
