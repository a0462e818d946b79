"""The teacher: the float network whatever happens to the weights, and a quick version of it."""

from __future__ import annotations

import copy

import pytest
import torch

import harmoq_ao as h
from harmoq_ao.graph.island import is_island, island_state
from harmoq_ao.graph.nodes import calls_site
from harmoq_ao.harmonization.distillation import features_of
from harmoq_ao.harmonization.paper.algorithm import run_algorithm
from harmoq_ao.harmonization.paper.settings import AlgorithmSettings
from harmoq_ao.harmonization.refine import refine
from harmoq_ao.harmonization.settings import RefineSettings
from harmoq_ao.harmonization.stages import find_stages
from harmoq_ao.harmonization.teacher import Teacher
from harmoq_ao.sites.prepared import PreparedLinear
from tests.harmonization.helpers import crops
from tests.models import build, calibrated, images

W3A3 = h.HarmoqConfig(3, 3, profile="paper")


def test_it_is_the_float_network_whatever_happens_to_the_weights() -> None:
    prepared = calibrated("DAT/light", W3A3)
    image = images(1)[0]
    with torch.no_grad():
        expected = build("DAT/light")(image)
        teacher = Teacher(prepared)
        for site in prepared.sites():
            if isinstance(site, PreparedLinear):
                site.weight.add_(1.0)
        assert torch.equal(teacher.exact(image), expected)
        assert torch.equal(teacher.exact(images(1, (24, 40))[0]), build("DAT/light")(images(1, (24, 40))[0]))


@pytest.mark.parametrize("name", ["DAT/light", "SwinIR/light", "HAT", "ATD"])
def test_its_quick_version_computes_the_float_network_with_the_same_parameters_and_fewer_calls(name: str) -> None:
    prepared = calibrated(name, W3A3)
    teacher = Teacher(prepared)
    reference, quick = teacher.exact, teacher.quick
    own = dict(quick.named_parameters())
    assert own
    assert all(parameter is own[path] for path, parameter in reference.named_parameters())
    for image in (images(2)[0], images(1, (24, 40))[0]):  # the second has a size that no graph was traced at
        expected, blocks = reference(image), [stage.name for stage in find_stages(prepared)]
        with features_of(reference, blocks) as wanted:
            reference(image)
        with features_of(quick, blocks) as reached:
            torch.testing.assert_close(quick(image), expected, rtol=1e-4, atol=1e-5)
        for block in blocks:
            torch.testing.assert_close(reached[block], wanted[block], rtol=1e-3, atol=1e-4)
    assert _products(quick) < _products(reference)


def _products(model: h.PreparedModel) -> int:
    """Attention products in the graphs."""
    graphs = [v.graph for m in model.model.modules() if is_island(m) for v in island_state(m).all_variants()]
    return sum(calls_site(n) for g in graphs for n in g.nodes)


def test_learning_leaves_it_alone_and_asks_nobody_else_for_the_float_network() -> None:
    """One teacher for several parts; a teacher made between them would learn from changed weights."""
    prepared = calibrated("SwinIR/light", W3A3)
    teacher = Teacher(prepared)
    before = copy.deepcopy(teacher.exact.state_dict())
    run_algorithm(prepared, images(2), AlgorithmSettings(rows=64, updates=1), teacher=teacher)
    settings = RefineSettings(steps=1, checks=1)
    expected = copy.deepcopy(prepared)
    refine(expected, crops(2), settings, teacher=Teacher(calibrated("SwinIR/light", W3A3)))
    late = copy.deepcopy(prepared)
    own = refine(late, crops(2), settings)
    trace = refine(prepared, crops(2), settings, teacher=teacher)
    assert all(torch.equal(value, teacher.exact.state_dict()[key]) for key, value in before.items())
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in prepared.state_dict().items())
    assert trace.losses != own.losses
