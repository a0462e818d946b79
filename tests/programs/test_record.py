"""Recorded forwards: run again they give the model's output bit for bit; what cannot be recorded is refused."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from harmoq_ao.common.tracing import is_recording
from harmoq_ao.programs.record import StandIn, Unrecordable, record
from tests import models
from tests.programs.helpers import BODIES, Body, Written, off_by, written


def replayed(model: nn.Module, image: Tensor, example: Tensor | None = None) -> Tensor:
    """Output of the recorded graph, run by torch."""
    recorded = record(model, image if example is None else example)
    with torch.no_grad():
        result: Tensor = fx.GraphModule(recorded.root, recorded.graph)(image)
    return result


@pytest.mark.parametrize("name", ["SwinIR/light", "DAT/light", "Swin2SR", "KBNet/s", "forms", "HAT", "GRL", "ATD"])
def test_a_recorded_architecture_is_the_model(name: str) -> None:
    model = models.build(name)
    image = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(image)
    # the values of the example are nobody's concern
    got = replayed(model, image, torch.full_like(image, float("nan")))
    if name in ("HAT", "GRL"):  # the same operators on other strides: sums in another order
        assert off_by(got, want) < 1e-6
    else:
        assert torch.equal(got, want)


@pytest.mark.parametrize("body", BODIES, ids=lambda b: b.__name__)
def test_a_recorded_forward_is_the_model(body: Body) -> None:
    model, image = written(body), models.images(1)[0]
    with torch.no_grad():
        want = model(image.clone())
    assert torch.equal(replayed(model, image), want)


def test_every_node_has_the_shape_of_its_result() -> None:
    model, image = models.build("DAT/light"), models.images(1)[0]
    recorded = record(model, image)

    class Checked(fx.Interpreter):
        checked = 0

        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if "shape" in n.meta:
                assert tuple(result.shape) == n.meta["shape"]
                assert result.dtype == n.meta["dtype"]
                self.checked += 1
            return result

    with torch.no_grad():
        interpreter = Checked(fx.GraphModule(recorded.root, recorded.graph))
        interpreter.run(image)
    assert interpreter.checked > 100


def test_what_does_not_depend_on_the_image_is_a_constant_and_large_ones_are_kept_once() -> None:
    def body(m: Written, x: Tensor) -> Tensor:
        for _ in range(3):
            mask = torch.ones(8, *x.shape[2:]).tril()
            x = m.tail(m.head(x) * mask)
        return x

    recorded = record(written(body), torch.empty(1, 3, 96, 96))
    assert len([b for b in recorded.root.buffers() if b.numel() == 8 * 96 * 96]) == 1
    assert not any("tril" in str(node.target) for node in recorded.graph.nodes)


@pytest.mark.parametrize(
    ("name", "body", "reason"),
    [
        ("item", lambda m, x: x * x.mean().item(), "asks for values"),
        ("branch", lambda m, x: x if x.mean() > 0 else -x, "asks for values"),
        ("nonzero", lambda m, x: x.flatten()[x.flatten().nonzero()], "asks for values"),
        ("mask", lambda m, x: x[x > 0], "asks for values"),
        ("numpy", lambda m, x: torch.from_numpy(x.numpy() * 2), "asks for values"),
        ("noise", lambda m, x: x + torch.randn_like(x), "random"),
        ("dropout", lambda m, x: torch.nn.functional.dropout(x, 0.5, training=True), "random"),
        ("tuple", lambda m, x: (x, x), "returns a tuple"),
        ("constant", lambda m, x: torch.ones(3), "not computed from the image"),
        ("buffer", lambda m, x: x + m.table.add_(x.mean())[0], "writes into a tensor"),
        ("out", lambda m, x: torch.add(x, 1, out=torch.empty_like(x)), "writes into a tensor"),
    ],
)
def test_refusals(name: str, body: Body, reason: str) -> None:
    with pytest.raises(Unrecordable, match=reason):
        record(written(body), models.images(1)[0])


def test_writes_that_no_graph_follows_are_refused_where_they_are_read() -> None:
    def overlapping(m: Written, x: Tensor) -> Tensor:
        y = m.head(x)
        y.unfold(3, 2, 1).mul_(2)
        return y

    def constant_written(m: Written, x: Tensor) -> Tensor:
        table = torch.zeros(8, 1, 1)
        y = m.head(x) + table
        table.fill_(1.0)
        return m.tail(y + table)

    for body in (overlapping, constant_written):
        with pytest.raises(Unrecordable, match=r"by another name|that it has read"):
            record(written(body), models.images(1)[0])


def same_name(y: Tensor) -> Tensor:
    part = y[:, :4]
    z = part * 2  # read before the write
    y.mul_(3)
    return torch.cat([y[:, 4:], z], 1)


def part_of(y: Tensor) -> Tensor:
    y[:, :1].add_(1)
    return y


def whole_of(y: Tensor) -> Tensor:
    part, inner = y[:, 1:], y[:, 1:][..., 2]
    y.add_(1)
    part[0, 2] += inner.mean()
    return y * part.sum(1, keepdim=True) + inner[:, :1, :, None]


def assigned(y: Tensor) -> Tensor:
    y[:, 0] = 1.5
    y[:, 3:5, ::2] = y[:, 1:2, ::2]
    y.transpose(2, 3)[:, 6] = y[:, 7].transpose(1, 2)
    return y


def through_shapes(y: Tensor) -> Tensor:
    tokens = y.permute(0, 2, 3, 1).unsqueeze(1)
    first, second = y.split(4, 1)
    tokens.squeeze(1).detach()[..., 2].zero_()
    second.mul_(first)
    *_, last = y.unbind(1)
    last[0].view(-1)[:5] = 7
    first.split_with_sizes([1, 3], dim=1)[1].copy_(second[:, 1:])
    return torch.cat([tokens[:, 0].permute(0, 3, 1, 2) + first.repeat(1, 2, 1, 1), second], 1)[:, 4:]


def ranks(y: Tensor) -> Tensor:
    """The inverse of a permutation that depends on values."""
    order = y.flatten(2).mean(1).argsort(-1)
    inverse = torch.zeros_like(order)
    for image in range(len(order)):
        inverse[image, order[image]] = torch.arange(order.shape[-1])
    return y.flatten(2).gather(2, inverse[:, None].expand(-1, 8, -1)).reshape(y.shape)


@pytest.mark.parametrize(
    "body", [same_name, part_of, whole_of, assigned, through_shapes, ranks], ids=lambda b: b.__name__
)
def test_writes_are_followed(body: Callable[[Tensor], Tensor]) -> None:
    model, image = written(lambda m, x: m.tail(body(m.head(x)))), models.images(1)[0].repeat(2, 1, 1, 1)
    with torch.no_grad():
        assert torch.equal(replayed(model, image), model(image))


def stand_ins(model: nn.Module) -> list[str]:
    found = []
    for path, module in model.named_modules():
        for name, value in {**vars(module), **module._buffers}.items():
            inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            found += [f"{path}.{name}" for v in inner if isinstance(v, StandIn)]
    return found


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_forward_keeps_is_undone(fails: bool) -> None:
    def body(m: Written, x: Tensor) -> Tensor:
        m.table = m.table.type_as(x) * x.mean()
        m.fresh = x.mean()
        m.register_buffer("made", x.mean())
        m.kept[x.shape] = x.new_ones(1)
        return m.head(x) * m.table if not fails else x * x.sum().item()

    model, image = written(body), models.images(1)[0]
    table, before = model.table, set(vars(model)) | set(model._buffers)
    try:
        record(model, image)
    except Unrecordable:
        assert fails
    assert model.table is table
    assert set(vars(model)) | set(model._buffers) == before
    assert not model.kept
    assert not stand_ins(model)


def test_recording_does_not_outlast_itself() -> None:
    seen: list[bool] = []

    def body(m: Written, x: Tensor) -> Tensor:
        seen.append(is_recording())
        return m.tail(m.head(x))

    model, image = written(body), models.images(1)[0]
    record(model, image)
    model(image)
    assert seen == [True, False]


def around(context: Callable[[], Any], model: nn.Module, image: Tensor) -> list[str]:
    with context():
        return [str(node.target) for node in record(model, image).graph.nodes]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_recording_stays_behind(fails: bool) -> None:
    def body(module: Any, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[-1])
        parts = (x * mask).chunk(2, dim=-1)
        return parts[0] + (1 if fails and bool(parts[1].sum() > 0) else 0)

    try:
        record(Written(body), torch.rand(1, 3, 8, 8))
    except Unrecordable:
        assert fails
    gc.collect()
    assert not [found for found in gc.get_objects() if type(found) is StandIn]


def test_gradient_and_inference_modes_record_the_same() -> None:
    model, image = models.build("SwinIR/light"), models.images(1)[0]
    usual = around(torch.no_grad, model, image)
    assert around(torch.inference_mode, model, image) == usual
    assert around(torch.enable_grad, model, image) == usual
    assert "aten.addmm.default" in usual


def test_a_dtype_is_recorded_under_autocast() -> None:
    model, image = models.build("linears").bfloat16(), models.images(1)[0]
    recorded = record(model, image, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want = model(image.bfloat16())
    got = fx.GraphModule(recorded.root, recorded.graph)(image.bfloat16())
    assert torch.equal(got, want)
