"""What the prepared model tells on the examples: lengths, unreached layers, untraceable modules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from harmoq_ao import HarmoqConfig, calibrate, convert_harmoq, prepare_harmoq
from harmoq_ao.common.errors import TraceError
from harmoq_ao.sites import PreparedMatmul
from harmoq_ao.sites.site import FloatCause
from tests.preparation.helpers import Small


def test_lengths_that_depend_on_the_image_are_told_apart() -> None:
    prepared = prepare_harmoq(Small(), None, [torch.rand(1, 3, 6, 6), torch.rand(1, 3, 6, 8)])
    shapes = [m.site.shape for m in prepared.sites() if isinstance(m, PreparedMatmul)]
    assert shapes == [(8,), (0,)]


def test_layers_no_example_reaches_are_listed_and_do_not_stop_calibration() -> None:
    model = Small().eval()
    prepared = prepare_harmoq(model, HarmoqConfig(profile="paper"), torch.rand(1, 3, 6, 6))
    assert [(f.name, str(f.reason)) for f in prepared.floats if f.kind == "linear"] == [
        ("expert", "no example image reached it")
    ]
    large = torch.rand(1, 3, 16, 16)
    assert torch.equal(prepared(large), model(large))
    calibrate(prepared, [torch.rand(1, 3, 6, 6)], show_progress=False)
    assert torch.isfinite(convert_harmoq(prepared)(large)).all()
    both = prepare_harmoq(model, None, [torch.rand(1, 3, 6, 6), large])
    assert "expert" in {m.site.name for m in both.sites()}


def test_untraceable_modules_are_reported_or_raise() -> None:
    model, image = Small(traceable=False), torch.rand(1, 3, 6, 6)
    prepared = prepare_harmoq(model, None, image)
    left = [f for f in prepared.floats if f.reason.cause is FloatCause.UNTRACED]
    assert [f.name for f in left] == ["::matmul_0", "::matmul_1"]
    assert all(f.macs == 36 * 36 * 8 for f in left)
    assert all("helpers.py:" in f.reason.text for f in left)
    assert not [m for m in prepared.sites() if isinstance(m, PreparedMatmul)]  # none is left over from the attempt
    calibrate(prepared, [image], show_progress=False)
    convert_harmoq(prepared)
    with pytest.raises(TraceError, match=r"helpers\.py:"):
        prepare_harmoq(model, None, image, strict=True)


def test_outputs_beyond_the_first_are_compared() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            self.calls = getattr(self, "calls", 0) + 1
            return x * 2, x * self.calls

    with pytest.raises(TraceError):
        prepare_harmoq(Two(), None, torch.rand(1, 3, 4, 4), output=0)
